package keystore

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/keystore/secmem"
)

// Damage is one finding of Verify.
type Damage struct {
	Ref  keyspec.Ref // empty when the name cannot be known any more
	Text string
}

// Report is the outcome of Verify.
type Report struct {
	Keys, Versions, Leaves uint64
	Documents              uint64
	Orphans                uint64 // records that the key table does not know; they do no harm
	Unopened               uint64 // versions whose material could be looked at from outside only, since their namespace is closed
	Damaged                []Damage
}

// verifyLeaves is how many leaves Verify looks at before it lets a Lock or a change of the header pass.
const verifyLeaves = 8

// maxDamages bounds Report.Damaged.
const maxDamages = 10_000

// Verify checks the pages of the database and then decrypts every record in it. Reads go on meanwhile, and commits once the pages are
// checked. Of the base keys of a closed namespace it checks all but what is inside of their material. Damage is in the report; an error
// means that the verification could not be carried out. p may be nil.
func (s *Store) Verify(ctx context.Context, p *Progress) (Report, error) {
	if p == nil {
		p = &Progress{}
	}
	var report Report
	err := s.exclusively(func() error {
		f, err := os.OpenFile(filepath.Join(s.config.Dir, databaseFile), os.O_RDONLY|unix.O_NOFOLLOW, 0)
		if err != nil {
			return fmt.Errorf("%w: %w", ErrStorage, err)
		}
		defer f.Close()
		if err := checkPages(f, true); err != nil {
			if !errors.Is(err, ErrDamaged) {
				return err
			}
			report.add(keyspec.Ref{}, err.Error())
		}
		return nil
	})
	if err != nil {
		return Report{}, err
	}
	return report, s.verifyRecords(ctx, p, &report)
}

func (r *Report) add(ref keyspec.Ref, text string) {
	if len(r.Damaged) < maxDamages {
		r.Damaged = append(r.Damaged, Damage{ref, text})
	}
}

// verifyRecords walks the key table.
func (s *Store) verifyRecords(ctx context.Context, p *Progress, report *Report) error {
	first := s.snapshot.Load()
	if first == nil {
		return ErrLocked
	}
	var expect recordCounts
	v := &verification{s: s}
	for cursor := (&recordKey{}); cursor != nil; {
		if err := ctx.Err(); err != nil {
			return err
		}
		next, err := v.some(*cursor, p)
		if err != nil {
			return err
		}
		report.Keys += v.part.Keys
		report.Versions += v.part.Versions
		report.Leaves += v.part.Leaves
		report.Documents += v.part.Documents
		report.Unopened += v.part.Unopened
		for _, d := range v.part.Damaged {
			report.add(d.Ref, d.Text)
		}
		expect.add(v.counts)
		cursor = next
	}
	if _, err := s.Outbox(1 << 20); err != nil {
		if !errors.Is(err, ErrDamaged) {
			return err
		}
		report.add(keyspec.Ref{}, err.Error())
	}
	found, err := s.countRecords(ctx)
	if err != nil {
		if !errors.Is(err, ErrDamaged) {
			return err
		}
		report.add(keyspec.Ref{}, err.Error())
	}
	// The totals mean something only if nothing was changed meanwhile.
	if s.snapshot.Load() == first && len(report.Damaged) == 0 {
		if report.Keys != first.keys || report.Documents != first.documents || expect.entries != first.entries {
			report.add(keyspec.Ref{}, "the key table does not have the number of records that the head names")
		}
		report.Orphans = found.beyond(expect)
	}
	return nil
}

// recordCounts are numbers of records by bucket.
type recordCounts struct{ entries, meta, material, public, document uint64 }

func (c *recordCounts) add(o recordCounts) {
	c.entries += o.entries
	c.meta += o.meta
	c.material += o.material
	c.public += o.public
	c.document += o.document
}

func (c recordCounts) beyond(expect recordCounts) (n uint64) {
	for _, d := range []uint64{c.meta - expect.meta, c.material - expect.material, c.public - expect.public, c.document - expect.document} {
		n += uint64(max(int64(d), 0))
	}
	return n
}

