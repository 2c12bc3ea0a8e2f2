package main

import (
	"encoding/hex"
	"io"
	"net"
	"os"
	"os/exec"
	"strconv"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsd-project/kmsd/ipc"
	"github.com/kmsd-project/kmsd/ipc/proto"
)

// The attacks that a check of the caller's executable alone does not see: somebody untrusted makes a trusted program the
// peer of the connection, and speaks in its place.
//
// childEnv is set in the child: it connects on the socket it inherited, so that the kernel records it as the peer,
// queues what it is told to, and becomes the trusted program.
const (
	childEnv  = "KMSD_TEST_ATTACK_SOCKET"
	queuedEnv = "KMSD_TEST_ATTACK_QUEUED"
	trusted   = "/bin/sleep"
)

func TestAttackChild(t *testing.T) {
	path := os.Getenv(childEnv)
	if path == "" {
		return // only the attacks below make this a process of its own
	}
	if err := unix.Connect(3, &unix.SockaddrUnix{Name: path}); err != nil {
		t.Fatal(err)
	}
	if queued, err := hex.DecodeString(os.Getenv(queuedEnv)); err != nil || len(queued) > 0 {
		if _, err := unix.Write(3, queued); err != nil {
			t.Fatal(err)
		}
	}
	t.Fatal(syscall.Exec(trusted, []string{trusted, "60"}, nil))
}

// attack starts the child and returns the parent's end of the same socket, once the child has become trusted.
func attack(t *testing.T, path string, queued []byte) *peer {
	t.Helper()
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	shared := os.NewFile(uintptr(fd), "shared")
	defer shared.Close()
	child := exec.Command("/proc/self/exe", "-test.run=^TestAttackChild$")
	child.Env = append(os.Environ(), childEnv+"="+path, queuedEnv+"="+hex.EncodeToString(queued))
	child.ExtraFiles = []*os.File{shared}
	child.Stdout, child.Stderr = io.Discard, os.Stderr
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { child.Process.Kill(); child.Wait() })
	for start := time.Now(); ; time.Sleep(5 * time.Millisecond) {
		exe, _ := os.Readlink("/proc/" + strconv.Itoa(child.Process.Pid) + "/exe")
		if want, _ := os.Readlink(trusted); exe != "" && (exe == trusted || exe == "/usr"+trusted || exe == want) {
			break
		}
		if time.Since(start) > 10*time.Second {
			t.Fatalf("the child is still %q", exe)
		}
	}
	c, err := net.FileConn(shared)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(10 * time.Second))
	return &peer{t, c.(*net.UnixConn)}
}

func TestAttacks(t *testing.T) {
	var served atomic.Int32
	s := serve(t, map[string]operation{
		proto.OpPing: {onBoth, duringAny, inLane(laneInline), func(*call) (proto.Message, error) {
			served.Add(1)
			return &proto.Empty{}, nil
		}},
	}, ipc.Limits{})
	hello, _ := proto.AppendRequest(nil, 1, proto.OpHello, &proto.Hello{MinVersion: 1, MaxVersion: 1}, nil)
	ping, _ := proto.AppendRequest(nil, 3, proto.OpPing, &proto.Empty{}, nil)

	t.Run("request queued before the exec", func(t *testing.T) {
		guess, _ := proto.AppendRequest(nil, 2, proto.OpBind, &proto.Bind{Nonce: make([]byte, proto.NonceSize)}, nil)
		queued := append(append(append([]byte{}, hello...), guess...), ping...)
		p := attack(t, s.app, queued)
		p.want(1, &proto.HelloReply{})
		p.wantError(2, proto.CodeNotBound)
		p.wantEOF()
	})
	t.Run("request queued, no bind", func(t *testing.T) {
		p := attack(t, s.app, append(append([]byte{}, hello...), ping...))
		p.want(1, &proto.HelloReply{})
		p.wantError(3, proto.CodeNotBound)
		p.wantEOF()
	})
	t.Run("parent speaks on the shared socket", func(t *testing.T) {
		p := attack(t, s.app, nil)
		p.Write(hello)
		p.wantError(0, proto.CodeIdentityChanged)
		p.wantEOF()
	})
	t.Run("parent brings back the nonce", func(t *testing.T) {
		p := attack(t, s.app, hello)
		var reply proto.HelloReply
		p.want(1, &reply)
		p.send(2, proto.OpBind, &proto.Bind{Nonce: reply.Nonce}, nil)
		p.wantError(0, proto.CodeIdentityChanged)
		p.wantEOF()
	})
	if n := served.Load(); n != 0 {
		t.Fatalf("%d requests of attackers were served", n)
	}

	t.Run("honest client", func(t *testing.T) {
		p := bound(t, s.app)
		p.Write(ping)
		p.want(3, &proto.Empty{})
	})
	if n := served.Load(); n != 1 {
		t.Fatalf("%d requests were served, want 1", n)
	}

	t.Run("bound connection given away", func(t *testing.T) {
		p := bound(t, s.app)
		f, err := p.File()
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		heir := exec.Command("/bin/sh", "-c", "cat >&3")
		heir.ExtraFiles = []*os.File{f}
		in, _ := heir.StdinPipe()
		if err := heir.Start(); err != nil {
			t.Fatal(err)
		}
		in.Write(ping)
		in.Close()
		p.wantError(0, proto.CodeIdentityChanged)
		p.wantEOF()
		heir.Wait()
	})
	if n := served.Load(); n != 1 {
		t.Fatalf("%d requests were served, want 1", n)
	}
}
