package engine

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/kmsd/pki"
)

// Trust in certificates of others is by domain: a set of CAs, their revocation lists, and the partners that were admitted. What one
// domain trusts means nothing in another.
//
// Invariant: every verdict is made of the documents as they are at that moment. Nothing that was decided or found before is used
// again, so what is removed or revoked is not trusted from then on.

// OwnDomain is the domain of the keystore's own hierarchy: its roots are the root keys, what is revoked in it are its own
// certificates. Nothing is added to it or removed from it but by making and revoking keys.
const OwnDomain = "OWN"

// Limits of the trust store.
const (
	MaxDomainName   = 36   // bytes
	MaxDomains      = 250  // beside those that are built in
	MaxDomainCAs    = 1000 // CAs of a domain, removed ones included
	MaxOrganization = 256  // bytes
	MaxTrustDays    = 36_500
)

// The dates that certificates are asked for when they are added: MOSIP's 12 months for a CA, and a year less 30 days for a partner.
const (
	defaultCADays      = 365
	defaultPartnerDays = 335
)

// defaultDomains are those of MOSIP's mosip.kernel.partner.allowed.domains, with the one it uses to look up chains.
var defaultDomains = []string{"AUTH", "DEVICE", "FTM", "MISP", "TRUST_CA"}

// Domain is a domain of trust and its rules.
type Domain struct {
	Name        string // upper case
	CADays      int    // how long a CA has to be valid yet when it is added
	PartnerDays int    // the same of a partner's certificate
	Stored      bool   // not only built in
}

