package engine

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"

	"github.com/kmsd-project/kmsd/client/ciphertext"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/mechanism"
)

// Encrypt appends the ciphertext of data to dst: for an AEAD key a message of package ciphertext, under a nonce the daemon
// chose; for an RSA key the bare RSAES-OAEP block, aad being its label.
func (e *Engine) Encrypt(ctx context.Context, c *Caller, ref keyspec.Ref, data, aad, dst []byte) (sealed []byte, number keyspec.Version, err error) {
	err = e.do(ctx, c, &act{op: "encrypt", ref: ref, usage: keyspec.Encrypt}, func(u *use) error {
		number = u.version.Number
		row, err := mechanism.Lookup(u.key.Algorithm)
		if err != nil {
			return err
		}
		if row.Kind == mechanism.KindRSA {
			if err := checkLabel(u.key, aad); err != nil {
				return err
			}
			public, err := u.public()
			if err != nil {
				return err
			}
			sealed, err = mechanism.Encrypt(dst, public, keyspec.RSAOAEPSHA256, data, aad)
			return err
		}
		sealed, err = u.seal(dst, ciphertext.Message, data, aad)
		return err
	})
	return sealed, number, err
}

// seal appends data sealed under the version in use to dst and counts the use of a nonce.
func (u *use) seal(dst []byte, f ciphertext.Format, data, aad []byte) ([]byte, error) {
	k, err := u.secret()
	if err != nil {
		return nil, err
	}
	if k.AEAD() == nil {
		return nil, errAEAD(u.key.Algorithm)
	}
	if err := u.countInvocation(); err != nil {
		return nil, err
	}
	h := ciphertext.Header{Format: f, Algorithm: u.key.Algorithm, Version: u.version.Number}
	sealed, err := ciphertext.Append(dst, h, k.AEAD(), data, aad)
	if failed := k.Failed(); failed != nil {
		return nil, failed
	}
	return sealed, err
}

// Decrypt opens what Encrypt or DataKey made and appends the plaintext to dst. The version is the one the ciphertext names;
// for an RSA key, whose ciphertexts name none, it is that of ref, or else every version is tried. Every failure is
// ErrDecryption.
//
// Invariant: a MOSIP module key decrypts nothing but the keys of payloads that are addressed to it: 32 bytes under an empty label, with
// its usage unwrap. What kmsd itself has such a key keep, the wrapping key of its namespace, is under another label. MOSIP wraps the keys of
// its private keys at rest in just this way: who may decrypt with a module key and has rows of MOSIP's key_store can open these.
func (e *Engine) Decrypt(ctx context.Context, c *Caller, ref keyspec.Ref, sealed, aad, label, dst []byte) (data []byte, number keyspec.Version, err error) {
	return e.DecryptWith(ctx, c, ref, "", sealed, aad, label, dst)
}

// DecryptWith is Decrypt by a scheme, which only RSA keys have.
func (e *Engine) DecryptWith(ctx context.Context, c *Caller, ref keyspec.Ref, s keyspec.Scheme, sealed, aad, label, dst []byte) (data []byte, number keyspec.Version, err error) {
	a := act{op: "decrypt", ref: ref, usage: keyspec.Decrypt, module: true}
	h, headerErr := ciphertext.ParseHeader(sealed)
	if headerErr == nil {
		a.head = &h
	}
	err = e.do(ctx, c, &a, func(u *use) error {
		row, err := mechanism.Lookup(u.key.Algorithm)
		if err != nil {
			return err
		}
		if row.Kind == mechanism.KindRSA {
			_, err = u.tryVersions(func() error {
				k, err := u.secret()
				if err != nil {
					return err
				}
				if u.key.Profile == mechanism.ProfileMOSIPModule {
					data, err = decryptKey(k, sealed, label, dst)
				} else {
					data, err = k.Decrypt(dst, s, sealed, label)
				}
				return err
			})
			number = u.version.Number
			return err
		}
		if s != "" {
			return fmt.Errorf("%w: a %s key has no scheme", ErrInput, u.key.Algorithm)
		}
		if headerErr != nil {
			return ErrDecryption
		}
		if h.Format == ciphertext.Stream {
			return fmt.Errorf("%w: this is a stream, use stream_begin", ErrUnsupported)
		}
		number = u.version.Number
		data, err = u.open(dst, sealed, aad)
		return err
	})
	return data, number, err
}

