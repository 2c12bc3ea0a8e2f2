package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/subtle"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode"

	"filippo.io/age"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/enclave/helper"
	"github.com/kmsd-project/kmsd/enclave/keyring"
	"github.com/kmsd-project/kmsd/enclave/recovery"
	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/secmem"
)

// errSpec is wrapped by errors about what an administrator asked for.
var errSpec = errors.New("invalid request for a slot")

// The kinds of enclaves that can be asked for, besides those that slots carry.
const (
	specAuto   = "auto"
	specShares = "recovery:shares"
)

// healthTimeout bounds how long one device may take to say how it is.
const healthTimeout = 3 * time.Second

// slotKeeper knows which enclave guards which slot, and does everything with slots that takes both. It is safe for concurrent use.
//
// Invariant: a slot is committed to the keystore only after its device has given the secret back.
//
// Invariant: when the slot that should open the store does not, no weaker one is tried unless somebody asks for it.
type slotKeeper struct {
	arena *secmem.Arena
	log   *slog.Logger

	mu       sync.Mutex
	enclaves map[string]enclave.Enclave // by kind, those that are shared by all their slots
}

// newSlotKeeper returns a keeper. keyringState is the state directory of the file backend of the keyring.
func newSlotKeeper(keyringState string, arena *secmem.Arena, dialer helper.Dialer, log *slog.Logger) *slotKeeper {
	return &slotKeeper{
		arena: arena,
		log:   log,
		// The recovery driver has no device and no state: one serves all.
		enclaves: map[string]enclave.Enclave{keyring.FileKind: keyring.DialFile(dialer, keyringState), recovery.Kind: recovery.New()},
	}
}

// Close ends the drivers.
func (k *slotKeeper) Close() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	var errs []error
	for _, e := range k.enclaves {
		errs = append(errs, e.Close())
	}
	return errors.Join(errs...)
}

// guard returns the enclave that guards slots of a kind.
func (k *slotKeeper) guard(kind string) (enclave.Enclave, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if e := k.enclaves[kind]; e != nil {
		return e, nil
	}
	return nil, unsupportedKind(kind)
}

// unsupportedKind is the error for a kind that this release does not have. Slots of later releases meet it as well.
func unsupportedKind(kind string) error {
	switch family, _, _ := strings.Cut(kind, ":"); family {
	case "tpm", "pkcs11", "keyring", "keyfile":
		return &enclave.Error{Kind: enclave.ErrUnsupported, Detail: fmt.Sprintf("this release of kmsd has no enclave %q", kind), Remedy: "use keyring:file"}
	}
	return fmt.Errorf("%w: no enclave is called %q; there are auto, keyring:file and recovery", errSpec, kind)
}

// strength orders kinds by what they protect against, best first. Kinds of the same strength may stand in for each other.
func strength(kind string) int {
	switch family, _, _ := strings.Cut(kind, ":"); family {
	case "tpm", "pkcs11":
		return 0
	case "keyring":
		return 1
	case "keyfile":
		return 2
	}
	return 3
}

// guardChoice is one enclave that can be had on this machine.
type guardChoice struct {
	Spec, Level string
	Health      enclave.Health
}

// choices lists what this machine has, best first.
func (k *slotKeeper) choices(ctx context.Context) []guardChoice {
	ctx, cancel := context.WithTimeout(ctx, healthTimeout)
	defer cancel()
	var list []guardChoice
	for _, spec := range []string{keyring.FileKind, recovery.Kind} {
		e, err := k.guard(spec)
		if err != nil {
			continue
		}
		list = append(list, guardChoice{Spec: spec, Level: e.Info().Level, Health: e.Health(ctx)})
	}
	return list
}

// enrolment is slots whose devices have proved that they give the secrets back, before they are in a keystore.
type enrolment struct {
	keeper  *slotKeeper
	slots   []keystore.NewSlot
	buffers []*secmem.Buffer
	escrow  []string

	// recovery is what must be shown once: the text of the recovery key, or the shares.
	recovery [][]byte
}

