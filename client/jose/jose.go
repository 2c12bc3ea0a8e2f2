// Package jose reads and writes JSON Web Signatures (RFC 7515, RFC 7797 for payloads that are not encoded) and JSON Web
// Encryption (RFC 7516) in the compact serialization, as far as MOSIP and what surrounds it use them. It is a pure codec: the
// private key is behind a [Signer] or an [Unwrapper], which for keys in kmsd is a client.Key.
//
// # Security
//
// A signature is checked with a key that the caller gives, never with one that the token brings along: x5c, kid and the like
// are handed to the caller, who decides what to believe. The algorithm has to fit the key, so a token cannot choose another one.
// "none" and HMAC do not exist here. Headers with duplicate members are refused, as RFC 7515 section 4 allows, since two readers
// might take different ones; so are critical members that are not understood.
package jose

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"unicode/utf8"
)

// Errors of this package. They are wrapped with what was wrong.
var (
	ErrFormat       = errors.New("not a JOSE object")
	ErrUnsupported  = errors.New("unsupported JOSE feature")
	ErrVerification = errors.New("the signature does not verify")
	ErrDecryption   = errors.New("decryption failed")
	ErrTooLarge     = errors.New("JOSE object too large")
)

// Bounds in bytes.
const (
	MaxPayload = 64 << 20
	maxHeader  = 128 << 10
	maxChain   = 16 // certificates
)

// Header is a protected header. Members that are not listed are in Extra.
type Header struct {
	Algorithm  string   // alg
	Encryption string   // enc
	Zip        string   // zip
	Type       string   // typ
	Content    string   // cty
	KeyID      string   // kid
	Chain      [][]byte // x5c: certificates in DER, leaf first
	Thumbprint []byte   // x5t#S256: the SHA-256 of the leaf
	URL        string   // x5u
	KeySetURL  string   // jku
	Unencoded  bool     // b64 is false: the payload is signed as it is (RFC 7797)
	Extra      map[string]any
}

// reserved are the members that Extra must not contain.
var reserved = map[string]bool{
	"alg": true, "enc": true, "zip": true, "typ": true, "cty": true, "kid": true, "x5c": true, "x5t#S256": true, "x5u": true, "jku": true,
	"b64": true, "crit": true, "jwk": true, "x5t": true, "epk": true, "apu": true, "apv": true, "iv": true, "tag": true, "p2s": true, "p2c": true,
}

// member is one member of a header in the order it is written in.
type member struct {
	name  string
	value any
}

// encode returns the header as JSON. No reader may depend on the order of members; this one is that of the fields.
func (h *Header) encode() ([]byte, error) {
	list := []member{{"alg", h.Algorithm}}
	for _, m := range []struct{ name, value string }{
		{"enc", h.Encryption}, {"zip", h.Zip}, {"typ", h.Type}, {"cty", h.Content}, {"kid", h.KeyID}, {"x5u", h.URL}, {"jku", h.KeySetURL},
	} {
		if m.value != "" {
			list = append(list, member{m.name, m.value})
		}
	}
	if len(h.Chain) > maxChain {
		return nil, fmt.Errorf("%w: %d certificates, at most %d", ErrTooLarge, len(h.Chain), maxChain)
	}
	if len(h.Chain) > 0 {
		list = append(list, member{"x5c", h.Chain}) // encoding/json writes bytes in the standard base64 that x5c wants
	}
	if len(h.Thumbprint) > 0 {
		list = append(list, member{"x5t#S256", base64.RawURLEncoding.EncodeToString(h.Thumbprint)})
	}
	if h.Unencoded {
		list = append(list, member{"b64", false}, member{"crit", []string{"b64"}})
	}
	var b bytes.Buffer
	for i, m := range list {
		if err := writeMember(&b, i == 0, m.name, m.value); err != nil {
			return nil, err
		}
	}
	extra, err := encodeExtra(h.Extra)
	if err != nil {
		return nil, err
	}
	b.Write(extra)
	b.WriteByte('}')
	if b.Len() > maxHeader {
		return nil, fmt.Errorf("%w: header of %d bytes, at most %d", ErrTooLarge, b.Len(), maxHeader)
	}
	return b.Bytes(), nil
}

