package helper

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsd-project/kmsd/enclave"
)

// The spawner and kmsd talk over a pair of SOCK_SEQPACKET sockets, one message for each act:
//
//	start: 'S' kind         -> 'K' id (4) with one descriptor, or 'E' sentinel name 0 detail 0 remedy
//	stop:  'X' id (4)       (no answer)
const (
	msgStart   = 'S'
	msgStarted = 'K'
	msgFailed  = 'E'
	msgStop    = 'X'

	maxMessage = 2048
	maxKind    = 64

	// startTimeout bounds how long the spawner may take to start a program.
	startTimeout = 10 * time.Second
)

// SpawnerConfig says how the spawner is started.
type SpawnerConfig struct {
	// Command is this very program with its hidden subcommand: /proc/self/exe spawner.
	Command []string
}

// Spawner is kmsd's hold on the process that starts helpers. It is safe for concurrent use.
//
// Invariant: the process behind it was started before kmsd held a secret, can start nothing but the programs of the fixed table, and
// ends when kmsd does; so do the helpers.
type Spawner struct {
	mu     sync.Mutex // one start at a time
	conn   *net.UnixConn
	exited chan struct{} // closed when the process has been reaped
}

// StartSpawner starts the spawner. Call it before reading any secret.
func StartSpawner(c SpawnerConfig) (*Spawner, error) {
	ours, theirs, err := socketPair(unix.SOCK_SEQPACKET)
	if err != nil {
		return nil, err
	}
	defer theirs.Close()
	conn, err := unixConn(ours)
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(c.Command[0], c.Command[1:]...)
	cmd.Env = passed()
	cmd.Dir = "/"
	cmd.Stderr = os.Stderr
	cmd.ExtraFiles = []*os.File{theirs}
	// A group of its own: Ctrl-C is for kmsd, which then closes us in order.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	s := &Spawner{conn: conn, exited: make(chan struct{})}
	started := make(chan error)
	go func() {
		// The death signal comes when the thread that forked ends, so this one stays until the child has gone.
		runtime.LockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			cmd.Wait()
		}
		close(s.exited)
	}()
	if err := <-started; err != nil {
		conn.Close()
		return nil, fmt.Errorf("cannot start the spawner of helpers: %w", err)
	}
	return s, nil
}

// Dial starts a helper and returns the connection to it.
func (s *Spawner) Dial(ctx context.Context, kind string) (*Link, error) {
	if _, err := programFor(kind); err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	// The deadline of the spawner's own work is short and not the caller's: a message that is given up would be taken for the answer
	// to the next one.
	s.conn.SetDeadline(time.Now().Add(startTimeout))
	if _, err := s.conn.Write(append([]byte{msgStart}, kind...)); err != nil {
		return nil, spawnerGone(err)
	}
	message, oob := make([]byte, maxMessage), make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := s.conn.ReadMsgUnix(message, oob)
	if err == nil && n == 0 {
		err = io.EOF
	}
	if err != nil {
		s.conn.Close() // late answers must not be taken for others
		return nil, spawnerGone(err)
	}
	id, err := parseStarted(message[:n])
	if err != nil {
		return nil, err
	}
	conn, err := receivedConn(oob[:oobn])
	if err == nil {
		if err = checkPeer(conn, []uint32{uint32(os.Geteuid())}); err != nil {
			conn.Close()
		}
	}
	if err != nil {
		s.stop(id)
		return nil, spawnerGone(err)
	}
	return &Link{conn: conn, stop: func() { s.stop(id) }}, nil
}

// stop has a helper killed; it does not wait.
func (s *Spawner) stop(id uint32) {
	s.conn.SetWriteDeadline(time.Now().Add(startTimeout)) // the one of the last Dial has long passed
	s.conn.Write(binary.BigEndian.AppendUint32([]byte{msgStop}, id))
}

// Close ends the spawner and every helper, and waits for that.
func (s *Spawner) Close() error {
	err := s.conn.Close()
	<-s.exited
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

func spawnerGone(cause error) error {
	return &enclave.Error{Kind: enclave.ErrAbsent, Detail: "the spawner of helpers does not answer", Cause: cause, Remedy: "restart kmsd"}
}

// parseStarted reads the spawner's answer.
func parseStarted(m []byte) (id uint32, err error) {
	if len(m) == 5 && m[0] == msgStarted {
		return binary.BigEndian.Uint32(m[1:]), nil
	}
	if len(m) > 1 && m[0] == msgFailed {
		return 0, parseFailed(m[1:])
	}
	return 0, spawnerGone(errors.New("unexpected answer"))
}

// receivedConn takes the one descriptor out of a control message.
func receivedConn(oob []byte) (*net.UnixConn, error) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil || len(messages) != 1 {
		return nil, errors.New("no descriptor in the answer")
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return nil, errors.New("no descriptor in the answer")
	}
	unix.CloseOnExec(fds[0]) // ReadMsgUnix asks for that already; it must not depend on it
	return unixConn(os.NewFile(uintptr(fds[0]), "helper"))
}

