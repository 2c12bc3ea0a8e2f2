package client_test

import (
	"bufio"
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
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/base64"
	"fmt"
	"io"
	"math/big"
	mrand "math/rand/v2"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/client/cose"
	"github.com/kmsd-project/kmsd/client/jose"
	"github.com/kmsd-project/kmsd/client/packet"
	kpkix "github.com/kmsd-project/kmsd/client/pkix"
)

// javaSide is the independent implementation of the formats: testdata/java/Formats.java in a process of its own.
type javaSide struct {
	t   *testing.T
	in  io.Writer
	out *bufio.Reader
}

func startJava(t *testing.T) *javaSide {
	t.Helper()
	command := exec.CommandContext(t.Context(), "java", "-cp", "/usr/share/java/bcprov.jar",
		filepath.Join("testdata", "java", "Formats.java"))
	in, err := command.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := command.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var complaints bytes.Buffer
	command.Stderr = &complaints
	if err := command.Start(); err != nil {
		t.Fatalf("the formats are tested against Java: make test-packages: %v", err)
	}
	t.Cleanup(func() {
		in.Close()
		if err := command.Wait(); err != nil && t.Context().Err() == nil {
			t.Errorf("java: %v\n%s", err, complaints.Bytes())
		}
	})
	return &javaSide{t, in, bufio.NewReaderSize(out, 1<<20)}
}

// ask carries out one operation in Java.
func (j *javaSide) ask(op string, arguments ...[]byte) ([][]byte, error) {
	j.t.Helper()
	line := []byte(op)
	for _, a := range arguments {
		line = append(line, ' ')
		line = base64.RawURLEncoding.AppendEncode(line, a)
	}
	if _, err := j.in.Write(append(line, '\n')); err != nil {
		j.t.Fatal(err)
	}
	answer, err := j.out.ReadString('\n')
	if err != nil {
		j.t.Fatalf("java has gone: %v", err)
	}
	words := strings.Split(strings.TrimSuffix(answer, "\n"), " ")
	if words[0] != "ok" {
		return nil, fmt.Errorf("java: %s", strings.TrimSpace(answer))
	}
	var results [][]byte
	for _, w := range words[1:] {
		b, err := base64.RawURLEncoding.DecodeString(w)
		if err != nil {
			j.t.Fatal(err)
		}
		results = append(results, b)
	}
	return results, nil
}

// must is ask for what has to succeed.
func (j *javaSide) must(op string, arguments ...[]byte) []byte {
	j.t.Helper()
	results, err := j.ask(op, arguments...)
	if err != nil {
		j.t.Fatalf("%s: %v", op, err)
	}
	return results[0]
}

// gives checks that Java reads what was made here.
func (j *javaSide) gives(want []byte, op string, arguments ...[]byte) {
	j.t.Helper()
	if got := j.must(op, arguments...); !bytes.Equal(got, want) {
		j.t.Fatalf("%s: Java has %.80q, want %.80q", op, got, want)
	}
}

// refuses checks that Java does not read it.
func (j *javaSide) refuses(op string, arguments ...[]byte) {
	j.t.Helper()
	if got, err := j.ask(op, arguments...); err == nil && string(got[0]) != "false" {
		j.t.Fatalf("%s: Java has read it: %.80q", op, got[0])
	}
}

// local is a key in this process with a certificate.
type local struct {
	key         crypto.Signer
	pkcs8, spki []byte
	certificate *x509.Certificate
}

