package mechanism

import (
	"bytes"
	"crypto"
	"crypto/aes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/mechanism/wycheprooftest"
)

// wycheproof names every file that is run for a row. A file may serve several rows. The key wrap files belong to the AES
// rows, which wrap with AES-KWP.
var wycheproof = []struct {
	file  string
	rows  []keyspec.Algorithm
	run   func(*testing.T, *vectors)
	heavy bool // left out with -short and -race
}{
	{"ecdsa_secp256r1_sha256", []keyspec.Algorithm{keyspec.ECDSAP256}, verifyVectors, false},
	{"ecdsa_secp256r1_sha256_p1363", []keyspec.Algorithm{keyspec.ECDSAP256}, verifyVectors, false},
	{"ecdsa_secp256r1_sha512", []keyspec.Algorithm{keyspec.ECDSAP256}, verifyVectors, false},
	{"ecdsa_secp256r1_sha512_p1363", []keyspec.Algorithm{keyspec.ECDSAP256}, verifyVectors, false},
	{"ecdsa_secp384r1_sha256", []keyspec.Algorithm{keyspec.ECDSAP384}, verifyVectors, true},
	{"ecdsa_secp384r1_sha384", []keyspec.Algorithm{keyspec.ECDSAP384}, verifyVectors, true},
	{"ecdsa_secp384r1_sha384_p1363", []keyspec.Algorithm{keyspec.ECDSAP384}, verifyVectors, true},
	{"ecdsa_secp384r1_sha512", []keyspec.Algorithm{keyspec.ECDSAP384}, verifyVectors, true},
	{"ecdsa_secp384r1_sha512_p1363", []keyspec.Algorithm{keyspec.ECDSAP384}, verifyVectors, true},
	{"ecdsa_secp256k1_sha256", []keyspec.Algorithm{keyspec.ECDSASecp256k1}, verifyVectors, false},
	{"ecdsa_secp256k1_sha256_p1363", []keyspec.Algorithm{keyspec.ECDSASecp256k1}, verifyVectors, false},
	{"ecdsa_secp521r1_sha512", []keyspec.Algorithm{keyspec.ECDSAP521}, verifyVectors, true},
	{"ecdsa_secp521r1_sha512_p1363", []keyspec.Algorithm{keyspec.ECDSAP521}, verifyVectors, true},
	{"ed25519", []keyspec.Algorithm{keyspec.Ed25519}, verifyVectors, false},
	{"x25519_asn", []keyspec.Algorithm{keyspec.X25519}, agreeVectors, false},
	{"x25519_pem", []keyspec.Algorithm{keyspec.X25519}, agreeVectors, true},
	{"x25519", []keyspec.Algorithm{keyspec.X25519}, agreeVectors, false},
	{"ecdh_secp256r1", []keyspec.Algorithm{keyspec.ECDHP256}, agreeVectors, false},
	{"ecdh_secp256r1_ecpoint", []keyspec.Algorithm{keyspec.ECDHP256}, agreeVectors, false},
	{"ecdh_secp256r1_pem", []keyspec.Algorithm{keyspec.ECDHP256}, agreeVectors, false},
	{"ecdh_secp384r1", []keyspec.Algorithm{keyspec.ECDHP384}, agreeVectors, true},
	{"ecdh_secp384r1_ecpoint", []keyspec.Algorithm{keyspec.ECDHP384}, agreeVectors, true},
	{"ecdh_secp384r1_pem", []keyspec.Algorithm{keyspec.ECDHP384}, agreeVectors, true},
	{"ecdh_secp521r1", []keyspec.Algorithm{keyspec.ECDHP521}, agreeVectors, true},
	{"ecdh_secp521r1_ecpoint", []keyspec.Algorithm{keyspec.ECDHP521}, agreeVectors, true},
	{"ecdh_secp521r1_pem", []keyspec.Algorithm{keyspec.ECDHP521}, agreeVectors, true},
	{"aes_gcm", []keyspec.Algorithm{keyspec.AES128GCM, keyspec.AES256GCM}, aeadVectors, false},
	{"chacha20_poly1305", []keyspec.Algorithm{keyspec.ChaCha20Poly1305}, aeadVectors, false},
	{"aes_wrap", []keyspec.Algorithm{keyspec.AES128GCM, keyspec.AES256GCM}, wrapVectors, false},
	{"aes_kwp", []keyspec.Algorithm{keyspec.AES128GCM, keyspec.AES256GCM}, wrapVectors, false},
	{"hmac_sha256", []keyspec.Algorithm{keyspec.HMACSHA256}, macVectors, false},
	{"hmac_sha384", []keyspec.Algorithm{keyspec.HMACSHA384}, macVectors, false},
	{"hmac_sha512", []keyspec.Algorithm{keyspec.HMACSHA512}, macVectors, false},
	{"hkdf_sha256", []keyspec.Algorithm{keyspec.HKDFSHA256}, hkdfVectors, false},
	{"rsa_signature_2048_sha256", []keyspec.Algorithm{keyspec.RSA2048}, verifyVectors, false},
	{"rsa_signature_2048_sha384", []keyspec.Algorithm{keyspec.RSA2048}, verifyVectors, false},
	{"rsa_signature_2048_sha512", []keyspec.Algorithm{keyspec.RSA2048}, verifyVectors, false},
	{"rsa_signature_3072_sha256", []keyspec.Algorithm{keyspec.RSA3072}, verifyVectors, false},
	{"rsa_signature_3072_sha384", []keyspec.Algorithm{keyspec.RSA3072}, verifyVectors, false},
	{"rsa_signature_3072_sha512", []keyspec.Algorithm{keyspec.RSA3072}, verifyVectors, false},
	{"rsa_signature_4096_sha256", []keyspec.Algorithm{keyspec.RSA4096}, verifyVectors, false},
	{"rsa_signature_4096_sha384", []keyspec.Algorithm{keyspec.RSA4096}, verifyVectors, false},
	{"rsa_signature_4096_sha512", []keyspec.Algorithm{keyspec.RSA4096}, verifyVectors, false},
	{"rsa_pkcs1_2048_sig_gen", []keyspec.Algorithm{keyspec.RSA2048}, signVectors, false},
	{"rsa_pkcs1_3072_sig_gen", []keyspec.Algorithm{keyspec.RSA3072}, signVectors, false},
	{"rsa_pkcs1_4096_sig_gen", []keyspec.Algorithm{keyspec.RSA4096}, signVectors, true},
	{"rsa_pkcs1_1024_sig_gen", []keyspec.Algorithm{keyspec.RSA2048, keyspec.RSA3072, keyspec.RSA4096}, weakVectors, false},
	{"rsa_pkcs1_1536_sig_gen", []keyspec.Algorithm{keyspec.RSA2048, keyspec.RSA3072, keyspec.RSA4096}, weakVectors, false},
	{"rsa_pss_2048_sha256_mgf1_0", []keyspec.Algorithm{keyspec.RSA2048}, verifyVectors, false},
	{"rsa_pss_2048_sha256_mgf1_32", []keyspec.Algorithm{keyspec.RSA2048}, verifyVectors, false},
	{"rsa_pss_2048_sha384_mgf1_48", []keyspec.Algorithm{keyspec.RSA2048}, verifyVectors, false},
	{"rsa_pss_3072_sha256_mgf1_32", []keyspec.Algorithm{keyspec.RSA3072}, verifyVectors, false},
	{"rsa_pss_4096_sha256_mgf1_32", []keyspec.Algorithm{keyspec.RSA4096}, verifyVectors, false},
	{"rsa_pss_4096_sha384_mgf1_48", []keyspec.Algorithm{keyspec.RSA4096}, verifyVectors, false},
	{"rsa_pss_4096_sha512_mgf1_32", []keyspec.Algorithm{keyspec.RSA4096}, verifyVectors, false},
	{"rsa_pss_4096_sha512_mgf1_64", []keyspec.Algorithm{keyspec.RSA4096}, verifyVectors, false},
	{"rsa_pss_misc", []keyspec.Algorithm{keyspec.RSA2048}, verifyVectors, false},
	{"rsa_pss_2048_sha256_mgf1sha1_20", []keyspec.Algorithm{keyspec.RSA2048}, verifyVectors, false},
	{"rsa_oaep_2048_sha256_mgf1sha256", []keyspec.Algorithm{keyspec.RSA2048}, decryptVectors, false},
	{"rsa_oaep_3072_sha256_mgf1sha256", []keyspec.Algorithm{keyspec.RSA3072}, decryptVectors, true},
	{"rsa_oaep_4096_sha256_mgf1sha256", []keyspec.Algorithm{keyspec.RSA4096}, decryptVectors, true},
	{"rsa_oaep_misc", []keyspec.Algorithm{keyspec.RSA2048}, decryptVectors, true},
	{"rsa_three_primes_oaep_4096_sha256_mgf1sha256", []keyspec.Algorithm{keyspec.RSA4096}, threePrimeVectors, false},
}

