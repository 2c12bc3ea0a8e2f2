package keystore

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
)

// The key table is a B+tree whose leaves hold the data keys of all records. Each node is one value in the database; each reference
// to a node carries the SHA-256 digest of that value, and the digest of the root is in the head, under a MAC. So whatever is done to
// a node, or to a record, shows when it is loaded.

const (
	maxEntries  = 64 // in a leaf
	splitBeyond = 32 // entries; a leaf then fits a page of the database, and reading one entry opens half as much
	maxChildren = 64
	maxLevel    = 12
	entrySize   = 28 + 8 + 4 + keySize
	childSize   = 28 + 8 + sha256.Size
	nodeHeader  = 12

	nodeLeaf     = 1
	nodeInterior = 2
)

// Flags of an entry.
const (
	entryDestroyed = 1 << 0 // a tombstone; the data key is gone
	entryBound     = 1 << 1 // the material's key also depends on the namespace wrapping key
	entryWrapped   = 1 << 2 // of a module key: a device guards the namespace wrapping key
	entryDocument  = 1 << 3 // of a document, not a key
	entryForeign   = 1 << 4 // of a version whose private half is somebody else's; there is no data key
	entryKnown     = entryDestroyed | entryBound | entryWrapped | entryDocument | entryForeign
)

// entry says which revision of a record is the right one, and what opens it.
type entry struct {
	key      recordKey
	revision uint64
	flags    uint32
	dek      [keySize]byte
}

type digest [sha256.Size]byte

// nodeRef names a node and what its bytes must hash to.
type nodeRef struct {
	id     uint64
	digest digest
}

// child is an interior node's reference to the node whose records begin with first.
type child struct {
	first recordKey
	nodeRef
}

// node is one node of the key table. A leaf (level 0) has entries, the others have children.
//
// Invariant: a node that anyone but its maker can see is never modified.
type node struct {
	id       uint64
	level    uint8
	epoch    uint32 // of a leaf: the epoch key it is sealed under
	entries  []entry
	children []child
}

// wipe clears the data keys.
func (n *node) wipe() {
	for i := range n.entries {
		clear(n.entries[i].dek[:])
	}
}

// search returns the position of key among the entries and whether it is there.
func (n *node) search(key recordKey) (int, bool) {
	return slices.BinarySearchFunc(n.entries, key, func(e entry, k recordKey) int { return bytes.Compare(e.key[:], k[:]) })
}

// childFor returns the position of the child whose range holds key.
func (n *node) childFor(key recordKey) int {
	i, ok := slices.BinarySearchFunc(n.children, key, func(c child, k recordKey) int { return bytes.Compare(c.first[:], k[:]) })
	if !ok && i > 0 {
		i--
	}
	return i
}

func nodeID(id uint64) []byte { return binary.BigEndian.AppendUint64(nil, id) }

func nodeAAD(store [16]byte, id uint64, head []byte) []byte {
	aad := make([]byte, 0, len(head)+len(store)+8)
	aad = append(aad, head...)
	aad = append(aad, store[:]...)
	return binary.BigEndian.AppendUint64(aad, id)
}

// encodeLeaf seals the entries under the epoch key.
func encodeLeaf(store [16]byte, n *node, epochKey []byte) []byte {
	e := &encoder{b: make([]byte, 0, nodeHeader+sealOverhead+len(n.entries)*entrySize)}
	n.encodeHeader(e, nodeLeaf, len(n.entries))
	plain := make([]byte, 0, len(n.entries)*entrySize)
	for i := range n.entries {
		x := &n.entries[i]
		plain = append(plain, x.key[:]...)
		plain = binary.BigEndian.AppendUint64(plain, x.revision)
		plain = binary.BigEndian.AppendUint32(plain, x.flags)
		plain = append(plain, x.dek[:]...)
	}
	defer clear(plain)
	return newGCM(epochKey).Seal(e.b, nil, plain, nodeAAD(store, n.id, e.b))
}

func encodeInterior(n *node) []byte {
	e := &encoder{b: make([]byte, 0, nodeHeader+len(n.children)*childSize)}
	n.encodeHeader(e, nodeInterior, len(n.children))
	for i := range n.children {
		c := &n.children[i]
		e.raw(c.first[:])
		e.u64(c.id)
		e.raw(c.digest[:])
	}
	return e.b
}

