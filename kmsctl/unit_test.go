package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/client"
	"github.com/kmsd-project/kmsd/ipc/proto"
)

func TestParseTime(t *testing.T) {
	now := time.Date(2026, 1, 31, 12, 0, 0, 0, time.UTC)
	for in, want := range map[string]int64{
		"":                     0,
		"none":                 proto.NoExpiry,
		"now":                  now.Unix(),
		"2027-03-01T00:00:00Z": time.Date(2027, 3, 1, 0, 0, 0, 0, time.UTC).Unix(),
		"2027-03-01":           time.Date(2027, 3, 1, 0, 0, 0, 0, time.Local).Unix(),
		"90d":                  now.Add(90 * 24 * time.Hour).Unix(),
		"2w":                   now.Add(14 * 24 * time.Hour).Unix(),
		"36h":                  now.Add(36 * time.Hour).Unix(),
		"2y":                   time.Date(2028, 1, 31, 12, 0, 0, 0, time.UTC).Unix(),
	} {
		got, err := parseTime(in, now)
		if err != nil || got != want {
			t.Errorf("parseTime(%q) = %d, %v; want %d", in, got, err, want)
		}
	}
	for _, in := range []string{"tomorrow", "d", "-3d", "3", "201y", "99999999999d", "2027-13-01", "1.5y", "3D", " 3d", "1970-01-01T00:00:00Z", "1969-12-31T23:59:59Z"} {
		if got, err := parseTime(in, now); !errors.Is(err, errUsage) {
			t.Errorf("parseTime(%q) = %d, %v; want a usage error", in, got, err)
		}
	}
	if got, err := parseDelay("2y"); err != nil || got != 2*365*24*3600 {
		t.Errorf("parseDelay(2y) = %d, %v", got, err)
	}
}

func TestExitCodes(t *testing.T) {
	for want, err := range map[int]error{
		exitFailed:      fmt.Errorf("x: %w", client.ErrNotAvailable),
		exitUsage:       withHint(usagef("x"), "y"),
		exitUnreachable: fmt.Errorf("x: %w", client.ErrUnreachable),
		exitLocked:      withHint(fmt.Errorf("x: %w", client.ErrLocked), "y"),
	} {
		if got := exitCode(err); got != want {
			t.Errorf("exit code of %v is %d, want %d", err, got, want)
		}
	}
}

// TestEveryWireCodeHasAHint leaves out the codes that no command can do anything about.
func TestEveryWireCodeHasAHint(t *testing.T) {
	for _, code := range []proto.Code{
		proto.CodeUnknownOp, proto.CodeUnsupported, proto.CodeVersion, proto.CodeNotAvailable, proto.CodeExists, proto.CodeState,
		proto.CodeUsage, proto.CodeExpired, proto.CodeExhausted, proto.CodeConflict, proto.CodeDecryptionFailed,
		proto.CodeVerificationFailed, proto.CodeBusy, proto.CodeDeadline, proto.CodeUninitialised, proto.CodeLocked,
		proto.CodeAuthFailed, proto.CodeLockedOut, proto.CodeAbsent, proto.CodeReplaced, proto.CodeMisconfigured,
		proto.CodeRollback, proto.CodeDamaged, proto.CodeStorage,
	} {
		if hintFor(&proto.Error{Code: code}) == "" {
			t.Errorf("code %s has no hint", code)
		}
	}
}

func TestPrintableKeepsTerminalsSafe(t *testing.T) {
	if got := printable("Ünïcode ok"); got != "Ünïcode ok" {
		t.Errorf("printable changed plain text to %q", got)
	}
	if got := printable("a\x1b[2Jb\nc\u202ed"); strings.ContainsAny(got, "\x1b\n\u202e") {
		t.Errorf("printable let %q through", got)
	}
}

func TestOutputHasNoNameBeforeCommit(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "out")
	a := newApp(strings.NewReader(""), os.Stdout, os.Stderr)

	out, err := a.create(outFlags{path: path}, true, modeSecret)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprint(out, "half")
	if _, err := os.Lstat(path); err == nil {
		t.Fatal("the file has its name before commit")
	}
	out.abort()
	if left := files(t, dir); len(left) != 0 {
		t.Fatalf("abort left %v", left)
	}

	out, err = a.create(outFlags{path: path}, true, modeSecret)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprint(out, "whole")
	if err := out.commit(); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("file after commit: %v, %v", info, err)
	}

	if _, err := a.create(outFlags{path: path}, true, modeSecret); err == nil || hintFor(err) == "" {
		t.Fatalf("an existing file was taken without --force: %v", err)
	}
	if err := a.writeResult(outFlags{path: path, force: true}, "data", nil, []byte("new"), true, modePublic); err != nil {
		t.Fatal(err)
	}
	if got, _ := os.ReadFile(path); string(got) != "new" {
		t.Fatalf("after --force the file holds %q", got)
	}
	if left := files(t, dir); len(left) != 1 {
		t.Fatalf("--force left %v", left)
	}
}

