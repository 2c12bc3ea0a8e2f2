package keystore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"filippo.io/age"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

func testIdentity(t testing.TB) *age.X25519Identity {
	t.Helper()
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func testBackup(t testing.TB, s *Store, id *age.X25519Identity) ([]byte, Manifest) {
	t.Helper()
	var out bytes.Buffer
	m, err := s.Backup(context.Background(), &out, BackupOptions{
		Recipients: []age.Recipient{id.Recipient()}, AuditHead: []byte("head"), PolicyDigest: []byte("digest"),
	})
	if err != nil {
		t.Fatal(err)
	}
	return out.Bytes(), m
}

func TestBackupRestoresEveryKey(t *testing.T) {
	ctx := context.Background()
	s := newStore(t)
	var names []string
	var changes []Change
	for i := range 100 {
		name := fmt.Sprintf("ns%d/key%d", i%4, i)
		names = append(names, name)
		changes = append(changes, testKey(name, keyspec.Ed25519, 32))
	}
	for i := range 2 {
		mustApply(t, s, testKey(fmt.Sprintf("ns%d", i), keyspec.RSA2048, 256))
	}
	mustApply(t, s, changes...)
	id := testIdentity(t)
	blob, want := testBackup(t, s, id)

	m, err := VerifyBackup(ctx, bytes.NewReader(blob), []age.Identity{id}, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if fmt.Sprintf("%+v", m) != fmt.Sprintf("%+v", want) {
		t.Fatalf("manifest %+v, want %+v", m, want)
	}
	if m.Keys != 102 || string(m.AuditHead) != "head" || string(m.PolicyDigest) != "digest" {
		t.Fatalf("manifest %+v", m)
	}
	restored, _, err := Restore(ctx, bytes.NewReader(blob), []age.Identity{id}, testConfig(t, testDir(t)), []NewSlot{testSlot(1)})
	if err != nil {
		t.Fatal(err)
	}
	defer restored.Close()
	restored = reopen(t, restored)
	for _, name := range names {
		checkKey(t, restored, name, 32)
	}
	a, b := s.Info(), restored.Info()
	if a.StoreID != b.StoreID || a.InstanceID == b.InstanceID {
		t.Fatal("a restored store has the same store id and another instance id")
	}
	var x, y [32]byte
	if err := errors.Join(s.DeriveSecret("audit v1", x[:]), restored.DeriveSecret("audit v1", y[:])); err != nil || x != y {
		t.Fatalf("derived secrets differ: %v", err)
	}
	mustApply(t, restored, testKey("ns0/new", keyspec.Ed25519, 32))
	if _, _, err := Restore(ctx, bytes.NewReader(blob), []age.Identity{id}, testConfig(t, restored.config.Dir), []NewSlot{testSlot(1)}); !errors.Is(err, ErrStoreExists) {
		t.Fatalf("restoring over a store: %v", err)
	}
}

func TestBackupThatIsNotWholeIsRefused(t *testing.T) {
	ctx := context.Background()
	s := newStore(t)
	mustApply(t, s, testKey("app/k", keyspec.Ed25519, 32))
	id := testIdentity(t)
	blob, _ := testBackup(t, s, id)
	refuse := func(what string, b []byte, id age.Identity) {
		t.Helper()
		if _, err := VerifyBackup(ctx, bytes.NewReader(b), []age.Identity{id}, t.TempDir()); !errors.Is(err, ErrBackup) {
			t.Errorf("%s: %v", what, err)
		}
	}
	refuse("wrong recipient", blob, testIdentity(t))
	for _, n := range []int{0, 10, 200, len(blob) / 2, len(blob) - 16, len(blob) - 1} {
		refuse(fmt.Sprint("truncated to ", n), blob[:n], id)
	}
	for i := 0; i < len(blob); i += len(blob)/50 + 1 {
		b := bytes.Clone(blob)
		b[i] ^= 4
		refuse(fmt.Sprint("bit flipped at ", i), b, id)
	}
	refuse("something appended", append(bytes.Clone(blob), 0), id)
}

func TestEveryBackupIsEncryptedToTheEscrowRecipients(t *testing.T) {
	ctx := context.Background()
	escrow, other := testIdentity(t), testIdentity(t)
	s, err := Create(ctx, testConfig(t, testDir(t)), []NewSlot{testSlot(1)}, []string{escrow.Recipient().String()})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	mustApply(t, s, testKey("app/k", keyspec.Ed25519, 32))
	for _, o := range []BackupOptions{{}, {Recipients: []age.Recipient{other.Recipient()}}} {
		var out bytes.Buffer
		if _, err := s.Backup(ctx, &out, o); err != nil {
			t.Fatal(err)
		}
		for _, id := range []age.Identity{escrow, other} {
			_, err := VerifyBackup(ctx, bytes.NewReader(out.Bytes()), []age.Identity{id}, t.TempDir())
			if id == age.Identity(other) && o.Recipients == nil {
				if !errors.Is(err, ErrBackup) {
					t.Errorf("a stranger: %v", err)
				}
			} else if err != nil {
				t.Error(err)
			}
		}
	}
	pq, err := age.GenerateHybridIdentity()
	if err != nil {
		t.Fatal(err)
	}
	for _, list := range [][]string{{"nonsense"}, {"# comment"}, {escrow.Recipient().String(), pq.Recipient().String()}} {
		if _, err := Create(ctx, testConfig(t, testDir(t)), []NewSlot{testSlot(1)}, list); !errors.Is(err, ErrInvalid) {
			t.Errorf("escrow to %q: %v", list, err)
		}
	}
}

func TestBackupsOlderThanADestructionAreNamed(t *testing.T) {
	ctx := context.Background()
	dir := testDir(t)
	config := testConfig(t, dir)
	now := testTime
	config.Now = func() time.Time { return now }
	s, err := Create(ctx, config, []NewSlot{testSlot(1)}, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { s.Close() }()
	id := testIdentity(t)
	named := func() string {
		for _, w := range s.Info().Warnings {
			if strings.Contains(w, "older than the last destruction") {
				return w
			}
		}
		return ""
	}
	mustApply(t, s, testKey("app/k", keyspec.Ed25519, 32), testKey("app/l", keyspec.Ed25519, 32))
	first, manifest := testBackup(t, s, id)
	if list := s.Info().Backups; len(list) != 1 || list[0].ID != manifest.ID || list[0].Keys != 2 || !list[0].Created.Equal(testTime) || named() != "" {
		t.Fatalf("%+v %q", list, named())
	}
	destroy(t, s, "app/k", 1)
	if got := named(); !strings.HasPrefix(got, "the backup of 2026-11-22 12:00:00 UTC is older") {
		t.Fatalf("%q", got)
	}
	now = now.Add(24 * time.Hour)
	testBackup(t, s, id) // has no app/k: it stays out of the warning
	if got := named(); !strings.HasPrefix(got, "the backup of 2026-11-22") {
		t.Fatalf("%q", got)
	}
	destroy(t, s, "app/l", 1)
	if got := named(); !strings.HasPrefix(got, "2 backups, of 2026-11-22 12:00:00 UTC to 2026-11-23 12:00:00 UTC, are older") {
		t.Fatalf("%q", got)
	}
	s.Lock()
	if got := named(); got != "" || len(s.Info().Backups) != 2 {
		t.Fatalf("locked: %q", got)
	}
	s = reopen(t, s)
	if got := named(); !strings.HasPrefix(got, "2 backups") {
		t.Fatalf("after a restart: %q", got)
	}
	if _, err := s.Backup(ctx, failingWriter{}, BackupOptions{Recipients: []age.Recipient{id.Recipient()}}); err == nil {
		t.Fatal("a backup to nowhere")
	}
	if n := len(s.Info().Backups); n != 3 {
		t.Fatalf("%d backups: one that was given up may be somewhere in part", n)
	}
	for range maxBackups {
		testBackup(t, s, id)
	}
	h := s.header.Load()
	if len(h.backups) != maxBackups || h.backupsMade != maxBackups+3 || h.backups[0].ID == manifest.ID {
		t.Fatalf("%d backups of %d", len(h.backups), h.backupsMade)
	}

	restored, _, err := Restore(ctx, bytes.NewReader(first), []age.Identity{id}, testConfig(t, testDir(t)), []NewSlot{testSlot(1)})
	if err != nil {
		t.Fatal(err)
	}
	defer restored.Close()
	if list := restored.Info().Backups; len(list) != 1 || list[0].ID != manifest.ID {
		t.Fatalf("%+v", list)
	}
	destroy(t, restored, "app/k", 1)
	if list := restored.Info().Warnings; len(list) != 1 || !strings.HasPrefix(list[0], "the backup of") {
		t.Fatalf("%q", list)
	}
}

type failingWriter struct{}

func (failingWriter) Write([]byte) (int, error) { return 0, errors.New("nowhere to write") }
