package keystore

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// Counter is a counter outside of the state directory that survives restarts and never goes back, such as one in the non-volatile
// memory of a TPM. It may start anywhere.
type Counter interface {
	// ReadCounter returns the counter filed under id, or an error when there is none or the device does not answer.
	ReadCounter(ctx context.Context, id [16]byte) (uint64, error)

	// IncrementCounter adds one, making the counter if there is none, and returns the new value. After an error the counter may
	// have been incremented all the same.
	IncrementCounter(ctx context.Context, id [16]byte) (uint64, error)
}

// UnlockOptions say how to go about a store that is bound to a counter. They mean nothing for one that is not.
type UnlockOptions struct {
	Counter Counter // of the device at CounterLocation

	// AcceptRollback opens the store although the counter says that its files are old, or cannot be asked, and binds it to its
	// present state: at once, or as soon as a counter answers. It is for a person who knows why, and for the audit log.
	AcceptRollback bool

	// Check has the secret checked, and never opens a store: one that is locked, or was locked meanwhile, is ErrLocked.
	Check bool
}

// counterTimeout bounds one command to the counter. Whoever asked for it may leave earlier; the command is then still waited for,
// because only its answer tells what the counter shows.
const counterTimeout = 10 * time.Second

// coverTime is how long a change that is made already waits for the counter to follow. The counter of a TPM takes a part of a second;
// one that hangs must not hold up whoever suspends a key.
const coverTime = 2 * time.Second

// binding is what the header says about the counter.
//
// Invariant: the counter shows count, or count-1 while it is being advanced: the header is on the disk before the counter is
// incremented. So of all copies of the files only the newest opens, and one that was interrupted there.
type binding struct {
	id       [16]byte
	location string // of the device, for who opens the store
	count    uint64
}

func (b *binding) encode(e *encoder) {
	e.flag(b != nil)
	if b != nil {
		e.raw(b.id[:])
		e.str16(b.location)
		e.u64(b.count)
	}
}

func decodeBinding(d *decoder) *binding {
	if !d.flag() {
		return nil
	}
	b := &binding{}
	d.fixed(b.id[:])
	if b.location = d.str16(); len(b.location) > keyspec.MaxLocation {
		d.fail(errors.New("has too long a location"))
	}
	b.count = d.u64()
	return b
}

// rollback is what a Store knows of its counter. The counter is slow, so neither s.mu nor the writer goroutine ever waits for it.
type rollback struct {
	turn   chan struct{} // capacity 1, full while someone talks to the counter or unlocks
	wanted atomic.Uint64 // number of changes so far that void what was before
	tried  atomic.Uint64 // the changes up to this one were covered, or status says why not
	status atomic.Pointer[counterStatus]

	// What follows belongs to who has the turn.
	device   Counter
	accepted bool // whatever the counter shows, the present state is the right one
	known    bool // the counter was read in this turn, and shows what the header says
}

// counterStatus is the outcome of the last advance.
type counterStatus struct{ err error }

