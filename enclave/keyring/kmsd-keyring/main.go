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

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/enclave/helper"
	"github.com/kmsd-project/kmsd/enclave/keyring"
	"github.com/kmsd-project/kmsd/enclave/keyring/ring"
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

func (opener) Open(ctx context.Context, kind string, params map[string]string, _ []byte) (enclave.Enclave, error) {
	switch kind {
	case keyring.FileKind:
		f, err := keyring.OpenFile(params[keyring.ParamDir], files{})
		if err != nil {
			return nil, err
		}
		return keyring.New(kind, keyring.FileLevel, f), nil
	case keyring.SecretServiceKind:
		s, err := openSecrets(ctx, params)
		if err != nil {
			return nil, err
		}
		return keyring.New(kind, keyring.SecretServiceLevel, s), nil
	}
	return nil, &enclave.Error{Kind: enclave.ErrUnsupported, Detail: fmt.Sprintf("no keyring %q", kind)}
}

// files is the file backend of the library.
type files struct{}

func (files) Open(dir, passphrase string) (keyring.Ring, error) {
	r, err := ring.File(dir, passphrase)
	return fileRing{r}, err
}

type fileRing struct{ ring.Ring }

func (r fileRing) Get(name string) ([]byte, error) {
	data, err := r.Ring.Get(name)
	if errors.Is(err, ring.ErrNoItem) {
		return nil, keyring.ErrNoItem
	}
	return data, err
}
