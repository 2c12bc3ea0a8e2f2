package proto

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"sync"
	"unicode/utf8"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/vmihailenco/msgpack/v5"
	"github.com/vmihailenco/msgpack/v5/msgpcode"
)

// Errors of the codec. They are wrapped with what was wrong, never with the bytes that were.
var (
	ErrMalformed = errors.New("malformed message")
	ErrTooLarge  = errors.New("message too large")
)

// A Message is the params or the result of an operation: a pointer to one of the structs of this package.
//
// Its one method names every field once, with its bound, and serves both directions, so that what is written and what
// is read cannot drift apart.
type Message interface{ fields(f *fields) }

// maxKey bounds the length of a map key in bytes, maxDepth the nesting of a value that is skipped.
const (
	maxKey   = 64
	maxDepth = 8
)

// fields is the visitor that a Message describes itself to. Depending on its direction it appends each field that is
// not zero to a buffer, or takes the value under the key at hand into the field of that name.
//
// Invariant: decoding allocates nothing before it has compared the announced length with the bound of the field and
// with the bytes that are left. msgpack's own containers do not (vmihailenco/msgpack issue 401), which is why only
// the primitives of that library are called here, and none of them for a value longer than 8 bytes.
type fields struct {
	encode  bool
	lenient bool // skip keys that are not known
	err     error

	// encoding
	out     appender
	encoder *msgpack.Encoder
	written int   // fields of the map at hand
	hole    *Hole // where the bytes of a long field go that are not copied, or nil

	// decoding
	data    []byte
	at      int          // of the next byte in data
	reader  bytes.Reader // what decoder reads from
	decoder *msgpack.Decoder
	key     []byte // key at hand
	index   uint   // number of the field the message is asking about
	seen    uint64 // bit set of the fields that have had a value
	matched bool
	last    string // the string that readString made last
}

// appender is the writer a msgpack.Encoder needs.
type appender struct{ b []byte }

func (a *appender) Write(p []byte) (int, error) { a.b = append(a.b, p...); return len(p), nil }
func (a *appender) WriteByte(c byte) error      { a.b = append(a.b, c); return nil }

var pool = sync.Pool{New: func() any {
	f := new(fields)
	f.encoder = msgpack.NewEncoder(&f.out)
	f.decoder = msgpack.NewDecoder(&f.reader)
	return f
}}

func newEncoder(dst []byte) *fields {
	f := pool.Get().(*fields)
	f.encode, f.out.b = true, dst
	return f
}

func newDecoder(data []byte, lenient bool) *fields {
	f := pool.Get().(*fields)
	f.lenient, f.data = lenient, data
	return f
}

// free returns f to the pool without a reference to the caller's bytes.
func (f *fields) free() {
	f.encode, f.lenient, f.err = false, false, nil
	f.out.b, f.written, f.hole = nil, 0, nil
	f.data, f.at, f.key = nil, 0, nil
	f.reader.Reset(nil)
	pool.Put(f)
}

func (f *fields) fail(format string, args ...any) {
	if f.err == nil {
		f.err = fmt.Errorf("%w: "+format, append([]any{ErrMalformed}, args...)...)
	}
}

// check keeps the first error of the msgpack library, which can only be an early end.
func (f *fields) check(err error) {
	if err != nil && f.err == nil {
		f.err = fmt.Errorf("%w: ends early", ErrMalformed)
	}
}

// Decoding.

// peek returns the code of the next value; 0xc1, which msgpack never uses, at the end.
func (f *fields) peek() byte {
	if f.at == len(f.data) {
		f.fail("ends early")
		return 0xc1
	}
	return f.data[f.at]
}

// left returns how many bytes have not been read.
func (f *fields) left() int { return len(f.data) - f.at }

// take returns the next n bytes without copying them.
func (f *fields) take(n int) []byte {
	if f.err != nil {
		return nil
	}
	if n < 0 || n > f.left() {
		f.fail("ends early")
		return nil
	}
	b := f.data[f.at : f.at+n : f.at+n]
	f.at += n
	return b
}

