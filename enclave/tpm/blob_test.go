package tpm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

func exampleSlot() *slot {
	return &slot{
		guard: Agreed, pin: true, root: bytes.Repeat([]byte{1}, nameSize), salt: bytes.Repeat([]byte{2}, saltSize), pcrs: 1 << 7,
		public: []byte("public"), private: []byte("private"), point: bytes.Repeat([]byte{4}, pointSize),
		sealed: bytes.Repeat([]byte{3}, enclave.SealedSize),
	}
}

func TestSlotBlob(t *testing.T) {
	blob, err := exampleSlot().encode()
	if err != nil {
		t.Fatal(err)
	}
	d, err := Describe(blob)
	if err != nil || d.Guard != Agreed || !d.PIN || len(d.PCRs) != 1 || d.PCRs[0] != 7 || d.Signer != nil || len(d.Binding) != 2*nameSize {
		t.Errorf("%+v, %v", d, err)
	}
	for name, c := range map[string]struct {
		change func(*slot)
		want   error
	}{
		"unknown guard":      {func(s *slot) { s.guard = "x" }, enclave.ErrCorrupt}, // its byte is missing
		"no point":           {func(s *slot) { s.point = nil }, enclave.ErrCorrupt},
		"point when sealed":  {func(s *slot) { s.guard = Sealed }, enclave.ErrCorrupt},
		"signer and PCRs":    {func(s *slot) { s.signer = []byte{1} }, enclave.ErrCorrupt},
		"long signer":        {func(s *slot) { s.pcrs, s.signer = 0, make([]byte, maxSigner+1) }, enclave.ErrCorrupt},
		"no public area":     {func(s *slot) { s.public = nil }, enclave.ErrCorrupt},
		"long private area":  {func(s *slot) { s.private = make([]byte, maxArea+1) }, enclave.ErrCorrupt},
		"long sealed secret": {func(s *slot) { s.sealed = append(s.sealed, 0) }, enclave.ErrCorrupt},
	} {
		s := exampleSlot()
		c.change(s)
		b, err := s.encode()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := decodeSlot(b); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	_, body, err := enclave.DecodeBlob(Kind, blob)
	if err != nil {
		t.Fatal(err)
	}
	next, err := enclave.EncodeBlob(Kind, slotFormat+1, body)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := decodeSlot(next); !errors.Is(err, enclave.ErrUnsupported) {
		t.Errorf("later version: %v", err)
	}
	for at, value := range map[int]byte{0: 3, 1: 2} {
		later := bytes.Clone(body)
		later[at] = value
		b, err := enclave.EncodeBlob(Kind, slotFormat, later)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := decodeSlot(b); !errors.Is(err, enclave.ErrUnsupported) {
			t.Errorf("byte %d is %d: %v", at, value, err)
		}
	}
}

func FuzzSlotBlob(f *testing.F) {
	blob, err := exampleSlot().encode()
	if err != nil {
		f.Fatal(err)
	}
	_, body, err := enclave.DecodeBlob(Kind, blob)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(body)
	f.Fuzz(func(t *testing.T, body []byte) {
		b, err := enclave.EncodeBlob(Kind, slotFormat, body)
		if err != nil {
			return
		}
		s, err := decodeSlot(b)
		if err != nil {
			if !errors.Is(err, enclave.ErrCorrupt) && !errors.Is(err, enclave.ErrUnsupported) {
				t.Fatal(err)
			}
			return
		}
		again, err := s.encode()
		if err != nil || !bytes.Equal(again, b) {
			t.Fatalf("%x became %x, %v", b, again, err)
		}
		if s.guard == Agreed {
			s.fromShared(make([]byte, 32))
		}
		if len(s.signer) > 0 {
			parseSigner(s.signer)
		}
	})
}

func FuzzKeyBlob(f *testing.F) {
	blob, err := (&key{keyspec.ECDSAP256, bytes.Repeat([]byte{1}, nameSize), bytes.Repeat([]byte{2}, saltSize), bytes.Repeat([]byte{3}, checkSize), []byte("public"), []byte("private")}).encode()
	if err != nil {
		f.Fatal(err)
	}
	_, body, err := enclave.DecodeBlob(keyKind, blob)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(body)
	f.Fuzz(func(t *testing.T, body []byte) {
		b, err := enclave.EncodeBlob(keyKind, keyFormat, body)
		if err != nil {
			return
		}
		k, err := decodeKey(b)
		if err != nil {
			if !errors.Is(err, enclave.ErrCorrupt) && !errors.Is(err, enclave.ErrUnsupported) {
				t.Fatal(err)
			}
			return
		}
		again, err := k.encode()
		if err != nil || !bytes.Equal(again, b) {
			t.Fatalf("%x became %x, %v", b, again, err)
		}
		k.spki()
	})
}

func FuzzApprovals(f *testing.F) {
	f.Add([]byte(`{"sha256":[{"pcrs":[11],"pkfp":"00","pol":"00","sig":"AA=="}]}`))
	f.Add([]byte(`{"sha1":[],"sha256":null}`))
	f.Fuzz(func(t *testing.T, file []byte) {
		list, err := ParseApprovals(file)
		if err != nil {
			return
		}
		for _, a := range list {
			a.signature(tpm2.TPMAlgECC)
			a.signature(tpm2.TPMAlgRSA)
		}
		again, err := MarshalApprovals(list)
		if err != nil {
			t.Fatal(err)
		}
		if same, err := ParseApprovals(again); err != nil || len(same) != len(list) {
			t.Fatalf("%d approvals became %d, %v", len(list), len(same), err)
		}
	})
}

// FuzzResponse feeds the framing of the stream.
func FuzzResponse(f *testing.F) {
	f.Add(response(0))
	f.Add([]byte{0x80, 1, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, stream []byte) {
		r := bytes.NewReader(stream)
		answer, err := readResponse(r)
		if err != nil {
			return
		}
		if len(answer) < headerSize || len(answer) > maxMessage || int(binary.BigEndian.Uint32(answer[2:])) != len(answer) ||
			!bytes.Equal(answer, stream[:len(answer)]) || r.Len() != len(stream)-len(answer) {
			t.Fatalf("%x gave %x", stream, answer)
		}
	})
}

// FuzzUnwrap gives the TPM itself areas to load that somebody made up, under a good checksum and the right storage key.
func FuzzUnwrap(f *testing.F) {
	d := startSimulator(f).open(Config{})
	blob, _ := enrol(f, d, enclave.Auth{})
	real, err := decodeSlot(blob)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(real.public, real.private, byte(0), byte(0))
	f.Add(real.public[:40], real.private, byte(0), byte(7))
	f.Add(real.public, real.private, byte(1), byte(0))
	f.Fuzz(func(t *testing.T, public, private []byte, agreed, pcr byte) {
		s := *real
		s.public, s.private = public, private
		if agreed%2 == 1 {
			s.guard, s.point = Agreed, bytes.Repeat([]byte{4}, pointSize)
		}
		if pcr%24 != 0 {
			s.pcrs = 1 << (pcr % 24)
		}
		b, err := s.encode()
		if err != nil {
			return
		}
		dst := make([]byte, enclave.SecretSize)
		err = d.Unwrap(limited(t), b, testAAD, enclave.Auth{}, dst)
		switch {
		case err == nil && bytes.Equal(b, blob):
		case err == nil:
			t.Fatal("a blob that was never made opens")
		case !errors.Is(err, enclave.ErrCorrupt) && !errors.Is(err, enclave.ErrUnsupported) && !errors.Is(err, enclave.ErrPolicy):
			t.Fatal(err)
		case !bytes.Equal(dst, make([]byte, len(dst))):
			t.Fatal("the destination is not zero after an error")
		}
	})
}
