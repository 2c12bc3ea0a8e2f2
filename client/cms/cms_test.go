package cms_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"time"

	"github.com/kmsd-project/kmsd/client/cms"
	"github.com/kmsd-project/kmsd/client/pkix"
	"github.com/kmsd-project/kmsd/kmsd/pki"
)

// signer is a key with its chain, root last.
type signer struct {
	key   crypto.Signer
	chain []*x509.Certificate
}

// signers are made once: one of each kind, certified by the same root.
var signers = sync.OnceValue(func() map[string]signer {
	made := map[string]signer{}
	must := func(der []byte, err error) *x509.Certificate {
		if err != nil {
			panic(err)
		}
		c, err := pki.ParseCertificate(der)
		if err != nil {
			panic(err)
		}
		return c
	}
	subject := func(cn string) pki.Subject {
		s, err := pki.ParseSubject("CN="+cn+",O=Example,C=IN", nil, nil, nil, nil)
		if err != nil {
			panic(err)
		}
		return s
	}
	now := time.Now()
	validity := pki.Profile{NotBefore: now.Add(-time.Hour), NotAfter: now.AddDate(1, 0, 0)}
	ca := validity
	ca.CA, ca.PathLen = true, 2
	rootKey, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	root := must(pki.SelfSign(rootKey, subject("Root"), ca))
	keys := map[string]crypto.Signer{}
	keys["rsa"], _ = rsa.GenerateKey(rand.Reader, 2048)
	for name, curve := range map[string]elliptic.Curve{"p256": elliptic.P256(), "p384": elliptic.P384(), "p521": elliptic.P521(), "secp256k1": pkix.Secp256k1()} {
		keys[name], _ = ecdsa.GenerateKey(curve, rand.Reader)
	}
	_, keys["ed25519"], _ = ed25519.GenerateKey(rand.Reader)
	for name, key := range keys {
		made[name] = signer{key, []*x509.Certificate{must(pki.Issue(rootKey, root, key.Public(), subject(name), validity)), root}}
	}
	return made
})

// form is a way to sign.
type form struct {
	name    string
	signer  string
	options cms.Options
	hash    crypto.Hash
}

var forms = []form{
	{"rsa", "rsa", cms.Options{}, crypto.SHA256},
	{"rsa-sha512", "rsa", cms.Options{Hash: crypto.SHA512}, crypto.SHA512},
	{"rsa-pss", "rsa", cms.Options{PSS: true}, crypto.SHA256},
	{"rsa-pss-sha384", "rsa", cms.Options{PSS: true, Hash: crypto.SHA384, Time: time.Now()}, crypto.SHA384},
	{"p256", "p256", cms.Options{}, crypto.SHA256},
	{"p384", "p384", cms.Options{}, crypto.SHA384},
	{"p521", "p521", cms.Options{}, crypto.SHA512},
	{"p521-sha256", "p521", cms.Options{Hash: crypto.SHA256}, crypto.SHA256},
	{"secp256k1", "secp256k1", cms.Options{}, crypto.SHA256},
	{"ed25519", "ed25519", cms.Options{}, crypto.SHA512},
}

var content = bytes.Repeat([]byte("%PDF content\r\n\x00\xff"), 5000)

func sign(t testing.TB, f form) []byte {
	t.Helper()
	s := signers()[f.signer]
	der, err := cms.Sign(s.key, s.chain, iotest.HalfReader(bytes.NewReader(content)), f.options)
	if err != nil {
		t.Fatalf("%s: %v", f.name, err)
	}
	return der
}

