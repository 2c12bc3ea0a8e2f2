package keystore

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"filippo.io/age"
	bolt "go.etcd.io/bbolt"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// testGuard is a wrapping key and what a device makes of it.
func testGuard(escrow keyspec.Escrow) *NamespaceGuard {
	g := &NamespaceGuard{Blob: []byte("blob of the device"), Key: make([]byte, keySize), Escrow: escrow}
	rand.Read(g.Key)
	return g
}

// fixedGuard is the same in every process.
func fixedGuard() *NamespaceGuard {
	return &NamespaceGuard{Blob: []byte("blob"), Key: testMaterial("guard", 1, keySize), Escrow: keyspec.EscrowNone}
}

// guardedKey is the change that creates a module key which guards its namespace.
func guardedKey(name string, g *NamespaceGuard) Change {
	c := testKey(name, keyspec.RSA2048, 900) // its material is a device's blob
	c.Key.Protection = keyspec.TPM
	c.Guard = g
	return c
}

// escrowStore makes a store with an escrow recipient.
func escrowStore(t testing.TB) (*Store, *age.X25519Identity) {
	t.Helper()
	id := testIdentity(t)
	s, err := Create(context.Background(), testConfig(t, testDir(t)), []NewSlot{testSlot(1)}, []string{id.Recipient().String()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s, id
}

func checkState(t testing.TB, s *Store, namespace string, want NamespaceState) {
	t.Helper()
	got, err := s.Namespace(namespace)
	if err != nil || fmt.Sprintf("%+v", got) != fmt.Sprintf("%+v", want) {
		t.Fatalf("namespace %s: %+v %v, want %+v", namespace, got, err, want)
	}
}

func TestGuardedNamespaceNeedsItsKey(t *testing.T) {
	s := newStore(t)
	g := testGuard(keyspec.EscrowNone)
	mustApply(t, s, guardedKey("app", g), testKey("soft", keyspec.RSA2048, 256))
	open := NamespaceState{Guarded: true, Open: true, Blob: g.Blob, Escrow: keyspec.EscrowNone}
	closed := open
	closed.Open = false
	checkState(t, s, "app", open)
	checkState(t, s, "soft", NamespaceState{Open: true})
	for _, name := range []string{"none", "app/k", ""} {
		if _, err := s.Namespace(name); !errors.Is(err, ErrNotFound) {
			t.Errorf("namespace %q: %v", name, err)
		}
	}
	mustApply(t, s, testKey("app/k", keyspec.Ed25519, 32), testKey("app/l", keyspec.Ed25519, 32), testKey("soft/k", keyspec.Ed25519, 32))
	checkKey(t, s, "app/k", 32)

	refused := func() {
		t.Helper()
		checkState(t, s, "app", closed)
		if _, err := s.Material(keyspec.Ref{Name: "app/k", Version: 1}, nil); !errors.Is(err, ErrNamespaceClosed) {
			t.Fatalf("material: %v", err)
		}
		if err := s.Apply(t.Context(), Commit{Changes: []Change{testKey("app/new", keyspec.Ed25519, 32)}}); !errors.Is(err, ErrNamespaceClosed) {
			t.Fatalf("a new key: %v", err)
		}
		// Everything but the material is there, and so is everything of others.
		if p, err := s.Public(keyspec.Ref{Name: "app/k", Version: 1}); err != nil || !bytes.Equal(p.SPKI, testPublic("app/k", 1).SPKI) {
			t.Fatalf("public part: %v", err)
		}
		if list, _, err := s.Page("app", "app/", nil, 10); err != nil || len(list) != 2 {
			t.Fatalf("%d keys, %v", len(list), err)
		}
		checkKey(t, s, "app", 900)
		checkKey(t, s, "soft/k", 32)
	}
	s.CloseNamespace("app")
	s.CloseNamespace("app")
	refused()
	if s.Info().Damaged != 0 {
		t.Error("a closed namespace was taken for damage")
	}
	for _, key := range [][]byte{nil, g.Key[:31], make([]byte, keySize)} {
		if err := s.OpenNamespace("app", key); !errors.Is(err, ErrNamespaceKey) {
			t.Fatalf("a wrong key: %v", err)
		}
	}
	refused()
	if err := s.OpenNamespace("soft", g.Key); !errors.Is(err, ErrGuard) {
		t.Fatalf("a namespace that no device guards: %v", err)
	}
	if err := s.OpenNamespace("none", g.Key); !errors.Is(err, ErrNotFound) {
		t.Fatalf("no namespace: %v", err)
	}
	for range 2 {
		if err := s.OpenNamespace("app", g.Key); err != nil {
			t.Fatal(err)
		}
	}
	checkKey(t, s, "app/k", 32)
	s.Lock()
	if err := s.OpenNamespace("app", g.Key); !errors.Is(err, ErrLocked) {
		t.Fatal(err)
	}
	if err := s.Unlock(t.Context(), 1, testSecret(1)); err != nil {
		t.Fatal(err)
	}
	refused()
	// What needs no material works while it is closed, and changes nothing about the guard.
	k, err := s.Get("app")
	if err != nil {
		t.Fatal(err)
	}
	k.Labels["a"] = "b"
	mustApply(t, s, Change{Key: k})
	destroy(t, s, "app/l", 1)
	if err := errors.Join(s.RotateRoot(t.Context()), s.RotateEpoch(t.Context(), nil), s.Compact(t.Context())); err != nil {
		t.Fatal(err)
	}
	s = reopen(t, s)
	refused()
	if err := s.OpenNamespace("app", g.Key); err != nil {
		t.Fatal(err)
	}
	checkKey(t, s, "app/k", 32)
}

func TestGuardsAreRefusedWhereTheyWouldGuardNothing(t *testing.T) {
	s, _ := escrowStore(t)
	apply := func(c ...Change) error { return s.Apply(t.Context(), Commit{Changes: c}) }
	change := func(name string, f func(c *Change)) Change {
		k, err := s.Get(keyspec.Name(name))
		if err != nil {
			t.Fatal(err)
		}
		c := Change{Key: k}
		f(&c)
		return c
	}
	guard := func(c *Change) { c.Guard = testGuard(keyspec.EscrowNone) }
	refuse := func(what string, want error, c ...Change) {
		t.Helper()
		if err := apply(c...); !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", what, err, want)
		}
	}
	g := testGuard(keyspec.EscrowNone)
	short := *g
	short.Key = short.Key[1:]
	refuse("a short key", ErrInvalid, guardedKey("a", &short))
	long := *g
	long.Blob = make([]byte, MaxMaterial+1)
	refuse("a long blob", ErrInvalid, guardedKey("a", &long))
	refuse("no blob", ErrInvalid, guardedKey("a", &NamespaceGuard{Key: g.Key, Escrow: g.Escrow}))
	refuse("no escrow", ErrInvalid, guardedKey("a", &NamespaceGuard{Key: g.Key, Blob: g.Blob}))
	refuse("unknown escrow", ErrInvalid, guardedKey("a", &NamespaceGuard{Key: g.Key, Blob: g.Blob, Escrow: "someone"}))
	refuse("a base key", ErrInvalid, guardedKey("a/k", g))
	refuse("a base key in the same commit", ErrInvalid, guardedKey("a", g), testKey("a/k", keyspec.Ed25519, 32))
	if err := newStore(t).Apply(t.Context(), Commit{Changes: []Change{guardedKey("a", testGuard(keyspec.EscrowRecipients))}}); !errors.Is(err, ErrInvalid) {
		t.Errorf("escrow without recipients: %v", err)
	}
	if info := s.Info(); info.Guarded != 0 || info.WithoutEscrow != 0 || info.Keys != 0 {
		t.Fatalf("refused changes left something: %+v", info)
	}

	mustApply(t, s, testKey("full", keyspec.RSA2048, 256), testKey("full/k", keyspec.Ed25519, 32), testKey("unbound/k", keyspec.Ed25519, 32))
	refuse("keys that were bound without a device", ErrGuard, change("full", guard))
	refuse("keys that were not bound", ErrGuard, guardedKey("unbound", g))
	destroy(t, s, "full/k", 1)
	mustApply(t, s, change("full", guard)) // its keys are destroyed, so nothing is left that was not guarded
	mustApply(t, s, testKey("empty", keyspec.RSA2048, 256))
	mustApply(t, s, change("empty", guard)) // it had none
	mustApply(t, s, testKey("empty/k", keyspec.Ed25519, 32))
	checkKey(t, s, "empty/k", 32)
	checkKey(t, s, "empty", 256)

	refuse("a new guard with another key", ErrNamespaceKey, change("empty", guard))
	refuse("a new version without a guard", ErrGuard, change("empty", func(c *Change) {
		c.Key.Versions = append(c.Key.Versions, Version{Number: 2, State: keyspec.Active})
		c.Material = map[keyspec.Version][]byte{2: {1}}
	}))
	if err := s.UnguardNamespace(t.Context(), "empty", testGuard("").Key); !errors.Is(err, ErrNamespaceKey) {
		t.Errorf("unguarding with a wrong key: %v", err)
	}
	mustApply(t, s, testKey("soft", keyspec.RSA2048, 256))
	if err := s.UnguardNamespace(t.Context(), "soft", g.Key); !errors.Is(err, ErrGuard) {
		t.Errorf("unguarding what is not guarded: %v", err)
	}
	if info := s.Info(); info.Guarded != 2 || info.WithoutEscrow != 2 {
		t.Fatalf("%+v", info)
	}
}

func TestRotatingAModuleKeyWrapsTheNamespaceKeyAgain(t *testing.T) {
	s, _ := escrowStore(t)
	g := testGuard(keyspec.EscrowNone)
	mustApply(t, s, guardedKey("app", g))
	mustApply(t, s, testKey("app/k", keyspec.Ed25519, 32))
	s.CloseNamespace("app")
	k, err := s.Get("app")
	if err != nil {
		t.Fatal(err)
	}
	k.Versions[0].State = keyspec.Deactivated
	k.Versions = append(k.Versions, Version{Number: 2, State: keyspec.Active})
	k.Current = 2
	again := &NamespaceGuard{Blob: []byte("blob of version 2"), Key: g.Key}
	mustApply(t, s, Change{
		Key: k, Material: map[keyspec.Version][]byte{2: testMaterial("app", 2, 900)}, Public: map[keyspec.Version]Public{2: testPublic("app", 2)}, Guard: again,
	})
	checkState(t, s, "app", NamespaceState{Guarded: true, Open: true, Blob: again.Blob, Escrow: keyspec.EscrowNone})
	checkKey(t, s, "app/k", 32)
	// For another device, without a new version, and with escrow from now on.
	k, err = s.Get("app")
	if err != nil {
		t.Fatal(err)
	}
	other := &NamespaceGuard{Blob: []byte("blob of another device"), Key: g.Key, Escrow: keyspec.EscrowRecipients}
	mustApply(t, s, Change{Key: k, Guard: other})
	if info := s.Info(); info.Guarded != 1 || info.WithoutEscrow != 0 {
		t.Fatalf("%+v", info)
	}
	s = reopen(t, s)
	checkState(t, s, "app", NamespaceState{Guarded: true, Blob: other.Blob, Escrow: keyspec.EscrowRecipients})
	if err := s.OpenNamespace("app", g.Key); err != nil {
		t.Fatal(err)
	}
	checkKey(t, s, "app/k", 32)
	checkKey(t, s, "app", 900)
}

// TestGuardedKeyIsNowhereInTheFiles: not in the clear, and not in any record that the keys of the store open.
func TestGuardedKeyIsNowhereInTheFiles(t *testing.T) {
	s, id := escrowStore(t)
	guards := []*NamespaceGuard{testGuard(keyspec.EscrowNone), testGuard(keyspec.EscrowRecipients)}
	mustApply(t, s, guardedKey("none", guards[0]), guardedKey("some", guards[1]), testKey("soft", keyspec.RSA2048, 256))
	mustApply(t, s, testKey("none/k", keyspec.Ed25519, 32), testKey("some/k", keyspec.Ed25519, 32))
	find := func(where string, b []byte) {
		t.Helper()
		for _, g := range guards {
			if bytes.Contains(b, g.Key) {
				t.Errorf("a wrapping key is in %s", where)
			}
		}
	}
	for _, name := range []string{headerFile, databaseFile} {
		b, err := os.ReadFile(filepath.Join(s.config.Dir, name))
		if err != nil {
			t.Fatal(err)
		}
		find(name, b)
	}
	backup, _ := testBackup(t, s, id)
	plain, err := age.Decrypt(bytes.NewReader(backup), id)
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(plain)
	if err != nil {
		t.Fatal(err)
	}
	find("the backup", b)
	for name, software := range map[keyspec.Name]bool{"none": false, "some": false, "soft": true} {
		m, x, err := s.metadataNow(s.recordID(name))
		if err != nil {
			t.Fatal(err)
		}
		payload, err := s.openWrapping(m, &x)
		if err != nil {
			t.Fatal(err)
		}
		if (len(payload) == keySize) != software {
			t.Errorf("%s: a record of %d bytes", name, len(payload))
		}
		find("the record of "+string(name), payload)
	}
	// Whoever has the data key of a base key, as the store has, cannot open it without the wrapping key.
	x, found, err := s.lookup(s.snapshot.Load(), s.recordID("none/k").at(1))
	if err != nil || !found || x.flags != entryBound {
		t.Fatalf("%+v %v", x.flags, err)
	}
	blob, err := s.fetch(bucketMaterial, x.key[:])
	if err != nil {
		t.Fatal(err)
	}
	c := recordContext{store: s.storeID, kind: kindMaterial, key: x.key, revision: x.revision}
	if _, err := openRecord(x.dek[:], c, blob); !errors.Is(err, ErrDamaged) {
		t.Fatalf("the data key alone: %v", err)
	}
	bound := bindKey(x.dek, guards[0].Key, x.key)
	if _, err := openRecord(bound[:], c, blob); err != nil {
		t.Fatal(err)
	}
}

func TestGuardedNamespacesAreRestoredByTheirEscrow(t *testing.T) {
	ctx := t.Context()
	s, id := escrowStore(t)
	none, some := testGuard(keyspec.EscrowNone), testGuard(keyspec.EscrowRecipients)
	mustApply(t, s, guardedKey("none", none), guardedKey("some", some), testKey("soft", keyspec.RSA2048, 256))
	mustApply(t, s, testKey("none/k", keyspec.Ed25519, 32), testKey("some/k", keyspec.Ed25519, 32), testKey("soft/k", keyspec.Ed25519, 32))
	if info := s.Info(); info.Guarded != 2 || info.WithoutEscrow != 1 ||
		!slices.ContainsFunc(info.Warnings, func(w string) bool { return strings.Contains(w, "1 of the namespaces") }) {
		t.Fatalf("%+v", info)
	}
	s.CloseNamespace("none")
	s.CloseNamespace("some") // backups need neither the device nor an open namespace
	stranger := testIdentity(t)
	var out bytes.Buffer
	m, err := s.Backup(ctx, &out, BackupOptions{Recipients: []age.Recipient{stranger.Recipient()}})
	if err != nil {
		t.Fatal(err)
	}
	want := []GuardedNamespace{{Name: "none", Escrow: keyspec.EscrowNone}, {Name: "some", Escrow: keyspec.EscrowRecipients}}
	if !slices.Equal(m.Guarded, want) {
		t.Fatalf("manifest: %+v", m.Guarded)
	}
	if list, err := s.GuardedNamespaces(); err != nil || !slices.Equal(list, want) {
		t.Fatalf("%+v %v", list, err)
	}
	for _, who := range []*age.X25519Identity{id, stranger} {
		m, err := VerifyBackup(ctx, bytes.NewReader(out.Bytes()), []age.Identity{who}, t.TempDir())
		if err != nil || len(m.Guarded) != 2 || m.Guarded[0].Opened || m.Guarded[1].Opened != (who == id) {
			t.Fatalf("%+v %v", m.Guarded, err)
		}
	}
	restored, m, err := Restore(ctx, bytes.NewReader(out.Bytes()), []age.Identity{id}, testConfig(t, testDir(t)), []NewSlot{testSlot(1)})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { restored.Close() }()
	if !slices.Equal(m.Guarded, want) {
		t.Fatalf("manifest: %+v", m.Guarded)
	}
	checkKey(t, restored, "soft/k", 32)
	for _, name := range []keyspec.Name{"none/k", "some/k"} {
		if _, err := restored.Material(keyspec.Ref{Name: name, Version: 1}, nil); !errors.Is(err, ErrNamespaceClosed) {
			t.Fatalf("%s: %v", name, err)
		}
	}
	if _, err := restored.EscrowedNamespaceKey("none", []age.Identity{id}); !errors.Is(err, ErrNotFound) {
		t.Errorf("no escrow: %v", err)
	}
	if _, err := restored.EscrowedNamespaceKey("soft", []age.Identity{id}); !errors.Is(err, ErrNotFound) {
		t.Errorf("not guarded: %v", err)
	}
	if _, err := restored.EscrowedNamespaceKey("some", []age.Identity{stranger}); !errors.Is(err, ErrNamespaceKey) {
		t.Errorf("a stranger: %v", err)
	}
	key, err := restored.EscrowedNamespaceKey("some", []age.Identity{id})
	if err != nil || !bytes.Equal(key, some.Key) {
		t.Fatalf("escrow: %v", err)
	}
	if err := restored.UnguardNamespace(ctx, "some", key); err != nil {
		t.Fatal(err)
	}
	restored = reopen(t, restored)
	checkState(t, restored, "some", NamespaceState{Open: true})
	checkKey(t, restored, "some/k", 32)
	mustApply(t, restored, testKey("some/new", keyspec.Ed25519, 32))
	rotate(t, restored, "some", 900)
	checkKey(t, restored, "some/new", 32)
	if info := restored.Info(); info.Guarded != 1 || info.WithoutEscrow != 1 {
		t.Fatalf("%+v", info)
	}
	// Where the device is, it opens the other too.
	if err := restored.OpenNamespace("none", none.Key); err != nil {
		t.Fatal(err)
	}
	checkKey(t, restored, "none/k", 32)
}

// TestMoreGuardedNamespacesThanTheArenaHolds: what has no room stays closed, and nothing else fails.
func TestMoreGuardedNamespacesThanTheArenaHolds(t *testing.T) {
	s, id := escrowStore(t)
	const n = 140
	var changes []Change
	for i := range n {
		changes = append(changes, guardedKey(fmt.Sprintf("ns%03d", i), testGuard(keyspec.EscrowRecipients)))
	}
	mustApply(t, s, changes...)
	open := 0
	for i, c := range changes {
		name := string(c.Key.Name)
		state, err := s.Namespace(name)
		if err != nil {
			t.Fatal(err)
		}
		if state.Open {
			open++
			if i%2 == 0 {
				s.CloseNamespace(name)
			}
		}
	}
	if open == 0 || open == n {
		t.Fatalf("%d of %d are open", open, n)
	}
	if err := s.OpenNamespace("ns139", changes[n-1].Guard.Key); err != nil {
		t.Fatalf("after others were closed: %v", err)
	}
	mustApply(t, s, testKey("ns139/k", keyspec.Ed25519, 32))
	backup, m := testBackup(t, s, id)
	if len(m.Guarded) != n || m.Guarded[7].Name != "ns007" {
		t.Fatalf("%d in the manifest", len(m.Guarded))
	}
	m, err := VerifyBackup(t.Context(), bytes.NewReader(backup), []age.Identity{id}, t.TempDir())
	if err != nil || slices.ContainsFunc(m.Guarded, func(g GuardedNamespace) bool { return !g.Opened }) {
		t.Fatal(err)
	}
}

// TestNamespaceMayBeClosedAtAnyTime has one goroutine open and close what others use, and lock and unlock the store.
func TestNamespaceMayBeClosedAtAnyTime(t *testing.T) {
	s := newStore(t)
	g := testGuard(keyspec.EscrowNone)
	mustApply(t, s, guardedKey("app", g))
	mustApply(t, s, testKey("app/k", keyspec.Ed25519, 32))
	stop := make(chan struct{})
	var users sync.WaitGroup
	var done, refused atomic.Int64
	for u := range 4 {
		users.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				err := keyError(s, "app/k", 32)
				if i%8 == 0 && err == nil {
					err = s.Apply(context.Background(), Commit{Changes: []Change{testKey(fmt.Sprintf("app/u%d-%d", u, i), keyspec.Ed25519, 32)}})
				}
				switch {
				case err == nil:
					done.Add(1)
				case errors.Is(err, ErrNamespaceClosed), errors.Is(err, ErrLocked):
					refused.Add(1)
				default:
					t.Error(err)
					return
				}
			}
		})
	}
	for i := range scaled(400, 100) {
		s.CloseNamespace("app")
		if i%10 == 0 {
			s.Lock()
			if err := s.Unlock(t.Context(), 1, testSecret(1)); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.OpenNamespace("app", g.Key); err != nil {
			t.Fatal(err)
		}
		before := done.Load()
		for done.Load() == before && !t.Failed() {
			runtime.Gosched()
		}
	}
	close(stop)
	users.Wait()
	if report, err := s.Verify(t.Context(), nil); err != nil || len(report.Damaged) > 0 || s.Info().Damaged > 0 {
		t.Errorf("%+v %v", report, err)
	}
	t.Logf("%d done, %d refused", done.Load(), refused.Load())
}

