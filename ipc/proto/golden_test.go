package proto

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"unicode"
)

// The golden files hold the frames of every release. A new release adds a file; no line of an old one ever changes:
//
//	go test ./ipc/proto -run TestGolden -write testdata/v2.golden
var write = flag.String("write", "", "write the golden frames of this release to `file`")

// goldenFrame is one line of a golden file: "request OP HEX", "reply OP HEX" or "error OP HEX", with the length word.
type goldenFrame struct{ kind, op, hex string }

func readGolden(t *testing.T, path string) (frames []goldenFrame) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		if line := lines.Text(); line != "" && line[0] != '#' {
			words := strings.Fields(line)
			if len(words) != 3 {
				t.Fatalf("%s: bad line %q", path, line)
			}
			frames = append(frames, goldenFrame{words[0], words[1], words[2]})
		}
	}
	if err := lines.Err(); err != nil {
		t.Fatal(err)
	}
	return frames
}

func TestGolden(t *testing.T) {
	if *write != "" {
		writeGolden(t, *write)
	}
	files, err := filepath.Glob("testdata/*.golden")
	if err != nil || len(files) == 0 {
		t.Fatalf("no golden files: %v", err)
	}
	for _, path := range files {
		seen := make(map[string]bool)
		for _, g := range readGolden(t, path) {
			seen[g.kind+" "+g.op] = true
			want, err := hex.DecodeString(g.hex)
			if err != nil {
				t.Fatal(err)
			}
			if got, err := again(g, want); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%s: %s of %s: %v\n got %x\nwant %x", path, g.kind, g.op, err, got, want)
			}
		}
		if path != "testdata/v1.golden" {
			continue
		}
		for _, op := range Ops() {
			if !seen["request "+op] || !seen["reply "+op] {
				t.Errorf("%s lacks the frames of %s", path, op)
			}
		}
	}
}

// again decodes a frame and encodes what it found.
func again(g goldenFrame, frame []byte) ([]byte, error) {
	if int(binary.BigEndian.Uint32(frame)) != len(frame)-lengthSize {
		return nil, fmt.Errorf("length word")
	}
	body, ok := Lookup(g.op)
	if !ok {
		return nil, fmt.Errorf("unknown operation")
	}
	if g.kind == "request" {
		r, err := ParseRequest(frame[lengthSize:])
		if err != nil {
			return nil, err
		}
		m := body.Params()
		if err := Decode(r.Params, m); err != nil {
			return nil, err
		}
		return AppendRequest(nil, r.ID, r.Op, m, &r.Options)
	}
	r, err := ParseResponse(frame[lengthSize:])
	if err != nil {
		return nil, err
	}
	if r.Err != nil {
		return AppendResponse(nil, r.ID, r.Err, nil)
	}
	m := body.Result()
	if err := DecodeReply(r.Result, m); err != nil {
		return nil, err
	}
	return AppendResponse(nil, r.ID, nil, m)
}

func writeGolden(t *testing.T, path string) {
	var out bytes.Buffer
	fmt.Fprintf(&out, "# Frames of protocol version %d, with their length words, in hexadecimal. Never change a line.\n", Version)
	emit := func(comment, kind, op string, frame []byte, err error) {
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&out, "\n# %s\n%s %s %x\n", comment, kind, op, frame)
	}
	for i, b := range Bodies() {
		id := uint64(1) << (i % 64) // every width of an integer
		params, result := b.Params(), b.Result()
		fill(params)
		fill(result)
		frame, err := AppendRequest(nil, id, b.Op, params, nil)
		emit(fmt.Sprintf("%s: %T with every field set", b.Op, params), "request", b.Op, frame, err)
		frame, err = AppendResponse(nil, id, nil, result)
		emit(fmt.Sprintf("%s: %T with every field set", b.Op, result), "reply", b.Op, frame, err)
	}
	frame, err := AppendRequest(nil, 7, OpSign, &Sign{Key: "REGISTRATION/10001_110011@3", Digest: make([]byte, 32)},
		&Options{DeadlineMS: 1500, RequestKey: []byte("0123456789abcdef"), Trace: "trace-1"})
	emit("a request with every option", "request", OpSign, frame, err)
	frame, err = AppendResponse(nil, 7, nil, &Empty{})
	emit("the smallest reply", "reply", OpPing, frame, err)
	e := new(Error)
	fill(e)
	frame, err = AppendResponse(nil, 7, e, nil)
	emit("an error with every field set", "error", OpSign, frame, err)
	frame, err = AppendResponse(nil, 7, &Error{Code: CodeNotAvailable, Class: ClassPolicy, Message: "key not available"}, nil)
	emit("the error for a key that is missing or not granted", "error", OpSign, frame, err)
	if err := os.WriteFile(path, out.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
}

