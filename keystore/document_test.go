package keystore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"filippo.io/age"
	bolt "go.etcd.io/bbolt"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// testDocument is the change that creates a document.
func testDocument(kind, name string) DocumentChange {
	return DocumentChange{Document: Document{Kind: kind, Name: name, Data: testData(kind, name, 0)}}
}

// testData is what the data of a document has to be in these tests.
func testData(kind, name string, revision uint64) []byte {
	return bytes.Repeat(fmt.Appendf(nil, "data of %s/%s, %d. ", kind, name, revision), 20)
}

func applyDocuments(t testing.TB, s *Store, changes ...DocumentChange) {
	t.Helper()
	if err := s.Apply(context.Background(), Commit{Documents: changes}); err != nil {
		t.Fatal(err)
	}
}

func deletion(d Document) DocumentChange { return DocumentChange{Document: d, Delete: true} }

// checkDocument fails the test unless the document is as testDocument made it.
func checkDocument(t testing.TB, s *Store, kind, name string) {
	t.Helper()
	if err := documentError(s, kind, name); err != nil {
		t.Fatal(err)
	}
}

// documentError is for documents what keyError is for keys.
func documentError(s *Store, kind, name string) error {
	d, err := s.Document(kind, name)
	if err != nil {
		return err
	}
	if d.Kind != kind || d.Name != name || d.Revision != 1 || !bytes.Equal(d.Data, testData(kind, name, 0)) {
		return fmt.Errorf("%w: %s", errWrongAnswer, d.label())
	}
	return nil
}

// allDocuments pages through the documents of a kind.
func allDocuments(t testing.TB, s *Store, kind string, limit int) map[string]Document {
	t.Helper()
	all := map[string]Document{}
	var cursor []byte
	for {
		list, next, err := s.Documents(kind, cursor, limit)
		if err != nil {
			t.Fatal(err)
		}
		if len(list) > limit {
			t.Fatalf("a page of %d documents", len(list))
		}
		for _, d := range list {
			if _, ok := all[d.Name]; ok || d.Kind != kind {
				t.Fatalf("%s, again or from elsewhere", d.label())
			}
			all[d.Name] = d
		}
		if next == nil {
			return all
		}
		cursor = next
	}
}

func TestDocumentsAreKept(t *testing.T) {
	s := newStore(t)
	mustApply(t, s, testKey("trust", keyspec.RSA2048, 256), testKey("trust/n1", keyspec.Ed25519, 32))
	const count = 100
	for i := range count {
		applyDocuments(t, s, testDocument("trust", fmt.Sprint("n", i)), testDocument("crl", fmt.Sprint("n", i)))
	}
	applyDocuments(t, s, DocumentChange{Document: Document{Kind: "empty", Name: "nothing"}}, DocumentChange{Document: Document{
		Kind: strings.Repeat("k", MaxDocumentKind), Name: strings.Repeat("n", MaxDocumentName), Data: bytes.Repeat([]byte("x"), MaxDocument),
	}})
	for range 2 {
		for i := range count {
			checkDocument(t, s, "trust", fmt.Sprint("n", i))
			checkDocument(t, s, "crl", fmt.Sprint("n", i))
		}
		for _, limit := range []int{1, 7, 32, 1000} {
			if all := allDocuments(t, s, "trust", limit); len(all) != count {
				t.Fatalf("%d documents, in pages of %d", len(all), limit)
			}
		}
		if all := allDocuments(t, s, "none", 10); len(all) != 0 {
			t.Fatalf("%d documents of no kind", len(all))
		}
		if d, err := s.Document(strings.Repeat("k", MaxDocumentKind), strings.Repeat("n", MaxDocumentName)); err != nil || len(d.Data) != MaxDocument {
			t.Fatalf("the largest: %d bytes, %v", len(d.Data), err)
		}
		if d, err := s.Document("empty", "nothing"); err != nil || len(d.Data) != 0 {
			t.Fatalf("the smallest: %d bytes, %v", len(d.Data), err)
		}
		for _, name := range []string{"n", "n1\x00", "trust", ""} {
			if _, err := s.Document("trust", name); !errors.Is(err, ErrNotFound) {
				t.Fatalf("%q: %v", name, err)
			}
		}
		// They are not keys.
		if info := s.Info(); info.Keys != 2 || info.Documents != 2*count+2 {
			t.Fatalf("%+v", info)
		}
		for _, namespace := range []string{"", "trust"} {
			if keys, next, err := s.Page(namespace, "", nil, 1000); err != nil || len(keys) != 2 || next != nil {
				t.Fatalf("%d keys, %v", len(keys), err)
			}
		}
		if _, err := s.Get("crl/n1"); !errors.Is(err, ErrNotFound) {
			t.Fatal(err)
		}
		report, err := s.Verify(t.Context(), nil)
		if err != nil || len(report.Damaged) > 0 || report.Keys != 2 || report.Documents != 2*count+2 || report.Orphans != 0 {
			t.Fatalf("%+v %v", report, err)
		}
		s = reopen(t, s)
	}
	s.Lock()
	if _, err := s.Document("trust", "n1"); !errors.Is(err, ErrLocked) {
		t.Fatal(err)
	}
	if list, _, err := s.Documents("trust", nil, 10); !errors.Is(err, ErrLocked) || list != nil {
		t.Fatal(err)
	}
	if got := s.Info().Documents; got != 0 {
		t.Fatalf("%d documents while locked", got)
	}
}

