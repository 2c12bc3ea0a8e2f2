package engine

import (
	"bytes"
	"context"
	"crypto"
	"crypto/hpke"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"sync"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/client/packet"
	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// past is a key as another key manager had it.
type past struct {
	key     *rsa.PrivateKey
	der     []byte
	parsed  *x509.Certificate
	created time.Time
	expires time.Time
}

// deploy makes a key whose certificate issuer has signed.
func (h *house) deploy(issuer *past, daysAgo, days int) *past {
	h.t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		h.t.Fatal(err)
	}
	created := h.clock.Now().AddDate(0, 0, -daysAgo)
	p := &past{key: key, created: created, expires: created.AddDate(0, 0, days)}
	template := &x509.Certificate{SerialNumber: big.NewInt(7), NotBefore: p.created, NotAfter: p.expires, Subject: pkix.Name{CommonName: "x"},
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	parent, signer := template, crypto.Signer(key)
	if issuer != nil {
		parent, signer = issuer.parsed, issuer.key
	}
	if p.der, err = x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer); err != nil {
		h.t.Fatal(err)
	}
	if p.parsed, err = x509.ParseCertificate(p.der); err != nil {
		h.t.Fatal(err)
	}
	return p
}

func (p *past) pkcs8(t testing.TB) []byte {
	b, err := x509.MarshalPKCS8PrivateKey(p.key)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// wrapped is p as key_store has it.
func (p *past) wrapped(t testing.TB, module *past) Generation {
	t.Helper()
	blob, err := packet.WrapPrivateKey(&module.key.PublicKey, p.pkcs8(t))
	if err != nil {
		t.Fatal(err)
	}
	return Generation{Created: p.created, Expires: p.expires, Certificate: p.der, Wrapped: blob, Module: sha256.Sum256(module.parsed.RawSubjectPublicKeyInfo)}
}

// sealed is a migration of keys whose private halves come along.
func (h *house) sealed(name keyspec.Name, keys ...*past) *Migration {
	h.t.Helper()
	public, token, err := h.ImportBegin(h.t.Context(), h.admin)
	if err != nil {
		h.t.Fatal(err)
	}
	m := &Migration{Name: name, Algorithm: keyspec.RSA2048, Token: &token}
	for _, p := range keys {
		m.Generations = append(m.Generations, Generation{Created: p.created, Expires: p.expires, Certificate: p.der, Sealed: h.seal(public, p.pkcs8(h.t))})
	}
	return m
}

func (h *house) seal(public, secret []byte) []byte {
	h.t.Helper()
	to, err := hpke.MLKEM768X25519().NewPublicKey(public)
	if err != nil {
		h.t.Fatal(err)
	}
	b, err := hpke.Seal(to, hpke.HKDFSHA256(), hpke.AES256GCM(), []byte(importInfo), secret)
	if err != nil {
		h.t.Fatal(err)
	}
	return b
}

func (h *house) migrated(m *Migration, outcome Outcome) *keystore.Key {
	h.t.Helper()
	key, got, err := h.Migrate(h.t.Context(), h.admin, m)
	if err != nil || got != outcome {
		h.t.Fatalf("%s: %s, %v", m.Name, got, err)
	}
	return key
}

// reopens has the engine open what was encrypted to a key before it came here.
func (h *house) reopens(p *past, ref keyspec.Ref) {
	h.t.Helper()
	secret := []byte("what was encrypted before")
	sealed, err := rsa.EncryptOAEP(sha256.New(), rand.Reader, &p.key.PublicKey, secret, nil)
	if err != nil {
		h.t.Fatal(err)
	}
	got, _, err := h.Decrypt(h.t.Context(), h.app, ref, sealed, nil, nil, nil)
	if err != nil || !bytes.Equal(got, secret) {
		h.t.Errorf("%s: %q, %v", ref, got, err)
	}
}

// TestMigrate brings a small deployment in and uses it.
func TestMigrate(t *testing.T) {
	h := newHouse(t)
	root := h.deploy(nil, 1500, 2920)
	old, module := h.deploy(root, 1400, 1095), h.deploy(root, 300, 1095)
	base := []*past{h.deploy(old, 1200, 730), h.deploy(module, 200, 730)}
	other := h.deploy(nil, 10, 365)

	h.migrated(h.sealed("ROOT", root), Made)
	key := h.migrated(h.sealed("REGISTRATION", old, module), Made)
	if key.Profile != "mosip-module" || key.Current != 2 || key.Versions[0].State != keyspec.Deactivated || key.Versions[1].State != keyspec.Active || !key.Versions[0].Created.Equal(old.created) {
		t.Errorf("%+v", key)
	}
	m := &Migration{Name: "REGISTRATION/10001_1", Algorithm: keyspec.RSA2048, Generations: []Generation{base[0].wrapped(t, old), base[1].wrapped(t, module)}}
	m.Generations[0].Unique = "0123456789ABCDEF0123456789ABCDEF01234567"
	key = h.migrated(m, Made)
	if key.Labels[LabelUnique+"1"] != m.Generations[0].Unique || key.Origin != keyspec.Imported || key.Exportable {
		t.Errorf("%+v", key)
	}
	h.reopens(base[0], keyspec.Ref{Name: m.Name, Version: 1}) // expired, under a module key that is expired
	h.reopens(base[1], keyspec.Ref{Name: m.Name})
	_, _, stored, err := h.Public(t.Context(), h.app, keyspec.Ref{Name: m.Name, Version: 1})
	if err != nil || len(stored.Chain) != 3 || !bytes.Equal(stored.Chain[1], old.der) || !bytes.Equal(stored.Chain[2], root.der) {
		t.Errorf("chain of %d, %v", len(stored.Chain), err)
	}
	sum := sha256.Sum256(base[0].der)
	if found, number, err := h.Find(t.Context(), h.app, keystore.AliasThumbprint, sum[:]); err != nil || found.Name != m.Name || number != 1 {
		t.Errorf("by thumbprint: %v", err)
	}

	foreign := &Migration{Name: "PARTNER/p", Algorithm: keyspec.RSA2048, Generations: []Generation{{Created: other.created, Expires: other.expires, Certificate: other.der}}}
	if _, _, err := h.Migrate(t.Context(), h.admin, foreign); !errors.Is(err, ErrApplication) {
		t.Errorf("an application that is not there: %v", err)
	}
	if _, err := h.SetApplication(t.Context(), h.admin, &Application{Name: "PARTNER", Inactive: true}); err != nil {
		t.Fatal(err)
	}
	if key = h.migrated(foreign, Made); key.Origin != keyspec.Foreign {
		t.Errorf("%+v", key)
	}
	h.migrated(foreign, Present)

	secret := bytes.Repeat([]byte{7}, 32)
	symmetric := func(secret []byte) *Migration {
		public, token, err := h.ImportBegin(t.Context(), h.admin)
		if err != nil {
			t.Fatal(err)
		}
		return &Migration{Name: "KERNEL/IDENTITY_CACHE", Algorithm: keyspec.AES256GCM, Token: &token,
			Generations: []Generation{{Created: other.created, Expires: other.expires, Sealed: h.seal(public, secret)}}}
	}
	h.migrated(symmetric(secret), Made)
	h.migrated(symmetric(secret), Present)
	if _, _, err := h.Migrate(t.Context(), h.admin, symmetric(make([]byte, 32))); !errors.Is(err, ErrDiffers) {
		t.Errorf("another symmetric key: %v", err)
	}

	// All again: nothing changes.
	h.migrated(h.sealed("ROOT", root), Present)
	h.migrated(h.sealed("REGISTRATION", old, module), Present)
	before, err := h.store.Load().Get(m.Name)
	if err != nil {
		t.Fatal(err)
	}
	h.migrated(m, Present)
	if after, err := h.store.Load().Get(m.Name); err != nil || after.Revision != before.Revision {
		t.Errorf("revision %d became %d, %v", before.Revision, after.Revision, err)
	}

	// The deployment has gone on meanwhile.
	newer := h.deploy(module, 2, 730)
	m.Generations = append(m.Generations, newer.wrapped(t, module))
	if key = h.migrated(m, Extended); key.Current != 3 || key.Versions[1].State != keyspec.Deactivated || len(key.Versions) != 3 {
		t.Errorf("%+v", key)
	}
	h.reopens(base[0], keyspec.Ref{Name: m.Name, Version: 1})
	h.reopens(newer, keyspec.Ref{Name: m.Name})
	m.Generations = m.Generations[:1]
	h.migrated(m, Present) // an older copy

	// And the keys go on here: a base key that is current is found, one that is due is made.
	c, err := h.CertCurrent(t.Context(), h.admin, m.Name, nil)
	if err != nil || c.Made || c.Ref.Version != 3 || c.KeyID != packet.KeyID(packet.UniqueIdentifier("REGISTRATION", "10001_1", newer.created)) {
		t.Fatalf("%+v, %v", c, err)
	}
	h.clock.add(735 * 24 * time.Hour)
	if c, err = h.CertCurrent(t.Context(), h.admin, m.Name, nil); err != nil || !c.Made || c.Ref.Version != 4 {
		t.Fatalf("%+v, %v", c, err)
	}
	m.Generations = []Generation{base[0].wrapped(t, old), base[1].wrapped(t, module), newer.wrapped(t, module)}
	h.migrated(m, Present)
}

// TestMigrateRefused: what does not belong together is not brought in, and nothing of it.
func TestMigrateRefused(t *testing.T) {
	h := newHouse(t)
	root := h.deploy(nil, 1500, 2920)
	module, kernel := h.deploy(root, 300, 1095), h.deploy(root, 300, 1095)
	base, second := h.deploy(module, 200, 730), h.deploy(module, 100, 730)
	h.migrated(h.sealed("ROOT", root), Made)
	h.migrated(h.sealed("REGISTRATION", module), Made)
	h.migrated(h.sealed("KERNEL", kernel), Made)
	const name = "REGISTRATION/10001_1"
	good := base.wrapped(t, module)
	for what, c := range map[string]struct {
		change func(g *Generation)
		want   error
	}{
		"another certificate":   {func(g *Generation) { g.Certificate = second.der }, ErrInput},
		"no module key":         {func(g *Generation) { g.Module[0] ^= 1 }, ErrState},
		"of another module key": {func(g *Generation) { *g = base.wrapped(t, kernel) }, ErrState},
		"wrapped for another":   {func(g *Generation) { g.Wrapped = base.wrapped(t, kernel).Wrapped }, ErrDecryption},
		"changed":               {func(g *Generation) { g.Wrapped = bytes.Clone(g.Wrapped); g.Wrapped[300] ^= 1 }, ErrDecryption},
		"cut":                   {func(g *Generation) { g.Wrapped = g.Wrapped[:250] }, ErrInput},
		"expires before":        {func(g *Generation) { g.Expires = g.Created }, ErrInput},
		"from the future":       {func(g *Generation) { g.Created = h.clock.Now().Add(time.Hour) }, ErrInput},
		"two private halves":    {func(g *Generation) { g.Sealed = []byte{1} }, ErrInput},
		"a device":              {func(g *Generation) { g.Reference, g.Wrapped = []byte("x"), nil }, ErrInput},
		"no certificate":        {func(g *Generation) { g.Certificate = nil }, ErrInput},
		"nonsense":              {func(g *Generation) { g.Certificate = []byte("x") }, ErrInput},
		"sealed to nobody":      {func(g *Generation) { g.Sealed, g.Wrapped = []byte{1}, nil }, ErrInput},
	} {
		g := good
		c.change(&g)
		if _, _, err := h.Migrate(t.Context(), h.admin, &Migration{Name: name, Algorithm: keyspec.RSA2048, Generations: []Generation{g}}); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", what, err)
		}
		// Behind a good one: nothing of either is there.
		if c.want != ErrInput || what == "another certificate" {
			if _, _, err := h.Migrate(t.Context(), h.admin, &Migration{Name: name, Algorithm: keyspec.RSA2048, Generations: []Generation{second.wrapped(t, module), g}}); err == nil {
				t.Errorf("%s, as the second: brought in", what)
			}
		}
	}
	swapped := []Generation{second.wrapped(t, module), good}
	twice := []Generation{good, good}
	mixed := []Generation{good, {Created: second.created, Expires: second.expires, Certificate: second.der}}
	for _, list := range [][]Generation{nil, swapped, twice, mixed, make([]Generation, keyspec.MaxVersions+1)} {
		if _, _, err := h.Migrate(t.Context(), h.admin, &Migration{Name: name, Algorithm: keyspec.RSA2048, Generations: list}); !errors.Is(err, ErrInput) {
			t.Errorf("%d generations: %v", len(list), err)
		}
	}
	if _, _, err := h.Migrate(t.Context(), h.admin, &Migration{Name: "KERNEL", Algorithm: keyspec.RSA2048, Generations: []Generation{good}}); !errors.Is(err, ErrInput) {
		t.Errorf("a wrapped module key: %v", err)
	}
	if _, err := h.Get(t.Context(), h.admin, keyspec.Ref{Name: name}); !errors.Is(err, ErrNotAvailable) {
		t.Errorf("something was brought in: %v", err)
	}
	// What differs from what is there is refused, and what is there stays.
	h.migrated(&Migration{Name: name, Algorithm: keyspec.RSA2048, Generations: []Generation{good}}, Made)
	if _, _, err := h.Migrate(t.Context(), h.admin, &Migration{Name: name, Algorithm: keyspec.RSA2048, Generations: []Generation{second.wrapped(t, module)}}); !errors.Is(err, ErrDiffers) {
		t.Errorf("another key: %v", err)
	}
	h.reopens(base, keyspec.Ref{Name: name})
	if _, _, err := h.Migrate(t.Context(), &Caller{UID: 4711, PID: 1}, &Migration{Name: name, Algorithm: keyspec.RSA2048, Generations: []Generation{good}}); !errors.Is(err, ErrNotAvailable) && !errors.Is(err, ErrDenied) {
		t.Errorf("somebody else: %v", err)
	}
	// A token is good for one request.
	m := h.sealed("RESIDENT", h.deploy(root, 10, 1095))
	h.migrated(m, Made)
	if _, _, err := h.Migrate(t.Context(), h.admin, m); !errors.Is(err, ErrInput) {
		t.Errorf("a spent token: %v", err)
	}
}

