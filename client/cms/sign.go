package cms

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"io"
	"slices"
	"time"

	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"

	"github.com/kmsd-project/kmsd/client/pkix"
)

// Options says what a signature looks like. The zero value is good.
type Options struct {
	// Hash is SHA-256, SHA-384 or SHA-512. Zero means SHA-256 for RSA and what fits the curve for ECDSA. With Ed25519 it is SHA-512
	// (RFC 8419 section 3.1).
	Hash crypto.Hash

	// PSS asks for RSASSA-PSS (RFC 4056) in place of PKCS #1 v1.5, which every reader understands.
	PSS bool

	// Time is the signing time to be written, in whole seconds. Zero leaves it out, as signatures in PDF documents want it
	// (ETSI EN 319 142-1 section 6.3), which have it elsewhere.
	Time time.Time
}

// Sign signs everything that content gives and returns a detached signature in DER. chain begins with the certificate of the signer's key; the
// rest is put into the signature with it and should lead to a root, which may be left out. RSA, ECDSA (secp256k1 too) and Ed25519 keys
// sign. Errors wrap ErrCertificate, ErrUnsupported or ErrTooLarge, or are those of the signer or of content.
func Sign(signer crypto.Signer, chain []*x509.Certificate, content io.Reader, o Options) ([]byte, error) {
	s, err := newSigning(signer.Public(), chain, o)
	if err != nil {
		return nil, err
	}
	digest := s.hash.hash.New()
	if _, err := io.Copy(digest, content); err != nil {
		return nil, err
	}
	attributes := s.attributes(digest.Sum(nil), o.Time)
	signature, err := crypto.SignMessage(signer, rand.Reader, attributes, s.options)
	if err != nil {
		return nil, err
	}
	return s.encode(attributes, signature)
}

// signing is what a signature is made with.
type signing struct {
	chain     []*x509.Certificate
	hash      *hashAlgorithm
	algorithm []byte            // AlgorithmIdentifier of the signature
	options   crypto.SignerOpts // for the signer
}

func newSigning(public crypto.PublicKey, chain []*x509.Certificate, o Options) (*signing, error) {
	if len(chain) == 0 {
		return nil, fmt.Errorf("%w: there is none", ErrCertificate)
	}
	if year := o.Time.UTC().Year(); !o.Time.IsZero() && (year < 1900 || year > 9999) {
		return nil, fmt.Errorf("%w: a signing time in the year %d", ErrUnsupported, year)
	}
	if len(chain) > MaxCertificates {
		return nil, fmt.Errorf("%w: %d certificates, at most %d", ErrTooLarge, len(chain), MaxCertificates)
	}
	spki, err := pkix.MarshalPublicKey(public)
	if err != nil || !bytes.Equal(spki, chain[0].RawSubjectPublicKeyInfo) {
		return nil, fmt.Errorf("%w: it is of another key", ErrCertificate)
	}
	s := &signing{chain: chain}
	var hash crypto.Hash
	switch key := public.(type) {
	case *rsa.PublicKey:
		hash = crypto.SHA256
	case *ecdsa.PublicKey:
		hash = hashFor(key.Curve)
	case ed25519.PublicKey:
		hash = crypto.SHA512
		if o.Hash != 0 && o.Hash != hash {
			return nil, fmt.Errorf("%w: Ed25519 with %v", ErrUnsupported, o.Hash)
		}
	default:
		return nil, fmt.Errorf("%w: keys of type %T do not sign", ErrUnsupported, public)
	}
	if o.Hash != 0 {
		hash = o.Hash
	}
	if s.hash = byHash(hash); s.hash == nil {
		return nil, fmt.Errorf("%w: hash %v", ErrUnsupported, hash)
	}
	var algorithm cryptobyte.Builder
	s.options = hash
	_, isRSA := public.(*rsa.PublicKey)
	_, isEd25519 := public.(ed25519.PublicKey)
	switch {
	case o.PSS && !isRSA:
		return nil, fmt.Errorf("%w: PSS with a key of type %T", ErrUnsupported, public)
	case o.PSS:
		addPSS(&algorithm, s.hash)
		s.options = &rsa.PSSOptions{Hash: hash, SaltLength: rsa.PSSSaltLengthEqualsHash}
	case isRSA:
		addAlgorithm(&algorithm, oidRSA, null) // RFC 5754 section 3.2: everybody has to take it
	case isEd25519:
		addAlgorithm(&algorithm, oidEd25519, nil)
		s.options = crypto.Hash(0)
	default:
		addAlgorithm(&algorithm, s.hash.withECDSA, nil)
	}
	s.algorithm = algorithm.BytesOrPanic()
	return s, nil
}

