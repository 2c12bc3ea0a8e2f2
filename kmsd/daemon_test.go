package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsd-project/kmsd/ipc/proto"
)

// commandEnv makes the test binary the program under test: it runs command with its arguments.
const commandEnv = "KMSD_TEST_COMMAND"

func TestMain(m *testing.M) {
	// The daemon starts itself again as spawner and check-store, with an empty environment.
	if os.Getenv(commandEnv) != "" || len(os.Args) > 1 && (os.Args[1] == "spawner" || os.Args[1] == "check-store") {
		os.Exit(command(os.Args[1:]))
	}
	code := m.Run()
	binaries.Remove()
	os.Exit(code)
}

// process is a running kmsd.
type process struct {
	t          *testing.T
	cmd        *exec.Cmd
	dir        string
	lines      chan string
	app, admin string
}

func startDaemon(t *testing.T, dir string, args ...string) *process {
	t.Helper()
	p := &process{t: t, dir: dir, lines: make(chan string, 1000)}
	p.app, p.admin = filepath.Join(dir, "r", "kmsd.sock"), filepath.Join(dir, "r", "admin.sock")
	p.cmd = exec.Command("/proc/self/exe", append([]string{"run", "--state-dir", filepath.Join(dir, "s"), "--runtime-dir", filepath.Join(dir, "r")}, args...)...)
	p.cmd.Env = append(os.Environ(), commandEnv+"=1", "XDG_CONFIG_HOME="+dir)
	return p.start()
}

// start starts p.cmd and reads its log.
func (p *process) start() *process {
	p.t.Helper()
	stderr, err := p.cmd.StderrPipe()
	if err != nil {
		p.t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	go func() {
		defer close(p.lines)
		for s := bufio.NewScanner(stderr); s.Scan(); {
			p.lines <- s.Text()
		}
	}()
	p.t.Cleanup(func() { p.cmd.Process.Kill(); p.cmd.Wait() })
	return p
}

// waitLine waits for a line of the log with text in it and returns it, or what the process said before it ended.
func (p *process) waitLine(text string) (string, error) {
	var said []string
	timeout := time.After(20 * time.Second)
	for {
		select {
		case line, ok := <-p.lines:
			if !ok {
				return "", fmt.Errorf("ended, having said %q", said)
			}
			said = append(said, line)
			if strings.Contains(line, text) {
				return line, nil
			}
		case <-timeout:
			return "", fmt.Errorf("says only %q", said)
		}
	}
}

func (p *process) ready() *process {
	p.t.Helper()
	for {
		line, err := p.waitLine("ready")
		if err != nil {
			p.t.Fatal(err)
		}
		if line == "ready" {
			return p
		}
	}
}

func (p *process) stop() {
	p.t.Helper()
	p.cmd.Process.Signal(syscall.SIGTERM)
	if err := p.cmd.Wait(); err != nil {
		p.t.Errorf("kmsd ends with %v", err)
	}
}

func TestDaemonWithoutAKeystore(t *testing.T) {
	p := startDaemon(t, t.TempDir()).ready()
	app, admin := bound(t, p.app), bound(t, p.admin)
	admin.send(3, proto.OpStatus, &proto.Empty{}, nil)
	var status proto.Status
	admin.want(3, &status)
	if status.State != "uninitialised" || status.Mode != modeUser {
		t.Errorf("status %+v", status)
	}
	app.send(3, proto.OpSign, &proto.Sign{Key: "a"}, nil)
	app.wantError(3, proto.CodeUninitialised)
	app.send(4, proto.OpInit, &proto.Init{}, nil)
	app.wantError(4, proto.CodeUnknownOp) // on the admin socket only
	for path, want := range map[string]os.FileMode{
		filepath.Join(p.dir, "r"): 0o700 | os.ModeDir, filepath.Join(p.dir, "s"): 0o700 | os.ModeDir,
		p.app: 0o600 | os.ModeSocket, p.admin: 0o600 | os.ModeSocket,
	} {
		if info, err := os.Stat(path); err != nil || info.Mode() != want {
			t.Errorf("%s has mode %v, want %v; error %v", path, info.Mode(), want, err)
		}
	}
	p.stop()
	if _, err := os.Stat(p.app); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket stays behind: %v", err)
	}
}

