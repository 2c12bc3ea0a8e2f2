package pkcs11_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"math/big"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/client/pkix"
	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/enclave/helper"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// key is a resident key.
type key struct {
	algorithm keyspec.Algorithm
	blob      enclave.Blob
	public    crypto.PublicKey
}

var bound = []byte("the record of a key")

func newSpec(a keyspec.Algorithm, usages ...keyspec.Usage) enclave.Spec {
	s := enclave.Spec{Algorithm: a, Usages: usages, AAD: bound}
	rand.Read(s.ID[:])
	return s
}

func generate(t *testing.T, e *helper.Resident, a keyspec.Algorithm, usages ...keyspec.Usage) key {
	t.Helper()
	blob, spki, err := e.Generate(t.Context(), newSpec(a, usages...))
	if err != nil {
		t.Fatalf("generate %s: %v", a, err)
	}
	k := key{algorithm: a, blob: blob}
	if a.Asymmetric() {
		if k.public, err = pkix.ParsePublicKey(spki); err != nil {
			t.Fatalf("public key of %s: %v", a, err)
		}
	} else if spki != nil {
		t.Fatalf("%s has a public key", a)
	}
	return k
}

func (k key) do(ctx context.Context, e *helper.Resident, op enclave.Op) ([]byte, error) {
	op.Bound = bound
	return e.Do(ctx, k.blob, op, nil)
}

// use puts the key to a use and checks the result with what Go's own library makes of it.
func (k key) use(ctx context.Context, e *helper.Resident, u keyspec.Usage, s keyspec.Scheme) error {
	message := []byte("what is signed, encrypted or authenticated")
	switch u {
	case keyspec.Sign:
		signature, err := k.do(ctx, e, enclave.Op{Usage: u, Scheme: s, Input: message})
		if err == nil && !verifies(k.public, s, message, signature) {
			err = errors.New("the signature does not verify")
		}
		if err != nil || s == keyspec.PureEd25519 {
			return err
		}
		h := s.Hash().New()
		h.Write(message)
		signature, err = k.do(ctx, e, enclave.Op{Usage: u, Scheme: s, Input: h.Sum(nil), Digest: true})
		if err == nil && !verifies(k.public, s, message, signature) {
			err = errors.New("the signature of the digest does not verify")
		}
		return err
	case keyspec.Agree:
		mine, err := k.public.(*ecdsa.PublicKey).ECDH()
		if err != nil {
			return err
		}
		peer, err := mine.Curve().GenerateKey(rand.Reader)
		if err != nil {
			return err
		}
		spki, err := x509.MarshalPKIXPublicKey(peer.PublicKey())
		if err != nil {
			return err
		}
		want, err := peer.ECDH(mine)
		if err != nil {
			return err
		}
		return same(want)(k.do(ctx, e, enclave.Op{Usage: u, Input: spki}))
	case keyspec.MAC:
		first, err := k.do(ctx, e, enclave.Op{Usage: u, Input: message})
		if err != nil {
			return err
		}
		other, err := k.do(ctx, e, enclave.Op{Usage: u, Input: message[1:]})
		if err != nil || bytes.Equal(first, other) || !strings.HasSuffix(string(k.algorithm), map[int]string{32: "256", 48: "384", 64: "512"}[len(first)]) {
			return errors.Join(err, errors.New("not a MAC"))
		}
		return same(first)(k.do(ctx, e, enclave.Op{Usage: u, Input: message}))
	case keyspec.Decrypt:
		if public, ok := k.public.(*rsa.PublicKey); ok {
			for _, label := range [][]byte{nil, []byte("label"), {0, 1, 0}} {
				sealed, err := rsa.EncryptOAEP(sha256.New(), rand.Reader, public, message, label)
				if err != nil {
					return err
				}
				if err := same(message)(k.do(ctx, e, enclave.Op{Usage: u, Scheme: s, Input: sealed, AAD: label})); err != nil {
					return err
				}
				if _, err := k.do(ctx, e, enclave.Op{Usage: u, Scheme: s, Input: sealed, AAD: append(label, 'x')}); !errors.Is(err, enclave.ErrDecryption) {
					return errors.Join(errors.New("another label decrypts"), err)
				}
			}
			return nil
		}
		fallthrough
	case keyspec.Encrypt:
		nonce := make([]byte, 12)
		rand.Read(nonce)
		for _, aad := range [][]byte{nil, []byte("associated")} {
			sealed, err := k.do(ctx, e, enclave.Op{Usage: keyspec.Encrypt, Input: message, Nonce: nonce, AAD: aad})
			if err != nil || len(sealed) != len(message)+16 {
				return errors.Join(err, errors.New("encrypt"))
			}
			op := enclave.Op{Usage: keyspec.Decrypt, Input: sealed, Nonce: nonce, AAD: aad}
			if err := same(message)(k.do(ctx, e, op)); err != nil {
				return err
			}
			op.AAD = []byte("other")
			if _, err := k.do(ctx, e, op); !errors.Is(err, enclave.ErrDecryption) {
				return errors.Join(errors.New("other associated data decrypts"), err)
			}
		}
		return nil
	}
	return errors.New("no test for " + string(u))
}

