package pkcs12

import (
	"encoding/binary"

	"golang.org/x/crypto/cryptobyte"
	casn1 "golang.org/x/crypto/cryptobyte/asn1"
)

// BouncyCastle writes PKCS#12 in BER: lengths that are only known at the end, and strings in pieces. toDER writes the same in DER, as far as
// the reader needs it: it does not order sets.

const maxNesting = 48

// toDER returns the one element of b in DER, with its lengths known and its strings in one piece.
func toDER(b []byte) ([]byte, error) {
	out, rest, err := definite(b, 0)
	if err != nil {
		return nil, err
	}
	if len(rest) > 0 {
		return nil, malformed("something after its end")
	}
	return out, nil
}

// definite rewrites the first element of b and returns what is behind it.
func definite(b []byte, depth int) (out, rest []byte, err error) {
	if depth > maxNesting {
		return nil, nil, malformed("nested too deeply")
	}
	if len(b) < 2 || b[0]&0x1f == 0x1f {
		return nil, nil, malformed("no ASN.1")
	}
	tag := b[0]
	content, rest, indefinite, ok := element(b)
	if !ok {
		return nil, nil, malformed("length of an element")
	}
	if tag&0x20 == 0 {
		if indefinite {
			return nil, nil, malformed("length of an element")
		}
		return wrap(tag, content), rest, nil
	}
	var inner []byte
	for {
		if indefinite {
			if len(content) >= 2 && content[0] == 0 && content[1] == 0 {
				rest = content[2:]
				break
			}
		} else if len(content) == 0 {
			break
		}
		var part []byte
		if part, content, err = definite(content, depth+1); err != nil {
			return nil, nil, err
		}
		if inString(tag) {
			in := cryptobyte.String(part)
			var piece cryptobyte.String
			if !in.ReadASN1(&piece, casn1.OCTET_STRING) {
				return nil, nil, malformed("a string in pieces")
			}
			part = piece
		}
		inner = append(inner, part...)
	}
	if inString(tag) {
		tag &^= 0x20
	}
	return wrap(tag, inner), rest, nil
}

// inString reports whether a constructed element is a string in pieces: an OCTET STRING, here.
func inString(tag byte) bool { return tag == 0x24 }

// element returns the content of the first element, up to the end of b when its length is not known.
func element(b []byte) (content, rest []byte, indefinite, ok bool) {
	n := int(b[1])
	b = b[2:]
	switch {
	case n == 0x80:
		return b, nil, true, true
	case n > 0x80:
		size := n & 0x7f
		if size > 4 || len(b) < size {
			return nil, nil, false, false
		}
		n = 0
		for _, c := range b[:size] {
			n = n<<8 | int(c)
		}
		b = b[size:]
	}
	if n > len(b) {
		return nil, nil, false, false
	}
	return b[:n], b[n:], false, true
}

// wrap writes an element.
func wrap(tag byte, content []byte) []byte {
	n := len(content)
	out := make([]byte, 0, n+6)
	out = append(out, tag)
	switch {
	case n < 0x80:
		out = append(out, byte(n))
	case n < 1<<8:
		out = append(out, 0x81, byte(n))
	case n < 1<<16:
		out = append(out, 0x82, byte(n>>8), byte(n))
	case n < 1<<24:
		out = append(out, 0x83, byte(n>>16), byte(n>>8), byte(n))
	default:
		out = binary.BigEndian.AppendUint32(append(out, 0x84), uint32(n))
	}
	return append(out, content...)
}
