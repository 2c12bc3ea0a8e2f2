package mechanism

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"fmt"
	"slices"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// Encoding is the form of an ECDSA signature.
type Encoding string

// The encodings. The empty Encoding means DER.
const (
	DER   Encoding = "der"   // SEQUENCE of r and s (RFC 3279 section 2.2.3)
	P1363 Encoding = "p1363" // r || s, each as long as the curve's order
)

// Input is what is signed: a Digest of the hash that the scheme names, or else the Message, which may be empty. Ed25519
// takes a Message only, because its hash covers the key too (RFC 8032 section 5.1.6).
type Input struct{ Message, Digest []byte }

// Digest returns the hash of a signature scheme. It is 0 for a scheme without a hash of its own, and for decryption
// schemes.
func Digest(s keyspec.Scheme) crypto.Hash {
	switch s {
	case keyspec.RSAPSSSHA256, keyspec.RSAPKCS1SHA256, keyspec.ECDSASHA256:
		return crypto.SHA256
	case keyspec.RSAPSSSHA384, keyspec.RSAPKCS1SHA384, keyspec.ECDSASHA384:
		return crypto.SHA384
	case keyspec.RSAPSSSHA512, keyspec.RSAPKCS1SHA512, keyspec.ECDSASHA512:
		return crypto.SHA512
	}
	return 0
}

// digest returns the digest of in under the hash of s. The array keeps a message's digest off the heap.
func (in Input) digest(s keyspec.Scheme, space *[64]byte) ([]byte, error) {
	h := Digest(s)
	if h == 0 {
		return nil, fmt.Errorf("%w: %q is not a signature scheme", ErrInput, string(s))
	}
	if len(in.Digest) > 0 {
		if len(in.Message) > 0 {
			return nil, fmt.Errorf("%w: message and digest exclude each other", ErrInput)
		}
		if len(in.Digest) != h.Size() {
			return nil, fmt.Errorf("%w: the digest of %s has %d bytes", ErrInput, s, h.Size())
		}
		return in.Digest, nil
	}
	return sum(h, in.Message, space), nil
}

// Sign signs in and appends the signature to dst. An empty scheme means the key's default. RSASSA-PSS uses a salt as
// long as the hash (RFC 8017 section 9.1, as RFC 8446 and RFC 7518 require). ECDSA nonces are hedged. Errors wrap ErrInput or
// ErrUnsupported, or are those of the device of a resident key.
func (k *Key) Sign(dst []byte, s keyspec.Scheme, e Encoding, in Input) ([]byte, error) {
	if len(k.row.Schemes) == 0 {
		return nil, k.unsupported("sign")
	}
	if s == "" {
		s = k.row.Schemes[0]
	} else if !slices.Contains(k.row.Schemes, s) {
		return nil, fmt.Errorf("%w: %s does not sign with scheme %q", ErrInput, k.row.Algorithm, string(s))
	}
	if err := checkEncoding(e, k.row.Kind == KindECDSA); err != nil {
		return nil, err
	}
	if k.row.Kind == KindEd25519 {
		if len(in.Digest) > 0 {
			return nil, fmt.Errorf("%w: ed25519 signs a message, not a digest", ErrInput)
		}
		if k.device == nil {
			return append(dst, ed25519.Sign(k.ed25519, in.Message)...), nil
		}
	}
	if k.device != nil {
		return k.signInDevice(dst, s, e, in)
	}
	var space [64]byte
	digest, err := in.digest(s, &space)
	if err != nil {
		return nil, err
	}
	var signature []byte
	switch {
	case k.koblitz != nil:
		var extra [32]byte
		rand.Read(extra[:]) // never fails
		if signature = k.koblitz.sign(digest, extra[:]); e != P1363 {
			return AppendDER(dst, signature, k.row.size)
		}
	case k.row.Kind == KindECDSA:
		signature, err = ecdsa.SignASN1(rand.Reader, k.ecdsa, digest)
		if err == nil && e == P1363 {
			return AppendP1363(dst, signature, k.row.size)
		}
	case schemeIsPSS(s):
		signature, err = rsa.SignPSS(rand.Reader, k.rsa, Digest(s), digest, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash})
	default:
		signature, err = rsa.SignPKCS1v15(nil, k.rsa, Digest(s), digest)
	}
	if err != nil {
		return nil, fmt.Errorf("sign with %s: %w", s, err)
	}
	return append(dst, signature...), nil
}

