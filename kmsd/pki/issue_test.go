package pki

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"math/big"
	"testing"
	"time"
)

func TestIssueRefuses(t *testing.T) {
	rsa1024, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ca, other := keys()["p256"], keys()["p256b"]
	with := func(change func(*Profile)) Profile {
		p := tenYear
		change(&p)
		return p
	}
	open := root(t, "p256", tenYear)
	zero := root(t, "p256", with(func(p *Profile) { p.PathLen = 0 }))
	two := root(t, "p256", with(func(p *Profile) { p.PathLen = 2 }))
	leaf := root(t, "p256", oneYear)
	noSign := *open
	noSign.KeyUsage = x509.KeyUsageCRLSign
	for _, c := range []struct {
		name   string
		signer crypto.Signer
		issuer *x509.Certificate
		public crypto.PublicKey
		p      Profile
		want   error
	}{
		{"good", ca, open, other.Public(), oneYear, nil},
		{"CA below", ca, open, other.Public(), tenYear, nil},
		{"another signer", other, open, other.Public(), oneYear, ErrIssuer},
		{"issuer is a leaf", ca, leaf, other.Public(), oneYear, ErrIssuer},
		{"issuer without keyCertSign", ca, &noSign, other.Public(), oneYear, ErrIssuer},
		{"leaf below path length 0", ca, zero, other.Public(), oneYear, nil},
		{"CA below path length 0", ca, zero, other.Public(), tenYear, ErrIssuer},
		{"path length 1 below 2", ca, two, other.Public(), with(func(p *Profile) { p.PathLen = 1 }), nil},
		{"path length 2 below 2", ca, two, other.Public(), with(func(p *Profile) { p.PathLen = 2 }), ErrIssuer},
		{"after the issuer's end", ca, open, other.Public(), Profile{NotBefore: open.NotAfter, NotAfter: open.NotAfter.AddDate(1, 0, 0)}, ErrIssuer},
		{"before the issuer's start", ca, open, other.Public(), Profile{NotBefore: open.NotBefore.AddDate(-2, 0, 0), NotAfter: open.NotBefore}, ErrIssuer},
		{"backwards", ca, open, other.Public(), Profile{NotBefore: now, NotAfter: now.Add(-time.Hour)}, ErrProfile},
		{"shorter than a second", ca, open, other.Public(), Profile{NotBefore: now, NotAfter: now.Add(time.Millisecond)}, ErrProfile},
		{"no times", ca, open, other.Public(), Profile{}, ErrProfile},
		{"year 10000", ca, open, other.Public(), Profile{NotBefore: now, NotAfter: time.Date(10000, 1, 1, 0, 0, 0, 0, time.UTC)}, ErrProfile},
		{"unknown extended usage", ca, open, other.Public(), with(func(p *Profile) { p.ExtKeyUsage = []string{"any"} }), ErrProfile},
		{"RSA-1024", ca, open, &rsa1024.PublicKey, oneYear, ErrKey},
		{"P-224", ca, open, &p224.PublicKey, oneYear, ErrKey},
		{"unknown kind", ca, open, struct{}{}, oneYear, ErrKey},
		{"no key", ca, open, nil, oneYear, ErrKey},
	} {
		der, err := Issue(c.signer, c.issuer, c.public, subject(t, "CN=x"), c.p)
		if !errors.Is(err, c.want) || (err == nil) != (c.want == nil) {
			t.Errorf("%s: %v", c.name, err)
		}
		if err == nil && c.issuer == two {
			if made := parsed(t)(der, err); made.MaxPathLen != 1 {
				t.Errorf("%s: path length %d", c.name, made.MaxPathLen)
			}
		}
	}
	if _, err := SelfSign(ca, subject(t, "", "host.example"), oneYear); !errors.Is(err, ErrSubject) {
		t.Errorf("self-signed without a name: %v", err)
	}
	if _, err := Issue(ca, open, other.Public(), Subject{}, oneYear); !errors.Is(err, ErrName) {
		t.Errorf("no subject: %v", err)
	}
	nameless := parsed(t)(Issue(ca, open, other.Public(), subject(t, "", "host.example"), oneYear))
	contains(t, openssl(t, nameless.Raw, "x509", "-inform", "DER", "-noout", "-text"), "X509v3 Subject Alternative Name: critical")
}

