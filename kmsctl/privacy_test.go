package main

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// house is a running daemon with its own directory.
type house struct {
	t      *testing.T
	dir    string
	env    []string
	daemon *process
}

func newHouse(t *testing.T) *house {
	t.Helper()
	build(t)
	h := &house{t: t, dir: t.TempDir()}
	h.env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + h.dir, "KMSD_SOCKET=" + filepath.Join(h.dir, "run")}
	h.must(nil, "kmsd", "init", "--state-dir", filepath.Join(h.dir, "state"), "--enclave", "keyring:file", "--no-recovery")
	h.start()
	t.Cleanup(func() { h.daemon.stop(syscall.SIGTERM) })
	return h
}

func (h *house) start() {
	h.t.Helper()
	daemon, err := startDaemon(h.dir, h.env)
	if err != nil {
		h.t.Fatal(err)
	}
	h.daemon = daemon
}

func (h *house) run(stdin []byte, program string, args ...string) (string, error) {
	cmd := exec.Command(filepath.Join(bin, program), args...)
	cmd.Env, cmd.Dir, cmd.Stdin = h.env, h.dir, bytes.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func (h *house) must(stdin []byte, program string, args ...string) string {
	h.t.Helper()
	out, err := h.run(stdin, program, args...)
	if err != nil {
		h.t.Fatalf("%s %v: %v\n%s", program, args, err, out)
	}
	return out
}

// files returns the content of every file below dir, by path.
func (h *house) files(dir string) map[string][]byte {
	h.t.Helper()
	contents := make(map[string][]byte)
	err := filepath.WalkDir(filepath.Join(h.dir, dir), func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		content, err := os.ReadFile(path)
		contents[path] = content
		return err
	})
	if err != nil {
		h.t.Fatal(err)
	}
	return contents
}

// TestUsingKeysWritesNothingToTheStore signs a thousand times, unevenly over three keys, and compares every file of the
// store. The audit log is the one place that grows.
func TestUsingKeysWritesNothingToTheStore(t *testing.T) {
	h := newHouse(t)
	for _, name := range []string{"app/a", "app/b", "app/c"} {
		h.must(nil, "kmsctl", "key", "create", name, "--alg", "ed25519")
	}
	var calls strings.Builder
	for i := range 1000 {
		key := "app/a"
		switch {
		case i%100 == 0:
			key = "app/c"
		case i%7 == 0:
			key = "app/b"
		}
		fmt.Fprintf(&calls, `{"op":"sign","params":{"key":%q,"data":"bWVzc2FnZQ=="}}`+"\n", key)
	}
	sums := func() map[string][32]byte {
		out := make(map[string][32]byte)
		for path, content := range h.files("state") {
			if !strings.Contains(path, "/audit/") {
				out[path] = sha256.Sum256(content)
			}
		}
		return out
	}
	before := sums()
	if len(before) < 2 {
		t.Fatalf("only %d files were found", len(before))
	}
	out := h.must([]byte(calls.String()), "kmsctl", "batch")
	if n := strings.Count(out, `"signature"`); n != 1000 {
		t.Fatalf("%d of 1000 signatures were made", n)
	}
	after := sums()
	for path, sum := range before {
		if after[path] != sum {
			t.Errorf("%s has changed", path)
		}
	}
	if len(after) != len(before) {
		t.Errorf("there were %d files, now there are %d", len(before), len(after))
	}
}

// TestNamesAreNowhereOnDisk looks for canaries in every file of a daemon that was used in every way, and in its log.
func TestNamesAreNowhereOnDisk(t *testing.T) {
	h := newHouse(t)
	const namespace, reference, label, value, subject = "CANARYAPP", "canary-reference", "canarylabel", "canaryvalue", "CanarySubject"
	key := namespace + "/" + reference
	h.must(nil, "kmsctl", "key", "create", key, "--alg", "ecdsa-p256", "--label", label+"="+value)
	h.must([]byte("canary-message"), "kmsctl", "sign", "--key", key, "--in", "-", "--out", "sig")
	h.must(nil, "kmsctl", "cert", "self-sign", key, "--subject", "CN="+subject, "--out", "cert.pem")
	h.must(nil, "kmsctl", "key", "rotate", key)
	if out, err := h.run(nil, "kmsctl", "key", "show", namespace+"/canary-missing"); err == nil {
		t.Fatalf("a key that does not exist was shown: %s", out)
	}
	h.must(nil, "kmsctl", "key", "create", namespace+"/doomed", "--alg", "aes-256-gcm")
	h.must(nil, "kmsctl", "key", "destroy", namespace+"/doomed", "--now", "--yes")
	if out := h.must(nil, "kmsctl", "key", "list", namespace); !strings.Contains(out, reference) || !strings.Contains(out, value) {
		t.Fatalf("the canaries are not even in the listing: %s", out)
	}
	h.must(nil, "kmsctl", "audit", "verify", filepath.Join(h.dir, "state", "audit")) // what was buffered is in the file now
	h.daemon.stop(syscall.SIGTERM)
	for path, content := range h.files("state") {
		for _, canary := range []string{namespace, reference, label, value, subject, "canary-missing", "canary-message", "doomed"} {
			if bytes.Contains(content, []byte(canary)) || strings.Contains(filepath.Base(path), canary) {
				t.Errorf("%s holds %q", path, canary)
			}
		}
	}
	for _, canary := range []string{namespace, reference, label, value, subject, "canary-missing"} {
		if bytes.Contains(h.daemon.log.Bytes(), []byte(canary)) {
			t.Errorf("the log holds %q:\n%s", canary, h.daemon.log.String())
		}
	}
}

// TestStolenStoreStaysLocked copies what a thief of the database would have: everything but the machine secret.
func TestStolenStoreStaysLocked(t *testing.T) {
	h := newHouse(t)
	h.must(nil, "kmsctl", "key", "create", "app/k", "--alg", "ed25519")
	h.daemon.stop(syscall.SIGTERM)
	removed := 0
	for path := range h.files("state") {
		if filepath.Base(path) == "machine-secret" {
			removed++
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		}
	}
	if removed != 1 {
		t.Fatalf("%d machine secrets were found", removed)
	}
	h.start()
	out, err := h.run(nil, "kmsctl", "sign", "--key", "app/k", "--in", "-")
	if exit, ok := err.(*exec.ExitError); !ok || exit.ExitCode() != exitLocked {
		t.Errorf("the stolen store was used: %v\n%s", err, out)
	}
}

// TestThreatModelNamesTestsThatExist keeps docs/threat-model.md honest: every test it names is there.
func TestThreatModelNamesTestsThatExist(t *testing.T) {
	document, err := os.ReadFile("../docs/threat-model.md")
	if err != nil {
		t.Fatal(err)
	}
	var tests bytes.Buffer
	err = filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if err == nil && strings.HasSuffix(path, "_test.go") {
			var source []byte
			if source, err = os.ReadFile(path); err == nil {
				tests.Write(source)
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	named := 0
	for word := range strings.FieldsFuncSeq(string(document), func(r rune) bool {
		return r != '_' && (r < '0' || r > '9') && (r < 'A' || r > 'Z') && (r < 'a' || r > 'z')
	}) {
		if len(word) > 4 && (strings.HasPrefix(word, "Test") || strings.HasPrefix(word, "Fuzz")) && 'A' <= word[4] && word[4] <= 'Z' {
			named++
			if !bytes.Contains(tests.Bytes(), []byte("func "+word+"(")) {
				t.Errorf("there is no test %s", word)
			}
		}
	}
	if named < 20 {
		t.Errorf("the threat model names only %d tests", named)
	}
}
