package main

import (
	"context"
	"encoding/hex"
	"fmt"
	"time"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/keystore/secmem"
)

func handlePing(c *call) (proto.Message, error) {
	_, err := decode[proto.Empty](c)
	return nil, err
}

func handleWhoami(c *call) (proto.Message, error) {
	if _, err := decode[proto.Empty](c); err != nil {
		return nil, err
	}
	return c.session.identity(), nil
}

// handleStatus tells everybody what the daemon is and whether it is ready, and those whom the policy knows the rest.
func handleStatus(c *call) (proto.Message, error) {
	if _, err := decode[proto.Empty](c); err != nil {
		return nil, err
	}
	d := c.daemon
	if d.mayHeal() {
		d.heal(c.ctx)
	}
	reply := &proto.Status{Version: version, Mode: d.config.Mode, State: phase(d.phase.Load()).String()}
	if c.session.identity().Principal == "" {
		return reply, nil
	}
	log := d.audit.Stats()
	var weak []string
	reply.MemoryProtection, weak = d.memoryProtection()
	reply.Warnings = append(reply.Warnings, weak...)
	reply.UptimeSeconds = uint64(time.Since(d.started).Seconds())
	reply.Connections = uint64(d.ipc.Conns())
	reply.Requests = d.requests.Load()
	reply.Panics = d.panics.Load() + d.engine.Panics()
	reply.Busy = d.busy.Load()
	reply.AuditEntries = log.Head.Size
	reply.PolicyEpoch = d.engine.PolicyEpoch()
	if c.session.who.Admin {
		reply.StateDir = d.config.StateDir
	}
	if log.Failing != nil {
		reply.Warnings = append(reply.Warnings, log.Failing.Error())
	}
	s := d.store.Load()
	if s == nil {
		return reply, nil
	}
	info := s.Info()
	reply.StoreID = hex.EncodeToString(info.StoreID[:])
	reply.InstanceID = hex.EncodeToString(info.InstanceID[:])
	reply.Epoch = uint64(info.Epoch)
	reply.Keys = info.Keys
	reply.ErasurePending = info.ErasurePending
	reply.Rollback = info.Rollback
	reply.Escrow = info.Escrow
	reply.Warnings = append(reply.Warnings, info.Warnings...)
	if check := d.engine.Check(); check != nil && check.Warning() != "" {
		reply.Warnings = append(reply.Warnings, check.Warning())
	}
	if seen := d.engine.ClockBehind(); !seen.IsZero() {
		reply.Warnings = append(reply.Warnings, fmt.Sprintf("the clock is behind %s, which the keystore has seen: no certificate is issued and no key replaced until it is right; if it is right now: kmsctl clock accept",
			seen.UTC().Format(time.RFC3339)))
	}
	if c.session.who.Admin {
		reply.Slots = slotReplies(d.slots.list(c.ctx, s))
		if pin, err := pinOf(s); err == nil {
			reply.StorePin = pin.String()
		}
		if s.Locked() {
			reply.LockReason, reply.LockDetail = d.healing.why()
		}
	}
	return reply, nil
}

// memoryProtection says whether everything is there that keeps keys from lying about in memory, and what is not.
func (d *daemon) memoryProtection() (level string, weak []string) {
	level = d.arena.Protection()
	if level == secmem.ProtectionPartial {
		weak = append(weak, "this kernel has no secret memory: root can read the keystore's keys in the daemon's memory")
	}
	if len(d.weaknesses) > 0 {
		level, weak = secmem.ProtectionPartial, append(weak, d.weaknesses...)
	}
	return level, weak
}

func handleSelfTest(c *call) (proto.Message, error) {
	if _, err := decode[proto.Empty](c); err != nil {
		return nil, err
	}
	reply := &proto.SelfTestReply{}
	err := c.daemon.engine.SelfTest(c.ctx, &c.session.who, func(a keyspec.Algorithm, err error) {
		result := proto.SelfTestResult{Algorithm: string(a), Passed: err == nil}
		if err != nil {
			result.Message = err.Error()
		}
		reply.Results = append(reply.Results, result)
	})
	if err != nil {
		return nil, err
	}
	return reply, nil
}

