package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsd-project/kmsd/ipc/proto"
)

// What hostile clients do to the real program on a real keystore. Bounds of time are far above what an idle machine
// needs, and far below what the defects they were written for took.

// besieged starts the real daemon on a keystore of its own and keeps its log.
func besieged(t *testing.T) (*realDaemon, *logText) {
	t.Helper()
	d, _ := initialised(t)
	return d, keepLog(d.process)
}

// logText is the log of a daemon from when it was ready.
type logText struct {
	mu   sync.Mutex
	text bytes.Buffer
}

// keepLog goes on reading the log of p, which would stop when nobody reads it.
func keepLog(p *process) *logText {
	l := &logText{}
	go func() {
		for line := range p.lines {
			l.mu.Lock()
			fmt.Fprintln(&l.text, line)
			l.mu.Unlock()
		}
	}()
	return l
}

func (l *logText) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// raced starts the test program as daemon, which the race detector watches when it watches the test. It has no helper
// beside it, so the recovery key opens its keystore.
func raced(t *testing.T) *process {
	t.Helper()
	dir := t.TempDir()
	key := filepath.Join(dir, "key")
	if run := runInitProgram(t, nil, "--state-dir", filepath.Join(dir, "s"), "--recovery-out", key); run.code != 0 {
		t.Fatalf("%+v", run)
	}
	text, err := os.ReadFile(key)
	if err != nil {
		t.Fatal(err)
	}
	p := startDaemon(t, dir).ready()
	keepLog(p)
	admin := bound(t, p.admin)
	admin.send(3, proto.OpUnlock, &proto.Unlock{Secret: text}, nil)
	admin.want(3, &proto.Empty{})
	admin.Close()
	return p
}

// create makes keys over the admin socket.
func create(t *testing.T, p *process, algorithm string, names ...string) {
	t.Helper()
	admin := bound(t, p.admin)
	defer admin.Close()
	for i, name := range names {
		admin.send(uint64(10+i), proto.OpKeyCreate, &proto.KeyCreate{Name: name, Algorithm: algorithm}, nil)
		admin.want(uint64(10+i), &proto.KeyInfo{})
	}
}

// unharmed checks that the daemon serves a newcomer at once, that nothing panicked, and returns its status.
func unharmed(t *testing.T, p *process) proto.Status {
	t.Helper()
	start := time.Now()
	admin := bound(t, p.admin)
	defer admin.Close()
	admin.send(3, proto.OpStatus, &proto.Empty{}, nil)
	var s proto.Status
	admin.want(3, &s)
	if s.State != "ready" || s.Panics != 0 {
		t.Errorf("the daemon is %s and had %d panics", s.State, s.Panics)
	}
	if took := time.Since(start); took > 2*time.Second {
		t.Errorf("a newcomer waits %v", took)
	}
	return s
}

// descriptors counts what p has open.
func (p *process) descriptors() int {
	p.t.Helper()
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", p.cmd.Process.Pid))
	if errors.Is(err, os.ErrPermission) {
		return 0 // the files in /proc of an undumpable process are root's
	}
	if err != nil {
		p.t.Fatal(err)
	}
	return len(entries)
}

func request(t testing.TB, dst []byte, id uint64, op string, m proto.Message) []byte {
	t.Helper()
	dst, err := proto.AppendRequest(dst, id, op, m, nil)
	if err != nil {
		t.Fatal(err)
	}
	return dst
}

// frameOf puts the length before a body.
func frameOf(body string) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(body))), body...)
}

// hostileValues are what kills or confuses decoders that trust lengths and types.
func hostileValues() []string {
	u32 := func(code byte, n uint32) string { return string(binary.BigEndian.AppendUint32([]byte{code}, n)) }
	huge := uint32(1<<32 - 1)
	return []string{
		u32(0xdd, huge), u32(0xdd, 50_000_000), u32(0xdf, huge), u32(0xc6, huge), u32(0xdb, huge), u32(0xc9, huge) + "\x01",
		strings.Repeat("\x91", 1000) + "\xc0", strings.Repeat("\x81\xa0", 1000) + "\xc0",
		"\xd4\x01\x00", "\xca\x00\x00\x00\x00", "\xcb\x7f\xf0\x00\x00\x00\x00\x00\x00", "\xc1", "\xc0", "\x90", "\x80", "\x91\xc0",
		"\xcf\xff\xff\xff\xff\xff\xff\xff\xff", "\xd3\x80\x00\x00\x00\x00\x00\x00\x00", "\xc2", "\xc4\x00", "\xa0", "\xa2\xff\xfe",
		"\xa1\x00", "\xa7a/../..", "\xd9\xff" + strings.Repeat("/", 255), "\xc5\x10\x00" + strings.Repeat("\xff", 4096),
	}
}

// fieldNames returns the names of the fields of a message on the wire.
func fieldNames(m proto.Message) (names []string) {
	for _, f := range reflect.VisibleFields(reflect.TypeOf(m).Elem()) {
		var b strings.Builder
		for i, r := range f.Name {
			if i > 0 && 'A' <= r && r <= 'Z' && (f.Name[i-1] < 'A' || f.Name[i-1] > 'Z') {
				b.WriteByte('_')
			}
			b.WriteRune(r)
		}
		names = append(names, strings.ToLower(b.String()))
	}
	return names
}

