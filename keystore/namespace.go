package keystore

import (
	"bytes"
	"context"
	"crypto/hkdf"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"

	"filippo.io/age"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/keystore/secmem"
)

// A namespace that has a module key has a wrapping key as well, and the material of its other keys, the base keys, opens only with
// it. It is in the module key's record. If the module key is resident in a device, the device guards the wrapping key: the record
// then holds what the device made of it, and base keys can be used only while the device has opened the namespace.
//
// Invariant: the wrapping key of a guarded namespace was never written, not even sealed under a key of the store, but to the
// escrow recipients; and it is in memory only while the namespace is open.

// NamespaceGuard has a device guard the wrapping key of a namespace.
type NamespaceGuard struct {
	Blob []byte // what the device needs to give the key back, at most MaxMaterial bytes
	Key  []byte // 32 random bytes; the caller wipes them
	// Escrow says whether the store's escrow recipients can open the key too. When a key is wrapped again it may be empty, which
	// leaves it as it is.
	Escrow keyspec.Escrow
}

// NamespaceState describes the wrapping key of a namespace.
type NamespaceState struct {
	Guarded bool           // by a device
	Open    bool           // base keys can be used; a namespace that is not guarded always is
	Blob    []byte         // of a guarded one: what the device needs
	Escrow  keyspec.Escrow // of a guarded one
}

// GuardedNamespace is a namespace whose wrapping key a device guards. With EscrowNone its base keys can be used with that device
// only, wherever the files are restored to.
type GuardedNamespace struct {
	Name   string
	Escrow keyspec.Escrow
	Opened bool // set by VerifyBackup: the identities that opened the backup open the wrapping key
}

const (
	guardFormat = 1
	maxEscrowed = 64 << 10 // bytes of an age file with one key in it
)

// wrappedKey is what the record of a guarded namespace wrapping key holds.
type wrappedKey struct {
	check  [32]byte // tells the right key
	blob   []byte   // what the device needs
	escrow []byte   // an age file with the key, empty without escrow
}

func (g *wrappedKey) encode() []byte {
	e := &encoder{}
	e.u8(guardFormat)
	e.raw(g.check[:])
	e.bytes16(g.blob)
	e.bytes32(g.escrow)
	return e.b
}

func decodeWrappedKey(b []byte) (*wrappedKey, error) {
	d := &decoder{b: b}
	if f := d.u8(); d.err == nil && f != guardFormat {
		return nil, fmt.Errorf("%w: namespace wrapping key of format %d", ErrNewer, f)
	}
	g := &wrappedKey{}
	d.fixed(g.check[:])
	g.blob = slices.Clone(d.bytes16())
	g.escrow = slices.Clone(d.bytes32())
	if err := d.end(); err != nil {
		return nil, fmt.Errorf("%w: namespace wrapping key: %w", ErrDamaged, err)
	}
	return g, nil
}

// checkValue tells the right wrapping key of a namespace without being of help to find it.
func (s *Store) checkValue(namespace string, key []byte) [32]byte {
	return mac(key, []byte("kmsd namespace check v1\x00"), s.storeID[:], []byte(namespace))
}

// opens returns ErrNamespaceKey unless key is the one that is guarded.
func (s *Store) opens(g *wrappedKey, namespace string, key []byte) error {
	if len(key) == keySize {
		if want := s.checkValue(namespace, key); sameMAC(want[:], g.check[:]) {
			return nil
		}
	}
	return fmt.Errorf("%w: %s", ErrNamespaceKey, namespace)
}

// openKeys are the wrapping keys of the guarded namespaces that are open, by namespace.
type openKeys struct {
	mu   sync.RWMutex
	keys map[string]*secmem.Buffer
}

// get returns a copy, which the caller wipes, or nil.
func (o *openKeys) get(namespace string) []byte {
	o.mu.RLock()
	defer o.mu.RUnlock()
	if b := o.keys[namespace]; b != nil {
		return bytes.Clone(b.Bytes())
	}
	return nil
}

