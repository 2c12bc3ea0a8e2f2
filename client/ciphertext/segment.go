package ciphertext

import (
	"crypto/aes"
	"crypto/cipher"
	"encoding/binary"
	"fmt"
	"slices"

	"golang.org/x/crypto/chacha20poly1305"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// Sizes of segments in bytes. The last segment may be shorter.
const (
	SegmentSize       = 64 << 10              // plaintext
	SealedSegmentSize = SegmentSize + TagSize // ciphertext
)

// MaxSegments bounds a stream at 256 TiB.
const MaxSegments = 1 << 32

// segments is the cipher of one stream and its position: STREAM of Hoang, Reyhanitabar, Rogaway and Vizár ("Online
// Authenticated-Encryption and its Nonce-Reuse Misuse-Resistance", CRYPTO 2015, section 7), whose nonce is the number of
// the segment and a flag on the last one.
//
// Invariant: a stream key is used for one stream, so a nonce that counts never repeats under it.
type segments struct {
	aead  cipher.AEAD
	aad   [8]byte // the part of the header that a rewrap leaves alone
	nonce [NonceSize]byte
	next  uint64
	err   error // once set, the stream is over
}

// newSegments takes the head because its first 8 bytes are the associated data of every segment. The key version and
// the sealed stream key are not: so that a stream is moved to a new key version by rewrapping its head alone.
func newSegments(head, key []byte) (segments, error) {
	h, err := ParseHeader(head)
	if err != nil {
		return segments{}, err
	}
	if h.KeySize != KeySize {
		return segments{}, fmt.Errorf("%w: has no segments", ErrFormat)
	}
	if len(key) != KeySize {
		return segments{}, ErrDecryption
	}
	s := segments{aad: [8]byte(head)}
	if h.Algorithm == keyspec.ChaCha20Poly1305 {
		s.aead, err = chacha20poly1305.New(key)
		return s, err
	}
	// AES-256 for both AES algorithms: the stream key has one length, whatever seals it.
	block, err := aes.NewCipher(key)
	if err != nil {
		return segments{}, err
	}
	s.aead, err = cipher.NewGCM(block)
	return s, err
}

// step fills in the nonce of the next segment: 3 zero bytes, the number as 8 bytes, 1 on the last segment.
func (s *segments) step(last bool) error {
	if s.err != nil {
		return s.err
	}
	if s.next >= MaxSegments {
		s.err = ErrTooLarge
		return s.err
	}
	binary.BigEndian.PutUint64(s.nonce[3:], s.next)
	s.nonce[11] = 0
	if last {
		s.nonce[11] = 1
		s.err = errFinished
	}
	s.next++
	return nil
}

var errFinished = fmt.Errorf("%w: data after the last segment", ErrDecryption)

// Sealer turns a stream of plaintext in pieces of any size into segments.
//
// It is not safe for concurrent use.
type Sealer struct {
	segments
	held []byte // plaintext that waits until it is known whether more follows; never more than one segment
}

// NewSealer returns a Sealer for the segments after head, under the key that came with it from [AppendHead].
func NewSealer(head, key []byte) (*Sealer, error) {
	s, err := newSegments(head, key)
	if err != nil {
		return nil, err
	}
	return &Sealer{segments: s}, nil
}

// Update takes plaintext and appends the segments that became complete to dst. dst must not overlap plaintext.
// At most len(plaintext) + SegmentSize bytes and their tags are appended.
func (s *Sealer) Update(dst, plaintext []byte) ([]byte, error) {
	if s.err != nil {
		return nil, s.err
	}
	dst = slices.Grow(dst, whole(len(s.held)+len(plaintext), SegmentSize)*SealedSegmentSize)
	for len(plaintext) > 0 {
		// A segment is sealed only when a byte after it has been seen: until then it may be the last.
		if len(s.held) == SegmentSize {
			if err := s.step(false); err != nil {
				return nil, err
			}
			dst = s.aead.Seal(dst, s.nonce[:], s.held, s.aad[:])
			s.held = s.held[:0]
		}
		for len(s.held) == 0 && len(plaintext) > SegmentSize {
			if err := s.step(false); err != nil {
				return nil, err
			}
			dst = s.aead.Seal(dst, s.nonce[:], plaintext[:SegmentSize], s.aad[:])
			plaintext = plaintext[SegmentSize:]
		}
		s.held, plaintext = hold(s.held, plaintext, SegmentSize)
	}
	return dst, nil
}

// Finish appends the last segment to dst and wipes what was held. An empty stream has one empty segment.
func (s *Sealer) Finish(dst []byte) ([]byte, error) {
	if err := s.step(true); err != nil {
		return nil, err
	}
	dst = s.aead.Seal(dst, s.nonce[:], s.held, s.aad[:])
	clear(s.held[:cap(s.held)])
	s.held = nil
	return dst, nil
}

// Opener turns segments in pieces of any size back into plaintext.
//
// Invariant: only plaintext of segments whose tag is right leaves an Opener. That the stream is complete is known only
// when Finish has returned without an error; until then the plaintext is a true beginning of the whole, not the whole.
//
// It is not safe for concurrent use.
type Opener struct {
	segments
	held []byte // ciphertext that waits until it is known whether more follows
}

// NewOpener returns an Opener for the segments after head, under the key that [Open] gave for it.
func NewOpener(head, key []byte) (*Opener, error) {
	s, err := newSegments(head, key)
	if err != nil {
		return nil, err
	}
	return &Opener{segments: s}, nil
}

// Update takes ciphertext and appends the plaintext of the segments that became complete to dst. dst must not overlap
// sealed. After an error the stream is over.
func (o *Opener) Update(dst, sealed []byte) ([]byte, error) {
	if o.err != nil {
		return nil, o.err
	}
	var err error
	dst = slices.Grow(dst, whole(len(o.held)+len(sealed), SealedSegmentSize)*SegmentSize)
	for len(sealed) > 0 {
		if len(o.held) == SealedSegmentSize {
			if dst, err = o.open(dst, o.held, false); err != nil {
				return nil, err
			}
			o.held = o.held[:0]
		}
		for len(o.held) == 0 && len(sealed) > SealedSegmentSize {
			if dst, err = o.open(dst, sealed[:SealedSegmentSize], false); err != nil {
				return nil, err
			}
			sealed = sealed[SealedSegmentSize:]
		}
		o.held, sealed = hold(o.held, sealed, SealedSegmentSize)
	}
	return dst, nil
}

// Finish appends the plaintext of the last segment to dst. Only after it has returned no error is the stream complete.
func (o *Opener) Finish(dst []byte) ([]byte, error) {
	if o.err != nil {
		return nil, o.err
	}
	// A Sealer never writes an empty segment after others, so there is one ciphertext length for each plaintext length.
	if len(o.held) < TagSize || len(o.held) == TagSize && o.next > 0 {
		o.err = ErrDecryption
		return nil, o.err
	}
	return o.open(dst, o.held, true)
}

func (o *Opener) open(dst, sealed []byte, last bool) ([]byte, error) {
	if err := o.step(last); err != nil {
		return nil, err
	}
	plaintext, err := o.aead.Open(dst, o.nonce[:], sealed, o.aad[:])
	if err != nil {
		o.err = ErrDecryption
		return nil, o.err
	}
	return plaintext, nil
}

// whole returns how many segments of size bytes are complete when n bytes are at hand: the last byte may be the end.
func whole(n, size int) int { return max(n-1, 0) / size }

// hold moves as much of data to held as fits into a segment.
func hold(held, data []byte, size int) (newHeld, rest []byte) {
	if held == nil {
		held = make([]byte, 0, size)
	}
	n := min(size-len(held), len(data))
	return append(held, data[:n]...), data[n:]
}
