package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/enclave/recovery"
	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/secmem"
	"github.com/kmsd-project/kmsd/kmsd/programs"
)

// binaries are the real programs.
var binaries = programs.New("kmsd", "enclave/keyring/kmsd-keyring", "enclave/pkcs11/kmsd-pkcs11")

// program returns the path of a real kmsd with its helper beside it.
func program(t *testing.T) string {
	t.Helper()
	return filepath.Join(binaries.Dir(t), "kmsd")
}

// tokenEnv is how the programs find the software token of a test that has one.
func tokenEnv() []string {
	if path := os.Getenv("SOFTHSM2_CONF"); path != "" {
		return []string{"SOFTHSM2_CONF=" + path}
	}
	return nil
}

// initRun is one run of kmsd init without a terminal.
type initRun struct {
	code        int
	out, errors string
}

func runInitProgram(t *testing.T, configure func(*exec.Cmd), args ...string) initRun {
	t.Helper()
	cmd := exec.Command(program(t), append([]string{"init"}, args...)...)
	cmd.Env = append(tokenEnv(), "HOME="+t.TempDir()) // no XDG_RUNTIME_DIR, no PATH
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if configure != nil {
		configure(cmd)
	}
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return initRun{cmd.ProcessState.ExitCode(), out.String(), errs.String()}
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// openedBy opens the keystore in dir with a recovery key.
func openedBy(t *testing.T, dir string, a enclave.Auth) error {
	t.Helper()
	arena, err := secmem.NewArena(64 << 10)
	if err != nil {
		t.Fatal(err)
	}
	defer arena.Close()
	s, err := keystore.Open(t.Context(), keystore.Config{Dir: dir, Arena: arena})
	if err != nil {
		return err
	}
	defer s.Close()
	return newSlotRig(t).unlock(t.Context(), s, attempt{Auth: a})
}

func TestInitWritesTheRecoveryKey(t *testing.T) {
	dir := t.TempDir()
	state, key := filepath.Join(dir, "state"), filepath.Join(dir, "recovery.txt")
	run := runInitProgram(t, nil, "--state-dir", state, "--recovery-out", key)
	if run.code != 0 || run.out != "" {
		t.Fatalf("%+v", run)
	}
	text, err := os.ReadFile(key)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(key); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if _, err := recovery.ParseKey(text); err != nil || !bytes.HasSuffix(text, []byte("\n")) {
		t.Errorf("%q: %v", text, err)
	}
	if strings.Contains(run.errors, string(bytes.TrimSpace(text))) {
		t.Error("the recovery key was also printed")
	}
	if err := openedBy(t, state, enclave.Auth{Secret: text}); err != nil {
		t.Errorf("the recovery key does not open the store: %v", err)
	}
	again := runInitProgram(t, nil, "--state-dir", state, "--recovery-out", filepath.Join(dir, "other"))
	if again.code != 1 || !strings.Contains(again.errors, "hint:") || exists(filepath.Join(dir, "other")) {
		t.Errorf("second init: %+v", again)
	}
	if now, err := os.ReadFile(key); err != nil || !bytes.Equal(now, text) {
		t.Error("the recovery file changed")
	}
}

func TestInitRefusals(t *testing.T) {
	dir := t.TempDir()
	state, taken := filepath.Join(dir, "state"), filepath.Join(dir, "taken")
	if err := os.WriteFile(taken, []byte("something else"), 0o600); err != nil {
		t.Fatal(err)
	}
	full := filepath.Join(dir, "full")
	if err := os.MkdirAll(filepath.Join(full, "sub"), 0o755); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name string
		code int
		says string
		args []string
	}{
		{"no terminal and no word about recovery", 1, "hint: give --recovery-out FILE", []string{"--state-dir", state}},
		{"both recovery flags", 2, "exclude", []string{"--state-dir", state, "--no-recovery", "--recovery-out", filepath.Join(dir, "r")}},
		{"recovery file that exists", 1, "hint: choose another file", []string{"--state-dir", state, "--recovery-out", taken}},
		{"recovery file in no directory", 1, "hint:", []string{"--state-dir", state, "--recovery-out", filepath.Join(dir, "no", "r")}},
		{"device that is not there", 1, "not there", []string{"--state-dir", state, "--no-recovery", "--enclave", "tpm:/nonexistent/tpm"}},
		{"PCRs without a way back", 1, "hint: prove with kmsctl slot test", []string{"--state-dir", state, "--no-recovery", "--enclave", "tpm:/nonexistent/tpm?pcrs=7"}},
		{"token without its PIN", 1, "hint: give the PIN with --pin-file", []string{"--state-dir", state, "--no-recovery", "--enclave", "pkcs11:/nonexistent/m.so?token=t"}},
		{"enclave of nobody", 1, "keyring:file", []string{"--state-dir", state, "--no-recovery", "--enclave", "what"}},
		{"recovery alone without it", 1, "needs one", []string{"--state-dir", state, "--no-recovery", "--enclave", "recovery"}},
		{"escrow recipient of nobody", 1, "none of age", []string{"--state-dir", state, "--no-recovery", "--escrow-to", "age1what"}},
		{"PIN for a keyring", 1, "takes no PIN", []string{"--state-dir", state, "--no-recovery", "--pin-file", taken}},
		{"PIN file that is not there", 1, "no such file", []string{"--state-dir", state, "--no-recovery", "--pin-file", filepath.Join(dir, "no")}},
		{"unknown flag", 2, "flag provided but not defined", []string{"--what"}},
		{"argument", 2, "unexpected argument", []string{"--state-dir", state, "what"}},
		{"state directory open to others and in use", 1, "hint:", []string{"--state-dir", full, "--no-recovery"}},
		{"state directory is a link", 1, "not a directory", []string{"--state-dir", link, "--no-recovery"}},
	} {
		run := runInitProgram(t, nil, test.args...)
		if run.code != test.code || !strings.Contains(run.errors, test.says) || run.out != "" {
			t.Errorf("%s: exit %d, %q, want %d and %q", test.name, run.code, run.errors, test.code, test.says)
		}
		if exists(filepath.Join(state, "keyring", "items")) {
			if left, _ := os.ReadDir(filepath.Join(state, "keyring", "items")); len(left) != 0 {
				t.Errorf("%s: left %v", test.name, left)
			}
		}
	}
	// None of that stands in the way.
	if run := runInitProgram(t, nil, "--state-dir", state, "--no-recovery"); run.code != 0 {
		t.Errorf("after the refusals: %+v", run)
	}
	if now, _ := os.ReadFile(taken); string(now) != "something else" {
		t.Error("a file that was there changed")
	}
}