func (o *openKeys) put(a *secmem.Arena, namespace string, key []byte) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	b := o.keys[namespace]
	if b == nil {
		var err error
		if b, err = a.Alloc(keySize); err != nil {
			return err
		}
		if o.keys == nil {
			o.keys = make(map[string]*secmem.Buffer)
		}
		o.keys[namespace] = b
	}
	copy(b.Bytes(), key)
	return nil
}

func (o *openKeys) drop(namespace string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.keys[namespace].Free()
	delete(o.keys, namespace)
}

func (o *openKeys) dropAll() {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, b := range o.keys {
		b.Free()
	}
	o.keys = nil
}

// Namespace describes the wrapping key of a namespace. It returns ErrNotFound when the namespace has no module key, and so no
// wrapping key.
func (s *Store) Namespace(namespace string) (NamespaceState, error) {
	var state NamespaceState
	err := s.read(func(h *head) error {
		g, escrow, err := s.guardOf(h, namespace)
		switch {
		case err != nil:
			return err
		case g == nil:
			state = NamespaceState{Open: true}
		default:
			key := s.open.get(namespace)
			state = NamespaceState{Guarded: true, Open: key != nil, Blob: g.blob, Escrow: escrow}
			clear(key)
		}
		return nil
	})
	if err != nil {
		return NamespaceState{}, fmt.Errorf("namespace %s: %w", namespace, err)
	}
	return state, nil
}

// OpenNamespace makes the base keys of a guarded namespace usable, with the key that its device gave back, until CloseNamespace or
// Lock. The key is copied into the arena. It returns ErrNamespaceKey for a wrong one and ErrGuard if no device guards the namespace.
func (s *Store) OpenNamespace(namespace string, key []byte) error {
	return s.read(func(h *head) error {
		g, _, err := s.guardOf(h, namespace)
		if err != nil {
			return fmt.Errorf("namespace %s: %w", namespace, err)
		}
		if g == nil {
			return fmt.Errorf("%w: no device guards %s", ErrGuard, namespace)
		}
		if err := s.opens(g, namespace, key); err != nil {
			return err
		}
		return s.open.put(s.config.Arena, namespace, key)
	})
}

// CloseNamespace forgets the wrapping key of a guarded namespace. It does nothing if the namespace is not open.
func (s *Store) CloseNamespace(namespace string) { s.open.drop(namespace) }

// GuardedNamespaces lists the namespaces that devices guard, by name. It may have to look at the whole key table.
func (s *Store) GuardedNamespaces() ([]GuardedNamespace, error) {
	var list []GuardedNamespace
	err := s.read(func(h *head) (err error) {
		list, err = s.guarded(h)
		return err
	})
	return list, err
}

// guarded finds the guarded namespaces in the key table.
func (s *Store) guarded(h *head) (list []GuardedNamespace, err error) {
	if h.guarded == 0 {
		return nil, nil
	}
	s.ascend(h, recordKey{}, func(entries []entry) bool {
		for i := range entries {
			if entries[i].flags&entryWrapped == 0 {
				continue
			}
			m, x, e := s.metadata(h, entries[i].key.id())
			clear(x.dek[:])
			if e != nil {
				err = e
				continue
			}
			list = append(list, GuardedNamespace{Name: m.Name.Namespace(), Escrow: m.escrow})
		}
		return uint64(len(list)) < h.guarded
	}, func(_ recordKey, e error) { err = e })
	slices.SortFunc(list, func(a, b GuardedNamespace) int { return strings.Compare(a.Name, b.Name) })
	return list, err
}

// EscrowedNamespaceKey opens the copy of a guarded namespace's wrapping key that was made for the escrow recipients. With the key the
// namespace can be opened, guarded by another device, or made one that no device guards. It returns ErrNotFound if the namespace has
// no escrow and ErrNamespaceKey if the identities are others. The caller wipes the key.
func (s *Store) EscrowedNamespaceKey(namespace string, ids []age.Identity) ([]byte, error) {
	var g *wrappedKey
	err := s.read(func(h *head) (err error) {
		g, _, err = s.guardOf(h, namespace)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("namespace %s: %w", namespace, err)
	}
	if g == nil || len(g.escrow) == 0 {
		return nil, fmt.Errorf("namespace %s has no escrow: %w", namespace, ErrNotFound)
	}
	key := make([]byte, keySize)
	plain, err := age.Decrypt(bytes.NewReader(g.escrow), ids...)
	if err == nil {
		_, err = io.ReadFull(plain, key)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrNamespaceKey, namespace, err)
	}
	if err := s.opens(g, namespace, key); err != nil {
		clear(key)
		return nil, err
	}
	return key, nil
}

