package main

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"strings"
	"testing"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/enclave/enclavetest"
	"github.com/kmsd-project/kmsd/enclave/helper"
	"github.com/kmsd-project/kmsd/enclave/keyring"
	"github.com/kmsd-project/kmsd/enclave/recovery"
	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/secmem"
)

// slotRig is a slot keeper whose machine is a fake.
type slotRig struct {
	*slotKeeper
	machine *enclavetest.Memory
	config  keystore.Config
	log     *bytes.Buffer
}

func newSlotRig(t *testing.T) *slotRig {
	t.Helper()
	arena, err := secmem.NewArena(64 << 10)
	if err != nil {
		t.Fatal(err)
	}
	r := &slotRig{machine: enclavetest.NewMemory(""), log: new(bytes.Buffer)}
	log := slog.New(slog.NewTextHandler(r.log, nil))
	r.config = keystore.Config{Dir: t.TempDir(), Arena: arena, Log: log}
	if err := os.Chmod(r.config.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	r.slotKeeper = newSlotKeeper(config{}, r.config.Dir, arena, helper.Sockets{}, log)
	r.offers = []string{keyring.FileKind, recovery.Kind}
	r.place(keyring.FileKind, r.machine)
	t.Cleanup(func() {
		r.slotKeeper.Close()
		arena.Close()
	})
	return r
}

// place puts a fake at a location.
func (r *slotRig) place(location string, e enclave.Enclave) {
	s, err := parseSpec(location)
	if err != nil {
		panic(err)
	}
	r.devices.open[deviceKey{location: s.location()}] = e
}

// create makes a keystore, and returns its recovery key when it has one.
func (r *slotRig) create(ctx context.Context, c keystore.Config, p initParams) (*keystore.Store, []byte, error) {
	n, err := r.prepare(ctx, p)
	if err != nil {
		return nil, nil, err
	}
	defer n.close()
	s, err := n.create(ctx, c)
	if err != nil {
		n.abort(ctx)
		return nil, nil, err
	}
	if len(n.recovery) == 0 {
		return s, nil, nil
	}
	return s, n.recovery[0], nil
}

// add adds a slot, and returns what has to be shown.
func (r *slotRig) add(ctx context.Context, s *keystore.Store, p addParams) (keystore.Slot, [][]byte, error) {
	n, err := r.prepareSlot(ctx, s, p)
	if err != nil {
		return keystore.Slot{}, nil, err
	}
	defer n.close()
	slot, err := n.add(ctx, s)
	if err != nil {
		n.abort(ctx)
	}
	return slot, n.recovery, err
}

// remove removes a slot.
func (r *slotRig) remove(ctx context.Context, s *keystore.Store, id uint32) error {
	_, err := r.slotKeeper.remove(ctx, s, id)
	return err
}

// store makes a keystore and returns it with the text of its recovery key.
func (r *slotRig) store(t *testing.T, p initParams) (*keystore.Store, []byte) {
	t.Helper()
	s, key, err := r.create(t.Context(), r.config, p)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s, key
}

func TestCreateEnrolsAndLocksAgain(t *testing.T) {
	r := newSlotRig(t)
	s, key := r.store(t, initParams{})
	slots := s.Slots()
	if len(slots) != 2 || slots[0].Kind != keyring.FileKind || slots[1].Kind != recovery.Kind {
		t.Fatalf("slots %+v", slots)
	}
	if slots[0].Level == "" || slots[0].Binding == "" || slots[1].Binding == "" || slots[0].UUID == slots[1].UUID {
		t.Errorf("slots %+v", slots)
	}
	for name, open := range map[string]func() error{
		"unattended":         func() error { return r.unlock(t.Context(), s, attempt{}) },
		"unlock with nobody": func() error { return r.unlock(t.Context(), s, attempt{Why: onDemand}) },
		"by number":          func() error { return r.unlock(t.Context(), s, attempt{Slot: slots[0].ID}) },
		"recovery key":       func() error { return r.unlock(t.Context(), s, attempt{Auth: enclave.Auth{Secret: key}}) },
		"recovery slot": func() error {
			return r.unlock(t.Context(), s, attempt{Slot: slots[1].ID, Auth: enclave.Auth{Secret: key}})
		},
	} {
		s.Lock()
		if err := open(); err != nil || s.Locked() {
			t.Errorf("%s: %v, locked %v", name, err, s.Locked())
		}
	}
}

func TestCreateVariants(t *testing.T) {
	for _, test := range []struct {
		params initParams
		kinds  string
		err    error
	}{
		{initParams{Enclave: "auto", NoRecovery: true}, "keyring:file", nil},
		{initParams{Enclave: "keyring:file"}, "keyring:file recovery", nil},
		{initParams{Enclave: "recovery"}, "recovery", nil},
		{initParams{EscrowTo: []string{"age1ql3z7hjy54pw3hyww5ayyfg7zqgvc7w3j2elw8zmrj2kg5sfn9aqmcac8p"}}, "keyring:file recovery", nil},
		{initParams{Enclave: "recovery", NoRecovery: true}, "", errSpec},
		{initParams{Enclave: "recovery", PIN: []byte("1234")}, "", errSpec},
		{initParams{Enclave: "keyring:file", PIN: []byte("1234")}, "", errSpec},
		{initParams{Enclave: "nonsense"}, "", errSpec},
		{initParams{Enclave: "recovery:shares"}, "", errSpec},
		{initParams{Enclave: "tpm:/nonexistent/tpm"}, "", enclave.ErrAbsent},
		{initParams{Enclave: "tpm:/dev/null?guard=what"}, "", enclave.ErrMisconfigured},
		{initParams{Enclave: "tpm:/dev/null?pcrs=7"}, "", enclave.ErrAbsent},
		{initParams{Enclave: "tpm:/dev/null?pcrs=seven"}, "", errSpec},
		{initParams{Enclave: "tpm:/dev/null?pcrs=7", NoRecovery: true}, "", errSpec},
		{initParams{Enclave: "tpm:/dev/null", PIN: []byte("123")}, "", enclave.ErrMisconfigured},
		{initParams{Enclave: "pkcs11:/lib/x.so?token=t"}, "", enclave.ErrLocked},
		{initParams{Enclave: "pkcs11:/lib/x.so"}, "", errSpec},
		{initParams{EscrowTo: []string{"age1nonsense"}}, "", errSpec},
		{initParams{EscrowTo: []string{"AGE-SECRET-KEY-1\nage1"}}, "", errSpec},
	} {
		r := newSlotRig(t)
		s, key, err := r.create(t.Context(), r.config, test.params)
		if !errors.Is(err, test.err) || (err == nil) != (test.err == nil) {
			t.Errorf("%+v: %v, want %v", test.params, err, test.err)
			continue
		}
		if err != nil {
			if r.machine.Wraps() != r.machine.Forgotten() {
				t.Errorf("%+v: %d enrolled, %d forgotten", test.params, r.machine.Wraps(), r.machine.Forgotten())
			}
			continue
		}
		var kinds []string
		for _, slot := range s.Slots() {
			kinds = append(kinds, slot.Kind)
		}
		if got := strings.Join(kinds, " "); got != test.kinds || (len(key) == 0) != test.params.NoRecovery {
			t.Errorf("%+v: slots %s, recovery key of %d bytes", test.params, got, len(key))
		}
		s.Close()
	}
}

// A device that lies, fails or hangs never becomes the only way into a keystore.
func TestEnrolmentIsProvedBeforeItCounts(t *testing.T) {
	for name, faults := range map[string]enclavetest.Faults{
		"wrap fails":      {Wrap: enclave.ErrBusy},
		"unwrap fails":    {Unwrap: enclave.ErrPolicy},
		"another secret":  {WrongSecret: true},
		"nothing happens": {Hang: true},
	} {
		r := newSlotRig(t)
		r.machine.SetFaults(faults)
		ctx, cancel := context.WithTimeout(t.Context(), healthTimeout/100)
		if _, _, err := r.create(ctx, r.config, initParams{}); err == nil {
			t.Errorf("%s: a keystore was made", name)
		}
		cancel()
		if exists, err := keystore.Exists(r.config.Dir); err != nil || exists {
			t.Errorf("%s: something was left in the state directory (%v)", name, err)
		}
		r.machine.SetFaults(enclavetest.Faults{})
		s, _ := r.store(t, initParams{})

		r.machine.SetFaults(faults)
		ctx, cancel = context.WithTimeout(t.Context(), healthTimeout/100)
		if _, _, err := r.add(ctx, s, addParams{Enclave: keyring.FileKind}); err == nil {
			t.Errorf("%s: a slot was added", name)
		}
		cancel()
		if n := len(s.Slots()); n != 2 {
			t.Errorf("%s: %d slots", name, n)
		}
	}
}

func TestStoreThatExistsIsLeftAlone(t *testing.T) {
	r := newSlotRig(t)
	s, _ := r.store(t, initParams{})
	before := s.Slots()
	if _, _, err := r.create(t.Context(), r.config, initParams{}); !errors.Is(err, keystore.ErrStoreExists) {
		t.Fatal(err)
	}
	if r.machine.Forgotten() != 1 {
		t.Errorf("%d items were forgotten, not the new one", r.machine.Forgotten())
	}
	s.Lock()
	if err := r.unlock(t.Context(), s, attempt{Slot: before[0].ID}); err != nil {
		t.Error(err)
	}
}

// Never fall through to a weaker slot unasked: the recovery key is there, but kmsd stays locked and says why.
func TestLockedWhenTheDeviceIsGone(t *testing.T) {
	for _, test := range []struct {
		break_ func(*slotRig)
		want   error
		health enclave.HealthState
	}{
		{func(r *slotRig) { r.machine.Clear() }, enclave.ErrCorrupt, enclave.Misconfigured},
		{func(r *slotRig) {
			r.machine.SetFaults(enclavetest.Faults{Unwrap: enclave.ErrReplaced, Health: enclave.Replaced})
		}, enclave.ErrReplaced, enclave.Replaced},
		{func(r *slotRig) {
			r.machine.SetFaults(enclavetest.Faults{Unwrap: enclave.ErrAbsent, Health: enclave.Absent})
		}, enclave.ErrAbsent, enclave.Absent},
		{func(r *slotRig) {
			r.machine.SetFaults(enclavetest.Faults{Unwrap: enclave.ErrLockedOut, Health: enclave.LockedOut})
		}, enclave.ErrLockedOut, enclave.LockedOut},
		{func(r *slotRig) { r.machine.SetFaults(enclavetest.Faults{WrongSecret: true}) }, keystore.ErrSecret, enclave.Ready},
	} {
		r := newSlotRig(t)
		s, key := r.store(t, initParams{})
		s.Lock()
		test.break_(r)
		if err := r.unlock(t.Context(), s, attempt{}); !errors.Is(err, test.want) || !s.Locked() {
			t.Errorf("unattended: %v, locked %v, want %v", err, s.Locked(), test.want)
		}
		if list := r.list(t.Context(), s); list[0].Health.State != test.health || list[1].Health.State != enclave.Ready {
			t.Errorf("health %+v", list)
		}
		if err := r.unlock(t.Context(), s, attempt{Auth: enclave.Auth{Secret: key}}); err != nil || s.Locked() {
			t.Errorf("recovery key: %v", err)
		}
	}
}

// A slot of a later release hides the weaker ones too, instead of being skipped.
func TestSlotOfALaterReleaseIsNotSkipped(t *testing.T) {
	r := newSlotRig(t)
	s, _ := r.store(t, initParams{})
	if _, err := s.AddSlot(t.Context(), keystore.NewSlot{Kind: "quantum", Location: "quantum:/dev/q0", Secret: make([]byte, enclave.SecretSize)}); err != nil {
		t.Fatal(err)
	}
	s.Lock()
	if err := r.unlock(t.Context(), s, attempt{}); !errors.Is(err, enclave.ErrUnsupported) || !s.Locked() {
		t.Errorf("%v, locked %v", err, s.Locked())
	}
	if list := r.list(t.Context(), s); list[2].Health.State != enclave.Misconfigured {
		t.Errorf("health %+v", list[2].Health)
	}
	if err := r.unlock(t.Context(), s, attempt{Slot: s.Slots()[0].ID}); err != nil {
		t.Errorf("asked for: %v", err)
	}
}

func TestOnlyPeopleCanOpen(t *testing.T) {
	r := newSlotRig(t)
	s, key := r.store(t, initParams{Enclave: recovery.Kind})
	s.Lock()
	err := r.unlock(t.Context(), s, attempt{})
	if !errors.Is(err, enclave.ErrLocked) || !s.Locked() {
		t.Errorf("%v", err)
	}
	if hintOf(err) == "" {
		t.Error("no hint")
	}
	if err := r.unlock(t.Context(), s, attempt{Auth: enclave.Auth{Secret: key}}); err != nil {
		t.Error(err)
	}
}

func TestWrongKeys(t *testing.T) {
	r := newSlotRig(t)
	s, key := r.store(t, initParams{})
	s.Lock()
	other := recovery.NewKey().Text()
	for name, a := range map[string]enclave.Auth{
		"another key":         {Secret: other},
		"a typing error":      {Secret: bytes.Replace(key, []byte("-"), []byte("-0"), 1)},
		"nonsense":            {Secret: []byte("1234")},
		"a key for a share":   {Shares: [][]byte{key}},
		"nonsense for shares": {Shares: [][]byte{nil}},
	} {
		err := r.unlock(t.Context(), s, attempt{Auth: a})
		if !errors.Is(err, enclave.ErrAuth) || hintOf(err) == "" || !s.Locked() {
			t.Errorf("%s: %v, hint %q", name, err, hintOf(err))
		}
	}
	if err := r.unlock(t.Context(), s, attempt{Slot: 77, Auth: enclave.Auth{Secret: key}}); !errors.Is(err, keystore.ErrNoSlot) {
		t.Error(err)
	}
	if err := r.unlock(t.Context(), s, attempt{Slot: s.Slots()[1].ID}); !errors.Is(err, enclave.ErrLocked) {
		t.Errorf("recovery slot with nobody: %v", err)
	}
}

func TestShares(t *testing.T) {
	r := newSlotRig(t)
	s, _ := r.store(t, initParams{NoRecovery: true})
	slot, shares, err := r.add(t.Context(), s, addParams{Enclave: specShares, Threshold: 2, Shares: 3})
	if err != nil {
		t.Fatal(err)
	}
	if len(shares) != 3 || slot.Kind != recovery.Kind || !strings.Contains(slot.Label, "2 of 3") {
		t.Fatalf("slot %+v with %d shares", slot, len(shares))
	}
	s.Lock()
	for i := range shares {
		for j := range shares {
			err := r.unlock(t.Context(), s, attempt{Auth: enclave.Auth{Shares: [][]byte{shares[i], shares[j]}}})
			if i == j && !errors.Is(err, enclave.ErrAuth) || i != j && err != nil {
				t.Errorf("shares %d and %d: %v", i+1, j+1, err)
			}
			s.Lock()
		}
		if err := r.unlock(t.Context(), s, attempt{Auth: enclave.Auth{Shares: shares[i : i+1]}}); !errors.Is(err, enclave.ErrAuth) {
			t.Errorf("one share: %v", err)
		}
	}
	if err := r.unlock(t.Context(), s, attempt{Slot: slot.ID, Auth: enclave.Auth{Shares: shares}}); err != nil {
		t.Errorf("all shares: %v", err)
	}
	for _, p := range []addParams{
		{Enclave: specShares}, {Enclave: specShares, Threshold: 1, Shares: 3}, {Enclave: specShares, Threshold: 4, Shares: 3},
		{Enclave: specShares, Threshold: 1 << 31, Shares: 1<<32 - 1}, {Enclave: specShares, Threshold: 2, Shares: 1000},
	} {
		if _, _, err := r.add(t.Context(), s, p); !errors.Is(err, errSpec) {
			t.Errorf("%d of %d: %v", p.Threshold, p.Shares, err)
		}
	}
}

// The whole drill after a machine was lost: recovery key, new slot, old slot away, and the old device opens nothing any more.
func TestRecoveryDrill(t *testing.T) {
	r := newSlotRig(t)
	s, key := r.store(t, initParams{})
	lost := s.Slots()[0]
	old := r.machine.Reopen()
	r.machine.Clear()
	s.Lock()
	if err := r.unlock(t.Context(), s, attempt{Auth: enclave.Auth{Secret: key}}); err != nil {
		t.Fatal(err)
	}
	added, secrets, err := r.add(t.Context(), s, addParams{Enclave: "auto", Label: "new board"})
	if err != nil || len(secrets) != 0 || added.Label != "new board" {
		t.Fatalf("%+v, %d secrets, %v", added, len(secrets), err)
	}
	if err := r.test(t.Context(), s, added.ID, enclave.Auth{}); err != nil {
		t.Errorf("test of the new slot: %v", err)
	}
	if err := r.test(t.Context(), s, lost.ID, enclave.Auth{}); !errors.Is(err, enclave.ErrCorrupt) {
		t.Errorf("test of the lost slot: %v", err)
	}
	if err := r.test(t.Context(), s, s.Slots()[1].ID, enclave.Auth{Secret: key}); err != nil {
		t.Errorf("test of the recovery slot: %v", err)
	}
	if err := r.remove(t.Context(), s, lost.ID); err != nil {
		t.Fatal(err)
	}
	if s.Info().EpochRotating {
		t.Error("the epoch was not finished")
	}
	s.Lock()
	secret := make([]byte, enclave.SecretSize)
	if err := old.Unwrap(t.Context(), lost.Blob, enclave.SlotAAD(lost.UUID), enclave.Auth{}, secret); err != nil {
		t.Fatal(err)
	}
	if err := s.Unlock(t.Context(), lost.ID, secret); !errors.Is(err, keystore.ErrNoSlot) {
		t.Errorf("the removed slot: %v", err)
	}
	if err := r.unlock(t.Context(), s, attempt{}); err != nil {
		t.Errorf("the new slot: %v", err)
	}
	if strings.Contains(r.log.String(), string(key)) {
		t.Error("the recovery key is in the log")
	}
}

// Two slots of the same strength may stand in for each other: that is no weaker way.
func TestEquallyStrongSlotStandsIn(t *testing.T) {
	r := newSlotRig(t)
	s, _ := r.store(t, initParams{NoRecovery: true})
	r.machine.Clear()
	if _, _, err := r.add(t.Context(), s, addParams{Enclave: keyring.FileKind}); err != nil {
		t.Fatal(err)
	}
	s.Lock()
	if err := r.unlock(t.Context(), s, attempt{}); err != nil || s.Locked() {
		t.Error(err)
	}
}

func TestRemove(t *testing.T) {
	r := newSlotRig(t)
	s, _ := r.store(t, initParams{})
	for _, id := range []uint32{0, 99} {
		if err := r.remove(t.Context(), s, id); !errors.Is(err, keystore.ErrNoSlot) {
			t.Errorf("slot %d: %v", id, err)
		}
	}
	if err := r.remove(t.Context(), s, s.Slots()[0].ID); err != nil {
		t.Fatal(err)
	}
	if r.machine.Forgotten() != 1 {
		t.Error("the device still holds the item")
	}
	if err := r.remove(t.Context(), s, s.Slots()[0].ID); !errors.Is(err, keystore.ErrLastSlot) {
		t.Errorf("last slot: %v", err)
	}
}

func TestTestChangesNothing(t *testing.T) {
	r := newSlotRig(t)
	s, _ := r.store(t, initParams{})
	s.Lock()
	if err := r.test(t.Context(), s, s.Slots()[0].ID, enclave.Auth{}); !errors.Is(err, keystore.ErrLocked) || !s.Locked() {
		t.Errorf("test of a locked store: %v, locked %v", err, s.Locked())
	}
}

// A device that does not answer holds up the list only so long, and only itself.
func TestListWithAStuckDevice(t *testing.T) {
	r := newSlotRig(t)
	s, _ := r.store(t, initParams{})
	r.machine.SetFaults(enclavetest.Faults{Hang: true})
	ctx, cancel := context.WithTimeout(t.Context(), healthTimeout/50)
	defer cancel()
	list := r.list(ctx, s)
	if list[0].Health.State != enclave.Absent || list[1].Health.State != enclave.Ready {
		t.Errorf("health %+v", list)
	}
}
