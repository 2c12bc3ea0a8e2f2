package keystore

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// historyKey is the change that creates a key as an import does: several versions at once, all but the last deactivated, each with its own
// time and certificate. The certificate that the first version had before is known by its thumbprint.
func historyKey(name string, versions keyspec.Version, size int) Change {
	c := testKey(name, keyspec.RSA2048, size)
	c.Key.Origin, c.Key.Current, c.Key.Versions = keyspec.Imported, versions, nil
	for n := keyspec.Version(1); n <= versions; n++ {
		made := testTime.AddDate(int(n)-10, 0, 0)
		v := Version{Number: n, State: keyspec.Deactivated, Created: made, NotBefore: made, Expires: made.AddDate(2, 0, 0)}
		if n == versions {
			v.State = keyspec.Active
		}
		c.Key.Versions = append(c.Key.Versions, v)
		c.Material[n], c.Public[n] = testMaterial(name, n, size), testPublic(name, n)
	}
	earlier := sha256.Sum256([]byte("earlier certificate of " + name))
	c.Aliases = []Alias{{AliasThumbprint, earlier[:], 1}}
	return c
}

func checkHistory(t testing.TB, s *Store, name string, versions keyspec.Version, size int) {
	t.Helper()
	checkKey(t, s, name, size)
	k, err := s.Get(keyspec.Name(name))
	if err != nil || len(k.Versions) != int(versions) || k.Current != versions || k.Origin != keyspec.Imported {
		t.Fatalf("%+v %v", k, err)
	}
	for i, v := range k.Versions {
		made := testTime.AddDate(i+1-10, 0, 0)
		last := i == len(k.Versions)-1
		if !v.Created.Equal(made) || !v.NotBefore.Equal(made) || !v.Expires.Equal(made.AddDate(2, 0, 0)) || (v.State == keyspec.Active) != last {
			t.Fatalf("%s: %+v", name, v)
		}
		for kind, value := range map[AliasKind][]byte{AliasSPKI: testPublic(name, v.Number).SPKI, AliasThumbprint: testPublic(name, v.Number).Chain[0]} {
			sum := sha256.Sum256(value)
			if ref, err := s.Alias(kind, sum[:]); err != nil || ref != (keyspec.Ref{Name: k.Name, Version: v.Number}) {
				t.Fatalf("%s of %s@%d: %v %v", kind, name, v.Number, ref, err)
			}
		}
	}
	earlier := sha256.Sum256([]byte("earlier certificate of " + name))
	if ref, err := s.Alias(AliasThumbprint, earlier[:]); err != nil || ref != (keyspec.Ref{Name: k.Name, Version: 1}) {
		t.Fatalf("%v %v", ref, err)
	}
}

