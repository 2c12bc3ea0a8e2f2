package engine

import (
	"crypto/x509"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/pki"
)

// punctual is a house whose keys are renewed when they are due, without jitter.
func punctual(t testing.TB) *house {
	t.Helper()
	h := newHouse(t)
	h.renewals.jitter = 0
	return h
}

// renewal has the renewer look at all keys.
func (h *house) renewal() time.Time {
	h.t.Helper()
	next, err := h.Renew(h.t.Context())
	if err != nil {
		h.t.Fatal(err)
	}
	return next
}

// told returns what has happened since an event, one line each.
func (h *house) told(since uint64) []string {
	h.t.Helper()
	var lines []string
	for {
		p, err := h.Events(h.t.Context(), h.admin, nil, since, 0, 64)
		if err != nil {
			h.t.Fatal(err)
		}
		for _, e := range p.Events {
			lines = append(lines, fmt.Sprintf("%s %s %s", e.Kind, e.Key, e.Detail))
		}
		if len(p.Events) == 0 {
			return lines
		}
		since = p.Next
	}
}

// currentVersion returns the number of the current version of a key.
func (h *house) currentVersion(name keyspec.Name) keyspec.Version {
	h.t.Helper()
	key, err := h.Get(h.t.Context(), h.app, keyspec.Ref{Name: name})
	if err != nil {
		h.t.Fatal(err)
	}
	return key.Current
}

// TestTwelveYears: a hierarchy that is left alone always has certificates that are good, and opens what was encrypted to any of them.
func TestTwelveYears(t *testing.T) {
	t.Parallel()
	h := punctual(t)
	h.hierarchy()
	h.master(Master{Name: "REGISTRATION/SIGN"})
	h.master(Master{Name: "REGISTRATION/EC_SECP256R1_SIGN"})
	h.master(Master{Name: "REGISTRATION/ED25519_SIGN"})
	first := h.base("REGISTRATION/x")
	sealed := encryptTo(t, first, "data")
	names := []keyspec.Name{RootName, "REGISTRATION", "REGISTRATION/SIGN", "REGISTRATION/EC_SECP256R1_SIGN", "REGISTRATION/ED25519_SIGN", "REGISTRATION/x"}
	years := 12
	if testing.Short() {
		years = 4
	}
	for end := h.clock.Now().AddDate(years, 0, 0); h.clock.Now().Before(end); h.clock.add(15 * day) {
		h.renewal()
		for _, name := range names {
			list, err := h.Certificates(t.Context(), h.app, name, 0, 1)
			if err != nil || list[0].State != keyspec.Active || !h.clock.Now().Before(list[0].Expires) {
				t.Fatalf("%s on %s: %+v, %v", name, h.clock.Now(), list, err)
			}
			h.checkChain(&Certified{Ref: keyspec.Ref{Name: name, Version: list[0].Version}, Chain: list[0].Chain, Expires: list[0].Expires})
		}
	}
	h.opens(first.Ref, sealed, "data")
	for _, name := range names {
		if n := h.currentVersion(name); int(n) < years/3+1 {
			t.Errorf("%s was rotated %d times in %d years", name, n-1, years)
		}
	}
	records := strings.Join(h.records(), "\n")
	for _, name := range names {
		if !strings.Contains(records, fmt.Sprintf("key_renew %s@2 ok generated", name)) {
			t.Errorf("no record of the renewal of %s", name)
		}
	}
	for _, line := range h.told(0) {
		if strings.HasPrefix(line, "alert") || strings.HasPrefix(line, "expiring") {
			t.Error(line)
		}
	}
}