func TestPathLenIsWhatTheIssuerLeaves(t *testing.T) {
	p := tenYear
	p.PathLen = 2
	first := root(t, "p256", p)
	p.PathLen = -1
	second := parsed(t)(Issue(keys()["p256"], first, keys()["p256b"].Public(), subject(t, "CN=2"), p))
	third := parsed(t)(Issue(keys()["p256b"], second, keys()["p384"].Public(), subject(t, "CN=3"), p))
	if second.MaxPathLen != 1 || third.MaxPathLen != 0 || !third.MaxPathLenZero {
		t.Errorf("path lengths %d, %d", second.MaxPathLen, third.MaxPathLen)
	}
	if _, err := Issue(keys()["p384"], third, keys()["p521"].Public(), subject(t, "CN=4"), p); !errors.Is(err, ErrIssuer) {
		t.Error(err)
	}
}

func TestValidityIsClipped(t *testing.T) {
	issuer := root(t, "p256", Profile{NotBefore: now, NotAfter: now.AddDate(2, 0, 0), CA: true, PathLen: -1})
	made := parsed(t)(Issue(keys()["p256"], issuer, keys()["rsa"].Public(), subject(t, "CN=x"), Profile{NotBefore: now.AddDate(-1, 0, 0), NotAfter: now.AddDate(5, 0, 0)}))
	if !made.NotBefore.Equal(issuer.NotBefore) || !made.NotAfter.Equal(issuer.NotAfter) {
		t.Errorf("valid from %v to %v", made.NotBefore, made.NotAfter)
	}
	made = parsed(t)(Issue(keys()["p256"], issuer, keys()["rsa"].Public(), subject(t, "CN=x"), Profile{NotBefore: now.Add(time.Minute), NotAfter: now.AddDate(1, 0, 0)}))
	if !made.NotBefore.Equal(now.Add(time.Minute)) || !made.NotAfter.Equal(now.AddDate(1, 0, 0)) {
		t.Errorf("valid from %v to %v", made.NotBefore, made.NotAfter)
	}
}

// TestIssuerNameIsCopied issues under a name in other string types than ParseName would choose.
func TestIssuerNameIsCopied(t *testing.T) {
	foreign := subject(t, "CN=#1304526f6f74,O=#14024f4f,C=IN") // PrintableString and T61String
	issuer := parsed(t)(SelfSign(keys()["p256"], foreign, tenYear))
	made := parsed(t)(Issue(keys()["p256"], issuer, keys()["rsa"].Public(), subject(t, "CN=x"), oneYear))
	if !bytes.Equal(made.RawIssuer, issuer.RawSubject) || !bytes.Contains(made.RawIssuer, append([]byte{0x13, 4}, "Root"...)) {
		t.Error("the issuer's name was encoded again")
	}
	if !bytes.Equal(made.AuthorityKeyId, issuer.SubjectKeyId) || len(made.SubjectKeyId) != 20 {
		t.Error("key identifiers")
	}
	contains(t, openssl(t, nil, "verify", "-attime", epoch(now), "-CAfile", writePEM(t, issuer), writePEM(t, made)), "OK")
}

func TestNameConstraintsOfTheIssuer(t *testing.T) {
	key := keys()["p256"]
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(1), RawSubject: subject(t, "CN=Constrained").RawName,
		NotBefore: oneYear.NotBefore, NotAfter: oneYear.NotAfter, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		PermittedDNSDomainsCritical: true, PermittedDNSDomains: []string{"example.com"},
	}, &x509.Certificate{RawSubject: subject(t, "CN=Constrained").RawName}, key.Public(), key)
	issuer := parsed(t)(der, err)
	inside := parsed(t)(Issue(key, issuer, keys()["rsa"].Public(), subject(t, "CN=x", "a.example.com"), oneYear))
	if reasons := Check([]*x509.Certificate{inside}, []*x509.Certificate{issuer}, now); len(reasons) > 0 {
		t.Error(reasons)
	}
	if _, err := Issue(key, issuer, keys()["rsa"].Public(), subject(t, "CN=x", "a.example.org"), oneYear); !errors.Is(err, ErrIssuer) {
		t.Errorf("outside the constraints: %v", err)
	}
	der, err = x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(2), DNSNames: []string{"a.example.org"}, NotBefore: oneYear.NotBefore, NotAfter: oneYear.NotAfter,
	}, issuer, keys()["rsa"].Public(), key)
	outside := parsed(t)(der, err)
	if got := codes(Check([]*x509.Certificate{outside}, []*x509.Certificate{issuer}, now)); got != "0 name-not-allowed" {
		t.Error(got)
	}
}

