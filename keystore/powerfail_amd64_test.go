package keystore

import (
	"bufio"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// disk is what a crash leaves on it.
type disk struct {
	names map[string]int
	files map[int][]byte
}

func (d *disk) write(inode int, off int64, data []byte) {
	f := d.files[inode]
	if need := int(off) + len(data); need > len(f) {
		f = append(f, make([]byte, need-len(f))...)
	}
	copy(f[off:], data)
	d.files[inode] = f
}

// crashImage returns the disk after a power failure just before ops[at]. What was synced is there. Of what was not, whole writes are
// there or not, or some of their sectors are; names changed as far as some point, since directories are journalled. If syncs are
// ignored, everything but the last 12 operations is taken to be there.
func crashImage(base disk, ops []diskOp, at int, ignored bool, rnd *rand.Rand) disk {
	durable := map[int]int{} // by inode: operations before this one are on the disk
	for i, op := range ops[:at] {
		if op.what == "sync" || op.what == "syncdir" {
			durable[op.inode] = i
		}
	}
	limit := func(inode int) int {
		if ignored {
			return max(0, at-12)
		}
		return durable[inode]
	}
	d := disk{names: map[string]int{}, files: map[int][]byte{}}
	for name, inode := range base.names {
		d.names[name] = inode
		d.files[inode] = append([]byte(nil), base.files[inode]...)
	}
	namesUpTo := limit(dirInode)
	if rest := at - namesUpTo; rest > 0 {
		namesUpTo += rnd.IntN(rest + 1)
	}
	const sector = 512
	for i, op := range ops[:at] {
		switch op.what {
		case "write":
			if i < limit(op.inode) {
				d.write(op.inode, op.off, op.data)
				continue
			}
			switch rnd.IntN(3) {
			case 0:
				d.write(op.inode, op.off, op.data)
			case 1:
				for s := 0; s < len(op.data); s += sector {
					if rnd.IntN(2) == 0 {
						d.write(op.inode, op.off+int64(s), op.data[s:min(s+sector, len(op.data))])
					}
				}
			}
		case "truncate":
			f := d.files[op.inode]
			if int(op.off) > len(f) {
				d.files[op.inode] = append(f, make([]byte, int(op.off)-len(f))...)
			} else {
				d.files[op.inode] = f[:op.off]
			}
		case "create":
			if i < namesUpTo {
				d.names[op.name] = op.inode
			}
		case "rename":
			if i < namesUpTo {
				if inode, ok := d.names[op.name]; ok {
					d.names[op.to] = inode
					delete(d.names, op.name)
				}
			}
		case "unlink":
			if i < namesUpTo {
				delete(d.names, op.name)
			}
		}
	}
	return d
}

func TestPowerFailureLosesNothingAcknowledged(t *testing.T) {
	t.Parallel()
	s, c := boundStore(t)
	dir := s.config.Dir
	// Nearly as much as the file holds at first, so that it has to grow while it is recorded.
	mustApply(t, s, guardedKey("app0", fixedGuard()))
	for i, used := 0, int64(0); used < minDatabase-150<<10; i++ {
		mustApply(t, s, testKey(fmt.Sprint("fill/k", i), keyspec.Ed25519, 32))
		if err := s.db.View(func(tx *bolt.Tx) error { used = tx.Size(); return nil }); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	base := disk{names: map[string]int{}, files: map[int][]byte{}}
	names := map[string]int{}
	for i, name := range []string{headerFile, databaseFile} {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		base.names[name], names[name], base.files[i] = i, i, b
	}
	ops := record(t, dir, names, roleWriter, dir, fmt.Sprint(scaled(150, 50)), fmt.Sprint(c.now()))
	var acks []string
	count := map[string]int{}
	first := 0
	for i, op := range ops {
		count[op.what]++
		if op.what == "ack" {
			if first == 0 {
				first = i
			}
			acks = append(acks, op.name)
		}
	}
	t.Logf("recorded %v", count)
	for _, what := range []string{"write", "sync", "syncdir", "create", "rename", "ack", "truncate"} {
		if count[what] == 0 {
			t.Fatalf("the recorder saw no %s", what)
		}
	}
	ackFile := filepath.Join(t.TempDir(), "acks")
	if err := os.WriteFile(ackFile, []byte(strings.Join(acks, "\n")+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	e := &examiner{t: t, acks: ackFile}
	defer e.stop()
	rnd := rand.New(rand.NewPCG(1, 2))
	for _, ignored := range []bool{false, true} {
		images := scaled(600, 40)
		if ignored {
			images = scaled(250, 20)
		}
		results := map[string]int{}
		for i := range images {
			at := first + rnd.IntN(len(ops)-first)
			acked := 0
			for _, op := range ops[:at] {
				if op.what == "ack" {
					acked++
				}
			}
			image := crashImage(base, ops, at, ignored, rnd)
			result := e.examine(image, acked, lastCount(acks[:acked], c.now()))
			kind, _, _ := strings.Cut(result, ":")
			results[kind]++
			if strings.Contains(result, errWrongAnswer.Error()) || !ignored && kind != "ok" {
				t.Errorf("image %d, power failed before operation %d, syncs ignored: %v: %s", i, at, ignored, result)
			}
		}
		t.Logf("syncs ignored: %v: %v", ignored, results)
		if ignored && results["ok"] == images {
			t.Error("ignoring syncs never did any harm: the images are not what they should be")
		}
	}
}

// examiner is a process with little memory that opens images. One that dies, or takes longer than 5 seconds, fails the test.
type examiner struct {
	t    *testing.T
	acks string
	in   io.WriteCloser
	out  chan string
	kill func()
}

func (e *examiner) start() {
	cmd := runAs(roleExaminer)
	var err error
	if e.in, err = cmd.StdinPipe(); err != nil {
		e.t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		e.t.Fatal(err)
	}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		e.t.Fatal(err)
	}
	e.out = make(chan string)
	go func(lines chan<- string) {
		scanner := bufio.NewScanner(out)
		for scanner.Scan() {
			lines <- scanner.Text()
		}
		cmd.Wait()
		if stderr.Len() > 0 {
			lines <- "died: " + stderr.String()[:min(stderr.Len(), 1000)]
		}
		close(lines)
	}(e.out)
	e.kill = func() { cmd.Process.Kill() }
}

func (e *examiner) stop() {
	if e.in != nil {
		e.in.Close()
		for range e.out {
		}
		e.in = nil
	}
}

func (e *examiner) examine(d disk, acked int, count uint64) string {
	dir, err := os.MkdirTemp(e.t.TempDir(), "image")
	if err != nil {
		e.t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	for name, inode := range d.names {
		if err := os.WriteFile(filepath.Join(dir, name), d.files[inode], 0o600); err != nil {
			e.t.Fatal(err)
		}
	}
	if e.in == nil {
		e.start()
	}
	fmt.Fprintln(e.in, dir, e.acks, acked, count)
	select {
	case result, ok := <-e.out:
		if !ok || strings.HasPrefix(result, "died") {
			e.t.Fatalf("the examiner died: %s", result)
		}
		return result
	case <-time.After(5 * time.Second):
		e.kill()
		e.t.Fatal("an image took more than 5 seconds")
	}
	return ""
}
