package packet

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/subtle"
	"encoding/binary"
	"fmt"
)

// AES-GCM (NIST SP 800-38D) of the standard library takes a message as a whole. What is here takes it in pieces, so that a packet
// of any size needs no memory of its size, and has the standard library do the work, at full speed.

// pieceSize is how much is encrypted, authenticated and written at once, in bytes: a multiple of the block, large enough for the
// fastest code of the processor and small enough for its cache.
const pieceSize = 256 << 10

// maxGCM is the longest message of GCM in bytes (SP 800-38D section 5.2.1.1): 64 GiB less two blocks.
const maxGCM = 1<<36 - 32

// element is an element of GF(2^128) in the notation of GCM: the coefficient of x^0 is the first bit of the first byte.
type element struct{ hi, lo uint64 }

func elementOf(b []byte) element {
	return element{binary.BigEndian.Uint64(b), binary.BigEndian.Uint64(b[8:])}
}

func (x element) bytes() (b [aes.BlockSize]byte) {
	binary.BigEndian.PutUint64(b[:], x.hi)
	binary.BigEndian.PutUint64(b[8:], x.lo)
	return b
}

func (x element) plus(y element) element { return element{x.hi ^ y.hi, x.lo ^ y.lo} }

// times is multiplication modulo x^128 + x^7 + x^2 + x + 1 (SP 800-38D section 6.3), in the same time for all elements. It is
// called some times for each piece, not for each block.
func (x element) times(y element) (z element) {
	hi, lo := x.hi, x.lo
	for range 128 {
		bit := -(hi >> 63)
		hi, lo = hi<<1|lo>>63, lo<<1
		z.hi ^= y.hi & bit
		z.lo ^= y.lo & bit
		reduce := -(y.lo & 1) & (0xe1 << 56)
		y.hi, y.lo = y.hi>>1^reduce, y.hi<<63|y.lo>>1
	}
	return z
}

// power returns x to the power of n, which is no secret.
func (x element) power(n uint64) element {
	z := element{hi: 1 << 63}
	for ; n > 0; n >>= 1 {
		if n&1 == 1 {
			z = z.times(x)
		}
		x = x.times(x)
	}
	return z
}

// inverse returns x to the power of 2^128 - 2.
func (x element) inverse() element {
	z := element{hi: 1 << 63}
	for range 127 {
		x = x.times(x)
		z = z.times(x)
	}
	return z
}

// lengths is the block that ends what GHASH hashes: two numbers of bytes, written in bits.
func lengths(aad, data int) element { return element{uint64(aad) * 8, uint64(data) * 8} }

// gcm is one message under way. Every piece of it is a message of the standard library's GCM:
//
//   - A nonce of 16 bytes N gives the first counter J = (N·H + L)·H, with H the hash key and L a block of lengths. That can be
//     solved for N, so the counter of a piece goes on where that of the piece before has ended.
//   - The tag of a piece is (S + L)·H plus a mask, E(J), where S is GHASH of the piece alone. So it gives S·H. If Z is GHASH·H of
//     all pieces before, and the piece has n blocks, then GHASH·H of all with it is Z·Hⁿ + S·H. The tag of the whole message is
//     Z + L·H plus the mask of its own nonce.
//
// What the standard library makes of these nonces stays in here but for the ciphertext, which is that of the whole message.
type gcm struct {
	block   cipher.Block
	aead    cipher.AEAD // with nonces of 16 bytes
	h       element
	inverse element // of H
	full    element // H to the power of the number of blocks in a piece
	first   [aes.BlockSize]byte
	null    [longIVSize]byte // a nonce for what is hashed only
	mask    element          // of null

	at        uint32 // blocks that were encrypted or decrypted
	z         element
	aad, data int
}