// TestMigrateAtOnce: many who bring in the same key make one.
func TestMigrateAtOnce(t *testing.T) {
	h := newHouse(t)
	root := h.deploy(nil, 1500, 2920)
	module := h.deploy(root, 300, 1095)
	base := h.deploy(module, 200, 730)
	h.migrated(h.sealed("ROOT", root), Made)
	h.migrated(h.sealed("REGISTRATION", module), Made)
	var mu sync.Mutex
	outcomes := make(map[Outcome]int)
	var group sync.WaitGroup
	for range 16 {
		m := &Migration{Name: "REGISTRATION/x", Algorithm: keyspec.RSA2048, Generations: []Generation{base.wrapped(t, module)}}
		group.Go(func() {
			_, outcome, err := h.Migrate(context.Background(), h.admin, m)
			if err != nil {
				t.Error(err)
			}
			mu.Lock()
			defer mu.Unlock()
			outcomes[outcome]++
		})
	}
	group.Wait()
	if outcomes[Made] != 1 || outcomes[Present] != 15 {
		t.Error(outcomes)
	}
}

// TestExportMOSIP: a base key goes back as it came, when that is asked for twice over.
func TestExportMOSIP(t *testing.T) {
	h := newHouse(t)
	root := h.deploy(nil, 1500, 2920)
	old, module := h.deploy(root, 1400, 1095), h.deploy(root, 300, 1095)
	base := h.deploy(module, 200, 730)
	h.migrated(h.sealed("ROOT", root), Made)
	h.migrated(h.sealed("REGISTRATION", old, module), Made)
	h.migrated(&Migration{Name: "REGISTRATION/x", Algorithm: keyspec.RSA2048, Generations: []Generation{base.wrapped(t, module)}}, Made)
	ref := keyspec.Ref{Name: "REGISTRATION/x"}
	if _, err := h.ExportMOSIP(t.Context(), h.admin, ref, 0, false); !errors.Is(err, ErrUsage) {
		t.Errorf("not exportable, not confirmed: %v", err)
	}
	for number, wrapper := range map[keyspec.Version]*past{0: module, 1: old, 2: module} {
		out, err := h.ExportMOSIP(t.Context(), h.admin, ref, number, true)
		if err != nil {
			t.Fatal(err)
		}
		pkcs8, err := packet.UnwrapPrivateKey(t.Context(), rsaUnwrapper{wrapper.key}, out.Wrapped)
		if err != nil {
			t.Fatal(err)
		}
		key, err := x509.ParsePKCS8PrivateKey(pkcs8)
		private, ok := key.(*rsa.PrivateKey) // its primes may have changed places
		if err != nil || !ok || !base.key.PublicKey.Equal(&private.PublicKey) || private.Validate() != nil || !bytes.Equal(out.Issuer, wrapper.der) || !bytes.Equal(out.Chain[0], base.der) || out.Ref.Version != 1 {
			t.Errorf("another key than went in, by %s", out.Module)
		}
		if bytes.Contains(out.Wrapped, pkcs8[40:80]) {
			t.Error("the key in plain")
		}
	}
	if _, err := h.ExportMOSIP(t.Context(), h.admin, ref, 3, true); err == nil {
		t.Error("by a version that is not there")
	}
	for _, name := range []keyspec.Name{"REGISTRATION", "ROOT"} {
		if _, err := h.ExportMOSIP(t.Context(), h.admin, keyspec.Ref{Name: name}, 0, true); !errors.Is(err, ErrUnsupported) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := h.ExportMOSIP(t.Context(), &Caller{UID: 4711, PID: 1}, ref, 0, true); err == nil {
		t.Error("somebody else")
	}
	if _, err := h.Revoke(t.Context(), h.admin, ref, keyspec.KeyCompromise, ReplaceNo); err != nil {
		t.Fatal(err)
	}
	ref.Version = 1 // there may be another in its place now
	if _, err := h.ExportMOSIP(t.Context(), h.admin, ref, 0, true); !errors.Is(err, ErrState) {
		t.Errorf("a compromised key: %v", err)
	}
}

// TestExportMOSIPCompromised: nothing is wrapped by a module key that others may have.
func TestExportMOSIPCompromised(t *testing.T) {
	h := newHouse(t)
	root := h.deploy(nil, 1500, 2920)
	old, module := h.deploy(root, 1400, 1095), h.deploy(root, 300, 1095)
	h.migrated(h.sealed("ROOT", root), Made)
	h.migrated(h.sealed("REGISTRATION", old, module), Made)
	h.migrated(&Migration{Name: "REGISTRATION/x", Algorithm: keyspec.RSA2048, Generations: []Generation{h.deploy(module, 200, 730).wrapped(t, module)}}, Made)
	if _, err := h.Revoke(t.Context(), h.admin, keyspec.Ref{Name: "REGISTRATION", Version: 1}, keyspec.KeyCompromise, ReplaceDefault); err != nil {
		t.Fatal(err)
	}
	ref := keyspec.Ref{Name: "REGISTRATION/x", Version: 1}
	if _, err := h.ExportMOSIP(t.Context(), h.admin, ref, 1, true); !errors.Is(err, ErrState) {
		t.Errorf("by a compromised module key: %v", err)
	}
	if _, err := h.ExportMOSIP(t.Context(), h.admin, ref, 2, true); err != nil {
		t.Error(err)
	}
}

// TestMigrateUnique: of more generations with a uni_ident of their own than a key has room for, the newest keep it, and the kid with it.
func TestMigrateUnique(t *testing.T) {
	const n = maxUnique + 3
	m := &keystore.Key{Labels: map[string]string{"mine": "stays"}}
	unique := func(i int) string { return fmt.Sprintf("%040X", i) }
	for i := 1; i <= n; i++ {
		m.Versions = append(m.Versions, keystore.Version{Number: keyspec.Version(i)})
		setUnique(m, keyspec.Version(i), unique(i))
	}
	if len(m.Labels) != maxUnique || m.Labels["mine"] != "stays" {
		t.Errorf("%d labels: %v", len(m.Labels), m.Labels)
	}
	for i := n; i > n-maxUnique+1; i-- {
		if m.Labels[fmt.Sprint(LabelUnique, i)] != unique(i) {
			t.Errorf("version %d has lost its own", i)
		}
	}
}

type rsaUnwrapper struct{ key *rsa.PrivateKey }

func (u rsaUnwrapper) Unwrap(_ context.Context, _ [32]byte, wrapped []byte) ([]byte, error) {
	return rsa.DecryptOAEP(sha256.New(), nil, u.key, wrapped, nil)
}
