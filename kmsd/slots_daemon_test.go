package main

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/enclave/recovery"
	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/keystore"
)

// realDaemon is the real program with the real helper beside it, and what one asks it on the admin socket.
type realDaemon struct {
	*process
	conn *peer
	last uint64
}

func startReal(t *testing.T, dir string) *realDaemon {
	t.Helper()
	p := newReal(t, dir).start().ready()
	return &realDaemon{process: p, conn: bound(t, p.admin), last: 10}
}

// newReal returns the real program on a directory, not yet started.
func newReal(t *testing.T, dir string, args ...string) *process {
	t.Helper()
	p := &process{t: t, dir: dir, lines: make(chan string, 1000)}
	p.app, p.admin = filepath.Join(dir, "r", "kmsd.sock"), filepath.Join(dir, "r", "admin.sock")
	p.cmd = exec.Command(program(t), append([]string{"run", "--state-dir", filepath.Join(dir, "s"), "--runtime-dir", filepath.Join(dir, "r")}, args...)...)
	p.cmd.Env = append(tokenEnv(), "HOME="+dir)
	return p
}

// restart stops the daemon and starts another one on the same directory.
func (d *realDaemon) restart() *realDaemon {
	d.t.Helper()
	d.conn.Close()
	d.stop()
	return startReal(d.t, d.dir)
}

func (d *realDaemon) ask(op string, params, reply proto.Message) {
	d.t.Helper()
	d.last++
	d.conn.send(d.last, op, params, nil)
	d.conn.want(d.last, reply)
}

func (d *realDaemon) refused(op string, params proto.Message, code proto.Code) {
	d.t.Helper()
	d.last++
	d.conn.send(d.last, op, params, nil)
	d.conn.wantError(d.last, code)
}

func (d *realDaemon) state() string {
	d.t.Helper()
	var s proto.Status
	d.ask(proto.OpStatus, &proto.Empty{}, &s)
	return s.State
}

func (d *realDaemon) slots() []proto.Slot {
	d.t.Helper()
	var r proto.SlotListReply
	d.ask(proto.OpSlotList, &proto.Empty{}, &r)
	return r.Slots
}

// initialised makes a keystore offline and starts the daemon on it.
func initialised(t *testing.T) (d *realDaemon, recoveryKey []byte) {
	t.Helper()
	dir := t.TempDir()
	key := filepath.Join(dir, "key")
	if run := runInitProgram(t, nil, "--state-dir", filepath.Join(dir, "s"), "--recovery-out", key); run.code != 0 {
		t.Fatalf("%+v", run)
	}
	text, err := os.ReadFile(key)
	if err != nil {
		t.Fatal(err)
	}
	return startReal(t, dir), text
}

func TestDaemonUnlocksItself(t *testing.T) {
	d, _ := initialised(t)
	if s := d.state(); s != "ready" {
		t.Fatalf("state %q", s)
	}
	slots := d.slots()
	if len(slots) != 2 || slots[0].Kind != "keyring:file" || slots[0].Health != "ready" || slots[0].Binding == "" ||
		!strings.Contains(slots[0].Level, "not against root") || slots[1].Kind != "recovery" || slots[1].Health != "ready" {
		t.Errorf("slots %+v", slots)
	}
	d.ask(proto.OpSlotTest, &proto.SlotRef{ID: slots[0].ID}, &proto.Empty{})
	d.ask(proto.OpLock, &proto.Empty{}, &proto.Empty{})
	if s := d.state(); s != "locked" {
		t.Errorf("state %q", s)
	}
	d.ask(proto.OpUnlock, &proto.Unlock{}, &proto.Empty{})
	if s := d.state(); s != "ready" {
		t.Errorf("state %q", s)
	}
	d.ask(proto.OpKeyCreate, &proto.KeyCreate{Name: "app/key", Algorithm: "ed25519"}, &proto.KeyInfo{})
	if s := d.restart().state(); s != "ready" {
		t.Errorf("state after a restart %q", s)
	}
}

