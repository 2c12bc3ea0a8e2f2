package keystore

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"

	"github.com/kmsd-project/kmsd/keystore/secmem"
)

// Slots lists the ways to open the store, locked or not.
func (s *Store) Slots() []Slot {
	h := s.header.Load()
	list := make([]Slot, len(h.slots))
	for i := range h.slots {
		list[i] = h.slots[i].Slot
		list[i].Blob = slices.Clone(h.slots[i].Blob)
	}
	return list
}

// AddSlot adds a slot. The caller has made sure that the device gives the secret back.
func (s *Store) AddSlot(ctx context.Context, n NewSlot) (Slot, error) {
	if err := ctx.Err(); err != nil {
		return Slot{}, err
	}
	var added Slot
	err := s.alter(ctx, func(h *header, k *secrets) error {
		record, err := h.addSlot(n, k, s.config.now())
		if err == nil {
			added = record.Slot
		}
		return err
	})
	if err != nil {
		return Slot{}, err
	}
	added.Blob = slices.Clone(added.Blob)
	return added, nil
}

// RemoveSlot removes a slot, gives the store a new root key and begins a new epoch, so that what the slot's secret opens in a copy
// of the old files opens nothing that is written from now on. RotateEpoch finishes the epoch. It returns ErrNoSlot or ErrLastSlot.
func (s *Store) RemoveSlot(ctx context.Context, id uint32) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return s.alter(ctx, func(h *header, k *secrets) error {
		if h.slot(id) == nil {
			return fmt.Errorf("%w: %d", ErrNoSlot, id)
		}
		if len(h.slots) == 1 {
			return ErrLastSlot
		}
		h.slots = slices.DeleteFunc(h.slots, func(r slotRecord) bool { return r.ID == id })
		if len(h.epochs) == 1 {
			if err := s.addEpoch(h, k); err != nil {
				return err
			}
		}
		return s.newRoot(h, k)
	})
}

// RotateRoot gives the store a new root key. It is sealed to the public keys of the slots, so no device is needed. The change is the
// replacement of one file: it happens or it does not.
func (s *Store) RotateRoot(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return s.alter(ctx, s.newRoot)
}

// newRoot makes a new root key, seals it to every slot and wraps the other keys under it.
func (s *Store) newRoot(h *header, k *secrets) error {
	root, err := randomBuffer(s.config.Arena)
	if err != nil {
		return err
	}
	k.root = root
	for i := range h.slots {
		if err := h.sealRoot(&h.slots[i], root.Bytes()); err != nil {
			return err
		}
	}
	h.wrapAll(k)
	return nil
}

// addEpoch makes a new epoch key, which becomes the current one.
func (s *Store) addEpoch(h *header, k *secrets) error {
	key, err := randomBuffer(s.config.Arena)
	if err != nil {
		return err
	}
	k.epochs = slices.Insert(k.epochs, 0, epochSecret{k.currentEpoch().number + 1, key})
	h.wrapAll(k)
	return nil
}

// wrapAll wraps the keys under the root key.
func (h *header) wrapAll(k *secrets) {
	root := k.root.Bytes()
	h.lifetime = h.wrap(root, k.lifetime.Bytes(), "lifetime", 0)
	h.epochs = nil
	for _, e := range k.epochs {
		h.epochs = append(h.epochs, wrappedEpoch{e.number, h.wrap(root, e.key.Bytes(), "epoch", e.number)})
	}
}

// alter changes the header in a way that an older copy of the files must not undo.
func (s *Store) alter(ctx context.Context, change func(*header, *secrets) error) error {
	err := s.submit(&job{run: func() error { return s.changeHeader(change) }})
	if err == nil {
		s.cover(ctx)
	}
	return err
}

// changeHeader replaces the header by a changed copy of the next generation, then the secrets by those that belong to it, and lets
// the database follow. It runs on the writer goroutine.
func (s *Store) changeHeader(change func(*header, *secrets) error) error {
	h, k, err := s.writeChanged(change)
	if err != nil {
		return err
	}
	s.mu.Lock()
	if s.secrets != nil {
		s.secrets.freeExcept(k)
		s.secrets = k
		s.cache = newNodeCache()
	} else { // locked meanwhile; what k shares with the former secrets is freed already
		k.free()
	}
	s.header.Store(h)
	s.mu.Unlock()

	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.secrets == nil {
		return nil // the next unlock settles it
	}
	return s.settleGeneration()
}

func (s *Store) writeChanged(change func(*header, *secrets) error) (*header, *secrets, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.secrets == nil {
		return nil, nil, ErrLocked
	}
	if s.broken != nil {
		return nil, nil, s.broken
	}
	h, k := s.header.Load().clone(), s.secrets.clone()
	var err error
	secmem.Do(func() { err = change(h, k) })
	if err == nil {
		err = s.markDirty()
	}
	if err == nil {
		if !h.pending {
			h.generation++
			h.pending = true
		}
		err = replaceFile(filepath.Join(s.config.Dir, headerFile), h.encode(k.root.Bytes()))
	}
	if err != nil {
		k.freeExcept(s.secrets)
		return nil, nil, err
	}
	return h, k, nil
}

func (k *secrets) clone() *secrets {
	c := *k
	c.epochs = slices.Clone(k.epochs)
	return &c
}

// buffers lists everything that has to be freed.
func (k *secrets) buffers() []*secmem.Buffer {
	list := []*secmem.Buffer{k.root, k.lifetime, k.index, k.alias, k.outbox}
	for _, e := range k.epochs {
		list = append(list, e.key)
	}
	return list
}

// freeExcept frees what other does not use.
func (k *secrets) freeExcept(other *secrets) {
	keep := other.buffers()
	for _, b := range k.buffers() {
		if !slices.Contains(keep, b) {
			b.Free()
		}
	}
}
