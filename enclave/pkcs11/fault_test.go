package pkcs11_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/enclave/pkcs11"
)

// Whatever the module does where it does it, the call ends in time with an error of the enclave's, and the next one works.
func TestModuleMisbehaves(t *testing.T) {
	h := newSoftHSM(t)
	module := newStub(t, h)
	typed := []error{enclave.ErrAbsent, enclave.ErrBusy, enclave.ErrMisconfigured, enclave.ErrUnsupported, enclave.ErrReplaced, enclave.ErrCorrupt}
	for _, guard := range []pkcs11.Guard{pkcs11.Wrapped, pkcs11.Agreed} {
		spec := h.spec()
		spec.Guard = guard
		e := h.open(t, spec)
		s := enrol(t, e)
		use := "C_Decrypt"
		if guard == pkcs11.Agreed {
			use = "C_DeriveKey"
		}
		for _, function := range []string{"C_OpenSession", "C_Login", "C_Logout", "C_GetTokenInfo", "C_FindObjects", use} {
			for _, how := range []string{"segv", "hang"} {
				if how == "hang" && function != use && (guard == pkcs11.Agreed || testing.Short()) {
					continue // as with the other guard, and each takes a second
				}
				t.Run(strings.Join([]string{string(guard), function, how}, " "), func(t *testing.T) {
					if err := s.unwrap(t.Context(), e, pin()); err != nil {
						t.Fatalf("before: %v", err)
					}
					module.does(t, function+" 1 "+how)
					ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
					defer cancel()
					start := time.Now()
					err := s.unwrap(ctx, e, pin())
					if took := time.Since(start); took > 1500*time.Millisecond {
						t.Errorf("a call with 300 ms took %v", took)
					}
					if !slices.ContainsFunc(typed, func(want error) bool { return errors.Is(err, want) }) {
						t.Errorf("unwrap: %v", err)
					}
					if how == "hang" && !errors.Is(err, context.DeadlineExceeded) {
						t.Errorf("unwrap: %v", err)
					}
					if err := s.unwrap(t.Context(), e, pin()); err != nil {
						t.Errorf("the next call: %v", err)
					}
				})
			}
		}
		for _, function := range []string{"C_GetSlotList", "C_GetTokenInfo", "C_FindObjects", "C_GetAttributeValue", "C_Encrypt", "C_Decrypt"} {
			t.Run(strings.Join([]string{string(guard), function, "garbage"}, " "), func(t *testing.T) {
				for _, call := range []func(context.Context) error{
					func(ctx context.Context) error { return s.unwrap(ctx, e, pin()) },
					func(ctx context.Context) error { _, err := e.Wrap(ctx, s.secret, aad); return err },
				} {
					module.does(t, function+" 1 garbage")
					ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
					defer cancel()
					if err := call(ctx); err != nil && !slices.ContainsFunc(append(typed, enclave.ErrLocked), func(want error) bool { return errors.Is(err, want) }) {
						t.Errorf("%v", err)
					}
					module.does(t)
					soon(t, func() error { return s.unwrap(t.Context(), e, pin()) })
				}
			})
		}
		e.Close()
	}
}

// A module that cannot even be initialised is reported; the helper for it is not left behind.
func TestModuleDiesAtTheStart(t *testing.T) {
	h := newSoftHSM(t)
	module := newStub(t, h)
	module.does(t, "C_Initialize 1 segv")
	e := h.dial(t, h.spec())
	if err := e.Login(t.Context(), pin()); !errors.Is(err, enclave.ErrAbsent) {
		t.Errorf("login: %v", err)
	}
	if err := e.Login(t.Context(), pin()); err != nil {
		t.Errorf("the next login: %v", err)
	}
}

// What a module says when a session, an object or the token has gone: one call is repeated once, behind the caller's back, when the
// connection is still good, and a key that was made for nothing is removed again.
func TestLostSessionsAreMended(t *testing.T) {
	h := newSoftHSM(t)
	module := newStub(t, h)
	e := h.open(t, h.spec())
	for name, rv := range map[string]string{"SESSION_HANDLE_INVALID": "b3", "SESSION_CLOSED": "b0", "OBJECT_HANDLE_INVALID": "82", "DEVICE_REMOVED": "32",
		"TOKEN_NOT_PRESENT": "e0", "DEVICE_ERROR": "30", "GENERAL_ERROR": "5", "OPERATION_ACTIVE": "90", "CRYPTOKI_NOT_INITIALIZED": "190"} {
		t.Run(name, func(t *testing.T) {
			before := h.Objects(t)
			module.does(t, "C_EncryptInit 1 rv "+rv)
			s := enrol(t, e)
			if made := h.Objects(t) - before; made != 1 {
				t.Errorf("%d keys were made for one slot", made)
			}
			module.does(t, "C_DecryptInit 1 rv "+rv)
			err := s.unwrap(t.Context(), e, pin())
			if err == nil {
				return
			}
			// The PIN is not given twice, so that the attempt may fail; the next is on a mended connection.
			if !errors.Is(err, enclave.ErrAbsent) && !errors.Is(err, enclave.ErrBusy) && !errors.Is(err, enclave.ErrCorrupt) && !errors.Is(err, enclave.ErrMisconfigured) {
				t.Errorf("unwrap: %v", err)
			}
			if err := s.unwrap(t.Context(), e, pin()); err != nil {
				t.Errorf("unwrap again: %v", err)
			}
		})
	}
	// All sessions are dead: the connection is made anew, and the login is lost.
	module.does(t, "C_EncryptInit 1 rv b3", "C_GetSessionInfo 1 rv b3")
	if _, err := e.Wrap(t.Context(), make([]byte, enclave.SecretSize), aad); !errors.Is(err, enclave.ErrLocked) {
		t.Errorf("wrap after all sessions died: %v", err)
	}
	if err := e.Login(t.Context(), pin()); err != nil {
		t.Fatal(err)
	}
	enrol(t, e)
	// A dead session of crypto11 is not handed out again: that connection is given up.
	module.does(t, "C_GenerateKey 1 rv b3")
	if _, err := e.Wrap(t.Context(), make([]byte, enclave.SecretSize), aad); !errors.Is(err, enclave.ErrLocked) {
		t.Errorf("wrap with a dead session of crypto11: %v", err)
	}
	if err := e.Login(t.Context(), pin()); err != nil {
		t.Fatal(err)
	}
	enrol(t, e)
	// It stays broken: the call fails, and is not repeated for ever.
	module.does(t, "C_EncryptInit 99 rv b3")
	before := module.calls(t, "C_EncryptInit")
	if _, err := e.Wrap(t.Context(), make([]byte, enclave.SecretSize), aad); !errors.Is(err, enclave.ErrAbsent) {
		t.Errorf("wrap with sessions that die at once: %v", err)
	}
	if n := module.calls(t, "C_EncryptInit") - before; n != 2 {
		t.Errorf("the call was made %d times", n)
	}
}

