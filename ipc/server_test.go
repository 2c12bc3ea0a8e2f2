package ipc

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// echo answers every frame with itself, on the reader or in the background.
type echo struct {
	background func(f []byte) (Work, bool)
	lane       *Lane

	mu     sync.Mutex
	conns  []*Conn
	closed []error
	idles  int
	gate   chan struct{} // nil, or what background work waits for
}

type echoSession struct {
	e *echo
	c *Conn
}

func (e *echo) Open(c *Conn) (Session, error) {
	if !c.Crowded() {
		c.Established()
	}
	e.mu.Lock()
	e.conns = append(e.conns, c)
	e.mu.Unlock()
	return &echoSession{e, c}, nil
}

type echoTask struct {
	s     *echoSession
	frame []byte
	work  Work
}

func (t *echoTask) Run() {
	if t.s.e.gate != nil {
		<-t.s.e.gate
	}
	t.s.c.Reply(t.frame)
	t.s.c.End(t.work)
}

func (s *echoSession) Frame(f []byte) error {
	if bytes.Equal(f, []byte("quit")) {
		return errors.New("asked to")
	}
	frame := append(binary.BigEndian.AppendUint32(nil, uint32(len(f))), f...)
	if s.e.background != nil {
		if w, ok := s.e.background(f); ok {
			s.c.Begin(w)
			if !s.e.lane.Submit(1, &echoTask{s, frame, w}) {
				panic("lane is full")
			}
			return nil
		}
	}
	s.c.Reply(frame)
	return nil
}

func (s *echoSession) Idle() {
	s.e.mu.Lock()
	s.e.idles++
	s.e.mu.Unlock()
}

func (s *echoSession) Closed(err error) {
	s.e.mu.Lock()
	s.e.closed = append(s.e.closed, err)
	s.e.mu.Unlock()
}

func (e *echo) ends() []error {
	e.mu.Lock()
	defer e.mu.Unlock()
	return append([]error(nil), e.closed...)
}

func (e *echo) waitEnd(t *testing.T) error {
	t.Helper()
	for start := time.Now(); time.Since(start) < 10*time.Second; time.Sleep(2 * time.Millisecond) {
		if ends := e.ends(); len(ends) > 0 {
			return ends[0]
		}
	}
	t.Fatal("the connection does not end")
	return nil
}

func start(t testing.TB, h Handler, limits Limits) (*Server, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := Listen(t.Context(), path, 0o600, -1)
	if err != nil {
		t.Fatal(err)
	}
	s := &Server{Handler: h, Limits: limits}
	served := make(chan error, 1)
	go func() { served <- s.Serve(context.Background(), l) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := s.Shutdown(ctx); err != nil {
			t.Errorf("shutdown: %v", err)
		}
		if err := <-served; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	return s, path
}

func dial(t testing.TB, path string) *net.UnixConn {
	t.Helper()
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(30 * time.Second))
	return c
}

func frame(b []byte) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), b...)
}

func readFrame(r io.Reader) ([]byte, error) {
	var n [4]byte
	if _, err := io.ReadFull(r, n[:]); err != nil {
		return nil, err
	}
	b := make([]byte, binary.BigEndian.Uint32(n[:]))
	_, err := io.ReadFull(r, b)
	return b, err
}

func TestFramesOfEverySize(t *testing.T) {
	_, path := start(t, &echo{}, Limits{})
	c := dial(t, path)
	sizes := []int{1, 2, 3, 5, 1000, 16<<10 - 4, 16<<10 - 3, 16 << 10, 16<<10 + 1, 64 << 10, 64<<10 + 61, 64<<10 + 65, 300 << 10, 1<<20 + 4096, 7}
	go func() {
		for _, n := range sizes {
			c.Write(frame(bytes.Repeat([]byte{byte(n)}, n)))
		}
	}()
	for _, n := range sizes {
		got, err := readFrame(c)
		if err != nil || !bytes.Equal(got, bytes.Repeat([]byte{byte(n)}, n)) {
			t.Fatalf("%d bytes came back as %d, error %v", n, len(got), err)
		}
	}
}

