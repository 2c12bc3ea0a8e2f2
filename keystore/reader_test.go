package keystore_test

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/hpke"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	bolt "go.etcd.io/bbolt"
)

// TestFormatDocumentIsEnough reads a key from the golden store with nothing but docs/store-format.md, the standard library and bbolt:
// no code of this package. When it has to be changed, so has the document.
func TestFormatDocumentIsEnough(t *testing.T) {
	dir := filepath.Join("testdata", "format1")
	file, err := os.ReadFile(filepath.Join(dir, "header"))
	if err != nil {
		t.Fatal(err)
	}
	r := &reader{t: t, b: file}
	r.take(16 + 2 + 2)
	store := r.take(16)
	instance := r.take(16)
	r.take(8 + 8 + 1 + 4)
	epochs := map[uint32][]byte{}
	for range r.uint(1) {
		n := uint32(r.uint(4))
		epochs[n] = r.take(60)
	}
	lifetime := r.take(60)
	if r.uint(1) != 1 {
		t.Fatal("it is bound to no counter")
	}
	counterID, location, count := r.take(16), string(r.bytes(2)), r.uint(8)
	for range r.uint(1) {
		r.bytes(2)
	}
	r.take(8)
	for range r.uint(1) {
		r.take(16 + 8 + 4 + 8 + 8)
	}
	var uuid, sealedRoot, enrolment []byte
	for i := range r.uint(1) {
		r.take(4)
		id := r.take(16)
		for range 4 {
			r.bytes(1)
		}
		r.bytes(2)
		r.take(8)
		r.bytes(2)
		r.bytes(2)
		tag := r.take(32)
		sealed := r.bytes(2)
		r.take(32)
		if i == 1 { // slot 2
			uuid, enrolment, sealedRoot = id, tag, sealed
		}
	}
	private, err := hpke.MLKEM768X25519().NewPrivateKey(bytes.Repeat([]byte{2}, 32))
	if err != nil {
		t.Fatal(err)
	}
	info := join([]byte("kmsd slot v1"), store, uuid)
	root, err := hpke.Open(private, hpke.HKDFSHA256(), hpke.AES256GCM(), info, sealedRoot)
	if err != nil {
		t.Fatal(err)
	}
	end := len(file) - 64
	if !bytes.Equal(hmacOf(expand(root, "kmsd header v1"), file[:end]), file[end:end+32]) {
		t.Fatal("header MAC")
	}
	wrapping := expand(root, "kmsd wrap v1")
	wrapAAD := func(purpose string, n uint32) []byte {
		return binary.BigEndian.AppendUint32(join([]byte("kmsd wrap v1"), store, []byte{byte(len(purpose))}, []byte(purpose)), n)
	}
	lifetime = open(t, wrapping, wrapAAD("lifetime", 0), lifetime)
	sum := sha256.Sum256(lifetime)
	if !bytes.Equal(hmacOf(expand(bytes.Repeat([]byte{2}, 32), "kmsd slot binding v1"), store, uuid, sum[:]), enrolment) {
		t.Fatal("enrolment tag")
	}
	for n, w := range epochs {
		epochs[n] = open(t, wrapping, wrapAAD("epoch", n), w)
	}
	index := expand(lifetime, "kmsd index v1")
	shows, err := os.ReadFile(filepath.Join(dir, "counter"))
	if err != nil || location != "test:/dev/counter" || fmt.Sprintln(count) != string(shows) ||
		!bytes.Equal(counterID, expand(lifetime, "kmsd secret v1\x00kmsd counter v1"+string(instance))[:16]) {
		t.Fatalf("counter %x of %s at %d, %v", counterID, location, count, err)
	}

	// A copy, since bbolt locks what it opens.
	b, err := os.ReadFile(filepath.Join(dir, "store.db"))
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "store.db")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	db, err := bolt.Open(path, 0o600, &bolt.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	value := func(bucket string, key []byte) (v []byte) {
		db.View(func(tx *bolt.Tx) error { v = bytes.Clone(tx.Bucket([]byte(bucket)).Get(key)); return nil })
		if v == nil {
			t.Fatalf("nothing in %s for %x", bucket, key)
		}
		return v
	}

	head := value("head", []byte("head"))
	h := &reader{t: t, b: head}
	h.take(2 + 2 + 8)
	epoch := uint32(h.uint(4))
	h.take(8)
	rootNode, rootDigest, rootLevel := h.take(8), h.take(32), h.uint(1)
	if !bytes.Equal(hmacOf(expand(epochs[epoch], "kmsd head v1"), store, head[:len(head)-32]), head[len(head)-32:]) {
		t.Fatal("head MAC")
	}
	lookup := func(key []byte) (revision, dek []byte, flags uint64) {
		id, digest := rootNode, rootDigest
		for level := rootLevel; ; level-- {
			node := value("table", id)
			if sum := sha256.Sum256(node); !bytes.Equal(sum[:], digest) {
				t.Fatal("node digest")
			}
			n := &reader{t: t, b: node}
			n.take(6)
			count := n.uint(2)
			leafEpoch := uint32(n.uint(4))
			if level == 0 {
				e := &reader{t: t, b: open(t, epochs[leafEpoch], join(node[:12], store, id), n.b)}
				for range count {
					if k := e.take(28); bytes.Equal(k, key) {
						return e.take(8), e.b[4:36], binary.BigEndian.Uint64(join(make([]byte, 4), e.b[:4]))
					}
					e.take(8 + 4 + 32)
				}
				t.Fatal("no entry")
			}
			for i := range count {
				first, child, sum := n.take(28), n.take(8), n.take(32)
				if i == 0 || bytes.Compare(first, key) <= 0 {
					id, digest = child, sum
				}
			}
		}
	}
	recordKey := func(name string, version uint32) []byte {
		namespace, _, _ := strings.Cut(name, "/")
		a := hmacOf(index, []byte("namespace\x00"+namespace))[:8]
		b := hmacOf(index, []byte("name\x00"+namespace+"\x00"+name))[:16]
		return binary.BigEndian.AppendUint32(join(a, b), version)
	}
	record := func(bucket string, key, dek, revision []byte) []byte {
		v := value(bucket, key)
		x := int(binary.BigEndian.Uint16(v[6:]))
		if revision != nil && !bytes.Equal(v[16:24], revision) {
			t.Fatal("revision")
		}
		plain := open(t, dek, join(v[:24+x], store, key), v[24+x:])
		return plain[4 : 4+binary.BigEndian.Uint32(plain)]
	}

	moduleKey := recordKey("golden", 0)
	_, moduleDEK, _ := lookup(moduleKey)
	namespaceKey := record("material", moduleKey, moduleDEK, nil)
	key := recordKey("golden/full", 1)
	revision, dek, flags := lookup(key)
	if flags != 2 {
		t.Fatalf("flags %d", flags)
	}
	bound, err := hkdf.Key(sha256.New, dek, namespaceKey, "kmsd namespace v1"+string(key), 32)
	if err != nil {
		t.Fatal(err)
	}
	got := record("material", key, bound, revision)
	want := sha256.Sum256([]byte("material golden/full 1 0"))
	if !bytes.Equal(got, want[:]) {
		t.Fatalf("material %x, want %x", got, want)
	}
	// The same in a namespace that a device guards, whose wrapping key is 32 bytes 03.
	guardedKey := recordKey("guarded", 0)
	_, guardedDEK, flags := lookup(guardedKey)
	if flags != 4 {
		t.Fatalf("flags %d", flags)
	}
	g := &reader{t: t, b: record("material", guardedKey, guardedDEK, nil)}
	format, check, blob := g.uint(1), g.take(32), g.bytes(2)
	three := bytes.Repeat([]byte{3}, 32)
	if format != 1 || string(blob) != "golden blob" || !bytes.Equal(check, hmacOf(three, []byte("kmsd namespace check v1\x00"), store, []byte("guarded"))) {
		t.Fatalf("guard %d %q", format, blob)
	}
	key = recordKey("guarded/k", 1)
	revision, dek, flags = lookup(key)
	bound, err = hkdf.Key(sha256.New, dek, three, "kmsd namespace v1"+string(key), 32)
	if err != nil || flags != 2 {
		t.Fatal(err, flags)
	}
	want = sha256.Sum256([]byte("material guarded/k 1 0"))
	if got := record("material", key, bound, revision); !bytes.Equal(got, want[:]) {
		t.Fatalf("material %x, want %x", got, want)
	}
	key = recordKey("golden/full", 1)
	metaKey := recordKey("golden/full", 0)
	revision, dek, _ = lookup(metaKey)
	m := &reader{t: t, b: record("meta", metaKey, dek, revision)}
	m.take(1)
	if name, algorithm := string(m.bytes(1)), string(m.bytes(1)); name != "golden/full" || algorithm != "ed25519" {
		t.Fatalf("%s %s", name, algorithm)
	}
	documentKey := func(kind, name string) []byte {
		return join(hmacOf(index, []byte("document kind\x00"+kind))[:8], hmacOf(index, []byte("document\x00"+kind+"\x00"+name))[:16], make([]byte, 4))
	}
	changed := documentKey("trust", "changed")
	revision, documentDEK, flags := lookup(changed)
	if flags != 8 {
		t.Fatalf("flags %d", flags)
	}
	d := &reader{t: t, b: record("document", changed, documentDEK, revision)}
	if format, kind, name, data := d.uint(1), string(d.bytes(1)), string(d.bytes(1)), string(d.bytes(4)); format != 1 || kind != "trust" || name != "changed" ||
		!strings.HasPrefix(data, "data of trust/changed, 1. ") || binary.BigEndian.Uint64(revision) != 2 {
		t.Fatalf("document %d %s/%s %q", format, kind, name, data)
	}
	if revision, none, flags := lookup(documentKey("trust", "deleted")); flags != 8|1 || binary.BigEndian.Uint64(revision) != 2 || !bytes.Equal(none, make([]byte, 32)) {
		t.Fatalf("deleted document: flags %d", flags)
	}
	p := &reader{t: t, b: record("public", key, dek, nil)}
	if spki := string(p.bytes(4)); spki != "spki of golden/full@1" {
		t.Fatalf("%q", spki)
	}
}

