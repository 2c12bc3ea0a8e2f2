package engine

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/pki"
)

// What is trusted is in documents of the store. Those of a domain have kinds of their own, so that a verdict reads one domain
// and no more; the name of a certificate is its fingerprint, that of a revocation list is made of its issuer's name and key.
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

// fingerprint is the name of a certificate in documents: the SHA-256 of what its issuer has signed, in hexadecimal.
//
// Invariant: what was removed or revoked is found whatever its holder makes of it. The rest of a certificate can be changed by anybody so
// that it remains valid: of (r, s), an ECDSA signature, (r, -s) is one as well.
func fingerprint(der []byte) string {
	var certificate, signed asn1.RawValue
	if _, err := asn1.Unmarshal(der, &certificate); err == nil {
		if _, err := asn1.Unmarshal(certificate.Bytes, &signed); err == nil {
			der = signed.FullBytes
		}
	}
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:])
}

// shortSum is the beginning of the SHA-256 of a certificate, for the audit.
func shortSum(c *x509.Certificate) string {
	sum := sha256.Sum256(c.Raw)
	return hex.EncodeToString(sum[:8])
}

// decodeTrust is decodeDocument for the documents of this file.
func decodeTrust(d *keystore.Document, v any) error { return decodeDocument(d, trustFormat, v) }

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
