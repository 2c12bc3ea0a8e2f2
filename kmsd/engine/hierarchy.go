package engine

import (
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/kmsd-project/kmsd/client/packet"
	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/keystore/secmem"
	"github.com/kmsd-project/kmsd/kmsd/mechanism"
	"github.com/kmsd-project/kmsd/kmsd/pki"
)

// The hierarchy is that of MOSIP: ROOT certifies the module key of each application and its sign keys, a module key certifies the
// base keys of its application. A version of a key is what MOSIP calls a key, and has one certificate at a time.
//
// Invariant: a key and its certificate are committed together, with the record of the act.

// The refusals of the hierarchy, beside those of the engine.
var (
	ErrNotGenerated  = fmt.Errorf("%w: it has not been generated", ErrState)
	ErrNoCertificate = fmt.Errorf("%w: it has no certificate", ErrState)
	ErrNotMade       = fmt.Errorf("%w: no keys are made for this name", ErrUnsupported)
)

// LabelNoReplace marks, with the value "no", a key that shall not be replaced by itself when it was revoked; and with "yes" one that shall,
// and is no base key, which are anyway.
const LabelNoReplace = "replace"

// Certified is a key version with its certificate.
type Certified struct {
	Ref       keyspec.Ref // with the version
	Chain     [][]byte    // DER, leaf first, the root last; empty while the certificate is awaited from an outside authority
	Request   []byte      // PKCS#10, DER, where one was asked for
	KeyID     string      // MOSIP's kid, empty for a symmetric key
	NotBefore time.Time
	Expires   time.Time // of key and certificate
	Made      bool      // by this very act
}

// rank is the place of a key in the hierarchy.
type rank string

const (
	rankRoot      rank = "root"
	rankModule    rank = "module"
	rankSign      rank = "sign"
	rankBase      rank = "base"
	rankSymmetric rank = "symmetric"
)

// The references of sign keys.
const (
	refSign    = "SIGN"
	refEd25519 = "ED25519_SIGN"
)

// signKey is a kind of sign key.
type signKey struct {
	reference string
	algorithm keyspec.Algorithm // empty: that of the application
}

var signKeys = []signKey{
	{refSign, ""},
	{"EC_SECP256K1_SIGN", keyspec.ECDSASecp256k1},
	{"EC_SECP256R1_SIGN", keyspec.ECDSAP256},
	{refEd25519, keyspec.Ed25519},
}

func signReference(reference string) *signKey {
	i := slices.IndexFunc(signKeys, func(s signKey) bool { return s.reference == reference })
	if i < 0 {
		return nil
	}
	return &signKeys[i]
}

// place is the name of a key with the rules for it.
type place struct {
	name      keyspec.Name
	app       *Application
	reference string // "" for the root and module keys
	rank      rank
	algorithm keyspec.Algorithm
	usages    []keyspec.Usage // empty: by profile
	profile   string          // of the usages
	issuer    keyspec.Name    // empty: itself, or nobody for a symmetric key
	days, pre int
}

// placeOf returns the rules for a name. symmetric says that it is to be an AES key, where the application does not say so.
func (u *use) placeOf(name keyspec.Name, symmetric bool) (*place, error) {
	if _, err := keyspec.ParseName(string(name)); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInput, err)
	}
	namespace, reference, _ := strings.Cut(string(name), "/")
	a, err := u.application(namespace)
	if err != nil {
		return nil, err
	}
	p := &place{name: name, app: a, reference: reference, days: a.Days, pre: a.PreExpireDays, algorithm: a.Algorithm}
	i := slices.IndexFunc(a.References, func(r Reference) bool { return r.Name == reference && r.Algorithm != "" })
	sign := signReference(reference)
	switch {
	case name == RootName:
		// Whoever may use a key that signs what he likes can make certificates with it: so the root signs nothing else.
		p.rank, p.usages = rankRoot, []keyspec.Usage{keyspec.Verify, keyspec.Certify}
	case name.IsModule():
		p.rank, p.profile, p.issuer = rankModule, mechanism.ProfileMOSIPModule, RootName
	case namespace == string(RootName):
		return nil, &Remedied{fmt.Errorf("%w: the root has no other keys", ErrNotMade), "name a key of an application: kmsctl app list"}
	case sign != nil:
		if symmetric {
			return nil, fmt.Errorf("%w: %s is a sign key", ErrInput, name)
		}
		p.rank, p.usages, p.issuer = rankSign, []keyspec.Usage{keyspec.Sign, keyspec.Verify}, RootName
		if sign.algorithm != "" {
			p.algorithm = sign.algorithm
		}
		if reference == refEd25519 {
			p.issuer = keyspec.Name(namespace)
		}
	case i >= 0 || symmetric:
		p.rank, p.algorithm, p.usages = rankSymmetric, keyspec.AES256GCM, []keyspec.Usage{keyspec.Encrypt, keyspec.Decrypt}
		p.days, p.pre = symmetricDays, 0
		if i >= 0 {
			p.days = a.References[i].Days
		}
	default:
		p.rank, p.algorithm, p.usages = rankBase, keyspec.RSA2048, []keyspec.Usage{keyspec.Encrypt, keyspec.Decrypt}
		p.issuer, p.days, p.pre = keyspec.Name(namespace), a.BaseDays, a.BasePreExpireDays
	}
	return p, nil
}

