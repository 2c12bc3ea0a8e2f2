package pki

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func pemRequest(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
}

func codes(reasons []Reason) string {
	var text []string
	for _, r := range reasons {
		text = append(text, fmt.Sprintf("%d %s", r.Index, r.Code))
	}
	return strings.Join(text, ", ")
}

func mosip(t testing.TB, name string) *x509.Certificate {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("testdata", "mosip", name+".cert.pem"))
	if err != nil {
		t.Fatal(err)
	}
	c, err := ParseCertificate(data)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return c
}

// TestMOSIPCertificates reads certificates of an independent Java implementation, some with negative serial numbers.
func TestMOSIPCertificates(t *testing.T) {
	root, module, base := mosip(t, "root"), mosip(t, "module"), mosip(t, "base")
	negative := 0
	for _, name := range []string{"root", "module", "base", "ec256", "ed25519"} {
		c := mosip(t, name)
		if c.SerialNumber.Sign() < 0 {
			negative++
		}
		text, err := FormatName(c.RawSubject)
		if err != nil {
			t.Fatal(err)
		}
		if again, err := ParseName(text); err != nil || !bytes.Equal(again, c.RawSubject) {
			t.Errorf("%s: %s encodes to %x, was %x, %v", name, text, again, c.RawSubject, err)
		}
	}
	if negative == 0 {
		t.Error("no certificate has a negative serial number: the test proves nothing")
	}
	if text, _ := FormatName(root.RawSubject); text != "CN=www.mosip.io (ROOT),OU=MOSIP-TECH-CENTER,O=IITB,L=BANGALORE,ST=KA,C=IN" {
		t.Error(text)
	}
	for name, chain := range map[string][]*x509.Certificate{
		"base": {base, module, root}, "without root": {base, module}, "ec256": {mosip(t, "ec256"), root}, "ed25519": {mosip(t, "ed25519"), module, root},
	} {
		again, err := ParseChain(toPEM(chain...))
		if err != nil || len(again) != len(chain) {
			t.Errorf("%s: %v", name, err)
		}
		if reasons := Check(chain, []*x509.Certificate{root}, now); len(reasons) > 0 {
			t.Errorf("%s: %v", name, reasons)
		}
	}
	if got := codes(Check([]*x509.Certificate{base, module, root}, []*x509.Certificate{root}, base.NotAfter.Add(time.Second))); got != "0 expired" {
		t.Error(got)
	}
}

func TestParseChain(t *testing.T) {
	rootCA := root(t, "p256", tenYear)
	middle := parsed(t)(Issue(keys()["p256"], rootCA, keys()["p256b"].Public(), subject(t, "CN=Middle"), tenYear))
	leaf := parsed(t)(Issue(keys()["p256b"], middle, keys()["rsa"].Public(), subject(t, "CN=Leaf"), oneYear))
	chain := toPEM(leaf, middle, rootCA)
	der := append(append(bytes.Clone(leaf.Raw), middle.Raw...), rootCA.Raw...)
	for name, data := range map[string][]byte{
		"PEM": chain, "DER": der, "one": leaf.Raw, "text between": append([]byte("subject=CN\n\n"), chain...), "CRLF": bytes.ReplaceAll(chain, []byte("\n"), []byte("\r\n")),
	} {
		got, err := ParseChain(data)
		if err != nil || !got[0].Equal(leaf) {
			t.Errorf("%s: %v", name, err)
		}
	}
	key := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte{1, 2, 3}})
	for name, c := range map[string]struct {
		data []byte
		want error
	}{
		"empty":             {nil, ErrCertificate},
		"text":              {[]byte("hello"), ErrCertificate},
		"too long":          {make([]byte, MaxChainBytes+1), ErrCertificate},
		"root first":        {toPEM(rootCA, middle, leaf), ErrChain},
		"middle left out":   {toPEM(leaf, rootCA), ErrChain},
		"leaf twice":        {toPEM(leaf, leaf), ErrChain},
		"too many":          {bytes.Repeat(toPEM(rootCA), MaxChain+1), ErrCertificate},
		"too many in DER":   {bytes.Repeat(rootCA.Raw, MaxChain+1), ErrCertificate},
		"with private key":  {append(bytes.Clone(chain), key...), ErrCertificate},
		"a block damaged":   {bytes.Replace(chain, []byte("M"), []byte("*"), 1), ErrCertificate},
		"END line damaged":  {bytes.Replace(chain, []byte("-----END CERTIFICATE-----"), []byte("-----END"), 1), ErrCertificate},
		"DER with trailing": {append(bytes.Clone(der), 0), ErrCertificate},
	} {
		if _, err := ParseChain(c.data); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := ParseCertificate(chain); !errors.Is(err, ErrCertificate) {
		t.Errorf("three as one: %v", err)
	}
	if err := LinkChain(nil); !errors.Is(err, ErrCertificate) {
		t.Errorf("no chain: %v", err)
	}
}

