// Package pki makes and checks X.509 certificates (RFC 5280) and PKCS#10 requests (RFC 2986): pure functions that take a
// crypto.Signer where something is to be signed and a time where one is needed.
//
// Certificates with negative serial numbers exist in the field (MOSIP makes them half of the time), and keys of secp256k1, which
// crypto/x509 does not know. Both are read and verified like others; package pkix says how. Certificates made here have positive serial
// numbers.
package pki

import "errors"

// Errors of this package. They are wrapped with a reason.
var (
	ErrName        = errors.New("invalid distinguished name")
	ErrSubject     = errors.New("invalid subject alternative name")
	ErrProfile     = errors.New("invalid certificate profile")
	ErrRequest     = errors.New("invalid certificate request")
	ErrCertificate = errors.New("invalid certificate")
	ErrIssuer      = errors.New("issuer may not issue this certificate")
	ErrKey         = errors.New("key not fit for certificates")
	ErrChain       = errors.New("certificate chain is not valid")
)

// Limits of what is parsed.
const (
	MaxName        = 1024     // a distinguished name as text, in bytes
	MaxRDNs        = 32       // attributes of a distinguished name
	MaxNames       = 100      // alternative names of one subject
	MaxRequest     = 16 << 10 // a request, PEM or DER, in bytes
	MaxCertificate = 16 << 10 // one certificate in DER, in bytes
	MaxChain       = 10       // certificates of a chain
	MaxChainBytes  = 64 << 10 // a chain file, PEM or DER, in bytes
)
