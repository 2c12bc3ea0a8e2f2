package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// nobody is a uid that owns nothing of kmsd.
const nobody = 65534

// TestSecondUserIsRefused runs kmsctl as another user of the machine: first against the sockets as they are made, then
// against sockets whose modes somebody has opened by mistake. The daemon itself must refuse then.
func TestSecondUserIsRefused(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("CI") != "" {
			t.Fatal("this test needs root to become a second user")
		}
		t.Skip("needs root to become a second user; the continuous integration runs it as root")
	}
	build(t)
	// Not t.TempDir: the other user has to get through.
	dir, err := os.MkdirTemp("", "kmsd-uid-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	tool := filepath.Join(dir, "kmsctl")
	program, err := os.ReadFile(filepath.Join(bin, "kmsctl"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(tool, program, 0o755); err != nil {
		t.Fatal(err)
	}
	message := filepath.Join(dir, "message")
	if err := os.WriteFile(message, []byte("message"), 0o644); err != nil {
		t.Fatal(err)
	}

	env := []string{"PATH=" + os.Getenv("PATH"), "HOME=" + dir}
	command := exec.Command(filepath.Join(bin, "kmsd"), "init", "--state-dir", filepath.Join(dir, "state"), "--enclave", "keyring:file", "--no-recovery")
	command.Env = env
	if out, err := command.CombinedOutput(); err != nil {
		t.Fatalf("init: %v\n%s", err, out)
	}
	daemon, err := startDaemon(dir, env)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { daemon.stop(syscall.SIGTERM) })

	as := func(uid uint32, args ...string) (code int, output string) {
		t.Helper()
		cmd := exec.Command(tool, args...)
		cmd.Env = env
		cmd.Dir = "/"
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &out
		err := cmd.Run()
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) {
			t.Fatalf("%v: %v", args, err)
		}
		return cmd.ProcessState.ExitCode(), out.String()
	}

	run := filepath.Join(dir, "run")
	if code, out := as(0, "--socket", run, "key", "create", "secret-application/key", "--alg", "ed25519"); code != 0 {
		t.Fatalf("the owner was refused: %s", out)
	}
	for _, socket := range []string{"kmsd.sock", "admin.sock"} {
		if code, out := as(nobody, "--socket", filepath.Join(run, socket), "status"); code != exitUnreachable || !strings.Contains(out, "permission denied") {
			t.Errorf("%s as it is made let uid %d in: exit %d, %s", socket, nobody, code, out)
		}
	}

	for path, mode := range map[string]os.FileMode{run: 0o755, filepath.Join(run, "kmsd.sock"): 0o666, filepath.Join(run, "admin.sock"): 0o666} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	for _, socket := range []string{"kmsd.sock", "admin.sock"} {
		socket = filepath.Join(run, socket)
		existing := ""
		for _, args := range [][]string{
			{"key", "show", "secret-application/key"},
			{"key", "show", "secret-application/none"},
			{"sign", "--key", "secret-application/key", "--in", message},
			{"verify", "--key", "secret-application/key", "--in", message, "--sig", message},
			{"public", "secret-application/key"},
			{"key", "create", "other/key", "--alg", "ed25519"},
			{"key", "rotate", "secret-application/key"},
			{"key", "destroy", "secret-application/key", "--now", "--yes"},
			{"encrypt", "--key", "secret-application/key", "--in", message},
			{"key", "list", "secret-application"},
			{"key", "list"},
			{"lock"},
			{"unlock", "--auto"},
			{"slot", "list"},
			{"slot", "add", "recovery"},
			{"slot", "remove", "1", "--yes"},
			{"store", "rotate-epoch"},
			{"audit", "tail"},
			{"backup", "create", "--to", "age1lggyhqrw2nlhcxprm67z43rta597azn8gknawjehu9d9dl0jq3yqqvfafg"},
		} {
			code, out := as(nobody, append([]string{"--socket", socket}, args...)...)
			// A listing may be empty rather than refused; it must not show anything.
			if code == exitOK && args[1] == "list" && !strings.Contains(out, "secret-application") && args[0] == "key" {
				continue
			}
			if code != exitFailed && code != exitUnreachable {
				t.Errorf("%s: %v as uid %d ended with %d: %s", filepath.Base(socket), args, nobody, code, out)
			}
			// Whether a key exists must not show.
			if args[0] == "key" && args[1] == "show" {
				out = strings.ReplaceAll(strings.ReplaceAll(out, "/key", "/x"), "/none", "/x")
				if existing == "" {
					existing = out
				} else if out != existing {
					t.Errorf("%s: the answer tells whether the key exists:\n%s\n%s", filepath.Base(socket), existing, out)
				}
			}
		}
	}

	// After all this the owner finds everything as it was, and the refusals on record.
	if code, out := as(0, "--socket", run, "--json", "key", "show", "secret-application/key"); code != 0 || !strings.Contains(out, `"current": 1`) {
		t.Errorf("the key has changed: exit %d, %s", code, out)
	}
	deadline := time.Now().Add(10 * time.Second)
	for {
		code, out := as(0, "--socket", run, "--json", "audit", "tail", "-n", "200")
		if code == 0 && strings.Contains(out, fmt.Sprintf(`"uid": %d`, nobody)) && strings.Contains(out, `"allowed": false`) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the refusals are not in the audit log: exit %d, %s", code, out)
		}
		time.Sleep(200 * time.Millisecond)
	}
}
