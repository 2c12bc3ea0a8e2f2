// Package proto is the wire protocol of kmsd: its messages, its error codes and their encoding. It is pure data and
// does no I/O.
//
// A frame is a big-endian uint32 with the length of the rest, then one MessagePack array in the shape of
// MessagePack-RPC: a request [0, id, op, params] or [0, id, op, params, options], a response [1, id, error, result].
// Params, options, error and result are maps with string keys. A field that is absent is zero.
//
// The decoder takes hostile input: every length is compared with a bound and with the bytes at hand before anything is
// allocated. It refuses unknown keys in requests and ignores them in responses, so that a new server may say more to an
// old client, but an old server never ignores what a new client asked for. It refuses duplicate keys, trailing bytes,
// floats, extensions, and nil where a value must be.
package proto

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/vmihailenco/msgpack/v5/msgpcode"
)

// Version is the protocol version of this release.
const Version = 1

// Limits of the protocol, in bytes. Frame limits count what follows the length word.
const (
	MaxControlFrame = 64 << 10
	MaxDataFrame    = 1<<20 + 4096
	MaxChunk        = 1 << 20  // plaintext in one stream_update
	MaxData         = 60 << 10 // payload of an operation that takes one frame
	MaxMessage      = 1 << 20  // message that is signed as it is
	MaxStreams      = 8        // open streams on one connection
	StreamWindow    = 4        // chunks in flight on one stream
	NonceSize       = 16       // nonce of hello
	lengthSize      = 4
)

// The message types of MessagePack-RPC that kmsd uses.
const (
	typeRequest  = 0
	typeResponse = 1
)

// Request is a request whose params have not been decoded yet. Params and Options alias the frame.
type Request struct {
	ID      uint64
	Op      string
	Params  []byte
	Options Options

	at int // of Params in the frame
}

// Move makes r alias a copy of its frame in place of the frame.
func (r *Request) Move(frame []byte) {
	r.Params = frame[r.at : r.at+len(r.Params) : r.at+len(r.Params)]
	r.Options.RequestKey = bytes.Clone(r.Options.RequestKey)
}

// Response is a response whose result has not been decoded yet. Err is nil exactly when Result is not.
type Response struct {
	ID     uint64
	Err    *Error
	Result []byte
}

// Options go with any request. The names approval and grant are reserved.
type Options struct {
	DeadlineMS uint64 // milliseconds from the arrival of the request, 0: none
	RequestKey []byte // makes a create idempotent: a second one with the same key returns what the first one made
	Trace      string // copied to the audit
}

func (m *Options) fields(f *fields) {
	f.u64("deadline_ms", &m.DeadlineMS)
	f.bin("request_key", &m.RequestKey, 64)
	f.str("trace", &m.Trace, 64)
}

func (m *Options) zero() bool {
	return m == nil || m.DeadlineMS == 0 && len(m.RequestKey) == 0 && m.Trace == ""
}

// FrameLimit returns how long a frame of op may be in bytes, without its length word. Requests of stream_update, sign,
// verify, key_migrate and crl_add and replies of stream_update and stream_finish are data frames, everything else is a control frame.
func FrameLimit(op string, reply bool) int {
	switch op {
	case OpStreamUpdate:
		return MaxDataFrame
	case OpSign, OpVerify, OpKeyMigrate, OpCRLAdd: // Ed25519 takes the message whole; a key has many generations
		if !reply {
			return MaxDataFrame
		}
	case OpStreamFinish:
		if reply {
			return MaxDataFrame
		}
	case OpHelperDo: // never on the public socket
		if !reply {
			return MaxHelperFrame
		}
	}
	return MaxControlFrame
}

// Hole is a place in a frame where bytes belong that were not copied into it: Data comes before the byte At of the buffer
// that the frame is in.
type Hole struct {
	At   int
	Data []byte
}

// minHole is the length from which on a byte field is worth a hole.
const minHole = 16 << 10

// AppendRequest appends a whole frame, with its length word. Errors wrap ErrTooLarge; dst is then returned as it was.
func AppendRequest(dst []byte, id uint64, op string, params Message, o *Options) ([]byte, error) {
	return appendRequest(dst, id, op, params, o, nil)
}

// AppendRequestAround is AppendRequest for a frame that is written in parts: if params have a byte field of 16 KiB or more,
// the first one is left out and becomes the hole, else the hole has no data. It is not valid after an error.
func AppendRequestAround(dst []byte, id uint64, op string, params Message, o *Options) (frame []byte, hole Hole, err error) {
	frame, err = appendRequest(dst, id, op, params, o, &hole)
	return frame, hole, err
}

func appendRequest(dst []byte, id uint64, op string, params Message, o *Options, hole *Hole) ([]byte, error) {
	f := newEncoder(append(dst, 0, 0, 0, 0))
	defer f.free()
	f.hole = hole
	f.bound("op", len(op), maxKey)
	n := 4
	if !o.zero() {
		n = 5
	}
	f.out.b = append(f.out.b, msgpcode.FixedArrayLow|byte(n), typeRequest)
	f.check(f.encoder.EncodeUint(id))
	f.check(f.encoder.EncodeString(op))
	f.encodeMap(params)
	if n == 5 {
		f.encodeMap(o)
	}
	return f.finish(dst, FrameLimit(op, false))
}

// AppendResponse appends a whole frame, with its length word: the error e, or result when e is nil. Errors wrap
// ErrTooLarge; dst is then returned as it was.
func AppendResponse(dst []byte, id uint64, e *Error, result Message) ([]byte, error) {
	return appendResponse(dst, id, e, result, nil)
}

