package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/keystore/secmem"
	"github.com/kmsd-project/kmsd/kmsd/audit"
	"github.com/kmsd-project/kmsd/kmsd/engine"
)

// entries returns the last entries of the audit.
func (d *realDaemon) entries() []proto.AuditEntry {
	d.t.Helper()
	var page proto.AuditTailReply
	d.ask(proto.OpAuditTail, &proto.AuditTail{Last: true, Limit: 100}, &page)
	return page.Entries
}

// What never reaches an operation is recorded too: which operation, by whom, and why not.
func TestRefusalsAreRecorded(t *testing.T) {
	d := withKeystore(t)
	app := bound(t, d.app)
	app.send(10, proto.OpAuditTail, &proto.AuditTail{}, &proto.Options{Trace: "trace 1"})
	app.wantError(10, proto.CodeUnknownOp)
	app.send(11, "no_such_op", &proto.Empty{}, nil)
	app.wantError(11, proto.CodeUnknownOp)
	params, _ := proto.AppendParams(nil, &proto.Empty{})
	app.send(12, proto.OpBatch, &proto.Batch{Items: []proto.BatchItem{{Op: proto.OpStoreVerify, Params: params}}}, nil)
	app.want(12, &proto.BatchReply{})
	d.ask(proto.OpLock, &proto.Empty{}, &proto.Empty{})
	app.send(13, proto.OpKeyList, &proto.KeyList{Prefix: "APP"}, nil)
	app.wantError(13, proto.CodeLocked)
	d.ask(proto.OpUnlock, &proto.Unlock{}, &proto.Empty{})
	wanted := map[string]string{proto.OpAuditTail: "unknown_op", "unknown": "unknown_op", proto.OpKeyList: "locked"}
	for _, e := range d.entries() {
		if code, ok := wanted[e.Op]; ok && e.Code == code && !e.Allowed && e.PID == uint32(os.Getpid()) && e.Principal == "owner" {
			if e.Op == proto.OpAuditTail && e.Trace != "trace 1" {
				t.Errorf("the trace is lost: %+v", e)
			}
			delete(wanted, e.Op)
		}
	}
	if len(wanted) > 0 {
		t.Errorf("not recorded: %v in %+v", wanted, d.entries())
	}
}

// Refusals cannot flood the audit.
func TestRefusalsAreLimited(t *testing.T) {
	var r refusals
	now := time.Now()
	recorded := 0
	for range 1000 {
		if _, ok := r.take(1000, now); ok {
			recorded++
		}
	}
	if recorded != refusalBurst {
		t.Errorf("%d of 1000 are recorded", recorded)
	}
	if _, ok := r.take(1001, now); !ok {
		t.Error("another user is not recorded")
	}
	missed, ok := r.take(1000, now.Add(refusalEvery))
	if !ok || missed != 1000-refusalBurst {
		t.Errorf("a second later: %v, %d missed", ok, missed)
	}
	for uid := range uint32(3 * maxRefusalUID) {
		r.take(uid, now)
	}
	if len(r.users) > maxRefusalUID {
		t.Errorf("%d users are remembered", len(r.users))
	}
	if _, ok := r.take(1<<20, now.Add(time.Hour)); !ok {
		t.Error("users who have been quiet are not forgotten")
	}
}

// The audit has what docs/protocol.md promises of hello and of the options of a request.
func TestClientAndTraceInTheAudit(t *testing.T) {
	d := withKeystore(t)
	d.ask(proto.OpKeyCreate, &proto.KeyCreate{Name: "APP/m", Algorithm: "hmac-sha256"}, &proto.KeyInfo{})
	p := dial(t, d.app)
	p.send(1, proto.OpHello, &proto.Hello{MinVersion: 1, MaxVersion: 1, Client: "registration 1.2.3"}, nil)
	var hello proto.HelloReply
	p.want(1, &hello)
	p.send(2, proto.OpBind, &proto.Bind{Nonce: hello.Nonce}, nil)
	p.want(2, &proto.Empty{})
	p.send(3, proto.OpMAC, &proto.MAC{Key: "APP/m", Data: []byte("x")}, &proto.Options{Trace: "packet 10001"})
	p.want(3, &proto.MACReply{})
	for _, e := range d.entries() {
		if e.Op == proto.OpMAC && e.Client == "registration 1.2.3" && e.Trace == "packet 10001" {
			return
		}
	}
	t.Errorf("not found: %+v", d.entries())
}

// Acts of administration are announced, and each has its outcome.
func TestAdministrationIsRecordedTwice(t *testing.T) {
	d := withKeystore(t)
	d.ask(proto.OpRootRotate, &proto.Empty{}, &proto.ProgressReply{})
	d.ask(proto.OpLock, &proto.Empty{}, &proto.Empty{})
	d.ask(proto.OpUnlock, &proto.Unlock{}, &proto.Empty{})
	d.ask(proto.OpSlotTest, &proto.SlotRef{ID: 1}, &proto.Empty{})
	codes := make(map[string]string)
	for _, e := range d.entries() {
		codes[e.Op] += e.Code + " "
	}
	for _, op := range []string{proto.OpInit, proto.OpRootRotate, proto.OpLock, proto.OpUnlock, proto.OpSlotTest} {
		if codes[op] != "begun ok " {
			t.Errorf("%s is recorded as %q", op, codes[op])
		}
	}
}

