package tpm

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/kmsd-project/kmsd/enclave"
)

// Bits of TPM_PT_PERMANENT (TPM 2.0 part 2 section 8.6).
const (
	permanentLockoutAuthSet = 1 << 2
	permanentDisableClear   = 1 << 8
)

const warnClear = "anybody who may use the TPM may clear it, and with it this slot: set the lockout password (tpm2_changeauth -c lockout)"

// Health looks whether the TPM answers, is the enrolled one, and takes PINs.
func (t *TPM) Health(ctx context.Context) enclave.Health {
	l, err := call(ctx, t, func(d *device) (lockout, error) { return d.look() })
	if err == nil {
		t.warn(warnClear, l.clearable)
		if l.locked && t.Info().NeedsYou {
			return enclave.Health{State: enclave.LockedOut, Until: l.until,
				Detail: fmt.Sprintf("%d wrong PINs or losses of power: wait, or reset the count with the lockout password (tpm2_dictionarylockout -c)", l.count)}
		}
		return enclave.Health{State: enclave.Ready, Detail: t.address.String()}
	}
	h := enclave.Health{State: enclave.Absent, Detail: err.Error()}
	var e *enclave.Error
	if errors.As(err, &e) && e.Remedy != "" {
		h.Detail += "; " + e.Remedy
	}
	switch {
	case errors.Is(err, enclave.ErrReplaced):
		h.State = enclave.Replaced
	case errors.Is(err, enclave.ErrMisconfigured), errors.Is(err, enclave.ErrUnsupported):
		h.State = enclave.Misconfigured
	}
	return h
}

// warn adds a warning or takes it away.
func (t *TPM) warn(text string, on bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.warnings = nil
	if on {
		t.warnings = []string{text}
	}
}

// look checks that the storage key is still there and the pinned one, without making it anew when it is.
func (d *device) look() (lockout, error) {
	root, err := d.parent()
	if err != nil {
		return lockout{}, err
	}
	if _, err := (tpm2.ReadPublic{ObjectHandle: root.handle}).Execute(d); err != nil {
		if isOneOf(err, tpm2.TPMRCHandle) {
			err = tpm2.TPMRCReferenceH0
		}
		return lockout{}, err
	}
	return d.lockout()
}

// lockout is the state of the dictionary attack protection (TPM 2.0 part 1 section 19.8).
type lockout struct {
	locked     bool
	count, max uint32
	until      time.Time // when the next attempt is allowed, at the latest; zero when that is not known
	clearable  bool
}

func (d *device) lockout() (lockout, error) {
	var l lockout
	permanent, err := d.property(tpm2.TPMPTPermanent)
	if err != nil {
		return l, err
	}
	l.clearable = permanent&(permanentLockoutAuthSet|permanentDisableClear) == 0
	if l.count, err = d.property(tpm2.TPMPTLockoutCounter); err != nil {
		return l, err
	}
	if l.max, err = d.property(tpm2.TPMPTMaxAuthFail); err != nil {
		return l, err
	}
	interval, err := d.property(tpm2.TPMPTLockoutInterval)
	if err != nil {
		return l, err
	}
	// The count goes down by one in each interval in which the TPM has power. How much of the present one is over, it does not tell.
	if l.locked = l.max > 0 && l.count >= l.max; l.locked && interval > 0 {
		l.until = time.Now().Add(time.Duration(l.count-l.max+1) * time.Duration(interval) * time.Second)
	}
	return l, nil
}

// lockedOut says until when.
func (d *device) lockedOut(cause error) error {
	l, err := d.lockout()
	if err != nil {
		return err
	}
	return &enclave.Error{Kind: enclave.ErrLockedOut, Until: l.until, Cause: cause, Detail: "too many wrong PINs, or losses of power",
		Remedy: "wait, or reset the count with the lockout password (tpm2_dictionarylockout -c), or unlock with another slot"}
}
