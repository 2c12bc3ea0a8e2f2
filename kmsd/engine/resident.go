package engine

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/mechanism"
)

// A resident key is one whose private half was made in a device and never leaves it. What stands in its record instead of key material
// says in which device it is, and has the blob by which the driver finds it there.

// Devices finds the devices that hold resident keys.
type Devices interface {
	// Device returns the device at a location, which had this binding when the key was made that is looked for; or, with an empty
	// location, the one that new keys of this protection are made in.
	Device(ctx context.Context, p keyspec.Protection, location, binding string) (Device, error)
}

// Device is a device that holds resident keys.
type Device struct {
	Location string // from which it is opened again
	Binding  string // of Enclave, as it was enrolled; empty when that is not known
	Enclave  enclave.Enclave
	Resident enclave.Resident
}

// Times that a device gets. The longer one is for making keys: a discrete TPM takes a good part of a minute for an RSA key.
const (
	deviceTime   = 30 * time.Second
	generateTime = 5 * time.Minute
	abandonTime  = 10 * time.Second
)

// residentKey is the content of the record of a resident key version, where others have their material:
//
//	format (1) = 1 | length (2), location | length (2), binding | length (2), blob
//
// All numbers are big endian. It is no secret: without the device it is worth nothing.
type residentKey struct {
	location string // of the device
	binding  string // of the device when the key was made
	blob     enclave.Blob
}

// Limits of a residentKey, in bytes.
const (
	residentFormat = 1
	maxLocation    = 512
	maxBinding     = 256
)

var errResident = fmt.Errorf("%w: record of a resident key", keystore.ErrDamaged)

func (r *residentKey) encode() ([]byte, error) {
	if r.location == "" || len(r.location) > maxLocation || len(r.binding) > maxBinding || len(r.blob) == 0 || len(r.blob) > enclave.MaxBlob {
		return nil, fmt.Errorf("%w: a device at %.40q with a blob of %d bytes", ErrUnsupported, r.location, len(r.blob))
	}
	out := []byte{residentFormat}
	for _, part := range [][]byte{[]byte(r.location), []byte(r.binding), r.blob} {
		out = binary.BigEndian.AppendUint16(out, uint16(len(part)))
		out = append(out, part...)
	}
	return out, nil
}

// decodeResident is the way back. Nothing in what it returns aliases b.
func decodeResident(b []byte) (*residentKey, error) {
	if len(b) == 0 || len(b) > keystore.MaxMaterial {
		return nil, errResident
	}
	if b[0] != residentFormat {
		return nil, fmt.Errorf("%w: record of a resident key in format %d: use the release of kmsd that made it, or a later one", ErrUnsupported, b[0])
	}
	b = b[1:]
	var parts [3][]byte
	for i, limit := range []int{maxLocation, maxBinding, enclave.MaxBlob} {
		if len(b) < 2 {
			return nil, errResident
		}
		n := int(binary.BigEndian.Uint16(b))
		if n > limit || len(b) < 2+n {
			return nil, errResident
		}
		parts[i], b = b[2:2+n], b[2+n:]
	}
	if len(b) > 0 || len(parts[0]) == 0 || len(parts[2]) == 0 {
		return nil, errResident
	}
	return &residentKey{string(parts[0]), string(parts[1]), bytes.Clone(parts[2])}, nil
}

// boundTo is what the blob of a key version is bound to in its device, so that it is of no use in another record.
func boundTo(s *keystore.Store, ref keyspec.Ref) []byte {
	id := s.Info().StoreID
	h := sha256.New()
	h.Write(id[:])
	h.Write(binary.BigEndian.AppendUint32(nil, uint32(ref.Version)))
	h.Write([]byte(ref.Name))
	return h.Sum([]byte("kmsd resident key v1"))
}

// loaded is a resident key version that is ready for use. It holds no secret.
type loaded struct {
	row        *mechanism.Row
	protection keyspec.Protection
	public     crypto.PublicKey // nil for symmetric keys
	record     *residentKey
	bound      []byte
}

// resident returns the key version in use, for this use of it.
func (u *use) resident() (*mechanism.Key, error) {
	l, err := u.loadResident(u.key, u.version.Number)
	if err != nil {
		return nil, err
	}
	return u.residentAt(l, u.key.Name)
}

