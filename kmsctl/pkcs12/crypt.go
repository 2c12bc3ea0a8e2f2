package pkcs12

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/des"
	"crypto/pbkdf2"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/asn1"
	"fmt"
	"hash"
	"math/big"
	"unicode/utf16"

	"golang.org/x/crypto/cryptobyte"
	casn1 "golang.org/x/crypto/cryptobyte/asn1"
)

var (
	oidPBES2  = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 5, 13}
	oidPBKDF2 = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 5, 12}
)

// hashes are those that MACs and key derivation are made with, each with the identifier of its HMAC.
var hashes = []struct {
	hash, hmac asn1.ObjectIdentifier
	new        func() hash.Hash
}{
	{asn1.ObjectIdentifier{1, 3, 14, 3, 2, 26}, asn1.ObjectIdentifier{1, 2, 840, 113549, 2, 7}, sha1.New},
	{asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 4}, asn1.ObjectIdentifier{1, 2, 840, 113549, 2, 8}, sha256.New224},
	{asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 1}, asn1.ObjectIdentifier{1, 2, 840, 113549, 2, 9}, sha256.New},
	{asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 2}, asn1.ObjectIdentifier{1, 2, 840, 113549, 2, 10}, sha512.New384},
	{asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 3}, asn1.ObjectIdentifier{1, 2, 840, 113549, 2, 11}, sha512.New},
}

func hashOf(oid asn1.ObjectIdentifier) func() hash.Hash {
	for _, h := range hashes {
		if h.hash.Equal(oid) {
			return h.new
		}
	}
	return nil
}

// ciphers are those of PBES2.
var ciphers = []struct {
	oid  asn1.ObjectIdentifier
	size int
	new  func([]byte) (cipher.Block, error)
}{
	{asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 1, 2}, 16, aes.NewCipher},
	{asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 1, 22}, 24, aes.NewCipher},
	{asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 1, 42}, 32, aes.NewCipher},
	{asn1.ObjectIdentifier{1, 2, 840, 113549, 3, 7}, 24, des.NewTripleDESCipher},
}

// schemes are the older ones (RFC 7292 appendix C), all with SHA-1.
var schemes = []struct {
	oid  asn1.ObjectIdentifier
	size int
	new  func([]byte) (cipher.Block, error)
}{
	{asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 12, 1, 3}, 24, des.NewTripleDESCipher},
	{asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 12, 1, 4}, 16, twoKeys},
	{asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 12, 1, 5}, 16, newRC2},
	{asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 12, 1, 6}, 5, newRC2},
}

// twoKeys is triple DES with the first key used again as the third.
func twoKeys(key []byte) (cipher.Block, error) {
	return des.NewTripleDESCipher(append(key[:16:16], key[:8]...))
}

// decrypt decrypts by the scheme that an AlgorithmIdentifier names.
func (r *reader) decrypt(algorithm cryptobyte.String, sealed []byte) ([]byte, error) {
	var oid asn1.ObjectIdentifier
	var params cryptobyte.String
	if !algorithm.ReadASN1ObjectIdentifier(&oid) || !algorithm.ReadASN1(&params, casn1.SEQUENCE) {
		return nil, malformed("scheme of encryption")
	}
	if oid.Equal(oidPBES2) {
		return r.pbes2(params, sealed)
	}
	for _, s := range schemes {
		if !s.oid.Equal(oid) {
			continue
		}
		var salt cryptobyte.String
		var iterations int
		if !params.ReadASN1(&salt, casn1.OCTET_STRING) || !params.ReadASN1Integer(&iterations) {
			return nil, malformed("parameters of encryption")
		}
		if err := r.spend(iterations); err != nil {
			return nil, err
		}
		password := bmpPasswords(r.password)[0]
		key := derive(sha1.New, idKey, password, salt, iterations, s.size)
		defer clear(key)
		block, err := s.new(key)
		if err != nil {
			return nil, malformed("key of encryption")
		}
		return openCBC(block, derive(sha1.New, idIV, password, salt, iterations, block.BlockSize()), sealed)
	}
	return nil, fmt.Errorf("%w: encryption by %s", ErrUnsupported, oid)
}

