package ciphertext

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"

	"golang.org/x/crypto/chacha20poly1305"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

var golden = flag.Bool("golden", false, "write new golden files")

var algorithms = []keyspec.Algorithm{keyspec.AES128GCM, keyspec.AES256GCM, keyspec.ChaCha20Poly1305}

// testKey returns the AEAD of a fixed key: the bytes 0, 1, 2 and so on.
func testKey(t testing.TB, a keyspec.Algorithm) cipher.AEAD {
	t.Helper()
	key := make([]byte, 32)
	for i := range key {
		key[i] = byte(i)
	}
	var aead cipher.AEAD
	var block cipher.Block
	var err error
	switch a {
	case keyspec.ChaCha20Poly1305:
		aead, err = chacha20poly1305.New(key)
	case keyspec.AES128GCM:
		if block, err = aes.NewCipher(key[:16]); err == nil {
			aead, err = cipher.NewGCM(block)
		}
	default:
		if block, err = aes.NewCipher(key); err == nil {
			aead, err = cipher.NewGCM(block)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	return aead
}

// pattern returns n bytes that are the same in every run and differ from segment to segment.
func pattern(n int) []byte {
	b := make([]byte, n)
	state := uint32(1)
	for i := range b {
		state = state*1664525 + 1013904223
		b[i] = byte(state >> 24)
	}
	return b
}

func sealStream(t testing.TB, h Header, aead cipher.AEAD, plaintext, aad []byte) []byte {
	t.Helper()
	head, key, err := AppendHead(nil, h, aead, aad)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	w, err := NewWriter(&b, head, key)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(plaintext); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func openStream(aead cipher.AEAD, sealed, aad []byte) ([]byte, error) {
	r := bytes.NewReader(sealed)
	head, _, err := ReadHead(r)
	if err != nil {
		return nil, err
	}
	key, err := Open(nil, aead, head, aad)
	if err != nil {
		return nil, err
	}
	reader, err := NewReader(r, head, key)
	if err != nil {
		return nil, err
	}
	return io.ReadAll(reader)
}

func TestMessage(t *testing.T) {
	for _, algorithm := range algorithms {
		aead := testKey(t, algorithm)
		for _, plaintext := range [][]byte{{}, []byte("x"), pattern(60 << 10)} {
			for _, aad := range [][]byte{nil, []byte("context")} {
				sealed, err := AppendMessage([]byte("before"), algorithm, 7, aead, plaintext, aad)
				if err != nil {
					t.Fatal(err)
				}
				sealed, ok := bytes.CutPrefix(sealed, []byte("before"))
				if !ok || len(sealed) != len(plaintext)+Overhead {
					t.Fatalf("%d bytes", len(sealed))
				}
				h, err := ParseHeader(sealed)
				if want := (Header{Message, algorithm, 7, 0}); err != nil || h != want {
					t.Fatalf("%+v, %v", h, err)
				}
				got, err := Open([]byte("in front "), aead, sealed, aad)
				if err != nil || string(got) != "in front "+string(plaintext) {
					t.Fatal(err)
				}
				if _, err := Open(nil, aead, sealed, []byte("other")); !errors.Is(err, ErrDecryption) {
					t.Errorf("other aad: %v", err)
				}
				if _, err := Open(nil, aead, append(sealed, 0), aad); !errors.Is(err, ErrDecryption) {
					t.Errorf("appended byte: %v", err)
				}
			}
		}
	}
}

// TestMessageChanges flips every bit and cuts at every byte.
func TestMessageChanges(t *testing.T) {
	aead := testKey(t, keyspec.AES256GCM)
	for _, format := range []Format{Message, DataKey} {
		sealed, err := Append(nil, Header{Format: format, Algorithm: keyspec.AES256GCM, Version: 1}, aead, pattern(32), nil)
		if err != nil {
			t.Fatal(err)
		}
		for bit := range len(sealed) * 8 {
			changed := bytes.Clone(sealed)
			changed[bit/8] ^= 1 << (bit % 8)
			if _, err := Open(nil, aead, changed, nil); err == nil {
				t.Fatalf("bit %d of format %d", bit, format)
			}
		}
		for n := range sealed {
			if _, err := Open(nil, aead, sealed[:n], nil); err == nil {
				t.Fatalf("cut to %d bytes", n)
			}
		}
	}
}

// TestFormatsDoNotMix checks that a ciphertext made for one purpose does not serve another, though key and layout are the same.
func TestFormatsDoNotMix(t *testing.T) {
	aead := testKey(t, keyspec.AES256GCM)
	for _, from := range []Format{Message, Stream, DataKey} {
		sealed, err := Append(nil, Header{Format: from, Algorithm: keyspec.AES256GCM, Version: 1}, aead, pattern(32), nil)
		if err != nil {
			t.Fatal(err)
		}
		for _, to := range []Format{Message, Stream, DataKey} {
			changed := bytes.Clone(sealed)
			changed[3] = byte(to)
			changed[6] = 32
			if to == Message {
				changed[6] = 0
			}
			if _, err := ParseHeader(changed); err != nil {
				t.Fatal(err)
			}
			if _, err := Open(nil, aead, changed, nil); (err == nil) != (from == to) {
				t.Errorf("%d as %d: %v", from, to, err)
			}
		}
	}
}

func TestParseHeader(t *testing.T) {
	for _, test := range []struct {
		hex string
		ok  bool
	}{
		{"6b6d7301 0001 00 00 00000001", true},
		{"6b6d7301 0003 00 00 ffffffff", true},
		{"6b6d7302 0002 20 00 00000001", true},
		{"6b6d7303 0002 10 00 00000001", true},
		{"6b6d7303 0002 40 00 00000001", true},
		{"6b6d7300 0001 00 00 00000001", false}, // format 0
		{"6b6d7304 0001 00 00 00000001", false}, // format 4
		{"6b6d7301 0000 00 00 00000001", false}, // algorithm 0
		{"6b6d7301 0004 00 00 00000001", false}, // algorithm 4
		{"6b6d7301 0001 20 00 00000001", false}, // key in a message
		{"6b6d7302 0001 10 00 00000001", false}, // short stream key
		{"6b6d7303 0001 00 00 00000001", false}, // no data key
		{"6b6d7303 0001 30 00 00000001", false}, // 48 bytes
		{"6b6d7301 0001 00 01 00000001", false}, // reserved byte
		{"6b6d7301 0001 00 00 00000000", false}, // version 0
		{"6b6d7201 0001 00 00 00000001", false}, // magic
		{"6b6d7301 0001 00 00 000000", false},   // short
		{"", false},
	} {
		b, err := hex.DecodeString(strings.ReplaceAll(test.hex, " ", ""))
		if err != nil {
			t.Fatal(err)
		}
		h, err := ParseHeader(b)
		if (err == nil) != test.ok {
			t.Errorf("%s: %v", test.hex, err)
		}
		if err != nil {
			if !errors.Is(err, ErrFormat) {
				t.Errorf("%s: %v is no ErrFormat", test.hex, err)
			}
			continue
		}
		if again, err := h.appendTo(nil, h.KeySize); err != nil || !bytes.Equal(again, b) {
			t.Errorf("%s: again %x, %v", test.hex, again, err)
		}
	}
}

func TestAppendRefuses(t *testing.T) {
	aead := testKey(t, keyspec.AES256GCM)
	for name, h := range map[string]Header{
		"algorithm": {Format: Message, Algorithm: keyspec.RSA2048, Version: 1},
		"version":   {Format: Message, Algorithm: keyspec.AES256GCM},
		"format":    {Format: 9, Algorithm: keyspec.AES256GCM, Version: 1},
		"key size":  {Format: DataKey, Algorithm: keyspec.AES256GCM, Version: 1},
	} {
		if _, err := Append(nil, h, aead, []byte("17 bytes, no key."), nil); err == nil {
			t.Error(name)
		}
	}
	if _, _, err := AppendHead(nil, Header{Format: Message, Algorithm: keyspec.AES256GCM, Version: 1}, aead, nil); err == nil {
		t.Error("a message has a head")
	}
}

// sizes of plaintext around the borders of segments.
var sizes = []int{0, 1, SegmentSize - 1, SegmentSize, SegmentSize + 1, 2*SegmentSize - 1, 2 * SegmentSize, 2*SegmentSize + 1, 5 * SegmentSize}

func TestStream(t *testing.T) {
	for _, algorithm := range algorithms {
		aead := testKey(t, algorithm)
		for _, format := range []Format{Stream, DataKey} {
			for _, n := range sizes {
				plaintext := pattern(n)
				sealed := sealStream(t, Header{Format: format, Algorithm: algorithm, Version: 3}, aead, plaintext, []byte("aad"))
				segments := max((n+SegmentSize-1)/SegmentSize, 1)
				if want := HeadSize + n + segments*TagSize; len(sealed) != want {
					t.Errorf("%d bytes give %d, want %d", n, len(sealed), want)
				}
				got, err := openStream(aead, sealed, []byte("aad"))
				if err != nil || !bytes.Equal(got, plaintext) {
					t.Errorf("%s, %d bytes: %v", algorithm, n, err)
				}
				if _, err := openStream(aead, sealed, []byte("bad")); !errors.Is(err, ErrDecryption) {
					t.Errorf("other aad: %v", err)
				}
				if _, err := openStream(testKey(t, algorithm), sealed[:HeadSize], []byte("aad")); !errors.Is(err, ErrDecryption) {
					t.Errorf("no segments: %v", err)
				}
			}
		}
	}
}

// TestPieces seals and opens in pieces of many sizes: the ciphertext must not depend on them.
func TestPieces(t *testing.T) {
	aead := testKey(t, keyspec.AES256GCM)
	head, key, err := AppendHead(nil, Header{Format: Stream, Algorithm: keyspec.AES256GCM, Version: 1}, aead, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range sizes {
		plaintext := pattern(n)
		var want []byte
		for _, piece := range []int{1 << 20, 1, 7, 1000, SegmentSize - 1, SegmentSize, SegmentSize + 1, SealedSegmentSize, 3*SegmentSize + 5} {
			if piece < 100 && n > 2*SegmentSize {
				continue // slow, and shows nothing new
			}
			sealer, err := NewSealer(head, key)
			if err != nil {
				t.Fatal(err)
			}
			var sealed []byte
			for rest := plaintext; len(rest) > 0; {
				k := min(piece, len(rest))
				before := len(sealed)
				if sealed, err = sealer.Update(sealed, rest[:k]); err != nil {
					t.Fatal(err)
				}
				if emitted := len(sealed) - before; emitted > (k+SegmentSize)/SegmentSize*SealedSegmentSize {
					t.Fatalf("%d bytes for a piece of %d", emitted, k)
				}
				rest = rest[k:]
			}
			if sealed, err = sealer.Finish(sealed); err != nil {
				t.Fatal(err)
			}
			if want == nil {
				want = sealed
			}
			if !bytes.Equal(sealed, want) {
				t.Fatalf("%d bytes in pieces of %d differ", n, piece)
			}
			opener, err := NewOpener(head, key)
			if err != nil {
				t.Fatal(err)
			}
			var got []byte
			for rest := sealed; len(rest) > 0; {
				k := min(piece, len(rest))
				if got, err = opener.Update(got, rest[:k]); err != nil {
					t.Fatal(err)
				}
				rest = rest[k:]
			}
			if got, err = opener.Finish(got); err != nil || !bytes.Equal(got, plaintext) {
				t.Fatalf("%d bytes in pieces of %d: %v", n, piece, err)
			}
		}
	}
}

// TestStreamChanges attacks the segments of a stream. Nothing but the stream as it was written may open, and what is
// read before the error must be a beginning of the plaintext.
func TestStreamChanges(t *testing.T) {
	aead := testKey(t, keyspec.AES256GCM)
	h := Header{Format: Stream, Algorithm: keyspec.AES256GCM, Version: 1}
	plaintext := pattern(3*SegmentSize + 100)
	sealed := sealStream(t, h, aead, plaintext, nil)
	other := sealStream(t, h, aead, plaintext, nil)
	full := sealStream(t, h, aead, plaintext[:3*SegmentSize], nil)
	segment := func(b []byte, i int) []byte {
		begin := HeadSize + i*SealedSegmentSize
		return b[begin:min(begin+SealedSegmentSize, len(b))]
	}
	join := func(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
	head := sealed[:HeadSize]
	s0, s1, s2, s3 := segment(sealed, 0), segment(sealed, 1), segment(sealed, 2), segment(sealed, 3)
	empty := sealStream(t, h, aead, nil, nil)

	attacks := map[string][]byte{
		"last segment missing":            join(head, s0, s1, s2),
		"all but one missing":             join(head, s0),
		"no segment":                      head,
		"first segment missing":           join(head, s1, s2, s3),
		"middle segment missing":          join(head, s0, s2, s3),
		"two swapped":                     join(head, s1, s0, s2, s3),
		"last and first swapped":          join(head, s3, s1, s2, s0),
		"one twice":                       join(head, s0, s1, s1, s2, s3),
		"last twice":                      join(head, s0, s1, s2, s3, s3),
		"byte appended":                   join(sealed, []byte{0}),
		"segment appended":                join(sealed, s0),
		"empty segment appended":          join(sealed, empty[HeadSize:]),
		"stream appended":                 join(sealed, sealed),
		"segment of another stream":       join(head, segment(other, 0), s1, s2, s3),
		"head of another stream":          join(other[:HeadSize], s0, s1, s2, s3),
		"cut in the middle of a segment":  sealed[:len(sealed)-SealedSegmentSize/2],
		"cut by one byte":                 sealed[:len(sealed)-1],
		"cut in the tag of the last":      sealed[:len(sealed)-TagSize],
		"last segment made empty":         join(head, s0, s1, s2, s3[:TagSize]),
		"full last segment, one more tag": join(full, s3[:TagSize]),
	}
	for name, attack := range attacks {
		for _, one := range []bool{false, true} {
			r := io.Reader(bytes.NewReader(attack))
			if one {
				r = iotest.HalfReader(r)
			}
			head, _, err := ReadHead(r)
			if err != nil {
				t.Fatal(name, err)
			}
			key, err := Open(nil, aead, head, nil)
			if err != nil {
				t.Fatal(name, err)
			}
			reader, err := NewReader(r, head, key)
			if err != nil {
				t.Fatal(name, err)
			}
			got, err := io.ReadAll(reader)
			if !errors.Is(err, ErrDecryption) {
				t.Errorf("%s: %v", name, err)
			}
			if !bytes.HasPrefix(plaintext, got) || len(got)%SegmentSize != 0 {
				t.Errorf("%s: released %d bytes that are no whole segments of the beginning", name, len(got))
			}
			if _, again := reader.Read(make([]byte, 1)); !errors.Is(again, ErrDecryption) {
				t.Errorf("%s: a second read gives %v", name, again)
			}
		}
	}
}

// TestStreamBitFlips flips a bit of every byte of the head and of the tags, and of some bytes between.
func TestStreamBitFlips(t *testing.T) {
	aead := testKey(t, keyspec.ChaCha20Poly1305)
	plaintext := pattern(SegmentSize + 50)
	sealed := sealStream(t, Header{Format: DataKey, Algorithm: keyspec.ChaCha20Poly1305, Version: 1}, aead, plaintext, nil)
	step := 1009
	if testing.Short() {
		step = 10007
	}
	for i := 0; i < len(sealed); i++ {
		if middle := i - HeadSize; middle > 0 && middle < SegmentSize && middle%step != 0 {
			continue
		}
		changed := bytes.Clone(sealed)
		changed[i] ^= 1 << (i % 8)
		got, err := openStream(aead, changed, nil)
		if !errors.Is(err, ErrDecryption) && !errors.Is(err, ErrFormat) {
			t.Fatalf("byte %d: %v", i, err)
		}
		if i < HeadSize+SealedSegmentSize && len(got) > 0 {
			t.Fatalf("byte %d: %d bytes released", i, len(got))
		}
	}
}

// TestRewrap replaces the head by one of another key version: the segments open under it.
func TestRewrap(t *testing.T) {
	old, next := testKey(t, keyspec.AES256GCM), testKey(t, keyspec.AES256GCM)
	plaintext := pattern(2*SegmentSize + 1)
	h := Header{Format: Stream, Algorithm: keyspec.AES256GCM, Version: 1}
	sealed := sealStream(t, h, old, plaintext, []byte("aad"))
	key, err := Open(nil, old, sealed[:HeadSize], []byte("aad"))
	if err != nil {
		t.Fatal(err)
	}
	h.Version = 2
	head, err := Append(nil, h, next, key, []byte("aad"))
	if err != nil {
		t.Fatal(err)
	}
	got, err := openStream(next, append(head, sealed[HeadSize:]...), []byte("aad"))
	if err != nil || !bytes.Equal(got, plaintext) {
		t.Error(err)
	}
}

func TestAfterTheEnd(t *testing.T) {
	aead := testKey(t, keyspec.AES256GCM)
	head, key, err := AppendHead(nil, Header{Format: Stream, Algorithm: keyspec.AES256GCM, Version: 1}, aead, nil)
	if err != nil {
		t.Fatal(err)
	}
	sealer, err := NewSealer(head, key)
	if err != nil {
		t.Fatal(err)
	}
	last, err := sealer.Finish(nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := sealer.Update(nil, []byte("x")); err == nil {
		t.Error("Update after Finish")
	}
	if _, err := sealer.Finish(nil); err == nil {
		t.Error("Finish after Finish")
	}
	opener, err := NewOpener(head, key)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := opener.Update(nil, last); err != nil {
		t.Fatal(err)
	}
	if _, err := opener.Finish(nil); err != nil {
		t.Fatal(err)
	}
	if _, err := opener.Update(nil, last); !errors.Is(err, ErrDecryption) {
		t.Errorf("data after the last segment: %v", err)
	}
	full, err := NewSealer(head, key)
	if err != nil {
		t.Fatal(err)
	}
	full.next = MaxSegments
	if _, err := full.Finish(nil); !errors.Is(err, ErrTooLarge) {
		t.Errorf("segment 2^32: %v", err)
	}
	if _, err := NewSealer(head, key[:16]); err == nil {
		t.Error("short stream key")
	}
}

func TestWriterErrors(t *testing.T) {
	aead := testKey(t, keyspec.AES256GCM)
	head, key, err := AppendHead(nil, Header{Format: Stream, Algorithm: keyspec.AES256GCM, Version: 1}, aead, nil)
	if err != nil {
		t.Fatal(err)
	}
	w, err := NewWriter(&limited{n: HeadSize}, head, key)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(pattern(3 * SegmentSize)); !errors.Is(err, errFull) {
		t.Errorf("Write: %v", err)
	}
	if err := w.Close(); !errors.Is(err, errFull) {
		t.Errorf("Close: %v", err)
	}
	w, err = NewWriter(io.Discard, head, key)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
	if _, err := w.Write([]byte("x")); err == nil {
		t.Error("Write after Close")
	}
	broken := errors.New("broken")
	sealed := sealStream(t, Header{Format: Stream, Algorithm: keyspec.AES256GCM, Version: 1}, aead, pattern(10), nil)
	streamKey, err := Open(nil, aead, sealed[:HeadSize], nil)
	if err != nil {
		t.Fatal(err)
	}
	r, err := NewReader(io.MultiReader(bytes.NewReader(sealed[HeadSize:]), iotest.ErrReader(broken)), sealed[:HeadSize], streamKey)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(r); !errors.Is(err, broken) || len(got) > 0 {
		t.Errorf("%d bytes of a source that broke before its end, %v", len(got), err)
	}
}

var errFull = errors.New("full")

type limited struct{ n int }

func (l *limited) Write(p []byte) (int, error) {
	if l.n -= len(p); l.n < 0 {
		return 0, errFull
	}
	return len(p), nil
}

// goldenCases are files that earlier releases wrote. The keys are those of testKey, the additional data is the name of
// the file, the plaintext is pattern of the given length.
var goldenCases = []struct {
	format    Format
	algorithm keyspec.Algorithm
	version   keyspec.Version
	size      int
}{
	{Message, keyspec.AES128GCM, 1, 0},
	{Message, keyspec.AES256GCM, 2, 100},
	{Message, keyspec.ChaCha20Poly1305, 4294967295, 100},
	{Stream, keyspec.AES128GCM, 1, 0},
	{Stream, keyspec.AES256GCM, 2, SegmentSize},
	{Stream, keyspec.ChaCha20Poly1305, 3, SegmentSize + 1},
	{DataKey, keyspec.AES256GCM, 2, 1000},
}

// TestGolden opens what every release has written. New cases are added with -golden; a file is never changed.
func TestGolden(t *testing.T) {
	for _, c := range goldenCases {
		name := fmt.Sprintf("v1-%d-%s-%d-%d", c.format, c.algorithm, c.version, c.size)
		path := filepath.Join("testdata", name)
		aead := testKey(t, c.algorithm)
		h := Header{Format: c.format, Algorithm: c.algorithm, Version: c.version}
		if _, err := os.Stat(path); *golden && errors.Is(err, os.ErrNotExist) {
			sealed, err := Append(nil, h, aead, pattern(c.size), []byte(name))
			if c.format != Message {
				sealed, err = sealStream(t, h, aead, pattern(c.size), []byte(name)), nil
			}
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, sealed, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		sealed, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		parsed, err := ParseHeader(sealed)
		if err != nil {
			t.Fatal(name, err)
		}
		if parsed.Format != h.Format || parsed.Algorithm != h.Algorithm || parsed.Version != h.Version {
			t.Errorf("%s: header %+v", name, parsed)
		}
		if parsed.Segmented(sealed) != (c.format != Message) {
			t.Errorf("%s: Segmented is wrong", name)
		}
		var got []byte
		if c.format == Message {
			got, err = Open(nil, aead, sealed, []byte(name))
		} else {
			got, err = openStream(aead, sealed, []byte(name))
		}
		if err != nil || !bytes.Equal(got, pattern(c.size)) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzOpen(f *testing.F) {
	aead := testKey(f, keyspec.AES256GCM)
	message, err := AppendMessage(nil, keyspec.AES256GCM, 1, aead, []byte("plaintext"), []byte("aad"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(message, []byte("aad"))
	f.Add(sealStream(f, Header{Format: Stream, Algorithm: keyspec.AES256GCM, Version: 1}, aead, []byte("plaintext"), nil), []byte{})
	f.Fuzz(func(t *testing.T, sealed, aad []byte) {
		if plaintext, err := Open(nil, aead, sealed, aad); err == nil && string(plaintext) != "plaintext" && len(plaintext) != KeySize {
			t.Errorf("forged %q", plaintext)
		}
		if plaintext, err := openStream(aead, sealed, aad); err == nil && string(plaintext) != "plaintext" {
			t.Errorf("forged %q", plaintext)
		}
	})
}

// FuzzSegments lets the fuzzer cut a stream of five segments into pieces, drop and repeat them.
func FuzzSegments(f *testing.F) {
	aead := testKey(f, keyspec.AES256GCM)
	plaintext := pattern(5*SegmentSize - 3)
	sealed := sealStream(f, Header{Format: Stream, Algorithm: keyspec.AES256GCM, Version: 1}, aead, plaintext, nil)
	key, err := Open(nil, aead, sealed[:HeadSize], nil)
	if err != nil {
		f.Fatal(err)
	}
	body := sealed[HeadSize:]
	f.Add([]byte{0, 1, 2, 3, 4})
	f.Add([]byte{0, 1, 1, 3, 4})
	f.Add([]byte{4})
	f.Fuzz(func(t *testing.T, order []byte) {
		opener, err := NewOpener(sealed[:HeadSize], key)
		if err != nil {
			t.Fatal(err)
		}
		var got, fed []byte
		for _, i := range order[:min(len(order), 10)] {
			begin := int(i%5) * SealedSegmentSize
			piece := body[begin:min(begin+SealedSegmentSize-int(i/5), len(body))]
			fed = append(fed, piece...)
			if got, err = opener.Update(got, piece); err != nil {
				break
			}
		}
		if err == nil {
			got, err = opener.Finish(got)
		}
		if err == nil && !bytes.Equal(fed, body) {
			t.Errorf("order %v opened", order)
		}
		if err == nil && !bytes.Equal(got, plaintext) {
			t.Error("wrong plaintext")
		}
	})
}

func BenchmarkWriter(b *testing.B) {
	aead := testKey(b, keyspec.AES256GCM)
	head, key, err := AppendHead(nil, Header{Format: DataKey, Algorithm: keyspec.AES256GCM, Version: 1}, aead, nil)
	if err != nil {
		b.Fatal(err)
	}
	w, err := NewWriter(io.Discard, head, key)
	if err != nil {
		b.Fatal(err)
	}
	chunk := make([]byte, 1<<20)
	b.SetBytes(int64(len(chunk)))
	for b.Loop() {
		if _, err := w.Write(chunk); err != nil {
			b.Fatal(err)
		}
	}
}
