//go:build linux

package client_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/client"
)

// TestWatchAcrossRestart has what happens told by a daemon that is stopped and started in the middle.
func TestWatchAcrossRestart(t *testing.T) {
	d := newDaemon(t)
	defer d.kill()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	admin := func() *client.Client {
		c, err := client.Dial(ctx, client.WithSocket(d.runtime), client.WithAdmin(), client.WithReconnect(0))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	events, gone := make(chan client.Event), make(chan struct{}, 1)
	watcher := admin()
	go func() {
		defer close(events)
		for e, err := range watcher.Watch(ctx, true) {
			switch {
			case errors.Is(err, client.ErrUnreachable) || errors.Is(err, client.ErrOutcomeUnknown) || errors.Is(err, client.ErrLocked):
				select {
				case gone <- struct{}{}:
				default:
				}
			case err != nil:
				t.Error(err)
				return
			default:
				select {
				case events <- *e:
				case <-ctx.Done():
					return
				}
			}
		}
	}()
	next := func(kind, key string) {
		t.Helper()
		for {
			select {
			case e, ok := <-events:
				if !ok {
					t.Fatalf("no event %s of %q", kind, key)
				}
				if e.Kind == kind && e.Key == key {
					return
				}
			case <-ctx.Done():
				t.Fatalf("no event %s of %q in time", kind, key)
			}
		}
	}
	c := admin()
	if _, err := c.GenerateMaster(ctx, "ROOT", client.MasterKey{}); err != nil {
		t.Fatal(err)
	}
	next("made", "ROOT@1")

	// A watcher that waits does not hold up the end of the daemon.
	begin := time.Now()
	d.stop(t)
	if took := time.Since(begin); took > 10*time.Second {
		t.Errorf("kmsd took %v to stop", took)
	}
	<-gone
	d.start(t)
	next(client.EventLost, "")
	if _, err := admin().GenerateMaster(ctx, "KERNEL", client.MasterKey{}); err != nil {
		t.Fatal(err)
	}
	next("made", "KERNEL@1")
	if recent, err := admin().Recent(ctx); err != nil || len(recent) == 0 || recent[len(recent)-1].Key != "KERNEL@1" {
		t.Errorf("%+v, %v", recent, err)
	}
}
