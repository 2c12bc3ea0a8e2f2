package helper

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/enclave/enclavetest"
	"github.com/kmsd-project/kmsd/ipc/proto"
)

// The test binary is also the spawner and, under the name of a real helper, a helper with a fake device.
func TestMain(m *testing.M) {
	switch {
	case filepath.Base(os.Args[0]) == "kmsd-keyring", filepath.Base(os.Args[0]) == "kmsd-pkcs11":
		server := Server{Opener: testOpener{}}
		os.Exit(server.Main())
	case len(os.Args) == 3 && os.Args[1] == "spawner":
		os.Exit(RunSpawner(os.Args[2]))
	}
	os.Exit(m.Run())
}

// testOpener opens a fake device that behaves as the parameters say.
type testOpener struct{}

func (testOpener) Open(_ context.Context, _ string, params map[string]string, pin []byte) (enclave.Enclave, error) {
	if params["open"] == "refuse" {
		return nil, &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: "as asked", Remedy: "ask otherwise"}
	}
	key, err := hex.DecodeString(params["key"])
	if err != nil || len(key) != 32 {
		return nil, &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: "key"}
	}
	if params["resident"] != "" {
		return newTestResident([32]byte(key), params), nil
	}
	return &testDriver{Memory: enclavetest.MemoryOf([32]byte(key), string(pin)), params: params}, nil
}

type testDriver struct {
	*enclavetest.Memory
	params map[string]string
}

func (d *testDriver) Info() enclave.Info {
	info := d.Memory.Info()
	info.Binding = strconv.Itoa(os.Getpid())
	info.Warnings = os.Environ()
	return info
}

func (d *testDriver) Health(ctx context.Context) enclave.Health {
	switch d.params["health"] {
	case "hang":
		select {} // not even the context helps
	case "slow":
		<-ctx.Done()
	case "die":
		os.Exit(3)
	case "panic":
		panic("helper: test")
	case "locked-out":
		return enclave.Health{State: enclave.LockedOut, Until: time.Unix(2000000000, 0), Detail: "three attempts"}
	}
	return d.Memory.Health(ctx)
}

// startSpawner starts a spawner with the test binary as the helper.
func startSpawner(t *testing.T) *Spawner {
	t.Helper()
	dir := t.TempDir()
	installTestHelper(t, dir)
	return startSpawnerIn(t, dir)
}

