package keystore

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/kmsd-project/kmsd/keystore/secmem"
)

// Config says where a store is and what it may use.
type Config struct {
	Dir   string           // the state directory, mode 0700, owned by the effective user
	Arena *secmem.Arena    // for the root, lifetime and epoch keys; the store takes at most 1 KiB of it, and 32 bytes for each open namespace
	Now   func() time.Time // nil for time.Now
	Log   *slog.Logger     // nil for none
	// CheckCommand is the command, path first, that examines a database file before this process opens it; the path of the file
	// is appended. It calls CheckMain. Without one the file is examined in this process.
	CheckCommand []string
}

// Store is an open keystore, locked or unlocked. Its methods may be called concurrently.
//
// Invariant: only the writer goroutine starts a writing transaction or replaces the header.
type Store struct {
	config  Config
	storeID [16]byte
	cache   *nodeCache

	// mu is held for reading by everything that uses the secrets or the database, for writing by what takes them away.
	mu      sync.RWMutex
	db      *bolt.DB
	secrets *secrets // nil while locked
	closed  bool

	header   atomic.Pointer[header]
	snapshot atomic.Pointer[head] // the state of the last commit; nil while locked
	commitMu sync.RWMutex         // held for writing from the start of a transaction until its state is the snapshot

	rollback rollback

	open         openKeys
	guardChanges atomic.Uint64 // namespaces that got another wrapping key since Open

	jobs    chan *job
	quit    chan struct{}
	stopped chan struct{}

	acked   atomic.Uint64 // outbox entries up to this one may be removed with the next commit
	damaged atomic.Uint64
	unclean bool // the last stop was

	// What follows belongs to the writer goroutine.
	dirty  bool   // the dirty file is there
	broken error  // a write failed in a way that leaves the database in doubt
	sweep  []byte // where to look next for request keys that have expired
}

// secrets are the keys of an unlocked store, in protected memory.
type secrets struct {
	root, lifetime       *secmem.Buffer
	index, alias, outbox *secmem.Buffer // derived from lifetime
	epochs               []epochSecret  // the current one first
}

type epochSecret struct {
	number uint32
	key    *secmem.Buffer
}

func (s *secrets) currentEpoch() epochSecret { return s.epochs[0] }

func (s *secrets) epochKey(number uint32) []byte {
	for _, e := range s.epochs {
		if e.number == number {
			return e.key.Bytes()
		}
	}
	return nil
}

func (s *secrets) free() {
	for _, b := range s.buffers() {
		b.Free()
	}
}

// Info describes a store.
type Info struct {
	StoreID        [16]byte
	InstanceID     [16]byte // differs between a store and one restored from its backup
	Created        time.Time
	Locked         bool
	Escrow         []string // age recipients of every backup, chosen when the store was made
	Generation     uint64
	Epoch          uint32
	EpochRotating  bool     // a rotation was begun; RotateEpoch goes on with it
	Keys           uint64   // 0 while locked
	Documents      uint64   // which are not keys; 0 while locked
	ErasurePending uint64   // destroyed versions and deleted documents whose data keys may be found in freed pages until the epoch is rotated; 0 while locked
	Unclean        bool     // the stop before Open was not clean: Verify is called for
	Backups        []Backup // the last ones made of the store, and the one it was restored from, oldest first
	Damaged        uint64   // reads that met damage since Open
	Rollback       string   // whether the replacement of all files by an older copy would be noticed
	Guarded        uint64   // namespaces whose wrapping keys devices guard; 0 while locked
	WithoutEscrow  uint64   // those of them whose keys die with their device; 0 while locked
	Counter        string   // the location of the device whose counter tells, empty for none
	Warnings       []string
}

// Progress is filled in by long work and may be read at any time.
type Progress struct{ Done, Total atomic.Uint64 }

func (c *Config) now() time.Time {
	if c.Now != nil {
		return c.Now()
	}
	return time.Now()
}

func (c *Config) log() *slog.Logger {
	if c.Log != nil {
		return c.Log
	}
	return slog.New(slog.DiscardHandler)
}

// Create makes a store in the directory and returns it unlocked. The directory must exist. slots open the store; escrow are the age
// recipients that every backup is encrypted to. It returns ErrStoreExists if there is a store, or a part of one.
func Create(ctx context.Context, c Config, slots []NewSlot, escrow []string) (*Store, error) {
	h := &header{created: c.now().UTC().Truncate(time.Second), generation: 1, nextSlot: 1, escrow: escrow}
	random(h.storeID[:])
	random(h.instanceID[:])
	keys, err := newSecrets(c.Arena, h.storeID)
	if err != nil {
		return nil, err
	}
	s, err := create(ctx, c, h, keys, slots, func(path string) error {
		first := &head{sequence: 1, epoch: 1, generation: h.generation, outboxNext: 1}
		return createDatabase(path, first.encode(h.storeID, keys.currentEpoch().key.Bytes()))
	})
	if err != nil {
		keys.free()
	}
	return s, err
}

