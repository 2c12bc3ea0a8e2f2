package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/mechanism"
	"github.com/kmsd-project/kmsd/policy"
)

// A key may be limited to a number of uses, all versions together. A use is an operation with the private half or the
// secret, whatever comes of it, since a refused ciphertext tells something too; verifying with and encrypting to the public
// half are none, and neither is a request that was refused before the key was touched. Rotation gives no new uses.
//
// Uses are reserved in the store before they are made, in blocks of a sixteenth of what is left. So a use costs no fsync of
// its own until few are left, the last sixteen are counted one by one, and a crash loses a block at most. An orderly end
// gives the rest of a block back.
//
// Invariant: what the store says is left was not used yet. A crash never gives a use back.
const (
	MaxUses  = 1 << 48 // the largest limit
	NoLimit  = -1      // of Settings.Uses: the limit is removed
	useShare = 16      // a block is this part of what is left
)

// spends reports whether a usage takes the private half of a key, or a secret.
func spends(a keyspec.Algorithm, usage keyspec.Usage) bool {
	return !a.Asymmetric() || usage != keyspec.Verify && usage != keyspec.Encrypt
}

// spend counts one use of the key in use, if that is limited, or returns an error that wraps ErrExhausted.
func (u *use) spend() error {
	if !u.key.Limited || !spends(u.key.Algorithm, u.act.usage) {
		return nil
	}
	b := u.counters.block(keyspec.Ref{Name: u.key.Name})
	drains := b.drains.Load()
	err := u.take(b, func(key *keystore.Key, _ *keystore.Version) (uint64, error) {
		if !key.Limited { // the limit was removed meanwhile
			return 1, nil
		}
		if key.UsesLeft == 0 {
			return 0, fmt.Errorf("%w: no use is left of those it was given", ErrExhausted)
		}
		n := min(max(key.UsesLeft/useShare, 1), invocationBlock)
		key.UsesLeft -= n
		return n, nil
	})
	if err != nil {
		return err
	}
	u.spent, u.drains = b, drains
	return nil
}

// untouched are the refusals that come before the key is touched.
var untouched = []error{
	ErrInput, ErrUnsupported, ErrState, ErrUsage, ErrExpired, ErrExhausted, keystore.ErrExists, mechanism.ErrInput, mechanism.ErrUnsupported, mechanism.ErrSelfTest,
}

// counts reports whether a use that ended with err counts: the key was touched, or may have been, and that told the caller
// something.
func counts(err error) bool {
	var device *enclave.Error
	if errors.As(err, &device) {
		return errors.Is(err, enclave.ErrDecryption) // from other failures of a device nobody learns anything
	}
	return !slices.ContainsFunc(untouched, func(e error) bool { return errors.Is(err, e) })
}

// unspend gives the use back if err says that it was not made.
func (u *use) unspend(err error) {
	if u.spent == nil || counts(err) {
		return
	}
	u.spent.mu.Lock()
	defer u.spent.mu.Unlock()
	if u.spent.drains.Load() == u.drains { // else it would come on top of what was given back or set anew
		u.spent.left.Add(1)
	}
}

// setUses does what Settings.Uses asks for, given what was left of a block of the key.
func (u *use) setUses(key *keystore.Key, uses int64, reserved uint64) error {
	if uses < NoLimit || uses > MaxUses {
		return fmt.Errorf("%w: a key is limited to 1 to %d uses", ErrInput, uint64(MaxUses))
	}
	if uses > 0 && key.Exportable {
		return errExportable
	}
	if key.Limited && (uses == NoLimit || uint64(uses) > key.UsesLeft+reserved) && !u.administers() {
		return fmt.Errorf("%w: more uses than are left; an administrator can allow them on the admin socket", ErrUnsupported)
	}
	key.Limited, key.UsesLeft = uses > 0, uint64(max(uses, 0))
	return nil
}

// errExportable refuses a limit that a copy of the key would not know of.
var errExportable = fmt.Errorf("%w: uses of a key that is exportable cannot be limited", ErrInput)

// administers asks the policy whether the caller administers the key, which is more than a grant to use it.
func (u *use) administers() bool {
	r := policy.Request{Caller: u.caller.facts(), Operation: u.act.op, Name: u.act.ref.Name, Administration: true}
	return policy.Decide(u.policy.Load(), &r).Allowed
}

// usesBatch is how many keys one commit gives their uses back.
const usesBatch = 256

// returnUses gives back to the store what is left of reserved uses. What cannot be given back is lost.
func (e *Engine) returnUses(ctx context.Context) {
	s, err := e.opened()
	if err != nil {
		return
	}
	left := e.counters.drainUses()
	for len(left) > 0 {
		batch := left[:min(usesBatch, len(left))]
		left = left[len(batch):]
		if e.giveBack(ctx, s, batch) == nil {
			continue
		}
		for i := range batch { // one of them fails, or was changed meanwhile
			unlock := e.writers.lock(batch[i].name)
			err := e.giveBack(ctx, s, batch[i:i+1])
			unlock()
			if err != nil && !isGone(err) {
				e.log.Warn("reserved uses of a key are lost", "uses", batch[i].n, "error", err)
			}
		}
	}
}

// unused are uses of a key that were reserved and not made.
type unused struct {
	name keyspec.Name
	n    uint64
}

// drainUses empties the blocks of uses and returns what was left in them.
func (c *counters) drainUses() (left []unused) {
	blocks := make(map[keyspec.Name]*blockOf)
	c.mu.Lock()
	for ref, b := range c.blocks {
		if ref.Version == 0 {
			blocks[ref.Name] = b
		}
	}
	c.mu.Unlock()
	for name, b := range blocks {
		b.mu.Lock()
		if n := b.drain(); n > 0 {
			left = append(left, unused{name, n})
		}
		b.mu.Unlock()
	}
	return left
}

func (e *Engine) giveBack(ctx context.Context, s *keystore.Store, batch []unused) error {
	var changes []keystore.Change
	for _, b := range batch {
		key, err := s.Get(b.name)
		if err != nil {
			return err
		}
		if key.Limited {
			key.UsesLeft += b.n
			changes = append(changes, keystore.Change{Key: key})
		}
	}
	if len(changes) == 0 {
		return nil
	}
	err := s.Apply(ctx, keystore.Commit{Changes: changes})
	e.changed(changes)
	return err
}