// TestOutputRace makes the file appear between create and commit; it must win.
func TestOutputRace(t *testing.T) {
	path := filepath.Join(t.TempDir(), "out")
	a := newApp(strings.NewReader(""), os.Stdout, os.Stderr)
	out, err := a.create(outFlags{path: path}, true, modeSecret)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("theirs"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := out.commit(); err == nil {
		t.Fatal("commit replaced a file that somebody else made meanwhile")
	}
	if got, _ := os.ReadFile(path); string(got) != "theirs" {
		t.Fatalf("the file holds %q", got)
	}
}

func TestBatchWords(t *testing.T) {
	item, err := parseBatch([]byte(`{"op":"data_key","params":{"key":"a/b","no_plaintext":true,"bytes":16}}`))
	if err != nil {
		t.Fatal(err)
	}
	var p proto.DataKey
	if err := proto.Decode(item.Params, &p); err != nil || p.Key != "a/b" || !p.NoPlaintext || p.Bytes != 16 {
		t.Fatalf("got %+v, %v", p, err)
	}
	for _, bad := range []string{`{"op":"nothing"}`, `{"op":"sign","params":{"kei":"a"}}`, `{"op":"sign","extra":1}`, `{`, `[]`} {
		if _, err := parseBatch([]byte(bad)); err == nil {
			t.Errorf("%s was accepted", bad)
		}
	}
	for name, want := range map[string]string{"Key": "key", "NoPlaintext": "no_plaintext", "SPKISHA256": "spkisha256", "MAC": "mac", "KeyUsage": "key_usage"} {
		if got := snake(name); got != want {
			t.Errorf("snake(%s) = %s, want %s", name, got, want)
		}
	}
}

// FuzzBatch and the two below read files that others wrote.
func FuzzBatch(f *testing.F) {
	f.Add([]byte(`{"op":"sign","params":{"key":"a","data":"aGVsbG8="}}`))
	f.Add([]byte(`{"op":"key_create","params":{"name":"a","labels":{"a_b":"c"},"expires":1e3}}`))
	f.Fuzz(func(t *testing.T, line []byte) {
		item, err := parseBatch(line)
		if err != nil {
			return
		}
		body, ok := proto.Lookup(item.Op)
		if !ok {
			t.Fatalf("an item with operation %q was made", item.Op)
		}
		_ = proto.Decode(item.Params, body.Params()) // limits may refuse it, nothing may panic
	})
}

func FuzzMaterial(f *testing.F) {
	f.Add([]byte("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"), "")
	f.Add([]byte("0123456789abcdef"), "aes-128-gcm")
	f.Fuzz(func(t *testing.T, encoded []byte, algorithm string) {
		material, found, err := readMaterial(encoded, algorithm, "")
		if err == nil && (len(material) == 0 && len(encoded) > 0 || found == "") {
			t.Fatalf("%d bytes of %q gave nothing and no error", len(encoded), algorithm)
		}
	})
}

func FuzzTime(f *testing.F) {
	for _, s := range []string{"90d", "2y", "2026-01-02", "none", "2026-01-02T03:04:05Z"} {
		f.Add(s)
	}
	now := time.Unix(1_800_000_000, 0)
	f.Fuzz(func(t *testing.T, s string) {
		if at, err := parseTime(s, now); err == nil && s != "" && s != "none" && at == 0 && !strings.HasPrefix(s, "1970") {
			t.Fatalf("%q was read as no time", s)
		}
		parseDelay(s)
	})
}

// TestWrongNumbersAreExplained: nobody who typed a wrong number has to know the functions of Go.
func TestWrongNumbersAreExplained(t *testing.T) {
	for line, text := range map[string]string{
		"random --bytes -1":                          `"--bytes" flag: it takes a whole number from 0`,
		"random --bytes 5000000000":                  `"--bytes" flag: that number is too large`,
		"audit tail -n -5":                           `"-n, --lines" flag: it takes a whole number from 0`,
		"key list --limit x":                         `"--limit" flag: it takes a whole number`,
		"--json=perhaps status":                      `"--json" flag: it takes true or false`,
		"key create a/b --alg ed25519 --uses some":   `"--uses" flag: it takes a whole number from 0`,
		"key create a/b --alg ed25519 --exportable=": `"--exportable" flag: it takes true or false`,
	} {
		var stderr strings.Builder
		code := newApp(strings.NewReader(""), io.Discard, &stderr).run(t.Context(), strings.Fields(line))
		if got := stderr.String(); code != exitUsage || !strings.Contains(got, text) || strings.Contains(got, "strconv") || !strings.Contains(got, "hint:") {
			t.Errorf("%s: exit code %d, %s", line, code, got)
		}
	}
}

// TestLongSocketPath: the daemon may well run; it is the path that cannot be used.
func TestLongSocketPath(t *testing.T) {
	path := filepath.Join(t.TempDir(), strings.Repeat("x", client.MaxSocketPath))
	var stderr strings.Builder
	code := newApp(strings.NewReader(""), io.Discard, &stderr).run(t.Context(), []string{"--socket", path, "status"})
	if got := stderr.String(); code != exitUnreachable || !strings.Contains(got, "107") || !strings.Contains(got, "hint: name it by a shorter path") {
		t.Errorf("exit code %d, %s", code, got)
	}
}
