package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/subtle"
	"fmt"
	"os"
	"slices"
	"strings"
	"unicode"

	"filippo.io/age"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/enclave/keyfile"
	"github.com/kmsd-project/kmsd/enclave/keyring"
	"github.com/kmsd-project/kmsd/enclave/pkcs11"
	"github.com/kmsd-project/kmsd/enclave/recovery"
	"github.com/kmsd-project/kmsd/enclave/tpm"
	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/secmem"
)

// offer is one enclave that can be had on this machine.
type offer struct {
	Spec, Level string
	Health      enclave.Health
}

// offers lists what to look for on this machine, best first.
func offers(mode string) []string {
	var list []string
	for _, device := range []string{"/dev/tpmrm0", "/dev/tpm0"} {
		if _, err := os.Stat(device); err == nil {
			list = append(list, tpm.Kind+":"+device)
			break
		}
	}
	if mode != modeSystem && os.Getenv("DBUS_SESSION_BUS_ADDRESS") != "" {
		list = append(list, keyring.SecretServiceKind)
	}
	return append(list, keyring.FileKind, recovery.Kind)
}

// look asks the devices of the offers how they are.
func (k *slotKeeper) look(ctx context.Context) []offer {
	var list []offer
	for _, spec := range k.offers {
		e, err := k.devices.at(spec, "")
		if err != nil {
			continue
		}
		limited, cancel := context.WithTimeout(ctx, healthTimeout)
		list = append(list, offer{Spec: spec, Level: e.Info().Level, Health: e.Health(limited)})
		cancel()
	}
	return list
}

// automatic returns the best enclave that opens a store without anybody being there: not a keyring of somebody's session.
func (k *slotKeeper) automatic(ctx context.Context) string {
	for _, o := range k.look(ctx) {
		if o.Spec != keyring.SecretServiceKind && o.Spec != recovery.Kind && o.Health.State == enclave.Ready {
			return o.Spec
		}
	}
	return keyring.FileKind
}

