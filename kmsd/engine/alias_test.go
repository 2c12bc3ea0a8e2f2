package engine

import (
	"bytes"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/hex"
	"fmt"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/mechanism"
	"github.com/kmsd-project/kmsd/kmsd/pki"
	"github.com/kmsd-project/kmsd/policy"
)

// known returns the values that a version of a key is found by, made another way than the engine makes them.
func (h *house) known(r string) map[keystore.AliasKind][]byte {
	h.t.Helper()
	_, _, p, err := h.Public(h.t.Context(), h.admin, ref(h.t, r))
	if err != nil {
		h.t.Fatal(err)
	}
	sum := sha256.Sum256(p.SPKI)
	out := map[keystore.AliasKind][]byte{keystore.AliasSPKI: sum[:]}
	var parts []asn1.RawValue
	if _, err := asn1.Unmarshal(p.SPKI, &parts); err != nil {
		h.t.Fatal(err)
	}
	id := sha1.Sum(parts[1].Bytes[1:]) // after the number of unused bits
	out[keystore.AliasCKAID] = id[:]
	public, err := x509.ParsePKIXPublicKey(p.SPKI)
	if err != nil {
		h.t.Fatal(err)
	}
	if s, err := ssh.NewPublicKey(public); err == nil {
		sum := sha256.Sum256(s.Marshal())
		out[keystore.AliasSSH] = sum[:]
	}
	if len(p.Chain) > 0 {
		sum := sha256.Sum256(p.Chain[0])
		out[keystore.AliasThumbprint] = sum[:]
	}
	return out
}

// found checks that a version is found by everything it should be found by, at least by kinds.
func (h *house) found(r string, kinds ...keystore.AliasKind) {
	h.t.Helper()
	known := h.known(r)
	for _, kind := range kinds {
		if known[kind] == nil {
			h.t.Errorf("%s has no %s", r, kind)
		}
	}
	for kind, value := range known {
		key, number, err := h.Find(h.t.Context(), h.app, kind, value)
		if err != nil {
			h.t.Errorf("%s by %s: %v", r, kind, err)
			continue
		}
		if got := (keyspec.Ref{Name: key.Name, Version: number}).String(); got != r {
			h.t.Errorf("%s by %s is %s", r, kind, got)
		}
	}
}

