package audit

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/tlog"
)

var update = flag.Bool("update", false, "write the golden log")

var seed = bytes.Repeat([]byte{7}, 32)

func open(t *testing.T, dir string) *Log {
	t.Helper()
	l, err := Open(Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func unlocked(t *testing.T, dir string) *Log {
	t.Helper()
	l := open(t, dir)
	if err := l.Unlock(seed); err != nil {
		t.Fatal(err)
	}
	return l
}

func entry(i int) *Entry {
	return &Entry{
		Time: time.UnixMilli(1_700_000_000_000 + int64(i)), Op: "sign", Key: "REGISTRATION/" + strconv.Itoa(i), Version: 3,
		UID: 1000, PID: 4711, Principal: "owner", Allowed: i%2 == 0, Code: "ok", Detail: "d" + strconv.Itoa(i),
		DetailID: "id", Via: "bridge", Client: "kmsctl 1", Trace: "t" + strconv.Itoa(i), PolicyEpoch: 99,
	}
}

func fill(t *testing.T, l *Log, from, to int) {
	t.Helper()
	for i := from; i < to; i++ {
		if err := l.Append(entry(i)); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Flush(context.Background()); err != nil {
		t.Fatal(err)
	}
}

func verify(t *testing.T, dir string, want *Head) Report {
	t.Helper()
	r, err := Verify(dir, want)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestRoundTrip(t *testing.T) {
	dir := t.TempDir()
	l := unlocked(t, dir)
	fill(t, l, 0, 500)
	got, next, err := l.Tail(t.Context(), seed, 0, 1000)
	if err != nil || len(got) != 500 || next != 501 {
		t.Fatalf("Tail: %d entries, next %d, %v", len(got), next, err)
	}
	for i, g := range got {
		want := *entry(i)
		want.Number = uint64(i + 1) // leaf 0 is the header
		if g != want {
			t.Fatalf("entry %d: got %+v, want %+v", i, g, want)
		}
	}
	if got, next, err = l.Tail(t.Context(), seed, 101, 10); err != nil || len(got) != 10 || got[0].Key != "REGISTRATION/100" || next != 111 {
		t.Fatalf("page: %v %d %v", got, next, err)
	}
	if got, _, err = l.Last(t.Context(), seed, 3); err != nil || len(got) != 3 || got[2].Key != "REGISTRATION/499" {
		t.Fatalf("last: %v %v", got, err)
	}
	if _, _, err = l.Tail(t.Context(), bytes.Repeat([]byte{8}, 32), 0, 10); !errors.Is(err, ErrKey) {
		t.Fatalf("another seed: %v", err)
	}
	if r := verify(t, dir, nil); r.Entries != 500 || r.Segments != 1 || r.Head != l.Head() {
		t.Fatalf("report %+v, head %+v", r, l.Head())
	}
}

// The files must show nothing but the number of entries.
func TestPadding(t *testing.T) {
	dir := t.TempDir()
	l := unlocked(t, dir)
	fill(t, l, 0, 3)
	before := fileSize(t, filepath.Join(dir, segmentName(1)))
	for _, e := range []*Entry{{}, entry(123456789), {Op: "key_create", Key: strings.Repeat("k", 120), Code: "not_available"}} {
		if err := l.Append(e); err != nil {
			t.Fatal(err)
		}
		if err := l.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		after := fileSize(t, filepath.Join(dir, segmentName(1)))
		if after-before != 4+8+block+tagSize+checkSize {
			t.Errorf("an entry took %d bytes", after-before)
		}
		before = after
	}
	data, err := os.ReadFile(filepath.Join(dir, segmentName(1)))
	if err != nil {
		t.Fatal(err)
	}
	for _, canary := range []string{"REGISTRATION", "owner", "sign", "key_create", "kkkk"} {
		if bytes.Contains(data, []byte(canary)) {
			t.Errorf("%q is readable in the file", canary)
		}
	}
}

func fileSize(t *testing.T, path string) int64 {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return info.Size()
}

func TestLongestEntry(t *testing.T) {
	long := strings.Repeat("x", 5000)
	b := appendEntry(nil, &Entry{Op: long, Key: long, Principal: long, Via: long, Client: long, Trace: long, Code: long, DetailID: long, Detail: long}, 1)
	if len(b) != maxEntry {
		t.Fatalf("%d bytes, want %d", len(b), maxEntry)
	}
	e, tag, err := parseEntry(b)
	if err != nil || tag != 1 || len(e.Key) != maxKey || len(e.Detail) < 400 {
		t.Fatalf("%+v %d %v", e, tag, err)
	}
}

// The tree is the one of RFC 6962 as x/mod/sumdb/tlog has it.
func TestTree(t *testing.T) {
	var stored []tlog.Hash
	reader := tlog.HashReaderFunc(func(indexes []int64) ([]tlog.Hash, error) {
		out := make([]tlog.Hash, len(indexes))
		for i, x := range indexes {
			out[i] = stored[x]
		}
		return out, nil
	})
	var mine tree
	var buf []byte
	for n := range 300 {
		want, err := tlog.TreeHash(int64(n), reader)
		if err != nil {
			t.Fatal(err)
		}
		if got := mine.head(); n > 0 && (tlog.Hash(got.Root) != want || got.Size != uint64(n)) {
			t.Fatalf("size %d: root %x, want %x", n, got.Root, want)
		}
		if len(mine.edge) != edgeLen(uint64(n)) {
			t.Fatalf("size %d: edge of %d", n, len(mine.edge))
		}
		data := []byte(strconv.Itoa(n))
		hashes, err := tlog.StoredHashes(int64(n), data, reader)
		if err != nil {
			t.Fatal(err)
		}
		stored = append(stored, hashes...)
		mine.add(leafHash(&buf, data))
	}
	if (&tree{}).head().Root != sha256.Sum256(nil) {
		t.Error("root of the empty tree")
	}
}

// The whole log as tlog sees it, over several segments.
func TestHeadAgainstTlog(t *testing.T) {
	dir := t.TempDir()
	for i := range 4 {
		l := unlocked(t, dir)
		fill(t, l, i*37, (i+1)*37)
		l.Close()
	}
	var stored []tlog.Hash
	reader := tlog.HashReaderFunc(func(indexes []int64) ([]tlog.Hash, error) {
		out := make([]tlog.Hash, len(indexes))
		for i, x := range indexes {
			out[i] = stored[x]
		}
		return out, nil
	})
	n := int64(0)
	leaf := func(data []byte) {
		hashes, err := tlog.StoredHashes(n, data, reader)
		if err != nil {
			t.Fatal(err)
		}
		stored = append(stored, hashes...)
		n++
	}
	for s := range 4 {
		f, err := os.Open(filepath.Join(dir, segmentName(uint32(s+1))))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		r, err := newSegmentReader(f)
		if err != nil {
			t.Fatal(err)
		}
		leaf(r.header.raw)
		for {
			if _, err := r.next(); err != nil {
				break
			}
			leaf(r.body)
		}
	}
	want, err := tlog.TreeHash(n, reader)
	if err != nil {
		t.Fatal(err)
	}
	if r := verify(t, dir, nil); tlog.Hash(r.Head.Root) != want || r.Head.Size != uint64(n) || n != 4*38 {
		t.Fatalf("%+v, want %x of %d", r, want, n)
	}
}

// damaged writes 20 entries, lets change alter the bytes of the segment, whose records begin at the given offsets, and
// returns what Verify says.
func damaged(t *testing.T, want bool, change func(data []byte, records []int) []byte) error {
	t.Helper()
	dir := t.TempDir()
	l := unlocked(t, dir)
	fill(t, l, 0, 20)
	head := l.Head()
	l.Close()
	path := filepath.Join(dir, segmentName(1))
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	size := 4 + 8 + block + tagSize + checkSize
	var records []int
	for at := len(data) - 20*size; at < len(data); at += size {
		records = append(records, at)
	}
	if err := os.WriteFile(path, change(bytes.Clone(data), records), 0o600); err != nil {
		t.Fatal(err)
	}
	var given *Head
	if want {
		given = &head
	}
	_, err = Verify(dir, given)
	return err
}

func TestVerifyFinds(t *testing.T) {
	// forge makes the checks of all records right again, as an attacker would.
	forge := func(data []byte, records []int, count int) []byte {
		var buf []byte
		size := records[1] - records[0]
		for i := range count {
			r := data[records[0]+i*size:][:size]
			binary.BigEndian.PutUint64(r[4:], uint64(i+1))
			leaf := leafHash(&buf, r[4:size-checkSize])
			copy(r[size-checkSize:], leaf[:])
		}
		return data
	}
	for _, c := range []struct {
		name   string
		head   bool // with the head of before
		entry  uint64
		change func(data []byte, records []int) []byte
	}{
		{"flip in a ciphertext", false, 8, func(d []byte, r []int) []byte { d[r[7]+100] ^= 1; return d }},
		{"flip in a number", false, 8, func(d []byte, r []int) []byte { d[r[7]+11] ^= 1; return d }},
		{"flip in a length", false, 8, func(d []byte, r []int) []byte { d[r[7]+3] ^= 1; return d }},
		{"flip in a check", false, 8, func(d []byte, r []int) []byte { d[r[8]-1] ^= 1; return d }},
		{"flip in the header", false, 0, func(d []byte, r []int) []byte { d[r[0]/2] ^= 1; return d }},
		{"flip in the magic", false, 0, func(d []byte, r []int) []byte { d[0] ^= 1; return d }},
		{"deleted", false, 5, func(d []byte, r []int) []byte { return append(d[:r[4]], d[r[5]:]...) }},
		{"reordered", false, 5, func(d []byte, r []int) []byte {
			a := bytes.Clone(d[r[4]:r[5]])
			copy(d[r[4]:], d[r[5]:r[6]])
			copy(d[r[5]:], a)
			return d
		}},
		{"repeated", false, 6, func(d []byte, r []int) []byte {
			return append(bytes.Clone(d[:r[5]]), d[r[4]:]...)
		}},
		{"torn", false, 20, func(d []byte, r []int) []byte { return d[:len(d)-5] }},
		{"cut off", true, 11, func(d []byte, r []int) []byte { return d[:r[10]] }},
		{"all cut off", true, 1, func(d []byte, r []int) []byte { return d[:r[0]] }},
		{"deleted and forged", true, 20, func(d []byte, r []int) []byte {
			return forge(append(d[:r[4]], d[r[5]:]...), r, 19)
		}},
		{"changed and forged", true, 20, func(d []byte, r []int) []byte { d[r[3]+50] ^= 1; return forge(d, r, 20) }},
		{"empty file", false, 0, func(d []byte, r []int) []byte { return nil }},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := damaged(t, c.head, c.change)
			var d *Damage
			if !errors.As(err, &d) || !errors.Is(err, ErrDamaged) {
				t.Fatalf("got %v", err)
			}
			if d.Entry != c.entry {
				t.Errorf("names entry %d, want %d: %v", d.Entry, c.entry, err)
			}
		})
	}
	if err := damaged(t, true, func(d []byte, r []int) []byte { return d }); err != nil {
		t.Errorf("unchanged log: %v", err)
	}
}

// Every single bit flip in a log is found.
func TestEveryByteCounts(t *testing.T) {
	dir := t.TempDir()
	l := unlocked(t, dir)
	fill(t, l, 0, 3)
	head := l.Head()
	l.Close()
	path := filepath.Join(dir, segmentName(1))
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for i := range data {
		data[i] ^= 1 << (i % 8)
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Verify(dir, &head); !errors.Is(err, ErrDamaged) {
			t.Fatalf("flip in byte %d: %v", i, err)
		}
		data[i] ^= 1 << (i % 8)
	}
}

func TestMissingSegment(t *testing.T) {
	for missing := 1; missing <= 2; missing++ {
		dir := t.TempDir()
		for range 3 {
			l := unlocked(t, dir)
			fill(t, l, 0, 5)
			l.Close()
		}
		verify(t, dir, nil)
		if err := os.Remove(filepath.Join(dir, segmentName(uint32(missing)))); err != nil {
			t.Fatal(err)
		}
		var d *Damage
		if _, err := Verify(dir, nil); !errors.As(err, &d) || d.File != segmentName(uint32(missing)) {
			t.Errorf("segment %d removed: %v", missing, err)
		}
	}
}

// An earlier segment that was replaced as a whole, with right checks, contradicts the edge in the next one.
func TestForgedSegment(t *testing.T) {
	dir, other := t.TempDir(), t.TempDir()
	for _, d := range []string{dir, other} {
		for range 2 {
			l := unlocked(t, d)
			fill(t, l, 0, 5)
			l.Close()
		}
	}
	data, err := os.ReadFile(filepath.Join(other, segmentName(1)))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, segmentName(1)), data, 0o600); err != nil {
		t.Fatal(err)
	}
	var d *Damage
	if _, err := Verify(dir, nil); !errors.As(err, &d) || d.File != segmentName(2) {
		t.Fatalf("got %v", err)
	}
}