// create makes the files of a store. makeDatabase writes the database. A crash leaves no store, or a whole one.
func create(ctx context.Context, c Config, h *header, keys *secrets, slots []NewSlot, makeDatabase func(path string) error) (*Store, error) {
	if err := checkDir(c.Dir); err != nil {
		return nil, err
	}
	if exists, err := Exists(c.Dir); err != nil || exists {
		return nil, errors.Join(err, fmt.Errorf("%w in %s", ErrStoreExists, c.Dir))
	}
	if len(slots) == 0 {
		return nil, fmt.Errorf("%w: a store needs a slot", ErrInvalid)
	}
	if len(h.escrow) > maxEscrow {
		return nil, fmt.Errorf("%w: at most %d escrow recipients", ErrTooLarge, maxEscrow)
	}
	if _, err := parseRecipients(h.escrow); err != nil {
		return nil, err
	}
	root := keys.root.Bytes()
	for _, n := range slots {
		if _, err := h.addSlot(n, keys, c.now()); err != nil {
			return nil, err
		}
	}
	h.wrapAll(keys)
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	temp := filepath.Join(c.Dir, databaseFile+newSuffix)
	os.Remove(temp)
	if err := makeDatabase(temp); err != nil {
		os.Remove(temp)
		return nil, err
	}
	if err := placeStore(c.Dir, temp, h.encode(root)); err != nil {
		return nil, err
	}
	s, err := Open(ctx, c)
	if err != nil {
		return nil, err
	}
	if err := s.adopt(h, keys); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

// newSecrets makes the keys of a new store.
func newSecrets(a *secmem.Arena, store [16]byte) (*secrets, error) {
	k := &secrets{}
	var err error
	if k.root, err = randomBuffer(a); err != nil {
		return nil, err
	}
	if k.lifetime, err = randomBuffer(a); err != nil {
		k.free()
		return nil, err
	}
	epoch, err := randomBuffer(a)
	if err != nil {
		k.free()
		return nil, err
	}
	k.epochs = []epochSecret{{1, epoch}}
	if err := k.deriveFrom(a); err != nil {
		k.free()
		return nil, err
	}
	return k, nil
}

func randomBuffer(a *secmem.Arena) (*secmem.Buffer, error) {
	b, err := a.Alloc(keySize)
	if err == nil {
		random(b.Bytes())
	}
	return b, err
}

// deriveFrom derives the keys that live as long as the store.
func (s *secrets) deriveFrom(a *secmem.Arena) (err error) {
	secmem.Do(func() {
		for info, to := range map[string]**secmem.Buffer{"kmsd index v1": &s.index, "kmsd alias v1": &s.alias, "kmsd outbox v1": &s.outbox} {
			if *to, err = deriveBuffer(a, s.lifetime.Bytes(), info); err != nil {
				return
			}
		}
	})
	return err
}

func createDatabase(path string, headBlob []byte) error {
	db, err := openDatabase(path, os.O_CREATE|os.O_EXCL)
	if err != nil {
		return err
	}
	err = db.Update(func(tx *bolt.Tx) error {
		for _, name := range allBuckets {
			if _, err := tx.CreateBucket(name); err != nil {
				return err
			}
		}
		return tx.Bucket(bucketHead).Put(keyHead, headBlob)
	})
	if e := db.Close(); err == nil {
		err = e
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrStorage, err)
	}
	return nil
}

