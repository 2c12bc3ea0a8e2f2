package keystore

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"

	bolt "go.etcd.io/bbolt"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/keystore/secmem"
)

// read runs f on the state of the last commit. A commit may replace records while f reads: what f then takes for damage is read again
// in the newer state. Damage that stays is counted.
func (s *Store) read(f func(h *head) error) error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.readHeld(f)
}

// readHeld is read for callers that hold s.mu.
func (s *Store) readHeld(f func(h *head) error) error {
	for {
		if s.closed {
			return ErrClosed
		}
		if s.secrets == nil {
			return ErrLocked
		}
		h := s.snapshot.Load()
		err := f(h)
		if err == nil || !errors.Is(err, ErrDamaged) {
			return err
		}
		s.commitMu.RLock()
		now := s.snapshot.Load()
		s.commitMu.RUnlock()
		if now == h {
			s.damaged.Add(1)
			return err
		}
	}
}

// metadata loads the metadata of a key and its entry in the table, whose data key the caller wipes.
func (s *Store) metadata(h *head, id recordID) (m *metadata, x entry, err error) {
	x, found, blob, err := s.lookupRecord(h, id.at(0), bucketMeta)
	if err != nil {
		return nil, x, err
	}
	if !found {
		return nil, x, ErrNotFound
	}
	if m, err = s.openMetadata(&x, blob); err != nil {
		clear(x.dek[:])
	}
	return m, x, err
}

// metadataNow is metadata in the newest state, for callers that hold s.mu.
func (s *Store) metadataNow(id recordID) (m *metadata, x entry, err error) {
	err = s.readHeld(func(h *head) error {
		m, x, err = s.metadata(h, id)
		return err
	})
	return m, x, err
}

func (s *Store) openMetadata(x *entry, blob []byte) (*metadata, error) {
	if blob == nil {
		return nil, fmt.Errorf("%w: a record is missing", ErrDamaged)
	}
	payload, err := openRecord(x.dek[:], recordContext{store: s.storeID, kind: kindMetadata, key: x.key, revision: x.revision}, blob)
	if err != nil {
		return nil, err
	}
	m, err := decodeMetadata(payload)
	if err != nil {
		return nil, err
	}
	m.Revision = x.revision
	return m, nil
}

