package pki

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kmsd-project/kmsd/client/pkix"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// hierarchy is a root, a module, a base and sign keys as the daemon certifies them for MOSIP, leaf first and with the root.
func hierarchy(t *testing.T) map[string][]*x509.Certificate {
	t.Helper()
	ca := Profile{NotBefore: oneYear.NotBefore, NotAfter: tenYear.NotAfter, CA: true, PathLen: 2, Usages: []keyspec.Usage{keyspec.Sign, keyspec.Verify, keyspec.Certify}}
	module := ca
	module.PathLen = 1
	module.Usages = append(module.Usages[:3:3], keyspec.Unwrap)
	sign := Profile{NotBefore: oneYear.NotBefore, NotAfter: oneYear.NotAfter, Usages: []keyspec.Usage{keyspec.Sign, keyspec.Verify}}
	base := sign
	base.Usages = []keyspec.Usage{keyspec.Encrypt, keyspec.Decrypt}
	name := func(cn string) Subject {
		return subject(t, "CN="+cn+",OU=MOSIP-TECH-CENTER,O=IITB,L=BANGALORE,ST=KA,C=IN")
	}
	make := func(signer, issuer, key, cn string, p Profile, made map[string][]*x509.Certificate) {
		public := keys()[key].Public()
		if signer == "" {
			made[key] = []*x509.Certificate{parsed(t)(SelfSign(keys()[key], name(cn), p))}
			return
		}
		chain := made[issuer]
		made[key] = append([]*x509.Certificate{parsed(t)(Issue(keys()[signer], chain[0], public, name(cn), p))}, chain...)
	}
	made := map[string][]*x509.Certificate{}
	make("", "", "rsa", "www.mosip.io (ROOT)", ca, made)
	made["root"] = made["rsa"]
	make("rsa", "root", "rsa2", "www.mosip.io (REGISTRATION)", module, made)
	made["module"] = made["rsa2"]
	make("rsa", "root", "p256", "www.mosip.io (REGISTRATION-EC_SECP256R1_SIGN)", sign, made)
	make("rsa", "root", "secp256k1", "www.mosip.io (REGISTRATION-EC_SECP256K1_SIGN)", sign, made)
	make("rsa2", "module", "ed25519", "www.mosip.io (REGISTRATION-ED25519_SIGN)", sign, made)
	made["base"] = append([]*x509.Certificate{parsed(t)(Issue(keys()["rsa2"], made["module"][0], keys()["rsa"].Public(), name("REGISTRATION-10001_110011"), base))}, made["module"]...)
	delete(made, "rsa")
	delete(made, "rsa2")
	return made
}

func keyIDOf(t *testing.T, public crypto.PublicKey) string {
	t.Helper()
	id, err := keyID(public)
	if err != nil {
		t.Fatal(err)
	}
	return strings.ToUpper(fmt.Sprintf("% x", id))
}

