package tpm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/kmsd-project/kmsd/enclave"
)

// swtpm answers TPM_RC_RETRY when an object under dictionary attack protection is used first after a reset.
func TestRetryAfterReset(t *testing.T) {
	s := startSimulator(t)
	var retries atomic.Int32
	d := s.openWith(Config{PIN: []byte("4711")}, tapped(nil, func(_, answer []byte) []byte {
		if responseCode(answer) == tpm2.TPMRCRetry {
			retries.Add(1)
		}
		return answer
	}))
	blob, secret := enrol(t, d, pin("4711"))
	retries.Store(0)
	s.kill()
	s.start()
	opens(t, d, blob, pin("4711"), secret)
	if retries.Load() == 0 {
		t.Error("the TPM did not ask for a retry, so this test shows nothing")
	}
}

// The same command goes out again, a bounded number of times.
func TestRetryCodes(t *testing.T) {
	t.Parallel()
	for _, rc := range []tpm2.TPMRC{tpm2.TPMRCRetry, tpm2.TPMRCYielded, tpm2.TPMRCTesting, tpm2.TPMRCNVRate} {
		t.Run(rc.Error()[:12], func(t *testing.T) {
			t.Parallel()
			s := startSimulator(t)
			var left atomic.Int32
			var mu sync.Mutex
			var refused []byte
			d := s.openWith(Config{}, tapped(func(command []byte) []byte {
				mu.Lock()
				defer mu.Unlock()
				if left.Load() > 0 && commandCode(command) == tpm2.TPMCCUnseal {
					if refused != nil && !bytes.Equal(refused, command) {
						t.Error("another command was sent instead of the same again")
					}
					refused = bytes.Clone(command)
					left.Add(-1)
					return response(rc)
				}
				return nil
			}, nil))
			blob, secret := enrol(t, d, enclave.Auth{})
			left.Store(5)
			opens(t, d, blob, enclave.Auth{}, secret)
			if left.Load() != 0 {
				t.Error("no retry")
			}
			if rc != tpm2.TPMRCRetry {
				return // giving up takes its time, and is the same for all
			}
			mu.Lock()
			refused = nil
			mu.Unlock()
			left.Store(1 << 20)
			start := time.Now()
			if _, err := unwrap(t, d, blob, enclave.Auth{}); !errors.Is(err, enclave.ErrBusy) {
				t.Errorf("endless %v: %v", rc, err)
			}
			if took := time.Since(start); took < maxWait || took > 2*maxWait {
				t.Errorf("gave up after %v", took)
			}
			left.Store(0)
			opens(t, d, blob, enclave.Auth{}, secret)
			if n := s.count(tpm2.TPMHTHMACSession); n != 0 {
				t.Errorf("%d sessions leaked", n)
			}
		})
	}
}

// A hundred refusals by policy use no session up. go-tpm's own policy callback would fail here at the fourth.
func TestPolicyFailuresLeakNothing(t *testing.T) {
	t.Parallel()
	s := startSimulator(t)
	d := s.open(Config{PCRs: []int{7, 16}})
	blob, secret := enrol(t, d, enclave.Auth{})
	s.extend(16)
	for range 100 {
		if _, err := unwrap(t, d, blob, enclave.Auth{}); !errors.Is(err, enclave.ErrPolicy) {
			t.Fatal(err)
		}
	}
	signed := s.openSigned(t)
	for range 100 {
		if _, err := unwrap(t, signed.driver, signed.blob, enclave.Auth{}); !errors.Is(err, enclave.ErrPolicy) {
			t.Fatal(err)
		}
	}
	if n := s.count(tpm2.TPMHTHMACSession); n != 0 {
		t.Errorf("%d sessions are open", n)
	}
	if n := s.count(tpm2.TPMHTTransient); n != 0 {
		t.Errorf("%d objects are loaded", n)
	}
	s.other(func(b bare) {
		if _, err := (tpm2.PCRReset{PCRHandle: tpm2.AuthHandle{Handle: 16, Auth: tpm2.PasswordAuth(nil)}}).Execute(b); err != nil {
			t.Fatal(err)
		}
	})
	opens(t, d, blob, enclave.Auth{}, secret)
}

