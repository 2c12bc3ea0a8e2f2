package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/enclave/helper"
	"github.com/kmsd-project/kmsd/enclave/keyfile"
	"github.com/kmsd-project/kmsd/enclave/keyring"
	"github.com/kmsd-project/kmsd/enclave/pkcs11"
	"github.com/kmsd-project/kmsd/enclave/recovery"
	"github.com/kmsd-project/kmsd/enclave/tpm"
	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/secmem"
)

// healthTimeout bounds how long one device may take to say how it is.
const healthTimeout = 3 * time.Second

// slotKeeper knows which device guards which slot, and does everything with slots that takes both. It is safe for concurrent use.
//
// Invariant: a slot is committed to the keystore only after its device has given the secret back.
//
// Invariant: when the slot that should open the store does not, no weaker one is tried unless somebody asks for it: on the spot, or in the
// configuration.
type slotKeeper struct {
	arena   *secmem.Arena
	log     *slog.Logger
	devices *devices
	pins    *pins
	homes   deviceConfig   // where new resident keys are made
	order   []string       // of unattended slots, from the configuration; nil when it says nothing
	attend  bool           // a person opens the store, always
	cache   *keyring.Cache // keeps what a person has opened; nil when nothing does
	offers  []string       // specs of what this machine may have, best first

	opened atomic.Pointer[keystore.Slot] // by which the store was unlocked last

	store atomic.Pointer[keystore.Store] // where resident keys find the devices of slots; nil while there is none

	mu     sync.Mutex
	tested map[[16]byte]bool           // slots, by UUID, that gave their secret back since the start of kmsd
	failed map[[16]byte]enclave.Health // those that did not, for a reason that their device does not show by itself
}

// newSlotKeeper returns a keeper. keyringState is the state directory of the file backend of the keyring.
func newSlotKeeper(c config, keyringState string, arena *secmem.Arena, dialer helper.Dialer, log *slog.Logger) *slotKeeper {
	var cache *keyring.Cache
	if keep, err := parseCache(c.Unlock.Cache); err == nil && keep > 0 {
		cache = &keyring.Cache{Timeout: keep}
	}
	devices := newDevices(keyringState, dialer, c.Devices, log)
	return &slotKeeper{
		arena: arena, log: log,
		devices: devices,
		pins:    newPINs(c.Devices, c.StateDir, devices.same, log),
		cache:   cache,
		homes:   c.Devices,
		order:   c.Unlock.Order,
		attend:  c.Unlock.Unattended != nil && !*c.Unlock.Unattended,
		offers:  offers(c.Mode),
		tested:  map[[16]byte]bool{},
		failed:  map[[16]byte]enclave.Health{},
	}
}

// Close ends the drivers.
func (k *slotKeeper) Close() error { return k.devices.Close() }

// guard returns the device that guards a slot.
func (k *slotKeeper) guard(slot keystore.Slot) (enclave.Enclave, error) {
	e, err := k.devices.at(slot.Location, slot.Binding)
	if f, ok := e.(*keyfile.Keyfile); ok { // its medium is found by what stands in the slot
		err = f.Expect(slot.Blob)
	}
	return e, err
}

// need is what it takes to open a slot, besides its device.
type need int

const (
	needsNobody need = iota
	needsPIN
	needsKey // a recovery key or shares
)

// needOf looks into the blob of a slot, not at its device. A blob that cannot be read is for its driver to complain about.
func needOf(slot keystore.Slot) need {
	switch slot.Kind {
	case recovery.Kind:
		return needsKey
	case pkcs11.Kind:
		return needsPIN
	case tpm.Kind:
		if d, err := tpm.Describe(slot.Blob); err == nil && d.PIN {
			return needsPIN
		}
	}
	return needsNobody
}

// mayStopToOpen reports whether an update of firmware or system can shut a slot.
func mayStopToOpen(slot keystore.Slot) bool {
	if slot.Kind != tpm.Kind {
		return false
	}
	d, err := tpm.Describe(slot.Blob)
	return err == nil && (len(d.PCRs) > 0 || len(d.Signer) > 0)
}

// remember notes that a slot gave its secret back.
func (k *slotKeeper) remember(uuid [16]byte) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.tested[uuid] = true
}