// residentAt finds the device of a resident key.
func (u *use) residentAt(l *loaded, name keyspec.Name) (*mechanism.Key, error) {
	d, err := u.device(l.protection, l.record.location, l.record.binding)
	if err != nil {
		return nil, err
	}
	if l.record.binding != "" && d.Binding != "" && l.record.binding != d.Binding {
		return nil, lost(fmt.Errorf("%s is in another device than the one at %s", name, d.Location))
	}
	return l.row.Resident(l.public, &deviceKey{use: u, device: d, blob: l.record.blob, bound: l.bound})
}

// lost says of a device that was cleared or exchanged what that means for the keys in it, where the driver thinks of its slots.
func lost(cause error) error {
	detail := cause.Error()
	var e *enclave.Error
	if errors.As(cause, &e) {
		detail = e.Detail
	}
	return &enclave.Error{Kind: enclave.ErrReplaced, Detail: detail,
		Remedy: "bring back the device that the key was made in; if it is gone, so is this version of the key: rotate the key (kmsctl key rotate) to go on"}
}

// loadResident reads the record of a resident key version.
func (u *use) loadResident(key *keystore.Key, number keyspec.Version) (*loaded, error) {
	ref := keyspec.Ref{Name: key.Name, Version: number}
	if l, ok := u.residents.get(ref, u.now); ok {
		return l, nil
	}
	row, err := mechanism.Lookup(key.Algorithm)
	if err != nil {
		return nil, err
	}
	generation := u.generation.Load()
	l := &loaded{row: row, protection: key.Protection, bound: boundTo(u.store, ref)}
	stored, err := u.store.Public(ref)
	if err != nil {
		return nil, err
	}
	if len(stored.SPKI) > 0 {
		if l.public, err = mechanism.ParseSPKI(stored.SPKI); err != nil {
			return nil, fmt.Errorf("%w: public key: %w", keystore.ErrDamaged, err)
		}
	}
	if l.record, err = u.residentRecord(ref); err != nil {
		return nil, err
	}
	u.touch()
	u.residents.put(ref, l, u.now, func() bool { return u.generation.Load() == generation })
	return l, nil
}

func (u *use) residentRecord(ref keyspec.Ref) (r *residentKey, err error) {
	err = u.withNamespace(ref.Name, func() error {
		b, err := u.store.Material(ref, make([]byte, keystore.MaxMaterial))
		if err == nil {
			r, err = decodeResident(b)
		}
		return err
	})
	return r, err
}

// device returns the device that a key is in or, for an empty location, the one for new keys.
func (u *use) device(p keyspec.Protection, location, binding string) (Device, error) {
	if u.devices == nil {
		return Device{}, fmt.Errorf("%w: no device for keys with protection %s", ErrUnsupported, p)
	}
	d, err := u.devices.Device(u.ctx, p, location, binding)
	if err == nil && d.Resident == nil {
		err = fmt.Errorf("%w: the device at %s holds no keys", ErrUnsupported, d.Location)
	}
	return d, err
}

// deviceKey is one key of a device as mechanism sees it.
type deviceKey struct {
	use    *use
	device Device
	blob   enclave.Blob
	bound  []byte
}

// Do implements mechanism.Device.
func (k *deviceKey) Do(r mechanism.Request) ([]byte, error) {
	// The operation may outlast its caller, whose bytes are used again then.
	op := enclave.Op{Usage: r.Usage, Scheme: r.Scheme, Input: bytes.Clone(r.Input), Digest: r.Digest, Nonce: bytes.Clone(r.Nonce),
		AAD: bytes.Clone(r.AAD), Bound: k.bound}
	resident, blob := k.device.Resident, k.blob
	out, err := inDevice(k.use, &k.device, deviceTime, func(ctx context.Context) ([]byte, error) {
		defer clear(op.Input)
		return resident.Do(ctx, blob, op, nil)
	}, func(out []byte) { clear(out) })
	switch {
	case errors.Is(err, enclave.ErrDecryption):
		return nil, mechanism.ErrDecryption
	case errors.Is(err, enclave.ErrReplaced) && (k.use.key == nil || k.use.key.Profile != mechanism.ProfileMOSIPMachine): // of which the driver knows better
		return nil, lost(err)
	}
	return out, err
}