// A log that grows stays a continuation of every earlier head, over restarts too.
func TestEarlierHeads(t *testing.T) {
	dir := t.TempDir()
	var heads []Head
	for i := range 5 {
		l := unlocked(t, dir)
		fill(t, l, 10*i, 10*i+7)
		heads = append(heads, l.Head())
		l.Close()
	}
	for i := range heads {
		verify(t, dir, &heads[i])
	}
	wrong := heads[2]
	wrong.Root[0] ^= 1
	if _, err := Verify(dir, &wrong); !errors.Is(err, ErrDamaged) {
		t.Errorf("wrong root: %v", err)
	}
}

// After a loss of power the file may end anywhere in what was written last, or in zeros.
func TestTornTail(t *testing.T) {
	dir := t.TempDir()
	l := unlocked(t, dir)
	fill(t, l, 0, 10)
	l.Close()
	path := filepath.Join(dir, segmentName(1))
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	record := 4 + 8 + block + tagSize + checkSize
	for _, c := range []struct {
		name string
		data []byte
		kept int
	}{
		{"in the length", whole[:len(whole)-record+2], 9},
		{"in the body", whole[:len(whole)-100], 9},
		{"in the check", whole[:len(whole)-1], 9},
		{"between entries", whole[:len(whole)-3*record], 7},
		{"zeros", append(bytes.Clone(whole[:len(whole)-100]), make([]byte, 5000)...), 9},
		{"zeros instead of the last", append(bytes.Clone(whole[:len(whole)-record]), make([]byte, record)...), 9},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir2 := t.TempDir()
			for _, f := range []string{auditorFile} {
				b, err := os.ReadFile(filepath.Join(dir, f))
				if err != nil {
					t.Fatal(err)
				}
				os.WriteFile(filepath.Join(dir2, f), b, 0o600)
			}
			if err := os.WriteFile(filepath.Join(dir2, segmentName(1)), c.data, 0o600); err != nil {
				t.Fatal(err)
			}
			l := open(t, dir2)
			fill(t, l, 100, 105)
			l.Close()
			r := verify(t, dir2, nil)
			repaired := 1
			if c.name == "between entries" {
				repaired = 0
			}
			if want := uint64(c.kept + 5 + repaired); r.Entries != want {
				t.Fatalf("%d entries, want %d", r.Entries, want)
			}
			entries, _, err := Tail(dir2, seed, 0, 100)
			if err != nil || entries[c.kept-1].Key != "REGISTRATION/"+strconv.Itoa(c.kept-1) {
				t.Fatalf("%v %v", entries, err)
			}
			if repaired == 1 && entries[c.kept].Op != "audit_repair" {
				t.Errorf("the repair is not recorded: %+v", entries[c.kept])
			}
		})
	}
}

