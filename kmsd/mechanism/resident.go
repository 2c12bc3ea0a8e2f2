package mechanism

import (
	"bytes"
	"crypto"
	"crypto/cipher"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"fmt"
	"slices"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// Request is one operation with the private half of a key that a device holds.
type Request struct {
	Usage  keyspec.Usage  // sign, decrypt, agree, encrypt, mac, wrap or unwrap
	Scheme keyspec.Scheme // empty where there is only one
	Input  []byte         // what is signed, the ciphertext, or the peer's SubjectPublicKeyInfo
	Digest bool           // Input is the digest, by the hash of Scheme, of what is signed
	Nonce  []byte         // of an AEAD
	AAD    []byte         // of an AEAD, or the label of RSAES-OAEP
}

// Device is one key of a device, as one operation sees it: it knows the context of that operation, and is not kept.
//
// Its answers are those of Key: a signature, in DER for ECDSA; a plaintext; a shared secret; a ciphertext with its tag; a MAC. A
// ciphertext that does not decrypt is ErrDecryption, whatever the cause.
type Device interface {
	Do(r Request) ([]byte, error)
}

// Resident returns the key whose private half is d, for one operation. public is its public half as ParseSPKI returns it, nil for a
// symmetric key. Errors wrap ErrMaterial: the public half is not of the row.
func (r *Row) Resident(public crypto.PublicKey, d Device) (*Key, error) {
	ok := public == nil
	switch r.Kind {
	case KindRSA:
		key, is := public.(*rsa.PublicKey)
		ok = is && key.N.BitLen() == r.size*8
	case KindECDSA:
		key, is := public.(*ecdsa.PublicKey)
		ok = is && key.Curve == r.curve.elliptic
	case KindEd25519:
		_, ok = public.(ed25519.PublicKey)
	case KindECDH:
		if key, is := public.(*ecdsa.PublicKey); is {
			public, _ = key.ECDH()
		}
		key, is := public.(*ecdh.PublicKey)
		ok = is && key != nil && key.Curve() == r.curve.ecdh
	}
	if !ok {
		return nil, fmt.Errorf("%w: the public half is not of a %s key", ErrMaterial, r.Algorithm)
	}
	k := &Key{row: r, public: public, device: d}
	if r.Kind == KindAEAD {
		k.aead = &deviceAEAD{device: d}
	}
	return k, nil
}

// PrivateUsages returns what a device has to be able to do with a key of these usages: certifying is signing, a MAC is verified by
// making it again, and RSA keys unwrap by decrypting. Verifying, encrypting and wrapping with a public key need no device.
func (r *Row) PrivateUsages(usages []keyspec.Usage) []keyspec.Usage {
	var out []keyspec.Usage
	for _, u := range usages {
		switch {
		case u == keyspec.Certify:
			u = keyspec.Sign
		case u == keyspec.Verify && r.Kind == KindHMAC:
			u = keyspec.MAC
		case u == keyspec.Unwrap && r.Kind == KindRSA:
			u = keyspec.Decrypt
		case u == keyspec.Verify, (u == keyspec.Encrypt || u == keyspec.Wrap) && r.Kind == KindRSA:
			continue
		}
		if !slices.Contains(out, u) {
			out = append(out, u)
		}
	}
	return out
}

// Confirm is the pairwise consistency test of a new resident key (FIPS 140-3 IG 10.3.A): what the private half makes in the device,
// the public half confirms, for everything that the key may do. Errors wrap ErrSelfTest or are those of the device.
func (k *Key) Confirm(usages []keyspec.Usage) error {
	sample := []byte("pairwise consistency test")
	failed := fmt.Errorf("%w: a new %s key is not consistent", ErrSelfTest, k.row.Algorithm)
	for _, u := range k.row.PrivateUsages(usages) {
		var got, want []byte
		var err error
		switch {
		case u == keyspec.Sign:
			_, err = k.Sign(nil, "", DER, Input{Message: sample})
		case u == keyspec.Decrypt && k.row.Kind == KindRSA:
			var sealed []byte
			if sealed, err = Encrypt(nil, k.public, keyspec.RSAOAEPSHA256, sample, nil); err == nil {
				want = sample
				got, err = k.Decrypt(nil, keyspec.RSAOAEPSHA256, sealed, nil)
			}
		case u == keyspec.Agree:
			err = k.checkPair()
		case u == keyspec.MAC:
			if want, err = k.MAC(nil, sample); err == nil {
				got, err = k.MAC(nil, sample)
			}
		case u == keyspec.Encrypt && slices.Contains(usages, keyspec.Decrypt):
			nonce := make([]byte, k.aead.NonceSize()) // of an invocation that is never sent anywhere, under a random nonce like all
			rand.Read(nonce)
			sealed := k.aead.Seal(nil, nonce, sample, nil)
			want = sample
			if err = k.Failed(); err == nil {
				got, err = k.aead.Open(nil, nonce, sealed, nil)
			}
		case u == keyspec.Wrap && slices.Contains(usages, keyspec.Unwrap):
			var wrapped []byte
			if wrapped, err = k.Wrap(nil, sample); err == nil {
				want = sample
				got, err = k.Unwrap(nil, wrapped)
			}
		}
		switch {
		case errors.Is(err, ErrVerification), errors.Is(err, ErrDecryption):
			return failed
		case err != nil:
			return err
		case !bytes.Equal(got, want):
			return failed
		}
	}
	return nil
}

// signInDevice has a digest, or an Ed25519 message, signed.
//
// Invariant: a signature that does not verify does not leave. A fault in the device could give the private key away (Boneh, DeMillo,
// Lipton 1997).
func (k *Key) signInDevice(dst []byte, s keyspec.Scheme, e Encoding, in Input) ([]byte, error) {
	r := Request{Usage: keyspec.Sign, Scheme: s, Input: in.Message}
	var space [64]byte
	if k.row.Kind != KindEd25519 {
		digest, err := in.digest(s, &space)
		if err != nil {
			return nil, err
		}
		r.Input, r.Digest, in = digest, true, Input{Digest: digest}
	}
	signature, err := k.device.Do(r)
	if err != nil {
		return nil, err
	}
	if Verify(k.public, s, DER, in, signature) != nil {
		return nil, fmt.Errorf("%w: the device made a %s signature that does not verify", ErrSelfTest, s)
	}
	if k.row.curve == k256 && k.row.Kind == KindECDSA {
		raw, err := AppendP1363(nil, signature, k.row.size)
		if err != nil {
			return nil, err
		}
		if lowS(raw); e == P1363 {
			return append(dst, raw...), nil
		}
		return AppendDER(dst, raw, k.row.size)
	}
	if e == P1363 {
		return AppendP1363(dst, signature, k.row.size)
	}
	return append(dst, signature...), nil
}

// do has the device do r and appends what comes of it, which has size bytes unless that is 0, to dst.
func (k *Key) do(dst []byte, r Request, size int) ([]byte, error) {
	out, err := k.device.Do(r)
	if err != nil {
		return nil, err
	}
	defer clear(out)
	if size != 0 && len(out) != size {
		return nil, fmt.Errorf("%w: the device answered %d bytes, not %d", ErrSelfTest, len(out), size)
	}
	return append(dst, out...), nil
}

// Failed returns the error that the device met when AEAD was used, which a cipher.AEAD has no way to tell. It is nil for other keys.
//
// Invariant: nothing that Seal of a resident key returned is used before Failed said that it worked.
func (k *Key) Failed() error {
	if a, ok := k.aead.(*deviceAEAD); ok {
		return a.err
	}
	return nil
}

// Overhead and nonce of every AEAD of this package, in bytes.
const (
	aeadNonce = 12
	aeadTag   = 16
)

// deviceAEAD is a key in a device as cipher.AEAD, for one operation.
type deviceAEAD struct {
	device Device
	err    error // of the last call
}

var _ cipher.AEAD = (*deviceAEAD)(nil)

func (a *deviceAEAD) NonceSize() int { return aeadNonce }
func (a *deviceAEAD) Overhead() int  { return aeadTag }

// Seal returns zeros where the device fails, as many as the ciphertext would have.
func (a *deviceAEAD) Seal(dst, nonce, plaintext, additional []byte) []byte {
	var out []byte
	out, a.err = a.device.Do(Request{Usage: keyspec.Encrypt, Input: plaintext, Nonce: nonce, AAD: additional})
	if a.err == nil && len(out) != len(plaintext)+aeadTag {
		a.err = fmt.Errorf("%w: the device made a ciphertext of %d bytes of a plaintext of %d", ErrSelfTest, len(out), len(plaintext))
	}
	if a.err != nil {
		out = make([]byte, len(plaintext)+aeadTag)
	}
	return append(dst, out...)
}

func (a *deviceAEAD) Open(dst, nonce, sealed, additional []byte) ([]byte, error) {
	var out []byte
	if len(sealed) < aeadTag {
		a.err = ErrDecryption
		return nil, a.err
	}
	out, a.err = a.device.Do(Request{Usage: keyspec.Decrypt, Input: sealed, Nonce: nonce, AAD: additional})
	if a.err != nil {
		return nil, a.err
	}
	defer clear(out)
	if len(out) != len(sealed)-aeadTag {
		a.err = fmt.Errorf("%w: the device made a plaintext of %d bytes of a ciphertext of %d", ErrSelfTest, len(out), len(sealed))
		return nil, a.err
	}
	return append(dst, out...), nil
}
