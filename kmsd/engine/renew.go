package engine

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// Once a hierarchy is set up it keeps itself up: keys are rotated before they expire, certificates that were cut short by their issuer
// are issued anew when that was replaced, revocation lists are signed again before their next update. What takes a person is announced.
//
// Invariant: what kmsd does by itself it does as anybody would who asks for it: in the turn of the key, behind the same clock, in one
// commit with the record of the act, whose principal is kmsd.

// Renewal says how keys are renewed.
type Renewal struct {
	Off bool // keys are replaced only when somebody asks for it; revocation lists are kept up nevertheless
	// Jitter is the time over which the keys are spread that are due at one moment; each is due always at the same time within it, and
	// never later than half of the time that it has left. 0: DefaultJitter; negative: none.
	Jitter time.Duration
}

// DefaultJitter is the Jitter that is used when none is set.
const DefaultJitter = 24 * time.Hour

const (
	renewPeriod  = time.Hour // between looks at all keys
	renewDelay   = time.Second
	maxRenewals  = 256             // keys that one pass renews
	firstRetry   = time.Minute     // after a failure; it doubles with each one
	lastRetry    = time.Hour       // and stays at that
	repeatAlert  = 24 * time.Hour  // of a failure that goes on
	clockRetry   = time.Minute     // while the clock is behind
	maxYield     = 5 * time.Second // that a renewal waits while others make keys
	yieldPause   = 20 * time.Millisecond
	maxPause     = time.Second // after a renewal, at most as long as it took
	giveUpIssuer = 3           // keys in a row that one issuer could not renew, after which the others wait
)

// renewals is what the renewer remembers.
type renewals struct {
	off    bool
	jitter time.Duration

	pass sync.Mutex // one pass at a time

	mu     sync.Mutex
	failed map[string]*failure // by the name of a key, or what else is kept up
	behind bool                // the clock is, and that was told
}

// failure is something that could not be renewed.
type failure struct {
	count int
	next  time.Time // of the next try
	told  time.Time
	text  string
}

func (r *renewals) set(c Renewal) {
	r.off, r.jitter = c.Off, c.Jitter
	switch {
	case r.jitter == 0:
		r.jitter = DefaultJitter
	case r.jitter < 0:
		r.jitter = 0
	}
}

// waiting returns when something that failed is tried again, and what the failure was; zero when it has not failed.
func (r *renewals) waiting(what string) (time.Time, string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if f := r.failed[what]; f != nil {
		return f.next, f.text
	}
	return time.Time{}, ""
}

// fail notes a failure and reports whether it is to be told.
func (r *renewals) fail(what, text string, now time.Time) (tell bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.failed == nil {
		r.failed = make(map[string]*failure)
	}
	f := r.failed[what]
	if f == nil {
		f = &failure{}
		r.failed[what] = f
	}
	wait := lastRetry
	if f.count < 16 {
		wait = min(firstRetry<<f.count, lastRetry)
	}
	f.count++
	f.next, f.text = now.Add(wait), shortened(text)
	if tell = f.told.IsZero() || now.Sub(f.told).Abs() >= repeatAlert; tell {
		f.told = now
	}
	return tell
}

// forget forgets all failures: it is another day.
func (r *renewals) forget() {
	r.mu.Lock()
	defer r.mu.Unlock()
	clear(r.failed)
}

// succeeded forgets a failure.
func (r *renewals) succeeded(what string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.failed, what)
}

func (e *Engine) runRenewer(ctx context.Context) {
	timer := time.NewTimer(renewPeriod)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		case <-e.wakeRenewer:
			if pause(ctx, renewDelay) != nil { // a burst of changes is looked at once
				return
			}
		}
		next, err := e.Renew(ctx)
		if err != nil && ctx.Err() == nil {
			e.log.Warn("keys were not looked at for renewal", "error", err)
			next = e.now().Add(firstRetry)
		}
		timer.Reset(min(max(next.Sub(e.now()), renewDelay), renewPeriod))
	}
}

// pause waits, or returns the error of ctx.
func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}

