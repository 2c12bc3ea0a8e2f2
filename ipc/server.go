package ipc

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// Handler decides about new connections.
type Handler interface {
	// Open is called when c has been accepted and its peer is known. An error closes the connection.
	Open(c *Conn) (Session, error)
}

// Session is one connection as its handler sees it. All three methods run on the goroutine that reads the connection.
type Session interface {
	// Frame handles one frame, without its length word. The bytes are valid until it returns. An error ends the connection.
	Frame(f []byte) error
	// Idle is called when every frame that has arrived has been handled.
	Idle()
	// Closed is called once, when no more frames will be read. What is queued in it is still written.
	Closed(err error)
}

// Limits bound what peers can make a server hold. A field that is zero gets its default.
type Limits struct {
	Control        int           // bytes of a frame before Conn.Established; default 64 KiB
	Data           int           // bytes of a frame afterwards; default 1 MiB + 4096
	Pending        int           // bytes of replies that may wait behind the one being written before a peer is not read either; default 128 KiB
	MaxConns       int           // connections in all; default 4096
	MaxConnsPerUID int           // connections of one uid; default 1024
	LargePerUID    int           // frames above 64 KiB that one uid may have begun at a time; default 8
	Handshake      time.Duration // from the connection to Conn.Established; default 10 s
	Frame          time.Duration // from the first to the last byte of a frame; default 30 s
	Idle           time.Duration // without a request and without work going on; default 15 min
	Write          time.Duration // for a peer to take a reply; default 10 s
}

func (l *Limits) setDefaults() {
	set(&l.Control, 64<<10)
	set(&l.Data, 1<<20+4096)
	set(&l.Pending, 128<<10)
	set(&l.MaxConns, 4096)
	set(&l.MaxConnsPerUID, 1024)
	set(&l.LargePerUID, 8)
	set(&l.Handshake, 10*time.Second)
	set(&l.Frame, 30*time.Second)
	set(&l.Idle, 15*time.Minute)
	set(&l.Write, 10*time.Second)
}

func set[T int | time.Duration](p *T, v T) {
	if *p == 0 {
		*p = v
	}
}

// maxCrowded is how many connections over the limits are let in at a time, to be told so. Further ones are closed.
const maxCrowded = 64

// Server serves connections of any number of listeners under one set of limits. Handler is required; Limits and Log
// must not be changed once Serve has been called.
type Server struct {
	Handler Handler
	Limits  Limits
	Log     *slog.Logger // nil: none

	now     atomic.Int64 // coarse clock, nanoseconds, kept by the sweeper
	started sync.Once
	stop    chan struct{} // ends the sweeper

	mu        sync.Mutex
	listeners map[*net.UnixListener]struct{}
	conns     map[*Conn]struct{}
	crowded   int
	accounts  map[uint32]*account
	closing   bool
	done      sync.WaitGroup // connections
}

// account is what one uid holds.
type account struct {
	conns int
	large chan struct{}
}

func (s *Server) start() {
	s.started.Do(func() {
		s.Limits.setDefaults()
		if s.Log == nil {
			s.Log = slog.New(slog.DiscardHandler)
		}
		s.listeners = make(map[*net.UnixListener]struct{})
		s.conns = make(map[*Conn]struct{})
		s.accounts = make(map[uint32]*account)
		s.stop = make(chan struct{})
		s.now.Store(time.Now().UnixNano())
		go s.sweep()
	})
}

// Serve accepts connections until ctx is done or Shutdown is called, and then returns nil. It closes l.
func (s *Server) Serve(ctx context.Context, l *net.UnixListener) error {
	s.start()
	defer l.Close()
	if err := requireCredentials(l); err != nil {
		return err
	}
	s.mu.Lock()
	if s.closing {
		s.mu.Unlock()
		return nil
	}
	s.listeners[l] = struct{}{}
	s.mu.Unlock()
	defer context.AfterFunc(ctx, func() { l.Close() })()

	var pause time.Duration
	for {
		u, err := l.AcceptUnix()
		switch {
		case err == nil:
			pause = 0
			s.accept(u, l.Addr().String())
		case errors.Is(err, net.ErrClosed):
			return nil
		default: // out of descriptors, mostly; it passes
			pause = min(max(2*pause, 5*time.Millisecond), time.Second)
			s.Log.Warn("accept failed", "error", err, "pause", pause)
			select {
			case <-time.After(pause):
			case <-ctx.Done():
				return nil
			}
		}
	}
}

