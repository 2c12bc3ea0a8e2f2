package keystore

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"time"

	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"
)

// bbolt trusts its file: a damaged page can make it panic, run for ever, or follow a circle of pages until the stack is full, which
// no recover can catch. So before bbolt sees a file its pages are walked by code that trusts nothing: that they form a tree in which
// no page occurs twice rules out what cannot be recovered from.

// CheckFile examines a database file without any key: whether bbolt can safely open it, and after an unclean stop also that its
// pages and its list of free pages are consistent. It returns an error that wraps ErrDamaged, ErrInUse or ErrStorage. What the
// records say is not examined; that is what Verify is for.
func CheckFile(path string) error {
	_, err := os.Lstat(filepath.Join(filepath.Dir(path), dirtyFile))
	return checkDatabase(path, err == nil)
}

func checkDatabase(path string, full bool) error {
	if err := checkLockedPages(path, full); err != nil {
		return err
	}
	return guard(func() error {
		db, err := bolt.Open(path, 0o600, &bolt.Options{ReadOnly: true, Timeout: lockTimeout, NoStatistics: true})
		if err != nil {
			if errors.Is(err, bolterrors.ErrTimeout) {
				return ErrInUse
			}
			return fmt.Errorf("%w: %w", ErrDamaged, err)
		}
		defer db.Close()
		return db.View(func(tx *bolt.Tx) error {
			b := tx.Bucket(bucketHead)
			if b == nil {
				return fmt.Errorf("%w: the database is not a keystore's", ErrDamaged)
			}
			if _, err := decodeHead(b.Get(keyHead)); err != nil {
				return err
			}
			if !full {
				return nil
			}
			var first error
			for err := range tx.Check() { // the channel has to be drained
				if first == nil {
					first = fmt.Errorf("%w: %w", ErrDamaged, err)
				}
			}
			return first
		})
	})
}

// Exit statuses of CheckMain.
const (
	exitDamaged = 10
	exitInUse   = 11
	exitStorage = 12
	exitNewer   = 13
)

// checkMemory is what an examination may allocate, in bytes, beyond mapping the file.
const checkMemory = 512 << 20

// checkTime is the processor time, and the time, that an examination of a file of this size may take.
func checkTime(size int64) time.Duration {
	return 5*time.Second + time.Duration(size/(100<<20))*time.Second
}

// CheckMain is the main function of the process that Config.CheckCommand starts. It limits its own memory and processor time,
// examines the file, prints what is wrong to standard output, and returns the exit status.
func CheckMain(path string) int {
	err := limitMemory(path)
	if err == nil {
		err = limitTime(path)
	}
	if err == nil {
		err = CheckFile(path)
	}
	if err == nil {
		return 0
	}
	fmt.Println(err)
	switch {
	case errors.Is(err, ErrInUse):
		return exitInUse
	case errors.Is(err, ErrStorage):
		return exitStorage
	case errors.Is(err, ErrNewer):
		return exitNewer
	}
	return exitDamaged
}

func limitMemory(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrStorage, err)
	}
	var pages uint64
	statm, err := os.ReadFile("/proc/self/statm")
	if err == nil {
		_, err = fmt.Sscan(string(statm), &pages)
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrStorage, err)
	}
	// A Go program maps a lot that it never touches, so the limit is set relative to what it has. bbolt maps the file in powers of two.
	limit := pages*uint64(os.Getpagesize()) + checkMemory + 2*uint64(info.Size())
	if err := unix.Setrlimit(unix.RLIMIT_AS, &unix.Rlimit{Cur: limit, Max: limit}); err != nil {
		return fmt.Errorf("%w: %w", ErrStorage, err)
	}
	debug.SetMemoryLimit(checkMemory / 2)
	debug.SetTraceback("none")
	return nil
}

func limitTime(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrStorage, err)
	}
	seconds := uint64(checkTime(info.Size()) / time.Second)
	if err := unix.Setrlimit(unix.RLIMIT_CPU, &unix.Rlimit{Cur: seconds, Max: seconds}); err != nil {
		return fmt.Errorf("%w: %w", ErrStorage, err)
	}
	return nil
}

