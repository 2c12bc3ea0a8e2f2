package engine

import (
	"cmp"
	"context"
	"fmt"
	"slices"

	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/mechanism"
)

// symmetricDays is how long a symmetric key of an application is valid unless its reference says so.
const symmetricDays = 3650

// Master asks for a key of the hierarchy that is not made by itself.
type Master struct {
	Name keyspec.Name // ROOT, APP, APP/SIGN and the other sign keys, or the reference of a symmetric key
	// Force makes a new version though the current one is good. The validity of that ends now.
	Force bool
	// CSR leaves the certificate to an outside authority: the key gets none until that is uploaded, and a request is returned.
	CSR        bool
	Symmetric  bool               // an AES key, where the application does not say so already
	Protection keyspec.Protection // of a new key; empty: that of the application
	Escrow     keyspec.Escrow     // of a new module key in a device
	Subject    *Holder            // what is not left to the defaults
}

// MasterGenerate generates the root, a module key, a sign key or a symmetric key, unless there is a current one. One that is due,
// expired or revoked is replaced. The root certifies itself and the others are certified by it, but for the Ed25519 sign key, which the
// module key certifies.
//
// Errors wrap ErrApplication, ErrNotGenerated and ErrNoCertificate for the issuer, ErrClock, ErrState, ErrExpired, and keystore.ErrExists
// when there is a key of another kind under the name.
func (e *Engine) MasterGenerate(ctx context.Context, c *Caller, m *Master) (out *Certified, err error) {
	err = e.do(ctx, c, &act{op: "master_generate", ref: keyspec.Ref{Name: m.Name}, admin: true, sync: true}, func(u *use) error {
		if u.store == nil {
			_, err := u.opened()
			return err
		}
		out, err = u.master(m)
		return err
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

func (u *use) master(m *Master) (*Certified, error) {
	p, err := u.placeOf(m.Name, m.Symmetric)
	if err != nil {
		return nil, err
	}
	switch {
	case p.rank == rankBase:
		return nil, &Remedied{fmt.Errorf("%w: %s is a base key, which is made when its certificate is asked for", ErrInput, m.Name), "kmsctl cert get " + string(m.Name)}
	case p.rank == rankSymmetric && m.CSR:
		return nil, fmt.Errorf("%w: a symmetric key has no certificate", ErrUnsupported)
	}
	done, err := u.makers.take(u.ctx, string(m.Name))
	if err != nil {
		return nil, err
	}
	defer done()
	if u.now, err = u.turn(); err != nil {
		return nil, err
	}
	s, err := u.standing(p)
	if err != nil {
		return nil, err
	}
	g := &generation{holder: m.Subject, escrow: m.Escrow, force: m.Force, request: m.CSR}
	if g.protection = cmp.Or(m.Protection, p.app.Protection); p.rank == rankSymmetric {
		g.protection = cmp.Or(m.Protection, keyspec.Software)
	}
	if s.key == nil {
		return u.makeVersion(s, g)
	}
	if err := s.accepts(m); err != nil {
		return nil, err
	}
	if !m.Force && (s.usable && !s.due || s.awaits() && u.now.Before(s.version.Expires)) {
		out := s.certified()
		u.version = s.version
		if m.CSR || s.awaits() {
			out.Request, err = u.requestFor(s, m.Subject)
		}
		return out, err
	}
	if !m.Force {
		if err := s.replaceable(u.now); err != nil {
			return nil, err
		}
	}
	return u.makeVersion(s, g)
}

// accepts says why the key that there is cannot be what m asks for, or nil.
func (s *standing) accepts(m *Master) error {
	p, key := s.place, s.key
	row, err := mechanism.Lookup(p.algorithm)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrUnsupported, err)
	}
	have, err := mechanism.Lookup(key.Algorithm)
	if err != nil {
		return err
	}
	may := func(u keyspec.Usage) bool { return slices.Contains(key.Usages, u) }
	switch {
	case have.Kind != row.Kind, (p.rank == rankRoot || p.rank == rankModule) && !may(keyspec.Certify), p.rank == rankSign && !may(keyspec.Sign), key.Origin == keyspec.Foreign:
		return fmt.Errorf("%w: %s is a key of another kind (%s for %s)", keystore.ErrExists, key.Name, key.Algorithm, join(key.Usages))
	case m.Protection != "" && m.Protection != key.Protection:
		return fmt.Errorf("%w: %s is there with protection %s, which holds for all of its versions", ErrInput, key.Name, key.Protection)
	case m.Escrow != "":
		return fmt.Errorf("%w: the escrow of %s was chosen when it was made", ErrInput, key.Name)
	}
	return nil
}
