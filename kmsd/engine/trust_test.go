package engine

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/pki"
)

// outside is a CA that is none of ours.
type outside struct {
	t      testing.TB
	signer crypto.Signer
	c      *x509.Certificate
	now    time.Time
}

// newOutside makes a CA below issuer, or a root.
func (h *house) newOutside(name string, issuer *outside, years int) *outside {
	h.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		h.t.Fatal(err)
	}
	o := &outside{t: h.t, signer: key, now: h.clock.Now()}
	s, err := pki.ParseSubject("CN="+name+",O=Outside", nil, nil, nil, nil)
	if err != nil {
		h.t.Fatal(err)
	}
	p := pki.Profile{NotBefore: o.now.Add(-time.Hour), NotAfter: o.now.AddDate(years, 0, -1), CA: true, PathLen: -1}
	var der []byte
	if issuer == nil {
		der, err = pki.SelfSign(key, s, p)
	} else {
		der, err = pki.Issue(issuer.signer, issuer.c, key.Public(), s, p)
	}
	if err != nil {
		h.t.Fatal(err)
	}
	if o.c, err = pki.ParseCertificate(der); err != nil {
		h.t.Fatal(err)
	}
	return o
}

// leaf has the CA issue a certificate for a key, or for a new one.
func (o *outside) leaf(dn string, public crypto.PublicKey, change ...func(*pki.Profile)) *x509.Certificate {
	o.t.Helper()
	if public == nil {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			o.t.Fatal(err)
		}
		public = key.Public()
	}
	s, err := pki.ParseSubject(dn, nil, nil, nil, nil)
	if err != nil {
		o.t.Fatal(err)
	}
	p := pki.Profile{NotBefore: o.now.Add(-time.Hour), NotAfter: o.now.AddDate(1, 0, 0)}
	for _, f := range change {
		f(&p)
	}
	der, err := pki.Issue(o.signer, o.c, public, s, p)
	if err != nil {
		o.t.Fatal(err)
	}
	c, err := pki.ParseCertificate(der)
	if err != nil {
		o.t.Fatal(err)
	}
	return c
}

// list has the CA publish a revocation list.
func (o *outside) list(number int64, revoked ...*x509.Certificate) []byte {
	o.t.Helper()
	l := pki.RevocationList{Number: big.NewInt(number), ThisUpdate: o.now.Add(-time.Minute), NextUpdate: o.now.Add(30 * 24 * time.Hour)}
	for _, c := range revoked {
		l.Revoked = append(l.Revoked, pki.Revocation{Serial: c.SerialNumber, At: o.now.Add(-time.Minute), Reason: keyspec.Superseded})
	}
	der, err := pki.SignCRL(o.signer, o.c, l)
	if err != nil {
		o.t.Fatal(err)
	}
	return der
}

// added adds CAs to a domain and returns what came of each, in words.
func (h *house) added(domain string, list ...*x509.Certificate) string {
	h.t.Helper()
	results, err := h.TrustAdd(h.t.Context(), h.admin, domain, list)
	if err != nil {
		h.t.Fatal(err)
	}
	var words []string
	for _, r := range results {
		if r.Added != (len(r.Reasons) == 0) || r.Added != (r.Role != "") {
			h.t.Errorf("%+v", r)
		}
		if r.Added {
			words = append(words, string(r.Role))
		} else {
			words = append(words, string(r.Reasons[0].Code))
		}
	}
	return strings.Join(words, " ")
}

// judged returns the verdict on a chain in one word.
func (h *house) judged(domain string, chain ...*x509.Certificate) string {
	h.t.Helper()
	v, err := h.TrustVerify(h.t.Context(), h.app, domain, raws(chain), time.Time{})
	if err != nil {
		h.t.Fatal(err)
	}
	if v.Trusted != (len(v.Reasons) == 0) || v.Domain != strings.ToUpper(domain) {
		h.t.Errorf("%+v", v)
	}
	if v.Trusted {
		return "trusted"
	}
	return string(v.Reasons[0].Code)
}

func (h *house) removed(domain string, role Role, c *x509.Certificate) error {
	return h.TrustRemove(h.t.Context(), h.admin, domain, role, sha256.Sum256(c.Raw))
}

func expect(t testing.TB, what, got, want string) {
	t.Helper()
	if got != want {
		t.Errorf("%s: %q, want %q", what, got, want)
	}
}

