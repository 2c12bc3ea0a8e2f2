// Package ciphertext is the format of what kmsd encrypts: a header that says how, authenticated with the data, and for
// large data a sequence of segments. It is pure: the daemon and the client use the same code, and
// docs/ciphertext-format.md describes the same bytes for other languages.
//
// Every ciphertext begins with a [Header] of 12 bytes. What follows depends on its format:
//
//	Message   header nonce(12) ciphertext tag(16)                                 sealed by the key itself
//	Stream    header nonce(12) sealed stream key(32) tag(16) segments             the stream key never leaves kmsd
//	DataKey   header nonce(12) sealed data key tag(16) [segments]                 the data key is given to the client
//
// A Stream and a DataKey with segments (an envelope) differ only in who ran the segments.
//
// # Compatibility
//
// Whatever a release has written, every later release opens; testdata holds ciphertexts of every format to prove it.
package ciphertext

import (
	"crypto/cipher"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// Errors of this package.
var (
	// ErrFormat says that the bytes are not a ciphertext of kmsd, or one of a format or algorithm that this release
	// does not know.
	ErrFormat = errors.New("not a kmsd ciphertext")

	// ErrDecryption says that the ciphertext did not authenticate: another key, other associated data, or changed,
	// missing, moved or surplus bytes. Which of them is never told.
	ErrDecryption = errors.New("decryption failed")

	// ErrTooLarge says that a stream has reached its maximum length.
	ErrTooLarge = errors.New("ciphertext too large")

	// ErrAlgorithm says that the algorithm has no place in this format.
	ErrAlgorithm = errors.New("not an authenticated encryption algorithm")
)

// Sizes in bytes.
const (
	HeaderSize = 12
	NonceSize  = 12
	TagSize    = 16
	Overhead   = HeaderSize + NonceSize + TagSize // what a message is longer than its plaintext
	KeySize    = 32                               // the key of a stream or an envelope
	HeadSize   = Overhead + KeySize               // everything before the segments of a stream or an envelope
)

// Format says what a ciphertext is and who may see the key that its data are under.
type Format byte

// The formats. A number is never given a second meaning.
const (
	Message Format = 1 // data sealed by the key itself
	Stream  Format = 2 // segments under a stream key that only the daemon sees
	DataKey Format = 3 // a data key for the client; with segments after it, an envelope
)

// Header is the beginning of every ciphertext:
//
//	0  "kms"        magic
//	3  format       1 byte
//	4  algorithm    2 bytes, big-endian: 1 aes-128-gcm, 2 aes-256-gcm, 3 chacha20-poly1305
//	6  key size     1 byte: 0 in a message, 32 in a stream, 16, 32 or 64 in a data key
//	7  zero         1 byte
//	8  key version  4 bytes, big-endian, from 1
//
// Invariant: the header is associated data of the first seal, so a changed header never opens.
type Header struct {
	Format    Format
	Algorithm keyspec.Algorithm
	Version   keyspec.Version
	KeySize   int // of the sealed key in bytes; set by ParseHeader, not looked at by Append
}

// Segmented reports whether ciphertext, which begins with h, is a stream or an envelope rather than a message or a data
// key alone.
func (h Header) Segmented(ciphertext []byte) bool {
	return h.KeySize == KeySize && (h.Format == Stream || len(ciphertext) > HeadSize)
}

// The numbers of the algorithms. They are never reused.
const (
	codeAES128GCM        = 1
	codeAES256GCM        = 2
	codeChaCha20Poly1305 = 3
)

func algorithmCode(a keyspec.Algorithm) (uint16, bool) {
	switch a {
	case keyspec.AES128GCM:
		return codeAES128GCM, true
	case keyspec.AES256GCM:
		return codeAES256GCM, true
	case keyspec.ChaCha20Poly1305:
		return codeChaCha20Poly1305, true
	}
	return 0, false
}

func algorithmOf(code uint16) (keyspec.Algorithm, bool) {
	switch code {
	case codeAES128GCM:
		return keyspec.AES128GCM, true
	case codeAES256GCM:
		return keyspec.AES256GCM, true
	case codeChaCha20Poly1305:
		return keyspec.ChaCha20Poly1305, true
	}
	return "", false
}

// ParseHeader reads the header at the beginning of b; b may go on after it. Errors wrap [ErrFormat].
func ParseHeader(b []byte) (Header, error) {
	if len(b) < HeaderSize || string(b[:3]) != "kms" {
		return Header{}, ErrFormat
	}
	format := Format(b[3])
	if format < Message || format > DataKey {
		return Header{}, fmt.Errorf("%w: unknown format %d", ErrFormat, b[3])
	}
	algorithm, ok := algorithmOf(binary.BigEndian.Uint16(b[4:]))
	if !ok {
		return Header{}, fmt.Errorf("%w: unknown algorithm %d", ErrFormat, binary.BigEndian.Uint16(b[4:]))
	}
	version := binary.BigEndian.Uint32(b[8:])
	if !validKeySize(format, int(b[6])) || b[7] != 0 || version == 0 {
		return Header{}, fmt.Errorf("%w: key size, reserved byte or version out of range", ErrFormat)
	}
	return Header{format, algorithm, keyspec.Version(version), int(b[6])}, nil
}

func validKeySize(f Format, n int) bool {
	switch f {
	case Message:
		return n == 0
	case Stream:
		return n == KeySize
	case DataKey:
		return n == 16 || n == 32 || n == 64
	}
	return false
}

// appendTo appends the encoded form of h to dst.
func (h Header) appendTo(dst []byte, keySize int) ([]byte, error) {
	code, ok := algorithmCode(h.Algorithm)
	if !ok {
		return nil, fmt.Errorf("%w: %q", ErrAlgorithm, h.Algorithm)
	}
	if !validKeySize(h.Format, keySize) || h.Version == 0 {
		return nil, fmt.Errorf("%w: format %d, version %d, key of %d bytes", ErrFormat, h.Format, h.Version, keySize)
	}
	dst = append(dst, 'k', 'm', 's', byte(h.Format))
	dst = binary.BigEndian.AppendUint16(dst, code)
	dst = append(dst, byte(keySize), 0)
	return binary.BigEndian.AppendUint32(dst, uint32(h.Version)), nil
}

// Append seals plaintext with aead, the AEAD of the key version that h names, under a fresh random nonce, and appends
// header, nonce, ciphertext and tag to dst. The associated data are the header followed by aad.
//
// For the format DataKey the plaintext is the data key: 16, 32 or 64 bytes. For Stream use [AppendHead].
func Append(dst []byte, h Header, aead cipher.AEAD, plaintext, aad []byte) ([]byte, error) {
	if aead.NonceSize() != NonceSize || aead.Overhead() != TagSize {
		return nil, ErrAlgorithm
	}
	keySize := 0
	if h.Format != Message {
		keySize = len(plaintext)
	}
	start := len(dst)
	dst, err := h.appendTo(slices.Grow(dst, Overhead+len(plaintext)), keySize)
	if err != nil {
		return nil, err
	}
	header := dst[start:]
	nonce := dst[len(dst) : len(dst)+NonceSize]
	rand.Read(nonce) // never fails: crypto/rand ends the process instead
	return aead.Seal(dst[:len(dst)+NonceSize], nonce, plaintext, withHeader(header, aad)), nil
}

// AppendMessage appends plaintext sealed as a [Message].
func AppendMessage(dst []byte, algorithm keyspec.Algorithm, version keyspec.Version, aead cipher.AEAD, plaintext, aad []byte) ([]byte, error) {
	return Append(dst, Header{Format: Message, Algorithm: algorithm, Version: version}, aead, plaintext, aad)
}

// AppendHead makes a fresh stream key, appends it to dst sealed as the head of a [Stream] or of an envelope, and
// returns it. The head is [HeadSize] bytes.
func AppendHead(dst []byte, h Header, aead cipher.AEAD, aad []byte) (head, key []byte, err error) {
	if h.Format == Message {
		return nil, nil, fmt.Errorf("%w: a message has no segments", ErrFormat)
	}
	key = make([]byte, KeySize)
	rand.Read(key)
	head, err = Append(dst, h, aead, key, aad)
	if err != nil {
		return nil, nil, err
	}
	return head, key, nil
}

// Open opens what [Append] made, with the AEAD of the key version that the header names, and appends the plaintext to
// dst. The format is not looked at: whoever may see a message but not a stream key asks [ParseHeader] first.
//
// Of a stream or an envelope it takes the head alone. Every failure after the header is [ErrDecryption].
func Open(dst []byte, aead cipher.AEAD, sealed, aad []byte) ([]byte, error) {
	h, err := ParseHeader(sealed)
	if err != nil {
		return nil, err
	}
	if len(sealed) < Overhead || h.Format != Message && len(sealed) != Overhead+h.KeySize || aead.NonceSize() != NonceSize || aead.Overhead() != TagSize {
		return nil, ErrDecryption
	}
	header, nonce := sealed[:HeaderSize], sealed[HeaderSize:HeaderSize+NonceSize]
	plaintext, err := aead.Open(dst, nonce, sealed[HeaderSize+NonceSize:], withHeader(header, aad))
	if err != nil {
		return nil, ErrDecryption
	}
	return plaintext, nil
}

// withHeader returns header || aad. The header has one length, so no two pairs give the same bytes.
func withHeader(header, aad []byte) []byte {
	if len(aad) == 0 {
		return header
	}
	return append(append(make([]byte, 0, len(header)+len(aad)), header...), aad...)
}
