// Package enclavetest is the one conformance suite that every enclave driver passes, and a fake for the tests of those who use
// enclaves. It must not be imported outside tests.
package enclavetest

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/enclave"
)

// Device is one device, real or simulated, as the suite sees it.
type Device struct {
	// Open returns a new driver for the device, able to Wrap. The suite closes it.
	Open func(t *testing.T) enclave.Enclave
	// Auth is what Unwrap needs; empty for a device that asks for nothing.
	Auth enclave.Auth
	// Wrong are Auths that must be refused with ErrAuth. At least one for a device that wants an Auth.
	Wrong []enclave.Auth
}

// callTimeout is the deadline of every call of the suite; a driver that needs more for a call hangs.
const callTimeout = 30 * time.Second

// Run runs the suite. newDevice makes a fresh device for every test.
func Run(t *testing.T, newDevice func(t *testing.T) Device) {
	for _, test := range []struct {
		name string
		run  func(*testing.T, *suite)
	}{
		{"Info", testInfo},
		{"RoundTrip", testRoundTrip},
		{"AAD", testAAD},
		{"DamagedBlob", testDamagedBlob},
		{"Auth", testAuth},
		{"Sizes", testSizes},
		{"Context", testContext},
		{"Concurrent", testConcurrent},
		{"Health", testHealth},
		{"Close", testClose},
		{"Forget", testForget},
	} {
		t.Run(test.name, func(t *testing.T) {
			d := newDevice(t)
			s := &suite{device: d, enclave: d.Open(t), ctx: t.Context()}
			t.Cleanup(func() { s.enclave.Close() })
			test.run(t, s)
		})
	}
}

// Fuzz lets the fuzzer damage blobs of e; no mutation may panic, open, or answer anything but that it is damaged, of another release, or
// of another device. The last is what a worker of the fuzzer answers to the blobs of the others.
func Fuzz(f *testing.F, e enclave.Enclave, a enclave.Auth) {
	blob, err := e.Wrap(context.Background(), newSecret(), aad)
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte(blob), aad)
	f.Add([]byte{}, []byte{})
	f.Add([]byte(blob[:len(blob)/2]), aad)
	f.Add(bytes.Repeat([]byte{0xff}, len(blob)), aad)
	f.Fuzz(func(t *testing.T, mutated, boundTo []byte) {
		dst := make([]byte, enclave.SecretSize)
		err := e.Unwrap(context.Background(), mutated, boundTo, a, dst)
		switch {
		case err == nil && bytes.Equal(mutated, blob) && bytes.Equal(boundTo, aad):
		case err == nil:
			t.Fatal("a blob that was never made opens")
		case !isOneOf(err, []error{enclave.ErrCorrupt, enclave.ErrUnsupported, enclave.ErrReplaced, enclave.ErrAuth}):
			t.Fatalf("error %v", err)
		case !bytes.Equal(dst, make([]byte, len(dst))):
			t.Fatal("the destination is not zero after an error")
		}
	})
}

type suite struct {
	device  Device
	enclave enclave.Enclave
	ctx     context.Context
}

var aad = enclave.SlotAAD([16]byte{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16})

func newSecret() []byte {
	s := make([]byte, enclave.SecretSize)
	rand.Read(s)
	return s
}

func (s *suite) wrap(t *testing.T, secret []byte) enclave.Blob {
	t.Helper()
	ctx, cancel := context.WithTimeout(s.ctx, callTimeout)
	defer cancel()
	b, err := s.enclave.Wrap(ctx, secret, aad)
	if err != nil {
		t.Fatalf("wrap: %v", err)
	}
	return b
}

func (s *suite) unwrap(e enclave.Enclave, b enclave.Blob, aad []byte, a enclave.Auth) ([]byte, error) {
	ctx, cancel := context.WithTimeout(s.ctx, callTimeout)
	defer cancel()
	dst := make([]byte, enclave.SecretSize)
	err := e.Unwrap(ctx, b, aad, a, dst)
	return dst, err
}

// opens fails the test unless the blob opens to the secret.
func (s *suite) opens(t *testing.T, e enclave.Enclave, b enclave.Blob, secret []byte) {
	t.Helper()
	got, err := s.unwrap(e, b, aad, s.device.Auth)
	if err != nil {
		t.Fatalf("unwrap: %v", err)
	}
	if !bytes.Equal(got, secret) {
		t.Fatal("unwrap returned another secret")
	}
}

