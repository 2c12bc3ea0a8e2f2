// Package keyring guards a slot with the keyring of the operating system, through github.com/99designs/keyring. That library starts
// processes when it is merely imported, so it is linked into the helper program kmsd-keyring alone; this package holds everything else:
// the driver that runs in the helper, the care that the library's file backend needs, and the daemon's side.
//
// A keyring only keeps bytes. Wrap therefore stores a random secret in it, under a random name, and seals the slot secret under that:
// what the keyring holds opens nothing without the blob in the keystore, and the other way round.
package keyring

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"sync"

	"github.com/kmsd-project/kmsd/enclave"
)

// ErrNoItem is returned by Items.Get for an item that is not there.
var ErrNoItem = errors.New("the keyring has no such item")

// Items is a keyring. It is called by one goroutine at a time. Errors are those of package enclave, or ErrNoItem.
type Items interface {
	// Put stores data under a new name and returns when it will survive a loss of power.
	Put(ctx context.Context, name string, data []byte) error
	// Get returns what is stored under name.
	Get(ctx context.Context, name string) ([]byte, error)
	// Remove removes what is stored under name; nothing there is no error.
	Remove(ctx context.Context, name string) error
	// Binding identifies this very keyring, as eight bytes; zero while it holds nothing. Another keyring in the same place has another.
	Binding(ctx context.Context) ([bindingSize]byte, error)
	// Health looks at the keyring.
	Health(ctx context.Context) enclave.Health
	// Close releases the keyring.
	Close() error
}

// The body of a blob of version 1:
//
//	name of the item (16) | binding of the keyring (8) | sealed secret
const (
	blobVersion = 1
	nameSize    = 16
	bindingSize = 8
	bodySize    = nameSize + bindingSize + enclave.SealedSize
	itemSize    = 32 // bytes of the random secret in the keyring
	sealLabel   = "kmsd keyring v1"
)

// remedyLost says what to do when what the keyring held is lost.
func remedyLost(kind string) string {
	return "open the store with the recovery key, then enrol this machine again with: kmsctl slot add " + kind
}

// Driver is an enclave over a keyring. It implements enclave.Enclave and enclave.Forgetter.
type Driver struct {
	kind, level string

	// token serialises access to the keyring; a call that waits for it still ends with its context.
	token chan struct{}
	items Items // nil once closed; guarded by token

	mu      sync.Mutex
	binding string
}

// New returns the driver of a kind of keyring, which it takes over.
func New(kind, level string, items Items) *Driver {
	return &Driver{kind: kind, level: level, items: items, token: make(chan struct{}, 1)}
}

// Info describes the keyring as it was when it was last used.
func (d *Driver) Info() enclave.Info {
	d.mu.Lock()
	defer d.mu.Unlock()
	return enclave.Info{Kind: d.kind, Level: d.level, Binding: d.binding}
}

// begin waits for the keyring. The caller calls end unless there is an error.
func (d *Driver) begin(ctx context.Context) (Items, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	select {
	case d.token <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if d.items == nil {
		d.end()
		return nil, &enclave.Error{Kind: enclave.ErrAbsent, Detail: "the driver is closed"}
	}
	return d.items, nil
}

func (d *Driver) end() { <-d.token }

// Wrap stores a new random secret in the keyring, reads it back, and seals the slot secret under it.
func (d *Driver) Wrap(ctx context.Context, secret, aad []byte) (enclave.Blob, error) {
	items, err := d.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer d.end()
	body := make([]byte, nameSize, bodySize)
	rand.Read(body)
	item := make([]byte, itemSize)
	defer clear(item)
	rand.Read(item)
	sealed, err := enclave.Seal(item, sealLabel, secret, aad)
	if err != nil {
		return nil, err
	}
	name := hex.EncodeToString(body)
	if err := items.Put(ctx, name, item); err != nil {
		return nil, err
	}
	back, err := items.Get(ctx, name)
	defer clear(back)
	if err == nil && subtle.ConstantTimeCompare(back, item) != 1 {
		err = &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: "the keyring does not return what was stored"}
	}
	var binding [bindingSize]byte
	if err == nil {
		binding, err = d.look(ctx, items)
	}
	if err != nil {
		items.Remove(context.WithoutCancel(ctx), name)
		return nil, typed(err)
	}
	body = append(body, binding[:]...)
	body = append(body, sealed...)
	return enclave.EncodeBlob(d.kind, blobVersion, body)
}

