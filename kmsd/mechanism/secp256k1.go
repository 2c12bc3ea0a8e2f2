package mechanism

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/rand"
	"encoding/asn1"
	"fmt"
	"sync"

	"github.com/decred/dcrd/dcrec/secp256k1/v4"

	"github.com/kmsd-project/kmsd/client/pkix"
)

// koblitz is a private key of secp256k1. crypto/ecdsa can verify on that curve; signing on it would give away what is secret by its time.
//
// Invariant: what is computed with the scalar or with a nonce takes the same time and touches the same memory whatever their values.
// The library multiplies points in variable time only, so multiplyBase is ours; its field and scalar arithmetic is constant-time.
type koblitz struct {
	scalar secp256k1.ModNScalar
	public *ecdsa.PublicKey
}

// loadKoblitz makes a key of a scalar of 32 bytes within the order of the curve.
func loadKoblitz(material []byte) (*koblitz, error) {
	k := new(koblitz)
	if tooLarge := k.scalar.SetByteSlice(material); tooLarge || k.scalar.IsZero() {
		return nil, ErrMaterial
	}
	p := multiplyBase(&k.scalar)
	x, y := p.affine()
	k.public = secp256k1.NewPublicKey(&x, &y).ToECDSA()
	return k, nil
}

// generateKoblitz returns a fresh scalar.
func generateKoblitz() []byte {
	material := make([]byte, 32)
	var scalar secp256k1.ModNScalar
	for {
		rand.Read(material) // never fails
		if tooLarge := scalar.SetByteSlice(material); !tooLarge && !scalar.IsZero() {
			scalar.Zero()
			return material
		}
	}
}

// sign returns r || s of a digest of 32 bytes. The nonce is that of RFC 6979 section 3.2, with extra as the additional data of section 3.6:
// random bytes hedge it, nil makes the signature deterministic.
//
// s is the smaller of the two that verify. Verifiers exist that take no other (Bitcoin's, libsecp256k1), and none that refuses it.
func (k *koblitz) sign(digest, extra []byte) []byte {
	scalar := k.scalar.Bytes()
	defer clear(scalar[:])
	var e secp256k1.ModNScalar
	e.SetByteSlice(digest)
	for try := uint32(0); ; try++ {
		nonce := secp256k1.NonceRFC6979(scalar[:], digest, extra, nil, try)
		p := multiplyBase(nonce)
		x, _ := p.affine()
		var r, s secp256k1.ModNScalar
		r.SetBytes(x.Bytes()) // modulo the order
		inverse := invert(nonce)
		s.Mul2(&k.scalar, &r).Add(&e).Mul(&inverse)
		nonce.Zero()
		inverse.Zero()
		if r.IsZero() || s.IsZero() {
			continue // as FIPS 186-5 section 6.4.1 says; it has not happened to anybody yet
		}
		if s.IsOverHalfOrder() {
			s.Negate()
		}
		signature := make([]byte, 64)
		r.PutBytesUnchecked(signature[:32])
		s.PutBytesUnchecked(signature[32:])
		return signature
	}
}

// lowS replaces the s of a signature r || s by the smaller of the two that verify.
func lowS(signature []byte) {
	var s secp256k1.ModNScalar
	s.SetByteSlice(signature[32:])
	if s.IsOverHalfOrder() {
		s.Negate()
		s.PutBytesUnchecked(signature[32:])
	}
}

// invert returns 1/n. The inversion takes a time that depends on its argument, so its argument is n times a random number.
func invert(n *secp256k1.ModNScalar) secp256k1.ModNScalar {
	var random [32]byte
	var blind, inverse secp256k1.ModNScalar
	for blind.IsZero() {
		rand.Read(random[:]) // never fails
		blind.SetBytes(&random)
	}
	inverse.Mul2(n, &blind).InverseNonConst().Mul(&blind)
	clear(random[:])
	blind.Zero()
	return inverse
}

// point is a point of secp256k1 in homogeneous coordinates (X/Z, Y/Z); the neutral element is (0, 1, 0). The coordinates are normalized.
type point struct{ x, y, z secp256k1.FieldVal }

// multiples are d * 16^w times the base point, for every window w of four bits of a scalar and every digit d: 120 KB, made once when the first
// key is used. It never changes.
var multiples = sync.OnceValue(func() *[64][16]point {
	all := new([64][16]point)
	base := secp256k1.Params()
	var p point
	p.x.SetByteSlice(base.Gx.FillBytes(make([]byte, 32)))
	p.y.SetByteSlice(base.Gy.FillBytes(make([]byte, 32)))
	p.z.SetInt(1)
	for w := range all {
		all[w][0].y.SetInt(1)
		for d := range 15 {
			all[w][d+1] = add(&all[w][d], &p)
		}
		p = add(&all[w][15], &p)
	}
	return all
})

// multiplyBase returns n times the base point: the sum of one multiple for each digit, for which all multiples of the window are read.
func multiplyBase(n *secp256k1.ModNScalar) point {
	table := multiples()
	digits := n.Bytes()
	defer clear(digits[:])
	var sum point
	sum.y.SetInt(1)
	for w := range table {
		digit := digits[31-w/2] >> (4 * (w % 2)) & 15
		chosen := choose(&table[w], digit)
		sum = add(&sum, &chosen)
	}
	return sum
}

