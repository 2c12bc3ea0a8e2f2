package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/mechanism"
)

// createLimited makes an HMAC key, whose uses are cheap.
func (h *house) createLimited(name string, uses uint64) {
	h.t.Helper()
	n := &NewKey{Name: keyspec.Name(name), Algorithm: keyspec.HMACSHA256, Uses: uses}
	if _, err := h.Create(h.t.Context(), h.app, n, nil); err != nil {
		h.t.Fatal(err)
	}
}

// use makes a MAC.
func (h *house) use(name string) error {
	_, _, err := h.MAC(h.t.Context(), h.app, keyspec.Ref{Name: keyspec.Name(name)}, []byte("m"), nil)
	return err
}

func (h *house) usesLeft(name string) uint64 {
	h.t.Helper()
	key, err := h.Get(h.t.Context(), h.app, keyspec.Ref{Name: keyspec.Name(name)})
	if err != nil {
		h.t.Fatal(err)
	}
	if !key.Limited {
		h.t.Fatalf("%s is not limited", name)
	}
	return key.UsesLeft
}

// TestEveryOperationIsCounted tries every operation of the matrix on a key that may be used twice. Those with the public
// half alone cost nothing.
func TestEveryOperationIsCounted(t *testing.T) {
	tried := 0
	for _, row := range mechanism.Table() {
		if row.Cost == mechanism.CostRSA && row.Algorithm != keyspec.RSA2048 {
			continue
		}
		h := newHouse(t)
		if _, err := h.Create(t.Context(), h.app, &NewKey{Name: "TARGET", Algorithm: keyspec.AES256GCM, Exportable: true}, nil); err != nil {
			t.Fatal(err)
		}
		material, spki, m := fresh1(t, row)
		for _, op := range operations() {
			usages := []keyspec.Usage{op.usage}
			if !slices.Contains(op.kinds, row.Kind) || mechanism.ValidateUsages(row.Algorithm, usages, "") != nil {
				continue
			}
			tried++
			name := keyspec.Name(fmt.Sprintf("APP/%d", tried))
			h.plant(string(name), row, material, spki, usages, active)
			if _, err := h.Set(t.Context(), h.app, name, &Settings{Uses: 2}); err != nil {
				t.Fatal(err)
			}
			where := fmt.Sprintf("%s with %s", op.name, row.Algorithm)
			run := func() error { return op.run(h, keyspec.Ref{Name: name}, m) }
			for range 2 {
				want(t, where, run(), nil)
			}
			if public := row.Algorithm.Asymmetric() && (op.usage == keyspec.Verify || op.usage == keyspec.Encrypt); public {
				want(t, where+", with the public half", run(), nil)
				if left := h.usesLeft(string(name)); left != 2 {
					t.Errorf("%s: %d uses left, want 2", where, left)
				}
				continue
			}
			want(t, where+", a third time", run(), ErrExhausted)
			if left := h.usesLeft(string(name)); left != 0 {
				t.Errorf("%s: %d uses left, want none", where, left)
			}
		}
	}
	if tried < 40 {
		t.Errorf("only %d combinations", tried)
	}
}

// TestFewUsesAreExact counts a few uses through restarts that are not announced.
func TestFewUsesAreExact(t *testing.T) {
	h := newHouse(t)
	h.createLimited("APP/few", useShare)
	for i := range useShare {
		want(t, "use", h.use("APP/few"), nil)
		if i%3 == 0 {
			h.restart()
		}
		if left := h.usesLeft("APP/few"); left != uint64(useShare-1-i) {
			t.Fatalf("after %d uses %d are left", i+1, left)
		}
	}
	want(t, "one too many", h.use("APP/few"), ErrExhausted)
	h.restart()
	want(t, "one too many after a restart", h.use("APP/few"), ErrExhausted)
	if _, err := h.Rotate(t.Context(), h.app, "APP/few", time.Time{}, time.Time{}, false); err != nil {
		t.Fatal(err)
	}
	want(t, "after a rotation", h.use("APP/few"), ErrExhausted)
}

