package main

import (
	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/engine"
	"github.com/kmsd-project/kmsd/kmsd/mechanism"
)

func handleSign(c *call) (proto.Message, error) {
	in, err := decode[proto.Sign](c)
	if err != nil {
		return nil, err
	}
	ref, err := keyspec.ParseRef(in.Key)
	if err != nil {
		return nil, err
	}
	sig, number, err := c.daemon.engine.Sign(c.ctx, &c.session.who, ref, keyspec.Scheme(in.Scheme), mechanism.Encoding(in.Encoding),
		mechanism.Input{Message: in.Data, Digest: in.Digest}, c.room(0))
	if err != nil {
		return nil, err
	}
	return &proto.SignReply{Signature: sig, Version: uint32(number)}, nil
}

func handleVerify(c *call) (proto.Message, error) {
	in, err := decode[proto.Verify](c)
	if err != nil {
		return nil, err
	}
	ref, err := keyspec.ParseRef(in.Key)
	if err != nil {
		return nil, err
	}
	return verified(c.daemon.engine.Verify(c.ctx, &c.session.who, ref, keyspec.Scheme(in.Scheme), mechanism.Encoding(in.Encoding),
		mechanism.Input{Message: in.Data, Digest: in.Digest}, in.Signature))
}

func verified(v engine.Verified, err error) (proto.Message, error) {
	if err != nil {
		return nil, err
	}
	return &proto.VerifyReply{Version: uint32(v.Version), Compromised: v.Compromised}, nil
}

func handleMAC(c *call) (proto.Message, error) {
	in, err := decode[proto.MAC](c)
	if err != nil {
		return nil, err
	}
	ref, err := keyspec.ParseRef(in.Key)
	if err != nil {
		return nil, err
	}
	mac, number, err := c.daemon.engine.MAC(c.ctx, &c.session.who, ref, in.Data, c.room(0))
	if err != nil {
		return nil, err
	}
	return &proto.MACReply{MAC: mac, Version: uint32(number)}, nil
}

func handleMACVerify(c *call) (proto.Message, error) {
	in, err := decode[proto.MACVerify](c)
	if err != nil {
		return nil, err
	}
	ref, err := keyspec.ParseRef(in.Key)
	if err != nil {
		return nil, err
	}
	return verified(c.daemon.engine.MACVerify(c.ctx, &c.session.who, ref, in.Data, in.MAC))
}

func handleEncrypt(c *call) (proto.Message, error) {
	in, err := decode[proto.Encrypt](c)
	if err != nil {
		return nil, err
	}
	ref, err := keyspec.ParseRef(in.Key)
	if err != nil {
		return nil, err
	}
	sealed, number, err := c.daemon.engine.Encrypt(c.ctx, &c.session.who, ref, in.Data, in.AAD, c.room(len(in.Data)))
	if err != nil {
		return nil, err
	}
	return &proto.EncryptReply{Ciphertext: sealed, Version: uint32(number)}, nil
}

func handleDecrypt(c *call) (proto.Message, error) {
	in, err := decode[proto.Decrypt](c)
	if err != nil {
		return nil, err
	}
	ref, err := keyspec.ParseRef(in.Key)
	if err != nil {
		return nil, err
	}
	data, number, err := c.daemon.engine.DecryptWith(c.ctx, &c.session.who, ref, keyspec.Scheme(in.Scheme), in.Ciphertext, in.AAD, in.Label, c.room(len(in.Ciphertext)))
	if err != nil {
		return nil, err
	}
	return &proto.DecryptReply{Data: data, Version: uint32(number)}, nil
}

func handleRewrap(c *call) (proto.Message, error) {
	in, err := decode[proto.Rewrap](c)
	if err != nil {
		return nil, err
	}
	name, err := keyspec.ParseName(in.Key)
	if err != nil {
		return nil, err
	}
	sealed, number, err := c.daemon.engine.Rewrap(c.ctx, &c.session.who, name, in.Ciphertext, in.AAD, c.room(len(in.Ciphertext)))
	if err != nil {
		return nil, err
	}
	return &proto.EncryptReply{Ciphertext: sealed, Version: uint32(number)}, nil
}

func handleWrap(c *call) (proto.Message, error) {
	in, err := decode[proto.Wrap](c)
	if err != nil {
		return nil, err
	}
	ref, err := keyspec.ParseRef(in.Key)
	if err != nil {
		return nil, err
	}
	target, err := keyspec.ParseRef(in.Target)
	if err != nil {
		return nil, err
	}
	wrapped, number, err := c.daemon.engine.Wrap(c.ctx, &c.session.who, ref, target)
	if err != nil {
		return nil, err
	}
	return &proto.WrapReply{Wrapped: wrapped, Version: uint32(number)}, nil
}

