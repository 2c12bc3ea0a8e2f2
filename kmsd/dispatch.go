package main

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kmsd-project/kmsd/ipc"
	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/kmsd/engine"
	"github.com/kmsd-project/kmsd/policy"
)

// operation is one row of the table in operations.go.
type operation struct {
	where  sockets
	phase  phases
	lane   func(c *call) lane
	handle func(c *call) (proto.Message, error)
}

// sockets says on which sockets an operation is served.
type sockets uint8

const (
	onBoth sockets = iota
	onAdmin
)

// phase is what the daemon is able to do.
type phase uint32

const (
	phaseUninitialised phase = iota // there is no keystore
	phaseLocked                     // there is one, and it is locked
	phaseReady
)

// String returns the word that status shows.
func (p phase) String() string { return [...]string{"uninitialised", "locked", "ready"}[p] }

// phases says when an operation is served.
type phases uint8

const (
	duringAny         phases = iota
	whenUninitialised        // init
	whenSealed               // locked or ready
	whenReady
)

// refuse returns why an operation of phases w is not served in phase p, or nil.
func (w phases) refuse(p phase) *proto.Error {
	switch {
	case w == duringAny:
	case w == whenUninitialised && p != phaseUninitialised:
		return &proto.Error{Code: proto.CodeExists, Class: proto.ClassState, Message: "there is a keystore already", SafeToRetry: true}
	case w == whenUninitialised:
	case p == phaseUninitialised:
		return &proto.Error{Code: proto.CodeUninitialised, Class: proto.ClassState, Message: "there is no keystore yet", SafeToRetry: true}
	case w == whenReady && p == phaseLocked:
		return &proto.Error{Code: proto.CodeLocked, Class: proto.ClassState, Message: "the keystore is locked", SafeToRetry: true}
	}
	return nil
}

// lane is where an operation runs.
type lane uint8

const (
	laneInline lane = iota // in the reader; under about 5 us, and stream_update, whose chunks must stay in order
	lanePool               // up to about 100 us: in the reader when nothing else is going on, else in the pool
	laneRSA                // milliseconds of computing
	laneKeygen             // up to seconds of computing, one at a time
	laneStore              // waits for the disk
	laneDevice             // waits for a device or a person
	laneTPM                // with a key that is resident in a TPM
	laneHSM                // with a key that is resident in an HSM
	laneWatch              // waits for something to happen
	lanes                  // number of lanes
)

// laneShape is the size of one lane and what is told to those who find it full.
type laneShape struct {
	workers, queue int
	retry          time.Duration
	work           ipc.Work
}

// shapes returns the lanes. Writers to the store share an fsync, so many of them may wait for it together.
func shapes() [lanes]laneShape {
	n := runtime.GOMAXPROCS(0)
	return [lanes]laneShape{
		lanePool:   {n, 4096, 5 * time.Millisecond, ipc.Quick},
		laneRSA:    {n, 1024, 50 * time.Millisecond, ipc.Steady},
		laneKeygen: {1, 128, time.Second, ipc.Slow},
		laneStore:  {128, 1024, 50 * time.Millisecond, ipc.Slow},
		laneDevice: {4, 64, 500 * time.Millisecond, ipc.Slow},
		laneTPM:    {4, 1024, 500 * time.Millisecond, ipc.Slow},  // a TPM does one thing at a time; the engine lets one in
		laneHSM:    {32, 1024, 100 * time.Millisecond, ipc.Slow}, // and as many to an HSM as its driver says
		laneWatch:  {24, 64, time.Second, ipc.Slow},              // more than the engine lets wait, so that the others are answered at once
	}
}

// Limits of one connection.
const (
	maxInFlight      = 256     // requests in the background
	maxInFlightBytes = 1 << 20 // of their frames and of the answers they may get
)

// replySpace is what the answer to op may take beyond the length of the request, in bytes. Without it, a peer that asks
// in a few bytes for as much as fits a frame, and does not read, would make the daemon hold hundreds of answers.
func replySpace(op string) int {
	switch op {
	case proto.OpCapabilities:
		return 16 << 10
	case proto.OpMasterGenerate, proto.OpCertCurrent, proto.OpCertCSR: // a chain of the hierarchy
		return 8 << 10
	case proto.OpRandom, proto.OpBatch, proto.OpKeyList, proto.OpKeyFind, proto.OpAuditTail, proto.OpCertGet,
		proto.OpAppList, proto.OpAppGet, proto.OpCertList, proto.OpCRLGet, proto.OpExpiry, proto.OpEvents,
		proto.OpCertUpload, proto.OpTrustAdd, proto.OpTrustList, proto.OpTrustVerify, proto.OpTrustDomains, proto.OpPartnerAdd:
		return proto.MaxControlFrame
	case proto.OpStreamUpdate: // of a backup
		return proto.MaxDataFrame
	}
	return 1 << 10
}

