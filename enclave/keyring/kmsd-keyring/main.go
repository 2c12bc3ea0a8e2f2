// Command kmsd-keyring is the helper of kmsd that talks to the keyring of the operating system. It is started by kmsd's spawner or by
// systemd, never by hand.
//
// It is a program of its own because importing the keyring library dials the session bus, and starts a stray dbus-daemon where it is
// told of none.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"

	library "github.com/99designs/keyring"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/enclave/helper"
	"github.com/kmsd-project/kmsd/enclave/keyring"
)

// version is set at link time.
var version = "devel"

func main() {
	showVersion := flag.Bool("version", false, "print the version and exit")
	server := helper.Server{Opener: opener{}}
	flag.Func("kmsd-user", "the user kmsd runs as, when that is not ours", server.AllowUser)
	flag.Parse()
	if *showVersion {
		fmt.Println(version)
		return
	}
	os.Exit(server.Main())
}

// opener opens the kinds of keyrings.
type opener struct{}

func (opener) Open(_ context.Context, kind string, params map[string]string, _ []byte) (enclave.Enclave, error) {
	if kind != keyring.FileKind {
		return nil, &enclave.Error{Kind: enclave.ErrUnsupported, Detail: fmt.Sprintf("no keyring %q", kind)}
	}
	f, err := keyring.OpenFile(params[keyring.ParamDir], files{})
	if err != nil {
		return nil, err
	}
	return keyring.New(keyring.FileKind, keyring.FileLevel, f), nil
}

// files is the file backend of the library.
type files struct{}

func (files) Open(dir, passphrase string) (keyring.Ring, error) {
	k, err := library.Open(library.Config{
		AllowedBackends:  []library.BackendType{library.FileBackend},
		FileDir:          dir,
		FilePasswordFunc: library.FixedStringPrompt(passphrase),
	})
	if err != nil {
		return nil, err
	}
	return ring{k}, nil
}

type ring struct{ library.Keyring }

func (r ring) Set(name string, data []byte) error {
	return r.Keyring.Set(library.Item{Key: name, Data: data, Label: "kmsd slot"})
}

// Get contains the library's panics: it parses a file that somebody may have changed.
func (r ring) Get(name string) (data []byte, err error) {
	defer func() {
		if recover() != nil {
			data, err = nil, errors.New("the keyring library panicked")
		}
	}()
	item, err := r.Keyring.Get(name)
	if errors.Is(err, library.ErrKeyNotFound) {
		return nil, keyring.ErrNoItem
	}
	return item.Data, err
}