// TestBoundaries: a second before a key is due nothing happens, then it is rotated; before a user notices.
func TestBoundaries(t *testing.T) {
	t.Parallel()
	h := punctual(t)
	h.hierarchy()
	base := h.base("REGISTRATION/x")
	due := base.Expires.Add(-30 * day)
	h.clock.add(due.Sub(h.clock.Now()) - time.Second)
	if next := h.renewal(); !next.Equal(due) && next.Sub(due).Abs() > time.Second {
		t.Errorf("looks again at %s, due is %s", next, due)
	}
	if n := h.currentVersion("REGISTRATION/x"); n != 1 {
		t.Fatalf("version %d before its time", n)
	}
	h.clock.add(time.Second)
	h.renewal()
	if n := h.currentVersion("REGISTRATION/x"); n != 2 {
		t.Fatalf("version %d when it is due", n)
	}
	// After years without power everything has expired, and is made anew from the root downwards.
	sealed := encryptTo(t, base, "data")
	h.clock.add(20 * 365 * day)
	h.renewal()
	for name, n := range map[keyspec.Name]keyspec.Version{RootName: 3, "REGISTRATION": 2, "REGISTRATION/x": 3} { // ROOT was due with the base key before
		if got := h.currentVersion(name); got != n {
			t.Errorf("%s: version %d, not %d", name, got, n)
		}
	}
	got := h.base("REGISTRATION/x")
	if got.Made {
		t.Error("made when it was asked for")
	}
	h.checkChain(got)
	h.opens(base.Ref, sealed, "data")
	h.list("ROOT@3")

	// Behind the latest time nothing is made, which is told once; and then goes on.
	h.clock.add(705 * day)
	h.renewal()
	before, since := h.currentVersion("REGISTRATION/x"), len(h.told(0))
	h.clock.add(-400 * day)
	if key := h.revoked("REGISTRATION/x", keyspec.Superseded, ReplaceDefault); key.Current != before {
		t.Errorf("%+v", key)
	}
	for range 3 {
		if next := h.renewal(); next.After(h.clock.Now().Add(clockRetry)) {
			t.Errorf("looks again at %s", next)
		}
	}
	told := strings.Join(h.told(0)[since:], "\n")
	if h.currentVersion("REGISTRATION/x") != before || strings.Count("\n"+told, "\nclock ") != 1 {
		t.Errorf("version %d; %s", h.currentVersion("REGISTRATION/x"), told)
	}
	if err := h.ClockAccept(t.Context(), h.admin); err != nil {
		t.Fatal(err)
	}
	h.renewal()
	if h.currentVersion("REGISTRATION/x") != before+1 {
		t.Error("not made after the clock was accepted")
	}
}

// TestCutShort: base keys whose certificate ends with their issuer's get another one when that was replaced; the key stays.
func TestCutShort(t *testing.T) {
	t.Parallel()
	h := punctual(t)
	h.hierarchy()
	module := h.base("REGISTRATION/early").Chain[1]
	h.clock.add(600 * day)
	cut := h.base("REGISTRATION/x")
	if !leaf(t, cut).NotAfter.Equal(parsedAt(t, cut, 1).NotAfter) {
		t.Fatal("it is not cut short")
	}
	sealed := encryptTo(t, cut, "data")
	due := h.due("REGISTRATION/x@1")
	if due.Then != ThenRecertify || due.What != DueCertificate || !due.ActAt.Equal(parsedAt(t, cut, 1).NotAfter.Add(-60*day)) {
		t.Errorf("%+v", due)
	}
	h.clock.add(436 * day)
	h.renewal() // the module key
	h.renewal()
	got := h.base("REGISTRATION/x")
	if got.Ref.Version != 1 || !got.Expires.After(cut.Expires.Add(100*day)) || string(got.Chain[1]) == string(module) {
		t.Errorf("%s expires %s, after %s", got.Ref, got.Expires, cut.Expires)
	}
	h.checkChain(got)
	h.opens(got.Ref, sealed, "data")
	due = h.due("REGISTRATION/x@1")
	if due.Then != ThenRotate || !due.At.Equal(got.Expires) {
		t.Errorf("%+v", due)
	}
	records := len(h.records())
	h.renewal()
	if after := h.records(); len(after) != records {
		t.Errorf("done again: %q", after[records:])
	}
}

