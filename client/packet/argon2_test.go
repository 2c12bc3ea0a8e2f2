package packet

import (
	"bytes"
	"encoding/hex"
	"errors"
	"strings"
	"testing"

	"golang.org/x/crypto/argon2"
)

// TestArgon2Reference checks the function against the tests of the reference implementation (P-H-C/phc-winner-argon2, test.c,
// version 1.3). The vector of RFC 9106 section 5.3 has a secret and additional data, which MOSIP does not use and the package that
// computes the hash does not take from outside; its own tests have that one.
func TestArgon2Reference(t *testing.T) {
	for _, v := range []struct {
		passes, memory uint32
		lanes          uint8
		password, salt string
		want           string
	}{
		{2, 65536, 1, "password", "somesalt", "09316115d5cf24ed5a15a31a3ba326e5cf32edc24702987c02b6566f61913cf7"},
		{2, 256, 1, "password", "somesalt", "9dfeb910e80bad0311fee20f9c0e2b12c17987b4cac90c2ef54d5b3021c68bfe"},
		{2, 256, 2, "password", "somesalt", "6d093c501fd5999645e0ea3bf620d7b8be7fd2db59c20d9fff9539da2bf57037"},
	} {
		got := argon2.IDKey([]byte(v.password), []byte(v.salt), v.passes, v.memory, v.lanes, 32)
		if hex.EncodeToString(got) != v.want {
			t.Errorf("t=%d m=%d p=%d: %x, want %s", v.passes, v.memory, v.lanes, got, v.want)
		}
	}
}

func TestArgon2Hash(t *testing.T) {
	salt := []byte("0123456789abcdefghijklmn")
	got, err := Argon2Hash("identity é", salt)
	if err != nil {
		t.Fatal(err)
	}
	if want := argon2.IDKey([]byte("identity \xc3\xa9"), salt, 10, 65536, 2, 32); !bytes.Equal(got, want) {
		t.Errorf("%x, want %x", got, want)
	}
	for _, v := range []struct {
		text string
		salt []byte
		err  error
	}{
		{"", salt, ErrFormat},
		{"\xff", salt, ErrFormat},
		{strings.Repeat("x", maxArgon2Text+1), salt, ErrTooLarge},
		{"x", nil, ErrFormat},
		{"x", salt[:7], ErrFormat},
		{"x", make([]byte, maxArgon2Salt+1), ErrFormat},
	} {
		if _, err := Argon2Hash(v.text, v.salt); !errors.Is(err, v.err) {
			t.Errorf("%.10q with %d bytes of salt: %v", v.text, len(v.salt), err)
		}
	}
	if a, b := NewArgon2Salt(), NewArgon2Salt(); len(a) != 24 || bytes.Equal(a, b) {
		t.Errorf("salts %x and %x", a, b)
	}
}
