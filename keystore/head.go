package keystore

import (
	"fmt"
)

// head is the one value in the database that changes with every commit: the root of the key table, and the counters.
//
// Invariant: the head is written in the transaction that makes it true, under a MAC from the current epoch's key.
type head struct {
	sequence   uint64 // of commits
	epoch      uint32 // whose key the MAC is made with
	generation uint64 // of the header this database belongs to

	root      nodeRef // id 0 when there are no records
	level     uint8   // of the root
	nextNode  uint64
	entries   uint64 // records in the table
	keys      uint64 // metadata records in the table
	documents uint64
	seals     uint64 // leaves sealed under the current epoch key

	// Destroyed versions and deleted documents whose data key may still be found in freed pages: since the current epoch began, and before it.
	pending, pendingOld uint64
	erased              uint64 // sequence of the last commit that destroyed a version

	rotating bool      // leaves of the previous epoch remain
	cursor   recordKey // where the rotation goes on
	rotated  uint64    // entries re-sealed so far

	outboxNext, outboxAcked uint64 // entries acked+1 .. next-1 are in the outbox

	guarded, unescrowed uint64 // namespaces that devices guard, and those of them without escrow

	extensions []extension
}

func (h *head) encode(store [16]byte, epochKey []byte) []byte {
	e := &encoder{b: make([]byte, 0, 256)}
	e.u16(Format)
	e.u16(suite)
	e.u64(h.sequence)
	e.u32(h.epoch)
	e.u64(h.generation)
	e.u64(h.root.id)
	e.raw(h.root.digest[:])
	e.u8(h.level)
	e.u64(h.nextNode)
	e.u64(h.entries)
	e.u64(h.keys)
	e.u64(h.documents)
	e.u64(h.seals)
	e.u64(h.pending)
	e.u64(h.pendingOld)
	e.u64(h.erased)
	e.flag(h.rotating)
	e.raw(h.cursor[:])
	e.u64(h.rotated)
	e.u64(h.outboxNext)
	e.u64(h.outboxAcked)
	e.u64(h.guarded)
	e.u64(h.unescrowed)
	e.extensions(h.extensions)
	tag := headMAC(store, epochKey, e.b)
	e.raw(tag[:])
	return e.b
}

func headMAC(store [16]byte, epochKey, content []byte) [32]byte {
	var key [keySize]byte
	derive(key[:], epochKey, "kmsd head v1")
	defer clear(key[:])
	return mac(key[:], store[:], content)
}

// decodeHead parses the head. The caller looks up the key of head.epoch and then calls verifyHead.
func decodeHead(b []byte) (*head, error) {
	if len(b) < 32 || len(b) > 4096 {
		return nil, fmt.Errorf("%w: the head has %d bytes", ErrDamaged, len(b))
	}
	d := &decoder{b: b[:len(b)-32]}
	h := &head{}
	if f, s := d.u16(), d.u16(); d.err == nil && (f != Format || s != suite) {
		return nil, fmt.Errorf("%w: head of format %d, suite %d", ErrNewer, f, s)
	}
	h.sequence = d.u64()
	h.epoch = d.u32()
	h.generation = d.u64()
	h.root.id = d.u64()
	d.fixed(h.root.digest[:])
	h.level = d.u8()
	h.nextNode = d.u64()
	h.entries = d.u64()
	h.keys = d.u64()
	h.documents = d.u64()
	h.seals = d.u64()
	h.pending = d.u64()
	h.pendingOld = d.u64()
	h.erased = d.u64()
	h.rotating = d.flag()
	d.fixed(h.cursor[:])
	h.rotated = d.u64()
	h.outboxNext = d.u64()
	h.outboxAcked = d.u64()
	h.guarded = d.u64()
	h.unescrowed = d.u64()
	h.extensions = d.extensions()
	if h.level > maxLevel || h.outboxAcked >= h.outboxNext {
		d.fail(errShort)
	}
	if err := d.end(); err != nil {
		return nil, fmt.Errorf("%w: head: %w", ErrDamaged, err)
	}
	return h, nil
}

func verifyHead(b []byte, store [16]byte, epochKey []byte) error {
	end := len(b) - 32
	want := headMAC(store, epochKey, b[:end])
	if !sameMAC(want[:], b[end:]) {
		return fmt.Errorf("%w: the head does not authenticate", ErrDamaged)
	}
	return nil
}
