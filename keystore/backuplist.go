package keystore

import (
	"fmt"
	"time"
)

// Backup is what a store remembers of a backup that was made of it. Destroying a key does not reach into backups, so whoever has to
// be sure needs to know which there are.
//
// Invariant: a backup is listed before the first byte of it leaves the store, also when it is then given up.
type Backup struct {
	ID       [16]byte // as in its manifest
	Created  time.Time
	Epoch    uint32
	Sequence uint64 // commits of the store before the one that lists it
	Keys     uint64
}

func (b *Backup) encode(e *encoder) {
	e.raw(b.ID[:])
	e.time(b.Created)
	e.u32(b.Epoch)
	e.u64(b.Sequence)
	e.u64(b.Keys)
}

func decodeBackup(d *decoder) (b Backup) {
	d.fixed(b.ID[:])
	b.Created = d.time()
	b.Epoch = d.u32()
	b.Sequence = d.u64()
	b.Keys = d.u64()
	return b
}

// olderBackups says which backups were made before the last destruction, which is commit number erased; 0 means there was none.
func olderBackups(list []Backup, erased uint64) string {
	var old []Backup
	for _, b := range list {
		if b.Sequence < erased {
			old = append(old, b)
		}
	}
	day := func(b Backup) string { return b.Created.Format("2006-01-02 15:04:05 MST") }
	switch len(old) {
	case 0:
		return ""
	case 1:
		return fmt.Sprintf("the backup of %s is older than the last destruction and may hold what was destroyed", day(old[0]))
	}
	return fmt.Sprintf("%d backups, of %s to %s, are older than the last destruction and may hold what was destroyed", len(old), day(old[0]), day(old[len(old)-1]))
}
