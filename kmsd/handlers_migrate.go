package main

import (
	"crypto/sha256"
	"encoding/hex"
	"strings"
	"time"

	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/engine"
)

func handleKeyMigrate(c *call) (proto.Message, error) {
	in, err := decode[proto.KeyMigrate](c)
	if err != nil {
		return nil, err
	}
	m := &engine.Migration{Protection: keyspec.Protection(in.Protection), Escrow: keyspec.Escrow(in.Escrow)}
	if m.Name, err = keyspec.ParseName(in.Name); err != nil {
		return nil, err
	}
	if in.Algorithm != "" {
		if m.Algorithm, err = keyspec.ParseAlgorithm(in.Algorithm); err != nil {
			return nil, err
		}
	}
	if len(in.Token) > 0 {
		if len(in.Token) != len(engine.ImportToken{}) {
			return nil, invalid("token is not one of key_import_begin")
		}
		token := engine.ImportToken(in.Token)
		m.Token = &token
	}
	m.Generations = make([]engine.Generation, len(in.Generations))
	for i := range in.Generations {
		if err := generation(&m.Generations[i], &in.Generations[i]); err != nil {
			return nil, err
		}
	}
	key, outcome, err := c.daemon.engine.Migrate(c.ctx, &c.session.who, m)
	if err != nil {
		return nil, err
	}
	return &proto.KeyMigrateReply{Outcome: string(outcome), Key: *listRow(key)}, nil
}

// generation turns one generation into words.
func generation(out *engine.Generation, in *proto.Generation) error {
	if in.Created <= 0 || in.Created > maxTime || in.Expires <= 0 || in.Expires > maxTime {
		return invalid("time out of range")
	}
	if b, err := hex.DecodeString(in.Unique); err != nil || in.Unique != "" && (len(b) != 20 || strings.ToUpper(in.Unique) != in.Unique) {
		return invalid("unique is 40 hexadecimal digits in upper case")
	}
	*out = engine.Generation{
		Created: time.Unix(in.Created, 0).UTC(), Expires: time.Unix(in.Expires, 0).UTC(), Certificate: in.Certificate, Unique: in.Unique,
		Wrapped: in.Wrapped, Sealed: in.Sealed, Reference: in.Reference,
	}
	if len(in.Wrapped) > 0 {
		if len(in.Module) != sha256.Size {
			return invalid("module is a SHA-256")
		}
		out.Module = [sha256.Size]byte(in.Module)
	}
	return nil
}

func handleKeyExportMOSIP(c *call) (proto.Message, error) {
	in, err := decode[proto.KeyExportMOSIP](c)
	if err != nil {
		return nil, err
	}
	ref, err := keyspec.ParseRef(in.Key)
	if err != nil {
		return nil, err
	}
	out, err := c.daemon.engine.ExportMOSIP(c.ctx, &c.session.who, ref, keyspec.Version(in.Module), in.Confirm)
	if err != nil {
		return nil, err
	}
	return &proto.KeyExportMOSIPReply{
		Key: out.Ref.String(), Wrapped: out.Wrapped, Chain: out.Chain, Module: out.Module.String(), Issuer: out.Issuer,
	}, nil
}

// migrating is the lane of bringing in a key: the store's, unless a device has the key or the module key that opens it.
func migrating(c *call) lane {
	var in proto.KeyMigrate
	if proto.DecodeReply(c.request.Params, &in) != nil {
		return laneStore
	}
	if in.Protection == string(keyspec.HSM) {
		return laneHSM
	}
	if _, _, device := c.peek(keyspec.Name(in.Name).Namespace()); device != "" {
		return hardware(device)
	}
	return laneStore
}
