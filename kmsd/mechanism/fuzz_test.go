package mechanism

import (
	"bytes"
	"crypto/aes"
	"testing"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// FuzzImport: what a row imports it can load and export, and imports again to the same.
func FuzzImport(f *testing.F) {
	var rows []*Row
	for _, row := range Table() {
		if row.Algorithm == keyspec.RSA3072 || row.Algorithm == keyspec.RSA4096 {
			continue // the code of RSA-2048, at a fraction of its speed
		}
		encoded, err := row.Export(unhex(f, row.known.material))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(uint8(len(rows)), encoded)
		rows = append(rows, row)
	}
	f.Fuzz(func(t *testing.T, i uint8, encoded []byte) {
		row := rows[int(i)%len(rows)]
		material, err := row.Import(encoded)
		if err != nil {
			return
		}
		if _, err := row.Load(material); err != nil {
			t.Fatal(err)
		}
		again, err := row.Export(material)
		if err != nil {
			t.Fatal(err)
		}
		if back, err := row.Import(again); err != nil || !bytes.Equal(back, material) {
			t.Fatal("other material", err)
		}
	})
}

// FuzzSignatureEncoding: DER and r || s are one to one.
func FuzzSignatureEncoding(f *testing.F) {
	f.Add([]byte{0x30, 6, 2, 1, 1, 2, 1, 1}, uint8(32))
	f.Add(bytes.Repeat([]byte{0xff}, 132), uint8(66))
	f.Fuzz(func(t *testing.T, data []byte, n uint8) {
		size := int(n)
		if raw, err := AppendP1363(nil, data, size); err == nil {
			if len(raw) != 2*size {
				t.Fatalf("%d bytes", len(raw))
			}
			if der, err := AppendDER(nil, raw, size); size <= 66 && (err != nil || !bytes.Equal(der, data)) {
				t.Fatalf("%x became %x: %v", data, der, err)
			}
		}
		if der, err := AppendDER(nil, data, size); err == nil {
			if raw, err := AppendP1363(nil, der, size); err != nil || !bytes.Equal(raw, data) {
				t.Fatalf("%x became %x: %v", data, raw, err)
			}
		}
	})
}

func FuzzDigestInfo(f *testing.F) {
	for _, known := range digestInfoPrefixes {
		f.Add(append(bytes.Clone(known.prefix), make([]byte, Digest(known.scheme).Size())...))
	}
	f.Fuzz(func(t *testing.T, der []byte) {
		scheme, digest, err := ParseDigestInfo(der)
		if err == nil && (len(digest) != Digest(scheme).Size() || !bytes.HasSuffix(der, digest)) {
			t.Fatalf("%x is %s of %x", der, scheme, digest)
		}
	})
}

// FuzzUnwrapPadded: whatever opens is what wrapping makes.
func FuzzUnwrapPadded(f *testing.F) {
	block, err := aes.NewCipher(make([]byte, 16))
	if err != nil {
		f.Fatal(err)
	}
	for _, n := range []int{1, 7, 8, 9, 16, 40} {
		wrapped, err := WrapPadded(nil, block, make([]byte, n))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(wrapped, true)
		f.Add(wrapped, false)
	}
	f.Fuzz(func(t *testing.T, data []byte, plain bool) {
		wrapped := data
		if plain { // let the fuzzer write the unwrapped bytes: it cannot invert AES
			if len(data) < 16 || len(data)%8 != 0 || len(data) > 1024 {
				return
			}
			wrapped = bytes.Clone(data)
			if len(wrapped) == 16 {
				block.Encrypt(wrapped, wrapped)
			} else {
				wrapBlocks(block, wrapped)
			}
		}
		plaintext, err := UnwrapPadded(nil, block, wrapped)
		if err != nil {
			return
		}
		if again, err := WrapPadded(nil, block, plaintext); err != nil || !bytes.Equal(again, wrapped) {
			t.Fatalf("%x wraps to %x: %v", plaintext, again, err)
		}
	})
}

// FuzzParseSPKI: a peer's key is refused or usable, and never makes Agree panic.
func FuzzParseSPKI(f *testing.F) {
	var keys []*Key
	for _, row := range Table() {
		key := fixed(f, row.Algorithm)
		if spki, err := key.SPKI(); err == nil {
			f.Add(spki)
		}
		if row.Kind == KindECDH {
			keys = append(keys, key)
		}
	}
	f.Fuzz(func(t *testing.T, spki []byte) {
		public, err := ParseSPKI(spki)
		for _, key := range keys {
			secret, agreed := key.Agree(spki)
			if agreed == nil && (err != nil || len(secret) < 32) {
				t.Fatalf("agreed on %d bytes with a key that does not parse: %v", len(secret), err)
			}
		}
		if err == nil {
			Verify(public, keyspec.ECDSASHA256, DER, Input{}, spki)
		}
	})
}
