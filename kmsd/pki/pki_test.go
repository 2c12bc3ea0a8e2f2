package pki

import (
	"bytes"
	"crypto"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/client/pkix"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// keys are made once: the tests need one of each kind and a second one.
var keys = sync.OnceValue(func() map[string]crypto.Signer {
	made := map[string]crypto.Signer{}
	for _, name := range []string{"rsa", "rsa2"} {
		made[name], _ = rsa.GenerateKey(rand.Reader, 2048)
	}
	for name, curve := range map[string]elliptic.Curve{"p256": elliptic.P256(), "p256b": elliptic.P256(), "p384": elliptic.P384(), "p521": elliptic.P521()} {
		made[name], _ = ecdsa.GenerateKey(curve, rand.Reader)
	}
	made["secp256k1"], _ = ecdsa.GenerateKey(pkix.Secp256k1(), rand.Reader)
	for _, name := range []string{"ed25519", "ed25519b"} {
		_, made[name], _ = ed25519.GenerateKey(rand.Reader)
	}
	return made
})

var (
	now     = time.Date(2027, 3, 1, 12, 0, 0, 0, time.UTC)
	oneYear = Profile{NotBefore: now.Add(-time.Hour), NotAfter: now.AddDate(1, 0, 0)}
	tenYear = Profile{NotBefore: now.Add(-time.Hour), NotAfter: now.AddDate(10, 0, 0), CA: true, PathLen: -1}
)

func subject(t testing.TB, dn string, dns ...string) Subject {
	t.Helper()
	s, err := ParseSubject(dn, dns, nil, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// parsed parses what a function of this package has made.
func parsed(t testing.TB) func(der []byte, err error) *x509.Certificate {
	return func(der []byte, err error) *x509.Certificate {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		c, err := ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
}

func root(t testing.TB, key string, p Profile) *x509.Certificate {
	t.Helper()
	return parsed(t)(SelfSign(keys()[key], subject(t, "CN=Root "+key+",O=Example,C=IN"), p))
}

func openssl(t testing.TB, stdin []byte, args ...string) string {
	t.Helper()
	command := exec.Command("openssl", args...)
	command.Stdin = bytes.NewReader(stdin)
	output, err := command.CombinedOutput()
	if err != nil {
		t.Fatalf("openssl %s: %v\n%s", strings.Join(args, " "), err, output)
	}
	return string(output)
}

func writePEM(t testing.TB, certificates ...*x509.Certificate) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "certificates.pem")
	if err := os.WriteFile(file, toPEM(certificates...), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func toPEM(certificates ...*x509.Certificate) []byte {
	var text []byte
	for _, c := range certificates {
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return text
}

func contains(t testing.TB, text string, wanted ...string) {
	t.Helper()
	for _, w := range wanted {
		if !strings.Contains(text, w) {
			t.Errorf("no %q in\n%s", w, text)
		}
	}
}

// TestOpenSSLAgrees has openssl judge requests, certificates and chains of every kind of key.
func TestOpenSSLAgrees(t *testing.T) {
	if _, err := exec.LookPath("openssl"); err != nil {
		t.Fatal("this test needs openssl: ", err)
	}
	for _, kind := range []string{"rsa", "p256", "p384", "p521", "secp256k1", "ed25519"} {
		t.Run(kind, func(t *testing.T) {
			signer := keys()[kind]
			s, err := ParseSubject("CN=www.example.com (REGISTRATION),OU=Unit \\, with comma,O=Ünïcode,L=BANGALORE,ST=KA,C=IN",
				[]string{"www.example.com", "*.example.org"}, []string{"192.0.2.1", "2001:db8::1"}, []string{"a@example.com"}, []string{"urn:example:a"})
			if err != nil {
				t.Fatal(err)
			}
			der, err := Request(signer, s)
			if err != nil {
				t.Fatal(err)
			}
			text := openssl(t, der, "req", "-inform", "DER", "-verify", "-noout", "-text", "-nameopt", "utf8,sep_comma_plus_space")
			contains(t, text, "verify OK", "DNS:www.example.com, DNS:*.example.org", "IP Address:192.0.2.1", "2001:DB8:0:0:0:0:0:1", "email:a@example.com", "URI:urn:example:a")
			contains(t, openssl(t, der, "req", "-inform", "DER", "-noout", "-subject", "-nameopt", "utf8,sep_comma_plus"),
				"C=IN,ST=KA,L=BANGALORE,O=Ünïcode,OU=Unit , with comma,CN=www.example.com (REGISTRATION)")

			rootCA := root(t, kind, tenYear)
			p := tenYear
			p.PathLen = 0
			middle := parsed(t)(Issue(signer, rootCA, keys()["p256b"].Public(), subject(t, "CN=Module,C=IN"), p))
			request, err := ParseRequest(der)
			if err != nil {
				t.Fatal(err)
			}
			asked, err := RequestSubject(request)
			if err != nil {
				t.Fatal(err)
			}
			p = oneYear
			p.ExtKeyUsage = []string{"server-auth", "client-auth", "code-signing", "email", "time-stamping", "ocsp-signing"}
			leaf := parsed(t)(Issue(keys()["p256b"], middle, request.PublicKey, asked, p))
			if !bytes.Equal(leaf.RawSubject, request.RawSubject) {
				t.Error("the subject is not the request's byte for byte")
			}

			text = openssl(t, leaf.Raw, "x509", "-inform", "DER", "-noout", "-text")
			usage := "Digital Signature\n"
			if kind == "rsa" {
				usage = "Digital Signature, Key Encipherment\n"
			}
			contains(t, text, usage, "CA:FALSE", "DNS:www.example.com", "X509v3 Subject Key Identifier", "X509v3 Authority Key Identifier",
				"TLS Web Server Authentication, TLS Web Client Authentication, Code Signing, E-mail Protection, Time Stamping, OCSP Signing")
			contains(t, openssl(t, middle.Raw, "x509", "-inform", "DER", "-noout", "-text"), "CA:TRUE, pathlen:0", "Certificate Sign, CRL Sign")
			contains(t, openssl(t, nil, "verify", "-x509_strict", "-attime", epoch(now), "-CAfile", writePEM(t, rootCA), "-untrusted", writePEM(t, middle), writePEM(t, leaf)), "OK")
			if reasons := Check([]*x509.Certificate{leaf, middle, rootCA}, []*x509.Certificate{rootCA}, now); len(reasons) > 0 {
				t.Error(reasons)
			}
			pool, between := x509.NewCertPool(), x509.NewCertPool()
			pool.AddCert(rootCA)
			between.AddCert(middle)
			if _, err := leaf.Verify(x509.VerifyOptions{Roots: pool, Intermediates: between, CurrentTime: now, DNSName: "www.example.com"}); err != nil {
				t.Error(err)
			}
		})
	}
}

func epoch(at time.Time) string { return strconv.FormatInt(at.Unix(), 10) }

// TestForeignRequest takes a request that openssl made.
func TestForeignRequest(t *testing.T) {
	key := filepath.Join(t.TempDir(), "key.pem")
	text := openssl(t, nil, "req", "-new", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-subj", "/C=IN/O=Example/CN=host", "-addext", "subjectAltName=DNS:host.example")
	request, err := ParseRequest([]byte(text[strings.Index(text, "-----BEGIN CERT"):]))
	if err != nil {
		t.Fatal(err)
	}
	s, err := RequestSubject(request)
	if err != nil {
		t.Fatal(err)
	}
	if name, err := FormatName(s.RawName); err != nil || name != "CN=host,O=Example,C=IN" {
		t.Errorf("%q, %v", name, err)
	}
	leaf := parsed(t)(Issue(keys()["p256"], root(t, "p256", tenYear), request.PublicKey, s, oneYear))
	if !bytes.Equal(leaf.RawSubject, request.RawSubject) || leaf.DNSNames[0] != "host.example" {
		t.Error("the subject was not taken over")
	}
}

func TestKeyUsage(t *testing.T) {
	x, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	const (
		ds = x509.KeyUsageDigitalSignature
		ke = x509.KeyUsageKeyEncipherment
		ka = x509.KeyUsageKeyAgreement
		cs = x509.KeyUsageCertSign
		cr = x509.KeyUsageCRLSign
	)
	rsaKey, ec, ed := keys()["rsa"].Public(), keys()["p256"].Public(), keys()["ed25519"].Public()
	for _, c := range []struct {
		name   string
		public crypto.PublicKey
		ca     bool
		asked  string
		usages string
		want   x509.KeyUsage // 0: refused
	}{
		{"rsa unknown", rsaKey, false, "", "", ds | ke},
		{"rsa signing", rsaKey, false, "", "sign verify", ds},
		{"rsa decryption", rsaKey, false, "", "encrypt decrypt", ke},
		{"rsa module", rsaKey, true, "", "sign verify certify unwrap", ds | cs | cr},
		{"rsa module as leaf", rsaKey, false, "", "sign verify certify unwrap", ds | ke},
		{"rsa only certify", rsaKey, true, "", "certify", cs | cr},
		{"rsa CA without certify", rsaKey, true, "", "sign verify", 0},
		{"rsa decryption as CA", rsaKey, true, "", "encrypt decrypt", 0},
		{"ec", ec, false, "", "", ds},
		{"ec agreement", ec, false, "", "agree", ka},
		{"ec CA", ec, true, "", "", ds | cs | cr},
		{"ed25519", ed, false, "", "sign verify", ds},
		{"ed25519 CA", ed, true, "", "", ds | cs | cr},
		{"x25519", x.PublicKey(), false, "", "", ka},
		{"x25519 agree", x.PublicKey(), false, "", "agree", ka},
		{"x25519 CA", x.PublicKey(), true, "", "", 0},
		{"ed25519 cannot encipher", ed, false, "keyEncipherment", "", 0},
		{"ec cannot encipher", ec, false, "keyEncipherment", "", 0},
		{"x25519 cannot sign", x.PublicKey(), false, "digitalSignature", "", 0},
		{"asked", rsaKey, false, "keyEncipherment", "", ke},
		{"asked twice", rsaKey, false, "keyEncipherment keyEncipherment", "", ke},
		{"asked beyond the key", rsaKey, false, "keyEncipherment", "sign verify", 0},
		{"asked keyCertSign without CA", rsaKey, false, "keyCertSign", "", 0},
		{"CA without keyCertSign", rsaKey, true, "digitalSignature", "", 0},
		{"old name", ec, false, "nonRepudiation", "", x509.KeyUsageContentCommitment},
		{"unknown", ec, false, "flying", "", 0},
	} {
		p := Profile{CA: c.ca, KeyUsage: strings.Fields(c.asked)}
		for _, u := range strings.Fields(c.usages) {
			p.Usages = append(p.Usages, keyspec.Usage(u))
		}
		got, err := p.keyUsage(c.public)
		if got != c.want || (err == nil) != (c.want != 0) {
			t.Errorf("%s: %b, %v", c.name, got, err)
		}
	}
}

func TestSerialNumbers(t *testing.T) {
	seen := map[string]bool{}
	for range 200 {
		serial := newSerial()
		if serial.Sign() <= 0 || serial.BitLen() > 159 || len(serial.Bytes()) != 20 || seen[serial.String()] {
			t.Fatalf("serial number %x", serial)
		}
		seen[serial.String()] = true
	}
}

func TestCertificateSubjectRenews(t *testing.T) {
	rootCA := root(t, "p256", tenYear)
	first := parsed(t)(Issue(keys()["p256"], rootCA, keys()["rsa"].Public(), subject(t, "CN=a", "a.example"), oneYear))
	s, err := CertificateSubject(first)
	if err != nil {
		t.Fatal(err)
	}
	second := parsed(t)(Issue(keys()["p256"], rootCA, keys()["rsa"].Public(), s, oneYear))
	if !bytes.Equal(first.RawSubject, second.RawSubject) || second.DNSNames[0] != "a.example" || first.SerialNumber.Cmp(second.SerialNumber) == 0 {
		t.Error("the renewed certificate differs")
	}
}
