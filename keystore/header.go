package keystore

import (
	"bytes"
	"crypto/hpke"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// Format is the number of the store format this release writes.
const Format = 1

const (
	headerMagic = "kmsd-keystore\r\n\x1a"
	suite       = 1 // AES-256-GCM, HMAC-SHA-256, HKDF-SHA-256, HPKE MLKEM768-X25519

	maxHeader  = 4 << 20
	maxSlots   = keyspec.MaxSlots
	maxBlob    = 60 << 10
	maxEscrow  = keyspec.MaxRecipients
	maxWords   = 255 // bytes of a slot's kind, label, binding and level
	maxBackups = 32  // that are listed
	secretSize = 32
	wrapSize   = keySize + sealOverhead
)

// header is the content of the header file: what opens the store, and nothing that tells what is in it.
//
// Invariant: everything in it is covered by a MAC under a key derived from the root key, so once the store is unlocked the header
// is known to be the work of someone who could unlock it.
type header struct {
	storeID, instanceID [16]byte
	created             time.Time
	// generation counts the changes of the header. The head in the database carries the same number. pending says that the
	// header with this number was written before the database followed.
	generation  uint64
	pending     bool
	nextSlot    uint32
	epochs      []wrappedEpoch // the current one first, then the previous one while a rotation runs
	lifetime    [wrapSize]byte
	counter     *binding // to a counter that tells old copies, nil for none; never modified, but replaced
	escrow      []string
	backupsMade uint64   // ever, so that it shows when some are no longer listed
	backups     []Backup // the last ones, oldest first
	slots       []slotRecord
	extensions  []extension
}

type wrappedEpoch struct {
	number uint32
	key    [wrapSize]byte
}

// slotRecord is a slot as the header has it.
//
// Invariant: a slot opens no store but the one it was enrolled for. That the root key opens says nothing about who sealed it, since
// anybody can seal to a public key; the enrolment tag can be made only by who has the slot's secret and the store's lifetime key.
type slotRecord struct {
	Slot
	public    []byte   // HPKE public key
	enrolment [32]byte // see enrolmentTag
	sealed    []byte   // the root key, sealed to public
	mac       [32]byte // of all but sealed, under a key derived from the root key
}

// encode returns the file's content. root is the root key.
func (h *header) encode(root []byte) []byte {
	e := &encoder{}
	e.raw([]byte(headerMagic))
	e.u16(Format)
	e.u16(suite)
	e.raw(h.storeID[:])
	e.raw(h.instanceID[:])
	e.time(h.created)
	e.u64(h.generation)
	e.flag(h.pending)
	e.u32(h.nextSlot)
	e.u8(uint8(len(h.epochs)))
	for _, w := range h.epochs {
		e.u32(w.number)
		e.raw(w.key[:])
	}
	e.raw(h.lifetime[:])
	h.counter.encode(e)
	e.u8(uint8(len(h.escrow)))
	for _, r := range h.escrow {
		e.str16(r)
	}
	e.u64(h.backupsMade)
	e.u8(uint8(len(h.backups)))
	for i := range h.backups {
		h.backups[i].encode(e)
	}
	e.u8(uint8(len(h.slots)))
	for i := range h.slots {
		s := &h.slots[i]
		s.encode(e)
		e.bytes16(s.sealed)
		e.raw(s.mac[:])
	}
	e.extensions(h.extensions)
	tag := h.mac(root, e.b)
	e.raw(tag[:])
	sum := sha256.Sum256(e.b)
	e.raw(sum[:])
	return e.b
}

// encode appends the part of a slot that its MAC covers.
func (s *slotRecord) encode(e *encoder) {
	e.u32(s.ID)
	e.raw(s.UUID[:])
	e.str8(s.Kind)
	e.str8(s.Label)
	e.str8(s.Binding)
	e.str8(s.Level)
	e.str16(s.Location)
	e.time(s.Created)
	e.bytes16(s.public)
	e.bytes16(s.Blob)
	e.raw(s.enrolment[:])
}

func (h *header) mac(root, content []byte) [32]byte {
	var key [keySize]byte
	derive(key[:], root, "kmsd header v1")
	defer clear(key[:])
	return mac(key[:], content)
}

func (h *header) slotMAC(root []byte, s *slotRecord) [32]byte {
	var key [keySize]byte
	derive(key[:], root, "kmsd slot mac v1")
	defer clear(key[:])
	e := &encoder{}
	s.encode(e)
	return mac(key[:], h.storeID[:], e.b)
}

// enrolmentTag ties a slot to the store it is made for. The lifetime key never changes, so the tag outlives every rotation, which
// has no slot secret at hand to make another.
func (h *header) enrolmentTag(s *slotRecord, secret, lifetime []byte) [32]byte {
	var key [keySize]byte
	derive(key[:], secret, "kmsd slot binding v1")
	defer clear(key[:])
	sum := sha256.Sum256(lifetime)
	defer clear(sum[:])
	return mac(key[:], h.storeID[:], s.UUID[:], sum[:])
}

// checkEnrolment returns ErrForeign unless the slot, whose secret this is, was enrolled for the store with this lifetime key.
func (h *header) checkEnrolment(s *slotRecord, secret, lifetime []byte) error {
	if want := h.enrolmentTag(s, secret, lifetime); !sameMAC(want[:], s.enrolment[:]) {
		return fmt.Errorf("%w: slot %d", ErrForeign, s.ID)
	}
	return nil
}

// decodeHeader parses a header file. Its checksum tells accidents; only verify, once the root key is known, tells intent.
func decodeHeader(b []byte) (*header, error) {
	if len(b) > maxHeader {
		return nil, fmt.Errorf("%w: header of %d bytes", ErrDamaged, len(b))
	}
	if len(b) < len(headerMagic)+2 || string(b[:len(headerMagic)]) != headerMagic {
		return nil, fmt.Errorf("%w: the header file is not one", ErrDamaged)
	}
	if f := uint16(b[len(headerMagic)])<<8 | uint16(b[len(headerMagic)+1]); f > Format {
		return nil, fmt.Errorf("%w: store format %d", ErrNewer, f)
	}
	if len(b) < len(headerMagic)+64 {
		return nil, fmt.Errorf("%w: header: %w", ErrDamaged, errShort)
	}
	body, sum := b[:len(b)-sha256.Size], b[len(b)-sha256.Size:]
	if got := sha256.Sum256(body); !bytes.Equal(got[:], sum) {
		return nil, fmt.Errorf("%w: the header's checksum is wrong", ErrDamaged)
	}
	d := &decoder{b: body[:len(body)-32]}
	h := &header{}
	d.take(len(headerMagic))
	if f, s := d.u16(), d.u16(); f != Format || s != suite {
		d.fail(fmt.Errorf("%w: format %d, suite %d", ErrNewer, f, s))
	}
	d.fixed(h.storeID[:])
	d.fixed(h.instanceID[:])
	h.created = d.time()
	h.generation = d.u64()
	h.pending = d.flag()
	h.nextSlot = d.u32()
	n := int(d.u8())
	if n < 1 || n > 2 {
		d.fail(errors.New("has no epoch, or too many"))
	}
	for range n {
		w := wrappedEpoch{number: d.u32()}
		d.fixed(w.key[:])
		h.epochs = append(h.epochs, w)
	}
	d.fixed(h.lifetime[:])
	h.counter = decodeBinding(d)
	n = int(d.u8())
	if n > maxEscrow {
		d.fail(errors.New("has too many escrow recipients"))
	}
	for range n {
		h.escrow = append(h.escrow, d.str16())
	}
	h.backupsMade = d.u64()
	n = int(d.u8())
	if n > maxBackups || uint64(n) > h.backupsMade {
		d.fail(errors.New("lists too many backups"))
	}
	for range n {
		h.backups = append(h.backups, decodeBackup(d))
	}
	n = int(d.u8())
	if n > maxSlots {
		d.fail(errors.New("has too many slots"))
	}
	for range n {
		if d.err != nil {
			break
		}
		s := slotRecord{}
		s.ID = d.u32()
		d.fixed(s.UUID[:])
		s.Kind, s.Label, s.Binding, s.Level = d.str8(), d.str8(), d.str8(), d.str8()
		if s.Location = d.str16(); len(s.Location) > keyspec.MaxLocation {
			d.fail(errors.New("has a slot with too long a location"))
		}
		s.Created = d.time()
		s.public = slices.Clone(d.bytes16())
		s.Blob = slices.Clone(d.bytes16())
		d.fixed(s.enrolment[:])
		s.sealed = slices.Clone(d.bytes16())
		d.fixed(s.mac[:])
		h.slots = append(h.slots, s)
	}
	h.extensions = d.extensions()
	if err := d.end(); err != nil {
		return nil, fmt.Errorf("%w: header: %w", ErrDamaged, err)
	}
	return h, nil
}

// verify checks the MAC of the header file b, and those of the slots, against the root key.
func (h *header) verify(b, root []byte) error {
	end := len(b) - sha256.Size
	want := h.mac(root, b[:end-32])
	if !sameMAC(want[:], b[end-32:end]) {
		return fmt.Errorf("%w: the header was changed by someone without the root key", ErrDamaged)
	}
	for i := range h.slots {
		want := h.slotMAC(root, &h.slots[i])
		if !sameMAC(want[:], h.slots[i].mac[:]) {
			return fmt.Errorf("%w: slot %d was changed by someone without the root key", ErrDamaged, h.slots[i].ID)
		}
	}
	return nil
}

// clone returns a copy that can be changed without touching h.
func (h *header) clone() *header {
	c := *h
	c.epochs = slices.Clone(h.epochs)
	c.escrow = slices.Clone(h.escrow)
	c.backups = slices.Clone(h.backups)
	c.slots = slices.Clone(h.slots)
	c.extensions = slices.Clone(h.extensions)
	return &c
}

func (h *header) slot(id uint32) *slotRecord {
	for i := range h.slots {
		if h.slots[i].ID == id {
			return &h.slots[i]
		}
	}
	return nil
}

// addBackup lists a backup, and drops the oldest if there are too many.
func (h *header) addBackup(b Backup) {
	h.backupsMade++
	h.backups = append(h.backups, b)
	h.backups = h.backups[max(0, len(h.backups)-maxBackups):]
}

// addSlot appends a slot that opens the root key in k, tied to the lifetime key in k.
func (h *header) addSlot(n NewSlot, k *secrets, now time.Time) (*slotRecord, error) {
	if len(n.Secret) != secretSize {
		return nil, fmt.Errorf("%w: a slot secret has %d bytes", ErrInvalid, secretSize)
	}
	if len(n.Kind) > maxWords || len(n.Label) > maxWords || len(n.Binding) > maxWords || len(n.Level) > maxWords || len(n.Location) > keyspec.MaxLocation || len(n.Blob) > maxBlob {
		return nil, fmt.Errorf("%w: slot", ErrTooLarge)
	}
	if len(h.slots) >= maxSlots {
		return nil, fmt.Errorf("%w: a store has at most %d slots", ErrTooLarge, maxSlots)
	}
	private, err := hpke.MLKEM768X25519().NewPrivateKey(n.Secret)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrSecret, err)
	}
	s := slotRecord{public: private.PublicKey().Bytes()}
	s.Slot = Slot{
		ID: h.nextSlot, UUID: n.UUID, Kind: n.Kind, Label: n.Label, Binding: n.Binding, Level: n.Level, Location: n.Location,
		Blob: slices.Clone(n.Blob), Created: now.UTC().Truncate(time.Second),
	}
	s.enrolment = h.enrolmentTag(&s, n.Secret, k.lifetime.Bytes())
	if err := h.sealRoot(&s, k.root.Bytes()); err != nil {
		return nil, err
	}
	h.nextSlot++
	h.slots = append(h.slots, s)
	return &h.slots[len(h.slots)-1], nil
}