// inDevice returns what f does with a device, when that has time for it. f gets limit for that, however little time the caller has: what is
// under way in hardware cannot be called back, and a helper that is called back kills it and its login with it. If the caller leaves before,
// the result goes to drop. f must not use what belongs to the caller.
//
// Invariant: whether the act is allowed is asked after the wait for the device, too.
func inDevice[T any](u *use, d *Device, limit time.Duration, f func(context.Context) (T, error), drop func(T)) (T, error) {
	type answer struct {
		value    T
		err      error
		panicked any
	}
	var none T
	g := u.gates.of(d)
	leave, err := g.enter(u.ctx, d)
	if err != nil {
		return none, err
	}
	if err := u.still(); err != nil {
		leave()
		return none, err
	}
	done, left := make(chan answer), make(chan struct{})
	defer close(left)
	log, panics := u.log, &u.panics
	go func() {
		var a answer
		ctx, cancel := context.WithTimeout(context.Background(), limit)
		func() {
			defer func() { a.panicked = recover() }()
			a.value, a.err = f(ctx)
		}()
		if a.err != nil && ctx.Err() != nil {
			g.unanswered()
			a.err = noAnswer(limit)
		}
		cancel()
		leave()
		select {
		case done <- a:
		case <-left:
			if a.panicked != nil {
				panics.Add(1)
				text, stack := DescribePanic(a.panicked)
				log.Error("a device's driver panicked", "panic", text, "stack", stack)
			}
			if a.err == nil {
				drop(a.value)
			}
		}
		Scrub()
	}()
	began := time.Now()
	select {
	case a := <-done:
		if a.panicked != nil {
			panic(a.panicked) // where it is recovered, counted and recorded
		}
		return a.value, a.err
	case <-u.ctx.Done():
		if limit == deviceTime && time.Since(began) >= slowAnswer {
			g.unanswered()
		}
		return none, u.ctx.Err()
	}
}

// Mechanisms lists what the device that new keys of a protection are made in can do.
func (e *Engine) Mechanisms(ctx context.Context, p keyspec.Protection) (location string, list []enclave.Mechanism, err error) {
	u := use{Engine: e, ctx: ctx, now: e.now()}
	d, err := u.device(p, "", "")
	if err != nil {
		return "", nil, err
	}
	list, err = u.mechanisms(&d)
	return d.Location, list, err
}

// mechanisms asks the device what it can do, and remembers it as long as it is the same device: no longer than mechanismsLife.
func (u *use) mechanisms(d *Device) (list []enclave.Mechanism, err error) {
	g := u.gates.of(d)
	if list = g.known(time.Now()); list != nil {
		return list, nil
	}
	resident := d.Resident
	return inDevice(u, d, deviceTime, func(ctx context.Context) ([]enclave.Mechanism, error) {
		list, err := resident.Mechanisms(ctx)
		if err == nil {
			g.learn(list, time.Now())
		}
		return list, err
	}, func([]enclave.Mechanism) {})
}

// Can reports whether list has all that keys of an algorithm need for these usages.
func Can(list []enclave.Mechanism, row *mechanism.Row, usages []keyspec.Usage) bool {
	for _, u := range row.PrivateUsages(usages) {
		if !slices.ContainsFunc(list, func(m enclave.Mechanism) bool { return m.Algorithm == row.Algorithm && m.Usage == u }) {
			return false
		}
	}
	return len(row.PrivateUsages(usages)) > 0
}

// newest returns the number of the newest version of a key.
func newest(key *keystore.Key) keyspec.Version { return key.Versions[len(key.Versions)-1].Number }

// deviceFor returns the device that a new version of a key is to be made in: the one that has the versions before, if there are any and
// it is still the same. If it was cleared or exchanged, what was in it is lost, and the key goes on in the device that new keys are made in.
func (u *use) deviceFor(key *keystore.Key, number keyspec.Version) (Device, error) {
	for i := len(key.Versions) - 1; i >= 0; i-- {
		if v := &key.Versions[i]; v.Number < number && v.State != keyspec.Destroyed {
			l, err := u.loadResident(key, v.Number)
			if err != nil {
				return Device{}, err
			}
			d, err := u.device(key.Protection, l.record.location, l.record.binding)
			if err == nil && !u.replaced(&d) {
				return d, nil
			}
			if err != nil && !errors.Is(err, enclave.ErrReplaced) {
				return d, err
			}
			break
		}
	}
	return u.device(key.Protection, "", "")
}