// checkInChild examines the file in a process of its own, so that no damage can take more than that process.
func checkInChild(ctx context.Context, command []string, path string) error {
	if len(command) == 0 {
		return CheckFile(path)
	}
	info, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrStorage, err)
	}
	ctx, cancel := context.WithTimeout(ctx, checkTime(info.Size()))
	defer cancel()
	cmd := exec.CommandContext(ctx, command[0], append(command[1:len(command):len(command)], path)...)
	cmd.Env = []string{}
	cmd.WaitDelay = time.Second
	out := &limitedBuffer{max: 512}
	cmd.Stdout = out
	err = cmd.Run()
	if err == nil {
		return nil
	}
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		if ctx.Err() != nil {
			return fmt.Errorf("%w: its examination did not end in time", ErrDamaged)
		}
		return fmt.Errorf("%w: cannot examine the database: %w", ErrStorage, err)
	}
	text := string(bytes.TrimSpace(out.b))
	switch exit.ExitCode() {
	case exitInUse:
		return ErrInUse
	case exitStorage:
		return fmt.Errorf("%w: %s", ErrStorage, text)
	case exitNewer:
		return fmt.Errorf("%w: %s", ErrNewer, text)
	case exitDamaged:
		return fmt.Errorf("%w (%s)", ErrDamaged, text)
	}
	return fmt.Errorf("%w: its examination ended with %s", ErrDamaged, exit.ProcessState)
}

// limitedBuffer keeps the first max bytes written to it.
type limitedBuffer struct {
	b   []byte
	max int
}

func (w *limitedBuffer) Write(p []byte) (int, error) {
	w.b = append(w.b, p[:min(len(p), w.max-len(w.b))]...)
	return len(p), nil
}

// The layout of a bbolt file, version 2: little-endian on every machine kmsd runs on.
const (
	boltMagic      = 0xED0CDAED
	boltVersion    = 2
	pageBranch     = 0x01
	pageLeaf       = 0x02
	pageMeta       = 0x04
	pageFreelist   = 0x10
	pageHeaderSize = 16
	elementSize    = 16
	metaSize       = 64
	maxPageDepth   = 40
	bucketElement  = 0x01
	bucketSize     = 16
	noFreelist     = ^uint64(0)
)

// pageWalker checks a bbolt file. With full it reads every page, otherwise all but the leaves that hold records: those are at the
// same depth everywhere in a bucket, and that no two references lead to one of them, or to a free page, is enough to know that
// following references comes to an end.
type pageWalker struct {
	data     []byte // the file, mapped
	pageSize int
	pages    uint64 // high-water mark
	seen     []uint64
	full     bool
	freelist uint64
}

func damagedPage(id uint64, text string) error {
	return fmt.Errorf("%w: page %d %s", ErrDamaged, id, text)
}

// checkLockedPages checks the pages of a file that other processes might use.
func checkLockedPages(path string, full bool) error {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrStorage, err)
	}
	defer f.Close()
	deadline := time.Now().Add(lockTimeout)
	for unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB) != nil {
		if time.Now().After(deadline) {
			return ErrInUse
		}
		time.Sleep(20 * time.Millisecond)
	}
	return checkPages(f, full)
}

// checkPages checks the pages of a file that nobody changes meanwhile.
func checkPages(f *os.File, full bool) error {
	info, err := f.Stat()
	if err != nil {
		return fmt.Errorf("%w: %w", ErrStorage, err)
	}
	if info.Size() < 4*1024 || info.Size() > math.MaxInt {
		return fmt.Errorf("%w: a database of %d bytes", ErrDamaged, info.Size())
	}
	data, err := unix.Mmap(int(f.Fd()), 0, int(info.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrStorage, err)
	}
	defer unix.Munmap(data)
	unix.Madvise(data, unix.MADV_RANDOM) // reading ahead would fetch the leaves too
	return guard(func() error {          // a disk that cannot be read shows as a fault
		w := &pageWalker{data: data, full: full}
		root, err := w.meta()
		if err != nil {
			return err
		}
		if w.freelist != noFreelist {
			if err := w.free(); err != nil {
				return err
			}
		}
		return w.tree(root, true)
	})
}

