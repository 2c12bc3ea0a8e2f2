package keystore

import (
	"bytes"
	"context"
	"encoding/binary"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

var (
	scaleKeys  = flag.Int("scale", 0, "measure a store of this many keys, for example 1000000")
	scaleDir   = flag.String("scale-dir", "", "where the store of -scale is kept between runs (default: a temporary directory)")
	throughput = flag.Duration("throughput", 0, "measure commits against those of bare bbolt, this long for each")
)

// TestScale fills a store and measures opening, looking up, listing and memory.
func TestScale(t *testing.T) {
	if *scaleKeys == 0 {
		t.Skip("needs -scale")
	}
	name := func(i int) string { return fmt.Sprintf("app%d/dir%d/key%d", i%10, i%100, i) }
	dir := *scaleDir
	if dir == "" {
		dir = testDir(t)
	}
	if exists, _ := Exists(dir); !exists {
		fillScale(t, dir, name)
	}
	runtime.GC()
	debug.FreeOSMemory()

	ctx := context.Background()
	config := testConfig(t, dir)
	start := time.Now()
	s, err := Open(ctx, config)
	if err != nil {
		t.Fatal(err)
	}
	opened := time.Since(start)
	if err := s.Unlock(ctx, 1, testSecret(1)); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Get(keyspec.Name(name(0))); err != nil {
		t.Fatal(err)
	}
	t.Logf("open %v, with unlock and the first lookup %v", opened, time.Since(start))
	defer s.Close()

	rnd := rand.New(rand.NewPCG(1, 1))
	measure := func(what string, n int, f func(i int)) {
		times := make([]time.Duration, n)
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		cpu := threadTime(t)
		for j := range times {
			i := rnd.IntN(*scaleKeys)
			begin := time.Now()
			f(i)
			times[j] = time.Since(begin)
		}
		slices.Sort(times)
		t.Logf("%s: median %v, p99 %v, processor time %v", what, times[n/2], times[n*99/100], (threadTime(t)-cpu)/time.Duration(n))
	}
	get := func(i int) {
		if _, err := s.Get(keyspec.Name(name(i))); err != nil {
			t.Fatal(err)
		}
	}
	for range 30_000 { // warm the page cache
		get(rnd.IntN(*scaleKeys))
	}
	measure("lookup of metadata", 20_000, get)
	index := s.secrets.index.Bytes()
	measure("for comparison, bare bbolt", 20_000, func(i int) {
		key := makeRecordID(index, keyspec.Name(name(i))).at(0)
		if v, err := s.fetch(bucketMeta, key[:]); err != nil || v == nil {
			t.Fatal(err)
		}
	})
	buf := make([]byte, 0, MaxMaterial)
	measure("lookup of material", 20_000, func(i int) {
		if _, err := s.Material(keyspec.Ref{Name: keyspec.Name(name(i)), Version: 1}, buf); err != nil {
			t.Fatal(err)
		}
	})
	measure("page of 100 keys", 300, func(i int) {
		namespace := fmt.Sprintf("app%d", i%10)
		from := makeRecordID(s.secrets.index.Bytes(), keyspec.Name(name(i))).at(0)
		if keys, _, err := s.Page(namespace, namespace+"/", from[:], 100); err != nil || len(keys) == 0 {
			t.Fatal(len(keys), err)
		}
	})
	measure("creation", 200, func(i int) {
		mustApply(t, s, testKey(fmt.Sprintf("late/key%d-%d", i, time.Now().UnixNano()), keyspec.ECDSAP256, 32))
	})
	runtime.GC()
	debug.FreeOSMemory()
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if strings.HasPrefix(line, "RssAnon") || strings.HasPrefix(line, "RssFile") {
			t.Log(strings.Join(strings.Fields(line), " "))
		}
	}
	info, err := os.Stat(filepath.Join(dir, databaseFile))
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("file %d MiB", info.Size()>>20)
}

// threadTime is the processor time that the calling thread has used.
func threadTime(t *testing.T) time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_THREAD, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// fillScale makes the store, in the order of the record ids so that bbolt only appends, and without waiting for the disk.
func fillScale(t *testing.T, dir string, name func(int) string) {
	start := time.Now()
	s := createIn(t, dir)
	s.db.NoSync = true
	index := s.secrets.index.Bytes()
	type numbered struct {
		id recordID
		i  int
	}
	order := make([]numbered, *scaleKeys)
	for i := range order {
		order[i] = numbered{makeRecordID(index, keyspec.Name(name(i))), i}
	}
	slices.SortFunc(order, func(a, b numbered) int { return bytes.Compare(a.id[:], b.id[:]) })
	for len(order) > 0 {
		n := min(len(order), 2000)
		changes := make([]Change, n)
		for j := range n {
			changes[j] = testKey(name(order[j].i), keyspec.ECDSAP256, 32)
		}
		mustApply(t, s, changes...)
		order = order[n:]
	}
	s.db.NoSync = false
	if err := s.db.Sync(); err != nil {
		t.Fatal(err)
	}
	// Keys that come in order leave bbolt's pages half empty.
	if err := s.Compact(context.Background()); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	t.Logf("filled in %v", time.Since(start))
}

// TestThroughput compares durable creations per second with the rate at which bbolt commits single small values, in turns.
func TestThroughput(t *testing.T) {
	if *throughput == 0 {
		t.Skip("needs -throughput")
	}
	s := newStore(t)
	db, err := bolt.Open(filepath.Join(t.TempDir(), "bare.db"), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	run := func(writers int, f func(n int64) error) float64 {
		var count atomic.Int64
		var wg sync.WaitGroup
		start := time.Now()
		for range writers {
			wg.Go(func() {
				for time.Since(start) < *throughput {
					if err := f(count.Add(1)); err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
		wg.Wait()
		return float64(count.Load()) / time.Since(start).Seconds()
	}
	var made atomic.Int64
	create := func(int64) error {
		n := made.Add(1)
		c := testKey(fmt.Sprintf("app/key%d", n), keyspec.ECDSAP256, 32)
		if err := s.Apply(context.Background(), Commit{Changes: []Change{c}, Audit: make([]byte, 200)}); err != nil {
			return err
		}
		if n%100 == 0 {
			return s.AckOutbox(s.snapshot.Load().outboxNext - 1) // as the daemon does once they are in the log
		}
		return nil
	}
	bare := func(n int64) error {
		return db.Update(func(tx *bolt.Tx) error {
			b, err := tx.CreateBucketIfNotExists([]byte("b"))
			if err != nil {
				return err
			}
			return b.Put(binary.BigEndian.AppendUint64(nil, uint64(n)*0x9E3779B97F4A7C15), make([]byte, 600))
		})
	}
	var one, many []float64
	for range 5 {
		base := run(1, bare)
		a := run(1, create)
		commits := s.snapshot.Load().sequence
		b := run(64, create)
		commits = s.snapshot.Load().sequence - commits
		one, many = append(one, a/base), append(many, b/base)
		t.Logf("bbolt %.0f/s; creation, 1 writer %.0f/s (%.2f), 64 writers %.0f/s (%.2f), %d at a time", base, a, a/base, b, b/base, uint64(b*throughput.Seconds())/max(commits, 1))
	}
	slices.Sort(one)
	slices.Sort(many)
	t.Logf("median: 1 writer %.2f (bar 0.5), 64 writers %.2f (bar 3.5)", one[2], many[2])
}
