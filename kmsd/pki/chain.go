package pki

import (
	"bytes"
	"crypto/x509"
	"fmt"
	"strings"
	"time"

	"github.com/kmsd-project/kmsd/client/pkix"
)

// ParseCertificate parses exactly one certificate, DER or PEM. Errors wrap ErrCertificate.
func ParseCertificate(data []byte) (*x509.Certificate, error) {
	chain, err := parseCertificates(data)
	if err != nil {
		return nil, err
	}
	if len(chain) != 1 {
		return nil, fmt.Errorf("%w: not exactly one", ErrCertificate)
	}
	return chain[0], nil
}

// ParseChain parses certificates, concatenated DER or PEM, in their order: the leaf first, each signed by the next. The order
// and the signatures are checked, trust and time are not: see Check. Errors wrap ErrCertificate or ErrChain.
func ParseChain(data []byte) ([]*x509.Certificate, error) {
	chain, err := parseCertificates(data)
	if err != nil {
		return nil, err
	}
	return chain, LinkChain(chain)
}

// parseCertificates parses 1 to MaxChain certificates.
func parseCertificates(data []byte) ([]*x509.Certificate, error) {
	if len(data) > MaxChainBytes {
		return nil, fmt.Errorf("%w: longer than %d bytes", ErrCertificate, MaxChainBytes)
	}
	if !isPEM(data) {
		chain, err := pkix.ParseCertificates(data)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrCertificate, err)
		}
		return chain, checkSizes(chain)
	}
	blocks, err := decodePEM(data, "CERTIFICATE")
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrCertificate, err)
	}
	if len(blocks) > MaxChain {
		return nil, fmt.Errorf("%w: more than %d", ErrCertificate, MaxChain)
	}
	var chain []*x509.Certificate
	for i, der := range blocks {
		c, err := pkix.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("%w %d: %w", ErrCertificate, i, err)
		}
		chain = append(chain, c)
	}
	return chain, checkSizes(chain)
}

func checkSizes(chain []*x509.Certificate) error {
	if len(chain) == 0 || len(chain) > MaxChain {
		return fmt.Errorf("%w: 1 to %d are taken", ErrCertificate, MaxChain)
	}
	for i, c := range chain {
		if len(c.Raw) > MaxCertificate {
			return fmt.Errorf("%w %d: longer than %d bytes", ErrCertificate, i, MaxCertificate)
		}
	}
	return nil
}

func countLines(data []byte, prefix string) int {
	n := 0
	for line := range bytes.Lines(data) {
		if bytes.HasPrefix(line, []byte(prefix)) {
			n++
		}
	}
	return n
}

// LinkChain checks that each certificate names the next as its issuer and is signed by it. Errors wrap ErrChain.
func LinkChain(chain []*x509.Certificate) error {
	if err := checkSizes(chain); err != nil {
		return err
	}
	for i, c := range chain[:len(chain)-1] {
		if reasons := link(i, c, chain[i+1]); len(reasons) > 0 {
			return fmt.Errorf("%w: %s", ErrChain, reasons[0])
		}
	}
	return nil
}

// Code names a kind of fault of a chain.
type Code string

// The codes.
const (
	NotYetValid       Code = "not-yet-valid"
	Expired           Code = "expired"
	WeakKey           Code = "weak-key"
	WeakSignature     Code = "weak-signature"
	BadSignature      Code = "bad-signature"
	NameMismatch      Code = "name-mismatch" // the issuer's name is not that of the next certificate
	NotCA             Code = "not-a-ca"
	NoCertSign        Code = "no-cert-sign"
	PathTooLong       Code = "path-too-long"
	NameNotAllowed    Code = "name-not-allowed" // by the name constraints of a CA
	CriticalExtension Code = "unknown-critical-extension"
	Untrusted         Code = "untrusted" // the chain ends in no root
	Malformed         Code = "malformed" // no certificates, or too many
)

// Reason is one thing that is wrong with a chain.
type Reason struct {
	Index int // of the certificate, 0 is the leaf
	Code  Code
	Text  string // for people
}

// String returns the reason for people.
func (r Reason) String() string {
	return fmt.Sprintf("certificate %d: %s (%s)", r.Index, r.Text, r.Code)
}

