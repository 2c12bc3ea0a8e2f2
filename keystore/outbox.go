package keystore

import (
	"encoding/binary"
	"fmt"
)

// The outbox holds audit entries that were committed with a change until they are in the log. Its entries are numbered without gaps
// and the head knows the first and the last, so none can be taken away unnoticed.

func outboxContext(store [16]byte, seq uint64) recordContext {
	c := recordContext{store: store, kind: kindOutbox, revision: seq}
	binary.BigEndian.PutUint64(c.key[:], seq)
	return c
}

func (s *Store) sealOutbox(seq uint64, data []byte) []byte {
	return sealRecord(s.secrets.outbox.Bytes(), outboxContext(s.storeID, seq), data)
}

// Outbox returns the oldest entries that were not acknowledged, at most limit of them, in the order in which they were committed.
func (s *Store) Outbox(limit int) ([]OutboxEntry, error) {
	var list []OutboxEntry
	err := s.read(func(h *head) error {
		list = nil
		for seq := max(h.outboxAcked, min(s.acked.Load(), h.outboxNext-1)) + 1; seq < h.outboxNext && len(list) < limit; seq++ {
			b, err := s.fetch(bucketOutbox, binary.BigEndian.AppendUint64(nil, seq))
			if err == nil && b == nil {
				err = fmt.Errorf("%w: an outbox entry is missing", ErrDamaged)
			}
			if err != nil {
				return err
			}
			data, err := openRecord(s.secrets.outbox.Bytes(), outboxContext(s.storeID, seq), b)
			if err != nil {
				return err
			}
			list = append(list, OutboxEntry{seq, data})
		}
		return nil
	})
	return list, err
}

// AckOutbox says that the entries up to and including this one are in the log. They are removed together with the next commit, or
// when the store is closed; until that is durable a crash makes Outbox return them again.
func (s *Store) AckOutbox(through uint64) error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	h := s.snapshot.Load()
	if h == nil {
		return ErrLocked
	}
	if through >= h.outboxNext {
		return fmt.Errorf("%w: outbox entry %d does not exist", ErrInvalid, through)
	}
	for {
		old := s.acked.Load()
		if through <= old || s.acked.CompareAndSwap(old, through) {
			return nil
		}
	}
}

// flushOutbox makes acknowledgements durable that no commit came to carry.
func (s *Store) flushOutbox() {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.secrets == nil || s.acked.Load() <= s.snapshot.Load().outboxAcked {
		return
	}
	t := s.begin()
	defer t.edit.wipe()
	if err := t.commit(); err != nil {
		s.config.log().Warn("keystore outbox", "error", err)
	}
}