// Damage in the middle is not mistaken for a loss of power and hidden.
func TestDamageIsNotRepaired(t *testing.T) {
	dir := t.TempDir()
	l := unlocked(t, dir)
	fill(t, l, 0, 10)
	l.Close()
	path := filepath.Join(dir, segmentName(1))
	data, _ := os.ReadFile(path)
	data[len(data)-1500] ^= 1
	os.WriteFile(path, data, 0o600)
	l = unlocked(t, dir)
	fill(t, l, 10, 12)
	l.Close()
	var d *Damage
	if _, err := Verify(dir, nil); !errors.As(err, &d) || d.File != segmentName(1) {
		t.Fatalf("got %v", err)
	}
}

// Before the keystore is unlocked, and before there is one, entries are recorded all the same.
func TestBeforeUnlock(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir)
	if err := l.Append(entry(1)); err != nil {
		t.Fatal(err)
	}
	if err := l.AppendDurable(t.Context(), entry(2)); !errors.Is(err, ErrLocked) {
		t.Fatalf("durable without an auditor: %v", err)
	}
	if err := l.Unlock(seed); err != nil {
		t.Fatal(err)
	}
	fill(t, l, 3, 4)
	l.Close()

	l = open(t, dir) // locked, but with the public key
	fill(t, l, 5, 6)
	if err := l.AppendDurable(t.Context(), entry(6)); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Seal(entry(7)); !errors.Is(err, ErrLocked) {
		t.Fatalf("Seal while locked: %v", err)
	}
	if err := l.Unlock(bytes.Repeat([]byte{9}, 32)); !errors.Is(err, ErrKey) {
		t.Fatalf("another auditor: %v", err)
	}
	got, _, err := l.Tail(t.Context(), seed, 0, 10)
	if err != nil || len(got) != 4 {
		t.Fatalf("%v %v", got, err)
	}
}