// enrolment is slots whose devices have proved that they give the secrets back, before they are in a keystore.
type enrolment struct {
	keeper   *slotKeeper
	slots    []keystore.NewSlot
	guards   []enclave.Enclave // of slots
	own      []enclave.Enclave // those of guards that were opened for this
	buffers  []*secmem.Buffer
	escrow   []string
	warnings []string

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

// prepare enrols the slots of a new keystore, without making it. The caller closes the enrolment, after commit or abort.
func (k *slotKeeper) prepare(ctx context.Context, p initParams) (_ *enrolment, err error) {
	if err := checkRecipients(p.EscrowTo); err != nil {
		return nil, err
	}
	if p.Enclave == recovery.Kind && p.NoRecovery {
		return nil, fmt.Errorf("%w: a keystore that only the recovery key opens needs one", errSpec)
	}
	n := &enrolment{keeper: k, escrow: p.EscrowTo}
	defer n.closeAfter(ctx, &err)
	if p.Enclave != recovery.Kind {
		if err := n.enrolDevice(ctx, p.Enclave, "", p.PIN, !p.NoRecovery); err != nil {
			return nil, err
		}
	} else if len(p.PIN) > 0 {
		return nil, fmt.Errorf("%w: %s takes no PIN", errSpec, p.Enclave)
	}
	if !p.NoRecovery {
		if err := n.enrolKey(ctx, ""); err != nil {
			return nil, err
		}
	}
	return n, nil
}

// create makes the keystore.
func (n *enrolment) create(ctx context.Context, c keystore.Config) (*keystore.Store, error) {
	s, err := keystore.Create(ctx, c, n.slots, n.escrow)
	if err != nil {
		return nil, err
	}
	n.enrolled(ctx, s)
	return s, nil
}

// addParams says what a new slot of a keystore shall be.
type addParams struct {
	Enclave, Label    string
	PIN               []byte
	Threshold, Shares uint32 // for recovery:shares
}

// prepareSlot enrols a slot, without adding it to the keystore. The caller closes the enrolment, after add or abort.
func (k *slotKeeper) prepareSlot(ctx context.Context, s *keystore.Store, p addParams) (_ *enrolment, err error) {
	if strings.ContainsFunc(p.Label, unicode.IsControl) {
		return nil, fmt.Errorf("%w: the label holds a control character", errSpec)
	}
	n := &enrolment{keeper: k}
	defer n.closeAfter(ctx, &err)
	switch p.Enclave {
	case recovery.Kind, specShares:
		if len(p.PIN) > 0 {
			return nil, fmt.Errorf("%w: %s takes no PIN", errSpec, p.Enclave)
		}
		if p.Enclave == recovery.Kind {
			err = n.enrolKey(ctx, p.Label)
		} else {
			err = n.enrolShares(ctx, p.Label, int(min(p.Threshold, recovery.MaxShares+1)), int(min(p.Shares, recovery.MaxShares+1)))
		}
	default:
		err = n.enrolDevice(ctx, p.Enclave, p.Label, p.PIN, k.hasTested(s))
	}
	return n, err
}

// add makes the slot of prepareSlot one of the keystore.
func (n *enrolment) add(ctx context.Context, s *keystore.Store) (keystore.Slot, error) {
	slot, err := s.AddSlot(ctx, n.slots[0])
	if err != nil {
		return slot, err
	}
	n.enrolled(ctx, s)
	return slot, nil
}

// enrolled ends an enrolment that came true.
func (n *enrolment) enrolled(ctx context.Context, store *keystore.Store) {
	for i, s := range n.slots {
		n.keeper.remember(s.UUID)
		if warning := n.keeper.bind(ctx, store, s.Kind, s.Location, s.Binding); warning != "" {
			n.warnings = append(n.warnings, warning)
		}
		// Somebody has logged in to the token, so its resident keys can be used from now on.
		if e := n.guards[i]; s.Kind == pkcs11.Kind && slices.Contains(n.own, e) {
			n.keeper.devices.adopt(s.Location, s.Binding, e)
			n.own = slices.DeleteFunc(n.own, func(o enclave.Enclave) bool { return o == e })
		}
	}
}

// closeAfter closes an enrolment that was not completed.
func (n *enrolment) closeAfter(ctx context.Context, err *error) {
	if *err != nil {
		n.abort(ctx)
		n.close()
	}
}

// enrolDevice adds a slot that a device guards. wayBack says that another slot opens when an update has shut this one.
func (n *enrolment) enrolDevice(ctx context.Context, text, label string, pin []byte, wayBack bool) error {
	k := n.keeper
	if text == "" || text == specAuto {
		text = k.automatic(ctx)
	}
	s, err := parseSpec(text)
	if err != nil {
		return err
	}
	if len(pin) > 0 && s.kind != pkcs11.Kind && s.kind != tpm.Kind {
		return fmt.Errorf("%w: %s takes no PIN", errSpec, s.kind)
	}
	if s.kind == pkcs11.Kind && len(pin) == 0 {
		if pin, err = k.pins.read(s.kind); err != nil {
			return err
		}
		defer clear(pin)
	}
	var e enclave.Enclave
	if s.kind == pkcs11.Kind || s.kind == tpm.Kind || s.kind == keyfile.Kind { // the shared driver knows neither a PIN nor how new slots are to be made
		if e, err = k.devices.driver(s, "", pin); err == nil {
			n.own = append(n.own, e)
		}
	} else {
		e, err = k.devices.at(s.location(), "")
	}
	if err != nil && hintOf(err) == "" {
		err = hinted{err, "kmsctl slot add --help tells how a device is named"}
	}
	if err != nil {
		return err
	}
	if t, ok := e.(*tpm.TPM); ok && t.NeedsRecovery() && !wayBack {
		return errNoWayBack("no other slot was tried since kmsd was started")
	}
	if s.kind == pkcs11.Kind {
		if _, err := login(ctx, e, pin); err != nil {
			return fmt.Errorf("enrol %s: %w", s.kind, err)
		}
	}
	return n.enrol(ctx, e, s, cmp.Or(label, "this machine"), enclave.Auth{Secret: pin})
}

// enrolKey adds a slot with a new recovery key.
func (n *enrolment) enrolKey(ctx context.Context, label string) error {
	key := recovery.NewKey()
	text := key.Text()
	e := recovery.ForKey(key)
	n.own = append(n.own, e)
	n.recovery = [][]byte{text}
	return n.enrol(ctx, e, spec{kind: recovery.Kind}, cmp.Or(label, "recovery key"), enclave.Auth{Secret: text})
}

// enrolShares adds a slot with a new recovery key of which only shares exist.
func (n *enrolment) enrolShares(ctx context.Context, label string, threshold, shares int) error {
	key, parts, err := recovery.Split(threshold, shares)
	if err != nil {
		return fmt.Errorf("%w: %w", errSpec, err)
	}
	e := recovery.ForShares(key, threshold, shares)
	n.own = append(n.own, e)
	for _, p := range parts {
		n.recovery = append(n.recovery, p.Text())
		p.Wipe()
	}
	// The last ones: should the count of shares ever be wrong, the first threshold of them would still work.
	return n.enrol(ctx, e, spec{kind: recovery.Kind}, cmp.Or(label, fmt.Sprintf("%d of %d recovery shares", threshold, shares)),
		enclave.Auth{Shares: n.recovery[shares-threshold:]})
}

// enrol makes a slot secret, gives it to the enclave and has it back before the slot counts.
func (n *enrolment) enrol(ctx context.Context, e enclave.Enclave, s spec, label string, a enclave.Auth) error {
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
	slot := keystore.NewSlot{Kind: s.kind, Label: label, Secret: secret.Bytes()}
	rand.Read(slot.UUID[:])
	aad := enclave.SlotAAD(slot.UUID)
	var blob enclave.Blob
	ctx, cancel := withPrompt(ctx, s.kind)
	defer cancel()
	secmem.Do(func() { blob, err = e.Wrap(ctx, secret.Bytes(), aad) })
	if err != nil {
		return fmt.Errorf("enrol %s: %w", s.kind, err)
	}
	secmem.Do(func() { err = e.Unwrap(ctx, blob, aad, a, check.Bytes()) })
	if err == nil && subtle.ConstantTimeCompare(secret.Bytes(), check.Bytes()) != 1 {
		err = &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: "the device does not give back what it was given"}
	}
	if err != nil {
		n.forget(ctx, e, blob)
		return fmt.Errorf("try the new slot of %s: %w", s.kind, err)
	}
	info := e.Info()
	s.token.Serial = info.Binding // what a location of PKCS#11 is found by; others have no token
	slot.Location = s.location()
	slot.Blob, slot.Level, slot.Binding = blob, info.Level, info.Binding
	n.slots = append(n.slots, slot)
	n.guards = append(n.guards, e)
	n.warnings = append(n.warnings, info.Warnings...)
	return nil
}

// abort lets the devices forget the slots, which have not become part of a keystore.
func (n *enrolment) abort(ctx context.Context) {
	for i, s := range n.slots {
		n.forget(ctx, n.guards[i], s.Blob)
	}
	for _, text := range n.recovery {
		clear(text)
	}
	n.recovery = nil
}

func (n *enrolment) forget(ctx context.Context, e enclave.Enclave, b enclave.Blob) {
	if err := n.keeper.forget(ctx, e, b); err != nil {
		n.keeper.log.Warn("a device still holds the item of a slot that never came to be", "error", err)
	}
}

// close wipes the slot secrets and closes the drivers that were opened for the enrolment.
func (n *enrolment) close() {
	for _, b := range n.buffers {
		b.Free()
	}
	for _, e := range n.own {
		if err := e.Close(); err != nil {
			n.keeper.log.Warn("a device could not be closed", "error", err)
		}
	}
	n.buffers, n.own = nil, nil
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
