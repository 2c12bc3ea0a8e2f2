package client

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/kmsd-project/kmsd/client/ciphertext"
	"github.com/kmsd-project/kmsd/ipc/proto"
)

// stream is a stream in the daemon, with up to a window of chunks in flight. It is not safe for concurrent use.
//
// Each chunk in flight has a goroutine that sends it and then waits for its answer, so that answers are read whatever the
// caller does meanwhile: the daemon gives up on a client that leaves them unread, and while it is blocked writing one it
// does not read either. The goroutine ends with the answer.
type stream struct {
	ctx    context.Context
	cancel context.CancelFunc
	conn   *conn
	id     uint64
	head   []byte // what stream_begin gave
	size   int    // of a chunk
	window int

	next   uint64
	flying []*chunk // oldest first
	output func(answered) error
	err    error
}

// answered is the output of a chunk. Whoever is done with the data may recycle the frame, whose memory they are in.
type answered struct{ data, frame []byte }

// chunk is a stream_update on its way.
type chunk struct {
	sent  chan struct{} // closed when it has been handed to the kernel, or cannot be
	done  chan struct{} // closed when it has been answered
	reply proto.StreamData
	frame []byte // whose memory reply keeps
	err   error
}

// beginStream opens a stream on the present connection. It is repeated like any call, but once it is open the stream
// lives and ends with its connection.
func (c *Client) beginStream(ctx context.Context, begin *proto.StreamBegin) (*stream, error) {
	var r retry
	for {
		s, err := c.tryStream(ctx, begin)
		if err == nil {
			return s, nil
		}
		if again, err := r.next(ctx, c.options, err, true); !again {
			return nil, err
		}
	}
}

func (c *Client) tryStream(ctx context.Context, begin *proto.StreamBegin) (*stream, error) {
	cn, err := c.connection(ctx)
	if err != nil {
		return nil, err
	}
	var reply proto.StreamBeginReply
	if err := cn.call(ctx, proto.OpStreamBegin, begin, &reply, nil); err != nil {
		return nil, err
	}
	size := proto.MaxChunk
	if n := int(cn.server.Limits.StreamChunk); n > 0 {
		size = min(size, n)
	}
	switch { // whole segments spare the daemon a copy
	case begin.Op == proto.OpEncrypt && size > ciphertext.SegmentSize:
		size -= size % ciphertext.SegmentSize
	case begin.Op == proto.OpDecrypt && size > ciphertext.SealedSegmentSize:
		size -= size % ciphertext.SealedSegmentSize
	}
	window := proto.StreamWindow
	if n := int(cn.server.Limits.StreamWindow); n > 0 {
		window = min(window, n)
	}
	ctx, cancel := context.WithCancel(ctx)
	cn.countStreams(1)
	return &stream{
		ctx: ctx, cancel: cancel, conn: cn, id: reply.Stream, head: reply.Data, size: size, window: window,
		output: func(answered) error { return nil },
	}, nil
}

// push sends a chunk of at most size bytes, which must not be changed until the next push or finish has returned. It
// gives what has been answered to output.
func (s *stream) push(data []byte) error {
	if s.err != nil {
		return s.err
	}
	s.settle()
	for len(s.flying) >= s.window {
		if err := s.receive(); err != nil {
			return err
		}
	}
	c := &chunk{sent: make(chan struct{}), done: make(chan struct{})}
	go c.exchange(s.ctx, s.conn, &proto.StreamUpdate{Stream: s.id, Chunk: s.next, Data: data})
	s.next++
	s.flying = append(s.flying, c)
	return nil
}

// exchange sends c and waits for the answer.
func (c *chunk) exchange(ctx context.Context, cn *conn, p *proto.StreamUpdate) {
	defer close(c.done)
	cl, err := cn.send(ctx, proto.OpStreamUpdate, p, nil)
	close(c.sent)
	if err == nil {
		c.frame, err = cn.receiveFrame(ctx, cl, &c.reply)
	}
	c.err = err
}

// settle waits until the newest chunk has been sent: chunks go out in order, and the bytes of one that is being sent must
// not change.
func (s *stream) settle() {
	if n := len(s.flying); n > 0 {
		<-s.flying[n-1].sent
	}
}

// receive waits for the oldest answer.
func (s *stream) receive() error {
	c := s.flying[0]
	<-c.done
	s.flying = s.flying[1:]
	if c.err != nil {
		return s.abort(c.err)
	}
	if err := s.output(answered{c.reply.Data, c.frame}); err != nil {
		return s.abort(err)
	}
	return nil
}

// finish ends the stream after all chunks were pushed and returns the last output.
func (s *stream) finish() ([]byte, error) {
	if s.err != nil {
		return nil, s.err
	}
	for len(s.flying) > 0 {
		if err := s.receive(); err != nil {
			return nil, err
		}
	}
	var reply proto.StreamData
	err := s.conn.call(s.ctx, proto.OpStreamFinish, &proto.StreamRef{Stream: s.id}, &reply, nil)
	s.end(err)
	if err != nil {
		return nil, s.err
	}
	s.err = errStreamOver
	return reply.Data, nil
}