// TestMOSIPProfile has openssl and Java read the certificates of a whole hierarchy: what they find is what MOSIP's have, and what those
// lack: positive serial numbers, authority key identifiers, the right key usage of EC and Ed25519 keys.
func TestMOSIPProfile(t *testing.T) {
	const (
		signs       = "100000000"
		enciphers   = "001000000"
		certifies   = "100001100"
		noAuthority = "-1"
	)
	made := hierarchy(t)
	want := map[string]struct{ cn, ca, usage string }{
		"root":      {"www.mosip.io (ROOT)", "2", certifies},
		"module":    {"www.mosip.io (REGISTRATION)", "1", certifies},
		"p256":      {"www.mosip.io (REGISTRATION-EC_SECP256R1_SIGN)", noAuthority, signs},
		"secp256k1": {"www.mosip.io (REGISTRATION-EC_SECP256K1_SIGN)", noAuthority, signs},
		"ed25519":   {"www.mosip.io (REGISTRATION-ED25519_SIGN)", noAuthority, signs},
		"base":      {"REGISTRATION-10001_110011", noAuthority, enciphers},
	}
	var commands []string
	for name, chain := range made {
		if name != "root" {
			commands = append(commands, fmt.Sprintf("%s chain %s %s", name, epoch(now), writePEM(t, chain...)))
		}
		leaf := chain[0]
		text := openssl(t, leaf.Raw, "x509", "-inform", "DER", "-noout", "-text")
		contains(t, text, "X509v3 Basic Constraints: critical", "X509v3 Key Usage: critical", strings.ReplaceAll(keyIDOf(t, leaf.PublicKey), " ", ":"))
		if name != "base" && name != "root" && name != "module" {
			contains(t, text, "CA:FALSE", "Key Usage: critical\n                Digital Signature\n")
		}
		purposes := openssl(t, leaf.Raw, "x509", "-inform", "DER", "-noout", "-purpose")
		answer := "No"
		if leaf.IsCA {
			answer = "Yes"
		}
		contains(t, purposes, "Any Purpose CA : Yes", "SSL client CA : "+answer, "CRL signing CA : "+answer)
		contains(t, openssl(t, nil, "verify", "-x509_strict", "-attime", epoch(now), "-CAfile", writePEM(t, made["root"]...), "-untrusted", writePEM(t, chain...), writePEM(t, leaf)), "OK")
		if reasons := Check(chain, made["root"], now); len(reasons) > 0 {
			t.Errorf("%s: %v", name, reasons)
		}
		asn1 := openssl(t, leaf.RawSubject, "asn1parse", "-inform", "DER")
		at := 0
		for _, attribute := range []string{":countryName", "PRINTABLESTRING   :IN", ":stateOrProvinceName", "UTF8STRING        :KA", ":localityName", "UTF8STRING        :BANGALORE",
			":organizationName", "UTF8STRING        :IITB", ":organizationalUnitName", "UTF8STRING        :MOSIP-TECH-CENTER", ":commonName", "UTF8STRING        :" + want[name].cn} {
			next := strings.Index(asn1[at:], attribute)
			if next < 0 {
				t.Fatalf("%s: no %q in its place in\n%s", name, attribute, asn1)
			}
			at += next
		}
	}
	answers := chains(t, commands...)
	for name, answer := range answers {
		w := want[name]
		expected := fmt.Sprintf("bouncy=valid jdk=valid serial=1 ca=%s usage=%s ski=true aki=true subject=CN=%s,OU=MOSIP-TECH-CENTER,O=IITB,L=BANGALORE,ST=KA,C=IN", w.ca, w.usage, w.cn)
		if answer != expected {
			t.Errorf("Java: %s:\n%s, want\n%s", name, answer, expected)
		}
	}
}

// chains has Java carry out commands, one in a line, and returns its answers by the name in each command.
func chains(t *testing.T, commands ...string) map[string]string {
	t.Helper()
	classes := "/usr/share/java/bcprov.jar:/usr/share/java/bcpkix.jar:/usr/share/java/bcutil.jar"
	command := exec.Command("java", "-XX:TieredStopAtLevel=1", "-cp", classes, filepath.Join("testdata", "java", "Chains.java"))
	command.Stdin = strings.NewReader(strings.Join(commands, "\n") + "\n")
	var complaints bytes.Buffer
	command.Stderr = &complaints
	output, err := command.Output()
	if err != nil {
		t.Fatalf("this test needs a JDK and BouncyCastle: %v\n%s", err, complaints.String())
	}
	answers := map[string]string{}
	for line := range strings.Lines(string(output)) {
		name, answer, _ := strings.Cut(strings.TrimSpace(line), " ")
		answers[name] = answer
	}
	if len(answers) != len(commands) {
		t.Fatalf("%d answers to %d commands:\n%s", len(answers), len(commands), output)
	}
	return answers
}

