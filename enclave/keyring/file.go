package keyring

import (
	"context"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/keystore/durable"
)

// FileKind is the kind of slots that the file backend guards.
const FileKind = "keyring:file"

// FileLevel is what that is worth, in honest words.
const FileLevel = "software: protects against copying of the keystore file alone; not against root or theft of the whole disk"

// Library opens the keyring library's file backend in a directory.
type Library interface {
	Open(dir, passphrase string) (Ring, error)
}

// Ring is a keyring of the library. Get returns ErrNoItem for a name it does not have.
type Ring interface {
	Set(name string, data []byte) error
	Get(name string) ([]byte, error)
}

const (
	secretName    = "machine-secret"
	itemsName     = "items"
	lockName      = "lock"
	stagingGlob   = "staging-*"
	newSecretGlob = "new-secret-*"
	secretMagic   = "kmsdms1\n"
	secretSize    = 32
	maxItemBytes  = 64 << 10
)

// File is the library's file backend, made fit to hold a secret. It implements Items.
//
// The passphrase of the backend is a random machine secret of 32 bytes in a file beside the items, so that the few rounds of PBKDF2 the
// library uses do not matter. The library overwrites items in place and does not fsync; so it only ever writes into a staging
// directory, and what it wrote is synced and renamed.
//
// Invariant: an item is never overwritten, and the machine secret is never replaced.
type File struct {
	dir     string
	library Library
}

// OpenFile returns the file backend in dir, an absolute path. The directory is made by the first Put.
func OpenFile(dir string, library Library) (*File, error) {
	if !filepath.IsAbs(dir) {
		return nil, &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: "the directory of the keyring is not an absolute path"}
	}
	return &File{dir: filepath.Clean(dir), library: library}, nil
}

// Put stores an item: staging directory, fsync, rename, fsync of both directories.
func (f *File) Put(ctx context.Context, name string, data []byte) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	unlock, err := f.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	items := filepath.Join(f.dir, itemsName)
	if err := makeDir(items); err != nil {
		return err
	}
	for _, pattern := range []string{stagingGlob, newSecretGlob} { // of a helper that was killed; we hold the lock
		stale, _ := filepath.Glob(filepath.Join(f.dir, pattern))
		for _, path := range stale {
			os.RemoveAll(path)
		}
	}
	pass, _, err := f.machineSecret()
	if errors.Is(err, fs.ErrNotExist) {
		pass, err = f.newMachineSecret()
	}
	if err != nil {
		return err
	}
	staging, err := os.MkdirTemp(f.dir, stagingGlob)
	if err != nil {
		return misconfigured(err)
	}
	defer os.RemoveAll(staging)
	ring, err := f.library.Open(staging, pass)
	if err != nil {
		return misconfigured(err)
	}
	if err := ring.Set(name, data); err != nil {
		return misconfigured(err)
	}
	target := filepath.Join(items, name)
	if _, err := os.Lstat(target); !errors.Is(err, fs.ErrNotExist) {
		return &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: "there is an item of that name already", Cause: err}
	}
	for _, step := range []func() error{
		func() error { return durable.Sync(filepath.Join(staging, name)) },
		func() error { return os.Rename(filepath.Join(staging, name), target) },
		func() error { return durable.Sync(items) },
		func() error { return durable.Sync(f.dir) },
	} {
		if err := step(); err != nil {
			return misconfigured(err)
		}
	}
	return nil
}

// Get reads an item.
func (f *File) Get(ctx context.Context, name string) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	items := filepath.Join(f.dir, itemsName)
	if err := checkDir(items); err != nil {
		return nil, err
	}
	path := filepath.Join(items, name)
	file, err := openOwn(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, ErrNoItem
	}
	if err != nil {
		return nil, err
	}
	info, err := file.Stat()
	file.Close()
	if err != nil {
		return nil, misconfigured(err)
	}
	if info.Size() > maxItemBytes {
		return nil, &enclave.Error{Kind: enclave.ErrCorrupt, Detail: fmt.Sprintf("keyring item of %d bytes", info.Size()), Remedy: remedyLost(FileKind)}
	}
	pass, _, err := f.machineSecret()
	if errors.Is(err, fs.ErrNotExist) {
		return nil, ErrNoItem
	}
	if err != nil {
		return nil, err
	}
	ring, err := f.library.Open(items, pass)
	if err != nil {
		return nil, misconfigured(err)
	}
	data, err := ring.Get(name)
	if err != nil && !errors.Is(err, ErrNoItem) {
		// The passphrase is right, as far as it goes: so the item is not.
		return nil, &enclave.Error{Kind: enclave.ErrCorrupt, Detail: "the keyring item cannot be read", Remedy: remedyLost(FileKind)}
	}
	return data, err
}

