package engine

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/mechanism"
)

// Destruction is delayed, so that it can be cancelled.
const (
	DefaultDestroyDelay = 7 * 24 * time.Hour
	MaxDestroyDelay     = 365 * 24 * time.Hour
)

// MaxPage is the number of keys on one page of List.
const MaxPage = 100

// Get returns the metadata of a key and of all its versions. A version that ref names has to be one of them.
func (e *Engine) Get(ctx context.Context, c *Caller, ref keyspec.Ref) (key *keystore.Key, err error) {
	err = e.do(ctx, c, &act{op: "key_get", ref: ref}, func(u *use) error {
		if key, err = u.store.Get(ref.Name); err != nil {
			return err
		}
		u.asOf(key, u.now)
		_, err = version(key, ref.Version, u.now)
		return err
	})
	if err != nil {
		return nil, err
	}
	return key, nil
}

// asOf puts the states at a time in place of those written down, and adds the uses that are reserved but not made.
func (e *Engine) asOf(key *keystore.Key, now time.Time) {
	states := make([]keyspec.State, len(key.Versions))
	for i := range key.Versions {
		states[i] = stateAt(key, &key.Versions[i], now)
	}
	key.Current = current(key, now)
	for i, s := range states {
		key.Versions[i].State = s
	}
	if key.Limited {
		key.UsesLeft += e.counters.left(keyspec.Ref{Name: key.Name})
	}
}