// initParams says what a new keystore shall be guarded by.
type initParams struct {
	Enclave    string // empty means auto
	NoRecovery bool
	PIN        []byte
	EscrowTo   []string // age recipients
}

// create makes a keystore. The recovery key is nil when none was wanted; the caller wipes it.
func (k *slotKeeper) create(ctx context.Context, c keystore.Config, p initParams) (*keystore.Store, []byte, error) {
	n, err := k.prepare(ctx, p)
	if err != nil {
		return nil, nil, err
	}
	defer n.close()
	s, err := n.commit(ctx, c)
	if err != nil {
		n.abort(ctx)
		return nil, nil, err
	}
	if len(n.recovery) == 0 {
		return s, nil, nil
	}
	return s, n.recovery[0], nil
}

// prepare enrols the slots of a new keystore, without making it.
func (k *slotKeeper) prepare(ctx context.Context, p initParams) (_ *enrolment, err error) {
	spec := p.Enclave
	if spec == "" || spec == specAuto {
		spec = keyring.FileKind
	}
	if err := checkRecipients(p.EscrowTo); err != nil {
		return nil, err
	}
	if spec == recovery.Kind && p.NoRecovery {
		return nil, fmt.Errorf("%w: a keystore that only the recovery key opens needs one", errSpec)
	}
	n := &enrolment{keeper: k, escrow: p.EscrowTo}
	defer func() {
		if err != nil {
			n.abort(ctx)
			n.close()
		}
	}()
	if spec != recovery.Kind {
		if err := n.enrolDevice(ctx, spec, "", p.PIN); err != nil {
			return nil, err
		}
	} else if len(p.PIN) > 0 {
		return nil, fmt.Errorf("%w: %s takes no PIN", errSpec, spec)
	}
	if !p.NoRecovery {
		if err := n.enrolKey(ctx, ""); err != nil {
			return nil, err
		}
	}
	return n, nil
}

// commit makes the keystore.
func (n *enrolment) commit(ctx context.Context, c keystore.Config) (*keystore.Store, error) {
	return keystore.Create(ctx, c, n.slots, n.escrow)
}

// enrolDevice adds a slot that a device guards.
func (n *enrolment) enrolDevice(ctx context.Context, kind, label string, pin []byte) error {
	e, err := n.keeper.guard(kind)
	if err != nil {
		return err
	}
	if len(pin) > 0 {
		return fmt.Errorf("%w: %s takes no PIN", errSpec, kind)
	}
	return n.enrol(ctx, e, kind, cmp.Or(label, "this machine"), enclave.Auth{})
}

// enrolKey adds a slot with a new recovery key.
func (n *enrolment) enrolKey(ctx context.Context, label string) error {
	key := recovery.NewKey()
	text := key.Text()
	e := recovery.ForKey(key)
	defer e.Close()
	n.recovery = [][]byte{text}
	return n.enrol(ctx, e, recovery.Kind, cmp.Or(label, "recovery key"), enclave.Auth{Secret: text})
}

// enrolShares adds a slot with a new recovery key of which only shares exist.
func (n *enrolment) enrolShares(ctx context.Context, label string, threshold, shares int) error {
	key, parts, err := recovery.Split(threshold, shares)
	if err != nil {
		return fmt.Errorf("%w: %w", errSpec, err)
	}
	e := recovery.ForShares(key, threshold, shares)
	defer e.Close()
	for _, p := range parts {
		n.recovery = append(n.recovery, p.Text())
		p.Wipe()
	}
	// The last ones: should the count of shares ever be wrong, the first threshold of them would still work.
	return n.enrol(ctx, e, recovery.Kind, cmp.Or(label, fmt.Sprintf("%d of %d recovery shares", threshold, shares)), enclave.Auth{Shares: n.recovery[shares-threshold:]})
}

