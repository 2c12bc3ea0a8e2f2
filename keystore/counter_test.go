package keystore

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// testCounter is a counter as a TPM has one, with faults. Its number is not in the state directory, so no copy of that takes it along.
type testCounter struct {
	mu         sync.Mutex
	value      uint64        // 0: there is none
	next       uint64        // where one that is made starts
	delay      time.Duration // of each command
	away       error         // what every command fails with
	before     func() error  // of an increment; an error prevents it
	after      func() error  // of an increment; an error loses its answer
	increments atomic.Int64
}

func newCounter() *testCounter { return &testCounter{next: 7_000_000} }

var errAway = errors.New("the device is away")

func (c *testCounter) ReadCounter(ctx context.Context, id [16]byte) (uint64, error) {
	time.Sleep(c.delay)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.away != nil {
		return 0, c.away
	}
	if c.value == 0 {
		return 0, errors.New("there is no such counter")
	}
	return c.value, nil
}

func (c *testCounter) IncrementCounter(ctx context.Context, id [16]byte) (uint64, error) {
	time.Sleep(c.delay)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.away != nil {
		return 0, c.away
	}
	if c.before != nil {
		if err := c.before(); err != nil {
			return 0, err
		}
	}
	if c.value == 0 {
		c.value = c.next
	}
	c.value++
	c.increments.Add(1)
	if c.after != nil {
		if err := c.after(); err != nil {
			return 0, err
		}
	}
	return c.value, nil
}

func (c *testCounter) now() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.value
}

// boundStore makes a store that is bound to a counter.
func boundStore(t testing.TB) (*Store, *testCounter) {
	t.Helper()
	s, c := newStore(t), newCounter()
	if err := s.BindCounter(t.Context(), "test:/dev/counter", c); err != nil {
		t.Fatal(err)
	}
	return s, c
}

// openBound opens the store in dir and unlocks it.
func openBound(t testing.TB, dir string, o UnlockOptions) (*Store, error) {
	t.Helper()
	s, err := Open(context.Background(), testConfig(t, dir))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s, s.UnlockWith(context.Background(), 1, testSecret(1), o)
}

// refusal is what opening the store in dir is refused with.
func refusal(t testing.TB, dir string, o UnlockOptions) error {
	t.Helper()
	s, err := openBound(t, dir, o)
	s.Close()
	return err
}

