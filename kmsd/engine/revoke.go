package engine

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/pki"
)

// Replace says what becomes of a key whose current version is revoked.
type Replace string

// What becomes of it.
const (
	ReplaceDefault Replace = "" // ReplaceYes for a base key that its module key has certified, else it waits for somebody to say more
	ReplaceYes     Replace = "yes"
	ReplaceNo      Replace = "no" // until somebody rotates the key
)

// Revoke takes versions out of use for good: with the reason key-compromise they are compromised, with any other deactivated, so that
// what was encrypted or signed with them is still decrypted and verified. Of a key of an application that is the current version unless
// ref names another, as in MOSIP; of other keys all versions. Their certificates that one of our keys has issued, former ones included,
// are on the revocation list of that key from now on.
//
// With ReplaceYes the next version is made before Revoke returns. If that fails the revocation stands, and kmsd tries again by itself.
// ROOT may be revoked too: what it has certified is then certified anew by its next version, and until there is one nothing is issued.
//
// Errors wrap ErrState when there is nothing left to revoke, and ErrUnsupported when a key without place in the hierarchy is to be
// replaced.
func (e *Engine) Revoke(ctx context.Context, c *Caller, ref keyspec.Ref, reason keyspec.Reason, replace Replace) (after *keystore.Key, err error) {
	if reason == "" {
		reason = keyspec.Unspecified
	}
	err = e.do(ctx, c, &act{op: "key_revoke", ref: ref, sync: true, info: string(reason)}, func(u *use) error {
		after, err = u.revoke(&withdrawal{ref: ref, reason: reason, replace: replace})
		return err
	})
	if err != nil {
		return nil, err
	}
	return after, nil
}

// withdrawal is a revocation under way.
type withdrawal struct {
	ref     keyspec.Ref
	reason  keyspec.Reason
	replace Replace

	place    *place // nil: the key has none in the hierarchy
	versions []keyspec.Version
	lists    []keyspec.Name // issuers whose lists have more entries
	replaces bool           // the current version
}

func (u *use) revoke(w *withdrawal) (*keystore.Key, error) {
	switch w.replace {
	case ReplaceDefault, ReplaceYes, ReplaceNo:
	default:
		return nil, fmt.Errorf("%w: replace is yes, no or empty, not %.20q", ErrInput, w.replace)
	}
	key, err := u.metadata(u.store, w.ref.Name, u.now)
	if err != nil {
		return nil, err
	}
	if w.place, err = u.placed(key); err != nil {
		return nil, err
	}
	if w.place == nil && w.replace != ReplaceDefault {
		return nil, &Remedied{fmt.Errorf("%w: %s is no key of the hierarchy, which alone are replaced by themselves", ErrUnsupported, key.Name), "kmsctl key rotate " + string(key.Name)}
	}
	after, err := u.changeWith(w.ref.Name, func(key *keystore.Key) (*keystore.Change, []keystore.DocumentChange, error) {
		return u.withdraw(w, key)
	})
	if err != nil {
		return nil, err
	}
	for _, number := range w.versions {
		detail := string(w.reason)
		if len(w.lists) > 0 {
			detail += ", on the revocation list of " + join(w.lists)
		}
		u.happened(EventRevoked, keyspec.Ref{Name: w.ref.Name, Version: number}, detail)
	}
	signal(u.wakeRenewer)
	if !w.replaces {
		return after, nil
	}
	if err := u.succeed(w.ref.Name); err != nil {
		u.log.Error("a revoked key was not replaced", "key", w.ref.Name, "error", err)
		u.happened(EventAlert, keyspec.Ref{Name: w.ref.Name}, "revoked, and not replaced: "+err.Error())
	}
	if after, err = u.store.Get(w.ref.Name); err != nil {
		return nil, err
	}
	u.asOf(after, u.now)
	return after, nil
}

