package mechanism

import (
	"bytes"
	"crypto"
	"crypto/aes"
	"encoding/hex"
	"errors"
	"testing"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// TestKeyWrapRFC3394 runs section 4 of RFC 3394.
func TestKeyWrapRFC3394(t *testing.T) {
	const kek = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"
	const data = "00112233445566778899aabbccddeeff000102030405060708090a0b0c0d0e0f"
	for _, c := range []struct {
		kek, data int // bytes
		wrapped   string
	}{
		{16, 16, "1fa68b0a8112b447aef34bd8fb5a7b829d3e862371d2cfe5"},
		{24, 16, "96778b25ae6ca435f92b5b97c050aed2468ab8a17ad84e5d"},
		{32, 16, "64e8c3f9ce0f5ba263e9777905818a2a93c8191e7d6e8ae7"},
		{24, 24, "031d33264e15d33268f24ec260743edce1c6c7ddee725a936ba814915c6762d2"},
		{32, 24, "a8f9bc1612c68b3ff6e6f4fbe30e71e4769c8b80a32cb8958cd5d17d6b254da1"},
		{32, 32, "28c9f404c4b810f4cbccb35cfb87f8263f5786e2d80ed326cbc7f0e71a99f43bfb988b9b7a02dd21"},
	} {
		block, err := aes.NewCipher(unhex(t, kek)[:c.kek])
		if err != nil {
			t.Fatal(err)
		}
		plaintext := unhex(t, data)[:c.data]
		wrapped, err := WrapKey(nil, block, plaintext)
		if err != nil || hex.EncodeToString(wrapped) != c.wrapped {
			t.Errorf("%d bytes under %d: %x, %v", c.data, c.kek, wrapped, err)
		}
		got, err := UnwrapKey(nil, block, unhex(t, c.wrapped))
		if err != nil || !bytes.Equal(got, plaintext) {
			t.Errorf("%d bytes under %d: %x, %v", c.data, c.kek, got, err)
		}
	}
}

// TestKeyWrapRFC5649 runs section 6 of RFC 5649.
func TestKeyWrapRFC5649(t *testing.T) {
	block, err := aes.NewCipher(unhex(t, "5840df6e29b02af1ab493b705bf16ea1ae8338f4dcc176a8"))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ key, wrapped string }{
		{"c37b7e6492584340bed12207808941155068f738", "138bdeaa9b8fa7fc61f97742e72248ee5ae6ae5360d1ae6a5f54f373fa543b6a"},
		{"466f7250617369", "afbeb0f07dfbf5419200f2ccb50bb24f"},
	} {
		wrapped, err := WrapPadded(nil, block, unhex(t, c.key))
		if err != nil || hex.EncodeToString(wrapped) != c.wrapped {
			t.Errorf("%s: %x, %v", c.key, wrapped, err)
		}
		got, err := UnwrapPadded(nil, block, unhex(t, c.wrapped))
		if err != nil || hex.EncodeToString(got) != c.key {
			t.Errorf("%s: %x, %v", c.key, got, err)
		}
	}
}

// TestKeyWrapEveryLength wraps all lengths, and flips every bit of what comes out.
func TestKeyWrapEveryLength(t *testing.T) {
	block, err := aes.NewCipher(make([]byte, 32))
	if err != nil {
		t.Fatal(err)
	}
	for n := 1; n <= 40; n++ {
		plaintext := randomBytes(n)
		wrapped, err := WrapPadded(nil, block, plaintext)
		if err != nil || len(wrapped) != 8+(n+7)/8*8 {
			t.Fatalf("%d bytes: %d, %v", n, len(wrapped), err)
		}
		if got, err := UnwrapPadded(nil, block, wrapped); err != nil || !bytes.Equal(got, plaintext) {
			t.Fatalf("%d bytes: %x, %v", n, got, err)
		}
		for bit := range 8 * len(wrapped) {
			bad := bytes.Clone(wrapped)
			bad[bit/8] ^= 1 << (bit % 8)
			if _, err := UnwrapPadded(nil, block, bad); !errors.Is(err, ErrDecryption) {
				t.Fatalf("%d bytes, bit %d: %v", n, bit, err)
			}
		}
	}
	for _, n := range []int{0, MaxWrapped + 1} {
		if _, err := WrapPadded(nil, block, make([]byte, n)); !errors.Is(err, ErrInput) {
			t.Errorf("KWP of %d bytes: %v", n, err)
		}
	}
	for _, n := range []int{0, 8, 15, 17, MaxWrapped + 8} {
		if _, err := WrapKey(nil, block, make([]byte, n)); !errors.Is(err, ErrInput) {
			t.Errorf("KW of %d bytes: %v", n, err)
		}
	}
	for _, n := range []int{0, 8, 15, 17, 23, MaxWrapped + 16} {
		_, err1 := UnwrapPadded(nil, block, make([]byte, n))
		_, err2 := UnwrapKey(nil, block, make([]byte, n))
		if !errors.Is(err1, ErrDecryption) || !errors.Is(err2, ErrDecryption) {
			t.Errorf("unwrap of %d bytes: %v, %v", n, err1, err2)
		}
	}
}

