package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/enclave/keyring"
	"github.com/kmsd-project/kmsd/enclave/recovery"
	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/secmem"
)

// occasion is why the store is to be opened without a secret.
type occasion int

const (
	atStart  occasion = iota // of kmsd
	onDemand                 // somebody has asked for it; of one slot, a PIN of a file that was refused before is tried again
	onUse                    // an application wants to use a key: no PIN is tried
)

// attempt is one attempt to open the store.
type attempt struct {
	Slot           uint32       // 0: the one that the secret is for; without a secret, those that need nobody
	Auth           enclave.Auth // what somebody has brought
	Why            occasion
	AcceptRollback bool // somebody has decided that the state of the files counts, whatever the counter of the device says
	Check          bool // the store is open: try the slot, and open nothing if somebody locks the store meanwhile
}

// unlock opens the store.
func (k *slotKeeper) unlock(ctx context.Context, s *keystore.Store, a attempt) error {
	secret := len(a.Auth.Secret) > 0 || len(a.Auth.Shares) > 0
	if a.Slot == 0 && !secret {
		return k.unlockUnattended(ctx, s, a)
	}
	slot, err := findSlot(s, a.Slot, a.Auth)
	if err != nil {
		return err
	}
	if !secret && k.pins.has(slot.Kind) {
		return k.unlockByItself(ctx, s, slot, a)
	}
	return k.unlockSlot(ctx, s, slot, a)
}

// unlockUnattended opens the store by those of its slots that need nobody. ErrLocked says that there is none.
func (k *slotKeeper) unlockUnattended(ctx context.Context, s *keystore.Store, a attempt) error {
	err := k.unlockCandidates(ctx, s, a)
	if err != nil && !final(err) && a.Why == atStart && k.unlockKept(ctx, s) {
		return nil
	}
	return err
}

func (k *slotKeeper) unlockCandidates(ctx context.Context, s *keystore.Store, a attempt) error {
	candidates := k.candidates(s.Slots())
	if k.attend && a.Why != onDemand {
		candidates = nil
	}
	if len(candidates) == 0 {
		return &enclave.Error{Kind: enclave.ErrLocked, Detail: "every slot of the keystore", Remedy: "kmsctl unlock"}
	}
	var first error
	var refused []string // locations of devices that refused the PIN: it is not tried with another slot of theirs
	for _, slot := range candidates {
		if needOf(slot) == needsPIN && slices.ContainsFunc(refused, func(r string) bool { return k.devices.same(r, slot.Location) }) {
			continue
		}
		err := k.unlockByItself(ctx, s, slot, a)
		if err == nil {
			return nil
		}
		if errors.Is(err, enclave.ErrAuth) {
			refused = append(refused, slot.Location)
		}
		if first == nil {
			first = err
		}
		if final(err) {
			break
		}
	}
	return first
}

// final reports whether a failure to unlock is one of the store, which no other slot would open either.
func final(err error) bool {
	return hopeless(err) || errors.Is(err, keystore.ErrCounterAbsent) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
}

// candidates returns the slots that may open the store without a person, in the order in which they are tried: those that the
// configuration names, or the strongest. A slot whose device is broken or not known is a candidate too, and hides the weaker ones.
func (k *slotKeeper) candidates(slots []keystore.Slot) []keystore.Slot {
	slots = slices.DeleteFunc(slots, func(slot keystore.Slot) bool {
		n := needOf(slot)
		return n == needsKey || n == needsPIN && !k.pins.has(slot.Kind)
	})
	if k.order != nil {
		var chosen []keystore.Slot
		for _, name := range k.order {
			for _, slot := range slots {
				if (name == slot.Kind || name == strconv.Itoa(int(slot.ID))) && !slices.ContainsFunc(chosen, func(c keystore.Slot) bool { return c.ID == slot.ID }) {
					chosen = append(chosen, slot)
				}
			}
		}
		return chosen
	}
	slices.SortStableFunc(slots, func(a, b keystore.Slot) int { return strength(a.Kind) - strength(b.Kind) })
	for i, slot := range slots {
		if strength(slot.Kind) != strength(slots[0].Kind) {
			return slots[:i]
		}
	}
	return slots
}

// unlockByItself opens the store by one slot, with the PIN of the configuration where it wants one.
func (k *slotKeeper) unlockByItself(ctx context.Context, s *keystore.Store, slot keystore.Slot, a attempt) error {
	// A keyring that is locked would ask somebody for its password.
	if a.Why == onUse && (needOf(slot) == needsPIN || k.health(ctx, slot).State == enclave.Locked) {
		return &enclave.Error{Kind: enclave.ErrLocked, Detail: fmt.Sprintf("slot %d (%s)", slot.ID, slot.Kind), Remedy: "kmsctl unlock"}
	}
	if needOf(slot) != needsPIN {
		return k.unlockSlot(ctx, s, slot, a)
	}
	pin, stamp, err := k.pins.take(slot.Kind, slot.Location, a.Why == onDemand && a.Slot != 0) // when somebody means this very slot
	if err != nil {
		return fmt.Errorf("slot %d (%s): %w", slot.ID, slot.Kind, err)
	}
	defer clear(pin)
	a.Auth.Secret = pin
	err = k.unlockSlot(ctx, s, slot, a)
	k.pins.outcome(slot.Location, stamp, err)
	return err
}

