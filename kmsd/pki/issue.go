package pki

import (
	"crypto"
	"crypto/x509"
	"time"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// Profile says what a certificate allows and for how long.
type Profile struct {
	NotBefore, NotAfter time.Time       // both needed; whole seconds
	CA                  bool            // may sign certificates
	PathLen             int             // for a CA: how many CAs may follow it; negative: any number
	KeyUsage            []string        // RFC 5280 section 4.2.1.3 names (digitalSignature, ...); empty: what key and usages imply
	ExtKeyUsage         []string        // server-auth, client-auth, code-signing, email, time-stamping, ocsp-signing
	Usages              []keyspec.Usage // of the key, to find KeyUsage; may be empty
}

// Request makes a PKCS#10 request for the signer's key, in DER. Errors wrap ErrKey or ErrSubject.
func Request(signer crypto.Signer, s Subject) ([]byte, error) { panic("pki: being written") }

// ParseRequest parses a PKCS#10 request, DER or one PEM block, and verifies its signature (proof of possession). Errors wrap
// ErrRequest or ErrKey.
func ParseRequest(data []byte) (*x509.CertificateRequest, error) { panic("pki: being written") }

// SelfSign makes a certificate of the signer's key signed by itself, in DER. Errors wrap ErrKey, ErrSubject or ErrProfile.
func SelfSign(signer crypto.Signer, s Subject, p Profile) ([]byte, error) {
	panic("pki: being written")
}

// Issue makes a certificate of public for s, signed by signer whose certificate is issuer, in DER. The issuer's name is
// copied byte for byte; the validity is clipped to the issuer's. Errors wrap ErrIssuer, ErrKey, ErrSubject or ErrProfile.
func Issue(signer crypto.Signer, issuer *x509.Certificate, public crypto.PublicKey, s Subject, p Profile) ([]byte, error) {
	panic("pki: being written")
}