// countRecords counts what is in the buckets, in short transactions.
func (s *Store) countRecords(ctx context.Context) (c recordCounts, err error) {
	for _, b := range []struct {
		name []byte
		n    *uint64
	}{{bucketMeta, &c.meta}, {bucketMaterial, &c.material}, {bucketPublic, &c.public}, {bucketDocument, &c.document}} {
		var from []byte
		for more := true; more; {
			if err := ctx.Err(); err != nil {
				return c, err
			}
			s.mu.RLock()
			if s.closed {
				s.mu.RUnlock()
				return c, ErrClosed
			}
			err := guard(func() error {
				return s.db.View(func(tx *bolt.Tx) error {
					cursor := tx.Bucket(b.name).Cursor()
					k, _ := cursor.Seek(from)
					for range 10_000 {
						if k == nil {
							more = false
							return nil
						}
						*b.n++
						k, _ = cursor.Next()
					}
					from = append(from[:0], k...)
					more = k != nil
					return nil
				})
			})
			s.mu.RUnlock()
			if err != nil {
				return c, err
			}
		}
	}
	return c, nil
}

// verification is one walk over the key table.
type verification struct {
	s      *Store
	part   Report       // of the last step
	counts recordCounts // of the last step

	key *metadata // the key whose versions come next
	id  recordID
	x   entry // its entry; the data key is wiped between steps
}

// some verifies the records of a few leaves from cursor on and returns where to go on, nil at the end.
func (v *verification) some(cursor recordKey, p *Progress) (next *recordKey, err error) {
	s := v.s
	s.mu.RLock()
	defer s.mu.RUnlock()
	for {
		if s.closed {
			return nil, ErrClosed
		}
		if s.secrets == nil {
			return nil, ErrLocked
		}
		h := s.snapshot.Load()
		p.Total.Store(h.entries)
		v.part, v.counts, v.key = Report{}, recordCounts{}, nil
		next = nil
		s.leaves(h, cursor, func(c child) bool {
			if v.part.Leaves == verifyLeaves {
				next = &c.first
				return false
			}
			v.part.Leaves++
			v.leaf(h, c)
			return true
		}, func(_ recordKey, err error) { v.part.add(keyspec.Ref{}, err.Error()) })
		clear(v.x.dek[:])
		if len(v.part.Damaged) > 0 {
			// It may only look like damage because a commit happened.
			s.commitMu.RLock()
			now := s.snapshot.Load()
			s.commitMu.RUnlock()
			if now != h {
				continue
			}
		}
		p.Done.Add(v.counts.entries)
		return next, nil
	}
}

func (v *verification) leaf(h *head, c child) {
	// Not from the cache: what is on the disk is to be verified.
	blob, err := v.s.loadNode(c.nodeRef)
	if err != nil {
		v.part.add(keyspec.Ref{}, err.Error())
		return
	}
	var entries []entry
	err = v.s.withLeaf(c.nodeRef, blob, func(plain []byte) (err error) {
		entries, err = decodeEntries(plain)
		return err
	})
	if err != nil {
		v.part.add(keyspec.Ref{}, err.Error())
		return
	}
	defer (&node{entries: entries}).wipe()
	v.counts.entries += uint64(len(entries))
	for i := range entries {
		x := &entries[i]
		switch {
		case x.flags&entryDocument != 0:
			v.document(x)
		case x.key.version() == 0:
			v.part.Keys++
			v.counts.meta++
			v.metadata(h, x)
		default:
			v.part.Versions++
			v.version(h, x)
		}
	}
}

func (v *verification) document(x *entry) {
	if x.flags&entryDestroyed != 0 {
		return
	}
	v.part.Documents++
	v.counts.document++
	blob, err := v.s.fetch(bucketDocument, x.key[:])
	var d Document
	if err == nil {
		d, err = v.s.openDocument(x, blob)
	}
	switch {
	case err != nil:
		v.part.add(keyspec.Ref{}, "document: "+err.Error())
	case v.s.documentID(d.Kind, d.Name) != x.key.id():
		v.part.add(keyspec.Ref{}, d.label()+" is in the place of another")
	}
}

