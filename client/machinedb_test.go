package client

import (
	"bytes"
	"errors"
	"strings"
	"testing"
)

func TestMachineDatabase(t *testing.T) {
	d := NewMachineDatabase()
	if len(d.BootPassword) != 20 || len(d.User) != 10 || len(d.Password) != 20 || bytes.Equal(d.BootPassword, d.Password) {
		t.Errorf("%d, %d and %d characters", len(d.BootPassword), len(d.User), len(d.Password))
	}
	for _, bad := range []MachineDatabase{
		{}, {BootPassword: []byte("a"), User: []byte("b")},
		{BootPassword: []byte("a-BREAK-b"), User: []byte("c"), Password: []byte("d")},
		{BootPassword: []byte("a-BREAK"), User: []byte("-BREAK-"), Password: []byte("d")},
		{BootPassword: []byte("-BREAK-BREAK"), User: []byte("c"), Password: []byte("d")},
		{BootPassword: []byte("a\xff"), User: []byte("c"), Password: []byte("d")},
		{BootPassword: bytes.Repeat([]byte("a"), 180), User: []byte("c"), Password: []byte("d")},
	} {
		if text, err := bad.marshal(); !errors.Is(err, ErrInvalid) {
			t.Errorf("%q: %v", text, err)
		}
	}
	for _, bad := range []string{"", "a-BREAK-b-BREAK-c", "a-BREAK-b-BREAK-c-BREAK-2", "a-BREAK-b-BREAK-c-BREAK-01", "a-BREAK--BREAK-c-BREAK-0",
		"a-BREAK-b-BREAK-c-BREAK-0-BREAK-1", "a-BREAK-b-BREAK-c-BREAK-", "\xff-BREAK-b-BREAK-c-BREAK-0", strings.Repeat("a", 200) + "-BREAK-b-BREAK-c-BREAK-0"} {
		if d, err := parseMachineDatabase([]byte(bad)); err == nil {
			t.Errorf("%q became %+v", bad, d)
		}
	}
	d.Wipe()
	if !bytes.Equal(d.BootPassword, make([]byte, 20)) {
		t.Error("a wiped password is still there")
	}
}

// FuzzMachineDatabase checks that what is read is written as it was.
func FuzzMachineDatabase(f *testing.F) {
	f.Add([]byte("Boot0123456789abcdef-BREAK-User012345-BREAK-Pass0123456789abcdef-BREAK-1"))
	f.Add([]byte("-BREAK-BREAK--BREAK-a-BREAK-b-BREAK-0"))
	f.Fuzz(func(t *testing.T, text []byte) {
		d, err := parseMachineDatabase(text)
		if err != nil {
			return
		}
		again, err := d.marshal()
		if err != nil || !bytes.Equal(again, text) {
			t.Fatalf("%q became %q, %v", text, again, err)
		}
	})
}
