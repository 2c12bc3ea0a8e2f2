package client

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/sha256"
	"errors"
	"hash"
	"io"
	"sync"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"time"

	"github.com/kmsd-project/kmsd/client/ciphertext"
	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// streams is the part of a daemon that knows one AES key and one HMAC key.
type streams struct {
	aead  cipher.AEAD
	open  map[uint64]*fakeStream // of one connection: the fake serves one after the other
	next  uint64
	seen  atomic.Int64 // chunks
	abort atomic.Int64
	taken atomic.Int64 // answers to chunks that the client has read
	fail  int64        // the chunk that is refused, 0: none
}

type fakeStream struct {
	sealer *ciphertext.Sealer
	opener *ciphertext.Opener
	mac    hash.Hash
	next   uint64
}

func newStreams(t *testing.T) *streams {
	t.Helper()
	block, err := aes.NewCipher(make([]byte, 32))
	if err != nil {
		t.Fatal(err)
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		t.Fatal(err)
	}
	return &streams{aead: aead, open: make(map[uint64]*fakeStream)}
}

func (s *streams) handle(c *fakeConn, r proto.Request) {
	decode := func(m proto.Message) {
		if err := proto.Decode(r.Params, m); err != nil {
			c.t.Errorf("%s: %v", r.Op, err)
		}
	}
	failed := &proto.Error{Code: proto.CodeDecryptionFailed, Class: proto.ClassInput}
	header := ciphertext.Header{Format: ciphertext.Message, Algorithm: keyspec.AES256GCM, Version: 1}
	switch r.Op {
	case proto.OpKeyGet:
		c.reply(r, &proto.KeyInfo{Name: "a", Algorithm: "aes-256-gcm", Current: 1})
	case proto.OpEncrypt:
		var p proto.Encrypt
		decode(&p)
		sealed, err := ciphertext.Append(nil, header, s.aead, p.Data, p.AAD)
		if err != nil {
			c.t.Error(err)
		}
		c.reply(r, &proto.EncryptReply{Ciphertext: sealed, Version: 1})
	case proto.OpDataKey:
		var p proto.DataKey
		decode(&p)
		header.Format = ciphertext.DataKey
		key := bytes.Repeat([]byte{9}, int(p.Bytes))
		sealed, err := ciphertext.Append(nil, header, s.aead, key, p.AAD)
		if err != nil {
			c.t.Error(err)
		}
		c.reply(r, &proto.DataKeyReply{Plaintext: key, Ciphertext: sealed, Version: 1})
	case proto.OpDecrypt, proto.OpRewrap:
		var p proto.Decrypt
		decode(&p)
		plaintext, err := ciphertext.Open(nil, s.aead, p.Ciphertext, p.AAD)
		if err != nil {
			c.refuse(r, failed)
			return
		}
		if r.Op == proto.OpDecrypt {
			c.reply(r, &proto.DecryptReply{Data: plaintext, Version: 1})
			return
		}
		h, _ := ciphertext.ParseHeader(p.Ciphertext)
		h.Version = 2
		sealed, err := ciphertext.Append(nil, h, s.aead, plaintext, p.AAD)
		if err != nil {
			c.t.Error(err)
		}
		c.reply(r, &proto.EncryptReply{Ciphertext: sealed, Version: 2})
	case proto.OpStreamBegin:
		var p proto.StreamBegin
		decode(&p)
		var stream fakeStream
		var head, key []byte
		var err error
		switch p.Op {
		case proto.OpEncrypt:
			header.Format = ciphertext.Stream
			if head, key, err = ciphertext.AppendHead(nil, header, s.aead, p.AAD); err == nil {
				stream.sealer, err = ciphertext.NewSealer(head, key)
			}
		case proto.OpDecrypt:
			if key, err = ciphertext.Open(nil, s.aead, p.Head, p.AAD); err == nil {
				stream.opener, err = ciphertext.NewOpener(p.Head, key)
			}
		case proto.OpMAC:
			stream.mac = hmac.New(sha256.New, nil)
		}
		if err != nil {
			c.refuse(r, failed)
			return
		}
		s.next++
		s.open[s.next] = &stream
		c.reply(r, &proto.StreamBeginReply{Stream: s.next, Data: head, Version: 1})
	case proto.OpStreamUpdate:
		var p proto.StreamUpdate
		decode(&p)
		stream := s.open[p.Stream]
		if stream == nil || p.Chunk != stream.next {
			c.refuse(r, &proto.Error{Code: proto.CodeInvalid})
			return
		}
		stream.next++
		var out []byte
		var err error
		switch {
		case s.seen.Add(1) == s.fail:
			err = errors.New("told to")
		case stream.sealer != nil:
			out, err = stream.sealer.Update(nil, p.Data)
		case stream.opener != nil:
			out, err = stream.opener.Update(nil, p.Data)
		default:
			stream.mac.Write(p.Data)
		}
		if err != nil {
			delete(s.open, p.Stream)
			c.refuse(r, failed)
			return
		}
		c.reply(r, &proto.StreamData{Data: out})
		s.taken.Add(1)
	case proto.OpStreamFinish:
		var p proto.StreamRef
		decode(&p)
		stream := s.open[p.Stream]
		delete(s.open, p.Stream)
		var out []byte
		var err error
		switch {
		case stream.sealer != nil:
			out, err = stream.sealer.Finish(nil)
		case stream.opener != nil:
			out, err = stream.opener.Finish(nil)
		default:
			out = stream.mac.Sum(nil)
		}
		if err != nil {
			c.refuse(r, failed)
			return
		}
		c.reply(r, &proto.StreamData{Data: out})
	case proto.OpStreamAbort:
		s.abort.Add(1)
		c.reply(r, &proto.Empty{})
	case proto.OpCancel:
		c.reply(r, &proto.Empty{})
	}
}

