package engine

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"errors"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/mechanism"
)

// TestDecryptWithModuleKey holds the invariant of Decrypt: a module key opens keys of payloads and nothing else.
func TestDecryptWithModuleKey(t *testing.T) {
	h := newHouse(t)
	seal := func(name keyspec.Name, plain, label []byte) []byte {
		t.Helper()
		_, _, stored, err := h.Public(t.Context(), h.app, keyspec.Ref{Name: name})
		if err != nil {
			t.Fatal(err)
		}
		public, err := mechanism.ParseSPKI(stored.SPKI)
		if err != nil {
			t.Fatal(err)
		}
		sealed, err := rsa.EncryptOAEP(sha256.New(), rand.Reader, public.(*rsa.PublicKey), plain, label)
		if err != nil {
			t.Fatal(err)
		}
		return sealed
	}
	if _, err := h.Create(t.Context(), h.app, &NewKey{Name: "REGISTRATION", Algorithm: keyspec.RSA2048, Profile: mechanism.ProfileMOSIPModule}, nil); err != nil {
		t.Fatal(err)
	}
	open := func(name keyspec.Name, sealed, label []byte) ([]byte, error) {
		data, _, err := h.Decrypt(t.Context(), h.app, keyspec.Ref{Name: name}, sealed, nil, label, []byte("before"))
		if err == nil && !bytes.HasPrefix(data, []byte("before")) {
			t.Fatalf("not appended: %q", data)
		}
		return bytes.TrimPrefix(data, []byte("before")), err
	}
	want := bytes.Repeat([]byte{7}, 32)
	sealed := seal("REGISTRATION", want, nil)
	if got, err := open("REGISTRATION", sealed, nil); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("%x, %v", got, err)
	}
	for _, n := range []int{0, 1, 16, 31, 33, 64, 190} {
		if got, err := open("REGISTRATION", seal("REGISTRATION", make([]byte, n), nil), nil); !errors.Is(err, ErrDecryption) {
			t.Errorf("%d bytes: %x, %v", n, got, err)
		}
	}
	for _, label := range [][]byte{guardLabelOAEP, {0}, []byte("x")} {
		if _, err := open("REGISTRATION", seal("REGISTRATION", want, label), label); !errors.Is(err, ErrDecryption) {
			t.Errorf("label %q: %v", label, err)
		}
	}
	// What is older than the current version is opened, and what is revoked as compromised is not.
	if _, err := h.Rotate(t.Context(), h.app, "REGISTRATION", time.Time{}, time.Time{}, false); err != nil {
		t.Fatal(err)
	}
	if got, err := open("REGISTRATION", sealed, nil); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("after a rotation: %x, %v", got, err)
	}
	// Only the profile lets a key without the usage decrypt do that.
	for name, usages := range map[keyspec.Name][]keyspec.Usage{"app/sign": {keyspec.Sign, keyspec.Verify}, "app/unwrap": {keyspec.Wrap, keyspec.Unwrap}} {
		if _, err := h.Create(t.Context(), h.app, &NewKey{Name: name, Algorithm: keyspec.RSA2048, Usages: usages}, nil); err != nil {
			t.Fatal(err)
		}
		if _, err := open(name, seal(name, want, nil), nil); !errors.Is(err, ErrUsage) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := h.Create(t.Context(), h.app, &NewKey{Name: "OTHER", Algorithm: keyspec.RSA2048, Profile: mechanism.ProfileMOSIPModule,
		Usages: []keyspec.Usage{keyspec.Sign, keyspec.Certify}}, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := open("OTHER", seal("OTHER", want, nil), nil); !errors.Is(err, ErrUsage) {
		t.Errorf("a module key that does not unwrap: %v", err)
	}
	if _, err := open("NOTHING", sealed, nil); !errors.Is(err, ErrNotAvailable) && !errors.Is(err, keystore.ErrNotFound) {
		t.Errorf("no key: %v", err)
	}
}
