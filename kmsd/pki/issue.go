package pki

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"math/big"

	"github.com/kmsd-project/kmsd/client/pkix"
)

// SelfSign makes a certificate of the signer's key signed by itself, in DER. Errors wrap ErrKey, ErrSubject or ErrProfile.
func SelfSign(signer crypto.Signer, s Subject, p Profile) ([]byte, error) {
	template, err := newTemplate(signer.Public(), s, p)
	if err != nil {
		return nil, err
	}
	if bytes.Equal(s.RawName, emptyName) {
		return nil, fmt.Errorf("%w: an issuer needs a distinguished name", ErrSubject)
	}
	template.AuthorityKeyId = template.SubjectKeyId
	return create(template, template, signer.Public(), signer)
}

// Issue makes a certificate of public for s, signed by signer whose certificate is issuer, in DER.
//
// The issuer must be a CA with keyCertSign whose path length leaves room, and its key the signer's. Its name is copied byte
// for byte, because verifiers compare bytes. The validity is clipped to the issuer's. Errors wrap ErrIssuer, ErrKey,
// ErrSubject or ErrProfile.
func Issue(signer crypto.Signer, issuer *x509.Certificate, public crypto.PublicKey, s Subject, p Profile) ([]byte, error) {
	template, err := newTemplate(public, s, p)
	if err != nil {
		return nil, err
	}
	switch {
	case !sameKey(signer.Public(), issuer.PublicKey):
		return nil, fmt.Errorf("%w: its certificate is of another key", ErrIssuer)
	case !issuer.BasicConstraintsValid || !issuer.IsCA:
		return nil, fmt.Errorf("%w: it is not a CA", ErrIssuer)
	case issuer.KeyUsage&x509.KeyUsageCertSign == 0:
		return nil, fmt.Errorf("%w: its key usage lacks keyCertSign", ErrIssuer)
	case bytes.Equal(issuer.RawSubject, emptyName):
		return nil, fmt.Errorf("%w: it has no name", ErrIssuer)
	}
	if limit, limited := pathLen(issuer); p.CA && limited {
		switch {
		case limit == 0:
			return nil, fmt.Errorf("%w: no CA may follow it (path length 0)", ErrIssuer)
		case p.PathLen < 0:
			template.MaxPathLen, template.MaxPathLenZero = limit-1, limit == 1
		case p.PathLen >= limit:
			return nil, fmt.Errorf("%w: its path length allows at most %d below this certificate", ErrIssuer, limit-1)
		}
	}
	template.AuthorityKeyId = issuer.SubjectKeyId // crypto/x509 leaves it out where subject and issuer have one name
	if template.NotBefore.Before(issuer.NotBefore) {
		template.NotBefore = issuer.NotBefore
	}
	if template.NotAfter.After(issuer.NotAfter) {
		template.NotAfter = issuer.NotAfter
	}
	if !template.NotAfter.After(template.NotBefore) {
		return nil, fmt.Errorf("%w: it is not valid in that time", ErrIssuer)
	}
	der, err := create(template, issuer, public, signer)
	if err != nil {
		return nil, err
	}
	if constrainsNames(issuer) {
		made, err := pkix.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrCertificate, err)
		}
		if err := checkNames([]*x509.Certificate{made, issuer}, made.NotBefore); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrIssuer, err)
		}
	}
	return der, nil
}

// pathLen returns the path length constraint of c, if it has one.
func pathLen(c *x509.Certificate) (limit int, limited bool) {
	return c.MaxPathLen, c.MaxPathLen > 0 || c.MaxPathLen == 0 && c.MaxPathLenZero
}

// newTemplate returns what SelfSign and Issue have in common.
func newTemplate(public crypto.PublicKey, s Subject, p Profile) (*x509.Certificate, error) {
	if err := checkKey(public); err != nil {
		return nil, err
	}
	if err := s.check(); err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber:          newSerial(),
		RawSubject:            s.RawName,
		DNSNames:              s.DNS,
		EmailAddresses:        s.Email,
		URIs:                  s.URI,
		BasicConstraintsValid: true,
		IsCA:                  p.CA,
		MaxPathLen:            -1,
	}
	for _, addr := range s.IP {
		template.IPAddresses = append(template.IPAddresses, addr.AsSlice())
	}
	if p.CA && p.PathLen >= 0 {
		template.MaxPathLen, template.MaxPathLenZero = p.PathLen, p.PathLen == 0
	}
	var err error
	if template.NotBefore, template.NotAfter, err = p.validity(); err != nil {
		return nil, err
	}
	if template.KeyUsage, err = p.keyUsage(public); err != nil {
		return nil, err
	}
	if template.ExtKeyUsage, err = p.extKeyUsage(); err != nil {
		return nil, err
	}
	template.SubjectKeyId, err = keyID(public)
	return template, err
}

func create(template, parent *x509.Certificate, public crypto.PublicKey, signer crypto.Signer) ([]byte, error) {
	var der []byte
	var err error
	if pkix.IsSecp256k1(public) || pkix.IsSecp256k1(signer.Public()) {
		der, err = createSecp256k1(template, parent, public, signer)
	} else {
		der, err = x509.CreateCertificate(rand.Reader, template, parent, public, signer)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrKey, err)
	}
	return der, nil
}

// newSerial returns a random serial number: positive and at most 20 bytes long as RFC 5280 section 4.1.2.2 demands, with
// 158 random bits. The bit above them is set, so that all serial numbers have the same length.
func newSerial() *big.Int {
	var b [20]byte
	rand.Read(b[:]) // never fails
	b[0] = b[0]&0x3f | 0x40
	return new(big.Int).SetBytes(b[:])
}
