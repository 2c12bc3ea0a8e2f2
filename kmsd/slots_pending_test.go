package main

import (
	"sync"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/keystore"
)

// The client is gone before it has said that the recovery key is safe: there is no keystore, and init can be asked for again.
func TestInitIsUndoneWithoutItsClient(t *testing.T) {
	d := startReal(t, t.TempDir())
	var first proto.InitReply
	d.ask(proto.OpInit, &proto.Init{}, &first)
	d.conn.Close()
	d.conn = bound(t, d.admin)
	d.refused(proto.OpInit, &proto.Init{Confirm: first.Pending}, proto.CodeInvalid) // another connection
	if exists, err := keystore.Exists(d.dir + "/s"); err != nil || exists || d.state() != "uninitialised" {
		t.Errorf("there is a keystore: %v, %s", err, d.state())
	}
	var second, third, made proto.InitReply
	d.ask(proto.OpInit, &proto.Init{}, &second)
	d.ask(proto.OpInit, &proto.Init{}, &third)
	d.refused(proto.OpInit, &proto.Init{Confirm: second.Pending}, proto.CodeInvalid) // the later one took its place
	d.ask(proto.OpInit, &proto.Init{Confirm: third.Pending}, &made)
	d.refused(proto.OpInit, &proto.Init{Confirm: third.Pending}, proto.CodeExists)
	d.ask(proto.OpLock, &proto.Empty{}, &proto.Empty{})
	d.refused(proto.OpUnlock, &proto.Unlock{Secret: first.RecoveryKey}, proto.CodeAuthFailed)
	d.ask(proto.OpUnlock, &proto.Unlock{Secret: third.RecoveryKey}, &proto.Empty{})
}

// The same for a slot that is added.
func TestSlotIsUndoneWithoutItsClient(t *testing.T) {
	d, _ := initialised(t)
	for _, params := range []*proto.SlotAdd{{Enclave: "recovery"}, {Enclave: "recovery:shares", Threshold: 2, Shares: 3}} {
		var added proto.SlotAddReply
		d.ask(proto.OpSlotAdd, params, &added)
		if len(d.slots()) != 2 || len(added.Pending) == 0 {
			t.Errorf("a slot was added before its secret was safe: %+v", d.slots())
		}
		d.refused(proto.OpInit, &proto.Init{Confirm: added.Pending}, proto.CodeExists)
		d.conn.Close()
		d.conn = bound(t, d.admin)
		d.refused(proto.OpSlotAdd, &proto.SlotAdd{Confirm: added.Pending}, proto.CodeInvalid)
		if len(d.slots()) != 2 {
			t.Errorf("slots %+v", d.slots())
		}
	}
	// Locked in between, the slot cannot be added any more.
	var added proto.SlotAddReply
	d.ask(proto.OpSlotAdd, &proto.SlotAdd{Enclave: "recovery"}, &added)
	d.ask(proto.OpLock, &proto.Empty{}, &proto.Empty{})
	d.refused(proto.OpSlotAdd, &proto.SlotAdd{Confirm: added.Pending}, proto.CodeLocked)
	d.ask(proto.OpUnlock, &proto.Unlock{}, &proto.Empty{})
	if len(d.slots()) != 2 {
		t.Errorf("slots %+v", d.slots())
	}
}

// However init, lock and unlock come together, what the daemon says and what it does agree.
func TestInitLockAndUnlockTakeTurns(t *testing.T) {
	d := startReal(t, t.TempDir())
	const clients, rounds = 4, 12
	made := make([]proto.InitReply, clients)
	var wg sync.WaitGroup
	conns := make([]*peer, clients)
	for i := range conns {
		conns[i] = bound(t, d.admin)
	}
	for i, c := range conns {
		wg.Go(func() {
			c.send(100, proto.OpInit, &proto.Init{}, nil)
			r := c.response()
			if r.Err != nil || proto.DecodeReply(r.Result, &made[i]) != nil {
				return
			}
			c.send(101, proto.OpInit, &proto.Init{Confirm: made[i].Pending}, nil)
			if r := c.response(); r.Err != nil {
				made[i].RecoveryKey = nil
			}
		})
	}
	wg.Wait()
	var key []byte
	for _, m := range made {
		if len(m.RecoveryKey) > 0 {
			if key != nil {
				t.Error("two keystores were made")
			}
			key = m.RecoveryKey
		}
	}
	if key == nil {
		t.Fatal("no keystore was made")
	}
	for i, c := range conns {
		wg.Go(func() {
			for n := range rounds {
				op, params := proto.OpLock, proto.Message(&proto.Empty{})
				if (n+i)%2 == 0 {
					op, params = proto.OpUnlock, &proto.Unlock{}
				}
				c.send(uint64(200+n), op, params, nil)
				if r := c.response(); r.Err != nil {
					t.Errorf("%s: %v", op, r.Err)
				}
			}
		})
	}
	wg.Wait()
	d.ask(proto.OpUnlock, &proto.Unlock{}, &proto.Empty{})
	d.ask(proto.OpKeyCreate, &proto.KeyCreate{Name: "app/key", Algorithm: "ed25519"}, &proto.KeyInfo{})
	d.ask(proto.OpLock, &proto.Empty{}, &proto.Empty{})
	time.Sleep(10 * time.Millisecond)
	d.refused(proto.OpKeyGet, &proto.KeyRef{Key: "app/key"}, proto.CodeLocked)
	d.ask(proto.OpUnlock, &proto.Unlock{Secret: key}, &proto.Empty{})
	d.ask(proto.OpKeyGet, &proto.KeyRef{Key: "app/key"}, &proto.KeyInfo{})
}