// timeline returns everything that expires.
func (h *house) timeline(until time.Time) (all []Due) {
	h.t.Helper()
	for after := []byte(nil); ; {
		page, next, err := h.Expiry(h.t.Context(), h.admin, until, after, 8)
		if err != nil {
			h.t.Fatal(err)
		}
		if len(page) > 8 {
			h.t.Errorf("%d entries on one page", len(page))
		}
		all = append(all, page...)
		if after = next; len(next) == 0 {
			return all
		}
	}
}

// due returns what becomes of a key version.
func (h *house) due(name string) Due {
	h.t.Helper()
	for _, d := range h.timeline(time.Time{}) {
		if d.What != DueCRL && d.Key.String() == name {
			return d
		}
	}
	h.t.Errorf("%s is not in the timeline", name)
	return Due{}
}

// TestWhoActs: what kmsd does not renew it leaves alone, says so in the timeline, and tells as the end comes near.
func TestWhoActs(t *testing.T) {
	t.Parallel()
	h := punctual(t)
	h.hierarchy()
	h.master(Master{Name: "PMS"})
	h.master(Master{Name: "KERNEL/IDENTITY_CACHE"})
	for _, name := range []keyspec.Name{"REGISTRATION/renewed", "REGISTRATION/suspended", "REGISTRATION/destroyed", "REGISTRATION/revoked", "PMS/inactive"} {
		h.base(name)
	}
	if _, err := h.SetApplication(t.Context(), h.admin, &Application{Name: "PMS", Inactive: true}); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Suspend(t.Context(), h.app, ref(t, "REGISTRATION/suspended")); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Destroy(t.Context(), h.app, ref(t, "REGISTRATION/destroyed"), 300*day); err != nil {
		t.Fatal(err)
	}
	h.revoked("REGISTRATION/revoked", keyspec.Superseded, ReplaceNo)
	// One key with a certificate of an outside authority, one of another domain, CAs and a list of others, one key of nobody's.
	csr := h.master(Master{Name: "RESIDENT", CSR: true})
	if due := h.due("RESIDENT@1"); due.Then != ThenAlert || !strings.Contains(due.Detail, "waits for a certificate") {
		t.Errorf("%+v", due)
	}
	ca := h.newOutside("CA", nil, 3)
	request, err := pki.ParseRequest(csr.Request)
	if err != nil {
		t.Fatal(err)
	}
	signed := ca.leaf("CN=resident", request.PublicKey, func(p *pki.Profile) {
		p.CA, p.PathLen, p.NotAfter = true, -1, h.clock.Now().Add(500*day)
	})
	h.added("AUTH", ca.c)
	if _, err := h.CertUpload(t.Context(), h.admin, ref(t, "RESIDENT"), []*x509.Certificate{signed, ca.c}, "AUTH"); err != nil {
		t.Fatal(err)
	}
	if _, err := h.CRLAdd(t.Context(), h.admin, "AUTH", ca.list(1)); err != nil {
		t.Fatal(err)
	}
	h.create("ELSEWHERE/s", keyspec.Ed25519, keyspec.Sign, keyspec.Verify)

	for name, then := range map[string]DueThen{
		"ROOT@1": ThenRotate, "REGISTRATION@1": ThenRotate, "REGISTRATION/renewed@1": ThenRotate, "REGISTRATION/suspended@1": ThenNothing,
		"REGISTRATION/destroyed@1": ThenNothing, "REGISTRATION/revoked@1": ThenNothing, "PMS/inactive@1": ThenDeactivate, "PMS@1": ThenDeactivate,
		"RESIDENT@1": ThenAlert, "KERNEL/IDENTITY_CACHE@1": ThenAlert, "ELSEWHERE/s@1": ThenDeactivate,
	} {
		due := h.due(name)
		if due.Then != then || due.At.IsZero() || due.ActAt.IsZero() == (then == ThenRotate) || len(due.Detail) > maxDetail {
			t.Errorf("%s: %+v", name, due)
		}
	}
	outsiders := 0
	for _, d := range h.timeline(time.Time{}) {
		if d.Key.Name == "" {
			outsiders++
			if d.Then != ThenAlert || !strings.Contains(d.Detail, "AUTH") || !strings.Contains(d.Detail, "CN=CA") {
				t.Errorf("%+v", d)
			}
		}
	}
	if outsiders != 2 {
		t.Errorf("%d certificates and lists of others", outsiders)
	}
	if soon := h.timeline(h.clock.Now().Add(40 * day)); len(soon) != 1 || soon[0].What != DueCRL {
		t.Errorf("within 40 days: %+v", soon)
	}

	// The notices of a certificate that takes a person: each once, also across starts.
	h.renewal()
	var notices []string
	for d, step := 0, 10; d < 510; d += step {
		if d == 400 {
			step = 1
		}
		h.clock.add(days(step))
		if d%50 == 0 {
			h.restart()
			h.renewals.jitter = 0
		}
		since := h.events.last
		h.renewal()
		for _, line := range h.told(since) {
			if strings.HasPrefix(line, "expiring RESIDENT@1 ") {
				notices = append(notices, strings.TrimPrefix(line, "expiring RESIDENT@1 the key "))
			}
		}
	}
	for i, text := range []string{"expires in 90 days", "expires in 30 days", "expires in 7 days", "expires in 24 hours", "expired on"} {
		if len(notices) != 5 || !strings.HasPrefix(notices[i], text) {
			t.Errorf("%q", notices)
			break
		}
	}
	for name, n := range map[keyspec.Name]keyspec.Version{"REGISTRATION/suspended": 1, "REGISTRATION/revoked": 1, "PMS/inactive": 1, "RESIDENT": 1, "REGISTRATION/renewed": 1} {
		if got := h.currentVersion(name); got != n {
			t.Errorf("%s: version %d", name, got)
		}
	}
	h.renewals.off = true
	h.clock.add(300 * day)
	h.renewal()
	if h.currentVersion("REGISTRATION/renewed") != 1 || h.due("REGISTRATION/renewed@1").Then != ThenNothing || h.due("ROOT@1").Then != ThenAlert {
		t.Error("renewed though that is turned off")
	}
	h.renewals.off = false
	h.renewal()
	if h.currentVersion("REGISTRATION/renewed") != 2 {
		t.Error("not renewed")
	}
	for _, bad := range []string{"\x02", "\x01", "\x01\x09A\x00", "\x01\x00AUTH", "\x00short", "\x01\x00AUTH\x00short"} {
		if _, _, err := h.Expiry(t.Context(), h.admin, time.Time{}, []byte(bad), 8); err == nil {
			t.Errorf("continuation %q is taken", bad)
		}
	}
	_, _, err = h.Expiry(t.Context(), &Caller{UID: 1}, time.Time{}, nil, 8)
	want(t, "the timeline for anybody", err, ErrDenied)
}

