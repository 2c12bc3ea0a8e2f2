package packet

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"os"
	"testing"
	"time"
)

// more are the vectors of the formats beside payload and packet. A Java program made them.
type more struct {
	Plaintext   string `json:"plaintext_hex"`
	KeyStore    string `json:"key_store_private_key"`
	PKCS8       string `json:"base_pkcs8_sha256_hex"`
	PIN         string `json:"pin"`
	PINPayload  string `json:"pin_payload"`
	File        string `json:"cs_local_with_base_key"`
	TPM         string `json:"cs_tpm_with_base_key"`
	Android     string `json:"cs_android_with_base_key"`
	Signing     string `json:"tpmt_public_signing_of_module_key"`
	Encryption  string `json:"tpmt_public_encryption_of_base_key"`
	KeyIndex    string `json:"key_index_of_tpmt_encryption"`
	ZKRandom    string `json:"zk_random_key_hex"`
	ZKID        string `json:"zk_id"`
	ZKPayload   string `json:"zk_payload"`
	UniqueIdent string `json:"uni_ident_REGISTRATION_blank_01-31-2026"`
	KID         string `json:"kid"`
}

func readMore(t testing.TB) more {
	t.Helper()
	b, err := os.ReadFile("testdata/vectors.json")
	if err != nil {
		t.Fatal(err)
	}
	var v more
	if err := json.Unmarshal(b, &v); err != nil {
		t.Fatal(err)
	}
	return v
}

// DecryptBlock makes a holder a ClientKey.
func (h *holder) DecryptBlock(_ context.Context, p Padding, block []byte) ([]byte, error) {
	if h.err != nil {
		return nil, h.err
	}
	options, err := p.Options()
	if err != nil {
		return nil, err
	}
	return h.key.Decrypt(nil, block, options)
}

func module(t testing.TB) *holder {
	t.Helper()
	key, err := x509.ParsePKCS8PrivateKey(readPEM(t, "module.key.pem"))
	if err != nil {
		t.Fatal(err)
	}
	return &holder{key: key.(*rsa.PrivateKey)}
}

// refuses checks that every shorter and every changed form of a sealed message is refused, with one of the errors of this
// package.
func refuses(t *testing.T, sealed []byte, open func([]byte) ([]byte, error)) {
	t.Helper()
	check := func(what string, at int, b []byte) {
		t.Helper()
		if _, err := open(b); !errors.Is(err, ErrFormat) && !errors.Is(err, ErrDecryption) && !errors.Is(err, errWrongKey) {
			t.Fatalf("%s at %d: %v", what, at, err)
		}
	}
	for n := 0; n < len(sealed); n += 1 + n/8 {
		check("cut", n, sealed[:n])
	}
	for i := 0; i < len(sealed); i += 7 {
		changed := bytes.Clone(sealed)
		changed[i] ^= 1
		check("changed", i, changed)
	}
	check("longer", len(sealed), append(bytes.Clone(sealed), 0))
}

var errWrongKey = rsa.ErrDecryption // what the key answers to a changed block

func TestPIN(t *testing.T) {
	v := readMore(t)
	want, sealed := unhex(t, v.Plaintext), unbase64(t, v.PINPayload)
	got, err := DecryptWithPIN([]byte(v.PIN), sealed, PINIterations)
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("%q, %v", got, err)
	}
	if _, err := DecryptWithPIN([]byte("Correct horse"), sealed, PINIterations); !errors.Is(err, ErrDecryption) {
		t.Errorf("wrong PIN: %v", err)
	}
	if _, err := DecryptWithPIN([]byte(v.PIN), sealed, PINIterations-1); !errors.Is(err, ErrDecryption) {
		t.Errorf("wrong number of iterations: %v", err)
	}
	for _, pin := range []string{"", string(make([]byte, maxPIN+1))} {
		if _, err := EncryptWithPIN([]byte(pin), want, 10); !errors.Is(err, ErrFormat) {
			t.Errorf("PIN of %d bytes: %v", len(pin), err)
		}
	}
	for _, n := range []int{-1, 0, MaxPINIterations + 1} {
		if _, err := DecryptWithPIN([]byte("1"), sealed, n); !errors.Is(err, ErrFormat) {
			t.Errorf("%d iterations: %v", n, err)
		}
	}
	if _, err := EncryptWithPIN([]byte("1"), nil, 10); !errors.Is(err, ErrFormat) {
		t.Errorf("empty plaintext: %v", err)
	}
	sealed, err = EncryptWithPIN([]byte("1234"), want, 10)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := DecryptWithPIN([]byte("1234"), sealed, 10); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("round trip: %q, %v", got, err)
	}
	refuses(t, sealed, func(b []byte) ([]byte, error) { return DecryptWithPIN([]byte("1234"), b, 10) })
}

