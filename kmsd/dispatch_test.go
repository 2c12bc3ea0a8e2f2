package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/ipc"
	"github.com/kmsd-project/kmsd/ipc/proto"
)

// server is a daemon with a table of the test's own behind two real sockets.
type server struct {
	*daemon
	ipc        *ipc.Server
	app, admin string
}

func inLane(l lane) func(*call) lane { return func(*call) lane { return l } }

func serve(t testing.TB, table map[string]operation, limits ipc.Limits) *server {
	t.Helper()
	d := &daemon{}
	d.dispatcher.open(table, func() {})
	d.server = "kmsd test"
	d.phase.Store(uint32(phaseReady))
	s := &server{daemon: d, ipc: &ipc.Server{Handler: d, Limits: limits}}
	dir := t.TempDir()
	s.app, s.admin = filepath.Join(dir, "kmsd.sock"), filepath.Join(dir, "admin.sock")
	d.adminAddr = s.admin
	for _, path := range []string{s.app, s.admin} {
		l, err := ipc.Listen(t.Context(), path, 0o600, -1)
		if err != nil {
			t.Fatal(err)
		}
		go s.ipc.Serve(context.Background(), l)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		if err := s.ipc.Shutdown(ctx); err != nil {
			t.Errorf("shutdown: %v", err)
		}
		d.dispatcher.close()
	})
	return s
}

// peer is a client that can misbehave.
type peer struct {
	t testing.TB
	*net.UnixConn
}

func dial(t testing.TB, path string) *peer {
	t.Helper()
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(20 * time.Second))
	return &peer{t, c}
}

// bound dials and shakes hands.
func bound(t testing.TB, path string) *peer {
	t.Helper()
	p := dial(t, path)
	p.shake()
	return p
}

// shake shakes hands.
func (p *peer) shake() {
	p.t.Helper()
	p.send(1, proto.OpHello, &proto.Hello{MinVersion: 1, MaxVersion: 1}, nil)
	var hello proto.HelloReply
	p.want(1, &hello)
	p.send(2, proto.OpBind, &proto.Bind{Nonce: hello.Nonce}, nil)
	p.want(2, &proto.Empty{})
}

func (p *peer) send(id uint64, op string, m proto.Message, o *proto.Options) {
	p.t.Helper()
	frame, err := proto.AppendRequest(nil, id, op, m, o)
	if err != nil {
		p.t.Fatal(err)
	}
	if _, err := p.Write(frame); err != nil {
		p.t.Fatal(err)
	}
}

func (p *peer) frame() ([]byte, error) {
	var length [4]byte
	if _, err := io.ReadFull(p, length[:]); err != nil {
		return nil, err
	}
	b := make([]byte, binary.BigEndian.Uint32(length[:]))
	_, err := io.ReadFull(p, b)
	return b, err
}

func (p *peer) response() proto.Response {
	p.t.Helper()
	f, err := p.frame()
	if err != nil {
		p.t.Fatalf("no response: %v", err)
	}
	r, err := proto.ParseResponse(f)
	if err != nil {
		p.t.Fatal(err)
	}
	return r
}

// want reads the answer to id, which must be a success.
func (p *peer) want(id uint64, m proto.Message) {
	p.t.Helper()
	r := p.response()
	if r.ID != id || r.Err != nil {
		p.t.Fatalf("response to %d: %v, want success of %d", r.ID, r.Err, id)
	}
	if err := proto.DecodeReply(r.Result, m); err != nil {
		p.t.Fatal(err)
	}
}

// wantError reads the answer to id, which must be an error.
func (p *peer) wantError(id uint64, code proto.Code) *proto.Error {
	p.t.Helper()
	r := p.response()
	if r.ID != id || r.Err == nil || r.Err.Code != code {
		p.t.Fatalf("response to %d: %v, want %s for %d", r.ID, r.Err, code, id)
	}
	return r.Err
}

func (p *peer) wantEOF() {
	p.t.Helper()
	if f, err := p.frame(); err == nil {
		p.t.Fatalf("frame %x after the end", f)
	}
}

