package jose

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/kmsd-project/kmsd/client/packet"
	"github.com/kmsd-project/kmsd/client/pkix"
	"github.com/kmsd-project/kmsd/kmsd/mechanism/wycheprooftest"
)

// keyHolder signs and unwraps with a key in this process.
type keyHolder struct {
	key        crypto.Signer
	thumbprint [32]byte
}

func (h *keyHolder) SignJWS(ctx context.Context, a Algorithm, input []byte) ([]byte, error) {
	return KeySigner{Signer: h.key}.SignJWS(ctx, a, input)
}

func (h *keyHolder) Unwrap(_ context.Context, thumbprint [32]byte, wrapped []byte) ([]byte, error) {
	h.thumbprint = thumbprint
	return rsa.DecryptOAEP(sha256.New(), nil, h.key.(*rsa.PrivateKey), wrapped, nil)
}

func readPEM(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(b)
	if block == nil {
		t.Fatalf("%s: no PEM", name)
	}
	return block.Bytes
}

func certificate(t testing.TB, name string) *x509.Certificate {
	t.Helper()
	c, err := packet.ParseCertificate(readPEM(t, name+".cert.pem"))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func vectors(t testing.TB) map[string]string {
	t.Helper()
	b, err := os.ReadFile("testdata/vectors.json")
	if err != nil {
		t.Fatal(err)
	}
	var v map[string]string
	if err := json.Unmarshal(b, &v); err != nil {
		t.Fatal(err)
	}
	return v
}

func baseKey(t testing.TB) *keyHolder {
	t.Helper()
	key, err := x509.ParsePKCS8PrivateKey(readPEM(t, "base.key.pem"))
	if err != nil {
		t.Fatal(err)
	}
	return &keyHolder{key: key.(crypto.Signer)}
}

// TestMOSIPSignatures verifies what a Java program has signed as MOSIP does.
func TestMOSIPSignatures(t *testing.T) {
	v := vectors(t)
	plaintext, err := hex.DecodeString(v["plaintext_hex"])
	if err != nil {
		t.Fatal(err)
	}
	for name, signer := range map[string]string{
		"jws_rs256": "module", "jws_ps256": "module", "jws_es256": "ec256", "jws_eddsa": "ed25519",
		"jws_rs256_detached": "module", "jws_ps256_b64false_detached": "module",
	} {
		c := certificate(t, signer)
		s, err := ParseSigned(v[name])
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		var detached []byte
		if s.Detached {
			detached = plaintext
		}
		got, err := s.Verify(c.PublicKey, detached)
		if err != nil || !bytes.Equal(got, plaintext) {
			t.Errorf("%s: %q, %v", name, got, err)
		}
		leaf, err := s.Header.Leaf(packet.ParseCertificate)
		if err != nil || !leaf.Equal(c) {
			t.Errorf("%s: x5c: %v", name, err)
		}
		if s.Header.KeyID == "" || s.Detached != strings.Contains(name, "detached") || s.Header.Unencoded != strings.Contains(name, "b64false") {
			t.Errorf("%s: header %+v", name, s.Header)
		}
		if _, err := s.Verify(certificate(t, "base").PublicKey, detached); !errors.Is(err, ErrVerification) {
			t.Errorf("%s with another key: %v", name, err)
		}
		if s.Detached {
			if _, err := s.Verify(c.PublicKey, append(plaintext, ' ')); !errors.Is(err, ErrVerification) {
				t.Errorf("%s over something else: %v", name, err)
			}
			if _, err := s.Verify(c.PublicKey, nil); !errors.Is(err, ErrFormat) {
				t.Errorf("%s over nothing: %v", name, err)
			}
		} else if _, err := s.Verify(c.PublicKey, plaintext); !errors.Is(err, ErrFormat) {
			t.Errorf("%s with a second payload: %v", name, err)
		}
	}
}

// TestRFC8037 verifies the example of appendix A.4, and TestRFC7515 that of appendix A.3.
func TestRFC8037(t *testing.T) {
	const token = "eyJhbGciOiJFZERTQSJ9.RXhhbXBsZSBvZiBFZDI1NTE5IHNpZ25pbmc.hgyY0il_MGCjP0JzlnLWG1PPOt7-09PGcvMg3AIbQR6dWbhijcNR4ki4iylGjg5BhVsPt9g7sVvpAr_MuM0KAg"
	x, err := base64.RawURLEncoding.DecodeString("11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo")
	if err != nil {
		t.Fatal(err)
	}
	s, err := ParseSigned(token)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := s.Verify(ed25519.PublicKey(x), nil); err != nil || string(got) != "Example of Ed25519 signing" {
		t.Errorf("%q, %v", got, err)
	}
}

func TestRFC7515(t *testing.T) {
	const token = "eyJhbGciOiJFUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ." +
		"DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q"
	key := jwk{Kty: "EC", Crv: "P-256", X: "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU", Y: "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"}
	s, err := ParseSigned(token)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Verify(key.public(t), nil); err != nil {
		t.Error(err)
	}
}

// TestOwnSignatures makes a token of every kind and reads it again.
func TestOwnSignatures(t *testing.T) {
	rsaKey := baseKey(t)
	holders := []*keyHolder{rsaKey}
	for _, curve := range []elliptic.Curve{elliptic.P256(), elliptic.P384(), elliptic.P521(), pkix.Secp256k1()} {
		k, err := ecdsa.GenerateKey(curve, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		holders = append(holders, &keyHolder{key: k})
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	holders = append(holders, &keyHolder{key: ed})
	chain := []*x509.Certificate{certificate(t, "base"), certificate(t, "module")}
	made := 0
	for _, h := range holders {
		for _, a := range []Algorithm{RS256, RS384, RS512, PS256, PS384, PS512, ES256, ES384, ES512, ES256K, EdDSA} {
			if !a.fits(h.key.Public()) {
				continue
			}
			for _, payload := range []string{"plain text", `{"a":"é"}`, "with.dots", ""} {
				for _, o := range []SignOptions{
					{}, {Detached: true}, {Unencoded: true}, {Unencoded: true, Detached: true}, {Unencoded: true, EncodedAnyway: true},
					{KeyID: "k<1>", Chain: chain, Include: 2, Thumbprint: true, URL: "https://example.org/c", Type: "JWT", Extra: map[string]any{"x": 1.0, "a": []any{"b"}}},
				} {
					o.Algorithm = a
					token, err := Sign(t.Context(), h, []byte(payload), o)
					if o.Unencoded && !o.Detached && !o.EncodedAnyway && !printable([]byte(payload)) {
						if !errors.Is(err, ErrFormat) {
							t.Errorf("%s, %q unencoded and attached: %v", a, payload, err)
						}
						continue
					}
					if err != nil {
						t.Fatalf("%s %+v: %v", a, o, err)
					}
					s, err := ParseSigned(token)
					if err != nil {
						t.Fatalf("%s: %v", token, err)
					}
					var detached []byte
					if s.Detached {
						detached = []byte(payload)
						if detached == nil {
							detached = []byte{}
						}
					}
					got, err := s.Verify(h.key.Public(), detached)
					if err != nil || string(got) != payload {
						t.Errorf("%s %+v: %q, %v", a, o, got, err)
					}
					if s.Header.KeyID != o.KeyID || len(s.Header.Chain) != o.Include || len(s.Header.Extra) != len(o.Extra) {
						t.Errorf("header %+v of %+v", s.Header, o)
					}
					made++
				}
			}
		}
		a, err := AlgorithmFor(h.key.Public())
		if err != nil || !a.fits(h.key.Public()) {
			t.Errorf("algorithm %q, %v", a, err)
		}
	}
	if made < 150 {
		t.Errorf("only %d tokens were made", made)
	}
}

// TestEncodedAnyway reads the form of MOSIP's jwsSign: b64 is false, and the payload is in base64url all the same.
func TestEncodedAnyway(t *testing.T) {
	h := baseKey(t)
	payload := "{\"a\": \"\xff\x00.\"}" // bytes that cannot stand in a token as they are
	token, err := Sign(t.Context(), h, []byte(payload), SignOptions{Algorithm: PS256, Unencoded: true, EncodedAnyway: true})
	if err != nil {
		t.Fatal(err)
	}
	parts := strings.Split(token, ".")
	if parts[1] != base64.RawURLEncoding.EncodeToString([]byte(payload)) {
		t.Errorf("payload %q", parts[1])
	}
	header, err := base64.RawURLEncoding.DecodeString(parts[0])
	if err != nil || !strings.Contains(string(header), `"b64":false`) || !strings.Contains(string(header), `"crit":["b64"]`) {
		t.Errorf("header %s, %v", header, err)
	}
	verify := func(token string) ([]byte, error) {
		s, err := ParseSigned(token)
		if err != nil {
			return nil, err
		}
		return s.Verify(h.key.Public(), nil)
	}
	if got, err := verify(token); err != nil || string(got) != payload {
		t.Errorf("%q, %v", got, err)
	}
	for _, other := range []string{parts[1] + "A", parts[1][:8], "", strings.ToUpper(parts[1]), "e30", payload[:6]} {
		if got, err := verify(parts[0] + "." + other + "." + parts[2]); err == nil {
			t.Errorf("with %q: %q", other, got)
		}
	}
	// What was signed as text is that text, even if it looks like base64url.
	token, err = Sign(t.Context(), h, []byte("e30"), SignOptions{Algorithm: PS256, Unencoded: true})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := verify(token); err != nil || string(got) != "e30" {
		t.Errorf("%q, %v", got, err)
	}
	if _, err := Sign(t.Context(), h, []byte("x"), SignOptions{Algorithm: PS256, EncodedAnyway: true}); !errors.Is(err, ErrFormat) {
		t.Errorf("encoded anyway, and so or so: %v", err)
	}
}

// TestHeaders refuses headers that two readers might understand differently.
func TestHeaders(t *testing.T) {
	for _, header := range []string{
		``, `{}`, `[]`, `null`, `1`, `{"alg":"ES256"}{}`, `{"alg":"ES256"} x`, `{"alg":1}`, `{"alg":null}`, `{"alg":"ES256","alg":"RS256"}`,
		`{"alg":"ES256","x":{"a":1,"a":2}}`, `{"alg":"ES256","crit":[]}`, `{"alg":"ES256","crit":["exp"]}`, `{"alg":"ES256","b64":false}`,
		`{"alg":"ES256","crit":["b64"]}`, `{"alg":"ES256","b64":true,"crit":["b64","b64"]}`, `{"alg":"ES256","x5c":[]}`, "{\"alg\":\"ES256\",\"x\":\"\xff\"}",
		`{"alg":"ES256","x5c":["-_"]}`, `{"alg":"ES256","x5c":"a"}`, `{"alg":"ES256","x5t#S256":"AA"}`,
		`{"alg":"ES256","x":` + strings.Repeat("[", 40) + strings.Repeat("]", 40) + `}`, `{"alg":"ES256","x":"` + strings.Repeat("a", maxHeader) + `"}`,
	} {
		token := base64.RawURLEncoding.EncodeToString([]byte(header)) + ".YQ.YQ"
		if _, err := ParseSigned(token); !errors.Is(err, ErrFormat) && !errors.Is(err, ErrUnsupported) && !errors.Is(err, ErrTooLarge) {
			t.Errorf("%.60s: %v", header, err)
		}
	}
	for _, extra := range []map[string]any{{"alg": "none"}, {"": 1}, {"crit": []string{"x"}}, {"x": func() {}}} {
		if _, err := Sign(t.Context(), baseKey(t), []byte("x"), SignOptions{Algorithm: RS256, Extra: extra}); !errors.Is(err, ErrFormat) {
			t.Errorf("%v: %v", extra, err)
		}
	}
	for _, a := range []Algorithm{"none", "HS256", ""} {
		if _, err := Sign(t.Context(), baseKey(t), []byte("x"), SignOptions{Algorithm: a}); !errors.Is(err, ErrUnsupported) {
			t.Errorf("%q: %v", a, err)
		}
	}
	if err := CheckJSON([]byte(`{"a":[{"b":1},{"b":2}],"c":null}`)); err != nil {
		t.Error(err)
	}
}

// TestMOSIPEncryption decrypts what a Java program has encrypted as MOSIP does, and what this package has.
func TestMOSIPEncryption(t *testing.T) {
	v, h, c := vectors(t), baseKey(t), certificate(t, "base")
	plaintext, err := hex.DecodeString(v["plaintext_hex"])
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"jwe_zip", "jwe_plain"} {
		got, header, err := Decrypt(t.Context(), h, v[name])
		if err != nil || !bytes.Equal(got, plaintext) {
			t.Errorf("%s: %q, %v", name, got, err)
			continue
		}
		if h.thumbprint != packet.Thumbprint(c) || header.Content != "JWT" || (header.Zip == "DEF") != (name == "jwe_zip") {
			t.Errorf("%s: %x, %+v", name, h.thumbprint, header)
		}
	}
	for _, o := range []EncryptOptions{{}, {Plain: true}, {IncludeCertificate: true, Thumbprint: true, KeySetURL: "https://example.org/k", Type: "JOSE", Content: "json"}} {
		token, err := Encrypt(c, plaintext, o)
		if err != nil {
			t.Fatal(err)
		}
		got, header, err := Decrypt(t.Context(), h, token)
		if err != nil || !bytes.Equal(got, plaintext) || h.thumbprint != packet.Thumbprint(c) {
			t.Errorf("%+v: %q, %v", o, got, err)
		}
		if leaf, err := header.Leaf(packet.ParseCertificate); err != nil || o.IncludeCertificate != (leaf != nil) {
			t.Errorf("%+v: %v, %v", o, leaf, err)
		}
		for i := range token {
			changed := []byte(token)
			changed[i] ^= 4
			if changed[i] == '.' || token[i] == '.' {
				continue
			}
			if _, _, err := Decrypt(t.Context(), h, string(changed)); err == nil {
				t.Fatalf("opens with byte %d changed", i)
			}
			if i > 200 {
				break // the rest is covered by what is authenticated
			}
		}
	}
	if _, err := Encrypt(certificate(t, "ec256"), plaintext, EncryptOptions{}); !errors.Is(err, ErrUnsupported) {
		t.Errorf("to an EC key: %v", err)
	}
}

// TestCompressionBomb refuses a small token with a large payload.
func TestCompressionBomb(t *testing.T) {
	token, err := Encrypt(certificate(t, "base"), make([]byte, 40<<20), EncryptOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := Decrypt(t.Context(), baseKey(t), token); !errors.Is(err, ErrTooLarge) {
		t.Errorf("a token of %d bytes: %v", len(token), err)
	}
}

type jwk struct {
	Kty, Alg, Kid, Use, Crv, X, Y, N, E, D, P, Q string
	KeyOps                                       []string `json:"key_ops"`
}

// verifies reports whether the key is said to be for verifying tokens with the algorithm. In kmsd a key has its algorithm and
// usages from its creation, so this is for the caller of the package.
func (k jwk) verifies(algorithm string) bool {
	switch {
	case k.Use != "" && k.Use != "sig", len(k.KeyOps) > 0 && !slices.Contains(k.KeyOps, "verify"):
		return false
	case k.Alg == "", k.Alg == "ES521": // which does not exist
		return true
	case k.Kid == "bilbo.baggins@hobbiton.example": // RFC 7520 section 4.2 signs with PS384, the vectors' key says PS256
		return true
	}
	return k.Alg == algorithm
}

func number(t testing.TB, s string) *big.Int {
	t.Helper()
	b, err := base64.RawURLEncoding.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return new(big.Int).SetBytes(b)
}

func (k jwk) public(t testing.TB) crypto.PublicKey {
	t.Helper()
	switch k.Kty {
	case "RSA":
		return &rsa.PublicKey{N: number(t, k.N), E: int(number(t, k.E).Int64())}
	case "EC":
		curve := map[string]elliptic.Curve{"P-256": elliptic.P256(), "P-384": elliptic.P384(), "P-521": elliptic.P521()}[k.Crv]
		if curve == nil {
			return nil
		}
		size := (curve.Params().BitSize + 7) / 8
		point := append([]byte{4}, number(t, k.X).FillBytes(make([]byte, size))...)
		key, err := ecdsa.ParseUncompressedPublicKey(curve, append(point, number(t, k.Y).FillBytes(make([]byte, size))...))
		if err != nil {
			t.Fatal(err)
		}
		return key
	}
	return nil
}

func (k jwk) private(t testing.TB) *rsa.PrivateKey {
	t.Helper()
	key := &rsa.PrivateKey{PublicKey: *k.public(t).(*rsa.PublicKey), D: number(t, k.D), Primes: []*big.Int{number(t, k.P), number(t, k.Q)}}
	key.Precompute()
	return key
}

func TestWycheproofSignatures(t *testing.T) {
	var file struct {
		TestGroups []struct {
			Public jwk
			Tests  []struct {
				TcID    int
				Comment string
				JWS     any
				Result  string
			}
		}
	}
	wycheprooftest.Read(t, "json_web_signature_test.json", &file)
	valid, invalid := 0, 0
	for _, g := range file.TestGroups {
		if g.Public.Kty != "RSA" && g.Public.Kty != "EC" {
			continue // HMAC does not exist here
		}
		public := g.Public.public(t)
		for _, test := range g.Tests {
			token, ok := test.JWS.(string)
			s, err := ParseSigned(token)
			if ok && err == nil {
				var detached []byte
				if s.Detached {
					detached = []byte{} // the payload is empty
				}
				if err = ErrVerification; g.Public.verifies(s.Header.Algorithm) {
					_, err = s.Verify(public, detached)
				}
			}
			switch accepted := ok && err == nil; {
			case accepted && test.Result == "invalid":
				t.Errorf("test %d (%s) is accepted", test.TcID, test.Comment)
			case !accepted && test.Result == "valid":
				t.Errorf("test %d (%s) is refused: %v", test.TcID, test.Comment, err)
			case accepted:
				valid++
			default:
				invalid++
			}
		}
	}
	if valid < 20 || invalid < 200 {
		t.Errorf("only %d valid and %d invalid vectors", valid, invalid)
	}
}

func TestWycheproofEncryption(t *testing.T) {
	var file struct {
		TestGroups []struct {
			Private jwk
			Tests   []struct {
				TcID             int
				Comment, Enc, PT string
				JWE              any
				Result           string
			}
		}
	}
	wycheprooftest.Read(t, "json_web_encryption_test.json", &file)
	valid, invalid := 0, 0
	for _, g := range file.TestGroups {
		if g.Private.Kty != "RSA" || g.Private.Alg != algOAEP {
			continue
		}
		h := &keyHolder{key: g.Private.private(t)}
		for _, test := range g.Tests {
			token, ok := test.JWE.(string)
			if !ok {
				continue
			}
			got, _, err := Decrypt(t.Context(), h, token)
			switch {
			case err == nil && (test.Result == "invalid" || hex.EncodeToString(got) != test.PT):
				t.Errorf("test %d (%s) is accepted: %x", test.TcID, test.Comment, got)
			case err == nil:
				valid++
			case test.Result == "valid" && !errors.Is(err, ErrUnsupported): // other content encryptions
				t.Errorf("test %d (%s) is refused: %v", test.TcID, test.Comment, err)
			default:
				invalid++
			}
		}
	}
	if valid+invalid < 15 {
		t.Errorf("only %d valid and %d invalid vectors", valid, invalid)
	}
	t.Logf("%d valid, %d invalid or unsupported", valid, invalid)
}

func FuzzParseSigned(f *testing.F) {
	for name, token := range vectors(f) {
		if strings.HasPrefix(name, "jws") {
			f.Add(token)
		}
	}
	f.Add("..")
	public := certificate(f, "module").PublicKey
	f.Fuzz(func(t *testing.T, token string) {
		s, err := ParseSigned(token)
		if err != nil {
			return
		}
		s.Verify(public, nil)
		s.Header.Leaf(packet.ParseCertificate)
		if b, err := s.Header.encode(); err == nil {
			if _, err := decodeHeader(b); err != nil {
				t.Errorf("%s is not read again: %v", b, err)
			}
		}
	})
}

func FuzzDecrypt(f *testing.F) {
	for name, token := range vectors(f) {
		if strings.HasPrefix(name, "jwe") {
			f.Add(token)
		}
	}
	f.Add("....")
	f.Fuzz(func(t *testing.T, token string) {
		if _, _, err := Decrypt(t.Context(), noKey{}, token); err == nil {
			t.Error("decrypted without a key")
		}
	})
}

type noKey struct{}

func (noKey) Unwrap(context.Context, [32]byte, []byte) ([]byte, error) {
	return make([]byte, keySize), nil
}
