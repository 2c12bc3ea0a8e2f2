package engine

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"time"

	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/pki"
)

// TrustEntry is a certificate or a revocation list in a domain.
type TrustEntry struct {
	Role         Role
	SHA256       [sha256.Size]byte // of the certificate; the name of a list
	Certificate  []byte            // DER; of a list nothing
	Organization string            // of a partner
	Added        time.Time         // zero in the keystore's own domain
	AddedBy      string
	Removed      time.Time // zero: it is in force
	RemovedBy    string

	// Of a revocation list.
	Issuer     []byte // name, DER
	Number     *big.Int
	ThisUpdate time.Time
	NextUpdate time.Time
	Entries    int
}

// trustPage is how many bytes of certificates a page has at least, unless it is the last. The next one goes beyond by a certificate.
const trustPage = 24 << 10

// maxTrustPage is how many entries a page has.
const maxTrustPage = 32

// TrustList returns one page of what a domain has: its CAs, with RolePartner its partners, with RoleCRL its revocation lists; those
// that were removed are among them. after is nil for the first page, then what the call before returned; nil says that was all. The
// keystore's own domain has its roots and module keys, on one page.
func (e *Engine) TrustList(ctx context.Context, c *Caller, domain string, role Role, after []byte) (list []TrustEntry, next []byte, err error) {
	err = e.do(ctx, c, &act{op: "trust_list", info: domain}, func(u *use) error {
		name, err := parseDomain(domain)
		if err != nil {
			return err
		}
		if name == OwnDomain {
			list, err = u.ownList(role)
			return err
		}
		d, err := u.domain(name)
		if err != nil {
			return err
		}
		kind := kindCAs
		switch role {
		case "", RoleRoot, RoleIntermediate:
		case RolePartner:
			kind = kindPartner
		case RoleCRL:
			kind = kindCRLs
		default:
			return fmt.Errorf("%w: role %q", ErrInput, role)
		}
		size := 0
		for next = after; size < trustPage && len(list) < maxTrustPage; {
			var page []keystore.Document
			if page, next, err = u.store.Documents(kind+d.Name, next, 1); err != nil {
				return err
			}
			for i := range page {
				entry, err := u.entryOf(d.Name, &page[i], kind == kindCRLs)
				if err != nil {
					return err
				}
				if entry != nil && (kind != kindCAs || role == "" || role == entry.Role) {
					list = append(list, *entry)
					size += len(entry.Certificate)
				}
			}
			if next == nil {
				return nil
			}
		}
		return nil
	})
	if err != nil {
		return nil, nil, err
	}
	return list, next, nil
}

// entryOf returns what a document of a domain holds, or nil if it was removed meanwhile.
func (u *use) entryOf(domain string, d *keystore.Document, list bool) (*TrustEntry, error) {
	if list {
		l, err := u.readList(domain, d)
		if errors.Is(err, errListChanged) {
			if d, l, err = u.list(domain, d.Name); errors.Is(err, keystore.ErrNotFound) {
				return nil, nil
			}
		}
		if err != nil {
			return nil, err
		}
		var s storedList
		if err := decodeTrust(d, &s); err != nil {
			return nil, err
		}
		name, err := hex.DecodeString(d.Name)
		if err != nil || len(name) != sha256.Size {
			return nil, errListChanged
		}
		return listEntry([sha256.Size]byte(name), l, s.Added), nil
	}
	s, c, err := decodeCertificate(d)
	if err != nil {
		return nil, err
	}
	entry := &TrustEntry{
		Role: s.Role, SHA256: sha256.Sum256(c.Raw), Certificate: c.Raw, Organization: s.Organization, Added: s.Added.At, AddedBy: s.Added.By,
	}
	if s.Removed != nil {
		entry.Removed, entry.RemovedBy = s.Removed.At, s.Removed.By
	}
	return entry, nil
}

func listEntry(name [sha256.Size]byte, l *pki.CRL, added storedMark) *TrustEntry {
	return &TrustEntry{
		Role: RoleCRL, SHA256: name, Added: added.At, AddedBy: added.By, Issuer: l.RawIssuer, Number: l.Number,
		ThisUpdate: l.ThisUpdate, NextUpdate: l.NextUpdate, Entries: l.Len(),
	}
}

// ownList lists the CAs of the keystore's own domain.
func (u *use) ownList(role Role) (list []TrustEntry, err error) {
	trust := &pki.Trust{}
	if err := u.ownRoots(trust, func(*x509.Certificate) {}); err != nil {
		return nil, err
	}
	size := 0
	add := func(role Role, c *x509.Certificate, removed time.Time) {
		if size += len(c.Raw); size <= 2*trustPage && len(list) < maxTrustPage {
			list = append(list, TrustEntry{Role: role, SHA256: sha256.Sum256(c.Raw), Certificate: c.Raw, Removed: removed})
		}
	}
	if role == "" || role == RoleRoot {
		for _, c := range trust.Roots {
			add(RoleRoot, c, time.Time{})
		}
		for _, c := range trust.Removed {
			add(RoleRoot, c, u.now)
		}
	}
	if role != "" && role != RoleIntermediate {
		return list, nil
	}
	all, err := u.applications()
	if err != nil {
		return nil, err
	}
	for name := range all {
		if name == string(RootName) {
			continue
		}
		err := u.certificatesOf(keyspec.Name(name), func(_ *keystore.Key, v *keystore.Version, c *x509.Certificate) {
			if c.IsCA {
				add(RoleIntermediate, c, v.Revoked)
			}
		})
		if err != nil {
			return nil, err
		}
	}
	return list, nil
}