// refused says why no key is ever made by itself for a name, or nil.
func (p *place) refused() error {
	if namespace := p.name.Namespace(); p.rank == rankBase && (namespace == "KERNEL" || namespace == "PARTNER") {
		return &Remedied{fmt.Errorf("%w: %s has no base keys", ErrNotMade, namespace), "name a key of another application (kmsctl app list); sign keys are made by kmsctl master generate, as " + string(namespace) + "/SIGN"}
	}
	return nil
}

// standing is what there is of a key.
type standing struct {
	place   *place
	key     *keystore.Key     // shared: must not be changed; nil when there is none
	version *keystore.Version // the current one
	public  keystore.Public   // of version
	until   time.Time         // when version or its certificate expires, whichever comes first; zero: never
	usable  bool              // active, and certified unless it is a symmetric key
	early   bool              // certified by a clock that was ahead: not valid yet
	due     bool              // for replacement
}

// standing looks at the key of a place. The key of a machine, whose name an application may have as well, is ErrNotMade there: it gets neither
// a successor nor a certificate with which it would expire.
func (u *use) standing(p *place) (*standing, error) {
	s := &standing{place: p, due: true}
	key, err := u.metadata(u.store, p.name, u.now)
	if errors.Is(err, keystore.ErrNotFound) {
		return s, nil
	}
	if err != nil {
		return nil, err
	}
	if p.app != nil && key.Profile == mechanism.ProfileMOSIPMachine {
		return nil, fmt.Errorf("%w: %s is the identity of a registration machine", ErrNotMade, p.name)
	}
	s.key = key
	if s.version, err = version(key, 0, u.now); err != nil {
		return nil, err
	}
	if s.public, err = u.store.Public(keyspec.Ref{Name: key.Name, Version: s.version.Number}); err != nil {
		return nil, err
	}
	s.until = s.version.Expires
	if len(s.public.Chain) > 0 {
		c, err := pki.ParseCertificate(s.public.Chain[0])
		if err != nil {
			return nil, err
		}
		if s.until.IsZero() || c.NotAfter.Before(s.until) {
			s.until = c.NotAfter
		}
		s.early = u.now.Add(clockTolerance).Before(c.NotBefore)
	}
	active := stateAt(key, s.version, u.now) == keyspec.Active && s.version.DestroyAt.IsZero() && (s.until.IsZero() || u.now.Before(s.until))
	s.usable = active && (len(s.public.Chain) > 0 || len(s.public.SPKI) == 0)
	s.due = !active || s.early || !s.until.IsZero() && !u.now.Before(s.renewal())
	return s, nil
}

// renewal is when the current version is due for replacement: its expiry less the pre-expire days, or less where the issuer has cut its
// validity short.
func (s *standing) renewal() time.Time {
	before := days(s.place.pre)
	if valid := s.until.Sub(s.version.NotBefore); valid < days(s.place.days) {
		before = fitting(before, valid)
	}
	return s.until.Add(-before)
}

func days(n int) time.Duration { return time.Duration(n) * 24 * time.Hour }

// awaits reports whether the current version waits for a certificate from outside.
func (s *standing) awaits() bool {
	return s.key != nil && stateAt(s.key, s.version, s.version.NotBefore) == keyspec.Active && !s.usable && len(s.public.Chain) == 0 && len(s.public.SPKI) > 0
}

