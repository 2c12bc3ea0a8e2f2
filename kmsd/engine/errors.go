package engine

import "errors"

// The refusals of the engine. Refusals of a mechanism, of the store and of package pki come through wrapped as they are.
var (
	ErrNotAvailable = errors.New("key not available") // missing, or no grant: the caller is not told which
	ErrDenied       = errors.New("not allowed")        // policy, for acts that name no key
	ErrInput        = errors.New("invalid request")
	ErrUnsupported  = errors.New("not supported by this key")
	ErrExists       = errors.New("a key of this name exists")
	ErrState        = errors.New("the state of the key does not allow this")
	ErrUsage        = errors.New("the usage of the key does not allow this")
	ErrExpired      = errors.New("outside the validity of the key")
	ErrExhausted    = errors.New("the key has reached its limit of uses")
	ErrDecryption   = errors.New("decryption failed") // every failure to decrypt, unwrap or open
	ErrVerification = errors.New("verification failed")
	ErrTooLarge     = errors.New("too large")
	ErrLocked       = errors.New("the keystore is locked")
	ErrNoStore      = errors.New("there is no keystore")
	ErrStream       = errors.New("the stream is not open for this")
	ErrAudit        = errors.New("the act could not be recorded")
	ErrInternal     = errors.New("internal error")
)
