package keystore

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Limits of documents.
const (
	MaxDocument     = 60 << 10 // bytes of data in one document
	MaxDocumentKind = 64       // bytes
	MaxDocumentName = 255      // bytes

	maxDocumentBytes = 16 << 20 // of data in one commit
	documentPage     = 4 << 20  // bytes of data beyond which a page ends
)

// Document is a small record that is not a key: what the caller has to remember together with its keys and as safely. The store
// keeps it and gives it no meaning. Kinds and names are no more visible in the files than those of keys.
//
// Invariant: a document is in the key table like a key, so one that was altered, exchanged, put back or taken away is ErrDamaged.
type Document struct {
	Kind string // what it is, 1 to MaxDocumentKind bytes without a zero byte
	Name string // tells it from others of its kind, 1 to MaxDocumentName bytes
	Data []byte // at most MaxDocument bytes
	// Revision grows with every commit that changes the document, also when it was deleted in between. In a DocumentChange it is the
	// revision the change is based on; zero creates.
	Revision uint64
}

// DocumentChange is what a commit does to one document.
type DocumentChange struct {
	Document      // as it shall be
	Delete   bool // drops the data key, so that the data is unreadable from then on; Data is ignored
	// Bump has the rollback counter advance, as when a key is revoked. It is for what an older copy of the store must not undo: a
	// revocation, the end of a trust.
	Bump bool
}

// documentKindID is what the ids of all documents of a kind begin with.
func documentKindID(index []byte, kind string) (id [8]byte) {
	m := mac(index, []byte("document kind\x00"), []byte(kind))
	copy(id[:], m[:])
	return id
}

// documentID is the place of a document. The documents of a kind are one contiguous range, as the keys of a namespace are.
func (s *Store) documentID(kind, name string) (id recordID) {
	index := s.secrets.index.Bytes()
	prefix := documentKindID(index, kind)
	copy(id[:], prefix[:])
	m := mac(index, []byte("document\x00"), []byte(kind), []byte{0}, []byte(name))
	copy(id[8:], m[:])
	return id
}

const documentFormat = 1

func (d *Document) encode() []byte {
	e := &encoder{b: make([]byte, 0, 7+len(d.Kind)+len(d.Name)+len(d.Data))}
	e.u8(documentFormat)
	e.str8(d.Kind)
	e.str8(d.Name)
	e.bytes32(d.Data)
	return e.b
}

func decodeDocument(b []byte) (Document, error) {
	d := &decoder{b: b}
	if f := d.u8(); d.err == nil && f != documentFormat {
		return Document{}, fmt.Errorf("%w: document of format %d", ErrNewer, f)
	}
	doc := Document{Kind: d.str8(), Name: d.str8()}
	doc.Data = slices.Clone(d.bytes32())
	if err := d.end(); err != nil {
		return Document{}, fmt.Errorf("%w: document %w", ErrDamaged, err)
	}
	return doc, nil
}

func (c *DocumentChange) check() error {
	if c.Kind == "" || len(c.Kind) > MaxDocumentKind || strings.Contains(c.Kind, "\x00") || c.Name == "" || len(c.Name) > MaxDocumentName {
		return fmt.Errorf("%w: kind or name of a document", ErrInvalid)
	}
	if len(c.Data) > MaxDocument {
		return fmt.Errorf("%w: %s", ErrTooLarge, c.label())
	}
	if c.Delete && c.Revision == 0 {
		return fmt.Errorf("%w: %s is to be deleted, but no revision of it is named", ErrInvalid, c.label())
	}
	return nil
}

func (d *Document) label() string { return "document " + d.Kind + "/" + d.Name }

// prepareDocument encrypts a document as it shall be. Each of its revisions has a data key of its own, so that an older one is
// beyond reach as soon as the epoch is rotated. Whether the change may follow what is there is looked at when it is committed.
func (s *Store) prepareDocument(p *preparedChange, c *DocumentChange) error {
	if err := c.check(); err != nil {
		return err
	}
	p.label, p.document, p.deleted, p.bump = c.label(), true, c.Delete, c.Bump
	p.meta, p.expected = s.documentID(c.Kind, c.Name).at(0), c.Revision
	x := entry{key: p.meta, flags: entryDocument, revision: c.Revision + 1}
	if c.Revision == 0 {
		// The revisions of a document that was deleted go on, so that nobody takes the new one for it.
		old, _, err := s.entryNow(p.meta)
		clear(old.dek[:])
		if err != nil {
			return err
		}
		p.tombstone = old.revision
		x.revision = old.revision + 1
	}
	if c.Delete {
		// Invariant: a deleted document has no data key.
		x.flags |= entryDestroyed
		p.entries = append(p.entries, x)
		p.puts = append(p.puts, put{bucket: bucketDocument, key: p.meta[:]})
		return nil
	}
	random(x.dek[:])
	context := recordContext{store: s.storeID, kind: kindDocument, key: p.meta, revision: x.revision, generation: s.header.Load().generation}
	payload := c.encode()
	defer clear(payload)
	p.entries = append(p.entries, x)
	p.puts = append(p.puts, put{bucket: bucketDocument, key: p.meta[:], value: sealRecord(x.dek[:], context, payload)})
	return nil
}