func (s *Server) accept(u *net.UnixConn, socket string) {
	peer, err := PeerOf(u)
	if err == nil {
		err = requireCredentials(u)
	}
	if err != nil {
		s.Log.Warn("connection refused", "error", err)
		peer.close()
		u.Close()
		return
	}
	c, err := newConn(s, u, peer, socket)
	if err != nil || !s.admit(c) {
		peer.close()
		u.Close()
		return
	}
	go func() {
		if c.session, err = s.Handler.Open(c); err != nil {
			defer s.leave(c)
			s.Log.Info("connection refused", "error", err, "uid", peer.UID, "pid", peer.PID)
			c.peer.close()
			u.Close()
			return
		}
		c.run()
	}()
}

// admit counts c in. It returns false for connections that are not even told that there are too many.
func (s *Server) admit(c *Conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing {
		return false
	}
	a := s.accounts[c.peer.UID]
	if a == nil {
		a = &account{large: make(chan struct{}, s.Limits.LargePerUID)}
	}
	if len(s.conns)-s.crowded >= s.Limits.MaxConns || a.conns >= s.Limits.MaxConnsPerUID {
		if s.crowded >= maxCrowded {
			return false
		}
		s.crowded++
		c.crowded = true
	}
	if !c.crowded {
		a.conns++
	}
	s.accounts[c.peer.UID] = a
	c.account = a
	s.conns[c] = struct{}{}
	s.done.Add(1)
	return true
}

func (s *Server) leave(c *Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, c)
	if c.crowded {
		s.crowded--
	} else if c.account.conns--; c.account.conns == 0 {
		delete(s.accounts, c.peer.UID)
	}
	s.done.Done()
}

// Conns returns the number of connections.
func (s *Server) Conns() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.conns)
}

// sweep ends connections that take too long over something. One clock for all of them spares every read a timer.
func (s *Server) sweep() {
	period := min(s.Limits.Handshake, s.Limits.Frame, s.Limits.Idle) / 4
	ticker := time.NewTicker(min(max(period, 5*time.Millisecond), 500*time.Millisecond))
	defer ticker.Stop()
	for {
		select {
		case <-s.stop:
			return
		case t := <-ticker.C:
			s.now.Store(t.UnixNano())
		}
		s.mu.Lock()
		now := s.now.Load()
		for c := range s.conns {
			if s.late(c, now) {
				c.stop(ErrTimeout)
			}
		}
		s.mu.Unlock()
	}
}

func (s *Server) late(c *Conn, now int64) bool {
	if p := c.partial.Load(); p != 0 && now-p > int64(s.Limits.Frame) {
		return true
	}
	if !c.established.Load() {
		return now-c.opened > int64(s.Limits.Handshake)
	}
	if now-c.active.Load() <= int64(s.Limits.Idle) {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.work == 0 && !c.batch
}

// Shutdown stops accepting and reading, lets the work at hand finish and its replies be written, and closes every
// connection. When ctx ends first, the rest is cut off and its error returned.
func (s *Server) Shutdown(ctx context.Context) error {
	s.start()
	s.mu.Lock()
	if !s.closing {
		s.closing = true
		close(s.stop)
	}
	for l := range s.listeners {
		l.Close()
	}
	for c := range s.conns {
		c.stop(ErrShutdown)
	}
	s.mu.Unlock()

	finished := make(chan struct{})
	go func() { s.done.Wait(); close(finished) }()
	select {
	case <-finished:
		return nil
	case <-ctx.Done():
	}
	s.mu.Lock()
	for c := range s.conns {
		c.mu.Lock()
		c.die()
		c.mu.Unlock()
	}
	s.mu.Unlock()
	return ctx.Err()
}
