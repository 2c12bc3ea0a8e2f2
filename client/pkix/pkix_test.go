package pkix

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"testing"
	"time"
)

var names = []string{"root", "module", "base", "ec256", "ed25519", "secp256k1"}

func readPEM(t testing.TB, name string) []byte {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(text)
	if block == nil {
		t.Fatalf("%s is not PEM", name)
	}
	return block.Bytes
}

func certificate(t testing.TB, name string) *x509.Certificate {
	t.Helper()
	c, err := ParseCertificate(readPEM(t, name+".cert.pem"))
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return c
}

// TestCertificates reads certificates of other programs, without help from GODEBUG, which this test binary is not linked with.
func TestCertificates(t *testing.T) {
	refused := 0
	var all []byte
	for _, name := range names {
		der := readPEM(t, name+".cert.pem")
		if _, err := x509.ParseCertificate(der); err != nil {
			refused++
		}
		c := certificate(t, name)
		if !bytes.Equal(c.Raw, der) || !bytes.Contains(der, c.RawTBSCertificate) || !bytes.Contains(c.RawTBSCertificate, c.RawSubjectPublicKeyInfo) {
			t.Errorf("%s: the raw parts are not of the certificate", name)
		}
		spki, err := MarshalPublicKey(c.PublicKey)
		if err != nil || !bytes.Equal(spki, c.RawSubjectPublicKeyInfo) {
			t.Errorf("%s: the key is %x, the certificate has %x, %v", name, spki, c.RawSubjectPublicKeyInfo, err)
		}
		all = append(all, der...)
	}
	if refused < 3 {
		t.Errorf("crypto/x509 refuses %d of the certificates: the test proves little", refused)
	}
	list, err := ParseCertificates(all)
	if err != nil || len(list) != len(names) {
		t.Fatalf("%d certificates, %v", len(list), err)
	}
	for i, c := range list {
		if !c.Equal(certificate(t, names[i])) {
			t.Errorf("%s differs in the list", names[i])
		}
	}
	for name, der := range map[string][]byte{"trailing": append(bytes.Clone(all), 0), "cut": all[:len(all)-1], "text": []byte("hello")} {
		if _, err := ParseCertificates(der); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestNegativeSerial(t *testing.T) {
	root := certificate(t, "root")
	if want, _ := new(big.Int).SetString("-1A2FB3788B2D770C", 16); root.SerialNumber.Cmp(want) != 0 {
		t.Errorf("serial number %x", root.SerialNumber)
	}
	roots, between := x509.NewCertPool(), x509.NewCertPool()
	roots.AddCert(root)
	between.AddCert(certificate(t, "module"))
	_, err := certificate(t, "base").Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: between, CurrentTime: time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC),
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	})
	if err != nil {
		t.Error(err)
	}
	changed := bytes.Clone(root.Raw)
	changed[len(changed)-1] ^= 1
	other, err := ParseCertificate(changed)
	if err != nil {
		t.Fatal(err)
	}
	if err := other.CheckSignatureFrom(root); err == nil {
		t.Error("a changed signature verifies")
	}
	longer := bytes.Clone(root.Raw) // the serial number is as long as it was, and could be shorter
	at, _ := locate(longer)
	copy(at.serial.of(longer), []byte{0xff, 0xff})
	if _, err := ParseCertificate(longer); err == nil {
		t.Error("a serial number that is not in its shortest form is read")
	}
	for _, test := range []struct {
		in   []byte
		want int64
	}{{[]byte{0xff}, -1}, {[]byte{0x80}, -128}, {[]byte{0x80, 0}, -32768}, {[]byte{0xff, 0x7f}, -129}} {
		if got := twosComplement(test.in); got.Cmp(big.NewInt(test.want)) != 0 {
			t.Errorf("%x is %v", test.in, got)
		}
	}
}

