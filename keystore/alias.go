package keystore

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"slices"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

const (
	maxAliases    = 64 // of one version, besides those that follow from its public part and those of its earlier certificates
	maxAliasValue = 256
	aliasSize     = 28 + 16 // of an entry: record key, MAC
	maxSharing    = 256     // versions that go by the same alias; of more of them the last ones are known
)

// publicAliases returns the aliases that follow from a public part.
func (s *Store) publicAliases(key recordKey, p *Public) []put {
	var list []put
	for _, place := range s.publicPlaces(p) {
		list = append(list, s.aliasAt(place, key))
	}
	return list
}

// publicPlaces returns the places of those aliases: of the public key first, if there is one, then of the certificate, if there is one.
func (s *Store) publicPlaces(p *Public) (places [][32]byte) {
	if len(p.SPKI) > 0 {
		sum := sha256.Sum256(p.SPKI)
		places = append(places, s.aliasKey(AliasSPKI, sum[:]))
	}
	if len(p.Chain) > 0 {
		sum := sha256.Sum256(p.Chain[0])
		places = append(places, s.aliasKey(AliasThumbprint, sum[:]))
	}
	return places
}

// retireAliases deletes the aliases of a version that follow from its public part, when that is replaced by next, and all of one that
// is destroyed. v is what the version will be. What the new public part has in common with the old
// one is written again afterwards.
//
// Invariant: the thumbprints of earlier certificates for the same public key stay, the last MaxThumbprints of them, because what was
// encrypted to a certificate names it by its thumbprint for ever.
func (s *Store) retireAliases(meta *entry, before, v *Version, next *Public) (list []put) {
	old, err := s.public(meta, before)
	if err != nil {
		old = Public{} // it is damaged, and replacing it is how that is mended
	}
	gone := s.publicPlaces(&old)
	switch {
	case v.State == keyspec.Destroyed:
		gone = slices.Concat(gone, before.aliases, before.thumbprints)
		v.aliases, v.thumbprints = nil, nil
	case err == nil && !bytes.Equal(old.SPKI, next.SPKI):
		gone = append(gone, before.thumbprints...)
		v.thumbprints = nil
	default:
		kept := slices.Clone(before.thumbprints)
		if len(old.Chain) > 0 {
			last := len(gone) - 1
			kept = append(kept, gone[last])
			gone = gone[:last]
		}
		current := s.publicPlaces(next)
		kept = slices.DeleteFunc(kept, func(place [32]byte) bool { return slices.Contains(current, place) })
		surplus := max(len(kept)-MaxThumbprints, 0)
		gone = append(gone, kept[:surplus]...)
		v.thumbprints = kept[surplus:]
	}
	key := meta.key.id().at(v.Number)
	for _, place := range gone {
		if !slices.Contains(v.aliases, place) {
			list = append(list, s.aliasAt(place, key).removed())
		}
	}
	return list
}

func (s *Store) aliasKey(kind AliasKind, value []byte) [32]byte {
	return mac(s.secrets.index.Bytes(), []byte("alias\x00"), []byte(kind), []byte{0}, value)
}

// alias returns an alias as it is written.
func (s *Store) alias(kind AliasKind, value []byte, target recordKey) put {
	return s.aliasAt(s.aliasKey(kind, value), target)
}

// aliasAt returns the alias at this place. Its MAC keeps it from being exchanged for another.
func (s *Store) aliasAt(key [32]byte, target recordKey) put {
	tag := mac(s.secrets.alias.Bytes(), []byte("alias\x00"), key[:], target[:])
	return put{bucket: bucketAlias, key: key[:], value: append(bytes.Clone(target[:]), tag[:16]...)}
}

// removed returns what undoes p, the putting of an alias.
func (p put) removed() put {
	p.was, p.value = p.value, nil
	return p
}

// merged returns what is at the place of an alias after p, empty for nothing. Each version that goes by the alias has an entry there. The
// one that was written last is found; when that version goes, the one before it is.
func (p *put) merged(present []byte) []byte {
	var out []byte
	for old := range slices.Chunk(present, aliasSize) {
		if len(old) == aliasSize && !bytes.Equal(old, p.value) && !bytes.Equal(old, p.was) {
			out = append(out, old...)
		}
	}
	out = append(out, p.value...)
	return out[max(0, len(out)-maxSharing*aliasSize):]
}

// sharesAlias reports whether a version has its entry at the place of an alias, or may have had it before too many others came.
func (p *put) sharesAlias(present []byte) bool {
	for entry := range slices.Chunk(present, aliasSize) {
		if bytes.Equal(entry, p.value) {
			return true
		}
	}
	return len(present) >= maxSharing*aliasSize
}

// addAliases writes aliases and has the metadata know of them.
func (s *Store) addAliases(p *preparedChange, next *metadata, list []Alias) error {
	for _, a := range list {
		v := next.version(a.Version)
		if v == nil || v.State == keyspec.Destroyed || a.Kind == "" || len(a.Kind) > maxWord || len(a.Value) == 0 || len(a.Value) > maxAliasValue {
			return fmt.Errorf("%w: alias of %s", ErrInvalid, next.Name)
		}
		alias := s.alias(a.Kind, a.Value, p.meta.id().at(a.Version))
		p.puts = append(p.puts, alias)
		if place := [32]byte(alias.key); !slices.Contains(v.aliases, place) {
			v.aliases = append(slices.Clip(v.aliases), place)
		}
		if len(v.aliases) > maxAliases {
			return fmt.Errorf("%w: aliases of %s", ErrTooLarge, next.Name)
		}
	}
	return nil
}