// TestEveryFieldOfEveryOperation puts every hostile value into every field of every operation of a daemon that has keys.
// Each request gets one answer, a typed one; nothing is done; no secret comes back.
func TestEveryFieldOfEveryOperation(t *testing.T) {
	d, log := besieged(t)
	create(t, d.process, "ed25519", "app/k")
	p := bound(t, d.admin)
	before := d.memory("VmRSS")
	id, known := uint64(10), 0
	harmless := []string{proto.OpCancel, proto.OpKeyList, proto.OpAppList, proto.OpExpiry, proto.OpEvents, proto.OpAuditTail, proto.OpUnlock, proto.OpSlotAdd} // may take what is put into their fields
	for _, body := range proto.Bodies() {
		op := body.Op
		if op == proto.OpHello || op == proto.OpBind {
			continue
		}
		var frames []byte
		first := id
		for _, field := range append(fieldNames(body.Params()), "zzz") {
			for _, value := range hostileValues() {
				params := "\x81" + string([]byte{byte(0xa0 | len(field))}) + field + value
				if value == "\x80" || value == "\x90" || value == "\xc2" || value == "\xc4\x00" || value == "\xa0" {
					params = "\x82" + params[1:] + "\xa3zzz\xc0" // what could be valid is not: some operations need no field
				}
				known++
				frames = append(frames, frameOf("\x94\x00"+string(binary.BigEndian.AppendUint64([]byte{0xcf}, id))+
					string([]byte{0xd9, byte(len(op))})+op+params)...)
				id++
			}
		}
		go p.Write(frames)
		for range id - first {
			r := p.response()
			switch {
			case r.ID < first || r.ID >= id:
				t.Fatalf("%s: an answer to %d", op, r.ID)
			case r.Err == nil && !slices.Contains(harmless, op):
				t.Errorf("%s: request %d succeeded", op, r.ID-first)
			case r.Err != nil && r.Err.Code == proto.CodeInternal:
				t.Errorf("%s: request %d: %v", op, r.ID-first, r.Err)
			}
		}
	}
	if known < 2000 {
		t.Errorf("only %d requests were made", known)
	}
	if grown := d.memory("VmHWM") - before; grown > 16<<20 {
		t.Errorf("the daemon grew by %d KiB", grown>>10)
	}
	unharmed(t, d.process)
	if strings.Contains(log.String(), "goroutine") {
		t.Errorf("the log holds a panic:\n%s", log)
	}
}

