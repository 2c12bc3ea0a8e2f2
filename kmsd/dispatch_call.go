package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kmsd-project/kmsd/ipc"
	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/kmsd/engine"
)

// Causes of the end of a call before its time.
var (
	errCancelled = fmt.Errorf("%w: by the client", context.Canceled)
	errGone      = fmt.Errorf("%w: the client is gone", context.Canceled)
)

// call is one request on its way through the daemon.
//
// It is its own context: cancelled by cancel, by the deadline or by the end of the connection, and free until somebody
// asks for its Done channel, which cheap operations never do.
type call struct {
	ctx     context.Context
	daemon  *daemon
	session *session
	request proto.Request

	op       *operation
	lane     lane
	frame    []byte // the request, when it runs in the background
	space    int    // of the frame and the answer, in bytes
	answered atomic.Bool
	finished atomic.Bool   // its handler has returned; all that is left is to answer
	failure  *proto.Error  // of AppendFrame
	result   proto.Message // of AppendFrame
	output   []byte        // of room, if that is small
	large    []byte        // of room, if it is not, or of chunk,
	head     int           // and where in it the output of chunk begins

	mu       sync.Mutex
	done     chan struct{}
	err      error
	deadline time.Time
	timer    *time.Timer
}

var calls = sync.Pool{New: func() any { return new(call) }}

func newCall(s *session) *call {
	c := calls.Get().(*call)
	c.ctx, c.daemon, c.session = c, s.daemon, s
	return c
}

// Room for the output of an operation with a key, in bytes.
const (
	outputOverhead = 128                    // what encryption adds, or a signature
	outputSpace    = 1<<10 + outputOverhead // of what a call keeps for the next one
)

// room returns an empty buffer for the output of the handler, which is about size bytes and must not be kept: the buffer is
// wiped and used again once c has been answered.
func (c *call) room(size int) []byte {
	if size+outputOverhead > outputSpace {
		c.large = ipc.TakeBuffer(size + outputOverhead)
		return c.large[:0]
	}
	if c.output == nil {
		c.output = make([]byte, 0, outputSpace)
	}
	return c.output
}

// chunk returns an empty buffer for the output of one chunk of a stream, behind the place where the head of the answer's frame
// goes: what fits it is written from there.
func (c *call) chunk() []byte {
	if c.large == nil {
		c.large = ipc.TakeBuffer(ipc.MaxBuffer)
		head, _, _ := proto.AppendResponseAround(nil, c.request.ID, &proto.StreamData{Data: c.large[:proto.MaxChunk]})
		c.head = len(head)
	}
	return c.large[c.head:c.head]
}

// give queues the answer in the buffer of chunk, if it is there as a whole and needs no other head.
func (c *call) give() bool {
	r, ok := c.result.(*proto.StreamData)
	if !ok || c.failure != nil || !c.inLarge(r.Data) {
		return false
	}
	head, hole, err := proto.AppendResponseAround(nil, c.request.ID, r)
	if err != nil || hole.At != c.head || len(head) != c.head {
		return false
	}
	copy(c.large, head)
	c.session.conn.Give(c.large, c.head+len(r.Data))
	c.large, r.Data = nil, nil
	return true
}

// inLarge reports whether b is the output that was appended to chunk.
func (c *call) inLarge(b []byte) bool {
	return c.large != nil && len(b) > 0 && &b[0] == &c.large[c.head]
}

// wipe wipes the output and gives its buffer back.
func (c *call) wipe() {
	clear(c.output[:cap(c.output)])
	if c.large == nil {
		return
	}
	used := len(c.large)
	if r, ok := c.result.(*proto.StreamData); ok && c.inLarge(r.Data) {
		used = c.head + len(r.Data)
	}
	ipc.PutBuffer(c.large, used)
	c.large, c.head = nil, 0
}

