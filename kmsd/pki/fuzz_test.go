package pki

import (
	"bytes"
	"testing"
)

// FuzzParseName: a name that parses has a text, and the text is the fixed point.
func FuzzParseName(f *testing.F) {
	for _, text := range []string{"", "CN=a,O=b+OU=c,C=IN", `CN=\,\C3\A9\ `, "1.2.3=#0500", "CN=#130161", "DC=a,emailAddress=b@c"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		raw, err := ParseName(text)
		if err != nil {
			return
		}
		one, err := FormatName(raw)
		if err != nil {
			t.Fatalf("%q gives %x without a text: %v", text, raw, err)
		}
		again, err := ParseName(one)
		if err != nil {
			if len(one) > MaxName {
				return // hexadecimal can be longer than what it stands for
			}
			t.Fatalf("%q does not parse: %v", one, err)
		}
		if two, err := FormatName(again); err != nil || two != one {
			t.Fatalf("%q becomes %q: %v", one, two, err)
		}
		if !sameName(raw, again) {
			t.Fatalf("%x and %x are different names", raw, again)
		}
	})
}

// FuzzFormatName: the DER of a name may come from any certificate.
func FuzzFormatName(f *testing.F) {
	for _, name := range []string{"root", "base"} {
		f.Add(mosip(f, name).RawSubject)
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		text, err := FormatName(raw)
		if err != nil || len(text) > MaxName {
			return
		}
		if _, err := ParseName(text); err != nil {
			rdns, _ := parseRDNs(raw)
			if len(rdns) <= MaxRDNs && sensible(rdns) {
				t.Fatalf("%x is %q, which does not parse: %v", raw, text, err)
			}
		}
		sameName(raw, emptyName)
	})
}

// sensible reports names that ParseName can express: no empty RDN, no attribute type twice in one, no long values.
func sensible(rdns []rdnSET) bool {
	total := 0
	for _, rdn := range rdns {
		seen := map[string]bool{}
		for _, a := range rdn {
			total++
			if seen[a.Type.String()] || len(a.Value.FullBytes) > maxValue || len(a.Type) < 2 {
				return false
			}
			seen[a.Type.String()] = true
		}
		if len(rdn) == 0 {
			return false
		}
	}
	return total <= MaxRDNs
}

// FuzzParseChain: whatever parses is a linked chain that Check can judge.
func FuzzParseChain(f *testing.F) {
	chain := toPEM(mosip(f, "base"), mosip(f, "module"), mosip(f, "root"))
	f.Add(chain)
	f.Add(mosip(f, "ed25519").Raw)
	f.Add(root(f, "secp256k1", tenYear).Raw)
	f.Add(bytes.ReplaceAll(chain, []byte("\n"), []byte("\r\n")))
	f.Fuzz(func(t *testing.T, data []byte) {
		parsed, err := ParseChain(data)
		if err != nil {
			return
		}
		if len(parsed) == 0 || len(parsed) > MaxChain {
			t.Fatalf("%d certificates", len(parsed))
		}
		for _, c := range parsed {
			FormatName(c.RawSubject)
		}
		if len(Check(parsed, nil, now)) == 0 {
			t.Fatal("valid without roots")
		}
	})
}

// FuzzParseRequest: a request that parses can be certified or is refused, without a panic.
func FuzzParseRequest(f *testing.F) {
	for _, key := range []string{"rsa", "p256", "secp256k1", "ed25519"} {
		der, err := Request(keys()[key], subject(f, "CN=a,O=b,C=IN", "a.example"))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(der)
		f.Add(pemRequest(der))
	}
	ca := root(f, "p256", tenYear)
	f.Fuzz(func(t *testing.T, data []byte) {
		request, err := ParseRequest(data)
		if err != nil {
			return
		}
		s, err := RequestSubject(request)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Issue(keys()["p256"], ca, request.PublicKey, s, oneYear); err != nil {
			t.Fatal(err)
		}
	})
}