// testTable has one row for each thing the dispatcher can be asked to do.
type testTable struct {
	gate    chan struct{} // slow waits for it
	started chan struct{} // slow has begun
	seen    atomic.Value  // cause of the end of slow's context
}

func newTestTable() *testTable {
	return &testTable{gate: make(chan struct{}), started: make(chan struct{}, 1024)}
}

func (tt *testTable) rows() map[string]operation {
	slow := func(c *call) (proto.Message, error) {
		tt.started <- struct{}{}
		select {
		case <-tt.gate:
			return &proto.Empty{}, nil
		case <-c.ctx.Done():
			tt.seen.Store(c.ctx.Err())
			return nil, c.ctx.Err()
		}
	}
	return map[string]operation{
		proto.OpPing: {onBoth, duringAny, inLane(laneInline), func(*call) (proto.Message, error) { return &proto.Empty{}, nil }},
		proto.OpMAC: {onBoth, whenReady, inLane(lanePool), func(c *call) (proto.Message, error) {
			m, err := decode[proto.MAC](c)
			if err != nil {
				return nil, err
			}
			return &proto.MACReply{MAC: m.Data[:min(len(m.Data), 64)]}, nil
		}},
		proto.OpRandom: {onBoth, whenReady, inLane(laneInline), func(c *call) (proto.Message, error) {
			return &proto.RandomReply{Data: make([]byte, 60<<10)}, nil
		}},
		proto.OpKeyCreate: {onBoth, whenReady, inLane(laneKeygen), slow},
		proto.OpSign:      {onBoth, whenReady, inLane(laneRSA), slow},
		proto.OpInit:      {onAdmin, whenUninitialised, inLane(laneDevice), slow},
		proto.OpSlotList:  {onAdmin, whenSealed, inLane(laneInline), func(*call) (proto.Message, error) { return &proto.SlotListReply{}, nil }},
		proto.OpSelfTest:  {onBoth, duringAny, inLane(lanePool), func(*call) (proto.Message, error) { panic("secret in a panic") }},
		proto.OpDerive:    {onBoth, duringAny, func(*call) lane { panic("in the choice of the lane") }, func(*call) (proto.Message, error) { return nil, nil }},
		proto.OpKeyList: {onBoth, whenReady, inLane(laneInline), func(*call) (proto.Message, error) {
			return &proto.RandomReply{Data: make([]byte, proto.MaxControlFrame)}, nil
		}},
		proto.OpBatch: {onBoth, whenReady, inLane(lanePool), func(c *call) (proto.Message, error) {
			m, err := decode[proto.Batch](c)
			if err != nil {
				return nil, err
			}
			reply := &proto.BatchReply{}
			for _, item := range m.Items {
				result, e := c.item(item.Op, item.Params)
				reply.Items = append(reply.Items, proto.BatchResult{Error: e, Result: result})
			}
			return reply, nil
		}},
		proto.OpStreamUpdate: {onBoth, whenReady, inLane(laneInline), func(c *call) (proto.Message, error) {
			m, err := decode[proto.StreamUpdate](c)
			if err != nil {
				return nil, err
			}
			return &proto.StreamData{Data: m.Data}, nil
		}},
	}
}