// attributes returns the signed attributes as they are signed: a SET in DER (RFC 5652 section 5.4).
func (s *signing) attributes(digest []byte, at time.Time) []byte {
	attribute := func(id oid, value func(*cryptobyte.Builder)) []byte {
		var b cryptobyte.Builder
		b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
			b.AddBytes([]byte(id))
			b.AddASN1(asn1.SET, value)
		})
		return b.BytesOrPanic()
	}
	leaf := sha256.Sum256(s.chain[0].Raw)
	list := [][]byte{
		attribute(oidContentType, func(b *cryptobyte.Builder) { b.AddBytes([]byte(oidData)) }),
		attribute(oidMessageDigest, func(b *cryptobyte.Builder) { b.AddASN1OctetString(digest) }),
		attribute(oidSigningCertV2, func(b *cryptobyte.Builder) {
			b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) { // SigningCertificateV2
				b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) { // certs
					b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) { // ESSCertIDv2, SHA-256 being the default
						b.AddASN1OctetString(leaf[:])
					})
				})
			})
		}),
	}
	if !at.IsZero() {
		list = append(list, attribute(oidSigningTime, func(b *cryptobyte.Builder) {
			if at = at.UTC().Truncate(time.Second); at.Year() >= 1950 && at.Year() < 2050 { // RFC 5652 section 11.3
				b.AddASN1UTCTime(at)
			} else {
				b.AddASN1GeneralizedTime(at)
			}
		}))
	}
	return set(asn1.SET, list)
}

// set returns a SET OF in DER, which is sorted (X.690 section 11.6), with a tag.
func set(tag asn1.Tag, elements [][]byte) []byte {
	slices.SortFunc(elements, bytes.Compare)
	var b cryptobyte.Builder
	b.AddASN1(tag, func(b *cryptobyte.Builder) {
		for _, e := range elements {
			b.AddBytes(e)
		}
	})
	return b.BytesOrPanic()
}

// encode returns the ContentInfo (RFC 5652 sections 3 and 5.1).
func (s *signing) encode(attributes, signature []byte) ([]byte, error) {
	digestAlgorithm := func(b *cryptobyte.Builder) { addAlgorithm(b, s.hash.id, nil) } // RFC 5754 section 2: no parameters
	var certificates [][]byte
	for _, c := range s.chain {
		certificates = append(certificates, c.Raw)
	}
	implicit := bytes.Clone(attributes)
	implicit[0] = byte(context(0))
	leaf := s.chain[0]
	b := cryptobyte.NewBuilder(nil)
	b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddBytes([]byte(oidSignedData))
		b.AddASN1(context(0), func(b *cryptobyte.Builder) {
			b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
				b.AddASN1Int64(1)
				b.AddASN1(asn1.SET, digestAlgorithm)
				b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) { b.AddBytes([]byte(oidData)) })
				b.AddBytes(set(context(0), certificates))
				b.AddASN1(asn1.SET, func(b *cryptobyte.Builder) {
					b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
						b.AddASN1Int64(1)
						b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
							b.AddBytes(leaf.RawIssuer)
							b.AddASN1BigInt(leaf.SerialNumber)
						})
						digestAlgorithm(b)
						b.AddBytes(implicit)
						b.AddBytes(s.algorithm)
						b.AddASN1OctetString(signature)
					})
				})
			})
		})
	})
	der, err := b.Bytes()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrFormat, err)
	}
	if len(der) > MaxSignature {
		return nil, fmt.Errorf("%w: %d bytes, at most %d", ErrTooLarge, len(der), MaxSignature)
	}
	made, err := Parse(der)
	if err != nil {
		return nil, err
	}
	// A signer that errs, or signs with a key that the certificate is not of, is found here and not by the reader.
	return der, made.verifyAttributes()
}
