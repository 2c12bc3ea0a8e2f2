package pki

import (
	"bytes"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// java has the JDK carry out commands, one in a line, and returns its answers by the name in each command.
func java(t testing.TB, commands ...string) map[string]string {
	t.Helper()
	command := exec.Command("java", "-XX:TieredStopAtLevel=1", filepath.Join("testdata", "java", "Pkix.java"))
	command.Stdin = strings.NewReader(strings.Join(commands, "\n") + "\n")
	var complaints bytes.Buffer
	command.Stderr = &complaints
	output, err := command.Output()
	if err != nil {
		t.Fatalf("this test needs a JDK: %v\n%s", err, complaints.String())
	}
	answers := map[string]string{}
	for line := range strings.Lines(string(output)) {
		name, answer, _ := strings.Cut(strings.TrimSpace(line), " ")
		answers[name] = answer
	}
	if len(answers) != len(commands) {
		t.Fatalf("%d answers to %d commands:\n%s%s", len(answers), len(commands), output, complaints.String())
	}
	return answers
}

func pemCRL(der []byte) []byte { return pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: der}) }

func writeFile(t testing.TB, data []byte) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// list returns a revocation list that is current at now.
func list(number int64, revoked ...Revocation) RevocationList {
	return RevocationList{Number: big.NewInt(number), ThisUpdate: now.Add(-time.Minute), NextUpdate: now.Add(24 * time.Hour), Revoked: revoked}
}

