package main

import (
	"errors"
	"strings"
	"testing"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/enclave/enclavetest"
	"github.com/kmsd-project/kmsd/enclave/keyring"
	"github.com/kmsd-project/kmsd/enclave/recovery"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
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

// Resident keys are made where the configuration says, or in the device of the first slot; the slot's driver is the key's.
func TestHomeOfResidentKeys(t *testing.T) {
	t.Parallel()
	r := newSlotRig(t)
	machine, spec := startTPM(t)
	for _, p := range []keyspec.Protection{keyspec.TPM, keyspec.HSM} {
		if _, err := r.Device(t.Context(), p, "", ""); !errors.Is(err, enclave.ErrUnsupported) || hintOf(err) == "" {
			t.Errorf("%s without a device: %v", p, err)
		}
	}
	r.homes.TPM = spec
	before, err := r.Device(t.Context(), keyspec.TPM, "", "")
	if err != nil || before.Location != spec || before.Binding != "" {
		t.Errorf("%+v, %v", before, err)
	}
	s, _ := r.store(t, initParams{Enclave: spec})
	r.slotKeeper.store.Store(s)
	slot := s.Slots()[0]
	for _, home := range []string{"", spec} {
		r.homes.TPM = home
		d, err := r.Device(t.Context(), keyspec.TPM, "", "")
		guard, _ := r.guard(slot)
		if err != nil || d.Location != spec || d.Binding != slot.Binding || d.Enclave != guard || d.Resident == nil {
			t.Errorf("%+v, %v", d, err)
		}
	}
	// The TPM was cleared and enrolled again; the stale slot is still there.
	must(t, machine.Clear())
	added, _, err := r.add(t.Context(), s, addParams{Enclave: spec})
	must(t, err)
	if d, err := r.Device(t.Context(), keyspec.TPM, "", ""); err != nil || d.Binding != added.Binding || added.Binding == slot.Binding {
		t.Errorf("%+v, %v, want %+v", d, err, added)
	}
	r.place(keyring.FileKind, r.machine)
	if _, err := r.Device(t.Context(), keyspec.TPM, keyring.FileKind, ""); !errors.Is(err, enclave.ErrUnsupported) {
		t.Errorf("a keyring as the home of keys: %v", err)
	}
}

// The TPM is at another place now. Enrolled there, with the old slot removed, it still tells old copies.
func TestCounterMovesWithTheTPM(t *testing.T) {
	t.Parallel()
	r := newSlotRig(t)
	_, before := startTPM(t)
	_, after := startTPM(t)
	s, _ := r.store(t, initParams{Enclave: before})
	if _, _, err := r.add(t.Context(), s, addParams{Enclave: after}); err != nil {
		t.Fatal(err)
	}
	if warnings, err := r.slotKeeper.remove(t.Context(), s, s.Slots()[0].ID); err != nil || s.CounterLocation() != after {
		t.Errorf("bound to %q, %q, %v", s.CounterLocation(), warnings, err)
	}
	r.opens(t, s, attempt{}, nil)
	if warnings, err := r.slotKeeper.remove(t.Context(), s, s.Slots()[1].ID); err != nil || !strings.Contains(strings.Join(warnings, "; "), "old copy") {
		t.Errorf("nobody is told that nothing tells old copies: %q, %v", warnings, err)
	}
	r.devices.moved = map[string]string{"tpm:/dev/tpm0": "tpm:/dev/tpmrm0"}
	if !r.devices.same("tpm:/dev/tpm0", "tpm:/dev/tpmrm0") || r.devices.same("tpm:/dev/tpm1", "tpm:/dev/tpmrm0") {
		t.Error("a device that was moved is not known again")
	}
}

// Two locations can be of one device.
func TestSameDevice(t *testing.T) {
	for _, test := range []struct {
		a, b string
		same bool
	}{
		{"tpm:/dev/tpmrm0", "tpm:/dev/tpmrm0?approvals=/run/a.json", true},
		{"tpm:/dev/tpmrm0", "tpm:/dev/tpm0", false},
		{"pkcs11:/m.so?token=kmsd", "pkcs11:/m.so?serial=01&token=kmsd", true},
		{"pkcs11:/m.so?serial=01", "pkcs11:/m.so?serial=01&token=kmsd", true},
		{"pkcs11:/m.so?serial=02&token=kmsd", "pkcs11:/m.so?serial=01&token=kmsd", false},
		{"pkcs11:/n.so?token=kmsd", "pkcs11:/m.so?token=kmsd", false},
		{"keyfile:/a", "keyfile:/b", false},
		{"keyring:file", "keyring:file", true},
		{"quantum:/a", "quantum:/a", true},
		{"tpm:/dev/tpm0", "quantum:/a", false},
	} {
		if sameDevice(test.a, test.b) != test.same || sameDevice(test.b, test.a) != test.same {
			t.Errorf("%s and %s: not %v", test.a, test.b, test.same)
		}
	}
}

// The counter stays while any slot of its TPM does.
func TestCounterOutlivesOneOfTwoSlots(t *testing.T) {
	t.Parallel()
	r := newSlotRig(t)
	_, spec := startTPM(t)
	s, _ := r.store(t, initParams{Enclave: spec + "?approvals=/nonexistent"})
	if _, _, err := r.add(t.Context(), s, addParams{Enclave: spec}); err != nil {
		t.Fatal(err)
	}
	must(t, r.remove(t.Context(), s, s.Slots()[0].ID))
	if got := s.Info().Rollback; !strings.HasPrefix(got, "detected") {
		t.Errorf("rollback is %s", got)
	}
	r.opens(t, s, attempt{}, nil)
}