func handleUnwrap(c *call) (proto.Message, error) {
	in, err := decode[proto.Unwrap](c)
	if err != nil {
		return nil, err
	}
	ref, n, err := refAndNew(in.Key, &in.New)
	if err != nil {
		return nil, err
	}
	return c.keyReply(c.daemon.engine.Unwrap(c.ctx, &c.session.who, ref, in.Wrapped, n, c.request.Options.RequestKey))
}

func handleAgree(c *call) (proto.Message, error) {
	in, err := decode[proto.Agree](c)
	if err != nil {
		return nil, err
	}
	ref, n, err := refAndNew(in.Key, &in.New)
	if err != nil {
		return nil, err
	}
	return c.keyReply(c.daemon.engine.Agree(c.ctx, &c.session.who, ref, in.Peer, in.Salt, in.Info, n, c.request.Options.RequestKey))
}

func handleDerive(c *call) (proto.Message, error) {
	in, err := decode[proto.Derive](c)
	if err != nil {
		return nil, err
	}
	ref, n, err := refAndNew(in.Key, &in.New)
	if err != nil {
		return nil, err
	}
	return c.keyReply(c.daemon.engine.Derive(c.ctx, &c.session.who, ref, in.Salt, in.Info, n, c.request.Options.RequestKey))
}

func refAndNew(key string, in *proto.KeyCreate) (keyspec.Ref, *engine.NewKey, error) {
	ref, err := keyspec.ParseRef(key)
	if err != nil {
		return ref, nil, err
	}
	n, err := newKey(in)
	return ref, n, err
}

func handleDataKey(c *call) (proto.Message, error) {
	in, err := decode[proto.DataKey](c)
	if err != nil {
		return nil, err
	}
	ref, err := keyspec.ParseRef(in.Key)
	if err != nil {
		return nil, err
	}
	plain, sealed, number, err := c.daemon.engine.DataKey(c.ctx, &c.session.who, ref, int(in.Bytes), in.AAD, !in.NoPlaintext)
	if err != nil {
		return nil, err
	}
	return &proto.DataKeyReply{Plaintext: plain, Ciphertext: sealed, Version: uint32(number)}, nil
}

func handleRandom(c *call) (proto.Message, error) {
	in, err := decode[proto.Random](c)
	if err != nil {
		return nil, err
	}
	data, err := c.daemon.engine.Random(c.ctx, &c.session.who, int(in.Bytes), c.room(int(min(in.Bytes, engine.MaxRandom))))
	if err != nil {
		return nil, err
	}
	return &proto.RandomReply{Data: data}, nil
}

// handleBatch runs the items in order. Each is authorised and recorded for itself.
func handleBatch(c *call) (proto.Message, error) {
	in, err := decode[proto.Batch](c)
	if err != nil {
		return nil, err
	}
	reply := &proto.BatchReply{Items: make([]proto.BatchResult, len(in.Items))}
	left := batchSpace - batchItemSpace*len(in.Items)
	for i := range in.Items {
		item, result := &in.Items[i], &reply.Items[i]
		switch {
		case !batchable[item.Op]:
			result.Error = wireError(invalid("this operation cannot be in a batch"))
		case left <= 0:
			result.Error = &proto.Error{Code: proto.CodeTooLarge, Class: proto.ClassInput, Message: "not begun: the frame is full", SafeToRetry: true}
		default:
			result.Result, result.Error = c.item(item.Op, item.Params)
			if left -= len(result.Result); left < 0 {
				result.Result = nil
				result.Error = &proto.Error{Code: proto.CodeTooLarge, Class: proto.ClassInput, Message: "the result does not fit the frame"}
			}
		}
	}
	return reply, nil
}

// Space in the frame of a batch's results, in bytes: in all, and for each item beside its result.
const (
	batchSpace     = proto.MaxControlFrame - 1024
	batchItemSpace = 192
)

// batchable are the operations a batch may hold: uses of keys, which have no effect on the store. An item that is told not
// to fit has been carried out and recorded, and nothing but its result is lost.
var batchable = map[string]bool{
	proto.OpSign: true, proto.OpVerify: true, proto.OpMAC: true, proto.OpMACVerify: true, proto.OpEncrypt: true,
	proto.OpDecrypt: true, proto.OpRewrap: true, proto.OpDataKey: true, proto.OpRandom: true, proto.OpPublic: true,
	proto.OpKeyGet: true, proto.OpPing: true,
}