// TestMalformedFrames sends what is no request at all, before and after bind: each gets a typed error or the end, and the
// daemon holds no more than the bytes that came.
func TestMalformedFrames(t *testing.T) {
	d, _ := besieged(t)
	bound(t, d.app).Close()
	cases := map[string][]byte{
		"length 0":               {0, 0, 0, 0},
		"length 2^32-1":          {0xff, 0xff, 0xff, 0xff, 1},
		"length over data frame": binary.BigEndian.AppendUint32(nil, proto.MaxDataFrame+1),
		"id 0":                   frameOf("\x94\x00\x00\xa4ping\x80"),
		"negative id":            frameOf("\x94\x00\xff\xa4ping\x80"),
		"id of a float":          frameOf("\x94\x00\xca\x00\x00\x00\x00\xa4ping\x80"),
		"3 elements":             frameOf("\x93\x00\x07\xa4ping"),
		"6 elements":             frameOf("\x96\x00\x07\xa4ping\x80\x80\x80"),
		"array32 of 4":           frameOf("\xdd\x00\x00\x00\x04\x00\x07\xa4ping\xc0"),
		"array32 of 2^32-1":      frameOf("\xdd\xff\xff\xff\xff"),
		"map":                    frameOf("\x80"),
		"response":               frameOf("\x94\x01\x07\xc0\x80"),
		"notification":           frameOf("\x93\x02\xa4ping\x80"),
		"params an array":        frameOf("\x94\x00\x07\xa4ping\x90"),
		"params nil":             frameOf("\x94\x00\x07\xa4ping\xc0"),
		"options nil":            frameOf("\x95\x00\x07\xa4ping\x80\xc0"),
		"duplicate options":      frameOf("\x95\x00\x07\xa4ping\x80\x82\xa5trace\xa1a\xa5trace\xa1b"),
		"op of 255 bytes":        frameOf("\x94\x00\x07\xd9\xff" + strings.Repeat("p", 255) + "\x80"),
		"op as bin":              frameOf("\x94\x00\x07\xc4\x04ping\x80"),
		"trailing bytes":         frameOf("\x94\x00\x07\xa4ping\x80\x80"),
		"60,000 levels":          frameOf("\x94\x00\x07\xa4ping" + strings.Repeat("\x81\xa0", 30_000)),
		"1 MiB before its time":  binary.BigEndian.AppendUint32(nil, 1<<20),
		"half a frame":           frameOf("\x94\x00\x07\xa4ping\x80")[:6],
		"half a length":          {0, 0},
		"an HTTP client":         []byte("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"),
		"a TLS client":           []byte("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + strings.Repeat("\x00", 505)),
	}
	random := rand.New(rand.NewPCG(1, 2))
	for i := range 200 {
		b := make([]byte, 1+random.IntN(300))
		for j := range b {
			b[j] = byte(random.Uint32())
		}
		if i%2 == 0 {
			b = frameOf(string(b))
		}
		cases[fmt.Sprintf("random %d", i)] = b
	}
	valid := request(t, nil, 7, proto.OpVerify, &proto.Verify{Key: "app/k@1", Scheme: "ed25519", Data: []byte("data"), Signature: make([]byte, 64)})
	for i := range 200 { // bits flipped in what is a request
		b := slices.Clone(valid)
		for range 1 + i%3 {
			b[4+random.IntN(len(b)-4)] ^= 1 << random.IntN(8)
		}
		cases[fmt.Sprintf("flipped %d", i)] = b
	}
	before := d.memory("VmRSS")
	for name, in := range cases {
		for _, connect := range []func(testing.TB, string) *peer{dial, bound} {
			p := connect(t, d.app)
			p.Write(in)
			p.CloseWrite()
			for answers := 0; ; answers++ {
				f, err := p.frame()
				if err != nil {
					break
				}
				r, err := proto.ParseResponse(f)
				if err != nil || answers > 1 || r.Err == nil || r.Err.Code == "" || r.Err.Code == proto.CodeInternal {
					t.Fatalf("%s is answered %x, %v", name, f, err)
				}
			}
			p.Close()
		}
	}
	if grown := d.memory("VmHWM") - before; grown > 16<<20 {
		t.Errorf("the daemon grew by %d KiB", grown>>10)
	}
	unharmed(t, d.process)
}

// TestPeersThatDoNotRead: clients that ask for the longest answers and never read them cost about 2 MB each, delay nobody, and
// are cut off.
func TestPeersThatDoNotRead(t *testing.T) {
	d, _ := besieged(t)
	create(t, d.process, "aes-256-gcm", "app/k")
	var random, capabilities []byte
	for i := range 1000 {
		random = request(t, random, uint64(10+i), proto.OpRandom, &proto.Random{Bytes: 60 << 10})
		capabilities = request(t, capabilities, uint64(10+i), proto.OpCapabilities, &proto.Empty{})
	}
	begin := request(t, nil, 3, proto.OpStreamBegin, &proto.StreamBegin{Op: "encrypt", Key: "app/k"})
	before := d.memory("VmRSS")
	const n = 30
	peers := make([]*peer, n)
	for i := range peers {
		peers[i] = bound(t, d.app)
		flood := [][]byte{random, capabilities, begin}[i%3]
		if i%3 == 2 {
			for chunk := range 8 {
				flood = request(t, flood, uint64(10+chunk), proto.OpStreamUpdate, &proto.StreamUpdate{Stream: 1, Chunk: uint64(chunk), Data: make([]byte, proto.MaxChunk)})
			}
		}
		go peers[i].Write(flood)
	}
	time.Sleep(time.Second)
	unharmed(t, d.process)
	if per := (d.memory("VmHWM") - before) / n; per > 5<<19 {
		t.Errorf("%d KiB for each peer that does not read", per>>10)
	}
	if testing.Short() {
		return
	}
	t.Parallel() // waiting disturbs nobody
	for start := time.Now(); unharmed(t, d.process).Connections > 2; time.Sleep(200 * time.Millisecond) {
		if time.Since(start) > 40*time.Second {
			t.Fatal("peers that do not read are kept for ever")
		}
	}
}

// TestSlowWriters: who sends a byte now and then is cut off before bind, and holds up nobody.
func TestSlowWriters(t *testing.T) {
	if testing.Short() {
		t.Skip("waits for time limits")
	}
	t.Parallel()
	d, _ := besieged(t)
	hello := request(t, nil, 1, proto.OpHello, &proto.Hello{MinVersion: 1, MaxVersion: 1})
	const n = 200
	var cut atomic.Int32
	var wg sync.WaitGroup
	for i := range n {
		p := dial(t, d.app)
		p.SetDeadline(time.Now().Add(30 * time.Second))
		wg.Go(func() {
			for _, b := range hello[:i%len(hello)] {
				if _, err := p.Write([]byte{b}); err != nil {
					break
				}
				time.Sleep(500 * time.Millisecond)
			}
			if _, err := p.frame(); errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) {
				cut.Add(1)
			}
		})
	}
	unharmed(t, d.process)
	wg.Wait()
	if cut.Load() != n {
		t.Errorf("%d of %d slow writers were cut off", cut.Load(), n)
	}
	unharmed(t, d.process)
}

// TestThousandIdleConnections: connections past bind cost little, and a key is used beside them as before.
func TestThousandIdleConnections(t *testing.T) {
	d, _ := besieged(t)
	create(t, d.process, "ed25519", "app/k")
	signTimes(bound(t, d.app), "app/k", 20)
	before := d.memory("VmRSS")
	const n = 1000
	for range n {
		bound(t, d.app)
	}
	if per := (d.memory("VmRSS") - before) / n; per > 12<<10 {
		t.Errorf("%d bytes for each idle connection", per)
	}
	// These are as many connections as one uid may have: the next ones are told so.
	for refused := false; !refused; {
		p := dial(t, d.app)
		p.send(1, proto.OpHello, &proto.Hello{MinVersion: 1, MaxVersion: 1}, nil)
		if r := p.response(); r.Err != nil {
			refused = true
			if r.Err.Code != proto.CodeBusy || r.Err.RetryAfterMS == 0 {
				t.Errorf("one connection too many is answered %v", r.Err)
			}
		}
	}
	d.conn.SetDeadline(time.Now().Add(20 * time.Second))
	if times := signTimes(d.conn, "app/k", 200); times[len(times)*9/10] > 100*time.Millisecond {
		t.Errorf("90 %% of signatures take up to %v beside idle connections", times[len(times)*9/10])
	}
}