func startSpawnerIn(t *testing.T, dir string) *Spawner {
	t.Helper()
	s, err := StartSpawner(SpawnerConfig{Command: []string{"/proc/self/exe", "spawner", dir}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func installTestHelper(t *testing.T, dir string) {
	t.Helper()
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"kmsd-keyring", "kmsd-pkcs11"} {
		if err := os.WriteFile(filepath.Join(dir, name), self, 0o755); err != nil {
			t.Fatal(err)
		}
	}
}

func params(more ...string) map[string]string {
	p := map[string]string{"key": strings.Repeat("42", 32)}
	for i := 0; i < len(more); i += 2 {
		p[more[i]] = more[i+1]
	}
	return p
}

func newEnclave(t *testing.T, d Dialer, params map[string]string) *Enclave {
	t.Helper()
	e := New(d, Config{Kind: "keyring:file", Params: params})
	t.Cleanup(func() { e.Close() })
	return e
}

// pid asks the helper who it is.
func pid(t *testing.T, e *Enclave) int {
	t.Helper()
	if h := e.Health(t.Context()); h.State != enclave.Ready {
		t.Fatalf("health %+v", h)
	}
	n, err := strconv.Atoi(e.Info().Binding)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// gone waits until a process has ended.
func gone(t *testing.T, pid int) {
	t.Helper()
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil || bytes.Contains(stat, []byte(") Z ")) {
			return
		}
	}
	t.Fatalf("process %d still runs", pid)
}

// frozen waits until every thread of a process has stopped; on a busy machine one may go on for a while.
func frozen(t *testing.T, pid int) {
	t.Helper()
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		running := 0
		tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
		for _, task := range tasks {
			if stat, err := os.ReadFile(task); err == nil && !bytes.Contains(stat, []byte(") T ")) {
				running++
			}
		}
		if len(tasks) > 0 && running == 0 {
			return
		}
	}
	t.Fatalf("process %d does not stop", pid)
}

func TestConformance(t *testing.T) {
	s := startSpawner(t)
	enclavetest.Run(t, func(t *testing.T) enclavetest.Device {
		return enclavetest.Device{Open: func(t *testing.T) enclave.Enclave {
			e := New(s, Config{Kind: "keyring:file", Params: params(), Info: enclave.Info{Kind: "memory", Level: "test"}})
			return e
		}}
	})
}

func TestHelperKilledIsReplacedByTheNextCall(t *testing.T) {
	e := newEnclave(t, startSpawner(t), params())
	secret, aad := make([]byte, enclave.SecretSize), []byte("aad")
	blob, err := e.Wrap(t.Context(), secret, aad)
	if err != nil {
		t.Fatal(err)
	}
	first := pid(t, e)
	if err := syscall.Kill(first, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	gone(t, first)
	// The call that meets the corpse may fail, but only with a typed error; the one after it works.
	dst := make([]byte, enclave.SecretSize)
	if err := e.Unwrap(t.Context(), blob, aad, enclave.Auth{}, dst); err != nil {
		if !errors.Is(err, enclave.ErrAbsent) {
			t.Fatalf("first call: %v", err)
		}
		if err := e.Unwrap(t.Context(), blob, aad, enclave.Auth{}, dst); err != nil {
			t.Fatalf("second call: %v", err)
		}
	}
	if second := pid(t, e); second == first {
		t.Fatal("the same process")
	}
}

func TestHelperThatDiesInACall(t *testing.T) {
	s := startSpawner(t)
	for _, how := range []string{"die", "panic"} {
		e := newEnclave(t, s, params("health", how))
		h := e.Health(t.Context())
		if h.State != enclave.Absent || !strings.Contains(h.Detail, "stopped") {
			t.Errorf("%s: health %+v", how, h)
		}
		if _, err := e.Wrap(t.Context(), make([]byte, enclave.SecretSize), nil); err != nil {
			t.Errorf("%s: next call: %v", how, err)
		}
	}
}

// A helper that does not even answer a cancelled call is stopped, and the next call gets another one.
func TestStuckHelperIsReplaced(t *testing.T) {
	e := newEnclave(t, startSpawner(t), params("health", "hang"))
	if _, err := e.Wrap(t.Context(), make([]byte, enclave.SecretSize), nil); err != nil {
		t.Fatal(err)
	}
	first := e.Info().Binding
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	start := time.Now()
	if h := e.Health(ctx); h.State != enclave.Absent || !strings.Contains(h.Detail, "in time") {
		t.Errorf("health %+v", h)
	}
	if took := time.Since(start); took > grace {
		t.Errorf("a call with 50 ms took %v", took)
	}
	if _, err := e.Wrap(t.Context(), make([]byte, enclave.SecretSize), nil); err != nil {
		t.Fatalf("next call: %v", err)
	}
	if e.Info().Binding == first {
		t.Error("the same process")
	}
	old, _ := strconv.Atoi(first)
	gone(t, old)
}

// A stopped process cannot answer anything, not even the end of its connection.
func TestFrozenHelperIsKilled(t *testing.T) {
	e := newEnclave(t, startSpawner(t), params())
	first := pid(t, e)
	if err := syscall.Kill(first, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	frozen(t, first)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := e.Wrap(ctx, make([]byte, enclave.SecretSize), nil); !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, enclave.ErrBusy) {
		t.Errorf("wrap: %v", err)
	}
	if _, err := e.Wrap(t.Context(), make([]byte, enclave.SecretSize), nil); err != nil {
		t.Fatalf("next call: %v", err)
	}
	gone(t, first)
}

// A helper that gives up by itself is kept.
func TestSlowHelperIsKept(t *testing.T) {
	e := newEnclave(t, startSpawner(t), params("health", "slow"))
	if _, err := e.Wrap(t.Context(), make([]byte, enclave.SecretSize), nil); err != nil {
		t.Fatal(err)
	}
	first := e.Info().Binding
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	e.Health(ctx)
	time.Sleep(2 * grace)
	if _, err := e.Wrap(t.Context(), make([]byte, enclave.SecretSize), nil); err != nil {
		t.Fatal(err)
	}
	if e.Info().Binding != first {
		t.Error("the helper was replaced")
	}
}

func TestFailuresCrossTheSeam(t *testing.T) {
	s := startSpawner(t)
	e := newEnclave(t, s, params("health", "locked-out"))
	if h := e.Health(t.Context()); h.State != enclave.LockedOut || h.Until.Unix() != 2000000000 || h.Detail != "three attempts" {
		t.Errorf("health %+v", h)
	}
	err := newEnclave(t, s, params("open", "refuse")).Unwrap(t.Context(), []byte("blob"), nil, enclave.Auth{}, make([]byte, enclave.SecretSize))
	var typed *enclave.Error
	if !errors.As(err, &typed) || !errors.Is(err, enclave.ErrMisconfigured) || typed.Detail != "as asked" || typed.Remedy != "ask otherwise" {
		t.Errorf("open: %v", err)
	}
	for _, k := range kinds() {
		name, kind := k.name, k.err
		until := time.Unix(1900000000, 0)
		got := decodeFailure(encodeFailure(&enclave.Error{Kind: kind, Detail: "detail", Remedy: "remedy", Until: until}))
		if !errors.Is(got, kind) || !errors.As(got, &typed) || typed.Detail != "detail" || typed.Remedy != "remedy" || !typed.Until.Equal(until) {
			t.Errorf("%s: %v", name, got)
		}
	}
	secret := "an error that no driver should return, with a secret in it"
	if got := decodeFailure(encodeFailure(errors.New(secret))); !errors.Is(got, enclave.ErrMisconfigured) || strings.Contains(got.Error(), secret) {
		t.Errorf("untyped error: %v", got)
	}
	long := decodeFailure(encodeFailure(&enclave.Error{Kind: enclave.ErrBusy, Detail: strings.Repeat("\xff\u00e9", 5000)}))
	if !errors.Is(long, enclave.ErrBusy) || len(long.Error()) > 2*maxDetail {
		t.Errorf("long error: %d bytes", len(long.Error()))
	}
}

func TestPINReachesTheDriver(t *testing.T) {
	e := New(startSpawner(t), Config{Kind: "keyring:file", Params: params(), PIN: []byte("1234")})
	defer e.Close()
	secret := bytes.Repeat([]byte{5}, enclave.SecretSize)
	blob, err := e.Wrap(t.Context(), secret, nil)
	if err != nil {
		t.Fatal(err)
	}
	dst := make([]byte, enclave.SecretSize)
	if err := e.Unwrap(t.Context(), blob, nil, enclave.Auth{}, dst); !errors.Is(err, enclave.ErrLocked) {
		t.Error(err)
	}
	if err := e.Unwrap(t.Context(), blob, nil, enclave.Auth{Secret: []byte("4321")}, dst); !errors.Is(err, enclave.ErrAuth) {
		t.Error(err)
	}
	if err := e.Unwrap(t.Context(), blob, nil, enclave.Auth{Secret: []byte("1234")}, dst); err != nil || !bytes.Equal(dst, secret) {
		t.Error(err)
	}
}

func TestHelperSeesNothingOfOurEnvironmentButItsRow(t *testing.T) {
	const none = "DBUS_SESSION_BUS_ADDRESS=unix:path=/nonexistent"
	all := []string{"DBUS_SESSION_BUS_ADDRESS", "XDG_RUNTIME_DIR", "DISPLAY", "WAYLAND_DISPLAY", "SOFTHSM2_CONF"}
	dir := t.TempDir()
	installTestHelper(t, dir)
	full := []string{"unix:path=/run/user/1/bus,guid=00", "/run/user/1", ":0", "wayland-0", "/etc/softhsm2.conf"}
	for _, test := range []struct {
		kind   string
		values []string // of all
		want   []string
	}{
		{"keyring:file", full, []string{none}},
		{"keyring:file", nil, []string{none}},
		{"keyring:secret-service", full, []string{"DBUS_SESSION_BUS_ADDRESS=unix:path=/run/user/1/bus,guid=00", "DISPLAY=:0", "WAYLAND_DISPLAY=wayland-0", "XDG_RUNTIME_DIR=/run/user/1"}},
		{"keyring:secret-service", nil, []string{none}},
		{"keyring:secret-service", []string{"", "/run/a b"}, []string{"DBUS_SESSION_BUS_ADDRESS=unix:path=/run/a%20b/bus", "XDG_RUNTIME_DIR=/run/a b"}},
		{"keyring:secret-service", []string{"", "relative"}, []string{none, "XDG_RUNTIME_DIR=relative"}},
		{"keyring:secret-service", []string{"autolaunch:"}, []string{none}},
		{"keyring:secret-service", []string{"unixexec:path=/bin/sh"}, []string{none}},
		{"keyring:secret-service", []string{"unix:path=/a;unixexec:path=/bin/sh"}, []string{none}},
		{"keyring:secret-service", []string{"tcp:host=example.com,port=1"}, []string{none}},
		{"pkcs11", full, []string{"SOFTHSM2_CONF=/etc/softhsm2.conf"}},
		{"pkcs11", nil, nil},
	} {
		t.Setenv("KMSD_TEST_CANARY", "1")
		for i, name := range all {
			value := ""
			if i < len(test.values) {
				value = test.values[i]
			}
			t.Setenv(name, value)
		}
		e := New(startSpawnerIn(t, dir), Config{Kind: test.kind, Params: params()})
		pid(t, e)
		env := slices.Sorted(slices.Values(e.Info().Warnings))
		if !slices.Equal(env, test.want) {
			t.Errorf("%s with %q: environment %q, want %q", test.kind, test.values, env, test.want)
		}
		e.Close()
	}
}

func TestHelperInheritsNoDescriptors(t *testing.T) {
	secret, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer secret.Close()
	if _, err := unix.FcntlInt(secret.Fd(), unix.F_SETFD, 0); err != nil { // as a shell leaves it to its children
		t.Fatal(err)
	}
	e := newEnclave(t, startSpawner(t), params())
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid(t, e)))
	if err != nil {
		t.Fatal(err)
	}
	if len(fds) == 0 { // the helper is not dumpable, so only root sees them
		if os.Geteuid() == 0 || os.Getenv("CI") != "" {
			t.Fatal("the descriptors of the helper cannot be seen")
		}
		t.Skip("needs root to see the descriptors of the helper; the continuous integration runs it as root")
	}
	sockets := 0
	for _, fd := range fds {
		target, _ := os.Readlink(fd)
		if strings.HasPrefix(target, "socket:") {
			sockets++
		}
		if target == secret.Name() {
			t.Errorf("the helper has %s", target)
		}
	}
	if sockets != 1 {
		t.Errorf("the helper has %d sockets", sockets)
	}
}

