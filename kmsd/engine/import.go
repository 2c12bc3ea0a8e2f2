package engine

import (
	"bytes"
	"context"
	"crypto/hpke"
	"crypto/rand"
	"fmt"
	"sync"
	"time"

	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/mechanism"
)

// Limits of imports under way.
const (
	importLife   = 2 * time.Minute
	importsEach  = 8  // of one process
	importsUID   = 64 // of one user
	importsAll   = 256
	importInfo   = "kmsd import v1"
	MaxWrappedIn = mechanism.MaxEncoded + 2048 // bytes: the encapsulated key takes 1,120
)

// ImportToken names a one-time import key.
type ImportToken [16]byte

// imports are the one-time keys that callers have asked for.
type imports struct {
	mu   sync.Mutex
	keys map[ImportToken]importKey
}

// importKey opens one import, for the process that asked for it.
type importKey struct {
	private hpke.PrivateKey
	uid     uint32
	pid     int32
	until   time.Time
}

func (i *imports) add(token ImportToken, k importKey, now time.Time) error {
	i.sweep(now)
	i.mu.Lock()
	defer i.mu.Unlock()
	each, user := 0, 0
	for _, other := range i.keys {
		if other.uid != k.uid {
			continue
		}
		user++
		if other.pid == k.pid {
			each++
		}
	}
	if each >= importsEach || user >= importsUID || len(i.keys) >= importsAll {
		return fmt.Errorf("%w: too many imports were begun and not finished", ErrInput)
	}
	if i.keys == nil {
		i.keys = make(map[ImportToken]importKey)
	}
	i.keys[token] = k
	return nil
}

// take removes and returns a key. Whoever else asks for it does not find it.
func (i *imports) take(token ImportToken, c *Caller, now time.Time) (hpke.PrivateKey, bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	k, ok := i.keys[token]
	if !ok || k.uid != c.UID || k.pid != c.PID {
		return nil, false
	}
	delete(i.keys, token)
	return k.private, now.Before(k.until)
}

func (i *imports) sweep(now time.Time) {
	i.mu.Lock()
	defer i.mu.Unlock()
	for token, k := range i.keys {
		if !now.Before(k.until) {
			delete(i.keys, token)
		}
	}
}

func (i *imports) clear() {
	i.mu.Lock()
	defer i.mu.Unlock()
	clear(i.keys)
}

// ImportBegin returns a one-time HPKE public key (RFC 9180: MLKEM768-X25519, HKDF-SHA256, AES-256-GCM) to which the same
// process can wrap key material within two minutes.
func (e *Engine) ImportBegin(ctx context.Context, c *Caller) (public []byte, token ImportToken, err error) {
	err = e.do(ctx, c, &act{op: "key_import_begin"}, func(u *use) error {
		private, err := hpke.MLKEM768X25519().GenerateKey()
		if err != nil {
			return err
		}
		rand.Read(token[:])
		public = private.PublicKey().Bytes()
		return e.imports.add(token, importKey{private, c.UID, c.PID, u.now.Add(importLife)}, u.now)
	})
	if err != nil {
		return nil, ImportToken{}, err
	}
	return public, token, nil
}

// material returns what is to be imported as key material. For a key that stays in a device that is the file itself, which the device takes
// apart.
func (n *NewKey) material(row *mechanism.Row, encoded []byte) ([]byte, error) {
	if n.resident() {
		return bytes.Clone(encoded), nil
	}
	return row.Import(encoded)
}

// Import makes a key of material in plain: PKCS#8 DER for asymmetric keys, raw bytes for symmetric ones, and for a key that another program
// has made in a device the file that it has of it. It is refused outside the admin socket. encoded is wiped.
func (e *Engine) Import(ctx context.Context, c *Caller, n *NewKey, encoded, requestKey []byte) (*keystore.Key, error) {
	defer clear(encoded)
	a := &act{op: "key_import", ref: keyspec.Ref{Name: n.Name}, info: "plaintext"}
	return e.create(ctx, c, a, n, keyspec.Imported, requestKey, func(u *use, row *mechanism.Row) ([]byte, error) {
		if !c.Admin {
			return nil, fmt.Errorf("%w: plaintext import, use key_import_begin", ErrUnsupported)
		}
		return n.material(row, encoded)
	})
}

// ImportWrapped makes a key of material that was HPKE-sealed to the key of ImportBegin with the info "kmsd import v1". The
// token is spent whatever comes of it.
func (e *Engine) ImportWrapped(ctx context.Context, c *Caller, n *NewKey, wrapped []byte, token ImportToken, requestKey []byte) (*keystore.Key, error) {
	a := &act{op: "key_import", ref: keyspec.Ref{Name: n.Name}, info: "wrapped"}
	return e.create(ctx, c, a, n, keyspec.Imported, requestKey, func(u *use, row *mechanism.Row) ([]byte, error) {
		encoded, err := u.unsealed(wrapped, token)
		if err != nil {
			return nil, err
		}
		defer clear(encoded)
		return n.material(row, encoded)
	})
}

// unsealed opens what was sealed to the key of ImportBegin, whose token is spent by that. The caller wipes the result.
func (u *use) unsealed(wrapped []byte, token ImportToken) ([]byte, error) {
	private, ok := u.imports.take(token, u.caller, u.now)
	if !ok {
		return nil, fmt.Errorf("%w: unknown or spent import token", ErrInput)
	}
	if len(wrapped) > MaxWrappedIn {
		return nil, fmt.Errorf("%w: wrapped key over %d bytes", ErrInput, MaxWrappedIn)
	}
	encoded, err := hpke.Open(private, hpke.HKDFSHA256(), hpke.AES256GCM(), []byte(importInfo), wrapped)
	if err != nil {
		return nil, ErrDecryption
	}
	return encoded, nil
}