// Check validates chain, leaf first, at a time against trusted roots (RFC 5280 section 6.1, without policies and revocation)
// and returns everything that is wrong; nothing means valid. The chain is taken as it is given, no other path is looked for:
// it ends at the first certificate that is a root, or in one that a root signed. A root's own validity counts.
//
// Names are compared as RFC 5280 section 7.1 says, not by bytes, because issuers exist that re-encode their name.
func Check(chain, roots []*x509.Certificate, at time.Time) []Reason {
	if err := checkSizes(chain); err != nil {
		return []Reason{{0, Malformed, err.Error()}}
	}
	path, trusted := anchor(chain, roots)
	var reasons []Reason
	cas := 0 // between the certificate and the leaf, those issued by themselves not counted (RFC 5280 section 4.2.1.9)
	for i, c := range path {
		add := func(code Code, format string, args ...any) {
			reasons = append(reasons, Reason{i, code, fmt.Sprintf(format, args...)})
		}
		if at.Before(c.NotBefore) {
			add(NotYetValid, "it is valid from %s", c.NotBefore.UTC().Format(time.RFC3339))
		}
		if at.After(c.NotAfter) {
			add(Expired, "it was valid until %s", c.NotAfter.UTC().Format(time.RFC3339))
		}
		if err := checkKey(c.PublicKey); err != nil {
			add(WeakKey, "%v", err)
		}
		if len(c.UnhandledCriticalExtensions) > 0 {
			add(CriticalExtension, "it has the critical extension %v", c.UnhandledCriticalExtensions[0])
		}
		if i > 0 {
			if !c.BasicConstraintsValid || !c.IsCA {
				add(NotCA, "it signed another and is not a CA")
			}
			if c.KeyUsage != 0 && c.KeyUsage&x509.KeyUsageCertSign == 0 {
				add(NoCertSign, "it signed another and its key usage lacks keyCertSign")
			}
			if limit, limited := pathLen(c); limited && cas > limit {
				add(PathTooLong, "%d CAs follow it and its path length is %d", cas, limit)
			}
			if !sameName(c.RawSubject, c.RawIssuer) {
				cas++
			}
		}
		if i+1 < len(path) {
			reasons = append(reasons, link(i, c, path[i+1])...)
		}
	}
	if !trusted {
		reasons = append(reasons, Reason{len(path) - 1, Untrusted, "it is no root, and no root signed it"})
	}
	if len(reasons) == 0 {
		if err := checkNames(path, at); err != nil {
			reasons = append(reasons, Reason{0, NameNotAllowed, err.Error()})
		}
	}
	return reasons
}

// anchor returns chain up to the first root, or with the root that signed its end appended, and whether it found one.
func anchor(chain, roots []*x509.Certificate) (path []*x509.Certificate, trusted bool) {
	for i, c := range chain {
		for _, root := range roots {
			if c.Equal(root) {
				return chain[:i+1], true
			}
		}
	}
	last := len(chain) - 1
	for _, root := range roots {
		if len(link(last, chain[last], root)) == 0 {
			return append(chain[:last+1:last+1], root), true
		}
	}
	return chain, false
}

// link returns what is wrong between a certificate and its issuer.
func link(i int, c, issuer *x509.Certificate) []Reason {
	if !sameName(c.RawIssuer, issuer.RawSubject) {
		return []Reason{{i, NameMismatch, "its issuer is not the subject of the next"}}
	}
	if weakSignature(c.SignatureAlgorithm) {
		return []Reason{{i, WeakSignature, fmt.Sprintf("it is signed with %s", c.SignatureAlgorithm)}}
	}
	if checkKey(issuer.PublicKey) != nil || issuer.CheckSignature(c.SignatureAlgorithm, c.RawTBSCertificate, c.Signature) != nil {
		return []Reason{{i, BadSignature, "its signature is not the next one's"}}
	}
	return nil
}

// weakSignature reports the algorithms that crypto/x509 would still verify in a low-level call.
func weakSignature(a x509.SignatureAlgorithm) bool {
	switch a {
	case x509.SHA1WithRSA, x509.ECDSAWithSHA1, x509.DSAWithSHA1, x509.DSAWithSHA256, x509.MD5WithRSA, x509.MD2WithRSA:
		return true
	}
	return false
}

func constrainsNames(c *x509.Certificate) bool {
	return len(c.PermittedDNSDomains)+len(c.ExcludedDNSDomains)+len(c.PermittedIPRanges)+len(c.ExcludedIPRanges)+
		len(c.PermittedEmailAddresses)+len(c.ExcludedEmailAddresses)+len(c.PermittedURIDomains)+len(c.ExcludedURIDomains) > 0
}

// checkNames lets crypto/x509 judge the name constraints of path, if there are any.
func checkNames(path []*x509.Certificate, at time.Time) error {
	constrained := false
	intermediates, roots := x509.NewCertPool(), x509.NewCertPool()
	for i, c := range path[1:] {
		constrained = constrained || constrainsNames(c)
		if i+2 == len(path) {
			roots.AddCert(c)
		} else {
			intermediates.AddCert(c)
		}
	}
	if !constrained {
		return nil
	}
	_, err := path[0].Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: intermediates, CurrentTime: at, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	})
	if err != nil {
		return fmt.Errorf("name constraints: %s", strings.TrimPrefix(err.Error(), "x509: "))
	}
	return nil
}
