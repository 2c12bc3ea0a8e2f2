package cose

import (
	"bytes"
	"context"
	"crypto"
	"encoding/json"
	"fmt"
	"math"
	"slices"
	"strconv"
	"time"

	"github.com/fxamacker/cbor/v2"

	"github.com/kmsd-project/kmsd/client/jose"
)

// tagCWT is the tag around the one of the message (RFC 8392 section 6).
const tagCWT = 61

// The claims by their numbers (RFC 8392 section 3.1.1 to 3.1.7), and the one that MOSIP puts identity data into.
const (
	claimIssuer    = int64(1)
	claimSubject   = int64(2)
	claimAudience  = int64(3)
	claimExpires   = int64(4)
	claimNotBefore = int64(5)
	claimIssuedAt  = int64(6)
	claimID        = int64(7)
	claimIdentity  = int64(169)
)

// registered are the claims that Claims.Extra must not contain.
var registered = []int64{claimIssuer, claimSubject, claimAudience, claimExpires, claimNotBefore, claimIssuedAt, claimID}

// latest is the last second of the year 9999, after which nothing expires.
const latest = 253402300799

// Claims is what a CWT says. Times are rounded down to seconds when they are written; zero times are none, and so are empty
// strings and byte strings.
type Claims struct {
	Issuer    string    // iss
	Subject   string    // sub
	Audience  []string  // aud
	Expires   time.Time // exp
	NotBefore time.Time // nbf
	IssuedAt  time.Time // iat
	ID        []byte    // cti; MOSIP puts in the characters of a text
	Identity  []byte    // claim 169 in a byte string, as MOSIP writes it; another one is in Extra
	Extra     map[any]any
	// Extra has what is not listed, under an int64 or a string. Values that were read are int64, float64, bool, nil, string,
	// []byte, []any or map[any]any.
}

// SignCWT returns claims as a COSE_Sign1 message with both tags, as MOSIP does.
func SignCWT(ctx context.Context, s jose.Signer, c *Claims, o SignOptions) ([]byte, error) {
	if o.Detached {
		return nil, fmt.Errorf("%w: a token without its claims", ErrUnsupported)
	}
	payload, err := c.encode()
	if err != nil {
		return nil, err
	}
	message, err := Sign(ctx, s, payload, o)
	if err != nil {
		return nil, err
	}
	return append([]byte{6<<5 | 24, tagCWT}, message...), nil
}

// ParseCWT parses a CWT with or without its own tag, but with that of COSE_Sign1 (RFC 8392 section 7.2).
func ParseCWT(token []byte) (*Signed, error) {
	message, _ := withoutTag(token, tagCWT)
	if _, ok := withoutTag(message, tagSign1); !ok {
		return nil, fmt.Errorf("%w: not tagged as one", ErrFormat)
	}
	s, err := Parse(message)
	if err != nil {
		return nil, err
	}
	if s.Detached {
		return nil, fmt.Errorf("%w: a token without its claims", ErrFormat)
	}
	return s, nil
}

// Expect is what a token has to be for its reader to take it.
type Expect struct {
	Now      time.Time     // the time to check exp and nbf against; needed
	Leeway   time.Duration // by which clocks may differ; not negative
	Issuer   string        // what iss has to be; anything when empty
	Subject  string        // what sub has to be; anything when empty
	Audience string        // what has to be in aud; anything when empty
	NoExpiry bool          // take a token that never expires
}

// VerifyCWT checks the signature with a key that the caller believes, and then the claims. Errors wrap [ErrVerification],
// [ErrExpired], [ErrNotYetValid], [ErrClaims] or one of the format.
func (s *Signed) VerifyCWT(public crypto.PublicKey, e Expect) (*Claims, error) {
	payload, err := s.Verify(public, nil)
	if err != nil {
		return nil, err
	}
	c, err := decodeClaims(payload)
	if err != nil {
		return nil, err
	}
	if err := c.check(e); err != nil {
		return nil, err
	}
	return c, nil
}