// pbes2 decrypts by PBES2 (RFC 8018 section 6.2).
func (r *reader) pbes2(params cryptobyte.String, sealed []byte) ([]byte, error) {
	var kdf, kdfParams, salt, scheme, iv cryptobyte.String
	var kdfOID, cipherOID asn1.ObjectIdentifier
	var iterations int
	if !params.ReadASN1(&kdf, casn1.SEQUENCE) || !kdf.ReadASN1ObjectIdentifier(&kdfOID) || !params.ReadASN1(&scheme, casn1.SEQUENCE) ||
		!scheme.ReadASN1ObjectIdentifier(&cipherOID) {
		return nil, malformed("PBES2")
	}
	if !kdfOID.Equal(oidPBKDF2) {
		return nil, fmt.Errorf("%w: key derivation by %s", ErrUnsupported, kdfOID)
	}
	if !kdf.ReadASN1(&kdfParams, casn1.SEQUENCE) || !kdfParams.ReadASN1(&salt, casn1.OCTET_STRING) || !kdfParams.ReadASN1Integer(&iterations) ||
		!scheme.ReadASN1(&iv, casn1.OCTET_STRING) {
		return nil, malformed("PBES2")
	}
	var length int
	if kdfParams.PeekASN1Tag(casn1.INTEGER) && !kdfParams.ReadASN1Integer(&length) {
		return nil, malformed("PBKDF2")
	}
	h := sha1.New // the default
	if !kdfParams.Empty() {
		var prf cryptobyte.String
		var oid asn1.ObjectIdentifier
		if !kdfParams.ReadASN1(&prf, casn1.SEQUENCE) || !prf.ReadASN1ObjectIdentifier(&oid) {
			return nil, malformed("PBKDF2")
		}
		h = nil
		for _, known := range hashes {
			if known.hmac.Equal(oid) {
				h = known.new
			}
		}
		if h == nil {
			return nil, fmt.Errorf("%w: PBKDF2 with %s", ErrUnsupported, oid)
		}
	}
	for _, c := range ciphers {
		if !c.oid.Equal(cipherOID) {
			continue
		}
		if length != 0 && length != c.size {
			return nil, malformed("length of the key in PBKDF2")
		}
		if err := r.spend(iterations); err != nil {
			return nil, err
		}
		key, err := pbkdf2.Key(h, r.password, salt, iterations, c.size)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrUnsupported, err)
		}
		defer clear(key)
		block, err := c.new(key)
		if err != nil {
			return nil, malformed("key of encryption")
		}
		return openCBC(block, iv, sealed)
	}
	return nil, fmt.Errorf("%w: encryption by %s", ErrUnsupported, cipherOID)
}

// openCBC decrypts and takes the padding off. The MAC was checked before, so that its answers tell nobody anything.
func openCBC(block cipher.Block, iv, sealed []byte) ([]byte, error) {
	size := block.BlockSize()
	if len(iv) != size || len(sealed) == 0 || len(sealed)%size != 0 {
		return nil, malformed("length of what is encrypted")
	}
	plain := make([]byte, len(sealed))
	cipher.NewCBCDecrypter(block, iv).CryptBlocks(plain, sealed)
	n := int(plain[len(plain)-1])
	if n == 0 || n > size || !bytes.Equal(plain[len(plain)-n:], bytes.Repeat([]byte{byte(n)}, n)) {
		clear(plain)
		return nil, ErrPassword // a key with a password of its own
	}
	return plain[:len(plain)-n], nil
}

// bmpPasswords returns a password as RFC 7292 appendix B.1 has it, in UTF-16 with a zero at the end; the empty one in both ways that
// software writes it.
func bmpPasswords(password string) [][]byte {
	var b []byte
	for _, u := range utf16.Encode([]rune(password)) {
		b = append(b, byte(u>>8), byte(u))
	}
	if len(b) == 0 {
		return [][]byte{{0, 0}, nil}
	}
	return [][]byte{append(b, 0, 0)}
}

// Purposes of derived bytes (RFC 7292 appendix B.3).
const (
	idKey = 1
	idIV  = 2
	idMAC = 3
)

// derive is the key derivation of RFC 7292 appendix B.2.
func derive(h func() hash.Hash, id byte, password, salt []byte, iterations, size int) []byte {
	d := h()
	u, v := d.Size(), d.BlockSize()
	fill := func(b []byte) []byte { // to a multiple of v
		if len(b) == 0 {
			return nil
		}
		n := (len(b) + v - 1) / v * v
		return bytes.Repeat(b, n/len(b)+1)[:n]
	}
	diversifier := bytes.Repeat([]byte{id}, v)
	in := append(fill(salt), fill(password)...)
	defer clear(in)
	var out []byte
	one := big.NewInt(1)
	modulus := new(big.Int).Lsh(one, uint(v)*8)
	for {
		d.Reset()
		d.Write(diversifier)
		d.Write(in)
		a := d.Sum(nil)
		for range iterations - 1 {
			d.Reset()
			d.Write(a)
			a = d.Sum(a[:0])
		}
		if out = append(out, a...); len(out) >= size {
			return out[:size]
		}
		b := bytes.Repeat(a, v/u+1)[:v]
		add := new(big.Int).SetBytes(b)
		add.Add(add, one)
		for i := 0; i < len(in); i += v {
			sum := new(big.Int).SetBytes(in[i : i+v])
			sum.Add(sum, add).Mod(sum, modulus)
			sum.FillBytes(in[i : i+v])
		}
	}
}
