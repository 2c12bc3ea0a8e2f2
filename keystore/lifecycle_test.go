package keystore

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// rotate adds a version to a key and makes it the current one.
func rotate(t testing.TB, s *Store, name string, size int) {
	t.Helper()
	k, err := s.Get(keyspec.Name(name))
	if err != nil {
		t.Fatal(err)
	}
	n := k.Versions[len(k.Versions)-1].Number + 1
	k.Versions[len(k.Versions)-1].State = keyspec.Deactivated
	k.Versions = append(k.Versions, Version{Number: n, State: keyspec.Active, Created: testTime})
	k.Current = n
	mustApply(t, s, Change{
		Key: k, Material: map[keyspec.Version][]byte{n: testMaterial(name, n, size)}, Public: map[keyspec.Version]Public{n: testPublic(name, n)},
	})
}

func destroy(t testing.TB, s *Store, name string, v keyspec.Version) {
	t.Helper()
	k, err := s.Get(keyspec.Name(name))
	if err != nil {
		t.Fatal(err)
	}
	k.version(v).State = keyspec.Destroyed
	mustApply(t, s, Change{Key: k, Erase: []keyspec.Version{v}})
}

func TestRotationKeepsOldVersions(t *testing.T) {
	s := newStore(t)
	mustApply(t, s, testKey("app", keyspec.RSA2048, 256), testKey("app/k", keyspec.Ed25519, 32))
	for range 5 {
		rotate(t, s, "app/k", 32)
		rotate(t, s, "app", 256)
	}
	s = reopen(t, s)
	checkKey(t, s, "app/k", 32)
	checkKey(t, s, "app", 256)
	k, _ := s.Get("app/k")
	if len(k.Versions) != 6 || k.Current != 6 {
		t.Fatalf("%+v", k)
	}
}

func TestStructureIsEnforced(t *testing.T) {
	s := newStore(t)
	mustApply(t, s, testKey("app/k", keyspec.Ed25519, 32))
	destroyed := testKey("app/d", keyspec.Ed25519, 32)
	mustApply(t, s, destroyed)
	rotate(t, s, "app/d", 32)
	destroy(t, s, "app/d", 1)
	for what, change := range map[string]func(c *Change){
		"no versions":             func(c *Change) { c.Key.Versions = nil },
		"current is missing":      func(c *Change) { c.Key.Current = 9 },
		"another algorithm":       func(c *Change) { c.Key.Algorithm = keyspec.RSA2048 },
		"material twice":          func(c *Change) { c.Material = map[keyspec.Version][]byte{1: {1}} },
		"new without material":    func(c *Change) { c.Key.Versions = append(c.Key.Versions, Version{Number: 2, State: keyspec.Active}) },
		"material for nothing":    func(c *Change) { c.Material = map[keyspec.Version][]byte{7: {1}} },
		"public part for nothing": func(c *Change) { c.Public = map[keyspec.Version]Public{7: {}} },
		"erased but not destroyed": func(c *Change) {
			c.Erase = []keyspec.Version{1}
		},
		"out of order": func(c *Change) {
			c.Key.Versions = append(c.Key.Versions, Version{Number: 1, State: keyspec.Active})
		},
		"no state":        func(c *Change) { c.Key.Versions[0].State = "" },
		"counts back":     func(c *Change) { c.Key.Versions[0].Invocations = 1 },
		"alias of nobody": func(c *Change) { c.Aliases = []Alias{{AliasSSH, []byte("x"), 3}} },
	} {
		k, err := s.Get("app/k")
		if err != nil {
			t.Fatal(err)
		}
		if what == "counts back" {
			k.Versions[0].Invocations = 2
			mustApply(t, s, Change{Key: k})
			k.Revision++
		}
		c := Change{Key: k}
		change(&c)
		if err := s.Apply(context.Background(), Commit{Changes: []Change{c}}); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", what, err)
		}
	}
	k, _ := s.Get("app/d")
	k.Versions[0].State = keyspec.Active
	if err := s.Apply(context.Background(), Commit{Changes: []Change{{Key: k}}}); !errors.Is(err, ErrInvalid) {
		t.Errorf("raised from the dead: %v", err)
	}
	k, _ = s.Get("app/d")
	k.Versions = k.Versions[1:]
	mustApply(t, s, Change{Key: k}) // tombstones may be left out
	k, _ = s.Get("app/d")
	k.Versions = append([]Version{{Number: 1, State: keyspec.Active}}, k.Versions...)
	if err := s.Apply(context.Background(), Commit{Changes: []Change{{Key: k, Material: map[keyspec.Version][]byte{1: {1}}}}}); !errors.Is(err, ErrInvalid) {
		t.Errorf("a number used again: %v", err)
	}
	big := testKey("app/big", keyspec.RSA4096, MaxMaterial)
	mustApply(t, s, big)
	checkKey(t, s, "app/big", MaxMaterial)
	if err := s.Apply(context.Background(), Commit{Changes: []Change{testKey("app/bigger", keyspec.RSA4096, MaxMaterial+1)}}); !errors.Is(err, ErrInvalid) {
		t.Errorf("too much material: %v", err)
	}
}

