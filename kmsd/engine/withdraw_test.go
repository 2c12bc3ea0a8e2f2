package engine

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/mechanism"
)

// What is taken out of use does not stay parsed in memory.
func TestWithdrawalEvictsTheKey(t *testing.T) {
	for name, withdraw := range map[string]func(h *house, r keyspec.Ref) (*keystore.Key, error){
		"suspend": func(h *house, r keyspec.Ref) (*keystore.Key, error) { return h.Suspend(h.t.Context(), h.app, r) },
		"revoke": func(h *house, r keyspec.Ref) (*keystore.Key, error) {
			return h.Revoke(h.t.Context(), h.app, r, keyspec.Superseded, ReplaceDefault)
		},
		"compromise": func(h *house, r keyspec.Ref) (*keystore.Key, error) {
			return h.Revoke(h.t.Context(), h.app, r, keyspec.KeyCompromise, ReplaceDefault)
		},
		"destroy": func(h *house, r keyspec.Ref) (*keystore.Key, error) {
			return h.Destroy(h.t.Context(), h.app, r, time.Hour)
		},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHouse(t)
			h.create("APP/s", keyspec.Ed25519)
			h.create("APP/other", keyspec.Ed25519)
			h.sign(h.app, "APP/s", "m")
			h.sign(h.app, "APP/other", "m")
			if _, ok := h.secrets.peek(ref(t, "APP/s@1")); !ok {
				t.Fatal("the key is not in the cache")
			}
			if _, err := withdraw(h, ref(t, "APP/s")); err != nil {
				t.Fatal(err)
			}
			if _, ok := h.secrets.peek(ref(t, "APP/s@1")); ok {
				t.Error("the parsed key is still in the cache")
			}
			if _, ok := h.secrets.peek(ref(t, "APP/other@1")); !ok {
				t.Error("another key was evicted")
			}
		})
	}
}

