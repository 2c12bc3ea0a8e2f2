package helper

import (
	"context"
	"errors"
	"io"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/ipc/proto"
)

// How many calls of one kind are in the helper at once. Together they leave room in maxInFlight, so that the helper always reads.
const (
	maxParallel = maxInFlight / 2 // operations with a resident key, whatever the driver says
	maxAsked    = maxInFlight / 8 // other calls that a patient session may wait long for
)

// session is one connection with calls in flight.
type session struct {
	kind     string
	link     *Link
	patience patience
	dead     chan struct{} // closed by fail

	// turns and asked hold one token for each call of their kinds that the helper has not answered, whether somebody waits for it or not:
	// a device that is at work is not given more.
	turns chan struct{} // Do and Generate, as many as the driver says; set by open
	asked chan struct{} // the other patient ones

	write chan struct{} // holds one token: who has it may write a frame

	mu      sync.Mutex
	last    uint64
	pending map[uint64]*pendingCall
	err     error         // why it is dead
	idle    chan struct{} // not nil while somebody waits for the calls that were given up
}

type pendingCall struct {
	reply     chan []byte // one frame, owned by the receiver
	op        string
	sent      time.Time
	turn      chan struct{} // where its token is; may be nil
	abandoned bool
}

func newSession(l *Link, kind string, p patience) *session {
	s := &session{kind: kind, link: l, patience: p, dead: make(chan struct{}), asked: make(chan struct{}, maxAsked), write: make(chan struct{}, 1),
		pending: map[uint64]*pendingCall{}}
	go s.read()
	return s
}

// patient returns how long a call may be unanswered, 0 for one that is not waited for after it was given up.
func (s *session) patient(op string) time.Duration {
	switch op {
	case proto.OpHelperGenerate:
		return s.patience.generate
	case proto.OpHelperDo, proto.OpHelperDestroy, proto.OpHelperMechanisms, proto.OpHelperForget, proto.OpHelperHealth:
		return s.patience.use
	}
	return 0
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
		call := s.removeLocked(r.ID)
		if call != nil && !call.abandoned {
			call.reply <- frame
		} else {
			clear(frame)
		}
		s.wakeLocked()
		s.mu.Unlock()
	}
}

// removeLocked takes a call out that the helper has answered, or never got.
func (s *session) removeLocked(id uint64) *pendingCall {
	call := s.pending[id]
	if call != nil {
		delete(s.pending, id)
		if call.turn != nil {
			<-call.turn
		}
	}
	return call
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

// why is the reason for which the session is dead, nil while it lives.
func (s *session) why() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// working reports whether the session lives and the helper is at work with a resident key.
func (s *session) working() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.pending {
		if s.err == nil && (c.op == proto.OpHelperDo || c.op == proto.OpHelperGenerate) {
			return true
		}
	}
	return false
}

