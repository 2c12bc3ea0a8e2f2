package packaging

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// insideEnv names the directory of the installation to the part of the test that runs in a mount namespace of its own.
const insideEnv = "KMSD_PACKAGING_INSIDE"

// TestSystemInstallation installs kmsd, makes its users with systemd's own tool, and runs it as its units say: kmsd and the keyring helper
// as two users with sockets that systemd passes. The users exist in a mount namespace of the test alone.
func TestSystemInstallation(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("CI") != "" {
			t.Fatal("this test needs root to become the users of kmsd")
		}
		t.Skip("needs root to become the users of kmsd; the continuous integration runs it as root")
	}
	dir, err := os.MkdirTemp("", "kmsd-system-") // not t.TempDir, which is for us alone
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	installed(t, dir)
	// The new users are made beside those of the machine, so that their numbers are nobody else's.
	root := filepath.Join(dir, "root")
	for _, file := range []string{"/etc/passwd", "/etc/group"} {
		to := filepath.Join(root, file)
		b, err := os.ReadFile(file)
		if err := errors.Join(err, os.MkdirAll(filepath.Dir(to), 0o755), os.WriteFile(to, b, 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	for _, step := range [][]string{
		{"systemd-sysusers", "--root=" + root, filepath.Join(dir, "lib/sysusers.d/kmsd.conf")},
		{"systemd-tmpfiles", "--root=" + root, "--create", filepath.Join(dir, "lib/tmpfiles.d/kmsd.conf")},
	} {
		if out, err := exec.Command(step[0], step[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%q: %v\n%s", step, err, out)
		}
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("unshare", "--mount", "--propagation", "private", "sh", "-c",
		`mount --bind "$1/etc/passwd" /etc/passwd && mount --bind "$1/etc/group" /etc/group && shift && exec "$@"`,
		"sh", root, self, "-test.run=^TestInsideTheNamespace$", "-test.v")
	cmd.Env = append(os.Environ(), insideEnv+"="+dir)
	out, err := cmd.CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte("--- PASS: TestInsideTheNamespace")) {
		t.Errorf("%v\n%s", err, out)
	}
}

// systemRun is the installation as the test within the namespace sees it.
type systemRun struct {
	*testing.T
	dir, units, state, sockets, helpers string
}

func TestInsideTheNamespace(t *testing.T) {
	dir := os.Getenv(insideEnv)
	if dir == "" {
		return // TestSystemInstallation runs this
	}
	r := &systemRun{T: t, dir: dir, units: filepath.Join(dir, "lib/systemd/system"), state: filepath.Join(dir, "root/var/lib/kmsd"),
		sockets: filepath.Join(dir, "run"), helpers: filepath.Join(dir, "run-helper")}
	for _, d := range []string{r.sockets, r.helpers} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	const application, stranger = 4711, 4712
	config := filepath.Join(dir, "etc/kmsd/kmsd.toml")
	shipped, err := os.ReadFile(config)
	if err != nil {
		t.Fatal(err)
	}
	text := fmt.Sprintf("state_dir = %q\npolicy_file = %q\n%s\n[helpers]\ndir = %q\nkeyring_state = %q\n", r.state,
		filepath.Join(dir, "etc/kmsd/policy.toml"), shipped, r.helpers, filepath.Join(dir, "root/var/lib/kmsd-keyring"))
	policy := fmt.Sprintf("version = 1\n[applications]\nbilling = [%d]\n", application)
	if err := errors.Join(os.WriteFile(config, []byte(text), 0o644), os.WriteFile(filepath.Join(dir, "etc/kmsd/policy.toml"), []byte(policy), 0o644)); err != nil {
		t.Fatal(err)
	}

	// kmsd init has no unit that would give it the group of the TPM.
	if u, err := user.Lookup("kmsd"); err != nil {
		t.Fatal(err)
	} else if groups, err := u.GroupIds(); err != nil || len(groups) != 2 {
		t.Errorf("kmsd is in the groups %q, want its own and tss; error %v", groups, err)
	} else if g, err := user.LookupGroup("tss"); err != nil || !slices.Contains(groups, g.Gid) {
		t.Errorf("kmsd is in the groups %q, and not in tss (%+v); error %v", groups, g, err)
	}

	// kmsd init, as root: nothing of what it makes belongs to root, and the secret of the machine is not kmsd's.
	keyring := r.activate("kmsd-keyring.service", "", map[string]string{"kmsd-keyring.socket": filepath.Join(r.helpers, "keyring.sock")})
	if out, err := exec.Command(filepath.Join(dir, "bin/kmsd"), "init", "--config", config, "--enclave", "keyring:file", "--no-recovery").CombinedOutput(); err != nil {
		t.Fatalf("kmsd init: %v\n%s", err, out)
	}
	r.owned(r.state, "kmsd")
	r.owned(filepath.Join(dir, "root/var/lib/kmsd-keyring"), "kmsd-keyring")
	if _, err := os.Stat(filepath.Join(r.state, "keyring")); err == nil {
		t.Error("the machine secret is beside the keystore")
	}

	daemon := r.activate("kmsd.service", "", map[string]string{
		"kmsd.socket": filepath.Join(r.sockets, "kmsd.sock"), "kmsd-admin.socket": filepath.Join(r.sockets, "admin.sock")})
	var status struct{ State, Mode string }
	if err := json.Unmarshal([]byte(r.must(0, "--json", "status")), &status); err != nil || status.State != "ready" || status.Mode != "system" {
		t.Errorf("status %+v, error %v", status, err)
	}
	r.runsAs(daemon, "kmsd")
	r.runsAs(keyring, "kmsd-keyring")

	// Who may use which key is decided by the kernel's word for who asks.
	r.must(0, "key", "create", "billing/invoices", "--alg", "ecdsa-p256")
	in := filepath.Join(dir, "invoice")
	if err := os.WriteFile(in, []byte("an invoice\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	r.must(application, "sign", "--key", "billing/invoices", "--in", in)
	for _, refused := range [][]string{{"sign", "--key", "billing/invoices", "--in", in}, {"status"}} {
		uid := stranger
		if refused[0] == "status" { // the sockets of administration and of the helpers are closed to applications
			for _, path := range []string{filepath.Join(r.sockets, "admin.sock"), filepath.Join(r.helpers, "keyring.sock")} {
				if out, err := r.kmsctl(uid, "--socket", path, "whoami"); err == nil {
					t.Errorf("uid %d may open %s: %s", uid, path, out)
				}
			}
			continue
		}
		if out, err := r.kmsctl(uid, refused...); err == nil || !strings.Contains(out, "not_available") {
			t.Errorf("uid %d %q: %v\n%s", uid, refused, err, out)
		}
	}

	// A helper that dies is missed only until there is another; kmsd is not started again for it.
	r.must(0, "slot", "test", "1")
	keyring.Process.Kill()
	keyring.Wait()
	os.Remove(filepath.Join(r.helpers, "keyring.sock"))
	if out, err := r.kmsctl(0, "slot", "test", "1"); err == nil || !strings.Contains(out, "kmsd-keyring.socket") {
		t.Errorf("without a helper: %v\n%s", err, out)
	}
	// One that is not the helper's user is not believed, although root has made its socket.
	impostor := r.activate("kmsd-keyring.service", strconv.Itoa(stranger), map[string]string{"kmsd-keyring.socket": filepath.Join(r.helpers, "keyring.sock")})
	if out, err := r.kmsctl(0, "slot", "test", "1"); err == nil || !strings.Contains(out, "another user speaks for the helper") {
		t.Errorf("an impostor: %v\n%s", err, out)
	}
	impostor.Process.Kill()
	impostor.Wait()
	os.Remove(filepath.Join(r.helpers, "keyring.sock"))
	r.activate("kmsd-keyring.service", "", map[string]string{"kmsd-keyring.socket": filepath.Join(r.helpers, "keyring.sock")})
	r.must(0, "slot", "test", "1")

	// A token is reached by a helper with another user again, who alone can open the token's files.
	module, pin := r.token("kmsd-pkcs11")
	r.activate("kmsd-pkcs11.service", "", map[string]string{"kmsd-pkcs11.socket": filepath.Join(r.helpers, "pkcs11.sock")},
		"SOFTHSM2_CONF="+filepath.Join(dir, "softhsm2.conf"))
	r.must(0, "slot", "add", "pkcs11:"+module+"?token=kmsd", "--pin-file", pin)
	r.must(0, "key", "create", "billing/token", "--alg", "ecdsa-p256", "--protection", "hsm")
	r.must(application, "sign", "--key", "billing/token", "--in", in)
	// One process holds the module for everybody: what ends there for one must not end for the others.
	r.must(0, "slot", "add", "pkcs11:"+module+"?token=kmsd", "--pin-file", pin, "--label", "another")
	r.must(application, "sign", "--key", "billing/token", "--in", in)
	r.must(0, "slot", "remove", "3", "--yes")
	r.must(application, "sign", "--key", "billing/token", "--in", in)
	r.must(0, "lock")
	if out, err := r.kmsctl(application, "sign", "--key", "billing/token", "--in", in); err == nil {
		t.Errorf("a key of the token signs while the keystore is locked: %s", out)
	}
	r.must(0, "unlock", "--slot", "2", "--pin-file", pin)
	r.must(application, "sign", "--key", "billing/token", "--in", in)

	daemon.Process.Signal(syscall.SIGTERM)
	if err := daemon.Wait(); err != nil {
		t.Errorf("kmsd ends with %v", err)
	}
}

// activate starts what a unit starts when somebody connects to its sockets, as the user of the unit or another.
func (r *systemRun) activate(unit, as string, sockets map[string]string, env ...string) *exec.Cmd {
	r.Helper()
	var args []string
	for _, path := range sockets {
		args = append(args, "--listen", path)
	}
	path := filepath.Join(r.units, unit)
	name := setting(r.T, path, "User")
	u, err := user.Lookup(name)
	if err != nil {
		r.Fatal(err)
	}
	uid := u.Uid
	if as != "" {
		uid = as
	}
	args = append(args, "setpriv", "--reuid", uid, "--regid", u.Gid, "--inh-caps=-all", "--no-new-privs", "--clear-groups")
	cmd := exec.Command("systemd-socket-activate", append(args, strings.Fields(setting(r.T, path, "ExecStart"))...)...)
	cmd.Env = append(env, "PATH=/usr/bin:/bin")
	for _, v := range env { // systemd-socket-activate hands on what it is told to
		cmd.Args = slices.Insert(cmd.Args, 1, "--setenv="+v)
	}
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		r.Fatal(err)
	}
	r.Cleanup(func() {
		if cmd.ProcessState == nil {
			cmd.Process.Kill()
			cmd.Wait()
		}
		if r.Failed() {
			r.Logf("%s said:\n%s", unit, log.String())
		}
	})
	// systemd would give the sockets the mode and the group of their units.
	for socket, listen := range sockets {
		file := filepath.Join(r.units, socket)
		mode, err := strconv.ParseUint(setting(r.T, file, "SocketMode"), 8, 32)
		if err != nil {
			r.Fatal(err)
		}
		gid := 0
		if mode&0o060 != 0 && mode&0o006 == 0 {
			g, err := user.LookupGroup(setting(r.T, file, "SocketGroup"))
			if err != nil {
				r.Fatal(err)
			}
			gid, _ = strconv.Atoi(g.Gid)
		}
		for end := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
			err = errors.Join(os.Chmod(listen, fs.FileMode(mode)), os.Chown(listen, 0, gid))
			if err == nil {
				break
			}
			if time.Now().After(end) {
				r.Fatalf("%s: %v\n%s", unit, err, log.String())
			}
		}
	}
	return cmd
}

// token makes a token of SoftHSM that belongs to a user, and returns the module and a file with the PIN.
func (r *systemRun) token(name string) (module, pin string) {
	r.Helper()
	modules, err := filepath.Glob("/usr/lib*/softhsm/libsofthsm2.so")
	if more, _ := filepath.Glob("/usr/lib*/*/softhsm/libsofthsm2.so"); err == nil {
		modules = append(modules, more...)
	}
	if len(modules) == 0 {
		r.Fatal("SoftHSM is not installed")
	}
	u, err := user.Lookup(name)
	if err != nil {
		r.Fatal(err)
	}
	uid, _ := strconv.Atoi(u.Uid)
	tokens, conf := filepath.Join(r.dir, "tokens"), filepath.Join(r.dir, "softhsm2.conf")
	pin = filepath.Join(r.dir, "pin")
	if err := errors.Join(os.Mkdir(tokens, 0o700), os.Chown(tokens, uid, uid), os.WriteFile(pin, []byte("31415926\n"), 0o600),
		os.WriteFile(conf, []byte("directories.tokendir = "+tokens+"\nobjectstore.backend = file\nlog.level = ERROR\n"), 0o644)); err != nil {
		r.Fatal(err)
	}
	cmd := exec.Command("setpriv", "--reuid", u.Uid, "--regid", u.Gid, "--clear-groups",
		"softhsm2-util", "--init-token", "--free", "--label", "kmsd", "--pin", "31415926", "--so-pin", "27182818")
	cmd.Env = []string{"PATH=/usr/bin:/bin", "SOFTHSM2_CONF=" + conf}
	if out, err := cmd.CombinedOutput(); err != nil {
		r.Fatalf("softhsm2-util: %v\n%s", err, out)
	}
	return modules[0], pin
}

// kmsctl runs kmsctl as a user and returns what it prints.
func (r *systemRun) kmsctl(uid int, args ...string) (string, error) {
	cmd := exec.Command(filepath.Join(r.dir, "bin/kmsctl"), args...)
	cmd.Env = []string{"HOME=/nonexistent", "KMSD_SOCKET=" + r.sockets}
	cmd.Dir = "/"
	if uid != 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}}
	}
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func (r *systemRun) must(uid int, args ...string) string {
	r.Helper()
	out, err := r.kmsctl(uid, args...)
	if err != nil {
		r.Fatalf("uid %d: kmsctl %q: %v\n%s", uid, args, err, out)
	}
	return out
}

// owned checks that everything below a directory belongs to a user and is closed to others.
func (r *systemRun) owned(dir, name string) {
	r.Helper()
	u, err := user.Lookup(name)
	if err != nil {
		r.Fatal(err)
	}
	files := 0
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		files++
		if owner := strconv.Itoa(int(info.Sys().(*syscall.Stat_t).Uid)); owner != u.Uid || info.Mode().Perm()&0o077 != 0 {
			r.Errorf("%s belongs to uid %s, mode %v; want %s (%s)", path, owner, info.Mode(), u.Uid, name)
		}
		return nil
	})
	if err != nil || files < 3 {
		r.Errorf("%d files in %s, error %v", files, dir, err)
	}
}

// runsAs checks the user of a process.
func (r *systemRun) runsAs(cmd *exec.Cmd, name string) {
	r.Helper()
	u, err := user.Lookup(name)
	if err != nil {
		r.Fatal(err)
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", cmd.Process.Pid))
	if err != nil {
		r.Fatal(err)
	}
	if want := fmt.Sprintf("\nUid:\t%[1]s\t%[1]s\t%[1]s\t%[1]s\n", u.Uid); !strings.Contains(string(b), want) {
		r.Errorf("%s does not run as uid %s:\n%s", name, u.Uid, b)
	}
}
