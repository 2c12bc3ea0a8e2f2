// Package secmem keeps the few keys that open everything else (root, epoch, index and namespace keys) in memory that the kernel
// itself refuses to show: pages of memfd_secret(2), which are not in the kernel's direct map, cannot be read through /proc/PID/mem
// or ptrace even by root, are never swapped and never dumped. Where the kernel has no memfd_secret the pages are locked and excluded
// from core dumps instead, and Arena.Protection says so.
//
// It is not a general allocator: one small Arena is made at start, since every first touch of a secret page changes the direct map
// (tens of microseconds), and everything else that handles a secret for a moment does it inside Do.
package secmem

import (
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// Sizes of an arena, in bytes.
const (
	MinArena = 4 << 10
	MaxArena = 1 << 20 // RLIMIT_MEMLOCK is 8 MiB by default and shared with everything else

	block = 32 // unit of allocation: one symmetric key
)

// What Arena.Protection answers.
const (
	ProtectionFull    = "full"    // memfd_secret: the kernel shows the pages to nobody
	ProtectionPartial = "partial" // locked and not dumped, but readable by root through /proc/PID/mem
)

var (
	// ErrArenaFull says that no run of free blocks is long enough.
	ErrArenaFull = errors.New("secret memory is full")
	// ErrArenaClosed says that the arena is no longer mapped.
	ErrArenaClosed = errors.New("secret memory is closed")
)

// Arena is a fixed piece of protected memory, handed out in blocks of 32 bytes. It is safe for concurrent use.
//
// Invariant: every byte that is not part of a live Buffer is zero.
type Arena struct {
	protection string

	mu   sync.Mutex
	mem  []byte // nil once closed
	used []bool // by block
}

// NewArena maps size bytes (rounded up to whole pages, MinArena to MaxArena) of protected memory. It fails rather than return memory
// that could be swapped out.
func NewArena(size int) (*Arena, error) {
	return newArena(size, mapSecret)
}

// newArena takes the preferred mapping as an argument so that the fallback can be tested on a kernel that does not need it.
func newArena(size int, preferred func(int) ([]byte, error)) (*Arena, error) {
	if size < MinArena || size > MaxArena {
		return nil, fmt.Errorf("arena of %d bytes: must be %d to %d", size, MinArena, MaxArena)
	}
	page := unix.Getpagesize()
	size = (size + page - 1) / page * page
	protection := ProtectionFull
	mem, err := preferred(size)
	if err != nil {
		protection = ProtectionPartial
		if mem, err = mapLocked(size); err != nil {
			return nil, fmt.Errorf("cannot get %d bytes of protected memory (is RLIMIT_MEMLOCK too low?): %w", size, err)
		}
	}
	clear(mem) // touches every page, so that the cost and any shortage show now
	return &Arena{protection: protection, mem: mem, used: make([]bool, size/block)}, nil
}

// Protection is ProtectionFull or ProtectionPartial.
func (a *Arena) Protection() string { return a.protection }

// Alloc returns a zeroed buffer of n bytes, n > 0. It returns ErrArenaFull when there is no room; it never falls back to the heap.
func (a *Arena) Alloc(n int) (*Buffer, error) {
	if n <= 0 {
		return nil, fmt.Errorf("allocation of %d bytes", n)
	}
	want := (n + block - 1) / block
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.mem == nil {
		return nil, ErrArenaClosed
	}
	run := 0
	for i, taken := range a.used {
		if taken {
			run = 0
			continue
		}
		if run++; run == want {
			first := i - want + 1
			for j := first; j <= i; j++ {
				a.used[j] = true
			}
			return &Buffer{arena: a, first: first, blocks: want, n: n}, nil
		}
	}
	return nil, ErrArenaFull
}

// Close wipes the arena and gives the memory back. Slices obtained from Buffer.Bytes must not be used any more: touching one is a
// fault, as it should be. Closing twice is harmless.
func (a *Arena) Close() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.mem == nil {
		return nil
	}
	clear(a.mem)
	mem := a.mem
	a.mem = nil
	return unix.Munmap(mem)
}

// Buffer is a piece of an Arena that holds one secret.
//
// Invariant: the bytes of a Buffer are wiped before they can belong to another one.
type Buffer struct {
	arena         *Arena
	first, blocks int
	n             int
	freed         bool // guarded by arena.mu
}

// Bytes returns the memory itself, not a copy; its capacity is its length, so an append cannot run into a neighbour. It is nil after
// Free or Arena.Close.
func (b *Buffer) Bytes() []byte {
	b.arena.mu.Lock()
	defer b.arena.mu.Unlock()
	if b.freed || b.arena.mem == nil {
		return nil
	}
	off := b.first * block
	return b.arena.mem[off : off+b.n : off+b.n]
}

// Free wipes the buffer and returns its blocks to the arena. Freeing twice, freeing nil, and freeing after Arena.Close do nothing.
func (b *Buffer) Free() {
	if b == nil {
		return
	}
	b.arena.mu.Lock()
	defer b.arena.mu.Unlock()
	if b.freed {
		return
	}
	b.freed = true
	if b.arena.mem == nil {
		return
	}
	clear(b.arena.mem[b.first*block : (b.first+b.blocks)*block])
	for i := b.first; i < b.first+b.blocks; i++ {
		b.arena.used[i] = false
	}
}
