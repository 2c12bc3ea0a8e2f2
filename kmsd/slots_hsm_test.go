package main

import (
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/enclave/pkcs11/pkcs11test"
	"github.com/kmsd-project/kmsd/ipc/proto"
)

// lookAgain is the time after which the driver looks for a token that was not there. That must be within two seconds.
const lookAgain = 500 * time.Millisecond

// A token opens the store with its PIN: from a person, or from the configuration. It stands beside a TPM and the recovery key.
func TestHSMSlot(t *testing.T) {
	token := pkcs11test.New(t)
	dir := t.TempDir()
	spec := "pkcs11:" + token.Module + "?token=" + url.QueryEscape(pkcs11test.Label)
	key, pin := filepath.Join(dir, "key"), filepath.Join(dir, "pin")
	must(t, os.WriteFile(pin, []byte(pkcs11test.PIN+"\n"), 0o600))
	if run := runInitProgram(t, nil, "--state-dir", filepath.Join(dir, "s"), "--recovery-out", key, "--enclave", spec, "--pin-file", pin); run.code != 0 {
		t.Fatalf("%+v", run)
	}
	d := startReal(t, dir)
	s := d.status()
	slot := s.Slots[0]
	if d.slots()[0].ID != slot.ID { // recorded, though the keystore was never open in this log's time
		t.Errorf("slots %+v", d.slots())
	}
	if s.State != "locked" || slot.Kind != "pkcs11" || slot.Binding == "" || !strings.Contains(slot.Location, "serial="+slot.Binding) || strings.Contains(slot.Location, pkcs11test.PIN) {
		t.Fatalf("%+v", s)
	}
	d.refused(proto.OpUnlock, &proto.Unlock{}, proto.CodeLocked)
	d.refused(proto.OpUnlock, &proto.Unlock{Slot: slot.ID}, proto.CodeLocked)
	d.refused(proto.OpUnlock, &proto.Unlock{Secret: []byte("0000")}, proto.CodeAuthFailed)
	d.ask(proto.OpUnlock, &proto.Unlock{Secret: []byte(pkcs11test.PIN)}, &proto.Empty{})
	if s := d.status(); s.State != "ready" || s.Slots[0].Health != "ready" {
		t.Errorf("%+v", s)
	}
	d.ask(proto.OpKeyCreate, &proto.KeyCreate{Name: "app/key", Algorithm: "ed25519"}, &proto.KeyInfo{})
	d.ask(proto.OpSlotTest, &proto.SlotRef{ID: slot.ID, Secret: []byte(pkcs11test.PIN)}, &proto.Empty{})

	// Pulled and put back, under the running daemon. Software keys do not mind.
	putBack := token.Remove(t)
	d.ask(proto.OpSign, &proto.Sign{Key: "app/key", Data: []byte("x")}, &proto.SignReply{})
	d.refused(proto.OpSlotTest, &proto.SlotRef{ID: slot.ID, Secret: []byte(pkcs11test.PIN)}, proto.CodeAbsent)
	if h := d.slots()[0].Health; h != "absent" {
		t.Errorf("health of a token that was pulled: %s", h)
	}
	putBack()
	time.Sleep(lookAgain)
	d.ask(proto.OpSlotTest, &proto.SlotRef{ID: slot.ID, Secret: []byte(pkcs11test.PIN)}, &proto.Empty{})

	// A TPM beside it, which then opens by itself; the token is logged in to when somebody brings its PIN.
	_, tpmSpec := startTPM(t)
	var added proto.SlotAddReply
	d.ask(proto.OpSlotAdd, &proto.SlotAdd{Enclave: tpmSpec}, &added)
	d.ask(proto.OpKeyCreate, &proto.KeyCreate{Name: "app/hsm", Algorithm: "ecdsa-p256", Protection: "hsm"}, &proto.KeyInfo{})
	d = d.restart()
	if s := d.status(); s.State != "ready" || len(s.Slots) != 3 {
		t.Fatalf("%+v", s)
	}
	d.refused(proto.OpSign, &proto.Sign{Key: "app/hsm", Data: []byte("x")}, proto.CodeLocked)
	d.refused(proto.OpUnlock, &proto.Unlock{Slot: slot.ID, Secret: []byte("0000")}, proto.CodeAuthFailed)
	d.ask(proto.OpUnlock, &proto.Unlock{Slot: slot.ID, Secret: []byte(pkcs11test.PIN)}, &proto.Empty{})
	d.ask(proto.OpSign, &proto.Sign{Key: "app/hsm", Data: []byte("x")}, &proto.SignReply{})
	// Locked, the token is logged out.
	d.ask(proto.OpLock, &proto.Empty{}, &proto.Empty{})
	d.ask(proto.OpUnlock, &proto.Unlock{}, &proto.Empty{})
	d.refused(proto.OpSign, &proto.Sign{Key: "app/hsm", Data: []byte("x")}, proto.CodeLocked)
	d.ask(proto.OpSlotRemove, &proto.SlotRef{ID: added.Slot.ID}, &proto.Empty{})
	d.conn.Close()
	d.stop()

	// With the PIN in the configuration nobody is needed, not even after the token was away.
	config := filepath.Join(dir, "kmsd.toml")
	must(t, os.WriteFile(config, []byte("[devices]\nhsm = \""+spec+"\"\nhsm_pin_file = \""+pin+"\"\n"), 0o600))
	p := newReal(t, dir, "--config", config).start().ready()
	d = &realDaemon{process: p, conn: bound(t, p.admin), last: 10}
	if s := d.status(); s.State != "ready" {
		t.Fatalf("%+v", s)
	}
	d.ask(proto.OpSign, &proto.Sign{Key: "app/hsm", Data: []byte("x")}, &proto.SignReply{})
	d.ask(proto.OpKeyCreate, &proto.KeyCreate{Name: "app/hsm2", Algorithm: "ecdsa-p256", Protection: "hsm"}, &proto.KeyInfo{})
	putBack = token.Remove(t)
	d.refused(proto.OpSign, &proto.Sign{Key: "app/hsm", Data: []byte("x")}, proto.CodeAbsent)
	putBack()
	time.Sleep(lookAgain)
	d.ask(proto.OpSign, &proto.Sign{Key: "app/hsm", Data: []byte("x")}, &proto.SignReply{})
	// Initialised anew, the token has its old label and serial number: only an attempt shows that it is another one.
	d.ask(proto.OpLock, &proto.Empty{}, &proto.Empty{})
	token.InitialiseAgain(t)
	time.Sleep(lookAgain)
	d.refused(proto.OpUnlock, &proto.Unlock{Slot: slot.ID, Secret: []byte(pkcs11test.PIN)}, proto.CodeReplaced)
	if h := d.slots()[0]; h.Health != "replaced" || h.Detail == "" {
		t.Errorf("slot %+v", h)
	}
	text, err := os.ReadFile(key)
	must(t, err)
	d.ask(proto.OpLock, &proto.Empty{}, &proto.Empty{})
	d.ask(proto.OpUnlock, &proto.Unlock{Secret: text}, &proto.Empty{})
}
