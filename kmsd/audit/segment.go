package audit

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hpke"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
)

// The files of a log are segments, audit-00000001.log and so on, each a header and records:
//
//	header  "kmsd audit log" | u8 0 | u8 format = 1 | u32 segment | u64 first | edge | u16 n | sealed key (n) | check (8)
//	record  u32 length | body | check (8)
//	body    u64 number | ciphertext
//
// first is the number of leaves before the segment and edge the right edge of their tree, so that the last segment is
// enough to go on writing. The sealed key is the session key of the segment, HPKE-sealed to the auditor. A check is the
// first 8 bytes of the leaf hash: it names the place of an accident; what finds an attack is the tree.
//
// The header without its check is leaf number first of the tree and every body one of the next.
//
// Invariant: a session key is used by one run of the daemon for one segment, and the nonce of a record is its number, so
// no nonce is ever used twice under one key.
const (
	magic         = "kmsd audit log\x00"
	fileFormat    = 1
	prefixSize    = len(magic) + 1 + 4 + 8
	checkSize     = 8
	sessionSize   = 32
	tagSize       = 16
	maxSealedKey  = 2048
	maxHeader     = prefixSize + 64*len(Hash{}) + 2 + maxSealedKey + checkSize
	minBody       = 8 + block + tagSize
	maxBody       = 8 + maxEntry + tagSize
	maxSegment    = 16 << 20 // bytes after which a new segment is begun
	hpkeInfo      = "kmsd audit v1"
	segmentPrefix = "audit-"
	segmentSuffix = ".log"
)

func kem() hpke.KEM { return hpke.MLKEM768X25519() }

func segmentName(n uint32) string { return fmt.Sprintf("%s%08d%s", segmentPrefix, n, segmentSuffix) }

// segmentNumber is the inverse of segmentName.
func segmentNumber(name string) (uint32, bool) {
	digits, ok := strings.CutPrefix(name, segmentPrefix)
	if !ok {
		return 0, false
	}
	if digits, ok = strings.CutSuffix(digits, segmentSuffix); !ok || len(digits) < 8 {
		return 0, false
	}
	n, err := strconv.ParseUint(digits, 10, 32)
	return uint32(n), err == nil && n > 0 && segmentName(uint32(n)) == name
}

// session seals or opens the records of one segment.
type session struct {
	aead  cipher.AEAD
	aad   [32 + 8]byte // leaf hash of the header, number
	nonce [12]byte     // 4 zero bytes, number
}

func newSession(key []byte, header Hash) (*session, error) {
	b, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	aead, err := cipher.NewGCM(b)
	if err != nil {
		return nil, err
	}
	s := &session{aead: aead}
	copy(s.aad[:], header[:])
	return s, nil
}

// turn makes nonce and aad those of a record.
func (s *session) turn(number uint64) {
	binary.BigEndian.PutUint64(s.nonce[4:], number)
	binary.BigEndian.PutUint64(s.aad[32:], number)
}

// appendBody appends the body of record number with the encoded entry.
func (s *session) appendBody(dst []byte, number uint64, entry []byte) []byte {
	s.turn(number)
	dst = binary.BigEndian.AppendUint64(dst, number)
	return s.aead.Seal(dst, s.nonce[:], entry, s.aad[:])
}

// open returns the encoded entry of the record body.
func (s *session) open(dst, body []byte) ([]byte, error) {
	s.turn(binary.BigEndian.Uint64(body))
	return s.aead.Open(dst, s.nonce[:], body[8:], s.aad[:])
}

// header is the parsed beginning of a segment.
type header struct {
	raw     []byte // without the check
	segment uint32
	first   uint64
	edge    []Hash
	sealed  []byte
	sealing []byte // what of raw comes before the sealed key and is bound to it
}

// newHeader makes the header of a segment that begins after the leaves of t, and the session for its records.
func newHeader(auditor hpke.PublicKey, segment uint32, t *tree) (*header, *session, error) {
	var key [sessionSize]byte
	rand.Read(key[:])
	defer clear(key[:])
	h := &header{segment: segment, first: t.size, edge: slices.Clone(t.edge)}
	raw := append([]byte(magic), fileFormat)
	raw = binary.BigEndian.AppendUint32(raw, segment)
	raw = binary.BigEndian.AppendUint64(raw, t.size)
	for i := range h.edge {
		raw = append(raw, h.edge[i][:]...)
	}
	sealed, err := hpke.Seal(auditor, hpke.HKDFSHA256(), hpke.AES256GCM(), append([]byte(hpkeInfo), raw...), key[:])
	if err != nil {
		return nil, nil, err
	}
	h.sealing, h.sealed = raw, sealed
	raw = binary.BigEndian.AppendUint16(slices.Clone(raw), uint16(len(sealed)))
	h.raw = append(raw, sealed...)
	s, err := newSession(key[:], h.leaf())
	return h, s, err
}

