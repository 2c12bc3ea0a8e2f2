package audit

import (
	"context"
	"crypto/hpke"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// Errors of this package.
var (
	ErrStorage = errors.New("the audit log cannot be written")
	ErrClosed  = errors.New("the audit log is closed")
	ErrLocked  = errors.New("the audit log has no key")
	ErrKey     = errors.New("the audit log is encrypted to another auditor")
	ErrDamaged = errors.New("the audit log was changed")
)

// Times and sizes of the writer.
const (
	gather     = 10 * time.Millisecond // how long entries wait for company before they are written
	syncEvery  = time.Second           // how long written entries wait to be synced, when nobody asked for it
	retryEvery = time.Second           // after a failure
	maxPending = 4 << 20               // bytes of entries that wait; when they are full, Append fails
	urgentSize = 256 << 10             // bytes of entries that do not wait for company
	sendSize   = 64 << 10              // bytes in one write
	keepSize   = 1 << 20               // bytes of the buffers that are kept for the next entries
)

// Config says where the log is.
type Config struct {
	Dir string // made if it is missing; mode 0700
	Log *slog.Logger
}

// Log is the writer. Its methods may be called from any goroutine.
//
// Append costs the caller the encoding of the entry; one goroutine encrypts, hashes and writes. An entry of Append is on
// disk about a second after the call, one of AppendDurable before it returns. When the disk is full or fails, entries
// are kept in memory and tried again every second, AppendDurable fails at once, and Append fails when 4 MiB wait: from
// then on no use of a key goes on unrecorded. A disk that is merely slow slows the callers down.
//
// Until the keystore has been made there is no auditor, and entries wait in memory.
type Log struct {
	dir string
	log *slog.Logger

	mu       sync.Mutex
	queue    queue // waiting to be written
	spare    queue // the buffers of the queue before
	closed   bool
	auditor  hpke.PublicKey
	outbox   outbox
	failures uint64
	refused  uint64
	failing  error // of the last attempt to write, nil when it went well

	wake    chan struct{} // the queue is no longer empty
	urgent  chan struct{} // do not wait for company
	closing chan struct{}
	done    chan struct{}
	entries atomic.Uint64 // written, without headers

	copyMu sync.Mutex // held by Copy, taken before mu
	fileMu sync.Mutex // taken before mu
	writer writer
}

// queue is a run of encoded entries.
type queue struct {
	data  []byte
	ends  []int  // where in data each entry ends
	flush *flush // for those who wait until it is on disk, nil when nobody does
}

// flush tells those who wait for a queue how it went.
type flush struct {
	done    chan struct{}
	durable bool // somebody waits for the disk, not just for room
	err     error
}

// Stats are the counters of a Log since it was opened.
type Stats struct {
	Head     Head
	Entries  uint64 // written
	Pending  int    // bytes that wait
	Failures uint64 // attempts to write that failed
	Refused  uint64 // entries that were refused because too many waited
	Failing  error  // the last attempt to write failed with this
}

// Open opens the log in c.Dir for writing and repairs its end: what a loss of power left after the last complete entry is
// moved into a file of its own. Damage before the end is left for Verify to find.
func Open(c Config) (*Log, error) {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if err := os.MkdirAll(c.Dir, 0o700); err != nil {
		return nil, err
	}
	auditor, err := readAuditor(c.Dir)
	if err != nil {
		return nil, err
	}
	l := &Log{
		dir: c.Dir, log: c.Log, auditor: auditor,
		wake: make(chan struct{}, 1), urgent: make(chan struct{}, 1),
		closing: make(chan struct{}), done: make(chan struct{}),
	}
	l.writer.dir = c.Dir
	torn, err := l.writer.resume()
	if err != nil {
		return nil, err
	}
	if torn > 0 {
		c.Log.Warn("audit log ended in the middle of an entry", "bytes", torn)
		l.Append(&Entry{Time: time.Now(), Op: "audit_repair", Allowed: true, Code: "ok",
			Detail: fmt.Sprintf("%d bytes after the last complete entry were set aside", torn)})
	}
	go l.run()
	return l, nil
}

// Append records e. When too many entries wait, it waits with them for the disk, or returns ErrStorage if the disk cannot be
// written.
func (l *Log) Append(e *Entry) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.enqueue(e, 0)
}

// AppendDurable records e and returns when it is on disk. Errors are ErrStorage, ErrClosed and those of ctx; after any of
// them the entry may still come to be written.
func (l *Log) AppendDurable(ctx context.Context, e *Entry) error {
	l.mu.Lock()
	if l.auditor == nil {
		l.mu.Unlock()
		return ErrLocked
	}
	if err := l.enqueue(e, 0); err != nil {
		l.mu.Unlock()
		return err
	}
	f := l.wanted(true)
	l.mu.Unlock()
	return f.wait(ctx)
}

// Flush returns when everything that was appended before is on disk.
func (l *Log) Flush(ctx context.Context) error {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return ErrClosed
	}
	if l.auditor == nil {
		l.mu.Unlock()
		return ErrLocked
	}
	f := l.wanted(true)
	l.mu.Unlock()
	return f.wait(ctx)
}

// wanted returns the flush of the queue and wakes the writer for it. l.mu is held.
func (l *Log) wanted(durable bool) *flush {
	if l.queue.flush == nil {
		l.queue.flush = &flush{done: make(chan struct{})}
	}
	l.queue.flush.durable = l.queue.flush.durable || durable
	signal(l.wake)
	signal(l.urgent)
	return l.queue.flush
}