func streamKey(t *testing.T) (*streams, *Client, *Key) {
	t.Helper()
	s := newStreams(t)
	c := newFake(t, s.handle).dial(WithTimeout(10 * time.Second))
	key, err := c.Key(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	return s, c, key
}

var streamSizes = []int{0, 1, 60 << 10, 64 << 10, 64<<10 + 1, 1 << 20, 1<<20 + 1, 5<<20 + 12345}

// TestIdleStream leaves a stream alone in the middle: its answers must be read all the same, because a daemon ends a
// connection that leaves them.
func TestIdleStream(t *testing.T) {
	checkGoroutines(t)
	s, _, key := streamKey(t)
	var b bytes.Buffer
	w, err := key.EncryptStream(t.Context(), &b, nil)
	if err != nil {
		t.Fatal(err)
	}
	const chunks = 3
	if _, err := w.Write(make([]byte, chunks*proto.MaxChunk)); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(10 * time.Second); s.taken.Load() < chunks; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d of %d answers were read while nobody wrote", s.taken.Load(), chunks)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestBuffersAreWiped: what went out and what came in is not in the buffers of the connection any more.
func TestBuffersAreWiped(t *testing.T) {
	_, c, key := streamKey(t)
	canary := []byte("canary in plaintext")
	found := func(cn *conn) bool {
		cn.mu.Lock()
		defer cn.mu.Unlock()
		for _, b := range append([][]byte{cn.in, cn.out, cn.spare, cn.body}, cn.bodies...) {
			if bytes.Contains(b[:cap(b)], canary) {
				return true
			}
		}
		return false
	}
	for _, n := range []int{1, 100, 700, 3000} { // a message, one that takes more than one read, and a stream's worth
		plaintext := bytes.Repeat(canary, n)
		var users sync.WaitGroup
		for range 8 {
			users.Go(func() {
				sealed, err := key.EncryptBytes(t.Context(), plaintext, nil)
				if err != nil {
					t.Error(err)
					return
				}
				if got, err := key.DecryptBytes(t.Context(), sealed, nil); err != nil || !bytes.Equal(got, plaintext) {
					t.Error(err)
				}
			})
		}
		users.Wait()
		cn, err := c.connection(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if found(cn) {
			t.Errorf("the plaintext of %d bytes is still there", len(plaintext))
		}
	}
}

// TestStreamWriterKeepsNothing: what was given to Write is the caller's again when it returns, chunks that were sent from
// where they were too, also beside other users of the connection.
func TestStreamWriterKeepsNothing(t *testing.T) {
	_, _, key := streamKey(t)
	stop := make(chan struct{})
	var others sync.WaitGroup
	for range 4 {
		others.Go(func() {
			for data := make([]byte, 40<<10); ; {
				select {
				case <-stop:
					return
				default:
				}
				if _, err := key.EncryptBytes(t.Context(), data, nil); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	var sealed bytes.Buffer
	w, err := key.EncryptStream(t.Context(), &sealed, nil)
	if err != nil {
		t.Fatal(err)
	}
	var want []byte
	buf := make([]byte, 2<<20+12345)
	for i := range byte(4) {
		for j := range buf {
			buf[j] = i + byte(j>>10)
		}
		want = append(want, buf...)
		if n, err := w.Write(buf); n != len(buf) || err != nil {
			t.Fatal(n, err)
		}
		clear(buf)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	close(stop)
	others.Wait()
	r, err := key.DecryptStream(t.Context(), &sealed, nil)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("%d bytes of %d, equal %t, %v", len(got), len(want), bytes.Equal(got, want), err)
	}
}

// TestStreams encrypts and decrypts through a daemon that does not read while it writes.
func TestStreams(t *testing.T) {
	checkGoroutines(t)
	_, _, key := streamKey(t)
	ctx := t.Context()
	for _, n := range streamSizes {
		plaintext := bytes.Repeat([]byte("0123456789abcde\n"), n/16+1)[:n]
		for name, begin := range map[string]func(context.Context, io.Writer, []byte) (io.WriteCloser, error){
			"stream": key.EncryptStream, "envelope": key.EncryptEnvelope,
		} {
			var b bytes.Buffer
			w, err := begin(ctx, &b, []byte("aad"))
			if err != nil {
				t.Fatal(err)
			}
			if _, err := io.Copy(w, iotest.OneByteReader(bytes.NewReader(plaintext[:min(n, 10)]))); err != nil {
				t.Fatal(err)
			}
			if _, err := w.Write(plaintext[min(n, 10):]); err != nil {
				t.Fatal(err)
			}
			if err := w.Close(); err != nil {
				t.Fatal(err)
			}
			if err := w.Close(); err != nil {
				t.Errorf("second Close: %v", err)
			}
			if _, err := w.Write([]byte("x")); err == nil {
				t.Error("Write after Close")
			}
			sealed := b.Bytes()
			r, err := key.DecryptStream(ctx, bytes.NewReader(sealed), []byte("aad"))
			if err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(r)
			if err != nil || !bytes.Equal(got, plaintext) {
				t.Fatalf("%s of %d bytes: %d bytes, %v", name, n, len(got), err)
			}
			if _, err := key.DecryptStream(ctx, bytes.NewReader(sealed), []byte("other")); !errors.Is(err, ErrDecryption) {
				t.Errorf("%s: other aad: %v", name, err)
			}
			r, err = key.DecryptStream(ctx, bytes.NewReader(sealed[:len(sealed)-1]), []byte("aad"))
			if err == nil {
				got, err = io.ReadAll(r)
			}
			if !errors.Is(err, ErrDecryption) || !bytes.HasPrefix(plaintext, got) {
				t.Errorf("%s: cut: %v", name, err)
			}
			rewrapped, err := key.Rewrap(ctx, sealed, []byte("aad"))
			if err != nil {
				t.Fatal(err)
			}
			if h, _ := ciphertext.ParseHeader(rewrapped); h.Version != 2 {
				t.Errorf("%s: rewrapped to version %d", name, h.Version)
			}
			if got, err := key.DecryptBytes(ctx, rewrapped, []byte("aad")); err != nil || !bytes.Equal(got, plaintext) {
				t.Errorf("%s: rewrapped: %v", name, err)
			}
		}
		sealed, err := key.EncryptBytes(ctx, plaintext, nil)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := key.DecryptBytes(ctx, sealed, nil); err != nil || !bytes.Equal(got, plaintext) {
			t.Errorf("%d bytes: %v", n, err)
		}
		r, err := key.DecryptStream(ctx, bytes.NewReader(sealed), nil)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, plaintext) {
			t.Errorf("%d bytes as a stream: %v", n, err)
		}
		mac, err := key.MACReader(ctx, bytes.NewReader(plaintext))
		want := hmac.New(sha256.New, nil)
		want.Write(plaintext)
		if err != nil || !bytes.Equal(mac, want.Sum(nil)) {
			t.Errorf("MAC of %d bytes: %v", n, err)
		}
	}
}

func TestDataKeys(t *testing.T) {
	_, _, key := streamKey(t)
	for _, n := range []int{16, 32, 64} {
		plain, sealed, err := key.DataKey(t.Context(), n, []byte("db"))
		if err != nil || len(plain) != n {
			t.Fatal(err)
		}
		got, err := key.DecryptBytes(t.Context(), sealed, []byte("db"))
		if err != nil || !bytes.Equal(got, plain) {
			t.Errorf("%d bytes: %v", n, err)
		}
		again, err := key.Rewrap(t.Context(), sealed, []byte("db"))
		if err != nil {
			t.Fatal(err)
		}
		if got, err := key.DecryptBytes(t.Context(), again, []byte("db")); err != nil || !bytes.Equal(got, plain) {
			t.Errorf("%d bytes, rewrapped: %v", n, err)
		}
	}
}

// TestStreamFailures ends streams in their middle: by the daemon, the source, the sink, the context and the connection.
func TestStreamFailures(t *testing.T) {
	checkGoroutines(t)
	broken := errors.New("broken")
	data := make([]byte, 12<<20)
	t.Run("daemon", func(t *testing.T) {
		s, _, key := streamKey(t)
		s.fail = 3
		w, err := key.EncryptStream(t.Context(), io.Discard, nil)
		if err != nil {
			t.Fatal(err)
		}
		_, err = w.Write(data)
		if err == nil {
			err = w.Close()
		}
		if !errors.Is(err, ErrDecryption) {
			t.Errorf("%v", err)
		}
		if err := w.Close(); !errors.Is(err, ErrDecryption) {
			t.Errorf("Close: %v", err)
		}
	})
	t.Run("sink", func(t *testing.T) {
		s, c, key := streamKey(t)
		w, err := key.EncryptStream(t.Context(), &failingWriter{n: 1 << 20, err: broken}, nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(data); !errors.Is(err, broken) {
			t.Errorf("%v", err)
		}
		if err := c.Ping(t.Context()); err != nil {
			t.Error(err)
		}
		if s.abort.Load() != 1 {
			t.Errorf("%d aborts", s.abort.Load())
		}
	})
	t.Run("source", func(t *testing.T) {
		_, c, key := streamKey(t)
		if _, err := key.MACReader(t.Context(), io.MultiReader(bytes.NewReader(data), iotest.ErrReader(broken))); !errors.Is(err, broken) {
			t.Errorf("%v", err)
		}
		if err := c.Ping(t.Context()); err != nil {
			t.Error(err)
		}
	})
	t.Run("context", func(t *testing.T) {
		_, c, key := streamKey(t)
		ctx, cancel := context.WithCancel(t.Context())
		w, err := key.EncryptStream(ctx, io.Discard, nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(data); err != nil {
			t.Fatal(err)
		}
		cancel()
		if err := w.Close(); !errors.Is(err, context.Canceled) {
			t.Errorf("%v", err)
		}
		if err := c.Ping(t.Context()); err != nil {
			t.Error(err)
		}
	})
	t.Run("connection", func(t *testing.T) {
		s := newStreams(t)
		f := newFake(t, s.handle)
		key, err := f.dial().Key(t.Context(), "a")
		if err != nil {
			t.Fatal(err)
		}
		w, err := key.EncryptStream(t.Context(), io.Discard, nil)
		if err != nil {
			t.Fatal(err)
		}
		f.stop()
		f.start()
		_, err = w.Write(data)
		if err == nil {
			err = w.Close()
		}
		if !errors.Is(err, ErrOutcomeUnknown) {
			t.Errorf("%v", err)
		}
	})
}

type failingWriter struct {
	n   int
	err error
}

func (w *failingWriter) Write(p []byte) (int, error) {
	if w.n -= len(p); w.n < 0 {
		return 0, w.err
	}
	return len(p), nil
}
