package main

import (
	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/engine"
)

// zkAttributes turns attributes of the wire into those of the engine.
func zkAttributes(in []proto.ZKAttribute) []engine.ZKAttribute {
	out := make([]engine.ZKAttribute, len(in))
	for i := range in {
		out[i] = engine.ZKAttribute{Identifier: in[i].Identifier, Value: in[i].Value}
	}
	return out
}

// zkReply is the way back.
func zkReply(in []engine.ZKAttribute) []proto.ZKAttribute {
	out := make([]proto.ZKAttribute, len(in))
	for i := range in {
		out[i] = proto.ZKAttribute{Identifier: in[i].Identifier, Value: in[i].Value}
	}
	return out
}

func handleZKEncrypt(c *call) (proto.Message, error) {
	in, err := decode[proto.ZKEncrypt](c)
	if err != nil {
		return nil, err
	}
	name, err := keyspec.ParseName(in.Key)
	if err != nil {
		return nil, err
	}
	to := make([]keyspec.Name, len(in.Recipients))
	for i, text := range in.Recipients {
		if to[i], err = keyspec.ParseName(text); err != nil {
			return nil, err
		}
	}
	index, sealed, keys, err := c.daemon.engine.ZKEncrypt(c.ctx, &c.session.who, name, in.ID, zkAttributes(in.Attributes), to)
	if err != nil {
		return nil, err
	}
	return &proto.ZKEncryptReply{Index: index, Attributes: zkReply(sealed), Keys: keys}, nil
}

func handleZKDecrypt(c *call) (proto.Message, error) {
	in, err := decode[proto.ZKDecrypt](c)
	if err != nil {
		return nil, err
	}
	name, err := keyspec.ParseName(in.Key)
	if err != nil {
		return nil, err
	}
	plain, err := c.daemon.engine.ZKDecrypt(c.ctx, &c.session.who, name, in.ID, zkAttributes(in.Attributes))
	if err != nil {
		return nil, err
	}
	return &proto.ZKDecryptReply{Attributes: zkReply(plain)}, nil
}

func handleZKRewrap(c *call) (proto.Message, error) {
	in, err := decode[proto.ZKRewrap](c)
	if err != nil {
		return nil, err
	}
	name, err := keyspec.ParseName(in.Key)
	if err != nil {
		return nil, err
	}
	from, err := keyspec.ParseRef(in.From)
	if err != nil {
		return nil, err
	}
	wrapped, version, err := c.daemon.engine.ZKRewrap(c.ctx, &c.session.who, name, from, in.Wrapped, in.Keep, in.Index)
	if err != nil {
		return nil, err
	}
	return &proto.ZKRewrapReply{Wrapped: wrapped[:], Version: uint32(version)}, nil
}

func handleZKImport(c *call) (proto.Message, error) {
	in, err := decode[proto.ZKImport](c)
	if err != nil {
		return nil, err
	}
	ref, err := keyspec.ParseRef(in.Key)
	if err != nil {
		return nil, err
	}
	keys := make([]engine.ZKKey, len(in.Keys))
	for i, k := range in.Keys {
		if len(k.Wrapped) != 32 {
			return nil, invalid("a wrapped random key has 32 bytes")
		}
		keys[i] = engine.ZKKey{Index: k.Index, Wrapped: [32]byte(k.Wrapped), Inactive: k.Inactive}
	}
	added, err := c.daemon.engine.ZKImport(c.ctx, &c.session.who, ref, keys)
	if err != nil {
		return nil, err
	}
	return &proto.ZKKeysReply{Added: uint32(added)}, nil
}

// zkKeys is how many random keys MOSIP's key generator makes.
const zkKeys = 10_000

func handleZKGenerate(c *call) (proto.Message, error) {
	in, err := decode[proto.ZKGenerate](c)
	if err != nil {
		return nil, err
	}
	name, err := keyspec.ParseName(in.Key)
	if err != nil {
		return nil, err
	}
	count := int(in.Count)
	if count == 0 {
		count = zkKeys
	}
	made, err := c.daemon.engine.ZKGenerate(c.ctx, &c.session.who, name, count)
	if err != nil {
		return nil, err
	}
	return &proto.ZKKeysReply{Added: uint32(made)}, nil
}

// rewrapping is the lane of a random key that changes hands: of the device that has the RSA key, else the store's.
func rewrapping(c *call) lane {
	var in proto.ZKRewrap
	if proto.DecodeReply(c.request.Params, &in) == nil {
		if _, _, device := c.peek(in.From); device != "" {
			return hardware(device)
		}
	}
	return keyed(c)
}
