package engine

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"sync"

	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/kmsd/pki"
)

const (
	kindParts = "trust-part/" // and the domain: parts 1 and up of revocation lists
	listPart  = 44 << 10      // bytes of a list in one document, which holds them in base64
	maxParts  = (pki.MaxCRL + listPart - 1) / listPart
)

// listName is the name of the revocation lists of a CA: there is one for each key and name.
func listName(issuer *x509.Certificate) [sha256.Size]byte {
	h := sha256.New()
	h.Write(issuer.RawSubject)
	h.Write(issuer.RawSubjectPublicKeyInfo)
	return [sha256.Size]byte(h.Sum(nil))
}

// CRLAdd takes a revocation list of a CA of a domain, which must have signed it and be trusted itself. It takes the place of the one
// before, of which it has to be a successor. From then on the CA is expected to go on publishing: once its list has run out, what it
// issued is not trusted until there is a new one, or the list is removed.
func (e *Engine) CRLAdd(ctx context.Context, c *Caller, domain string, data []byte) (entry *TrustEntry, err error) {
	err = e.administrate(ctx, c, "crl_add", domain, func(u *use) error {
		d, err := u.domain(domain)
		if err != nil {
			return err
		}
		l, err := pki.ParseCRL(data)
		if err != nil {
			return err
		}
		switch {
		case u.now.Add(clockTolerance).Before(l.ThisUpdate):
			return fmt.Errorf("%w: it is of the future", pki.ErrCRL)
		case u.now.After(l.NextUpdate):
			return fmt.Errorf("%w: it has run out, there has to be a newer one", pki.ErrCRL)
		}
		trust, _, err := u.trustIn(d.Name)
		if err != nil {
			return err
		}
		issuer, err := listIssuer(trust, l, u)
		if err != nil {
			return err
		}
		name := listName(issuer)
		head, old, err := u.list(d.Name, hex.EncodeToString(name[:]))
		if err != nil && !errors.Is(err, keystore.ErrNotFound) {
			return err
		}
		if old != nil {
			if err := succeeds(l, old); err != nil {
				return err
			}
		}
		u.detail = fmt.Sprintf("%s: %x number %s, %d entries", d.Name, name[:8], l.Number, l.Len())
		changes, err := u.listChanges(d.Name, hex.EncodeToString(name[:]), l.Raw, head)
		if err != nil {
			return err
		}
		if err := u.commit(keystore.Commit{Documents: changes}); err != nil {
			return err
		}
		entry = listEntry(name, l, u.mark())
		return nil
	})
	if err != nil {
		return nil, err
	}
	return entry, nil
}

// listIssuer returns the CA of a domain that signed a list, if it is trusted.
func listIssuer(trust *pki.Trust, l *pki.CRL, u *use) (*x509.Certificate, error) {
	var reason error
	for _, list := range [][]*x509.Certificate{trust.Roots, trust.Intermediates} {
		for _, c := range list {
			if err := l.SignedBy(c); err != nil {
				if reason == nil || bytes.Equal(c.RawSubject, l.RawIssuer) {
					reason = err
				}
				continue
			}
			v := trust.Verify([]*x509.Certificate{c}, u.now)
			if v.Trusted {
				return c, nil
			}
			if len(v.Reasons) == 1 && v.Reasons[0].Code == pki.StaleCRL {
				return c, nil // of its own issuer: lists come one by one
			}
			reason = fmt.Errorf("%w: its issuer is not trusted: %s", pki.ErrCRL, v.Reasons[0])
		}
	}
	if reason == nil {
		reason = fmt.Errorf("%w: the domain has no CA", pki.ErrCRL)
	}
	return nil, reason
}

// succeeds checks that a list may follow another one.
func succeeds(l, old *pki.CRL) error {
	older := l.ThisUpdate.Before(old.ThisUpdate)
	if l.Number != nil && old.Number != nil {
		if order := l.Number.Cmp(old.Number); order != 0 { // there are CAs that always write the same number
			older = order < 0
		}
	}
	if older || bytes.Equal(l.Raw, old.Raw) {
		return fmt.Errorf("%w: the domain has this list, or a later one", pki.ErrCRL)
	}
	return nil
}

// list returns a revocation list of a domain and the document that it begins with. Errors wrap keystore.ErrNotFound.
func (u *use) list(domain, name string) (*keystore.Document, *pki.CRL, error) {
	for try := 0; ; try++ {
		head, err := u.store.Document(kindCRLs+domain, name)
		if err != nil {
			return nil, nil, err
		}
		l, err := u.readList(domain, &head)
		if err == nil || try == 3 || !errors.Is(err, errListChanged) {
			return &head, l, err
		}
	}
}

// errListChanged says that the parts of a list do not fit its head: it was replaced while they were read, or is damaged.
var errListChanged = fmt.Errorf("%w: a revocation list", keystore.ErrDamaged)

