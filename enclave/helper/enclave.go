package helper

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"sync"
	"syscall"
	"time"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/ipc/proto"
)

// DefaultTimeout bounds calls whose context has no deadline, unless Config.Timeout does.
const DefaultTimeout = 30 * time.Second

// grace is how long a helper may take to answer a call that was given up, before it counts as stuck.
const grace = 500 * time.Millisecond

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
	dialer  Dialer
	config  Config
	dialing chan struct{} // holds one token: who has it may replace the session

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

// Health is enclave.Enclave.Health. A helper that cannot be started is misconfigured, one that does not answer absent.
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
	if err != nil {
		return enclave.HealthOf(err)
	}
	return h
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
	e.parallel = int(min(h.MaxParallel, maxInFlight))
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
		defer func() { <-e.dialing }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	e.mu.Lock()
	s, closed := e.session, e.closed
	e.mu.Unlock()
	if closed {
		return nil, &enclave.Error{Kind: enclave.ErrAbsent, Detail: "the driver is closed"}
	}
	if s != nil {
		if usable, err := s.settled(ctx); usable || err != nil {
			return s, err
		}
	}
	link, err := e.dialer.Dial(ctx, e.config.Kind)
	if err != nil {
		return nil, err
	}
	s = newSession(link, e.config.Kind)
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
		s.turns = make(chan struct{}, min(max(r.Info.MaxParallel, 1), maxInFlight))
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

// session is one connection with calls in flight.
type session struct {
	kind string
	link *Link
	dead chan struct{} // closed by fail

	turns chan struct{} // holds one token for each operation with a resident key that is under way; set by open

	write sync.Mutex // held while a frame is built and written

	mu      sync.Mutex
	last    uint64
	pending map[uint64]*pendingCall
	err     error         // why it is dead
	idle    chan struct{} // not nil while somebody waits for the calls that were given up
}

type pendingCall struct {
	reply     chan []byte // one frame, owned by the receiver
	abandoned bool
}

func newSession(l *Link, kind string) *session {
	s := &session{kind: kind, link: l, dead: make(chan struct{}), pending: map[uint64]*pendingCall{}}
	go s.read()
	return s
}

// read hands every reply to the call it belongs to.
func (s *session) read() {
	for {
		frame, err := readFrame(s.link)
		if err != nil {
			if errors.Is(err, errSender) {
				s.fail(&enclave.Error{Kind: enclave.ErrMisconfigured, Cause: err, Remedy: "find out who took the place of the helper for " + s.kind})
				return
			}
			detail := "the connection to the helper broke"
			if errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) {
				detail = "the helper for " + s.kind + " stopped"
				err = nil
			}
			s.fail(&enclave.Error{Kind: enclave.ErrAbsent, Detail: detail, Cause: err, Remedy: "try again: it is started anew"})
			return
		}
		r, err := proto.ParseResponse(frame)
		if err != nil {
			clear(frame)
			s.fail(s.broken(err))
			return
		}
		s.mu.Lock()
		call := s.pending[r.ID]
		delete(s.pending, r.ID)
		if call != nil && !call.abandoned {
			call.reply <- frame
		} else {
			clear(frame)
		}
		s.wakeLocked()
		s.mu.Unlock()
	}
}

// broken is the error for a helper that does not keep to the protocol.
func (s *session) broken(cause error) error {
	return &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: "the helper for " + s.kind + " does not speak as expected", Cause: cause,
		Remedy: "install kmsd and its helpers from one release"}
}

// fail ends the session and the helper with it. The first reason counts.
func (s *session) fail(err error) {
	s.mu.Lock()
	if s.err != nil {
		s.mu.Unlock()
		return
	}
	s.err = err
	close(s.dead)
	s.wakeLocked()
	s.mu.Unlock()
	s.link.Close()
}

// settled waits until no call that was given up is still unanswered. It reports whether the session can be used.
func (s *session) settled(ctx context.Context) (bool, error) {
	for {
		s.mu.Lock()
		if s.err != nil {
			s.mu.Unlock()
			return false, nil
		}
		if !s.abandonedLocked() {
			s.mu.Unlock()
			return true, nil
		}
		if s.idle == nil {
			s.idle = make(chan struct{})
		}
		wait := s.idle
		s.mu.Unlock()
		select {
		case <-wait:
		case <-ctx.Done():
			return false, ctx.Err()
		}
	}
}

func (s *session) abandonedLocked() bool {
	for _, c := range s.pending {
		if c.abandoned {
			return true
		}
	}
	return false
}

