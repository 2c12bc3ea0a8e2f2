package pki

import (
	"bytes"
	"crypto"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha1"
	"encoding/asn1"
	"fmt"

	"github.com/kmsd-project/kmsd/client/pkix"
)

// Bounds of an RSA modulus in bits: below it is weak, above it costs too much to verify with.
const (
	minRSABits = 2048
	maxRSABits = 8192
)

// checkKey refuses public keys that kmsd does not put into certificates nor verify with. Errors wrap ErrKey.
func checkKey(public crypto.PublicKey) error {
	switch key := public.(type) {
	case *rsa.PublicKey:
		if bits := key.N.BitLen(); bits < minRSABits || bits > maxRSABits {
			return fmt.Errorf("%w: an RSA modulus has %d to %d bits", ErrKey, minRSABits, maxRSABits)
		}
		if key.E < 3 || key.E&1 == 0 || key.E > 1<<31-1 || key.N.Bit(0) == 0 {
			return fmt.Errorf("%w: an RSA exponent is odd, 3 to 2^31-1, and the modulus odd", ErrKey)
		}
		return nil
	case *ecdsa.PublicKey:
		switch key.Curve {
		case elliptic.P256(), elliptic.P384(), elliptic.P521(), pkix.Secp256k1():
			return nil
		}
	case ed25519.PublicKey, *ecdh.PublicKey:
		return nil
	}
	return fmt.Errorf("%w: RSA, P-256, P-384, P-521, secp256k1, Ed25519 and X25519 are", ErrKey)
}

// sameKey compares two public keys by their encodings.
func sameKey(a, b crypto.PublicKey) bool {
	one, err1 := pkix.MarshalPublicKey(a)
	two, err2 := pkix.MarshalPublicKey(b)
	return err1 == nil && err2 == nil && bytes.Equal(one, two)
}

// keyID returns the subject key identifier: SHA-1 of the key bits (RFC 5280 section 4.2.1.2 method 1), as MOSIP, openssl and most authorities
// make it. Certificates of one key by different issuers then have the same identifier, and what they issued names it as the authority key
// identifier: verifiers such as openssl refuse a certificate whose issuer has another one. Nothing is protected by it.
func keyID(public crypto.PublicKey) ([]byte, error) {
	spki, err := pkix.MarshalPublicKey(public)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrKey, err)
	}
	var info struct {
		Algorithm asn1.RawValue
		Key       asn1.BitString
	}
	if _, err := asn1.Unmarshal(spki, &info); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrKey, err)
	}
	sum := sha1.Sum(info.Key.Bytes)
	return sum[:], nil
}