// findSlot returns the slot with the id or, when that is 0, the one that the secret is for: that of the recovery key or of the shares, or
// the only one with a PIN. A PIN is never tried on several devices.
func findSlot(s *keystore.Store, id uint32, a enclave.Auth) (keystore.Slot, error) {
	if id != 0 {
		return slotByID(s, id)
	}
	slots := s.Slots()
	owner, err := ownerOf(a)
	if err != nil {
		withPIN := slices.DeleteFunc(slices.Clone(slots), func(slot keystore.Slot) bool { return needOf(slot) != needsPIN })
		switch {
		case len(withPIN) == 0 || len(a.Shares) > 0 || likeRecoveryText(a.Secret):
			return keystore.Slot{}, &enclave.Error{Kind: enclave.ErrAuth, Cause: err, Remedy: "compare what you typed with the printed key, group by group"}
		case len(withPIN) > 1:
			return keystore.Slot{}, hinted{fmt.Errorf("%w: several slots have a PIN", errSpec), "say which one with --slot: kmsctl slot list"}
		}
		return withPIN[0], nil
	}
	for _, slot := range slots {
		if slot.Kind == recovery.Kind {
			if have, _, err := recovery.Owner(slot.Blob); err == nil && have == owner {
				return slot, nil
			}
		}
	}
	return keystore.Slot{}, &enclave.Error{Kind: enclave.ErrAuth, Detail: fmt.Sprintf("no slot of this keystore belongs to recovery key %s", owner),
		Remedy: "look for the key with the number that status shows, or that of the right machine"}
}

// likeRecoveryText reports whether somebody has meant to type a recovery key or a share, so that a typing error in it does not cost one of the
// few attempts that a device allows for its PIN.
func likeRecoveryText(secret []byte) bool {
	return len(secret) > 40 && bytes.Count(secret, []byte("-")) >= 5
}

// ownerOf returns the number of the recovery key that somebody typed, or typed shares of.
func ownerOf(a enclave.Auth) (string, error) {
	if len(a.Shares) > 0 {
		share, err := recovery.ParseShare(a.Shares[0])
		if err != nil {
			return "", err
		}
		defer share.Wipe()
		return share.ID(), nil
	}
	key, err := recovery.ParseKey(a.Secret)
	if err != nil {
		return "", err
	}
	defer key.Wipe()
	return key.ID(), nil
}

// unlockSlot opens the store by this slot and no other.
func (k *slotKeeper) unlockSlot(ctx context.Context, s *keystore.Store, slot keystore.Slot, a attempt) error {
	secret, err := k.open(ctx, slot, a.Auth)
	if err != nil {
		return err
	}
	defer secret.Free()
	locked := s.Locked()
	// Not even a recovery key decides by itself that the files are the newest when the counter cannot be asked: who has put an old copy there
	// could keep the TPM busy, and let somebody who knows nothing of it bring the key.
	err = s.UnlockWith(ctx, slot.ID, secret.Bytes(), keystore.UnlockOptions{Counter: k.counter(s), AcceptRollback: a.AcceptRollback, Check: a.Check})
	if err != nil {
		err = fmt.Errorf("slot %d: %w", slot.ID, err)
	}
	if errors.Is(err, keystore.ErrCounterAbsent) {
		err = hinted{err, "if that device is lost for good, and you are sure of these files: kmsctl unlock --accept-rollback"}
	}
	if err != nil {
		return err
	}
	k.remember(slot.UUID)
	if locked && !a.Check {
		k.keep(slot, secret.Bytes())
		k.opened.Store(&slot)
	}
	return nil
}

// open has the device of a slot give the slot's secret back. The caller frees it.
func (k *slotKeeper) open(ctx context.Context, slot keystore.Slot, a enclave.Auth) (*secmem.Buffer, error) {
	e, err := k.guard(slot)
	if err != nil {
		return nil, fmt.Errorf("slot %d: %w", slot.ID, err)
	}
	secret, err := k.arena.Alloc(enclave.SecretSize)
	if err != nil {
		return nil, err
	}
	ctx, cancel := withPrompt(ctx, slot.Kind)
	defer cancel()
	secmem.Do(func() { err = e.Unwrap(ctx, slot.Blob, enclave.SlotAAD(slot.UUID), a, secret.Bytes()) })
	k.outcome(slot.UUID, err)
	if err != nil {
		secret.Free()
		return nil, fmt.Errorf("slot %d (%s): %w", slot.ID, slot.Kind, err)
	}
	return secret, nil
}

// promptTime is how long somebody may take to answer the prompt of a keyring, and a little more.
const promptTime = 65 * time.Second

// withPrompt gives a person time where the device asks for one.
func withPrompt(ctx context.Context, kind string) (context.Context, context.CancelFunc) {
	if _, limited := ctx.Deadline(); limited || kind != keyring.SecretServiceKind {
		return ctx, func() {}
	}
	return context.WithTimeout(ctx, promptTime)
}