// TestDaemonCannotBeRead: nothing of the same user may look into the process.
func TestDaemonCannotBeRead(t *testing.T) {
	p := startDaemon(t, t.TempDir()).ready()
	pid := p.cmd.Process.Pid
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", pid))
	if err != nil {
		t.Fatal(err)
	}
	found := false
	for line := range strings.Lines(string(status)) {
		if f := strings.Fields(line); strings.HasPrefix(line, "Max core file size") {
			found = f[4] == "0" && f[5] == "0"
		}
	}
	if !found {
		t.Errorf("core dumps are possible:\n%s", status)
	}
	// An undumpable process's files in /proc belong to root, whoever runs it; ptrace then needs CAP_SYS_PTRACE.
	if os.Geteuid() != 0 {
		if f, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid)); err == nil {
			f.Close()
			t.Error("the memory can be opened")
		}
	}
}

func TestOneDaemonPerDirectory(t *testing.T) {
	dir := t.TempDir()
	p := startDaemon(t, dir).ready()
	if line, err := startDaemon(t, dir).waitLine("another kmsd"); err != nil {
		t.Errorf("the second one: %q, %v", line, err)
	}
	bound(t, p.app) // the first one still has its sockets

	p.cmd.Process.Kill()
	p.cmd.Wait()
	if _, err := os.Stat(p.app); err != nil {
		t.Fatalf("nothing is left of a killed daemon: %v", err)
	}
	p = startDaemon(t, dir).ready() // takes the place of the dead
	bound(t, p.app)
	p.stop()
}

func TestSomethingInTheWay(t *testing.T) {
	dir := t.TempDir()
	os.Mkdir(filepath.Join(dir, "r"), 0o700)
	precious := filepath.Join(dir, "r", "kmsd.sock")
	os.WriteFile(precious, []byte("precious"), 0o600)
	if _, err := startDaemon(t, dir).waitLine("not a socket"); err != nil {
		t.Error(err)
	}
	if b, _ := os.ReadFile(precious); string(b) != "precious" {
		t.Error("the file in the way is gone")
	}
	dir = t.TempDir()
	os.Mkdir(filepath.Join(dir, "r"), 0o700)
	os.Chmod(filepath.Join(dir, "r"), 0o777)
	if _, err := startDaemon(t, dir).waitLine("can be written by others"); err != nil {
		t.Error(err)
	}
}

func TestSystemModeRefusesRoot(t *testing.T) {
	if os.Geteuid() != 0 {
		return // the refusal is for root alone
	}
	dir := t.TempDir()
	file := filepath.Join(dir, "kmsd.toml")
	os.WriteFile(file, []byte("mode = \"system\"\nadmin_group = \"root\"\n"), 0o600)
	if _, err := startDaemon(t, dir, "--config", file).waitLine("does not run as root"); err != nil {
		t.Error(err)
	}
}

func TestReload(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "kmsd.toml")
	os.WriteFile(file, []byte("mode = \"user\"\n"), 0o600)
	notify := filepath.Join(dir, "notify")
	n, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: notify, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	n.SetReadDeadline(time.Now().Add(20 * time.Second))
	t.Setenv("NOTIFY_SOCKET", notify)
	p := startDaemon(t, dir, "--config", file).ready()
	want := func(text string) {
		t.Helper()
		b := make([]byte, 4096)
		for {
			k, err := n.Read(b)
			if err != nil {
				t.Fatalf("systemd is not told %q: %v", text, err)
			}
			if strings.Contains(string(b[:k]), text) {
				return
			}
		}
	}
	want("READY=1")

	p.cmd.Process.Signal(syscall.SIGHUP)
	want("RELOADING=1\nMONOTONIC_USEC=")
	want("READY=1")
	if _, err := p.waitLine("reloaded"); err != nil {
		t.Error(err)
	}
	os.WriteFile(file, []byte("mood = 1\n"), 0o600)
	p.cmd.Process.Signal(syscall.SIGHUP)
	if line, err := p.waitLine("stays as it was"); err != nil || !strings.Contains(line, "line 1") {
		t.Errorf("%q, %v", line, err)
	}
	want("READY=1")
	bound(t, p.app) // and it serves on
	p.cmd.Process.Signal(syscall.SIGTERM)
	want("STOPPING=1")
	p.cmd.Wait()
}

