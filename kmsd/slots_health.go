package main

import (
	"context"
	"sync"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/enclave/recovery"
	"github.com/kmsd-project/kmsd/enclave/tpm"
	"github.com/kmsd-project/kmsd/keystore"
)

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
	e, err := k.guard(slot)
	if err != nil {
		return enclave.Health{State: enclave.Misconfigured, Detail: err.Error()}
	}
	h := e.Health(ctx)
	if last, failed := k.lastFailure(slot.UUID); failed && (h.State == enclave.Ready || h.State == enclave.Locked) {
		return last
	}
	switch {
	case h.State == enclave.Ready && slot.Kind != recovery.Kind && slot.Binding != e.Info().Binding:
		return enclave.Health{State: enclave.Replaced, Detail: "this is not the device that was enrolled; open the store with the recovery key and enrol this one"}
	case h.State == enclave.LockedOut && slot.Kind == tpm.Kind && needOf(slot) == needsNobody:
		// The device refuses PINs, and this slot has none.
		return enclave.Health{State: enclave.Ready, Detail: h.Detail}
	}
	return h
}
