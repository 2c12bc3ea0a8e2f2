// Package enclave is the seam between kmsd and whatever guards its root key: a TPM, an HSM, the keyring of the operating system, a
// recovery key on paper. An enclave never sees the root key. It guards the 32-byte private half of one slot of the keystore, and it is
// asked to open it once, at unlock.
//
// The package holds the interface, the words drivers answer with, and the sealing that drivers share. It does no I/O and imports only
// the standard library and the vocabulary of kmsd.
package enclave

import (
	"context"
	"errors"
	"time"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// SecretSize is the length in bytes of a slot secret, the only thing Wrap accepts and Unwrap returns.
const SecretSize = 32

// MaxBlob is the largest blob in bytes that a driver may return, for slots and for resident keys alike.
const MaxBlob = 8 << 10

// MaxAAD is the largest associated data in bytes.
const MaxAAD = 256

// Enclave guards the private half of a slot with one device. It is safe for concurrent use: the driver serialises access to its device
// itself.
//
// Invariant: every call that takes a context returns when the context is done, with an error that wraps the context's; work already
// inside a device may finish later, and its result is dropped.
//
// Invariant: one call makes at most one authentication attempt. A driver never retries a PIN, and never remembers one.
//
// Invariant: errors wrap one of the sentinels of this package or the context's error, and never carry a secret.
type Enclave interface {
	// Info says what the enclave is and what it protects against. It does not touch the device.
	Info() Info

	// Wrap gives a secret of SecretSize bytes into the keeping of the device; it is called once, when a slot is enrolled. aad is bound
	// to the blob: Unwrap needs the same. The caller must Unwrap the blob and compare before it relies on it.
	Wrap(ctx context.Context, secret, aad []byte) (Blob, error)

	// Unwrap writes the secret into dst, which is SecretSize bytes of protected memory. On any error dst holds zeros or what it held
	// before, never a part of a secret.
	Unwrap(ctx context.Context, b Blob, aad []byte, a Auth, dst []byte) error

	// Health looks at the device without an authentication attempt. It is cheap enough to be asked every few seconds.
	Health(ctx context.Context) Health

	// Close releases the device. Closing twice is harmless; calls after Close fail with ErrAbsent.
	Close() error
}

// Blob is what a driver needs, besides its device, to find a secret or a resident key again. Its content belongs to the driver, which
// versions it; EncodeBlob gives the outer form. It is not secret, and nothing outside the driver looks inside.
type Blob []byte

// Auth is what a person or a machine presents to a device for one attempt. The caller wipes it afterwards; a driver keeps no copy.
type Auth struct {
	Secret []byte   // a PIN, a passphrase or the text of a recovery key
	Shares [][]byte // the texts of recovery shares, instead of Secret
}

// Info describes an enclave in words that are shown to people and stored with the slot.
type Info struct {
	Kind     string   // recovery, keyring:file, tpm, pkcs11, ...
	Level    string   // what it protects against and what not
	Binding  string   // what the slot is bound to: the name of a TPM's storage key, the serial of a token, the identity of a file
	NeedsYou bool     // Unwrap needs an Auth, so a person or a credential
	Warnings []string // what the administrator should know and perhaps change
}

// HealthState is the state of a device as `kmsctl status` prints it.
type HealthState string

// The health states.
const (
	Ready         HealthState = "ready"         // Unwrap can be expected to work
	Locked        HealthState = "locked"        // there, but needs a person first
	LockedOut     HealthState = "locked-out"    // refuses every attempt until Health.Until
	Absent        HealthState = "absent"        // not there; it may come back
	Replaced      HealthState = "replaced"      // there, but not the one that was enrolled
	Misconfigured HealthState = "misconfigured" // there, but cannot be used as configured
)

// Health is the answer of a device that was looked at.
type Health struct {
	State  HealthState
	Until  time.Time // end of a lock-out, zero when there is none or when it is not known
	Detail string    // for people: the cause, and what to do about it
}

// The outcomes that callers tell apart. Each asks for another remedy, so a driver never returns one for another.
var (
	ErrLocked        = errors.New("needs to be unlocked by a person")      // no Auth was given and the device wants one
	ErrAuth          = errors.New("wrong PIN, passphrase or recovery key") // the attempt was made and refused
	ErrLockedOut     = errors.New("the device refuses attempts for now")   // see Error.Until
	ErrPolicy        = errors.New("the policy of the device refuses")      // for example a changed PCR
	ErrAbsent        = errors.New("the device is not there")               // try again when it is back
	ErrReplaced      = errors.New("the device is not the enrolled one")    // cleared, re-initialised or exchanged: go to recovery
	ErrCorrupt       = errors.New("the slot is damaged")                   // right device, wrong data: go to another slot or a backup
	ErrDecryption    = errors.New("the ciphertext does not decrypt")       // under this resident key; the same for every cause
	ErrBusy          = errors.New("the device is busy")                    // try again
	ErrMisconfigured = errors.New("the device cannot be used as configured")
	ErrUnsupported   = errors.New("the device cannot do this")
)

// Error is one of the sentinels together with what a person needs to know. Drivers return it where there is more to say than the
// sentinel does.
type Error struct {
	Kind   error     // one of the sentinels
	Detail string    // what happened, lower case, no secret
	Remedy string    // what to do now; printed as a hint
	Until  time.Time // for ErrLockedOut
	Cause  error     // may be nil
}

// Error says what happened; the remedy is not part of it.
func (e *Error) Error() string {
	s := e.Kind.Error()
	if e.Detail != "" {
		s = e.Detail + ": " + s
	}
	if e.Cause != nil {
		s += ": " + e.Cause.Error()
	}
	return s
}

// Unwrap makes errors.Is see both the sentinel and the cause.
func (e *Error) Unwrap() []error {
	if e.Cause == nil {
		return []error{e.Kind}
	}
	return []error{e.Kind, e.Cause}
}

// Forgetter is implemented by enclaves that keep something of their own for each blob. It is found by type assertion.
type Forgetter interface {
	// Forget removes what the device holds for a blob whose slot or key is gone. A blob it does not know is no error.
	Forget(ctx context.Context, b Blob) error
}

// Resident is implemented by enclaves that hold private keys which never leave the device. It is found by type assertion. A resident
// key is an opaque blob in its record, never a device handle: the driver finds or loads the key from the blob alone, after a restart
// and after the device was away.
type Resident interface {
	// Generate makes a key in the device and returns its blob and its public key as SubjectPublicKeyInfo, DER; the latter is nil for
	// symmetric keys.
	Generate(ctx context.Context, s Spec) (b Blob, spki []byte, err error)

	// Do performs one operation and appends the result to dst[:0].
	Do(ctx context.Context, b Blob, op Op, dst []byte) ([]byte, error)

	// Destroy removes the key from the device. A key that is not there is no error.
	Destroy(ctx context.Context, b Blob) error

	// Mechanisms lists what this very device can do, by asking it.
	Mechanisms(ctx context.Context) ([]Mechanism, error)

	// MaxParallel is how many calls of Do the device can usefully work on at once, at least 1. More wait for their turn, or their context.
	MaxParallel() int
}

// Session is implemented by enclaves whose resident keys work only after a login, as those of an HSM do: a slot of another device may
// have opened the store, so that no PIN went to this one. It is found by type assertion.
//
// A login lasts until the driver is closed, or the device or the driver's process is lost. Before it and after that the methods of
// Resident fail with ErrLocked. Nobody but the caller can log in again, since nobody else has the PIN.
type Session interface {
	// Login makes one authentication attempt; for a device that is logged in already it makes none. A driver that needs no login
	// answers ErrUnsupported.
	Login(ctx context.Context, a Auth) error
}

// Importer is implemented by enclaves that take over keys which another program has made in the same device. It is found by type assertion.
type Importer interface {
	// Import takes over the key in a file of the format that such programs share, with the file's password, nil for none, and returns what
	// Generate does. The key never was outside of the device; the file goes on working.
	Import(ctx context.Context, file, password []byte, s Spec) (b Blob, spki []byte, err error)
}

// Machine is implemented by enclaves that hold the identity of a registration machine: the two keys that MOSIP's client has the device make
// from its own seed and a fixed template, so that they are the same ones each time. It is found by type assertion.
type Machine interface {
	// MachineKey finds the machine's key for signatures or, when s has the usage decrypt, that for decryption, and returns what Generate does.
	// Do takes the blob; Destroy only has the device keep the key no longer, since its template makes it again.
	MachineKey(ctx context.Context, s Spec) (b Blob, spki []byte, err error)
}

// Spec describes a resident key to be made.
type Spec struct {
	ID        [16]byte // random, chosen by the caller; what the device files the key under
	Algorithm keyspec.Algorithm
	Usages    []keyspec.Usage
	AAD       []byte // bound to the blob where the device can
}

// Op is one operation with a resident key.
type Op struct {
	Usage  keyspec.Usage  // sign, decrypt, agree, encrypt, mac, derive, wrap, unwrap
	Scheme keyspec.Scheme // empty where the algorithm has only one
	Input  []byte         // the message, the ciphertext, or the peer's public key as SubjectPublicKeyInfo for agree
	Digest bool           // Input is already hashed, by the hash of the scheme
	Nonce  []byte         // for AEADs
	AAD    []byte         // associated data of the operation, the OAEP label, or the derivation info
	Bound  []byte         // Spec.AAD of the key
}

// Mechanism is one thing a device can do.
type Mechanism struct {
	Algorithm keyspec.Algorithm
	Usage     keyspec.Usage
	Schemes   []keyspec.Scheme // empty where the algorithm has only one
}

// Attester is implemented by enclaves that can prove to somebody else that a key is resident. It is found by type assertion.
type Attester interface {
	// Attest returns the device's statement about the key, over the nonce of the one who asks (16 to 64 bytes).
	Attest(ctx context.Context, b Blob, nonce []byte) (Evidence, error)
}

// Evidence is a device's statement about a key.
type Evidence struct {
	Format    string   // tpm-certify, pkcs11-..., as the verifier knows it
	Statement []byte   // what was signed
	Signature []byte   // over Statement
	Chain     [][]byte // certificates of the attesting key, DER, leaf first; may be empty
}

// Counter is implemented by enclaves with a counter that survives restarts and never goes back. It is found by type assertion.
type Counter interface {
	// ReadCounter returns the counter filed under id, or ErrAbsent when the device has none for it.
	ReadCounter(ctx context.Context, id [16]byte) (uint64, error)

	// IncrementCounter adds one, making the counter when there is none, and returns the new value.
	IncrementCounter(ctx context.Context, id [16]byte) (uint64, error)
}

// SlotAAD is the associated data of the slot with this UUID: what Wrap and Unwrap bind the blob of a slot to.
func SlotAAD(uuid [16]byte) []byte {
	return append([]byte("kmsd slot v1"), uuid[:]...)
}