// choose returns multiples[i]: the sum of all of them, each times 1 or 0.
func choose(multiples *[16]point, i byte) point {
	var chosen point
	for j := range multiples {
		difference := byte(j) ^ i
		one := (difference - 1) >> 7 // 1 if the difference is 0, which is below 16
		for _, c := range [3][2]*secp256k1.FieldVal{{&chosen.x, &multiples[j].x}, {&chosen.y, &multiples[j].y}, {&chosen.z, &multiples[j].z}} {
			term := *c[1]
			c[0].Add(term.MulInt(one))
		}
	}
	chosen.normalize()
	return chosen
}

// add returns p + q, whatever points they are, also the same or neutral: the complete formula for curves with a = 0 of Renes, Costello and
// Batina (Complete addition formulas for prime order elliptic curves, 2016, algorithm 7), here with b = 7.
//
// The numbers in the comments are magnitudes: a product takes factors up to 8 and has 1, a sum has the sum, the negative of m has m+1.
func add(p, q *point) point {
	var xx, yy, zz, xy, yz, xz, pSum, qSum secp256k1.FieldVal
	xx.Mul2(&p.x, &q.x)
	yy.Mul2(&p.y, &q.y)
	zz.Mul2(&p.z, &q.z)
	cross := func(to, p1, p2, q1, q2, one, two *secp256k1.FieldVal) { // p1*q2 + p2*q1, given p1*q1 and p2*q2
		pSum.Add2(p1, p2)
		qSum.Add2(q1, q2)
		to.Mul2(&pSum, &qSum)
		pSum.Add2(one, two).Negate(2)
		to.Add(&pSum) // 4
	}
	cross(&xy, &p.x, &p.y, &q.x, &q.y, &xx, &yy)
	cross(&yz, &p.y, &p.z, &q.y, &q.z, &yy, &zz)
	cross(&xz, &p.x, &p.z, &q.x, &q.z, &xx, &zz)
	xx.MulInt(3)                          // 3
	zz.MulInt(3 * 7).Normalize()          // 1
	xz.Normalize().MulInt(21).Normalize() // 1
	var sum, difference, negated, t secp256k1.FieldVal
	sum.Add2(&yy, &zz) // 2
	negated.NegateVal(&zz, 1)
	difference.Add2(&yy, &negated) // 3
	var r point
	t.Mul2(&yz, &xz).Negate(1)
	r.x.Mul2(&xy, &difference).Add(&t) // 3
	t.Mul2(&xx, &xz)
	r.y.Mul2(&sum, &difference).Add(&t) // 2
	t.Mul2(&xx, &xy)
	r.z.Mul2(&sum, &yz).Add(&t) // 2
	r.normalize()
	return r
}

func (p *point) normalize() {
	p.x.Normalize()
	p.y.Normalize()
	p.z.Normalize()
}

// affine returns the coordinates of a point that is not neutral.
func (p *point) affine() (x, y secp256k1.FieldVal) {
	inverse := p.z
	inverse.Inverse()
	x.Mul2(&p.x, &inverse).Normalize()
	y.Mul2(&p.y, &inverse).Normalize()
	return x, y
}

// materialKoblitz is material for secp256k1, which crypto/x509 refuses (RFC 5915 section 3).
func (r *Row) materialKoblitz(e *envelope) ([]byte, error) {
	var curve asn1.ObjectIdentifier
	if rest, err := asn1.Unmarshal(e.Algorithm.Parameters.FullBytes, &curve); err != nil || len(rest) > 0 ||
		!curve.Equal(oidSecp256k1) || !e.Algorithm.Algorithm.Equal(oidECPublicKey) {
		return nil, r.otherAlgorithm()
	}
	var key sec1
	if rest, err := asn1.Unmarshal(e.PrivateKey, &key); err != nil || len(rest) > 0 || key.Version != 1 || len(key.PrivateKey) > 32 {
		return nil, fmt.Errorf("%w: not a private key in PKCS#8", ErrMaterial)
	}
	if named := key.Parameters.Bytes; len(named) > 0 && !bytes.Equal(named, e.Algorithm.Parameters.FullBytes) {
		return nil, fmt.Errorf("%w: the key names two curves", ErrMaterial)
	}
	material := make([]byte, 32)
	copy(material[32-len(key.PrivateKey):], key.PrivateKey)
	clear(key.PrivateKey)
	return material, nil
}

// export returns the key in PKCS#8, the public half enclosed, as crypto/x509 does for other curves.
func (k *koblitz) export() ([]byte, error) {
	public, err := pkix.Point(k.public)
	if err != nil {
		return nil, err
	}
	encoded := make([]byte, 0, len(pkcs8Koblitz)+32+len(pkcs8KoblitzPublic)+len(public))
	encoded = append(encoded, pkcs8Koblitz...)
	encoded = encoded[:len(encoded)+32]
	k.scalar.PutBytesUnchecked(encoded[len(encoded)-32:])
	encoded = append(encoded, pkcs8KoblitzPublic...)
	return append(encoded, public...), nil
}

var oidSecp256k1 = asn1.ObjectIdentifier{1, 3, 132, 0, 10}

// What is before the scalar, and between it and the point, in PKCS#8.
var (
	pkcs8Koblitz = []byte{
		0x30, 0x81, 0x84, 0x02, 0x01, 0x00,
		0x30, 0x10, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x05, 0x2b, 0x81, 0x04, 0x00, 0x0a,
		0x04, 0x6d, 0x30, 0x6b, 0x02, 0x01, 0x01, 0x04, 0x20,
	}
	pkcs8KoblitzPublic = []byte{0xa1, 0x44, 0x03, 0x42, 0x00}
)
