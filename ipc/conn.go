package ipc

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Reasons for the end of a connection, as Session.Closed gets them. A peer that hung up is io.EOF.
var (
	ErrIdentity  = errors.New("another process spoke on the connection")
	ErrFrameSize = errors.New("frame is empty or too long")
	ErrTimeout   = errors.New("connection timed out")
	ErrShutdown  = errors.New("server is shutting down")
	ErrClosed    = errors.New("connection is closed")
)

// Replies gather until no work is left, or until there are this many replies or bytes.
const (
	coalesceReplies = 32
	coalesceBytes   = 64 << 10
)

// lengthSize is the size of the length word before each frame.
const lengthSize = 4

// Work says how a reply of work in the background is written.
type Work int

// The kinds of work.
const (
	Quick  Work = iota // under about 100 us: its reply waits for other quick work of the connection
	Steady             // milliseconds of computing: of much that is queued, some replies wait for each other
	Slow               // its reply is written at once
)

// steadyShare is the part of the queue that a reply of steady work may wait for: an eighth of a wait that is as long as the
// queue anyway, and an eighth of the times that the peer is woken, which costs both sides more than the reply itself.
const steadyShare = 8

// Appender appends one whole frame, with its length word, to dst.
type Appender interface {
	AppendFrame(dst []byte) []byte
}

// Conn is one accepted connection.
//
// Invariant: every byte that reaches the session was sent by the process that connected. The kernel attaches the
// sender's credentials to each read and never joins bytes of two senders in one; a read whose sender is not the peer
// ends the connection before any of it is looked at. This is what defeats a process that connects, queues a request and
// then becomes another program, or shares the socket with one.
type Conn struct {
	server  *Server
	unix    *net.UnixConn
	raw     syscall.RawConn
	peer    Peer
	socket  string
	crowded bool
	account *account
	session Session

	// Owned by the reader goroutine.
	recv       receiver
	readable   func(fd uintptr) bool
	in         []byte // nil while nothing is pending
	start, end int    // of what is pending
	n          int    // outcome of the last read
	pid        int32
	readErr    error
	large      bool // holds one of the account's large buffers

	// For the sweeper.
	opened      int64
	active      atomic.Int64 // time of the last read
	partial     atomic.Int64 // when the frame began whose end has not come, or 0
	established atomic.Bool

	writable func(fd uintptr) bool
	wbuf     []byte // arguments and outcome of the write at hand; owned by whoever set writing
	wn       int
	wErr     error

	mu      sync.Mutex
	change  sync.Cond // work, out or dead changed
	out     []byte    // replies not handed to the kernel, nil when there are none
	replies int       // number of them
	sum     uint64    // of all replies so far
	batch   bool      // the reader is handling frames
	quick   int       // quick work in the background,
	steady  int       // steady work,
	work    int       // and all of it
	writing bool
	reason  error // why the reader shall stop
	dead    bool
}

func newConn(s *Server, u *net.UnixConn, peer Peer, socket string) (*Conn, error) {
	raw, err := u.SyscallConn()
	if err != nil {
		return nil, err
	}
	c := &Conn{server: s, unix: u, raw: raw, peer: peer, socket: socket, opened: s.now.Load()}
	c.active.Store(c.opened)
	c.change.L = &c.mu
	c.readable, c.writable = c.onReadable, c.onWritable // bound once, so that a read or write allocates nothing
	return c, nil
}

// Peer returns the process that connected. Its PIDFD is closed with the connection.
func (c *Conn) Peer() *Peer { return &c.peer }

// Socket returns the address of the listener that accepted the connection.
func (c *Conn) Socket() string { return c.socket }

// Crowded reports whether the connection was accepted over the limits of the server, only to be told so.
func (c *Conn) Crowded() bool { return c.crowded }

// Established tells that the session knows its peer: from now on Limits.Data and Limits.Idle apply in place of
// Limits.Control and Limits.Handshake.
func (c *Conn) Established() { c.established.Store(true) }

