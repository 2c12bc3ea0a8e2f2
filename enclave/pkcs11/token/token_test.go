//go:build cgo

package token

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha512"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/kmsd-project/kmsd/enclave"
	driver "github.com/kmsd-project/kmsd/enclave/pkcs11"
	"github.com/kmsd-project/kmsd/enclave/pkcs11/pkcs11test"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

var aad = enclave.SlotAAD([16]byte{12})

func auth() enclave.Auth { return enclave.Auth{Secret: []byte(pkcs11test.PIN)} }

// opened returns a driver in this very process that is logged in: tests of this package look behind it.
func opened(t *testing.T, h *pkcs11test.SoftHSM, guard driver.Guard) *Token {
	t.Helper()
	d, err := Open(t.Context(), driver.Spec{Module: h.Module, Token: pkcs11test.Label, Guard: guard})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	if err := d.Login(t.Context(), auth()); err != nil {
		t.Fatal(err)
	}
	return d
}

// within runs f with a session of the driver.
func within(t *testing.T, d *Token, f func(*connection, pkcs11.SessionHandle) error) {
	t.Helper()
	if err := d.do(t.Context(), f); err != nil {
		t.Fatal(err)
	}
}

// plant puts a secret key into the token that somebody else knows.
func plant(t *testing.T, d *Token, id []byte, keyType uint, value []byte) {
	t.Helper()
	within(t, d, func(c *connection, s pkcs11.SessionHandle) error {
		_, err := c.module.CreateObject(s, []*pkcs11.Attribute{
			pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, keyType),
			pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true), pkcs11.NewAttribute(pkcs11.CKA_ID, id),
			pkcs11.NewAttribute(pkcs11.CKA_ENCRYPT, true), pkcs11.NewAttribute(pkcs11.CKA_DECRYPT, true), pkcs11.NewAttribute(pkcs11.CKA_SIGN, true),
			pkcs11.NewAttribute(pkcs11.CKA_VALUE, value),
		})
		return err
	})
}

// known returns a resident key whose secret the test knows.
func known(t *testing.T, d *Token, a keyspec.Algorithm, keyType uint, value []byte) enclave.Blob {
	t.Helper()
	k := &driver.Key{Algorithm: a, Serial: d.Info().Binding, ID: make([]byte, driver.IDSize)}
	rand.Read(k.ID)
	k.BindTo(nil)
	plant(t, d, k.ID, keyType, value)
	b, err := k.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// What the token encrypts, Go decrypts, and the other way round: the nonce has 12 bytes and not crypto11's 16, and the tag 16.
func TestGCMIsTheOneOfGo(t *testing.T) {
	h := pkcs11test.New(t)
	d := opened(t, h, "")
	value := make([]byte, 32)
	rand.Read(value)
	b := known(t, d, keyspec.AES256GCM, pkcs11.CKK_AES, value)
	block, err := aes.NewCipher(value)
	if err != nil {
		t.Fatal(err)
	}
	gcm, err := cipher.NewGCM(block)
	if err != nil {
		t.Fatal(err)
	}
	for _, size := range []int{0, 1, 16, 60 << 10} {
		plaintext, nonce := make([]byte, size), make([]byte, 12)
		rand.Read(plaintext)
		rand.Read(nonce)
		for _, aad := range [][]byte{nil, []byte("x")} {
			want := gcm.Seal(nil, nonce, plaintext, aad)
			got, err := d.Do(t.Context(), b, enclave.Op{Usage: keyspec.Encrypt, Input: plaintext, Nonce: nonce, AAD: aad}, nil)
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("encrypt %d bytes: %v", size, err)
			}
			got, err = d.Do(t.Context(), b, enclave.Op{Usage: keyspec.Decrypt, Input: want, Nonce: nonce, AAD: aad}, nil)
			if err != nil || !bytes.Equal(got, plaintext) {
				t.Errorf("decrypt %d bytes: %v", size, err)
			}
		}
	}
	for _, short := range []int{0, 15} {
		if _, err := d.Do(t.Context(), b, enclave.Op{Usage: keyspec.Decrypt, Input: make([]byte, short), Nonce: make([]byte, 12)}, nil); !errors.Is(err, enclave.ErrDecryption) {
			t.Errorf("ciphertext of %d bytes: %v", short, err)
		}
	}
}

