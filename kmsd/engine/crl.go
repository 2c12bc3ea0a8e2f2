package engine

import (
	"bytes"
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/pki"
)

// CRL is the certificate revocation list of an issuer (RFC 5280 section 5).
//
// Each version of an issuer signs a list of its own, also when it has been rotated out: a verifier holds the certificate of the version
// that signed what it looks at. All lists of an issuer name everything that was revoked under its name, whichever version signed it.
type CRL struct {
	DER        []byte
	Number     uint64
	ThisUpdate time.Time
	NextUpdate time.Time
	Entries    int
}

const (
	crlPeriod = 7 * 24 * time.Hour // from one list to the next update it promises
	crlFresh  = crlPeriod / 2      // how old a list may be when it is handed out
	kindCRL   = "crl"
	crlFormat = 1
)

// storedCRL is the document of the lists of a key version, which is its name. A list that is too long for it is not kept, but signed
// again when it is asked for after a start, with a number that has not been used.
type storedCRL struct {
	Format     int       `json:"format"`
	Number     uint64    `json:"number"`
	ThisUpdate time.Time `json:"this_update"`
	NextUpdate time.Time `json:"next_update"`
	List       []byte    `json:"list,omitempty"` // DER
}

// maxKept is the size of the longest list that is kept in a document, in bytes: some 1,000 entries.
const maxKept = 40 << 10

// ownLists are the lists that were signed in this run.
type ownLists struct {
	changes atomic.Uint64 // grows with each revocation

	mu    sync.Mutex
	lists map[keyspec.Ref]ownList
}

type ownList struct {
	*CRL
	changes uint64 // when it was begun
	store   *keystore.Store
}

func (l *ownLists) get(ref keyspec.Ref) ownList {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.lists[ref]
}

func (l *ownLists) put(ref keyspec.Ref, list ownList) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.lists == nil {
		l.lists = make(map[keyspec.Ref]ownList)
	}
	l.lists[ref] = list
}

// revokes reports whether a commit revokes a certificate.
func revokes(c *keystore.Commit) bool {
	return slices.ContainsFunc(c.Documents, func(d keystore.DocumentChange) bool { return d.Kind == kindRevoked })
}

// CRL returns the latest revocation list of an issuer, which is signed anew when something was revoked since, or when half of its time
// is over. Without a version it is that of the current one. The list is public, so whoever may read the issuer's certificate may have it.
func (e *Engine) CRL(ctx context.Context, c *Caller, issuer keyspec.Ref) (list *CRL, err error) {
	err = e.do(ctx, c, &act{op: "crl_get", ref: issuer}, func(u *use) error {
		list, err = u.revocationList(issuer)
		return err
	})
	if err != nil {
		return nil, err
	}
	return list, nil
}

// revocationList returns the latest list of a key version.
func (u *use) revocationList(ref keyspec.Ref) (*CRL, error) {
	list, err := u.publish(ref)
	if err == nil {
		return list, nil
	}
	// A device that needs a person is no reason to be without a list as long as the last one is valid and complete.
	if ref.Version == 0 {
		if key, err := u.metadata(u.store, ref.Name, u.now); err == nil {
			ref.Version = current(key, u.now)
		}
	}
	if last := u.own.get(ref); last.CRL != nil && last.store == u.store && u.now.Before(last.NextUpdate) && last.changes == u.own.changes.Load() {
		u.detail = "the list of before, since no new one was signed: " + err.Error()
		return last.CRL, nil
	}
	return nil, err
}

// publish returns the latest list of a key version, which is signed if it is not fresh any more.
func (u *use) publish(ref keyspec.Ref) (*CRL, error) {
	key, err := u.metadata(u.store, ref.Name, u.now)
	if err != nil {
		return nil, err
	}
	v, err := version(key, ref.Version, u.now)
	if err != nil {
		return nil, err
	}
	ref.Version = v.Number
	if list := u.fresh(ref); list != nil {
		return list, nil
	}
	done, err := u.makers.take(u.ctx, "crl "+ref.String())
	if err != nil {
		return nil, err
	}
	defer done()
	if u.now, err = u.turn(); err != nil {
		return nil, err
	}
	if err := u.remember(ref); err != nil {
		return nil, err
	}
	if list := u.fresh(ref); list != nil {
		return list, nil
	}
	if key, err = u.metadata(u.store, ref.Name, u.now); err != nil { // as it is now
		return nil, err
	}
	if v, err = version(key, ref.Version, u.now); err != nil {
		return nil, err
	}
	return u.signList(key, v)
}

// remember takes the list of before a start from its document, if it is there and complete.
func (u *use) remember(ref keyspec.Ref) error {
	if last := u.own.get(ref); last.CRL != nil && last.store == u.store {
		return nil
	}
	changes := u.own.changes.Load()
	stored, _, err := u.lastList(ref)
	if err != nil || len(stored.List) == 0 {
		return err
	}
	parsed, err := pki.ParseCRL(stored.List)
	if err != nil {
		return fmt.Errorf("%w: revocation list of %s: %w", keystore.ErrDamaged, ref, err)
	}
	public, err := u.store.Public(ref)
	if err != nil || len(public.Chain) == 0 {
		return err
	}
	certificate, err := pki.ParseCertificate(public.Chain[0])
	if err != nil {
		return err
	}
	revoked, err := u.revokedBy(certificate)
	if err != nil {
		return err
	}
	for _, r := range revoked {
		if on, found := parsed.Revoked(r.Serial); !found || on.Reason != r.Reason {
			return nil
		}
	}
	u.own.put(ref, ownList{&CRL{DER: stored.List, Number: stored.Number, ThisUpdate: stored.ThisUpdate, NextUpdate: stored.NextUpdate, Entries: parsed.Len()}, changes, u.store})
	return nil
}

