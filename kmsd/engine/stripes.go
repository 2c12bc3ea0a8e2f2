package engine

import (
	"hash/maphash"
	"sync"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// stripes are locks for names: whoever changes a key holds the one of its name from reading to committing. Two names may
// share a lock, so nobody holds two.
type stripes struct {
	once  sync.Once
	seed  maphash.Seed
	locks [64]sync.Mutex
}

// lock locks the name and returns what unlocks it.
func (s *stripes) lock(name keyspec.Name) func() {
	s.once.Do(func() { s.seed = maphash.MakeSeed() })
	l := &s.locks[maphash.String(s.seed, string(name))%uint64(len(s.locks))]
	l.Lock()
	return l.Unlock
}