func TestHMACIsTheOneOfGo(t *testing.T) {
	h := pkcs11test.New(t)
	d := opened(t, h, "")
	value := make([]byte, 64)
	rand.Read(value)
	b := known(t, d, keyspec.HMACSHA512, pkcs11.CKK_GENERIC_SECRET, value)
	for _, message := range [][]byte{nil, []byte("x"), make([]byte, 60<<10)} {
		mac := hmac.New(sha512.New, value)
		mac.Write(message)
		got, err := d.Do(t.Context(), b, enclave.Op{Usage: keyspec.MAC, Input: message}, nil)
		if err != nil || !bytes.Equal(got, mac.Sum(nil)) {
			t.Errorf("MAC of %d bytes: %v", len(message), err)
		}
	}
}

// The key of a slot can do nothing but encrypt and decrypt, and cannot leave.
func TestKeyOfASlotIsConfined(t *testing.T) {
	h := pkcs11test.New(t)
	for guard, may := range map[driver.Guard][]uint{driver.Wrapped: {pkcs11.CKA_ENCRYPT, pkcs11.CKA_DECRYPT}, driver.Agreed: {pkcs11.CKA_DERIVE}} {
		d := opened(t, h, guard)
		blob, err := d.Wrap(t.Context(), make([]byte, enclave.SecretSize), aad)
		if err != nil {
			t.Fatal(err)
		}
		slot, err := driver.DecodeSlot(blob)
		if err != nil {
			t.Fatal(err)
		}
		class, all := uint(pkcs11.CKO_SECRET_KEY), []uint{pkcs11.CKA_ENCRYPT, pkcs11.CKA_DECRYPT, pkcs11.CKA_SIGN, pkcs11.CKA_VERIFY, pkcs11.CKA_WRAP, pkcs11.CKA_UNWRAP, pkcs11.CKA_DERIVE}
		if guard == driver.Agreed {
			class, all = pkcs11.CKO_PRIVATE_KEY, []uint{pkcs11.CKA_DECRYPT, pkcs11.CKA_SIGN, pkcs11.CKA_UNWRAP, pkcs11.CKA_DERIVE}
		}
		within(t, d, func(c *connection, s pkcs11.SessionHandle) error {
			key, err := c.handle(s, keyObject(class, slot.ID))
			if err != nil {
				return err
			}
			for _, a := range all {
				got, err := c.module.GetAttributeValue(s, key, []*pkcs11.Attribute{pkcs11.NewAttribute(a, nil)})
				if err != nil {
					return err
				}
				if want := slices.Contains(may, a); (got[0].Value[0] != 0) != want {
					t.Errorf("%s: attribute %#x is %v", guard, a, got[0].Value)
				}
			}
			private, err := c.module.GetAttributeValue(s, key, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, nil)})
			if err != nil || private[0].Value[0] == 0 {
				t.Errorf("%s: the key can be seen without a login: %v", guard, err)
			}
			_, err = c.module.GetAttributeValue(s, key, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_VALUE, nil)})
			if !isOneOf(err, pkcs11.CKR_ATTRIBUTE_SENSITIVE, pkcs11.CKR_ATTRIBUTE_TYPE_INVALID) {
				t.Errorf("%s: the value can be read: %v", guard, err)
			}
			return nil
		})
		d.Close()
	}
}