// TestSecp256k1Certificate: what crypto/x509 checks it checks over the bytes that were signed, not over the stand-in.
func TestSecp256k1Certificate(t *testing.T) {
	c := certificate(t, "secp256k1")
	if c.SerialNumber.Cmp(big.NewInt(-0x6ad36d9b61b)) != 0 || !IsSecp256k1(c.PublicKey) || c.PublicKeyAlgorithm != x509.ECDSA {
		t.Errorf("serial number %x, %T, %v", c.SerialNumber, c.PublicKey, c.PublicKeyAlgorithm)
	}
	if err := c.CheckSignatureFrom(c); err != nil {
		t.Error(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(c)
	if _, err := c.Verify(x509.VerifyOptions{Roots: roots, CurrentTime: time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC)}); err != nil {
		t.Error(err)
	}
	// The algorithm is signed, too: a certificate that really says what the stand-in says is another one.
	at, _ := locate(c.Raw)
	standIn, err := x509.ParseCertificate(at.standIn(c.Raw))
	if err != nil {
		t.Fatal(err)
	}
	if err := c.CheckSignature(standIn.SignatureAlgorithm, standIn.RawTBSCertificate, standIn.Signature); err == nil {
		t.Error("the stand-in verifies")
	}
	spki := bytes.Index(c.Raw, secp256k1Prefix)
	for name, change := range map[string]func(der []byte){
		"off the curve": func(der []byte) { der[spki+len(secp256k1Prefix)+64] ^= 1 },
		"hybrid":        func(der []byte) { der[spki+len(secp256k1Prefix)] = 6 },
		"other curve":   func(der []byte) { der[spki+19] = 0x0b },
		"unused bits":   func(der []byte) { der[spki+22] = 1 },
	} {
		der := bytes.Clone(c.Raw)
		change(der)
		if _, err := ParseCertificate(der); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestSecp256k1Request(t *testing.T) {
	der := readPEM(t, "secp256k1.csr.pem")
	r, err := ParseRequest(der)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(r.Raw, der) || r.Subject.CommonName != "secp256k1" || !IsSecp256k1(r.PublicKey) || r.CheckSignature() != nil {
		t.Errorf("%+v, %v", r.Subject, r.CheckSignature())
	}
	changed := bytes.Clone(der)
	at := bytes.Index(changed, []byte("secp256k1"))
	changed[at] ^= 1
	if r, err := ParseRequest(changed); err != nil || r.CheckSignature() == nil {
		t.Errorf("a changed request: %v", err)
	}
	_, key, _ := ed25519.GenerateKey(rand.Reader)
	der, err = x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	if r, err := ParseRequest(der); err != nil || r.CheckSignature() != nil {
		t.Error(err)
	}
}

func TestPublicKeys(t *testing.T) {
	other, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	for name, public := range map[string]crypto.PublicKey{"P-256": other.Public(), "secp256k1": certificate(t, "secp256k1").PublicKey} {
		spki, err := MarshalPublicKey(public)
		if err != nil {
			t.Fatal(err)
		}
		again, err := ParsePublicKey(spki)
		if err != nil || !public.(*ecdsa.PublicKey).Equal(again) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := ParsePublicKey(append(spki, 0)); err == nil {
			t.Errorf("%s: something follows it", name)
		}
		if point, err := Point(public.(*ecdsa.PublicKey)); err != nil || len(point) != 65 {
			t.Errorf("%s: %x, %v", name, point, err)
		}
	}
	for name, key := range map[string]*ecdsa.PublicKey{
		"nothing":       {Curve: Secp256k1()},
		"off the curve": {Curve: Secp256k1(), X: big.NewInt(1), Y: big.NewInt(1)},
		"negative":      {Curve: Secp256k1(), X: big.NewInt(-1), Y: big.NewInt(1)},
		"long":          {Curve: Secp256k1(), X: new(big.Int).Lsh(big.NewInt(1), 256), Y: big.NewInt(1)},
	} {
		if _, err := MarshalPublicKey(key); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func FuzzParseCertificate(f *testing.F) {
	for _, name := range names {
		f.Add(readPEM(f, name+".cert.pem"))
	}
	f.Fuzz(func(t *testing.T, der []byte) {
		c, err := ParseCertificate(der)
		if err != nil {
			return
		}
		if !bytes.Equal(c.Raw, der) {
			t.Error("Raw is not the input")
		}
		if !bytes.Contains(c.Raw, c.RawTBSCertificate) || !bytes.Contains(c.RawTBSCertificate, c.RawSubjectPublicKeyInfo) {
			t.Error("the raw parts are not of the certificate")
		}
		if IsSecp256k1(c.PublicKey) {
			if spki, err := MarshalPublicKey(c.PublicKey); err != nil || !bytes.Equal(spki, c.RawSubjectPublicKeyInfo) {
				t.Errorf("the key is %x, the certificate has %x, %v", spki, c.RawSubjectPublicKeyInfo, err)
			}
		}
		if _, err := x509.ParseCertificate(der); err != nil && c.SerialNumber.Sign() >= 0 && !IsSecp256k1(c.PublicKey) {
			t.Errorf("crypto/x509 refuses it: %v", err)
		}
	})
}

func FuzzParseRequest(f *testing.F) {
	f.Add(readPEM(f, "secp256k1.csr.pem"))
	f.Fuzz(func(t *testing.T, der []byte) {
		if r, err := ParseRequest(der); err == nil && !bytes.Equal(r.Raw, der) {
			t.Error("Raw is not the input")
		}
	})
}

func FuzzParsePublicKey(f *testing.F) {
	f.Add(certificate(f, "secp256k1").RawSubjectPublicKeyInfo)
	f.Fuzz(func(t *testing.T, spki []byte) {
		key, err := ParsePublicKey(spki)
		if err != nil || !IsSecp256k1(key) {
			return
		}
		if again, err := MarshalPublicKey(key); err != nil || !bytes.Equal(again, spki) {
			t.Errorf("%x, %v", again, err)
		}
	})
}
