package keystore

import (
	"bufio"
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"testing"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/keystore/secmem"
)

// TestGuardedKeyIsNowhereInMemory looks for the wrapping key of a guarded namespace in the memory of a process that used it.
func TestGuardedKeyIsNowhereInMemory(t *testing.T) {
	if raceDetector {
		t.Skip("the race detector keeps what freed memory held")
	}
	cmd := runAs(roleMemory, testDir(t))
	cmd.Env = append(cmd.Env, "GODEBUG=clobberfree=1") // as kmsd is linked
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer in.Close()
	found := map[string]int{}
	for lines := bufio.NewScanner(out); lines.Scan(); fmt.Fprintln(in) {
		stage, text, _ := strings.Cut(lines.Text(), " ")
		key, err := hex.DecodeString(text)
		if err != nil || len(key) != keySize {
			t.Fatal(lines.Text())
		}
		found[stage] = copiesInMemory(t, cmd.Process.Pid, unmask(key))
	}
	if len(found) < 3 || found["copied"] == 0 {
		t.Fatalf("the search does not work: %v", found)
	}
	for _, stage := range []string{"idle", "closed", "locked"} {
		if found[stage] > 0 {
			t.Errorf("%s: %d copies", stage, found[stage])
		}
	}
}

// unmask returns a key that was written down in another form, so that writing it down is no copy. It is its own inverse.
func unmask(b []byte) []byte {
	out := make([]byte, len(b))
	for i := range b {
		out[i] = b[i] ^ 0xa5
	}
	return out
}

func copiesInMemory(t *testing.T, pid int, key []byte) (n int) {
	t.Helper()
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		t.Fatal(err)
	}
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	buf := make([]byte, 1<<20)
	for line := range strings.Lines(string(maps)) {
		var from, to uint64
		var mode string
		if _, err := fmt.Sscanf(line, "%x-%x %s", &from, &to, &mode); err != nil || !strings.HasPrefix(mode, "rw") {
			continue
		}
		for at := from; at < to; at += uint64(len(buf) - len(key)) {
			got, _ := mem.ReadAt(buf[:min(uint64(len(buf)), to-at)], int64(at)) // the kernel does not show the arena
			n += bytes.Count(buf[:got], key)
		}
	}
	return n
}

// memoryMain uses a guarded namespace and stops to be looked at.
func memoryMain(dir string) {
	fail := func(err error) {
		if err != nil {
			fmt.Println("failed", err)
			os.Exit(3)
		}
	}
	s, err := Create(context.Background(), childConfig(dir), []NewSlot{testSlot(1)}, nil)
	fail(err)
	var masked []byte
	in := bufio.NewReader(os.Stdin)
	show := func(stage string) {
		for range 4 {
			runtime.GC()
		}
		fmt.Println(stage, hex.EncodeToString(masked))
		in.ReadString('\n')
	}
	work := func() {
		for i := range 50 {
			name := fmt.Sprintf("app/k%d", i)
			if err := s.Apply(context.Background(), Commit{Changes: []Change{testKey(name, keyspec.Ed25519, 32)}}); !errors.Is(err, ErrExists) {
				fail(err)
			}
			_, err := s.Material(keyspec.Ref{Name: keyspec.Name(name), Version: 1}, nil)
			fail(err)
		}
	}
	secmem.Do(func() {
		g := testGuard(keyspec.EscrowNone)
		masked = unmask(g.Key)
		fail(s.Apply(context.Background(), Commit{Changes: []Change{guardedKey("app", g)}}))
		clear(g.Key)
		work()
	})
	if s.config.Arena.Protection() == secmem.ProtectionFull { // else the arena itself shows
		show("idle")
	}
	held := s.open.get("app")
	show("copied")
	clear(held)
	s.CloseNamespace("app")
	show("closed")
	secmem.Do(func() {
		key := unmask(masked)
		fail(s.OpenNamespace("app", key))
		clear(key)
		work()
	})
	s.Lock()
	show("locked")
	runtime.KeepAlive(held)
}
