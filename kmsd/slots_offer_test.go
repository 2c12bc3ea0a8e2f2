package main

import (
	"testing"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/enclave/enclavetest"
	"github.com/kmsd-project/kmsd/enclave/keyring"
	"github.com/kmsd-project/kmsd/enclave/recovery"
)

// What opens a new keystore, when nobody says so, is the best that is there and works.
func TestAutomaticChoice(t *testing.T) {
	t.Parallel()
	r := newSlotRig(t)
	machine, spec := startTPM(t)
	session := enclavetest.NewMemory("")
	r.place(keyring.SecretServiceKind, session)
	r.offers = []string{spec, keyring.SecretServiceKind, keyring.FileKind, recovery.Kind}
	if got := r.automatic(t.Context()); got != spec {
		t.Errorf("with a TPM: %s", got)
	}
	machine.PowerOff()
	if got := r.automatic(t.Context()); got != keyring.FileKind { // the keyring of a session would keep the daemon shut without it
		t.Errorf("with a TPM that does not answer: %s", got)
	}
	seen := r.look(t.Context())
	if len(seen) != 4 || seen[0].Health.State != enclave.Absent || seen[0].Level == "" || seen[1].Health.State != enclave.Ready {
		t.Errorf("offers %+v", seen)
	}
	r.machine.SetFaults(enclavetest.Faults{Health: enclave.Misconfigured})
	if got := r.automatic(t.Context()); got != keyring.FileKind { // and the error says what is wrong with it
		t.Errorf("with nothing: %s", got)
	}
	must(t, machine.PowerOn())
	s, _ := r.store(t, initParams{})
	if slot := s.Slots()[0]; slot.Kind != "tpm" {
		t.Errorf("slot %+v", slot)
	}
}

// A device that is elsewhere now is found by what the configuration says.
func TestMovedDevice(t *testing.T) {
	t.Parallel()
	r := newSlotRig(t)
	_, spec := startTPM(t)
	s, _ := r.store(t, initParams{Enclave: spec})
	slot := s.Slots()[0]
	moved := newSlotRig(t)
	moved.devices.moved = map[string]string{"tpm:unix:/nonexistent/sock": spec}
	slot.Location = "tpm:unix:/nonexistent/sock"
	if h := moved.health(t.Context(), slot); h.State != enclave.Ready {
		t.Errorf("health %+v", h)
	}
	if h := r.health(t.Context(), slot); h.State != enclave.Absent {
		t.Errorf("health of a device that is not there: %+v", h)
	}
}
