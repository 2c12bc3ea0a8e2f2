// Package keyfile guards a slot with a file on a removable medium: whoever has the medium opens the store, and a copy of the store
// without it is worthless. It is pure Go and runs inside kmsd.
//
// The file holds a random secret, under which the secret of the slot is sealed; what is on the medium opens nothing without the slot,
// and the other way round. The slot names the file system by its UUID and the file by its path inside of it, so the medium is found
// wherever it is mounted. A medium can be copied like any file: it is as good as the place where it is kept.
//
// Whoever wants the store to close when the medium is pulled asks Health every second or so: a medium that does not answer before the
// context is done is absent.
package keyfile

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"path/filepath"
	"strings"
	"sync"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/keystore/secmem"
)

// Kind is the kind of slots and blobs of this driver.
const Kind = "keyfile"

// Level is what a keyfile is worth, in honest words.
const Level = "medium: opens for whoever has the medium or a copy of it; protects the disk while the medium is elsewhere"

// The body of a blob of version 1:
//
//	sealed secret | id of the file (16) | length (1) and identity of the file system | length (2) and path inside it
const (
	blobVersion = 1
	maxIdentity = 96
	maxPath     = 1024
	sealLabel   = "kmsd keyfile v1"
)

const remedyAbsent = "plug in the medium with the keyfile and mount it"

const remedyLost = "open the store with another slot, then enrol a keyfile again with: kmsctl slot add keyfile:PATH"

// Keyfile is an enclave over one file. It implements enclave.Enclave.
//
// Invariant: at most one goroutine waits for the medium, which may never answer; whoever comes meanwhile waits with his context.
//
// Invariant: a keyfile is never overwritten.
type Keyfile struct {
	path   string
	system system
	token  chan struct{} // held while the medium is worked with

	mu       sync.Mutex
	slot     *slot // what was enrolled or expected last; nil when nothing is known but the path
	warnings []string
	closed   bool
}

// slot is a decoded blob.
type slot struct {
	file   [idSize]byte
	where  location
	sealed []byte
}

// Open returns the driver of the keyfile at an absolute path. It does not touch the medium, which need not be there.
func Open(path string) (*Keyfile, error) {
	if !filepath.IsAbs(path) || filepath.Clean(path) == "/" || len(path) > maxPath {
		return nil, &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: fmt.Sprintf("keyfile %q", path), Remedy: "give the absolute path of a file on the medium"}
	}
	return &Keyfile{path: filepath.Clean(path), system: theSystem(), token: make(chan struct{}, 1)}, nil
}

// Expect tells the driver which slot it is for, so that Health knows the medium before the first Unwrap.
func (k *Keyfile) Expect(b enclave.Blob) error {
	s, err := decode(b)
	if err != nil {
		return err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.slot = s
	return nil
}

// Info describes the keyfile. The binding is the identity of the file system and of the file.
func (k *Keyfile) Info() enclave.Info {
	k.mu.Lock()
	defer k.mu.Unlock()
	info := enclave.Info{Kind: Kind, Level: Level, Warnings: append([]string{}, k.warnings...)}
	if k.slot != nil {
		info.Binding = k.slot.where.identity + " " + hex.EncodeToString(k.slot.file[:8])
	}
	return info
}

// Wrap seals the secret under the one in the keyfile, which it makes if there is none. Several slots, of several stores too, can share a
// keyfile.
func (k *Keyfile) Wrap(ctx context.Context, secret, aad []byte) (enclave.Blob, error) {
	if len(secret) != enclave.SecretSize || len(aad) > enclave.MaxAAD {
		return nil, fmt.Errorf("secret of %d bytes with %d of associated data: %w", len(secret), len(aad), enclave.ErrUnsupported)
	}
	made, err := await(ctx, k, func() (found, error) { return k.system.enrol(k.path) })
	if err != nil {
		return nil, err
	}
	defer made.wipe()
	sealed, err := enclave.Seal(made.secret[:], sealLabel, secret, aad)
	if err != nil {
		return nil, err
	}
	s := &slot{file: made.id, where: made.where, sealed: sealed}
	k.mu.Lock()
	k.slot, k.warnings = s, made.warnings
	k.mu.Unlock()
	return s.encode()
}

// Unwrap opens a blob with the keyfile it names, wherever the medium is mounted. The Auth is not needed.
func (k *Keyfile) Unwrap(ctx context.Context, b enclave.Blob, aad []byte, _ enclave.Auth, dst []byte) error {
	if len(dst) != enclave.SecretSize || len(aad) > enclave.MaxAAD {
		return fmt.Errorf("destination of %d bytes with %d of associated data: %w", len(dst), len(aad), enclave.ErrUnsupported)
	}
	if err := k.usable(ctx); err != nil { // before a word about the blob
		return err
	}
	if err := k.Expect(b); err != nil {
		return err
	}
	s, err := decode(b)
	if err != nil {
		return err
	}
	got, err := await(ctx, k, func() (found, error) { return k.system.find(s.where) })
	if err != nil {
		return err
	}
	defer got.wipe()
	if got.id != s.file {
		return errExchanged()
	}
	return enclave.Open(got.secret[:], sealLabel, s.sealed, aad, dst)
}

// Health looks for the keyfile of the slot that was used or expected last, or at the path when none was.
func (k *Keyfile) Health(ctx context.Context) enclave.Health {
	k.mu.Lock()
	s := k.slot
	k.mu.Unlock()
	_, err := await(ctx, k, func() (f found, err error) {
		if s == nil {
			f, err = k.system.look(k.path)
		} else if f, err = k.system.find(s.where); err == nil && f.id != s.file {
			err = errExchanged()
		}
		f.wipe() // nobody needs it
		return f, err
	})
	return enclave.HealthOf(err)
}

// Close makes every later call fail. Work that waits for the medium is left to itself.
func (k *Keyfile) Close() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.closed = true
	return nil
}

