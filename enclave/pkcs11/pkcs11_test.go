package pkcs11_test

import (
	"errors"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/enclave/enclavetest"
	"github.com/kmsd-project/kmsd/enclave/pkcs11"
	"github.com/kmsd-project/kmsd/enclave/pkcs11/pkcs11test"
)

func TestConformance(t *testing.T) {
	for _, guard := range []pkcs11.Guard{pkcs11.Wrapped, pkcs11.Agreed} {
		t.Run(string(guard), func(t *testing.T) {
			enclavetest.Run(t, func(t *testing.T) enclavetest.Device {
				h := newSoftHSM(t)
				s := h.spec()
				s.Guard = guard
				return enclavetest.Device{
					Open:  func(t *testing.T) enclave.Enclave { return h.open(t, s) },
					Auth:  pin(),
					Wrong: []enclave.Auth{wrongPIN(), {Secret: []byte("x")}},
				}
			})
		})
	}
}

// A helper that was restarted is locked again, and the slot from before opens.
func TestSurvivesTheHelper(t *testing.T) {
	h := newSoftHSM(t)
	e := h.open(t, h.spec())
	s := enrol(t, e)
	e.Close()
	h.spawner.Close()
	h.startSpawner(t)
	again := h.dial(t, h.spec())
	if _, err := again.Wrap(t.Context(), s.secret, aad); !errors.Is(err, enclave.ErrLocked) {
		t.Errorf("wrap without a login: %v", err)
	}
	if health := again.Health(t.Context()); health.State != enclave.Locked {
		t.Errorf("health before the login: %+v", health)
	}
	if err := s.unwrap(t.Context(), again, enclave.Auth{}); !errors.Is(err, enclave.ErrLocked) {
		t.Errorf("unwrap without a PIN: %v", err)
	}
	if err := s.unwrap(t.Context(), again, pin()); err != nil {
		t.Fatal(err)
	}
	if health := again.Health(t.Context()); health.State != enclave.Ready {
		t.Errorf("health after the login: %+v", health)
	}
	if _, err := again.Wrap(t.Context(), s.secret, aad); err != nil {
		t.Errorf("unwrap has logged in, but wrap: %v", err)
	}
	info := again.Info()
	if len(info.Binding) != 16 || info.Kind != pkcs11.Kind || !slices.ContainsFunc(info.Warnings, func(w string) bool { return strings.Contains(w, "hardware") }) {
		t.Errorf("info %+v", info)
	}
}

func TestTokenTakenAwayAndPutBack(t *testing.T) {
	for name, remove := range map[string]func(*pkcs11test.SoftHSM, *testing.T) func(){"token": (*pkcs11test.SoftHSM).Remove, "reader": (*pkcs11test.SoftHSM).RemoveAll} {
		t.Run(name, func(t *testing.T) {
			h := newSoftHSM(t)
			e := h.open(t, h.spec())
			s := enrol(t, e)
			before := helpers(t)
			putBack := remove(h.SoftHSM, t)
			if _, err := e.Wrap(t.Context(), s.secret, aad); !errors.Is(err, enclave.ErrAbsent) {
				t.Errorf("wrap without a token: %v", err)
			}
			if err := s.unwrap(t.Context(), e, pin()); !errors.Is(err, enclave.ErrAbsent) {
				t.Errorf("unwrap without a token: %v", err)
			}
			if health := e.Health(t.Context()); health.State != enclave.Absent {
				t.Errorf("health without a token: %+v", health)
			}
			putBack()
			soon(t, func() error { return s.unwrap(t.Context(), e, pin()) })
			if _, err := e.Wrap(t.Context(), s.secret, aad); err != nil {
				t.Errorf("wrap after the token is back: %v", err)
			}
			// GCM of crypto11 panics when the token has gone; the helper would not have survived that.
			if after := helpers(t); !slices.Equal(before, after) {
				t.Errorf("the helper was replaced: %v, %v", before, after)
			}
		})
	}
}

// soon fails the test unless f succeeds within two seconds, with the token counting as absent until then.
func soon(t *testing.T, f func() error) {
	t.Helper()
	start := time.Now()
	err := f()
	for errors.Is(err, enclave.ErrAbsent) && time.Since(start) < 2*time.Second {
		time.Sleep(50 * time.Millisecond)
		err = f()
	}
	if err != nil {
		t.Fatalf("after %v: %v", time.Since(start), err)
	}
}

// The token was away, but nobody looked.
func TestTokenAwayForAMoment(t *testing.T) {
	h := newSoftHSM(t)
	e := h.open(t, h.spec())
	s := enrol(t, e)
	putBack := h.Remove(t)
	time.Sleep(100 * time.Millisecond)
	putBack()
	if err := s.unwrap(t.Context(), e, pin()); err != nil {
		t.Errorf("unwrap: %v", err)
	}
}

