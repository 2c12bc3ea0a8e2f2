package client

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/kmsd-project/kmsd/ipc/proto"
)

// Client is a connection to kmsd that is made again when it is lost. It is safe for concurrent use.
type Client struct {
	options *options
	path    string

	dialing chan struct{} // held by the goroutine that connects

	mu     sync.Mutex
	conn   *conn // nil before the first and after a lost connection
	closed bool
}

// Dial connects to kmsd. The error wraps [ErrUnreachable] when nobody answers, and [ErrVersion] when the daemon speaks
// no version of the protocol that this package does.
func Dial(ctx context.Context, opts ...Option) (*Client, error) {
	o := newOptions(opts)
	c := &Client{options: o, path: o.path(), dialing: make(chan struct{}, 1)}
	ctx, cancel := context.WithTimeout(ctx, o.timeout)
	defer cancel()
	cn, err := c.connect(ctx)
	if err != nil {
		return nil, err
	}
	if err := cn.flush(); err != nil {
		cn.fail(err)
		return nil, fmt.Errorf("%w: %w", ErrUnreachable, err)
	}
	return c, nil
}

// Close ends the connection. Calls that are waiting return [ErrClosed].
func (c *Client) Close() error {
	c.mu.Lock()
	cn := c.conn
	c.conn, c.closed = nil, true
	c.mu.Unlock()
	if cn != nil {
		cn.fail(ErrClosed)
	}
	return nil
}

// Server is what the daemon said of itself when the connection was made.
type Server struct {
	Name        string
	Version     uint32 // of the protocol
	Features    []string
	Limits      proto.Limits
	Identity    proto.Identity // of this process, as the daemon sees it
	PolicyEpoch uint64
}

// Server returns what the daemon said of itself when the connection was last made.
func (c *Client) Server(ctx context.Context) (Server, error) {
	cn, err := c.connection(ctx)
	if err != nil {
		return Server{}, err
	}
	return cn.server, nil
}

// Call runs one operation: params is sent, result filled in. Operations with a method of their own are better called by
// it. Either message may be nil, so may o.
//
// A call that is answered busy is repeated after the time that the daemon names. A call whose connection is lost is
// repeated if the operation has no effect that a second one would add to, or if o has a RequestKey.
func (c *Client) Call(ctx context.Context, op string, params, result proto.Message, o *proto.Options) error {
	if params == nil {
		params = &proto.Empty{}
	}
	if result == nil {
		result = &proto.Empty{}
	}
	var r retry
	for {
		err := c.once(ctx, op, params, result, o)
		if err == nil {
			return nil
		}
		repeatable := isRepeatable(op) || o != nil && len(o.RequestKey) > 0
		if again, err := r.next(ctx, c.options, err, repeatable); !again {
			return err
		}
	}
}

func (c *Client) once(ctx context.Context, op string, params, result proto.Message, o *proto.Options) error {
	cn, err := c.connection(ctx)
	if err != nil {
		return err
	}
	return cn.call(ctx, op, params, result, o)
}

// connection returns the present connection or makes one.
func (c *Client) connection(ctx context.Context) (*conn, error) {
	c.mu.Lock()
	cn, closed := c.conn, c.closed
	c.mu.Unlock()
	if closed {
		return nil, ErrClosed
	}
	if cn != nil && !cn.over.Load() {
		return cn, nil
	}
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, c.options.timeout)
		defer cancel()
	}
	return c.connect(ctx)
}

