package client

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/ipc/proto"
)

// fake is a server that speaks the protocol and does what the test says. Every connection is served by one goroutine
// that reads a request, answers it and only then reads the next one: the worst server that a client has to live with.
type fake struct {
	t        *testing.T
	path     string
	handle   func(c *fakeConn, r proto.Request)
	listener net.Listener
	hello    proto.HelloReply

	mu    sync.Mutex
	conns map[*fakeConn]bool
	total int
	wg    sync.WaitGroup

	binds atomic.Int64
}

type fakeConn struct {
	*fake
	nc      net.Conn
	n       int  // number of the connection, from 1
	bound   bool // bind came
	writeMu sync.Mutex
}

func newFake(t *testing.T, handle func(c *fakeConn, r proto.Request)) *fake {
	t.Helper()
	f := &fake{
		t: t, path: filepath.Join(t.TempDir(), "kmsd.sock"), handle: handle, conns: make(map[*fakeConn]bool),
		hello: proto.HelloReply{
			Version: proto.Version, Server: "fake 1", Nonce: []byte("0123456789abcdef"),
			Limits: proto.Limits{InFlight: 64, StreamChunk: proto.MaxChunk, StreamWindow: proto.StreamWindow},
		},
	}
	f.start()
	t.Cleanup(f.stop)
	return f
}

func (f *fake) start() {
	f.t.Helper()
	l, err := net.Listen("unix", f.path)
	if err != nil {
		f.t.Fatal(err)
	}
	f.listener = l
	f.wg.Go(func() {
		for {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			f.mu.Lock()
			f.total++
			c := &fakeConn{fake: f, nc: nc, n: f.total}
			f.conns[c] = true
			f.mu.Unlock()
			f.wg.Go(func() { c.serve() })
		}
	})
}

// stop ends the server and its connections, as a daemon does that is restarted.
func (f *fake) stop() {
	f.listener.Close()
	f.mu.Lock()
	for c := range f.conns {
		c.nc.Close()
	}
	f.mu.Unlock()
	f.wg.Wait()
}

func (f *fake) connections() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.total
}

func (c *fakeConn) serve() {
	defer func() {
		c.nc.Close()
		c.mu.Lock()
		delete(c.conns, c)
		c.mu.Unlock()
	}()
	for {
		var length [4]byte
		if _, err := io.ReadFull(c.nc, length[:]); err != nil {
			return
		}
		frame := make([]byte, binary.BigEndian.Uint32(length[:]))
		if _, err := io.ReadFull(c.nc, frame); err != nil {
			return
		}
		r, err := proto.ParseRequest(frame)
		if err != nil {
			c.t.Errorf("request: %v", err)
			return
		}
		switch {
		case r.Op == proto.OpHello:
			c.reply(r, &c.hello)
		case r.Op == proto.OpBind:
			var bind proto.Bind
			if err := proto.Decode(r.Params, &bind); err != nil || !bytes.Equal(bind.Nonce, c.hello.Nonce) {
				c.t.Errorf("bind: %x, %v", bind.Nonce, err)
			}
			c.bound = true
			c.binds.Add(1)
			c.reply(r, &proto.Empty{})
		case !c.bound:
			c.t.Errorf("%s before bind", r.Op)
			return
		case r.Op == proto.OpPing:
			c.reply(r, &proto.Empty{})
		default:
			c.handle(c, r)
		}
	}
}

func (c *fakeConn) reply(r proto.Request, m proto.Message) { c.write(r.ID, nil, m) }

func (c *fakeConn) refuse(r proto.Request, e *proto.Error) { c.write(r.ID, e, nil) }

func (c *fakeConn) write(id uint64, e *proto.Error, m proto.Message) {
	frame, err := proto.AppendResponse(nil, id, e, m)
	if err != nil {
		c.t.Errorf("reply: %v", err)
		return
	}
	c.writeMu.Lock()
	defer c.writeMu.Unlock()
	_, _ = c.nc.Write(frame)
}

func (f *fake) dial(opts ...Option) *Client {
	f.t.Helper()
	c, err := Dial(context.Background(), append([]Option{WithSocket(f.path)}, opts...)...)
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { c.Close() })
	return c
}