// Get returns the metadata of a key. The caller may modify it.
func (s *Store) Get(name keyspec.Name) (*Key, error) {
	var k *Key
	err := s.read(func(h *head) error {
		m, x, err := s.metadata(h, s.recordID(name))
		clear(x.dek[:])
		if err == nil {
			k = &m.Key
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return k, nil
}

// Material appends the private material of a key version to dst[:0] and returns it. The version must be given. It returns
// ErrNotFound for a version that is destroyed, somebody else's, or does not exist. The caller wipes the result.
func (s *Store) Material(ref keyspec.Ref, dst []byte) ([]byte, error) {
	var out []byte
	err := s.read(func(h *head) (err error) {
		secmem.Do(func() { out, err = s.material(h, ref, dst) })
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", ref, err)
	}
	return out, nil
}

func (s *Store) material(h *head, ref keyspec.Ref, dst []byte) ([]byte, error) {
	if ref.Version == 0 {
		return nil, ErrNotFound
	}
	key := s.recordID(ref.Name).at(ref.Version)
	x, found, blob, err := s.lookupRecord(h, key, bucketMaterial)
	if err != nil {
		return nil, err
	}
	defer clear(x.dek[:])
	if !found || x.flags&(entryDestroyed|entryForeign) != 0 {
		return nil, ErrNotFound
	}
	sealKey, err := s.materialKey(h, &x, ref.Name)
	if err != nil {
		return nil, err
	}
	defer clear(sealKey[:])
	if blob == nil {
		return nil, fmt.Errorf("%w: a record is missing", ErrDamaged)
	}
	payload, err := openRecord(sealKey[:], recordContext{store: s.storeID, kind: kindMaterial, key: key, revision: x.revision}, blob)
	if err != nil {
		return nil, err
	}
	out := append(dst[:0], payload...)
	clear(payload)
	return out, nil
}

// materialKey returns what a version's material is sealed under.
func (s *Store) materialKey(h *head, x *entry, name keyspec.Name) ([keySize]byte, error) {
	if x.flags&^entryKnown != 0 {
		return [keySize]byte{}, fmt.Errorf("%w: entry flags %x", ErrNewer, x.flags)
	}
	if x.flags&entryBound == 0 {
		return x.dek, nil
	}
	wrapping, err := s.wrappingKey(h, name.Namespace())
	if err != nil {
		if errors.Is(err, ErrNotFound) {
			err = fmt.Errorf("%w: the namespace has lost its wrapping key", ErrDamaged)
		}
		return [keySize]byte{}, err
	}
	defer clear(wrapping)
	return bindKey(x.dek, wrapping, x.key), nil
}

// Public returns the public part of a key version; version 0 is the current one.
func (s *Store) Public(ref keyspec.Ref) (Public, error) {
	var p Public
	err := s.read(func(h *head) error {
		id := s.recordID(ref.Name)
		m, x, err := s.metadata(h, id)
		if err != nil {
			return err
		}
		defer clear(x.dek[:])
		number := ref.Version
		if number == 0 {
			number = m.Current
		}
		v := m.version(number)
		if v == nil {
			return ErrNotFound
		}
		p, err = s.public(&x, v)
		return err
	})
	if err != nil {
		return Public{}, fmt.Errorf("%s: %w", ref, err)
	}
	return p, nil
}

func (s *Store) public(x *entry, v *Version) (Public, error) {
	key := x.key.id().at(v.Number)
	blob, err := s.fetch(bucketPublic, key[:])
	if err != nil {
		return Public{}, err
	}
	if blob == nil {
		return Public{}, fmt.Errorf("%w: a record is missing", ErrDamaged)
	}
	payload, err := openRecord(x.dek[:], recordContext{store: s.storeID, kind: kindPublic, key: key, revision: v.public}, blob)
	if err != nil {
		return Public{}, err
	}
	return decodePublic(payload)
}

// Alias finds the key version that goes by the value; of several the one that was written last. It returns ErrNotFound if there is none.
func (s *Store) Alias(kind AliasKind, value []byte) (keyspec.Ref, error) {
	list, err := s.sharing(kind, value, 1)
	if err != nil {
		return keyspec.Ref{}, err
	}
	return list[0], nil
}

// Sharing finds all key versions that go by the value, the one that was written last in front, at most 256. It returns ErrNotFound if there is
// none.
func (s *Store) Sharing(kind AliasKind, value []byte) ([]keyspec.Ref, error) {
	return s.sharing(kind, value, maxSharing)
}

func (s *Store) sharing(kind AliasKind, value []byte, limit int) (list []keyspec.Ref, err error) {
	err = s.read(func(h *head) error {
		key := s.aliasKey(kind, value)
		b, err := s.fetch(bucketAlias, key[:])
		if err != nil {
			return err
		}
		if len(b) == 0 {
			return ErrNotFound
		}
		if len(b)%aliasSize != 0 {
			return fmt.Errorf("%w: alias", ErrDamaged)
		}
		for ; len(b) > 0 && len(list) < limit; b = b[:len(b)-aliasSize] {
			last := b[len(b)-aliasSize:]
			var target recordKey
			copy(target[:], last)
			if want := s.alias(kind, value, target); !sameMAC(want.value, last) {
				return fmt.Errorf("%w: an alias does not authenticate", ErrDamaged)
			}
			m, x, err := s.metadata(h, target.id())
			clear(x.dek[:])
			if err != nil {
				return err
			}
			list = append(list, keyspec.Ref{Name: m.Name, Version: target.version()})
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return list, nil
}

// maxExamined bounds how many records one call of Page decrypts beyond those it returns.
const maxExamined = 4096

// Page returns the keys of a namespace whose names begin with prefix, in an order that has no meaning but does not change, at most
// limit of them. The empty namespace stands for all.
// after is nil for the first page and what the previous call returned for the following ones; a nil cursor in the result says that
// there are no more. A page may be shorter than limit, even empty, and yet not be the last. Keys that cannot be read are left out,
// logged and counted in Info, also when a newer release wrote them.
func (s *Store) Page(namespace, prefix string, after []byte, limit int) ([]*Key, []byte, error) {
	var cursor recordKey
	if after != nil && len(after) != len(cursor) {
		return nil, nil, fmt.Errorf("%w: page cursor", ErrInvalid)
	}
	copy(cursor[:], after)
	if limit <= 0 {
		return nil, nil, fmt.Errorf("%w: page of %d", ErrInvalid, limit)
	}
	var keys []*Key
	var next []byte
	err := s.read(func(h *head) (err error) {
		keys, next, err = s.page(h, namespace, prefix, cursor, limit)
		return err
	})
	if errors.Is(err, ErrDamaged) {
		s.config.log().Warn("a part of the key table cannot be read", "error", err)
		err = nil
	}
	return keys, next, err
}

// page returns a page and, if a part of the table could not be read, the reason as well.
func (s *Store) page(h *head, namespace, prefix string, cursor recordKey, limit int) (keys []*Key, next []byte, damage error) {
	within := s.namespaceID(namespace) // the range of the namespace
	if namespace != "" && bytes.Compare(cursor[:], within[:]) < 0 {
		cursor = recordKey{}
		copy(cursor[:], within[:])
	}
	examined := 0
	s.ascend(h, cursor, func(entries []entry) bool {
		metas := entries[:0:0]
		for i := range entries {
			if entries[i].key.version() == 0 && entries[i].flags&entryDocument == 0 {
				metas = append(metas, entries[i])
			}
		}
		defer (&node{entries: metas}).wipe()
		loaded := s.metadataBatch(h, metas)
		for i, m := range loaded {
			key := metas[i].key
			if namespace != "" && !bytes.HasPrefix(key[:], within[:]) {
				return false
			}
			if len(keys) == limit || examined > maxExamined+limit {
				next = slices.Clone(key[:])
				return false
			}
			examined++
			// Two namespaces may share a range, so the name decides.
			if m != nil && (namespace == "" || m.Name.Namespace() == namespace) && strings.HasPrefix(string(m.Name), prefix) {
				keys = append(keys, &m.Key)
			}
		}
		return true
	}, func(_ recordKey, err error) { damage = err })
	return keys, next, damage
}

// metadataBatch loads the metadata of several keys in one database transaction. What cannot be read is nil in the result.
func (s *Store) metadataBatch(h *head, metas []entry) []*metadata {
	blobs := make([][]byte, len(metas))
	err := guard(func() error {
		return s.db.View(func(tx *bolt.Tx) error {
			b := tx.Bucket(bucketMeta)
			for i := range metas {
				blobs[i] = bytes.Clone(b.Get(metas[i].key[:]))
			}
			return nil
		})
	})
	out := make([]*metadata, len(metas))
	for i := range metas {
		if err == nil {
			if out[i], err = s.openMetadata(&metas[i], blobs[i]); err == nil {
				continue
			}
			err = nil
		}
		// Damaged, or replaced by a commit since h.
		m, x, err := s.metadataNow(metas[i].key.id())
		clear(x.dek[:])
		if err != nil {
			if !errors.Is(err, ErrDamaged) { // that is counted already
				s.damaged.Add(1)
			}
			s.config.log().Warn("a key cannot be read", "error", err)
			continue
		}
		out[i] = m
	}
	return out
}
