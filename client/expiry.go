package client

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"time"

	"github.com/kmsd-project/kmsd/ipc/proto"
)

// RevocationList is a certificate revocation list.
type RevocationList struct {
	DER        []byte // RFC 5280 section 5
	Number     uint64
	ThisUpdate time.Time
	NextUpdate time.Time
	Entries    int
}

// RevocationList returns the latest revocation list of a key that issues certificates.
func (c *Client) RevocationList(ctx context.Context, issuer string) (*RevocationList, error) {
	for attempt := 0; ; attempt++ {
		list, err := c.revocationList(ctx, issuer)
		if errors.Is(err, ErrConflict) && attempt < 3 { // a newer one was published in the middle
			continue
		}
		return list, err
	}
}

func (c *Client) revocationList(ctx context.Context, issuer string) (*RevocationList, error) {
	p := proto.CRLGet{Issuer: issuer}
	var der []byte
	for {
		var part proto.CRLReply
		if err := c.Call(ctx, proto.OpCRLGet, &p, &part, nil); err != nil {
			return nil, err
		}
		der = append(der, part.CRL...)
		if len(der) >= int(part.Size) {
			return &RevocationList{DER: der, Number: part.Number, ThisUpdate: wireTime(part.ThisUpdate), NextUpdate: wireTime(part.NextUpdate), Entries: int(part.Entries)}, nil
		}
		if len(part.CRL) == 0 {
			return nil, fmt.Errorf("%w: a revocation list ends early", ErrProtocol)
		}
		p.Number, p.Offset = part.Number, uint32(len(der))
	}
}

// Due is one thing that expires, and what kmsd does about it. Times are seconds since 1970-01-01 UTC.
type Due = proto.Due

// Expiring lists what expires until a time, in no order that means anything; the zero time stands for everything that expires at all.
func (c *Client) Expiring(ctx context.Context, until time.Time) iter.Seq2[*Due, error] {
	return func(yield func(*Due, error) bool) {
		p := proto.Expiry{}
		if !until.IsZero() {
			p.Until = until.Unix()
		}
		for {
			var page proto.ExpiryReply
			if err := c.Call(ctx, proto.OpExpiry, &p, &page, nil); err != nil {
				yield(nil, err)
				return
			}
			for i := range page.Due {
				if !yield(&page.Due[i], nil) {
					return
				}
			}
			if len(page.Next) == 0 {
				return
			}
			p.After = page.Next
		}
	}
}

// Event is one thing that has happened in kmsd. Times are seconds since 1970-01-01 UTC.
type Event = proto.Event

// EventLost is the kind of an event that [Client.Watch] makes itself: some may have been missed, because kmsd was started anew or they were
// too many.
const EventLost = "lost"

// Watch yields what happens in kmsd, as it happens: keys that are rotated, certificates that expire, alerts. It goes on until ctx ends or the
// loop does, also when kmsd is restarted: while it is away an error that wraps [ErrUnreachable] is yielded from time to time, after which the
// loop may go on. With recent it begins with what kmsd remembers. It takes the admin socket.
func (c *Client) Watch(ctx context.Context, recent bool) iter.Seq2[*Event, error] {
	return func(yield func(*Event, error) bool) {
		p := proto.Events{Recent: recent, WaitMS: proto.MaxWait}
		for {
			page, err := c.events(ctx, &p)
			switch {
			case err == nil:
			case ctx.Err() != nil:
				return
			case errors.Is(err, ErrUnreachable) || errors.Is(err, ErrLocked) || errors.Is(err, ErrBusy) || errors.Is(err, ErrOutcomeUnknown):
				if !yield(nil, err) || !pause(ctx, watchPause) {
					return
				}
				continue
			default:
				yield(nil, err)
				return
			}
			if page.Lost && !yield(&Event{Kind: EventLost, Time: time.Now().Unix()}, nil) {
				return
			}
			for i := range page.Events {
				if !yield(&page.Events[i], nil) {
					return
				}
			}
			p.Source, p.After, p.Recent = page.Source, page.Next, false
		}
	}
}

// Recent returns what kmsd remembers of what has happened, the oldest first.
func (c *Client) Recent(ctx context.Context) ([]Event, error) {
	var events []Event
	p := proto.Events{Recent: true}
	for {
		page, err := c.events(ctx, &p)
		if err != nil || len(page.Events) == 0 {
			return events, err
		}
		events = append(events, page.Events...)
		p.Source, p.After, p.Recent = page.Source, page.Next, false
	}
}

// watchPause is how long Watch waits for a kmsd that is away, beside the time that a call itself tries to reach it.
const watchPause = time.Second

// events asks for one page. The daemon answers within the time of the request, so what takes much longer has no answer.
func (c *Client) events(ctx context.Context, p *proto.Events) (*proto.EventsReply, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Duration(p.WaitMS)*time.Millisecond+c.options.timeout)
	defer cancel()
	var page proto.EventsReply
	if err := c.Call(ctx, proto.OpEvents, p, &page, nil); err != nil {
		return nil, err
	}
	return &page, nil
}

// pause waits, and reports whether ctx has not ended.
func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
