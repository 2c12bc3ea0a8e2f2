package engine

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/pki"
)

// RootName is the name of the root key, and of the application whose settings the others fall back to.
const RootName keyspec.Name = "ROOT"

// The validity profiles.
const (
	ProfileDocs     = "mosip-docs"     // what MOSIP's documentation says: root 5, module 3, base 2 years
	ProfileDeployed = "mosip-deployed" // the rows of key_policy_def as they are deployed
)

// validityProfile is a named set of periods, in days.
type validityProfile struct {
	name             string
	root, rootPre    int
	module           int
	modulePre        int
	partner          int // module key of PMS
	partnerPre       int
	base, basePre    int
	symmetricDefault int
}

var validityProfiles = []validityProfile{
	{ProfileDocs, 1825, 1125, 1095, 60, 1095, 60, 730, 30, 3650},
	{ProfileDeployed, 2920, 1125, 1095, 60, 1460, 395, 730, 30, 3650},
}

// ValidityProfiles returns the names of the validity profiles, the default first.
func ValidityProfiles() []string {
	names := make([]string, len(validityProfiles))
	for i, p := range validityProfiles {
		names[i] = p.name
	}
	return names
}

// DN is a distinguished name in the attributes that MOSIP knows. Empty ones are left to the default, or left out where there is none.
type DN struct {
	C  string `json:"c,omitempty"`
	ST string `json:"st,omitempty"`
	L  string `json:"l,omitempty"`
	O  string `json:"o,omitempty"`
	OU string `json:"ou,omitempty"`
	CN string `json:"cn,omitempty"`
}

// defaultDN is that of a deployment that sets none (MOSIP's own properties).
var defaultDN = DN{C: "IN", ST: "KA", L: "BANGALORE", O: "IITB", OU: "MOSIP-TECH-CENTER", CN: "www.mosip.io"}

// or returns d with what it leaves open filled in from other.
func (d DN) or(other DN) DN {
	return DN{cmp.Or(d.C, other.C), cmp.Or(d.ST, other.ST), cmp.Or(d.L, other.L), cmp.Or(d.O, other.O), cmp.Or(d.OU, other.OU), cmp.Or(d.CN, other.CN)}
}

// attributes returns d in the order of MOSIP's certificates.
func (d DN) attributes() []pki.Attribute {
	return []pki.Attribute{{Type: "C", Value: d.C}, {Type: "ST", Value: d.ST}, {Type: "L", Value: d.L}, {Type: "O", Value: d.O},
		{Type: "OU", Value: d.OU}, {Type: "CN", Value: d.CN}}
}

// Holder says whom a certificate is for, as far as that is not left to the defaults.
type Holder struct {
	DN
	SANs []string // "dns:x", "ip:x", "email:x" or "uri:x"
}

// Reference is a key that an application has besides its module key.
type Reference struct {
	Name      string            `json:"name"`                // SIGN, IDENTITY_CACHE, ...
	Algorithm keyspec.Algorithm `json:"algorithm,omitempty"` // aes-256-gcm for a symmetric key; else empty: the name says it
	Days      int               `json:"days,omitempty"`      // of a symmetric key; 0: 3650
}

// Application is a tenant of the hierarchy: a namespace with a module key, and the rules by which its keys are made. Periods are in
// days of 24 hours; a change of them holds for keys that are made later.
type Application struct {
	Name    string `json:"name"`
	Profile string `json:"profile,omitempty"` // gives the periods that are 0; empty: that of ROOT, or mosip-docs
	// Of the root or module key and of the application's sign keys: how long they are valid, and how long before the end they are
	// replaced.
	Days          int `json:"days,omitempty"`
	PreExpireDays int `json:"pre_expire_days,omitempty"`
	// The same of base keys.
	BaseDays          int                 `json:"base_days,omitempty"`
	BasePreExpireDays int                 `json:"base_pre_expire_days,omitempty"`
	Algorithm         keyspec.Algorithm   `json:"algorithm,omitempty"`  // of the module key: rsa-2048 unless set, rsa-3072 or rsa-4096
	Protection        keyspec.Protection  `json:"protection,omitempty"` // of new module and sign keys: software unless set
	Subject           DN                  `json:"subject,omitzero"`     // of certificates; CN is the common part of the common names
	SANs              map[string][]string `json:"sans,omitempty"`       // alternative names by reference, "" being the module key; as in Holder
	References        []Reference         `json:"references,omitempty"` // what the key generator makes besides the module key
	Inactive          bool                `json:"inactive,omitempty"`   // no new keys

	Stored bool `json:"-"` // not only built in
}

