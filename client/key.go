package client

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"fmt"
	"strings"

	"github.com/kmsd-project/kmsd/client/pkix"
	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// Key is a key in kmsd. It holds a name and a public key, never a private one, and is safe for concurrent use.
//
// Of an asymmetric key a Key is one version: the one that was current when it was looked up, so that Public and Sign
// always belong together. After a rotation it goes on until its version may no longer sign; look the key up again for
// the new one, or use [CertificateSource] for TLS. Encryption and MACs take the current version, decryption and
// verification whichever version fits, unless one was asked for by NAME@VERSION.
type Key struct {
	client  *Client
	ref     string // as it was asked for
	pinned  string // NAME@VERSION
	version keyspec.Version
	info    KeyInfo
	public  crypto.PublicKey
}

// KeyInfo describes a key. Times are seconds since 1970-01-01 UTC.
type KeyInfo = proto.KeyInfo

// Key looks a key up by NAME or NAME@VERSION. The error is [ErrNotAvailable] if there is none or no right to use it:
// kmsd does not tell which.
func (c *Client) Key(ctx context.Context, ref string) (*Key, error) {
	info, err := c.KeyInfo(ctx, ref)
	if err != nil {
		return nil, err
	}
	return c.newKey(ctx, ref, *info)
}

func (c *Client) newKey(ctx context.Context, ref string, info KeyInfo) (*Key, error) {
	parsed, err := keyspec.ParseRef(ref)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	k := &Key{client: c, ref: ref, info: info, version: parsed.Version}
	if k.version == 0 {
		k.version = keyspec.Version(info.Current)
	}
	if k.Algorithm().Asymmetric() {
		var reply proto.PublicReply
		if err := c.Call(ctx, proto.OpPublic, &proto.KeyRef{Key: ref}, &reply, nil); err != nil {
			return nil, err
		}
		if k.public, err = parsePublic(k.Algorithm(), reply.SPKI); err != nil {
			return nil, err
		}
		k.version = keyspec.Version(reply.Version)
	}
	k.pinned = keyspec.Ref{Name: parsed.Name, Version: k.version}.String()
	return k, nil
}

func parsePublic(a keyspec.Algorithm, spki []byte) (crypto.PublicKey, error) {
	public, err := pkix.ParsePublicKey(spki)
	if err != nil {
		return nil, fmt.Errorf("%w: public key: %w", ErrProtocol, err)
	}
	if point, ok := public.(*ecdsa.PublicKey); ok && strings.HasPrefix(string(a), "ecdh-") {
		if public, err = point.ECDH(); err != nil {
			return nil, fmt.Errorf("%w: public key: %w", ErrProtocol, err)
		}
	}
	return public, nil
}

// Name returns the name of the key.
func (k *Key) Name() string { return k.info.Name }

// Version returns the version that Public and Sign belong to.
func (k *Key) Version() uint32 { return uint32(k.version) }

// Algorithm returns the algorithm of the key.
func (k *Key) Algorithm() keyspec.Algorithm { return keyspec.Algorithm(k.info.Algorithm) }

// Info returns what kmsd said about the key when it was looked up.
func (k *Key) Info() KeyInfo { return k.info }

// Public returns the public key: *rsa.PublicKey, *ecdsa.PublicKey, ed25519.PublicKey or *ecdh.PublicKey, and nil for a
// symmetric key.
func (k *Key) Public() crypto.PublicKey { return k.public }

func (k *Key) unsupported(what string) error {
	return fmt.Errorf("%w: %s with %s key %s", ErrUnsupported, what, k.info.Algorithm, k.info.Name)
}
