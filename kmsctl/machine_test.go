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
