package pki

import (
	"encoding/asn1"
	"fmt"
	"slices"
)

// Attribute is an attribute of a distinguished name: a type by its short name (CN, OU, ...) and a value.
type Attribute struct{ Type, Value string }

// EditName returns the Name raw with other values for some attributes. They come in the order that attributes shall have: one that
// raw has is replaced where it stands first, and is there once then; one that it lacks goes before the first that comes after it in the
// list, and one with an empty value is removed. Everything else of raw stays as it is, byte for byte, string types included. Errors
// wrap ErrName.
func EditName(raw []byte, attributes []Attribute) ([]byte, error) {
	rdns, err := parseRDNs(raw)
	if err != nil {
		return nil, err
	}
	if rdns == nil {
		rdns = []rdnSET{}
	}
	var oids []asn1.ObjectIdentifier
	for _, a := range attributes {
		_, oid, err := lookupType(a.Type)
		if err != nil {
			return nil, err
		}
		oids = append(oids, oid)
	}
	is := func(oid asn1.ObjectIdentifier) func(rdnSET) bool {
		return func(rdn rdnSET) bool { return len(rdn) == 1 && rdn[0].Type.Equal(oid) }
	}
	for i, a := range attributes {
		if a.Value == "" {
			rdns = slices.DeleteFunc(rdns, is(oids[i]))
			continue
		}
		known, _, _ := lookupType(a.Type)
		if known == nil {
			return nil, fmt.Errorf("%w: unknown attribute type %q", ErrName, a.Type)
		}
		if err := known.check(a.Value); err != nil {
			return nil, err
		}
		rdn := rdnSET{{oids[i], asn1.RawValue{Tag: known.tag, Bytes: []byte(a.Value)}}}
		if place := slices.IndexFunc(rdns, is(oids[i])); place >= 0 {
			rdns[place] = rdn
			rdns = slices.Concat(rdns[:place+1], slices.DeleteFunc(rdns[place+1:], is(oids[i])))
			continue
		}
		place := len(rdns)
		for _, later := range oids[i+1:] {
			if p := slices.IndexFunc(rdns, is(later)); p >= 0 {
				place = min(place, p)
			}
		}
		rdns = slices.Insert(rdns, place, rdn)
	}
	edited, err := asn1.Marshal(rdns)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrName, err)
	}
	if len(edited) > MaxName || len(rdns) > MaxRDNs {
		return nil, fmt.Errorf("%w: longer than %d bytes or %d attributes", ErrName, MaxName, MaxRDNs)
	}
	return edited, nil
}
