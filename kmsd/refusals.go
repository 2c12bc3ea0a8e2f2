package main

import (
	"fmt"
	"sync"
	"time"

	"github.com/kmsd-project/kmsd/ipc/proto"
)

// How many of a user's requests that never reach an operation are recorded: a few at once, then about one a second.
// Anybody who may connect can make them as fast as he likes, and the audit has to have room for what matters.
const (
	refusalBurst  = 16
	refusalEvery  = time.Second
	maxRefusalUID = 1024 // users that are remembered
)

// refusals decides which refusals are recorded. The zero value is ready.
type refusals struct {
	mu    sync.Mutex
	users map[uint32]*refused
}

type refused struct {
	left   int       // refusals that are recorded at once
	since  time.Time // left grows from here
	missed uint64    // not recorded since the last that was
}

// take reports whether a refusal of a user is to be recorded, and how many before it were not.
func (r *refusals) take(uid uint32, now time.Time) (missed uint64, record bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	u := r.users[uid]
	if u == nil {
		if r.users == nil {
			r.users = make(map[uint32]*refused)
		}
		for other, old := range r.users { // whoever was quiet for long enough is as good as new
			if len(r.users) < maxRefusalUID {
				break
			}
			if old.missed == 0 && now.Sub(old.since) >= refusalBurst*refusalEvery {
				delete(r.users, other)
			}
		}
		if len(r.users) >= maxRefusalUID {
			return 0, false
		}
		u = &refused{left: refusalBurst, since: now}
		r.users[uid] = u
	}
	if n := int(min(now.Sub(u.since)/refusalEvery, refusalBurst)); n > 0 {
		u.left, u.since = min(u.left+n, refusalBurst), now
	}
	if u.left == 0 {
		u.missed++
		return 0, false
	}
	u.left--
	missed, u.missed = u.missed, 0
	return missed, true
}

// refused records that a request was refused before it reached an operation. Without a keystore there is nobody to record it
// for.
func (s *session) refused(c *call, op string, e *proto.Error) {
	d := s.daemon
	if d.engine == nil || phase(d.phase.Load()) == phaseUninitialised {
		return
	}
	missed, record := d.refusals.take(s.who.UID, time.Now())
	if !record {
		return
	}
	detail := e.Message
	if _, known := d.operations[op]; !known && op != opConnection {
		detail, op = fmt.Sprintf("%s: %.64q", detail, op), "unknown"
	}
	if missed > 0 {
		detail += fmt.Sprintf("; %d refusals before this one are not recorded", missed)
	}
	d.engine.Refused(c.ctx, &s.who, op, detail, e)
}

// opConnection stands in the audit for what concerns a connection and no request.
const opConnection = "connection"
