package keystore

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	bolt "go.etcd.io/bbolt"
)

// compactTransaction bounds, in bytes, what one transaction of a compaction writes.
const compactTransaction = 16 << 20

// Compact copies the database into a new file without its free pages. It saves space; to erase is the business of RotateEpoch.
// Commits wait until it is done, reads go on.
func (s *Store) Compact(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return s.submit(&job{run: s.compact})
}

func (s *Store) compact() error {
	path := filepath.Join(s.config.Dir, databaseFile)
	temp := path + newSuffix
	os.Remove(temp)
	fresh, err := openDatabase(temp, os.O_CREATE|os.O_EXCL)
	if err != nil {
		return err
	}
	fail := func(err error) error {
		fresh.Close()
		os.Remove(temp)
		return err
	}
	fresh.NoSync = true
	if err := guard(func() error { return bolt.Compact(fresh, s.db, compactTransaction) }); err != nil {
		return fail(fmt.Errorf("%w: %w", ErrStorage, err))
	}
	fresh.NoSync = false
	if err := fresh.Sync(); err != nil {
		return fail(fmt.Errorf("%w: %w", ErrStorage, err))
	}
	if err := os.Rename(temp, path); err != nil {
		return fail(fmt.Errorf("%w: %w", ErrStorage, err))
	}
	s.mu.Lock()
	old := s.db
	s.db = fresh
	s.mu.Unlock()
	if err := guard(old.Close); err != nil {
		s.config.log().Warn("closing the database before compaction", "error", err)
	}
	return syncDir(s.config.Dir)
}
