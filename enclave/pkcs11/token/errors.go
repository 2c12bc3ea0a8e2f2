//go:build cgo

package token

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/miekg/pkcs11"

	"github.com/kmsd-project/kmsd/enclave"
)

const (
	remedyReplaced = "open the store with another slot or the recovery key, then enrol this token again"
	remedyPIN      = "unlock with the PIN of the token: kmsctl unlock"
	remedyPINUsed  = "unblock the PIN with the tool of the token's vendor, or unlock with another slot"
)

func unsupported(format string, args ...any) error {
	return &enclave.Error{Kind: enclave.ErrUnsupported, Detail: fmt.Sprintf(format, args...)}
}

func corrupt(detail string) error { return &enclave.Error{Kind: enclave.ErrCorrupt, Detail: detail} }

func replaced(detail string) error {
	return &enclave.Error{Kind: enclave.ErrReplaced, Detail: detail, Remedy: remedyReplaced}
}

func errLocked() error {
	return &enclave.Error{Kind: enclave.ErrLocked, Detail: "nobody is logged in to the token", Remedy: remedyPIN}
}

func errClosed() error {
	return &enclave.Error{Kind: enclave.ErrAbsent, Detail: "the PKCS#11 driver is closed"}
}

// isOneOf reports whether err is one of the return values.
func isOneOf(err error, codes ...pkcs11.Error) bool {
	var rv pkcs11.Error
	return errors.As(err, &rv) && slices.Contains(codes, rv)
}

// isLost recognises a token or a connection to it that has gone (PKCS#11 2.40 base section 5.1).
func isLost(err error) bool {
	return isOneOf(err, pkcs11.CKR_SESSION_HANDLE_INVALID, pkcs11.CKR_SESSION_CLOSED, pkcs11.CKR_DEVICE_REMOVED, pkcs11.CKR_TOKEN_NOT_PRESENT,
		pkcs11.CKR_TOKEN_NOT_RECOGNIZED, pkcs11.CKR_SLOT_ID_INVALID, pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED, pkcs11.CKR_DEVICE_ERROR)
}

// isDoubtful recognises errors after which the connection is looked at before it is used again. SoftHSM answers to everything about a
// token that went away with CKR_OBJECT_HANDLE_INVALID or CKR_GENERAL_ERROR.
func isDoubtful(err error) bool {
	return isLost(err) || isOneOf(err, pkcs11.CKR_OBJECT_HANDLE_INVALID, pkcs11.CKR_KEY_HANDLE_INVALID, pkcs11.CKR_GENERAL_ERROR,
		pkcs11.CKR_FUNCTION_FAILED, pkcs11.CKR_OPERATION_ACTIVE, pkcs11.CKR_OPERATION_NOT_INITIALIZED, pkcs11.CKR_USER_NOT_LOGGED_IN)
}

// isUnable recognises a token that does not do what it was asked for, in these words.
func isUnable(err error) bool {
	return isOneOf(err, pkcs11.CKR_MECHANISM_INVALID, pkcs11.CKR_MECHANISM_PARAM_INVALID, pkcs11.CKR_ARGUMENTS_BAD, pkcs11.CKR_FUNCTION_NOT_SUPPORTED,
		pkcs11.CKR_KEY_TYPE_INCONSISTENT, pkcs11.CKR_KEY_FUNCTION_NOT_PERMITTED, pkcs11.CKR_KEY_SIZE_RANGE, pkcs11.CKR_CURVE_NOT_SUPPORTED,
		pkcs11.CKR_DOMAIN_PARAMS_INVALID, pkcs11.CKR_ATTRIBUTE_TYPE_INVALID, pkcs11.CKR_ATTRIBUTE_VALUE_INVALID, pkcs11.CKR_ATTRIBUTE_READ_ONLY,
		pkcs11.CKR_TEMPLATE_INCOMPLETE, pkcs11.CKR_TEMPLATE_INCONSISTENT, pkcs11.CKR_DATA_LEN_RANGE, pkcs11.CKR_DATA_INVALID)
}

// translate makes one of the enclave's errors out of whatever the token answered. Steps that know better what an answer means to them have
// made theirs already.
func translate(err error) error {
	var done *enclave.Error
	var rv pkcs11.Error
	switch {
	case err == nil, errors.As(err, &done), errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	case !errors.As(err, &rv):
		return &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: "the PKCS#11 module", Cause: err}
	}
	e := &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: "the token", Cause: rv}
	switch {
	case isLost(rv):
		e.Kind, e.Remedy = enclave.ErrAbsent, "put the token back; the next request uses it"
	case isUnable(rv):
		e.Kind = enclave.ErrUnsupported
	case isOneOf(rv, pkcs11.CKR_USER_NOT_LOGGED_IN):
		e.Kind, e.Remedy = enclave.ErrLocked, remedyPIN
	case isOneOf(rv, pkcs11.CKR_PIN_INCORRECT, pkcs11.CKR_PIN_INVALID, pkcs11.CKR_PIN_LEN_RANGE):
		e.Kind, e.Remedy = enclave.ErrAuth, "the token counts wrong PINs: make sure before the next attempt"
	case isOneOf(rv, pkcs11.CKR_PIN_LOCKED):
		e.Kind, e.Remedy = enclave.ErrLockedOut, remedyPINUsed
	case isOneOf(rv, pkcs11.CKR_PIN_EXPIRED, pkcs11.CKR_USER_PIN_NOT_INITIALIZED):
		e.Remedy = "set the user's PIN with the tool of the token's vendor"
	case isOneOf(rv, pkcs11.CKR_SESSION_COUNT, pkcs11.CKR_HOST_MEMORY, pkcs11.CKR_OBJECT_HANDLE_INVALID, pkcs11.CKR_KEY_HANDLE_INVALID,
		pkcs11.CKR_OPERATION_ACTIVE, pkcs11.CKR_OPERATION_NOT_INITIALIZED, pkcs11.CKR_FUNCTION_CANCELED):
		e.Kind, e.Remedy = enclave.ErrBusy, "try again"
	case isOneOf(rv, pkcs11.CKR_DEVICE_MEMORY):
		e.Remedy = "the token is full: remove keys that are not needed"
	case isOneOf(rv, pkcs11.CKR_TOKEN_WRITE_PROTECTED, pkcs11.CKR_SESSION_READ_ONLY):
		e.Remedy = "the token is write-protected"
	}
	return e
}