// certified is the current version as an answer.
func (s *standing) certified() *Certified {
	return &Certified{Ref: keyspec.Ref{Name: s.key.Name, Version: s.version.Number}, Chain: s.public.Chain, KeyID: KeyID(s.key, s.version, s.public),
		NotBefore: s.version.NotBefore, Expires: s.until}
}

// KeyID returns MOSIP's kid of a key version, which it makes of application, reference and the day of generation; of a foreign
// certificate, of its thumbprint instead of the day. It is empty for symmetric keys, which have none.
//
// Two versions that were made on one day (UTC) have the same kid. So a kid is a hint: who verifies tries every version that has it,
// as Verify does, or goes by the thumbprint of the certificate.
func KeyID(key *keystore.Key, v *keystore.Version, p keystore.Public) string {
	if len(p.SPKI) == 0 {
		return ""
	}
	if unique := key.Labels[LabelUnique+strconv.FormatUint(uint64(v.Number), 10)]; unique != "" { // of MOSIP's own, as it was imported
		return packet.KeyID(unique)
	}
	application, reference, _ := strings.Cut(string(key.Name), "/")
	if key.Origin == keyspec.Foreign && len(p.Chain) > 0 {
		return packet.KeyID(packet.UniqueIdentifierOf(application, reference, sha256.Sum256(p.Chain[0])))
	}
	return packet.KeyID(packet.UniqueIdentifier(application, reference, v.Created))
}

// issuer is a key that certifies.
type issuer struct {
	name        keyspec.Name
	certificate *x509.Certificate
	chain       [][]byte
	signer      crypto.Signer
}

// issuer returns the key by which the key of a place is certified. A module key that is due is replaced first, if that can be; the
// root is not replaced for somebody's base key.
//
// Invariant: who has the turn of a key takes that of its issuer, and never the other way round; so nobody waits in a circle.
func (u *use) issuer(p *place) (*issuer, error) {
	if p.issuer != RootName {
		u.refresh(p.issuer)
	}
	key, err := u.metadata(u.store, p.issuer, u.now)
	if errors.Is(err, keystore.ErrNotFound) {
		return nil, &Remedied{fmt.Errorf("%s: %w", p.issuer, ErrNotGenerated), "kmsctl master generate " + string(p.issuer)}
	}
	if err != nil {
		return nil, err
	}
	v, err := version(key, 0, u.now)
	if err != nil {
		return nil, err
	}
	again := "kmsctl master generate --force " + string(p.issuer)
	if err := permit(key, v, keyspec.Certify, u.now); err != nil {
		return nil, &Remedied{fmt.Errorf("issuer %s: %w", p.issuer, err), again}
	}
	stored, err := u.store.Public(keyspec.Ref{Name: key.Name, Version: v.Number})
	if err != nil {
		return nil, err
	}
	if len(stored.Chain) == 0 {
		return nil, &Remedied{fmt.Errorf("issuer %s: %w", p.issuer, ErrNoCertificate), "kmsctl cert upload " + string(p.issuer)}
	}
	i := &issuer{name: p.issuer, chain: stored.Chain}
	if i.certificate, err = pki.ParseCertificate(stored.Chain[0]); err != nil {
		return nil, err
	}
	if !u.now.Before(i.certificate.NotAfter) || u.now.Before(i.certificate.NotBefore.Add(-clockTolerance)) {
		return nil, &Remedied{fmt.Errorf("%w: the certificate of issuer %s is valid from %s to %s", ErrExpired, p.issuer,
			i.certificate.NotBefore.UTC().Format(time.RFC3339), i.certificate.NotAfter.UTC().Format(time.RFC3339)), again}
	}
	i.signer, err = u.signerOf(key, v.Number)
	return i, err
}

// signerOf returns a key version for package pki, whatever its usages are.
func (u *use) signerOf(key *keystore.Key, number keyspec.Version) (crypto.Signer, error) {
	var k *mechanism.Key
	var err error
	if key.Protection == keyspec.Software {
		k, err = u.parsed(key, number)
	} else {
		var l *loaded
		if l, err = u.loadResident(key, number); err == nil {
			k, err = u.residentAt(l, key.Name)
		}
	}
	if err != nil {
		return nil, err
	}
	return k.Signer()
}

