package keystore

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/kmsd-project/kmsd/keystore/durable"
)

// The files of a store, in its state directory.
const (
	headerFile   = "header"
	databaseFile = "store.db"
	dirtyFile    = "dirty"        // there while a database with changes is open; found at start it means an unclean stop
	newSuffix    = durable.Suffix // of a file that is being made
	restoredFile = "restored"     // the database from a backup, until it is known to be whole
	snapshotFile = "snapshot"     // a copy of the database, unlinked as soon as it is open
)

// Exists reports whether dir holds a keystore, or a part of one.
func Exists(dir string) (bool, error) {
	for _, name := range []string{headerFile, databaseFile} {
		_, err := os.Lstat(filepath.Join(dir, name))
		if err == nil {
			return true, nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return false, fmt.Errorf("%w: %w", ErrStorage, err)
		}
	}
	return false, nil
}

// checkDir makes sure that nobody else can put files into the state directory or read them there.
func checkDir(dir string) error {
	info, err := os.Lstat(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w in %s", ErrNoStore, dir)
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrStorage, err)
	}
	if !info.IsDir() {
		return fmt.Errorf("%w: %s is not a directory (links are not followed)", ErrPermissions, dir)
	}
	return checkOwner(dir, info, 0o700)
}

// checkFile makes sure that a file is a regular one with a single name that nobody else can open.
func checkFile(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: %s is missing", ErrNoStore, path)
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrStorage, err)
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%w: %s is not a regular file", ErrPermissions, path)
	}
	if st := info.Sys().(*syscall.Stat_t); st.Nlink != 1 {
		return fmt.Errorf("%w: %s has %d names", ErrPermissions, path, st.Nlink)
	}
	return checkOwner(path, info, 0o600)
}

func checkOwner(path string, info fs.FileInfo, mode fs.FileMode) error {
	if got := info.Mode() & (fs.ModePerm | fs.ModeSetuid | fs.ModeSetgid | fs.ModeSticky); got != mode {
		return fmt.Errorf("%w: %s has mode %o, it must be %o", ErrPermissions, path, got, mode)
	}
	if st := info.Sys().(*syscall.Stat_t); int(st.Uid) != os.Geteuid() {
		return fmt.Errorf("%w: %s belongs to uid %d, not to %d", ErrPermissions, path, st.Uid, os.Geteuid())
	}
	return nil
}

// readHeader reads and parses the header file.
func readHeader(dir string) ([]byte, *header, error) {
	path := filepath.Join(dir, headerFile)
	if err := checkFile(path); err != nil {
		return nil, nil, err
	}
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", ErrStorage, err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxHeader+1))
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", ErrStorage, err)
	}
	h, err := decodeHeader(b)
	return b, h, err
}

// replaceFile is durable.Replace.
func replaceFile(path string, content []byte) error {
	if err := durable.Replace(path, content); err != nil {
		return fmt.Errorf("%w: %w", ErrStorage, err)
	}
	return nil
}

// placeStore gives the files of a new store their names. The header is on the disk, under its temporary name, before the database
// has its own; so a crash in between leaves what finishPlacing can complete.
func placeStore(dir, database string, headerContent []byte) error {
	temp := filepath.Join(dir, headerFile+newSuffix)
	if err := writeFile(temp, headerContent); err != nil {
		return fmt.Errorf("%w: %w", ErrStorage, err)
	}
	if err := syncDir(dir); err != nil {
		return err
	}
	if err := os.Rename(database, filepath.Join(dir, databaseFile)); err != nil {
		os.Remove(temp)
		return fmt.Errorf("%w: %w", ErrStorage, err)
	}
	return finishPlacing(dir)
}

// finishPlacing completes placeStore if it was interrupted: a database, no header, but a new one. In a store that is in use the
// header is never missing.
func finishPlacing(dir string) error {
	path := filepath.Join(dir, headerFile)
	for _, name := range []string{databaseFile, headerFile + newSuffix} {
		if _, err := os.Lstat(filepath.Join(dir, name)); err != nil {
			return nil
		}
	}
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err := os.Rename(path+newSuffix, path); err != nil {
		return fmt.Errorf("%w: %w", ErrStorage, err)
	}
	return syncDir(dir)
}

// writeFile is durable.Write in the place of what a crash left over.
func writeFile(path string, content []byte) error {
	os.Remove(path)
	return durable.Write(path, content)
}

// syncDir makes the names in dir durable.
func syncDir(dir string) error {
	if err := durable.Sync(dir); err != nil {
		return fmt.Errorf("%w: %w", ErrStorage, err)
	}
	return nil
}