// decryptKey appends the AES-256 key to dst that was wrapped for a module key.
func decryptKey(k *mechanism.Key, wrapped, label, dst []byte) ([]byte, error) {
	if len(label) > 0 {
		return nil, ErrDecryption
	}
	data, err := k.Decrypt(dst, keyspec.RSAOAEPSHA256, wrapped, nil)
	if err != nil {
		return nil, err
	}
	if plain := data[len(dst):]; len(plain) != payloadKeySize {
		clear(plain)
		return nil, ErrDecryption
	}
	return data, nil
}

// payloadKeySize is the length in bytes of the key of a MOSIP payload.
const payloadKeySize = 32

func isAEAD(a keyspec.Algorithm) bool {
	row, err := mechanism.Lookup(a)
	return err == nil && row.Kind == mechanism.KindAEAD
}

// follow makes the version that a header names the one in use. A ciphertext of another key is one that does not decrypt.
func (u *use) follow(h *ciphertext.Header) error {
	if h.Algorithm != u.key.Algorithm || u.act.ref.Version != 0 && u.act.ref.Version != h.Version {
		return ErrDecryption
	}
	v, err := version(u.key, h.Version, u.now)
	if err != nil {
		return ErrDecryption
	}
	u.version = v
	return nil
}

// open appends the plaintext of sealed to dst.
func (u *use) open(dst, sealed, aad []byte) ([]byte, error) {
	k, err := u.secret()
	if err != nil {
		return nil, err
	}
	if k.AEAD() == nil {
		return nil, errAEAD(u.key.Algorithm)
	}
	data, err := ciphertext.Open(dst, k.AEAD(), sealed, aad)
	if failed := k.Failed(); failed != nil {
		return nil, failed
	}
	if err != nil {
		return nil, ErrDecryption
	}
	return data, nil
}

// Rewrap opens a message, or the head of a stream or an envelope, and appends to dst the same plaintext sealed under the
// current version. The plaintext stays inside.
func (e *Engine) Rewrap(ctx context.Context, c *Caller, name keyspec.Name, sealed, aad, dst []byte) (again []byte, number keyspec.Version, err error) {
	err = e.do(ctx, c, &act{op: "rewrap", ref: keyspec.Ref{Name: name}, usage: keyspec.Encrypt}, func(u *use) error {
		newest := u.version
		h, err := ciphertext.ParseHeader(sealed)
		if err != nil {
			return ErrDecryption
		}
		if err := u.follow(&h); err != nil {
			return err
		}
		if err := permit(u.key, u.version, keyspec.Decrypt, u.now); errors.Is(err, errCompromised) {
			err = u.compromised()
			if err != nil {
				return err
			}
		} else if err != nil {
			return err
		}
		plain, err := u.open(nil, sealed, aad)
		if err != nil {
			return err
		}
		defer clear(plain)
		u.version = newest
		number = newest.Number
		again, err = u.seal(dst, h.Format, plain, aad)
		return err
	})
	return again, number, err
}

// DataKey makes a fresh key of size bytes (16, 32 or 64; 0: 32) and returns it in plain, unless the caller does not want it,
// and sealed under an AEAD key.
func (e *Engine) DataKey(ctx context.Context, c *Caller, ref keyspec.Ref, size int, aad []byte, withPlain bool) (plain, sealed []byte, number keyspec.Version, err error) {
	err = e.do(ctx, c, &act{op: "data_key", ref: ref, usage: keyspec.Encrypt}, func(u *use) error {
		switch size {
		case 0:
			size = 32
		case 16, 32, 64:
		default:
			return fmt.Errorf("%w: a data key has 16, 32 or 64 bytes", ErrInput)
		}
		key := make([]byte, size)
		rand.Read(key)
		number = u.version.Number
		sealed, err = u.seal(nil, ciphertext.DataKey, key, aad)
		if err != nil || !withPlain {
			clear(key)
			return err
		}
		plain = key
		return nil
	})
	return plain, sealed, number, err
}

// MaxRandom is the number of random bytes given at once: a frame less its overhead.
const MaxRandom = 65_000

// Random appends n random bytes to dst.
func (e *Engine) Random(ctx context.Context, c *Caller, n int, dst []byte) (out []byte, err error) {
	err = e.do(ctx, c, &act{op: "random"}, func(*use) error {
		if n < 1 || n > MaxRandom {
			return fmt.Errorf("%w: 1 to %d bytes", ErrInput, MaxRandom)
		}
		start := len(dst)
		out = append(dst, make([]byte, n)...)
		rand.Read(out[start:])
		return nil
	})
	return out, err
}
