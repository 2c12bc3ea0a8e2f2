package engine

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"time"

	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/pki"
)

// TrustVerdict says whether a certificate is trusted in a domain.
type TrustVerdict struct {
	pki.Verdict
	Domain  string
	Partner string // the organization, when the leaf is a certificate that was admitted to the domain
}

// TrustVerify judges the certificate chain[0] in a domain at a time, zero being now. The other certificates of chain, in any order,
// are taken as the CAs on the way; those that the domain has are known anyway. Dates, signatures, constraints and revocation are all
// part of the one verdict. Times in the past ask whether the certificate was good then.
func (e *Engine) TrustVerify(ctx context.Context, c *Caller, domain string, chain [][]byte, at time.Time) (v *TrustVerdict, err error) {
	err = e.do(ctx, c, &act{op: "trust_verify", info: domain}, func(u *use) error {
		parsed, err := parseAll(chain)
		if err != nil {
			return err
		}
		if at.IsZero() {
			at = u.now
		}
		v, err = u.verdict(domain, parsed, at)
		if err != nil {
			return err
		}
		u.detail = v.Domain + " trusted"
		if !v.Trusted {
			u.detail = v.Domain + " not trusted: " + string(v.Reasons[0].Code)
		}
		u.detail += " " + shortSum(parsed[0])
		return nil
	})
	if err != nil {
		return nil, err
	}
	return v, nil
}

// parseAll parses a chain in whatever order. Errors wrap ErrInput or pki.ErrCertificate.
func parseAll(chain [][]byte) ([]*x509.Certificate, error) {
	if len(chain) == 0 || len(chain) > pki.MaxChain {
		return nil, fmt.Errorf("%w: 1 to %d certificates", ErrInput, pki.MaxChain)
	}
	parsed := make([]*x509.Certificate, len(chain))
	for i, der := range chain {
		c, err := pki.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		parsed[i] = c
	}
	return parsed, nil
}

// verdict is TrustVerify without the act.
func (u *use) verdict(domain string, chain []*x509.Certificate, at time.Time) (*TrustVerdict, error) {
	name, err := parseDomain(domain)
	if err != nil {
		return nil, err
	}
	if name == OwnDomain {
		trust, err := u.ownTrust(chain)
		if err != nil {
			return nil, err
		}
		return &TrustVerdict{Verdict: trust.Verify(chain, at), Domain: name}, nil
	}
	d, err := u.domain(name)
	if err != nil {
		return nil, err
	}
	trust, _, err := u.trustIn(d.Name)
	if err != nil {
		return nil, err
	}
	v := &TrustVerdict{Domain: d.Name}
	for i, c := range chain { // a partner can be a CA, too
		partner, err := u.partner(d.Name, c)
		if err != nil {
			return nil, err
		}
		known := i > 0 && (slices.ContainsFunc(trust.Roots, same(c)) || slices.ContainsFunc(trust.Intermediates, same(c)))
		switch {
		case partner == nil:
		case partner.Removed != nil && !known: // as a CA of the domain it stays until it is removed as that
			trust.Removed = append(trust.Removed, c)
		case partner.Removed == nil && i == 0:
			v.Partner = partner.Organization
		}
	}
	v.Verdict = trust.Verify(chain, at)
	return v, nil
}

// maxOwn bounds the certificates of ours that are looked up for one verdict.
const maxOwn = 256

// ownTrust returns what a verdict on a certificate of our own hierarchy rests on: the certificates of ROOT, those of the issuers, and
// which of them all are revoked. A certificate of one of our keys brings its chain and the module key of its namespace; for another one,
// issued for somebody's request, all module keys are asked.
func (u *use) ownTrust(chain []*x509.Certificate) (*pki.Trust, error) {
	trust := &pki.Trust{}
	known := slices.Clone(chain)
	add := func(c *x509.Certificate) {
		if len(known) < maxOwn && !slices.ContainsFunc(known, c.Equal) {
			known = append(known, c)
		}
	}
	if err := u.ownRoots(trust, add); err != nil {
		return nil, err
	}
	leaf := false // is of a key of ours
	for i := 0; i < len(known); i++ {
		ours, err := u.ownCertificate(trust, known[i], add)
		if err != nil {
			return nil, err
		}
		leaf = leaf || i == 0 && ours
		if i == len(chain)-1 && !leaf {
			if err := u.moduleCertificates(add); err != nil {
				return nil, err
			}
		}
	}
	trust.Intermediates = known[len(chain):]
	return trust, nil
}