func TestTrustAdd(t *testing.T) {
	h := newHouse(t)
	root := h.newOutside("Root", nil, 10)
	middle := h.newOutside("Middle", root, 9)
	low := h.newOutside("Low", middle, 8)
	other := h.newOutside("Other", nil, 10)
	lost := h.newOutside("Lost", other, 9)
	short := h.newOutside("Short", root, 1)
	notCA := root.leaf("CN=leaf", nil, func(p *pki.Profile) { p.NotAfter = h.clock.Now().AddDate(5, 0, 0) })

	expect(t, "without a root", h.added("device", middle.c, low.c), "untrusted untrusted")
	expect(t, "leaf first", h.added("Device", low.c, notCA, middle.c, lost.c, short.c, root.c), "intermediate not-a-ca intermediate untrusted short-validity root")
	expect(t, "again", h.added("DEVICE", root.c, low.c), "duplicate duplicate")
	leaf := low.leaf("CN=x", nil)
	expect(t, "leaf alone", h.judged("device", leaf), "trusted")
	expect(t, "in another domain", h.judged("AUTH", leaf, low.c, middle.c, root.c), "untrusted")
	expect(t, "of another root", h.judged("DEVICE", lost.leaf("CN=y", nil), lost.c, other.c), "untrusted")

	_, err := h.TrustAdd(t.Context(), h.app, "DEVICE", []*x509.Certificate{other.c})
	want(t, "on the application socket", err, ErrDenied)
	for _, name := range []string{"", "a b", "ÄRGER", strings.Repeat("A", MaxDomainName+1), "NEW"} {
		_, err := h.TrustAdd(t.Context(), h.admin, name, []*x509.Certificate{other.c})
		want(t, "domain "+name, err, ErrInput)
	}
	_, err = h.TrustAdd(t.Context(), h.admin, OwnDomain, []*x509.Certificate{other.c})
	want(t, "our own domain", err, ErrUnsupported)
	d, err := h.SetTrustDomain(t.Context(), h.admin, &Domain{Name: "new", CADays: 30})
	if err != nil || *d != (Domain{"NEW", 30, defaultPartnerDays, true}) {
		t.Fatal(d, err)
	}
	expect(t, "with a rule of its own", h.added("NEW", short.c, root.c), "intermediate root")
	list, err := h.TrustDomains(t.Context(), h.app)
	if err != nil || len(list) != len(defaultDomains)+1 || list[4].Name != "NEW" || list[4].CADays != 30 || list[0].Stored {
		t.Error(list, err)
	}
	h.restart()
	expect(t, "after a restart", h.judged("DEVICE", leaf), "trusted")
	// Everything is recorded, with what was added.
	if all := strings.Join(h.records(), "\n"); !strings.Contains(all, "trust_add @0 ok DEVICE: 3 of 6: intermediate "+shortSum(low.c)) {
		t.Error(all)
	}
}

// TestTrustRemoveTakesEffectAtOnce asks before and after: no cache outlives a removal.
func TestTrustRemoveTakesEffectAtOnce(t *testing.T) {
	h := newHouse(t)
	root, second := h.newOutside("Root", nil, 10), h.newOutside("Second", nil, 10)
	middle := h.newOutside("Middle", root, 9)
	leaf := middle.leaf("CN=x", nil)
	h.added("DEVICE", root.c, middle.c, second.c)
	chain := []*x509.Certificate{leaf, middle.c, root.c}
	expect(t, "before", h.judged("DEVICE", chain...), "trusted")
	if err := h.removed("DEVICE", "", middle.c); err != nil {
		t.Fatal(err)
	}
	expect(t, "without the CA, which comes along and whose root is trusted", h.judged("DEVICE", chain...), "removed")
	want(t, "again", h.removed("DEVICE", RoleIntermediate, middle.c), ErrInput)
	expect(t, "back", h.added("DEVICE", middle.c), "intermediate")
	expect(t, "back", h.judged("DEVICE", chain...), "trusted")
	if err := h.removed("device", RoleRoot, root.c); err != nil {
		t.Fatal(err)
	}
	expect(t, "without the root", h.judged("DEVICE", chain...), "removed")
	expect(t, "without the root", h.judged("DEVICE", leaf), "removed")
	expect(t, "a new CA below it", h.added("DEVICE", h.newOutside("New", root, 9).c), "removed")
	h.restart()
	expect(t, "after a restart", h.judged("DEVICE", chain...), "removed")
	want(t, "what is not there", h.removed("DEVICE", "", leaf), ErrInput)
	want(t, "of another domain", h.removed("AUTH", "", second.c), ErrInput)
	want(t, "unknown role", h.TrustRemove(t.Context(), h.admin, "DEVICE", "king", [32]byte{}), ErrInput)
	want(t, "on the application socket", h.TrustRemove(t.Context(), h.app, "DEVICE", "", sha256.Sum256(second.c.Raw)), ErrDenied)

	// Verdicts that are under way while a root is removed are either of before or of after; from the end of the removal on
	// there is none of before.
	h.added("DEVICE", root.c)
	var group sync.WaitGroup
	gone := make(chan struct{})
	for range 4 {
		group.Go(func() {
			for range 20 {
				select {
				case <-gone:
					if got := h.judged("DEVICE", chain...); got != "removed" {
						t.Errorf("after the removal: %s", got)
					}
				default:
					h.judged("DEVICE", chain...)
				}
			}
		})
	}
	if err := h.removed("DEVICE", RoleRoot, root.c); err != nil {
		t.Error(err)
	}
	close(gone)
	group.Wait()
}

