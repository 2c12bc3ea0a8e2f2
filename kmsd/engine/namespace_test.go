package engine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"testing"
	"time"

	"filippo.io/age"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

func (h *house) createModule(name string, a keyspec.Algorithm, escrow keyspec.Escrow) error {
	_, err := h.Create(h.t.Context(), h.app, &NewKey{Name: keyspec.Name(name), Algorithm: a, Protection: keyspec.HSM, Escrow: escrow}, nil)
	return err
}

// cold closes every namespace and forgets what was parsed, as idling does.
func (h *house) cold() {
	h.clock.add(time.Hour)
	h.closeIdle(h.clock.Now())
	h.secrets.clear()
	h.residents.clear()
}

// TestGuardedNamespace: the base keys of a module key in a device open only with the device, whatever the module key can do itself.
func TestGuardedNamespace(t *testing.T) {
	for _, a := range []keyspec.Algorithm{keyspec.ECDSAP256, keyspec.AES256GCM, keyspec.RSA2048} {
		h, k := newResidentHouse(t)
		if err := h.createModule("M", a, ""); err != nil {
			t.Fatal(err)
		}
		if got := h.NamespaceEscrow("M"); got != keyspec.EscrowNone {
			t.Errorf("escrow %q of a store without recipients", got)
		}
		if k.count() != 2 {
			t.Errorf("%d keys in the device: want the module key and the guard key", k.count())
		}
		h.create("M/soft", keyspec.AES256GCM)
		h.createResident("M/hard", keyspec.ECDSAP256)
		h.create("OTHER/soft", keyspec.AES256GCM)
		sealed := h.encrypt("M/soft", "data")

		h.cold()
		k.set(func() { k.fault = &enclave.Error{Kind: enclave.ErrAbsent} })
		_, err := h.decrypt(h.app, "M/soft", sealed)
		want(t, "decrypt without the device", err, enclave.ErrAbsent)
		_, err = h.Create(t.Context(), h.app, &NewKey{Name: "M/new", Algorithm: keyspec.AES256GCM}, nil)
		want(t, "create without the device", err, enclave.ErrAbsent)
		h.encrypt("OTHER/soft", "data")
		if _, _, device := h.Peek(h.app, "decrypt", "M/soft"); device != keyspec.HSM {
			t.Errorf("a closed namespace is opened by %q", device)
		}
		k.set(func() { k.fault = nil })
		if data, err := h.decrypt(h.app, "M/soft", sealed); err != nil || data != "data" {
			t.Errorf("%q, %v", data, err)
		}
		if _, _, device := h.Peek(h.app, "decrypt", "M/soft"); device != "" {
			t.Errorf("a key at hand waits for %q", device)
		}
		if _, err := h.sign(h.app, "M/hard", "message"); err != nil {
			t.Error(err)
		}

		h.restart()
		h.Engine.devices = rack{"hsm": k}
		if data, err := h.decrypt(h.app, "M/soft", sealed); err != nil || data != "data" {
			t.Errorf("after a restart: %q, %v", data, err)
		}
		asked := k.asked.Load()
		h.create("M/more", keyspec.AES256GCM)
		h.encrypt("M/more", "data")
		if k.asked.Load() != asked {
			t.Error("the device was asked again while the namespace was open")
		}
		h.store.Load().Lock()
	}
}

// TestGuardIsRenewed: rotating the module key wraps the wrapping key again, with a new guard key, in the same commit.
func TestGuardIsRenewed(t *testing.T) {
	h, k := newResidentHouse(t)
	if err := h.createModule("M", keyspec.ECDSAP256, keyspec.EscrowNone); err != nil {
		t.Fatal(err)
	}
	h.create("M/soft", keyspec.AES256GCM)
	sealed := h.encrypt("M/soft", "data")
	before, err := h.store.Load().Namespace("M")
	if err != nil {
		t.Fatal(err)
	}
	h.cold()
	if _, err := h.Rotate(t.Context(), h.app, "M", time.Time{}, time.Time{}, false); err != nil {
		t.Fatal(err)
	}
	after, err := h.store.Load().Namespace("M")
	if err != nil || bytes.Equal(before.Blob, after.Blob) || after.Escrow != keyspec.EscrowNone {
		t.Errorf("%v, escrow %q", err, after.Escrow)
	}
	if k.count() != 3 {
		t.Errorf("%d keys in the device: want two versions and one guard key", k.count())
	}
	h.cold()
	if data, err := h.decrypt(h.app, "M/soft", sealed); err != nil || data != "data" {
		t.Errorf("%q, %v", data, err)
	}
	k.set(func() { k.fault = &enclave.Error{Kind: enclave.ErrAbsent} })
	_, err = h.Rotate(t.Context(), h.app, "M", time.Time{}, time.Time{}, false)
	want(t, "rotate without the device", err, enclave.ErrAbsent)
}

func TestGuardRefusals(t *testing.T) {
	h, k := newResidentHouse(t)
	h.create("USED/soft", keyspec.AES256GCM)
	want(t, "namespace with keys", h.createModule("USED", keyspec.ECDSAP256, ""), keystore.ErrGuard)
	want(t, "no recipients", h.createModule("M", keyspec.ECDSAP256, keyspec.EscrowRecipients), ErrInput)
	want(t, "unknown", h.createModule("M", keyspec.ECDSAP256, "friends"), ErrInput)
	want(t, "base key", h.createModule("M/base", keyspec.ECDSAP256, keyspec.EscrowNone), ErrInput)
	_, err := h.Create(t.Context(), h.app, &NewKey{Name: "M", Algorithm: keyspec.ECDSAP256, Escrow: keyspec.EscrowNone}, nil)
	want(t, "in software", err, ErrInput)
	if k.count() != 0 {
		t.Errorf("%d keys were left in the device", k.count())
	}
}