// Open opens the store in the directory, locked. It returns ErrNoStore if there is none, ErrPermissions if others could read or
// replace its files, ErrInUse if another process has it, and ErrDamaged if it cannot be used at all.
func Open(ctx context.Context, c Config) (*Store, error) {
	if err := checkDir(c.Dir); err != nil {
		return nil, err
	}
	if err := finishPlacing(c.Dir); err != nil {
		return nil, err
	}
	_, h, err := readHeader(c.Dir)
	if err != nil {
		return nil, err
	}
	path := filepath.Join(c.Dir, databaseFile)
	if err := checkFile(path); err != nil {
		return nil, err
	}
	_, err = os.Lstat(filepath.Join(c.Dir, dirtyFile))
	unclean := err == nil
	if err := checkInChild(ctx, c.CheckCommand, path); err != nil {
		return nil, err
	}
	db, err := openDatabase(path, 0)
	if err != nil {
		return nil, err
	}
	// Only now is it certain that no other process works here.
	for _, name := range []string{headerFile + newSuffix, databaseFile + newSuffix, snapshotFile, restoredFile} {
		os.Remove(filepath.Join(c.Dir, name))
	}
	s := &Store{
		config: c, storeID: h.storeID, cache: newNodeCache(), db: db, unclean: unclean, dirty: unclean,
		rollback: rollback{turn: make(chan struct{}, 1)},
		jobs:     make(chan *job, 256), quit: make(chan struct{}), stopped: make(chan struct{}),
	}
	s.header.Store(h)
	go s.write()
	return s, nil
}

// Unlock opens the store with a slot's secret. It returns ErrNoSlot, ErrSecret if the secret is not the slot's, ErrDamaged if header
// and database do not authenticate, ErrForeign if they are of a store that the slot was not enrolled for, and ErrRollback if they do
// not belong together. A store that is bound to a counter takes UnlockWith. Unlocking an unlocked store checks the secret.
func (s *Store) Unlock(ctx context.Context, slot uint32, secret []byte) error {
	return s.UnlockWith(ctx, slot, secret, UnlockOptions{})
}

// UnlockWith is Unlock for a store that may be bound to a counter. It returns ErrRollback also when the counter says that the files
// are an old copy, and ErrCounterAbsent when the counter cannot be asked, in which case a copy cannot be told from the original.
func (s *Store) UnlockWith(ctx context.Context, slot uint32, secret []byte, o UnlockOptions) error {
	// The header must not change between its comparison with the counter and its use.
	if err := s.rollback.take(ctx); err != nil {
		return err
	}
	defer s.rollback.release()
	b, h, err := readHeader(s.config.Dir)
	if err != nil {
		return err
	}
	record := h.slot(slot)
	if record == nil {
		return fmt.Errorf("%w: %d", ErrNoSlot, slot)
	}
	var keys *secrets
	secmem.Do(func() { keys, err = unwrapSecrets(s.config.Arena, b, h, record, secret) })
	if err != nil {
		return err
	}
	if !s.Locked() {
		keys.free()
		return nil
	}
	if o.Check {
		keys.free()
		return ErrLocked
	}
	if err = s.checkCounter(ctx, h, o); err == nil {
		err = s.adopt(h, keys)
	}
	if err != nil {
		keys.free()
		return err
	}
	s.rollback.wanted.Add(1)
	if err := s.advance(ctx); err != nil {
		s.config.log().Warn("the rollback counter does not cover the unlocking", "error", err)
	}
	return nil
}

// unwrapSecrets opens the header b with a slot's secret.
func unwrapSecrets(a *secmem.Arena, b []byte, h *header, record *slotRecord, secret []byte) (_ *secrets, err error) {
	k := &secrets{}
	defer func() {
		if err != nil {
			k.free()
		}
	}()
	if k.root, err = a.Alloc(keySize); err != nil {
		return nil, err
	}
	root := k.root.Bytes()
	if err := h.openRoot(root, record, secret); err != nil {
		return nil, err
	}
	if err := h.verify(b, root); err != nil {
		return nil, err
	}
	if k.lifetime, err = a.Alloc(keySize); err != nil {
		return nil, err
	}
	if err := h.unwrap(k.lifetime.Bytes(), root, h.lifetime[:], "lifetime", 0); err != nil {
		return nil, err
	}
	if err := h.checkEnrolment(record, secret, k.lifetime.Bytes()); err != nil {
		return nil, err
	}
	for _, w := range h.epochs {
		e, err := a.Alloc(keySize)
		if err != nil {
			return nil, err
		}
		k.epochs = append(k.epochs, epochSecret{w.number, e})
		if err := h.unwrap(e.Bytes(), root, w.key[:], "epoch", w.number); err != nil {
			return nil, err
		}
	}
	return k, k.deriveFrom(a)
}