// wide has the library read what does not fit the one byte of its code. Everything else, which is most of it, needs no
// library: the value is in the byte.
func wide[T any](f *fields, read func(*msgpack.Decoder) (T, error)) T {
	f.reader.Reset(f.data[f.at:])
	v, err := read(f.decoder)
	f.at = len(f.data) - f.reader.Len()
	f.check(err)
	return v
}

// narrow takes the one byte of a value and returns the bits of it that mask covers.
func (f *fields) narrow(mask byte) int {
	c := f.data[f.at]
	f.at++
	return int(c & mask)
}

func isString(c byte) bool {
	return msgpcode.IsFixedString(c) || c == msgpcode.Str8 || c == msgpcode.Str16 || c == msgpcode.Str32
}

func isBytes(c byte) bool {
	return c == msgpcode.Bin8 || c == msgpcode.Bin16 || c == msgpcode.Bin32
}

func isArray(c byte) bool {
	return msgpcode.IsFixedArray(c) || c == msgpcode.Array16 || c == msgpcode.Array32
}

func isMap(c byte) bool {
	return msgpcode.IsFixedMap(c) || c == msgpcode.Map16 || c == msgpcode.Map32
}

// isSigned reports whether c begins an integer of the signed kind, whose value may still be positive.
func isSigned(c byte) bool {
	return c >= msgpcode.NegFixedNumLow || c == msgpcode.Int8 || c == msgpcode.Int16 || c == msgpcode.Int32 || c == msgpcode.Int64
}

func isUnsigned(c byte) bool {
	return c <= msgpcode.PosFixedNumHigh || c == msgpcode.Uint8 || c == msgpcode.Uint16 || c == msgpcode.Uint32 || c == msgpcode.Uint64
}

// blob reads the string or the byte string that comes next, without copying it.
func (f *fields) blob(is func(byte) bool, what string, most int) []byte {
	if f.err != nil {
		return nil
	}
	c := f.peek()
	if !is(c) {
		f.fail("%s expected, code 0x%02x found", what, c)
		return nil
	}
	n := f.bytesLen(c)
	if f.err == nil && n > most {
		f.err = fmt.Errorf("%w: %s of %d bytes, at most %d", ErrTooLarge, what, n, most)
	}
	return f.take(n)
}

// bytesLen reads the length of the string or the byte string whose code is c.
func (f *fields) bytesLen(c byte) int {
	if msgpcode.IsFixedString(c) {
		return f.narrow(msgpcode.FixedStrMask)
	}
	return wide(f, (*msgpack.Decoder).DecodeBytesLen)
}

// count reads the length of the array or map that comes next.
func (f *fields) count(is func(byte) bool, length func(*msgpack.Decoder) (int, error), what string, most int) int {
	if f.err != nil {
		return 0
	}
	c := f.peek()
	if !is(c) {
		f.fail("%s expected, code 0x%02x found", what, c)
		return 0
	}
	var n int
	if msgpcode.IsFixedArray(c) || msgpcode.IsFixedMap(c) {
		n = f.narrow(msgpcode.FixedMapMask) // that of an array is the same
	} else {
		n = wide(f, length)
	}
	switch {
	case f.err != nil:
		return 0
	case n < 0 || n > most:
		f.err = fmt.Errorf("%w: %s of %d elements, at most %d", ErrTooLarge, what, n, most)
		return 0
	case n > f.left(): // every element takes a byte at least
		f.fail("%s of %d elements ends early", what, n)
		return 0
	}
	return n
}

func (f *fields) arrayLen(most int) int {
	return f.count(isArray, (*msgpack.Decoder).DecodeArrayLen, "array", most)
}

func (f *fields) mapLen(most int) int {
	return f.count(isMap, (*msgpack.Decoder).DecodeMapLen, "map", most)
}

