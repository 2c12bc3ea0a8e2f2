package engine

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/mechanism"
	"github.com/kmsd-project/kmsd/kmsd/pki"
	"github.com/kmsd-project/kmsd/policy"
)

// TestHolderIsNotForModules: who may use an application does not choose under which name the root certifies it.
func TestHolderIsNotForModules(t *testing.T) {
	h := newHouse(t)
	h.hierarchy()
	h.master(Master{Name: "REGISTRATION/SIGN"})
	h.clock.add(1050 * day)
	for _, name := range []keyspec.Name{"REGISTRATION", "REGISTRATION/SIGN"} {
		got, err := h.CertCurrent(t.Context(), h.app, name, &Holder{DN: DN{CN: "www.mosip.io (KERNEL)"}, SANs: []string{"dns:kernel.example"}})
		if err != nil || !got.Made {
			t.Fatalf("%s: %+v, %v", name, got, err)
		}
		if c := leaf(t, got); strings.Contains(dn(t, c.RawSubject), "KERNEL") || len(c.DNSNames) > 0 {
			t.Errorf("%s became %s, %v", name, dn(t, c.RawSubject), c.DNSNames)
		}
	}
}

// TestRootCertifiesNothingByHand: a key that somebody has made under the name of a module or sign key is not certified by the root because
// it is over; an administrator has to generate one.
func TestRootCertifiesNothingByHand(t *testing.T) {
	h := newHouse(t)
	h.hierarchy()
	expires := h.clock.Now().Add(time.Hour)
	for _, n := range []*NewKey{
		{Name: "ID_REPO", Algorithm: keyspec.RSA2048, Profile: mechanism.ProfileMOSIPModule, Expires: expires},
		{Name: "RESIDENT", Algorithm: keyspec.RSA2048, Profile: mechanism.ProfileMOSIPModule, Expires: expires},
		{Name: "ID_REPO/SIGN", Algorithm: keyspec.RSA2048, Usages: []keyspec.Usage{keyspec.Sign, keyspec.Verify}, Expires: expires},
	} {
		if _, err := h.Create(t.Context(), h.app, n, nil); err != nil {
			t.Fatal(err)
		}
	}
	name, err := pki.ParseName("CN=www.mosip.io (KERNEL)")
	if err != nil {
		t.Fatal(err)
	}
	for _, name1 := range []keyspec.Name{"RESIDENT", "ID_REPO/SIGN"} {
		if _, err := h.CertSelfSign(t.Context(), h.app, keyspec.Ref{Name: name1}, &pki.Subject{RawName: name}, &pki.Profile{}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := h.Revoke(t.Context(), h.app, keyspec.Ref{Name: "ID_REPO"}, keyspec.Superseded, ReplaceYes); err != nil {
		t.Fatal(err)
	}
	h.clock.add(2 * time.Hour)
	for _, name := range []keyspec.Name{"ID_REPO", "RESIDENT", "ID_REPO/SIGN"} {
		got, err := h.CertCurrent(t.Context(), h.app, name, nil)
		want(t, string(name), err, ErrNoCertificate)
		if got != nil {
			t.Errorf("%s: %v by %s", name, got.Ref, dn(t, leaf(t, got).RawIssuer))
		}
		h.checkChain(h.master(Master{Name: name}))
	}
}

// TestRequestWithoutIssuer: the module key waits for its certificate, so there is no base key to ask for a request of.
func TestRequestWithoutIssuer(t *testing.T) {
	h := newHouse(t)
	h.master(Master{Name: RootName})
	h.master(Master{Name: "REGISTRATION", CSR: true})
	_, err := h.CertRequestFor(t.Context(), h.app, "REGISTRATION/x", nil)
	want(t, "request", err, ErrNoCertificate)
}

// TestNotYetValid: what was certified by a clock that ran ahead is replaced when the time has been accepted.
func TestNotYetValid(t *testing.T) {
	h := newHouse(t)
	h.master(Master{Name: RootName})
	h.clock.add(365 * 10 * day)
	h.master(Master{Name: RootName})
	h.master(Master{Name: "REGISTRATION"})
	h.base("REGISTRATION/x")
	h.clock.add(-365 * 10 * day)
	if got := h.base("REGISTRATION/x"); got.Made {
		t.Errorf("replaced behind the time: %v", got.Ref)
	}
	want(t, "accept", h.ClockAccept(t.Context(), h.admin), nil)
	if got := h.base("REGISTRATION/x"); got.Made {
		t.Errorf("replaced without a root: %v", got.Ref)
	}
	h.clock.add(time.Hour)
	if got := h.master(Master{Name: RootName}); !got.Made {
		t.Errorf("%v is not replaced", got.Ref)
	}
	got := h.base("REGISTRATION/x")
	if !got.Made || got.Ref.Version != 2 {
		t.Errorf("%v", got.Ref)
	}
	h.checkChain(got)
	if again := h.base("REGISTRATION/x"); again.Made {
		t.Errorf("%v once more", again.Ref)
	}
}

// TestNotYetValidIsRenewed: kmsd does so by itself, from the root downwards.
func TestNotYetValidIsRenewed(t *testing.T) {
	h := newHouse(t)
	h.clock.add(365 * 10 * day)
	h.hierarchy()
	h.base("REGISTRATION/x")
	h.clock.add(-365 * 10 * day)
	want(t, "accept", h.ClockAccept(t.Context(), h.admin), nil)
	if _, err := h.Renew(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, name := range []keyspec.Name{"ROOT", "REGISTRATION", "REGISTRATION/x"} {
		got := h.base(name)
		if got.Made || got.Ref.Version != 2 {
			t.Errorf("%v", got.Ref)
		}
		h.checkChain(got)
	}
}

// TestForeignIsNotRotated: also where our own module key has certified somebody else's key.
func TestForeignIsNotRotated(t *testing.T) {
	h := newHouse(t)
	h.hierarchy()
	partner := newHouse(t)
	partner.hierarchy()
	request, err := partner.CertRequestFor(t.Context(), partner.app, "REGISTRATION/x", nil)
	if err != nil {
		t.Fatal(err)
	}
	now := h.clock.Now()
	chain, err := h.CertIssue(t.Context(), h.app, keyspec.Ref{Name: "REGISTRATION"}, request.Request, keyspec.Ref{}, &pki.Subject{},
		&pki.Profile{NotBefore: now, NotAfter: now.Add(day), KeyUsage: []string{"keyEncipherment"}})
	if err != nil {
		t.Fatal(err)
	}
	certificate, err := pki.ParseCertificate(chain[0])
	if err != nil {
		t.Fatal(err)
	}
	module := parsedAt(t, h.base("REGISTRATION"), 0)
	if _, err := h.CertUploadOther(t.Context(), h.app, "REGISTRATION/partner", []*x509.Certificate{certificate, module}, ""); err != nil {
		t.Fatal(err)
	}
	_, err = h.Rotate(t.Context(), h.app, "REGISTRATION/partner", time.Time{}, time.Time{}, false)
	want(t, "rotate", err, ErrUnsupported)
}

// TestPeriodsAreKept: what is set is what happens, whatever the numbers.
func TestPeriodsAreKept(t *testing.T) {
	h := newHouse(t)
	h.hierarchy()
	_, err := h.SetApplication(t.Context(), h.admin, &Application{Name: "REGISTRATION", BaseDays: 100, BasePreExpireDays: 90})
	want(t, "set", err, nil)
	for i, d := range []time.Duration{0, 10*day - time.Second, time.Second} {
		h.clock.add(d)
		if got := h.base("REGISTRATION/x"); got.Made != (i != 1) {
			t.Errorf("at step %d made: %v", i, got.Made)
		}
	}
	if got := fitting(days(maxDays-1), days(maxDays)); got > 2*days(maxDays)/3 {
		t.Errorf("%v of %v", got, days(maxDays))
	}
	for _, c := range [][3]int{{0, 1, 0}, {1, 1, 0}, {2, 3, 2}, {60, 90, 60}, {61, 90, 30}, {1125, 1825, 1125}} {
		if got := fitting(c[0], c[1]); got != c[2] {
			t.Errorf("fitting(%d, %d) = %d", c[0], c[1], got)
		}
	}
}

// TestGrantEndsWhileWaiting: who has lost his grant while somebody else was making gets nothing when his turn comes.
func TestGrantEndsWhileWaiting(t *testing.T) {
	h := newHouse(t)
	h.hierarchy()
	p, err := policy.Parse([]byte("version = 1\n[applications]\nREGISTRATION = [7]\n"))
	if err != nil {
		t.Fatal(err)
	}
	h.SetPolicy(p)
	done, err := h.makers.take(t.Context(), "REGISTRATION/x")
	if err != nil {
		t.Fatal(err)
	}
	failed := make(chan error)
	started := make(chan struct{})
	go func() {
		close(started)
		_, err := h.CertCurrent(context.WithoutCancel(t.Context()), &Caller{UID: 7}, "REGISTRATION/x", nil)
		failed <- err
	}()
	<-started
	time.Sleep(50 * time.Millisecond)
	if p, err = policy.Parse([]byte("version = 1\n[applications]\nREGISTRATION = [8]\n")); err != nil {
		t.Fatal(err)
	}
	h.SetPolicy(p)
	done()
	want(t, "without a grant", <-failed, ErrNotAvailable)
	if _, err := h.store.Load().Get("REGISTRATION/x"); !errors.Is(err, keystore.ErrNotFound) {
		t.Errorf("made: %v", err)
	}
}

// TestDueAndNothingToBeDone: where the end of the issuer leaves nothing to gain, the present key is given out as cheaply as ever.
func TestDueAndNothingToBeDone(t *testing.T) {
	h := newHouse(t)
	h.hierarchy()
	h.clock.add(1000 * day)
	h.master(Master{Name: "REGISTRATION", Force: true}) // ends with the root
	h.base("REGISTRATION/x")
	h.clock.add(800 * day)
	h.base("REGISTRATION/y")
	before := len(h.records())
	for range 5 {
		h.base("REGISTRATION/y")
	}
	if n := len(h.records()) - before; n != 5 {
		t.Errorf("%d records of 5 requests", n)
	}
	if h.unreplaced.order.Len() == 0 {
		t.Error("each request looks for what can be done")
	}
}

// TestClockAcceptMends a document that cannot be read: without it nothing would be issued for ever.
func TestClockAcceptMends(t *testing.T) {
	h := newHouse(t)
	h.hierarchy()
	s := h.store.Load()
	d, err := s.Document(kindClock, clockName)
	if err != nil {
		t.Fatal(err)
	}
	d.Data = []byte(`{"format":1,`)
	want(t, "damage", s.Apply(t.Context(), keystore.Commit{Documents: []keystore.DocumentChange{{Document: d}}}), nil)
	h.restart()
	_, err = h.CertCurrent(t.Context(), h.app, "REGISTRATION/x", nil)
	want(t, "issue", err, keystore.ErrDamaged)
	want(t, "accept", h.ClockAccept(t.Context(), h.admin), nil)
	h.base("REGISTRATION/x")
	if !bytes.Contains([]byte(strings.Join(h.records(), "\n")), []byte("clock_accept")) {
		t.Error("not recorded")
	}
}

// TestAcross2050: certificates that end after 2049 have another form of time (RFC 5280 section 4.1.2.5), and every kind of key gets them.
func TestAcross2050(t *testing.T) {
	h := newHouse(t)
	h.clock.add(time.Date(2049, 12, 31, 23, 59, 59, 0, time.UTC).Sub(h.clock.Now()))
	h.hierarchy()
	names := []keyspec.Name{"REGISTRATION/SIGN", "REGISTRATION/EC_SECP256K1_SIGN", "REGISTRATION/EC_SECP256R1_SIGN", "REGISTRATION/ED25519_SIGN"}
	for _, name := range names {
		h.checkChain(h.master(Master{Name: name}))
	}
	h.checkChain(h.base("REGISTRATION/x"))
	h.clock.add(time.Second)
	h.checkChain(h.base("REGISTRATION/y"))
	h.clock.add(1040 * day)
	for _, name := range append(names, "REGISTRATION", "REGISTRATION/x") {
		made := h.base(name)
		if !made.Made && name != "REGISTRATION" || made.Ref.Version != 2 {
			t.Errorf("%s is not replaced", made.Ref)
		}
		h.checkChain(made)
	}
}

// TestVersionsRunOut: a key that has as many versions as it can have is given out as long as it is valid, and destroying an old one makes
// room.
func TestVersionsRunOut(t *testing.T) {
	h := newHouse(t)
	h.hierarchy()
	const name = "REGISTRATION/EC_SECP256R1_SIGN"
	for range keyspec.MaxVersions {
		h.master(Master{Name: name, Force: true})
	}
	_, err := h.MasterGenerate(t.Context(), h.admin, &Master{Name: name, Force: true})
	want(t, "one more", err, ErrExhausted)
	h.clock.add(1040 * day)
	if got := h.base(name); got.Ref.Version != keyspec.MaxVersions {
		t.Errorf("%s", got.Ref)
	}
	h.clock.add(55 * day)
	_, err = h.CertCurrent(t.Context(), h.app, name, nil)
	want(t, "after the end", err, ErrExhausted)
	if _, err := h.DestroyNow(t.Context(), h.app, keyspec.Ref{Name: name, Version: 1}); err != nil {
		t.Fatal(err)
	}
	got := h.base(name)
	if got.Ref.Version != keyspec.MaxVersions+1 {
		t.Errorf("%s", got.Ref)
	}
	h.checkChain(got)
}

// TestAllAtOnce: whatever administrators, users and kmsd itself do at one time, nobody waits for ever, each version is certified, and there is
// one that is current.
func TestAllAtOnce(t *testing.T) {
	h := newHouse(t)
	h.hierarchy()
	h.base("REGISTRATION/x")
	h.clock.add(1050 * day)
	ctx, cancel := timeout(t, time.Minute)
	defer cancel()
	var wg sync.WaitGroup
	for _, act := range []func() error{
		func() error { _, err := h.CertCurrent(ctx, h.app, "REGISTRATION/x", nil); return err },
		func() error { _, err := h.CertCurrent(ctx, h.app, "REGISTRATION", nil); return err },
		func() error { _, err := h.CertRequestFor(ctx, h.app, "REGISTRATION/x", nil); return err },
		func() error {
			_, err := h.Rotate(ctx, h.app, "REGISTRATION/x", time.Time{}, time.Time{}, false)
			return err
		},
		func() error {
			_, err := h.MasterGenerate(ctx, h.admin, &Master{Name: "REGISTRATION", Force: true})
			return err
		},
		func() error {
			_, err := h.Revoke(ctx, h.app, keyspec.Ref{Name: "REGISTRATION/x"}, keyspec.Superseded, ReplaceDefault)
			return err
		},
		func() error { _, err := h.Renew(ctx); return err },
		func() error { return h.ClockAccept(ctx, h.admin) },
	} {
		wg.Go(func() {
			for range 3 {
				if err := act(); err != nil && !errors.Is(err, ErrState) && !errors.Is(err, keystore.ErrConflict) {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	for _, name := range []keyspec.Name{"REGISTRATION", "REGISTRATION/x"} {
		got := h.base(name)
		h.checkChain(got)
		key, err := h.Get(t.Context(), h.app, keyspec.Ref{Name: name})
		if err != nil || key.Current != got.Ref.Version {
			t.Fatalf("%s: %v, %v", name, got.Ref, err)
		}
		for i, v := range key.Versions {
			if int(v.Number) != i+1 || (v.State == keyspec.Active) != (v.Number == key.Current) {
				t.Errorf("%s@%d is %s", name, v.Number, v.State)
			}
		}
		list, err := h.Certificates(t.Context(), h.app, name, 0, keyspec.MaxVersions)
		if err != nil || len(list) != len(key.Versions) || slices.ContainsFunc(list, func(v VersionCertificate) bool { return len(v.Chain) == 0 }) {
			t.Errorf("%s: %d certificates of %d versions, %v", name, len(list), len(key.Versions), err)
		}
	}
}
