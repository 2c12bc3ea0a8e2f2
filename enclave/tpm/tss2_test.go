package tpm

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// openssl runs OpenSSL with its tpm2 provider on the TPM, in a directory of its own. It is the judge of key files.
type openssl struct {
	t   *testing.T
	s   *simulator
	dir string
}

func (o openssl) run(args ...string) []byte {
	o.t.Helper()
	out, err := o.try(args...)
	if err != nil {
		o.t.Fatalf("openssl %v: %v\n%s", args, err, out)
	}
	return out
}

func (o openssl) try(args ...string) ([]byte, error) {
	cmd := exec.CommandContext(limited(o.t), "openssl", args...)
	cmd.Dir = o.dir
	cmd.Env = append(os.Environ(), "TPM2OPENSSL_TCTI=swtpm:path="+o.s.socket())
	return cmd.CombinedOutput()
}

func (o openssl) write(name string, content []byte) {
	o.t.Helper()
	if err := os.WriteFile(filepath.Join(o.dir, name), content, 0o600); err != nil {
		o.t.Fatal(err)
	}
}

func (o openssl) read(name string) []byte {
	o.t.Helper()
	b, err := os.ReadFile(filepath.Join(o.dir, name))
	if err != nil {
		o.t.Fatal(err)
	}
	return b
}

var provider = []string{"-provider", "tpm2", "-provider", "default", "-propquery", "?provider=tpm2"}

var tss2Message = []byte("signed by a key of the TPM")

func verifies(t *testing.T, public crypto.PublicKey, signature []byte) bool {
	t.Helper()
	digest := sha256.Sum256(tss2Message)
	switch k := public.(type) {
	case *ecdsa.PublicKey:
		return ecdsa.VerifyASN1(k, digest[:], signature)
	case *rsa.PublicKey:
		return rsa.VerifyPKCS1v15(k, crypto.SHA256, digest[:], signature) == nil
	}
	t.Fatalf("key of type %T", public)
	return false
}

// OpenSSL signs with our keys.
func TestExportForOpenSSL(t *testing.T) {
	t.Parallel()
	s := startSimulator(t)
	d := s.open(Config{})
	for _, a := range []keyspec.Algorithm{keyspec.ECDSAP256, keyspec.ECDSAP384, keyspec.RSA2048} {
		o := openssl{t, s, t.TempDir()}
		k := generate(t, d, spec(a, keyspec.Sign))
		file, password, err := Export(k.blob, testAAD)
		if err != nil {
			t.Fatal(err)
		}
		o.write("key.pem", file)
		o.write("password", password)
		o.write("message", tss2Message)
		sign := append([]string{"pkeyutl", "-sign", "-rawin", "-digest", "sha256", "-inkey", "key.pem", "-in", "message", "-out", "signature"}, provider...)
		o.run(append(sign, "-passin", "file:password")...)
		if !verifies(t, k.public, o.read("signature")) {
			t.Errorf("%s: the signature of OpenSSL does not verify", a)
		}
		o.write("password", []byte("another"))
		if out, err := o.try(append(sign, "-passin", "file:password")...); err == nil {
			t.Errorf("%s: signs with a wrong password\n%s", a, out)
		}
		// And back.
		blob, _, err := d.Import(limited(t), file, password, spec("", keyspec.Sign))
		if err != nil {
			t.Fatalf("%s: %v", a, err)
		}
		if _, err := (residentKey{d, blob, k.public}).do(t, enclave.Op{Usage: keyspec.Sign, Input: tss2Message}); err != nil {
			t.Errorf("%s: %v", a, err)
		}
	}
	if n := s.property(tpm2.TPMPTLockoutCounter); n != 0 {
		t.Errorf("%d wrong passwords counted", n)
	}
}