func (f *fields) readUint(most uint64) uint64 {
	if f.err != nil {
		return 0
	}
	var v uint64
	switch c := f.peek(); {
	case isUnsigned(c):
		v = f.unsigned(c)
	case isSigned(c):
		i := wide(f, (*msgpack.Decoder).DecodeInt64)
		if i < 0 {
			f.fail("negative number")
		}
		v = uint64(i)
	default:
		f.fail("number expected, code 0x%02x found", c)
	}
	if f.err == nil && v > most {
		f.fail("number over %d", most)
	}
	return v
}

// unsigned reads the number whose code is c.
func (f *fields) unsigned(c byte) uint64 {
	if c <= msgpcode.PosFixedNumHigh {
		return uint64(f.narrow(c))
	}
	return wide(f, (*msgpack.Decoder).DecodeUint64)
}

func (f *fields) readInt() int64 {
	if f.err != nil {
		return 0
	}
	var v int64
	switch c := f.peek(); {
	case isUnsigned(c):
		u := f.unsigned(c)
		if u > 1<<63-1 {
			f.fail("number over 63 bits")
		}
		v = int64(u)
	case isSigned(c):
		v = wide(f, (*msgpack.Decoder).DecodeInt64)
	default:
		f.fail("number expected, code 0x%02x found", c)
	}
	return v
}

func (f *fields) readString(most int) string {
	b := f.blob(isString, "string", most)
	if f.err != nil || len(b) == 0 {
		return ""
	}
	// Neither the key that the last request named too nor a word of the vocabulary costs an allocation.
	if string(b) == f.last {
		return f.last
	}
	if w, ok := words[string(b)]; ok {
		return w
	}
	if !utf8.Valid(b) {
		f.fail("string is not UTF-8")
		return ""
	}
	s := string(b)
	if len(s) <= keyspec.MaxRef {
		f.last = s
	}
	return s
}

// skip passes over one value of any kind, nested at most depth levels.
func (f *fields) skip(depth int) {
	if f.err != nil {
		return
	}
	switch c := f.peek(); {
	case isString(c) || isBytes(c):
		f.take(f.bytesLen(c))
	case isUnsigned(c):
		f.unsigned(c)
	case isSigned(c):
		wide(f, (*msgpack.Decoder).DecodeInt64)
	case c == msgpcode.True || c == msgpcode.False || c == msgpcode.Nil:
		f.take(1)
	case isArray(c) || isMap(c):
		if depth == 0 {
			f.fail("nested too deeply")
			return
		}
		var n int
		if isArray(c) {
			n = f.arrayLen(len(f.data))
		} else {
			n = 2 * f.mapLen(len(f.data))
		}
		for ; n > 0 && f.err == nil; n-- {
			f.skip(depth - 1)
		}
	default: // float, ext and the unused code
		f.fail("code 0x%02x is not allowed", c)
	}
}

// decodeMap reads a map into m.
func (f *fields) decodeMap(m Message) {
	n := f.mapLen(64)
	key, index, seen := f.key, f.index, f.seen
	for f.seen = 0; n > 0 && f.err == nil; n-- {
		f.key = f.blob(isString, "key", maxKey)
		f.index, f.matched = 0, false
		if f.err != nil {
			break
		}
		k := f.key
		m.fields(f)
		switch {
		case f.err != nil || f.matched:
		case f.lenient:
			f.skip(maxDepth)
		default:
			f.fail("unknown key %q", k)
		}
	}
	f.key, f.index, f.seen, f.matched = key, index, seen, true
}

// end refuses bytes after the message.
func (f *fields) end() {
	if f.err == nil && f.left() > 0 {
		f.fail("%d bytes after the end", f.left())
	}
}

// match reports whether the key at hand is name. It is called once for every field, in order.
func (f *fields) match(name string) bool {
	bit := uint64(1) << (f.index & 63)
	f.index++
	if f.matched || f.err != nil || string(f.key) != name {
		return false
	}
	f.matched = true
	if f.seen&bit != 0 {
		f.fail("key %q comes twice", name)
		return false
	}
	f.seen |= bit
	return true
}

