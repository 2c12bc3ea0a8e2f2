package engine

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/kmsd-project/kmsd/keystore"
)

// Certificates say when they were made, and keys are replaced when their time has come: with a clock that was set back, kmsd would
// issue into a past that has been accounted for, and keys that are over would be in force again. So the keystore keeps the latest time
// that it has seen. Behind it nothing is issued and nothing replaced; keys are used as ever.

// ErrClock says that the clock is behind the latest time that the keystore has seen.
var ErrClock = errors.New("the clock is behind the latest time that the keystore has seen")

const (
	// clockTolerance is how far the clock may be behind: corrections of a clock that ran ahead a little are no reason to stop.
	clockTolerance = 5 * time.Minute
	// clockGrain is the age at which the time that is written down is written again.
	clockGrain  = time.Minute
	clockPeriod = time.Hour // between times that are written down without anything being issued

	kindClock   = "clock"
	clockName   = "latest"
	clockFormat = 1
)

// latest is the latest time seen.
type latest struct {
	mu       sync.Mutex
	store    *keystore.Store // of which the rest is known; nil: none
	written  time.Time
	revision uint64
	seen     time.Time // by this process, not before written
}

// storedClock is the document of the clock.
type storedClock struct {
	Format int       `json:"format"`
	Latest time.Time `json:"latest"` // UTC, whole seconds
}

// load reads the document, unless it is known.
func (l *latest) load(s *keystore.Store) error {
	if l.store == s {
		return nil
	}
	d, err := s.Document(kindClock, clockName)
	var stored storedClock
	if err == nil {
		err = decodeDocument(&d, clockFormat, &stored)
	}
	if err != nil && !errors.Is(err, keystore.ErrNotFound) {
		l.revision = d.Revision // on which ClockAccept bases another document
		return err
	}
	l.store, l.written, l.revision, l.seen = s, stored.Latest, d.Revision, stored.Latest
	return nil
}

// change returns the document for a time.
func (l *latest) change(now time.Time, bump bool) (keystore.DocumentChange, error) {
	return document(kindClock, clockName, l.revision, storedClock{clockFormat, now.UTC().Truncate(time.Second)}, bump)
}

// tick takes note of the time, in the store as well when what is written there is older than clockGrain. It returns ErrClock if the
// clock is behind, and has changed nothing then.
//
// Invariant: nothing is issued or replaced at a time that is not written down within clockGrain before.
func (e *Engine) tick(ctx context.Context, s *keystore.Store, now time.Time) error {
	l := &e.latest
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.load(s); err != nil {
		return err
	}
	if now.Add(clockTolerance).Before(l.seen) {
		return &Remedied{fmt.Errorf("%w: it shows %s, and was %s before", ErrClock, now.UTC().Format(time.RFC3339), l.seen.UTC().Format(time.RFC3339)),
			"set the clock right; if it is right and was wrong before: kmsctl clock accept"}
	}
	if now.After(l.seen) {
		l.seen = now
	}
	if now.Sub(l.written) < clockGrain {
		return nil
	}
	change, err := l.change(now, false)
	if err != nil {
		return err
	}
	return l.put(ctx, keystore.Commit{Documents: []keystore.DocumentChange{change}}, now, s.Apply)
}

// put commits the document.
func (l *latest) put(ctx context.Context, c keystore.Commit, now time.Time, apply func(context.Context, keystore.Commit) error) error {
	if err := apply(ctx, c); err != nil {
		l.store = nil // read it again
		return err
	}
	l.written = now.UTC().Truncate(time.Second)
	if l.revision++; l.revision == 1 {
		l.store = nil // it may have been there before
	}
	return nil
}

// forget has the document read again.
func (l *latest) forget() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.store = nil
}

// ClockAccept makes the time that the clock shows the latest one seen, after the keystore has seen a wrong one.
func (e *Engine) ClockAccept(ctx context.Context, c *Caller) error {
	return e.do(ctx, c, &act{op: "clock_accept", admin: true, sync: true}, func(u *use) error {
		if u.store == nil {
			_, err := u.opened()
			return err
		}
		l := &u.latest
		l.mu.Lock()
		defer l.mu.Unlock()
		if err := l.load(u.store); err != nil && !errors.Is(err, keystore.ErrDamaged) {
			return err
		}
		u.detail = fmt.Sprintf("%s instead of %s", u.now.UTC().Format(time.RFC3339), l.seen.UTC().Format(time.RFC3339))
		change, err := l.change(u.now, true) // an older copy of the store would undo it
		if err != nil {
			return err
		}
		err = l.put(u.ctx, keystore.Commit{Documents: []keystore.DocumentChange{change}}, u.now, func(_ context.Context, c keystore.Commit) error { return u.commit(c) })
		if err == nil {
			l.seen = u.now
		}
		return err
	})
}

// ClockSeen returns the latest time seen, zero when there is none.
func (e *Engine) ClockSeen() time.Time {
	s, err := e.opened()
	if err != nil {
		return time.Time{}
	}
	l := &e.latest
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.load(s) != nil {
		return time.Time{}
	}
	return l.seen
}

// ClockBehind returns the latest time seen if the clock is so far behind it that nothing is issued, else the zero time.
func (e *Engine) ClockBehind() time.Time {
	if seen := e.ClockSeen(); e.now().Add(clockTolerance).Before(seen) {
		return seen
	}
	return time.Time{}
}

// runClock writes the time down every hour.
func (e *Engine) runClock(ctx context.Context) {
	ticker := time.NewTicker(clockPeriod)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		if s, err := e.opened(); err == nil {
			if err := e.tick(ctx, s, e.now()); err != nil && ctx.Err() == nil {
				e.log.Warn("the time was not written down", "error", err)
			}
		}
	}
}
