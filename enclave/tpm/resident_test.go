package tpm

import (
	"bytes"
	"crypto"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"os/exec"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

func spec(a keyspec.Algorithm, usages ...keyspec.Usage) enclave.Spec {
	return enclave.Spec{Algorithm: a, Usages: usages, AAD: testAAD}
}

// residentKey is a key in a TPM and its public half.
type residentKey struct {
	driver *TPM
	blob   enclave.Blob
	public crypto.PublicKey
}

func generate(t *testing.T, d *TPM, s enclave.Spec) residentKey {
	t.Helper()
	blob, spki, err := d.Generate(limited(t), s)
	if err != nil {
		t.Fatal(err)
	}
	public, err := x509.ParsePKIXPublicKey(spki)
	if err != nil {
		t.Fatal(err)
	}
	if len(blob) > enclave.MaxBlob {
		t.Errorf("blob of %d bytes", len(blob))
	}
	return residentKey{d, blob, public}
}

func (k residentKey) do(t *testing.T, op enclave.Op) ([]byte, error) {
	t.Helper()
	if op.Bound == nil {
		op.Bound = testAAD
	}
	return k.driver.Do(limited(t), k.blob, op, nil)
}

func TestResidentECDSA(t *testing.T) {
	s := startSimulator(t)
	d := s.open(Config{})
	message := []byte("signed in the TPM")
	for _, a := range []keyspec.Algorithm{keyspec.ECDSAP256, keyspec.ECDSAP384, keyspec.ECDSAP521} {
		k := generate(t, d, spec(a, keyspec.Sign, keyspec.Verify))
		for name, h := range map[keyspec.Scheme]crypto.Hash{keyspec.ECDSASHA256: crypto.SHA256, keyspec.ECDSASHA384: crypto.SHA384, keyspec.ECDSASHA512: crypto.SHA512} {
			sum := h.New()
			sum.Write(message)
			digest := sum.Sum(nil)
			for _, op := range []enclave.Op{{Input: message}, {Input: digest, Digest: true}} {
				op.Usage, op.Scheme = keyspec.Sign, name
				signature, err := k.do(t, op)
				if err != nil {
					t.Fatalf("%s %s: %v", a, name, err)
				}
				if !ecdsa.VerifyASN1(k.public.(*ecdsa.PublicKey), digest, signature) {
					t.Errorf("%s %s: the signature does not verify", a, name)
				}
			}
		}
		if _, err := k.do(t, enclave.Op{Usage: keyspec.Sign, Input: message}); err != nil {
			t.Errorf("%s without a scheme: %v", a, err)
		}
		for _, op := range []enclave.Op{
			{Usage: keyspec.Sign, Scheme: keyspec.RSAPSSSHA256, Input: message},
			{Usage: keyspec.Sign, Scheme: keyspec.ECDSASHA256, Input: message, Digest: true},
			{Usage: keyspec.Sign, Scheme: keyspec.PureEd25519, Input: message},
			{Usage: keyspec.Decrypt, Input: message},
			{Usage: keyspec.Agree, Input: message},
			{Usage: keyspec.MAC, Input: message},
			{Input: message},
		} {
			if _, err := k.do(t, op); !errors.Is(err, enclave.ErrUnsupported) {
				t.Errorf("%s %+v: %v", a, op, err)
			}
		}
	}
}

func TestResidentRSA(t *testing.T) {
	t.Parallel()
	s := startSimulator(t)
	d := s.open(Config{})
	message := []byte("signed in the TPM")
	for _, a := range []keyspec.Algorithm{keyspec.RSA2048, keyspec.RSA3072} {
		if a == keyspec.RSA3072 && testing.Short() {
			continue
		}
		k := generate(t, d, spec(a, keyspec.Sign, keyspec.Decrypt))
		public := k.public.(*rsa.PublicKey)
		for _, sc := range schemes {
			if sc.alg != tpm2.TPMAlgRSAPSS && sc.alg != tpm2.TPMAlgRSASSA {
				continue
			}
			signature, err := k.do(t, enclave.Op{Usage: keyspec.Sign, Scheme: sc.name, Input: message})
			if err != nil {
				t.Fatalf("%s %s: %v", a, sc.name, err)
			}
			h := sc.hash.New()
			h.Write(message)
			if sc.alg == tpm2.TPMAlgRSAPSS {
				err = rsa.VerifyPSS(public, sc.hash, h.Sum(nil), signature, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash})
			} else {
				err = rsa.VerifyPKCS1v15(public, sc.hash, h.Sum(nil), signature)
			}
			if err != nil {
				t.Errorf("%s %s: %v", a, sc.name, err)
			}
		}
		secret := []byte("a data key")
		for _, label := range [][]byte{nil, []byte("label\x00")} {
			ciphertext, err := rsa.EncryptOAEP(sha256.New(), rand.Reader, public, secret, label)
			if err != nil {
				t.Fatal(err)
			}
			got, err := k.do(t, enclave.Op{Usage: keyspec.Decrypt, Scheme: keyspec.RSAOAEPSHA256, Input: ciphertext, AAD: label})
			if err != nil || !bytes.Equal(got, secret) {
				t.Errorf("%s label %q: %q, %v", a, label, got, err)
			}
			for name, bad := range map[string]enclave.Op{
				"label":  {Input: ciphertext, AAD: []byte("other\x00")},
				"bit":    {Input: append(bytes.Clone(ciphertext[:len(ciphertext)-1]), ciphertext[len(ciphertext)-1]^1), AAD: label},
				"short":  {Input: ciphertext[1:], AAD: label},
				"zeros":  {Input: make([]byte, len(ciphertext)), AAD: label},
				"ones":   {Input: bytes.Repeat([]byte{0xff}, len(ciphertext)), AAD: label},
				"one":    {Input: append(make([]byte, len(ciphertext)-1), 1), AAD: label},
				"nobody": {AAD: label},
			} {
				bad.Usage = keyspec.Decrypt
				if got, err := k.do(t, bad); !errors.Is(err, enclave.ErrDecryption) || errors.Is(err, enclave.ErrCorrupt) || got != nil {
					t.Errorf("%s %s: %v", a, name, err)
				}
			}
		}
		// A TPM would hash such a label otherwise than everybody else, or refuse it.
		for _, label := range []string{"label", "la\x00bel\x00", "\x00\x00"} {
			op := enclave.Op{Usage: keyspec.Decrypt, Input: make([]byte, public.Size()), AAD: []byte(label)}
			if _, err := k.do(t, op); !errors.Is(err, enclave.ErrUnsupported) {
				t.Errorf("label %q: %v", label, err)
			}
		}
	}
}

