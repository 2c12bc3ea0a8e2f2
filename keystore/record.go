package keystore

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// recordID is the place of a key: HMAC(index, namespace)[:8] || HMAC(index, namespace, name)[:16]. The keys of a namespace are one
// contiguous range, in an order that has nothing to do with their names or their age.
type recordID [24]byte

// recordKey is a recordID and a version. Version 0 is the key's metadata, or a document.
type recordKey [28]byte

func (id recordID) at(v keyspec.Version) (k recordKey) {
	copy(k[:], id[:])
	binary.BigEndian.PutUint32(k[24:], uint32(v))
	return k
}

func (k recordKey) id() (id recordID)        { copy(id[:], k[:]); return id }
func (k recordKey) version() keyspec.Version { return keyspec.Version(binary.BigEndian.Uint32(k[24:])) }

// namespaceID is what the ids of all keys of a namespace begin with.
func namespaceID(index []byte, namespace string) (id [8]byte) {
	m := mac(index, []byte("namespace\x00"), []byte(namespace))
	copy(id[:], m[:])
	return id
}

func makeRecordID(index []byte, n keyspec.Name) recordID {
	namespace := n.Namespace()
	return recordIDIn(index, namespaceID(index, namespace), namespace, n)
}

// recordIDIn is makeRecordID where the namespace's id is known.
func recordIDIn(index []byte, prefix [8]byte, namespace string, n keyspec.Name) (id recordID) {
	copy(id[:], prefix[:])
	m := mac(index, []byte("name\x00"), []byte(namespace), []byte{0}, []byte(n))
	copy(id[8:], m[:])
	return id
}

// recordID is makeRecordID for callers that hold s.mu. Half of its work is the namespace, of which there are few.
func (s *Store) recordID(n keyspec.Name) recordID {
	namespace := n.Namespace()
	return recordIDIn(s.secrets.index.Bytes(), s.namespaceID(namespace), namespace, n)
}

func (s *Store) namespaceID(namespace string) [8]byte {
	id, ok := s.cache.getNamespace(namespace)
	if !ok {
		id = namespaceID(s.secrets.index.Bytes(), namespace)
		s.cache.putNamespace(namespace, id)
	}
	return id
}

// kind says what a record holds. It is part of what the record's authentication covers.
type kind uint8

const (
	kindMetadata  kind = 1 // the encoded Key
	kindMaterial  kind = 2 // private material of one version
	kindPublic    kind = 3 // SubjectPublicKeyInfo and chain of one version
	kindNamespace kind = 4 // the namespace wrapping key, version 0 of a module key
	kindOutbox    kind = 5 // an audit entry on its way to the log
	kindDocument  kind = 6 // a document
)

// smallRecord is the one size, in bytes, of the records of all private keys that are software, whatever their algorithm.
const smallRecord = 640

// size is what a record of this kind with a payload of n bytes is padded to, so that its size tells next to nothing about what is
// in it. Material that does not fit a small record is what a device gave out for a key that stays in it.
func (k kind) size(n int) int {
	n += recordOverhead
	step := 512
	switch {
	case k == kindMetadata || k == kindOutbox:
	case (k == kindMaterial || k == kindNamespace) && n <= smallRecord:
		return smallRecord
	default:
		step = 1024
	}
	return (n + step - 1) / step * step
}

const (
	recordHeader   = 24
	recordOverhead = recordHeader + sealOverhead + 4
	maxRecord      = 1 << 20
)

// recordContext is everything besides the key that a record is bound to.
type recordContext struct {
	store      [16]byte
	kind       kind
	key        recordKey
	revision   uint64
	generation uint64 // of the header when the record was written; for information
}

// A record is a header of format, kind, suite, flags, size of the extensions, generation and revision; the extensions; a nonce; and the
// AES-256-GCM ciphertext of length, payload and zero padding. Header, extensions, store id and record key are the additional data.

func (c *recordContext) aad(head []byte) []byte {
	aad := make([]byte, 0, len(head)+len(c.store)+len(c.key))
	aad = append(aad, head...)
	aad = append(aad, c.store[:]...)
	return append(aad, c.key[:]...)
}

// sealRecord encrypts payload under the record's own data key.
func sealRecord(dek []byte, c recordContext, payload []byte) []byte {
	total := c.kind.size(len(payload))
	e := &encoder{b: make([]byte, 0, total)}
	e.u8(Format)
	e.u8(uint8(c.kind))
	e.u16(suite)
	e.u16(0) // flags
	e.u16(0) // size of extensions
	e.u64(c.generation)
	e.u64(c.revision)
	plain := make([]byte, total-recordHeader-sealOverhead)
	defer clear(plain)
	binary.BigEndian.PutUint32(plain, uint32(len(payload)))
	copy(plain[4:], payload)
	return newGCM(dek).Seal(e.b, nil, plain, c.aad(e.b))
}

// openRecord decrypts a record. It fails unless the record was written for exactly this context; the generation is not compared.
func openRecord(dek []byte, c recordContext, blob []byte) ([]byte, error) {
	head, sealed, err := splitRevision(blob, c.kind, c.revision)
	if err != nil {
		return nil, err
	}
	plain, err := newGCM(dek).Open(nil, nil, sealed, c.aad(head))
	if err != nil {
		return nil, fmt.Errorf("%w: a record does not authenticate", ErrDamaged)
	}
	n := binary.BigEndian.Uint32(plain)
	if uint64(n) > uint64(len(plain)-4) {
		return nil, fmt.Errorf("%w: record: %w", ErrDamaged, errShort)
	}
	return plain[4 : 4+n], nil
}

// splitRevision is splitRecord for a record of this revision.
func splitRevision(blob []byte, want kind, revision uint64) (head, sealed []byte, err error) {
	head, sealed, err = splitRecord(blob, want)
	if err == nil && binary.BigEndian.Uint64(head[16:]) != revision {
		err = fmt.Errorf("%w: a record is not of the revision that the key table names", ErrDamaged)
	}
	return head, sealed, err
}

// splitRecord parses what of a record is in the clear: its header with extensions, and the sealed rest.
func splitRecord(blob []byte, want kind) (head, sealed []byte, err error) {
	d := &decoder{b: blob}
	if len(blob) > maxRecord {
		d.fail(errShort)
	}
	format, k, s, flags, size := d.u8(), kind(d.u8()), d.u16(), d.u16(), int(d.u16())
	switch {
	case d.err != nil:
	case format > Format || s != suite || flags != 0:
		return nil, nil, fmt.Errorf("%w: record of format %d, suite %d, flags %x", ErrNewer, format, s, flags)
	case format != Format || k != want:
		d.fail(errors.New("is not of the kind it should be"))
	}
	d.take(16)
	x := &decoder{b: d.take(size)}
	for x.err == nil && len(x.b) > 0 {
		if t := x.u16(); t&criticalExtension != 0 {
			return nil, nil, fmt.Errorf("%w: record with extension %d", ErrNewer, t)
		}
		x.bytes16()
	}
	if err := x.end(); err != nil {
		d.fail(err)
	}
	if d.err == nil && len(d.b) < sealOverhead+4 {
		d.fail(errShort)
	}
	if d.err != nil {
		return nil, nil, fmt.Errorf("%w: record %w", ErrDamaged, d.err)
	}
	n := recordHeader + size
	return blob[:n:n], blob[n:], nil
}