// adopt unlocks the store with a verified header and the keys from it, after checking that the database belongs to it.
func (s *Store) adopt(h *header, keys *secrets) error {
	s.mu.Lock()
	if s.closed || s.secrets != nil {
		defer s.mu.Unlock()
		if s.closed {
			return ErrClosed
		}
		keys.free()
		return nil
	}
	state, err := s.readHead(keys)
	if err == nil {
		err = checkGenerations(h, state)
	}
	if err != nil {
		s.mu.Unlock()
		return err
	}
	s.header.Store(h)
	s.secrets = keys
	s.snapshot.Store(state)
	s.mu.Unlock()
	if !h.pending {
		return nil
	}
	// The last change of the header was interrupted. Finish it.
	if err := s.exclusively(func() error { return s.settleGeneration() }); err != nil {
		s.mu.Lock()
		if s.secrets == keys {
			s.secrets = nil // freed by the caller
			s.snapshot.Store(nil)
		}
		s.mu.Unlock()
		return err
	}
	return nil
}

// readHead reads and authenticates the head.
func (s *Store) readHead(keys *secrets) (*head, error) {
	b, err := s.fetch(bucketHead, keyHead)
	if err != nil {
		return nil, err
	}
	state, err := decodeHead(b)
	if err != nil {
		return nil, err
	}
	key := keys.epochKey(state.epoch)
	if key == nil {
		return nil, fmt.Errorf("%w: the database is of epoch %d, the header is not", ErrRollback, state.epoch)
	}
	return state, verifyHead(b, s.storeID, key)
}

// checkGenerations compares the counters that header and database carry. They differ only while a change of the header is under
// way, and then by one.
func checkGenerations(h *header, state *head) error {
	if state.generation == h.generation || h.pending && state.generation+1 == h.generation {
		return nil
	}
	return fmt.Errorf("%w: the header is of generation %d, the database of %d", ErrRollback, h.generation, state.generation)
}

// Lock forgets every key. Commits that are under way end first.
func (s *Store) Lock() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lock()
}

func (s *Store) lock() {
	if s.secrets == nil {
		return
	}
	s.secrets.free()
	s.secrets = nil
	s.open.dropAll()
	s.snapshot.Store(nil)
	s.cache = newNodeCache()
}

// Locked reports whether the store is locked.
func (s *Store) Locked() bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.secrets == nil
}

// Close locks and closes the store. Commits that are under way end first, later ones fail with ErrClosed.
func (s *Store) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	s.mu.Unlock()
	close(s.quit)
	<-s.stopped
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lock()
	err := guard(s.db.Close)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrStorage, err)
	}
	if s.dirty && s.broken == nil {
		os.Remove(filepath.Join(s.config.Dir, dirtyFile))
		return syncDir(s.config.Dir)
	}
	return nil
}

// Info describes the store.
func (s *Store) Info() Info {
	h := s.header.Load()
	info := Info{
		StoreID: h.storeID, InstanceID: h.instanceID, Created: h.created, Locked: true, Escrow: append([]string(nil), h.escrow...),
		Generation: h.generation, Epoch: h.epochs[0].number, EpochRotating: len(h.epochs) > 1,
		Unclean: s.unclean, Backups: slices.Clone(h.backups), Damaged: s.damaged.Load(),
	}
	s.rollback.describe(h.counter, &info)
	if state := s.snapshot.Load(); state != nil {
		info.Locked = false
		info.Keys, info.Documents = state.keys, state.documents
		info.ErasurePending = state.pending + state.pendingOld
		info.Guarded, info.WithoutEscrow = state.guarded, state.unescrowed
		if text := olderBackups(h.backups, state.erased); text != "" {
			info.Warnings = append(info.Warnings, text)
		}
		if state.unescrowed > 0 {
			info.Warnings = append(info.Warnings, fmt.Sprintf("the keys in %d of the namespaces die with the device that guards them: no backup can restore them elsewhere", state.unescrowed))
		}
		if state.seals > maxSeals {
			info.Warnings = append(info.Warnings, "the epoch key was used very often: rotate the epoch")
		}
	}
	if info.Damaged > 0 {
		info.Warnings = append(info.Warnings, "damage was met: run a verification")
	}
	return info
}

// maxSeals is when Info asks for a new epoch. With random 96-bit nonces the bound is 2^32 seals under one key (NIST SP 800-38D
// section 8.3).
const maxSeals = 1 << 31

// DeriveSecret fills dst with a secret that depends on the label and on the store, and stays the same as long as the store lives,
// in restored copies too.
func (s *Store) DeriveSecret(label string, dst []byte) error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.secrets == nil {
		return ErrLocked
	}
	if len(dst) > 255*sha256.Size {
		return fmt.Errorf("%w: derived secret", ErrTooLarge)
	}
	secmem.Do(func() { derive(dst, s.secrets.lifetime.Bytes(), "kmsd secret v1\x00"+label) })
	return nil
}