func newLocal(t *testing.T, key crypto.Signer, usage x509.KeyUsage) *local {
	t.Helper()
	l := &local{key: key}
	var err error
	if k, ok := key.(*ecdsa.PrivateKey); ok && kpkix.IsSecp256k1(&k.PublicKey) {
		l.pkcs8 = koblitzPKCS8(t, k)
		if l.spki, err = kpkix.MarshalPublicKey(&k.PublicKey); err != nil {
			t.Fatal(err)
		}
		return l // crypto/x509 makes no certificate of it
	}
	if l.pkcs8, err = x509.MarshalPKCS8PrivateKey(key); err != nil {
		t.Fatal(err)
	}
	if l.spki, err = x509.MarshalPKIXPublicKey(key.Public()); err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(mrand.Int64()), Subject: pkix.Name{CommonName: "test"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: usage,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	if l.certificate, err = packet.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	return l
}

// koblitzPKCS8 is the PKCS #8 of a key on secp256k1, which crypto/x509 does not write.
func koblitzPKCS8(t *testing.T, k *ecdsa.PrivateKey) []byte {
	t.Helper()
	type ec struct {
		Version int
		Key     []byte
	}
	type algorithm struct{ Algorithm, Curve asn1.ObjectIdentifier }
	//lint:ignore SA1019 there is no other way to the number of a key on this curve
	inner, err := asn1.Marshal(ec{1, k.D.FillBytes(make([]byte, 32))})
	if err != nil {
		t.Fatal(err)
	}
	outer, err := asn1.Marshal(struct {
		Version   int
		Algorithm algorithm
		Key       []byte
	}{0, algorithm{asn1.ObjectIdentifier{1, 2, 840, 10045, 2, 1}, asn1.ObjectIdentifier{1, 3, 132, 0, 10}}, inner})
	if err != nil {
		t.Fatal(err)
	}
	return outer
}

func (l *local) der() []byte {
	if l.certificate == nil {
		return nil
	}
	return l.certificate.Raw
}

// SignJWS makes it a jose.Signer.
func (l *local) SignJWS(ctx context.Context, a jose.Algorithm, input []byte) ([]byte, error) {
	return jose.KeySigner{Signer: l.key}.SignJWS(ctx, a, input)
}

// Unwrap makes it a packet.Unwrapper and a jose.Unwrapper.
func (l *local) Unwrap(_ context.Context, thumbprint [32]byte, wrapped []byte) ([]byte, error) {
	if thumbprint != [32]byte{} && thumbprint != packet.Thumbprint(l.certificate) {
		return nil, fmt.Errorf("thumbprint %x of another certificate", thumbprint)
	}
	return rsa.DecryptOAEP(sha256.New(), nil, l.key.(*rsa.PrivateKey), wrapped, nil)
}

// DecryptBlock makes it a packet.ClientKey.
func (l *local) DecryptBlock(_ context.Context, p packet.Padding, block []byte) ([]byte, error) {
	options, err := p.Options()
	if err != nil {
		return nil, err
	}
	return l.key.(*rsa.PrivateKey).Decrypt(nil, block, options)
}

func someBytes(n int) []byte {
	b := make([]byte, n)
	rand.Read(b)
	return b
}

// someText is text of n characters, some of which take more than a byte.
func someText(n int) string {
	characters := []rune("abcXYZ 019\n\"\\{}é漢😀")
	s := make([]rune, n)
	for i := range s {
		s[i] = characters[mrand.IntN(len(characters))]
	}
	return string(s)
}

// bent returns b with one bit changed.
func bent(b []byte) []byte {
	b = bytes.Clone(b)
	b[mrand.IntN(len(b))] ^= 1 << mrand.IntN(8)
	return b
}

func same(t *testing.T, what string, got, want []byte, err error) {
	t.Helper()
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("%s: %.80q, %v, want %.80q", what, got, err, want)
	}
}

func rounds() int {
	if testing.Short() {
		return 1
	}
	return 4
}

