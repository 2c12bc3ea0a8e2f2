package engine

import (
	"container/list"
	"context"
	"crypto"
	"fmt"
	"runtime"
	"runtime/debug"
	"sync"
	"time"

	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/keystore/secmem"
	"github.com/kmsd-project/kmsd/kmsd/mechanism"
)

// lru is a bounded map that drops what was not used for the longest time.
type lru[K comparable, V any] struct {
	mu    sync.Mutex
	limit int
	items map[K]*list.Element
	order *list.List // most recently used first
}

type lruItem[K comparable, V any] struct {
	key   K
	value V
	used  time.Time
}

func newLRU[K comparable, V any](limit int) *lru[K, V] {
	return &lru[K, V]{limit: limit, items: make(map[K]*list.Element), order: list.New()}
}

func (l *lru[K, V]) get(k K, now time.Time) (v V, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	element, ok := l.items[k]
	if !ok {
		return v, false
	}
	item := element.Value.(*lruItem[K, V])
	item.used = now
	l.order.MoveToFront(element)
	return item.value, true
}

// peek is get without a trace.
func (l *lru[K, V]) peek(k K) (v V, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	element, ok := l.items[k]
	if !ok {
		return v, false
	}
	return element.Value.(*lruItem[K, V]).value, true
}

// put adds v unless valid, asked under the lock of l, says that it is out of date.
func (l *lru[K, V]) put(k K, v V, now time.Time, valid func() bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !valid() {
		return
	}
	if element, ok := l.items[k]; ok {
		l.remove(element)
	}
	l.items[k] = l.order.PushFront(&lruItem[K, V]{k, v, now})
	if l.order.Len() > l.limit {
		l.remove(l.order.Back())
	}
}

func (l *lru[K, V]) drop(k K) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if element, ok := l.items[k]; ok {
		l.remove(element)
	}
}

func (l *lru[K, V]) remove(element *list.Element) {
	delete(l.items, element.Value.(*lruItem[K, V]).key)
	l.order.Remove(element)
}

// sweep drops what was not used since a time and reports whether that was anything, and how much is left.
func (l *lru[K, V]) sweep(since time.Time) (dropped bool, left int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for {
		last := l.order.Back()
		if last == nil || !last.Value.(*lruItem[K, V]).used.Before(since) {
			return dropped, l.order.Len()
		}
		l.remove(last)
		dropped = true
	}
}

func (l *lru[K, V]) clear() {
	l.mu.Lock()
	defer l.mu.Unlock()
	clear(l.items)
	l.order.Init()
}

// metadata returns the key of a name. It is shared and must not be changed.
func (e *Engine) metadata(s *keystore.Store, name keyspec.Name, now time.Time) (*keystore.Key, error) {
	if key, ok := e.keys.get(name, now); ok {
		return key, nil
	}
	generation := e.generation.Load()
	key, err := s.Get(name)
	if err != nil {
		return nil, err
	}
	e.touch()
	e.keys.put(name, key, now, func() bool { return e.generation.Load() == generation })
	return key, nil
}

// changed makes the caches forget keys after a commit, whether it went well or not, and what is parsed of versions that were
// taken out of use.
//
// Invariant: the generation grows before the entries are dropped, so that what was read before the commit cannot come
// back behind it.
func (e *Engine) changed(changes []keystore.Change) {
	e.generation.Add(1)
	for i := range changes {
		c := &changes[i]
		e.keys.drop(c.Key.Name)
		for j := range c.Key.Versions {
			v := &c.Key.Versions[j]
			if v.State == keyspec.Suspended || v.State == keyspec.Compromised || v.State == keyspec.Destroyed || !v.Revoked.IsZero() || !v.DestroyAt.IsZero() {
				ref := keyspec.Ref{Name: c.Key.Name, Version: v.Number}
				e.secrets.drop(ref)
				e.publics.drop(ref)
				e.residents.drop(ref)
				e.touch() // the janitor has the remains collected
			}
		}
	}
}

// secret returns the private half of the version in use.
func (u *use) secret() (*mechanism.Key, error) {
	if u.key.Origin == keyspec.Foreign {
		return nil, errForeign
	}
	if u.key.Protection != keyspec.Software {
		return u.resident()
	}
	return u.parsed(u.key, u.version.Number)
}

