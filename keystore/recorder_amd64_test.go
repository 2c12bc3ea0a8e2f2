package keystore

import (
	"encoding/binary"
	"fmt"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// diskOp is something a process did to the files of a store, in the order in which it was done.
type diskOp struct {
	what  string // write, truncate, sync, syncdir, create, rename, unlink, ack
	inode int
	off   int64
	data  []byte
	name  string // of create, unlink and rename; the acknowledged line of ack
	to    string // of rename
}

// recorder follows a process with ptrace and notes what it does to the files in dir.
type recorder struct {
	dir   string
	names map[string]int // inode by name
	files map[int]int    // inode by descriptor; dirInode for the directory
	pos   map[int]int64  // by descriptor
	next  int
	ops   []diskOp
	enter map[int]*syscallEntry // by thread
}

const dirInode = -1

type syscallEntry struct {
	regs syscall.PtraceRegs
	data []byte
	path [2]string
}

// record runs the command, which must not have been started, and returns what it did to dir. The files that are in dir already are
// in names, by inode.
func record(t *testing.T, dir string, names map[string]int, role string, args ...string) []diskOp {
	t.Helper()
	r := &recorder{dir: dir, names: names, files: map[int]int{}, pos: map[int]int64{}, next: len(names), enter: map[int]*syscallEntry{}}
	done := make(chan error, 1)
	go func() {
		// The kernel lets only the thread that started the process trace it. The thread ends with the goroutine.
		runtime.LockOSThread()
		done <- r.run(role, args)
	}()
	if err := <-done; err != nil {
		t.Fatalf("recording what the process writes needs ptrace: %v", err)
	}
	return r.ops
}

func (r *recorder) run(role string, args []string) error {
	cmd := runAs(role, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Ptrace: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	pid := cmd.Process.Pid
	var ws syscall.WaitStatus
	if _, err := syscall.Wait4(pid, &ws, 0, nil); err != nil {
		return err
	}
	const options = unix.PTRACE_O_TRACECLONE | unix.PTRACE_O_TRACESYSGOOD | unix.PTRACE_O_EXITKILL
	if err := syscall.PtraceSetOptions(pid, options); err != nil {
		return err
	}
	if err := syscall.PtraceSyscall(pid, 0); err != nil {
		return err
	}
	for {
		tid, err := syscall.Wait4(-1, &ws, unix.WALL|unix.WNOTHREAD, nil)
		if err == syscall.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		if ws.Exited() || ws.Signaled() {
			if tid == pid {
				if ws.ExitStatus() != 0 {
					return fmt.Errorf("the writer ended with status %#x", ws)
				}
				cmd.Process.Release()
				return nil
			}
			continue
		}
		signal := 0
		switch stop := ws.StopSignal(); {
		case stop == syscall.SIGTRAP|0x80:
			if err := r.syscall(tid); err != nil && err != syscall.ESRCH { // killed by the end of its process
				return err
			}
		case stop == syscall.SIGTRAP: // a new thread
		case stop == syscall.SIGSTOP: // the new thread itself; other signals may have reached it first
		default:
			signal = int(stop)
		}
		if err := syscall.PtraceSyscall(tid, signal); err != nil && err != syscall.ESRCH {
			return err
		}
	}
}

// syscall is called at the beginning and at the end of each system call of a thread.
func (r *recorder) syscall(tid int) error {
	begins, err := syscallBegins(tid)
	if err != nil {
		return err
	}
	e := r.enter[tid]
	if begins {
		e = &syscallEntry{}
		if err := syscall.PtraceGetRegs(tid, &e.regs); err != nil {
			return err
		}
		r.enter[tid] = e
		switch e.regs.Orig_rax {
		case unix.SYS_WRITE, unix.SYS_PWRITE64:
			if fd := int(e.regs.Rdi); fd == 1 || r.known(fd) {
				e.data = make([]byte, e.regs.Rdx)
				return peek(tid, e.regs.Rsi, e.data)
			}
		case unix.SYS_OPENAT, unix.SYS_UNLINKAT:
			e.path[0] = peekString(tid, e.regs.Rsi)
		case unix.SYS_RENAMEAT, unix.SYS_RENAMEAT2:
			e.path[0], e.path[1] = peekString(tid, e.regs.Rsi), peekString(tid, e.regs.R10)
		}
		return nil
	}
	if e == nil {
		return fmt.Errorf("thread %d ends a system call that it has not begun", tid)
	}
	delete(r.enter, tid)
	var out syscall.PtraceRegs
	if err := syscall.PtraceGetRegs(tid, &out); err != nil {
		return err
	}
	result := int64(out.Rax)
	if result < 0 {
		return nil
	}
	fd := int(e.regs.Rdi)
	switch e.regs.Orig_rax {
	case unix.SYS_WRITE:
		if fd == 1 {
			r.ops = append(r.ops, diskOp{what: "ack", name: string(e.data[:len(e.data)-1])})
		} else if r.known(fd) {
			r.ops = append(r.ops, diskOp{what: "write", inode: r.files[fd], off: r.pos[fd], data: e.data[:result]})
			r.pos[fd] += result
		}
	case unix.SYS_PWRITE64:
		if r.known(fd) {
			r.ops = append(r.ops, diskOp{what: "write", inode: r.files[fd], off: int64(e.regs.R10), data: e.data[:result]})
		}
	case unix.SYS_FTRUNCATE:
		if r.known(fd) {
			r.ops = append(r.ops, diskOp{what: "truncate", inode: r.files[fd], off: int64(e.regs.Rsi)})
		}
	case unix.SYS_FSYNC, unix.SYS_FDATASYNC:
		if r.known(fd) {
			what := "sync"
			if r.files[fd] == dirInode {
				what = "syncdir"
			}
			r.ops = append(r.ops, diskOp{what: what, inode: r.files[fd]})
		}
	case unix.SYS_OPENAT:
		delete(r.files, int(result))
		if e.path[0] == r.dir {
			r.files[int(result)] = dirInode
		} else if name, ok := r.inDir(e.path[0]); ok {
			inode, exists := r.names[name]
			if !exists {
				inode = r.next
				r.next++
				r.names[name] = inode
				r.ops = append(r.ops, diskOp{what: "create", inode: inode, name: name})
			}
			r.files[int(result)], r.pos[int(result)] = inode, 0
		}
	case unix.SYS_CLOSE:
		delete(r.files, fd)
	case unix.SYS_RENAMEAT, unix.SYS_RENAMEAT2:
		from, ok1 := r.inDir(e.path[0])
		to, ok2 := r.inDir(e.path[1])
		if ok1 && ok2 {
			r.names[to] = r.names[from]
			delete(r.names, from)
			r.ops = append(r.ops, diskOp{what: "rename", name: from, to: to})
		}
	case unix.SYS_UNLINKAT:
		if name, ok := r.inDir(e.path[0]); ok {
			delete(r.names, name)
			r.ops = append(r.ops, diskOp{what: "unlink", name: name})
		}
	}
	return nil
}

// syscallBegins asks the kernel at which end of a system call a thread has stopped.
func syscallBegins(tid int) (bool, error) {
	var info [88]byte // struct ptrace_syscall_info
	_, _, errno := syscall.Syscall6(syscall.SYS_PTRACE, unix.PTRACE_GET_SYSCALL_INFO, uintptr(tid), uintptr(len(info)), uintptr(unsafe.Pointer(&info)), 0, 0)
	if errno != 0 {
		return false, errno
	}
	return info[0] == unix.PTRACE_SYSCALL_INFO_ENTRY, nil
}

func (r *recorder) known(fd int) bool { _, ok := r.files[fd]; return ok }

func (r *recorder) inDir(path string) (string, bool) {
	return filepath.Base(path), filepath.Dir(path) == r.dir
}

func peek(tid int, addr uint64, data []byte) error {
	if len(data) == 0 {
		return nil
	}
	local := []unix.Iovec{{Base: &data[0], Len: uint64(len(data))}}
	n, err := unix.ProcessVMReadv(tid, local, []unix.RemoteIovec{{Base: uintptr(addr), Len: len(data)}}, 0)
	if err == nil && n != len(data) {
		err = fmt.Errorf("read %d bytes of %d", n, len(data))
	}
	return err
}

func peekString(tid int, addr uint64) string {
	var out []byte
	for {
		word := make([]byte, 8)
		if _, err := syscall.PtracePeekData(tid, uintptr(addr)+uintptr(len(out)), word); err != nil {
			return ""
		}
		if v := binary.LittleEndian.Uint64(word); (v-0x0101010101010101)&^v&0x8080808080808080 != 0 {
			for _, c := range word {
				if c == 0 {
					return string(out)
				}
				out = append(out, c)
			}
		}
		out = append(out, word...)
	}
}
