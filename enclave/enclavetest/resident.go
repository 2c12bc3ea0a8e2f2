package enclavetest

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"slices"
	"sync"
	"time"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// Resident is a Memory that holds resident keys too: ECDSA and ECDH over P-256, and AES-256-GCM. With a PIN it wants a Login first. It
// implements enclave.Resident and enclave.Session.
type Resident struct {
	*Memory
	Parallel int           // what MaxParallel answers; 0 is 1
	Wait     time.Duration // what Do takes

	mu     sync.Mutex
	login  bool
	active int
	most   int
}

// NewResident returns a healthy fake.
func NewResident(pin string) *Resident { return &Resident{Memory: NewMemory(pin)} }

// Most is how many calls of Do were worked on at once, at most.
func (r *Resident) Most() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.most
}

// Logout ends the login, as pulling a token does.
func (r *Resident) Logout() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.login = false
}

// Login compares the PIN.
func (r *Resident) Login(ctx context.Context, a enclave.Auth) error {
	if _, _, err := r.begin(ctx); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case len(r.pin) == 0:
		return &enclave.Error{Kind: enclave.ErrUnsupported, Detail: "there is no PIN"}
	case r.login:
		return nil
	case len(a.Secret) == 0:
		return &enclave.Error{Kind: enclave.ErrLocked, Remedy: "give the PIN"}
	case subtle.ConstantTimeCompare(a.Secret, r.pin) != 1:
		return &enclave.Error{Kind: enclave.ErrAuth, Remedy: "give another PIN"}
	}
	r.login = true
	return nil
}

