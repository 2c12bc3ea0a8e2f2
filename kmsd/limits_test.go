package main

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/audit"
	"github.com/kmsd-project/kmsd/kmsd/engine"
)

// largestKey is a key whose every part is as large as the engine lets it become.
func largestKey() *keystore.Key {
	far := time.Unix(maxTime, 0)
	key := &keystore.Key{
		Name:      keyspec.Name(strings.Repeat("A", keyspec.MaxApplication) + "/" + strings.Repeat("r", keyspec.MaxReference)),
		Algorithm: keyspec.RSA4096, Usages: keyspec.Usages(), Origin: keyspec.Generated, Protection: keyspec.Software,
		Profile: "mosip-module", Exportable: true, Durable: true, Owner: 1<<32 - 1, Created: far, Keep: 1<<32 - 1,
		Labels: map[string]string{}, MinVersion: 1<<32 - 1,
	}
	left := keyspec.MaxLabelBytes
	for i := range keyspec.MaxLabels {
		name := fmt.Sprintf("%0*d", keyspec.MaxLabelName, i)
		value := strings.Repeat("v", min(keyspec.MaxLabelValue, left/(keyspec.MaxLabels-i)-len(name)))
		key.Labels[name] = value
		left -= len(name) + len(value)
	}
	for i := range keyspec.MaxUsableVia {
		key.UsableVia = append(key.UsableVia, fmt.Sprintf("%0*d", keyspec.MaxBridgeName, i))
	}
	for i := range keyspec.MaxVersions {
		key.Versions = append(key.Versions, keystore.Version{
			Number: keyspec.Version(1<<32 - keyspec.MaxVersions + i), State: keyspec.Deactivated, Created: far, NotBefore: far,
			Expires: far, Reason: keyspec.CessationOfOperation, Revoked: far, DestroyAt: far, Invocations: 1<<64 - 1,
			SPKISHA256: [32]byte{1},
		})
	}
	key.Current = key.Versions[0].Number
	return key
}

// TestRepliesFitTheirFrames encodes every reply that grows with what it tells of, at its largest.
func TestRepliesFitTheirFrames(t *testing.T) {
	long := func(n int) string { return strings.Repeat("ü", n) }
	many := func(n int, s string) []string {
		list := make([]string, n)
		for i := range list {
			list[i] = s
		}
		return list
	}
	fits := func(name string, m proto.Message) {
		t.Helper()
		frame, err := proto.AppendResponse(nil, 1<<64-1, nil, m)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			return
		}
		t.Logf("%s: %d bytes", name, len(frame))
		r, err := proto.ParseResponse(frame[4:])
		if err != nil {
			t.Fatal(err)
		}
		for _, body := range proto.Bodies() { // the bounds of reading are those of writing
			if again := body.Result(); fmt.Sprintf("%T", again) == fmt.Sprintf("%T", m) {
				if err := proto.DecodeReply(r.Result, again); err != nil {
					t.Errorf("%s: read back: %v", name, err)
				}
				break
			}
		}
	}

	key := largestKey()
	fits("key", keyInfo(key))
	row := listRow(key)
	if len(row.Versions) != listVersions || row.Versions[0].Version != uint32(key.Current) ||
		row.Versions[listVersions-1].Version != uint32(key.Versions[len(key.Versions)-1].Number) {
		t.Errorf("a row of a list shows the versions %v", row.Versions)
	}
	page := &proto.KeyListReply{Next: make([]byte, 512)}
	for size := infoSize(row); size <= listSpace; size += infoSize(row) {
		page.Keys = append(page.Keys, *row)
	}
	if len(page.Keys) == 0 {
		t.Error("one key fills more than a page")
	}
	fits("list", page)

	slot := proto.Slot{
		ID: 1<<32 - 1, Kind: long(32), Label: long(255), Level: long(255), Health: long(4096), Until: maxTime, Binding: long(255),
		Created: maxTime, Location: long(1024), Detail: long(4096),
	}
	slots := make([]proto.Slot, keyspec.MaxSlots)
	for i := range slots {
		slots[i] = slot
	}
	recipient := strings.Repeat("r", keyspec.MaxRecipient)
	fits("status", &proto.Status{
		Version: strings.Repeat("v", 128), Mode: modeSystem, State: "uninitialised", StoreID: strings.Repeat("f", 32),
		InstanceID: strings.Repeat("f", 32), Epoch: 1<<64 - 1, Keys: 1<<64 - 1, ErasurePending: 1<<64 - 1, Rollback: long(100),
		MemoryProtection: "partial", Warnings: many(proto.MaxWarnings, long(4000)), Slots: slots, UptimeSeconds: 1<<64 - 1,
		Connections: 1<<64 - 1, Requests: 1<<64 - 1, Panics: 1<<64 - 1, Busy: 1<<64 - 1, AuditEntries: 1<<64 - 1,
		PolicyEpoch: 1<<64 - 1, Escrow: many(keyspec.MaxRecipients, recipient),
		LockReason: "misconfigured", LockDetail: long(4096), StorePin: strings.Repeat("f", 65),
	})
	fits("slots", &proto.SlotListReply{Slots: slots})
	fits("new slot", &proto.SlotAddReply{Slot: slot, Secrets: manyBytes(255, 128)})
	fits("findings", &proto.ProgressReply{
		Records: 1<<64 - 1, Epoch: 1<<64 - 1, Damaged: many(proto.MaxFindings, long(4000)), Messages: many(proto.MaxMessages, long(4000)),
	})
	fits("backup", &proto.BackupReply{Stream: 1<<64 - 1, Recipients: many(2*keyspec.MaxRecipients, recipient)})

	attributes := make([]proto.ZKAttribute, proto.MaxZKAttributes)
	for i := range attributes {
		attributes[i] = proto.ZKAttribute{Identifier: long(64), Value: make([]byte, engine.MaxZKData/len(attributes)+64)}
	}
	fits("attributes", &proto.ZKEncryptReply{Index: 1<<32 - 1, Attributes: attributes, Keys: manyBytes(proto.MaxZKRecipients, 32+512)})

	if _, err := proto.AppendResponse(nil, 1, &proto.Error{Code: proto.CodeInternal, Message: long(9000), BackendState: long(9000)}, nil); err != nil {
		t.Errorf("error: %v", err)
	}
}

