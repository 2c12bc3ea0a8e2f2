package engine

import (
	"context"
	"crypto/rand"
	"strings"
	"sync"
	"time"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// EventKind says what kind of thing has happened.
type EventKind string

// The kinds of event.
const (
	EventMade     EventKind = "made"     // the first version of a key
	EventRotated  EventKind = "rotated"  // a new version
	EventRenewed  EventKind = "renewed"  // a new certificate for a version
	EventRevoked  EventKind = "revoked"  // a version
	EventCRL      EventKind = "crl"      // a revocation list was published
	EventExpiring EventKind = "expiring" // something expires soon
	EventAlert    EventKind = "alert"    // something that a person has to do
	EventClock    EventKind = "clock"    // the clock is behind
)

// Event is one thing that has happened.
type Event struct {
	Number uint64 // from 1, in this run of kmsd
	Time   time.Time
	Kind   EventKind
	Key    keyspec.Ref // zero where no key is concerned
	Detail string
}

// EventPage is what has happened since an event.
type EventPage struct {
	Source []byte // of this run of kmsd, 16 bytes
	Events []Event
	Next   uint64 // number of the last event, to go on after
	Lost   bool   // some have been missed: this is another run, or they were too many
}

const (
	keptEvents  = 1024 // the last ones, which can still be asked for
	maxWatching = 16   // callers that wait for the next event; more are answered at once
	maxDetail   = 256  // bytes
)

// events remembers what has happened lately. It is a convenience for people and their tools; the record is the audit.
type events struct {
	mu      sync.Mutex
	source  []byte
	last    uint64        // number of the last event
	kept    []Event       // the last ones, ascending
	next    chan struct{} // closed at the next event; nil when nobody waits
	waiting int
}

// happened adds an event.
func (e *Engine) happened(kind EventKind, key keyspec.Ref, detail string) {
	detail = shortened(detail)
	v := &e.events
	v.mu.Lock()
	defer v.mu.Unlock()
	v.last++
	if len(v.kept) == keptEvents {
		v.kept = append(v.kept[:0], v.kept[keptEvents/4:]...)
	}
	v.kept = append(v.kept, Event{v.last, e.now().Truncate(time.Second), kind, key, detail})
	if v.next != nil {
		close(v.next)
		v.next = nil
	}
}

// shortened cuts a text to maxDetail, not within a character.
func shortened(s string) string {
	if len(s) <= maxDetail {
		return s
	}
	const end = "..."
	return strings.ToValidUTF8(s[:maxDetail-len(end)], "") + end
}

// page returns what has happened after an event of this run, or with another source everything that is remembered.
func (v *events) page(source []byte, after uint64, limit int) *EventPage {
	if v.source == nil {
		v.source = make([]byte, 16)
		rand.Read(v.source)
	}
	p := &EventPage{Source: v.source, Next: after}
	if len(source) > 0 && string(source) != string(v.source) || after > v.last {
		p.Lost, p.Next = true, 0
	}
	first := v.last + 1 - uint64(len(v.kept))
	if p.Next+1 < first {
		p.Lost = p.Lost || len(source) > 0
		p.Next = first - 1
	}
	for _, event := range v.kept[p.Next+1-first:] {
		if len(p.Events) == limit {
			break
		}
		p.Events = append(p.Events, event)
		p.Next = event.Number
	}
	return p
}

// Events returns what has happened since an event, at most limit things, and waits for the next when there is none: until something
// happens, the time wait is over or the context ends. source is that of the page before, or nil: then the page begins with what is
// remembered.
func (e *Engine) Events(ctx context.Context, c *Caller, source []byte, after uint64, wait time.Duration, limit int) (p *EventPage, err error) {
	err = e.Inspect(ctx, c, "events", func() error {
		v := &e.events
		v.mu.Lock()
		defer v.mu.Unlock()
		p = v.page(source, after, limit)
		if len(p.Events) > 0 || p.Lost || wait <= 0 || v.waiting == maxWatching {
			return nil
		}
		if v.next == nil {
			v.next = make(chan struct{})
		}
		next := v.next
		v.waiting++
		v.mu.Unlock()
		timer := time.NewTimer(wait)
		select {
		case <-next:
		case <-timer.C:
		case <-ctx.Done():
		}
		timer.Stop()
		v.mu.Lock()
		v.waiting--
		p = v.page(p.Source, p.Next, limit)
		return ctx.Err()
	})
	if err != nil {
		return nil, err
	}
	return p, nil
}

// LastEvent is the source and number from which on only what happens from now is of interest.
func (e *Engine) LastEvent() (source []byte, number uint64) {
	v := &e.events
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.page(nil, v.last, 0).Source, v.last
}
