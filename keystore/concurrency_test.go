package keystore

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// TestReadersSeeWholeCommits lets many goroutines change, read, list, rotate, lock and unlock at once. Each key's versions, public
// parts and labels have to go together at any time.
func TestReadersSeeWholeCommits(t *testing.T) {
	ctx := context.Background()
	s := newStore(t)
	const keys = 12
	mustApply(t, s, testKey("app", keyspec.Ed25519, 32))
	for i := range keys {
		mustApply(t, s, testKey(fmt.Sprintf("app/k%d", i), keyspec.Ed25519, 32))
	}
	var applied, conflicts atomic.Int64
	var stop atomic.Bool
	tolerate := func(err error) bool {
		if errors.Is(err, ErrLocked) {
			return true
		}
		if err != nil {
			t.Error(err)
		}
		return false
	}
	var writers, others sync.WaitGroup
	for range 6 {
		writers.Go(func() {
			for n := 0; n < scaled(60, 25); {
				name := keyspec.Name(fmt.Sprintf("app/k%d", rand.IntN(keys)))
				k, err := s.Get(name)
				if tolerate(err) || err != nil {
					continue
				}
				v := k.Current + 1
				k.Versions[len(k.Versions)-1].State = keyspec.Deactivated
				k.Versions = append(k.Versions, Version{Number: v, State: keyspec.Active})
				k.Current = v
				if len(k.Versions) > 3 {
					k.version(k.Current - 3).State = keyspec.Destroyed
				}
				k.Labels = map[string]string{"current": fmt.Sprint(v)}
				err = s.Apply(ctx, Commit{Audit: []byte("rotated"), Changes: []Change{{
					Key:      k,
					Material: map[keyspec.Version][]byte{v: testMaterial(string(name), v, 32)},
					Public:   map[keyspec.Version]Public{v: testPublic(string(name), v)},
				}}})
				if errors.Is(err, ErrConflict) {
					conflicts.Add(1)
				} else if !tolerate(err) {
					applied.Add(1)
					n++
				}
			}
		})
	}
	for range 3 {
		others.Go(func() {
			for !stop.Load() {
				name := keyspec.Name(fmt.Sprintf("app/k%d", rand.IntN(keys)))
				k, err := s.Get(name)
				if tolerate(err) || err != nil {
					continue
				}
				if got := k.Labels["current"]; got != "" && got != fmt.Sprint(k.Current) {
					t.Errorf("%s: label %s, current version %d", name, got, k.Current)
				}
				m, err := s.Material(keyspec.Ref{Name: name, Version: k.Current}, nil)
				if errors.Is(err, ErrNotFound) {
					continue // destroyed meanwhile
				}
				if !tolerate(err) && err == nil && string(m) != string(testMaterial(string(name), k.Current, 32)) {
					t.Errorf("%s: wrong material", name)
				}
			}
		})
	}
	others.Go(func() {
		for !stop.Load() {
			list, _, err := s.Page("app", "app", nil, 100)
			if !tolerate(err) && len(list) != keys+1 {
				t.Errorf("a list of %d keys", len(list))
			}
		}
	})
	others.Go(func() {
		for i := 0; !stop.Load(); i++ {
			switch i % 5 {
			case 0:
				tolerate(s.RotateRoot(ctx))
			case 1:
				tolerate(s.RotateEpoch(ctx, nil))
			case 2:
				tolerate(s.Compact(ctx))
			case 3:
				report, err := s.Verify(ctx, nil)
				if !tolerate(err) && len(report.Damaged) > 0 {
					t.Errorf("verification: %+v", report.Damaged[0])
				}
			case 4:
				s.Lock()
				if err := s.Unlock(ctx, 1, testSecret(1)); err != nil {
					t.Error(err)
				}
			}
			if list, err := s.Outbox(10); err == nil && len(list) > 0 {
				tolerate(s.AckOutbox(list[len(list)-1].Seq))
			}
		}
	})
	writers.Wait()
	stop.Store(true)
	others.Wait()
	if got := s.Info().Damaged; got != 0 {
		t.Errorf("damage was counted %d times", got)
	}
	if applied.Load() == 0 {
		t.Error("nothing was applied")
	}
	t.Logf("%d applied, %d conflicts", applied.Load(), conflicts.Load())
	s = reopen(t, s)
	for i := range keys {
		checkKey(t, s, fmt.Sprintf("app/k%d", i), 32)
	}
}

func TestCloseEndsWhatIsUnderWay(t *testing.T) {
	s := newStore(t)
	var wg sync.WaitGroup
	var mu sync.Mutex
	var acknowledged []string
	for w := range 8 {
		wg.Go(func() {
			for i := range 1000 {
				name := fmt.Sprintf("app/k%d-%d", w, i)
				err := s.Apply(context.Background(), Commit{Changes: []Change{testKey(name, keyspec.Ed25519, 32)}})
				if errors.Is(err, ErrClosed) || errors.Is(err, ErrLocked) {
					return
				}
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				acknowledged = append(acknowledged, name)
				n := len(acknowledged)
				mu.Unlock()
				if n == 50 {
					go s.Close()
				}
			}
		})
	}
	wg.Wait()
	s.Close()
	s = openIn(t, s.config.Dir)
	for _, name := range acknowledged {
		checkKey(t, s, name, 32)
	}
}

// TestCreationBesideCommits makes keys at once in a store whose nodes keep falling out of the cache, as they do in a large
// one: what a creation looks up must not be taken for damaged because another commit came between.
func TestCreationBesideCommits(t *testing.T) {
	s := newStore(t)
	mustApply(t, s, testKey("app", keyspec.Ed25519, 32))
	var stop atomic.Bool
	var writers, other sync.WaitGroup
	other.Go(func() {
		for !stop.Load() {
			c := s.cache
			c.mu.Lock()
			clear(c.leaves)
			clear(c.interior)
			c.mu.Unlock()
			runtime.Gosched()
		}
	})
	for w := range 8 {
		writers.Go(func() {
			for i := range scaled(100, 25) {
				c := testKey(fmt.Sprintf("app/w%d-%d", w, i), keyspec.Ed25519, 32)
				if err := s.Apply(context.Background(), Commit{Changes: []Change{c}}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	writers.Wait()
	stop.Store(true)
	other.Wait()
}