// load makes the key with this id the current one.
func (v *verification) load(h *head, id recordID) error {
	clear(v.x.dek[:])
	v.id = id
	var err error
	v.key, v.x, err = v.s.metadata(h, id)
	return err
}

func (v *verification) metadata(h *head, x *entry) {
	if err := v.load(h, x.key.id()); err != nil {
		v.part.add(keyspec.Ref{}, "metadata: "+err.Error())
		return
	}
	k := v.key
	if v.s.recordID(k.Name) != v.id {
		v.part.add(keyspec.Ref{Name: k.Name}, "is in the place of another key")
	}
	if k.wrapping != 0 {
		v.counts.material++
		if err := v.wrapping(); err != nil {
			v.part.add(keyspec.Ref{Name: k.Name}, "namespace wrapping key: "+err.Error())
		}
	}
	for i := range k.Versions {
		n := &k.Versions[i]
		ref := keyspec.Ref{Name: k.Name, Version: n.Number}
		v.counts.public++
		public, err := v.s.public(&v.x, n)
		if err != nil {
			v.part.add(ref, "public part: "+err.Error())
		} else {
			v.aliases(ref, n, &public)
		}
		y, found, err := v.s.lookup(h, v.id.at(n.Number))
		clear(y.dek[:])
		if err == nil && (!found || n.State == keyspec.Destroyed && y.flags&entryDestroyed == 0) {
			v.part.add(ref, "the key table does not have it as the metadata say")
		}
	}
}

func (v *verification) version(h *head, x *entry) {
	if x.key.id() != v.id || v.key == nil {
		if err := v.load(h, x.key.id()); err != nil {
			return // reported with the metadata
		}
	}
	ref := keyspec.Ref{Name: v.key.Name, Version: x.key.version()}
	if x.flags&entryDestroyed != 0 {
		return
	}
	if foreign := x.flags&entryForeign != 0; foreign || v.key.Origin == keyspec.Foreign {
		if !foreign || v.key.Origin != keyspec.Foreign {
			v.part.add(ref, "the key table and the metadata do not agree whose it is")
		}
		return
	}
	v.counts.material++
	var err error
	secmem.Do(func() {
		var m []byte
		m, err = v.s.material(h, ref, nil)
		clear(m)
	})
	if errors.Is(err, ErrNamespaceClosed) {
		v.part.Unopened++
		err = v.sealed(x)
	}
	if err != nil {
		v.part.add(ref, "material: "+err.Error())
	}
}

// aliases checks that nobody took the aliases of a version away. Whether it is found by them, or another that shares them, is another
// matter.
func (v *verification) aliases(ref keyspec.Ref, n *Version, public *Public) {
	if n.State == keyspec.Destroyed {
		return
	}
	for _, place := range slices.Concat(n.aliases, n.thumbprints, v.s.publicPlaces(public)) {
		alias := v.s.aliasAt(place, v.id.at(n.Number))
		if b, err := v.s.fetch(bucketAlias, place[:]); err != nil || !alias.sharesAlias(b) {
			v.part.add(ref, "an alias is missing")
		}
	}
}

// wrapping checks the record of a namespace wrapping key, whether the namespace is open or not.
func (v *verification) wrapping() error {
	payload, err := v.s.openWrapping(v.key, &v.x)
	if err != nil {
		return err
	}
	defer clear(payload)
	if v.x.flags&entryWrapped != 0 {
		_, err = decodeWrappedKey(payload)
	} else if len(payload) != keySize {
		err = fmt.Errorf("%w: it has %d bytes", ErrDamaged, len(payload))
	}
	return err
}

// sealed checks what can be seen of a version's material without opening it.
func (v *verification) sealed(x *entry) error {
	blob, err := v.s.fetch(bucketMaterial, x.key[:])
	if err != nil {
		return err
	}
	if blob == nil {
		return fmt.Errorf("%w: a record is missing", ErrDamaged)
	}
	_, _, err = splitRevision(blob, kindMaterial, x.revision)
	return err
}
