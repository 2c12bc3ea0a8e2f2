package mechanism

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	_ "crypto/sha1" // for MGF1
	"crypto/sha256"
	"errors"
	"fmt"
	"math/big"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// Bounds of an RSA modulus in bits. Below the lower one nothing is made, imported or verified; above the upper one a
// public key from outside costs too much.
const (
	MinRSABits = 2048
	MaxRSABits = 8192
)

const rsaExponent = 65537

var errRSA = errors.New("not an RSA key")

func generateRSA(bits int) ([]byte, error) {
	private, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		return nil, err
	}
	return rsaMaterial(private, bits)
}

// rsaMaterial returns p || q of a key with two primes of bits/2 and the exponent 65537.
func rsaMaterial(private *rsa.PrivateKey, bits int) ([]byte, error) {
	switch {
	case private.N.BitLen() != bits:
		return nil, fmt.Errorf("%w: the modulus has %d bits, not %d", ErrMaterial, private.N.BitLen(), bits)
	case private.E != rsaExponent:
		return nil, fmt.Errorf("%w: the public exponent is not %d", ErrMaterial, rsaExponent)
	case len(private.Primes) != 2:
		return nil, fmt.Errorf("%w: the key has not exactly two primes", ErrMaterial)
	}
	p, q := private.Primes[0], private.Primes[1]
	if p.BitLen() != bits/2 || q.BitLen() != bits/2 {
		return nil, fmt.Errorf("%w: the primes are not half as long as the modulus", ErrMaterial)
	}
	if p.Cmp(q) < 0 {
		p, q = q, p // so that one key has one form
	}
	material := make([]byte, bits/8)
	p.FillBytes(material[:bits/16])
	q.FillBytes(material[bits/16:])
	return material, nil
}

// checkRSA makes the checks of an imported key that Load leaves out: primality and the distance of the primes
// (FIPS 186-5 appendix A.1.3).
func checkRSA(private *rsa.PrivateKey, bits int) error {
	p, q := private.Primes[0], private.Primes[1]
	if !p.ProbablyPrime(20) || !q.ProbablyPrime(20) {
		return fmt.Errorf("%w: a factor of the modulus is not prime", ErrMaterial)
	}
	if distance := new(big.Int).Sub(p, q); distance.CmpAbs(new(big.Int).Lsh(big.NewInt(1), uint(bits/2-100))) <= 0 {
		return fmt.Errorf("%w: the primes are too close to each other", ErrMaterial)
	}
	return nil
}

// loadRSA makes a key of p || q.
//
// d = (1 + k*phi) / e where k = -1/phi mod e. Since e is a 17-bit prime, only phi mod e goes through a division
// algorithm that depends on the value; a general modular inverse would walk through all of phi.
func loadRSA(material []byte) (*rsa.PrivateKey, error) {
	one, e := big.NewInt(1), big.NewInt(rsaExponent)
	half := len(material) / 2
	p := new(big.Int).SetBytes(material[:half])
	q := new(big.Int).SetBytes(material[half:])
	if p.Cmp(q) <= 0 || q.BitLen() != half*8 || p.Bit(0) == 0 || q.Bit(0) == 0 {
		return nil, errRSA
	}
	n := new(big.Int).Mul(p, q)
	if n.BitLen() != len(material)*8 {
		return nil, errRSA
	}
	phi := new(big.Int).Mul(new(big.Int).Sub(p, one), new(big.Int).Sub(q, one))
	k := new(big.Int).ModInverse(new(big.Int).Mod(phi, e), e)
	if k == nil {
		return nil, errRSA
	}
	k.Sub(e, k)
	d := k.Mul(k, phi)
	d.Add(d, one).Div(d, e)
	private := &rsa.PrivateKey{
		PublicKey: rsa.PublicKey{N: n, E: rsaExponent},
		D:         d,
		Primes:    []*big.Int{p, q},
	}
	private.Precompute()
	if err := private.Validate(); err != nil {
		return nil, errRSA
	}
	return private, nil
}

func checkRSAPublic(public *rsa.PublicKey) error {
	if bits := public.N.BitLen(); bits < MinRSABits || bits > MaxRSABits {
		return fmt.Errorf("%w: an RSA modulus has %d to %d bits", ErrInput, MinRSABits, MaxRSABits)
	}
	return nil
}

// Decrypt opens an RSAES-OAEP ciphertext (RFC 8017 section 7.1.2; SHA-256 for the label, and for MGF1 unless the scheme says SHA-1)
// and appends the plaintext to dst. Every failure that depends on the ciphertext is ErrDecryption.
func (k *Key) Decrypt(dst []byte, s keyspec.Scheme, ciphertext, label []byte) ([]byte, error) {
	if k.row.Kind != KindRSA {
		return nil, k.unsupported("decrypt with RSA-OAEP")
	}
	options := &rsa.OAEPOptions{Hash: crypto.SHA256, Label: label}
	switch s {
	case "", keyspec.RSAOAEPSHA256:
		s = keyspec.RSAOAEPSHA256
	case keyspec.RSAOAEPSHA256MGF1SHA1:
		options.MGFHash = crypto.SHA1 // no collision resistance is asked of it (RFC 8017 appendix B.2.1)
	default:
		return nil, fmt.Errorf("%w: %q is not a decryption scheme", ErrInput, string(s))
	}
	if k.device != nil {
		return k.do(dst, Request{Usage: keyspec.Decrypt, Scheme: s, Input: ciphertext, AAD: label}, 0)
	}
	plaintext, err := k.rsa.Decrypt(nil, ciphertext, options)
	if err != nil {
		return nil, ErrDecryption
	}
	return append(dst, plaintext...), nil
}

// Encrypt makes an RSAES-OAEP ciphertext of plaintext for an RSA key (RFC 8017 section 7.1.1; SHA-256 for the label and
// MGF1) and appends it to dst. A plaintext longer than the modulus less 66 bytes is ErrInput.
func Encrypt(dst []byte, public crypto.PublicKey, s keyspec.Scheme, plaintext, label []byte) ([]byte, error) {
	key, ok := public.(*rsa.PublicKey)
	if !ok {
		return nil, fmt.Errorf("%w: RSA-OAEP needs an RSA key", ErrUnsupported)
	}
	if s != "" && s != keyspec.RSAOAEPSHA256 {
		return nil, fmt.Errorf("%w: %q is not an encryption scheme", ErrInput, string(s))
	}
	if err := checkRSAPublic(key); err != nil {
		return nil, err
	}
	ciphertext, err := rsa.EncryptOAEP(sha256.New(), rand.Reader, key, plaintext, label)
	if err != nil {
		return nil, fmt.Errorf("%w: the plaintext does not fit into the modulus", ErrInput)
	}
	return append(dst, ciphertext...), nil
}