// signerOfNew is signerOf for a version that is not committed yet: b is its material, or the record of a resident key.
func (u *use) signerOfNew(key *keystore.Key, number keyspec.Version, row *mechanism.Row, b, spki []byte) (crypto.Signer, error) {
	var k *mechanism.Key
	var err error
	if key.Protection == keyspec.Software {
		secmem.Do(func() { k, err = row.Load(b) })
	} else {
		l := &loaded{row: row, protection: key.Protection, bound: boundTo(u.store, keyspec.Ref{Name: key.Name, Version: number})}
		if l.public, err = mechanism.ParseSPKI(spki); err != nil {
			return nil, err
		}
		if l.record, err = decodeResident(b); err != nil {
			return nil, err
		}
		k, err = u.residentAt(l, key.Name)
	}
	if err != nil {
		return nil, err
	}
	return k.Signer()
}

// subject says whom a new certificate is for. A key that had one keeps its name; a base key has that of its issuer with a common name
// of its own; h replaces what it names.
func (u *use) subject(p *place, before [][]byte, i *issuer, h *Holder) (pki.Subject, error) {
	if h == nil {
		h = &Holder{}
	}
	sans := h.SANs
	if len(sans) == 0 {
		sans = p.app.SANs[p.reference]
	}
	named := h.attributes()
	var kept pki.Subject
	name := emptyName
	switch {
	case len(before) > 0:
		c, err := pki.ParseCertificate(before[0])
		if err != nil {
			return kept, err
		}
		if kept, err = pki.CertificateSubject(c); err != nil {
			return kept, err
		}
		name = kept.RawName
	case p.rank == rankBase && i != nil:
		name = i.certificate.RawSubject
		if h.CN == "" {
			named = append(named, pki.Attribute{Type: "CN", Value: p.name.Namespace() + "-" + p.reference})
		}
	default:
		dn := h.DN.or(p.app.Subject)
		if h.CN == "" {
			dn.CN += " (" + strings.ToUpper(strings.ReplaceAll(string(p.name), "/", "-")) + ")"
		}
		named = dn.attributes()
	}
	named = slices.DeleteFunc(named, func(a pki.Attribute) bool { return a.Value == "" })
	name, err := pki.EditName(name, named)
	if err != nil {
		return kept, err
	}
	if len(sans) == 0 {
		kept.RawName = name
		return kept, nil
	}
	return alternativeNames(name, sans)
}

// certificateProfile is that of a certificate for a key of a place. The key usage follows from the usages of the key: root and module keys
// get keyCertSign and cRLSign, sign keys digitalSignature, base keys keyEncipherment. MOSIP makes its EC sign keys and KERNEL/SIGN authorities
// (path length 1), and marks Ed25519 keys keyEncipherment; none of them issues anything, and Ed25519 cannot encipher (RFC 8410 section 5).
func (p *place) certificateProfile(usages []keyspec.Usage, notBefore, notAfter time.Time, i *issuer) pki.Profile {
	out := pki.Profile{NotBefore: notBefore, NotAfter: notAfter, Usages: usages}
	switch p.rank {
	case rankRoot:
		out.CA, out.PathLen = true, 2
	case rankModule:
		out.CA, out.PathLen = true, 1
	}
	if c := i; out.CA && c != nil && (c.certificate.MaxPathLen > 0 || c.certificate.MaxPathLenZero) && c.certificate.MaxPathLen <= out.PathLen {
		out.PathLen = -1 // an outside authority leaves less room
	}
	return out
}

// generation is a version of a key that is to be made.
type generation struct {
	*standing
	issuer     *issuer // nil: self-signed, or no certificate at all
	holder     *Holder
	protection keyspec.Protection // of a new key
	escrow     keyspec.Escrow     // of a new resident module key
	force      bool               // the validity of the version before ends now
	asked      bool               // a version is made even if it does not outlive the one before
	request    bool               // a request instead of a certificate
}

// expires is when the new version will expire.
func (g *generation) expires(now time.Time) time.Time {
	expires := now.Truncate(time.Second).Add(days(g.place.days))
	if g.issuer != nil && expires.After(g.issuer.certificate.NotAfter) {
		expires = g.issuer.certificate.NotAfter
	}
	return expires
}

