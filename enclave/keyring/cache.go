package keyring

import (
	"encoding/hex"
	"errors"
	"fmt"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsd-project/kmsd/enclave"
)

// MaxCache is how long a Cache may keep a secret.
const MaxCache = 30 * 24 * time.Hour

// Cache keeps the secrets of slots that a person opened, in the kernel's keyring of the user kmsd runs as, so that a restart of kmsd, not
// of the machine, needs no person. It is no enclave: nothing can be enrolled with it, and what it holds is gone after a reboot, after
// its time, and when it is removed. It protects against nobody who runs as that user, nor against root: kmsd's own memory is closed to
// the former, the keyring is not.
//
// It works without a daemon or a library, whatever session keyring kmsd was started with; systemd gives services an empty one of their
// own (systemd.exec(5), KeyringMode=private). That is why every call makes itself the possessor of the user's keyring, for its duration
// and for its thread only (keyrings(7), user-keyring(7), thread-keyring(7)).
type Cache struct {
	// Timeout is how long a secret stays, from one second to MaxCache. The kernel sees to it.
	Timeout time.Duration
}

// Possessor: view, read, write, search, set attributes; nobody else anything (keyctl_setperm(3)).
const cachePermissions = 0x2f000000

// Put stores the secret of the slot with this UUID, in the place of the one that is there.
func (c Cache) Put(slot [16]byte, secret []byte) error {
	if len(secret) != enclave.SecretSize {
		return fmt.Errorf("secret of %d bytes: %w", len(secret), enclave.ErrUnsupported)
	}
	if c.Timeout < time.Second || c.Timeout > MaxCache {
		return &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: fmt.Sprintf("time of %v in the kernel keyring", c.Timeout), Remedy: fmt.Sprintf("give one from 1s to %v", MaxCache)}
	}
	return possessed(func() error {
		id, err := unix.AddKey("user", cacheName(slot), secret, unix.KEY_SPEC_USER_KEYRING)
		if err != nil {
			return err
		}
		if _, err = unix.KeyctlInt(unix.KEYCTL_SET_TIMEOUT, id, int(c.Timeout/time.Second), 0, 0); err == nil {
			err = unix.KeyctlSetperm(id, cachePermissions)
		}
		if err != nil {
			unix.KeyctlInt(unix.KEYCTL_INVALIDATE, id, 0, 0, 0)
			unix.KeyctlInt(unix.KEYCTL_UNLINK, id, unix.KEY_SPEC_USER_KEYRING, 0, 0)
		}
		return err
	})
}

// Get reads the secret of a slot into dst of enclave.SecretSize bytes, straight from the kernel. ErrNoItem says that there is none, or
// no longer; dst holds zeros after every error. The secret may be anybody's who runs as our user: who opens a store with it and fails
// removes it.
func (Cache) Get(slot [16]byte, dst []byte) error {
	if len(dst) != enclave.SecretSize {
		return fmt.Errorf("destination of %d bytes: %w", len(dst), enclave.ErrUnsupported)
	}
	err := possessed(func() error {
		id, err := unix.KeyctlSearch(unix.KEY_SPEC_USER_KEYRING, "user", cacheName(slot), 0)
		if err != nil {
			return err
		}
		n, err := unix.KeyctlBuffer(unix.KEYCTL_READ, id, dst, 0)
		if err == nil && n != len(dst) { // the length of the key, however much was read
			err = unix.ENOKEY
		}
		return err
	})
	if err != nil {
		clear(dst)
	}
	return err
}

// Remove removes the secret of a slot; nothing there is no error.
func (Cache) Remove(slot [16]byte) error {
	err := possessed(func() error {
		id, err := unix.KeyctlSearch(unix.KEY_SPEC_USER_KEYRING, "user", cacheName(slot), 0)
		if err != nil {
			return err
		}
		if _, err := unix.KeyctlInt(unix.KEYCTL_REVOKE, id, 0, 0, 0); err != nil { // wipes it at once, whoever holds a reference
			return err
		}
		_, err = unix.KeyctlInt(unix.KEYCTL_UNLINK, id, unix.KEY_SPEC_USER_KEYRING, 0, 0)
		return err
	})
	if errors.Is(err, ErrNoItem) {
		return nil
	}
	return err
}

func cacheName(slot [16]byte) string { return "kmsd:unlock:" + hex.EncodeToString(slot[:]) }

// possessed calls f with the user's keyring linked into the keyring of the thread, and types its error.
func possessed(f func() error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	_, err := unix.KeyctlInt(unix.KEYCTL_LINK, unix.KEY_SPEC_USER_KEYRING, unix.KEY_SPEC_THREAD_KEYRING, 0, 0)
	if err == nil {
		err = f()
		unix.KeyctlInt(unix.KEYCTL_UNLINK, unix.KEY_SPEC_USER_KEYRING, unix.KEY_SPEC_THREAD_KEYRING, 0, 0)
	}
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.ENOKEY), errors.Is(err, unix.EKEYEXPIRED), errors.Is(err, unix.EKEYREVOKED):
		return ErrNoItem
	case errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return &enclave.Error{Kind: enclave.ErrUnsupported, Detail: "the kernel keyring is closed to kmsd", Cause: err,
			Remedy: "allow the system calls add_key and keyctl, or switch the unlock cache off"}
	}
	return &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: "kernel keyring", Cause: err, Remedy: "see keyrings(7) for the quotas of users, or switch the unlock cache off"}
}
