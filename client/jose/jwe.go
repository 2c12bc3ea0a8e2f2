package jose

import (
	"bytes"
	"compress/flate"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"strings"
)

// The one combination of algorithms that is written and read.
const (
	algOAEP  = "RSA-OAEP-256" // RFC 7518 section 4.3
	encGCM   = "A256GCM"      // RFC 7518 section 5.3
	zipDEF   = "DEF"          // RFC 7516 section 4.1.3
	keySize  = 32
	ivSize   = 12
	tagSize  = 16
	maxRatio = 100 // of what is decompressed to what was sent, beyond minRoom
	minRoom  = 1 << 20
)

// Unwrapper decrypts content keys by RSA-OAEP with SHA-256 for both hashes and an empty label. thumbprint is the SHA-256 of the
// certificate that the header names, all zero if it names none.
type Unwrapper interface {
	Unwrap(ctx context.Context, thumbprint [32]byte, wrapped []byte) (key []byte, err error)
}

// EncryptOptions says what an encrypted token looks like.
type EncryptOptions struct {
	Plain              bool   // do not compress
	Type, Content      string // typ and cty; JWT when empty, as MOSIP writes them
	IncludeCertificate bool   // x5c with the recipient's certificate
	Thumbprint         bool   // x5t#S256
	KeySetURL          string // jku
}

// Encrypt returns payload, encrypted for the holder of an RSA certificate, in the compact serialization. kid is the certificate's
// SHA-256 in base64url, as MOSIP finds its keys by.
//
// Compression tells something of the content by its length. It is on by default because MOSIP's is; turn it off where an
// attacker has a say in part of the payload.
func Encrypt(certificate *x509.Certificate, payload []byte, o EncryptOptions) (string, error) {
	public, ok := certificate.PublicKey.(*rsa.PublicKey)
	if !ok || public.N.BitLen() < minRSA {
		return "", fmt.Errorf("%w: the certificate's key is not RSA of at least %d bits", ErrUnsupported, minRSA)
	}
	if len(payload) == 0 || len(payload) > MaxPayload {
		return "", fmt.Errorf("%w: payload of %d bytes; 1 to %d", ErrTooLarge, len(payload), MaxPayload)
	}
	sum := sha256.Sum256(certificate.Raw)
	h := Header{
		Algorithm: algOAEP, Encryption: encGCM, Type: o.Type, Content: o.Content, KeySetURL: o.KeySetURL,
		KeyID: base64.RawURLEncoding.EncodeToString(sum[:]),
	}
	if h.Type == "" {
		h.Type = "JWT"
	}
	if h.Content == "" {
		h.Content = "JWT"
	}
	include := 0
	if o.IncludeCertificate {
		include = 1
	}
	if err := h.addCertificates([]*x509.Certificate{certificate}, include, o.Thumbprint); err != nil {
		return "", err
	}
	if !o.Plain {
		h.Zip = zipDEF
		var err error
		if payload, err = deflate(payload); err != nil {
			return "", err
		}
	}
	header, err := h.encode()
	if err != nil {
		return "", err
	}
	key, iv := make([]byte, keySize), make([]byte, ivSize)
	defer clear(key)
	rand.Read(key)
	rand.Read(iv)
	wrapped, err := rsa.EncryptOAEP(sha256.New(), rand.Reader, public, key, nil)
	if err != nil {
		return "", fmt.Errorf("%w: %w", ErrUnsupported, err)
	}
	aead, err := newGCM(key)
	if err != nil {
		return "", err
	}
	b64 := base64.RawURLEncoding
	first := b64.EncodeToString(header)
	sealed := aead.Seal(nil, iv, payload, []byte(first))
	end := len(sealed) - tagSize
	return strings.Join([]string{
		first, b64.EncodeToString(wrapped), b64.EncodeToString(iv), b64.EncodeToString(sealed[:end]), b64.EncodeToString(sealed[end:]),
	}, "."), nil
}

