package packet

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"fmt"
)

const (
	zkIndexSize = 4
	maxZK       = 1 << 20 // bytes of one attribute
)

// EncryptAttribute encrypts one attribute of a person for MOSIP's zero-knowledge database:
//
//	index(4, big endian) nonce(12) additional data(32) ciphertext tag(16)
//
// random is the AES-256 key with this index, of which MOSIP keeps ten thousand; the attribute's own key is derived from it and
// the person's id, so that who has the database and the random keys still has to know whom to ask for.
func EncryptAttribute(random [32]byte, index uint32, id string, plaintext []byte) ([]byte, error) {
	if len(plaintext) == 0 {
		return nil, fmt.Errorf("%w: empty plaintext", ErrFormat)
	}
	if len(plaintext) > maxZK {
		return nil, fmt.Errorf("%w: attribute of %d bytes, at most %d", ErrTooLarge, len(plaintext), maxZK)
	}
	aead, err := attributeAEAD(random, id)
	if err != nil {
		return nil, err
	}
	const before = zkIndexSize + nonceSize + aadSize
	out := make([]byte, before, before+len(plaintext)+tagSize)
	binary.BigEndian.PutUint32(out, index)
	rand.Read(out[zkIndexSize:])
	return aead.Seal(out, out[zkIndexSize:zkIndexSize+nonceSize], plaintext, out[zkIndexSize+nonceSize:]), nil
}

// AttributeIndex returns which random key an attribute needs.
func AttributeIndex(sealed []byte) (uint32, error) {
	if len(sealed) > maxZK+128 {
		return 0, fmt.Errorf("%w: attribute of %d bytes", ErrTooLarge, len(sealed))
	}
	if len(sealed) <= zkIndexSize+nonceSize+aadSize+tagSize {
		return 0, fmt.Errorf("%w: %d bytes are too few for an attribute", ErrFormat, len(sealed))
	}
	return binary.BigEndian.Uint32(sealed), nil
}

// DecryptAttribute is the way back from EncryptAttribute.
func DecryptAttribute(random [32]byte, id string, sealed []byte) ([]byte, error) {
	if _, err := AttributeIndex(sealed); err != nil {
		return nil, err
	}
	aead, err := attributeAEAD(random, id)
	if err != nil {
		return nil, err
	}
	b := sealed[zkIndexSize:]
	plaintext, err := aead.Open(nil, b[:nonceSize], b[nonceSize+aadSize:], b[nonceSize:nonceSize+aadSize])
	if err != nil {
		return nil, ErrDecryption
	}
	return plaintext, nil
}

// attributeAEAD derives an attribute's key: the two blocks of the SHA-256 of the id, each encrypted by itself under the
// random key. This ECB is a derivation from one value, never a cipher for data.
func attributeAEAD(random [32]byte, id string) (cipher.AEAD, error) {
	key, err := attributeKey(random, id)
	if err != nil {
		return nil, err
	}
	defer clear(key[:])
	return newGCM(key[:], nonceSize)
}

func attributeKey(random [32]byte, id string) (key [32]byte, err error) {
	block, err := aes.NewCipher(random[:])
	if err != nil {
		return key, err
	}
	sum := sha256.Sum256([]byte(id))
	ecb(block.Encrypt, &key, &sum)
	return key, nil
}

// WrapRandomKey encrypts a random key under the zero-knowledge master key, as MOSIP's table data_encrypt_keystore has it.
// The key is random, so that ECB shows nothing of it; nothing authenticates it either.
func WrapRandomKey(master, random [32]byte) (wrapped [32]byte, err error) {
	block, err := aes.NewCipher(master[:])
	if err != nil {
		return wrapped, err
	}
	ecb(block.Encrypt, &wrapped, &random)
	return wrapped, nil
}

// UnwrapRandomKey is the way back. With another master key it returns another random key, not an error.
func UnwrapRandomKey(master, wrapped [32]byte) (random [32]byte, err error) {
	block, err := aes.NewCipher(master[:])
	if err != nil {
		return random, err
	}
	ecb(block.Decrypt, &random, &wrapped)
	return random, nil
}

func ecb(crypt func(dst, src []byte), dst, src *[32]byte) {
	crypt(dst[:aes.BlockSize], src[:aes.BlockSize])
	crypt(dst[aes.BlockSize:], src[aes.BlockSize:])
}

// SealRandomKey encrypts a random key for another application, as the parts of MOSIP's encryptedRandomKey are: the SHA-256 of the receiver's
// certificate in DER and an RSA-OAEP block, as in a payload.
func SealRandomKey(certificate *x509.Certificate, random [32]byte) ([]byte, error) {
	to, err := newRecipient(certificate)
	if err != nil {
		return nil, err
	}
	wrapped, err := to.wrap(random[:])
	if err != nil {
		return nil, err
	}
	return append(to.thumbprint[:], wrapped...), nil
}

// SplitRandomKey takes such a part apart.
func SplitRandomKey(sealed []byte) (thumbprint [32]byte, wrapped []byte, err error) {
	switch len(sealed) - len(thumbprint) {
	case 256, 384, 512:
		return [32]byte(sealed), sealed[len(thumbprint):], nil
	}
	return thumbprint, nil, fmt.Errorf("%w: %d bytes are no encrypted random key", ErrFormat, len(sealed))
}
