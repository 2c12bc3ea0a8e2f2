package main

import (
	"context"
	"errors"
	"time"

	"github.com/kmsd-project/kmsd/client/ciphertext"
	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/keystore/secmem"
	"github.com/kmsd-project/kmsd/kmsd/audit"
	"github.com/kmsd-project/kmsd/kmsd/engine"
	"github.com/kmsd-project/kmsd/kmsd/mechanism"
	"github.com/kmsd-project/kmsd/kmsd/pki"
)

// wireErrors is the one table from errors to what goes over the wire. The first row that matches counts. retry says that
// the operation had no effect and may be repeated as it is; text replaces the error's own, where that is not for the
// caller.
var wireErrors = []struct {
	err   error
	code  proto.Code
	class proto.Class
	retry bool
	after time.Duration
	text  string
}{
	{engine.ErrInternal, proto.CodeInternal, proto.ClassInternal, false, 0, "internal error"},
	{engine.ErrNotAvailable, proto.CodeNotAvailable, proto.ClassPolicy, true, 0, "key not available: it does not exist, or you have no grant for it"},
	{engine.ErrDenied, proto.CodeNotAvailable, proto.ClassPolicy, true, 0, "not allowed"},
	{engine.ErrDecryption, proto.CodeDecryptionFailed, proto.ClassInput, true, 0, "decryption failed"},
	{mechanism.ErrDecryption, proto.CodeDecryptionFailed, proto.ClassInput, true, 0, "decryption failed"},
	{ciphertext.ErrDecryption, proto.CodeDecryptionFailed, proto.ClassInput, true, 0, "decryption failed"},
	{enclave.ErrDecryption, proto.CodeDecryptionFailed, proto.ClassInput, true, 0, "decryption failed"},
	{mechanism.ErrVerification, proto.CodeVerificationFailed, proto.ClassInput, true, 0, "verification failed"},
	{audit.ErrLocked, proto.CodeLocked, proto.ClassState, true, 0, "the keystore is locked"}, // before ErrAudit, which it may come in
	{engine.ErrUnrecorded, proto.CodeStorage, proto.ClassBackend, true, time.Second, "the act could not be recorded, so it was not carried out"},
	{engine.ErrAudit, proto.CodeStorage, proto.ClassBackend, false, time.Second, "the act could not be recorded: its result is withheld"},
	{engine.ErrClock, proto.CodeClock, proto.ClassState, true, 0, ""},
	{engine.ErrApplication, proto.CodeNotAvailable, proto.ClassPolicy, true, 0, ""},
	{engine.ErrMachine, proto.CodeExists, proto.ClassState, true, 0, ""},
	{engine.ErrNotGenerated, proto.CodeState, proto.ClassState, true, 0, ""}, // these four before what they wrap
	{engine.ErrNoCertificate, proto.CodeState, proto.ClassState, true, 0, ""},
	{engine.ErrNotMade, proto.CodeUnsupported, proto.ClassInput, true, 0, ""},
	{engine.ErrDiffers, proto.CodeConflict, proto.ClassState, true, 0, ""},
	{engine.ErrState, proto.CodeState, proto.ClassState, true, 0, ""},
	{engine.ErrUsage, proto.CodeUsage, proto.ClassState, true, 0, ""},
	{engine.ErrExpired, proto.CodeExpired, proto.ClassState, true, 0, ""},
	{engine.ErrExhausted, proto.CodeExhausted, proto.ClassState, true, 0, ""},
	{engine.ErrRequestKey, proto.CodeConflict, proto.ClassState, true, 0, ""},
	{engine.ErrUnsupported, proto.CodeUnsupported, proto.ClassInput, true, 0, ""},
	{engine.ErrNoStore, proto.CodeUninitialised, proto.ClassState, true, 0, ""},
	{engine.ErrLocked, proto.CodeLocked, proto.ClassState, true, 0, ""},
	{engine.ErrStream, proto.CodeInvalid, proto.ClassInput, true, 0, ""},

	{keystore.ErrNotFound, proto.CodeNotAvailable, proto.ClassPolicy, true, 0, "key not available: it does not exist, or you have no grant for it"},
	{keystore.ErrExists, proto.CodeExists, proto.ClassState, true, 0, "a key of this name exists, or existed"},
	{keystore.ErrStoreExists, proto.CodeExists, proto.ClassState, true, 0, ""},
	{keystore.ErrConflict, proto.CodeConflict, proto.ClassState, true, 0, ""},
	{keystore.ErrLocked, proto.CodeLocked, proto.ClassState, true, 0, ""},
	{keystore.ErrNoStore, proto.CodeUninitialised, proto.ClassState, true, 0, ""},
	{keystore.ErrRollback, proto.CodeRollback, proto.ClassBackend, false, 0, ""},
	{keystore.ErrCounterAbsent, proto.CodeAbsent, proto.ClassBackend, true, 0, ""},
	{keystore.ErrForeign, proto.CodeReplaced, proto.ClassBackend, false, 0, ""},
	{keystore.ErrSecret, proto.CodeAuthFailed, proto.ClassInput, true, 0, ""},
	{keystore.ErrLastSlot, proto.CodeState, proto.ClassState, true, 0, ""},
	{keystore.ErrNoSlot, proto.CodeInvalid, proto.ClassInput, true, 0, ""},
	{keystore.ErrTooLarge, proto.CodeTooLarge, proto.ClassInput, true, 0, ""},
	{keystore.ErrGuard, proto.CodeState, proto.ClassState, true, 0, ""},
	{keystore.ErrNamespaceClosed, proto.CodeAbsent, proto.ClassBackend, true, 0, ""},
	{keystore.ErrNamespaceKey, proto.CodeReplaced, proto.ClassBackend, false, 0, ""},
	{keystore.ErrInvalid, proto.CodeInvalid, proto.ClassInput, true, 0, ""},
	{keystore.ErrNewer, proto.CodeUnsupported, proto.ClassBackend, true, 0, ""},
	{keystore.ErrDamaged, proto.CodeDamaged, proto.ClassBackend, false, 0, "the record is damaged"},
	{keystore.ErrPermissions, proto.CodeMisconfigured, proto.ClassBackend, true, 0, ""},
	{keystore.ErrInUse, proto.CodeMisconfigured, proto.ClassBackend, true, 0, ""},
	{keystore.ErrClosed, proto.CodeLocked, proto.ClassState, true, 0, "the daemon is stopping"},
	{keystore.ErrStorage, proto.CodeStorage, proto.ClassBackend, false, time.Second, "the storage is full or failed"},

	{enclave.ErrLocked, proto.CodeLocked, proto.ClassState, true, 0, ""},
	{enclave.ErrAuth, proto.CodeAuthFailed, proto.ClassInput, true, 0, ""},
	{enclave.ErrLockedOut, proto.CodeLockedOut, proto.ClassBackend, true, 0, ""},
	{enclave.ErrPolicy, proto.CodeMisconfigured, proto.ClassBackend, true, 0, ""},
	{enclave.ErrAbsent, proto.CodeAbsent, proto.ClassBackend, true, 0, ""},
	{enclave.ErrReplaced, proto.CodeReplaced, proto.ClassBackend, true, 0, ""},
	{enclave.ErrCorrupt, proto.CodeDamaged, proto.ClassBackend, true, 0, ""},
	{enclave.ErrBusy, proto.CodeBusy, proto.ClassBusy, true, 500 * time.Millisecond, ""},
	{enclave.ErrMisconfigured, proto.CodeMisconfigured, proto.ClassBackend, true, 0, ""},
	{enclave.ErrUnsupported, proto.CodeUnsupported, proto.ClassBackend, true, 0, ""},

	{audit.ErrDamaged, proto.CodeDamaged, proto.ClassBackend, true, 0, ""},
	{audit.ErrKey, proto.CodeMisconfigured, proto.ClassBackend, true, 0, ""},
	{audit.ErrStorage, proto.CodeStorage, proto.ClassBackend, false, time.Second, ""},
	{audit.ErrClosed, proto.CodeLocked, proto.ClassState, true, 0, "the daemon is stopping"},

	{mechanism.ErrSelfTest, proto.CodeInternal, proto.ClassInternal, true, 0, "the self-test of the mechanism failed"},
	{mechanism.ErrUnsupported, proto.CodeUnsupported, proto.ClassInput, true, 0, ""},
	{mechanism.ErrInput, proto.CodeInvalid, proto.ClassInput, true, 0, ""},
	{mechanism.ErrMaterial, proto.CodeInvalid, proto.ClassInput, true, 0, ""},
	{mechanism.ErrUsages, proto.CodeInvalid, proto.ClassInput, true, 0, ""},

	{pki.ErrName, proto.CodeInvalid, proto.ClassInput, true, 0, ""},
	{pki.ErrSubject, proto.CodeInvalid, proto.ClassInput, true, 0, ""},
	{pki.ErrProfile, proto.CodeInvalid, proto.ClassInput, true, 0, ""},
	{pki.ErrRequest, proto.CodeInvalid, proto.ClassInput, true, 0, ""},
	{pki.ErrCertificate, proto.CodeInvalid, proto.ClassInput, true, 0, ""},
	{pki.ErrChain, proto.CodeInvalid, proto.ClassInput, true, 0, ""},
	{pki.ErrCRL, proto.CodeInvalid, proto.ClassInput, true, 0, ""},
	{pki.ErrPKCS7, proto.CodeInvalid, proto.ClassInput, true, 0, ""},
	{pki.ErrIssuer, proto.CodeUnsupported, proto.ClassInput, true, 0, ""},
	{pki.ErrKey, proto.CodeUnsupported, proto.ClassInput, true, 0, ""},

	{ciphertext.ErrFormat, proto.CodeInvalid, proto.ClassInput, true, 0, ""},
	{ciphertext.ErrTooLarge, proto.CodeTooLarge, proto.ClassInput, true, 0, ""},
	{ciphertext.ErrAlgorithm, proto.CodeUnsupported, proto.ClassInput, true, 0, ""},
	{secmem.ErrArenaFull, proto.CodeBusy, proto.ClassBusy, true, time.Second, ""},

	{keyspec.ErrName, proto.CodeInvalid, proto.ClassInput, true, 0, ""},
	{keyspec.ErrAlgorithm, proto.CodeInvalid, proto.ClassInput, true, 0, ""},
	{keyspec.ErrUsage, proto.CodeInvalid, proto.ClassInput, true, 0, ""},
	{keyspec.ErrScheme, proto.CodeInvalid, proto.ClassInput, true, 0, ""},
	{keyspec.ErrEscrow, proto.CodeInvalid, proto.ClassInput, true, 0, ""},
	{keyspec.ErrReason, proto.CodeInvalid, proto.ClassInput, true, 0, ""},
	{engine.ErrInput, proto.CodeInvalid, proto.ClassInput, true, 0, ""},
	{errOtherStore, proto.CodeReplaced, proto.ClassBackend, false, 0, ""},
	{errSpec, proto.CodeInvalid, proto.ClassInput, true, 0, ""},

	{context.DeadlineExceeded, proto.CodeDeadline, proto.ClassState, false, 0, "the deadline has passed"},
	{context.Canceled, proto.CodeCancelled, proto.ClassState, false, 0, "the request was cancelled"},
}