// take waits for the turn.
func (r *rollback) take(ctx context.Context) error {
	select {
	case r.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (r *rollback) release() { <-r.turn }

func (r *rollback) lastError() error {
	if status := r.status.Load(); status != nil {
		return status.err
	}
	return nil
}

// CounterLocation is the location of the device whose counter tells when the store is an old copy, empty if it is bound to none.
// While the store is locked it is what the header claims.
func (s *Store) CounterLocation() string {
	if b := s.header.Load().counter; b != nil {
		return b.location
	}
	return ""
}

// BindCounter binds the store to a counter, in the place of any other: from then on a copy of its files from an earlier time does not
// open. Copies from before it was bound are not covered.
func (s *Store) BindCounter(ctx context.Context, location string, c Counter) error {
	if location == "" || len(location) > keyspec.MaxLocation {
		return fmt.Errorf("%w: location of a counter", ErrInvalid)
	}
	if err := s.rollback.take(ctx); err != nil {
		return err
	}
	defer s.rollback.release()
	b := &binding{location: location}
	// The same id for the same store, so that one that was made just before a crash is found again.
	instance := s.header.Load().instanceID
	if err := s.DeriveSecret("kmsd counter v1"+string(instance[:]), b.id[:]); err != nil {
		return err
	}
	count, err := readCounter(ctx, c, b.id)
	if err != nil {
		count, err = incrementCounter(ctx, c, b.id)
	}
	if err != nil {
		return fmt.Errorf("%w: %s: %w", ErrCounterAbsent, location, err)
	}
	b.count = count
	if err := s.setBinding(ctx, b); err != nil {
		return err
	}
	s.rollback.device, s.rollback.known, s.rollback.accepted = c, false, false
	s.rollback.status.Store(nil)
	return nil
}

// UnbindCounter ends the binding: old copies of the files are not noticed any more.
func (s *Store) UnbindCounter(ctx context.Context) error {
	if err := s.rollback.take(ctx); err != nil {
		return err
	}
	defer s.rollback.release()
	if s.header.Load().counter == nil {
		return nil
	}
	s.rollback.device = nil
	s.rollback.status.Store(nil)
	return s.setBinding(ctx, nil)
}

func (s *Store) setBinding(ctx context.Context, b *binding) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return s.submit(&job{run: func() error {
		return s.changeHeader(func(h *header, _ *secrets) error {
			h.counter = b
			return nil
		})
	}})
}

// BumpGeneration makes every copy of the files that was taken before it one that is refused, by advancing the counter that the store
// is bound to; without one it does nothing. Callers at the same time share one step. The store does it itself when it is unlocked and
// when slots, root key or epoch change, a version is destroyed, suspended or revoked; it is for changes that are not in the store but
// must not be undone with it, such as a new policy.
//
// It returns ErrCounterAbsent when the counter does not answer and ErrRollback when it shows that another copy of the store is in use;
// the next call tries again. When ctx is done it returns, and the step goes on.
func (s *Store) BumpGeneration(ctx context.Context) error {
	r := &s.rollback
	if s.header.Load().counter == nil {
		return nil
	}
	want := r.wanted.Add(1)
	if err := r.take(ctx); err != nil {
		return err
	}
	if r.tried.Load() >= want {
		defer r.release()
		return r.lastError()
	}
	done := make(chan error, 1)
	go func() {
		defer r.release()
		done <- s.advance(context.WithoutCancel(ctx))
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// cover is BumpGeneration for a change that is made already: if the counter cannot follow, or takes longer than coverTime, that is not
// the caller's failure. Info shows it.
func (s *Store) cover(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), coverTime)
	defer cancel()
	if err := s.BumpGeneration(ctx); err != nil {
		s.config.log().Warn("the rollback counter does not cover the last change", "error", err)
	}
}

// advance covers every change that was wanted before it. The caller has the turn.
func (s *Store) advance(ctx context.Context) error {
	r := &s.rollback
	upTo := r.wanted.Load()
	err := s.step(ctx)
	r.tried.Store(upTo)
	r.status.Store(&counterStatus{err})
	return err
}

// step has the header say the next number, and then the counter follow.
func (s *Store) step(ctx context.Context) error {
	r := &s.rollback
	b := s.header.Load().counter
	if b == nil {
		return nil
	}
	if r.device == nil {
		return fmt.Errorf("%w: %s", ErrCounterAbsent, b.location)
	}
	count := b.count
	if !r.known { // an old copy that is in use must not move the counter of the right one
		var err error
		if count, err = b.settle(ctx, r.device, r.accepted); err != nil {
			return err
		}
	}
	r.known = false
	if err := s.setCount(count + 1); err != nil {
		return err
	}
	now, err := incrementCounter(ctx, r.device, b.id)
	if err != nil {
		return fmt.Errorf("%w: %s: %w", ErrCounterAbsent, b.location, err)
	}
	if now != count+1 {
		return b.mismatch(now)
	}
	r.accepted = false
	return nil
}

// settle reads the counter and compares it with the header, finishes an increment that was interrupted, and returns what the counter
// shows. If accepted is true, anything goes, and a counter that is not there is made.
func (b *binding) settle(ctx context.Context, c Counter, accepted bool) (uint64, error) {
	now, err := readCounter(ctx, c, b.id)
	if err == nil && now != b.count && now+1 == b.count {
		now, err = incrementCounter(ctx, c, b.id)
	}
	if err != nil && accepted {
		now, err = incrementCounter(ctx, c, b.id)
	}
	switch {
	case err != nil:
		return 0, fmt.Errorf("%w: %s: %w", ErrCounterAbsent, b.location, err)
	case now != b.count && !accepted:
		return 0, b.mismatch(now)
	}
	return now, nil
}

func (b *binding) mismatch(now uint64) error {
	if now > b.count {
		return fmt.Errorf("%w: the counter of %s shows %d, the store is of %d", ErrRollback, b.location, now, b.count)
	}
	return fmt.Errorf("%w: the counter of %s shows only %d, the store is of %d: it is not the counter the store was bound to", ErrRollback, b.location, now, b.count)
}

// setCount has the header on disk say what the counter will show next.
func (s *Store) setCount(count uint64) error {
	return s.exclusively(func() error {
		if s.broken != nil {
			return s.broken
		}
		h := s.header.Load().clone()
		if h.counter == nil {
			return fmt.Errorf("%w: the binding to the counter was ended", ErrInvalid)
		}
		b := *h.counter
		b.count = count
		h.counter = &b
		return s.replaceHeader(h)
	})
}

// checkCounter compares the counter with a header that was just verified. The caller has the turn.
func (s *Store) checkCounter(ctx context.Context, h *header, o UnlockOptions) error {
	r := &s.rollback
	r.device, r.accepted, r.known = o.Counter, o.AcceptRollback, false
	r.status.Store(nil)
	if h.counter == nil || o.AcceptRollback {
		return nil
	}
	if o.Counter == nil {
		return fmt.Errorf("%w: %s", ErrCounterAbsent, h.counter.location)
	}
	_, err := h.counter.settle(ctx, o.Counter, false)
	r.known = err == nil
	return err
}

func readCounter(ctx context.Context, c Counter, id [16]byte) (uint64, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), counterTimeout)
	defer cancel()
	return c.ReadCounter(ctx, id)
}

func incrementCounter(ctx context.Context, c Counter, id [16]byte) (uint64, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), counterTimeout)
	defer cancel()
	return c.IncrementCounter(ctx, id)
}

// describe fills in what Info says about rollback.
func (r *rollback) describe(b *binding, info *Info) {
	if b == nil {
		info.Rollback = "not detectable"
		return
	}
	info.Counter = b.location
	info.Rollback = "detected by the counter of " + b.location
	err := r.lastError()
	if err == nil && r.tried.Load() < r.wanted.Load() {
		err = fmt.Errorf("%w: it has yet to answer", ErrCounterAbsent)
	}
	if err != nil {
		info.Rollback = "not covered by the counter of " + b.location
		info.Warnings = append(info.Warnings, "an older copy of the store may not be noticed: "+err.Error())
	}
}
