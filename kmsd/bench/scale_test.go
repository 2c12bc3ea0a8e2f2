package bench

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/keystore/secmem"
)

// scaleStore makes this test binary open the keystore of that directory, measure it and print the figures: what memory a
// store takes shows in a process that has done nothing else.
const scaleStore = "KMSD_BENCH_SCALE"

// perNamespace is the number of keys in each namespace of the large keystore.
const perNamespace = 1000

// figures are in milliseconds, microseconds and bytes.
type figures struct {
	Open, Lookup, Page float64
	Anonymous, File    int64
}

// scale measures a keystore of many keys without the daemon: opening it, finding a key by its name, listing 100 keys.
func scale(t *testing.T, tb *table) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	fillStore(t, dir, *keys)
	var open, lookup, page, anonymous []float64
	var f figures
	for range *passes {
		cmd := exec.Command("/proc/self/exe", fmt.Sprintf("-keys=%d", *keys))
		cmd.Env = append(os.Environ(), scaleStore+"="+dir)
		cmd.Stderr = os.Stderr
		out, err := cmd.Output()
		if err == nil {
			err = json.Unmarshal(out, &f)
		}
		if err != nil {
			t.Fatal(err)
		}
		open, lookup, page = append(open, f.Open), append(lookup, f.Lookup), append(page, f.Page)
		anonymous = append(anonymous, float64(f.Anonymous)/1e6)
	}
	count := fmt.Sprintf("%d keys: ", *keys)
	tb.atMost(count+"open and unlock", median(open), 100, " ms", fmt.Sprintf("file of %d MB", f.File/1e6))
	tb.atMost(count+"lookup by name", median(lookup), 10, " us", "median, the file in the page cache")
	tb.atMost(count+"page of 100 keys", median(page), 5, " ms", "median")
	tb.atMost(count+"anonymous memory", median(anonymous), 64, " MB", "after 30,000 lookups")
}

func scaleName(i int) keyspec.Name {
	return keyspec.Name(fmt.Sprintf("app%d/dir%d/key%d", i/perNamespace, i%10, i))
}

func scaleConfig(dir string) (keystore.Config, error) {
	arena, err := secmem.NewArena(4096)
	return keystore.Config{Dir: dir, Arena: arena}, err
}

// scaleSecret stands for what a device would keep.
var scaleSecret = make([]byte, 32)

// fillStore makes a keystore of n keys, one namespace after the other: a namespace is one range of the table, so that a
// commit touches few of its pages.
func fillStore(t *testing.T, dir string, n int) {
	config, err := scaleConfig(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer config.Arena.Close()
	ctx := context.Background()
	s, err := keystore.Create(ctx, config, []keystore.NewSlot{{UUID: [16]byte{1}, Kind: "bench", Label: "bench", Secret: scaleSecret}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	now := time.Now()
	for i := 0; i < n; {
		var c keystore.Commit
		for end := min(n, i+10*perNamespace); i < end; i++ {
			material, spki := make([]byte, 32), make([]byte, 44)
			binary.BigEndian.PutUint64(material, uint64(i))
			binary.BigEndian.PutUint64(spki, uint64(i))
			c.Changes = append(c.Changes, keystore.Change{
				Key: &keystore.Key{
					Name: scaleName(i), Algorithm: keyspec.Ed25519, Usages: []keyspec.Usage{keyspec.Sign, keyspec.Verify},
					Origin: keyspec.Generated, Protection: keyspec.Software, Created: now, Current: 1, MinVersion: 1,
					Versions: []keystore.Version{{Number: 1, State: keyspec.Active, Created: now, NotBefore: now}},
				},
				Material: map[keyspec.Version][]byte{1: material},
				Public:   map[keyspec.Version]keystore.Public{1: {SPKI: spki}},
			})
		}
		if err := s.Apply(ctx, c); err != nil {
			t.Fatal(err)
		}
	}
	// Commits of so many keys write the whole table several times and leave as many free pages behind, which keys that are made
	// one by one do not.
	if err := s.Compact(ctx); err != nil {
		t.Fatal(err)
	}
}

// measureStore is the process that scale starts.
func measureStore(dir string) error {
	config, err := scaleConfig(dir)
	if err != nil {
		return err
	}
	defer config.Arena.Close()
	ctx := context.Background()
	var f figures
	begin := time.Now()
	s, err := keystore.Open(ctx, config)
	if err != nil {
		return err
	}
	defer s.Close()
	if err := s.Unlock(ctx, 1, scaleSecret); err != nil {
		return err
	}
	f.Open = time.Since(begin).Seconds() * 1e3

	lookup := func() error {
		_, err := s.Get(scaleName(rand.IntN(*keys)))
		return err
	}
	page := func() error {
		list, _, err := s.Page(fmt.Sprintf("app%d", rand.IntN((*keys+perNamespace-1)/perNamespace)), "", nil, 100)
		if err == nil && len(list) == 0 {
			err = fmt.Errorf("an empty page")
		}
		return err
	}
	times := func(n int, f func() error) (micros float64, err error) {
		v := make([]float64, n)
		for i := range v {
			begin := time.Now()
			if err := f(); err != nil {
				return 0, err
			}
			v[i] = micro(time.Since(begin))
		}
		return median(v), nil
	}
	if _, err = times(30_000, lookup); err != nil { // fills the page cache and the store's own
		return err
	}
	if f.Lookup, err = times(20_000, lookup); err != nil {
		return err
	}
	if f.Page, err = times(300, page); err != nil {
		return err
	}
	f.Page /= 1e3
	debug.FreeOSMemory()
	f.Anonymous = (&daemon{pid: os.Getpid()}).memory("RssAnon")
	if info, err := os.Stat(filepath.Join(dir, "store.db")); err == nil {
		f.File = info.Size()
	}
	return json.NewEncoder(os.Stdout).Encode(&f)
}
