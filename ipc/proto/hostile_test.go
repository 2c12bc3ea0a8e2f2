package proto

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// str, arr and the like spell MessagePack out by hand (github.com/msgpack/msgpack/blob/master/spec.md).
func str(s string) string { return string([]byte{0xd9, byte(len(s))}) + s }

func u32(code byte, n uint32) string {
	return string(binary.BigEndian.AppendUint32([]byte{code}, n))
}

func param(key, value string) string { return "\x81" + str(key) + value }

// TestHostileInput is the table of inputs that kill or bloat a decoder which trusts lengths.
func TestHostileInput(t *testing.T) {
	const (
		array32, map32, bin32, str32, ext32 = 0xdd, 0xdf, 0xc6, 0xdb, 0xc9
	)
	huge := uint32(1<<32 - 1)
	deep := func(n int) string { return strings.Repeat("\x91", n) + "\xc0" }
	for _, c := range []struct {
		name string
		in   string
		m    Message
	}{
		{"array of 2^32-1 strings", param("usage", u32(array32, huge)), &KeyCreate{}},
		{"array of 50 M strings", param("usage", u32(array32, 50_000_000)), &KeyCreate{}},
		{"array of 2^32-1 byte strings", param("chain", u32(array32, huge)), &CertAttach{}},
		{"array of 2^32-1 messages", param("items", u32(array32, huge)), &Batch{}},
		{"array of 2^32-1 where params are", u32(array32, huge), &Sign{}},
		{"map of 2^32-1 where params are", u32(map32, huge), &Sign{}},
		{"map of 2^32-1 strings to strings", param("labels", u32(map32, huge)), &KeyCreate{}},
		{"map of 33 labels that are there", param("labels", "\xde\x00\x21"+strings.Repeat("\xa1a\xa1b", 33)), &KeyCreate{}},
		{"message of 2^32-1 fields", param("new", u32(map32, huge)), &Derive{}},
		{"bin of 2^32-1", param("data", u32(bin32, huge)), &Sign{}},
		{"string of 2^32-1", param("key", u32(str32, huge)), &Sign{}},
		{"key of 2^32-1", "\x81" + u32(str32, huge), &Sign{}},
		{"bin one byte over its bound", param("nonce", "\xc4\x11"+strings.Repeat("n", 17)), &Bind{}},
		{"string one byte over its bound", param("prefix", str(strings.Repeat("p", 166))), &KeyList{}},
		{"known bin longer than what is left", param("data", "\xc4\x05abcd"), &Sign{}},
		{"1 M nested arrays in an unknown field", param("zzz", deep(1<<20)), &Sign{}},
		{"16 M nested arrays in an unknown field", param("zzz", deep(16<<20)), &Sign{}},
		{"1 M nested maps in an unknown field", param("zzz", strings.Repeat("\x81\xa0", 1<<20)+"\xc0"), &Sign{}},
		{"nested arrays where a string is", param("key", deep(1<<20)), &Sign{}},
		{"extension", param("key", "\xd4\x01\x00"), &Sign{}},
		{"extension of 2^32-1", param("key", u32(ext32, huge)+"\x01"), &Sign{}},
		{"extension in an unknown field", param("zzz", u32(ext32, huge)+"\x01"), &Sign{}},
		{"timestamp extension as a map", "\xd6\xff\x00\x00\x00\x00", &Sign{}},
		{"number over 32 bits", param("bytes", "\xcf\x00\x00\x00\x01\x00\x00\x00\x2c"), &Random{}},
		{"number over 63 bits", param("expires", "\xcf\xff\xff\xff\xff\xff\xff\xff\xff"), &KeyCreate{}},
		{"negative number", param("bytes", "\xff"), &Random{}},
		{"negative number of 8 bits", param("bytes", "\xd0\x80"), &Random{}},
		{"float", param("bytes", "\xca\x3f\x80\x00\x00"), &Random{}},
		{"double", param("expires", "\xcb\x3f\xf0\x00\x00\x00\x00\x00\x00"), &KeyCreate{}},
		{"float in an unknown field", param("zzz", "\xca\x3f\x80\x00\x00"), &Sign{}},
		{"bin where a string is wanted", param("key", "\xc4\x01a"), &Sign{}},
		{"string where a bin is wanted", param("data", "\xa1a"), &Sign{}},
		{"number where a string is wanted", param("key", "\x01"), &Sign{}},
		{"string where a number is wanted", param("bytes", "\xa11"), &Random{}},
		{"number where a boolean is wanted", param("exportable", "\x01"), &KeyCreate{}},
		{"string that is not UTF-8", param("key", "\xa2\xff\xfe"), &Sign{}},
		{"bytes after the end", "\x80\x00", &Sign{}},
		{"duplicate key", "\x82" + str("key") + "\xa1a" + str("key") + "\xa1b", &Sign{}},
		{"duplicate label", param("labels", "\x82\xa1a\xa1b\xa1a\xa1c"), &KeyCreate{}},
		{"nil where params are", "\xc0", &Sign{}},
		{"nil where a string is", param("key", "\xc0"), &Sign{}},
		{"nil where a bin is", param("data", "\xc0"), &Sign{}},
		{"nil where a number is", param("bytes", "\xc0"), &Random{}},
		{"nil where an array is", param("usage", "\xc0"), &KeyCreate{}},
		{"nil in an array", param("usage", "\x91\xc0"), &KeyCreate{}},
		{"nil where a message is", param("new", "\xc0"), &Derive{}},
		{"nil as a key", "\x81\xc0\xa1a", &Sign{}},
		{"number as a key", "\x81\x01\xa1a", &Sign{}},
		{"unknown key", param("keys", "\xa1a"), &Sign{}},
		{"the code that is never used", "\xc1", &Sign{}},
		{"nothing", "", &Sign{}},
		{"map that ends early", "\x81", &Sign{}},
		{"key without its value", "\x81\xa3key", &Sign{}},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, decode := range []func([]byte, Message) error{Decode, DecodeReply} {
				if c.name == "unknown key" {
					decode = Decode
				}
				var err error
				allocated, took := cost(func() { err = decode([]byte(c.in), c.m) })
				if !errors.Is(err, ErrMalformed) && !errors.Is(err, ErrTooLarge) {
					t.Errorf("error %v", err)
				}
				if limit := uint64(len(c.in) + 64<<10); allocated > limit { // the conversion to []byte is the first part
					t.Errorf("%d bytes allocated, at most %d", allocated, limit)
				}
				if took > 5*time.Second {
					t.Errorf("took %v", took)
				}
			}
		})
	}
}

