package mechanism

import (
	"crypto/cipher"
	"crypto/subtle"
	"encoding/binary"
	"fmt"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// MaxWrapped bounds a key to wrap, in bytes.
const MaxWrapped = MaxEncoded

// The integrity check values.
const (
	kwInitial  = 0xa6a6a6a6a6a6a6a6 // RFC 3394 section 2.2.3.1
	kwpInitial = 0xa65959a6         // RFC 5649 section 3
)

// Wrap wraps plaintext, 1 to MaxWrapped bytes, under an AES key with AES-KWP (RFC 5649, SP 800-38F section 6.3) and appends
// it to dst. It takes no nonce; equal plaintexts give equal results. Errors wrap ErrInput or ErrUnsupported.
func (k *Key) Wrap(dst, plaintext []byte) ([]byte, error) {
	if k.wrapsInDevice() {
		if len(plaintext) < 1 || len(plaintext) > MaxWrapped {
			return nil, errWrapSize
		}
		return k.do(dst, Request{Usage: keyspec.Wrap, Input: plaintext}, 8+(len(plaintext)+7)/8*8)
	}
	if k.block == nil {
		return nil, k.unsupported("wrap")
	}
	return WrapPadded(dst, k.block, plaintext)
}

// Unwrap undoes Wrap and appends the plaintext to dst. Errors wrap ErrDecryption or ErrUnsupported.
func (k *Key) Unwrap(dst, wrapped []byte) ([]byte, error) {
	if k.wrapsInDevice() {
		if len(wrapped) < 16 || len(wrapped)%8 != 0 || len(wrapped) > 8+MaxWrapped {
			return nil, ErrDecryption
		}
		return k.do(dst, Request{Usage: keyspec.Unwrap, Input: wrapped}, 0)
	}
	if k.block == nil {
		return nil, k.unsupported("unwrap")
	}
	return UnwrapPadded(dst, k.block, wrapped)
}

// wrapsInDevice reports whether k is an AES key in a device.
func (k *Key) wrapsInDevice() bool {
	return k.device != nil && k.row.Kind == KindAEAD && k.row.Algorithm != keyspec.ChaCha20Poly1305
}

var errWrapSize = fmt.Errorf("%w: AES-KWP takes 1 to %d bytes", ErrInput, MaxWrapped)

// WrapKey wraps plaintext with AES-KW (RFC 3394 section 2.2.1) and appends the result to dst. The plaintext is a multiple
// of 8 bytes, at least 16 and at most MaxWrapped. Errors wrap ErrInput.
func WrapKey(dst []byte, block cipher.Block, plaintext []byte) ([]byte, error) {
	if len(plaintext) < 16 || len(plaintext)%8 != 0 || len(plaintext) > MaxWrapped {
		return nil, fmt.Errorf("%w: AES-KW takes 16 to %d bytes, a multiple of 8", ErrInput, MaxWrapped)
	}
	work := make([]byte, 8+len(plaintext))
	binary.BigEndian.PutUint64(work, kwInitial)
	copy(work[8:], plaintext)
	wrapBlocks(block, work)
	return append(dst, work...), nil
}

// UnwrapKey undoes WrapKey (RFC 3394 section 2.2.2) and appends the plaintext to dst. Every failure is ErrDecryption.
func UnwrapKey(dst []byte, block cipher.Block, wrapped []byte) ([]byte, error) {
	if len(wrapped) < 24 || len(wrapped)%8 != 0 || len(wrapped) > 8+MaxWrapped {
		return nil, ErrDecryption
	}
	work := append([]byte(nil), wrapped...)
	defer clear(work)
	unwrapBlocks(block, work)
	var want [8]byte
	binary.BigEndian.PutUint64(want[:], kwInitial)
	if subtle.ConstantTimeCompare(work[:8], want[:]) != 1 {
		return nil, ErrDecryption
	}
	return append(dst, work[8:]...), nil
}

// WrapPadded wraps 1 to MaxWrapped bytes with AES-KWP (RFC 5649 section 4.1) and appends the result, 9 to 16 bytes longer
// and a multiple of 8, to dst. Errors wrap ErrInput.
func WrapPadded(dst []byte, block cipher.Block, plaintext []byte) ([]byte, error) {
	if len(plaintext) < 1 || len(plaintext) > MaxWrapped {
		return nil, errWrapSize
	}
	work := make([]byte, 8+(len(plaintext)+7)/8*8)
	binary.BigEndian.PutUint32(work, kwpInitial)
	binary.BigEndian.PutUint32(work[4:], uint32(len(plaintext)))
	copy(work[8:], plaintext)
	if len(work) == 16 {
		block.Encrypt(work, work)
	} else {
		wrapBlocks(block, work)
	}
	return append(dst, work...), nil
}

// UnwrapPadded undoes WrapPadded (RFC 5649 section 4.2) and appends the plaintext to dst. Every failure is ErrDecryption,
// found in a time that depends on the length of wrapped only: the constant, the length and the padding are judged
// together.
func UnwrapPadded(dst []byte, block cipher.Block, wrapped []byte) ([]byte, error) {
	if len(wrapped) < 16 || len(wrapped)%8 != 0 || len(wrapped) > 8+MaxWrapped {
		return nil, ErrDecryption
	}
	work := append([]byte(nil), wrapped...)
	defer clear(work)
	if len(work) == 16 {
		block.Decrypt(work, work)
	} else {
		unwrapBlocks(block, work)
	}
	padded := work[8:]
	good := subtle.ConstantTimeEq(int32(binary.BigEndian.Uint32(work)), int32(-0x59a6a65a))
	stated := binary.BigEndian.Uint32(work[4:])
	// Of the padding's possible lengths 0 to 7 exactly one can be right. Zero bytes are counted for each.
	n, matches := 0, 0
	for pad := range 8 {
		end := len(padded) - pad
		zero := byte(0)
		for _, b := range padded[end:] {
			zero |= b
		}
		match := subtle.ConstantTimeEq(int32(stated), int32(end)) & subtle.ConstantTimeByteEq(zero, 0)
		n = subtle.ConstantTimeSelect(match, end, n)
		matches |= match
	}
	if good&matches != 1 {
		return nil, ErrDecryption
	}
	return append(dst, padded[:n]...), nil
}

// wrapBlocks is W of SP 800-38F section 6.1, in place: six rounds over the semiblocks after the first.
func wrapBlocks(block cipher.Block, work []byte) {
	var b [16]byte
	copy(b[:8], work)
	counter := uint64(0)
	for range 6 {
		for i := 8; i < len(work); i += 8 {
			counter++
			copy(b[8:], work[i:i+8])
			block.Encrypt(b[:], b[:])
			binary.BigEndian.PutUint64(b[:], binary.BigEndian.Uint64(b[:])^counter)
			copy(work[i:], b[8:])
		}
	}
	copy(work, b[:8])
}

// unwrapBlocks is the inverse of wrapBlocks.
func unwrapBlocks(block cipher.Block, work []byte) {
	var b [16]byte
	copy(b[:8], work)
	counter := uint64(6 * (len(work)/8 - 1))
	for range 6 {
		for i := len(work) - 8; i >= 8; i -= 8 {
			binary.BigEndian.PutUint64(b[:], binary.BigEndian.Uint64(b[:])^counter)
			counter--
			copy(b[8:], work[i:i+8])
			block.Decrypt(b[:], b[:])
			copy(work[i:], b[8:])
		}
	}
	copy(work, b[:8])
	clear(b[:])
}