// placed returns the rules for a key that has a place in the hierarchy, whoever has certified it, or nil.
func (u *use) placed(key *keystore.Key) (*place, error) {
	if rotatable(key) != nil || len(key.Versions) == 0 || key.Versions[len(key.Versions)-1].SPKISHA256 == [sha256.Size]byte{} {
		return nil, nil
	}
	p, err := u.placeOf(key.Name, false)
	switch {
	case errors.Is(err, ErrApplication), errors.Is(err, ErrNotMade):
		return nil, nil
	case err != nil:
		return nil, err
	case p.rank == rankSymmetric:
		return nil, nil
	}
	return p, nil
}

// withdraw changes the versions of a key that are to be revoked, and writes down which certificates that concerns.
func (u *use) withdraw(w *withdrawal, key *keystore.Key) (*keystore.Change, []keystore.DocumentChange, error) {
	w.versions, w.lists, w.replaces = nil, nil, false
	last, err := version(key, 0, u.now)
	if err != nil {
		return nil, nil, err
	}
	number := w.ref.Version
	if number == 0 && w.place != nil {
		number = last.Number
	}
	if number != 0 && number != last.Number && w.replace != ReplaceDefault {
		return nil, nil, fmt.Errorf("%w: version %d is not the current one, which alone is replaced", ErrInput, number)
	}
	before := !last.Revoked.IsZero()
	own := false // one of our keys has certified the current version
	var documents []keystore.DocumentChange
	found := false
	for i := range key.Versions {
		v := &key.Versions[i]
		if number != 0 && v.Number != number {
			continue
		}
		found = true
		if v.Number == number {
			u.version = v
		}
		certificates, err := u.certificatesIssued(w.place, keyspec.Ref{Name: key.Name, Version: v.Number})
		if err != nil {
			return nil, nil, err
		}
		own = own || v == last && len(certificates) > 0
		if !withdrawn(v, w.reason, u.now) {
			continue
		}
		w.versions = append(w.versions, v.Number)
		for _, c := range certificates {
			change, err := u.withdrawCertificate(&c, v)
			if err != nil {
				return nil, nil, err
			}
			if change != nil {
				documents = append(documents, *change)
			}
			if name := c.Issuer.Name; !slices.Contains(w.lists, name) {
				w.lists = append(w.lists, name)
			}
		}
	}
	labelled := false
	if w.place != nil && number == last.Number {
		wants := w.replace
		if wants == ReplaceDefault && !before && own && w.place.rank == rankBase && key.Labels[LabelNoReplace] != string(ReplaceNo) {
			wants = ReplaceYes
		}
		w.replaces = wants == ReplaceYes && !last.Revoked.IsZero()
		labelled = label(key, wants, w.place.rank)
	}
	switch {
	case !found:
		return nil, nil, fmt.Errorf("%w: version %d", keystore.ErrNotFound, number)
	case len(w.versions) == 0 && !labelled && !(w.replaces && w.replace == ReplaceYes):
		return nil, nil, fmt.Errorf("%w: no version is in a state to be revoked", ErrState)
	}
	return &keystore.Change{}, documents, checkLabels(key.Labels)
}

// withdrawn revokes a version and reports whether it was not, or is compromised now as well.
func withdrawn(v *keystore.Version, reason keyspec.Reason, now time.Time) bool {
	state := keyspec.Deactivated
	if reason == keyspec.KeyCompromise {
		state = keyspec.Compromised
	}
	if v.State == keyspec.Destroyed || v.State == keyspec.Compromised || !v.Revoked.IsZero() && state == keyspec.Deactivated {
		return false
	}
	v.State, v.Reason, v.Revoked = state, reason, now.Truncate(time.Second)
	return true
}