// vectors is a Wycheproof file; only the fields of its kind are filled.
type vectors struct {
	name          string
	row           *Row // the first of the file's rows
	NumberOfTests int
	TestGroups    []struct {
		Curve, Encoding    string
		KeySize, TagSize   int
		IVSize             int
		SHA, MGFSHA        string
		SLen               int
		PublicKeyDER       string
		PublicKeyASN       string
		PublicKeyPEM       string
		PrivateKeyPKCS8    string
		PrivateKey         json.RawMessage
		PublicKey, KeyJWK  json.RawMessage
		Type               string
		Tests              []vector
		PrivateKeyPem, Key json.RawMessage
	}
}

type vector struct {
	TCID                           int
	Comment, Result                string
	Flags                          []string
	Key, IV, AAD, Msg, CT, Tag     string
	Sig, Label, Public, Private    string
	Shared, IKM, Salt, Info, OKM   string
	Size                           int
	PublicKeyPEM, PrivateKeyFormat string
}

func (v *vector) is(flag string) bool { return slices.Contains(v.Flags, flag) }

func TestWycheproof(t *testing.T) {
	for _, w := range wycheproof {
		t.Run(w.file, func(t *testing.T) {
			if w.heavy && (testing.Short() || raceEnabled) {
				t.Skip("too slow for a short run, and for the race detector, which has nothing to find in pure arithmetic")
			}
			t.Parallel()
			v := &vectors{name: w.file, row: lookup(t, w.rows[0])}
			wycheprooftest.Read(t, w.file+"_test.json", v)
			total := 0
			for _, g := range v.TestGroups {
				total += len(g.Tests)
			}
			if total == 0 || total != v.NumberOfTests {
				t.Fatalf("%d vectors, the file says %d", total, v.NumberOfTests)
			}
			w.run(t, v)
		})
	}
}