func cost(f func()) (allocated uint64, took time.Duration) {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	start := time.Now()
	f()
	took = time.Since(start)
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc, took
}

func TestHostileFrames(t *testing.T) {
	request := func(rest string) []byte { return []byte("\x94\x00\x07" + rest) }
	for name, in := range map[string][]byte{
		"empty":                      {},
		"map":                        {0x80},
		"array of 2^32-1":            []byte(u32(0xdd, 1<<32-1)),
		"three elements":             []byte("\x93\x00\x07\xa4ping"),
		"six elements":               []byte("\x96\x00\x07\xa4ping\x80\x80\x80"),
		"notification":               []byte("\x93\x02\xa4ping\x80"),
		"response":                   []byte("\x94\x01\x07\xc0\x80"),
		"type nil":                   []byte("\x94\xc0\x07\xa4ping\x80"),
		"id negative":                []byte("\x94\x00\xff\xa4ping\x80"),
		"id nil":                     []byte("\x94\x00\xc0\xa4ping\x80"),
		"op bin":                     request("\xc4\x04ping\x80"),
		"op too long":                request("\xd9\x41" + strings.Repeat("o", 65) + "\x80"),
		"params nil":                 request("\xa4ping\xc0"),
		"params array":               request("\xa4ping\x90"),
		"params nested too deeply":   request("\xa4ping\x81\xa1a" + strings.Repeat("\x91", 1<<20) + "\xc0"),
		"params with a float":        request("\xa4ping\x81\xa1a\xca\x00\x00\x00\x00"),
		"bytes after the end":        request("\xa4ping\x80\x00"),
		"options nil":                []byte("\x95\x00\x07\xa4ping\x80\xc0"),
		"unknown option":             []byte("\x95\x00\x07\xa4ping\x80\x81\xa5grant\xc4\x00"),
		"option twice":               []byte("\x95\x00\x07\xa4ping\x80\x82\xa5trace\xa1a\xa5trace\xa1b"),
		"control frame over 64 KiB":  request("\xa3mac\x81\xa4data\xc6" + string(binary.BigEndian.AppendUint32(nil, 64<<10)) + strings.Repeat("d", 64<<10)),
		"ends in the middle":         request("\xa4ping\x81\xa1a\xc4\x09abc"),
		"params of 2^32-1 elements":  request("\xa4ping" + u32(0xdf, 1<<32-1)),
		"bin of 2^32-1 inside":       request("\xa4ping\x81\xa1a" + u32(0xc6, 1<<32-1)),
		"string of 2^32-1 as the op": request(u32(0xdb, 1<<32-1)),
	} {
		var err error
		allocated, _ := cost(func() { _, err = ParseRequest(in) })
		if !errors.Is(err, ErrMalformed) && !errors.Is(err, ErrTooLarge) {
			t.Errorf("%s: error %v", name, err)
		}
		if allocated > 64<<10 {
			t.Errorf("%s: %d bytes allocated", name, allocated)
		}
	}
	for name, in := range map[string]string{
		"request":             "\x94\x00\x07\xa4ping\x80",
		"error and result":    "\x94\x01\x07\x81\xa4code\xa1x\x80",
		"neither":             "\x94\x01\x07\xc0\xc0",
		"error without code":  "\x94\x01\x07\x80\xc0",
		"error as a string":   "\x94\x01\x07\xa1x\xc0",
		"bytes after the end": "\x94\x01\x07\xc0\x80\x80",
		"deep result":         "\x94\x01\x07\xc0\x81\xa1a" + strings.Repeat("\x91", 1<<20) + "\xc0",
	} {
		if r, err := ParseResponse([]byte(in)); !errors.Is(err, ErrMalformed) || r.Err != nil || r.Result != nil {
			t.Errorf("%s: %+v, error %v", name, r, err)
		}
	}
	if r, _ := ParseRequest([]byte("\x94\x00\x07\xa4ping\xc0")); r.ID != 7 {
		t.Error("the id of a bad request is lost, so that it cannot be answered")
	}
}