// More reports whether another whole frame has already arrived. It may be called from Session.Frame only.
func (c *Conn) More() bool {
	rest := c.in[c.start:c.end]
	return len(rest) > lengthSize && len(rest)-lengthSize >= int(binary.BigEndian.Uint32(rest))
}

// Busy reports whether quick work is going on in the background.
func (c *Conn) Busy() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.quick > 0
}

// Begin announces work that will reply from another goroutine; End, after the reply, that it is done.
func (c *Conn) Begin(w Work) {
	c.mu.Lock()
	c.count(w, 1)
	c.mu.Unlock()
}

func (c *Conn) count(w Work, n int) {
	c.work += n
	switch w {
	case Quick:
		c.quick += n
	case Steady:
		c.steady += n
	}
}

// due reports whether replies wait for nothing any more.
func (c *Conn) due() bool { return !c.batch && c.quick == 0 && c.replies >= c.steady/steadyShare }

// End ends what Begin began and writes the replies, unless other work is about to add to them.
func (c *Conn) End(w Work) {
	c.mu.Lock()
	c.count(w, -1)
	if w == Slow || w == Quick && c.quick == 0 && !c.batch || c.due() {
		c.flush()
	}
	if c.work == 0 {
		c.change.Broadcast()
	}
	c.mu.Unlock()
}

// Reply queues a whole frame, with its length word. A connection that is gone swallows it.
func (c *Conn) Reply(frame []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.dead {
		return
	}
	c.room(len(frame))
	c.out = append(c.out, frame...)
	c.queued()
}

// Append queues the frame of a without a copy of its own. The frame takes about size bytes.
func (c *Conn) Append(a Appender, size int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.dead {
		return
	}
	c.room(size)
	before := c.out
	c.out = a.AppendFrame(before)
	if cap(c.out) != cap(before) { // it took more than it said
		PutBuffer(before, len(before))
	}
	c.queued()
}

// Give queues the whole frame, with its length word, in the first n bytes of a buffer of TakeBuffer, and takes the buffer.
func (c *Conn) Give(buf []byte, n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.dead:
		PutBuffer(buf, n)
		return
	case c.out == nil:
		c.out = buf[:n]
	default:
		c.room(n)
		c.out = append(c.out, buf[:n]...)
		PutBuffer(buf, n)
	}
	c.queued()
}

// room makes space for n more bytes in out.
func (c *Conn) room(n int) {
	switch {
	case c.out == nil:
		c.out = TakeBuffer(n)[:0]
	case cap(c.out)-len(c.out) < n:
		bigger := append(TakeBuffer(len(c.out) + n)[:0], c.out...)
		PutBuffer(c.out, len(c.out))
		c.out = bigger
	}
}

func (c *Conn) queued() {
	c.replies++
	c.sum++
	if c.due() || c.replies >= coalesceReplies || len(c.out) >= coalesceBytes {
		c.flush()
	}
}

// flush writes what is queued as far as the kernel takes it without waiting; the rest is left to a goroutine of its
// own, so that a peer that does not read holds up nobody else. c.mu is held.
func (c *Conn) flush() {
	if c.writing || c.dead {
		return
	}
	c.writing = true
	for len(c.out) > 0 && !c.dead {
		buf := c.out
		c.out, c.replies = nil, 0
		c.mu.Unlock()
		n, err := c.tryWrite(buf)
		c.mu.Lock()
		switch {
		case err != nil:
			PutBuffer(buf, len(buf))
			c.die()
		case n < len(buf):
			go c.drain(buf, n)
			return
		default:
			PutBuffer(buf, len(buf))
		}
	}
	c.writing = false
	c.change.Broadcast()
}

// drain writes the rest of buf and all that is queued behind it, each part within Limits.Write.
func (c *Conn) drain(buf []byte, n int) {
	for {
		c.unix.SetWriteDeadline(time.Now().Add(c.server.Limits.Write))
		_, err := c.unix.Write(buf[n:])
		PutBuffer(buf, len(buf))
		c.mu.Lock()
		if err != nil {
			c.die()
		}
		if len(c.out) == 0 || c.dead {
			c.writing = false
			c.change.Broadcast()
			c.mu.Unlock()
			return
		}
		buf, n = c.out, 0
		c.out, c.replies = nil, 0
		c.change.Broadcast() // the reader may wait for room
		c.mu.Unlock()
	}
}

