package packet

import (
	"context"
	"crypto"
	"crypto/cipher"
	"crypto/rand"
	"crypto/rsa"
	_ "crypto/sha1" // for MGF1 of Android
	"crypto/sha256"
	"fmt"
)

// Padding says how the key of a client's data is wrapped by RSA-OAEP; the hash is always SHA-256. The kind of the client decides,
// nothing in the data says which it was.
type Padding string

// The paddings of MOSIP's clients.
const (
	PaddingFile    Padding = "file"    // MGF1 with SHA-256, empty label: keys in files
	PaddingTPM     Padding = "tpm"     // MGF1 with SHA-256, a label of one zero byte, which TSS.Java adds
	PaddingAndroid Padding = "android" // MGF1 with SHA-1, empty label: what the keystore of Android can do
)

// Options returns the padding as crypto/rsa has it.
func (p Padding) Options() (*rsa.OAEPOptions, error) {
	switch p {
	case PaddingFile:
		return &rsa.OAEPOptions{Hash: crypto.SHA256, MGFHash: crypto.SHA256}, nil
	case PaddingTPM:
		return &rsa.OAEPOptions{Hash: crypto.SHA256, MGFHash: crypto.SHA256, Label: []byte{0}}, nil
	case PaddingAndroid:
		return &rsa.OAEPOptions{Hash: crypto.SHA256, MGFHash: crypto.SHA1}, nil
	}
	return nil, fmt.Errorf("%w: padding %q", ErrFormat, string(p))
}

// ClientKey decrypts one RSA-OAEP block with the key of a machine.
type ClientKey interface {
	DecryptBlock(ctx context.Context, p Padding, block []byte) ([]byte, error)
}

// Sizes in bytes of what stands in front of the ciphertext of a client's data: the layout of today, and that of MOSIP 1.1.4.4.
const (
	clientBlock  = 256
	oldNonceSize = longIVSize
	oldAADSize   = 12
)

// EncryptForClient encrypts plaintext for the key of a registration machine, as the server does with what a machine has to get:
//
//	wrapped key(256) nonce(12) additional data(32) ciphertext tag(16)
func EncryptForClient(public *rsa.PublicKey, p Padding, plaintext []byte) ([]byte, error) {
	if len(plaintext) == 0 {
		return nil, fmt.Errorf("%w: empty plaintext", ErrFormat)
	}
	if len(plaintext) > MaxSize {
		return nil, fmt.Errorf("%w: %d bytes, at most %d", ErrTooLarge, len(plaintext), MaxSize)
	}
	key := make([]byte, keySize)
	defer clear(key)
	rand.Read(key)
	wrapped, err := EncryptClientBlock(public, p, key)
	if err != nil {
		return nil, err
	}
	const fresh = nonceSize + aadSize
	out := make([]byte, clientBlock+fresh, clientBlock+fresh+len(plaintext)+tagSize)
	copy(out, wrapped)
	rand.Read(out[clientBlock:])
	aead, err := newGCM(key, nonceSize)
	if err != nil {
		return nil, err
	}
	return aead.Seal(out, out[clientBlock:clientBlock+nonceSize], plaintext, out[clientBlock+nonceSize:]), nil
}

// DecryptForClient is the way back. What does not decrypt in today's layout is tried in that of MOSIP 1.1.4.4, which has a
// nonce of 16 and additional data of 12 bytes.
func DecryptForClient(ctx context.Context, k ClientKey, p Padding, sealed []byte) ([]byte, error) {
	if len(sealed) > MaxSize+1024 {
		return nil, fmt.Errorf("%w: %d bytes", ErrTooLarge, len(sealed))
	}
	if len(sealed) <= clientBlock+oldNonceSize+oldAADSize+tagSize {
		return nil, fmt.Errorf("%w: %d bytes are too few for data of a client", ErrFormat, len(sealed))
	}
	key, err := k.DecryptBlock(ctx, p, sealed[:clientBlock])
	if err != nil {
		return nil, fmt.Errorf("unwrap the key of a client's data: %w", err)
	}
	defer clear(key)
	if len(key) != keySize {
		return nil, ErrDecryption
	}
	for _, layout := range []struct{ nonce, aad int }{{nonceSize, aadSize}, {oldNonceSize, oldAADSize}} {
		body := sealed[clientBlock:]
		if len(body) <= layout.nonce+layout.aad+tagSize {
			continue
		}
		var aead cipher.AEAD
		if aead, err = newGCM(key, layout.nonce); err != nil {
			return nil, err
		}
		nonce, aad := body[:layout.nonce], body[layout.nonce:layout.nonce+layout.aad]
		if plaintext, err := aead.Open(nil, nonce, body[layout.nonce+layout.aad:], aad); err == nil {
			return plaintext, nil
		}
	}
	return nil, ErrDecryption
}

// EncryptClientBlock encrypts at most 190 bytes in one RSA-OAEP block: the key of a client's data, or the content of the file
// db.conf that opens a registration machine's database.
func EncryptClientBlock(public *rsa.PublicKey, p Padding, plaintext []byte) ([]byte, error) {
	if public.Size() != clientBlock {
		return nil, fmt.Errorf("%w: a machine's key is RSA-2048, not %d bits", ErrCertificate, public.N.BitLen())
	}
	if len(plaintext) > clientBlock-2*sha256.Size-2 {
		return nil, fmt.Errorf("%w: %d bytes in one RSA block, at most %d", ErrTooLarge, len(plaintext), clientBlock-2*sha256.Size-2)
	}
	options, err := p.Options()
	if err != nil {
		return nil, err
	}
	return rsa.EncryptOAEPWithOptions(rand.Reader, public, plaintext, options)
}