// The machine secret is lost. kmsd starts locked and says so; the recovery key opens; the machine is enrolled again.
func TestMachineSecretLost(t *testing.T) {
	d, key := initialised(t)
	d.ask(proto.OpKeyCreate, &proto.KeyCreate{Name: "app/key", Algorithm: "ed25519"}, &proto.KeyInfo{})
	if err := os.Remove(filepath.Join(d.dir, "s", "keyring", "machine-secret")); err != nil {
		t.Fatal(err)
	}
	d = d.restart()
	if s := d.state(); s != "locked" {
		t.Fatalf("state %q", s)
	}
	d.refused(proto.OpKeyGet, &proto.KeyRef{Key: "app/key"}, proto.CodeLocked)
	d.refused(proto.OpUnlock, &proto.Unlock{}, proto.CodeReplaced)
	d.refused(proto.OpUnlock, &proto.Unlock{Secret: recovery.NewKey().Text()}, proto.CodeAuthFailed)
	if h := d.slots()[0].Health; h != "replaced" {
		t.Errorf("health %q", h)
	}
	d.ask(proto.OpUnlock, &proto.Unlock{Secret: key}, &proto.Empty{})
	d.ask(proto.OpKeyGet, &proto.KeyRef{Key: "app/key"}, &proto.KeyInfo{})

	var added proto.SlotAddReply
	d.ask(proto.OpSlotAdd, &proto.SlotAdd{Enclave: "keyring:file"}, &added)
	d.ask(proto.OpSlotRemove, &proto.SlotRef{ID: 1}, &proto.Empty{})
	d = d.restart()
	if s := d.state(); s != "ready" {
		t.Errorf("state %q", s)
	}
	d.ask(proto.OpKeyGet, &proto.KeyRef{Key: "app/key"}, &proto.KeyInfo{})
	for _, s := range d.slots() {
		if s.Health != "ready" {
			t.Errorf("slot %+v", s)
		}
	}
}

func TestSharesOpenTheDaemon(t *testing.T) {
	d, _ := initialised(t)
	var added proto.SlotAddReply
	d.ask(proto.OpSlotAdd, &proto.SlotAdd{Enclave: "recovery:shares", Threshold: 2, Shares: 3}, &added)
	pending := added
	d.ask(proto.OpSlotAdd, &proto.SlotAdd{Confirm: pending.Pending}, &added)
	added.Secrets = pending.Secrets
	if len(added.Secrets) != 3 {
		t.Fatalf("%d shares", len(added.Secrets))
	}
	shares := make([][]byte, 3)
	for i, s := range added.Secrets {
		shares[i] = append(shares[i], s...)
	}
	d.ask(proto.OpSlotTest, &proto.SlotRef{ID: added.Slot.ID, Shares: shares[:2]}, &proto.Empty{})
	d.refused(proto.OpSlotTest, &proto.SlotRef{ID: added.Slot.ID, Shares: shares[:1]}, proto.CodeAuthFailed)
	d.ask(proto.OpLock, &proto.Empty{}, &proto.Empty{})
	d.refused(proto.OpUnlock, &proto.Unlock{Shares: shares[2:]}, proto.CodeAuthFailed)
	d.ask(proto.OpUnlock, &proto.Unlock{Shares: shares[1:]}, &proto.Empty{})
	if s := d.state(); s != "ready" {
		t.Errorf("state %q", s)
	}
	d.refused(proto.OpSlotAdd, &proto.SlotAdd{Enclave: "recovery:shares", Threshold: 5, Shares: 3}, proto.CodeInvalid)
	d.refused(proto.OpSlotAdd, &proto.SlotAdd{Enclave: "tpm:/nonexistent/tpm"}, proto.CodeAbsent)
	d.refused(proto.OpSlotRemove, &proto.SlotRef{}, proto.CodeInvalid)
}

// The root is replaced while the device of a slot is away; when it is back, the slot opens the new root.
func TestRootRotatedWithoutTheDevice(t *testing.T) {
	d, _ := initialised(t)
	secret := filepath.Join(d.dir, "s", "keyring", "machine-secret")
	if err := os.Rename(secret, secret+".away"); err != nil {
		t.Fatal(err)
	}
	d.ask(proto.OpRootRotate, &proto.Empty{}, &proto.ProgressReply{})
	if err := os.Rename(secret+".away", secret); err != nil {
		t.Fatal(err)
	}
	if s := d.restart().state(); s != "ready" {
		t.Errorf("state %q", s)
	}
}

