package keystore

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"filippo.io/age"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/keystore/secmem"
)

const (
	backupMagic  = "kmsd-backup\r\n\x1a\x00\x00"
	backupFormat = 1

	maxManifest = 16 << 20
	maxDigest   = 1 << 10 // bytes of audit head and of policy digest
)

// BackupOptions says for whom a backup is, and what its manifest records besides.
type BackupOptions struct {
	Recipients   []age.Recipient // besides the escrow recipients of the store
	AuditHead    []byte
	PolicyDigest []byte
}

// Manifest describes a backup. It is inside the encryption.
type Manifest struct {
	ID                  [16]byte // of this backup, random
	StoreID, InstanceID [16]byte // of the store that was backed up
	Created             time.Time
	Epoch               uint32
	Generation          uint64
	Sequence            uint64 // commits of the store until then
	Keys                uint64
	AuditHead           []byte
	PolicyDigest        []byte
	Escrow              []string
	Guarded             []GuardedNamespace // by name; the keys of those without escrow can be used only with their device
}

// Backup writes the whole store to w, encrypted to the escrow recipients of the store and to those in o. The store lists it in Info
// from then on. Commits wait while the database is copied; writing to w happens afterwards. What the recipients'
// identities open is everything: whoever has one needs no slot. A backup does not show who made it.
func (s *Store) Backup(ctx context.Context, w io.Writer, o BackupOptions) (Manifest, error) {
	if len(o.AuditHead) > maxDigest || len(o.PolicyDigest) > maxDigest {
		return Manifest{}, fmt.Errorf("%w: audit head or policy digest", ErrTooLarge)
	}
	recipients, err := parseRecipients(s.header.Load().escrow)
	if err != nil {
		return Manifest{}, err
	}
	if recipients = append(recipients, o.Recipients...); len(recipients) == 0 {
		return Manifest{}, fmt.Errorf("%w: a backup needs a recipient", ErrInvalid)
	}
	if err := ctx.Err(); err != nil {
		return Manifest{}, err
	}
	m := Manifest{Created: s.config.now().UTC().Truncate(time.Second), AuditHead: o.AuditHead, PolicyDigest: o.PolicyDigest}
	random(m.ID[:])
	var database *os.File
	var keys []byte
	defer func() { clear(keys) }()
	err = s.submit(&job{run: func() error {
		if err := s.listBackup(&m); err != nil {
			return err
		}
		s.mu.RLock()
		if s.secrets == nil {
			s.mu.RUnlock()
			return ErrLocked
		}
		secmem.Do(func() { keys = s.secrets.encode() })
		h, state := s.header.Load(), s.snapshot.Load()
		guarded, err := s.guarded(state)
		s.mu.RUnlock()
		if err != nil {
			s.config.log().Warn("some guarded namespaces may be missing from the manifest of the backup", "error", err)
		}
		m.Guarded = guarded
		m.StoreID, m.InstanceID, m.Escrow = h.storeID, h.instanceID, slices.Clone(h.escrow)
		m.Epoch, m.Generation, m.Sequence, m.Keys = state.epoch, state.generation, state.sequence, state.keys
		// Only the writer goroutine, which is here, replaces or closes the database.
		database, err = s.copyDatabase()
		return err
	}})
	if err != nil {
		return Manifest{}, err
	}
	defer database.Close()
	encrypted, err := age.Encrypt(w, recipients...)
	if err != nil {
		return Manifest{}, fmt.Errorf("backup: %w", err)
	}
	if err := writeBackup(ctx, encrypted, &m, keys, database); err != nil {
		return Manifest{}, err
	}
	if err := encrypted.Close(); err != nil {
		return Manifest{}, fmt.Errorf("backup: %w", err)
	}
	return m, nil
}

// listBackup adds the backup to those the store knows of. It runs on the writer goroutine.
func (s *Store) listBackup(m *Manifest) error {
	return s.changeHeader(func(h *header, _ *secrets) error {
		state := s.snapshot.Load()
		h.addBackup(Backup{ID: m.ID, Created: m.Created, Epoch: state.epoch, Sequence: state.sequence, Keys: state.keys})
		return nil
	})
}