// TestManyUsesCostNoFsync makes uses out of a block: a crash loses the rest of it, an orderly end gives it back.
func TestManyUsesCostNoFsync(t *testing.T) {
	h := newHouse(t)
	const limit = 16_000
	h.createLimited("APP/many", limit)
	revision := func() uint64 {
		key, err := h.store.Load().Get("APP/many")
		if err != nil {
			t.Fatal(err)
		}
		return key.Revision
	}
	before := revision()
	for range 900 {
		want(t, "use", h.use("APP/many"), nil)
	}
	if n := revision() - before; n != 1 {
		t.Errorf("900 uses took %d commits", n)
	}
	if left := h.usesLeft("APP/many"); left != limit-900 {
		t.Errorf("%d uses left, want %d", left, limit-900)
	}
	h.restart() // without a word to the engine, as a crash
	left := h.usesLeft("APP/many")
	if left != limit-limit/useShare {
		t.Errorf("%d uses left after a crash: want all but a block", left)
	}
	for range 10 {
		want(t, "use", h.use("APP/many"), nil)
	}
	h.Engine.Lock()
	if err := h.store.Load().Unlock(t.Context(), 1, slices.Repeat([]byte{1}, 32)); err != nil {
		t.Fatal(err)
	}
	if err := h.Unlocked(); err != nil {
		t.Fatal(err)
	}
	h.restart()
	if again := h.usesLeft("APP/many"); again != left-10 {
		t.Errorf("%d uses left after an orderly lock, want %d", again, left-10)
	}
}

// TestUsesAreReturnedTogether locks with more limited keys than one commit holds, one of them destroyed meanwhile.
func TestUsesAreReturnedTogether(t *testing.T) {
	h := newHouse(t)
	n := usesBatch + 20
	var changes []keystore.Change
	for i := range n {
		ch := keystore.Change{Material: map[keyspec.Version][]byte{1: make([]byte, 32)}}
		ch.Key = &keystore.Key{
			Name: keyspec.Name(fmt.Sprintf("APP/%d", i)), Algorithm: keyspec.HMACSHA256, Usages: []keyspec.Usage{keyspec.MAC},
			Origin: keyspec.Generated, Protection: keyspec.Software, Current: 1, MinVersion: 1, Limited: true, UsesLeft: 1600,
			Versions: []keystore.Version{{Number: 1, State: keyspec.Active}},
		}
		changes = append(changes, ch)
	}
	if err := h.store.Load().Apply(t.Context(), keystore.Commit{Changes: changes}); err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() {
			if err := h.use(fmt.Sprintf("APP/%d", i)); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	h.counters.block(keyspec.Ref{Name: "GONE"}).left.Store(5)
	h.returnUses(t.Context())
	for i := range n {
		key, err := h.store.Load().Get(keyspec.Name(fmt.Sprintf("APP/%d", i)))
		if err != nil || key.UsesLeft != 1599 {
			t.Fatalf("%d uses of key %d are left in the store (%v)", key.UsesLeft, i, err)
		}
	}
}

// TestUsesAreNotOverdrawn lets many callers share the uses of a key while the limit is set anew and the rest is given back.
func TestUsesAreNotOverdrawn(t *testing.T) {
	h := newHouse(t)
	const limit = 700
	h.createLimited("APP/k", limit)
	var made, refused atomic.Int64
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for range 150 {
				switch err := h.use("APP/k"); {
				case err == nil:
					made.Add(1)
				case errors.Is(err, ErrExhausted):
					refused.Add(1)
				default:
					t.Error(err)
				}
			}
		})
	}
	all.Go(func() {
		for range 5 {
			h.returnUses(t.Context())
		}
	})
	all.Wait()
	if left := h.usesLeft("APP/k"); uint64(made.Load())+left != limit || made.Load()+refused.Load() != 8*150 {
		t.Errorf("%d uses of %d were made, %d are left, %d were refused", made.Load(), limit, left, refused.Load())
	}
	for h.use("APP/k") == nil { // those that were on their way back to the store when somebody asked
		made.Add(1)
	}
	if made.Load() != limit {
		t.Errorf("%d uses of %d were made", made.Load(), limit)
	}
}