// TestSplitAnywhere cuts a stream of frames at every place.
func TestSplitAnywhere(t *testing.T) {
	_, path := start(t, &echo{}, Limits{})
	var stream []byte
	for i := range 20 {
		stream = append(stream, frame(bytes.Repeat([]byte{byte(i)}, i+1))...)
	}
	for at := 1; at < len(stream); at += 7 {
		c := dial(t, path)
		c.Write(stream[:at])
		time.Sleep(100 * time.Microsecond)
		c.Write(stream[at:])
		got := make([]byte, len(stream))
		if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, stream) {
			t.Fatalf("cut at %d: %v", at, err)
		}
		c.Close()
	}
}

func TestPeer(t *testing.T) {
	e := &echo{}
	_, path := start(t, e, Limits{})
	c := dial(t, path)
	c.Write(frame([]byte("x")))
	if _, err := readFrame(c); err != nil {
		t.Fatal(err)
	}
	e.mu.Lock()
	p := e.conns[0].Peer()
	e.mu.Unlock()
	if p.PID != int32(os.Getpid()) || p.UID != uint32(os.Getuid()) || p.GID != uint32(os.Getgid()) || !p.Alive() {
		t.Errorf("peer %+v", p)
	}
	groups, _ := os.Getgroups()
	if len(groups) != len(p.Groups) {
		t.Errorf("groups %v, want %v", p.Groups, groups)
	}
	if e.conns[0].Socket() != path {
		t.Errorf("socket %q, want %q", e.conns[0].Socket(), path)
	}
	if p.PIDFD >= 0 {
		if flags, err := unix.FcntlInt(uintptr(p.PIDFD), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
			t.Errorf("the pidfd is inherited: flags %x, error %v", flags, err)
		}
	}
}

func TestBadLengths(t *testing.T) {
	for name, c := range map[string]struct {
		in   []byte
		want error
	}{
		"empty frame":        {[]byte{0, 0, 0, 0}, ErrFrameSize},
		"4 GiB":              {[]byte{0xff, 0xff, 0xff, 0xff}, ErrFrameSize},
		"one byte over":      {binary.BigEndian.AppendUint32(nil, 1<<20+4096+1), ErrFrameSize},
		"ends in the frame":  {[]byte{0, 0, 0, 9, 'a'}, io.ErrUnexpectedEOF},
		"ends in the length": {[]byte{0, 0}, io.ErrUnexpectedEOF},
	} {
		e := &echo{}
		_, path := start(t, e, Limits{})
		conn := dial(t, path)
		conn.Write(c.in)
		conn.CloseWrite()
		if err := e.waitEnd(t); !errors.Is(err, c.want) {
			t.Errorf("%s: ends with %v", name, err)
		}
	}
}

// TestControlLimit: before the handshake is over, large frames are refused.
func TestControlLimit(t *testing.T) {
	h := &silent{closed: make(chan error, 1)}
	_, path := start(t, h, Limits{})
	c := dial(t, path)
	c.Write(binary.BigEndian.AppendUint32(nil, 64<<10+1))
	if err := <-h.closed; !errors.Is(err, ErrFrameSize) {
		t.Errorf("ends with %v", err)
	}
}

// silent never establishes a connection and answers nothing.
type silent struct{ closed chan error }

func (s *silent) Open(*Conn) (Session, error) { return s, nil }
func (s *silent) Frame([]byte) error          { return nil }
func (s *silent) Idle()                       {}
func (s *silent) Closed(err error)            { s.closed <- err }

// TestDescriptorsAreRefused: descriptors sent along never enter the process, and end the connection.
func TestDescriptorsAreRefused(t *testing.T) {
	e := &echo{}
	_, path := start(t, e, Limits{})
	c := dial(t, path)
	f, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	before := descriptors(t)
	if _, _, err := c.WriteMsgUnix(frame([]byte("hello")), unix.UnixRights(int(f.Fd())), nil); err != nil {
		t.Fatal(err)
	}
	if err := e.waitEnd(t); !errors.Is(err, ErrIdentity) {
		t.Errorf("ends with %v", err)
	}
	if after := descriptors(t); after > before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}

