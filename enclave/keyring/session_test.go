package keyring_test

import (
	"bytes"
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
)

// desktop is the session of a user as far as a keyring needs one: a bus, and on it the real gnome-keyring. A machine without them fails
// the tests: nothing here is skipped.
type desktop struct {
	t       *testing.T
	dir     string
	bus     *exec.Cmd
	service *exec.Cmd
}

const password = "the password of the login\n"

const busConfig = `<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN" "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><type>session</type><listen>unix:path=%s</listen>
<policy context="default"><allow send_destination="*"/><allow receive_sender="*"/><allow own="*"/></policy></busconfig>
`

// newDesktop starts a bus and points the environment at it. There is no display.
func newDesktop(t *testing.T) *desktop {
	t.Helper()
	dir, err := os.MkdirTemp("", "kr") // shorter than t.TempDir: a socket path has 108 bytes
	if err != nil {
		t.Fatal(err)
	}
	d := &desktop{t: t, dir: dir}
	t.Cleanup(func() {
		d.stopService()
		d.stopBus()
		os.RemoveAll(dir)
	})
	for _, name := range []string{"home", "run"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("DBUS_SESSION_BUS_ADDRESS", "unix:path="+d.socket())
	t.Setenv("XDG_RUNTIME_DIR", filepath.Join(dir, "run"))
	t.Setenv("DISPLAY", "")
	t.Setenv("WAYLAND_DISPLAY", "")
	d.startBus()
	return d
}

func (d *desktop) socket() string { return filepath.Join(d.dir, "run", "bus") }

// start starts a process of the session. It gets nothing of our environment that could lead it to the session of whoever runs the test.
func (d *desktop) start(stdin string, name string, arguments ...string) *exec.Cmd {
	d.t.Helper()
	cmd := exec.Command(name, arguments...)
	cmd.Env = []string{"HOME=" + filepath.Join(d.dir, "home"), "XDG_RUNTIME_DIR=" + filepath.Join(d.dir, "run"), "DBUS_SESSION_BUS_ADDRESS=unix:path=" + d.socket(),
		"PATH=" + os.Getenv("PATH")}
	cmd.Stdin = strings.NewReader(strings.TrimSuffix(stdin, "\n"))
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		d.t.Fatalf("the tests need dbus, gnome-keyring and libsecret-tools (apt-get install dbus-daemon gnome-keyring libsecret-tools): %v", err)
	}
	return cmd
}

func stop(cmd **exec.Cmd) {
	if *cmd != nil {
		(*cmd).Process.Kill()
		(*cmd).Wait()
		*cmd = nil
	}
}

func (d *desktop) startBus() {
	d.t.Helper()
	config := filepath.Join(d.dir, "bus.conf")
	if err := os.WriteFile(config, fmt.Appendf(nil, busConfig, d.socket()), 0o600); err != nil {
		d.t.Fatal(err)
	}
	os.Remove(d.socket())
	d.bus = d.start("", "dbus-daemon", "--nofork", "--nopidfile", "--config-file="+config)
	d.until("the bus answers", func() bool {
		c, err := net.Dial("unix", d.socket())
		if err == nil {
			c.Close()
		}
		return err == nil
	})
}

func (d *desktop) stopBus()     { stop(&d.bus) }
func (d *desktop) stopService() { stop(&d.service) }

// login starts gnome-keyring as a login with a password does: the collection "login" is there, and open.
func (d *desktop) login() {
	d.t.Helper()
	d.stopService()
	d.service = d.start(password, "gnome-keyring-daemon", "--foreground", "--unlock", "--components=secrets")
	d.until("the keyring is there, unlocked", func() bool { return d.property("Locked") == "boolean false" })
}

// autologin starts gnome-keyring as a login without a password does: the collection is there, if it ever was, and locked.
func (d *desktop) autologin() {
	d.t.Helper()
	d.stopService()
	d.service = d.start("", "gnome-keyring-daemon", "--foreground", "--components=secrets")
	d.until("the keyring is there, locked", func() bool { return d.property("Locked") == "boolean true" })
}

// fake starts a Secret Service that misbehaves, see testdata/fakesecrets.
func (d *desktop) fake(mode string) {
	d.t.Helper()
	d.stopService()
	path := filepath.Join(binaries.Dir(d.t), "fakesecrets")
	d.service = d.start("", path, mode)
	d.until("the fake is there", func() bool {
		return strings.Contains(d.ask("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus.NameHasOwner", "string:org.freedesktop.secrets"), "boolean true")
	})
}

// property asks for a property of the collection, as another program would.
func (d *desktop) property(name string) string {
	out := d.ask("org.freedesktop.secrets", "/org/freedesktop/secrets/collection/login", "org.freedesktop.DBus.Properties.Get",
		"string:org.freedesktop.Secret.Collection", "string:"+name)
	return strings.TrimSpace(strings.TrimPrefix(strings.TrimSpace(out), "variant"))
}

func (d *desktop) ask(destination, path, method string, arguments ...string) string {
	cmd := exec.Command("dbus-send", append([]string{"--bus=unix:path=" + d.socket(), "--print-reply=literal", "--reply-timeout=1000", "--dest=" + destination, path, method}, arguments...)...)
	out, _ := cmd.Output()
	return string(out)
}

func (d *desktop) until(what string, ok func() bool) {
	d.t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			d.t.Fatalf("waited in vain until %s", what)
		}
	}
}

// secretTool changes the keyring as another program would.
func (d *desktop) secretTool(stdin string, arguments ...string) {
	d.t.Helper()
	cmd := d.start(stdin, "secret-tool", arguments...)
	if err := cmd.Wait(); err != nil {
		d.t.Fatalf("secret-tool %q: %v", arguments, err)
	}
}

// adopt makes orphans of our children ours, so that what is left behind can be seen.
func adopt() error { return unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) }

// process is what everybody may know of a process, even of one that is not dumpable.
type process struct {
	pid, parent int
	name, state string
}

func processes() (all []process) {
	paths, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, path := range paths {
		stat, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		begin, end := bytes.IndexByte(stat, '('), bytes.LastIndexByte(stat, ')')
		var p process
		fmt.Sscan(string(stat[:begin]), &p.pid)
		p.name = string(stat[begin+1 : end])
		fmt.Sscan(string(stat[end+1:]), &p.state, &p.parent)
		all = append(all, p)
	}
	return all
}

// children lists the processes that are ours and live, once the dying have had time to die.
func children() (left []process) {
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		left = nil
		for _, p := range processes() {
			if p.parent == os.Getpid() && p.state != "Z" {
				left = append(left, p)
			}
		}
		if len(left) == 0 || time.Now().After(end) {
			return left
		}
	}
}
