package engine

import (
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/pki"
)

func (h *house) revoked(name string, reason keyspec.Reason, replace Replace) *keystore.Key {
	h.t.Helper()
	key, err := h.Revoke(h.t.Context(), h.app, ref(h.t, name), reason, replace)
	if err != nil {
		h.t.Fatalf("revoke %s: %v", name, err)
	}
	return key
}

// list returns the revocation list of an issuer, checked as a relying party does.
func (h *house) list(issuer string) *CRL {
	h.t.Helper()
	list, err := h.CRL(h.t.Context(), h.app, ref(h.t, issuer))
	if err != nil {
		h.t.Fatalf("list of %s: %v", issuer, err)
	}
	parsed, err := pki.ParseCRL(list.DER)
	if err != nil {
		h.t.Fatal(err)
	}
	chain, err := h.CertGet(h.t.Context(), h.app, ref(h.t, issuer))
	if err != nil {
		h.t.Fatal(err)
	}
	c, err := pki.ParseCertificate(chain[0])
	if err != nil {
		h.t.Fatal(err)
	}
	if err := parsed.SignedBy(c); err != nil {
		h.t.Errorf("list of %s: %v", issuer, err)
	}
	if parsed.Len() != list.Entries || parsed.Number.Uint64() != list.Number || !list.NextUpdate.After(h.clock.Now()) || list.ThisUpdate.After(h.clock.Now()) {
		h.t.Errorf("list of %s: %d entries, number %s, from %s to %s: %+v", issuer, parsed.Len(), parsed.Number, list.ThisUpdate, list.NextUpdate, list)
	}
	return list
}

// onList reports whether a certificate is on a list, and why.
func onList(t testing.TB, list *CRL, c *x509.Certificate) keyspec.Reason {
	t.Helper()
	parsed, err := pki.ParseCRL(list.DER)
	if err != nil {
		t.Fatal(err)
	}
	r, found := parsed.Revoked(c.SerialNumber)
	if found && r.Reason == "" {
		return keyspec.Unspecified
	}
	return r.Reason
}