func TestForeignCRLs(t *testing.T) {
	h := newHouse(t)
	ctx := t.Context()
	root := h.newOutside("Root", nil, 10)
	middle := h.newOutside("Middle", root, 9)
	stranger := h.newOutside("Stranger", nil, 9)
	h.added("DEVICE", root.c, middle.c)
	good, bad := middle.leaf("CN=good", nil), middle.leaf("CN=bad", nil)
	v, err := h.TrustVerify(ctx, h.app, "DEVICE", [][]byte{good.Raw}, time.Time{})
	if err != nil || fmt.Sprint(v.Unchecked) != "[0 1]" {
		t.Fatal(v, err)
	}
	entry, err := h.CRLAdd(ctx, h.admin, "device", middle.list(5, bad))
	if err != nil || entry.Entries != 1 || entry.Number.Int64() != 5 {
		t.Fatal(entry, err)
	}
	expect(t, "revoked", h.judged("DEVICE", bad), "revoked")
	expect(t, "not revoked", h.judged("DEVICE", good), "trusted")
	earlier := *middle
	earlier.now = middle.now.Add(-time.Hour)
	for name, data := range map[string][]byte{
		"older": middle.list(4), "of a stranger": stranger.list(1), "of no CA": good.Raw, "older, of the same number": earlier.list(5),
	} {
		_, err := h.CRLAdd(ctx, h.admin, "DEVICE", data)
		want(t, name, err, pki.ErrCRL)
	}
	_, err = h.CRLAdd(ctx, h.app, "DEVICE", middle.list(9))
	want(t, "on the application socket", err, ErrDenied)
	_, err = h.CRLAdd(ctx, h.admin, "AUTH", middle.list(9))
	want(t, "in a domain without its issuer", err, pki.ErrCRL)

	// The root revokes the CA in between.
	if _, err := h.CRLAdd(ctx, h.admin, "DEVICE", root.list(1, middle.c)); err != nil {
		t.Fatal(err)
	}
	expect(t, "below a revoked CA", h.judged("DEVICE", good), "revoked")
	_, err = h.CRLAdd(ctx, h.admin, "DEVICE", middle.list(6))
	want(t, "by a revoked CA", err, pki.ErrCRL)
	if _, err := h.CRLAdd(ctx, h.admin, "DEVICE", root.list(2)); err != nil { // it takes it back
		t.Fatal(err)
	}
	expect(t, "the list says so no more", h.judged("DEVICE", good), "trusted")

	// A long list takes several documents; a short one after it leaves none of them.
	many := make([]*x509.Certificate, 3000)
	for i := range many {
		many[i] = &x509.Certificate{SerialNumber: new(big.Int).Lsh(big.NewInt(int64(i+1)), 120)}
	}
	long := middle.list(7, append(many, good)...)
	if len(long) < 2*listPart {
		t.Fatalf("%d bytes are not long", len(long))
	}
	if _, err := h.CRLAdd(ctx, h.admin, "DEVICE", long); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		expect(t, "on a long list", h.judged("DEVICE", good), "revoked")
		expect(t, "not on a long list", h.judged("DEVICE", bad), "trusted")
		h.restart() // and without what was parsed
	}
	list, next, err := h.TrustList(ctx, h.app, "DEVICE", RoleCRL, nil)
	if err != nil || next != nil || len(list) != 2 {
		t.Fatal(list, err)
	}
	if _, err := h.CRLAdd(ctx, h.admin, "DEVICE", middle.list(8)); err != nil {
		t.Fatal(err)
	}
	expect(t, "the short list", h.judged("DEVICE", good), "trusted")
	parts, _, err := h.Engine.store.Load().Documents(kindParts+"DEVICE", nil, 10)
	if err != nil || len(parts) != 0 {
		t.Errorf("%d parts are left, %v", len(parts), err)
	}

	// When it runs out nothing is good any more, until there is a new one or it is removed.
	h.clock.add(40 * 24 * time.Hour)
	expect(t, "stale", h.judged("DEVICE", good), "stale-crl")
	_, err = h.CRLAdd(ctx, h.admin, "DEVICE", middle.list(9))
	want(t, "one that has run out", err, pki.ErrCRL)
	root.now, middle.now = h.clock.Now(), h.clock.Now()
	if _, err := h.CRLAdd(ctx, h.admin, "DEVICE", middle.list(10)); err != nil { // though the root's is stale, too
		t.Fatal(err)
	}
	expect(t, "the root's is stale", h.judged("DEVICE", good), "stale-crl")
	if err := h.TrustRemove(ctx, h.admin, "DEVICE", RoleCRL, listName(root.c)); err != nil {
		t.Fatal(err)
	}
	expect(t, "without the root's", h.judged("DEVICE", good), "trusted")
	want(t, "removing it again", h.TrustRemove(ctx, h.admin, "DEVICE", RoleCRL, listName(root.c)), ErrInput)
}

