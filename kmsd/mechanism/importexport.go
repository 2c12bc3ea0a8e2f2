package mechanism

import (
	"bytes"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/x509"
	algorithm "crypto/x509/pkix"
	"encoding/asn1"
	"fmt"

	"github.com/kmsd-project/kmsd/client/pkix"
)

// MaxEncoded bounds a private key in PKCS#8, in bytes. An RSA-4096 key has about 2,380.
const MaxEncoded = 4096

// Import returns the material of a key from outside: PKCS#8 DER (RFC 5208, RFC 5958) for asymmetric algorithms, the raw
// key for symmetric ones. The key is checked in full: size, exponent, primality and distance of RSA primes, scalars
// within the order of the curve, an enclosed public key against the private one, nothing after the end. Errors wrap
// ErrMaterial.
func (r *Row) Import(encoded []byte) ([]byte, error) {
	switch r.Kind {
	case KindAEAD, KindHMAC, KindHKDF:
		if len(encoded) != r.size {
			return nil, fmt.Errorf("%w: a %s key has %d bytes", ErrMaterial, r.Algorithm, r.size)
		}
		return bytes.Clone(encoded), nil
	}
	if len(encoded) > MaxEncoded {
		return nil, fmt.Errorf("%w: PKCS#8 longer than %d bytes", ErrMaterial, MaxEncoded)
	}
	envelope, err := parseEnvelope(encoded)
	if err != nil {
		return nil, err
	}
	var material []byte
	if r.curve == k256 {
		material, err = r.materialKoblitz(envelope)
	} else {
		material, err = r.material(encoded)
	}
	if err != nil {
		return nil, err
	}
	key, err := r.Load(material)
	if err != nil {
		return nil, err
	}
	if public := envelope.public(); public != nil && !bytes.Equal(public, key.publicBytes()) {
		return nil, fmt.Errorf("%w: the enclosed public key is not of the private key", ErrMaterial)
	}
	if err := key.checkPair(); err != nil {
		return nil, fmt.Errorf("%w: the key is not consistent", ErrMaterial)
	}
	return material, nil
}

// material returns the material of a key in PKCS#8 of the row's algorithm.
func (r *Row) material(encoded []byte) (material []byte, err error) {
	private, err := x509.ParsePKCS8PrivateKey(encoded)
	if err != nil {
		return nil, fmt.Errorf("%w: not a private key in PKCS#8", ErrMaterial)
	}
	switch key := private.(type) {
	case *rsa.PrivateKey:
		if r.Kind != KindRSA {
			return nil, r.otherAlgorithm()
		}
		if material, err = rsaMaterial(key, r.size*8); err != nil {
			return nil, err
		}
		if err := checkRSA(key, r.size*8); err != nil {
			return nil, err
		}
	case *ecdsa.PrivateKey:
		if r.curve.elliptic == nil || key.Curve != r.curve.elliptic {
			return nil, r.otherAlgorithm()
		}
		if material, err = key.Bytes(); err != nil {
			return nil, fmt.Errorf("%w: the scalar is not of the curve", ErrMaterial)
		}
	case ed25519.PrivateKey:
		if r.Kind != KindEd25519 {
			return nil, r.otherAlgorithm()
		}
		material = key.Seed()
	case *ecdh.PrivateKey:
		if r.Kind != KindECDH || key.Curve() != r.curve.ecdh {
			return nil, r.otherAlgorithm()
		}
		material = key.Bytes()
	default:
		return nil, r.otherAlgorithm()
	}
	return material, nil
}

// Export returns the form that Import takes: PKCS#8 DER, or the raw key. Errors wrap ErrMaterial.
func (r *Row) Export(material []byte) ([]byte, error) {
	key, err := r.Load(material)
	if err != nil {
		return nil, err
	}
	var encoded []byte
	switch r.Kind {
	case KindRSA:
		encoded, err = x509.MarshalPKCS8PrivateKey(key.rsa)
	case KindECDSA:
		if key.koblitz != nil {
			encoded, err = key.koblitz.export()
			break
		}
		encoded, err = x509.MarshalPKCS8PrivateKey(key.ecdsa)
	case KindEd25519:
		encoded, err = x509.MarshalPKCS8PrivateKey(key.ed25519)
	case KindECDH:
		encoded, err = x509.MarshalPKCS8PrivateKey(key.ecdh)
	default:
		encoded = bytes.Clone(material)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: encode a %s key: %w", ErrMaterial, r.Algorithm, err)
	}
	return encoded, nil
}

func (r *Row) otherAlgorithm() error {
	return fmt.Errorf("%w: the key is not a %s key", ErrMaterial, r.Algorithm)
}

// publicBytes returns the public half as a point or, for Ed25519 and X25519, as its 32 bytes.
func (k *Key) publicBytes() []byte {
	switch k.row.Kind {
	case KindECDSA:
		public, err := pkix.Point(k.Public().(*ecdsa.PublicKey))
		if err != nil {
			return nil
		}
		return public
	case KindEd25519:
		return k.ed25519[32:]
	case KindECDH:
		return k.ecdh.PublicKey().Bytes()
	}
	return nil
}

// envelope is OneAsymmetricKey (RFC 5958 section 2): what crypto/x509 does not look at.
type envelope struct {
	Version    int
	Algorithm  algorithm.AlgorithmIdentifier
	PrivateKey []byte
	Attributes asn1.RawValue  `asn1:"optional,tag:0"`
	PublicKey  asn1.BitString `asn1:"optional,tag:1"`
}

// sec1 is ECPrivateKey (RFC 5915 section 3).
type sec1 struct {
	Version    int
	PrivateKey []byte
	Parameters asn1.RawValue  `asn1:"optional,explicit,tag:0"`
	PublicKey  asn1.BitString `asn1:"optional,explicit,tag:1"`
}

var oidECPublicKey = asn1.ObjectIdentifier{1, 2, 840, 10045, 2, 1}

func parseEnvelope(encoded []byte) (*envelope, error) {
	e := new(envelope)
	if rest, err := asn1.Unmarshal(encoded, e); err != nil || len(rest) > 0 || e.Version != 0 && e.Version != 1 {
		return nil, fmt.Errorf("%w: not PKCS#8 DER", ErrMaterial)
	}
	return e, nil
}

// public returns the enclosed public key, or nil.
func (e *envelope) public() []byte {
	if e.PublicKey.BitLength > 0 {
		return e.PublicKey.RightAlign()
	}
	if e.Algorithm.Algorithm.Equal(oidECPublicKey) {
		var key sec1
		if _, err := asn1.Unmarshal(e.PrivateKey, &key); err == nil && key.PublicKey.BitLength > 0 {
			return key.PublicKey.RightAlign()
		}
	}
	return nil
}