func TestInitClosesAnEmptyDirectory(t *testing.T) {
	state := t.TempDir()
	if err := os.Chmod(state, 0o755); err != nil {
		t.Fatal(err)
	}
	if run := runInitProgram(t, nil, "--state-dir", state, "--no-recovery"); run.code != 0 {
		t.Fatalf("%+v", run)
	}
	if info, err := os.Stat(state); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("mode %v", info.Mode())
	}
}

// Root prepares the store of somebody else, and leaves nothing in it that is root's.
func TestInitAsRootBecomesTheOwner(t *testing.T) {
	asRoot(t)
	const uid = 65534
	dir, err := os.MkdirTemp("", "kmsd-owner")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	state := filepath.Join(dir, "state")
	for path, mode := range map[string]os.FileMode{dir: 0o755, state: 0o700} {
		os.Mkdir(path, mode)
		if err := errors.Join(os.Chmod(path, mode), os.Chown(path, uid, uid)); err != nil {
			t.Fatal(err)
		}
	}
	key := filepath.Join(dir, "recovery")
	if run := runInitProgram(t, nil, "--state-dir", state, "--recovery-out", key); run.code != 0 {
		t.Fatalf("%+v", run)
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
		if stat := info.Sys().(*syscall.Stat_t); stat.Uid != uid || stat.Gid != uid {
			t.Errorf("%s belongs to %d:%d", path, stat.Uid, stat.Gid)
		}
		return nil
	})
	if err != nil || files < 6 {
		t.Errorf("%d files, %v", files, err)
	}
	// A directory that root would have to make in somebody's home is refused.
	run := runInitProgram(t, nil, "--state-dir", filepath.Join(dir, "a", "b"), "--no-recovery")
	if run.code != 1 || !strings.Contains(run.errors, "hint: make the directory first") || exists(filepath.Join(dir, "a")) {
		t.Errorf("%+v", run)
	}
}

