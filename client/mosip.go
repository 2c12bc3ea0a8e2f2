package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/kmsd-project/kmsd/client/jose"
	"github.com/kmsd-project/kmsd/client/packet"
	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// ErrOtherRecipient says that something is encrypted to the certificate of a key that is there, and that it is not the key that was to
// open it. MOSIP has KER-KMS-024 for it.
var ErrOtherRecipient = errors.New("encrypted to the certificate of another key")

var (
	_ packet.Unwrapper = (*Recipient)(nil)
	_ jose.Unwrapper   = (*Recipient)(nil)
)

// Recipient opens what was encrypted to a certificate of one key, whichever version of it that was, in the formats of package packet
// and in JSON Web Encryption.
//
// Invariant: what names a certificate is opened by the key that has this certificate, and only if that is the key asked for or the module
// key of its application. MOSIP is content with any key of the application, the first time.
type Recipient struct {
	client *Client
	name   keyspec.Name
	module bool
}

// Recipient returns the recipient APP/REF, or APP for a module key. What was encrypted to the module key of the same application it opens
// too.
func (c *Client) Recipient(name string) (*Recipient, error) {
	parsed, err := keyspec.ParseName(name)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	return &Recipient{c, parsed, true}, nil
}

// WithoutModule returns the same recipient without the module key: MOSIP's jwtDecrypt has it so.
func (r *Recipient) WithoutModule() *Recipient { return &Recipient{r.client, r.name, false} }

// moduleKey returns the name of the module key of the application, or "" if the recipient is that itself or does without.
func (r *Recipient) moduleKey() keyspec.Name {
	if module := keyspec.Name(r.name.Namespace()); r.module && module != r.name {
		return module
	}
	return ""
}

// Unwrap decrypts a wrapped key. thumbprint is the SHA-256 of the certificate it was wrapped to; if it is all zero, as in payloads of MOSIP
// 1.1.3, all versions of the key are tried, the oldest first, and then those of the module key. Errors are [ErrOtherRecipient],
// [ErrNotAvailable] if no key has the certificate, [ErrDecryption], or others of the daemon.
func (r *Recipient) Unwrap(ctx context.Context, thumbprint [32]byte, wrapped []byte) ([]byte, error) {
	if thumbprint == [32]byte{} {
		return r.try(ctx, wrapped)
	}
	info, version, err := r.client.FindKey(ctx, "certificate-sha256", thumbprint[:])
	var found keyspec.Ref
	switch {
	case err == nil:
		found = keyspec.Ref{Name: keyspec.Name(info.Name), Version: version}
	case !errors.Is(err, ErrNotAvailable):
		return nil, err
	}
	if found.Name == "" || found.Name != r.name && found.Name != r.moduleKey() {
		own, ownErr := r.holds(ctx, thumbprint)
		switch {
		case ownErr != nil:
			return nil, ownErr
		case own.Name != "":
			found = own
		case err != nil:
			return nil, fmt.Errorf("key with the certificate %s: %w", packet.ThumbprintText(thumbprint), err)
		default:
			return nil, fmt.Errorf("%w: %s, not %s", ErrOtherRecipient, found.Name, r.name)
		}
	}
	return r.open(ctx, found, wrapped)
}

// holds looks for a certificate among those that the recipient's own keys have now. Two keys may share one, and a look-up by it then gives
// one of them, or none if that one is not for this caller. The zero Ref is none.
func (r *Recipient) holds(ctx context.Context, thumbprint [32]byte) (keyspec.Ref, error) {
	for _, name := range []keyspec.Name{r.name, r.moduleKey()} {
		if name == "" {
			continue
		}
		info, err := r.client.KeyInfo(ctx, string(name))
		if errors.Is(err, ErrNotAvailable) {
			continue
		}
		if err != nil {
			return keyspec.Ref{}, err
		}
		for _, v := range info.Versions {
			ref := keyspec.Ref{Name: name, Version: keyspec.Version(v.Version)}
			if keyspec.State(v.State) == keyspec.Destroyed {
				continue
			}
			chain, err := r.client.Chain(ctx, ref.String())
			if err != nil && !errors.Is(err, ErrNotAvailable) && !errors.Is(err, ErrUnsupported) {
				return keyspec.Ref{}, err
			}
			if len(chain) > 0 && packet.Thumbprint(chain[0]) == thumbprint {
				return ref, nil
			}
		}
	}
	return keyspec.Ref{}, nil
}