// ownRoots puts the certificates of ROOT into trust: those of versions in use or rotated out are roots, the others are not.
func (u *use) ownRoots(trust *pki.Trust, add func(*x509.Certificate)) error {
	return u.certificatesOf(RootName, func(key *keystore.Key, v *keystore.Version, c *x509.Certificate) {
		add(c)
		switch state := stateAt(key, v, u.now); {
		case !v.Revoked.IsZero(), state == keyspec.Suspended, state == keyspec.Compromised, !v.DestroyAt.IsZero():
			trust.Removed = append(trust.Removed, c)
		case state == keyspec.Active, state == keyspec.Deactivated:
			trust.Roots = append(trust.Roots, c)
		}
	})
}

// certificatesOf calls f with the certificate of every version of a key that has one.
func (u *use) certificatesOf(name keyspec.Name, f func(*keystore.Key, *keystore.Version, *x509.Certificate)) error {
	key, err := u.metadata(u.store, name, u.now)
	if errors.Is(err, keystore.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	for i := range key.Versions {
		v := &key.Versions[i]
		if stateAt(key, v, u.now) == keyspec.Destroyed {
			continue
		}
		stored, err := u.store.Public(keyspec.Ref{Name: name, Version: v.Number})
		if err != nil {
			return err
		}
		if len(stored.Chain) == 0 {
			continue
		}
		c, err := pki.ParseCertificate(stored.Chain[0])
		if err != nil {
			return err
		}
		f(key, v, c)
	}
	return nil
}

// moduleCertificates adds the certificates of all module keys.
func (u *use) moduleCertificates(add func(*x509.Certificate)) error {
	all, err := u.applications()
	if err != nil {
		return err
	}
	for name := range all {
		err := u.certificatesOf(keyspec.Name(name), func(_ *keystore.Key, _ *keystore.Version, c *x509.Certificate) { add(c) })
		if err != nil {
			return err
		}
	}
	return nil
}

// ownCertificate looks a certificate up: whether it is revoked, and, when it is of a key of ours, whether that is, and the CAs
// above it. It reports whether it is of a key of ours. By its public key it is found whatever its holder has made of it.
func (u *use) ownCertificate(trust *pki.Trust, c *x509.Certificate, add func(*x509.Certificate)) (ours bool, err error) {
	revoke := func(at time.Time, reason keyspec.Reason) {
		trust.Revoked = append(trust.Revoked, pki.Withdrawn{
			Issuer: c.RawIssuer, Revocation: pki.Revocation{Serial: new(big.Int).Set(c.SerialNumber), At: at, Reason: reason},
		})
	}
	r, err := u.revocation(c)
	if err != nil {
		return false, err
	}
	if r != nil {
		revoke(r.At, r.Reason)
	}
	sum := sha256.Sum256(c.RawSubjectPublicKeyInfo)
	refs, err := u.store.Sharing(keystore.AliasSPKI, sum[:])
	if err != nil && !errors.Is(err, keystore.ErrNotFound) {
		return false, err
	}
	for _, ref := range refs {
		v, err := u.ownVersion(ref, add)
		if err != nil {
			return false, err
		}
		if v == nil {
			continue
		}
		ours = true
		if !v.Revoked.IsZero() {
			revoke(v.Revoked, v.Reason)
		}
	}
	return ours, nil
}

// ownVersion returns a key version and adds the CAs above it. It is nil if the key is somebody else's, or not there any more.
func (u *use) ownVersion(ref keyspec.Ref, add func(*x509.Certificate)) (*keystore.Version, error) {
	key, err := u.metadata(u.store, ref.Name, u.now)
	if errors.Is(err, keystore.ErrNotFound) || err == nil && key.Origin == keyspec.Foreign {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	v, err := version(key, ref.Version, u.now)
	if err != nil {
		return nil, err
	}
	// The chain that is attached may be of another certificate of the key, issued by another version of the module key.
	err = u.certificatesOf(keyspec.Name(ref.Name.Namespace()), func(_ *keystore.Key, _ *keystore.Version, c *x509.Certificate) { add(c) })
	if err != nil {
		return nil, err
	}
	stored, err := u.store.Public(ref)
	if err != nil {
		return nil, err
	}
	for i, der := range stored.Chain {
		issuer, err := pki.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		if i > 0 {
			add(issuer)
		}
	}
	return v, nil
}
