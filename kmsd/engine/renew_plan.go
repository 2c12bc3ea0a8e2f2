package engine

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"slices"
	"time"

	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/pki"
)

// prospect is what becomes of the current version of a key at its end, and what kmsd does about it before.
type prospect struct {
	*standing
	what   DueWhat
	then   DueThen
	at     time.Time // when kmsd rotates or recertifies; zero: it does neither
	waits  bool      // until the issuer has been replaced: at is the time of that
	extend time.Time // until when a new certificate for the version is valid
	detail string
}

// survey looks at many keys, and remembers what they have in common.
type survey struct {
	*use
	issuers map[keyspec.Name]*prospect
	good    map[string]bool // whether a certificate is not revoked, by fingerprint
}

func newSurvey(u *use) *survey {
	u.apps = make(map[string]*Application)
	return &survey{use: u, issuers: make(map[keyspec.Name]*prospect), good: make(map[string]bool)}
}

// prospect says what becomes of a key, nil when there is none, or none that expires.
func (y *survey) prospect(name keyspec.Name) (*prospect, error) {
	p, err := y.placeOf(name, false)
	outside := errors.Is(err, ErrApplication) || errors.Is(err, ErrNotMade)
	if outside {
		p, err = &place{name: name}, nil
	}
	if err != nil {
		return nil, err
	}
	s, err := y.standing(p)
	if errors.Is(err, ErrNotMade) {
		outside = true
		s, err = y.standing(&place{name: name})
	}
	if err != nil || s.key == nil || s.until.IsZero() {
		return nil, err
	}
	x := &prospect{standing: s, what: DueKey, then: ThenDeactivate}
	if s.version.Expires.IsZero() || s.until.Before(s.version.Expires) {
		x.what = DueCertificate
	}
	if outside {
		return x, y.decideOutside(x)
	}
	return x, y.decide(x)
}

func (x *prospect) alert(detail string) error {
	x.then, x.detail = ThenAlert, detail
	return nil
}

func (x *prospect) nothing(detail string) error {
	x.then, x.detail = ThenNothing, detail
	return nil
}

// decideOutside fills in what becomes of a key that has no place in the hierarchy: kmsd replaces none of them, since nobody but their
// users knows whether they can follow.
func (y *survey) decideOutside(x *prospect) error {
	switch {
	case x.key.Origin == keyspec.Foreign:
		return x.alert("the certificate is another domain's: kmsctl cert upload " + string(x.key.Name))
	case !x.version.Revoked.IsZero():
		return x.nothing("revoked")
	case x.what == DueCertificate:
		return x.alert("the key goes on: kmsctl cert issue or kmsctl cert attach")
	}
	return nil
}

// decide fills in what becomes of a key that has a place in the hierarchy.
func (y *survey) decide(x *prospect) error {
	p, key, v, name := x.place, x.key, x.version, string(x.key.Name)
	revoked, mark := !v.Revoked.IsZero(), key.Labels[LabelNoReplace]
	switch state := stateAt(key, v, v.NotBefore); { // at its beginning: so without what time has done since
	case key.Origin == keyspec.Foreign:
		return x.alert("the certificate is another domain's: kmsctl cert upload " + name)
	case revoked && (mark == string(ReplaceNo) || p.rank != rankBase && mark != string(ReplaceYes)):
		return x.nothing("revoked, and not to be replaced")
	case !v.DestroyAt.IsZero(), v.State == keyspec.Destroyed:
		return x.nothing("it is to be destroyed")
	case state == keyspec.Suspended:
		return x.nothing("it is suspended")
	case v.State == keyspec.PreActive && y.now.Before(v.NotBefore), key.Origin == keyspec.Derived, len(x.public.Chain) == 0 && p.rank == rankBase:
		return nil // somebody's own
	case len(x.public.SPKI) == 0 && p.rank == rankSymmetric:
		return x.alert("kmsctl master generate --force " + name)
	case len(x.public.SPKI) == 0:
		return nil
	case p.app.Inactive:
		x.detail = "application " + p.app.Name + " is not active"
		return nil
	case len(x.public.Chain) == 0:
		return x.alert("it waits for a certificate: kmsctl cert upload " + name)
	}
	c, err := y.issuedBy(p, keyspec.Ref{Name: key.Name, Version: v.Number}, x.public.Chain)
	if err != nil {
		return err
	}
	issuer := p.issuer
	if issuer == "" {
		issuer = key.Name
	}
	switch {
	case (c == nil || c.Issuer.Name != issuer) && p.rank == rankBase:
		return x.alert("an outside authority has certified it: kmsctl cert csr " + name + ", then kmsctl cert upload " + name)
	case c == nil || c.Issuer.Name != issuer:
		return x.alert("an outside authority has certified it: kmsctl master generate --csr --force " + name)
	case y.renewals.off && p.rank == rankBase:
		return x.nothing("replaced when its certificate is asked for after " + x.renewal().UTC().Format(time.DateOnly))
	case y.renewals.off:
		return x.alert("kmsd renews nothing, as configured: kmsctl master generate " + name)
	}
	x.then, x.at = ThenRotate, y.now
	if revoked || x.early {
		return nil
	}
	begin := x.renewal()
	x.at = begin.Add(spread(key.Name, min(y.renewals.jitter, x.until.Sub(begin)/2)))
	if p.issuer == "" || !x.usable || x.due {
		return nil
	}
	return y.recertification(x, c.Certificate, c.Issuer)
}