// Document returns a document. It returns ErrNotFound if there is none, and ErrDamaged if there is one that cannot be read: with its
// revision, if that is known, so that another one can take its place.
func (s *Store) Document(kind, name string) (Document, error) {
	var d Document
	err := s.read(func(h *head) (err error) {
		d, err = s.document(h, s.documentID(kind, name).at(0))
		return err
	})
	if err != nil {
		return Document{Revision: d.Revision}, fmt.Errorf("document %s/%s: %w", kind, name, err)
	}
	return d, nil
}

func (s *Store) document(h *head, key recordKey) (Document, error) {
	x, found, blob, err := s.lookupRecord(h, key, bucketDocument)
	if err != nil {
		return Document{}, err
	}
	defer clear(x.dek[:])
	if !found || x.flags&entryDestroyed != 0 {
		return Document{}, ErrNotFound
	}
	d, err := s.openDocument(&x, blob)
	d.Revision = x.revision
	return d, err
}

func (s *Store) openDocument(x *entry, blob []byte) (Document, error) {
	if x.flags&^entryKnown != 0 {
		return Document{}, fmt.Errorf("%w: entry flags %x", ErrNewer, x.flags)
	}
	if blob == nil {
		return Document{}, fmt.Errorf("%w: a document is missing", ErrDamaged)
	}
	payload, err := openRecord(x.dek[:], recordContext{store: s.storeID, kind: kindDocument, key: x.key, revision: x.revision}, blob)
	if err != nil {
		return Document{}, err
	}
	defer clear(payload)
	d, err := decodeDocument(payload)
	d.Revision = x.revision
	return d, err
}

// Documents returns the documents of a kind, in an order that has no meaning but does not change, at most limit of them. after is nil
// for the first page and what the previous call returned for the following ones; a nil cursor in the result says that there are no
// more. A page may be shorter than limit, even empty, and yet not be the last.
//
// Documents that cannot be read are left out, logged and counted in Info. The error is then ErrDamaged or ErrNewer, and page and cursor
// are valid besides: who goes by what is not in the list, such as revocations, must not go on, others may.
func (s *Store) Documents(kind string, after []byte, limit int) ([]Document, []byte, error) {
	var cursor recordKey
	if after != nil && len(after) != len(cursor) || limit <= 0 {
		return nil, nil, fmt.Errorf("%w: cursor or limit of a page", ErrInvalid)
	}
	copy(cursor[:], after)
	var list []Document
	var next []byte
	err := s.read(func(h *head) (err error) {
		list, next, err = s.documents(h, kind, cursor, limit)
		return err
	})
	if err != nil {
		err = fmt.Errorf("documents of kind %s: %w", kind, err)
	}
	return list, next, err
}

// documents returns a page and, if a document or a part of the table could not be read, the reason as well.
func (s *Store) documents(h *head, kind string, cursor recordKey, limit int) (list []Document, next []byte, failure error) {
	within := documentKindID(s.secrets.index.Bytes(), kind)
	if bytes.Compare(cursor[:], within[:]) < 0 {
		cursor = recordKey{}
		copy(cursor[:], within[:])
	}
	size := 0
	s.ascend(h, cursor, func(entries []entry) bool {
		for i := range entries {
			x := &entries[i]
			if !bytes.HasPrefix(x.key[:], within[:]) {
				return false
			}
			if x.flags&entryDocument == 0 || x.flags&entryDestroyed != 0 {
				continue
			}
			if len(list) == limit || size > documentPage {
				next = slices.Clone(x.key[:])
				return false
			}
			d, err := s.documentAt(x)
			switch {
			case errors.Is(err, ErrNotFound): // deleted since h
			case err != nil:
				if !errors.Is(err, ErrDamaged) { // that is counted already
					s.damaged.Add(1)
				}
				s.config.log().Warn("a document cannot be read", "error", err)
				failure = err
			case d.Kind == kind: // two kinds may share a range
				list = append(list, d)
				size += len(d.Data)
			}
		}
		return true
	}, func(first recordKey, err error) {
		if bytes.Compare(first[:len(within)], within[:]) <= 0 { // a leaf behind the range may be reached, too
			failure = err
		}
	})
	return list, next, failure
}

// documentAt loads the document of an entry, as it is now if a commit replaced it since the entry was read.
func (s *Store) documentAt(x *entry) (d Document, err error) {
	blob, err := s.fetch(bucketDocument, x.key[:])
	if err == nil {
		d, err = s.openDocument(x, blob)
	}
	if errors.Is(err, ErrDamaged) {
		err = s.readHeld(func(h *head) (err error) {
			d, err = s.document(h, x.key)
			return err
		})
	}
	return d, err
}