// makeGeneration makes a version, with its certificate, and commits both. The caller has the turn of the name.
func (u *use) makeGeneration(g *generation) (*Certified, error) {
	p := g.place
	expires := g.expires(u.now)
	var key *keystore.Key
	var row *mechanism.Row
	var err error
	if g.key == nil {
		n := &NewKey{Name: p.name, Algorithm: p.algorithm, Usages: p.usages, Profile: p.profile, Protection: g.protection, Escrow: g.escrow, Expires: expires}
		if key, row, err = u.describe(n, keyspec.Generated); err != nil {
			return nil, err
		}
	} else {
		if row, err = mechanism.Lookup(g.key.Algorithm); err != nil {
			return nil, err
		}
		key = cloneKey(g.key)
		v, err := u.validity(key.Usages, time.Time{}, expires, false)
		if err != nil {
			return nil, err
		}
		if err := u.advance(key, v, g.force); err != nil {
			return nil, err
		}
	}
	number := newest(key)
	var out *Certified
	err = u.withNew(key, number, row, nil, func(b, spki []byte) error {
		v := key.Versions[len(key.Versions)-1]
		stored := keystore.Public{SPKI: spki}
		request, err := u.certify(g, key, &v, row, b, &stored)
		if err != nil {
			return err
		}
		return u.withGuard(key, g.escrow, func(guard *keystore.NamespaceGuard) error {
			committed, err := u.commitGeneration(g, key, v, b, stored, guard)
			if err != nil {
				return err
			}
			at := &committed.Versions[len(committed.Versions)-1]
			out = &Certified{Ref: keyspec.Ref{Name: p.name, Version: number}, Chain: stored.Chain, Request: request, KeyID: KeyID(committed, at, stored),
				NotBefore: at.NotBefore, Expires: at.Expires, Made: true}
			return nil
		})
	})
	if err != nil {
		return nil, err
	}
	kind := EventRotated
	if g.key == nil {
		kind = EventMade
	}
	u.happened(kind, out.Ref, "expires "+out.Expires.UTC().Format(time.DateOnly))
	signal(u.wakeScheduler)
	if p.rank == rankRoot || p.rank == rankModule {
		signal(u.wakeRenewer) // something may hang on it
	}
	return out, nil
}

// certify makes the certificate of a new version, or the request for one.
func (u *use) certify(g *generation, key *keystore.Key, v *keystore.Version, row *mechanism.Row, b []byte, stored *keystore.Public) (request []byte, err error) {
	if len(stored.SPKI) == 0 {
		return nil, nil
	}
	var before [][]byte
	if g.standing.key != nil {
		before = u.lastChain(g.standing.key)
	}
	subject, err := u.subject(g.place, before, g.issuer, g.holder)
	if err != nil {
		return nil, err
	}
	profile := g.place.certificateProfile(key.Usages, v.NotBefore, v.Expires, g.issuer)
	if g.issuer != nil && !g.request {
		public, err := mechanism.ParseSPKI(stored.SPKI)
		if err != nil {
			return nil, err
		}
		stored.Chain, err = g.issuer.issue(public, subject, profile)
		return nil, err
	}
	signer, err := u.signerOfNew(key, v.Number, row, b, stored.SPKI)
	if err != nil {
		return nil, err
	}
	if g.request {
		return pki.Request(signer, subject)
	}
	der, err := pki.SelfSign(signer, subject, profile)
	stored.Chain = [][]byte{der}
	return nil, err
}

// issue makes a certificate and returns it with the chain of the issuer after it.
func (i *issuer) issue(public crypto.PublicKey, s pki.Subject, p pki.Profile) ([][]byte, error) {
	der, err := pki.Issue(i.signer, i.certificate, public, s, p)
	if err != nil {
		return nil, err
	}
	chain := append([][]byte{der}, i.chain...)
	if len(chain) > pki.MaxChain {
		return nil, fmt.Errorf("%w: over %d certificates", pki.ErrChain, pki.MaxChain)
	}
	return chain, nil
}

// lastChain returns the chain of the newest version that has one.
func (u *use) lastChain(key *keystore.Key) [][]byte {
	for i := len(key.Versions) - 1; i >= 0; i-- {
		stored, err := u.store.Public(keyspec.Ref{Name: key.Name, Version: key.Versions[i].Number})
		if err == nil && len(stored.Chain) > 0 {
			return stored.Chain
		}
	}
	return nil
}

