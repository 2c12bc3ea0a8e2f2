package packet

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"io"
	mrand "math/rand/v2"
	"runtime"
	"slices"
	"testing"
	"testing/iotest"
)

// streamed is every kind of message that can be a stream.
var streamed = []struct {
	name    string
	encrypt func(w io.Writer, c *x509.Certificate, plaintext io.Reader) error
	whole   func(c *x509.Certificate, plaintext []byte) ([]byte, error)
	decrypt func(ctx context.Context, u Unwrapper, w io.Writer, r io.ReaderAt, size int64) error
	open    func(ctx context.Context, u Unwrapper, b []byte) ([]byte, error)
}{
	{
		"packet", EncryptTo,
		func(c *x509.Certificate, b []byte) ([]byte, error) {
			return Encrypt(c, bytes.NewReader(b), int64(len(b)))
		},
		DecryptTo, func(ctx context.Context, u Unwrapper, b []byte) ([]byte, error) {
			return Decrypt(ctx, u, bytes.Clone(b))
		},
	},
	payloadStream("VER_R2", Options{}),
	payloadStream("aad", Options{AAD: []byte("additional data")}),
	payloadStream("salt", Options{Salt: []byte("twelve bytes")}),
	payloadStream("long salt and aad", Options{Salt: bytes.Repeat([]byte("salt"), 64), AAD: make([]byte, 1000)}),
}

func payloadStream(name string, o Options) (s struct {
	name    string
	encrypt func(w io.Writer, c *x509.Certificate, plaintext io.Reader) error
	whole   func(c *x509.Certificate, plaintext []byte) ([]byte, error)
	decrypt func(ctx context.Context, u Unwrapper, w io.Writer, r io.ReaderAt, size int64) error
	open    func(ctx context.Context, u Unwrapper, b []byte) ([]byte, error)
}) {
	s.name = name
	s.encrypt = func(w io.Writer, c *x509.Certificate, plaintext io.Reader) error {
		return EncryptPayloadTo(w, c, plaintext, o)
	}
	s.whole = func(c *x509.Certificate, b []byte) ([]byte, error) { return EncryptPayload(c, b, o) }
	s.decrypt = func(ctx context.Context, u Unwrapper, w io.Writer, r io.ReaderAt, size int64) error {
		return DecryptPayloadTo(ctx, u, w, r, size, o)
	}
	s.open = func(ctx context.Context, u Unwrapper, b []byte) ([]byte, error) { return DecryptPayload(ctx, u, b, o) }
	return s
}

// TestStreams has what was made as a stream read in memory, and the other way round, and as a stream.
func TestStreams(t *testing.T) {
	certificate, u := base(t)
	for _, s := range streamed {
		for _, size := range []int{1, 15, 16, 17, pieceSize - 1, pieceSize, pieceSize + 1, 2*pieceSize + 5, 1 + mrand.IntN(3*pieceSize)} {
			plaintext := random(size)
			var sealed, got bytes.Buffer
			if err := s.encrypt(&sealed, certificate, iotest.HalfReader(bytes.NewReader(plaintext))); err != nil {
				t.Fatal(err)
			}
			if b, err := s.open(t.Context(), u, sealed.Bytes()); err != nil || !bytes.Equal(b, plaintext) {
				t.Fatalf("%s, %d bytes, stream read in memory: %v", s.name, size, err)
			}
			if err := s.decrypt(t.Context(), u, &got, bytes.NewReader(sealed.Bytes()), int64(sealed.Len())); err != nil || !bytes.Equal(got.Bytes(), plaintext) {
				t.Fatalf("%s, %d bytes, stream: %v", s.name, size, err)
			}
			whole, err := s.whole(certificate, plaintext)
			if err != nil || len(whole) != sealed.Len() {
				t.Fatalf("%s: %d bytes in memory, %d as a stream, %v", s.name, len(whole), sealed.Len(), err)
			}
			got.Reset()
			if err := s.decrypt(t.Context(), u, &got, bytes.NewReader(whole), int64(len(whole))); err != nil || !bytes.Equal(got.Bytes(), plaintext) {
				t.Fatalf("%s, %d bytes, made in memory: %v", s.name, size, err)
			}
		}
	}
}