// TestSetUsesHoldsForBlocks sets a limit while a block of the old one is reserved, and while uses are made.
func TestSetUsesHoldsForBlocks(t *testing.T) {
	h := newHouse(t)
	h.createLimited("APP/k", 10_000)
	want(t, "use", h.use("APP/k"), nil)
	if _, err := h.Set(t.Context(), h.app, "APP/k", &Settings{Uses: 3}); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		want(t, "use", h.use("APP/k"), nil)
	}
	want(t, "more than the new limit", h.use("APP/k"), ErrExhausted)

	h.createLimited("APP/race", 1<<40)
	stop := make(chan struct{})
	var since atomic.Int64
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if h.use("APP/race") == nil {
					since.Add(1)
				}
			}
		})
	}
	time.Sleep(10 * time.Millisecond)
	if _, err := h.Set(t.Context(), h.app, "APP/race", &Settings{Uses: 5}); err != nil {
		t.Fatal(err)
	}
	since.Store(0)
	for h.use("APP/race") == nil {
	}
	close(stop)
	all.Wait()
	if n := since.Load(); n > 5+4 { // four were on their way
		t.Errorf("%d uses were made after the limit was set to 5", n)
	}
}

func TestSetUses(t *testing.T) {
	h := newHouse(t)
	set := func(c *Caller, name string, uses int64) error {
		_, err := h.Set(t.Context(), c, keyspec.Name(name), &Settings{Uses: uses})
		return err
	}
	h.createLimited("APP/k", 100)
	want(t, "use", h.use("APP/k"), nil)
	want(t, "as many as are left", set(h.app, "APP/k", 99), nil)
	want(t, "more on the application socket", set(h.app, "APP/k", 100), ErrUnsupported)
	if left := h.usesLeft("APP/k"); left != 99 {
		t.Errorf("%d uses left after a refusal, want 99", left)
	}
	want(t, "no limit, on the application socket", set(h.app, "APP/k", NoLimit), ErrUnsupported)
	want(t, "more on the admin socket", set(h.admin, "APP/k", 1000), nil)
	if left := h.usesLeft("APP/k"); left != 1000 {
		t.Errorf("%d uses left, want 1000", left)
	}
	want(t, "no limit, on the admin socket", set(h.admin, "APP/k", NoLimit), nil)
	if key, err := h.Get(t.Context(), h.app, keyspec.Ref{Name: "APP/k"}); err != nil || key.Limited || key.UsesLeft != 0 {
		t.Errorf("%+v %v", key, err)
	}
	want(t, "use", h.use("APP/k"), nil)
	want(t, "too many", set(h.admin, "APP/k", MaxUses+1), ErrInput)
	want(t, "less than none", set(h.admin, "APP/k", -2), ErrInput)
	h.create("APP/exportable", keyspec.HMACSHA256)
	want(t, "exportable", set(h.app, "APP/exportable", 5), ErrInput)
	_, err := h.Create(t.Context(), h.app, &NewKey{Name: "APP/e", Algorithm: keyspec.AES256GCM, Uses: 1, Exportable: true}, nil)
	want(t, "created exportable", err, ErrInput)
	_, err = h.Create(t.Context(), h.app, &NewKey{Name: "APP/e", Algorithm: keyspec.AES256GCM, Uses: MaxUses + 1}, nil)
	want(t, "created with too many", err, ErrInput)
}