// readList puts the parts of a list together, unless it is in the cache.
func (u *use) readList(domain string, head *keystore.Document) (*pki.CRL, error) {
	var s storedList
	if err := decodeTrust(head, &s); err != nil {
		return nil, err
	}
	if s.Parts < 1 || s.Parts > maxParts || len(s.SHA256) != sha256.Size {
		return nil, errListChanged
	}
	sum := [sha256.Size]byte(s.SHA256)
	if l := u.lists.get(sum); l != nil {
		return l, nil
	}
	der := s.Data
	for i := 1; i < s.Parts; i++ {
		d, err := u.store.Document(kindParts+domain, partName(head.Name, i))
		if errors.Is(err, keystore.ErrNotFound) {
			return nil, errListChanged
		}
		if err != nil {
			return nil, err
		}
		var part storedList
		if err := decodeTrust(&d, &part); err != nil {
			return nil, err
		}
		der = append(der, part.Data...)
	}
	if sha256.Sum256(der) != sum {
		return nil, errListChanged
	}
	l, err := pki.ParseCRL(der)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", keystore.ErrDamaged, err)
	}
	u.lists.put(sum, l)
	return l, nil
}

func partName(name string, i int) string { return name + "." + strconv.Itoa(i) }

// listsIn returns the revocation lists of a domain.
func (u *use) listsIn(domain string) (lists []*pki.CRL, err error) {
	err = u.allDocuments(kindCRLs+domain, func(d *keystore.Document) error {
		l, err := u.readList(domain, d)
		if errors.Is(err, errListChanged) {
			_, l, err = u.list(domain, d.Name)
			if errors.Is(err, keystore.ErrNotFound) { // removed meanwhile
				return nil
			}
		}
		if err == nil {
			lists = append(lists, l)
		}
		return err
	})
	return lists, err
}

// listChanges writes a list over the one that begins with the document head, or nil. With nothing in der that one is deleted.
func (u *use) listChanges(domain, name string, der []byte, head *keystore.Document) ([]keystore.DocumentChange, error) {
	parts, before := (len(der)+listPart-1)/listPart, 0
	if head != nil {
		var s storedList
		if err := decodeTrust(head, &s); err != nil {
			return nil, err
		}
		before = s.Parts
	}
	var changes []keystore.DocumentChange
	for i := range max(parts, before) {
		kind, at := kindParts+domain, partName(name, i)
		var old keystore.Document
		var err error
		if i == 0 {
			if kind, at = kindCRLs+domain, name; head != nil {
				old = *head
			}
		} else if old, err = u.store.Document(kind, at); err != nil && !errors.Is(err, keystore.ErrNotFound) {
			return nil, err
		}
		if i >= parts {
			if old.Revision > 0 {
				changes = append(changes, keystore.DocumentChange{Document: old, Delete: true, Bump: i == 0})
			}
			continue
		}
		s := storedList{Format: trustFormat, Data: der[i*listPart : min(len(der), (i+1)*listPart)]}
		if i == 0 {
			sum := sha256.Sum256(der)
			s.Parts, s.SHA256, s.Added = parts, sum[:], u.mark()
		}
		change, err := document(kind, at, old.Revision, s, i == 0)
		if err != nil {
			return nil, err
		}
		changes = append(changes, change)
	}
	return changes, nil
}

// removeList removes a revocation list.
func (u *use) removeList(domain string, name [sha256.Size]byte) error {
	text := hex.EncodeToString(name[:])
	head, err := u.store.Document(kindCRLs+domain, text)
	if errors.Is(err, keystore.ErrNotFound) {
		return errNotInDomain(domain, name)
	}
	if err != nil {
		return err
	}
	changes, err := u.listChanges(domain, text, nil, &head)
	if err != nil {
		return err
	}
	return u.commit(keystore.Commit{Documents: changes})
}

// maxListEntries bounds the revocation lists that are kept parsed, in entries of some hundred bytes each.
const maxListEntries = 100_000

// listCache keeps revocation lists parsed, by the SHA-256 of their DER. It knows nothing about which are in force: that is asked of
// the store each time.
type listCache struct {
	mu      sync.Mutex
	lists   map[[sha256.Size]byte]*pki.CRL
	entries int
}

func (c *listCache) get(sum [sha256.Size]byte) *pki.CRL {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.lists[sum]
}

func (c *listCache) put(sum [sha256.Size]byte, l *pki.CRL) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, there := c.lists[sum]; there {
		return
	}
	size := l.Len() + 100 // an empty one has a size too
	if c.lists == nil || c.entries+size > maxListEntries {
		c.lists, c.entries = make(map[[sha256.Size]byte]*pki.CRL), 0
	}
	c.lists[sum] = l
	c.entries += size
}
