package helper

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/kmsd-project/kmsd/enclave"
)

// program is one row of the fixed table of helpers.
type program struct {
	kind string   // of enclave
	file string   // name of the binary
	env  []string // the whole environment
}

// programs returns the table.
//
// Invariant: what a helper sees of kmsd's environment is in its row and nothing else.
func programs() []program {
	return []program{
		// The keyring library dials the session bus when it is imported, and starts a stray dbus-daemon when it is told of none. A
		// bus that cannot exist prevents that.
		{kind: "keyring:file", file: "kmsd-keyring", env: []string{"DBUS_SESSION_BUS_ADDRESS=unix:path=/nonexistent"}},
	}
}

func programFor(kind string) (program, error) {
	for _, p := range programs() {
		if p.kind == kind {
			return p, nil
		}
	}
	return program{}, unknownKind(kind)
}

// directories are where the binaries are: beside kmsd, or in libexec. PATH is never searched.
func directories() ([]string, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	dir := filepath.Dir(self)
	return []string{dir, filepath.Join(dir, "..", "libexec", "kmsd")}, nil
}

// find returns the path of a helper that nobody else could have replaced.
func find(file string, dirs []string) (string, error) {
	for _, dir := range dirs {
		path := filepath.Join(dir, file)
		info, err := os.Lstat(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return "", &enclave.Error{Kind: enclave.ErrMisconfigured, Cause: err}
		}
		owner := info.Sys().(*syscall.Stat_t).Uid
		switch {
		case !info.Mode().IsRegular():
			err = errors.New("not a regular file")
		case info.Mode().Perm()&0o022 != 0:
			err = errors.New("others may write to it")
		case owner != 0 && int(owner) != os.Geteuid() && !ownsExecutable(owner):
			err = fmt.Errorf("belongs to uid %d", owner)
		default:
			return path, nil
		}
		return "", &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: path, Cause: err, Remedy: "install " + file + " again"}
	}
	return "", &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: file + " is not installed", Remedy: "install " + file + " in " + dirs[0]}
}

// ownsExecutable reports whether uid owns the program that runs: who can replace kmsd itself may as well own its helpers.
func ownsExecutable(uid uint32) bool {
	info, err := os.Stat("/proc/self/exe")
	return err == nil && info.Sys().(*syscall.Stat_t).Uid == uid
}
