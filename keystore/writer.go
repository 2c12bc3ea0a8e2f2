package keystore

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"path/filepath"
	"runtime"
	"time"

	bolt "go.etcd.io/bbolt"
)

// The writer is the one goroutine that changes the store. Commits that are waiting when it becomes free share one transaction, and
// so one fsync; it never waits for more of them to come.

const (
	maxBatch   = 4096 // changes in one transaction, beyond those of a single commit
	requestTTL = 24 * time.Hour
)

// job is a prepared commit, or something to be run while no commit is.
type job struct {
	commit *prepared
	run    func() error
	done   chan error
}

// submit hands a job to the writer and waits for it.
func (s *Store) submit(j *job) error {
	j.done = make(chan error, 1)
	select {
	case <-s.quit:
		return ErrClosed
	default:
	}
	select {
	case s.jobs <- j:
	case <-s.quit:
		return ErrClosed
	}
	select {
	case err := <-j.done:
		return err
	case <-s.stopped:
		select {
		case err := <-j.done:
			return err
		default:
			return ErrClosed
		}
	}
}

// exclusively runs f on the writer goroutine, with the store unlocked and held for reading.
func (s *Store) exclusively(f func() error) error {
	return s.submit(&job{run: func() error {
		s.mu.RLock()
		defer s.mu.RUnlock()
		if s.secrets == nil {
			return ErrLocked
		}
		return f()
	}})
}

func (s *Store) write() {
	defer close(s.stopped)
	for {
		select {
		case j := <-s.jobs:
			s.serve(j)
		case <-s.quit:
			for {
				select {
				case j := <-s.jobs:
					j.done <- ErrClosed
				default:
					s.flushOutbox()
					return
				}
			}
		}
	}
}

// serve carries out j and whatever else is waiting by then.
func (s *Store) serve(j *job) {
	var batch []*job
	changes := 0
	for {
		if j.run != nil {
			s.commitBatch(batch)
			j.done <- j.run()
			return
		}
		batch = append(batch, j)
		changes += len(j.commit.changes)
		if changes >= maxBatch {
			break
		}
		if len(s.jobs) == 0 {
			runtime.Gosched() // those that the last commit released get a chance to come back
		}
		select {
		case j = <-s.jobs:
			continue
		default:
		}
		break
	}
	s.commitBatch(batch)
}

