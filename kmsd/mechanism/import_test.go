package mechanism

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"math/big"
	"os/exec"
	"testing"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// TestImportFromOpenSSL imports what openssl makes, in the forms it writes.
func TestImportFromOpenSSL(t *testing.T) {
	for algorithm, args := range map[keyspec.Algorithm][]string{
		keyspec.RSA2048:   {"-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"},
		keyspec.ECDSAP256: {"-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"},
		keyspec.ECDHP384:  {"-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384"},
		keyspec.ECDSAP521: {"-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-521"},
		keyspec.Ed25519:   {"-algorithm", "ED25519"},
		keyspec.X25519:    {"-algorithm", "X25519"},
	} {
		text, err := exec.Command("openssl", append([]string{"genpkey"}, args...)...).Output()
		if err != nil {
			t.Fatal("openssl genpkey:", err)
		}
		command := exec.Command("openssl", "pkey", "-pubout", "-outform", "DER")
		command.Stdin = bytes.NewReader(text)
		public, err := command.Output()
		if err != nil {
			t.Fatal("openssl pkey:", err)
		}
		block, _ := pem.Decode(text)
		row := lookup(t, algorithm)
		material, err := row.Import(block.Bytes)
		if err != nil {
			t.Errorf("%s: %v", algorithm, err)
			continue
		}
		key, err := row.Load(material)
		if err != nil {
			t.Fatal(err)
		}
		if spki, err := key.SPKI(); err != nil || !bytes.Equal(spki, public) {
			t.Errorf("%s: another public key, %v", algorithm, err)
		}
		// And back: openssl takes what we export, and finds it consistent.
		encoded, err := row.Export(material)
		if err != nil {
			t.Fatal(err)
		}
		command = exec.Command("openssl", "pkey", "-inform", "DER", "-check", "-noout")
		command.Stdin = bytes.NewReader(encoded)
		if output, err := command.CombinedOutput(); err != nil {
			t.Errorf("%s: openssl pkey -check: %s", algorithm, output)
		}
	}
}

// rsaPKCS8 encodes any numbers as an RSA key, consistent or not.
func rsaPKCS8(t *testing.T, n, e, d *big.Int, primes ...*big.Int) []byte {
	t.Helper()
	one := big.NewInt(1)
	inner := struct {
		Version         int
		N, E, D, P, Q   *big.Int
		DP, DQ, Inverse *big.Int
	}{0, n, e, d, primes[0], primes[1], nil, nil, nil}
	reduce := func(prime *big.Int) *big.Int {
		if prime.Cmp(one) == 0 {
			return one
		}
		return new(big.Int).Mod(d, new(big.Int).Sub(prime, one))
	}
	inner.DP, inner.DQ = reduce(inner.P), reduce(inner.Q)
	if inner.Inverse = new(big.Int).ModInverse(inner.Q, inner.P); inner.Inverse == nil {
		inner.Inverse = one
	}
	pkcs1, err := asn1.Marshal(inner)
	if err != nil {
		t.Fatal(err)
	}
	encoded, err := asn1.Marshal(envelopeOut{0, pkix.AlgorithmIdentifier{Algorithm: asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 1}, Parameters: asn1.NullRawValue}, pkcs1})
	if err != nil {
		t.Fatal(err)
	}
	return encoded
}

type envelopeOut struct {
	Version    int
	Algorithm  pkix.AlgorithmIdentifier
	PrivateKey []byte
}

func rsaOf(t *testing.T, p, q *big.Int, e int64) []byte {
	t.Helper()
	one := big.NewInt(1)
	n := new(big.Int).Mul(p, q)
	phi := new(big.Int).Mul(new(big.Int).Sub(p, one), new(big.Int).Sub(q, one))
	d := new(big.Int).ModInverse(big.NewInt(e), phi)
	if d == nil {
		t.Fatal("e divides phi")
	}
	return rsaPKCS8(t, n, big.NewInt(e), d, p, q)
}

