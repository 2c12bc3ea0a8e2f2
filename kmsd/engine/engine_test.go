package engine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/keystore/secmem"
	"github.com/kmsd-project/kmsd/kmsd/audit"
	"github.com/kmsd-project/kmsd/kmsd/mechanism"
	"github.com/kmsd-project/kmsd/policy"
)

const owner = 4242

// clock is a time that tests move.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) add(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

// house is an engine with a real keystore and a real audit log.
type house struct {
	*Engine
	t     testing.TB
	dir   string
	clock *clock
	log   *audit.Log
	app   *Caller // the owner on the application socket
	admin *Caller // the owner on the admin socket
}

func newHouse(t testing.TB) *house {
	t.Helper()
	return newHouseWithEscrow(t)
}

func testSlots() []keystore.NewSlot {
	return []keystore.NewSlot{{UUID: [16]byte{1}, Kind: "test", Label: "test", Secret: bytes.Repeat([]byte{1}, 32), Blob: []byte("blob")}}
}

// newHouseWithEscrow is newHouse for a store with escrow recipients.
func newHouseWithEscrow(t testing.TB, recipients ...string) *house {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	h := &house{
		t: t, dir: dir, clock: &clock{now: time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)},
		app: &Caller{UID: owner, GID: 1, PID: 100}, admin: &Caller{UID: owner, GID: 1, PID: 100, Admin: true},
	}
	s, err := keystore.Create(t.Context(), h.config(), testSlots(), recipients)
	if err != nil {
		t.Fatal(err)
	}
	h.start(s)
	return h
}

func (h *house) config() keystore.Config {
	arena, err := secmem.NewArena(4096)
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { arena.Close() })
	return keystore.Config{Dir: h.dir, Arena: arena, Now: h.clock.Now}
}

func (h *house) start(s *keystore.Store) {
	log, err := audit.Open(audit.Config{Dir: filepath.Join(h.dir, "audit")})
	if err != nil {
		h.t.Fatal(err)
	}
	h.log = log
	h.Engine = New(Config{
		Store: s, Audit: log, Policy: policy.UserMode(owner), Now: h.clock.Now, Code: func(err error) string { return err.Error() },
	})
	h.t.Cleanup(func() { s.Close(); log.Close() })
	if err := h.Unlocked(); err != nil {
		h.t.Fatal(err)
	}
}

// restart closes everything without the courtesy of emptying the outbox, and opens it again.
func (h *house) restart() {
	h.t.Helper()
	h.log.Close()
	if err := h.Engine.store.Load().Close(); err != nil {
		h.t.Fatal(err)
	}
	s, err := keystore.Open(h.t.Context(), h.config())
	if err != nil {
		h.t.Fatal(err)
	}
	if err := s.Unlock(h.t.Context(), 1, bytes.Repeat([]byte{1}, 32)); err != nil {
		h.t.Fatal(err)
	}
	h.start(s)
}

// unclean closes everything as a loss of power would: the note that the database was changed stays.
func (h *house) unclean() {
	h.t.Helper()
	note := filepath.Join(h.dir, "dirty")
	h.restart()
	if err := h.Engine.store.Load().Close(); err != nil {
		h.t.Fatal(err)
	}
	h.log.Close()
	if err := os.WriteFile(note, nil, 0o600); err != nil {
		h.t.Fatal(err)
	}
	s, err := keystore.Open(h.t.Context(), h.config())
	if err != nil {
		h.t.Fatal(err)
	}
	if err := s.Unlock(h.t.Context(), 1, bytes.Repeat([]byte{1}, 32)); err != nil {
		h.t.Fatal(err)
	}
	h.start(s)
}

func (h *house) create(name string, a keyspec.Algorithm, usages ...keyspec.Usage) *keystore.Key {
	h.t.Helper()
	key, err := h.Create(h.t.Context(), h.app, &NewKey{Name: keyspec.Name(name), Algorithm: a, Usages: usages, Exportable: true}, nil)
	if err != nil {
		h.t.Fatal(err)
	}
	return key
}

