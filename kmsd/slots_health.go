package main

import (
	"context"
	"errors"
	"fmt"
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
	asked := map[enclave.Enclave]func() enclave.Health{} // a device is asked once for all its slots
	var wg sync.WaitGroup
	for i, slot := range slots {
		e, err := k.guard(slot)
		if err != nil {
			result[i] = slotStatus{slot, enclave.Health{State: enclave.Misconfigured, Detail: err.Error()}}
			continue
		}
		if asked[e] == nil {
			asked[e] = sync.OnceValue(func() enclave.Health { return ask(ctx, e) })
		}
		answer := asked[e]
		wg.Go(func() { result[i] = slotStatus{slot, k.healthFor(slot, e, answer())} })
	}
	wg.Wait()
	return result
}

// ask asks a device how it is.
func ask(ctx context.Context, e enclave.Enclave) enclave.Health {
	h := e.Health(ctx)
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		h.Detail = fmt.Sprintf("did not answer within %v", healthTimeout)
	}
	return h
}

// health looks at the device of a slot.
func (k *slotKeeper) health(ctx context.Context, slot keystore.Slot) enclave.Health {
	e, err := k.guard(slot)
	if err != nil {
		return enclave.Health{State: enclave.Misconfigured, Detail: err.Error()}
	}
	return k.healthFor(slot, e, ask(ctx, e))
}

// healthFor says what the health of its device means for a slot. A healthy device that is bound to something else than the slot has been
// replaced.
func (k *slotKeeper) healthFor(slot keystore.Slot, e enclave.Enclave, h enclave.Health) enclave.Health {
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
