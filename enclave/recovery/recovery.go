// Package recovery is the way into a keystore that needs no device: a key of 160 random bits that is printed on paper, or shares of
// such a key of which any k of n open the store (Shamir, How to share a secret, CACM 22, 1979).
//
// Both are printed in one form, eight groups of seven characters:
//
//	K5W1XQ7-0QJZ3TE-...            (a key begins with K, a share with S)
//
// Every group carries its own check character, which depends on the place of the group, so that a typing error names the group it is
// in. A checksum over all groups finds what the check characters miss. Case, spaces, dashes and line breaks do not matter, and O, I
// and L are read as the digits they look like.
//
// The package does no I/O. Keys and shares in the form of this release are accepted for ever.
package recovery

import (
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
)

// Limits of shares.
const (
	MinThreshold = 2
	MaxShares    = 32
)

// KeySize is the length of the secret part of a recovery key in bytes: 160 bits.
const KeySize = 20

// Errors of the parsers and of Combine.
var (
	ErrText     = errors.New("not a recovery key")   // the text is not in the printed form
	ErrShares   = errors.New("shares do not belong") // shares of different sets, or one share twice
	ErrTooFew   = errors.New("too few shares")       // fewer than the threshold
	ErrGeometry = errors.New("impossible number of shares")
)

// Key is a recovery key.
//
// Invariant: no way of formatting or marshalling a Key shows it; Text is the only way out.
type Key struct {
	id     [4]byte // public: which slot it belongs to
	secret [KeySize]byte
}

// NewKey makes a random key.
func NewKey() *Key {
	k := new(Key)
	rand.Read(k.id[:])
	rand.Read(k.secret[:])
	return k
}

// ID names the key without telling anything about it, as eight hexadecimal digits. It is printed beside the slot.
func (k *Key) ID() string { return fmt.Sprintf("%x", k.id) }

// Text is the printed form. The caller wipes it.
func (k *Key) Text() []byte {
	var c content
	c.kind = kindKey
	c.id = k.id
	c.value = k.secret
	defer c.wipe()
	return c.text()
}

// Wipe zeroes the key.
func (k *Key) Wipe() { clear(k.secret[:]) }

// Format says which key it is, whatever the verb; a String method alone would let %d show the bytes.
func (k Key) Format(f fmt.State, _ rune) { fmt.Fprintf(f, "recovery key %x", k.id[:]) }

// ParseKey reads the printed form of a key. Errors wrap ErrText and name the first group that is wrong.
func ParseKey(text []byte) (*Key, error) {
	c, err := parse(text)
	if err != nil {
		return nil, err
	}
	defer c.wipe()
	if c.kind != kindKey {
		return nil, fmt.Errorf("%w: this is one share of a key (it begins with S); give the other shares too", ErrText)
	}
	return &Key{id: c.id, secret: c.value}, nil
}

// Share is one of n shares of a key.
//
// Invariant: as for Key, Text is the only way out.
type Share struct {
	id        [4]byte // of the set, and of the key that comes out
	threshold uint8
	index     uint8 // the x coordinate, from 1
	value     [KeySize]byte
}

// ID names the set of shares, as eight hexadecimal digits. It is the ID of the key that they make.
func (s *Share) ID() string { return fmt.Sprintf("%x", s.id) }

// Threshold is how many shares of the set make the key.
func (s *Share) Threshold() int { return int(s.threshold) }

// Index is the number of the share in its set, from 1.
func (s *Share) Index() int { return int(s.index) }

// Text is the printed form. The caller wipes it.
func (s *Share) Text() []byte {
	c := content{kind: kindShare, id: s.id, threshold: s.threshold, index: s.index, value: s.value}
	defer c.wipe()
	return c.text()
}

// Wipe zeroes the share.
func (s *Share) Wipe() { clear(s.value[:]) }

// Format says which share it is, whatever the verb.
func (s Share) Format(f fmt.State, _ rune) {
	fmt.Fprintf(f, "share %d of recovery key %x, %d needed", s.index, s.id[:], s.threshold)
}

// ParseShare reads the printed form of a share. Errors wrap ErrText and name the first group that is wrong.
func ParseShare(text []byte) (*Share, error) {
	c, err := parse(text)
	if err != nil {
		return nil, err
	}
	defer c.wipe()
	if c.kind != kindShare {
		return nil, fmt.Errorf("%w: this is a whole key (it begins with K), not a share", ErrText)
	}
	return &Share{id: c.id, threshold: c.threshold, index: c.index, value: c.value}, nil
}

// Split makes a fresh key and n shares of it, of which any threshold together make it again. Fewer tell nothing about it. A key is
// never split twice, so that shares of two sets can always be told apart by their ID.
func Split(threshold, n int) (*Key, []*Share, error) {
	if threshold < MinThreshold || n < threshold || n > MaxShares {
		return nil, nil, fmt.Errorf("%d of %d shares (at least %d, at most %d): %w", threshold, n, MinThreshold, MaxShares, ErrGeometry)
	}
	key := NewKey()
	shares := make([]*Share, n)
	for i := range shares {
		shares[i] = &Share{id: key.id, threshold: uint8(threshold), index: uint8(i + 1)}
	}
	coefficients := make([]byte, threshold)
	defer clear(coefficients)
	for b, secret := range key.secret {
		coefficients[0] = secret
		rand.Read(coefficients[1:])
		for _, s := range shares {
			s.value[b] = evaluate(coefficients, s.index)
		}
	}
	return key, shares, nil
}

// Combine makes the key from shares of one set, at least as many as its threshold. It cannot tell a forged share: then the key is a
// wrong one and opens nothing.
func Combine(shares []*Share) (*Key, error) {
	if len(shares) == 0 {
		return nil, ErrTooFew
	}
	if len(shares) > MaxShares {
		return nil, fmt.Errorf("%d shares: %w", len(shares), ErrGeometry)
	}
	first := shares[0]
	for i, s := range shares {
		if s.id != first.id || s.threshold != first.threshold {
			return nil, fmt.Errorf("share %d is of set %s, share %d of set %s: %w", first.index, first.ID(), s.index, s.ID(), ErrShares)
		}
		for _, other := range shares[:i] {
			if s.index == other.index {
				return nil, fmt.Errorf("share %d was given twice: %w", s.index, ErrShares)
			}
		}
	}
	if len(shares) < int(first.threshold) {
		return nil, fmt.Errorf("%d of %d: %w", len(shares), first.threshold, ErrTooFew)
	}
	shares = shares[:first.threshold]
	key := &Key{id: first.id}
	for _, s := range shares {
		weight := lagrange(shares, s.index)
		for b := range key.secret {
			key.secret[b] ^= multiply(weight, s.value[b])
		}
	}
	return key, nil
}

// checksum is the end of the printed form: three bytes of SHA-256.
func checksum(data []byte) [3]byte {
	h := sha256.New()
	h.Write([]byte("kmsd recovery text v1"))
	h.Write(data)
	var sum [3]byte
	copy(sum[:], h.Sum(nil))
	return sum
}