func writeMember(b *bytes.Buffer, first bool, name string, value any) error {
	if first {
		b.WriteByte('{')
	} else {
		b.WriteByte(',')
	}
	for i, part := range []any{name, value} {
		if i > 0 {
			b.WriteByte(':')
		}
		e := json.NewEncoder(b)
		e.SetEscapeHTML(false)
		if err := e.Encode(part); err != nil {
			return fmt.Errorf("%w: header member %q: %w", ErrFormat, name, err)
		}
		b.Truncate(b.Len() - 1) // the encoder ends with a new line
	}
	return nil
}

// encodeExtra returns ",name:value" for each further member, ordered by name.
func encodeExtra(extra map[string]any) ([]byte, error) {
	if len(extra) == 0 {
		return nil, nil
	}
	for name := range extra {
		if name == "" || reserved[name] {
			return nil, fmt.Errorf("%w: %q is not a further member of a header", ErrFormat, name)
		}
	}
	b, err := json.Marshal(extra)
	if err != nil {
		return nil, fmt.Errorf("%w: header: %w", ErrFormat, err)
	}
	return append([]byte{','}, b[1:len(b)-1]...), nil
}

// decodeHeader parses a protected header.
func decodeHeader(b []byte) (*Header, error) {
	if len(b) > maxHeader {
		return nil, fmt.Errorf("%w: header of %d bytes, at most %d", ErrTooLarge, len(b), maxHeader)
	}
	if err := checkJSON(b); err != nil {
		return nil, fmt.Errorf("%w: header: %w", ErrFormat, err)
	}
	var raw map[string]json.RawMessage
	if err := json.Unmarshal(b, &raw); err != nil {
		return nil, fmt.Errorf("%w: header: %w", ErrFormat, err)
	}
	h := &Header{}
	var chain []string
	var thumbprint string
	var critical []string
	encoded := true
	_, hasB64 := raw["b64"]
	for _, f := range []struct {
		name string
		to   any
	}{
		{"alg", &h.Algorithm}, {"enc", &h.Encryption}, {"zip", &h.Zip}, {"typ", &h.Type}, {"cty", &h.Content}, {"kid", &h.KeyID}, {"x5u", &h.URL},
		{"jku", &h.KeySetURL}, {"x5c", &chain}, {"x5t#S256", &thumbprint}, {"b64", &encoded}, {"crit", &critical},
	} {
		value, ok := raw[f.name]
		if !ok {
			continue
		}
		delete(raw, f.name)
		if string(value) == "null" {
			return nil, fmt.Errorf("%w: header member %q is null", ErrFormat, f.name)
		}
		if err := json.Unmarshal(value, f.to); err != nil {
			return nil, fmt.Errorf("%w: header member %q", ErrFormat, f.name)
		}
		if f.name == "crit" && len(critical) == 0 || f.name == "x5c" && len(chain) == 0 {
			return nil, fmt.Errorf("%w: header member %s is empty", ErrFormat, f.name)
		}
	}
	for i, name := range critical {
		switch {
		case name != "b64":
			return nil, fmt.Errorf("%w: critical header member %q", ErrUnsupported, name)
		case i > 0 || !hasB64: // RFC 7515 section 4.1.11
			return nil, fmt.Errorf("%w: header member crit names what is not there, or twice", ErrFormat)
		}
	}
	switch {
	case h.Algorithm == "":
		return nil, fmt.Errorf("%w: the header names no algorithm", ErrFormat)
	case !encoded && len(critical) == 0:
		return nil, fmt.Errorf("%w: b64 is not critical (RFC 7797 section 6)", ErrFormat)
	case len(chain) > maxChain:
		return nil, fmt.Errorf("%w: %d certificates, at most %d", ErrTooLarge, len(chain), maxChain)
	}
	h.Unencoded = !encoded
	for _, text := range chain {
		der, err := base64.StdEncoding.DecodeString(text)
		if err != nil {
			return nil, fmt.Errorf("%w: x5c is not base64", ErrFormat)
		}
		h.Chain = append(h.Chain, der)
	}
	if thumbprint != "" {
		sum, err := decodeSegment(thumbprint)
		if err != nil || len(sum) != sha256.Size {
			return nil, fmt.Errorf("%w: x5t#S256 is no SHA-256", ErrFormat)
		}
		h.Thumbprint = sum
	}
	for name, value := range raw {
		if h.Extra == nil {
			h.Extra = make(map[string]any)
		}
		var v any
		if err := json.Unmarshal(value, &v); err != nil {
			return nil, fmt.Errorf("%w: header member %q", ErrFormat, name)
		}
		h.Extra[name] = v
	}
	return h, nil
}