func descriptors(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, entry := range entries {
		if target, _ := os.Readlink("/proc/self/fd/" + entry.Name()); target == "/dev/null" {
			n++
		}
	}
	return n
}

// TestNoCredentials: bytes that came without credentials are not looked at.
func TestNoCredentials(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fds[0])
	defer unix.Close(fds[1])
	unix.Write(fds[0], []byte("early"))
	unix.SetsockoptInt(fds[1], unix.SOL_SOCKET, unix.SO_PASSCRED, 1)
	unix.Write(fds[0], []byte("late"))
	var r receiver
	b := make([]byte, 100)
	n, pid, err := r.receive(fds[1], b)
	if string(b[:n]) != "early" || pid != 0 || err != nil {
		t.Errorf("%q from %d, error %v", b[:n], pid, err)
	}
	n, pid, err = r.receive(fds[1], b)
	if string(b[:n]) != "late" || pid != int32(os.Getpid()) || err != nil {
		t.Errorf("%q from %d, error %v", b[:n], pid, err)
	}
	x := []byte("x")
	if allocs := testing.AllocsPerRun(100, func() {
		unix.Write(fds[0], x)
		r.receive(fds[1], b)
	}); allocs > 0 {
		t.Errorf("a read allocates %v times", allocs)
	}
}

