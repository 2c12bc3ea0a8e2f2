package keystore

import (
	"bufio"
	"context"
	"math/rand/v2"
	"strings"
	"testing"
	"time"
)

func TestKillingTheProcessLosesNothingAcknowledged(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	dir := s.config.Dir
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	kills := scaled(100, 20)
	var acks []string
	for range kills {
		cmd := runAs(roleWriter, dir, "0")
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
	s = openIn(t, dir)
	if err := acknowledged(s, acks); err != nil {
		t.Fatal(err)
	}
	report, err := s.Verify(context.Background(), nil)
	if err != nil || len(report.Damaged) > 0 {
		t.Fatalf("%+v %v", report, err)
	}
	if len(acks) < kills {
		t.Fatalf("only %d operations were acknowledged", len(acks))
	}
	t.Logf("%d kills, %d acknowledged operations", kills, len(acks))
}
