package engine

import (
	"context"
	"runtime/debug"
	"sync"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/mechanism"
)

// tests remembers which mechanisms have given the known answer. A mechanism is tested before its first use.
type tests struct {
	mu      sync.RWMutex
	results map[keyspec.Algorithm]error
}

func (t *tests) passed(row *mechanism.Row) error {
	t.mu.RLock()
	err, done := t.results[row.Algorithm]
	t.mu.RUnlock()
	if !done {
		err = t.run(row)
	}
	return err
}

func (t *tests) run(row *mechanism.Row) error {
	err := row.SelfTest()
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.results == nil {
		t.results = make(map[keyspec.Algorithm]error)
	}
	t.results[row.Algorithm] = err
	return err
}

// runAll tests what has not been tested yet.
func (t *tests) runAll(ctx context.Context) {
	for _, row := range mechanism.Table() {
		if ctx.Err() != nil {
			return
		}
		t.passed(row)
	}
	debug.FreeOSMemory() // RSA and the tables of secp256k1 leave megabytes of garbage behind, and a daemon that rests would keep them
}

// SelfTest tests every mechanism again and calls f with each result.
func (e *Engine) SelfTest(ctx context.Context, c *Caller, f func(keyspec.Algorithm, error)) error {
	return e.do(ctx, c, &act{op: "self_test", admin: true, sync: true}, func(u *use) error {
		for _, row := range mechanism.Table() {
			if err := ctx.Err(); err != nil {
				return err
			}
			f(row.Algorithm, e.tests.run(row))
		}
		return nil
	})
}