// fresh returns the list that was signed last if it will do, or nil.
func (u *use) fresh(ref keyspec.Ref) *CRL {
	last := u.own.get(ref)
	if last.CRL == nil || last.store != u.store || last.changes != u.own.changes.Load() || u.now.Sub(last.ThisUpdate) > crlFresh || u.now.Before(last.ThisUpdate) {
		return nil
	}
	return last.CRL
}

// signList signs a list. The caller has the turn of the lists of this version.
func (u *use) signList(key *keystore.Key, v *keystore.Version) (*CRL, error) {
	ref := keyspec.Ref{Name: key.Name, Version: v.Number}
	changes := u.own.changes.Load()
	if err := u.tick(u.ctx, u.store, u.now); err != nil {
		return nil, err
	}
	public, err := u.store.Public(ref)
	if err != nil {
		return nil, err
	}
	if len(public.Chain) == 0 {
		return nil, fmt.Errorf("%w: %s", ErrNoCertificate, ref)
	}
	certificate, err := pki.ParseCertificate(public.Chain[0])
	if err != nil {
		return nil, err
	}
	if certificate.KeyUsage&x509.KeyUsageCRLSign == 0 {
		return nil, fmt.Errorf("%w: %s issues no revocation lists: its certificate lacks the key usage cRLSign", ErrUnsupported, ref)
	}
	switch state := stateAt(key, v, u.now); state {
	case keyspec.Active, keyspec.Deactivated:
	default:
		return nil, fmt.Errorf("%w: %s is %s and signs no revocation list", ErrState, ref, state)
	}
	revoked, err := u.revokedBy(certificate)
	if err != nil {
		return nil, err
	}
	signer, err := u.signerOf(key, v.Number)
	if err != nil {
		return nil, err
	}
	before, revision, err := u.lastList(ref)
	if err != nil {
		return nil, err
	}
	list := &CRL{Number: before.Number + 1, ThisUpdate: u.now.UTC().Truncate(time.Second), Entries: len(revoked)}
	list.NextUpdate = list.ThisUpdate.Add(crlPeriod)
	list.DER, err = pki.SignCRL(signer, certificate, pki.RevocationList{
		Number: new(big.Int).SetUint64(list.Number), ThisUpdate: list.ThisUpdate, NextUpdate: list.NextUpdate, Revoked: revoked,
	})
	if err != nil {
		return nil, err
	}
	stored := storedCRL{crlFormat, list.Number, list.ThisUpdate, list.NextUpdate, nil}
	if len(list.DER) <= maxKept {
		stored.List = list.DER
	}
	change, err := document(kindCRL, ref.String(), revision, stored, false)
	if err != nil {
		return nil, err
	}
	u.version, u.detail = v, fmt.Sprintf("list %d with %d entries", list.Number, list.Entries)
	if err := u.commit(keystore.Commit{Documents: []keystore.DocumentChange{change}}); err != nil {
		return nil, err
	}
	u.own.put(ref, ownList{list, changes, u.store})
	u.happened(EventCRL, ref, u.detail)
	return list, nil
}

// lastList returns what is remembered of the last list of a key version.
func (u *use) lastList(ref keyspec.Ref) (last storedCRL, revision uint64, err error) {
	d, err := u.store.Document(kindCRL, ref.String())
	if errors.Is(err, keystore.ErrNotFound) {
		return last, 0, nil
	}
	if err != nil {
		return last, 0, err
	}
	return last, d.Revision, decodeDocument(&d, crlFormat, &last)
}

// revokedBy returns the entries of the lists that are issued under the name of a certificate, the oldest first. An entry stays for one
// list after its certificate has expired (RFC 5280 section 3.3).
func (u *use) revokedBy(issuer *x509.Certificate) (entries []pki.Revocation, err error) {
	all, err := u.revocations()
	if err != nil {
		return nil, err
	}
	seen := make(map[string]bool) // of keys that were brought in, two certificates may have the same number
	slices.SortFunc(all, func(a, b Revocation) int {
		return cmp.Or(a.At.Compare(b.At), a.Certificate.SerialNumber.Cmp(b.Certificate.SerialNumber), cmp.Compare(b.Reason, a.Reason))
	})
	for _, r := range all {
		if bytes.Equal(r.Certificate.RawIssuer, issuer.RawSubject) && u.now.Before(r.Certificate.NotAfter.Add(crlPeriod)) && !seen[r.Certificate.SerialNumber.String()] {
			seen[r.Certificate.SerialNumber.String()] = true
			entries = append(entries, pki.Revocation{Serial: r.Certificate.SerialNumber, At: r.At, Reason: r.Reason})
		}
	}
	return entries, nil
}