// Active reports whether the application gets new keys.
func (a *Application) Active() bool { return !a.Inactive }

// Limits of an application.
const (
	MaxReferences = 256
	maxDays       = 36_500
	maxSANs       = 16 // of one reference
)

const (
	kindApplication   = "application"
	applicationFormat = 1
)

// ErrApplication says that there is no application of a name.
var ErrApplication = errors.New("no such application")

// builtin are the applications of MOSIP's key_policy_def with what its key generator makes for them, not to be changed.
var builtin = func() []Application {
	list := []Application{{Name: string(RootName)}}
	for _, name := range []string{"ADMIN_SERVICES", "COMPLIANCE_TOOLKIT", "DIGITAL_CARD", "ID_REPO", "KERNEL", "PMS", "PRE_REGISTRATION", "REGISTRATION",
		"REGISTRATION_PROCESSOR", "RESIDENT"} {
		a := Application{Name: name}
		switch name {
		case "KERNEL":
			a.References = []Reference{{Name: refSign}, {Name: "IDENTITY_CACHE", Algorithm: keyspec.AES256GCM}}
		case "COMPLIANCE_TOOLKIT":
			a.References = []Reference{{Name: "COMP-FIR"}}
		case "RESIDENT":
			a.References = []Reference{{Name: "mpartner-default-resident"}}
		}
		list = append(list, a)
	}
	return list
}()

// resolve fills in what a leaves to its profile and to ROOT.
func (a *Application) resolve(root *Application) error {
	a.Profile = cmp.Or(a.Profile, root.Profile, ProfileDocs)
	i := slices.IndexFunc(validityProfiles, func(p validityProfile) bool { return p.name == a.Profile })
	if i < 0 {
		return fmt.Errorf("%w: validity profile %q: there are %s", ErrInput, a.Profile, strings.Join(ValidityProfiles(), " and "))
	}
	p := &validityProfiles[i]
	days, pre := p.module, p.modulePre
	switch a.Name {
	case string(RootName):
		days, pre = p.root, p.rootPre
	case "PMS":
		days, pre = p.partner, p.partnerPre
	}
	a.PreExpireDays = orPeriod(a.PreExpireDays, pre, cmp.Or(a.Days, days))
	a.Days = cmp.Or(a.Days, days)
	a.BasePreExpireDays = orPeriod(a.BasePreExpireDays, p.basePre, cmp.Or(a.BaseDays, p.base))
	a.BaseDays = cmp.Or(a.BaseDays, p.base)
	a.Algorithm = cmp.Or(a.Algorithm, keyspec.RSA2048)
	a.Protection = cmp.Or(a.Protection, keyspec.Software)
	a.Subject = a.Subject.or(root.Subject).or(defaultDN)
	a.References = slices.Clone(a.References)
	for i := range a.References {
		if r := &a.References[i]; r.Algorithm != "" {
			r.Days = cmp.Or(r.Days, p.symmetricDefault)
		}
	}
	return nil
}

// orPeriod is what is set, or the default as far as it fits.
func orPeriod(set, byDefault, days int) int {
	if set != 0 {
		return set
	}
	return fitting(byDefault, days)
}

// fitting is how long before its end a key is replaced that is valid for so long: the time that is meant for it if that is no more than
// two thirds of the validity, else one third. So no key is due when it is made.
func fitting[T int | time.Duration](before, validity T) T {
	if before <= validity/3*2 { // three times a period of maxDays is more than a Duration holds
		return before
	}
	return validity / 3
}