// AppendResponseAround is to AppendResponse what AppendRequestAround is to AppendRequest.
func AppendResponseAround(dst []byte, id uint64, result Message) (frame []byte, hole Hole, err error) {
	frame, err = appendResponse(dst, id, nil, result, &hole)
	return frame, hole, err
}

func appendResponse(dst []byte, id uint64, e *Error, result Message, hole *Hole) ([]byte, error) {
	f := newEncoder(append(dst, 0, 0, 0, 0))
	defer f.free()
	f.hole = hole
	f.out.b = append(f.out.b, msgpcode.FixedArrayLow|4, typeResponse)
	f.check(f.encoder.EncodeUint(id))
	if e != nil {
		f.encodeMap(e)
		f.out.b = append(f.out.b, msgpcode.Nil)
		return f.finish(dst, MaxControlFrame)
	}
	f.out.b = append(f.out.b, msgpcode.Nil)
	f.encodeMap(result)
	limit := MaxControlFrame
	if _, ok := result.(*StreamData); ok {
		limit = MaxDataFrame
	}
	return f.finish(dst, limit)
}

// finish writes the length word of the frame that begins at the end of dst.
func (f *fields) finish(dst []byte, limit int) ([]byte, error) {
	if f.err != nil {
		return dst, f.err
	}
	n := len(f.out.b) - len(dst) - lengthSize
	if f.hole != nil {
		n += len(f.hole.Data)
	}
	if n > limit {
		return dst, fmt.Errorf("%w: frame of %d bytes, at most %d", ErrTooLarge, n, limit)
	}
	binary.BigEndian.PutUint32(f.out.b[len(dst):], uint32(n))
	return f.out.b, nil
}

// ParseRequest parses a frame without its length word. Errors wrap ErrMalformed or ErrTooLarge; when ID could be read it
// is set even then, so that the error can be answered.
func ParseRequest(frame []byte) (Request, error) {
	f := newDecoder(frame, false)
	defer f.free()
	var r Request
	n := f.arrayLen(5)
	if t := f.readUint(typeResponse); f.err == nil && t != typeRequest {
		f.fail("message type %d where a request must be", t)
	}
	r.ID = f.readUint(1<<64 - 1)
	if f.err == nil && n != 4 && n != 5 {
		f.fail("request of %d elements", n)
	}
	r.Op = f.readString(maxKey)
	r.Params = f.rawMap()
	r.at = f.at - len(r.Params)
	if n == 5 {
		r.Options = f.options()
	}
	f.end()
	if f.err == nil && len(frame) > FrameLimit(r.Op, false) {
		f.err = fmt.Errorf("%w: frame of %d bytes, at most %d for this operation", ErrTooLarge, len(frame), FrameLimit(r.Op, false))
	}
	return r, f.err
}

// options is apart from ParseRequest so that only a request that has options pays for them.
func (f *fields) options() Options {
	var o Options
	f.decodeMap(&o)
	return o
}

// ParseResponse parses a frame without its length word. Errors wrap ErrMalformed or ErrTooLarge.
func ParseResponse(frame []byte) (Response, error) {
	f := newDecoder(frame, true)
	defer f.free()
	var r Response
	if n := f.arrayLen(4); f.err == nil && n != 4 {
		f.fail("response of %d elements", n)
	}
	if t := f.readUint(typeResponse); f.err == nil && t != typeResponse {
		f.fail("message type %d where a response must be", t)
	}
	r.ID = f.readUint(1<<64 - 1)
	switch {
	case f.err != nil:
	case f.peek() == msgpcode.Nil:
		f.take(1)
		r.Result = f.rawMap()
	default:
		r.Err = new(Error)
		f.decodeMap(r.Err)
		if f.err == nil && f.peek() != msgpcode.Nil {
			f.fail("result beside an error")
		}
		f.take(1)
		if f.err == nil && r.Err.Code == "" {
			f.fail("error without a code")
		}
	}
	f.end()
	if f.err != nil {
		r.Err, r.Result = nil, nil
	}
	return r, f.err
}

// rawMap returns the bytes of the map that comes next.
func (f *fields) rawMap() []byte {
	at := f.at
	if f.err == nil && !isMap(f.peek()) {
		f.fail("map expected, code 0x%02x found", f.peek())
	}
	f.skip(maxDepth)
	if f.err != nil {
		return nil
	}
	return f.data[at:f.at:f.at]
}

// Decode decodes the params of a request into m, which must be zero. Byte fields of m alias params. Errors wrap
// ErrMalformed or ErrTooLarge, and m is then of no use.
func Decode(params []byte, m Message) error { return decode(params, m, false) }

// DecodeReply is Decode for the result of a response: keys it does not know are ignored. The params of hello are read
// with it as well, because they come before a version has been agreed.
func DecodeReply(result []byte, m Message) error { return decode(result, m, true) }

// KeyOf returns the key that params name, or "" when they name none. What is wrong with them shows when they are decoded.
func KeyOf(params []byte) string {
	f := newDecoder(params, true)
	defer f.free()
	for n := f.mapLen(64); n > 0 && f.err == nil; n-- {
		if string(f.blob(isString, "key", maxKey)) == "key" {
			if key := f.readString(keyspec.MaxRef); f.err == nil {
				return key
			}
			return ""
		}
		f.skip(maxDepth)
	}
	return ""
}

func decode(data []byte, m Message, lenient bool) error {
	f := newDecoder(data, lenient)
	defer f.free()
	f.decodeMap(m)
	f.end()
	return f.err
}

// AppendParams appends m as a bare map, for the items of a batch.
func AppendParams(dst []byte, m Message) ([]byte, error) {
	f := newEncoder(dst)
	defer f.free()
	f.encodeMap(m)
	if f.err != nil {
		return dst, f.err
	}
	return f.out.b, nil
}
