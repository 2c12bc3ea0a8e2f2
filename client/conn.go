package client

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net"
	"os"
	"runtime"
	"sync"
	"time"

	"github.com/kmsd-project/kmsd/ipc/proto"
)

// conn is one connection. It has no goroutine: of the callers that wait, one at a time has the role of the reader, and
// of those that send, one at a time that of the writer, who takes the frames of the others along.
//
// Invariant: while calls wait and the connection is whole, one of them reads or has been woken to do so.
type conn struct {
	nc      net.Conn
	timeout time.Duration
	server  Server
	slots   chan struct{} // one token for each request in flight

	mu      sync.Mutex
	err     error // once set, the connection is over
	nextID  uint64
	pending map[uint64]*call
	waiting int    // calls in pending whose caller is in wait
	reading bool   // somebody has the role of the reader
	writing bool   // somebody has the role of the writer
	batch   uint64 // number of the next write, from 1
	out     []byte // frames for the next write
	spare   []byte // its other buffer

	// Owned by the reader.
	in       []byte // received bytes from start on
	start    int
	large    bool      // the last frame was larger than keepSize
	full     bool      // the last read filled its space
	deadline time.Time // the read deadline that is set

	writeDeadline time.Time // owned by the writer
}

// call is one request in flight.
type call struct {
	id       uint64
	response proto.Response
	err      error
	done     bool   // response or err is set; guarded by conn.mu
	waits    bool   // its caller is in wait; guarded by conn.mu
	slot     bool   // it holds a token of conn.slots
	internal bool   // nobody waits for the answer
	bind     bool   // and it is that of bind
	batch    uint64 // the write that its frame goes with,
	end      int    // and where in it the frame ends
	wake     chan struct{}
	timer    *time.Timer
}

var calls = sync.Pool{New: func() any {
	timer := time.NewTimer(time.Hour)
	timer.Stop()
	return &call{wake: make(chan struct{}, 1), timer: timer}
}}

// errNotSent says that the daemon cannot have seen the whole request.
var errNotSent = errors.New("connection lost before the request was sent")

const (
	readSize     = 16 << 10  // free space for one read,
	fullReadSize = 64 << 10  // and while answers come faster than they are read
	keepSize     = 128 << 10 // a buffer larger than this is kept only while it is needed
	minInFlight  = 1
	fullInFlight = 4096
)

func newConn(nc net.Conn, timeout time.Duration) *conn {
	return &conn{nc: nc, timeout: timeout, batch: 1, pending: make(map[uint64]*call), slots: make(chan struct{}, minInFlight)}
}

// hello introduces the client and queues bind, to be written together with the first request.
func (cn *conn) hello(ctx context.Context, name string) error {
	var reply proto.HelloReply
	err := cn.call(ctx, proto.OpHello, &proto.Hello{
		MinVersion: proto.Version, MaxVersion: proto.Version, Client: name,
	}, &reply, nil)
	if err != nil {
		if errors.Is(err, ErrOutcomeUnknown) || errors.Is(err, errNotSent) {
			return fmt.Errorf("%w: the connection ended during hello", ErrUnreachable)
		}
		return err
	}
	if reply.Version != proto.Version {
		return fmt.Errorf("%w: kmsd chose version %d of the protocol", ErrProtocol, reply.Version)
	}
	cn.server = Server{
		Name: reply.Server, Version: reply.Version, Features: reply.Features, Limits: reply.Limits,
		Identity: reply.Identity, PolicyEpoch: reply.PolicyEpoch,
	}
	cn.slots = make(chan struct{}, min(max(int(reply.Limits.InFlight), minInFlight), fullInFlight))
	return cn.post(proto.OpBind, &proto.Bind{Nonce: reply.Nonce})
}

// call sends one request and waits for its answer.
func (cn *conn) call(ctx context.Context, op string, params, result proto.Message, o *proto.Options) error {
	cl, err := cn.send(ctx, op, params, o)
	if err != nil {
		return err
	}
	return cn.receive(ctx, cl, result)
}

