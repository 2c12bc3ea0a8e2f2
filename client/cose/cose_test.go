package cose

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
	"errors"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/client/jose"
	"github.com/kmsd-project/kmsd/client/pkix"
)

// keyHolder signs with a key in this process.
type keyHolder struct{ key crypto.Signer }

func (h keyHolder) SignJWS(ctx context.Context, a jose.Algorithm, input []byte) ([]byte, error) {
	return jose.KeySigner{Signer: h.key}.SignJWS(ctx, a, input)
}

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.Join(strings.Fields(s), ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func ecKey(t testing.TB, curve elliptic.Curve, x, y []byte) *ecdsa.PublicKey {
	t.Helper()
	k, err := ecdsa.ParseUncompressedPublicKey(curve, slices.Concat([]byte{4}, x, y))
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func unbase64(t testing.TB, s string) []byte {
	t.Helper()
	b, err := base64.RawURLEncoding.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func p256(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// TestRFC9052 verifies the examples of RFC 9052 appendix C.2 and of the working group (cose-wg/Examples: ecdsa-sig-01 to -03,
// sign1-tests), and refuses those that have to fail.
func TestRFC9052(t *testing.T) {
	eleven := ecKey(t, elliptic.P256(), unbase64(t, "usWxHK2PmfnHKwXPS54m0kTcGJ90UiglWiGahtagnv8"), unbase64(t, "IBOL-C3BttVivg-lSreASjpkttcsz-1rb7btKLv8EX4"))
	p384 := ecKey(t, elliptic.P384(), unbase64(t, "kTJyP2KSsBBhnb4kjWmMF7WHVsY55xUPgb7k64rDcjatChoZ1nvjKmYmPh5STRKc"),
		unbase64(t, "mM0weMVU2DKsYDxDJkEP9hZiRZtB8fPfXbzINZj_fF7YQRynNWedHEyzAJOX2e8s"))
	bilbo := ecKey(t, elliptic.P521(), unbase64(t, "AHKZLLOsCOzz5cY97ewNUajB957y-C-U88c3v13nmGZx6sYl_oJXu9A5RkTKqjqvjyekWF-7ytDyRXYgCF5cj0Kt"),
		unbase64(t, "AdymlHvOiLxXkEhayXQnNCvDX4h9htZaCJN34kfmC6pV5OhQHiraVySsUdaQkAgDPrwQrJmbnX9cwlGfP-HqHZR1"))
	for _, v := range []struct {
		name, message string
		public        crypto.PublicKey
		err           error
	}{
		{"RFC 9052 C.2.1", `d28443a10126a10442313154546869732069732074686520636f6e74656e742e58408eb33e4ca31d1c465ab05aac34cc6b23d58fef5c083106c4
			d25a91aef0b0117e2af9a291aa32e14ab834dc56ed2a223444547e01f11d3b0916e5a4c345cacb36`, eleven, nil},
		{"ecdsa-sig-01", `D28445A201260300A10442313154546869732069732074686520636F6E74656E742E5840EAE868ECC176883766C5DC5BA5B8DCA25DAB3C2E56A551
			CE5705B793914348E172727F48461FABBBA2E343492DDECAC3983686250BC68E9F1A7A07D41225B59F`, eleven, nil},
		{"ecdsa-sig-02", `D28444A1013822A104445033383454546869732069732074686520636F6E74656E742E5860B8F85EFF78C88F5351CED2F1887B79B296490795594B
			62E41E22529BB90208B7D8CDDD4A46D0E9C986464D83D0A5D1EDF39B3E2C5750364230D0E8D76460D8808E76C83830FBBD1978CC174066EB437F178879
			79ECF027DCC9D51BAF6C4FD8C0`, p384, nil},
		{"ecdsa-sig-03", `D28444A1013823A104581E62696C626F2E62616767696E7340686F626269746F6E2E6578616D706C6554546869732069732074686520636F6E7465
			6E742E5884000F348009BADC7DA478150AA7FA06DFD812CDF826344F17C7330563573D8F97F7A966924C3D88B108907235476E3F6BEA9F3890027792B0
			F94E905C217227CF064E00A6BC6A5187D0DF9B1DB7675AECFC678CE4692A8121EB8170F3592A859D518FD3B823091AAB22E6C41EB97ED92127CE8C46DC
			C715A247CB78921FAD1E19133AFC30`, bilbo, nil},
		{"sign-pass-03, no tag", `8443A10126A10442313154546869732069732074686520636F6E74656E742E5840EAE868ECC176883766C5DC5BA5B8DCA25DAB3C2E56A5
			51CE5705B793914348E19F43D6C6BA654472DA301B645B293C9BA939295B97C4BDB847782BFF384C5794`, eleven, nil},
		{"sign-pass-01, algorithm not protected", `D28441A0A201260442313154546869732069732074686520636F6E74656E742E5840EAE868ECC176883766C5DC5B
			A5B8DCA25DAB3C2E56A551CE5705B793914348E11A02E5F0344BF2D4EE5C7FD75A68A9F5E0B3CC1F1FC1409C189566586FF9D610`, eleven, ErrFormat},
		{"sign-pass-02, external data", `D28443A10126A10442313154546869732069732074686520636F6E74656E742E5840EAE868ECC176883766C5DC5BA5B8DCA25D
			AB3C2E56A551CE5705B793914348E155388B10C4F1B59A6733EAB416870A945111A4B2FBDBEF33A77234B1DEFF2F9B`, eleven, ErrVerification},
		{"sign-fail-01, wrong tag", `D903E68443A10126A10442313154546869732069732074686520636F6E74656E742E5840EAE868ECC176883766C5DC5BA5B8DCA25D
			AB3C2E56A551CE5705B793914348E19F43D6C6BA654472DA301B645B293C9BA939295B97C4BDB847782BFF384C5794`, eleven, ErrFormat},
		{"sign-fail-03, changed algorithm", `D28445A1013903E6A10442313154546869732069732074686520636F6E74656E742E5840EAE868ECC176883766C5DC5BA5
			B8DCA25DAB3C2E56A551CE5705B793914348E19F43D6C6BA654472DA301B645B293C9BA939295B97C4BDB847782BFF384C5794`, eleven, ErrUnsupported},
		{"ecdsa-sig-01 with another key", `D28445A201260300A10442313154546869732069732074686520636F6E74656E742E5840EAE868ECC176883766C5DC5BA5B8
			DCA25DAB3C2E56A551CE5705B793914348E172727F48461FABBBA2E343492DDECAC3983686250BC68E9F1A7A07D41225B59F`, p384, ErrVerification},
	} {
		s, err := Parse(unhex(t, v.message))
		var got []byte
		if err == nil {
			got, err = s.Verify(v.public, nil)
		}
		if !errors.Is(err, v.err) || err == nil && string(got) != "This is the content." {
			t.Errorf("%s: %q, %v", v.name, got, err)
		}
		if v.name == "ecdsa-sig-01" && (s.Protected.ContentType != int64(0) || string(s.Unprotected.KeyID) != "11") {
			t.Errorf("headers %+v and %+v", s.Protected, s.Unprotected)
		}
	}
}

// exampleCWT is the token of RFC 8392 appendix A.3, and exampleKey the key of appendix A.2.3.
const exampleCWT = `d28443a10126a104524173796d6d657472696345434453413235365850a70175636f61703a2f2f61732e6578616d706c652e636f6d02656572696b77037818
	636f61703a2f2f6c696768742e6578616d706c652e636f6d041a5612aeb0051a5610d9f0061a5610d9f007420b7158405427c1ff28d23fbad1f29c4c7c6a555e
	601d6fa29f9179bc3d7438bacaca5acd08c8d4d4f96131680c429a01f85951ecee743a52b9b63632c57209120e1c9e30`

func exampleKey(t testing.TB) *ecdsa.PublicKey {
	return ecKey(t, elliptic.P256(), unhex(t, "143329cce7868e416927599cf65a34f3ce2ffda55a7eca69ed8919a394d42f0f"),
		unhex(t, "60f7f1a780d8a783bfb7a2dd6b2796e8128dbbcef9d3d168db9529971a36e7b9"))
}

// TestRFC8392 verifies the token of appendix A.3, with its tag and without, and writes the claims of appendix A.1.
func TestRFC8392(t *testing.T) {
	now := time.Unix(1443944944, 0)
	for _, prefix := range []string{"", "d83d"} {
		s, err := ParseCWT(unhex(t, prefix+exampleCWT))
		if err != nil {
			t.Fatal(err)
		}
		if string(s.Unprotected.KeyID) != "AsymmetricECDSA256" || s.Algorithm != jose.ES256 {
			t.Errorf("%+v, %+v", s, s.Unprotected)
		}
		c, err := s.VerifyCWT(exampleKey(t), Expect{Now: now, Issuer: "coap://as.example.com", Subject: "erikw", Audience: "coap://light.example.com"})
		if err != nil {
			t.Fatal(err)
		}
		want := &Claims{Issuer: "coap://as.example.com", Subject: "erikw", Audience: []string{"coap://light.example.com"},
			Expires: time.Unix(1444064944, 0).UTC(), NotBefore: now.UTC(), IssuedAt: now.UTC(), ID: []byte{0x0b, 0x71}}
		if !reflect.DeepEqual(c, want) {
			t.Errorf("%+v", c)
		}
		b, err := c.encode()
		if err != nil || !bytes.Contains(unhex(t, exampleCWT), b) {
			t.Errorf("%x, %v", b, err)
		}
	}
	// In the drafts, dates had a tag; a token of cose-wg/Examples still has it (CWT/A_3.json).
	s, err := ParseCWT(unhex(t, `D28447A20319FDE80126A05853A70175636F61703A2F2F61732E6578616D706C652E636F6D02656572696B77037818636F61703A2F2F6C69676874
		2E6578616D706C652E636F6D04C11A5612AEB005C11A5610D9F006C11A5610D9F007420B7158408CAAD9EBD60E5F41CD683771E8A02CADE07D894DD1CFAF3A23
		C6481546E78FEBC0C13E8F649096F347480DB3E8C16CDDC04116A3874CF0A4DA2F4CB2D67C8EB0`))
	if err != nil {
		t.Fatal(err)
	}
	key := ecKey(t, elliptic.P256(), unhex(t, "c4f9160fc22682991c59c4d96e8accc2da3cc7b7a9bc197c7c1e1bc6d0c1dc61"),
		unhex(t, "feb11ca73b028a10cf77d58a2dfdf2a11eab8ffeeeaaeeb03097ffee9f3ef2fc"))
	if _, err := s.Verify(key, nil); err != nil {
		t.Errorf("signature: %v", err)
	}
	if _, err := s.VerifyCWT(key, Expect{Now: now}); !errors.Is(err, ErrUnsupported) {
		t.Errorf("dates with a tag: %v", err)
	}
}

// TestAlgorithms makes messages of every kind with every algorithm, reads them again, and refuses them with other keys.
func TestAlgorithms(t *testing.T) {
	var holders []keyHolder
	for _, curve := range []elliptic.Curve{elliptic.P256(), elliptic.P384(), elliptic.P521()} {
		k, err := ecdsa.GenerateKey(curve, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		holders = append(holders, keyHolder{k})
	}
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	_, edKey, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	koblitz, err := ecdsa.GenerateKey(pkix.Secp256k1(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	holders = append(holders, keyHolder{rsaKey}, keyHolder{edKey}, keyHolder{koblitz})
	fits := map[jose.Algorithm]int{jose.ES256: 0, jose.ES384: 1, jose.ES512: 2, jose.EdDSA: 4, jose.ES256K: 5}
	sum := sha256.Sum256([]byte("leaf"))
	full := Header{ContentType: "application/x; a=b", KeyID: []byte("kid"), Chain: [][]byte{[]byte("leaf"), []byte("root")}, Thumbprint: sum[:], URL: "https://example.org/c",
		Extra: map[any]any{int64(-70000): []any{int64(1), "x", []byte{2}}, "name": map[any]any{"k": 1.5}}}
	for _, a := range algorithms {
		at, ok := fits[a]
		if !ok {
			at = 3
		}
		for _, payload := range []string{"", strings.Repeat("p", 300)} {
			for _, o := range []SignOptions{
				{}, {Detached: true}, {Protected: full}, {Protected: full, RFC9360: true}, {Unprotected: full}, {Unprotected: full, RFC9360: true},
				{Protected: Header{ContentType: int64(60), Chain: full.Chain[:1]}, Unprotected: Header{KeyID: full.KeyID}},
			} {
				o.Algorithm = a
				message, err := Sign(t.Context(), holders[at], []byte(payload), o)
				if err != nil {
					t.Fatalf("%s %+v: %v", a, o, err)
				}
				text := EncodeHex(message)
				if message, err = DecodeHex(strings.ToUpper(text)); err != nil || !strings.HasPrefix(text, "d284") {
					t.Fatal(text, err)
				}
				s, err := Parse(message)
				if err != nil {
					t.Fatalf("%s: %v", text, err)
				}
				if s.Algorithm != a || !reflect.DeepEqual(*s.Protected, o.Protected) || !reflect.DeepEqual(*s.Unprotected, o.Unprotected) || s.Detached != o.Detached {
					t.Errorf("%s %+v: got %+v, %+v", a, o, s.Protected, s.Unprotected)
				}
				var detached []byte
				if o.Detached {
					detached = []byte(payload)
				}
				for i, h := range holders {
					got, err := s.Verify(h.key.Public(), detached)
					if i == at && (err != nil || string(got) != payload) || i != at && !errors.Is(err, ErrVerification) {
						t.Errorf("%s with key %d: %v", a, i, err)
					}
				}
				if o.Detached {
					if _, err := s.Verify(holders[at].key.Public(), nil); !errors.Is(err, ErrFormat) {
						t.Errorf("detached without payload: %v", err)
					}
					if _, err := s.Verify(holders[at].key.Public(), []byte(payload+"x")); !errors.Is(err, ErrVerification) {
						t.Errorf("detached with another payload: %v", err)
					}
				} else if _, err := s.Verify(holders[at].key.Public(), []byte(payload)); !errors.Is(err, ErrFormat) {
					t.Errorf("attached with a payload: %v", err)
				}
			}
		}
	}
	for _, a := range []jose.Algorithm{"HS256", "none", ""} {
		if _, err := Sign(t.Context(), holders[0], nil, SignOptions{Algorithm: a}); !errors.Is(err, ErrUnsupported) {
			t.Errorf("algorithm %q: %v", a, err)
		}
	}
	if _, err := Parse(unhex(t, "d28444a101382ea04040")); !errors.Is(err, ErrFormat) {
		t.Errorf("no signature: %v", err)
	}
	if _, err := Parse(unhex(t, "d28444a101382fa0404100")); !errors.Is(err, ErrUnsupported) {
		t.Errorf("ML-DSA-44: %v", err)
	}
}

// TestFormsOfMOSIP looks at the bytes: the certificate hash is a bare byte string and the URL bare text, and with RFC9360 they
// are a pair and tagged.
func TestFormsOfMOSIP(t *testing.T) {
	k := keyHolder{p256(t)}
	sum := sha256.Sum256([]byte("leaf"))
	h := Header{Chain: [][]byte{[]byte("leaf")}, Thumbprint: sum[:], URL: "u"}
	for rfc, want := range map[bool]string{
		false: "a40126" + "182144" + "6c656166" + "18225820" + hex.EncodeToString(sum[:]) + "18236175",
		true:  "a40126" + "182144" + "6c656166" + "1822822f5820" + hex.EncodeToString(sum[:]) + "1823d8206175",
	} {
		message, err := Sign(t.Context(), k, []byte("x"), SignOptions{Algorithm: jose.ES256, Protected: h, RFC9360: rfc})
		if err != nil {
			t.Fatal(err)
		}
		s, err := Parse(message)
		if err != nil {
			t.Fatal(err)
		}
		if got := hex.EncodeToString(s.protected); got != want {
			t.Errorf("RFC9360 %v: %s, want %s", rfc, got, want)
		}
	}
}

func TestLeaf(t *testing.T) {
	k := keyHolder{p256(t)}
	sum := sha256.Sum256([]byte("leaf"))
	parse := func(der []byte) (*x509.Certificate, error) {
		if string(der) != "leaf" {
			return nil, errors.New("another")
		}
		return &x509.Certificate{Raw: der}, nil
	}
	chain, other := [][]byte{[]byte("leaf"), []byte("root")}, [][]byte{[]byte("other")}
	for i, v := range []struct {
		protected, unprotected Header
		some                   bool
		err                    error
	}{
		{Header{}, Header{}, false, nil},
		{Header{Chain: chain}, Header{}, true, nil},
		{Header{}, Header{Chain: chain, Thumbprint: sum[:]}, true, nil},
		{Header{Thumbprint: sum[:]}, Header{Chain: chain}, true, nil},
		{Header{Thumbprint: sum[:]}, Header{Chain: other}, false, ErrFormat},
		{Header{Chain: other}, Header{}, false, ErrFormat},
	} {
		message, err := Sign(t.Context(), k, nil, SignOptions{Algorithm: jose.ES256, Protected: v.protected, Unprotected: v.unprotected})
		if err != nil {
			t.Fatal(err)
		}
		s, err := Parse(message)
		if err != nil {
			t.Fatal(err)
		}
		c, err := s.Leaf(parse)
		if !errors.Is(err, v.err) || (c != nil) != v.some {
			t.Errorf("%d: %v, %v", i, c, err)
		}
	}
}

// TestEveryBit changes every bit of a message and of a token all of whose headers are protected.
func TestEveryBit(t *testing.T) {
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Unix(1800000000, 0)
	for a, key := range map[jose.Algorithm]crypto.Signer{jose.EdDSA: ed, jose.ES256: p256(t), jose.PS256: rsaKey} {
		o := SignOptions{Algorithm: a, Protected: Header{KeyID: []byte("kid"), URL: "u"}}
		message, err := Sign(t.Context(), keyHolder{key}, []byte("payload"), o)
		if err != nil {
			t.Fatal(err)
		}
		token, err := SignCWT(t.Context(), keyHolder{key}, &Claims{Issuer: "i", Expires: now.Add(time.Hour), Identity: []byte{1, 2}}, o)
		if err != nil {
			t.Fatal(err)
		}
		for _, v := range []struct {
			name   string
			b      []byte
			verify func(b []byte) error
		}{
			{"message", message, func(b []byte) error {
				s, err := Parse(b)
				if err == nil {
					_, err = s.Verify(key.Public(), nil)
				}
				return err
			}},
			{"token", token, func(b []byte) error {
				s, err := ParseCWT(b)
				if err == nil {
					_, err = s.VerifyCWT(key.Public(), Expect{Now: now})
				}
				return err
			}},
		} {
			if err := v.verify(v.b); err != nil {
				t.Fatalf("%s %s: %v", a, v.name, err)
			}
			for i := range 8 * len(v.b) {
				changed := slices.Clone(v.b)
				changed[i/8] ^= 1 << (i % 8)
				if v.verify(changed) == nil {
					t.Errorf("%s: bit %d of the %s", a, i, v.name)
				}
			}
			for i := range v.b {
				if v.verify(v.b[:i]) == nil {
					t.Errorf("%s: the first %d bytes of the %s", a, i, v.name)
				}
			}
			if err := v.verify(append(slices.Clone(v.b), 0)); !errors.Is(err, ErrFormat) {
				t.Errorf("%s: a byte more than the %s: %v", a, v.name, err)
			}
		}
	}
}

// TestRefused parses what is no message that two readers agree on. The protected header is given; the rest is the shortest.
func TestRefused(t *testing.T) {
	for _, v := range []struct {
		name, message string
		err           error
	}{
		{"control", "d28443a10126a0404100", nil},
		{"empty", "", ErrFormat},
		{"tag alone", "d2", ErrFormat},
		{"three items", "d28343a10126a040", ErrFormat},
		{"five items", "d28543a10126a040410000", ErrFormat},
		{"array of indefinite length", "d29f43a10126a0404100ff", ErrFormat},
		{"two tags", "d2d28443a10126a0404100", ErrFormat},
		{"a longer encoding of four", "d2980443a10126a0404100", ErrFormat},
		{"header of indefinite length", "d28444bf0126ffa0404100", ErrFormat},
		{"unprotected header of indefinite length", "d28443a10126bf0400ff404100", ErrFormat},
		{"payload of indefinite length", "d28443a10126a05f4100ff4100", ErrFormat},
		{"payload is text", "d28443a10126a0604100", ErrFormat},
		{"payload is undefined", "d28443a10126a0f74100", ErrFormat},
		{"payload has a tag", "d28443a10126a0d818404100", ErrFormat},
		{"signature is null", "d28443a10126a040f6", ErrFormat},
		{"protected header is null", "d284f6a0404100", ErrFormat},
		{"protected header is a map", "d284a10126a0404100", ErrFormat},
		{"protected header is empty", "d28440a0404100", ErrFormat},
		{"protected header is an array", "d28443820126a0404100", ErrFormat},
		{"protected header with more after it", "d28444a1012600a0404100", ErrFormat},
		{"unprotected header is null", "d28443a10126f6404100", ErrFormat},
		{"unprotected header is a byte string", "d28443a1012640404100", ErrFormat},
		{"algorithm twice", "d28445a201260126a0404100", ErrFormat},
		{"algorithm twice, encoded differently", "d28446a20126180126a0404100", ErrFormat},
		{"algorithm in both", "d28443a10126a10126404100", ErrFormat},
		{"kid in both", "d28447a20126044131a1044132404100", ErrFormat},
		{"unprotected kid twice", "d28443a10126a2044131044132404100", ErrFormat},
		{"key twice in a nested map", "d28443a10126a10aa201000101404100", ErrFormat},
		{"algorithm is text", "d28448a101654553323536a0404100", ErrUnsupported},
		{"algorithm is bytes", "d28444a1014126a0404100", ErrFormat},
		{"HMAC", "d28443a10105a0404100", ErrUnsupported},
		{"label is bytes", "d28443a10126a1410000404100", ErrFormat},
		{"label is a float", "d28443a10126a1f93c0000404100", ErrFormat},
		{"label beyond 63 bits", "d28443a10126a11bffffffffffffffff00404100", ErrFormat},
		{"label below 63 bits", "d28443a10126a13bffffffffffffffff00404100", ErrFormat},
		{"further value below 63 bits", "d28443a10126a10a3bffffffffffffffff404100", ErrFormat},
		{"kid is text", "d28443a10126a1046131404100", ErrFormat},
		{"kid is null", "d28443a10126a104f6404100", ErrFormat},
		{"content type is negative", "d28443a10126a10320404100", ErrFormat},
		{"content type is bytes", "d28443a10126a10340404100", ErrFormat},
		{"critical and understood", "d28449a30126028104044131a0404100", nil},
		{"critical and not understood", "d28448a3012602810a0a00a0404100", ErrUnsupported},
		{"critical, known to nobody", "d2844ca30126028162787862787800a0404100", ErrUnsupported},
		{"critical and absent", "d28446a20126028104a0404100", ErrFormat},
		{"critical and empty", "d28445a201260280a0404100", ErrFormat},
		{"critical and no array", "d28445a201260204a0404100", ErrFormat},
		{"critical and not protected", "d28443a10126a1028101404100", ErrFormat},
		{"empty chain", "d28443a10126a1182180404100", ErrFormat},
		{"chain of text", "d28443a10126a11821816161404100", ErrFormat},
		{"hash of another length", "d28443a10126a118224100404100", ErrFormat},
		{"pair of one", "d28443a10126a11822812f404100", ErrFormat},
		{"pair with SHA-384", "d28443a10126a1182282382a4100404100", ErrUnsupported},
		{"URL with another tag", "d28443a10126a11823d8216175404100", ErrUnsupported},
		{"URL is bytes", "d28443a10126a118234175404100", ErrFormat},
		{"a further label with a tag", "d28443a10126a10ac100404100", ErrUnsupported},
		{"invalid text", "d28443a10126a10a61ff404100", ErrFormat},
		{"nested too deeply", "d28443a10126a10a" + strings.Repeat("81", 40) + "00404100", ErrFormat},
		{"nested deeply", "d28443a10126a10a" + strings.Repeat("81", 20) + "00404100", nil},
		{"seventeen certificates", "d28443a10126a1182191" + strings.Repeat("4100", 17) + "404100", ErrFormat},
		{"too many items", "d28443a10126a10a991001" + strings.Repeat("00", 4097) + "404100", ErrFormat},
		{"promises more than it has", "d28443a10126a10a9affffffff404100", ErrFormat},
		{"large header", "d28443a10126a10a5a00020000" + strings.Repeat("00", 1<<17) + "404100", ErrTooLarge},
		{"large signature", "d28443a10126a040590401" + strings.Repeat("00", 1025), ErrTooLarge},
	} {
		b, err := hex.DecodeString(v.message)
		if err != nil {
			t.Fatalf("%s: %v", v.name, err)
		}
		if _, err := Parse(b); !errors.Is(err, v.err) || v.err == nil && err != nil || err != nil && len(err.Error()) > 300 {
			t.Errorf("%s: %v", v.name, err)
		}
	}
	if _, err := Parse(make([]byte, maxMessage+1)); !errors.Is(err, ErrTooLarge) {
		t.Error(err)
	}
	for _, text := range []string{"1", "zz", "0x12", "12 34"} {
		if _, err := DecodeHex(text); !errors.Is(err, ErrFormat) {
			t.Errorf("hexadecimal %q: %v", text, err)
		}
	}
}

// TestSignRefused makes nothing that could not be read again.
func TestSignRefused(t *testing.T) {
	k := keyHolder{p256(t)}
	for i, o := range []SignOptions{
		{Protected: Header{ContentType: 1}},
		{Protected: Header{ContentType: int64(-1)}},
		{Protected: Header{Thumbprint: []byte{1}}},
		{Protected: Header{Extra: map[any]any{int64(4): "kid"}}},
		{Protected: Header{Extra: map[any]any{1: "alg"}}},
		{Protected: Header{Extra: map[any]any{1.5: "float"}}},
		{Protected: Header{Extra: map[any]any{int64(2): []any{int64(1)}}}},
		{Protected: Header{Extra: map[any]any{"f": func() {}}}},
		{Protected: Header{Extra: map[any]any{"s": "\xff"}}},
		{Protected: Header{KeyID: []byte("a")}, Unprotected: Header{KeyID: []byte("b")}},
		{Protected: Header{Extra: map[any]any{10: 1, int64(10): 2}}},
	} {
		o.Algorithm = jose.ES256
		if _, err := Sign(t.Context(), k, nil, o); !errors.Is(err, ErrFormat) {
			t.Errorf("%d: %v", i, err)
		}
	}
	for i, o := range []SignOptions{
		{Protected: Header{Chain: make([][]byte, 17)}},
		{Protected: Header{KeyID: make([]byte, maxHeader)}},
	} {
		o.Algorithm = jose.ES256
		if _, err := Sign(t.Context(), k, nil, o); !errors.Is(err, ErrTooLarge) {
			t.Errorf("%d: %v", i, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	key := exampleKey(f)
	f.Add(unhex(f, exampleCWT))
	f.Add(unhex(f, "d28443a10126a0404100"))
	f.Add(unhex(f, "d28449a30126028104044131a118218241004101404100"))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := Parse(b)
		if err != nil {
			return
		}
		if s.Protected == nil || s.Unprotected == nil || len(s.signature) == 0 || s.Algorithm == "" {
			t.Fatalf("%+v", s)
		}
		if _, err := s.Verify(key, nil); err == nil && !bytes.Contains(unhex(t, exampleCWT), s.signature) {
			t.Fatal("verifies")
		}
		// What was read can be written and is the same again.
		o := SignOptions{Algorithm: s.Algorithm, Protected: *s.Protected, Unprotected: *s.Unprotected, Detached: s.Detached}
		again, err := Sign(t.Context(), fixedSignature(s.signature), s.payload, o)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Parse(again); err != nil {
			t.Fatal(err)
		}
	})
}

// fixedSignature is what this signer makes, whatever it signs.
type fixedSignature []byte

func (s fixedSignature) SignJWS(context.Context, jose.Algorithm, []byte) ([]byte, error) {
	return s, nil
}