// socketPair returns two connected sockets, close-on-exec.
func socketPair(kind int) (a, b *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, kind|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, nil, err
	}
	return os.NewFile(uintptr(fds[0]), "ours"), os.NewFile(uintptr(fds[1]), "theirs"), nil
}

// RunSpawner is the main function of the spawner process. The helpers are looked for in dirs, or beside this program and in
// ../libexec/kmsd when there are none. It returns the exit code.
func RunSpawner(dirs ...string) int {
	if err := runSpawner(dirs); err != nil {
		fmt.Fprintln(os.Stderr, "kmsd spawner:", err)
		return 1
	}
	return 0
}

func runSpawner(dirs []string) error {
	// Signals of the terminal or of a service manager are for kmsd; we end when it closes its end, or dies.
	signal.Ignore(syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGPIPE)
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(syscall.SIGKILL), 0, 0, 0); err != nil {
		return err
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return err
	}
	cred, err := unix.GetsockoptUcred(3, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return errors.New("started by kmsd only")
	}
	if int(cred.Pid) != os.Getppid() || int(cred.Uid) != os.Geteuid() {
		return errors.New("descriptor 3 does not come from our parent")
	}
	// What kmsd's own parent has left open is not for helpers.
	if err := unix.CloseRange(3, math.MaxInt32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return fmt.Errorf("close_range: %w", err)
	}
	conn, err := unixConn(os.NewFile(3, "kmsd"))
	if err != nil {
		return err
	}
	defer conn.Close()
	if len(dirs) == 0 {
		if dirs, err = directories(); err != nil {
			return err
		}
	}
	// Helpers die with the thread that forked them, which is this one.
	runtime.LockOSThread()
	n := &nursery{dirs: dirs, children: map[uint32]*os.Process{}}
	defer n.killAll()
	message := make([]byte, maxMessage)
	for {
		size, err := conn.Read(message)
		if err != nil || size == 0 {
			return nil // kmsd has gone
		}
		if err := n.handle(conn, message[:size]); err != nil {
			return err
		}
	}
}

// nursery is the state of the spawner process.
type nursery struct {
	dirs []string
	last uint32

	mu       sync.Mutex
	children map[uint32]*os.Process
}

func (n *nursery) handle(conn *net.UnixConn, m []byte) error {
	switch {
	case len(m) > 1 && len(m) <= 1+maxKind && m[0] == msgStart:
		ours, id, err := n.start(string(m[1:]))
		if err != nil {
			_, err = conn.Write(append([]byte{msgFailed}, formatFailed(err)...))
			return err
		}
		defer ours.Close()
		_, _, err = conn.WriteMsgUnix(binary.BigEndian.AppendUint32([]byte{msgStarted}, id), unix.UnixRights(int(ours.Fd())), nil)
		return err
	case len(m) == 5 && m[0] == msgStop:
		n.mu.Lock()
		child := n.children[binary.BigEndian.Uint32(m[1:])]
		n.mu.Unlock()
		if child != nil {
			child.Kill()
		}
		return nil
	}
	return errors.New("unexpected message")
}

// start starts the helper for kind and returns kmsd's end of the connection to it.
func (n *nursery) start(kind string) (*os.File, uint32, error) {
	p, err := programFor(kind)
	if err != nil {
		return nil, 0, err
	}
	path, err := find(p.file, n.dirs)
	if err != nil {
		return nil, 0, err
	}
	ours, theirs, err := socketPair(unix.SOCK_STREAM)
	if err != nil {
		return nil, 0, &enclave.Error{Kind: enclave.ErrBusy, Cause: err}
	}
	defer theirs.Close()
	cmd := &exec.Cmd{
		Path:        path,
		Args:        []string{p.file},
		Env:         p.environment(),
		Dir:         "/",
		Stderr:      os.Stderr,
		ExtraFiles:  []*os.File{theirs},
		SysProcAttr: &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL},
	}
	if err := cmd.Start(); err != nil {
		ours.Close()
		return nil, 0, &enclave.Error{Kind: enclave.ErrMisconfigured, Cause: err, Remedy: "install " + p.file + " again"}
	}
	n.mu.Lock()
	n.last++
	id := n.last
	n.children[id] = cmd.Process
	n.mu.Unlock()
	go func() {
		cmd.Wait()
		n.mu.Lock()
		delete(n.children, id)
		n.mu.Unlock()
	}()
	return ours, id, nil
}

func (n *nursery) killAll() {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, c := range n.children {
		c.Kill()
	}
}
