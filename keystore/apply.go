package keystore

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

const (
	maxAudit      = 64 << 10
	maxRequestKey = 4 << 10
	maxChanges    = 10_000
)

// prepared is a commit with everything encrypted, ready to be put into a transaction.
type prepared struct {
	changes    []preparedChange
	audit      []byte
	hasRequest bool
	request    [32]byte
	answer     recordKey

	// wrapping has the namespace wrapping keys that this commit makes: for the base keys that are in it too.
	wrapping map[string][]byte
}

type preparedChange struct {
	commit   *prepared
	label    string // what errors say it is about
	name     keyspec.Name
	meta     recordKey
	expected uint64
	entries  []entry
	puts     []put
	erased   int
	bump     bool

	// Of a document, which has neither name nor guard.
	document  bool
	deleted   bool
	tombstone uint64 // revision of the one that was there before and was deleted, 0 for none

	// Of what was prepared for one state of the namespace wrapping keys and must not be committed in another.
	base   bool   // it has material of a base key
	guards uint64 // guardChanges when it was prepared

	establishes         bool // of a guard, where there was none
	guarded, unescrowed int  // how many more namespaces are
}

// bumps reports whether an older copy of the store would undo what must not be undone.
func (p *prepared) bumps() bool {
	return slices.ContainsFunc(p.changes, func(c preparedChange) bool { return c.bump })
}

func (p *prepared) wipe() {
	for _, key := range p.wrapping {
		clear(key)
	}
	for i := range p.changes {
		for j := range p.changes[i].entries {
			clear(p.changes[i].entries[j].dek[:])
		}
	}
}

// Apply carries out a commit: when it returns nil everything in it is durable, when it returns an error nothing was changed, unless
// the error is ErrStorage, when only reading the keys again will tell. The context is looked at before the commit begins; a commit
// that began is waited for.
//
// It returns ErrExists, ErrNotFound or ErrConflict when a key or document is not at the revision its change is based on, ErrInvalid when they
// are not well-formed, a *DuplicateError when the request key was used before, and ErrStorage when the disk is full or fails.
func (s *Store) Apply(ctx context.Context, c Commit) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := c.checkSize(); err != nil {
		return err
	}
	if err := c.checkGuards(); err != nil {
		return err
	}
	p, err := s.prepareAndCommit(c)
	for tries := 0; errors.Is(err, errStale) && tries < 8; tries++ {
		p, err = s.prepareAndCommit(c)
	}
	if dup := (*duplicate)(nil); errors.As(err, &dup) {
		return s.explain(dup)
	}
	if err != nil {
		return err
	}
	s.openGuarded(c)
	if p.bumps() {
		s.cover(ctx)
	}
	return nil
}

// errStale says that a commit was prepared with a namespace wrapping key that is not the right one any more, or for the place of a
// deleted document that another one had since. It has to be prepared again.
var errStale = fmt.Errorf("%w: again and again", ErrConflict)

func (c *Commit) checkSize() error {
	size := 0
	for i := range c.Documents {
		size += len(c.Documents[i].Data)
	}
	if len(c.Audit) > maxAudit || len(c.RequestKey) > maxRequestKey || len(c.Changes)+len(c.Documents) > maxChanges || size > maxDocumentBytes {
		return fmt.Errorf("%w: commit", ErrTooLarge)
	}
	return nil
}

func (s *Store) prepareAndCommit(c Commit) (*prepared, error) {
	p, err := s.prepare(c)
	if err != nil {
		return nil, err
	}
	defer p.wipe()
	if slices.ContainsFunc(p.changes, func(c preparedChange) bool { return c.establishes }) {
		return p, s.exclusively(func() error { return s.establish(p) })
	}
	return p, s.submit(&job{commit: p})
}