// same makes an error of a result that is not the one that was wanted.
func same(want []byte) func([]byte, error) error {
	return func(got []byte, err error) error {
		if err == nil && !bytes.Equal(got, want) {
			err = errors.New("another result")
		}
		return err
	}
}

func verifies(public crypto.PublicKey, s keyspec.Scheme, message, signature []byte) bool {
	if k, ok := public.(ed25519.PublicKey); ok {
		return ed25519.Verify(k, message, signature)
	}
	h := s.Hash().New()
	h.Write(message)
	switch k := public.(type) {
	case *ecdsa.PublicKey:
		return ecdsa.VerifyASN1(k, h.Sum(nil), signature)
	case *rsa.PublicKey:
		if strings.Contains(string(s), "pss") {
			return rsa.VerifyPSS(k, s.Hash(), h.Sum(nil), signature, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash}) == nil
		}
		return rsa.VerifyPKCS1v15(k, s.Hash(), h.Sum(nil), signature) == nil
	}
	return false
}

// Everything that the token says it can do, it can; and SoftHSM can do everything there is a row for.
func TestEveryMechanism(t *testing.T) {
	h := newSoftHSM(t)
	e := h.open(t, h.spec())
	list, err := e.Mechanisms(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	usages := map[keyspec.Algorithm][]keyspec.Usage{}
	for _, m := range list {
		usages[m.Algorithm] = append(usages[m.Algorithm], m.Usage)
	}
	for _, a := range []keyspec.Algorithm{keyspec.RSA2048, keyspec.RSA3072, keyspec.RSA4096, keyspec.ECDSAP256, keyspec.ECDSAP384, keyspec.ECDSAP521, keyspec.ECDSASecp256k1, keyspec.Ed25519,
		keyspec.ECDHP256, keyspec.ECDHP384, keyspec.ECDHP521, keyspec.AES128GCM, keyspec.AES256GCM, keyspec.HMACSHA256, keyspec.HMACSHA384, keyspec.HMACSHA512} {
		if len(usages[a]) == 0 {
			t.Errorf("the token does not say that it can do %s", a)
		}
	}
	if e.MaxParallel() < 2 {
		t.Errorf("%d operations at once", e.MaxParallel())
	}
	for a, all := range usages {
		t.Run(string(a), func(t *testing.T) {
			if testing.Short() && (a == keyspec.RSA3072 || a == keyspec.RSA4096) {
				return // a token takes seconds to make one
			}
			k := generate(t, e, a, all...)
			other := h.open(t, h.spec())
			for _, m := range list {
				if m.Algorithm != a {
					continue
				}
				schemes := m.Schemes
				if len(schemes) == 0 {
					schemes = []keyspec.Scheme{""}
				}
				for _, s := range schemes {
					if err := k.use(t.Context(), e, m.Usage, s); err != nil {
						t.Errorf("%s %s: %v", m.Usage, s, err)
					}
					if err := k.use(t.Context(), other, m.Usage, s); err != nil {
						t.Errorf("%s %s in another process: %v", m.Usage, s, err)
					}
				}
			}
			if _, err := e.Do(t.Context(), k.blob, enclave.Op{Usage: all[0], Input: []byte("x"), Bound: []byte("another record")}, nil); !errors.Is(err, enclave.ErrCorrupt) {
				t.Errorf("in another record: %v", err)
			}
			for range 2 {
				if err := e.Destroy(t.Context(), k.blob); err != nil {
					t.Errorf("destroy: %v", err)
				}
			}
			for name, d := range map[string]*helper.Resident{"": e, " in another process": other} {
				if err := k.use(t.Context(), d, all[0], ""); !errors.Is(err, enclave.ErrReplaced) {
					t.Errorf("use after destruction%s: %v", name, err)
				}
			}
		})
	}
	if n := h.Objects(t); n != 0 && !testing.Short() {
		t.Errorf("%d objects are left on the token", n)
	}
}

func TestKeysDoOnlyWhatTheyMay(t *testing.T) {
	h := newSoftHSM(t)
	e := h.open(t, h.spec())
	signer, decrypter := generate(t, e, keyspec.RSA2048, keyspec.Sign), generate(t, e, keyspec.RSA2048, keyspec.Decrypt)
	sealed, err := rsa.EncryptOAEP(sha256.New(), rand.Reader, signer.public.(*rsa.PublicKey), []byte("x"), nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := signer.do(t.Context(), e, enclave.Op{Usage: keyspec.Decrypt, Input: sealed}); !errors.Is(err, enclave.ErrUnsupported) {
		t.Errorf("a key that signs decrypts: %v", err)
	}
	if _, err := decrypter.do(t.Context(), e, enclave.Op{Usage: keyspec.Sign, Input: []byte("x")}); !errors.Is(err, enclave.ErrUnsupported) {
		t.Errorf("a key that decrypts signs: %v", err)
	}
	encrypter := generate(t, e, keyspec.AES256GCM, keyspec.Encrypt)
	out, err := encrypter.do(t.Context(), e, enclave.Op{Usage: keyspec.Encrypt, Nonce: make([]byte, 12), Input: []byte("x")})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := encrypter.do(t.Context(), e, enclave.Op{Usage: keyspec.Decrypt, Nonce: make([]byte, 12), Input: out}); !errors.Is(err, enclave.ErrUnsupported) {
		t.Errorf("a key that encrypts decrypts: %v", err)
	}
	// The default of crypto11 is 16; Go's GCM, and everybody's, wants 12.
	for _, n := range []int{0, 8, 11, 13, 16} {
		if _, err := encrypter.do(t.Context(), e, enclave.Op{Usage: keyspec.Encrypt, Nonce: make([]byte, n), Input: []byte("x")}); !errors.Is(err, enclave.ErrUnsupported) {
			t.Errorf("nonce of %d bytes: %v", n, err)
		}
	}
	for _, s := range []enclave.Spec{newSpec(keyspec.X25519, keyspec.Agree), newSpec(keyspec.ECDSAP256, keyspec.Agree), newSpec(keyspec.ECDHP256, keyspec.Sign),
		newSpec(keyspec.RSA2048, keyspec.Verify), newSpec(keyspec.AES256GCM, keyspec.Sign), newSpec(keyspec.AES256GCM), newSpec("", keyspec.Sign)} {
		if _, _, err := e.Generate(t.Context(), s); !errors.Is(err, enclave.ErrUnsupported) {
			t.Errorf("generate %s for %v: %v", s.Algorithm, s.Usages, err)
		}
	}
	agreer := generate(t, e, keyspec.ECDHP256, keyspec.Agree)
	peer, err := ecdh.P384().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(peer.PublicKey())
	if err != nil {
		t.Fatal(err)
	}
	for _, input := range [][]byte{spki, nil, []byte("garbage")} {
		if _, err := agreer.do(t.Context(), e, enclave.Op{Usage: keyspec.Agree, Input: input}); !errors.Is(err, enclave.ErrUnsupported) {
			t.Errorf("agreement with a peer on another curve or none: %v", err)
		}
	}
	for _, digest := range []int{0, 31, 33, 64} {
		if _, err := signer.do(t.Context(), e, enclave.Op{Usage: keyspec.Sign, Scheme: keyspec.RSAPKCS1SHA256, Digest: true, Input: make([]byte, digest)}); !errors.Is(err, enclave.ErrUnsupported) {
			t.Errorf("digest of %d bytes: %v", digest, err)
		}
	}
	second := newSpec(keyspec.ECDSAP256, keyspec.Sign)
	if _, _, err := e.Generate(t.Context(), second); err != nil {
		t.Fatal(err)
	}
	if _, _, err := e.Generate(t.Context(), second); !errors.Is(err, enclave.ErrUnsupported) {
		t.Errorf("a second key with the same CKA_ID: %v", err)
	}
}

// What does not decrypt is the same error for every cause, so that nobody learns about the padding.
func TestWhatDoesNotDecrypt(t *testing.T) {
	h := newSoftHSM(t)
	e := h.open(t, h.spec())
	k := generate(t, e, keyspec.RSA2048, keyspec.Decrypt)
	public := k.public.(*rsa.PublicKey)
	sealed, err := rsa.EncryptOAEP(sha256.New(), rand.Reader, public, []byte("x"), nil)
	if err != nil {
		t.Fatal(err)
	}
	block := append([]byte{0, 2}, bytes.Repeat([]byte{7}, 254)...) // RFC 8017 section 7.2.1
	block[250] = 0
	pkcs1 := new(big.Int).Exp(new(big.Int).SetBytes(block), big.NewInt(int64(public.E)), public.N).FillBytes(make([]byte, 256))
	flipped := bytes.Clone(sealed)
	flipped[9] ^= 4
	texts := map[string]bool{}
	for name, input := range map[string][]byte{"bit": flipped, "PKCS #1 v1.5": pkcs1, "zeros": make([]byte, 256), "modulus": public.N.Bytes(),
		"too large": bytes.Repeat([]byte{0xff}, 256), "short": sealed[1:], "long": append(bytes.Clone(sealed), 0), "empty": nil} {
		_, err := k.do(t.Context(), e, enclave.Op{Usage: keyspec.Decrypt, Input: input})
		if !errors.Is(err, enclave.ErrDecryption) {
			t.Errorf("%s: %v", name, err)
			continue
		}
		texts[err.Error()] = true
	}
	if len(texts) != 1 {
		t.Errorf("the errors tell causes apart: %v", texts)
	}
	if err := k.use(t.Context(), e, keyspec.Decrypt, ""); err != nil {
		t.Errorf("after that: %v", err)
	}
}

func TestManyAtOnce(t *testing.T) {
	h := newSoftHSM(t)
	e := h.open(t, h.spec())
	signer, sealer, agreer := generate(t, e, keyspec.ECDSAP256, keyspec.Sign), generate(t, e, keyspec.AES256GCM, keyspec.Encrypt, keyspec.Decrypt), generate(t, e, keyspec.ECDHP256, keyspec.Agree)
	s := enrol(t, e)
	var wg sync.WaitGroup
	for i := range 32 {
		wg.Go(func() {
			for j := range 12 {
				var err error
				switch (i + j) % 4 {
				case 0:
					err = signer.use(t.Context(), e, keyspec.Sign, keyspec.ECDSASHA256)
				case 1:
					err = sealer.use(t.Context(), e, keyspec.Encrypt, "")
				case 2:
					err = agreer.use(t.Context(), e, keyspec.Agree, "")
				case 3:
					if j < 4 {
						err = s.unwrap(t.Context(), e, pin()) // logs out and in again, between the others
					} else if health := e.Health(t.Context()); health.State != enclave.Ready {
						err = errors.New("health: " + health.Detail)
					}
				}
				if err != nil {
					t.Errorf("%v", err)
				}
			}
		})
	}
	wg.Wait()
}

// A token with few sessions is never asked for one more, however many use it.
func TestFewSessions(t *testing.T) {
	for most, parallel := range map[string]int{"3": 1, "6": 3} {
		h := newSoftHSM(t)
		module := newStub(t, h)
		module.does(t, "C_OpenSession 99999 most "+most, "C_GetTokenInfo 99999 most "+most)
		e := h.open(t, h.spec())
		s := enrol(t, e)
		k := generate(t, e, keyspec.ECDSAP256, keyspec.Sign)
		var wg sync.WaitGroup
		for i := range 16 {
			wg.Go(func() {
				for range 4 {
					if err := k.use(t.Context(), e, keyspec.Sign, keyspec.ECDSASHA256); err != nil {
						t.Errorf("%s sessions: %v", most, err)
					}
				}
				if i == 5 {
					if err := s.unwrap(t.Context(), e, pin()); err != nil {
						t.Errorf("%s sessions: unwrap: %v", most, err)
					}
				}
			})
		}
		wg.Wait()
		if n := e.MaxParallel(); n != parallel {
			t.Errorf("%s sessions: %d operations at once", most, n)
		}
		e.Close()
	}
	h := newSoftHSM(t)
	newStub(t, h).does(t, "C_GetTokenInfo 99999 most 2")
	if err := h.dial(t, h.spec()).Login(t.Context(), pin()); !errors.Is(err, enclave.ErrMisconfigured) {
		t.Errorf("two sessions: %v", err)
	}
}

// The token goes away while 8 use it. Nobody sees anything but that it is absent, locked or busy, and after a login all goes on.
func TestTokenTakenAwayInUse(t *testing.T) {
	h := newSoftHSM(t)
	e := h.open(t, h.spec())
	k := generate(t, e, keyspec.ECDSAP256, keyspec.Sign)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				err := k.use(t.Context(), e, keyspec.Sign, keyspec.ECDSASHA256)
				if err != nil && !errors.Is(err, enclave.ErrAbsent) && !errors.Is(err, enclave.ErrLocked) && !errors.Is(err, enclave.ErrBusy) {
					t.Errorf("%v", err)
					return
				}
			}
		})
	}
	for range 3 {
		time.Sleep(30 * time.Millisecond)
		putBack := h.Remove(t)
		time.Sleep(30 * time.Millisecond)
		putBack()
		soon(t, func() error { return e.Login(t.Context(), pin()) })
		soon(t, func() error { return k.use(t.Context(), e, keyspec.Sign, keyspec.ECDSASHA256) })
	}
	close(stop)
	wg.Wait()
}