// send sends a request and returns without waiting for the answer; receive must follow.
func (cn *conn) send(ctx context.Context, op string, params proto.Message, o *proto.Options) (*call, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	var options proto.Options
	if o != nil {
		options = *o
	}
	if deadline, ok := ctx.Deadline(); ok && options.DeadlineMS == 0 {
		options.DeadlineMS = uint64(max(time.Until(deadline).Milliseconds(), 1))
	}
	if err := cn.acquire(ctx); err != nil {
		return nil, err
	}
	cl := calls.Get().(*call)
	cl.slot = true

	cn.mu.Lock()
	err := cn.enqueue(cl, op, params, &options)
	if err == nil {
		cn.write()
	}
	cn.mu.Unlock()
	if err != nil {
		<-cn.slots
		calls.Put(cl)
		return nil, err
	}
	return cl, nil
}

// post queues a request whose answer nobody waits for. It is written with the next one, or by flush.
func (cn *conn) post(op string, params proto.Message) error {
	cn.mu.Lock()
	defer cn.mu.Unlock()
	return cn.enqueue(&call{internal: true, bind: op == proto.OpBind}, op, params, nil)
}

// flush writes what is queued.
func (cn *conn) flush() error {
	cn.mu.Lock()
	defer cn.mu.Unlock()
	cn.write()
	return cn.err
}

// enqueue appends a request to the frames for the writer. The caller holds mu.
func (cn *conn) enqueue(cl *call, op string, params proto.Message, o *proto.Options) error {
	if cn.err != nil {
		return cn.lost(errNotSent)
	}
	cn.nextID++
	cl.id = cn.nextID
	out, err := proto.AppendRequest(cn.out, cl.id, op, params, o)
	if errors.Is(err, proto.ErrTooLarge) {
		return fmt.Errorf("%s: %w: %w", op, ErrTooLarge, err)
	} else if err != nil {
		return fmt.Errorf("%s: %w", op, err)
	}
	cn.out = out
	cl.batch, cl.end = cn.batch, len(out)
	cn.pending[cl.id] = cl
	return nil
}

// write makes the caller the writer, or leaves its frames to the one there is. The caller holds mu; it is released
// while bytes are written. A failure ends the connection, which every call then learns from its own state.
func (cn *conn) write() {
	if cn.writing {
		return
	}
	cn.writing = true
	if len(cn.pending) > 2 {
		// Others are about to send too: one write for all of them is cheaper than one each.
		cn.mu.Unlock()
		runtime.Gosched()
		cn.mu.Lock()
	}
	for len(cn.out) > 0 && cn.err == nil {
		frames := cn.out
		cn.out, cn.spare = cn.spare[:0], nil
		cn.batch++
		cn.mu.Unlock()
		n, err := cn.writeAll(frames)
		cn.mu.Lock()
		if cap(frames) <= keepSize || len(frames) > keepSize { // a large buffer stays while large frames come
			cn.spare = frames[:0]
		}
		if err != nil {
			cn.end(err, cn.batch-1, n)
		}
	}
	cn.writing = false
}

func (cn *conn) writeAll(b []byte) (int, error) {
	// A daemon that does not read for this long is as good as gone.
	now := time.Now()
	if until := cn.writeDeadline.Sub(now); until < cn.timeout/2 {
		cn.writeDeadline = now.Add(cn.timeout)
		if err := cn.nc.SetWriteDeadline(cn.writeDeadline); err != nil {
			return 0, err
		}
	}
	return cn.nc.Write(b)
}

// receive waits for the answer of cl and decodes it into result, whose byte fields keep the memory of the answer.
func (cn *conn) receive(ctx context.Context, cl *call, result proto.Message) error {
	if err := cn.wait(ctx, cl); err != nil {
		return err
	}
	response, err := cl.response, cl.err
	cl.release()
	if err != nil {
		return err
	}
	if response.Err != nil {
		return response.Err
	}
	if err := proto.DecodeReply(response.Result, result); err != nil {
		return fmt.Errorf("%w: %w", ErrProtocol, err)
	}
	return nil
}