// Remove removes an item.
func (f *File) Remove(_ context.Context, name string) error {
	items := filepath.Join(f.dir, itemsName)
	err := os.Remove(filepath.Join(items, name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = durable.Sync(items)
	}
	if err != nil {
		return misconfigured(err)
	}
	return nil
}

// Binding is derived from the machine secret.
func (f *File) Binding(ctx context.Context) (b [bindingSize]byte, err error) {
	if err := ctx.Err(); err != nil {
		return b, err
	}
	_, b, err = f.machineSecret()
	if errors.Is(err, fs.ErrNotExist) {
		return b, nil
	}
	return b, err
}

// Health says replaced when there are items but no machine secret to open them.
func (f *File) Health(ctx context.Context) enclave.Health {
	binding, err := f.Binding(ctx)
	if err != nil {
		return enclave.HealthOf(err)
	}
	if binding == [bindingSize]byte{} {
		if left, err := os.ReadDir(filepath.Join(f.dir, itemsName)); err == nil && len(left) > 0 {
			return enclave.Health{State: enclave.Replaced, Detail: "the machine secret is gone; " + remedyLost(FileKind)}
		}
	}
	return enclave.Health{State: enclave.Ready}
}

// Close does nothing; no file is held open.
func (f *File) Close() error { return nil }

// machineSecret reads the machine secret and returns the passphrase for the library and the binding, both derived from it. When there
// is none the error is fs.ErrNotExist.
func (f *File) machineSecret() (pass string, binding [bindingSize]byte, err error) {
	if err := checkDir(f.dir); err != nil {
		return "", binding, err
	}
	file, err := openOwn(filepath.Join(f.dir, secretName))
	if err != nil {
		return "", binding, err
	}
	defer file.Close()
	content := make([]byte, len(secretMagic)+secretSize+1) // one more than there should be
	defer clear(content)
	n, err := io.ReadFull(file, content)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
		return "", binding, misconfigured(err)
	}
	if n != len(content)-1 || !strings.HasPrefix(string(content), secretMagic) {
		return "", binding, &enclave.Error{Kind: enclave.ErrReplaced, Detail: "the machine secret is damaged", Remedy: remedyLost(FileKind)}
	}
	return derive(content[len(secretMagic):n])
}

// derive makes the passphrase and the binding.
func derive(secret []byte) (pass string, binding [bindingSize]byte, err error) {
	key, err := hkdf.Key(sha256.New, secret, nil, "kmsd keyring passphrase v1", 32)
	if err != nil {
		return "", binding, err
	}
	defer clear(key)
	id, err := hkdf.Key(sha256.New, secret, nil, "kmsd keyring binding v1", bindingSize)
	if err != nil {
		return "", binding, err
	}
	return hex.EncodeToString(key), [bindingSize]byte(id), nil
}

// newMachineSecret makes the machine secret. The file appears whole or not at all, and never in the place of another.
func (f *File) newMachineSecret() (pass string, err error) {
	content := append([]byte(secretMagic), make([]byte, secretSize)...)
	defer clear(content)
	rand.Read(content[len(secretMagic):])
	file, err := os.CreateTemp(f.dir, newSecretGlob) // 0600
	if err != nil {
		return "", misconfigured(err)
	}
	defer os.Remove(file.Name())
	_, err = file.Write(content)
	if err == nil {
		err = file.Sync()
	}
	if closeErr := file.Close(); err == nil {
		err = closeErr
	}
	if err == nil {
		err = os.Link(file.Name(), filepath.Join(f.dir, secretName))
	}
	if err == nil {
		err = os.Remove(file.Name())
	}
	if err == nil {
		err = durable.Sync(f.dir)
	}
	if err != nil {
		return "", misconfigured(err)
	}
	pass, _, err = derive(content[len(secretMagic):])
	return pass, err
}

// lockWait is how long Put waits for another process, such as a helper that was just killed and has not quite gone.
const lockWait = 2 * time.Second

// lock makes the directory and keeps other processes from writing into it.
func (f *File) lock(ctx context.Context) (unlock func(), err error) {
	if err := makeDir(f.dir); err != nil {
		return nil, err
	}
	file, err := os.OpenFile(filepath.Join(f.dir, lockName), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, misconfigured(err)
	}
	for end := time.Now().Add(lockWait); ; {
		err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { file.Close() }, nil
		}
		if time.Now().After(end) {
			file.Close()
			return nil, &enclave.Error{Kind: enclave.ErrBusy, Detail: "another process is writing to the keyring", Remedy: "try again when it is done"}
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
			file.Close()
			return nil, ctx.Err()
		}
	}
}

// makeDir makes a directory for us alone, durably, or checks the one that is there.
func makeDir(dir string) error {
	err := os.Mkdir(dir, 0o700)
	if errors.Is(err, fs.ErrExist) {
		return checkDir(dir)
	}
	if err == nil {
		err = durable.Sync(filepath.Dir(dir))
	}
	if err != nil {
		return misconfigured(err)
	}
	return nil
}

// checkDir refuses a directory that others can look into or change. One that is not there is left to the caller to meet.
func checkDir(dir string) error {
	info, err := os.Lstat(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return misconfigured(err)
	}
	return checkOwn(dir, info, true)
}

// openOwn opens a file that only we can read, and that is nothing but a file. One that is not there is fs.ErrNotExist.
func openOwn(path string) (*os.File, error) {
	file, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fs.ErrNotExist
	}
	if err != nil {
		return nil, misconfigured(err)
	}
	info, err := file.Stat()
	if err == nil {
		err = checkOwn(path, info, false)
	}
	if err != nil {
		file.Close()
		return nil, err
	}
	return file, nil
}

func checkOwn(path string, info fs.FileInfo, dir bool) error {
	stat := info.Sys().(*syscall.Stat_t)
	var wrong string
	switch {
	case dir && !info.IsDir(), !dir && !info.Mode().IsRegular():
		wrong = "is not what it should be"
	case int(stat.Uid) != os.Geteuid():
		wrong = fmt.Sprintf("belongs to uid %d", stat.Uid)
	case info.Mode().Perm()&0o077 != 0:
		wrong = fmt.Sprintf("has mode %04o", info.Mode().Perm())
	case !dir && stat.Nlink != 1:
		wrong = "has another name"
	default:
		return nil
	}
	return &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: filepath.Base(path) + " " + wrong, Remedy: "make it readable by the user of kmsd only, and find out who changed it"}
}

// misconfigured reports a failure of the file system. Paths are no secret; the library's errors never get here with a passphrase.
func misconfigured(err error) error {
	return &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: "keyring file", Cause: err}
}
