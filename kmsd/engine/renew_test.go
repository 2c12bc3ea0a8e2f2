package engine

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// punctual is a house whose keys are renewed when they are due, without jitter.
func punctual(t testing.TB) *house {
	t.Helper()
	h := newHouse(t)
	h.renewals.jitter = 0
	return h
}

// renewal has the renewer look at all keys.
func (h *house) renewal() time.Time {
	h.t.Helper()
	next, err := h.Renew(h.t.Context())
	if err != nil {
		h.t.Fatal(err)
	}
	return next
}

// told returns what has happened since an event, one line each.
func (h *house) told(since uint64) []string {
	h.t.Helper()
	var lines []string
	for {
		p, err := h.Events(h.t.Context(), h.admin, nil, since, 0, 64)
		if err != nil {
			h.t.Fatal(err)
		}
		for _, e := range p.Events {
			lines = append(lines, fmt.Sprintf("%s %s %s", e.Kind, e.Key, e.Detail))
		}
		if len(p.Events) == 0 {
			return lines
		}
		since = p.Next
	}
}

// currentVersion returns the number of the current version of a key.
func (h *house) currentVersion(name keyspec.Name) keyspec.Version {
	h.t.Helper()
	key, err := h.Get(h.t.Context(), h.app, keyspec.Ref{Name: name})
	if err != nil {
		h.t.Fatal(err)
	}
	return key.Current
}

// TestTwelveYears: a hierarchy that is left alone always has certificates that are good, and opens what was encrypted to any of them.
func TestTwelveYears(t *testing.T) {
	t.Parallel()
	h := punctual(t)
	h.hierarchy()
	h.master(Master{Name: "REGISTRATION/SIGN"})
	h.master(Master{Name: "REGISTRATION/EC_SECP256R1_SIGN"})
	h.master(Master{Name: "REGISTRATION/ED25519_SIGN"})
	first := h.base("REGISTRATION/x")
	sealed := encryptTo(t, first, "data")
	names := []keyspec.Name{RootName, "REGISTRATION", "REGISTRATION/SIGN", "REGISTRATION/EC_SECP256R1_SIGN", "REGISTRATION/ED25519_SIGN", "REGISTRATION/x"}
	years := 12
	if testing.Short() {
		years = 4
	}
	for end := h.clock.Now().AddDate(years, 0, 0); h.clock.Now().Before(end); h.clock.add(15 * day) {
		h.renewal()
		for _, name := range names {
			list, err := h.Certificates(t.Context(), h.app, name, 0, 1)
			if err != nil || list[0].State != keyspec.Active || !h.clock.Now().Before(list[0].Expires) {
				t.Fatalf("%s on %s: %+v, %v", name, h.clock.Now(), list, err)
			}
			h.checkChain(&Certified{Ref: keyspec.Ref{Name: name, Version: list[0].Version}, Chain: list[0].Chain, Expires: list[0].Expires})
		}
	}
	h.opens(first.Ref, sealed, "data")
	for _, name := range names {
		if n := h.currentVersion(name); int(n) < years/3+1 {
			t.Errorf("%s was rotated %d times in %d years", name, n-1, years)
		}
	}
	records := strings.Join(h.records(), "\n")
	for _, name := range names {
		if !strings.Contains(records, fmt.Sprintf("key_renew %s@2 ok generated", name)) {
			t.Errorf("no record of the renewal of %s", name)
		}
	}
	for _, line := range h.told(0) {
		if strings.HasPrefix(line, "alert") || strings.HasPrefix(line, "expiring") {
			t.Error(line)
		}
	}
}