// Somebody puts another key under the CKA_ID of the slot's, beside it or in its place. And the slot is damaged, with a checksum that fits.
func TestAnotherKeyAndADamagedSlot(t *testing.T) {
	h := pkcs11test.New(t)
	for _, guard := range []driver.Guard{driver.Wrapped, driver.Agreed} {
		t.Run(string(guard), func(t *testing.T) {
			d := opened(t, h, guard)
			blob, err := d.Wrap(t.Context(), bytes.Repeat([]byte{5}, enclave.SecretSize), aad)
			if err != nil {
				t.Fatal(err)
			}
			unwrap := func(b enclave.Blob) error {
				return d.Unwrap(t.Context(), b, aad, auth(), make([]byte, enclave.SecretSize))
			}
			slot, err := driver.DecodeSlot(bytes.Clone(blob))
			if err != nil {
				t.Fatal(err)
			}
			for _, part := range [][]byte{slot.Sealed, slot.Nonce, slot.Point} {
				if len(part) == 0 {
					continue
				}
				part[len(part)-1] ^= 1
				damaged, err := slot.Encode()
				if err != nil {
					t.Fatal(err)
				}
				if err := unwrap(damaged); !errors.Is(err, enclave.ErrCorrupt) {
					t.Errorf("damaged: %v", err)
				}
				part[len(part)-1] ^= 1
			}
			if err := unwrap(blob); err != nil {
				t.Fatal(err)
			}
			another := func() {
				if guard == driver.Wrapped {
					plant(t, d, slot.ID, pkcs11.CKK_AES, make([]byte, 32))
					return
				}
				within(t, d, func(c *connection, s pkcs11.SessionHandle) error {
					a, err := algorithmOf(keyspec.ECDHP256)
					if err != nil {
						return err
					}
					may, err := a.attributes([]keyspec.Usage{keyspec.Agree})
					if err != nil {
						return err
					}
					return c.make(s, a, may, &driver.Key{ID: slot.ID})
				})
			}
			another()
			if err := unwrap(blob); !errors.Is(err, enclave.ErrMisconfigured) {
				t.Errorf("two keys with one CKA_ID: %v", err)
			}
			if err := d.Forget(t.Context(), blob); err != nil {
				t.Fatal(err)
			}
			if err := unwrap(blob); !errors.Is(err, enclave.ErrReplaced) {
				t.Errorf("no key: %v", err)
			}
			if err := d.Login(t.Context(), auth()); err != nil {
				t.Fatal(err)
			}
			another()
			if err := unwrap(blob); !errors.Is(err, enclave.ErrReplaced) {
				t.Errorf("another key in its place: %v", err)
			}
		})
	}
	if h.Objects(t) != 3 { // the other keys, one of them with its public half
		t.Errorf("%d objects are left", h.Objects(t))
	}
}

