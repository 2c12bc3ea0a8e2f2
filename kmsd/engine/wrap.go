package engine

import (
	"context"
	"fmt"

	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/mechanism"
)

// Wrap wraps the exportable key target under the AES key ref with AES-KWP (RFC 5649): PKCS#8 DER of an asymmetric key, the
// raw bytes of a symmetric one.
func (e *Engine) Wrap(ctx context.Context, c *Caller, ref, target keyspec.Ref) (wrapped []byte, number keyspec.Version, err error) {
	a := &act{op: "wrap", ref: ref, usage: keyspec.Wrap, also: []keyspec.Name{target.Name}, sync: true, info: "target " + target.String()}
	err = e.do(ctx, c, a, func(u *use) error {
		number = u.version.Number
		k, err := u.secret()
		if err != nil {
			return err
		}
		key, err := u.metadata(u.store, target.Name, u.now)
		if err != nil {
			return err
		}
		v, err := version(key, target.Version, u.now)
		if err != nil {
			return err
		}
		if err := reachable(key, c); err != nil {
			return err
		}
		if key.Origin == keyspec.Foreign {
			return errForeign
		}
		if !key.Exportable {
			return fmt.Errorf("%w: %s is not exportable", ErrUsage, target.Name)
		}
		switch state := stateAt(key, v, u.now); {
		case !v.DestroyAt.IsZero():
			return fmt.Errorf("%w: destruction is scheduled", ErrState)
		case state != keyspec.Active && state != keyspec.Deactivated && state != keyspec.PreActive:
			return fmt.Errorf("%w: the key to be wrapped is %s", ErrState, state)
		}
		row, err := mechanism.Lookup(key.Algorithm)
		if err != nil {
			return err
		}
		return u.withMaterial(keyspec.Ref{Name: key.Name, Version: v.Number}, func(b []byte) error {
			plain, err := row.Export(b)
			if err != nil {
				return err
			}
			defer clear(plain)
			wrapped, err = k.Wrap(nil, plain)
			return err
		})
	})
	return wrapped, number, err
}

// Unwrap makes a key of what Wrap made, under the key ref.
func (e *Engine) Unwrap(ctx context.Context, c *Caller, ref keyspec.Ref, wrapped []byte, n *NewKey, requestKey []byte) (*keystore.Key, error) {
	a := &act{op: "unwrap", ref: ref, usage: keyspec.Unwrap, info: "new " + string(n.Name)}
	return e.create(ctx, c, a, n, keyspec.Imported, requestKey, func(u *use, row *mechanism.Row) ([]byte, error) {
		k, err := u.secret()
		if err != nil {
			return nil, err
		}
		plain, err := k.Unwrap(nil, wrapped)
		if err != nil {
			return nil, ErrDecryption
		}
		defer clear(plain)
		b, err := row.Import(plain)
		if err != nil {
			return nil, ErrDecryption // what is inside is not told
		}
		return b, nil
	})
}

// Limits of derivation, in bytes.
const (
	MaxSalt = 1024
	MaxInfo = 1024
)

// Agree runs Diffie-Hellman between the key ref and the public key of a peer (SubjectPublicKeyInfo, DER) and makes a
// symmetric key of HKDF-SHA256 of the secret. The secret itself never leaves.
func (e *Engine) Agree(ctx context.Context, c *Caller, ref keyspec.Ref, peer, salt, info []byte, n *NewKey, requestKey []byte) (*keystore.Key, error) {
	a := &act{op: "agree", ref: ref, usage: keyspec.Agree, info: "new " + string(n.Name)}
	return e.create(ctx, c, a, n, keyspec.Derived, requestKey, func(u *use, row *mechanism.Row) ([]byte, error) {
		if err := derivable(row, salt, info); err != nil {
			return nil, err
		}
		k, err := u.secret()
		if err != nil {
			return nil, err
		}
		z, err := k.Agree(peer)
		if err != nil {
			return nil, err
		}
		defer clear(z)
		return mechanism.HKDF(z, salt, info, row.Size())
	})
}

// Derive makes a symmetric key of HKDF-SHA256 of the HKDF key ref.
func (e *Engine) Derive(ctx context.Context, c *Caller, ref keyspec.Ref, salt, info []byte, n *NewKey, requestKey []byte) (*keystore.Key, error) {
	a := &act{op: "derive", ref: ref, usage: keyspec.Derive, info: "new " + string(n.Name)}
	return e.create(ctx, c, a, n, keyspec.Derived, requestKey, func(u *use, row *mechanism.Row) ([]byte, error) {
		if err := derivable(row, salt, info); err != nil {
			return nil, err
		}
		k, err := u.secret()
		if err != nil {
			return nil, err
		}
		return k.Derive(salt, info, row.Size())
	})
}

func derivable(row *mechanism.Row, salt, info []byte) error {
	if !row.Symmetric() {
		return fmt.Errorf("%w: a derived key is symmetric, not %s", ErrInput, row.Algorithm)
	}
	if len(salt) > MaxSalt || len(info) > MaxInfo {
		return fmt.Errorf("%w: salt and info have at most %d bytes", ErrInput, MaxSalt)
	}
	return nil
}
