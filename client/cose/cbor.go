package cose

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strconv"

	"github.com/fxamacker/cbor/v2"
)

// The CBOR is that of fxamacker/cbor. veraison/go-cose, which is built on it too, is not used: it refuses content types that
// MOSIP writes, builds headers before it knows how large they are, takes ES256 with any curve, and has no RS256, which is what
// MOSIP signs with by default.

// decoder reads CBOR as the invariants of this package want it: integers are int64, maps are map[any]any, and tags are refused.
// splitter is the one for the outermost map or array, whose items may have tags.
var (
	decoder  = newDecoder(cbor.TagsForbidden)
	splitter = newDecoder(cbor.TagsAllowed)
	encoder  = newEncoder()
)

func newDecoder(tags cbor.TagsMode) cbor.DecMode {
	m, err := cbor.DecOptions{
		DupMapKey:        cbor.DupMapKeyEnforcedAPF,
		IndefLength:      cbor.IndefLengthForbidden,
		IntDec:           cbor.IntDecConvertSignedOrFail,
		TagsMd:           tags,
		MaxNestedLevels:  maxNesting,
		MaxArrayElements: maxElements,
		MaxMapPairs:      maxElements,
	}.DecMode()
	if err != nil {
		panic(err)
	}
	return m
}

// newEncoder returns the core deterministic encoding of RFC 8949 section 4.2.1, but for floating-point numbers, which keep their
// 64 bits as MOSIP writes them.
func newEncoder() cbor.EncMode {
	m, err := cbor.EncOptions{Sort: cbor.SortCoreDeterministic, IndefLength: cbor.IndefLengthForbidden}.EncMode()
	if err != nil {
		panic(err)
	}
	return m
}

// Major types of CBOR (RFC 8949 section 3.1).
const (
	majorBytes = 2
	majorArray = 4
	majorMap   = 5
)

// isMajor reports whether the first item in b is of a major type. Decoding alone would take null for anything.
func isMajor(b []byte, major byte) bool {
	return len(b) > 0 && b[0]>>5 == major
}

// malformed turns an error of the decoder into one of ours that is short whatever the message was.
func malformed(what string, err error) error {
	var tags *cbor.TagsMdError
	var twice *cbor.DupMapKeyError
	switch {
	case errors.As(err, &tags):
		return fmt.Errorf("%w: %s with a tag", ErrUnsupported, what)
	case errors.As(err, &twice):
		return fmt.Errorf("%w: %s with a key twice", ErrFormat, what)
	}
	return fmt.Errorf("%w: %s: %w", ErrFormat, what, err)
}

// printed returns a label as errors show it.
func printed(label any) string {
	if s, ok := label.(string); ok {
		return fmt.Sprintf("%.40q", s)
	}
	if n, ok := label.(int64); ok {
		return strconv.FormatInt(n, 10)
	}
	return fmt.Sprintf("of type %T", label)
}

// decode decodes one item without tags.
func decode(b []byte, to any, what string) error {
	if err := decoder.Unmarshal(b, to); err != nil {
		return malformed(what, err)
	}
	return nil
}

// decodeBytes decodes a byte string, which is never nil.
func decodeBytes(b []byte, what string) ([]byte, error) {
	if !isMajor(b, majorBytes) {
		return nil, fmt.Errorf("%w: %s is no byte string", ErrFormat, what)
	}
	var v []byte
	if err := decode(b, &v, what); err != nil {
		return nil, err
	}
	return slices.Concat([]byte{}, v), nil
}

// decodeText decodes a text string.
func decodeText(b []byte, what string) (string, error) {
	var v any
	if err := decode(b, &v, what); err != nil {
		return "", err
	}
	s, ok := v.(string)
	if !ok {
		return "", fmt.Errorf("%w: %s is no text", ErrFormat, what)
	}
	return s, nil
}

// decodeMap splits a map whose keys are int64 or string, as those of headers and claims are, and leaves the values as they are.
func decodeMap(b []byte, what string) (map[any]cbor.RawMessage, error) {
	if !isMajor(b, majorMap) {
		return nil, fmt.Errorf("%w: %s is no map", ErrFormat, what)
	}
	var m map[any]cbor.RawMessage
	if err := splitter.Unmarshal(b, &m); err != nil {
		return nil, malformed(what, err)
	}
	for key := range m {
		switch key.(type) {
		case int64, string:
		default:
			return nil, fmt.Errorf("%w: %s has a label that is neither integer nor text", ErrFormat, what)
		}
	}
	return m, nil
}

// decodeRest decodes the values that nothing was known about. It returns nil for none.
func decodeRest(m map[any]cbor.RawMessage, what string) (map[any]any, error) {
	if len(m) == 0 {
		return nil, nil
	}
	rest := make(map[any]any, len(m))
	for key, raw := range m {
		var v any
		if err := decode(raw, &v, what+" "+printed(key)); err != nil {
			return nil, err
		}
		rest[key] = v
	}
	return rest, nil
}

// addRest puts further labels into a map that is going to be encoded. reserved are those that have a field of their own.
func addRest(m, rest map[any]any, reserved []int64, what string) error {
	for key, v := range rest {
		switch n := key.(type) {
		case int:
			key = int64(n)
		case int64, string:
		default:
			return fmt.Errorf("%w: a further %s under a %T; int64 or string", ErrFormat, what, key)
		}
		if n, ok := key.(int64); ok && slices.Contains(reserved, n) {
			return fmt.Errorf("%w: %d is not a further %s", ErrFormat, n, what)
		}
		if _, ok := m[key]; ok {
			return fmt.Errorf("%w: %s %s twice", ErrFormat, what, printed(key))
		}
		m[key] = v
	}
	return nil
}

// withoutTag returns what a tag with a number below 2^8 in its shortest encoding is around, and whether there is that tag.
func withoutTag(b []byte, number byte) ([]byte, bool) {
	if number < 24 {
		return bytes.CutPrefix(b, []byte{6<<5 | number})
	}
	return bytes.CutPrefix(b, []byte{6<<5 | 24, number})
}