// checkGoroutines fails the test if it leaves goroutines of this package's making behind.
func checkGoroutines(t *testing.T) {
	t.Helper()
	t.Cleanup(func() {
		var stacks string
		for range 50 {
			buf := make([]byte, 1<<20)
			stacks = string(buf[:runtime.Stack(buf, true)])
			if !strings.Contains(stacks, "kmsd/client.(*conn)") && !strings.Contains(stacks, "kmsd/client.(*Client)") {
				return
			}
			time.Sleep(20 * time.Millisecond)
		}
		t.Errorf("goroutines are left:\n%s", stacks)
	})
}

// random answers with as many bytes as were asked for, all of the low byte of that number, so that every answer shows
// which request it belongs to.
func random(c *fakeConn, r proto.Request) {
	var p proto.Random
	if err := proto.Decode(r.Params, &p); err != nil {
		c.t.Error(err)
		return
	}
	c.reply(r, &proto.RandomReply{Data: bytes.Repeat([]byte{byte(p.Bytes)}, int(p.Bytes))})
}

func checkRandom(c *Client, n int) error {
	b, err := c.Random(context.Background(), n)
	if err != nil {
		return err
	}
	if !bytes.Equal(b, bytes.Repeat([]byte{byte(n)}, n)) {
		return fmt.Errorf("answer to another request: %d bytes where %d were asked for", len(b), n)
	}
	return nil
}

