package keystore

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"

	bolt "go.etcd.io/bbolt"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// valueSizes counts the records in a bucket by size.
func valueSizes(t *testing.T, s *Store, bucket []byte) map[int]int {
	t.Helper()
	sizes := map[int]int{}
	err := s.db.View(func(tx *bolt.Tx) error {
		return tx.Bucket(bucket).ForEach(func(_, v []byte) error { sizes[len(v)]++; return nil })
	})
	if err != nil {
		t.Fatal(err)
	}
	return sizes
}

func TestSizesDoNotTellTheAlgorithm(t *testing.T) {
	fill := func(algorithm keyspec.Algorithm, size int, symmetric bool) *Store {
		s := newStore(t)
		for i := range 50 {
			c := testKey(fmt.Sprintf("app/k%d", i), algorithm, size)
			if symmetric {
				c.Public = nil
			}
			mustApply(t, s, c)
		}
		return s
	}
	want := fill(keyspec.Ed25519, 32, false)
	for _, other := range []*Store{fill(keyspec.RSA4096, 512, false), fill(keyspec.AES128GCM, 16, true)} {
		a, err := os.Stat(filepath.Join(want.config.Dir, databaseFile))
		if err != nil {
			t.Fatal(err)
		}
		b, err := os.Stat(filepath.Join(other.config.Dir, databaseFile))
		if err != nil {
			t.Fatal(err)
		}
		if a.Size() != b.Size() {
			t.Errorf("files of %d and %d bytes", a.Size(), b.Size())
		}
		for _, bucket := range [][]byte{bucketMeta, bucketMaterial, bucketPublic} {
			if x, y := valueSizes(t, want, bucket), valueSizes(t, other, bucket); fmt.Sprint(x) != fmt.Sprint(y) {
				t.Errorf("records in %s: %v and %v", bucket, x, y)
			}
		}
	}
	if sizes := valueSizes(t, want, bucketMaterial); len(sizes) != 1 || sizes[640] != 50 {
		t.Errorf("material: %v", sizes)
	}
}