// explain finds the name for a duplicate.
func (s *Store) explain(dup *duplicate) error {
	var m *metadata
	err := s.read(func(h *head) error {
		got, x, err := s.metadata(h, dup.answer.id())
		clear(x.dek[:])
		m = got
		return err
	})
	if err != nil {
		return err
	}
	return &DuplicateError{keyspec.Ref{Name: m.Name, Version: dup.answer.version()}}
}

func (s *Store) prepare(c Commit) (*prepared, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.closed {
		return nil, ErrClosed
	}
	if s.secrets == nil {
		return nil, ErrLocked
	}
	p := &prepared{audit: c.Audit, changes: make([]preparedChange, len(c.Changes)+len(c.Documents))}
	if err := s.prepareChanges(p, &c); err != nil {
		p.wipe()
		return nil, err
	}
	if len(c.RequestKey) > 0 {
		if len(c.Changes) == 0 {
			return nil, fmt.Errorf("%w: a request key without a change", ErrInvalid)
		}
		p.hasRequest = true
		p.request = mac(s.secrets.index.Bytes(), []byte("request\x00"), c.RequestKey)
		p.answer = p.changes[0].meta.id().at(c.Changes[0].Key.Current)
	}
	return p, nil
}

// prepareChanges encrypts what a commit changes: module keys first, since base keys are bound to the wrapping key of their namespace,
// which may be made by the same commit.
func (s *Store) prepareChanges(p *prepared, c *Commit) error {
	seen := make(map[recordKey]bool, len(p.changes))
	add := func(i int, err error) error {
		to := &p.changes[i]
		if err == nil && seen[to.meta] {
			err = fmt.Errorf("%w: two changes of %s", ErrInvalid, to.label)
		}
		seen[to.meta] = true
		return err
	}
	for _, modules := range []bool{true, false} {
		for i := range c.Changes {
			if k := c.Changes[i].Key; (k != nil && k.Name.IsModule()) != modules {
				continue
			}
			p.changes[i].commit = p
			if err := add(i, s.prepareChange(&p.changes[i], &c.Changes[i])); err != nil {
				return err
			}
		}
	}
	for i := range c.Documents {
		at := len(c.Changes) + i
		if err := add(at, s.prepareDocument(&p.changes[at], &c.Documents[i])); err != nil {
			return err
		}
	}
	return nil
}

func (s *Store) prepareChange(p *preparedChange, c *Change) error {
	if c.Key == nil {
		return fmt.Errorf("%w: no key", ErrInvalid)
	}
	if err := c.Key.check(); err != nil {
		return err
	}
	return s.sealChange(p, c)
}

// sealChange compares the key with what it is now, encrypts what is new, and says what the commit has to write. It does not
// run in secmem.Do, where each of its many allocations would cost more than the encryption: buffers that held keys are
// wiped, freed ones are overwritten, and the callers' stacks are erased when they come to rest.
func (s *Store) sealChange(p *preparedChange, c *Change) error {
	next := metadata{Key: *c.Key}
	next.Versions = slices.Clone(c.Key.Versions)
	next.Revision++
	id := s.recordID(next.Name)
	p.guards = s.guardChanges.Load()
	p.base = len(c.Material) > 0 && !next.Name.IsModule()
	p.label, p.name, p.meta, p.expected = string(next.Name), next.Name, id.at(0), c.Key.Revision

	old := &metadata{}
	meta := entry{key: p.meta, revision: next.Revision}
	if p.expected == 0 {
		random(meta.dek[:])
	} else {
		got, x, err := s.metadataNow(id)
		if err != nil {
			return err
		}
		if got.Revision != p.expected {
			clear(x.dek[:])
			return fmt.Errorf("%w: %s", ErrConflict, next.Name)
		}
		old, meta.dek, meta.flags = got, x.dek, x.flags
		next.wrapping, next.escrow = old.wrapping, old.escrow
	}
	defer clear(meta.dek[:])

	if err := compareVersions(&next, old, c); err != nil {
		return err
	}
	context := recordContext{store: s.storeID, revision: next.Revision, generation: s.header.Load().generation}
	for i := range next.Versions {
		v := &next.Versions[i]
		if err := s.sealVersion(p, v, old.version(v.Number), &meta, c, context); err != nil {
			return fmt.Errorf("%s@%d: %w", next.Name, v.Number, err)
		}
	}
	if err := s.addAliases(p, &next, c.Aliases); err != nil {
		return err
	}
	if next.Name.IsModule() && next.Origin != keyspec.Foreign {
		if err := s.sealWrapping(p, &next, old, &meta, c, context); err != nil {
			return err
		}
	}
	payload := next.encode()
	if len(payload) > MaxMetadata {
		return fmt.Errorf("%w: metadata of %s", ErrTooLarge, next.Name)
	}
	context.kind, context.key = kindMetadata, p.meta
	p.puts = append(p.puts, put{bucket: bucketMeta, key: p.meta[:], value: sealRecord(meta.dek[:], context, payload)})
	p.entries = append(p.entries, meta)
	return nil
}

