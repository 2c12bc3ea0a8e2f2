package keystore

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"time"

	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"
)

// The buckets of the database.
var (
	bucketMeta     = []byte("meta")     // record id||0 -> metadata record
	bucketMaterial = []byte("material") // record id||version -> material record; id||0 the namespace wrapping key
	bucketPublic   = []byte("public")   // record id||version -> public record
	bucketDocument = []byte("document") // record id||0 -> document record
	bucketAlias    = []byte("alias")    // HMAC of kind and value -> (record id||version, MAC)...
	bucketTable    = []byte("table")    // node id -> key table node
	bucketOutbox   = []byte("outbox")   // sequence number -> outbox record
	bucketRequest  = []byte("request")  // HMAC of a request key -> record id||version, time, MAC
	bucketHead     = []byte("head")     // "head" -> head

	keyHead = []byte("head")

	allBuckets = [][]byte{bucketMeta, bucketMaterial, bucketPublic, bucketDocument, bucketAlias, bucketTable, bucketOutbox, bucketRequest, bucketHead}
)

const (
	lockTimeout = 2 * time.Second

	// minDatabase is the size in bytes that the first commit makes the database file grow to. From there it doubles: where in its
	// first megabyte a small store is would tell more about it.
	minDatabase = 1 << 20
)

// openDatabase opens the bbolt file, waiting at most lockTimeout for another process to let it go. The file was examined before.
func openDatabase(path string, flags int) (db *bolt.DB, err error) {
	err = guard(func() error {
		db, err = bolt.Open(path, 0o600, &bolt.Options{
			Timeout:         lockTimeout,
			FreelistType:    bolt.FreelistMapType,
			InitialMmapSize: minDatabase,
			NoStatistics:    true,
			OpenFile: func(name string, flag int, mode os.FileMode) (*os.File, error) {
				return os.OpenFile(name, flag&^os.O_CREATE|flags|unix.O_NOFOLLOW, mode)
			},
		})
		return err
	})
	switch {
	case err == nil:
		return db, nil
	case errors.Is(err, bolterrors.ErrTimeout):
		return nil, ErrInUse
	case errors.Is(err, ErrDamaged):
		return nil, err
	case errors.Is(err, os.ErrNotExist), errors.Is(err, os.ErrPermission), errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EROFS), errors.Is(err, unix.EIO), errors.Is(err, unix.ENOMEM):
		return nil, fmt.Errorf("%w: %w", ErrStorage, err)
	}
	return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
}

// guard runs f and turns a panic or a memory fault, which is how bbolt meets a damaged file, into ErrDamaged.
func guard(f func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%w: database: %v", ErrDamaged, p)
		}
	}()
	return f()
}

// fetch returns a copy of one value, nil if there is none.
func (s *Store) fetch(bucket, key []byte) ([]byte, error) {
	values := [1]place{{bucket: bucket, key: key}}
	err := s.fetchAll(values[:])
	return values[0].value, err
}

// place is where a value is, and the value.
type place struct{ bucket, key, value []byte }

// fetchAll fills in copies of values, nil for those that are not there. No transaction outlives the copying.
func (s *Store) fetchAll(places []place) error {
	err := guard(func() error {
		return s.db.View(func(tx *bolt.Tx) error {
			for i := range places {
				p := &places[i]
				if b := tx.Bucket(p.bucket); b != nil {
					if v := b.Get(p.key); v != nil {
						p.value = bytes.Clone(v)
					}
				}
			}
			return nil
		})
	})
	if err != nil && !errors.Is(err, ErrDamaged) {
		err = fmt.Errorf("%w: %w", ErrStorage, err)
	}
	return err
}
