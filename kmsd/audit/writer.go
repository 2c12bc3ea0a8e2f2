package audit

import (
	"bufio"
	"bytes"
	"crypto/hpke"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/kmsd-project/kmsd/keystore/durable"
)

// writer is the end of the log on disk.
type writer struct {
	dir     string
	tree    tree
	segment uint32   // number of the last segment
	file    *os.File // nil: a new segment has to be made
	session *session
	size    int64  // bytes of file that are written
	unsent  []byte // sealed, but not yet written at size
	dirty   bool   // written, but not synced
	synced  time.Time
	syncing bool // somebody does, aside
	scratch []byte
}

// prepare makes a new segment when one is needed. Nothing is unsent.
func (w *writer) prepare(auditor hpke.PublicKey) error {
	if w.file != nil && w.size < maxSegment {
		return nil
	}
	if w.file != nil {
		if err := w.sync(); err != nil {
			return err
		}
		w.close()
	}
	h, s, err := newHeader(auditor, w.segment+1, &w.tree)
	if err != nil {
		return err
	}
	leaf := h.leaf()
	raw := append(slices.Clone(h.raw), leaf[:checkSize]...)
	path := filepath.Join(w.dir, segmentName(h.segment))
	if err := durable.Replace(path, raw); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	w.file, w.session, w.segment, w.size = f, s, h.segment, int64(len(raw))
	w.tree.add(leaf)
	return nil
}

// write seals and sends the entries of q, piece by piece, so that the buffer stays small. When sending fails the rest is
// sealed and waits.
func (w *writer) write(q *queue) (err error) {
	start := 0
	for _, end := range q.ends {
		w.seal(q.data[start:end])
		start = end
		if err == nil && len(w.unsent) >= sendSize {
			err = w.send()
		}
	}
	if err == nil {
		err = w.send()
	}
	return err
}

// seal encrypts an encoded entry and adds it to the tree.
//
// Invariant: what was sealed once is written as it is, however often writing fails, because the nonce is spent.
func (w *writer) seal(entry []byte) {
	at := len(w.unsent)
	w.unsent = append(w.unsent, 0, 0, 0, 0)
	w.unsent = w.session.appendBody(w.unsent, w.tree.size, entry)
	body := w.unsent[at+4:]
	binary.BigEndian.PutUint32(w.unsent[at:], uint32(len(body)))
	leaf := leafHash(&w.scratch, body)
	w.unsent = append(w.unsent, leaf[:checkSize]...)
	w.tree.add(leaf)
}

// send writes what is unsent. After an error it can be called again: the same bytes go to the same place.
func (w *writer) send() error {
	if len(w.unsent) == 0 {
		return nil
	}
	if _, err := w.file.WriteAt(w.unsent, w.size); err != nil {
		return err
	}
	w.size += int64(len(w.unsent))
	w.unsent = w.unsent[:0]
	if cap(w.unsent) > 4*sendSize { // after a failure
		w.unsent = nil
	}
	if !w.dirty {
		w.dirty, w.synced = true, time.Now()
	}
	return nil
}

// sync makes what was sent durable. After a failure nobody knows what the kernel has dropped, so the segment is left as
// it is and the next entry begins a new one, whose header tells what should have been there.
func (w *writer) sync() error {
	if !w.dirty {
		return nil
	}
	w.dirty, w.synced = false, time.Now()
	if err := datasync(w.file); err != nil {
		w.close()
		return err
	}
	return nil
}

func (w *writer) close() {
	if w.file != nil {
		w.file.Close()
	}
	w.file, w.session = nil, nil
}

// resume finds the end of the log and sets aside what a loss of power left behind it. It returns the number of bytes set
// aside.
func (w *writer) resume() (torn int64, err error) {
	segments, err := listSegments(w.dir)
	if err != nil || len(segments) == 0 {
		return 0, err
	}
	w.segment = segments[len(segments)-1]
	// The header of the last segment is there whole, because it was renamed into place. If it is not, somebody damaged
	// it: the log goes on after the last segment that can be read, and Verify tells.
	for _, n := range slices.Backward(segments) {
		torn, err = w.resumeAfter(filepath.Join(w.dir, segmentName(n)), n == w.segment)
		if err == nil || isIO(err) {
			return torn, err
		}
	}
	return 0, nil
}

func (w *writer) resumeAfter(path string, last bool) (torn int64, err error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	r, err := newSegmentReader(bufio.NewReaderSize(f, 64<<10))
	if err != nil {
		return 0, err
	}
	w.tree = tree{size: r.header.first, edge: slices.Clone(r.header.edge)}
	w.tree.add(r.header.leaf())
	for {
		at := r.offset
		leaf, err := r.next()
		switch {
		case err == nil:
			w.tree.add(leaf)
			continue
		case err == io.EOF || !last:
			return 0, nil
		case isIO(err):
			return 0, err
		}
		rest, err := readFrom(f, at)
		if err != nil {
			return 0, err
		}
		if !errors.Is(err, errTorn) && goesOn(rest, r.number) {
			// Whole entries come after the bad one: that was no loss of power. The evidence stays.
			return 0, nil
		}
		return int64(len(rest)), setAside(path, at, rest)
	}
}

// goesOn reports whether b has a complete record with a number after number.
func goesOn(b []byte, number uint64) bool {
	var buf []byte
	for ; len(b) >= 4+minBody+checkSize; b = b[1:] {
		n := int(binary.BigEndian.Uint32(b))
		if n < minBody || n > maxBody || len(b) < 4+n+checkSize {
			continue
		}
		body := b[4 : 4+n]
		if at := binary.BigEndian.Uint64(body); at < number || at-number > 1<<20 {
			continue
		}
		if leaf := leafHash(&buf, body); bytes.Equal(leaf[:checkSize], b[4+n:][:checkSize]) {
			return true
		}
	}
	return false
}

func readFrom(f *os.File, at int64) ([]byte, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if info.Size()-at > 4*maxSegment {
		return nil, fmt.Errorf("%w: segment is longer than any that was written", ErrDamaged)
	}
	b := make([]byte, max(info.Size()-at, 0))
	_, err = f.ReadAt(b, at)
	return b, err
}

// setAside copies the end of the file at path into a file beside it and cuts it off.
func setAside(path string, at int64, rest []byte) error {
	if err := durable.Replace(path+".torn", rest); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Truncate(at); err != nil {
		return err
	}
	return f.Sync()
}
