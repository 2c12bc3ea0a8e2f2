package audit

import (
	"os"
	"syscall"
)

// datasync is fdatasync(2): the size of the file is synced with its data, its times are not.
func datasync(f *os.File) error {
	for {
		err := syscall.Fdatasync(int(f.Fd()))
		if err != syscall.EINTR {
			return err
		}
	}
}