func ref(t testing.TB, s string) keyspec.Ref {
	t.Helper()
	r, err := keyspec.ParseRef(s)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func (h *house) sign(c *Caller, key, message string) ([]byte, error) {
	sig, _, err := h.Sign(h.t.Context(), c, ref(h.t, key), "", "", mechanism.Input{Message: []byte(message)}, nil)
	return sig, err
}

func (h *house) verify(c *Caller, key, message string, sig []byte) (Verified, error) {
	return h.Verify(h.t.Context(), c, ref(h.t, key), "", "", mechanism.Input{Message: []byte(message)}, sig)
}

func (h *house) encrypt(key, data string) []byte {
	h.t.Helper()
	sealed, _, err := h.Encrypt(h.t.Context(), h.app, ref(h.t, key), []byte(data), []byte("aad"), nil)
	if err != nil {
		h.t.Fatal(err)
	}
	return sealed
}

func (h *house) decrypt(c *Caller, key string, sealed []byte) (string, error) {
	data, _, err := h.Decrypt(h.t.Context(), c, ref(h.t, key), sealed, []byte("aad"), nil, nil)
	return string(data), err
}

// records returns the audit entries so far as lines "op key code detail".
func (h *house) records() []string {
	h.t.Helper()
	if err := h.FlushAudit(h.t.Context()); err != nil {
		h.t.Fatal(err)
	}
	var out []string
	err := h.AuditSeed(func(seed []byte) error {
		entries, _, err := h.log.Tail(h.t.Context(), seed, 0, 10_000)
		for _, e := range entries {
			out = append(out, strings.TrimSpace(fmt.Sprintf("%s %s@%d %s %s", e.Op, e.Key, e.Version, e.Code, e.Detail)))
		}
		return err
	})
	if err != nil {
		h.t.Fatal(err)
	}
	return out
}

func want(t testing.TB, what string, err, target error) {
	t.Helper()
	if !errors.Is(err, target) || target == nil && err != nil {
		t.Errorf("%s: got %v, want %v", what, err, target)
	}
}

func TestCreateIsIdempotentByRequestKey(t *testing.T) {
	h := newHouse(t)
	n := &NewKey{Name: "APP/k", Algorithm: keyspec.ECDSAP256}
	first, err := h.Create(t.Context(), h.app, n, []byte("request 1"))
	if err != nil {
		t.Fatal(err)
	}
	again, err := h.Create(t.Context(), h.app, n, []byte("request 1"))
	if err != nil || again.Versions[0].SPKISHA256 != first.Versions[0].SPKISHA256 {
		t.Fatalf("repeated: %v", err)
	}
	_, err = h.Create(t.Context(), h.app, n, []byte("request 2"))
	want(t, "another request", err, keystore.ErrExists)
	_, err = h.Create(t.Context(), h.app, n, nil)
	want(t, "no request key", err, keystore.ErrExists)
	_, err = h.Create(t.Context(), h.app, &NewKey{Name: "APP/other", Algorithm: keyspec.ECDSAP256}, []byte("request 1"))
	want(t, "same request key, other key", err, ErrRequestKey)
}

func TestCreateRefuses(t *testing.T) {
	h := newHouse(t)
	now := h.clock.Now()
	for _, c := range []struct {
		name string
		key  NewKey
		err  error
	}{
		{"bad name", NewKey{Name: "a b", Algorithm: keyspec.Ed25519}, ErrInput},
		{"no algorithm", NewKey{Name: "A"}, ErrInput},
		{"mixed RSA", NewKey{Name: "A", Algorithm: keyspec.RSA2048, Usages: []keyspec.Usage{keyspec.Sign, keyspec.Decrypt}}, ErrInput},
		{"foreign usage", NewKey{Name: "A", Algorithm: keyspec.Ed25519, Usages: []keyspec.Usage{keyspec.Encrypt}}, ErrInput},
		{"TPM", NewKey{Name: "A", Algorithm: keyspec.Ed25519, Protection: keyspec.TPM}, ErrUnsupported},
		{"expired", NewKey{Name: "A", Algorithm: keyspec.Ed25519, Expires: now.Add(-time.Hour)}, ErrInput},
		{"backwards", NewKey{Name: "A", Algorithm: keyspec.Ed25519, NotBefore: now.Add(2 * time.Hour), Expires: now.Add(time.Hour)}, ErrInput},
		{"both", NewKey{Name: "A", Algorithm: keyspec.Ed25519, NoExpiry: true, Expires: now.Add(time.Hour)}, ErrInput},
		{"too long", NewKey{Name: "A", Algorithm: keyspec.Ed25519, Expires: now.Add(200 * 365 * 24 * time.Hour)}, ErrInput},
		{"long label", NewKey{Name: "A", Algorithm: keyspec.Ed25519, Labels: map[string]string{"x": strings.Repeat("x", 1000)}}, ErrInput},
		{"unknown profile", NewKey{Name: "A", Algorithm: keyspec.RSA2048, Profile: "x"}, ErrInput},
	} {
		_, err := h.Create(t.Context(), h.app, &c.key, nil)
		want(t, c.name, err, c.err)
	}
}

func TestDefaultCryptoperiods(t *testing.T) {
	h := newHouse(t)
	now := h.clock.Now()
	for _, c := range []struct {
		key  NewKey
		want time.Time
	}{
		{NewKey{Name: "A/1", Algorithm: keyspec.Ed25519}, now.Add(cryptoperiod)},
		{NewKey{Name: "A/2", Algorithm: keyspec.HKDFSHA256}, now.Add(derivingPeriod)},
		{NewKey{Name: "A/3", Algorithm: keyspec.Ed25519, Usages: []keyspec.Usage{keyspec.Sign, keyspec.Certify}}, now.Add(certifyPeriod)},
		{NewKey{Name: "A/4", Algorithm: keyspec.AES256GCM, NoExpiry: true}, time.Time{}},
		{NewKey{Name: "A/5", Algorithm: keyspec.AES256GCM, Expires: now.Add(time.Hour)}, now.Add(time.Hour)},
	} {
		if _, err := h.Create(t.Context(), h.app, &c.key, nil); err != nil {
			t.Fatal(err)
		}
		key, err := h.Get(t.Context(), h.app, keyspec.Ref{Name: c.key.Name})
		if err != nil || !key.Versions[0].Expires.Equal(c.want) {
			t.Errorf("%s expires %v, want %v (%v)", c.key.Name, key.Versions[0].Expires, c.want, err)
		}
	}
}

// Policy decides on the name before the store is touched, and a missing key is told like one without a grant.
func TestPolicyComesFirst(t *testing.T) {
	h := newHouse(t)
	h.create("APP/k", keyspec.Ed25519)
	p, err := policy.Parse([]byte("version = 1\n[applications]\nAPP = [4242]\n"))
	if err != nil {
		t.Fatal(err)
	}
	h.SetPolicy(p)
	other := &Caller{UID: 7}
	for _, c := range []struct {
		who *Caller
		key string
		err error
	}{
		{h.app, "APP/k", nil},
		{h.app, "APP/missing", ErrNotAvailable},
		{h.app, "OTHER/k", ErrNotAvailable},
		{other, "APP/k", ErrNotAvailable},
		{other, "APP/missing", ErrNotAvailable},
	} {
		_, err := h.sign(c.who, c.key, "m")
		want(t, c.key, err, c.err)
		if err != nil && err.Error() != ErrNotAvailable.Error() {
			t.Errorf("%s: the text %q tells more", c.key, err)
		}
	}
	_, err = h.Random(t.Context(), other, 10, nil)
	want(t, "random", err, ErrDenied)
	_, _, err = h.List(t.Context(), h.app, "", nil, 0)
	want(t, "list of everything", err, ErrDenied)
	if _, _, err = h.List(t.Context(), h.app, "APP", nil, 0); err != nil {
		t.Error(err)
	}
	// Both names of an act with two are asked for.
	h.SetPolicy(policy.UserMode(owner))
	h.create("OTHER/kek", keyspec.AES256GCM, keyspec.Wrap)
	h.SetPolicy(p)
	_, _, err = h.Wrap(t.Context(), h.app, ref(t, "OTHER/kek"), ref(t, "APP/k"))
	want(t, "wrap under a foreign key", err, ErrNotAvailable)
	before := len(h.records())
	h.sign(other, "APP/k", "m")
	got := h.records()
	if len(got) != before+1 || !strings.Contains(got[before], "uid in no application") {
		t.Errorf("the denial is not recorded with its rule: %v", got[before:])
	}
}

func TestRotation(t *testing.T) {
	h := newHouse(t)
	h.create("APP/s", keyspec.Ed25519)
	h.create("APP/e", keyspec.AES256GCM)
	sig, err := h.sign(h.app, "APP/s", "m")
	want(t, "sign", err, nil)
	sealed := h.encrypt("APP/e", "secret")
	for _, n := range []keyspec.Name{"APP/s", "APP/e"} {
		key, err := h.Rotate(t.Context(), h.app, n, time.Time{}, time.Time{}, false)
		if err != nil || key.Current != 2 || key.Versions[0].State != keyspec.Deactivated || key.Versions[1].State != keyspec.Active {
			t.Fatalf("rotate %s: %+v %v", n, key, err)
		}
	}
	if v, err := h.verify(h.app, "APP/s", "m", sig); err != nil || v.Version != 1 {
		t.Errorf("verify by the old version: %+v %v", v, err)
	}
	_, err = h.sign(h.app, "APP/s@1", "m")
	want(t, "sign with the old version", err, ErrState)
	if sig, err = h.sign(h.app, "APP/s", "m"); err != nil {
		t.Fatal(err)
	}
	if v, err := h.verify(h.app, "APP/s", "m", sig); err != nil || v.Version != 2 {
		t.Errorf("verify by the new version: %+v %v", v, err)
	}
	_, err = h.verify(h.app, "APP/s@1", "m", sig)
	want(t, "verify by the wrong version", err, mechanism.ErrVerification)

	if got, err := h.decrypt(h.app, "APP/e", sealed); err != nil || got != "secret" {
		t.Errorf("decrypt of the old version: %q %v", got, err)
	}
	again, number, err := h.Rewrap(t.Context(), h.app, "APP/e", sealed, []byte("aad"), nil)
	if err != nil || number != 2 {
		t.Fatalf("rewrap: %d %v", number, err)
	}
	if _, err := h.Set(t.Context(), h.app, "APP/e", &Settings{MinVersion: 2}); err != nil {
		t.Fatal(err)
	}
	_, err = h.decrypt(h.app, "APP/e", sealed)
	want(t, "below the minimum version", err, ErrState)
	if got, err := h.decrypt(h.app, "APP/e", again); err != nil || got != "secret" {
		t.Errorf("decrypt of the rewrapped: %q %v", got, err)
	}
	_, err = h.Set(t.Context(), h.app, "APP/e", &Settings{MinVersion: 3})
	want(t, "minimum above the current", err, ErrInput)
}

// A version with a later beginning takes over when its time comes, without anybody doing anything.
func TestRotationWithOverlap(t *testing.T) {
	h := newHouse(t)
	h.create("APP/s", keyspec.Ed25519)
	if _, err := h.Rotate(t.Context(), h.app, "APP/s", h.clock.Now().Add(time.Hour), time.Time{}, false); err != nil {
		t.Fatal(err)
	}
	number := func() keyspec.Version {
		_, n, err := h.Sign(t.Context(), h.app, ref(t, "APP/s"), "", "", mechanism.Input{Message: []byte("m")}, nil)
		want(t, "sign", err, nil)
		return n
	}
	if n := number(); n != 1 {
		t.Errorf("version %d signs before its time", n)
	}
	_, err := h.sign(h.app, "APP/s@2", "m")
	want(t, "pre-active", err, ErrExpired)
	h.clock.add(2 * time.Hour)
	if n := number(); n != 2 {
		t.Errorf("version %d still signs", n)
	}
	_, err = h.sign(h.app, "APP/s@1", "m")
	want(t, "taken over", err, ErrState)
	if _, err := h.Settle(t.Context()); err != nil {
		t.Fatal(err)
	}
	key, err := h.store.Load().Get("APP/s")
	if err != nil || key.Current != 2 || key.Versions[0].State != keyspec.Deactivated || key.Versions[1].State != keyspec.Active {
		t.Errorf("settled: %+v %v", key, err)
	}
}

func TestKeep(t *testing.T) {
	h := newHouse(t)
	if _, err := h.Create(t.Context(), h.app, &NewKey{Name: "APP/k", Algorithm: keyspec.HMACSHA256, Keep: 2}, nil); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if _, err := h.Rotate(t.Context(), h.app, "APP/k", time.Time{}, time.Time{}, false); err != nil {
			t.Fatal(err)
		}
	}
	key, err := h.Get(t.Context(), h.app, keyspec.Ref{Name: "APP/k"})
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range key.Versions {
		if scheduled := !v.DestroyAt.IsZero(); scheduled != (v.Number <= 2) {
			t.Errorf("version %d: destruction scheduled %v", v.Number, scheduled)
		}
	}
}