func TestKeysAreFound(t *testing.T) {
	h := newHouse(t)
	ctx := t.Context()
	signing := []keystore.AliasKind{keystore.AliasSPKI, keystore.AliasCKAID, keystore.AliasSSH}
	for a, kinds := range map[keyspec.Algorithm][]keystore.AliasKind{
		keyspec.RSA2048: signing, keyspec.ECDSAP256: signing, keyspec.ECDSAP384: signing, keyspec.ECDSAP521: signing, keyspec.Ed25519: signing,
		keyspec.X25519: signing[:2], keyspec.ECDHP384: signing[:2],
	} {
		name := "APP/" + string(a)
		h.create(name, a)
		h.found(name+"@1", kinds...)
		if _, err := h.Rotate(ctx, h.app, keyspec.Name(name), time.Time{}, time.Time{}, false); err != nil {
			t.Fatal(err)
		}
		h.found(name+"@2", kinds...)
		h.found(name+"@1", kinds...)
	}
	h.create("APP/kek", keyspec.AES256GCM, keyspec.Wrap, keyspec.Unwrap)
	h.create("APP/out", keyspec.Ed25519)
	wrapped, _, err := h.Wrap(ctx, h.app, ref(t, "APP/kek"), ref(t, "APP/out"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := h.Unwrap(ctx, h.app, ref(t, "APP/kek"), wrapped, &NewKey{Name: "APP/in", Algorithm: keyspec.Ed25519}, nil); err != nil {
		t.Fatal(err)
	}
	h.found("APP/in@1", signing...) // the same key twice: the one that was made last
	s, err := pki.ParseSubject("CN=test", nil, nil, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := h.CertSelfSign(ctx, h.app, ref(t, "APP/in"), &s, &pki.Profile{}); err != nil {
		t.Fatal(err)
	}
	h.found("APP/in@1", append(signing, keystore.AliasThumbprint)...)
	h.restart()
	h.found("APP/in@1", append(signing, keystore.AliasThumbprint)...)
}

// What was encrypted to a certificate names it by its thumbprint; that the key has another one by now makes no difference.
func TestKeyIsFoundByItsEarlierCertificates(t *testing.T) {
	h := newHouse(t)
	ctx := t.Context()
	h.create("APP/issuer", keyspec.ECDSAP256, keyspec.Certify)
	h.create("APP/k", keyspec.RSA2048, keyspec.Decrypt)
	s, err := pki.ParseSubject("CN=test", nil, nil, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := h.CertSelfSign(ctx, h.app, ref(t, "APP/issuer"), &s, &pki.Profile{CA: true, PathLen: -1}); err != nil {
		t.Fatal(err)
	}
	type payload struct{ thumbprint, sealed []byte }
	var payloads []payload
	for generation := range 2 {
		for i := range 3 {
			chain, err := h.CertIssue(ctx, h.app, ref(t, "APP/issuer"), nil, ref(t, "APP/k"), &s, &pki.Profile{})
			if err != nil {
				t.Fatal(err)
			}
			certificate, err := x509.ParseCertificate(chain[0])
			if err != nil {
				t.Fatal(err)
			}
			sealed, err := mechanism.Encrypt(nil, certificate.PublicKey, keyspec.RSAOAEPSHA256, fmt.Appendf(nil, "%d %d", generation, i), nil)
			if err != nil {
				t.Fatal(err)
			}
			sum := sha256.Sum256(chain[0])
			payloads = append(payloads, payload{sum[:], sealed})
		}
		if generation == 0 {
			if _, err := h.Rotate(ctx, h.app, "APP/k", time.Time{}, time.Time{}, false); err != nil {
				t.Fatal(err)
			}
		}
	}
	h.restart()
	for i, p := range payloads {
		key, number, err := h.Find(ctx, h.app, keystore.AliasThumbprint, p.thumbprint)
		if err != nil || key.Name != "APP/k" || number != keyspec.Version(i/3+1) {
			t.Fatalf("payload %d: %v, version %d", i, err, number)
		}
		data, _, err := h.Decrypt(ctx, h.app, keyspec.Ref{Name: key.Name, Version: number}, p.sealed, nil, nil, nil)
		if want := fmt.Sprintf("%d %d", i/3, i%3); err != nil || string(data) != want {
			t.Fatalf("payload %d: %q %v", i, data, err)
		}
	}
	if _, err := h.DestroyNow(ctx, h.app, ref(t, "APP/k@1")); err != nil {
		t.Fatal(err)
	}
	for i, p := range payloads {
		if _, _, err := h.Find(ctx, h.app, keystore.AliasThumbprint, p.thumbprint); (err == nil) != (i >= 3) {
			t.Errorf("payload %d, after the first version was destroyed: %v", i, err)
		}
	}
}

// TestSSHFingerprint compares with one that ssh-keygen has printed.
func TestSSHFingerprint(t *testing.T) {
	// RFC 8032 section 7.1 test 1, written as OpenSSH does: ssh-keygen -lf.
	public, _ := hex.DecodeString("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
	spki, _ := hex.DecodeString("302a300506032b6570032100" + hex.EncodeToString(public))
	wire := "\x00\x00\x00\x0bssh-ed25519\x00\x00\x00\x20" + string(public)
	if got := sshWire(spki); !bytes.Equal(got, []byte(wire)) {
		t.Errorf("%x", got)
	}
	if sshWire([]byte("junk")) != nil || Aliases(1, []byte("junk")) != nil {
		t.Error("junk has aliases")
	}
}

// TestFindAsksThePolicy: who has no grant for the key that is found is answered as if there were none, and as late.
func TestFindAsksThePolicy(t *testing.T) {
	h := newHouse(t)
	h.create("APP/k", keyspec.Ed25519)
	value := h.known("APP/k")[keystore.AliasSPKI]
	p, err := policy.Parse([]byte("version = 1\n[applications]\nAPP = [1001]\nOTHER = [1002]\n"))
	if err != nil {
		t.Fatal(err)
	}
	h.SetPolicy(p)
	find := func(uid uint32, value []byte) error {
		start := time.Now()
		_, _, err := h.Find(t.Context(), &Caller{UID: uid}, keystore.AliasSPKI, value)
		if err != nil && time.Since(start) < findPause {
			t.Errorf("refused after %s", time.Since(start))
		}
		return err
	}
	want(t, "with a grant", find(1001, value), nil)
	want(t, "with a grant for another application", find(1002, value), ErrNotAvailable)
	want(t, "a key that is not there", find(1002, make([]byte, 32)), ErrNotAvailable)
	want(t, "an unknown caller", find(1003, value), ErrDenied)
	want(t, "too short", find(1001, value[:31]), ErrInput)
	_, _, err = h.Find(t.Context(), &Caller{UID: 1001}, "name", value)
	want(t, "unknown kind", err, ErrInput)
	var found, refused bool
	for _, r := range h.records() {
		found = found || strings.HasPrefix(r, "key_find APP/k@1 ok")
		refused = refused || strings.HasPrefix(r, "key_find APP/k@1 "+ErrNotAvailable.Error()+" uid not in this application")
	}
	if !found || !refused {
		t.Errorf("the audit does not tell which key was found: %q", h.records())
	}
}