// Destroyed versions are erased by the daemon itself, a day later or when they are many, and that is recorded.
func TestErasureIsBatched(t *testing.T) {
	h := newHouse(t)
	h.create("APP/a", keyspec.Ed25519)
	h.create("APP/b", keyspec.Ed25519)
	settle := func() (time.Time, keystore.Info) {
		t.Helper()
		next, err := h.Settle(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return next, h.store.Load().Info()
	}
	settle()
	if _, err := h.DestroyNow(t.Context(), h.app, ref(t, "APP/a")); err != nil {
		t.Fatal(err)
	}
	next, info := settle()
	if info.Epoch != 1 || info.ErasurePending != 1 {
		t.Fatalf("epoch %d, %d pending", info.Epoch, info.ErasurePending)
	}
	if wait := next.Sub(h.clock.Now()); wait < erasePeriod-eraseSoon || wait > erasePeriod {
		t.Errorf("the erasure is due in %s", wait)
	}
	h.clock.add(erasePeriod)
	if _, info = settle(); info.Epoch != 2 || info.ErasurePending != 0 {
		t.Errorf("after a day: epoch %d, %d pending", info.Epoch, info.ErasurePending)
	}
	if got := strings.Join(h.records(), "\n"); !strings.Contains(got, "epoch_rotate @0 begun 1 destroyed") || !strings.Contains(got, "epoch_rotate @0 ok") {
		t.Errorf("not recorded: %s", got)
	}

	// What an earlier run has left over does not wait for another day.
	if _, err := h.DestroyNow(t.Context(), h.app, ref(t, "APP/b")); err != nil {
		t.Fatal(err)
	}
	settle()
	h.restart()
	if next, _ = settle(); next.Sub(h.clock.Now()) > eraseSoon {
		t.Errorf("the erasure is due in %s", next.Sub(h.clock.Now()))
	}
	h.clock.add(eraseSoon)
	if _, info = settle(); info.Epoch != 3 || info.ErasurePending != 0 {
		t.Errorf("after an hour: epoch %d, %d pending", info.Epoch, info.ErasurePending)
	}
}

// Many destructions do not wait for the day to be over.
func TestErasureOfMany(t *testing.T) {
	h := newHouse(t)
	h.Settle(t.Context())
	s := h.store.Load()
	var changes []keystore.Change
	for i := range eraseMany {
		key := h.describeKey("APP/" + strings.Repeat("x", 1+i/100) + string(rune('a'+i%10)) + string(rune('a'+i/10%10)))
		changes = append(changes, keystore.Change{Key: key, Material: map[keyspec.Version][]byte{1: make([]byte, 32)}})
	}
	if err := s.Apply(t.Context(), keystore.Commit{Changes: changes}); err != nil {
		t.Fatal(err)
	}
	for i := range changes {
		changes[i].Key.Revision = 1
		changes[i].Key.Versions[0].State = keyspec.Destroyed
		changes[i].Material = nil
	}
	if err := s.Apply(t.Context(), keystore.Commit{Changes: changes}); err != nil {
		t.Fatal(err)
	}
	if n := s.Info().ErasurePending; n < eraseMany {
		t.Fatalf("%d are pending", n)
	}
	if _, err := h.erase(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	if info := s.Info(); info.Epoch != 2 || info.ErasurePending != 0 {
		t.Errorf("epoch %d, %d pending", info.Epoch, info.ErasurePending)
	}
}

func (h *house) describeKey(name string) *keystore.Key {
	now := h.clock.Now()
	return &keystore.Key{
		Name: keyspec.Name(name), Algorithm: keyspec.HMACSHA256, Usages: []keyspec.Usage{keyspec.MAC}, Origin: keyspec.Generated,
		Protection: keyspec.Software, Created: now, Current: 1, MinVersion: 1,
		Versions: []keystore.Version{{Number: 1, State: keyspec.Active, Created: now, NotBefore: now}},
	}
}

// After an unclean stop the store is checked, and what came of it can be read.
func TestCheckAfterUncleanStop(t *testing.T) {
	h := newHouse(t)
	h.create("APP/a", keyspec.Ed25519)
	h.checkStore(t.Context())
	if h.Check() != nil {
		t.Error("a store that was just made was checked")
	}
	h.unclean()
	if !h.store.Load().Info().Unclean {
		t.Fatal("the stop was clean")
	}
	h.checkStore(t.Context())
	if c := h.Check(); c == nil || !c.Done || c.Err != nil || c.Damaged != 0 || c.Warning() != "" {
		t.Errorf("%+v", c)
	}
	if got := strings.Join(h.records(), "\n"); !strings.Contains(got, "store_verify @0 ok after an unclean stop: 1 keys, 1 versions, 0 damaged") {
		t.Errorf("not recorded: %s", got)
	}
	for _, c := range []Check{{}, {Done: true, Damaged: 2}, {Done: true, Err: ErrLocked}} {
		if !strings.HasPrefix(c.Warning(), "the last stop was not clean") {
			t.Errorf("%+v: %q", c, c.Warning())
		}
	}
}

// A key that names its bridges is used through them and no other way.
func TestUsableVia(t *testing.T) {
	h := newHouse(t)
	for name, via := range map[string][]string{"APP/all": nil, "APP/native": {"native"}, "APP/pkcs11": {"pkcs11"}, "APP/both": {"pkcs11", "native"}} {
		n := &NewKey{Name: keyspec.Name(name), Algorithm: keyspec.HMACSHA256, UsableVia: via, Exportable: true}
		if _, err := h.Create(t.Context(), h.app, n, nil); err != nil {
			t.Fatal(err)
		}
		for _, from := range []string{"", "pkcs11", "ssh"} {
			c := *h.app
			c.Via = from
			_, _, err := h.MAC(t.Context(), &c, ref(t, name), []byte("x"), nil)
			door := from
			if door == "" {
				door = "native"
			}
			if allowed := len(via) == 0 || slices.Contains(via, door); allowed {
				want(t, name+" via "+door, err, nil)
			} else {
				want(t, name+" via "+door, err, ErrUsage)
			}
		}
	}
	h.create("APP/kek", keyspec.AES256GCM, keyspec.Wrap, keyspec.Unwrap)
	_, _, err := h.Wrap(t.Context(), h.app, ref(t, "APP/kek"), ref(t, "APP/pkcs11"))
	want(t, "wrapping a key of a bridge", err, ErrUsage)
}

// Without a grant nothing about a key shows in how a request is treated.
func TestPeekAsksThePolicy(t *testing.T) {
	h := newHouse(t)
	h.create("APP/e", keyspec.AES256GCM)
	if row, waits, _ := h.Peek(h.app, "encrypt", "APP/e"); row != nil || !waits {
		t.Errorf("before the first use the owner sees %v, %v", row, waits)
	}
	if _, waits, _ := h.Peek(h.app, "encrypt", "APP/none"); !waits {
		t.Error("a key that does not exist is told from one that was not used yet")
	}
	h.encrypt("APP/e", "x") // the reservation changes the key, which is read again
	sealed := h.encrypt("APP/e", "x")
	if row, waits, _ := h.Peek(h.app, "encrypt", "APP/e"); row == nil || waits {
		t.Errorf("the owner sees %v, %v", row, waits)
	}
	stranger := &Caller{UID: owner + 1}
	if row, waits, _ := h.Peek(stranger, "encrypt", "APP/e"); row != nil || waits {
		t.Errorf("a stranger sees %v, %v", row, waits)
	}
	// Who has to reserve invocations waits for the disk; who decrypts does not.
	h.restart()
	h.decrypt(h.app, "APP/e", sealed)
	if _, waits, _ := h.Peek(h.app, "decrypt", "APP/e"); waits {
		t.Error("decryption waits for the disk")
	}
	if row, waits, _ := h.Peek(h.app, "encrypt", "APP/e"); row == nil || !waits {
		t.Errorf("the first encryption: %v, %v", row, waits)
	}
	h.encrypt("APP/e", "x")
	h.encrypt("APP/e", "x")
	if _, waits, _ := h.Peek(h.app, "encrypt", "APP/e"); waits {
		t.Error("every encryption waits for the disk")
	}
}

// A rotation that is refused has not searched for primes before.
func TestRefusedRotationGeneratesNothing(t *testing.T) {
	h := newHouse(t)
	h.create("APP/r", keyspec.RSA2048)
	if _, err := h.Suspend(t.Context(), h.app, ref(t, "APP/r")); err != nil {
		t.Fatal(err)
	}
	before := h.activity.Load()
	_, err := h.Rotate(t.Context(), h.app, "APP/r", time.Time{}, time.Time{}, false)
	want(t, "rotation of a suspended key", err, ErrState)
	if n := h.activity.Load() - before; n > 1 { // the metadata; withNew would touch again
		t.Errorf("%d touches of key material", n)
	}
}

// Making a key holds nobody up: while one search for primes goes on, every other name can be changed.
func TestGenerationHoldsNoLock(t *testing.T) {
	h := newHouse(t)
	h.create("APP/s", keyspec.Ed25519)
	begun, end := make(chan struct{}), make(chan struct{})
	done := make(chan error)
	go func() {
		n := &NewKey{Name: "APP/slow", Algorithm: keyspec.HMACSHA256}
		_, err := h.Engine.create(h.t.Context(), h.app, &act{op: "key_create", ref: keyspec.Ref{Name: n.Name}}, n, keyspec.Generated, nil,
			func(*use, *mechanism.Row) ([]byte, error) { close(begun); <-end; return make([]byte, 32), nil })
		done <- err
	}()
	<-begun
	free := make(chan struct{})
	go func() { h.writers.lock("APP/slow")(); close(free) }()
	select {
	case <-free:
	case <-time.After(5 * time.Second):
		t.Error("the name is locked while its key is made")
	}
	// Whoever is faster has the name.
	h.create("APP/slow", keyspec.HMACSHA256)
	close(end)
	want(t, "the slower one", <-done, keystore.ErrExists)
}