func TestTimeouts(t *testing.T) {
	limits := Limits{Handshake: 60 * time.Millisecond, Frame: 80 * time.Millisecond, Idle: 100 * time.Millisecond}
	t.Run("handshake", func(t *testing.T) {
		h := &silent{closed: make(chan error, 1)}
		_, path := start(t, h, limits)
		c := dial(t, path)
		stop := time.Now().Add(5 * time.Second)
		for time.Now().Before(stop) { // being active does not help
			if _, err := c.Write(frame([]byte("x"))); err != nil {
				break
			}
			time.Sleep(5 * time.Millisecond)
		}
		if err := <-h.closed; !errors.Is(err, ErrTimeout) {
			t.Errorf("ends with %v", err)
		}
	})
	t.Run("slow loris", func(t *testing.T) {
		e := &echo{}
		_, path := start(t, e, limits)
		c := dial(t, path)
		c.Write(append(frame([]byte("whole")), 0, 0, 0, 200)) // a frame and the beginning of one
		for range 1000 {
			if _, err := c.Write([]byte{'z'}); err != nil {
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
		if err := e.waitEnd(t); !errors.Is(err, ErrTimeout) {
			t.Errorf("ends with %v", err)
		}
	})
	t.Run("idle", func(t *testing.T) {
		e := &echo{}
		_, path := start(t, e, Limits{Idle: 600 * time.Millisecond})
		c := dial(t, path)
		began := time.Now()
		for range 8 { // an active one stays
			c.Write(frame([]byte("x")))
			if _, err := readFrame(c); err != nil {
				t.Fatalf("after %v: %v", time.Since(began), err)
			}
			time.Sleep(100 * time.Millisecond)
		}
		if err := e.waitEnd(t); !errors.Is(err, ErrTimeout) {
			t.Errorf("ends with %v", err)
		}
	})
	t.Run("waiting for a reply is not idle", func(t *testing.T) {
		e := &echo{lane: NewLane(1, 1, nil), gate: make(chan struct{}), background: func([]byte) (Work, bool) { return Slow, true }}
		defer e.lane.Close()
		_, path := start(t, e, limits)
		c := dial(t, path)
		c.Write(frame([]byte("x")))
		time.Sleep(400 * time.Millisecond)
		close(e.gate)
		if _, err := readFrame(c); err != nil {
			t.Error(err)
		}
	})
}

// TestSlowReader: a peer that takes no replies is not read any more, costs a bounded amount of memory, holds up nobody
// else, and is cut off.
func TestSlowReader(t *testing.T) {
	e := &echo{}
	_, path := start(t, e, Limits{Pending: 256 << 10, Write: 300 * time.Millisecond})
	c := dial(t, path)
	go func() {
		big := frame(make([]byte, 32<<10))
		for {
			if _, err := c.Write(big); err != nil {
				return
			}
		}
	}()
	time.Sleep(50 * time.Millisecond)
	other := dial(t, path)
	other.Write(frame([]byte("x")))
	if _, err := readFrame(other); err != nil {
		t.Errorf("another client: %v", err)
	}
	e.mu.Lock()
	slow := e.conns[0]
	e.mu.Unlock()
	slow.mu.Lock()
	pending := len(slow.out)
	slow.mu.Unlock()
	if pending > 256<<10+64<<10 {
		t.Errorf("%d bytes wait for a peer that does not read", pending)
	}
	if err := e.waitEnd(t); err == nil {
		t.Error("no reason")
	}
}

func TestCoalescing(t *testing.T) {
	e := &echo{lane: NewLane(2, 1000, nil), background: func(f []byte) (Work, bool) { return Quick, f[0] == 'b' }}
	defer e.lane.Close()
	_, path := start(t, e, Limits{})
	c := dial(t, path)
	var all []byte
	const n = 500
	for i := range n {
		body := []byte("i" + strconv.Itoa(i))
		if i%3 == 0 {
			body[0] = 'b'
		}
		all = append(all, frame(body)...)
	}
	c.Write(all)
	seen := make(map[string]bool)
	for range n {
		f, err := readFrame(c)
		if err != nil || seen[string(f)] {
			t.Fatalf("%q: %v", f, err)
		}
		seen[string(f)] = true
	}
}

// TestSteadyWork: of much steady work a few replies come together, of little each at once, and none is left behind.
func TestSteadyWork(t *testing.T) {
	e := &echo{lane: NewLane(1, 100, nil), gate: make(chan struct{}), background: func(f []byte) (Work, bool) { return Steady, f[0] < 100 }}
	defer e.lane.Close()
	_, path := start(t, e, Limits{})
	c := dial(t, path)
	const n = 3 * steadyShare
	for i := range n {
		c.Write(frame([]byte{byte(i)}))
	}
	for start := time.Now(); e.lane.Queued() < n-1; time.Sleep(time.Millisecond) {
		if time.Since(start) > 10*time.Second {
			t.Fatal("the work is not queued")
		}
	}
	answered := func() bool {
		c.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
		_, err := readFrame(c)
		return err == nil
	}
	e.gate <- struct{}{}
	if answered() {
		t.Errorf("one reply of %d was not worth waiting with", n)
	}
	e.gate <- struct{}{}
	for range 2 {
		if !answered() {
			t.Error("two replies are still waiting")
		}
	}
	e.gate <- struct{}{}
	c.Write(frame([]byte{100}))
	for range 2 {
		if !answered() {
			t.Error("a reply of the reader waits for steady work")
		}
	}
	for i := 3; i < n; i++ {
		e.gate <- struct{}{}
		if left := n - 1 - i; left < steadyShare && !answered() {
			t.Errorf("a reply waits for %d others", left)
		} else if left == steadyShare {
			for range i - 2 {
				if !answered() {
					t.Error("a reply got lost")
				}
			}
		}
	}
}

func TestHalfClose(t *testing.T) {
	e := &echo{lane: NewLane(1, 10, nil), gate: make(chan struct{}), background: func([]byte) (Work, bool) { return Slow, true }}
	defer e.lane.Close()
	_, path := start(t, e, Limits{})
	c := dial(t, path)
	c.Write(frame([]byte("x")))
	c.CloseWrite()
	time.AfterFunc(50*time.Millisecond, func() { close(e.gate) })
	if f, err := readFrame(c); err != nil || string(f) != "x" {
		t.Errorf("%q: %v", f, err)
	}
	if err := e.waitEnd(t); err != io.EOF {
		t.Errorf("ends with %v", err)
	}
}

func TestShutdownDrains(t *testing.T) {
	e := &echo{lane: NewLane(1, 10, nil), gate: make(chan struct{}), background: func([]byte) (Work, bool) { return Slow, true }}
	defer e.lane.Close()
	s, path := start(t, e, Limits{})
	c := dial(t, path)
	idle := dial(t, path)
	c.Write(frame([]byte("x")))
	for e.lane.Queued() == 0 && len(e.ends()) == 0 {
		e.mu.Lock()
		n := len(e.conns)
		e.mu.Unlock()
		if n == 2 {
			e.conns[0].mu.Lock()
			work := e.conns[0].work + e.conns[1].work
			e.conns[0].mu.Unlock()
			if work == 1 {
				break
			}
		}
		time.Sleep(time.Millisecond)
	}
	done := make(chan error, 1)
	go func() { done <- s.Shutdown(context.Background()) }()
	if _, err := readFrame(idle); err != io.EOF {
		t.Errorf("idle connection: %v", err)
	}
	if _, err := net.Dial("unix", path); err == nil {
		t.Error("a connection is accepted during shutdown")
	}
	close(e.gate)
	if f, err := readFrame(c); err != nil || string(f) != "x" {
		t.Errorf("the request under way: %q, %v", f, err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestShutdownCutsOff(t *testing.T) {
	e := &echo{lane: NewLane(1, 10, nil), gate: make(chan struct{}), background: func([]byte) (Work, bool) { return Slow, true }}
	s, path := start(t, e, Limits{})
	c := dial(t, path)
	c.Write(frame([]byte("x")))
	time.Sleep(20 * time.Millisecond)
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if err := s.Shutdown(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("shutdown: %v", err)
	}
	if _, err := readFrame(c); err == nil {
		t.Error("an answer out of nowhere")
	}
	close(e.gate)
	e.lane.Close()
}

func TestLimits(t *testing.T) {
	e := &echo{}
	s, path := start(t, e, Limits{MaxConns: 3})
	var conns []*net.UnixConn
	for range 5 {
		c := dial(t, path)
		conns = append(conns, c)
		c.Write(frame([]byte("x")))
		if _, err := readFrame(c); err != nil {
			t.Fatal(err)
		}
	}
	crowded := 0
	e.mu.Lock()
	for _, c := range e.conns {
		if c.Crowded() {
			crowded++
		}
	}
	e.mu.Unlock()
	if crowded != 2 || s.Conns() != 5 {
		t.Errorf("%d of %d connections are over the limit", crowded, s.Conns())
	}
	for _, c := range conns {
		c.Close()
	}
	for start := time.Now(); s.Conns() > 0; time.Sleep(time.Millisecond) {
		if time.Since(start) > 5*time.Second {
			t.Fatalf("%d connections are left", s.Conns())
		}
	}
	c := dial(t, path)
	c.Write(frame([]byte("x")))
	readFrame(c)
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.conns[len(e.conns)-1].Crowded() {
		t.Error("the limit stays reached after everybody has left")
	}
}

// TestIdleConnections: a thousand connections that have spoken once and wait cost little.
func TestIdleConnections(t *testing.T) {
	_, path := start(t, &echo{}, Limits{})
	const n = 1000
	var before, after runtime.MemStats
	conns := make([]*net.UnixConn, n)
	for i := range conns {
		conns[i] = dial(t, path)
	}
	// The client's halves are made; what comes now is the server's.
	runtime.GC()
	runtime.ReadMemStats(&before)
	for _, c := range conns {
		c.Write(frame([]byte("x")))
		if _, err := readFrame(c); err != nil {
			t.Fatal(err)
		}
	}
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&after)
	grown := int64(after.HeapInuse+after.StackInuse) - int64(before.HeapInuse+before.StackInuse)
	if per := grown / n; per > 6<<10 {
		t.Errorf("%d bytes for each idle connection", per)
	}
}

// TestPartialFramesCostWhatTheySend: announcing a megabyte and sending little of it does not hold a megabyte.
func TestPartialFramesCostWhatTheySend(t *testing.T) {
	e := &echo{}
	_, path := start(t, e, Limits{})
	const n = 300
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	for range n {
		c := dial(t, path)
		c.Write(append(binary.BigEndian.AppendUint32(nil, 1<<20), make([]byte, 1000)...))
	}
	for start := time.Now(); ; time.Sleep(5 * time.Millisecond) {
		e.mu.Lock()
		conns := len(e.conns)
		e.mu.Unlock()
		if conns == n || time.Since(start) > 10*time.Second {
			break
		}
	}
	time.Sleep(50 * time.Millisecond)
	runtime.GC()
	runtime.ReadMemStats(&after)
	if per := (int64(after.HeapInuse) - int64(before.HeapInuse)) / n; per > 24<<10 {
		t.Errorf("%d bytes for each connection that has announced a megabyte", per)
	}
}

// TestLargeFramesAreRationed: one uid cannot make the server hold more than its share of large buffers, and they go on
// as they become free.
func TestLargeFramesAreRationed(t *testing.T) {
	_, path := start(t, &echo{}, Limits{LargePerUID: 2, Frame: 200 * time.Millisecond})
	for range 2 { // these hold theirs until they time out
		c := dial(t, path)
		c.Write(append(binary.BigEndian.AppendUint32(nil, 1<<20), make([]byte, 100<<10)...))
	}
	time.Sleep(20 * time.Millisecond)
	c := dial(t, path)
	body := bytes.Repeat([]byte{9}, 1<<20)
	go c.Write(frame(body))
	if got, err := readFrame(c); err == nil && !bytes.Equal(got, body) {
		t.Errorf("%d bytes came back", len(got))
	} else if err != nil {
		// It may have waited so long for its turn that its own time was up; then the next one gets through.
		c = dial(t, path)
		go c.Write(frame(body))
		if got, err := readFrame(c); err != nil || !bytes.Equal(got, body) {
			t.Errorf("%d bytes, error %v", len(got), err)
		}
	}
}

func TestListen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := Listen(t.Context(), path, 0o660, os.Getgid())
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o660 {
		t.Errorf("mode %v, error %v", info.Mode(), err)
	}
	if _, err := Listen(t.Context(), "/tmp/"+strings.Repeat("l", 103), 0o600, -1); err == nil || !strings.Contains(err.Error(), "107") {
		t.Errorf("a path that is too long: %v", err)
	}
	if _, err := Listen(t.Context(), path, 0o600, -1); err == nil {
		t.Error("two listeners on one path")
	}
}

// giver answers every frame with itself, in a buffer that it gives away.
type giver struct{ c *Conn }

func (giver) Open(c *Conn) (Session, error) { c.Established(); return giver{c}, nil }

func (g giver) Frame(f []byte) error {
	buf := TakeBuffer(MaxBuffer)
	binary.BigEndian.PutUint32(buf, uint32(len(f)))
	g.c.Give(buf, lengthSize+copy(buf[lengthSize:], f))
	return nil
}

func (giver) Idle()        {}
func (giver) Closed(error) {}

// TestGive: replies in buffers of their own come whole and in order, alone or behind others, and leave nothing in the buffers.
func TestGive(t *testing.T) {
	_, path := start(t, giver{}, Limits{})
	c := dial(t, path)
	sizes := []int{1, 300, 1 << 20, 70 << 10, 1 << 20, 1<<20 + 4000, 5}
	go func() {
		for i, n := range sizes {
			c.Write(frame(bytes.Repeat([]byte{byte('a' + i)}, n)))
		}
	}()
	for i, n := range sizes {
		if got, err := readFrame(c); err != nil || !bytes.Equal(got, bytes.Repeat([]byte{byte('a' + i)}, n)) {
			t.Fatalf("reply %d: %d bytes, %v", i, len(got), err)
		}
	}
	c.Close()
	time.Sleep(50 * time.Millisecond)
	for range 8 {
		buf := TakeBuffer(MaxBuffer)
		if i := bytes.IndexFunc(buf, func(r rune) bool { return r != 0 }); i >= 0 {
			t.Fatalf("%q at byte %d of a buffer that was given back", buf[i], i)
		}
		PutBuffer(buf, 0)
	}
}

// TestBuffersAreWiped: what one connection has sent is not there for the next.
func TestBuffersAreWiped(t *testing.T) {
	_, path := start(t, &echo{}, Limits{})
	canary := "a canary in a request"
	c := dial(t, path)
	c.Write(frame([]byte(canary)))
	if _, err := readFrame(c); err != nil {
		t.Fatal(err)
	}
	time.Sleep(20 * time.Millisecond)
	for range 20 {
		b := TakeBuffer(0)
		if strings.Contains(string(b), canary) {
			t.Fatal("a buffer in the pool still holds a request")
		}
	}
}