// dekCopies counts the places in the database file, used or not, where a leaf with this data key in it can be opened with the keys
// that the store's header gives: a thief who has the files and a slot's secret can do no better.
func dekCopies(t testing.TB, s *Store, dek [keySize]byte) int {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(s.config.Dir, databaseFile))
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	magic := []byte{Format, nodeLeaf, 0, suite, 0, 0}
	for at := 0; ; at++ {
		i := bytes.Index(b[at:], magic)
		if i < 0 {
			return n
		}
		at += i
		if len(b)-at < nodeHeader {
			return n
		}
		size := nodeHeader + sealOverhead + entrySize*int(binary.BigEndian.Uint16(b[at+6:]))
		if size > len(b)-at {
			continue
		}
		for _, e := range s.secrets.epochs {
			for id := uint64(1); id <= s.snapshot.Load().nextNode; id++ {
				if plain, err := openLeaf(nil, s.storeID, id, b[at:at+size], e.key.Bytes()); err == nil && bytes.Contains(plain, dek[:]) {
					n++
				}
			}
		}
	}
}

func TestDestroyedKeyIsErasedByTheNextEpoch(t *testing.T) {
	ctx := context.Background()
	s := newStore(t)
	for i := range 20 {
		mustApply(t, s, testKey(fmt.Sprintf("app/k%d", i), keyspec.Ed25519, 32))
	}
	key := makeRecordID(s.secrets.index.Bytes(), "app/k7").at(1)
	x, found, err := s.lookup(s.snapshot.Load(), key)
	if err != nil || !found {
		t.Fatal(err)
	}
	destroy(t, s, "app/k7", 1)
	if _, err := s.Material(keyspec.Ref{Name: "app/k7", Version: 1}, nil); !errors.Is(err, ErrNotFound) {
		t.Fatalf("material of a destroyed version: %v", err)
	}
	if _, err := s.Public(keyspec.Ref{Name: "app/k7", Version: 1}); err != nil {
		t.Fatalf("public part of a destroyed version: %v", err)
	}
	if got := s.Info().ErasurePending; got != 1 {
		t.Fatalf("ErasurePending = %d", got)
	}
	if n := dekCopies(t, s, x.dek); n == 0 {
		t.Fatal("the scan finds nothing even before the erasure: it cannot fail")
	}
	var p Progress
	if err := s.RotateEpoch(ctx, &p); err != nil {
		t.Fatal(err)
	}
	if p.Done.Load() != 40 || p.Total.Load() != 40 {
		t.Errorf("progress %d of %d", p.Done.Load(), p.Total.Load())
	}
	if got := s.Info().ErasurePending; got != 0 {
		t.Fatalf("ErasurePending = %d after the epoch", got)
	}
	if n := dekCopies(t, s, x.dek); n != 0 {
		t.Fatalf("the data key is still in %d places", n)
	}
	for i := range 20 {
		checkKey(t, s, fmt.Sprintf("app/k%d", i), 32)
	}
	if info := s.Info(); info.Epoch != 2 || info.EpochRotating {
		t.Fatalf("%+v", info)
	}
}