// The helper dies again and again while slots are tested; kmsd and the keystore do not mind.
func TestHelperKilledUnderTheDaemon(t *testing.T) {
	d, _ := initialised(t)
	binary := filepath.Join(filepath.Dir(program(t)), "kmsd-keyring")
	killed := 0
	for range 20 {
		d.last++
		d.conn.send(d.last, proto.OpSlotTest, &proto.SlotRef{ID: 1}, nil)
		for _, pid := range processesOf(t, binary) {
			if syscall.Kill(pid, syscall.SIGKILL) == nil {
				killed++
			}
		}
		d.conn.frame() // a success, or a typed refusal
	}
	if killed == 0 {
		t.Fatal("no helper was hit; the test proves nothing")
	}
	d.last++
	d.conn.send(d.last, proto.OpSlotTest, &proto.SlotRef{ID: 1}, nil)
	d.conn.frame() // may still meet the corpse
	d.ask(proto.OpSlotTest, &proto.SlotRef{ID: 1}, &proto.Empty{})
	if s := d.state(); s != "ready" {
		t.Errorf("state %q", s)
	}
	d.conn.Close()
	d.stop()
	if left := processesOf(t, binary); len(left) != 0 {
		t.Errorf("helpers outlive kmsd: %v", left)
	}
}

// processesOf returns the processes that run a program.
func processesOf(t *testing.T, binary string) []int {
	t.Helper()
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	var own []int
	if os.Geteuid() != 0 {
		own = childrenOf(t, os.Getpid())
	}
	var pids []int
	for _, dir := range dirs {
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil {
			t.Fatal(err)
		}
		exe, err := os.Readlink(filepath.Join(dir, "exe"))
		if errors.Is(err, fs.ErrPermission) && slices.Contains(own, pid) { // only root sees the file; the name has to do
			if name, err := os.ReadFile(filepath.Join(dir, "comm")); err == nil && strings.TrimSpace(string(name)) == filepath.Base(binary) {
				exe = binary
			}
		}
		if exe == binary {
			pids = append(pids, pid)
		}
	}
	return pids
}

// The operation init on a running daemon does what kmsd init does.
func TestInitOverTheSocket(t *testing.T) {
	d := startReal(t, t.TempDir())
	d.refused(proto.OpInit, &proto.Init{Enclave: "what"}, proto.CodeInvalid)
	var made proto.InitReply
	d.ask(proto.OpInit, &proto.Init{}, &made)
	key := append([]byte(nil), made.RecoveryKey...)
	if len(key) == 0 || made.StoreID != "" || d.state() != "uninitialised" {
		t.Errorf("%+v, state %s", made, d.state())
	}
	d.refused(proto.OpInit, &proto.Init{Confirm: make([]byte, 16)}, proto.CodeInvalid)
	confirm := &proto.Init{Confirm: made.Pending}
	made = proto.InitReply{}
	d.ask(proto.OpInit, confirm, &made)
	if len(made.Slots) != 2 || made.StoreID == "" || len(made.RecoveryKey) != 0 || !strings.HasPrefix(made.StorePin, made.StoreID+"-") {
		t.Errorf("%+v", made)
	}
	if s := d.state(); s != "ready" {
		t.Errorf("state %q", s)
	}
	d.refused(proto.OpInit, &proto.Init{}, proto.CodeExists)
	d = d.restart()
	if s := d.state(); s != "ready" {
		t.Errorf("state %q", s)
	}
	d.ask(proto.OpLock, &proto.Empty{}, &proto.Empty{})
	d.ask(proto.OpUnlock, &proto.Unlock{Secret: key}, &proto.Empty{})
}

// The helper program is not installed: kmsd says so and what to do, and the recovery key opens all the same.
func TestWithoutTheHelperProgram(t *testing.T) {
	d, key := initialised(t)
	d.conn.Close()
	d.stop()
	alone := filepath.Join(t.TempDir(), "kmsd")
	content, err := os.ReadFile(program(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(alone, content, 0o755); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(alone, "init", "--state-dir", filepath.Join(t.TempDir(), "s"), "--no-recovery").CombinedOutput()
	if err == nil || !strings.Contains(string(out), "hint: install kmsd-keyring in "+filepath.Dir(alone)) {
		t.Errorf("%v: %s", err, out)
	}
	if err := openedBy(t, filepath.Join(d.dir, "s"), enclave.Auth{Secret: key}); err != nil {
		t.Error(err)
	}
	if there, err := keystore.Exists(filepath.Join(d.dir, "s")); err != nil || !there {
		t.Error(err)
	}
}
