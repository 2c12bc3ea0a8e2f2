package secmem

import (
	"bytes"
	"errors"
	"os"
	"sync"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

func newTestArena(t *testing.T, size int) *Arena {
	t.Helper()
	a, err := NewArena(size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close() })
	return a
}

// readMem reads n bytes at p the way an attacker with root does.
func readMem(t *testing.T, p *byte, n int) ([]byte, error) {
	t.Helper()
	f, err := os.Open("/proc/self/mem")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	out := make([]byte, n)
	_, err = f.ReadAt(out, int64(uintptr(unsafe.Pointer(p))))
	return out, err
}

func TestKernelRefusesToShowTheArena(t *testing.T) {
	a := newTestArena(t, 64<<10)
	b, err := a.Alloc(32)
	if err != nil {
		t.Fatal(err)
	}
	copy(b.Bytes(), "a canary that nobody may see....")

	// The control: the same read of ordinary memory must work, or the test proves nothing.
	plain := []byte("a canary that everybody may see.")
	if got, err := readMem(t, &plain[0], len(plain)); err != nil || !bytes.Equal(got, plain) {
		t.Fatalf("reading ordinary memory through /proc/self/mem: %q, %v", got, err)
	}

	got, err := readMem(t, &b.Bytes()[0], 32)
	switch a.Protection() {
	case ProtectionFull:
		if !errors.Is(err, unix.EIO) {
			t.Fatalf("reading the arena through /proc/self/mem: %q, %v, want EIO", got, err)
		}
	case ProtectionPartial:
		if fd, err := unix.MemfdSecret(unix.O_CLOEXEC); err == nil {
			unix.Close(fd)
			t.Fatal("partial protection on a kernel that has memfd_secret")
		}
	default:
		t.Fatalf("protection %q", a.Protection())
	}
}

func TestFallbackIsLockedAndNotDumped(t *testing.T) {
	a, err := newArena(64<<10, func(int) ([]byte, error) { return nil, unix.ENOSYS })
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	if a.Protection() != ProtectionPartial {
		t.Fatalf("protection %q", a.Protection())
	}
	flags := vmFlags(t, &a.mem[0])
	for _, want := range []string{"lo", "dd", "dc"} { // locked, don't dump, don't copy on fork
		if !bytes.Contains(flags, []byte(" "+want)) {
			t.Errorf("mapping has flags %q, want %q among them", flags, want)
		}
	}
	b, err := a.Alloc(5)
	if err != nil {
		t.Fatal(err)
	}
	copy(b.Bytes(), "hello")
	if string(b.Bytes()) != "hello" {
		t.Fatalf("got %q", b.Bytes())
	}
}

func TestArenaIsNotDumped(t *testing.T) {
	a := newTestArena(t, 64<<10)
	if flags := vmFlags(t, &a.mem[0]); !bytes.Contains(flags, []byte(" dd")) {
		t.Fatalf("mapping has flags %q, want dd among them", flags)
	}
}

// vmFlags returns the VmFlags line of the mapping that holds p.
func vmFlags(t *testing.T, p *byte) []byte {
	t.Helper()
	smaps, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	addr, inside := uint64(uintptr(unsafe.Pointer(p))), false
	for line := range bytes.Lines(smaps) {
		if lo, hi, ok := parseRange(line); ok {
			inside = lo <= addr && addr < hi
		} else if inside && bytes.HasPrefix(line, []byte("VmFlags:")) {
			return line
		}
	}
	t.Fatal("mapping not found")
	return nil
}

func parseRange(line []byte) (lo, hi uint64, ok bool) {
	head, _, _ := bytes.Cut(line, []byte(" "))
	from, to, found := bytes.Cut(head, []byte("-"))
	if !found {
		return 0, 0, false
	}
	lo, ok1 := hexNumber(from)
	hi, ok2 := hexNumber(to)
	return lo, hi, ok1 && ok2
}

func hexNumber(s []byte) (n uint64, ok bool) {
	for _, c := range s {
		switch {
		case c >= '0' && c <= '9':
			n = n<<4 | uint64(c-'0')
		case c >= 'a' && c <= 'f':
			n = n<<4 | uint64(c-'a'+10)
		default:
			return 0, false
		}
	}
	return n, len(s) > 0
}

