// Package durable writes small files that are still there after a loss of power, whole or not at all.
package durable

import (
	"os"
	"path/filepath"
	"syscall"
)

// Suffix is what the name of a file that is to replace another ends with until it is complete. After a crash there may be one.
const Suffix = ".new"

// Write makes the new file at path, for its owner only, and waits until the content is on the disk. The error is fs.ErrExist if
// the name is taken, also by a link; after every other error there is no file. Its name is on the disk after Sync of the directory.
func Write(path string, content []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err == nil {
		err = f.Sync()
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if err != nil {
		os.Remove(path)
	}
	return err
}

// Replace puts content in the place of the file at path, if there is one: at any instant the name leads to the old content or to
// the new, and to the new one for good when Replace has returned.
//
// The blocks of the old file are left alone. To overwrite them would not reach every copy on a flash disk, and on a disk that lies
// about having written the new name it would destroy the only content there is.
func Replace(path string, content []byte) error {
	temp := path + Suffix
	os.Remove(temp) // left over from a crash
	if err := Write(temp, content); err != nil {
		return err
	}
	if err := os.Rename(temp, path); err != nil {
		os.Remove(temp)
		return err
	}
	return Sync(filepath.Dir(path))
}

// Sync waits until a file, or the names in a directory, are on the disk.
func Sync(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}