// Two drivers in one process, as where systemd starts one helper for all connections: a wrong PIN for one token leaves another alone, and
// closing one driver leaves the library to the other.
func TestTwoDriversInOneProcess(t *testing.T) {
	h := pkcs11test.New(t)
	h.AddToken(t, "other")
	d := opened(t, h, "")
	other, err := Open(t.Context(), driver.Spec{Module: h.Module, Token: "other"})
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if err := other.Login(t.Context(), enclave.Auth{Secret: []byte("wrong one")}); !errors.Is(err, enclave.ErrAuth) {
		t.Errorf("wrong PIN: %v", err)
	}
	blob, err := d.Wrap(t.Context(), make([]byte, enclave.SecretSize), aad)
	if err != nil {
		t.Fatalf("after a wrong PIN for the other token: %v", err)
	}
	missing, err := Open(t.Context(), driver.Spec{Module: h.Module, Token: "missing"})
	if err != nil {
		t.Fatal(err)
	}
	if health := missing.Health(t.Context()); health.State != enclave.Absent {
		t.Errorf("a token that is not there: %+v", health)
	}
	if err := errors.Join(missing.Close(), other.Close()); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Wrap(t.Context(), make([]byte, enclave.SecretSize), aad); err != nil {
		t.Errorf("after the others were closed: %v", err)
	}
	// A second driver of the same token is locked until it has the PIN itself, although the module is logged in for the whole process.
	second, err := Open(t.Context(), driver.Spec{Module: h.Module, Token: pkcs11test.Label})
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	if _, err := second.Wrap(t.Context(), make([]byte, enclave.SecretSize), aad); !errors.Is(err, enclave.ErrLocked) {
		t.Errorf("wrap by the second driver: %v", err)
	}
	// It logs out and in again, while the first is at work; and the first goes on when it has gone.
	key, _, err := d.Generate(t.Context(), enclave.Spec{ID: [16]byte{1}, Algorithm: keyspec.AES128GCM, Usages: []keyspec.Usage{keyspec.Encrypt, keyspec.Decrypt}})
	if err != nil {
		t.Fatal(err)
	}
	sealed, err := d.Do(t.Context(), key, enclave.Op{Usage: keyspec.Encrypt, Input: []byte("x"), Nonce: make([]byte, 12)}, nil)
	if err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				// Who is hit twice is told to try again, and nothing worse.
				_, err := d.Do(t.Context(), key, enclave.Op{Usage: keyspec.Decrypt, Input: sealed, Nonce: make([]byte, 12)}, nil)
				if err != nil && !errors.Is(err, enclave.ErrBusy) {
					t.Errorf("the first driver: %v", err)
					return
				}
			}
		})
	}
	for range 10 {
		if err := second.Unwrap(t.Context(), blob, aad, auth(), make([]byte, enclave.SecretSize)); err != nil {
			t.Errorf("unwrap by the second driver: %v", err)
		}
		time.Sleep(20 * time.Millisecond)
	}
	second.Close()
	time.Sleep(5 * time.Millisecond)
	close(stop)
	wg.Wait()
	if _, err := d.Wrap(t.Context(), make([]byte, enclave.SecretSize), aad); err != nil {
		t.Errorf("after the second driver was closed: %v", err)
	}
	d.Close()
	if len(process.logins) != 0 {
		t.Errorf("logins that are left: %v", process.logins)
	}
}

func TestModulesThatAreRefused(t *testing.T) {
	h := pkcs11test.New(t)
	content, err := os.ReadFile(h.Module)
	if err != nil {
		t.Fatal(err)
	}
	for name, place := range map[string]func(t *testing.T, dir string) string{
		"relative":      func(*testing.T, string) string { return "libsofthsm2.so" },
		"missing":       func(_ *testing.T, dir string) string { return filepath.Join(dir, "missing.so") },
		"directory":     func(_ *testing.T, dir string) string { return dir },
		"no module":     func(t *testing.T, dir string) string { return written(t, dir, []byte("text"), 0o644) },
		"for the group": func(t *testing.T, dir string) string { return written(t, dir, content, 0o664) },
		"for all":       func(t *testing.T, dir string) string { return written(t, dir, content, 0o646) },
		"in a directory for all": func(t *testing.T, dir string) string {
			path := written(t, dir, content, 0o644)
			if err := os.Chmod(dir, 0o777); err != nil {
				t.Fatal(err)
			}
			return path
		},
		"pipe": func(t *testing.T, dir string) string {
			if err := syscall.Mkfifo(filepath.Join(dir, "pipe"), 0o644); err != nil {
				t.Fatal(err)
			}
			return filepath.Join(dir, "pipe")
		},
		"link to one for all": func(t *testing.T, dir string) string {
			if err := os.Symlink(written(t, dir, content, 0o646), filepath.Join(dir, "link.so")); err != nil {
				t.Fatal(err)
			}
			return filepath.Join(dir, "link.so")
		},
		"of another user": func(t *testing.T, dir string) string {
			if os.Geteuid() != 0 {
				return filepath.Join(dir, "missing.so") // giving a file away takes root
			}
			path := written(t, dir, content, 0o644)
			if err := os.Chown(path, 65534, 65534); err != nil {
				t.Fatal(err)
			}
			return path
		},
	} {
		t.Run(name, func(t *testing.T) {
			d, err := Open(t.Context(), driver.Spec{Module: place(t, t.TempDir()), Token: pkcs11test.Label})
			if err == nil {
				err = d.Login(t.Context(), auth())
				d.Close()
			}
			if !errors.Is(err, enclave.ErrMisconfigured) {
				t.Errorf("%v", err)
			}
		})
	}
	d, err := Open(t.Context(), driver.Spec{Module: written(t, t.TempDir(), content, 0o644), Token: pkcs11test.Label})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if err := d.Login(t.Context(), auth()); err != nil {
		t.Errorf("a good copy: %v", err)
	}
}