func TestRevoke(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	h.hierarchy()
	first := h.base("REGISTRATION/x")
	sealed := encryptTo(t, first, "data")

	// With its successor in the same request.
	key := h.revoked("REGISTRATION/x", keyspec.Superseded, ReplaceDefault)
	if key.Current != 2 || key.Versions[0].State != keyspec.Deactivated || key.Versions[0].Reason != keyspec.Superseded || key.Versions[1].State != keyspec.Active {
		t.Fatalf("%+v", key)
	}
	second := h.base("REGISTRATION/x")
	h.checkChain(second)
	h.opens(first.Ref, sealed, "data")
	list := h.list("REGISTRATION")
	if onList(t, list, leaf(t, first)) != keyspec.Superseded || onList(t, list, leaf(t, second)) != "" {
		t.Error("not the first certificate is on the list, or the second is")
	}
	if got := h.judged(OwnDomain, leaf(t, first)); !strings.Contains(got, "revoked") {
		t.Errorf("verdict on the revoked certificate: %s", got)
	}
	if got := h.judged(OwnDomain, leaf(t, second)); got != "trusted" {
		t.Errorf("verdict on its successor: %s", got)
	}

	// Twice is refused; that the key is compromised as well is not, changes the reason on the list, and keeps the time.
	_, err := h.Revoke(t.Context(), h.app, first.Ref, keyspec.Unspecified, ReplaceDefault)
	want(t, "again", err, ErrState)
	_, err = h.Revoke(t.Context(), h.app, first.Ref, keyspec.Unspecified, ReplaceYes)
	want(t, "replacing what is not current", err, ErrInput)
	at := key.Versions[0].Revoked
	h.clock.add(time.Hour)
	if key := h.revoked("REGISTRATION/x@1", keyspec.KeyCompromise, ReplaceDefault); key.Current != 2 || key.Versions[0].State != keyspec.Compromised {
		t.Errorf("%+v", key)
	}
	again := h.list("REGISTRATION")
	parsed, err := pki.ParseCRL(again.DER)
	if err != nil {
		t.Fatal(err)
	}
	if r, _ := parsed.Revoked(leaf(t, first).SerialNumber); r.Reason != keyspec.KeyCompromise || !r.At.Equal(at) || again.Number != list.Number+1 || again.Entries != 1 {
		t.Errorf("%+v on list %d after %d", r, again.Number, list.Number)
	}

	// Without a successor: nobody makes one but who rotates the key.
	h.revoked("REGISTRATION/x", keyspec.CessationOfOperation, ReplaceNo)
	if n := h.currentVersion("REGISTRATION/x"); n != 2 {
		t.Errorf("version %d", n)
	}
	_, err = h.CertCurrent(t.Context(), h.app, "REGISTRATION/x", nil)
	want(t, "not to be replaced", err, ErrState)
	h.renewal()
	h.clock.add(800 * day)
	h.renewal()
	if n := h.currentVersion("REGISTRATION/x"); n != 2 {
		t.Errorf("version %d was made by itself", n)
	}
	if _, err := h.Rotate(t.Context(), h.app, "REGISTRATION/x", time.Time{}, time.Time{}, false); err != nil {
		t.Error(err)
	}
	if key := h.revoked("REGISTRATION/x", keyspec.Superseded, ReplaceDefault); key.Current != 4 {
		t.Errorf("what was said of version 2 holds for version 3: %+v", key)
	}
	// Having said no, one may say yes.
	h.revoked("REGISTRATION/x", keyspec.Superseded, ReplaceNo)
	if key := h.revoked("REGISTRATION/x", keyspec.Superseded, ReplaceYes); key.Current != 5 {
		t.Errorf("%+v", key)
	}

	// Keys without a place in the hierarchy: all versions, and never a successor.
	h.create("ELSEWHERE/s", keyspec.Ed25519, keyspec.Sign, keyspec.Verify)
	if _, err := h.Rotate(t.Context(), h.app, "ELSEWHERE/s", time.Time{}, time.Time{}, false); err != nil {
		t.Fatal(err)
	}
	_, err = h.Revoke(t.Context(), h.app, ref(t, "ELSEWHERE/s"), keyspec.Superseded, ReplaceYes)
	want(t, "replacing a key of nobody", err, ErrUnsupported)
	_, err = h.Revoke(t.Context(), h.app, ref(t, "ELSEWHERE/s"), keyspec.Superseded, "perhaps")
	want(t, "replacing perhaps", err, ErrInput)
	if key := h.revoked("ELSEWHERE/s", keyspec.Superseded, ReplaceDefault); key.Current != 2 || key.Versions[0].Revoked.IsZero() || key.Versions[1].Revoked.IsZero() {
		t.Errorf("%+v", key)
	}

	events := strings.Join(h.told(0), "\n")
	for _, line := range []string{"revoked REGISTRATION/x@1 superseded, on the revocation list of REGISTRATION", "rotated REGISTRATION/x@2", "crl REGISTRATION@1 list 1 with 1 entries", "revoked ELSEWHERE/s@2 superseded"} {
		if !strings.Contains(events, line) {
			t.Errorf("%q was not told", line)
		}
	}
	if records := strings.Join(h.records(), "\n"); !strings.Contains(records, "key_revoke REGISTRATION/x@1 ok superseded") || !strings.Contains(records, "cert_current REGISTRATION/x@2 ok generated") {
		t.Error(records)
	}
}

