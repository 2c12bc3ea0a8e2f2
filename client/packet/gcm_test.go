package packet

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/binary"
	mrand "math/rand/v2"
	"testing"
)

// pieces encrypts with the GCM of this package.
func pieces(t testing.TB, key, nonce, aad, plaintext []byte) []byte {
	t.Helper()
	g, err := newGCMPieces(key, nonce, aad)
	if err != nil {
		t.Fatal(err)
	}
	var out []byte
	var sums []element
	for rest := plaintext; len(rest) > 0; {
		piece := append(make([]byte, 0, pieceSize+tagSize), rest[:min(pieceSize, len(rest))]...)
		rest = rest[len(piece):]
		g.seal(piece)
		sums = append(sums, g.hash(piece))
		out = append(out, piece...)
	}
	g.at = 0
	for i, sum := range sums { // and the way back
		piece := append(make([]byte, 0, pieceSize+tagSize), out[i*pieceSize:min((i+1)*pieceSize, len(out))]...)
		if err := g.open(piece, sum); err != nil || !bytes.Equal(piece, plaintext[i*pieceSize:][:len(piece)]) {
			t.Fatalf("piece %d does not open: %v", i, err)
		}
	}
	tag := g.tag()
	return append(out, tag[:]...)
}

// standard encrypts with the GCM of the standard library.
func standard(t testing.TB, key, nonce, aad, plaintext []byte) []byte {
	t.Helper()
	aead, err := newGCM(key, len(nonce))
	if err != nil {
		t.Fatal(err)
	}
	return aead.Seal(nil, nonce, plaintext, aad)
}

func random(n int) []byte {
	b := make([]byte, n)
	rand.Read(b)
	return b
}

// TestGCMInPieces compares the two at every boundary of blocks and pieces, and at random.
func TestGCMInPieces(t *testing.T) {
	var sizes []int
	for _, around := range []int{0, 16, 128, 4096, pieceSize, 2 * pieceSize, 3*pieceSize - 16} {
		for d := -17; d <= 17; d++ {
			if n := around + d; n >= 0 {
				sizes = append(sizes, n)
			}
		}
	}
	rounds := 300
	if testing.Short() {
		rounds = 30
	}
	for range rounds {
		sizes = append(sizes, mrand.IntN(3*pieceSize))
	}
	for _, size := range sizes {
		key, plaintext := random(keySize), random(size)
		nonce := random([]int{12, 16, 12, 16, 1, 13, 31, 32, 33, 256}[mrand.IntN(10)])
		aad := random([]int{0, 1, 15, 16, 17, 32, 500, 5000}[mrand.IntN(8)])
		if !bytes.Equal(pieces(t, key, nonce, aad, plaintext), standard(t, key, nonce, aad, plaintext)) {
			t.Fatalf("%d bytes with a nonce of %d and additional data of %d bytes differ", size, len(nonce), len(aad))
		}
	}
}

// TestGCMCounter lets the counter begin anew: it has 32 bits, of which a nonce of 16 bytes sets all.
func TestGCMCounter(t *testing.T) {
	key := random(keySize)
	g, err := newGCMPieces(key, []byte{1}, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, before := range []uint32{0, 1, 2, 3, 7, 100, pieceSize/16 - 1, pieceSize / 16, pieceSize/16 + 1} {
		// The nonce with the counter ^before: J = (N·H + L)·H.
		counter := random(16)
		binary.BigEndian.PutUint32(counter[12:], ^before)
		nonce := elementOf(counter).times(g.inverse).plus(lengths(0, 16)).times(g.inverse).bytes()
		if got := g.counter(nonce[:]); !bytes.Equal(got[:], counter) {
			t.Fatalf("counter %x, want %x", got, counter)
		}
		for _, size := range []int{1, 16, 17, 48, 200, pieceSize - 1, pieceSize, pieceSize + 1, 2*pieceSize + 100} {
			plaintext := random(size)
			if !bytes.Equal(pieces(t, key, nonce[:], nil, plaintext), standard(t, key, nonce[:], nil, plaintext)) {
				t.Fatalf("%d bytes, %d blocks before the counter begins anew, differ", size, before)
			}
		}
	}
}

// TestGCMField checks the field apart from GCM.
func TestGCMField(t *testing.T) {
	one := element{hi: 1 << 63}
	for range 100 {
		a, b, c := elementOf(random(16)), elementOf(random(16)), elementOf(random(16))
		switch {
		case a.times(one) != a, one.times(a) != a:
			t.Fatal("one is not one")
		case a.times(b) != b.times(a):
			t.Fatal("not commutative")
		case a.times(b).times(c) != a.times(b.times(c)):
			t.Fatal("not associative")
		case a.times(b.plus(c)) != a.times(b).plus(a.times(c)):
			t.Fatal("not distributive")
		case a.power(5) != a.times(a).times(a).times(a).times(a), a.power(0) != one:
			t.Fatal("not the power")
		case a.times(a.inverse()) != one:
			t.Fatal("not the inverse")
		}
	}
}

func FuzzGCMInPieces(f *testing.F) {
	f.Add([]byte("nonce"), []byte("additional"), []byte("plaintext"), uint32(1))
	f.Add(make([]byte, 16), []byte{}, []byte{}, uint32(pieceSize))
	f.Fuzz(func(t *testing.T, nonce, aad, plaintext []byte, size uint32) {
		if len(nonce) == 0 || len(nonce) > maxSaltSize {
			return
		}
		key := make([]byte, keySize)
		copy(key, plaintext)
		plaintext = append(plaintext, make([]byte, size%(3*pieceSize))...)
		if !bytes.Equal(pieces(t, key, nonce, aad, plaintext), standard(t, key, nonce, aad, plaintext)) {
			t.Error("differ")
		}
	})
}

func BenchmarkGCM(b *testing.B) {
	key, nonce := random(keySize), random(12)
	buffer := make([]byte, pieceSize, pieceSize+tagSize)
	g, err := newGCMPieces(key, nonce, nil)
	if err != nil {
		b.Fatal(err)
	}
	b.Run("pieces", func(b *testing.B) {
		b.SetBytes(pieceSize)
		for b.Loop() {
			g.seal(buffer)
		}
	})
	b.Run("hash", func(b *testing.B) {
		b.SetBytes(pieceSize)
		for b.Loop() {
			g.hash(buffer)
		}
	})
	b.Run("standard", func(b *testing.B) {
		block, err := aes.NewCipher(key)
		if err != nil {
			b.Fatal(err)
		}
		aead, err := cipher.NewGCM(block)
		if err != nil {
			b.Fatal(err)
		}
		out := make([]byte, 0, pieceSize+tagSize)
		b.SetBytes(pieceSize)
		for b.Loop() {
			aead.Seal(out, nonce, buffer, nil)
		}
	})
}
