package audit

import (
	"bufio"
	"context"
	"crypto/hpke"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
)

// Tail returns up to limit entries, oldest first, from number from on, and the number to go on with. It reads what was
// on disk when it was called. Segments that damage has made unreadable are an error that wraps ErrDamaged.
func Tail(dir string, seed []byte, from uint64, limit int) (entries []Entry, next uint64, err error) {
	private, err := auditorKey(seed)
	if err != nil {
		return nil, 0, err
	}
	segments, err := listSegments(dir)
	if err != nil {
		return nil, 0, err
	}
	next = from
	// The segment that holds from is the last one that begins at or before it.
	start := 0
	for i, n := range slices.Backward(segments) {
		first, err := firstNumber(dir, n)
		if err != nil {
			return nil, 0, err
		}
		if first <= from {
			start = i
			break
		}
	}
	for _, n := range segments[start:] {
		err := readSegment(dir, n, private, func(e *Entry, _ uint64) bool {
			if e.Number >= from {
				entries = append(entries, *e)
				next = e.Number + 1
			}
			return len(entries) < limit
		})
		if err != nil {
			return entries, next, err
		}
		if len(entries) >= limit {
			break
		}
	}
	return entries, next, nil
}

// Last returns the last limit entries, oldest first.
func Last(dir string, seed []byte, limit int) (entries []Entry, next uint64, err error) {
	private, err := auditorKey(seed)
	if err != nil {
		return nil, 0, err
	}
	segments, err := listSegments(dir)
	if err != nil {
		return nil, 0, err
	}
	for _, n := range slices.Backward(segments) {
		var here []Entry
		err := readSegment(dir, n, private, func(e *Entry, _ uint64) bool {
			if len(here) == limit { // a ring would save copying; a page is small
				here = append(here[:0], here[1:]...)
			}
			here = append(here, *e)
			return true
		})
		if err != nil {
			return nil, 0, err
		}
		entries = append(here, entries...)
		if len(entries) >= limit {
			entries = entries[len(entries)-limit:]
			break
		}
	}
	if len(entries) > 0 {
		next = entries[len(entries)-1].Number + 1
	}
	return entries, next, nil
}

// Tail is Tail of package audit, after everything that was appended before has been written.
func (l *Log) Tail(ctx context.Context, seed []byte, from uint64, limit int) ([]Entry, uint64, error) {
	if err := l.Flush(ctx); err != nil {
		return nil, 0, err
	}
	return Tail(l.dir, seed, from, limit)
}

// Last is Last of package audit, after everything that was appended before has been written.
func (l *Log) Last(ctx context.Context, seed []byte, limit int) ([]Entry, uint64, error) {
	if err := l.Flush(ctx); err != nil {
		return nil, 0, err
	}
	return Last(l.dir, seed, limit)
}

// readSegment calls f with the entries of segment n and their outbox tags until f returns false. An entry in the middle
// of being written ends the segment.
func readSegment(dir string, n uint32, private hpke.PrivateKey, f func(e *Entry, tag uint64) bool) error {
	file, err := os.Open(filepath.Join(dir, segmentName(n)))
	if err != nil {
		return err
	}
	defer file.Close()
	r, err := newSegmentReader(bufio.NewReaderSize(file, 64<<10))
	if err != nil {
		return fmt.Errorf("%w: %s: %w", ErrDamaged, segmentName(n), err)
	}
	s, err := r.header.session(private)
	if err != nil {
		return err
	}
	var plain []byte
	for {
		_, err := r.next()
		if err == io.EOF || errors.Is(err, errTorn) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("%w: %s: entry %d: %w", ErrDamaged, segmentName(n), r.number, err)
		}
		number := r.number - 1
		if plain, err = s.open(plain[:0], r.body); err != nil {
			return fmt.Errorf("%w: %s: entry %d was not written by this log", ErrDamaged, segmentName(n), number)
		}
		e, tag, err := parseEntry(plain)
		if err != nil {
			return fmt.Errorf("%w: %s: entry %d: %w", ErrDamaged, segmentName(n), number, err)
		}
		e.Number = number
		if !f(&e, tag) {
			return nil
		}
	}
}

func firstNumber(dir string, n uint32) (uint64, error) {
	file, err := os.Open(filepath.Join(dir, segmentName(n)))
	if err != nil {
		return 0, err
	}
	defer file.Close()
	r, err := newSegmentReader(file)
	if err != nil {
		return 0, fmt.Errorf("%w: %s: %w", ErrDamaged, segmentName(n), err)
	}
	return r.header.first, nil
}

// lastTag returns the last outbox tag other than 0 in the log, or 0.
func lastTag(dir string, private hpke.PrivateKey) (last uint64, err error) {
	segments, err := listSegments(dir)
	if err != nil {
		return 0, err
	}
	for _, n := range slices.Backward(segments) {
		err := readSegment(dir, n, private, func(_ *Entry, tag uint64) bool {
			if tag != 0 {
				last = tag
			}
			return true
		})
		// A damaged segment must not keep the daemon from starting: Verify names the damage, and the worst that comes of
		// it here is an act recorded twice.
		if err != nil && !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrKey) {
			return 0, err
		}
		if last != 0 {
			return last, nil
		}
	}
	return 0, nil
}
