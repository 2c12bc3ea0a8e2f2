// Package packet reads and writes the encrypted formats of MOSIP: the payload of its encrypt and decrypt calls and the
// registration packet around it; private keys at rest, data encrypted with a PIN, data for a registration machine, and
// attributes of its zero-knowledge database. It knows the names MOSIP gives to keys, too. It is a pure codec: the private key
// is behind an [Unwrapper] or [ClientKey], which for keys in kmsd is a client.Key.
//
// A registration packet is
//
//	nonce(12) aad(32) thumbprint(32) wrapped key(256) "#KEY_SPLITTER#" ciphertext tag(16)
//
// where the key is a fresh AES-256 key, wrapped by RSA-OAEP with SHA-256 for both hashes and an empty label; the
// ciphertext is AES-256-GCM under nonce and aad; and the thumbprint is the SHA-256 of the certificate in DER. With RSA-3072
// and RSA-4096 the wrapped key is longer.
//
// # Memory
//
// AES-GCM authenticates a packet with one tag at its very end. So that no unverified plaintext gets out, [Decrypt] decrypts a packet
// in memory as a whole, and [DecryptTo] reads it twice. Encrypt and Decrypt work in place, in one buffer of the size of the packet,
// at most [MaxSize]; [EncryptTo] and [DecryptTo] need the same little memory for packets of every size.
//
// # Security
//
// Anybody who has the certificate can make a packet: it is confidential, and it was not changed, but it does not say
// who made it. Data that must be authentic are signed before they are put in.
package packet

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
)

// Errors of this package. They are wrapped with what was wrong.
var (
	ErrFormat      = errors.New("not a MOSIP payload")
	ErrDecryption  = errors.New("decryption failed")
	ErrTooLarge    = errors.New("packet too large")
	ErrCertificate = errors.New("certificate cannot be encrypted to")
)

// MaxSize bounds a packet, and its plaintext, in bytes.
const MaxSize = 1 << 30

// Sizes in bytes.
const (
	nonceSize = 12
	aadSize   = 32
)

// Unwrapper decrypts wrapped keys by RSA-OAEP with SHA-256 for both hashes and an empty label. thumbprint is the SHA-256
// of the certificate that the key was wrapped to; it is all zero in a payload of MOSIP 1.1.3, which does not say.
type Unwrapper interface {
	Unwrap(ctx context.Context, thumbprint [32]byte, wrapped []byte) (key []byte, err error)
}

// Encrypt reads plaintext to its end and returns it as a registration packet for the holder of certificate. size is how
// long the plaintext is expected to be, so that one buffer of the right size is taken; it may be 0 if that is not known.
// An empty plaintext is refused, as MOSIP refuses it.
func Encrypt(certificate *x509.Certificate, plaintext io.Reader, size int64) ([]byte, error) {
	to, err := newRecipient(certificate)
	if err != nil {
		return nil, err
	}
	if size < 0 || size > MaxSize {
		return nil, fmt.Errorf("%w: %d bytes, at most %d", ErrTooLarge, size, MaxSize)
	}
	key, wrapped, err := to.newKey()
	if err != nil {
		return nil, err
	}
	defer clear(key)

	before := nonceSize + aadSize + len(to.thumbprint) + len(wrapped) + len(splitter)
	// The place for the tag also lets the read that finds the end happen without growing the buffer.
	packet := make([]byte, nonceSize+aadSize, before+int(size)+tagSize)
	rand.Read(packet)
	packet = append(packet, to.thumbprint[:]...)
	packet = append(packet, wrapped...)
	packet = append(packet, splitter...)
	if packet, err = readAll(packet, plaintext, before+MaxSize); err != nil {
		return nil, err
	}
	if len(packet) == before {
		return nil, errEmpty
	}
	aead, err := newGCM(key, nonceSize)
	if err != nil {
		return nil, err
	}
	sealed := aead.Seal(packet[before:before], packet[:nonceSize], packet[before:], packet[nonceSize:nonceSize+aadSize])
	if &sealed[0] == &packet[before] {
		return packet[:before+len(sealed)], nil
	}
	return append(packet[:before], sealed...), nil // there was no room for the tag
}