func TestDomainNames(t *testing.T) {
	for name, good := range map[string]string{"device": "DEVICE", "a.b-c_9": "A.B-C_9", "OWN": "OWN"} {
		if got, err := parseDomain(name); err != nil || got != good {
			t.Error(name, got, err)
		}
	}
	for _, name := range []string{"", "A/B", "dev\u0131ce", "mi\u017fp", "A B", "A\x00", strings.Repeat("A", MaxDomainName+1)} {
		if got, err := parseDomain(name); !errors.Is(err, ErrInput) {
			t.Errorf("%q is %q, %v", name, got, err)
		}
	}
}

func TestPartners(t *testing.T) {
	h := newHouse(t)
	ctx := t.Context()
	root := h.newOutside("Root", nil, 10)
	h.added("AUTH", root.c)
	long := func(p *pki.Profile) { p.NotAfter = h.clock.Now().AddDate(1, 0, 0) }
	add := func(domain, organization string, list ...*x509.Certificate) string {
		t.Helper()
		r, err := h.PartnerAdd(ctx, h.admin, domain, organization, list)
		if err != nil {
			t.Fatal(err)
		}
		if r.Added {
			return "added"
		}
		return string(r.Reasons[0].Code)
	}
	good := root.leaf("CN=p,O=Partner", nil, long)
	expect(t, "other organization", add("AUTH", "partner", good), "organization")
	expect(t, "other domain", add("MISP", "Partner", good), "untrusted")
	expect(t, "self-signed", add("AUTH", "Outside", h.newOutside("Self", nil, 5).c), "self-signed")
	expect(t, "short", add("AUTH", "Partner", root.leaf("CN=p,O=Partner", nil, func(p *pki.Profile) { p.NotAfter = h.clock.Now().AddDate(0, 6, 0) })), "short-validity")
	expect(t, "in a chain", add("auth", "Partner", root.c, good), "added")
	expect(t, "again", add("AUTH", "Partner", good), "duplicate")
	v, err := h.TrustVerify(ctx, h.app, "AUTH", [][]byte{good.Raw}, time.Time{})
	if err != nil || !v.Trusted || v.Partner != "Partner" {
		t.Error(v, err)
	}
	list, _, err := h.TrustList(ctx, h.app, "AUTH", RolePartner, nil)
	if err != nil || len(list) != 1 || list[0].Organization != "Partner" || list[0].AddedBy != "owner" {
		t.Error(list, err)
	}
	if err := h.removed("AUTH", RolePartner, good); err != nil {
		t.Fatal(err)
	}
	expect(t, "removed, though its CA is trusted", h.judged("AUTH", good), "removed")
	expect(t, "back", add("AUTH", "Partner", good), "added")
	expect(t, "back", h.judged("AUTH", good), "trusted")
	// A partner that is a CA takes what it issued along, when it goes.
	issuer := h.newOutside("Issuer", root, 3)
	below := issuer.leaf("CN=below", nil)
	expect(t, "a CA", add("AUTH", "Outside", issuer.c), "added")
	expect(t, "below it", h.judged("AUTH", below, issuer.c), "trusted")
	if err := h.removed("AUTH", RolePartner, issuer.c); err != nil {
		t.Fatal(err)
	}
	expect(t, "below it, when it was removed", h.judged("AUTH", below, issuer.c), "removed")
	expect(t, "below it, when it was removed", h.judged("AUTH", below, root.c, disguised(t, issuer.c)), "removed")
	h.added("AUTH", issuer.c)
	expect(t, "as a CA of the domain", h.judged("AUTH", below, issuer.c), "trusted")
	_, err = h.PartnerAdd(ctx, h.app, "AUTH", "Partner", []*x509.Certificate{good})
	want(t, "on the application socket", err, ErrDenied)
	_, err = h.PartnerAdd(ctx, h.admin, "AUTH", "", []*x509.Certificate{good})
	want(t, "without an organization", err, ErrInput)
	_, err = h.PartnerAdd(ctx, h.admin, "AUTH", "Partner", []*x509.Certificate{good, h.newOutside("x", nil, 2).c})
	want(t, "two ends", err, pki.ErrChain)
}

