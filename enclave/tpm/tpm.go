// Package tpm guards slots and keys with a TPM 2.0, through /dev/tpmrm0, /dev/tpm0 or the socket of swtpm.
//
// A slot is guarded in one of two ways. Sealed (hardware symmetric key): a random value is sealed in the TPM under its storage key, and
// the slot secret is encrypted in software under that value and bound to its associated data. Agreed (key agreement): the TPM makes an
// ECDH key, software agrees on a value with its public half, and only the TPM can agree on it again; the value never enters the TPM.
//
// Either way the TPM asks for a random value that stands in the blob, for a PIN, for unchanged PCRs, or for PCRs that a signer has approved.
// PCRs only make sense with another slot that was tested: firmware updates change them.
//
// What a TPM protects against is the theft of the disk. It does not protect against root on the same machine, who can ask it like kmsd
// does. A software TPM protects as well as its state directory: a copy of that opens everything.
//
// Somebody who can change what goes over the bus learns nothing and changes nothing, since every session is salted to the storage key of the
// TPM, whose name is pinned. The first enrolment pins it, and so relies on nobody being there; endorsement certificates are not looked at.
//
// What is not promised: keys are not destroyed by destroying their blob. A blob and its PIN open as long as the TPM is not cleared, even
// after the PIN was changed or the slot removed; only another root key makes an old copy of the store worthless.
package tpm

import (
	"context"
	"crypto"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/kmsd-project/kmsd/enclave"
)

// Kind is the kind of slots and blobs of this driver.
const Kind = "tpm"

// Guard is the way in which a slot is guarded.
type Guard string

// The ways of guarding.
const (
	Sealed Guard = "sealed" // a value sealed in the TPM
	Agreed Guard = "agreed" // ECDH with a key of the TPM
)

// MinPIN is the length of the shortest PIN in bytes. The TPM allows a handful of attempts, so it need not be long.
const MinPIN = 4

// Config says which TPM, and how new slots are made. Existing slots carry in their blobs how they were made.
type Config struct {
	Device        string // /dev/tpmrm0, /dev/tpm0 or unix:PATH
	Binding       string // name of the storage key in hex, from the slot; empty before the first enrolment
	OwnerPassword []byte // of the TPM's owner hierarchy; nearly always empty

	Guard     Guard            // Sealed when empty
	PIN       []byte           // new slots ask for this PIN, and the TPM counts wrong ones
	AsksPIN   bool             // existing slots have a PIN; see Describe. Implied by PIN
	PCRs      []int            // new slots want these PCRs of the SHA-256 bank as they are now
	Signer    crypto.PublicKey // new slots want PCRs approved by this key: *ecdsa.PublicKey on P-256 or *rsa.PublicKey of 2048 or 3072 bits
	Approvals string           // file of approvals, read at each unlock
}

// TPM is the enclave. It implements enclave.Enclave, enclave.Resident and enclave.Counter.
//
// Invariant: one goroutine talks to the device. Calls hand it their work and wait for the answer or for their context.
type TPM struct {
	address address
	config  Config // mu guards the bytes of PIN
	signer  []byte // SPKI of config.Signer
	jobs    chan *job
	life    context.Context // done when the driver is closed
	end     context.CancelFunc
	gone    chan struct{} // closed when the goroutine has ended

	mu       sync.Mutex
	hurry    bool   // links are to be interrupted
	link     link   // what Close interrupts
	name     []byte // of the storage key, once seen or configured
	warnings []string
}

// Open checks the configuration and returns the driver. It does not touch the device: a TPM that is not there is for Health to say.
func Open(c Config) (*TPM, error) { return open(c, address.dial) }

// open takes how to dial as an argument, for tests that stand between the driver and its device.
func open(c Config, dial func(address) (link, error)) (*TPM, error) {
	a, err := parseDevice(c.Device)
	if err != nil {
		return nil, err
	}
	t := &TPM{address: a, config: c, jobs: make(chan *job), gone: make(chan struct{})}
	if err := t.check(); err != nil {
		return nil, err
	}
	t.life, t.end = context.WithCancel(context.Background())
	t.config.PIN = slices.Clone(c.PIN)
	t.config.OwnerPassword = slices.Clone(c.OwnerPassword)
	go t.serve(&device{
		dial:    func() (link, error) { return dial(a) },
		managed: a.managed(),
		owner:   t.config.OwnerPassword,
		pinned:  t.name,
		learned: t.learned,
		linked:  t.linked,
	})
	return t, nil
}

func (t *TPM) check() error {
	c := &t.config
	misconfigured := func(format string, args ...any) error {
		return &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: fmt.Sprintf(format, args...)}
	}
	if c.Binding != "" {
		name, err := hex.DecodeString(c.Binding)
		if err != nil || len(name) != nameSize {
			return misconfigured("%q is not the name of a storage key", c.Binding)
		}
		t.name = name
	}
	if c.Guard == "" {
		c.Guard = Sealed
	}
	if c.Guard != Sealed && c.Guard != Agreed {
		return misconfigured("way of guarding %q", c.Guard)
	}
	if n := len(c.PIN); n > 0 && n < MinPIN || n > maxPIN {
		return misconfigured("PIN of %d bytes: it has %d to %d", n, MinPIN, maxPIN)
	}
	if slices.ContainsFunc(c.OwnerPassword, func(b byte) bool { return b == 0 }) || len(c.OwnerPassword) > authSize {
		return misconfigured("an owner password has at most %d bytes, none of them zero", authSize)
	}
	if len(c.PCRs) > 0 && c.Signer != nil {
		return misconfigured("either fixed PCRs or a signer of PCRs")
	}
	if _, err := newPCRs(c.PCRs); err != nil {
		return misconfigured("PCRs: %v", err)
	}
	if c.Signer != nil {
		spki, err := x509.MarshalPKIXPublicKey(c.Signer)
		if err == nil {
			_, err = signerPublic(c.Signer)
		}
		if err != nil {
			return misconfigured("signer of PCRs: %v", err)
		}
		t.signer = spki
		if c.Approvals == "" {
			return misconfigured("a signer of PCRs needs the file of its approvals")
		}
	}
	return nil
}