func seals(t *testing.T, l *Log, from, to int) []Sealed {
	t.Helper()
	var out []Sealed
	for i := from; i < to; i++ {
		b, err := l.Seal(entry(i))
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, Sealed{Seq: uint64(i + 1), Data: b})
	}
	return out
}

func keys(t *testing.T, dir string) string {
	t.Helper()
	entries, _, err := Tail(dir, seed, 0, 1000)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range entries {
		out = append(out, strings.TrimPrefix(e.Key, "REGISTRATION/"))
	}
	return strings.Join(out, " ")
}

func TestOutbox(t *testing.T) {
	dir := t.TempDir()
	l := unlocked(t, dir)
	box := seals(t, l, 0, 10)
	copyAll := func(l *Log, b []Sealed) {
		t.Helper()
		if err := l.Copy(t.Context(), b); err != nil {
			t.Fatal(err)
		}
	}
	copyAll(l, box[:3])
	copyAll(l, box[:5]) // not yet removed from the outbox
	fill(t, l, 50, 51)
	l.Close()

	l = unlocked(t, dir) // crash before the outbox was emptied
	copyAll(l, box[:7])
	l.Close()
	l = open(t, dir) // and again, with entries written while locked
	fill(t, l, 51, 52)
	if err := l.Unlock(seed); err != nil {
		t.Fatal(err)
	}
	copyAll(l, box[6:9])
	copyAll(l, box[9:])
	l.Close()
	l = unlocked(t, dir) // everything removed in time
	copyAll(l, nil)
	more := seals(t, l, 10, 12)
	copyAll(l, more)
	l.Close()
	if got, want := keys(t, dir), "0 1 2 3 4 50 5 6 51 7 8 9 10 11"; got != want {
		t.Errorf("log has %s, want %s", got, want)
	}

	// An older store put back has other entries under the old numbers. They are recorded, not taken for known ones.
	l = unlocked(t, dir)
	back := seals(t, l, 20, 22)
	back[0].Seq, back[1].Seq = 3, 4
	copyAll(l, back)
	l.Close()
	if got := keys(t, dir); !strings.HasSuffix(got, " 11 20 21") {
		t.Errorf("log has %s", got)
	}
}

