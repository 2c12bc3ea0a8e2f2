package mechanism

import (
	"bytes"
	"crypto"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/hkdf"
	"crypto/rsa"
	"crypto/sha256"
	"fmt"
	"hash"

	"github.com/kmsd-project/kmsd/client/pkix"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// MaxSPKI bounds a SubjectPublicKeyInfo from outside, in bytes. An RSA modulus of MaxRSABits makes one of 1,062.
const MaxSPKI = 2048

// MaxDerived is the longest output of HKDF-SHA256 in bytes (RFC 5869 section 2.3).
const MaxDerived = 255 * sha256.Size

// ParseSPKI parses a DER SubjectPublicKeyInfo into one of the types that Key.Public returns, for NIST curves and secp256k1 always
// *ecdsa.PublicKey. Only the algorithms of this package and canonical encodings are taken. Errors wrap ErrInput.
func ParseSPKI(spki []byte) (crypto.PublicKey, error) {
	if len(spki) > MaxSPKI {
		return nil, fmt.Errorf("%w: public key longer than %d bytes", ErrInput, MaxSPKI)
	}
	public, err := pkix.ParsePublicKey(spki)
	if err != nil {
		return nil, fmt.Errorf("%w: not a SubjectPublicKeyInfo", ErrInput)
	}
	switch key := public.(type) {
	case *rsa.PublicKey:
		err = checkRSAPublic(key)
	case *ecdsa.PublicKey:
		_, err = curveSize(key.Curve)
	}
	if err != nil {
		return nil, err
	}
	if again, err := pkix.MarshalPublicKey(public); err != nil || !bytes.Equal(again, spki) {
		return nil, fmt.Errorf("%w: not a SubjectPublicKeyInfo in DER", ErrInput)
	}
	return public, nil
}

// Agree runs Diffie-Hellman with the public key of a peer, a DER SubjectPublicKeyInfo on the key's own curve, and returns
// the shared secret Z (SP 800-56A section 5.7.1.2, RFC 7748 section 6.1). Points off the curve and an all-zero X25519 secret
// are refused. Z is not a key: put it through HKDF. Errors wrap ErrInput or ErrUnsupported.
func (k *Key) Agree(peerSPKI []byte) ([]byte, error) {
	if k.row.Kind != KindECDH {
		return nil, k.unsupported("agree")
	}
	public, err := ParseSPKI(peerSPKI)
	if err != nil {
		return nil, err
	}
	var peer *ecdh.PublicKey
	switch key := public.(type) {
	case *ecdh.PublicKey:
		peer = key
	case *ecdsa.PublicKey:
		if peer, err = key.ECDH(); err != nil {
			return nil, fmt.Errorf("%w: the peer's point is not on the curve", ErrInput)
		}
	}
	if peer == nil || peer.Curve() != k.row.curve.ecdh {
		return nil, fmt.Errorf("%w: the peer's key is not of %s", ErrInput, k.row.Algorithm)
	}
	if k.device != nil {
		return k.do(nil, Request{Usage: keyspec.Agree, Input: peerSPKI}, k.row.size)
	}
	secret, err := k.ecdh.ECDH(peer)
	if err != nil {
		return nil, fmt.Errorf("%w: the peer's key gives no secret", ErrInput)
	}
	return secret, nil
}

// Derive returns n bytes of HKDF-SHA256 (RFC 5869) of an HKDF key; n is 1 to MaxDerived. Errors wrap ErrInput or
// ErrUnsupported.
func (k *Key) Derive(salt, info []byte, n int) ([]byte, error) {
	if k.row.Kind != KindHKDF || k.device != nil {
		return nil, k.unsupported("derive")
	}
	return HKDF(k.secret, salt, info, n)
}

// HKDF returns n bytes of HKDF-SHA256 (RFC 5869) of secret; n is 1 to MaxDerived. Errors wrap ErrInput.
func HKDF(secret, salt, info []byte, n int) ([]byte, error) {
	return derive(sha256.New, secret, salt, info, n)
}

func derive[H hash.Hash](h func() H, secret, salt, info []byte, n int) ([]byte, error) {
	if n < 1 || n > MaxDerived {
		return nil, fmt.Errorf("%w: HKDF makes 1 to %d bytes", ErrInput, MaxDerived)
	}
	out, err := hkdf.Key(h, secret, salt, string(info), n)
	if err != nil {
		return nil, fmt.Errorf("%w: HKDF: %w", ErrInput, err)
	}
	return out, nil
}
