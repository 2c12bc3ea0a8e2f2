//go:build cgo

package token

import (
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"github.com/kmsd-project/kmsd/enclave"
)

// checkModule returns the file behind the path of a module, if nobody but root and our own user could have put anything there.
func checkModule(path string) (string, error) {
	refuse := func(format string, args ...any) (string, error) {
		return "", &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: "module " + path, Cause: fmt.Errorf(format, args...),
			Remedy: "install the module as root, writable by root only"}
	}
	if !filepath.IsAbs(path) {
		return refuse("the path is not absolute")
	}
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return refuse("%w", err)
	}
	for _, p := range []string{real, filepath.Dir(real), filepath.Dir(path)} {
		info, err := os.Stat(p)
		if err != nil {
			return refuse("%w", err)
		}
		owner := info.Sys().(*syscall.Stat_t).Uid
		if owner != 0 && int(owner) != os.Geteuid() {
			return refuse("%s belongs to uid %d", p, owner)
		}
		if p == real && !info.Mode().IsRegular() {
			return refuse("not a regular file")
		}
		mode, others := info.Mode(), os.FileMode(0o022)
		if info.IsDir() {
			if others = 0o002; mode&os.ModeSticky != 0 { // nobody can replace what is not his
				others = 0
			}
		}
		if mode&others != 0 {
			return refuse("others may write to %s", p)
		}
	}
	return real, nil
}
