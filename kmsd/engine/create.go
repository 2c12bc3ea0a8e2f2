package engine

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/keystore/secmem"
	"github.com/kmsd-project/kmsd/kmsd/mechanism"
)

// NewKey describes a key to be made.
type NewKey struct {
	Name       keyspec.Name
	Algorithm  keyspec.Algorithm
	Usages     []keyspec.Usage    // empty: the algorithm's default
	Protection keyspec.Protection // empty: software; with another the key is made in a device and never leaves it
	NotBefore  time.Time          // zero: now
	Expires    time.Time          // zero: the default cryptoperiod
	NoExpiry   bool               // asked for; Expires is zero then
	Exportable bool
	Labels     map[string]string
	Profile    string // empty or mosip-module
	Keep       uint32 // versions kept when rotating; 0: all
	UsableVia  []string
	Durable    bool           // each use is in the audit on disk before it is answered
	Escrow     keyspec.Escrow // of a module key that is made in a device; empty: the recipients, if the store has any
	Uses       uint64         // how often the key may be used; 0: no limit
}

// Limits of a key's description, beside those of keyspec.
const (
	MaxRequestKey  = 64 // bytes
	maxCryptotime  = 100 * 365 * 24 * time.Hour
	cryptoperiod   = 2 * 365 * 24 * time.Hour
	certifyPeriod  = 5 * 365 * 24 * time.Hour
	derivingPeriod = 365 * 24 * time.Hour
)

// period is the default cryptoperiod of a key (NIST SP 800-57 part 1 revision 5, section 5.3.6): within the one to two
// years given there for most originator's uses, one year for keys that others are derived from, and longer for keys whose
// signature has to outlive the certificates below it. What a key has protected can be verified and decrypted after it.
func period(usages []keyspec.Usage) time.Duration {
	switch {
	case slices.Contains(usages, keyspec.Certify):
		return certifyPeriod
	case slices.Contains(usages, keyspec.Derive):
		return derivingPeriod
	}
	return cryptoperiod
}

// Create makes a key. With a request key, a repetition by the same user within 24 hours returns the key made the first
// time.
func (e *Engine) Create(ctx context.Context, c *Caller, n *NewKey, requestKey []byte) (*keystore.Key, error) {
	return e.create(ctx, c, &act{op: "key_create", ref: keyspec.Ref{Name: n.Name}}, n, keyspec.Generated, requestKey, nil)
}

// create is the common part of everything that makes a key. secret returns its material; without it, the key is generated.
func (e *Engine) create(ctx context.Context, c *Caller, a *act, n *NewKey, origin keyspec.Origin, requestKey []byte,
	secret func(*use, *mechanism.Row) ([]byte, error),
) (created *keystore.Key, err error) {
	if a.ref.Name != n.Name {
		a.also = append(a.also, n.Name)
	}
	err = e.do(ctx, c, a, func(u *use) error {
		key, row, err := u.describe(n, origin)
		if err != nil {
			return err
		}
		if len(requestKey) > MaxRequestKey {
			return fmt.Errorf("%w: request key over %d bytes", ErrInput, MaxRequestKey)
		}
		// Making the material may take a second: know early whether the name is free, and hold nobody up meanwhile. The
		// commit asks again.
		if _, err := u.store.Get(n.Name); len(requestKey) == 0 && err == nil {
			return keystore.ErrExists
		}
		created, err = u.make(key, row, n.Escrow, requestKey, secret)
		return err
	})
	if err != nil {
		return nil, err
	}
	return created, nil
}