// meta reads both meta pages, as bbolt does: the valid one with the higher transaction number counts. bbolt goes back to the
// other one when it is damaged, which takes back the last transaction without a word. That is right after a power failure, when
// that transaction had not been acknowledged; after an orderly stop both pages have to be valid.
func (w *pageWalker) meta() (root uint64, err error) {
	le := binary.LittleEndian
	var newest uint64
	found := 0
	// The second meta page begins one page in; the size of a page is only known from the first, or by trying.
	for _, off := range []int{0, 1024, 2048, 4096, 8192, 16384, 32768, 65536} {
		if off > 0 && w.pageSize != 0 && off != w.pageSize || off+pageHeaderSize+metaSize > len(w.data) {
			continue
		}
		m := w.data[off+pageHeaderSize:]
		h := fnv.New64a()
		h.Write(m[:56])
		if le.Uint32(m) != boltMagic || le.Uint32(m[4:]) != boltVersion || le.Uint64(m[56:]) != h.Sum64() {
			continue
		}
		size := le.Uint32(m[8:])
		if size < 1024 || size > 65536 || size&(size-1) != 0 || off != 0 && off != int(size) {
			continue
		}
		w.pageSize = int(size)
		if tx := le.Uint64(m[48:]); found == 0 || tx > newest {
			newest = tx
			root, w.freelist, w.pages = le.Uint64(m[16:]), le.Uint64(m[32:]), le.Uint64(m[40:])
		}
		found++
	}
	switch {
	case found == 0:
		return 0, fmt.Errorf("%w: the database has no valid meta page", ErrDamaged)
	case found == 1 && !w.full:
		return 0, fmt.Errorf("%w: a meta page is not valid, so the last change may be missing", ErrDamaged)
	}
	if w.pages < 2 || w.pages > uint64(len(w.data)/w.pageSize) {
		return 0, fmt.Errorf("%w: the database is shorter than it should be", ErrDamaged)
	}
	w.seen = make([]uint64, (w.pages+63)/64)
	return root, nil
}

// claim notes that the pages from id on belong to one owner. No page may have two.
func (w *pageWalker) claim(id, n uint64) error {
	if id < 2 || id >= w.pages || n > w.pages-id {
		return damagedPage(id, "is out of range")
	}
	for ; n > 0; n, id = n-1, id+1 {
		if w.seen[id/64]&(1<<(id%64)) != 0 {
			return damagedPage(id, "is used twice")
		}
		w.seen[id/64] |= 1 << (id % 64)
	}
	return nil
}

// load returns a page with its overflow pages.
func (w *pageWalker) load(id uint64) (flags uint16, count int, b []byte, err error) {
	if id < 2 || id >= w.pages {
		return 0, 0, nil, damagedPage(id, "is out of range")
	}
	b = w.data[int(id)*w.pageSize:]
	le := binary.LittleEndian
	if le.Uint64(b) != id {
		return 0, 0, nil, damagedPage(id, "says it is another")
	}
	flags, count = le.Uint16(b[8:]), int(le.Uint16(b[10:]))
	overflow := le.Uint32(b[12:])
	if uint64(overflow) >= w.pages-id {
		return 0, 0, nil, damagedPage(id, "is too large")
	}
	return flags, count, b[:(int(overflow)+1)*w.pageSize], nil
}

// height returns the number of levels below a page, going by the first page of each.
func (w *pageWalker) height(id uint64) (int, error) {
	for n := range maxPageDepth {
		flags, count, b, err := w.load(id)
		if err != nil {
			return 0, err
		}
		if flags != pageBranch || count == 0 {
			return n, nil
		}
		id = binary.LittleEndian.Uint64(b[pageHeaderSize+8:])
	}
	return 0, damagedPage(id, "is too deep")
}

// tree checks the pages of a bucket. top says that it is the one that holds the others.
func (w *pageWalker) tree(root uint64, top bool) error {
	height, err := w.height(root)
	if err != nil {
		return err
	}
	return w.page(root, height, nil, nil, top)
}

