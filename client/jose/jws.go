package jose

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	_ "crypto/sha256" // SHA-256
	_ "crypto/sha512" // SHA-384 and SHA-512
	"crypto/x509"
	"encoding/base64"
	"fmt"
	"math/big"
	"strings"

	"github.com/kmsd-project/kmsd/client/pkix"
)

// Algorithm is a signature algorithm (RFC 7518 section 3.1, RFC 8037 section 3.1, RFC 8812 section 3.2).
type Algorithm string

// The algorithms.
const (
	RS256 Algorithm = "RS256"
	RS384 Algorithm = "RS384"
	RS512 Algorithm = "RS512"
	PS256 Algorithm = "PS256"
	PS384 Algorithm = "PS384"
	PS512 Algorithm = "PS512"
	ES256 Algorithm = "ES256"
	ES384 Algorithm = "ES384"
	ES512 Algorithm = "ES512"
	EdDSA Algorithm = "EdDSA"

	// ES256K is ECDSA on secp256k1. Both values of s are accepted, as RFC 8812 section 3.2 has it.
	ES256K Algorithm = "ES256K"
)

// minRSA is the size in bits of the smallest RSA key that is accepted (RFC 7518 section 3.3).
const minRSA = 2048

// Hash returns the hash of the algorithm, 0 for EdDSA, which has none outside.
func (a Algorithm) Hash() crypto.Hash {
	switch a {
	case RS256, PS256, ES256, ES256K:
		return crypto.SHA256
	case RS384, PS384, ES384:
		return crypto.SHA384
	case RS512, PS512, ES512:
		return crypto.SHA512
	}
	return 0
}

// curve returns the curve of ES256, ES384, ES512 (RFC 7518 section 3.4) and ES256K, nil for other algorithms.
func (a Algorithm) curve() elliptic.Curve {
	switch a {
	case ES256:
		return elliptic.P256()
	case ES384:
		return elliptic.P384()
	case ES512:
		return elliptic.P521()
	case ES256K:
		return pkix.Secp256k1()
	}
	return nil
}

// AlgorithmFor returns the algorithm that is used with a public key when nobody asks for another: PS256 for RSA, ES256, ES384,
// ES512 or ES256K by the curve, EdDSA for Ed25519.
func AlgorithmFor(public crypto.PublicKey) (Algorithm, error) {
	switch k := public.(type) {
	case *rsa.PublicKey:
		return PS256, nil
	case ed25519.PublicKey:
		return EdDSA, nil
	case *ecdsa.PublicKey:
		for _, a := range []Algorithm{ES256, ES384, ES512, ES256K} {
			if k.Curve == a.curve() {
				return a, nil
			}
		}
	}
	return "", fmt.Errorf("%w: no algorithm for a key of type %T", ErrUnsupported, public)
}

// fits reports whether a key can be used with the algorithm.
func (a Algorithm) fits(public crypto.PublicKey) bool {
	switch k := public.(type) {
	case *rsa.PublicKey:
		return (strings.HasPrefix(string(a), "RS") || strings.HasPrefix(string(a), "PS")) && a.Hash() != 0 && k.N.BitLen() >= minRSA
	case *ecdsa.PublicKey:
		return a.curve() != nil && k.Curve == a.curve()
	case ed25519.PublicKey:
		return a == EdDSA && len(k) == ed25519.PublicKeySize
	}
	return false
}

// Signer signs what a JWS signs. The signature is that of JWS: r and s in fixed length for ECDSA.
type Signer interface {
	SignJWS(ctx context.Context, a Algorithm, input []byte) ([]byte, error)
}

// SignOptions says what a signature looks like.
type SignOptions struct {
	Algorithm  Algorithm
	KeyID      string              // kid; none when empty
	Chain      []*x509.Certificate // of the signing key, leaf first
	Include    int                 // how many certificates of Chain go into x5c
	Thumbprint bool                // x5t#S256 of the leaf
	URL        string              // x5u
	Type       string              // typ
	Detached   bool                // leave the payload out of the token (RFC 7515 appendix F)
	Unencoded  bool                // sign the payload as it is (RFC 7797); it is then left out of the token unless it is printable without dots
	Extra      map[string]any      // further members

	// EncodedAnyway, with Unencoded, writes the payload in base64url although the header says that it is not encoded, as MOSIP's jwsSign
	// does: so it may be anything. Readers that know RFC 7797 alone take that text for the payload, and refuse the signature.
	EncodedAnyway bool
}

