package main

import (
	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/engine"
)

func handleMachineAdopt(c *call) (proto.Message, error) {
	in, err := decode[proto.MachineAdopt](c)
	if err != nil {
		return nil, err
	}
	name, err := keyspec.ParseName(in.Name)
	if err != nil {
		return nil, err
	}
	n := &engine.NewMachine{Name: name, MachineName: in.Machine, Expect: in.Expect, Wrapped: in.Wrapped}
	if len(in.Wrapped) > 0 {
		if len(in.Token) != len(engine.ImportToken{}) {
			return nil, invalid("token is not one of key_import_begin")
		}
		n.Token = engine.ImportToken(in.Token)
	}
	if in.Location != "" {
		s, err := parseSpec(in.Location)
		if err != nil {
			return nil, err
		}
		n.Location = s.location()
	}
	return machineReply(c.daemon.engine.MachineAdopt(c.ctx, &c.session.who, n))
}

func handleMachineShow(c *call) (proto.Message, error) {
	name, err := machineName(c)
	if err != nil {
		return nil, err
	}
	return machineReply(c.daemon.engine.Machine(c.ctx, &c.session.who, name))
}

func handleMachineRelease(c *call) (proto.Message, error) {
	name, err := machineName(c)
	if err != nil {
		return nil, err
	}
	if err := c.daemon.engine.MachineRelease(c.ctx, &c.session.who, name); err != nil {
		return nil, err
	}
	return &proto.Empty{}, nil
}

func machineName(c *call) (keyspec.Name, error) {
	in, err := decode[proto.MachineRef](c)
	if err != nil {
		return "", err
	}
	return keyspec.ParseName(in.Name)
}

func machineReply(m *engine.Machine, err error) (proto.Message, error) {
	if err != nil {
		return nil, err
	}
	return &proto.Machine{
		Name: string(m.Name), Machine: m.MachineName, Adopted: m.Adopted, Sign: machineKey(&m.Sign), Encrypt: machineKey(&m.Encrypt),
	}, nil
}

func machineKey(k *engine.MachineKey) proto.MachineKey {
	out := proto.MachineKey{
		Key: string(k.Key.Name), Version: uint32(k.Version), Protection: string(k.Key.Protection), Location: k.Location, SPKI: k.SPKI,
		Public: k.Public, KeyIndex: k.Index,
	}
	for i := range k.Key.Versions {
		if v := &k.Key.Versions[i]; v.Number == k.Version {
			out.State = string(v.State)
		}
	}
	return out
}

// adopting keeps a TPM's search for primes, and the examination of those in a file, apart.
func adopting(c *call) lane {
	var in proto.MachineAdopt
	if proto.DecodeReply(c.request.Params, &in) == nil && len(in.Wrapped) > 0 {
		return laneKeygen
	}
	return hardware(keyspec.TPM)
}
