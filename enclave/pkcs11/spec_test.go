package pkcs11_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/enclave/pkcs11"
)

func TestParseSpec(t *testing.T) {
	for text, want := range map[string]pkcs11.Spec{
		"pkcs11:/usr/lib/m.so?token=A":                              {Module: "/usr/lib/m.so", Token: "A"},
		"pkcs11:/usr/lib/m.so?serial=00ff":                          {Module: "/usr/lib/m.so", Serial: "00ff"},
		"pkcs11:/usr/lib/m.so?token=a%20b%26c&guard=agreed":         {Module: "/usr/lib/m.so", Token: "a b&c", Guard: pkcs11.Agreed},
		"pkcs11:/m.so?token=A&serial=1&guard=wrapped&final-try=yes": {Module: "/m.so", Token: "A", Serial: "1", Guard: pkcs11.Wrapped, FinalTry: true},
		"pkcs11:/m.so?final-try=no&token=A":                         {Module: "/m.so", Token: "A"},
	} {
		s, err := pkcs11.ParseSpec(text)
		if err != nil || s != want {
			t.Errorf("%s: %+v, %v", text, s, err)
		}
		again, err := pkcs11.ParseSpec(s.Location())
		s.Guard, s.FinalTry = "", false
		if err != nil || again != s {
			t.Errorf("%s, location %s: %+v, %v", text, s.Location(), again, err)
		}
	}
	for _, text := range []string{"", "pkcs11:", "pkcs11:/m.so", "pkcs11:/m.so?", "tpm:/m.so?token=A", "pkcs11:m.so?token=A", "pkcs11:../m.so?token=A", "pkcs11:/a/../m.so?token=A",
		"pkcs11:?token=A", "pkcs11:/m.so?token=", "pkcs11:/m.so?token=A&token=B", "pkcs11:/m.so?token=A&pin=1234", "pkcs11:/m.so?token=A&module=/n.so", "pkcs11:/m.so?token=A&guard=none",
		"pkcs11:/m.so?token=A&final-try=maybe", "pkcs11:/m.so?token=%zz", "pkcs11:/m.so?token=A;serial=1", "pkcs11:/m.so?token=A%00", "pkcs11:/m.so?serial=12345678901234567",
		"pkcs11:/m.so?token=" + strings.Repeat("x", 33), "pkcs11:/" + strings.Repeat("x", 1024) + "?token=A"} {
		if s, err := pkcs11.ParseSpec(text); !errors.Is(err, enclave.ErrMisconfigured) {
			t.Errorf("%.60q: %+v, %v", text, s, err)
		}
	}
}

func FuzzParseSpec(f *testing.F) {
	f.Add("pkcs11:/usr/lib/m.so?token=a%20b&serial=1&guard=agreed&final-try=yes")
	f.Add("pkcs11:/?token=%00")
	f.Fuzz(func(t *testing.T, text string) {
		s, err := pkcs11.ParseSpec(text)
		if err != nil {
			if !errors.Is(err, enclave.ErrMisconfigured) {
				t.Fatalf("error %v", err)
			}
			return
		}
		again, err := pkcs11.ParseSpec(s.Location())
		s.Guard, s.FinalTry = "", false
		if err != nil || again != s {
			t.Fatalf("%q becomes %q: %+v, %v", text, s.Location(), again, err)
		}
	})
}
