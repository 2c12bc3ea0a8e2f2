package cms

import "fmt"

// maxDepth bounds elements within each other. The deepest that is needed, an attribute in a time-stamp in a signature, has some 20.
const maxDepth = 40

// toDER returns the encoding of the element at the start of data with definite lengths in their shortest form: other programs write
// indefinite lengths and strings in pieces (X.690 section 8). Of what is DER nothing changes. What follows the element has to be zeros: in a PDF
// document they fill the space that was left for the signature.
func toDER(data []byte) ([]byte, error) {
	der, rest, err := appendDER(make([]byte, 0, len(data)), data, maxDepth)
	if err != nil {
		return nil, err
	}
	for _, b := range rest {
		if b != 0 {
			return nil, fmt.Errorf("%w: something follows it", ErrFormat)
		}
	}
	return der, nil
}

// appendDER appends the element at the start of data to dst.
func appendDER(dst, data []byte, depth int) (der, rest []byte, err error) {
	damaged := fmt.Errorf("%w: it is damaged", ErrFormat)
	if len(data) < 2 || data[0]&0x1f == 0x1f || data[0] == 0 || depth == 0 {
		return nil, nil, damaged
	}
	tag, length, content := data[0], int(data[1]), data[2:]
	indefinite := length == 0x80
	switch {
	case indefinite && tag&0x20 == 0:
		return nil, nil, damaged
	case indefinite:
	case length > 0x80:
		n := length & 0x7f
		if n > 4 || len(content) < n {
			return nil, nil, damaged
		}
		var long uint64
		for _, b := range content[:n] {
			long = long<<8 | uint64(b)
		}
		if content = content[n:]; long > uint64(len(content)) {
			return nil, nil, damaged
		}
		length = int(long)
		fallthrough
	default:
		if length > len(content) {
			return nil, nil, damaged
		}
		content, rest = content[:length], content[length:]
	}
	if tag&0x20 == 0 {
		return append(appendHeader(dst, tag, len(content)), content...), rest, nil
	}
	// The elements inside, one after the other, up to the end of the content or to the mark of the end.
	var inside []byte
	inPieces := tag == 0x24 // an OCTET STRING
	for {
		if indefinite && len(content) >= 2 && content[0] == 0 && content[1] == 0 {
			rest = content[2:]
			break
		}
		if !indefinite && len(content) == 0 {
			break
		}
		before := len(inside)
		if inPieces && (len(content) == 0 || content[0] != 0x04 && content[0] != 0x24) {
			return nil, nil, damaged
		}
		if inside, content, err = appendDER(inside, content, depth-1); err != nil {
			return nil, nil, err
		}
		if inPieces {
			inside = append(inside[:before], withoutHeader(inside[before:])...)
		}
	}
	if inPieces {
		tag = 0x04
	}
	return append(appendHeader(dst, tag, len(inside)), inside...), rest, nil
}

// appendHeader appends tag and length in DER.
func appendHeader(dst []byte, tag byte, length int) []byte {
	dst = append(dst, tag)
	switch {
	case length < 0x80:
		return append(dst, byte(length))
	case length < 1<<8:
		return append(dst, 0x81, byte(length))
	case length < 1<<16:
		return append(dst, 0x82, byte(length>>8), byte(length))
	}
	return append(dst, 0x83, byte(length>>16), byte(length>>8), byte(length)) // MaxSignature has 21 bits
}

// withoutHeader returns the content of an element that appendDER wrote.
func withoutHeader(der []byte) []byte {
	if der[1] < 0x80 {
		return der[2:]
	}
	return der[2+der[1]&0x7f:]
}