// Decrypt decrypts a registration packet in place and returns the plaintext, which lies in the memory of packet; packet
// itself is of no use afterwards, whatever happens. Errors are those of u, or wrap [ErrFormat] or [ErrDecryption].
func Decrypt(ctx context.Context, u Unwrapper, packet []byte) ([]byte, error) {
	if len(packet) > MaxSize+1024 {
		return nil, fmt.Errorf("%w: %d bytes", ErrTooLarge, len(packet))
	}
	if len(packet) < nonceSize+aadSize {
		return nil, fmt.Errorf("%w: a packet of %d bytes is too short", ErrFormat, len(packet))
	}
	parts, err := split(packet[nonceSize+aadSize:])
	if err != nil {
		return nil, err
	}
	if parts.version2 {
		return nil, fmt.Errorf("%w: a VER_R2 payload in a packet", ErrFormat)
	}
	return parts.open(ctx, u, parts.body[:0], parts.body, packet[:nonceSize], packet[nonceSize:nonceSize+aadSize])
}

// readAll appends r to b until its end. More than limit bytes in all are refused.
func readAll(b []byte, r io.Reader, limit int) ([]byte, error) {
	for {
		if len(b) == cap(b) {
			b = append(b, 0)[:len(b)]
		}
		n, err := r.Read(b[len(b):cap(b)])
		b = b[:len(b)+n]
		if len(b) > limit {
			return nil, fmt.Errorf("%w: more than %d bytes", ErrTooLarge, MaxSize)
		}
		if err == io.EOF {
			return b, nil
		}
		if err != nil {
			return nil, err
		}
	}
}

// splitter separates the wrapped key from the ciphertext (property mosip.kernel.data-key-splitter).
var splitter = []byte("#KEY_SPLITTER#")

// versionR2 begins the payload that carries its own additional data.
var versionR2 = []byte("VER_R2")

// maxHead is where the splitter of a payload ends at the latest, in bytes.
const maxHead = len("VER_R2") + 32 + 512 + len("#KEY_SPLITTER#")

// parts is a payload taken apart.
type parts struct {
	version2   bool
	thumbprint [32]byte // all zero when the payload has none
	wrapped    []byte
	body       []byte // after the splitter
}

// split takes a payload apart at its first splitter. What stands before it is told apart by its length alone: a wrapped
// key is as long as the modulus, and no two layouts have the same length.
func split(payload []byte) (parts, error) {
	at := bytes.Index(payload[:min(len(payload), maxHead)], splitter)
	if at < 0 {
		return parts{}, fmt.Errorf("%w: no %s where it has to be", ErrFormat, splitter)
	}
	head, p := payload[:at], parts{body: payload[at+len(splitter):]}
	for _, size := range []int{256, 384, 512} {
		switch {
		case len(head) == len(versionR2)+32+size && bytes.HasPrefix(head, versionR2):
			p.version2 = true
			p.thumbprint, p.wrapped = [32]byte(head[len(versionR2):]), head[len(versionR2)+32:]
			return p, nil
		case len(head) == 32+size:
			p.thumbprint, p.wrapped = [32]byte(head), head[32:]
			return p, nil
		case len(head) == size:
			p.wrapped = head
			return p, nil
		}
	}
	return parts{}, fmt.Errorf("%w: %d bytes before %s are no wrapped key", ErrFormat, len(head), splitter)
}

// open unwraps the key and appends the plaintext of ciphertext to dst.
func (p *parts) open(ctx context.Context, u Unwrapper, dst, ciphertext, nonce, aad []byte) ([]byte, error) {
	if len(ciphertext) <= tagSize {
		return nil, fmt.Errorf("%w: ciphertext of %d bytes is too short", ErrFormat, len(ciphertext))
	}
	key, err := p.unwrap(ctx, u)
	if err != nil {
		return nil, err
	}
	defer clear(key)
	aead, err := newGCM(key, len(nonce))
	if err != nil {
		return nil, err
	}
	plaintext, err := aead.Open(dst, nonce, ciphertext, aad)
	if err != nil {
		return nil, ErrDecryption
	}
	return plaintext, nil
}

func (p *parts) unwrap(ctx context.Context, u Unwrapper) ([]byte, error) {
	key, err := u.Unwrap(ctx, p.thumbprint, p.wrapped)
	if err != nil {
		return nil, fmt.Errorf("unwrap the packet key: %w", err)
	}
	if len(key) != keySize {
		clear(key)
		return nil, ErrDecryption
	}
	return key, nil
}
