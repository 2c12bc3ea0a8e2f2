package client

import (
	"errors"

	"github.com/kmsd-project/kmsd/ipc/proto"
)

// Error is an error that the daemon answered. Code and Class are stable, Message is for people.
type Error = proto.Error

// Errors of the connection.
var (
	ErrUnreachable    = errors.New("cannot reach kmsd")
	ErrClosed         = errors.New("client is closed")
	ErrOutcomeUnknown = errors.New("connection lost before the answer; whether the operation happened is unknown")
	ErrProtocol       = errors.New("kmsd broke the protocol")
)

// The errors of the daemon, one for each code of docs/protocol.md. An [*Error] matches the sentinel with its code. What
// the client refuses by itself, without asking the daemon, wraps the same sentinels.
var (
	ErrInvalid         error = &Error{Code: proto.CodeInvalid, Message: "the request is malformed or out of range"}
	ErrUnknownOp       error = &Error{Code: proto.CodeUnknownOp, Message: "no such operation on this socket"}
	ErrUnsupported     error = &Error{Code: proto.CodeUnsupported, Message: "not with this key, algorithm or backend"}
	ErrVersion         error = &Error{Code: proto.CodeVersion, Message: "no protocol version in common"}
	ErrNotBound        error = &Error{Code: proto.CodeNotBound, Message: "the connection is not bound"}
	ErrIdentityChanged error = &Error{Code: proto.CodeIdentityChanged, Message: "another process spoke on this connection"}
	ErrNotAvailable    error = &Error{Code: proto.CodeNotAvailable, Message: "no such key, or no right to use it"}
	ErrExists          error = &Error{Code: proto.CodeExists, Message: "the name is taken"}
	ErrState           error = &Error{Code: proto.CodeState, Message: "the state of the key does not allow it"}
	ErrUsage           error = &Error{Code: proto.CodeUsage, Message: "the usage of the key does not allow it"}
	ErrExpired         error = &Error{Code: proto.CodeExpired, Message: "outside the validity of the key"}
	ErrExhausted       error = &Error{Code: proto.CodeExhausted, Message: "the key has reached its limit of uses"}
	ErrConflict        error = &Error{Code: proto.CodeConflict, Message: "somebody else changed it meanwhile"}
	ErrDecryption      error = &Error{Code: proto.CodeDecryptionFailed, Message: "decryption failed"}
	ErrVerification    error = &Error{Code: proto.CodeVerificationFailed, Message: "the signature or MAC is wrong"}
	ErrTooLarge        error = &Error{Code: proto.CodeTooLarge, Message: "over a size limit"}
	ErrBusy            error = &Error{Code: proto.CodeBusy, Message: "the daemon is busy"}
	ErrDeadline        error = &Error{Code: proto.CodeDeadline, Message: "the deadline passed in the daemon"}
	ErrCancelled       error = &Error{Code: proto.CodeCancelled, Message: "cancelled"}
	ErrUninitialised   error = &Error{Code: proto.CodeUninitialised, Message: "the daemon has no keystore"}
	ErrLocked          error = &Error{Code: proto.CodeLocked, Message: "the keystore is locked"}
	ErrAuth            error = &Error{Code: proto.CodeAuthFailed, Message: "wrong PIN, passphrase or recovery key"}
	ErrLockedOut       error = &Error{Code: proto.CodeLockedOut, Message: "the device refuses further attempts for now"}
	ErrAbsent          error = &Error{Code: proto.CodeAbsent, Message: "the device is not there"}
	ErrReplaced        error = &Error{Code: proto.CodeReplaced, Message: "the device is not the one that was enrolled"}
	ErrMisconfigured   error = &Error{Code: proto.CodeMisconfigured, Message: "the device cannot be used as configured"}
	ErrRollback        error = &Error{Code: proto.CodeRollback, Message: "the store is older than its counter"}
	ErrDamaged         error = &Error{Code: proto.CodeDamaged, Message: "the record or the store is damaged"}
	ErrClock           error = &Error{Code: proto.CodeClock, Message: "the clock is behind the latest time the store has seen"}
	ErrStorage         error = &Error{Code: proto.CodeStorage, Message: "the disk is full or failed"}
	ErrInternal        error = &Error{Code: proto.CodeInternal, Message: "a defect of kmsd"}
)
