package proto

import (
	"bytes"
	"encoding/hex"
	"os"
	"strings"
	"testing"
)

// seeds calls f with every golden frame, without its length word.
func seeds(f *testing.F, add func(kind, op string, frame []byte)) {
	data, err := os.ReadFile("testdata/v1.golden")
	if err != nil {
		f.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		words := strings.Fields(line)
		if len(words) != 3 || words[0] == "#" {
			continue
		}
		if frame, err := hex.DecodeString(words[2]); err == nil {
			add(words[0], words[1], frame[lengthSize:])
		}
	}
}

func FuzzRequest(f *testing.F) {
	seeds(f, func(_, _ string, frame []byte) { f.Add(frame) })
	f.Fuzz(func(t *testing.T, frame []byte) {
		r, err := ParseRequest(frame)
		if err != nil {
			return
		}
		if len(frame) > FrameLimit(r.Op, false) || len(r.Op) > maxKey {
			t.Fatalf("%s in a frame of %d bytes", r.Op, len(frame))
		}
		body, ok := Lookup(r.Op)
		if !ok {
			return
		}
		m := body.Params()
		if Decode(r.Params, m) != nil {
			return
		}
		again, err := AppendRequest(nil, r.ID, r.Op, m, &r.Options)
		if err != nil {
			t.Fatal(err)
		}
		s, err := ParseRequest(again[lengthSize:])
		if err != nil || s.ID != r.ID || s.Op != r.Op || s.Options.DeadlineMS != r.Options.DeadlineMS {
			t.Fatalf("%+v became %+v, error %v", r, s, err)
		}
	})
}

func FuzzResponse(f *testing.F) {
	seeds(f, func(_, _ string, frame []byte) { f.Add(frame) })
	f.Fuzz(func(t *testing.T, frame []byte) {
		r, err := ParseResponse(frame)
		if err == nil && (r.Err == nil) == (r.Result == nil) {
			t.Fatalf("error %v beside result %x", r.Err, r.Result)
		}
		if err == nil && r.Err != nil {
			if _, err := AppendResponse(nil, r.ID, r.Err, nil); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// FuzzBody decodes the params and the result of every operation. What is accepted must come back the same.
func FuzzBody(f *testing.F) {
	ops := Ops()
	seeds(f, func(kind, op string, frame []byte) {
		for i := range ops {
			if ops[i] != op {
				continue
			}
			if kind == "request" {
				r, _ := ParseRequest(frame)
				f.Add(uint8(i), false, r.Params)
			} else if r, _ := ParseResponse(frame); r.Result != nil {
				f.Add(uint8(i), true, r.Result)
			}
		}
	})
	bodies := Bodies()
	f.Fuzz(func(t *testing.T, n uint8, reply bool, data []byte) {
		b := bodies[int(n)%len(bodies)]
		empty, decode := b.Params, Decode
		if reply {
			empty, decode = b.Result, DecodeReply
		}
		m := empty()
		if decode(data, m) != nil {
			return
		}
		first, err := AppendParams(nil, m)
		if err != nil {
			t.Fatalf("%s: %T was read but cannot be written: %v", b.Op, m, err)
		}
		m2 := empty()
		if err := Decode(first, m2); err != nil {
			t.Fatalf("%s: %T was written but cannot be read: %v", b.Op, m, err)
		}
		second, err := AppendParams(nil, m2)
		if err != nil || !bytes.Equal(first, second) {
			t.Fatalf("%s: %T\n%x\n%x\n%v", b.Op, m, first, second, err)
		}
	})
}