// Decrypt decrypts a token in the compact serialization. Errors are those of u, or wrap ErrFormat, ErrUnsupported, ErrTooLarge or
// ErrDecryption.
func Decrypt(ctx context.Context, u Unwrapper, token string) (payload []byte, h *Header, err error) {
	if len(token) > 2*MaxPayload {
		return nil, nil, fmt.Errorf("%w: token of %d bytes", ErrTooLarge, len(token))
	}
	segments := strings.SplitN(token, ".", 6)
	if len(segments) != 5 {
		return nil, nil, fmt.Errorf("%w: an encrypted token has five parts", ErrFormat)
	}
	var parts [5][]byte
	for i, s := range segments {
		if parts[i], err = decodeSegment(s); err != nil {
			return nil, nil, err
		}
	}
	if h, err = decodeHeader(parts[0]); err != nil {
		return nil, nil, err
	}
	wrapped, iv, ciphertext, tag := parts[1], parts[2], parts[3], parts[4]
	switch {
	case h.Algorithm != algOAEP || h.Encryption != encGCM:
		return nil, nil, fmt.Errorf("%w: %q with %q; only %s with %s", ErrUnsupported, h.Algorithm, h.Encryption, algOAEP, encGCM)
	case h.Zip != "" && h.Zip != zipDEF || h.Unencoded:
		return nil, nil, fmt.Errorf("%w: compression %q", ErrUnsupported, h.Zip)
	case len(iv) != ivSize || len(tag) != tagSize || len(wrapped) == 0 || len(wrapped) > 1024:
		return nil, nil, fmt.Errorf("%w: a part has the wrong length", ErrFormat)
	}
	key, err := u.Unwrap(ctx, h.recipient(), wrapped)
	if err != nil {
		return nil, nil, fmt.Errorf("unwrap the content key: %w", err)
	}
	defer clear(key)
	if len(key) != keySize {
		return nil, nil, ErrDecryption
	}
	aead, err := newGCM(key)
	if err != nil {
		return nil, nil, err
	}
	plaintext, err := aead.Open(nil, iv, append(ciphertext, tag...), []byte(segments[0]))
	if err != nil {
		return nil, nil, ErrDecryption
	}
	if h.Zip == zipDEF {
		compressed := plaintext
		plaintext, err = inflate(compressed)
		clear(compressed)
		if err != nil {
			return nil, nil, err
		}
	}
	return plaintext, h, nil
}

// recipient returns the thumbprint by which the header names the key.
func (h *Header) recipient() (thumbprint [32]byte) {
	if len(h.Thumbprint) == len(thumbprint) {
		copy(thumbprint[:], h.Thumbprint)
		return thumbprint
	}
	if sum, err := decodeSegment(h.KeyID); err == nil && len(sum) == len(thumbprint) {
		copy(thumbprint[:], sum)
	}
	return thumbprint
}

func sameThumbprint(c *x509.Certificate, thumbprint []byte) bool {
	sum := sha256.Sum256(c.Raw)
	return subtle.ConstantTimeCompare(sum[:], thumbprint) == 1
}

func newGCM(key []byte) (cipher.AEAD, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}

func deflate(b []byte) ([]byte, error) {
	var out bytes.Buffer
	w, err := flate.NewWriter(&out, flate.DefaultCompression)
	if err != nil {
		return nil, err
	}
	if _, err := w.Write(b); err != nil {
		return nil, err
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

// inflate decompresses what was authenticated. Who made it may still mean harm: what grows more than a hundredfold is refused.
func inflate(b []byte) ([]byte, error) {
	most := min(MaxPayload, minRoom+maxRatio*len(b))
	r := flate.NewReader(bytes.NewReader(b))
	defer r.Close()
	out, err := io.ReadAll(io.LimitReader(r, int64(most)+1))
	if len(out) > most {
		return nil, fmt.Errorf("%w: the payload grows beyond %d bytes", ErrTooLarge, most)
	}
	if err != nil {
		var corrupt flate.CorruptInputError
		if errors.As(err, &corrupt) || errors.Is(err, io.ErrUnexpectedEOF) {
			return nil, fmt.Errorf("%w: the payload is not compressed as the header says", ErrFormat)
		}
		return nil, err
	}
	return out, nil
}