// check says what is wrong with a, which has been resolved. Errors wrap ErrInput.
func (a *Application) check() error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("%w: application %.40s: %s", ErrInput, a.Name, fmt.Sprintf(format, args...))
	}
	if n, err := keyspec.ParseName(a.Name); err != nil || !n.IsModule() {
		return fmt.Errorf("%w: an application has a name of one segment: %w", ErrInput, keyspec.ErrName)
	}
	for _, p := range [][2]int{{a.Days, a.PreExpireDays}, {a.BaseDays, a.BasePreExpireDays}} {
		if p[0] < 1 || p[0] > maxDays || p[1] < 0 || p[1] >= p[0] {
			return bad("a key is valid for 1 to %d days, and replaced fewer days before the end than that", maxDays)
		}
	}
	if !a.Algorithm.IsRSA() {
		return bad("a module key is rsa-2048, rsa-3072 or rsa-4096")
	}
	switch a.Protection {
	case keyspec.Software, keyspec.TPM, keyspec.HSM:
	default:
		return bad("protection %q", a.Protection)
	}
	if _, err := pki.EditName(emptyName, a.Subject.attributes()); err != nil {
		return err
	}
	if len(a.References) > MaxReferences || len(a.SANs) > MaxReferences {
		return bad("over %d references", MaxReferences)
	}
	for i, r := range a.References {
		if a.Name == string(RootName) {
			return bad("the root has no other keys")
		}
		if _, err := keyspec.ParseName(a.Name + "/" + r.Name); err != nil {
			return fmt.Errorf("%w: %w", ErrInput, err)
		}
		if slices.ContainsFunc(a.References[:i], func(o Reference) bool { return o.Name == r.Name }) {
			return bad("reference %s is there twice", r.Name)
		}
		switch {
		case r.Algorithm != "" && r.Algorithm != keyspec.AES256GCM:
			return bad("the algorithm of a reference is aes-256-gcm, or follows from its name")
		case r.Algorithm != "" && signReference(r.Name) != nil:
			return bad("%s is a sign key", r.Name)
		case r.Days < 0 || r.Days > maxDays || r.Days != 0 && r.Algorithm == "":
			return bad("days of reference %s", r.Name)
		}
	}
	for reference, names := range a.SANs {
		if reference != "" {
			if _, err := keyspec.ParseName(a.Name + "/" + reference); err != nil {
				return fmt.Errorf("%w: %w", ErrInput, err)
			}
		}
		if len(names) > maxSANs {
			return bad("over %d alternative names", maxSANs)
		}
		if _, err := alternativeNames(emptyName, names); len(names) > 0 && err != nil {
			return err
		}
	}
	return nil
}

var emptyName = []byte{0x30, 0x00}

// alternativeNames makes a subject of a name and of alternative names as Holder has them.
func alternativeNames(name []byte, sans []string) (pki.Subject, error) {
	var dns, ip, email, uri []string
	for _, san := range sans {
		kind, value, _ := strings.Cut(san, ":")
		switch strings.ToLower(kind) {
		case "dns":
			dns = append(dns, value)
		case "ip":
			ip = append(ip, value)
		case "email":
			email = append(email, value)
		case "uri":
			uri = append(uri, value)
		default:
			return pki.Subject{}, fmt.Errorf("%w: alternative name %.40q: write dns:, ip:, email: or uri: before it", ErrInput, san)
		}
	}
	s, err := pki.ParseSubject("CN=x", dns, ip, email, uri)
	s.RawName = name
	return s, err
}

// storedApplication is the document of an application.
type storedApplication struct {
	Format int `json:"format"`
	Application
}

func decodeApplication(d *keystore.Document) (*Application, error) {
	var stored storedApplication
	if err := decodeDocument(d, applicationFormat, &stored); err != nil {
		return nil, err
	}
	stored.Stored = true
	return &stored.Application, nil
}

// applications returns those that are set and those that are built in, by name, not resolved.
func (u *use) applications() (map[string]*Application, error) {
	all := make(map[string]*Application)
	for _, a := range builtin {
		all[a.Name] = &a
	}
	err := u.allDocuments(kindApplication, func(d *keystore.Document) error {
		a, err := decodeApplication(d)
		if err == nil {
			all[a.Name] = a
		}
		return err
	})
	return all, err
}

