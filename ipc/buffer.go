package ipc

import (
	"sync"
	"unsafe"
)

// Buffers come in three sizes. A frame that does not fit the smallest gets a larger one only when its first 16 KiB have
// come, so that to announce a length costs nothing but the announcement.
var bufferSizes = [...]int{16 << 10, 64<<10 + 64, 1<<20 + 8<<10}

// largeBuffer is the size above which a buffer counts against Limits.LargePerUID.
const largeBuffer = 64<<10 + 64

var buffers [len(bufferSizes)]sync.Pool

// TakeLarge returns a buffer for a large reply, which Conn.Give or PutLarge takes back. It has 8 KiB more than a megabyte.
func TakeLarge() []byte { return takeBuffer(bufferSizes[len(bufferSizes)-1]) }

// PutLarge gives back a buffer of TakeLarge. Its first used bytes are wiped; there must be nothing behind them.
func PutLarge(b []byte, used int) { putBuffer(b, used) }

// takeBuffer returns a buffer of at least size bytes, or of the largest size there is.
func takeBuffer(size int) []byte {
	for i, n := range bufferSizes {
		if size <= n || i == len(bufferSizes)-1 {
			if b, ok := buffers[i].Get().(*byte); ok {
				return unsafe.Slice(b, n)
			}
			return make([]byte, n)
		}
	}
	panic("ipc: unreachable")
}

// putBuffer wipes the first used bytes of b, which may have held a PIN or a plaintext, and keeps it for the next one.
func putBuffer(b []byte, used int) {
	clear(b[:used])
	for i, n := range bufferSizes {
		if cap(b) == n {
			buffers[i].Put(unsafe.SliceData(b)) // a pointer to a slice would be an allocation of its own
			return
		}
	}
}