// TestRenewalNeedsDevice: where a device needs somebody, that is told, tried again ever more seldom, and made up for.
func TestRenewalNeedsDevice(t *testing.T) {
	h, k := newResidentHouse(t)
	h.renewals.jitter = 0
	h.master(Master{Name: "ROOT"})
	h.master(Master{Name: "REGISTRATION", Protection: keyspec.HSM, Escrow: keyspec.EscrowNone})
	for i := range 6 {
		h.base(keyspec.Name(fmt.Sprintf("REGISTRATION/%d", i)))
	}
	h.clock.add(705 * day)
	k.set(func() { k.fault = &enclave.Error{Kind: enclave.ErrLocked, Detail: "it needs its PIN"} })
	since := len(h.told(0))
	tries := 0
	for end := h.clock.Now().Add(20 * time.Hour); h.clock.Now().Before(end); {
		next := h.renewal()
		if tries++; tries > 200 {
			t.Fatal("the device is asked all the time")
		}
		h.clock.add(max(next.Sub(h.clock.Now()), time.Second))
	}
	alerts := 0
	for _, line := range h.told(0)[since:] {
		if strings.HasPrefix(line, "alert REGISTRATION") {
			if alerts++; !strings.Contains(line, "it needs its PIN") {
				t.Error(line)
			}
		}
	}
	if alerts < 2 || alerts > 8 {
		t.Errorf("%d alerts in %d tries", alerts, tries)
	}
	if n := len(h.records()); n > 200 {
		t.Errorf("%d records of %d tries", n, tries)
	}
	if due := h.due("REGISTRATION/0@1"); h.renewals.failed["REGISTRATION/0"] != nil && (due.Then != ThenAlert || !strings.Contains(due.Detail, "PIN")) {
		t.Errorf("%+v", due)
	}
	k.set(func() { k.fault = nil })
	h.clock.add(lastRetry)
	h.renewal()
	for i := range 6 {
		if name := keyspec.Name(fmt.Sprintf("REGISTRATION/%d", i)); h.currentVersion(name) != 2 {
			t.Errorf("%s was not renewed", name)
		}
	}
	h.renewal()
	if len(h.renewals.failed) != 0 {
		t.Errorf("%+v", h.renewals.failed)
	}
}

