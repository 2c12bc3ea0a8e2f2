//go:build cgo

// Command kmsd-pkcs11 is the helper of kmsd that talks to a PKCS#11 token: an HSM, a smart card, or SoftHSM. It is started by kmsd's spawner
// or by systemd, never by hand.
//
// It is a program of its own because the module of a vendor is foreign code in its process: it may crash, hang, or read what is there.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"runtime/debug"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/enclave/helper"
	"github.com/kmsd-project/kmsd/enclave/pkcs11"
	"github.com/kmsd-project/kmsd/enclave/pkcs11/token"
)

// version is set at link time.
var version = "devel"

func main() {
	// A module that crashes would have the registers and the stacks printed, and who knows what is in them.
	debug.SetTraceback("none")
	server := helper.Server{Opener: opener{}}
	showVersion := flag.Bool("version", false, "print the version and exit")
	flag.Func("kmsd-user", "the user kmsd runs as, when that is not ours", server.AllowUser)
	flag.Parse()
	if *showVersion {
		fmt.Println(version)
		return
	}
	os.Exit(server.Main())
}

// opener opens tokens. The PIN comes with Login or Unwrap, so that it is not given to a token twice.
type opener struct{}

func (opener) Open(ctx context.Context, kind string, params map[string]string, _ []byte) (enclave.Enclave, error) {
	if kind != pkcs11.Kind {
		return nil, &enclave.Error{Kind: enclave.ErrUnsupported, Detail: fmt.Sprintf("no token of kind %q", kind)}
	}
	s, err := pkcs11.SpecOf(params)
	if err != nil {
		return nil, err
	}
	return token.Open(ctx, s)
}
