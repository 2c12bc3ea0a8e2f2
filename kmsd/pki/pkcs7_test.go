package pki

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func pemPKCS7(data []byte) []byte { return pem.EncodeToMemory(&pem.Block{Type: "PKCS7", Bytes: data}) }

func digests(list []*x509.Certificate) string {
	var text []string
	for _, c := range list {
		text = append(text, fmt.Sprintf("%x", sha256.Sum256(c.Raw)))
	}
	return strings.Join(text, ",")
}

// indefinite writes an element of definite length as one of indefinite length, as BER writers do.
func indefinite(tag byte, content ...[]byte) []byte {
	return append(append([]byte{tag, 0x80}, bytes.Join(content, nil)...), 0, 0)
}

// berFile is what BouncyCastle writes: indefinite lengths all the way down to the certificates.
func berFile(certificates ...[]byte) []byte {
	return indefinite(0x30, marshaled(oidSignedData), indefinite(0xa0, indefinite(0x30,
		[]byte{2, 1, 1, 0x31, 0}, indefinite(0x30, marshaled(oidData)), indefinite(0xa0, certificates...), []byte{0x31, 0})))
}

// TestPKCS7Agrees writes and reads files together with openssl and the JDK.
func TestPKCS7Agrees(t *testing.T) {
	chain := []*x509.Certificate{mosip(t, "base"), mosip(t, "module"), mosip(t, "root")}
	reversed := slices.Clone(chain)
	slices.Reverse(reversed)
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	var commands []string
	for name, order := range map[string][]*x509.Certificate{"chain": chain, "reversed": reversed, "one": chain[:1]} {
		ours, err := MarshalPKCS7(raws(order))
		if err != nil {
			t.Fatal(err)
		}
		got, err := ParsePKCS7(ours)
		if err != nil || digests(got) != digests(order) {
			t.Errorf("%s: %v", name, err)
		}
		text := openssl(t, ours, "pkcs7", "-inform", "DER", "-print_certs")
		if back, err := ParseBundle([]byte(text)); err != nil || digests(back) != digests(order) {
			t.Errorf("openssl reads %s: %v", name, err)
		}
		openssl(t, nil, "crl2pkcs7", "-nocrl", "-certfile", writePEM(t, order...), "-outform", "DER", "-out", path("openssl"))
		theirs, err := os.ReadFile(path("openssl"))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(theirs, ours) {
			t.Errorf("openssl writes %s as\n%x, we\n%x", name, theirs, ours)
		}
		os.WriteFile(path(name), ours, 0o600)
		commands = append(commands, fmt.Sprintf("read read-%s %s", name, path(name)), fmt.Sprintf("write write-%s %s %s", name, writePEM(t, order...), path("java-"+name)))
	}
	answers := java(t, commands...)
	for name, order := range map[string][]*x509.Certificate{"chain": chain, "reversed": reversed, "one": chain[:1]} {
		if want := fmt.Sprintf("%s %d", digests(order), len(order)); answers["read-"+name] != want || answers["write-"+name] != "ok" {
			t.Errorf("java %s: %q, %q, want %q", name, answers["read-"+name], answers["write-"+name], want)
		}
		theirs, err := os.ReadFile(path("java-" + name))
		if err != nil {
			t.Fatal(err)
		}
		got, err := ParsePKCS7(theirs)
		if err != nil || len(got) != len(order) {
			t.Fatalf("%s by Java: %v", name, err)
		}
		arranged, err := Arrange(got) // the JDK sorts the SET
		if err != nil || digests(arranged) != digests(chain[:len(order)]) {
			t.Errorf("%s by Java: %v", name, err)
		}
	}
}

// TestBouncyCastle reads a chain as MOSIP's interfaces give it.
func TestBouncyCastle(t *testing.T) {
	chain := []*x509.Certificate{mosip(t, "base"), mosip(t, "module"), mosip(t, "root")}
	text, err := exec.Command("java", "-XX:TieredStopAtLevel=1", "-cp", "/usr/share/java/bcprov.jar:/usr/share/java/bcpkix.jar:/usr/share/java/bcutil.jar",
		filepath.Join("testdata", "java", "Bundle.java"), writePEM(t, chain...)).Output()
	if err != nil {
		t.Fatalf("this test needs a JDK and BouncyCastle: %v", err)
	}
	der, err := base64.URLEncoding.DecodeString(string(text))
	if err != nil || !bytes.HasPrefix(der, []byte{0x30, 0x80}) {
		t.Fatalf("that is not BER in base64url, the test shows nothing: %.40q", text)
	}
	got, err := ParseBundle(text)
	if err != nil {
		t.Fatal(err)
	}
	if arranged, err := Arrange(got); err != nil || digests(arranged) != digests(chain) {
		t.Errorf("%s: %v", names(got), err)
	}
}

