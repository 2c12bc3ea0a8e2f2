package helper

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"sync"
	"time"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/ipc/proto"
)

// DefaultTimeout bounds calls whose context has no deadline, unless Config.Timeout does.
const DefaultTimeout = 30 * time.Second

// grace is how long a helper may take to answer a call that was given up, before it counts as stuck.
const grace = 500 * time.Millisecond

// patience is for helpers whose device may work on something for longer than a caller waits, and that lose a login when they are
// replaced: how long after it was sent a call may be unanswered before the helper counts as stuck. Zero is none: grace alone.
//
// Invariant: how long a helper with patience lives is up to the device and to these limits, never to the deadline of a caller.
type patience struct{ use, generate time.Duration }

// Config says which device an Enclave is for.
type Config struct {
	Kind    string            // as the table of helpers knows it: keyring:file
	Params  map[string]string // for the driver, none of them secret
	Timeout time.Duration     // of calls whose context has no deadline; 0 is DefaultTimeout
	PIN     []byte            // for enrolment with a device that wants one; taken over, sent once, and wiped then or by Close
	Info    enclave.Info      // what Info says before the helper was asked
}

// Enclave is a driver in another process. It implements enclave.Enclave and enclave.Forgetter.
//
// Invariant: a call returns within its deadline, whatever the helper does. A helper that crashed is replaced by the next call; so is
// one that did not even answer a call that was given up.
type Enclave struct {
	dialer   Dialer
	config   Config
	patience patience
	dialing  chan struct{} // holds one token: who has it may replace the session

	mu       sync.Mutex
	session  *session // nil or the last one
	info     enclave.Info
	parallel int // of a driver with resident keys
	closed   bool
}

// New returns the enclave. The helper is started by the first call that needs it.
func New(d Dialer, c Config) *Enclave {
	return &Enclave{dialer: d, config: c, info: c.Info, dialing: make(chan struct{}, 1)}
}

// Info is what the helper said last.
func (e *Enclave) Info() enclave.Info {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.info
}

// Wrap is enclave.Enclave.Wrap.
func (e *Enclave) Wrap(ctx context.Context, secret, aad []byte) (enclave.Blob, error) {
	if len(secret) != enclave.SecretSize || len(aad) > enclave.MaxAAD {
		return nil, fmt.Errorf("secret of %d bytes with %d of associated data: %w", len(secret), len(aad), enclave.ErrUnsupported)
	}
	var blob enclave.Blob
	err := e.call(ctx, proto.OpHelperWrap, &proto.HelperWrap{Secret: secret, AAD: aad}, func(r *proto.HelperReply) error {
		if len(r.Blob) == 0 || len(r.Blob) > enclave.MaxBlob {
			return fmt.Errorf("blob of %d bytes", len(r.Blob))
		}
		blob = append(blob, r.Blob...)
		return nil
	})
	return blob, err
}

// Unwrap is enclave.Enclave.Unwrap.
func (e *Enclave) Unwrap(ctx context.Context, b enclave.Blob, aad []byte, a enclave.Auth, dst []byte) error {
	if len(dst) != enclave.SecretSize || len(aad) > enclave.MaxAAD {
		return fmt.Errorf("destination of %d bytes with %d of associated data: %w", len(dst), len(aad), enclave.ErrUnsupported)
	}
	if err := checkBlob(b); err != nil {
		return err
	}
	params := &proto.HelperUnwrap{Blob: b, AAD: aad, Auth: a.Secret, Shares: a.Shares}
	return e.call(ctx, proto.OpHelperUnwrap, params, func(r *proto.HelperReply) error {
		if len(r.Secret) != len(dst) {
			return fmt.Errorf("secret of %d bytes", len(r.Secret))
		}
		copy(dst, r.Secret)
		return nil
	})
}

// Forget is enclave.Forgetter.Forget.
func (e *Enclave) Forget(ctx context.Context, b enclave.Blob) error {
	if err := checkBlob(b); err != nil {
		return err
	}
	return e.call(ctx, proto.OpHelperForget, &proto.HelperBlob{Blob: b}, noResult)
}

func checkBlob(b enclave.Blob) error {
	if len(b) == 0 || len(b) > enclave.MaxBlob {
		return &enclave.Error{Kind: enclave.ErrCorrupt, Detail: fmt.Sprintf("blob of %d bytes", len(b))}
	}
	return nil
}

func noResult(*proto.HelperReply) error { return nil }

