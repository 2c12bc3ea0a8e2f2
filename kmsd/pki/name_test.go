package pki

import (
	"encoding/hex"
	"errors"
	"strings"
	"testing"
)

func TestParseName(t *testing.T) {
	for _, c := range []struct{ text, der, back string }{
		{"", "3000", ""},
		{"CN=a", "300c310a300806035504030c0161", "CN=a"},
		{"cn=a", "300c310a300806035504030c0161", "CN=a"},
		{"2.5.4.3=#0c0161", "300c310a300806035504030c0161", "CN=a"},
		{"CN=a,C=IN", "3019310b300906035504061302494e310a300806035504030c0161", "CN=a,C=IN"},
		{"CN=a, C=IN", "3019310b300906035504061302494e310a300806035504030c0161", "CN=a,C=IN"},
		{"C=IN,CN=a", "3019310a300806035504030c0161310b300906035504061302494e", "C=IN,CN=a"},
		{"CN=a+O=b", "30163114300806035504030c01613008060355040a0c0162", "CN=a+O=b"},
		{"O=b+CN=a", "30163114300806035504030c01613008060355040a0c0162", "CN=a+O=b"},
		{`CN=\C3\A9`, "300d310b300906035504030c02c3a9", "CN=é"},
		{"CN=é", "300d310b300906035504030c02c3a9", "CN=é"},
		{`CN=\ a\ `, "300e310c300a06035504030c03206120", `CN=\ a\ `},
		{`CN=\#a`, "300d310b300906035504030c022361", `CN=\#a`},
		{`CN=a#`, "300d310b300906035504030c026123", `CN=a#`},
		{`CN=\,\+\"\\\<\>\;\=`, "30133111300f06035504030c082c2b225c3c3e3b3d", `CN=\,\+\"\\\<\>\;=`},
		{"DC=a", "3013 3111 300f060a0992268993f22c640119160161", "DC=a"},
		{"1.2.3=#0500", "300a3108300606022a030500", "1.2.3=#0500"},
	} {
		raw, err := ParseName(c.text)
		if err != nil || hex.EncodeToString(raw) != strings.ReplaceAll(c.der, " ", "") {
			t.Errorf("%q: %x, %v", c.text, raw, err)
			continue
		}
		if back, err := FormatName(raw); err != nil || back != c.back {
			t.Errorf("%q: back to %q, %v", c.text, back, err)
		}
	}
}

func TestParseNameRefuses(t *testing.T) {
	for _, text := range []string{
		"CN", "=a", "CN=", "CN=a,", "CN=a, ", "CN=a,,O=b", ",CN=a", "CN=a+", "+CN=a", " ", "XX=a", "CN =a",
		"CN= a", "CN=a ,O=b", "CN=a ", `CN=a"b`, "CN=a;O=b", "CN=a<b", "CN=a>b", "CN=a\x00b", `CN=a\`, `CN=a\x`, `CN=a\4`, `CN=a\00b`, "CN=a\nb", `CN=a\0Ab`,
		`CN=\FF`, "CN=\xff", "CN=#", "CN=#0", "CN=#0c", "CN=#0c0161ff", "CN=#zz", "1.2.3=a", "1=#0500", "01.2.3=#0500", "1..2=#0500", "3.1=#0500", "1.-2=#0500",
		"1.99999999999999999999=#0500", "C=I", "C=IND", "C=I1", "C=\u00e9", "serialNumber=a_b", "serialNumber=\u00e9", "emailAddress=\u00e9", "DC=\u00e9", "CN=a+CN=b",
		"CN=" + strings.Repeat("a", maxValue+1), strings.Repeat("O=a,", MaxRDNs) + "O=a", strings.Repeat("CN=aaaaaa,", MaxName/10) + "CN=aaaaaaaaa",
	} {
		if raw, err := ParseName(text); !errors.Is(err, ErrName) {
			t.Errorf("%q is taken: %x, %v", text, raw, err)
		}
	}
	for _, bad := range []string{"", "00", "3001", "300000", "30023000", "0c0161"} {
		raw, _ := hex.DecodeString(bad)
		if text, err := FormatName(raw); !errors.Is(err, ErrName) {
			t.Errorf("%s is formatted: %q, %v", bad, text, err)
		}
	}
}

func TestSameName(t *testing.T) {
	name := func(text string) []byte {
		raw, err := ParseName(text)
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}
	for _, c := range []struct {
		a, b string
		same bool
	}{
		{"CN=a", "CN=a", true},
		{"CN=a", "CN=A", true},
		{"CN=a  b", "CN=A b", true},
		{"CN=a", "CN=#130161", true},
		{"CN=a", "CN=b", false},
		{"CN=a", "O=a", false},
		{"CN=a,O=b", "O=b,CN=a", false},
		{"CN=a+O=b", "CN=a,O=b", false},
		{"CN=a", "CN=a,O=b", false},
		{"CN=ab", "CN=a b", false},
		{"", "CN=a", false},
	} {
		if got := sameName(name(c.a), name(c.b)); got != c.same {
			t.Errorf("%q and %q: %v", c.a, c.b, got)
		}
	}
	if sameName([]byte("not a name"), name("CN=a")) {
		t.Error("rubbish equals a name")
	}
}
