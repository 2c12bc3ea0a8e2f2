package main

import (
	"encoding/binary"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/ipc"
	"github.com/kmsd-project/kmsd/ipc/proto"
)

// memory returns a figure of /proc/PID/status in bytes.
func (p *process) memory(field string) int64 {
	p.t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		p.t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, field+":"); ok {
			var kib int64
			fmt.Sscan(rest, &kib)
			return kib << 10
		}
	}
	p.t.Fatalf("no %s", field)
	return 0
}

// TestDaemonSurvivesHostileFrames sends what kills decoders that trust lengths to the running daemon: as the first frame
// of a connection, as params of hello, and as params of operations behind bind.
func TestDaemonSurvivesHostileFrames(t *testing.T) {
	d := startDaemon(t, t.TempDir()).ready()
	u32 := func(code byte, n uint32) string { return string(binary.BigEndian.AppendUint32([]byte{code}, n)) }
	field := func(key, value string) string { return "\x81" + string([]byte{byte(0xa0 | len(key))}) + key + value }
	huge := uint32(1<<32 - 1)
	var params []string
	for _, key := range []string{"client", "features", "enclave", "escrow_to", "pin", "zzz"} {
		for _, value := range []string{
			u32(0xdd, huge), u32(0xdd, 50_000_000), u32(0xdf, huge), u32(0xc6, huge), u32(0xdb, huge), u32(0xc9, huge) + "\x01",
			strings.Repeat("\x91", 60_000) + "\xc0", strings.Repeat("\x81\xa0", 30_000) + "\xc0",
			"\xd4\x01\x00", "\xca\x00\x00\x00\x00", "\xc1", "\xc0", "\xcd\x01\x2c", "\xc4\x01a",
		} {
			params = append(params, field(key, value))
		}
	}
	params = append(params, u32(0xdd, huge), u32(0xdf, huge), "\xc0", "", "\x82\xa3pin\xc4\x01a\xa3pin\xc4\x01b", "\x80\x00")
	write := func(p *peer, body string) {
		p.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(body))), body...))
	}
	request := func(op, params string) string {
		return "\x94\x00\x07" + string([]byte{byte(0xa0 | len(op))}) + op + params
	}
	drain := func(p *peer) { // until the answer or the end
		if _, err := p.frame(); err != nil {
			return
		}
	}
	before := d.memory("VmRSS")
	for _, in := range params {
		p := dial(t, d.app)
		write(p, in)
		drain(p)
		p.Close()
		p = dial(t, d.app)
		write(p, request(proto.OpHello, in))
		drain(p)
		p.Close()
	}
	p := bound(t, d.admin)
	for _, in := range params {
		for _, op := range []string{proto.OpInit, proto.OpPing, proto.OpBatch, "no_such_op"} {
			write(p, request(op, in))
			f, err := p.frame()
			if err != nil {
				t.Fatalf("%s with %.20q ends the connection", op, in)
			}
			if r, err := proto.ParseResponse(f); err != nil || r.Err == nil && op != proto.OpPing {
				t.Fatalf("%s with %.20q is answered %v, %v", op, in, r, err)
			}
		}
	}
	for _, length := range []uint32{0, 64<<10 + 1, 1 << 20, 1 << 31, huge} {
		p := dial(t, d.app)
		p.Write(binary.BigEndian.AppendUint32(nil, length))
		r := p.response()
		if r.ID != 0 || r.Err == nil || r.Err.Code != proto.CodeTooLarge {
			t.Errorf("a length of %d is answered %v", length, r.Err)
		}
		p.wantEOF()
	}
	p.send(9, proto.OpPing, &proto.Empty{}, nil)
	p.want(9, &proto.Empty{})
	limit := int64(8 << 20)
	if raceEnabled {
		limit = 64 << 20 // the race detector's shadow
	}
	if grown := d.memory("VmHWM") - before; grown > limit {
		t.Errorf("the daemon grew by %d KiB", grown>>10)
	}
}

// TestDaemonWithIdleConnections: a thousand connections past bind cost little and slow nobody down.
func TestDaemonWithIdleConnections(t *testing.T) {
	d := startDaemon(t, t.TempDir()).ready()
	admin := bound(t, d.admin)
	admin.send(9, proto.OpSelfTest, &proto.Empty{}, nil) // else it runs meanwhile by itself, and takes some memory
	admin.response()
	admin.Close()
	before := d.memory("VmRSS")
	const n = 1000
	for range n {
		bound(t, d.app)
	}
	grown := d.memory("VmRSS") - before
	if per := grown / n; per > 9<<10 && !raceEnabled {
		t.Errorf("%d bytes for each idle connection", per)
	}
	p := bound(t, d.app)
	start := time.Now()
	p.send(9, proto.OpPing, &proto.Empty{}, nil)
	p.want(9, &proto.Empty{})
	if took := time.Since(start); took > time.Second {
		t.Errorf("ping took %v beside %d idle connections", took, n)
	}
}

// TestSlowLanesHoldUpNobody: 64 clients keep the lane for key generation full while another uses a key.
func TestSlowLanesHoldUpNobody(t *testing.T) {
	tt := newTestTable()
	s := serve(t, tt.rows(), ipc.Limits{})
	for range 64 {
		p := bound(t, s.app)
		for i := range 4 {
			p.send(uint64(10+i), proto.OpKeyCreate, &proto.Empty{}, nil)
		}
	}
	p := bound(t, s.app)
	start := time.Now()
	const n = 200
	for i := range n {
		p.send(uint64(10+i), proto.OpMAC, &proto.MAC{Key: "a", Data: []byte("x")}, nil)
		p.want(uint64(10+i), &proto.MACReply{})
	}
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("%d cheap operations took %v", n, took)
	}
	if s.busy.Load() == 0 {
		t.Error("256 key generations were all taken on, by a lane of one")
	}
	close(tt.gate)
}
