package pki

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"time"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// ErrCRL is wrapped by the errors about certificate revocation lists.
var ErrCRL = errors.New("invalid certificate revocation list")

// MaxCRL bounds a revocation list, PEM or DER, in bytes: some 25,000 entries.
const MaxCRL = 1 << 20

// Revocation is one entry of a CRL (RFC 5280 section 5.3).
type Revocation struct {
	Serial *big.Int
	At     time.Time
	Reason keyspec.Reason // the names of keyspec, and those of reasonCodes; empty is unspecified
}

// reasonCodes are the names of the CRLReason codes (RFC 5280 section 5.3.1). 7 is not used there, and 8 not in complete lists.
var reasonCodes = []keyspec.Reason{
	keyspec.Unspecified, keyspec.KeyCompromise, "ca-compromise", keyspec.AffiliationChanged, keyspec.Superseded,
	keyspec.CessationOfOperation, "certificate-hold", "", "", "privilege-withdrawn", "aa-compromise",
}

const removeFromCRL = 8

// compromising reports the reasons that say that what was signed before the revocation cannot be relied on either: whoever
// holds the key can put any date on a signature.
func compromising(r keyspec.Reason) bool {
	return r == keyspec.KeyCompromise || r == "ca-compromise" || r == "aa-compromise"
}

// RevocationList is what a CRL says about itself and about certificates.
type RevocationList struct {
	Number     *big.Int  // grows with each list of an issuer; positive, at most 20 bytes long
	ThisUpdate time.Time // whole seconds are kept
	NextUpdate time.Time
	Revoked    []Revocation // in the order given, no serial number twice
}

// SignCRL makes a complete CRL (RFC 5280 section 5, version 2, with CRL number, authority key identifier and reason codes),
// signed by signer whose certificate is issuer, in DER. Negative serial numbers are taken: there are certificates with such.
// Errors wrap ErrIssuer, ErrCRL or ErrKey.
func SignCRL(signer crypto.Signer, issuer *x509.Certificate, l RevocationList) ([]byte, error) {
	switch {
	case !sameKey(signer.Public(), issuer.PublicKey):
		return nil, fmt.Errorf("%w: its certificate is of another key", ErrIssuer)
	case issuer.KeyUsage&x509.KeyUsageCRLSign == 0:
		return nil, fmt.Errorf("%w: its key usage lacks cRLSign", ErrIssuer)
	case len(issuer.SubjectKeyId) == 0:
		return nil, fmt.Errorf("%w: it has no subject key identifier", ErrIssuer)
	case l.Number == nil || l.Number.Sign() <= 0 || l.Number.BitLen() > 159:
		return nil, fmt.Errorf("%w: its number is positive and at most 20 bytes long", ErrCRL)
	case l.ThisUpdate.IsZero() || !l.NextUpdate.After(l.ThisUpdate) || l.NextUpdate.After(lastTime):
		return nil, fmt.Errorf("%w: the next update comes after this one, and before the year 10000", ErrCRL)
	}
	template := &x509.RevocationList{
		Number: l.Number, ThisUpdate: l.ThisUpdate.UTC().Truncate(time.Second), NextUpdate: l.NextUpdate.UTC().Truncate(time.Second),
	}
	seen := make(map[string]bool, len(l.Revoked))
	for _, r := range l.Revoked {
		code := reasonCode(r.Reason)
		switch {
		case r.Serial == nil || r.At.IsZero():
			return nil, fmt.Errorf("%w: an entry lacks its serial number or its time", ErrCRL)
		case code < 0:
			return nil, fmt.Errorf("%w: %q is no reason of revocation", ErrCRL, r.Reason)
		case seen[serialKey(r.Serial)]:
			return nil, fmt.Errorf("%w: serial number %x is there twice", ErrCRL, r.Serial)
		}
		seen[serialKey(r.Serial)] = true
		template.RevokedCertificateEntries = append(template.RevokedCertificateEntries, x509.RevocationListEntry{
			SerialNumber: r.Serial, RevocationTime: r.At.UTC().Truncate(time.Second), ReasonCode: code,
		})
	}
	der, err := x509.CreateRevocationList(rand.Reader, template, issuer, signer)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrKey, err)
	}
	if len(der) > MaxCRL {
		return nil, fmt.Errorf("%w: longer than %d bytes", ErrCRL, MaxCRL)
	}
	return der, nil
}