// We use keys that OpenSSL made.
func TestImportFromOpenSSL(t *testing.T) {
	t.Parallel()
	s := startSimulator(t)
	d := s.open(Config{})
	if h := d.Health(limited(t)); h.State != enclave.Ready { // starts the TPM up
		t.Fatal(h)
	}
	for name, c := range map[string]struct {
		make   []string
		want   keyspec.Algorithm
		usage  keyspec.Usage
		scheme keyspec.Scheme
	}{
		"P-256":    {[]string{"-algorithm", "EC", "-pkeyopt", "group:P-256"}, keyspec.ECDSAP256, keyspec.Sign, keyspec.ECDSASHA256},
		"P-384":    {[]string{"-algorithm", "EC", "-pkeyopt", "group:P-384"}, keyspec.ECDSAP384, keyspec.Sign, keyspec.ECDSASHA256},
		"RSA-2048": {[]string{"-algorithm", "RSA", "-pkeyopt", "bits:2048"}, keyspec.RSA2048, keyspec.Sign, keyspec.RSAPKCS1SHA256},
		"password": {[]string{"-algorithm", "EC", "-pkeyopt", "group:P-256", "-pkeyopt", "user-auth:secret"}, keyspec.ECDSAP256, keyspec.Sign, keyspec.ECDSASHA256},
	} {
		o := openssl{t, s, t.TempDir()}
		o.run(append(append([]string{"genpkey"}, c.make...), append(provider, "-out", "key.pem")...)...)
		file := o.read("key.pem")
		var password []byte
		if name == "password" {
			password = []byte("secret")
			if _, _, err := d.Import(limited(t), file, []byte("guessed"), spec(c.want, c.usage)); !errors.Is(err, enclave.ErrAuth) {
				t.Errorf("wrong password: %v", err)
			}
		}
		blob, spki, err := d.Import(limited(t), file, password, spec(c.want, c.usage))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		show := append([]string{"pkey", "-in", "key.pem", "-pubout"}, provider...)
		if password != nil {
			o.write("password", password)
			show = append(show, "-passin", "file:password")
		}
		block, _ := pem.Decode(o.run(show...))
		if block == nil || !bytes.Equal(block.Bytes, spki) {
			t.Errorf("%s: OpenSSL sees another public key", name)
		}
		public, err := x509.ParsePKIXPublicKey(spki)
		if err != nil {
			t.Fatal(err)
		}
		k := residentKey{d, blob, public}
		signature, err := k.do(t, enclave.Op{Usage: c.usage, Scheme: c.scheme, Input: tss2Message})
		if err != nil || !verifies(t, public, signature) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := k.do(t, enclave.Op{Usage: c.usage, Scheme: c.scheme, Input: tss2Message, Bound: []byte("another record")}); !errors.Is(err, enclave.ErrCorrupt) {
			t.Errorf("%s in another record: %v", name, err)
		}
		if _, _, err := d.Import(limited(t), file, password, spec(keyspec.ECDSAP521, c.usage)); !errors.Is(err, enclave.ErrUnsupported) {
			t.Errorf("%s as P-521: %v", name, err)
		}
	}
}

// Keys of OpenSSL's provider are refused during a lockout, which says until when; ours are not.
func TestImportedKeysAreLockedOut(t *testing.T) {
	t.Parallel()
	s := startSimulator(t)
	d := s.open(Config{})
	ours := generate(t, d, spec(keyspec.ECDSAP256, keyspec.Sign))
	o := openssl{t, s, t.TempDir()}
	o.run(append([]string{"genpkey", "-algorithm", "EC", "-pkeyopt", "group:P-256", "-pkeyopt", "user-auth:secret", "-out", "key.pem"}, provider...)...)
	file := o.read("key.pem")
	blob, _, err := d.Import(limited(t), file, []byte("secret"), spec("", keyspec.Sign))
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if _, _, err := d.Import(limited(t), file, []byte("guessed"), spec("", keyspec.Sign)); !errors.Is(err, enclave.ErrAuth) {
			t.Fatal(err)
		}
	}
	op := enclave.Op{Usage: keyspec.Sign, Input: tss2Message}
	_, err = (residentKey{d, blob, nil}).do(t, op)
	var e *enclave.Error
	if !errors.Is(err, enclave.ErrLockedOut) || !errors.As(err, &e) || e.Until.IsZero() {
		t.Errorf("imported key: %v", err)
	}
	if _, err := ours.do(t, op); err != nil {
		t.Errorf("generated key: %v", err)
	}
}