// connect makes a connection, one goroutine at a time.
func (c *Client) connect(ctx context.Context) (*conn, error) {
	select {
	case c.dialing <- struct{}{}:
		defer func() { <-c.dialing }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	c.mu.Lock()
	cn, closed := c.conn, c.closed
	c.mu.Unlock()
	if closed {
		return nil, ErrClosed
	}
	if cn != nil && !cn.over.Load() { // another goroutine was faster
		return cn, nil
	}
	if len(c.path) > MaxSocketPath {
		return nil, fmt.Errorf("%w: the path of its socket has %d bytes, Linux takes %d: %s", ErrUnreachable, len(c.path), MaxSocketPath, c.path)
	}
	var d net.Dialer
	nc, err := d.DialContext(ctx, "unix", c.path)
	if err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, fmt.Errorf("%w: %w", ErrUnreachable, err)
	}
	cn = newConn(nc, c.options.timeout)
	if err := cn.hello(ctx, c.options.name); err != nil {
		cn.fail(err)
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		cn.fail(ErrClosed)
		return nil, ErrClosed
	}
	c.conn = cn
	return cn, nil
}

// newRequestKey returns a name for one creation, so that a second attempt is recognised.
func newRequestKey() []byte {
	key := make([]byte, 16)
	rand.Read(key)
	return key
}

// retry decides whether a failed call is made again, and waits until it is time.
type retry struct {
	attempts int
	since    time.Time // of the first failure
}

// maxBusy is for how long, and minBusy how often at least, a busy answer is taken for an invitation to come again.
const (
	maxBusy = 5 * time.Second
	minBusy = 4
)

func (r *retry) next(ctx context.Context, o *options, err error, repeatable bool) (again bool, _ error) {
	var answered *Error
	var delay time.Duration
	if r.attempts == 0 {
		r.since = time.Now()
	}
	switch {
	case ctx.Err() != nil, errors.Is(err, ErrClosed):
		return false, err
	case errors.As(err, &answered):
		if answered.Code != proto.CodeBusy || !answered.SafeToRetry && !repeatable ||
			r.attempts >= minBusy && time.Since(r.since) > maxBusy {
			return false, err
		}
		delay = max(time.Duration(answered.RetryAfterMS)*time.Millisecond, 5*time.Millisecond<<min(r.attempts, 6))
	case errors.Is(err, ErrUnreachable), errors.Is(err, errNotSent), errors.Is(err, ErrOutcomeUnknown) && repeatable:
		if r.attempts > 0 && time.Since(r.since) > o.reconnect {
			return false, err
		}
		if r.attempts > 0 || errors.Is(err, ErrUnreachable) {
			delay = 10 * time.Millisecond << min(r.attempts, 5)
		}
	default:
		return false, err
	}
	r.attempts++
	if delay == 0 {
		return true, nil
	}
	delay += jitter(delay)
	if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) < delay {
		return false, err
	}
	timer := time.NewTimer(delay)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true, nil
	case <-ctx.Done():
		return false, err
	}
}

// jitter returns up to a quarter of d, so that the clients of a restarted daemon do not come all at once.
func jitter(d time.Duration) time.Duration {
	var b [1]byte
	rand.Read(b[:])
	return d / 4 * time.Duration(b[0]) / 256
}

// isRepeatable reports whether running op twice leaves nothing behind that running it once does not.
func isRepeatable(op string) bool {
	switch op {
	case proto.OpPing, proto.OpWhoami, proto.OpStatus, proto.OpCapabilities, proto.OpSelfTest,
		proto.OpKeyGet, proto.OpKeyList, proto.OpKeyFind, proto.OpPublic, proto.OpCertRequest, proto.OpCertGet,
		proto.OpAppList, proto.OpAppGet, proto.OpCertCurrent, proto.OpCertCSR, proto.OpCertList, proto.OpCRLGet, proto.OpExpiry, proto.OpEvents,
		proto.OpTrustDomains, proto.OpTrustList, proto.OpTrustVerify,
		proto.OpSign, proto.OpVerify, proto.OpMAC, proto.OpMACVerify, proto.OpEncrypt, proto.OpDecrypt,
		proto.OpRewrap, proto.OpWrap, proto.OpDataKey, proto.OpRandom,
		proto.OpMachineShow, proto.OpSlotList, proto.OpStoreVerify, proto.OpAuditTail, proto.OpAuditHead:
		return true
	}
	return false
}