// UnguardNamespace makes a guarded namespace one that no device guards: from then on whoever opens the store can use its keys. It is
// for a store that was restored where the device is not.
func (s *Store) UnguardNamespace(ctx context.Context, namespace string, key []byte) error {
	k, err := s.Get(keyspec.Name(namespace))
	if err != nil {
		return err
	}
	if err := s.Apply(ctx, Commit{Changes: []Change{{Key: k, unguard: key}}}); err != nil {
		return err
	}
	s.open.drop(namespace)
	return nil
}

// guardOf returns what the record of a guarded namespace holds, nil if no device guards it, and ErrNotFound if it has no wrapping key.
func (s *Store) guardOf(h *head, namespace string) (*wrappedKey, keyspec.Escrow, error) {
	name := keyspec.Name(namespace)
	if !name.IsModule() {
		return nil, "", ErrNotFound
	}
	m, x, err := s.metadata(h, s.recordID(name))
	if err != nil {
		return nil, "", err
	}
	defer clear(x.dek[:])
	if m.wrapping == 0 {
		return nil, "", ErrNotFound
	}
	if x.flags&entryWrapped == 0 {
		return nil, "", nil
	}
	g, err := s.openGuard(m, &x)
	return g, m.escrow, err
}

func (s *Store) openGuard(m *metadata, x *entry) (*wrappedKey, error) {
	payload, err := s.openWrapping(m, x)
	if err != nil {
		return nil, err
	}
	return decodeWrappedKey(payload)
}

// openWrapping decrypts the record of a module key's namespace wrapping key: the key, or its guard.
func (s *Store) openWrapping(m *metadata, x *entry) ([]byte, error) {
	key := x.key.id().at(0)
	blob, err := s.fetch(bucketMaterial, key[:])
	if err != nil {
		return nil, err
	}
	if blob == nil {
		return nil, fmt.Errorf("%w: a namespace wrapping key is missing", ErrDamaged)
	}
	return openRecord(x.dek[:], recordContext{store: s.storeID, kind: kindNamespace, key: key, revision: m.wrapping}, blob)
}

// wrappingKey returns the namespace wrapping key, which the caller wipes. It returns ErrNotFound when there is no module key, and
// ErrNamespaceClosed when a device guards the key and has not opened it.
func (s *Store) wrappingKey(h *head, namespace string) ([]byte, error) {
	m, x, err := s.metadata(h, s.recordID(keyspec.Name(namespace)))
	if err != nil {
		return nil, err
	}
	defer clear(x.dek[:])
	switch {
	case x.flags&^entryKnown != 0:
		return nil, fmt.Errorf("%w: entry flags %x", ErrNewer, x.flags)
	case m.wrapping == 0:
		return nil, ErrNotFound
	case x.flags&entryWrapped == 0:
		return s.openWrapping(m, &x)
	}
	if key := s.open.get(namespace); key != nil {
		return key, nil
	}
	return nil, fmt.Errorf("%w: %s", ErrNamespaceClosed, namespace)
}

// wrappingKeyNow is wrappingKey in the newest state, for callers that hold s.mu.
func (s *Store) wrappingKeyNow(namespace string) (key []byte, err error) {
	err = s.readHeld(func(h *head) error {
		key, err = s.wrappingKey(h, namespace)
		return err
	})
	return key, err
}

// wrappingKeyFor is wrappingKeyNow for a base key in a commit, which may make the module key as well.
func (s *Store) wrappingKeyFor(p *preparedChange) ([]byte, error) {
	namespace := p.name.Namespace()
	if key := p.commit.wrapping[namespace]; key != nil {
		return bytes.Clone(key), nil
	}
	return s.wrappingKeyNow(namespace)
}

