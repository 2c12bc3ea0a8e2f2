//go:build cgo

// Package token is the driver of a PKCS#11 token. It loads the module of the vendor by cgo, so only the helper program kmsd-pkcs11 links
// it; package pkcs11 is the daemon's side.
//
// crypto11 loads the module, finds the token and makes keys. What it does not do, or does in a way that hurts, goes to the module through
// miekg/pkcs11: its GCM panics when the token fails, its HMAC too, its sessions are handed out again after they have died, and it keeps the
// PIN for as long as it lives.
package token

import (
	"context"
	"errors"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/kmsd-project/kmsd/enclave"
	driver "github.com/kmsd-project/kmsd/enclave/pkcs11"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

const (
	// parallel is how many operations are given to a token at once, if it has as many sessions.
	parallel = 16

	// pause is how long a token that could not be opened is let alone.
	pause = 200 * time.Millisecond
)

// Token is the driver. It implements enclave.Enclave, enclave.Forgetter, enclave.Session and enclave.Resident.
//
// A call that the token has begun to work on returns when the token has answered; nobody can call it back. The daemon's side keeps the
// deadlines, and replaces a helper whose module hangs.
//
// Invariant: a PIN is given to the token once, is never given again, and is not kept.
//
// Invariant: a session on which anything failed is closed, and never used again.
type Token struct {
	spec   driver.Spec
	gate   gate
	making chan struct{} // holds one token while a key is made: crypto11 has one session for that

	// What follows is read by who is in the gate, and changed by who has it for himself.
	closed   bool
	conn     *connection // nil when there is none
	failed   error       // why the last attempt to connect failed,
	failedAt time.Time   // and when

	mu    sync.Mutex
	info  enclave.Info
	limit int             // of sessions that work at once, as far as is known
	slots map[object]bool // the keys of slots that we have seen or looked for
}

// Open returns the driver of a token. A token that is not there is for Health to say; a module that cannot be used is ErrMisconfigured.
func Open(ctx context.Context, s driver.Spec) (*Token, error) {
	if err := s.Check(); err != nil {
		return nil, err
	}
	if _, err := checkModule(s.Module); err != nil {
		return nil, err
	}
	t := &Token{spec: s, gate: newGate(parallel), making: make(chan struct{}, 1), limit: parallel, slots: map[object]bool{}}
	t.info = enclave.Info{Kind: driver.Kind, Level: driver.Level, Binding: s.Serial, NeedsYou: true}
	t.do(ctx, func(*connection, pkcs11.SessionHandle) error { return nil }) // learns who the token is, if it is there
	return t, nil
}

// Info describes the token as it was when it was last used.
func (t *Token) Info() enclave.Info {
	t.mu.Lock()
	defer t.mu.Unlock()
	info := t.info
	info.Warnings = slices.Clone(info.Warnings)
	return info
}

// Close logs out and lets the module go. It waits for what the token is working on.
func (t *Token) Close() error {
	t.gate.enterAlone(context.Background())
	defer t.gate.leaveAlone()
	t.closed = true
	t.disconnect()
	return nil
}

// disconnect is called by who has the gate for himself.
func (t *Token) disconnect() {
	if t.conn != nil {
		t.conn.close()
		t.conn = nil
	}
}

// do has f work with a session of the token. When the token or the session has gone meanwhile, the connection is mended and f is run once
// more; so f does nothing that may not be done twice.
func (t *Token) do(ctx context.Context, f func(*connection, pkcs11.SessionHandle) error) error {
	for first := true; ; first = false {
		c, err := t.enter(ctx)
		if err != nil {
			return translate(err)
		}
		err = c.with(ctx, f)
		t.gate.leave()
		if !first || !isDoubtful(err) {
			return translate(err)
		}
		if err := t.alone(ctx, func(came time.Time) error { return t.mend(c, came) }); err != nil {
			return translate(err)
		}
	}
}

// doMaking is do for what makes a key. Whoever waits for the other keys to be made has no place in the gate.
func (t *Token) doMaking(ctx context.Context, f func(*connection, pkcs11.SessionHandle) error) error {
	if err := take(ctx, t.making); err != nil {
		return err
	}
	defer func() { <-t.making }()
	return t.do(ctx, f)
}

// enter returns the connection, made if need be, with one place in the gate.
func (t *Token) enter(ctx context.Context) (*connection, error) {
	for {
		if err := t.gate.enter(ctx); err != nil {
			return nil, err
		}
		if t.closed {
			t.gate.leave()
			return nil, errClosed()
		}
		if t.conn != nil {
			return t.conn, nil
		}
		t.gate.leave()
		if err := t.alone(ctx, t.connect); err != nil {
			return nil, err
		}
	}
}

// alone runs f while nobody else uses the token. f is told when its caller came.
func (t *Token) alone(ctx context.Context, f func(came time.Time) error) error {
	came := time.Now()
	if err := t.gate.enterAlone(ctx); err != nil {
		return err
	}
	defer t.gate.leaveAlone()
	if t.closed {
		return errClosed()
	}
	return f(came)
}

// connect makes the connection unless there is one. All who wait for it share one attempt, and the next comes after a pause.
func (t *Token) connect(came time.Time) error {
	switch {
	case t.conn != nil:
		return nil
	case t.failedAt.After(came):
		return t.failed
	}
	time.Sleep(time.Until(t.failedAt.Add(pause)))
	c, err := connect(t.spec)
	if err != nil {
		t.failed, t.failedAt = translate(err), time.Now()
		return t.failed
	}
	t.conn = c
	t.learn(c, c.token.Flags)
	return nil
}

// mend looks at a connection that somebody had trouble with, and makes another when it is of no more use. The login is lost with it.
func (t *Token) mend(c *connection, came time.Time) error {
	if t.conn == c && !c.alive() {
		t.disconnect()
		time.Sleep(pause / 4)
	}
	return t.connect(came)
}

// learn keeps for Info what the token says about itself.
func (t *Token) learn(c *connection, flags uint) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.limit = cap(c.sessions.places)
	t.info.Binding = c.token.SerialNumber
	t.info.NeedsYou = c.needsLogin()
	t.info.Level = driver.Level
	t.info.Warnings = nil
	if !c.hardware {
		t.info.Warnings = append(t.info.Warnings, "the module does not say that this token is hardware: it is as safe as what it keeps its keys in")
	}
	if w := pinWarning(flags); w != "" {
		t.info.Warnings = append(t.info.Warnings, w)
	}
}