// Health is enclave.Enclave.Health. A helper that cannot be started is misconfigured, one that does not answer absent, unless it is at work
// with a resident key.
func (e *Enclave) Health(ctx context.Context) enclave.Health {
	var h enclave.Health
	err := e.call(ctx, proto.OpHelperHealth, &proto.Empty{}, func(r *proto.HelperReply) error {
		h = enclave.Health{State: enclave.HealthState(r.Health.State), Detail: r.Health.Detail}
		if r.Health.Until != 0 {
			h.Until = time.Unix(r.Health.Until, 0)
		}
		switch h.State {
		case enclave.Ready, enclave.Locked, enclave.LockedOut, enclave.Absent, enclave.Replaced, enclave.Misconfigured:
			return nil
		}
		return fmt.Errorf("health %q", h.State)
	})
	switch {
	case errors.Is(err, context.DeadlineExceeded) && e.working():
		return enclave.Health{State: enclave.Ready, Detail: "busy: an operation with a key takes its time"}
	case err != nil:
		return enclave.HealthOf(err)
	}
	return h
}

// working reports whether the helper is at work with a resident key.
func (e *Enclave) working() bool {
	e.mu.Lock()
	s := e.session
	e.mu.Unlock()
	return s != nil && s.working()
}

// Close ends the helper.
func (e *Enclave) Close() error {
	e.mu.Lock()
	s := e.session
	e.session, e.closed = nil, true
	clear(e.config.PIN)
	e.mu.Unlock()
	if s != nil {
		s.fail(&enclave.Error{Kind: enclave.ErrAbsent, Detail: "the driver is closed"})
	}
	return nil
}

func (e *Enclave) setInfo(h proto.HelperInfo) {
	if h.Kind == "" {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.info = decodeInfo(h)
	e.parallel = int(min(h.MaxParallel, maxParallel))
}

// call performs one operation. use sees the reply before it is wiped; an error of use is a helper that breaks the protocol.
func (e *Enclave) call(ctx context.Context, op string, params proto.Message, use func(*proto.HelperReply) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, cmp.Or(e.config.Timeout, DefaultTimeout))
		defer cancel()
	}
	s, err := e.connected(ctx)
	if err != nil {
		return err
	}
	return s.call(ctx, op, params, func(r *proto.HelperReply) error {
		e.setInfo(r.Info)
		return use(r)
	})
}

// connected returns a session that works, as far as one can know, and makes one if there is none.
func (e *Enclave) connected(ctx context.Context) (*session, error) {
	select {
	case e.dialing <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	release := func() { <-e.dialing }
	e.mu.Lock()
	s, closed := e.session, e.closed
	e.mu.Unlock()
	if closed {
		release()
		return nil, &enclave.Error{Kind: enclave.ErrAbsent, Detail: "the driver is closed"}
	}
	if s != nil {
		if usable, err := s.settled(ctx); usable || err != nil {
			release()
			return s, err
		}
	}
	if e.patience.use == 0 {
		defer release()
		return e.open(ctx)
	}
	// A device that is slow to open would never be open if each caller began anew. This goes on without the one who began it.
	type opened struct {
		session *session
		err     error
	}
	done := make(chan opened, 1)
	go func() {
		defer release()
		patient, cancel := context.WithTimeout(context.WithoutCancel(ctx), e.patience.use)
		defer cancel()
		s, err := e.open(patient)
		done <- opened{s, err}
	}()
	select {
	case o := <-done:
		return o.session, o.err
	case <-ctx.Done():
		return nil, &enclave.Error{Kind: enclave.ErrBusy, Detail: "the helper for " + e.config.Kind + " still opens the device", Cause: ctx.Err()}
	}
}

// open makes a session. The caller holds the token.
func (e *Enclave) open(ctx context.Context) (*session, error) {
	link, err := e.dialer.Dial(ctx, e.config.Kind)
	if err != nil {
		return nil, err
	}
	s := newSession(link, e.config.Kind, e.patience)
	e.mu.Lock()
	open := &proto.HelperOpen{Version: proto.HelperVersion, Kind: e.config.Kind, Config: maps.Clone(e.config.Params), PIN: e.config.PIN}
	e.config.PIN = nil // one attempt
	e.mu.Unlock()
	defer clear(open.PIN)
	err = s.call(ctx, proto.OpHelperOpen, open, func(r *proto.HelperReply) error {
		if r.Info.Kind == "" {
			return errors.New("no kind of enclave")
		}
		e.setInfo(r.Info)
		s.turns = make(chan struct{}, min(max(r.Info.MaxParallel, 1), maxParallel))
		return nil
	})
	if err != nil {
		s.fail(err)
		return nil, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		s.fail(enclave.ErrAbsent)
		return nil, &enclave.Error{Kind: enclave.ErrAbsent, Detail: "the driver is closed"}
	}
	e.session = s
	return s, nil
}