// wait returns nil when cl is done. After an error cl is no longer the caller's.
func (cn *conn) wait(ctx context.Context, cl *call) error {
	deadline := time.Now().Add(cn.timeout)
	fromContext := false
	if d, ok := ctx.Deadline(); ok {
		deadline, fromContext = d, true
	}
	timed := false
	cn.mu.Lock()
	cl.waits = true
	cn.waiting++
	for !cl.done {
		if err := ctx.Err(); err != nil {
			return cn.abandon(cl, err)
		}
		if !time.Now().Before(deadline) {
			if fromContext {
				return cn.abandon(cl, context.DeadlineExceeded)
			}
			return cn.abandon(cl, fmt.Errorf("no answer in %v: %w", cn.timeout, context.DeadlineExceeded))
		}
		if !cn.reading {
			cn.reading = true
			cn.mu.Unlock()
			cn.read(ctx, cl, deadline)
			cn.mu.Lock()
			cn.reading = false
			continue
		}
		cn.mu.Unlock()
		if !timed {
			cl.timer.Reset(time.Until(deadline))
			timed = true
		}
		select {
		case <-cl.wake:
		case <-cl.timer.C:
		case <-ctx.Done():
		}
		cn.mu.Lock()
	}
	cl.waits = false
	cn.waiting--
	cn.handOver()
	cn.mu.Unlock()
	if timed {
		cl.timer.Stop()
	}
	return nil
}

// abandon gives cl up and tells the daemon. The caller holds mu, which is released.
func (cn *conn) abandon(cl *call, err error) error {
	cl.waits = false
	cn.waiting--
	delete(cn.pending, cl.id)
	if cl.slot {
		<-cn.slots
	}
	cn.handOver()
	// Best effort: the daemon stops what it can, and its answer is dropped like that of the request.
	if cn.enqueue(&call{internal: true}, proto.OpCancel, &proto.Cancel{ID: cl.id}, nil) == nil {
		go func() { _ = cn.flush() }() // the caller shall not wait for a daemon that does not read
	}
	cn.mu.Unlock()
	cl.timer.Stop()
	return err // cl does not go back to the pool: a late wake may still be in its channel
}

// handOver wakes a waiting call to become the reader if there is none. The caller holds mu.
func (cn *conn) handOver() {
	if cn.reading || cn.waiting == 0 {
		return
	}
	for _, cl := range cn.pending {
		if cl.waits {
			cl.signal()
			return
		}
	}
}

// read reads answers, for whomever they are, until own is done, ctx ends, the deadline passes or the connection fails.
func (cn *conn) read(ctx context.Context, own *call, deadline time.Time) {
	if ctx.Done() != nil {
		stop := context.AfterFunc(ctx, func() { _ = cn.nc.SetReadDeadline(time.Unix(1, 0)) })
		defer func() {
			if !stop() {
				// It runs or ran: the deadline that is set is unknown. A reader that it wakes by mistake looks at its
				// own context and goes on.
				cn.deadline = time.Time{}
			}
		}()
	}
	for {
		done, err := cn.deliver(own)
		if err != nil {
			cn.fail(err)
			return
		}
		if done || ctx.Err() != nil {
			return
		}
		// An earlier deadline is good enough: being woken too early costs one turn of this loop.
		if now := time.Now(); !cn.deadline.After(now) || cn.deadline.After(deadline) {
			if !deadline.After(now) {
				return
			}
			cn.deadline = deadline
			if err := cn.nc.SetReadDeadline(deadline); err != nil {
				cn.fail(err)
				return
			}
			if ctx.Err() != nil { // the deadline of AfterFunc may just have been overwritten
				return
			}
		}
		cn.room()
		n, err := cn.nc.Read(cn.in[len(cn.in):cap(cn.in)])
		cn.in = cn.in[:len(cn.in)+n]
		cn.full = len(cn.in) == cap(cn.in)
		if err == nil || n > 0 {
			continue
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			cn.deadline = time.Time{}
			continue
		}
		cn.fail(err)
		return
	}
}

// room makes place for the next read: for the whole frame that has begun to arrive, else for readSize bytes.
func (cn *conn) room() {
	have := len(cn.in) - cn.start
	need := readSize
	if cn.full {
		need = fullReadSize
	}
	if have >= 4 {
		need = max(need, 4+int(binary.BigEndian.Uint32(cn.in[cn.start:]))) // bounded by deliver
	}
	switch {
	case have == 0 && cap(cn.in) > keepSize && !cn.large:
		cn.in = make([]byte, 0, need)
	case cap(cn.in)-cn.start >= need && cap(cn.in) > len(cn.in):
		return
	case cap(cn.in) >= need && cap(cn.in) > have:
		cn.in = cn.in[:copy(cn.in[:cap(cn.in)], cn.in[cn.start:])]
	default:
		cn.in = append(make([]byte, 0, need+readSize), cn.in[cn.start:]...)
	}
	cn.start = 0
}

