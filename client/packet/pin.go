package packet

import (
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha512"
	"fmt"
)

// Sizes and bounds of data encrypted with a PIN.
const (
	pinSaltSize = 32 // bytes

	// PINIterations is MOSIP's default, and what its deployments use. The number is not part of the format: who decrypts
	// has to know it.
	PINIterations = 100_000

	// MaxPINIterations bounds what a caller can be made to compute.
	MaxPINIterations = 10_000_000

	maxPIN = 4096 // bytes
)

// EncryptWithPIN encrypts plaintext under a key derived from a PIN:
//
//	salt(32) nonce(12) ciphertext tag(16)
//
// The key is PBKDF2-HMAC-SHA512 of the PIN and the salt (RFC 8018 section 5.2), 256 bits; the cipher AES-256-GCM with the salt
// as additional data. A PIN that can be guessed is no protection: the iterations make a guess dearer, nothing more.
func EncryptWithPIN(pin, plaintext []byte, iterations int) ([]byte, error) {
	if len(plaintext) == 0 {
		return nil, fmt.Errorf("%w: empty plaintext", ErrFormat)
	}
	if len(plaintext) > MaxSize {
		return nil, fmt.Errorf("%w: %d bytes, at most %d", ErrTooLarge, len(plaintext), MaxSize)
	}
	out := make([]byte, pinSaltSize+nonceSize, pinSaltSize+nonceSize+len(plaintext)+tagSize)
	rand.Read(out)
	salt, nonce := out[:pinSaltSize], out[pinSaltSize:]
	key, err := pinKey(pin, salt, iterations)
	if err != nil {
		return nil, err
	}
	defer clear(key)
	aead, err := newGCM(key, nonceSize)
	if err != nil {
		return nil, err
	}
	return aead.Seal(out, nonce, plaintext, salt), nil
}

// DecryptWithPIN is the way back. A wrong PIN, another number of iterations and a changed ciphertext are the same
// [ErrDecryption].
func DecryptWithPIN(pin, sealed []byte, iterations int) ([]byte, error) {
	if len(sealed) > MaxSize+pinSaltSize+nonceSize+tagSize {
		return nil, fmt.Errorf("%w: %d bytes", ErrTooLarge, len(sealed))
	}
	if len(sealed) <= pinSaltSize+nonceSize+tagSize {
		return nil, fmt.Errorf("%w: %d bytes are too few for data encrypted with a PIN", ErrFormat, len(sealed))
	}
	salt, nonce := sealed[:pinSaltSize], sealed[pinSaltSize:pinSaltSize+nonceSize]
	key, err := pinKey(pin, salt, iterations)
	if err != nil {
		return nil, err
	}
	defer clear(key)
	aead, err := newGCM(key, nonceSize)
	if err != nil {
		return nil, err
	}
	plaintext, err := aead.Open(nil, nonce, sealed[pinSaltSize+nonceSize:], salt)
	if err != nil {
		return nil, ErrDecryption
	}
	return plaintext, nil
}

func pinKey(pin, salt []byte, iterations int) ([]byte, error) {
	if len(pin) == 0 || len(pin) > maxPIN {
		return nil, fmt.Errorf("%w: a PIN of %d bytes; 1 to %d", ErrFormat, len(pin), maxPIN)
	}
	if iterations < 1 || iterations > MaxPINIterations {
		return nil, fmt.Errorf("%w: %d iterations; 1 to %d", ErrFormat, iterations, MaxPINIterations)
	}
	return pbkdf2.Key(sha512.New, string(pin), salt, iterations, keySize)
}
