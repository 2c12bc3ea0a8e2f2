package main

import (
	"bytes"
	"crypto/hpke"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"filippo.io/age"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/kmsd/audit"
	"github.com/kmsd-project/kmsd/kmsd/engine"
)

func TestEveryOperationHasARow(t *testing.T) {
	table := operations()
	known := proto.Ops()
	for _, op := range known {
		_, ok := table[op]
		switch op {
		case proto.OpHello, proto.OpBind, proto.OpCancel:
			if ok {
				t.Errorf("%s belongs to the dispatcher", op)
			}
		default:
			if !ok {
				t.Errorf("%s has no row", op)
			}
		}
	}
	for op, row := range table {
		if !slices.Contains(known, op) {
			t.Errorf("%s is not on the wire", op)
		}
		if row.handle == nil || row.lane == nil {
			t.Errorf("%s is incomplete", op)
		}
		if row.where == onAdmin && batchable[op] {
			t.Errorf("%s is administration and can be in a batch", op)
		}
	}
	for op := range batchable {
		if _, ok := table[op]; !ok {
			t.Errorf("%s can be in a batch, but is no operation", op)
		}
	}
}

// Every sentinel of the packages below has a row in the one table of errors.
func TestEveryErrorHasARow(t *testing.T) {
	text, err := os.ReadFile("errors.go")
	if err != nil {
		t.Fatal(err)
	}
	// Errors that cannot reach a client: of opening and restoring a store, which no operation does, or of parsing what
	// kmsd has written itself.
	unreachable := []string{"keystore.ErrBackup", "keyspec.ErrState", "secmem.ErrArenaClosed"}
	found := 0
	for _, dir := range []string{"engine", "audit", "mechanism", "pki", "../keystore", "../keystore/keyspec", "../keystore/secmem", "../enclave", "../client/ciphertext"} {
		files, err := filepath.Glob(filepath.Join(dir, "*.go"))
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range files {
			if strings.HasSuffix(name, "_test.go") {
				continue
			}
			f, err := parser.ParseFile(token.NewFileSet(), name, nil, 0)
			if err != nil {
				t.Fatal(err)
			}
			for _, d := range f.Decls {
				vars, ok := d.(*ast.GenDecl)
				if !ok || vars.Tok != token.VAR {
					continue
				}
				for _, s := range vars.Specs {
					for _, id := range s.(*ast.ValueSpec).Names {
						sentinel := f.Name.Name + "." + id.Name
						if !strings.HasPrefix(id.Name, "Err") || slices.Contains(unreachable, sentinel) {
							continue
						}
						found++
						if !bytes.Contains(text, []byte("{"+sentinel+",")) {
							t.Errorf("%s has no row", sentinel)
						}
					}
				}
			}
		}
	}
	if found < 60 {
		t.Errorf("only %d sentinels were found", found)
	}
}

func TestWireError(t *testing.T) {
	for _, c := range []struct {
		err  error
		code proto.Code
		text string
		id   string
	}{
		{fmt.Errorf("%w: APP/k", keystore.ErrNotFound), proto.CodeNotAvailable, "key not available: it does not exist, or you have no grant for it", ""},
		{engine.ErrNotAvailable, proto.CodeNotAvailable, "key not available: it does not exist, or you have no grant for it", ""},
		{fmt.Errorf("%w: suspended", engine.ErrState), proto.CodeState, "the state of the key does not allow this: suspended", ""},
		{&engine.Traced{ID: "77", Err: engine.ErrInternal}, proto.CodeInternal, "internal error", "77"},
		{&engine.Traced{ID: "78", Err: keystore.ErrDamaged}, proto.CodeDamaged, "the record is damaged", "78"},
		{fmt.Errorf("%w: %w", engine.ErrAudit, audit.ErrStorage), proto.CodeStorage, "the act could not be recorded: its result is withheld", ""},
		{errors.New("open /var/lib/secret: no such file"), proto.CodeInternal, "internal error", ""},
		{&enclave.Error{Kind: enclave.ErrAbsent, Detail: "no token", Remedy: "put it back"}, proto.CodeAbsent, "no token: the device is not there; put it back", ""},
		{hinted{errOtherStore, "look for the right one"}, proto.CodeReplaced, errOtherStore.Error() + "; look for the right one", ""},
		{&proto.Error{Code: proto.CodeBusy, Message: "busy"}, proto.CodeBusy, "busy", ""},
	} {
		got := wireError(c.err)
		if got.Code != c.code || inWords(got) != c.text || got.DetailID != c.id {
			t.Errorf("%v: got %+v", c.err, got)
		}
	}
}