func TestCall(t *testing.T) {
	checkGoroutines(t)
	f := newFake(t, random)
	c := f.dial(WithClientName("test 1"))
	for n := range 100 {
		if err := checkRandom(c, n*13); err != nil {
			t.Fatal(err)
		}
	}
	server, err := c.Server(t.Context())
	if err != nil || server.Name != "fake 1" || server.Limits.InFlight != 64 {
		t.Errorf("%+v, %v", server, err)
	}
	if f.connections() != 1 || f.binds.Load() != 1 {
		t.Errorf("%d connections, %d binds", f.connections(), f.binds.Load())
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if err := c.Ping(t.Context()); !errors.Is(err, ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
	if err := c.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
}

func TestConcurrent(t *testing.T) {
	checkGoroutines(t)
	f := newFake(t, func(c *fakeConn, r proto.Request) {
		if r.ID%7 == 0 { // out of order
			go func() {
				time.Sleep(time.Millisecond)
				random(c, r)
			}()
			return
		}
		random(c, r)
	})
	c := f.dial()
	var wg sync.WaitGroup
	for g := range 128 { // more than may be in flight
		wg.Go(func() {
			for i := range 30 {
				n := (g*31 + i*977) % 5000
				if i%10 == 0 {
					n = 50000 // larger than a read
				}
				if err := checkRandom(c, n); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	if f.connections() != 1 {
		t.Errorf("%d connections", f.connections())
	}
}

// TestFirstWrite checks that after a reconnection bind and the request leave in one write.
func TestFirstWrite(t *testing.T) {
	f := newFake(t, random)
	c := f.dial()
	if err := c.Ping(t.Context()); err != nil {
		t.Fatal(err)
	}
	writes := &countingConn{}
	cn := newConn(writes, time.Second)
	if err := cn.post(proto.OpBind, &proto.Bind{Nonce: []byte("nonce")}); err != nil {
		t.Fatal(err)
	}
	if _, err := cn.send(t.Context(), proto.OpPing, &proto.Empty{}, nil); err != nil {
		t.Fatal(err)
	}
	if writes.n != 1 || !bytes.Contains(writes.b, []byte("bind")) || !bytes.Contains(writes.b, []byte("ping")) {
		t.Errorf("%d writes: %q", writes.n, writes.b)
	}
}

type countingConn struct {
	net.Conn
	n int
	b []byte
}

func (c *countingConn) Write(p []byte) (int, error) {
	c.n++
	c.b = append(c.b, p...)
	return len(p), nil
}

func (c *countingConn) SetWriteDeadline(time.Time) error { return nil }

func TestErrors(t *testing.T) {
	f := newFake(t, func(c *fakeConn, r proto.Request) {
		c.refuse(r, &proto.Error{Code: proto.CodeLocked, Class: proto.ClassState, Message: "the keystore is locked", DetailID: "7"})
	})
	c := f.dial()
	_, err := c.Status(t.Context())
	if !errors.Is(err, ErrLocked) || errors.Is(err, ErrBusy) {
		t.Errorf("%v is not ErrLocked alone", err)
	}
	var e *Error
	if !errors.As(err, &e) || e.DetailID != "7" || e.Class != proto.ClassState {
		t.Errorf("%+v", e)
	}
}

func TestCancel(t *testing.T) {
	checkGoroutines(t)
	cancelled := make(chan uint64, 10)
	var slow atomic.Uint64
	f := newFake(t, func(c *fakeConn, r proto.Request) {
		switch r.Op {
		case proto.OpCancel:
			var p proto.Cancel
			if err := proto.Decode(r.Params, &p); err != nil {
				t.Error(err)
			}
			cancelled <- p.ID
			c.reply(r, &proto.Empty{})
			c.write(p.ID, &proto.Error{Code: proto.CodeCancelled}, nil)
		case proto.OpStatus:
			slow.Store(r.ID) // no answer
		default:
			random(c, r)
		}
	})
	c := f.dial()
	for _, others := range []bool{false, true} { // the cancelled call has the role of the reader, or not
		stop := make(chan struct{})
		var wg sync.WaitGroup
		if others {
			for range 4 {
				wg.Go(func() {
					for i := 0; ; i++ {
						select {
						case <-stop:
							return
						default:
						}
						if err := checkRandom(c, i%1000); err != nil {
							t.Error(err)
							return
						}
					}
				})
			}
		}
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(20*time.Millisecond, cancel)
		begin := time.Now()
		if _, err := c.Status(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("%v", err)
		}
		if d := time.Since(begin); d > time.Second {
			t.Errorf("took %v", d)
		}
		if id := <-cancelled; id != slow.Load() {
			t.Errorf("cancelled %d, want %d", id, slow.Load())
		}
		close(stop)
		wg.Wait()
		// The connection is as good as before.
		if err := checkRandom(c, 10); err != nil {
			t.Error(err)
		}
	}
	if f.connections() != 1 {
		t.Errorf("%d connections", f.connections())
	}
}

func TestDeadline(t *testing.T) {
	deadlines := make(chan uint64, 10)
	f := newFake(t, func(c *fakeConn, r proto.Request) {
		if r.Op == proto.OpStatus {
			deadlines <- r.Options.DeadlineMS
		}
	})
	c := f.dial(WithTimeout(50 * time.Millisecond))
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	if _, err := c.Status(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("context: %v", err)
	}
	if d := <-deadlines; d == 0 || d > 30 {
		t.Errorf("deadline_ms %d", d)
	}
	if _, err := c.Status(t.Context()); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("timeout of the client: %v", err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.Status(ended); !errors.Is(err, context.Canceled) {
		t.Errorf("ended context: %v", err)
	}
}

// TestTimeouts: calls that began at different times end when their own time has passed, those that wait for their turn too,
// and the connection goes on.
func TestTimeouts(t *testing.T) {
	f := newFake(t, func(c *fakeConn, r proto.Request) {
		if r.Op == proto.OpRandom {
			random(c, r)
		}
	})
	f.hello.Limits.InFlight = 8
	const timeout = 200 * time.Millisecond
	c := f.dial(WithTimeout(timeout))
	var wg sync.WaitGroup
	for i := range 12 { // the last ones find no place
		wg.Go(func() {
			begin := time.Now()
			_, err := c.Status(t.Context())
			if took := time.Since(begin); !errors.Is(err, context.DeadlineExceeded) || took < timeout || took > timeout+5*time.Second {
				t.Errorf("call %d: %v after %v", i, err, took)
			}
		})
		time.Sleep(timeout / 20)
	}
	wg.Wait()
	for range 3 {
		if err := checkRandom(c, 3); err != nil {
			t.Error(err)
		}
		time.Sleep(timeout / 2)
	}
}

// TestAbandonedCallsDoNotBlock gives up more calls than may be in flight.
func TestAbandonedCallsDoNotBlock(t *testing.T) {
	f := newFake(t, func(c *fakeConn, r proto.Request) {
		if r.Op == proto.OpRandom {
			random(c, r)
		}
	})
	f.hello.Limits.InFlight = 4
	c := f.dial(WithTimeout(5 * time.Second))
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
			defer cancel()
			if _, err := c.Status(ctx); !errors.Is(err, context.DeadlineExceeded) {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if err := checkRandom(c, 3); err != nil {
		t.Error(err)
	}
}

func TestReconnect(t *testing.T) {
	checkGoroutines(t)
	f := newFake(t, func(c *fakeConn, r proto.Request) {
		if r.Op == proto.OpKeyRotate {
			c.reply(r, &proto.KeyInfo{Name: "a"})
			return
		}
		random(c, r)
	})
	c := f.dial()
	if err := checkRandom(c, 1); err != nil {
		t.Fatal(err)
	}
	f.stop()
	f.start()
	// The connection is known to be dead only when it is written to: no operation has started, so any may be repeated.
	if _, err := c.Rotate(t.Context(), "a"); err != nil {
		t.Errorf("rotate over a dead connection: %v", err)
	}
	f.stop()
	time.AfterFunc(100*time.Millisecond, f.start)
	if err := checkRandom(c, 2); err != nil {
		t.Errorf("while the daemon is away: %v", err)
	}
}

func TestUnreachable(t *testing.T) {
	f := newFake(t, random)
	c := f.dial(WithReconnect(50 * time.Millisecond))
	f.stop()
	begin := time.Now()
	if err := checkRandom(c, 1); !errors.Is(err, ErrUnreachable) {
		t.Errorf("%v", err)
	}
	if d := time.Since(begin); d < 20*time.Millisecond || d > 2*time.Second {
		t.Errorf("took %v", d)
	}
	if _, err := Dial(t.Context(), WithSocket(f.path)); !errors.Is(err, ErrUnreachable) {
		t.Errorf("Dial: %v", err)
	}
	f.start()
}

// TestLostAnswer ends the connection between a request and its answer.
func TestLostAnswer(t *testing.T) {
	checkGoroutines(t)
	var seen sync.Map
	f := newFake(t, func(c *fakeConn, r proto.Request) {
		n, _ := seen.LoadOrStore(r.Op, new(atomic.Int64))
		if n.(*atomic.Int64).Add(1) == 1 {
			c.nc.Close()
			return
		}
		switch r.Op {
		case proto.OpKeyCreate:
			n, _ := seen.Load("request key")
			if !bytes.Equal(n.([]byte), r.Options.RequestKey) {
				t.Error("the second attempt has another request key")
			}
			c.reply(r, &proto.KeyInfo{Name: "a", Algorithm: "aes-256-gcm", Current: 1})
		case proto.OpRandom:
			random(c, r)
		default:
			c.reply(r, &proto.KeyInfo{Name: "a"})
		}
	})
	plain := f.handle
	f.handle = func(c *fakeConn, r proto.Request) {
		if r.Op == proto.OpKeyCreate {
			seen.LoadOrStore("request key", bytes.Clone(r.Options.RequestKey))
		}
		plain(c, r)
	}
	c := f.dial()
	if err := checkRandom(c, 5); err != nil {
		t.Errorf("repeatable: %v", err)
	}
	if _, err := c.Create(t.Context(), KeySpec{Name: "a", Algorithm: "aes-256-gcm"}); err != nil {
		t.Errorf("create: %v", err)
	}
	if n, _ := seen.Load(proto.OpKeyCreate); n.(*atomic.Int64).Load() != 2 {
		t.Error("create was not repeated")
	}
	if _, err := c.Rotate(t.Context(), "a"); !errors.Is(err, ErrOutcomeUnknown) {
		t.Errorf("rotate: %v", err)
	}
	if n, _ := seen.Load(proto.OpKeyRotate); n.(*atomic.Int64).Load() != 1 {
		t.Error("rotate was repeated")
	}
}

func TestBusy(t *testing.T) {
	var n atomic.Int64
	f := newFake(t, func(c *fakeConn, r proto.Request) {
		if n.Add(1) < 3 {
			c.refuse(r, &proto.Error{Code: proto.CodeBusy, Class: proto.ClassBusy, RetryAfterMS: 5, SafeToRetry: true})
			return
		}
		c.reply(r, &proto.KeyInfo{Name: "a"})
	})
	c := f.dial()
	if _, err := c.Rotate(t.Context(), "a"); err != nil {
		t.Errorf("busy twice: %v", err)
	}
	n.Store(-1000)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := c.Rotate(ctx, "a"); !errors.Is(err, ErrBusy) && !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("always busy: %v", err)
	}
}

func TestRefusedBind(t *testing.T) {
	c := newFake(t, random).dial()
	cn, err := c.connection(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	// What a server says that saw another process speak.
	if err := cn.settle([]answer{{Response: proto.Response{ID: 0, Err: &proto.Error{Code: proto.CodeIdentityChanged}}}}); !errors.Is(err, ErrIdentityChanged) {
		t.Errorf("%v", err)
	}
	cn.mu.Lock()
	cn.pending[99] = &call{internal: true, bind: true}
	cn.mu.Unlock()
	if err := cn.settle([]answer{{Response: proto.Response{ID: 99, Err: &proto.Error{Code: proto.CodeIdentityChanged}}}}); !errors.Is(err, ErrIdentityChanged) {
		t.Errorf("%v", err)
	}
}

// TestHostileServer feeds the client what no server should send.
func TestHostileServer(t *testing.T) {
	for name, bytes := range map[string][]byte{
		"huge frame":     {0xff, 0xff, 0xff, 0xff},
		"empty frame":    {0, 0, 0, 0},
		"not msgpack":    {0, 0, 0, 1, 0xc1},
		"a request":      {0, 0, 0, 8, 0x94, 0, 1, 0xa4, 'p', 'i', 'n', 'g'},
		"result missing": {0, 0, 0, 4, 0x93, 1, 1, 0xc0},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake(t, func(c *fakeConn, r proto.Request) {
				_, _ = c.nc.Write(bytes)
				c.nc.Close()
			})
			c := f.dial()
			err := c.Call(t.Context(), proto.OpLock, nil, nil, nil)
			if !errors.Is(err, ErrProtocol) {
				t.Errorf("%v", err)
			}
		})
	}
	t.Run("answer to nothing", func(t *testing.T) {
		f := newFake(t, func(c *fakeConn, r proto.Request) {
			c.write(12345, nil, &proto.Empty{})
			random(c, r)
		})
		if err := checkRandom(f.dial(), 9); err != nil {
			t.Error(err)
		}
	})
	t.Run("unknown keys", func(t *testing.T) {
		f := newFake(t, func(c *fakeConn, r proto.Request) { c.reply(r, &proto.KeyInfo{Name: "a"}) })
		if b, err := f.dial().Random(t.Context(), 4); err != nil || len(b) != 0 {
			t.Errorf("%x, %v", b, err)
		}
	})
}

func TestTooLarge(t *testing.T) {
	f := newFake(t, random)
	c := f.dial()
	err := c.Call(t.Context(), proto.OpSign, &proto.Sign{Key: "a", Data: make([]byte, 1<<20+1)}, nil, nil)
	if !errors.Is(err, ErrTooLarge) {
		t.Errorf("%v", err)
	}
	if err := checkRandom(c, 1); err != nil {
		t.Errorf("the connection suffered: %v", err)
	}
}

func TestSocketPath(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("KMSD_SOCKET", "")
	t.Setenv("XDG_RUNTIME_DIR", dir)
	t.Setenv("XDG_STATE_HOME", dir)
	for _, test := range []struct {
		want string
		opts []Option
	}{
		{"/run/kmsd/kmsd.sock", nil},
		{"/run/kmsd/admin.sock", []Option{WithAdmin()}},
		{"/x/y.sock", []Option{WithSocket("/x/y.sock"), WithAdmin()}},
		{dir + "/kmsd.sock", []Option{WithSocket(dir)}},
		{dir + "/admin.sock", []Option{WithSocket(dir), WithAdmin()}},
	} {
		if got := SocketPath(test.opts...); got != test.want {
			t.Errorf("%s, want %s", got, test.want)
		}
	}
	// A daemon without a runtime directory has its sockets in the state directory.
	t.Setenv("XDG_STATE_HOME", "")
	t.Setenv("HOME", dir)
	own := filepath.Join(dir, ".local/state/kmsd/run/kmsd.sock")
	touch := func(path string) {
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	touch(own)
	if got := SocketPath(); got != own {
		t.Errorf("%s, want %s", got, own)
	}
	t.Setenv("XDG_STATE_HOME", filepath.Join(dir, "s"))
	own = filepath.Join(dir, "s/kmsd/run/kmsd.sock")
	touch(own)
	if got := SocketPath(); got != own {
		t.Errorf("%s, want %s", got, own)
	}
	own = filepath.Join(dir, "kmsd/kmsd.sock")
	touch(own)
	if got := SocketPath(); got != own {
		t.Errorf("%s, want %s", got, own)
	}
	t.Setenv("KMSD_SOCKET", dir)
	if got := SocketPath(); got != dir+"/kmsd.sock" {
		t.Error(got)
	}
}
