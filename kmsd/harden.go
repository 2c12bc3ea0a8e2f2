package main

import (
	"bytes"
	"crypto/rand"
	"fmt"
	"os"
	"reflect"
	"runtime"

	"golang.org/x/sys/unix"
)

// harden gives up what would let another process of the same user read this one. It is the first thing kmsd does, and
// kmsd refuses to start without it.
//
// PR_SET_DUMPABLE closes /proc/PID/mem, ptrace and process_vm_readv to the user's other processes and turns core dumps
// off even where a pipe collects them; RLIMIT_CORE covers the rest.
func harden() error {
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("make the process undumpable: %w", err)
	}
	if v, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0); err != nil || v != 0 {
		return fmt.Errorf("the process is still dumpable (%d, %v)", v, err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("turn core dumps off: %w", err)
	}
	unix.Umask(0o077)
	return nil
}

// freedIsOverwritten reports whether the runtime overwrites freed heap memory, as GODEBUG=clobberfree=1 makes it do. No
// API tells, so it leaves some blocks behind and looks whether the runtime's word for freed memory is in them. Not every block
// has to show it: some are still referred to from a stack, or in use again. A build that overwrites is believed on the
// first sight of it; one that does not has to look so several times.
func freedIsOverwritten() bool {
	for range 8 {
		if freedBlockIsOverwritten() {
			return true
		}
	}
	return false
}

func freedBlockIsOverwritten() bool {
	pattern := make([]byte, 64)
	rand.Read(pattern)
	addresses, kept := leaveBehind(pattern, 64)
	runtime.GC()
	runtime.GC()
	freed := bytes.Repeat([]byte{0xef, 0xbe, 0xad, 0xde}, 12)
	got := make([]byte, len(pattern))
	for _, a := range addresses {
		local := []unix.Iovec{{Base: &got[0], Len: uint64(len(got))}}
		n, err := unix.ProcessVMReadv(os.Getpid(), local, []unix.RemoteIovec{{Base: a, Len: len(got)}}, 0)
		if err == nil && n == len(got) && bytes.Equal(got[16:], freed) { // the head of a free block may be used for a list
			return true
		}
	}
	runtime.KeepAlive(kept)
	return false
}

// leaveBehind makes blocks of the same size and gives back where those are that nobody refers to. Every second block is
// kept: the runtime takes a page without a block in use away, and what is found at its address then says nothing.
//
//go:noinline
func leaveBehind(pattern []byte, blocks int) (addresses []uintptr, kept [][]byte) {
	for i := range blocks {
		b := bytes.Clone(pattern)
		if i%2 == 0 {
			kept = append(kept, b)
		} else {
			addresses = append(addresses, reflect.ValueOf(b).Pointer())
		}
	}
	return addresses, kept
}
