package main

import (
	"sync"
	"time"

	"github.com/kmsd-project/kmsd/ipc/proto"
)

// streamIdle is how long a stream may wait for its next chunk.
const streamIdle = time.Minute

// stream is what a session keeps under a number: the sealer, opener or reader of a large body.
type stream interface{ Close() }

// openStream is a stream of a session. Its holder has it locked until release.
type openStream struct {
	mu    sync.Mutex
	value stream // nil once it is closed
	timer *time.Timer
	waits bool // its chunks wait for the disk, so they must not be worked on in the reader
}

// release lets the next chunk have the stream.
func (o *openStream) release() {
	if o.value != nil {
		o.timer.Reset(streamIdle)
	}
	o.mu.Unlock()
}

// end closes the stream.
func (o *openStream) end() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.value != nil {
		o.timer.Stop()
		o.value.Close()
		o.value = nil
	}
}

// addStream registers v and returns its number. It closes v when the connection has too many, or is gone.
func (s *session) addStream(v stream) (uint64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || len(s.streams) >= proto.MaxStreams {
		v.Close()
		return 0, busy("too many open streams on this connection", time.Second)
	}
	if s.streams == nil {
		s.streams = make(map[uint64]*openStream)
	}
	s.nextStream++
	id := s.nextStream
	_, waits := v.(*backupStream)
	s.streams[id] = &openStream{value: v, waits: waits, timer: time.AfterFunc(streamIdle, func() { s.dropStream(id) })}
	return id, nil
}

// stream returns the stream with the number id, locked; the caller must release it.
func (s *session) stream(id uint64) (*openStream, error) {
	s.mu.Lock()
	o := s.streams[id]
	s.mu.Unlock()
	if o != nil {
		o.mu.Lock()
		if o.value != nil {
			return o, nil
		}
		o.mu.Unlock()
	}
	return nil, &proto.Error{Code: proto.CodeInvalid, Class: proto.ClassInput, Message: "no such stream on this connection"}
}

// dropStream forgets the stream and closes it. The caller must not hold it.
func (s *session) dropStream(id uint64) {
	s.mu.Lock()
	o := s.streams[id]
	delete(s.streams, id)
	s.mu.Unlock()
	if o != nil {
		o.end()
	}
}