// TestLenientReply: what a newer server adds does not disturb an older client.
func TestLenientReply(t *testing.T) {
	var m SignReply
	in := "\x83" + str("new") + "\x92\x81\xa1a\xc0\xc3" + str("version") + "\x03" + str("newer") + "\xc4\x02ab"
	if err := DecodeReply([]byte(in), &m); err != nil || m.Version != 3 {
		t.Errorf("%+v, error %v", m, err)
	}
	if err := Decode([]byte(in), &SignReply{}); !errors.Is(err, ErrMalformed) {
		t.Errorf("a request with unknown keys: %v", err)
	}
}

// TestWideIntegers: other libraries do not write the shortest form.
func TestWideIntegers(t *testing.T) {
	for _, v := range []string{"\x05", "\xcc\x05", "\xcd\x00\x05", "\xce\x00\x00\x00\x05", "\xcf\x00\x00\x00\x00\x00\x00\x00\x05",
		"\xd0\x05", "\xd1\x00\x05", "\xd2\x00\x00\x00\x05", "\xd3\x00\x00\x00\x00\x00\x00\x00\x05"} {
		var m Random
		if err := Decode([]byte(param("bytes", v)), &m); err != nil || m.Bytes != 5 {
			t.Errorf("%x: %d, error %v", v, m.Bytes, err)
		}
	}
}

func TestEncoderKeepsTheBounds(t *testing.T) {
	for _, m := range []Message{
		&Sign{Data: make([]byte, MaxMessage+1)},
		&Bind{Nonce: make([]byte, NonceSize+1)},
		&KeyCreate{Name: strings.Repeat("n", 500)},
		&KeyCreate{Labels: map[string]string{"a": strings.Repeat("v", keyspec.MaxLabelValue+1)}},
		&KeyCreate{Usage: make([]string, maxWords+1)},
		&CertAttach{Chain: make([][]byte, maxChain+1)},
	} {
		dst := []byte("before")
		if out, err := AppendRequest(dst, 1, "x", m, nil); !errors.Is(err, ErrTooLarge) || !bytes.Equal(out, dst) {
			t.Errorf("%T: %q, error %v", m, out, err)
		}
	}
	// Each field in its bounds, the frame not.
	m := &Encrypt{Data: make([]byte, MaxData), AAD: make([]byte, maxAAD)}
	if _, err := AppendRequest(nil, 1, OpEncrypt, m, nil); !errors.Is(err, ErrTooLarge) {
		t.Errorf("frame over the limit: %v", err)
	}
	if _, err := AppendRequest(nil, 1, OpStreamUpdate, &StreamUpdate{Data: make([]byte, MaxChunk)}, nil); err != nil {
		t.Errorf("data frame: %v", err)
	}
	if _, err := AppendResponse(nil, 1, nil, &StreamData{Data: make([]byte, MaxChunk+1024)}); err != nil {
		t.Errorf("data frame: %v", err)
	}
}