// TestWycheproofCoversEveryRow keeps a new row from going without vectors.
func TestWycheproofCoversEveryRow(t *testing.T) {
	for _, row := range Table() {
		files := 0
		for _, w := range wycheproof {
			if slices.Contains(w.rows, row.Algorithm) {
				files++
			}
		}
		if files == 0 {
			t.Errorf("%s has no Wycheproof file", row.Algorithm)
		}
		if row.known.material == "" || row.known.output == "" {
			t.Errorf("%s has no known answer", row.Algorithm)
		}
	}
}

// judge compares what happened with the vector's verdict. Vectors marked acceptable may go either way, but never to a
// wrong answer: the caller has compared it.
func judge(t *testing.T, v *vector, err error) {
	t.Helper()
	if v.Result == "valid" && err != nil || v.Result == "invalid" && err == nil {
		t.Errorf("vector %d (%s) %v is %s: %v", v.TCID, v.Comment, v.Flags, v.Result, err)
	}
}

// ran fails the test when too few of a file's vectors were of use.
func ran(t *testing.T, n, least int) {
	t.Helper()
	if n < least || n == 0 {
		t.Errorf("ran %d vectors, at least %d expected", n, least)
	}
}

var hashes = map[string]int{"SHA-256": 0, "SHA-384": 1, "SHA-512": 2}

