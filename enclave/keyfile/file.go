package keyfile

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/keystore/durable"
)

// The keyfile, 72 bytes:
//
//	"kmsd keyfile v1\n" (16) | id (16) | secret (32) | checksum (8)
//
// The checksum is the beginning of SHA-256 over all before it, and tells a damaged file from another one.
const (
	fileMagic  = "kmsd keyfile v1\n"
	idSize     = 16
	secretSize = 32
	checkSize  = 8
	fileSize   = len(fileMagic) + idSize + secretSize + checkSize
)

// content is what a keyfile holds. The one who gets it wipes it.
type content struct {
	id     [idSize]byte // random, public
	secret [secretSize]byte
}

func (c *content) wipe() { clear(c.secret[:]) }

func newContent() (c content) {
	rand.Read(c.id[:])
	rand.Read(c.secret[:])
	return c
}

// appendTo appends the file, which the caller wipes.
func (c *content) appendTo(b []byte) []byte {
	start := len(b)
	b = append(b, fileMagic...)
	b = append(b, c.id[:]...)
	b = append(b, c.secret[:]...)
	sum := sha256.Sum256(b[start:])
	return append(b, sum[:checkSize]...)
}

// parse reads a keyfile. A file that is none, or is damaged, is ErrCorrupt.
func parse(b []byte) (c content, err error) {
	damaged := &enclave.Error{Kind: enclave.ErrCorrupt, Detail: "the keyfile is damaged", Remedy: remedyLost}
	if len(b) != fileSize || string(b[:len(fileMagic)]) != fileMagic {
		return c, damaged
	}
	sum := sha256.Sum256(b[:fileSize-checkSize])
	if subtle.ConstantTimeCompare(sum[:checkSize], b[fileSize-checkSize:]) != 1 {
		return c, damaged
	}
	b = b[len(fileMagic):]
	copy(c.id[:], b)
	copy(c.secret[:], b[idSize:])
	return c, nil
}

// read reads the keyfile at path, which is relative to the directory dir on the mount with the given id. A file that is not there is
// fs.ErrNotExist. With modes, the file must be ours and closed to others.
func read(dir *os.File, mountID uint64, path string, modes bool) (c content, err error) {
	fd, err := walk(int(dir.Fd()), mountID, path)
	if err != nil {
		return c, fileError(err)
	}
	file := os.NewFile(uintptr(fd), path)
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return c, fileError(err)
	}
	if err := checkFile(info, modes); err != nil {
		return c, err
	}
	b := make([]byte, fileSize+1) // one more than there should be
	defer clear(b)
	n, err := io.ReadFull(file, b)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
		return c, fileError(err)
	}
	return parse(b[:n])
}

// walk opens the file at path, step by step: none may be a symbolic link, or the root of another mount. It does what openat2(2) does
// with RESOLVE_NO_SYMLINKS and RESOLVE_NO_XDEV; sandboxes refuse that call altogether, because they cannot see into its arguments.
func walk(dir int, mountID uint64, path string) (fd int, err error) {
	steps := strings.Split(path, "/")
	at := dir
	defer func() {
		if at != dir {
			unix.Close(at)
		}
	}()
	for i, name := range steps {
		flags := unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC
		if last := i == len(steps)-1; last {
			flags = unix.O_RDONLY | unix.O_NOFOLLOW | unix.O_CLOEXEC | unix.O_NONBLOCK | unix.O_NOCTTY
		}
		next, err := unix.Openat(at, name, flags, 0)
		if err != nil {
			return -1, err
		}
		if at != dir {
			unix.Close(at)
		}
		at = next
		var stat unix.Statx_t
		if err := unix.Statx(at, "", unix.AT_EMPTY_PATH, unix.STATX_TYPE|unix.STATX_MNT_ID, &stat); err != nil {
			return -1, err
		}
		switch {
		case stat.Mnt_id != mountID:
			return -1, unix.EXDEV
		case stat.Mode&unix.S_IFMT == unix.S_IFLNK:
			return -1, unix.ELOOP
		}
	}
	fd, at = at, dir
	return fd, nil
}

// checkFile refuses a file that somebody else could have read or could change.
func checkFile(info fs.FileInfo, modes bool) error {
	stat := info.Sys().(*syscall.Stat_t)
	var wrong string
	switch {
	case !info.Mode().IsRegular():
		wrong = "is not a file"
	case !modes: // such a file system shows what it was mounted with
		return nil
	case int(stat.Uid) != os.Geteuid():
		wrong = fmt.Sprintf("belongs to uid %d", stat.Uid)
	case info.Mode().Perm()&0o077 != 0:
		wrong = fmt.Sprintf("has mode %04o", info.Mode().Perm())
	case stat.Nlink != 1:
		wrong = "has another name"
	default:
		return nil
	}
	return &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: "the keyfile " + wrong, Remedy: "make it a file that only the user of kmsd can read, and find out who changed it"}
}

// create writes a new keyfile as name in the directory dir. It appears whole or not at all, and never in the place of another.
func create(dir, name string, c *content) error {
	var random [8]byte
	rand.Read(random[:])
	temp := filepath.Join(dir, ".kmsd-keyfile-"+hex.EncodeToString(random[:]))
	b := c.appendTo(make([]byte, 0, fileSize))
	defer clear(b)
	err := durable.Write(temp, b)
	defer os.Remove(temp)
	if err == nil {
		target := filepath.Join(dir, name)
		err = unix.Renameat2(unix.AT_FDCWD, temp, unix.AT_FDCWD, target, unix.RENAME_NOREPLACE)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) { // a file system that can only rename over what is there
			err = durable.Write(target, b)
		}
	}
	if err == nil {
		err = durable.Sync(dir)
	}
	if err != nil {
		return fileError(err)
	}
	return nil
}

// fileError gives a failure of the file system its sentinel. fs.ErrNotExist stays what it is, for the caller knows what is missing.
func fileError(err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENOTDIR):
		return fs.ErrNotExist
	case errors.Is(err, unix.ELOOP), errors.Is(err, unix.EXDEV):
		return &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: "the path of the keyfile leads through a link or another file system", Remedy: "enrol it by its true path"}
	case errors.Is(err, unix.EIO), errors.Is(err, unix.ENXIO), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENOMEDIUM), errors.Is(err, unix.ESTALE):
		return &enclave.Error{Kind: enclave.ErrAbsent, Detail: "the medium cannot be read", Cause: err, Remedy: "pull it and plug it in again"}
	}
	e := &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: "keyfile", Cause: err}
	if errors.Is(err, unix.EROFS) {
		// systemd shows a service of ProtectSystem=strict read-only what was mounted when it started.
		e.Remedy = "mount the medium writable, and when kmsd runs as a service, after that has started"
	}
	return e
}
