package keystore

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"testing"

	"filippo.io/age"
	bolt "go.etcd.io/bbolt"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// foreignKey is the change that creates a key of which only the public half is ours.
func foreignKey(name string) Change {
	c := testKey(name, keyspec.RSA2048, 0)
	c.Key.Origin, c.Key.Usages, c.Material = keyspec.Foreign, []keyspec.Usage{keyspec.Verify, keyspec.Encrypt}, nil
	return c
}

// checkForeign fails the test unless versions 1 to n of the key are there, without material.
func checkForeign(t *testing.T, s *Store, name string, n keyspec.Version) {
	t.Helper()
	k, err := s.Get(keyspec.Name(name))
	if err != nil || k.Origin != keyspec.Foreign || len(k.Versions) != int(n) {
		t.Fatalf("%+v %v", k, err)
	}
	for v := range n {
		ref := keyspec.Ref{Name: k.Name, Version: v + 1}
		p, err := s.Public(ref)
		if want := testPublic(name, v+1); err != nil || !bytes.Equal(p.SPKI, want.SPKI) || len(p.Chain) != 1 {
			t.Fatalf("%s: %+v %v", ref, p, err)
		}
		if _, err := s.Material(ref, nil); !errors.Is(err, ErrNotFound) {
			t.Fatalf("material of %s: %v", ref, err)
		}
		sum := sha256.Sum256(p.SPKI)
		if found, err := s.Alias(AliasSPKI, sum[:]); err != nil || found != ref {
			t.Fatalf("alias of %s: %v %v", ref, found, err)
		}
	}
}

func TestForeignKeysHaveNoMaterial(t *testing.T) {
	s, id := escrowStore(t)
	mustApply(t, s, testKey("app", keyspec.RSA2048, 256), testKey("app/own", keyspec.RSA2048, 256), foreignKey("app/partner"), foreignKey("partner"))
	rotateForeign := func(name string) {
		t.Helper()
		k, err := s.Get(keyspec.Name(name))
		if err != nil {
			t.Fatal(err)
		}
		n := k.Current + 1
		k.Versions[len(k.Versions)-1].State = keyspec.Deactivated
		k.Versions = append(k.Versions, Version{Number: n, State: keyspec.Active, Created: testTime})
		k.Current = n
		mustApply(t, s, Change{Key: k, Public: map[keyspec.Version]Public{n: testPublic(name, n)}})
	}
	rotateForeign("app/partner")
	// Whatever its name, it is no module key: base keys beside it are bound to nothing, and no device guards them.
	mustApply(t, s, testKey("partner/base", keyspec.Ed25519, 32))
	if _, err := s.Namespace("partner"); !errors.Is(err, ErrNotFound) {
		t.Fatalf("namespace: %v", err)
	}
	check := func(s *Store) {
		t.Helper()
		checkForeign(t, s, "app/partner", 2)
		checkForeign(t, s, "partner", 1)
		checkKey(t, s, "app/own", 256)
		checkKey(t, s, "partner/base", 32)
		report, err := s.Verify(t.Context(), nil)
		if err != nil || len(report.Damaged) > 0 || report.Keys != 5 || report.Versions != 6 || report.Orphans != 0 {
			t.Fatalf("%+v %v", report, err)
		}
	}
	check(s)
	s = reopen(t, s)
	if err := s.RotateEpoch(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	check(s)
	blob, _ := testBackup(t, s, id)
	if _, err := VerifyBackup(t.Context(), bytes.NewReader(blob), []age.Identity{id}, t.TempDir()); err != nil {
		t.Fatal(err)
	}
	// Destroying one erases nothing, but an old copy must not undo it.
	generation := s.Info().Generation
	destroy(t, s, "app/partner", 1)
	if info := s.Info(); info.ErasurePending != 0 || info.Generation <= generation {
		t.Fatalf("%+v", info)
	}
	sum := sha256.Sum256(testPublic("app/partner", 1).SPKI)
	if _, err := s.Alias(AliasSPKI, sum[:]); !errors.Is(err, ErrNotFound) {
		t.Fatalf("alias of a destroyed version: %v", err)
	}
	report, err := s.Verify(t.Context(), nil)
	if err != nil || len(report.Damaged) > 0 {
		t.Fatalf("%+v %v", report, err)
	}
}

func TestForeignKeysBesideGuardedOnes(t *testing.T) {
	s := newStore(t)
	mustApply(t, s, foreignKey("app/partner"))
	mustApply(t, s, guardedKey("app", fixedGuard())) // it protects nothing that was there before
	s = reopen(t, s)
	checkForeign(t, s, "app/partner", 1) // the namespace is closed
	mustApply(t, s, foreignKey("app/late"))
	checkForeign(t, s, "app/late", 1)
}

func TestStructureOfForeignKeysIsEnforced(t *testing.T) {
	s := newStore(t)
	mustApply(t, s, foreignKey("app/partner"), testKey("app/own", keyspec.RSA2048, 256))
	get := func(name keyspec.Name) *Key {
		k, err := s.Get(name)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	withMaterial := foreignKey("app/new")
	withMaterial.Material = map[keyspec.Version][]byte{1: {1}}
	withoutPublic := foreignKey("app/new")
	withoutPublic.Public = nil
	guarded := foreignKey("new")
	guarded.Guard = fixedGuard()
	emptied := Change{Key: get("app/partner"), Public: map[keyspec.Version]Public{1: {}}}
	ours := Change{Key: get("app/partner")}
	ours.Key.Origin = keyspec.Imported
	theirs := Change{Key: get("app/own")}
	theirs.Key.Origin = keyspec.Foreign
	for what, c := range map[string]Change{
		"with material": withMaterial, "without a public half": withoutPublic, "with a guard": guarded, "emptied": emptied,
		"made ours": ours, "given away": theirs,
	} {
		if err := s.Apply(t.Context(), Commit{Changes: []Change{c}}); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if err := s.UnguardNamespace(t.Context(), "app/partner", make([]byte, keySize)); !errors.Is(err, ErrInvalid) {
		t.Errorf("unguarded: %v", err)
	}
}

// A record of material that somebody puts beside a foreign version is not looked at.
func TestForeignVersionGetsNoMaterialFromElsewhere(t *testing.T) {
	s := newStore(t)
	mustApply(t, s, foreignKey("app/partner"), testKey("app/own", keyspec.RSA2048, 256))
	from, to := s.recordID("app/own").at(1), s.recordID("app/partner").at(1)
	err := s.db.Update(func(tx *bolt.Tx) error {
		b := tx.Bucket(bucketMaterial)
		v := b.Get(from[:])
		if v == nil {
			return fmt.Errorf("no material of %x", from)
		}
		return b.Put(to[:], bytes.Clone(v))
	})
	if err != nil {
		t.Fatal(err)
	}
	checkForeign(t, s, "app/partner", 1)
	report, err := s.Verify(t.Context(), nil)
	if err != nil || len(report.Damaged) > 0 || report.Orphans != 1 {
		t.Fatalf("%+v %v", report, err)
	}
}
