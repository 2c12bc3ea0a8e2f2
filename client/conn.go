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
	"slices"
	"sync"
	"sync/atomic"
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
	born    time.Time // the times below are durations since then, which are cheaper to ask for
	server  Server
	over    atomic.Bool // err is set

	mu       sync.Mutex
	err      error // once set, the connection is over
	nextID   uint64
	pending  map[uint64]*call
	limit    int             // requests that may be in flight,
	inFlight int             // that are,
	turns    []chan struct{} // and callers that wait to send theirs, the first one first
	waiting  int             // calls in pending whose caller is in wait
	reader   *call           // the call whose caller has the role of the reader
	watching bool            // sweep will run
	watch    *time.Timer     // for it
	writing  bool            // somebody has the role of the writer
	batch    uint64          // number of the next write, from 1
	out      []byte          // frames for the next write
	spare    []byte          // its other buffer
	hole     proto.Hole      // what belongs into the writer's own frame without a copy
	streams  int             // that are open
	bodies   [][]byte        // buffers for their large frames

	// Owned by the reader.
	in      []byte   // received bytes,
	start   int      // from here on not looked at yet
	body    []byte   // the part of a large frame that has come; its capacity is the whole
	full    bool     // the last read filled its space
	arrived []answer // of deliver

	wrote time.Duration // when the write deadline was set; owned by the writer
}

// call is one request in flight.
type call struct {
	id       uint64
	answer   answer
	err      error
	settled  atomic.Bool   // answer or err is set
	late     atomic.Bool   // the time it may take has passed
	until    time.Duration // when that will be; 0: the context of the caller says so. Guarded by conn.mu
	waits    bool          // its caller is in wait; guarded by conn.mu
	placed   bool          // it counts as in flight
	internal bool          // nobody waits for the answer
	bind     bool          // and it is that of bind
	batch    uint64        // the write that its frame goes with,
	end      int           // and where in it the frame ends
	wake     chan struct{}
}

// answer is a response and the frame whose memory it keeps.
type answer struct {
	proto.Response
	frame []byte
}

var calls = sync.Pool{New: func() any { return &call{wake: make(chan struct{}, 1)} }}

// errNotSent says that the daemon cannot have seen the whole request.
var errNotSent = errors.New("connection lost before the request was sent")

const (
	readSize     = 16 << 10  // room for one read,
	fullReadSize = 64 << 10  // and while answers come faster than they are read
	largeFrame   = 64 << 10  // a frame longer than this gets a buffer of its own, which is the frame's memory,
	maxBodies    = 2         // of which so many are kept for the next ones
	keepSize     = 128 << 10 // a write buffer larger than this is kept only while it is needed
	minInFlight  = 1
	fullInFlight = 4096
)

func newConn(nc net.Conn, timeout time.Duration) *conn {
	cn := &conn{nc: nc, timeout: timeout, born: time.Now(), batch: 1, pending: make(map[uint64]*call), limit: minInFlight}
	cn.watch = time.AfterFunc(time.Hour, cn.sweep)
	cn.watch.Stop()
	return cn
}

// now is the time since the connection was made.
func (cn *conn) now() time.Duration { return time.Since(cn.born) }

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
	cn.mu.Lock()
	cn.limit = min(max(int(reply.Limits.InFlight), minInFlight), fullInFlight)
	cn.mu.Unlock()
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

// send sends a request and returns without waiting for the answer; receive must follow. Params may be changed afterwards.
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
	cn.mu.Lock()
	defer cn.mu.Unlock()
	if err := cn.place(ctx); err != nil {
		return nil, err
	}
	cl := calls.Get().(*call)
	cl.placed = true
	if err := cn.enqueue(cl, op, params, &options, !cn.writing); err != nil {
		cn.leave()
		cl.release()
		return nil, err
	}
	cn.write()
	return cl, nil
}

// post queues a request whose answer nobody waits for. It is written with the next one, or by flush.
func (cn *conn) post(op string, params proto.Message) error {
	cn.mu.Lock()
	defer cn.mu.Unlock()
	return cn.enqueue(&call{internal: true, bind: op == proto.OpBind}, op, params, nil, false)
}

// flush writes what is queued.
func (cn *conn) flush() error {
	cn.mu.Lock()
	defer cn.mu.Unlock()
	cn.write()
	return cn.err
}