// commitBatch commits the jobs together. If the table cannot be changed for one of them they are committed one by one, so that
// damage in one place fails only those that need that place.
func (s *Store) commitBatch(batch []*job) {
	if len(batch) == 0 {
		return
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.secrets == nil {
		for _, j := range batch {
			j.done <- ErrLocked
		}
		return
	}
	t := s.begin()
	results := make([]error, len(batch))
	staged := false
	for i, j := range batch {
		if results[i] = t.stage(j.commit); results[i] == nil {
			staged = true
		}
		if t.spoiled != nil && len(batch) > 1 {
			t.edit.wipe()
			for _, j := range batch {
				s.commitOne(j)
			}
			return
		}
	}
	if staged && t.spoiled == nil {
		if err := t.commit(); err != nil {
			for i := range results {
				if results[i] == nil {
					results[i] = err
				}
			}
		}
	}
	t.edit.wipe()
	for i, j := range batch {
		j.done <- results[i]
	}
}

func (s *Store) commitOne(j *job) {
	t := s.begin()
	defer t.edit.wipe()
	err := t.stage(j.commit)
	if err == nil {
		err = t.commit()
	}
	j.done <- err
}

// transaction collects what one bbolt transaction will write. All encryption is done before that begins.
type transaction struct {
	s        *Store
	edit     *edit
	puts     []put
	bump     bool // the generation has to grow with this transaction
	requests map[[32]byte]recordKey
	spoiled  error // the edit was left half done
}

// put writes value or, if that is nil, deletes the key. Of an alias it adds the entry value or, if that is nil, takes the entry was away.
type put struct{ bucket, key, value, was []byte }

func (s *Store) begin() *transaction {
	return &transaction{s: s, edit: s.newEdit(s.snapshot.Load()), requests: make(map[[32]byte]recordKey)}
}

// stage adds a commit, or refuses it without a trace.
func (t *transaction) stage(p *prepared) error {
	if p.hasRequest {
		if err := t.checkRequest(p.request); err != nil {
			return err
		}
	}
	for i := range p.changes {
		c := &p.changes[i]
		if c.base && c.guards != t.s.guardChanges.Load() {
			return errStale
		}
		current, found, err := t.edit.find(c.meta)
		clear(current.dek[:])
		switch {
		case err != nil:
			return err
		case c.expected == 0 && found && !(c.document && current.flags&entryDestroyed != 0):
			return fmt.Errorf("%w: %s", ErrExists, c.label)
		case c.expected == 0 && current.revision != c.tombstone:
			return errStale
		case c.expected != 0 && (!found || c.document && current.flags&entryDestroyed != 0):
			return fmt.Errorf("%w: %s", ErrNotFound, c.label)
		case c.expected != 0 && current.revision != c.expected:
			return fmt.Errorf("%w: %s", ErrConflict, c.label)
		}
	}
	for i := range p.changes {
		c := &p.changes[i]
		for _, x := range c.entries {
			if err := t.edit.put(x); err != nil {
				t.spoiled = err
				return err
			}
		}
		switch {
		case c.deleted:
			t.edit.head.documents--
			t.edit.head.pending++
		case c.expected == 0 && c.document:
			t.edit.head.documents++
		case c.expected == 0:
			t.edit.head.keys++
		}
		if c.erased > 0 {
			t.edit.head.pending += uint64(c.erased)
			t.edit.head.erased = t.edit.head.sequence + 1 // what this commit will be
		}
		t.edit.head.guarded += uint64(c.guarded)
		t.edit.head.unescrowed += uint64(c.unescrowed)
		t.bump = t.bump || c.bump
		t.puts = append(t.puts, c.puts...)
	}
	if len(p.audit) > 0 {
		seq := t.edit.head.outboxNext
		t.edit.head.outboxNext++
		t.puts = append(t.puts, put{bucket: bucketOutbox, key: binary.BigEndian.AppendUint64(nil, seq), value: t.s.sealOutbox(seq, p.audit)})
	}
	if p.hasRequest {
		t.requests[p.request] = p.answer
		t.puts = append(t.puts, put{bucket: bucketRequest, key: p.request[:], value: t.s.encodeRequest(p.request, p.answer)})
	}
	return nil
}

// commit makes the transaction durable and visible.
func (t *transaction) commit() error {
	s := t.s
	if s.broken != nil {
		return s.broken
	}
	if err := s.markDirty(); err != nil {
		return err
	}
	h := s.header.Load()
	if t.bump && !h.pending {
		h = h.clone()
		h.generation++
		h.pending = true
		if err := s.replaceHeader(h); err != nil {
			return err
		}
	}
	state := &t.edit.head
	state.sequence++
	if current := s.secrets.currentEpoch().number; state.epoch != current {
		// The first commit of an epoch: from here on all leaves have to be sealed again.
		state.epoch, state.seals = current, 0
		state.rotating, state.cursor, state.rotated = true, recordKey{}, 0
		state.pendingOld, state.pending = state.pendingOld+state.pending, 0
	}
	state.generation = h.generation
	ackFrom, ackTo := state.outboxAcked+1, min(s.acked.Load(), state.outboxNext-1)
	if ackTo >= ackFrom {
		state.outboxAcked = ackTo
	}
	blobs, err := t.edit.finish()
	if err != nil {
		return err
	}
	headBlob := state.encode(s.storeID, s.secrets.currentEpoch().key.Bytes())

	s.commitMu.Lock()
	err = guard(func() error {
		return s.db.Update(func(tx *bolt.Tx) error {
			table := tx.Bucket(bucketTable)
			for id, w := range blobs {
				if err := table.Put(nodeID(id), w.blob); err != nil {
					return err
				}
			}
			for _, p := range t.puts {
				b := tx.Bucket(p.bucket)
				value := p.value
				if bytes.Equal(p.bucket, bucketAlias) {
					value = p.merged(b.Get(p.key))
				}
				if len(value) > 0 {
					err = b.Put(p.key, value)
				} else {
					err = b.Delete(p.key)
				}
				if err != nil {
					return err
				}
			}
			outbox := tx.Bucket(bucketOutbox)
			for seq := ackFrom; seq <= ackTo; seq++ {
				if err := outbox.Delete(binary.BigEndian.AppendUint64(nil, seq)); err != nil {
					return err
				}
			}
			if err := s.sweepRequests(tx.Bucket(bucketRequest)); err != nil {
				return err
			}
			return tx.Bucket(bucketHead).Put(keyHead, headBlob)
		})
	})
	if err != nil {
		defer s.commitMu.Unlock()
		return s.commitFailed(err)
	}
	t.edit.publish(blobs)
	published := *state
	s.snapshot.Store(&published)
	s.commitMu.Unlock()

	if h.pending {
		h = h.clone()
		h.pending = false
		// The commit is durable. Should this fail, the next header or the next unlock makes up for it.
		if err := s.replaceHeader(h); err != nil {
			s.config.log().Warn("keystore header", "error", err)
		}
	}
	return nil
}

// commitFailed finds out what a failed transaction left behind. The storage may have failed after the new state became the one on
// the disk, so it is read again: what is there is what holds.
func (s *Store) commitFailed(cause error) error {
	if errors.Is(cause, ErrDamaged) {
		s.broken = fmt.Errorf("%w (no changes until it was opened again)", cause)
		return s.broken
	}
	state, err := s.readHead(s.secrets)
	if err != nil {
		s.broken = err
		return err
	}
	s.snapshot.Store(state)
	return fmt.Errorf("%w: %w", ErrStorage, cause)
}

// markDirty leaves a note that the next opening has to look closer, unless the store was closed properly.
func (s *Store) markDirty() error {
	if s.dirty {
		return nil
	}
	if err := writeFile(filepath.Join(s.config.Dir, dirtyFile), nil); err != nil {
		return fmt.Errorf("%w: %w", ErrStorage, err)
	}
	if err := syncDir(s.config.Dir); err != nil {
		return err
	}
	s.dirty = true
	return nil
}

// replaceHeader makes h the header, on disk and in memory.
func (s *Store) replaceHeader(h *header) error {
	if err := replaceFile(filepath.Join(s.config.Dir, headerFile), h.encode(s.secrets.root.Bytes())); err != nil {
		return err
	}
	s.header.Store(h)
	return nil
}

// settleGeneration brings a database up to the generation of a header that was written just before a crash.
func (s *Store) settleGeneration() error {
	t := s.begin()
	defer t.edit.wipe()
	return t.commit()
}

// encodeRequest returns what is kept about a request key: the record it was answered with, and until when.
func (s *Store) encodeRequest(request [32]byte, answer recordKey) []byte {
	e := &encoder{}
	e.raw(answer[:])
	e.time(s.config.now().Add(requestTTL))
	tag := mac(s.secrets.alias.Bytes(), []byte("request\x00"), request[:], e.b)
	e.raw(tag[:16])
	return e.b
}

// checkRequest returns a *duplicate if the request was carried out before.
func (t *transaction) checkRequest(request [32]byte) error {
	if answer, ok := t.requests[request]; ok {
		return &duplicate{answer}
	}
	v, err := t.s.fetch(bucketRequest, request[:])
	if err != nil || v == nil {
		return err
	}
	d := &decoder{b: v}
	var answer recordKey
	d.fixed(answer[:])
	until := d.time()
	content := v[:len(v)-len(d.b)]
	tag := mac(t.s.secrets.alias.Bytes(), []byte("request\x00"), request[:], content)
	if d.err != nil || !sameMAC(tag[:16], d.b) {
		return fmt.Errorf("%w: a request key does not authenticate", ErrDamaged)
	}
	if t.s.config.now().After(until) {
		return nil
	}
	return &duplicate{answer}
}

// duplicate is a DuplicateError before the name was looked up.
type duplicate struct{ answer recordKey }

func (*duplicate) Error() string { return "duplicate request" }

// sweepRequests removes a few request keys that have expired. Each commit looks at twice as many as it can have added, so the bucket
// stays as small as the requests of a day.
func (s *Store) sweepRequests(b *bolt.Bucket) error {
	c := b.Cursor()
	k, v := c.Seek(s.sweep)
	var expired [][]byte
	now := s.config.now()
	for range 8 {
		if k == nil {
			s.sweep = nil
			break
		}
		d := &decoder{b: v}
		d.take(len(recordKey{}))
		if until := d.time(); d.err != nil || now.After(until) {
			expired = append(expired, bytes.Clone(k))
		}
		if k, v = c.Next(); k != nil {
			s.sweep = bytes.Clone(k)
		}
	}
	for _, k := range expired {
		if err := b.Delete(k); err != nil {
			return err
		}
	}
	return nil
}