func TestHandshake(t *testing.T) {
	s := serve(t, newTestTable().rows(), ipc.Limits{})
	t.Run("identity", func(t *testing.T) {
		p := dial(t, s.admin)
		p.send(1, proto.OpHello, &proto.Hello{MinVersion: 1, MaxVersion: 9}, nil)
		var hello proto.HelloReply
		p.want(1, &hello)
		if hello.Version != 1 || len(hello.Nonce) != proto.NonceSize || !hello.Identity.Admin || hello.Limits.InFlight != maxInFlight {
			t.Errorf("hello answers %+v", hello)
		}
		frame, _ := proto.AppendRequest(nil, 2, proto.OpBind, &proto.Bind{Nonce: hello.Nonce}, nil)
		frame, _ = proto.AppendRequest(frame, 3, proto.OpPing, &proto.Empty{}, nil)
		p.Write(frame) // requests may follow bind in the same write
		p.want(2, &proto.Empty{})
		p.want(3, &proto.Empty{})
	})
	for _, c := range []struct {
		name string
		do   func(p *peer)
		code proto.Code
	}{
		{"ping before hello", func(p *peer) { p.send(1, proto.OpPing, &proto.Empty{}, nil) }, proto.CodeNotBound},
		{"bind before hello", func(p *peer) { p.send(1, proto.OpBind, &proto.Bind{Nonce: make([]byte, 16)}, nil) }, proto.CodeNotBound},
		{"no version in common", func(p *peer) { p.send(1, proto.OpHello, &proto.Hello{MinVersion: 2, MaxVersion: 3}, nil) }, proto.CodeVersion},
		{"versions from nowhere", func(p *peer) { p.send(1, proto.OpHello, &proto.Hello{}, nil) }, proto.CodeVersion},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := dial(t, s.app)
			c.do(p)
			p.wantError(1, c.code)
			p.wantEOF()
		})
	}
	for name, second := range map[string]func(p *peer, nonce []byte){
		"ping between hello and bind": func(p *peer, _ []byte) { p.send(2, proto.OpPing, &proto.Empty{}, nil) },
		"hello twice":                 func(p *peer, _ []byte) { p.send(2, proto.OpHello, &proto.Hello{MinVersion: 1, MaxVersion: 1}, nil) },
		"wrong nonce":                 func(p *peer, n []byte) { n[3] ^= 1; p.send(2, proto.OpBind, &proto.Bind{Nonce: n}, nil) },
		"short nonce":                 func(p *peer, n []byte) { p.send(2, proto.OpBind, &proto.Bind{Nonce: n[:15]}, nil) },
		"no nonce":                    func(p *peer, _ []byte) { p.send(2, proto.OpBind, &proto.Bind{}, nil) },
	} {
		t.Run(name, func(t *testing.T) {
			p := dial(t, s.app)
			p.send(1, proto.OpHello, &proto.Hello{MinVersion: 1, MaxVersion: 1}, nil)
			var hello proto.HelloReply
			p.want(1, &hello)
			second(p, hello.Nonce)
			p.wantError(2, proto.CodeNotBound)
			p.wantEOF()
		})
	}
	t.Run("hello from the future", func(t *testing.T) {
		// [0, 1, "hello", {"min_version": 1, "max_version": 1, "new_thing": [true]}]
		p := dial(t, s.app)
		body := []byte("\x94\x00\x01\xa5hello\x83\xabmin_version\x01\xabmax_version\x01\xa9new_thing\x91\xc3")
		p.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(body))), body...))
		p.want(1, &proto.HelloReply{})
	})
}

func TestTableIsObeyed(t *testing.T) {
	s := serve(t, newTestTable().rows(), ipc.Limits{})
	app, admin := bound(t, s.app), bound(t, s.admin)
	for i, c := range []struct {
		p     *peer
		phase phase
		op    string
		code  proto.Code
	}{
		{app, phaseReady, "no_such_op", proto.CodeUnknownOp},
		{app, phaseReady, proto.OpSlotList, proto.CodeUnknownOp},
		{admin, phaseReady, proto.OpSlotList, ""},
		{admin, phaseLocked, proto.OpSlotList, ""},
		{admin, phaseUninitialised, proto.OpSlotList, proto.CodeUninitialised},
		{app, phaseLocked, proto.OpMAC, proto.CodeLocked},
		{app, phaseUninitialised, proto.OpMAC, proto.CodeUninitialised},
		{app, phaseUninitialised, proto.OpPing, ""},
		{app, phaseLocked, proto.OpPing, ""},
		{app, phaseReady, proto.OpMAC, ""},
		{admin, phaseReady, proto.OpInit, proto.CodeExists},
		{admin, phaseLocked, proto.OpInit, proto.CodeExists},
	} {
		s.phase.Store(uint32(c.phase))
		id := uint64(100 + i)
		c.p.send(id, c.op, &proto.Empty{}, nil)
		if c.code == "" {
			c.p.want(id, &proto.Empty{})
		} else if e := c.p.wantError(id, c.code); !e.SafeToRetry {
			t.Errorf("%s in phase %v: not said to be safe to retry", c.op, c.phase)
		}
	}
}