// TestRevokeFormer: the certificates that a version had are revoked with it.
func TestRevokeFormer(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	h.hierarchy()
	first := h.base("REGISTRATION/x")
	var all []*x509.Certificate
	for range 3 {
		u := h.itself(t.Context(), "test", keyspec.Ref{})
		u.store = h.store.Load()
		c, err := u.recertify("REGISTRATION/x", 1, time.Time{})
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, leaf(t, c))
	}
	all = append(all, leaf(t, first))
	h.revoked("REGISTRATION/x", keyspec.AffiliationChanged, ReplaceNo)
	list := h.list("REGISTRATION")
	for i, c := range all {
		if onList(t, list, c) != keyspec.AffiliationChanged {
			t.Errorf("certificate %d is not on the list", i)
		}
	}
	if list.Entries != len(all) {
		t.Errorf("%d entries", list.Entries)
	}
	// A certificate that was under way meanwhile is not attached.
	u := h.itself(t.Context(), "test", keyspec.Ref{})
	u.store = h.store.Load()
	_, err := u.recertify("REGISTRATION/x", 1, time.Time{})
	want(t, "certifying what is revoked", err, ErrState)
	// Former certificates are forgotten when they have expired.
	h.base("REGISTRATION/y")
	certify := func() {
		u := h.itself(t.Context(), "test", keyspec.Ref{})
		u.store = h.store.Load()
		if _, err := u.recertify("REGISTRATION/y", 1, h.clock.Now().Add(100*day)); err != nil {
			t.Fatal(err)
		}
	}
	kept := func() int {
		u := h.itself(t.Context(), "test", keyspec.Ref{})
		u.store = h.store.Load()
		list, err := u.formers(ref(t, "REGISTRATION/y@1"))
		if err != nil {
			t.Fatal(err)
		}
		return len(list)
	}
	certify()
	certify()
	if n := kept(); n != 2 {
		t.Errorf("%d former certificates", n)
	}
	h.clock.add(99 * day)
	certify()
	h.clock.add(2 * day)
	certify()
	if n := kept(); n != 2 { // the first one, which is good for long, and the one before
		t.Errorf("%d former certificates", n)
	}
}

// TestRevokeWithoutIssuer: a successor that cannot be made holds up no revocation, and is made as soon as it can.
func TestRevokeWithoutIssuer(t *testing.T) {
	t.Parallel()
	h := punctual(t)
	h.hierarchy()
	first := h.base("REGISTRATION/x")
	if _, err := h.Suspend(t.Context(), h.app, ref(t, "REGISTRATION")); err != nil {
		t.Fatal(err)
	}
	if key := h.revoked("REGISTRATION/x", keyspec.KeyCompromise, ReplaceDefault); key.Current != 1 || key.Versions[0].State != keyspec.Compromised {
		t.Errorf("%+v", key)
	}
	if events := strings.Join(h.told(0), "\n"); !strings.Contains(events, "alert REGISTRATION/x revoked, and not replaced: issuer REGISTRATION") {
		t.Error(events)
	}
	next := h.renewal()
	if next.After(h.clock.Now().Add(firstRetry)) {
		t.Errorf("the next try is at %s", next)
	}
	if _, err := h.Resume(t.Context(), h.app, ref(t, "REGISTRATION")); err != nil {
		t.Fatal(err)
	}
	h.renewal()
	if n := h.currentVersion("REGISTRATION/x"); n != 1 {
		t.Errorf("tried again at once: version %d", n)
	}
	h.clock.add(firstRetry)
	h.renewal()
	second := h.base("REGISTRATION/x")
	if second.Ref.Version != 2 || second.Made {
		t.Errorf("%+v", second)
	}
	h.checkChain(second)
	if onList(t, h.list("REGISTRATION"), leaf(t, first)) != keyspec.KeyCompromise {
		t.Error("not on the list")
	}
}