// reasonCode returns the code of a reason, or -1.
func reasonCode(r keyspec.Reason) int {
	if r == "" {
		return 0
	}
	for code, name := range reasonCodes {
		if name == r {
			return code
		}
	}
	return -1
}

// CRL is a parsed revocation list. Its signature is checked by SignedBy and not by ParseCRL.
type CRL struct {
	*x509.RevocationList
	revoked map[string]Revocation // by serial number
}

// Extensions of a CRL and of its entries (RFC 5280 sections 5.2 and 5.3).
var (
	oidAuthorityKeyID = asn1.ObjectIdentifier{2, 5, 29, 35}
	oidCRLNumber      = asn1.ObjectIdentifier{2, 5, 29, 20}
	oidDeltaCRL       = asn1.ObjectIdentifier{2, 5, 29, 27}
	oidDistribution   = asn1.ObjectIdentifier{2, 5, 29, 28} // issuing distribution point: partial and indirect lists
	oidReasonCode     = asn1.ObjectIdentifier{2, 5, 29, 21}
	oidEntryIssuer    = asn1.ObjectIdentifier{2, 5, 29, 29}
)

// ParseCRL parses one CRL of version 2, DER or PEM. Only complete lists are taken: delta lists, indirect lists, lists with an
// issuing distribution point (which may cover a part of the certificates only) and critical extensions that are not known are
// refused, because from such a list it does not follow that what it leaves out is good. Errors wrap ErrCRL.
func ParseCRL(data []byte) (*CRL, error) {
	if len(data) > MaxCRL {
		return nil, fmt.Errorf("%w: longer than %d bytes", ErrCRL, MaxCRL)
	}
	der := data
	if isPEM(data) {
		blocks, err := decodePEM(data, "X509 CRL")
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrCRL, err)
		}
		if len(blocks) != 1 {
			return nil, fmt.Errorf("%w: not exactly one PEM block", ErrCRL)
		}
		der = blocks[0]
	}
	parsed, err := x509.ParseRevocationList(der)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrCRL, err)
	}
	switch {
	case len(parsed.Raw) != len(der):
		return nil, fmt.Errorf("%w: there is something after it", ErrCRL)
	case parsed.NextUpdate.IsZero():
		return nil, fmt.Errorf("%w: it does not say when the next comes", ErrCRL)
	case !parsed.NextUpdate.After(parsed.ThisUpdate):
		return nil, fmt.Errorf("%w: its next update is not after this one", ErrCRL)
	}
	if err := checkExtensions(parsed.Extensions, oidAuthorityKeyID, oidCRLNumber); err != nil {
		return nil, err
	}
	l := &CRL{parsed, make(map[string]Revocation, len(parsed.RevokedCertificateEntries))}
	for _, entry := range parsed.RevokedCertificateEntries {
		if err := checkExtensions(entry.Extensions, oidReasonCode); err != nil {
			return nil, err
		}
		serial := serialKey(entry.SerialNumber)
		if _, twice := l.revoked[serial]; twice {
			return nil, fmt.Errorf("%w: serial number %x is there twice", ErrCRL, entry.SerialNumber)
		}
		if entry.ReasonCode == removeFromCRL {
			return nil, fmt.Errorf("%w: it takes an entry back, as only delta lists do", ErrCRL)
		}
		r := Revocation{Serial: entry.SerialNumber, At: entry.RevocationTime, Reason: keyspec.Unspecified}
		if code := entry.ReasonCode; code > 0 && code < len(reasonCodes) && reasonCodes[code] != "" {
			r.Reason = reasonCodes[code]
		}
		l.revoked[serial] = r
	}
	return l, nil
}

// checkExtensions refuses what makes a list or an entry mean something else than this package takes it for.
func checkExtensions(extensions []pkix.Extension, known ...asn1.ObjectIdentifier) error {
	seen := map[string]bool{}
	for _, x := range extensions {
		id := x.Id.String()
		switch {
		case seen[id]:
			return fmt.Errorf("%w: extension %s is there twice", ErrCRL, id)
		case x.Id.Equal(oidDeltaCRL):
			return fmt.Errorf("%w: it is a delta list", ErrCRL)
		case x.Id.Equal(oidDistribution):
			return fmt.Errorf("%w: it is a list of one distribution point, and may be partial or indirect", ErrCRL)
		case x.Id.Equal(oidEntryIssuer):
			return fmt.Errorf("%w: it is an indirect list", ErrCRL)
		}
		seen[id] = true
		understood := false
		for _, k := range known {
			understood = understood || x.Id.Equal(k)
		}
		if x.Critical && !understood {
			return fmt.Errorf("%w: it has the critical extension %s", ErrCRL, id)
		}
	}
	return nil
}