func (c *Claims) check(e Expect) error {
	switch {
	case e.Now.IsZero() || e.Leeway < 0:
		return fmt.Errorf("%w: no time to check against", ErrFormat)
	case c.Expires.IsZero() && !e.NoExpiry:
		return fmt.Errorf("%w: it says no time of expiry", ErrExpired)
	case !c.Expires.IsZero() && !e.Now.Add(-e.Leeway).Before(c.Expires):
		return fmt.Errorf("%w at %s", ErrExpired, c.Expires.Format(time.RFC3339))
	case !c.NotBefore.IsZero() && e.Now.Add(e.Leeway).Before(c.NotBefore):
		return fmt.Errorf("%w, but at %s", ErrNotYetValid, c.NotBefore.Format(time.RFC3339))
	case e.Issuer != "" && c.Issuer != e.Issuer:
		return fmt.Errorf("%w: issuer %.80q", ErrClaims, c.Issuer)
	case e.Subject != "" && c.Subject != e.Subject:
		return fmt.Errorf("%w: subject %.80q", ErrClaims, c.Subject)
	case e.Audience != "" && !slices.Contains(c.Audience, e.Audience):
		return fmt.Errorf("%w: audience %.80q", ErrClaims, c.Audience)
	}
	return nil
}

// encode returns the claims as CBOR that can be read again.
func (c *Claims) encode() ([]byte, error) {
	m := make(map[any]any)
	for _, f := range []struct {
		label int64
		value string
	}{{claimIssuer, c.Issuer}, {claimSubject, c.Subject}} {
		if f.value != "" {
			m[f.label] = f.value
		}
	}
	switch len(c.Audience) {
	case 0:
	case 1:
		m[claimAudience] = c.Audience[0]
	default:
		m[claimAudience] = c.Audience
	}
	for _, f := range []struct {
		label int64
		value time.Time
	}{{claimExpires, c.Expires}, {claimNotBefore, c.NotBefore}, {claimIssuedAt, c.IssuedAt}} {
		if !f.value.IsZero() {
			m[f.label] = f.value.Unix()
		}
	}
	for _, f := range []struct {
		label int64
		value []byte
	}{{claimID, c.ID}, {claimIdentity, c.Identity}} {
		if len(f.value) > 0 {
			m[f.label] = f.value
		}
	}
	if err := addRest(m, c.Extra, registered, "claim"); err != nil {
		return nil, err
	}
	b, err := encoder.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("%w: claims: %w", ErrFormat, err)
	}
	if _, err := decodeClaims(b); err != nil {
		return nil, err
	}
	return b, nil
}

func decodeClaims(b []byte) (*Claims, error) {
	if len(b) > MaxClaims {
		return nil, fmt.Errorf("%w: claims of %d bytes, at most %d", ErrTooLarge, len(b), MaxClaims)
	}
	m, err := decodeMap(b, "claims")
	if err != nil {
		return nil, err
	}
	c := &Claims{}
	text := func(to *string, name string) func([]byte) error {
		return func(raw []byte) (err error) { *to, err = decodeText(raw, name); return err }
	}
	date := func(to *time.Time, name string) func([]byte) error {
		return func(raw []byte) (err error) { *to, err = decodeDate(raw, name); return err }
	}
	bstr := func(to *[]byte, name string) func([]byte) error {
		return func(raw []byte) (err error) { *to, err = decodeBytes(raw, name); return err }
	}
	for _, f := range []struct {
		label int64
		parse func(raw []byte) error
	}{
		{claimIssuer, text(&c.Issuer, "iss")}, {claimSubject, text(&c.Subject, "sub")}, {claimAudience, c.parseAudience},
		{claimExpires, date(&c.Expires, "exp")}, {claimNotBefore, date(&c.NotBefore, "nbf")}, {claimIssuedAt, date(&c.IssuedAt, "iat")},
		{claimID, bstr(&c.ID, "cti")}, {claimIdentity, bstr(&c.Identity, "claim 169")},
	} {
		raw, ok := m[f.label]
		if !ok || f.label == claimIdentity && !isMajor(raw, majorBytes) {
			continue
		}
		delete(m, f.label)
		if err := f.parse(raw); err != nil {
			return nil, err
		}
	}
	c.Extra, err = decodeRest(m, "claim")
	return c, err
}