// TestRevokeModule: nobody's request makes a successor of a revoked module key, until somebody has said so.
func TestRevokeModule(t *testing.T) {
	t.Parallel()
	h := punctual(t)
	h.hierarchy()
	base := h.base("REGISTRATION/x")
	h.revoked("REGISTRATION", keyspec.KeyCompromise, ReplaceDefault)
	h.renewal()
	_, err := h.CertCurrent(t.Context(), h.app, "REGISTRATION/y", nil)
	want(t, "certified by a revoked key", err, ErrState)
	_, err = h.CertCurrent(t.Context(), h.app, "REGISTRATION", nil)
	want(t, "a revoked module key", err, ErrState)
	if n := h.currentVersion("REGISTRATION"); n != 1 {
		t.Fatalf("version %d", n)
	}
	h.master(Master{Name: "REGISTRATION"})
	h.clock.add(time.Minute)
	h.renewal()
	got := h.base("REGISTRATION/x")
	h.checkChain(got)
	if got.Ref != base.Ref || string(got.Chain[1]) == string(base.Chain[1]) || h.judged(OwnDomain, leaf(t, got)) != "trusted" {
		t.Errorf("%s was not certified anew: %s", got.Ref, h.judged(OwnDomain, leaf(t, got)))
	}
	if onList(t, h.list("ROOT"), parsedAt(t, base, 1)) != keyspec.KeyCompromise {
		t.Error("the module key is not on the list of ROOT")
	}
}

// TestRevokeRoot: ROOT is replaced, and what it had certified is certified anew.
func TestRevokeRoot(t *testing.T) {
	t.Parallel()
	h := punctual(t)
	h.hierarchy()
	h.master(Master{Name: "REGISTRATION/EC_SECP256R1_SIGN"})
	base := h.base("REGISTRATION/x")
	sealed := encryptTo(t, base, "data")
	key := h.revoked("ROOT", keyspec.KeyCompromise, ReplaceDefault)
	if key.Current != 1 {
		t.Fatalf("ROOT was replaced unasked: %+v", key)
	}
	h.renewal()
	if n := h.currentVersion(RootName); n != 1 {
		t.Errorf("ROOT was replaced unasked: version %d", n)
	}
	_, err := h.MasterGenerate(t.Context(), h.admin, &Master{Name: "KERNEL"})
	want(t, "issuing with a revoked ROOT", err, ErrState)
	if key = h.revoked("ROOT", keyspec.KeyCompromise, ReplaceYes); key.Current != 2 {
		t.Fatalf("%+v", key)
	}
	h.clock.add(time.Minute)
	for passes := 1; ; passes++ { // as long as kmsd itself goes on at once: nothing of it waits for the look of the next hour
		select {
		case <-h.wakeRenewer:
			h.renewal()
			continue
		default:
		}
		if passes > 3 {
			t.Errorf("%d passes", passes)
		}
		break
	}
	for _, name := range []keyspec.Name{"REGISTRATION", "REGISTRATION/EC_SECP256R1_SIGN", "REGISTRATION/x"} {
		list, err := h.Certificates(t.Context(), h.app, name, 0, 10)
		if err != nil || len(list) != 1 {
			t.Fatalf("%s: %+v, %v", name, list, err)
		}
		h.checkChain(&Certified{Ref: keyspec.Ref{Name: name, Version: 1}, Chain: list[0].Chain, Expires: list[0].Expires})
		if got := h.judged(OwnDomain, parsedAt(t, &Certified{Chain: list[0].Chain}, 0)); got != "trusted" {
			t.Errorf("%s: %s", name, got)
		}
	}
	h.opens(base.Ref, sealed, "data")
	h.checkChain(h.base("REGISTRATION/y"))
	before := len(h.records())
	h.renewal()
	if after := h.records(); len(after) != before {
		t.Errorf("done again: %s", strings.Join(after[before:], "\n"))
	}
}