func TestTrustListPages(t *testing.T) {
	h := newHouse(t)
	var all []*x509.Certificate
	for i := range 30 {
		all = append(all, h.newOutside(fmt.Sprint("Root ", i, strings.Repeat("x", 200)), nil, 10).c)
	}
	h.added("DEVICE", all...)
	seen, pages := map[[32]byte]bool{}, 0
	for after := []byte(nil); ; pages++ {
		list, next, err := h.TrustList(t.Context(), h.app, "DEVICE", "", after)
		if err != nil {
			t.Fatal(err)
		}
		for _, entry := range list {
			seen[entry.SHA256] = true
		}
		if after = next; after == nil {
			break
		}
	}
	if len(seen) != len(all) {
		t.Errorf("%d of %d on %d pages", len(seen), len(all), pages)
	}
	_, _, err := h.TrustList(t.Context(), h.app, "DEVICE", "king", nil)
	want(t, "unknown role", err, ErrInput)
}

// TestDamagedTrustIsNotIgnored: who cannot read what was removed or revoked trusts nothing.
func TestDamagedTrustIsNotIgnored(t *testing.T) {
	h := newHouse(t)
	root := h.newOutside("Root", nil, 10)
	h.added("DEVICE", root.c)
	leaf := root.leaf("CN=x", nil)
	for kind, data := range map[string]string{
		kindCAs + "DEVICE": `{"format":1,"role":"root","certificate":"AAAA","added":{"at":"2026-01-01T00:00:00Z","by":"x"}}`,
		kindCRLs + "AUTH":  `{"format":1,"data":"AAAA","parts":1,"sha256":"AAAA"}`,
		kindCAs + "MISP":   `{"format":1,"role":"root","surprise":1}`,
	} {
		change := keystore.DocumentChange{Document: keystore.Document{Kind: kind, Name: "x", Data: []byte(data)}}
		if err := h.Engine.store.Load().Apply(t.Context(), keystore.Commit{Documents: []keystore.DocumentChange{change}}); err != nil {
			t.Fatal(err)
		}
		domain := kind[strings.Index(kind, "/")+1:]
		if _, err := h.TrustVerify(t.Context(), h.app, domain, [][]byte{leaf.Raw}, time.Time{}); !errors.Is(err, keystore.ErrDamaged) {
			t.Errorf("%s: %v", domain, err)
		}
	}
}

