package keystore

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/keystore/secmem"
)

// testTime is what the clock of the tests shows.
var testTime = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

func testSecret(n byte) []byte { return bytes.Repeat([]byte{n}, secretSize) }

func testSlot(n byte) NewSlot {
	return NewSlot{UUID: [16]byte{n}, Kind: "test", Label: fmt.Sprint("slot ", n), Level: "none", Location: "test:/dev/slot", Secret: testSecret(n), Blob: []byte("blob")}
}

func testConfig(t testing.TB, dir string) Config {
	t.Helper()
	arena, err := secmem.NewArena(4096)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { arena.Close() })
	return Config{Dir: dir, Arena: arena, Now: func() time.Time { return testTime }}
}

func testDir(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

// newStore makes a store that is closed at the end of the test.
func newStore(t testing.TB) *Store {
	t.Helper()
	return createIn(t, testDir(t))
}

func createIn(t testing.TB, dir string) *Store {
	t.Helper()
	s, err := Create(context.Background(), testConfig(t, dir), []NewSlot{testSlot(1)}, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func openIn(t testing.TB, dir string) *Store {
	t.Helper()
	s, err := Open(context.Background(), testConfig(t, dir))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	if err := s.Unlock(context.Background(), 1, testSecret(1)); err != nil {
		t.Fatal(err)
	}
	return s
}

// reopen closes s and opens its directory again.
func reopen(t testing.TB, s *Store) *Store {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return openIn(t, s.config.Dir)
}

// testKey returns the change that creates a key with one version.
func testKey(name string, algorithm keyspec.Algorithm, size int) Change {
	k := &Key{
		Name: keyspec.Name(name), Algorithm: algorithm, Usages: []keyspec.Usage{keyspec.Sign, keyspec.Verify}, Origin: keyspec.Generated,
		Protection: keyspec.Software, Labels: map[string]string{"purpose": "test"}, Created: testTime, Current: 1,
		Versions: []Version{{Number: 1, State: keyspec.Active, Created: testTime}},
	}
	return Change{
		Key:      k,
		Material: map[keyspec.Version][]byte{1: testMaterial(name, 1, size)},
		Public:   map[keyspec.Version]Public{1: testPublic(name, 1)},
	}
}

// testMaterial is what the material of a key version has to be in these tests.
func testMaterial(name string, v keyspec.Version, size int) []byte {
	var out []byte
	for i := 0; len(out) < size; i++ {
		sum := sha256.Sum256(fmt.Appendf(nil, "material %s %d %d", name, v, i))
		out = append(out, sum[:]...)
	}
	return out[:size]
}

func testPublic(name string, v keyspec.Version) Public {
	return Public{SPKI: fmt.Appendf(nil, "spki of %s@%d", name, v), Chain: [][]byte{fmt.Appendf(nil, "certificate of %s@%d", name, v)}}
}

func mustApply(t testing.TB, s *Store, changes ...Change) {
	t.Helper()
	if err := s.Apply(context.Background(), Commit{Changes: changes}); err != nil {
		t.Fatal(err)
	}
}

// checkKey fails the test unless the key is there and right in every part.
func checkKey(t testing.TB, s *Store, name string, size int) {
	t.Helper()
	if err := keyError(s, name, size); err != nil {
		t.Fatal(err)
	}
}

var errWrongAnswer = errors.New("WRONG ANSWER")

// keyError returns what the store returned, or errWrongAnswer if it returned something that was never stored.
func keyError(s *Store, name string, size int) error {
	k, err := s.Get(keyspec.Name(name))
	if err != nil {
		return err
	}
	if string(k.Name) != name || len(k.Versions) == 0 {
		return fmt.Errorf("%w: metadata of %s", errWrongAnswer, name)
	}
	for _, v := range k.Versions {
		p, err := s.Public(keyspec.Ref{Name: k.Name, Version: v.Number})
		if err != nil {
			return err
		}
		want := testPublic(name, v.Number)
		if !bytes.Equal(p.SPKI, want.SPKI) || len(p.Chain) != 1 || !bytes.Equal(p.Chain[0], want.Chain[0]) {
			return fmt.Errorf("%w: public part of %s", errWrongAnswer, name)
		}
		if v.State == keyspec.Destroyed {
			continue
		}
		m, err := s.Material(keyspec.Ref{Name: k.Name, Version: v.Number}, nil)
		if err != nil {
			return err
		}
		if !bytes.Equal(m, testMaterial(name, v.Number, size)) {
			return fmt.Errorf("%w: material of %s", errWrongAnswer, name)
		}
	}
	return nil
}

func TestKeysSurviveReopening(t *testing.T) {
	s := newStore(t)
	for i := range 200 {
		mustApply(t, s, testKey(fmt.Sprintf("app/key%d", i), keyspec.Ed25519, 32))
	}
	for range 2 {
		for i := range 200 {
			checkKey(t, s, fmt.Sprintf("app/key%d", i), 32)
		}
		if got := s.Info().Keys; got != 200 {
			t.Fatalf("Info().Keys = %d", got)
		}
		if _, err := s.Get("app/none"); !errors.Is(err, ErrNotFound) {
			t.Fatalf("unknown key: %v", err)
		}
		s = reopen(t, s)
	}
}

func TestGetReturnsWhatWasApplied(t *testing.T) {
	s := newStore(t)
	c := testKey("app/full", keyspec.RSA2048, 256)
	c.Key.Usages = []keyspec.Usage{keyspec.Decrypt}
	c.Key.Profile, c.Key.Exportable, c.Key.Durable, c.Key.Owner = "profile", true, true, 1000
	c.Key.UsableVia = []string{"pkcs11"}
	c.Key.MinVersion, c.Key.Keep, c.Key.Limited, c.Key.UsesLeft = 1, 3, true, 1<<33
	c.Key.Labels = map[string]string{"a": "1", "b": ""}
	c.Key.Versions[0] = Version{
		Number: 1, State: keyspec.Compromised, Created: testTime, NotBefore: testTime.Add(time.Hour), Expires: testTime.Add(2 * time.Hour),
		Reason: keyspec.KeyCompromise, Revoked: testTime.Add(3 * time.Hour), DestroyAt: testTime.Add(4 * time.Hour), Invocations: 1 << 40,
	}
	mustApply(t, s, c)
	got, err := s.Get("app/full")
	if err != nil {
		t.Fatal(err)
	}
	want := *c.Key
	want.Revision = 1
	want.Versions = bytesClone(c.Key.Versions)
	want.Versions[0].SPKISHA256 = sha256.Sum256(testPublic("app/full", 1).SPKI)
	want.Versions[0].public = 1
	if g, w := fmt.Sprintf("%+v", *got), fmt.Sprintf("%+v", want); g != w {
		t.Fatalf("got  %s\nwant %s", g, w)
	}
}

func bytesClone(v []Version) []Version { return append([]Version(nil), v...) }

func TestRevisionsAreCompared(t *testing.T) {
	s := newStore(t)
	mustApply(t, s, testKey("app/k", keyspec.Ed25519, 32))
	if err := s.Apply(context.Background(), Commit{Changes: []Change{testKey("app/k", keyspec.Ed25519, 32)}}); !errors.Is(err, ErrExists) {
		t.Fatalf("second creation: %v", err)
	}
	first, _ := s.Get("app/k")
	second, _ := s.Get("app/k")
	first.Labels["x"] = "1"
	mustApply(t, s, Change{Key: first})
	if err := s.Apply(context.Background(), Commit{Changes: []Change{{Key: second}}}); !errors.Is(err, ErrConflict) {
		t.Fatalf("change of an old revision: %v", err)
	}
	missing := testKey("app/missing", keyspec.Ed25519, 32)
	missing.Key.Revision = 1
	if err := s.Apply(context.Background(), Commit{Changes: []Change{missing}}); !errors.Is(err, ErrNotFound) {
		t.Fatalf("change of a missing key: %v", err)
	}
	// A commit is all or nothing.
	both := []Change{testKey("app/new", keyspec.Ed25519, 32), {Key: second}}
	if err := s.Apply(context.Background(), Commit{Changes: both}); !errors.Is(err, ErrConflict) {
		t.Fatal(err)
	}
	if _, err := s.Get("app/new"); !errors.Is(err, ErrNotFound) {
		t.Fatalf("half a commit: %v", err)
	}
}

func TestSlotsOpenTheStore(t *testing.T) {
	ctx := context.Background()
	s := newStore(t)
	mustApply(t, s, testKey("app", keyspec.Ed25519, 32), testKey("other/k", keyspec.Ed25519, 32))
	added, err := s.AddSlot(ctx, testSlot(2))
	if err != nil {
		t.Fatal(err)
	}
	s.Lock()
	if _, err := s.Get("app"); !errors.Is(err, ErrLocked) {
		t.Fatalf("locked: %v", err)
	}
	if err := s.Unlock(ctx, added.ID, testSecret(1)); !errors.Is(err, ErrSecret) {
		t.Fatalf("wrong secret: %v", err)
	}
	if err := s.Unlock(ctx, 77, testSecret(1)); !errors.Is(err, ErrNoSlot) {
		t.Fatalf("no slot: %v", err)
	}
	if err := s.Unlock(ctx, added.ID, testSecret(2)); err != nil {
		t.Fatal(err)
	}
	checkKey(t, s, "app", 32)
	if err := s.RotateRoot(ctx); err != nil {
		t.Fatal(err)
	}
	mustApply(t, s, testKey("app/late", keyspec.Ed25519, 32))
	if err := s.RemoveSlot(ctx, added.ID); err != nil {
		t.Fatal(err)
	}
	if err := s.RemoveSlot(ctx, 1); !errors.Is(err, ErrLastSlot) {
		t.Fatalf("last slot: %v", err)
	}
	if !s.Info().EpochRotating {
		t.Fatal("removing a slot did not begin an epoch")
	}
	s = reopen(t, s)
	if err := s.RotateEpoch(ctx, nil); err != nil {
		t.Fatal(err)
	}
	if s.Info().EpochRotating {
		t.Fatal("the epoch is not finished")
	}
	s = reopen(t, s)
	for _, name := range []string{"app", "other/k", "app/late"} {
		checkKey(t, s, name, 32)
	}
}

func TestPageListsEveryKeyOnce(t *testing.T) {
	s := newStore(t)
	var changes []Change
	for i := range 300 {
		changes = append(changes, testKey(fmt.Sprintf("ns%d/dir%d/key%d", i%3, i%2, i), keyspec.Ed25519, 32))
	}
	changes = append(changes, testKey("ns1", keyspec.Ed25519, 32))
	changes = append(changes, testKey("ns12/k", keyspec.Ed25519, 32), testKey("ns", keyspec.Ed25519, 32))
	mustApply(t, s, changes[300:]...)
	mustApply(t, s, changes[:300]...)
	for prefix, want := range map[string]int{"": 303, "ns": 1, "ns1": 101, "ns1/": 100, "ns2/dir0/": 50, "ns2/dir0/key2": 17, "zz": 0, "zz/": 0} {
		namespace, _, _ := strings.Cut(prefix, "/")
		for _, limit := range []int{1, 7, 1000} {
			seen := map[keyspec.Name]bool{}
			var after []byte
			for {
				keys, next, err := s.Page(namespace, prefix, after, limit)
				if err != nil {
					t.Fatal(err)
				}
				if len(keys) > limit {
					t.Fatalf("page of %d, limit %d", len(keys), limit)
				}
				for _, k := range keys {
					if seen[k.Name] {
						t.Fatalf("%s twice", k.Name)
					}
					seen[k.Name] = true
				}
				if after = next; after == nil {
					break
				}
			}
			if prefix != "ns2/dir0/key2" && len(seen) != want {
				t.Errorf("prefix %q, limit %d: %d keys, want %d", prefix, limit, len(seen), want)
			}
		}
	}
}

func TestAliasesFindVersions(t *testing.T) {
	s := newStore(t)
	c := testKey("app/k", keyspec.Ed25519, 32)
	c.Aliases = []Alias{{AliasSSH, []byte("fingerprint"), 1}, {AliasCKAID, []byte{1, 2}, 1}}
	mustApply(t, s, c)
	spki, thumb := sha256.Sum256(c.Public[1].SPKI), sha256.Sum256(c.Public[1].Chain[0])
	for kind, value := range map[AliasKind][]byte{AliasSPKI: spki[:], AliasThumbprint: thumb[:], AliasSSH: []byte("fingerprint"), AliasCKAID: {1, 2}} {
		ref, err := s.Alias(kind, value)
		if err != nil || ref != (keyspec.Ref{Name: "app/k", Version: 1}) {
			t.Errorf("%s: %v %v", kind, ref, err)
		}
	}
	if _, err := s.Alias(AliasSPKI, []byte("fingerprint")); !errors.Is(err, ErrNotFound) {
		t.Errorf("unknown: %v", err)
	}
}

func TestAliasesFollowThePublicPart(t *testing.T) {
	s := newStore(t)
	mustApply(t, s, testKey("app/k", keyspec.Ed25519, 32), testKey("app/other", keyspec.Ed25519, 32))
	first := testPublic("app/k", 1)
	thumb := func(certificate []byte) []byte { sum := sha256.Sum256(certificate); return sum[:] }
	attach := func(name keyspec.Name, p Public) {
		t.Helper()
		k, err := s.Get(name)
		if err != nil {
			t.Fatal(err)
		}
		mustApply(t, s, Change{Key: k, Public: map[keyspec.Version]Public{1: p}})
	}
	finds := func(certificate []byte, want keyspec.Name) {
		t.Helper()
		ref, err := s.Alias(AliasThumbprint, thumb(certificate))
		if want == "" && !errors.Is(err, ErrNotFound) || want != "" && (err != nil || ref.Name != want) {
			t.Errorf("%s: %v %v, want %q", certificate, ref, err, want)
		}
	}
	second := Public{SPKI: first.SPKI, Chain: [][]byte{[]byte("renewed")}}
	attach("app/k", second)
	finds(first.Chain[0], "app/k") // what was encrypted to it still names it
	finds(second.Chain[0], "app/k")
	attach("app/k", second) // the same again
	finds(second.Chain[0], "app/k")
	attach("app/other", second) // the alias goes to who comes last, and stays there
	finds(second.Chain[0], "app/other")
	finds(testPublic("app/other", 1).Chain[0], "") // it was for another public key
	attach("app/k", Public{SPKI: first.SPKI})
	finds(first.Chain[0], "app/k")
	finds(second.Chain[0], "app/other")
	spki := sha256.Sum256(first.SPKI)
	if ref, err := s.Alias(AliasSPKI, spki[:]); err != nil || ref.Name != "app/k" {
		t.Errorf("%v %v", ref, err)
	}
}

// Two keys may have the same public half and the same certificate. The one that was written last is found, and when it goes the other.
func TestSharedAliasOutlivesOneOfItsKeys(t *testing.T) {
	s := newStore(t)
	public := testPublic("app/0", 1)
	spki, thumb := sha256.Sum256(public.SPKI), sha256.Sum256(public.Chain[0])
	values := map[AliasKind][]byte{AliasSPKI: spki[:], AliasThumbprint: thumb[:], AliasSSH: []byte("fingerprint")}
	expect := func(want keyspec.Name) {
		t.Helper()
		for kind, value := range values {
			ref, err := s.Alias(kind, value)
			if want == "" && !errors.Is(err, ErrNotFound) || want != "" && (err != nil || ref.Name != want) {
				t.Fatalf("%s: %v %v, want %q", kind, ref, err, want)
			}
		}
		if report, err := s.Verify(t.Context(), nil); err != nil || len(report.Damaged) > 0 {
			t.Fatalf("%+v %v", report, err)
		}
	}
	for i := range 4 {
		c := testKey(fmt.Sprint("app/", i), keyspec.Ed25519, 32)
		c.Public[1] = public
		c.Aliases = []Alias{{AliasSSH, []byte("fingerprint"), 1}}
		mustApply(t, s, c)
		expect(c.Key.Name)
	}
	all := []keyspec.Ref{{Name: "app/3", Version: 1}, {Name: "app/2", Version: 1}, {Name: "app/1", Version: 1}, {Name: "app/0", Version: 1}}
	if list, err := s.Sharing(AliasSPKI, spki[:]); err != nil || !slices.Equal(list, all) {
		t.Fatalf("%v %v", list, err)
	}
	destroy(t, s, "app/3", 1)
	expect("app/2")
	destroy(t, s, "app/1", 1)
	expect("app/2")
	// Renewed, one of them goes by both certificates, the other still by the first.
	k, err := s.Get("app/2")
	if err != nil {
		t.Fatal(err)
	}
	mustApply(t, s, Change{Key: k, Public: map[keyspec.Version]Public{1: {SPKI: public.SPKI, Chain: [][]byte{[]byte("renewed")}}}})
	expect("app/2")
	s = reopen(t, s)
	destroy(t, s, "app/2", 1)
	expect("app/0")
	key := s.aliasKey(AliasSPKI, spki[:])
	err = s.db.Update(func(tx *bolt.Tx) error { return tx.Bucket(bucketAlias).Put(key[:], make([]byte, aliasSize)) })
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Alias(AliasSPKI, spki[:]); !errors.Is(err, ErrDamaged) {
		t.Fatal(err)
	}
	if report, err := s.Verify(t.Context(), nil); err != nil || len(report.Damaged) != 1 {
		t.Fatalf("another's entry in its place: %+v %v", report, err)
	}
	for _, b := range [][]byte{{}, make([]byte, aliasSize-1)} {
		if err := s.db.Update(func(tx *bolt.Tx) error { return tx.Bucket(bucketAlias).Put(key[:], b) }); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Alias(AliasSPKI, spki[:]); err == nil {
			t.Fatalf("found by %d bytes", len(b))
		}
	}
	destroy(t, s, "app/0", 1)
	expect("")
}

func TestManyVersionsMayShareAnAlias(t *testing.T) {
	s := newStore(t)
	public := testPublic("app/0", 1)
	spki := sha256.Sum256(public.SPKI)
	for i := range maxSharing + 10 {
		c := testKey(fmt.Sprint("app/", i), keyspec.Ed25519, 32)
		c.Public[1] = public
		mustApply(t, s, c)
	}
	place := s.aliasKey(AliasSPKI, spki[:])
	if b, err := s.fetch(bucketAlias, place[:]); err != nil || len(b) != maxSharing*aliasSize {
		t.Fatalf("%d bytes, %v", len(b), err)
	}
	if ref, err := s.Alias(AliasSPKI, spki[:]); err != nil || ref.Name != keyspec.Name(fmt.Sprint("app/", maxSharing+9)) {
		t.Fatalf("%v %v", ref, err)
	}
	if list, err := s.Sharing(AliasSPKI, spki[:]); err != nil || len(list) != maxSharing {
		t.Fatalf("%d %v", len(list), err)
	}
	if report, err := s.Verify(t.Context(), nil); err != nil || len(report.Damaged) > 0 {
		t.Fatalf("%+v %v", report, err)
	}
}

func TestThumbprintsOfEarlierCertificatesStay(t *testing.T) {
	s := newStore(t)
	c := testKey("app/k", keyspec.RSA2048, 256)
	certificate := func(i int) []byte { return fmt.Appendf(nil, "certificate %d", i) }
	thumb := func(i int) []byte { sum := sha256.Sum256(certificate(i)); return sum[:] }
	c.Aliases = []Alias{{AliasThumbprint, thumb(-1), 1}, {AliasCKAID, []byte("id"), 1}} // one from before it came here
	mustApply(t, s, c, testKey("app/other", keyspec.RSA2048, 256))
	attach := func(p Public) {
		t.Helper()
		k, err := s.Get("app/k")
		if err != nil {
			t.Fatal(err)
		}
		mustApply(t, s, Change{Key: k, Public: map[keyspec.Version]Public{1: p}})
	}
	expect := func(first, last int) {
		t.Helper()
		for i := -2; i < 100; i++ {
			ref, err := s.Alias(AliasThumbprint, thumb(i))
			if found := i == -1 || i >= first && i <= last; found && (err != nil || ref.Name != "app/k") || !found && !errors.Is(err, ErrNotFound) {
				t.Fatalf("certificate %d: %v %v", i, ref, err)
			}
		}
		if report, err := s.Verify(t.Context(), nil); err != nil || len(report.Damaged) > 0 {
			t.Fatalf("%+v %v", report, err)
		}
	}
	public := func(i int) Public {
		return Public{SPKI: c.Public[1].SPKI, Chain: [][]byte{certificate(i), []byte("issuer")}}
	}
	for i := range 40 {
		attach(public(i))
		expect(max(0, i-MaxThumbprints), i)
	}
	// The same again, with another issuer's certificate, or an earlier one once more: nothing is there twice, and nothing is lost.
	attach(Public{SPKI: c.Public[1].SPKI, Chain: [][]byte{certificate(39), []byte("another issuer")}})
	attach(public(30))
	attach(public(39))
	expect(40-1-MaxThumbprints, 39)
	attach(public(-1)) // which was added by the caller, and stays for ever
	attach(public(40))
	for i := range MaxThumbprints {
		attach(public(41 + i))
	}
	expect(40, 40+MaxThumbprints)
	s = reopen(t, s)
	if err := s.RotateEpoch(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	expect(40, 40+MaxThumbprints)
	rotate(t, s, "app/k", 256)
	expect(40, 40+MaxThumbprints)
	// Without a certificate the version still goes by those it had, with another public key by none of them.
	attach(Public{SPKI: c.Public[1].SPKI})
	expect(41, 40+MaxThumbprints)
	attach(Public{SPKI: []byte("another")})
	expect(100, 0)
	attach(public(50))
	attach(public(51))
	destroy(t, s, "app/k", 1)
	for i := -1; i < 100; i++ {
		if ref, err := s.Alias(AliasThumbprint, thumb(i)); !errors.Is(err, ErrNotFound) {
			t.Fatalf("certificate %d of a destroyed version: %v %v", i, ref, err)
		}
	}
}

// The largest description of a key still fits its record, so no certificate is too many for it.
func TestKeyWithAllItsVersionsAndCertificatesFits(t *testing.T) {
	s := newStore(t)
	c := testKey("app/k", keyspec.RSA2048, 256)
	c.Key.Versions = nil
	c.Key.Current = keyspec.MaxVersions
	for n := keyspec.Version(1); n <= keyspec.MaxVersions; n++ {
		state := keyspec.Deactivated
		if n == c.Key.Current {
			state = keyspec.Active
		}
		c.Key.Versions = append(c.Key.Versions, Version{Number: n, State: state, Created: testTime, NotBefore: testTime, Expires: testTime, Revoked: testTime, Reason: keyspec.CessationOfOperation})
		c.Material[n], c.Public[n] = testMaterial("app/k", n, 256), testPublic("app/k", n)
		c.Aliases = append(c.Aliases, Alias{AliasCKAID, fmt.Append(nil, n), n}, Alias{AliasSSH, fmt.Append(nil, n), n})
	}
	mustApply(t, s, c)
	for i := range MaxThumbprints + 2 {
		k, err := s.Get("app/k")
		if err != nil {
			t.Fatal(err)
		}
		ch := Change{Key: k, Public: map[keyspec.Version]Public{}}
		for n := range c.Public {
			ch.Public[n] = Public{SPKI: c.Public[n].SPKI, Chain: [][]byte{fmt.Appendf(nil, "certificate %d of %d", i, n)}}
		}
		mustApply(t, s, ch)
	}
	first := sha256.Sum256([]byte("certificate 0 of 7"))
	if ref, err := s.Alias(AliasThumbprint, first[:]); !errors.Is(err, ErrNotFound) {
		t.Fatalf("%v %v", ref, err)
	}
	second := sha256.Sum256([]byte("certificate 1 of 7"))
	if ref, err := s.Alias(AliasThumbprint, second[:]); err != nil || ref.String() != "app/k@7" {
		t.Fatalf("%v %v", ref, err)
	}
	if report, err := s.Verify(t.Context(), nil); err != nil || len(report.Damaged) > 0 || report.Versions != keyspec.MaxVersions {
		t.Fatalf("%+v %v", report, err)
	}
}

func TestAliasesGoWithTheVersionTheyAreOf(t *testing.T) {
	s := newStore(t)
	c := testKey("app/k", keyspec.Ed25519, 32)
	c.Aliases = []Alias{{AliasSSH, []byte("fingerprint"), 1}, {AliasCKAID, []byte{1, 2}, 1}, {AliasSSH, []byte("shared"), 1}}
	mustApply(t, s, c, testKey("app/other", keyspec.Ed25519, 32))
	spki, thumb := sha256.Sum256(c.Public[1].SPKI), sha256.Sum256(c.Public[1].Chain[0])
	all := map[AliasKind][]byte{AliasSPKI: spki[:], AliasThumbprint: thumb[:], AliasSSH: []byte("fingerprint"), AliasCKAID: {1, 2}}
	expect := func(found bool) {
		t.Helper()
		for kind, value := range all {
			ref, err := s.Alias(kind, value)
			if found && (err != nil || ref.Name != "app/k") || !found && !errors.Is(err, ErrNotFound) {
				t.Errorf("%s: %v %v", kind, ref, err)
			}
		}
		if report, err := s.Verify(t.Context(), nil); err != nil || len(report.Damaged) > 0 {
			t.Errorf("%+v %v", report, err)
		}
	}
	update := func(name keyspec.Name, f func(*Change)) {
		t.Helper()
		k, err := s.Get(name)
		if err != nil {
			t.Fatal(err)
		}
		change := Change{Key: k}
		f(&change)
		mustApply(t, s, change)
	}
	update("app/k", func(c *Change) { c.Key.Labels["a"] = "b"; c.Aliases = []Alias{{AliasCKAID, []byte{1, 2}, 1}} })
	update("app/other", func(c *Change) { c.Aliases = []Alias{{AliasSSH, []byte("shared"), 1}} })
	rotate(t, s, "app/k", 32)
	s = reopen(t, s)
	expect(true)
	if k, err := s.Get("app/k"); err != nil || len(k.Versions[0].aliases) != 3 || len(k.Versions[1].aliases) != 0 {
		t.Fatalf("%+v %v", k, err)
	}
	destroy(t, s, "app/k", 1)
	expect(false)
	if ref, err := s.Alias(AliasSSH, []byte("shared")); err != nil || ref.Name != "app/other" {
		t.Errorf("what another key goes by now: %v %v", ref, err)
	}
	// A certificate for a destroyed version brings nothing back, and no alias can be added.
	update("app/k", func(c *Change) { c.Public = map[keyspec.Version]Public{1: testPublic("app/k", 1)} })
	expect(false)
	k, _ := s.Get("app/k")
	if err := s.Apply(t.Context(), Commit{Changes: []Change{{Key: k, Aliases: []Alias{{AliasCKAID, []byte{1, 2}, 1}}}}}); !errors.Is(err, ErrInvalid) {
		t.Errorf("an alias of a destroyed version: %v", err)
	}
}

func TestRequestKeysMakeCommitsIdempotent(t *testing.T) {
	now := testTime
	dir := testDir(t)
	c := testConfig(t, dir)
	c.Now = func() time.Time { return now }
	s, err := Create(context.Background(), c, []NewSlot{testSlot(1)}, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	apply := func(name, request string) error {
		return s.Apply(context.Background(), Commit{Changes: []Change{testKey(name, keyspec.Ed25519, 32)}, RequestKey: []byte(request)})
	}
	if err := apply("app/a", "r1"); err != nil {
		t.Fatal(err)
	}
	var dup *DuplicateError
	if err := apply("app/b", "r1"); !errors.As(err, &dup) || dup.Ref != (keyspec.Ref{Name: "app/a", Version: 1}) {
		t.Fatalf("second time: %v", err)
	}
	if _, err := s.Get("app/b"); !errors.Is(err, ErrNotFound) {
		t.Fatalf("a duplicate changed something: %v", err)
	}
	now = now.Add(requestTTL + time.Second)
	if err := apply("app/b", "r1"); err != nil {
		t.Fatalf("after the time: %v", err)
	}
}

func TestOutboxHoldsWhatWasCommitted(t *testing.T) {
	s := newStore(t)
	for i := range 5 {
		c := Commit{Changes: []Change{testKey(fmt.Sprint("app/k", i), keyspec.Ed25519, 32)}, Audit: binary.BigEndian.AppendUint32(nil, uint32(i))}
		if err := s.Apply(context.Background(), c); err != nil {
			t.Fatal(err)
		}
	}
	expect := func(first, n int) {
		t.Helper()
		list, err := s.Outbox(100)
		if err != nil || len(list) != n {
			t.Fatalf("outbox: %d entries, %v", len(list), err)
		}
		for i, x := range list {
			if x.Seq != uint64(first+i+1) || binary.BigEndian.Uint32(x.Data) != uint32(first+i) {
				t.Fatalf("outbox entry %d: %+v", i, x)
			}
		}
	}
	expect(0, 5)
	s = reopen(t, s)
	expect(0, 5)
	if err := s.AckOutbox(2); err != nil {
		t.Fatal(err)
	}
	expect(2, 3)
	if err := s.AckOutbox(6); !errors.Is(err, ErrInvalid) {
		t.Fatalf("acknowledgement of the future: %v", err)
	}
	mustApply(t, s, testKey("app/late", keyspec.Ed25519, 32))
	if err := s.AckOutbox(4); err != nil {
		t.Fatal(err)
	}
	s = reopen(t, s)
	expect(4, 1)
}

func TestFilesOpenToOthersAreRefused(t *testing.T) {
	for name, spoil := range map[string]func(dir string) error{
		"directory mode": func(dir string) error { return os.Chmod(dir, 0o750) },
		"header mode":    func(dir string) error { return os.Chmod(filepath.Join(dir, headerFile), 0o644) },
		"database mode":  func(dir string) error { return os.Chmod(filepath.Join(dir, databaseFile), 0o640) },
		"hard link":      func(dir string) error { return os.Link(filepath.Join(dir, databaseFile), filepath.Join(dir, "other")) },
		"symbolic link": func(dir string) error {
			path := filepath.Join(dir, headerFile)
			if err := os.Rename(path, path+".real"); err != nil {
				return err
			}
			return os.Symlink(path+".real", path)
		},
		"owner": func(dir string) error { return os.Chown(filepath.Join(dir, databaseFile), 12345, -1) },
	} {
		t.Run(name, func(t *testing.T) {
			if name == "owner" && os.Geteuid() != 0 {
				if os.Getenv("CI") != "" {
					t.Fatal("this test needs root to give a file away")
				}
				t.Skip("only root can give files away")
			}
			s := newStore(t)
			s.Close()
			if err := spoil(s.config.Dir); err != nil {
				t.Fatal(err)
			}
			if _, err := Open(context.Background(), s.config); !errors.Is(err, ErrPermissions) {
				t.Fatalf("Open: %v", err)
			}
		})
	}
}