// Whatever other programs left loaded, the TPM's three places are found free.
func TestSlotExhaustion(t *testing.T) {
	s := startSimulator(t)
	d := s.open(Config{})
	blob, secret := enrol(t, d, enclave.Auth{})
	fill := func(b bare) {
		for n := 0; ; n++ {
			_, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHOwner, InPublic: tpm2.New2B(tpm2.ECCSRKTemplate)}.Execute(b)
			if isOneOf(err, tpm2.TPMRCObjectMemory) && n > 0 {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		for n := 0; ; n++ {
			_, _, err := tpm2.HMACSession(b, tpm2.TPMAlgSHA256, 16)
			if isOneOf(err, tpm2.TPMRCSessionMemory) && n > 0 {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	s.other(fill)
	opens(t, d, blob, enclave.Auth{}, secret)
	s.other(fill)
	if h := d.Health(limited(t)); h.State != enclave.Ready {
		t.Errorf("health %+v", h)
	}
	s.other(fill)
	if _, err := d.IncrementCounter(limited(t), [16]byte{1}); err != nil {
		t.Error(err)
	}
}

// The TPM loses its power before each command in turn, and comes back a moment later. The call succeeds.
func TestKilledMidCall(t *testing.T) {
	t.Parallel()
	s := startSimulator(t)
	var sent, killAt atomic.Int32
	var restarted sync.WaitGroup
	var restarts atomic.Int32
	d := s.openWith(Config{}, tapped(func(command []byte) []byte {
		if sent.Add(1) == killAt.Load() {
			s.kill()
			restarts.Add(1)
			restarted.Go(func() {
				time.Sleep(50 * time.Millisecond)
				s.start()
			})
		}
		return nil
	}, nil))
	blob, secret := enrol(t, d, enclave.Auth{})
	// Storage key (2), load, session, unseal, 2 flushes.
	const commands = 7
	for at := int32(1); at <= commands; at++ {
		sent.Store(0)
		killAt.Store(at)
		opens(t, d, blob, enclave.Auth{}, secret)
		killAt.Store(0)
		restarted.Wait()
	}
	if restarts.Load() < commands-2 {
		t.Errorf("the TPM was killed %d times only", restarts.Load())
	}
}

// A PIN that may have reached the TPM is not sent a second time.
func TestKilledWithPIN(t *testing.T) {
	s := startSimulator(t)
	var attempts, kill atomic.Int32
	d := s.openWith(Config{PIN: []byte("4711")}, tapped(nil, func(command, answer []byte) []byte {
		if commandCode(command) == tpm2.TPMCCUnseal && responseCode(answer) != tpm2.TPMRCRetry {
			attempts.Add(1)
			if kill.CompareAndSwap(1, 0) {
				s.kill()
				s.start()
				return answer[:4] // the answer is lost on its way
			}
		}
		return answer
	}))
	blob, secret := enrol(t, d, pin("4711"))
	attempts.Store(0)
	kill.Store(1)
	if _, err := unwrap(t, d, blob, pin("4711")); !errors.Is(err, enclave.ErrAbsent) {
		t.Error(err)
	}
	if n := attempts.Load(); n != 1 {
		t.Errorf("%d attempts", n)
	}
	opens(t, d, blob, pin("4711"), secret)
}

// A TPM that is gone is absent within two seconds, and used by the next call when it is back.
func TestGoneAndBack(t *testing.T) {
	t.Parallel()
	s := startSimulator(t)
	d := s.open(Config{})
	blob, secret := enrol(t, d, enclave.Auth{})
	for range 2 {
		s.kill()
		start := time.Now()
		if _, err := unwrap(t, d, blob, enclave.Auth{}); !errors.Is(err, enclave.ErrAbsent) {
			t.Error(err)
		}
		if h := d.Health(limited(t)); h.State != enclave.Absent || h.Detail == "" {
			t.Errorf("health %+v", h)
		}
		if took := time.Since(start); took > 2*time.Second {
			t.Errorf("noticed after %v", took)
		}
		s.start()
		start = time.Now()
		opens(t, d, blob, enclave.Auth{}, secret)
		if h := d.Health(limited(t)); h.State != enclave.Ready {
			t.Errorf("health %+v", h)
		}
		if took := time.Since(start); took > 2*time.Second {
			t.Errorf("came back after %v", took)
		}
	}
}

// A device that does not answer holds calls no longer than their context, and Close no longer than a moment.
func TestHangingDevice(t *testing.T) {
	s := startSimulator(t)
	d := s.open(Config{})
	blob, secret := enrol(t, d, enclave.Auth{})
	s.cmd.Process.Signal(syscall.SIGSTOP)
	for range 3 {
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		start := time.Now()
		dst := make([]byte, enclave.SecretSize)
		if err := d.Unwrap(ctx, blob, testAAD, enclave.Auth{}, dst); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		if h := d.Health(ctx); h.State != enclave.Absent {
			t.Errorf("health %+v", h)
		}
		if took := time.Since(start); took > time.Second {
			t.Errorf("held for %v", took)
		}
		cancel()
	}
	s.cmd.Process.Signal(syscall.SIGCONT)
	start := time.Now()
	opens(t, d, blob, enclave.Auth{}, secret)
	if took := time.Since(start); took > 2*time.Second {
		t.Errorf("came back after %v", took)
	}
	s.cmd.Process.Signal(syscall.SIGSTOP)
	waiting := make(chan error)
	go func() {
		waiting <- d.Unwrap(limited(t), blob, testAAD, enclave.Auth{}, make([]byte, enclave.SecretSize))
	}()
	time.Sleep(50 * time.Millisecond)
	start = time.Now()
	d.Close()
	if err := <-waiting; !errors.Is(err, enclave.ErrAbsent) {
		t.Errorf("call under way when the driver was closed: %v", err)
	}
	<-d.gone
	if took := time.Since(start); took > 2*time.Second {
		t.Errorf("closing took %v", took)
	}
}

// Contexts that end in the middle of calls leave no session and no object behind.
func TestAbandonedCallsLeakNothing(t *testing.T) {
	s := startSimulator(t)
	var cancelNow atomic.Pointer[context.CancelFunc]
	var sent, at atomic.Int32
	d := s.openWith(Config{PCRs: []int{7}}, tapped(func([]byte) []byte {
		if sent.Add(1) == at.Load() {
			(*cancelNow.Load())()
		}
		return nil
	}, nil))
	blob, secret := enrol(t, d, enclave.Auth{})
	for n := range int32(10) {
		ctx, cancel := context.WithCancel(t.Context())
		cancelNow.Store(&cancel)
		sent.Store(0)
		at.Store(n + 1)
		dst := make([]byte, enclave.SecretSize)
		if err := d.Unwrap(ctx, blob, testAAD, enclave.Auth{}, dst); err != nil && !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		at.Store(0)
		cancel()
	}
	opens(t, d, blob, enclave.Auth{}, secret)
	if n := s.count(tpm2.TPMHTHMACSession); n != 0 {
		t.Errorf("%d sessions are open", n)
	}
	if n := s.count(tpm2.TPMHTTransient); n != 0 {
		t.Errorf("%d objects are loaded", n)
	}
}

// A cleared TPM and a damaged blob give the same response code and ask for opposite remedies.
func TestClearedIsNotCorrupt(t *testing.T) {
	s := startSimulator(t)
	first := s.open(Config{})
	blob, secret := enrol(t, first, enclave.Auth{})
	binding := first.Info().Binding
	if len(binding) != 2*nameSize {
		t.Fatalf("binding %q", binding)
	}
	first.Close()

	d := s.open(Config{Binding: binding})
	resident, _, err := d.Generate(limited(t), spec("ecdsa-p256", "sign"))
	if err != nil {
		t.Fatal(err)
	}
	damaged := func(change func(*slot)) enclave.Blob {
		sl, err := decodeSlot(bytes.Clone(blob))
		if err != nil {
			t.Fatal(err)
		}
		change(sl)
		b, err := sl.encode() // with a good checksum, so that the TPM sees it
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	for name, b := range map[string]enclave.Blob{
		"private area":  damaged(func(sl *slot) { sl.private[len(sl.private)-1] ^= 1 }),
		"private size":  damaged(func(sl *slot) { sl.private = sl.private[:20] }),
		"public area":   damaged(func(sl *slot) { sl.public[len(sl.public)-1] ^= 1 }),
		"attributes":    damaged(func(sl *slot) { sl.public[6] ^= 4 }),
		"public type":   damaged(func(sl *slot) { sl.public[1] ^= 0xff }),
		"salt":          damaged(func(sl *slot) { sl.salt[0] ^= 1 }),
		"sealed secret": damaged(func(sl *slot) { sl.sealed[40] ^= 1 }),
	} {
		if _, err := unwrap(t, d, b, enclave.Auth{}); !errors.Is(err, enclave.ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := unwrap(t, d, damaged(func(sl *slot) { sl.root[5] ^= 1 }), enclave.Auth{}); !errors.Is(err, enclave.ErrReplaced) {
		t.Errorf("another storage key: %v", err)
	}
	opens(t, d, blob, enclave.Auth{}, secret)

	s.clear()
	for _, e := range []*TPM{d, s.open(Config{})} { // pinned, and found by the blob alone
		if _, err := unwrap(t, e, blob, enclave.Auth{}); !errors.Is(err, enclave.ErrReplaced) {
			t.Errorf("after clear: %v", err)
		}
		if _, err := e.Do(limited(t), resident, enclave.Op{Usage: "sign", Input: []byte("x"), Bound: testAAD}, nil); !errors.Is(err, enclave.ErrReplaced) {
			t.Errorf("resident key after clear: %v", err)
		}
	}
	if h := d.Health(limited(t)); h.State != enclave.Replaced {
		t.Errorf("health %+v", h)
	}
	if _, err := d.Wrap(limited(t), secret, testAAD); !errors.Is(err, enclave.ErrReplaced) {
		t.Errorf("wrap with a driver that is bound to what is gone: %v", err)
	}
	if _, err := d.IncrementCounter(limited(t), [16]byte{}); !errors.Is(err, enclave.ErrReplaced) {
		t.Errorf("counter of another TPM: %v", err)
	}
	enrol(t, s.open(Config{}), enclave.Auth{})
}

// Clear while the driver is connected and has the storage key loaded.
func TestClearedUnderUs(t *testing.T) {
	s := startSimulator(t)
	var clearNow atomic.Bool
	d := s.openWith(Config{}, func(a address) (link, error) {
		l, err := a.dial()
		return &tap{link: l, before: func([]byte) []byte {
			if clearNow.CompareAndSwap(true, false) {
				tpm2.Clear{AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHLockout, Auth: tpm2.PasswordAuth(nil)}}.Execute(bare{l})
			}
			return nil
		}}, err
	})
	blob, _ := enrol(t, d, enclave.Auth{})
	clearNow.Store(true)
	if _, err := unwrap(t, d, blob, enclave.Auth{}); !errors.Is(err, enclave.ErrReplaced) {
		t.Error(err)
	}
}

// A power cycle that the connection survives, as with a resource manager in between, before each command in turn.
func TestResetUnderUs(t *testing.T) {
	s := startSimulator(t)
	var sent, at atomic.Int32
	d := s.openWith(Config{}, tapped(func([]byte) []byte {
		if sent.Add(1) == at.Load() {
			if out, err := exec.Command("swtpm_ioctl", "--unix", s.socket()+".ctrl", "-i").CombinedOutput(); err != nil {
				t.Errorf("%v\n%s", err, out)
			}
		}
		return nil
	}, nil))
	blob, secret := enrol(t, d, enclave.Auth{})
	for n := range int32(6) {
		sent.Store(0)
		at.Store(n + 1)
		opens(t, d, blob, enclave.Auth{}, secret)
		if n < 4 && sent.Load() < at.Load() {
			t.Error("nothing was reset, so this test shows nothing")
		}
		at.Store(0)
	}
}

func TestLockoutAndReset(t *testing.T) {
	s := startSimulator(t)
	d := s.open(Config{PIN: []byte("4711")})
	free := s.open(Config{})
	freeBlob, freeSecret := enrol(t, free, enclave.Auth{})
	blob, secret := enrol(t, d, pin("4711"))
	if !d.Info().NeedsYou || free.Info().NeedsYou {
		t.Error("NeedsYou")
	}
	for i := range 3 {
		_, err := unwrap(t, d, blob, pin("0815"))
		var e *enclave.Error
		if !errors.Is(err, enclave.ErrAuth) || !errors.As(err, &e) || e.Detail == "" || e.Remedy == "" {
			t.Fatalf("attempt %d: %v", i, err)
		}
	}
	_, err := unwrap(t, d, blob, pin("4711"))
	var e *enclave.Error
	if !errors.Is(err, enclave.ErrLockedOut) || !errors.As(err, &e) {
		t.Fatal(err)
	}
	interval := time.Duration(s.property(tpm2.TPMPTLockoutInterval)) * time.Second
	if left := time.Until(e.Until); left <= 0 || left > interval+time.Second {
		t.Errorf("locked out for %v, the interval is %v", left, interval)
	}
	if h := d.Health(limited(t)); h.State != enclave.LockedOut || h.Until.IsZero() {
		t.Errorf("health %+v", h)
	}
	if h := free.Health(limited(t)); h.State != enclave.Ready {
		t.Errorf("health of a slot without PIN %+v", h)
	}
	opens(t, free, freeBlob, enclave.Auth{}, freeSecret)
	if n := s.count(tpm2.TPMHTHMACSession); n != 0 {
		t.Errorf("%d sessions are open", n)
	}
	s.other(func(b bare) {
		if err := b.withPassword(tpm2.TPMCCDictionaryAttackLockReset, tpm2.TPMRHLockout, nil, nil); err != nil {
			t.Fatal(err)
		}
	})
	opens(t, d, blob, pin("4711"), secret)
	if h := d.Health(limited(t)); h.State != enclave.Ready {
		t.Errorf("health %+v", h)
	}
}

// Fifty losses of power without TPM2_Shutdown, each after a slot was opened. With a PIN the fourth would lock out.
func TestPowerCutsDoNotLockOut(t *testing.T) {
	t.Parallel()
	s := startSimulator(t)
	d := s.open(Config{})
	blob, secret := enrol(t, d, enclave.Auth{})
	resident, _, err := d.Generate(limited(t), spec("ecdsa-p256", "sign"))
	if err != nil {
		t.Fatal(err)
	}
	for range 50 {
		opens(t, d, blob, enclave.Auth{}, secret)
		if _, err := d.Do(limited(t), resident, enclave.Op{Usage: "sign", Input: []byte("x"), Bound: testAAD}, nil); err != nil {
			t.Fatal(err)
		}
		s.kill()
		s.start()
	}
	opens(t, d, blob, enclave.Auth{}, secret)
	if n := s.property(tpm2.TPMPTLockoutCounter); n != 0 {
		t.Errorf("the TPM counted %d of them", n)
	}
}

// A second program on a software TPM has to wait until we let go, and gets its turn.
func TestLetsOthersHaveTheDevice(t *testing.T) {
	s := startSimulator(t)
	d := s.open(Config{})
	enrol(t, d, enclave.Auth{})
	start := time.Now()
	if n := s.count(tpm2.TPMHTTransient); n != 0 {
		t.Errorf("the driver left %d objects loaded", n)
	}
	if took := time.Since(start); took > 2*time.Second {
		t.Errorf("the other program waited for %v", took)
	}
}

func TestHealthOfWhatIsNoTPM(t *testing.T) {
	s := startSimulator(t)
	for name, answer := range map[string][]byte{
		"TPM 1.2":      {0x00, 0xc4, 0, 0, 0, 10, 0, 0, 0, 0x1e},
		"failure mode": response(tpm2.TPMRCFailure),
	} {
		d := s.openWith(Config{}, tapped(func([]byte) []byte { return answer }, nil))
		if h := d.Health(limited(t)); h.State != enclave.Misconfigured {
			t.Errorf("%s: health %+v", name, h)
		}
		d.Close()
	}
	for device, want := range map[string]enclave.HealthState{
		"unix:/nowhere":       enclave.Absent,
		"/dev/tpm-nowhere":    enclave.Absent,
		"/etc/hostname":       enclave.Misconfigured,
		"unix:" + t.TempDir(): enclave.Absent,
	} {
		d, err := Open(Config{Device: device})
		if err != nil {
			t.Fatal(err)
		}
		if h := d.Health(limited(t)); h.State != want {
			t.Errorf("%s: health %+v, want %s", device, h, want)
		}
		d.Close()
	}
}

func TestOwnerPassword(t *testing.T) {
	s := startSimulator(t)
	s.other(func(b bare) {
		_, err := tpm2.HierarchyChangeAuth{AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
			NewAuth: tpm2.TPM2BAuth{Buffer: []byte("owner")}}.Execute(b)
		if err != nil {
			t.Fatal(err)
		}
	})
	without := s.open(Config{})
	if _, err := without.Wrap(limited(t), make([]byte, enclave.SecretSize), nil); !errors.Is(err, enclave.ErrMisconfigured) {
		t.Error(err)
	}
	if h := without.Health(limited(t)); h.State != enclave.Misconfigured {
		t.Errorf("health %+v", h)
	}
	with := s.open(Config{OwnerPassword: []byte("owner")})
	enrol(t, with, enclave.Auth{})
	if _, err := with.IncrementCounter(limited(t), [16]byte{9}); err != nil {
		t.Error(err)
	}
}

// An empty lockout password lets everybody clear the TPM; the administrator is told until there is one.
func TestWarnsOfClear(t *testing.T) {
	s := startSimulator(t)
	d := s.open(Config{})
	warned := func() bool {
		if h := d.Health(limited(t)); h.State != enclave.Ready {
			t.Fatalf("health %+v", h)
		}
		return slices.Contains(d.Info().Warnings, warnClear)
	}
	if !warned() {
		t.Error("no warning")
	}
	s.other(func(b bare) {
		_, err := tpm2.HierarchyChangeAuth{AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHLockout, Auth: tpm2.PasswordAuth(nil)},
			NewAuth: tpm2.TPM2BAuth{Buffer: []byte("lockout")}}.Execute(b)
		if err != nil {
			t.Fatal(err)
		}
	})
	if warned() {
		t.Error("still warns")
	}
}

// With a PIN the TPM counts losses of power, as the warning says: the reason why a PIN is not the default.
func TestPowerCutsCountWithPIN(t *testing.T) {
	s := startSimulator(t)
	d := s.open(Config{PIN: []byte("4711")})
	blob, secret := enrol(t, d, pin("4711"))
	opens(t, d, blob, pin("4711"), secret)
	s.kill()
	s.start()
	if n := s.property(tpm2.TPMPTLockoutCounter); n != 1 {
		t.Errorf("the TPM counted %d", n)
	}
	if len(d.Info().Warnings) == 0 {
		t.Error("no warning")
	}
}

// Another program that holds a software TPM is waited for as long as the context allows.
func TestHeldByAnother(t *testing.T) {
	s := startSimulator(t)
	d := s.open(Config{})
	blob, secret := enrol(t, d, enclave.Auth{})
	s.other(func(bare) {
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		if err := d.Unwrap(ctx, blob, testAAD, enclave.Auth{}, make([]byte, enclave.SecretSize)); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
	})
	opens(t, d, blob, enclave.Auth{}, secret)
	done := make(chan error)
	s.other(func(bare) {
		go func() {
			done <- d.Unwrap(limited(t), blob, testAAD, enclave.Auth{}, make([]byte, enclave.SecretSize))
		}()
		time.Sleep(100 * time.Millisecond)
	})
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// Each thing that a TPM says asks for another remedy.
func TestTranslate(t *testing.T) {
	for rc, want := range map[tpm2.TPMRC]error{
		tpm2.TPMRCRetry:         enclave.ErrBusy,
		tpm2.TPMRCNVRate:        enclave.ErrBusy,
		tpm2.TPMRCNVUnavailable: enclave.ErrBusy,
		tpm2.TPMRCObjectMemory:  enclave.ErrBusy,
		tpm2.TPMRCInitialize:    enclave.ErrBusy,
		tpm2.TPMRCLockout:       enclave.ErrLockedOut,
		tpm2.TPMRCBadAuth:       enclave.ErrAuth,
		tpm2.TPMRCAuthFail:      enclave.ErrAuth,
		tpm2.TPMRCPolicyFail:    enclave.ErrPolicy,
		tpm2.TPMRCPCRChanged:    enclave.ErrPolicy,
		tpm2.TPMRCIntegrity:     enclave.ErrCorrupt,
		tpm2.TPMRCFailure:       enclave.ErrMisconfigured,
		tpm2.TPMRCHierarchy:     enclave.ErrMisconfigured,
		tpm2.TPMRCNVSpace:       enclave.ErrMisconfigured,
		tpm2.TPMRCCommandCode:   enclave.ErrUnsupported,
		tpm2.TPMRCCurve:         enclave.ErrUnsupported,
	} {
		about := rc
		if rc&0x80 != 0 { // a code of format one, about a parameter or a session
			about |= 0x140
		}
		if err := translate(fmt.Errorf("while testing: %w", about)); !errors.Is(err, want) {
			t.Errorf("%v: %v, want %v", rc, err, want)
		}
	}
	lost := &lostError{errors.New("broken pipe")}
	if err := translate(lost); !errors.Is(err, enclave.ErrAbsent) || !strings.Contains(err.Error(), "broken pipe") {
		t.Error(err)
	}
	if err := translate(errors.New("incorrect authorization HMAC")); !errors.Is(err, enclave.ErrMisconfigured) {
		t.Error(err)
	}
	for _, err := range []error{nil, context.Canceled, &enclave.Error{Kind: enclave.ErrReplaced, Cause: tpm2.TPMRCRetry}} {
		if got := translate(err); got != err {
			t.Errorf("%v became %v", err, got)
		}
	}
}

// A caller that leaves wipes its PIN at once. What is wiped never reaches the TPM, which would count it.
func TestAbandonedPINIsNotCounted(t *testing.T) {
	s := startSimulator(t)
	d := s.open(Config{PIN: []byte("4711")})
	blob, secret := enrol(t, d, pin("4711"))
	for i := range 100 {
		a := pin("4711")
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(i)*50*time.Microsecond)
		err := d.Unwrap(ctx, blob, testAAD, a, make([]byte, enclave.SecretSize))
		clear(a.Secret)
		cancel()
		if err != nil && !errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(err)
		}
	}
	opens(t, d, blob, pin("4711"), secret)
	if n := s.property(tpm2.TPMPTLockoutCounter); n != 0 {
		t.Errorf("the TPM counted %d", n)
	}
}