// written puts a file there with a mode that the umask does not narrow.
func written(t *testing.T, dir string, content []byte, mode os.FileMode) string {
	t.Helper()
	path := filepath.Join(dir, "module.so")
	if err := os.WriteFile(path, content, mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestGate(t *testing.T) {
	g := newGate(3)
	for range 3 {
		if err := g.enter(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	late, cancel := context.WithCancel(t.Context())
	cancel()
	if err := g.enter(late); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	g.leave()
	alone := make(chan error)
	leave := make(chan struct{})
	go func() {
		alone <- g.enterAlone(t.Context())
		<-leave
		g.leaveAlone()
		alone <- nil
	}()
	select {
	case <-alone:
		t.Fatal("alone with two others")
	default:
	}
	g.leave()
	g.leave()
	if err := <-alone; err != nil {
		t.Fatal(err)
	}
	close(leave)
	<-alone
	// What a caller who gave up had collected is given back.
	if err := g.enter(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	gone := make(chan error)
	go func() { gone <- g.enterAlone(ctx) }()
	cancel()
	if err := <-gone; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	g.leave()
	if err := g.enterAlone(t.Context()); err != nil {
		t.Fatal(err)
	}
	g.leaveAlone()
}

// As with the helper, but where the race detector looks: 32 use the driver while the token goes away and comes back.
func TestManyAtOnceWhileTheTokenGoes(t *testing.T) {
	h := pkcs11test.New(t)
	d := opened(t, h, "")
	blob, err := d.Wrap(t.Context(), make([]byte, enclave.SecretSize), aad)
	if err != nil {
		t.Fatal(err)
	}
	key, _, err := d.Generate(t.Context(), enclave.Spec{ID: [16]byte{1}, Algorithm: keyspec.AES128GCM, Usages: []keyspec.Usage{keyspec.Encrypt}})
	if err != nil {
		t.Fatal(err)
	}
	expected := func(err error) bool {
		return err == nil || errors.Is(err, enclave.ErrAbsent) || errors.Is(err, enclave.ErrLocked) || errors.Is(err, enclave.ErrBusy)
	}
	var wg sync.WaitGroup
	for i := range 32 {
		wg.Go(func() {
			for range 20 {
				var err error
				switch i % 8 {
				case 0:
					err = d.Unwrap(t.Context(), blob, aad, auth(), make([]byte, enclave.SecretSize))
				case 1:
					d.Health(t.Context())
					d.Info()
				case 2:
					_, err = d.Mechanisms(t.Context())
				default:
					_, err = d.Do(t.Context(), key, enclave.Op{Usage: keyspec.Encrypt, Input: []byte("x"), Nonce: make([]byte, 12)}, nil)
				}
				if !expected(err) {
					t.Errorf("%d: %v", i, err)
				}
			}
		})
	}
	for range 2 {
		putBack := h.Remove(t)
		time.Sleep(20 * time.Millisecond)
		putBack()
		time.Sleep(20 * time.Millisecond)
	}
	wg.Wait()
	time.Sleep(pause)
	if err := d.Unwrap(t.Context(), blob, aad, auth(), make([]byte, enclave.SecretSize)); err != nil {
		t.Errorf("after that: %v", err)
	}
}