// Health looks at the token without an authentication attempt. A token of which every slot's key has gone was initialised anew, or somebody
// has emptied it; that can be seen while somebody is logged in.
func (t *Token) Health(ctx context.Context) enclave.Health {
	var flags uint
	var loggedIn bool
	err := t.do(ctx, func(c *connection, s pkcs11.SessionHandle) error {
		token, err := c.module.GetTokenInfo(c.slot)
		if err != nil {
			return err
		}
		flags, loggedIn = token.Flags, c.usable() == nil
		t.learn(c, flags)
		if loggedIn {
			return t.checkSlots(c, s)
		}
		return nil
	})
	switch {
	case err != nil:
		return enclave.HealthOf(err)
	case loggedIn:
		return enclave.Health{State: enclave.Ready, Detail: "logged in"}
	}
	if err := mayLogin(flags, t.spec.FinalTry); err != nil {
		return enclave.HealthOf(err)
	}
	return enclave.Health{State: enclave.Locked, Detail: "waits for its PIN"}
}

// checkSlots looks whether the keys of slots are still there, one of them at least.
func (t *Token) checkSlots(c *connection, s pkcs11.SessionHandle) error {
	t.mu.Lock()
	slots := slices.Collect(maps.Keys(t.slots))
	t.mu.Unlock()
	var gone error
	for _, o := range slots {
		h, err := c.handle(s, o)
		if err == nil {
			_, err = c.module.GetAttributeValue(s, h, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_CLASS, nil)})
		}
		if !errors.Is(err, enclave.ErrReplaced) {
			return err
		}
		gone = err
	}
	return gone
}

// remember keeps for Health that a slot has this key, or has no key any more.
func (t *Token) remember(o object, there bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !there {
		delete(t.slots, o)
	} else if len(t.slots) < keyspec.MaxSlots {
		t.slots[o] = true
	}
}

var (
	_ enclave.Enclave   = (*Token)(nil)
	_ enclave.Forgetter = (*Token)(nil)
	_ enclave.Session   = (*Token)(nil)
	_ enclave.Resident  = (*Token)(nil)
)