// forge makes any certificate at all, signed by key under the name of issuer.
func forge(t *testing.T, signer string, issuer *x509.Certificate, public string, change func(*x509.Certificate)) *x509.Certificate {
	t.Helper()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(7), RawSubject: subject(t, "CN="+public).RawName, NotBefore: oneYear.NotBefore, NotAfter: oneYear.NotAfter,
		BasicConstraintsValid: true, IsCA: true, MaxPathLen: -1, KeyUsage: x509.KeyUsageCertSign,
	}
	change(template)
	if issuer == nil {
		issuer = template
	}
	parent := *issuer
	parent.PublicKey = nil // or crypto/x509 would see that the signer is another
	return parsed(t)(x509.CreateCertificate(rand.Reader, template, &parent, keys()[public].Public(), keys()[signer]))
}

func TestCheckReasons(t *testing.T) {
	as := func(*x509.Certificate) {}
	rootCA := forge(t, "p256", nil, "p256", as)
	otherRoot := forge(t, "p384", nil, "p384", as)
	middle := forge(t, "p256", rootCA, "p256b", as)
	leaf := forge(t, "p256b", middle, "ed25519", func(c *x509.Certificate) { c.IsCA = false; c.KeyUsage = x509.KeyUsageDigitalSignature })
	roots := []*x509.Certificate{otherRoot, rootCA}
	under := func(change func(*x509.Certificate)) []*x509.Certificate {
		ca := forge(t, "p256", rootCA, "p256b", change)
		return []*x509.Certificate{forge(t, "p256b", ca, "ed25519", as), ca, rootCA}
	}
	sameNameOtherKey := forge(t, "p384", nil, "p384", func(c *x509.Certificate) { c.RawSubject = rootCA.RawSubject })
	// An issuer that encodes its own name anew in every certificate: other string type, other case.
	reencoded := *rootCA
	reencoded.RawSubject = subject(t, "CN=#13"+fmt.Sprintf("%02x%x", len("P256"), "P256")).RawName
	zeroPath := forge(t, "p256", nil, "p256", func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = 0, true })
	for _, c := range []struct {
		name  string
		chain []*x509.Certificate
		roots []*x509.Certificate
		at    time.Time
		want  string
	}{
		{"good", []*x509.Certificate{leaf, middle, rootCA}, roots, now, ""},
		{"root left out", []*x509.Certificate{leaf, middle}, roots, now, ""},
		{"root alone", []*x509.Certificate{rootCA}, roots, now, ""},
		{"middle is trusted", []*x509.Certificate{leaf, middle}, []*x509.Certificate{middle}, now, ""},
		{"more than needed", []*x509.Certificate{leaf, middle, otherRoot}, []*x509.Certificate{middle}, now, ""},
		{"issuer encoded again", []*x509.Certificate{forge(t, "p256", &reencoded, "ed25519", as)}, roots, now, ""},
		{"no roots", []*x509.Certificate{leaf, middle, rootCA}, nil, now, "2 untrusted"},
		{"another root", []*x509.Certificate{leaf, middle, rootCA}, []*x509.Certificate{otherRoot}, now, "2 untrusted"},
		{"another root of the same name", []*x509.Certificate{leaf, middle}, []*x509.Certificate{sameNameOtherKey}, now, "1 untrusted"},
		{"forged under the name", []*x509.Certificate{forge(t, "p384", rootCA, "ed25519", as), rootCA}, roots, now, "0 bad-signature"},
		{"middle missing", []*x509.Certificate{leaf, rootCA}, roots, now, "0 name-mismatch"},
		{"empty", nil, roots, now, "0 malformed"},
		{"too long", make([]*x509.Certificate, MaxChain+1), roots, now, "0 malformed"},
		{"all expired", []*x509.Certificate{leaf, middle, rootCA}, roots, now.AddDate(2, 0, 0), "0 expired, 1 expired, 2 expired"},
		{"too early", []*x509.Certificate{leaf, middle}, roots, now.AddDate(-2, 0, 0), "0 not-yet-valid, 1 not-yet-valid, 2 not-yet-valid"},
		{"middle expired", under(func(c *x509.Certificate) { c.NotAfter = now.Add(-time.Minute) }), roots, now, "1 expired"},
		{"middle is no CA", under(func(c *x509.Certificate) { c.IsCA, c.KeyUsage = false, 0 }), roots, now, "1 not-a-ca"},
		{"middle may not sign", under(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageDigitalSignature }), roots, now, "1 no-cert-sign"},
		{"path too long", []*x509.Certificate{leaf, middle, zeroPath}, []*x509.Certificate{zeroPath}, now, "2 path-too-long"},
		{"path long enough", []*x509.Certificate{middle, zeroPath}, []*x509.Certificate{zeroPath}, now, ""},
	} {
		if c.name == "too long" {
			for i := range c.chain {
				c.chain[i] = rootCA
			}
		}
		reasons := Check(c.chain, c.roots, c.at)
		if got := codes(reasons); got != c.want {
			t.Errorf("%s: %q, want %q: %v", c.name, got, c.want, reasons)
		}
	}
}