func TestSignVerify(t *testing.T) {
	for _, f := range forms {
		der := sign(t, f)
		s, err := cms.Verify(der, iotest.OneByteReader(bytes.NewReader(content)))
		if err != nil {
			t.Errorf("%s: %v", f.name, err)
			continue
		}
		chain := signers()[f.signer].chain
		if len(s.Chain) != 2 || !s.Chain[0].Equal(chain[0]) || !s.Chain[1].Equal(chain[1]) || len(s.Certificates) != 2 || s.Hash != f.hash {
			t.Errorf("%s: %d of %d certificates, %v", f.name, len(s.Chain), len(s.Certificates), s.Hash)
		}
		if want := f.options.Time.Truncate(time.Second); !s.Time.Equal(want) {
			t.Errorf("%s: time %v, not %v", f.name, s.Time, want)
		}
		if _, err := cms.Verify(append(bytes.Clone(der), make([]byte, 1000)...), bytes.NewReader(content)); err != nil {
			t.Errorf("%s: with zeros after it: %v", f.name, err)
		}
		if _, err := cms.Verify(der, bytes.NewReader(content[1:])); !errors.Is(err, cms.ErrVerification) {
			t.Errorf("%s: other content: %v", f.name, err)
		}
		if _, err := cms.Verify(der, bytes.NewReader(nil)); !errors.Is(err, cms.ErrVerification) {
			t.Errorf("%s: no content: %v", f.name, err)
		}
	}
}

// TestTimes: times after 2049 are written in another way, and years that no way is for are refused.
func TestTimes(t *testing.T) {
	p256 := signers()["p256"]
	for _, at := range []time.Time{time.Date(1950, 1, 1, 0, 0, 0, 0, time.UTC), time.Date(2049, 12, 31, 23, 59, 59, 0, time.UTC), time.Date(2050, 1, 1, 0, 0, 0, 1, time.UTC), time.Date(1949, 1, 1, 0, 0, 0, 0, time.FixedZone("", 3600))} {
		der, err := cms.Sign(p256.key, p256.chain, bytes.NewReader(content), cms.Options{Time: at})
		if err != nil {
			t.Fatal(err)
		}
		if s, err := cms.Verify(der, bytes.NewReader(content)); err != nil || !s.Time.Equal(at.Truncate(time.Second)) {
			t.Errorf("%v: %v, %v", at, s.Time, err)
		}
	}
	if _, err := cms.Sign(p256.key, p256.chain, bytes.NewReader(content), cms.Options{Time: time.Date(10000, 1, 1, 0, 0, 0, 0, time.UTC)}); !errors.Is(err, cms.ErrUnsupported) {
		t.Errorf("the year 10000: %v", err)
	}
}

// TestEveryBitCounts flips one bit of each byte. What is not signed may change without harm, and is checked to be just that.
func TestEveryBitCounts(t *testing.T) {
	for _, name := range []string{"p256", "ed25519"} {
		f := form{name, name, cms.Options{}, 0}
		s := signers()[name]
		der, err := cms.Sign(s.key, s.chain[:1], bytes.NewReader(content[:20]), f.options)
		if err != nil {
			t.Fatal(err)
		}
		certificate := bytes.Index(der, s.chain[0].Raw)
		passed := 0
		for i := range der {
			changed := bytes.Clone(der)
			changed[i] ^= 1
			got, err := cms.Verify(changed, bytes.NewReader(content[:20]))
			if err != nil {
				continue
			}
			passed++
			if !got.Chain[0].Equal(s.chain[0]) {
				t.Fatalf("%s: byte %d changes the signer", name, i)
			}
			if i >= certificate && i < certificate+len(s.chain[0].Raw) {
				t.Errorf("%s: byte %d of the certificate can be changed", name, i-certificate)
			}
		}
		if passed > 20 { // versions, and the list of digest algorithms
			t.Errorf("%s: %d of %d bytes can be changed", name, passed, len(der))
		}
	}
}