// signTimes signs n times, one after the other, and returns how long each took, in order of length.
func signTimes(p *peer, key string, n int) []time.Duration {
	p.t.Helper()
	times := make([]time.Duration, n)
	for i := range times {
		start := time.Now()
		p.send(uint64(100+i), proto.OpSign, &proto.Sign{Key: key, Data: []byte("message")}, nil)
		p.want(uint64(100+i), &proto.SignReply{})
		times[i] = time.Since(start)
	}
	slices.Sort(times)
	return times
}

// overload is what 64 clients ask for while another one signs.
type overload struct {
	name    string
	request func(client, i int) (op string, params proto.Message)
	each    int  // requests of one client
	busy    bool // more than is taken on
}

// TestSignerAmongTheGreedy: 64 clients generate RSA keys, or sign in batches, or ask for RSA signatures. The one who signs
// with another key is slowed down by what the processor is shared for, and not by their queues; and who asks for too much
// is told when to come again.
func TestSignerAmongTheGreedy(t *testing.T) {
	d, _ := besieged(t)
	create(t, d.process, "ed25519", "app/ed")
	create(t, d.process, "rsa-3072", "app/rsa")
	batchOf := func(key string) *proto.Batch {
		params, err := proto.AppendParams(nil, &proto.Sign{Key: key, Data: []byte("message")})
		if err != nil {
			t.Fatal(err)
		}
		return &proto.Batch{Items: slices.Repeat([]proto.BatchItem{{Op: proto.OpSign, Params: params}}, 256)}
	}
	rsaBatch, edBatch := batchOf("app/rsa"), batchOf("app/ed")
	alone := signTimes(bound(t, d.app), "app/ed", 500)
	for _, o := range []overload{
		{"RSA keys", func(c, i int) (string, proto.Message) {
			return proto.OpKeyCreate, &proto.KeyCreate{Name: fmt.Sprintf("greedy/%d-%d", c, i), Algorithm: "rsa-4096"}
		}, 12, true},
		{"RSA signatures", func(int, int) (string, proto.Message) {
			return proto.OpSign, &proto.Sign{Key: "app/rsa", Data: []byte("message")}
		}, 48, true}, // three times what one uid may have queued, whatever is done meanwhile
		{"batches of RSA signatures", func(int, int) (string, proto.Message) { return proto.OpBatch, rsaBatch }, 12, false},
		{"batches of Ed25519 signatures", func(int, int) (string, proto.Message) { return proto.OpBatch, edBatch }, 12, false},
	} {
		t.Run(o.name, func(t *testing.T) {
			signer := bound(t, d.app)
			var busy atomic.Int32
			var readers sync.WaitGroup
			peers := make([]*peer, 64)
			for c := range peers {
				peers[c] = bound(t, d.app)
			}
			for c, p := range peers {
				var frames []byte
				for i := range o.each {
					op, params := o.request(c, i)
					frames = request(t, frames, uint64(10+i), op, params)
				}
				p.Write(frames)
				readers.Go(func() {
					for {
						f, err := p.frame()
						if err != nil {
							return
						}
						if r, err := proto.ParseResponse(f); err == nil && r.Err != nil && r.Err.Code == proto.CodeBusy {
							if r.Err.RetryAfterMS == 0 || !r.Err.SafeToRetry {
								t.Errorf("busy without a word when to come again: %+v", r.Err)
							}
							busy.Add(1)
						}
					}
				})
			}
			times := signTimes(signer, "app/ed", 100)
			p50, p99 := times[50], times[98]
			t.Logf("alone p50 %v p99 %v; beside 64 clients p50 %v p99 %v; %d busy", alone[250], alone[495], p50, p99, busy.Load())
			if limit := max(20*alone[495], 500*time.Millisecond); p99 > limit {
				t.Errorf("the 99th percentile is %v, alone %v", p99, alone[495])
			}
			for start := time.Now(); o.busy && busy.Load() == 0; time.Sleep(time.Millisecond) {
				if time.Since(start) > 10*time.Second {
					t.Fatal("nobody was told that it is too much")
				}
			}
			for _, p := range peers {
				p.Close()
			}
			readers.Wait()
			unharmed(t, d.process)
		})
	}
}

