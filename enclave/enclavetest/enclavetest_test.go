package enclavetest

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/enclave"
)

func TestMemory(t *testing.T) {
	Run(t, func(*testing.T) Device {
		m := NewMemory("")
		return Device{Open: func(*testing.T) enclave.Enclave { return m.Reopen() }}
	})
}

func TestMemoryWithPIN(t *testing.T) {
	Run(t, func(*testing.T) Device {
		m := NewMemory("1234")
		return Device{
			Open:  func(*testing.T) enclave.Enclave { return m.Reopen() },
			Auth:  enclave.Auth{Secret: []byte("1234")},
			Wrong: []enclave.Auth{{Secret: []byte("4321")}, {Secret: []byte("12345")}},
		}
	})
}

func TestFaults(t *testing.T) {
	m := NewMemory("")
	secret := newSecret()
	b, err := m.Wrap(t.Context(), secret, aad)
	if err != nil {
		t.Fatal(err)
	}
	dst := make([]byte, enclave.SecretSize)
	m.SetFaults(Faults{Unwrap: enclave.ErrLockedOut, Wrap: enclave.ErrBusy, Health: enclave.LockedOut})
	if err := m.Unwrap(t.Context(), b, aad, enclave.Auth{}, dst); !errors.Is(err, enclave.ErrLockedOut) {
		t.Error(err)
	}
	if _, err := m.Wrap(t.Context(), secret, aad); !errors.Is(err, enclave.ErrBusy) {
		t.Error(err)
	}
	if h := m.Health(t.Context()); h.State != enclave.LockedOut {
		t.Error(h)
	}
	m.SetFaults(Faults{Hang: true})
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if err := m.Unwrap(ctx, b, aad, enclave.Auth{}, dst); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	m.SetFaults(Faults{WrongSecret: true})
	if err := m.Unwrap(t.Context(), b, aad, enclave.Auth{}, dst); err != nil || string(dst) == string(secret) {
		t.Error(err)
	}
	m.SetFaults(Faults{})
	m.Clear()
	if err := m.Unwrap(t.Context(), b, aad, enclave.Auth{}, dst); !errors.Is(err, enclave.ErrCorrupt) {
		t.Error(err)
	}
}