// dispatcher brings requests to the rows of the operation table. It is the ipc.Handler of the daemon.
type dispatcher struct {
	operations map[string]*operation
	lanes      [lanes]*ipc.Lane
	shapes     [lanes]laneShape
	rest       func() // erases the stack of the goroutine that calls it
	server     string // name and version, for hello
	adminAddr  string // address of the admin socket

	phase   atomic.Uint32
	policy  atomic.Pointer[policy.Policy]
	started time.Time

	refusals refusals
	requests atomic.Uint64
	panics   atomic.Uint64
	busy     atomic.Uint64
}

// open starts the lanes.
func (d *dispatcher) open(table map[string]operation, rest func()) {
	d.operations = make(map[string]*operation, len(table))
	for op, row := range table {
		d.operations[op] = &row
	}
	d.rest, d.started = rest, time.Now()
	d.shapes = shapes()
	for i, s := range d.shapes {
		if s.workers > 0 {
			d.lanes[i] = ipc.NewLane(s.workers, s.queue, rest)
		}
	}
}

// close lets the lanes finish what is queued.
func (d *dispatcher) close() {
	for _, l := range d.lanes {
		if l != nil {
			l.Close()
		}
	}
}

// session is one connection. Its state machine: hello, then bind with the nonce of hello's answer, then everything else.
//
// Invariant: before bind has brought the nonce back, no operation runs. Together with the credentials that ipc checks
// on every read, this means that what speaks now is what was looked at, and that it has read what was sent to it.
type session struct {
	daemon *daemon
	conn   *ipc.Conn
	who    engine.Caller
	nonce  [proto.NonceSize]byte
	stage  stage
	dirty  bool // something ran on the reader's stack since it was last erased

	mu         sync.Mutex
	inFlight   map[uint64]*call
	bytes      int // space of inFlight
	streams    map[uint64]*openStream
	nextStream uint64
	pending    *pending // secrets that the client has not confirmed
	closed     bool
}

type stage uint8

const (
	stageNew stage = iota
	stageGreeted
	stageBound
)

// errRefused ends a connection whose refusal has been queued.
var errRefused = errors.New("connection refused")

// Open makes the session of a new connection.
func (d *daemon) Open(c *ipc.Conn) (ipc.Session, error) {
	p := c.Peer()
	return &session{daemon: d, conn: c, who: engine.Caller{
		UID: p.UID, GID: p.GID, Groups: p.Groups, PID: p.PID, Admin: c.Socket() == d.adminAddr,
	}}, nil
}

// Frame handles one request.
func (s *session) Frame(f []byte) error {
	d := s.daemon
	d.requests.Add(1)
	c := newCall(s)
	var err error
	if c.request, err = proto.ParseRequest(f); err != nil {
		return s.reject(c, badFrame(err))
	}
	if c.request.ID == 0 {
		return s.reject(c, &proto.Error{Code: proto.CodeInvalid, Class: proto.ClassInput, Message: "the id 0 belongs to the connection"})
	}
	if s.stage != stageBound {
		return s.handshake(c)
	}
	if c.request.Op == proto.OpCancel {
		return s.cancel(c)
	}
	op, e := d.find(c.request.Op, s.who.Admin)
	if e != nil && e.Code == proto.CodeLocked && d.mayHeal() {
		op, e = &operation{lane: device, handle: handleHealing}, nil
	}
	if e != nil {
		s.refused(c, c.request.Op, e)
		return s.reject(c, e)
	}
	c.op = op
	if c.request.Options.DeadlineMS > 0 && !irrevocable(c.request.Op) {
		c.limit(time.Duration(min(c.request.Options.DeadlineMS, maxDeadlineMS)) * time.Millisecond)
	}
	c.lane = c.choose()
	if c.lane == laneInline || c.lane == lanePool && !s.conn.More() && !s.conn.Busy() {
		s.dirty = s.dirty || c.lane != laneInline
		c.run()
		c.free()
		return nil
	}
	return s.background(c, f)
}

// maxDeadlineMS keeps a deadline inside a time.Duration. A later one is as good as none.
const maxDeadlineMS = 24 * 60 * 60 * 1000