func TestImportRefusesBadRSA(t *testing.T) {
	row := lookup(t, keyspec.RSA2048)
	good := fixed(t, keyspec.RSA2048).rsa
	p, q := good.Primes[0], good.Primes[1]
	if _, err := row.Import(rsaOf(t, p, q, 65537)); err != nil {
		t.Fatalf("the good key is refused: %v", err)
	}
	swapped, err := row.Import(rsaOf(t, q, p, 65537))
	if err != nil || !bytes.Equal(swapped, unhex(t, row.known.material)) {
		t.Errorf("the same key with its primes swapped has another form: %v", err)
	}
	product := func(bits int) *big.Int { // an odd composite without small factors, top two bits set
		for {
			a, _ := rand.Prime(rand.Reader, bits/2)
			b, _ := rand.Prime(rand.Reader, bits/2)
			n := new(big.Int).Mul(a, b)
			one := big.NewInt(1)
			if n.BitLen() == bits && n.Bit(bits-2) == 1 && new(big.Int).GCD(nil, nil, big.NewInt(65537), new(big.Int).Sub(n, one)).Cmp(one) == 0 {
				return n
			}
		}
	}
	near := new(big.Int).Add(p, big.NewInt(2))
	for !near.ProbablyPrime(20) || new(big.Int).Mod(near, big.NewInt(65537)).Cmp(big.NewInt(1)) == 0 {
		near.Add(near, big.NewInt(2))
	}
	for name, encoded := range map[string][]byte{
		"composite p":     rsaOf(t, product(1024), q, 65537),
		"primes too near": rsaOf(t, p, near, 65537),
		"equal primes":    rsaOf(t, p, p, 65537),
		"wrong modulus":   rsaPKCS8(t, new(big.Int).Add(good.N, big.NewInt(2)), big.NewInt(65537), good.D, p, q),
		"wrong d":         rsaPKCS8(t, good.N, big.NewInt(65537), new(big.Int).Add(good.D, big.NewInt(2)), p, q),
		"zero d":          rsaPKCS8(t, good.N, big.NewInt(65537), big.NewInt(0), p, q),
		"factor one":      rsaPKCS8(t, good.N, big.NewInt(65537), good.D, good.N, big.NewInt(1)),
		"negative":        rsaPKCS8(t, new(big.Int).Neg(good.N), big.NewInt(65537), good.D, p, q),
		"exponent 1":      rsaPKCS8(t, good.N, big.NewInt(1), big.NewInt(1), p, q),
		"exponent 2":      rsaPKCS8(t, good.N, big.NewInt(2), good.D, p, q),
		"exponent 65539":  rsaOf(t, p, q, 65539),
	} {
		if _, err := row.Import(encoded); !errors.Is(err, ErrMaterial) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, bits := range []int{1024, 1536, 2040, 2056} {
		key, err := rsa.GenerateKey(rand.Reader, bits)
		if err != nil {
			t.Fatal(err)
		}
		encoded, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := row.Import(encoded); !errors.Is(err, ErrMaterial) {
			t.Errorf("%d bits: %v", bits, err)
		}
		if bits < MinRSABits {
			if _, err := Encrypt(nil, &key.PublicKey, "", []byte("x"), nil); !errors.Is(err, ErrInput) {
				t.Errorf("encrypt to %d bits: %v", bits, err)
			}
			if err := Verify(&key.PublicKey, "", "", Input{}, make([]byte, bits/8)); !errors.Is(err, ErrInput) {
				t.Errorf("verify with %d bits: %v", bits, err)
			}
		}
	}
}

func TestImportRefusesBadEC(t *testing.T) {
	row := lookup(t, keyspec.ECDSAP256)
	key := fixed(t, keyspec.ECDSAP256).ecdsa
	other, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p256OID, err := asn1.Marshal(asn1.ObjectIdentifier{1, 2, 840, 10045, 3, 1, 7})
	if err != nil {
		t.Fatal(err)
	}
	encode := func(scalar, public []byte) []byte {
		inner, err := asn1.Marshal(struct {
			Version    int
			PrivateKey []byte
			PublicKey  asn1.BitString `asn1:"optional,explicit,tag:1"`
		}{1, scalar, asn1.BitString{Bytes: public, BitLength: 8 * len(public)}})
		if err != nil {
			t.Fatal(err)
		}
		encoded, err := asn1.Marshal(envelopeOut{0, pkix.AlgorithmIdentifier{Algorithm: oidECPublicKey, Parameters: asn1.RawValue{FullBytes: p256OID}}, inner})
		if err != nil {
			t.Fatal(err)
		}
		return encoded
	}
	scalar, _ := key.Bytes()
	public, _ := key.PublicKey.Bytes()
	wrong, _ := other.PublicKey.Bytes()
	if _, err := row.Import(encode(scalar, public)); err != nil {
		t.Fatalf("the good key is refused: %v", err)
	}
	order := elliptic.P256().Params().N.Bytes()
	for name, encoded := range map[string][]byte{
		"another public key": encode(scalar, wrong),
		"zero":               encode(make([]byte, 32), public),
		"the order":          encode(order, public),
		"too long":           encode(append([]byte{1}, scalar...), public),
	} {
		if _, err := row.Import(encoded); !errors.Is(err, ErrMaterial) {
			t.Errorf("%s: %v", name, err)
		}
	}
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if err := Verify(&p224.PublicKey, keyspec.ECDSASHA256, "", Input{}, nil); !errors.Is(err, ErrUnsupported) {
		t.Errorf("P-224: %v", err)
	}
}

// TestImportOneAsymmetricKey checks the public key that RFC 5958 version 2 encloses.
func TestImportOneAsymmetricKey(t *testing.T) {
	row := lookup(t, keyspec.Ed25519)
	key := fixed(t, keyspec.Ed25519)
	encode := func(public []byte) []byte {
		seed, err := asn1.Marshal(key.ed25519.Seed())
		if err != nil {
			t.Fatal(err)
		}
		encoded, err := asn1.Marshal(struct {
			Version    int
			Algorithm  pkix.AlgorithmIdentifier
			PrivateKey []byte
			PublicKey  asn1.BitString `asn1:"tag:1"`
		}{1, pkix.AlgorithmIdentifier{Algorithm: asn1.ObjectIdentifier{1, 3, 101, 112}}, seed, asn1.BitString{Bytes: public, BitLength: 8 * len(public)}})
		if err != nil {
			t.Fatal(err)
		}
		return encoded
	}
	public := []byte(key.ed25519[32:])
	if material, err := row.Import(encode(public)); err != nil || !bytes.Equal(material, key.ed25519.Seed()) {
		t.Errorf("the right public key: %v", err)
	}
	if _, err := row.Import(encode(changed(public))); !errors.Is(err, ErrMaterial) {
		t.Errorf("the wrong public key: %v", err)
	}
}

func TestLoadRefusesBadMaterial(t *testing.T) {
	row := lookup(t, keyspec.RSA2048)
	good := unhex(t, row.known.material)
	p, q := good[:128], good[128:]
	even := bytes.Clone(good)
	even[255] &^= 1
	for name, material := range map[string][]byte{
		"zero":      make([]byte, 256),
		"equal":     append(bytes.Clone(p), p...),
		"swapped":   append(bytes.Clone(q), p...),
		"even":      even,
		"all ones":  bytes.Repeat([]byte{0xff}, 256),
		"zero half": append(bytes.Clone(p), make([]byte, 128)...),
	} {
		if _, err := row.Load(material); !errors.Is(err, ErrMaterial) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, a := range []keyspec.Algorithm{keyspec.ECDSAP256, keyspec.ECDSAP384, keyspec.ECDSAP521, keyspec.ECDHP256} {
		row := lookup(t, a)
		for _, material := range [][]byte{make([]byte, row.size), bytes.Repeat([]byte{0xff}, row.size)} {
			if _, err := row.Load(material); !errors.Is(err, ErrMaterial) {
				t.Errorf("%s: %v", a, err)
			}
		}
	}
}

// TestLoadedRSAEqualsParsed compares the exponent and the CRT values made from p || q with those of a full key.
func TestLoadedRSAEqualsParsed(t *testing.T) {
	for range 4 {
		original, err := rsa.GenerateKey(rand.Reader, 2048)
		if err != nil {
			t.Fatal(err)
		}
		material, err := rsaMaterial(original, 2048)
		if err != nil {
			t.Fatal(err)
		}
		key, err := lookup(t, keyspec.RSA2048).Load(material)
		if err != nil {
			t.Fatal(err)
		}
		one := big.NewInt(1)
		for _, prime := range original.Primes {
			reduced := new(big.Int).Mul(key.rsa.D, big.NewInt(65537))
			if reduced.Mod(reduced, new(big.Int).Sub(prime, one)).Cmp(one) != 0 {
				t.Error("d is not the inverse of e")
			}
		}
		digest := make([]byte, 32)
		sigOne, err1 := rsa.SignPKCS1v15(nil, original, crypto.SHA256, digest)
		sigTwo, err2 := key.Sign(nil, keyspec.RSAPKCS1SHA256, "", Input{Digest: digest})
		if err1 != nil || err2 != nil || !bytes.Equal(sigOne, sigTwo) {
			t.Error("another signature:", err1, err2)
		}
	}
}
