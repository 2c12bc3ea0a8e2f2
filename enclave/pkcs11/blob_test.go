package pkcs11

import (
	"bytes"
	"errors"
	"reflect"
	"testing"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

func sampleSlots() []*Slot {
	id := bytes.Repeat([]byte{7}, IDSize)
	return []*Slot{
		{Guard: Wrapped, Serial: "0123456789abcdef", ID: id, Check: make([]byte, CheckSize), Nonce: make([]byte, NonceSize), Sealed: make([]byte, wrappedSize)},
		{Guard: Agreed, Serial: "", ID: id, Public: make([]byte, PointSize), Point: make([]byte, PointSize), Sealed: make([]byte, enclave.SealedSize)},
	}
}

func sampleKeys() []*Key {
	k := &Key{Algorithm: keyspec.RSA4096, Serial: "1", ID: bytes.Repeat([]byte{7}, IDSize), SPKI: make([]byte, 550)}
	k.BindTo([]byte("a"))
	s := &Key{Algorithm: keyspec.AES128GCM, Serial: "0123456789abcdef", ID: bytes.Repeat([]byte{8}, IDSize), SPKI: []byte{}}
	s.BindTo(nil)
	l := &Key{Algorithm: keyspec.RSA2048, Serial: "1", ID: []byte{}, Label: "a label / of others", Taken: true, SPKI: make([]byte, 294)}
	i := &Key{Algorithm: keyspec.RSA2048, Serial: "1", ID: []byte{1}, Taken: true, SPKI: make([]byte, 294)}
	l.BindTo(nil)
	i.BindTo(nil)
	return []*Key{k, s, l, i}
}

func TestBlobs(t *testing.T) {
	for _, s := range sampleSlots() {
		b, err := s.Encode()
		if err != nil {
			t.Fatal(err)
		}
		back, err := DecodeSlot(b)
		if err != nil || !reflect.DeepEqual(back, s) {
			t.Errorf("%+v: %v", back, err)
		}
		if _, err := DecodeKey(b); !errors.Is(err, enclave.ErrCorrupt) {
			t.Errorf("a slot is no key: %v", err)
		}
	}
	for _, k := range sampleKeys() {
		b, err := k.Encode()
		if err != nil {
			t.Fatal(err)
		}
		back, err := DecodeKey(b)
		if err != nil || back.Algorithm != k.Algorithm || back.Serial != k.Serial || !bytes.Equal(back.ID, k.ID) || back.Taken != k.Taken || back.Label != k.Label || !bytes.Equal(back.SPKI, k.SPKI) {
			t.Errorf("%+v: %v", back, err)
		}
		if k.BelongsTo([]byte("b")) {
			t.Error("belongs to another record")
		}
		if _, err := DecodeSlot(b); !errors.Is(err, enclave.ErrCorrupt) {
			t.Errorf("a key is no slot: %v", err)
		}
	}
}

// FuzzBlob damages what is inside the checksum, which the suite of all enclaves does not get to.
func FuzzBlob(f *testing.F) {
	seed := func(b enclave.Blob, err error) {
		if err != nil {
			f.Fatal(err)
		}
		for _, kind := range []string{Kind, keyKind} {
			if version, body, err := enclave.DecodeBlob(kind, b); err == nil {
				f.Add(version, body)
			}
		}
	}
	for _, s := range sampleSlots() {
		seed(s.Encode())
	}
	for _, k := range sampleKeys() {
		seed(k.Encode())
	}
	f.Fuzz(func(t *testing.T, version uint8, body []byte) {
		check := func(b enclave.Blob, again enclave.Blob, err error) {
			switch {
			case err == nil && !bytes.Equal(b, again):
				t.Fatal("a blob has two forms")
			case err != nil && !errors.Is(err, enclave.ErrCorrupt) && !errors.Is(err, enclave.ErrUnsupported):
				t.Fatalf("error %v", err)
			}
		}
		if b, err := enclave.EncodeBlob(Kind, version, body); err == nil {
			var again enclave.Blob
			s, err := DecodeSlot(b)
			if err == nil {
				again, err = s.Encode()
			}
			check(b, again, err)
		}
		if b, err := enclave.EncodeBlob(keyKind, version, body); err == nil {
			var again enclave.Blob
			k, err := DecodeKey(b)
			if err == nil {
				again, err = k.Encode()
			}
			check(b, again, err)
		}
	})
}