// wireError returns what a client is told of err. What is not in the table is a defect of kmsd.
func wireError(err error) *proto.Error {
	var ready *proto.Error
	if errors.As(err, &ready) {
		return ready
	}
	out := &proto.Error{Code: proto.CodeInternal, Class: proto.ClassInternal, Message: "internal error"}
	for i := range wireErrors {
		row := &wireErrors[i]
		if !errors.Is(err, row.err) {
			continue
		}
		out = &proto.Error{
			Code: row.code, Class: row.class, Message: row.text, SafeToRetry: row.retry, RetryAfterMS: uint64(row.after.Milliseconds()),
		}
		if out.Message == "" {
			out.Message = err.Error()
		}
		break
	}
	var traced *engine.Traced
	if errors.As(err, &traced) {
		out.DetailID = traced.ID
	}
	out.Remedy = hintOf(err)
	var device *enclave.Error
	if errors.As(err, &device) {
		out.BackendState = device.Kind.Error()
		if !device.Until.IsZero() {
			out.RetryAfterMS = uint64(max(time.Until(device.Until).Milliseconds(), 0))
		}
	}
	if errors.Is(err, keystore.ErrCounterAbsent) {
		out.BackendState = proto.BackendCounter
	}
	return out
}

// inWords is what people are told of an error where there is one text for all of it.
func inWords(e *proto.Error) string {
	if e.Remedy == "" {
		return e.Message
	}
	return e.Message + "; " + e.Remedy
}

// invalid is the refusal of a parameter.
func invalid(text string) error {
	return &proto.Error{Code: proto.CodeInvalid, Class: proto.ClassInput, Message: text, SafeToRetry: true}
}
