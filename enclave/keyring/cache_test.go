package keyring_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/enclave/keyring"
)

// cacheEnv has the test binary act as kmsd at one of its starts: put, get or remove.
const cacheEnv = "KMSD_CACHE_TEST"

var (
	cachedSlot   = [16]byte{0xca, 0xc4, 0xe0}
	cachedSecret = bytes.Repeat([]byte{0x3d}, enclave.SecretSize)
)

func TestCache(t *testing.T) {
	if act := os.Getenv(cacheEnv); act != "" {
		actAsKmsd(t, act)
		return
	}
	c := keyring.Cache{Timeout: time.Minute}
	slot := [16]byte{1, byte(os.Getpid()), byte(os.Getpid() >> 8)}
	t.Cleanup(func() { c.Remove(slot) })
	dst := make([]byte, enclave.SecretSize)
	none := func(what string) {
		t.Helper()
		copy(dst, "something")
		if err := c.Get(slot, dst); !errors.Is(err, keyring.ErrNoItem) || !bytes.Equal(dst, make([]byte, len(dst))) {
			t.Errorf("%s: %v, %x", what, err, dst)
		}
	}
	none("at first")
	if err := c.Remove(slot); err != nil {
		t.Errorf("remove nothing: %v", err)
	}
	for _, secret := range [][]byte{cachedSecret, bytes.Repeat([]byte{4}, enclave.SecretSize)} { // the second replaces the first
		if err := c.Put(slot, secret); err != nil {
			t.Fatal(err)
		}
		if err := c.Get(slot, dst); err != nil || !bytes.Equal(dst, secret) {
			t.Errorf("get: %x, %v", dst, err)
		}
	}
	if err := c.Remove(slot); err != nil {
		t.Fatal(err)
	}
	none("removed")

	if err := (keyring.Cache{Timeout: time.Second}).Put(slot, cachedSecret); err != nil {
		t.Fatal(err)
	}
	time.Sleep(2100 * time.Millisecond) // the kernel counts in whole seconds
	none("after its time")
	if err := c.Remove(slot); err != nil {
		t.Errorf("remove what has expired: %v", err)
	}

	for _, timeout := range []time.Duration{0, time.Millisecond, keyring.MaxCache + time.Second} {
		if err := (keyring.Cache{Timeout: timeout}).Put(slot, cachedSecret); !errors.Is(err, enclave.ErrMisconfigured) {
			t.Errorf("time of %v: %v", timeout, err)
		}
	}
	for _, n := range []int{0, 31, 33} {
		if err := c.Put(slot, make([]byte, n)); !errors.Is(err, enclave.ErrUnsupported) {
			t.Errorf("secret of %d bytes: %v", n, err)
		}
		if err := c.Get(slot, make([]byte, n)); !errors.Is(err, enclave.ErrUnsupported) {
			t.Errorf("destination of %d bytes: %v", n, err)
		}
	}
}

// What another program of the user has put there is not taken for a secret.
func TestCacheWithGarbage(t *testing.T) {
	c := keyring.Cache{Timeout: time.Minute}
	slot := [16]byte{2, byte(os.Getpid()), byte(os.Getpid() >> 8)}
	t.Cleanup(func() { c.Remove(slot) })
	for _, n := range []int{1, 31, 33, 4000} {
		if _, err := unix.AddKey("user", fmt.Sprintf("kmsd:unlock:%x", slot), bytes.Repeat([]byte{9}, n), unix.KEY_SPEC_USER_KEYRING); err != nil {
			t.Fatal(err)
		}
		dst := make([]byte, enclave.SecretSize)
		if err := c.Get(slot, dst); err == nil || !bytes.Equal(dst, make([]byte, len(dst))) {
			t.Errorf("%d bytes: %v, %x", n, err, dst)
		}
	}
}

// The possession of the user's keyring lasts for the call.
func TestCacheLeavesNoLink(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	c := keyring.Cache{Timeout: time.Minute}
	slot := [16]byte{3, byte(os.Getpid()), byte(os.Getpid() >> 8)}
	if err := c.Put(slot, cachedSecret); err != nil {
		t.Fatal(err)
	}
	if err := c.Remove(slot); err != nil {
		t.Fatal(err)
	}
	links := make([]byte, 64)
	if n, err := unix.KeyctlBuffer(unix.KEYCTL_READ, unix.KEY_SPEC_THREAD_KEYRING, links, 0); err != nil || n != 0 {
		t.Errorf("the keyring of the thread has %d bytes of links, %v", n, err)
	}
}

// Each start of a service has a session keyring of its own, as with KeyringMode=private. keyctl makes one.
func TestCacheAcrossRestarts(t *testing.T) {
	restart := func(uid uint32, act, want string) {
		t.Helper()
		cmd := exec.Command("keyctl", "session", "-", testBinary(t), "-test.run=^TestCache$", "-test.v")
		cmd.Env = []string{cacheEnv + "=" + act, "PATH=" + os.Getenv("PATH")}
		cmd.Dir = "/"
		if os.Geteuid() == 0 {
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		}
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.Contains(string(out), "RESULT "+want+"\n") {
			t.Errorf("%s: want %s: %v (the tests need keyutils)\n%s", act, want, err, out)
		}
	}
	const kmsd, other = 64011, 64012
	restart(kmsd, "put", "done")
	restart(kmsd, "get", "the secret")
	// keyctl itself, of the same user and in a session like that, does not possess the key, and cannot read it.
	print := exec.Command("keyctl", "session", "-", "sh", "-c", "keyctl print $(keyctl search @u user kmsd:unlock:cac4e000000000000000000000000000)")
	if os.Geteuid() == 0 {
		print.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: kmsd, Gid: kmsd}}
		restart(other, "get", "none")
	}
	if out, err := print.Output(); err == nil || len(out) > 0 {
		t.Errorf("keyctl print: %q, %v", out, err)
	}
	restart(kmsd, "get", "the secret")
	restart(kmsd, "remove", "done")
	restart(kmsd, "get", "none")
}

func actAsKmsd(t *testing.T, act string) {
	c := keyring.Cache{Timeout: time.Minute}
	result := "done"
	var err error
	switch act {
	case "put":
		err = c.Put(cachedSlot, cachedSecret)
	case "remove":
		err = c.Remove(cachedSlot)
	case "get":
		dst := make([]byte, enclave.SecretSize)
		if err = c.Get(cachedSlot, dst); errors.Is(err, keyring.ErrNoItem) {
			err, result = nil, "none"
		} else if bytes.Equal(dst, cachedSecret) {
			result = "the secret"
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	fmt.Printf("RESULT %s\n", result)
}

// testBinary is a copy of the test that every user may start.
func testBinary(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "kmsd-cache-test")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	path := dir + "/test"
	if err := os.WriteFile(path, self, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}