func TestSuspendRevokeDestroy(t *testing.T) {
	h := newHouse(t)
	ctx := t.Context()
	h.create("APP/s", keyspec.Ed25519)
	sig, _ := h.sign(h.app, "APP/s", "m")

	h.Suspend(ctx, h.app, ref(t, "APP/s"))
	_, err := h.sign(h.app, "APP/s", "m")
	want(t, "suspended sign", err, ErrState)
	_, err = h.verify(h.app, "APP/s", "m", sig)
	want(t, "suspended verify", err, ErrState)
	_, err = h.Rotate(ctx, h.app, "APP/s", time.Time{}, time.Time{}, false)
	want(t, "rotate while suspended", err, ErrState)
	_, err = h.Resume(ctx, h.app, ref(t, "APP/s"))
	want(t, "resume", err, nil)
	_, err = h.Resume(ctx, h.app, ref(t, "APP/s"))
	want(t, "resume twice", err, ErrState)
	_, err = h.sign(h.app, "APP/s", "m")
	want(t, "resumed", err, nil)

	// Destruction takes the key out of use at once and can be cancelled.
	key, err := h.Destroy(ctx, h.app, ref(t, "APP/s"), 0)
	if err != nil || !key.Versions[0].DestroyAt.Equal(h.clock.Now().Add(DefaultDestroyDelay)) {
		t.Fatalf("destroy: %+v %v", key, err)
	}
	_, err = h.sign(h.app, "APP/s", "m")
	want(t, "scheduled", err, ErrState)
	_, err = h.DestroyCancel(ctx, h.app, ref(t, "APP/s"))
	want(t, "cancel", err, nil)
	_, err = h.sign(h.app, "APP/s", "m")
	want(t, "cancelled", err, nil)

	_, err = h.Revoke(ctx, h.app, ref(t, "APP/s"), keyspec.Superseded, ReplaceDefault)
	want(t, "revoke", err, nil)
	_, err = h.sign(h.app, "APP/s", "m")
	want(t, "revoked sign", err, ErrState)
	if v, err := h.verify(h.app, "APP/s", "m", sig); err != nil || v.Compromised {
		t.Errorf("revoked verify: %+v %v", v, err)
	}
	_, err = h.Revoke(ctx, h.app, ref(t, "APP/s"), keyspec.KeyCompromise, ReplaceDefault)
	want(t, "revoke worse", err, nil)
	if v, err := h.verify(h.app, "APP/s", "m", sig); err != nil || !v.Compromised {
		t.Errorf("compromised verify: %+v %v", v, err)
	}

	h.Destroy(ctx, h.app, ref(t, "APP/s"), time.Hour)
	h.clock.add(2 * time.Hour)
	_, err = h.verify(h.app, "APP/s", "m", sig)
	want(t, "due", err, ErrState)
	_, err = h.DestroyCancel(ctx, h.app, ref(t, "APP/s"))
	want(t, "cancel when due", err, ErrState)
	if _, err := h.Settle(ctx); err != nil {
		t.Fatal(err)
	}
	stored, err := h.store.Load().Get("APP/s")
	if err != nil || stored.Versions[0].State != keyspec.Destroyed {
		t.Fatalf("settled: %+v %v", stored, err)
	}
	if _, err := h.store.Load().Material(ref(t, "APP/s@1"), nil); err == nil {
		t.Error("the material is still there")
	}
	_, err = h.Create(ctx, h.app, &NewKey{Name: "APP/s", Algorithm: keyspec.Ed25519}, nil)
	want(t, "create over a tombstone", err, keystore.ErrExists)
	if last := h.records(); !strings.Contains(strings.Join(last, "\n"), "key_settle APP/s@0 ok due") {
		t.Errorf("the destruction is not recorded: %v", last)
	}
}

