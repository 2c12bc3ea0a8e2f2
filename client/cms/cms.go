// Package cms makes and verifies detached signatures in the Cryptographic Message Syntax (RFC 5652 SignedData), as files beside what they sign
// (.p7s), in signed PDF documents ([SignPDF]) and in S/MIME. The private key is wherever a [crypto.Signer] has
// it; a client.Key is one. The content is read once, as a stream of any length.
//
// A signature signs attributes: the type and the digest of the content, the signer's certificate (signing-certificate-v2, RFC 5035) and, if
// asked for, a time, which is the signer's word and no more.
//
// # Security
//
// Invariant: a signature is verified with the certificate that its signed attributes name, when they name one, and the algorithms have to fit the
// key and each other.
//
// Invariant: signatures without signed attributes are refused. Their content could be the attributes of another signature, and the other way
// round.
//
// Whether the signer is to be believed is not decided here: [Signature.Chain] is what the signature brings along, and may come from anybody.
package cms

import (
	"crypto"
	"crypto/elliptic"
	_ "crypto/sha1"   // in an attribute that names a certificate
	_ "crypto/sha256" // SHA-256
	_ "crypto/sha512" // SHA-384 and SHA-512
	"errors"

	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"
)

// Errors of this package. They are wrapped with a reason.
var (
	// ErrFormat says that bytes are not a detached signature of this kind.
	ErrFormat = errors.New("not a detached CMS signature")

	// ErrTooLarge says that a signature is longer, or has more certificates, than is read.
	ErrTooLarge = errors.New("the CMS signature is too large")

	// ErrUnsupported says that an algorithm or a form is not supported.
	ErrUnsupported = errors.New("not supported in a CMS signature")

	// ErrVerification says that a signature is not right. It does not say why.
	ErrVerification = errors.New("the CMS signature is not right")

	// ErrCertificate says that the certificates given to Sign cannot be used with the key.
	ErrCertificate = errors.New("not the certificate of the signing key")
)

// Limits.
const (
	MaxSignature    = 1 << 20 // a signature, in bytes; time-stamps and revocation lists may be in it
	MaxCertificates = 32      // in a signature
	maxAttributes   = 32
	maxAttribute    = 64 << 10
)

// oid is an object identifier as it is encoded, with tag and length.
type oid string

// The object identifiers.
const (
	oidData          oid = "\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x07\x01"
	oidSignedData    oid = "\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x07\x02"
	oidContentType   oid = "\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x09\x03"
	oidMessageDigest oid = "\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x09\x04"
	oidSigningTime   oid = "\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x09\x05"
	oidAlgorithms    oid = "\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x09\x34"         // CMSAlgorithmProtection, RFC 6211
	oidSigningCert   oid = "\x06\x0b\x2a\x86\x48\x86\xf7\x0d\x01\x09\x10\x02\x0c" // of SHA-1, RFC 2634
	oidSigningCertV2 oid = "\x06\x0b\x2a\x86\x48\x86\xf7\x0d\x01\x09\x10\x02\x2f" // RFC 5035
	oidRSA           oid = "\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x01"         // rsaEncryption
	oidPSS           oid = "\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x0a"         // id-RSASSA-PSS
	oidMGF1          oid = "\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x08"         // id-mgf1
	oidEd25519       oid = "\x06\x03\x2b\x65\x70"
)

// hashAlgorithm is a hash and what it is called, alone and together with a signature.
type hashAlgorithm struct {
	hash      crypto.Hash
	id        oid
	withRSA   oid // PKCS #1 v1.5
	withECDSA oid
}

var hashAlgorithms = []hashAlgorithm{
	{crypto.SHA256, "\x06\x09\x60\x86\x48\x01\x65\x03\x04\x02\x01", "\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x0b", "\x06\x08\x2a\x86\x48\xce\x3d\x04\x03\x02"},
	{crypto.SHA384, "\x06\x09\x60\x86\x48\x01\x65\x03\x04\x02\x02", "\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x0c", "\x06\x08\x2a\x86\x48\xce\x3d\x04\x03\x03"},
	{crypto.SHA512, "\x06\x09\x60\x86\x48\x01\x65\x03\x04\x02\x03", "\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x0d", "\x06\x08\x2a\x86\x48\xce\x3d\x04\x03\x04"},
}

// byHash returns the hash algorithm of h, nil if it is none of these.
func byHash(h crypto.Hash) *hashAlgorithm {
	for i := range hashAlgorithms {
		if hashAlgorithms[i].hash == h {
			return &hashAlgorithms[i]
		}
	}
	return nil
}

// byID returns the hash algorithm with an identifier, nil if it is none of these.
func byID(id oid) *hashAlgorithm {
	for i := range hashAlgorithms {
		if hashAlgorithms[i].id == id {
			return &hashAlgorithms[i]
		}
	}
	return nil
}

// hashFor returns the hash that fits a curve (FIPS 186-5 section 6.1.1).
func hashFor(curve elliptic.Curve) crypto.Hash {
	switch size := curve.Params().BitSize; {
	case size > 384:
		return crypto.SHA512
	case size > 256:
		return crypto.SHA384
	}
	return crypto.SHA256
}

// algorithmIdentifier is AlgorithmIdentifier (RFC 5280 section 4.1.1.2), as it is encoded.
type algorithmIdentifier struct {
	id         oid
	parameters []byte // nil if there are none
	full       []byte
}

var null = []byte{5, 0}

// addAlgorithm writes an AlgorithmIdentifier.
func addAlgorithm(b *cryptobyte.Builder, id oid, parameters []byte) {
	b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddBytes([]byte(id))
		b.AddBytes(parameters)
	})
}

// addPSS writes the AlgorithmIdentifier of RSASSA-PSS with one hash everywhere and a salt as long as it (RFC 4055 section 3.1).
func addPSS(b *cryptobyte.Builder, h *hashAlgorithm) {
	var parameters cryptobyte.Builder
	parameters.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1(context(0), func(b *cryptobyte.Builder) { addAlgorithm(b, h.id, null) })
		b.AddASN1(context(1), func(b *cryptobyte.Builder) {
			var inner cryptobyte.Builder
			addAlgorithm(&inner, h.id, null)
			addAlgorithm(b, oidMGF1, inner.BytesOrPanic())
		})
		b.AddASN1(context(2), func(b *cryptobyte.Builder) { b.AddASN1Int64(int64(h.hash.Size())) })
	})
	addAlgorithm(b, oidPSS, parameters.BytesOrPanic())
}

// context is a constructed context-specific tag.
func context(n uint8) asn1.Tag { return asn1.Tag(n).ContextSpecific().Constructed() }