// spread is a share of a span that a key always gets: so keys that were made together are not replaced together.
func spread(name keyspec.Name, span time.Duration) time.Duration {
	sum := sha256.Sum256([]byte(name))
	return time.Duration(float64(span) * float64(binary.BigEndian.Uint32(sum[:])) / (1 << 32))
}

// nearly is how far apart the ends of two certificates may be that count as one.
const nearly = 24 * time.Hour

// recertification has a certificate issued anew for a version which is good as such: when one above it was revoked, and when it was cut
// short by the end of its issuer, which has been replaced since by one that lasts longer. A version that is due is rotated instead.
func (y *survey) recertification(x *prospect, leaf *x509.Certificate, by keyspec.Ref) error {
	i, err := y.issuer(x.place.issuer)
	if err != nil || i == nil || !i.usable || len(i.public.Chain) == 0 {
		return err
	}
	top, err := pki.ParseCertificate(i.public.Chain[0])
	if err != nil {
		return err
	}
	wanted := x.version.NotBefore.Add(days(x.place.days))
	last := top.NotAfter
	if wanted.Before(last) {
		last = wanted
	}
	x.extend = last
	if x.until.After(last) {
		x.extend = x.until
	}
	bad, err := y.brokenAbove(x, i, by)
	if err != nil {
		return err
	}
	if bad {
		x.then, x.what, x.at = ThenRecertify, DueCertificate, y.now
		x.detail = "a certificate above it was revoked"
		return nil
	}
	if len(x.public.Chain) < 2 {
		return nil
	}
	above, err := pki.ParseCertificate(x.public.Chain[1])
	if err != nil {
		return err
	}
	if above.NotAfter.Sub(leaf.NotAfter).Abs() > nearly || wanted.Sub(leaf.NotAfter) <= nearly {
		return nil // it was not cut short
	}
	switch {
	case last.Sub(leaf.NotAfter) > nearly:
		x.then, x.what, x.at = ThenRecertify, DueCertificate, top.NotBefore.Add(spread(x.key.Name, y.renewals.jitter))
	case i.then != ThenNothing && i.then != ThenDeactivate && !i.at.IsZero() && i.at.Before(x.at):
		x.then, x.what, x.at, x.waits = ThenRecertify, DueCertificate, i.at, true
	}
	return nil
}

// issuer returns the prospect of an issuer, nil when there is none.
func (y *survey) issuer(name keyspec.Name) (*prospect, error) {
	if x, known := y.issuers[name]; known {
		return x, nil
	}
	x, err := y.prospect(name)
	if err == nil {
		y.issuers[name] = x
	}
	return x, err
}

// brokenAbove reports whether something above the certificate of x was revoked, while its issuer has a chain without such.
func (y *survey) brokenAbove(x, i *prospect, by keyspec.Ref) (bool, error) {
	for _, der := range i.public.Chain {
		if good, err := y.isGood(der); err != nil || !good {
			return false, err
		}
	}
	at := slices.IndexFunc(i.key.Versions, func(v keystore.Version) bool { return v.Number == by.Version })
	if at >= 0 && !i.key.Versions[at].Revoked.IsZero() {
		return true, nil
	}
	for _, der := range x.public.Chain[1:] {
		if good, err := y.isGood(der); err != nil || !good {
			return err == nil, err
		}
	}
	return false, nil
}

// isGood reports whether a certificate is not among those of ours that were revoked.
func (y *survey) isGood(der []byte) (bool, error) {
	name := fingerprint(der)
	if good, known := y.good[name]; known {
		return good, nil
	}
	_, err := y.store.Document(kindRevoked, name)
	if err != nil && !errors.Is(err, keystore.ErrNotFound) {
		return false, err
	}
	y.good[name] = err != nil
	return err != nil, nil
}