// Sign returns the token in the compact serialization.
func Sign(ctx context.Context, s Signer, payload []byte, o SignOptions) (string, error) {
	if len(payload) > MaxPayload {
		return "", fmt.Errorf("%w: payload of %d bytes, at most %d", ErrTooLarge, len(payload), MaxPayload)
	}
	if o.Algorithm.Hash() == 0 && o.Algorithm != EdDSA {
		return "", fmt.Errorf("%w: algorithm %q", ErrUnsupported, string(o.Algorithm))
	}
	h := Header{Algorithm: string(o.Algorithm), KeyID: o.KeyID, URL: o.URL, Type: o.Type, Unencoded: o.Unencoded, Extra: o.Extra}
	if err := h.addCertificates(o.Chain, o.Include, o.Thumbprint); err != nil {
		return "", err
	}
	if o.EncodedAnyway && !o.Unencoded {
		return "", fmt.Errorf("%w: a payload that is encoded is not encoded anyway", ErrFormat)
	}
	if o.Unencoded && !o.Detached && !o.EncodedAnyway && !printable(payload) {
		return "", fmt.Errorf("%w: a payload that is not encoded and not printable has to be detached (RFC 7797 section 5.2)", ErrFormat)
	}
	header, err := h.encode()
	if err != nil {
		return "", err
	}
	first := base64.RawURLEncoding.EncodeToString(header)
	signature, err := s.SignJWS(ctx, o.Algorithm, signingInput(first, payload, o.Unencoded))
	if err != nil {
		return "", err
	}
	middle := ""
	switch {
	case o.Detached:
	case o.Unencoded && !o.EncodedAnyway:
		middle = string(payload)
	default:
		middle = base64.RawURLEncoding.EncodeToString(payload)
	}
	return first + "." + middle + "." + base64.RawURLEncoding.EncodeToString(signature), nil
}

// signingInput is what is signed (RFC 7515 section 5.1, RFC 7797 section 3).
func signingInput(header string, payload []byte, unencoded bool) []byte {
	size := base64.RawURLEncoding.EncodedLen(len(payload))
	if unencoded {
		size = len(payload)
	}
	input := make([]byte, 0, len(header)+1+size)
	input = append(input, header...)
	input = append(input, '.')
	if unencoded {
		return append(input, payload...)
	}
	return base64.RawURLEncoding.AppendEncode(input, payload)
}

// printable reports whether a payload can stand in a compact serialization as it is (RFC 7797 section 5.2).
func printable(b []byte) bool {
	for _, c := range b {
		if c < 0x20 || c > 0x7e || c == '.' {
			return false
		}
	}
	return true
}

// Signed is a token that was parsed and not verified.
type Signed struct {
	Header    *Header
	Detached  bool // the token has no payload: it has to be given to Verify
	first     string
	payload   []byte
	signature []byte
}

// ParseSigned parses a token in the compact serialization. Nothing in the result may be believed before Verify.
func ParseSigned(token string) (*Signed, error) {
	if len(token) > 2*MaxPayload {
		return nil, fmt.Errorf("%w: token of %d bytes", ErrTooLarge, len(token))
	}
	first, rest, ok := strings.Cut(token, ".")
	middle, last, both := strings.Cut(rest, ".")
	if !ok || !both || strings.Contains(last, ".") {
		return nil, fmt.Errorf("%w: a signed token has three parts", ErrFormat)
	}
	raw, err := decodeSegment(first)
	if err != nil {
		return nil, err
	}
	t := &Signed{first: first, Detached: middle == ""}
	if t.Header, err = decodeHeader(raw); err != nil {
		return nil, err
	}
	if t.signature, err = decodeSegment(last); err != nil {
		return nil, err
	}
	switch {
	case len(t.signature) == 0:
		return nil, fmt.Errorf("%w: the token is not signed", ErrFormat)
	case t.Detached:
	case !t.Header.Unencoded:
		t.payload, err = decodeSegment(middle)
	case printable([]byte(middle)):
		t.payload = []byte(middle)
	default:
		err = fmt.Errorf("%w: the payload is not printable", ErrFormat)
	}
	if err != nil {
		return nil, err
	}
	return t, nil
}

