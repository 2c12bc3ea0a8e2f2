// Package engine says what a key may do and does it.
//
// Every operation takes one path, do: authorise, load, operate, audit. It knows callers, keys and time; it knows nothing of
// sockets and messages.
package engine

import (
	"context"
	"crypto"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/keystore/secmem"
	"github.com/kmsd-project/kmsd/kmsd/audit"
	"github.com/kmsd-project/kmsd/kmsd/mechanism"
	"github.com/kmsd-project/kmsd/policy"
)

// Defaults of a Config.
const (
	DefaultCacheIdle = 30 * time.Second
	DefaultCacheKeys = 1024
)

// Config is what an Engine works with.
type Config struct {
	Store  *keystore.Store // nil until there is one; see SetStore
	Audit  *audit.Log
	Policy *policy.Policy
	Code   func(error) string // the wire code of an error, for the audit
	Log    *slog.Logger       // nil: none
	Now    func() time.Time   // nil: time.Now

	Devices Devices // of resident keys; nil: there are none
	Renewal Renewal

	CacheIdle time.Duration // after which an unused parsed key is forgotten; 0: DefaultCacheIdle
	CacheKeys int           // parsed keys held at most; 0: DefaultCacheKeys
}

// Engine carries out operations. Its methods may be called from any goroutine.
//
// Invariant: key material is in the parsed-key cache, in the hands of a running operation, or nowhere.
type Engine struct {
	store  atomic.Pointer[keystore.Store]
	policy atomic.Pointer[policy.Policy]
	audit  *audit.Log
	code   func(error) string
	log    *slog.Logger
	now    func() time.Time

	keys    *lru[keyspec.Name, *keystore.Key]
	secrets *lru[keyspec.Ref, *mechanism.Key]
	publics *lru[keyspec.Ref, crypto.PublicKey]
	idle    time.Duration

	devices    Devices
	gates      gates
	residents  *lru[keyspec.Ref, *loaded]
	spaces     namespaces
	openings   turns
	makers     turns                         // of keys of the hierarchy, by name
	unreplaced *lru[keyspec.Name, time.Time] // keys that are due, and when replacing them failed
	latest     latest
	lists      listCache // revocation lists of others
	own        ownLists  // revocation lists of our own
	events     events
	renewals   renewals

	counters counters
	writers  stripes
	imports  imports
	tests    tests

	generation atomic.Uint64 // of what the store holds, as far as the caches are concerned
	erasure    erasure
	check      atomic.Pointer[Check]
	unlocks    atomic.Uint64 // grows when the keystore is locked; streams of before are over
	activity   atomic.Uint64 // grows with every use of key material
	asleep     atomic.Bool   // the janitor waits for activity
	panics     atomic.Uint64

	wakeJanitor   chan struct{}
	wakeCopier    chan struct{}
	wakeScheduler chan struct{}
	wakeRenewer   chan struct{}
	wakeChecker   chan struct{}
}

// New returns an Engine. Run has to be called for what happens without a caller.
func New(c Config) *Engine {
	e := &Engine{
		audit: c.Audit, code: c.Code, log: c.Log, now: c.Now, idle: c.CacheIdle, devices: c.Devices,
		wakeJanitor:   make(chan struct{}, 1),
		wakeCopier:    make(chan struct{}, 1),
		wakeScheduler: make(chan struct{}, 1),
		wakeRenewer:   make(chan struct{}, 1),
		wakeChecker:   make(chan struct{}, 1),
	}
	if e.log == nil {
		e.log = slog.New(slog.DiscardHandler)
	}
	if e.now == nil {
		e.now = time.Now
	}
	if e.idle == 0 {
		e.idle = DefaultCacheIdle
	}
	size := c.CacheKeys
	if size == 0 {
		size = DefaultCacheKeys
	}
	e.keys = newLRU[keyspec.Name, *keystore.Key](size)
	e.secrets = newLRU[keyspec.Ref, *mechanism.Key](size)
	e.publics = newLRU[keyspec.Ref, crypto.PublicKey](size)
	e.residents = newLRU[keyspec.Ref, *loaded](size)
	e.unreplaced = newLRU[keyspec.Name, time.Time](size)
	e.renewals.set(c.Renewal)
	e.store.Store(c.Store)
	e.policy.Store(c.Policy)
	return e
}