// bindKey returns HKDF-SHA256(data key, salt = namespace wrapping key) (RFC 5869).
func bindKey(dek [keySize]byte, wrapping []byte, key recordKey) (out [keySize]byte) {
	k, err := hkdf.Key(sha256.New, dek[:], wrapping, "kmsd namespace v1"+string(key[:]), keySize)
	if err != nil {
		panic("keystore: " + err.Error())
	}
	copy(out[:], k)
	clear(k)
	return out
}

// sealWrapping writes the namespace wrapping key of a module key if it has to be: when the module key is made, with each new version
// of it, and when its guard is changed. meta is the module key's entry, with the flags it had.
func (s *Store) sealWrapping(p *preparedChange, next, old *metadata, meta *entry, c *Change, context recordContext) error {
	var payload []byte
	var err error
	guarded := meta.flags&entryWrapped != 0
	rotated := lastNumber(next) != lastNumber(old)
	switch {
	case c.unguard != nil:
		payload, err = s.unguard(next, old, meta, c.unguard)
	case c.Guard != nil:
		p.establishes = !guarded
		payload, err = s.sealGuard(next, old, meta, c.Guard)
	case guarded && rotated:
		err = fmt.Errorf("%w: a device guards %s, and a new version of its module key has to wrap its key again", ErrGuard, next.Name)
	case old.wrapping == 0:
		payload = make([]byte, keySize)
		random(payload)
		if p.commit.wrapping == nil {
			p.commit.wrapping = make(map[string][]byte)
		}
		p.commit.wrapping[next.Name.Namespace()] = bytes.Clone(payload)
	case rotated && !guarded:
		payload, err = s.wrappingKeyNow(next.Name.Namespace())
	}
	if err != nil || payload == nil {
		return err
	}
	defer clear(payload)
	next.wrapping = context.revision
	context.kind, context.key = kindNamespace, meta.key
	p.puts = append(p.puts, put{bucket: bucketMaterial, key: meta.key[:], value: sealRecord(meta.dek[:], context, payload)})
	count := func(m *metadata, by int) {
		switch m.escrow {
		case keyspec.EscrowNone:
			p.unescrowed += by
			fallthrough
		case keyspec.EscrowRecipients:
			p.guarded += by
		}
	}
	count(old, -1)
	count(next, 1)
	return nil
}

// sealGuard returns the payload of a guarded wrapping key.
func (s *Store) sealGuard(next, old *metadata, meta *entry, n *NamespaceGuard) ([]byte, error) {
	namespace := next.Name.Namespace()
	if len(n.Key) != keySize || len(n.Blob) == 0 || len(n.Blob) > MaxMaterial {
		return nil, fmt.Errorf("%w: guard of %s", ErrInvalid, namespace)
	}
	if meta.flags&entryWrapped != 0 {
		before, err := s.openGuard(old, meta)
		if err != nil {
			return nil, err
		}
		if err := s.opens(before, namespace, n.Key); err != nil {
			return nil, err
		}
	}
	if n.Escrow != "" {
		next.escrow = n.Escrow
	}
	g := wrappedKey{check: s.checkValue(namespace, n.Key), blob: n.Blob}
	var err error
	switch next.escrow {
	case keyspec.EscrowNone:
	case keyspec.EscrowRecipients:
		g.escrow, err = s.sealEscrow(n.Key)
	default:
		err = fmt.Errorf("%w: escrow %q of %s", ErrInvalid, next.escrow, namespace)
	}
	meta.flags |= entryWrapped
	return g.encode(), err
}

// sealEscrow encrypts a key to the escrow recipients of the store.
func (s *Store) sealEscrow(key []byte) ([]byte, error) {
	recipients, err := parseRecipients(s.header.Load().escrow)
	if err == nil && len(recipients) == 0 {
		err = fmt.Errorf("%w: the store has no escrow recipients", ErrInvalid)
	}
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	w, err := age.Encrypt(&out, recipients...)
	if err == nil {
		_, err = w.Write(key)
	}
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		return nil, fmt.Errorf("escrow: %w", err)
	}
	if out.Len() > maxEscrowed {
		return nil, fmt.Errorf("%w: escrow", ErrTooLarge)
	}
	return out.Bytes(), nil
}