func TestBadRequests(t *testing.T) {
	s := serve(t, newTestTable().rows(), ipc.Limits{})
	p := bound(t, s.app)
	write := func(body string) {
		p.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(body))), body...))
	}
	p.send(3, proto.OpMAC, &proto.Sign{Scheme: "x"}, nil)
	p.wantError(3, proto.CodeInvalid) // unknown key
	write("\x95\x00\x04\xa4ping\x80\x81\xa8approval\xc4\x00")
	p.wantError(4, proto.CodeInvalid) // an option this version does not know is not ignored
	write("\x94\x00\x05\xa4ping\x80\x80")
	p.wantError(5, proto.CodeInvalid) // trailing bytes
	p.send(6, proto.OpKeyList, &proto.Empty{}, nil)
	p.wantError(6, proto.CodeTooLarge) // the answer does not fit
	p.send(7, proto.OpPing, &proto.Empty{}, nil)
	p.want(7, &proto.Empty{})
	write("\x93\x00\x08\xa4ping")
	p.wantError(8, proto.CodeInvalid)
	write("\xc1")
	p.wantError(0, proto.CodeInvalid) // not a request at all
	p.wantEOF()
}

func TestPanicIsAnswered(t *testing.T) {
	s := serve(t, newTestTable().rows(), ipc.Limits{})
	p := bound(t, s.app)
	p.send(3, proto.OpSelfTest, &proto.Empty{}, nil)
	if e := p.wantError(3, proto.CodeInternal); strings.Contains(e.Message, "secret") {
		t.Errorf("the panic shows in %q", e.Message)
	}
	p.send(4, proto.OpDerive, &proto.Empty{}, nil)
	p.want(4, &proto.Empty{})
	if n := s.panics.Load(); n != 2 {
		t.Errorf("%d panics counted, want 2", n)
	}
}

func TestPipelining(t *testing.T) {
	s := serve(t, newTestTable().rows(), ipc.Limits{})
	p := bound(t, s.app)
	const n = 200
	var frames []byte
	for i := range n {
		frames, _ = proto.AppendRequest(frames, uint64(1000+i), proto.OpMAC, &proto.MAC{Key: "a/b", Data: []byte{byte(i)}}, nil)
	}
	p.Write(frames)
	seen := make(map[uint64]bool)
	for range n {
		r := p.response()
		var m proto.MACReply
		if r.Err != nil || proto.DecodeReply(r.Result, &m) != nil || len(m.MAC) != 1 || uint64(m.MAC[0]) != r.ID-1000 || seen[r.ID] {
			t.Fatalf("response %+v", r)
		}
		seen[r.ID] = true
	}
}

func TestCancel(t *testing.T) {
	tt := newTestTable()
	s := serve(t, tt.rows(), ipc.Limits{})
	p := bound(t, s.app)
	p.send(3, proto.OpSign, &proto.Empty{}, nil)
	<-tt.started
	p.send(4, proto.OpCancel, &proto.Cancel{ID: 3}, nil)
	for range 2 { // in either order
		switch r := p.response(); r.ID {
		case 3:
			if r.Err == nil || r.Err.Code != proto.CodeCancelled {
				t.Errorf("cancelled request answers %v", r.Err)
			}
		case 4:
			if r.Err != nil {
				t.Errorf("cancel answers %v", r.Err)
			}
		}
	}
	p.send(5, proto.OpCancel, &proto.Cancel{ID: 99}, nil) // of nothing
	p.want(5, &proto.Empty{})
}

