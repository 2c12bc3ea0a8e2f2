package engine

import (
	"context"
	"time"

	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// The scheduler writes down what time has done: destructions that came due, versions that became current or expired. What
// a key may do never waits for it: stateAt looks at the clock. So it can afford to look slowly at all keys once a day, and
// remembers only when the next thing is due until then.
const (
	schedulePeriod = 24 * time.Hour
	schedulePause  = 20 * time.Millisecond // between pages, to leave the store to others
)

func (e *Engine) runScheduler(ctx context.Context) {
	timer := time.NewTimer(schedulePeriod)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		case <-e.wakeScheduler:
			// A delay keeps a burst of acts from a look at all keys for each of them, and an unlock free for its purpose.
			select {
			case <-ctx.Done():
				return
			case <-time.After(time.Second):
			}
		}
		next, err := e.Settle(ctx)
		if err != nil && ctx.Err() == nil {
			e.log.Warn("due changes of keys were not carried out", "error", err)
			next = e.now().Add(time.Minute)
		}
		timer.Reset(min(max(next.Sub(e.now()), time.Second), schedulePeriod))
	}
}

// Settle carries out what is due now and returns when the next thing will be, at most a day from now.
func (e *Engine) Settle(ctx context.Context) (next time.Time, err error) {
	now := e.now()
	next = now.Add(schedulePeriod)
	s, err := e.opened()
	if err != nil {
		return next, nil // Unlocked signals
	}
	var after []byte
	for {
		keys, following, err := s.Page("", "", after, MaxPage)
		if err != nil {
			return next, err
		}
		for _, key := range keys {
			due := nextChange(key)
			if !due.IsZero() && !now.Before(due) {
				if err := e.settleKey(ctx, key.Name); err != nil && !isGone(err) {
					return next, err
				}
				if key, err = s.Get(key.Name); err != nil {
					continue
				}
				due = nextChange(key)
			}
			if !due.IsZero() && due.Before(next) {
				next = due
			}
		}
		if after = following; after == nil {
			due, err := e.erase(ctx, s)
			if !due.IsZero() && due.Before(next) {
				next = due
			}
			return next, err
		}
		select {
		case <-ctx.Done():
			return next, ctx.Err()
		case <-time.After(schedulePause):
		}
	}
}

// nextChange returns when time next changes a version of key, or the zero time.
func nextChange(key *keystore.Key) (next time.Time) {
	earlier := func(t time.Time) {
		if !t.IsZero() && (next.IsZero() || t.Before(next)) {
			next = t
		}
	}
	for i := range key.Versions {
		v := &key.Versions[i]
		if v.State != keyspec.Destroyed {
			earlier(v.DestroyAt)
		}
		switch v.State {
		case keyspec.PreActive:
			earlier(v.NotBefore)
			earlier(v.Expires)
		case keyspec.Active:
			earlier(v.Expires)
		}
	}
	return next
}

// settleKey writes down what is due for one key.
func (e *Engine) settleKey(ctx context.Context, name keyspec.Name) error {
	caller := &Caller{}
	u := use{Engine: e, ctx: ctx, caller: caller, act: &act{op: "key_settle", ref: keyspec.Ref{Name: name}}, now: e.now()}
	u.decision.Allowed, u.decision.Principal = true, daemonName
	err := u.protect(func() (err error) {
		if u.store, err = e.opened(); err != nil {
			return err
		}
		_, err = u.change(name, u.settle)
		return err
	})
	if err == nil && !u.recorded {
		return nil // somebody else has done it
	}
	return u.record(err)
}

func (u *use) settle(key *keystore.Key) (*keystore.Change, error) {
	if due := nextChange(key); due.IsZero() || u.now.Before(due) {
		return nil, nil
	}
	u.detail = "due"
	ch := &keystore.Change{}
	if number := current(key, u.now); number != key.Current {
		promote(key, number)
	}
	for i := range key.Versions {
		v := &key.Versions[i]
		if v.State == keyspec.Destroyed {
			continue
		}
		switch state := stateAt(key, v, u.now); {
		case state == keyspec.Destroyed:
			destroy(v, ch)
		default:
			v.State = state
		}
	}
	return ch, nil
}