// try opens what does not say for whom it is.
func (r *Recipient) try(ctx context.Context, wrapped []byte) ([]byte, error) {
	var first error // that says more than that it is not for this version
	for _, name := range []keyspec.Name{r.name, r.moduleKey()} {
		if name == "" {
			continue
		}
		info, err := r.client.KeyInfo(ctx, string(name))
		if errors.Is(err, ErrNotAvailable) {
			if first == nil {
				first = err
			}
			continue
		}
		if err != nil {
			return nil, err
		}
		slices.SortFunc(info.Versions, func(a, b proto.VersionInfo) int { return int(int64(a.Version) - int64(b.Version)) })
		for _, v := range info.Versions {
			key, err := r.open(ctx, keyspec.Ref{Name: name, Version: keyspec.Version(v.Version)}, wrapped)
			switch {
			case err == nil:
				return key, nil
			case errors.Is(err, ErrDecryption), errors.Is(err, ErrState), errors.Is(err, ErrExpired), errors.Is(err, ErrUsage), errors.Is(err, ErrUnsupported):
			default:
				return nil, err
			}
			if first == nil || errors.Is(first, ErrNotAvailable) {
				first = ErrDecryption
			}
		}
	}
	return nil, first
}

func (r *Recipient) open(ctx context.Context, ref keyspec.Ref, wrapped []byte) ([]byte, error) {
	var reply proto.DecryptReply
	if err := r.client.Call(ctx, proto.OpDecrypt, &proto.Decrypt{Key: ref.String(), Ciphertext: wrapped}, &reply, nil); err != nil {
		return nil, err
	}
	return reply.Data, nil
}

// EncryptPayload encrypts plaintext to the current certificate of the key APP/REF, as MOSIP's encrypt does: see [Client.CurrentCertificate]
// and [packet.EncryptPayload].
func (c *Client) EncryptPayload(ctx context.Context, name string, plaintext []byte, o packet.Options) ([]byte, error) {
	k, err := c.CurrentCertificate(ctx, name, Holder{})
	if err != nil {
		return nil, err
	}
	certificate, err := k.leaf()
	if err != nil {
		return nil, err
	}
	return packet.EncryptPayload(certificate, plaintext, o)
}

// DecryptPayload decrypts a payload for the key APP/REF, as MOSIP's decrypt does: see [Recipient] and [packet.DecryptPayload].
func (c *Client) DecryptPayload(ctx context.Context, name string, payload []byte, o packet.Options) ([]byte, error) {
	r, err := c.Recipient(name)
	if err != nil {
		return nil, err
	}
	return packet.DecryptPayload(ctx, r, payload, o)
}

// EncryptPacket encrypts a registration packet of any size to the current certificate of the key APP/REF: see
// [Client.CurrentCertificate] and [packet.EncryptTo].
func (c *Client) EncryptPacket(ctx context.Context, name string, w io.Writer, plaintext io.Reader) error {
	k, err := c.CurrentCertificate(ctx, name, Holder{})
	if err != nil {
		return err
	}
	certificate, err := k.leaf()
	if err != nil {
		return err
	}
	return packet.EncryptTo(w, certificate, plaintext)
}

// DecryptPacket decrypts a registration packet of any size for the key APP/REF: see [Recipient] and [packet.DecryptTo].
func (c *Client) DecryptPacket(ctx context.Context, name string, w io.Writer, r io.ReaderAt, size int64) error {
	recipient, err := c.Recipient(name)
	if err != nil {
		return err
	}
	return packet.DecryptTo(ctx, recipient, w, r, size)
}