// sealVersion does for one version of the key what sealChange does for the key. before is what the version was, nil for a new one.
func (s *Store) sealVersion(p *preparedChange, v, before *Version, meta *entry, c *Change, context recordContext) error {
	key := p.meta.id().at(v.Number)
	foreign := c.Key.Origin == keyspec.Foreign
	isDestroyed := v.State == keyspec.Destroyed
	destroyed := isDestroyed && before != nil && before.State != keyspec.Destroyed
	switch material, ok := c.Material[v.Number]; {
	case ok:
		x, blob, err := s.sealMaterial(p, key, context, material)
		if err != nil {
			return err
		}
		p.entries = append(p.entries, x)
		p.puts = append(p.puts, put{bucket: bucketMaterial, key: key[:], value: blob})
	case destroyed:
		// Invariant: a destroyed version has no data key.
		p.entries = append(p.entries, entry{key: key, revision: context.revision, flags: entryDestroyed})
		p.puts = append(p.puts, put{bucket: bucketMaterial, key: key[:]})
		if !foreign {
			p.erased++
		}
		p.bump = true
	case before == nil && isDestroyed: // born destroyed
		p.entries = append(p.entries, entry{key: key, revision: context.revision, flags: entryDestroyed})
	case before == nil && foreign:
		p.entries = append(p.entries, entry{key: key, revision: context.revision, flags: entryForeign})
	}
	public, hasPublic := c.Public[v.Number]
	v.aliases, v.thumbprints = nil, nil
	if before != nil {
		v.public, v.SPKISHA256, v.aliases, v.thumbprints = before.public, before.SPKISHA256, before.aliases, before.thumbprints
		if withdrawn(before, v) {
			p.bump = true // an older copy of the store would undo it
		}
		if hasPublic || destroyed {
			p.puts = append(p.puts, s.retireAliases(meta, before, v, &public)...)
		}
		if !hasPublic {
			return nil
		}
	}
	payload := public.encode()
	if len(payload) > MaxPublic {
		return fmt.Errorf("%w: public part", ErrTooLarge)
	}
	v.public, v.SPKISHA256 = context.revision, [32]byte{}
	if len(public.SPKI) > 0 {
		v.SPKISHA256 = sha256.Sum256(public.SPKI)
	}
	context.kind, context.key = kindPublic, key
	p.puts = append(p.puts, put{bucket: bucketPublic, key: key[:], value: sealRecord(meta.dek[:], context, payload)})
	if !isDestroyed {
		p.puts = append(p.puts, s.publicAliases(key, &public)...)
	}
	return nil
}

// withdrawn reports whether a version was taken out of use: suspended, or revoked for whatever reason.
func withdrawn(before, after *Version) bool {
	return before.State != after.State && (after.State == keyspec.Suspended || after.State == keyspec.Compromised) ||
		!after.Revoked.IsZero() && !after.Revoked.Equal(before.Revoked)
}