// TestStreamVectors reads what a Java program made.
func TestStreamVectors(t *testing.T) {
	_, u := base(t)
	v := readVectors(t)
	want, aad, salt := unhex(t, v.Plaintext), unbase64(t, v.AAD), unbase64(t, v.Salt)
	for name, c := range map[string]struct {
		payload []byte
		options Options
	}{
		"VER_R2": {unbase64(t, v.VerR2), Options{}},
		"aad":    {unbase64(t, v.WithAAD), Options{AAD: aad}},
		"salt":   {unbase64(t, v.WithSalt), Options{Salt: salt, AAD: aad}},
		"1.1.3":  {unbase64(t, v.NoThumbprint), Options{AAD: aad}},
	} {
		var got bytes.Buffer
		if err := DecryptPayloadTo(t.Context(), u, &got, bytes.NewReader(c.payload), int64(len(c.payload)), c.options); err != nil || !bytes.Equal(got.Bytes(), want) {
			t.Errorf("%s: %q, %v", name, got.Bytes(), err)
		}
	}
	var got bytes.Buffer
	b := unhex(t, v.Packet)
	if err := DecryptTo(t.Context(), u, &got, bytes.NewReader(b), int64(len(b))); err != nil || !bytes.Equal(got.Bytes(), want) {
		t.Errorf("packet: %q, %v", got.Bytes(), err)
	}
}

// TestStreamReleasesNothing changes and cuts streams everywhere: nothing is written.
func TestStreamReleasesNothing(t *testing.T) {
	certificate, u := base(t)
	for _, s := range streamed {
		sealed, err := s.whole(certificate, random(pieceSize+100))
		if err != nil {
			t.Fatal(err)
		}
		check := func(what string, at int, b []byte) {
			t.Helper()
			var got bytes.Buffer
			err := s.decrypt(t.Context(), u, &got, bytes.NewReader(b), int64(len(b)))
			if err == nil || got.Len() > 0 {
				t.Fatalf("%s, %s at %d: %d bytes were written, %v", s.name, what, at, got.Len(), err)
			}
			if !errors.Is(err, ErrFormat) && !errors.Is(err, ErrDecryption) && !errors.Is(err, errWrongKey) {
				t.Fatalf("%s, %s at %d: %v", s.name, what, at, err)
			}
		}
		step := 7919
		if testing.Short() {
			step *= 5
		}
		places := []int{12, 43, 44, 80, len(sealed) - 17, len(sealed) - 1, len(sealed) - pieceSize - 10}
		for i := 1; i < len(sealed); i += step {
			places = append(places, i)
		}
		at := bytes.Index(sealed, splitter) - 256 - 32
		for _, i := range places {
			if i >= at && i < at+32 { // a thumbprint names a key and is not authenticated
				continue
			}
			changed := bytes.Clone(sealed)
			changed[i] ^= 1 << mrand.IntN(8)
			check("changed", i, changed)
		}
		for n := 0; n < len(sealed); n += 1 + n/4 {
			check("cut", n, sealed[:n])
		}
		check("longer", len(sealed), append(bytes.Clone(sealed), 0))
	}
}

// swapped is a file that somebody exchanges after it was read once.
type swapped struct {
	first, then *bytes.Reader
	at          int64 // reading here again exchanges it
	seen        bool
}

func (s *swapped) ReadAt(b []byte, at int64) (int, error) {
	if at == s.at && len(b) > 0 {
		if s.seen {
			s.first = s.then
		}
		s.seen = true
	}
	return s.first.ReadAt(b, at)
}

// TestStreamThatIsExchanged changes a packet between the two passes.
func TestStreamThatIsExchanged(t *testing.T) {
	certificate, u := base(t)
	plaintext := random(3*pieceSize + 100)
	var sealed bytes.Buffer
	if err := EncryptTo(&sealed, certificate, bytes.NewReader(plaintext)); err != nil {
		t.Fatal(err)
	}
	start := sealed.Len() - len(plaintext) - tagSize
	for piece := range 4 {
		changed := bytes.Clone(sealed.Bytes())
		changed[start+piece*pieceSize+50] ^= 1
		var got bytes.Buffer
		r := &swapped{bytes.NewReader(sealed.Bytes()), bytes.NewReader(changed), int64(start), false}
		err := DecryptTo(t.Context(), u, &got, r, int64(sealed.Len()))
		if !errors.Is(err, ErrDecryption) || !bytes.Equal(got.Bytes(), plaintext[:piece*pieceSize]) {
			t.Errorf("piece %d changed: %d bytes were written, %v", piece, got.Len(), err)
		}
		r = &swapped{bytes.NewReader(sealed.Bytes()), bytes.NewReader(sealed.Bytes()[:start+10]), int64(start), false}
		if err := DecryptTo(t.Context(), u, io.Discard, r, int64(sealed.Len())); !errors.Is(err, ErrFormat) {
			t.Errorf("cut off: %v", err)
		}
	}
}