func TestParseRequestRefuses(t *testing.T) {
	good, err := Request(keys()["rsa"], subject(t, "CN=x,O=y", "x.example"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ParseRequest(good); err != nil {
		t.Fatal(err)
	}
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Request(weak, subject(t, "CN=x")); !errors.Is(err, ErrKey) {
		t.Errorf("request for RSA-1024: %v", err)
	}
	raw := func(template *x509.CertificateRequest, key crypto.Signer) []byte {
		der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	forged := bytes.Clone(good)
	forged[len(forged)-1] ^= 1
	renamed := bytes.Replace(good, []byte("x.example"), []byte("y.example"), 1)
	for name, c := range map[string]struct {
		data []byte
		want error
	}{
		"empty":            {nil, ErrRequest},
		"too long":         {make([]byte, MaxRequest+1), ErrRequest},
		"trailing":         {append(bytes.Clone(good), 0), ErrRequest},
		"truncated":        {good[:len(good)-1], ErrRequest},
		"signature":        {forged, ErrRequest},
		"subject changed":  {renamed, ErrRequest},
		"weak key":         {raw(&x509.CertificateRequest{RawSubject: subject(t, "CN=x").RawName}, weak), ErrKey},
		"no name at all":   {raw(&x509.CertificateRequest{}, keys()["p256"]), ErrSubject},
		"bad DNS name":     {raw(&x509.CertificateRequest{DNSNames: []string{"not a name"}}, keys()["p256"]), ErrSubject},
		"two PEM blocks":   {append(pemRequest(good), pemRequest(good)...), ErrRequest},
		"damaged PEM":      {bytes.Replace(pemRequest(good), []byte("-----END"), []byte("----END"), 1), ErrRequest},
		"PEM of something": {toPEM(root(t, "p256", oneYear)), ErrRequest},
	} {
		if _, err := ParseRequest(c.data); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := ParseRequest(pemRequest(good)); err != nil {
		t.Error(err)
	}
}

func TestParseSubjectRefuses(t *testing.T) {
	for _, c := range []struct {
		kind, text string
		good       bool
	}{
		{"dns", "host", true}, {"dns", "a.b-c.example", true}, {"dns", "*.example", true}, {"dns", "xn--bcher-kva.example", true},
		{"dns", "", false}, {"dns", "*", false}, {"dns", "a.*.example", false}, {"dns", "-a.example", false}, {"dns", "a-.example", false},
		{"dns", "a..b", false}, {"dns", "a.example.", false}, {"dns", "bücher.example", false}, {"dns", "a b", false}, {"dns", "a\x00b", false},
		{"ip", "192.0.2.1", true}, {"ip", "2001:db8::1", true}, {"ip", "192.0.2", false}, {"ip", "192.0.2.1/24", false}, {"ip", "fe80::1%eth0", false}, {"ip", "", false},
		{"email", "a.b+c@example.com", true}, {"email", "a", false}, {"email", "@b", false}, {"email", "a@", false}, {"email", "a b@c", false}, {"email", "a@b@c", false}, {"email", "ä@b", false},
		{"uri", "https://example.com/a", true}, {"uri", "urn:uuid:0", true}, {"uri", "spiffe://domain/a", true}, {"uri", "relative", false}, {"uri", "https://", false}, {"uri", "%zz", false}, {"uri", "", false},
	} {
		lists := map[string][]string{c.kind: {c.text}}
		_, err := ParseSubject("", lists["dns"], lists["ip"], lists["email"], lists["uri"])
		if c.good != (err == nil) || err != nil && !errors.Is(err, ErrSubject) {
			t.Errorf("%s %q: %v", c.kind, c.text, err)
		}
	}
	if _, err := ParseSubject("", nil, nil, nil, nil); !errors.Is(err, ErrSubject) {
		t.Errorf("nothing: %v", err)
	}
	if _, err := ParseSubject("CN=x", make([]string, MaxNames+1), nil, nil, nil); !errors.Is(err, ErrSubject) {
		t.Errorf("too many: %v", err)
	}
}