// page checks the page and the height levels below it. Its keys must lie in [low, high); nil means no bound.
func (w *pageWalker) page(id uint64, height int, low, high []byte, top bool) error {
	if height == 0 && !w.full && !top {
		return w.claim(id, 1)
	}
	flags, count, b, err := w.load(id)
	if err != nil {
		return err
	}
	if err := w.claim(id, uint64(len(b)/w.pageSize)); err != nil {
		return err
	}
	switch {
	case height == 0 && flags == pageLeaf:
		return w.leaf(id, b[pageHeaderSize:], count, low, high, top)
	case height == 0 || flags != pageBranch:
		return damagedPage(id, "is of the wrong kind")
	}
	elements := b[pageHeaderSize:]
	if count == 0 || count*elementSize > len(elements) {
		return damagedPage(id, "has an impossible count")
	}
	le := binary.LittleEndian
	key := func(i int) ([]byte, error) {
		e := elements[i*elementSize:]
		return w.slice(id, e, le.Uint32(e), le.Uint32(e[4:]), 0)
	}
	this, err := key(0)
	if err != nil {
		return err
	}
	for i := range count {
		next := high
		if i+1 < count {
			if next, err = key(i + 1); err != nil {
				return err
			}
		}
		if !ordered(this, low, high) || next != nil && bytes.Compare(this, next) >= 0 {
			return damagedPage(id, "is out of order")
		}
		childLow := this
		if i == 0 {
			childLow = low
		}
		if err := w.page(le.Uint64(elements[i*elementSize+8:]), height-1, childLow, next, top); err != nil {
			return err
		}
		this = next
	}
	return nil
}

func ordered(key, low, high []byte) bool {
	return (low == nil || bytes.Compare(low, key) <= 0) && (high == nil || bytes.Compare(key, high) < 0)
}

// slice returns size bytes at pos, counted from the element e, after skip bytes.
func (w *pageWalker) slice(id uint64, e []byte, pos, size uint32, skip uint32) ([]byte, error) {
	start := uint64(pos) + uint64(skip)
	if start+uint64(size) > uint64(len(e)) {
		return nil, damagedPage(id, "has an element that reaches beyond it")
	}
	return e[start : start+uint64(size)], nil
}

func (w *pageWalker) leaf(id uint64, elements []byte, count int, low, high []byte, top bool) error {
	if count*elementSize > len(elements) {
		return damagedPage(id, "has an impossible count")
	}
	le := binary.LittleEndian
	var last []byte
	for i := range count {
		e := elements[i*elementSize:]
		pos, ksize, vsize := le.Uint32(e[4:]), le.Uint32(e[8:]), le.Uint32(e[12:])
		key, err := w.slice(id, e, pos, ksize, 0)
		if err != nil {
			return err
		}
		value, err := w.slice(id, e, pos, vsize, ksize)
		if err != nil {
			return err
		}
		if i > 0 && bytes.Compare(last, key) >= 0 || !ordered(key, low, high) {
			return damagedPage(id, "is out of order")
		}
		last = key
		isBucket := le.Uint32(e)&bucketElement != 0
		if isBucket != top || isBucket && len(value) < bucketSize {
			return damagedPage(id, "has a bucket where none may be, or lacks one")
		}
		if !isBucket {
			continue
		}
		if root := le.Uint64(value); root != 0 {
			if err := w.tree(root, false); err != nil {
				return err
			}
			continue
		}
		inline := value[bucketSize:]
		if len(inline) < pageHeaderSize || le.Uint16(inline[8:]) != pageLeaf {
			return damagedPage(id, "has a malformed bucket")
		}
		if err := w.leaf(id, inline[pageHeaderSize:], int(le.Uint16(inline[10:])), nil, nil, false); err != nil {
			return err
		}
	}
	return nil
}

// free checks the list of free pages: in order, in range, none of them used.
func (w *pageWalker) free() error {
	flags, count, b, err := w.load(w.freelist)
	if err != nil {
		return err
	}
	if err := w.claim(w.freelist, uint64(len(b)/w.pageSize)); err != nil {
		return err
	}
	if flags != pageFreelist {
		return damagedPage(w.freelist, "is not a free list")
	}
	ids := b[pageHeaderSize:]
	n := uint64(count)
	le := binary.LittleEndian
	if n == 0xFFFF {
		n = le.Uint64(ids)
		ids = ids[8:]
	}
	if n > uint64(len(ids))/8 {
		return damagedPage(w.freelist, "has an impossible count")
	}
	var last uint64
	for i := range n {
		id := le.Uint64(ids[i*8:])
		if id <= last {
			return damagedPage(w.freelist, "is out of order")
		}
		if err := w.claim(id, 1); err != nil {
			return err
		}
		last = id
	}
	return nil
}