// describe checks n and turns it into the metadata of a key with one version.
func (u *use) describe(n *NewKey, origin keyspec.Origin) (*keystore.Key, *mechanism.Row, error) {
	if _, err := keyspec.ParseName(string(n.Name)); err != nil {
		return nil, nil, fmt.Errorf("%w: %w", ErrInput, err)
	}
	row, err := mechanism.Lookup(n.Algorithm)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", ErrInput, err)
	}
	if err := checkResident(n, origin, u.act.op); err != nil {
		return nil, nil, err
	}
	if n.Escrow == keyspec.EscrowRecipients && len(u.store.Info().Escrow) == 0 {
		return nil, nil, fmt.Errorf("%w: the keystore has no escrow recipients, which kmsd init --escrow-to sets; with escrow none the keys below %s die with the device", ErrInput, n.Name)
	}
	if n.Profile == mechanism.ProfileMOSIPMachine && u.act.op != "machine_adopt" {
		return nil, nil, fmt.Errorf("%w: keys of profile %s are adopted (machine_adopt), not made", ErrInput, n.Profile)
	}
	usages := slices.Clone(n.Usages)
	if len(usages) == 0 {
		if usages, err = mechanism.DefaultUsages(n.Algorithm, n.Profile); err != nil {
			return nil, nil, fmt.Errorf("%w: %w", ErrInput, err)
		}
	}
	if err := mechanism.ValidateUsages(n.Algorithm, usages, n.Profile); err != nil {
		return nil, nil, fmt.Errorf("%w: %w", ErrInput, err)
	}
	if err := checkLabels(n.Labels); err != nil {
		return nil, nil, err
	}
	if len(n.UsableVia) > keyspec.MaxUsableVia {
		return nil, nil, fmt.Errorf("%w: over %d bridges", ErrInput, keyspec.MaxUsableVia)
	}
	for _, via := range n.UsableVia {
		if via == "" || len(via) > keyspec.MaxBridgeName {
			return nil, nil, fmt.Errorf("%w: name of a bridge", ErrInput)
		}
	}
	switch {
	case n.Uses > MaxUses:
		return nil, nil, fmt.Errorf("%w: a key is limited to at most %d uses", ErrInput, uint64(MaxUses))
	case n.Uses > 0 && n.Exportable:
		return nil, nil, errExportable
	}
	v, err := u.validity(usages, n.NotBefore, n.Expires, n.NoExpiry)
	if err != nil {
		return nil, nil, err
	}
	v.Number = 1
	return &keystore.Key{
		Name: n.Name, Algorithm: n.Algorithm, Usages: usages, Origin: origin, Protection: cmp.Or(n.Protection, keyspec.Software),
		Profile: n.Profile, Exportable: n.Exportable, Durable: n.Durable, Owner: u.caller.UID,
		Labels: maps.Clone(n.Labels), UsableVia: slices.Clone(n.UsableVia), Created: v.Created,
		Current: 1, MinVersion: 1, Keep: n.Keep, Limited: n.Uses > 0, UsesLeft: n.Uses, Versions: []keystore.Version{v},
	}, row, nil
}

// validity returns a new version that is valid as asked for.
func (u *use) validity(usages []keyspec.Usage, notBefore, expires time.Time, noExpiry bool) (keystore.Version, error) {
	now := u.now.Truncate(time.Second)
	v := keystore.Version{State: keyspec.Active, Created: now, NotBefore: now, Expires: expires}
	if !notBefore.IsZero() {
		v.NotBefore = notBefore
	}
	switch {
	case noExpiry:
		if !expires.IsZero() {
			return v, fmt.Errorf("%w: both an expiry and none", ErrInput)
		}
	case expires.IsZero():
		v.Expires = v.NotBefore.Add(period(usages))
	}
	if v.NotBefore.After(now) {
		v.State = keyspec.PreActive
	}
	if !v.Expires.IsZero() && (!v.Expires.After(v.NotBefore) || !v.Expires.After(now)) {
		return v, fmt.Errorf("%w: the key would expire before it can be used", ErrInput)
	}
	if v.NotBefore.Sub(now) > maxCryptotime || !v.Expires.IsZero() && v.Expires.Sub(now) > maxCryptotime {
		return v, fmt.Errorf("%w: validity over 100 years from now", ErrInput)
	}
	return v, nil
}