// Renew looks at all keys, renews what is due, at most some hundred, and returns when it is to be called again, at most an hour from now.
// Keys are made one at a time, with pauses as long as the making, and after those that somebody waits for.
func (e *Engine) Renew(ctx context.Context) (next time.Time, err error) {
	e.renewals.pass.Lock()
	defer e.renewals.pass.Unlock()
	now := e.now()
	next = now.Add(renewPeriod)
	s, err := e.opened()
	if err != nil {
		return next, nil // Unlocked signals
	}
	if ok, err := e.clockRuns(ctx, s, now); err != nil || !ok {
		return now.Add(clockRetry), err
	}
	r := &round{next: next}
	y := newSurvey(e.itself(ctx, "", keyspec.Ref{}))
	y.store = s
	err = errors.Join(y.keys(r), e.renewAll(ctx, r), e.publishAll(ctx, r), y.giveNotice(r))
	switch {
	case err == nil:
		e.renewals.succeeded(everything)
	case ctx.Err() != nil:
		return r.next, ctx.Err()
	case s.Locked():
		return next, nil
	default:
		e.troubled(everything, keyspec.Ref{}, "a part of the keys was not looked at for renewal: "+err.Error(), r)
	}
	return r.next, nil
}

// everything is what has failed when a pass was not completed.
const everything = "everything"

// clockRuns reports whether the clock is right, as far as can be told, and says so once when it is not.
func (e *Engine) clockRuns(ctx context.Context, s *keystore.Store, now time.Time) (bool, error) {
	err := e.tick(ctx, s, now)
	if err != nil && !errors.Is(err, ErrClock) {
		return false, err
	}
	r := &e.renewals
	r.mu.Lock()
	before := r.behind
	r.behind = err != nil
	r.mu.Unlock()
	switch {
	case err != nil && !before:
		e.log.Error("nothing is renewed", "error", err)
		e.happened(EventClock, keyspec.Ref{}, err.Error())
		return false, e.note("key_renew", "nothing is renewed: "+err.Error())
	case err == nil && before:
		e.happened(EventClock, keyspec.Ref{}, "the clock is not behind any more")
	}
	return err == nil, nil
}

// round is one pass of the renewer.
type round struct {
	due     []dueKey
	issuers []keyspec.Ref // that publish lists
	notices []notice
	next    time.Time
}

// dueKey is a key that is to be renewed.
type dueKey struct {
	name   keyspec.Name
	issuer keyspec.Name
	rank   rank
	at     time.Time
}

func (r *round) before(t time.Time) {
	if t.Before(r.next) {
		r.next = t
	}
}

// keys goes over all keys.
func (y *survey) keys(r *round) error {
	lists, failure := y.issuing()
	for after := []byte(nil); ; {
		keys, following, err := y.store.Page("", "", after, MaxPage)
		if err != nil {
			return errors.Join(failure, err)
		}
		for _, key := range keys {
			x, err := y.prospect(key.Name)
			switch {
			case y.over(err):
				return err
			case err != nil && !errors.Is(err, keystore.ErrNotFound): // one of them that nobody can read holds up no other
				y.troubled(string(key.Name), keyspec.Ref{Name: key.Name}, "what becomes of it is not known: "+err.Error(), r)
			case x != nil:
				y.note(r, x)
			}
			refs, err := y.publishing(key, lists)
			switch {
			case y.over(err):
				return err
			case err != nil && !errors.Is(err, keystore.ErrNotFound):
				y.troubled("lists of "+string(key.Name), keyspec.Ref{Name: key.Name}, "its revocation lists were not looked at: "+err.Error(), r)
			}
			r.issuers = append(r.issuers, refs...)
		}
		if after = following; after == nil {
			return failure
		}
		if err := pause(y.ctx, schedulePause); err != nil {
			return err
		}
	}
}

// over reports whether an error ends a look at many keys: nobody waits for it any more, or the keystore was locked.
func (y *survey) over(err error) bool {
	return err != nil && (y.ctx.Err() != nil || y.store.Locked())
}

// note sorts a prospect into what is to be done now and later.
func (y *survey) note(r *round, x *prospect) {
	name := x.key.Name
	ref := keyspec.Ref{Name: name, Version: x.version.Number}
	overdue := false
	if !x.at.IsZero() && !x.waits {
		at := x.at
		if again, _ := y.renewals.waiting(string(name)); again.After(at) {
			at, overdue = again, true
		}
		if y.now.Before(x.at) {
			y.renewals.succeeded(string(name)) // somebody else has done it
		}
		if y.now.Before(at) {
			r.before(at)
		} else {
			r.due = append(r.due, dueKey{name, x.place.issuer, x.place.rank, x.at})
		}
	}
	if x.then == ThenAlert || x.then == ThenDeactivate || overdue {
		r.notice(&notice{Due{Key: ref, What: x.what, At: x.until, Then: x.then, Detail: x.detail}, x.version.NotBefore}, y.now)
	}
}

