//go:build linux

package client_test

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// TestPython runs the client that was written in another language from docs/protocol.md.
func TestPython(t *testing.T) {
	python, err := exec.LookPath("python3")
	if err != nil {
		t.Fatal("python3 is needed for this test: apt-get install python3-minimal")
	}
	socket := filepath.Join(sharedDaemon(t).runtime, "kmsd.sock")
	run := func(args ...string) []byte {
		t.Helper()
		args = append([]string{"../docs/examples/python/kmsd_client.py", "--socket", socket}, args...)
		out, err := exec.Command(python, args...).CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %v\n%s", args, err, out)
		}
		return out
	}
	var me struct {
		UID int `json:"uid"`
	}
	if err := json.Unmarshal(run("whoami"), &me); err != nil || me.UID != os.Getuid() {
		t.Errorf("whoami: %+v, %v", me, err)
	}
	run("demo", "python")
	// Its keys are keys like any other.
	key, err := dial(t).Key(t.Context(), "python/signing")
	if err != nil || key.Algorithm() != "ecdsa-p256" {
		t.Errorf("%v", err)
	}
}