// NeedsRecovery reports whether slots made with this configuration may stop to open by an update of firmware or system, so that nobody
// should make one without another slot that was tested.
func (t *TPM) NeedsRecovery() bool { return len(t.config.PCRs) > 0 || t.config.Signer != nil }

// Info describes the TPM; the binding is known once it was configured or the device was used.
func (t *TPM) Info() enclave.Info {
	t.mu.Lock()
	defer t.mu.Unlock()
	info := enclave.Info{
		Kind:     Kind,
		Level:    "tpm: the store opens on this machine only; not protected against root on it",
		Binding:  hex.EncodeToString(t.name),
		NeedsYou: t.config.AsksPIN || len(t.config.PIN) > 0,
		Warnings: slices.Clone(t.warnings),
	}
	if t.address.socket {
		info.Level = "software tpm: as safe as the directory of its state; a copy of that opens the store"
	}
	if info.NeedsYou {
		info.Warnings = append(info.Warnings, "the TPM counts every loss of power after a PIN was used as a wrong PIN, and may lock out for a while")
	}
	if t.NeedsRecovery() {
		info.Warnings = append(info.Warnings, "updates of firmware or system change PCRs: keep another slot that was tested")
	}
	if !t.address.managed() && !t.address.socket {
		info.Warnings = append(info.Warnings, t.address.path+" is for one program at a time: use /dev/tpmrm0")
	}
	return info
}

// Close ends what is under way at its next command, and releases the device. A device that hangs is let go after a moment. Closing twice is
// harmless.
func (t *TPM) Close() error {
	t.end()
	select {
	case <-t.gone:
		return nil
	case <-time.After(500 * time.Millisecond):
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.hurry = true
	if t.link != nil {
		t.link.Interrupt()
	}
	return nil
}

// forget wipes the PIN for new slots and the password of the owner.
func (t *TPM) forget() {
	t.mu.Lock()
	defer t.mu.Unlock()
	clear(t.config.PIN)
	clear(t.config.OwnerPassword)
}

func (t *TPM) learned(name []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.name == nil {
		t.name = slices.Clone(name)
	}
}

func (t *TPM) linked(l link) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.link = l
	if l != nil && t.hurry {
		l.Interrupt()
	}
}

// serve is the goroutine that owns the device. It keeps the link as long as there is work, and then lets others have the device.
func (t *TPM) serve(d *device) {
	defer close(t.gone)
	defer t.forget()
	defer d.leave()
	keep := idleAlone
	switch {
	case t.address.socket:
		keep = idleSocket
	case d.managed:
		keep = idleManaged
	}
	idle := time.NewTimer(keep)
	defer idle.Stop()
	for {
		select {
		case <-t.life.Done():
			return
		case j := <-t.jobs:
			err := d.do(j)
			j.wipe()
			j.deliver(err)
			idle.Reset(keep)
		case <-idle.C:
			d.leave()
		}
	}
}

// call has f run by the owner of the device and returns what it returns. When the context is done first, the result is dropped, and wiped
// if it is bytes. f may be run again after a failure, and may run on after call has returned, so it uses nothing that its caller may change
// or wipe: secrets that f uses are handed over to call, which wipes them when f does not need them any more.
func call[T any](ctx context.Context, t *TPM, f func(d *device) (T, error), secrets ...[]byte) (T, error) {
	var none, v T
	j := &job{secrets: secrets}
	if t.closed() {
		j.wipe()
		return none, errClosed()
	}
	if err := ctx.Err(); err != nil {
		j.wipe()
		return none, err
	}
	done, left := make(chan error), make(chan struct{})
	defer close(left)
	working, stop := context.WithCancel(ctx)
	defer stop()
	defer context.AfterFunc(t.life, stop)()
	j.ctx = working
	j.run = func(d *device) (err error) {
		v, err = f(d)
		return err
	}
	j.deliver = func(err error) {
		select {
		case done <- err:
		case <-left:
			if b, ok := any(v).([]byte); ok {
				clear(b)
			}
		}
	}
	select {
	case t.jobs <- j:
	case <-ctx.Done():
		j.wipe()
		return none, ctx.Err()
	case <-t.life.Done():
		j.wipe()
		return none, errClosed()
	}
	select {
	case err := <-done:
		if err != nil && ctx.Err() == nil && t.closed() {
			return none, errClosed()
		}
		if err != nil {
			return none, err
		}
		return v, nil
	case <-ctx.Done():
		return none, ctx.Err()
	case <-t.gone:
		return none, errClosed()
	}
}

func (t *TPM) closed() bool { return t.life.Err() != nil }

func errClosed() error {
	return &enclave.Error{Kind: enclave.ErrAbsent, Detail: "the TPM driver is closed"}
}