// kmsd is killed: the spawner and the helpers go too.
func TestHelpersEndWithTheirDaemon(t *testing.T) {
	dir := t.TempDir()
	installTestHelper(t, dir)
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestDaemonForTheTestBelow$")
	cmd.Env = append(os.Environ(), "KMSD_TEST_DAEMON="+dir)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var helperPID int
	if _, err := fmt.Fscanf(out, "PID %d\n", &helperPID); err != nil {
		t.Fatal(err)
	}
	spawner := parent(t, helperPID)
	if parent(t, spawner) != cmd.Process.Pid {
		t.Error("the spawner is not a child of the daemon")
	}
	// Even frozen they must not survive.
	syscall.Kill(helperPID, syscall.SIGSTOP)
	cmd.Process.Kill()
	cmd.Wait()
	gone(t, spawner)
	gone(t, helperPID)
}

func TestDaemonForTheTestBelow(t *testing.T) {
	dir := os.Getenv("KMSD_TEST_DAEMON")
	if dir == "" {
		return // only runs as the daemon of TestHelpersEndWithTheirDaemon
	}
	e := newEnclave(t, startSpawnerIn(t, dir), params())
	fmt.Printf("PID %d\n", pid(t, e))
	time.Sleep(time.Minute)
}

func parent(t *testing.T, pid int) int {
	t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	var state string
	var ppid int
	fmt.Sscan(string(stat[bytes.LastIndexByte(stat, ')')+1:]), &state, &ppid)
	return ppid
}

