package pkix

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"errors"

	"github.com/decred/dcrd/dcrec/secp256k1/v4"
)

// Secp256k1 is the curve secp256k1 of SEC 2 section 2.4.1, as [ecdsa.PublicKey] has it. It is always the same value, so that curves can be
// compared. Its methods are for public values: their time depends on them.
func Secp256k1() elliptic.Curve {
	//lint:ignore SA1019 crypto/x509 and crypto/ecdsa know custom curves as elliptic.Curve only
	return secp256k1.S256()
}

// IsSecp256k1 reports whether a public key is an *ecdsa.PublicKey on the curve secp256k1.
func IsSecp256k1(public crypto.PublicKey) bool {
	key, ok := public.(*ecdsa.PublicKey)
	return ok && key.Curve == Secp256k1()
}

// secp256k1Prefix is the SubjectPublicKeyInfo of a key on secp256k1 up to its point: id-ecPublicKey with the curve 1.3.132.0.10, and
// the head of a BIT STRING for an uncompressed point (RFC 5480 section 2). The points all have one length.
var secp256k1Prefix = []byte{
	0x30, 0x56, 0x30, 0x10,
	0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x05, 0x2b, 0x81, 0x04, 0x00, 0x0a,
	0x03, 0x42, 0x00,
}

// secp256k1Point is the length of an uncompressed point in bytes.
const secp256k1Point = 65

var errPoint = errors.New("pkix: not a point of secp256k1 in uncompressed form")

// MarshalPublicKey encodes a public key as SubjectPublicKeyInfo in DER (RFC 5280 section 4.1.2.7): x509.MarshalPKIXPublicKey for keys
// of secp256k1 too.
func MarshalPublicKey(public crypto.PublicKey) ([]byte, error) {
	if !IsSecp256k1(public) {
		return x509.MarshalPKIXPublicKey(public)
	}
	point, err := Point(public.(*ecdsa.PublicKey))
	if err != nil {
		return nil, err
	}
	return append(bytes.Clone(secp256k1Prefix), point...), nil
}

// Point returns the public key as an uncompressed point (SEC 1 section 2.3.3): [ecdsa.PublicKey.Bytes] for secp256k1 too.
func Point(public *ecdsa.PublicKey) ([]byte, error) {
	if public.Curve != Secp256k1() {
		return public.Bytes()
	}
	//lint:ignore SA1019 ecdsa.PublicKey.Bytes does not take custom curves
	x, y := public.X, public.Y
	if x == nil || y == nil || x.Sign() < 0 || y.Sign() < 0 || x.BitLen() > 256 || y.BitLen() > 256 {
		return nil, errPoint
	}
	point := make([]byte, secp256k1Point)
	point[0] = 4
	x.FillBytes(point[1:33])
	y.FillBytes(point[33:])
	if _, err := secp256k1.ParsePubKey(point); err != nil {
		return nil, errPoint
	}
	return point, nil
}

// ParsePublicKey parses a SubjectPublicKeyInfo in DER: x509.ParsePKIXPublicKey for keys of secp256k1 too, which have to be encoded as
// MarshalPublicKey does it. Points off the curve are refused.
func ParsePublicKey(spki []byte) (crypto.PublicKey, error) {
	point, ok := bytes.CutPrefix(spki, secp256k1Prefix)
	if !ok {
		return x509.ParsePKIXPublicKey(spki)
	}
	return ParseSecp256k1(point)
}

// ParseSecp256k1 parses an uncompressed point of secp256k1 (SEC 1 section 2.3.4).
func ParseSecp256k1(point []byte) (*ecdsa.PublicKey, error) {
	if len(point) != secp256k1Point || point[0] != 4 { // the library takes hybrid points, too
		return nil, errPoint
	}
	public, err := secp256k1.ParsePubKey(point)
	if err != nil {
		return nil, errPoint
	}
	return public.ToECDSA(), nil
}
