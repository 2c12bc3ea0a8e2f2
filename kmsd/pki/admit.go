package pki

import (
	"crypto/x509"
	"fmt"
	"time"
)

// The codes of what speaks against taking a certificate into a store, beside those of Check.
const (
	OldVersion    Code = "not-version-3"
	ShortValidity Code = "short-validity" // too little time is left
	SelfSigned    Code = "self-signed"
	Organization  Code = "organization" // is another than stated
	Duplicate     Code = "duplicate"
)

// IsSelfSigned reports whether c is signed by its own key, which must be fit for that: one that is as long as the certificate allows
// takes its time.
func IsSelfSigned(c *x509.Certificate) bool {
	return sameName(c.RawIssuer, c.RawSubject) && checkKey(c.PublicKey) == nil && c.CheckSignature(c.SignatureAlgorithm, c.RawTBSCertificate, c.Signature) == nil
}

// HasWeakSignature reports whether c is signed with an algorithm on which nothing may rest: of SHA-1, MD5 or DSA.
func HasWeakSignature(c *x509.Certificate) bool { return weakSignature(c.SignatureAlgorithm) }

// AdmitCA returns what speaks, by itself, against a certificate of a CA: against its version, its dates (at least left must be left
// at a time), its key and signature, and its being no CA. The path to a root is another matter, and for Trust.Verify. The index of
// the reasons is 0.
func AdmitCA(c *x509.Certificate, at time.Time, left time.Duration) []Reason {
	reasons := admit(c, at, left)
	if !c.BasicConstraintsValid || !c.IsCA {
		reasons = append(reasons, Reason{0, NotCA, "it is not a CA"})
	}
	if c.KeyUsage&x509.KeyUsageCertSign == 0 {
		reasons = append(reasons, Reason{0, NoCertSign, "its key usage lacks keyCertSign"})
	}
	return reasons
}

// AdmitPartner is AdmitCA for the certificate of a partner, of which organization is the name: it must be the one organization of
// the subject, letter by letter.
func AdmitPartner(c *x509.Certificate, at time.Time, left time.Duration, organization string) []Reason {
	reasons := admit(c, at, left)
	if IsSelfSigned(c) {
		reasons = append(reasons, Reason{0, SelfSigned, "it is signed by itself, not by a CA of the domain"})
	}
	if o := c.Subject.Organization; len(o) != 1 || o[0] != organization {
		reasons = append(reasons, Reason{0, Organization, fmt.Sprintf("its organization is %q, not %q", o, organization)})
	}
	return reasons
}

// admit is what both have in common.
func admit(c *x509.Certificate, at time.Time, left time.Duration) (reasons []Reason) {
	add := func(code Code, format string, args ...any) {
		reasons = append(reasons, Reason{0, code, fmt.Sprintf(format, args...)})
	}
	if c.Version != 3 {
		add(OldVersion, "it is of version %d", c.Version)
	}
	switch {
	case at.Before(c.NotBefore):
		add(NotYetValid, "it is valid from %s", c.NotBefore.UTC().Format(time.RFC3339))
	case at.After(c.NotAfter):
		add(Expired, "it was valid until %s", c.NotAfter.UTC().Format(time.RFC3339))
	case c.NotAfter.Before(at.Add(left)):
		add(ShortValidity, "it is valid until %s, and at least %d days have to be left", c.NotAfter.UTC().Format(time.RFC3339), left/(24*time.Hour))
	}
	if err := checkKey(c.PublicKey); err != nil {
		add(WeakKey, "%v", err)
	}
	if weakSignature(c.SignatureAlgorithm) || c.SignatureAlgorithm == x509.UnknownSignatureAlgorithm {
		add(WeakSignature, "it is signed with %s", c.SignatureAlgorithm)
	}
	if len(c.UnhandledCriticalExtensions) > 0 {
		add(CriticalExtension, "it has the critical extension %v", c.UnhandledCriticalExtensions[0])
	}
	return reasons
}

// AdmitIssuer returns what speaks against the first certificate of a path, which is trusted, issuing others: a CA above it whose path
// length leaves no room for it. The path itself is good, for the last certificate of a path does not count (RFC 5280 section 4.2.1.9).
func AdmitIssuer(path []*x509.Certificate) []Reason {
	cas := 0
	for i, c := range path {
		if limit, limited := pathLen(c); i > 0 && limited && cas > limit {
			return []Reason{{i, PathTooLong, fmt.Sprintf("its path length is %d, so that the CA below it can issue nothing", limit)}}
		}
		if !sameName(c.RawSubject, c.RawIssuer) {
			cas++
		}
	}
	return nil
}