// parseRecipients reads native age recipients, classic ("age1...") or hybrid ("age1pq1..."). age refuses to mix the two in one file,
// and so does this.
func parseRecipients(list []string) ([]age.Recipient, error) {
	if len(list) == 0 {
		return nil, nil
	}
	recipients, err := age.ParseRecipients(strings.NewReader(strings.Join(list, "\n")))
	if err == nil && len(recipients) != len(list) {
		err = errors.New("one recipient each")
	}
	if err == nil {
		_, err = age.Encrypt(io.Discard, recipients...)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: escrow recipients: %w", ErrInvalid, err)
	}
	return recipients, nil
}

// copyDatabase returns a copy of the database that has no name any more.
func (s *Store) copyDatabase() (*os.File, error) {
	path := filepath.Join(s.config.Dir, snapshotFile)
	os.Remove(path)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrStorage, err)
	}
	os.Remove(path)
	err = guard(func() error {
		return s.db.View(func(tx *bolt.Tx) error {
			_, err := tx.WriteTo(f)
			return err
		})
	})
	if err == nil {
		_, err = f.Seek(0, io.SeekStart)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("%w: %w", ErrStorage, err)
	}
	return f, nil
}

// A backup is, inside age's encryption: magic, format, manifest, keys, the size of the database, the database, SHA-256 of all that.

func writeBackup(ctx context.Context, w io.Writer, m *Manifest, keys []byte, database *os.File) error {
	info, err := database.Stat()
	if err != nil {
		return fmt.Errorf("%w: %w", ErrStorage, err)
	}
	sum := sha256.New()
	out := io.MultiWriter(w, sum)
	e := &encoder{}
	e.raw([]byte(backupMagic))
	e.u16(backupFormat)
	e.bytes32(m.encode())
	e.bytes32(keys)
	e.u64(uint64(info.Size()))
	_, err = out.Write(e.b)
	clear(e.b)
	if err == nil {
		_, err = io.Copy(out, &contextReader{ctx, database})
	}
	if err == nil {
		_, err = w.Write(sum.Sum(nil))
	}
	if err != nil {
		return fmt.Errorf("backup: %w", err)
	}
	return nil
}

// contextReader ends with the context.
type contextReader struct {
	ctx context.Context
	r   io.Reader
}

func (r *contextReader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.r.Read(p)
}

func (m *Manifest) encode() []byte {
	e := &encoder{}
	e.raw(m.ID[:])
	e.raw(m.StoreID[:])
	e.raw(m.InstanceID[:])
	e.time(m.Created)
	e.u32(m.Epoch)
	e.u64(m.Generation)
	e.u64(m.Sequence)
	e.u64(m.Keys)
	e.bytes16(m.AuditHead)
	e.bytes16(m.PolicyDigest)
	e.u8(uint8(len(m.Escrow)))
	for _, r := range m.Escrow {
		e.str16(r)
	}
	e.u32(uint32(len(m.Guarded)))
	for _, g := range m.Guarded {
		e.str8(g.Name)
		e.str8(string(g.Escrow))
	}
	e.extensions(nil)
	return e.b
}

func decodeManifest(b []byte) (Manifest, error) {
	d := &decoder{b: b}
	var m Manifest
	d.fixed(m.ID[:])
	d.fixed(m.StoreID[:])
	d.fixed(m.InstanceID[:])
	m.Created = d.time()
	m.Epoch = d.u32()
	m.Generation = d.u64()
	m.Sequence = d.u64()
	m.Keys = d.u64()
	m.AuditHead = slices.Clone(d.bytes16())
	m.PolicyDigest = slices.Clone(d.bytes16())
	for range d.u8() {
		m.Escrow = append(m.Escrow, d.str16())
	}
	for range d.u32() {
		if d.err != nil {
			break
		}
		m.Guarded = append(m.Guarded, GuardedNamespace{Name: d.str8(), Escrow: keyspec.Escrow(d.str8())})
	}
	d.extensions()
	if err := d.end(); err != nil {
		return Manifest{}, fmt.Errorf("%w: manifest %w", ErrBackup, err)
	}
	return m, nil
}

