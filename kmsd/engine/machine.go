package engine

import (
	"context"
	"crypto/rsa"
	"crypto/sha256"
	"errors"
	"fmt"

	"github.com/kmsd-project/kmsd/client/packet"
	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/mechanism"
)

// The identity of a registration machine is two keys, NAME/SIGN and NAME/ENCRYPT. In a TPM they are the ones that MOSIP's client has there;
// from a file they are one RSA key with two records, since MOSIP uses it for both.
//
// Invariant: nothing but adoption makes keys of the profile mosip-machine, and each of them either signs or decrypts. That two records share one
// RSA key for different purposes is refused elsewhere; see notMixed.

// ErrMachine says that the name of an identity is taken by another.
var ErrMachine = errors.New("the name has another identity already")

// LabelMachineName is the label of a machine's keys with the name by which the server knows the machine.
const LabelMachineName = "machine-name"

// maxKeyIndex is the length of a key index: 32 bytes in hexadecimal, with a colon between them.
const maxKeyIndex = 3*sha256.Size - 1

// Machine is an adopted identity.
type Machine struct {
	Name        keyspec.Name
	MachineName string
	Sign        MachineKey
	Encrypt     MachineKey
	Adopted     bool // by this very act; it was there already otherwise
}

// MachineKey is one of the two keys of a machine.
type MachineKey struct {
	Key      *keystore.Key
	Version  keyspec.Version
	Location string // of the device; empty for a key from a file
	SPKI     []byte // SubjectPublicKeyInfo, DER
	Public   []byte // as the server has it: TPMT_PUBLIC for a key in a TPM, else SPKI
	Index    string // SHA-256 of Public, as the server writes it
}

// half is one of the two keys in the making.
type half struct {
	use    packet.MachineUse
	name   keyspec.Name
	usages []keyspec.Usage

	key    *keystore.Key // as it will be committed
	number keyspec.Version
	stored []byte // key material, or the record of a resident key
	spki   []byte
	blob   enclave.Blob
}

func halves(name keyspec.Name) []*half {
	return []*half{
		{use: packet.MachineSigning, name: name + "/SIGN", usages: []keyspec.Usage{keyspec.Sign, keyspec.Verify}},
		{use: packet.MachineEncryption, name: name + "/ENCRYPT", usages: []keyspec.Usage{keyspec.Encrypt, keyspec.Decrypt}},
	}
}

// machineAct is an act on both keys of a machine.
func machineAct(op string, name keyspec.Name) (*act, []*half, error) {
	list := halves(name)
	for _, h := range list {
		if _, err := keyspec.ParseName(string(h.name)); err != nil {
			return nil, nil, fmt.Errorf("%w: %w", ErrInput, err)
		}
	}
	return &act{op: op, ref: keyspec.Ref{Name: list[0].name}, also: []keyspec.Name{list[1].name}}, list, nil
}

// identity returns the public part of a machine's key as the server has it, and its key index.
func identity(p keyspec.Protection, spki []byte, use packet.MachineUse) (public []byte, index string, err error) {
	public = spki
	if p == keyspec.TPM {
		parsed, err := mechanism.ParseSPKI(spki)
		if err != nil {
			return nil, "", err
		}
		key, ok := parsed.(*rsa.PublicKey)
		if !ok {
			return nil, "", fmt.Errorf("%w: a machine's key that is not RSA", keystore.ErrDamaged)
		}
		if public, err = packet.MarshalMachineKey(key, use); err != nil {
			return nil, "", err
		}
	}
	return public, packet.KeyIndex(public), nil
}

// Machine returns an adopted identity.
func (e *Engine) Machine(ctx context.Context, c *Caller, name keyspec.Name) (m *Machine, err error) {
	a, list, err := machineAct("machine_show", name)
	if err != nil {
		return nil, err
	}
	err = e.do(ctx, c, a, func(u *use) error {
		m, err = u.machine(name, list)
		return err
	})
	if err != nil {
		return nil, err
	}
	return m, nil
}

func (u *use) machine(name keyspec.Name, list []*half) (*Machine, error) {
	m := &Machine{Name: name}
	for _, h := range list {
		key, err := u.store.Get(h.name)
		if err != nil {
			return nil, err
		}
		if key.Profile != mechanism.ProfileMOSIPMachine {
			return nil, fmt.Errorf("%w: %s is not the key of a machine", ErrUnsupported, h.name)
		}
		u.asOf(key, u.now)
		v, err := version(key, 0, u.now)
		if err != nil {
			return nil, err
		}
		if v.State == keyspec.Destroyed {
			return nil, &Remedied{fmt.Errorf("%w: the identity was released", ErrState), "kmsctl machine adopt --name " + string(name)}
		}
		ref := keyspec.Ref{Name: h.name, Version: v.Number}
		p, err := u.store.Public(ref)
		if err != nil {
			return nil, err
		}
		k := MachineKey{Key: key, Version: v.Number, SPKI: p.SPKI}
		if k.Public, k.Index, err = identity(key.Protection, p.SPKI, h.use); err != nil {
			return nil, err
		}
		if key.Protection != keyspec.Software {
			r, err := u.residentRecord(ref)
			if err != nil {
				return nil, err
			}
			k.Location = r.location
		}
		m.MachineName = key.Labels[LabelMachineName]
		if h.use == packet.MachineSigning {
			m.Sign = k
		} else {
			m.Encrypt = k
		}
	}
	return m, nil
}

// MachineRelease gives the identity of a machine up: both keys are destroyed, at once and in one commit, and the TPM keeps nothing of them. It
// does not change the TPM: adopting again brings the same identity back. A key from a file is gone for good, with the next epoch of the
// keystore.
func (e *Engine) MachineRelease(ctx context.Context, c *Caller, name keyspec.Name) error {
	a, list, err := machineAct("machine_release", name)
	if err != nil {
		return err
	}
	erases := false
	err = e.do(ctx, c, a, func(u *use) error {
		if !c.Admin {
			return fmt.Errorf("%w: the identity of a machine is released on the admin socket", ErrUnsupported)
		}
		var changes []keystore.Change
		for _, h := range list {
			key, err := u.store.Get(h.name)
			if err != nil {
				return err
			}
			if key.Profile != mechanism.ProfileMOSIPMachine {
				return fmt.Errorf("%w: %s is not the key of a machine", ErrUnsupported, h.name)
			}
			ch := keystore.Change{Key: key}
			for i := range key.Versions {
				destroy(&key.Versions[i], &ch)
			}
			if len(ch.Erase) > 0 {
				changes = append(changes, ch)
			}
			erases = erases || key.Protection == keyspec.Software
		}
		if len(changes) == 0 {
			return fmt.Errorf("%w: the identity was released before", ErrState)
		}
		return u.commit(keystore.Commit{Changes: changes})
	})
	if err == nil && erases {
		signal(e.wakeScheduler)
	}
	return err
}