// TestWeakChains has openssl make what Go will not.
func TestKeysOfRSA(t *testing.T) {
	modulus := new(big.Int).Lsh(big.NewInt(1), 2047)
	odd := new(big.Int).Add(modulus, big.NewInt(1))
	for name, key := range map[string]*rsa.PublicKey{
		"exponent 1": {N: odd, E: 1}, "even exponent": {N: odd, E: 4}, "even modulus": {N: modulus, E: 65537},
		"long exponent": {N: odd, E: 1<<32 + 1}, "short": {N: big.NewInt(77), E: 3}, "long": {N: new(big.Int).Lsh(odd, 7000), E: 3},
	} {
		if err := checkKey(key); !errors.Is(err, ErrKey) {
			t.Error(name, err)
		}
	}
	for _, e := range []int{3, 65537, 1<<31 - 1} {
		if err := checkKey(&rsa.PublicKey{N: odd, E: e}); err != nil {
			t.Error(e, err)
		}
	}
}

func TestWeakChains(t *testing.T) {
	dir := t.TempDir()
	make := func(name string, args ...string) *x509.Certificate {
		out := filepath.Join(dir, name+".pem")
		openssl(t, nil, append([]string{"req", "-x509", "-nodes", "-keyout", filepath.Join(dir, name+".key"), "-out", out, "-subj", "/CN=" + name, "-days", "36500"}, args...)...)
		data, err := os.ReadFile(out)
		if err != nil {
			t.Fatal(err)
		}
		c, err := ParseCertificate(data)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	at := time.Now().Add(time.Hour)
	weakRoot := make("weak", "-newkey", "rsa:1024")
	if got := codes(Check([]*x509.Certificate{weakRoot}, []*x509.Certificate{weakRoot}, at)); got != "0 weak-key" {
		t.Error(got)
	}
	sha1Root := make("sha1", "-newkey", "rsa:2048", "-sha1")
	sha1Leaf := make("leaf", "-newkey", "rsa:2048", "-sha1", "-CA", filepath.Join(dir, "sha1.pem"), "-CAkey", filepath.Join(dir, "sha1.key"))
	if got := codes(Check([]*x509.Certificate{sha1Leaf, sha1Root}, []*x509.Certificate{sha1Root}, at)); got != "0 weak-signature" {
		t.Error(got)
	}
	critical := make("critical", "-newkey", "rsa:2048", "-addext", "1.2.3.4=critical,ASN1:NULL")
	if got := codes(Check([]*x509.Certificate{critical}, []*x509.Certificate{critical}, at)); got != "0 unknown-critical-extension" {
		t.Error(got)
	}
}