// fill gives every field of a message a value that is not zero and tells its field.
func fill(m Message) { fillValue(reflect.ValueOf(m).Elem(), "x") }

func fillValue(v reflect.Value, name string) {
	switch v.Kind() {
	case reflect.Struct:
		for i := range v.NumField() {
			fillValue(v.Field(i), wireName(v.Type().Field(i).Name))
		}
	case reflect.Pointer:
		return // the error of a batch item excludes its result
	case reflect.String:
		v.SetString(name)
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Uint32, reflect.Uint64:
		v.SetUint(uint64(100 * len(name)))
	case reflect.Int64:
		v.SetInt(-int64(1) << (3 * len(name)))
	case reflect.Slice:
		switch v.Type().Elem().Kind() {
		case reflect.Uint8:
			n := 16 // nonces and tokens have this length
			v.SetBytes(bytes.Repeat([]byte{byte(len(name))}, n))
		default:
			v.Set(reflect.MakeSlice(v.Type(), 2, 2))
			for i := range 2 {
				fillValue(v.Index(i), fmt.Sprintf("%s%d", name, i))
			}
		}
	case reflect.Map:
		v.Set(reflect.ValueOf(map[string]string{"b": "2", "a": "1"}))
	default:
		panic(v.Kind())
	}
}

// wireName is the law of names on the wire: snake case of the name in Go.
func wireName(field string) string {
	if special, ok := map[string]string{"SPKISHA256": "spki_sha256", "CKAID": "cka_id", "SSHSHA256": "ssh_sha256", "RetryAfterMS": "retry_after_ms"}[field]; ok {
		return special
	}
	var b strings.Builder
	runes := []rune(field)
	for i, r := range runes {
		if unicode.IsUpper(r) && i > 0 && (unicode.IsLower(runes[i-1]) || i+1 < len(runes) && unicode.IsLower(runes[i+1])) {
			b.WriteByte('_')
		}
		b.WriteRune(unicode.ToLower(r))
	}
	return b.String()
}

// TestFieldsAreComplete finds fields that a message has but its codec forgot, or calls by another name.
func TestFieldsAreComplete(t *testing.T) {
	messages := []Message{&Error{}, &Options{}, &Limits{}, &Identity{}, &Slot{}, &KeyInfo{}, &VersionInfo{}, &Subject{}, &CertProfile{},
		&Capability{}, &SelfTestResult{}, &AuditEntry{}, &BatchItem{}}
	for _, b := range Bodies() {
		messages = append(messages, b.Params(), b.Result())
	}
	for _, m := range messages {
		fill(m)
		encoded, err := AppendParams(nil, m)
		if err != nil {
			t.Fatalf("%T: %v", m, err)
		}
		copied := reflect.New(reflect.TypeOf(m).Elem()).Interface().(Message)
		if err := Decode(encoded, copied); err != nil {
			t.Fatalf("%T: %v", m, err)
		}
		if !reflect.DeepEqual(m, copied) {
			t.Errorf("%T came back as %+v", m, copied)
		}
		f := newDecoder(encoded, false)
		keys := make(map[string]bool)
		for n := f.mapLen(64); n > 0; n-- {
			keys[string(f.blob(isString, "key", maxKey))] = true
			f.skip(maxDepth)
		}
		f.free()
		for i := range reflect.TypeOf(m).Elem().NumField() {
			name := wireName(reflect.TypeOf(m).Elem().Field(i).Name)
			if !keys[name] {
				t.Errorf("%T has no key %q", m, name)
			}
			delete(keys, name)
		}
		if len(keys) > 0 {
			t.Errorf("%T has the keys %v besides", m, keys)
		}
	}
}
