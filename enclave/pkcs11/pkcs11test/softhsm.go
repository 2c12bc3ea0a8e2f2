// Package pkcs11test gives tests a PKCS#11 token of their own, in SoftHSM. It must not be imported outside tests.
package pkcs11test

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// What tests call the token, and the PIN of its user.
const (
	Label = "kmsd test"
	PIN   = "1234567"

	soPIN = "87654321"
)

// SoftHSM is a directory of tokens with one token in it.
type SoftHSM struct {
	Dir    string // for the test; the tokens are in Dir/tokens
	Module string // path of the module
}

// New makes a token that this process and those that inherit SOFTHSM2_CONF from it see, and no other.
func New(t *testing.T) *SoftHSM {
	t.Helper()
	h := &SoftHSM{Dir: t.TempDir(), Module: module(t)}
	if err := os.Mkdir(h.tokens(), 0o700); err != nil {
		t.Fatal(err)
	}
	config := filepath.Join(h.Dir, "softhsm2.conf")
	content := "directories.tokendir = " + h.tokens() + "\nobjectstore.backend = file\nlog.level = ERROR\n"
	if err := os.WriteFile(config, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SOFTHSM2_CONF", config)
	h.AddToken(t, Label)
	return h
}

// module finds what the package softhsm2 of a distribution installs.
func module(t *testing.T) string {
	t.Helper()
	for _, path := range []string{"/usr/lib/softhsm/libsofthsm2.so", "/usr/lib64/softhsm/libsofthsm2.so", "/usr/lib64/pkcs11/libsofthsm2.so"} {
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	t.Fatal("SoftHSM is not installed: apt-get install softhsm2")
	return ""
}

func (h *SoftHSM) tokens() string { return filepath.Join(h.Dir, "tokens") }

// AddToken makes another token, with the same PIN.
func (h *SoftHSM) AddToken(t *testing.T, label string) {
	t.Helper()
	util(t, "--init-token", "--free", "--label", label, "--pin", PIN, "--so-pin", soPIN)
}

// InitialiseAgain does what another process may do any time: the token keeps its label, its PIN, and even its serial.
func (h *SoftHSM) InitialiseAgain(t *testing.T) {
	t.Helper()
	util(t, "--init-token", "--token", Label, "--label", Label, "--pin", PIN, "--so-pin", soPIN, "--force")
}

// DeleteToken deletes a token for ever.
func (h *SoftHSM) DeleteToken(t *testing.T, serial string) {
	t.Helper()
	util(t, "--delete-token", "--serial", serial)
}

func util(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command("softhsm2-util", args...).CombinedOutput(); err != nil {
		t.Fatalf("softhsm2-util %v: %v\n%s", args, err, out)
	}
}

// Remove takes the only token away, and returns how to put it back.
func (h *SoftHSM) Remove(t *testing.T) (putBack func()) {
	t.Helper()
	all, err := filepath.Glob(filepath.Join(h.tokens(), "*"))
	if err != nil || len(all) != 1 {
		t.Fatalf("tokens %v, %v", all, err)
	}
	return move(t, all[0], filepath.Join(h.Dir, "away"))
}

// RemoveAll takes the whole reader away, and returns how to put it back.
func (h *SoftHSM) RemoveAll(t *testing.T) (putBack func()) {
	t.Helper()
	return move(t, h.tokens(), filepath.Join(h.Dir, "away"))
}

func move(t *testing.T, from, to string) (back func()) {
	t.Helper()
	if err := os.Rename(from, to); err != nil {
		t.Fatal(err)
	}
	return func() {
		t.Helper()
		if err := os.Rename(to, from); err != nil {
			t.Fatal(err)
		}
	}
}

// Objects is how many objects are in the tokens. SoftHSM names their files by an UUID.
func (h *SoftHSM) Objects(t *testing.T) int {
	t.Helper()
	all, err := filepath.Glob(filepath.Join(h.tokens(), "*", "*-*-*-*-*.object"))
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}