// deliver hands out the answers that have arrived whole and reports whether own is among them.
func (cn *conn) deliver(own *call) (bool, error) {
	for len(cn.in)-cn.start >= 4 {
		size := int64(binary.BigEndian.Uint32(cn.in[cn.start:]))
		if size > proto.MaxDataFrame {
			return false, fmt.Errorf("%w: frame of %d bytes", ErrProtocol, size)
		}
		if int64(len(cn.in)-cn.start-4) < size {
			break
		}
		// The result keeps the memory of its frame, so every frame gets its own.
		frame := append([]byte(nil), cn.in[cn.start+4:cn.start+4+int(size)]...)
		cn.start += 4 + int(size)
		cn.large = size > keepSize
		response, err := proto.ParseResponse(frame)
		if err != nil {
			return false, fmt.Errorf("%w: %w", ErrProtocol, err)
		}
		if err := cn.settle(response); err != nil {
			return false, err
		}
	}
	if cn.start == len(cn.in) {
		cn.in, cn.start = cn.in[:0], 0
	}
	cn.mu.Lock()
	defer cn.mu.Unlock()
	return own.done, nil
}

// settle gives an answer to its call. The error is one that ends the connection.
func (cn *conn) settle(response proto.Response) error {
	cn.mu.Lock()
	defer cn.mu.Unlock()
	cl, ok := cn.pending[response.ID]
	if !ok {
		if response.ID == 0 && response.Err != nil {
			return response.Err // the daemon's last word, about no request in particular
		}
		return nil // given up earlier
	}
	delete(cn.pending, response.ID)
	if cl.internal {
		// A refused bind ends the connection, a refused cancel or abort means that the answer was faster.
		if cl.bind && response.Err != nil {
			return response.Err
		}
		return nil
	}
	cl.response = response
	cl.finish(cn)
	return nil
}

// failed reports whether the connection is over.
func (cn *conn) failed() bool {
	cn.mu.Lock()
	defer cn.mu.Unlock()
	return cn.err != nil
}

// fail ends the connection and every call on it.
func (cn *conn) fail(err error) {
	cn.mu.Lock()
	defer cn.mu.Unlock()
	cn.end(err, cn.batch-1, math.MaxInt)
}

// end ends the connection and every call on it. The daemon may have seen the frames of the batches up to the given one,
// and of that one those that end within its first n bytes. The caller holds mu.
func (cn *conn) end(err error, batch uint64, n int) {
	if cn.err != nil {
		return
	}
	cn.err = err
	_ = cn.nc.Close()
	for id, cl := range cn.pending {
		delete(cn.pending, id)
		if cl.internal {
			continue
		}
		if cl.batch < batch || cl.batch == batch && cl.end <= n {
			cl.err = cn.lost(ErrOutcomeUnknown)
		} else {
			cl.err = cn.lost(errNotSent)
		}
		cl.finish(cn)
	}
}

// lost returns the error of a call that the end of the connection hit. The caller holds mu.
func (cn *conn) lost(what error) error {
	var answered *Error
	switch {
	case errors.Is(cn.err, ErrClosed), errors.Is(cn.err, ErrProtocol), errors.As(cn.err, &answered):
		return cn.err
	}
	return fmt.Errorf("%w: %w", what, cn.err)
}

func (cn *conn) acquire(ctx context.Context) error {
	select {
	case cn.slots <- struct{}{}:
		return nil
	default:
	}
	timer := time.NewTimer(cn.timeout)
	defer timer.Stop()
	select {
	case cn.slots <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return context.DeadlineExceeded
	}
}

// finish marks cl as done and wakes its caller. The caller holds mu and has taken cl out of pending.
func (cl *call) finish(cn *conn) {
	cl.done = true
	if cl.slot {
		<-cn.slots
	}
	cl.signal()
}

func (cl *call) signal() {
	select {
	case cl.wake <- struct{}{}:
	default:
	}
}

// release gives cl back to the pool.
func (cl *call) release() {
	select {
	case <-cl.wake:
	default:
	}
	*cl = call{wake: cl.wake, timer: cl.timer}
	calls.Put(cl)
}