// enrol makes a slot secret, gives it to the enclave and has it back before the slot counts.
func (n *enrolment) enrol(ctx context.Context, e enclave.Enclave, kind, label string, a enclave.Auth) error {
	secret, err := n.keeper.arena.Alloc(enclave.SecretSize)
	if err != nil {
		return err
	}
	n.buffers = append(n.buffers, secret)
	check, err := n.keeper.arena.Alloc(enclave.SecretSize)
	if err != nil {
		return err
	}
	defer check.Free()
	rand.Read(secret.Bytes())
	slot := keystore.NewSlot{Kind: kind, Label: label, Secret: secret.Bytes()}
	rand.Read(slot.UUID[:])
	aad := enclave.SlotAAD(slot.UUID)
	var blob enclave.Blob
	secmem.Do(func() { blob, err = e.Wrap(ctx, secret.Bytes(), aad) })
	if err != nil {
		return fmt.Errorf("enrol %s: %w", kind, err)
	}
	secmem.Do(func() { err = e.Unwrap(ctx, blob, aad, a, check.Bytes()) })
	if err == nil && subtle.ConstantTimeCompare(secret.Bytes(), check.Bytes()) != 1 {
		err = &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: "the device does not give back what it was given"}
	}
	if err != nil {
		n.keeper.forget(ctx, e, blob)
		return fmt.Errorf("try the new slot of %s: %w", kind, err)
	}
	info := e.Info()
	slot.Blob, slot.Level, slot.Binding = blob, info.Level, info.Binding
	n.slots = append(n.slots, slot)
	return nil
}

// abort lets the devices forget the slots, which have not become part of a keystore.
func (n *enrolment) abort(ctx context.Context) {
	for _, s := range n.slots {
		if e, err := n.keeper.guard(s.Kind); err == nil {
			n.keeper.forget(ctx, e, s.Blob)
		}
	}
	for _, text := range n.recovery {
		clear(text)
	}
	n.recovery = nil
}

// close wipes the slot secrets.
func (n *enrolment) close() {
	for _, b := range n.buffers {
		b.Free()
	}
	n.buffers = nil
}

// forget removes what a device holds for a blob. It is tidiness, so a failure is only logged.
func (k *slotKeeper) forget(ctx context.Context, e enclave.Enclave, b enclave.Blob) {
	f, ok := e.(enclave.Forgetter)
	if !ok {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), healthTimeout)
	defer cancel()
	if err := f.Forget(ctx, b); err != nil {
		k.log.Warn("a device still holds the item of a slot that is gone", "error", err)
	}
}

// checkRecipients refuses escrow recipients that no backup could be encrypted to.
func checkRecipients(recipients []string) error {
	for _, r := range recipients {
		if strings.ContainsAny(r, "\r\n") {
			return fmt.Errorf("%w: an escrow recipient is one line", errSpec)
		}
		if _, err := age.ParseRecipients(strings.NewReader(r)); err != nil {
			return fmt.Errorf("%w: escrow recipient %q is none of age", errSpec, r)
		}
	}
	return nil
}

// unlockUnattended opens the store by the best of its slots that need nobody. ErrLocked says that there is none.
func (k *slotKeeper) unlockUnattended(ctx context.Context, s *keystore.Store) error {
	var candidates []keystore.Slot
	for _, slot := range s.Slots() {
		e, err := k.guard(slot.Kind)
		if err == nil && e.Info().NeedsYou {
			continue
		}
		// A slot that this release cannot use is still the best one, and hides the weaker ones.
		candidates = append(candidates, slot)
	}
	if len(candidates) == 0 {
		return &enclave.Error{Kind: enclave.ErrLocked, Detail: "every slot of the keystore", Remedy: "kmsctl unlock"}
	}
	slices.SortStableFunc(candidates, func(a, b keystore.Slot) int { return strength(a.Kind) - strength(b.Kind) })
	var first error
	for _, slot := range candidates {
		if strength(slot.Kind) != strength(candidates[0].Kind) {
			break
		}
		err := k.unlockSlot(ctx, s, slot, enclave.Auth{})
		if err == nil {
			return nil
		}
		if first == nil {
			first = err
		}
	}
	return first
}

