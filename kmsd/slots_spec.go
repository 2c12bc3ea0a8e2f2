package main

import (
	"errors"
	"fmt"
	"net/url"
	"path/filepath"
	"slices"
	"strings"

	"github.com/kmsd-project/kmsd/enclave/keyfile"
	"github.com/kmsd-project/kmsd/enclave/keyring"
	"github.com/kmsd-project/kmsd/enclave/pkcs11"
	"github.com/kmsd-project/kmsd/enclave/recovery"
	"github.com/kmsd-project/kmsd/enclave/tpm"
	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// errSpec is wrapped by errors about what an administrator asked for.
var errSpec = errors.New("invalid request for a slot")

// What can be asked for, besides kinds of slots.
const (
	specAuto   = "auto"
	specShares = "recovery:shares"
)

// slotKind is one kind of slots.
type slotKind struct {
	kind     string
	strength int      // kinds of the same strength may stand in for each other; 0 is the best
	place    string   // what follows the kind, for people; empty for kinds of which a machine has one
	options  []string // what a spec may ask for
	lasting  []string // the options that the driver needs again after enrolment
}

// slotKinds lists the kinds by what they protect against, best first.
//
// keyring:file stands behind the keyfile, because what opens it lies on the same disk.
func slotKinds() []slotKind {
	return []slotKind{
		{kind: tpm.Kind, strength: 0, place: "/dev/tpmrm0", options: []string{"guard", "pcrs", "signer", "approvals"}, lasting: []string{"approvals"}},
		{kind: pkcs11.Kind, strength: 0, place: "MODULE?token=LABEL"}, // and what pkcs11.ParseSpec understands
		{kind: keyring.SecretServiceKind, strength: 1},
		{kind: keyfile.Kind, strength: 2, place: "PATH"},
		{kind: keyring.FileKind, strength: 3},
		{kind: recovery.Kind, strength: 4},
	}
}

func findKind(kind string) (slotKind, bool) {
	for _, k := range slotKinds() {
		if k.kind == kind {
			return k, true
		}
	}
	return slotKind{}, false
}

// strength is that of a kind. A kind of a later release counts as the strongest, so that nothing weaker takes its place.
func strength(kind string) int {
	if k, ok := findKind(kind); ok {
		return k.strength
	}
	return 0
}

// spec says which device shall guard a slot, and how:
//
//	KIND[:PLACE][?OPTION=VALUE[&OPTION=VALUE]...]
//
// Values are encoded as in the query of a URL. The spec without the options that only enrolment needs is the location of the slot, from
// which the driver is opened again.
type spec struct {
	kind    string
	place   string
	options map[string]string
	token   pkcs11.Spec // of that kind, instead of place and options
}

// parseSpec reads a spec of at most proto.MaxSpec bytes. Errors wrap errSpec.
func parseSpec(text string) (spec, error) {
	wrong := func(format string, args ...any) (spec, error) {
		return spec{}, fmt.Errorf("%w: "+format, append([]any{errSpec}, args...)...)
	}
	if len(text) > proto.MaxSpec {
		return wrong("over %d bytes", proto.MaxSpec)
	}
	head, query, _ := strings.Cut(text, "?")
	var row slotKind
	place, found := "", false
	for _, k := range slotKinds() {
		if head == k.kind {
			row, found = k, true
		} else if rest, ok := strings.CutPrefix(head, k.kind+":"); ok && k.place != "" {
			row, place, found = k, rest, true
		}
	}
	if !found {
		return wrong("no enclave is called %.100q; there are auto, %s", text, strings.Join(kindNames(), ", "))
	}
	if row.kind == pkcs11.Kind {
		token, err := pkcs11.ParseSpec(text)
		if err != nil {
			return spec{}, fmt.Errorf("%w: %w", errSpec, err)
		}
		if len(token.Location()) > keyspec.MaxLocation {
			return wrong("the location of a device has at most %d bytes", keyspec.MaxLocation)
		}
		return spec{kind: pkcs11.Kind, token: token}, nil
	}
	if strings.ContainsFunc(place, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return wrong("the name of a device holds a control character")
	}
	if path := strings.TrimPrefix(place, "unix:"); row.place != "" && (!filepath.IsAbs(path) || path != filepath.Clean(path)) {
		example := row.kind + ":" + row.place
		if row.kind == tpm.Kind {
			example += " or tpm:unix:PATH"
		}
		return wrong("%.100q: write %s, with an absolute path", text, example)
	}
	s := spec{kind: row.kind, place: place, options: map[string]string{}}
	for pair := range strings.SplitSeq(query, "&") {
		if pair == "" {
			continue
		}
		name, value, _ := strings.Cut(pair, "=")
		value, err := url.QueryUnescape(value)
		if err != nil || value == "" || strings.ContainsRune(value, 0) {
			return wrong("the value of %.50q in %.100q", name, text)
		}
		if !slices.Contains(row.options, name) {
			return wrong("%s has no option %.50q", row.kind, name)
		}
		if _, twice := s.options[name]; twice {
			return wrong("%s is given twice in %.100q", name, text)
		}
		s.options[name] = value
	}
	if len(s.location()) > keyspec.MaxLocation {
		return wrong("the location of a device has at most %d bytes", keyspec.MaxLocation)
	}
	return s, nil
}

// kindNames lists how specs begin.
func kindNames() []string {
	var names []string
	for _, k := range slotKinds() {
		name := k.kind
		if k.place != "" {
			name += ":" + k.place
		}
		names = append(names, name)
	}
	return append(names, specShares)
}

// location is the spec with lasting options alone, as parseSpec reads it.
func (s spec) location() string {
	if s.kind == pkcs11.Kind {
		return s.token.Location()
	}
	row, _ := findKind(s.kind)
	text := s.kind
	if s.place != "" {
		text += ":" + s.place
	}
	sep := "?"
	for _, name := range row.lasting {
		if value := s.options[name]; value != "" {
			text += sep + name + "=" + escapeValue(value)
			sep = "&"
		}
	}
	return text
}

// sameDevice reports whether two locations, or specs, are of one device: for a TPM that is its place, for a token its module and what both
// say of its label and its serial number.
func sameDevice(a, b string) bool {
	s, err := parseSpec(a)
	if err != nil {
		return a == b
	}
	t, err := parseSpec(b)
	if err != nil || s.kind != t.kind {
		return false
	}
	agree := func(x, y string) bool { return x == "" || y == "" || x == y }
	switch s.kind {
	case tpm.Kind:
		return s.place == t.place
	case pkcs11.Kind:
		return s.token.Module == t.token.Module && agree(s.token.Token, t.token.Token) && agree(s.token.Serial, t.token.Serial)
	}
	return s.location() == t.location()
}

// escapeValue encodes what has a meaning in a spec, and leaves paths readable.
func escapeValue(v string) string {
	var b strings.Builder
	for i := range len(v) {
		if c := v[i]; c <= ' ' || c >= 0x7f || strings.IndexByte("%&+?#", c) >= 0 {
			fmt.Fprintf(&b, "%%%02X", c)
		} else {
			b.WriteByte(c)
		}
	}
	return b.String()
}
