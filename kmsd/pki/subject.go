package pki

import (
	"bytes"
	"crypto/x509"
	"fmt"
	"net/netip"
	"net/url"
	"strings"
	"unicode"
)

// Subject is what a certificate or a request says about its holder.
type Subject struct {
	RawName []byte // DER Name; ParseName makes it
	DNS     []string
	IP      []netip.Addr
	Email   []string
	URI     []*url.URL
}

var emptyName = []byte{0x30, 0x00}

// ParseSubject makes a Subject of text: dn as ParseName takes it (empty: no name, then an alternative name is needed),
// alternative names in their usual notation. Errors wrap ErrName or ErrSubject.
func ParseSubject(dn string, dns, ip, email, uri []string) (Subject, error) {
	raw, err := ParseName(dn)
	if err != nil {
		return Subject{}, err
	}
	s := Subject{RawName: raw, DNS: dns, Email: email}
	if len(dns)+len(ip)+len(email)+len(uri) > MaxNames {
		return Subject{}, fmt.Errorf("%w: more than %d", ErrSubject, MaxNames)
	}
	for _, text := range ip {
		addr, err := netip.ParseAddr(text)
		if err != nil {
			return Subject{}, fmt.Errorf("%w: IP address %q", ErrSubject, text)
		}
		s.IP = append(s.IP, addr)
	}
	for _, text := range uri {
		u, err := url.Parse(text)
		if err != nil {
			return Subject{}, fmt.Errorf("%w: URI %q", ErrSubject, text)
		}
		s.URI = append(s.URI, u)
	}
	return s, s.check()
}

// RequestSubject returns what a request says about its holder. Errors wrap ErrName or ErrSubject.
func RequestSubject(r *x509.CertificateRequest) (Subject, error) {
	return subjectOf(r.RawSubject, r.DNSNames, r.EmailAddresses, r.URIs, addresses(r.IPAddresses))
}

// CertificateSubject returns what a certificate says about its holder, for renewal. Errors wrap ErrName or ErrSubject.
func CertificateSubject(c *x509.Certificate) (Subject, error) {
	return subjectOf(c.RawSubject, c.DNSNames, c.EmailAddresses, c.URIs, addresses(c.IPAddresses))
}

func subjectOf(raw []byte, dns, email []string, uri []*url.URL, ip []netip.Addr) (Subject, error) {
	s := Subject{RawName: raw, DNS: dns, IP: ip, Email: email, URI: uri}
	return s, s.check()
}

// addresses converts net.IP without this package having to import net.
func addresses[T ~[]byte](ips []T) []netip.Addr {
	var addrs []netip.Addr
	for _, ip := range ips {
		addr, _ := netip.AddrFromSlice(ip)
		addrs = append(addrs, addr)
	}
	return addrs
}

// check judges a Subject, wherever it came from: a request is somebody else's word.
func (s Subject) check() error {
	rdns, err := parseRDNs(s.RawName)
	if err != nil {
		return err
	}
	if len(s.RawName) > MaxName || len(rdns) > MaxRDNs {
		return fmt.Errorf("%w: longer than %d bytes or %d attributes", ErrName, MaxName, MaxRDNs)
	}
	names := len(s.DNS) + len(s.IP) + len(s.Email) + len(s.URI)
	switch {
	case names > MaxNames:
		return fmt.Errorf("%w: more than %d", ErrSubject, MaxNames)
	case names == 0 && bytes.Equal(s.RawName, emptyName):
		return fmt.Errorf("%w: a subject needs a distinguished name or an alternative name", ErrSubject)
	}
	for _, name := range s.DNS {
		if !validHost(strings.TrimPrefix(name, "*.")) {
			return fmt.Errorf("%w: DNS name %q", ErrSubject, name)
		}
	}
	for _, addr := range s.IP {
		if !addr.IsValid() || addr.Zone() != "" {
			return fmt.Errorf("%w: IP address %q", ErrSubject, addr)
		}
	}
	for _, email := range s.Email {
		local, host, _ := strings.Cut(email, "@")
		if local == "" || len(email) > 254 || strings.ContainsFunc(local, notAtom) || !validHost(host) {
			return fmt.Errorf("%w: mail address %q", ErrSubject, email)
		}
	}
	for _, u := range s.URI {
		text := u.String()
		if u.Scheme == "" || u.Host == "" && u.Opaque == "" || len(text) > 1024 || strings.ContainsFunc(text, notVisible) {
			return fmt.Errorf("%w: URI %q", ErrSubject, text)
		}
	}
	return nil
}

// validHost reports whether s is a host name in ASCII (RFC 1123 section 2.1, RFC 5280 section 4.2.1.6).
func validHost(s string) bool {
	if len(s) > 253 {
		return false
	}
	for label := range strings.SplitSeq(s, ".") {
		if label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' {
			return false
		}
		for i := range len(label) {
			if c := label[i]; !isLetter(c) && (c < '0' || c > '9') && c != '-' {
				return false
			}
		}
	}
	return true
}

func notVisible(r rune) bool { return r <= ' ' || r > '~' }

// notAtom reports what a mailbox may not hold unquoted (RFC 5321 section 4.1.2, dot-atom).
func notAtom(r rune) bool {
	return r > unicode.MaxASCII || !isLetter(byte(r)) && (r < '0' || r > '9') && !strings.ContainsRune(".!#$%&'*+-/=?^_`{|}~", r)
}
