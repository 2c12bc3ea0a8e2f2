package engine

import "errors"

// The refusals of the engine. Those of the store, of a mechanism and of package pki come through wrapped as they are.
var (
	ErrNotAvailable = errors.New("key not available")  // missing, or no grant: the caller is not told which
	ErrDenied       = errors.New("not allowed")        // policy, for acts that name no key
	ErrInput        = errors.New("invalid request")    //
	ErrUnsupported  = errors.New("not supported here") // by this key or in this way
	ErrState        = errors.New("the state of the key does not allow this")
	ErrUsage        = errors.New("the usage of the key does not allow this")
	ErrExpired      = errors.New("outside the validity of the key")
	ErrExhausted    = errors.New("the key has reached its limit of uses")
	ErrDecryption   = errors.New("decryption failed") // every failure to decrypt, unwrap or open
	ErrRequestKey   = errors.New("the request key was used for another request")
	ErrNoStore      = errors.New("there is no keystore")
	ErrLocked       = errors.New("the keystore is locked")
	ErrStream       = errors.New("the stream is not open for this")
	ErrAudit        = errors.New("the act could not be recorded")
	ErrUnrecorded   = errors.New("the act could not be recorded, so it was not carried out")
	ErrInternal     = errors.New("internal error")
)

// Traced is an error whose cause the caller is not told. The audit has the cause under ID.
type Traced struct {
	ID  string
	Err error
}

func (t *Traced) Error() string { return t.Err.Error() }

// Unwrap returns what the caller may know.
func (t *Traced) Unwrap() error { return t.Err }

// Remedied is an error with what to do about it: the next command to type.
type Remedied struct {
	Err    error
	Remedy string
}

func (r *Remedied) Error() string { return r.Err.Error() }

// Unwrap returns the error without the remedy.
func (r *Remedied) Unwrap() error { return r.Err }
