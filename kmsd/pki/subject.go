package pki

import (
	"crypto/x509"
	"net/netip"
	"net/url"
)

// Subject is what a certificate or a request says about its holder.
type Subject struct {
	RawName []byte // DER Name; ParseName makes it
	DNS     []string
	IP      []netip.Addr
	Email   []string
	URI     []*url.URL
}

// ParseSubject makes a Subject of text: dn as ParseName takes it (empty: no name, then an alternative name is needed),
// alternative names in their usual notation. Errors wrap ErrName or ErrSubject.
func ParseSubject(dn string, dns, ip, email, uri []string) (Subject, error) {
	panic("pki: being written")
}

// RequestSubject returns what a request says about its holder.
func RequestSubject(r *x509.CertificateRequest) (Subject, error) { panic("pki: being written") }

// CertificateSubject returns what a certificate says about its holder, for renewal.
func CertificateSubject(c *x509.Certificate) (Subject, error) { panic("pki: being written") }