func TestTokenInitialisedAgainByAnotherProcess(t *testing.T) {
	for _, guard := range []pkcs11.Guard{pkcs11.Wrapped, pkcs11.Agreed} {
		t.Run(string(guard), func(t *testing.T) {
			h := newSoftHSM(t)
			spec := h.spec()
			spec.Guard = guard
			e := h.open(t, spec)
			s := enrol(t, e)
			h.InitialiseAgain(t)
			if health := e.Health(t.Context()); health.State != enclave.Replaced {
				t.Errorf("health: %+v", health)
			}
			for range 3 {
				err := s.unwrap(t.Context(), e, pin())
				var typed *enclave.Error
				if !errors.Is(err, enclave.ErrReplaced) || !errors.As(err, &typed) || !strings.Contains(typed.Remedy, "recovery key") {
					t.Fatalf("unwrap: %v", err)
				}
			}
			if health := e.Health(t.Context()); health.State != enclave.Replaced {
				t.Errorf("health after the attempts: %+v", health)
			}
			late := h.dial(t, spec)
			if err := s.unwrap(t.Context(), late, pin()); !errors.Is(err, enclave.ErrReplaced) {
				t.Errorf("unwrap by another process: %v", err)
			}
			if health := late.Health(t.Context()); health.State != enclave.Replaced {
				t.Errorf("health in another process: %+v", health)
			}
			// The same driver enrols the new token, and the slot is there for the next.
			again := enrol(t, e)
			if err := again.unwrap(t.Context(), e, pin()); err != nil {
				t.Errorf("the new slot: %v", err)
			}
			if err := again.unwrap(t.Context(), h.dial(t, spec), pin()); err != nil {
				t.Errorf("the new slot in another process: %v", err)
			}
			if err := s.unwrap(t.Context(), e, pin()); !errors.Is(err, enclave.ErrReplaced) {
				t.Errorf("the lost slot: %v", err)
			}
			if health := e.Health(t.Context()); health.State != enclave.Ready {
				t.Errorf("health with a new slot: %+v", health)
			}
		})
	}
}

// A token with the label of the enrolled one is another token.
func TestAnotherTokenWithTheLabel(t *testing.T) {
	h := newSoftHSM(t)
	e := h.open(t, h.spec())
	s := enrol(t, e)
	serial := e.Info().Binding
	e.Close()

	h.AddToken(t, pkcs11test.Label)
	if err := s.unwrap(t.Context(), h.dial(t, h.spec()), pin()); !errors.Is(err, enclave.ErrMisconfigured) {
		t.Errorf("two tokens with the label: %v", err)
	}
	byLocation, err := pkcs11.ParseSpec(pkcs11.Spec{Module: h.Module, Token: pkcs11test.Label, Serial: serial}.Location())
	if err != nil {
		t.Fatal(err)
	}
	if err := s.unwrap(t.Context(), h.dial(t, byLocation), pin()); err != nil {
		t.Errorf("by serial: %v", err)
	}

	h.DeleteToken(t, serial)
	if err := s.unwrap(t.Context(), h.dial(t, byLocation), pin()); !errors.Is(err, enclave.ErrReplaced) {
		t.Errorf("only the other token is left, by serial and label: %v", err)
	}
	if err := s.unwrap(t.Context(), h.dial(t, h.spec()), pin()); !errors.Is(err, enclave.ErrReplaced) {
		t.Errorf("only the other token is left, by label: %v", err)
	}
	onlySerial := pkcs11.Spec{Module: h.Module, Serial: serial}
	if err := s.unwrap(t.Context(), h.dial(t, onlySerial), pin()); !errors.Is(err, enclave.ErrAbsent) {
		t.Errorf("only the other token is left, by serial: %v", err)
	}
}

// A wrong PIN in one context leaves the others alone: the same token in another process, and another token of the same module.
func TestWrongPINDisturbsNobodyElse(t *testing.T) {
	h := newSoftHSM(t)
	h.AddToken(t, "other")
	other := h.spec()
	other.Token = "other"
	e, neighbour := h.open(t, h.spec()), h.open(t, other)
	s, n := enrol(t, e), enrol(t, neighbour)
	for range 3 {
		stranger := h.dial(t, h.spec())
		if err := stranger.Login(t.Context(), wrongPIN()); !errors.Is(err, enclave.ErrAuth) {
			t.Fatalf("login with a wrong PIN: %v", err)
		}
		stranger.Close()
		if _, err := e.Wrap(t.Context(), s.secret, aad); err != nil {
			t.Fatalf("the first context: %v", err)
		}
		if _, err := neighbour.Wrap(t.Context(), n.secret, aad); err != nil {
			t.Fatalf("the other token: %v", err)
		}
	}
}

func TestWrongPINLogsOut(t *testing.T) {
	h := newSoftHSM(t)
	e := h.open(t, h.spec())
	s := enrol(t, e)
	if err := s.unwrap(t.Context(), e, wrongPIN()); !errors.Is(err, enclave.ErrAuth) {
		t.Errorf("unwrap with a wrong PIN: %v", err)
	}
	if _, err := e.Wrap(t.Context(), s.secret, aad); !errors.Is(err, enclave.ErrLocked) {
		t.Errorf("wrap after that: %v", err)
	}
	e.Health(t.Context()) // brings what the token says
	if !slices.ContainsFunc(e.Info().Warnings, func(w string) bool { return strings.Contains(w, "wrong PIN") }) {
		t.Errorf("no warning: %v", e.Info().Warnings)
	}
	if err := s.unwrap(t.Context(), e, pin()); err != nil {
		t.Errorf("unwrap with the right PIN: %v", err)
	}
}

// OpenSC's module, for smart cards, is loaded and asked; there is no card where the tests run.
func TestOpenSCWithoutACard(t *testing.T) {
	h := newSoftHSM(t)
	e := h.dial(t, pkcs11.Spec{Module: openSC(t), Token: "no such card"})
	if err := e.Login(t.Context(), pin()); !errors.Is(err, enclave.ErrAbsent) {
		t.Errorf("login: %v", err)
	}
	if health := e.Health(t.Context()); health.State != enclave.Absent {
		t.Errorf("health: %+v", health)
	}
}

func openSC(t *testing.T) string {
	t.Helper()
	for _, path := range []string{"/usr/lib/x86_64-linux-gnu/opensc-pkcs11.so", "/usr/lib/aarch64-linux-gnu/opensc-pkcs11.so", "/usr/lib64/opensc-pkcs11.so"} {
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	t.Fatal("OpenSC is not installed: apt-get install opensc-pkcs11")
	return ""
}