// Verify checks sig over in with a public key and returns nil or an error that wraps ErrVerification; ErrInput and
// ErrUnsupported say that the question makes no sense. An empty scheme means the default of the key. ECDSA in DER is
// strict, and P-256, P-384, P-521 and secp256k1 are the only curves; RSA keys have MinRSABits to MaxRSABits.
//
// Of the two values of s that fit a signature the larger one is accepted too, also for secp256k1: RFC 8812 asks for neither, and
// Java's providers, MOSIP's among them, make either. A signature is therefore no name for what was signed.
//
// A PSS salt of any length is accepted, because signers such as openssl dgst use the longest one that fits, and the
// length of the salt bears on the tightness of the proof for the signer, not on what a verifier can be made to
// believe.
func Verify(public crypto.PublicKey, s keyspec.Scheme, e Encoding, in Input, sig []byte) error {
	if s == "" {
		s = defaultScheme(public)
	}
	var space [64]byte
	switch key := public.(type) {
	case ed25519.PublicKey:
		if s != keyspec.PureEd25519 {
			return wrongScheme(s)
		}
		if err := checkEncoding(e, false); err != nil {
			return err
		}
		if len(in.Digest) > 0 {
			return fmt.Errorf("%w: ed25519 signs a message, not a digest", ErrInput)
		}
		if len(key) != ed25519.PublicKeySize || !ed25519.Verify(key, in.Message, sig) {
			return ErrVerification
		}
		return nil
	case *ecdsa.PublicKey:
		size, err := curveSize(key.Curve)
		if err != nil {
			return err
		}
		if !slices.Contains(schemesOf(key), s) {
			return wrongScheme(s)
		}
		if err := checkEncoding(e, true); err != nil {
			return err
		}
		digest, err := in.digest(s, &space)
		if err != nil {
			return err
		}
		if e == P1363 {
			if sig, err = AppendDER(make([]byte, 0, maxDERSignature), sig, size); err != nil {
				return ErrVerification
			}
		}
		if len(sig) > maxDERSignature || !ecdsa.VerifyASN1(key, digest, sig) {
			return ErrVerification
		}
		return nil
	case *rsa.PublicKey:
		if !schemeIsPSS(s) && !schemeIsPKCS1(s) {
			return wrongScheme(s)
		}
		if err := checkEncoding(e, false); err != nil {
			return err
		}
		if err := checkRSAPublic(key); err != nil {
			return err
		}
		digest, err := in.digest(s, &space)
		if err != nil {
			return err
		}
		if schemeIsPSS(s) {
			err = rsa.VerifyPSS(key, Digest(s), digest, sig, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthAuto})
		} else {
			err = rsa.VerifyPKCS1v15(key, Digest(s), digest, sig)
		}
		if err != nil {
			return ErrVerification
		}
		return nil
	}
	return fmt.Errorf("%w: this key does not verify signatures", ErrUnsupported)
}

func schemeIsPSS(s keyspec.Scheme) bool {
	return s == keyspec.RSAPSSSHA256 || s == keyspec.RSAPSSSHA384 || s == keyspec.RSAPSSSHA512
}

func schemeIsPKCS1(s keyspec.Scheme) bool {
	return s == keyspec.RSAPKCS1SHA256 || s == keyspec.RSAPKCS1SHA384 || s == keyspec.RSAPKCS1SHA512
}

func wrongScheme(s keyspec.Scheme) error {
	return fmt.Errorf("%w: scheme %q is not of this kind of key", ErrInput, string(s))
}

// checkEncoding refuses unknown encodings, and P1363 where there is nothing to encode.
func checkEncoding(e Encoding, ecdsa bool) error {
	if e == "" || e == DER || e == P1363 && ecdsa {
		return nil
	}
	return fmt.Errorf("%w: encoding %q", ErrInput, string(e))
}

func sum(h crypto.Hash, message []byte, space *[64]byte) []byte {
	switch h {
	case crypto.SHA256:
		*(*[32]byte)(space[:]) = sha256.Sum256(message)
	case crypto.SHA384:
		*(*[48]byte)(space[:]) = sha512.Sum384(message)
	case crypto.SHA512:
		*space = sha512.Sum512(message)
	}
	return space[:h.Size()]
}