func TestDestroyNow(t *testing.T) {
	h := newHouse(t)
	h.create("APP/s", keyspec.Ed25519)
	h.sign(h.app, "APP/s", "m")
	before := h.store.Load().Info().Epoch
	key, err := h.DestroyNow(t.Context(), h.app, ref(t, "APP/s"))
	if err != nil || key.Versions[0].State != keyspec.Destroyed {
		t.Fatalf("%+v %v", key, err)
	}
	if info := h.store.Load().Info(); info.Epoch != before || info.ErasurePending != 1 {
		t.Errorf("an application began epoch %d; %d pending", info.Epoch, info.ErasurePending)
	}
	h.create("APP/t", keyspec.Ed25519)
	if key, err = h.DestroyNow(t.Context(), h.admin, ref(t, "APP/t")); err != nil || key.Versions[0].State != keyspec.Destroyed {
		t.Fatalf("%+v %v", key, err)
	}
	if info := h.store.Load().Info(); info.Epoch == before || info.ErasurePending != 0 {
		t.Errorf("epoch %d as before, %d pending", info.Epoch, info.ErasurePending)
	}
	_, err = h.sign(h.app, "APP/s", "m")
	want(t, "destroyed", err, ErrState)
	if _, ok := h.secrets.peek(ref(t, "APP/s@1")); ok {
		t.Error("the cache still has the key")
	}
}