func TestAllocExhaustsAndRecovers(t *testing.T) {
	a := newTestArena(t, 4096)
	var held []*Buffer
	for {
		b, err := a.Alloc(block)
		if errors.Is(err, ErrArenaFull) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		held = append(held, b)
	}
	if want := len(a.mem) / block; len(held) != want {
		t.Fatalf("%d buffers, want %d", len(held), want)
	}
	held[3].Free()
	held[5].Free()
	if _, err := a.Alloc(2 * block); !errors.Is(err, ErrArenaFull) {
		t.Fatalf("two blocks that do not touch served one buffer: %v", err)
	}
	held[4].Free()
	b, err := a.Alloc(3*block - 1)
	if err != nil {
		t.Fatal(err)
	}
	if len(b.Bytes()) != 3*block-1 || cap(b.Bytes()) != len(b.Bytes()) {
		t.Fatalf("len %d, cap %d", len(b.Bytes()), cap(b.Bytes()))
	}
	if _, err := a.Alloc(0); err == nil || errors.Is(err, ErrArenaFull) {
		t.Fatalf("Alloc(0): %v", err)
	}
	if _, err := a.Alloc(MaxArena + 1); !errors.Is(err, ErrArenaFull) {
		t.Fatalf("Alloc of more than the arena: %v", err)
	}
}

func TestFreeWipes(t *testing.T) {
	a := newTestArena(t, 4096)
	b, err := a.Alloc(40)
	if err != nil {
		t.Fatal(err)
	}
	mem := b.Bytes()
	for i := range mem {
		mem[i] = 0xA5
	}
	b.Free()
	for i, c := range a.mem {
		if c != 0 {
			t.Fatalf("byte %d is %#x after Free", i, c)
		}
	}
	if b.Bytes() != nil {
		t.Fatal("Bytes after Free is not nil")
	}
}

func TestDoubleFreeLeavesTheNextOwnerAlone(t *testing.T) {
	a := newTestArena(t, 4096)
	b, _ := a.Alloc(32)
	b.Free()
	next, err := a.Alloc(32)
	if err != nil {
		t.Fatal(err)
	}
	copy(next.Bytes(), "mine")
	b.Free()
	if string(next.Bytes()[:4]) != "mine" {
		t.Fatal("the second Free wiped somebody else's secret")
	}
	other, err := a.Alloc(32)
	if err != nil {
		t.Fatal(err)
	}
	if &other.Bytes()[0] == &next.Bytes()[0] {
		t.Fatal("the second Free gave one block to two buffers")
	}
	(*Buffer)(nil).Free()
}

func TestClose(t *testing.T) {
	a, err := NewArena(4096)
	if err != nil {
		t.Fatal(err)
	}
	b, _ := a.Alloc(32)
	for range 2 {
		if err := a.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if b.Bytes() != nil {
		t.Fatal("Bytes after Close is not nil")
	}
	b.Free()
	if _, err := a.Alloc(32); !errors.Is(err, ErrArenaClosed) {
		t.Fatalf("Alloc after Close: %v", err)
	}
}

func TestArenaSizes(t *testing.T) {
	for _, size := range []int{-1, 0, MinArena - 1, MaxArena + 1} {
		if a, err := NewArena(size); err == nil {
			a.Close()
			t.Errorf("an arena of %d bytes was made", size)
		}
	}
}

func TestConcurrentBuffersDoNotOverlap(t *testing.T) {
	a := newTestArena(t, 64<<10)
	var wg sync.WaitGroup
	for g := range 16 {
		wg.Go(func() {
			for i := range 200 {
				b, err := a.Alloc(1 + (g*37+i)%200)
				if err != nil {
					t.Error(err)
					return
				}
				mem := b.Bytes()
				for j := range mem {
					if mem[j] != 0 {
						t.Errorf("fresh buffer holds %#x", mem[j])
						return
					}
					mem[j] = byte(g + 1)
				}
				for j := range mem {
					if mem[j] != byte(g+1) {
						t.Error("another goroutine wrote into this buffer")
						return
					}
				}
				b.Free()
			}
		})
	}
	wg.Wait()
}

func TestDoRunsOnceAndPassesPanics(t *testing.T) {
	n := 0
	Do(func() { n++ })
	if n != 1 {
		t.Fatalf("ran %d times", n)
	}
	defer func() {
		if recover() == nil {
			t.Fatal("the panic was swallowed")
		}
	}()
	Do(func() { panic("secmem: test") })
}