// make commits a new key with its material.
func (u *use) make(key *keystore.Key, row *mechanism.Row, escrow keyspec.Escrow, requestKey []byte,
	secret func(*use, *mechanism.Row) ([]byte, error),
) (*keystore.Key, error) {
	ch := keystore.Change{Key: key}
	commit := keystore.Commit{}
	if len(requestKey) > 0 {
		commit.RequestKey = u.requestKey(requestKey)
	}
	v := &key.Versions[0]
	err := u.withNew(key, v.Number, row, secret, func(b []byte, spki []byte) error {
		if err := u.notMixed(key, row, spki); err != nil {
			return err
		}
		ch.Material = map[keyspec.Version][]byte{v.Number: b}
		u.setPublic(&ch, v, spki)
		return u.withGuard(key, escrow, func(g *keystore.NamespaceGuard) error {
			ch.Guard = g
			commit.Changes = []keystore.Change{ch}
			return u.commit(commit)
		})
	})
	var duplicate *keystore.DuplicateError
	if errors.As(err, &duplicate) {
		if duplicate.Ref.Name != key.Name {
			return nil, ErrRequestKey
		}
		u.detail = "repeated request"
		return u.store.Get(key.Name)
	}
	if err != nil {
		return nil, err
	}
	key.Revision++
	return key, nil
}

// withNew calls f with the material of a new key version, or what is kept of one that was made in a device, and its public half,
// if there is one, and wipes the material. secret
// returns the material, and runs on a stack that is erased at once; without it, the key is generated.
//
// Generation runs outside secmem.Do, as operations do: it allocates a lot, inside each allocation costs a special, and
// freed memory is overwritten anyway.
func (u *use) withNew(key *keystore.Key, number keyspec.Version, row *mechanism.Row, secret func(*use, *mechanism.Row) ([]byte, error),
	f func(b, spki []byte) error,
) error {
	if key.Protection != keyspec.Software {
		return u.withResident(key, number, row, secret, f)
	}
	if err := u.tests.passed(row); err != nil {
		return err
	}
	u.touch()
	var b []byte
	var k *mechanism.Key
	var err error
	if secret == nil {
		k, b, err = row.NewKey()
	} else {
		var panicked any
		secmem.Do(func() {
			defer func() { panicked = recover() }()
			if b, err = secret(u, row); err == nil {
				k, err = row.Load(b)
			}
		})
		if panicked != nil {
			panic(panicked)
		}
	}
	defer clear(b)
	if err != nil {
		return err
	}
	var spki []byte
	if k.Public() != nil {
		if spki, err = k.SPKI(); err != nil {
			return err
		}
	}
	return f(b, spki)
}

// setPublic puts the public half of a new version into a change.
func (u *use) setPublic(ch *keystore.Change, v *keystore.Version, spki []byte) {
	if spki == nil {
		return
	}
	v.SPKISHA256 = sha256.Sum256(spki)
	ch.Public = map[keyspec.Version]keystore.Public{v.Number: {SPKI: spki}}
	ch.Aliases = Aliases(v.Number, spki)
}

// requestKey makes a client's request key one of its own: nobody else's can be equal.
func (u *use) requestKey(key []byte) []byte {
	h := sha256.New()
	h.Write([]byte("kmsd request key v1"))
	h.Write(binary.BigEndian.AppendUint32(nil, u.caller.UID))
	h.Write([]byte(u.act.op + "\x00"))
	h.Write(key)
	return h.Sum(nil)
}

func checkLabels(labels map[string]string) error {
	if len(labels) > keyspec.MaxLabels {
		return fmt.Errorf("%w: over %d labels", ErrInput, keyspec.MaxLabels)
	}
	total := 0
	for k, v := range labels {
		if k == "" || len(k) > keyspec.MaxLabelName || len(v) > keyspec.MaxLabelValue {
			return fmt.Errorf("%w: a label has a name of 1 to %d bytes and a value of at most %d", ErrInput, keyspec.MaxLabelName, keyspec.MaxLabelValue)
		}
		total += len(k) + len(v)
	}
	if total > keyspec.MaxLabelBytes {
		return fmt.Errorf("%w: the labels of a key take at most %d bytes", ErrInput, keyspec.MaxLabelBytes)
	}
	return nil
}