// settled waits until no call that was given up, and is not waited for with patience, is still unanswered. It reports whether the session
// can be used.
func (s *session) settled(ctx context.Context) (bool, error) {
	for {
		s.mu.Lock()
		if s.err != nil {
			s.mu.Unlock()
			return false, nil
		}
		if !s.unsettledLocked() {
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

func (s *session) unsettledLocked() bool {
	for _, c := range s.pending {
		if c.abandoned && s.patient(c.op) == 0 {
			return true
		}
	}
	return false
}

func (s *session) wakeLocked() {
	if s.idle != nil && (s.err != nil || !s.unsettledLocked()) {
		close(s.idle)
		s.idle = nil
	}
}

// turn waits until the helper has room for one more call of this kind. The channel holds the token, and is nil where none is needed.
func (s *session) turn(ctx context.Context, op string) (chan struct{}, error) {
	var turn chan struct{}
	switch {
	case op == proto.OpHelperDo || op == proto.OpHelperGenerate:
		turn = s.turns
	case s.patient(op) > 0:
		turn = s.asked
	default:
		return nil, nil
	}
	select {
	case turn <- struct{}{}:
		return turn, nil
	case <-ctx.Done():
		return nil, &enclave.Error{Kind: enclave.ErrBusy, Detail: "the device behind the helper for " + s.kind + " is at work", Cause: ctx.Err()}
	case <-s.dead:
		return nil, s.why()
	}
}

func (s *session) call(ctx context.Context, op string, params proto.Message, use func(*proto.HelperReply) error) error {
	turn, err := s.turn(ctx, op)
	if err != nil {
		return err
	}
	call := &pendingCall{reply: make(chan []byte, 1), op: op, sent: time.Now(), turn: turn}
	s.mu.Lock()
	if s.err != nil {
		defer s.mu.Unlock()
		return s.err
	}
	s.last++
	id := s.last
	s.pending[id] = call
	s.mu.Unlock()

	if sent, err := s.send(ctx, id, op, params); err != nil {
		if sent {
			s.fail(err)
		} else {
			s.mu.Lock()
			s.removeLocked(id)
			s.mu.Unlock()
		}
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
			return s.why()
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

// abandon gives a call up: the helper is told, and is ended if it does not answer even that within the grace time, or the call within the
// time that a device may take for such a one.
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
	s.watch(id, call, max(time.Until(call.sent.Add(s.patient(call.op))), grace))
	ctx, cancel := context.WithTimeout(context.Background(), grace)
	defer cancel()
	s.mu.Lock()
	s.last++
	cancelID := s.last
	s.mu.Unlock()
	if sent, err := s.send(ctx, cancelID, proto.OpHelperCancel, &proto.Cancel{ID: id}); err != nil && (sent || s.patient(call.op) == 0) {
		s.fail(err)
	}
}

// watch ends the session if a call that was given up is still unanswered after a while. While the device makes a key it may do nothing
// else, so that the others have as long as that.
func (s *session) watch(id uint64, call *pendingCall, after time.Duration) {
	time.AfterFunc(after, func() {
		var more time.Duration
		s.mu.Lock()
		stuck := s.pending[id] == call && s.err == nil
		for _, c := range s.pending {
			if c.op == proto.OpHelperGenerate && c != call && s.patient(call.op) > 0 {
				more = max(more, time.Until(c.sent.Add(s.patience.generate)))
			}
		}
		s.mu.Unlock()
		switch {
		case !stuck:
		case more > 0:
			s.watch(id, call, more)
		default:
			s.fail(&enclave.Error{Kind: enclave.ErrAbsent, Detail: "the helper for " + s.kind + " was stuck and has been stopped", Remedy: "try again: it is started anew"})
		}
	})
}

// send writes one request. The deadline of ctx goes with it, so that the helper gives up by itself. After an error, sent says whether a
// part of the frame is on its way, so that nothing else can follow.
func (s *session) send(ctx context.Context, id uint64, op string, params proto.Message) (sent bool, err error) {
	select {
	case s.write <- struct{}{}:
		defer func() { <-s.write }()
	case <-ctx.Done():
		return false, &enclave.Error{Kind: enclave.ErrBusy, Detail: "the helper for " + s.kind + " takes nothing", Cause: ctx.Err()}
	case <-s.dead:
		return false, s.why()
	}
	deadline, ok := ctx.Deadline()
	if !ok {
		deadline = time.Now().Add(DefaultTimeout)
	}
	left := max(time.Until(deadline).Milliseconds(), 1)
	err = withFrame(func(room []byte) ([]byte, error) {
		frame, err := proto.AppendRequest(room, id, op, params, &proto.Options{DeadlineMS: uint64(left)})
		if err != nil {
			return nil, &enclave.Error{Kind: enclave.ErrUnsupported, Cause: err}
		}
		return frame, nil
	}, func(frame []byte) error {
		s.link.conn.SetWriteDeadline(deadline)
		n, err := s.link.conn.Write(frame)
		switch {
		case err == nil:
			return nil
		case n == 0 && errors.Is(err, os.ErrDeadlineExceeded):
			return &enclave.Error{Kind: enclave.ErrBusy, Detail: "the helper for " + s.kind + " takes nothing", Cause: context.DeadlineExceeded}
		}
		sent = true
		return &enclave.Error{Kind: enclave.ErrAbsent, Detail: "the helper for " + s.kind + " stopped", Cause: err, Remedy: "try again: it is started anew"}
	})
	return sent, err
}
