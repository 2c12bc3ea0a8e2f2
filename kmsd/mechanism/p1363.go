package mechanism

import (
	"bytes"
	"crypto/elliptic"
	"fmt"
)

// maxDERSignature is the length of the longest ECDSA signature in DER: both integers 66 bytes and a zero before them.
const maxDERSignature = 3 + 2*(2+1+66)

// AppendP1363 appends to dst the ECDSA signature der as r || s, each size bytes. Only DER is taken: minimal lengths,
// minimal positive integers, nothing after the end. Errors wrap ErrInput.
func AppendP1363(dst, der []byte, size int) ([]byte, error) {
	if len(der) > maxDERSignature {
		return nil, errDERSignature
	}
	body, rest, ok := cutDER(der, 0x30)
	if !ok || len(rest) > 0 {
		return nil, errDERSignature
	}
	for range 2 {
		var integer []byte
		if integer, body, ok = cutDER(body, 0x02); !ok {
			return nil, errDERSignature
		}
		switch {
		case len(integer) == 0, integer[0] >= 0x80: // empty, negative
			return nil, errDERSignature
		case integer[0] == 0 && (len(integer) == 1 || integer[1] < 0x80): // zero, not minimal
			return nil, errDERSignature
		case integer[0] == 0:
			integer = integer[1:]
		}
		if len(integer) > size {
			return nil, errDERSignature
		}
		for range size - len(integer) {
			dst = append(dst, 0)
		}
		dst = append(dst, integer...)
	}
	if len(body) > 0 {
		return nil, errDERSignature
	}
	return dst, nil
}

// AppendDER appends to dst the ECDSA signature r || s, each size bytes, as DER. Errors wrap ErrInput.
func AppendDER(dst, p1363 []byte, size int) ([]byte, error) {
	if size <= 0 || size > 66 || len(p1363) != 2*size {
		return nil, fmt.Errorf("%w: an r||s signature of this curve has %d bytes", ErrInput, 2*size)
	}
	r := bytes.TrimLeft(p1363[:size], "\x00")
	s := bytes.TrimLeft(p1363[size:], "\x00")
	if len(r) == 0 || len(s) == 0 {
		return nil, fmt.Errorf("%w: r and s are positive", ErrInput)
	}
	length := derIntegerLen(r) + derIntegerLen(s)
	dst = append(dst, 0x30)
	if length >= 0x80 {
		dst = append(dst, 0x81)
	}
	dst = append(dst, byte(length))
	return appendDERInteger(appendDERInteger(dst, r), s), nil
}

var errDERSignature = fmt.Errorf("%w: not an ECDSA signature in DER", ErrInput)

// cutDER returns the body of the DER value with the tag at the start of b, and what follows it. Lengths of up to two
// bytes suffice for everything this package parses by hand.
func cutDER(b []byte, tag byte) (body, rest []byte, ok bool) {
	if len(b) < 2 || b[0] != tag {
		return nil, nil, false
	}
	length, b := int(b[1]), b[2:]
	switch {
	case length == 0x81:
		if len(b) < 1 || b[0] < 0x80 {
			return nil, nil, false
		}
		length, b = int(b[0]), b[1:]
	case length >= 0x80:
		return nil, nil, false
	}
	if len(b) < length {
		return nil, nil, false
	}
	return b[:length], b[length:], true
}

func derIntegerLen(magnitude []byte) int { return 2 + len(magnitude) + int(magnitude[0]>>7) }

func appendDERInteger(dst, magnitude []byte) []byte {
	dst = append(dst, 0x02, byte(len(magnitude)+int(magnitude[0]>>7)))
	if magnitude[0] >= 0x80 {
		dst = append(dst, 0)
	}
	return append(dst, magnitude...)
}

// curveSize returns the length of a scalar in bytes of the curves that kmsd signs with.
func curveSize(c elliptic.Curve) (int, error) {
	switch c {
	case p256.elliptic, k256.elliptic:
		return 32, nil
	case p384.elliptic:
		return 48, nil
	case p521.elliptic:
		return 66, nil
	}
	return 0, fmt.Errorf("%w: the curve is not P-256, P-384, P-521 or secp256k1", ErrUnsupported)
}
