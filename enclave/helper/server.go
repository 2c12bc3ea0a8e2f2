package helper

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/ipc/proto"
)

// maxInFlight bounds the requests of one connection that are worked on at once.
const maxInFlight = 64

// Opener makes the driver for one connection.
type Opener interface {
	// Open opens the device that kind and params name. It must not keep pin.
	Open(ctx context.Context, kind string, params map[string]string, pin []byte) (enclave.Enclave, error)
}

// Server is the whole of a helper program.
type Server struct {
	Opener Opener
	// UIDs are who may connect; empty means the user the helper itself runs as.
	UIDs []uint32
}

// Main hardens the process and serves what it inherited as descriptor 3: a connection to kmsd from its spawner, or a listening socket
// from systemd. It returns the exit code of the program.
func (s *Server) Main() int {
	if err := harden(); err != nil {
		fmt.Fprintln(os.Stderr, "kmsd helper:", err)
		return 1
	}
	if err := s.serveInherited(); err != nil {
		fmt.Fprintln(os.Stderr, "kmsd helper:", err)
		return 1
	}
	return 0
}

// harden keeps the secrets of the process out of core dumps and out of reach of others of the same user. Signals of the terminal are
// not for us: we end when kmsd does.
func harden() error {
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("PR_SET_DUMPABLE: %w", err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("RLIMIT_CORE: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("PR_SET_NO_NEW_PRIVS: %w", err)
	}
	unix.Umask(0o077)
	signal.Ignore(syscall.SIGINT, syscall.SIGHUP, syscall.SIGPIPE)
	return nil
}

func (s *Server) serveInherited() error {
	const fd = 3
	listening, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
	if err != nil {
		return errors.New("this program is started by kmsd or by systemd")
	}
	unix.CloseOnExec(fd)
	file := os.NewFile(fd, "socket")
	if listening == 0 {
		conn, err := unixConn(file)
		if err != nil {
			return err
		}
		return s.Serve(conn)
	}
	l, err := net.FileListener(file)
	file.Close()
	if err != nil {
		return err
	}
	for {
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			if err := s.Serve(conn.(*net.UnixConn)); err != nil {
				fmt.Fprintln(os.Stderr, "kmsd helper:", err)
			}
		}()
	}
}

// unixConn makes a connection of an open descriptor and closes the file.
func unixConn(file *os.File) (*net.UnixConn, error) {
	defer file.Close()
	c, err := net.FileConn(file)
	if err != nil {
		return nil, err
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		c.Close()
		return nil, errors.New("not a unix socket")
	}
	return u, nil
}

