package keystore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// acceptable reports whether err is one of the errors that damage may lead to.
func acceptable(err error) bool {
	for _, target := range []error{ErrDamaged, ErrRollback, ErrNewer, ErrSecret, ErrNoSlot, ErrStorage} {
		if errors.Is(err, target) {
			return true
		}
	}
	return false
}

func TestBitFlipsNeverGiveAWrongAnswer(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	const keys = 150
	mustApply(t, s, testKey("app0", keyspec.Ed25519, 32), guardedKey("app1", fixedGuard()))
	for i := range keys {
		mustApply(t, s, testKey(fmt.Sprintf("app%d/k%d", i%2, i), keyspec.Ed25519, 32))
	}
	for i := range flippedDocuments {
		applyDocuments(t, s, testDocument("trust", fmt.Sprint(i)))
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	dir := s.config.Dir
	config := testConfig(t, dir)
	var original [2][]byte
	paths := [2]string{filepath.Join(dir, databaseFile), filepath.Join(dir, headerFile)}
	for i, path := range paths {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		original[i] = b
	}
	// The end of the file was never used.
	used := [2]int{len(bytes.TrimRight(original[0], "\x00")), len(original[1])}
	rnd := rand.New(rand.NewPCG(3, 4))
	flips := scaled(10_000, 200)
	refused, damaged, harmless := 0, 0, 0
	for i := range flips {
		which := 0
		if i%20 == 0 {
			which = 1
		}
		bit := rnd.IntN(used[which] * 8)
		writeAt(t, paths[which], []byte{original[which][bit/8] ^ 1<<(bit%8)}, int64(bit/8))
		outcome := examineDamaged(t, config, keys, rnd)
		switch {
		case outcome == nil:
			harmless++
		case errors.Is(outcome, errUsable):
			damaged++
		default:
			refused++
		}
		writeAt(t, paths[which], original[which][bit/8:bit/8+1], int64(bit/8))
	}
	t.Logf("%d flips: %d harmless, %d damaged some keys, %d refused", flips, harmless, damaged, refused)
	if harmless == 0 || damaged == 0 || refused == 0 {
		t.Error("the flips did not reach every part of the files")
	}
	if _, err := os.Stat(filepath.Join(dir, dirtyFile)); err == nil {
		t.Error("something was written")
	}
}

// TestDamagedMetaPageIsNoticed: bbolt goes back to the state before the last commit when the page that describes the newest one is
// damaged. After an orderly stop that must not pass for the truth; after a power failure it is what bbolt is for.
func TestDamagedMetaPageIsNoticed(t *testing.T) {
	for meta := range int64(2) {
		s := newStore(t)
		mustApply(t, s, testKey("app/first", keyspec.Ed25519, 32))
		mustApply(t, s, testKey("app/last", keyspec.Ed25519, 32))
		config := s.config
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(config.Dir, databaseFile)
		page, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		at := meta*int64(os.Getpagesize()) + pageHeaderSize + 48 // the transaction number
		writeAt(t, path, []byte{page[at] ^ 1}, at)
		if _, err := Open(t.Context(), config); !errors.Is(err, ErrDamaged) {
			t.Errorf("meta page %d: %v", meta, err)
		}
		if err := os.WriteFile(filepath.Join(config.Dir, dirtyFile), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		s, err = Open(t.Context(), config)
		if err != nil {
			t.Fatalf("meta page %d, as after a power failure: %v", meta, err)
		}
		s.Close()
	}
}

var errUsable = errors.New("some keys are damaged")

const flippedDocuments = 40 // beside the keys

// examineDamaged opens a store of whose files something was changed, and asks for keys. Whatever happens must be an answer that
// was stored, or a proper error.
func examineDamaged(t *testing.T, config Config, keys int, rnd *rand.Rand) error {
	t.Helper()
	s, err := Open(context.Background(), config)
	if err == nil {
		defer s.Close()
		err = s.Unlock(context.Background(), 1, testSecret(1))
	}
	if err != nil {
		if !acceptable(err) {
			t.Fatalf("opening: %v", err)
		}
		return err
	}
	var outcome error
	if err := s.OpenNamespace("app1", fixedGuard().Key); err != nil {
		if !acceptable(err) {
			t.Fatalf("opening the namespace: %v", err)
		}
		outcome = errUsable
	}
	ask := func(i int) {
		name := fmt.Sprintf("app%d/k%d", i%2, i)
		if err := keyError(s, name, 32); err != nil {
			if !acceptable(err) && !(errors.Is(err, ErrNamespaceClosed) && outcome != nil) {
				t.Fatalf("%s: %v", name, err)
			}
			outcome = errUsable
		}
	}
	name := fmt.Sprint(rnd.IntN(flippedDocuments))
	if err := documentError(s, "trust", name); err != nil {
		if !acceptable(err) {
			t.Fatalf("document %s: %v", name, err)
		}
		outcome = errUsable
	}
	if rnd.IntN(10) == 0 {
		for i := range keys {
			ask(i)
		}
		documents, _, err := s.Documents("trust", nil, flippedDocuments)
		if err != nil && !acceptable(err) || err == nil && len(documents) != flippedDocuments {
			t.Fatalf("%d documents, %v", len(documents), err)
		}
		for _, d := range documents {
			if !bytes.Equal(d.Data, testData("trust", d.Name, 0)) {
				t.Fatalf("%v: %s", errWrongAnswer, d.label())
			}
		}
		list, _, err := s.Page("", "", nil, keys+10)
		if err != nil && !acceptable(err) {
			t.Fatalf("listing: %v", err)
		}
		if err == nil && len(list) != keys+2 && s.Info().Damaged == 0 {
			t.Fatalf("a list of %d keys, and no sign of damage", len(list))
		}
		report, err := s.Verify(context.Background(), nil)
		if err != nil && !acceptable(err) {
			t.Fatalf("verification: %v", err)
		}
		if err == nil && outcome != nil && len(report.Damaged) == 0 {
			t.Fatal("the verification found nothing")
		}
		if err == nil && len(report.Damaged) > 0 {
			outcome = errUsable
		}
		return outcome
	}
	for range 12 {
		ask(rnd.IntN(keys))
	}
	return outcome
}

func writeAt(t *testing.T, path string, b []byte, off int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(b, off); err != nil {
		t.Fatal(err)
	}
}

// TestExchangedRecordsAreNoticed does what someone can do who may write the database but has no key: exchange values, put old ones
// back, take them from another store, or take them away.
func TestExchangedRecordsAreNoticed(t *testing.T) {
	s := newStore(t)
	const keys = 100
	for i := range keys {
		mustApply(t, s, testKey(fmt.Sprintf("app%d/k%d", i%2, i), keyspec.Ed25519, 32))
		applyDocuments(t, s, testDocument(fmt.Sprint("kind", i%2), fmt.Sprint(i)))
	}
	// Older values of everything, from before every key was changed.
	type value struct{ bucket, key, old []byte }
	var values []value
	collect := func() {
		values = nil
		err := s.db.View(func(tx *bolt.Tx) error {
			for _, bucket := range [][]byte{bucketMeta, bucketMaterial, bucketPublic, bucketDocument, bucketTable, bucketAlias} {
				err := tx.Bucket(bucket).ForEach(func(k, v []byte) error {
					values = append(values, value{bucket, bytes.Clone(k), bytes.Clone(v)})
					return nil
				})
				if err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	collect()
	old := values
	for i := range keys {
		rotate(t, s, fmt.Sprintf("app%d/k%d", i%2, i), 32)
		d, err := s.Document(fmt.Sprint("kind", i%2), fmt.Sprint(i))
		if err != nil {
			t.Fatal(err)
		}
		d.Data = testData(d.Kind, d.Name, 1)
		applyDocuments(t, s, DocumentChange{Document: d})
	}
	collect()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	dir := s.config.Dir
	config := testConfig(t, dir)
	path := filepath.Join(dir, databaseFile)
	update := func(f func(tx *bolt.Tx) error) {
		t.Helper()
		db, err := bolt.Open(path, 0o600, &bolt.Options{Timeout: time.Second, NoSync: true})
		if err != nil {
			t.Fatal(err)
		}
		defer db.Close()
		if err := db.Update(f); err != nil {
			t.Fatal(err)
		}
	}
	rnd := rand.New(rand.NewPCG(5, 6))
	noticed := 0
	tries := scaled(600, 40)
	for i := range tries {
		v := values[rnd.IntN(len(values))]
		if bytes.Equal(v.bucket, bucketAlias) && i%4 == 0 {
			continue // an alias that is taken away is found by Verify only, see below
		}
		replacement := []byte(nil)
		switch i % 4 {
		case 1: // another record's value
			for w := values[rnd.IntN(len(values))]; replacement == nil; w = values[rnd.IntN(len(values))] {
				if bytes.Equal(v.bucket, w.bucket) && !bytes.Equal(v.key, w.key) {
					replacement = w.old
				}
			}
		case 2, 3: // its own older value
			for _, w := range old {
				if bytes.Equal(v.bucket, w.bucket) && bytes.Equal(v.key, w.key) {
					replacement = w.old
				}
			}
			if replacement == nil || bytes.Equal(replacement, v.old) {
				continue
			}
		}
		update(func(tx *bolt.Tx) error {
			if replacement == nil {
				return tx.Bucket(v.bucket).Delete(v.key)
			}
			return tx.Bucket(v.bucket).Put(v.key, replacement)
		})
		s, err := Open(context.Background(), config)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Unlock(context.Background(), 1, testSecret(1)); err != nil {
			t.Fatal(err)
		}
		usable, bad := 0, 0
		for i := range keys {
			name := fmt.Sprintf("app%d/k%d", i%2, i)
			err := keyError(s, name, 32)
			if k, e := s.Get(keyspec.Name(name)); err == nil && e == nil && k.Current != 2 {
				t.Fatalf("%s is as it was before", name)
			}
			switch {
			case err == nil:
				usable++
			case errors.Is(err, ErrDamaged):
				bad++
			default:
				t.Fatalf("%s: %v", name, err)
			}
			d, err := s.Document(fmt.Sprint("kind", i%2), fmt.Sprint(i))
			switch {
			case err == nil && (d.Revision != 2 || !bytes.Equal(d.Data, testData(d.Kind, fmt.Sprint(i), 1))):
				t.Fatalf("document %d is as it was before, or another", i)
			case err == nil:
				usable++
			case errors.Is(err, ErrDamaged):
				bad++
			default:
				t.Fatalf("document %d: %v", i, err)
			}
		}
		report, err := s.Verify(context.Background(), nil)
		if err != nil {
			t.Fatal(err)
		}
		if bad == 0 && !bytes.Equal(v.bucket, bucketAlias) {
			t.Fatalf("a value of bucket %s was replaced and nobody noticed", v.bucket)
		}
		if len(report.Damaged) > 0 {
			noticed++
		} else if bad > 0 {
			t.Fatalf("verification did not notice a changed %s", v.bucket)
		}
		if usable == 0 && !bytes.Equal(v.bucket, bucketTable) {
			t.Fatalf("a changed %s took every key away", v.bucket)
		}
		s.Close()
		update(func(tx *bolt.Tx) error { return tx.Bucket(v.bucket).Put(v.key, v.old) })
	}
	if noticed < tries/4 {
		t.Errorf("only %d of %d changes were made", noticed, tries)
	}
}

func TestVerifyFindsAMissingAlias(t *testing.T) {
	s := newStore(t)
	c := testKey("app/k", keyspec.Ed25519, 32)
	c.Aliases = []Alias{{AliasSSH, []byte("fingerprint"), 1}}
	mustApply(t, s, c)
	for gone := 1; gone <= 3; gone++ {
		err := s.db.Update(func(tx *bolt.Tx) error {
			k, _ := tx.Bucket(bucketAlias).Cursor().First()
			return tx.Bucket(bucketAlias).Delete(k)
		})
		if err != nil {
			t.Fatal(err)
		}
		report, err := s.Verify(context.Background(), nil)
		if err != nil || len(report.Damaged) != gone || report.Damaged[0].Ref.Name != "app/k" {
			t.Fatalf("%+v %v", report, err)
		}
	}
}

func TestOneDamagedRecordDoesNotStopTheOthers(t *testing.T) {
	s := newStore(t)
	for i := range 200 {
		mustApply(t, s, testKey(fmt.Sprintf("app/k%d", i), keyspec.Ed25519, 32))
	}
	key := makeRecordID(s.secrets.index.Bytes(), "app/k3").at(0)
	err := s.db.Update(func(tx *bolt.Tx) error {
		b := tx.Bucket(bucketMeta)
		v := bytes.Clone(b.Get(key[:]))
		v[100] ^= 1
		return b.Put(key[:], v)
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Get("app/k3"); !errors.Is(err, ErrDamaged) {
		t.Fatalf("damaged key: %v", err)
	}
	for i := range 200 {
		if i != 3 {
			checkKey(t, s, fmt.Sprintf("app/k%d", i), 32)
		}
	}
	mustApply(t, s, testKey("app/new", keyspec.Ed25519, 32))
	keys, _, err := s.Page("app", "app/", nil, 1000)
	if err != nil || len(keys) != 200 {
		t.Fatalf("%d keys, %v", len(keys), err)
	}
	if s.Info().Damaged == 0 {
		t.Error("the damage is not counted")
	}
	report, err := s.Verify(context.Background(), nil)
	if err != nil || len(report.Damaged) == 0 || report.Keys != 201 {
		t.Fatalf("%+v %v", report, err)
	}
	if err := s.RotateEpoch(context.Background(), nil); err != nil {
		t.Fatal(err)
	}
	checkKey(t, s, "app/k4", 32)
}

func TestUnknownCriticalExtensionRefusesTheRecord(t *testing.T) {
	c := recordContext{kind: kindMetadata, revision: 1}
	dek := make([]byte, keySize)
	blob := sealRecord(dek, c, []byte("payload"))
	if _, err := openRecord(dek, c, blob); err != nil {
		t.Fatal(err)
	}
	// A later release puts an extension between header and nonce. The payload is sealed with it.
	with := func(kind uint16) []byte {
		e := &encoder{}
		e.u16(kind)
		e.bytes16([]byte{1, 2, 3})
		head := bytes.Clone(blob[:recordHeader])
		head[6], head[7] = 0, byte(len(e.b))
		head = append(head, e.b...)
		plain := make([]byte, 64)
		plain[3] = 7
		copy(plain[4:], "payload")
		return newGCM(dek).Seal(head, nil, plain, c.aad(head))
	}
	if got, err := openRecord(dek, c, with(1)); err != nil || string(got) != "payload" {
		t.Fatalf("an extension that is not critical: %q %v", got, err)
	}
	if _, err := openRecord(dek, c, with(criticalExtension|1)); !errors.Is(err, ErrNewer) {
		t.Fatalf("a critical extension: %v", err)
	}
}
