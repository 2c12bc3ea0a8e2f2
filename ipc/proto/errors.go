package proto

import "fmt"

// Code is the stable name of an error on the wire.
type Code string

// The error codes.
const (
	CodeInvalid            Code = "invalid"             // the request is malformed or a parameter is out of range
	CodeUnknownOp          Code = "unknown_op"          // no such operation on this socket
	CodeUnsupported        Code = "unsupported"         // known, but not with this key, algorithm or backend
	CodeVersion            Code = "version"             // no protocol version in common
	CodeNotBound           Code = "not_bound"           // only hello may come before bind
	CodeIdentityChanged    Code = "identity_changed"    // another process spoke on this connection
	CodeNotAvailable       Code = "not_available"       // no such key, or no grant: which of the two is not told
	CodeExists             Code = "exists"              // the name is taken
	CodeState              Code = "state"               // the state of the key does not allow it
	CodeUsage              Code = "usage"               // the usage of the key does not allow it
	CodeExpired            Code = "expired"             // outside the validity of the key
	CodeExhausted          Code = "exhausted"           // the key has reached its limit of uses
	CodeConflict           Code = "conflict"            // somebody else changed it meanwhile
	CodeDecryptionFailed   Code = "decryption_failed"   // every failure to decrypt, unwrap or open
	CodeVerificationFailed Code = "verification_failed" // the signature or MAC is wrong
	CodeTooLarge           Code = "too_large"           // over a size limit
	CodeBusy               Code = "busy"                // try again after retry_after_ms
	CodeDeadline           Code = "deadline"            // the deadline of the request passed
	CodeCancelled          Code = "cancelled"           // cancelled by the client
	CodeUninitialised      Code = "uninitialised"       // the daemon has no keystore
	CodeLocked             Code = "locked"              // the keystore is locked
	CodeAuthFailed         Code = "auth_failed"         // wrong PIN, passphrase or recovery key
	CodeLockedOut          Code = "locked_out"          // the device refuses further attempts for now
	CodeAbsent             Code = "absent"              // the device is not there
	CodeReplaced           Code = "replaced"            // the device is not the one that was enrolled, or the store is not the one the slot was made for
	CodeMisconfigured      Code = "misconfigured"       // the device is there but cannot be used as configured
	CodeRollback           Code = "rollback"            // the store is older than its counter
	CodeDamaged            Code = "damaged"             // the record, or the store, failed its integrity check
	CodeClock              Code = "clock"               // the clock is behind the latest time that the keystore has seen
	CodeStorage            Code = "storage"             // the disk is full or failed
	CodeInternal           Code = "internal"            // a defect of kmsd
)

// Class groups the codes by who can do something about them.
type Class string

// The error classes.
const (
	ClassInput    Class = "input"
	ClassPolicy   Class = "policy"
	ClassState    Class = "state"
	ClassBusy     Class = "busy"
	ClassBackend  Class = "backend"
	ClassInternal Class = "internal"
)

// Error is an error on the wire.
type Error struct {
	Code         Code
	Class        Class
	Message      string // for people, never a secret
	RetryAfterMS uint64 // 0: no hint
	SafeToRetry  bool   // the operation had no effect
	BackendState string // state of the device, for errors of one; BackendCounter for those of the keystore's counter
	DetailID     string // number of the audit entry that tells more
	Remedy       string // for people: what to do about it, or empty
}

// BackendCounter is the BackendState of errors of the counter that the keystore is bound to.
const BackendCounter = "counter"

// Error returns the message with the code before it.
func (e *Error) Error() string { return fmt.Sprintf("%s: %s", e.Code, e.Message) }

// Is reports whether target is an Error with the same code, so that errors.Is works with the sentinels of package client.
func (e *Error) Is(target error) bool {
	t, ok := target.(*Error)
	return ok && t.Code == e.Code
}