// TestRequestAroundAHole: with the hole filled it is the frame that AppendRequest makes.
func TestRequestAroundAHole(t *testing.T) {
	options := &Options{DeadlineMS: 1000, Trace: "t"}
	for _, n := range []int{0, 1, minHole - 1, minHole, MaxData} {
		for _, o := range []*Options{nil, options} {
			m := &Encrypt{Key: "a/b", Data: bytes.Repeat([]byte{7}, n), AAD: make([]byte, 100)}
			before := []byte("frame before")
			want, err := AppendRequest(before, 9, OpEncrypt, m, o)
			if err != nil {
				t.Fatal(err)
			}
			got, hole, err := AppendRequestAround(before, 9, OpEncrypt, m, o)
			if err != nil || (hole.Data != nil) != (n >= minHole) {
				t.Fatalf("%d bytes: hole of %d bytes, error %v", n, len(hole.Data), err)
			}
			if n >= minHole && &hole.Data[0] != &m.Data[0] {
				t.Errorf("%d bytes: copied", n)
			}
			if got = slices.Insert(got, hole.At, hole.Data...); !bytes.Equal(got, want) {
				t.Errorf("%d bytes: the frames differ", n)
			}
		}
	}
	if _, _, err := AppendRequestAround(nil, 9, OpStreamUpdate, &StreamUpdate{Data: make([]byte, maxStreamData+1)}, nil); !errors.Is(err, ErrTooLarge) {
		t.Errorf("field over its bound: %v", err)
	}
	if _, _, err := AppendRequestAround(nil, 9, OpEncrypt, &Encrypt{Data: make([]byte, MaxData), AAD: make([]byte, maxAAD)}, nil); !errors.Is(err, ErrTooLarge) {
		t.Errorf("frame over the limit: %v", err)
	}
}

func TestOpsAreDistinct(t *testing.T) {
	seen := make(map[string]bool)
	for _, op := range Ops() {
		if seen[op] || len(op) > maxKey {
			t.Errorf("operation %q", op)
		}
		seen[op] = true
	}
	if _, ok := Lookup("no_such_op"); ok {
		t.Error("Lookup finds what is not there")
	}
}

// TestAllocations guards the cost of the hot path: the message itself, and its key name.
func TestAllocations(t *testing.T) {
	buf := make([]byte, 0, 4096)
	m := &Sign{Key: "REGISTRATION/10001_110011", Scheme: "ecdsa-sha256", Digest: make([]byte, 32)}
	frame, err := AppendRequest(nil, 7, OpSign, m, nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		most float64
		f    func() error
	}{
		"append request":  {0, func() error { _, err := AppendRequest(buf, 7, OpSign, m, nil); return err }},
		"append response": {0, func() error { _, err := AppendResponse(buf, 7, nil, &emptyReply); return err }},
		"parse request":   {0, func() error { _, err := ParseRequest(frame[lengthSize:]); return err }},
		"decode params": {2, func() error {
			r, _ := ParseRequest(frame[lengthSize:])
			return Decode(r.Params, new(Sign))
		}},
	} {
		if n := testing.AllocsPerRun(200, func() {
			if err := c.f(); err != nil {
				t.Fatal(err)
			}
		}); n > c.most && !raceEnabled { // the race detector makes sync.Pool forget on purpose
			t.Errorf("%s allocates %v times, at most %v", name, n, c.most)
		}
	}
}

var emptyReply Empty

func BenchmarkParseDecode(b *testing.B) {
	frame, _ := AppendRequest(nil, 7, OpSign, &Sign{Key: "REGISTRATION/10001_110011", Scheme: "ecdsa-sha256", Digest: make([]byte, 32)}, nil)
	b.ReportAllocs()
	for b.Loop() {
		r, _ := ParseRequest(frame[lengthSize:])
		var m Sign
		if err := Decode(r.Params, &m); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkAppend(b *testing.B) {
	m := &SignReply{Signature: make([]byte, 72), Version: 3}
	buf := make([]byte, 0, 4096)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := AppendResponse(buf, 7, nil, m); err != nil {
			b.Fatal(err)
		}
	}
}

func ExampleBodies() {
	for _, b := range Bodies()[:4] {
		fmt.Printf("%s %T %T\n", b.Op, b.Params(), b.Result())
	}
	// Output:
	// hello *proto.Hello *proto.HelloReply
	// bind *proto.Bind *proto.Empty
	// ping *proto.Empty *proto.Empty
	// cancel *proto.Cancel *proto.Empty
}