func TestExpiry(t *testing.T) {
	h := newHouse(t)
	n := &NewKey{Name: "APP/e", Algorithm: keyspec.AES256GCM, Expires: h.clock.Now().Add(time.Hour)}
	if _, err := h.Create(t.Context(), h.app, n, nil); err != nil {
		t.Fatal(err)
	}
	sealed := h.encrypt("APP/e", "x")
	h.clock.add(time.Hour)
	_, _, err := h.Encrypt(t.Context(), h.app, ref(t, "APP/e"), []byte("x"), nil, nil)
	want(t, "expired encrypt", err, ErrExpired)
	got, err := h.decrypt(h.app, "APP/e", sealed)
	if err != nil || got != "x" {
		t.Errorf("expired decrypt: %q %v", got, err)
	}
	if _, err := h.Settle(t.Context()); err != nil {
		t.Fatal(err)
	}
	if key, err := h.store.Load().Get("APP/e"); err != nil || key.Versions[0].State != keyspec.Deactivated {
		t.Errorf("settled: %+v %v", key, err)
	}
}

// Every failure to decrypt is one error with one text.
func TestDecryptionFailuresAreOne(t *testing.T) {
	h := newHouse(t)
	h.create("APP/e", keyspec.AES256GCM)
	h.create("APP/f", keyspec.AES256GCM)
	h.create("APP/c", keyspec.ChaCha20Poly1305)
	sealed := h.encrypt("APP/e", "secret")
	change := func(i int) []byte {
		b := bytes.Clone(sealed)
		b[(len(b)+i)%len(b)] ^= 1
		return b
	}
	for name, c := range map[string]struct {
		key    string
		sealed []byte
	}{
		"empty": {"APP/e", nil}, "short": {"APP/e", sealed[:20]}, "tag": {"APP/e", change(-1)}, "body": {"APP/e", change(-20)},
		"nonce": {"APP/e", change(14)}, "magic": {"APP/e", change(0)}, "version": {"APP/e", change(11)}, "algorithm": {"APP/e", change(5)},
		"other key": {"APP/f", sealed}, "other algorithm": {"APP/c", sealed}, "named version": {"APP/e@1", change(11)},
	} {
		_, err := h.decrypt(h.app, c.key, c.sealed)
		if !errors.Is(err, ErrDecryption) || err.Error() != ErrDecryption.Error() {
			t.Errorf("%s: %v", name, err)
		}
	}
	_, _, err := h.Decrypt(t.Context(), h.app, ref(t, "APP/e"), sealed, []byte("other"), nil, nil)
	want(t, "other aad", err, ErrDecryption)
}

