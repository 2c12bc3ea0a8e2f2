package engine

import (
	"context"
	"errors"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/kmsd-project/kmsd/kmsd/audit"
)

// An act of administration is on disk before it is begun.
func TestChangeIsAnnounced(t *testing.T) {
	h := newHouse(t)
	before := uint64(0)
	err := h.Change(t.Context(), h.admin, "root_rotate", "info", func() error {
		report, err := audit.Verify(filepath.Join(h.dir, "audit"), nil) // without a flush
		before = report.Entries
		return err
	})
	want(t, "change", err, nil)
	if before < 2 { // keystore_open and begun
		t.Errorf("%d entries were on disk when the act began", before)
	}
	failure := errors.New("no device")
	want(t, "the act's own failure", h.Change(t.Context(), h.admin, "slot_add", "", func() error { return failure }), failure)
	got := h.records()
	for _, record := range []string{"root_rotate @0 begun info", "root_rotate @0 ok info", "slot_add @0 begun", "slot_add @0 no device no device"} {
		if !slices.Contains(got, record) {
			t.Errorf("%q is not recorded: %q", record, got)
		}
	}
	want(t, "without the right", h.Change(t.Context(), h.app, "root_rotate", "", func() error { t.Error("was done"); return nil }), ErrDenied)
}

// What cannot be announced is not done, except locking. What was done is not taken back because of its record.
func TestChangeWithoutAudit(t *testing.T) {
	h := newHouse(t)
	err := h.Change(t.Context(), h.admin, "slot_add", "", func() error {
		h.log.Close() // the log fails between the two records
		return nil
	})
	want(t, "the outcome is not recorded", err, nil)
	done := false
	err = h.Change(t.Context(), h.admin, "slot_add", "", func() error { done = true; return nil })
	want(t, "the beginning is not recorded", err, ErrUnrecorded)
	if done {
		t.Error("the act was done without a record")
	}
	err = h.ChangeAlways(t.Context(), h.admin, "lock", "", func() error { done = true; return nil })
	want(t, "lock", err, nil)
	if !done {
		t.Error("a full disk keeps the keystore open")
	}
}

// A deadline that passes while an act goes on does not lose the record of its outcome.
func TestChangeOutlivesItsDeadline(t *testing.T) {
	h := newHouse(t)
	ctx, cancel := context.WithCancel(t.Context())
	want(t, "change", h.Change(ctx, h.admin, "store_compact", "", func() error { cancel(); return nil }), nil)
	if got := h.records(); !slices.Contains(got, "store_compact @0 ok") {
		t.Errorf("the outcome is not recorded: %q", got)
	}
}

// The audit has what the caller's software calls itself and what it wants to find its request by.
func TestClientAndTraceAreRecorded(t *testing.T) {
	h := newHouse(t)
	h.app.Client = "app 1.0"
	ctx := context.WithValue(t.Context(), TraceKey{}, "request 7")
	if _, err := h.Create(ctx, h.app, &NewKey{Name: "APP/m", Algorithm: "hmac-sha256"}, nil); err != nil {
		t.Fatal(err)
	}
	if _, _, err := h.MAC(ctx, h.app, ref(t, "APP/m"), []byte("x"), nil); err != nil {
		t.Fatal(err)
	}
	s, err := h.BeginStream(ctx, h.app, "mac_verify", ref(t, "APP/m"), nil, []byte("wrong"), nil)
	if err != nil {
		t.Fatal(err)
	}
	s.Finish(nil)
	h.Refused(ctx, h.app, "audit_tail", "no such operation on this socket", ErrDenied)
	want(t, "flush", h.FlushAudit(t.Context()), nil)
	found := make(map[string]int)
	err = h.AuditSeed(func(seed []byte) error {
		entries, _, err := h.log.Tail(t.Context(), seed, 0, 100)
		for _, e := range entries {
			if e.Client == "app 1.0" && e.Trace == "request 7" && e.Principal == "owner" {
				found[e.Op]++
			}
		}
		return err
	})
	if err != nil || found["key_create"] != 1 || found["mac"] != 1 || found["mac_verify"] != 2 || found["audit_tail"] != 1 {
		t.Errorf("%v %v", found, err)
	}
}

func TestDescribePanic(t *testing.T) {
	defer func() {
		text, stack := DescribePanic(recover())
		if text != "string" || !strings.Contains(stack, "TestDescribePanic") || strings.Contains(stack, "secret") {
			t.Errorf("%q %q", text, stack)
		}
	}()
	panic("secret")
}
