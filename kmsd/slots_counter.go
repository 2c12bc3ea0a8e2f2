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
		if k.devices.same(slot.Location, location) {
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

// bind binds the store to the counter of the device of a slot, when it has one and the store is not bound to another device. It returns a
// warning when that fails: the slot is good all the same.
func (k *slotKeeper) bind(ctx context.Context, s *keystore.Store, kind, location, binding string) string {
	if bound := s.CounterLocation(); kind != tpm.Kind || bound != "" && !k.devices.same(bound, location) {
		return ""
	}
	e, err := k.devices.at(location, binding)
	if err == nil {
		c, ok := e.(enclave.Counter)
		if !ok {
			return ""
		}
		err = s.BindCounter(ctx, location, c)
	}
	if err != nil {
		return fmt.Sprintf("an old copy of the keystore would not be noticed: %v", err)
	}
	return ""
}

// unbind releases the store from the counter of a device that it has no slot of any more, and binds it to that of another slot where there is
// one. It returns a warning when nothing tells old copies any more.
func (k *slotKeeper) unbind(ctx context.Context, s *keystore.Store) string {
	location := s.CounterLocation()
	if location == "" {
		return ""
	}
	slots := s.Slots()
	for _, slot := range slots {
		if k.devices.same(slot.Location, location) {
			return ""
		}
	}
	if err := s.UnbindCounter(ctx); err != nil {
		return fmt.Sprintf("the keystore stays bound to the counter of a device that it has no slot of: %v", err)
	}
	warning := ""
	for _, slot := range slots {
		if warning = k.bind(ctx, s, slot.Kind, slot.Location, slot.Binding); s.CounterLocation() != "" {
			return ""
		}
	}
	if warning == "" {
		warning = "an old copy of the keystore would not be noticed any more: the counter was in this device"
	}
	return warning
}