func TestPrivateKeyAtRest(t *testing.T) {
	v, m := readMore(t), module(t)
	got, err := UnwrapPrivateKey(t.Context(), m, unbase64(t, v.KeyStore))
	if err != nil {
		t.Fatal(err)
	}
	if sum := sha256.Sum256(got); hex.EncodeToString(sum[:]) != v.PKCS8 {
		t.Errorf("another key: %x", sum)
	}
	_, base := base(t)
	if key, err := x509.ParsePKCS8PrivateKey(got); err != nil || !base.key.Equal(key) {
		t.Errorf("not the base key: %v", err)
	}
	sealed, err := WrapPrivateKey(&m.key.PublicKey, got)
	if err != nil {
		t.Fatal(err)
	}
	if want := len(unbase64(t, v.KeyStore)); len(sealed) != want {
		t.Errorf("%d bytes, want %d", len(sealed), want)
	}
	if again, err := UnwrapPrivateKey(t.Context(), m, sealed); err != nil || !bytes.Equal(again, got) {
		t.Fatalf("round trip: %v", err)
	}
	refuses(t, sealed, func(b []byte) ([]byte, error) { return UnwrapPrivateKey(t.Context(), m, b) })
	if _, err := UnwrapPrivateKey(t.Context(), base, sealed); !errors.Is(err, rsa.ErrDecryption) {
		t.Errorf("with another module key: %v", err)
	}
	if _, err := UnwrapPrivateKey(t.Context(), m, unbase64(t, readVectors(t).WithAAD)); !errors.Is(err, ErrFormat) {
		t.Errorf("a payload: %v", err)
	}
	if _, err := WrapPrivateKey(&m.key.PublicKey, make([]byte, maxPrivateKey+1)); !errors.Is(err, ErrFormat) {
		t.Errorf("a large key: %v", err)
	}
}

func TestClientData(t *testing.T) {
	v := readMore(t)
	_, base := base(t)
	want := unhex(t, v.Plaintext)
	for padding, text := range map[Padding]string{PaddingFile: v.File, PaddingTPM: v.TPM, PaddingAndroid: v.Android} {
		sealed := unbase64(t, text)
		got, err := DecryptForClient(t.Context(), base, padding, sealed)
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %q, %v", padding, got, err)
		}
		for _, other := range []Padding{PaddingFile, PaddingTPM, PaddingAndroid} {
			if other == padding {
				continue
			}
			if _, err := DecryptForClient(t.Context(), base, other, sealed); !errors.Is(err, rsa.ErrDecryption) {
				t.Errorf("%s as %s: %v", padding, other, err)
			}
		}
		sealed, err = EncryptForClient(&base.key.PublicKey, padding, want)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := DecryptForClient(t.Context(), base, padding, sealed); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s, round trip: %q, %v", padding, got, err)
		}
		refuses(t, sealed, func(b []byte) ([]byte, error) { return DecryptForClient(t.Context(), base, padding, b) })
	}
	if _, err := DecryptForClient(t.Context(), base, "none", make([]byte, 400)); !errors.Is(err, ErrFormat) {
		t.Errorf("unknown padding: %v", err)
	}
}

// TestOldClientData reads the layout of MOSIP 1.1.4.4.
func TestOldClientData(t *testing.T) {
	_, base := base(t)
	for _, want := range [][]byte{[]byte("x"), bytes.Repeat([]byte("long "), 100)} {
		key := make([]byte, keySize)
		rand.Read(key)
		sealed, err := EncryptClientBlock(&base.key.PublicKey, PaddingFile, key)
		if err != nil {
			t.Fatal(err)
		}
		fresh := make([]byte, oldNonceSize+oldAADSize)
		rand.Read(fresh)
		aead, err := newGCM(key, oldNonceSize)
		if err != nil {
			t.Fatal(err)
		}
		sealed = aead.Seal(append(sealed, fresh...), fresh[:oldNonceSize], want, fresh[oldNonceSize:])
		if got, err := DecryptForClient(t.Context(), base, PaddingFile, sealed); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%q, %v", got, err)
		}
	}
}

// TestClientBlock puts as much as fits into one block: 190 bytes.
func TestClientBlock(t *testing.T) {
	_, base := base(t)
	want := bytes.Repeat([]byte{7}, 190)
	block, err := EncryptClientBlock(&base.key.PublicKey, PaddingTPM, want)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := base.DecryptBlock(t.Context(), PaddingTPM, block); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%x, %v", got, err)
	}
	if _, err := EncryptClientBlock(&base.key.PublicKey, PaddingTPM, append(want, 7)); !errors.Is(err, ErrTooLarge) {
		t.Errorf("191 bytes: %v", err)
	}
}