type reader struct {
	t *testing.T
	b []byte
}

func (r *reader) take(n int) []byte {
	if n > len(r.b) {
		r.t.Fatal("too short")
	}
	v := r.b[:n]
	r.b = r.b[n:]
	return v
}

func (r *reader) uint(size int) (v uint64) {
	for _, b := range r.take(size) {
		v = v<<8 | uint64(b)
	}
	return v
}

func (r *reader) bytes(size int) []byte { return r.take(int(r.uint(size))) }

func join(parts ...[]byte) []byte { return bytes.Join(parts, nil) }

func expand(key []byte, info string) []byte {
	out, err := hkdf.Expand(sha256.New, key, info, 32)
	if err != nil {
		panic(err)
	}
	return out
}

func hmacOf(key []byte, parts ...[]byte) []byte {
	h := hmac.New(sha256.New, key)
	h.Write(join(parts...))
	return h.Sum(nil)
}

func open(t *testing.T, key, aad, sealed []byte) []byte {
	t.Helper()
	block, err := aes.NewCipher(key)
	if err != nil {
		t.Fatal(err)
	}
	gcm, err := cipher.NewGCM(block)
	if err != nil {
		t.Fatal(err)
	}
	plain, err := gcm.Open(nil, sealed[:12], sealed[12:], aad)
	if err != nil {
		t.Fatal(err)
	}
	return plain
}