// parseDomain returns the name of a domain as it is stored. Errors wrap ErrInput.
func parseDomain(name string) (string, error) {
	if name == "" || len(name) > MaxDomainName {
		return "", fmt.Errorf("%w: a domain has a name of 1 to %d characters", ErrInput, MaxDomainName)
	}
	for _, c := range []byte(name) { // before it is made upper case: that turns letters of other alphabets into these
		if (c < 'A' || c > 'Z') && (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '_' && c != '-' && c != '.' {
			return "", fmt.Errorf("%w: the name of a domain has letters, digits and _ . - only", ErrInput)
		}
	}
	return strings.ToUpper(name), nil
}

// domain returns the domain of a name, which is not OwnDomain.
func (u *use) domain(name string) (*Domain, error) {
	name, err := parseDomain(name)
	if err != nil {
		return nil, err
	}
	if name == OwnDomain {
		return nil, fmt.Errorf("%w: the domain %s is the keystore's own hierarchy: its certificates are made and revoked with their keys", ErrUnsupported, OwnDomain)
	}
	d, _, err := u.storedDomain(name)
	if err == nil && d == nil {
		err = &Remedied{fmt.Errorf("%w: there is no domain %s", ErrInput, name), "kmsctl trust set " + name}
	}
	return d, err
}

// storedDomain returns the settings of a domain, nil when there is no such domain, and the revision of their document.
func (u *use) storedDomain(name string) (*Domain, uint64, error) {
	d, err := u.store.Document(kindTrust, name)
	switch {
	case errors.Is(err, keystore.ErrNotFound):
		if slices.Contains(defaultDomains, name) {
			return &Domain{Name: name, CADays: defaultCADays, PartnerDays: defaultPartnerDays}, 0, nil
		}
		return nil, 0, nil
	case err != nil:
		return nil, 0, err
	}
	var stored storedDomain
	if err := decodeTrust(&d, &stored); err != nil {
		return nil, 0, err
	}
	return &Domain{name, stored.CADays, stored.PartnerDays, true}, d.Revision, nil
}

// TrustDomains returns the domains, by name, without the keystore's own.
func (e *Engine) TrustDomains(ctx context.Context, c *Caller) (list []Domain, err error) {
	err = e.do(ctx, c, &act{op: "trust_domains"}, func(u *use) error {
		names, err := u.domainNames()
		if err != nil {
			return err
		}
		for _, name := range names {
			d, _, err := u.storedDomain(name)
			if err != nil {
				return err
			}
			list = append(list, *d)
		}
		return nil
	})
	return list, err
}

// domainNames returns the names of the domains, sorted.
func (u *use) domainNames() ([]string, error) {
	names := make(map[string]bool)
	for _, name := range defaultDomains {
		names[name] = true
	}
	err := u.allDocuments(kindTrust, func(d *keystore.Document) error { names[d.Name] = true; return nil })
	return slices.Sorted(maps.Keys(names)), err
}

// SetTrustDomain adds a domain or changes the rules of one. Days that are 0 are left as they are, or at their default.
func (e *Engine) SetTrustDomain(ctx context.Context, c *Caller, d *Domain) (after *Domain, err error) {
	err = e.administrate(ctx, c, "trust_set", d.Name, func(u *use) error {
		name, err := parseDomain(d.Name)
		if err != nil {
			return err
		}
		if name == OwnDomain {
			_, err := u.domain(name)
			return err
		}
		old, revision, err := u.storedDomain(name)
		if err != nil {
			return err
		}
		if old == nil {
			count := 0
			if err := u.allDocuments(kindTrust, func(*keystore.Document) error { count++; return nil }); err != nil {
				return err
			}
			if count >= MaxDomains {
				return fmt.Errorf("%w: over %d domains", ErrInput, MaxDomains)
			}
			old = &Domain{Name: name, CADays: defaultCADays, PartnerDays: defaultPartnerDays}
		}
		after = &Domain{name, orDays(d.CADays, old.CADays), orDays(d.PartnerDays, old.PartnerDays), true}
		if after.CADays < 0 || after.CADays > MaxTrustDays || after.PartnerDays < 0 || after.PartnerDays > MaxTrustDays {
			return fmt.Errorf("%w: 1 to %d days", ErrInput, MaxTrustDays)
		}
		change, err := document(kindTrust, name, revision, storedDomain{trustFormat, after.CADays, after.PartnerDays}, false)
		if err != nil {
			return err
		}
		u.detail = fmt.Sprintf("%s: CAs %d days, partners %d days", name, after.CADays, after.PartnerDays)
		return u.commit(keystore.Commit{Documents: []keystore.DocumentChange{change}})
	})
	return after, err
}

func orDays(asked, old int) int {
	if asked != 0 {
		return asked
	}
	return old
}

// administrate carries out an act of administration on documents, whose record is committed with them.
func (e *Engine) administrate(ctx context.Context, c *Caller, op, info string, f func(u *use) error) error {
	return e.do(ctx, c, &act{op: op, admin: true, sync: true, info: info}, func(u *use) error {
		if u.store == nil {
			_, err := u.opened()
			return err
		}
		return f(u)
	})
}

// TrustResult says what came of one certificate that was to be added.
type TrustResult struct {
	Certificate *x509.Certificate
	Role        Role // of one that was added
	Added       bool
	Reasons     []pki.Reason // why not, what says most first
}

// TrustAdd adds the CAs of a file to a domain, in whatever order they are there: a certificate that is signed by itself becomes a
// root, another one has to have a path to a root. Each is judged by itself; those that pass are added together in one commit. One
// that was removed is back by that.
func (e *Engine) TrustAdd(ctx context.Context, c *Caller, domain string, bundle []*x509.Certificate) (results []TrustResult, err error) {
	err = e.administrate(ctx, c, "trust_add", domain, func(u *use) error {
		d, err := u.domain(domain)
		if err != nil {
			return err
		}
		trust, count, err := u.trustIn(d.Name)
		if err != nil {
			return err
		}
		if count+len(bundle) > MaxDomainCAs {
			return fmt.Errorf("%w: a domain has at most %d CAs", ErrInput, MaxDomainCAs)
		}
		results = u.judge(trust, bundle, time.Duration(d.CADays)*24*time.Hour)
		var changes []keystore.DocumentChange
		var added []string
		for i := range results {
			r := &results[i]
			if !r.Added {
				continue
			}
			change, err := u.certificateChange(kindCAs+d.Name, &storedCertificate{Format: trustFormat, Role: r.Role, Certificate: r.Certificate.Raw, Added: u.mark()}, false)
			if err != nil {
				return err
			}
			changes = append(changes, change)
			added = append(added, string(r.Role)+" "+shortSum(r.Certificate))
		}
		u.detail = fmt.Sprintf("%s: %d of %d: %s", d.Name, len(added), len(results), strings.Join(added, ", "))
		if len(changes) == 0 {
			return nil
		}
		return u.commit(keystore.Commit{Documents: changes})
	})
	if err != nil {
		return nil, err
	}
	return results, nil
}

// judge decides about the certificates of a bundle. Those that pass are put into trust, so that others can build on them.
func (u *use) judge(trust *pki.Trust, bundle []*x509.Certificate, left time.Duration) []TrustResult {
	results := make([]TrustResult, len(bundle))
	var pending []int
	for i, c := range bundle {
		results[i].Certificate = c
		switch {
		case slices.ContainsFunc(trust.Roots, same(c)), slices.ContainsFunc(trust.Intermediates, same(c)):
			results[i].Reasons = []pki.Reason{{Code: pki.Duplicate, Text: "the domain has it already"}}
		default:
			if results[i].Reasons = pki.AdmitCA(c, u.now, left); len(results[i].Reasons) == 0 {
				pending = append(pending, i)
			}
		}
	}
	for progress := true; progress; {
		progress = false
		for _, i := range pending {
			r := &results[i]
			if r.Added {
				continue
			}
			again := *trust
			again.Removed = slices.DeleteFunc(slices.Clone(trust.Removed), func(o *x509.Certificate) bool { // it, or one that it replaces
				return bytes.Equal(o.RawSubjectPublicKeyInfo, r.Certificate.RawSubjectPublicKeyInfo)
			})
			if pki.IsSelfSigned(r.Certificate) {
				r.Role, r.Added = RoleRoot, true
				again.Roots = append(again.Roots, r.Certificate)
			} else {
				v := again.Verify([]*x509.Certificate{r.Certificate}, u.now)
				if v.Trusted {
					v.Reasons = pki.AdmitIssuer(v.Path)
				}
				if len(v.Reasons) > 0 {
					r.Reasons = v.Reasons
					continue
				}
				r.Role, r.Added = RoleIntermediate, true
				again.Intermediates = append(again.Intermediates, r.Certificate)
			}
			r.Reasons, *trust, progress = nil, again, true
		}
	}
	return results
}

// same returns a function that recognises a certificate.
func same(c *x509.Certificate) func(*x509.Certificate) bool {
	return func(o *x509.Certificate) bool { return pki.SameCertificate(c, o) }
}

// mark says that the caller does something now.
func (u *use) mark() storedMark {
	return storedMark{u.now.UTC().Truncate(time.Second), u.decision.Principal}
}

// certificateChange writes the document of a certificate, whether it is there or not.
func (u *use) certificateChange(kind string, s *storedCertificate, bump bool) (keystore.DocumentChange, error) {
	name := fingerprint(s.Certificate)
	old, err := u.store.Document(kind, name)
	if err != nil && !errors.Is(err, keystore.ErrNotFound) {
		return keystore.DocumentChange{}, err
	}
	return document(kind, name, old.Revision, s, bump)
}

// decodeCertificate decodes the document of a certificate.
func decodeCertificate(d *keystore.Document) (*storedCertificate, *x509.Certificate, error) {
	var s storedCertificate
	if err := decodeTrust(d, &s); err != nil {
		return nil, nil, err
	}
	c, err := pki.ParseCertificate(s.Certificate)
	if err != nil || fingerprint(c.Raw) != d.Name {
		return nil, nil, fmt.Errorf("%w: document %s/%s", keystore.ErrDamaged, d.Kind, d.Name)
	}
	return &s, c, nil
}

// trustIn returns what a verdict in a domain rests on, and how many certificates the domain has, removed ones included.
func (u *use) trustIn(domain string) (*pki.Trust, int, error) {
	trust, count := &pki.Trust{}, 0
	err := u.allDocuments(kindCAs+domain, func(d *keystore.Document) error {
		s, c, err := decodeCertificate(d)
		if err != nil {
			return err
		}
		count++
		switch {
		case s.Removed != nil:
			trust.Removed = append(trust.Removed, c)
		case s.Role == RoleRoot:
			trust.Roots = append(trust.Roots, c)
		default:
			trust.Intermediates = append(trust.Intermediates, c)
		}
		return nil
	})
	if err == nil {
		trust.CRLs, err = u.listsIn(domain)
	}
	return trust, count, err
}

// errNotInDomain is the refusal to remove what is not there.
func errNotInDomain(domain string, sum [sha256.Size]byte) error {
	return &Remedied{fmt.Errorf("%w: %x is not in the domain %s", ErrInput, sum[:8], domain), "kmsctl trust list " + domain}
}

// TrustRemove takes something out of a domain, at once and for good: a CA or a partner's certificate by its SHA-256, with a role of
// theirs or none; with RoleCRL a revocation list by its name. A certificate stays known as removed: nothing is trusted over it, even
// if its issuer is trusted still.
func (e *Engine) TrustRemove(ctx context.Context, c *Caller, domain string, role Role, sum [sha256.Size]byte) error {
	op := "trust_remove"
	return e.administrate(ctx, c, op, domain, func(u *use) error {
		d, err := u.domain(domain)
		if err != nil {
			return err
		}
		u.detail = fmt.Sprintf("%s: %s %x", d.Name, role, sum[:8])
		kinds := []string{kindCAs + d.Name, kindPartner + d.Name}
		switch role {
		case "":
		case RoleRoot, RoleIntermediate:
			kinds = kinds[:1]
		case RolePartner:
			kinds = kinds[1:]
		case RoleCRL:
			return u.removeList(d.Name, sum)
		default:
			return fmt.Errorf("%w: role %q", ErrInput, role)
		}
		var changes []keystore.DocumentChange
		for _, kind := range kinds {
			some, err := u.removals(kind, sum)
			if err != nil {
				return err
			}
			changes = append(changes, some...)
		}
		if len(changes) == 0 {
			return errNotInDomain(d.Name, sum)
		}
		return u.commit(keystore.Commit{Documents: changes})
	})
}

// removals marks the certificate of a SHA-256 as removed, if there is one that is not removed already.
func (u *use) removals(kind string, sum [sha256.Size]byte) (changes []keystore.DocumentChange, err error) {
	err = u.allDocuments(kind, func(d *keystore.Document) error {
		s, c, err := decodeCertificate(d)
		if err != nil || s.Removed != nil || sha256.Sum256(c.Raw) != sum {
			return err
		}
		mark := u.mark()
		s.Removed = &mark
		change, err := document(kind, d.Name, d.Revision, s, true)
		changes = append(changes, change)
		return err
	})
	return changes, err
}

// PartnerAdd admits the certificate of a partner to a domain: see pki.AdmitPartner for what it has to be; and a path to a root of the
// domain has to build from the domain's own CAs. Of a chain the leaf is meant. Nothing is signed: a partner goes on with the
// certificate it has, where MOSIP would issue another one for it.
func (e *Engine) PartnerAdd(ctx context.Context, c *Caller, domain, organization string, bundle []*x509.Certificate) (result *TrustResult, err error) {
	err = e.administrate(ctx, c, "partner_add", domain, func(u *use) error {
		d, err := u.domain(domain)
		if err != nil {
			return err
		}
		if organization == "" || len(organization) > MaxOrganization {
			return fmt.Errorf("%w: the name of an organization has 1 to %d bytes", ErrInput, MaxOrganization)
		}
		chain, err := pki.Arrange(bundle)
		if err != nil {
			return err
		}
		leaf := chain[0]
		result = &TrustResult{Certificate: leaf, Role: RolePartner}
		trust, _, err := u.trustIn(d.Name)
		if err != nil {
			return err
		}
		old, err := u.partner(d.Name, leaf)
		if err != nil {
			return err
		}
		if old != nil && old.Removed == nil {
			result.Reasons = []pki.Reason{{Code: pki.Duplicate, Text: "the domain has it already, as of " + old.Organization}}
			return nil
		}
		result.Reasons = pki.AdmitPartner(leaf, u.now, time.Duration(d.PartnerDays)*24*time.Hour, organization)
		if len(result.Reasons) == 0 {
			result.Reasons = trust.Verify(chain[:1], u.now).Reasons
		}
		u.detail = fmt.Sprintf("%s: %s %s", d.Name, organization, shortSum(leaf))
		if len(result.Reasons) > 0 {
			u.detail += ", refused: " + string(result.Reasons[0].Code)
			return nil
		}
		change, err := u.certificateChange(kindPartner+d.Name, &storedCertificate{
			Format: trustFormat, Role: RolePartner, Certificate: leaf.Raw, Organization: organization, Added: u.mark(),
		}, false)
		if err != nil {
			return err
		}
		result.Added = true
		return u.commit(keystore.Commit{Documents: []keystore.DocumentChange{change}})
	})
	if err != nil {
		return nil, err
	}
	return result, nil
}

// partner returns what a domain knows of a partner's certificate, or nil.
func (u *use) partner(domain string, c *x509.Certificate) (*storedCertificate, error) {
	d, err := u.store.Document(kindPartner+domain, fingerprint(c.Raw))
	if errors.Is(err, keystore.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	s, _, err := decodeCertificate(&d)
	return s, err
}
