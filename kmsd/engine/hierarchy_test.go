package engine

import (
	"bytes"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/client/packet"
	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/mechanism"
	"github.com/kmsd-project/kmsd/kmsd/pki"
	"github.com/kmsd-project/kmsd/policy"
)

// master generates a key of the hierarchy.
func (h *house) master(m Master) *Certified {
	h.t.Helper()
	c, err := h.MasterGenerate(h.t.Context(), h.admin, &m)
	if err != nil {
		h.t.Fatalf("%s: %v", m.Name, err)
	}
	return c
}

// base returns the current certificate of a base key.
func (h *house) base(name keyspec.Name) *Certified {
	h.t.Helper()
	c, err := h.CertCurrent(h.t.Context(), h.app, name, nil)
	if err != nil {
		h.t.Fatalf("%s: %v", name, err)
	}
	return c
}

// hierarchy makes ROOT and the module key of REGISTRATION.
func (h *house) hierarchy() {
	h.t.Helper()
	h.master(Master{Name: RootName})
	h.master(Master{Name: "REGISTRATION"})
}

func leaf(t testing.TB, c *Certified) *x509.Certificate {
	t.Helper()
	certificate, err := pki.ParseCertificate(c.Chain[0])
	if err != nil {
		t.Fatal(err)
	}
	return certificate
}

// checkChain has package pki validate a chain, and says what is wrong.
func (h *house) checkChain(c *Certified) {
	h.t.Helper()
	var chain []*x509.Certificate
	for _, der := range c.Chain {
		certificate, err := pki.ParseCertificate(der)
		if err != nil {
			h.t.Fatal(err)
		}
		chain = append(chain, certificate)
	}
	if reasons := pki.Check(chain, chain[len(chain)-1:], h.clock.Now()); len(reasons) > 0 {
		h.t.Errorf("chain of %s: %v", c.Ref, reasons)
	}
	if !chain[0].NotAfter.Equal(c.Expires) {
		h.t.Errorf("%s expires %v, its certificate %v", c.Ref, c.Expires, chain[0].NotAfter)
	}
}

