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
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// maxInFlight bounds the requests of one connection that are worked on at once.
const maxInFlight = 64

// Opener makes the driver for one connection.
type Opener interface {
	// Open opens the device that kind and params name. It must not keep pin.
	Open(ctx context.Context, kind string, params map[string]string, pin []byte) (enclave.Enclave, error)
}

// Spent is the error of a driver whose process is of no more use: a thread of it hangs in a device, or foreign code that cannot be
// started twice has lost its footing. The error is answered, and the process ends; the next call gets another one.
type Spent struct{ Err error }

// Error is the text of Err.
func (e *Spent) Error() string { return e.Err.Error() }

// Unwrap returns Err.
func (e *Spent) Unwrap() error { return e.Err }

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
	if errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) { // the latter when it had not read all
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

// answer performs one request with the driver. An error is a request that breaks the protocol.
func (c *served) answer(ctx context.Context, r proto.Request) error {
	var reply proto.HelperReply
	defer func() {
		clear(reply.Secret)
		clear(reply.Output)
	}()
	failure, broken := c.perform(ctx, r, &reply)
	if broken != nil {
		return broken
	}
	if failure != nil {
		err := c.reply(r.ID, &proto.HelperReply{Failure: encodeFailure(failure)})
		if errors.As(failure, new(*Spent)) {
			fmt.Fprintln(os.Stderr, "kmsd helper: ends after:", failure)
			os.Exit(1)
		}
		return err
	}
	if r.Op != proto.OpHelperDo {
		reply.Info = encodeInfo(c.driver)
	}
	return c.reply(r.ID, &reply)
}

// perform calls the driver. What it returned goes into reply, or is the failure.
func (c *served) perform(ctx context.Context, r proto.Request, reply *proto.HelperReply) (failure, broken error) {
	switch r.Op {
	case proto.OpHelperWrap:
		var m proto.HelperWrap
		if broken = proto.Decode(r.Params, &m); broken == nil {
			reply.Blob, failure = c.driver.Wrap(ctx, m.Secret, m.AAD)
		}
	case proto.OpHelperUnwrap:
		var m proto.HelperUnwrap
		if broken = proto.Decode(r.Params, &m); broken == nil {
			reply.Secret = make([]byte, enclave.SecretSize)
			failure = c.driver.Unwrap(ctx, m.Blob, m.AAD, enclave.Auth{Secret: m.Auth, Shares: m.Shares}, reply.Secret)
		}
	case proto.OpHelperForget:
		var m proto.HelperBlob
		if broken = proto.Decode(r.Params, &m); broken == nil {
			if f, ok := c.driver.(enclave.Forgetter); ok {
				failure = f.Forget(ctx, m.Blob)
			}
		}
	case proto.OpHelperHealth:
		h := c.driver.Health(ctx)
		reply.Health = proto.HelperHealth{State: string(h.State), Detail: cut(h.Detail)}
		if !h.Until.IsZero() {
			reply.Health.Until = h.Until.Unix()
		}
	case proto.OpHelperLogin:
		s, ok := c.driver.(enclave.Session)
		if !ok {
			return unsupportedOp(r.Op), nil
		}
		var m proto.HelperLogin
		if broken = proto.Decode(r.Params, &m); broken == nil {
			failure = s.Login(ctx, enclave.Auth{Secret: m.Auth, Shares: m.Shares})
		}
	case proto.OpHelperGenerate, proto.OpHelperDo, proto.OpHelperDestroy, proto.OpHelperMechanisms:
		d, ok := c.driver.(enclave.Resident)
		if !ok {
			return unsupportedOp(r.Op), nil
		}
		return performResident(ctx, d, r, reply)
	default:
		return unsupportedOp(r.Op), nil
	}
	return failure, broken
}

func unsupportedOp(op string) error {
	return &enclave.Error{Kind: enclave.ErrUnsupported, Detail: fmt.Sprintf("operation %q", cut(op))}
}

func performResident(ctx context.Context, d enclave.Resident, r proto.Request, reply *proto.HelperReply) (failure, broken error) {
	switch r.Op {
	case proto.OpHelperGenerate:
		var m proto.HelperGenerate
		if broken = proto.Decode(r.Params, &m); broken != nil {
			return nil, broken
		}
		s := enclave.Spec{Algorithm: keyspec.Algorithm(m.Algorithm), AAD: m.AAD}
		if len(m.ID) != len(s.ID) {
			return nil, fmt.Errorf("key id of %d bytes", len(m.ID))
		}
		copy(s.ID[:], m.ID)
		for _, u := range m.Usages {
			s.Usages = append(s.Usages, keyspec.Usage(u))
		}
		if len(m.File) == 0 {
			reply.Blob, reply.SPKI, failure = d.Generate(ctx, s)
			break
		}
		i, ok := d.(enclave.Importer)
		if !ok {
			return unsupportedOp("import"), nil
		}
		reply.Blob, reply.SPKI, failure = i.Import(ctx, m.File, nil, s)
	case proto.OpHelperDo:
		var m proto.HelperDo
		if broken = proto.Decode(r.Params, &m); broken != nil {
			return nil, broken
		}
		op := enclave.Op{Usage: keyspec.Usage(m.Usage), Scheme: keyspec.Scheme(m.Scheme), Input: m.Input, Digest: m.Digest, Nonce: m.Nonce,
			AAD: m.AAD, Bound: m.Bound}
		room := make([]byte, len(m.Input)+outputRoom)
		reply.Output, failure = d.Do(ctx, m.Blob, op, room[:0])
		if out := reply.Output; len(out) > 0 && &out[0] == &room[0] {
			clear(room[len(out):])
		} else {
			clear(room) // what the driver left in it before it took more, or failed
		}
		if failure == nil && len(reply.Output) > proto.MaxHelperData {
			failure = &enclave.Error{Kind: enclave.ErrUnsupported, Detail: fmt.Sprintf("result of %d bytes", len(reply.Output))}
		}
	case proto.OpHelperDestroy:
		var m proto.HelperBlob
		if broken = proto.Decode(r.Params, &m); broken == nil {
			failure = d.Destroy(ctx, m.Blob)
		}
	case proto.OpHelperMechanisms:
		var rows []enclave.Mechanism
		rows, failure = d.Mechanisms(ctx)
		for _, row := range rows {
			m := proto.HelperMechanism{Algorithm: string(row.Algorithm), Usage: string(row.Usage)}
			for _, s := range row.Schemes {
				m.Schemes = append(m.Schemes, string(s))
			}
			reply.Mechanisms = append(reply.Mechanisms, m)
		}
	}
	return failure, broken
}

// outputRoom is how much longer than its input the result of an operation usually is at most: a signature.
const outputRoom = 1 << 10

func (c *served) reply(id uint64, m *proto.HelperReply) error {
	c.write.Lock()
	defer c.write.Unlock()
	return withFrame(func(room []byte) ([]byte, error) {
		return proto.AppendResponse(room, id, nil, m)
	}, func(frame []byte) error {
		c.conn.SetWriteDeadline(time.Now().Add(DefaultTimeout))
		_, err := c.conn.Write(frame)
		return err
	})
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