// TestOpeningHoldsUpNobodyElse: while a device that hangs is to open a namespace, others wait for that no longer than they have time, and
// namespaces that other devices guard are opened.
func TestOpeningHoldsUpNobodyElse(t *testing.T) {
	h, k := newResidentHouse(t)
	if err := h.createModule("M", keyspec.ECDSAP256, keyspec.EscrowNone); err != nil {
		t.Fatal(err)
	}
	h.create("M/soft", keyspec.AES256GCM)
	sealed := h.encrypt("M/soft", "data")
	h.cold()
	stuck := make(chan struct{})
	k.set(func() { k.hang = stuck })
	asked := k.asked.Load()
	first := make(chan error)
	go func() {
		_, err := h.decrypt(h.app, "M/soft", sealed)
		first <- err
	}()
	for k.asked.Load() == asked {
		time.Sleep(time.Millisecond)
	}
	for i := range 200 { // more than there could be locks for
		done, err := h.openings.take(t.Context(), fmt.Sprint("N", i))
		if err != nil {
			t.Fatal(err)
		}
		defer done()
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, _, err := h.Decrypt(ctx, h.app, ref(t, "M/soft"), sealed, []byte("aad"), nil, nil)
	want(t, "another, whose time is over", err, context.DeadlineExceeded)
	second := make(chan error)
	go func() {
		_, err := h.decrypt(h.app, "M/soft", sealed)
		second <- err
	}()
	close(stuck)
	want(t, "the first", <-first, nil)
	want(t, "the second", <-second, nil)
	if n := k.asked.Load() - asked; n != 1 {
		t.Errorf("the device was asked %d times", n)
	}
}

// TestGuardByDecryption: a device that cannot agree guards by decrypting.
func TestGuardByDecryption(t *testing.T) {
	h, k := newResidentHouse(t)
	k.without = keyspec.Agree
	if err := h.createModule("M", keyspec.ECDSAP256, ""); err != nil {
		t.Fatal(err)
	}
	h.create("M/soft", keyspec.AES256GCM)
	sealed := h.encrypt("M/soft", "data")
	h.cold()
	if data, err := h.decrypt(h.app, "M/soft", sealed); err != nil || data != "data" {
		t.Errorf("%q, %v", data, err)
	}
}

// TestRestoredElsewhere restores a store where the device is not: with escrow its recipients open the namespace, without nobody does.
func TestRestoredElsewhere(t *testing.T) {
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	h, k := newHouseWithEscrow(t, id.Recipient().String()), newToken()
	h.Engine.devices = rack{"hsm": k}
	sealed := make(map[string][]byte)
	for _, module := range []string{"SOME", "NONE"} {
		escrow := keyspec.Escrow("")
		if module == "NONE" {
			escrow = keyspec.EscrowNone
		}
		if err := h.createModule(module, keyspec.ECDSAP256, escrow); err != nil {
			t.Fatal(err)
		}
		h.create(module+"/soft", keyspec.AES256GCM)
		sealed[module] = h.encrypt(module+"/soft", "data")
	}
	if got := h.NamespaceEscrow("SOME"); got != keyspec.EscrowRecipients {
		t.Errorf("escrow %q of a store with recipients", got)
	}
	var backup bytes.Buffer
	if _, err := h.store.Load().Backup(t.Context(), &backup, keystore.BackupOptions{}); err != nil {
		t.Fatal(err)
	}

	elsewhere := &house{t: t, dir: t.TempDir(), clock: h.clock, app: h.app, admin: h.admin}
	if err := os.Chmod(elsewhere.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	s, _, err := keystore.Restore(t.Context(), &backup, []age.Identity{id}, elsewhere.config(), testSlots())
	if err != nil {
		t.Fatal(err)
	}
	elsewhere.start(s)
	elsewhere.Engine.devices = rack{"hsm": newToken()}
	for module := range sealed {
		_, err := elsewhere.decrypt(h.app, module+"/soft", sealed[module])
		want(t, module+" without its device", err, enclave.ErrReplaced)
	}
	key, err := s.EscrowedNamespaceKey("SOME", []age.Identity{id})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.UnguardNamespace(t.Context(), "SOME", key); err != nil {
		t.Fatal(err)
	}
	if data, err := elsewhere.decrypt(h.app, "SOME/soft", sealed["SOME"]); err != nil || data != "data" {
		t.Errorf("with escrow: %q, %v", data, err)
	}
	_, err = s.EscrowedNamespaceKey("NONE", []age.Identity{id})
	want(t, "no escrow", err, keystore.ErrNotFound)
	elsewhere.Engine.devices = rack{"hsm": k} // the device itself is moved over
	if data, err := elsewhere.decrypt(h.app, "NONE/soft", sealed["NONE"]); err != nil || data != "data" {
		t.Errorf("with the device: %q, %v", data, err)
	}
}

func FuzzGuard(f *testing.F) {
	record, err := (&residentKey{"tpm:/dev/tpmrm0", "000b", []byte("blob")}).encode()
	if err != nil {
		f.Fatal(err)
	}
	g := &guard{keyspec.ECDHP256, record, []byte("spki"), []byte("hint"), make([]byte, enclave.SealedSize)}
	good, err := g.encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte{guardFormat, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		g, err := decodeGuard(b)
		if err != nil {
			if !errors.Is(err, keystore.ErrDamaged) && !errors.Is(err, ErrUnsupported) {
				t.Errorf("%v", err)
			}
			return
		}
		if again, err := g.encode(); err != nil || !bytes.Equal(again, b) {
			t.Errorf("%x, %v, was %x", again, err, b)
		}
	})
}
