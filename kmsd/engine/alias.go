package engine

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/asn1"
	"encoding/binary"
	"errors"
	"fmt"
	"math/big"
	"time"

	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/mechanism"
)

// Aliases returns the ways to find a key version by its public half that the store does not make by itself. Bridges know a
// key by such a value and not by its name.
func Aliases(number keyspec.Version, spki []byte) (list []keystore.Alias) {
	if id := ckaID(spki); id != nil {
		list = append(list, keystore.Alias{Kind: keystore.AliasCKAID, Value: id, Version: number})
	}
	if wire := sshWire(spki); wire != nil {
		sum := sha256.Sum256(wire)
		list = append(list, keystore.Alias{Kind: keystore.AliasSSH, Value: sum[:], Version: number})
	}
	return list
}

// ckaID is the CKA_ID of a public key: SHA-1 of the bits of its subjectPublicKey (RFC 5280 section 4.2.1.2 method 1). It is
// what most authorities put into certificates as subject key identifier, by which PKCS#11 software brings key and certificate
// together (PKCS#11 section 4.6.3). It is a name: nothing rests on SHA-1 having no collisions.
func ckaID(spki []byte) []byte {
	var info struct {
		Algorithm asn1.RawValue
		Key       asn1.BitString
	}
	if _, err := asn1.Unmarshal(spki, &info); err != nil {
		return nil
	}
	sum := sha1.Sum(info.Key.Bytes)
	return sum[:]
}

// sshWire returns a public key as SSH writes it (RFC 4253 section 6.6, RFC 5656 section 3.1, RFC 8709 section 4), or nil if SSH
// has no form for it.
func sshWire(spki []byte) []byte {
	public, err := mechanism.ParseSPKI(spki)
	if err != nil {
		return nil
	}
	text := func(b, s []byte) []byte {
		return append(binary.BigEndian.AppendUint32(b, uint32(len(s))), s...)
	}
	number := func(b []byte, n *big.Int) []byte {
		return text(b, n.FillBytes(make([]byte, n.BitLen()/8+1))) // with a zero before a first bit that is set
	}
	switch key := public.(type) {
	case *rsa.PublicKey:
		return number(number(text(nil, []byte("ssh-rsa")), big.NewInt(int64(key.E))), key.N)
	case *ecdsa.PublicKey:
		point, err := key.Bytes()
		if err != nil {
			return nil
		}
		curve := fmt.Sprintf("nistp%d", key.Curve.Params().BitSize)
		return text(text(text(nil, []byte("ecdsa-sha2-"+curve)), []byte(curve)), point)
	case ed25519.PublicKey:
		return text(text(nil, []byte("ssh-ed25519")), key)
	}
	return nil
}

// findPause is how long the refusal of a search takes at least, so that it does not show whether the store was asked for more
// than the alias.
const findPause = 2 * time.Millisecond

// Find returns the key, and the version of it, that has an alias. The policy decides on the name that was found before anything
// is answered: without a grant, and for keys that are not there, the error is ErrNotAvailable. Of several versions with the
// same public half the one that was made last is found.
func (e *Engine) Find(ctx context.Context, c *Caller, kind keystore.AliasKind, value []byte) (key *keystore.Key, number keyspec.Version, err error) {
	a := &act{op: "key_find", info: string(kind)}
	start := time.Now()
	err = e.do(ctx, c, a, func(u *use) error {
		size := sha256.Size
		switch kind {
		case keystore.AliasCKAID:
			size = sha1.Size
		case keystore.AliasSPKI, keystore.AliasThumbprint, keystore.AliasSSH:
		default:
			return fmt.Errorf("%w: keys are not found by %q", ErrInput, kind)
		}
		if len(value) != size {
			return fmt.Errorf("%w: %s has %d bytes", ErrInput, kind, size)
		}
		ref, err := u.store.Alias(kind, value)
		if errors.Is(err, keystore.ErrDamaged) && !u.administers() { // whose key that is cannot be told, so nobody is told
			u.detail = err.Error()
			return ErrNotAvailable
		}
		if err != nil {
			return err
		}
		a.ref, number = ref, ref.Version
		if err := u.authorise(); err != nil {
			return err
		}
		if key, err = u.store.Get(ref.Name); err == nil {
			u.asOf(key, u.now)
		}
		return err
	})
	if err != nil {
		select {
		case <-time.After(time.Until(start.Add(findPause))):
		case <-ctx.Done():
		}
		return nil, 0, err
	}
	return key, number, nil
}