// TestManyAreDue: a thousand keys that are due at once are renewed in passes of bounded size; with jitter they are not due at once.
func TestManyAreDue(t *testing.T) {
	t.Parallel()
	h := punctual(t)
	h.master(Master{Name: RootName})
	n := 1000
	if testing.Short() || raceDetector {
		n = 300
	}
	names := make([]keyspec.Name, n)
	for i := range names {
		app := fmt.Sprintf("APP%d", i)
		if _, err := h.SetApplication(t.Context(), h.admin, &Application{Name: app}); err != nil {
			t.Fatal(err)
		}
		names[i] = keyspec.Name(app + "/EC_SECP256R1_SIGN")
		h.master(Master{Name: names[i]})
	}
	h.renewals.jitter = DefaultJitter
	var first, last time.Time
	hours := make(map[time.Time]int)
	for _, d := range h.timeline(time.Time{}) {
		if d.Key.Name.IsModule() {
			continue
		}
		if first.IsZero() || d.ActAt.Before(first) {
			first = d.ActAt
		}
		if d.ActAt.After(last) {
			last = d.ActAt
		}
		hours[d.ActAt.Truncate(time.Hour)]++
	}
	if last.Sub(first) < DefaultJitter/2 || last.Sub(first) > DefaultJitter+time.Minute {
		t.Errorf("from %s to %s", first, last)
	}
	for hour, many := range hours {
		if many > n/6 {
			t.Errorf("%d of %d keys at %s", many, n, hour)
		}
	}
	h.clock.add(last.Sub(h.clock.Now()) + time.Hour)
	var passes int
	for before := -1; before != 0; passes++ {
		h.renewal()
		renewed := 0
		for _, name := range names {
			if key, err := h.store.Load().Get(name); err != nil || len(key.Versions) > 2 {
				t.Fatalf("%s: %+v, %v", name, key, err)
			} else if len(key.Versions) == 2 {
				renewed++
			}
		}
		if before = n - renewed; renewed > (passes+1)*maxRenewals || passes > 10 {
			t.Fatalf("%d renewed in %d passes", renewed, passes)
		}
	}
	if want := (n + maxRenewals) / maxRenewals; passes < want {
		t.Errorf("%d passes for %d keys", passes, n)
	}
	begun := time.Now()
	h.renewal()
	t.Logf("a look at %d keys of which none is due took %s", n, time.Since(begun))
}