func TestCompromisedDecryptNeedsExplicitGrant(t *testing.T) {
	h := newHouse(t)
	h.create("APP/e", keyspec.AES256GCM)
	sealed := h.encrypt("APP/e", "x")
	if _, err := h.Revoke(t.Context(), h.app, ref(t, "APP/e"), keyspec.KeyCompromise, ReplaceDefault); err != nil {
		t.Fatal(err)
	}
	_, err := h.decrypt(h.app, "APP/e", sealed)
	want(t, "application socket", err, ErrState)
	if got, err := h.decrypt(h.admin, "APP/e", sealed); err != nil || got != "x" {
		t.Errorf("admin socket: %q %v", got, err)
	}
}

func TestInvocationCounter(t *testing.T) {
	h := newHouse(t)
	h.create("APP/e", keyspec.AES256GCM)
	h.encrypt("APP/e", "x")
	stored := func() uint64 {
		key, err := h.store.Load().Get("APP/e")
		if err != nil {
			t.Fatal(err)
		}
		return key.Versions[0].Invocations
	}
	if n := stored(); n != invocationBlock {
		t.Fatalf("%d reserved, want a block", n)
	}
	h.encrypt("APP/e", "x")
	if n := stored(); n != invocationBlock {
		t.Errorf("%d reserved after the second use", n)
	}
	// A crash loses the rest of the block and never uses it again.
	h.restart()
	h.encrypt("APP/e", "x")
	if n := stored(); n != 2*invocationBlock {
		t.Errorf("%d reserved after a restart", n)
	}
	// One before the limit.
	key, err := h.store.Load().Get("APP/e")
	if err != nil {
		t.Fatal(err)
	}
	key.Versions[0].Invocations = maxInvocations - 1
	if err := h.store.Load().Apply(t.Context(), keystore.Commit{Changes: []keystore.Change{{Key: key}}}); err != nil {
		t.Fatal(err)
	}
	h.restart()
	sealed := h.encrypt("APP/e", "last")
	_, _, err = h.Encrypt(t.Context(), h.app, ref(t, "APP/e"), []byte("x"), nil, nil)
	want(t, "beyond the limit", err, ErrExhausted)
	_, _, _, err = h.DataKey(t.Context(), h.app, ref(t, "APP/e"), 32, nil, true)
	want(t, "data key beyond the limit", err, ErrExhausted)
	_, err = h.BeginStream(t.Context(), h.app, "encrypt", ref(t, "APP/e"), nil, nil, nil)
	want(t, "stream beyond the limit", err, ErrExhausted)
	if got, err := h.decrypt(h.app, "APP/e", sealed); err != nil || got != "last" {
		t.Errorf("decrypt at the limit: %q %v", got, err)
	}
	if n := stored(); n != maxInvocations {
		t.Errorf("%d reserved", n)
	}
	h.restart()
	_, _, err = h.Encrypt(t.Context(), h.app, ref(t, "APP/e"), []byte("x"), nil, nil)
	want(t, "beyond the limit after a restart", err, ErrExhausted)
}