// TestCRL follows the lists of an issuer through time.
func TestCRL(t *testing.T) {
	t.Parallel()
	h := punctual(t)
	h.hierarchy()
	h.master(Master{Name: "KERNEL/SIGN"})
	if list := h.list("REGISTRATION"); list.Entries != 0 || list.Number != 1 {
		t.Errorf("%+v", list)
	}
	if list := h.list("REGISTRATION"); list.Number != 1 {
		t.Errorf("signed again without need: %+v", list)
	}
	for _, name := range []string{"KERNEL/SIGN", "REGISTRATION/x", "NOBODY"} {
		if _, err := h.CRL(t.Context(), h.app, ref(t, name)); err == nil {
			t.Errorf("%s has a list", name)
		}
	}
	old := h.base("REGISTRATION/x")
	h.revoked("REGISTRATION/x", keyspec.Superseded, ReplaceDefault)
	h.renewal()
	if p := h.own.get(ref(t, "REGISTRATION@1")); p.CRL == nil || p.Entries != 1 {
		t.Error("the scheduler has not published the list")
	}

	// Across a start: the same list, as long as it is complete; the number grows.
	before := h.list("REGISTRATION")
	h.restart()
	if list := h.list("REGISTRATION"); string(list.DER) != string(before.DER) {
		t.Errorf("%+v after a start, %+v before", list, before)
	}
	h.base("REGISTRATION/y")
	h.revoked("REGISTRATION/y", keyspec.Superseded, ReplaceDefault)
	h.restart()
	if list := h.list("REGISTRATION"); list.Number <= before.Number || list.Entries != 2 {
		t.Errorf("%+v", list)
	}

	// Renewed by the scheduler at half of its time, never late.
	numbers := map[uint64]bool{}
	for range 30 {
		h.renewal()
		p := h.own.get(ref(t, "REGISTRATION@1"))
		if p.CRL == nil || !h.clock.Now().Before(p.NextUpdate) {
			t.Fatalf("%s: the last list is %+v", h.clock.Now(), p.CRL)
		}
		numbers[p.Number] = true
		h.clock.add(day)
	}
	if len(numbers) < 7 || len(numbers) > 9 {
		t.Errorf("%d lists in 30 days", len(numbers))
	}

	// When the issuer has been rotated, both versions have lists, which name the same.
	h.master(Master{Name: "REGISTRATION", Force: true})
	third := h.base("REGISTRATION/x")
	h.revoked("REGISTRATION/x", keyspec.KeyCompromise, ReplaceDefault)
	one, two := h.list("REGISTRATION@1"), h.list("REGISTRATION")
	for _, list := range []*CRL{one, two} {
		if list.Entries != 3 || onList(t, list, leaf(t, old)) != keyspec.Superseded || onList(t, list, leaf(t, third)) != keyspec.KeyCompromise {
			t.Errorf("%+v", list)
		}
	}
	// What has expired is on no list any more.
	h.clock.add(740 * day)
	h.renewal()
	if list := h.list("REGISTRATION"); list.Entries != 0 {
		t.Errorf("%+v", list)
	}
	// A clock that is behind keeps nobody from revoking, but from signing lists and making successors.
	last := h.list("REGISTRATION")
	h.clock.add(-2 * day)
	if list, err := h.CRL(t.Context(), h.app, ref(t, "REGISTRATION")); err != nil || list.Number != last.Number {
		t.Errorf("%+v, %v", list, err)
	}
	if key := h.revoked("REGISTRATION/y", keyspec.Superseded, ReplaceDefault); key.Versions[len(key.Versions)-1].Revoked.IsZero() {
		t.Errorf("%+v", key)
	}
	_, err := h.CRL(t.Context(), h.app, ref(t, "REGISTRATION"))
	want(t, "signing with a clock that is behind", err, ErrClock)
}

// TestCRLWithoutDevice: while a device needs somebody, the last list is good for its time, also after a start, unless something was revoked.
func TestCRLWithoutDevice(t *testing.T) {
	h, k := newResidentHouse(t)
	h.renewals.jitter = 0
	h.master(Master{Name: "ROOT"})
	h.master(Master{Name: "REGISTRATION", Protection: keyspec.HSM, Escrow: keyspec.EscrowNone})
	h.base("REGISTRATION/x")
	first := h.list("REGISTRATION")
	k.set(func() { k.fault = &enclave.Error{Kind: enclave.ErrAbsent} })
	h.clock.add(crlFresh + time.Hour)
	if list := h.list("REGISTRATION"); list.Number != first.Number {
		t.Errorf("%+v", list)
	}
	for range 3 {
		h.renewal()
	}
	alerts := slices.DeleteFunc(h.told(0), func(s string) bool {
		return !strings.HasPrefix(s, "alert REGISTRATION@1 its revocation list was not signed")
	})
	if len(alerts) != 1 {
		t.Errorf("%d alerts: %q", len(alerts), alerts)
	}
	h.own.lists = nil // as after a start
	if list := h.list("REGISTRATION"); list.Number != first.Number {
		t.Errorf("%+v", list)
	}
	if key := h.revoked("REGISTRATION/x", keyspec.KeyCompromise, ReplaceDefault); key.Current != 1 || key.Versions[0].State != keyspec.Compromised {
		t.Errorf("%+v", key)
	}
	_, err := h.CRL(t.Context(), h.app, ref(t, "REGISTRATION"))
	want(t, "a list that is not complete any more", err, enclave.ErrAbsent)
	k.set(func() { k.fault = nil })
	if list := h.list("REGISTRATION"); list.Entries != 1 || list.Number <= first.Number {
		t.Errorf("%+v", list)
	}
	h.clock.add(lastRetry)
	h.renewal()
	if h.currentVersion("REGISTRATION/x") != 2 {
		t.Error("not replaced")
	}
}