func TestMachineKeys(t *testing.T) {
	v, m := readMore(t), module(t)
	_, base := base(t)
	for use, c := range map[MachineUse]struct {
		key  *rsa.PublicKey
		want []byte
	}{
		MachineSigning:    {&m.key.PublicKey, unbase64(t, v.Signing)},
		MachineEncryption: {&base.key.PublicKey, unbase64(t, v.Encryption)},
	} {
		got, err := MarshalMachineKey(c.key, use)
		if err != nil || !bytes.Equal(got, c.want) {
			t.Errorf("%s: %x, %v", use, got, err)
		}
		key, is, err := ParseMachineKey(got)
		if err != nil || is != use || !key.Equal(c.key) {
			t.Errorf("%s: %v, %q, %v", use, key, is, err)
		}
		for i := range got[:len(got)-256] { // every bit but the modulus is the template
			changed := bytes.Clone(got)
			changed[i] ^= 1
			if _, _, err := ParseMachineKey(changed); !errors.Is(err, ErrFormat) {
				t.Fatalf("%s with byte %d changed: %v", use, i, err)
			}
		}
		for n := range got {
			if _, _, err := ParseMachineKey(got[:n]); !errors.Is(err, ErrFormat) {
				t.Fatalf("%s of %d bytes: %v", use, n, err)
			}
		}
	}
	if got := KeyIndex(unbase64(t, v.Encryption)); got != v.KeyIndex {
		t.Errorf("key index %s", got)
	}
	small, err := rsa.GenerateKey(rand.Reader, 3072)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := MarshalMachineKey(&small.PublicKey, MachineSigning); !errors.Is(err, ErrFormat) {
		t.Errorf("RSA-3072: %v", err)
	}
}

func TestNames(t *testing.T) {
	v := readMore(t)
	day := time.Date(2026, 1, 31, 23, 59, 0, 0, time.FixedZone("", -3600)) // the first of February in UTC
	if got := UniqueIdentifier("REGISTRATION", "", day.Add(-time.Hour)); got != v.UniqueIdent {
		t.Errorf("unique identifier %s, want %s", got, v.UniqueIdent)
	}
	if UniqueIdentifier("REGISTRATION", "", day) == v.UniqueIdent {
		t.Error("the day is not taken in UTC")
	}
	if got := KeyID(v.UniqueIdent); got != v.KID {
		t.Errorf("kid %s, want %s", got, v.KID)
	}
	// KERNEL/SIGN, computed apart from this program.
	if got := UniqueIdentifier("KERNEL", "SIGN", time.Date(2026, 1, 31, 12, 0, 0, 0, time.UTC)); got != "836C21F19190B1FD2A1207649B87293D69AD2CDA" {
		t.Errorf("unique identifier %s", got)
	}
	if got := KeyID("836C21F19190B1FD2A1207649B87293D69AD2CDA"); got != "ecHLxBa5gr7XDVp6QNpcFMMGL_tFO0Iry0YxC1bb6sY" {
		t.Errorf("kid %s", got)
	}
	for _, no := range []string{"", "83", "xx", v.KID} {
		if got := KeyID(no); got != "" {
			t.Errorf("KeyID(%q) = %q", no, got)
		}
	}
}

func TestAttributes(t *testing.T) {
	v := readMore(t)
	random, sealed := [32]byte(unhex(t, v.ZKRandom)), unbase64(t, v.ZKPayload)
	want := unhex(t, v.Plaintext)
	index, err := AttributeIndex(sealed)
	if err != nil || index != 42 {
		t.Errorf("index %d, %v", index, err)
	}
	if got, err := DecryptAttribute(random, v.ZKID, sealed); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("%q, %v", got, err)
	}
	if _, err := DecryptAttribute(random, v.ZKID+"0", sealed); !errors.Is(err, ErrDecryption) {
		t.Errorf("of somebody else: %v", err)
	}
	if sealed, err = EncryptAttribute(random, 9999, v.ZKID, want); err != nil {
		t.Fatal(err)
	}
	if got, err := DecryptAttribute(random, v.ZKID, sealed); err != nil || !bytes.Equal(got, want) {
		t.Errorf("round trip: %q, %v", got, err)
	}
	refuses(t, sealed[4:], func(b []byte) ([]byte, error) { return DecryptAttribute(random, v.ZKID, append(sealed[:4:4], b...)) })
	master := [32]byte{1}
	wrapped, err := WrapRandomKey(master, random)
	if err != nil || wrapped == random {
		t.Fatal(err)
	}
	if got, err := UnwrapRandomKey(master, wrapped); err != nil || got != random {
		t.Errorf("random key: %x, %v", got, err)
	}
}

func FuzzMOSIP(f *testing.F) {
	v := readMore(f)
	m := module(f)
	for _, text := range []string{v.KeyStore, v.PINPayload, v.File, v.ZKPayload, v.Signing, v.Encryption} {
		f.Add(unbase64(f, text))
	}
	f.Add([]byte{})
	m.err = errors.New("no key") // what precedes the key is what is fuzzed
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, err := UnwrapPrivateKey(t.Context(), m, b); err == nil {
			t.Error("unwrapped without a key")
		}
		if _, err := DecryptForClient(t.Context(), m, PaddingFile, b); err == nil {
			t.Error("decrypted without a key")
		}
		DecryptWithPIN([]byte("1"), b, 1)
		DecryptAttribute([32]byte{}, "id", b)
		if key, use, err := ParseMachineKey(b); err == nil {
			if again, err := MarshalMachineKey(key, use); err != nil || !bytes.Equal(again, b) {
				t.Errorf("%x is written as %x, %v", b, again, err)
			}
		}
	})
}
