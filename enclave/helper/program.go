package helper

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/kmsd-project/kmsd/enclave"
)

// program is one row of the fixed table of helpers.
type program struct {
	kind string   // of enclave
	file string   // name of the binary
	pass []string // what it gets of kmsd's environment, if kmsd has it; all else is set by environment
}

const (
	busVariable = "DBUS_SESSION_BUS_ADDRESS"
	// noBus is a bus that cannot exist. The keyring library dials the session bus when it is imported, and starts a stray dbus-daemon
	// when it is told of none.
	noBus = "unix:path=/nonexistent"
)

// programs returns the table.
//
// Invariant: what a helper sees of kmsd's environment is in its row and nothing else. There is never a PATH in it.
func programs() []program {
	return []program{
		{kind: "keyring:file", file: "kmsd-keyring"},
		// The display says that somebody is there to answer the keyring's own prompt.
		{kind: "keyring:secret-service", file: "kmsd-keyring", pass: []string{busVariable, "XDG_RUNTIME_DIR", "DISPLAY", "WAYLAND_DISPLAY"}},
		{kind: "pkcs11", file: "kmsd-pkcs11", pass: []string{"SOFTHSM2_CONF"}},
	}
}

// environment returns the whole environment of the helper, out of our own.
func (p program) environment() []string {
	env := []string{} // not nil: that would be all of ours
	for _, name := range p.pass {
		if value := os.Getenv(name); value != "" && name != busVariable {
			env = append(env, name+"="+value)
		}
	}
	switch {
	case slices.Contains(p.pass, busVariable):
		env = append(env, busVariable+"="+sessionBus())
	case p.file == "kmsd-keyring":
		env = append(env, busVariable+"="+noBus)
	}
	return env
}

// sessionBus returns the address of the user's bus: the one kmsd was told of, or the one in its place. Addresses that have a program
// started (unixexec, autolaunch) or leave the machine (tcp) are none. D-Bus specification, section "Server Addresses".
func sessionBus() string {
	address, dir := os.Getenv(busVariable), os.Getenv("XDG_RUNTIME_DIR")
	switch {
	case strings.HasPrefix(address, "unix:") && !strings.Contains(address, ";"):
		return address
	case address == "" && filepath.IsAbs(dir):
		return "unix:path=" + escapeBus(filepath.Join(dir, "bus"))
	}
	return noBus
}

// escapeBus escapes a path for an address.
func escapeBus(path string) string {
	var b strings.Builder
	for _, c := range []byte(path) {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', strings.IndexByte("-_/.\\*", c) >= 0:
			b.WriteByte(c)
		default:
			fmt.Fprintf(&b, "%%%02x", c)
		}
	}
	return b.String()
}

// passed returns the part of our environment that any helper may get, which is the whole environment of the spawner.
func passed() []string {
	env := []string{}
	seen := map[string]bool{}
	for _, p := range programs() {
		for _, name := range p.pass {
			if value := os.Getenv(name); value != "" && !seen[name] {
				env, seen[name] = append(env, name+"="+value), true
			}
		}
	}
	return env
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