func TestRefusals(t *testing.T) {
	rsaSigner, p256, ed := signers()["rsa"], signers()["p256"], signers()["ed25519"]
	for name, c := range map[string]struct {
		key   crypto.Signer
		chain []*x509.Certificate
		o     cms.Options
		want  error
	}{
		"no certificate":         {p256.key, nil, cms.Options{}, cms.ErrCertificate},
		"another's certificate":  {p256.key, rsaSigner.chain, cms.Options{}, cms.ErrCertificate},
		"PSS with ECDSA":         {p256.key, p256.chain, cms.Options{PSS: true}, cms.ErrUnsupported},
		"SHA-1":                  {p256.key, p256.chain, cms.Options{Hash: crypto.SHA1}, cms.ErrUnsupported},
		"Ed25519 with SHA-256":   {ed.key, ed.chain, cms.Options{Hash: crypto.SHA256}, cms.ErrUnsupported},
		"too many certificates":  {p256.key, append(p256.chain[:1:1], make([]*x509.Certificate, 32)...), cms.Options{}, cms.ErrTooLarge},
		"a signer that is wrong": {wrong{p256.key}, p256.chain, cms.Options{}, cms.ErrVerification},
	} {
		if _, err := cms.Sign(c.key, c.chain, bytes.NewReader(content), c.o); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := cms.Sign(p256.key, p256.chain, iotest.ErrReader(io.ErrClosedPipe), cms.Options{}); !errors.Is(err, io.ErrClosedPipe) {
		t.Error(err)
	}
	der := sign(t, forms[0])
	if _, err := cms.Verify(der, iotest.ErrReader(io.ErrClosedPipe)); !errors.Is(err, io.ErrClosedPipe) {
		t.Error(err)
	}
	for name, c := range map[string]struct {
		der  []byte
		want error
	}{
		"nothing":      {nil, cms.ErrFormat},
		"text":         {[]byte("-----BEGIN"), cms.ErrFormat},
		"cut":          {der[:len(der)-1], cms.ErrFormat},
		"trailing":     {append(bytes.Clone(der), 1), cms.ErrFormat},
		"a chain":      {rsaSigner.chain[0].Raw, cms.ErrFormat},
		"too long":     {make([]byte, cms.MaxSignature+1), cms.ErrTooLarge},
		"nested":       {bytes.Repeat([]byte{0x30, 0x80}, 1000), cms.ErrFormat},
		"long lengths": {[]byte{0x30, 0x84, 0xff, 0xff, 0xff, 0xff, 0}, cms.ErrFormat},
	} {
		if _, err := cms.Parse(c.der); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestOtherCertificates: among certificates of the same name the right issuer is found, and authorities that certify each other are no endless
// chain.
func TestOtherCertificates(t *testing.T) {
	parse := func(der []byte, err error) *x509.Certificate {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		c, err := pki.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	subject := func(cn string) pki.Subject {
		s, err := pki.ParseSubject("CN="+cn, nil, nil, nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	now := time.Now()
	ca := pki.Profile{NotBefore: now.Add(-time.Hour), NotAfter: now.AddDate(1, 0, 0), CA: true, PathLen: -1}
	leaf := ca
	leaf.CA = false
	ed := func() crypto.Signer { _, k, _ := ed25519.GenerateKey(rand.Reader); return k }
	a, b, key := ed(), ed(), ed()
	certA, certB := parse(pki.SelfSign(a, subject("A"), ca)), parse(pki.SelfSign(b, subject("B"), ca))
	aByB := parse(pki.Issue(b, certB, a.Public(), subject("A"), ca))
	bByA := parse(pki.Issue(a, certA, b.Public(), subject("B"), ca))
	signer := parse(pki.Issue(a, certA, key.Public(), subject("signer"), leaf))

	chain := []*x509.Certificate{signer, aByB, bByA}
	der, err := cms.Sign(key, chain, bytes.NewReader(content), cms.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if s, err := cms.Verify(der, bytes.NewReader(content)); err != nil || len(s.Chain) > 4 || len(s.Chain) < 3 {
		t.Errorf("authorities that certify each other: %+v, %v", s, err)
	}
	chain = chain[:1]
	for len(chain) < cms.MaxCertificates-1 {
		chain = append(chain, parse(pki.SelfSign(ed(), subject("A"), ca)))
	}
	chain = append(chain, certA)
	if der, err = cms.Sign(key, chain, bytes.NewReader(content), cms.Options{}); err != nil {
		t.Fatal(err)
	}
	if s, err := cms.Verify(der, bytes.NewReader(content)); err != nil || len(s.Chain) != 2 || !s.Chain[1].Equal(certA) {
		t.Errorf("many of one name: %+v, %v", s, err)
	}
}

// wrong signs something else.
type wrong struct{ crypto.Signer }

func (w wrong) Sign(r io.Reader, digest []byte, o crypto.SignerOpts) ([]byte, error) {
	digest = bytes.Clone(digest)
	digest[0] ^= 1
	return w.Signer.Sign(r, digest, o)
}

type files struct {
	t   *testing.T
	dir string
}

func (f files) path(name string) string { return filepath.Join(f.dir, name) }

func (f files) write(name string, content []byte) string {
	f.t.Helper()
	if err := os.WriteFile(f.path(name), content, 0o600); err != nil {
		f.t.Fatal(err)
	}
	return f.path(name)
}

func (f files) read(name string) []byte {
	f.t.Helper()
	content, err := os.ReadFile(f.path(name))
	if err != nil {
		f.t.Fatal(err)
	}
	return content
}

func (f files) openssl(arguments ...string) (string, error) {
	command := exec.Command("openssl", arguments...)
	command.Dir = f.dir
	output, err := command.CombinedOutput()
	return string(output), err
}

func toPEM(chain []*x509.Certificate) []byte {
	var text []byte
	for _, c := range chain {
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return text
}

// newFiles has the content, the keys that openssl and Java can read, and the chains.
func newFiles(t *testing.T) files {
	t.Helper()
	f := files{t, t.TempDir()}
	f.write("content", content)
	for name, s := range signers() {
		f.write(name+".pem", toPEM(s.chain))
		f.write("root.pem", toPEM(s.chain[1:]))
		if der, err := x509.MarshalPKCS8PrivateKey(s.key); err == nil {
			f.write(name+".key.der", der)
			f.write(name+".key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
		}
	}
	return f
}

// TestOpenSSL: openssl verifies ours, the chain and the named certificate included, and we verify what it makes.
func TestOpenSSL(t *testing.T) {
	f := newFiles(t)
	for _, form := range forms {
		f.write(form.name+".p7s", sign(t, form))
		arguments := []string{"cms", "-verify", "-binary", "-inform", "DER", "-in", form.name + ".p7s", "-content", "content", "-CAfile", "root.pem", "-purpose", "any", "-cades", "-out", os.DevNull}
		if output, err := f.openssl(arguments...); form.name == "ed25519" && strings.Contains(output, "invalid digest") {
			continue // openssl 3.0 has no Ed25519 in CMS; Java has
		} else if err != nil {
			t.Errorf("%s: %v\n%s", form.name, err, output)
		}
		f.write("other", content[1:])
		arguments[8] = "other"
		if output, err := f.openssl(arguments...); err == nil {
			t.Errorf("%s: openssl takes other content: %s", form.name, output)
		}
	}
	for name, arguments := range map[string][]string{
		"rsa":         {"rsa"},
		"rsa-sha512":  {"rsa", "-md", "sha512"},
		"rsa-cades":   {"rsa", "-cades"},
		"rsa-keyid":   {"rsa", "-keyid"},
		"rsa-pss":     {"rsa", "-keyopt", "rsa_padding_mode:pss", "-keyopt", "rsa_pss_saltlen:digest"},
		"rsa-pss-max": {"rsa", "-keyopt", "rsa_padding_mode:pss", "-keyopt", "rsa_pss_saltlen:max"},
		"p256":        {"p256"},
		"p384":        {"p384", "-md", "sha384"},
		"p256-cades":  {"p256", "-cades"},
		"ed25519":     {"ed25519", "-md", "sha512"},
	} {
		key := arguments[0]
		all := append([]string{"cms", "-sign", "-binary", "-in", "content", "-signer", key + ".pem", "-certfile", "root.pem", "-inkey", key + ".key", "-outform", "DER", "-out", "their.p7s"}, arguments[1:]...)
		if output, err := f.openssl(all...); err != nil {
			if key == "ed25519" {
				continue // openssl 3.0 and 3.1 do not sign CMS with it
			}
			t.Fatalf("%s: %v\n%s", name, err, output)
		}
		s, err := cms.Verify(f.read("their.p7s"), bytes.NewReader(content))
		if err != nil || len(s.Chain) != 2 || s.Time.IsZero() {
			t.Errorf("%s: %v, %+v", name, err, s)
		}
	}
	for name, c := range map[string]struct {
		option string
		want   error
	}{"without attributes": {"-noattr", cms.ErrUnsupported}, "content inside": {"-nodetach", cms.ErrUnsupported}, "no certificate": {"-nocerts", cms.ErrUnsupported}} {
		output, err := f.openssl("cms", "-sign", "-binary", "-in", "content", "-signer", "p256.pem", "-inkey", "p256.key", "-outform", "DER", "-out", "their.p7s", c.option)
		if err != nil {
			t.Fatalf("%s: %v\n%s", name, err, output)
		}
		if _, err := cms.Verify(f.read("their.p7s"), bytes.NewReader(content)); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if output, err := f.openssl("cms", "-sign", "-binary", "-in", "content", "-signer", "p256.pem", "-inkey", "p256.key", "-signer", "rsa.pem", "-inkey", "rsa.key", "-outform", "DER", "-out", "their.p7s"); err != nil {
		t.Fatalf("%v\n%s", err, output)
	}
	if _, err := cms.Parse(f.read("their.p7s")); !errors.Is(err, cms.ErrUnsupported) {
		t.Errorf("two signers: %v", err)
	}
}

// TestBouncyCastle: Java verifies ours, and we verify what it makes, which has indefinite lengths.
func TestBouncyCastle(t *testing.T) {
	f := newFiles(t)
	var commands []string
	want := map[string]string{}
	for _, form := range forms {
		f.write(form.name+".p7s", sign(t, form))
		commands = append(commands, fmt.Sprintf("%s verify %s %s", form.name, f.path(form.name+".p7s"), f.path("content")))
		want[form.name] = fmt.Sprintf("valid certificates=2 named=true time=%v", !form.options.Time.IsZero())
	}
	theirs := map[string][3]string{
		"their-rsa": {"rsa", "RSA", "SHA256withRSA"}, "their-pss": {"rsa", "RSA", "SHA256withRSAandMGF1"}, "their-p256": {"p256", "EC", "SHA256withECDSA"},
		"their-p384": {"p384", "EC", "SHA384withECDSA"}, "their-ed25519": {"ed25519", "Ed25519", "Ed25519"},
	}
	for name, c := range theirs {
		commands = append(commands, fmt.Sprintf("%s sign %s %s %s %s %s %s", name, f.path(c[0]+".key.der"), c[1], f.path(c[0]+".pem"), c[2], f.path("content"), f.path(name)))
		want[name] = "made"
	}
	command := exec.Command("java", "-XX:TieredStopAtLevel=1", "-cp", "/usr/share/java/bcprov.jar:/usr/share/java/bcpkix.jar:/usr/share/java/bcutil.jar", filepath.Join("testdata", "java", "Cms.java"))
	command.Stdin = strings.NewReader(strings.Join(commands, "\n") + "\n")
	var complaints bytes.Buffer
	command.Stderr = &complaints
	output, err := command.Output()
	if err != nil {
		t.Fatalf("this test needs a JDK and BouncyCastle: %v\n%s", err, complaints.String())
	}
	answers := 0
	for line := range strings.Lines(string(output)) {
		name, answer, _ := strings.Cut(strings.TrimSpace(line), " ")
		if answers++; answer != want[name] {
			t.Errorf("%s: %s, want %s", name, answer, want[name])
		}
	}
	if answers != len(commands) {
		t.Fatalf("%d answers to %d commands:\n%s", answers, len(commands), output)
	}
	indefinite := 0
	for name := range theirs {
		der := f.read(name)
		if der[1] == 0x80 {
			indefinite++
		}
		s, err := cms.Verify(der, bytes.NewReader(content))
		if err != nil || len(s.Chain) != 2 {
			t.Errorf("%s: %v", name, err)
		}
	}
	if indefinite == 0 {
		t.Error("Java made no indefinite length: the test proves nothing about them")
	}
}

func FuzzVerify(f *testing.F) {
	for _, form := range forms {
		f.Add(sign(f, form))
	}
	f.Add([]byte{0x30, 0x80, 0x24, 0x80, 4, 1, 1, 0x24, 3, 4, 1, 2, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, der []byte) {
		s, err := cms.Verify(der, bytes.NewReader(content))
		if (s == nil || len(s.Chain) == 0) && err == nil {
			t.Fatal("no signer")
		}
	})
}
