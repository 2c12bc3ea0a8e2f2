package keystore

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"filippo.io/age"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// The stores in testdata were written by the release that introduced their format. They have to open for ever, so they are made
// once: to make those of a new format, run this with -make-golden and an empty directory for it.
var makeGolden = flag.Bool("make-golden", false, "make the golden store of the current format, if it is missing")

func goldenDir(format int) string { return filepath.Join("testdata", fmt.Sprintf("format%d", format)) }

const (
	goldenIdentityFile = "backup.identity" // opens the golden backup; it protects nothing
	goldenDerivedFile  = "derived.hex"     // what DeriveSecret("golden") gives
	goldenCounterFile  = "counter"         // what the counter shows that the golden store is bound to
)

// goldenGuard is the wrapping key of the guarded namespace in the golden store, 32 bytes 03.
func goldenGuard() *NamespaceGuard {
	return &NamespaceGuard{Blob: []byte("golden blob"), Key: bytes.Repeat([]byte{3}, keySize), Escrow: keyspec.EscrowRecipients}
}

func TestMakeGoldenStore(t *testing.T) {
	dir := goldenDir(Format)
	if _, err := os.Stat(dir); err == nil {
		if *makeGolden {
			t.Fatalf("%s is there already; a golden store is never made again", dir)
		}
		return
	}
	if !*makeGolden {
		t.Fatalf("%s is missing; see -make-golden", dir)
	}
	ctx := context.Background()
	config := testConfig(t, testDir(t))
	id := testIdentity(t)
	s, err := Create(ctx, config, []NewSlot{testSlot(1)}, []string{id.Recipient().String()})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	module := testKey("golden", keyspec.RSA2048, 256)
	mustApply(t, s, testKey("other/before", keyspec.ECDSAP256, 32), testKey("golden/unbound", keyspec.ECDSAP521, 66))
	mustApply(t, s, module)
	full := testKey("golden/full", keyspec.Ed25519, 32)
	full.Key.Usages = []keyspec.Usage{keyspec.Sign}
	full.Key.Profile, full.Key.Exportable, full.Key.Durable, full.Key.Owner = "profile", true, true, 1000
	full.Key.UsableVia, full.Key.Labels = []string{"pkcs11"}, map[string]string{"a": "1", "b": "2"}
	full.Key.MinVersion, full.Key.Keep = 1, 5
	full.Key.Versions[0].NotBefore, full.Key.Versions[0].Expires = testTime, testTime.AddDate(1, 0, 0)
	full.Key.Versions[0].Invocations = 65536
	full.Key.Limited, full.Key.UsesLeft = true, 100
	full.Aliases = []Alias{{AliasSSH, []byte("golden fingerprint"), 1}}
	if err := s.Apply(ctx, Commit{Changes: []Change{full}, Audit: []byte("golden audit"), RequestKey: []byte("golden request")}); err != nil {
		t.Fatal(err)
	}
	symmetric := testKey("golden/symmetric", keyspec.AES256GCM, 32)
	symmetric.Public = nil
	mustApply(t, s, symmetric)
	mustApply(t, s, testKey("golden/rotated", keyspec.Ed25519, 32))
	for range 3 {
		rotate(t, s, "golden/rotated", 32)
	}
	destroy(t, s, "golden/rotated", 2)
	var many []Change
	for i := range 40 {
		many = append(many, testKey(fmt.Sprintf("many/k%d", i), keyspec.Ed25519, 32))
	}
	mustApply(t, s, many...)
	applyDocuments(t, s, testDocument("trust", "golden"), testDocument("trust", "changed"), testDocument("trust", "deleted"), testDocument("crl", "golden"))
	for _, name := range []string{"changed", "deleted"} {
		d, err := s.Document("trust", name)
		if err != nil {
			t.Fatal(err)
		}
		d.Data = testData("trust", name, d.Revision)
		applyDocuments(t, s, DocumentChange{Document: d, Delete: name == "deleted", Bump: true})
	}
	mustApply(t, s, foreignKey("golden/foreign"))
	renewed := testKey("golden/renewed", keyspec.RSA2048, 256)
	renewed.Public[1] = Public{SPKI: renewed.Public[1].SPKI, Chain: [][]byte{[]byte("golden earlier certificate")}}
	mustApply(t, s, renewed)
	k, err := s.Get("golden/renewed")
	if err != nil {
		t.Fatal(err)
	}
	mustApply(t, s, Change{Key: k, Public: map[keyspec.Version]Public{1: testPublic("golden/renewed", 1)}})
	mustApply(t, s, guardedKey("guarded", goldenGuard()))
	mustApply(t, s, testKey("guarded/k", keyspec.Ed25519, 32))
	if _, err := s.AddSlot(ctx, testSlot(2)); err != nil {
		t.Fatal(err)
	}
	if err := s.RotateEpoch(ctx, nil); err != nil {
		t.Fatal(err)
	}
	counter := newCounter()
	if err := s.BindCounter(ctx, "test:/dev/counter", counter); err != nil {
		t.Fatal(err)
	}
	backup, _ := testBackup(t, s, id)
	if err := s.Compact(ctx); err != nil {
		t.Fatal(err)
	}
	derived := make([]byte, 32)
	if err := s.DeriveSecret("golden", derived); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{headerFile, databaseFile} {
		b, err := os.ReadFile(filepath.Join(config.Dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for name, content := range map[string]string{
		"backup.age": string(backup), goldenIdentityFile: id.String() + "\n", goldenDerivedFile: fmt.Sprintf("%x\n", derived),
		goldenCounterFile: fmt.Sprintln(counter.now()),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func TestStoreOfFormat1Opens(t *testing.T) {
	ctx := context.Background()
	dir := testDir(t)
	for _, name := range []string{headerFile, databaseFile} {
		b, err := os.ReadFile(filepath.Join(goldenDir(1), name))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(filepath.Join(goldenDir(1), goldenCounterFile))
	if err != nil {
		t.Fatal(err)
	}
	counter := newCounter()
	if _, err := fmt.Sscan(string(text), &counter.value); err != nil {
		t.Fatal(err)
	}
	s, err := Open(ctx, testConfig(t, dir))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { s.Close() }()
	for slot := range uint32(2) {
		s.Lock()
		if err := s.UnlockWith(ctx, slot+1, testSecret(byte(slot+1)), UnlockOptions{Counter: counter}); err != nil {
			t.Fatal(err)
		}
	}
	if slot := s.Slots()[1]; s.CounterLocation() != "test:/dev/counter" || slot.Location != "test:/dev/slot" {
		t.Errorf("%q %+v", s.CounterLocation(), slot)
	}
	checkGolden(t, s)
	// It can be worked with, too.
	rotate(t, s, "golden/full", 32)
	mustApply(t, s, testKey("golden/late", keyspec.Ed25519, 32))
	if err := s.Apply(ctx, Commit{Documents: []DocumentChange{testDocument("trust", "golden")}}); !errors.Is(err, ErrExists) {
		t.Fatal(err)
	}
	applyDocuments(t, s, testDocument("trust", "late"), testDocument("trust", "deleted"))
	if err := s.RotateRoot(ctx); err != nil {
		t.Fatal(err)
	}
	if err := s.RotateEpoch(ctx, nil); err != nil {
		t.Fatal(err)
	}
	s.Close()
	s = mustOpenBound(t, dir, counter)
	checkKey(t, s, "golden/full", 32)
	checkKey(t, s, "golden/late", 32)
	checkDocument(t, s, "trust", "late")
	if d, err := s.Document("trust", "deleted"); err != nil || d.Revision != 3 {
		t.Errorf("document made again: %+v %v", d, err)
	}
}

func checkGolden(t *testing.T, s *Store) {
	t.Helper()
	if info := s.Info(); info.Keys != 50 || info.Documents != 3 || info.Guarded != 1 || info.WithoutEscrow != 0 || info.Epoch != 2 || len(info.Escrow) != 1 || !strings.HasPrefix(info.Escrow[0], "age1") {
		t.Fatalf("%+v", info)
	}
	for name, size := range map[string]int{"golden": 256, "golden/full": 32, "golden/unbound": 66, "golden/rotated": 32, "golden/renewed": 256, "other/before": 32, "many/k0": 32, "many/k39": 32} {
		checkKey(t, s, name, size)
	}
	checkForeign(t, s, "golden/foreign", 1)
	checkState(t, s, "guarded", NamespaceState{Guarded: true, Blob: goldenGuard().Blob, Escrow: keyspec.EscrowRecipients})
	if err := s.OpenNamespace("guarded", goldenGuard().Key); err != nil {
		t.Fatal(err)
	}
	checkKey(t, s, "guarded", 900)
	checkKey(t, s, "guarded/k", 32)
	k, err := s.Get("golden/full")
	if err != nil {
		t.Fatal(err)
	}
	got := fmt.Sprintf("%+v", *k)
	const want = "{Name:golden/full Algorithm:ed25519 Usages:[sign] Origin:generated Protection:software Profile:profile Exportable:true Durable:true Owner:1000 " +
		"Labels:map[a:1 b:2] UsableVia:[pkcs11] Created:2026-11-22 12:00:00 +0000 UTC Current:1 MinVersion:1 Keep:5 Limited:true UsesLeft:100 Versions:[{Number:1 State:active " +
		"Created:2026-11-22 12:00:00 +0000 UTC NotBefore:2026-11-22 12:00:00 +0000 UTC Expires:2027-11-22 12:00:00 +0000 UTC Reason: " +
		"Revoked:0001-01-01 00:00:00 +0000 UTC DestroyAt:0001-01-01 00:00:00 +0000 UTC Invocations:65536 SPKISHA256:"
	if !strings.HasPrefix(got, want) {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	if k.Versions[0].SPKISHA256 != sha256.Sum256(testPublic("golden/full", 1).SPKI) {
		t.Error("SPKISHA256")
	}
	m, err := s.Material(keyspec.Ref{Name: "golden/symmetric", Version: 1}, nil)
	if err != nil || !bytes.Equal(m, testMaterial("golden/symmetric", 1, 32)) {
		t.Errorf("symmetric key: %v", err)
	}
	if ref, err := s.Alias(AliasSSH, []byte("golden fingerprint")); err != nil || ref.Name != "golden/full" {
		t.Errorf("alias: %v %v", ref, err)
	}
	earlier := sha256.Sum256([]byte("golden earlier certificate"))
	if ref, err := s.Alias(AliasThumbprint, earlier[:]); err != nil || ref.Name != "golden/renewed" {
		t.Errorf("alias of an earlier certificate: %v %v", ref, err)
	}
	k, err = s.Get("golden/rotated")
	if err != nil || len(k.Versions) != 4 || k.Current != 4 || k.Versions[1].State != keyspec.Destroyed {
		t.Errorf("rotated key: %+v %v", k, err)
	}
	checkDocument(t, s, "trust", "golden")
	checkDocument(t, s, "crl", "golden")
	if d, err := s.Document("trust", "changed"); err != nil || d.Revision != 2 || !bytes.Equal(d.Data, testData("trust", "changed", 1)) {
		t.Errorf("document: %+v %v", d, err)
	}
	if all := allDocuments(t, s, "trust", 1); len(all) != 2 {
		t.Errorf("%d documents", len(all))
	}
	list, err := s.Outbox(10)
	if err != nil || len(list) != 1 || string(list[0].Data) != "golden audit" {
		t.Errorf("outbox: %v %v", list, err)
	}
	var secret [32]byte
	if err := s.DeriveSecret("golden", secret[:]); err != nil {
		t.Error(err)
	}
	derived, err := os.ReadFile(filepath.Join(goldenDir(1), goldenDerivedFile))
	if err != nil || fmt.Sprintf("%x\n", secret) != string(derived) {
		t.Errorf("derived secret %x, want %s (%v)", secret, derived, err)
	}
	report, err := s.Verify(context.Background(), nil)
	if err != nil || len(report.Damaged) != 0 || report.Keys != 50 || report.Documents != 3 || report.Orphans != 0 || report.Unopened != 0 {
		t.Errorf("%+v %v", report, err)
	}
}

func TestBackupOfFormat1IsRestored(t *testing.T) {
	b, err := os.ReadFile(filepath.Join(goldenDir(1), "backup.age"))
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(goldenDir(1), goldenIdentityFile))
	if err != nil {
		t.Fatal(err)
	}
	ids, err := age.ParseIdentities(bytes.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	s, m, err := Restore(context.Background(), bytes.NewReader(b), ids, testConfig(t, testDir(t)), []NewSlot{testSlot(9)})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if key, err := s.EscrowedNamespaceKey("guarded", ids); err != nil || !bytes.Equal(key, goldenGuard().Key) {
		t.Errorf("escrow: %v", err)
	}
	if m.Keys != 50 || len(m.Guarded) != 1 || m.Guarded[0].Name != "guarded" || string(m.AuditHead) != "head" || string(m.PolicyDigest) != "digest" {
		t.Errorf("%+v", m)
	}
	checkGolden(t, s)
}
