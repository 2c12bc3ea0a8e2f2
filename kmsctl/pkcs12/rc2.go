package pkcs12

import (
	"crypto/cipher"
	"encoding/binary"
	"encoding/hex"
	"math/bits"
)

// rc2 decrypts RC2 (RFC 2268), under which Java before release 17 puts the certificates of a keystore. It protects nothing: certificates
// are no secret, and the MAC is what tells whether they were changed.
type rc2 struct{ k [64]uint16 }

// piTable is the table of RFC 2268 section 2.
const piTable = "d978f9c419ddb5ed28e9fd794aa0d89dc67e37832b76538e624c6488448bfba2" +
	"179a59f587b34f1361456d8d09817d32bd8f40eb86b77b0bf09521225c6b4e82" +
	"54d66593ce60b21c7356c014a78cf1dc1275ca1f3bbee4d1423dd430a33cb626" +
	"6fbf0eda4669075727f21d9bbc944303f811c7f690ef3ee706c3d52fc8661ed7" +
	"08e8eade8052eef784aa72ac354d6a2a961ad2715a1549744b9fd05e0418a4ec" +
	"c2e0416e0f51cbcc2491af50a1f47039997c3a8523b8b47afc02365b25559731" +
	"2d5dfa98e38a92ae05df2910676cbac9d300e6cfe19ea82c6316013f58e289a9" +
	"0d38341bab33ffb0bb480c5fb9b1cd2ec5f3db47e5a59c770aa62068fe7fc1ad"

// newRC2 makes a cipher whose effective key length is that of the key, at most 128 bytes (RFC 2268 section 2).
func newRC2(key []byte) (cipher.Block, error) {
	pi, err := hex.DecodeString(piTable)
	if err != nil {
		return nil, err
	}
	var l [128]byte
	n := copy(l[:], key)
	for i := n; i < 128; i++ {
		l[i] = pi[l[i-1]+l[i-n]]
	}
	l[128-n] = pi[l[128-n]] // all bits of the first byte count
	for i := 127 - n; i >= 0; i-- {
		l[i] = pi[l[i+1]^l[i+n]]
	}
	c := new(rc2)
	for i := range c.k {
		c.k[i] = binary.LittleEndian.Uint16(l[2*i:])
	}
	return c, nil
}

func (*rc2) BlockSize() int { return 8 }

// Encrypt is not needed, and not there.
func (*rc2) Encrypt(_, _ []byte) { panic("pkcs12: RC2 only decrypts") }

// Decrypt decrypts one block (RFC 2268 section 4): five rounds, a mash, six rounds, a mash, five rounds, backwards.
func (c *rc2) Decrypt(dst, src []byte) {
	var r [4]uint16
	for i := range r {
		r[i] = binary.LittleEndian.Uint16(src[2*i:])
	}
	j := 63
	for round := 15; round >= 0; round-- {
		for i := 3; i >= 0; i-- {
			r[i] = bits.RotateLeft16(r[i], -[4]int{1, 2, 3, 5}[i])
			x, y, z := r[(i+3)%4], r[(i+2)%4], r[(i+1)%4]
			r[i] -= c.k[j] + x&y + ^x&z
			j--
		}
		if round == 11 || round == 5 {
			for i := 3; i >= 0; i-- {
				r[i] -= c.k[r[(i+3)%4]&63]
			}
		}
	}
	for i := range r {
		binary.LittleEndian.PutUint16(dst[2*i:], r[i])
	}
}