// stored returns an application as it is set, or as it is built in, and its revision. It is nil when there is none.
func (u *use) stored(name string) (*Application, uint64, error) {
	d, err := u.store.Document(kindApplication, name)
	if err == nil {
		a, err := decodeApplication(&d)
		return a, d.Revision, err
	}
	if !errors.Is(err, keystore.ErrNotFound) {
		return nil, 0, err
	}
	if i := slices.IndexFunc(builtin, func(a Application) bool { return a.Name == name }); i >= 0 {
		a := builtin[i]
		return &a, 0, nil
	}
	return nil, 0, nil
}

// application returns the application of a name, resolved.
func (u *use) application(name string) (*Application, error) {
	if a := u.apps[name]; a != nil {
		return a, nil
	}
	a, _, err := u.stored(name)
	if err != nil {
		return nil, err
	}
	if a == nil {
		return nil, &Remedied{fmt.Errorf("%w: %s", ErrApplication, name), "kmsctl app set " + name}
	}
	root, _, err := u.stored(string(RootName))
	if err != nil {
		return nil, err
	}
	if err := a.resolve(root); err != nil {
		return nil, err
	}
	if u.apps != nil {
		u.apps[name] = a
	}
	return a, nil
}

// Applications returns every application, resolved, by name.
func (e *Engine) Applications(ctx context.Context, c *Caller) (list []Application, err error) {
	err = e.do(ctx, c, &act{op: "app_list", admin: true, quiet: true}, func(u *use) error {
		if u.store == nil {
			_, err := u.opened()
			return err
		}
		all, err := u.applications()
		if err != nil {
			return err
		}
		root := *all[string(RootName)]
		for _, name := range slices.Sorted(maps.Keys(all)) {
			if err := all[name].resolve(&root); err != nil {
				return err
			}
			list = append(list, *all[name])
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return list, nil
}

// Application returns an application, resolved.
func (e *Engine) Application(ctx context.Context, c *Caller, name string) (a *Application, err error) {
	err = e.do(ctx, c, &act{op: "app_get", ref: keyspec.Ref{Name: keyspec.Name(name)}}, func(u *use) error {
		a, err = u.application(name)
		return err
	})
	if err != nil {
		return nil, err
	}
	return a, nil
}

// Settings returns an application as it was set, or is built in, not resolved: what an administrator changes one thing of.
func (e *Engine) Settings(ctx context.Context, c *Caller, name string) (a *Application, err error) {
	err = e.do(ctx, c, &act{op: "app_get", ref: keyspec.Ref{Name: keyspec.Name(name)}}, func(u *use) error {
		if a, _, err = u.stored(name); err == nil && a == nil {
			return fmt.Errorf("%w: %s", ErrApplication, name)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return a, nil
}

// SetApplication adds an application or replaces the settings of one. What a leaves open is not kept of former settings, but taken from
// the profile and from ROOT whenever a key is made. It returns the application, resolved.
func (e *Engine) SetApplication(ctx context.Context, c *Caller, a *Application) (after *Application, err error) {
	err = e.do(ctx, c, &act{op: "app_set", ref: keyspec.Ref{Name: keyspec.Name(a.Name)}, admin: true, sync: true}, func(u *use) error {
		if u.store == nil {
			_, err := u.opened()
			return err
		}
		root := a
		if a.Name != string(RootName) {
			if root, _, err = u.stored(string(RootName)); err != nil {
				return err
			}
		}
		resolved := *a
		if err := resolved.resolve(root); err != nil {
			return err
		}
		if err := resolved.check(); err != nil {
			return err
		}
		_, revision, err := u.stored(a.Name)
		if err != nil {
			return err
		}
		change, err := document(kindApplication, a.Name, revision, storedApplication{applicationFormat, *a}, false)
		if err != nil {
			return err
		}
		if err := u.commit(keystore.Commit{Documents: []keystore.DocumentChange{change}}); err != nil {
			return err
		}
		resolved.Stored, after = true, &resolved
		return nil
	})
	if err != nil {
		return nil, err
	}
	return after, nil
}
