package client

import (
	"context"
	"crypto/hpke"
	"crypto/x509"
	"fmt"
	"slices"

	"github.com/kmsd-project/kmsd/ipc/proto"
)

// Migration is one key of a MOSIP key manager with all its generations; see docs/protocol.md, key_migrate.
type Migration = proto.KeyMigrate

// Generation is one generation of a key of MOSIP.
type Generation = proto.Generation

// Migrate brings in one key of a MOSIP key manager with all its generations, on the admin socket. secrets are the private halves (PKCS #8,
// DER) or symmetric keys of the generations that have one of their own; where it is nil, m says where the private half is. They are sealed
// (HPKE) to a one-time key of kmsd before they leave this process. outcome is made, extended or present: what is there already is found
// again, so a migration whose answer was lost may be repeated.
func (c *Client) Migrate(ctx context.Context, m Migration, secrets [][]byte) (outcome string, key *KeyInfo, err error) {
	cn, err := c.connection(ctx)
	if err != nil {
		return "", nil, err
	}
	m.Generations = slices.Clone(m.Generations)
	if len(secrets) > len(m.Generations) {
		return "", nil, fmt.Errorf("%w: more secrets than generations", ErrInvalid)
	}
	if slices.ContainsFunc(secrets, func(s []byte) bool { return len(s) > 0 }) {
		var begin proto.KeyImportBeginReply
		if err := cn.call(ctx, proto.OpKeyImportBegin, &proto.KeyImportBegin{}, &begin, nil); err != nil {
			return "", nil, notSentIsUnreachable(err)
		}
		public, err := hpke.MLKEM768X25519().NewPublicKey(begin.PublicKey)
		if err != nil {
			return "", nil, fmt.Errorf("%w: import key: %w", ErrProtocol, err)
		}
		m.Token = begin.Token
		for i, secret := range secrets {
			if len(secret) == 0 {
				continue
			}
			if m.Generations[i].Sealed, err = hpke.Seal(public, hpke.HKDFSHA256(), hpke.AES256GCM(), []byte("kmsd import v1"), secret); err != nil {
				return "", nil, err
			}
		}
	}
	var reply proto.KeyMigrateReply
	if err := cn.call(ctx, proto.OpKeyMigrate, &m, &reply, nil); err != nil {
		return "", nil, notSentIsUnreachable(err)
	}
	return reply.Outcome, &reply.Key, nil
}

// MOSIPKey is a key as MOSIP's table key_store has it.
type MOSIPKey struct {
	Key     string              // with the version
	Wrapped []byte              // private half, wrapped by the module key
	Chain   []*x509.Certificate // leaf first
	Module  string              // the module key, with the version
	Issuer  []byte              // certificate of the module key, DER; its SHA-256 tells which row of key_alias it is
}

// ExportMOSIP returns a base key wrapped by its module key, of which module is the version, 0 for the current one. It takes the admin
// socket, and confirm for a key that is not exportable.
func (c *Client) ExportMOSIP(ctx context.Context, ref string, module uint32, confirm bool) (*MOSIPKey, error) {
	var reply proto.KeyExportMOSIPReply
	if err := c.Call(ctx, proto.OpKeyExportMOSIP, &proto.KeyExportMOSIP{Key: ref, Module: module, Confirm: confirm}, &reply, nil); err != nil {
		return nil, err
	}
	chain, err := parseChain(reply.Chain)
	if err != nil {
		return nil, err
	}
	return &MOSIPKey{Key: reply.Key, Wrapped: reply.Wrapped, Chain: chain, Module: reply.Module, Issuer: reply.Issuer}, nil
}