// encode returns the keys that do not depend on the root key.
func (k *secrets) encode() []byte {
	e := &encoder{b: make([]byte, 0, 128)}
	e.raw(k.lifetime.Bytes())
	e.u8(uint8(len(k.epochs)))
	for _, x := range k.epochs {
		e.u32(x.number)
		e.raw(x.key.Bytes())
	}
	return e.b
}

// decodeSecrets reads what encode wrote and adds a new root key.
func decodeSecrets(a *secmem.Arena, b []byte) (_ *secrets, err error) {
	k := &secrets{}
	defer func() {
		if err != nil {
			k.free()
		}
	}()
	if k.root, err = randomBuffer(a); err != nil {
		return nil, err
	}
	if k.lifetime, err = a.Alloc(keySize); err != nil {
		return nil, err
	}
	d := &decoder{b: b}
	d.fixed(k.lifetime.Bytes())
	n := d.u8()
	if n < 1 || n > 2 {
		d.fail(errors.New("has no epoch, or too many"))
	}
	for range n {
		if d.err != nil {
			break
		}
		key, err := a.Alloc(keySize)
		if err != nil {
			return nil, err
		}
		k.epochs = append(k.epochs, epochSecret{d.u32(), key})
		d.fixed(key.Bytes())
	}
	if err := d.end(); err != nil {
		return nil, fmt.Errorf("%w: keys: %w", ErrBackup, err)
	}
	return k, k.deriveFrom(a)
}

// unpacked is a backup that was decrypted, its database in a file.
type unpacked struct {
	manifest Manifest
	keys     *secrets
}

// unpack decrypts a backup and writes its database to path.
func unpack(ctx context.Context, r io.Reader, ids []age.Identity, a *secmem.Arena, path string) (_ *unpacked, err error) {
	plain, err := age.Decrypt(&contextReader{ctx, r}, ids...)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrBackup, err)
	}
	sum := sha256.New()
	in := &summingReader{plain, sum}
	head := make([]byte, len(backupMagic)+2)
	if _, err := io.ReadFull(in, head); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrBackup, err)
	}
	if !bytes.HasPrefix(head, []byte(backupMagic)) {
		return nil, fmt.Errorf("%w: it is something else", ErrBackup)
	}
	if f := int(head[len(head)-2])<<8 | int(head[len(head)-1]); f != backupFormat {
		return nil, fmt.Errorf("%w: backup format %d", ErrNewer, f)
	}
	b, err := readSized(in, maxManifest)
	if err != nil {
		return nil, err
	}
	u := &unpacked{}
	if u.manifest, err = decodeManifest(b); err != nil {
		return nil, err
	}
	if b, err = readSized(in, 1024); err != nil {
		return nil, err
	}
	secmem.Do(func() { u.keys, err = decodeSecrets(a, b) })
	clear(b)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			u.keys.free()
			os.Remove(path)
		}
	}()
	size := make([]byte, 8)
	if _, err := io.ReadFull(in, size); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrBackup, err)
	}
	n := (&decoder{b: size}).u64()
	if n > 1<<50 {
		return nil, fmt.Errorf("%w: database of %d bytes", ErrBackup, n)
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrStorage, err)
	}
	_, err = io.CopyN(f, in, int64(n))
	if err == nil {
		err = f.Sync()
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrBackup, err)
	}
	want := sum.Sum(nil)
	tail, err := io.ReadAll(io.LimitReader(plain, sha256.Size+1))
	if err == nil && !bytes.Equal(tail, want) {
		err = errors.New("its digest is wrong")
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrBackup, err)
	}
	return u, nil
}

type summingReader struct {
	r   io.Reader
	sum hash.Hash
}

func (r *summingReader) Read(p []byte) (int, error) {
	n, err := r.r.Read(p)
	r.sum.Write(p[:n])
	return n, err
}

