package packet

import (
	"bytes"
	"encoding/hex"
	"errors"
	"strings"
	"testing"
)

// TestMultibase has the tests of the multibase specification (multiformats/multibase, tests/test1.csv to test4.csv) and of
// draft-msporny-base58 section 5.
func TestMultibase(t *testing.T) {
	for _, v := range []struct{ raw, base58, base64 string }{
		{hex.EncodeToString([]byte("Decentralize everything!!")), "zUXE7GvtEk8XTXs1GF8HSGbVA9FCX9SEBPe", "uRGVjZW50cmFsaXplIGV2ZXJ5dGhpbmchIQ"},
		{hex.EncodeToString([]byte("yes mani !")), "z7paNL19xttacUY", "ueWVzIG1hbmkgIQ"},
		{hex.EncodeToString([]byte("\x00yes mani !")), "z17paNL19xttacUY", "uAHllcyBtYW5pICE"},
		{hex.EncodeToString([]byte("\x00\x00yes mani !")), "z117paNL19xttacUY", "uAAB5ZXMgbWFuaSAh"},
		{hex.EncodeToString([]byte("Hello World!")), "z2NEpo7TZRRrLZSi2U", "uSGVsbG8gV29ybGQh"},
		{hex.EncodeToString([]byte("The quick brown fox jumps over the lazy dog.")), "zUSm3fpXnKG5EUBx2ndxBDMPVciP5hGey2Jh4NDv6gmeo1LkMeiKrLJUUBk6Z",
			"uVGhlIHF1aWNrIGJyb3duIGZveCBqdW1wcyBvdmVyIHRoZSBsYXp5IGRvZy4"},
		{"0000287fb4cd", "z11233QC4", "uAAAof7TN"},
		{"", "z", "u"},
		{"00", "z1", "uAA"},
		{"ff", "z5Q", "u_w"},
	} {
		raw, err := hex.DecodeString(v.raw)
		if err != nil {
			t.Fatal(err)
		}
		for e, want := range map[Encoding]string{Base58BTC: v.base58, Base64URL: v.base64} {
			text, err := EncodeMultibase(e, raw)
			if err != nil || text != want {
				t.Errorf("%s of %s: %s, %v; want %s", e, v.raw, text, err, want)
			}
			got, err := DecodeMultibase(want)
			if err != nil || !bytes.Equal(got, raw) {
				t.Errorf("%s: %x, %v", want, got, err)
			}
		}
	}
	for _, text := range []string{"", "a", "Z1", "U_w", "f00", "z0", "zO", "zI", "zl", "z1 ", "z\n", "u=", "u_w==", "u_x", "u_", "u+w", "u/w", "u_\nw", "ué", "zé"} {
		if b, err := DecodeMultibase(text); !errors.Is(err, ErrFormat) {
			t.Errorf("%q: %x, %v", text, b, err)
		}
	}
	if _, err := EncodeMultibase("base32", nil); !errors.Is(err, ErrFormat) {
		t.Error(err)
	}
	if _, err := EncodeMultibase(Base58BTC, make([]byte, maxMultibase+1)); !errors.Is(err, ErrTooLarge) {
		t.Error(err)
	}
	for _, text := range []string{"z" + strings.Repeat("1", maxMultibase+1), "u" + strings.Repeat("A", maxMultibase/3*4+4), "z" + strings.Repeat("z", 2*maxMultibase+1)} {
		if _, err := DecodeMultibase(text); !errors.Is(err, ErrTooLarge) {
			t.Errorf("%d characters: %v", len(text), err)
		}
	}
	for _, e := range []Encoding{Base58BTC, Base64URL} {
		most := bytes.Repeat([]byte{0xff}, maxMultibase)
		text, err := EncodeMultibase(e, most)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := DecodeMultibase(text); err != nil || !bytes.Equal(got, most) {
			t.Errorf("%s of the most: %v", e, err)
		}
	}
}

// FuzzMultibase finds texts that are not what EncodeMultibase makes of the bytes that they stand for.
func FuzzMultibase(f *testing.F) {
	for _, seed := range []string{"z11233QC4", "uAAAof7TN", "z", "u", "zz", "u_x"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		b, err := DecodeMultibase(text)
		if err != nil {
			return
		}
		e := Base58BTC
		if text[0] == 'u' {
			e = Base64URL
		}
		if again, err := EncodeMultibase(e, b); err != nil || again != text {
			t.Fatalf("%q, then %q, %v", text, again, err)
		}
	})
}
