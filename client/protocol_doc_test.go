package client_test

import (
	"encoding/hex"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"reflect"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

func readDocument(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile("../docs/protocol.md")
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// sections returns the text under each "### op" and "#### op" heading.
func sections(document string) map[string]string {
	heading := regexp.MustCompile(`(?m)^#{1,4} (.*)$`)
	found := heading.FindAllStringSubmatchIndex(document, -1)
	out := make(map[string]string)
	for i, m := range found {
		end := len(document)
		if i+1 < len(found) {
			end = found[i+1][0]
		}
		out[document[m[2]:m[3]]] = document[m[1]:end]
	}
	return out
}

// TestProtocolDocument checks that docs/protocol.md knows every operation with every field, every error code, and every
// word of the vocabulary.
func TestProtocolDocument(t *testing.T) {
	document := readDocument(t)
	section := sections(document)
	for _, body := range proto.Bodies() {
		text, ok := section[body.Op]
		if !ok {
			t.Errorf("operation %s has no heading", body.Op)
			continue
		}
		for _, m := range []proto.Message{body.Params(), body.Result()} {
			fill(reflect.ValueOf(m).Elem())
			encoded, err := proto.AppendParams(nil, m)
			if err != nil {
				t.Fatalf("%s: %v", body.Op, err)
			}
			for _, field := range mapKeys(t, encoded) {
				if !mentions(document, text, reflect.TypeOf(m).Elem().Name(), field) {
					t.Errorf("%s: field %s of %s is not described", body.Op, field, reflect.TypeOf(m).Elem().Name())
				}
			}
		}
	}
	for _, code := range codes(t) {
		if !strings.Contains(document, "| `"+code+"` |") {
			t.Errorf("error code %s is not described", code)
		}
	}
	for _, word := range vocabulary() {
		if !strings.Contains(document, "`"+word+"`") {
			t.Errorf("%s is not described", word)
		}
	}
	for _, limit := range []int{proto.MaxControlFrame, proto.MaxDataFrame, proto.MaxData, proto.MaxChunk} {
		if !strings.Contains(strings.ReplaceAll(document, ",", ""), strconv.Itoa(limit)) {
			t.Errorf("limit %d is not described", limit)
		}
	}
}

// mentions reports whether the section of the operation describes the field, or names the table that does.
func mentions(document, text, message, field string) bool {
	quoted := "`" + field + "`"
	if strings.Contains(text, quoted) {
		return true
	}
	table := map[string]string{"KeyInfo": "*KeyInfo*", "KeyCreate": "*KeyCreate*", "Identity": "*Identity*", "Machine": "*Machine*"}[message]
	return table != "" && strings.Contains(text, table) && strings.Contains(document, quoted)
}

// fill sets every field, so that all are written.
func fill(v reflect.Value) {
	switch v.Kind() {
	case reflect.Struct:
		for i := range v.NumField() {
			fill(v.Field(i))
		}
	case reflect.String:
		v.SetString("x")
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Uint32, reflect.Uint64:
		v.SetUint(1)
	case reflect.Int64:
		v.SetInt(1)
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 1, 1))
		if v.Type().Elem().Kind() != reflect.Uint8 {
			fill(v.Index(0))
		}
	case reflect.Map:
		v.Set(reflect.ValueOf(map[string]string{"k": "v"}))
	case reflect.Pointer: // the error of a batch result, which excludes its result
	}
}

// mapKeys returns the keys of the outermost map of an encoded message.
func mapKeys(t *testing.T, b []byte) []string {
	t.Helper()
	var keys []string
	n, b := containerSize(t, b)
	for range n {
		var key string
		key, b = takeString(t, b)
		keys = append(keys, key)
		b = skipValue(t, b)
	}
	return keys
}

func containerSize(t *testing.T, b []byte) (int, []byte) {
	t.Helper()
	switch c := b[0]; {
	case c >= 0x80 && c <= 0x9f:
		return int(c & 0x0f), b[1:]
	case c == 0xde || c == 0xdc:
		return int(b[1])<<8 | int(b[2]), b[3:]
	}
	t.Fatalf("no container: %x", b[0])
	return 0, nil
}

func takeString(t *testing.T, b []byte) (string, []byte) {
	t.Helper()
	if b[0]&0xe0 != 0xa0 {
		t.Fatalf("no short string: %x", b[0])
	}
	n := int(b[0] & 0x1f)
	return string(b[1 : 1+n]), b[1+n:]
}

func skipValue(t *testing.T, b []byte) []byte {
	t.Helper()
	switch c := b[0]; {
	case c <= 0x7f || c >= 0xc0 && c <= 0xc3:
		return b[1:]
	case c&0xe0 == 0xa0:
		return b[1+int(c&0x1f):]
	case c == 0xc4: // bin 8
		return b[2+int(b[1]):]
	case c&0xf0 == 0x80, c == 0xde, c&0xf0 == 0x90, c == 0xdc:
		n, rest := containerSize(t, b)
		if c&0xf0 == 0x80 || c == 0xde {
			n *= 2
		}
		for range n {
			rest = skipValue(t, rest)
		}
		return rest
	}
	t.Fatalf("code %x", b[0])
	return nil
}

// codes reads the error codes from their declaration, so that a new one cannot be forgotten.
func codes(t *testing.T) []string {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), "../ipc/proto/errors.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	ast.Inspect(file, func(n ast.Node) bool {
		spec, ok := n.(*ast.ValueSpec)
		if ok && strings.HasPrefix(spec.Names[0].Name, "Code") {
			value, err := strconv.Unquote(spec.Values[0].(*ast.BasicLit).Value)
			if err != nil {
				t.Fatal(err)
			}
			found = append(found, value)
		}
		return true
	})
	if len(found) < 30 {
		t.Fatalf("only %d codes were found", len(found))
	}
	return found
}

func vocabulary() []string {
	var words []string
	for _, w := range keyspec.Algorithms() {
		words = append(words, string(w))
	}
	for _, w := range keyspec.Schemes() {
		words = append(words, string(w))
	}
	for _, w := range keyspec.States() {
		words = append(words, string(w))
	}
	for _, w := range keyspec.Reasons() {
		words = append(words, string(w))
	}
	return words
}

// TestProtocolDocumentFrames checks the frames that the document shows.
func TestProtocolDocumentFrames(t *testing.T) {
	request, err := proto.AppendRequest(nil, 1, proto.OpPing, &proto.Empty{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	response, err := proto.AppendResponse(nil, 1, nil, &proto.Empty{})
	if err != nil {
		t.Fatal(err)
	}
	document := strings.ReplaceAll(readDocument(t), " ", "")
	for _, frame := range [][]byte{request, response} {
		if !strings.Contains(document, hex.EncodeToString(frame)) {
			t.Errorf("frame %x is not in the document", frame)
		}
	}
}
