package engine

import (
	"bytes"
	"crypto/aes"
	"crypto/rand"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/client/packet"
	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/mechanism"
	"github.com/kmsd-project/kmsd/kmsd/pki"
)

// newZK makes a house with a key that wraps random keys, and with a recipient of these in another application.
func newZK(t *testing.T) (h *house, name, recipient keyspec.Name) {
	t.Helper()
	h = newHouse(t)
	h.create("KERNEL/IDENTITY_CACHE", keyspec.AES256GCM)
	h.create("IDA", keyspec.RSA2048, keyspec.Sign, keyspec.Verify, keyspec.Certify)
	h.create("IDA/PUBLIC_KEY", keyspec.RSA2048, keyspec.Encrypt, keyspec.Decrypt)
	subject := func(dn string) *pki.Subject {
		s, err := pki.ParseSubject(dn, nil, nil, nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		return &s
	}
	if _, err := h.CertSelfSign(t.Context(), h.app, keyspec.Ref{Name: "IDA"}, subject("CN=IDA"), &pki.Profile{CA: true, PathLen: -1}); err != nil {
		t.Fatal(err)
	}
	if _, err := h.CertIssue(t.Context(), h.app, keyspec.Ref{Name: "IDA"}, nil, keyspec.Ref{Name: "IDA/PUBLIC_KEY"}, subject("CN=IDA-PUBLIC_KEY"), &pki.Profile{}); err != nil {
		t.Fatal(err)
	}
	return h, "KERNEL/IDENTITY_CACHE", "IDA/PUBLIC_KEY"
}

func (h *house) generateZK(name keyspec.Name, count int) int {
	h.t.Helper()
	made, err := h.ZKGenerate(h.t.Context(), h.app, name, count)
	if err != nil {
		h.t.Fatal(err)
	}
	return made
}

func TestZK(t *testing.T) {
	h, name, recipient := newZK(t)
	attributes := []ZKAttribute{{"name", []byte("somebody")}, {"photo", bytes.Repeat([]byte("x"), 20_000)}}
	if _, _, _, err := h.ZKEncrypt(t.Context(), h.app, name, "1234", attributes, nil); !errors.Is(err, ErrState) {
		t.Errorf("without random keys: %v", err)
	}
	if made := h.generateZK(name, zkPage+100); made != zkPage+100 {
		t.Errorf("%d random keys were made", made)
	}
	if made := h.generateZK(name, zkPage+100); made != 0 {
		t.Errorf("%d random keys were made once more", made)
	}
	if made := h.generateZK(name, zkPage+200); made != 100 {
		t.Errorf("%d random keys were added", made)
	}
	seen := make(map[uint32]bool)
	for range 20 {
		index, sealed, keys, err := h.ZKEncrypt(t.Context(), h.app, name, "1234", attributes, []keyspec.Name{recipient})
		if err != nil {
			t.Fatal(err)
		}
		seen[index] = true
		if index >= zkPage+200 || len(sealed) != 2 || sealed[1].Identifier != "photo" || len(keys) != 1 {
			t.Fatalf("random key %d, %d attributes, %d keys", index, len(sealed), len(keys))
		}
		plain, err := h.ZKDecrypt(t.Context(), h.app, name, "1234", sealed)
		if err != nil || len(plain) != 2 || !bytes.Equal(plain[0].Value, attributes[0].Value) || !bytes.Equal(plain[1].Value, attributes[1].Value) {
			t.Fatalf("%v", err)
		}
		// The other application gets the random key, wrapped as it is here.
		thumbprint, block, err := packet.SplitRandomKey(keys[0])
		if err != nil {
			t.Fatal(err)
		}
		key, number, err := h.Find(t.Context(), h.app, keystore.AliasThumbprint, thumbprint[:])
		if err != nil || key.Name != recipient {
			t.Fatalf("recipient: %v", err)
		}
		wrapped, version, err := h.ZKRewrap(t.Context(), h.app, name, keyspec.Ref{Name: key.Name, Version: number}, block, false, 0)
		if err != nil || version != 1 {
			t.Fatal(err)
		}
		added, err := h.ZKImport(t.Context(), h.app, keyspec.Ref{Name: name}, []ZKKey{{Index: index, Wrapped: wrapped}})
		if err != nil || added != 0 {
			t.Errorf("what is rewrapped is not the random key: %d, %v", added, err)
		}
	}
	if len(seen) < 10 {
		t.Errorf("20 times a random key, and %d different ones", len(seen))
	}
	h.restart()
	if made := h.generateZK(name, zkPage+200); made != 0 {
		t.Errorf("%d random keys are not there after a restart", made)
	}
}

// TestZKRefuses asks for what must not be.
func TestZKRefuses(t *testing.T) {
	h, name, recipient := newZK(t)
	h.generateZK(name, 10)
	h.create("app/other", keyspec.AES256GCM)
	one := []ZKAttribute{{"a", []byte("x")}}
	_, sealed, _, err := h.ZKEncrypt(t.Context(), h.app, name, "id", one, nil)
	if err != nil {
		t.Fatal(err)
	}
	decrypt := func(id string, b []byte) error {
		_, err := h.ZKDecrypt(t.Context(), h.app, name, id, []ZKAttribute{{"a", b}})
		return err
	}
	for n := range sealed[0].Value {
		if err := decrypt("id", sealed[0].Value[:n]); !errors.Is(err, ErrInput) && !errors.Is(err, ErrDecryption) {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
	for i := range sealed[0].Value {
		b := bytes.Clone(sealed[0].Value)
		b[i] ^= 1
		if err := decrypt("id", b); !errors.Is(err, ErrDecryption) && (i > 3 || !errors.Is(err, ErrState)) {
			t.Errorf("byte %d changed: %v", i, err)
		}
	}
	if err := decrypt("other", sealed[0].Value); !errors.Is(err, ErrDecryption) {
		t.Errorf("of somebody else: %v", err)
	}
	for what, err := range map[string]error{
		"encrypt": func() error {
			_, _, err := h.Encrypt(t.Context(), h.app, keyspec.Ref{Name: name}, []byte("x"), nil, nil)
			return err
		}(),
		"data key": func() error {
			_, _, _, err := h.DataKey(t.Context(), h.app, keyspec.Ref{Name: name}, 32, nil, true)
			return err
		}(),
		"rewrap":         func() error { _, _, err := h.Rewrap(t.Context(), h.app, name, []byte("x"), nil, nil); return err }(),
		"another key":    func() error { _, err := h.ZKGenerate(t.Context(), h.app, "app/other", 1); return err }(),
		"an RSA key":     func() error { _, err := h.ZKGenerate(t.Context(), h.app, recipient, 1); return err }(),
		"decrypt others": func() error { _, err := h.ZKDecrypt(t.Context(), h.app, "app/other", "id", sealed); return err }(),
	} {
		if !errors.Is(err, ErrUsage) {
			t.Errorf("%s: %v", what, err)
		}
	}
	for what, err := range map[string]error{
		"no id":         func() error { _, _, _, err := h.ZKEncrypt(t.Context(), h.app, name, "", one, nil); return err }(),
		"no attributes": func() error { _, _, _, err := h.ZKEncrypt(t.Context(), h.app, name, "id", nil, nil); return err }(),
		"too large": func() error {
			_, _, _, err := h.ZKEncrypt(t.Context(), h.app, name, "id", []ZKAttribute{{"a", make([]byte, 50_000)}}, nil)
			return err
		}(),
		"empty attribute": func() error {
			_, _, _, err := h.ZKEncrypt(t.Context(), h.app, name, "id", []ZKAttribute{{"a", nil}}, nil)
			return err
		}(),
		"no random keys": func() error { _, err := h.ZKGenerate(t.Context(), h.app, name, 0); return err }(),
		"too many":       func() error { _, err := h.ZKGenerate(t.Context(), h.app, name, MaxZKIndex+1); return err }(),
		"index too large": func() error {
			_, err := h.ZKImport(t.Context(), h.app, keyspec.Ref{Name: name}, []ZKKey{{Index: MaxZKIndex}})
			return err
		}(),
		"nothing to import": func() error { _, err := h.ZKImport(t.Context(), h.app, keyspec.Ref{Name: name}, nil); return err }(),
		"a module recipient": func() error {
			_, _, _, err := h.ZKEncrypt(t.Context(), h.app, name, "id", one, []keyspec.Name{"IDA"})
			return err
		}(),
	} {
		if !errors.Is(err, ErrInput) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, _, _, err := h.ZKEncrypt(t.Context(), h.app, name, "id", one, []keyspec.Name{"IDA/NONE"}); !errors.Is(err, ErrNotAvailable) {
		t.Errorf("a recipient that is not there: %v", err)
	}
	// A random key is 32 bytes, under no label.
	public := h.publicRSA(recipient)
	for _, n := range []int{0, 16, 31, 33, 64} {
		block, err := mechanism.Encrypt(nil, public, keyspec.RSAOAEPSHA256, make([]byte, n), nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := h.ZKRewrap(t.Context(), h.app, name, keyspec.Ref{Name: recipient}, block, true, 11); !errors.Is(err, ErrDecryption) {
			t.Errorf("a random key of %d bytes: %v", n, err)
		}
	}
	if _, err := h.ZKImport(t.Context(), h.app, keyspec.Ref{Name: name}, []ZKKey{{Index: 3, Wrapped: [32]byte{1}}}); !errors.Is(err, ErrState) {
		t.Errorf("another random key under an index: %v", err)
	}
}

// TestZKKept has somebody hand in a random key that he knows: it decrypts what he has encrypted, and nothing is encrypted under it.
func TestZKKept(t *testing.T) {
	h, name, recipient := newZK(t)
	known := [32]byte{1, 2, 3}
	block, err := mechanism.Encrypt(nil, h.publicRSA(recipient), keyspec.RSAOAEPSHA256, known[:], nil)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, _, err := h.ZKRewrap(t.Context(), h.app, name, keyspec.Ref{Name: recipient}, block, true, 4711); err != nil {
			t.Fatal(err)
		}
	}
	theirs, err := packet.EncryptAttribute(known, 4711, "id", []byte("x"))
	if err != nil {
		t.Fatal(err)
	}
	plain, err := h.ZKDecrypt(t.Context(), h.app, name, "id", []ZKAttribute{{"a", theirs}})
	if err != nil || string(plain[0].Value) != "x" {
		t.Fatalf("%v, %v", plain, err)
	}
	if index, _, _, err := h.ZKEncrypt(t.Context(), h.app, name, "id", plain, nil); !errors.Is(err, ErrState) {
		t.Errorf("encrypted under the random key %d, which somebody else knows: %v", index, err)
	}
}

func (h *house) publicRSA(name keyspec.Name) any {
	h.t.Helper()
	_, _, stored, err := h.Public(h.t.Context(), h.app, keyspec.Ref{Name: name})
	if err != nil {
		h.t.Fatal(err)
	}
	public, err := mechanism.ParseSPKI(stored.SPKI)
	if err != nil {
		h.t.Fatal(err)
	}
	return public
}

// TestZKImport brings in the random keys and the AES key of a deployment, and reads what it has encrypted.
func TestZKImport(t *testing.T) {
	h := newHouse(t)
	master, random := [32]byte{}, [32]byte{}
	rand.Read(master[:])
	rand.Read(random[:])
	if _, err := h.Import(t.Context(), h.admin, &NewKey{Name: "KERNEL/IDENTITY_CACHE", Algorithm: keyspec.AES256GCM}, bytes.Clone(master[:]), nil); err != nil {
		t.Fatal(err)
	}
	block, err := aes.NewCipher(master[:])
	if err != nil {
		t.Fatal(err)
	}
	var wrapped [32]byte
	block.Encrypt(wrapped[:16], random[:16])
	block.Encrypt(wrapped[16:], random[16:])
	name := keyspec.Name("KERNEL/IDENTITY_CACHE")
	rows := []ZKKey{{Index: 4711, Wrapped: wrapped}, {Index: 9, Wrapped: [32]byte{9}, Inactive: true}}
	for want := range []int{2, 0} {
		added, err := h.ZKImport(t.Context(), h.app, keyspec.Ref{Name: name}, rows)
		if err != nil || added != 2-2*want {
			t.Fatalf("%d were added, %v", added, err)
		}
	}
	sealed, err := packet.EncryptAttribute(random, 4711, "7", []byte("text"))
	if err != nil {
		t.Fatal(err)
	}
	plain, err := h.ZKDecrypt(t.Context(), h.app, name, "7", []ZKAttribute{{"a", sealed}})
	if err != nil || string(plain[0].Value) != "text" {
		t.Fatalf("%v, %v", plain, err)
	}
	for range 10 { // the one that is inactive is not chosen
		index, sealed, _, err := h.ZKEncrypt(t.Context(), h.app, name, "7", []ZKAttribute{{"a", []byte("more")}}, nil)
		if err != nil || index != 4711 {
			t.Fatalf("random key %d, %v", index, err)
		}
		if got, err := packet.DecryptAttribute(random, "7", sealed[0].Value); err != nil || string(got) != "more" {
			t.Fatalf("%q, %v", got, err)
		}
	}
	// After a rotation of the AES key, what the former version wraps is still read, and added to.
	h.clock.add(time.Hour)
	if _, err := h.Rotate(t.Context(), h.app, name, time.Time{}, time.Time{}, false); err != nil {
		t.Fatal(err)
	}
	if plain, err := h.ZKDecrypt(t.Context(), h.app, name, "7", []ZKAttribute{{"a", sealed}}); err != nil || string(plain[0].Value) != "text" {
		t.Fatalf("after a rotation: %v", err)
	}
	if added, err := h.ZKImport(t.Context(), h.app, keyspec.Ref{Name: name, Version: 1}, append(rows, ZKKey{Index: 10, Wrapped: [32]byte{10}})); err != nil || added != 1 {
		t.Errorf("%d were added under the former version, %v", added, err)
	}
	if made := h.generateZK(name, 20); made != 18 {
		t.Errorf("%d were made under the new version", made)
	}
	for range 10 {
		_, sealed, _, err := h.ZKEncrypt(t.Context(), h.app, name, "7", []ZKAttribute{{"a", []byte("more")}}, nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := h.ZKDecrypt(t.Context(), h.app, name, "7", sealed); err != nil {
			t.Fatal(err)
		}
	}
	// What a compromised version wraps is not chosen any more.
	if _, err := h.Revoke(t.Context(), h.admin, keyspec.Ref{Name: name, Version: 1}, keyspec.KeyCompromise, ReplaceDefault); err != nil {
		t.Fatal(err)
	}
	for range 100 {
		if index, _, _, err := h.ZKEncrypt(t.Context(), h.app, name, "7", []ZKAttribute{{"a", []byte("more")}}, nil); err != nil || index == 4711 || index == 10 {
			t.Fatalf("random key %d, %v", index, err)
		}
	}
}

// TestZKConcurrent has many add random keys at once.
func TestZKConcurrent(t *testing.T) {
	h, name, _ := newZK(t)
	var wg sync.WaitGroup
	for n := range 4 {
		wg.Go(func() {
			for i := range 5 {
				index := uint32(n*5 + i)
				if _, err := h.ZKImport(t.Context(), h.app, keyspec.Ref{Name: name}, []ZKKey{{Index: index, Wrapped: [32]byte{byte(index)}}}); err != nil {
					t.Errorf("%d: %v", index, err)
				}
			}
		})
	}
	wg.Wait()
	if made := h.generateZK(name, 20); made != 0 {
		t.Errorf("%d of 20 random keys were lost", made)
	}
}