func (f *flush) wait(ctx context.Context) error {
	select {
	case <-f.done:
		return f.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// enqueue encodes e at the end of the queue. l.mu is held.
func (l *Log) enqueue(e *Entry, tag uint64) error {
	if err := l.makeRoom(); err != nil {
		return err
	}
	if l.closed {
		return ErrClosed
	}
	q := &l.queue
	q.data = appendEntry(q.data, e, tag)
	q.ends = append(q.ends, len(q.data))
	if len(q.ends) == 1 {
		signal(l.wake)
	}
	if len(q.data) > urgentSize {
		signal(l.urgent)
	}
	return nil
}

// makeRoom returns when the queue has room for an entry. A disk that is slower than the callers slows them down; only one
// that cannot be written makes them fail. l.mu is held, and given up while waiting.
func (l *Log) makeRoom() error {
	for len(l.queue.data)+maxEntry > maxPending {
		if l.closed {
			return ErrClosed
		}
		if l.failing != nil || l.auditor == nil {
			l.refused++
			return fmt.Errorf("%w: too many entries wait", ErrStorage)
		}
		f := l.wanted(false)
		l.mu.Unlock()
		<-f.done
		l.mu.Lock()
	}
	return nil
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Head returns the head of the tree of what has been written so far.
func (l *Log) Head() Head {
	l.fileMu.Lock()
	defer l.fileMu.Unlock()
	return l.writer.tree.head()
}

// Stats returns the counters.
func (l *Log) Stats() Stats {
	s := Stats{Head: l.Head(), Entries: l.entries.Load()}
	l.mu.Lock()
	defer l.mu.Unlock()
	s.Pending, s.Failures, s.Refused, s.Failing = len(l.queue.data), l.failures, l.refused, l.failing
	return s
}

// Close writes and syncs what waits and closes the files. What cannot be written is lost; the error says so.
func (l *Log) Close() error {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return nil
	}
	l.closed = true
	l.mu.Unlock()
	close(l.closing)
	<-l.done
	l.Lock()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.failing != nil {
		return l.failing
	}
	if len(l.queue.ends) > 0 && l.auditor != nil {
		return ErrStorage
	}
	return nil
}

// run is the writing goroutine.
func (l *Log) run() {
	defer close(l.done)
	timer := time.NewTimer(time.Hour)
	timer.Stop()
	for {
		closing := l.rest(timer)
		if l.round(closing) {
			timer.Reset(syncEvery)
		} else {
			timer.Stop()
		}
		if closing {
			l.fileMu.Lock()
			l.writer.close()
			l.fileMu.Unlock()
			return
		}
	}
}

// rest returns when there is something to do and reports whether it is the last time.
func (l *Log) rest(timer *time.Timer) (closing bool) {
	select {
	case <-l.closing:
		return true
	case <-l.urgent:
		return false
	case <-timer.C:
		return false
	case <-l.wake:
	}
	timer.Reset(gather)
	select {
	case <-l.closing:
		return true
	case <-l.urgent:
	case <-timer.C:
	}
	return false
}

// round writes what waits, syncs when that is due, tells those who wait for it, and reports whether it has to be called
// again soon.
func (l *Log) round(last bool) (again bool) {
	l.fileMu.Lock()
	defer l.fileMu.Unlock()
	w := &l.writer

	l.mu.Lock()
	auditor := l.auditor
	l.mu.Unlock()
	if auditor == nil {
		l.finish(ErrLocked, nil)
		return false
	}
	err := w.send()
	if err == nil && l.waiting() {
		err = w.prepare(auditor)
	}
	if err != nil {
		l.finish(err, nil)
		return true
	}
	q := l.take()
	l.entries.Add(uint64(len(q.ends)))
	err = w.write(&q)
	switch {
	case err != nil:
	case q.flush != nil && q.flush.durable, last:
		err = w.sync()
	case w.dirty && time.Since(w.synced) >= syncEvery:
		l.syncAside()
	}
	l.finish(err, &q)
	return err != nil || w.dirty
}

// syncAside syncs what was written while more is being written: nobody waits for it, and the queue must not fill up
// meanwhile. l.fileMu is held.
func (l *Log) syncAside() {
	w := &l.writer
	if w.syncing {
		return
	}
	w.syncing, w.dirty, w.synced = true, false, time.Now()
	f := w.file
	go func() {
		err := datasync(f)
		l.fileMu.Lock()
		defer l.fileMu.Unlock()
		w.syncing = false
		if err != nil && w.file == f { // else a sync in between has said so
			w.close()
			l.finish(err, nil)
		}
	}()
}

func (l *Log) waiting() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.queue.ends) > 0
}

// take hands the queue to the writer and puts the one written before, empty, in its place.
func (l *Log) take() queue {
	l.mu.Lock()
	defer l.mu.Unlock()
	q := l.queue
	l.queue = queue{data: l.spare.data[:0], ends: l.spare.ends[:0]}
	l.spare = queue{}
	return q
}

// finish tells those who wait for q how it went; without q, those who wait for what is still in the queue.
func (l *Log) finish(err error, q *queue) {
	if err != nil && err != ErrLocked {
		err = fmt.Errorf("%w: %w", ErrStorage, err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if err != nil && err != ErrLocked {
		if l.failing == nil {
			l.log.Error("audit log cannot be written", "error", err)
		}
		l.failures++
		l.failing = err
	} else if q != nil {
		if l.failing != nil {
			l.log.Info("audit log is written again")
		}
		l.failing = nil
	}
	f := l.queue.flush
	if q != nil {
		f = q.flush
		clear(q.data)
		if cap(q.data) <= keepSize { // a rare burst is not kept
			l.spare = queue{data: q.data, ends: q.ends}
		}
	} else {
		l.queue.flush = nil
	}
	if f != nil {
		f.err = err
		close(f.done)
	}
}