// TestKeyWrapForgedLength makes wrappings whose constant is right and whose length or padding is not.
func TestKeyWrapForgedLength(t *testing.T) {
	block, err := aes.NewCipher(make([]byte, 16))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		head string
		body int // bytes, all zero but the first
		good bool
	}{
		{"a65959a600000010", 16, true},
		{"a65959a600000009", 16, true},
		{"a65959a600000008", 16, false},
		{"a65959a600000011", 16, false},
		{"a65959a600000000", 16, false},
		{"a65959a6ffffffff", 16, false},
		{"a65959a680000010", 16, false},
		{"a65959a700000010", 16, false},
		{"265959a600000010", 16, false},
		{"a65959a600000008", 8, true},
		{"a65959a600000001", 8, true},
		{"a65959a600000000", 8, false},
		{"a65959a600000009", 8, false},
	} {
		work := append(unhex(t, c.head), make([]byte, c.body)...)
		work[8] = 1
		if len(work) == 16 {
			block.Encrypt(work, work)
		} else {
			wrapBlocks(block, work)
		}
		if _, err := UnwrapPadded(nil, block, work); (err == nil) != c.good {
			t.Errorf("%s with %d bytes: %v", c.head, c.body, err)
		}
	}
	// A padding byte that is not zero.
	work := append(unhex(t, "a65959a600000009"), make([]byte, 16)...)
	work[23] = 1
	wrapBlocks(block, work)
	if _, err := UnwrapPadded(nil, block, work); !errors.Is(err, ErrDecryption) {
		t.Errorf("padding that is not zero: %v", err)
	}
}

// TestHMACRFC4231 runs section 4 of RFC 4231 (test cases 1 and 2).
func TestHMACRFC4231(t *testing.T) {
	for _, c := range []struct {
		key, data string
		hash      crypto.Hash
		algorithm keyspec.Algorithm
		want      string
	}{
		{"0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b", hex.EncodeToString([]byte("Hi There")), crypto.SHA256, keyspec.HMACSHA256,
			"b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7"},
		{"0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b", hex.EncodeToString([]byte("Hi There")), crypto.SHA384, keyspec.HMACSHA384,
			"afd03944d84895626b0825f4ab46907f15f9dadbe4101ec682aa034c7cebc59cfaea9ea9076ede7f4af152e8b2fa9cb6"},
		{"0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b", hex.EncodeToString([]byte("Hi There")), crypto.SHA512, keyspec.HMACSHA512,
			"87aa7cdea5ef619d4ff0b4241a1d6cb02379f4e2ce4ec2787ad0b30545e17cdedaa833b7d6b8a702038b274eaea3f4e4be9d914eeb61f1702e696c203a126854"},
		{hex.EncodeToString([]byte("Jefe")), hex.EncodeToString([]byte("what do ya want for nothing?")), crypto.SHA256, keyspec.HMACSHA256,
			"5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"},
	} {
		row := lookup(t, c.algorithm)
		if row.hash != c.hash {
			t.Fatalf("%s uses %v", row.Algorithm, row.hash)
		}
		key := &Key{row: row, secret: unhex(t, c.key)}
		got, err := key.MAC(nil, unhex(t, c.data))
		if err != nil || hex.EncodeToString(got) != c.want {
			t.Errorf("%s: %x, %v", row.Algorithm, got, err)
		}
	}
}

// TestHKDFRFC5869 runs the SHA-256 cases of appendix A of RFC 5869.
func TestHKDFRFC5869(t *testing.T) {
	sequence := func(from, to int) []byte {
		var b []byte
		for i := from; i <= to; i++ {
			b = append(b, byte(i))
		}
		return b
	}
	for _, c := range []struct {
		ikm, salt, info []byte
		want            string
	}{
		{bytes.Repeat([]byte{0x0b}, 22), sequence(0, 0x0c), sequence(0xf0, 0xf9),
			"3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"},
		{sequence(0, 0x4f), sequence(0x60, 0xaf), sequence(0xb0, 0xff),
			"b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c59045a99cac7827271cb41c65e590e09da3275600c2f09b8367793a9aca3db71cc30c58179ec3e87c14c01d5c1f3434f1d87"},
		{bytes.Repeat([]byte{0x0b}, 22), nil, nil,
			"8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8"},
	} {
		got, err := HKDF(c.ikm, c.salt, c.info, len(c.want)/2)
		if err != nil || hex.EncodeToString(got) != c.want {
			t.Errorf("%x, %v", got, err)
		}
	}
}
