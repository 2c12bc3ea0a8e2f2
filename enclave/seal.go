package enclave

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"fmt"
)

// The outer form of every blob:
//
//	length of kind (1) | kind | version (1) | body | checksum (8)
//
// The checksum is the beginning of SHA-256 over all before it. It is no protection against anybody; it tells damage from a wrong key,
// which ask for different remedies.
const (
	blobCheck   = 8
	maxBlobKind = 32
)

// EncodeBlob puts a driver's body into the outer form.
func EncodeBlob(kind string, version uint8, body []byte) (Blob, error) {
	if len(kind) == 0 || len(kind) > maxBlobKind || len(body) > MaxBlob-maxBlobKind-2-blobCheck {
		return nil, fmt.Errorf("blob of kind %q with %d bytes: %w", kind, len(body), ErrUnsupported)
	}
	b := make(Blob, 0, 2+len(kind)+len(body)+blobCheck)
	b = append(b, byte(len(kind)))
	b = append(b, kind...)
	b = append(b, version)
	b = append(b, body...)
	sum := sha256.Sum256(b)
	return append(b, sum[:blobCheck]...), nil
}

// DecodeBlob takes a blob of the given kind apart. A damaged blob, or one of another kind, is ErrCorrupt. The body aliases b.
func DecodeBlob(kind string, b Blob) (version uint8, body []byte, err error) {
	if len(b) > MaxBlob || len(b) < 2+len(kind)+blobCheck {
		return 0, nil, &Error{Kind: ErrCorrupt, Detail: fmt.Sprintf("blob of %d bytes", len(b))}
	}
	data, check := b[:len(b)-blobCheck], b[len(b)-blobCheck:]
	sum := sha256.Sum256(data)
	if subtle.ConstantTimeCompare(sum[:blobCheck], check) != 1 {
		return 0, nil, &Error{Kind: ErrCorrupt, Detail: "checksum of the blob"}
	}
	if int(data[0]) != len(kind) || string(data[1:1+len(kind)]) != kind {
		return 0, nil, &Error{Kind: ErrCorrupt, Detail: "blob of another kind of enclave"}
	}
	return data[1+len(kind)], data[2+len(kind):], nil
}

// Sizes in bytes of a sealed secret: salt || nonce || ciphertext || tag.
const (
	sealSalt   = 32
	sealNonce  = 12
	sealTag    = 16
	SealedSize = sealSalt + sealNonce + SecretSize + sealTag
)

// Seal encrypts a slot secret under key, which must have at least 128 bits of entropy, by AES-256-GCM (SP 800-38D) with a key that
// HKDF-SHA256 (RFC 5869) derives from key, a fresh salt, the label of the driver and aad. It is for devices that only keep bytes and
// cannot bind associated data themselves. The result is SealedSize bytes.
func Seal(key []byte, label string, secret, aad []byte) ([]byte, error) {
	if len(secret) != SecretSize || len(aad) > MaxAAD {
		return nil, fmt.Errorf("secret of %d bytes with %d of associated data: %w", len(secret), len(aad), ErrUnsupported)
	}
	sealed := make([]byte, sealSalt+sealNonce, SealedSize)
	rand.Read(sealed)
	aead, err := sealCipher(key, sealed[:sealSalt], label, aad)
	if err != nil {
		return nil, err
	}
	return aead.Seal(sealed, sealed[sealSalt:], secret, aad), nil
}

// Open reverses Seal, straight into dst of SecretSize bytes. Whatever is wrong is ErrCorrupt: the key, the label, the associated data
// or the bytes. dst holds zeros then.
func Open(key []byte, label string, sealed, aad, dst []byte) error {
	if len(dst) != SecretSize || len(aad) > MaxAAD {
		return fmt.Errorf("destination of %d bytes with %d of associated data: %w", len(dst), len(aad), ErrUnsupported)
	}
	if len(sealed) != SealedSize {
		return &Error{Kind: ErrCorrupt, Detail: fmt.Sprintf("sealed secret of %d bytes", len(sealed))}
	}
	aead, err := sealCipher(key, sealed[:sealSalt], label, aad)
	if err != nil {
		return err
	}
	if _, err := aead.Open(dst[:0], sealed[sealSalt:sealSalt+sealNonce], sealed[sealSalt+sealNonce:], aad); err != nil {
		clear(dst)
		return &Error{Kind: ErrCorrupt, Detail: "authentication of the sealed secret"}
	}
	return nil
}

// sealCipher derives the single-use key. The label goes with its length, so that no label and associated data run into another pair.
func sealCipher(key, salt []byte, label string, aad []byte) (cipher.AEAD, error) {
	info := string(byte(len(label))) + label + string(aad)
	derived, err := hkdf.Key(sha256.New, key, salt, info, 32)
	if err != nil {
		return nil, err
	}
	defer clear(derived)
	c, err := aes.NewCipher(derived)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(c)
}