func verifyVectors(t *testing.T, file *vectors) {
	n := 0
	for _, g := range file.TestGroups {
		spki := unhex(t, g.PublicKeyDER)
		public, err := ParseSPKI(spki)
		if err != nil {
			t.Errorf("public key: %v", err)
			continue
		}
		hash, ok := hashes[g.SHA]
		if !ok && file.row.Kind != KindEd25519 {
			continue // SHA-1, SHA-224 and truncated hashes are no schemes of kmsd
		}
		var scheme keyspec.Scheme
		encoding := DER
		switch g.Type {
		case "EcdsaVerify", "EcdsaP1363Verify":
			scheme = []keyspec.Scheme{keyspec.ECDSASHA256, keyspec.ECDSASHA384, keyspec.ECDSASHA512}[hash]
			if g.Type == "EcdsaP1363Verify" {
				encoding = P1363
			}
		case "EddsaVerify":
			scheme = keyspec.PureEd25519
		case "RsassaPkcs1Verify":
			scheme = []keyspec.Scheme{keyspec.RSAPKCS1SHA256, keyspec.RSAPKCS1SHA384, keyspec.RSAPKCS1SHA512}[hash]
		case "RsassaPssVerify":
			scheme = []keyspec.Scheme{keyspec.RSAPSSSHA256, keyspec.RSAPSSSHA384, keyspec.RSAPSSSHA512}[hash]
		default:
			t.Fatalf("group of type %s", g.Type)
		}
		for i := range g.Tests {
			v := &g.Tests[i]
			if g.Type == "RsassaPssVerify" && g.MGFSHA != g.SHA {
				v.Result = "invalid" // MGF1 uses the hash of the scheme
			}
			message, sig := unhex(t, v.Msg), unhex(t, v.Sig)
			if g.MGFSHA == g.SHA && strings.HasPrefix(v.Comment, "s_len changed to ") {
				// Verify takes salts of every length. That nothing else is wrong with the vector is checked here.
				v.Result = "valid"
				var space [64]byte
				h := Digest(scheme)
				options := &rsa.PSSOptions{SaltLength: g.SLen}
				if g.SLen == 0 {
					options.SaltLength = h.Size() // 0 means any length to the standard library
				}
				strict := rsa.VerifyPSS(public.(*rsa.PublicKey), h, sum(h, message, &space), sig, options)
				if same := strings.HasSuffix(v.Comment, fmt.Sprintf(" %d", options.SaltLength)); (strict == nil) != same {
					t.Errorf("vector %d (%s): with a salt of %d bytes: %v", v.TCID, v.Comment, options.SaltLength, strict)
				}
			}
			err := Verify(public, scheme, encoding, Input{Message: message}, sig)
			judge(t, v, err)
			if h := Digest(scheme); h != 0 {
				var space [64]byte
				again := Verify(public, scheme, encoding, Input{Digest: sum(h, message, &space)}, sig)
				if (again == nil) != (err == nil) {
					t.Errorf("vector %d: the digest verifies otherwise than the message", v.TCID)
				}
			}
			n++
		}
	}
	least := file.NumberOfTests
	if file.name == "rsa_pss_misc" {
		least = 60
	}
	ran(t, n, least)
}

func signVectors(t *testing.T, file *vectors) {
	n := 0
	for _, g := range file.TestGroups {
		hash, ok := hashes[g.SHA]
		if !ok {
			continue
		}
		material, err := file.row.Import(unhex(t, g.PrivateKeyPKCS8))
		if err != nil {
			if g.Tests[0].is("SmallPublicKey") {
				continue // the exponent is 3
			}
			t.Errorf("import: %v", err)
			continue
		}
		key, err := file.row.Load(material)
		if err != nil {
			t.Fatal(err)
		}
		scheme := []keyspec.Scheme{keyspec.RSAPKCS1SHA256, keyspec.RSAPKCS1SHA384, keyspec.RSAPKCS1SHA512}[hash]
		for i := range g.Tests {
			v := &g.Tests[i]
			sig, err := key.Sign(nil, scheme, DER, Input{Message: unhex(t, v.Msg)})
			judge(t, v, err)
			if hex.EncodeToString(sig) != v.Sig {
				t.Errorf("vector %d: another signature", v.TCID)
			}
			n++
		}
	}
	ran(t, n, 12)
}

// weakVectors have keys below 2048 bits: nothing imports or verifies with them.
func weakVectors(t *testing.T, file *vectors) {
	n := 0
	for _, g := range file.TestGroups {
		for _, row := range Table() {
			if _, err := row.Import(unhex(t, g.PrivateKeyPKCS8)); err == nil {
				t.Errorf("a key of %d bits imported as %s", g.KeySize, row.Algorithm)
			}
		}
		n++
	}
	ran(t, n, len(file.TestGroups))
}

// threePrimeVectors have RSA keys of three primes.
func threePrimeVectors(t *testing.T, file *vectors) {
	n := 0
	for _, g := range file.TestGroups {
		if _, err := file.row.Import(unhex(t, g.PrivateKeyPKCS8)); err == nil {
			t.Error("a key of three primes imported")
		}
		n++
	}
	ran(t, n, 1)
}

