package tpm

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"

	"github.com/google/go-tpm/tpm2"
)

// publicKey is the public key in a public area, nil for an HMAC key. Unlike go-tpm's Pub it checks that a point is on its curve (TPM 2.0 part 2 section 12.2.4).
func publicKey(p *tpm2.TPMTPublic) (crypto.PublicKey, error) {
	switch p.Type {
	case tpm2.TPMAlgRSA:
		parameters, err := p.Parameters.RSADetail()
		if err != nil {
			return nil, err
		}
		modulus, err := p.Unique.RSA()
		if err != nil {
			return nil, err
		}
		k := &rsa.PublicKey{N: new(big.Int).SetBytes(modulus.Buffer), E: int(parameters.Exponent)}
		if k.E == 0 {
			k.E = 65537 // part 2 section 12.2.3.5: zero says the default
		}
		if k.N.BitLen() != int(parameters.KeyBits) || k.E != 65537 {
			return nil, fmt.Errorf("RSA key of %d bits with the exponent %d", k.N.BitLen(), k.E)
		}
		return k, nil
	case tpm2.TPMAlgKeyedHash:
		return nil, nil
	case tpm2.TPMAlgECC:
		parameters, err := p.Parameters.ECCDetail()
		if err != nil {
			return nil, err
		}
		point, err := p.Unique.ECC()
		if err != nil {
			return nil, err
		}
		c := curveOf(parameters.CurveID)
		if c == nil {
			return nil, fmt.Errorf("curve %#x", uint16(parameters.CurveID))
		}
		size := (c.Params().BitSize + 7) / 8
		if len(point.X.Buffer) > size || len(point.Y.Buffer) > size {
			return nil, errors.New("point with long coordinates")
		}
		uncompressed := append([]byte{4}, leftPad(point.X.Buffer, size)...)
		return ecdsa.ParseUncompressedPublicKey(c, append(uncompressed, leftPad(point.Y.Buffer, size)...))
	}
	return nil, fmt.Errorf("public area of type %#x", uint16(p.Type))
}

func curveOf(id tpm2.TPMECCCurve) elliptic.Curve {
	switch id {
	case tpm2.TPMECCNistP256:
		return elliptic.P256()
	case tpm2.TPMECCNistP384:
		return elliptic.P384()
	case tpm2.TPMECCNistP521:
		return elliptic.P521()
	}
	return nil
}

// parsePublic reads a SubjectPublicKeyInfo of bounded size.
func parsePublic(spki []byte) (crypto.PublicKey, error) {
	if len(spki) > maxSigner {
		return nil, fmt.Errorf("public key of %d bytes", len(spki))
	}
	return x509.ParsePKIXPublicKey(spki)
}

// pointOf splits an uncompressed point.
func pointOf(uncompressed []byte) *tpm2.TPMSECCPoint {
	xy := uncompressed[1:]
	return &tpm2.TPMSECCPoint{
		X: tpm2.TPM2BECCParameter{Buffer: xy[:len(xy)/2]},
		Y: tpm2.TPM2BECCParameter{Buffer: xy[len(xy)/2:]},
	}
}

// leftPad returns a copy of b with zeros in front, so that it has size bytes; TPMs leave leading zeros out.
func leftPad(b []byte, size int) []byte {
	padded := make([]byte, size)
	copy(padded[size-len(b):], b)
	return padded
}

// pointBytes is the uncompressed point of an elliptic curve key.
func pointBytes(p *tpm2.TPMTPublic) ([]byte, error) {
	k, err := publicKey(p)
	if err != nil {
		return nil, err
	}
	e, ok := k.(*ecdsa.PublicKey)
	if !ok {
		return nil, errors.New("not a key on an elliptic curve")
	}
	return e.Bytes()
}

// sharedX is the result of an agreement: the x coordinate, as long as the field (SP 800-56A section 5.7.1.2).
func sharedX(point tpm2.TPM2BECCPoint, size int) ([]byte, error) {
	p, err := point.Contents()
	if err != nil {
		return nil, err
	}
	if len(p.X.Buffer) > size {
		return nil, errors.New("shared secret that is too long")
	}
	x := leftPad(p.X.Buffer, size)
	clear(p.X.Buffer)
	return x, nil
}
