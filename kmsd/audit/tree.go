package audit

import (
	"crypto/sha256"
	"math/bits"
)

// Hash is a node of the tree.
type Hash [sha256.Size]byte

// Head is the size of the tree and its root (RFC 6962 section 2.1).
type Head struct {
	Size uint64
	Root Hash
}

// tree is an RFC 6962 Merkle tree that remembers its right edge alone: the roots of the complete subtrees of which it
// consists, largest first, one for every bit that is set in size.
type tree struct {
	size uint64
	edge []Hash
}

// leafHash is MTH({d}) of RFC 6962 section 2.1. buf is scratch.
func leafHash(buf *[]byte, data []byte) Hash {
	*buf = append(append((*buf)[:0], 0), data...)
	return sha256.Sum256(*buf)
}

func nodeHash(left, right *Hash) Hash {
	var b [1 + 2*sha256.Size]byte
	b[0] = 1
	copy(b[1:], left[:])
	copy(b[1+sha256.Size:], right[:])
	return sha256.Sum256(b[:])
}

// add appends a leaf.
func (t *tree) add(leaf Hash) {
	for n := t.size; n&1 == 1; n >>= 1 {
		last := len(t.edge) - 1
		leaf = nodeHash(&t.edge[last], &leaf)
		t.edge = t.edge[:last]
	}
	t.edge = append(t.edge, leaf)
	t.size++
}

// head returns the size and root. The root of the empty tree is the hash of nothing.
func (t *tree) head() Head {
	if t.size == 0 {
		return Head{Root: sha256.Sum256(nil)}
	}
	root := t.edge[len(t.edge)-1]
	for i := len(t.edge) - 2; i >= 0; i-- {
		root = nodeHash(&t.edge[i], &root)
	}
	return Head{Size: t.size, Root: root}
}

// edgeLen is the number of hashes in the edge of a tree of size leaves.
func edgeLen(size uint64) int { return bits.OnesCount64(size) }