// TestImportOfManyKeys imports a namespace with its history in large commits, each with the document that says how far it came.
func TestImportOfManyKeys(t *testing.T) {
	s := newStore(t)
	const each, versions = 500, 2
	keys := scaled(10_000, 1_000)
	began := time.Now()
	for at := 0; at < keys; at += each {
		c := Commit{Audit: []byte("imported")}
		if at == 0 {
			c.Changes = append(c.Changes, historyKey("app", 4, 256), foreignKey("app/partner"))
		}
		for i := range each {
			c.Changes = append(c.Changes, historyKey(fmt.Sprintf("app/base%d", at+i), versions, 256))
		}
		progress := Document{Kind: "import", Name: "app", Data: fmt.Append(nil, at+each)}
		if at > 0 {
			d, err := s.Document("import", "app")
			if err != nil || string(d.Data) != fmt.Sprint(at) {
				t.Fatalf("%q %v", d.Data, err)
			}
			progress.Revision = d.Revision
		}
		c.Documents = []DocumentChange{{Document: progress}}
		if err := s.Apply(t.Context(), c); err != nil {
			t.Fatal(err)
		}
		if at == 0 {
			// One that fails changes nothing: neither of its keys nor of what it says about itself.
			c.Changes = []Change{historyKey("app/none", versions, 256), historyKey("app/base7", versions, 256)}
			if err := s.Apply(t.Context(), c); !errors.Is(err, ErrExists) {
				t.Fatal(err)
			}
			if _, err := s.Get("app/none"); !errors.Is(err, ErrNotFound) {
				t.Fatal(err)
			}
		}
	}
	t.Logf("%d keys of %d versions in %v", keys, versions, time.Since(began).Round(time.Millisecond))
	s = reopen(t, s)
	checkHistory(t, s, "app", 4, 256)
	checkForeign(t, s, "app/partner", 1)
	for i := 0; i < keys; i += keys / 200 {
		checkHistory(t, s, fmt.Sprintf("app/base%d", i), versions, 256)
	}
	if info := s.Info(); info.Keys != uint64(keys)+2 || info.Documents != 1 {
		t.Fatalf("%+v", info)
	}
	found := 0
	for cursor := []byte(nil); ; {
		page, next, err := s.Page("app", "app/base", cursor, 1000)
		if err != nil {
			t.Fatal(err)
		}
		found += len(page)
		if cursor = next; next == nil {
			break
		}
	}
	report, err := s.Verify(t.Context(), nil)
	if err != nil || len(report.Damaged) > 0 || found != keys || report.Versions != uint64(keys)*versions+5 || report.Documents != 1 || report.Orphans != 0 {
		t.Fatalf("%d keys, %+v %v", found, report, err)
	}
	rotate(t, s, "app", 256)
	rotate(t, s, "app/base3", 256)
	checkKey(t, s, "app/base3", 256)
	checkKey(t, s, "app/base4", 256)
}

// Base keys that come in the same commit as their module key are bound to its wrapping key like later ones, whatever the order.
func TestBaseKeysAreBoundToAModuleKeyOfTheSameCommit(t *testing.T) {
	s := newStore(t)
	mustApply(t, s, testKey("app/first", keyspec.Ed25519, 32), testKey("app", keyspec.RSA2048, 256), testKey("other/k", keyspec.Ed25519, 32), testKey("app/second", keyspec.Ed25519, 32))
	mustApply(t, s, testKey("app/third", keyspec.Ed25519, 32))
	bound := func(name keyspec.Name) bool {
		x, found, err := s.lookup(s.snapshot.Load(), s.recordID(name).at(1))
		if err != nil || !found {
			t.Fatal(err)
		}
		return x.flags&entryBound != 0
	}
	if !bound("app/first") || !bound("app/second") || !bound("app/third") || bound("app") || bound("other/k") {
		t.Fatal("not all base keys are bound to the namespace wrapping key, or others are")
	}
	s = reopen(t, s)
	for name, size := range map[string]int{"app": 256, "app/first": 32, "app/second": 32, "app/third": 32, "other/k": 32} {
		checkKey(t, s, name, size)
	}
	key := s.recordID("app").at(0)
	if err := s.db.Update(func(tx *bolt.Tx) error { return tx.Bucket(bucketMaterial).Delete(key[:]) }); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"app/first", "app/second", "app/third"} {
		if err := keyError(s, name, 32); !errors.Is(err, ErrDamaged) {
			t.Fatalf("%s without the wrapping key: %v", name, err)
		}
	}
	checkKey(t, s, "other/k", 32)
}

func TestCommitIsPreparedWithoutLeavingKeysBehind(t *testing.T) {
	s := newStore(t)
	p, err := s.prepare(Commit{Changes: []Change{testKey("app", keyspec.RSA2048, 256), testKey("app/k", keyspec.Ed25519, 32)}, Documents: []DocumentChange{testDocument("trust", "a")}})
	if err != nil {
		t.Fatal(err)
	}
	wrapping := p.wrapping["app"]
	if len(wrapping) != keySize || bytes.Equal(wrapping, make([]byte, keySize)) {
		t.Fatalf("wrapping key %x", wrapping)
	}
	p.wipe()
	if !bytes.Equal(wrapping, make([]byte, keySize)) {
		t.Error("the wrapping key is left")
	}
	for _, c := range p.changes {
		for _, x := range c.entries {
			if x.dek != [keySize]byte{} {
				t.Errorf("a data key of %s is left", strings.TrimSpace(c.label))
			}
		}
	}
}
