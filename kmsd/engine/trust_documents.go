package engine

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/pki"
)

// What is trusted is in documents of the store. Those of a domain have kinds of their own, so that a verdict reads one domain
// and no more; their names are the lower-case hexadecimal SHA-256 of the certificate, or for a revocation list of issuer and
// key identifier.
const (
	kindTrust   = "trust"      // settings of a domain, by its name
	kindRevoked = "revoked"    // certificates of ours that were revoked
	kindCAs     = "trust/"     // and the domain: the CAs
	kindPartner = "partner/"   // and the domain: partner certificates
	kindCRLs    = "trust-crl/" // and the domain: revocation lists of its CAs
)

const trustFormat = 1

// storedCertificate is the document of a certificate in a domain.
type storedCertificate struct {
	Format       int        `json:"format"`
	Role         Role       `json:"role"`
	Certificate  []byte     `json:"certificate"`            // DER
	Organization string     `json:"organization,omitempty"` // of a partner
	Added        storedMark `json:"added"`
	// Removed says that the certificate was taken out of the domain. It stays known, because a CA whose issuer is still trusted
	// would else be back with the next chain that brings it along.
	Removed *storedMark `json:"removed,omitempty"`
}

// storedMark says who did something, and when.
type storedMark struct {
	At time.Time `json:"at"`
	By string    `json:"by"` // principal
}

// storedList is the document of a revocation list, or with Part of a part of one that does not fit one document.
type storedList struct {
	Format int        `json:"format"`
	Data   []byte     `json:"data"`             // DER, the part from 0
	Parts  int        `json:"parts,omitempty"`  // how many parts there are, in part 0
	SHA256 []byte     `json:"sha256,omitempty"` // of the whole, in part 0
	Added  storedMark `json:"added,omitzero"`
}

// storedDomain is the document of the settings of a domain.
type storedDomain struct {
	Format      int `json:"format"`
	CADays      int `json:"ca_days"`
	PartnerDays int `json:"partner_days"`
}

// storedRevocation is the document of a certificate of ours that was revoked. Its name is that of the certificate.
type storedRevocation struct {
	Format      int            `json:"format"`
	Key         string         `json:"key"`         // with the version
	Issuer      string         `json:"issuer"`      // the key that issued it, with the version where that is known
	Certificate []byte         `json:"certificate"` // DER
	At          time.Time      `json:"at"`
	Reason      keyspec.Reason `json:"reason"`
}

// fingerprint is the name of a certificate in documents.
func fingerprint(der []byte) string {
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:])
}

// decodeTrust decodes a document strictly into v, which has the format trustFormat. Errors wrap keystore.ErrDamaged or ErrUnsupported.
func decodeTrust(d *keystore.Document, v any) error {
	var probe struct {
		Format int `json:"format"`
	}
	if err := json.Unmarshal(d.Data, &probe); err == nil && probe.Format != trustFormat {
		return fmt.Errorf("%w: document %s/%s in format %d: use the release of kmsd that wrote it, or a later one", ErrUnsupported, d.Kind, d.Name, probe.Format)
	}
	decoder := json.NewDecoder(bytes.NewReader(d.Data))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(v); err != nil || decoder.Decode(&struct{}{}) != io.EOF {
		return fmt.Errorf("%w: document %s/%s", keystore.ErrDamaged, d.Kind, d.Name)
	}
	return nil
}

// document makes the change that writes v under a name, based on a revision, 0 to create it.
func document(kind, name string, revision uint64, v any, bump bool) (keystore.DocumentChange, error) {
	data, err := json.Marshal(v)
	if err != nil {
		return keystore.DocumentChange{}, fmt.Errorf("%w: document %s/%s: %w", ErrInternal, kind, name, err)
	}
	return keystore.DocumentChange{Document: keystore.Document{Kind: kind, Name: name, Data: data, Revision: revision}, Bump: bump}, nil
}

// allDocuments calls f with every document of a kind.
//
// Invariant: a document that cannot be read ends it with an error: what is not in the list may be a revocation.
func (u *use) allDocuments(kind string, f func(*keystore.Document) error) error {
	for after := []byte(nil); ; {
		page, next, err := u.store.Documents(kind, after, MaxPage)
		if err != nil {
			return err
		}
		for i := range page {
			if err := f(&page[i]); err != nil {
				return err
			}
		}
		if after = next; after == nil {
			return nil
		}
	}
}

// Revocation is a certificate of ours that was revoked.
type Revocation struct {
	Key         keyspec.Ref // whose certificate it was
	Issuer      keyspec.Ref // the key that issued it and publishes it as revoked; its version may be 0
	Certificate *x509.Certificate
	At          time.Time // whole seconds
	Reason      keyspec.Reason
}

// revocationChange is the change that remembers a revocation. It goes into the commit that revokes the key, and has the rollback
// counter advance. It is created once: a second one for the same certificate is keystore.ErrExists.
func revocationChange(r *Revocation) (keystore.DocumentChange, error) {
	return document(kindRevoked, fingerprint(r.Certificate.Raw), 0, storedRevocation{
		Format: trustFormat, Key: r.Key.String(), Issuer: r.Issuer.String(), Certificate: r.Certificate.Raw, At: r.At.UTC().Truncate(time.Second), Reason: r.Reason,
	}, true)
}

// revocation returns the revocation of a certificate of ours, or nil if it is not revoked.
func (u *use) revocation(c *x509.Certificate) (*Revocation, error) {
	d, err := u.store.Document(kindRevoked, fingerprint(c.Raw))
	if errors.Is(err, keystore.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return decodeRevocation(&d)
}

// revocations returns every certificate of ours that was revoked.
func (u *use) revocations() (list []Revocation, err error) {
	err = u.allDocuments(kindRevoked, func(d *keystore.Document) error {
		r, err := decodeRevocation(d)
		if err == nil {
			list = append(list, *r)
		}
		return err
	})
	return list, err
}

func decodeRevocation(d *keystore.Document) (*Revocation, error) {
	var stored storedRevocation
	if err := decodeTrust(d, &stored); err != nil {
		return nil, err
	}
	r := &Revocation{At: stored.At, Reason: stored.Reason}
	var err error
	if r.Certificate, err = pki.ParseCertificate(stored.Certificate); err == nil {
		if r.Key, err = keyspec.ParseRef(stored.Key); err == nil {
			r.Issuer, err = keyspec.ParseRef(stored.Issuer)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("%w: document %s/%s: %w", keystore.ErrDamaged, d.Kind, d.Name, err)
	}
	return r, nil
}

// Role is what a certificate is in a domain.
type Role string

// The roles.
const (
	RoleRoot         Role = "root"         // a trust anchor: signed by itself
	RoleIntermediate Role = "intermediate" // a CA below a root
	RolePartner      Role = "partner"
	RoleCRL          Role = "crl" // a revocation list
)