func TestKeysNeedALogin(t *testing.T) {
	h := newSoftHSM(t)
	e := h.open(t, h.spec())
	k := generate(t, e, keyspec.ECDSAP256, keyspec.Sign)
	locked := h.dial(t, h.spec())
	if err := k.use(t.Context(), locked, keyspec.Sign, ""); !errors.Is(err, enclave.ErrLocked) {
		t.Errorf("sign: %v", err)
	}
	if _, _, err := locked.Generate(t.Context(), newSpec(keyspec.ECDSAP256, keyspec.Sign)); !errors.Is(err, enclave.ErrLocked) {
		t.Errorf("generate: %v", err)
	}
	if err := locked.Destroy(t.Context(), k.blob); !errors.Is(err, enclave.ErrLocked) {
		t.Errorf("destroy: %v", err)
	}
	if err := k.use(t.Context(), e, keyspec.Sign, keyspec.ECDSASHA256); err != nil {
		t.Errorf("sign with the login: %v", err)
	}
	// A slot that was opened is a login.
	s := enrol(t, e)
	if err := s.unwrap(t.Context(), locked, pin()); err != nil {
		t.Fatal(err)
	}
	if err := k.use(t.Context(), locked, keyspec.Sign, keyspec.ECDSASHA256); err != nil {
		t.Errorf("sign after the slot was opened: %v", err)
	}
}