func mustOpenBound(t testing.TB, dir string, c *testCounter) *Store {
	t.Helper()
	s, err := openBound(t, dir, UnlockOptions{Counter: c})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestOldCopyOfTheWholeDirectoryDoesNotOpen(t *testing.T) {
	s, c := boundStore(t)
	if got := s.Info(); got.Rollback != "detected by the counter of test:/dev/counter" || got.Counter != "test:/dev/counter" || len(got.Warnings) != 0 {
		t.Fatalf("%+v", got)
	}
	mustApply(t, s, testKey("app/k", keyspec.Ed25519, 32))
	old := copyDir(t, s.config.Dir)
	destroy(t, s, "app/k", 1)
	mustApply(t, s, testKey("app/l", keyspec.Ed25519, 32))
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	before := c.now()
	for range 2 {
		opened, err := openBound(t, old, UnlockOptions{Counter: c})
		if !errors.Is(err, ErrRollback) || errors.Is(err, ErrCounterAbsent) || !opened.Locked() {
			t.Fatalf("an old copy: %v", err)
		}
		opened.Close()
	}
	if c.now() != before {
		t.Fatal("a refused copy moved the counter")
	}
	s = mustOpenBound(t, s.config.Dir, c)
	checkKey(t, s, "app/l", 32)
	if _, err := s.Material(keyspec.Ref{Name: "app/k", Version: 1}, nil); !errors.Is(err, ErrNotFound) {
		t.Fatalf("destroyed: %v", err)
	}
	// A person may take the old copy all the same. From then on it is the right one, and the other is old.
	s.Close()
	opened, err := openBound(t, old, UnlockOptions{Counter: c, AcceptRollback: true})
	if err != nil {
		t.Fatal(err)
	}
	checkKey(t, opened, "app/k", 32)
	opened.Close()
	mustOpenBound(t, old, c).Close()
	if err := refusal(t, s.config.Dir, UnlockOptions{Counter: c}); !errors.Is(err, ErrRollback) {
		t.Fatalf("the copy that was given up: %v", err)
	}
}

func TestWhatMovesTheCounter(t *testing.T) {
	ctx := context.Background()
	s, c := boundStore(t)
	moves := func(what string, want int64, f func() error) {
		t.Helper()
		before := c.increments.Load()
		if err := f(); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if got := c.increments.Load() - before; got != want {
			t.Errorf("%s: %d increments, want %d", what, got, want)
		}
		if header := s.header.Load().counter.count; header != c.now() {
			t.Errorf("%s: the header says %d, the counter shows %d", what, header, c.now())
		}
	}
	change := func(name string, f func(*Version)) error {
		k, err := s.Get(keyspec.Name(name))
		if err != nil {
			return err
		}
		f(&k.Versions[len(k.Versions)-1])
		return s.Apply(ctx, Commit{Changes: []Change{{Key: k}}})
	}
	apply := func(name string) error {
		return s.Apply(ctx, Commit{Changes: []Change{testKey(name, keyspec.Ed25519, 32)}, Audit: []byte("x")})
	}
	moves("create", 0, func() error { return apply("app/k") })
	moves("create more", 0, func() error { return errors.Join(apply("app/l"), apply("app/m"), apply("app")) })
	moves("reserve", 0, func() error { return change("app/k", func(v *Version) { v.Invocations = 10 }) })
	moves("rotate", 0, func() error { rotate(t, s, "app/k", 32); return nil })
	moves("backup", 0, func() error { testBackup(t, s, testIdentity(t)); return nil })
	moves("suspend", 1, func() error { return change("app/k", func(v *Version) { v.State = keyspec.Suspended }) })
	moves("resume", 0, func() error { return change("app/k", func(v *Version) { v.State = keyspec.Active }) })
	moves("revoke", 1, func() error {
		return change("app/k", func(v *Version) {
			v.State, v.Reason, v.Revoked = keyspec.Compromised, keyspec.KeyCompromise, testTime
		})
	})
	moves("destroy", 1, func() error { destroy(t, s, "app/l", 1); return nil })
	moves("slot add", 1, func() error { _, err := s.AddSlot(ctx, testSlot(2)); return err })
	moves("slot remove", 1, func() error { return s.RemoveSlot(ctx, 2) })
	moves("epoch", 1, func() error { return s.RotateEpoch(ctx, nil) })
	moves("root", 1, func() error { return s.RotateRoot(ctx) })
	moves("asked for", 1, func() error { return s.BumpGeneration(ctx) })
	moves("compact", 0, func() error { return s.Compact(ctx) })
	moves("unlock", 1, func() error { s.Lock(); return s.UnlockWith(ctx, 1, testSecret(1), UnlockOptions{Counter: c}) })
	moves("unlock the unlocked", 0, func() error { return s.UnlockWith(ctx, 1, testSecret(1), UnlockOptions{}) })
	moves("bind again", 0, func() error { return s.BindCounter(ctx, "test:/dev/counter", c) })
	if err := s.UnbindCounter(ctx); err != nil || s.CounterLocation() != "" || s.Info().Rollback != "not detectable" {
		t.Fatalf("%v %+v", err, s.Info())
	}
	at := c.now()
	destroy(t, s, "app/m", 1)
	s = reopen(t, s)
	if err := s.BumpGeneration(ctx); err != nil || c.now() != at {
		t.Fatalf("an unbound store: %v, counter %d, was %d", err, c.now(), at)
	}
}

// TestPowerMayFailAtEveryStepOfABump takes the state directory and the counter as they are before and after every increment, and
// where the answer got lost. Each such pair opens, and nothing older does from then on.
func TestPowerMayFailAtEveryStepOfABump(t *testing.T) {
	ctx := context.Background()
	s, c := boundStore(t)
	type moment struct {
		what  string
		dir   string
		value uint64
	}
	var moments []moment
	what := ""
	take := func(suffix string) func() error {
		return func() error {
			moments = append(moments, moment{what + suffix, copyDir(t, s.config.Dir), c.value})
			return nil
		}
	}
	c.before, c.after = take(", header written"), take(", counter moved")
	for _, step := range []struct {
		what string
		do   func()
	}{
		{"create", func() { mustApply(t, s, testKey("app/k", keyspec.Ed25519, 32), testKey("app/l", keyspec.Ed25519, 32)) }},
		{"destroy", func() { destroy(t, s, "app/k", 1) }},
		{"root", func() {
			if err := s.RotateRoot(ctx); err != nil {
				t.Error(err)
			}
		}},
		{"unlock", func() {
			s.Lock()
			if err := s.UnlockWith(ctx, 1, testSecret(1), UnlockOptions{Counter: c}); err != nil {
				t.Error(err)
			}
		}},
		{"epoch", func() {
			if err := s.RotateEpoch(ctx, nil); err != nil {
				t.Error(err)
			}
		}},
	} {
		what = step.what
		step.do()
		c.mu.Lock()
		take(" done")()
		c.mu.Unlock()
	}
	if len(moments) != 5+4*2 {
		t.Fatalf("%d moments", len(moments))
	}
	for i, m := range moments {
		counter := &testCounter{value: m.value}
		for j, old := range moments[:i] {
			// The interrupted state and the one before it both open, since nobody was told of the new one yet.
			if header := headerIn(t, old.dir).counter.count; header == m.value || header == m.value+1 {
				continue
			}
			if err := refusal(t, copyDir(t, old.dir), UnlockOptions{Counter: counter}); !errors.Is(err, ErrRollback) {
				t.Errorf("%s with the counter of %s (%d, %d): %v", old.what, m.what, j, i, err)
			}
		}
		opened, err := openBound(t, copyDir(t, m.dir), UnlockOptions{Counter: counter})
		if err != nil {
			t.Errorf("%s: %v", m.what, err)
			continue
		}
		checkKey(t, opened, "app/l", 32)
		if header := opened.header.Load().counter.count; header != counter.value || header < m.value+1 {
			t.Errorf("%s: header %d, counter %d", m.what, header, counter.value)
		}
		opened.Close()
		// Now that it was used, nothing from before opens.
		for _, old := range moments[:i] {
			if err := refusal(t, copyDir(t, old.dir), UnlockOptions{Counter: counter}); !errors.Is(err, ErrRollback) {
				t.Errorf("%s after %s was opened: %v", old.what, m.what, err)
			}
		}
	}
}

func headerIn(t *testing.T, dir string) *header {
	t.Helper()
	_, h, err := readHeader(dir)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func TestStoreWhoseCounterIsAwayOpensOnlyOnRequest(t *testing.T) {
	s, c := boundStore(t)
	mustApply(t, s, testKey("app/k", keyspec.Ed25519, 32), testKey("app/l", keyspec.Ed25519, 32))
	dir := s.config.Dir
	s.Close()
	s, err := openBound(t, dir, UnlockOptions{})
	if !errors.Is(err, ErrCounterAbsent) || errors.Is(err, ErrRollback) || !strings.Contains(err.Error(), "test:/dev/counter") {
		t.Fatalf("no counter: %v", err)
	}
	if got := s.CounterLocation(); got != "test:/dev/counter" {
		t.Fatalf("a locked store says %q", got)
	}
	c.away = errAway
	if err := s.UnlockWith(t.Context(), 1, testSecret(1), UnlockOptions{Counter: c}); !errors.Is(err, ErrCounterAbsent) || !errors.Is(err, errAway) {
		t.Fatalf("the device is away: %v", err)
	}
	if err := s.Unlock(t.Context(), 1, testSecret(1)); !errors.Is(err, ErrCounterAbsent) {
		t.Fatal(err)
	}
	if err := s.UnlockWith(t.Context(), 1, testSecret(1), UnlockOptions{Counter: c, AcceptRollback: true}); err != nil {
		t.Fatal(err)
	}
	checkKey(t, s, "app/k", 32)
	uncovered := func() bool {
		info := s.Info()
		return strings.HasPrefix(info.Rollback, "not covered by") &&
			slices.ContainsFunc(info.Warnings, func(w string) bool { return strings.Contains(w, errAway.Error()) })
	}
	destroy(t, s, "app/k", 1) // works, and Info says what is missing
	if !uncovered() {
		t.Fatalf("%+v", s.Info())
	}
	// The device comes back, with another counter even: the present state was accepted.
	c.mu.Lock()
	c.away, c.value = nil, 0
	c.mu.Unlock()
	destroy(t, s, "app/l", 1)
	if uncovered() || c.now() != s.header.Load().counter.count {
		t.Fatalf("%+v", s.Info())
	}
	s.Close()
	mustOpenBound(t, dir, c).Close()
	// A counter that is gone is not the same as one that was never there.
	c.value = 0
	if err := refusal(t, dir, UnlockOptions{Counter: c}); !errors.Is(err, ErrCounterAbsent) {
		t.Fatalf("the counter is gone: %v", err)
	}
	c.value = 3
	if err := refusal(t, dir, UnlockOptions{Counter: c}); !errors.Is(err, ErrRollback) {
		t.Fatalf("another device: %v", err)
	}
	// Without any device it can be opened as well, and the binding is kept.
	s, err = openBound(t, dir, UnlockOptions{AcceptRollback: true})
	if err != nil || s.CounterLocation() == "" {
		t.Fatal(err)
	}
	if err := s.BumpGeneration(t.Context()); !errors.Is(err, ErrCounterAbsent) {
		t.Fatal(err)
	}
}

func TestLostAnswersOfTheCounterAreMadeUpFor(t *testing.T) {
	ctx := context.Background()
	s, c := boundStore(t)
	lost := errors.New("the answer got lost")
	once := func() func() error {
		done := false
		return func() error {
			if done {
				return nil
			}
			done = true
			return lost
		}
	}
	for _, set := range []func(){func() { c.after = once() }, func() { c.before = once() }} {
		set()
		if err := s.BumpGeneration(ctx); !errors.Is(err, lost) {
			t.Fatal(err)
		}
		if err := s.BumpGeneration(ctx); err != nil {
			t.Fatal(err)
		}
		if header := s.header.Load().counter.count; header != c.now() || len(s.Info().Warnings) > 0 {
			t.Fatalf("header %d, counter %d, %q", header, c.now(), s.Info().Warnings)
		}
	}
	s.Close()
	mustOpenBound(t, s.config.Dir, c)
}

func TestTwoCopiesInUseAreNoticed(t *testing.T) {
	s, c := boundStore(t)
	copied := copyDir(t, s.config.Dir)
	other := mustOpenBound(t, copied, c)
	if err := s.BumpGeneration(t.Context()); !errors.Is(err, ErrRollback) {
		t.Fatalf("the first: %v", err)
	}
	if got := s.Info().Rollback; !strings.HasPrefix(got, "not covered") {
		t.Fatal(got)
	}
	if err := other.BumpGeneration(t.Context()); err != nil {
		t.Fatalf("the one that was opened last: %v", err)
	}
}

// TestSlowCounterHoldsUpNobodyElse has versions destroyed by many at once while others create and read.
func TestSlowCounterHoldsUpNobodyElse(t *testing.T) {
	s, c := boundStore(t)
	const destroyers = 12
	for i := range destroyers {
		mustApply(t, s, testKey(fmt.Sprint("app/d", i), keyspec.Ed25519, 32))
	}
	c.mu.Lock()
	c.delay = 100 * time.Millisecond
	c.mu.Unlock()
	first := c.increments.Load()
	var busy atomic.Bool
	busy.Store(true)
	var others sync.WaitGroup
	var slowest, created atomic.Int64
	for g := range 2 {
		others.Go(func() {
			for i := 0; busy.Load(); i++ {
				name := fmt.Sprintf("app/new%d-%d", g, i)
				begin := time.Now()
				mustApply(t, s, testKey(name, keyspec.Ed25519, 32))
				checkKey(t, s, name, 32)
				slowest.Store(max(slowest.Load(), int64(time.Since(begin))))
				created.Add(1)
			}
		})
	}
	begin := time.Now()
	var destroying sync.WaitGroup
	for i := range destroyers {
		destroying.Go(func() { destroy(t, s, fmt.Sprint("app/d", i), 1) })
	}
	destroying.Wait()
	took := time.Since(begin)
	busy.Store(false)
	others.Wait()
	increments := c.increments.Load() - first
	t.Logf("%d destructions by %d increments in %v; meanwhile %d keys, the slowest in %v", destroyers, increments, took, created.Load(), time.Duration(slowest.Load()))
	if increments < 1 || increments > destroyers/2 {
		t.Errorf("%d destructions took %d increments", destroyers, increments)
	}
	if created.Load() < 2*increments {
		t.Errorf("only %d keys were made during %d increments", created.Load(), increments)
	}
	if header := s.header.Load().counter.count; header != c.now() {
		t.Errorf("header %d, counter %d", header, c.now())
	}
	// Whoever was answered is covered: a copy from before the last answer does not open.
	s.Close()
	c.delay = 0
	mustOpenBound(t, s.config.Dir, c)
}

// A counter that hangs holds up a change no longer than coverTime, and covers it when it answers again.
func TestHangingCounterHoldsUpNoChangeForLong(t *testing.T) {
	s, c := boundStore(t)
	for i := range 3 {
		mustApply(t, s, testKey(fmt.Sprint("app/d", i), keyspec.Ed25519, 32))
	}
	first := c.now()
	c.mu.Lock() // the device does not answer
	begin := time.Now()
	var changes sync.WaitGroup
	for i := range 3 {
		changes.Go(func() { destroy(t, s, fmt.Sprint("app/d", i), 1) })
	}
	changes.Wait()
	if took := time.Since(begin); took > counterTimeout-time.Second {
		t.Errorf("destructions wait for a counter that hangs: %v", took)
	}
	if got := s.Info().Rollback; !strings.HasPrefix(got, "not covered") {
		t.Error(got)
	}
	c.mu.Unlock()
	if err := s.BumpGeneration(t.Context()); err != nil {
		t.Fatal(err)
	}
	if c.now() == first || s.header.Load().counter.count != c.now() {
		t.Errorf("counter %d, before %d, header %d", c.now(), first, s.header.Load().counter.count)
	}
	s.Close()
	mustOpenBound(t, s.config.Dir, c)
}

// A destruction is answered when the counter covers it, not before: the copy taken just before the answer of any of several at the
// same time is refused afterwards.
func TestEveryOneOfSeveralPendingBumpsIsCovered(t *testing.T) {
	s, c := boundStore(t)
	const n = 6
	for i := range n {
		mustApply(t, s, testKey(fmt.Sprint("app/d", i), keyspec.Ed25519, 32))
	}
	// While the first waits for the counter the others commit, behind the header that was written for the first.
	entered, leave := make(chan struct{}), make(chan struct{})
	c.before = func() error { close(entered); <-leave; c.before = nil; return nil }
	var all sync.WaitGroup
	all.Go(func() { destroy(t, s, "app/d0", 1) })
	<-entered
	old := copyDir(t, s.config.Dir)
	for i := 1; i < n; i++ {
		all.Go(func() { destroy(t, s, fmt.Sprint("app/d", i), 1) })
	}
	for s.Info().ErasurePending < n {
		time.Sleep(time.Millisecond)
	}
	close(leave)
	all.Wait()
	s.Close()
	if err := refusal(t, old, UnlockOptions{Counter: c}); !errors.Is(err, ErrRollback) {
		t.Fatalf("a copy in which only the first was destroyed: %v", err)
	}
	mustOpenBound(t, s.config.Dir, c)
}

// TestBindingCannotBeForged: who can write the header but has no key can neither end the binding nor change it.
func TestBindingCannotBeForged(t *testing.T) {
	s, c := boundStore(t)
	s.Close()
	h := headerIn(t, s.config.Dir)
	for what, forge := range map[string]func(*header){
		"ended":          func(h *header) { h.counter = nil },
		"another number": func(h *header) { b := *h.counter; b.count += 5; h.counter = &b },
	} {
		forged := h.clone()
		forge(forged)
		if err := os.WriteFile(filepath.Join(s.config.Dir, headerFile), forged.encode(make([]byte, keySize)), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := refusal(t, s.config.Dir, UnlockOptions{Counter: c}); !errors.Is(err, ErrDamaged) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if err := s.BindCounter(t.Context(), strings.Repeat("x", keyspec.MaxLocation+1), c); !errors.Is(err, ErrInvalid) {
		t.Errorf("a long location: %v", err)
	}
}
