package engine

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// Nonces are random, 96 bits. At 2^32 messages under one key two of them are equal with a probability of 2^-33, the bound
// of NIST SP 800-38D section 8.3. The number of messages is reserved in the store in blocks, so that a crash loses at most
// a block and never counts too little.
const (
	maxInvocations  = 1 << 32
	invocationBlock = 1 << 16
)

// counters hold what is left of the blocks that this run has reserved: invocations of a key version and, under version 0,
// uses of a whole key. They outlive the parsed keys, or else every key that is used once a minute would lose a block each
// time.
type counters struct {
	mu     sync.Mutex
	blocks map[keyspec.Ref]*blockOf
}

// blockOf is a block that was reserved. A caller of another run or of a key destroyed meanwhile cannot have it: names of
// destroyed keys are not given again.
//
// Whoever wants the lock of a name as well (stripes) takes it second.
type blockOf struct {
	mu     sync.Mutex    // held to change what follows
	left   atomic.Uint64 // not used yet
	drains atomic.Uint64 // how often what was left was taken away
}

// drain takes away what is left. The caller holds b.mu.
func (b *blockOf) drain() uint64 {
	b.drains.Add(1)
	return b.left.Swap(0)
}

// maxBlocks bounds the map; beyond it blocks are lost, at random.
const maxBlocks = 1 << 16

func (c *counters) block(ref keyspec.Ref) *blockOf {
	c.mu.Lock()
	defer c.mu.Unlock()
	b, ok := c.blocks[ref]
	if !ok {
		if c.blocks == nil {
			c.blocks = make(map[keyspec.Ref]*blockOf)
		}
		for old := range c.blocks {
			if len(c.blocks) < maxBlocks {
				break
			}
			delete(c.blocks, old)
		}
		b = new(blockOf)
		c.blocks[ref] = b
	}
	return b
}

// left returns how much of its block a key version has left, of a whole key with version 0.
func (c *counters) left(ref keyspec.Ref) uint64 {
	c.mu.Lock()
	b := c.blocks[ref]
	c.mu.Unlock()
	if b == nil {
		return 0
	}
	return b.left.Load()
}

// spent reports whether the next use of a key version, of a whole key with version 0, has to reserve a block, or to wait for
// somebody who does.
func (c *counters) spent(ref keyspec.Ref) bool { return c.left(ref) == 0 }

// take takes one of the block b. If there is none left, amount reserves more in the store: it changes the key, or the version
// of it that is in use, and returns how much that is.
func (u *use) take(b *blockOf, amount func(*keystore.Key, *keystore.Version) (uint64, error)) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.left.Load() == 0 {
		n, err := u.reserve(amount)
		if err != nil {
			return err
		}
		b.left.Store(n)
	}
	b.left.Add(^uint64(0))
	return nil
}

// countInvocation counts one use of the AEAD key in use, or returns an error that wraps ErrExhausted.
func (u *use) countInvocation() error {
	b := u.counters.block(keyspec.Ref{Name: u.key.Name, Version: u.version.Number})
	return u.take(b, func(_ *keystore.Key, v *keystore.Version) (uint64, error) {
		n := min(invocationBlock, maxInvocations-v.Invocations)
		if v.Invocations >= maxInvocations {
			return 0, fmt.Errorf("%w: %d encryptions; rotate it", ErrExhausted, v.Invocations)
		}
		v.Invocations += n
		return n, nil
	})
}

// reserve commits what amount does to the key in use.
func (u *use) reserve(amount func(*keystore.Key, *keystore.Version) (uint64, error)) (n uint64, err error) {
	for range 10 {
		n, err = u.reserveOnce(amount)
		if !errors.Is(err, keystore.ErrConflict) {
			break
		}
	}
	return n, err
}

func (u *use) reserveOnce(amount func(*keystore.Key, *keystore.Version) (uint64, error)) (uint64, error) {
	defer u.writers.lock(u.key.Name)()
	key, err := u.store.Get(u.key.Name)
	if err != nil {
		return 0, err
	}
	v, err := version(key, u.version.Number, u.now)
	if err != nil {
		return 0, err
	}
	n, err := amount(key, v)
	if err != nil {
		return 0, err
	}
	c := []keystore.Change{{Key: key}}
	err = u.store.Apply(u.ctx, keystore.Commit{Changes: c})
	u.changed(c)
	return n, err
}
