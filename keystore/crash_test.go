package keystore

import (
	"bufio"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

func TestKillingTheProcessLosesNothingAcknowledged(t *testing.T) {
	t.Parallel()
	s, c := boundStore(t)
	mustApply(t, s, guardedKey("app0", fixedGuard()))
	dir := s.config.Dir
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	kills := scaled(100, 20)
	var acks []string
	for range kills {
		cmd := runAs(roleWriter, dir, "0", fmt.Sprint(lastCount(acks, c.now())))
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		// Kill it some time after its first acknowledgement.
		lines := bufio.NewScanner(out)
		first := true
		for lines.Scan() {
			if strings.HasPrefix(lines.Text(), "failed") {
				cmd.Process.Kill()
				t.Fatal(lines.Text())
			}
			acks = append(acks, lines.Text())
			if first {
				first = false
				time.AfterFunc(time.Duration(rand.IntN(60_000))*time.Microsecond, func() { cmd.Process.Kill() })
			}
		}
		cmd.Wait()
	}
	c.value = lastCount(acks, c.now())
	s = mustOpenBound(t, dir, c)
	if err := s.OpenNamespace("app0", fixedGuard().Key); err != nil {
		t.Fatal(err)
	}
	if err := acknowledged(s, acks); err != nil {
		t.Fatal(err)
	}
	report, err := s.Verify(context.Background(), nil)
	if err != nil || len(report.Damaged) > 0 {
		t.Fatalf("%+v %v", report, err)
	}
	increments := 0
	for _, line := range acks {
		if strings.HasPrefix(line, counterLine) {
			increments++
		}
	}
	if len(acks)-increments < kills || increments < kills {
		t.Fatalf("only %d operations were acknowledged, and %d increments", len(acks)-increments, increments)
	}
	t.Logf("%d kills, %d acknowledged operations, %d increments", kills, len(acks)-increments, increments)
}

func TestInterruptedCreationLeavesNoStoreOrAWholeOne(t *testing.T) {
	made := newStore(t)
	if err := made.Close(); err != nil {
		t.Fatal(err)
	}
	move := func(dir, from, to string) {
		if err := os.Rename(filepath.Join(dir, from), filepath.Join(dir, to)); err != nil {
			t.Fatal(err)
		}
	}
	// Before the database has its name.
	dir := copyDir(t, made.config.Dir)
	move(dir, headerFile, headerFile+newSuffix)
	move(dir, databaseFile, databaseFile+newSuffix)
	if exists, err := Exists(dir); err != nil || exists {
		t.Fatalf("Exists: %v %v", exists, err)
	}
	mustApply(t, createIn(t, dir), testKey("app/k", keyspec.Ed25519, 32))
	// After that.
	dir = copyDir(t, made.config.Dir)
	move(dir, headerFile, headerFile+newSuffix)
	if exists, err := Exists(dir); err != nil || !exists {
		t.Fatalf("Exists: %v %v", exists, err)
	}
	s := openIn(t, dir)
	mustApply(t, s, testKey("app/k", keyspec.Ed25519, 32))
	s = reopen(t, s)
	checkKey(t, s, "app/k", 32)
	// A new header that is left over beside a header is not used.
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, headerFile+newSuffix), []byte("half a hea"), 0o600); err != nil {
		t.Fatal(err)
	}
	checkKey(t, openIn(t, dir), "app/k", 32)
}