// free returns c for another request. A call that somebody may still look at is left to the collector instead.
func (c *call) free() {
	clear(c.frame)
	c.wipe()
	c.mu.Lock()
	shared := c.done != nil || c.timer != nil || c.err != nil
	c.mu.Unlock()
	if shared {
		c.release()
		return
	}
	frame := c.frame[:0]
	if cap(frame) > 4096 {
		frame = nil
	}
	c.ctx, c.daemon, c.session, c.request, c.op, c.lane = nil, nil, nil, proto.Request{}, nil, 0
	c.failure, c.result, c.deadline = nil, nil, time.Time{}
	c.answered.Store(false)
	c.finished.Store(false)
	c.frame = frame
	calls.Put(c)
}

// release ends the context of c.
func (c *call) release() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.timer != nil {
		c.timer.Stop()
	}
	if c.err == nil {
		c.err = context.Canceled
	}
	if c.done != nil {
		select {
		case <-c.done:
		default:
			close(c.done)
		}
	}
}

// decode decodes the params of c. Byte fields alias the request and are valid until the handler returns.
func decode[T any, P interface {
	*T
	proto.Message
}](c *call) (*T, error) {
	m := new(T)
	if err := proto.Decode(c.request.Params, P(m)); err != nil {
		return nil, badFrame(err)
	}
	return m, nil
}

// choose asks the table where c runs. The row may look into the request for that, so a panic is caught here too.
func (c *call) choose() (l lane) {
	defer func() {
		if recover() != nil {
			c.daemon.panics.Add(1)
			l = lanePool
		}
	}()
	return c.op.lane(c)
}

// Run runs c on a worker of its lane.
func (c *call) Run() {
	c.run()
	c.session.done(c)
}

// run handles c and queues the answer.
func (c *call) run() {
	if e := c.expired(); e != nil {
		e.SafeToRetry = true // it was never begun
		c.answer(e, nil)
		return
	}
	result, e := c.handle()
	c.finished.Store(true)
	if late := c.expired(); late != nil {
		c.answer(late, nil)
		return
	}
	c.answer(e, result)
}

// handle calls the handler and catches its panic.
func (c *call) handle() (result proto.Message, e *proto.Error) {
	defer func() {
		p := recover()
		if p == nil {
			return
		}
		c.daemon.panics.Add(1)
		message, stack := engine.DescribePanic(p)
		slog.Error("panic in a handler", "op", c.request.Op, "panic", message, "stack", stack)
		result, e = nil, &proto.Error{Code: proto.CodeInternal, Class: proto.ClassInternal, Message: "internal error"}
	}()
	result, err := c.op.handle(c)
	if err != nil {
		return nil, c.wireError(err)
	}
	if result == nil {
		result = &proto.Empty{}
	}
	return result, nil
}

// wireError adds to the one table of errors what only the call knows: why its context ended.
func (c *call) wireError(err error) *proto.Error {
	if e := c.expired(); e != nil && (errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)) {
		return e
	}
	return wireError(err)
}

// expired returns the error of a call that is no longer wanted, or nil.
func (c *call) expired() *proto.Error {
	switch err := c.Err(); {
	case err == nil:
		return nil
	case errors.Is(err, context.DeadlineExceeded):
		return &proto.Error{Code: proto.CodeDeadline, Class: proto.ClassState, Message: "the deadline has passed"}
	default:
		return &proto.Error{Code: proto.CodeCancelled, Class: proto.ClassState, Message: "the request was cancelled"}
	}
}

// answer queues the one answer to c; later ones are dropped.
func (c *call) answer(e *proto.Error, result proto.Message) {
	if !c.answered.CompareAndSwap(false, true) {
		return
	}
	c.failure, c.result = e, result
	if !c.give() {
		c.session.conn.Append(c, frameSize(result))
	}
}

// frameSize is about what the frame of an answer takes, and no less for those that may be long and come often.
func frameSize(result proto.Message) int {
	const usual = 512
	switch r := result.(type) {
	case *proto.StreamData:
		return usual + len(r.Data)
	case *proto.EncryptReply:
		return usual + len(r.Ciphertext)
	case *proto.DecryptReply:
		return usual + len(r.Data)
	}
	return usual
}

// AppendFrame appends the answer.
func (c *call) AppendFrame(dst []byte) []byte {
	out, err := proto.AppendResponse(dst, c.request.ID, c.failure, c.result)
	if err == nil {
		return out
	}
	slog.Error("the answer does not fit a frame", "op", c.request.Op, "error", err)
	out, _ = proto.AppendResponse(dst, c.request.ID, &proto.Error{Code: proto.CodeTooLarge, Class: proto.ClassInput, Message: "the answer does not fit a frame"}, nil)
	return out
}