func (k *Keyfile) usable(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.closed {
		return &enclave.Error{Kind: enclave.ErrAbsent, Detail: "the driver is closed"}
	}
	return nil
}

// await lets a goroutine of its own wait for the medium: reading from one that was pulled may take as long as it likes. What comes too
// late is wiped.
func await(ctx context.Context, k *Keyfile, work func() (found, error)) (found, error) {
	if err := k.usable(ctx); err != nil {
		return found{}, err
	}
	late := func() error {
		return &enclave.Error{Kind: enclave.ErrAbsent, Detail: "the medium does not answer", Remedy: "pull it and plug it in again", Cause: ctx.Err()}
	}
	select {
	case k.token <- struct{}{}:
	case <-ctx.Done():
		return found{}, late()
	}
	type result struct {
		found
		err error
	}
	done := make(chan result)
	go func() {
		defer func() { <-k.token }()
		secmem.Do(func() {
			var r result
			r.found, r.err = work()
			select {
			case done <- r:
			case <-ctx.Done():
			}
			r.wipe()
		})
	}()
	select {
	case r := <-done:
		return r.found, r.err
	case <-ctx.Done():
		return found{}, late()
	}
}

func errExchanged() error {
	return &enclave.Error{Kind: enclave.ErrReplaced, Detail: "another keyfile is in the place of the enrolled one", Remedy: remedyLost}
}

func (s *slot) encode() (enclave.Blob, error) {
	if len(s.where.identity) > maxIdentity || len(s.where.path) > maxPath {
		return nil, &enclave.Error{Kind: enclave.ErrUnsupported, Detail: "the path of the keyfile is too long"}
	}
	body := append([]byte{}, s.sealed...)
	body = append(body, s.file[:]...)
	body = append(body, byte(len(s.where.identity)))
	body = append(body, s.where.identity...)
	body = binary.BigEndian.AppendUint16(body, uint16(len(s.where.path)))
	body = append(body, s.where.path...)
	return enclave.EncodeBlob(Kind, blobVersion, body)
}

func decode(b enclave.Blob) (*slot, error) {
	version, body, err := enclave.DecodeBlob(Kind, b)
	if err != nil {
		return nil, err
	}
	if version != blobVersion {
		return nil, &enclave.Error{Kind: enclave.ErrUnsupported, Detail: fmt.Sprintf("keyfile slot of version %d", version),
			Remedy: "use the release of kmsd that made it, or a later one"}
	}
	corrupt := &enclave.Error{Kind: enclave.ErrCorrupt, Detail: fmt.Sprintf("keyfile slot of %d bytes", len(body))}
	if len(body) < enclave.SealedSize+idSize+1 {
		return nil, corrupt
	}
	s := &slot{sealed: append([]byte{}, body[:enclave.SealedSize]...)}
	body = body[enclave.SealedSize:]
	s.file = [idSize]byte(body)
	n, body := int(body[idSize]), body[idSize+1:]
	if n > maxIdentity || len(body) < n+2 {
		return nil, corrupt
	}
	s.where.identity, body = string(body[:n]), body[n:]
	n, body = int(binary.BigEndian.Uint16(body)), body[2:]
	if n > maxPath || len(body) != n {
		return nil, corrupt
	}
	s.where.path = string(body)
	if !s.where.valid() {
		return nil, corrupt
	}
	return s, nil
}

// location is where a file is, whatever the file system is mounted on.
type location struct {
	identity string // of the file system: "uuid:..." or "fsid:..."
	path     string // inside the file system, absolute: /keys/kmsd.key
}

// valid reports whether the path is one that cannot lead anywhere else.
func (l location) valid() bool {
	return l.identity != "" && filepath.IsAbs(l.path) && filepath.Clean(l.path) == l.path && l.path != "/" && !strings.ContainsRune(l.path, 0)
}