func (u *use) parsed(key *keystore.Key, number keyspec.Version) (*mechanism.Key, error) {
	u.touch()
	ref := keyspec.Ref{Name: key.Name, Version: number}
	if k, ok := u.secrets.get(ref, u.now); ok {
		return k, nil
	}
	row, err := mechanism.Lookup(key.Algorithm)
	if err != nil {
		return nil, err
	}
	if err := u.tests.passed(row); err != nil {
		return nil, err
	}
	generation := u.generation.Load()
	var parsed *mechanism.Key
	err = u.withMaterial(ref, func(b []byte) (err error) {
		parsed, err = row.Load(b)
		return err
	})
	if err != nil {
		return nil, err
	}
	u.secrets.put(ref, parsed, u.now, func() bool { return u.generation.Load() == generation })
	return parsed, nil
}

// withMaterial calls f with the material of a key version, on a stack that is erased afterwards, and wipes it.
func (u *use) withMaterial(ref keyspec.Ref, f func([]byte) error) error {
	return u.withNamespace(ref.Name, func() error { return withMaterial(u.store, ref, f) })
}

func withMaterial(s *keystore.Store, ref keyspec.Ref, f func([]byte) error) (err error) {
	secmem.Do(func() {
		buf := make([]byte, keystore.KeyMaterial)
		defer clear(buf)
		var b []byte
		if b, err = s.Material(ref, buf); err == nil {
			err = f(b)
		}
	})
	return err
}

// public returns the public key of the version in use, without touching its private half.
func (u *use) public() (crypto.PublicKey, error) {
	ref := keyspec.Ref{Name: u.key.Name, Version: u.version.Number}
	if p, ok := u.publics.get(ref, u.now); ok {
		return p, nil
	}
	u.touch()
	generation := u.generation.Load()
	stored, err := u.store.Public(ref)
	if err != nil {
		return nil, err
	}
	if len(stored.SPKI) == 0 {
		return nil, fmt.Errorf("%w: the key has no public half", ErrUnsupported)
	}
	p, err := mechanism.ParseSPKI(stored.SPKI)
	if err != nil {
		return nil, fmt.Errorf("%w: public key: %w", keystore.ErrDamaged, err)
	}
	u.publics.put(ref, p, u.now, func() bool { return u.generation.Load() == generation })
	return p, nil
}

// touch notes that key material may lie about.
func (e *Engine) touch() {
	e.activity.Add(1)
	if e.asleep.Load() && e.asleep.CompareAndSwap(true, false) {
		signal(e.wakeJanitor)
	}
}

// collections is how often the heap is collected after the last use of a key. Freed memory is overwritten when it is swept,
// but crypto/ecdsa and crypto/ed25519 keep their internal form of a key in a weak map: the first collection only queues
// its removal, which is done some time later, and only one after that frees it.
const collections = 3

// runJanitor forgets idle keys and has the heap collected after the last use: once a second at most, and not while
// operations go on, which have it collected anyway. The last collection also gives the memory back.
func (e *Engine) runJanitor(ctx context.Context) {
	const pause = time.Second
	timer := time.NewTimer(pause)
	defer timer.Stop()
	seen, due := uint64(0), 0
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		case <-e.wakeJanitor:
			timer.Reset(pause)
			continue
		}
		now := e.now()
		e.imports.sweep(now)
		dropped, left := e.secrets.sweep(now.Add(-e.idle))
		droppedKeys, leftKeys := e.keys.sweep(now.Add(-e.idle))
		activity := e.activity.Load()
		idle := activity == seen
		seen = activity
		if dropped || droppedKeys || !idle {
			due = collections
		}
		if idle && due > 0 {
			if due--; due > 0 {
				runtime.GC()
			} else {
				debug.FreeOSMemory() // collects, too
			}
		}
		_, leftPublics := e.publics.sweep(now.Add(-e.idle))
		_, leftResidents := e.residents.sweep(now.Add(-e.idle))
		leftSpaces := e.closeIdle(now.Add(-e.idle))
		if idle && due == 0 && left+leftKeys+leftPublics+leftResidents+leftSpaces == 0 {
			e.asleep.Store(true)
			if e.activity.Load() == seen {
				continue // until touched
			}
			e.asleep.Store(false)
		}
		timer.Reset(pause)
	}
}
