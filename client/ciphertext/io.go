package ciphertext

import (
	"errors"
	"fmt"
	"io"
)

// Writer encrypts what is written to it. Close writes the last segment; a stream without it does not open.
type Writer struct {
	w      io.Writer
	sealer *Sealer
	buf    []byte
	err    error
}

// NewWriter writes head to w and returns a Writer for the segments. Close does not close w.
func NewWriter(w io.Writer, head, key []byte) (*Writer, error) {
	sealer, err := NewSealer(head, key)
	if err != nil {
		return nil, err
	}
	if _, err := w.Write(head); err != nil {
		return nil, err
	}
	return &Writer{w: w, sealer: sealer}, nil
}

// Write encrypts p. After an error the Writer is of no more use.
func (w *Writer) Write(p []byte) (int, error) {
	if w.err != nil {
		return 0, w.err
	}
	written := 0
	for len(p) > 0 {
		n := min(len(p), 16*SegmentSize) // bounds buf
		if w.buf, w.err = w.sealer.Update(w.buf[:0], p[:n]); w.err != nil {
			return written, w.err
		}
		if err := w.flush(); err != nil {
			return written, err
		}
		written += n
		p = p[n:]
	}
	return written, nil
}

// Close writes the last segment. A second Close returns the first one's error.
func (w *Writer) Close() error {
	if w.err != nil {
		if errors.Is(w.err, errWriterClosed) {
			return nil
		}
		return w.err
	}
	if w.buf, w.err = w.sealer.Finish(w.buf[:0]); w.err != nil {
		return w.err
	}
	if err := w.flush(); err != nil {
		return err
	}
	w.err = errWriterClosed
	return nil
}

var errWriterClosed = errors.New("write to a closed ciphertext.Writer")

func (w *Writer) flush() error {
	if len(w.buf) == 0 {
		return nil
	}
	_, w.err = w.w.Write(w.buf)
	return w.err
}

// Reader decrypts segments.
//
// Invariant: Read returns bytes of verified segments only, and io.EOF only after the last segment was verified. Whoever
// writes the plaintext to a file therefore makes the file visible only after io.EOF: an error in the middle means that
// what was read is a true beginning of something that was cut off or changed.
type Reader struct {
	r      io.Reader
	opener *Opener
	sealed []byte
	plain  []byte // room for one piece of plaintext
	unread []byte
	err    error
}

// NewReader returns a Reader of the segments that r holds after head.
func NewReader(r io.Reader, head, key []byte) (*Reader, error) {
	opener, err := NewOpener(head, key)
	if err != nil {
		return nil, err
	}
	return &Reader{r: r, opener: opener, sealed: make([]byte, 4*SealedSegmentSize)}, nil
}

// Read implements io.Reader. Errors that are not of the source wrap [ErrDecryption] or [ErrTooLarge].
func (r *Reader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for len(r.unread) == 0 {
		if r.err != nil {
			return 0, r.err
		}
		r.fill()
	}
	n := copy(p, r.unread)
	r.unread = r.unread[n:]
	return n, nil
}

func (r *Reader) fill() {
	n, err := io.ReadFull(r.r, r.sealed)
	if r.unread, r.err = r.opener.Update(r.plain[:0], r.sealed[:n]); r.err != nil {
		return
	}
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		r.unread, r.err = r.opener.Finish(r.unread)
		if r.err == nil {
			r.err = io.EOF
		}
	} else {
		r.err = err
	}
	r.plain = r.unread[:0]
}

// ReadHead reads the head of a stream or an envelope from r. Errors wrap [ErrFormat], or are those of r.
func ReadHead(r io.Reader) ([]byte, Header, error) {
	head := make([]byte, HeadSize)
	if _, err := io.ReadFull(r, head); err != nil {
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			err = ErrFormat
		}
		return nil, Header{}, err
	}
	h, err := ParseHeader(head)
	if err == nil && h.KeySize != KeySize {
		err = fmt.Errorf("%w: has no segments", ErrFormat)
	}
	if err != nil {
		return nil, Header{}, err
	}
	return head, h, nil
}
