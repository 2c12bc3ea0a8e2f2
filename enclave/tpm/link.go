package tpm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsd-project/kmsd/enclave"
)

// Sizes in bytes of a message on the wire (TPM 2.0 part 1 section 18: tag, size, code). 4096 is what TPM_PT_MAX_COMMAND_SIZE and
// TPM_PT_MAX_RESPONSE_SIZE say on PC clients.
const (
	headerSize = 10
	maxMessage = 4096
)

// link is one open connection to a TPM. One goroutine calls Send and Close; Interrupt may be called by any.
type link interface {
	// Send sends one command and returns the response. After an error the link is out of step and must be closed.
	Send(command []byte, limit time.Duration) ([]byte, error)
	// Interrupt ends a Send that is waiting, with an error, and all later ones.
	Interrupt()
	Close()
}

// address is where the TPM is.
type address struct {
	path   string
	socket bool // a stream socket of swtpm rather than a character device
}

// parseDevice understands /dev/tpmrm0, /dev/tpm0 (any absolute path) and unix:PATH.
func parseDevice(s string) (address, error) {
	path, socket := strings.CutPrefix(s, "unix:")
	if !filepath.IsAbs(path) || strings.ContainsRune(path, 0) {
		return address{}, &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: fmt.Sprintf("TPM device %q", s),
			Remedy: "name /dev/tpmrm0, or unix:PATH with an absolute path for a software TPM"}
	}
	return address{path, socket}, nil
}

// managed reports whether a resource manager stands between us and the TPM, so that others may use it at the same time and nobody's
// objects are in anybody's way. Without one we are alone as long as the link is open.
func (a address) managed() bool {
	return !a.socket && strings.HasPrefix(filepath.Base(a.path), "tpmrm")
}

func (a address) String() string {
	if a.socket {
		return "unix:" + a.path
	}
	return a.path
}

// dial opens the link. The errors tell a device that is not there from one that must not be used.
func (a address) dial() (link, error) {
	var l link
	var err error
	if a.socket {
		l, err = dialSocket(a.path)
	} else {
		l, err = openDevice(a.path)
	}
	if err == nil {
		return l, nil
	}
	switch {
	case errors.Is(err, fs.ErrPermission):
		return nil, &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: "no permission for " + a.String(), Cause: err,
			Remedy: "give the daemon access to the device (group tss)"}
	case errors.Is(err, errNoDevice):
		return nil, &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: a.String(), Cause: err}
	case errors.Is(err, unix.EBUSY), errors.Is(err, unix.EAGAIN): // the latter from a socket whose queue is full
		return nil, &enclave.Error{Kind: enclave.ErrBusy, Detail: a.String(), Cause: fmt.Errorf("%w: %w", errTaken, err),
			Remedy: "use /dev/tpmrm0, which can be shared"}
	}
	return nil, &enclave.Error{Kind: enclave.ErrAbsent, Detail: a.String(), Cause: err}
}

// socketLink speaks the raw stream protocol of swtpm: commands and responses one after the other, with no framing but their headers.
type socketLink struct{ conn net.Conn }

func dialSocket(path string) (link, error) {
	conn, err := net.DialTimeout("unix", path, time.Second)
	if err != nil {
		return nil, err
	}
	return socketLink{conn}, nil
}

func (l socketLink) Send(command []byte, limit time.Duration) ([]byte, error) {
	if err := l.conn.SetDeadline(time.Now().Add(limit)); err != nil {
		return nil, err
	}
	if _, err := l.conn.Write(command); err != nil {
		return nil, err
	}
	return readResponse(l.conn)
}

func (l socketLink) Interrupt() { l.conn.Close() }

func (l socketLink) Close() { l.conn.Close() }

// readResponse reads one response, whose size it takes from the header.
func readResponse(r io.Reader) ([]byte, error) {
	var header [headerSize]byte
	if _, err := io.ReadFull(r, header[:]); err != nil {
		return nil, err
	}
	size := binary.BigEndian.Uint32(header[2:])
	if size < headerSize || size > maxMessage {
		return nil, fmt.Errorf("response that claims to have %d bytes", size)
	}
	response := make([]byte, size)
	copy(response, header[:])
	if _, err := io.ReadFull(r, response[headerSize:]); err != nil {
		return nil, err
	}
	return response, nil
}

var (
	errNoDevice = errors.New("not a character device")
	errTaken    = errors.New("held by another program")
	errLimit    = errors.New("no answer in time")
)

// deviceLink is a character device of the kernel. It is opened without blocking and waited for with poll(2): the kernel then works in
// the background, and a read before the answer is there would look like the end of a file, so that neither blocking calls (which could
// not be ended) nor os.File (which reads before it polls) will do.
type deviceLink struct {
	fd     int
	closed atomic.Bool
	limit  time.Time
}

func openDevice(path string) (link, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if fi.Mode()&fs.ModeCharDevice == 0 {
		return nil, fmt.Errorf("%s: %w", path, errNoDevice)
	}
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	return &deviceLink{fd: fd}, nil
}

func (l *deviceLink) Send(command []byte, limit time.Duration) ([]byte, error) {
	l.limit = time.Now().Add(limit)
	// One write is one command to the kernel, so a short write cannot be made good.
	for {
		n, err := unix.Write(l.fd, command)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("write: %w", err)
		}
		if n != len(command) {
			return nil, io.ErrShortWrite
		}
		break
	}
	buf := make([]byte, maxMessage)
	n := 0
	for {
		m, err := l.read(buf[n:])
		if err != nil {
			return nil, err
		}
		n += m
		if n < headerSize {
			continue
		}
		size := binary.BigEndian.Uint32(buf[2:])
		if size < headerSize || size > maxMessage || n > int(size) {
			return nil, fmt.Errorf("response that claims to have %d bytes", size)
		}
		if n == int(size) {
			return buf[:n:n], nil
		}
	}
}

// read waits until there is something to read. It looks up four times a second to see whether the link was closed.
func (l *deviceLink) read(p []byte) (int, error) {
	for {
		if l.closed.Load() {
			return 0, fs.ErrClosed
		}
		if time.Now().After(l.limit) {
			return 0, errLimit
		}
		fds := []unix.PollFd{{Fd: int32(l.fd), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, 250)
		if err == unix.EINTR || err == nil && n == 0 {
			continue
		}
		if err != nil {
			return 0, fmt.Errorf("poll: %w", err)
		}
		n, err = unix.Read(l.fd, p)
		switch {
		case err == unix.EINTR || err == unix.EAGAIN:
			continue
		case err != nil:
			return 0, fmt.Errorf("read: %w", err)
		case n == 0:
			return 0, io.ErrUnexpectedEOF
		}
		return n, nil
	}
}

// Interrupt leaves the descriptor open, so that its number cannot be given to another file under a read.
func (l *deviceLink) Interrupt() { l.closed.Store(true) }

func (l *deviceLink) Close() { unix.Close(l.fd) }
