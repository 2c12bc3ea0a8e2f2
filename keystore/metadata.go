package keystore

import (
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

const (
	metadataFormat = 1

	flagExportable = 1 << 0
	flagDurable    = 1 << 1
	flagLimited    = 1 << 2 // the number of uses left follows Keep

	maxWord     = 64 // bytes of an algorithm, usage, state and the like
	maxProfile  = 128
	maxList     = 64      // usages, bridges
	maxVersions = 1 << 16 // that a record may claim
)

// metadata is a Key and what only the store needs to know about it.
type metadata struct {
	Key
	wrapping uint64         // revision of the namespace wrapping key of a module key, 0 for none
	escrow   keyspec.Escrow // of a module key whose namespace a device guards
}

func (m *metadata) encode() []byte {
	e := &encoder{b: make([]byte, 0, 480)}
	e.u8(metadataFormat)
	e.str8(string(m.Name))
	e.str8(string(m.Algorithm))
	e.str8(string(m.Origin))
	e.str8(string(m.Protection))
	e.str8(m.Profile)
	e.str8(string(m.escrow))
	var flags uint8
	if m.Exportable {
		flags |= flagExportable
	}
	if m.Durable {
		flags |= flagDurable
	}
	if m.Limited {
		flags |= flagLimited
	}
	e.u8(flags)
	e.u32(m.Owner)
	e.time(m.Created)
	e.u32(uint32(m.Current))
	e.u32(uint32(m.MinVersion))
	e.u32(m.Keep)
	if m.Limited {
		e.u64(m.UsesLeft)
	}
	e.u64(m.wrapping)
	e.u8(uint8(len(m.Usages)))
	for _, u := range m.Usages {
		e.str8(string(u))
	}
	e.u8(uint8(len(m.UsableVia)))
	for _, v := range m.UsableVia {
		e.str8(v)
	}
	e.u16(uint16(len(m.Labels)))
	for _, k := range slices.Sorted(maps.Keys(m.Labels)) {
		e.str16(k)
		e.str16(m.Labels[k])
	}
	e.u32(uint32(len(m.Versions)))
	for i := range m.Versions {
		v := &m.Versions[i]
		e.u32(uint32(v.Number))
		e.str8(string(v.State))
		e.time(v.Created)
		e.time(v.NotBefore)
		e.time(v.Expires)
		e.str8(string(v.Reason))
		e.time(v.Revoked)
		e.time(v.DestroyAt)
		e.u64(v.Invocations)
		e.raw(v.SPKISHA256[:])
		e.u64(v.public)
		e.places(v.aliases)
		e.places(v.thumbprints)
	}
	return e.b
}

// places stores the places of at most 255 aliases.
func (e *encoder) places(list [][32]byte) {
	e.u8(uint8(len(list)))
	for i := range list {
		e.raw(list[i][:])
	}
}

func (d *decoder) places() [][32]byte {
	n := int(d.u8())
	if n == 0 {
		return nil
	}
	if n*32 > len(d.b) {
		d.fail(errShort)
		return nil
	}
	list := make([][32]byte, n)
	for i := range list {
		d.fixed(list[i][:])
	}
	return list
}

// decodeMetadata parses the payload of a metadata record. The words in it are not checked against those this release knows: a key of
// an algorithm that comes later is listed, and refused where it is used.
func decodeMetadata(b []byte) (*metadata, error) {
	d := &decoder{b: b}
	m := &metadata{}
	if f := d.u8(); d.err == nil && f != metadataFormat {
		return nil, fmt.Errorf("%w: metadata format %d", ErrNewer, f)
	}
	m.Name = keyspec.Name(d.str8())
	m.Algorithm = keyspec.Algorithm(d.str8())
	m.Origin = keyspec.Origin(d.str8())
	m.Protection = keyspec.Protection(d.str8())
	m.Profile = d.str8()
	m.escrow = keyspec.Escrow(d.str8())
	flags := d.u8()
	if flags&^(flagExportable|flagDurable|flagLimited) != 0 {
		return nil, fmt.Errorf("%w: metadata flags %x", ErrNewer, flags)
	}
	m.Exportable = flags&flagExportable != 0
	m.Durable = flags&flagDurable != 0
	m.Limited = flags&flagLimited != 0
	m.Owner = d.u32()
	m.Created = d.time()
	m.Current = keyspec.Version(d.u32())
	m.MinVersion = keyspec.Version(d.u32())
	m.Keep = d.u32()
	if m.Limited {
		m.UsesLeft = d.u64()
	}
	m.wrapping = d.u64()
	for range d.u8() {
		m.Usages = append(m.Usages, keyspec.Usage(d.str8()))
	}
	for range d.u8() {
		m.UsableVia = append(m.UsableVia, d.str8())
	}
	if n := d.u16(); n > 0 && d.err == nil {
		m.Labels = make(map[string]string, min(n, keyspec.MaxLabels))
		for range n {
			k := d.str16()
			m.Labels[k] = d.str16()
			if d.err != nil {
				break
			}
		}
	}
	n := d.u32()
	if n > maxVersions {
		d.fail(errors.New("has too many versions"))
	}
	if d.err == nil {
		m.Versions = make([]Version, 0, min(n, 64))
	}
	for range n {
		v := Version{Number: keyspec.Version(d.u32())}
		v.State = keyspec.State(d.str8())
		v.Created = d.time()
		v.NotBefore = d.time()
		v.Expires = d.time()
		v.Reason = keyspec.Reason(d.str8())
		v.Revoked = d.time()
		v.DestroyAt = d.time()
		v.Invocations = d.u64()
		d.fixed(v.SPKISHA256[:])
		v.public = d.u64()
		v.aliases = d.places()
		v.thumbprints = d.places()
		if d.err != nil {
			break
		}
		m.Versions = append(m.Versions, v)
	}
	if err := d.end(); err != nil {
		return nil, fmt.Errorf("%w: metadata %w", ErrDamaged, err)
	}
	return m, nil
}

// version returns the version with this number, or nil.
func (k *Key) version(n keyspec.Version) *Version {
	i, ok := slices.BinarySearchFunc(k.Versions, n, func(v Version, n keyspec.Version) int { return int(int64(v.Number) - int64(n)) })
	if !ok {
		return nil
	}
	return &k.Versions[i]
}

// check reports whether k is well-formed enough to be stored. What its words mean is not the store's business.
func (k *Key) check() error {
	if _, err := keyspec.ParseName(string(k.Name)); err != nil {
		return fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	bad := func(text string) error { return fmt.Errorf("%w: %s", ErrInvalid, text) }
	word := func(s string) bool { return len(s) <= maxWord }
	if k.Algorithm == "" || !word(string(k.Algorithm)) || !word(string(k.Origin)) || !word(string(k.Protection)) || len(k.Profile) > maxProfile {
		return bad("algorithm, origin, protection or profile")
	}
	if len(k.Usages) > maxList || len(k.UsableVia) > keyspec.MaxUsableVia || len(k.Labels) > keyspec.MaxLabels {
		return fmt.Errorf("%w: usages, bridges or labels", ErrTooLarge)
	}
	for _, u := range k.Usages {
		if !word(string(u)) {
			return bad("usage")
		}
	}
	for _, v := range k.UsableVia {
		if !word(v) {
			return bad("bridge")
		}
	}
	for name, value := range k.Labels {
		if len(name) > keyspec.MaxLabelName || len(value) > keyspec.MaxLabelValue {
			return fmt.Errorf("%w: label", ErrTooLarge)
		}
	}
	if len(k.Versions) == 0 || len(k.Versions) > keyspec.MaxVersions {
		return bad("number of versions")
	}
	var last keyspec.Version
	for i := range k.Versions {
		v := &k.Versions[i]
		if v.Number <= last {
			return bad("versions are not in ascending order")
		}
		last = v.Number
		if v.State == "" || !word(string(v.State)) || !word(string(v.Reason)) {
			return bad("state or reason of a version")
		}
	}
	if k.version(k.Current) == nil {
		return bad("the current version does not exist")
	}
	return nil
}

func (p *Public) encode() []byte {
	e := &encoder{}
	e.bytes32(p.SPKI)
	e.u16(uint16(len(p.Chain)))
	for _, c := range p.Chain {
		e.bytes32(c)
	}
	return e.b
}

func decodePublic(b []byte) (Public, error) {
	d := &decoder{b: b}
	var p Public
	p.SPKI = slices.Clone(d.bytes32())
	for range d.u16() {
		c := d.bytes32()
		if d.err != nil {
			break
		}
		p.Chain = append(p.Chain, slices.Clone(c))
	}
	if err := d.end(); err != nil {
		return Public{}, fmt.Errorf("%w: public part %w", ErrDamaged, err)
	}
	return p, nil
}