// newGCMPieces begins a message. Pieces have pieceSize bytes; only the last may have fewer.
func newGCMPieces(key, nonce, aad []byte) (*gcm, error) {
	if len(nonce) == 0 {
		return nil, fmt.Errorf("%w: no nonce", ErrFormat)
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	g := &gcm{block: block, aad: len(aad)}
	if g.aead, err = cipher.NewGCMWithNonceSize(block, longIVSize); err != nil {
		return nil, err
	}
	var zero [aes.BlockSize]byte
	g.h = g.encrypt(zero)
	g.inverse = g.h.inverse()
	g.full = g.h.power(pieceSize / aes.BlockSize)
	g.mask = elementOf(g.aead.Seal(nil, g.null[:], nil, nil)) // GHASH of nothing is 0
	g.first = g.counter(nonce)
	if len(aad) > 0 {
		g.z = g.hash(aad)
	}
	return g, nil
}

func (g *gcm) encrypt(b [aes.BlockSize]byte) element {
	g.block.Encrypt(b[:], b[:])
	return elementOf(b[:])
}

// counter returns the first counter of a nonce (SP 800-38D section 7.1 step 2).
func (g *gcm) counter(nonce []byte) (b [aes.BlockSize]byte) {
	if len(nonce) == nonceSize {
		copy(b[:], nonce)
		b[15] = 1
		return b
	}
	var y element
	for rest := nonce; len(rest) > 0; {
		b = [aes.BlockSize]byte{}
		rest = rest[copy(b[:], rest):]
		y = y.plus(elementOf(b[:])).times(g.h)
	}
	return y.plus(lengths(0, len(nonce))).times(g.h).bytes()
}

// next returns the nonce of 16 bytes by which the standard library goes on with the counter, and the mask of its tag.
func (g *gcm) next() (nonce [longIVSize]byte, mask element) {
	j := g.first
	binary.BigEndian.PutUint32(j[12:], binary.BigEndian.Uint32(j[12:])+g.at) // only these bits count (section 6.2)
	return elementOf(j[:]).times(g.inverse).plus(lengths(0, longIVSize)).times(g.inverse).bytes(), g.encrypt(j)
}

func blocks(n int) uint64 { return uint64(n+aes.BlockSize-1) / aes.BlockSize }

// hash returns GHASH·H of one piece.
func (g *gcm) hash(b []byte) element {
	var tag [tagSize]byte
	g.aead.Seal(tag[:0], g.null[:], nil, b)
	return elementOf(tag[:]).plus(g.mask).plus(lengths(len(b), 0).times(g.h))
}

// add authenticates a piece of ciphertext of which sum is GHASH·H.
func (g *gcm) add(n int, sum element) {
	power := g.full
	if n != pieceSize {
		power = g.h.power(blocks(n))
	}
	g.z = g.z.times(power).plus(sum)
	g.data += n
}

// seal encrypts the next piece in place. b needs room for a tag behind it.
func (g *gcm) seal(b []byte) {
	nonce, mask := g.next()
	tag := g.aead.Seal(b[:0], nonce[:], b, nil)[len(b):]
	g.add(len(b), elementOf(tag).plus(mask).plus(lengths(0, len(b)).times(g.h)))
	clear(tag)
	g.at += uint32(blocks(len(b)))
}

// open decrypts the next piece in place, if it is the one that had this sum when it was hashed, and else not at all. b needs
// room for a tag behind it.
func (g *gcm) open(b []byte, sum element) error {
	nonce, mask := g.next()
	tag := sum.plus(lengths(0, len(b)).times(g.h)).plus(mask).bytes()
	_, err := g.aead.Open(b[:0], nonce[:], append(b, tag[:]...), nil)
	g.at += uint32(blocks(len(b)))
	return err
}

// tag returns the tag of everything that was added.
func (g *gcm) tag() [tagSize]byte {
	return g.z.plus(lengths(g.aad, g.data).times(g.h)).plus(g.encrypt(g.first)).bytes()
}

// verify reports whether want is the tag of everything that was added.
func (g *gcm) verify(want []byte) bool {
	have := g.tag()
	return subtle.ConstantTimeCompare(have[:], want) == 1
}