// withKeystore starts the real daemon with a keystore.
func withKeystore(t *testing.T) *realDaemon {
	t.Helper()
	d := startReal(t, t.TempDir())
	var reply proto.InitReply
	d.ask(proto.OpInit, &proto.Init{Enclave: "keyring:file", NoRecovery: true}, &reply)
	return d
}

func TestBatchTakesUsesOnly(t *testing.T) {
	d := withKeystore(t)
	d.ask(proto.OpKeyCreate, &proto.KeyCreate{Name: "APP/s", Algorithm: "ed25519"}, &proto.KeyInfo{})
	item := func(op string, m proto.Message) proto.BatchItem {
		params, err := proto.AppendParams(nil, m)
		if err != nil {
			t.Fatal(err)
		}
		return proto.BatchItem{Op: op, Params: params}
	}
	var reply proto.BatchReply
	d.ask(proto.OpBatch, &proto.Batch{Items: []proto.BatchItem{
		item(proto.OpSign, &proto.Sign{Key: "APP/s", Data: []byte("m")}),
		item(proto.OpSign, &proto.Sign{Key: "APP/none", Data: []byte("m")}),
		item(proto.OpKeyCreate, &proto.KeyCreate{Name: "APP/x", Algorithm: "ed25519"}),
		item(proto.OpLock, &proto.Empty{}),
		item(proto.OpBatch, &proto.Batch{}),
		item(proto.OpRandom, &proto.Random{Bytes: 40_000}),
		item(proto.OpRandom, &proto.Random{Bytes: 40_000}),
		item(proto.OpRandom, &proto.Random{Bytes: 16}),
		{Op: proto.OpSign, Params: []byte{0xc1}},
	}}, &reply)
	codes := []proto.Code{
		"", proto.CodeNotAvailable, proto.CodeInvalid, proto.CodeInvalid, proto.CodeInvalid, "", proto.CodeTooLarge, proto.CodeTooLarge,
		proto.CodeTooLarge,
	}
	if len(reply.Items) != len(codes) {
		t.Fatalf("%d results", len(reply.Items))
	}
	for i, want := range codes {
		got := proto.Code("")
		if e := reply.Items[i].Error; e != nil {
			got = e.Code
		}
		if got != want {
			t.Errorf("item %d: %q, want %q", i, got, want)
		}
	}
	var sig proto.SignReply
	if err := proto.DecodeReply(reply.Items[0].Result, &sig); err != nil {
		t.Fatal(err)
	}
	d.ask(proto.OpVerify, &proto.Verify{Key: "APP/s", Data: []byte("m"), Signature: sig.Signature}, &proto.VerifyReply{})
	if d.state() != "ready" {
		t.Error("a batch has locked the daemon")
	}
}

