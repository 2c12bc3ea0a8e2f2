package pki

import (
	"crypto/x509"
	"testing"
	"time"
)

func TestAdmit(t *testing.T) {
	const year = 365 * 24 * time.Hour
	named := subject(t, "CN=P,O=Partner Ltd,C=IN").RawName
	ca := called(t, "p256", nil, "p256", "A", true)
	ten := func(c *x509.Certificate) { c.NotAfter, c.RawSubject = now.AddDate(10, 0, 0), named }
	for _, c := range []struct {
		name    string
		c       *x509.Certificate
		ca      string // reasons against it as a CA
		partner string
	}{
		{"root", called(t, "p256", nil, "p256", "x", true, ten), "", "0 self-signed"},
		{"intermediate", called(t, "p256", ca, "p384", "x", true, ten), "", ""},
		{"leaf", called(t, "p256", ca, "p384", "x", false, ten), "0 not-a-ca, 0 no-cert-sign", ""},
		{"without keyCertSign", called(t, "p256", ca, "p384", "x", true, ten, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCRLSign }), "0 no-cert-sign", ""},
		{"too short", called(t, "p256", ca, "p384", "x", true, ten, func(c *x509.Certificate) { c.NotAfter = now.Add(year - time.Second) }), "0 short-validity", "0 short-validity"},
		{"long enough", called(t, "p256", ca, "p384", "x", true, ten, func(c *x509.Certificate) { c.NotAfter = now.Add(year) }), "", ""},
		{"expired", called(t, "p256", ca, "p384", "x", true, ten, func(c *x509.Certificate) { c.NotAfter = now.Add(-time.Second) }), "0 expired", "0 expired"},
		{"future", called(t, "p256", ca, "p384", "x", true, ten, func(c *x509.Certificate) { c.NotBefore = now.Add(time.Second) }), "0 not-yet-valid", "0 not-yet-valid"},
		{"other organization", called(t, "p256", ca, "p384", "x", true, ten, func(c *x509.Certificate) { c.RawSubject = subject(t, "CN=P,O=partner Ltd").RawName }), "", "0 organization"},
		{"two organizations", called(t, "p256", ca, "p384", "x", true, ten, func(c *x509.Certificate) { c.RawSubject = subject(t, "O=Partner Ltd,O=Other").RawName }), "", "0 organization"},
		{"no organization", called(t, "p256", ca, "p384", "x", true, ten, func(c *x509.Certificate) { c.RawSubject = subject(t, "CN=P").RawName }), "", "0 organization"},
	} {
		if got := codes(AdmitCA(c.c, now, year)); got != c.ca {
			t.Errorf("%s as a CA: %q, want %q", c.name, got, c.ca)
		}
		if got := codes(AdmitPartner(c.c, now, year, "Partner Ltd")); got != c.partner {
			t.Errorf("%s as a partner: %q, want %q", c.name, got, c.partner)
		}
	}
	zero := called(t, "p256", ca, "p384", "zero", true, func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = 0, true })
	below := called(t, "p384", zero, "p521", "below", true)
	if got := codes(AdmitIssuer([]*x509.Certificate{below, zero, ca})); got != "1 path-too-long" {
		t.Error(got)
	}
	if got := codes(AdmitIssuer([]*x509.Certificate{zero, ca})); got != "" {
		t.Error(got)
	}
	old := *ca
	old.Version, old.SignatureAlgorithm = 1, x509.UnknownSignatureAlgorithm
	if got := codes(AdmitCA(&old, now, 0)); got != "0 not-version-3, 0 weak-signature" {
		t.Error(got)
	}
}
