package mechanism

import (
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"fmt"
	"hash"
	"io"
	"sync/atomic"

	"golang.org/x/crypto/chacha20poly1305"

	"github.com/kmsd-project/kmsd/client/pkix"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// Key is a loaded private or secret key, ready for use. It is safe for concurrent use.
//
// Invariant: a Key is immutable but for the idle MAC state, and holds no reference to the material it was loaded from.
// Invariant: exactly the fields of its row's kind are set, or public and device.
type Key struct {
	row *Row

	rsa     *rsa.PrivateKey
	ecdsa   *ecdsa.PrivateKey
	koblitz *koblitz           // instead of ecdsa, for secp256k1
	ed25519 ed25519.PrivateKey // the 64-byte form: deriving the public half is two thirds of a signature
	ecdh    *ecdh.PrivateKey
	aead    cipher.AEAD
	block   cipher.Block // AES, for key wrapping
	secret  []byte       // HMAC and HKDF

	public crypto.PublicKey // of a resident key
	device Device           // holds its private half, nil for others

	// idle is a keyed MAC state nobody uses right now. One is enough to make a lone caller allocation-free, and unlike a
	// sync.Pool it dies with the Key.
	idle atomic.Pointer[macState]
}

type macState struct{ hash.Hash }

// Load parses material, the canonical form that NewKey and Import return. The bytes are copied. RSA material is checked
// only as far as CRT needs it; Import checks in full. Errors wrap ErrMaterial.
func (r *Row) Load(material []byte) (*Key, error) {
	if len(material) != r.size {
		return nil, fmt.Errorf("%w: %s has %d bytes of material", ErrMaterial, r.Algorithm, r.size)
	}
	k := &Key{row: r}
	var err error
	switch r.Kind {
	case KindRSA:
		k.rsa, err = loadRSA(material)
	case KindECDSA:
		if r.curve == k256 {
			k.koblitz, err = loadKoblitz(material)
			break
		}
		k.ecdsa, err = ecdsa.ParseRawPrivateKey(r.curve.elliptic, material)
	case KindEd25519:
		k.ed25519 = ed25519.NewKeyFromSeed(material)
	case KindECDH:
		k.ecdh, err = r.curve.ecdh.NewPrivateKey(material)
	case KindAEAD:
		err = k.loadAEAD(material)
	case KindHMAC, KindHKDF:
		k.secret = append([]byte(nil), material...)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: not a %s key", ErrMaterial, r.Algorithm)
	}
	return k, nil
}

func (k *Key) loadAEAD(material []byte) (err error) {
	if k.row.Algorithm == keyspec.ChaCha20Poly1305 {
		k.aead, err = chacha20poly1305.New(material)
		return err
	}
	if k.block, err = aes.NewCipher(material); err != nil {
		return err
	}
	k.aead, err = cipher.NewGCM(k.block)
	return err
}

// Algorithm returns the key's algorithm.
func (k *Key) Algorithm() keyspec.Algorithm { return k.row.Algorithm }

// Row returns the row of the key's algorithm.
func (k *Key) Row() *Row { return k.row }

// Public returns the public half: *rsa.PublicKey, *ecdsa.PublicKey, ed25519.PublicKey or *ecdh.PublicKey (ECDH on the
// NIST curves too). It is nil for symmetric keys.
func (k *Key) Public() crypto.PublicKey {
	if k.device != nil {
		return k.public
	}
	switch k.row.Kind {
	case KindRSA:
		return &k.rsa.PublicKey
	case KindECDSA:
		if k.koblitz != nil {
			return k.koblitz.public
		}
		return &k.ecdsa.PublicKey
	case KindEd25519:
		return k.ed25519.Public()
	case KindECDH:
		return k.ecdh.PublicKey()
	}
	return nil
}

// SPKI returns the public half as DER SubjectPublicKeyInfo (RFC 5280 section 4.1.2.7, RFC 8410). For symmetric keys the
// error wraps ErrUnsupported.
func (k *Key) SPKI() ([]byte, error) {
	public := k.Public()
	if public == nil {
		return nil, fmt.Errorf("%w: %s has no public half", ErrUnsupported, k.row.Algorithm)
	}
	return pkix.MarshalPublicKey(public)
}

// AEAD returns the cipher of an AEAD key, made once: nonces of 12 bytes, tags of 16. It is nil for other kinds.
// The caller owes it nonces that never repeat, and for a resident key a look at Failed.
func (k *Key) AEAD() cipher.AEAD { return k.aead }

// Format keeps key bytes out of everything fmt prints, whatever the verb.
func (k *Key) Format(s fmt.State, _ rune) { io.WriteString(s, "key("+string(k.row.Algorithm)+")") }

func (k *Key) unsupported(verb string) error {
	return fmt.Errorf("%w: %s cannot %s", ErrUnsupported, k.row.Algorithm, verb)
}