func TestLockForgetsEverything(t *testing.T) {
	h := newHouse(t)
	h.create("APP/s", keyspec.Ed25519)
	h.create("APP/m", keyspec.HMACSHA256)
	h.sign(h.app, "APP/s", "m")
	stream, err := h.BeginStream(t.Context(), h.app, "mac", ref(t, "APP/m"), nil, nil, nil)
	want(t, "stream", err, nil)
	h.Lock()
	if len(h.secrets.items)+len(h.keys.items)+len(h.publics.items) != 0 {
		t.Error("the caches are not empty")
	}
	_, err = h.sign(h.app, "APP/s", "m")
	want(t, "locked", err, ErrLocked)
	_, err = stream.Update(0, []byte("x"), nil)
	want(t, "stream of before", err, ErrLocked)
	if err := h.store.Load().Unlock(t.Context(), 1, bytes.Repeat([]byte{1}, 32)); err != nil {
		t.Fatal(err)
	}
	want(t, "unlocked", h.Unlocked(), nil)
	_, err = h.sign(h.app, "APP/s", "m")
	want(t, "unlocked", err, nil)
	// What was refused while the store was locked is recorded too.
	if got := strings.Join(h.records(), "\n"); !strings.Contains(got, "sign APP/s@0 the keystore is locked") {
		t.Errorf("not recorded: %s", got)
	}
}

func TestPanicIsCaughtAndRecorded(t *testing.T) {
	h := newHouse(t)
	err := h.do(t.Context(), h.app, &act{op: "boom"}, func(*use) error {
		return []error{}[h.Panics()]
	})
	var traced *Traced
	if !errors.Is(err, ErrInternal) || !errors.As(err, &traced) || h.Panics() != 1 {
		t.Fatalf("%v, %d panics", err, h.Panics())
	}
	got := h.records()
	if !strings.Contains(got[len(got)-1], "boom @0 internal error panic: runtime error: index out of range [0] with length 0") {
		t.Errorf("recorded as %q", got[len(got)-1])
	}
	err = h.do(t.Context(), h.app, &act{op: "boom"}, func(*use) error { panic("secret bytes") })
	want(t, "panic with a value", err, ErrInternal)
	if got := strings.Join(h.records(), "\n"); strings.Contains(got, "secret bytes") {
		t.Error("the value of a panic was recorded")
	}
}

// Every operation leaves exactly one record, whatever comes of it, also over a crash before the outbox was copied.
func TestEveryActIsRecordedOnce(t *testing.T) {
	h := newHouse(t)
	h.create("APP/s", keyspec.Ed25519)
	h.sign(h.app, "APP/s", "m")
	h.sign(h.app, "APP/none", "m")
	h.Suspend(t.Context(), h.app, ref(t, "APP/s"))
	h.sign(h.app, "APP/s", "m")
	h.restart() // nobody has copied the outbox
	h.Resume(t.Context(), h.app, ref(t, "APP/s"))
	h.records()
	h.restart() // copied, but the outbox still has them
	h.create("APP/t", keyspec.Ed25519)
	got := make(map[string]int)
	for _, r := range h.records() {
		got[r]++
	}
	for r, n := range map[string]int{
		"key_create APP/s@0 ok": 1, "key_create APP/t@0 ok": 1, "key_suspend APP/s@0 ok": 1, "key_resume APP/s@0 ok": 1,
		"sign APP/s@1 ok": 1, "sign APP/none@0 " + ErrNotAvailable.Error() + " no such key: APP/none": 1,
	} {
		if got[r] != n && !(strings.Contains(r, "none")) {
			t.Errorf("%q is recorded %d times, want %d", r, got[r], n)
		}
	}
	total := 0
	for r, n := range got {
		if !strings.HasPrefix(r, "keystore_open") {
			total += n
		}
	}
	if total != 7 {
		t.Errorf("%d records, want 7: %v", total, got)
	}
}

