package keystore

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"slices"
	"sync"

	"github.com/kmsd-project/kmsd/keystore/secmem"
)

// Bounds of the caches. At a million keys there are 2,000 interior nodes.
const (
	maxInterior   = 4096
	maxLeaves     = 512
	maxNamespaces = 1024
)

// nodeCache keeps nodes whose digest was verified, by that digest: interior nodes decoded, leaves as they are on disk, because a
// decoded leaf would be data keys lying about in memory. It also keeps the ids of namespaces.
type nodeCache struct {
	mu         sync.RWMutex
	interior   map[digest]*node
	leaves     map[digest][]byte
	namespaces map[string][8]byte
}

func newNodeCache() *nodeCache {
	return &nodeCache{interior: make(map[digest]*node), leaves: make(map[digest][]byte), namespaces: make(map[string][8]byte)}
}

func (c *nodeCache) getNamespace(name string) ([8]byte, bool) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	id, ok := c.namespaces[name]
	return id, ok
}

func (c *nodeCache) putNamespace(name string, id [8]byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for victim := range c.namespaces {
		if len(c.namespaces) < maxNamespaces {
			break
		}
		delete(c.namespaces, victim)
	}
	c.namespaces[name] = id
}

func (c *nodeCache) getInterior(d digest) *node {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.interior[d]
}

func (c *nodeCache) getLeaf(d digest) []byte {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.leaves[d]
}

func (c *nodeCache) putInterior(d digest, n *node) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for victim := range c.interior {
		if len(c.interior) < maxInterior {
			break
		}
		delete(c.interior, victim)
	}
	c.interior[d] = n
}

func (c *nodeCache) putLeaf(d digest, blob []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for victim := range c.leaves {
		if len(c.leaves) < maxLeaves {
			break
		}
		delete(c.leaves, victim)
	}
	c.leaves[d] = blob
}

// loadNode returns the bytes of a node, verified against the digest.
func (s *Store) loadNode(ref nodeRef) ([]byte, error) {
	blob, err := s.fetch(bucketTable, nodeID(ref.id))
	if err != nil {
		return nil, err
	}
	return blob, ref.verify(blob)
}

// verify checks that blob is the node.
func (r nodeRef) verify(blob []byte) error {
	if blob == nil {
		return fmt.Errorf("%w: a key table node is missing", ErrDamaged)
	}
	if sha256.Sum256(blob) != r.digest {
		return fmt.Errorf("%w: a key table node is not the one it should be", ErrDamaged)
	}
	return nil
}

func (s *Store) interior(ref nodeRef, level uint8) (*node, error) {
	if n := s.cache.getInterior(ref.digest); n != nil && n.level == level && n.id == ref.id {
		return n, nil
	}
	blob, err := s.loadNode(ref)
	if err != nil {
		return nil, err
	}
	n, err := decodeInterior(ref.id, level, blob)
	if err != nil {
		return nil, err
	}
	s.cache.putInterior(ref.digest, n)
	return n, nil
}

func (s *Store) leaf(ref nodeRef) ([]byte, error) {
	if blob := s.cache.getLeaf(ref.digest); blob != nil {
		return blob, nil
	}
	blob, err := s.loadNode(ref)
	if err != nil {
		return nil, err
	}
	s.cache.putLeaf(ref.digest, blob)
	return blob, nil
}

// leafSize is the size of a full leaf's plaintext.
const leafSize = maxEntries * entrySize

// plainLeaves keeps buffers for the plaintext of leaves, which are wiped before they are put back.
var plainLeaves = sync.Pool{New: func() any { return new([leafSize]byte) }}

// withLeaf calls f with the plaintext of a leaf and wipes it afterwards.
func (s *Store) withLeaf(ref nodeRef, blob []byte, f func(plain []byte) error) (err error) {
	epoch, _, _, err := decodeNodeHeader(blob, 0)
	if err != nil {
		return err
	}
	key := s.secrets.epochKey(epoch)
	if key == nil {
		return fmt.Errorf("%w: a key table leaf is of epoch %d, whose key is gone", ErrDamaged, epoch)
	}
	buf := plainLeaves.Get().(*[leafSize]byte)
	defer plainLeaves.Put(buf)
	secmem.Do(func() {
		var plain []byte
		if plain, err = openLeaf(buf[:0], s.storeID, ref.id, blob, key); err == nil {
			err = f(plain)
			clear(plain)
		}
	})
	return err
}

// lookup finds an entry in the key table as of h. The caller holds s.mu and wipes the entry's data key.
func (s *Store) lookup(h *head, key recordKey) (x entry, found bool, err error) {
	x, found, _, err = s.lookupRecord(h, key, nil)
	return x, found, err
}