func TestSpawnerCloseEndsHelpers(t *testing.T) {
	s := startSpawner(t)
	e := newEnclave(t, s, params())
	p := pid(t, e)
	for range 2 {
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	gone(t, p)
	var err error
	for range 2 { // the first may still meet the dying helper
		_, err = e.Wrap(t.Context(), make([]byte, enclave.SecretSize), nil)
	}
	if !errors.Is(err, enclave.ErrAbsent) {
		t.Error(err)
	}
}

func TestOnlyTheTableIsStarted(t *testing.T) {
	s := startSpawner(t)
	for _, kind := range []string{"", "keyring", "keyring:nothing", "../../bin/sh", "/bin/sh", "kmsd-keyring", strings.Repeat("k", 5000)} {
		if _, err := s.Dial(t.Context(), kind); !errors.Is(err, enclave.ErrUnsupported) {
			t.Errorf("%q: %v", kind, err)
		}
		if _, err := (Sockets{Dir: t.TempDir()}).Dial(t.Context(), kind); !errors.Is(err, enclave.ErrUnsupported) {
			t.Errorf("socket of %q: %v", kind, err)
		}
	}
	// The spawner itself refuses too, whatever kmsd asks for.
	s.mu.Lock()
	s.conn.Write([]byte("S/bin/sh"))
	m := make([]byte, maxMessage)
	n, err := s.conn.Read(m)
	s.mu.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := parseStarted(m[:n]); !errors.Is(err, enclave.ErrUnsupported) {
		t.Errorf("spawner: %v", err)
	}
}

func TestHelperFileIsChecked(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("PATH", dir) // never looked at
	missing := t.TempDir()
	path := filepath.Join(dir, "kmsd-keyring")
	if _, err := startSpawnerIn(t, missing).Dial(t.Context(), "keyring:file"); !errors.Is(err, enclave.ErrMisconfigured) || !strings.Contains(err.Error(), "not installed") {
		t.Errorf("missing: %v", err)
	}
	s := startSpawnerIn(t, dir)
	refused := func(what, why string) {
		t.Helper()
		_, err := s.Dial(t.Context(), "keyring:file")
		if !errors.Is(err, enclave.ErrMisconfigured) || !strings.Contains(err.Error(), why) {
			t.Errorf("%s: %v", what, err)
		}
		os.Remove(path)
	}
	if err := os.Symlink("/bin/true", path); err != nil {
		t.Fatal(err)
	}
	refused("symlink", "regular")
	os.WriteFile(path, []byte("#!/bin/sh\n"), 0o755)
	os.Chmod(path, 0o757)
	refused("writable by others", "write")
	os.WriteFile(path, []byte("not a program"), 0o755)
	refused("not a program", "exec")
	if os.Geteuid() == 0 {
		os.WriteFile(path, []byte("#!/bin/sh\n"), 0o755)
		os.Chown(path, 65534, 65534)
		refused("of another user", "uid 65534")
	}
}

func TestSockets(t *testing.T) {
	dir := t.TempDir()
	l, err := net.Listen("unix", filepath.Join(dir, "keyring.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var served sync.WaitGroup
	served.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			server := Server{Opener: testOpener{}}
			served.Go(func() {
				// A client that does not believe us leaves without reading what we say.
				if err := server.Serve(conn.(*net.UnixConn)); err != nil && !errors.Is(err, syscall.ECONNRESET) {
					t.Error(err)
				}
			})
		}
	})
	me := uint32(os.Geteuid())
	e := newEnclave(t, Sockets{Dir: dir, UID: []uint32{me}}, params())
	if h := e.Health(t.Context()); h.State != enclave.Ready {
		t.Errorf("health %+v", h)
	}
	e.Close()
	if h := newEnclave(t, Sockets{Dir: dir, UID: []uint32{me + 1}}, params()).Health(t.Context()); h.State != enclave.Misconfigured {
		t.Errorf("helper of another user: %+v", h)
	}
	l.Close()
	served.Wait()
	if h := newEnclave(t, Sockets{Dir: dir, UID: []uint32{me}}, params()).Health(t.Context()); h.State != enclave.Absent {
		t.Errorf("nobody listens: %+v", h)
	}
}