func decryptVectors(t *testing.T, file *vectors) {
	n := 0
	for _, g := range file.TestGroups {
		if g.SHA != "SHA-256" || g.MGFSHA != "SHA-256" || g.KeySize != file.row.size*8 {
			continue
		}
		material, err := file.row.Import(unhex(t, g.PrivateKeyPKCS8))
		if err != nil {
			t.Errorf("import: %v", err)
			continue
		}
		key, err := file.row.Load(material)
		if err != nil {
			t.Fatal(err)
		}
		for i := range g.Tests {
			v := &g.Tests[i]
			got, err := key.Decrypt(nil, keyspec.RSAOAEPSHA256, unhex(t, v.CT), unhex(t, v.Label))
			judge(t, v, err)
			if err == nil && hex.EncodeToString(got) != v.Msg {
				t.Errorf("vector %d: another plaintext", v.TCID)
			}
			n++
		}
	}
	least := file.NumberOfTests
	if file.name == "rsa_oaep_misc" {
		least = 3
	}
	ran(t, n, least)
}

func agreeVectors(t *testing.T, file *vectors) {
	n := 0
	for _, g := range file.TestGroups {
		for i := range g.Tests {
			v := &g.Tests[i]
			material, ok := agreeMaterial(t, file, v)
			if !ok {
				continue
			}
			key, err := file.row.Load(material)
			if err != nil {
				judge(t, v, err)
				continue
			}
			spki, ok := agreePeer(t, file, g.Encoding, v)
			if !ok {
				judge(t, v, ErrInput)
				continue
			}
			got, err := key.Agree(spki)
			judge(t, v, err)
			if err == nil && hex.EncodeToString(got) != v.Shared {
				t.Errorf("vector %d (%s): another secret", v.TCID, v.Comment)
			}
			n++
		}
	}
	ran(t, n, file.NumberOfTests*9/10)
}

// agreeMaterial returns the private key of a vector: a scalar of any length, or PKCS#8.
func agreeMaterial(t *testing.T, file *vectors, v *vector) ([]byte, bool) {
	if strings.HasPrefix(v.Private, "-----BEGIN") {
		return importVector(t, file, v, unpem(t, v.Private))
	}
	raw := unhex(t, v.Private)
	if file.name == "x25519_asn" {
		return importVector(t, file, v, raw)
	}
	raw = bytes.TrimLeft(raw, "\x00")
	if file.row.Algorithm == keyspec.X25519 {
		raw = unhex(t, v.Private)
	}
	if len(raw) > file.row.size {
		return nil, false
	}
	return append(make([]byte, file.row.size-len(raw)), raw...), true
}

func importVector(t *testing.T, file *vectors, v *vector, pkcs8 []byte) ([]byte, bool) {
	material, err := file.row.Import(pkcs8)
	if err != nil && v.Result == "valid" {
		t.Errorf("vector %d: import: %v", v.TCID, err)
	}
	return material, err == nil
}

// agreePeer returns the peer's key as SubjectPublicKeyInfo; other encodings get the header that makes them one.
func agreePeer(t *testing.T, file *vectors, encoding string, v *vector) ([]byte, bool) {
	if strings.HasPrefix(v.Public, "-----BEGIN") {
		return unpem(t, v.Public), true
	}
	raw := unhex(t, v.Public)
	var header string
	switch {
	case file.name == "x25519":
		header = "302a300506032b656e032100"
	case encoding != "ecpoint":
		return raw, true
	case len(raw) != 1+2*file.row.size || raw[0] != 4:
		return nil, false // SubjectPublicKeyInfo of kmsd holds uncompressed points
	default:
		header = map[keyspec.Algorithm]string{
			keyspec.ECDHP256: "3059301306072a8648ce3d020106082a8648ce3d030107034200",
			keyspec.ECDHP384: "3076301006072a8648ce3d020106052b81040022036200",
			keyspec.ECDHP521: "30819b301006072a8648ce3d020106052b8104002303818600",
		}[file.row.Algorithm]
	}
	return append(unhex(t, header), raw...), true
}

func aeadVectors(t *testing.T, file *vectors) {
	n := 0
	for _, g := range file.TestGroups {
		if g.TagSize != 128 {
			continue
		}
		var row *Row
		switch {
		case file.name == "chacha20_poly1305":
			row = file.row
		case g.KeySize == 128:
			row = lookup(t, keyspec.AES128GCM)
		case g.KeySize == 256:
			row = lookup(t, keyspec.AES256GCM)
		default:
			continue
		}
		for i := range g.Tests {
			v := &g.Tests[i]
			key, err := row.Load(unhex(t, v.Key))
			if err != nil {
				t.Fatal(err)
			}
			nonce, plaintext, additional := unhex(t, v.IV), unhex(t, v.Msg), unhex(t, v.AAD)
			sealed := append(unhex(t, v.CT), unhex(t, v.Tag)...)
			if len(nonce) != key.AEAD().NonceSize() {
				continue // kmsd has no other nonces; the standard library panics
			}
			got, err := key.AEAD().Open(nil, nonce, sealed, additional)
			judge(t, v, err)
			if err == nil && !bytes.Equal(got, plaintext) {
				t.Errorf("vector %d: another plaintext", v.TCID)
			}
			if v.Result == "valid" && !bytes.Equal(key.AEAD().Seal(nil, nonce, plaintext, additional), sealed) {
				t.Errorf("vector %d: another ciphertext", v.TCID)
			}
			n++
		}
	}
	ran(t, n, 130)
}