// label writes down whether a revoked key is to be replaced, and reports whether that is a change. Base keys are unless they are marked,
// others are not unless they are marked.
func label(key *keystore.Key, wants Replace, r rank) bool {
	marked := key.Labels[LabelNoReplace]
	switch {
	case wants == ReplaceDefault, marked == string(wants):
		return false
	case wants == ReplaceYes && r == rankBase:
		delete(key.Labels, LabelNoReplace)
		return marked != ""
	case key.Labels == nil:
		key.Labels = make(map[string]string)
	}
	key.Labels[LabelNoReplace] = string(wants)
	return true
}

// succeed makes the next version of a key whose current one was revoked.
func (u *use) succeed(name keyspec.Name) error {
	sub := use{Engine: u.Engine, ctx: u.ctx, caller: u.caller, act: &act{op: "cert_current", ref: keyspec.Ref{Name: name}, sync: true, info: "instead of a revoked version"},
		store: u.store, decision: u.decision, now: u.Engine.now()}
	err := sub.protect(func() error {
		_, err := sub.currentCertificate(name, nil)
		return err
	})
	return sub.record(err)
}

// issued is a certificate of a key version that one of our keys has issued.
type issued struct {
	*x509.Certificate
	Key    keyspec.Ref
	Issuer keyspec.Ref
}