// pipe is a Dialer whose helper is played by the test.
type pipe struct{ play func(*net.UnixConn) }

func (p pipe) Dial(context.Context, string) (*Link, error) {
	ours, theirs, err := connections()
	if err != nil {
		return nil, err
	}
	go p.play(theirs)
	return &Link{conn: ours}, nil
}

// connections returns both ends of a connection.
func connections() (ours, theirs *net.UnixConn, err error) {
	a, b, err := socketPair(unix.SOCK_STREAM)
	if err != nil {
		return nil, nil, err
	}
	defer b.Close()
	if ours, err = unixConn(a); err != nil {
		return nil, nil, err
	}
	if theirs, err = unixConn(b); err != nil {
		ours.Close()
		return nil, nil, err
	}
	return ours, theirs, nil
}

// connect is connections for a test, which closes them when it ends.
func connect(t *testing.T) (ours, theirs *net.UnixConn) {
	t.Helper()
	ours, theirs, err := connections()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ours.Close()
		theirs.Close()
	})
	return ours, theirs
}

func answerOpen(t *testing.T, c *net.UnixConn) {
	frame, err := readFrame(c)
	if err != nil {
		return
	}
	r, err := proto.ParseRequest(frame)
	if err != nil || r.Op != proto.OpHelperOpen {
		t.Errorf("first request %q, %v", r.Op, err)
	}
	out, err := proto.AppendResponse(nil, r.ID, nil, &proto.HelperReply{Info: proto.HelperInfo{Kind: "k", Level: "l"}})
	if err != nil {
		t.Error(err)
	}
	c.Write(out)
}

