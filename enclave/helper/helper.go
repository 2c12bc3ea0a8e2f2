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
	"path/filepath"
	"strings"
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
	conn *net.UnixConn
	stop func() // ends the process, however it feels; may be nil
	once sync.Once
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

// Sockets connects to helpers that somebody else starts: systemd, by socket activation.
type Sockets struct {
	Dir string   // holds one socket for each program: keyring.sock, pkcs11.sock
	UID []uint32 // who the helpers may run as
}

// Dial connects to the socket of the kind; keyring:file and keyring:secret-service share one.
func (s Sockets) Dial(ctx context.Context, kind string) (*Link, error) {
	name, _, _ := strings.Cut(kind, ":")
	if _, err := programFor(kind); err != nil {
		return nil, err
	}
	path := filepath.Join(s.Dir, name+".sock")
	conn, err := new(net.Dialer).DialContext(ctx, "unix", path)
	if err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, &enclave.Error{Kind: enclave.ErrAbsent, Cause: err, Remedy: "start the helper's socket unit"}
	}
	c := conn.(*net.UnixConn)
	if err := checkPeer(c, s.UID); err != nil {
		c.Close()
		return nil, err
	}
	return &Link{conn: c}, nil
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