func TestStreamErrors(t *testing.T) {
	certificate, u := base(t)
	wrong := errors.New("no more")
	for _, s := range streamed {
		var out bytes.Buffer
		if err := s.encrypt(&out, certificate, bytes.NewReader(nil)); !errors.Is(err, ErrFormat) || out.Len() > 0 {
			t.Errorf("%s, nothing: %v", s.name, err)
		}
		if err := s.encrypt(&out, certificate, iotest.ErrReader(wrong)); !errors.Is(err, wrong) || out.Len() > 0 {
			t.Errorf("%s, cannot be read: %v", s.name, err)
		}
		if err := s.encrypt(&shortWriter{400, wrong}, certificate, bytes.NewReader(random(1000))); !errors.Is(err, wrong) {
			t.Errorf("%s, cannot be written: %v", s.name, err)
		}
		sealed, err := s.whole(certificate, random(2*pieceSize))
		if err != nil {
			t.Fatal(err)
		}
		if err := s.decrypt(t.Context(), u, &shortWriter{pieceSize + 10, wrong}, bytes.NewReader(sealed), int64(len(sealed))); !errors.Is(err, wrong) {
			t.Errorf("%s, plaintext cannot be written: %v", s.name, err)
		}
		if err := s.decrypt(t.Context(), u, io.Discard, bytes.NewReader(sealed), int64(len(sealed))+1); !errors.Is(err, ErrFormat) {
			t.Errorf("%s, shorter than it is said to be: %v", s.name, err)
		}
		if err := s.decrypt(t.Context(), u, io.Discard, bytes.NewReader(sealed), maxGCM+1000); !errors.Is(err, ErrTooLarge) {
			t.Errorf("%s, larger than GCM can be: %v", s.name, err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := s.decrypt(ctx, u, io.Discard, bytes.NewReader(sealed), int64(len(sealed))); !errors.Is(err, context.Canceled) {
			t.Errorf("%s, cancelled: %v", s.name, err)
		}
		refused := &holder{key: u.key, err: errors.New("refused")}
		if err := s.decrypt(t.Context(), refused, io.Discard, bytes.NewReader(sealed), int64(len(sealed))); !errors.Is(err, refused.err) {
			t.Errorf("%s, refused: %v", s.name, err)
		}
	}
	if err := EncryptPayloadTo(io.Discard, certificate, bytes.NewReader([]byte("x")), Options{Salt: make([]byte, maxSaltSize+1)}); !errors.Is(err, ErrFormat) {
		t.Errorf("a long salt: %v", err)
	}
}

// shortWriter takes n bytes.
type shortWriter struct {
	n   int
	err error
}

func (w *shortWriter) Write(b []byte) (int, error) {
	if len(b) > w.n {
		return 0, w.err
	}
	w.n -= len(b)
	return len(b), nil
}

// endless is a plaintext, or by its positions a packet, that is nowhere.
type endless struct{ size int64 }

func (e *endless) Read(b []byte) (int, error) {
	n := int(min(int64(len(b)), e.size))
	e.size -= int64(n)
	if n == 0 {
		return 0, io.EOF
	}
	for i := range b[:n] {
		b[i] = byte(i)
	}
	return n, nil
}

// TestStreamMemory encrypts and decrypts much more than it may have in memory.
func TestStreamMemory(t *testing.T) {
	certificate, u := base(t)
	size := int64(256 << 20)
	if testing.Short() {
		size = 64 << 20
	}
	head := &headOf{}
	var peak peakOf
	peak.start()
	if err := EncryptTo(io.MultiWriter(head, &peak), certificate, &endless{size}); err != nil {
		t.Fatal(err)
	}
	if most := peak.above(); most > 2<<20 {
		t.Errorf("encryption of %d bytes took %d bytes of memory", size, most)
	}
	// The ciphertext is the key stream over a plaintext that is known, so that nobody has to keep it: it is encrypted again.
	sealed := &again{t: t, key: head.open(t, u), head: head.b, size: size}
	peak.start()
	total := &counted{}
	if err := DecryptTo(t.Context(), u, io.MultiWriter(total, &peak), sealed, int64(len(head.b))+size+tagSize); err != nil {
		t.Fatal(err)
	}
	if most := peak.above(); most > 6<<20 || total.n != size {
		t.Errorf("decryption of %d bytes took %d bytes of memory", total.n, most)
	}
}

// headOf keeps what stands before the ciphertext of a packet, and its tag.
type headOf struct{ b, tag []byte }

func (h *headOf) Write(b []byte) (int, error) {
	if h.b == nil {
		h.b = bytes.Clone(b)
	}
	h.tag = append(h.tag[:0], b[max(0, len(b)-tagSize):]...)
	return len(b), nil
}

func (h *headOf) open(t *testing.T, u Unwrapper) *opened {
	p, err := split(h.b[nonceSize+aadSize:])
	if err != nil {
		t.Fatal(err)
	}
	key, err := p.unwrap(t.Context(), u)
	if err != nil {
		t.Fatal(err)
	}
	g, err := newGCMPieces(key, h.b[:nonceSize], h.b[nonceSize:nonceSize+aadSize])
	if err != nil {
		t.Fatal(err)
	}
	return &opened{g, h.tag}
}

type opened struct {
	g   *gcm
	tag []byte
}

// again is a packet whose ciphertext is made when it is read.
type again struct {
	t    *testing.T
	key  *opened
	head []byte
	size int64
	b    []byte
}

func (a *again) ReadAt(b []byte, at int64) (int, error) {
	start := int64(len(a.head))
	switch {
	case at < start:
		n := copy(b, a.head[at:])
		if n < len(b) {
			k, err := a.ReadAt(b[n:], start)
			return n + k, err
		}
		return n, nil
	case at == start+a.size:
		return copy(b, a.key.tag), nil
	}
	if a.b == nil {
		a.b = make([]byte, pieceSize, pieceSize+tagSize)
	}
	piece := a.b[:min(pieceSize, a.size-(at-start))]
	for i := range piece {
		piece[i] = byte(i)
	}
	a.key.g.at = uint32((at - start) / 16)
	a.key.g.seal(piece)
	return copy(b, piece), nil
}

type counted struct{ n int64 }

func (c *counted) Write(b []byte) (int, error) {
	c.n += int64(len(b))
	return len(b), nil
}

// peakOf watches the heap at every 64th write.
type peakOf struct {
	before, most uint64
	writes       int
}

func (p *peakOf) start() {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	*p = peakOf{before: m.HeapAlloc, most: m.HeapAlloc}
}

func (p *peakOf) above() uint64 { return p.most - p.before }

func (p *peakOf) Write(b []byte) (int, error) {
	if p.writes++; p.writes%64 == 0 {
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		p.most = max(p.most, m.HeapAlloc)
	}
	return len(b), nil
}

// FuzzStream has streams and messages in memory agree on everything.
func FuzzStream(f *testing.F) {
	certificate, u := base(f)
	v := readVectors(f)
	for _, text := range []string{v.VerR2, v.WithAAD, v.WithSalt, v.NoThumbprint} {
		f.Add(unbase64(f, text), []byte{}, unbase64(f, v.AAD))
		f.Add(unbase64(f, text), unbase64(f, v.Salt), unbase64(f, v.AAD))
	}
	f.Add(unhex(f, v.Packet), []byte{}, []byte{})
	made, err := EncryptPayload(certificate, []byte("text"), Options{})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(made, []byte{}, []byte{})
	fixed := &fixedKey{}
	f.Fuzz(func(t *testing.T, b, salt, aad []byte) {
		o := Options{Salt: salt, AAD: aad}
		for _, u := range []Unwrapper{u, fixed} {
			want, wantErr := DecryptPayload(t.Context(), u, b, o)
			var got bytes.Buffer
			err := DecryptPayloadTo(t.Context(), u, &got, bytes.NewReader(b), int64(len(b)), o)
			if (err == nil) != (wantErr == nil) || !bytes.Equal(got.Bytes(), want) {
				t.Errorf("payload: %v and %v", err, wantErr)
			}
			want, wantErr = Decrypt(t.Context(), u, slices.Clone(b))
			got.Reset()
			err = DecryptTo(t.Context(), u, &got, bytes.NewReader(b), int64(len(b)))
			if (err == nil) != (wantErr == nil) || !bytes.Equal(got.Bytes(), want) {
				t.Errorf("packet: %v and %v", err, wantErr)
			}
		}
	})
}
