package ipc

import (
	"context"
	"fmt"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// maxPath is the longest path of a Unix socket in bytes (unix(7): sun_path, with the byte that ends it).
const maxPath = 107

// Listen makes a listening socket at path, which must not exist, with the given mode and, unless it is -1, group.
//
// The socket asks for credentials before it listens: since Linux 6.16 what a peer sends carries them only if the
// listener had asked when the peer connected. It is made with mode 0600 and opened up only when it belongs to the group.
func Listen(ctx context.Context, path string, mode os.FileMode, gid int) (*net.UnixListener, error) {
	if len(path) > maxPath {
		return nil, fmt.Errorf("the path of the socket is %d bytes long, at most %d are possible: %s", len(path), maxPath, path)
	}
	config := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		var err error
		if e := raw.Control(func(fd uintptr) {
			if err = unix.Fchmod(int(fd), 0o600); err == nil { // bind makes the file with the mode of the socket
				err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PASSCRED, 1)
			}
		}); e != nil {
			return e
		}
		return err
	}}
	l, err := config.Listen(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	u := l.(*net.UnixListener)
	if err := openUp(path, mode, gid); err != nil {
		u.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return u, nil
}

func openUp(path string, mode os.FileMode, gid int) error {
	if gid >= 0 {
		if err := os.Lchown(path, -1, gid); err != nil {
			return err
		}
	}
	return os.Chmod(path, mode)
}
