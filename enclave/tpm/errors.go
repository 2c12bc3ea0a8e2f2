package tpm

import (
	"context"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"

	"github.com/kmsd-project/kmsd/enclave"
)

// ErrNoCounter says that the device is there and has no counter for the id. It comes wrapped together with enclave.ErrAbsent.
var ErrNoCounter = errors.New("the TPM has no counter for this store")

// lostError says that the link broke. The command that was under way may have been executed or not.
type lostError struct{ cause error }

func (e *lostError) Error() string { return "connection to the TPM lost: " + e.cause.Error() }
func (e *lostError) Unwrap() error { return e.cause }

func corrupt(detail string, cause error) error {
	return &enclave.Error{Kind: enclave.ErrCorrupt, Detail: detail, Cause: cause}
}

func unsupported(format string, args ...any) error {
	return &enclave.Error{Kind: enclave.ErrUnsupported, Detail: fmt.Sprintf(format, args...)}
}

// isOneOf reports whether err is one of the response codes, whatever handle, session or parameter it is about.
func isOneOf(err error, codes ...tpm2.TPMRC) bool {
	for _, rc := range codes {
		if errors.Is(err, rc) {
			return true
		}
	}
	return false
}

// isReset recognises a TPM that was reset or cleared under us: it wants TPM2_Startup, or does not know our handles any more. The command
// was not executed.
func isReset(err error) bool {
	return isOneOf(err, tpm2.TPMRCInitialize, tpm2.TPMRCReferenceH0, tpm2.TPMRCReferenceH1, tpm2.TPMRCReferenceS0, tpm2.TPMRCReferenceS1)
}

// isFull recognises a TPM without a free slot. The command was not executed.
func isFull(err error) bool {
	return isOneOf(err, tpm2.TPMRCObjectMemory, tpm2.TPMRCSessionMemory, tpm2.TPMRCMemory, tpm2.TPMRCObjectHandles,
		tpm2.TPMRCSessionHandles, tpm2.TPMRCContextGap)
}

// translate makes one of the enclave's errors out of whatever a job failed with. Steps that know better what a response code means to
// them have made theirs already.
func translate(err error) error {
	var done *enclave.Error
	var lost *lostError
	var rc tpm2.TPMRC
	switch {
	case err == nil, errors.As(err, &done), errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	case errors.As(err, &lost):
		return &enclave.Error{Kind: enclave.ErrAbsent, Cause: err}
	case !errors.As(err, &rc):
		// The answer could not be parsed, or its HMAC is wrong.
		return &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: "the TPM answers what no TPM answers, or somebody changed it on the way", Cause: err}
	}
	e := &enclave.Error{Kind: enclave.ErrUnsupported, Cause: rc}
	switch {
	case isOneOf(rc, tpm2.TPMRCRetry, tpm2.TPMRCYielded, tpm2.TPMRCTesting, tpm2.TPMRCNVRate, tpm2.TPMRCNVUnavailable, tpm2.TPMRCCanceled),
		isFull(rc), isReset(rc):
		e.Kind = enclave.ErrBusy
		e.Remedy = "try again; if it stays busy, another program uses the TPM without a resource manager"
	case isOneOf(rc, tpm2.TPMRCLockout):
		e.Kind = enclave.ErrLockedOut
	case isOneOf(rc, tpm2.TPMRCBadAuth, tpm2.TPMRCAuthFail):
		e.Kind = enclave.ErrAuth
	case isOneOf(rc, tpm2.TPMRCPolicyFail, tpm2.TPMRCPolicyCC, tpm2.TPMRCPCRChanged, tpm2.TPMRCPCR):
		e.Kind = enclave.ErrPolicy
	case isOneOf(rc, tpm2.TPMRCIntegrity):
		e.Kind = enclave.ErrCorrupt
	case isOneOf(rc, tpm2.TPMRCFailure, tpm2.TPMRCReboot, tpm2.TPMRCUpgrade, tpm2.TPMRCNeedsTest):
		e.Kind = enclave.ErrMisconfigured
		e.Remedy = "the TPM has failed its self-test or wants a restart: power-cycle the machine"
	case isOneOf(rc, tpm2.TPMRCHierarchy, tpm2.TPMRCDisabled, tpm2.TPMRCLocality):
		e.Kind = enclave.ErrMisconfigured
		e.Remedy = "enable the TPM's storage hierarchy in the firmware"
	case isOneOf(rc, tpm2.TPMRCNVSpace):
		e.Kind = enclave.ErrMisconfigured
		e.Remedy = "the TPM's memory is full: remove indexes and objects that are not needed (tpm2_getcap handles-nv-index, handles-persistent)"
	}
	return e
}
