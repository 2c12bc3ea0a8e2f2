package enclave

import (
	"bytes"
	"errors"
	"testing"
)

func TestSealBindsEverything(t *testing.T) {
	key, secret, aad := bytes.Repeat([]byte{7}, 32), bytes.Repeat([]byte{9}, SecretSize), []byte("aad")
	sealed, err := Seal(key, "label", secret, aad)
	if err != nil || len(sealed) != SealedSize {
		t.Fatalf("%d bytes, %v", len(sealed), err)
	}
	dst := make([]byte, SecretSize)
	if err := Open(key, "label", sealed, aad, dst); err != nil || !bytes.Equal(dst, secret) {
		t.Fatalf("%x, %v", dst, err)
	}
	otherKey := bytes.Repeat([]byte{8}, 32)
	for name, try := range map[string]func() error{
		"key":               func() error { return Open(otherKey, "label", sealed, aad, dst) },
		"label":             func() error { return Open(key, "Label", sealed, aad, dst) },
		"aad":               func() error { return Open(key, "label", sealed, []byte("AAD"), dst) },
		"label runs to aad": func() error { return Open(key, "labela", sealed, []byte("ad"), dst) },
		"size":              func() error { return Open(key, "label", sealed[1:], aad, dst) },
	} {
		copy(dst, secret)
		if err := try(); !errors.Is(err, ErrCorrupt) {
			t.Errorf("other %s: %v", name, err)
		}
	}
	for i := range sealed {
		flipped := bytes.Clone(sealed)
		flipped[i] ^= 0x10
		if err := Open(key, "label", flipped, aad, dst); !errors.Is(err, ErrCorrupt) || !bytes.Equal(dst, make([]byte, SecretSize)) {
			t.Fatalf("byte %d: %v, destination %x", i, err, dst)
		}
	}
}

func TestBlobForm(t *testing.T) {
	b, err := EncodeBlob("kind", 3, []byte("body"))
	if err != nil {
		t.Fatal(err)
	}
	version, body, err := DecodeBlob("kind", b)
	if err != nil || version != 3 || string(body) != "body" {
		t.Fatalf("%d %q %v", version, body, err)
	}
	if _, _, err := DecodeBlob("king", b); !errors.Is(err, ErrCorrupt) {
		t.Errorf("blob of another kind: %v", err)
	}
	if _, _, err := DecodeBlob("kin", b); !errors.Is(err, ErrCorrupt) {
		t.Errorf("blob of a longer kind: %v", err)
	}
	if _, err := EncodeBlob("kind", 1, make([]byte, MaxBlob)); !errors.Is(err, ErrUnsupported) {
		t.Errorf("too large a body: %v", err)
	}
	if _, err := EncodeBlob("", 1, nil); !errors.Is(err, ErrUnsupported) {
		t.Errorf("no kind: %v", err)
	}
}

func FuzzDecodeBlob(f *testing.F) {
	b, err := EncodeBlob("kind", 3, []byte("body"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte(b))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, data []byte) {
		version, body, err := DecodeBlob("kind", data)
		if err != nil {
			if !errors.Is(err, ErrCorrupt) {
				t.Fatal(err)
			}
			return
		}
		again, err := EncodeBlob("kind", version, body)
		if err != nil || !bytes.Equal(again, data) {
			t.Fatalf("%x is another form of %x", data, again)
		}
	})
}

func TestErrorCarriesBoth(t *testing.T) {
	cause := errors.New("cause")
	err := error(&Error{Kind: ErrLockedOut, Detail: "three attempts", Remedy: "wait", Cause: cause})
	if !errors.Is(err, ErrLockedOut) || !errors.Is(err, cause) || errors.Is(err, ErrAuth) {
		t.Error("errors.Is does not see what it should")
	}
	if got := err.Error(); got != "three attempts: "+ErrLockedOut.Error()+": cause" {
		t.Error(got)
	}
}
