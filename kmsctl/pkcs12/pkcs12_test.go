package pkcs12

import (
	"bufio"
	"bytes"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"math/bits"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

const password = "a password"

const classpath = "/usr/share/java/bcprov.jar:/usr/share/java/bcpkix.jar:/usr/share/java/bcutil.jar"

func run(t *testing.T, name string, args ...string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", name, err, out)
	}
}

// TestJava reads what the JDK writes, with the schemes of now and of before, and what BouncyCastle writes.
func TestJava(t *testing.T) {
	dir := t.TempDir()
	run(t, "java", "-cp", classpath, "testdata/java/Stores.java", dir, password)
	for _, name := range []string{"jdk", "jdk-legacy", "bc"} {
		file, err := os.ReadFile(filepath.Join(dir, name+".p12"))
		if err != nil {
			t.Fatal(err)
		}
		entries, err := Decode(file, password)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		got := make(map[string]Entry)
		for _, e := range entries {
			got[e.Alias] = e
		}
		list, err := os.Open(filepath.Join(dir, name+".txt"))
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		for lines := bufio.NewScanner(list); lines.Scan(); n++ {
			words := strings.Fields(lines.Text())
			e, ok := got[words[0]]
			what := e.PrivateKey
			if words[1] == "secret" {
				what = e.Secret
			} else if digest(e.Certificate) != words[3] {
				t.Errorf("%s: another certificate of %s", name, words[0])
			}
			if !ok || digest(what) != words[2] {
				t.Errorf("%s: another key, or none, of %s", name, words[0])
			}
		}
		list.Close()
		if n < 3 || n != len(entries) {
			t.Errorf("%s: %d entries, want %d", name, len(entries), n)
		}
		if _, err := Decode(file, password+"x"); !errors.Is(err, ErrPassword) {
			t.Errorf("%s with a wrong password: %v", name, err)
		}
		// Every change is seen: the MAC is over what is inside.
		for at := 64; at < len(file)-128; at += len(file) / 40 {
			changed := bytes.Clone(file)
			changed[at] ^= 1
			if _, err := Decode(changed, password); err == nil {
				t.Errorf("%s with byte %d changed is read", name, at)
			}
		}
	}
}