// answerWith plays a helper that answers the first call with r.
func answerWith(t *testing.T, r proto.HelperReply) func(*net.UnixConn) {
	return func(c *net.UnixConn) {
		answerOpen(t, c)
		frame, err := readFrame(c)
		if err != nil {
			return
		}
		req, _ := proto.ParseRequest(frame)
		out, err := proto.AppendResponse(nil, req.ID, nil, &r)
		if err != nil {
			t.Error(err)
		}
		c.Write(out)
	}
}

// A helper is trusted with one secret, not with the memory or the time of kmsd.
func TestHostileHelper(t *testing.T) {
	reply := func(r proto.HelperReply) func(*net.UnixConn) { return answerWith(t, r) }
	write := func(b []byte) func(*net.UnixConn) {
		return func(c *net.UnixConn) { answerOpen(t, c); readFrame(c); c.Write(b) }
	}
	for name, test := range map[string]struct {
		play func(*net.UnixConn)
		want error
	}{
		"closes at once":       {func(c *net.UnixConn) { c.Close() }, enclave.ErrAbsent},
		"closes in the call":   {func(c *net.UnixConn) { answerOpen(t, c); readFrame(c); c.Close() }, enclave.ErrAbsent},
		"huge length":          {write([]byte{0xff, 0xff, 0xff, 0xff}), enclave.ErrAbsent},
		"garbage":              {write([]byte{0, 0, 0, 3, 1, 2, 3}), enclave.ErrMisconfigured},
		"empty frame":          {write([]byte{0, 0, 0, 0}), enclave.ErrMisconfigured},
		"no secret":            {reply(proto.HelperReply{}), enclave.ErrMisconfigured},
		"short secret":         {reply(proto.HelperReply{Secret: make([]byte, 31)}), enclave.ErrMisconfigured},
		"long secret":          {reply(proto.HelperReply{Secret: make([]byte, 33)}), enclave.ErrMisconfigured},
		"failure nobody knows": {reply(proto.HelperReply{Failure: proto.HelperFailure{Kind: "whatever"}}), enclave.ErrMisconfigured},
	} {
		e := newEnclave(t, pipe{test.play}, nil)
		dst := make([]byte, enclave.SecretSize)
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		err := e.Unwrap(ctx, []byte("blob"), nil, enclave.Auth{}, dst)
		cancel()
		if !errors.Is(err, test.want) || errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s: %v, want %v", name, err, test.want)
		}
		if !bytes.Equal(dst, make([]byte, len(dst))) {
			t.Errorf("%s: wrote into the destination", name)
		}
	}
}

func TestReplyToNobodyIsDropped(t *testing.T) {
	e := newEnclave(t, pipe{func(c *net.UnixConn) {
		answerOpen(t, c)
		for {
			frame, err := readFrame(c)
			if err != nil {
				return
			}
			r, _ := proto.ParseRequest(frame)
			for _, id := range []uint64{r.ID + 1000, 0, r.ID, r.ID} {
				out, _ := proto.AppendResponse(nil, id, nil, &proto.HelperReply{Health: proto.HelperHealth{State: "ready"}})
				c.Write(out)
			}
		}
	}}, nil)
	for range 10 {
		if h := e.Health(t.Context()); h.State != enclave.Ready {
			t.Fatalf("health %+v", h)
		}
	}
}