// TestFormatsAgainstJava makes fresh material in every format here and has Java read it, and the other way round.
func TestFormatsAgainstJava(t *testing.T) {
	j := startJava(t)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	base := newLocal(t, rsaKey, x509.KeyUsageKeyEncipherment)
	t.Run("payloads", func(t *testing.T) { j.t = t; testPayloads(t, j, base) })
	t.Run("others", func(t *testing.T) { j.t = t; testOtherFormats(t, j, base) })
	t.Run("jwe", func(t *testing.T) { j.t = t; testJWE(t, j, base) })
	j.t = t
	signing := newLocal(t, rsaKey, x509.KeyUsageDigitalSignature)
	keys := map[jose.Algorithm]*local{}
	for _, a := range []jose.Algorithm{jose.RS256, jose.RS384, jose.RS512, jose.PS256, jose.PS384, jose.PS512} {
		keys[a] = signing
	}
	for a, curve := range map[jose.Algorithm]elliptic.Curve{jose.ES256: elliptic.P256(), jose.ES384: elliptic.P384(), jose.ES512: elliptic.P521(), jose.ES256K: kpkix.Secp256k1()} {
		k, err := ecdsa.GenerateKey(curve, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		keys[a] = newLocal(t, k, x509.KeyUsageDigitalSignature)
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	keys[jose.EdDSA] = newLocal(t, ed, x509.KeyUsageDigitalSignature)
	for a, k := range keys {
		t.Run(string(a), func(t *testing.T) {
			j.t = t
			testTokens(t, j, a, k)
			testMessages(t, j, a, k)
		})
	}
	j.t = t
}

func testPayloads(t *testing.T, j *javaSide, base *local) {
	for round := range rounds() {
		n := 1 + mrand.IntN(3000)
		if round == 0 {
			n = 300_000 // several pieces of a stream
		}
		data, aad, salt := someBytes(n), someBytes(1+mrand.IntN(60)), someBytes([]int{12, 16, 1, 32}[mrand.IntN(4)])
		for kind, o := range map[string]packet.Options{
			"ver2": {}, "aad": {AAD: aad}, "salt": {Salt: salt}, "salt and aad": {Salt: salt, AAD: aad}, "113 aad": {AAD: aad}, "113 salt": {Salt: salt, AAD: aad}, "113": {},
		} {
			theirs := j.must("payload_encrypt", []byte(strings.ReplaceAll(kind, " ", "_")), base.der(), data, o.AAD, o.Salt)
			got, err := packet.DecryptPayload(t.Context(), base, theirs, o)
			same(t, "payload "+kind, got, data, err)
			var out bytes.Buffer
			err = packet.DecryptPayloadTo(t.Context(), base, &out, bytes.NewReader(theirs), int64(len(theirs)), o)
			same(t, "stream of payload "+kind, out.Bytes(), data, err)
			if strings.HasPrefix(kind, "113") { // which is read only
				continue
			}
			ours, err := packet.EncryptPayload(base.certificate, data, o)
			if err != nil {
				t.Fatal(err)
			}
			j.gives(data, "payload_decrypt", base.pkcs8, ours, o.AAD, o.Salt)
			out.Reset()
			if err := packet.EncryptPayloadTo(&out, base.certificate, bytes.NewReader(data), o); err != nil {
				t.Fatal(err)
			}
			j.gives(data, "payload_decrypt", base.pkcs8, out.Bytes(), o.AAD, o.Salt)
		}
		theirs := j.must("packet_encrypt", base.der(), data)
		got, err := packet.Decrypt(t.Context(), base, bytes.Clone(theirs))
		same(t, "packet", got, data, err)
		var out bytes.Buffer
		err = packet.DecryptTo(t.Context(), base, &out, bytes.NewReader(theirs), int64(len(theirs)))
		same(t, "stream of a packet", out.Bytes(), data, err)
		out.Reset()
		if err := packet.EncryptTo(&out, base.certificate, bytes.NewReader(data)); err != nil {
			t.Fatal(err)
		}
		j.gives(data, "packet_decrypt", base.pkcs8, out.Bytes())
		ours, err := packet.Encrypt(base.certificate, bytes.NewReader(data), int64(len(data)))
		if err != nil {
			t.Fatal(err)
		}
		j.gives(data, "packet_decrypt", base.pkcs8, ours)
	}
}

func testOtherFormats(t *testing.T, j *javaSide, base *local) {
	for range rounds() {
		// Private keys at rest.
		secret := someBytes(1 + mrand.IntN(4000))
		got, err := packet.UnwrapPrivateKey(t.Context(), base, j.must("key_wrap", base.der(), secret))
		same(t, "key at rest", got, secret, err)
		wrapped, err := packet.WrapPrivateKey(base.key.Public().(*rsa.PublicKey), secret)
		if err != nil {
			t.Fatal(err)
		}
		j.gives(secret, "key_unwrap", base.pkcs8, wrapped)

		// PIN: text of any language.
		pin, text, iterations := someText(1+mrand.IntN(12)), []byte(someText(1+mrand.IntN(300))), 1+mrand.IntN(3000)
		got, err = packet.DecryptWithPIN([]byte(pin), j.must("pin_encrypt", []byte(pin), text, []byte(strconv.Itoa(iterations))), iterations)
		same(t, "PIN", got, text, err)
		sealed, err := packet.EncryptWithPIN([]byte(pin), text, iterations)
		if err != nil {
			t.Fatal(err)
		}
		j.gives(text, "pin_decrypt", []byte(pin), sealed, []byte(strconv.Itoa(iterations)))
		j.refuses("pin_decrypt", []byte(pin), sealed, []byte(strconv.Itoa(iterations+1)))

		// Data for a registration machine, today's layout and that of 1.1.4.4, and single blocks (db.conf).
		for _, padding := range []packet.Padding{packet.PaddingFile, packet.PaddingTPM, packet.PaddingAndroid} {
			for _, layout := range []string{"new", "old"} {
				got, err := packet.DecryptForClient(t.Context(), base, padding, j.must("client_encrypt", base.der(), []byte(padding), secret, []byte(layout)))
				same(t, layout+" client data, "+string(padding), got, secret, err)
			}
			public := base.key.Public().(*rsa.PublicKey)
			sealed, err := packet.EncryptForClient(public, padding, secret)
			if err != nil {
				t.Fatal(err)
			}
			j.gives(secret, "client_decrypt", base.pkcs8, []byte(padding), sealed)
			block := secret[:min(190, len(secret))]
			got, err := base.DecryptBlock(t.Context(), padding, j.must("block_encrypt", base.der(), []byte(padding), block))
			same(t, "block, "+string(padding), got, block, err)
			if sealed, err = packet.EncryptClientBlock(public, padding, block); err != nil {
				t.Fatal(err)
			}
			j.gives(block, "block_decrypt", base.pkcs8, []byte(padding), sealed)
		}

		// Zero knowledge.
		random, master, id, index := [32]byte(someBytes(32)), [32]byte(someBytes(32)), someText(1+mrand.IntN(20)), uint32(mrand.IntN(1<<19))
		theirs := j.must("zk_encrypt", random[:], []byte(strconv.Itoa(int(index))), []byte(id), text)
		n, err := packet.AttributeIndex(theirs)
		if err != nil || n != index {
			t.Fatalf("index %d, %v, want %d", n, err, index)
		}
		got, err = packet.DecryptAttribute(random, id, theirs)
		same(t, "attribute", got, text, err)
		attribute, err := packet.EncryptAttribute(random, index, id, text)
		if err != nil {
			t.Fatal(err)
		}
		results, err := j.ask("zk_decrypt", random[:], []byte(id), attribute)
		if err != nil || string(results[0]) != strconv.Itoa(int(index)) || !bytes.Equal(results[1], text) {
			t.Fatalf("attribute: %q, %v", results, err)
		}
		inStore, err := packet.WrapRandomKey(master, random)
		if err != nil {
			t.Fatal(err)
		}
		j.gives(inStore[:], "zk_wrap", master[:], random[:])
		j.gives(random[:], "zk_unwrap", master[:], inStore[:])
		part, err := packet.SealRandomKey(base.certificate, random)
		if err != nil {
			t.Fatal(err)
		}
		j.gives(random[:], "zk_open", base.pkcs8, part)
		thumbprint, block, err := packet.SplitRandomKey(j.must("zk_seal", base.der(), random[:]))
		if err != nil {
			t.Fatal(err)
		}
		got, err = base.Unwrap(t.Context(), thumbprint, block)
		same(t, "random key", got, random[:], err)

		// Names and texts.
		day := time.Unix(1_600_000_000+mrand.Int64N(1<<30), 0)
		results, err = j.ask("names", []byte("REGISTRATION"), []byte(id), []byte(day.UTC().Format("01-02-2006")), secret)
		unique := packet.UniqueIdentifier("REGISTRATION", id, day)
		if err != nil || string(results[0]) != unique || string(results[1]) != packet.KeyID(unique) || string(results[2]) != packet.KeyIndex(secret) {
			t.Fatalf("names: %q, %v", results, err)
		}
		signature := append(make([]byte, mrand.IntN(3)), someBytes(mrand.IntN(300))...)
		encoded, err := packet.EncodeMultibase(packet.Base58BTC, signature)
		if err != nil {
			t.Fatal(err)
		}
		j.gives([]byte(encoded), "base58", signature)
		j.gives(signature, "unbase58", []byte(encoded))
		got, err = packet.DecodeMultibase(string(j.must("base58", signature)))
		same(t, "base58", got, signature, err)
	}
	// Once: it takes 64 MiB and ten passes on each side, seconds in Java.
	text, salt := someText(1+mrand.IntN(200)), someBytes(8+mrand.IntN(40))
	got, err := packet.Argon2Hash(text, salt)
	same(t, "Argon2", got, j.must("argon2", []byte(text), salt), err)
}

func testJWE(t *testing.T, j *javaSide, base *local) {
	for range rounds() {
		payload := []byte(someText(1 + mrand.IntN(2000)))
		for _, zip := range []bool{true, false} {
			mode := map[bool][]byte{true: []byte("zip"), false: []byte("plain")}[zip]
			got, h, err := jose.Decrypt(t.Context(), base, string(j.must("jwe_encrypt", base.der(), payload, mode)))
			same(t, "JWE", got, payload, err)
			if (h.Zip == "DEF") != zip {
				t.Fatalf("zip %q", h.Zip)
			}
			token, err := jose.Encrypt(base.certificate, payload, jose.EncryptOptions{Plain: !zip, IncludeCertificate: true, Thumbprint: zip})
			if err != nil {
				t.Fatal(err)
			}
			j.gives(payload, "jwe_decrypt", base.pkcs8, []byte(token))
		}
	}
}

// testTokens is about JSON Web Signatures and raw signatures.
func testTokens(t *testing.T, j *javaSide, a jose.Algorithm, k *local) {
	for range rounds() {
		payload := someBytes(1 + mrand.IntN(300))
		for _, mode := range []string{"attached", "detached", "b64false", "mosip"} {
			s, err := jose.ParseSigned(string(j.must("jws_sign", []byte(a), k.pkcs8, k.der(), payload, []byte(mode))))
			if err != nil {
				t.Fatal(err)
			}
			var detached []byte
			if s.Detached {
				detached = payload
			}
			got, err := s.Verify(k.key.Public(), detached)
			same(t, "JWS, "+mode, got, payload, err)
			if leaf, err := s.Header.Leaf(packet.ParseCertificate); err != nil || k.certificate != nil && !leaf.Equal(k.certificate) {
				t.Fatalf("x5c: %v", err)
			}
			if s.Detached {
				if _, err := s.Verify(k.key.Public(), bent(payload)); err == nil {
					t.Fatalf("%s: another payload verifies", mode)
				}
			}
			o := jose.SignOptions{Algorithm: a, KeyID: "kid", Unencoded: mode == "b64false" || mode == "mosip", Detached: mode == "detached" || mode == "b64false", EncodedAnyway: mode == "mosip"}
			if k.certificate != nil {
				o.Chain, o.Include, o.Thumbprint = []*x509.Certificate{k.certificate}, 1, true
			}
			token, err := jose.Sign(t.Context(), k, payload, o)
			if err != nil {
				t.Fatal(err)
			}
			j.gives(payload, "jws_verify", []byte(a), k.spki, []byte(token), payload, []byte(mode))
			if mode == "detached" || mode == "b64false" {
				j.refuses("jws_verify", []byte(a), k.spki, []byte(token), bent(payload), []byte(mode))
			}
		}
		signature := j.must("raw_sign", []byte(a), k.pkcs8, payload)
		if err := a.Verify(k.key.Public(), payload, signature); err != nil {
			t.Fatal(err)
		}
		if err := a.Verify(k.key.Public(), bent(payload), signature); err == nil {
			t.Fatal("another message verifies")
		}
		ours, err := k.SignJWS(t.Context(), a, payload)
		if err != nil || len(ours) != len(signature) {
			t.Fatalf("a signature of %d bytes, Java's has %d, %v", len(ours), len(signature), err)
		}
		j.gives([]byte("true"), "raw_verify", []byte(a), k.spki, payload, ours)
		j.refuses("raw_verify", []byte(a), k.spki, bent(payload), ours)
	}
}

// testMessages is about COSE_Sign1 messages and CBOR Web Tokens.
func testMessages(t *testing.T, j *javaSide, a jose.Algorithm, k *local) {
	for range rounds() {
		payload := someBytes(mrand.IntN(70_000))
		s, err := cose.Parse(j.must("cose_sign", []byte(a), k.pkcs8, k.der(), payload))
		if err != nil {
			t.Fatal(err)
		}
		got, err := s.Verify(k.key.Public(), nil)
		same(t, "COSE", got, payload, err)
		if k.certificate != nil {
			if leaf, err := s.Leaf(packet.ParseCertificate); err != nil || !leaf.Equal(k.certificate) || s.Protected.URL != "https://example.org/certificate" {
				t.Fatalf("x5chain: %v, %q", err, s.Protected.URL)
			}
		}
		if s.Algorithm != a || string(s.Unprotected.KeyID) != "a kid" {
			t.Fatalf("%s, kid %q", s.Algorithm, s.Unprotected.KeyID)
		}
		for _, o := range []cose.SignOptions{
			{Algorithm: a}, {Algorithm: a, Detached: true}, {Algorithm: a, RFC9360: true, Protected: cose.Header{KeyID: []byte("kid"), ContentType: "text/plain", URL: "u"}},
		} {
			if k.certificate != nil {
				sum := packet.Thumbprint(k.certificate)
				o.Protected.Chain, o.Protected.Thumbprint = [][]byte{k.der(), k.der()}, sum[:]
			}
			message, err := cose.Sign(t.Context(), k, payload, o)
			if err != nil {
				t.Fatal(err)
			}
			j.gives(payload, "cose_verify", []byte(a), k.spki, message, payload)
			j.refuses("cose_verify", []byte(a), k.spki, slices.Concat(message, []byte{0}), payload)
		}

		expires, identity, subject := time.Now().Add(time.Duration(1+mrand.IntN(10_000))*time.Second).Truncate(time.Second), someBytes(1+mrand.IntN(100)), someText(1+mrand.IntN(20))
		token, err := cose.ParseCWT(j.must("cwt_sign", []byte(a), k.pkcs8, k.der(), []byte(subject), []byte(strconv.FormatInt(expires.Unix(), 10)), identity))
		if err != nil {
			t.Fatal(err)
		}
		claims, err := token.VerifyCWT(k.key.Public(), cose.Expect{Now: time.Now(), Issuer: "https://example.org", Subject: subject, Audience: "audience"})
		if err != nil {
			t.Fatal(err)
		}
		if !claims.Expires.Equal(expires) || !bytes.Equal(claims.Identity, identity) || string(claims.ID) != "an id" || fmt.Sprint(claims.Extra["name"]) != "[a 1 -5]" {
			t.Fatalf("claims %+v", claims)
		}
		ours, err := cose.SignCWT(t.Context(), k, &cose.Claims{
			Issuer: "us", Subject: subject, Audience: []string{"a", "b"}, Expires: expires, NotBefore: time.Now(), ID: []byte("7"), Identity: identity,
			Extra: map[any]any{"x": []any{int64(-70_000), "y", nil}, int64(-1): someBytes(300)},
		}, cose.SignOptions{Algorithm: a})
		if err != nil {
			t.Fatal(err)
		}
		results, err := j.ask("cwt_verify", []byte(a), k.spki, ours)
		if err != nil || string(results[0]) != "us" || string(results[1]) != subject || string(results[2]) != strconv.FormatInt(expires.Unix(), 10) || !bytes.Equal(results[3], identity) {
			t.Fatalf("CWT: %q, %v", results, err)
		}
	}
}
