package cose

import (
	"bytes"
	"encoding/hex"
	"errors"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/client/jose"
)

// TestClaims writes and reads claims of every kind.
func TestClaims(t *testing.T) {
	k := keyHolder{p256(t)}
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	c := &Claims{
		Issuer: "https://mosip.example", Subject: "sub", Audience: []string{"a", "b"}, Expires: now.Add(180 * 24 * time.Hour), NotBefore: now, IssuedAt: now,
		ID: []byte("5d7f"), Identity: unhex(t, "a2016131024161"),
		Extra: map[any]any{int64(500): "0012", "name": []any{"x", int64(-3), 1.5, true, nil, map[any]any{"k": []byte{1}}}},
	}
	token, err := SignCWT(t.Context(), k, c, SignOptions{Algorithm: jose.ES256, Protected: Header{KeyID: []byte("kid")}})
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(EncodeHex(token), "d83dd284") || !strings.Contains(EncodeHex(token), "18a947a2016131024161") {
		t.Errorf("%x", token)
	}
	s, err := ParseCWT(token)
	if err != nil {
		t.Fatal(err)
	}
	got, err := s.VerifyCWT(k.key.Public(), Expect{Now: now})
	if err != nil || !reflect.DeepEqual(got, c) {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := s.VerifyCWT(p256(t).Public(), Expect{Now: now}); !errors.Is(err, ErrVerification) {
		t.Errorf("another key: %v", err)
	}
	if _, err := Parse(token); !errors.Is(err, ErrFormat) {
		t.Errorf("a token as a message: %v", err)
	}
	for _, prefix := range []string{"d83dd83d", "d83c", "db000000000000003d"} {
		if _, err := ParseCWT(append(unhex(t, prefix), token[2:]...)); !errors.Is(err, ErrFormat) {
			t.Errorf("tags %s: %v", prefix, err)
		}
	}
	if _, err := ParseCWT(token[3:]); !errors.Is(err, ErrFormat) {
		t.Errorf("without tags: %v", err)
	}
	if _, err := SignCWT(t.Context(), k, c, SignOptions{Algorithm: jose.ES256, Detached: true}); !errors.Is(err, ErrUnsupported) {
		t.Errorf("detached: %v", err)
	}
	detached, err := Sign(t.Context(), k, nil, SignOptions{Algorithm: jose.ES256, Detached: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ParseCWT(detached); !errors.Is(err, ErrFormat) {
		t.Errorf("detached: %v", err)
	}
}

// TestExpect moves the clock over the bounds of a token.
func TestExpect(t *testing.T) {
	k := keyHolder{p256(t)}
	from := time.Unix(1800000000, 0)
	to := from.Add(time.Hour)
	sign := func(c *Claims) *Signed {
		t.Helper()
		token, err := SignCWT(t.Context(), k, c, SignOptions{Algorithm: jose.ES256})
		if err != nil {
			t.Fatal(err)
		}
		s, err := ParseCWT(token)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	both := sign(&Claims{Issuer: "i", Subject: "s", Audience: []string{"a", "b"}, NotBefore: from, Expires: to})
	never := sign(&Claims{NotBefore: from})
	for i, v := range []struct {
		s   *Signed
		e   Expect
		err error
	}{
		{both, Expect{Now: from.Add(-time.Nanosecond)}, ErrNotYetValid},
		{both, Expect{Now: from}, nil},
		{both, Expect{Now: to.Add(-time.Nanosecond)}, nil},
		{both, Expect{Now: to}, ErrExpired},
		{both, Expect{Now: from.Add(-time.Minute), Leeway: time.Minute}, nil},
		{both, Expect{Now: from.Add(-time.Minute - 1), Leeway: time.Minute}, ErrNotYetValid},
		{both, Expect{Now: to.Add(time.Minute - 1), Leeway: time.Minute}, nil},
		{both, Expect{Now: to.Add(time.Minute), Leeway: time.Minute}, ErrExpired},
		{both, Expect{}, ErrFormat},
		{both, Expect{Now: from, Leeway: -1}, ErrFormat},
		{both, Expect{Now: from, Issuer: "i", Subject: "s", Audience: "b"}, nil},
		{both, Expect{Now: from, Issuer: "I"}, ErrClaims},
		{both, Expect{Now: from, Subject: "S"}, ErrClaims},
		{both, Expect{Now: from, Audience: "c"}, ErrClaims},
		{never, Expect{Now: to}, ErrExpired},
		{never, Expect{Now: to, NoExpiry: true}, nil},
		{never, Expect{Now: to, NoExpiry: true, Issuer: "i"}, ErrClaims},
		{never, Expect{Now: to, NoExpiry: true, Audience: "a"}, ErrClaims},
		{never, Expect{Now: from.Add(-1), NoExpiry: true}, ErrNotYetValid},
	} {
		c, err := v.s.VerifyCWT(k.key.Public(), v.e)
		if !errors.Is(err, v.err) || (c == nil) != (v.err != nil) {
			t.Errorf("%d: %+v, %v", i, c, err)
		}
	}
}

// TestForeignClaims reads what others write: dates with fractions, one audience in an array, claim 169 as a map.
func TestForeignClaims(t *testing.T) {
	c, err := decodeClaims(unhex(t, "a5"+"03816161"+"04fb41da534a80200000"+"05f97bff"+"074100"+"18a9a1016131"))
	if err != nil {
		t.Fatal(err)
	}
	want := &Claims{Audience: []string{"a"}, Expires: time.Unix(1766664704, 500e6).UTC(), NotBefore: time.Unix(65504, 0).UTC(), ID: []byte{0},
		Extra: map[any]any{int64(169): map[any]any{int64(1): "1"}}}
	if !reflect.DeepEqual(c, want) {
		t.Errorf("%+v, want %+v", c, want)
	}
	for _, v := range []struct {
		name, claims string
		err          error
	}{
		{"empty", "a0", nil},
		{"no map", "80", ErrFormat},
		{"text, as MOSIP once wrote what was no JSON", "6161", ErrFormat},
		{"null", "f6", ErrFormat},
		{"two", "a0a0", ErrFormat},
		{"indefinite length", "bf016161ff", ErrFormat},
		{"iss twice", "a2016161016162", ErrFormat},
		{"iss is bytes", "a1014161", ErrFormat},
		{"iss is null", "a101f6", ErrFormat},
		{"aud is a number", "a10301", ErrFormat},
		{"aud of numbers", "a1038101", ErrFormat},
		{"aud in aud", "a10381816161", ErrFormat},
		{"exp with a tag", "a104c100", ErrUnsupported},
		{"exp is text", "a1046130", ErrFormat},
		{"exp is negative", "a10420", ErrFormat},
		{"exp after the year 9999", "a1041b0000003afff44180", ErrFormat},
		{"exp beyond 63 bits", "a1041bffffffffffffffff", ErrFormat},
		{"exp is not a number", "a104f97e00", ErrFormat},
		{"exp is infinite", "a104f97c00", ErrFormat},
		{"exp is null", "a104f6", ErrFormat},
		{"nbf is a truth", "a105f5", ErrFormat},
		{"cti is text", "a1076161", ErrFormat},
		{"a date in a further claim", "a10ac100", ErrUnsupported},
		{"key twice in a further claim", "a10aa200000000", ErrFormat},
	} {
		if _, err := decodeClaims(unhex(t, v.claims)); !errors.Is(err, v.err) {
			t.Errorf("%s: %v", v.name, err)
		}
	}
	if _, err := decodeClaims(make([]byte, MaxClaims+1)); !errors.Is(err, ErrTooLarge) {
		t.Error(err)
	}
}

func TestClaimsRefused(t *testing.T) {
	k := keyHolder{p256(t)}
	for i, c := range []*Claims{
		{Expires: time.Unix(-1, 0)},
		{Expires: time.Unix(latest+1, 0)},
		{Issuer: "\xff"},
		{Extra: map[any]any{int64(4): int64(1)}},
		{Extra: map[any]any{4: 1}},
		{Extra: map[any]any{true: 1}},
		{Identity: []byte{1}, Extra: map[any]any{169: "x"}},
		{Audience: []string{"a", "\xff"}},
	} {
		if _, err := SignCWT(t.Context(), k, c, SignOptions{Algorithm: jose.ES256}); !errors.Is(err, ErrFormat) {
			t.Errorf("%d: %v", i, err)
		}
	}
	if _, err := SignCWT(t.Context(), k, &Claims{Identity: make([]byte, MaxClaims)}, SignOptions{Algorithm: jose.ES256}); !errors.Is(err, ErrTooLarge) {
		t.Error(err)
	}
}

func TestClaimsFromJSON(t *testing.T) {
	c, err := ClaimsFromJSON([]byte(`{"iss":"i","sub":"s","aud":["a","b"],"exp":1800000000,"nbf":1700000000.5,"iat":0,"cti":"id","169":{"1":"x"},"-70001":7,
		"007":"seven","+8":1,"4294967296":2,"phone":"0123","nested":{"n":[1,1.5,1e3,null,true,"é"]},"big":9223372036854775807}`))
	if err != nil {
		t.Fatal(err)
	}
	want := &Claims{Issuer: "i", Subject: "s", Audience: []string{"a", "b"}, Expires: time.Unix(1800000000, 0).UTC(), NotBefore: time.Unix(1700000000, 500e6).UTC(),
		IssuedAt: time.Unix(0, 0).UTC(), ID: []byte("id"), Extra: map[any]any{int64(169): map[string]any{"1": "x"}, int64(-70001): int64(7), "007": "seven", "+8": int64(1),
			"4294967296": int64(2), "phone": "0123", "nested": map[string]any{"n": []any{int64(1), 1.5, 1000.0, nil, true, "é"}}, "big": int64(9223372036854775807)}}
	if !reflect.DeepEqual(c, want) {
		t.Errorf("%+v", c)
	}
	b, err := c.encode()
	if err != nil {
		t.Fatal(err)
	}
	got, err := decodeClaims(b)
	if err != nil || got.Extra["phone"] != "0123" || !reflect.DeepEqual(got.Extra[int64(169)], map[any]any{"1": "x"}) || got.NotBefore.Unix() != 1700000000 {
		t.Errorf("%+v, %v", got, err)
	}
	if c, err := ClaimsFromJSON([]byte(`{"aud":"a"}`)); err != nil || len(c.Audience) != 1 {
		t.Errorf("%+v, %v", c, err)
	}
	for _, text := range []string{
		``, `[]`, `{`, `{} {}`, `null`, `"text"`, `{"a":1,"a":2}`, `{"x":{"a":1,"a":2}}`, `{"iss":1}`, `{"sub":null}`, `{"cti":[]}`, `{"aud":1}`, `{"aud":["a",1]}`, `{"aud":{}}`,
		`{"exp":"1"}`, `{"exp":-1}`, `{"nbf":1e300}`, `{"iat":null}`, `{"4":1}`, `{"1":"iss"}`, `{"x":9223372036854775808}`, `{"x":1e400}`, `{"x":[-1e30]}`,
		`{"x":` + strings.Repeat("[", 40) + strings.Repeat("]", 40) + `}`,
	} {
		if c, err := ClaimsFromJSON([]byte(text)); !errors.Is(err, ErrFormat) {
			t.Errorf("%s: %+v, %v", text, c, err)
		}
	}
	if _, err := ClaimsFromJSON(bytes.Repeat([]byte{' '}, MaxClaims+1)); !errors.Is(err, ErrTooLarge) {
		t.Error(err)
	}
}

func FuzzClaims(f *testing.F) {
	for _, seed := range []string{"a0", "a1014161", "a30161610441006161f6", "a104fb41da5326c0200000", "a118a9a1016131", "a1038261616162"} {
		b, err := hex.DecodeString(seed)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := decodeClaims(b)
		if err != nil {
			return
		}
		_ = c.check(Expect{Now: time.Unix(1, 0), Issuer: "i", Audience: "a"})
		again, err := c.encode()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := decodeClaims(again); err != nil {
			t.Fatal(err)
		}
	})
}

func FuzzClaimsFromJSON(f *testing.F) {
	f.Add([]byte(`{"iss":"i","aud":["a"],"exp":1.5,"169":{"1":"x"}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := ClaimsFromJSON(b)
		if err != nil {
			return
		}
		if e, err := c.encode(); err == nil {
			if _, err := decodeClaims(e); err != nil {
				t.Fatal(err)
			}
		}
	})
}