func (h *header) leaf() Hash {
	var buf []byte
	return leafHash(&buf, h.raw)
}

// session opens the session key of the segment.
func (h *header) session(auditor hpke.PrivateKey) (*session, error) {
	key, err := hpke.Open(auditor, hpke.HKDFSHA256(), hpke.AES256GCM(), append([]byte(hpkeInfo), h.sealing...), h.sealed)
	if err != nil || len(key) != sessionSize {
		return nil, ErrKey
	}
	defer clear(key)
	return newSession(key, h.leaf())
}

// errTorn says that the bytes end in the middle, as after a loss of power.
var errTorn = errors.New("the file ends in the middle of an entry")

// segmentReader reads the header and then the records of a segment. It allocates nothing that the file asks for beyond
// maxHeader and maxBody.
type segmentReader struct {
	r      io.Reader
	header *header
	offset int64  // of the next unread byte
	number uint64 // of the next leaf
	body   []byte // of the last record
	buf    []byte
}

func newSegmentReader(r io.Reader) (*segmentReader, error) {
	s := &segmentReader{r: r}
	prefix := make([]byte, prefixSize, maxHeader)
	if err := s.fill(prefix); err != nil {
		return nil, err
	}
	if !bytes.HasPrefix(prefix, []byte(magic)) {
		return nil, errors.New("not a segment of an audit log")
	}
	if f := prefix[len(magic)]; f != fileFormat {
		return nil, fmt.Errorf("segment format %d, this release reads %d", f, fileFormat)
	}
	h := &header{
		segment: binary.BigEndian.Uint32(prefix[len(magic)+1:]),
		first:   binary.BigEndian.Uint64(prefix[len(magic)+5:]),
	}
	raw, err := s.more(prefix, edgeLen(h.first)*len(Hash{}))
	if err != nil {
		return nil, err
	}
	for b := raw[prefixSize:]; len(b) > 0; b = b[len(Hash{}):] {
		h.edge = append(h.edge, Hash(b))
	}
	sealing := len(raw)
	if raw, err = s.more(raw, 2); err != nil {
		return nil, err
	}
	n := int(binary.BigEndian.Uint16(raw[sealing:]))
	if n > maxSealedKey {
		return nil, errors.New("sealed key is too long")
	}
	if raw, err = s.more(raw, n); err != nil {
		return nil, err
	}
	h.raw, h.sealing, h.sealed = raw, raw[:sealing], raw[sealing+2:]
	var check [checkSize]byte
	if err = s.fill(check[:]); err != nil {
		return nil, err
	}
	if leaf := h.leaf(); !bytes.Equal(check[:], leaf[:checkSize]) {
		return nil, errors.New("header was changed")
	}
	s.header, s.number = h, h.first+1
	return s, nil
}

func (s *segmentReader) fill(b []byte) error {
	n, err := io.ReadFull(s.r, b)
	s.offset += int64(n)
	if errors.Is(err, io.ErrUnexpectedEOF) || err == io.EOF {
		return errTorn
	}
	return err
}

func (s *segmentReader) more(b []byte, n int) ([]byte, error) {
	start := len(b)
	b = b[:start+n] // prefix was made with room for the largest header
	return b, s.fill(b[start:])
}

// next reads a record into s.body and returns its leaf hash. At the end it returns io.EOF, at an end in the middle of a
// record errTorn.
func (s *segmentReader) next() (Hash, error) {
	var length [4]byte
	switch n, err := io.ReadFull(s.r, length[:]); {
	case err == io.EOF:
		return Hash{}, io.EOF
	case errors.Is(err, io.ErrUnexpectedEOF):
		s.offset += int64(n)
		return Hash{}, errTorn
	case err != nil:
		return Hash{}, err
	}
	s.offset += 4
	n := int(binary.BigEndian.Uint32(length[:]))
	if n < minBody || n > maxBody || (n-minBody)%block != 0 {
		return Hash{}, errors.New("length of the entry is impossible")
	}
	s.body = slices.Grow(s.body[:0], maxBody)[:n]
	if err := s.fill(s.body); err != nil {
		return Hash{}, err
	}
	var check [checkSize]byte
	if err := s.fill(check[:]); err != nil {
		return Hash{}, err
	}
	leaf := leafHash(&s.buf, s.body)
	if !bytes.Equal(check[:], leaf[:checkSize]) {
		return Hash{}, errors.New("entry was changed")
	}
	if number := binary.BigEndian.Uint64(s.body); number != s.number {
		return Hash{}, fmt.Errorf("entry %d is in its place", number)
	}
	s.number++
	return leaf, nil
}