// TestStuckIssuer: keys that wait for an issuer which cannot renew them take nobody else's place in a pass, and no pass follows at once.
func TestStuckIssuer(t *testing.T) {
	t.Parallel()
	h := punctual(t)
	h.hierarchy()
	h.base("REGISTRATION/x")
	h.clock.add(710 * day)
	h.renewals.fail("below STUCK", "its device is away", h.clock.Now())
	r := &round{next: h.clock.Now().Add(renewPeriod), due: []dueKey{{"REGISTRATION/x", "REGISTRATION", rankBase, h.clock.Now()}}}
	for i := range maxRenewals + 1 {
		r.due = append(r.due, dueKey{keyspec.Name(fmt.Sprintf("STUCK/%d", i)), "STUCK", rankBase, h.clock.Now().Add(-time.Hour)})
	}
	if err := h.renewAll(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	if n := h.currentVersion("REGISTRATION/x"); n != 2 {
		t.Errorf("the key of another issuer has version %d", n)
	}
	if wait := r.next.Sub(h.clock.Now()); wait < firstRetry {
		t.Errorf("the next pass follows after %s", wait)
	}
}

// TestRequestsDuringRotation: of those who ask while the daemon rotates, all get the same new key or the old one, and one is made.
func TestRequestsDuringRotation(t *testing.T) {
	t.Parallel()
	h := punctual(t)
	h.hierarchy()
	old := h.base("REGISTRATION/x")
	sealed := encryptTo(t, old, "data")
	h.clock.add(1040 * day) // the module key is due as well, and the base key has expired
	var wg sync.WaitGroup
	got := make([]*Certified, 64)
	wg.Go(func() { h.renewal() })
	for i := range got {
		wg.Go(func() {
			var err error
			if got[i], err = h.CertCurrent(t.Context(), h.app, "REGISTRATION/x", nil); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	h.renewal()
	for _, c := range got {
		if c != nil && (c.Ref.Version != 2 || string(c.Chain[0]) != string(got[0].Chain[0])) {
			t.Errorf("%s", c.Ref)
		}
	}
	for _, name := range []keyspec.Name{"REGISTRATION", "REGISTRATION/x"} {
		if n := h.currentVersion(name); n != 2 {
			t.Errorf("%s: version %d", name, n)
		}
	}
	h.opens(old.Ref, sealed, "data")
	h.checkChain(h.base("REGISTRATION/x"))
}

// TestOneThatCannotBeRead: it holds up no other key, is told once, and is in the timeline.
func TestOneThatCannotBeRead(t *testing.T) {
	t.Parallel()
	h := punctual(t)
	h.hierarchy()
	for _, name := range []keyspec.Name{"REGISTRATION/a", "REGISTRATION/b", "REGISTRATION/c"} {
		h.base(name)
	}
	u := h.itself(t.Context(), "test", keyspec.Ref{})
	u.store = h.store.Load()
	_, err := u.change("REGISTRATION/b", func(*keystore.Key) (*keystore.Change, error) {
		stored, err := u.store.Public(ref(t, "REGISTRATION/b@1"))
		stored.Chain = append([][]byte{[]byte("no certificate")}, stored.Chain[1:]...)
		return &keystore.Change{Public: map[keyspec.Version]keystore.Public{1: stored}}, err
	})
	if err != nil {
		t.Fatal(err)
	}
	u = h.itself(t.Context(), "test", keyspec.Ref{})
	u.store = h.store.Load()
	change, err := document(kindTrust, "BROKEN", 0, "no object", false)
	if err != nil {
		t.Fatal(err)
	}
	other, err := document(kindCAs+"BROKEN", "00", 0, "no object", false)
	if err != nil {
		t.Fatal(err)
	}
	if err := u.commit(keystore.Commit{Documents: []keystore.DocumentChange{change, other}}); err != nil {
		t.Fatal(err)
	}
	h.clock.add(705 * day)
	for range 3 {
		h.renewal()
	}
	for name, n := range map[keyspec.Name]keyspec.Version{"REGISTRATION/a": 2, "REGISTRATION/b": 1, "REGISTRATION/c": 2, RootName: 2} {
		if got := h.currentVersion(name); got != n {
			t.Errorf("%s: version %d", name, got)
		}
	}
	told := "\n" + strings.Join(h.told(0), "\n")
	if strings.Count(told, "\nalert REGISTRATION/b ") != 1 || strings.Count(told, "\nalert  a part of the keys") != 1 {
		t.Error(told)
	}
	list := h.timeline(time.Time{})
	if !slices.ContainsFunc(list, func(d Due) bool { return d.Key.Name == "" && strings.Contains(d.Detail, "BROKEN") }) {
		t.Errorf("%+v", list)
	}
	if !slices.ContainsFunc(list, func(d Due) bool { return d.Key.Name == "REGISTRATION/b" && d.Then == ThenAlert }) {
		t.Errorf("%+v", list)
	}
}
