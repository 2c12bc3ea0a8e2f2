package ipc

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// ErrPeer is returned when the kernel does not say who is at the other end.
var ErrPeer = errors.New("peer is not known")

// Peer is the process at the other end of a connection, as the kernel recorded it when it connected.
type Peer struct {
	PID    int32
	UID    uint32
	GID    uint32
	Groups []uint32
	PIDFD  int // pins the process, so that its PID is not used again; -1 when the kernel has none (before 6.5)
}

// Alive reports whether the process still runs. Without a pidfd it answers for whatever process has the PID now.
func (p *Peer) Alive() bool {
	if p.PIDFD < 0 {
		return unix.Kill(int(p.PID), 0) != unix.ESRCH
	}
	fds := []unix.PollFd{{Fd: int32(p.PIDFD), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, 0)
		if err == unix.EINTR {
			continue
		}
		return err == nil && n == 0
	}
}

func (p *Peer) close() {
	if p.PIDFD >= 0 {
		unix.Close(p.PIDFD)
	}
}

// PeerOf asks the kernel for the peer of a connected Unix socket. The caller closes PIDFD.
//
// A process outside kmsd's PID namespace has PID 0 and is refused, because nothing could be said about it later.
func PeerOf(c syscall.Conn) (Peer, error) {
	p := Peer{PIDFD: -1}
	err := control(c, func(fd int) error {
		cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
		if err != nil {
			return fmt.Errorf("%w: %w", ErrPeer, err)
		}
		if cred.Pid <= 0 {
			return fmt.Errorf("%w: process of another PID namespace", ErrPeer)
		}
		p.PID, p.UID, p.GID = cred.Pid, cred.Uid, cred.Gid
		if p.Groups, err = peerGroups(fd); err != nil {
			return fmt.Errorf("%w: groups: %w", ErrPeer, err)
		}
		if pidfd, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PEERPIDFD); err == nil {
			p.PIDFD = pidfd // the kernel sets FD_CLOEXEC on it
			return nil
		}
		// Linux before 6.5: open one by number. The process may have been replaced in between, so ask again who it was.
		pidfd, err := unix.PidfdOpen(int(p.PID), 0)
		if err != nil {
			return nil
		}
		if again, err := os.Stat(fmt.Sprintf("/proc/%d", p.PID)); err != nil || again.Sys().(*syscall.Stat_t).Uid != p.UID {
			unix.Close(pidfd)
			return nil
		}
		p.PIDFD = pidfd
		return nil
	})
	return p, err
}

// requireCredentials makes the kernel attach the sender's credentials to everything that is read from c. On a listener
// it is inherited by what is accepted, so that no byte comes without them.
func requireCredentials(c syscall.Conn) error {
	return control(c, func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PASSCRED, 1) })
}

func control(c syscall.Conn, f func(fd int) error) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	if err := raw.Control(func(fd uintptr) { inner = f(int(fd)) }); err != nil {
		return err
	}
	return inner
}
