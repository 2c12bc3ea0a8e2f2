package keystore

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"os"
	"path/filepath"
	"testing"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// What a decoder accepts has to be what the encoder would have written, and what it refuses is damaged, or newer.

func decodeError(t *testing.T, err error) {
	t.Helper()
	if !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrNewer) && !errors.Is(err, ErrBackup) {
		t.Fatalf("not an error of a decoder: %v", err)
	}
}

func FuzzHeader(f *testing.F) {
	b, err := os.ReadFile(filepath.Join(goldenDir(1), headerFile))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b[:len(b)-sha256.Size])
	f.Add(b[:100])
	root := make([]byte, keySize)
	f.Fuzz(func(t *testing.T, body []byte) {
		sum := sha256.Sum256(body) // or no change would get past it
		b := append(bytes.Clone(body), sum[:]...)
		h, err := decodeHeader(b)
		if err != nil {
			decodeError(t, err)
			return
		}
		again := h.encode(root)
		if !bytes.Equal(again[:len(again)-64], b[:len(b)-64]) {
			t.Fatal("encoding is not the inverse of decoding")
		}
		if err := h.verify(b, root); err == nil {
			t.Fatal("a forged header verifies")
		}
	})
}

func FuzzRecord(f *testing.F) {
	dek := make([]byte, keySize)
	c := recordContext{kind: kindMaterial, revision: 3}
	f.Add(sealRecord(dek, c, []byte("payload")))
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, err := openRecord(dek, c, b); err != nil {
			decodeError(t, err)
		}
	})
}

func FuzzMetadata(f *testing.F) {
	c := testKey("app/k", keyspec.Ed25519, 32)
	f.Add((&metadata{Key: *c.Key, wrapping: 2, escrow: keyspec.EscrowNone}).encode())
	c.Key.Limited, c.Key.UsesLeft = true, 3
	c.Key.Versions[0].aliases, c.Key.Versions[0].thumbprints = [][32]byte{{1}, {2}}, [][32]byte{{3}}
	f.Add((&metadata{Key: *c.Key}).encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := decodeMetadata(b)
		if err != nil {
			decodeError(t, err)
			return
		}
		again, err := decodeMetadata(m.encode())
		if err != nil || !bytes.Equal(again.encode(), m.encode()) {
			t.Fatalf("encoding is not stable: %v", err)
		}
	})
}

func FuzzWrappedKey(f *testing.F) {
	f.Add((&wrappedKey{check: [32]byte{1}, blob: []byte("blob"), escrow: []byte("age")}).encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		g, err := decodeWrappedKey(b)
		if err != nil {
			decodeError(t, err)
			return
		}
		if !bytes.Equal(g.encode(), b) {
			t.Fatal("encoding is not the inverse of decoding")
		}
	})
}

func FuzzPublic(f *testing.F) {
	p := testPublic("app/k", 1)
	f.Add(p.encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := decodePublic(b)
		if err != nil {
			decodeError(t, err)
			return
		}
		if !bytes.Equal(p.encode(), b) {
			t.Fatal("encoding is not the inverse of decoding")
		}
	})
}

func FuzzNode(f *testing.F) {
	key := make([]byte, keySize)
	leaf := &node{id: 7, entries: []entry{{key: recordKey{1}, revision: 1}, {key: recordKey{2}, revision: 2}}}
	f.Add(encodeLeaf([16]byte{}, leaf, key))
	inner := &node{id: 7, level: 1, children: []child{{first: recordKey{1}, nodeRef: nodeRef{id: 2}}, {first: recordKey{2}, nodeRef: nodeRef{id: 3}}}}
	f.Add(encodeInterior(inner))
	f.Fuzz(func(t *testing.T, b []byte) {
		if n, err := decodeInterior(7, 1, b); err != nil {
			decodeError(t, err)
		} else if got := encodeInterior(n); !bytes.Equal(got[nodeHeader:], b[nodeHeader:]) {
			t.Fatal("encoding is not the inverse of decoding")
		}
		if plain, err := openLeaf(nil, [16]byte{}, 7, b, key); err != nil {
			decodeError(t, err)
		} else if _, err := decodeEntries(plain); err != nil {
			decodeError(t, err)
		}
		// What is inside a leaf is authenticated, but its decoder does not rely on that.
		if entries, err := decodeEntries(b); err == nil {
			for i := range entries {
				if x, ok := findEntry(b, entries[i].key); !ok || x != entries[i] {
					t.Fatal("an entry is not found")
				}
			}
		}
	})
}

func FuzzHead(f *testing.F) {
	f.Add((&head{sequence: 1, epoch: 1, outboxNext: 1}).encode([16]byte{}, make([]byte, keySize)))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := decodeHead(b)
		if err != nil {
			decodeError(t, err)
			return
		}
		if again := h.encode([16]byte{}, make([]byte, keySize)); !bytes.Equal(again[:len(again)-32], b[:len(b)-32]) {
			t.Fatal("encoding is not the inverse of decoding")
		}
	})
}

func FuzzManifest(f *testing.F) {
	m := Manifest{Created: testTime, Escrow: []string{"a"}, AuditHead: []byte("h"), Guarded: []GuardedNamespace{{Name: "a", Escrow: keyspec.EscrowNone}}}
	f.Add(m.encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := decodeManifest(b)
		if err != nil {
			decodeError(t, err)
			return
		}
		if _, err := decodeManifest(m.encode()); err != nil {
			t.Fatalf("encoding is not stable: %v", err)
		}
	})
}

// FuzzPages examines databases in which arbitrary bytes were changed, with the checksums of the meta pages put right.
func FuzzPages(f *testing.F) {
	s := newStore(f)
	for i := range 5 {
		mustApply(f, s, testKey(fmt.Sprint("app/k", i), keyspec.Ed25519, 32))
	}
	base, err := os.ReadFile(filepath.Join(s.config.Dir, databaseFile))
	if err != nil {
		f.Fatal(err)
	}
	path := filepath.Join(f.TempDir(), "db")
	f.Add([]byte{0, 0x10, 40, 1, 0, 0x20, 8, 2})
	f.Fuzz(func(t *testing.T, edits []byte) {
		b := bytes.Clone(base)
		for ; len(edits) >= 4; edits = edits[4:] {
			at := int(edits[0])<<16 | int(edits[1])<<8 | int(edits[2])
			b[at%len(b)] ^= edits[3]
		}
		for page := range 2 {
			m := b[page*4096+pageHeaderSize:]
			h := fnv.New64a()
			h.Write(m[:56])
			binary.LittleEndian.PutUint64(m[56:], h.Sum64())
		}
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		file, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		if checkPages(file, false) == nil && checkPages(file, true) == nil {
			// What passes must not be able to take bbolt down for good.
			if err := checkDatabase(path, true); err != nil {
				decodeError(t, err)
			}
		}
	})
}

func FuzzDocument(f *testing.F) {
	d := testDocument("trust", "partner").Document
	f.Add(d.encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		d, err := decodeDocument(b)
		if err != nil {
			decodeError(t, err)
			return
		}
		if !bytes.Equal(d.encode(), b) {
			t.Fatal("encoding is not the inverse of decoding")
		}
	})
}