// Killed at any moment, init leaves either a whole keystore or nothing that stops the next init.
func TestInitKilled(t *testing.T) {
	whole, rounds := 0, 30
	if testing.Short() {
		rounds = 8
	}
	for i := range rounds {
		dir := t.TempDir()
		state := filepath.Join(dir, "state")
		cmd := exec.Command(program(t), "init", "--state-dir", state, "--recovery-out", filepath.Join(dir, "first"))
		cmd.Env = []string{"HOME=" + dir}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(i) * 120 * time.Millisecond / time.Duration(rounds))
		cmd.Process.Kill()
		cmd.Wait()
		run := runInitProgram(t, nil, "--state-dir", state, "--recovery-out", filepath.Join(dir, "second"))
		switch {
		case run.code == 0:
		case strings.Contains(run.errors, keystore.ErrStoreExists.Error()):
			whole++
			text, err := os.ReadFile(filepath.Join(dir, "first"))
			if err != nil {
				t.Fatalf("round %d: a keystore without its recovery key: %v", i, err)
			}
			if err := openedBy(t, state, enclave.Auth{Secret: text}); err != nil {
				t.Fatalf("round %d: %v", i, err)
			}
		default:
			t.Fatalf("round %d: %+v", i, run)
		}
	}
	t.Logf("%d of %d were whole", whole, rounds)
}

// terminal is the master side of a pseudo-terminal and what came out of it so far.
type terminal struct {
	t      *testing.T
	master *os.File
	mu     sync.Mutex
	screen bytes.Buffer
	cmd    *exec.Cmd
	hungUp chan struct{} // closed when everybody has let go of the terminal and all of it is on the screen
}

// startOnTerminal runs kmsd init as somebody at a terminal does.
func startOnTerminal(t *testing.T, args ...string) *terminal {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	number, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	slave, err := os.OpenFile("/dev/pts/"+strconv.Itoa(number), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer slave.Close()
	x := &terminal{t: t, master: master, hungUp: make(chan struct{}), cmd: exec.Command(program(t), append([]string{"init"}, args...)...)}
	x.cmd.Stdin, x.cmd.Stdout, x.cmd.Stderr = slave, slave, slave
	x.cmd.Env = []string{"HOME=" + t.TempDir()}
	x.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := x.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		x.cmd.Process.Kill()
		x.cmd.Wait()
		master.Close()
	})
	go func() {
		defer close(x.hungUp)
		buffer := make([]byte, 4096)
		for {
			n, err := master.Read(buffer)
			x.mu.Lock()
			x.screen.Write(buffer[:n])
			x.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	return x
}

func (x *terminal) text() string {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.screen.String()
}

// expect waits until the screen shows the text.
func (x *terminal) expect(text string) {
	x.t.Helper()
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if strings.Contains(x.text(), text) {
			return
		}
	}
	x.t.Fatalf("no %q on the screen:\n%s", text, x.text())
}

func (x *terminal) press(keys string) {
	x.t.Helper()
	if _, err := io.WriteString(x.master, keys); err != nil {
		x.t.Fatal(err)
	}
}

func (x *terminal) exit() int {
	x.cmd.Wait()
	select {
	case <-x.hungUp:
	case <-time.After(10 * time.Second):
		x.t.Error("somebody still has the terminal open")
	}
	return x.cmd.ProcessState.ExitCode()
}

var keyOnScreen = regexp.MustCompile(`K[0-9A-Z]{6}(-[0-9A-Z]{7}){7}`)

func TestInitDialogue(t *testing.T) {
	for _, test := range []struct{ name, answer, kind string }{
		{"default", "\n", "keyring:file"},
		{"number", "1\n", "keyring:file"},
		{"name", "keyring:file\n", "keyring:file"},
		{"other", "2\n", "recovery"},
		{"after a mistake", "7\n1\n", "keyring:file"},
	} {
		t.Run(test.name, func(t *testing.T) {
			state := filepath.Join(t.TempDir(), "state")
			x := startOnTerminal(t, "--state-dir", state)
			x.expect("Choice [1]: ")
			for _, want := range []string{"keyring:file", "not against root or theft of the whole disk", "recovery"} {
				if !strings.Contains(x.text(), want) {
					t.Errorf("no %q on the screen:\n%s", want, x.text())
				}
			}
			x.press(test.answer)
			x.expect("Press Enter when you have it on paper")
			if there, err := keystore.Exists(state); err != nil || there {
				t.Error("the keystore was made before anybody had the recovery key")
			}
			keys := keyOnScreen.FindAllString(x.text(), -1)
			if len(keys) != 1 {
				t.Fatalf("%d recovery keys on the screen:\n%s", len(keys), x.text())
			}
			x.press("\n")
			x.expect("made keystore")
			if code := x.exit(); code != 0 {
				t.Fatalf("exit %d:\n%s", code, x.text())
			}
			if n := len(keyOnScreen.FindAllString(x.text(), -1)); n != 1 {
				t.Errorf("the recovery key is on the screen %d times", n)
			}
			if !strings.Contains(x.text(), "slot 1  "+test.kind) {
				t.Errorf("slots:\n%s", x.text())
			}
			if err := openedBy(t, state, enclave.Auth{Secret: []byte(strings.ToLower(keys[0]))}); err != nil {
				t.Errorf("the key on the screen does not open the store: %v", err)
			}
		})
	}
}