// unlock opens the store by one slot. With slot 0 it is the unattended ones, or the one that the recovery key or the shares in a
// belong to.
func (k *slotKeeper) unlock(ctx context.Context, s *keystore.Store, id uint32, a enclave.Auth) error {
	if id == 0 && len(a.Secret) == 0 && len(a.Shares) == 0 {
		return k.unlockUnattended(ctx, s)
	}
	slot, err := findSlot(s, id, a)
	if err != nil {
		return err
	}
	return k.unlockSlot(ctx, s, slot, a)
}

// findSlot returns the slot with the id or, when that is 0, the one that the recovery key or the shares name.
func findSlot(s *keystore.Store, id uint32, a enclave.Auth) (keystore.Slot, error) {
	slots := s.Slots()
	if id != 0 {
		for _, slot := range slots {
			if slot.ID == id {
				return slot, nil
			}
		}
	}
	if id != 0 || len(a.Secret) == 0 && len(a.Shares) == 0 {
		return keystore.Slot{}, fmt.Errorf("%w: %d", keystore.ErrNoSlot, id)
	}
	owner, err := ownerOf(a)
	if err != nil {
		return keystore.Slot{}, &enclave.Error{Kind: enclave.ErrAuth, Cause: err, Remedy: "compare what you typed with the printed key, group by group"}
	}
	for _, slot := range slots {
		if slot.Kind == recovery.Kind {
			if have, _, err := recovery.Owner(slot.Blob); err == nil && have == owner {
				return slot, nil
			}
		}
	}
	return keystore.Slot{}, &enclave.Error{Kind: enclave.ErrAuth, Detail: fmt.Sprintf("no slot of this keystore belongs to recovery key %s", owner),
		Remedy: "look for the key with the number that status shows, or that of the right machine"}
}

// ownerOf returns the number of the recovery key that somebody typed, or typed shares of.
func ownerOf(a enclave.Auth) (string, error) {
	if len(a.Shares) > 0 {
		share, err := recovery.ParseShare(a.Shares[0])
		if err != nil {
			return "", err
		}
		defer share.Wipe()
		return share.ID(), nil
	}
	key, err := recovery.ParseKey(a.Secret)
	if err != nil {
		return "", err
	}
	defer key.Wipe()
	return key.ID(), nil
}

// unlockSlot opens the store by this slot and no other.
func (k *slotKeeper) unlockSlot(ctx context.Context, s *keystore.Store, slot keystore.Slot, a enclave.Auth) error {
	secret, err := k.open(ctx, slot, a)
	if err != nil {
		return err
	}
	defer secret.Free()
	if err := s.Unlock(ctx, slot.ID, secret.Bytes()); err != nil {
		return fmt.Errorf("slot %d: %w", slot.ID, err)
	}
	return nil
}

// open has the enclave of a slot give the slot's secret back. The caller frees it.
func (k *slotKeeper) open(ctx context.Context, slot keystore.Slot, a enclave.Auth) (*secmem.Buffer, error) {
	e, err := k.guard(slot.Kind)
	if err != nil {
		return nil, fmt.Errorf("slot %d: %w", slot.ID, err)
	}
	secret, err := k.arena.Alloc(enclave.SecretSize)
	if err != nil {
		return nil, err
	}
	secmem.Do(func() { err = e.Unwrap(ctx, slot.Blob, enclave.SlotAAD(slot.UUID), a, secret.Bytes()) })
	if err != nil {
		secret.Free()
		return nil, fmt.Errorf("slot %d (%s): %w", slot.ID, slot.Kind, err)
	}
	return secret, nil
}

// slotStatus is a slot and how its device is.
type slotStatus struct {
	keystore.Slot
	Health enclave.Health
}

// list returns the slots in their order, each with its health. It takes no longer than healthTimeout.
func (k *slotKeeper) list(ctx context.Context, s *keystore.Store) []slotStatus {
	ctx, cancel := context.WithTimeout(ctx, healthTimeout)
	defer cancel()
	slots := s.Slots()
	result := make([]slotStatus, len(slots))
	var wg sync.WaitGroup
	for i, slot := range slots {
		wg.Go(func() { result[i] = slotStatus{slot, k.health(ctx, slot)} })
	}
	wg.Wait()
	return result
}

