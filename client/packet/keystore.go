package packet

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"fmt"
)

// maxPrivateKey bounds a private key in PKCS#8, in bytes; one of RSA-4096 has about 2,400.
const maxPrivateKey = 8 << 10

// WrapPrivateKey encrypts the private key of a base key, in PKCS#8, as MOSIP's table key_store has it:
//
//	wrapped key splitter ciphertext tag(16) nonce(16)
//
// There is no additional data and no thumbprint: nothing in it says whose key it is, nor that it is this row's. It is for
// handing keys to MOSIP, not for keeping them.
func WrapPrivateKey(module *rsa.PublicKey, pkcs8 []byte) ([]byte, error) {
	if len(pkcs8) == 0 || len(pkcs8) > maxPrivateKey {
		return nil, fmt.Errorf("%w: private key of %d bytes; 1 to %d", ErrFormat, len(pkcs8), maxPrivateKey)
	}
	switch module.Size() {
	case 256, 384, 512:
	default:
		return nil, fmt.Errorf("%w: RSA of %d bits; 2048, 3072 or 4096", ErrCertificate, module.N.BitLen())
	}
	key, nonce := make([]byte, keySize), make([]byte, longIVSize)
	defer clear(key)
	rand.Read(key)
	rand.Read(nonce)
	wrapped, err := rsa.EncryptOAEP(sha256.New(), rand.Reader, module, key, nil)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrCertificate, err)
	}
	aead, err := newGCM(key, longIVSize)
	if err != nil {
		return nil, err
	}
	out := append(wrapped, splitter...)
	out = aead.Seal(out, nonce, pkcs8, nil)
	return append(out, nonce...), nil
}

// CheckPrivateKey reports whether blob has the form that WrapPrivateKey gives it under this module key. Whether it opens shows when it is opened.
func CheckPrivateKey(module *rsa.PublicKey, blob []byte) error {
	p, err := splitPrivateKey(blob)
	if err == nil && len(p.wrapped) != module.Size() {
		err = fmt.Errorf("%w: wrapped by a key of %d bits, where the module key has %d", ErrFormat, len(p.wrapped)*8, module.Size()*8)
	}
	return err
}

// splitPrivateKey takes a wrapped private key apart.
func splitPrivateKey(blob []byte) (parts, error) {
	if len(blob) > maxPrivateKey+1024 {
		return parts{}, fmt.Errorf("%w: %d bytes", ErrTooLarge, len(blob))
	}
	p, err := split(blob)
	if err != nil {
		return p, err
	}
	if p.version2 || p.thumbprint != [32]byte{} {
		return p, fmt.Errorf("%w: a payload where a wrapped private key is expected", ErrFormat)
	}
	if len(p.body) <= tagSize+longIVSize {
		return p, fmt.Errorf("%w: %d bytes after the splitter are too few", ErrFormat, len(p.body))
	}
	return p, nil
}

// UnwrapPrivateKey is the way back; u has the module key. The caller wipes the result.
func UnwrapPrivateKey(ctx context.Context, u Unwrapper, blob []byte) ([]byte, error) {
	p, err := splitPrivateKey(blob)
	if err != nil {
		return nil, err
	}
	end := len(p.body) - longIVSize
	return p.open(ctx, u, nil, p.body[:end], p.body[end:], nil)
}