// checkJSON refuses what is not one JSON object in UTF-8, nesting that only an attacker makes, and members that come twice.
func checkJSON(b []byte) error {
	if !utf8.Valid(b) { // in whose place encoding/json would read something else than other readers
		return errors.New("is not UTF-8")
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	const deepest = 32
	type level struct {
		object bool
		names  map[string]bool
		value  bool // in an object: the next token is a value
	}
	var stack []level
	for first := true; ; first = false {
		t, err := d.Token()
		if err == io.EOF && !first && len(stack) == 0 {
			return nil
		}
		if err != nil {
			return errors.New("is not JSON")
		}
		if first && t != json.Delim('{') || !first && len(stack) == 0 {
			return errors.New("is not one JSON object")
		}
		if t == json.Delim('}') || t == json.Delim(']') {
			stack = stack[:len(stack)-1]
			continue
		}
		if n := len(stack) - 1; n >= 0 && stack[n].object {
			if !stack[n].value {
				name := t.(string)
				if stack[n].names[name] {
					return fmt.Errorf("has the member %q twice", name)
				}
				stack[n].names[name], stack[n].value = true, true
				continue
			}
			stack[n].value = false
		}
		switch t {
		case json.Delim('{'):
			stack = append(stack, level{object: true, names: make(map[string]bool)})
		case json.Delim('['):
			stack = append(stack, level{})
		}
		if len(stack) > deepest {
			return errors.New("is nested too deeply")
		}
	}
}

// CheckJSON refuses text that is not one JSON object without duplicate members: what MOSIP wants to have signed or encrypted.
func CheckJSON(b []byte) error {
	if err := checkJSON(b); err != nil {
		return fmt.Errorf("%w: the payload %w", ErrFormat, err)
	}
	return nil
}

// decodeSegment decodes a part of a compact serialization: base64url without padding (RFC 7515 section 2), in the one way of
// writing it that encoders have.
func decodeSegment(s string) ([]byte, error) {
	if strings.ContainsAny(s, "\r\n") { // which encoding/base64 would skip
		return nil, fmt.Errorf("%w: a part is not base64url", ErrFormat)
	}
	b, err := base64.RawURLEncoding.Strict().DecodeString(s)
	if err != nil {
		return nil, fmt.Errorf("%w: a part is not base64url", ErrFormat)
	}
	return b, nil
}

// addCertificates puts what a reader shall know of the certificate into a header.
func (h *Header) addCertificates(chain []*x509.Certificate, include int, thumbprint bool) error {
	if (include > 0 || thumbprint) && len(chain) == 0 {
		return fmt.Errorf("%w: no certificate to put into the header", ErrFormat)
	}
	for _, c := range chain[:min(include, len(chain))] {
		h.Chain = append(h.Chain, c.Raw)
	}
	if thumbprint {
		sum := sha256.Sum256(chain[0].Raw)
		h.Thumbprint = sum[:]
	}
	return nil
}
