package keyring_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/enclave/enclavetest"
	"github.com/kmsd-project/kmsd/enclave/helper"
	"github.com/kmsd-project/kmsd/enclave/keyring"
	"github.com/kmsd-project/kmsd/kmsd/programs"
)

// binaries are the real helper program, and a fake of the Secret Service.
var binaries = programs.New("enclave/keyring/kmsd-keyring", "enclave/keyring/testdata/fakesecrets")

// program returns the path of the real helper program.
func program(t *testing.T) string {
	t.Helper()
	return filepath.Join(binaries.Dir(t), "kmsd-keyring")
}

func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == "spawner" {
		os.Exit(helper.RunSpawner(os.Args[2]))
	}
	if err := adopt(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	binaries.Remove()
	if left := children(); len(left) > 0 {
		fmt.Fprintf(os.Stderr, "processes left behind: %v\n", left)
		code = 1
	}
	os.Exit(code)
}

func startSpawner(t *testing.T) *helper.Spawner {
	t.Helper()
	s, err := helper.StartSpawner(helper.SpawnerConfig{Command: []string{"/proc/self/exe", "spawner", filepath.Dir(program(t))}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// machine is a state directory and the enclave in it.
type machine struct {
	state   string
	spawner *helper.Spawner
	enclave *helper.Enclave
	blob    enclave.Blob
	secret  []byte
}

var aad = enclave.SlotAAD([16]byte{7})

// enrolled returns a machine with one slot.
func enrolled(t *testing.T) *machine {
	t.Helper()
	m := &machine{state: t.TempDir(), spawner: startSpawner(t), secret: bytes.Repeat([]byte{0xC5}, enclave.SecretSize)}
	m.enclave = keyring.DialFile(m.spawner, m.state)
	t.Cleanup(func() { m.enclave.Close() })
	var err error
	if m.blob, err = m.enclave.Wrap(t.Context(), m.secret, aad); err != nil {
		t.Fatal(err)
	}
	return m
}

func (m *machine) unwrap(ctx context.Context) error {
	dst := make([]byte, enclave.SecretSize)
	err := m.enclave.Unwrap(ctx, m.blob, aad, enclave.Auth{}, dst)
	if err == nil && !bytes.Equal(dst, m.secret) {
		return errors.New("another secret")
	}
	return err
}

func (m *machine) path(elements ...string) string {
	return filepath.Join(append([]string{m.state, "keyring"}, elements...)...)
}

// item is the path of the only item.
func (m *machine) item(t *testing.T) string {
	t.Helper()
	all, err := filepath.Glob(m.path("items", "*"))
	if err != nil || len(all) != 1 {
		t.Fatalf("items %v, %v", all, err)
	}
	return all[0]
}

func TestConformance(t *testing.T) {
	s := startSpawner(t)
	enclavetest.Run(t, func(t *testing.T) enclavetest.Device {
		state := t.TempDir()
		return enclavetest.Device{Open: func(*testing.T) enclave.Enclave { return keyring.DialFile(s, state) }}
	})
}

func TestSurvivesTheHelper(t *testing.T) {
	m := enrolled(t)
	m.enclave.Close()
	m.spawner.Close()
	m.spawner = startSpawner(t)
	m.enclave = keyring.DialFile(m.spawner, m.state)
	defer m.enclave.Close()
	if err := m.unwrap(t.Context()); err != nil {
		t.Fatal(err)
	}
	if info := m.enclave.Info(); len(info.Binding) != 16 || !strings.Contains(info.Level, "not against root or theft of the whole disk") {
		t.Errorf("info %+v", info)
	}
}

func TestFilesAreForUsAlone(t *testing.T) {
	m := enrolled(t)
	for path, want := range map[string]os.FileMode{m.path(): 0o700, m.path("items"): 0o700, m.path("machine-secret"): 0o600, m.item(t): 0o600} {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm() != want {
			t.Errorf("%s has mode %04o", path, info.Mode().Perm())
		}
	}
	left, err := filepath.Glob(m.path("*-*"))
	if err != nil || len(left) != 1 { // machine-secret
		t.Errorf("left over: %v, %v", left, err)
	}
}

// The two halves: what the keyring holds without the blob, and the blob without the keyring, open nothing and do not show the secret.
func TestNothingOnDiskShowsTheSecret(t *testing.T) {
	m := enrolled(t)
	for _, path := range []string{m.path("machine-secret"), m.item(t)} {
		content, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(content, m.secret[:8]) {
			t.Errorf("%s shows the secret", path)
		}
	}
	if bytes.Contains(m.blob, m.secret[:8]) {
		t.Error("the blob shows the secret")
	}
}

func TestWhatCanGoWrong(t *testing.T) {
	write := func(t *testing.T, path, content string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, test := range []struct {
		name   string
		damage func(*testing.T, *machine)
		want   error
		health enclave.HealthState
		remedy string
	}{
		{"machine secret lost", func(t *testing.T, m *machine) { os.Remove(m.path("machine-secret")) }, enclave.ErrReplaced, enclave.Replaced, "recovery key"},
		{"all of it lost", func(t *testing.T, m *machine) { os.RemoveAll(m.path()) }, enclave.ErrReplaced, enclave.Ready, "recovery key"},
		{"another machine secret", func(t *testing.T, m *machine) {
			write(t, m.path("machine-secret"), "kmsdms1\n"+strings.Repeat("x", 32))
		}, enclave.ErrReplaced, enclave.Ready, "recovery key"},
		{"machine secret cut off", func(t *testing.T, m *machine) { os.Truncate(m.path("machine-secret"), 20) }, enclave.ErrReplaced, enclave.Replaced, "recovery key"},
		{"machine secret empty", func(t *testing.T, m *machine) { os.Truncate(m.path("machine-secret"), 0) }, enclave.ErrReplaced, enclave.Replaced, "recovery key"},
		{"item lost", func(t *testing.T, m *machine) { os.Remove(m.item(t)) }, enclave.ErrReplaced, enclave.Ready, "recovery key"},
		{"item damaged", func(t *testing.T, m *machine) {
			content, _ := os.ReadFile(m.item(t))
			content[len(content)-5] ^= 1
			write(t, m.item(t), string(content))
		}, enclave.ErrCorrupt, enclave.Ready, "recovery key"},
		{"item is garbage", func(t *testing.T, m *machine) { write(t, m.item(t), "..garbage..") }, enclave.ErrCorrupt, enclave.Ready, "recovery key"},
		{"item is empty", func(t *testing.T, m *machine) { os.Truncate(m.item(t), 0) }, enclave.ErrCorrupt, enclave.Ready, "recovery key"},
		{"item is huge", func(t *testing.T, m *machine) { os.Truncate(m.item(t), 1<<30) }, enclave.ErrCorrupt, enclave.Ready, "recovery key"},
		{"others may read the secret", func(t *testing.T, m *machine) { os.Chmod(m.path("machine-secret"), 0o644) }, enclave.ErrMisconfigured, enclave.Misconfigured, "readable by the user of kmsd only"},
		{"others may enter", func(t *testing.T, m *machine) { os.Chmod(m.path(), 0o755) }, enclave.ErrMisconfigured, enclave.Misconfigured, "readable by the user of kmsd only"},
		{"secret has another name", func(t *testing.T, m *machine) {
			if err := os.Link(m.path("machine-secret"), filepath.Join(m.state, "other")); err != nil {
				t.Fatal(err)
			}
		}, enclave.ErrMisconfigured, enclave.Misconfigured, "readable by the user of kmsd only"},
		{"secret is a symlink", func(t *testing.T, m *machine) {
			os.Rename(m.path("machine-secret"), filepath.Join(m.state, "other"))
			os.Symlink("../other", m.path("machine-secret"))
		}, enclave.ErrMisconfigured, enclave.Misconfigured, ""},
		{"secret is a pipe", func(t *testing.T, m *machine) {
			os.Remove(m.path("machine-secret"))
			if err := syscall.Mkfifo(m.path("machine-secret"), 0o600); err != nil {
				t.Fatal(err)
			}
		}, enclave.ErrMisconfigured, enclave.Misconfigured, ""},
		{"directory of another user", func(t *testing.T, m *machine) {
			if err := os.Chown(m.path(), 65534, 65534); err != nil {
				t.Fatal(err)
			}
		}, enclave.ErrMisconfigured, enclave.Misconfigured, "readable by the user of kmsd only"},
	} {
		t.Run(test.name, func(t *testing.T) {
			if strings.Contains(test.name, "another user") && os.Geteuid() != 0 {
				return // giving a file away takes root; the suite of CI runs as root as well
			}
			m := enrolled(t)
			test.damage(t, m)
			err := m.unwrap(t.Context())
			if !errors.Is(err, test.want) {
				t.Fatalf("unwrap: %v, want %v", err, test.want)
			}
			var typed *enclave.Error
			if !errors.As(err, &typed) || !strings.Contains(typed.Remedy, test.remedy) {
				t.Errorf("%v has the remedy %q, want %q", err, typed.Remedy, test.remedy)
			}
			if h := m.enclave.Health(t.Context()); h.State != test.health {
				t.Errorf("health %+v, want %s", h, test.health)
			}
		})
	}
}

// After the loss, another slot can be enrolled in the same place; the lost one stays lost.
func TestEnrolAgainAfterLoss(t *testing.T) {
	m := enrolled(t)
	os.Remove(m.path("machine-secret"))
	again, err := m.enclave.Wrap(t.Context(), m.secret, aad)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.unwrap(t.Context()); !errors.Is(err, enclave.ErrReplaced) {
		t.Errorf("the lost slot: %v", err)
	}
	m.blob = again
	if err := m.unwrap(t.Context()); err != nil {
		t.Errorf("the new slot: %v", err)
	}
}

// A second slot never touches the machine secret or the item of the first.
func TestSlotsDoNotDisturbEachOther(t *testing.T) {
	m := enrolled(t)
	secret, _ := os.ReadFile(m.path("machine-secret"))
	item, _ := os.ReadFile(m.item(t))
	name := m.item(t)
	other, err := m.enclave.Wrap(t.Context(), bytes.Repeat([]byte{1}, enclave.SecretSize), aad)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.enclave.Forget(t.Context(), other); err != nil {
		t.Fatal(err)
	}
	secretNow, _ := os.ReadFile(m.path("machine-secret"))
	itemNow, _ := os.ReadFile(name)
	if !bytes.Equal(secret, secretNow) || !bytes.Equal(item, itemNow) {
		t.Error("the files of the first slot changed")
	}
	if m.item(t) != name {
		t.Error("the forgotten item is still there")
	}
	if err := m.unwrap(t.Context()); err != nil {
		t.Error(err)
	}
}

// helpers returns our processes of the helper program, which are grandchildren: the spawner is between.
func helpers(t *testing.T) []int {
	t.Helper()
	all := processes()
	parents := map[int]int{}
	for _, p := range all {
		parents[p.pid] = p.parent
	}
	var pids []int
	for _, p := range all {
		if p.name == "kmsd-keyring" && p.state != "Z" && parents[p.parent] == os.Getpid() {
			pids = append(pids, p.pid)
		}
	}
	return pids
}

// Killing the helper at any moment of an enrolment loses at most that enrolment.
func TestHelperKilledInACall(t *testing.T) {
	m := enrolled(t)
	killed := 0
	for i := range 20 {
		if err := m.unwrap(t.Context()); err != nil && !errors.Is(err, enclave.ErrAbsent) {
			t.Fatal(err)
		}
		pids := helpers(t)
		if len(pids) == 0 {
			continue
		}
		done := make(chan error, 1)
		go func() {
			_, err := m.enclave.Wrap(t.Context(), m.secret, aad)
			done <- err
		}()
		time.Sleep(time.Duration(i) * 700 * time.Microsecond)
		for _, pid := range pids {
			syscall.Kill(pid, syscall.SIGKILL)
		}
		if err := <-done; err != nil {
			killed++
			if !errors.Is(err, enclave.ErrAbsent) {
				t.Fatalf("wrap: %v", err)
			}
		}
	}
	if killed == 0 {
		t.Error("no call was hit; the test proves nothing")
	}
	// The first call may still meet the corpse.
	if err := m.unwrap(t.Context()); err != nil && !errors.Is(err, enclave.ErrAbsent) {
		t.Fatal(err)
	}
	if err := m.unwrap(t.Context()); err != nil {
		t.Fatalf("the slot from before: %v", err)
	}
	if _, err := m.enclave.Wrap(t.Context(), m.secret, aad); err != nil {
		t.Fatalf("a new slot: %v", err)
	}
	if left, _ := filepath.Glob(m.path("staging-*")); len(left) != 0 {
		t.Errorf("left over: %v", left)
	}
}

// freeze stops a process and waits until all of it stands still.
func freeze(t *testing.T, pid int) {
	t.Helper()
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		return // it has gone
	}
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil || bytes.Contains(stat, []byte(") T ")) || bytes.Contains(stat, []byte(") Z ")) {
			return
		}
	}
	t.Fatal("the helper does not stop")
}

func TestFrozenHelperDoesNotFreezeUs(t *testing.T) {
	m := enrolled(t)
	for _, pid := range helpers(t) {
		freeze(t, pid)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	start := time.Now()
	if err := m.unwrap(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("unwrap: %v", err)
	}
	if took := time.Since(start); took > time.Second {
		t.Errorf("a call with 100 ms took %v", took)
	}
	if err := m.unwrap(t.Context()); err != nil {
		t.Errorf("next call: %v", err)
	}
}

// The keyring library would start dbus-launch, which leaves a dbus-daemon behind.
func TestNoDBusDaemonIsStarted(t *testing.T) {
	program(t) // while PATH still leads to the compiler
	bin, mark := t.TempDir(), filepath.Join(t.TempDir(), "called")
	script := "#!/bin/sh\necho called >> " + mark + "\nexit 1\n"
	if err := os.WriteFile(filepath.Join(bin, "dbus-launch"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", bin+":/usr/bin:/bin")
	for _, name := range []string{"DBUS_SESSION_BUS_ADDRESS", "XDG_RUNTIME_DIR"} {
		t.Setenv(name, "") // restored with the test
		os.Unsetenv(name)
	}

	// The control: without our environment the very same program does call it, merely by starting.
	control := exec.Command(program(t), "-version")
	control.Env = []string{"PATH=" + os.Getenv("PATH")}
	if err := control.Run(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(mark); err != nil {
		t.Fatalf("the control did not call dbus-launch (%v); the test proves nothing", err)
	}
	os.Remove(mark)

	m := enrolled(t)
	if err := m.unwrap(t.Context()); err != nil {
		t.Fatal(err)
	}
	// Even the one that wants a bus starts none.
	if _, err := keyring.DialSecretService(m.spawner).Wrap(t.Context(), m.secret, aad); !errors.Is(err, enclave.ErrAbsent) || !strings.Contains(err.Error(), "no session bus") {
		t.Errorf("Secret Service without a bus: %v", err)
	}
	if _, err := os.Stat(mark); err == nil {
		t.Error("dbus-launch was called")
	}
	for _, pid := range helpers(t) {
		tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
		for _, task := range tasks {
			if children, _ := os.ReadFile(task); len(children) > 0 {
				t.Errorf("the helper has children: %s", children)
			}
		}
	}
}

func TestStartedByHandItSaysSo(t *testing.T) {
	out, err := exec.Command(program(t)).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "started by kmsd") {
		t.Errorf("%v: %s", err, out)
	}
}
