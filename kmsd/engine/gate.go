package engine

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/kmsd-project/kmsd/enclave"
)

// Limits of the way to one device.
const (
	maxWaiting     = 64               // operations that wait for their turn; more are told that it is busy
	waitTime       = 30 * time.Second // that one waits at most
	slowAnswer     = 2 * time.Second  // after which one that gave up tells the others
	probeTime      = 2 * time.Second  // that somebody waits for a device to say whether it is still there
	probePause     = time.Second      // after which one that did not is asked again
	mechanismsLife = time.Minute
)

// gates are the ways to the devices, by location.
type gates struct {
	mu sync.Mutex
	m  map[string]*gate
}

func (g *gates) of(d *Device) *gate {
	g.mu.Lock()
	defer g.mu.Unlock()
	if x := g.m[d.Location]; x != nil {
		return x
	}
	if g.m == nil {
		g.m = make(map[string]*gate)
	}
	x := &gate{location: d.Location}
	g.m[d.Location] = x
	return x
}

// gate lets as many operations to a device at a time as it works on, and none to one that does not answer.
//
// Invariant: an operation that the device has not answered in time makes the next ones fail at once, but for one that asks, until the
// device has shown that it is there. So a device that hangs costs one wait, and not one for each who asks.
type gate struct {
	location string

	mu         sync.Mutex
	slots      chan struct{} // one for each operation that the device works on at once
	waiting    int
	silent     bool // an operation got no answer
	probing    bool
	probed     time.Time // when it did not say that it is there
	mechanisms []enclave.Mechanism
	learned    time.Time
}

// enter waits for the turn of an operation, which leave ends.
func (g *gate) enter(ctx context.Context, d *Device) (leave func(), err error) {
	if err := g.probe(ctx, d.Enclave); err != nil {
		return nil, err
	}
	g.mu.Lock()
	if n := max(1, d.Resident.MaxParallel()); cap(g.slots) != n { // a helper knows only when it has been reached
		g.slots = make(chan struct{}, n)
	}
	slots := g.slots
	leave = func() { <-slots }
	select {
	case slots <- struct{}{}:
		g.mu.Unlock()
		return leave, nil
	default:
	}
	if g.waiting >= maxWaiting {
		g.mu.Unlock()
		return nil, &enclave.Error{Kind: enclave.ErrBusy, Detail: fmt.Sprintf("%d operations wait for the device", maxWaiting)}
	}
	g.waiting++
	g.mu.Unlock()
	defer func() {
		g.mu.Lock()
		g.waiting--
		g.mu.Unlock()
	}()
	limit := time.NewTimer(waitTime)
	defer limit.Stop()
	select {
	case slots <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-limit.C:
		return nil, &enclave.Error{Kind: enclave.ErrBusy, Detail: fmt.Sprintf("the device had no time for %s", waitTime)}
	}
	g.mu.Lock()
	silent := g.silent
	g.mu.Unlock()
	if silent { // since the wait began
		leave()
		return nil, g.absent()
	}
	return leave, nil
}

// unanswered is told of an operation that the device has not answered in time, or for longer than somebody waited who waited for a while.
func (g *gate) unanswered() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.silent, g.mechanisms = true, nil
}

// probe asks a device that did not answer whether it is back. One does that at a time, and not more often than every probePause; the
// others are told that it is not. A device that is slow may take longer to answer than the one who asks waits: it is used again then.
func (g *gate) probe(ctx context.Context, e enclave.Enclave) error {
	g.mu.Lock()
	silent, wait := g.silent, g.probing || time.Since(g.probed) < probePause
	if silent && !wait {
		g.probing = true
	}
	g.mu.Unlock()
	switch {
	case !silent:
		return nil
	case wait:
		return g.absent()
	}
	answered := make(chan bool, 1)
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), deviceTime)
		defer cancel()
		e.Health(ctx)
		ok := ctx.Err() == nil
		g.mu.Lock()
		g.probing, g.silent, g.probed = false, !ok, time.Now()
		g.mu.Unlock()
		answered <- ok
	}()
	limit := time.NewTimer(probeTime)
	defer limit.Stop()
	select {
	case ok := <-answered:
		if ok {
			return nil
		}
	case <-ctx.Done():
		return ctx.Err()
	case <-limit.C:
	}
	return g.absent()
}

func (g *gate) absent() error {
	return &enclave.Error{Kind: enclave.ErrAbsent, Detail: "the device at " + g.location + " does not answer",
		Remedy: "look after the device (kmsctl doctor); it is used again as soon as it answers"}
}

func noAnswer(limit time.Duration) error {
	return &enclave.Error{Kind: enclave.ErrAbsent, Detail: fmt.Sprintf("the device has not answered for %s", limit),
		Remedy: "look after the device (kmsctl doctor); it is used again as soon as it answers"}
}

// known returns what the device was found to be able to do, nil when it has to be asked.
func (g *gate) known(now time.Time) []enclave.Mechanism {
	g.mu.Lock()
	defer g.mu.Unlock()
	if now.Sub(g.learned) > mechanismsLife {
		return nil
	}
	return g.mechanisms
}

func (g *gate) learn(list []enclave.Mechanism, now time.Time) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.mechanisms, g.learned = list, now
}