func (n *node) encodeHeader(e *encoder, kind uint8, count int) {
	e.u8(Format)
	e.u8(kind)
	e.u16(suite)
	e.u8(n.level)
	e.u8(0)
	e.u16(uint16(count))
	e.u32(n.epoch)
}

var errNode = errors.New("key table node is malformed")

// decodeNodeHeader parses the part of a node that is in the clear.
func decodeNodeHeader(b []byte, level uint8) (epoch uint32, count int, rest []byte, err error) {
	d := &decoder{b: b}
	format, kind, s, l := d.u8(), d.u8(), d.u16(), d.u8()
	d.u8()
	count = int(d.u16())
	epoch = d.u32()
	if d.err != nil {
		return 0, 0, nil, fmt.Errorf("%w: %w", ErrDamaged, errNode)
	}
	if format > Format || s != suite {
		return 0, 0, nil, fmt.Errorf("%w: key table format %d, suite %d", ErrNewer, format, s)
	}
	want := uint8(nodeInterior)
	if level == 0 {
		want = nodeLeaf
	}
	if format != Format || kind != want || l != level {
		return 0, 0, nil, fmt.Errorf("%w: %w", ErrDamaged, errNode)
	}
	return epoch, count, d.b, nil
}

// openLeaf appends the plaintext of a leaf, count entries of entrySize bytes, to dst. The caller wipes it.
func openLeaf(dst []byte, store [16]byte, id uint64, blob, epochKey []byte) (plain []byte, err error) {
	_, count, sealed, err := decodeNodeHeader(blob, 0)
	if err != nil {
		return nil, err
	}
	if count < 1 || count > maxEntries || len(sealed) != count*entrySize+sealOverhead {
		return nil, fmt.Errorf("%w: %w", ErrDamaged, errNode)
	}
	plain, err = newGCM(epochKey).Open(dst, nil, sealed, nodeAAD(store, id, blob[:nodeHeader]))
	if err != nil {
		return nil, fmt.Errorf("%w: a key table leaf does not authenticate", ErrDamaged)
	}
	return plain, nil
}

func decodeEntry(b []byte) (x entry) {
	copy(x.key[:], b)
	x.revision = binary.BigEndian.Uint64(b[28:])
	x.flags = binary.BigEndian.Uint32(b[36:])
	copy(x.dek[:], b[40:])
	return x
}

// decodeEntries parses a leaf's plaintext.
func decodeEntries(plain []byte) ([]entry, error) {
	list := make([]entry, 0, maxEntries+1)
	for ; len(plain) >= entrySize; plain = plain[entrySize:] {
		x := decodeEntry(plain)
		if len(list) > 0 && bytes.Compare(list[len(list)-1].key[:], x.key[:]) >= 0 {
			return nil, fmt.Errorf("%w: %w", ErrDamaged, errNode)
		}
		list = append(list, x)
	}
	if len(plain) != 0 {
		return nil, fmt.Errorf("%w: %w", ErrDamaged, errNode)
	}
	return list, nil
}

// findEntry looks key up in a leaf's plaintext without decoding the rest.
func findEntry(plain []byte, key recordKey) (entry, bool) {
	lo, hi := 0, len(plain)/entrySize
	for lo < hi {
		mid := (lo + hi) / 2
		if bytes.Compare(plain[mid*entrySize:mid*entrySize+len(key)], key[:]) < 0 {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	if at := lo * entrySize; at < len(plain) && bytes.Equal(plain[at:at+len(key)], key[:]) {
		return decodeEntry(plain[at:]), true
	}
	return entry{}, false
}

// decodeInterior parses an interior node.
func decodeInterior(id uint64, level uint8, blob []byte) (*node, error) {
	_, count, rest, err := decodeNodeHeader(blob, level)
	if err != nil {
		return nil, err
	}
	if count < 1 || count > maxChildren || len(rest) != count*childSize {
		return nil, fmt.Errorf("%w: %w", ErrDamaged, errNode)
	}
	n := &node{id: id, level: level, children: make([]child, count)}
	d := &decoder{b: rest}
	for i := range n.children {
		c := &n.children[i]
		d.fixed(c.first[:])
		c.id = d.u64()
		d.fixed(c.digest[:])
		if i > 0 && bytes.Compare(n.children[i-1].first[:], c.first[:]) >= 0 {
			return nil, fmt.Errorf("%w: %w", ErrDamaged, errNode)
		}
	}
	return n, nil
}