// A resident key shows as one, and how long its blob is in steps of 1 KiB; that is all.
func TestMaterialOfResidentKeysIsPadded(t *testing.T) {
	s := newStore(t)
	for i, size := range []int{KeyMaterial, smallRecord - recordOverhead, smallRecord - recordOverhead + 1, 900, 2000, MaxMaterial} {
		name := fmt.Sprintf("app/k%d", i)
		mustApply(t, s, testKey(name, keyspec.ECDSAP256, size))
		checkKey(t, s, name, size)
	}
	if got, want := valueSizes(t, s, bucketMaterial), (map[int]int{640: 2, 1024: 2, 3072: 1, 10240: 1}); !maps.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

func TestReadingDoesNotChangeTheFiles(t *testing.T) {
	s := newStore(t)
	for i := range 20 {
		mustApply(t, s, testKey(fmt.Sprintf("app/k%d", i), keyspec.Ed25519, 32))
	}
	s = reopen(t, s)
	sum := func() string {
		h := sha256.New()
		entries, err := os.ReadDir(s.config.Dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			b, err := os.ReadFile(filepath.Join(s.config.Dir, e.Name()))
			if err != nil {
				t.Fatal(err)
			}
			info, _ := e.Info()
			fmt.Fprintf(h, "%s %d %v\n", e.Name(), len(b), info.ModTime())
			h.Write(b)
		}
		return fmt.Sprintf("%x", h.Sum(nil))
	}
	before := sum()
	for i := range 1000 {
		checkKey(t, s, fmt.Sprintf("app/k%d", i*i%20), 32) // some are asked for more often than others
	}
	if _, _, err := s.Page("", "", nil, 100); err != nil {
		t.Fatal(err)
	}
	if sum() != before {
		t.Fatal("reading changed the files")
	}
	s = reopen(t, s)
	if sum() != before {
		t.Fatal("closing, opening and unlocking changed the files")
	}
}

func TestOrderOfCreationIsInvisible(t *testing.T) {
	s := newStore(t)
	const keys = 200
	for i := range keys {
		mustApply(t, s, testKey(fmt.Sprintf("app/k%d", i), keyspec.Ed25519, 32))
	}
	for _, bucket := range [][]byte{bucketMeta, bucketMaterial, bucketPublic, bucketAlias} {
		place := map[string]int{}
		err := s.db.View(func(tx *bolt.Tx) error {
			return tx.Bucket(bucket).ForEach(func(k, _ []byte) error { place[string(k)] = len(place); return nil })
		})
		if err != nil {
			t.Fatal(err)
		}
		// The rank correlation between age and place of unrelated orders is within 4/sqrt(n) of zero but for 1 in 15,000 stores.
		var n, sum float64
		for i := range keys {
			id := makeRecordID(s.secrets.index.Bytes(), keyspec.Name(fmt.Sprintf("app/k%d", i)))
			key := id.at(0)
			if !bytes.Equal(bucket, bucketMeta) {
				key = id.at(1)
			}
			k := key[:]
			if bytes.Equal(bucket, bucketAlias) {
				spki := sha256.Sum256(testPublic(fmt.Sprintf("app/k%d", i), 1).SPKI)
				alias := s.aliasKey(AliasSPKI, spki[:])
				k = alias[:]
			}
			at, ok := place[string(k)]
			if !ok {
				t.Fatalf("key %d is not in %s", i, bucket)
			}
			d := float64(i) - float64(at)*keys/float64(len(place))
			sum += d * d
			n++
		}
		rho := 1 - 6*sum/(n*(n*n-1))
		if rho > 0.29 || rho < -0.29 {
			t.Errorf("%s: rank correlation %.2f", bucket, rho)
		}
	}
}

func TestNothingReadableIsOnTheDisk(t *testing.T) {
	s := newStore(t)
	canaries := []string{"canaryapp", "canaryref", "canarylabelkey", "canarylabelvalue", "canaryprofile", "canarybridge", "canaryspki", "canarycert", "canarymaterial", "canaryaudit", "canaryrequest", "canaryalias", string(keyspec.Ed25519)}
	c := testKey("canaryapp/canaryref", keyspec.Ed25519, 32)
	c.Key.Labels = map[string]string{"canarylabelkey": "canarylabelvalue"}
	c.Key.Profile, c.Key.UsableVia = "canaryprofile", []string{"canarybridge"}
	c.Material[1] = []byte("canarymaterial")
	c.Public[1] = Public{SPKI: []byte("canaryspki"), Chain: [][]byte{[]byte("canarycert")}}
	c.Aliases = []Alias{{AliasCKAID, []byte("canaryalias"), 1}}
	module := testKey("canaryapp", keyspec.RSA2048, 256)
	for _, changes := range [][]Change{{module}, {c}} {
		commit := Commit{Changes: changes, Audit: []byte("canaryaudit"), RequestKey: []byte("canaryrequest" + string(changes[0].Key.Name))}
		if err := s.Apply(t.Context(), commit); err != nil {
			t.Fatal(err)
		}
	}
	k, err := s.Get("canaryapp/canaryref")
	if err != nil {
		t.Fatal(err)
	}
	k.Labels["canarylabelkey"] = "other"
	mustApply(t, s, Change{Key: k})
	destroy(t, s, "canaryapp/canaryref", 1)
	entries, err := os.ReadDir(s.config.Dir)
	if err != nil {
		t.Fatal(err)
	}
	seen := 0
	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join(s.config.Dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		seen += len(b)
		for _, canary := range canaries {
			if bytes.Contains(b, []byte(canary)) {
				t.Errorf("%s is in %s", canary, e.Name())
			}
		}
	}
	if seen < 32<<10 {
		t.Fatalf("only %d bytes on disk", seen)
	}
}

func TestSameKeyInTwoNamespacesIsUnlinkable(t *testing.T) {
	s := newStore(t)
	a, b := testKey("one/k", keyspec.Ed25519, 32), testKey("two/k", keyspec.Ed25519, 32)
	b.Material, b.Public = a.Material, nil
	mustApply(t, s, a, b)
	index := s.secrets.index.Bytes()
	x, y := makeRecordID(index, "one/k"), makeRecordID(index, "two/k")
	if slices.Equal(x[:8], y[:8]) || slices.Equal(x[8:], y[8:]) {
		t.Error("the ids have a part in common")
	}
	kx, ky := x.at(1), y.at(1)
	bx, err := s.fetch(bucketMaterial, kx[:])
	if err != nil {
		t.Fatal(err)
	}
	by, err := s.fetch(bucketMaterial, ky[:])
	if err != nil {
		t.Fatal(err)
	}
	for i := recordHeader; i+16 <= len(bx); i++ {
		if bytes.Contains(by, bx[i:i+16]) {
			t.Fatal("the records have a part in common")
		}
	}
}
