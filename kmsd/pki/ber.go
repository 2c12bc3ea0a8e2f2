package pki

import "fmt"

// Tags of BER elements, with class and form.
const (
	tagSequence = 0x30
	tagSet      = 0x31
	tagContext0 = 0xa0
	tagContext1 = 0xa1
)

// berDepth bounds elements of indefinite length inside one another.
const berDepth = 8

// ber is an element in BER (X.690 section 8). Nothing is encoded again: what has to be DER inside, a certificate, stays byte
// for byte what it was.
type ber struct {
	tag     byte
	content []byte // without the end-of-contents octets
	full    []byte
}

// readBER reads the element at the start of data: tags of one byte, definite lengths of up to four, and indefinite ones as
// deep as depth. Errors wrap ErrPKCS7.
func readBER(data []byte, depth int) (e ber, rest []byte, err error) {
	damaged := fmt.Errorf("%w: it is damaged", ErrPKCS7)
	if len(data) < 2 || data[0]&0x1f == 0x1f || data[0] == 0 {
		return ber{}, nil, damaged
	}
	e.tag = data[0]
	header, length := 2, int(data[1])
	switch {
	case length < 0x80:
	case length == 0x80:
		return readIndefinite(data, depth)
	default:
		n := length & 0x7f
		if n > 4 || len(data) < 2+n {
			return ber{}, nil, damaged
		}
		var long uint64
		for _, b := range data[2 : 2+n] {
			long = long<<8 | uint64(b)
		}
		if long > uint64(len(data)) {
			return ber{}, nil, damaged
		}
		header, length = 2+n, int(long)
	}
	if length > len(data)-header {
		return ber{}, nil, damaged
	}
	e.content, e.full = data[header:header+length], data[:header+length]
	return e, data[header+length:], nil
}

// readIndefinite reads an element whose end is marked by two zero bytes.
func readIndefinite(data []byte, depth int) (e ber, rest []byte, err error) {
	if data[0]&0x20 == 0 || depth == 0 {
		return ber{}, nil, fmt.Errorf("%w: an indefinite length where none may be, or too deep", ErrPKCS7)
	}
	for rest = data[2:]; ; {
		if len(rest) >= 2 && rest[0] == 0 && rest[1] == 0 {
			end := len(data) - len(rest)
			return ber{data[0], data[2:end], data[:end+2]}, rest[2:], nil
		}
		if _, rest, err = readBER(rest, depth-1); err != nil {
			return ber{}, nil, err
		}
	}
}

// berList reads elements one after the other.
func berList(data []byte) ([]ber, error) {
	var list []ber
	for len(data) > 0 {
		e, rest, err := readBER(data, berDepth)
		if err != nil {
			return nil, err
		}
		if list = append(list, e); len(list) > 2*MaxBundle {
			return nil, fmt.Errorf("%w: too many elements", ErrPKCS7)
		}
		data = rest
	}
	return list, nil
}

// berChildren reads the elements inside the one element that data is, which has the tag.
func berChildren(data []byte, tag byte) ([]ber, error) {
	e, rest, err := readBER(data, berDepth)
	if err != nil {
		return nil, err
	}
	if e.tag != tag || len(rest) > 0 {
		return nil, fmt.Errorf("%w: it is damaged", ErrPKCS7)
	}
	return berList(e.content)
}