func raws(list []*x509.Certificate) [][]byte {
	var raw [][]byte
	for _, c := range list {
		raw = append(raw, c.Raw)
	}
	return raw
}

func TestParseBundle(t *testing.T) {
	base, module, rootCA := mosip(t, "base"), mosip(t, "module"), mosip(t, "root")
	p7, err := MarshalPKCS7([][]byte{base.Raw, module.Raw})
	if err != nil {
		t.Fatal(err)
	}
	bag := berFile(base.Raw, module.Raw)
	want := digests([]*x509.Certificate{base, module})
	for name, data := range map[string][]byte{
		"PEM": toPEM(base, module), "DER": append(bytes.Clone(base.Raw), module.Raw...), "p7b": p7, "p7b in PEM": pemPKCS7(p7), "BER": bag,
		"CMS":    pem.EncodeToMemory(&pem.Block{Type: "CMS", Bytes: bag}),
		"mixed":  append(pemPKCS7(bag), toPEM(module, base)...),
		"base64": []byte(base64.StdEncoding.EncodeToString(p7) + "\n"), "base64url": []byte(base64.RawURLEncoding.EncodeToString(bag)),
		"base64 in lines": []byte(strings.ReplaceAll(base64.URLEncoding.EncodeToString(p7), "A", "A\r\n")),
	} {
		if got, err := ParseBundle(data); err != nil || digests(got) != want {
			t.Errorf("%s: %v", name, err)
		}
	}
	damaged := bytes.Clone(p7)
	damaged[len(marshaled(oidSignedData))] ^= 1 // within the object identifier
	many := make([][]byte, MaxBundle+1)
	for i := range many {
		many[i] = forge(t, "p256", nil, "p256", func(c *x509.Certificate) { c.SerialNumber = newSerial() }).Raw
	}
	for name, data := range map[string][]byte{
		"nothing": nil, "text": []byte("certificates"), "too long": make([]byte, MaxChainBytes+1), "cut short": p7[:len(p7)-1], "something after": append(bytes.Clone(p7), 1),
		"no end": bag[:len(bag)-2], "damaged": damaged, "empty": berFile(), "too many": bytes.Join(many, nil), "too many in p7b": berFile(many...),
		"a key": pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte{0x30, 0}}), "a sequence": {0x30, 0}, "deep": bytes.Repeat([]byte{0x30, 0x80}, 1000),
		"signed":  bytes.Replace(bag, []byte{0x31, 0, 0, 0, 0, 0}, []byte{0x31, 2, 0x30, 0, 0, 0, 0, 0}, 1),
		"a CRL":   forgeCRL(t, "p256", root(t, "p256", tenYear), func(*x509.RevocationList) {}),
		"request": request(t),
	} {
		if got, err := ParseBundle(data); !errors.Is(err, ErrCertificate) && !errors.Is(err, ErrPKCS7) {
			t.Errorf("%s: %d, %v", name, len(got), err)
		}
	}
	for _, list := range [][][]byte{nil, many} {
		if _, err := MarshalPKCS7(list); !errors.Is(err, ErrPKCS7) {
			t.Error(err)
		}
	}
	for _, order := range [][]*x509.Certificate{{base, module, rootCA}, {rootCA, module, base}, {module, base, rootCA}, {base}, {rootCA, module}} {
		got, err := Arrange(order)
		if err != nil || len(got) != len(order) || LinkChain(got) != nil {
			t.Errorf("%s: %v", names(order), err)
		}
	}
	other := root(t, "p384", tenYear)
	for _, order := range [][]*x509.Certificate{nil, {base, module, other}, {base, rootCA}} {
		if got, err := Arrange(order); err == nil {
			t.Errorf("%s became %s", names(order), names(got))
		}
	}
}

func request(t *testing.T) []byte {
	der, err := Request(keys()["p256"], subject(t, "CN=a"))
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// FuzzParseBundle: what parses can be written and comes back the same.
func FuzzParseBundle(f *testing.F) {
	base, module := mosip(f, "base"), mosip(f, "module")
	p7, err := MarshalPKCS7([][]byte{base.Raw, module.Raw})
	if err != nil {
		f.Fatal(err)
	}
	for _, data := range [][]byte{p7, pemPKCS7(p7), berFile(base.Raw), toPEM(base, module), base.Raw, []byte(base64.StdEncoding.EncodeToString(p7)), {0x30, 0x80, 0, 0}} {
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		got, err := ParseBundle(data)
		if err != nil {
			return
		}
		if len(got) == 0 || len(got) > MaxBundle {
			t.Fatalf("%d certificates", len(got))
		}
		again, err := MarshalPKCS7(raws(got))
		if err != nil {
			t.Fatal(err)
		}
		back, err := ParsePKCS7(again)
		if len(again) <= MaxChainBytes && (err != nil || digests(back) != digests(got)) {
			t.Fatal("it does not come back", err)
		}
		Arrange(got[:min(len(got), 3)])
	})
}