// outcome notes how the device of a slot took an attempt, until one succeeds. That a token was initialised anew under its old serial number, or that a PCR has
// changed, shows in nothing else.
func (k *slotKeeper) outcome(uuid [16]byte, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	switch {
	case err == nil:
		delete(k.failed, uuid)
	case errors.Is(err, enclave.ErrReplaced):
		k.failed[uuid] = enclave.Health{State: enclave.Replaced, Detail: inWords(wireError(err))}
	case errors.Is(err, enclave.ErrCorrupt), errors.Is(err, enclave.ErrPolicy):
		k.failed[uuid] = enclave.Health{State: enclave.Misconfigured, Detail: inWords(wireError(err))}
	}
}

// lastFailure is what outcome noted, if that still stands.
func (k *slotKeeper) lastFailure(uuid [16]byte) (enclave.Health, bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	h, ok := k.failed[uuid]
	return h, ok
}

// hasTested reports whether a slot that neither an update nor the loss of the TPM can shut was opened since kmsd was started.
func (k *slotKeeper) hasTested(s *keystore.Store) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, slot := range s.Slots() {
		if k.tested[slot.UUID] && slot.Kind != tpm.Kind {
			return true
		}
	}
	return false
}

// errNoWayBack refuses slots that an update may shut where nothing else would open the store then.
func errNoWayBack(detail string) error {
	return hinted{fmt.Errorf("%w: an update of firmware or system changes PCRs and shuts this slot, and %s", errSpec, detail),
		"prove with kmsctl slot test that a slot outside of the TPM opens, such as that of the recovery key"}
}

// remove takes a slot out of the keystore, which gives the store another root key and begins another epoch, and finishes that epoch.
// When the epoch cannot be finished now, the slot is gone all the same and a later rotation goes on with it.
// The warnings say what is left behind.
func (k *slotKeeper) remove(ctx context.Context, s *keystore.Store, id uint32) (warnings []string, err error) {
	slot, err := slotByID(s, id)
	if err != nil {
		return nil, err
	}
	fixed, moving := 0, 0
	for _, other := range s.Slots() {
		switch {
		case other.ID == id:
		case other.Kind != tpm.Kind:
			fixed++
		case mayStopToOpen(other):
			moving++
		}
	}
	if slot.Kind != tpm.Kind && moving > 0 && fixed == 0 {
		return nil, errNoWayBack(fmt.Sprintf("slot %d is the only one outside of the TPM", id))
	}
	if err := s.RemoveSlot(ctx, slot.ID); err != nil {
		return nil, err
	}
	e, err := k.guard(slot)
	if err == nil {
		err = k.forget(ctx, e, slot.Blob)
	}
	if err != nil {
		warnings = append(warnings, fmt.Sprintf("the device still holds what belonged to the slot; it opens nothing any more: %v", err))
	}
	if _, resident := e.(enclave.Resident); resident && !slices.ContainsFunc(s.Slots(), func(other keystore.Slot) bool { return k.devices.same(other.Location, slot.Location) }) {
		warnings = append(warnings, "there is no other slot of this device: keys that are resident in it may need one, or a line under [devices] in the configuration")
	}
	k.drop(slot)
	if w := k.unbind(ctx, s); w != "" {
		warnings = append(warnings, w)
	}
	if err := s.RotateEpoch(ctx, nil); err != nil {
		warnings = append(warnings, fmt.Sprintf("the key table is still to be sealed again (kmsctl store rotate-epoch): %v", err))
	}
	for _, w := range warnings {
		k.log.Warn(w, "slot", id)
	}
	return warnings, nil
}

// forget removes what a device holds for a blob. It is tidiness, so a failure is no more than something to be told.
func (k *slotKeeper) forget(ctx context.Context, e enclave.Enclave, b enclave.Blob) error {
	f, ok := e.(enclave.Forgetter)
	if !ok {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), healthTimeout)
	defer cancel()
	return f.Forget(ctx, b)
}

// test finds out whether a slot would open the store, and changes nothing.
func (k *slotKeeper) test(ctx context.Context, s *keystore.Store, id uint32, a enclave.Auth) error {
	if s.Locked() {
		return keystore.ErrLocked
	}
	slot, err := slotByID(s, id)
	if err != nil {
		return err
	}
	return k.unlockSlot(ctx, s, slot, attempt{Auth: a, Check: true})
}

func slotByID(s *keystore.Store, id uint32) (keystore.Slot, error) {
	for _, slot := range s.Slots() {
		if slot.ID == id {
			return slot, nil
		}
	}
	return keystore.Slot{}, hinted{fmt.Errorf("%w: %d", keystore.ErrNoSlot, id), "kmsctl slot list"}
}