// Flags of CK_TOKEN_INFO that SoftHSM never sets.
func TestPINFlags(t *testing.T) {
	h := newSoftHSM(t)
	module := newStub(t, h)
	e := h.open(t, h.spec())
	s := enrol(t, e)
	for _, test := range []struct {
		name, flags string
		finalTry    bool
		want        error
		health      enclave.HealthState
		warning     string
	}{
		{"count low", "10000", false, nil, enclave.Locked, "wrong PIN"},
		{"final try", "20000", false, enclave.ErrLockedOut, enclave.LockedOut, "locks"},
		{"final try, told so", "20000", true, nil, enclave.Locked, "locks"},
		{"locked", "40000", true, enclave.ErrLockedOut, enclave.LockedOut, "locked"},
		{"to be changed", "80000", false, enclave.ErrMisconfigured, enclave.Misconfigured, ""},
		{"PIN pad", "100", false, enclave.ErrUnsupported, enclave.Misconfigured, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			module.does(t, "C_GetTokenInfo 99999 flags "+test.flags)
			spec := h.spec()
			spec.FinalTry = test.finalTry
			locked := h.dial(t, spec)
			if health := locked.Health(t.Context()); health.State != test.health {
				t.Errorf("health %+v", health)
			}
			before := module.calls(t, "C_Login")
			if err := s.unwrap(t.Context(), locked, pin()); !errors.Is(err, test.want) {
				t.Errorf("unwrap: %v, want %v", err, test.want)
			}
			spent := 0
			if test.want == nil {
				spent = 1
			}
			if n := module.calls(t, "C_Login") - before; n != spent {
				t.Errorf("%d attempts were spent", n)
			}
			if test.warning != "" && !slices.ContainsFunc(locked.Info().Warnings, func(w string) bool { return strings.Contains(w, test.warning) }) {
				t.Errorf("warnings %q", locked.Info().Warnings)
			}
		})
	}
}

// One call spends one attempt, whatever the token says to it.
func TestOneAttempt(t *testing.T) {
	h := newSoftHSM(t)
	module := newStub(t, h)
	e := h.open(t, h.spec())
	s := enrol(t, e)
	for name, test := range map[string]struct {
		rv   string
		want error
	}{
		"PIN_INCORRECT":       {"a0", enclave.ErrAuth},
		"PIN_INVALID":         {"a1", enclave.ErrAuth},
		"PIN_LEN_RANGE":       {"a2", enclave.ErrAuth},
		"PIN_EXPIRED":         {"a3", enclave.ErrMisconfigured},
		"PIN_LOCKED":          {"a4", enclave.ErrLockedOut},
		"GENERAL_ERROR":       {"5", enclave.ErrMisconfigured},
		"DEVICE_REMOVED":      {"32", enclave.ErrAbsent},
		"SESSION_CLOSED":      {"b0", enclave.ErrAbsent},
		"NOT_INITIALIZED PIN": {"102", enclave.ErrMisconfigured},
	} {
		t.Run(name, func(t *testing.T) {
			for _, call := range []func() error{
				func() error { return s.unwrap(t.Context(), e, pin()) },
				func() error { return e.Login(t.Context(), pin()) },
			} {
				module.does(t, "C_Login 1 rv "+test.rv)
				before := module.calls(t, "C_Login")
				if err := call(); !errors.Is(err, test.want) {
					t.Errorf("%v, want %v", err, test.want)
				}
				if n := module.calls(t, "C_Login") - before; n != 1 {
					t.Errorf("%d attempts were spent", n)
				}
			}
			if err := e.Login(t.Context(), pin()); err != nil {
				t.Fatal(err)
			}
			before := module.calls(t, "C_Login")
			if err := e.Login(t.Context(), wrongPIN()); err != nil {
				t.Errorf("login of a token that is logged in: %v", err)
			}
			if n := module.calls(t, "C_Login") - before; n != 0 {
				t.Errorf("%d attempts were spent on a token that is logged in", n)
			}
		})
	}
}