// TestLongCRL: a thousand entries; OpenSSL agrees.
func TestLongCRL(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	h.hierarchy()
	good, bad := h.base("REGISTRATION/x"), h.base("REGISTRATION/y")
	h.revoked("REGISTRATION/y", keyspec.KeyCompromise, ReplaceNo)
	// The others are certificates of the module key for one public key.
	u := h.itself(t.Context(), "test", keyspec.Ref{})
	u.store = h.store.Load()
	p, err := u.placeOf("REGISTRATION/z", false)
	if err != nil {
		t.Fatal(err)
	}
	i, err := u.issuer(p)
	if err != nil {
		t.Fatal(err)
	}
	n := 1000
	if testing.Short() {
		n = 100
	}
	var documents []keystore.DocumentChange
	for k := range n - 1 {
		chain, err := i.issue(leaf(t, good).PublicKey, pki.Subject{RawName: leaf(t, good).RawSubject}, p.certificateProfile([]keyspec.Usage{keyspec.Encrypt, keyspec.Decrypt}, h.clock.Now(), h.clock.Now().Add(500*day), i))
		if err != nil {
			t.Fatal(err)
		}
		c, err := pki.ParseCertificate(chain[0])
		if err != nil {
			t.Fatal(err)
		}
		change, err := revocationChange(&Revocation{Key: ref(t, "REGISTRATION/z@1"), Issuer: ref(t, "REGISTRATION@1"), Certificate: c, At: h.clock.Now().Add(-time.Duration(k) * time.Second), Reason: keyspec.Superseded})
		if err != nil {
			t.Fatal(err)
		}
		documents = append(documents, change)
	}
	if err := u.commit(keystore.Commit{Documents: documents}); err != nil {
		t.Fatal(err)
	}
	list := h.list("REGISTRATION")
	if list.Entries != n {
		t.Errorf("%d entries", list.Entries)
	}
	h.restart()
	if again := h.list("REGISTRATION"); again.Entries != n {
		t.Errorf("%d entries after a start", again.Entries)
	}
	dir := t.TempDir()
	write := func(name, kind string, ders ...[]byte) string {
		var text []byte
		for _, der := range ders {
			text = append(text, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})...)
		}
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	root := h.list("ROOT")
	crls := write("crls.pem", "X509 CRL", list.DER, root.DER)
	ca := write("root.pem", "CERTIFICATE", good.Chain[2])
	module := write("module.pem", "CERTIFICATE", good.Chain[1])
	for file, ok := range map[string]bool{write("good.pem", "CERTIFICATE", good.Chain[0]): true, write("bad.pem", "CERTIFICATE", bad.Chain[0]): false} {
		out, err := exec.Command("openssl", "verify", "-crl_check_all", "-attime", fmt.Sprint(h.clock.Now().Unix()), "-CRLfile", crls, "-CAfile", ca, "-untrusted", module, file).CombinedOutput()
		if (err == nil) != ok || !ok && !strings.Contains(string(out), "certificate revoked") {
			t.Errorf("%s: %s%v", file, out, err)
		}
	}
}
