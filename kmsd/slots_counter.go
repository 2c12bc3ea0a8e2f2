package main

import (
	"context"
	"fmt"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/enclave/tpm"
	"github.com/kmsd-project/kmsd/keystore"
)

// counter returns the counter that the store is bound to, nil when it is bound to none or the device cannot even be named.
func (k *slotKeeper) counter(s *keystore.Store) keystore.Counter {
	location := s.CounterLocation()
	if location == "" {
		return nil
	}
	binding := ""
	for _, slot := range s.Slots() { // the last one: those before it may be of a TPM that was cleared since
		if sameDevice(slot.Location, location) {
			binding = slot.Binding
		}
	}
	e, err := k.devices.at(location, binding)
	if err != nil {
		k.log.Warn("the counter of the keystore cannot be reached", "location", location, "error", err)
		return nil
	}
	if c, ok := e.(enclave.Counter); ok {
		return c
	}
	return nil
}

// bind binds the store to the counter of the device of a new slot, when it has one and the store is not bound to another device. It returns
// a warning when that fails: the slot is good all the same.
func (k *slotKeeper) bind(ctx context.Context, s *keystore.Store, slot keystore.NewSlot) string {
	if bound := s.CounterLocation(); slot.Kind != tpm.Kind || bound != "" && !sameDevice(bound, slot.Location) {
		return ""
	}
	e, err := k.devices.at(slot.Location, slot.Binding)
	if err == nil {
		c, ok := e.(enclave.Counter)
		if !ok {
			return ""
		}
		err = s.BindCounter(ctx, slot.Location, c)
	}
	if err != nil {
		return fmt.Sprintf("an old copy of the keystore would not be noticed: %v", err)
	}
	return ""
}

// unbind releases the store from the counter of a device that it has no slot of any more.
func (k *slotKeeper) unbind(ctx context.Context, s *keystore.Store) {
	location := s.CounterLocation()
	if location == "" {
		return
	}
	for _, slot := range s.Slots() {
		if sameDevice(slot.Location, location) {
			return
		}
	}
	if err := s.UnbindCounter(ctx); err != nil {
		k.log.Warn("the keystore stays bound to the counter of a device whose slot was removed", "location", location, "error", err)
	}
}
