package tpm

import (
	"errors"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/kmsd-project/kmsd/enclave"
)

func TestCounter(t *testing.T) {
	s := startSimulator(t)
	d := s.open(Config{})
	id, other := [16]byte{1}, [16]byte{2}
	missing := func(id [16]byte) {
		t.Helper()
		if _, err := d.ReadCounter(limited(t), id); !errors.Is(err, enclave.ErrAbsent) || !errors.Is(err, ErrNoCounter) {
			t.Errorf("counter that was never made: %v", err)
		}
	}
	missing(id)
	last, err := d.IncrementCounter(limited(t), id)
	if err != nil {
		t.Fatal(err)
	}
	for range 5 {
		n, err := d.ReadCounter(limited(t), id)
		if err != nil || n != last {
			t.Fatalf("read %d, %v after %d", n, err, last)
		}
		if n, err = d.IncrementCounter(limited(t), id); err != nil || n != last+1 {
			t.Fatalf("incremented to %d, %v after %d", n, err, last)
		}
		last = n
	}
	missing(other)
	// Not over restarts,
	s.kill()
	s.start()
	if n, err := d.ReadCounter(limited(t), id); err != nil || n != last {
		t.Errorf("after an unclean restart: %d, %v, was %d", n, err, last)
	}
	// nor when somebody removes it,
	s.other(func(b bare) {
		c := newCounter(id)
		public, err := tpm2.NVReadPublic{NVIndex: c.index}.Execute(b)
		if err != nil {
			t.Fatal(err)
		}
		_, err = tpm2.NVUndefineSpace{AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
			NVIndex: tpm2.NamedHandle{Handle: c.index, Name: public.NVName}}.Execute(b)
		if err != nil {
			t.Fatal(err)
		}
	})
	missing(id)
	n, err := d.IncrementCounter(limited(t), id)
	if err != nil || n <= last {
		t.Errorf("made anew at %d, %v, was %d", n, err, last)
	}
	last = n
	// nor when the TPM is cleared does it go back.
	s.clear()
	d = s.open(Config{})
	missing(id)
	if n, err := d.IncrementCounter(limited(t), id); err != nil || n <= last {
		t.Errorf("made anew after a clear at %d, %v, was %d", n, err, last)
	}
}

// A broken connection does not increment twice.
func TestCounterIsNotIncrementedTwice(t *testing.T) {
	s := startSimulator(t)
	var cut bool
	d := s.openWith(Config{}, tapped(nil, func(command, answer []byte) []byte {
		if cut && commandCode(command) == tpm2.TPMCCNVIncrement {
			cut = false
			return answer[:2]
		}
		return answer
	}))
	id := [16]byte{3}
	last, err := d.IncrementCounter(limited(t), id)
	if err != nil {
		t.Fatal(err)
	}
	cut = true
	if _, err := d.IncrementCounter(limited(t), id); !errors.Is(err, enclave.ErrAbsent) {
		t.Error(err)
	}
	if n, err := d.ReadCounter(limited(t), id); err != nil || n != last+1 {
		t.Errorf("counter at %d, %v, was %d", n, err, last)
	}
}

// An index of another program is left alone.
func TestForeignIndex(t *testing.T) {
	s := startSimulator(t)
	d := s.open(Config{})
	id := [16]byte{4}
	c := newCounter(id)
	s.other(func(b bare) {
		public := c.public()
		public.Attributes.NT = tpm2.TPMNTOrdinary
		_, err := tpm2.NVDefineSpace{AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
			PublicInfo: tpm2.New2B(public)}.Execute(b)
		if err != nil {
			t.Fatal(err)
		}
	})
	if _, err := d.ReadCounter(limited(t), id); !errors.Is(err, enclave.ErrMisconfigured) {
		t.Error(err)
	}
	if _, err := d.IncrementCounter(limited(t), id); !errors.Is(err, enclave.ErrMisconfigured) {
		t.Error(err)
	}
	// A counter that looks like ours and has another password.
	id = [16]byte{5}
	c = newCounter(id)
	s.other(func(b bare) {
		public := c.public()
		name, err := tpm2.NVName(&public)
		if err != nil {
			t.Fatal(err)
		}
		_, err = tpm2.NVDefineSpace{AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
			PublicInfo: tpm2.New2B(public)}.Execute(b)
		if err != nil {
			t.Fatal(err)
		}
		_, err = tpm2.NVIncrement{AuthHandle: tpm2.AuthHandle{Handle: c.index, Name: *name, Auth: tpm2.PasswordAuth(nil)},
			NVIndex: tpm2.NamedHandle{Handle: c.index, Name: *name}}.Execute(b)
		if err != nil {
			t.Fatal(err)
		}
	})
	if _, err := d.ReadCounter(limited(t), id); !errors.Is(err, enclave.ErrMisconfigured) {
		t.Error(err)
	}
	if _, err := d.IncrementCounter(limited(t), id); !errors.Is(err, enclave.ErrMisconfigured) {
		t.Error(err)
	}
}
