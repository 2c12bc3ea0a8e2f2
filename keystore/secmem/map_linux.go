package secmem

import (
	"golang.org/x/sys/unix"
)

// mapSecret maps pages of memfd_secret(2), Linux 5.14 and later where secretmem is enabled. The flag is O_CLOEXEC; FD_CLOEXEC is
// refused with EINVAL.
func mapSecret(size int) ([]byte, error) {
	fd, err := unix.MemfdSecret(unix.O_CLOEXEC)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd) // the mapping keeps the pages
	if err := unix.Ftruncate(fd, int64(size)); err != nil {
		return nil, err
	}
	mem, err := unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, err
	}
	return advise(mem)
}

// mapLocked is the fallback: private pages, locked into memory.
func mapLocked(size int) ([]byte, error) {
	mem, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return nil, err
	}
	if err := unix.Mlock(mem); err != nil {
		unix.Munmap(mem)
		return nil, err
	}
	return advise(mem)
}

// advise keeps the pages out of core dumps and out of forked children.
func advise(mem []byte) ([]byte, error) {
	for _, advice := range []int{unix.MADV_DONTDUMP, unix.MADV_DONTFORK} {
		if err := unix.Madvise(mem, advice); err != nil {
			unix.Munmap(mem)
			return nil, err
		}
	}
	return mem, nil
}
