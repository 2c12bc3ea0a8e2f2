package audit

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"time"
)

// outbox is the way of entries that are committed together with the act they record. The act's transaction carries the
// entry, sealed by Seal; Copy brings it from there into the log.
//
// In the log an entry that came this way carries the tag of its sealed form. After a crash Copy goes on behind the tag
// that it finds last in the log, so that no entry is there twice.
type outbox struct {
	aead   cipher.AEAD // nil: locked
	tag    uint64      // of the entry copied last
	begun  bool        // Copy has run since the log was opened
	copied uint64      // Seq of the entry copied last
}

// Sealed is an entry of an outbox.
type Sealed struct {
	Seq  uint64 // grows with every entry
	Data []byte // from Seal
}

// Unlock gives the log the auditor's seed, at least 32 bytes. The first seed ever given makes the auditor's key; any
// other is refused with ErrKey. The log keeps of it only the key that seals the outbox, until Lock.
func (l *Log) Unlock(seed []byte) error {
	private, err := auditorKey(seed)
	if err != nil {
		return err
	}
	l.mu.Lock()
	known, begun := l.auditor, l.outbox.begun
	l.mu.Unlock()
	var tag uint64
	switch {
	case known == nil:
		if err := writeAuditor(l.dir, private.PublicKey()); err != nil {
			return fmt.Errorf("%w: %w", ErrStorage, err)
		}
	case !bytes.Equal(known.Bytes(), private.PublicKey().Bytes()):
		return ErrKey
	case !begun:
		l.fileMu.Lock()
		tag, err = lastTag(l.dir, private)
		l.fileMu.Unlock()
		if err != nil {
			return err
		}
	}
	key, err := hkdf.Key(sha256.New, seed, nil, "kmsd audit outbox v1", 32)
	if err != nil {
		return err
	}
	defer clear(key)
	b, err := aes.NewCipher(key)
	if err != nil {
		return err
	}
	aead, err := cipher.NewGCM(b)
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.auditor, l.outbox.aead = private.PublicKey(), aead
	if !l.outbox.begun {
		l.outbox.tag = tag
	}
	if len(l.queue.ends) > 0 {
		signal(l.wake)
	}
	return nil
}

// Lock forgets what Unlock gave. Append goes on working.
func (l *Log) Lock() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.outbox.aead = nil
}

// Seal encodes and encrypts e for an outbox. It returns ErrLocked when the log is locked.
func (l *Log) Seal(e *Entry) ([]byte, error) {
	l.mu.Lock()
	aead := l.outbox.aead
	l.mu.Unlock()
	if aead == nil {
		return nil, ErrLocked
	}
	nonce := make([]byte, aead.NonceSize(), aead.NonceSize()+maxEntry+tagSize)
	for sealedTag(nonce) == 0 {
		rand.Read(nonce)
	}
	return aead.Seal(nonce, nonce, appendEntry(nil, e, 0), nil), nil
}

// sealedTag is the tag of what Seal returned.
func sealedTag(data []byte) uint64 {
	if len(data) < 8 {
		return 0
	}
	return binary.BigEndian.Uint64(data)
}

// Copy brings entries, in the order of their Seq, into the log, except those that are there already, and returns when
// they are on disk. After the log was opened, the first call must be given everything that is in the outbox. The caller
// then removes the entries from the outbox; it does not matter when.
func (l *Log) Copy(ctx context.Context, entries []Sealed) error {
	if len(entries) == 0 {
		return nil
	}
	l.copyMu.Lock()
	defer l.copyMu.Unlock()
	l.mu.Lock()
	o := &l.outbox
	if o.aead == nil {
		l.mu.Unlock()
		return ErrLocked
	}
	first := 0
	for i := range entries {
		if o.begun && entries[i].Seq <= o.copied || !o.begun && o.tag != 0 && sealedTag(entries[i].Data) == o.tag {
			first = i + 1
		}
	}
	for i := first; i < len(entries); i++ {
		s := &entries[i]
		e := openSealed(o.aead, s.Data)
		if err := l.enqueue(&e, sealedTag(s.Data)); err != nil {
			l.mu.Unlock()
			return err
		}
		o.begun, o.copied, o.tag = true, s.Seq, sealedTag(s.Data)
	}
	o.begun, o.copied = true, max(o.copied, entries[len(entries)-1].Seq)
	f := l.wanted(true)
	l.mu.Unlock()
	return f.wait(ctx)
}

// openSealed returns the entry in data. One that cannot be read is not lost without a trace.
func openSealed(aead cipher.AEAD, data []byte) Entry {
	n := aead.NonceSize()
	if len(data) > n {
		if plain, err := aead.Open(nil, data[:n], data[n:], nil); err == nil {
			if e, _, err := parseEntry(plain); err == nil {
				return e
			}
		}
	}
	return Entry{Time: time.Now(), Op: "audit_outbox", Code: "damaged", Detail: "an act was recorded, but its entry cannot be read"}
}