// A use of a durable key is on disk before it is answered, and refused when it cannot be recorded.
func TestDurableKey(t *testing.T) {
	h := newHouse(t)
	if _, err := h.Create(t.Context(), h.app, &NewKey{Name: "APP/d", Algorithm: keyspec.Ed25519, Durable: true}, nil); err != nil {
		t.Fatal(err)
	}
	h.create("APP/k", keyspec.Ed25519)
	if _, err := h.sign(h.app, "APP/d", "m"); err != nil {
		t.Fatal(err)
	}
	report, err := audit.Verify(filepath.Join(h.dir, "audit"), nil) // without a flush
	if err != nil || report.Entries == 0 {
		t.Errorf("%+v %v", report, err)
	}
	h.log.Close()
	sig, err := h.sign(h.app, "APP/d", "m")
	want(t, "no audit", err, ErrAudit)
	_ = sig
	_, err = h.Create(t.Context(), h.app, &NewKey{Name: "APP/x", Algorithm: keyspec.Ed25519}, nil)
	want(t, "act without audit", err, ErrAudit)
}

// Signing goes on while others rotate, suspend and destroy: no answer is wrong, no race is found.
func TestConcurrentLifecycle(t *testing.T) {
	h := newHouse(t)
	ctx, cancel := context.WithCancel(t.Context())
	go h.Run(ctx)
	defer cancel()
	h.create("APP/a", keyspec.Ed25519)
	h.create("APP/e", keyspec.AES256GCM)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 30 {
				message := "m"
				sig, n, err := h.Sign(ctx, h.app, ref(t, "APP/a"), "", "", mechanism.Input{Message: []byte(message)}, nil)
				if err == nil {
					_, err = h.Verify(ctx, h.app, keyspec.Ref{Name: "APP/a", Version: n}, "", "", mechanism.Input{Message: []byte(message)}, sig)
				}
				if err != nil && !errors.Is(err, ErrState) {
					t.Error(err)
				}
				sealed, _, err := h.Encrypt(ctx, h.app, ref(t, "APP/e"), []byte("x"), nil, nil)
				if err == nil {
					_, _, err = h.Decrypt(ctx, h.app, ref(t, "APP/e"), sealed, nil, nil, nil)
				}
				if err != nil && !errors.Is(err, ErrState) {
					t.Error(err)
				}
			}
		})
	}
	wg.Go(func() {
		for range 5 {
			for _, n := range []keyspec.Name{"APP/a", "APP/e"} {
				if _, err := h.Rotate(ctx, h.app, n, time.Time{}, time.Time{}, false); err != nil && !errors.Is(err, ErrState) {
					t.Error(err)
				}
			}
		}
	})
	wg.Go(func() {
		for range 5 {
			h.Suspend(ctx, h.app, ref(t, "APP/a"))
			h.Resume(ctx, h.app, ref(t, "APP/a"))
			h.keys.clear()
			h.secrets.clear()
		}
	})
	wg.Wait()
}

// What changed is seen by the next operation, although everything was in the cache.
func TestCacheIsNeverStale(t *testing.T) {
	h := newHouse(t)
	h.create("APP/a", keyspec.Ed25519)
	for range 50 {
		if _, err := h.sign(h.app, "APP/a", "m"); err != nil {
			t.Fatal(err)
		}
		h.Suspend(t.Context(), h.app, ref(t, "APP/a"))
		_, err := h.sign(h.app, "APP/a", "m")
		want(t, "suspended", err, ErrState)
		h.Resume(t.Context(), h.app, ref(t, "APP/a"))
	}
}

func TestLRU(t *testing.T) {
	l := newLRU[int, int](3)
	now := time.Unix(1000, 0)
	yes := func() bool { return true }
	for i := range 4 {
		l.put(i, i, now.Add(time.Duration(i)*time.Second), yes)
	}
	if _, ok := l.peek(0); ok {
		t.Error("over the limit")
	}
	l.get(1, now.Add(10*time.Second))
	if dropped, left := l.sweep(now.Add(4 * time.Second)); !dropped || left != 1 {
		t.Errorf("sweep left %d", left)
	}
	l.put(9, 9, now, func() bool { return false })
	if _, ok := l.peek(9); ok {
		t.Error("stale value was taken")
	}
	l.put(1, 2, now, yes)
	if v, _ := l.peek(1); v != 2 || l.order.Len() != 1 {
		t.Error("not replaced")
	}
}
