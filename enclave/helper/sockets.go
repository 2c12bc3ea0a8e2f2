package helper

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kmsd-project/kmsd/enclave"
)

// Sockets connects to helpers that somebody else starts: systemd, by socket activation.
//
// Invariant: nothing that the other end says is taken for a helper's unless the kernel says that a process of one of the users wrote it.
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
		return nil, &enclave.Error{Kind: enclave.ErrAbsent, Cause: err, Remedy: fmt.Sprintf("systemctl enable --now kmsd-%s.socket", name)}
	}
	c := conn.(*net.UnixConn)
	// The kernel names as the peer who has called listen(2). That is the service manager, root, where it holds the socket.
	err = checkPeer(c, append([]uint32{0}, s.UID...))
	if err == nil {
		err = passCredentials(c)
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	return &Link{conn: c, senders: append([]uint32{}, s.UID...)}, nil // never nil: nobody is allowed if nobody is named
}

// passCredentials has the kernel attach the credentials of the sender to everything that is read from c.
func passCredentials(c *net.UnixConn) error {
	raw, err := c.SyscallConn()
	if err == nil {
		if e := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PASSCRED, 1) }); e != nil {
			err = e
		}
	}
	if err != nil {
		return &enclave.Error{Kind: enclave.ErrMisconfigured, Cause: err}
	}
	return nil
}

// errSender is wrapped by what Read says about bytes of somebody who is not the helper.
var errSender = errors.New("another user speaks for the helper")

// Read reads what the helper has sent, and refuses what others have. The kernel never joins the bytes of two senders in one read.
func (l *Link) Read(p []byte) (int, error) {
	if l.senders == nil {
		return l.conn.Read(p)
	}
	oob := make([]byte, unix.CmsgSpace(unix.SizeofUcred))
	n, oobn, _, _, err := l.conn.ReadMsgUnix(p, oob)
	if n == 0 && err == nil || errors.Is(err, io.EOF) {
		return 0, io.EOF
	}
	if err != nil {
		return 0, err
	}
	uid, err := senderOf(oob[:oobn])
	if err == nil && !slices.Contains(l.senders, uid) {
		err = fmt.Errorf("%w: uid %d", errSender, uid)
	}
	if err != nil {
		clear(p[:n])
		return 0, err
	}
	return n, nil
}

// senderOf takes the user out of a control message with credentials.
func senderOf(oob []byte) (uint32, error) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return 0, fmt.Errorf("%w: %w", errSender, err)
	}
	for i := range messages {
		if cred, err := unix.ParseUnixCredentials(&messages[i]); err == nil {
			return cred.Uid, nil
		}
	}
	return 0, fmt.Errorf("%w: no credentials", errSender)
}

// AllowUser lets a user connect besides those there are, by name or number. Helpers call it for the flag with which their units say
// who kmsd is.
func (s *Server) AllowUser(name string) error {
	if _, err := strconv.ParseUint(name, 10, 31); err != nil {
		u, err := user.Lookup(name)
		if err != nil {
			return err
		}
		name = u.Uid
	}
	uid, err := strconv.ParseUint(name, 10, 31)
	if err != nil {
		return err
	}
	s.UIDs = append(s.UIDs, uint32(uid))
	return nil
}
