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

// counters hold what is left of the blocks that this run has reserved. They outlive the parsed keys, or else every key
// that is used once a minute would lose a block each time.
type counters struct {
	mu     sync.Mutex
	blocks map[keyspec.Ref]*blockOf
}

// blockOf is a block of invocations of one key version. A caller of another run or of a key destroyed meanwhile cannot
// have it: names of destroyed keys are not given again, and nothing is written back.
type blockOf struct {
	mu        sync.Mutex
	next, end uint64
	left      atomic.Bool // next is before end
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

// spent reports whether the next use of a key version has to reserve a block, or to wait for somebody who does.
func (c *counters) spent(ref keyspec.Ref) bool {
	c.mu.Lock()
	b := c.blocks[ref]
	c.mu.Unlock()
	return b == nil || !b.left.Load()
}

// countInvocation counts one use of the AEAD key in use, or returns an error that wraps ErrExhausted.
func (u *use) countInvocation() error {
	b := u.counters.block(keyspec.Ref{Name: u.key.Name, Version: u.version.Number})
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.next == b.end {
		first, end, err := u.reserve(invocationBlock)
		if err != nil {
			return err
		}
		b.next, b.end = first, end
	}
	b.next++
	b.left.Store(b.next < b.end)
	return nil
}

// reserve reserves up to n invocations in the store.
func (u *use) reserve(n uint64) (first, end uint64, err error) {
	for range 10 {
		first, end, err = u.reserveOnce(n)
		if !errors.Is(err, keystore.ErrConflict) {
			break
		}
	}
	return first, end, err
}

func (u *use) reserveOnce(n uint64) (first, end uint64, err error) {
	defer u.writers.lock(u.key.Name)()
	key, err := u.store.Get(u.key.Name)
	if err != nil {
		return 0, 0, err
	}
	v, err := version(key, u.version.Number, u.now)
	if err != nil {
		return 0, 0, err
	}
	first = v.Invocations
	end = min(first+n, maxInvocations)
	if first >= end {
		return 0, 0, fmt.Errorf("%w: %d encryptions; rotate it", ErrExhausted, first)
	}
	v.Invocations = end
	c := []keystore.Change{{Key: key}}
	err = u.store.Apply(u.ctx, keystore.Commit{Changes: c})
	u.changed(c)
	return first, end, err
}
