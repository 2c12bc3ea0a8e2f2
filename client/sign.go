package client

import (
	"context"
	"crypto"
	"crypto/rsa"
	"fmt"
	"io"
	"strings"

	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

var (
	_ crypto.Signer        = (*Key)(nil)
	_ crypto.MessageSigner = (*Key)(nil)
	_ crypto.Decrypter     = (*Key)(nil)
)

// Sign implements [crypto.Signer]. The timeout of the client bounds it; [Key.SignContext] takes a context. rand is not
// used, kmsd has its own.
//
// For RSA, opts is an *rsa.PSSOptions, with a salt as long as the hash, or a hash for PKCS #1 v1.5. For ECDSA it is a
// hash, and the signature is ASN.1 DER. For Ed25519 it is crypto.Hash(0), and digest is the message itself.
func (k *Key) Sign(rand io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	return k.SignContext(context.Background(), digest, opts)
}

// SignContext is Sign with a context.
func (k *Key) SignContext(ctx context.Context, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	scheme, hash, err := k.scheme(opts)
	if err != nil {
		return nil, err
	}
	if hash == 0 {
		return k.signEd25519(ctx, digest)
	}
	if len(digest) != hash.Size() {
		return nil, fmt.Errorf("%w: digest of %d bytes is not %v", ErrInvalid, len(digest), hash)
	}
	return k.sign(ctx, &proto.Sign{Key: k.pinned, Scheme: string(scheme), Digest: digest})
}

// SignMessage implements [crypto.MessageSigner]: it hashes msg in this process where the scheme of opts hashes first.
func (k *Key) SignMessage(rand io.Reader, msg []byte, opts crypto.SignerOpts) ([]byte, error) {
	_, hash, err := k.scheme(opts)
	if err != nil {
		return nil, err
	}
	if hash != 0 {
		h := hash.New()
		h.Write(msg)
		msg = h.Sum(nil)
	}
	return k.SignContext(context.Background(), msg, opts)
}

// SignReader signs everything r gives with the named scheme, or with the default of the key if scheme is empty. The data
// are hashed in this process; for Ed25519, which cannot sign a digest, more than 1 MiB is refused with [ErrTooLarge].
func (k *Key) SignReader(ctx context.Context, r io.Reader, scheme keyspec.Scheme) ([]byte, error) {
	p := &proto.Sign{Key: k.pinned, Scheme: string(scheme)}
	message, digest, err := k.digest(r, &p.Scheme)
	if err != nil {
		return nil, err
	}
	if digest == nil {
		return k.signEd25519(ctx, message)
	}
	p.Digest = digest
	return k.sign(ctx, p)
}

// VerifyReader verifies a signature over everything r gives, by any version of the key that may verify. The error is
// [ErrVerification] if it is wrong. compromised reports that the version is known to have been stolen since.
func (k *Key) VerifyReader(ctx context.Context, r io.Reader, signature []byte, scheme keyspec.Scheme) (compromised bool, err error) {
	p := &proto.Verify{Key: k.ref, Scheme: string(scheme), Signature: signature}
	if p.Data, p.Digest, err = k.digest(r, &p.Scheme); err != nil {
		return false, err
	}
	var reply proto.VerifyReply
	err = k.client.Call(ctx, proto.OpVerify, p, &reply, nil)
	return reply.Compromised, err
}

// digest reads r and returns the digest of the scheme, or the message where the scheme takes one. An empty scheme is
// replaced by the default of the key.
func (k *Key) digest(r io.Reader, scheme *string) (message, digest []byte, err error) {
	if *scheme == "" {
		if *scheme = string(k.Algorithm().SignatureScheme()); *scheme == "" {
			return nil, nil, k.unsupported("sign")
		}
	}
	hash := keyspec.Scheme(*scheme).Hash()
	if hash == 0 {
		message, err = io.ReadAll(io.LimitReader(r, proto.MaxMessage+1))
		if err == nil && len(message) > proto.MaxMessage {
			err = errMessageTooLarge
		}
		return message, nil, err
	}
	h := hash.New()
	if _, err := io.Copy(h, r); err != nil {
		return nil, nil, err
	}
	return nil, h.Sum(nil), nil
}

func (k *Key) signEd25519(ctx context.Context, message []byte) ([]byte, error) {
	if len(message) > proto.MaxMessage {
		return nil, errMessageTooLarge
	}
	return k.sign(ctx, &proto.Sign{Key: k.pinned, Scheme: string(keyspec.PureEd25519), Data: message})
}

// errMessageTooLarge says why, and what to do: Ed25519 reads the message twice (RFC 8032 section 5.1.6), so kmsd would
// have to keep it whole.
var errMessageTooLarge = fmt.Errorf("%w: Ed25519 signs the message itself, at most %d bytes; sign a digest of it, or use an ECDSA or RSA key",
	ErrTooLarge, proto.MaxMessage)

func (k *Key) sign(ctx context.Context, p *proto.Sign) ([]byte, error) {
	var reply proto.SignReply
	if err := k.client.Call(ctx, proto.OpSign, p, &reply, nil); err != nil {
		return nil, err
	}
	return reply.Signature, nil
}

// scheme translates opts. Hash 0 means that the scheme takes the message.
func (k *Key) scheme(opts crypto.SignerOpts) (keyspec.Scheme, crypto.Hash, error) {
	if opts == nil {
		opts = crypto.Hash(0)
	}
	hash := opts.HashFunc()
	name, known := map[crypto.Hash]string{crypto.SHA256: "sha256", crypto.SHA384: "sha384", crypto.SHA512: "sha512"}[hash]
	algorithm := string(k.Algorithm())
	switch {
	case k.Algorithm() == keyspec.Ed25519:
		if hash != 0 {
			return "", 0, fmt.Errorf("%w: Ed25519 signs messages, not digests: use crypto.Hash(0)", ErrUnsupported)
		}
		return keyspec.PureEd25519, 0, nil
	case !known:
		return "", 0, fmt.Errorf("%w: hash %v; use SHA-256, SHA-384 or SHA-512", ErrUnsupported, hash)
	case strings.HasPrefix(algorithm, "ecdsa-"):
		return keyspec.Scheme("ecdsa-" + name), hash, nil
	case strings.HasPrefix(algorithm, "rsa-"):
		pss, ok := opts.(*rsa.PSSOptions)
		if !ok {
			return keyspec.Scheme("rsa-pkcs1-" + name), hash, nil
		}
		// kmsd's salt is as long as the hash, which is also a right answer to "as long as you like".
		if n := pss.SaltLength; n != rsa.PSSSaltLengthAuto && n != rsa.PSSSaltLengthEqualsHash && n != hash.Size() {
			return "", 0, fmt.Errorf("%w: PSS salt of %d bytes; use rsa.PSSSaltLengthEqualsHash", ErrUnsupported, n)
		}
		return keyspec.Scheme("rsa-pss-" + name), hash, nil
	}
	return "", 0, k.unsupported("sign")
}

// Decrypt implements [crypto.Decrypter] for RSA keys. opts is an *rsa.OAEPOptions with SHA-256 for both hashes; there is
// no PKCS #1 v1.5 decryption. Every failure to decrypt is [ErrDecryption].
func (k *Key) Decrypt(rand io.Reader, ciphertext []byte, opts crypto.DecrypterOpts) ([]byte, error) {
	oaep, ok := opts.(*rsa.OAEPOptions)
	if !ok || oaep.Hash != crypto.SHA256 || oaep.MGFHash != 0 && oaep.MGFHash != crypto.SHA256 {
		return nil, fmt.Errorf("%w: only RSA-OAEP with SHA-256: pass &rsa.OAEPOptions{Hash: crypto.SHA256}", ErrUnsupported)
	}
	return k.DecryptOAEP(context.Background(), ciphertext, oaep.Label)
}

// DecryptOAEP decrypts an RSAES-OAEP ciphertext (RFC 8017 section 7.1, SHA-256 for both hashes). Of a key that was looked
// up without a version kmsd tries every version that may decrypt.
func (k *Key) DecryptOAEP(ctx context.Context, ciphertext, label []byte) ([]byte, error) {
	if _, ok := k.public.(*rsa.PublicKey); !ok {
		return nil, k.unsupported("RSA decryption")
	}
	var reply proto.DecryptReply
	err := k.client.Call(ctx, proto.OpDecrypt, &proto.Decrypt{Key: k.ref, Ciphertext: ciphertext, Label: label}, &reply, nil)
	if err != nil {
		return nil, err
	}
	return reply.Data, nil
}

// Unwrap decrypts the wrapped key of a registration packet; a Key is a packet.Unwrapper by it. The thumbprint is not
// needed: the versions of the key are tried, and a packet for another key is one that does not decrypt.
func (k *Key) Unwrap(ctx context.Context, thumbprint [32]byte, wrapped []byte) ([]byte, error) {
	return k.DecryptOAEP(ctx, wrapped, nil)
}