// Verify checks the signature with a key that the caller believes and returns the payload. detached is the payload of a token
// that has none, nil otherwise. ErrVerification says nothing about why.
//
// A payload that stands in the token as it is (RFC 7797) may be MOSIP's base64url of what was signed. It is the one or the other that the
// signature is of, and that is what is returned.
func (t *Signed) Verify(public crypto.PublicKey, detached []byte) ([]byte, error) {
	payload := t.payload
	switch {
	case t.Detached && detached == nil:
		return nil, fmt.Errorf("%w: the token has no payload of its own", ErrFormat)
	case t.Detached:
		payload = detached
	case detached != nil:
		return nil, fmt.Errorf("%w: the token has a payload of its own", ErrFormat)
	}
	a := Algorithm(t.Header.Algorithm)
	if a.Hash() == 0 && a != EdDSA {
		return nil, fmt.Errorf("%w: algorithm %q", ErrUnsupported, t.Header.Algorithm)
	}
	err := a.Verify(public, signingInput(t.first, payload, t.Header.Unencoded), t.signature)
	if err != nil && t.Header.Unencoded && !t.Detached {
		inner, notEncoded := decodeSegment(string(payload))
		if notEncoded != nil {
			return nil, err
		}
		payload, err = inner, a.Verify(public, signingInput(t.first, inner, true), t.signature)
	}
	if err != nil {
		return nil, err
	}
	return payload, nil
}

// Verify checks a signature over input, in the form that [Signer] makes, with a key that the caller believes. The algorithm has
// to fit the key. The error is always ErrVerification and says nothing about why.
func (a Algorithm) Verify(public crypto.PublicKey, input, signature []byte) error {
	if !a.fits(public) || !verify(a, public, input, signature) {
		return ErrVerification
	}
	return nil
}

func verify(a Algorithm, public crypto.PublicKey, input, signature []byte) bool {
	var digest []byte
	if a.Hash() != 0 {
		h := a.Hash().New()
		h.Write(input)
		digest = h.Sum(nil)
	}
	switch k := public.(type) {
	case ed25519.PublicKey:
		return ed25519.Verify(k, input, signature)
	case *rsa.PublicKey:
		if a[0] == 'R' {
			return rsa.VerifyPKCS1v15(k, a.Hash(), digest, signature) == nil
		}
		return rsa.VerifyPSS(k, a.Hash(), digest, signature, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash}) == nil
	case *ecdsa.PublicKey:
		size := (k.Curve.Params().BitSize + 7) / 8
		if len(signature) != 2*size {
			return false
		}
		r, s := new(big.Int).SetBytes(signature[:size]), new(big.Int).SetBytes(signature[size:])
		return ecdsa.Verify(k, digest, r, s)
	}
	return false
}

// Leaf returns the first certificate of x5c, checked against x5t#S256 if both are there, and nil if there is none. Whether to
// believe it is for the caller to find out.
func (h *Header) Leaf(parse func(der []byte) (*x509.Certificate, error)) (*x509.Certificate, error) {
	if len(h.Chain) == 0 {
		return nil, nil
	}
	c, err := parse(h.Chain[0])
	if err != nil {
		return nil, fmt.Errorf("%w: x5c: %w", ErrFormat, err)
	}
	if len(h.Thumbprint) > 0 && !sameThumbprint(c, h.Thumbprint) {
		return nil, fmt.Errorf("%w: x5c and x5t#S256 do not belong together", ErrFormat)
	}
	return c, nil
}