// Serve serves one connection until the other end closes it or breaks the protocol.
func (s *Server) Serve(conn *net.UnixConn) error {
	defer conn.Close()
	allowed := s.UIDs
	if len(allowed) == 0 {
		allowed = []uint32{uint32(os.Geteuid())}
	}
	if err := checkPeer(conn, allowed); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	c := &served{opener: s.Opener, conn: conn, ctx: ctx, running: map[uint64]context.CancelFunc{}, slots: make(chan struct{}, maxInFlight)}
	err := c.read()
	cancel()
	c.close()
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// served is one connection, as the helper sees it.
type served struct {
	opener Opener
	conn   *net.UnixConn
	ctx    context.Context // of the connection
	slots  chan struct{}
	write  sync.Mutex
	calls  sync.WaitGroup

	driver enclave.Enclave // set by the first request, before any other is read

	mu      sync.Mutex
	running map[uint64]context.CancelFunc
}

func (c *served) read() error {
	for {
		frame, err := readFrame(c.conn)
		if err != nil {
			return err
		}
		r, err := proto.ParseRequest(frame)
		if err != nil {
			clear(frame)
			return err
		}
		switch {
		case r.Op == proto.OpHelperCancel:
			err = c.cancel(r)
		case c.driver == nil:
			err = c.open(r)
		default:
			c.slots <- struct{}{}
			ctx, done := c.begin(r)
			c.calls.Go(func() {
				defer func() { <-c.slots }()
				defer clear(frame)
				defer done()
				if err := c.answer(ctx, r); err != nil {
					c.conn.Close() // the reader notices and ends the connection
				}
			})
			continue
		}
		clear(frame)
		if err != nil {
			return err
		}
	}
}

// begin makes the context of a request, which its deadline, a cancel and the end of the connection end.
func (c *served) begin(r proto.Request) (context.Context, func()) {
	timeout := DefaultTimeout
	if r.Options.DeadlineMS != 0 && r.Options.DeadlineMS < uint64(time.Hour.Milliseconds()) {
		timeout = time.Duration(r.Options.DeadlineMS) * time.Millisecond
	}
	ctx, cancel := context.WithTimeout(c.ctx, timeout)
	c.mu.Lock()
	c.running[r.ID] = cancel
	c.mu.Unlock()
	return ctx, func() {
		c.mu.Lock()
		delete(c.running, r.ID)
		c.mu.Unlock()
		cancel()
	}
}

func (c *served) cancel(r proto.Request) error {
	var m proto.Cancel
	if err := proto.Decode(r.Params, &m); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if cancel := c.running[m.ID]; cancel != nil {
		cancel()
	}
	return nil
}

// open handles the first request.
func (c *served) open(r proto.Request) error {
	if r.Op != proto.OpHelperOpen {
		return fmt.Errorf("%q before open", r.Op)
	}
	var m proto.HelperOpen
	if err := proto.Decode(r.Params, &m); err != nil {
		return err
	}
	if m.Version != proto.HelperVersion {
		f := encodeFailure(&enclave.Error{Kind: enclave.ErrMisconfigured, Detail: fmt.Sprintf("the helper speaks version %d, kmsd version %d", proto.HelperVersion, m.Version),
			Remedy: "install kmsd and its helpers from one release"})
		return c.reply(r.ID, &proto.HelperReply{Failure: f})
	}
	ctx, done := c.begin(r)
	defer done()
	driver, err := c.opener.Open(ctx, m.Kind, m.Config, m.PIN)
	if err != nil {
		return c.reply(r.ID, &proto.HelperReply{Failure: encodeFailure(err)})
	}
	c.driver = driver
	return c.reply(r.ID, &proto.HelperReply{Info: encodeInfo(driver)})
}

// answer performs one request with the driver.
func (c *served) answer(ctx context.Context, r proto.Request) error {
	var reply proto.HelperReply
	var secret [enclave.SecretSize]byte
	defer clear(secret[:])
	var err error
	switch r.Op {
	case proto.OpHelperWrap:
		var m proto.HelperWrap
		if err := proto.Decode(r.Params, &m); err != nil {
			return err
		}
		reply.Blob, err = c.driver.Wrap(ctx, m.Secret, m.AAD)
	case proto.OpHelperUnwrap:
		var m proto.HelperUnwrap
		if err := proto.Decode(r.Params, &m); err != nil {
			return err
		}
		if err = c.driver.Unwrap(ctx, m.Blob, m.AAD, enclave.Auth{Secret: m.Auth, Shares: m.Shares}, secret[:]); err == nil {
			reply.Secret = secret[:]
		}
	case proto.OpHelperForget:
		var m proto.HelperBlob
		if err := proto.Decode(r.Params, &m); err != nil {
			return err
		}
		if f, ok := c.driver.(enclave.Forgetter); ok {
			err = f.Forget(ctx, m.Blob)
		}
	case proto.OpHelperHealth:
		h := c.driver.Health(ctx)
		reply.Health = proto.HelperHealth{State: string(h.State), Detail: cut(h.Detail)}
		if !h.Until.IsZero() {
			reply.Health.Until = h.Until.Unix()
		}
	default:
		err = &enclave.Error{Kind: enclave.ErrUnsupported, Detail: fmt.Sprintf("operation %q", cut(r.Op))}
	}
	reply.Info = encodeInfo(c.driver)
	if err != nil {
		reply = proto.HelperReply{Failure: encodeFailure(err)}
	}
	return c.reply(r.ID, &reply)
}

func (c *served) reply(id uint64, m *proto.HelperReply) error {
	c.write.Lock()
	defer c.write.Unlock()
	buffer := make([]byte, 0, frameRoom)
	defer func() { clear(buffer[:cap(buffer)]) }()
	frame, err := proto.AppendResponse(buffer, id, nil, m)
	if err != nil {
		return err
	}
	c.conn.SetWriteDeadline(time.Now().Add(DefaultTimeout))
	_, err = c.conn.Write(frame)
	return err
}

// close ends the driver, but does not wait for one that is stuck in its device: then the process is of no more use.
func (c *served) close() {
	done := make(chan struct{})
	go func() {
		defer close(done)
		c.calls.Wait()
		if c.driver != nil {
			c.driver.Close()
		}
	}()
	select {
	case <-done:
	case <-time.After(2 * time.Second):
		fmt.Fprintln(os.Stderr, "kmsd helper: the device does not answer")
		os.Exit(1)
	}
}
