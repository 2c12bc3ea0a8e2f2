package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/enclave/keyring"
	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/secmem"
)

// parseCache reads unlock.cache of the configuration; empty means that nothing is kept.
func parseCache(text string) (time.Duration, error) {
	if text == "" {
		return 0, nil
	}
	d, err := time.ParseDuration(text)
	if err != nil || d < time.Second || d > keyring.MaxCache {
		return 0, fmt.Errorf("%w: unlock.cache %q is not a time from %v to %v, such as 8h", errConfig, text, time.Second, time.Duration(keyring.MaxCache))
	}
	return d, nil
}

// keep puts the secret of a slot that a person has opened into the kernel's keyring.
func (k *slotKeeper) keep(slot keystore.Slot, secret []byte) {
	if k.cache == nil || needOf(slot) == needsNobody {
		return
	}
	if err := k.cache.Put(slot.UUID, secret); err != nil {
		k.log.Warn("the kernel does not keep an opened slot: the next start needs a person again", "slot", slot.ID, "error", err)
	}
}

// drop takes the secrets of slots out of the kernel's keyring.
func (k *slotKeeper) drop(slots ...keystore.Slot) {
	if k.cache == nil {
		return
	}
	for _, slot := range slots {
		if err := k.cache.Remove(slot.UUID); err != nil && !errors.Is(err, keyring.ErrNoItem) {
			k.log.Warn("the kernel still keeps an opened slot", "slot", slot.ID, "error", err)
		}
	}
}

// unlockKept opens the store by what the kernel keeps, and reports whether that worked. Nobody is there to decide about an old copy, so what the
// counter says counts.
func (k *slotKeeper) unlockKept(ctx context.Context, s *keystore.Store) bool {
	if k.cache == nil {
		return false
	}
	for _, slot := range s.Slots() {
		if needOf(slot) == needsNobody {
			continue
		}
		secret, err := k.arena.Alloc(enclave.SecretSize)
		if err != nil {
			return false
		}
		secmem.Do(func() { err = k.cache.Get(slot.UUID, secret.Bytes()) })
		if err == nil {
			err = s.UnlockWith(ctx, slot.ID, secret.Bytes(), keystore.UnlockOptions{Counter: k.counter(s)})
			if errors.Is(err, keystore.ErrSecret) || errors.Is(err, keystore.ErrForeign) {
				k.drop(slot)
			}
		}
		secret.Free()
		if err == nil {
			k.log.Info("opened by what a person has opened before the restart", "slot", slot.ID)
			k.opened.Store(&slot)
			return true
		}
		if !errors.Is(err, keyring.ErrNoItem) {
			k.log.Warn("what the kernel keeps does not open the keystore", "slot", slot.ID, "error", err)
		}
	}
	return false
}
