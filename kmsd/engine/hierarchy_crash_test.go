package engine

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/mechanism"
	"github.com/kmsd-project/kmsd/kmsd/pki"
)

const crashDir = "ENGINE_TEST_CRASH_DIR"

// TestCrashWriter is the other process of TestKillDuringForceAndRotation: it makes and replaces keys, and says so, until it is killed.
func TestCrashWriter(t *testing.T) {
	dir := os.Getenv(crashDir)
	if dir == "" {
		return
	}
	h := &house{t: t, dir: dir, clock: &clock{now: time.Now()}, admin: &Caller{UID: owner, GID: 1, Admin: true}, app: &Caller{UID: owner, GID: 1}}
	s, err := keystore.Open(t.Context(), h.config())
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Unlock(t.Context(), 1, bytes.Repeat([]byte{1}, 32)); err != nil {
		t.Fatal(err)
	}
	h.start(s)
	for i := 0; ; i++ {
		var c *Certified
		switch i % 3 {
		case 0:
			c = h.master(Master{Name: "KERNEL/EC_SECP256R1_SIGN", Force: true})
		case 1:
			c = h.master(Master{Name: "KERNEL", Force: true})
		case 2:
			if _, err := h.Revoke(t.Context(), h.app, keyspec.Ref{Name: "REGISTRATION/x"}, keyspec.Superseded, ReplaceDefault); err != nil && !errors.Is(err, ErrState) {
				t.Fatal(err)
			}
			c = h.base("REGISTRATION/x")
		}
		fmt.Printf("made %s %x\n", c.Ref, sha256.Sum256(c.Chain[0]))
	}
}

// TestKillDuringForceAndRotation: whenever kmsd is killed, what it has said is there, each version has material and certificate that
// belong together, exactly one is current, and the audit has a record of each.
func TestKillDuringForceAndRotation(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	h.hierarchy()
	h.master(Master{Name: "KERNEL"})
	h.master(Master{Name: "KERNEL/EC_SECP256R1_SIGN"})
	base := h.base("REGISTRATION/x")
	sealed := encryptTo(t, base, "data")
	s := h.store.Load()
	h.log.Close()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	kills := 12
	if testing.Short() || raceDetector {
		kills = 4
	}
	var acks []string
	for range kills {
		killed(t, "TestCrashWriter", crashDir+"="+h.dir, 400*time.Millisecond, func(line string) bool {
			if !strings.HasPrefix(line, "made ") {
				t.Errorf("the other process: %s", line)
				return false
			}
			acks = append(acks, line)
			return true
		})
	}
	if len(acks) < kills {
		t.Fatalf("only %d acts by %d processes", len(acks), kills)
	}
	h.clock.now = time.Now().Add(time.Minute)
	s, err := keystore.Open(t.Context(), h.config())
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Unlock(t.Context(), 1, bytes.Repeat([]byte{1}, 32)); err != nil {
		t.Fatal(err)
	}
	h.start(s)
	if report, err := s.Verify(t.Context(), nil); err != nil || len(report.Damaged) > 0 {
		t.Fatalf("%+v, %v", report, err)
	}
	for _, line := range acks {
		var text string
		var sum []byte
		if _, err := fmt.Sscanf(line, "made %s %x", &text, &sum); err != nil {
			t.Fatal(line)
		}
		stored, err := s.Public(ref(t, text))
		if got := sha256.Sum256(stored.Chain[0]); err != nil || !bytes.Equal(got[:], sum) {
			t.Errorf("%s is not there: %v", text, err)
		}
	}
	records := strings.Join(h.records(), "\n")
	versions := 0
	for _, name := range []keyspec.Name{"KERNEL", "KERNEL/EC_SECP256R1_SIGN", "REGISTRATION/x"} {
		key, err := s.Get(name)
		if err != nil {
			t.Fatal(err)
		}
		versions += len(key.Versions)
		active := 0
		for i := range key.Versions {
			v := &key.Versions[i]
			r := keyspec.Ref{Name: name, Version: v.Number}
			if v.State == keyspec.Active {
				active++
			}
			stored, err := s.Public(r)
			if err != nil || len(stored.Chain) < 2 {
				t.Fatalf("%s has no chain: %v", r, err)
			}
			certificate, err := pki.ParseCertificate(stored.Chain[0])
			if err != nil || !bytes.Equal(certificate.RawSubjectPublicKeyInfo, stored.SPKI) {
				t.Errorf("%s: the certificate is another's", r)
			}
			if !v.Expires.Equal(certificate.NotAfter) && v.State == keyspec.Active {
				t.Errorf("%s expires %v, its certificate %v", r, v.Expires, certificate.NotAfter)
			}
			row, _ := mechanism.Lookup(key.Algorithm)
			err = withMaterial(s, r, func(b []byte) error {
				k, err := row.Load(b)
				if err != nil {
					return err
				}
				spki, err := k.SPKI()
				if err == nil && !bytes.Equal(spki, stored.SPKI) {
					t.Errorf("%s: material and certificate are of two keys", r)
				}
				return err
			})
			if err != nil {
				t.Errorf("%s: %v", r, err)
			}
			if !strings.Contains(records, fmt.Sprintf(" %s ok generated", r)) {
				t.Errorf("%s is not in the audit", r)
			}
		}
		if last := &key.Versions[len(key.Versions)-1]; key.Current != last.Number || active > 1 || active == 0 && last.Revoked.IsZero() {
			t.Errorf("%s: current %d of %d, %d active", name, key.Current, last.Number, active)
		}
	}
	h.opens(base.Ref, sealed, "data")
	h.checkChain(h.base("REGISTRATION/x"))
	h.checkChain(h.master(Master{Name: "KERNEL", Force: true}))
	t.Logf("%d kills, %d acts acknowledged, %d versions", kills, len(acks), versions)
}

// killed runs a test of this program in a process of its own, with one more variable in its environment, and kills it within some time after
// the first of its lines for which begun returns true.
func killed(t *testing.T, test, variable string, within time.Duration, begun func(line string) bool) {
	t.Helper()
	cmd := exec.Command(os.Args[0], "-test.run=^"+test+"$")
	cmd.Env = append(os.Environ(), variable)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(30*time.Second, func() { cmd.Process.Kill() })
	lines, first := bufio.NewScanner(out), true
	for lines.Scan() {
		if begun(lines.Text()) && first {
			first = false
			time.AfterFunc(rand.N(within), func() { cmd.Process.Kill() })
		}
	}
	cmd.Wait()
}
