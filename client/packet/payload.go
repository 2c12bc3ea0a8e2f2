package packet

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"slices"
)

// Sizes in bytes.
const (
	keySize     = 32 // AES-256
	tagSize     = 16
	longIVSize  = 16 // of the payload with additional data and without salt
	maxSaltSize = 256
)

// Options says which payload is made or expected.
//
//	Salt  AAD
//	-     -    "VER_R2" thumbprint wrapped splitter A(32) ciphertext tag     A is the additional data, its first 12 bytes the nonce
//	-     set  thumbprint wrapped splitter ciphertext tag nonce(16)
//	set   any  thumbprint wrapped splitter ciphertext tag                     the nonce is the salt, which is not in the payload
//
// A payload of MOSIP 1.1.3 is one of the last two without the thumbprint. It is read, never written.
type Options struct {
	Salt []byte // at most 256 bytes; 12 when it is the nonce of a packet
	AAD  []byte
}

// EncryptPayload encrypts plaintext for the holder of certificate under a fresh AES-256 key. An empty plaintext is refused,
// as MOSIP refuses it.
//
// The key is used once, so a salt that comes again does no harm.
func EncryptPayload(certificate *x509.Certificate, plaintext []byte, o Options) ([]byte, error) {
	if len(plaintext) == 0 {
		return nil, errEmpty
	}
	if len(plaintext) > MaxSize {
		return nil, fmt.Errorf("%w: %d bytes, at most %d", ErrTooLarge, len(plaintext), MaxSize)
	}
	f, err := newFrame(certificate, o)
	if err != nil {
		return nil, err
	}
	defer clear(f.key)
	aead, err := newGCM(f.key, len(f.nonce))
	if err != nil {
		return nil, err
	}
	payload := make([]byte, 0, len(f.before)+len(plaintext)+tagSize+len(f.after))
	payload = append(payload, f.before...)
	payload = aead.Seal(payload, f.nonce, plaintext, f.aad)
	return append(payload, f.after...), nil
}

var errEmpty = fmt.Errorf("%w: empty plaintext", ErrFormat)

// frame is a payload that is being made, without its ciphertext.
type frame struct {
	key           []byte
	nonce, aad    []byte
	before, after []byte // what stands around the ciphertext and its tag
}

// newFrame makes a fresh key for the holder of certificate and what stands around the ciphertext.
func newFrame(certificate *x509.Certificate, o Options) (*frame, error) {
	to, err := newRecipient(certificate)
	if err != nil {
		return nil, err
	}
	if len(o.Salt) > maxSaltSize {
		return nil, fmt.Errorf("%w: salt of %d bytes, at most %d", ErrFormat, len(o.Salt), maxSaltSize)
	}
	key, wrapped, err := to.newKey()
	if err != nil {
		return nil, err
	}
	fresh := make([]byte, aadSize)
	rand.Read(fresh)
	f := &frame{key: key, nonce: o.Salt, aad: o.AAD}
	var first, last []byte
	switch {
	case len(o.Salt) > 0:
	case len(o.AAD) > 0:
		f.nonce = fresh[:longIVSize]
		f.after = f.nonce
	default:
		f.nonce, f.aad = fresh[:nonceSize], fresh
		first, last = versionR2, fresh
	}
	f.before = slices.Concat(first, to.thumbprint[:], wrapped, splitter, last)
	return f, nil
}

// DecryptPayload decrypts a payload; o must be what it was made with. A VER_R2 payload carries its own additional data,
// so o.AAD is then not looked at, as in MOSIP. Errors are those of u, or wrap [ErrFormat] or [ErrDecryption].
func DecryptPayload(ctx context.Context, u Unwrapper, payload []byte, o Options) ([]byte, error) {
	if len(payload) > MaxSize+1024 {
		return nil, fmt.Errorf("%w: %d bytes", ErrTooLarge, len(payload))
	}
	p, err := split(payload)
	if err != nil {
		return nil, err
	}
	before, after, err := p.around(o)
	if err != nil {
		return nil, err
	}
	if len(p.body) <= before+after+tagSize {
		return nil, errShort(int64(len(p.body)))
	}
	nonce, aad := o.Salt, o.AAD
	switch {
	case before > 0:
		nonce, aad = p.body[:nonceSize], p.body[:aadSize]
	case after > 0:
		nonce = p.body[len(p.body)-after:]
	}
	return p.open(ctx, u, nil, p.body[before:len(p.body)-after], nonce, aad)
}

// around returns how many bytes of the body of a payload stand before and after its ciphertext: the additional data of a VER_R2
// payload, or the nonce of one with neither those nor a salt.
func (p *parts) around(o Options) (before, after int, err error) {
	switch {
	case len(o.Salt) > maxSaltSize:
		return 0, 0, fmt.Errorf("%w: salt of %d bytes, at most %d", ErrFormat, len(o.Salt), maxSaltSize)
	case len(o.Salt) > 0 && p.version2:
		return 0, 0, fmt.Errorf("%w: a VER_R2 payload has no salt", ErrFormat)
	case len(o.Salt) > 0:
		return 0, 0, nil
	case p.version2:
		return aadSize, 0, nil
	}
	return 0, longIVSize, nil
}

func errShort(n int64) error {
	return fmt.Errorf("%w: %d bytes after the splitter are too few", ErrFormat, n)
}

// recipient is the holder of a certificate.
type recipient struct {
	thumbprint [32]byte
	key        *rsa.PublicKey
}

func newRecipient(c *x509.Certificate) (*recipient, error) {
	key, ok := c.PublicKey.(*rsa.PublicKey)
	if !ok {
		return nil, fmt.Errorf("%w: its key is not RSA", ErrCertificate)
	}
	switch key.Size() {
	case 256, 384, 512:
	default:
		return nil, fmt.Errorf("%w: RSA of %d bits; 2048, 3072 or 4096", ErrCertificate, key.N.BitLen())
	}
	// The certificate of a module key is for signatures; MOSIP refuses it with KER-CRY-011.
	if c.KeyUsage != 0 && c.KeyUsage&(x509.KeyUsageKeyEncipherment|x509.KeyUsageDataEncipherment) == 0 {
		return nil, fmt.Errorf("%w: its key usage does not allow it", ErrCertificate)
	}
	return &recipient{thumbprint: Thumbprint(c), key: key}, nil
}

// Thumbprint returns the SHA-256 of the certificate in DER, by which a payload names it.
func Thumbprint(c *x509.Certificate) [32]byte { return sha256.Sum256(c.Raw) }

// newKey returns a fresh key, and the same wrapped.
func (r *recipient) newKey() (key, wrapped []byte, err error) {
	key = make([]byte, keySize)
	rand.Read(key)
	wrapped, err = r.wrap(key)
	return key, wrapped, err
}

func (r *recipient) wrap(key []byte) ([]byte, error) {
	wrapped, err := rsa.EncryptOAEP(sha256.New(), rand.Reader, r.key, key, nil)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrCertificate, err)
	}
	return wrapped, nil
}

func newGCM(key []byte, nonceSize int) (cipher.AEAD, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCMWithNonceSize(block, nonceSize)
}