func TestRevisionsOfDocumentsAreCompared(t *testing.T) {
	s := newStore(t)
	apply := func(want error, changes ...DocumentChange) {
		t.Helper()
		if err := s.Apply(t.Context(), Commit{Documents: changes}); !errors.Is(err, want) {
			t.Fatalf("%v, want %v", err, want)
		}
	}
	get := func(revision uint64) Document {
		t.Helper()
		d, err := s.Document("trust", "a")
		if err != nil || d.Revision != revision {
			t.Fatalf("%+v %v", d, err)
		}
		return d
	}
	made := testDocument("trust", "a")
	late := made
	late.Revision = 1
	apply(ErrNotFound, late)
	apply(ErrNotFound, deletion(late.Document))
	apply(nil, made)
	apply(ErrExists, made)
	first := get(1)
	first.Data = []byte("second")
	apply(nil, DocumentChange{Document: first})
	apply(ErrConflict, DocumentChange{Document: first})
	apply(ErrConflict, deletion(first))
	second := get(2)
	if string(second.Data) != "second" {
		t.Fatalf("%q", second.Data)
	}
	apply(nil, deletion(second))
	if _, err := s.Document("trust", "a"); !errors.Is(err, ErrNotFound) {
		t.Fatal(err)
	}
	apply(ErrNotFound, deletion(second))
	apply(ErrNotFound, DocumentChange{Document: second})
	if info := s.Info(); info.Documents != 0 || info.ErasurePending != 1 {
		t.Fatalf("%+v", info)
	}
	// One that is made in its place is not taken for it.
	apply(nil, made)
	third := get(4)
	for revision := range uint64(4) {
		stale := third
		stale.Revision = revision
		want := ErrConflict
		if revision == 0 {
			want = ErrExists
		}
		apply(want, DocumentChange{Document: stale})
	}
	apply(nil, deletion(third))
	apply(nil, made)
	get(6)
	if all := allDocuments(t, s, "trust", 10); len(all) != 1 {
		t.Fatalf("%v", all)
	}
	report, err := s.Verify(t.Context(), nil)
	if err != nil || len(report.Damaged) > 0 || report.Documents != 1 || report.Orphans != 0 {
		t.Fatalf("%+v %v", report, err)
	}
}

