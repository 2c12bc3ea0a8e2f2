package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// openTerminal returns both ends of a pseudo-terminal.
func openTerminal(t *testing.T) (controller, terminal *os.File) {
	t.Helper()
	controller, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { controller.Close() })
	if err := unix.IoctlSetPointerInt(int(controller.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(controller.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	terminal, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { terminal.Close() })
	return controller, terminal
}

// TestBytesAreKeptFromTerminals runs a command with a binary result on a terminal, with and without --force.
func TestBytesAreKeptFromTerminals(t *testing.T) {
	h := newHouse(t)
	controller, terminal := openTerminal(t)
	var errors bytes.Buffer
	run := func(args ...string) int {
		errors.Reset()
		cmd := exec.Command(filepath.Join(bin, "kmsctl"), args...)
		cmd.Env, cmd.Stdout, cmd.Stderr = h.env, terminal, &errors
		if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
			t.Fatal(err)
		}
		return cmd.ProcessState.ExitCode()
	}
	if code := run("random", "--bytes", "32"); code != exitFailed || !strings.Contains(errors.String(), "hint: write it to a file with --out F") {
		t.Errorf("bytes for a terminal: exit %d, %s", code, errors.String())
	}
	if code := run("random", "--bytes", "32", "--as", "hex"); code != exitOK {
		t.Errorf("text for a terminal: exit %d, %s", code, errors.String())
	}
	if code := run("random", "--bytes", "32", "--force"); code != exitOK {
		t.Errorf("bytes with --force: exit %d, %s", code, errors.String())
	}
	controller.SetReadDeadline(time.Now().Add(5 * time.Second))
	seen := make([]byte, 4096)
	n, err := controller.Read(seen)
	if err != nil || n < 64 {
		t.Errorf("the terminal saw %d bytes: %v", n, err)
	}
}

// TestProgressGoesToTheTerminalAlone encrypts a large file with standard error on a terminal: the progress is there, and
// the line is cleared at the end. Standard output has the ciphertext and nothing else.
func TestProgressGoesToTheTerminalAlone(t *testing.T) {
	h := newHouse(t)
	h.must(nil, "kmsctl", "key", "create", "app/k", "--alg", "aes-256-gcm")
	controller, terminal := openTerminal(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	var out bytes.Buffer
	cmd := exec.Command(filepath.Join(bin, "kmsctl"), "encrypt", "--key", "app/k")
	cmd.Env, cmd.Stdin, cmd.Stdout, cmd.Stderr = h.env, r, &out, terminal
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	const total = 2_000_000
	for range 4 { // slowly, so that there is something to show
		if _, err := w.Write(make([]byte, total/4)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(250 * time.Millisecond)
	}
	w.Close()
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	controller.SetReadDeadline(time.Now().Add(5 * time.Second))
	seen := make([]byte, 64<<10)
	n, err := controller.Read(seen)
	if err != nil || !strings.Contains(string(seen[:n]), "encrypting") || !strings.Contains(string(seen[:n]), "MB") {
		t.Errorf("the terminal saw %q, %v", seen[:n], err)
	}
	if got := h.must(out.Bytes(), "kmsctl", "decrypt", "--key", "app/k"); got != string(make([]byte, total)) {
		t.Errorf("%d bytes came back", len(got))
	}
}
