// Package keyspec is the vocabulary of kmsd: the words for algorithms, usages, states, origins, protections and names
// that the wire, the store, the policy and the tools share.
//
// Every word is a string on the wire and on disk, so that nothing is ever renumbered, and the zero value of every type
// is invalid. The package imports nothing of kmsd.
package keyspec

import "errors"

// Errors of the parsers in this package. They are wrapped with the text that was refused.
var (
	ErrName      = errors.New("invalid key name")
	ErrAlgorithm = errors.New("unknown algorithm")
	ErrUsage     = errors.New("unknown usage")
	ErrScheme    = errors.New("unknown scheme")
	ErrState     = errors.New("unknown key state")
	ErrReason    = errors.New("unknown revocation reason")
	ErrEscrow    = errors.New("unknown way of escrow")
)

// Algorithm is a key type together with the set of schemes it may be used with. It is fixed when the key is created.
type Algorithm string

// The algorithms of this release.
const (
	RSA2048          Algorithm = "rsa-2048"
	RSA3072          Algorithm = "rsa-3072"
	RSA4096          Algorithm = "rsa-4096"
	ECDSAP256        Algorithm = "ecdsa-p256"
	ECDSAP384        Algorithm = "ecdsa-p384"
	ECDSAP521        Algorithm = "ecdsa-p521"
	ECDSASecp256k1   Algorithm = "ecdsa-secp256k1"
	Ed25519          Algorithm = "ed25519"
	X25519           Algorithm = "x25519"
	ECDHP256         Algorithm = "ecdh-p256"
	ECDHP384         Algorithm = "ecdh-p384"
	ECDHP521         Algorithm = "ecdh-p521"
	AES128GCM        Algorithm = "aes-128-gcm"
	AES256GCM        Algorithm = "aes-256-gcm"
	ChaCha20Poly1305 Algorithm = "chacha20-poly1305"
	HMACSHA256       Algorithm = "hmac-sha256"
	HMACSHA384       Algorithm = "hmac-sha384"
	HMACSHA512       Algorithm = "hmac-sha512"
	HKDFSHA256       Algorithm = "hkdf-sha256"
)

// Algorithms lists every algorithm in the order in which tools show them.
func Algorithms() []Algorithm {
	return []Algorithm{
		RSA2048, RSA3072, RSA4096, ECDSAP256, ECDSAP384, ECDSAP521, ECDSASecp256k1, Ed25519,
		X25519, ECDHP256, ECDHP384, ECDHP521,
		AES128GCM, AES256GCM, ChaCha20Poly1305, HMACSHA256, HMACSHA384, HMACSHA512, HKDFSHA256,
	}
}

// ParseAlgorithm returns the algorithm named s or an error that wraps ErrAlgorithm.
func ParseAlgorithm(s string) (Algorithm, error) {
	return parse(s, Algorithms(), ErrAlgorithm)
}

// Scheme says how an algorithm is applied: padding and hash for a signature or a decryption.
type Scheme string

// The schemes of this release. A signature scheme names the hash, because a digest signed without its name could be
// taken for another (FIPS 186-5 section 5.4, RFC 8017 section 9.2).
const (
	RSAPSSSHA256   Scheme = "rsa-pss-sha256"
	RSAPSSSHA384   Scheme = "rsa-pss-sha384"
	RSAPSSSHA512   Scheme = "rsa-pss-sha512"
	RSAPKCS1SHA256 Scheme = "rsa-pkcs1-sha256"
	RSAPKCS1SHA384 Scheme = "rsa-pkcs1-sha384"
	RSAPKCS1SHA512 Scheme = "rsa-pkcs1-sha512"
	RSAOAEPSHA256  Scheme = "rsa-oaep-sha256"

	// RSAOAEPSHA256MGF1SHA1 is what the keystore of Android can do: SHA-256 for the label and SHA-1 for MGF1. For decryption only.
	RSAOAEPSHA256MGF1SHA1 Scheme = "rsa-oaep-mgf1sha1-sha256"

	ECDSASHA256 Scheme = "ecdsa-sha256"
	ECDSASHA384 Scheme = "ecdsa-sha384"
	ECDSASHA512 Scheme = "ecdsa-sha512"
	PureEd25519 Scheme = "ed25519"
)

// Schemes lists every scheme.
func Schemes() []Scheme {
	return []Scheme{
		RSAPSSSHA256, RSAPSSSHA384, RSAPSSSHA512, RSAPKCS1SHA256, RSAPKCS1SHA384, RSAPKCS1SHA512, RSAOAEPSHA256,
		RSAOAEPSHA256MGF1SHA1,
		ECDSASHA256, ECDSASHA384, ECDSASHA512, PureEd25519,
	}
}