// item runs one operation of a batch in the place of c and returns its encoded result.
func (c *call) item(op string, params []byte) ([]byte, *proto.Error) {
	switch op {
	case proto.OpBatch, proto.OpCancel, proto.OpStreamBegin, proto.OpStreamUpdate, proto.OpStreamFinish, proto.OpStreamAbort:
		return nil, &proto.Error{Code: proto.CodeInvalid, Class: proto.ClassInput, Message: "this operation cannot be part of a batch", SafeToRetry: true}
	}
	row, e := c.daemon.find(op, c.session.who.Admin)
	if e != nil {
		c.session.refused(c, op, e)
	} else {
		e = c.expired()
	}
	if e != nil {
		e.SafeToRetry = true
		return nil, e
	}
	sub := &call{ctx: c.ctx, daemon: c.daemon, session: c.session, op: row}
	sub.request = proto.Request{ID: c.request.ID, Op: op, Params: params, Options: proto.Options{Trace: c.request.Options.Trace}}
	defer sub.wipe()
	result, e := sub.inItsLane(c.lane)
	if e != nil {
		return nil, e
	}
	out, err := proto.AppendParams(nil, result)
	if err != nil {
		return nil, badFrame(err)
	}
	return out, nil
}

// inItsLane handles an item of a batch, whose own lane is outer, on a worker of the item's lane and waits for it. Batches
// run many at a time, because most of what they do may be to wait for the disk; what they compute must not be.
func (c *call) inItsLane(outer lane) (result proto.Message, e *proto.Error) {
	if c.lane = c.choose(); c.lane == laneInline {
		c.lane = lanePool
	}
	if c.lane == outer { // waiting for another worker of the same lane could be for ever
		return c.handle()
	}
	done := make(chan struct{})
	taken := c.daemon.lanes[c.lane].Submit(c.session.who.UID, task(func() {
		defer close(done)
		result, e = c.handle()
	}))
	if !taken {
		c.daemon.busy.Add(1)
		return nil, busy("too many requests of this kind are waiting", c.daemon.shapes[c.lane].retry)
	}
	<-done
	return result, e
}

// task is a function as ipc.Task.
type task func()

// Run implements ipc.Task.
func (f task) Run() { f() }

// limit sets the deadline of c.
func (c *call) limit(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.deadline = time.Now().Add(d)
}

// arm makes the deadline of c, if it has one, answer c even while its handler is busy.
func (c *call) arm() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.timer == nil && !c.deadline.IsZero() {
		c.timer = time.AfterFunc(time.Until(c.deadline), func() { c.cancel(context.DeadlineExceeded) })
	}
}

// cancel ends the context of c with err and answers c at once. What its handler still returns is dropped.
func (c *call) cancel(err error) {
	c.mu.Lock()
	if c.err == nil {
		c.err = err
		if c.done != nil {
			close(c.done)
		}
	}
	c.mu.Unlock()
	c.answer(c.expired(), nil)
}

// Deadline implements context.Context.
func (c *call) Deadline() (time.Time, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.deadline, !c.deadline.IsZero()
}

// Done implements context.Context.
func (c *call) Done() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.done == nil {
		c.done = make(chan struct{})
		switch {
		case c.err != nil:
			close(c.done)
		case c.timer == nil && !c.deadline.IsZero():
			c.timer = time.AfterFunc(time.Until(c.deadline), func() { c.cancel(context.DeadlineExceeded) })
		}
	}
	return c.done
}

// Err implements context.Context.
func (c *call) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil && !c.deadline.IsZero() && !time.Now().Before(c.deadline) {
		c.err = context.DeadlineExceeded
		if c.done != nil {
			close(c.done)
		}
	}
	return c.err
}

// Value implements context.Context. The only value that a call carries is the trace.
func (c *call) Value(key any) any {
	if _, ok := key.(engine.TraceKey); ok && c.request.Options.Trace != "" {
		return c.request.Options.Trace
	}
	return nil
}