// replaced reports whether the device says that it is not the one that it was.
func (u *use) replaced(d *Device) bool {
	ctx, cancel := context.WithTimeout(u.ctx, probeTime)
	defer cancel()
	return d.Enclave.Health(ctx).State == enclave.Replaced
}

// withResident calls f with the record and the public half of a new key version that was made in a device, or that is there already: secret,
// unless it is nil, returns the file that another program has of it.
func (u *use) withResident(key *keystore.Key, number keyspec.Version, row *mechanism.Row, secret func(*use, *mechanism.Row) ([]byte, error),
	f func(record, spki []byte) error,
) error {
	var file []byte
	if secret != nil {
		var err error
		if file, err = secret(u, row); err != nil {
			return err
		}
		if len(file) == 0 {
			return fmt.Errorf("%w: an empty key file", ErrInput)
		}
		defer clear(file)
	}
	d, err := u.deviceFor(key, number)
	if err != nil {
		return err
	}
	list, err := u.mechanisms(&d)
	if err != nil {
		return err
	}
	if !Can(list, row, key.Usages) {
		return &enclave.Error{Kind: enclave.ErrUnsupported, Detail: fmt.Sprintf("the device at %s has no %s keys for %s", d.Location, key.Algorithm, join(key.Usages)),
			Remedy: "it has " + describe(list)}
	}
	u.act.info = strings.TrimSpace(u.act.info + " in " + d.Location) // for the audit
	_, err = u.generate(&d, row, key.Usages, keyspec.Ref{Name: key.Name, Version: number}, file, f)
	return err
}

// generate makes a key in a device, or takes over the one of a file, binds it to ref, tries it, and calls f with its record and its public
// half. If nothing comes of it, the device is told to forget the key.
func (u *use) generate(d *Device, row *mechanism.Row, usages []keyspec.Usage, ref keyspec.Ref, file []byte,
	f func(record, spki []byte) error,
) (enclave.Blob, error) {
	spec := enclave.Spec{Algorithm: row.Algorithm, Usages: usages, AAD: boundTo(u.store, ref)}
	rand.Read(spec.ID[:])
	file = bytes.Clone(file)
	device, abandon := *d, u.Engine
	made, err := inDevice(u, d, generateTime, func(ctx context.Context) (made generated, err error) {
		defer clear(file)
		if file == nil {
			made.blob, made.spki, err = device.Resident.Generate(ctx, spec)
			return made, err
		}
		importer, ok := device.Enclave.(enclave.Importer)
		if !ok {
			return made, fmt.Errorf("%w: the device at %s takes over no keys of other programs", ErrUnsupported, device.Location)
		}
		made.blob, made.spki, err = importer.Import(ctx, file, nil, spec)
		return made, err
	}, func(made generated) { abandon.abandon(&device, made.blob) })
	if err != nil {
		return nil, err
	}
	blob, spki := made.blob, made.spki
	err = u.accept(d, row, usages, blob, spki, spec.AAD, f)
	if err != nil && !errors.Is(err, keystore.ErrStorage) { // after that error the commit may be there after all
		u.abandon(d, blob)
	}
	return blob, err
}

// generated is what a device gives out for a new key.
type generated struct {
	blob enclave.Blob
	spki []byte
}

// accept tries a key that a device has made, and has f commit it.
func (u *use) accept(d *Device, row *mechanism.Row, usages []keyspec.Usage, blob enclave.Blob, spki, bound []byte, f func(record, spki []byte) error) error {
	var public crypto.PublicKey
	if len(spki) > 0 {
		var err error
		if public, err = mechanism.ParseSPKI(spki); err != nil {
			return err
		}
	}
	k, err := row.Resident(public, &deviceKey{use: u, device: *d, blob: blob, bound: bound})
	if err != nil {
		return err
	}
	if err := k.Confirm(usages); err != nil {
		return err
	}
	record, err := (&residentKey{location: d.Location, binding: d.Enclave.Info().Binding, blob: blob}).encode()
	if err != nil {
		return err
	}
	return f(record, spki)
}

