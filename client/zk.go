package client

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"

	"github.com/kmsd-project/kmsd/client/packet"
	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// ZKAttribute is an attribute of a person, in plain or encrypted; see [packet.EncryptAttribute].
type ZKAttribute = proto.ZKAttribute

// ZKKey is a random key of another key manager, wrapped.
type ZKKey = proto.ZKKey

// ZKData is what [Client.ZKEncrypt] made.
type ZKData struct {
	Index      uint32 // of the random key
	Attributes []ZKAttribute
	Keys       [][]byte // the random key for each recipient; see RandomKey
}

// RandomKey is MOSIP's encryptedRandomKey: the keys for all recipients in base64url, joined by dots.
func (d *ZKData) RandomKey() string {
	parts := make([]string, len(d.Keys))
	for i, b := range d.Keys {
		parts[i] = base64.RawURLEncoding.EncodeToString(b)
	}
	return strings.Join(parts, ".")
}

// ZKEncrypt encrypts attributes of the person id under a random key of the application, which key APP/IDENTITY_CACHE wraps, and the random
// key to the certificates of recipients, such as IDA/PUBLIC_KEY. The values have at most 40,000 bytes in all.
func (c *Client) ZKEncrypt(ctx context.Context, key, id string, attributes []ZKAttribute, recipients ...string) (*ZKData, error) {
	var reply proto.ZKEncryptReply
	p := &proto.ZKEncrypt{Key: key, ID: id, Attributes: attributes, Recipients: recipients}
	if err := c.Call(ctx, proto.OpZKEncrypt, p, &reply, nil); err != nil {
		return nil, err
	}
	if len(reply.Attributes) != len(attributes) || len(reply.Keys) != len(recipients) {
		return nil, fmt.Errorf("%w: %d attributes and %d keys", ErrProtocol, len(reply.Attributes), len(reply.Keys))
	}
	return &ZKData{reply.Index, reply.Attributes, reply.Keys}, nil
}

// ZKDecrypt decrypts attributes of the person id.
func (c *Client) ZKDecrypt(ctx context.Context, key, id string, attributes []ZKAttribute) ([]ZKAttribute, error) {
	var reply proto.ZKDecryptReply
	if err := c.Call(ctx, proto.OpZKDecrypt, &proto.ZKDecrypt{Key: key, ID: id, Attributes: attributes}, &reply, nil); err != nil {
		return nil, err
	}
	if len(reply.Attributes) != len(attributes) {
		return nil, fmt.Errorf("%w: %d attributes", ErrProtocol, len(reply.Attributes))
	}
	return reply.Attributes, nil
}

// maxRandomKeys bounds the parts of an encryptedRandomKey.
const maxRandomKeys = 64

// ZKRewrap takes the part of MOSIP's encryptedRandomKey whose certificate is of a key in this keystore, and returns the random key wrapped by
// key, as zkReEncryptRandomKey does; MOSIP writes it in standard base64. With keep, the random key becomes that of *keep here. The
// error is [ErrNotAvailable] if no part is for a key of this keystore.
func (c *Client) ZKRewrap(ctx context.Context, key, randomKey string, keep *uint32) ([]byte, error) {
	parts := strings.Split(randomKey, ".")
	if len(parts) > maxRandomKeys {
		return nil, fmt.Errorf("%w: %d encrypted random keys", ErrTooLarge, len(parts))
	}
	missing := fmt.Errorf("%w: no part of the random key is for a key of this keystore", ErrNotAvailable)
	for _, part := range parts {
		sealed, err := base64.RawURLEncoding.DecodeString(strings.TrimRight(part, "="))
		if err != nil {
			return nil, fmt.Errorf("%w: an encrypted random key is not base64url", packet.ErrFormat)
		}
		thumbprint, block, err := packet.SplitRandomKey(sealed)
		if err != nil {
			return nil, err
		}
		info, version, err := c.FindKey(ctx, "certificate-sha256", thumbprint[:])
		if errors.Is(err, ErrNotAvailable) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if keyspec.Origin(info.Origin) == keyspec.Foreign { // it is there to be encrypted to
			continue
		}
		p := &proto.ZKRewrap{Key: key, From: keyspec.Ref{Name: keyspec.Name(info.Name), Version: version}.String(), Wrapped: block}
		if keep != nil {
			p.Keep, p.Index = true, *keep
		}
		var reply proto.ZKRewrapReply
		if err := c.Call(ctx, proto.OpZKRewrap, p, &reply, nil); err != nil {
			return nil, err
		}
		return reply.Wrapped, nil
	}
	return nil, missing
}

// ImportZKKeys brings in random keys of another key manager that are wrapped by the key APP/IDENTITY_CACHE, or by one version of it
// (NAME@VERSION). Those that are there already are found again; added is how many were not.
func (c *Client) ImportZKKeys(ctx context.Context, key string, keys []ZKKey) (added int, err error) {
	for len(keys) > 0 {
		n := min(len(keys), proto.MaxZKImport)
		var reply proto.ZKKeysReply
		if err := c.Call(ctx, proto.OpZKImport, &proto.ZKImport{Key: key, Keys: keys[:n]}, &reply, nil); err != nil {
			return added, err
		}
		added += int(reply.Added)
		keys = keys[n:]
	}
	return added, nil
}

// GenerateZKKeys makes random keys until there are those with the indices below count, 0 being MOSIP's 10,000.
func (c *Client) GenerateZKKeys(ctx context.Context, key string, count uint32) (made int, err error) {
	var reply proto.ZKKeysReply
	err = c.Call(ctx, proto.OpZKGenerate, &proto.ZKGenerate{Key: key, Count: count}, &reply, nil)
	return int(reply.Added), err
}