// TestAbandonedStreams: streams are few on a connection, and end with it.
func TestAbandonedStreams(t *testing.T) {
	d, _ := besieged(t)
	create(t, d.process, "aes-256-gcm", "app/k")
	abandon := func() {
		p := bound(t, d.app)
		defer p.Close()
		for i := range proto.MaxStreams {
			p.send(uint64(10+i), proto.OpStreamBegin, &proto.StreamBegin{Op: "encrypt", Key: "app/k"}, nil)
			p.want(uint64(10+i), &proto.StreamBeginReply{})
		}
		p.send(20, proto.OpStreamBegin, &proto.StreamBegin{Op: "encrypt", Key: "app/k"}, nil)
		if e := p.wantError(20, proto.CodeBusy); e.RetryAfterMS == 0 {
			t.Error("busy without a word when to come again")
		}
		p.send(21, proto.OpStreamUpdate, &proto.StreamUpdate{Stream: 1, Data: make([]byte, 100<<10)}, nil)
		p.want(21, &proto.StreamData{})
		p.send(22, proto.OpStreamAbort, &proto.StreamRef{Stream: 1}, nil)
		p.want(22, &proto.Empty{})
		p.send(23, proto.OpStreamUpdate, &proto.StreamUpdate{Stream: 1, Chunk: 1}, nil)
		p.wantError(23, proto.CodeInvalid)
		p.send(24, proto.OpStreamUpdate, &proto.StreamUpdate{Stream: 2, Chunk: 7}, nil) // out of order
		p.wantError(24, proto.CodeInvalid)
		p.send(25, proto.OpStreamFinish, &proto.StreamRef{Stream: 2}, nil)
		p.wantError(25, proto.CodeInvalid)
		p.send(26, proto.OpStreamFinish, &proto.StreamRef{Stream: 1 << 40}, nil)
		p.wantError(26, proto.CodeInvalid)
	}
	for range 20 {
		abandon()
	}
	before := d.memory("VmRSS")
	for range 200 {
		abandon()
	}
	if grown := d.memory("VmRSS") - before; grown > 32<<20 { // 1,600 streams that were kept would hold 100 MiB
		t.Errorf("200 connections with abandoned streams leave %d KiB behind", grown>>10)
	}
	admin := bound(t, d.admin) // a backup holds a snapshot of the store and a goroutine
	for i := range 50 {
		p := bound(t, d.admin)
		p.send(10, proto.OpBackupCreate, &proto.BackupCreate{Recipients: []string{"age1lggyhqrw2nlhcxprm67z43rta597azn8gknawjehu9d9dl0jq3yqqvfafg"}}, nil)
		p.want(10, &proto.BackupReply{})
		if i%2 == 0 {
			p.send(11, proto.OpStreamUpdate, &proto.StreamUpdate{Stream: 1}, nil)
		}
		p.Close()
	}
	admin.send(9, proto.OpKeyRotate, &proto.KeyRotate{Key: "app/k"}, nil)
	admin.want(9, &proto.KeyInfo{})
	unharmed(t, d.process)
}

// TestCancelRaces cancels requests at every moment of their lives. Each is answered once, whatever comes of it.
func TestCancelRaces(t *testing.T) {
	p := raced(t)
	create(t, p, "rsa-2048", "app/rsa")
	create(t, p, "ed25519", "app/ed")
	rounds := 60
	if testing.Short() {
		rounds = 15
	}
	var wg sync.WaitGroup
	for worker := range 4 {
		c := bound(t, p.app)
		c.SetDeadline(time.Now().Add(60 * time.Second))
		wg.Go(func() {
			for round := range rounds {
				var frames []byte
				want := map[uint64]bool{}
				for i := range 20 {
					id := uint64(1000*(round+1) + 2*i)
					switch i % 4 {
					case 0:
						frames = request(t, frames, id, proto.OpSign, &proto.Sign{Key: "app/rsa", Data: []byte("x")})
					case 1:
						frames = request(t, frames, id, proto.OpKeyCreate, &proto.KeyCreate{Name: fmt.Sprintf("w%d/%d", worker, id), Algorithm: "ed25519"})
					case 2:
						frames = request(t, frames, id, proto.OpSign, &proto.Sign{Key: "app/ed", Data: []byte("x")})
					case 3:
						frames = request(t, frames, id, proto.OpKeyList, &proto.KeyList{Prefix: "app"})
					}
					frames = request(t, frames, id+1, proto.OpCancel, &proto.Cancel{ID: id})
					want[id], want[id+1] = true, true
				}
				go c.Write(frames)
				for len(want) > 0 {
					r := c.response()
					if !want[r.ID] {
						t.Fatalf("a second answer to %d", r.ID)
					}
					delete(want, r.ID)
					if r.Err != nil && r.Err.Code != proto.CodeCancelled && r.Err.Code != proto.CodeBusy {
						t.Errorf("request %d: %v", r.ID, r.Err)
					}
				}
			}
		})
	}
	wg.Wait()
	unharmed(t, p)
	p.stop() // a race, if one was found, is its exit code
}