func TestOutboxUnreadable(t *testing.T) {
	dir := t.TempDir()
	l := unlocked(t, dir)
	if err := l.Copy(t.Context(), []Sealed{{Seq: 1, Data: []byte("no entry at all, but long enough")}}); err != nil {
		t.Fatal(err)
	}
	l.Close()
	entries, _, err := Tail(dir, seed, 0, 10)
	if err != nil || len(entries) != 1 || entries[0].Code != "damaged" {
		t.Fatalf("%v %v", entries, err)
	}
}

func TestConcurrent(t *testing.T) {
	dir := t.TempDir()
	l := unlocked(t, dir)
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			for i := range 200 {
				var err error
				switch {
				case i%50 == 0:
					err = l.AppendDurable(t.Context(), entry(g*1000+i))
				case i%50 == 25:
					_, _, err = l.Last(t.Context(), seed, 5)
					if err == nil {
						err = l.Append(entry(g*1000 + i))
					}
				default:
					err = l.Append(entry(g*1000 + i))
				}
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if r := verify(t, dir, nil); r.Entries != 1600 {
		t.Fatalf("%d entries", r.Entries)
	}
	if err := l.Append(entry(1)); !errors.Is(err, ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

// A writer that is slower than its callers slows them down and loses nothing.
func TestBackPressure(t *testing.T) {
	dir := t.TempDir()
	l := unlocked(t, dir)
	const each = 15_000 // of four: three times what may wait
	l.fileMu.Lock()     // holds the writer up
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			for i := range each {
				if err := l.Append(entry(g*each + i)); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	time.Sleep(100 * time.Millisecond)
	l.fileMu.Unlock()
	wg.Wait()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if r := verify(t, dir, nil); r.Entries != 4*each {
		t.Errorf("%d entries, want %d", r.Entries, 4*each)
	}
}

// A full disk: durable entries fail at once, others are kept until 4 MiB wait, and nothing is lost when there is room
// again.
func TestFullDisk(t *testing.T) {
	if os.Getuid() != 0 {
		if os.Getenv("CI") != "" {
			t.Fatal("this test needs root, to mount a small file system")
		}
		t.Skip("needs root, to mount a small file system; the continuous integration runs it as root")
	}
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=128k"); err != nil {
		t.Fatal(err)
	}
	defer syscall.Unmount(dir, syscall.MNT_DETACH)
	l := unlocked(t, dir)
	fill(t, l, 0, 10)
	ballast := filepath.Join(dir, "ballast")
	f, err := os.Create(ballast)
	if err != nil {
		t.Fatal(err)
	}
	for {
		if _, err := f.Write(make([]byte, 4096)); err != nil {
			break
		}
	}
	f.Close()
	n := 10
	for ; n < 100; n++ { // fills the last page, then fails
		if err := l.AppendDurable(t.Context(), entry(n)); err != nil {
			if !errors.Is(err, ErrStorage) {
				t.Fatal(err)
			}
			break
		}
	}
	if n == 100 {
		t.Fatal("the disk did not fill up")
	}
	for n++; ; n++ {
		if err := l.Append(entry(n)); err != nil {
			if !errors.Is(err, ErrStorage) {
				t.Fatal(err)
			}
			break
		}
	}
	if s := l.Stats(); s.Failing == nil || s.Failures == 0 || s.Refused == 0 || s.Pending < maxPending-2*maxEntry {
		t.Errorf("stats %+v", s)
	}
	// 4 MiB will not fit into this file system: give it more.
	if err := syscall.Mount("tmpfs", dir, "tmpfs", syscall.MS_REMOUNT, "size=64m"); err != nil {
		t.Fatal(err)
	}
	if err := l.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if r := verify(t, dir, nil); r.Entries != uint64(n) {
		t.Errorf("%d entries, want %d", r.Entries, n)
	}
}

// What AppendDurable has acknowledged survives kill -9.
func TestKill(t *testing.T) {
	const marker = "KMSD_AUDIT_TEST_DIR"
	if dir := os.Getenv(marker); dir != "" {
		l := unlocked(t, dir)
		for i := 0; ; i++ {
			for range 20 {
				l.Append(entry(-1))
			}
			if err := l.AppendDurable(t.Context(), entry(i)); err != nil {
				t.Fatal(err)
			}
			fmt.Printf("durable %d\n", i)
		}
	}
	rounds := 5
	if testing.Short() {
		rounds = 2
	}
	dir := t.TempDir()
	total := uint64(0)
	for round := range rounds {
		c := exec.Command(os.Args[0], "-test.run=^TestKill$")
		c.Env = append(os.Environ(), marker+"="+dir)
		var out bytes.Buffer
		c.Stdout = &out
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(150+40*round) * time.Millisecond)
		c.Process.Kill()
		c.Wait()
		lines := strings.Count(out.String(), "durable")
		l := open(t, dir)
		l.Close()
		r := verify(t, dir, nil)
		if r.Entries < total+uint64(21*lines) {
			t.Fatalf("round %d: %d entries, at least %d were acknowledged", round, r.Entries, total+uint64(21*lines))
		}
		total = r.Entries
	}
	if total == 0 {
		t.Fatal("nothing was written")
	}
}

// A log of every format that was ever released can be verified and read for ever.
func TestGolden(t *testing.T) {
	dir := filepath.Join("testdata", "log-v1")
	if *update {
		os.RemoveAll(dir)
		for i := range 2 {
			l := unlocked(t, dir)
			fill(t, l, 3*i, 3*i+3)
			head := fmt.Sprintf("%d %x\n", l.Head().Size, l.Head().Root)
			l.Close()
			if err := os.WriteFile(filepath.Join(dir, "head.txt"), []byte(head), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	text, err := os.ReadFile(filepath.Join(dir, "head.txt"))
	if err != nil {
		t.Fatal(err)
	}
	var size uint64
	var root string
	if _, err := fmt.Sscan(string(text), &size, &root); err != nil {
		t.Fatal(err)
	}
	b, err := hex.DecodeString(root)
	if err != nil {
		t.Fatal(err)
	}
	r := verify(t, dir, &Head{Size: size, Root: Hash(b)})
	if r.Entries != 6 || r.Segments != 2 {
		t.Errorf("%+v", r)
	}
	entries, next, err := Tail(dir, seed, 0, 100)
	if err != nil || len(entries) != 6 || next != 8 {
		t.Fatalf("%v %d %v", entries, next, err)
	}
	for i, e := range entries {
		want := *entry(i)
		want.Number = e.Number
		if e != want {
			t.Errorf("entry %d: %+v", i, e)
		}
	}
}

func FuzzSegment(f *testing.F) {
	for i := 1; i <= 2; i++ {
		b, err := os.ReadFile(filepath.Join("testdata", "log-v1", segmentName(uint32(i))))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	private, err := auditorKey(seed)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := newSegmentReader(bytes.NewReader(b))
		if err != nil {
			return
		}
		s, err := r.header.session(private)
		for {
			if _, e := r.next(); e != nil {
				return
			}
			if r.offset > int64(len(b)) {
				t.Fatal("read past the end")
			}
			if err == nil {
				s.open(nil, r.body)
			}
		}
	})
}

func FuzzEntry(f *testing.F) {
	f.Add(appendEntry(nil, entry(1), 5))
	f.Fuzz(func(t *testing.T, b []byte) {
		e, tag, err := parseEntry(b)
		if err != nil {
			return
		}
		again, tag2, err := parseEntry(appendEntry(nil, &e, tag))
		again.Time, e.Time = time.Time{}, time.Time{}
		if err != nil || tag2 != tag || again != e && len(e.Detail) < 400 && len(e.Op) <= maxOp && len(e.Key) <= maxKey &&
			len(e.Principal) <= maxPrincipal && len(e.Via) <= maxVia && len(e.Client) <= maxClient && len(e.Trace) <= maxTrace && len(e.Code) <= maxCode && len(e.DetailID) <= maxDetailID {
			t.Fatalf("%+v became %+v (%v)", e, again, err)
		}
	})
}

// BenchmarkAppend is the cost to the caller; with the writer's share it stays under 0.6 us of CPU.
func BenchmarkAppend(b *testing.B) {
	l, err := Open(Config{Dir: b.TempDir()})
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	if err := l.Unlock(seed); err != nil {
		b.Fatal(err)
	}
	e := entry(1)
	b.ReportAllocs()
	for b.Loop() {
		for l.Append(e) != nil {
			time.Sleep(time.Millisecond)
		}
	}
}