// enqueue appends a request to the frames for the writer. With apart, a long field is not copied: the caller must become the
// writer before it releases mu, which it holds.
func (cn *conn) enqueue(cl *call, op string, params proto.Message, o *proto.Options, apart bool) (err error) {
	if cn.err != nil {
		return cn.lost(errNotSent)
	}
	cn.nextID++
	cl.id = cn.nextID
	out, hole := cn.out, cn.hole
	if apart {
		out, hole, err = proto.AppendRequestAround(out, cl.id, op, params, o)
	} else {
		out, err = proto.AppendRequest(out, cl.id, op, params, o)
	}
	if errors.Is(err, proto.ErrTooLarge) {
		return fmt.Errorf("%s: %w: %w", op, ErrTooLarge, err)
	} else if err != nil {
		return fmt.Errorf("%s: %w", op, err)
	}
	cn.out, cn.hole = out, hole
	cl.batch, cl.end = cn.batch, len(out)+len(hole.Data)
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
		frames, hole := cn.out, cn.hole
		cn.out, cn.spare, cn.hole = cn.spare[:0], nil, proto.Hole{}
		cn.batch++
		cn.mu.Unlock()
		n, err := cn.writeAll(frames, hole)
		clear(frames) // which may hold a PIN or a plaintext
		cn.mu.Lock()
		if cap(frames) <= keepSize {
			cn.spare = frames[:0]
		}
		if err != nil {
			cn.end(err, cn.batch-1, int(n))
		}
	}
	cn.hole = proto.Hole{}
	cn.writing = false
}

func (cn *conn) writeAll(frames []byte, hole proto.Hole) (int64, error) {
	// A daemon that does not read for this long is as good as gone.
	if now := cn.now(); cn.wrote == 0 || now-cn.wrote > cn.timeout/2 {
		cn.wrote = now
		if err := cn.nc.SetWriteDeadline(cn.born.Add(now + cn.timeout)); err != nil {
			return 0, err
		}
	}
	if hole.Data == nil {
		n, err := cn.nc.Write(frames)
		return int64(n), err
	}
	parts := net.Buffers{frames[:hole.At], hole.Data, frames[hole.At:]}
	return parts.WriteTo(cn.nc)
}

// receive waits for the answer of cl and decodes it into result, whose byte fields keep the memory of the answer.
func (cn *conn) receive(ctx context.Context, cl *call, result proto.Message) error {
	_, err := cn.receiveFrame(ctx, cl, result)
	return err
}

// receiveFrame is receive for a caller that may give that memory back, by recycle.
func (cn *conn) receiveFrame(ctx context.Context, cl *call, result proto.Message) (frame []byte, err error) {
	if err := cn.wait(ctx, cl); err != nil {
		return nil, err
	}
	a, err := cl.answer, cl.err
	cl.release()
	switch {
	case err != nil:
		return nil, err
	case a.Err != nil:
		return nil, a.Err
	}
	if err := proto.DecodeReply(a.Result, result); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrProtocol, err)
	}
	return a.frame, nil
}

// wait returns nil when cl is settled. After an error cl is no longer the caller's.
func (cn *conn) wait(ctx context.Context, cl *call) error {
	cn.mu.Lock()
	if _, limited := ctx.Deadline(); !limited && !cl.settled.Load() {
		cn.limitTime(cl)
	}
	cl.waits = true
	cn.waiting++
	for !cl.settled.Load() {
		if err := ctx.Err(); err != nil {
			return cn.abandon(cl, err)
		}
		if cl.late.Load() {
			return cn.abandon(cl, fmt.Errorf("no answer in %v: %w", cn.timeout, context.DeadlineExceeded))
		}
		if cn.reader == nil {
			cn.reader = cl
			cn.mu.Unlock()
			cn.read(ctx, cl)
			cn.mu.Lock()
			cn.reader = nil
			continue
		}
		cn.mu.Unlock()
		if done := ctx.Done(); done == nil {
			<-cl.wake
		} else {
			select {
			case <-cl.wake:
			case <-done:
			}
		}
		if cl.settled.Load() {
			return nil // whoever settled it reads on, or has woken the next reader
		}
		cn.mu.Lock()
	}
	if cl.waits {
		cl.waits = false
		cn.waiting--
	}
	cn.handOver()
	cn.mu.Unlock()
	return nil
}

// abandon gives cl up and tells the daemon. The caller holds mu, which is released.
func (cn *conn) abandon(cl *call, err error) error {
	cl.waits = false
	cn.waiting--
	delete(cn.pending, cl.id)
	if cl.placed {
		cn.leave()
	}
	cn.handOver()
	// Best effort: the daemon stops what it can, and its answer is dropped like that of the request.
	if cn.enqueue(&call{internal: true}, proto.OpCancel, &proto.Cancel{ID: cl.id}, nil, false) == nil {
		go func() { _ = cn.flush() }() // the caller shall not wait for a daemon that does not read
	}
	cn.mu.Unlock()
	return err // cl does not go back to the pool: somebody may be about to wake it
}

// limitTime lets cl wait for an answer no longer than timeout. One timer serves all calls: since they all have the same
// time, it is set for the oldest. The caller holds mu.
func (cn *conn) limitTime(cl *call) {
	cl.until = cn.now() + cn.timeout
	if !cn.watching {
		cn.watching = true
		cn.watch.Reset(cn.timeout)
	}
}