// TestLockUnderLoad locks and unlocks while keys are used, made and streamed: typed refusals, no race, no panic.
func TestLockUnderLoad(t *testing.T) {
	dir := t.TempDir()
	key := filepath.Join(dir, "key")
	if run := runInitProgram(t, nil, "--state-dir", filepath.Join(dir, "s"), "--recovery-out", key); run.code != 0 {
		t.Fatalf("%+v", run)
	}
	text, err := os.ReadFile(key)
	if err != nil {
		t.Fatal(err)
	}
	p := startDaemon(t, dir).ready()
	keepLog(p)
	admin := bound(t, p.admin)
	unlock := func(id uint64) {
		admin.send(id, proto.OpUnlock, &proto.Unlock{Secret: slices.Clone(text)}, nil)
		admin.want(id, &proto.Empty{})
	}
	unlock(3)
	create(t, p, "aes-256-gcm", "app/aes")
	var served, refused atomic.Int32
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for worker := range 4 {
		c := bound(t, p.app)
		c.SetDeadline(time.Now().Add(60 * time.Second))
		wg.Go(func() {
			for id := uint64(10); ; id++ {
				select {
				case <-stop:
					return
				default:
				}
				switch id % 3 {
				case 0:
					c.send(id, proto.OpEncrypt, &proto.Encrypt{Key: "app/aes", Data: []byte("x")}, nil)
				case 1:
					c.send(id, proto.OpKeyCreate, &proto.KeyCreate{Name: fmt.Sprintf("w%d/%d", worker, id), Algorithm: "ed25519"}, nil)
				case 2:
					c.send(id, proto.OpStreamBegin, &proto.StreamBegin{Op: "encrypt", Key: "app/aes"}, nil)
				}
				r := c.response()
				switch {
				case r.Err == nil:
					served.Add(1)
					if id%3 == 2 {
						var begun proto.StreamBeginReply
						proto.DecodeReply(r.Result, &begun)
						c.send(id, proto.OpStreamAbort, &proto.StreamRef{Stream: begun.Stream}, nil)
						c.response()
					}
				case r.Err.Code == proto.CodeLocked:
					refused.Add(1)
				default:
					t.Errorf("a use during lock and unlock: %v", r.Err)
				}
			}
		})
	}
	for i := range 20 {
		time.Sleep(20 * time.Millisecond)
		admin.SetDeadline(time.Now().Add(20 * time.Second))
		admin.send(uint64(100+2*i), proto.OpLock, &proto.Empty{}, nil)
		admin.want(uint64(100+2*i), &proto.Empty{})
		time.Sleep(5 * time.Millisecond)
		unlock(uint64(101 + 2*i))
	}
	close(stop)
	wg.Wait()
	if served.Load() == 0 || refused.Load() == 0 {
		t.Errorf("%d uses served, %d refused: the test proves nothing", served.Load(), refused.Load())
	}
	unharmed(t, p)
	p.stop()
}

// TestReconnectStorm connects and goes at every step of the handshake. Nothing is left behind.
func TestReconnectStorm(t *testing.T) {
	d, _ := besieged(t)
	create(t, d.process, "ed25519", "app/k")
	for range 50 {
		bound(t, d.app).Close()
	}
	settled := func() proto.Status {
		s := unharmed(t, d.process)
		for start := time.Now(); s.Connections > 2 && time.Since(start) < 10*time.Second; time.Sleep(20 * time.Millisecond) {
			s = unharmed(t, d.process)
		}
		return s
	}
	settled()
	open, memory := d.descriptors(), d.memory("VmRSS")
	hello := request(t, nil, 1, proto.OpHello, &proto.Hello{MinVersion: 1, MaxVersion: 1})
	sign := request(t, nil, 3, proto.OpSign, &proto.Sign{Key: "app/k", Data: []byte("message")})
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			for i := range 200 {
				c, err := net.Dial("unix", d.app)
				if err != nil {
					continue // the backlog is full
				}
				switch i % 5 {
				case 1:
					c.Write(hello[:5])
				case 2:
					c.Write(hello)
				case 3:
					c.Write(hello)
					io.ReadFull(c, make([]byte, 4))
				case 4:
					c.Close()
					p := bound(t, d.app)
					p.Write(sign)
					p.Close()
				}
				c.Close()
			}
		})
	}
	wg.Wait()
	if s := settled(); s.Connections > 2 {
		t.Errorf("%d connections are left", s.Connections)
	}
	if now := d.descriptors(); now > open+5 {
		t.Errorf("%d descriptors are open, %d were before", now, open)
	}
	if grown := d.memory("VmRSS") - memory; grown > 16<<20 {
		t.Errorf("3,200 connections leave %d KiB behind", grown>>10)
	}
}

// TestHalfClosed: who says that nothing more will come still gets every answer.
func TestHalfClosed(t *testing.T) {
	d, _ := besieged(t)
	create(t, d.process, "rsa-2048", "app/k")
	p := bound(t, d.app)
	var frames []byte
	for i := range 50 {
		frames = request(t, frames, uint64(10+i), proto.OpSign, &proto.Sign{Key: "app/k", Data: []byte("message")})
	}
	p.Write(frames)
	p.CloseWrite()
	for range 50 {
		if r := p.response(); r.Err != nil {
			t.Fatal(r.Err)
		}
	}
	p.wantEOF()
	unharmed(t, d.process)
}

// stoppedEnv makes the test program the client that TestStoppedClient stops.
const stoppedEnv = "KMSD_TEST_STOPPED_CLIENT"

func TestStoppedClientChild(t *testing.T) {
	path := os.Getenv(stoppedEnv)
	if path == "" {
		return // only the test below makes this a process of its own
	}
	p := bound(t, path)
	var frames []byte
	for i := range 1000 {
		frames = request(t, frames, uint64(10+i), proto.OpRandom, &proto.Random{Bytes: 10 << 10})
	}
	go p.Write(frames)
	p.frame()
	syscall.Kill(os.Getpid(), syscall.SIGSTOP)
	time.Sleep(time.Minute) // another thread may take the signal, and this one must not end the process before
}

// TestStoppedClient: a client that is stopped in the middle is cut off, and delays neither others nor the end of kmsd.
func TestStoppedClient(t *testing.T) {
	d, _ := besieged(t)
	child := exec.Command("/proc/self/exe", "-test.run=^TestStoppedClientChild$")
	child.Env = append(os.Environ(), stoppedEnv+"="+d.app)
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { child.Process.Kill(); child.Wait() }()
	for start := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", child.Process.Pid))
		if _, rest, ok := strings.Cut(string(stat), ") "); ok && rest[0] == 'T' {
			break
		}
		if time.Since(start) > 20*time.Second {
			t.Fatalf("the client does not stop: %s", stat)
		}
	}
	unharmed(t, d.process)
	start := time.Now()
	d.conn.Close()
	d.stop()
	if took := time.Since(start); took > shutdownGrace+5*time.Second {
		t.Errorf("kmsd takes %v to end", took)
	}
}

