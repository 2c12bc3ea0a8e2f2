package client

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/kmsd-project/kmsd/client/ciphertext"
	"github.com/kmsd-project/kmsd/ipc/proto"
)

// EncryptBytes encrypts plaintext, and binds aad to it, under the current version of an AEAD key. kmsd chooses the nonce;
// the ciphertext says which version opens it (docs/ciphertext-format.md). Up to 60 KiB it is one request, above that a
// stream.
func (k *Key) EncryptBytes(ctx context.Context, plaintext, aad []byte) ([]byte, error) {
	if k.public != nil {
		return nil, k.unsupported("AEAD encryption")
	}
	if len(plaintext)+len(aad) <= proto.MaxData { // the answer, and aad beside it, have to fit a frame for decryption too
		var reply proto.EncryptReply
		err := k.client.Call(ctx, proto.OpEncrypt, &proto.Encrypt{Key: k.ref, Data: plaintext, AAD: aad}, &reply, nil)
		return reply.Ciphertext, err
	}
	var b bytes.Buffer
	w, err := k.EncryptStream(ctx, &b, aad)
	if err != nil {
		return nil, err
	}
	if _, err := w.Write(plaintext); err != nil {
		return nil, err
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

// DecryptBytes decrypts what EncryptBytes, EncryptStream, EncryptEnvelope or DataKey made. The error is [ErrDecryption],
// whatever is wrong, or wraps [ciphertext.ErrFormat] if it is no ciphertext of kmsd.
func (k *Key) DecryptBytes(ctx context.Context, sealed, aad []byte) ([]byte, error) {
	h, err := ciphertext.ParseHeader(sealed)
	if err != nil {
		return nil, err
	}
	if !h.Segmented(sealed) {
		return k.decryptMessage(ctx, sealed, aad)
	}
	r, err := k.DecryptStream(ctx, bytes.NewReader(sealed), aad)
	if err != nil {
		return nil, err
	}
	plaintext, err := io.ReadAll(r)
	if err != nil {
		return nil, err
	}
	return plaintext, nil
}

func (k *Key) decryptMessage(ctx context.Context, sealed, aad []byte) ([]byte, error) {
	var reply proto.DecryptReply
	err := k.client.Call(ctx, proto.OpDecrypt, &proto.Decrypt{Key: k.ref, Ciphertext: sealed, AAD: aad}, &reply, nil)
	if err != nil {
		return nil, err
	}
	return reply.Data, nil
}

// Rewrap moves a ciphertext to the newest version of the key. kmsd opens and seals it again; of a stream or an envelope
// only the head, so that its size does not matter: the segments stay as they are, and a copy of the old ciphertext
// still opens with the old version.
func (k *Key) Rewrap(ctx context.Context, sealed, aad []byte) ([]byte, error) {
	h, err := ciphertext.ParseHeader(sealed)
	if err != nil {
		return nil, err
	}
	var segments []byte
	if h.Segmented(sealed) {
		if len(sealed) < ciphertext.HeadSize {
			return nil, ErrDecryption
		}
		sealed, segments = sealed[:ciphertext.HeadSize], sealed[ciphertext.HeadSize:]
	}
	var reply proto.EncryptReply
	err = k.client.Call(ctx, proto.OpRewrap, &proto.Rewrap{Key: k.ref, Ciphertext: sealed, AAD: aad}, &reply, nil)
	if err != nil {
		return nil, err
	}
	return append(reply.Ciphertext[:len(reply.Ciphertext):len(reply.Ciphertext)], segments...), nil
}

// DataKey makes a fresh random key of 16, 32 or 64 bytes, and the same sealed under the key: keep the sealed form beside
// the data, and give it to DecryptBytes to have the key again.
func (k *Key) DataKey(ctx context.Context, size int, aad []byte) (key, sealed []byte, err error) {
	var reply proto.DataKeyReply
	err = k.client.Call(ctx, proto.OpDataKey, &proto.DataKey{Key: k.ref, Bytes: uint32(size), AAD: aad}, &reply, nil)
	if err != nil {
		return nil, nil, err
	}
	if len(reply.Plaintext) != size {
		return nil, nil, fmt.Errorf("%w: data key of %d bytes", ErrProtocol, len(reply.Plaintext))
	}
	return reply.Plaintext, reply.Ciphertext, nil
}

// EncryptEnvelope returns a writer that encrypts in this process under a data key of kmsd, at the full speed of the
// processor. The data key is in this process while the writer is in use; where it must not be, take EncryptStream.
//
// Close writes the last segment and does not close w. What was written without Close does not open.
func (k *Key) EncryptEnvelope(ctx context.Context, w io.Writer, aad []byte) (io.WriteCloser, error) {
	key, head, err := k.DataKey(ctx, ciphertext.KeySize, aad)
	if err != nil {
		return nil, err
	}
	defer clear(key)
	return ciphertext.NewWriter(w, head, key)
}

// EncryptStream returns a writer that has kmsd encrypt, chunk by chunk; the key of the stream never leaves it. ctx bounds
// the whole stream. A stream is not repeated when its connection is lost.
//
// Close writes the last segment and does not close w. What was written without Close does not open.
func (k *Key) EncryptStream(ctx context.Context, w io.Writer, aad []byte) (io.WriteCloser, error) {
	s, err := k.client.beginStream(ctx, &proto.StreamBegin{Op: proto.OpEncrypt, Key: k.ref, AAD: aad})
	if err != nil {
		return nil, err
	}
	if _, err := w.Write(s.head); err != nil {
		s.abort(err)
		return nil, err
	}
	return &streamWriter{stream: s, w: w}, nil
}

// DecryptStream returns a reader of the plaintext of whatever this package encrypted: messages and streams are decrypted
// by kmsd, envelopes in this process.
//
// Only verified plaintext is read, but that it is all there is known only at io.EOF. Write it where nobody looks, such as
// a temporary file that is renamed or linked at the end, and throw it away after any other error, which is
// [ErrDecryption] if the ciphertext was changed or cut off. Read the stream to its end, or cancel ctx.
func (k *Key) DecryptStream(ctx context.Context, r io.Reader, aad []byte) (io.Reader, error) {
	begin := make([]byte, ciphertext.HeaderSize, ciphertext.HeadSize)
	if _, err := io.ReadFull(r, begin); err != nil {
		return nil, formatError(err)
	}
	h, err := ciphertext.ParseHeader(begin)
	if err != nil {
		return nil, err
	}
	if h.KeySize != ciphertext.KeySize {
		sealed, err := io.ReadAll(io.LimitReader(r, proto.MaxData+ciphertext.Overhead+1))
		if err != nil {
			return nil, err
		}
		if len(sealed) > proto.MaxData+ciphertext.Overhead {
			return nil, fmt.Errorf("%w: a message of more than %d bytes", ErrTooLarge, proto.MaxData)
		}
		plaintext, err := k.decryptMessage(ctx, append(begin, sealed...), aad)
		return bytes.NewReader(plaintext), err
	}
	head := begin[:ciphertext.HeadSize]
	if _, err := io.ReadFull(r, head[ciphertext.HeaderSize:]); err != nil {
		return nil, formatError(err)
	}
	if h.Format == ciphertext.DataKey {
		key, err := k.decryptMessage(ctx, head, aad)
		if err != nil {
			return nil, err
		}
		defer clear(key)
		return envelopeReader(r, head, key)
	}
	s, err := k.client.beginStream(ctx, &proto.StreamBegin{Op: proto.OpDecrypt, Key: k.ref, AAD: aad, Head: head})
	if err != nil {
		return nil, err
	}
	return newStreamReader(s, r), nil
}

// envelope is a ciphertext.Reader whose errors are those of this package.
type envelope struct{ r *ciphertext.Reader }

func envelopeReader(r io.Reader, head, key []byte) (io.Reader, error) {
	inner, err := ciphertext.NewReader(r, head, key)
	if err != nil {
		return nil, err
	}
	return &envelope{inner}, nil
}

func (e *envelope) Read(p []byte) (int, error) {
	n, err := e.r.Read(p)
	if errors.Is(err, ciphertext.ErrDecryption) {
		err = ErrDecryption
	}
	return n, err
}

func formatError(err error) error {
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return fmt.Errorf("%w: too short", ciphertext.ErrFormat)
	}
	return err
}

// MAC authenticates data with the current version of an HMAC key.
func (k *Key) MAC(ctx context.Context, data []byte) ([]byte, error) {
	if len(data) > proto.MaxData {
		return k.MACReader(ctx, bytes.NewReader(data))
	}
	var reply proto.MACReply
	if err := k.client.Call(ctx, proto.OpMAC, &proto.MAC{Key: k.ref, Data: data}, &reply, nil); err != nil {
		return nil, err
	}
	return reply.MAC, nil
}

// MACReader authenticates everything r gives.
func (k *Key) MACReader(ctx context.Context, r io.Reader) ([]byte, error) {
	s, err := k.client.beginStream(ctx, &proto.StreamBegin{Op: proto.OpMAC, Key: k.ref})
	if err != nil {
		return nil, err
	}
	return s.from(r)
}

// VerifyMAC checks a MAC by any version of the key that may verify. The error is [ErrVerification] if it is wrong.
func (k *Key) VerifyMAC(ctx context.Context, data, mac []byte) error {
	if len(data) <= proto.MaxData {
		return k.client.Call(ctx, proto.OpMACVerify, &proto.MACVerify{Key: k.ref, Data: data, MAC: mac}, nil, nil)
	}
	return k.VerifyMACReader(ctx, bytes.NewReader(data), mac)
}

// VerifyMACReader checks a MAC over everything r gives.
func (k *Key) VerifyMACReader(ctx context.Context, r io.Reader, mac []byte) error {
	s, err := k.client.beginStream(ctx, &proto.StreamBegin{Op: proto.OpMACVerify, Key: k.ref, MAC: mac})
	if err != nil {
		return err
	}
	_, err = s.from(r)
	return err
}
