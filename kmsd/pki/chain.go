package pki

import (
	"crypto/x509"
	"time"
)

// ParseCertificate parses exactly one certificate, DER or PEM. Errors wrap ErrCertificate.
func ParseCertificate(data []byte) (*x509.Certificate, error) { panic("pki: being written") }

// ParseChain parses certificates, concatenated DER or PEM, in their order: the leaf first, each signed by the next. The order
// and the signatures are checked, trust and time are not: see Check. Errors wrap ErrCertificate or ErrChain.
func ParseChain(data []byte) ([]*x509.Certificate, error) { panic("pki: being written") }

// LinkChain checks that each certificate is signed by the next. Errors wrap ErrChain.
func LinkChain(chain []*x509.Certificate) error { panic("pki: being written") }

// Reason is one thing that is wrong with a chain.
type Reason struct {
	Index int    // of the certificate, 0 is the leaf
	Code  string // not-yet-valid, expired, bad-signature, name-mismatch, not-a-ca, path-too-long, ...
	Text  string // for people
}

// Check validates chain, leaf first, at a time against trusted roots and returns everything that is wrong; nothing means
// valid.
func Check(chain, roots []*x509.Certificate, at time.Time) []Reason { panic("pki: being written") }