// Unwrap opens a blob with what the keyring holds. The Auth is not needed.
func (d *Driver) Unwrap(ctx context.Context, b enclave.Blob, aad []byte, _ enclave.Auth, dst []byte) error {
	items, err := d.begin(ctx)
	if err != nil {
		return err
	}
	defer d.end()
	body, err := d.decode(b)
	if err != nil {
		return err
	}
	binding, err := d.look(ctx, items)
	if err != nil {
		return typed(err)
	}
	if enrolled := [bindingSize]byte(body[nameSize:]); binding != enrolled {
		return &enclave.Error{Kind: enclave.ErrReplaced, Detail: fmt.Sprintf("the slot was enrolled with keyring %x, this is %s", enrolled, describe(binding)), Remedy: remedyLost(d.kind)}
	}
	item, err := items.Get(ctx, hex.EncodeToString(body[:nameSize]))
	defer clear(item)
	if errors.Is(err, ErrNoItem) {
		return &enclave.Error{Kind: enclave.ErrReplaced, Cause: err, Remedy: remedyLost(d.kind)}
	}
	if err != nil {
		return typed(err)
	}
	if len(item) != itemSize {
		return &enclave.Error{Kind: enclave.ErrCorrupt, Detail: fmt.Sprintf("keyring item of %d bytes", len(item)), Remedy: remedyLost(d.kind)}
	}
	return enclave.Open(item, sealLabel, body[nameSize+bindingSize:], aad, dst)
}

// Forget removes the item of a blob.
func (d *Driver) Forget(ctx context.Context, b enclave.Blob) error {
	items, err := d.begin(ctx)
	if err != nil {
		return err
	}
	defer d.end()
	body, err := d.decode(b)
	if err != nil {
		return err
	}
	return typed(items.Remove(ctx, hex.EncodeToString(body[:nameSize])))
}

// Health looks at the keyring.
func (d *Driver) Health(ctx context.Context) enclave.Health {
	items, err := d.begin(ctx)
	if err != nil {
		return enclave.HealthOf(err)
	}
	defer d.end()
	h := items.Health(ctx)
	if h.State == enclave.Ready {
		if _, err := d.look(ctx, items); err != nil {
			return enclave.HealthOf(err)
		}
	}
	return h
}

// Close releases the keyring. It waits for the call that is using it.
func (d *Driver) Close() error {
	d.token <- struct{}{}
	defer d.end()
	if d.items == nil {
		return nil
	}
	err := d.items.Close()
	d.items = nil
	return err
}

// look asks the keyring who it is, and remembers that for Info.
func (d *Driver) look(ctx context.Context, items Items) ([bindingSize]byte, error) {
	b, err := items.Binding(ctx)
	if err != nil {
		return b, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.binding = ""
	if b != [bindingSize]byte{} {
		d.binding = hex.EncodeToString(b[:])
	}
	return b, nil
}

func (d *Driver) decode(b enclave.Blob) ([]byte, error) {
	version, body, err := enclave.DecodeBlob(d.kind, b)
	if err != nil {
		return nil, err
	}
	if version != blobVersion {
		return nil, &enclave.Error{Kind: enclave.ErrUnsupported, Detail: fmt.Sprintf("keyring slot of version %d", version),
			Remedy: "use the release of kmsd that made it, or a later one"}
	}
	if len(body) != bodySize {
		return nil, &enclave.Error{Kind: enclave.ErrCorrupt, Detail: fmt.Sprintf("keyring slot of %d bytes", len(body))}
	}
	return body, nil
}

func describe(binding [bindingSize]byte) string {
	if binding == [bindingSize]byte{} {
		return "an empty one"
	}
	return fmt.Sprintf("%x", binding)
}

// typed gives errors of a keyring that are not of package enclave a sentinel.
func typed(err error) error {
	var e *enclave.Error
	switch {
	case err == nil, errors.As(err, &e), errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	case errors.Is(err, ErrNoItem):
		return &enclave.Error{Kind: enclave.ErrReplaced, Cause: err}
	}
	return &enclave.Error{Kind: enclave.ErrMisconfigured, Cause: err}
}
