package keystore

import (
	"encoding/binary"
	"errors"
	"time"
)

// The store has one codec for everything on disk: big-endian integers of fixed size, and byte strings behind a length of 1, 2 or
// 4 bytes.

var errShort = errors.New("ends too early or has an impossible length")

type encoder struct{ b []byte }

func (e *encoder) u8(v uint8)    { e.b = append(e.b, v) }
func (e *encoder) u16(v uint16)  { e.b = binary.BigEndian.AppendUint16(e.b, v) }
func (e *encoder) u32(v uint32)  { e.b = binary.BigEndian.AppendUint32(e.b, v) }
func (e *encoder) u64(v uint64)  { e.b = binary.BigEndian.AppendUint64(e.b, v) }
func (e *encoder) raw(v []byte)  { e.b = append(e.b, v...) }
func (e *encoder) str8(v string) { e.u8(uint8(len(v))); e.b = append(e.b, v...) }
func (e *encoder) str16(v string) {
	e.u16(uint16(len(v)))
	e.b = append(e.b, v...)
}
func (e *encoder) bytes16(v []byte) { e.u16(uint16(len(v))); e.raw(v) }
func (e *encoder) bytes32(v []byte) { e.u32(uint32(len(v))); e.raw(v) }

func (e *encoder) flag(v bool) {
	if v {
		e.u8(1)
	} else {
		e.u8(0)
	}
}

// time stores whole seconds since 1970, 0 for the zero time.
func (e *encoder) time(t time.Time) {
	if t.IsZero() {
		e.u64(0)
		return
	}
	e.u64(uint64(t.Unix()))
}

// decoder reads what encoder wrote. After the first error every method returns a zero value and err stays set, so a caller may
// decode a whole structure and look at err once.
type decoder struct {
	b   []byte
	err error
}

// take returns the next n bytes without copying them.
func (d *decoder) take(n int) []byte {
	if d.err != nil || n < 0 || n > len(d.b) {
		d.fail(errShort)
		return nil
	}
	v := d.b[:n:n]
	d.b = d.b[n:]
	return v
}

func (d *decoder) fail(err error) {
	if d.err == nil {
		d.err = err
	}
	d.b = nil
}

func (d *decoder) u8() uint8 {
	if b := d.take(1); b != nil {
		return b[0]
	}
	return 0
}

func (d *decoder) u16() uint16 {
	if b := d.take(2); b != nil {
		return binary.BigEndian.Uint16(b)
	}
	return 0
}

func (d *decoder) u32() uint32 {
	if b := d.take(4); b != nil {
		return binary.BigEndian.Uint32(b)
	}
	return 0
}

func (d *decoder) u64() uint64 {
	if b := d.take(8); b != nil {
		return binary.BigEndian.Uint64(b)
	}
	return 0
}

func (d *decoder) flag() bool {
	v := d.u8()
	if v > 1 {
		d.fail(errors.New("a flag is neither 0 nor 1"))
	}
	return v == 1
}

func (d *decoder) str8() string    { return string(d.take(int(d.u8()))) }
func (d *decoder) str16() string   { return string(d.take(int(d.u16()))) }
func (d *decoder) bytes16() []byte { return d.take(int(d.u16())) }

func (d *decoder) bytes32() []byte {
	n := d.u32()
	if uint64(n) > uint64(len(d.b)) {
		d.fail(errShort)
		return nil
	}
	return d.take(int(n))
}

func (d *decoder) time() time.Time {
	v := int64(d.u64())
	if v == 0 {
		return time.Time{}
	}
	return time.Unix(v, 0).UTC()
}

// fixed fills dst from the input.
func (d *decoder) fixed(dst []byte) { copy(dst, d.take(len(dst))) }

// end reports the first error, or that something is left over.
func (d *decoder) end() error {
	if d.err == nil && len(d.b) != 0 {
		d.err = errors.New("has bytes left over")
	}
	return d.err
}

// extension is a part of a structure that this release does not know. Critical ones refuse the structure, the others are kept.
type extension struct {
	kind uint16
	data []byte
}

// criticalExtension marks the kinds of extension that must be understood.
const criticalExtension = 0x8000

func (e *encoder) extensions(list []extension) {
	e.u16(uint16(len(list)))
	for _, x := range list {
		e.u16(x.kind)
		e.bytes16(x.data)
	}
}

func (d *decoder) extensions() []extension {
	n := d.u16()
	var list []extension
	for range n {
		x := extension{kind: d.u16(), data: append([]byte(nil), d.bytes16()...)}
		if d.err != nil {
			return nil
		}
		if x.kind&criticalExtension != 0 {
			d.fail(ErrNewer)
			return nil
		}
		list = append(list, x)
	}
	return list
}
