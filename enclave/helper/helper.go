// Package helper is the seam to an enclave driver that runs in a process of its own: a driver that loads foreign code, that needs
// other rights than kmsd, or that does things when it is merely imported.
//
// The daemon's side is Enclave: it looks like any driver, and replaces its process when that has crashed or hangs. The other side is
// Server, the whole main function of a helper program. Between them is a Unix socket with the frames of kmsd's own protocol and the
// messages of ipc/proto/helper.go. Both ends ask the kernel who is at the other one.
//
// In user mode helpers are children of the spawner, a process that kmsd starts before it holds any secret and gives up the right to
// start others. In system mode they are services of systemd, each with its own user; Sockets connects to them.
package helper

import (
	"context"
	"fmt"
	"net"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/ipc"
)

// Dialer makes connections to helpers.
type Dialer interface {
	// Dial returns a connection to a helper that serves the kind of enclave. A helper that is not installed is ErrMisconfigured, one
	// that cannot be reached ErrAbsent.
	Dial(ctx context.Context, kind string) (*Link, error)
}

// Link is a connection to one helper.
type Link struct {
	conn    *net.UnixConn
	stop    func()   // ends the process, however it feels; may be nil
	senders []uint32 // users whose bytes Read takes; nil where the connection can be nobody else's
	once    sync.Once
}

// Close closes the connection and ends the helper, if it is ours.
func (l *Link) Close() error {
	err := net.ErrClosed
	l.once.Do(func() {
		err = l.conn.Close()
		if l.stop != nil {
			l.stop()
		}
	})
	return err
}

// checkPeer refuses a connection whose other end does not run as one of the users.
func checkPeer(c *net.UnixConn, allowed []uint32) error {
	peer, err := ipc.PeerOf(c)
	if err != nil {
		return &enclave.Error{Kind: enclave.ErrMisconfigured, Cause: err}
	}
	if peer.PIDFD >= 0 {
		unix.Close(peer.PIDFD)
	}
	for _, uid := range allowed {
		if peer.UID == uid {
			return nil
		}
	}
	return &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: fmt.Sprintf("the other end runs as uid %d", peer.UID)}
}

func unknownKind(kind string) error {
	return &enclave.Error{Kind: enclave.ErrUnsupported, Detail: fmt.Sprintf("no helper for enclave %q", kind)}
}