func handleInit(c *call) (proto.Message, error) {
	in, err := decode[proto.Init](c)
	if err != nil {
		return nil, err
	}
	defer clear(in.PIN)
	d := c.daemon
	if len(in.Confirm) > 0 {
		n, err := c.session.confirmed(c.request.Op, in.Confirm)
		if err != nil {
			return nil, err
		}
		defer n.close()
		var reply *proto.InitReply
		err = c.change("confirm", func() (err error) {
			reply, err = d.makeStore(c.ctx, n)
			return err
		})
		return reply, err
	}
	reply := &proto.InitReply{}
	err = c.change(in.Enclave, func() error {
		if err := d.mayInit(); err != nil {
			return err
		}
		n, err := d.slots.prepare(c.ctx, initParams{Enclave: in.Enclave, NoRecovery: in.NoRecovery, PIN: in.PIN, EscrowTo: in.EscrowTo})
		if err != nil {
			return err
		}
		if len(n.recovery) > 0 {
			reply.RecoveryKey, n.recovery = n.recovery[0], nil
			reply.Warnings = n.warnings
			reply.Pending = c.session.await(c.request.Op, n)
			return nil
		}
		defer n.close()
		reply, err = d.makeStore(c.ctx, n)
		return err
	})
	if err != nil {
		return nil, err
	}
	return reply, nil
}

// mayInit refuses to prepare a keystore that could not be made, or not be opened.
func (d *daemon) mayInit() error {
	if d.store.Load() != nil {
		return keystore.ErrStoreExists
	}
	if d.pin.id != "" {
		return hinted{errOtherStore, "take store_id out of the configuration first"}
	}
	return foreignAudit(d.config.StateDir)
}

// makeStore makes the keystore, and lets the devices forget its slots when that fails.
func (d *daemon) makeStore(ctx context.Context, n *enrolment) (*proto.InitReply, error) {
	d.turn.Lock()
	defer d.turn.Unlock()
	err := d.mayInit()
	var s *keystore.Store
	if err == nil {
		s, err = n.create(ctx, d.storeConfig())
	}
	if err != nil {
		n.abort(ctx)
		return nil, err
	}
	d.adopt(s)
	if err := d.unlocked(); err != nil { // the keystore is made all the same
		d.healing.failed(err)
		n.warnings = append(n.warnings, "the new keystore stays locked: "+err.Error())
	}
	id := s.Info().StoreID
	reply := &proto.InitReply{StoreID: hex.EncodeToString(id[:]), Slots: slotReplies(d.slots.list(ctx, s)), Warnings: n.warnings}
	if pin, err := pinOf(s); err == nil {
		reply.StorePin = pin.String()
	}
	return reply, nil
}

// handleLock locks in any case: what cannot be recorded now is recorded when the disk has room again.
func handleLock(c *call) (proto.Message, error) {
	if _, err := decode[proto.Empty](c); err != nil {
		return nil, err
	}
	d := c.daemon
	return nil, d.engine.ChangeAlways(c.ctx, &c.session.who, c.request.Op, "", func() error {
		d.turn.Lock()
		defer d.turn.Unlock()
		d.healing.hold()
		d.slots.drop(d.store.Load().Slots()...)
		d.lock()
		return nil
	})
}

func handleUnlock(c *call) (proto.Message, error) {
	in, err := decode[proto.Unlock](c)
	if err != nil {
		return nil, err
	}
	defer wipe(in.Secret, in.Shares)
	d := c.daemon
	info := ""
	if in.AcceptRollback {
		info = "accept-rollback"
	}
	return nil, c.change(info, func() error {
		d.turn.Lock()
		s := d.store.Load()
		a := attempt{Slot: in.Slot, Auth: enclave.Auth{Secret: in.Secret, Shares: in.Shares}, Why: onDemand, AcceptRollback: in.AcceptRollback}
		a.Check = !s.Locked() && phase(d.phase.Load()) == phaseReady
		if a.Check {
			d.turn.Unlock() // nobody who wants to lock waits for a device that hangs
			if in.Slot == 0 && len(in.Secret) == 0 && len(in.Shares) == 0 {
				return nil
			}
			// This tests the slot, and logs in to its device, so that resident keys in it can be used.
			return d.slots.unlock(c.ctx, s, a)
		}
		defer d.turn.Unlock()
		err := d.slots.unlock(c.ctx, s, a)
		if err == nil {
			err = d.unlocked()
		}
		if err != nil {
			d.healing.failed(err)
		}
		return err
	})
}