func manyBytes(n, size int) [][]byte {
	list := make([][]byte, n)
	for i := range list {
		list[i] = make([]byte, size)
	}
	return list
}

// TestAuditPagesAreCutBySize reads a log of the largest entries page by page and finds each once.
func TestAuditPagesAreCutBySize(t *testing.T) {
	var log []audit.Entry
	for i := range uint64(300) {
		log = append(log, audit.Entry{
			Number: i, Time: time.Unix(maxTime, 0), Op: strings.Repeat("o", 32), Key: strings.Repeat("k", keyspec.MaxRef),
			Version: 1<<32 - 1, UID: 1<<32 - 1, PID: 1<<31 - 1, Principal: strings.Repeat("p", 64), Via: strings.Repeat("v", 64),
			Allowed: true, Code: strings.Repeat("c", 32), Detail: strings.Repeat("d", 700), DetailID: strings.Repeat("i", 32), PolicyEpoch: 1<<64 - 1,
		})
	}
	encodes := func(reply *proto.AuditTailReply) {
		t.Helper()
		if _, err := proto.AppendResponse(nil, 1<<64-1, nil, reply); err != nil {
			t.Fatal(err)
		}
	}
	next := uint64(0)
	for next < uint64(len(log)) {
		end := min(next+auditPage, uint64(len(log)))
		reply := &proto.AuditTailReply{Next: end}
		if err := fillAudit(reply, log[next:end], false); err != nil {
			t.Fatal(err)
		}
		encodes(reply)
		if len(reply.Entries) == 0 || reply.Entries[0].Number != next || reply.Next != next+uint64(len(reply.Entries)) {
			t.Fatalf("from %d: %d entries, next is %d", next, len(reply.Entries), reply.Next)
		}
		next = reply.Next
	}
	reply := &proto.AuditTailReply{Next: uint64(len(log))}
	if err := fillAudit(reply, log[len(log)-auditPage:], true); err != nil {
		t.Fatal(err)
	}
	encodes(reply)
	if n := len(reply.Entries); n == 0 || reply.Entries[n-1].Number != uint64(len(log)-1) || reply.Next != uint64(len(log)) {
		t.Fatalf("the last page has %d entries, next is %d", n, reply.Next)
	}
}
