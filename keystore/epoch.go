package keystore

import (
	"context"
	"errors"
	"slices"
)

// resealLeaves is how many leaves of the key table one transaction of a rotation writes: about 200 KiB.
const resealLeaves = 128

// RotateEpoch seals the key table under a new epoch key and then forgets the old one. That erases: what was destroyed before has its
// data key only in old pages, sealed under a key that no longer exists. A rotation that was interrupted goes on where it was; if
// versions were destroyed while it ran, another one follows. Other commits proceed between its steps. p may be nil.
func (s *Store) RotateEpoch(ctx context.Context, p *Progress) error {
	if p == nil {
		p = &Progress{}
	}
	again := false
	err := s.submit(&job{run: func() error {
		if len(s.header.Load().epochs) > 1 {
			again = true
			return nil
		}
		return s.changeHeader(s.addEpoch)
	}})
	for err == nil {
		if err = s.finishEpoch(ctx, p); err != nil || !again {
			return err
		}
		h := s.snapshot.Load()
		if h == nil {
			return ErrLocked
		}
		if h.pending == 0 {
			return nil
		}
		again = false
		err = s.submit(&job{run: func() error { return s.changeHeader(s.addEpoch) }})
	}
	return err
}

// finishEpoch seals the remaining leaves again and drops the previous epoch key.
func (s *Store) finishEpoch(ctx context.Context, p *Progress) error {
	for rotating := true; rotating; {
		if err := ctx.Err(); err != nil {
			return err
		}
		err := s.exclusively(func() error {
			if err := s.resealSome(); err != nil {
				return err
			}
			h := s.snapshot.Load()
			rotating = h.rotating
			p.Total.Store(h.entries)
			p.Done.Store(h.rotated)
			return nil
		})
		if err != nil {
			return err
		}
	}
	return s.alter(ctx, func(h *header, k *secrets) error {
		k.epochs = slices.Clip(k.epochs[:1])
		h.epochs = h.epochs[:1]
		return nil
	})
}

// resealSome writes some leaves again, under the current epoch key, and moves the cursor. It runs on the writer goroutine.
func (s *Store) resealSome() error {
	t := s.begin()
	defer t.edit.wipe()
	h := &t.edit.head
	if !h.rotating {
		return nil
	}
	var stale []recordKey
	var entries uint64
	var next *recordKey
	var failed error
	broken := func(at recordKey, err error) {
		if !errors.Is(err, ErrDamaged) {
			failed = err
		}
		// What is damaged stays as it is: Verify names it, a backup has it.
		s.config.log().Warn("a part of the key table cannot be read", "error", err)
	}
	s.leaves(h, h.cursor, func(c child) bool {
		if len(stale) == resealLeaves {
			next = &c.first
			return false
		}
		blob, err := s.leaf(c.nodeRef)
		if err == nil {
			var epoch uint32
			var count int
			if epoch, count, _, err = decodeNodeHeader(blob, 0); err == nil {
				entries += uint64(count)
				if epoch != s.secrets.currentEpoch().number {
					stale = append(stale, c.first)
				}
			}
		}
		if err != nil {
			broken(c.first, err)
		}
		return true
	}, broken)
	if failed != nil {
		return failed
	}
	for _, key := range stale {
		if err := t.edit.touch(key); err != nil && !errors.Is(err, ErrDamaged) {
			return err
		}
	}
	h.rotated += entries
	if next != nil {
		h.cursor = *next
	} else {
		h.rotating, h.cursor = false, recordKey{}
		h.pendingOld = 0
	}
	return t.commit()
}