// unguard returns the payload of a wrapping key that is not guarded any more: the key.
func (s *Store) unguard(next, old *metadata, meta *entry, key []byte) ([]byte, error) {
	namespace := next.Name.Namespace()
	if meta.flags&entryWrapped == 0 {
		return nil, fmt.Errorf("%w: no device guards %s", ErrGuard, namespace)
	}
	g, err := s.openGuard(old, meta)
	if err != nil {
		return nil, err
	}
	if err := s.opens(g, namespace, key); err != nil {
		return nil, err
	}
	meta.flags &^= entryWrapped
	next.escrow = ""
	return bytes.Clone(key), nil
}

// checkGuards makes sure that a commit which has a device guard a namespace makes no keys in it, since they would not be guarded.
func (c *Commit) checkGuards() error {
	if !slices.ContainsFunc(c.Changes, func(o Change) bool { return o.Guard != nil }) {
		return nil
	}
	for i := range c.Changes {
		k := c.Changes[i].Key
		if k == nil || k.Name.IsModule() {
			continue
		}
		if c.Changes[i].Guard != nil {
			return fmt.Errorf("%w: %s is not a module key", ErrInvalid, k.Name)
		}
		guards := func(o Change) bool {
			return o.Guard != nil && o.Key != nil && o.Key.Name == keyspec.Name(k.Name.Namespace())
		}
		if len(c.Changes[i].Material) > 0 && slices.ContainsFunc(c.Changes, guards) {
			return fmt.Errorf("%w: %s is made together with the guard of its namespace", ErrInvalid, k.Name)
		}
	}
	return nil
}

// establish commits a change that has devices guard namespaces which they did not guard. It runs on the writer goroutine, so that no
// base key can come in between.
func (s *Store) establish(p *prepared) error {
	// Whatever was prepared until now does not know of the new wrapping keys.
	defer s.guardChanges.Add(1)
	for i := range p.changes {
		if !p.changes[i].establishes {
			continue
		}
		if err := s.checkNoBaseKeys(s.snapshot.Load(), &p.changes[i]); err != nil {
			return err
		}
	}
	t := s.begin()
	defer t.edit.wipe()
	if err := t.stage(p); err != nil {
		return err
	}
	return t.commit()
}

// checkNoBaseKeys returns ErrGuard if the namespace of a module key has keys whose material is there: what protected them until now is
// in the files.
func (s *Store) checkNoBaseKeys(h *head, module *preparedChange) (err error) {
	var from recordKey
	within := module.meta[:8]
	copy(from[:], within)
	s.ascend(h, from, func(entries []entry) bool {
		for i := range entries {
			x := &entries[i]
			switch {
			case !bytes.HasPrefix(x.key[:], within):
				return false
			case x.key.version() != 0 && x.flags&(entryDestroyed|entryForeign) == 0 && x.key.id() != module.meta.id():
				err = fmt.Errorf("%w: %s has keys already, which were not guarded: make a new namespace", ErrGuard, module.name)
				return false
			}
		}
		return true
	}, func(_ recordKey, e error) { err = errors.Join(err, e) })
	return err
}

// openGuarded opens the namespaces that a commit had devices guard. If the arena is full they stay closed.
func (s *Store) openGuarded(c Commit) {
	for i := range c.Changes {
		g := c.Changes[i].Guard
		if g == nil {
			continue
		}
		if err := s.OpenNamespace(c.Changes[i].Key.Name.Namespace(), g.Key); err != nil {
			s.config.log().Warn("a namespace stays closed", "error", err)
		}
	}
}

// openEscrowed reports whether the escrow of a namespace opens with the identities, and then opens the namespace, if the arena has room.
func (s *Store) openEscrowed(namespace string, ids []age.Identity) bool {
	key, err := s.EscrowedNamespaceKey(namespace, ids)
	if err != nil {
		return false
	}
	defer clear(key)
	err = s.OpenNamespace(namespace, key)
	return err == nil || errors.Is(err, secmem.ErrArenaFull)
}