// TestRefusedRequestsAreNoUses: a mistake does not cost the only use of a key, an attempt to decrypt does.
func TestRefusedRequestsAreNoUses(t *testing.T) {
	h := newHouse(t)
	ctx := t.Context()
	n := &NewKey{Name: "APP/once", Algorithm: keyspec.ECDSAP256, Uses: 1}
	if _, err := h.Create(ctx, h.app, n, nil); err != nil {
		t.Fatal(err)
	}
	if _, _, err := h.Sign(ctx, h.app, ref(t, "APP/once"), keyspec.RSAPSSSHA256, "", message, nil); err == nil || errors.Is(err, ErrExhausted) {
		t.Errorf("a scheme of another algorithm: %v", err)
	}
	_, _, err := h.Sign(ctx, h.app, ref(t, "APP/once"), "", "", message, nil)
	want(t, "the one use", err, nil)
	_, _, err = h.Sign(ctx, h.app, ref(t, "APP/once"), "", "", message, nil)
	want(t, "a second", err, ErrExhausted)

	if _, err := h.Create(ctx, h.app, &NewKey{Name: "APP/open", Algorithm: keyspec.AES256GCM, Uses: 2}, nil); err != nil {
		t.Fatal(err)
	}
	sealed := h.encrypt("APP/open", "x")
	sealed[len(sealed)-1] ^= 1
	_, err = h.decrypt(h.app, "APP/open", sealed)
	want(t, "damaged ciphertext", err, ErrDecryption)
	_, err = h.decrypt(h.app, "APP/open", sealed)
	want(t, "the attempt counted", err, ErrExhausted)
}

func TestWhatCountsAsUse(t *testing.T) {
	device := func(kind error) error { return fmt.Errorf("sign: %w", &enclave.Error{Kind: kind}) }
	for err, want := range map[error]bool{
		nil: true, ErrDecryption: true, mechanism.ErrVerification: true, ErrInternal: true, context.DeadlineExceeded: true, keystore.ErrStorage: true,
		ErrInput: false, keystore.ErrExists: false, fmt.Errorf("x: %w", mechanism.ErrInput): false,
		device(enclave.ErrAbsent): false, device(enclave.ErrLocked): false, device(enclave.ErrDecryption): true,
	} {
		if counts(err) != want {
			t.Errorf("a use that ends with %v counts: %v", err, !want)
		}
	}
}

// TestLimitedUsesMayWait: a use that has to reserve does not run where it would hold others up.
func TestLimitedUsesMayWait(t *testing.T) {
	h := newHouse(t)
	h.createLimited("APP/k", 1000)
	peek := func() bool {
		if _, err := h.metadata(h.store.Load(), "APP/k", h.clock.Now()); err != nil {
			t.Fatal(err)
		}
		_, waits, _ := h.Peek(h.app, "mac", "APP/k")
		return waits
	}
	if !peek() {
		t.Error("the first use does not wait")
	}
	want(t, "use", h.use("APP/k"), nil)
	if peek() {
		t.Error("a use out of a block waits")
	}
}

// TestUsesOfResidentKeys: they are counted like others, and a device that is not there makes none.
func TestUsesOfResidentKeys(t *testing.T) {
	h, device := newResidentHouse(t)
	n := &NewKey{Name: "APP/hsm", Algorithm: keyspec.ECDSAP256, Protection: keyspec.HSM, Uses: 2}
	if _, err := h.Create(t.Context(), h.app, n, nil); err != nil {
		t.Fatal(err)
	}
	sign := func() error {
		_, err := h.sign(h.app, "APP/hsm", "m")
		return err
	}
	want(t, "the first use", sign(), nil)
	device.set(func() { device.fault = &enclave.Error{Kind: enclave.ErrAbsent} })
	want(t, "without the device", sign(), enclave.ErrAbsent)
	device.set(func() { device.fault = nil })
	want(t, "the second use", sign(), nil)
	want(t, "a third", sign(), ErrExhausted)
}