// copyDir copies the files of a store as they are now, as a crash would leave them.
func copyDir(t testing.TB, from string) string {
	t.Helper()
	to := testDir(t)
	entries, err := os.ReadDir(from)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		in, err := os.Open(filepath.Join(from, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		out, err := os.OpenFile(filepath.Join(to, e.Name()), os.O_CREATE|os.O_WRONLY, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(out, in); err != nil {
			t.Fatal(err)
		}
		in.Close()
		out.Close()
	}
	return to
}

func TestEpochRotationResumesAfterACrashAtEachStep(t *testing.T) {
	ctx := context.Background()
	s := newStore(t)
	keys := scaled(5000, 3000) // several steps of resealLeaves leaves
	var changes []Change
	for i := range keys {
		c := testKey(fmt.Sprintf("app/k%d", i), keyspec.Ed25519, 32)
		changes = append(changes, c)
	}
	mustApply(t, s, changes...)
	destroy(t, s, "app/k5", 1)
	check := func(step string, dir string) {
		t.Helper()
		c := openIn(t, dir)
		defer c.Close()
		if err := c.RotateEpoch(ctx, nil); err != nil {
			t.Fatalf("%s: %v", step, err)
		}
		if info := c.Info(); info.EpochRotating || info.ErasurePending != 0 {
			t.Fatalf("%s: %+v", step, info)
		}
		c = reopen(t, c)
		for i := 0; i < keys; i += 97 {
			checkKey(t, c, fmt.Sprintf("app/k%d", i), 32)
		}
		report, err := c.Verify(ctx, nil)
		if err != nil || len(report.Damaged) != 0 || report.Keys != uint64(keys) {
			t.Fatalf("%s: %+v %v", step, report, err)
		}
	}
	// The header is written, the database does not know.
	if err := s.submit(&job{run: func() error {
		_, k, err := s.writeChanged(s.addEpoch)
		if err == nil {
			k.freeExcept(s.secrets)
		}
		return err
	}}); err != nil {
		t.Fatal(err)
	}
	check("header written", copyDir(t, s.config.Dir))
	s = reopen(t, s)
	check("head written", copyDir(t, s.config.Dir))
	steps := 0
	for s.snapshot.Load().rotating {
		if err := s.exclusively(s.resealSome); err != nil {
			t.Fatal(err)
		}
		// Work goes on between the steps.
		mustApply(t, s, testKey(fmt.Sprintf("late/k%d", steps), keyspec.Ed25519, 32))
		k, err := s.Get(keyspec.Name(fmt.Sprintf("late/k%d", steps)))
		if err != nil {
			t.Fatal(err)
		}
		_ = k
		steps++
		if steps == 1 {
			dir := copyDir(t, s.config.Dir)
			c := openIn(t, dir)
			if err := c.RotateEpoch(ctx, nil); err != nil {
				t.Fatal(err)
			}
			checkKey(t, c, "late/k0", 32)
			checkKey(t, c, "app/k77", 32)
			c.Close()
		}
	}
	if steps < 3 {
		t.Fatalf("the rotation took only %d steps", steps)
	}
	s = reopen(t, s)
	if err := s.RotateEpoch(ctx, nil); err != nil {
		t.Fatal(err)
	}
	report, err := s.Verify(ctx, nil)
	if err != nil || len(report.Damaged) != 0 {
		t.Fatalf("%+v %v", report, err)
	}
}

func TestRootRotationSurvivesACrashBeforeTheDatabaseFollows(t *testing.T) {
	s := newStore(t)
	mustApply(t, s, testKey("app/k", keyspec.Ed25519, 32))
	old := copyDir(t, s.config.Dir)
	if err := s.submit(&job{run: func() error {
		_, k, err := s.writeChanged(s.newRoot)
		if err == nil {
			k.freeExcept(s.secrets)
		}
		return err
	}}); err != nil {
		t.Fatal(err)
	}
	c := openIn(t, copyDir(t, s.config.Dir))
	checkKey(t, c, "app/k", 32)
	if h, g := c.header.Load(), c.snapshot.Load().generation; h.pending || h.generation != g || g != 2 {
		t.Fatalf("generation %d of the header, %d of the database", h.generation, g)
	}
	c.Close()
	// An older header, or an older database, does not go with the other.
	for _, name := range []string{headerFile, databaseFile} {
		dir := copyDir(t, c.config.Dir)
		b, err := os.ReadFile(filepath.Join(old, name))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
		s, err := Open(context.Background(), testConfig(t, dir))
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Unlock(context.Background(), 1, testSecret(1)); !errors.Is(err, ErrRollback) {
			t.Errorf("older %s: %v", name, err)
		}
		s.Close()
	}
}

func TestUndoingADestructionIsNoticed(t *testing.T) {
	s := newStore(t)
	mustApply(t, s, testKey("app/k", keyspec.Ed25519, 32))
	rotate(t, s, "app/k", 32)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	old, err := os.ReadFile(filepath.Join(s.config.Dir, databaseFile))
	if err != nil {
		t.Fatal(err)
	}
	s = openIn(t, s.config.Dir)
	destroy(t, s, "app/k", 1)
	s.Close()
	if err := os.WriteFile(filepath.Join(s.config.Dir, databaseFile), old, 0o600); err != nil {
		t.Fatal(err)
	}
	s, err = Open(context.Background(), testConfig(t, s.config.Dir))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := s.Unlock(context.Background(), 1, testSecret(1)); !errors.Is(err, ErrRollback) {
		t.Fatalf("Unlock: %v", err)
	}
}

func TestCompactionKeepsEverything(t *testing.T) {
	ctx := context.Background()
	s := newStore(t)
	for i := range 300 {
		mustApply(t, s, testKey(fmt.Sprintf("app/k%d", i), keyspec.Ed25519, 32))
	}
	if err := s.Compact(ctx); err != nil {
		t.Fatal(err)
	}
	mustApply(t, s, testKey("app/after", keyspec.Ed25519, 32))
	s = reopen(t, s)
	for i := range 300 {
		checkKey(t, s, fmt.Sprintf("app/k%d", i), 32)
	}
	checkKey(t, s, "app/after", 32)
	report, err := s.Verify(ctx, nil)
	if err != nil || len(report.Damaged) != 0 || report.Orphans != 0 || report.Keys != 301 {
		t.Fatalf("%+v %v", report, err)
	}
}

// Whoever puts the database of before a withdrawal back is found out at the next unlock.
func TestWithdrawalIsNotUndoneByAnOlderDatabase(t *testing.T) {
	for name, withdraw := range map[string]func(v *Version){
		"suspended":   func(v *Version) { v.State = keyspec.Suspended },
		"revoked":     func(v *Version) { v.State, v.Reason, v.Revoked = keyspec.Deactivated, keyspec.Superseded, testTime },
		"compromised": func(v *Version) { v.State, v.Reason, v.Revoked = keyspec.Compromised, keyspec.KeyCompromise, testTime },
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore(t)
			mustApply(t, s, testKey("app/k", keyspec.Ed25519, 32))
			old := copyDir(t, s.config.Dir)
			k, err := s.Get("app/k")
			if err != nil {
				t.Fatal(err)
			}
			withdraw(&k.Versions[0])
			mustApply(t, s, Change{Key: k})
			dir := copyDir(t, s.config.Dir)
			b, err := os.ReadFile(filepath.Join(old, databaseFile))
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, databaseFile), b, 0o600); err != nil {
				t.Fatal(err)
			}
			c, err := Open(context.Background(), testConfig(t, dir))
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if err := c.Unlock(context.Background(), 1, testSecret(1)); !errors.Is(err, ErrRollback) {
				t.Errorf("%v", err)
			}
		})
	}
}