// ranks are in the order in which keys are renewed: an issuer before what it certifies.
var ranks = []rank{rankRoot, rankModule, rankSign, rankBase, rankSymmetric}

// renewAll renews what is due.
func (e *Engine) renewAll(ctx context.Context, r *round) error {
	slices.SortFunc(r.due, func(a, b dueKey) int {
		return cmp.Or(cmp.Compare(slices.Index(ranks, a.rank), slices.Index(ranks, b.rank)), a.at.Compare(b.at), cmp.Compare(a.name, b.name))
	})
	stuck := make(map[keyspec.Name]int)
	tried := 0
	for i := range r.due {
		d := &r.due[i]
		below := "below " + string(d.issuer)
		if again, _ := e.renewals.waiting(below); d.issuer != "" && e.now().Before(again) {
			r.before(again)
			continue
		}
		if tried++; tried > maxRenewals { // those that wait for their issuer take nobody's place
			r.before(e.now())
			break
		}
		begun := time.Now()
		if err := e.yield(ctx); err != nil {
			return err
		}
		err := e.renew(ctx, d.name)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, ErrLocked), errors.Is(err, ErrNoStore), errors.Is(err, ErrClock):
			r.before(e.now().Add(clockRetry))
			return nil
		case err == nil:
			e.renewals.succeeded(string(d.name))
			e.renewals.succeeded(below)
			stuck[d.issuer] = 0
		case errors.Is(err, keystore.ErrNotFound), errors.Is(err, ErrNotAvailable):
			e.renewals.succeeded(string(d.name))
		default:
			e.troubled(string(d.name), keyspec.Ref{Name: d.name}, "it is due and was not renewed: "+err.Error(), r)
			if stuck[d.issuer]++; d.issuer != "" && stuck[d.issuer] == giveUpIssuer {
				e.troubled(below, keyspec.Ref{Name: d.issuer}, "keys that it certifies are due and are not renewed: "+err.Error(), r)
			}
		}
		if err := pause(ctx, min(time.Since(begun), maxPause)); err != nil {
			return err
		}
	}
	return nil
}

// troubled notes that something was not renewed, and tells it from time to time.
func (e *Engine) troubled(what string, ref keyspec.Ref, text string, r *round) {
	if e.renewals.fail(what, text, e.now()) {
		e.log.Error("a renewal has failed", "key", ref, "error", text)
		e.happened(EventAlert, ref, text)
	}
	again, _ := e.renewals.waiting(what)
	r.before(again)
}

// yield waits while others make keys.
func (e *Engine) yield(ctx context.Context) error {
	for end := time.Now().Add(maxYield); !e.makers.idle() && time.Now().Before(end); {
		if err := pause(ctx, yieldPause); err != nil {
			return err
		}
	}
	return nil
}

// renew does for one key what is due, which is found out again in its turn.
func (e *Engine) renew(ctx context.Context, name keyspec.Name) error {
	u := e.itself(ctx, "key_renew", keyspec.Ref{Name: name})
	err := u.protect(func() (err error) {
		if u.store, err = e.opened(); err != nil {
			return err
		}
		done, err := e.makers.take(ctx, string(name))
		if err != nil {
			return err
		}
		defer done()
		if u.now, err = u.turn(); err != nil {
			return err
		}
		y := newSurvey(u)
		x, err := y.prospect(name)
		if err != nil || x == nil || x.at.IsZero() || x.waits || u.now.Before(x.at) {
			return err // somebody else has done it
		}
		var c *Certified
		if x.then == ThenRecertify {
			c, err = u.certifyVersion(x.place, x.key, x.version, nil, x.extend)
		} else {
			c, err = u.makeVersion(x.standing, &generation{protection: x.key.Protection})
		}
		if err == nil && !c.Made {
			err = fmt.Errorf("%w: its issuer %s lasts no longer than the key itself", ErrState, x.place.issuer)
		}
		return err
	})
	if err == nil && !u.recorded {
		return nil
	}
	return u.record(err)
}

// itself begins an act of the daemon's own.
func (e *Engine) itself(ctx context.Context, op string, ref keyspec.Ref) *use {
	u := &use{Engine: e, ctx: ctx, caller: &Caller{}, act: &act{op: op, ref: ref, sync: true}, now: e.now()}
	u.decision.Allowed, u.decision.Principal = true, daemonName
	return u
}
