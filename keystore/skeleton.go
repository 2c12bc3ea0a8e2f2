package keystore

import (
	"context"
	"errors"
	"io"
	"time"

	"filippo.io/age"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

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

func (s *Store) Verify(ctx context.Context, p *Progress) (Report, error) {
	return Report{}, errSkeleton
}
func (s *Store) Compact(ctx context.Context) error { return errSkeleton }
func (s *Store) Backup(ctx context.Context, w io.Writer, o BackupOptions) (Manifest, error) {
	return Manifest{}, errSkeleton
}
func VerifyBackup(ctx context.Context, r io.Reader, ids []age.Identity, scratch string) (Manifest, error) {
	return Manifest{}, errSkeleton
}
func Restore(ctx context.Context, r io.Reader, ids []age.Identity, c Config, slots []NewSlot) (*Store, Manifest, error) {
	return nil, Manifest{}, errSkeleton
}
