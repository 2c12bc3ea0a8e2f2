package ipc

import (
	"sync"
	"unsafe"
)

// Buffers come in three sizes. A frame that does not fit the smallest gets a larger one only when its first 16 KiB have
// come, so that to announce a length costs nothing but the announcement.
var bufferSizes = [...]int{16 << 10, 64<<10 + 64, MaxBuffer}

// MaxBuffer is the largest size of a buffer.
const MaxBuffer = 1<<20 + 8<<10

// largeBuffer is the size above which a buffer counts against Limits.LargePerUID.
const largeBuffer = 64<<10 + 64

var buffers [len(bufferSizes)]sync.Pool

// TakeBuffer returns a buffer of at least size bytes, or of the largest size there is. It is all zero.
func TakeBuffer(size int) []byte {
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

// PutBuffer wipes the first used bytes of b, which may have held a PIN or a plaintext, and keeps it for the next one. Nothing
// may have been written behind them.
func PutBuffer(b []byte, used int) {
	clear(b[:used])
	for i, n := range bufferSizes {
		if cap(b) == n {
			buffers[i].Put(unsafe.SliceData(b)) // a pointer to a slice would be an allocation of its own
			return
		}
	}
}