func digest(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// TestOpenSSL reads what openssl writes by each scheme.
func TestOpenSSL(t *testing.T) {
	dir := t.TempDir()
	key, cert := filepath.Join(dir, "key.pem"), filepath.Join(dir, "cert.pem")
	run(t, "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", cert, "-subj", "/CN=x", "-days", "1")
	for name, args := range map[string][]string{
		"now":        nil,
		"legacy":     {"-legacy"},
		"rc2-128":    {"-legacy", "-certpbe", "PBE-SHA1-RC2-128", "-keypbe", "PBE-SHA1-RC2-128"},
		"2des":       {"-legacy", "-keypbe", "PBE-SHA1-2DES"},
		"aes-128":    {"-keypbe", "AES-128-CBC", "-certpbe", "AES-192-CBC", "-macalg", "sha512"},
		"3des":       {"-keypbe", "DES-EDE3-CBC", "-certpbe", "DES-EDE3-CBC", "-macalg", "sha1"},
		"not-inside": {"-certpbe", "NONE", "-keypbe", "NONE"},
	} {
		for _, pass := range []string{password, "pässwörd €", ""} {
			out := filepath.Join(dir, name+".p12")
			run(t, "openssl", append([]string{"pkcs12", "-export", "-inkey", key, "-in", cert, "-name", "the name", "-out", out, "-passout", "pass:" + pass}, args...)...)
			file, err := os.ReadFile(out)
			if err != nil {
				t.Fatal(err)
			}
			entries, err := Decode(file, pass)
			if err != nil || len(entries) != 1 || entries[0].Alias != "the name" {
				t.Fatalf("%s with password %q: %d entries, %v", name, pass, len(entries), err)
			}
			private, err := x509.ParsePKCS8PrivateKey(entries[0].PrivateKey)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			certificate, err := x509.ParseCertificate(entries[0].Certificate)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if p, ok := private.(*rsa.PrivateKey); !ok || !p.PublicKey.Equal(certificate.PublicKey) {
				t.Errorf("%s: key and certificate do not belong together", name)
			}
		}
	}
	run(t, "openssl", "pkcs12", "-export", "-inkey", key, "-in", cert, "-nomac", "-out", filepath.Join(dir, "nomac.p12"), "-passout", "pass:x")
	file, err := os.ReadFile(filepath.Join(dir, "nomac.p12"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Decode(file, "x"); !errors.Is(err, ErrUnsupported) {
		t.Errorf("a file without a MAC: %v", err)
	}
}

// TestPiTable makes sure that no byte is missing from the table, which has each once.
func TestPiTable(t *testing.T) {
	b, err := hex.DecodeString(piTable)
	if err != nil || len(b) != 256 {
		t.Fatal(len(b), err)
	}
	var seen [4]uint64
	for _, c := range b {
		seen[c/64] |= 1 << (c % 64)
	}
	for _, s := range seen {
		if bits.OnesCount64(s) != 64 {
			t.Fatal("a byte twice")
		}
	}
}

// TestRC2 is the vectors of RFC 2268 section 5 whose effective length is that of the key.
func TestRC2(t *testing.T) {
	for _, v := range []struct{ key, plain, sealed string }{
		{"ffffffffffffffff", "ffffffffffffffff", "278b27e42e2f0d49"},
		{"3000000000000000", "1000000000000001", "30649edf9be7d2c2"},
		{"88bca90e90875a7f0f79c384627bafb2", "0000000000000000", "2269552ab0f85ca6"},
	} {
		key, _ := hex.DecodeString(v.key)
		sealed, _ := hex.DecodeString(v.sealed)
		c, err := newRC2(key)
		if err != nil {
			t.Fatal(err)
		}
		c.Decrypt(sealed, sealed)
		if got := hex.EncodeToString(sealed); got != v.plain {
			t.Errorf("%s: %s, want %s", v.key, got, v.plain)
		}
	}
}

func TestWork(t *testing.T) {
	r := reader{work: 10}
	if err := r.spend(11); !errors.Is(err, ErrUnsupported) {
		t.Error(err)
	}
	if err := r.spend(10); err != nil {
		t.Error(err)
	}
	for _, n := range []int{1, 0, -1} {
		if err := r.spend(n); !errors.Is(err, ErrUnsupported) {
			t.Error(n, err)
		}
	}
}

func FuzzDecode(f *testing.F) {
	files, err := filepath.Glob("testdata/*.p12")
	if err != nil || len(files) == 0 {
		f.Fatal("no files to begin with", err)
	}
	for _, name := range files {
		b, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		entries, err := decode(b, password, 64)
		if err != nil && !errors.Is(err, ErrFormat) && !errors.Is(err, ErrUnsupported) && !errors.Is(err, ErrPassword) {
			t.Error(err)
		}
		if err != nil && entries != nil {
			t.Error("both")
		}
		// Behind the MAC, which no mutation gets past.
		r := reader{password: password, work: 64}
		if der, err := toDER(b); err == nil {
			r.safeContents(der, 0)
			if again, err := toDER(der); err != nil || !bytes.Equal(again, der) {
				t.Error("DER of DER is another", err)
			}
		}
	})
}

// TestSameID: two keys that Java has written in one millisecond have one id, and each its own certificate.
func TestSameID(t *testing.T) {
	id := []byte("Time 1700000000000")
	r := &reader{bags: []bag{
		{kind: private, name: "a", id: id, value: []byte("key of a")}, {kind: private, name: "b", id: id, value: []byte("key of b")},
		{kind: private, name: "c", id: []byte("other"), value: []byte("key of c")},
		{kind: certificate, name: "a", id: id, value: []byte("a")}, {kind: certificate, name: "b", id: id, value: []byte("b")},
		{kind: certificate, name: "CN=c", id: []byte("other"), value: []byte("c")},
	}}
	list, err := r.entries()
	if err != nil || len(list) != 3 {
		t.Fatalf("%d entries, %v", len(list), err)
	}
	for _, e := range list {
		if string(e.Certificate) != e.Alias {
			t.Errorf("%s has the certificate of %s", e.Alias, e.Certificate)
		}
	}
}
