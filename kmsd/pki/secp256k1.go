package pki

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/asn1"
	"fmt"

	"github.com/kmsd-project/kmsd/client/pkix"
)

// createSecp256k1 is x509.CreateCertificate for what it refuses: a public key or a signer on secp256k1. crypto/x509 makes the certificate
// with a throw-away key in the place of both, and what depends on the keys is then replaced.
func createSecp256k1(template, parent *x509.Certificate, public crypto.PublicKey, signer crypto.Signer) ([]byte, error) {
	standIn, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	anonymous := *parent
	anonymous.PublicKey = nil // or crypto/x509 would see that the signer is another
	der, err := x509.CreateCertificate(rand.Reader, template, &anonymous, standIn.Public(), standIn)
	if err != nil {
		return nil, err
	}
	if der, err = sign(der, 2, 6, public, signer); err != nil {
		return nil, err
	}
	made, err := pkix.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	return der, checkMade(signer, made.SignatureAlgorithm, made.RawTBSCertificate, made.Signature)
}

// requestSecp256k1 is x509.CreateCertificateRequest for a signer on secp256k1.
func requestSecp256k1(template *x509.CertificateRequest, signer crypto.Signer) ([]byte, error) {
	standIn, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, template, standIn)
	if err != nil {
		return nil, err
	}
	if der, err = sign(der, -1, 2, signer.Public(), signer); err != nil {
		return nil, err
	}
	made, err := pkix.ParseRequest(der)
	if err != nil {
		return nil, err
	}
	return der, checkMade(signer, made.SignatureAlgorithm, made.RawTBSCertificateRequest, made.Signature)
}

// checkMade verifies what was made, as crypto/x509 does with what it makes.
func checkMade(signer crypto.Signer, a x509.SignatureAlgorithm, signed, signature []byte) error {
	issuer := &x509.Certificate{PublicKey: signer.Public()}
	return issuer.CheckSignature(a, signed, signature)
}

// sign replaces the algorithm and the public key among the elements of what is signed, and the signature. An index of -1 means that
// there is none.
func sign(der []byte, algorithm, key int, public crypto.PublicKey, signer crypto.Signer) ([]byte, error) {
	var signed struct {
		Content   []asn1.RawValue
		Algorithm asn1.RawValue
		Signature asn1.BitString
	}
	if rest, err := asn1.Unmarshal(der, &signed); err != nil || len(rest) > 0 || max(algorithm, key) >= len(signed.Content) {
		return nil, fmt.Errorf("%w: crypto/x509 made another structure", ErrCertificate)
	}
	a, hash := signatureAlgorithm(signer.Public())
	id, err := asn1.Marshal(a)
	if err != nil {
		return nil, err
	}
	spki, err := pkix.MarshalPublicKey(public)
	if err != nil {
		return nil, err
	}
	signed.Content[key] = asn1.RawValue{FullBytes: spki}
	signed.Algorithm = asn1.RawValue{FullBytes: id}
	if algorithm >= 0 {
		signed.Content[algorithm] = signed.Algorithm
	}
	content, err := asn1.Marshal(signed.Content)
	if err != nil {
		return nil, err
	}
	signature, err := crypto.SignMessage(signer, rand.Reader, content, hash)
	if err != nil {
		return nil, err
	}
	signed.Signature = asn1.BitString{Bytes: signature, BitLength: 8 * len(signature)}
	return asn1.Marshal(signed)
}

// algorithmIdentifier is AlgorithmIdentifier (RFC 5280 section 4.1.1.2).
type algorithmIdentifier struct {
	Algorithm  asn1.ObjectIdentifier
	Parameters asn1.RawValue `asn1:"optional"`
}

// signatureAlgorithm returns the algorithm with which a key signs certificates: the one that crypto/x509 takes for it (RFC 4055 section 5,
// RFC 5758 section 3.2, RFC 8410 section 3), ECDSA with SHA-256 for secp256k1.
func signatureAlgorithm(public crypto.PublicKey) (algorithmIdentifier, crypto.Hash) {
	ecdsaWith := func(n int) algorithmIdentifier {
		return algorithmIdentifier{Algorithm: asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, n}}
	}
	switch key := public.(type) {
	case *rsa.PublicKey:
		return algorithmIdentifier{asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 11}, asn1.NullRawValue}, crypto.SHA256
	case ed25519.PublicKey:
		return algorithmIdentifier{Algorithm: asn1.ObjectIdentifier{1, 3, 101, 112}}, 0
	case *ecdsa.PublicKey:
		switch key.Curve {
		case elliptic.P384():
			return ecdsaWith(3), crypto.SHA384
		case elliptic.P521():
			return ecdsaWith(4), crypto.SHA512
		}
	}
	return ecdsaWith(2), crypto.SHA256
}
