package pki

import (
	"encoding/asn1"
	"fmt"
	"slices"
)

// Attribute is an attribute of a distinguished name: a type by its short name (CN, OU, ...) and a value.
type Attribute struct{ Type, Value string }

// EditName returns the Name raw with other values for some attributes. They come in the order that attributes shall have: one that
// raw has is replaced where it stands, one that it lacks goes before the first that comes after it in the list, and one with an empty
// value is removed. Everything else of raw stays as it is, byte for byte, string types included. Errors wrap ErrName.
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
	at := func(oid asn1.ObjectIdentifier) int {
		return slices.IndexFunc(rdns, func(rdn rdnSET) bool { return len(rdn) == 1 && rdn[0].Type.Equal(oid) })
	}
	for i, a := range attributes {
		place := at(oids[i])
		if a.Value == "" {
			if place >= 0 {
				rdns = slices.Delete(rdns, place, place+1)
			}
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
		if place >= 0 {
			rdns[place] = rdn
			continue
		}
		place = len(rdns)
		for _, later := range oids[i+1:] {
			if p := at(later); p >= 0 {
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