func TestDeadline(t *testing.T) {
	tt := newTestTable()
	s := serve(t, tt.rows(), ipc.Limits{})
	p := bound(t, s.app)
	// One in work and one in the queue of the lane for one.
	p.send(3, proto.OpKeyCreate, &proto.Empty{}, &proto.Options{DeadlineMS: 30})
	p.send(4, proto.OpKeyCreate, &proto.Empty{}, &proto.Options{DeadlineMS: 1})
	got := map[uint64]proto.Code{}
	for range 2 {
		r := p.response()
		got[r.ID] = r.Err.Code
	}
	if got[3] != proto.CodeDeadline || got[4] != proto.CodeDeadline {
		t.Errorf("answers %v", got)
	}
	p.send(5, proto.OpPing, &proto.Empty{}, &proto.Options{DeadlineMS: 1<<64 - 1})
	p.want(5, &proto.Empty{})
}

func TestConnectionGone(t *testing.T) {
	tt := newTestTable()
	s := serve(t, tt.rows(), ipc.Limits{})
	p := bound(t, s.app)
	p.send(3, proto.OpSign, &proto.Empty{}, nil)
	<-tt.started
	p.Close()
	for start := time.Now(); tt.seen.Load() == nil; time.Sleep(time.Millisecond) {
		if time.Since(start) > 5*time.Second {
			t.Fatal("the work of a client that is gone goes on")
		}
	}
	if err := tt.seen.Load().(error); !errors.Is(err, context.Canceled) {
		t.Errorf("its context ends with %v", err)
	}
}

func TestBusy(t *testing.T) {
	tt := newTestTable()
	s := serve(t, tt.rows(), ipc.Limits{})
	p := bound(t, s.app)
	for i := range maxInFlight + 1 {
		p.send(uint64(10+i), proto.OpSign, &proto.Empty{}, nil)
	}
	e := p.wantError(10+maxInFlight, proto.CodeBusy)
	if e.RetryAfterMS == 0 || !e.SafeToRetry {
		t.Errorf("busy says %+v", e)
	}
	p.send(9999, proto.OpPing, &proto.Empty{}, nil) // what costs nothing is still served
	p.want(9999, &proto.Empty{})
	p.send(10, proto.OpSign, &proto.Empty{}, nil)
	p.wantError(10, proto.CodeInvalid) // the id is in use
	close(tt.gate)
	for range maxInFlight {
		if r := p.response(); r.Err != nil {
			t.Fatalf("response %v", r.Err)
		}
	}
	if s.busy.Load() != 1 {
		t.Errorf("%d counted", s.busy.Load())
	}
}

func TestTooManyConnections(t *testing.T) {
	s := serve(t, newTestTable().rows(), ipc.Limits{MaxConnsPerUID: 2})
	bound(t, s.app)
	bound(t, s.app)
	p := dial(t, s.app)
	p.send(1, proto.OpHello, &proto.Hello{MinVersion: 1, MaxVersion: 1}, nil)
	if e := p.wantError(1, proto.CodeBusy); e.RetryAfterMS == 0 {
		t.Error("no hint when to come back")
	}
	p.wantEOF()
}

func TestBatch(t *testing.T) {
	s := serve(t, newTestTable().rows(), ipc.Limits{})
	p := bound(t, s.app)
	mac, _ := proto.AppendParams(nil, &proto.MAC{Key: "a", Data: []byte("x")})
	p.send(3, proto.OpBatch, &proto.Batch{Items: []proto.BatchItem{
		{Op: proto.OpMAC, Params: mac},
		{Op: proto.OpMAC, Params: []byte{0xc0}},
		{Op: proto.OpBatch, Params: []byte{0x80}},
		{Op: proto.OpSlotList, Params: []byte{0x80}},
		{Op: proto.OpSelfTest, Params: []byte{0x80}},
	}}, nil)
	var reply proto.BatchReply
	p.want(3, &reply)
	var codes []proto.Code
	for _, r := range reply.Items {
		if r.Error == nil {
			codes = append(codes, "")
		} else {
			codes = append(codes, r.Error.Code)
		}
	}
	want := []proto.Code{"", proto.CodeInvalid, proto.CodeInvalid, proto.CodeUnknownOp, proto.CodeInternal}
	if len(codes) != len(want) {
		t.Fatalf("codes %q", codes)
	}
	for i := range want {
		if codes[i] != want[i] {
			t.Errorf("item %d answers %q, want %q", i, codes[i], want[i])
		}
	}
}

