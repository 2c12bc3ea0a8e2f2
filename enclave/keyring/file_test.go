package keyring

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/enclave/enclavetest"
)

// plain is a keyring library that encrypts nothing and can be told to fail.
type plain struct {
	fail error
	lie  bool // Get returns something else
	dir  string
	pass string
}

func (p plain) Open(dir, pass string) (Ring, error) {
	p.dir, p.pass = dir, pass
	return p, nil
}

func (p plain) Set(name string, data []byte) error {
	if p.fail != nil {
		return p.fail
	}
	sum := sha256.Sum256([]byte(p.pass))
	return os.WriteFile(filepath.Join(p.dir, name), append(sum[:], data...), 0o600)
}

func (p plain) Get(name string) ([]byte, error) {
	content, err := os.ReadFile(filepath.Join(p.dir, name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, ErrNoItem
	}
	sum := sha256.Sum256([]byte(p.pass))
	if err != nil || !bytes.HasPrefix(content, sum[:]) {
		return nil, errors.New("integrity")
	}
	if p.lie {
		return make([]byte, itemSize), nil
	}
	return content[len(sum):], nil
}

func openFile(t *testing.T, dir string, l Library) *Driver {
	t.Helper()
	f, err := OpenFile(dir, l)
	if err != nil {
		t.Fatal(err)
	}
	d := New(FileKind, FileLevel, f)
	t.Cleanup(func() { d.Close() })
	return d
}

func TestDriverConformance(t *testing.T) {
	enclavetest.Run(t, func(t *testing.T) enclavetest.Device {
		dir := filepath.Join(t.TempDir(), "keyring")
		return enclavetest.Device{Open: func(t *testing.T) enclave.Enclave { return openFile(t, dir, plain{}) }}
	})
}

func TestFailedWrapLeavesNothing(t *testing.T) {
	for name, library := range map[string]plain{"the library fails": {fail: errors.New("no space")}, "the keyring lies": {lie: true}} {
		dir := filepath.Join(t.TempDir(), "keyring")
		d := openFile(t, dir, library)
		if _, err := d.Wrap(t.Context(), make([]byte, enclave.SecretSize), nil); !errors.Is(err, enclave.ErrMisconfigured) {
			t.Errorf("%s: %v", name, err)
		}
		for _, pattern := range []string{"items/*", "staging-*", "new-secret-*"} {
			if left, _ := filepath.Glob(filepath.Join(dir, pattern)); len(left) != 0 {
				t.Errorf("%s: left %v", name, left)
			}
		}
	}
}

func TestItemsAreNeverOverwritten(t *testing.T) {
	f, err := OpenFile(filepath.Join(t.TempDir(), "keyring"), plain{})
	if err != nil {
		t.Fatal(err)
	}
	ctx := context.Background()
	name := hex.EncodeToString(make([]byte, nameSize))
	if err := f.Put(ctx, name, []byte("first")); err != nil {
		t.Fatal(err)
	}
	if err := f.Put(ctx, name, []byte("second")); !errors.Is(err, enclave.ErrMisconfigured) {
		t.Errorf("second put: %v", err)
	}
	if got, err := f.Get(ctx, name); err != nil || string(got) != "first" {
		t.Errorf("%q, %v", got, err)
	}
}

// What a killed process leaves behind is cleared away by the next enrolment, and stops nobody.
func TestLeftoversOfAKilledProcess(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "keyring")
	for _, d := range []string{dir, filepath.Join(dir, "staging-1"), filepath.Join(dir, "items")} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	os.WriteFile(filepath.Join(dir, "staging-1", "half"), []byte("half"), 0o600)
	os.WriteFile(filepath.Join(dir, "new-secret-1"), []byte("half"), 0o600)
	os.WriteFile(filepath.Join(dir, "lock"), nil, 0o600)
	d := openFile(t, dir, plain{})
	if _, err := d.Wrap(t.Context(), make([]byte, enclave.SecretSize), nil); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"staging-1", "new-secret-1"} {
		if _, err := os.Stat(filepath.Join(dir, name)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is still there", name)
		}
	}
}

func TestTwoWriters(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "keyring")
	d := openFile(t, dir, plain{})
	if _, err := d.Wrap(t.Context(), make([]byte, enclave.SecretSize), nil); err != nil {
		t.Fatal(err)
	}
	lock, err := os.OpenFile(filepath.Join(dir, lockName), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Wrap(t.Context(), make([]byte, enclave.SecretSize), nil); !errors.Is(err, enclave.ErrBusy) {
		t.Errorf("wrap beside another writer: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := d.Wrap(ctx, make([]byte, enclave.SecretSize), nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("wrap with a deadline beside another writer: %v", err)
	}
	time.AfterFunc(50*time.Millisecond, func() { lock.Close() })
	if _, err := d.Wrap(t.Context(), make([]byte, enclave.SecretSize), nil); err != nil {
		t.Errorf("wrap while another writer finishes: %v", err)
	}
}

func TestRelativeDirectoryIsRefused(t *testing.T) {
	for _, dir := range []string{"", "keyring", "./keyring", "~/keyring"} {
		if _, err := OpenFile(dir, plain{}); !errors.Is(err, enclave.ErrMisconfigured) {
			t.Errorf("%q: %v", dir, err)
		}
	}
}

func FuzzUnwrap(f *testing.F) {
	file, err := OpenFile(filepath.Join(f.TempDir(), "keyring"), plain{})
	if err != nil {
		f.Fatal(err)
	}
	enclavetest.Fuzz(f, New(FileKind, FileLevel, file), enclave.Auth{})
}
