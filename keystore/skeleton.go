package keystore

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"sync/atomic"
	"time"

	"filippo.io/age"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/keystore/secmem"
)

// Config says where a store is and what it may use.
type Config struct {
	Dir   string        // the state directory, absolute, mode 0700
	Arena *secmem.Arena // for the root, epoch and lifetime keys; the store needs 1 KiB of it
	Now   func() time.Time
	Log   *slog.Logger
	// CheckCommand is the command, path first, that examines a database file before this process opens it; the path of the file
	// is appended. Without one the file is examined in this process.
	CheckCommand []string
}

// Store is an open keystore. Its methods may be called concurrently.
type Store struct{}

// Info describes a store.
type Info struct {
	StoreID        [16]byte
	InstanceID     [16]byte // differs between a store and one restored from its backup
	Created        time.Time
	Locked         bool
	Escrow         []string // age recipients chosen when the store was made
	Generation     uint64
	Epoch          uint32
	EpochRotating  bool   // a rotation was begun and awaits RotateEpoch
	Keys           uint64 // 0 while locked
	ErasurePending uint64 // destroyed versions whose bytes may still be recoverable until the epoch is rotated
	Damaged        uint64 // reads that met damage since Open
	Rollback       string // how the replacement of the files by an older copy would be noticed
	Warnings       []string
}

// Progress is filled in by long work and may be read at any time.
type Progress struct{ Done, Total atomic.Uint64 }

// Damage is one finding of Verify.
type Damage struct {
	Ref  keyspec.Ref // empty when the name is not known any more
	Text string
}

// Report is the outcome of Verify.
type Report struct {
	Keys, Versions, Leaves uint64
	Orphans                uint64 // records on disk that the key table does not know
	Damaged                []Damage
}

// BackupOptions says for whom a backup is and what its manifest records.
type BackupOptions struct {
	Recipients   []age.Recipient
	AuditHead    []byte
	PolicyDigest []byte
}

// Manifest describes a backup. It is inside the encryption.
type Manifest struct {
	StoreID, InstanceID [16]byte
	Created             time.Time
	Epoch               uint32
	Generation          uint64
	Keys                uint64
	AuditHead           []byte
	PolicyDigest        []byte
	Escrow              []string
	NotEscrowed         []string // namespaces that chose to die with their device
}

var errSkeleton = errors.ErrUnsupported

func Exists(dir string) (bool, error) { return false, errSkeleton }
func Create(ctx context.Context, c Config, slots []NewSlot, escrow []string) (*Store, error) {
	return nil, errSkeleton
}
func Open(ctx context.Context, c Config) (*Store, error)                      { return nil, errSkeleton }
func (s *Store) Unlock(ctx context.Context, slot uint32, secret []byte) error { return errSkeleton }
func (s *Store) Lock()                                                        {}
func (s *Store) Locked() bool                                                 { return true }
func (s *Store) Close() error                                                 { return errSkeleton }
func (s *Store) Info() Info                                                   { return Info{} }
func (s *Store) Slots() []Slot                                                { return nil }
func (s *Store) AddSlot(ctx context.Context, n NewSlot) (Slot, error)         { return Slot{}, errSkeleton }
func (s *Store) RemoveSlot(ctx context.Context, id uint32) error              { return errSkeleton }
func (s *Store) RotateRoot(ctx context.Context) error                         { return errSkeleton }
func (s *Store) RotateEpoch(ctx context.Context, p *Progress) error           { return errSkeleton }
func (s *Store) Get(name keyspec.Name) (*Key, error)                          { return nil, errSkeleton }
func (s *Store) Material(ref keyspec.Ref, dst []byte) ([]byte, error)         { return nil, errSkeleton }
func (s *Store) Public(ref keyspec.Ref) (Public, error)                       { return Public{}, errSkeleton }
func (s *Store) Page(prefix string, after []byte, limit int) ([]*Key, []byte, error) {
	return nil, nil, errSkeleton
}
func (s *Store) Alias(kind AliasKind, value []byte) (keyspec.Ref, error) {
	return keyspec.Ref{}, errSkeleton
}
func (s *Store) Apply(ctx context.Context, c Commit) error   { return errSkeleton }
func (s *Store) Outbox(limit int) ([]OutboxEntry, error)     { return nil, errSkeleton }
func (s *Store) AckOutbox(through uint64) error              { return errSkeleton }
func (s *Store) DeriveSecret(label string, dst []byte) error { return errSkeleton }
func (s *Store) Verify(ctx context.Context, p *Progress) (Report, error) {
	return Report{}, errSkeleton
}
func (s *Store) Compact(ctx context.Context) error { return errSkeleton }
func CheckFile(path string) error                  { return errSkeleton }
func CheckMain(path string) int                    { return 1 }
func (s *Store) Backup(ctx context.Context, w io.Writer, o BackupOptions) (Manifest, error) {
	return Manifest{}, errSkeleton
}
func VerifyBackup(ctx context.Context, r io.Reader, ids []age.Identity, scratch string) (Manifest, error) {
	return Manifest{}, errSkeleton
}
func Restore(ctx context.Context, r io.Reader, ids []age.Identity, c Config, slots []NewSlot) (*Store, Manifest, error) {
	return nil, Manifest{}, errSkeleton
}