func wrapVectors(t *testing.T, file *vectors) {
	for _, g := range file.TestGroups {
		for i := range g.Tests {
			v := &g.Tests[i]
			block, err := aes.NewCipher(unhex(t, v.Key))
			if err != nil {
				t.Fatal(err)
			}
			plaintext, wrapped := unhex(t, v.Msg), unhex(t, v.CT)
			wrap, unwrap := WrapKey, UnwrapKey
			if file.name == "aes_kwp" {
				wrap, unwrap = WrapPadded, UnwrapPadded
			}
			got, err := unwrap(nil, block, wrapped)
			judge(t, v, err)
			if err == nil && !bytes.Equal(got, plaintext) {
				t.Errorf("vector %d: another plaintext", v.TCID)
			}
			if v.Result == "valid" {
				if got, err := wrap(nil, block, plaintext); err != nil || !bytes.Equal(got, wrapped) {
					t.Errorf("vector %d: another wrapping, %v", v.TCID, err)
				}
			}
			if v.is("ShortKey") && err == nil {
				t.Errorf("vector %d: a wrapped key of one block is accepted (RFC 3394 section 2)", v.TCID)
			}
		}
	}
}

func macVectors(t *testing.T, file *vectors) {
	n := 0
	for _, g := range file.TestGroups {
		for i := range g.Tests {
			v := &g.Tests[i]
			// Vectors have keys of three lengths. kmsd's keys have one; HMAC itself is tried with all of them.
			key := &Key{row: file.row, secret: unhex(t, v.Key)}
			tag := unhex(t, v.Tag)
			if g.TagSize != file.row.hash.Size()*8 {
				got, err := key.MAC(nil, unhex(t, v.Msg))
				if err == nil && !bytes.Equal(got[:len(tag)], tag) {
					err = ErrVerification
				}
				judge(t, v, err)
				if key.VerifyMAC(unhex(t, v.Msg), tag) == nil {
					t.Errorf("vector %d: a truncated MAC is accepted", v.TCID)
				}
			} else {
				judge(t, v, key.VerifyMAC(unhex(t, v.Msg), tag))
			}
			n++
		}
	}
	ran(t, n, file.NumberOfTests)
}

func hkdfVectors(t *testing.T, file *vectors) {
	for _, g := range file.TestGroups {
		for i := range g.Tests {
			v := &g.Tests[i]
			got, err := HKDF(unhex(t, v.IKM), unhex(t, v.Salt), unhex(t, v.Info), v.Size)
			judge(t, v, err)
			if err == nil && hex.EncodeToString(got) != v.OKM {
				t.Errorf("vector %d: other bytes", v.TCID)
			}
		}
	}
}

// TestPSSSalts shows which salts are accepted, and that signatures made here have one as long as the hash.
func TestPSSSalts(t *testing.T) {
	key := fixed(t, keyspec.RSA2048)
	message := []byte("message")
	sig, err := key.Sign(nil, keyspec.RSAPSSSHA384, "", Input{Message: message})
	if err != nil {
		t.Fatal(err)
	}
	digest := sha512.Sum384(message)
	if err := rsa.VerifyPSS(&key.rsa.PublicKey, crypto.SHA384, digest[:], sig, &rsa.PSSOptions{SaltLength: 48}); err != nil {
		t.Error("the salt is not as long as the hash:", err)
	}
	short := sha256.Sum256(message)
	for _, salt := range []int{8, 32, 222} {
		sig, err := rsa.SignPSS(rand.Reader, key.rsa, crypto.SHA256, short[:], &rsa.PSSOptions{SaltLength: salt})
		if err != nil {
			t.Fatal(err)
		}
		if err := Verify(key.Public(), keyspec.RSAPSSSHA256, "", Input{Message: message}, sig); err != nil {
			t.Errorf("salt of %d bytes: %v", salt, err)
		}
	}
}
