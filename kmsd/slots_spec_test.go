package main

import (
	"errors"
	"strings"
	"testing"

	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

func TestSpecs(t *testing.T) {
	for _, test := range []struct{ text, kind, place, location string }{
		{"tpm:/dev/tpmrm0", "tpm", "/dev/tpmrm0", "tpm:/dev/tpmrm0"},
		{"tpm:unix:/run/swtpm/sock", "tpm", "unix:/run/swtpm/sock", "tpm:unix:/run/swtpm/sock"},
		{"tpm:/dev/tpmrm0?guard=agreed&pcrs=7,11", "tpm", "/dev/tpmrm0", "tpm:/dev/tpmrm0"},
		{"tpm:/dev/tpmrm0?signer=/etc/kmsd/pcr.pem&approvals=/run/a.json", "tpm", "/dev/tpmrm0", "tpm:/dev/tpmrm0?approvals=/run/a.json"},
		{"pkcs11:/usr/lib/softhsm/libsofthsm2.so?token=my%20token+1", "pkcs11", "",
			"pkcs11:/usr/lib/softhsm/libsofthsm2.so?token=my+token+1"},
		{"pkcs11:/m.so?token=a%26b&serial=01", "pkcs11", "", "pkcs11:/m.so?serial=01&token=a%26b"},
		{"keyring:file", "keyring:file", "", "keyring:file"},
		{"keyring:secret-service", "keyring:secret-service", "", "keyring:secret-service"},
		{"keyfile:/media/key/kmsd.key", "keyfile", "/media/key/kmsd.key", "keyfile:/media/key/kmsd.key"},
		{"recovery", "recovery", "", "recovery"},
	} {
		s, err := parseSpec(test.text)
		if err != nil || s.kind != test.kind || s.place != test.place || s.location() != test.location {
			t.Errorf("%s: %+v, location %s, %v", test.text, s, s.location(), err)
		}
	}
	for _, text := range []string{
		"", "what", "tpm", "tpm:", "tpm:tpmrm0", "tpm:/dev/../dev/tpmrm0", "tpm:unix:sock", "tpm:/dev/tpmrm0?guard", "tpm:/dev/tpmrm0?guard=", "tpm:/dev/tpmrm0?pin=1234",
		"tpm:/dev/tpmrm0?guard=agreed&guard=sealed", "pkcs11:/m.so?token=%zz", "pkcs11:/m.so?token=%00", "pkcs11:m.so?token=x", "keyring", "keyring:file:/x", "keyring:file?x=y",
		"recovery:/x", "recovery:shares", "keyfile:key", "keyfile:/a\nb", "keyfile:/" + strings.Repeat("a", keyspec.MaxLocation), strings.Repeat("a", proto.MaxSpec+1),
	} {
		if s, err := parseSpec(text); !errors.Is(err, errSpec) {
			t.Errorf("%.60q is understood as %+v: %v", text, s, err)
		}
	}
}

// The location of what is understood is understood, and is its own location.
func FuzzSpec(f *testing.F) {
	f.Add("tpm:unix:/run/sock?guard=agreed&pcrs=7&signer=/a%20b.pem&approvals=/c")
	f.Add("pkcs11:/usr/lib/x.so?token=a%25%26b&serial=0")
	f.Add("keyfile:/media/stick/key")
	f.Add("keyring:file")
	f.Fuzz(func(t *testing.T, text string) {
		s, err := parseSpec(text)
		if err != nil {
			return
		}
		l, err := parseSpec(s.location())
		if err != nil || l.location() != s.location() || l.kind != s.kind || len(s.location()) > keyspec.MaxLocation {
			t.Fatalf("location %q of %q: %+v, %v", s.location(), text, l, err)
		}
	})
}
