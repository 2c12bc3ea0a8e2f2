package packet

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"slices"
)

// MaxStream bounds, in bytes, the plaintext of what is encrypted and decrypted as a stream: that much AES-GCM takes under one
// nonce (NIST SP 800-38D section 5.2.1.1), 64 GiB less 32 bytes. MOSIP itself reads a packet into memory.
const MaxStream = maxGCM

// EncryptTo reads plaintext to its end and writes it to w as a registration packet for the holder of certificate, piece by piece:
// it takes the same memory, less than 1 MiB, whatever the size. What was written when it fails is to be thrown away.
func EncryptTo(w io.Writer, certificate *x509.Certificate, plaintext io.Reader) error {
	fresh := make([]byte, nonceSize+aadSize)
	rand.Read(fresh)
	f, err := newFrame(certificate, Options{Salt: fresh[:nonceSize], AAD: fresh[nonceSize:]})
	if err != nil {
		return err
	}
	f.before = slices.Concat(fresh, f.before)
	return f.encrypt(w, plaintext)
}

// EncryptPayloadTo is [EncryptTo] for a payload, see [EncryptPayload].
func EncryptPayloadTo(w io.Writer, certificate *x509.Certificate, plaintext io.Reader, o Options) error {
	f, err := newFrame(certificate, o)
	if err != nil {
		return err
	}
	return f.encrypt(w, plaintext)
}

func (f *frame) encrypt(w io.Writer, plaintext io.Reader) error {
	defer clear(f.key)
	g, err := newGCMPieces(f.key, f.nonce, f.aad)
	if err != nil {
		return err
	}
	piece := make([]byte, pieceSize, pieceSize+tagSize)
	defer clear(piece)
	for more := true; more; {
		n, err := io.ReadFull(plaintext, piece)
		switch {
		case err == io.EOF || err == io.ErrUnexpectedEOF:
			more = false
		case err != nil:
			return err
		}
		if g.data == 0 { // so that nothing is written for a plaintext that cannot be read
			if n == 0 {
				return errEmpty
			}
			if _, err := w.Write(f.before); err != nil {
				return err
			}
		}
		if n > MaxStream-g.data {
			return fmt.Errorf("%w: more than %d bytes", ErrTooLarge, int64(MaxStream))
		}
		g.seal(piece[:n])
		if _, err := w.Write(piece[:n]); err != nil {
			return err
		}
	}
	tag := g.tag()
	_, err = w.Write(slices.Concat(tag[:], f.after))
	return err
}

// DecryptTo decrypts a registration packet of size bytes and writes the plaintext to w. It reads the packet twice, to verify and
// then to decrypt it, and takes the same memory, less than 5 MiB, whatever the size. Errors are those of u, of r and of w, or
// wrap [ErrFormat], [ErrTooLarge] or [ErrDecryption].
//
// Invariant: every byte that is written was verified, even if somebody changes what r reads between the two passes: a piece that
// is not what it was in the first is not written. What was written before an error is to be thrown away all the same, since its
// end is missing.
func DecryptTo(ctx context.Context, u Unwrapper, w io.Writer, r io.ReaderAt, size int64) error {
	var fresh [nonceSize + aadSize]byte
	if size < int64(len(fresh)) {
		return fmt.Errorf("%w: a packet of %d bytes is too short", ErrFormat, size)
	}
	if err := readAt(r, fresh[:], 0); err != nil {
		return err
	}
	payload := io.NewSectionReader(r, int64(len(fresh)), size-int64(len(fresh)))
	return decryptTo(ctx, u, w, payload, Options{Salt: fresh[:nonceSize], AAD: fresh[nonceSize:]})
}

// DecryptPayloadTo is [DecryptTo] for a payload; o must be what it was made with, see [DecryptPayload].
func DecryptPayloadTo(ctx context.Context, u Unwrapper, w io.Writer, r io.ReaderAt, size int64, o Options) error {
	return decryptTo(ctx, u, w, io.NewSectionReader(r, 0, size), o)
}

func decryptTo(ctx context.Context, u Unwrapper, w io.Writer, r *io.SectionReader, o Options) error {
	head := make([]byte, min(r.Size(), int64(maxHead)))
	if err := readAt(r, head, 0); err != nil {
		return err
	}
	p, err := split(head)
	if err != nil {
		return err
	}
	before, after, err := p.around(o)
	if err != nil {
		return err
	}
	start := int64(len(head) - len(p.body))
	body := r.Size() - start
	data := body - int64(before) - int64(after) - tagSize
	switch {
	case data < 1:
		return errShort(body)
	case data > MaxStream:
		return fmt.Errorf("%w: %d bytes, at most %d", ErrTooLarge, data, int64(MaxStream))
	}
	around := make([]byte, before+tagSize+after)
	if err := readAt(r, around[:before], start); err != nil {
		return err
	}
	if err := readAt(r, around[before:], start+int64(before)+data); err != nil {
		return err
	}
	tag, nonce, aad := around[before:before+tagSize], o.Salt, o.AAD
	switch {
	case before > 0:
		nonce, aad = around[:nonceSize], around[:before]
	case after > 0:
		nonce = around[before+tagSize:]
	}
	key, err := p.unwrap(ctx, u)
	if err != nil {
		return err
	}
	defer clear(key)
	g, err := newGCMPieces(key, nonce, aad)
	if err != nil {
		return err
	}
	return g.openAll(ctx, w, io.NewSectionReader(r, start+int64(before), data), tag)
}

// openAll verifies the ciphertext that r has, and then decrypts it.
func (g *gcm) openAll(ctx context.Context, w io.Writer, r *io.SectionReader, tag []byte) error {
	buffer := make([]byte, min(pieceSize, r.Size()), pieceSize+tagSize)
	defer clear(buffer)
	// What each piece has to be in the second pass.
	sums := make([]element, 0, (r.Size()+pieceSize-1)/pieceSize)
	each := func(f func(i int, piece []byte) error) error {
		for i, at := 0, int64(0); at < r.Size(); i, at = i+1, at+pieceSize {
			if err := ctx.Err(); err != nil {
				return err
			}
			piece := buffer[:min(pieceSize, r.Size()-at)]
			if err := readAt(r, piece, at); err != nil {
				return err
			}
			if err := f(i, piece); err != nil {
				return err
			}
		}
		return nil
	}
	err := each(func(_ int, piece []byte) error {
		sum := g.hash(piece)
		sums = append(sums, sum)
		g.add(len(piece), sum)
		return nil
	})
	if err != nil {
		return err
	}
	if !g.verify(tag) {
		return ErrDecryption
	}
	return each(func(i int, piece []byte) error {
		if g.open(piece, sums[i]) != nil {
			return fmt.Errorf("%w: it was changed while it was read", ErrDecryption)
		}
		_, err := w.Write(piece)
		return err
	})
}

// readAt fills b.
func readAt(r io.ReaderAt, b []byte, at int64) error {
	n, err := r.ReadAt(b, at)
	switch {
	case n == len(b):
		return nil
	case errors.Is(err, io.EOF):
		return fmt.Errorf("%w: it ends too early", ErrFormat)
	}
	return err
}
