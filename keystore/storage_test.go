package keystore

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// fullMain is a process whose files may not grow: what a full disk looks like, for all users and on every machine.
func fullMain(dir string) {
	signal.Ignore(unix.SIGXFSZ)
	if err := exhaust(dir, func(full bool) error {
		limit := unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}
		if full {
			info, err := os.Stat(filepath.Join(dir, databaseFile))
			if err != nil {
				return err
			}
			limit.Cur = uint64(info.Size())
		}
		return unix.Setrlimit(unix.RLIMIT_FSIZE, &limit)
	}); err != nil {
		fmt.Println("failed:", err)
		os.Exit(1)
	}
	fmt.Println("ok")
}

// exhaust fills the disk, looks at what the store does about it, and lets it go on.
func exhaust(dir string, fill func(full bool) error) error {
	ctx := context.Background()
	s, err := Open(ctx, childConfig(dir))
	if err != nil {
		return err
	}
	defer s.Close()
	if err := s.Unlock(ctx, 1, testSecret(1)); err != nil {
		return err
	}
	if err := fill(true); err != nil {
		return err
	}
	var names []string
	var failed error
	for i := 0; failed == nil && i < 10_000; i++ {
		name := fmt.Sprintf("app/k%d", i)
		if failed = s.Apply(ctx, Commit{Changes: []Change{testKey(name, keyspec.Ed25519, 32)}}); failed == nil {
			names = append(names, name)
		}
	}
	if !errors.Is(failed, ErrStorage) {
		return fmt.Errorf("a full disk gives %v", failed)
	}
	check := func() error {
		for _, name := range names {
			if err := keyError(s, name, 32); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
		}
		if _, _, err := s.Page("", "", nil, 100); err != nil {
			return err
		}
		return nil
	}
	if err := check(); err != nil {
		return fmt.Errorf("while the disk is full: %w", err)
	}
	if err := s.Apply(ctx, Commit{Changes: []Change{testKey("app/more", keyspec.RSA2048, 256)}}); err != nil && !errors.Is(err, ErrStorage) {
		return err
	}
	if err := fill(false); err != nil {
		return err
	}
	if err := s.Apply(ctx, Commit{Changes: []Change{testKey("app/again", keyspec.Ed25519, 32)}}); err != nil {
		return fmt.Errorf("after there was room again: %w", err)
	}
	names = append(names, "app/again")
	report, err := s.Verify(ctx, nil)
	if err != nil || len(report.Damaged) > 0 {
		return fmt.Errorf("%+v %w", report, err)
	}
	return check()
}

func TestFullDiskIsAnErrorAndReadsGoOn(t *testing.T) {
	s := newStore(t)
	s.Close()
	out, err := runAs(roleFull, s.config.Dir).CombinedOutput()
	if err != nil || strings.TrimSpace(string(out)) != "ok" {
		t.Fatalf("%v: %s", err, out)
	}
	checkKey(t, openIn(t, s.config.Dir), "app/again", 32)
}

// TestReadOnlyFileSystemIsAnErrorAndReadsGoOn needs the right to mount. Where that is missing, the test above has to do.
func TestReadOnlyFileSystemIsAnErrorAndReadsGoOn(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("none", dir, "tmpfs", 0, "size=8m,mode=0700"); err != nil {
		if os.Getenv("CI") != "" {
			t.Fatalf("cannot mount: %v", err)
		}
		t.Skipf("cannot mount: %v", err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	s, err := Create(t.Context(), testConfig(t, dir), []NewSlot{testSlot(1)}, nil)
	if err != nil {
		t.Fatal(err)
	}
	mustApply(t, s, testKey("app/k", keyspec.Ed25519, 32))
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	// A file system that files are open for writing on cannot be remounted; that the disk breaks under an open store is much the same
	// as that it was read-only from the start, when bbolt cannot open it at all.
	if err := unix.Mount("none", dir, "tmpfs", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(t.Context(), testConfig(t, dir)); !errors.Is(err, ErrStorage) {
		t.Fatalf("Open: %v", err)
	}
	if err := unix.Mount("none", dir, "tmpfs", unix.MS_REMOUNT, "size=8m"); err != nil {
		t.Fatal(err)
	}
	s = openIn(t, dir)
	defer s.Close()
	checkKey(t, s, "app/k", 32)
	// The real thing: no space left on device.
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	filler := filepath.Join(dir, "filler")
	err = exhaust(dir, func(full bool) error {
		if !full {
			return os.Remove(filler)
		}
		f, err := os.Create(filler)
		if err != nil {
			return err
		}
		defer f.Close()
		for {
			if _, err := f.Write(make([]byte, 4096)); err != nil {
				break
			}
		}
		info, err := f.Stat()
		if err != nil {
			return err
		}
		return f.Truncate(info.Size() - 200<<10)
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestDatabaseIsExaminedInAnotherProcess(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	mustApply(t, s, testKey("app/k", keyspec.Ed25519, 32))
	s.Close()
	path := filepath.Join(s.config.Dir, databaseFile)
	config := s.config
	config.CheckCommand = []string{"/usr/bin/env", roleVariable + "=" + roleCheck, testBinary(t)}
	open := func() error {
		s, err := Open(t.Context(), config)
		if err == nil {
			s.Close()
		}
		return err
	}
	if err := open(); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(b []byte) []byte{
		"empty":      func(b []byte) []byte { return nil },
		"truncated":  func(b []byte) []byte { return b[:20<<10] },
		"no meta":    func(b []byte) []byte { clear(b[:8192]); return b },
		"other file": func(b []byte) []byte { return []byte(strings.Repeat("something else ", 5000)) },
	} {
		if err := os.WriteFile(path, change(append([]byte(nil), b...)), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := open(); !errors.Is(err, ErrDamaged) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, command := range map[string][]string{
		"dies":     {"/bin/sh", "-c", "kill -SEGV $$"},
		"fails":    {"/bin/false"},
		"too slow": {"/bin/sh", "-c", "exec sleep 60"},
	} {
		if name == "too slow" && testing.Short() {
			continue
		}
		config.CheckCommand = command
		if err := open(); !errors.Is(err, ErrDamaged) {
			t.Errorf("an examination that %s: %v", name, err)
		}
	}
	config.CheckCommand = []string{"/nonexistent"}
	if err := open(); !errors.Is(err, ErrStorage) {
		t.Errorf("no command: %v", err)
	}
}

func testBinary(t *testing.T) string {
	t.Helper()
	path, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func TestSecondProcessIsTurnedAway(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	if _, err := Open(t.Context(), testConfig(t, s.config.Dir)); !errors.Is(err, ErrInUse) {
		t.Fatalf("Open: %v", err)
	}
	if _, err := Create(t.Context(), testConfig(t, s.config.Dir), []NewSlot{testSlot(1)}, nil); !errors.Is(err, ErrStoreExists) {
		t.Fatalf("Create: %v", err)
	}
	if _, err := Open(t.Context(), testConfig(t, testDir(t))); !errors.Is(err, ErrNoStore) {
		t.Fatalf("Open of an empty directory: %v", err)
	}
}

func TestStopWithoutCloseIsExaminedMoreClosely(t *testing.T) {
	s := newStore(t)
	mustApply(t, s, testKey("app/k", keyspec.Ed25519, 32))
	dir := copyDir(t, s.config.Dir)
	c := openIn(t, dir)
	if !c.Info().Unclean {
		t.Error("the unclean stop is not seen")
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	c = openIn(t, dir)
	if i := c.Info(); i.Unclean || len(i.Warnings) != 0 {
		t.Errorf("after a clean stop: %v", i.Warnings)
	}
}