// SetPolicy replaces the policy. Operations that have been decided go on under the old one.
func (e *Engine) SetPolicy(p *policy.Policy) { e.policy.Store(p) }

// SetStore gives the engine the keystore that was made.
func (e *Engine) SetStore(s *keystore.Store) {
	e.forget()
	e.store.Store(s)
}

// Unlocked tells the engine that the keystore has been unlocked: the audit gets its keys, acts whose record is still in
// the outbox are copied to the log, destructions that came due meanwhile are carried out.
func (e *Engine) Unlocked() error {
	s := e.store.Load()
	if s == nil {
		return ErrNoStore
	}
	var seed [32]byte
	defer clear(seed[:])
	if err := s.DeriveSecret(auditSeed, seed[:]); err != nil {
		return err
	}
	if err := e.audit.Unlock(seed[:]); err != nil {
		return err
	}
	e.touch()
	signal(e.wakeCopier)
	signal(e.wakeScheduler)
	e.renewals.forget() // with the keystore, devices may have been opened
	signal(e.wakeRenewer)
	signal(e.wakeChecker)
	info := s.Info()
	return e.note("keystore_open", fmt.Sprintf("store %x instance %x epoch %d", info.StoreID, info.InstanceID, info.Epoch))
}

// Lock locks the keystore and forgets every key. Acts whose record is still in the outbox are copied to the log first, and
// reserved uses of limited keys that were not made are given back, if that takes no longer than lockGrace; otherwise the acts
// wait for the next time, and the uses are lost.
func (e *Engine) Lock() {
	ctx, cancel := context.WithTimeout(context.Background(), lockGrace)
	defer cancel()
	if err := e.copyOutbox(ctx); err != nil {
		e.log.Warn("acts wait to be copied to the audit log", "error", err)
	}
	e.returnUses(ctx)
	if s := e.store.Load(); s != nil {
		s.Lock()
	}
	e.audit.Lock()
	e.forget()
}

func (e *Engine) forget() {
	e.unlocks.Add(1)
	e.generation.Add(1)
	e.keys.clear()
	e.secrets.clear()
	e.publics.clear()
	e.residents.clear()
	e.spaces.clear()
	e.latest.forget()
	e.imports.clear()
	e.touch()
}

// AuditSeed calls f with the seed of the auditor, which decrypts the audit log, and wipes it afterwards.
func (e *Engine) AuditSeed(f func(seed []byte) error) error {
	s, err := e.opened()
	if err != nil {
		return err
	}
	var seed [32]byte
	defer clear(seed[:])
	if err := s.DeriveSecret(auditSeed, seed[:]); err != nil {
		return err
	}
	return f(seed[:])
}

const (
	auditSeed = "audit v1"
	lockGrace = time.Second
)

// Panics is the number of operations that have panicked.
func (e *Engine) Panics() uint64 { return e.panics.Load() }

// Principal is the name that policy gives to a caller, empty when it knows none.
func (e *Engine) Principal(c *Caller) string {
	return policy.Decide(e.policy.Load(), &policy.Request{Caller: c.facts(), Operation: "whoami"}).Principal
}

// PolicyEpoch is the epoch of the policy in force.
func (e *Engine) PolicyEpoch() uint64 {
	if p := e.policy.Load(); p != nil {
		return p.Epoch()
	}
	return 0
}

// Scrub erases what operations left on the stack of this goroutine. A worker calls it when its queue is empty, and after
// every 32 operations.
func Scrub() { secmem.Do(func() {}) }

// opened returns the keystore if it is there and unlocked.
func (e *Engine) opened() (*keystore.Store, error) {
	s := e.store.Load()
	switch {
	case s == nil:
		return nil, ErrNoStore
	case s.Locked():
		return nil, ErrLocked
	}
	return s, nil
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Run does what happens without a caller, until ctx is done: it copies recorded acts from the outbox to the audit log,
// carries out due destructions and erasures, renews keys and revocation lists, checks a store that was not stopped properly, forgets idle keys and has their
// remains collected, writes the time down, and tests mechanisms.
func (e *Engine) Run(ctx context.Context) {
	done := make(chan struct{})
	tasks := []func(context.Context){e.runCopier, e.runScheduler, e.runRenewer, e.runChecker, e.runJanitor, e.runClock, e.tests.runAll}
	for _, f := range tasks {
		go func() {
			defer func() { done <- struct{}{} }()
			f(ctx)
		}()
	}
	for range tasks {
		<-done
	}
}