// lookupRecord is lookup and fetch in one, because the way into the database is half the cost of either.
func (s *Store) lookupRecord(h *head, key recordKey, bucket []byte) (x entry, found bool, record []byte, err error) {
	if h.root.id == 0 {
		return entry{}, false, nil, nil
	}
	ref := h.root
	for level := h.level; level > 0; level-- {
		n, err := s.interior(ref, level)
		if err != nil {
			return entry{}, false, nil, err
		}
		ref = n.children[n.childFor(key)].nodeRef
	}
	blob := s.cache.getLeaf(ref.digest)
	var places [2]place
	n := 0
	if bucket != nil {
		places[0] = place{bucket: bucket, key: key[:]}
		n = 1
	}
	if blob == nil {
		places[n] = place{bucket: bucketTable, key: nodeID(ref.id)}
		n++
	}
	if n > 0 {
		if err := s.fetchAll(places[:n]); err != nil {
			return entry{}, false, nil, err
		}
	}
	if blob == nil {
		blob = places[n-1].value
		if err := ref.verify(blob); err != nil {
			return entry{}, false, nil, err
		}
		s.cache.putLeaf(ref.digest, blob)
	}
	if bucket != nil {
		record = places[0].value
	}
	err = s.withLeaf(ref, blob, func(plain []byte) error {
		x, found = findEntry(plain, key)
		return nil
	})
	return x, found, record, err
}

// entryNow is lookup in the newest state, for callers that hold s.mu.
func (s *Store) entryNow(key recordKey) (x entry, found bool, err error) {
	err = s.readHeld(func(h *head) error {
		x, found, err = s.lookup(h, key)
		return err
	})
	return x, found, err
}

// ascend calls visit with the entries from the first one not below from, leaf by leaf, until visit returns false. Entries are wiped
// after visit returns. A node that cannot be read is given to broken, with the first key it may hold, and left out.
func (s *Store) ascend(h *head, from recordKey, visit func([]entry) bool, broken func(recordKey, error)) {
	s.leaves(h, from, func(c child) bool {
		entries, err := s.leafEntries(c.nodeRef)
		if err != nil {
			broken(c.first, err)
			return true
		}
		n := node{entries: entries}
		defer n.wipe()
		at, _ := n.search(from)
		return at == len(entries) || visit(entries[at:])
	}, broken)
}

// leaves calls visit with the references to the leaves that may hold from or what follows it, until visit returns false.
func (s *Store) leaves(h *head, from recordKey, visit func(child) bool, broken func(recordKey, error)) {
	if h.root.id != 0 {
		s.leavesBelow(child{nodeRef: h.root}, h.level, from, visit, broken)
	}
}

func (s *Store) leavesBelow(c child, level uint8, from recordKey, visit func(child) bool, broken func(recordKey, error)) bool {
	if level == 0 {
		return visit(c)
	}
	n, err := s.interior(c.nodeRef, level)
	if err != nil {
		broken(c.first, err)
		return true
	}
	for i := n.childFor(from); i < len(n.children); i++ {
		if !s.leavesBelow(n.children[i], level-1, from, visit, broken) {
			return false
		}
	}
	return true
}

func (s *Store) leafEntries(ref nodeRef) (entries []entry, err error) {
	blob, err := s.leaf(ref)
	if err != nil {
		return nil, err
	}
	err = s.withLeaf(ref, blob, func(plain []byte) (err error) {
		entries, err = decodeEntries(plain)
		return err
	})
	return entries, err
}

// edit is a set of changes to the key table that becomes one commit.
type edit struct {
	s     *Store
	head  head             // as it will be
	dirty map[uint64]*node // nodes that will be written, by id
}

// written is a node as it goes to disk.
type written struct {
	blob   []byte
	digest digest
}

func (s *Store) newEdit(h *head) *edit {
	return &edit{s: s, head: *h, dirty: make(map[uint64]*node)}
}

// wipe clears the data keys in the decoded leaves.
func (e *edit) wipe() {
	for _, n := range e.dirty {
		n.wipe()
	}
}

// node returns a node that may be changed.
func (e *edit) node(ref nodeRef, level uint8) (*node, error) {
	if n := e.dirty[ref.id]; n != nil {
		return n, nil
	}
	var n *node
	if level == 0 {
		entries, err := e.s.leafEntries(ref)
		if err != nil {
			return nil, err
		}
		n = &node{id: ref.id, entries: entries}
	} else {
		shared, err := e.s.interior(ref, level)
		if err != nil {
			return nil, err
		}
		n = &node{id: ref.id, level: level, children: append(make([]child, 0, maxChildren+1), shared.children...)}
	}
	e.dirty[ref.id] = n
	return n, nil
}

// find returns the entry as of the edit.
func (e *edit) find(key recordKey) (x entry, found bool, err error) {
	ref := e.head.root
	if ref.id == 0 {
		return entry{}, false, nil
	}
	for level := e.head.level; ; level-- {
		n := e.dirty[ref.id]
		if n == nil {
			// Below a clean node everything is clean.
			clean := e.head
			clean.root, clean.level = ref, level
			return e.s.lookup(&clean, key)
		}
		if level == 0 {
			if at, ok := n.search(key); ok {
				return n.entries[at], true, nil
			}
			return entry{}, false, nil
		}
		ref = n.children[n.childFor(key)].nodeRef
	}
}

