package ipc

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// credentialSpace is the room for one SCM_CREDENTIALS message and for nothing else: descriptors that a peer passes
// find none, and the kernel closes them.
const credentialSpace = unix.SizeofCmsghdr + unix.SizeofUcred + 4

// receiver is the state of recvmsg on one connection. It is part of the connection so that a read allocates nothing.
type receiver struct {
	header  unix.Msghdr
	vector  unix.Iovec
	control [credentialSpace]byte
}

// receive reads what is there into p and returns the PID of the sender, 0 when the kernel names none.
func (r *receiver) receive(fd int, p []byte) (n int, pid int32, err error) {
	r.vector.Base = &p[0]
	r.vector.SetLen(len(p))
	r.header = unix.Msghdr{Iov: &r.vector, Control: &r.control[0]}
	r.header.SetIovlen(1)
	r.header.SetControllen(len(r.control))
	read, _, errno := syscall.Syscall(unix.SYS_RECVMSG, uintptr(fd), uintptr(unsafe.Pointer(&r.header)), unix.MSG_CMSG_CLOEXEC)
	r.vector.Base = nil
	if errno != 0 {
		return 0, 0, errno
	}
	if r.header.Flags&unix.MSG_CTRUNC != 0 {
		return int(read), 0, nil // somebody passes descriptors: not a client of ours
	}
	return int(read), senderPID(r.control[:r.header.Controllen]), nil
}

// senderPID reads the PID out of a control message. It is struct cmsghdr (cmsg(3)) followed by struct ucred (unix(7)).
func senderPID(b []byte) int32 {
	if len(b) < unix.SizeofCmsghdr+unix.SizeofUcred {
		return 0
	}
	h := (*unix.Cmsghdr)(unsafe.Pointer(&b[0]))
	if h.Level != unix.SOL_SOCKET || h.Type != unix.SCM_CREDENTIALS {
		return 0
	}
	return (*unix.Ucred)(unsafe.Pointer(&b[unix.SizeofCmsghdr])).Pid
}

// peerGroups returns the supplementary groups of the process that connected (SO_PEERGROUPS, Linux 4.13).
func peerGroups(fd int) ([]uint32, error) {
	groups := make([]uint32, 32)
	for {
		size := uint32(4 * len(groups))
		_, _, errno := syscall.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_PEERGROUPS,
			uintptr(unsafe.Pointer(&groups[0])), uintptr(unsafe.Pointer(&size)), 0)
		switch errno {
		case 0:
			return groups[: size/4 : size/4], nil
		case unix.ERANGE:
			groups = make([]uint32, size/4)
		default:
			return nil, errno
		}
	}
}
