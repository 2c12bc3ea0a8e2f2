package main

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/enclave/keyfile"
	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/keystore"
)

const (
	healEvery = time.Second      // between two attempts that requests cause
	healWait  = 2 * time.Second  // of a request for one
	healTime  = 30 * time.Second // for one, since a TPM may take a second for a command

	watchEvery = time.Second // how often a medium is looked for that must not be pulled
)

// healing lets a keystore that is locked because a device is away be opened by the first request after the device is back.
//
// Invariant: what a person has locked stays locked until a person asks for it to be opened, or kmsd is restarted.
type healing struct {
	mu     sync.Mutex
	next   time.Time // no attempt before
	held   bool      // by a person
	reason error     // why the keystore is locked; nil when that is as it should be
}

// hopeless reports whether a failure to unlock is one of the files, which no device mends.
func hopeless(err error) bool {
	return errors.Is(err, keystore.ErrRollback) || errors.Is(err, keystore.ErrDamaged) || errors.Is(err, keystore.ErrForeign) || errors.Is(err, errOtherStore)
}

// due reports whether an attempt is to be made now, which is then taken.
func (h *healing) due(now time.Time) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.held || now.Before(h.next) || hopeless(h.reason) {
		return false
	}
	h.next = now.Add(healEvery)
	return true
}

// hold keeps the keystore locked.
func (h *healing) hold() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.held, h.reason = true, nil
}

// opened forgets why the keystore was locked.
func (h *healing) opened() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.held, h.reason = false, nil
}

// failed remembers why the keystore is locked. That some slot wants a person tells less than what was wrong before.
func (h *healing) failed(err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.reason == nil || !errors.Is(err, enclave.ErrLocked) {
		h.reason = err
	}
}

// why returns the code and the words for why the keystore is locked.
func (h *healing) why() (code, detail string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.held:
		return "", "locked by an administrator"
	case h.reason == nil:
		return "", ""
	}
	e := wireError(h.reason)
	return string(e.Code), inWords(e)
}

// watchMedium locks the keystore when the medium is pulled whose keyfile has opened it. The next request after it is back opens it again.
func (d *daemon) watchMedium(ctx context.Context) {
	if !d.config.Unlock.LockOnRemoval {
		return
	}
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		slot := d.slots.opened.Load()
		if phase(d.phase.Load()) != phaseReady || slot == nil || slot.Kind != keyfile.Kind {
			continue
		}
		if h := d.look(ctx, *slot); h.State == enclave.Ready || ctx.Err() != nil {
			continue
		}
		d.turn.Lock()
		if phase(d.phase.Load()) == phaseReady && d.slots.opened.Load() == slot {
			d.log.Warn("the medium with the keyfile was pulled: the keystore is locked", "slot", slot.ID)
			d.healing.failed(&enclave.Error{Kind: enclave.ErrAbsent, Detail: "the medium with the keyfile", Remedy: "plug it in again"})
			d.lock()
		}
		d.turn.Unlock()
	}
}

// look asks the device of a slot how it is, for a moment.
func (d *daemon) look(ctx context.Context, slot keystore.Slot) enclave.Health {
	ctx, cancel := context.WithTimeout(ctx, healthTimeout)
	defer cancel()
	return d.slots.health(ctx, slot)
}

// mayHeal reports whether a request that meets a locked keystore is to try the slots first.
func (d *daemon) mayHeal() bool {
	return phase(d.phase.Load()) == phaseLocked && d.store.Load() != nil && d.healing.due(time.Now())
}

// heal tries the slots that need nobody and no PIN. It does not wait for others who are at it, and may be waiting for a person. An attempt that
// takes long goes on without the request that caused it, for the next one.
func (d *daemon) heal(ctx context.Context) {
	if !d.turn.TryLock() {
		return
	}
	over := make(chan struct{})
	d.attempts.Go(func() {
		defer close(over)
		defer d.turn.Unlock()
		limited, cancel := context.WithTimeout(d.life, healTime)
		defer cancel()
		if err := d.unlockUnattended(limited, onUse); err != nil {
			d.log.Debug("the keystore stays locked", "reason", err)
		}
	})
	wait := time.NewTimer(healWait)
	defer wait.Stop()
	select {
	case <-over:
	case <-wait.C:
	case <-ctx.Done():
	}
}

// unlockUnattended opens the keystore by the slots that need nobody. The caller holds turn.
func (d *daemon) unlockUnattended(ctx context.Context, why occasion) error {
	s := d.store.Load()
	if !s.Locked() && phase(d.phase.Load()) == phaseReady {
		return nil
	}
	err := d.slots.unlock(ctx, s, attempt{Why: why})
	if err == nil {
		err = d.unlocked()
	}
	if err != nil {
		d.healing.failed(err)
	}
	return err
}

// handleHealing stands for the operation of a request that has met a locked keystore: it is carried out if the keystore opens now.
func handleHealing(c *call) (proto.Message, error) {
	d := c.daemon
	d.heal(c.ctx)
	op, e := d.find(c.request.Op, c.session.who.Admin)
	if e != nil {
		c.session.refused(c, c.request.Op, e)
		return nil, e
	}
	return op.handle(c)
}