// abandon has a device destroy a key that no record has any more. That is tidiness, since without its record nobody finds the key: so a
// failure is only logged.
func (e *Engine) abandon(d *Device, blob enclave.Blob) {
	ctx, cancel := context.WithTimeout(context.Background(), abandonTime)
	defer cancel()
	g := e.gates.of(d)
	err := g.probe(ctx, d.Enclave)
	if err == nil {
		if err = d.Resident.Destroy(ctx, blob); ctx.Err() != nil {
			g.unanswered()
		}
	}
	if err != nil {
		e.log.Warn("a device still holds a key that is destroyed", "device", d.Location, "error", err)
	}
}

// gone is a resident key version that a commit destroys.
type gone struct {
	protection keyspec.Protection
	record     *residentKey
}

// goners reads, before a commit, the records of the resident keys that it destroys. Afterwards there are none.
func (u *use) goners(changes []keystore.Change) (list []gone) {
	for i := range changes {
		key := changes[i].Key
		if key.Protection == keyspec.Software || key.Protection == "" {
			continue
		}
		for _, number := range changes[i].Erase {
			r, err := u.residentRecord(keyspec.Ref{Name: key.Name, Version: number})
			if err != nil {
				u.log.Warn("a device may still hold a key that is destroyed", "error", err)
				continue
			}
			list = append(list, gone{key.Protection, r})
		}
	}
	return list
}

// bury has the devices destroy what a commit has destroyed.
func (u *use) bury(list []gone) {
	for _, g := range list {
		d, err := u.device(g.protection, g.record.location, g.record.binding)
		if err != nil {
			u.log.Warn("a device still holds a key that is destroyed", "device", g.record.location, "error", err)
			continue
		}
		u.abandon(&d, g.record.blob)
	}
}

func (n *NewKey) resident() bool { return n.Protection != "" && n.Protection != keyspec.Software }

// checkResident refuses what a key cannot be that is made in a device. Only import may find one there that another program has made.
func checkResident(n *NewKey, origin keyspec.Origin, op string) error {
	resident := n.resident()
	if n.Escrow != "" {
		if _, err := keyspec.ParseEscrow(string(n.Escrow)); err != nil {
			return fmt.Errorf("%w: %w", ErrInput, err)
		}
		if !resident || !n.Name.IsModule() {
			return fmt.Errorf("%w: escrow is for a module key (a name of one segment) in a tpm or hsm", ErrInput)
		}
	}
	switch {
	case !resident:
		return nil
	case n.Protection != keyspec.TPM && n.Protection != keyspec.HSM:
		return fmt.Errorf("%w: protection %q", ErrInput, n.Protection)
	case origin != keyspec.Generated && op != "key_import" && op != "key_migrate":
		return fmt.Errorf("%w: a key with protection %s is made in the device; one that exists already cannot be brought there", ErrUnsupported, n.Protection)
	case n.Exportable:
		return fmt.Errorf("%w: a key with protection %s never leaves its device, so it is not exportable", ErrUnsupported, n.Protection)
	}
	return nil
}

// checkLabel refuses, before something is encrypted that nobody could decrypt, a label that the TPM would not take: one has to end in
// its only zero byte (TPM 2.0 part 1 annex B.4).
func checkLabel(key *keystore.Key, label []byte) error {
	if n := len(label); key.Protection == keyspec.TPM && n > 0 && bytes.IndexByte(label, 0) != n-1 {
		return fmt.Errorf("%w: an OAEP label for a key in a TPM ends in its only zero byte", ErrUnsupported)
	}
	return nil
}

// describe lists mechanisms for people: rsa-2048 (sign, decrypt), ...
func describe(list []enclave.Mechanism) string {
	var names []keyspec.Algorithm
	usages := make(map[keyspec.Algorithm][]keyspec.Usage)
	for _, m := range list {
		if usages[m.Algorithm] == nil {
			names = append(names, m.Algorithm)
		}
		usages[m.Algorithm] = append(usages[m.Algorithm], m.Usage)
	}
	if len(names) == 0 {
		return "nothing that kmsd uses"
	}
	texts := make([]string, len(names))
	for i, n := range names {
		texts[i] = fmt.Sprintf("%s (%s)", n, join(usages[n]))
	}
	return strings.Join(texts, ", ")
}

func join[T ~string](list []T) string {
	texts := make([]string, len(list))
	for i, t := range list {
		texts[i] = string(t)
	}
	return strings.Join(texts, ", ")
}