func wipe(secret []byte, shares [][]byte) {
	clear(secret)
	for _, s := range shares {
		clear(s)
	}
}

func handleSlotList(c *call) (proto.Message, error) {
	if _, err := decode[proto.Empty](c); err != nil {
		return nil, err
	}
	d := c.daemon
	reply := &proto.SlotListReply{}
	err := c.administrate("", func() error {
		reply.Slots = slotReplies(d.slots.list(c.ctx, d.store.Load()))
		return nil
	})
	if err != nil {
		return nil, err
	}
	return reply, nil
}

func handleSlotAdd(c *call) (proto.Message, error) {
	in, err := decode[proto.SlotAdd](c)
	if err != nil {
		return nil, err
	}
	defer clear(in.PIN)
	d := c.daemon
	store := d.store.Load()
	if len(in.Confirm) > 0 {
		n, err := c.session.confirmed(c.request.Op, in.Confirm)
		if err != nil {
			return nil, err
		}
		defer n.close()
		var reply *proto.SlotAddReply
		err = c.change("confirm", func() (err error) {
			reply, err = addSlot(c.ctx, store, n)
			return err
		})
		return reply, err
	}
	reply := &proto.SlotAddReply{}
	err = c.change(in.Enclave, func() error {
		n, err := d.slots.prepareSlot(c.ctx, store, addParams{
			Enclave: in.Enclave, Label: in.Label, PIN: in.PIN, Threshold: in.Threshold, Shares: in.Shares,
		})
		if err != nil {
			return err
		}
		if len(n.recovery) > 0 {
			reply.Secrets, n.recovery = n.recovery, nil
			reply.Warnings = n.warnings
			reply.Pending = c.session.await(c.request.Op, n)
			return nil
		}
		defer n.close()
		reply, err = addSlot(c.ctx, store, n)
		return err
	})
	if err != nil {
		return nil, err
	}
	return reply, nil
}

// addSlot adds what was enrolled, and lets the device forget it when that fails.
func addSlot(ctx context.Context, s *keystore.Store, n *enrolment) (*proto.SlotAddReply, error) {
	slot, err := n.add(ctx, s)
	if err != nil {
		n.abort(ctx)
		return nil, err
	}
	return &proto.SlotAddReply{Slot: slotReply(slotStatus{slot, enclave.Health{State: enclave.Ready}}), Warnings: n.warnings}, nil
}

func handleSlotRemove(c *call) (proto.Message, error) {
	in, err := decode[proto.SlotRef](c)
	if err != nil {
		return nil, err
	}
	defer wipe(in.Secret, in.Shares)
	d := c.daemon
	reply := &proto.SlotRemoveReply{}
	err = c.change(fmt.Sprintf("slot %d", in.ID), func() (err error) {
		reply.Warnings, err = d.slots.remove(c.ctx, d.store.Load(), in.ID)
		return err
	})
	if err != nil {
		return nil, err
	}
	return reply, nil
}

func handleSlotTest(c *call) (proto.Message, error) {
	in, err := decode[proto.SlotRef](c)
	if err != nil {
		return nil, err
	}
	defer wipe(in.Secret, in.Shares)
	d := c.daemon
	return nil, c.change(fmt.Sprintf("slot %d", in.ID), func() error { // a wrong PIN costs an attempt
		return d.slots.test(c.ctx, d.store.Load(), in.ID, enclave.Auth{Secret: in.Secret, Shares: in.Shares})
	})
}

func slotReplies(in []slotStatus) []proto.Slot {
	out := make([]proto.Slot, len(in))
	for i, s := range in {
		out[i] = slotReply(s)
	}
	return out
}

func slotReply(s slotStatus) proto.Slot {
	return proto.Slot{
		ID: s.ID, Kind: s.Kind, Label: s.Label, Level: s.Level, Health: string(s.Health.State), Until: seconds(s.Health.Until),
		Binding: s.Binding, Created: seconds(s.Created), Location: s.Location, Detail: s.Health.Detail,
	}
}
