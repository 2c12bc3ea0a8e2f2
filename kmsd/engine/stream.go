package engine

import (
	"context"
	"crypto/hmac"
	"fmt"
	"hash"
	"strings"
	"sync"

	"github.com/kmsd-project/kmsd/client/ciphertext"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/mechanism"
)

// MaxChunk is the largest piece of input of a stream in bytes.
const MaxChunk = 1 << 20

// Stream is an operation whose input comes in chunks: encrypt, decrypt, mac or mac_verify. It was authorised and recorded
// when it began, and is recorded again if it fails at its end.
//
// Invariant: chunks are taken in the order of their numbers. After an error, after Finish and after the keystore was
// locked the stream is over.
type Stream struct {
	engine *Engine
	caller Caller
	op     string
	ref    keyspec.Ref
	trace  string

	Version keyspec.Version
	Head    []byte // of the ciphertext, for encrypt

	mu     sync.Mutex
	over   bool
	lock   uint64 // Engine.unlocks when it began
	chunk  uint64 // the next
	sealer *ciphertext.Sealer
	opener *ciphertext.Opener
	mac    hash.Hash
	want   []byte // for mac_verify
}

// BeginStream opens a stream. aad is for encrypt and decrypt, mac for mac_verify, head, the beginning of the ciphertext, for
// decrypt.
func (e *Engine) BeginStream(ctx context.Context, c *Caller, op string, ref keyspec.Ref, aad, mac, head []byte) (s *Stream, err error) {
	a := act{op: op, ref: ref, info: "stream"}
	var open func(*use) error
	s = &Stream{engine: e, caller: *c, op: op, ref: ref, trace: strings.Clone(trace(ctx)), lock: e.unlocks.Load()}
	switch op {
	case "encrypt":
		a.usage = keyspec.Encrypt
		open = func(u *use) error { return s.encrypt(u, aad) }
	case "decrypt":
		a.usage = keyspec.Decrypt
		if h, err := ciphertext.ParseHeader(head); err == nil {
			a.head = &h
		}
		open = func(u *use) error { return s.decrypt(u, aad, head, a.head) }
	case "mac":
		a.usage = keyspec.MAC
		open = s.authenticate
	case "mac_verify":
		a.usage = keyspec.Verify
		s.want = append([]byte(nil), mac...)
		open = s.authenticate
	case "sign":
		// RSA and ECDSA sign a digest, which the client makes; Ed25519 hashes the message twice, so that it would have to be
		// kept whole.
		a.usage = keyspec.Sign
		open = func(*use) error {
			return fmt.Errorf("%w: signing a stream; sign its digest, or a document that names the digest", ErrUnsupported)
		}
	default:
		return nil, fmt.Errorf("%w: no stream for %q", ErrInput, op)
	}
	err = e.do(ctx, c, &a, func(u *use) error {
		s.Version = u.version.Number
		return open(u)
	})
	if err != nil {
		return nil, err
	}
	return s, nil
}

func (s *Stream) encrypt(u *use, aad []byte) error {
	k, err := u.secret()
	if err != nil {
		return err
	}
	if k.AEAD() == nil {
		return errAEAD(u.key.Algorithm)
	}
	if err := u.countInvocation(); err != nil {
		return err
	}
	h := ciphertext.Header{Format: ciphertext.Stream, Algorithm: u.key.Algorithm, Version: u.version.Number}
	head, key, err := ciphertext.AppendHead(nil, h, k.AEAD(), aad)
	if failed := k.Failed(); failed != nil {
		err = failed
	}
	if err != nil {
		return err
	}
	defer clear(key)
	s.Head = head
	s.sealer, err = ciphertext.NewSealer(head, key)
	return err
}

func (s *Stream) decrypt(u *use, aad, head []byte, h *ciphertext.Header) error {
	if !isAEAD(u.key.Algorithm) {
		return errAEAD(u.key.Algorithm)
	}
	if h == nil || h.Format == ciphertext.Message {
		return ErrDecryption
	}
	key, err := u.open(nil, head, aad)
	if err != nil {
		return err
	}
	defer clear(key)
	if s.opener, err = ciphertext.NewOpener(head, key); err != nil {
		return ErrDecryption
	}
	return nil
}

func (s *Stream) authenticate(u *use) error {
	k, err := u.secret()
	if err != nil {
		return err
	}
	if s.mac = k.NewMAC(); s.mac == nil {
		return fmt.Errorf("%w: %s makes no MAC", ErrUnsupported, u.key.Algorithm)
	}
	return nil
}

// Update takes chunk number n, the first being 0, and appends what comes of it to dst. A wrong chunk ends the stream.
func (s *Stream) Update(n uint64, data, dst []byte) (out []byte, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.alive(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			s.end()
			s.failed(err)
		}
	}()
	defer s.protect(&err)
	switch {
	case n != s.chunk:
		return nil, fmt.Errorf("%w: chunk %d came, %d was expected", ErrStream, n, s.chunk)
	case len(data) > MaxChunk:
		return nil, fmt.Errorf("%w: chunk over %d bytes", ErrInput, MaxChunk)
	}
	s.chunk++
	s.engine.touch()
	switch {
	case s.sealer != nil:
		return s.sealer.Update(dst, data)
	case s.opener != nil:
		if out, err = s.opener.Update(dst, data); err != nil {
			return nil, ErrDecryption
		}
		return out, nil
	}
	s.mac.Write(data)
	return dst, nil
}

// Finish ends the stream and appends the rest of its output to dst: the last segment, or the MAC. For decrypt only its
// success says that the plaintext is complete. For mac_verify the error wraps mechanism.ErrVerification.
func (s *Stream) Finish(dst []byte) (out []byte, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.alive(); err != nil {
		return nil, err
	}
	defer s.end()
	defer func() {
		if err != nil {
			s.failed(err)
		}
	}()
	defer s.protect(&err)
	switch {
	case s.sealer != nil:
		return s.sealer.Finish(dst)
	case s.opener != nil:
		if out, err = s.opener.Finish(dst); err != nil {
			return nil, ErrDecryption
		}
		return out, nil
	case s.op == "mac":
		return s.mac.Sum(dst), nil
	case !hmac.Equal(s.mac.Sum(nil), s.want):
		return nil, mechanism.ErrVerification
	}
	return dst, nil
}

// Close ends the stream. It may be called at any time.
func (s *Stream) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.end()
}

func (s *Stream) alive() error {
	if s.over {
		return ErrStream
	}
	if s.engine.unlocks.Load() != s.lock {
		s.end()
		return ErrLocked
	}
	return nil
}

func (s *Stream) end() {
	s.over = true
	s.sealer, s.opener, s.mac, s.want = nil, nil, nil, nil
}

// protect turns a panic into ErrInternal, as use.protect does for other operations.
func (s *Stream) protect(err *error) {
	if r := recover(); r != nil {
		s.engine.panics.Add(1)
		text, stack := DescribePanic(r)
		s.engine.log.Error("stream panicked", "op", s.op, "panic", text, "stack", stack)
		*err = ErrInternal
	}
}

// failed records that a stream that was begun did not end well.
func (s *Stream) failed(err error) {
	u := use{Engine: s.engine, ctx: context.WithValue(context.Background(), TraceKey{}, s.trace), caller: &s.caller, act: &act{op: s.op, ref: s.ref, info: "end of stream"}, now: s.engine.now()}
	u.act.ref.Version = s.Version
	u.decision.Allowed, u.decision.Principal = true, s.engine.Principal(&s.caller)
	u.record(err)
}