// refuses fails the test unless the blob is refused with one of the sentinels and nothing was written.
func (s *suite) refuses(t *testing.T, b enclave.Blob, aad []byte, a enclave.Auth, want ...error) {
	t.Helper()
	got, err := s.unwrap(s.enclave, b, aad, a)
	if !isOneOf(err, want) {
		t.Fatalf("unwrap: %v, want %v", err, want)
	}
	if !bytes.Equal(got, make([]byte, len(got))) {
		t.Fatal("the destination is not zero after an error")
	}
}

func isOneOf(err error, want []error) bool {
	for _, w := range want {
		if errors.Is(err, w) {
			return true
		}
	}
	return false
}

func testInfo(t *testing.T, s *suite) {
	info := s.enclave.Info()
	if info.Kind == "" || info.Level == "" {
		t.Errorf("info %+v says too little", info)
	}
	if wants := len(s.device.Auth.Secret) > 0 || len(s.device.Auth.Shares) > 0; info.NeedsYou != wants {
		t.Errorf("NeedsYou is %v, want %v", info.NeedsYou, wants)
	}
}

func testRoundTrip(t *testing.T, s *suite) {
	secret := newSecret()
	kept := bytes.Clone(secret)
	a, b := s.wrap(t, secret), s.wrap(t, secret)
	if !bytes.Equal(secret, kept) {
		t.Error("wrap changed the secret of its caller")
	}
	if bytes.Equal(a, b) {
		t.Error("two blobs of one secret are equal")
	}
	if len(a) > enclave.MaxBlob {
		t.Errorf("blob of %d bytes", len(a))
	}
	if bytes.Contains(a, secret[:8]) {
		t.Error("the blob shows the secret")
	}
	s.opens(t, s.enclave, a, secret)
	s.opens(t, s.enclave, b, secret)
	s.opens(t, s.enclave, a, secret) // a second time

	other := s.device.Open(t)
	defer other.Close()
	s.opens(t, other, a, secret)
	if err := s.enclave.Close(); err != nil {
		t.Fatal(err)
	}
	s.opens(t, other, b, secret)
}

func testAAD(t *testing.T, s *suite) {
	secret := newSecret()
	b := s.wrap(t, secret)
	for _, wrong := range [][]byte{nil, {}, aad[:len(aad)-1], append(bytes.Clone(aad), 0), bytes.Repeat([]byte{0}, len(aad))} {
		s.refuses(t, b, wrong, s.device.Auth, enclave.ErrCorrupt)
	}
	s.opens(t, s.enclave, b, secret)
}

func testDamagedBlob(t *testing.T, s *suite) {
	secret := newSecret()
	b := s.wrap(t, secret)
	for i := range b {
		flipped := bytes.Clone(b)
		flipped[i] ^= 1 << (i % 8)
		s.refuses(t, flipped, aad, s.device.Auth, enclave.ErrCorrupt)
	}
	for n := range b {
		s.refuses(t, b[:n], aad, s.device.Auth, enclave.ErrCorrupt)
	}
	s.refuses(t, nil, aad, s.device.Auth, enclave.ErrCorrupt)
	s.refuses(t, append(bytes.Clone(b), 0), aad, s.device.Auth, enclave.ErrCorrupt)
	s.refuses(t, make(enclave.Blob, enclave.MaxBlob+1), aad, s.device.Auth, enclave.ErrCorrupt)
	// Halves of two good blobs.
	c := s.wrap(t, secret)
	s.refuses(t, append(bytes.Clone(b[:len(b)/2]), c[len(c)/2:]...), aad, s.device.Auth, enclave.ErrCorrupt)
	s.opens(t, s.enclave, b, secret)
}

func testAuth(t *testing.T, s *suite) {
	secret := newSecret()
	b := s.wrap(t, secret)
	if !s.enclave.Info().NeedsYou {
		s.opens(t, s.enclave, b, secret)
		return
	}
	if len(s.device.Wrong) == 0 {
		t.Fatal("the device names no wrong Auth")
	}
	s.refuses(t, b, aad, enclave.Auth{}, enclave.ErrLocked)
	for _, wrong := range s.device.Wrong {
		s.refuses(t, b, aad, wrong, enclave.ErrAuth, enclave.ErrLockedOut)
	}
	s.opens(t, s.enclave, b, secret)
	s.refuses(t, b, aad, enclave.Auth{}, enclave.ErrLocked) // the right one is not remembered
}