// health looks at the device of a slot. A healthy device that is bound to something else than the slot has been replaced.
func (k *slotKeeper) health(ctx context.Context, slot keystore.Slot) enclave.Health {
	e, err := k.guard(slot.Kind)
	if err != nil {
		return enclave.Health{State: enclave.Misconfigured, Detail: err.Error()}
	}
	h := e.Health(ctx)
	if h.State == enclave.Ready && slot.Kind != recovery.Kind && slot.Binding != e.Info().Binding {
		return enclave.Health{State: enclave.Replaced, Detail: "this is not the device that was enrolled; open the store with the recovery key and enrol this one"}
	}
	return h
}

// addParams says what a new slot of a keystore shall be.
type addParams struct {
	Enclave, Label    string
	PIN               []byte
	Threshold, Shares uint32 // for recovery:shares
}

// add enrols a slot, and returns what must be shown once: the recovery key, or the shares. The caller wipes that.
func (k *slotKeeper) add(ctx context.Context, s *keystore.Store, p addParams) (keystore.Slot, [][]byte, error) {
	if strings.ContainsFunc(p.Label, unicode.IsControl) {
		return keystore.Slot{}, nil, fmt.Errorf("%w: the label holds a control character", errSpec)
	}
	n := &enrolment{keeper: k}
	defer n.close()
	var err error
	switch p.Enclave {
	case recovery.Kind, specShares:
		if len(p.PIN) > 0 {
			return keystore.Slot{}, nil, fmt.Errorf("%w: %s takes no PIN", errSpec, p.Enclave)
		}
		if p.Enclave == recovery.Kind {
			err = n.enrolKey(ctx, p.Label)
		} else {
			err = n.enrolShares(ctx, p.Label, int(min(p.Threshold, recovery.MaxShares+1)), int(min(p.Shares, recovery.MaxShares+1)))
		}
	case "", specAuto:
		err = n.enrolDevice(ctx, keyring.FileKind, p.Label, p.PIN)
	default:
		err = n.enrolDevice(ctx, p.Enclave, p.Label, p.PIN)
	}
	var slot keystore.Slot
	if err == nil {
		slot, err = s.AddSlot(ctx, n.slots[0])
	}
	if err != nil {
		n.abort(ctx)
		return keystore.Slot{}, nil, err
	}
	return slot, n.recovery, nil
}

// remove takes a slot out of the keystore, which gives the store another root key and begins another epoch, and finishes that epoch.
// When the epoch cannot be finished now, the slot is gone all the same and a later rotation goes on with it.
func (k *slotKeeper) remove(ctx context.Context, s *keystore.Store, id uint32) error {
	slot, err := findSlot(s, id, enclave.Auth{})
	if err != nil {
		return err
	}
	if err := s.RemoveSlot(ctx, slot.ID); err != nil {
		return err
	}
	if e, err := k.guard(slot.Kind); err == nil {
		k.forget(ctx, e, slot.Blob)
	}
	if err := s.RotateEpoch(ctx, nil); err != nil {
		k.log.Warn("a slot was removed, but the key table is still to be sealed again", "slot", id, "error", err)
	}
	return nil
}

// test finds out whether a slot would open the store, and changes nothing.
func (k *slotKeeper) test(ctx context.Context, s *keystore.Store, id uint32, a enclave.Auth) error {
	slot, err := findSlot(s, id, a)
	if err != nil {
		return err
	}
	secret, err := k.open(ctx, slot, a)
	if err != nil {
		return err
	}
	defer secret.Free()
	if s.Locked() {
		return keystore.ErrLocked // Unlock would do more than test
	}
	return s.Unlock(ctx, slot.ID, secret.Bytes())
}

// unlockUnattended is what the daemon does at start.
func (d *daemon) unlockUnattended(ctx context.Context) error {
	s := d.store.Load()
	if err := d.slots.unlockUnattended(ctx, s); err != nil {
		return err
	}
	return d.unlocked()
}
