package engine

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/kmsd-project/kmsd/client/packet"
	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/keystore/secmem"
	"github.com/kmsd-project/kmsd/kmsd/mechanism"
)

// NewMachine says whose identity is adopted, and from where.
type NewMachine struct {
	Name        keyspec.Name // the keys are NAME/SIGN and NAME/ENCRYPT
	MachineName string       // by which the server knows the machine; may be empty
	Expect      string       // key index that one of the two keys must have; empty: any

	Location string // of the TPM; empty: the one that new keys are made in

	Wrapped []byte      // instead of a TPM: PKCS#8 of an RSA-2048 key, as for ImportWrapped
	Token   ImportToken // with Wrapped
}

func (n *NewMachine) file() bool { return len(n.Wrapped) > 0 }

// MachineAdopt makes the identity of a registration machine one of kmsd's: of the keys that its TPM makes of MOSIP's templates, or of the key
// in MOSIP's file. Adopting the same identity again changes nothing. A TPM that was asked for and is not there is an error, never a reason
// to take a file.
func (e *Engine) MachineAdopt(ctx context.Context, c *Caller, n *NewMachine) (m *Machine, err error) {
	a, list, err := machineAct("machine_adopt", n.Name)
	if err != nil {
		return nil, err
	}
	a.info = "in a TPM"
	if n.file() {
		a.info = "from a file"
	}
	err = e.do(ctx, c, a, func(u *use) error {
		switch {
		case !c.Admin:
			return fmt.Errorf("%w: the identity of a machine is adopted on the admin socket", ErrUnsupported)
		case len(n.Expect) > maxKeyIndex:
			return fmt.Errorf("%w: a key index has %d characters", ErrInput, maxKeyIndex)
		case n.file() && n.Location != "":
			return fmt.Errorf("%w: both a TPM and a file", ErrInput)
		}
		row, err := mechanism.Lookup(keyspec.RSA2048)
		if err != nil {
			return err
		}
		adopted, err := u.adopt(n, list, row)
		if err != nil {
			return err
		}
		if m, err = u.machine(n.Name, list); err == nil {
			m.Adopted = adopted
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return m, nil
}

// adopt commits what is not there yet of an identity, and reports whether there was anything.
func (u *use) adopt(n *NewMachine, list []*half, row *mechanism.Row) (bool, error) {
	protection, origin := keyspec.TPM, keyspec.Generated
	if n.file() {
		protection, origin = keyspec.Software, keyspec.Imported
	}
	for _, h := range list {
		if err := u.recordFor(h, n, protection, origin); err != nil {
			return false, err
		}
		defer func() { clear(h.stored) }()
	}
	if n.file() {
		if err := u.fromFile(n, list, row); err != nil {
			return false, err
		}
		return u.commitMachine(n, list)
	}
	d, err := u.device(keyspec.TPM, n.Location, "")
	if err != nil {
		return false, demanded(err)
	}
	u.act.info = "in " + d.Location
	for _, h := range list {
		if err := u.fromDevice(&d, h, row); err != nil {
			u.drop(&d, list)
			return false, demanded(err)
		}
	}
	adopted, err := u.commitMachine(n, list)
	if err != nil && !errors.Is(err, keystore.ErrStorage) { // after that error the commit may be there after all
		u.drop(&d, list)
	}
	return adopted, err
}

// demanded says of a TPM that cannot be used what it does not mean.
func demanded(err error) error {
	var known *enclave.Error
	if errors.As(err, &known) && known.Remedy != "" && !errors.Is(err, enclave.ErrAbsent) && !errors.Is(err, enclave.ErrUnsupported) {
		return err
	}
	return &Remedied{err, "kmsctl machine adopt --tpm tpm:/dev/tpmrm0 names the TPM; keys in files are another identity, which only --file adopts"}
}

// recordFor says which record and version a half of an identity becomes: a new one, the next one of a machine that was released, or, to be
// compared, the one that is there.
func (u *use) recordFor(h *half, n *NewMachine, p keyspec.Protection, origin keyspec.Origin) error {
	key, err := u.store.Get(h.name)
	if errors.Is(err, keystore.ErrNotFound) {
		application, _, err := u.stored(string(h.name.Namespace()))
		if err != nil {
			return err
		}
		if application != nil {
			return fmt.Errorf("%w: %s is an application, which may make keys of these names itself; adopt under another name", ErrInput, application.Name)
		}
		labels := make(map[string]string)
		if n.MachineName != "" {
			labels[LabelMachineName] = n.MachineName
		}
		h.key, _, err = u.describe(&NewKey{Name: h.name, Algorithm: keyspec.RSA2048, Usages: h.usages, Protection: p, NoExpiry: true,
			Labels: labels, Profile: mechanism.ProfileMOSIPMachine}, origin)
		h.number = 1
		return err
	}
	if err != nil {
		return err
	}
	if key.Profile != mechanism.ProfileMOSIPMachine {
		return taken(fmt.Errorf("%w: %s is a key of another kind", ErrMachine, h.name))
	}
	if key.Protection != p {
		return taken(fmt.Errorf("%w: %s is a key with protection %s", ErrMachine, h.name, key.Protection))
	}
	h.key, h.number = key, newest(key)
	if stateAt(key, &key.Versions[len(key.Versions)-1], u.now) != keyspec.Destroyed {
		return nil
	}
	if err := room(key); err != nil {
		return err
	}
	v, err := u.validity(key.Usages, time.Time{}, time.Time{}, true)
	if err != nil {
		return err
	}
	h.number++
	v.Number = h.number
	key.Versions = append(key.Versions, v)
	promote(key, v.Number)
	if n.MachineName != "" {
		if key.Labels == nil {
			key.Labels = make(map[string]string)
		}
		key.Labels[LabelMachineName] = n.MachineName
	}
	return checkLabels(key.Labels)
}

func taken(err error) error {
	return &Remedied{err, "adopt under another name (kmsctl machine adopt --name OTHER), or give this identity up (kmsctl machine release)"}
}

// allThere reports whether the store has every half as it was to be committed: somebody else has committed it.
func (u *use) allThere(list []*half) bool {
	return !slices.ContainsFunc(list, func(h *half) bool {
		spki, ok := h.exists(u)
		return !ok || !bytes.Equal(spki, h.spki)
	})
}

// exists reports whether the version of h is in the store already.
func (h *half) exists(u *use) (spki []byte, ok bool) {
	p, err := u.store.Public(keyspec.Ref{Name: h.name, Version: h.number})
	if err != nil {
		return nil, false
	}
	return p.SPKI, true
}

// fromFile opens the key of a file for both halves.
func (u *use) fromFile(n *NewMachine, list []*half, row *mechanism.Row) error {
	if err := u.tests.passed(row); err != nil {
		return err
	}
	u.touch()
	var err error
	var panicked any
	secmem.Do(func() {
		defer func() { panicked = recover() }()
		err = u.openFile(n, list, row)
	})
	if panicked != nil {
		panic(panicked)
	}
	return err
}

func (u *use) openFile(n *NewMachine, list []*half, row *mechanism.Row) error {
	encoded, err := u.unsealed(n.Wrapped, n.Token)
	if err != nil {
		return err
	}
	defer clear(encoded)
	material, err := row.Import(encoded)
	if err != nil {
		return err
	}
	defer clear(material)
	k, err := row.Load(material)
	if err != nil {
		return err
	}
	spki, err := k.SPKI()
	if err != nil {
		return err
	}
	for _, h := range list {
		h.stored, h.spki = bytes.Clone(material), spki
	}
	return nil
}

// fromDevice has a TPM make, or find, the key of a half, and tries it.
func (u *use) fromDevice(d *Device, h *half, row *mechanism.Row) error {
	machine, ok := d.Enclave.(enclave.Machine)
	if !ok {
		return &enclave.Error{Kind: enclave.ErrUnsupported, Detail: "the device at " + d.Location + " holds no identity of a machine"}
	}
	ref := keyspec.Ref{Name: h.name, Version: h.number}
	spec := enclave.Spec{Algorithm: row.Algorithm, Usages: h.usages, AAD: boundTo(u.store, ref)}
	device, abandon := *d, u.Engine
	made, err := inDevice(u, d, generateTime, func(ctx context.Context) (made generated, err error) {
		made.blob, made.spki, err = machine.MachineKey(ctx, spec)
		return made, err
	}, func(made generated) { abandon.abandon(&device, made.blob) })
	if err != nil {
		return err
	}
	h.blob, h.spki = made.blob, made.spki
	public, err := mechanism.ParseSPKI(h.spki)
	if err != nil {
		return err
	}
	k, err := row.Resident(public, &deviceKey{use: u, device: *d, blob: h.blob, bound: spec.AAD})
	if err != nil {
		return err
	}
	if err := confirmMachine(k, h.use); err != nil {
		return err
	}
	h.stored, err = (&residentKey{location: d.Location, binding: d.Enclave.Info().Binding, blob: h.blob}).encode()
	return err
}

// confirmMachine is mechanism.Key.Confirm for a key that has one scheme, and decrypts with one label.
func confirmMachine(k *mechanism.Key, use packet.MachineUse) error {
	sample := []byte("pairwise consistency test")
	if use == packet.MachineSigning {
		_, err := k.Sign(nil, keyspec.RSAPKCS1SHA256, mechanism.DER, mechanism.Input{Message: sample})
		return err
	}
	options, err := packet.PaddingTPM.Options()
	if err != nil {
		return err
	}
	sealed, err := mechanism.Encrypt(nil, k.Public(), keyspec.RSAOAEPSHA256, sample, options.Label)
	if err != nil {
		return err
	}
	got, err := k.Decrypt(nil, keyspec.RSAOAEPSHA256, sealed, options.Label)
	if errors.Is(err, mechanism.ErrDecryption) || err == nil && !bytes.Equal(got, sample) {
		return fmt.Errorf("%w: the key of a machine is not consistent", mechanism.ErrSelfTest)
	}
	return err
}

// drop has the TPM keep nothing that no record has.
func (u *use) drop(d *Device, list []*half) {
	for _, h := range list {
		if have, ok := h.exists(u); h.blob != nil && !(ok && bytes.Equal(have, h.spki)) {
			u.abandon(d, h.blob)
		}
	}
}

// commitMachine commits the halves that are not in the store, both at once, when the identity is the one that was expected.
func (u *use) commitMachine(n *NewMachine, list []*half) (bool, error) {
	var changes []keystore.Change
	matches := n.Expect == ""
	var indexes []string
	for _, h := range list {
		_, index, err := identity(h.key.Protection, h.spki, h.use)
		if err != nil {
			return false, err
		}
		indexes = append(indexes, index)
		matches = matches || index == n.Expect
		if have, ok := h.exists(u); ok {
			if !bytes.Equal(have, h.spki) {
				return false, taken(fmt.Errorf("%w: %s is another identity", ErrMachine, h.name))
			}
			continue
		}
		ch := keystore.Change{Key: h.key, Material: map[keyspec.Version][]byte{h.number: h.stored}}
		u.setPublic(&ch, &h.key.Versions[len(h.key.Versions)-1], h.spki)
		changes = append(changes, ch)
	}
	if !matches {
		return false, &enclave.Error{Kind: enclave.ErrReplaced,
			Detail: fmt.Sprintf("nothing was adopted: the key indexes are %s (sign) and %s (encrypt), not the expected one", indexes[0], indexes[1]),
			Remedy: "look on which machine this is; a machine with another identity has to be registered again"}
	}
	if len(changes) == 0 {
		u.detail = "adopted before"
		return false, nil
	}
	err := u.commit(keystore.Commit{Changes: changes})
	if (errors.Is(err, keystore.ErrExists) || errors.Is(err, keystore.ErrConflict)) && u.allThere(list) {
		u.detail = "adopted meanwhile"
		return false, nil
	}
	return err == nil, err
}

// notMixed refuses an RSA key from outside that the keystore has already for the other purpose, in whatever record: of two records one would
// sign and the other decrypt with one key, which only those of one machine may, and a module key in its one record. It is a guard against
// mistakes; whoever brings a key can use it elsewhere as they like.
func (u *use) notMixed(key *keystore.Key, row *mechanism.Row, spki []byte) error {
	if row.Kind != mechanism.KindRSA || key.Origin == keyspec.Generated {
		return nil
	}
	sum := sha256.Sum256(spki)
	refs, err := u.store.Sharing(keystore.AliasSPKI, sum[:])
	if errors.Is(err, keystore.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, ref := range refs {
		other, err := u.store.Get(ref.Name)
		if isGone(err) {
			continue
		}
		if err != nil {
			return err
		}
		if mixes(row, key, other) {
			return fmt.Errorf("%w: the keystore has this RSA key for the other purpose; one key either signs or decrypts", ErrInput)
		}
	}
	return nil
}

// mixes reports whether two records of one RSA key would be for both purposes.
func mixes(row *mechanism.Row, a, b *keystore.Key) bool {
	ours, theirs := row.PrivateUsages(a.Usages), row.PrivateUsages(b.Usages)
	if len(ours) == 0 || len(theirs) == 0 || a.Profile != "" && a.Profile == b.Profile {
		return false
	}
	all := slices.Concat(ours, theirs)
	return slices.Contains(all, keyspec.Sign) && slices.Contains(all, keyspec.Decrypt)
}