func dn(t testing.TB, raw []byte) string {
	t.Helper()
	text, err := pki.FormatName(raw)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

const day = 24 * time.Hour

// encryptTo encrypts as the holder of a certificate does, and decryptWith as the holder of the key.
func encryptTo(t testing.TB, c *Certified, data string) []byte {
	t.Helper()
	sealed, err := mechanism.Encrypt(nil, leaf(t, c).PublicKey, keyspec.RSAOAEPSHA256, []byte(data), nil)
	if err != nil {
		t.Fatal(err)
	}
	return sealed
}

func (h *house) opens(r keyspec.Ref, sealed []byte, data string) {
	h.t.Helper()
	got, _, err := h.Decrypt(h.t.Context(), h.app, r, sealed, nil, nil, nil)
	if err != nil || string(got) != data {
		h.t.Errorf("decrypt with %s: %q, %v", r, got, err)
	}
}

// TestHierarchy makes one of each kind of key and looks at what comes of it.
func TestHierarchy(t *testing.T) {
	h := newHouse(t)
	now := h.clock.Now()
	_, err := h.MasterGenerate(t.Context(), h.admin, &Master{Name: "KERNEL"})
	want(t, "a module key without a root", err, ErrNotGenerated)
	var next *Remedied
	if !errors.As(err, &next) || next.Remedy != "kmsctl master generate ROOT" {
		t.Errorf("next step of %v", err)
	}
	_, err = h.CertCurrent(t.Context(), h.app, "KERNEL/x", nil)
	want(t, "a base key of KERNEL", err, ErrNotMade)
	_, err = h.CertCurrent(t.Context(), h.app, "REGISTRATION/x", nil)
	want(t, "a base key without a module key", err, ErrNotGenerated)

	for _, c := range []struct {
		name      keyspec.Name
		algorithm x509.PublicKeyAlgorithm
		subject   string
		issuer    string
		ca        bool
		pathLen   int
		usage     x509.KeyUsage
		years     int
		chain     int
	}{
		{"ROOT", x509.RSA, "CN=www.mosip.io (ROOT)", "ROOT", true, 2, x509.KeyUsageCertSign | x509.KeyUsageCRLSign, 5, 1},
		{"KERNEL", x509.RSA, "CN=www.mosip.io (KERNEL)", "ROOT", true, 1, x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign | x509.KeyUsageCRLSign, 3, 2},
		{"REGISTRATION", x509.RSA, "CN=www.mosip.io (REGISTRATION)", "ROOT", true, 1, x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign | x509.KeyUsageCRLSign, 3, 2},
		{"KERNEL/SIGN", x509.RSA, "CN=www.mosip.io (KERNEL-SIGN)", "ROOT", false, -1, x509.KeyUsageDigitalSignature, 3, 2},
		{"KERNEL/EC_SECP256R1_SIGN", x509.ECDSA, "CN=www.mosip.io (KERNEL-EC_SECP256R1_SIGN)", "ROOT", false, -1, x509.KeyUsageDigitalSignature, 3, 2},
		{"KERNEL/EC_SECP256K1_SIGN", x509.ECDSA, "CN=www.mosip.io (KERNEL-EC_SECP256K1_SIGN)", "ROOT", false, -1, x509.KeyUsageDigitalSignature, 3, 2},
		{"KERNEL/ED25519_SIGN", x509.Ed25519, "CN=www.mosip.io (KERNEL-ED25519_SIGN)", "KERNEL", false, -1, x509.KeyUsageDigitalSignature, 3, 3},
		{"REGISTRATION/10001_110011", x509.RSA, "CN=REGISTRATION-10001_110011", "REGISTRATION", false, -1, x509.KeyUsageKeyEncipherment, 2, 3},
	} {
		var made *Certified
		if strings.HasPrefix(string(c.name), "REGISTRATION/") {
			made = h.base(c.name)
		} else {
			made = h.master(Master{Name: c.name})
		}
		certificate := leaf(t, made)
		if !made.Made || made.Ref.Version != 1 || len(made.Chain) != c.chain || made.KeyID == "" {
			t.Errorf("%s: %+v", c.name, made)
		}
		h.checkChain(made)
		rest := ",OU=MOSIP-TECH-CENTER,O=IITB,L=BANGALORE,ST=KA,C=IN"
		if got := dn(t, certificate.RawSubject); got != c.subject+rest {
			t.Errorf("%s: subject %s", c.name, got)
		}
		if got := dn(t, certificate.RawIssuer); got != "CN=www.mosip.io ("+c.issuer+")"+rest {
			t.Errorf("%s: issuer %s", c.name, got)
		}
		if certificate.PublicKeyAlgorithm != c.algorithm || certificate.IsCA != c.ca || certificate.MaxPathLen != c.pathLen || certificate.KeyUsage != c.usage {
			t.Errorf("%s: %v, CA %v %d, usage %b", c.name, certificate.PublicKeyAlgorithm, certificate.IsCA, certificate.MaxPathLen, certificate.KeyUsage)
		}
		if public, ok := certificate.PublicKey.(*rsa.PublicKey); ok && public.N.BitLen() != 2048 {
			t.Errorf("%s: %d bits", c.name, public.N.BitLen())
		}
		if !made.NotBefore.Equal(now) || !made.Expires.Equal(now.Add(time.Duration(c.years)*365*day)) || certificate.SerialNumber.Sign() <= 0 {
			t.Errorf("%s: from %v to %v", c.name, made.NotBefore, made.Expires)
		}
		if c.chain > 1 && !bytes.Equal(certificate.AuthorityKeyId, parsedAt(t, made, 1).SubjectKeyId) {
			t.Errorf("%s: authority key identifier", c.name)
		}
		// Once more changes nothing, and the certificate can be read as well.
		again := h.base(c.name)
		if again.Made || again.Ref != made.Ref || !bytes.Equal(again.Chain[0], made.Chain[0]) || again.KeyID != made.KeyID {
			t.Errorf("%s again: %+v", c.name, again)
		}
		if c.name.IsModule() || !strings.HasPrefix(string(c.name), "REGISTRATION/") {
			if again := h.master(Master{Name: c.name}); again.Made || again.Ref != made.Ref {
				t.Errorf("%s again: %+v", c.name, again)
			}
		}
	}

	// The record of a key and that of its certificate are one.
	var records []string
	for _, r := range h.records() {
		if strings.Contains(r, "10001_110011") && strings.Contains(r, "generated") {
			records = append(records, r)
		}
	}
	if !slices.Equal(records, []string{"cert_current REGISTRATION/10001_110011@1 ok generated"}) {
		t.Errorf("records %q", records)
	}

	// The root signs nothing but certificates, and a base key does nothing but decrypt.
	_, err = h.sign(h.app, "ROOT", "message")
	want(t, "sign with the root", err, ErrUsage)
	_, err = h.sign(h.app, "REGISTRATION/10001_110011", "message")
	want(t, "sign with a base key", err, ErrUsage)
	made := h.base("REGISTRATION/10001_110011")
	h.opens(made.Ref, encryptTo(t, made, "data"), "data")
}

func parsedAt(t testing.TB, c *Certified, i int) *x509.Certificate {
	t.Helper()
	certificate, err := pki.ParseCertificate(c.Chain[i])
	if err != nil {
		t.Fatal(err)
	}
	return certificate
}

func TestHierarchyRefuses(t *testing.T) {
	h := newHouse(t)
	h.hierarchy()
	h.create("REGISTRATION/aes", keyspec.AES256GCM)
	h.create("RESIDENT", keyspec.Ed25519)
	_, err := h.SetApplication(t.Context(), h.admin, &Application{Name: "OLD", Inactive: true})
	want(t, "set", err, nil)
	for _, c := range []struct {
		what string
		m    Master
		err  error
	}{
		{"no application", Master{Name: "NOBODY"}, ErrApplication},
		{"a bad name", Master{Name: "a b"}, ErrInput},
		{"a sign key of the root", Master{Name: "ROOT/SIGN"}, ErrNotMade},
		{"a base key", Master{Name: "REGISTRATION/x"}, ErrInput},
		{"a symmetric sign key", Master{Name: "KERNEL/SIGN", Symmetric: true}, ErrInput},
		{"a request of a symmetric key", Master{Name: "KERNEL/IDENTITY_CACHE", CSR: true}, ErrUnsupported},
		{"a key of another kind", Master{Name: "RESIDENT"}, keystore.ErrExists},
		{"another protection", Master{Name: "REGISTRATION", Protection: keyspec.HSM}, ErrInput},
		{"no such protection", Master{Name: "ID_REPO", Protection: "paper"}, ErrInput},
		{"escrow of a key in software", Master{Name: "ID_REPO", Escrow: keyspec.EscrowNone}, ErrInput},
		{"an application that is not active", Master{Name: "OLD"}, ErrState},
		{"a bad country", Master{Name: "ID_REPO", Subject: &Holder{DN: DN{C: "ü"}}}, pki.ErrName},
		{"a bad alternative name", Master{Name: "ID_REPO", Subject: &Holder{SANs: []string{"dns:-"}}}, pki.ErrSubject},
	} {
		_, err := h.MasterGenerate(t.Context(), h.admin, &c.m)
		want(t, c.what, err, c.err)
	}
	for name, expected := range map[keyspec.Name]error{
		"ROOT/x": ErrNotMade, "KERNEL/x": ErrNotMade, "REGISTRATION/aes": ErrUnsupported, "KERNEL/IDENTITY_CACHE": ErrUnsupported, "KERNEL/SIGN": ErrNotGenerated,
		"ID_REPO": ErrNotGenerated, "OLD/x": ErrState, "NOBODY/x": ErrApplication, "PARTNER/x": ErrApplication,
	} {
		_, err := h.CertCurrent(t.Context(), h.app, name, nil)
		want(t, string(name), err, expected)
	}
	if _, err := h.SetApplication(t.Context(), h.admin, &Application{Name: "PARTNER"}); err != nil {
		t.Fatal(err)
	}
	_, err = h.CertCurrent(t.Context(), h.app, "PARTNER/x", nil)
	want(t, "PARTNER/x", err, ErrNotMade)
	want(t, "nothing was made", h.store.Load().Apply(t.Context(), keystore.Commit{}), nil)
	if _, err := h.store.Load().Get("ID_REPO"); !errors.Is(err, keystore.ErrNotFound) {
		t.Errorf("a refused key is there: %v", err)
	}
}

// TestHierarchyPolicy: generating is administration, asking for a certificate needs the application.
func TestHierarchyPolicy(t *testing.T) {
	h := newHouse(t)
	h.hierarchy()
	_, err := h.MasterGenerate(t.Context(), h.app, &Master{Name: "KERNEL"})
	want(t, "generate on the application socket", err, ErrNotAvailable)
	_, err = h.SetApplication(t.Context(), h.app, &Application{Name: "X"})
	want(t, "set on the application socket", err, ErrNotAvailable)
	want(t, "accept the clock on the application socket", h.ClockAccept(t.Context(), h.app), ErrDenied)
	_, err = h.Applications(t.Context(), h.app)
	want(t, "list on the application socket", err, ErrDenied)

	p, err := policy.Parse([]byte("version = 1\n[applications]\nREGISTRATION = [4242]\nKERNEL = [7]\n"))
	if err != nil {
		t.Fatal(err)
	}
	h.SetPolicy(p)
	h.base("REGISTRATION/x")
	for _, name := range []keyspec.Name{"REGISTRATION/x", "REGISTRATION/new", "NOBODY/x"} {
		_, err := h.CertCurrent(t.Context(), &Caller{UID: 7}, name, nil)
		want(t, "another's "+string(name), err, ErrNotAvailable)
		_, err = h.CertRequestFor(t.Context(), &Caller{UID: 7}, name, nil)
		want(t, "request for another's "+string(name), err, ErrNotAvailable)
		_, err = h.Certificates(t.Context(), &Caller{UID: 7}, name, 0, 10)
		want(t, "list another's "+string(name), err, ErrNotAvailable)
		if makes, device := h.Making(&Caller{UID: 7}, name); makes || device != "" {
			t.Errorf("%s: %v, %q for one who may not know", name, makes, device)
		}
	}
}

// TestOneMaker: of many who ask for a missing base key at once, one makes it.
func TestOneMaker(t *testing.T) {
	h := newHouse(t)
	h.hierarchy()
	const callers = 64
	got := make([]*Certified, callers)
	var wg sync.WaitGroup
	for i := range callers {
		wg.Go(func() {
			var err error
			if got[i], err = h.CertCurrent(t.Context(), h.app, "REGISTRATION/10001_110011", nil); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	made := 0
	for _, c := range got {
		if c == nil {
			continue
		}
		if c.Made {
			made++
		}
		if !bytes.Equal(c.Chain[0], got[0].Chain[0]) {
			t.Error("two certificates")
		}
	}
	key, err := h.store.Load().Get("REGISTRATION/10001_110011")
	if err != nil || made != 1 || len(key.Versions) != 1 {
		t.Errorf("%d made, %d versions, %v", made, len(key.Versions), err)
	}
	// The same where a key is due, and so is the module key that has to certify its successor.
	h.clock.add(1040 * day)
	for i := range callers {
		wg.Go(func() {
			var err error
			if got[i], err = h.CertCurrent(t.Context(), h.app, "REGISTRATION/10001_110011", nil); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for name, versions := range map[keyspec.Name]int{"REGISTRATION/10001_110011": 2, "REGISTRATION": 2, "ROOT": 1} {
		if key, err := h.store.Load().Get(name); err != nil || len(key.Versions) != versions {
			t.Errorf("%s has %d versions, %v", name, len(key.Versions), err)
		}
	}
	// Who has no more time does not wait for the one who makes.
	done, err := h.makers.take(t.Context(), "REGISTRATION/late")
	if err != nil {
		t.Fatal(err)
	}
	defer done()
	ctx, cancel := timeout(t, 20*time.Millisecond)
	defer cancel()
	_, err = h.CertCurrent(ctx, h.app, "REGISTRATION/late", nil)
	if err == nil || ctx.Err() == nil {
		t.Errorf("waited: %v", err)
	}
}

// TestForce ends the validity of the version before, as often as it is asked for, in one second even.
func TestForce(t *testing.T) {
	h := newHouse(t)
	h.hierarchy()
	now := h.clock.Now()
	base := h.base("REGISTRATION/x")
	first := h.base("REGISTRATION")
	for i := range 3 {
		if i == 2 {
			h.clock.add(time.Second)
		}
		made := h.master(Master{Name: "REGISTRATION", Force: true})
		if !made.Made || made.Ref.Version != keyspec.Version(i+2) {
			t.Fatalf("%+v", made)
		}
		h.checkChain(made)
	}
	key, err := h.Get(t.Context(), h.app, keyspec.Ref{Name: "REGISTRATION"})
	if err != nil || key.Current != 4 {
		t.Fatal(key, err)
	}
	for i, expires := range []time.Time{now, now, now.Add(time.Second)} {
		if v := key.Versions[i]; v.State != keyspec.Deactivated || !v.Expires.Equal(expires) {
			t.Errorf("version %d: %+v", i+1, v)
		}
	}
	list, err := h.Certificates(t.Context(), h.app, "REGISTRATION", 0, 10)
	if err != nil || len(list) != 4 || list[3].KeyID != first.KeyID || list[0].KeyID != first.KeyID || !bytes.Equal(list[3].Chain[0], first.Chain[0]) {
		t.Fatalf("%d certificates, %v", len(list), err)
	}
	if page, err := h.Certificates(t.Context(), h.app, "REGISTRATION", 3, 1); err != nil || len(page) != 1 || page[0].Version != 2 {
		t.Errorf("page %+v, %v", page, err)
	}
	// What is below goes on with the certificates that it has.
	if again := h.base("REGISTRATION/x"); again.Made {
		t.Error("the base key was made again")
	}
	h.opens(base.Ref, encryptTo(t, base, "data"), "data")
	if got := dn(t, leaf(t, h.base("REGISTRATION")).RawSubject); got != dn(t, leaf(t, first).RawSubject) {
		t.Errorf("another subject: %s", got)
	}
	renamed := h.master(Master{Name: "REGISTRATION", Force: true, Subject: &Holder{DN: DN{O: "Other"}, SANs: []string{"dns:r.example"}}})
	if c := leaf(t, renamed); !strings.Contains(dn(t, c.RawSubject), "O=Other") || !slices.Equal(c.DNSNames, []string{"r.example"}) {
		t.Errorf("subject %s, %v", dn(t, c.RawSubject), c.DNSNames)
	}
	// Two versions of one day have one kid: verification tries all of them.
	sign := h.master(Master{Name: "KERNEL/SIGN"})
	sig, err := h.sign(h.app, "KERNEL/SIGN", "message")
	if err != nil {
		t.Fatal(err)
	}
	forced := h.master(Master{Name: "KERNEL/SIGN", Force: true})
	if forced.KeyID != sign.KeyID {
		t.Errorf("kid %s and %s of one day", sign.KeyID, forced.KeyID)
	}
	if v, err := h.verify(h.app, "KERNEL/SIGN", "message", sig); err != nil || v.Version != 1 {
		t.Errorf("%+v, %v", v, err)
	}
}

// TestRotateCertified: key_rotate of a key of the hierarchy makes a version with a certificate.
func TestRotateCertified(t *testing.T) {
	h := newHouse(t)
	h.hierarchy()
	first := h.base("REGISTRATION/x")
	for _, name := range []keyspec.Name{"ROOT", "REGISTRATION", "REGISTRATION/x"} {
		key, err := h.Rotate(t.Context(), h.app, name, time.Time{}, time.Time{}, false)
		if err != nil || key.Current != 2 || key.Versions[0].State != keyspec.Deactivated {
			t.Fatalf("%s: %+v, %v", name, key, err)
		}
		got := h.base(name)
		h.checkChain(got)
		if got.Made || got.Ref.Version != 2 || !key.Versions[1].Expires.Equal(got.Expires) {
			t.Errorf("%+v", got)
		}
		_, err = h.Rotate(t.Context(), h.app, name, time.Time{}, h.clock.Now().Add(day), false)
		want(t, "a period of one's own", err, ErrInput)
	}
	h.opens(first.Ref, encryptTo(t, first, "data"), "data")
	// One that an outside authority has certified waits for that.
	h.create("REGISTRATION/other", keyspec.ECDSAP256)
	if _, err := h.CertSelfSign(t.Context(), h.app, keyspec.Ref{Name: "REGISTRATION/other"}, &pki.Subject{RawName: leaf(t, first).RawSubject}, &pki.Profile{}); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Rotate(t.Context(), h.app, "REGISTRATION/other", time.Time{}, time.Time{}, false); err != nil {
		t.Fatal(err)
	}
	if chain, err := h.CertGet(t.Context(), h.app, keyspec.Ref{Name: "REGISTRATION/other"}); err != nil || len(chain) != 0 {
		t.Errorf("%d certificates, %v", len(chain), err)
	}
	// Without a certificate, and older than a base key gets: it is replaced, not certified.
	h.create("REGISTRATION/old", keyspec.RSA2048, keyspec.Encrypt, keyspec.Decrypt)
	h.clock.add(729 * day)
	if _, err := h.Rotate(t.Context(), h.app, "REGISTRATION/old", time.Time{}, time.Time{}, false); err != nil {
		t.Fatal(err)
	}
	h.clock.add(day)
	if got := h.base("REGISTRATION/old"); got.Ref.Version != 2 || !got.Made {
		t.Errorf("%+v", got)
	}
	h.clock.add(-day)
	_, err := h.Rotate(t.Context(), h.app, "REGISTRATION/old", time.Time{}, time.Time{}, false)
	want(t, "rotate with the clock set back", err, ErrClock)
	_, err = h.CertSelfSign(t.Context(), h.app, keyspec.Ref{Name: "REGISTRATION/other"}, &pki.Subject{RawName: leaf(t, first).RawSubject}, &pki.Profile{})
	want(t, "issue with the clock set back", err, ErrClock)
}

// TestKeyID: a kid does not change, and is the one of the vector in MOSIP's notation.
func TestKeyID(t *testing.T) {
	key := &keystore.Key{Name: "KERNEL/SIGN"}
	v := &keystore.Version{Created: time.Date(2026, 1, 31, 23, 59, 59, 0, time.FixedZone("", -3600)).Add(-time.Hour)}
	p := keystore.Public{SPKI: []byte{1}, Chain: [][]byte{{2}}}
	if got := KeyID(key, v, p); got != "ecHLxBa5gr7XDVp6QNpcFMMGL_tFO0Iry0YxC1bb6sY" {
		t.Errorf("kid %s", got)
	}
	if got := KeyID(key, v, keystore.Public{}); got != "" {
		t.Errorf("kid %s of a symmetric key", got)
	}
	key.Labels = map[string]string{LabelUnique + "0": packet.UniqueIdentifier("KERNEL", "SIGN", v.Created)}
	v.Created = v.Created.Add(48 * time.Hour)
	if got := KeyID(key, v, p); got != "ecHLxBa5gr7XDVp6QNpcFMMGL_tFO0Iry0YxC1bb6sY" {
		t.Errorf("kid %s of an imported version", got)
	}
	key.Labels = nil
	own := KeyID(key, v, p)
	key.Origin = keyspec.Foreign
	if got := KeyID(key, v, p); got == own || got == "" {
		t.Errorf("kid %s of a foreign key", got)
	}
}

// TestRotationOfBaseKeys moves the clock over every boundary of a base key, its module key and the root.
func TestRotationOfBaseKeys(t *testing.T) {
	h := newHouse(t)
	h.hierarchy()
	start := h.clock.Now()
	at := func(d time.Duration) { h.clock.add(start.Add(d).Sub(h.clock.Now())) }
	const name = "REGISTRATION/x"
	first := h.base(name)
	sealed := encryptTo(t, first, "first")
	for _, c := range []struct {
		what                string
		at                  time.Duration
		base, module, roots keyspec.Version
		expires             time.Duration
	}{
		{"just before the key is due", 700*day - time.Second, 1, 1, 1, 730 * day},
		{"when it is due; the module key cuts it short", 700 * day, 2, 1, 1, 1095 * day},
		{"just before the module key is due", 1035*day - time.Second, 2, 1, 1, 1095 * day},
		{"when the module key is due nobody needs another", 1035 * day, 2, 1, 1, 1095 * day},
		{"when the key is due the module key is replaced first; the root cuts that short", 1065 * day, 3, 2, 1, 1795 * day},
		{"just before that is due", 1765*day - time.Second, 3, 2, 1, 1795 * day},
		{"when it is due: the root leaves a month more", 1765 * day, 4, 2, 1, 1825 * day},
		{"a key that is due when nothing can outlive it stays", 1824 * day, 4, 2, 1, 1825 * day},
		{"a second before its end", 1825*day - time.Second, 4, 2, 1, 1825 * day},
	} {
		at(c.at)
		got := h.base(name)
		if got.Ref.Version != c.base || !got.Expires.Equal(start.Add(c.expires)) {
			t.Errorf("%s: %s until day %v", c.what, got.Ref, got.Expires.Sub(start)/day)
		}
		h.checkChain(got)
		for name, versions := range map[keyspec.Name]keyspec.Version{"REGISTRATION": c.module, "ROOT": c.roots} {
			if key, err := h.store.Load().Get(name); err != nil || newest(key) != versions {
				t.Errorf("%s: %s has %d versions, %v", c.what, name, len(key.Versions), err)
			}
		}
		if dn(t, leaf(t, got).RawSubject) != dn(t, leaf(t, first).RawSubject) {
			t.Errorf("%s: another subject", c.what)
		}
		h.opens(keyspec.Ref{Name: name}, sealed, "first")
		h.opens(first.Ref, sealed, "first")
	}
	at(1825 * day) // all is over
	_, err := h.CertCurrent(t.Context(), h.app, name, nil)
	want(t, "after the end of the root", err, ErrExpired)
	h.opens(first.Ref, sealed, "first")
	h.master(Master{Name: "ROOT"})
	h.master(Master{Name: "REGISTRATION"})
	if got := h.base(name); got.Ref.Version != 5 || !got.Expires.Equal(start.Add((1825+730)*day)) {
		t.Errorf("after a new root: %+v", got)
	}
	h.opens(keyspec.Ref{Name: name}, sealed, "first")
	at((1825+700)*day - time.Second)
	if c := h.master(Master{Name: "ROOT"}); c.Made {
		t.Errorf("a root that is not due: %+v", c)
	}
	at((1825 + 700) * day)
	if c := h.master(Master{Name: "ROOT"}); !c.Made || c.Ref.Version != 3 {
		t.Errorf("a root that is due: %+v", c)
	}
	at(3650 * day)
	h.master(Master{Name: "ROOT"})
	h.master(Master{Name: "REGISTRATION"})
	at(time.Date(2038, 1, 19, 3, 14, 8, 0, time.UTC).Sub(start)) // a second after 2^31 - 1
	h.checkChain(h.base(name))
	at(time.Date(2050, 1, 1, 0, 0, 0, 0, time.UTC).Sub(start)) // from where on certificates write four digits of the year
	for _, name := range []keyspec.Name{"ROOT", "REGISTRATION"} {
		h.checkChain(h.master(Master{Name: name}))
	}
	got := h.base(name)
	h.checkChain(got)
	if !got.Expires.Equal(time.Date(2052, 1, 1, 0, 0, 0, 0, time.UTC)) {
		t.Errorf("expires %v", got.Expires)
	}
	h.opens(keyspec.Ref{Name: name}, sealed, "first")
}

// TestRotationThatFails: as long as a key is valid, it is given out, whatever hinders its replacement.
func TestRotationThatFails(t *testing.T) {
	h := newHouse(t)
	h.hierarchy()
	h.base("REGISTRATION/x")
	if _, err := h.Suspend(t.Context(), h.app, keyspec.Ref{Name: "ROOT"}); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Revoke(t.Context(), h.app, keyspec.Ref{Name: "REGISTRATION"}, keyspec.Superseded, ReplaceYes); err != nil {
		t.Fatal(err)
	}
	h.clock.add(710 * day)
	if got := h.base("REGISTRATION/x"); got.Made || got.Ref.Version != 1 {
		t.Errorf("%+v", got)
	}
	if !slices.ContainsFunc(h.records(), func(r string) bool {
		return strings.Contains(r, "REGISTRATION/x") && strings.Contains(r, "not replaced though due")
	}) {
		t.Error("that it was not replaced is not recorded")
	}
	// The next attempt is not made for every request, nor does anybody wait for somebody else's.
	attempts := func() (n int) {
		for _, r := range h.records() {
			if strings.Contains(r, "not replaced though due") {
				n++
			}
		}
		return n
	}
	before := attempts()
	h.base("REGISTRATION/x")
	if n := attempts(); n != before {
		t.Errorf("%d attempts, %d before", n, before)
	}
	h.clock.add(retryReplacement)
	h.base("REGISTRATION/x")
	if n := attempts(); n != before+1 {
		t.Errorf("%d attempts, %d before", n, before)
	}
	h.clock.add(retryReplacement)
	done := h.makers.try("REGISTRATION/x")
	h.base("REGISTRATION/x")
	done()
	if n := attempts(); n != before+1 {
		t.Errorf("%d attempts, %d before", n, before)
	}
	h.clock.add(20 * day)
	_, err := h.CertCurrent(t.Context(), h.app, "REGISTRATION/x", nil)
	want(t, "after its end", err, ErrState)
	if _, err := h.Resume(t.Context(), h.app, keyspec.Ref{Name: "ROOT"}); err != nil {
		t.Fatal(err)
	}
	if got := h.base("REGISTRATION/x"); got.Ref.Version != 2 {
		t.Errorf("%+v", got)
	}
}

// TestRevokedIsReplaced, unless that was ruled out.
func TestRevokedIsReplaced(t *testing.T) {
	h := newHouse(t)
	h.hierarchy()
	for name, replaced := range map[keyspec.Name]bool{"REGISTRATION/a": true, "REGISTRATION/b": false} {
		first := h.base(name)
		sealed := encryptTo(t, first, "data")
		if !replaced {
			if _, err := h.Set(t.Context(), h.app, name, &Settings{Labels: map[string]string{LabelNoReplace: "no"}}); err != nil {
				t.Fatal(err)
			}
			h.base(name)
		}
		if _, err := h.Revoke(t.Context(), h.app, keyspec.Ref{Name: name}, keyspec.Superseded, ReplaceDefault); err != nil {
			t.Fatal(err)
		}
		got, err := h.CertCurrent(t.Context(), h.app, name, nil)
		switch {
		case !replaced:
			want(t, "not to be replaced", err, ErrState)
		case err != nil || got.Ref.Version != 2:
			t.Errorf("%+v, %v", got, err)
		}
		h.opens(first.Ref, sealed, "data")
	}
	h.base("REGISTRATION/c")
	if _, err := h.Suspend(t.Context(), h.app, keyspec.Ref{Name: "REGISTRATION/c"}); err != nil {
		t.Fatal(err)
	}
	_, err := h.CertCurrent(t.Context(), h.app, "REGISTRATION/c", nil)
	want(t, "suspended", err, ErrState)
	h.base("REGISTRATION/d")
	if _, err := h.Destroy(t.Context(), h.app, keyspec.Ref{Name: "REGISTRATION/d"}, time.Hour); err != nil {
		t.Fatal(err)
	}
	_, err = h.CertCurrent(t.Context(), h.app, "REGISTRATION/d", nil)
	want(t, "to be destroyed", err, ErrState)
	h.clock.add(2 * time.Hour)
	if got := h.base("REGISTRATION/d"); got.Ref.Version != 2 {
		t.Errorf("destroyed: %+v", got)
	}
}

// TestRequests: a key that waits for a certificate from outside, and requests for keys that are certified.
func TestRequests(t *testing.T) {
	h := newHouse(t)
	h.hierarchy()
	waiting := h.master(Master{Name: "ID_REPO", CSR: true, Subject: &Holder{DN: DN{CN: "id"}}})
	if !waiting.Made || len(waiting.Chain) != 0 || len(waiting.Request) == 0 {
		t.Fatalf("%+v", waiting)
	}
	request, err := pki.ParseRequest(waiting.Request)
	if err != nil || dn(t, request.RawSubject) != "CN=id,OU=MOSIP-TECH-CENTER,O=IITB,L=BANGALORE,ST=KA,C=IN" {
		t.Fatalf("%v, %v", request, err)
	}
	again := h.master(Master{Name: "ID_REPO"})
	if again.Made || len(again.Chain) != 0 || len(again.Request) == 0 {
		t.Errorf("again: %+v", again)
	}
	_, err = h.CertCurrent(t.Context(), h.app, "ID_REPO", nil)
	want(t, "the certificate that is not there", err, ErrNoCertificate)
	_, err = h.CertCurrent(t.Context(), h.app, "ID_REPO/x", nil)
	want(t, "a base key below", err, ErrNoCertificate)
	// The outside authority, here the root of this house, certifies it.
	chain, err := h.CertIssue(t.Context(), h.app, keyspec.Ref{Name: "ROOT"}, waiting.Request, keyspec.Ref{}, &pki.Subject{}, &pki.Profile{CA: true, PathLen: 1, NotAfter: h.clock.Now().Add(100 * day)})
	if err != nil {
		t.Fatal(err)
	}
	if err := h.CertAttach(t.Context(), h.app, keyspec.Ref{Name: "ID_REPO"}, chain); err != nil {
		t.Fatal(err)
	}
	below := h.base("ID_REPO/x")
	h.checkChain(below)
	if !below.Expires.Equal(h.clock.Now().Add(100 * day)) {
		t.Errorf("a certificate until %v of an issuer until %v", below.Expires, h.clock.Now().Add(100*day))
	}
	if again := h.base("ID_REPO/x"); again.Made {
		t.Error("a key that was cut short is due at once")
	}

	made, err := h.CertRequestFor(t.Context(), h.app, "REGISTRATION/new", nil)
	if err != nil || !made.Made || len(made.Chain) != 3 {
		t.Fatalf("%+v, %v", made, err)
	}
	if request, err = pki.ParseRequest(made.Request); err != nil || !bytes.Equal(request.RawSubject, leaf(t, made).RawSubject) ||
		!bytes.Equal(request.RawSubjectPublicKeyInfo, leaf(t, made).RawSubjectPublicKeyInfo) {
		t.Errorf("%v", err)
	}
	if made, err = h.CertRequestFor(t.Context(), h.app, "REGISTRATION/new", &Holder{DN: DN{O: "Elsewhere"}, SANs: []string{"dns:x.example"}}); err != nil || made.Made {
		t.Fatalf("%+v, %v", made, err)
	}
	if request, err = pki.ParseRequest(made.Request); err != nil || !strings.Contains(dn(t, request.RawSubject), "CN=REGISTRATION-new,OU=MOSIP-TECH-CENTER,O=Elsewhere,") ||
		!slices.Equal(request.DNSNames, []string{"x.example"}) {
		t.Errorf("%v", err)
	}
	_, err = h.sign(h.app, "REGISTRATION/new", "message")
	want(t, "sign with the decryption key nevertheless", err, ErrUsage)
	var records []string
	for _, r := range h.records() {
		if strings.HasPrefix(r, "cert_csr") {
			records = append(records, r)
		}
	}
	slices.Sort(records)
	if !slices.Equal(records, []string{"cert_csr REGISTRATION/new@1 ok", "cert_csr REGISTRATION/new@1 ok generated", "cert_csr REGISTRATION/new@1 ok request"}) {
		t.Errorf("%q", records)
	}
}

// TestCertifiesWhatIsThere: a key that was made or imported without a certificate gets one when it is asked for.
func TestCertifiesWhatIsThere(t *testing.T) {
	h := newHouse(t)
	h.hierarchy()
	h.create("REGISTRATION/plain", keyspec.RSA2048, keyspec.Encrypt, keyspec.Decrypt)
	h.create("REGISTRATION/signs", keyspec.ECDSAP256)
	for name, usage := range map[keyspec.Name]x509.KeyUsage{"REGISTRATION/plain": x509.KeyUsageKeyEncipherment, "REGISTRATION/signs": x509.KeyUsageDigitalSignature} {
		got := h.base(name)
		h.checkChain(got)
		if c := leaf(t, got); !got.Made || got.Ref.Version != 1 || c.KeyUsage != usage || c.IsCA {
			t.Errorf("%s: %+v", name, got)
		}
	}
}

// TestCertificateThatEndsEarlier: a key whose certificate from elsewhere ends before it is due with its certificate.
func TestCertificateThatEndsEarlier(t *testing.T) {
	h := newHouse(t)
	h.hierarchy()
	h.base("REGISTRATION/x")
	if _, err := h.CertIssue(t.Context(), h.app, keyspec.Ref{Name: "ROOT"}, nil, keyspec.Ref{Name: "REGISTRATION/x"}, &pki.Subject{RawName: leaf(t, h.base("REGISTRATION/x")).RawSubject},
		&pki.Profile{NotAfter: h.clock.Now().Add(90 * day)}); err != nil {
		t.Fatal(err)
	}
	h.clock.add(60*day - time.Second)
	if got := h.base("REGISTRATION/x"); got.Made || !got.Expires.Equal(h.clock.Now().Add(30*day+time.Second)) {
		t.Errorf("%+v", got)
	}
	h.clock.add(time.Second)
	if got := h.base("REGISTRATION/x"); !got.Made || got.Ref.Version != 2 {
		t.Errorf("%+v", got)
	}
}

// TestRecertification gives versions new certificates: by their old thumbprints they are still found.
func TestRecertification(t *testing.T) {
	h := newHouse(t)
	h.hierarchy()
	first := h.base("REGISTRATION/x")
	h.clock.add(100 * day)
	module := h.master(Master{Name: "REGISTRATION", Force: true})
	u := &use{Engine: h.Engine, ctx: t.Context(), caller: h.admin, act: &act{op: "renew", ref: keyspec.Ref{Name: "REGISTRATION/x"}, sync: true}, store: h.store.Load(), now: h.clock.Now()}
	u.decision.Allowed = true
	got, err := u.recertify("REGISTRATION/x", 1, time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	h.checkChain(got)
	if !bytes.Equal(got.Chain[1], module.Chain[0]) || got.KeyID != first.KeyID || !got.Expires.Equal(first.Expires) || !bytes.Equal(leaf(t, got).RawSubject, leaf(t, first).RawSubject) {
		t.Errorf("%+v", got)
	}
	again := h.base("REGISTRATION/x")
	if again.Made || !bytes.Equal(again.Chain[0], got.Chain[0]) {
		t.Errorf("%+v", again)
	}
	for i, c := range []*Certified{first, got} {
		sum := sha256.Sum256(c.Chain[0])
		key, number, err := h.Find(t.Context(), h.app, keystore.AliasThumbprint, sum[:])
		if err != nil || key.Name != "REGISTRATION/x" || number != 1 {
			t.Errorf("thumbprint %d: %v, %d, %v", i, key, number, err)
		}
	}
	// The root renews its own certificate.
	until := h.clock.Now().Add(4000 * day)
	root := &use{Engine: h.Engine, ctx: t.Context(), caller: h.admin, act: &act{op: "renew", ref: keyspec.Ref{Name: RootName}, sync: true}, store: h.store.Load(), now: h.clock.Now()}
	root.decision.Allowed = true
	got, err = root.recertify(RootName, 1, until)
	if err != nil || !got.Expires.Equal(until) || leaf(t, got).CheckSignatureFrom(leaf(t, got)) != nil {
		t.Fatalf("%+v, %v", got, err)
	}
	h.checkChain(h.master(Master{Name: "REGISTRATION", Force: true}))
	if key, err := h.Get(t.Context(), h.app, keyspec.Ref{Name: RootName}); err != nil || !key.Versions[0].Expires.Equal(until) {
		t.Errorf("%+v, %v", key, err)
	}
}

// TestSymmetric: AES keys of an application.
func TestSymmetric(t *testing.T) {
	h := newHouse(t)
	now := h.clock.Now()
	first := h.master(Master{Name: "KERNEL/IDENTITY_CACHE"})
	if !first.Made || first.KeyID != "" || len(first.Chain) != 0 || !first.Expires.Equal(now.Add(3650*day)) {
		t.Errorf("%+v", first)
	}
	if again := h.master(Master{Name: "KERNEL/IDENTITY_CACHE"}); again.Made || again.Ref != first.Ref {
		t.Errorf("again: %+v", again)
	}
	if other := h.master(Master{Name: "REGISTRATION/cache", Symmetric: true}); !other.Made {
		t.Errorf("%+v", other)
	}
	sealed := h.encrypt("REGISTRATION/cache", "data")
	h.clock.add(3650*day - time.Second)
	if again := h.master(Master{Name: "REGISTRATION/cache", Symmetric: true}); again.Made {
		t.Errorf("before the end: %+v", again)
	}
	h.clock.add(time.Second)
	for _, m := range []Master{{Name: "REGISTRATION/cache", Symmetric: true}, {Name: "KERNEL/IDENTITY_CACHE"}} {
		if again := h.master(m); !again.Made || again.Ref.Version != 2 {
			t.Errorf("at the end: %+v", again)
		}
	}
	if data, err := h.decrypt(h.app, "REGISTRATION/cache", sealed); err != nil || data != "data" {
		t.Errorf("%q, %v", data, err)
	}
	key, err := h.store.Load().Get("KERNEL/IDENTITY_CACHE")
	if err != nil || key.Algorithm != keyspec.AES256GCM {
		t.Errorf("%v, %v", key, err)
	}
}

// TestHierarchyInDevices: root, module and sign keys in a device sign and unwrap there; without it the base keys of the application stay
// closed.
func TestHierarchyInDevices(t *testing.T) {
	h, k := newResidentHouse(t)
	h.master(Master{Name: "ROOT", Protection: keyspec.HSM})
	h.master(Master{Name: "REGISTRATION", Protection: keyspec.HSM, Escrow: keyspec.EscrowNone})
	h.checkChain(h.master(Master{Name: "REGISTRATION/SIGN", Protection: keyspec.HSM}))
	base := h.base("REGISTRATION/x")
	h.checkChain(base)
	if key, err := h.store.Load().Get("REGISTRATION/x"); err != nil || key.Protection != keyspec.Software {
		t.Errorf("%v, %v", key, err)
	}
	sealed := encryptTo(t, base, "data")
	h.cold()
	if makes, device := h.Making(h.app, "REGISTRATION/new"); !makes || device != keyspec.HSM {
		t.Errorf("making a new key: %v, %q", makes, device)
	}
	k.set(func() { k.fault = &enclave.Error{Kind: enclave.ErrAbsent} })
	_, _, err := h.Decrypt(t.Context(), h.app, base.Ref, sealed, nil, nil, nil)
	want(t, "decrypt without the device", err, enclave.ErrAbsent)
	_, err = h.CertCurrent(t.Context(), h.app, "REGISTRATION/new", nil)
	want(t, "make without the device", err, enclave.ErrAbsent)
	k.set(func() { k.fault = nil })
	h.opens(base.Ref, sealed, "data")
	before := k.count()
	h.checkChain(h.master(Master{Name: "REGISTRATION", Force: true}))
	if n := k.count(); n != before+1 { // another module key, and another guard key in place of the one before
		t.Errorf("%d keys in the device, %d before", n, before)
	}
	h.cold()
	h.opens(base.Ref, sealed, "data")
	// A device that fails in the middle leaves nothing behind, on either side.
	k.set(func() { k.lie = true })
	count := k.count()
	if _, err := h.MasterGenerate(t.Context(), h.admin, &Master{Name: "REGISTRATION", Force: true}); err == nil {
		t.Error("generated by a device that signs wrong")
	}
	k.set(func() { k.lie = false })
	if key, err := h.store.Load().Get("REGISTRATION"); err != nil || newest(key) != 2 || k.count() != count {
		t.Errorf("%v, %v, %d keys in the device, %d before", key, err, k.count(), count)
	}
	if info := fmt.Sprint(h.records()); !strings.Contains(info, "master_generate REGISTRATION@2 ok generated by force") {
		t.Error(info)
	}
}
