package main

import (
	"os"
	"slices"
	"testing"
)

func TestHelperUsers(t *testing.T) {
	for _, test := range []struct {
		keyring, pkcs11 string
		want            []uint32
	}{
		{"0", "4711", []uint32{0, 4711}},
		{"root", "no-such-user-of-kmsd", []uint32{0}}, // a helper that is not installed
		{"no-such-user-of-kmsd", "no-such-user-of-kmsd", nil},
	} {
		c := helperConfig{KeyringUser: test.keyring, PKCS11User: test.pkcs11}
		if got, err := c.uids(); err != nil || !slices.Equal(got, test.want) {
			t.Errorf("%q and %q are %v, error %v", test.keyring, test.pkcs11, got, err)
		}
	}
}

// With sockets no process is started: there is nothing that could start one later.
func TestSocketsStartNothing(t *testing.T) {
	c := config{Mode: modeSystem}
	if err := c.setDefaults(os.Getenv); err != nil {
		t.Fatal(err)
	}
	h, err := openHelpers(c)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	if h.spawner != nil || h.keyringState == c.StateDir {
		t.Errorf("%+v", h)
	}
}
