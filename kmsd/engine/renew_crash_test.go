package engine

import (
	"bytes"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/pki"
)

const renewalDir = "ENGINE_TEST_RENEWAL_DIR"

// reopened is the house in a directory, with a clock that is not behind.
func reopened(t *testing.T, dir string) *house {
	t.Helper()
	h := &house{t: t, dir: dir, clock: &clock{now: time.Now()}, admin: &Caller{UID: owner, GID: 1, Admin: true}, app: &Caller{UID: owner, GID: 1}}
	s, err := keystore.Open(t.Context(), h.config())
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Unlock(t.Context(), 1, bytes.Repeat([]byte{1}, 32)); err != nil {
		t.Fatal(err)
	}
	h.start(s)
	h.renewals.jitter = 0
	if seen := h.ClockSeen(); seen.After(h.clock.now) {
		h.clock.now = seen
	}
	return h
}

// TestRenewalWriter is the other process of TestKillDuringRenewal: it lets time pass, revokes, and says so, until it is killed.
func TestRenewalWriter(t *testing.T) {
	dir := os.Getenv(renewalDir)
	if dir == "" {
		return
	}
	h := reopened(t, dir)
	for i := 0; ; i++ {
		fmt.Println("begun")
		h.clock.add(100 * day)
		h.renewal()
		if i%2 == 0 {
			key := h.revoked("REGISTRATION/x", keyspec.Superseded, ReplaceDefault)
			for j := range key.Versions {
				if !key.Versions[j].Revoked.IsZero() {
					fmt.Printf("revoked %d\n", key.Versions[j].Number)
				}
			}
		}
	}
}

// TestKillDuringRenewal: whenever kmsd is killed, a revoked version has its certificate among the revoked ones and no other has, each
// current version has a certificate of its own, and the next start finishes what was begun.
func TestKillDuringRenewal(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	h.clock.now = time.Now()
	h.hierarchy()
	h.master(Master{Name: "REGISTRATION/EC_SECP256R1_SIGN"})
	base := h.base("REGISTRATION/x")
	sealed := encryptTo(t, base, "data")
	h.log.Close()
	if err := h.store.Load().Close(); err != nil {
		t.Fatal(err)
	}
	kills := 10
	if testing.Short() || raceDetector {
		kills = 4
	}
	acks := make(map[string]bool)
	for range kills {
		killed(t, "TestRenewalWriter", renewalDir+"="+h.dir, 1500*time.Millisecond, func(line string) bool {
			if number, revoked := strings.CutPrefix(line, "revoked "); revoked {
				acks[number] = true
			} else if line != "begun" {
				t.Errorf("the other process: %s", line)
			}
			return line == "begun"
		})
	}
	h = reopened(t, h.dir)
	s := h.store.Load()
	if report, err := s.Verify(t.Context(), nil); err != nil || len(report.Damaged) > 0 {
		t.Fatalf("%+v, %v", report, err)
	}
	u := h.itself(t.Context(), "test", keyspec.Ref{})
	u.store = s
	check := func() {
		key, err := s.Get("REGISTRATION/x")
		if err != nil {
			t.Fatal(err)
		}
		for i := range key.Versions {
			v := &key.Versions[i]
			stored, err := s.Public(keyspec.Ref{Name: key.Name, Version: v.Number})
			if err != nil || len(stored.Chain) < 3 {
				t.Fatalf("version %d has no chain: %v", v.Number, err)
			}
			c, err := pki.ParseCertificate(stored.Chain[0])
			if err != nil {
				t.Fatal(err)
			}
			r, err := u.revocation(c)
			if err != nil || (r != nil) != !v.Revoked.IsZero() {
				t.Errorf("version %d, revoked %v: its certificate %+v, %v", v.Number, v.Revoked, r, err)
			}
			if acks[fmt.Sprint(v.Number)] && v.Revoked.IsZero() {
				t.Errorf("version %d was said to be revoked", v.Number)
			}
		}
	}
	check()
	for range 2 {
		h.clock.add(lastRetry)
		h.renewal()
	}
	check()
	records := strings.Join(h.records(), "\n")
	for _, name := range []keyspec.Name{RootName, "REGISTRATION", "REGISTRATION/EC_SECP256R1_SIGN", "REGISTRATION/x"} {
		list, err := h.Certificates(t.Context(), h.app, name, 0, 100)
		if err != nil || list[0].State != keyspec.Active {
			t.Fatalf("%s: %+v, %v", name, list, err)
		}
		h.checkChain(&Certified{Ref: keyspec.Ref{Name: name, Version: list[0].Version}, Chain: list[0].Chain, Expires: list[0].Expires})
		for i := range list {
			if !strings.Contains(records, fmt.Sprintf(" %s@%d ok generated", name, list[i].Version)) {
				t.Errorf("%s@%d is not in the audit", name, list[i].Version)
			}
		}
	}
	h.opens(base.Ref, sealed, "data")
	key, err := s.Get("REGISTRATION/x")
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d kills, %d revocations acknowledged, %d versions", kills, len(acks), len(key.Versions))
}