// readSized reads a byte string behind a length of four bytes.
func readSized(r io.Reader, most uint32) ([]byte, error) {
	size := make([]byte, 4)
	if _, err := io.ReadFull(r, size); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrBackup, err)
	}
	n := (&decoder{b: size}).u32()
	if n > most {
		return nil, fmt.Errorf("%w: a part of %d bytes", ErrBackup, n)
	}
	b, err := io.ReadAll(io.LimitReader(r, int64(n)))
	if err == nil && uint32(len(b)) < n {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrBackup, err)
	}
	return b, nil
}

// VerifyBackup decrypts a backup into a new directory below scratch, checks every record in it, and removes the directory. It
// returns ErrBackup if the backup is not whole, or if a record in it is damaged. What a device guards it checks as far as the
// identities open it: see Manifest.Guarded. The protected memory it needs is its own.
func VerifyBackup(ctx context.Context, r io.Reader, ids []age.Identity, scratch string) (Manifest, error) {
	dir, err := os.MkdirTemp(scratch, "kmsd-verify-")
	if err != nil {
		return Manifest{}, fmt.Errorf("%w: %w", ErrStorage, err)
	}
	defer os.RemoveAll(dir)
	arena, err := secmem.NewArena(secmem.MinArena)
	if err != nil {
		return Manifest{}, err
	}
	defer arena.Close()
	slot := NewSlot{Kind: "verification", Secret: make([]byte, secretSize)}
	random(slot.Secret)
	s, m, err := Restore(ctx, r, ids, Config{Dir: dir, Arena: arena}, []NewSlot{slot})
	if err != nil {
		return Manifest{}, err
	}
	defer s.Close()
	for i := range m.Guarded {
		m.Guarded[i].Opened = s.openEscrowed(m.Guarded[i].Name, ids)
	}
	report, err := s.Verify(ctx, nil)
	if err != nil {
		return Manifest{}, err
	}
	if len(report.Damaged) > 0 {
		return Manifest{}, fmt.Errorf("%w: %d records in it are damaged, the first: %s %s", ErrBackup, len(report.Damaged), report.Damaged[0].Ref, report.Damaged[0].Text)
	}
	if report.Keys != m.Keys {
		return Manifest{}, fmt.Errorf("%w: it has %d keys, its manifest says %d", ErrBackup, report.Keys, m.Keys)
	}
	return m, nil
}

// Restore makes a store from a backup, with a new root key, new slots and a new instance id, and returns it unlocked. It never
// replaces a store: it returns ErrStoreExists if there is one. Damaged records in the backup are damaged in the store too; Verify
// lists them.
func Restore(ctx context.Context, r io.Reader, ids []age.Identity, c Config, slots []NewSlot) (*Store, Manifest, error) {
	if err := checkDir(c.Dir); err != nil {
		return nil, Manifest{}, err
	}
	if exists, err := Exists(c.Dir); err != nil || exists {
		return nil, Manifest{}, errors.Join(err, fmt.Errorf("%w in %s", ErrStoreExists, c.Dir))
	}
	temp := filepath.Join(c.Dir, restoredFile)
	os.Remove(temp)
	defer os.Remove(temp)
	u, err := unpack(ctx, r, ids, c.Arena, temp)
	if err != nil {
		return nil, Manifest{}, err
	}
	m := u.manifest
	h := &header{
		storeID: m.StoreID, created: c.now().UTC().Truncate(time.Second), generation: m.Generation, nextSlot: 1, escrow: m.Escrow,
	}
	h.addBackup(Backup{ID: m.ID, Created: m.Created, Epoch: m.Epoch, Sequence: m.Sequence, Keys: m.Keys})
	random(h.instanceID[:])
	s, err := create(ctx, c, h, u.keys, slots, func(path string) error {
		if err := os.Rename(temp, path); err != nil {
			return fmt.Errorf("%w: %w", ErrStorage, err)
		}
		return nil
	})
	if err != nil {
		u.keys.free()
		return nil, Manifest{}, err
	}
	return s, m, nil
}
