//go:build cgo

package token

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/binary"
)

// unpadOAEP takes the message out of what raw RSA decryption gives, which is as long as the modulus, by EME-OAEP with SHA-256 and MGF1 with
// SHA-256 (RFC 8017 section 7.1.2 step 3). em is used up. The message aliases em.
//
// Invariant: which of the checks failed shows neither in the result nor in the time (Manger 2001). How long the message is does show, as in
// every implementation that returns it.
func unpadOAEP(em, label []byte) (message []byte, ok bool) {
	const size = sha256.Size
	if len(em) < 2*size+2 {
		return nil, false
	}
	seed, db := em[1:1+size], em[1+size:]
	mask(seed, db)
	mask(db, seed)

	want := sha256.Sum256(label)
	good := subtle.ConstantTimeByteEq(em[0], 0) & subtle.ConstantTimeCompare(db[:size], want[:])

	// What follows is zeros, a one, and the message. The one that counts is the first byte that is not zero.
	rest := db[size:]
	looking, at, broken := 1, 0, 0
	for i, b := range rest {
		zero, one := subtle.ConstantTimeByteEq(b, 0), subtle.ConstantTimeByteEq(b, 1)
		at = subtle.ConstantTimeSelect(looking&one, i, at)
		broken |= looking & (1 ^ zero) & (1 ^ one)
		looking &= zero
	}
	if good&(1^broken)&(1^looking) != 1 {
		clear(em)
		return nil, false
	}
	return rest[at+1:], true
}

// mask exclusive-ors MGF1 of the seed to out (RFC 8017 section B.2.1).
func mask(out, seed []byte) {
	block := make([]byte, len(seed)+4)
	defer clear(block)
	copy(block, seed)
	for i := uint32(0); len(out) > 0; i++ {
		binary.BigEndian.PutUint32(block[len(seed):], i)
		sum := sha256.Sum256(block)
		out = out[subtle.XORBytes(out, out, sum[:]):]
		clear(sum[:])
	}
}
