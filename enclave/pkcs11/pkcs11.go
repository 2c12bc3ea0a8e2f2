// Package pkcs11 guards slots and keys with a PKCS#11 token: an HSM, a smart card, or the software token SoftHSM.
//
// The module of a vendor is code in somebody else's library, so it is loaded into a helper program, kmsd-pkcs11, and never into kmsd. This
// package is the daemon's side of it, and the form of its blobs; the driver is in package token.
//
// A slot is guarded in one of two ways. Wrapped (hardware symmetric key): an AES-256 key that was made in the token and cannot leave it
// encrypts the slot secret. Agreed (key agreement): a P-256 key of the token agrees with one that software makes and throws away, and the
// secret is encrypted under what they agree on.
//
// What a token protects against is the theft of the disk, and the copying of keys by root on the same machine; using them is up to whoever
// has the PIN, or talks to the helper while the token is unlocked. A software token protects as well as its directory and its PIN.
package pkcs11

import (
	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/enclave/helper"
)

// Kind is the kind of slots and blobs of this driver.
const Kind = "pkcs11"

// Level is what a slot says about its protection.
const Level = "pkcs11 token: keys cannot be copied out of it; whoever has the PIN or root on this machine may use them"

// Dial returns the daemon's side of a token, whose driver runs in the helper. The helper is started by the first call that needs it, and is
// locked until Login or Unwrap brought the PIN; so is one that had to be started anew.
func Dial(d helper.Dialer, s Spec) (*helper.Resident, error) {
	if err := s.Check(); err != nil {
		return nil, err
	}
	return helper.NewResident(d, helper.Config{
		Kind:   Kind,
		Params: s.params(),
		Info:   enclave.Info{Kind: Kind, Level: Level, Binding: s.Serial, NeedsYou: true},
	}), nil
}