func mustCRL(t testing.TB, der []byte, err error) *CRL {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	l, err := ParseCRL(der)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// TestCRLAgrees has openssl and the JDK judge lists of ours by every kind of key, for certificates that are revoked and not.
func TestCRLAgrees(t *testing.T) {
	var commands []string
	want := map[string]string{}
	for _, kind := range []string{"rsa", "p256", "p384", "p521", "ed25519"} {
		ca := root(t, kind, tenYear)
		good := parsed(t)(Issue(keys()[kind], ca, keys()["p256b"].Public(), subject(t, "CN=Good"), oneYear))
		bad := parsed(t)(Issue(keys()[kind], ca, keys()["p256b"].Public(), subject(t, "CN=Bad"), oneYear))
		held := *good
		held.SerialNumber = big.NewInt(-77) // crypto/x509 makes no such certificate
		der, err := SignCRL(keys()[kind], ca, list(258,
			Revocation{bad.SerialNumber, now.Add(-time.Minute), keyspec.KeyCompromise}, Revocation{held.SerialNumber, now.Add(-time.Minute), ""}))
		l := mustCRL(t, der, err)
		if again, err := ParseCRL(pemCRL(der)); err != nil || again.Len() != 2 || again.Number.Int64() != 258 {
			t.Fatal(again, err)
		}
		for c, code := range map[*x509.Certificate]string{good: "", bad: "0 revoked", &held: "0 revoked"} {
			if got := codes(CheckCRL(0, c, ca, l, now)); got != code {
				t.Errorf("%s %s: %q", kind, c.Subject, got)
			}
		}
		if r, found := l.Revoked(bad.SerialNumber); !found || r.Reason != keyspec.KeyCompromise || !r.At.Equal(now.Add(-time.Minute)) {
			t.Error(r, found)
		}
		text := openssl(t, der, "crl", "-inform", "DER", "-noout", "-text", "-CAfile", writePEM(t, ca))
		contains(t, text, "verify OK", "Version 2 (0x1)", "X509v3 CRL Number: \n                258", "X509v3 Authority Key Identifier", "Key Compromise",
			fmt.Sprintf("Serial Number: %X", bad.SerialNumber), "Next Update: Mar  2 12:00:00 2027 GMT")
		crl, anchor := writeFile(t, pemCRL(der)), writePEM(t, ca)
		for name, c := range map[string]*x509.Certificate{"good": good, "bad": bad} {
			leaf := writePEM(t, c)
			output, err := exec.Command("openssl", "verify", "-crl_check", "-x509_strict", "-attime", epoch(now), "-CAfile", anchor, "-CRLfile", crl, leaf).CombinedOutput()
			if (err == nil) != (name == "good") || name == "bad" && !strings.Contains(string(output), "certificate revoked") {
				t.Errorf("openssl %s %s: %v %s", kind, name, err, output)
			}
			commands = append(commands, fmt.Sprintf("validate %s-%s %s %s %s %s", kind, name, now.Format(time.RFC3339), anchor, leaf, crl))
			want[kind+"-"+name] = map[string]string{"good": "ok", "bad": "refused REVOKED"}[name]
		}
		leaf := writePEM(t, good)
		commands = append(commands, fmt.Sprintf("validate %s-late %s %s %s %s", kind, now.AddDate(0, 0, 3).Format(time.RFC3339), anchor, leaf, crl))
		want[kind+"-late"] = "refused UNDETERMINED_REVOCATION_STATUS"
		if got := codes(CheckCRL(0, good, ca, l, now.AddDate(0, 0, 3))); got != "0 stale-crl" {
			t.Error(got)
		}
	}
	for name, answer := range java(t, commands...) {
		if answer != want[name] {
			t.Errorf("java %s: %q, want %q", name, answer, want[name])
		}
	}
}

// TestForeignCRL reads what openssl makes.
func TestForeignCRL(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	config := "[ca]\ndefault_ca=a\n[a]\ndatabase=" + path("index") + "\ncrlnumber=" + path("number") + "\ndefault_md=sha256\ndefault_crl_days=30\n" +
		"crl_extensions=x\n[x]\nauthorityKeyIdentifier=keyid\n[partial]\nissuingDistributionPoint=critical,onlyuser:TRUE\n[delta]\ndeltaCRL=critical,ASN1:INTEGER:1\n"
	for name, text := range map[string]string{
		"config": config, "number": "1000\n",
		"index": "R\t350101000000Z\t270101000000Z,keyCompromise\t0A0B\tunknown\t/CN=a\nR\t350101000000Z\t270201000000Z,CACompromise\t7F\tunknown\t/CN=b\n" +
			"R\t350101000000Z\t270201000000Z\t01\tunknown\t/CN=c\nV\t350101000000Z\t\t02\tunknown\t/CN=d\n",
	} {
		if err := os.WriteFile(path(name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	openssl(t, nil, "req", "-x509", "-nodes", "-newkey", "rsa:2048", "-keyout", path("key"), "-out", path("ca"), "-subj", "/CN=Foreign", "-days", "36500")
	make := func(args ...string) []byte {
		openssl(t, nil, append([]string{"ca", "-config", path("config"), "-gencrl", "-keyfile", path("key"), "-cert", path("ca"), "-out", path("crl")}, args...)...)
		data, err := os.ReadFile(path("crl"))
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	data, err := os.ReadFile(path("ca"))
	if err != nil {
		t.Fatal(err)
	}
	ca, err := ParseCertificate(data)
	if err != nil {
		t.Fatal(err)
	}
	l, err := ParseCRL(make())
	if err != nil {
		t.Fatal(err)
	}
	if err := l.SignedBy(ca); err != nil || l.Len() != 3 || l.Number.Int64() != 0x1000 {
		t.Fatal(err, l.Len(), l.Number)
	}
	for serial, reason := range map[int64]keyspec.Reason{0x0a0b: keyspec.KeyCompromise, 0x7f: "ca-compromise", 1: keyspec.Unspecified} {
		if r, found := l.Revoked(big.NewInt(serial)); !found || r.Reason != reason {
			t.Errorf("%x: %v", serial, r)
		}
	}
	if _, found := l.Revoked(big.NewInt(2)); found {
		t.Error("a valid certificate is on the list")
	}
	weak, err := ParseCRL(make("-md", "sha1"))
	if err != nil {
		t.Fatal(err)
	}
	if err := weak.SignedBy(ca); !errors.Is(err, ErrCRL) || !strings.Contains(err.Error(), "SHA1") {
		t.Error(err)
	}
	for section, text := range map[string]string{"partial": "distribution point", "delta": "delta"} {
		if _, err := ParseCRL(make("-crlexts", section)); !errors.Is(err, ErrCRL) || !strings.Contains(err.Error(), text) {
			t.Errorf("%s: %v", section, err)
		}
	}
}

// forgeCRL makes a list with whatever extensions.
func forgeCRL(t testing.TB, key string, ca *x509.Certificate, change func(*x509.RevocationList)) []byte {
	t.Helper()
	template := &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: now.Add(-time.Minute), NextUpdate: now.Add(time.Hour)}
	change(template)
	issuer := *ca
	issuer.KeyUsage |= x509.KeyUsageCRLSign
	der, err := x509.CreateRevocationList(rand.Reader, template, &issuer, keys()[key])
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func TestCRLRefusals(t *testing.T) {
	ca := root(t, "p256", tenYear)
	number := func(n int) []byte { b, _ := asn1.Marshal(n); return b }
	with := func(extension pkix.Extension) func(*x509.RevocationList) {
		return func(l *x509.RevocationList) { l.ExtraExtensions = []pkix.Extension{extension} }
	}
	entry := func(x pkix.Extension) func(*x509.RevocationList) {
		return func(l *x509.RevocationList) {
			l.RevokedCertificateEntries = []x509.RevocationListEntry{{SerialNumber: big.NewInt(9), RevocationTime: now, ExtraExtensions: []pkix.Extension{x}}}
		}
	}
	plain := forgeCRL(t, "p256", ca, func(*x509.RevocationList) {})
	if _, err := ParseCRL(plain); err != nil {
		t.Fatal(err)
	}
	if _, err := ParseCRL(forgeCRL(t, "p256", ca, with(pkix.Extension{Id: asn1.ObjectIdentifier{1, 2, 3}, Value: number(1)}))); err != nil {
		t.Error("an unknown extension that is not critical: ", err)
	}
	for name, data := range map[string][]byte{
		"nothing":           nil,
		"too long":          make([]byte, MaxCRL+1),
		"something after":   append(bytes.Clone(plain), 0),
		"two":               append(pemCRL(plain), pemCRL(plain)...),
		"a certificate":     toPEM(ca),
		"delta":             forgeCRL(t, "p256", ca, with(pkix.Extension{Id: oidDeltaCRL, Critical: true, Value: number(1)})),
		"delta, uncritical": forgeCRL(t, "p256", ca, with(pkix.Extension{Id: oidDeltaCRL, Value: number(1)})),
		"distribution":      forgeCRL(t, "p256", ca, with(pkix.Extension{Id: oidDistribution, Critical: true, Value: []byte{0x30, 0}})),
		"critical":          forgeCRL(t, "p256", ca, with(pkix.Extension{Id: asn1.ObjectIdentifier{1, 2, 3}, Critical: true, Value: number(1)})),
		"number twice":      forgeCRL(t, "p256", ca, with(pkix.Extension{Id: oidCRLNumber, Value: number(2)})),
		"indirect entry":    forgeCRL(t, "p256", ca, entry(pkix.Extension{Id: oidEntryIssuer, Critical: true, Value: []byte{0x30, 0}})),
		"critical entry":    forgeCRL(t, "p256", ca, entry(pkix.Extension{Id: asn1.ObjectIdentifier{1, 2, 3}, Critical: true, Value: number(1)})),
		"taken back": forgeCRL(t, "p256", ca, func(l *x509.RevocationList) {
			l.RevokedCertificateEntries = []x509.RevocationListEntry{{SerialNumber: big.NewInt(9), RevocationTime: now, ReasonCode: removeFromCRL}}
		}),
		"entry twice": forgeCRL(t, "p256", ca, func(l *x509.RevocationList) {
			one := x509.RevocationListEntry{SerialNumber: big.NewInt(9), RevocationTime: now}
			l.RevokedCertificateEntries = []x509.RevocationListEntry{one, one}
		}),
	} {
		if _, err := ParseCRL(data); !errors.Is(err, ErrCRL) {
			t.Errorf("%s: %v", name, err)
		}
	}
	bare := forge(t, "p256", nil, "p256", func(c *x509.Certificate) { c.SubjectKeyId = []byte{1} })
	for name, c := range map[string]struct {
		issuer *x509.Certificate
		l      RevocationList
		want   error
	}{
		"without cRLSign": {bare, list(1), ErrIssuer},
		"another key":     {root(t, "p384", tenYear), list(1), ErrIssuer},
		"number 0":        {ca, list(0), ErrCRL},
		"no number":       {ca, RevocationList{ThisUpdate: now, NextUpdate: now.Add(time.Hour)}, ErrCRL},
		"no time":         {ca, RevocationList{Number: big.NewInt(1)}, ErrCRL},
		"backwards":       {ca, RevocationList{Number: big.NewInt(1), ThisUpdate: now, NextUpdate: now}, ErrCRL},
		"no serial":       {ca, list(1, Revocation{At: now}), ErrCRL},
		"unknown reason":  {ca, list(1, Revocation{big.NewInt(1), now, "boredom"}), ErrCRL},
		"twice":           {ca, list(1, Revocation{big.NewInt(1), now, ""}, Revocation{big.NewInt(1), now, ""}), ErrCRL},
	} {
		if _, err := SignCRL(keys()["p256"], c.issuer, c.l); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestCheckCRL(t *testing.T) {
	ca := root(t, "p256", tenYear)
	leaf := parsed(t)(Issue(keys()["p256"], ca, keys()["p256b"].Public(), subject(t, "CN=Leaf"), oneYear))
	sameName := parsed(t)(SelfSign(keys()["p384"], Subject{RawName: ca.RawSubject}, tenYear))
	noSign := forge(t, "p256", nil, "p256", func(c *x509.Certificate) { c.RawSubject, c.SubjectKeyId = ca.RawSubject, ca.SubjectKeyId })
	noCA := forge(t, "p256", nil, "p256", func(c *x509.Certificate) {
		c.RawSubject, c.SubjectKeyId, c.IsCA, c.KeyUsage = ca.RawSubject, ca.SubjectKeyId, false, 0
	})
	on := func(r keyspec.Reason, at time.Time) *CRL {
		der, err := SignCRL(keys()["p256"], ca, list(1, Revocation{leaf.SerialNumber, at, r}))
		return mustCRL(t, der, err)
	}
	empty := mustCRL(t, forgeCRL(t, "p256", ca, func(*x509.RevocationList) {}), nil)
	forged := mustCRL(t, forgeCRL(t, "p384", ca, func(*x509.RevocationList) {}), nil)
	late := now.AddDate(0, 1, 0)
	for _, c := range []struct {
		name   string
		issuer *x509.Certificate
		l      *CRL
		at     time.Time
		want   string
	}{
		{"not listed", ca, empty, now, ""},
		{"before the list", ca, empty, now.Add(-time.Hour), ""},
		{"stale", ca, empty, late, "0 stale-crl"},
		{"listed", ca, on(keyspec.Superseded, now), now, "0 revoked"},
		{"listed and stale", ca, on(keyspec.Superseded, now), late, "0 revoked"},
		{"listed for later", ca, on(keyspec.Superseded, now.Add(time.Hour)), now, ""},
		{"compromised later", ca, on(keyspec.KeyCompromise, now.Add(time.Hour)), now, "0 revoked"},
		{"forged", ca, forged, now, "0 bad-crl"},
		{"another key of that name", sameName, empty, now, "0 bad-crl"},
		{"issuer may not", noSign, empty, now, "0 bad-crl"},
		{"issuer is no CA", noCA, empty, now, "0 bad-crl"},
		{"another issuer", root(t, "rsa", tenYear), empty, now, "0 bad-crl"},
	} {
		if got := codes(CheckCRL(0, leaf, c.issuer, c.l, c.at)); got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}

// FuzzParseCRL: a list that parses can be judged, and has no entry twice.
func FuzzParseCRL(f *testing.F) {
	ca := root(f, "p256", tenYear)
	der, err := SignCRL(keys()["p256"], ca, list(7, Revocation{big.NewInt(-5), now, keyspec.Superseded}, Revocation{big.NewInt(5), now, "aa-compromise"}))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(der)
	f.Add(pemCRL(der))
	f.Add(forgeCRL(f, "p256", ca, func(l *x509.RevocationList) {
		l.ExtraExtensions = []pkix.Extension{{Id: oidDistribution, Value: []byte{0x30, 0}}}
	}))
	f.Fuzz(func(t *testing.T, data []byte) {
		l, err := ParseCRL(data)
		if err != nil {
			return
		}
		if l.Len() != len(l.RevokedCertificateEntries) {
			t.Fatal("an entry got lost")
		}
		for _, entry := range l.RevokedCertificateEntries {
			if _, found := l.Revoked(entry.SerialNumber); !found {
				t.Fatal("an entry is not found")
			}
		}
		if !slices.Contains([]string{"0 bad-crl", "", "0 stale-crl"}, codes(CheckCRL(0, ca, ca, l, now))) {
			t.Fatal("a certificate that is not listed is revoked")
		}
	})
}