// Encoding.

func (f *fields) name(name string) {
	f.written++
	f.check(f.encoder.EncodeString(name))
}

// encodeMap appends m as a map of its fields that are not zero.
func (f *fields) encodeMap(m Message) {
	at, written := len(f.out.b), f.written
	f.out.b = append(f.out.b, msgpcode.FixedMapLow)
	f.written = 0
	m.fields(f)
	switch n := f.written; {
	case n < 16:
		f.out.b[at] |= byte(n)
	default:
		f.out.b[at] = msgpcode.Map16
		f.out.b = slices.Insert(f.out.b, at+1, byte(n>>8), byte(n))
	}
	f.written = written
}

// Both directions: one method for each kind of field.

// str is a UTF-8 string of at most most bytes.
func (f *fields) str(name string, p *string, most int) {
	if f.encode {
		if *p != "" {
			f.bound(name, len(*p), most)
			f.name(name)
			f.check(f.encoder.EncodeString(*p))
		}
		return
	}
	if f.match(name) {
		*p = f.readString(most)
	}
}

// text is a string for people. What is too long is cut, since an answer must not fail because of its wording.
func (f *fields) text(name string, p *string, most int) {
	if f.encode && len(*p) > most {
		short := cut(*p, most)
		p = &short
	}
	f.str(name, p, most)
}

// texts is strs for people: each of them is cut.
func (f *fields) texts(name string, p *[]string, count, most int) {
	if f.encode {
		short := make([]string, len(*p))
		for i, s := range *p {
			short[i] = cut(s, most)
		}
		p = &short
	}
	f.strs(name, p, count, most)
}

// cut returns the beginning of s that takes at most most bytes, with a mark where something is missing.
func cut(s string, most int) string {
	if len(s) <= most {
		return s
	}
	const mark = "…"
	n := most - len(mark)
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n] + mark
}

// bin is a byte string of at most most bytes. The decoded slice aliases the frame.
func (f *fields) bin(name string, p *[]byte, most int) {
	if f.encode {
		if len(*p) > 0 {
			f.bound(name, len(*p), most)
			f.name(name)
			if f.hole != nil && f.hole.Data == nil && len(*p) >= minHole {
				f.check(f.encoder.EncodeBytesLen(len(*p)))
				*f.hole = Hole{At: len(f.out.b), Data: *p}
				return
			}
			f.check(f.encoder.EncodeBytes(*p))
		}
		return
	}
	if f.match(name) {
		*p = f.blob(isBytes, "bin", most)
	}
}

func (f *fields) bool(name string, p *bool) {
	if f.encode {
		if *p {
			f.name(name)
			f.check(f.encoder.EncodeBool(true))
		}
		return
	}
	if f.match(name) {
		switch c := f.peek(); c {
		case msgpcode.True, msgpcode.False:
			*p = c == msgpcode.True
			f.take(1)
		default:
			f.fail("boolean expected, code 0x%02x found", c)
		}
	}
}

func (f *fields) u32(name string, p *uint32) {
	if f.encode {
		if *p != 0 {
			f.name(name)
			f.check(f.encoder.EncodeUint(uint64(*p)))
		}
		return
	}
	if f.match(name) {
		*p = uint32(f.readUint(1<<32 - 1))
	}
}

func (f *fields) u64(name string, p *uint64) {
	if f.encode {
		if *p != 0 {
			f.name(name)
			f.check(f.encoder.EncodeUint(*p))
		}
		return
	}
	if f.match(name) {
		*p = f.readUint(1<<64 - 1)
	}
}

func (f *fields) i64(name string, p *int64) {
	if f.encode {
		if *p != 0 {
			f.name(name)
			f.check(f.encoder.EncodeInt(*p))
		}
		return
	}
	if f.match(name) {
		*p = f.readInt()
	}
}

