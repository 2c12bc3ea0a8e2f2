package main

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestPasswordsOnTheTerminal shows db.conf on a terminal: the passwords only when they are asked for.
func TestPasswordsOnTheTerminal(t *testing.T) {
	h := newHouse(t)
	dir := t.TempDir()
	private, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, machineSecret), pkcs8, 0o600); err != nil {
		t.Fatal(err)
	}
	conf := filepath.Join(dir, "db.conf")
	h.must(nil, "kmsctl", "machine", "adopt", "--file", dir)
	h.must(nil, "kmsctl", "machine", "db-conf", "set", "--generate", "--out", conf)
	controller, terminal := openTerminal(t)
	shown := func(args ...string) string {
		t.Helper()
		cmd := exec.Command(filepath.Join(bin, "kmsctl"), append([]string{"machine", "db-conf", "show", "--in", conf}, args...)...)
		cmd.Env, cmd.Stdout = h.env, terminal
		if err := cmd.Run(); err != nil {
			t.Fatal(err)
		}
		controller.SetReadDeadline(time.Now().Add(5 * time.Second))
		seen := make([]byte, 4096)
		n, err := controller.Read(seen)
		if err != nil {
			t.Fatal(err)
		}
		return string(seen[:n])
	}
	password := regexp.MustCompile(`Boot password: +[A-Za-z0-9]{20}`)
	if text := shown(); password.MatchString(text) {
		t.Errorf("unasked: %q", text)
	}
	if text := shown("--reveal"); !password.MatchString(text) {
		t.Errorf("asked: %q", text)
	}
}

// The directory of a machine's key is often its user's, while root adopts it: no link leads --remove-source to another file, and no pipe makes
// it wait.
func TestRemoveSourceStaysWithTheFile(t *testing.T) {
	dir := t.TempDir()
	path, victim := filepath.Join(dir, machineSecret), filepath.Join(dir, "victim")
	write := func(path string) {
		t.Helper()
		if err := os.WriteFile(path, []byte("content"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(victim)
	if err := os.Symlink(victim, path); err != nil {
		t.Fatal(err)
	}
	for _, w := range []bool{false, true} {
		if _, err := openRegular(path, w); err == nil {
			t.Error("a symbolic link was followed")
		}
	}
	os.Remove(path)
	if err := unix.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := openRegular(path, false); err == nil {
		t.Error("a pipe was opened")
	}
	os.Remove(path)

	write(path)
	f, err := openRegular(path, true)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	moved := filepath.Join(dir, "moved")
	if err := os.Rename(path, moved); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(victim, path); err != nil {
		t.Fatal(err)
	}
	if err := shred(f); err == nil {
		t.Error("a file was removed that is another one by now")
	}
	if data, err := os.ReadFile(victim); err != nil || string(data) != "content" {
		t.Errorf("the other file has %q, %v", data, err)
	}
	if data, err := os.ReadFile(moved); err != nil || string(data) == "content" {
		t.Errorf("the key's file has %q, %v", data, err)
	}
}