// The answer that carries a recovery key is not given up for a deadline.
func TestRecoveryKeyOutlivesTheDeadline(t *testing.T) {
	d := startReal(t, t.TempDir())
	d.conn.send(50, proto.OpInit, &proto.Init{Enclave: "keyring:file"}, &proto.Options{DeadlineMS: 1})
	d.conn.send(51, proto.OpCancel, &proto.Cancel{ID: 50}, nil)
	keys := 0
	for range 2 {
		r := d.conn.response()
		if r.Err != nil {
			t.Fatalf("%d: %v", r.ID, r.Err)
		}
		if r.ID == 50 {
			var reply proto.InitReply
			if err := proto.DecodeReply(r.Result, &reply); err != nil || len(reply.RecoveryKey) == 0 {
				t.Errorf("%v, a key of %d bytes", err, len(reply.RecoveryKey))
			}
			d.ask(proto.OpInit, &proto.Init{Confirm: reply.Pending}, &proto.InitReply{})
			keys++
		}
	}
	if keys != 1 || d.state() != "ready" {
		t.Errorf("%d keys, state %s", keys, d.state())
	}
}

// Two daemons with different sockets do not share a state directory, and the second one touches nothing in it.
func TestOneDaemonPerState(t *testing.T) {
	dir := t.TempDir()
	startDaemon(t, dir).ready()
	before := contents(t, filepath.Join(dir, "s"))
	other := startDaemon(t, dir, "--runtime-dir", filepath.Join(dir, "other"))
	if line, err := other.waitLine("another kmsd uses"); err != nil {
		t.Errorf("the second one: %q, %v", line, err)
	}
	if after := contents(t, filepath.Join(dir, "s")); after != before {
		t.Errorf("the second daemon changed the state:\n%s\n%s", before, after)
	}
}

func contents(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.Walk(dir, func(path string, info os.FileInfo, err error) error {
		if err == nil {
			fmt.Fprintln(&b, path, info.Size(), info.ModTime())
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// Beside the audit log of another keystore none is made, and none is open while everything says that it is locked.
func TestForeignAudit(t *testing.T) {
	dir := t.TempDir()
	state := filepath.Join(dir, "s")
	if run := runInitProgram(t, nil, "--state-dir", state, "--no-recovery"); run.code != 0 {
		t.Fatalf("%+v", run)
	}
	must(t, os.RemoveAll(filepath.Join(state, auditDir)))
	log, err := audit.Open(audit.Config{Dir: filepath.Join(state, auditDir)})
	if err != nil {
		t.Fatal(err)
	}
	if err := log.Unlock(make([]byte, 32)); err != nil {
		t.Fatal(err)
	}
	log.Close()
	d := startReal(t, dir)
	if s := d.state(); s != "locked" {
		t.Fatalf("state %s", s)
	}
	d.last++
	d.conn.send(d.last, proto.OpUnlock, &proto.Unlock{}, nil)
	if e := d.conn.wantError(d.last, proto.CodeMisconfigured); !strings.Contains(e.Message, "move it away") {
		t.Errorf("%v", e)
	}
	d.conn.Close()
	d.stop()

	other := filepath.Join(dir, "other")
	if err := os.Mkdir(other, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(state, auditDir), filepath.Join(other, auditDir)); err != nil {
		t.Fatal(err)
	}
	run := runInitProgram(t, nil, "--state-dir", other, "--no-recovery")
	if run.code != 1 || !strings.Contains(run.errors, "another auditor") || !strings.Contains(run.errors, "hint: move") {
		t.Errorf("%+v", run)
	}
}

// A keystore that is open while the daemon says locked would be locked in name only.
func TestFailedUnlockLocksAgain(t *testing.T) {
	rig := newSlotRig(t)
	s, _ := rig.store(t, initParams{Enclave: "keyring:file", NoRecovery: true})
	dir := t.TempDir()
	foreign, err := audit.Open(audit.Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	defer foreign.Close()
	if err := foreign.Unlock(make([]byte, 32)); err != nil {
		t.Fatal(err)
	}
	d := &daemon{audit: foreign, slots: rig.slotKeeper, engine: engine.New(engine.Config{Audit: foreign})}
	d.adopt(s)
	if s.Locked() {
		t.Fatal("the keystore is locked from the start")
	}
	if err := d.unlocked(); !errors.Is(err, audit.ErrKey) {
		t.Errorf("%v", err)
	}
	if !s.Locked() || phase(d.phase.Load()) != phaseLocked {
		t.Error("the keystore is still open")
	}
}

// A build that does not erase what it should says so in status.
func TestMemoryProtectionIsHonest(t *testing.T) {
	arena, err := secmem.NewArena(4096)
	if err != nil {
		t.Fatal(err)
	}
	defer arena.Close()
	d := &daemon{arena: arena}
	if level, weak := d.memoryProtection(); level != arena.Protection() || (level == "full") != (len(weak) == 0) {
		t.Errorf("%s, %q", level, weak)
	}
	d.weaknesses = []string{"this build erases nothing"}
	if level, weak := d.memoryProtection(); level != "partial" || len(weak) == 0 {
		t.Errorf("%s, %q", level, weak)
	}
}

// An init that shows a recovery key takes two acts, and both have their outcome although the first ends before there is anybody to
// encrypt it to.
func TestInitInTwoStepsIsRecorded(t *testing.T) {
	d := startReal(t, t.TempDir())
	var begun proto.InitReply
	d.ask(proto.OpInit, &proto.Init{Enclave: "keyring:file"}, &begun)
	if len(begun.Pending) == 0 || len(begun.RecoveryKey) == 0 {
		t.Fatalf("%+v", begun)
	}
	d.ask(proto.OpInit, &proto.Init{Confirm: begun.Pending}, &proto.InitReply{})
	codes := ""
	for _, e := range d.entries() {
		if e.Op == proto.OpInit {
			codes += e.Code + " "
		}
	}
	if codes != "begun ok begun ok " {
		t.Errorf("recorded as %q", codes)
	}
}