// tryWrite writes without waiting.
func (c *Conn) tryWrite(p []byte) (int, error) {
	c.wbuf, c.wn, c.wErr = p, 0, nil
	if err := c.raw.Write(c.writable); err != nil {
		return 0, err
	}
	c.wbuf = nil
	return c.wn, c.wErr
}

func (c *Conn) onWritable(fd uintptr) bool {
	for {
		n, err := syscall.Write(int(fd), c.wbuf)
		switch err {
		case nil:
			c.wn = n
		case syscall.EINTR:
			continue
		case syscall.EAGAIN:
		default:
			c.wErr = err
		}
		return true
	}
}

// die ends the connection at once. c.mu is held.
func (c *Conn) die() {
	if c.dead {
		return
	}
	c.dead = true
	if c.reason == nil {
		c.reason = ErrClosed
	}
	if c.out != nil {
		PutBuffer(c.out, len(c.out))
		c.out = nil
	}
	c.change.Broadcast()
	c.unix.SetDeadline(time.Unix(1, 0)) // wakes the reader and the writer; the reader's goroutine closes
}

// Close makes the reader stop before the next frame. What is queued is still written.
func (c *Conn) Close() { c.stop(ErrClosed) }

func (c *Conn) stop(reason error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.reason == nil {
		c.reason = reason
		c.unix.SetReadDeadline(time.Unix(1, 0))
	}
}

// errHandshakeOver is read's word that the connection has just been established.
var errHandshakeOver = errors.New("handshake is over")

// run reads frames until the connection ends, and closes it. The handshake needs more stack than waiting does, and a stack
// shrinks only when the collector comes by; so what follows it gets a goroutine of its own.
func (c *Conn) run() {
	err := c.read()
	if err == errHandshakeOver {
		go c.run()
		return
	}
	defer c.server.leave(c)
	c.mu.Lock()
	if c.reason != nil {
		err = c.reason
	}
	c.mu.Unlock()
	if c.in != nil {
		PutBuffer(c.in, len(c.in))
		c.in = nil
	}
	c.releaseLarge()
	if err == ErrShutdown || err == io.EOF && !c.hungUp() {
		c.settle() // what has been asked for is still answered
	}
	c.session.Closed(err)
	c.finish()
	c.unix.Close()
	c.peer.close()
}

// settle waits until no work is left in the background.
func (c *Conn) settle() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.work > 0 && !c.dead {
		c.change.Wait()
	}
}

// finish writes the last replies and lets the connection die.
func (c *Conn) finish() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.batch = false
	c.flush()
	for c.writing && !c.dead {
		c.change.Wait()
	}
	c.die()
	for c.writing {
		c.change.Wait()
	}
}

// hungUp reports whether the peer has closed both directions, rather than only said that it will ask no more.
func (c *Conn) hungUp() bool {
	gone := false
	c.raw.Control(func(fd uintptr) {
		fds := []unix.PollFd{{Fd: int32(fd)}}
		n, err := unix.Poll(fds, 0)
		gone = err == nil && n == 1 && fds[0].Revents&(unix.POLLHUP|unix.POLLERR) != 0
	})
	return gone
}

func (c *Conn) read() error {
	for {
		if err := c.fill(); err != nil {
			return err
		}
		before := c.established.Load()
		if err := c.handle(); err != nil {
			return err
		}
		if !before && c.established.Load() {
			return errHandshakeOver
		}
	}
}

// fill reads once.
func (c *Conn) fill() error {
	if err := c.raw.Read(c.readable); err != nil {
		return err
	}
	switch {
	case c.readErr != nil:
		return c.readErr
	case c.n == 0:
		if c.start < c.end {
			return io.ErrUnexpectedEOF
		}
		return io.EOF
	case c.pid != c.peer.PID:
		return ErrIdentity
	}
	c.end += c.n
	c.active.Store(c.server.now.Load())
	return nil
}

