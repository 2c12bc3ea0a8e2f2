package engine

import (
	"context"
	"crypto/x509"
	"errors"
	"slices"

	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// issuing returns the names, in DER, under which certificates were revoked.
func (u *use) issuing() (map[string]bool, error) {
	names := make(map[string]bool)
	all, err := u.revocations()
	for _, r := range all {
		names[string(r.Certificate.RawIssuer)] = true
	}
	return names, err
}

// publishing returns the versions of a key that keep up a revocation list: those that can, of which somebody has asked for one, or under
// whose name something was revoked; and as long as their own certificate is valid.
func (u *use) publishing(key *keystore.Key, names map[string]bool) (refs []keyspec.Ref, err error) {
	if !slices.Contains(key.Usages, keyspec.Certify) || key.Origin == keyspec.Foreign {
		return nil, nil
	}
	err = u.certificatesOf(key.Name, func(key *keystore.Key, v *keystore.Version, c *x509.Certificate) {
		state := stateAt(key, v, u.now)
		ref := keyspec.Ref{Name: key.Name, Version: v.Number}
		if c.KeyUsage&x509.KeyUsageCRLSign == 0 || state != keyspec.Active && state != keyspec.Deactivated || !u.now.Before(c.NotAfter) {
			return
		}
		if _, revision, err := u.lastList(ref); names[string(c.RawSubject)] || err == nil && revision > 0 {
			refs = append(refs, ref)
		}
	})
	return refs, err
}

// publishAll signs the lists that are due.
func (e *Engine) publishAll(ctx context.Context, r *round) error {
	for _, ref := range r.issuers {
		what := "list of " + ref.String()
		if again, _ := e.renewals.waiting(what); e.now().Before(again) {
			r.before(again)
			continue
		}
		u := e.itself(ctx, "crl_publish", ref)
		var list *CRL
		err := u.protect(func() (err error) {
			if u.store, err = e.opened(); err == nil {
				list, err = u.publish(ref)
			}
			return err
		})
		if err != nil || u.recorded {
			err = u.record(err)
		}
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, ErrLocked), errors.Is(err, ErrNoStore), errors.Is(err, ErrClock):
			return nil
		case err != nil && !errors.Is(err, keystore.ErrNotFound) && !errors.Is(err, ErrNotAvailable):
			e.troubled(what, ref, "its revocation list was not signed: "+err.Error(), r)
		default:
			e.renewals.succeeded(what)
		}
		if list != nil {
			r.before(list.ThisUpdate.Add(crlFresh))
		}
	}
	return nil
}
