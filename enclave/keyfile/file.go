package keyfile

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/kmsd-project/kmsd/enclave"
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

// read reads the keyfile at path, which is relative to the directory dir and leads through no symbolic link and no other mount. A file
// that is not there is fs.ErrNotExist. With modes, the file must be ours and closed to others.
func read(dir *os.File, path string, modes bool) (c content, err error) {
	fd, err := unix.Openat2(int(dir.Fd()), path, &unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_NONBLOCK | unix.O_NOCTTY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV,
	})
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
	temp, err := os.CreateTemp(dir, ".kmsd-keyfile-*") // 0600
	if err != nil {
		return fileError(err)
	}
	defer os.Remove(temp.Name())
	b := c.appendTo(make([]byte, 0, fileSize))
	defer clear(b)
	_, err = temp.Write(b)
	if err == nil {
		err = temp.Sync()
	}
	if closeErr := temp.Close(); err == nil {
		err = closeErr
	}
	if err == nil {
		err = unix.Renameat2(unix.AT_FDCWD, temp.Name(), unix.AT_FDCWD, filepath.Join(dir, name), unix.RENAME_NOREPLACE)
	}
	if err == nil {
		err = syncDir(dir)
	}
	if err != nil {
		return fileError(err)
	}
	return nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
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
	return &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: "keyfile", Cause: err}
}
