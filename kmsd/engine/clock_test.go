package engine

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

func timeout(t testing.TB, d time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(t.Context(), d)
}

// TestClockSetBack: behind the latest time seen nothing is issued nor replaced, and everything is used, until the clock is right again or
// is accepted as it is.
func TestClockSetBack(t *testing.T) {
	h := newHouse(t)
	h.hierarchy()
	old := h.base("REGISTRATION/x")
	sealed := encryptTo(t, old, "data")
	h.clock.add(710 * day)
	if got := h.base("REGISTRATION/x"); got.Ref.Version != 2 {
		t.Fatalf("%+v", got)
	}
	latest := h.clock.Now()
	refused := func(what string) {
		t.Helper()
		_, err := h.CertCurrent(t.Context(), h.app, "REGISTRATION/new", nil)
		want(t, what+": a new key", err, ErrClock)
		var next *Remedied
		if !errors.As(err, &next) || next.Remedy == "" {
			t.Errorf("%s: no next step in %v", what, err)
		}
		_, err = h.MasterGenerate(t.Context(), h.admin, &Master{Name: "REGISTRATION", Force: true})
		want(t, what+": force", err, ErrClock)
		_, err = h.MasterGenerate(t.Context(), h.admin, &Master{Name: "KERNEL/IDENTITY_CACHE", Force: true})
		want(t, what+": a symmetric key", err, ErrClock)
		h.opens(old.Ref, sealed, "data")
		if got := h.base("REGISTRATION/x"); got.Made || got.Ref.Version != 2 {
			t.Errorf("%s: %+v", what, got)
		}
	}
	h.clock.add(-clockTolerance)
	h.base("REGISTRATION/tolerated")
	if behind := h.ClockBehind(); !behind.IsZero() {
		t.Errorf("behind %v", behind)
	}
	h.clock.add(-time.Second)
	refused("a second too much")
	h.clock.add(-300 * day)
	refused("most of a year")
	h.restart()
	refused("after a restart")
	if behind := h.ClockBehind(); !behind.Equal(latest) {
		t.Errorf("behind %v, not %v", behind, latest)
	}
	if seen := h.ClockSeen(); !seen.Equal(latest) {
		t.Errorf("seen %v, not %v", seen, latest)
	}
	h.clock.add(latest.Sub(h.clock.Now()))
	h.base("REGISTRATION/right")

	// A clock that was wrong once: 2099.
	h.clock.add(365 * 72 * day)
	_, err := h.MasterGenerate(t.Context(), h.admin, &Master{Name: "KERNEL/IDENTITY_CACHE"})
	want(t, "in the future", err, nil)
	h.clock.add(-365 * 72 * day)
	refused("back from the future")
	want(t, "accept", h.ClockAccept(t.Context(), h.admin), nil)
	h.base("REGISTRATION/new")
	h.restart()
	h.base("REGISTRATION/newer")
	found := false
	for _, r := range h.records() {
		found = found || len(r) > 12 && r[:12] == "clock_accept"
	}
	if !found {
		t.Error("accepting is not recorded")
	}
}

// TestClockIsWrittenDown: seldom, and before anything is issued.
func TestClockIsWrittenDown(t *testing.T) {
	h := newHouse(t)
	s := h.store.Load()
	revision := func() uint64 {
		d, err := s.Document(kindClock, clockName)
		if err != nil {
			t.Fatal(err)
		}
		return d.Revision
	}
	if seen := h.ClockSeen(); !seen.IsZero() {
		t.Errorf("seen %v", seen)
	}
	h.master(Master{Name: "KERNEL/IDENTITY_CACHE"})
	first := revision()
	for range 5 {
		h.clock.add(clockGrain / 6)
		want(t, "tick", h.tick(t.Context(), s, h.clock.Now()), nil)
	}
	if revision() != first {
		t.Error("written within a minute")
	}
	h.clock.add(clockGrain / 6)
	want(t, "tick", h.tick(t.Context(), s, h.clock.Now()), nil)
	want(t, "tick", h.tick(t.Context(), s, h.clock.Now()), nil)
	if revision() != first+1 {
		t.Errorf("revision %d, %d before", revision(), first)
	}
	if !h.ClockSeen().Equal(h.clock.Now()) {
		t.Error("the time was not taken note of")
	}
	h.create("KERNEL/aes", keyspec.AES256GCM)
	h.Lock()
	if !h.ClockSeen().IsZero() {
		t.Error("seen while locked")
	}
}