func TestOwnDomain(t *testing.T) {
	h := newHouse(t)
	ctx := t.Context()
	generate := func(name keyspec.Name, force bool) *x509.Certificate {
		t.Helper()
		c, err := h.MasterGenerate(ctx, h.admin, &Master{Name: name, Force: force})
		if err != nil {
			t.Fatal(err)
		}
		x, err := pki.ParseCertificate(c.Chain[0])
		if err != nil {
			t.Fatal(err)
		}
		return x
	}
	root, module := generate(RootName, false), generate("REGISTRATION", false)
	base := func(name keyspec.Name) *x509.Certificate {
		t.Helper()
		c, err := h.CertCurrent(ctx, h.app, name, nil)
		if err != nil {
			t.Fatal(err)
		}
		x, err := pki.ParseCertificate(c.Chain[0])
		if err != nil {
			t.Fatal(err)
		}
		return x
	}
	one, two := base("REGISTRATION/1_1"), base("REGISTRATION/1_2")
	expect(t, "base", h.judged("own", one), "trusted")
	expect(t, "module", h.judged(OwnDomain, module), "trusted")
	expect(t, "root", h.judged(OwnDomain, root), "trusted")
	stranger := h.newOutside("Stranger", nil, 5)
	expect(t, "stranger", h.judged(OwnDomain, stranger.leaf("CN=x", nil), stranger.c), "untrusted")
	// A certificate for somebody's request is attached to no key.
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	s, err := pki.ParseSubject("CN=requested", nil, nil, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	request, err := pki.Request(key, s)
	if err != nil {
		t.Fatal(err)
	}
	issued, err := h.CertIssue(ctx, h.app, ref(t, "REGISTRATION"), request, keyspec.Ref{}, &pki.Subject{}, &pki.Profile{})
	if err != nil {
		t.Fatal(err)
	}
	requested, err := pki.ParseCertificate(issued[0])
	if err != nil {
		t.Fatal(err)
	}
	expect(t, "for a request", h.judged(OwnDomain, requested), "trusted")

	// Rotation leaves what was issued before trusted, revocation does not.
	generate("REGISTRATION", true)
	expect(t, "by a module key that was rotated out", h.judged(OwnDomain, one), "trusted")
	if _, err := h.Revoke(ctx, h.app, ref(t, "REGISTRATION/1_1"), keyspec.Superseded, ReplaceDefault); err != nil {
		t.Fatal(err)
	}
	expect(t, "revoked", h.judged(OwnDomain, one), "revoked")
	expect(t, "not revoked", h.judged(OwnDomain, two), "trusted")
	change, err := revocationChange(&Revocation{ref(t, "REGISTRATION@1"), ref(t, "ROOT@1"), module, h.clock.Now(), keyspec.KeyCompromise})
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Engine.store.Load().Apply(ctx, keystore.Commit{Documents: []keystore.DocumentChange{change}}); err != nil {
		t.Fatal(err)
	}
	expect(t, "below a revoked module key", h.judged(OwnDomain, two), "revoked")
	expect(t, "for a request, below a revoked module key", h.judged(OwnDomain, requested), "revoked")
	list, _, err := h.TrustList(ctx, h.app, OwnDomain, "", nil)
	if err != nil || len(list) != 3 || list[0].Role != RoleRoot {
		t.Error(len(list), err)
	}
	if _, err := h.Revoke(ctx, h.admin, ref(t, "ROOT"), keyspec.KeyCompromise, ReplaceDefault); err != nil {
		t.Fatal(err)
	}
	expect(t, "below a root that is compromised", h.judged(OwnDomain, base("REGISTRATION/1_2")), "removed")
}

func TestCertUpload(t *testing.T) {
	h := newHouse(t)
	ctx := t.Context()
	ca := h.newOutside("Outside CA", nil, 10)
	low := h.newOutside("Low", ca, 9)
	requested := func(name keyspec.Name, force bool) *x509.CertificateRequest {
		t.Helper()
		c, err := h.MasterGenerate(ctx, h.admin, &Master{Name: name, CSR: true, Force: force})
		if err != nil {
			t.Fatal(err)
		}
		r, err := pki.ParseRequest(c.Request)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	isCA := func(p *pki.Profile) { p.CA, p.PathLen, p.NotAfter = true, 0, h.clock.Now().AddDate(2, 0, 0) }
	upload := func(name string, domain string, list ...*x509.Certificate) (*Certified, error) {
		return h.CertUpload(ctx, h.app, ref(t, name), list, domain)
	}
	request := requested("PMS", false)
	module := low.leaf("CN=PMS,O=Outside", request.PublicKey, isCA)
	_, err := upload("PMS", "", low.leaf("CN=PMS", nil, isCA), low.c)
	want(t, "another key", err, ErrInput)
	_, err = upload("PMS", "", low.leaf("CN=PMS", request.PublicKey), low.c)
	want(t, "no CA", err, pki.ErrCertificate)
	_, err = upload("PMS", "", module, ca.c)
	want(t, "what is no chain", err, pki.ErrChain)
	_, err = upload("PMS", "AUTH", module, low.c, ca.c)
	want(t, "not trusted in the domain", err, pki.ErrChain)
	late := h.clock.Now().AddDate(0, 0, 1)
	_, err = upload("PMS", "", low.leaf("CN=PMS", request.PublicKey, isCA, func(p *pki.Profile) { p.NotBefore = late }), low.c)
	want(t, "of the future", err, pki.ErrChain)
	_, err = upload("PMS", "", h.newOutside("Old", nil, -1+2).c)
	want(t, "the CA instead", err, ErrInput)

	out, err := upload("PMS", "", ca.c, module, low.c) // in no order
	if err != nil || len(out.Chain) != 3 || !bytes.Equal(out.Chain[0], module.Raw) || !out.Expires.Equal(module.NotAfter) || out.Ref.Version != 1 {
		t.Fatal(out, err)
	}
	base, err := h.CertCurrent(ctx, h.app, "PMS/partner-1", nil)
	if err != nil || len(base.Chain) != 4 {
		t.Fatal(base, err)
	}
	// Another one in its place: the thumbprint of the first still finds the key.
	h.added("AUTH", ca.c, low.c)
	second := low.leaf("CN=PMS again,O=Outside", request.PublicKey, isCA)
	if out, err = upload("PMS@1", "AUTH", second); err != nil || len(out.Chain) != 3 {
		t.Fatal(out, err)
	}
	for _, c := range []*x509.Certificate{module, second} {
		sum := sha256.Sum256(c.Raw)
		if key, number, err := h.Find(ctx, h.app, keystore.AliasThumbprint, sum[:]); err != nil || key.Name != "PMS" || number != 1 {
			t.Errorf("%s: %v", c.Subject, err)
		}
	}
	// An application does not make its key live longer by a certificate, an administrator may.
	longer := low.leaf("CN=PMS for long,O=Outside", request.PublicKey, isCA, func(p *pki.Profile) { p.NotAfter = h.clock.Now().AddDate(6, 0, 0) })
	if out, err = upload("PMS", "", longer, low.c); err != nil || !out.Expires.Equal(second.NotAfter) {
		t.Fatal(out, err)
	}
	if out, err = h.CertUpload(ctx, h.admin, ref(t, "PMS"), []*x509.Certificate{longer, low.c}, ""); err != nil || !out.Expires.Equal(longer.NotAfter) {
		t.Fatal(out, err)
	}
	if _, err := h.Revoke(ctx, h.app, ref(t, "PMS"), keyspec.Superseded, ReplaceDefault); err != nil {
		t.Fatal(err)
	}
	_, err = upload("PMS", "", low.leaf("CN=PMS", request.PublicKey, isCA), low.c)
	want(t, "for a revoked version", err, ErrState)
	_, err = upload("PMS/none", "", module, low.c)
	want(t, "for no key", err, ErrNotAvailable)
}

func TestOtherDomain(t *testing.T) {
	h := newHouse(t)
	ctx := t.Context()
	ca := h.newOutside("Partner CA", nil, 10)
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	encipher := func(p *pki.Profile) { p.KeyUsage = []string{"keyEncipherment"} }
	first := ca.leaf("CN=first", key.Public(), encipher)
	upload := func(name keyspec.Name, domain string, list ...*x509.Certificate) (*Certified, error) {
		return h.CertUploadOther(ctx, h.app, name, list, domain)
	}
	for name, c := range map[string]struct {
		key  keyspec.Name
		c    *x509.Certificate
		want error
	}{
		"an unknown application": {"NOBODY/partner", first, ErrApplication},
		"a module key":           {"PMS", first, ErrUnsupported},
		"a sign key":             {"PMS/SIGN", first, ErrUnsupported},
		"below the root":         {"ROOT/x", first, ErrNotMade},
		"an EC key":              {"PMS/partner", ca.leaf("CN=ec", nil), pki.ErrKey},
		"for signatures":         {"PMS/partner", ca.leaf("CN=s", key.Public(), func(p *pki.Profile) { p.KeyUsage = []string{"digitalSignature"} }), pki.ErrCertificate},
		"of the future":          {"PMS/partner", ca.leaf("CN=f", key.Public(), encipher, func(p *pki.Profile) { p.NotBefore = h.clock.Now().Add(time.Hour) }), pki.ErrChain},
	} {
		_, err := upload(c.key, "", c.c)
		want(t, name, err, c.want)
	}
	_, err = upload("PMS/partner", "AUTH", first)
	want(t, "not trusted in the domain", err, pki.ErrChain)
	h.added("AUTH", ca.c)
	out, err := upload("PMS/partner", "auth", first)
	if err != nil || out.Ref.Version != 1 || len(out.Chain) != 2 || !out.Expires.Equal(first.NotAfter) {
		t.Fatal(out, err)
	}
	current, err := h.CertCurrent(ctx, h.app, "PMS/partner", nil)
	if err != nil || !bytes.Equal(current.Chain[0], first.Raw) || current.Made || current.KeyID != out.KeyID {
		t.Fatal(current, err)
	}
	sealed, _, err := h.Encrypt(ctx, h.app, ref(t, "PMS/partner"), []byte("secret"), nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if plain, err := rsa.DecryptOAEP(sha256.New(), nil, key, sealed, nil); err != nil || string(plain) != "secret" {
		t.Errorf("%q %v", plain, err)
	}
	_, _, err = h.Decrypt(ctx, h.app, ref(t, "PMS/partner"), sealed, nil, nil, nil)
	want(t, "decrypting", err, ErrUsage)
	_, err = upload("PMS/partner", "", first)
	want(t, "the same again", err, ErrState)
	second := ca.leaf("CN=second", key.Public(), encipher)
	if out, err = upload("PMS/partner", "", second); err != nil || out.Ref.Version != 2 || out.KeyID == current.KeyID {
		t.Fatal(out, err)
	}
	_, err = h.CertUpload(ctx, h.app, ref(t, "PMS/partner"), []*x509.Certificate{second}, "")
	want(t, "as a certificate of ours", err, ErrUnsupported)
	// As long as the newest is somebody else's no base key is made, not even when it has run out.
	h.clock.add(2 * 365 * 24 * time.Hour)
	_, err = h.CertCurrent(ctx, h.app, "PMS/partner", nil)
	want(t, "when it has run out", err, ErrExpired)
	h.restart()
	if _, _, err := h.Encrypt(ctx, h.app, ref(t, "PMS/partner@1"), []byte("x"), nil, nil); err == nil {
		t.Error("encrypts to what has run out")
	}
	// And not over a key of our own.
	if _, err := h.MasterGenerate(ctx, h.admin, &Master{Name: RootName}); err != nil {
		t.Fatal(err)
	}
	if _, err := h.MasterGenerate(ctx, h.admin, &Master{Name: "PMS"}); err != nil {
		t.Fatal(err)
	}
	if _, err := h.CertCurrent(ctx, h.app, "PMS/own", nil); err != nil {
		t.Fatal(err)
	}
	ca.now = h.clock.Now()
	_, err = upload("PMS/own", "", ca.leaf("CN=x", key.Public(), encipher))
	want(t, "over a key of ours", err, ErrState)
	own, err := h.CertCurrent(ctx, h.app, "PMS/own", nil)
	if err != nil {
		t.Fatal(err)
	}
	ours, err := pki.ParseCertificate(own.Chain[0])
	if err != nil {
		t.Fatal(err)
	}
	_, err = upload("PMS/alias", "", ours)
	want(t, "of a key of ours", err, ErrState)
	_, err = upload("PMS/alias", "", ca.leaf("CN=x", ours.PublicKey, encipher))
	want(t, "of a key of ours, by somebody else", err, ErrState)
}

// disguised returns a certificate that is as valid as c, with other bytes: of the ECDSA signature (r, s) it has (r, n-s).
func disguised(t testing.TB, c *x509.Certificate) *x509.Certificate {
	t.Helper()
	var signature struct{ R, S *big.Int }
	if _, err := asn1.Unmarshal(c.Signature, &signature); err != nil {
		t.Fatal(err)
	}
	signature.S.Sub(elliptic.P256().Params().N, signature.S)
	other, err := asn1.Marshal(signature)
	if err != nil {
		t.Fatal(err)
	}
	var outer struct {
		Signed, Algorithm asn1.RawValue
		Signature         asn1.BitString
	}
	if _, err := asn1.Unmarshal(c.Raw, &outer); err != nil {
		t.Fatal(err)
	}
	outer.Signature = asn1.BitString{Bytes: other, BitLength: 8 * len(other)}
	der, err := asn1.Marshal(outer)
	if err != nil {
		t.Fatal(err)
	}
	again, err := pki.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	if again.Equal(c) {
		t.Fatal("it is no disguise")
	}
	return again
}

// TestDisguisedCertificates: who has a certificate can change its signature so that it remains one.
func TestDisguisedCertificates(t *testing.T) {
	h := newHouse(t)
	ctx := t.Context()
	root := h.newOutside("Root", nil, 10)
	middle := h.newOutside("Middle", root, 9)
	h.added("DEVICE", root.c, middle.c)
	leaf := middle.leaf("CN=x,O=Partner", nil, func(p *pki.Profile) { p.NotAfter = h.clock.Now().AddDate(1, 0, 0) })
	expect(t, "a disguise is as good", h.judged("DEVICE", disguised(t, leaf), disguised(t, middle.c)), "trusted")
	expect(t, "the same CA", h.added("DEVICE", disguised(t, middle.c)), "duplicate")
	if r, err := h.PartnerAdd(ctx, h.admin, "DEVICE", "Partner", []*x509.Certificate{leaf}); err != nil || !r.Added {
		t.Fatal(r, err)
	}
	if err := h.removed("DEVICE", RolePartner, leaf); err != nil {
		t.Fatal(err)
	}
	expect(t, "a removed partner", h.judged("DEVICE", leaf), "removed")
	expect(t, "a removed partner in disguise", h.judged("DEVICE", disguised(t, leaf)), "removed")
	if err := h.removed("DEVICE", "", middle.c); err != nil {
		t.Fatal(err)
	}
	other := middle.leaf("CN=y", nil)
	expect(t, "below a removed CA in disguise", h.judged("DEVICE", other, disguised(t, middle.c)), "removed")
	if err := h.removed("DEVICE", "", root.c); err != nil {
		t.Fatal(err)
	}
	expect(t, "below a removed root in disguise", h.judged("DEVICE", other, disguised(t, middle.c), disguised(t, root.c)), "removed")

	// One of ours, issued by a key that signs with ECDSA.
	h.hierarchy()
	h.create("REGISTRATION/ca", keyspec.ECDSAP256, keyspec.Sign, keyspec.Verify, keyspec.Certify)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	imported := func(name keyspec.Name) {
		t.Helper()
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := h.Import(ctx, h.admin, &NewKey{Name: name, Algorithm: keyspec.ECDSAP256}, der, nil); err != nil {
			t.Fatal(err)
		}
	}
	imported("REGISTRATION/leaf")
	issue := func(key, issuer string, p pki.Profile) *x509.Certificate {
		t.Helper()
		s, err := pki.ParseSubject("CN="+key, nil, nil, nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		chain, err := h.CertIssue(ctx, h.app, ref(t, issuer), nil, ref(t, key), &s, &p)
		if err != nil {
			t.Fatal(err)
		}
		c, err := pki.ParseCertificate(chain[0])
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	issue("REGISTRATION/ca", "REGISTRATION", pki.Profile{CA: true, PathLen: 0})
	ours := issue("REGISTRATION/leaf", "REGISTRATION/ca", pki.Profile{})
	expect(t, "ours in disguise", h.judged(OwnDomain, disguised(t, ours)), "trusted")
	if _, err := h.Revoke(ctx, h.app, ref(t, "REGISTRATION/leaf"), keyspec.Superseded, ReplaceNo); err != nil {
		t.Fatal(err)
	}
	expect(t, "revoked", h.judged(OwnDomain, ours), "revoked")
	expect(t, "revoked, in disguise", h.judged(OwnDomain, disguised(t, ours)), "revoked")
	// Nor does it help that the public half is there under another name, too.
	imported("REGISTRATION/copy")
	expect(t, "revoked, and there twice", h.judged(OwnDomain, disguised(t, ours)), "revoked")
}
