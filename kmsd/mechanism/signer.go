package mechanism

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"fmt"
	"io"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// Signer returns k as a crypto.Signer, for certificates and requests. Its Sign takes a digest, or the whole message for
// Ed25519 (opts.HashFunc() == 0); *rsa.PSSOptions choose PSS. Keys that do not sign answer ErrUnsupported.
func (k *Key) Signer() (crypto.Signer, error) {
	if len(k.row.Schemes) == 0 {
		return nil, k.unsupported("sign")
	}
	return signer{k}, nil
}

type signer struct{ key *Key }

func (s signer) Public() crypto.PublicKey { return s.key.Public() }

func (s signer) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if s.key.row.Kind == KindEd25519 {
		if opts.HashFunc() != 0 {
			return nil, fmt.Errorf("%w: ed25519 signs a message, not a digest", ErrInput)
		}
		return s.key.Sign(nil, keyspec.PureEd25519, DER, Input{Message: digest})
	}
	scheme, err := SchemeFor(s.Public(), opts)
	if err != nil {
		return nil, err
	}
	return s.key.Sign(nil, scheme, DER, Input{Digest: digest})
}

// SchemeFor returns the scheme that crypto.Signer options mean for a public key. Errors wrap ErrInput: the hash is not
// SHA-256, SHA-384 or SHA-512, or the PSS salt is not as long as the hash.
func SchemeFor(public crypto.PublicKey, opts crypto.SignerOpts) (keyspec.Scheme, error) {
	pss, isPSS := opts.(*rsa.PSSOptions)
	if isPSS && pss.SaltLength != rsa.PSSSaltLengthEqualsHash && pss.SaltLength != rsa.PSSSaltLengthAuto && pss.SaltLength != opts.HashFunc().Size() {
		return "", fmt.Errorf("%w: a PSS salt is as long as the hash", ErrInput)
	}
	for _, s := range schemesOf(public) {
		if s == keyspec.PureEd25519 && opts.HashFunc() == 0 {
			return s, nil
		}
		if Digest(s) == opts.HashFunc() && Digest(s) != 0 && (isPSS == schemeIsPSS(s)) {
			return s, nil
		}
	}
	return "", fmt.Errorf("%w: no scheme for these options", ErrInput)
}

func schemesOf(public crypto.PublicKey) []keyspec.Scheme {
	switch key := public.(type) {
	case ed25519.PublicKey:
		return edSchemes
	case *rsa.PublicKey:
		return rsaSchemes
	case *ecdsa.PublicKey:
		switch key.Curve {
		case p256.elliptic:
			return p256Schemes
		case p384.elliptic:
			return p384Schemes
		case p521.elliptic:
			return p521Schemes
		case k256.elliptic:
			return k256Schemes
		}
	}
	return nil
}

func defaultScheme(public crypto.PublicKey) keyspec.Scheme {
	if schemes := schemesOf(public); len(schemes) > 0 {
		return schemes[0]
	}
	return ""
}
