package audit

import (
	"os"
	"syscall"
)

// datasync is fdatasync(2): the size of the file is synced with its data, its times are not.
func datasync(f *os.File) error {
	c, err := f.SyscallConn()
	if err != nil {
		return err
	}
	e := c.Control(func(fd uintptr) { // holds the file open meanwhile
		for {
			if err = syscall.Fdatasync(int(fd)); err != syscall.EINTR {
				return
			}
		}
	})
	if e != nil {
		return e
	}
	return err
}