// commitGeneration commits a version with its public half, certificate included. A key that there was already is read again, so that what
// was changed of it meanwhile stays.
func (u *use) commitGeneration(g *generation, key *keystore.Key, v keystore.Version, b []byte, stored keystore.Public, guard *keystore.NamespaceGuard) (*keystore.Key, error) {
	if g.key != nil {
		defer u.writers.lock(key.Name)()
		fresh, err := u.store.Get(key.Name)
		if err != nil {
			return nil, err
		}
		number := v.Number
		last, err := version(fresh, 0, u.now)
		if err != nil {
			return nil, err
		}
		if !last.Revoked.IsZero() {
			if g.version.Revoked.IsZero() && !g.force && !g.asked && fresh.Labels[LabelNoReplace] == string(ReplaceNo) {
				return nil, fmt.Errorf("%w: %s was revoked meanwhile, and is not to be replaced", ErrState, key.Name)
			}
			delete(fresh.Labels, LabelNoReplace) // the new version may be revoked one day, and that is another matter
		}
		if err := u.advance(fresh, v, g.force); err != nil {
			return nil, err
		}
		if newest(fresh) != number || fresh.Current != number {
			return nil, fmt.Errorf("%w: %s was rotated meanwhile", keystore.ErrConflict, key.Name)
		}
		key = fresh
	}
	at := &key.Versions[len(key.Versions)-1]
	ch := keystore.Change{Key: key, Material: map[keyspec.Version][]byte{v.Number: b}, Guard: guard}
	u.setPublic(&ch, at, stored.SPKI)
	if len(stored.Chain) > 0 {
		ch.Public[v.Number] = stored
	}
	u.version = at
	u.detail = "generated"
	if g.force {
		u.detail = "generated by force"
	}
	if err := u.commit(keystore.Commit{Changes: []keystore.Change{ch}}); err != nil {
		u.detail = ""
		return nil, err
	}
	return key, nil
}

// advance adds a version to a key and makes it the current one. With force the validity of the one before ends now.
func (u *use) advance(key *keystore.Key, v keystore.Version, force bool) error {
	if err := room(key); err != nil {
		return err
	}
	last, err := version(key, 0, u.now)
	if err != nil {
		return err
	}
	switch state := stateAt(key, last, u.now); {
	case state == keyspec.Suspended:
		return fmt.Errorf("%w: the current version is suspended", ErrState)
	case state != keyspec.Destroyed && !last.DestroyAt.IsZero():
		return fmt.Errorf("%w: the destruction of the current version is scheduled", ErrState)
	}
	if now := u.now.Truncate(time.Second); force && (last.Expires.IsZero() || now.Before(last.Expires)) {
		last.Expires = now
	}
	v.Number = newest(key) + 1
	key.Versions = append(key.Versions, v)
	promote(key, v.Number)
	u.trim(key)
	return nil
}

func cloneKey(key *keystore.Key) *keystore.Key {
	out := *key
	out.Versions = slices.Clone(key.Versions)
	out.Labels = maps.Clone(key.Labels)
	return &out
}

// refresh replaces an issuer that is due, if that can be. What comes of it shows when the issuer is used.
func (u *use) refresh(name keyspec.Name) {
	sub := use{Engine: u.Engine, ctx: u.ctx, caller: u.caller, act: &act{op: "cert_current", ref: keyspec.Ref{Name: name}, info: "due when it was to issue"},
		store: u.store, decision: u.decision, now: u.now}
	_, err := sub.currentCertificate(name, nil)
	if sub.act.sync { // something was tried
		sub.record(err)
	}
}

// Making reports, for the choice of a lane, whether CertCurrent would make a key now, and the device that it would need. It asks the
// policy before it says anything.
func (e *Engine) Making(c *Caller, name keyspec.Name) (makes bool, device keyspec.Protection) {
	u := use{Engine: e, ctx: context.Background(), caller: c, act: &act{op: "cert_current", ref: keyspec.Ref{Name: name}}, now: e.now()}
	var err error
	if u.store, err = e.opened(); err != nil || u.authorise() != nil {
		return false, ""
	}
	p, err := u.placeOf(name, false)
	if err != nil {
		return false, ""
	}
	s, err := u.standing(p)
	if err != nil || !s.due {
		return false, ""
	}
	if s.key != nil && s.key.Protection != keyspec.Software {
		return true, s.key.Protection
	}
	if s.key == nil && p.rank != rankBase && p.rank != rankSymmetric && p.app.Protection != keyspec.Software {
		return true, p.app.Protection
	}
	if p.issuer != "" {
		if key, err := u.metadata(u.store, p.issuer, u.now); err == nil && key.Protection != keyspec.Software {
			return true, key.Protection
		}
	}
	return true, e.guardian(name)
}