// A token that is busy making a key that nobody waits for any more goes on with everything else, and removes the key.
func TestGenerateGivenUp(t *testing.T) {
	h := newSoftHSM(t)
	e := h.open(t, h.spec())
	k := generate(t, e, keyspec.ECDSAP256, keyspec.Sign)
	before, processes := h.Objects(t), helpers(t)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	_, _, err := e.Generate(ctx, newSpec(keyspec.RSA3072, keyspec.Sign))
	if err == nil {
		t.Fatal("an RSA-3072 key in 10 ms; the test proves nothing")
	}
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("generate: %v", err)
	}
	if err := k.use(t.Context(), e, keyspec.Sign, keyspec.ECDSASHA256); err != nil {
		t.Errorf("sign meanwhile: %v", err)
	}
	if after := helpers(t); !slices.Equal(processes, after) {
		t.Errorf("the helper was replaced: %v, %v", processes, after)
	}
	// A key of the same token waits until the token is done.
	generate(t, e, keyspec.ECDSAP256, keyspec.Sign)
	for end := time.Now().Add(20 * time.Second); h.Objects(t) != before+2; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d objects on the token, want %d", h.Objects(t), before+2)
		}
	}
}

// A signature that does not verify is not returned, and a module that makes one does not bring the helper down.
func TestGarbageIsNoSignature(t *testing.T) {
	h := newSoftHSM(t)
	module := newStub(t, h)
	e := h.open(t, h.spec())
	for _, a := range []keyspec.Algorithm{keyspec.RSA2048, keyspec.ECDSAP256, keyspec.Ed25519} {
		k := generate(t, e, a, keyspec.Sign)
		scheme := a.SignatureScheme()
		module.does(t, "C_Sign 2 garbage")
		if _, err := k.do(t.Context(), e, enclave.Op{Usage: keyspec.Sign, Scheme: scheme, Input: []byte("x")}); !errors.Is(err, enclave.ErrMisconfigured) {
			t.Errorf("%s: %v", a, err)
		}
		module.does(t)
		if err := k.use(t.Context(), e, keyspec.Sign, scheme); err != nil {
			t.Errorf("%s after that: %v", a, err)
		}
	}
	module.does(t, "C_GenerateKeyPair 1 segv")
	if _, _, err := e.Generate(t.Context(), newSpec(keyspec.ECDSAP256, keyspec.Sign)); !errors.Is(err, enclave.ErrAbsent) {
		t.Errorf("generate: %v", err)
	}
	if _, _, err := e.Generate(t.Context(), newSpec(keyspec.ECDSAP256, keyspec.Sign)); !errors.Is(err, enclave.ErrLocked) {
		t.Errorf("the new helper is not locked: %v", err)
	}
}
