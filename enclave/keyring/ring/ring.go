// Package ring is the keyring library, github.com/99designs/keyring, behind the little that kmsd needs of it. It is the only package
// that imports the library, and only the helper program imports it: the library dials the session bus when it is linked in.
//
// It compiles wherever the library does. On Linux System is the Secret Service. On macOS it is the Keychain, which the library has only
// with cgo, and on Windows the Credential Manager; kmsd does not run there, so neither has been tried.
package ring

import (
	"errors"

	library "github.com/99designs/keyring"
)

// ErrNoItem is returned by Get for an item that is not there, ErrNoBackend by System where there is no keyring to talk to.
var (
	ErrNoItem    = errors.New("no such item")
	ErrNoBackend = errors.New("no such keyring")
)

// errPanic stands for whatever made the library panic: it parses files and replies that somebody else wrote.
var errPanic = errors.New("the keyring library panicked")

// Ring is one keyring of the library. It is used by one goroutine at a time.
type Ring struct {
	keyring library.Keyring
	prefix  string // of the names, for people who look into a keyring they share with other programs
}

// File opens the library's file backend in a directory.
func File(dir, passphrase string) (Ring, error) {
	return open(library.Config{
		AllowedBackends:  []library.BackendType{library.FileBackend},
		FileDir:          dir,
		FilePasswordFunc: library.FixedStringPrompt(passphrase),
	}, "")
}

// System opens the keyring of the operating system. On Linux name is the name of a collection of the Secret Service.
func System(name string) (Ring, error) { return open(systemConfig(name), "kmsd-") }

func open(c library.Config, prefix string) (r Ring, err error) {
	defer contain(&err)
	k, err := library.Open(c)
	if errors.Is(err, library.ErrNoAvailImpl) {
		return Ring{}, ErrNoBackend
	}
	return Ring{keyring: k, prefix: prefix}, err
}

// Set stores data under a name.
func (r Ring) Set(name string, data []byte) (err error) {
	defer contain(&err)
	return r.keyring.Set(library.Item{Key: r.prefix + name, Data: data, Label: "kmsd slot"})
}

// Get returns what is stored under a name.
func (r Ring) Get(name string) (data []byte, err error) {
	defer contain(&err)
	item, err := r.keyring.Get(r.prefix + name)
	if err != nil {
		return nil, noItem(err)
	}
	return item.Data, nil
}

// Remove removes what is stored under a name; nothing there is no error.
func (r Ring) Remove(name string) (err error) {
	defer contain(&err)
	if err := noItem(r.keyring.Remove(r.prefix + name)); !errors.Is(err, ErrNoItem) {
		return err
	}
	return nil
}

func noItem(err error) error {
	if errors.Is(err, library.ErrKeyNotFound) {
		return ErrNoItem
	}
	return err
}

func contain(err *error) {
	if recover() != nil {
		*err = errPanic
	}
}