// TestLongLists reads pages of keys with all the labels they can have, with every limit one can think of.
func TestLongLists(t *testing.T) {
	d, _ := besieged(t)
	labels := map[string]string{}
	for i := range 8 {
		labels[fmt.Sprintf("label-%d", i)] = strings.Repeat("v", 60)
	}
	p := bound(t, d.admin)
	var frames []byte
	const n = 250
	for i := range n {
		frames = request(t, frames, uint64(10+i), proto.OpKeyCreate, &proto.KeyCreate{Name: fmt.Sprintf("app/%03d", i), Algorithm: "ed25519", Labels: labels})
	}
	go p.Write(frames)
	for range n {
		if r := p.response(); r.Err != nil {
			t.Fatal(r.Err)
		}
	}
	id := uint64(1000)
	for _, limit := range []uint32{0, 1, 7, 100, 101, 1<<32 - 1} {
		for _, prefix := range []string{"", "app"} {
			seen := map[string]bool{}
			for after := []byte(nil); ; {
				id++
				p.send(id, proto.OpKeyList, &proto.KeyList{Prefix: prefix, After: after, Limit: limit}, nil)
				var page proto.KeyListReply
				p.want(id, &page)
				for _, k := range page.Keys {
					if seen[k.Name] {
						t.Fatalf("%s is on two pages", k.Name)
					}
					seen[k.Name] = true
				}
				if limit == 1 && len(seen) == 20 {
					break
				}
				if after = page.Next; len(after) == 0 {
					if len(seen) != n {
						t.Errorf("%d of %d keys with limit %d", len(seen), n, limit)
					}
					break
				}
			}
		}
	}
	for _, after := range [][]byte{{0}, {0xff}, make([]byte, 24), bytes.Repeat([]byte{0xff}, 24), bytes.Repeat([]byte{0xff}, 25)} {
		id++
		p.send(id, proto.OpKeyList, &proto.KeyList{Prefix: "app", After: after}, nil)
		if r := p.response(); r.Err != nil && r.Err.Code != proto.CodeInvalid && r.Err.Code != proto.CodeTooLarge {
			t.Errorf("a place that was made up, %x: %v", after, r.Err)
		}
	}
	unharmed(t, d.process)
}

// TestShortDeadlines: a deadline of 0 is none, and what is not done in a millisecond is answered deadline, once.
func TestShortDeadlines(t *testing.T) {
	d, _ := besieged(t)
	p := bound(t, d.app)
	p.send(10, proto.OpKeyCreate, &proto.KeyCreate{Name: "app/rsa", Algorithm: "rsa-2048"}, &proto.Options{DeadlineMS: 0})
	p.want(10, &proto.KeyInfo{})
	late := 0
	for i := range 20 {
		id := uint64(100 + i)
		p.send(id, proto.OpKeyCreate, &proto.KeyCreate{Name: fmt.Sprintf("late/%d", i), Algorithm: "rsa-3072"}, &proto.Options{DeadlineMS: 1})
		r := p.response()
		if r.ID != id || r.Err != nil && r.Err.Code != proto.CodeDeadline && r.Err.Code != proto.CodeBusy {
			t.Fatalf("%d is answered %v", r.ID, r.Err)
		}
		if r.Err != nil && r.Err.Code == proto.CodeDeadline {
			late++
		}
	}
	if late == 0 {
		t.Error("twenty RSA keys were made in a millisecond each")
	}
	p.send(200, proto.OpSign, &proto.Sign{Key: "app/rsa", Data: []byte("x")}, &proto.Options{DeadlineMS: 1<<63 + 5})
	p.want(200, &proto.SignReply{})
	unharmed(t, d.process)
}

// limited lowers a limit of the running daemon until the function it returns is called.
func (d *realDaemon) limited(resource int, n uint64) (restore func()) {
	d.t.Helper()
	var before unix.Rlimit
	if err := unix.Prlimit(d.cmd.Process.Pid, resource, nil, &before); err != nil {
		d.t.Fatal(err)
	}
	if err := unix.Prlimit(d.cmd.Process.Pid, resource, &unix.Rlimit{Cur: n, Max: before.Max}, nil); err != nil {
		d.t.Fatal(err)
	}
	return func() {
		if err := unix.Prlimit(d.cmd.Process.Pid, resource, &before, nil); err != nil {
			d.t.Fatal(err)
		}
	}
}