func (s *session) wakeLocked() {
	if s.idle != nil && (s.err != nil || !s.abandonedLocked()) {
		close(s.idle)
		s.idle = nil
	}
}

func (s *session) call(ctx context.Context, op string, params proto.Message, use func(*proto.HelperReply) error) error {
	if op == proto.OpHelperDo || op == proto.OpHelperGenerate {
		select {
		case s.turns <- struct{}{}:
			defer func() { <-s.turns }()
		case <-ctx.Done():
			return ctx.Err()
		case <-s.dead: // what follows tells why
		}
	}
	call := &pendingCall{reply: make(chan []byte, 1)}
	s.mu.Lock()
	if s.err != nil {
		defer s.mu.Unlock()
		return s.err
	}
	s.last++
	id := s.last
	s.pending[id] = call
	s.mu.Unlock()

	if err := s.send(ctx, id, op, params); err != nil {
		if errors.Is(err, proto.ErrTooLarge) { // nothing was sent
			s.mu.Lock()
			delete(s.pending, id)
			s.mu.Unlock()
			return err
		}
		s.fail(err)
		return err
	}
	select {
	case frame := <-call.reply:
		return s.finish(frame, use)
	case <-ctx.Done():
		s.abandon(id, call)
		return &enclave.Error{Kind: enclave.ErrBusy, Detail: "the helper for " + s.kind + " did not answer in time", Cause: ctx.Err()}
	case <-s.dead:
		select {
		case frame := <-call.reply: // it answered before it died
			return s.finish(frame, use)
		default:
			s.mu.Lock()
			defer s.mu.Unlock()
			return s.err
		}
	}
}

// finish decodes a reply, lets use see it, and wipes it.
func (s *session) finish(frame []byte, use func(*proto.HelperReply) error) error {
	defer clear(frame)
	r, err := proto.ParseResponse(frame)
	if err == nil && r.Err != nil {
		err = r.Err
	}
	var reply proto.HelperReply
	if err == nil {
		err = proto.DecodeReply(r.Result, &reply)
	}
	if err == nil {
		if failure := decodeFailure(reply.Failure); failure != nil {
			return failure
		}
		err = use(&reply)
	}
	if err != nil {
		err = s.broken(err)
		s.fail(err)
	}
	return err
}

// abandon gives a call up: the helper is told, and is ended if it does not even answer that within the grace time.
func (s *session) abandon(id uint64, call *pendingCall) {
	s.mu.Lock()
	if s.pending[id] != call {
		s.mu.Unlock()
		select {
		case frame := <-call.reply:
			clear(frame)
		default:
		}
		return
	}
	call.abandoned = true
	s.mu.Unlock()
	time.AfterFunc(grace, func() {
		s.mu.Lock()
		stuck := s.pending[id] == call
		s.mu.Unlock()
		if stuck {
			s.fail(&enclave.Error{Kind: enclave.ErrAbsent, Detail: "the helper for " + s.kind + " was stuck and has been stopped", Remedy: "try again: it is started anew"})
		}
	})
	ctx, cancel := context.WithTimeout(context.Background(), grace)
	defer cancel()
	s.mu.Lock()
	s.last++
	cancelID := s.last
	s.mu.Unlock()
	if err := s.send(ctx, cancelID, proto.OpHelperCancel, &proto.Cancel{ID: id}); err != nil {
		s.fail(err)
	}
}

// send writes one request. The deadline of ctx goes with it, so that the helper gives up by itself.
func (s *session) send(ctx context.Context, id uint64, op string, params proto.Message) error {
	s.write.Lock()
	defer s.write.Unlock()
	deadline, ok := ctx.Deadline()
	if !ok {
		deadline = time.Now().Add(DefaultTimeout)
	}
	left := max(time.Until(deadline).Milliseconds(), 1)
	return withFrame(func(room []byte) ([]byte, error) {
		frame, err := proto.AppendRequest(room, id, op, params, &proto.Options{DeadlineMS: uint64(left)})
		if err != nil {
			return nil, &enclave.Error{Kind: enclave.ErrUnsupported, Cause: err}
		}
		return frame, nil
	}, func(frame []byte) error {
		s.link.conn.SetWriteDeadline(deadline)
		if _, err := s.link.conn.Write(frame); err != nil {
			return &enclave.Error{Kind: enclave.ErrAbsent, Detail: "the helper for " + s.kind + " stopped", Cause: err, Remedy: "try again: it is started anew"}
		}
		return nil
	})
}
