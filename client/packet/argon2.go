package packet

import (
	"crypto/rand"
	"fmt"
	"unicode/utf8"

	"golang.org/x/crypto/argon2"
)

// The parameters of MOSIP's generateArgon2Hash, which are no part of what it answers.
const (
	argon2Passes  = 10
	argon2Memory  = 64 << 10 // KiB
	argon2Lanes   = 2
	argon2Size    = 32 // bytes
	argon2NewSalt = 24 // bytes, the length that MOSIP's own salts have
)

// Bounds in bytes.
const (
	minArgon2Salt = 8 // RFC 9106 section 3.1
	maxArgon2Salt = 1 << 10
	maxArgon2Text = 1 << 20
)

// Argon2Hash is MOSIP's hash of a text: Argon2id version 1.3 (RFC 9106) over its UTF-8, with ten passes over 64 MiB of memory and
// two lanes, 32 bytes. It takes that memory, and some hundred milliseconds, on every call. MOSIP writes hash and salt in base64url.
func Argon2Hash(text string, salt []byte) ([]byte, error) {
	switch {
	case text == "":
		return nil, fmt.Errorf("%w: nothing to hash", ErrFormat)
	case len(text) > maxArgon2Text:
		return nil, fmt.Errorf("%w: %d bytes to hash, at most %d", ErrTooLarge, len(text), maxArgon2Text)
	case !utf8.ValidString(text):
		return nil, fmt.Errorf("%w: what is hashed is no UTF-8", ErrFormat)
	case len(salt) < minArgon2Salt || len(salt) > maxArgon2Salt:
		return nil, fmt.Errorf("%w: a salt of %d bytes; %d to %d", ErrFormat, len(salt), minArgon2Salt, maxArgon2Salt)
	}
	return argon2.IDKey([]byte(text), salt, argon2Passes, argon2Memory, argon2Lanes, argon2Size), nil
}

// NewArgon2Salt returns a salt for [Argon2Hash]: 24 random bytes. MOSIP encrypts a counter that begins anew with each process.
func NewArgon2Salt() []byte {
	salt := make([]byte, argon2NewSalt)
	rand.Read(salt)
	return salt
}