// TestWhatCannotBeRecordedIsNotDone: no file can grow any more, as on a full disk. Keys are not made, and a keystore is not
// unlocked, since that could not be recorded; afterwards everything goes on.
func TestWhatCannotBeRecordedIsNotDone(t *testing.T) {
	asRoot(t)
	d, _ := besieged(t)
	create(t, d.process, "ed25519", "app/k")
	d.ask(proto.OpAuditHead, &proto.Empty{}, &proto.AuditHead{})
	restore := d.limited(unix.RLIMIT_FSIZE, 1)
	d.refused(proto.OpKeyCreate, &proto.KeyCreate{Name: "app/x", Algorithm: "ed25519"}, proto.CodeStorage)
	d.ask(proto.OpLock, &proto.Empty{}, &proto.Empty{}) // to lock is never refused
	d.refused(proto.OpUnlock, &proto.Unlock{}, proto.CodeStorage)
	if s := d.state(); s != "locked" {
		t.Errorf("the daemon is %s", s)
	}
	d.refused(proto.OpSign, &proto.Sign{Key: "app/k", Data: []byte("x")}, proto.CodeLocked)
	restore()
	for start := time.Now(); d.state() != "ready"; time.Sleep(100 * time.Millisecond) {
		d.last++
		d.conn.send(d.last, proto.OpUnlock, &proto.Unlock{}, nil)
		if r := d.conn.response(); r.Err != nil && time.Since(start) > 10*time.Second {
			t.Fatal(r.Err)
		}
	}
	d.ask(proto.OpSign, &proto.Sign{Key: "app/k", Data: []byte("x")}, &proto.SignReply{})
	d.ask(proto.OpKeyCreate, &proto.KeyCreate{Name: "app/x", Algorithm: "ed25519"}, &proto.KeyInfo{})
	unharmed(t, d.process)
}

// TestOutOfDescriptors: the daemon has no descriptors left. Who is connected is served, others are when there are some again.
func TestOutOfDescriptors(t *testing.T) {
	asRoot(t)
	d, _ := besieged(t)
	create(t, d.process, "ed25519", "app/k")
	restore := d.limited(unix.RLIMIT_NOFILE, uint64(d.descriptors()+10))
	var crowd []net.Conn
	for range 50 {
		c, err := net.Dial("unix", d.app)
		if err != nil {
			t.Fatal(err)
		}
		crowd = append(crowd, c)
	}
	time.Sleep(200 * time.Millisecond)
	d.ask(proto.OpSign, &proto.Sign{Key: "app/k", Data: []byte("x")}, &proto.SignReply{})
	d.ask(proto.OpKeyCreate, &proto.KeyCreate{Name: "app/x", Algorithm: "ed25519"}, &proto.KeyInfo{})
	for _, c := range crowd {
		c.Close()
	}
	restore()
	unharmed(t, d.process)
}

// TestManyInits: several administrators make the keystore at the same time. One of them does.
func TestManyInits(t *testing.T) {
	d := startReal(t, t.TempDir())
	keepLog(d.process)
	const n = 8
	var made atomic.Int32
	var wg sync.WaitGroup
	for range n {
		p := bound(t, d.admin)
		wg.Go(func() {
			p.send(3, proto.OpInit, &proto.Init{NoRecovery: true}, nil)
			switch r := p.response(); {
			case r.Err == nil:
				made.Add(1)
			case r.Err.Code != proto.CodeExists && r.Err.Code != proto.CodeBusy:
				t.Errorf("init beside another is answered %v", r.Err)
			}
		})
	}
	wg.Wait()
	if made.Load() != 1 {
		t.Errorf("%d keystores were made", made.Load())
	}
	create(t, d.process, "ed25519", "app/k")
	d = d.restart()
	d.ask(proto.OpSign, &proto.Sign{Key: "app/k", Data: []byte("x")}, &proto.SignReply{})
}

// TestKilledUnderLoad kills kmsd while keys are made and rotated. What was acknowledged is there afterwards.
func TestKilledUnderLoad(t *testing.T) {
	d, _ := besieged(t)
	rounds := 3
	if testing.Short() {
		rounds = 1
	}
	var mu sync.Mutex
	promised := map[string]uint32{}
	for round := range rounds {
		var wg sync.WaitGroup
		var made atomic.Int32
		enough := make(chan struct{})
		for worker := range 8 {
			p := bound(t, d.admin)
			wg.Go(func() {
				for i := 0; ; i++ {
					name := fmt.Sprintf("r%d-w%d/%d", round, worker, i/2)
					op, params := proto.OpKeyCreate, proto.Message(&proto.KeyCreate{Name: name, Algorithm: "ed25519"})
					if i%2 == 1 {
						op, params = proto.OpKeyRotate, &proto.KeyRotate{Key: name}
					}
					if _, err := p.Write(request(t, nil, uint64(10+i), op, params)); err != nil {
						return
					}
					f, err := p.frame()
					if err != nil {
						return
					}
					var info proto.KeyInfo
					r, err := proto.ParseResponse(f)
					if err != nil || r.Err != nil || proto.DecodeReply(r.Result, &info) != nil {
						t.Errorf("%s: %v, %v", name, r.Err, err)
						return
					}
					mu.Lock()
					promised[name] = info.Current
					mu.Unlock()
					if made.Add(1) == 100 {
						close(enough)
					}
				}
			})
		}
		<-enough
		d.cmd.Process.Kill()
		d.cmd.Wait()
		wg.Wait()
		d = startReal(t, d.dir)
		keepLog(d.process)
		for name, version := range promised {
			d.conn.SetDeadline(time.Now().Add(20 * time.Second))
			var reply proto.SignReply
			d.ask(proto.OpSign, &proto.Sign{Key: name, Data: []byte("message")}, &reply)
			if reply.Version < version {
				t.Errorf("%s signs as version %d after version %d was acknowledged", name, reply.Version, version)
			}
		}
		d.ask(proto.OpStoreVerify, &proto.Empty{}, &proto.ProgressReply{})
	}
	if len(promised) < 50*rounds {
		t.Errorf("only %d keys were made", len(promised))
	}
}