// sweep ends the waiting of those whose time has passed.
func (cn *conn) sweep() {
	cn.mu.Lock()
	defer cn.mu.Unlock()
	now, next := cn.now(), time.Duration(0)
	for _, cl := range cn.pending {
		switch {
		case cl.until == 0:
		case cl.until > now:
			if next == 0 || cl.until < next {
				next = cl.until
			}
		default:
			cl.late.Store(true)
			if cl == cn.reader {
				cn.interrupt()
			} else {
				cl.signal()
			}
		}
	}
	if cn.watching = next > 0; cn.watching {
		cn.watch.Reset(next - now)
	}
}

// interrupt makes the reader look up. One that it was not meant for reads on.
func (cn *conn) interrupt() { _ = cn.nc.SetReadDeadline(time.Unix(1, 0)) }

// handOver wakes a waiting call to become the reader if there is none. The caller holds mu.
func (cn *conn) handOver() {
	if cn.reader != nil || cn.waiting == 0 {
		return
	}
	for _, cl := range cn.pending {
		if cl.waits {
			cl.signal()
			return
		}
	}
}

// read reads answers, for whomever they are, until own is settled or late, ctx ends or the connection fails.
func (cn *conn) read(ctx context.Context, own *call) {
	if ctx.Done() != nil {
		defer context.AfterFunc(ctx, cn.interrupt)()
	}
	for !own.settled.Load() && !own.late.Load() && ctx.Err() == nil {
		err := cn.fill()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			err = cn.nc.SetReadDeadline(time.Time{}) // whatever it was set for is looked at after this
		}
		if err == nil {
			err = cn.deliver()
		}
		if err != nil {
			cn.fail(err)
			return
		}
	}
}

// fill reads once: into body while the rest of a large frame is to come, else into in.
func (cn *conn) fill() error {
	to := &cn.body
	if cn.body == nil {
		cn.room()
		to = &cn.in
	}
	n, err := cn.nc.Read((*to)[len(*to):cap(*to)])
	*to = (*to)[:len(*to)+n]
	cn.full = len(*to) == cap(*to)
	if n > 0 {
		return nil // an error comes again
	}
	return err
}

// room makes place for the next read: for the whole frame that has begun to arrive, which is not a large one, and for
// readSize bytes at least.
func (cn *conn) room() {
	have := len(cn.in) - cn.start
	need := readSize
	if cn.full {
		need = fullReadSize
	}
	if have >= 4 {
		need = max(need, 4+int(binary.BigEndian.Uint32(cn.in[cn.start:])))
	}
	switch {
	case cap(cn.in)-cn.start >= need && cap(cn.in) > len(cn.in):
		return
	case cap(cn.in) >= need && cap(cn.in) > have:
		copy(cn.in, cn.in[cn.start:])
		clear(cn.in[have:])
		cn.in = cn.in[:have]
	default:
		bigger := append(make([]byte, 0, need+readSize), cn.in[cn.start:]...)
		clear(cn.in)
		cn.in = bigger
	}
	cn.start = 0
}

// deliver hands out the answers that have arrived whole. The error is one that ends the connection.
func (cn *conn) deliver() error {
	arrived := cn.arrived[:0]
	defer func() {
		clear(arrived)
		cn.arrived = arrived[:0]
	}()
	for {
		frame, err := cn.next()
		if err != nil {
			return err
		}
		if frame == nil {
			break
		}
		response, err := proto.ParseResponse(frame)
		if err != nil {
			return fmt.Errorf("%w: %w", ErrProtocol, err)
		}
		arrived = append(arrived, answer{response, frame})
	}
	return cn.settle(arrived)
}

// next returns the next frame that has arrived whole, in memory of its own, or nil.
func (cn *conn) next() (frame []byte, err error) {
	if cn.body != nil {
		if len(cn.body) < cap(cn.body) {
			return nil, nil
		}
		frame, cn.body = cn.body, nil
		return frame, nil
	}
	rest := cn.in[cn.start:]
	if len(rest) < 4 {
		if len(rest) == 0 {
			cn.in, cn.start = cn.in[:0], 0
		}
		return nil, nil
	}
	size := int64(binary.BigEndian.Uint32(rest))
	rest = rest[4:]
	switch {
	case size > proto.MaxDataFrame:
		return nil, fmt.Errorf("%w: frame of %d bytes", ErrProtocol, size)
	case int64(len(rest)) >= size:
		cn.start += 4 + int(size)
		frame = append(make([]byte, 0, size), rest[:size]...)
		clear(rest[:size]) // in is kept
		return frame, nil
	case size > largeFrame:
		cn.body = append(cn.takeBody(int(size)), rest...)
		clear(rest)
		cn.in, cn.start = cn.in[:0], 0
	}
	return nil, nil
}