// parseAudience reads one text or an array of them.
func (c *Claims) parseAudience(raw []byte) error {
	list := []cbor.RawMessage{raw}
	if isMajor(raw, majorArray) {
		list = nil
		if err := decode(raw, &list, "aud"); err != nil {
			return err
		}
	}
	for _, item := range list {
		s, err := decodeText(item, "aud")
		if err != nil {
			return err
		}
		c.Audience = append(c.Audience, s)
	}
	return nil
}

// decodeDate reads a NumericDate: seconds since 1970, whole or not, and without the tag (RFC 8392 section 2).
func decodeDate(raw []byte, name string) (time.Time, error) {
	var v any
	if err := decode(raw, &v, name); err != nil {
		return time.Time{}, err
	}
	return numericDate(v, name)
}

func numericDate(v any, name string) (time.Time, error) {
	switch n := v.(type) {
	case int64:
		if n >= 0 && n <= latest {
			return time.Unix(n, 0).UTC(), nil
		}
	case float64:
		if n >= 0 && n <= latest {
			whole, fraction := math.Modf(n)
			return time.Unix(int64(whole), int64(fraction*1e9)).UTC(), nil
		}
	}
	return time.Time{}, fmt.Errorf("%w: %s is no time in seconds since 1970", ErrFormat, name)
}

// ClaimsFromJSON returns the claims that a JSON object has. The members iss, sub, aud, exp, nbf, iat and cti become the claims of
// these names. Of the others, those whose name is an integer of 32 bits in plain decimal become claims under that number, and all
// others claims under their name; texts stay texts, even those of digits alone.
func ClaimsFromJSON(b []byte) (*Claims, error) {
	if len(b) > MaxClaims {
		return nil, fmt.Errorf("%w: claims of %d bytes, at most %d", ErrTooLarge, len(b), MaxClaims)
	}
	if err := jose.CheckJSON(b); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrFormat, err)
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	var m map[string]any
	if err := d.Decode(&m); err != nil {
		return nil, fmt.Errorf("%w: claims: %w", ErrFormat, err)
	}
	c := &Claims{}
	for name, v := range m {
		v, err := fromJSON(v)
		if err != nil {
			return nil, err
		}
		if err := c.setJSON(name, v); err != nil {
			return nil, err
		}
	}
	return c, nil
}

// setJSON sets the claim of a member.
func (c *Claims) setJSON(name string, v any) (err error) {
	text, isText := v.(string)
	switch name {
	case "iss":
		c.Issuer = text
	case "sub":
		c.Subject = text
	case "cti":
		c.ID = []byte(text)
	case "aud":
		list, isList := v.([]any)
		if !isList {
			list = []any{v}
		}
		for _, item := range list {
			if text, isText = item.(string); !isText {
				break
			}
			c.Audience = append(c.Audience, text)
		}
	case "exp":
		c.Expires, err = numericDate(v, name)
		return err
	case "nbf":
		c.NotBefore, err = numericDate(v, name)
		return err
	case "iat":
		c.IssuedAt, err = numericDate(v, name)
		return err
	default:
		var label any = name
		if n, err := strconv.ParseInt(name, 10, 32); err == nil && strconv.FormatInt(n, 10) == name {
			if slices.Contains(registered, n) {
				return fmt.Errorf("%w: claim %d has to be given by its name", ErrFormat, n)
			}
			label = n
		}
		if c.Extra == nil {
			c.Extra = make(map[any]any)
		}
		c.Extra[label] = v
		return nil
	}
	if !isText {
		return fmt.Errorf("%w: claim %s is no text", ErrFormat, name)
	}
	return nil
}

// fromJSON turns the numbers in a value into int64 or float64.
func fromJSON(v any) (any, error) {
	var err error
	switch t := v.(type) {
	case json.Number:
		if n, err := t.Int64(); err == nil {
			return n, nil
		}
		f, err := t.Float64()
		if err != nil || f == math.Trunc(f) && math.Abs(f) > 1<<53 {
			return nil, fmt.Errorf("%w: number %s is out of range", ErrFormat, t)
		}
		return f, nil
	case []any:
		for i := range t {
			if t[i], err = fromJSON(t[i]); err != nil {
				return nil, err
			}
		}
	case map[string]any:
		for name := range t {
			if t[name], err = fromJSON(t[name]); err != nil {
				return nil, err
			}
		}
	}
	return v, nil
}
