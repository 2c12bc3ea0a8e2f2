package engine

import (
	"bytes"
	"crypto/ecdh"
	"crypto/hpke"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/client/ciphertext"
	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/mechanism"
	"github.com/kmsd-project/kmsd/kmsd/pki"
)

func TestImport(t *testing.T) {
	h := newHouse(t)
	ctx := t.Context()
	raw := bytes.Repeat([]byte{5}, 32)
	n := func(name string) *NewKey { return &NewKey{Name: keyspec.Name(name), Algorithm: keyspec.AES256GCM} }

	_, err := h.Import(ctx, h.app, n("APP/plain"), bytes.Clone(raw), nil)
	want(t, "plaintext on the application socket", err, ErrUnsupported)
	given := bytes.Clone(raw)
	key, err := h.Import(ctx, h.admin, n("APP/plain"), given, nil)
	if err != nil || key.Origin != keyspec.Imported {
		t.Fatalf("%+v %v", key, err)
	}
	if !bytes.Equal(given, make([]byte, 32)) {
		t.Error("the material was not wiped")
	}
	_, err = h.Import(ctx, h.admin, n("APP/short"), bytes.Clone(raw[:31]), nil)
	want(t, "wrong length", err, mechanism.ErrMaterial)

	begin := func(c *Caller) (hpke.PublicKey, ImportToken) {
		t.Helper()
		b, token, err := h.ImportBegin(ctx, c)
		if err != nil {
			t.Fatal(err)
		}
		public, err := hpke.MLKEM768X25519().NewPublicKey(b)
		if err != nil {
			t.Fatal(err)
		}
		return public, token
	}
	seal := func(p hpke.PublicKey, info string) []byte {
		t.Helper()
		b, err := hpke.Seal(p, hpke.HKDFSHA256(), hpke.AES256GCM(), []byte(info), raw)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	public, token := begin(h.app)
	wrapped := seal(public, "kmsd import v1")
	other := &Caller{UID: owner, PID: 101}
	_, err = h.ImportWrapped(ctx, other, n("APP/w0"), wrapped, token, nil)
	want(t, "token of another process", err, ErrInput)
	if _, err = h.ImportWrapped(ctx, h.app, n("APP/w1"), wrapped, token, nil); err != nil {
		t.Fatal(err)
	}
	_, err = h.ImportWrapped(ctx, h.app, n("APP/w2"), wrapped, token, nil)
	want(t, "spent token", err, ErrInput)
	public, token = begin(h.app)
	_, err = h.ImportWrapped(ctx, h.app, n("APP/w3"), seal(public, "other"), token, nil)
	want(t, "other info", err, ErrDecryption)
	public, token = begin(h.app)
	h.clock.add(importLife)
	_, err = h.ImportWrapped(ctx, h.app, n("APP/w4"), seal(public, "kmsd import v1"), token, nil)
	want(t, "late", err, ErrInput)
	for i := range importsEach + 1 {
		if _, _, err = h.ImportBegin(ctx, h.app); i < importsEach {
			want(t, "begin", err, nil)
		}
	}
	want(t, "too many begun", err, ErrInput)

	// Both ways brought in the same key.
	sealed := h.encrypt("APP/plain", "x")
	data, err := h.decrypt(h.app, "APP/w1", sealed)
	if err != nil || data != "x" {
		t.Errorf("%q %v", data, err)
	}
}

func TestWrap(t *testing.T) {
	h := newHouse(t)
	ctx := t.Context()
	h.create("APP/kek", keyspec.AES256GCM, keyspec.Wrap, keyspec.Unwrap)
	for i, a := range keyspec.Algorithms() {
		if a == keyspec.RSA3072 || a == keyspec.RSA4096 { // as RSA-2048, and long to make
			continue
		}
		name := keyspec.Name(fmt.Sprintf("APP/k%d", i))
		h.create(string(name), a)
		wrapped, _, err := h.Wrap(ctx, h.app, ref(t, "APP/kek"), keyspec.Ref{Name: name})
		if err != nil {
			t.Fatalf("%s: %v", a, err)
		}
		back := name + "-back"
		key, err := h.Unwrap(ctx, h.app, ref(t, "APP/kek"), wrapped, &NewKey{Name: back, Algorithm: a}, nil)
		if err != nil {
			t.Fatalf("%s: %v", a, err)
		}
		was, _ := h.Get(ctx, h.app, keyspec.Ref{Name: name})
		if key.Versions[0].SPKISHA256 != was.Versions[0].SPKISHA256 || key.Exportable {
			t.Errorf("%s: another key came back", a)
		}
		_, _, err = h.Wrap(ctx, h.app, ref(t, "APP/kek"), keyspec.Ref{Name: back})
		want(t, "not exportable", err, ErrUsage)
		wrapped[3] ^= 1
		_, err = h.Unwrap(ctx, h.app, ref(t, "APP/kek"), wrapped, &NewKey{Name: back + "2", Algorithm: a}, nil)
		want(t, "changed", err, ErrDecryption)
	}
}

func TestAgreeAndDerive(t *testing.T) {
	h := newHouse(t)
	ctx := t.Context()
	curves := map[keyspec.Algorithm]ecdh.Curve{
		keyspec.X25519: ecdh.X25519(), keyspec.ECDHP256: ecdh.P256(), keyspec.ECDHP384: ecdh.P384(), keyspec.ECDHP521: ecdh.P521(),
	}
	for a, curve := range curves {
		h.create("APP/"+string(a), a)
		peer, err := curve.GenerateKey(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		peerSPKI, err := x509.MarshalPKIXPublicKey(peer.PublicKey())
		if err != nil {
			t.Fatal(err)
		}
		shared := keyspec.Name("APP/shared-" + string(a))
		key, err := h.Agree(ctx, h.app, ref(t, "APP/"+string(a)), peerSPKI, []byte("salt"), []byte("info"), &NewKey{Name: shared, Algorithm: keyspec.AES256GCM}, nil)
		if err != nil || key.Origin != keyspec.Derived {
			t.Fatalf("%s: %v", a, err)
		}
		// The peer does the same in its own way.
		_, _, p, err := h.Public(ctx, h.app, ref(t, "APP/"+string(a)))
		if err != nil {
			t.Fatal(err)
		}
		parsed, err := x509.ParsePKIXPublicKey(p.SPKI)
		if err != nil {
			t.Fatal(err)
		}
		mine, ok := parsed.(*ecdh.PublicKey)
		if e, is := parsed.(interface {
			ECDH() (*ecdh.PublicKey, error)
		}); !ok && is {
			if mine, err = e.ECDH(); err != nil {
				t.Fatal(err)
			}
		}
		z, err := peer.ECDH(mine)
		if err != nil {
			t.Fatal(err)
		}
		raw, err := mechanism.HKDF(z, []byte("salt"), []byte("info"), 32)
		if err != nil {
			t.Fatal(err)
		}
		row, _ := mechanism.Lookup(keyspec.AES256GCM)
		k, err := row.Load(raw)
		if err != nil {
			t.Fatal(err)
		}
		sealed := h.encrypt(string(shared), "hello")
		if data, err := ciphertext.Open(nil, k.AEAD(), sealed, []byte("aad")); err != nil || string(data) != "hello" {
			t.Errorf("%s: %q %v", a, data, err)
		}
		_, err = h.Rotate(ctx, h.app, shared, time.Time{}, time.Time{}, false)
		want(t, "rotate a derived key", err, ErrUnsupported)
		_, err = h.Agree(ctx, h.app, ref(t, "APP/"+string(a)), peerSPKI, nil, nil, &NewKey{Name: "APP/asym", Algorithm: keyspec.Ed25519}, nil)
		want(t, "asymmetric result", err, ErrInput)
		_, err = h.Agree(ctx, h.app, ref(t, "APP/"+string(a)), []byte("junk"), nil, nil, &NewKey{Name: "APP/junk", Algorithm: keyspec.AES256GCM}, nil)
		want(t, "peer is no key", err, mechanism.ErrInput)
	}
	h.create("APP/kdk", keyspec.HKDFSHA256)
	for _, info := range []string{"one", "two"} {
		if _, err := h.Derive(ctx, h.app, ref(t, "APP/kdk"), nil, []byte(info), &NewKey{Name: keyspec.Name("APP/" + info), Algorithm: keyspec.HMACSHA256}, nil); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := h.Derive(ctx, h.app, ref(t, "APP/kdk"), nil, []byte("one"), &NewKey{Name: "APP/again", Algorithm: keyspec.HMACSHA256}, nil); err != nil {
		t.Fatal(err)
	}
	mac := func(name string) string {
		m, _, err := h.MAC(ctx, h.app, ref(t, name), []byte("m"), nil)
		if err != nil {
			t.Fatal(err)
		}
		return string(m)
	}
	if mac("APP/one") != mac("APP/again") || mac("APP/one") == mac("APP/two") {
		t.Error("derivation does not depend on info alone")
	}
}

func TestStreams(t *testing.T) {
	h := newHouse(t)
	ctx := t.Context()
	h.create("APP/e", keyspec.AES256GCM)
	h.create("APP/m", keyspec.HMACSHA256)
	h.create("APP/s", keyspec.Ed25519)
	plain := bytes.Repeat([]byte("0123456789abcdef"), 20_000) // 320 kB, several segments
	aad := []byte("aad")

	s, err := h.BeginStream(ctx, h.app, "encrypt", ref(t, "APP/e"), aad, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	var body []byte
	for i := 0; i*100_000 < len(plain); i++ {
		if body, err = s.Update(uint64(i), plain[i*100_000:min((i+1)*100_000, len(plain))], body); err != nil {
			t.Fatal(err)
		}
	}
	if body, err = s.Finish(body); err != nil {
		t.Fatal(err)
	}
	_, err = s.Finish(nil)
	want(t, "finish twice", err, ErrStream)

	open := func(head, body []byte) ([]byte, error) {
		s, err := h.BeginStream(ctx, h.app, "decrypt", ref(t, "APP/e"), aad, nil, head)
		if err != nil {
			return nil, err
		}
		out, err := s.Update(0, body, nil)
		if err != nil {
			return nil, err
		}
		return s.Finish(out)
	}
	if got, err := open(s.Head, body); err != nil || !bytes.Equal(got, plain) {
		t.Fatalf("round trip: %v", err)
	}
	if _, err := h.Rotate(ctx, h.app, "APP/e", time.Time{}, time.Time{}, false); err != nil {
		t.Fatal(err)
	}
	if got, err := open(s.Head, body); err != nil || !bytes.Equal(got, plain) {
		t.Errorf("after rotation: %v", err)
	}
	head, number, err := h.Rewrap(ctx, h.app, "APP/e", s.Head, aad, nil)
	if err != nil || number != 2 {
		t.Fatal(err)
	}
	if got, err := open(head, body); err != nil || !bytes.Equal(got, plain) {
		t.Errorf("rewrapped: %v", err)
	}
	flipped := bytes.Clone(body)
	flipped[len(flipped)/2] ^= 1
	for name, b := range map[string][]byte{"flipped": flipped, "cut off": body[:len(body)-1], "without the last segment": body[:4*(64<<10+16)]} {
		_, err := open(s.Head, b)
		want(t, name, err, ErrDecryption)
	}
	_, err = h.BeginStream(ctx, h.app, "decrypt", ref(t, "APP/e"), aad, nil, h.encrypt("APP/e", "message"))
	want(t, "head of a message", err, ErrDecryption)
	_, _, err = h.Decrypt(ctx, h.app, ref(t, "APP/e"), s.Head, aad, nil, nil)
	want(t, "stream key by decrypt", err, ErrUnsupported)

	s, _ = h.BeginStream(ctx, h.app, "encrypt", ref(t, "APP/e"), aad, nil, nil)
	_, err = s.Update(1, []byte("x"), nil)
	want(t, "wrong chunk", err, ErrStream)
	_, err = s.Update(0, []byte("x"), nil)
	want(t, "after an error", err, ErrStream)

	whole, _, err := h.MAC(ctx, h.app, ref(t, "APP/m"), plain[:1000], nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		mac []byte
		err error
	}{{whole, nil}, {make([]byte, 32), mechanism.ErrVerification}, {whole[:16], mechanism.ErrVerification}} {
		s, err := h.BeginStream(ctx, h.app, "mac_verify", ref(t, "APP/m"), nil, c.mac, nil)
		if err != nil {
			t.Fatal(err)
		}
		s.Update(0, plain[:400], nil)
		s.Update(1, plain[400:1000], nil)
		_, err = s.Finish(nil)
		want(t, "mac_verify", err, c.err)
	}
	_, err = h.BeginStream(ctx, h.app, "sign", ref(t, "APP/s"), nil, nil, nil)
	want(t, "sign", err, ErrUnsupported)
	_, err = h.BeginStream(ctx, h.app, "fly", ref(t, "APP/s"), nil, nil, nil)
	want(t, "unknown", err, ErrInput)
}

func TestDataKey(t *testing.T) {
	h := newHouse(t)
	h.create("APP/e", keyspec.AES256GCM)
	for _, size := range []int{0, 16, 32, 64} {
		plain, sealed, _, err := h.DataKey(t.Context(), h.app, ref(t, "APP/e"), size, []byte("aad"), true)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := h.decrypt(h.app, "APP/e", sealed); err != nil || got != string(plain) || size > 0 && len(plain) != size {
			t.Errorf("%d bytes: %v", size, err)
		}
	}
	plain, _, _, err := h.DataKey(t.Context(), h.app, ref(t, "APP/e"), 32, nil, false)
	if err != nil || plain != nil {
		t.Errorf("plaintext although not wanted: %v", err)
	}
	_, _, _, err = h.DataKey(t.Context(), h.app, ref(t, "APP/e"), 24, nil, true)
	want(t, "24 bytes", err, ErrInput)
}

func TestCertificates(t *testing.T) {
	h := newHouse(t)
	ctx := t.Context()
	subject := func(dn string) *pki.Subject {
		s, err := pki.ParseSubject(dn, nil, nil, nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		return &s
	}
	h.create("ROOT", keyspec.ECDSAP256, keyspec.Sign, keyspec.Verify, keyspec.Certify)
	h.create("MODULE", keyspec.ECDSAP384, keyspec.Sign, keyspec.Verify, keyspec.Certify)
	h.create("MODULE/base", keyspec.Ed25519)
	h.create("MODULE/sym", keyspec.AES256GCM)

	_, err := h.CertIssue(ctx, h.app, ref(t, "ROOT"), nil, ref(t, "MODULE"), subject("CN=m"), &pki.Profile{})
	want(t, "issuer without a certificate", err, ErrState)
	_, err = h.CertSelfSign(ctx, h.app, ref(t, "MODULE/base"), subject("CN=x"), &pki.Profile{CA: true})
	want(t, "CA without certify", err, ErrUsage)
	if _, err = h.CertSelfSign(ctx, h.app, ref(t, "ROOT"), subject("CN=root"), &pki.Profile{CA: true, PathLen: -1}); err != nil {
		t.Fatal(err)
	}
	if _, err = h.CertIssue(ctx, h.app, ref(t, "ROOT"), nil, ref(t, "MODULE"), subject("CN=module"), &pki.Profile{CA: true, PathLen: 0}); err != nil {
		t.Fatal(err)
	}
	chain, err := h.CertIssue(ctx, h.app, ref(t, "MODULE"), nil, ref(t, "MODULE/base"), subject("CN=base"), &pki.Profile{})
	if err != nil || len(chain) != 3 {
		t.Fatalf("chain of %d: %v", len(chain), err)
	}
	stored, err := h.CertGet(ctx, h.app, ref(t, "MODULE/base"))
	if err != nil || len(stored) != 3 || !bytes.Equal(stored[0], chain[0]) {
		t.Fatalf("stored: %v", err)
	}
	var parsed []*x509.Certificate
	for _, der := range stored {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		parsed = append(parsed, c)
	}
	if reasons := pki.Check(parsed, parsed[2:], h.clock.Now().Add(time.Minute)); len(reasons) > 0 {
		t.Errorf("chain is not valid: %v", reasons)
	}
	request, err := h.CertRequest(ctx, h.app, ref(t, "MODULE/base"), subject("CN=request"))
	if err != nil {
		t.Fatal(err)
	}
	issued, err := h.CertIssue(ctx, h.app, ref(t, "MODULE"), request, keyspec.Ref{}, &pki.Subject{}, &pki.Profile{})
	if err != nil || len(issued) != 3 {
		t.Fatal(err)
	}
	if c, err := x509.ParseCertificate(issued[0]); err != nil || c.Subject.CommonName != "request" {
		t.Errorf("subject %v %v", c.Subject, err)
	}
	want(t, "attach", h.CertAttach(ctx, h.app, ref(t, "MODULE/base"), issued), nil)
	want(t, "attach to another key", h.CertAttach(ctx, h.app, ref(t, "MODULE"), issued), ErrInput)
	want(t, "attach nothing", h.CertAttach(ctx, h.app, ref(t, "MODULE"), nil), ErrInput)
	if err := h.CertAttach(ctx, h.app, ref(t, "MODULE/base"), [][]byte{issued[0], issued[2]}); !errors.Is(err, pki.ErrChain) {
		t.Errorf("attach with a gap: %v", err)
	}
	_, err = h.CertIssue(ctx, h.app, ref(t, "MODULE"), request, ref(t, "MODULE/base"), subject("CN=x"), &pki.Profile{})
	want(t, "request and key", err, ErrInput)
	_, err = h.CertIssue(ctx, h.app, ref(t, "MODULE"), nil, ref(t, "MODULE/sym"), subject("CN=x"), &pki.Profile{})
	want(t, "certificate of a symmetric key", err, ErrUnsupported)
	// Rotating does not carry the certificate over.
	if _, err := h.Rotate(ctx, h.app, "MODULE/base", time.Time{}, time.Time{}, false); err != nil {
		t.Fatal(err)
	}
	if stored, err = h.CertGet(ctx, h.app, ref(t, "MODULE/base")); err != nil || len(stored) != 0 {
		t.Errorf("the new version has %d certificates (%v)", len(stored), err)
	}
}

func TestListPages(t *testing.T) {
	h := newHouse(t)
	for i := range 25 {
		h.create(fmt.Sprintf("APP/%02d", i), keyspec.HMACSHA256)
	}
	h.create("OTHER", keyspec.HMACSHA256)
	seen := make(map[keyspec.Name]bool)
	var after []byte
	for {
		keys, next, err := h.List(t.Context(), h.app, "APP/", after, 10)
		if err != nil {
			t.Fatal(err)
		}
		for _, k := range keys {
			if seen[k.Name] || k.Name.Namespace() != "APP" {
				t.Errorf("%s is wrong here", k.Name)
			}
			seen[k.Name] = true
		}
		if next == nil {
			break
		}
		after = next
	}
	if len(seen) != 25 {
		t.Errorf("%d keys", len(seen))
	}
	keys, _, err := h.List(t.Context(), h.admin, "", nil, 100)
	if err != nil || len(keys) != 26 {
		t.Errorf("everything: %d %v", len(keys), err)
	}
	_, _, err = h.List(t.Context(), h.app, "APP", []byte("junk"), 10)
	want(t, "junk cursor", err, keystore.ErrInvalid)
	_, _, err = h.List(t.Context(), h.app, "a b/", nil, 10)
	want(t, "bad prefix", err, ErrInput)
}

// A namespace that begins like another shows nothing of it.
func TestListStaysInItsNamespace(t *testing.T) {
	h := newHouse(t)
	for _, name := range []string{"REG", "REG/a", "REGISTRATION", "REGISTRATION/a", "REG/b/c"} {
		h.create(name, keyspec.HMACSHA256)
	}
	for prefix, names := range map[string]string{
		"REG": "REG REG/a REG/b/c", "REG/": "REG/a REG/b/c", "REG/b": "REG/b/c", "RE": "", "REGISTRATION": "REGISTRATION REGISTRATION/a",
	} {
		keys, _, err := h.List(t.Context(), h.app, prefix, nil, 100)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, k := range keys {
			got = append(got, string(k.Name))
		}
		slices.Sort(got)
		if s := strings.Join(got, " "); s != names {
			t.Errorf("%s: %s, want %s", prefix, s, names)
		}
	}
}
