package keyspec

import (
	"crypto"
	"strings"
)

// Asymmetric reports whether keys of this algorithm have a public half.
func (a Algorithm) Asymmetric() bool {
	switch a {
	case AES128GCM, AES256GCM, ChaCha20Poly1305, HMACSHA256, HMACSHA384, HMACSHA512, HKDFSHA256:
		return false
	}
	return a != ""
}

// IsRSA reports whether a is RSA of some size.
func (a Algorithm) IsRSA() bool { return a == RSA2048 || a == RSA3072 || a == RSA4096 }

// SignatureScheme returns the scheme of signatures for which none is named, empty for algorithms that do not sign. The hash
// is the one that fits the curve (FIPS 186-5 section 6.1.1).
func (a Algorithm) SignatureScheme() Scheme {
	switch a {
	case RSA2048, RSA3072, RSA4096:
		return RSAPSSSHA256
	case ECDSAP256, ECDSASecp256k1:
		return ECDSASHA256
	case ECDSAP384:
		return ECDSASHA384
	case ECDSAP521:
		return ECDSASHA512
	case Ed25519:
		return PureEd25519
	}
	return ""
}

// Hash returns the hash that the scheme applies to the message, 0 for one that takes the message itself.
func (s Scheme) Hash() crypto.Hash {
	switch s[strings.LastIndexByte(string(s), '-')+1:] {
	case "sha256":
		return crypto.SHA256
	case "sha384":
		return crypto.SHA384
	case "sha512":
		return crypto.SHA512
	}
	return 0
}
