package keystore

import (
	"bytes"
	"context"
	"errors"
	"path/filepath"
	"slices"
	"testing"

	"filippo.io/age"
)

// forge makes a store of its own in a new directory, whose only slot is the victim's: same id, UUID, public key and blob, all of which
// the victim's header shows to everybody, and the root key sealed to that public key. change may alter the header before that.
func forge(t *testing.T, victim *Store, storeID [16]byte, change func(*header, *secrets)) string {
	t.Helper()
	config := testConfig(t, testDir(t))
	h := &header{storeID: storeID, created: testTime, generation: 1, nextSlot: 1}
	keys, err := newSecrets(config.Arena, storeID)
	if err != nil {
		t.Fatal(err)
	}
	s, err := create(context.Background(), config, h, keys, []NewSlot{testSlot(66)}, func(path string) error {
		first := &head{sequence: 1, epoch: 1, generation: 1, outboxNext: 1}
		return createDatabase(path, first.encode(storeID, keys.currentEpoch().key.Bytes()))
	})
	if err != nil {
		t.Fatal(err)
	}
	mustApply(t, s, testKey("app/k", "ed25519", 32))
	forged := s.header.Load().clone()
	forged.slots = slices.Clone(victim.header.Load().slots[:1])
	change(forged, keys)
	root := keys.root.Bytes()
	if err := forged.sealRoot(&forged.slots[0], root); err != nil {
		t.Fatal(err)
	}
	if err := replaceFile(filepath.Join(config.Dir, headerFile), forged.encode(root)); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return config.Dir
}

func TestStoreOfSomebodyElseIsRefused(t *testing.T) {
	ctx := context.Background()
	victim := newStore(t)
	unlock := func(dir string) error {
		s, err := Open(ctx, testConfig(t, dir))
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		err = s.Unlock(ctx, 1, testSecret(1))
		if err != nil && !s.Locked() {
			t.Error("refused, and yet unlocked")
		}
		return err
	}
	var other [16]byte
	random(other[:])
	guess := testSlot(66)
	for name, change := range map[string]func(*header, *secrets){
		"tag copied": func(*header, *secrets) {},
		"tag zero":   func(h *header, _ *secrets) { h.slots[0].enrolment = [32]byte{} },
		"tag guessed": func(h *header, k *secrets) {
			h.slots[0].enrolment = h.enrolmentTag(&h.slots[0], guess.Secret, k.lifetime.Bytes())
		},
	} {
		for _, id := range [][16]byte{victim.storeID, other} {
			if err := unlock(forge(t, victim, id, change)); !errors.Is(err, ErrForeign) {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
	// Nothing but the tag refuses these stores: with the right one, which takes the slot's secret, it opens.
	honest := forge(t, victim, victim.storeID, func(h *header, k *secrets) {
		h.slots[0].enrolment = h.enrolmentTag(&h.slots[0], testSecret(1), k.lifetime.Bytes())
	})
	if err := unlock(honest); err != nil {
		t.Errorf("the forged stores are refused for another reason: %v", err)
	}
}

func TestEnrolmentOutlivesEveryChange(t *testing.T) {
	ctx := context.Background()
	s := newStore(t)
	mustApply(t, s, testKey("app/k", "ed25519", 32))
	id := testIdentity(t)
	opens := func(what string, slots ...uint32) {
		t.Helper()
		for _, slot := range slots {
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			var err error
			if s, err = Open(ctx, testConfig(t, s.config.Dir)); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { s.Close() })
			secret := byte(slot)
			if slot == 4 { // ids of slots are not used again
				secret = 2
			}
			if err := s.Unlock(ctx, slot, testSecret(secret)); err != nil {
				t.Fatalf("after %s, slot %d: %v", what, slot, err)
			}
		}
		checkKey(t, s, "app/k", 32)
	}
	step := func(what string, err error, slots ...uint32) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		opens(what, slots...)
	}
	_, err := s.AddSlot(ctx, testSlot(2))
	step("add", err, 1, 2)
	step("root rotation", s.RotateRoot(ctx), 1, 2)
	step("epoch rotation", s.RotateEpoch(ctx, nil), 1, 2)
	_, err = s.AddSlot(ctx, testSlot(3))
	step("another add", err, 1, 2, 3)
	step("removal", s.RemoveSlot(ctx, 2), 1, 3)
	_, err = s.AddSlot(ctx, testSlot(2))
	step("enrolling again", err, 1, 3, 4)
	blob, _ := testBackup(t, s, id)
	step("backup", s.Compact(ctx), 1, 3, 4)

	restored, _, err := Restore(ctx, bytes.NewReader(blob), []age.Identity{id}, testConfig(t, testDir(t)), []NewSlot{testSlot(1)})
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
	s = restored
	opens("restoring", 1)
	step("root rotation of the restored", s.RotateRoot(ctx), 1)
}
