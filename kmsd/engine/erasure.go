package engine

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"sync"
	"time"

	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/kmsd/audit"
)

// Destroyed versions are unusable at once, but the old pages of the store may still hold what opened them, until a new epoch
// begins. That seals the whole key table again, so it is done for many together: about a day after the first, or when there
// are many. What was left over by an earlier run, and an epoch that was interrupted, comes up within the hour. The times are
// moved by chance, so that the machines of an office do not do it all at once.
const (
	erasePeriod = 24 * time.Hour
	eraseSoon   = time.Hour
	eraseMany   = 1000
)

// erasure remembers when the next one is due.
type erasure struct {
	mu    sync.Mutex
	store *keystore.Store // that it is due in
	due   time.Time       // zero: nothing was pending at the last look
	begun bool            // there was a look before, so that what is pending now is of this run
}

// plan returns when what was destroyed or deleted in s is to be erased, the zero time if there are none.
func (x *erasure) plan(s *keystore.Store, now time.Time) time.Time {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.store != s {
		x.store, x.due, x.begun = s, time.Time{}, false
	}
	info := s.Info()
	switch {
	case info.ErasurePending == 0 && !info.EpochRotating:
		x.due = time.Time{}
	case x.due.IsZero() && (!x.begun || info.EpochRotating):
		x.due = now.Add(chance(eraseSoon))
	case x.due.IsZero():
		x.due = now.Add(erasePeriod - chance(eraseSoon))
	}
	if info.ErasurePending >= eraseMany {
		x.due = now
	}
	x.begun = true
	return x.due
}

// chance returns a random part of d.
func chance(d time.Duration) time.Duration {
	var b [8]byte
	rand.Read(b[:])
	return time.Duration(binary.BigEndian.Uint64(b[:]) % uint64(d))
}

// erase carries out an erasure that is due, and returns when the next one will be.
func (e *Engine) erase(ctx context.Context, s *keystore.Store) (time.Time, error) {
	now := e.now()
	due := e.erasure.plan(s, now)
	if due.IsZero() || now.Before(due) {
		return due, nil
	}
	pending := s.Info().ErasurePending
	if err := e.noteDurable(ctx, "epoch_rotate", "begun", fmt.Sprintf("%d destroyed versions and deleted documents are to be erased", pending)); err != nil {
		return due, err
	}
	code, err := "ok", s.RotateEpoch(ctx, nil)
	if err != nil {
		code = e.code(err)
	}
	if e := e.noteDurable(context.WithoutCancel(ctx), "epoch_rotate", code, ""); err == nil {
		err = e
	}
	return e.erasure.plan(s, now), err
}

// noteDurable records on disk what the daemon does by itself.
func (e *Engine) noteDurable(ctx context.Context, op, code, detail string) error {
	ctx, cancel := context.WithTimeout(ctx, announceTime)
	defer cancel()
	return e.audit.AppendDurable(ctx, &audit.Entry{
		Time: e.now(), Op: op, Principal: daemonName, Allowed: true, Code: code, Detail: detail, PolicyEpoch: e.PolicyEpoch(),
	})
}
