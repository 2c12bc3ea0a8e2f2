package keystore

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"

	"github.com/kmsd-project/kmsd/keystore/secmem"
)

const (
	keySize      = 32
	sealOverhead = 12 + 16 // nonce and tag
)

// newGCM returns AES-256-GCM (NIST SP 800-38D) that puts a random nonce before each ciphertext.
func newGCM(key []byte) cipher.AEAD {
	block, err := aes.NewCipher(key)
	if err != nil {
		panic("keystore: " + err.Error())
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		panic("keystore: " + err.Error())
	}
	return aead
}

// derive writes HKDF-Expand(SHA-256, key, info) (RFC 5869 section 2.3) to dst. The key is uniformly random, so no extraction is
// needed.
func derive(dst, key []byte, info string) {
	out, err := hkdf.Expand(sha256.New, key, info, len(dst))
	if err != nil {
		panic("keystore: " + err.Error())
	}
	copy(dst, out)
	clear(out)
}

// deriveBuffer is derive into protected memory.
func deriveBuffer(a *secmem.Arena, key []byte, info string) (*secmem.Buffer, error) {
	b, err := a.Alloc(keySize)
	if err != nil {
		return nil, err
	}
	derive(b.Bytes(), key, info)
	return b, nil
}

// mac returns HMAC-SHA-256 over the concatenation of parts.
func mac(key []byte, parts ...[]byte) [32]byte {
	h := hmac.New(sha256.New, key)
	for _, p := range parts {
		h.Write(p)
	}
	var out [32]byte
	h.Sum(out[:0])
	return out
}

func sameMAC(a, b []byte) bool { return hmac.Equal(a, b) }

// random fills dst. crypto/rand.Read never fails.
func random(dst []byte) { rand.Read(dst) }