// With --enclave nothing is asked, but the recovery key is shown all the same.
func TestInitOnATerminalWithEnclave(t *testing.T) {
	x := startOnTerminal(t, "--state-dir", filepath.Join(t.TempDir(), "state"), "--enclave", "auto")
	x.expect("Press Enter")
	if strings.Contains(x.text(), "Choice") {
		t.Errorf("asked:\n%s", x.text())
	}
	x.press("\n")
	x.expect("made keystore")
	if code := x.exit(); code != 0 {
		t.Errorf("exit %d", code)
	}
}

func TestInitOnATerminalToAFile(t *testing.T) {
	dir := t.TempDir()
	x := startOnTerminal(t, "--state-dir", filepath.Join(dir, "state"), "--recovery-out", filepath.Join(dir, "key"))
	x.expect("Choice [1]: ")
	x.press("\n")
	x.expect("made keystore")
	if code := x.exit(); code != 0 || keyOnScreen.MatchString(x.text()) {
		t.Errorf("exit %d:\n%s", code, x.text())
	}
	if !exists(filepath.Join(dir, "key")) {
		t.Error("no recovery file")
	}
}

// Somebody goes away: Ctrl-C, Ctrl-D or a closed window, at either question. Nothing is made, and nothing is in the way.
func TestInitAbandoned(t *testing.T) {
	for _, test := range []struct{ name, at, keys string }{
		{"Ctrl-C at the choice", "Choice", "\x03"},
		{"Ctrl-D at the choice", "Choice", "\x04"},
		{"Ctrl-C at the key", "Press Enter", "\x03"},
		{"Ctrl-D at the key", "Press Enter", "\x04"},
		{"wrong answers", "Choice", "x\ny\nz\n"},
		{"a very long answer", "Choice", strings.Repeat("x", 300) + "\n"},
	} {
		t.Run(test.name, func(t *testing.T) {
			state := filepath.Join(t.TempDir(), "state")
			x := startOnTerminal(t, "--state-dir", state)
			x.expect("Choice")
			if test.at != "Choice" {
				x.press("\n")
				x.expect(test.at)
			}
			x.press(test.keys)
			if code := x.exit(); code == 0 {
				t.Fatalf("exit 0:\n%s", x.text())
			}
			if exists, err := keystore.Exists(state); err != nil || exists {
				t.Errorf("there is a keystore (%v)", err)
			}
			if run := runInitProgram(t, nil, "--state-dir", state, "--no-recovery"); run.code != 0 {
				t.Errorf("next init: %+v", run)
			}
		})
	}
}

// The recovery key is nowhere but on the terminal: not in the state directory, not among arguments or in the environment.
func TestRecoveryKeyLeavesNoTrace(t *testing.T) {
	asRoot(t) // the environment of kmsd is hidden from others
	state := filepath.Join(t.TempDir(), "state")
	x := startOnTerminal(t, "--state-dir", state)
	x.expect("Choice")
	x.press("\n")
	x.expect("Press Enter")
	key := []byte(keyOnScreen.FindString(x.text()))
	group := key[16:23]
	for _, name := range []string{"cmdline", "environ"} {
		content, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", x.cmd.Process.Pid, name))
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(content, group) {
			t.Errorf("the key is in %s", name)
		}
	}
	x.press("\n")
	x.expect("made keystore")
	x.exit()
	files := 0
	filepath.WalkDir(state, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			files++
			if content, err := os.ReadFile(path); err != nil || bytes.Contains(content, group) {
				t.Errorf("%s: the key is in it, or %v", path, err)
			}
		}
		return nil
	})
	if files < 3 {
		t.Errorf("only %d files were looked at", files)
	}
}
