package pki

import (
	"bytes"
	"errors"
	"strings"
	"testing"
)

func TestEditName(t *testing.T) {
	for _, c := range []struct {
		from string
		set  []Attribute
		want string // empty: ErrName
	}{
		{"", []Attribute{{"C", "IN"}, {"O", "Example, Ltd"}, {"CN", "a+b"}}, `CN=a\+b,O=Example\, Ltd,C=IN`},
		{"CN=old,O=Example,C=IN", []Attribute{{"CN", "new"}}, "CN=new,O=Example,C=IN"},
		{"CN=old,O=Example", []Attribute{{"C", "IN"}, {"ST", "KA"}, {"O", "Other"}, {"CN", "old"}}, "CN=old,O=Other,ST=KA,C=IN"},
		{"CN=old,O=Example,C=IN", []Attribute{{"C", "IN"}, {"O", ""}, {"OU", "U"}, {"CN", "old"}}, "CN=old,OU=U,C=IN"},
		{"CN=b,OU=2,CN=a,OU=1,C=IN", []Attribute{{"OU", ""}, {"CN", "x"}}, "CN=x,C=IN"},
		{"CN=c,OU=2,CN=b,OU=1,CN=a", []Attribute{{"OU", "3"}, {"CN", "x"}}, "OU=3,CN=x"},
		{"DC=example,CN=x", []Attribute{{"CN", "y"}}, "DC=example,CN=y"},
		{"CN=x", []Attribute{{"C", "ü"}}, ""},
		{"CN=x", []Attribute{{"CN", "a\x00b"}}, ""},
		{"CN=x", []Attribute{{"nonsense", "a"}}, ""},
		{"CN=x", []Attribute{{"1.2.3", "a"}}, ""},
		{"CN=x", []Attribute{{"CN", strings.Repeat("x", 300)}}, ""},
	} {
		raw, err := ParseName(c.from)
		if err != nil {
			t.Fatal(err)
		}
		edited, err := EditName(raw, c.set)
		if c.want == "" {
			if !errors.Is(err, ErrName) {
				t.Errorf("%v: %v", c.set, err)
			}
			continue
		}
		got, formatErr := FormatName(edited)
		if err != nil || formatErr != nil || got != c.want {
			t.Errorf("%q with %v: %q, %v, %v: want %q", c.from, c.set, got, err, formatErr, c.want)
		}
	}
	// An organisation that another authority wrote as a PrintableString stays one.
	printable := []byte{0x30, 0x1c, 0x31, 0x0c, 0x30, 0x0a, 0x06, 3, 0x55, 4, 0x0a, 0x13, 3, 'a', 'b', 'c', 0x31, 0x0c, 0x30, 0x0a, 0x06, 3, 0x55, 4, 3, 0x0c, 3, 'o', 'l', 'd'}
	edited, err := EditName(printable, []Attribute{{"CN", "new"}})
	if err != nil || !bytes.Equal(edited, bytes.Replace(printable, []byte("old"), []byte("new"), 1)) {
		t.Errorf("%x, %v", edited, err)
	}
	if _, err := EditName([]byte{1, 2}, nil); !errors.Is(err, ErrName) {
		t.Errorf("no name: %v", err)
	}
}