// TestSecp256k1 has keys of secp256k1 ask for certificates, sign their own, certify others, and be certified by every kind of key.
func TestSecp256k1(t *testing.T) {
	key := keys()["secp256k1"]
	s := subject(t, "CN=host,C=IN", "host.example")
	request, err := Request(key, s)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "request.pem")
	if err := os.WriteFile(file, pemRequest(request), 0o600); err != nil {
		t.Fatal(err)
	}
	commands := []string{"request request " + file}
	want := map[string]string{"request": "valid C=IN,CN=host"}
	contains(t, openssl(t, request, "req", "-inform", "DER", "-verify", "-noout", "-text"), "verify OK", "ASN1 OID: secp256k1", "DNS:host.example")

	parsedRequest, err := ParseRequest(request)
	if err != nil {
		t.Fatal(err)
	}
	asked, err := RequestSubject(parsedRequest)
	if err != nil {
		t.Fatal(err)
	}
	for _, issuer := range []string{"rsa", "p256", "p384", "p521", "ed25519", "secp256k1"} {
		ca := root(t, issuer, tenYear)
		leaf := parsed(t)(Issue(keys()[issuer], ca, parsedRequest.PublicKey, asked, oneYear))
		if !bytes.Equal(leaf.RawIssuer, ca.RawSubject) || !bytes.Equal(leaf.AuthorityKeyId, ca.SubjectKeyId) || leaf.DNSNames[0] != "host.example" {
			t.Errorf("%s: %+v", issuer, leaf)
		}
		if reasons := Check([]*x509.Certificate{leaf, ca}, []*x509.Certificate{ca}, now); len(reasons) > 0 {
			t.Errorf("%s: %v", issuer, reasons)
		}
		commands = append(commands, fmt.Sprintf("%s chain %s %s", issuer, epoch(now), writePEM(t, leaf, ca)))
		jdk := "valid"
		if issuer == "secp256k1" {
			jdk = "CertPathValidatorException" // the JDK has dropped the curve
		}
		want[issuer] = "bouncy=valid jdk=" + jdk + " serial=1 ca=-1 usage=100000000 ski=true aki=true subject=CN=host,C=IN"
		contains(t, openssl(t, nil, "verify", "-x509_strict", "-attime", epoch(now), "-CAfile", writePEM(t, ca), writePEM(t, leaf)), "OK")
		// What the parser puts back is what was signed.
		changed := bytes.Clone(leaf.Raw)
		at := bytes.Index(changed, leaf.RawSubjectPublicKeyInfo)
		changed[at+12] = 0x7f // as the stand-in of the parser has it
		if other, err := ParseCertificate(changed); err == nil && other.CheckSignatureFrom(ca) == nil {
			t.Error("a certificate that says something else verifies")
		}
	}
	for name, answer := range chains(t, commands...) {
		if answer != want[name] {
			t.Errorf("Java: %s: %s, want %s", name, answer, want[name])
		}
	}

	changed := bytes.Clone(request)
	changed[len(changed)-1] ^= 1
	if _, err := ParseRequest(changed); err == nil {
		t.Error("a request with a changed signature is taken")
	}
	changed = bytes.Clone(request)
	changed[bytes.Index(changed, []byte("host"))] ^= 1
	if _, err := ParseRequest(changed); err == nil {
		t.Error("a request with another name is taken")
	}
	if !pkix.IsSecp256k1(parsedRequest.PublicKey) {
		t.Errorf("%T", parsedRequest.PublicKey)
	}
	if _, err := ParseChain(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: request})); err == nil {
		t.Error("a request is taken for a certificate")
	}
}

// TestSameNameAsIssuer: an authority key identifier is there also where issuer and subject have one name, and where the issuer's key is
// certified anew, by whomever, the identifier stays.
func TestSameNameAsIssuer(t *testing.T) {
	ca := root(t, "rsa", tenYear)
	s, err := CertificateSubject(ca)
	if err != nil {
		t.Fatal(err)
	}
	p := tenYear
	p.PathLen = 0
	module := parsed(t)(Issue(keys()["rsa"], ca, keys()["rsa2"].Public(), s, p))
	if !bytes.Equal(module.AuthorityKeyId, ca.SubjectKeyId) || len(ca.SubjectKeyId) != 20 {
		t.Errorf("authority key identifier %x, the issuer has %x", module.AuthorityKeyId, ca.SubjectKeyId)
	}
	mosipRoot := mosip(t, "root")
	if id := strings.ToLower(strings.ReplaceAll(keyIDOf(t, mosipRoot.PublicKey), " ", "")); id != fmt.Sprintf("%x", mosipRoot.SubjectKeyId) {
		t.Errorf("MOSIP's certificate of a key has identifier %x, ours %s", mosipRoot.SubjectKeyId, id)
	}
}