// SignedBy checks that issuer signed the list and may: same name, cRLSign, a fit key and algorithm, a CA. Errors wrap ErrCRL.
func (l *CRL) SignedBy(issuer *x509.Certificate) error {
	switch {
	case !sameName(l.RawIssuer, issuer.RawSubject):
		return fmt.Errorf("%w: its issuer is not the subject of the certificate", ErrCRL)
	case !issuer.BasicConstraintsValid || !issuer.IsCA:
		return fmt.Errorf("%w: its issuer is not a CA", ErrCRL)
	case issuer.KeyUsage != 0 && issuer.KeyUsage&x509.KeyUsageCRLSign == 0:
		return fmt.Errorf("%w: the key usage of its issuer lacks cRLSign", ErrCRL)
	case weakSignature(l.SignatureAlgorithm):
		return fmt.Errorf("%w: it is signed with %s", ErrCRL, l.SignatureAlgorithm)
	case checkKey(issuer.PublicKey) != nil || issuer.CheckSignature(l.SignatureAlgorithm, l.RawTBSRevocationList, l.Signature) != nil:
		return fmt.Errorf("%w: its signature is not the issuer's", ErrCRL)
	}
	return nil
}

// covers reports whether the list speaks about c: whether its issuer, whose certificate is given and for whom SignedBy must
// have succeeded, issued c.
func (l *CRL) covers(c, issuer *x509.Certificate) bool {
	return sameName(c.RawIssuer, l.RawIssuer) && sameName(c.RawIssuer, issuer.RawSubject) &&
		(len(l.AuthorityKeyId) == 0 || len(issuer.SubjectKeyId) == 0 || bytes.Equal(l.AuthorityKeyId, issuer.SubjectKeyId))
}

// Revoked says whether the list has the serial number, and what it says about it.
func (l *CRL) Revoked(serial *big.Int) (Revocation, bool) {
	r, found := l.revoked[serialKey(serial)]
	return r, found
}

// serialKey returns a serial number, which can be negative, as a key of a map.
func serialKey(serial *big.Int) string {
	return string(append([]byte{byte(1 + serial.Sign())}, serial.Bytes()...))
}

// Len returns the number of entries.
func (l *CRL) Len() int { return len(l.revoked) }

// CheckCRL judges c, which issuer has issued, by a list, at a time; nothing means that it is not revoked. The list must be
// signed by issuer. Listed certificates are revoked from the time of their entry, and with a reason of compromise always,
// even when the list itself is out of date; to say that a certificate is good it has to be current. A list made after the
// time in question is good: it knows more.
func CheckCRL(index int, c, issuer *x509.Certificate, l *CRL, at time.Time) []Reason {
	if err := l.SignedBy(issuer); err != nil || !l.covers(c, issuer) {
		if err == nil {
			err = fmt.Errorf("%w: it is of another key of the issuer", ErrCRL)
		}
		return []Reason{{index, BadCRL, err.Error()}}
	}
	if r, found := l.Revoked(c.SerialNumber); found && (!at.Before(r.At) || compromising(r.Reason)) {
		return []Reason{revokedReason(index, r)}
	}
	if at.After(l.NextUpdate) {
		return []Reason{{index, StaleCRL, fmt.Sprintf("the revocation list of its issuer ran out on %s", l.NextUpdate.UTC().Format(time.RFC3339))}}
	}
	return nil
}

func revokedReason(index int, r Revocation) Reason {
	return Reason{index, Revoked, fmt.Sprintf("its issuer revoked it on %s (%s)", r.At.UTC().Format(time.RFC3339), r.Reason)}
}

// The codes of what revocation lists say.
const (
	Revoked  Code = "revoked"
	StaleCRL Code = "stale-crl"
	BadCRL   Code = "bad-crl"
)