func testSizes(t *testing.T, s *suite) {
	for _, n := range []int{0, 1, enclave.SecretSize - 1, enclave.SecretSize + 1, 1 << 16} {
		if _, err := s.enclave.Wrap(s.ctx, make([]byte, n), aad); !errors.Is(err, enclave.ErrUnsupported) {
			t.Errorf("wrap of %d bytes: %v", n, err)
		}
	}
	if _, err := s.enclave.Wrap(s.ctx, newSecret(), make([]byte, enclave.MaxAAD+1)); !errors.Is(err, enclave.ErrUnsupported) {
		t.Errorf("wrap with too much associated data: %v", err)
	}
	b := s.wrap(t, newSecret())
	for _, n := range []int{0, enclave.SecretSize - 1, enclave.SecretSize + 1} {
		if err := s.enclave.Unwrap(s.ctx, b, aad, s.device.Auth, make([]byte, n)); !errors.Is(err, enclave.ErrUnsupported) {
			t.Errorf("unwrap into %d bytes: %v", n, err)
		}
	}
}

func testContext(t *testing.T, s *suite) {
	secret := newSecret()
	b := s.wrap(t, secret)
	cancelled, cancel := context.WithCancel(s.ctx)
	cancel()
	late, cancelLate := context.WithDeadline(s.ctx, time.Now().Add(-time.Second))
	defer cancelLate()
	for _, ctx := range []context.Context{cancelled, late} {
		start := time.Now()
		if _, err := s.enclave.Wrap(ctx, secret, aad); !errors.Is(err, ctx.Err()) {
			t.Errorf("wrap: %v, want %v", err, ctx.Err())
		}
		dst := make([]byte, enclave.SecretSize)
		if err := s.enclave.Unwrap(ctx, b, aad, s.device.Auth, dst); !errors.Is(err, ctx.Err()) {
			t.Errorf("unwrap: %v, want %v", err, ctx.Err())
		}
		if !bytes.Equal(dst, make([]byte, len(dst))) {
			t.Error("unwrap wrote after its context was done")
		}
		s.enclave.Health(ctx)
		if took := time.Since(start); took > time.Second {
			t.Errorf("three calls whose context was done took %v", took)
		}
	}
	s.opens(t, s.enclave, b, secret)
}

func testConcurrent(t *testing.T, s *suite) {
	secret := newSecret()
	shared := s.wrap(t, secret)
	var wg sync.WaitGroup
	for i := range 32 {
		wg.Go(func() {
			own := newSecret()
			var b enclave.Blob
			if i%4 == 0 {
				var err error
				ctx, cancel := context.WithTimeout(s.ctx, callTimeout)
				defer cancel()
				if b, err = s.enclave.Wrap(ctx, own, aad); err != nil {
					t.Errorf("wrap: %v", err)
					return
				}
				if got, err := s.unwrap(s.enclave, b, aad, s.device.Auth); err != nil || !bytes.Equal(got, own) {
					t.Errorf("own blob: %v", err)
				}
			}
			if got, err := s.unwrap(s.enclave, shared, aad, s.device.Auth); err != nil || !bytes.Equal(got, secret) {
				t.Errorf("shared blob: %v", err)
			}
			s.enclave.Health(s.ctx)
		})
	}
	wg.Wait()
}

func testHealth(t *testing.T, s *suite) {
	s.wrap(t, newSecret())
	ctx, cancel := context.WithTimeout(s.ctx, callTimeout)
	defer cancel()
	if h := s.enclave.Health(ctx); h.State != enclave.Ready {
		t.Errorf("health %+v", h)
	}
}

func testClose(t *testing.T, s *suite) {
	b := s.wrap(t, newSecret())
	for range 2 {
		if err := s.enclave.Close(); err != nil {
			t.Fatalf("close: %v", err)
		}
	}
	s.refuses(t, b, aad, s.device.Auth, enclave.ErrAbsent)
	if _, err := s.enclave.Wrap(s.ctx, newSecret(), aad); !errors.Is(err, enclave.ErrAbsent) {
		t.Errorf("wrap after close: %v", err)
	}
	if h := s.enclave.Health(s.ctx); h.State == enclave.Ready {
		t.Errorf("health after close: %+v", h)
	}
	s.enclave.Info() // must not panic
}

func testForget(t *testing.T, s *suite) {
	f, ok := s.enclave.(enclave.Forgetter)
	if !ok {
		return // nothing to forget
	}
	secret := newSecret()
	gone, kept := s.wrap(t, newSecret()), s.wrap(t, secret)
	for range 2 {
		if err := f.Forget(s.ctx, gone); err != nil {
			t.Fatalf("forget: %v", err)
		}
	}
	s.refuses(t, gone, aad, s.device.Auth, enclave.ErrReplaced, enclave.ErrCorrupt)
	s.opens(t, s.enclave, kept, secret)
	if err := f.Forget(s.ctx, kept[:4]); !errors.Is(err, enclave.ErrCorrupt) {
		t.Errorf("forgetting a damaged blob: %v", err)
	}
}