func TestMalformedDocumentsAreRefused(t *testing.T) {
	s := newStore(t)
	for what, c := range map[string]struct {
		want   error
		change DocumentChange
	}{
		"no kind":          {ErrInvalid, testDocument("", "a")},
		"no name":          {ErrInvalid, testDocument("trust", "")},
		"zero in the kind": {ErrInvalid, testDocument("tru\x00st", "a")},
		"long kind":        {ErrInvalid, testDocument(strings.Repeat("k", MaxDocumentKind+1), "a")},
		"long name":        {ErrInvalid, testDocument("trust", strings.Repeat("n", MaxDocumentName+1))},
		"too large":        {ErrTooLarge, DocumentChange{Document: Document{Kind: "trust", Name: "a", Data: make([]byte, MaxDocument+1)}}},
		"deleting nothing": {ErrInvalid, deletion(Document{Kind: "trust", Name: "a"})},
	} {
		if err := s.Apply(t.Context(), Commit{Documents: []DocumentChange{c.change}}); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if err := s.Apply(t.Context(), Commit{Documents: []DocumentChange{testDocument("trust", "a"), testDocument("trust", "a")}}); !errors.Is(err, ErrInvalid) {
		t.Errorf("twice in a commit: %v", err)
	}
	if err := s.Apply(t.Context(), Commit{Documents: make([]DocumentChange, maxChanges+1)}); !errors.Is(err, ErrTooLarge) {
		t.Errorf("too many: %v", err)
	}
	large := make([]DocumentChange, maxDocumentBytes/MaxDocument+1)
	for i := range large {
		large[i] = DocumentChange{Document: Document{Kind: "trust", Name: fmt.Sprint(i), Data: make([]byte, MaxDocument)}}
	}
	if err := s.Apply(t.Context(), Commit{Documents: large}); !errors.Is(err, ErrTooLarge) {
		t.Errorf("too much: %v", err)
	}
	if err := s.Apply(t.Context(), Commit{Documents: large[:1], RequestKey: []byte("r")}); !errors.Is(err, ErrInvalid) {
		t.Errorf("a request key without a key: %v", err)
	}
	for _, after := range [][]byte{{}, make([]byte, 27)} {
		if _, _, err := s.Documents("trust", after, 1); !errors.Is(err, ErrInvalid) {
			t.Errorf("cursor of %d bytes: %v", len(after), err)
		}
	}
	if _, _, err := s.Documents("trust", nil, 0); !errors.Is(err, ErrInvalid) {
		t.Errorf("empty page: %v", err)
	}
	if got := s.Info().Documents; got != 0 {
		t.Errorf("%d documents", got)
	}
}

func TestKeysAndDocumentsAreCommittedTogether(t *testing.T) {
	s := newStore(t)
	mustApply(t, s, testKey("app/old", keyspec.Ed25519, 32))
	applyDocuments(t, s, testDocument("trust", "old"))
	commits := map[string]Commit{
		"the key":      {Changes: []Change{testKey("app/old", keyspec.Ed25519, 32)}, Documents: []DocumentChange{testDocument("trust", "new")}},
		"the document": {Changes: []Change{testKey("app/new", keyspec.Ed25519, 32)}, Documents: []DocumentChange{testDocument("trust", "old")}},
		"the second document": {
			Changes:   []Change{testKey("app/new", keyspec.Ed25519, 32)},
			Documents: []DocumentChange{testDocument("trust", "new"), testDocument("trust", "old")},
		},
	}
	for what, c := range commits {
		c.Audit = []byte("entry")
		if err := s.Apply(t.Context(), c); !errors.Is(err, ErrExists) {
			t.Fatalf("%s: %v", what, err)
		}
		_, keyErr := s.Get("app/new")
		_, documentErr := s.Document("trust", "new")
		list, err := s.Outbox(10)
		if !errors.Is(keyErr, ErrNotFound) || !errors.Is(documentErr, ErrNotFound) || err != nil || len(list) != 0 {
			t.Fatalf("half a commit, with %s: %v, %v, outbox %d %v", what, keyErr, documentErr, len(list), err)
		}
	}
	c := Commit{
		Changes: []Change{testKey("app/new", keyspec.Ed25519, 32)}, Documents: []DocumentChange{testDocument("trust", "new")},
		Audit: []byte("entry"), RequestKey: []byte("request"),
	}
	if err := s.Apply(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	var dup *DuplicateError
	if err := s.Apply(t.Context(), c); !errors.As(err, &dup) || dup.Ref.Name != "app/new" {
		t.Fatal(err)
	}
	s = reopen(t, s)
	checkKey(t, s, "app/new", 32)
	checkDocument(t, s, "trust", "new")
	if list, err := s.Outbox(10); err != nil || len(list) != 1 {
		t.Fatalf("outbox %d %v", len(list), err)
	}
}

// TestConcurrentChangesOfDocumentsAreNotLost has many goroutines count in one document, while others make and delete one, and readers
// look on.
func TestConcurrentChangesOfDocumentsAreNotLost(t *testing.T) {
	s := newStore(t)
	mustApply(t, s, testKey("app", keyspec.Ed25519, 32))
	for i := range 40 {
		applyDocuments(t, s, testDocument("clock", fmt.Sprint("other", i)))
	}
	applyDocuments(t, s, DocumentChange{Document: Document{Kind: "clock", Name: "count", Data: []byte("0")}})
	var writers, readers sync.WaitGroup
	var made, deleted atomic.Int64
	var stop atomic.Bool
	const each = 20
	for w := range 4 {
		writers.Go(func() {
			for n := 0; n < each; {
				d, err := s.Document("clock", "count")
				if err != nil {
					t.Error(err)
					return
				}
				before, _ := strconv.Atoi(string(d.Data))
				d.Data = strconv.AppendInt(nil, int64(before+1), 10)
				switch err := s.Apply(t.Context(), Commit{
					Changes:   []Change{testKey(fmt.Sprintf("app/k%d-%d", w, before), keyspec.Ed25519, 32)},
					Documents: []DocumentChange{{Document: d}}, Audit: []byte("counted"),
				}); {
				case err == nil:
					n++
				case !errors.Is(err, ErrConflict):
					t.Error(err)
					return
				}
			}
		})
		writers.Go(func() {
			for n := 0; n < each; n++ {
				d, err := s.Document("clock", "flicker")
				switch {
				case errors.Is(err, ErrNotFound):
					if err = s.Apply(t.Context(), Commit{Documents: []DocumentChange{testDocument("clock", "flicker")}}); err == nil {
						made.Add(1)
					}
				case err == nil:
					if err = s.Apply(t.Context(), Commit{Documents: []DocumentChange{deletion(d)}}); err == nil {
						deleted.Add(1)
					}
				}
				if err != nil && !errors.Is(err, ErrExists) && !errors.Is(err, ErrConflict) && !errors.Is(err, ErrNotFound) {
					t.Error(err)
				}
			}
		})
	}
	for range 2 {
		readers.Go(func() {
			for !stop.Load() {
				list, _, err := s.Documents("clock", nil, 100)
				if err != nil || len(list) < 41 || len(list) > 42 {
					t.Errorf("%d documents, %v", len(list), err)
				}
			}
		})
	}
	writers.Wait()
	stop.Store(true)
	readers.Wait()
	if d, err := s.Document("clock", "count"); err != nil || string(d.Data) != fmt.Sprint(4*each) || d.Revision != 4*each+1 {
		t.Fatalf("%q at revision %d, %v", d.Data, d.Revision, err)
	}
	want := uint64(41 + made.Load() - deleted.Load())
	if info := s.Info(); info.Documents != want || info.Keys != 4*each+1 || info.Damaged != 0 {
		t.Fatalf("%+v, want %d documents", info, want)
	}
	if made.Load() < 2 || deleted.Load() < 2 {
		t.Errorf("made %d times, deleted %d", made.Load(), deleted.Load())
	}
	report, err := s.Verify(t.Context(), nil)
	if err != nil || len(report.Damaged) > 0 {
		t.Fatalf("%+v %v", report, err)
	}
}

// What comes in between may be a deleted document of a later revision; the commit is then prepared again.
func TestDocumentTakesThePlaceOfTheOneThatWasDeletedLast(t *testing.T) {
	s := newStore(t)
	applyDocuments(t, s, testDocument("trust", "a"))
	d, _ := s.Document("trust", "a")
	applyDocuments(t, s, deletion(d))
	p, err := s.prepare(Commit{Documents: []DocumentChange{testDocument("trust", "a")}})
	if err != nil {
		t.Fatal(err)
	}
	applyDocuments(t, s, testDocument("trust", "a"))
	d, _ = s.Document("trust", "a")
	applyDocuments(t, s, deletion(d))
	if err := s.submit(&job{commit: p}); err != errStale {
		t.Fatalf("the revision would go back: %v", err)
	}
	applyDocuments(t, s, testDocument("trust", "a"))
	if d, err = s.Document("trust", "a"); err != nil || d.Revision != 5 {
		t.Fatalf("%+v %v", d, err)
	}
}

func TestDeletedDocumentIsErasedByTheNextEpoch(t *testing.T) {
	s := newStore(t)
	for i := range 20 {
		applyDocuments(t, s, testDocument("zk", fmt.Sprint(i)))
	}
	dek := func(name string) [keySize]byte {
		x, _, err := s.lookup(s.snapshot.Load(), s.documentID("zk", name).at(0))
		if err != nil {
			t.Fatal(err)
		}
		return x.dek
	}
	deleted, changed := dek("7"), dek("8")
	d, _ := s.Document("zk", "7")
	applyDocuments(t, s, deletion(d))
	found := dekCopies(t, s, deleted) > 0
	d, _ = s.Document("zk", "8")
	applyDocuments(t, s, DocumentChange{Document: d})
	if dek("7") != [keySize]byte{} || dek("8") == changed {
		t.Fatal("the data key stays")
	}
	if info := s.Info(); info.ErasurePending != 1 {
		t.Fatalf("%+v", info)
	}
	if !found || dekCopies(t, s, changed) == 0 {
		t.Fatal("the scan finds nothing even before the erasure: it cannot fail")
	}
	if err := s.RotateEpoch(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if a, b := dekCopies(t, s, deleted), dekCopies(t, s, changed); a+b > 0 {
		t.Fatalf("the data keys are still in %d and %d places", a, b)
	}
	if info := s.Info(); info.ErasurePending != 0 || info.Documents != 19 {
		t.Fatalf("%+v", info)
	}
	for i := range 20 {
		if i != 7 && i != 8 {
			checkDocument(t, s, "zk", fmt.Sprint(i))
		}
	}
}

func TestOldCopyDoesNotUndoARevocation(t *testing.T) {
	s, c := boundStore(t)
	applyDocuments(t, s, testDocument("trust", "partner"))
	before := c.now()
	applyDocuments(t, s, testDocument("clock", "now"))
	if c.now() != before {
		t.Fatal("the counter moved for a document that does not ask for it")
	}
	for _, revoke := range []func() DocumentChange{
		func() DocumentChange { return testDocument("revoked", "serial") },
		func() DocumentChange { d, _ := s.Document("trust", "partner"); return deletion(d) },
	} {
		old := copyDir(t, s.config.Dir)
		change := revoke()
		change.Bump = true
		generation := s.Info().Generation
		applyDocuments(t, s, change)
		if c.now() == before || s.Info().Generation <= generation {
			t.Fatal("nothing voids older copies")
		}
		before = c.now()
		if err := refusal(t, old, UnlockOptions{Counter: c}); !errors.Is(err, ErrRollback) {
			t.Fatalf("an old copy: %v", err)
		}
	}
	// One file put back alone is noticed without a counter.
	old := copyDir(t, s.config.Dir)
	applyDocuments(t, s, DocumentChange{Document: Document{Kind: "revoked", Name: "another"}, Bump: true})
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(old, databaseFile))
	if err != nil {
		t.Fatal(err)
	}
	dir := copyDir(t, s.config.Dir)
	if err := os.WriteFile(filepath.Join(dir, databaseFile), b, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := refusal(t, dir, UnlockOptions{Counter: c}); !errors.Is(err, ErrRollback) {
		t.Fatalf("an old database: %v", err)
	}
}

// changeDocument changes the record of a document behind the store's back; f returns what is to be there, nil for nothing.
func changeDocument(t *testing.T, s *Store, kind, name string, f func(old []byte) []byte) {
	t.Helper()
	key := s.documentID(kind, name).at(0)
	err := s.db.Update(func(tx *bolt.Tx) error {
		b := tx.Bucket(bucketDocument)
		v := f(bytes.Clone(b.Get(key[:])))
		if v == nil {
			return b.Delete(key[:])
		}
		return b.Put(key[:], v)
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestOneDamagedDocumentDoesNotStopTheOthers(t *testing.T) {
	s := newStore(t)
	mustApply(t, s, testKey("app/k", keyspec.Ed25519, 32))
	const count = 200
	for i := range count {
		applyDocuments(t, s, testDocument("trust", fmt.Sprint(i)))
	}
	other := newStore(t)
	applyDocuments(t, other, testDocument("trust", "3"))
	stranger, _ := other.fetch(bucketDocument, func() []byte { k := other.documentID("trust", "3").at(0); return k[:] }())
	neighbour, _ := s.fetch(bucketDocument, func() []byte { k := s.documentID("trust", "4").at(0); return k[:] }())
	d, _ := s.Document("trust", "3")
	var before []byte
	changeDocument(t, s, "trust", "3", func(old []byte) []byte { before = old; return old })
	applyDocuments(t, s, DocumentChange{Document: d})
	var good []byte
	for what, f := range map[string]func(old []byte) []byte{
		"altered":             func(old []byte) []byte { old[100] ^= 1; return old },
		"taken away":          func(old []byte) []byte { return nil },
		"put back":            func([]byte) []byte { return before },
		"exchanged":           func([]byte) []byte { return neighbour },
		"of another store":    func([]byte) []byte { return stranger },
		"of another kind":     func(old []byte) []byte { old[1] = byte(kindMetadata); return old },
		"of another revision": func(old []byte) []byte { old[23]++; return old },
		"shortened":           func(old []byte) []byte { return old[:len(old)-1024] },
		"empty":               func(old []byte) []byte { return []byte{} },
	} {
		changeDocument(t, s, "trust", "3", func(old []byte) []byte { good = bytes.Clone(old); return f(old) })
		counted := s.Info().Damaged
		if _, err := s.Document("trust", "3"); !errors.Is(err, ErrDamaged) {
			t.Fatalf("%s: %v", what, err)
		}
		list, next, err := s.Documents("trust", nil, 1000)
		if !errors.Is(err, ErrDamaged) || len(list) != count-1 || next != nil {
			t.Fatalf("%s: a page of %d, %v", what, len(list), err)
		}
		if s.Info().Damaged <= counted {
			t.Errorf("%s: the damage is not counted", what)
		}
		report, err := s.Verify(t.Context(), nil)
		if err != nil || len(report.Damaged) != 1 || report.Documents != count || report.Keys != 1 {
			t.Fatalf("%s: %+v %v", what, report, err)
		}
		for i := range count {
			if i != 3 {
				checkDocument(t, s, "trust", fmt.Sprint(i))
			}
		}
		changeDocument(t, s, "trust", "3", func([]byte) []byte { return good })
	}
	changeDocument(t, s, "trust", "3", func([]byte) []byte { return nil })
	checkKey(t, s, "app/k", 32)
	if err := s.RotateEpoch(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	applyDocuments(t, s, testDocument("trust", "new"))
	// Writing it again mends it, for which the revision is told.
	damaged, err := s.Document("trust", "3")
	if !errors.Is(err, ErrDamaged) {
		t.Fatal(err)
	}
	d.Revision = damaged.Revision
	applyDocuments(t, s, DocumentChange{Document: d})
	if list, _, err := s.Documents("trust", nil, 1000); err != nil || len(list) != count+1 {
		t.Fatalf("%d documents, %v", len(list), err)
	}
	// A deleted document does not come back with its record.
	d, _ = s.Document("trust", "4")
	applyDocuments(t, s, deletion(d))
	changeDocument(t, s, "trust", "4", func([]byte) []byte { return neighbour })
	if _, err := s.Document("trust", "4"); !errors.Is(err, ErrNotFound) {
		t.Fatal(err)
	}
	report, err := s.Verify(t.Context(), nil)
	if err != nil || len(report.Damaged) != 0 || report.Orphans != 1 {
		t.Fatalf("%+v %v", report, err)
	}
}

// A leaf of the key table that cannot be read takes the documents in it away, and says so to who asks for their kind.
func TestDamagedLeafIsToldToWhoLists(t *testing.T) {
	s := newStore(t)
	for i := range 200 {
		applyDocuments(t, s, testDocument("revoked", fmt.Sprint(i)), testDocument("trust", fmt.Sprint(i)))
	}
	h := s.snapshot.Load()
	lists := func(kind string) (int, error) {
		list, _, err := s.Documents(kind, nil, 1000)
		return len(list), err
	}
	seen := map[bool]int{}
	var leaves []child
	s.leaves(h, recordKey{}, func(c child) bool { leaves = append(leaves, c); return true }, func(recordKey, error) {})
	for _, c := range leaves {
		var good []byte
		update := func(f func(v []byte)) {
			err := s.db.Update(func(tx *bolt.Tx) error {
				v := bytes.Clone(tx.Bucket(bucketTable).Get(nodeID(c.id)))
				f(v)
				return tx.Bucket(bucketTable).Put(nodeID(c.id), v)
			})
			if err != nil {
				t.Fatal(err)
			}
		}
		update(func(v []byte) { good = bytes.Clone(v); v[40] ^= 1 })
		s.cache = newNodeCache()
		missing := 0
		for _, kind := range []string{"revoked", "trust"} {
			n, err := lists(kind)
			if n < 200 && !errors.Is(err, ErrDamaged) {
				t.Fatalf("%d documents, %v", n, err)
			}
			missing += 200 - n
			seen[err == nil]++
		}
		if missing == 0 {
			t.Fatal("the leaf held nothing")
		}
		update(func(v []byte) { copy(v, good) })
	}
	if seen[true] == 0 || seen[false] == 0 {
		t.Errorf("with and without damage: %v", seen)
	}
}

func TestDocumentsAreInBackupsAndSurviveMaintenance(t *testing.T) {
	ctx := context.Background()
	s := newStore(t)
	mustApply(t, s, testKey("app", keyspec.RSA2048, 256))
	for i := range 50 {
		applyDocuments(t, s, testDocument("trust", fmt.Sprint(i)))
	}
	d, _ := s.Document("trust", "7")
	applyDocuments(t, s, deletion(d))
	check := func(s *Store) {
		t.Helper()
		if all := allDocuments(t, s, "trust", 20); len(all) != 49 || s.Info().Documents != 49 {
			t.Fatalf("%d documents, %d counted", len(all), s.Info().Documents)
		}
		for i := range 50 {
			if i != 7 {
				checkDocument(t, s, "trust", fmt.Sprint(i))
			}
		}
		report, err := s.Verify(ctx, nil)
		if err != nil || len(report.Damaged) > 0 || report.Documents != 49 {
			t.Fatalf("%+v %v", report, err)
		}
	}
	id := testIdentity(t)
	blob, _ := testBackup(t, s, id)
	if _, err := VerifyBackup(ctx, bytes.NewReader(blob), []age.Identity{id}, t.TempDir()); err != nil {
		t.Fatal(err)
	}
	restored, _, err := Restore(ctx, bytes.NewReader(blob), []age.Identity{id}, testConfig(t, testDir(t)), []NewSlot{testSlot(1)})
	if err != nil {
		t.Fatal(err)
	}
	defer restored.Close()
	check(restored)
	for what, f := range map[string]func() error{
		"compaction": func() error { return s.Compact(ctx) },
		"root":       func() error { return s.RotateRoot(ctx) },
		"epoch":      func() error { return s.RotateEpoch(ctx, nil) },
	} {
		if err := f(); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		check(s)
	}
	s = reopen(t, s)
	check(s)
	// A backup with a damaged document does not pass.
	changeDocument(t, s, "trust", "8", func(old []byte) []byte { old[60] ^= 1; return old })
	blob, _ = testBackup(t, s, id)
	if _, err := VerifyBackup(ctx, bytes.NewReader(blob), []age.Identity{id}, t.TempDir()); !errors.Is(err, ErrBackup) {
		t.Fatal(err)
	}
}

func TestDocumentsShowOnlyTheirSizeInSteps(t *testing.T) {
	s := newStore(t)
	canaries := []string{"canarykind", "canaryname", "canarydata"}
	applyDocuments(t, s, DocumentChange{Document: Document{Kind: "canarykind", Name: "canaryname", Data: []byte("canarydata")}})
	d, err := s.Document("canarykind", "canaryname")
	if err != nil {
		t.Fatal(err)
	}
	applyDocuments(t, s, deletion(d))
	for i, size := range []int{0, 900, 1100, 60000} {
		applyDocuments(t, s, DocumentChange{Document: Document{Kind: "size", Name: fmt.Sprint(i), Data: make([]byte, size)}})
	}
	if got, want := valueSizes(t, s, bucketDocument), (map[int]int{1024: 2, 2048: 1, 60416: 1}); !maps.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	b, err := os.ReadFile(filepath.Join(s.config.Dir, databaseFile))
	if err != nil {
		t.Fatal(err)
	}
	for _, canary := range canaries {
		if bytes.Contains(b, []byte(canary)) {
			t.Errorf("%s is on the disk", canary)
		}
	}
	one, two := s.documentID("one", "a"), s.documentID("two", "a")
	if bytes.Equal(one[:8], two[:8]) || bytes.Equal(one[8:], two[8:]) || s.recordID("one/a") == one {
		t.Error("the ids have a part in common")
	}
}

func TestPagesOfDocumentsAreBounded(t *testing.T) {
	s := newStore(t)
	for i := range 100 {
		applyDocuments(t, s, DocumentChange{Document: Document{Kind: "large", Name: fmt.Sprint(i), Data: make([]byte, MaxDocument)}})
	}
	list, next, err := s.Documents("large", nil, 1000)
	if err != nil || next == nil || len(list) != documentPage/MaxDocument+1 {
		t.Fatalf("%d documents, %v", len(list), err)
	}
	if all := allDocuments(t, s, "large", 1000); len(all) != 100 {
		t.Fatalf("%d documents", len(all))
	}
}
