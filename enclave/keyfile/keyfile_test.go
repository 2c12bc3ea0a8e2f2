package keyfile

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/enclave/enclavetest"
)

var (
	_ enclave.Enclave = (*Keyfile)(nil)

	aad    = enclave.SlotAAD([16]byte{9})
	secret = bytes.Repeat([]byte{0xA7}, enclave.SecretSize)
)

func open(t *testing.T, path string) *Keyfile {
	t.Helper()
	k, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.Close() })
	return k
}

func wrap(t *testing.T, k *Keyfile) enclave.Blob {
	t.Helper()
	b, err := k.Wrap(t.Context(), secret, aad)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func unwrap(t *testing.T, k *Keyfile, b enclave.Blob) error {
	t.Helper()
	dst := make([]byte, enclave.SecretSize)
	err := k.Unwrap(t.Context(), b, aad, enclave.Auth{}, dst)
	if err == nil && !bytes.Equal(dst, secret) {
		t.Error("another secret")
	}
	if err != nil && !bytes.Equal(dst, make([]byte, len(dst))) {
		t.Error("wrote into the destination and failed")
	}
	return err
}

// expect checks what a driver says of a slot: the state of health, and the error of Unwrap.
func expect(t *testing.T, what string, k *Keyfile, b enclave.Blob, state enclave.HealthState, want error, detail string) {
	t.Helper()
	if err := unwrap(t, k, b); !errors.Is(err, want) {
		t.Errorf("%s: unwrap: %v, want %v", what, err, want)
	} else if e := new(enclave.Error); want != nil && (!errors.As(err, &e) || e.Remedy == "" || !strings.Contains(e.Detail, detail)) {
		t.Errorf("%s: unwrap: %v without %q or a remedy", what, err, detail)
	}
	if h := k.Health(t.Context()); h.State != state || want != nil && !strings.Contains(h.Detail, detail) {
		t.Errorf("%s: health %+v, want %s with %q", what, h, state, detail)
	}
}

func TestConformance(t *testing.T) {
	enclavetest.Run(t, func(t *testing.T) enclavetest.Device {
		path := filepath.Join(t.TempDir(), "kmsd.key")
		return enclavetest.Device{Open: func(t *testing.T) enclave.Enclave { return open(t, path) }}
	})
}

// A blob names its file, so the workers of the fuzzer open each other's: what may not happen is that one opens which is not as it was made.
func FuzzBlob(f *testing.F) {
	k, err := Open(filepath.Join(f.TempDir(), "kmsd.key"))
	if err != nil {
		f.Fatal(err)
	}
	blob, err := k.Wrap(f.Context(), secret, aad)
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte(blob))
	f.Add([]byte(blob[:len(blob)/2]))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := decode(b)
		if err == nil {
			again, err := s.encode()
			if err != nil || !bytes.Equal(again, b) || !s.where.valid() {
				t.Fatalf("%x is read, and written as %x, %v", b, again, err)
			}
		}
		dst := make([]byte, enclave.SecretSize)
		switch err := k.Unwrap(t.Context(), b, aad, enclave.Auth{}, dst); {
		case err == nil && !bytes.Equal(dst, secret):
			t.Fatal("another secret")
		case err != nil && !bytes.Equal(dst, make([]byte, len(dst))):
			t.Fatal("the destination is not zero after an error")
		}
	})
}

func TestPathIsChecked(t *testing.T) {
	for _, path := range []string{"", "kmsd.key", "./kmsd.key", "/", "/..", "/" + strings.Repeat("k", maxPath)} {
		if _, err := Open(path); !errors.Is(err, enclave.ErrMisconfigured) {
			t.Errorf("%.20q: %v", path, err)
		}
	}
}

func TestFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "kmsd.key")
	k := open(t, path)
	if h := k.Health(t.Context()); h.State != enclave.Absent || !strings.Contains(h.Detail, "plug in") {
		t.Errorf("before enrolment: %+v", h)
	}
	b := wrap(t, k)
	first, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(first, secret) || bytes.Contains(b, secret) || len(first) != fileSize {
		t.Errorf("file of %d bytes", len(first))
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	if h := k.Health(t.Context()); h.State != enclave.Ready {
		t.Errorf("health %+v", h)
	}
	if info := k.Info(); info.NeedsYou || !strings.Contains(info.Binding, ":") || !strings.Contains(info.Level, "copy") {
		t.Errorf("info %+v", info)
	}
	// Another slot, of another store perhaps: the file stays as it is, and neither opens the other's.
	other := open(t, path)
	b2 := wrap(t, other)
	if again, err := os.ReadFile(path); err != nil || !bytes.Equal(again, first) {
		t.Error("the keyfile was written again")
	}
	if bytes.Equal(b, b2) {
		t.Error("the same blob twice")
	}
	for _, b := range []enclave.Blob{b, b2} {
		if err := unwrap(t, open(t, "/nowhere/in/particular"), b); err != nil { // the blob knows where it is
			t.Error(err)
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
		t.Errorf("left over: %v, %v", left, err)
	}
}

func TestWhatCanGoWrong(t *testing.T) {
	for _, test := range []struct {
		name   string
		harm   func(t *testing.T, path string)
		state  enclave.HealthState
		want   error
		detail string
	}{
		{"nothing", func(*testing.T, string) {}, enclave.Ready, nil, ""},
		{"gone", remove, enclave.Replaced, enclave.ErrReplaced, "gone"},
		{"directory gone", func(t *testing.T, path string) { remove(t, path); remove(t, filepath.Dir(path)) }, enclave.Replaced, enclave.ErrReplaced, "gone"},
		{"exchanged", func(t *testing.T, path string) {
			remove(t, path)
			wrap(t, open(t, path))
		}, enclave.Replaced, enclave.ErrReplaced, "another keyfile"},
		{"one bit", func(t *testing.T, path string) { edit(t, path, func(b []byte) []byte { b[40] ^= 1; return b }) }, enclave.Misconfigured, enclave.ErrCorrupt, "damaged"},
		{"cut", func(t *testing.T, path string) { edit(t, path, func(b []byte) []byte { return b[:50] }) }, enclave.Misconfigured, enclave.ErrCorrupt, "damaged"},
		{"empty", func(t *testing.T, path string) { edit(t, path, func([]byte) []byte { return nil }) }, enclave.Misconfigured, enclave.ErrCorrupt, "damaged"},
		{"longer", func(t *testing.T, path string) { edit(t, path, func(b []byte) []byte { return append(b, 0) }) }, enclave.Misconfigured, enclave.ErrCorrupt, "damaged"},
		{"huge", func(t *testing.T, path string) { must(t, os.Truncate(path, 1<<40)) }, enclave.Misconfigured, enclave.ErrCorrupt, "damaged"},
		{"open to others", func(t *testing.T, path string) { must(t, os.Chmod(path, 0o604)) }, enclave.Misconfigured, enclave.ErrMisconfigured, "mode 0604"},
		{"another name", func(t *testing.T, path string) { must(t, os.Link(path, path+".2")) }, enclave.Misconfigured, enclave.ErrMisconfigured, "another name"},
		{"link", func(t *testing.T, path string) {
			must(t, os.Rename(path, path+".2"))
			must(t, os.Symlink(path+".2", path))
		}, enclave.Misconfigured, enclave.ErrMisconfigured, "link"},
		{"link on the way", func(t *testing.T, path string) {
			dir := filepath.Dir(path)
			must(t, os.Rename(dir, dir+".2"))
			must(t, os.Symlink(dir+".2", dir))
		}, enclave.Misconfigured, enclave.ErrMisconfigured, "link"},
		{"directory", func(t *testing.T, path string) { remove(t, path); must(t, os.Mkdir(path, 0o700)) }, enclave.Misconfigured, enclave.ErrMisconfigured, "not a file"},
		{"pipe", func(t *testing.T, path string) { remove(t, path); must(t, syscall.Mkfifo(path, 0o600)) }, enclave.Misconfigured, enclave.ErrMisconfigured, "not a file"},
	} {
		dir := filepath.Join(t.TempDir(), "keys")
		must(t, os.Mkdir(dir, 0o700))
		path := filepath.Join(dir, "kmsd.key")
		k := open(t, path)
		b := wrap(t, k)
		test.harm(t, path)
		expect(t, test.name, k, b, test.state, test.want, test.detail)
		// A driver that has not seen the slot yet says the same, once it is told.
		k = open(t, path)
		must(t, k.Expect(b))
		if h := k.Health(t.Context()); h.State != test.state {
			t.Errorf("%s: a new driver: %+v", test.name, h)
		}
		os.Rename(dir+".2", dir)
	}
}

func TestOfAnotherUser(t *testing.T) {
	asRoot(t)
	path := filepath.Join(t.TempDir(), "kmsd.key")
	k := open(t, path)
	b := wrap(t, k)
	must(t, os.Chown(path, 65534, 65534))
	expect(t, "of another user", k, b, enclave.Misconfigured, enclave.ErrMisconfigured, "uid 65534")
}

func TestEnrolmentIsRefused(t *testing.T) {
	dir := t.TempDir()
	foreign := filepath.Join(dir, "letter")
	must(t, os.WriteFile(foreign, []byte("Dear Sir or Madam"), 0o600))
	for _, test := range []struct {
		path string
		want error
	}{
		{foreign, enclave.ErrMisconfigured},
		{filepath.Join(dir, "none", "kmsd.key"), enclave.ErrAbsent},
		{filepath.Join(foreign, "kmsd.key"), enclave.ErrAbsent},
		{"/proc/self/kmsd.key", nil}, // whatever, but an error
	} {
		_, err := open(t, test.path).Wrap(t.Context(), secret, aad)
		if err == nil || test.want != nil && !errors.Is(err, test.want) {
			t.Errorf("%s: %v, want %v", test.path, err, test.want)
		}
	}
	if b, err := os.ReadFile(foreign); err != nil || string(b) != "Dear Sir or Madam" {
		t.Errorf("the foreign file is now %q, %v", b, err)
	}
}

// A medium that does not answer takes one goroutine, not kmsd: every call ends with its context, and all is well when it is back.
func TestMediumThatHangs(t *testing.T) {
	k := open(t, filepath.Join(t.TempDir(), "kmsd.key"))
	b := wrap(t, k)
	good := k.system.mounts
	k.system.mounts = filepath.Join(t.TempDir(), "mounts")
	must(t, syscall.Mkfifo(k.system.mounts, 0o600)) // opening it waits for a writer
	for range 3 {
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
		start := time.Now()
		if err := k.Unwrap(ctx, b, aad, enclave.Auth{}, make([]byte, enclave.SecretSize)); !errors.Is(err, enclave.ErrAbsent) || !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		if h := k.Health(ctx); h.State != enclave.Absent {
			t.Errorf("health %+v", h)
		}
		if took := time.Since(start); took > time.Second {
			t.Errorf("took %v", took)
		}
		cancel()
	}
	release, err := os.OpenFile(k.system.mounts, os.O_WRONLY, 0)
	must(t, err)
	release.Close()
	// The one that waited ends; what it waits on is not ours to change before.
	must(t, func() error { k.token <- struct{}{}; k.system.mounts = good; <-k.token; return nil }())
	if err := unwrap(t, k, b); err != nil {
		t.Error(err)
	}
}

func TestFileSystemsWithoutOwners(t *testing.T) {
	path := filepath.Join(t.TempDir(), "kmsd.key")
	k := open(t, path)
	wrap(t, k)
	must(t, os.Chmod(path, 0o755)) // as vfat shows it
	m, where, err := k.system.locate(path)
	must(t, err)
	if _, err := m.read(where.path); !errors.Is(err, enclave.ErrMisconfigured) {
		t.Errorf("%s: %v", m.kind, err)
	}
	m.kind = "vfat"
	if _, err := m.read(where.path); err != nil {
		t.Errorf("vfat: %v", err)
	}
}

func FuzzFile(f *testing.F) {
	c := newContent()
	f.Add(c.appendTo(nil))
	f.Add([]byte(fileMagic))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := parse(b)
		if err == nil && !bytes.Equal(c.appendTo(nil), b) {
			t.Fatalf("%x was taken for a keyfile", b)
		}
		if err != nil && c != (content{}) {
			t.Fatal("content beside an error")
		}
	})
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func remove(t *testing.T, path string) {
	t.Helper()
	must(t, os.Remove(path))
}

func edit(t *testing.T, path string, f func([]byte) []byte) {
	t.Helper()
	b, err := os.ReadFile(path)
	must(t, err)
	must(t, os.WriteFile(path, f(b), 0o600))
}

// asRoot fails where media cannot be mounted though they should.
func asRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("CI") != "" {
		t.Fatal("this test needs root")
	}
	t.Skip("needs root; the continuous integration runs it as root")
}