// strs is an array of at most count strings of at most most bytes.
func (f *fields) strs(name string, p *[]string, count, most int) {
	if f.encode {
		if len(*p) > 0 {
			f.bound(name, len(*p), count)
			f.name(name)
			f.check(f.encoder.EncodeArrayLen(len(*p)))
			for _, s := range *p {
				f.bound(name, len(s), most)
				f.check(f.encoder.EncodeString(s))
			}
		}
		return
	}
	if f.match(name) {
		n := f.arrayLen(count)
		if n > 0 {
			*p = make([]string, 0, n)
		}
		for ; n > 0 && f.err == nil; n-- {
			*p = append(*p, f.readString(most))
		}
	}
}

// bins is an array of at most count byte strings of at most most bytes.
func (f *fields) bins(name string, p *[][]byte, count, most int) {
	if f.encode {
		if len(*p) > 0 {
			f.bound(name, len(*p), count)
			f.name(name)
			f.check(f.encoder.EncodeArrayLen(len(*p)))
			for _, b := range *p {
				f.bound(name, len(b), most)
				if b == nil {
					b = []byte{} // the library would write nil
				}
				f.check(f.encoder.EncodeBytes(b))
			}
		}
		return
	}
	if f.match(name) {
		n := f.arrayLen(count)
		if n > 0 {
			*p = make([][]byte, 0, n)
		}
		for ; n > 0 && f.err == nil; n-- {
			*p = append(*p, f.blob(isBytes, "bin", most))
		}
	}
}

// dict is a map of at most count strings to strings, written in the order of the keys.
func (f *fields) dict(name string, p *map[string]string, count, key, value int) {
	if f.encode {
		if len(*p) > 0 {
			f.bound(name, len(*p), count)
			f.name(name)
			f.check(f.encoder.EncodeMapLen(len(*p)))
			keys := make([]string, 0, len(*p))
			for k := range *p {
				keys = append(keys, k)
			}
			slices.Sort(keys)
			for _, k := range keys {
				f.bound(name, len(k), key)
				f.bound(name, len((*p)[k]), value)
				f.check(f.encoder.EncodeString(k))
				f.check(f.encoder.EncodeString((*p)[k]))
			}
		}
		return
	}
	if f.match(name) {
		n := f.mapLen(count)
		if n > 0 {
			*p = make(map[string]string, n)
		}
		for ; n > 0 && f.err == nil; n-- {
			k := f.readString(key)
			if _, twice := (*p)[k]; twice {
				f.fail("key %q comes twice", name)
			}
			v := f.readString(value)
			if f.err == nil {
				(*p)[k] = v
			}
		}
	}
}

// msg is a message inside the message.
func (f *fields) msg(name string, m Message) {
	if f.encode {
		at := len(f.out.b)
		f.name(name)
		f.encodeMap(m)
		if f.out.b[len(f.out.b)-1] == msgpcode.FixedMapLow && len(f.out.b) == at+2+len(name) {
			f.out.b = f.out.b[:at] // an empty message is a zero field
			f.written--
		}
		return
	}
	if f.match(name) {
		f.decodeMap(m)
	}
}

// list is an array of at most count messages.
func list[T any, P interface {
	*T
	Message
}](f *fields, name string, p *[]T, count int) {
	if f.encode {
		if len(*p) > 0 {
			f.bound(name, len(*p), count)
			f.name(name)
			f.check(f.encoder.EncodeArrayLen(len(*p)))
			for i := range *p {
				f.encodeMap(P(&(*p)[i]))
			}
		}
		return
	}
	if f.match(name) {
		n := f.arrayLen(count)
		for ; n > 0 && f.err == nil; n-- {
			var zero T
			*p = append(*p, zero)
			f.decodeMap(P(&(*p)[len(*p)-1]))
		}
	}
}

// bound refuses to write what the other side would refuse to read.
func (f *fields) bound(name string, n, most int) {
	if n > most && f.err == nil {
		f.err = fmt.Errorf("%w: %s has %d, at most %d", ErrTooLarge, name, n, most)
	}
}