// takeBody returns an empty buffer with room for exactly size bytes.
func (cn *conn) takeBody(size int) []byte {
	cn.mu.Lock()
	defer cn.mu.Unlock()
	if n := len(cn.bodies); n > 0 {
		b := cn.bodies[n-1]
		cn.bodies = cn.bodies[:n-1]
		if cap(b) >= size {
			return b[:0:size]
		}
	}
	return make([]byte, 0, size)
}

// recycle takes the memory of an answer that nobody looks at any more, for as long as a stream is open.
func (cn *conn) recycle(frame []byte) {
	cn.mu.Lock()
	defer cn.mu.Unlock()
	if cap(frame) > largeFrame && len(cn.bodies) < maxBodies && cn.streams > 0 {
		cn.bodies = append(cn.bodies, frame)
	}
}

// countStreams counts a stream that was opened, 1, or has ended, -1.
func (cn *conn) countStreams(n int) {
	cn.mu.Lock()
	defer cn.mu.Unlock()
	if cn.streams += n; cn.streams == 0 {
		for _, b := range cn.bodies {
			clear(b)
		}
		cn.bodies = nil
	}
}

// settle gives answers to their calls, and then wakes the callers, many of them together. The error is one that ends the
// connection.
func (cn *conn) settle(arrived []answer) error {
	var err error
	for len(arrived) > 0 && err == nil {
		var woken [32]*call
		n := min(len(arrived), len(woken))
		cn.mu.Lock()
		for i := 0; i < n && err == nil; i++ {
			woken[i], err = cn.take(&arrived[i])
		}
		cn.mu.Unlock()
		for _, cl := range woken[:n] {
			if cl != nil {
				cl.signal()
			}
		}
		arrived = arrived[n:]
	}
	return err
}

// take settles the call of an answer and returns it if its caller has to be woken. The caller holds mu.
func (cn *conn) take(a *answer) (*call, error) {
	cl, ok := cn.pending[a.ID]
	if !ok {
		if a.ID == 0 && a.Err != nil {
			return nil, a.Err // the daemon's last word, about no request in particular
		}
		return nil, nil // given up earlier
	}
	delete(cn.pending, a.ID)
	if cl.internal {
		// A refused bind ends the connection, a refused cancel or abort means that the answer was faster.
		if cl.bind && a.Err != nil {
			return nil, a.Err
		}
		return nil, nil
	}
	cl.answer = *a
	cn.finish(cl)
	if cl == cn.reader {
		return nil, nil
	}
	return cl, nil
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
	cn.over.Store(true)
	cn.watch.Stop()
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
		cn.finish(cl)
		cl.signal()
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

// place waits until one more request may be in flight, and counts it. The caller holds mu, which is released meanwhile.
func (cn *conn) place(ctx context.Context) error {
	if cn.inFlight < cn.limit && len(cn.turns) == 0 {
		cn.inFlight++
		return nil
	}
	turn := make(chan struct{}, 1)
	cn.turns = append(cn.turns, turn)
	cn.mu.Unlock()
	timer := time.NewTimer(cn.timeout)
	var err error
	select {
	case <-turn:
	case <-ctx.Done():
		err = ctx.Err()
	case <-timer.C:
		err = context.DeadlineExceeded
	}
	timer.Stop()
	cn.mu.Lock()
	if err == nil {
		return nil
	}
	if i := slices.Index(cn.turns, turn); i >= 0 {
		cn.turns = slices.Delete(cn.turns, i, i+1)
	} else {
		cn.leave() // its turn came at the same moment
	}
	return err
}

// leave gives the place of a request to the caller that has waited longest. The caller holds mu.
func (cn *conn) leave() {
	if len(cn.turns) == 0 {
		cn.inFlight--
		return
	}
	cn.turns[0] <- struct{}{}
	cn.turns = slices.Delete(cn.turns, 0, 1)
}

// finish marks cl, which has been taken out of pending, as settled. The caller holds mu, and wakes the caller of cl.
func (cn *conn) finish(cl *call) {
	if cl.waits {
		cl.waits = false
		cn.waiting--
	}
	if cl.placed {
		cn.leave()
	}
	cl.settled.Store(true)
}

func (cl *call) signal() {
	select {
	case cl.wake <- struct{}{}:
	default:
	}
}

// release gives cl back to the pool. It may still be woken once, for nothing.
func (cl *call) release() {
	select {
	case <-cl.wake:
	default:
	}
	cl.answer, cl.err = answer{}, nil
	cl.settled.Store(false)
	cl.late.Store(false)
	cl.until, cl.waits, cl.placed = 0, false, false
	calls.Put(cl)
}