// slotInfo binds a sealed root key to its store and slot.
func (h *header) slotInfo(s *slotRecord) []byte {
	info := append([]byte("kmsd slot v1"), h.storeID[:]...)
	return append(info, s.UUID[:]...)
}

// sealRoot seals root to the slot's public key (RFC 9180 section 6.1, base mode), which needs no device, and renews the slot's MAC.
func (h *header) sealRoot(s *slotRecord, root []byte) error {
	public, err := hpke.MLKEM768X25519().NewPublicKey(s.public)
	if err != nil {
		return fmt.Errorf("%w: public key of slot %d: %w", ErrDamaged, s.ID, err)
	}
	s.sealed, err = hpke.Seal(public, hpke.HKDFSHA256(), hpke.AES256GCM(), h.slotInfo(s), root)
	if err != nil {
		return err
	}
	s.mac = h.slotMAC(root, s)
	return nil
}

// openRoot writes the root key to dst, given the slot's secret.
func (h *header) openRoot(dst []byte, s *slotRecord, secret []byte) error {
	if len(secret) != secretSize {
		return fmt.Errorf("%w: it has %d bytes", ErrSecret, len(secret))
	}
	private, err := hpke.MLKEM768X25519().NewPrivateKey(secret)
	if err != nil {
		return ErrSecret
	}
	root, err := hpke.Open(private, hpke.HKDFSHA256(), hpke.AES256GCM(), h.slotInfo(s), s.sealed)
	if err != nil || len(root) != keySize {
		return ErrSecret
	}
	copy(dst, root)
	clear(root)
	return nil
}

// wrapAAD binds a wrapped key to its store and purpose.
func (h *header) wrapAAD(purpose string, number uint32) []byte {
	e := &encoder{b: []byte("kmsd wrap v1")}
	e.raw(h.storeID[:])
	e.str8(purpose)
	e.u32(number)
	return e.b
}

// wrap seals the 32-byte key under a key derived from the root key.
func (h *header) wrap(root, key []byte, purpose string, number uint32) (out [wrapSize]byte) {
	var kek [keySize]byte
	derive(kek[:], root, "kmsd wrap v1")
	defer clear(kek[:])
	newGCM(kek[:]).Seal(out[:0], nil, key, h.wrapAAD(purpose, number))
	return out
}

// unwrap writes the key that wrap sealed to dst, which has 32 bytes.
func (h *header) unwrap(dst, root, wrapped []byte, purpose string, number uint32) error {
	var kek [keySize]byte
	derive(kek[:], root, "kmsd wrap v1")
	defer clear(kek[:])
	key, err := newGCM(kek[:]).Open(nil, nil, wrapped, h.wrapAAD(purpose, number))
	if err != nil {
		return fmt.Errorf("%w: the %s key does not open", ErrDamaged, purpose)
	}
	copy(dst, key)
	clear(key)
	return nil
}
