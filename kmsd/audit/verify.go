package audit

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
)

// Damage says where the log is not what was written.
type Damage struct {
	File   string // name of the segment in the directory of the log
	Offset int64  // bytes
	Entry  uint64 // number of the first entry that is wrong or missing
	Reason string
}

func (d *Damage) Error() string {
	return fmt.Sprintf("entry %d (%s, offset %d): %s", d.Entry, d.File, d.Offset, d.Reason)
}

// Is reports whether target is ErrDamaged.
func (d *Damage) Is(target error) bool { return target == ErrDamaged }

// Report is what Verify found.
type Report struct {
	Head     Head
	Segments int
	Entries  uint64 // without the headers of segments, which count as leaves
}

// Verify checks the log in dir without any key. The error is a *Damage that names the first bad entry. If want is not
// nil, the log must also be a continuation of the tree of that head: entries cut off or rewritten since it was taken are
// found then. The report describes what is intact before the damage.
func Verify(dir string, want *Head) (Report, error) {
	segments, err := listSegments(dir)
	if err != nil {
		return Report{}, err
	}
	v := verifier{want: want, report: Report{Head: (&tree{}).head()}}
	if want != nil && want.Size == 0 {
		v.want = nil
		if (&tree{}).head() != *want {
			return Report{}, &Damage{Reason: "the given head of size 0 has a wrong root"}
		}
	}
	file := ""
	for i, n := range segments {
		file = segmentName(n)
		if n != uint32(i+1) {
			return v.report, &Damage{File: segmentName(uint32(i + 1)), Entry: v.tree.size, Reason: "segment is missing"}
		}
		err := v.segment(dir, n)
		v.report.Head = v.tree.head()
		if err != nil {
			return v.report, err
		}
	}
	if v.want != nil {
		return v.report, &Damage{
			File: file, Entry: v.tree.size,
			Reason: fmt.Sprintf("the log has been cut off: %d leaves of the %d in the given head", v.tree.size, v.want.Size),
		}
	}
	return v.report, nil
}

type verifier struct {
	tree   tree
	want   *Head // until it was reached
	report Report
}

func (v *verifier) segment(dir string, n uint32) error {
	f, err := os.Open(filepath.Join(dir, segmentName(n)))
	if err != nil {
		return err
	}
	defer f.Close()
	damage := func(offset int64, reason string) error {
		return &Damage{File: segmentName(n), Offset: offset, Entry: v.tree.size, Reason: reason}
	}
	rewritten := func(offset int64) error {
		return &Damage{File: segmentName(n), Offset: offset, Entry: v.tree.size - 1, Reason: fmt.Sprintf(
			"this leaf or one before is not among the %d of the given head", v.want.Size)}
	}
	r, err := newSegmentReader(bufio.NewReaderSize(f, 256<<10))
	if err != nil {
		if isIO(err) {
			return err
		}
		return damage(0, err.Error())
	}
	switch {
	case r.header.segment != n:
		return damage(0, fmt.Sprintf("header is of segment %d", r.header.segment))
	case r.header.first != v.tree.size:
		return damage(0, fmt.Sprintf("segment goes on after %d leaves, but %d are there", r.header.first, v.tree.size))
	case !slices.Equal(r.header.edge, v.tree.edge):
		return damage(0, "the segments before are not those that were written")
	}
	v.report.Segments++
	if !v.add(r.header.leaf()) {
		return rewritten(0)
	}
	for {
		at := r.offset
		leaf, err := r.next()
		switch {
		case err == io.EOF:
			return nil
		case isIO(err):
			return err
		case err != nil:
			return damage(at, err.Error())
		}
		if !v.add(leaf) {
			return rewritten(at)
		}
		v.report.Entries++
	}
}

// add appends a leaf and reports false when the wanted head is reached and is another.
func (v *verifier) add(leaf Hash) bool {
	v.tree.add(leaf)
	if v.want != nil && v.tree.size == v.want.Size {
		if v.tree.head() != *v.want {
			return false
		}
		v.want = nil
	}
	return true
}

// isIO reports whether err is a failure to read and says nothing about what was written.
func isIO(err error) bool {
	var p *os.PathError
	return errors.As(err, &p)
}

// listSegments returns the numbers of the segments in dir in order.
func listSegments(dir string) ([]uint32, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var numbers []uint32
	for _, e := range entries {
		if n, ok := segmentNumber(e.Name()); ok {
			numbers = append(numbers, n)
		}
	}
	slices.Sort(numbers)
	return numbers, nil
}