func TestDataFrames(t *testing.T) {
	s := serve(t, newTestTable().rows(), ipc.Limits{})
	p := bound(t, s.app)
	chunk := bytes.Repeat([]byte{7}, proto.MaxChunk)
	go func() {
		for i := range 8 {
			f, _ := proto.AppendRequest(nil, uint64(10+i), proto.OpStreamUpdate, &proto.StreamUpdate{Stream: 1, Chunk: uint64(i), Data: chunk}, nil)
			p.Write(f)
		}
	}()
	for i := range 8 {
		var m proto.StreamData
		p.want(uint64(10+i), &m)
		if !bytes.Equal(m.Data, chunk) {
			t.Fatal("a chunk changed on its way")
		}
	}
	// The same size under another operation is refused, and the connection goes on.
	frame, _ := proto.AppendRequest(nil, 20, proto.OpStreamUpdate, &proto.StreamUpdate{Data: chunk}, nil)
	at := bytes.Index(frame, []byte(proto.OpStreamUpdate))
	copy(frame[at:], "stream_updat_")
	p.Write(frame)
	p.wantError(20, proto.CodeTooLarge)
	p.send(21, proto.OpPing, &proto.Empty{}, nil)
	p.want(21, &proto.Empty{})
}

func TestStreamRegistry(t *testing.T) {
	s := &session{}
	closed := 0
	var ids []uint64
	for range proto.MaxStreams {
		id, err := s.addStream(closer{&closed})
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, id)
	}
	var e *proto.Error
	if _, err := s.addStream(closer{&closed}); !errors.As(err, &e) || e.Code != proto.CodeBusy || closed != 1 {
		t.Errorf("one stream too many: %v, %d closed", err, closed)
	}
	o, err := s.stream(ids[0])
	if err != nil {
		t.Fatal(err)
	}
	o.release()
	s.dropStream(ids[0])
	s.dropStream(ids[0])
	if _, err := s.stream(ids[0]); err == nil || closed != 2 {
		t.Errorf("a dropped stream is found; %d closed", closed)
	}
	s.Closed(io.EOF)
	if closed != 1+proto.MaxStreams {
		t.Errorf("%d streams closed with the connection", closed)
	}
	if _, err := s.addStream(closer{&closed}); err == nil {
		t.Error("a stream on a connection that is gone")
	}
}

type closer struct{ n *int }

func (c closer) Close() { *c.n++ }

func TestUnitIn(t *testing.T) {
	for cgroup, want := range map[string]string{
		"0::/system.slice/kmsd.service\n":                                      "kmsd.service",
		"0::/user.slice/user-1000.slice/user@1000.service/app.slice/a.scope\n": "a.scope",
		"0::/system.slice/a.service/inner/deep\n":                              "a.service",
		"12:pids:/evil.service\n0::/init.scope\n":                              "init.scope",
		"0::/\n": "",
		"":       "",
		"0::/system.slice/" + strings.Repeat("a", 300) + ".service\n": "",
	} {
		if got := unitIn(cgroup); got != want {
			t.Errorf("unitIn(%q) = %q, want %q", cgroup, got, want)
		}
	}
}

// TestNullOperationAllocates guards the cost of what every request pays.
func TestNullOperationAllocates(t *testing.T) {
	s := serve(t, newTestTable().rows(), ipc.Limits{})
	p := bound(t, s.app)
	frame, _ := proto.AppendRequest(nil, 7, proto.OpPing, &proto.Empty{}, nil)
	reply := make([]byte, 64)
	once := func() {
		p.Write(frame)
		if _, err := p.Read(reply); err != nil {
			t.Fatal(err)
		}
	}
	for range 100 {
		once()
	}
	const n = 2000
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for range n {
		once()
	}
	runtime.ReadMemStats(&after)
	// One of the two allocations is the result that the handler returns.
	if per := float64(after.Mallocs-before.Mallocs) / n; per > 1.5 && !raceEnabled {
		t.Errorf("%.2f allocations for a null operation", per)
	}
}