// List returns a page of the keys of a namespace, or of those in it whose reference has a given beginning: prefix is the
// namespace, or the namespace, a slash and that beginning. They come in no meaningful order. The empty prefix lists every namespace, for administrators. next is empty after the
// last page.
func (e *Engine) List(ctx context.Context, c *Caller, prefix string, after []byte, limit int) (keys []*keystore.Key, next []byte, err error) {
	if limit <= 0 || limit > MaxPage {
		limit = MaxPage
	}
	namespace, _, _ := strings.Cut(prefix, "/")
	err = e.do(ctx, c, &act{op: "key_list", list: namespace, admin: prefix == ""}, func(u *use) error {
		if u.store == nil { // administration reaches here without a store
			_, err := u.opened()
			return err
		}
		if prefix != "" {
			if _, err := keyspec.ParseName(namespace); err != nil {
				return fmt.Errorf("%w: %w", ErrInput, err)
			}
		}
		next = after
		for len(keys) == 0 { // a page may be empty where keys are damaged or have another prefix
			if keys, next, err = u.store.Page(namespace, prefix, next, limit); err != nil || next == nil {
				break
			}
			if err := ctx.Err(); err != nil {
				return err
			}
		}
		for _, key := range keys {
			u.asOf(key, u.now)
		}
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	return keys, next, nil
}

// Public returns the public half of a key version and its certificate chain.
func (e *Engine) Public(ctx context.Context, c *Caller, ref keyspec.Ref) (algorithm keyspec.Algorithm, number keyspec.Version, p keystore.Public, err error) {
	err = e.do(ctx, c, &act{op: "public", ref: ref}, func(u *use) error {
		algorithm, number, p, err = u.publicOf(ref)
		if err == nil && len(p.SPKI) == 0 {
			return fmt.Errorf("%w: a symmetric key has no public half", ErrUnsupported)
		}
		return err
	})
	return algorithm, number, p, err
}

func (u *use) publicOf(ref keyspec.Ref) (keyspec.Algorithm, keyspec.Version, keystore.Public, error) {
	key, err := u.metadata(u.store, ref.Name, u.now)
	if err != nil {
		return "", 0, keystore.Public{}, err
	}
	v, err := version(key, ref.Version, u.now)
	if err != nil {
		return "", 0, keystore.Public{}, err
	}
	p, err := u.store.Public(keyspec.Ref{Name: key.Name, Version: v.Number})
	return key.Algorithm, v.Number, p, err
}

// change reads a key, lets edit change it, and commits what came of it with the audit entry. edit returns nil when there
// is nothing to be changed.
func (u *use) change(name keyspec.Name, edit func(key *keystore.Key) (*keystore.Change, error)) (*keystore.Key, error) {
	return u.changeWith(name, func(key *keystore.Key) (*keystore.Change, []keystore.DocumentChange, error) {
		ch, err := edit(key)
		return ch, nil, err
	})
}

// changeWith is change for what documents go with.
func (u *use) changeWith(name keyspec.Name, edit func(key *keystore.Key) (*keystore.Change, []keystore.DocumentChange, error)) (*keystore.Key, error) {
	defer u.writers.lock(name)()
	key, err := u.store.Get(name)
	if err != nil {
		return nil, err
	}
	ch, documents, err := edit(key)
	if err != nil {
		return nil, err
	}
	if ch != nil {
		ch.Key = key
		if err := u.commit(keystore.Commit{Changes: []keystore.Change{*ch}, Documents: documents}); err != nil {
			return nil, err
		}
		key.Revision++
	}
	u.asOf(key, u.now)
	return key, nil
}

// edit is an act on the versions that ref names, all of them when it names none.
func (e *Engine) edit(ctx context.Context, c *Caller, op string, ref keyspec.Ref, info string,
	edit func(u *use, key *keystore.Key, v *keystore.Version, ch *keystore.Change) (changed bool, err error),
) (after *keystore.Key, err error) {
	err = e.do(ctx, c, &act{op: op, ref: ref, info: info}, func(u *use) error {
		after, err = u.change(ref.Name, func(key *keystore.Key) (*keystore.Change, error) {
			var ch keystore.Change
			found, any := false, false
			for i := range key.Versions {
				v := &key.Versions[i]
				if ref.Version != 0 && ref.Version != v.Number {
					continue
				}
				found = true
				changed, err := edit(u, key, v, &ch)
				if err != nil {
					return nil, err
				}
				any = any || changed
			}
			switch {
			case !found:
				return nil, fmt.Errorf("%w: version %d", keystore.ErrNotFound, ref.Version)
			case !any:
				return nil, fmt.Errorf("%w: no version is in a state for %s", ErrState, op)
			}
			return &ch, nil
		})
		return err
	})
	if err != nil {
		return nil, err
	}
	return after, nil
}

// Suspend takes versions out of use until they are resumed.
func (e *Engine) Suspend(ctx context.Context, c *Caller, ref keyspec.Ref) (*keystore.Key, error) {
	return e.edit(ctx, c, "key_suspend", ref, "", func(_ *use, _ *keystore.Key, v *keystore.Version, _ *keystore.Change) (bool, error) {
		switch v.State {
		case keyspec.PreActive, keyspec.Active, keyspec.Deactivated:
			v.State = keyspec.Suspended
			return true, nil
		}
		return false, nil
	})
}

// Resume ends a suspension.
func (e *Engine) Resume(ctx context.Context, c *Caller, ref keyspec.Ref) (*keystore.Key, error) {
	return e.edit(ctx, c, "key_resume", ref, "", func(u *use, key *keystore.Key, v *keystore.Version, _ *keystore.Change) (bool, error) {
		if v.State != keyspec.Suspended {
			return false, nil
		}
		switch {
		case !v.Revoked.IsZero(), v.Number < key.Current:
			v.State = keyspec.Deactivated
		case u.now.Before(v.NotBefore):
			v.State = keyspec.PreActive
		default:
			v.State = keyspec.Active
		}
		return true, nil
	})
}

// Destroy schedules the destruction of versions after a delay, 0 meaning DefaultDestroyDelay. They are out of use at once;
// DestroyCancel brings them back until the delay is over.
func (e *Engine) Destroy(ctx context.Context, c *Caller, ref keyspec.Ref, delay time.Duration) (*keystore.Key, error) {
	if delay == 0 {
		delay = DefaultDestroyDelay
	}
	key, err := e.edit(ctx, c, "key_destroy", ref, delay.String(), func(u *use, _ *keystore.Key, v *keystore.Version, _ *keystore.Change) (bool, error) {
		if delay < 0 || delay > MaxDestroyDelay {
			return false, fmt.Errorf("%w: delay over %s", ErrInput, MaxDestroyDelay)
		}
		if v.State == keyspec.Destroyed {
			return false, nil
		}
		v.DestroyAt = u.now.Add(delay).Truncate(time.Second)
		return true, nil
	})
	if err == nil {
		signal(e.wakeScheduler)
	}
	return key, err
}

// DestroyNow destroys versions at once. On the admin socket it also begins a new epoch of the keystore, after which no byte of
// theirs is left in its file. That takes a while in a large store, so others wait for the next erasure that the daemon carries
// out by itself.
func (e *Engine) DestroyNow(ctx context.Context, c *Caller, ref keyspec.Ref) (*keystore.Key, error) {
	key, err := e.edit(ctx, c, "key_destroy", ref, "now", func(u *use, _ *keystore.Key, v *keystore.Version, ch *keystore.Change) (bool, error) {
		return destroy(v, ch), nil
	})
	if err != nil {
		return nil, err
	}
	if !c.Admin {
		signal(e.wakeScheduler)
		return key, nil
	}
	s, err := e.opened()
	if err != nil {
		return nil, err
	}
	// The key is destroyed and that is recorded. If the epoch is not completed, status says that the erasure is pending.
	if err := s.RotateEpoch(ctx, nil); err != nil {
		return nil, fmt.Errorf("the key is destroyed, but its bytes are not erased yet: %w", err)
	}
	return key, nil
}

// destroy makes a tombstone of v and reports whether it was none yet.
func destroy(v *keystore.Version, ch *keystore.Change) bool {
	if v.State == keyspec.Destroyed {
		return false
	}
	v.State, v.DestroyAt = keyspec.Destroyed, time.Time{}
	ch.Erase = append(ch.Erase, v.Number)
	return true
}

// DestroyCancel cancels scheduled destructions.
func (e *Engine) DestroyCancel(ctx context.Context, c *Caller, ref keyspec.Ref) (*keystore.Key, error) {
	return e.edit(ctx, c, "key_destroy_cancel", ref, "", func(u *use, _ *keystore.Key, v *keystore.Version, _ *keystore.Change) (bool, error) {
		if v.State == keyspec.Destroyed || v.DestroyAt.IsZero() || !u.now.Before(v.DestroyAt) {
			return false, nil
		}
		v.DestroyAt = time.Time{}
		return true, nil
	})
}

// Settings are what may be changed of a key.
type Settings struct {
	Labels     map[string]string // to be set; an empty value removes the label
	MinVersion keyspec.Version   // 0: unchanged
	Keep       uint32            // 0: unchanged
	Uses       int64             // uses that are left from now on; 0: unchanged, NoLimit: without limit
}

// Set changes settings of a key. A smaller Keep schedules the destruction of versions that are too many. More uses than are
// left, or no limit where there is one, takes an administrator.
func (e *Engine) Set(ctx context.Context, c *Caller, name keyspec.Name, s *Settings) (after *keystore.Key, err error) {
	a := &act{op: "key_set", ref: keyspec.Ref{Name: name}}
	if s.Uses != 0 {
		a.info = fmt.Sprintf("uses %d", s.Uses)
	}
	err = e.do(ctx, c, a, func(u *use) error {
		var reserved uint64
		if s.Uses != 0 {
			b := e.counters.block(keyspec.Ref{Name: name})
			b.mu.Lock()
			defer b.mu.Unlock()
			reserved = b.drain()
			defer func() {
				if err != nil && !errors.Is(err, keystore.ErrStorage) { // after that nobody knows what holds
					b.left.Store(reserved)
				}
			}()
		}
		after, err = u.change(name, func(key *keystore.Key) (*keystore.Change, error) {
			if s.MinVersion != 0 {
				if s.MinVersion > current(key, u.now) {
					return nil, fmt.Errorf("%w: minimum version %d is above the current one", ErrInput, s.MinVersion)
				}
				key.MinVersion = s.MinVersion
			}
			if s.Keep != 0 {
				key.Keep = s.Keep
				u.trim(key)
			}
			if s.Uses != 0 {
				if err := u.setUses(key, s.Uses, reserved); err != nil {
					return nil, err
				}
			}
			if key.Labels == nil {
				key.Labels = make(map[string]string)
			}
			maps.Copy(key.Labels, s.Labels)
			maps.DeleteFunc(key.Labels, func(_, v string) bool { return v == "" })
			return &keystore.Change{}, checkLabels(key.Labels)
		})
		return err
	})
	if err != nil {
		return nil, err
	}
	signal(e.wakeScheduler)
	return after, nil
}

// trim schedules the destruction of the oldest versions beyond what the key keeps.
func (u *use) trim(key *keystore.Key) {
	if key.Keep == 0 {
		return
	}
	alive := uint32(0)
	for i := len(key.Versions) - 1; i >= 0; i-- {
		v := &key.Versions[i]
		if v.State == keyspec.Destroyed || !v.DestroyAt.IsZero() {
			continue
		}
		if alive++; alive > key.Keep && v.Number < key.Current {
			v.DestroyAt = u.now.Add(DefaultDestroyDelay).Truncate(time.Second)
		}
	}
}

// Rotate makes a new version the current one and deactivates the one before, in one commit. With notBefore in the future
// the old version stays current until then. Zero expires means the default cryptoperiod. A key that the hierarchy has certified
// gets the certificate of its new version in the same commit, and is rotated at once for the period of its application.
func (e *Engine) Rotate(ctx context.Context, c *Caller, name keyspec.Name, notBefore, expires time.Time, noExpiry bool) (after *keystore.Key, err error) {
	err = e.do(ctx, c, &act{op: "key_rotate", ref: keyspec.Ref{Name: name}}, func(u *use) error {
		key, err := u.metadata(u.store, name, u.now)
		if err != nil {
			return err
		}
		if err := rotatable(key); err != nil {
			return err
		}
		if err := u.tick(u.ctx, u.store, u.now); err != nil {
			return err
		}
		if p := u.certifiedPlace(key); p != nil {
			if !notBefore.IsZero() || !expires.IsZero() || noExpiry {
				return fmt.Errorf("%w: a key of the hierarchy is rotated at once, for the period of its application", ErrInput)
			}
			after, err = u.rotateCertified(p)
			return err
		}
		// A rehearsal on a copy, before a second is spent on a search for primes.
		rehearsal := *key
		rehearsal.Versions = slices.Clone(key.Versions)
		if _, err := u.rotated(&rehearsal, nil, nil, notBefore, expires, noExpiry); err != nil {
			return err
		}
		row, err := mechanism.Lookup(key.Algorithm)
		if err != nil {
			return err
		}
		number := newest(&rehearsal)
		return u.withNew(&rehearsal, number, row, nil, func(b, spki []byte) error {
			return u.withGuard(&rehearsal, "", func(g *keystore.NamespaceGuard) error {
				after, err = u.change(name, func(key *keystore.Key) (*keystore.Change, error) {
					ch, err := u.rotated(key, b, spki, notBefore, expires, noExpiry)
					if err != nil {
						return nil, err
					}
					if key.Protection != keyspec.Software && newest(key) != number {
						return nil, fmt.Errorf("%w: %s was rotated meanwhile", keystore.ErrConflict, name) // what was made is bound to its number
					}
					ch.Guard = g
					return ch, nil
				})
				return err
			})
		})
	})
	if err != nil {
		return nil, err
	}
	signal(e.wakeScheduler)
	return after, nil
}

// rotatable says why a key gets no successor by itself, or nil.
func rotatable(key *keystore.Key) error {
	switch {
	case key.Origin == keyspec.Derived:
		return fmt.Errorf("%w: a derived key is rotated by deriving another", ErrUnsupported)
	case key.Origin == keyspec.Foreign:
		return fmt.Errorf("%w: a key of somebody else is rotated by its owner, who then sends another certificate", ErrUnsupported)
	case key.Profile == mechanism.ProfileMOSIPMachine:
		return &Remedied{fmt.Errorf("%w: the key of a machine is its identity and has no successor", ErrUnsupported),
			"if the machine is to become another one: kmsctl machine release, then register it again"}
	}
	return nil
}

func (u *use) rotated(key *keystore.Key, b, spki []byte, notBefore, expires time.Time, noExpiry bool) (*keystore.Change, error) {
	if err := room(key); err != nil {
		return nil, err
	}
	v, err := u.validity(key.Usages, notBefore, expires, noExpiry)
	if err != nil {
		return nil, err
	}
	last, err := version(key, 0, u.now)
	if err != nil {
		return nil, err
	}
	switch stateAt(key, last, u.now) {
	case keyspec.Suspended:
		return nil, fmt.Errorf("%w: the current version is suspended", ErrState)
	case keyspec.Destroyed:
		return nil, fmt.Errorf("%w: the current version is destroyed", ErrState)
	}
	v.Number = key.Versions[len(key.Versions)-1].Number + 1
	key.Versions = append(key.Versions, v)
	if v.State == keyspec.Active {
		promote(key, v.Number)
	}
	u.trim(key)
	ch := &keystore.Change{Material: map[keyspec.Version][]byte{v.Number: b}}
	u.setPublic(ch, &key.Versions[len(key.Versions)-1], spki)
	return ch, nil
}

// room makes room for one more version: the tombstones that are too many are forgotten, the oldest first.
func room(key *keystore.Key) error {
	surplus := len(key.Versions) + 1 - keyspec.MaxVersions
	key.Versions = slices.DeleteFunc(key.Versions, func(v keystore.Version) bool {
		if surplus > 0 && v.State == keyspec.Destroyed {
			surplus--
			return true
		}
		return false
	})
	if surplus > 0 {
		return fmt.Errorf("%w: the key has %d versions; destroy old ones, or let a number of versions to keep do it", ErrExhausted, keyspec.MaxVersions)
	}
	return nil
}

// promote makes number the current version and deactivates the active ones before it.
func promote(key *keystore.Key, number keyspec.Version) {
	key.Current = number
	for i := range key.Versions {
		v := &key.Versions[i]
		switch {
		case v.Number < number && (v.State == keyspec.Active || v.State == keyspec.PreActive):
			v.State = keyspec.Deactivated
		case v.Number == number && v.State == keyspec.PreActive:
			v.State = keyspec.Active
		}
	}
}

// isGone reports whether err says that a key has vanished, which whoever goes over many keys skips.
func isGone(err error) bool {
	return errors.Is(err, keystore.ErrNotFound) || errors.Is(err, keystore.ErrDamaged)
}
