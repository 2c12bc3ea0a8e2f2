package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/enclave/helper"
	"github.com/kmsd-project/kmsd/enclave/keyring"
	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/secmem"
)

// countInMemory returns how often root finds the needle in the memory of a process.
func countInMemory(t *testing.T, pid int, needle []byte) int {
	t.Helper()
	maps, err := os.Open(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer maps.Close()
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	const window = 1 << 20
	buffer := make([]byte, window+len(needle))
	count, read := 0, 0
	for lines := bufio.NewScanner(maps); lines.Scan(); {
		var from, to int64
		var mode string
		if n, _ := fmt.Sscanf(lines.Text(), "%x-%x %s", &from, &to, &mode); n != 3 || mode[0] != 'r' {
			continue
		}
		for at := from; at < to; at += window {
			n, err := mem.ReadAt(buffer[:min(to-at, int64(len(buffer)))], at)
			if err != nil && !errors.Is(err, io.EOF) && n == 0 {
				break // [vvar], or secret memory, which answers EIO even to root
			}
			read += n
			count += bytes.Count(buffer[:n], needle)
		}
	}
	if read < 1<<20 {
		t.Fatalf("only %d bytes of process %d could be read", read, pid)
	}
	return count
}

// After the unlock, the slot secret that came through the helper is nowhere in the daemon.
func TestSlotSecretLeavesTheMemory(t *testing.T) {
	asRoot(t)
	d, _ := initialised(t)
	state := filepath.Join(d.dir, "s")

	// Learn the secret the way the daemon does, from a copy of the keystore.
	spawner, err := helper.StartSpawner(helper.SpawnerConfig{Command: []string{program(t), "spawner"}})
	if err != nil {
		t.Fatal(err)
	}
	defer spawner.Close()
	e := keyring.DialFile(spawner, state)
	defer e.Close()
	arena, err := secmem.NewArena(64 << 10)
	if err != nil {
		t.Fatal(err)
	}
	defer arena.Close()
	copied := t.TempDir()
	if err := os.Chmod(copied, 0o700); err != nil {
		t.Fatal(err)
	}
	files, err := os.ReadDir(state)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if f.Type().IsRegular() {
			content, err := os.ReadFile(filepath.Join(state, f.Name()))
			if err == nil {
				err = os.WriteFile(filepath.Join(copied, f.Name()), content, 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	s, err := keystore.Open(t.Context(), keystore.Config{Dir: copied, Arena: arena})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	slot := s.Slots()[0]
	secret := make([]byte, enclave.SecretSize)
	if err := e.Unwrap(t.Context(), slot.Blob, enclave.SlotAAD(slot.UUID), enclave.Auth{}, secret); err != nil {
		t.Fatal(err)
	}
	if countInMemory(t, os.Getpid(), secret) == 0 {
		t.Fatal("the scan does not even find the secret in this process; the test proves nothing")
	}
	// The daemon collects garbage once it is idle; give it a moment.
	found := 0
	for end := time.Now().Add(15 * time.Second); time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
		if found = countInMemory(t, d.cmd.Process.Pid, secret); found == 0 {
			return
		}
	}
	t.Errorf("the slot secret is in the daemon's memory %d times", found)
}