// background queues c for its lane.
func (s *session) background(c *call, f []byte) error {
	shape := s.daemon.shapes[c.lane]
	c.frame = append(c.frame[:0], f...)
	c.request.Move(c.frame)
	c.space = len(f) + replySpace(c.request.Op)

	s.mu.Lock()
	under := s.inFlight[c.request.ID]
	twice := under != nil && !under.finished.Load()
	full := len(s.inFlight) >= maxInFlight || s.bytes+c.space > maxInFlightBytes && s.working()
	if !twice && !full {
		if s.inFlight == nil {
			s.inFlight = make(map[uint64]*call)
		}
		s.inFlight[c.request.ID] = c
		s.bytes += c.space
	}
	s.mu.Unlock()
	switch {
	case twice:
		return s.reject(c, &proto.Error{Code: proto.CodeInvalid, Class: proto.ClassInput, Message: "a request with this id is under way"})
	case full:
		s.daemon.busy.Add(1)
		return s.reject(c, busy("too many requests in flight on this connection", shape.retry))
	}
	s.conn.Begin(shape.work)
	c.arm()
	if !s.daemon.lanes[c.lane].Submit(s.who.UID, c) {
		s.daemon.busy.Add(1)
		c.answer(busy("too many requests of this kind are waiting", shape.retry), nil)
		s.done(c)
	}
	return nil
}

// working reports whether a handler of this connection is at work. A call stays on the books for a moment after its answer
// has been sent, and a client that has read it may be back with the next one, under the same id, by then. s.mu is held.
func (s *session) working() bool {
	for _, c := range s.inFlight {
		if !c.finished.Load() {
			return true
		}
	}
	return false
}

// done takes c, whose answer is queued, off the books.
func (s *session) done(c *call) {
	s.mu.Lock()
	if s.inFlight[c.request.ID] == c { // the client, which has read the answer, may have used the id again
		delete(s.inFlight, c.request.ID)
	}
	s.bytes -= c.space
	s.mu.Unlock()
	work := s.daemon.shapes[c.lane].work
	c.free()
	s.conn.End(work)
}

// reject answers a request that was not begun.
func (s *session) reject(c *call, e *proto.Error) error {
	e.SafeToRetry = true
	c.answer(e, nil)
	id := c.request.ID
	c.free()
	if id == 0 { // the frame was not a request at all
		return errRefused
	}
	return nil
}

// handshake answers hello and bind.
func (s *session) handshake(c *call) error {
	if s.conn.Crowded() {
		s.daemon.busy.Add(1)
		s.reject(c, busy("too many connections", time.Second))
		return errRefused
	}
	switch op := c.request.Op; {
	case op == proto.OpHello && s.stage == stageNew:
		return s.hello(c)
	case op == proto.OpBind && s.stage == stageGreeted:
		return s.bind(c)
	default:
		s.reject(c, &proto.Error{Code: proto.CodeNotBound, Class: proto.ClassState, Message: "hello and bind come first"})
		return errRefused
	}
}

func (s *session) hello(c *call) error {
	var in proto.Hello
	if err := proto.DecodeReply(c.request.Params, &in); err != nil {
		s.reject(c, badFrame(err))
		return errRefused
	}
	if in.MinVersion > proto.Version || in.MaxVersion < proto.Version {
		s.reject(c, &proto.Error{Code: proto.CodeVersion, Class: proto.ClassInput, Message: fmt.Sprintf("this kmsd speaks version %d of the protocol", proto.Version)})
		return errRefused
	}
	rand.Read(s.nonce[:])
	s.who.Unit = unitOf(s.conn.Peer())
	s.who.Client = strings.Clone(in.Client)
	s.stage = stageGreeted
	c.answer(nil, &proto.HelloReply{
		Version:  proto.Version,
		Server:   s.daemon.server,
		Features: []string{"batch", "cancel", "deadline", "request-key", "streams"},
		Limits: proto.Limits{
			ControlFrame: proto.MaxControlFrame, DataFrame: proto.MaxDataFrame, InFlight: maxInFlight,
			StreamChunk: proto.MaxChunk, StreamWindow: proto.StreamWindow, Streams: proto.MaxStreams,
		},
		Identity:    *s.identity(),
		PolicyEpoch: s.policyEpoch(),
		Nonce:       s.nonce[:],
	})
	c.free()
	return nil
}