func TestSocketActivation(t *testing.T) {
	dir := t.TempDir()
	os.Mkdir(filepath.Join(dir, "r"), 0o700)
	var files []*os.File
	for _, name := range []string{"kmsd.sock", "admin.sock"} {
		config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error { // PassCredentials=yes
			return c.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PASSCRED, 1) })
		}}
		l, err := config.Listen(context.Background(), "unix", filepath.Join(dir, "r", name))
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		f, err := l.(*net.UnixListener).File()
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		files = append(files, f)
	}
	// A shell knows its own process id, which LISTEN_PID must be.
	cmd := exec.Command("/bin/sh", "-c", `LISTEN_PID=$$ exec /proc/self/fd/5 run --state-dir "$1" --runtime-dir "$2"`, "sh", filepath.Join(dir, "s"), filepath.Join(dir, "r"))
	self, err := os.Open("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	defer self.Close()
	cmd.ExtraFiles = append(files, self)
	cmd.Env = append(os.Environ(), commandEnv+"=1", "LISTEN_FDS=2", "XDG_CONFIG_HOME="+dir)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Process.Kill()
	admin := bound(t, filepath.Join(dir, "r", "admin.sock"))
	admin.send(3, proto.OpWhoami, &proto.Empty{}, nil)
	var who proto.Identity
	if admin.want(3, &who); !who.Admin {
		t.Error("the admin socket of systemd is not taken for one")
	}
	app := bound(t, filepath.Join(dir, "r", "kmsd.sock"))
	app.send(3, proto.OpWhoami, &proto.Empty{}, nil)
	var other proto.Identity
	if app.want(3, &other); other.Admin {
		t.Error("the application socket of systemd is taken for the admin socket")
	}
	cmd.Process.Signal(syscall.SIGTERM)
	cmd.Wait()
	if _, err := os.Stat(filepath.Join(dir, "r", "kmsd.sock")); err != nil {
		t.Errorf("a socket of systemd was removed: %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "r", "kmsd.lock")); err == nil {
		t.Error("kmsd writes into the directory of systemd's sockets")
	}
}

func TestCommandLine(t *testing.T) {
	for _, c := range []struct {
		args []string
		code int
	}{
		{nil, 2}, {[]string{"no-such-command"}, 2}, {[]string{"run", "extra"}, 2}, {[]string{"run", "--no-such-flag"}, 2},
		{[]string{"check-store"}, 2}, {[]string{"--version"}, 0}, {[]string{"--help"}, 0},
		{[]string{"run", "--config", "/no/such/file"}, 1},
	} {
		cmd := exec.Command("/proc/self/exe", c.args...)
		cmd.Env = append(os.Environ(), commandEnv+"=1")
		cmd.Run()
		if got := cmd.ProcessState.ExitCode(); got != c.code {
			t.Errorf("kmsd %q ends with %d, want %d", c.args, got, c.code)
		}
	}
}

// TestBuildSettingsAreSeen runs the checks of the build settings with and without them.
func TestBuildSettingsAreSeen(t *testing.T) {
	if freedIsOverwritten() && !strings.Contains(os.Getenv("GODEBUG"), "clobberfree=1") {
		t.Error("the check finds overwritten memory in a build that does not overwrite")
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestBuildSettingsChild$")
	cmd.Env = append(os.Environ(), "GODEBUG=clobberfree=1", "KMSD_TEST_SETTINGS=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("the checks do not notice the settings: %s", out)
	}
}

func TestBuildSettingsChild(t *testing.T) {
	if os.Getenv("KMSD_TEST_SETTINGS") == "" {
		return // only the test above makes this a process of its own
	}
	if !freedIsOverwritten() {
		t.Error("freed memory is not overwritten")
	}
}