func (r *Resident) enter(ctx context.Context) ([32]byte, error) {
	f, key, err := r.begin(ctx)
	if err == nil {
		err = f.Resident
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if err == nil && len(r.pin) > 0 && !r.login {
		err = &enclave.Error{Kind: enclave.ErrLocked, Remedy: "give the PIN"}
	}
	return key, err
}

// residentKind is the kind of the blobs of resident keys; their body is the name of the algorithm, by its length, and the sealed key.
const residentKind = "memory key"

// Generate makes a key and seals it into its blob.
func (r *Resident) Generate(ctx context.Context, s enclave.Spec) (enclave.Blob, []byte, error) {
	device, err := r.enter(ctx)
	if err != nil {
		return nil, nil, err
	}
	if !slices.Contains([]keyspec.Algorithm{keyspec.ECDSAP256, keyspec.ECDHP256, keyspec.AES256GCM}, s.Algorithm) {
		return nil, nil, &enclave.Error{Kind: enclave.ErrUnsupported, Detail: string(s.Algorithm)}
	}
	secret := make([]byte, 32)
	rand.Read(secret)
	var spki []byte
	if s.Algorithm != keyspec.AES256GCM {
		key, err := ecdh.P256().NewPrivateKey(secret) // all but one of 2^32 are in range
		if err != nil {
			return nil, nil, &enclave.Error{Kind: enclave.ErrBusy, Cause: err}
		}
		if spki, err = x509.MarshalPKIXPublicKey(key.PublicKey()); err != nil {
			return nil, nil, &enclave.Error{Kind: enclave.ErrMisconfigured, Cause: err}
		}
	}
	sealed, err := enclave.Seal(device[:], "memory key "+string(s.Algorithm), secret, s.AAD)
	if err != nil {
		return nil, nil, err
	}
	b, err := enclave.EncodeBlob(residentKind, 1, append([]byte(string(byte(len(s.Algorithm)))+string(s.Algorithm)), sealed...))
	return b, spki, err
}

// Do uses a key.
func (r *Resident) Do(ctx context.Context, b enclave.Blob, op enclave.Op, dst []byte) ([]byte, error) {
	r.mu.Lock()
	r.active++
	r.most = max(r.most, r.active)
	r.mu.Unlock()
	defer func() {
		r.mu.Lock()
		r.active--
		r.mu.Unlock()
	}()
	time.Sleep(r.Wait)
	device, err := r.enter(ctx)
	if err != nil {
		return nil, err
	}
	_, body, err := enclave.DecodeBlob(residentKind, b)
	if err != nil {
		return nil, err
	}
	algorithm := keyspec.Algorithm(body[1 : 1+body[0]])
	secret := make([]byte, 32)
	if err := enclave.Open(device[:], "memory key "+string(algorithm), body[1+body[0]:], op.Bound, secret); err != nil {
		return nil, &enclave.Error{Kind: enclave.ErrReplaced, Detail: "another device, or another record"}
	}
	if r.forgot(b) {
		return nil, &enclave.Error{Kind: enclave.ErrReplaced, Detail: "destroyed"}
	}
	switch {
	case algorithm == keyspec.ECDSAP256 && op.Usage == keyspec.Sign:
		key, err := ecdsa.ParseRawPrivateKey(elliptic.P256(), secret)
		if err != nil {
			return nil, &enclave.Error{Kind: enclave.ErrCorrupt, Cause: err}
		}
		digest := op.Input
		if !op.Digest {
			sum := sha256.Sum256(op.Input)
			digest = sum[:]
		}
		signature, err := ecdsa.SignASN1(rand.Reader, key, digest)
		return append(dst[:0], signature...), err
	case algorithm == keyspec.ECDHP256 && op.Usage == keyspec.Agree:
		key, err := ecdh.P256().NewPrivateKey(secret)
		if err != nil {
			return nil, &enclave.Error{Kind: enclave.ErrCorrupt, Cause: err}
		}
		peer, err := x509.ParsePKIXPublicKey(op.Input)
		if err != nil {
			return nil, &enclave.Error{Kind: enclave.ErrUnsupported, Cause: err}
		}
		public, ok := peer.(*ecdsa.PublicKey)
		if !ok {
			return nil, &enclave.Error{Kind: enclave.ErrUnsupported, Detail: "peer of another kind"}
		}
		point, err := public.ECDH()
		if err != nil {
			return nil, &enclave.Error{Kind: enclave.ErrUnsupported, Cause: err}
		}
		shared, err := key.ECDH(point)
		if err != nil {
			return nil, &enclave.Error{Kind: enclave.ErrUnsupported, Cause: err}
		}
		return append(dst[:0], shared...), nil
	case algorithm == keyspec.AES256GCM && (op.Usage == keyspec.Encrypt || op.Usage == keyspec.Wrap):
		aead, err := gcm(secret, op.Nonce)
		if err != nil {
			return nil, err
		}
		return aead.Seal(dst[:0], op.Nonce, op.Input, op.AAD), nil
	case algorithm == keyspec.AES256GCM && (op.Usage == keyspec.Decrypt || op.Usage == keyspec.Unwrap):
		aead, err := gcm(secret, op.Nonce)
		if err != nil {
			return nil, err
		}
		plain, err := aead.Open(dst[:0], op.Nonce, op.Input, op.AAD)
		if err != nil {
			return nil, &enclave.Error{Kind: enclave.ErrDecryption}
		}
		return plain, nil
	}
	return nil, &enclave.Error{Kind: enclave.ErrUnsupported, Detail: string(op.Usage) + " with " + string(algorithm)}
}

func gcm(key, nonce []byte) (cipher.AEAD, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		return nil, err
	}
	if len(nonce) != aead.NonceSize() {
		return nil, &enclave.Error{Kind: enclave.ErrUnsupported, Detail: "nonce"}
	}
	return aead, nil
}

// Destroy makes the blob useless.
func (r *Resident) Destroy(ctx context.Context, b enclave.Blob) error {
	if _, err := r.enter(ctx); err != nil {
		return err
	}
	if _, _, err := enclave.DecodeBlob(residentKind, b); err != nil {
		return err
	}
	r.forget(b)
	return nil
}

// Mechanisms lists what Do does.
func (r *Resident) Mechanisms(ctx context.Context) ([]enclave.Mechanism, error) {
	if _, _, err := r.begin(ctx); err != nil {
		return nil, err
	}
	return []enclave.Mechanism{
		{Algorithm: keyspec.ECDSAP256, Usage: keyspec.Sign, Schemes: []keyspec.Scheme{keyspec.ECDSASHA256}},
		{Algorithm: keyspec.ECDHP256, Usage: keyspec.Agree},
		{Algorithm: keyspec.AES256GCM, Usage: keyspec.Encrypt},
		{Algorithm: keyspec.AES256GCM, Usage: keyspec.Decrypt},
		{Algorithm: keyspec.AES256GCM, Usage: keyspec.Wrap},
		{Algorithm: keyspec.AES256GCM, Usage: keyspec.Unwrap},
	}, nil
}

// MaxParallel is Parallel.
func (r *Resident) MaxParallel() int { return max(r.Parallel, 1) }