func TestHelperOfAnotherVersionIsRefused(t *testing.T) {
	ours, theirs := connect(t)
	server := Server{Opener: testOpener{}}
	go server.Serve(theirs)
	out, err := proto.AppendRequest(nil, 1, proto.OpHelperOpen, &proto.HelperOpen{Version: proto.HelperVersion + 1}, nil)
	if err != nil {
		t.Fatal(err)
	}
	ours.Write(out)
	frame, err := readFrame(ours)
	if err != nil {
		t.Fatal(err)
	}
	r, err := proto.ParseResponse(frame)
	if err != nil {
		t.Fatal(err)
	}
	var reply proto.HelperReply
	if err := proto.DecodeReply(r.Result, &reply); err != nil || reply.Failure.Kind != "misconfigured" {
		t.Errorf("%+v, %v", reply, err)
	}
}

// serveBytes lets a helper read the bytes, and returns when it has ended the connection.
func serveBytes(t *testing.T, data []byte) {
	t.Helper()
	ours, theirs := connect(t)
	done := make(chan struct{})
	go func() {
		defer close(done)
		server := Server{Opener: testOpener{}}
		server.Serve(theirs)
	}()
	ours.Write(data)
	ours.CloseWrite()
	<-done
	ours.Close()
}

func FuzzServer(f *testing.F) {
	frame := func(out []byte, id uint64, op string, m proto.Message) []byte {
		out, err := proto.AppendRequest(out, id, op, m, &proto.Options{DeadlineMS: 1000})
		if err != nil {
			f.Fatal(err)
		}
		return out
	}
	open := frame(nil, 1, proto.OpHelperOpen, &proto.HelperOpen{Version: proto.HelperVersion, Kind: "k", Config: params()})
	f.Add(open)
	f.Add(frame(bytes.Clone(open), 2, proto.OpHelperWrap, &proto.HelperWrap{Secret: make([]byte, 32), AAD: []byte("a")}))
	f.Add(frame(bytes.Clone(open), 2, proto.OpHelperUnwrap, &proto.HelperUnwrap{Blob: []byte("blob"), Shares: [][]byte{{1}}}))
	f.Add(frame(bytes.Clone(open), 2, proto.OpHelperForget, &proto.HelperBlob{Blob: []byte("blob")}))
	f.Add(frame(bytes.Clone(open), 2, proto.OpHelperCancel, &proto.Cancel{ID: 1}))
	f.Add(frame(bytes.Clone(open), 2, "what", &proto.Empty{}))
	resident := frame(nil, 1, proto.OpHelperOpen, &proto.HelperOpen{Version: proto.HelperVersion, Kind: "k", Config: params("resident", "yes")})
	f.Add(frame(bytes.Clone(resident), 2, proto.OpHelperGenerate, &proto.HelperGenerate{ID: make([]byte, 16), Algorithm: "ecdsa-p256", Usages: []string{"sign"}}))
	f.Add(frame(bytes.Clone(resident), 2, proto.OpHelperDo, &proto.HelperDo{Blob: []byte("blob"), Usage: "sign", Input: []byte("m"), Digest: true}))
	f.Add(frame(bytes.Clone(resident), 2, proto.OpHelperDestroy, &proto.HelperBlob{Blob: []byte("blob")}))
	f.Add(frame(bytes.Clone(resident), 2, proto.OpHelperMechanisms, &proto.Empty{}))
	f.Add(frame(bytes.Clone(resident), 2, proto.OpHelperLogin, &proto.HelperLogin{Auth: []byte("1234")}))
	f.Fuzz(func(t *testing.T, data []byte) {
		dangerous := func(word string) bool { return bytes.Contains(data, []byte(word)) }
		if len(data) < 1<<16 && !dangerous("health") && !dangerous("hang") && !dangerous("die") { // some of the fake's healths end the process
			serveBytes(t, data)
		}
	})
}

func FuzzSpawnerAnswer(f *testing.F) {
	f.Add([]byte("K\x00\x00\x00\x01"))
	f.Add(append([]byte{msgFailed}, formatFailed(enclave.ErrMisconfigured)...))
	f.Fuzz(func(t *testing.T, m []byte) {
		if _, err := parseStarted(m); err == nil && (len(m) != 5 || m[0] != msgStarted) {
			t.Fatalf("%q was taken for a success", m)
		}
	})
}