// ParseScheme returns the scheme named s or an error that wraps ErrScheme.
func ParseScheme(s string) (Scheme, error) { return parse(s, Schemes(), ErrScheme) }

// Usage is one thing a key may be used for.
type Usage string

// The usages (NIST SP 800-57 part 1 section 5.1; PKCS#11 CKA_SIGN and its siblings).
const (
	Sign    Usage = "sign"
	Verify  Usage = "verify"
	Encrypt Usage = "encrypt"
	Decrypt Usage = "decrypt"
	Wrap    Usage = "wrap"
	Unwrap  Usage = "unwrap"
	MAC     Usage = "mac"
	Agree   Usage = "agree"
	Derive  Usage = "derive"
	Certify Usage = "certify"
)

// Usages lists every usage in the order in which tools show them.
func Usages() []Usage {
	return []Usage{Sign, Verify, Encrypt, Decrypt, Wrap, Unwrap, MAC, Agree, Derive, Certify}
}

// ParseUsage returns the usage named s or an error that wraps ErrUsage.
func ParseUsage(s string) (Usage, error) { return parse(s, Usages(), ErrUsage) }

// State is the state of one key version (NIST SP 800-57 part 1 section 7).
type State string

// The states and what they allow.
const (
	PreActive   State = "pre-active"  // nothing yet
	Active      State = "active"      // everything the usage allows
	Suspended   State = "suspended"   // nothing until resumed
	Deactivated State = "deactivated" // rotated out or expired: verify, decrypt, unwrap
	Compromised State = "compromised" // verify with a warning, decrypt only by explicit grant
	Destroyed   State = "destroyed"   // a tombstone, the material is gone
)

// States lists every state.
func States() []State {
	return []State{PreActive, Active, Suspended, Deactivated, Compromised, Destroyed}
}

// ParseState returns the state named s or an error that wraps ErrState.
func ParseState(s string) (State, error) { return parse(s, States(), ErrState) }

// Permits reports whether a version in state s may be put to usage u. Decryption with a compromised key needs an
// explicit grant besides; Permits answers false for it.
func (s State) Permits(u Usage) bool {
	switch s {
	case Active:
		return true
	case Deactivated:
		return u == Verify || u == Decrypt || u == Unwrap
	case Compromised:
		return u == Verify
	}
	return false
}

// Reason says why a key was revoked (RFC 5280 section 5.3.1).
type Reason string

// The revocation reasons kmsd knows.
const (
	Unspecified          Reason = "unspecified"
	KeyCompromise        Reason = "key-compromise"
	AffiliationChanged   Reason = "affiliation-changed"
	Superseded           Reason = "superseded"
	CessationOfOperation Reason = "cessation-of-operation"
)

// Reasons lists every revocation reason.
func Reasons() []Reason {
	return []Reason{Unspecified, KeyCompromise, AffiliationChanged, Superseded, CessationOfOperation}
}

// ParseReason returns the reason named s or an error that wraps ErrReason.
func ParseReason(s string) (Reason, error) { return parse(s, Reasons(), ErrReason) }

// Origin says where key material came from.
type Origin string

// The origins.
const (
	Generated Origin = "generated"
	Imported  Origin = "imported"
	Derived   Origin = "derived"
	Foreign   Origin = "foreign" // somebody else's: the public half with a certificate, to encrypt and verify with
)

// Escrow says what becomes of a namespace wrapping key that a device wraps, should the device be lost.
type Escrow string

// The ways of escrow.
const (
	EscrowRecipients Escrow = "recipients" // the escrow recipients of the store can open it, in the store and in every backup
	EscrowNone       Escrow = "none"       // only the device can: the keys of the namespace die with it
)

// Escrows lists every way of escrow.
func Escrows() []Escrow { return []Escrow{EscrowRecipients, EscrowNone} }

// ParseEscrow returns the way of escrow named s or an error that wraps ErrEscrow.
func ParseEscrow(s string) (Escrow, error) { return parse(s, Escrows(), ErrEscrow) }

// Protection says where private key material is when it is used.
type Protection string

// The protections.
const (
	Software Protection = "software" // unwrapped in the daemon's memory for use
	TPM      Protection = "tpm"      // resident in a TPM
	HSM      Protection = "hsm"      // resident in a PKCS#11 token
)