// certificatesIssued returns the certificates of a key version that our keys have issued: the one it has, and those it had.
func (u *use) certificatesIssued(p *place, ref keyspec.Ref) (list []issued, err error) {
	stored, err := u.store.Public(ref)
	if errors.Is(err, keystore.ErrNotFound) { // of a version that is destroyed
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if len(stored.Chain) > 0 {
		c, err := u.issuedBy(p, ref, stored.Chain)
		if err != nil {
			return nil, err
		}
		if c != nil {
			list = append(list, *c)
		}
	}
	formers, err := u.formers(ref)
	for _, f := range formers {
		if len(list) == 0 || !f.Equal(list[0].Certificate) {
			list = append(list, f.issued)
		}
	}
	return list, err
}

// issuedBy returns the certificate at the head of a chain if one of our keys has issued it, or nil. Of certificates that came without
// that of their issuer, those of the issuer that the hierarchy has for the key are asked.
func (u *use) issuedBy(p *place, ref keyspec.Ref, chain [][]byte) (*issued, error) {
	c, err := pki.ParseCertificate(chain[0])
	if err != nil {
		return nil, err
	}
	out := &issued{Certificate: c, Key: ref}
	switch {
	case bytes.Equal(c.RawIssuer, c.RawSubject) && c.CheckSignature(c.SignatureAlgorithm, c.RawTBSCertificate, c.Signature) == nil:
		out.Issuer = ref
		return out, nil
	case len(chain) > 1:
		i, err := pki.ParseCertificate(chain[1])
		if err != nil {
			return nil, err
		}
		sum := sha256.Sum256(i.RawSubjectPublicKeyInfo)
		sharing, err := u.store.Sharing(keystore.AliasSPKI, sum[:])
		if errors.Is(err, keystore.ErrNotFound) {
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
		for _, r := range sharing { // the same key may have been brought in a second time, as somebody else's even
			key, err := u.metadata(u.store, r.Name, u.now)
			switch {
			case err != nil:
				return nil, err
			case key.Origin == keyspec.Foreign:
				continue
			case out.Issuer.Name == "" || p != nil && r.Name == p.issuer:
				out.Issuer = r
			}
		}
		if out.Issuer.Name == "" {
			return nil, nil
		}
		return out, nil
	case p == nil || p.issuer == "":
		return nil, nil
	}
	found := false
	err = u.certificatesOf(p.issuer, func(key *keystore.Key, v *keystore.Version, i *x509.Certificate) {
		if !found && bytes.Equal(i.RawSubject, c.RawIssuer) && i.CheckSignature(c.SignatureAlgorithm, c.RawTBSCertificate, c.Signature) == nil {
			out.Issuer, found = keyspec.Ref{Name: key.Name, Version: v.Number}, true
		}
	})
	if err != nil || !found {
		return nil, err
	}
	return out, nil
}

// withdrawCertificate is the change that writes down that a certificate is revoked, or nil when that is written down. That its key is
// compromised is written down even if it was revoked for another reason.
func (u *use) withdrawCertificate(c *issued, v *keystore.Version) (*keystore.DocumentChange, error) {
	r := &Revocation{Key: c.Key, Issuer: c.Issuer, Certificate: c.Certificate, At: v.Revoked, Reason: v.Reason}
	var revision uint64
	d, err := u.store.Document(kindRevoked, fingerprint(c.Raw))
	switch {
	case err == nil:
		before, err := decodeRevocation(&d)
		if err != nil {
			return nil, err
		}
		if before.Reason == r.Reason || r.Reason != keyspec.KeyCompromise {
			return nil, nil
		}
		r.At, revision = before.At, d.Revision
	case !errors.Is(err, keystore.ErrNotFound):
		return nil, err
	}
	change, err := revocationChange(r)
	change.Revision = revision
	return &change, err
}

// A certificate that was replaced by another one for the same key version is good until it expires. So that it is revoked with the
// version, it is kept in a document.
const (
	kindFormer   = "former/" // and a hash of NAME@VERSION: certificates that the version had
	formerFormat = 1
)

// storedFormer is the document of a certificate that a key version had. Its name is that of the certificate.
type storedFormer struct {
	Format      int    `json:"format"`
	Key         string `json:"key"`         // with the version
	Issuer      string `json:"issuer"`      // with the version
	Certificate []byte `json:"certificate"` // DER
}

type former struct {
	issued
	name     string // of the document
	revision uint64
}

func formerKind(ref keyspec.Ref) string {
	sum := sha256.Sum256([]byte(ref.String()))
	return kindFormer + hex.EncodeToString(sum[:16])
}

// formers returns the certificates that a key version had.
func (u *use) formers(ref keyspec.Ref) (list []former, err error) {
	err = u.allDocuments(formerKind(ref), func(d *keystore.Document) error {
		var stored storedFormer
		if err := decodeDocument(d, formerFormat, &stored); err != nil {
			return err
		}
		f := former{name: d.Name, revision: d.Revision}
		var err error
		if f.Key, err = keyspec.ParseRef(stored.Key); err == nil {
			if f.Issuer, err = keyspec.ParseRef(stored.Issuer); err == nil {
				f.Certificate, err = pki.ParseCertificate(stored.Certificate)
			}
		}
		if err != nil {
			return fmt.Errorf("%w: document %s/%s: %w", keystore.ErrDamaged, d.Kind, d.Name, err)
		}
		if f.Key == ref {
			list = append(list, f)
		}
		return nil
	})
	return list, err
}

// former returns the changes that keep the certificate of a version which is about to get another one, and forget those that have
// expired.
func (u *use) former(key *keystore.Key, ref keyspec.Ref, chain, next [][]byte) (changes []keystore.DocumentChange, err error) {
	if len(chain) == 0 || key.Origin == keyspec.Foreign || bytes.Equal(chain[0], next[0]) {
		return nil, nil
	}
	p, err := u.placed(key)
	if err != nil {
		return nil, err
	}
	c, err := u.issuedBy(p, ref, chain)
	if err != nil {
		return nil, err
	}
	kept, err := u.formers(ref)
	if err != nil {
		return nil, err
	}
	known := false
	for _, f := range kept {
		switch {
		case c != nil && f.Equal(c.Certificate):
			known = true
		case !u.now.Before(f.NotAfter):
			changes = append(changes, keystore.DocumentChange{Document: keystore.Document{Kind: formerKind(ref), Name: f.name, Revision: f.revision}, Delete: true})
		}
	}
	if c == nil || known || !u.now.Before(c.NotAfter) {
		return changes, nil
	}
	change, err := document(formerKind(ref), fingerprint(c.Raw), 0, storedFormer{formerFormat, ref.String(), c.Issuer.String(), c.Raw}, false)
	return append(changes, change), err
}