// compareVersions checks that next may follow old.
func compareVersions(next, old *metadata, c *Change) error {
	bad := func(n keyspec.Version, text string) error {
		return fmt.Errorf("%w: %s@%d %s", ErrInvalid, next.Name, n, text)
	}
	if old.Name != "" && (old.Name != next.Name || old.Algorithm != next.Algorithm) {
		return fmt.Errorf("%w: name and algorithm of %s are fixed", ErrInvalid, old.Name)
	}
	foreign := next.Origin == keyspec.Foreign
	if old.Name != "" && foreign != (old.Origin == keyspec.Foreign) {
		return fmt.Errorf("%w: whether %s is somebody else's is fixed", ErrInvalid, old.Name)
	}
	if foreign && (len(c.Material) > 0 || c.Guard != nil || c.unguard != nil) {
		return fmt.Errorf("%w: %s is somebody else's and has no material", ErrInvalid, next.Name)
	}
	for i := range old.Versions {
		v := &old.Versions[i]
		if next.version(v.Number) == nil && v.State != keyspec.Destroyed {
			return bad(v.Number, "is left out, but not destroyed")
		}
	}
	for i := range next.Versions {
		v := &next.Versions[i]
		before := old.version(v.Number)
		_, hasMaterial := c.Material[v.Number]
		public, hasPublic := c.Public[v.Number]
		switch {
		case before == nil && v.Number <= lastNumber(old):
			return bad(v.Number, "would use a number again")
		case foreign && (before == nil || hasPublic) && len(public.SPKI) == 0 && v.State != keyspec.Destroyed:
			return bad(v.Number, "is somebody else's and has no public half")
		case before == nil && !foreign && !hasMaterial && v.State != keyspec.Destroyed:
			return bad(v.Number, "is new and has no material")
		case hasMaterial && (before != nil || v.State == keyspec.Destroyed):
			return bad(v.Number, "has its material already, or had it")
		case before == nil:
		case before.State == keyspec.Destroyed && v.State != keyspec.Destroyed:
			return bad(v.Number, "is destroyed")
		case v.Invocations < before.Invocations:
			return bad(v.Number, "counts its invocations backwards")
		}
	}
	for _, n := range c.Erase {
		v := next.version(n)
		if v == nil || v.State != keyspec.Destroyed {
			return bad(n, "is to be erased but not destroyed")
		}
	}
	for n, m := range c.Material {
		if next.version(n) == nil || len(m) == 0 || len(m) > MaxMaterial {
			return bad(n, "has material of the wrong size, or is not listed")
		}
	}
	for n := range c.Public {
		if next.version(n) == nil {
			return bad(n, "has a public part but is not listed")
		}
	}
	return nil
}

func lastNumber(m *metadata) keyspec.Version {
	if len(m.Versions) == 0 {
		return 0
	}
	return m.Versions[len(m.Versions)-1].Number
}

// sealMaterial encrypts the material of a new version under a data key of its own. In a namespace that has a wrapping key that one
// is needed too, so the material of base keys opens only where the module key does.
func (s *Store) sealMaterial(p *preparedChange, key recordKey, c recordContext, material []byte) (entry, []byte, error) {
	x := entry{key: key, revision: c.revision}
	random(x.dek[:])
	sealKey := x.dek
	defer clear(sealKey[:])
	if !p.name.IsModule() {
		wrapping, err := s.wrappingKeyFor(p)
		switch {
		case errors.Is(err, ErrNotFound):
		case err != nil:
			return entry{}, nil, fmt.Errorf("wrapping key of namespace %s: %w", p.name.Namespace(), err)
		default:
			x.flags |= entryBound
			sealKey = bindKey(x.dek, wrapping, key)
			clear(wrapping)
		}
	}
	c.kind, c.key = kindMaterial, key
	return x, sealRecord(sealKey[:], c, material), nil
}