func TestWrappedImportOverTheWire(t *testing.T) {
	d := withKeystore(t)
	var begin proto.KeyImportBeginReply
	d.ask(proto.OpKeyImportBegin, &proto.KeyImportBegin{}, &begin)
	public, err := hpke.MLKEM768X25519().NewPublicKey(begin.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	wrapped, err := hpke.Seal(public, hpke.HKDFSHA256(), hpke.AES256GCM(), []byte("kmsd import v1"), make([]byte, 32))
	if err != nil {
		t.Fatal(err)
	}
	in := &proto.KeyImport{Key: proto.KeyCreate{Name: "APP/k", Algorithm: "aes-256-gcm"}, Wrapped: wrapped, Token: begin.Token}
	var info proto.KeyInfo
	d.ask(proto.OpKeyImport, in, &info)
	if info.Origin != "imported" || info.Current != 1 {
		t.Errorf("%+v", info)
	}
	in.Key.Name = "APP/again"
	d.refused(proto.OpKeyImport, in, proto.CodeInvalid)
}

func TestBackupOverTheWire(t *testing.T) {
	escrow, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	d := startReal(t, t.TempDir())
	d.ask(proto.OpInit, &proto.Init{Enclave: "keyring:file", NoRecovery: true, EscrowTo: []string{escrow.Recipient().String()}}, &proto.InitReply{})
	for i := range 20 {
		d.ask(proto.OpKeyCreate, &proto.KeyCreate{Name: fmt.Sprintf("APP/%d", i), Algorithm: "ecdsa-p256"}, &proto.KeyInfo{})
	}
	identity, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	d.refused(proto.OpBackupCreate, &proto.BackupCreate{Recipients: []string{"age1junk"}}, proto.CodeInvalid)
	var begin proto.BackupReply
	d.ask(proto.OpBackupCreate, &proto.BackupCreate{Recipients: []string{identity.Recipient().String()}}, &begin)
	var backup bytes.Buffer
	for n := uint64(0); ; n++ {
		var chunk proto.StreamData
		d.ask(proto.OpStreamUpdate, &proto.StreamUpdate{Stream: begin.Stream, Chunk: n}, &chunk)
		backup.Write(chunk.Data)
		if chunk.Done {
			break
		}
	}
	d.refused(proto.OpStreamUpdate, &proto.StreamUpdate{Stream: begin.Stream}, proto.CodeInvalid)
	if len(begin.Recipients) != 2 {
		t.Errorf("recipients %v", begin.Recipients)
	}
	for _, id := range []age.Identity{identity, escrow} {
		manifest, err := keystore.VerifyBackup(t.Context(), bytes.NewReader(backup.Bytes()), []age.Identity{id}, t.TempDir())
		if err != nil || manifest.Keys != 20 || len(manifest.AuditHead) == 0 || len(manifest.PolicyDigest) != 32 {
			t.Errorf("%+v %v", manifest, err)
		}
	}
	if _, err := age.Decrypt(io.LimitReader(&backup, 100), identity); err == nil {
		t.Error("half a backup opens")
	}
}

// What the daemon says of its audit is what anybody finds in the files.
func TestAuditOverTheWire(t *testing.T) {
	d := withKeystore(t)
	d.ask(proto.OpKeyCreate, &proto.KeyCreate{Name: "APP/s", Algorithm: "ed25519"}, &proto.KeyInfo{})
	d.ask(proto.OpSign, &proto.Sign{Key: "APP/s", Data: []byte("m")}, &proto.SignReply{})
	d.refused(proto.OpSign, &proto.Sign{Key: "APP/none", Data: []byte("m")}, proto.CodeNotAvailable)
	var head proto.AuditHead
	d.ask(proto.OpAuditHead, &proto.Empty{}, &head)
	report, err := audit.Verify(filepath.Join(d.dir, "s", "audit"), &audit.Head{Size: head.Size, Root: audit.Hash(head.Root)})
	if err != nil || report.Entries < 4 {
		t.Fatalf("%+v %v", report, err)
	}
	var ops []string
	next, pages := uint64(0), 0
	for ; pages < 10; pages++ {
		var page proto.AuditTailReply
		d.ask(proto.OpAuditTail, &proto.AuditTail{From: next, Limit: 3}, &page)
		for _, e := range page.Entries {
			ops = append(ops, e.Op+" "+e.Code)
		}
		if len(page.Entries) == 0 {
			break
		}
		next = page.Next
	}
	if pages == 10 {
		t.Error("reading the audit finds no end")
	}
	for _, want := range []string{"init ok", "key_create ok", "sign ok", "sign not_available", "keystore_open ok"} {
		if !slices.Contains(ops, want) {
			t.Errorf("%q is not recorded: %q", want, ops)
		}
	}
}