var errStreamOver = errors.New("write to a closed stream")

// abort gives the stream up because of err, which it returns.
func (s *stream) abort(err error) error {
	if s.err != nil {
		return s.err
	}
	s.end(err)
	s.settle()
	s.flying = nil
	if s.conn.post(proto.OpStreamAbort, &proto.StreamRef{Stream: s.id}) == nil {
		go func() { _ = s.conn.flush() }()
	}
	return s.err
}

// end ends the stream, on this side, with err.
func (s *stream) end(err error) {
	s.err = streamError(err)
	s.cancel()
	s.conn.countStreams(-1)
}

// streamError makes an error final: a stream cannot be repeated, so its request was as good as sent.
func streamError(err error) error {
	if errors.Is(err, errNotSent) {
		return fmt.Errorf("%w: the connection ended in the middle of a stream", ErrOutcomeUnknown)
	}
	return err
}

// from sends everything r gives and returns the last output.
func (s *stream) from(r io.Reader) ([]byte, error) {
	var buffers [2][]byte
	for i := 0; ; i++ {
		chunk := &buffers[i%2]
		if *chunk == nil {
			*chunk = make([]byte, s.size)
		}
		n, err := io.ReadFull(r, *chunk)
		if n > 0 {
			if err := s.push((*chunk)[:n]); err != nil {
				return nil, err
			}
		}
		switch err {
		case nil:
		case io.EOF, io.ErrUnexpectedEOF:
			return s.finish()
		default:
			return nil, s.abort(err)
		}
	}
}

// streamWriter is a stream whose output goes to w.
type streamWriter struct {
	stream *stream
	w      io.Writer
	chunk  []byte
	other  []byte // the chunk that is being sent
}

func (sw *streamWriter) Write(p []byte) (int, error) {
	s := sw.stream
	written := 0
	for len(p) > 0 {
		if s.err != nil {
			return written, s.err
		}
		if len(sw.chunk) == 0 && len(p) >= s.size { // sent from where it is
			if err := sw.push(p[:s.size]); err != nil {
				return written, err
			}
			s.settle()
			p, written = p[s.size:], written+s.size
			continue
		}
		if cap(sw.chunk) == 0 {
			sw.chunk = make([]byte, 0, s.size)
		}
		n := min(len(p), s.size-len(sw.chunk))
		sw.chunk = append(sw.chunk, p[:n]...)
		p = p[n:]
		if len(sw.chunk) == s.size {
			if err := sw.flush(); err != nil {
				return written, err
			}
		}
		written += n
	}
	return written, nil
}

func (sw *streamWriter) push(data []byte) error {
	sw.stream.output = sw.write
	return sw.stream.push(data)
}

func (sw *streamWriter) flush() error {
	if err := sw.push(sw.chunk); err != nil {
		return err
	}
	sw.chunk, sw.other = sw.other[:0], sw.chunk
	return nil
}

func (sw *streamWriter) write(a answered) error {
	_, err := sw.w.Write(a.data)
	sw.stream.conn.recycle(a.frame)
	return err
}

// Close ends the stream. It returns nil when that has been done before.
func (sw *streamWriter) Close() error {
	if sw.stream.err == errStreamOver {
		return nil
	}
	if len(sw.chunk) > 0 {
		if err := sw.flush(); err != nil {
			return err
		}
	}
	sw.stream.output = sw.write
	last, err := sw.stream.finish()
	if err != nil {
		return err
	}
	return sw.write(answered{data: last})
}

// streamReader is a stream whose input comes from r.
type streamReader struct {
	stream  *stream
	r       io.Reader
	buffers [2][]byte
	turn    int
	unread  []answered // output in order
	ended   bool
	err     error
}

func newStreamReader(s *stream, r io.Reader) *streamReader {
	sr := &streamReader{stream: s, r: r}
	s.output = func(a answered) error {
		if len(a.data) > 0 {
			sr.unread = append(sr.unread, a)
		}
		return nil
	}
	return sr
}

func (sr *streamReader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for len(sr.unread) == 0 {
		if sr.err != nil {
			return 0, sr.err
		}
		sr.fill()
	}
	first := &sr.unread[0]
	n := copy(p, first.data)
	if first.data = first.data[n:]; len(first.data) == 0 {
		sr.stream.conn.recycle(first.frame)
		sr.unread = sr.unread[1:]
	}
	return n, nil
}

func (sr *streamReader) fill() {
	if sr.ended {
		last, err := sr.stream.finish()
		if sr.err = err; err == nil {
			sr.err = io.EOF
			_ = sr.stream.output(answered{data: last})
		}
		return
	}
	buffer := &sr.buffers[sr.turn%2]
	sr.turn++
	if *buffer == nil {
		*buffer = make([]byte, sr.stream.size)
	}
	n, err := io.ReadFull(sr.r, *buffer)
	if n > 0 {
		if sr.err = sr.stream.push((*buffer)[:n]); sr.err != nil {
			return
		}
	}
	switch err {
	case nil:
	case io.EOF, io.ErrUnexpectedEOF:
		sr.ended = true
	default:
		sr.err = sr.stream.abort(err)
	}
}
