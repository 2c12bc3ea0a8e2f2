//go:build cgo

package token

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"math/big"
	"testing"

	"github.com/kmsd-project/kmsd/kmsd/mechanism/wycheprooftest"
)

// The vectors are decrypted as on the way through a token without OAEP: raw RSA, then our unpadding.
func TestUnpadOAEPVectors(t *testing.T) {
	for _, name := range []string{"rsa_oaep_2048_sha256_mgf1sha256", "rsa_oaep_3072_sha256_mgf1sha256", "rsa_oaep_4096_sha256_mgf1sha256", "rsa_oaep_misc"} {
		var file struct {
			TestGroups []struct {
				Sha, MgfSha string
				PrivateKey  struct{ Modulus, PrivateExponent string }
				Tests       []struct {
					TcID            int
					Comment, Result string
					Msg, Ct, Label  string
				}
			}
		}
		wycheprooftest.Read(t, name+"_test.json", &file)
		valid, invalid := 0, 0
		for _, g := range file.TestGroups {
			if g.Sha != "SHA-256" || g.MgfSha != "SHA-256" {
				continue
			}
			n, d := new(big.Int).SetBytes(unhex(t, g.PrivateKey.Modulus)), new(big.Int).SetBytes(unhex(t, g.PrivateKey.PrivateExponent))
			for _, test := range g.Tests {
				sealed := unhex(t, test.Ct)
				c := new(big.Int).SetBytes(sealed)
				if len(sealed) != (n.BitLen()+7)/8 || c.Cmp(n) >= 0 {
					if test.Result == "valid" {
						t.Errorf("%s %d: %d bytes", name, test.TcID, len(sealed))
					}
					continue // refused before the token sees it
				}
				message, ok := unpadOAEP(new(big.Int).Exp(c, d, n).FillBytes(make([]byte, len(sealed))), unhex(t, test.Label))
				switch {
				case test.Result == "valid":
					valid++
					if !ok || !bytes.Equal(message, unhex(t, test.Msg)) {
						t.Errorf("%s %d (%s): %x, %v", name, test.TcID, test.Comment, message, ok)
					}
				case test.Result == "invalid":
					invalid++
					if ok {
						t.Errorf("%s %d (%s) is accepted", name, test.TcID, test.Comment)
					}
				}
			}
		}
		if valid == 0 || invalid == 0 && name != "rsa_oaep_misc" {
			t.Errorf("%s: %d valid and %d invalid vectors were run", name, valid, invalid)
		}
	}
}

func unhex(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// padOAEP is EME-OAEP (RFC 8017 section 7.1.1 step 2) with a seed, and with the byte between the zeros and the message that is asked for.
func padOAEP(size int, message, label, seed []byte, between byte) []byte {
	sum := sha256.Sum256(label)
	em := append([]byte{0}, seed...)
	em = append(em, sum[:]...)
	em = append(em, make([]byte, size-2*len(sum)-2-len(message))...)
	em = append(append(em, between), message...)
	db := em[1+len(seed):]
	copy(db, masked(db, seed))
	copy(em[1:], masked(seed, db))
	return em
}

// masked is data exclusive-ored with MGF1 of the seed, written once more and in another way than in the driver.
func masked(data, seed []byte) []byte {
	var stream []byte
	for i := uint32(0); len(stream) < len(data); i++ {
		h := sha256.New()
		h.Write(seed)
		binary.Write(h, binary.BigEndian, i)
		stream = h.Sum(stream)
	}
	out := make([]byte, len(data))
	for i := range data {
		out[i] = data[i] ^ stream[i]
	}
	return out
}

// unpadSimply does what unpadOAEP does without a care for time.
func unpadSimply(em, label []byte) ([]byte, bool) {
	if len(em) < 66 || em[0] != 0 {
		return nil, false
	}
	seed := masked(em[1:33], em[33:])
	db := masked(em[33:], seed)
	sum := sha256.Sum256(label)
	rest := bytes.TrimLeft(db[32:], "\x00")
	if !bytes.Equal(db[:32], sum[:]) || len(rest) == 0 || rest[0] != 1 {
		return nil, false
	}
	return rest[1:], true
}

func TestUnpadOAEPEdges(t *testing.T) {
	seed := make([]byte, 32)
	rand.Read(seed)
	for n := range 190 + 1 {
		message := bytes.Repeat([]byte{0}, n) // zeros and ones in the message must not be taken for the padding
		if n > 2 {
			message[n/2] = 1
		}
		got, ok := unpadOAEP(padOAEP(256, message, nil, seed, 1), nil)
		if !ok || !bytes.Equal(got, message) {
			t.Fatalf("message of %d bytes: %x, %v", n, got, ok)
		}
	}
	for between := range 256 {
		if _, ok := unpadOAEP(padOAEP(256, []byte{9}, nil, seed, byte(between)), nil); ok != (between == 1) {
			t.Errorf("%#x between padding and message: %v", between, ok)
		}
	}
	allZeros := padOAEP(256, nil, nil, seed, 0)
	if _, ok := unpadOAEP(allZeros, nil); ok {
		t.Error("padding without an end is accepted")
	}
	em := padOAEP(256, []byte("x"), []byte("label"), seed, 1)
	for _, i := range []int{0, 1, 32, 33, 64, 65, 255} {
		flipped := bytes.Clone(em)
		flipped[i] ^= 1
		want, wantOK := unpadSimply(bytes.Clone(flipped), []byte("label"))
		if got, ok := unpadOAEP(flipped, []byte("label")); ok != wantOK || !bytes.Equal(got, want) {
			t.Errorf("byte %d flipped: %x, %v, want %x, %v", i, got, ok, want, wantOK)
		}
	}
	for n := range 66 {
		if _, ok := unpadOAEP(make([]byte, n), nil); ok {
			t.Errorf("block of %d bytes is accepted", n)
		}
	}
}

func FuzzUnpadOAEP(f *testing.F) {
	f.Add(padOAEP(256, []byte("message"), nil, make([]byte, 32), 1), []byte{})
	f.Add(padOAEP(66, nil, []byte("label"), make([]byte, 32), 1), []byte("label"))
	f.Add(padOAEP(128, []byte("x"), nil, make([]byte, 32), 2), []byte{})
	f.Add(make([]byte, 66), []byte{})
	f.Fuzz(func(t *testing.T, em, label []byte) {
		want, wantOK := unpadSimply(bytes.Clone(em), label)
		got, ok := unpadOAEP(em, label)
		if ok != wantOK || !bytes.Equal(got, want) {
			t.Fatalf("%x, %v, want %x, %v", got, ok, want, wantOK)
		}
		if !ok && len(em) >= 66 && !bytes.Equal(em, make([]byte, len(em))) {
			t.Fatal("what was refused is not wiped")
		}
	})
}
