package recovery

import (
	"crypto/subtle"
	"fmt"
)

// content is what the printed form says, 30 bytes:
//
//	kind and version (1) | id (4) | threshold (1) | index (1) | value (20) | checksum (3)
//
// Thirty bytes are 48 characters of five bits; six of them and a check character make a group. The first byte is chosen so that the
// first character is K or S; its lower three bits are the version, 1.
type content struct {
	kind      byte
	id        [4]byte
	threshold byte
	index     byte
	value     [KeySize]byte
}

const (
	kindKey   = 19<<3 | 1 // prints as K
	kindShare = 25<<3 | 1 // prints as S

	contentSize = 1 + 4 + 1 + 1 + KeySize + 3
	groups      = 8
	groupData   = 6
	groupSize   = groupData + 1
	textSize    = groups*groupSize + groups - 1

	// maxText bounds what parse looks at: the text with generous spacing.
	maxText = 512
)

// alphabet is Crockford's base 32: no I, L, O, U.
const alphabet = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"

func (c *content) wipe() { clear(c.value[:]) }

// text prints the content.
func (c *content) text() []byte {
	var raw [contentSize]byte
	defer clear(raw[:])
	raw[0] = c.kind
	copy(raw[1:], c.id[:])
	raw[5], raw[6] = c.threshold, c.index
	copy(raw[7:], c.value[:])
	sum := checksum(raw[:contentSize-3])
	copy(raw[contentSize-3:], sum[:])

	out := make([]byte, 0, textSize)
	for g := range groups {
		if g > 0 {
			out = append(out, '-')
		}
		var group [groupData]byte
		for i := range group {
			group[i] = bits5(raw[:], g*groupData+i)
			out = append(out, alphabet[group[i]])
		}
		out = append(out, alphabet[checkSymbol(g, group)])
		clear(group[:])
	}
	return out
}

// parse reads the printed form.
func parse(text []byte) (*content, error) {
	if len(text) > maxText {
		return nil, fmt.Errorf("%w: %d characters are too many", ErrText, len(text))
	}
	symbols, err := readSymbols(text)
	defer clear(symbols)
	if err != nil {
		return nil, err
	}
	var raw [contentSize]byte
	defer clear(raw[:])
	for g := range groups {
		var group [groupData]byte
		copy(group[:], symbols[g*groupSize:])
		if checkSymbol(g, group) != symbols[g*groupSize+groupData] {
			return nil, fmt.Errorf("%w: group %d of %d has a typing error", ErrText, g+1, groups)
		}
		for i, v := range group {
			setBits5(raw[:], g*groupData+i, v)
		}
		clear(group[:])
	}
	sum := checksum(raw[:contentSize-3])
	if subtle.ConstantTimeCompare(sum[:], raw[contentSize-3:]) != 1 {
		return nil, fmt.Errorf("%w: every group looks right, but not together; compare all of them", ErrText)
	}
	c := &content{kind: raw[0], threshold: raw[5], index: raw[6]}
	copy(c.id[:], raw[1:])
	copy(c.value[:], raw[7:])
	switch {
	case c.kind == kindKey && c.threshold == 0 && c.index == 0:
	case c.kind == kindShare && c.threshold >= MinThreshold && c.threshold <= MaxShares && c.index >= 1 && c.index <= MaxShares:
	default:
		c.wipe()
		return nil, fmt.Errorf("%w: made by another release", ErrText)
	}
	return c, nil
}

// readSymbols returns the values of the characters, groups*groupSize of them.
func readSymbols(text []byte) ([]byte, error) {
	symbols := make([]byte, 0, groups*groupSize)
	var lengths []int // of the groups as they were typed
	inGroup := false
	for _, ch := range text {
		switch ch {
		case ' ', '-', '\t', '\r', '\n':
			inGroup = false
			continue
		}
		v, ok := symbol(ch)
		if !ok {
			return symbols, fmt.Errorf("%w: group %d of %d has a character that is never used", ErrText, min(len(symbols)/groupSize+1, groups), groups)
		}
		if !inGroup {
			inGroup = true
			lengths = append(lengths, 0)
		}
		lengths[len(lengths)-1]++
		if len(symbols) == cap(symbols) {
			return symbols, fmt.Errorf("%w: more than %d groups of %d characters", ErrText, groups, groupSize)
		}
		symbols = append(symbols, v)
	}
	if len(symbols) == groups*groupSize {
		return symbols, nil
	}
	if len(lengths) == groups {
		for g, n := range lengths {
			if n != groupSize {
				return symbols, fmt.Errorf("%w: group %d of %d has %d characters, not %d", ErrText, g+1, groups, n, groupSize)
			}
		}
	}
	return symbols, fmt.Errorf("%w: %d characters, not %d groups of %d", ErrText, len(symbols), groups, groupSize)
}

// symbol returns the value of a typed character.
func symbol(ch byte) (byte, bool) {
	if ch >= 'a' && ch <= 'z' {
		ch -= 'a' - 'A'
	}
	switch ch {
	case 'O':
		return 0, true
	case 'I', 'L':
		return 1, true
	}
	for i := range len(alphabet) {
		if alphabet[i] == ch {
			return byte(i), true
		}
	}
	return 0, false
}

// bits5 returns the i-th five bits of raw, most significant first.
func bits5(raw []byte, i int) byte {
	var v byte
	for b := i * 5; b < i*5+5; b++ {
		v = v<<1 | raw[b/8]>>(7-b%8)&1
	}
	return v
}

// setBits5 sets the i-th five bits of raw, which are zero.
func setBits5(raw []byte, i int, v byte) {
	for j := range 5 {
		b := i*5 + j
		raw[b/8] |= v >> (4 - j) & 1 << (7 - b%8)
	}
}

// checkSymbol returns the check character of a group: the sum over GF(2^5) of its characters, each times another power of x, plus the
// number of the group. So one wrong character, two swapped ones, and two swapped groups are always found.
func checkSymbol(group int, data [groupData]byte) byte {
	sum := byte(group + 1)
	for _, v := range data {
		sum = double5(sum ^ v)
	}
	return sum
}

// double5 multiplies by x in GF(2)[x]/(x^5+x^2+1), where x is a generator.
func double5(v byte) byte {
	return (v<<1 ^ 0x25&-(v>>4)) & 0x1f
}