func TestImportRefuses(t *testing.T) {
	s := startSimulator(t)
	d := s.open(Config{})
	k := generate(t, d, spec(keyspec.ECDSAP256, keyspec.Sign))
	good, password, err := Export(k.blob, testAAD)
	if err != nil {
		t.Fatal(err)
	}
	changed := func(change func(*keyFile)) []byte {
		f, err := parseKeyFile(good)
		if err != nil {
			t.Fatal(err)
		}
		change(f)
		b, err := f.marshal()
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	for name, file := range map[string][]byte{
		"nothing":       nil,
		"no PEM":        []byte("key"),
		"another block": pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte{1}}),
		"empty block":   pem.EncodeToMemory(&pem.Block{Type: pemType}),
		"too large":     append(bytes.Repeat([]byte("\n"), maxPEM), good...),
		"importable":    changed(func(f *keyFile) { f.kind = oidImportable }),
		"sealed":        changed(func(f *keyFile) { f.kind = oidSealed }),
		"other type":    changed(func(f *keyFile) { f.kind = append(f.kind, 1) }),
		"parent":        changed(func(f *keyFile) { f.parent = 0x81000001 }),
		"no fixedTPM":   changed(func(f *keyFile) { f.public[7] ^= 2 }),
		"restricted":    changed(func(f *keyFile) { f.public[5] ^= 1 }),
		"hash":          changed(func(f *keyFile) { f.public[0] = 0xff }),
	} {
		if _, _, err := d.Import(limited(t), file, password, spec("", keyspec.Sign)); !errors.Is(err, enclave.ErrUnsupported) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, s := range map[string]enclave.Spec{
		"decrypt":  spec("", keyspec.Decrypt),
		"agree":    spec("", keyspec.Agree),
		"no usage": spec(""),
		"long AAD": {Usages: []keyspec.Usage{keyspec.Sign}, AAD: make([]byte, enclave.MaxAAD+1)},
	} {
		if _, _, err := d.Import(limited(t), good, password, s); !errors.Is(err, enclave.ErrUnsupported) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, password := range []string{"with\x00zero", string(make([]byte, authSize+1))} {
		if _, _, err := d.Import(limited(t), good, []byte(password), spec("", keyspec.Sign)); !errors.Is(err, enclave.ErrUnsupported) {
			t.Errorf("password %q: %v", password, err)
		}
	}
	damaged := changed(func(f *keyFile) { f.private[60] ^= 1 })
	if _, _, err := d.Import(limited(t), damaged, password, spec("", keyspec.Sign)); !errors.Is(err, enclave.ErrCorrupt) {
		t.Errorf("damaged private area: %v", err)
	}
	if _, _, err := Export(k.blob[1:], testAAD); !errors.Is(err, enclave.ErrCorrupt) {
		t.Error(err)
	}
}

func FuzzKeyFile(f *testing.F) {
	public, private := bytes.Repeat([]byte{1}, 90), bytes.Repeat([]byte{2}, 126)
	for _, k := range []keyFile{
		{kind: oidLoadable, emptyAuth: true, parent: 0x40000001, public: public, private: private},
		{kind: oidSealed, parent: 0x81000001, public: public, private: private},
	} {
		file, err := k.marshal()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(file)
	}
	f.Fuzz(func(t *testing.T, file []byte) {
		k, err := parseKeyFile(file)
		if err != nil {
			return
		}
		again, err := k.marshal()
		if err != nil {
			t.Fatal(err)
		}
		same, err := parseKeyFile(again)
		if err != nil {
			t.Fatal(err)
		}
		if !same.kind.Equal(k.kind) || same.emptyAuth != k.emptyAuth || same.parent != k.parent ||
			!bytes.Equal(same.public, k.public) || !bytes.Equal(same.private, k.private) {
			t.Fatalf("%+v became %+v", k, same)
		}
	})
}
