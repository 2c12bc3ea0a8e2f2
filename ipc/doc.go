// Package ipc is the transport of kmsd: length-prefixed frames over Unix stream sockets, with a peer that the kernel
// vouches for on every read. It knows nothing about keys or about what is in a frame.
//
// A Server accepts connections up to its limits and runs one reader goroutine for each. The reader takes a buffer only
// while bytes are pending, hands every whole frame to the Session and lets replies gather until the work at hand is
// done, because writing them together costs a fraction of writing them one by one. Work that would hold the reader up
// goes to a Lane, a bounded pool of workers that serves callers in turn.
//
// Linux only.
package ipc