func TestResidentECDH(t *testing.T) {
	s := startSimulator(t)
	d := s.open(Config{})
	for a, curve := range map[keyspec.Algorithm]ecdh.Curve{keyspec.ECDHP256: ecdh.P256(), keyspec.ECDHP384: ecdh.P384(), keyspec.ECDHP521: ecdh.P521()} {
		k := generate(t, d, spec(a, keyspec.Agree))
		public, err := k.public.(*ecdsa.PublicKey).ECDH()
		if err != nil {
			t.Fatal(err)
		}
		for range 8 { // some results begin with zeros, which a TPM leaves out
			peer, err := curve.GenerateKey(rand.Reader)
			if err != nil {
				t.Fatal(err)
			}
			want, err := peer.ECDH(public)
			if err != nil {
				t.Fatal(err)
			}
			spki, err := x509.MarshalPKIXPublicKey(peer.PublicKey())
			if err != nil {
				t.Fatal(err)
			}
			got, err := k.do(t, enclave.Op{Usage: keyspec.Agree, Input: spki})
			if err != nil || !bytes.Equal(got, want) {
				t.Fatalf("%s: %x, want %x, %v", a, got, want, err)
			}
		}
		x25519, err := ecdh.X25519().GenerateKey(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		for _, peer := range []any{x25519.PublicKey(), &p224.PublicKey} {
			spki, err := x509.MarshalPKIXPublicKey(peer)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := k.do(t, enclave.Op{Usage: keyspec.Agree, Input: spki}); !errors.Is(err, enclave.ErrUnsupported) {
				t.Errorf("%s with a peer on %T: %v", a, peer, err)
			}
		}
		if _, err := k.do(t, enclave.Op{Usage: keyspec.Sign, Input: []byte("x")}); !errors.Is(err, enclave.ErrUnsupported) {
			t.Errorf("%s signs: %v", a, err)
		}
	}
}

// The blob of a key works in the record it was made for, and on the TPM it was made by, after any restart.
func TestResidentBlob(t *testing.T) {
	s := startSimulator(t)
	d := s.open(Config{})
	k := generate(t, d, spec(keyspec.ECDSAP256, keyspec.Sign))
	op := enclave.Op{Usage: keyspec.Sign, Input: []byte("x")}
	for _, bound := range [][]byte{{}, testAAD[1:], append(bytes.Clone(testAAD), 0)} {
		op.Bound = bound
		if _, err := k.do(t, op); !errors.Is(err, enclave.ErrCorrupt) {
			t.Errorf("bound to %x: %v", bound, err)
		}
	}
	op.Bound = nil
	// The TPM refuses it too, not only the check value.
	inner, err := decodeKey(bytes.Clone(k.blob))
	if err != nil {
		t.Fatal(err)
	}
	inner.check = bind(inner.salt, labelCheck, []byte("another record"))[:checkSize]
	moved, err := inner.encode()
	if err != nil {
		t.Fatal(err)
	}
	op.Bound = []byte("another record")
	if _, err := (residentKey{d, moved, nil}).do(t, op); !isOneOf(err, tpm2.TPMRCBadAuth) || !errors.Is(err, enclave.ErrCorrupt) {
		t.Errorf("bound to another record by its check value alone: %v", err)
	}
	op.Bound = nil
	for i := range k.blob {
		bad := residentKey{d, bytes.Clone(k.blob), nil}
		bad.blob[i] ^= 1
		if _, err := bad.do(t, op); !errors.Is(err, enclave.ErrCorrupt) {
			t.Errorf("byte %d: %v", i, err)
		}
	}
	slotBlob, _ := enrol(t, d, enclave.Auth{})
	if _, err := (residentKey{d, slotBlob, nil}).do(t, op); !errors.Is(err, enclave.ErrCorrupt) {
		t.Errorf("a slot used as a key: %v", err)
	}
	if _, err := unwrap(t, d, k.blob, enclave.Auth{}); !errors.Is(err, enclave.ErrCorrupt) {
		t.Errorf("a key used as a slot: %v", err)
	}
	s.kill()
	s.start()
	if _, err := k.do(t, op); err != nil {
		t.Errorf("after a restart of the TPM: %v", err)
	}
	k.driver = s.open(Config{})
	if _, err := k.do(t, op); err != nil {
		t.Errorf("with another driver: %v", err)
	}
	for range 2 {
		if err := d.Destroy(limited(t), k.blob); err != nil {
			t.Error(err)
		}
	}
	if err := d.Destroy(limited(t), k.blob[1:]); !errors.Is(err, enclave.ErrCorrupt) {
		t.Error(err)
	}
	stranger := startSimulator(t)
	k.driver = stranger.open(Config{})
	if _, err := k.do(t, op); !errors.Is(err, enclave.ErrReplaced) {
		t.Errorf("on another TPM: %v", err)
	}
}

// Many clients at once, more than the TPM has places.
func TestResidentConcurrently(t *testing.T) {
	s := startSimulator(t)
	d := s.open(Config{})
	if d.MaxParallel() != 1 {
		t.Error("a TPM does one thing at a time")
	}
	signs := generate(t, d, spec(keyspec.ECDSAP256, keyspec.Sign))
	agrees := generate(t, d, spec(keyspec.ECDHP256, keyspec.Agree))
	blob, secret := enrol(t, d, enclave.Auth{})
	peer, err := ecdh.P256().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(peer.PublicKey())
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 32 {
		wg.Go(func() {
			for range 4 {
				if _, err := signs.do(t, enclave.Op{Usage: keyspec.Sign, Input: []byte("x")}); err != nil {
					t.Error(err)
				}
				if _, err := agrees.do(t, enclave.Op{Usage: keyspec.Agree, Input: spki}); err != nil {
					t.Error(err)
				}
				if got, err := unwrap(t, d, blob, enclave.Auth{}); err != nil || !bytes.Equal(got, secret) {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

// What the device says it can do, it can do, and the rest is refused.
func TestMechanisms(t *testing.T) {
	s := startSimulator(t)
	d := s.open(Config{})
	list, err := d.Mechanisms(limited(t))
	if err != nil {
		t.Fatal(err)
	}
	has := func(a keyspec.Algorithm, u keyspec.Usage, sc keyspec.Scheme) bool {
		return slices.ContainsFunc(list, func(m enclave.Mechanism) bool {
			return m.Algorithm == a && m.Usage == u && (sc == "" || slices.Contains(m.Schemes, sc))
		})
	}
	for _, want := range []struct {
		a keyspec.Algorithm
		u keyspec.Usage
		s keyspec.Scheme
	}{
		{keyspec.RSA2048, keyspec.Sign, keyspec.RSAPSSSHA256},
		{keyspec.RSA2048, keyspec.Sign, keyspec.RSAPKCS1SHA512},
		{keyspec.RSA2048, keyspec.Decrypt, keyspec.RSAOAEPSHA256},
		{keyspec.RSA3072, keyspec.Sign, keyspec.RSAPSSSHA384},
		{keyspec.ECDSAP256, keyspec.Sign, keyspec.ECDSASHA256},
		{keyspec.ECDSAP384, keyspec.Sign, keyspec.ECDSASHA384},
		{keyspec.ECDSAP521, keyspec.Sign, keyspec.ECDSASHA512},
		{keyspec.ECDHP256, keyspec.Agree, ""},
		{keyspec.ECDHP384, keyspec.Agree, ""},
		{keyspec.ECDHP521, keyspec.Agree, ""},
	} {
		if !has(want.a, want.u, want.s) {
			t.Errorf("no %v in %+v", want, list)
		}
	}
	if has(keyspec.RSA4096, keyspec.Sign, "") {
		t.Error("libtpms 0.9 has no RSA-4096")
	}
	if _, _, err := d.Generate(limited(t), spec(keyspec.RSA4096, keyspec.Sign)); !errors.Is(err, enclave.ErrUnsupported) {
		t.Errorf("RSA-4096: %v", err)
	}
	for _, bad := range []enclave.Spec{
		spec(keyspec.Ed25519, keyspec.Sign),
		spec(keyspec.AES256GCM, keyspec.Encrypt),
		spec("", keyspec.Sign),
		spec(keyspec.ECDSAP256),
		spec(keyspec.ECDSAP256, keyspec.Verify),
		spec(keyspec.ECDSAP256, keyspec.Agree),
		spec(keyspec.ECDSAP256, keyspec.Decrypt),
		spec(keyspec.ECDHP256, keyspec.Sign),
		spec(keyspec.RSA2048, keyspec.MAC),
		{Algorithm: keyspec.ECDSAP256, Usages: []keyspec.Usage{keyspec.Sign}, AAD: make([]byte, enclave.MaxAAD+1)},
	} {
		if _, _, err := d.Generate(limited(t), bad); !errors.Is(err, enclave.ErrUnsupported) {
			t.Errorf("%+v: %v", bad, err)
		}
	}
}

// A device that makes a wrong signature, by a fault or on purpose, is noticed before anybody sees it.
func TestFaultySignatureIsNotReleased(t *testing.T) {
	s := startSimulator(t)
	k := generate(t, s.open(Config{}), spec(keyspec.ECDSAP256, keyspec.Sign))
	u := &use{scheme: schemes[7], input: make([]byte, 32), public: k.public}
	signature, err := call(limited(t), k.driver, func(d *device) ([]byte, error) {
		inner, err := decodeKey(k.blob)
		if err != nil {
			return nil, err
		}
		return d.withKey(inner, authValue(inner.salt, labelKey, testAAD), func(d *device, root, o *object, auth []byte) ([]byte, error) {
			other, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			if err != nil {
				return nil, err
			}
			u.public = &other.PublicKey
			return u.sign(d, root, o, auth)
		})
	})
	if !errors.Is(err, enclave.ErrMisconfigured) || signature != nil {
		t.Errorf("%x, %v", signature, err)
	}
}

// A key that is used again and again is loaded once; others push it out, so that there is always room in the three slots of a TPM; and
// what is loaded is gone when the device is let go, was reset or was cleared.
func TestHotKeys(t *testing.T) {
	s := startSimulator(t)
	var loads, flushes, full atomic.Int32
	var before atomic.Pointer[func()]
	d := s.openWith(Config{}, tapped(func(c []byte) []byte {
		if f := before.Load(); f != nil {
			(*f)()
		}
		return nil
	}, func(c, a []byte) []byte {
		switch commandCode(c) {
		case tpm2.TPMCCLoad:
			loads.Add(1)
		case tpm2.TPMCCFlushContext:
			flushes.Add(1)
		}
		if rc := responseCode(a); isFull(rc) {
			full.Add(1)
		}
		return a
	}))
	blob, secret := enrol(t, d, enclave.Auth{})
	var keys []residentKey
	for range 4 {
		keys = append(keys, generate(t, d, spec(keyspec.ECDSAP256, keyspec.Sign)))
	}
	sign := func(k residentKey) {
		t.Helper()
		if _, err := k.do(t, enclave.Op{Usage: keyspec.Sign, Input: []byte("message")}); err != nil {
			t.Fatal(err)
		}
	}
	loads.Store(0)
	const uses = 20
	for n := range uses {
		sign(keys[n%hotKeys])
	}
	if n := loads.Load(); n > uses/2 { // a machine that is slow may have let the device go in between
		t.Errorf("%d loads for %d uses of %d keys", n, uses, hotKeys)
	}
	for n := range 3 * len(keys) {
		sign(keys[n%len(keys)])
		if n%3 == 0 {
			opens(t, d, blob, enclave.Auth{}, secret)
		}
	}
	if full.Load() != 0 {
		t.Error("the TPM was full")
	}
	time.Sleep(2 * idleSocket)
	if n := s.count(tpm2.TPMHTTransient); n != 0 {
		t.Errorf("%d objects stay loaded", n)
	}

	sign(keys[0])
	once := func(f func()) {
		var done sync.Once
		g := func() { done.Do(f) }
		before.Store(&g)
	}
	once(func() {
		if out, err := exec.Command("swtpm_ioctl", "--unix", s.socket()+".ctrl", "-i").CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
	})
	sign(keys[0])
	sign(keys[1])
}

// The TPM makes HMAC keys and does not show them, so another HMAC under the same key is the judge: that of the same message is the same,
// that of another message is not.
func TestResidentHMAC(t *testing.T) {
	s := startSimulator(t)
	d := s.open(Config{})
	for a, size := range map[keyspec.Algorithm]int{keyspec.HMACSHA256: 32, keyspec.HMACSHA384: 48, keyspec.HMACSHA512: 64} {
		blob, spki, err := d.Generate(limited(t), spec(a, keyspec.MAC, keyspec.Verify))
		if err != nil || spki != nil {
			t.Fatalf("%s: %x, %v", a, spki, err)
		}
		k := residentKey{driver: d, blob: blob}
		mac := func(message []byte) []byte {
			out, err := k.do(t, enclave.Op{Usage: keyspec.MAC, Input: message})
			if err != nil || len(out) != size {
				t.Fatalf("%s: %x, %v", a, out, err)
			}
			return out
		}
		long := bytes.Repeat([]byte{1}, maxBuffer)
		if !bytes.Equal(mac(long), mac(long)) || bytes.Equal(mac(long), mac(long[1:])) || bytes.Equal(mac(nil), mac([]byte{0})) {
			t.Errorf("%s: not a function of the message", a)
		}
		for _, op := range []enclave.Op{
			{Usage: keyspec.MAC, Input: append(long, 1)},
			{Usage: keyspec.Sign, Input: long},
			{Usage: keyspec.Decrypt, Input: long},
		} {
			if _, err := k.do(t, op); !errors.Is(err, enclave.ErrUnsupported) {
				t.Errorf("%s %s: %v", a, op.Usage, err)
			}
		}
		if _, err := k.do(t, enclave.Op{Usage: keyspec.MAC, Bound: []byte("another record")}); !errors.Is(err, enclave.ErrCorrupt) {
			t.Errorf("%s in another record: %v", a, err)
		}
	}
}
