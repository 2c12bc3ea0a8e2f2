package client

import (
	"context"
	"crypto"
	"crypto/hpke"
	"crypto/x509"
	"errors"
	"fmt"
	"iter"
	"time"

	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// KeySpec says what key to make. Name and Algorithm must be set; what the rest means when it is zero stands at its fields.
type KeySpec = proto.KeyCreate

// NoExpiry as the expiry of a key means that it has none.
const NoExpiry = proto.NoExpiry

// Create makes a key. The error is [ErrExists] if the name is taken. A creation whose answer is lost with the connection
// is asked for again under the same request key, which makes no second key.
func (c *Client) Create(ctx context.Context, spec KeySpec) (*Key, error) {
	return c.makeKey(ctx, proto.OpKeyCreate, &spec)
}

// makeKey runs an operation that makes a key.
func (c *Client) makeKey(ctx context.Context, op string, params proto.Message) (*Key, error) {
	var info KeyInfo
	if err := c.Call(ctx, op, params, &info, &proto.Options{RequestKey: newRequestKey()}); err != nil {
		return nil, err
	}
	return c.newKey(ctx, info.Name, info)
}

// Import brings a key in: PKCS #8 DER for an asymmetric one, raw bytes for a symmetric one. It is sealed (HPKE) to a
// one-time key of kmsd before it leaves this process. An import whose answer is lost is not repeated.
func (c *Client) Import(ctx context.Context, spec KeySpec, material []byte) (*Key, error) {
	i, err := c.beginImport(ctx, material)
	if err != nil {
		return nil, err
	}
	var info KeyInfo
	p := &proto.KeyImport{Key: spec, Wrapped: i.wrapped, Token: i.token}
	if err := i.conn.call(ctx, proto.OpKeyImport, p, &info, &proto.Options{RequestKey: newRequestKey()}); err != nil {
		return nil, notSentIsUnreachable(err)
	}
	return c.newKey(ctx, info.Name, info)
}

// sealedImport is key material that was sealed to a one-time key of kmsd, for one request on the connection that it was asked for on.
type sealedImport struct {
	conn    *conn
	wrapped []byte
	token   []byte
}

func (c *Client) beginImport(ctx context.Context, material []byte) (*sealedImport, error) {
	cn, err := c.connection(ctx)
	if err != nil {
		return nil, err
	}
	var begin proto.KeyImportBeginReply
	if err := cn.call(ctx, proto.OpKeyImportBegin, &proto.KeyImportBegin{}, &begin, nil); err != nil {
		return nil, notSentIsUnreachable(err)
	}
	public, err := hpke.MLKEM768X25519().NewPublicKey(begin.PublicKey)
	if err != nil {
		return nil, fmt.Errorf("%w: import key: %w", ErrProtocol, err)
	}
	wrapped, err := hpke.Seal(public, hpke.HKDFSHA256(), hpke.AES256GCM(), []byte("kmsd import v1"), material)
	if err != nil {
		return nil, err
	}
	return &sealedImport{cn, wrapped, begin.Token}, nil
}

func notSentIsUnreachable(err error) error {
	if errors.Is(err, errNotSent) {
		return fmt.Errorf("%w: %w", ErrUnreachable, err)
	}
	return err
}

// KeyInfo describes a key without looking at its public key.
func (c *Client) KeyInfo(ctx context.Context, ref string) (*KeyInfo, error) {
	return c.keyInfo(ctx, proto.OpKeyGet, &proto.KeyRef{Key: ref})
}

func (c *Client) keyInfo(ctx context.Context, op string, params proto.Message) (*KeyInfo, error) {
	var info KeyInfo
	if err := c.Call(ctx, op, params, &info, nil); err != nil {
		return nil, err
	}
	return &info, nil
}

// Keys lists the keys of a namespace, or those whose names begin with NAMESPACE/prefix. With an empty prefix the admin
// socket lists all.
func (c *Client) Keys(ctx context.Context, prefix string) iter.Seq2[*KeyInfo, error] {
	return func(yield func(*KeyInfo, error) bool) {
		p := proto.KeyList{Prefix: prefix}
		for {
			var page proto.KeyListReply
			if err := c.Call(ctx, proto.OpKeyList, &p, &page, nil); err != nil {
				yield(nil, err)
				return
			}
			for i := range page.Keys {
				if !yield(&page.Keys[i], nil) {
					return
				}
			}
			if len(page.Next) == 0 {
				return
			}
			p.After = page.Next
		}
	}
}

// FindKey finds the key, and the version of it, that has a public key or certificate. Kind is spki-sha256, ssh-sha256, cka-id or
// certificate-sha256 and value the digest (docs/protocol.md, key_find). The error is [ErrNotAvailable] if there is none or no right to use it.
func (c *Client) FindKey(ctx context.Context, kind string, value []byte) (*KeyInfo, keyspec.Version, error) {
	var reply proto.KeyFindReply
	if err := c.Call(ctx, proto.OpKeyFind, &proto.KeyFind{Kind: kind, Value: value}, &reply, nil); err != nil {
		return nil, 0, err
	}
	return &reply.Key, keyspec.Version(reply.Version), nil
}

// SetLabels sets labels of a key; an empty value removes one.
func (c *Client) SetLabels(ctx context.Context, name string, labels map[string]string) (*KeyInfo, error) {
	return c.keyInfo(ctx, proto.OpKeySet, &proto.KeySet{Key: name, Labels: labels})
}

// NoLimit as the number of uses removes their limit.
const NoLimit = proto.NoLimit

// SetUses says how often a key may still be used, [NoLimit] for any number. More than are left takes the admin socket.
func (c *Client) SetUses(ctx context.Context, name string, uses int64) (*KeyInfo, error) {
	return c.keyInfo(ctx, proto.OpKeySet, &proto.KeySet{Key: name, Uses: uses})
}

// Rotate makes a new version the current one. The version before it still verifies and decrypts.
func (c *Client) Rotate(ctx context.Context, name string) (*KeyInfo, error) {
	return c.keyInfo(ctx, proto.OpKeyRotate, &proto.KeyRotate{Key: name})
}

// Suspend stops all use of a version until Resume.
func (c *Client) Suspend(ctx context.Context, ref string) (*KeyInfo, error) {
	return c.keyInfo(ctx, proto.OpKeySuspend, &proto.KeyRef{Key: ref})
}

// Resume ends a suspension.
func (c *Client) Resume(ctx context.Context, ref string) (*KeyInfo, error) {
	return c.keyInfo(ctx, proto.OpKeyResume, &proto.KeyRef{Key: ref})
}

// Revoke takes a version out of use for good. A plain name means the current version of a key of the hierarchy, which is replaced if it is
// a base key, and all versions of another key.
func (c *Client) Revoke(ctx context.Context, ref string, reason keyspec.Reason) (*KeyInfo, error) {
	return c.keyInfo(ctx, proto.OpKeyRevoke, &proto.KeyRevoke{Key: ref, Reason: string(reason)})
}

// RevokeAndReplace is Revoke for a key of the hierarchy that says whether a new version is made, or none until somebody rotates the key.
func (c *Client) RevokeAndReplace(ctx context.Context, ref string, reason keyspec.Reason, replace bool) (*KeyInfo, error) {
	p := &proto.KeyRevoke{Key: ref, Reason: string(reason), Replace: "no"}
	if replace {
		p.Replace = "yes"
	}
	return c.keyInfo(ctx, proto.OpKeyRevoke, p)
}

// Destroy schedules the destruction of a version, or with a plain name of all; a delay of 0 is the default of 7 days.
func (c *Client) Destroy(ctx context.Context, ref string, delay time.Duration) (*KeyInfo, error) {
	return c.keyInfo(ctx, proto.OpKeyDestroy, &proto.KeyDestroy{Key: ref, DelaySeconds: uint64(delay / time.Second)})
}

// DestroyNow destroys at once and for ever.
func (c *Client) DestroyNow(ctx context.Context, ref string) (*KeyInfo, error) {
	return c.keyInfo(ctx, proto.OpKeyDestroy, &proto.KeyDestroy{Key: ref, Now: true})
}

// CancelDestruction takes a scheduled destruction back.
func (c *Client) CancelDestruction(ctx context.Context, ref string) (*KeyInfo, error) {
	return c.keyInfo(ctx, proto.OpKeyDestroyCancel, &proto.KeyRef{Key: ref})
}

// Agreement is the result of a Diffie-Hellman exchange: a new key in kmsd, HKDF-SHA256 of the shared secret with Salt and
// Info. The secret itself is never seen outside.
type Agreement struct {
	Salt, Info []byte
	New        KeySpec // its Algorithm is an AEAD, HMAC or HKDF algorithm
}

// Agree runs Diffie-Hellman with a peer's public key: an *ecdh.PublicKey or an *ecdsa.PublicKey.
func (k *Key) Agree(ctx context.Context, peer crypto.PublicKey, a Agreement) (*Key, error) {
	spki, err := x509.MarshalPKIXPublicKey(peer)
	if err != nil {
		return nil, fmt.Errorf("%w: peer: %w", ErrInvalid, err)
	}
	return k.client.makeKey(ctx, proto.OpAgree, &proto.Agree{Key: k.pinned, Peer: spki, Salt: a.Salt, Info: a.Info, New: a.New})
}

// Derive makes a new key that is HKDF of this one.
func (k *Key) Derive(ctx context.Context, salt, info []byte, spec KeySpec) (*Key, error) {
	return k.client.makeKey(ctx, proto.OpDerive, &proto.Derive{Key: k.ref, Salt: salt, Info: info, New: spec})
}

// WrapKey wraps the exportable key target with this AES key (AES-KWP, RFC 5649).
func (k *Key) WrapKey(ctx context.Context, target string) ([]byte, error) {
	var reply proto.WrapReply
	if err := k.client.Call(ctx, proto.OpWrap, &proto.Wrap{Key: k.ref, Target: target}, &reply, nil); err != nil {
		return nil, err
	}
	return reply.Wrapped, nil
}

// UnwrapKey unwraps what WrapKey made into a new key.
func (k *Key) UnwrapKey(ctx context.Context, wrapped []byte, spec KeySpec) (*Key, error) {
	return k.client.makeKey(ctx, proto.OpUnwrap, &proto.Unwrap{Key: k.ref, Wrapped: wrapped, New: spec})
}

// MaxRandom is how many bytes Random returns at most.
const MaxRandom = 1 << 20

// Random returns n random bytes from kmsd, at most [MaxRandom]. Above 60 KiB that takes several requests.
func (c *Client) Random(ctx context.Context, n int) ([]byte, error) {
	if n < 0 || n > MaxRandom {
		return nil, fmt.Errorf("%w: %d random bytes, at most %d", ErrTooLarge, n, MaxRandom)
	}
	data := make([]byte, 0, n)
	for {
		var reply proto.RandomReply
		if err := c.Call(ctx, proto.OpRandom, &proto.Random{Bytes: uint32(min(n-len(data), proto.MaxData))}, &reply, nil); err != nil {
			return nil, err
		}
		if data = append(data, reply.Data...); len(data) >= n || len(reply.Data) == 0 {
			return data, nil
		}
	}
}

// Whoami returns this process as kmsd sees it.
func (c *Client) Whoami(ctx context.Context) (proto.Identity, error) {
	var reply proto.Identity
	err := c.Call(ctx, proto.OpWhoami, nil, &reply, nil)
	return reply, err
}

// Status returns the state of the daemon.
func (c *Client) Status(ctx context.Context) (*proto.Status, error) {
	var reply proto.Status
	if err := c.Call(ctx, proto.OpStatus, nil, &reply, nil); err != nil {
		return nil, err
	}
	return &reply, nil
}

// Ping asks for nothing but an answer.
func (c *Client) Ping(ctx context.Context) error { return c.Call(ctx, proto.OpPing, nil, nil, nil) }