// onReadable takes a buffer only when it finds bytes to put into it, and gives it back before the goroutine sleeps.
func (c *Conn) onReadable(fd uintptr) bool {
	if c.in == nil {
		c.in, c.start, c.end = TakeBuffer(0), 0, 0
	}
	for {
		var err error
		c.n, c.pid, err = c.recv.receive(int(fd), c.in[c.end:])
		switch err {
		case nil:
			c.readErr = nil
		case unix.EINTR:
			continue
		case unix.EAGAIN:
			if c.start == c.end {
				PutBuffer(c.in, c.end)
				c.in = nil
			}
			return false
		default:
			c.readErr = err
		}
		return true
	}
}

// handle passes on every whole frame that has come.
func (c *Conn) handle() error {
	c.mu.Lock()
	c.batch = true
	sum := c.sum
	c.mu.Unlock()
	var err error
	began := c.start
	for err == nil && c.end-c.start >= lengthSize {
		limit := c.server.Limits.Control
		if c.established.Load() {
			limit = c.server.Limits.Data
		}
		size := binary.BigEndian.Uint32(c.in[c.start:])
		if size == 0 || uint64(size) > uint64(limit) {
			err = fmt.Errorf("%w: %d bytes, at most %d", ErrFrameSize, size, limit)
			break
		}
		whole := lengthSize + int(size)
		if c.end-c.start < whole {
			break
		}
		frame := c.in[c.start+lengthSize : c.start+whole]
		c.start += whole
		if err = c.backpressure(); err == nil {
			err = c.session.Frame(frame)
		}
	}
	if err == nil {
		c.arrange(c.start > began)
		c.session.Idle()
	}
	c.mu.Lock()
	c.batch = false
	if c.quick == 0 && c.sum != sum || c.due() || err != nil {
		c.flush()
	}
	c.mu.Unlock()
	return err
}

// backpressure holds the reader while the peer does not take its replies, or when the connection shall end.
func (c *Conn) backpressure() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(c.out) > c.server.Limits.Pending && c.writing && !c.dead && c.reason == nil {
		c.change.Wait()
	}
	switch {
	case c.dead:
		return ErrClosed
	case c.reason != nil:
		return c.reason
	}
	return nil
}

// arrange makes room for the rest of the frame that has begun, if any. fresh tells that it is not the one that had begun
// before.
func (c *Conn) arrange(fresh bool) {
	pending := c.end - c.start
	if pending == 0 {
		clear(c.in[:c.end])
		small := c.end <= bufferSizes[0]
		c.start, c.end = 0, 0
		if len(c.in) > bufferSizes[1] || small && len(c.in) > bufferSizes[0] {
			PutBuffer(c.in, 0)
			c.in = nil
			c.releaseLarge()
		}
		c.partial.Store(0)
		return
	}
	if fresh || c.partial.Load() == 0 {
		c.partial.Store(c.server.now.Load())
	}
	if c.end < len(c.in) {
		return
	}
	if c.start > 0 && len(c.in) == bufferSizes[0] { // requests come faster than they are read
		next := TakeBuffer(bufferSizes[1])
		copy(next, c.in[c.start:c.end])
		PutBuffer(c.in, c.end)
		c.in, c.start, c.end = next, 0, pending
		return
	}
	if c.start > 0 { // move it to the front
		copy(c.in, c.in[c.start:c.end])
		clear(c.in[pending:c.end])
		c.start, c.end = 0, pending
		return
	}
	whole := lengthSize + int(binary.BigEndian.Uint32(c.in)) // the buffer is full, and handle has checked the length
	if whole > largeBuffer {
		c.acquireLarge()
	}
	next := TakeBuffer(whole)
	copy(next, c.in[:c.end])
	PutBuffer(c.in, c.end)
	c.in = next
}

func (c *Conn) acquireLarge() {
	if !c.large {
		c.account.large <- struct{}{}
		c.large = true
	}
}

func (c *Conn) releaseLarge() {
	if c.large {
		<-c.account.large
		c.large = false
	}
}