// touch has the leaf that key belongs to written again.
func (e *edit) touch(key recordKey) error {
	ref := e.head.root
	for level := e.head.level; ; level-- {
		n, err := e.node(ref, level)
		if err != nil || level == 0 {
			return err
		}
		ref = n.children[n.childFor(key)].nodeRef
	}
}

// put inserts an entry or replaces the one with its key.
func (e *edit) put(x entry) error {
	if e.head.root.id == 0 {
		n := &node{id: e.newID(), entries: make([]entry, 0, maxEntries+1)}
		e.dirty[n.id] = n
		e.head.root = nodeRef{id: n.id}
		e.head.level = 0
	}
	split, err := e.insert(e.head.root, e.head.level, x)
	if err != nil || split == nil {
		return err
	}
	if e.head.level == maxLevel {
		return fmt.Errorf("%w: the key table is full", ErrTooLarge)
	}
	left := e.dirty[e.head.root.id]
	root := &node{id: e.newID(), level: e.head.level + 1, children: make([]child, 0, maxChildren+1)}
	root.children = append(root.children, child{first: left.first(), nodeRef: e.head.root}, *split)
	e.dirty[root.id] = root
	e.head.root = nodeRef{id: root.id}
	e.head.level++
	return nil
}

func (e *edit) newID() uint64 {
	e.head.nextNode++
	return e.head.nextNode
}

func (n *node) first() recordKey {
	if n.level == 0 {
		return n.entries[0].key
	}
	return n.children[0].first
}

// insert puts x below ref and returns the new right half if the node had to be split.
func (e *edit) insert(ref nodeRef, level uint8, x entry) (*child, error) {
	n, err := e.node(ref, level)
	if err != nil {
		return nil, err
	}
	if level == 0 {
		at, ok := n.search(x.key)
		if ok {
			n.entries[at] = x
			return nil, nil
		}
		n.entries = slices.Insert(n.entries, at, x)
		e.head.entries++
		if len(n.entries) <= splitBeyond {
			return nil, nil
		}
		right := &node{id: e.newID(), entries: make([]entry, 0, maxEntries+1)}
		half := splitAt(at, len(n.entries))
		right.entries = append(right.entries, n.entries[half:]...)
		clear(n.entries[half:])
		n.entries = n.entries[:half]
		e.dirty[right.id] = right
		return &child{first: right.first(), nodeRef: nodeRef{id: right.id}}, nil
	}
	i := n.childFor(x.key)
	if bytes.Compare(x.key[:], n.children[i].first[:]) < 0 {
		n.children[i].first = x.key
	}
	split, err := e.insert(n.children[i].nodeRef, level-1, x)
	if err != nil || split == nil {
		return nil, err
	}
	n.children = slices.Insert(n.children, i+1, *split)
	if len(n.children) <= maxChildren {
		return nil, nil
	}
	right := &node{id: e.newID(), level: level, children: make([]child, 0, maxChildren+1)}
	half := splitAt(i+1, len(n.children))
	right.children = append(right.children, n.children[half:]...)
	n.children = n.children[:half]
	e.dirty[right.id] = right
	return &child{first: right.first(), nodeRef: nodeRef{id: right.id}}, nil
}

// splitAt returns how many of n elements stay on the left. A node that grew at its end is split near its end, because then more is
// likely to follow, and half-empty nodes would be left behind.
func splitAt(inserted, n int) int {
	if inserted == n-1 {
		return n - n/16 - 1
	}
	return n / 2
}

// finish seals every dirty node and returns what to write, by node id. The head's root digest is right afterwards.
func (e *edit) finish() (map[uint64]written, error) {
	if len(e.dirty) == 0 {
		return nil, nil
	}
	blobs := make(map[uint64]written, len(e.dirty))
	var err error
	secmem.Do(func() { err = e.seal(&e.head.root, e.head.level, blobs) })
	return blobs, err
}

// seal encodes the dirty nodes at and below ref, children first, and sets the digests.
func (e *edit) seal(ref *nodeRef, level uint8, blobs map[uint64]written) error {
	n := e.dirty[ref.id]
	if n == nil {
		return nil
	}
	var blob []byte
	if level == 0 {
		key := e.s.secrets.currentEpoch()
		n.epoch = key.number
		blob = encodeLeaf(e.s.storeID, n, key.key.Bytes())
		e.head.seals++
	} else {
		for i := range n.children {
			if err := e.seal(&n.children[i].nodeRef, level-1, blobs); err != nil {
				return err
			}
		}
		blob = encodeInterior(n)
	}
	ref.digest = sha256.Sum256(blob)
	blobs[ref.id] = written{blob, ref.digest}
	return nil
}

// publish puts the written nodes into the cache. The nodes become shared and are not changed any more.
func (e *edit) publish(blobs map[uint64]written) {
	for id, w := range blobs {
		if n := e.dirty[id]; n.level > 0 {
			e.s.cache.putInterior(w.digest, n)
		} else {
			e.s.cache.putLeaf(w.digest, w.blob)
		}
	}
}