func TestVerifyLooksAtAClosedNamespaceFromOutside(t *testing.T) {
	s := newStore(t)
	g := testGuard(keyspec.EscrowNone)
	mustApply(t, s, guardedKey("app", g), testKey("soft/k", keyspec.Ed25519, 32))
	mustApply(t, s, testKey("app/k", keyspec.Ed25519, 32), testKey("app/l", keyspec.Ed25519, 32))
	expect := func(unopened uint64, damaged int) {
		t.Helper()
		report, err := s.Verify(t.Context(), nil)
		if err != nil || report.Unopened != unopened || len(report.Damaged) != damaged || report.Keys != 4 || report.Versions != 4 {
			t.Fatalf("%+v %v, want %d unopened, %d damaged", report, err, unopened, damaged)
		}
	}
	spoil := func(key recordKey, f func(b []byte) []byte) {
		t.Helper()
		err := s.db.Update(func(tx *bolt.Tx) error {
			b := tx.Bucket(bucketMaterial)
			if v := f(bytes.Clone(b.Get(key[:]))); v != nil {
				return b.Put(key[:], v)
			}
			return b.Delete(key[:])
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	expect(0, 0)
	s.CloseNamespace("app")
	expect(2, 0)
	spoil(s.recordID("app/k").at(1), func(b []byte) []byte { b[23] ^= 1; return b }) // the revision
	spoil(s.recordID("app/l").at(1), func([]byte) []byte { return nil })
	expect(2, 2)
	spoil(s.recordID("app").at(0), func(b []byte) []byte { b[100] ^= 1; return b })
	expect(2, 3)
	if _, err := s.Namespace("app"); !errors.Is(err, ErrDamaged) {
		t.Fatal(err)
	}
}

// TestKeysMadeWhileANamespaceBecomesGuardedAreGuarded: a key is there before, and there is no guard, or afterwards, and it is guarded.
func TestKeysMadeWhileANamespaceBecomesGuardedAreGuarded(t *testing.T) {
	s := newStore(t)
	guarded, before, after := 0, 0, 0
	for round := range scaled(60, 20) {
		namespace := fmt.Sprint("ns", round)
		if round%2 == 0 { // some have a wrapping key already
			mustApply(t, s, testKey(namespace, keyspec.RSA2048, 256))
		}
		module := guardedKey(namespace, testGuard(keyspec.EscrowNone))
		if k, err := s.Get(keyspec.Name(namespace)); err == nil {
			module = Change{Key: k, Guard: module.Guard}
		}
		var all sync.WaitGroup
		made := make([]error, 4)
		for i := range made {
			all.Go(func() {
				for range i * 3 {
					runtime.Gosched()
				}
				made[i] = s.Apply(context.Background(), Commit{Changes: []Change{testKey(fmt.Sprintf("%s/k%d", namespace, i), keyspec.Ed25519, 32)}})
			})
		}
		err := s.Apply(context.Background(), Commit{Changes: []Change{module}})
		all.Wait()
		if err != nil && !errors.Is(err, ErrGuard) {
			t.Fatal(err)
		}
		if err == nil {
			guarded++
		}
		for i, e := range made {
			name := fmt.Sprintf("%s/k%d", namespace, i)
			switch {
			case errors.Is(e, ErrNamespaceClosed) && err == nil: // it was about to be opened
				continue
			case e != nil:
				t.Fatalf("%s: %v", name, e)
			}
			checkKey(t, s, name, 32)
			if err != nil {
				before++
				continue
			}
			s.CloseNamespace(namespace)
			if _, err := s.Material(keyspec.Ref{Name: keyspec.Name(name), Version: 1}, nil); !errors.Is(err, ErrNamespaceClosed) {
				t.Fatalf("%s is not guarded: %v", name, err)
			}
			if err := s.OpenNamespace(namespace, module.Guard.Key); err != nil {
				t.Fatal(err)
			}
			after++
		}
	}
	if err := s.Info(); err.Guarded != uint64(guarded) {
		t.Fatalf("%d guarded, Info says %d", guarded, err.Guarded)
	}
	t.Logf("%d guarded; %d keys made before, %d after", guarded, before, after)
}