func (s *session) bind(c *call) error {
	var in proto.Bind
	if err := proto.Decode(c.request.Params, &in); err != nil {
		s.reject(c, badFrame(err))
		return errRefused
	}
	if subtle.ConstantTimeCompare(in.Nonce, s.nonce[:]) != 1 {
		s.reject(c, &proto.Error{Code: proto.CodeNotBound, Class: proto.ClassState, Message: "this is not the nonce of hello"})
		return errRefused
	}
	if !s.conn.Peer().Alive() {
		return errRefused
	}
	clear(s.nonce[:])
	s.stage = stageBound
	s.conn.Established()
	c.answer(nil, &proto.Empty{})
	c.free()
	return nil
}

// cancel ends a request that is under way. What the request has done already stays done.
func (s *session) cancel(c *call) error {
	var in proto.Cancel
	if err := proto.Decode(c.request.Params, &in); err != nil {
		return s.reject(c, badFrame(err))
	}
	s.mu.Lock()
	target := s.inFlight[in.ID]
	if target != nil && !irrevocable(target.request.Op) { // it stays what it is while s.mu is held
		target.cancel(errCancelled)
	}
	s.mu.Unlock()
	c.answer(nil, &proto.Empty{})
	c.free()
	return nil
}

// Idle erases the stack that operations have run on.
func (s *session) Idle() {
	if s.dirty {
		s.dirty = false
		s.daemon.rest()
	}
}

// Closed says goodbye where that helps, and drops what the connection holds.
func (s *session) Closed(err error) {
	switch {
	case errors.Is(err, ipc.ErrIdentity):
		e := &proto.Error{Code: proto.CodeIdentityChanged, Class: proto.ClassPolicy, Message: "another process spoke on this connection", SafeToRetry: true}
		s.refused(&call{ctx: context.Background()}, opConnection, e)
		s.farewell(e)
	case errors.Is(err, ipc.ErrFrameSize):
		s.farewell(&proto.Error{Code: proto.CodeTooLarge, Class: proto.ClassInput, Message: err.Error(), SafeToRetry: true})
	}
	s.mu.Lock()
	s.closed = true
	for _, c := range s.inFlight {
		c.cancel(errGone)
	}
	streams, unconfirmed := s.streams, s.pending
	s.streams, s.pending = nil, nil
	s.mu.Unlock()
	for _, o := range streams {
		o.end()
	}
	unconfirmed.drop()
}

// farewell sends an error that concerns the connection and no request, under id 0.
func (s *session) farewell(e *proto.Error) {
	if frame, err := proto.AppendResponse(nil, 0, e, nil); err == nil {
		s.conn.Reply(frame)
	}
}

// identity describes the caller as policy sees it.
func (s *session) identity() *proto.Identity {
	d := policy.Decide(s.daemon.policy.Load(), &policy.Request{Operation: proto.OpWhoami, Caller: policy.Facts{
		UID: s.who.UID, GID: s.who.GID, Groups: s.who.Groups, Unit: s.who.Unit, Admin: s.who.Admin,
	}})
	return &proto.Identity{
		UID: s.who.UID, GID: s.who.GID, PID: uint32(s.who.PID), Unit: s.who.Unit, Principal: d.Principal, Admin: s.who.Admin,
	}
}

func (s *session) policyEpoch() uint64 {
	if p := s.daemon.policy.Load(); p != nil {
		return p.Epoch()
	}
	return 0
}

// find returns the row of op, or why there is none for this caller at this time.
func (d *dispatcher) find(op string, admin bool) (*operation, *proto.Error) {
	row := d.operations[op]
	if row == nil || row.where == onAdmin && !admin {
		return nil, &proto.Error{Code: proto.CodeUnknownOp, Class: proto.ClassInput, Message: "no such operation on this socket"}
	}
	if e := row.phase.refuse(phase(d.phase.Load())); e != nil {
		return nil, e
	}
	return row, nil
}

func busy(message string, retry time.Duration) *proto.Error {
	return &proto.Error{Code: proto.CodeBusy, Class: proto.ClassBusy, Message: message, RetryAfterMS: uint64(retry.Milliseconds()), SafeToRetry: true}
}

// badFrame is the answer to what the codec refused.
func badFrame(err error) *proto.Error {
	code := proto.CodeInvalid
	if errors.Is(err, proto.ErrTooLarge) {
		code = proto.CodeTooLarge
	}
	return &proto.Error{Code: code, Class: proto.ClassInput, Message: err.Error(), SafeToRetry: true}
}
