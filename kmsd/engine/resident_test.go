package engine

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/enclave/enclavetest"
	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/mechanism"
	"github.com/kmsd-project/kmsd/kmsd/pki"
	"github.com/kmsd-project/kmsd/policy"
)

// token is a device in memory that can do all that kmsd can do in software, and whose faults a test can choose. Its blobs are the
// algorithm, the number of the key, and what it is bound to.
type token struct {
	*enclavetest.Memory
	parallel int
	without  keyspec.Usage // that it does not have

	mu    sync.Mutex
	keys  map[string][]byte // material by blob
	fault error             // returned instead of doing anything
	lie   bool              // signatures and plaintexts are wrong

	replaced bool          // as Health says
	hang     chan struct{} // calls wait until it is closed, or their context is done
	asked    atomic.Int64  // operations
	panics   bool          // Do panics

	finished atomic.Int64 // operations that have ended, well or not
	made     atomic.Int64 // keys

	active atomic.Int64
	most   atomic.Int64
}

func newToken() *token {
	return &token{Memory: enclavetest.NewMemory(""), parallel: 1, keys: make(map[string][]byte)}
}

func (k *token) set(f func()) {
	k.mu.Lock()
	defer k.mu.Unlock()
	f()
}

func (k *token) enter(ctx context.Context) error {
	k.mu.Lock()
	fault, hang := k.fault, k.hang
	k.mu.Unlock()
	if hang != nil {
		select {
		case <-hang:
		case <-ctx.Done():
		}
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	return fault
}

func (k *token) Health(ctx context.Context) enclave.Health {
	if err := k.enter(ctx); err != nil {
		return enclave.Health{State: enclave.Absent}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.replaced {
		return enclave.Health{State: enclave.Replaced}
	}
	return enclave.Health{State: enclave.Ready}
}

func (k *token) Generate(ctx context.Context, s enclave.Spec) (enclave.Blob, []byte, error) {
	if err := k.enter(ctx); err != nil {
		return nil, nil, err
	}
	row, err := mechanism.Lookup(s.Algorithm)
	if err != nil {
		return nil, nil, err
	}
	material, err := k.material(row)
	if err != nil {
		return nil, nil, err
	}
	key, err := row.Load(material)
	if err != nil {
		return nil, nil, err
	}
	spki, err := key.SPKI()
	if errors.Is(err, mechanism.ErrUnsupported) {
		spki = nil
	} else if err != nil {
		return nil, nil, err
	}
	blob := fmt.Appendf(nil, "%s\x00%x\x00%s", s.Algorithm, s.ID, s.AAD)
	k.mu.Lock()
	defer k.mu.Unlock()
	k.keys[string(blob)] = material
	k.made.Add(1)
	return blob, spki, nil
}

func (k *token) Do(ctx context.Context, b enclave.Blob, op enclave.Op, dst []byte) ([]byte, error) {
	k.asked.Add(1)
	k.most.Store(max(k.most.Load(), k.active.Add(1)))
	defer k.active.Add(-1)
	defer k.finished.Add(1)
	k.mu.Lock()
	panics := k.panics
	k.mu.Unlock()
	if panics {
		panic("driver")
	}
	if err := k.enter(ctx); err != nil {
		return nil, err
	}
	k.mu.Lock()
	material, lie := k.keys[string(b)], k.lie
	k.mu.Unlock()
	parts := strings.SplitN(string(b), "\x00", 3)
	if material == nil {
		return nil, &enclave.Error{Kind: enclave.ErrReplaced, Detail: "no such key"}
	}
	if parts[2] != string(op.Bound) {
		return nil, &enclave.Error{Kind: enclave.ErrCorrupt, Detail: "the key belongs to another record"}
	}
	row, err := mechanism.Lookup(keyspec.Algorithm(parts[0]))
	if err != nil {
		return nil, err
	}
	key, err := row.Load(material)
	if err != nil {
		return nil, err
	}
	in := mechanism.Input{Message: op.Input}
	if op.Digest {
		in = mechanism.Input{Digest: op.Input}
	}
	var out []byte
	switch op.Usage {
	case keyspec.Sign:
		out, err = key.Sign(nil, op.Scheme, mechanism.DER, in)
	case keyspec.Decrypt:
		if row.Kind == mechanism.KindRSA {
			out, err = key.Decrypt(nil, op.Scheme, op.Input, op.AAD)
		} else if out, err = key.AEAD().Open(nil, op.Nonce, op.Input, op.AAD); err != nil {
			err = mechanism.ErrDecryption
		}
	case keyspec.Encrypt:
		out = key.AEAD().Seal(nil, op.Nonce, op.Input, op.AAD)
	case keyspec.Agree:
		out, err = key.Agree(op.Input)
	case keyspec.MAC:
		out, err = key.MAC(nil, op.Input)
	case keyspec.Wrap:
		out, err = key.Wrap(nil, op.Input)
	case keyspec.Unwrap:
		out, err = key.Unwrap(nil, op.Input)
	default:
		err = mechanism.ErrUnsupported
	}
	if errors.Is(err, mechanism.ErrDecryption) {
		return nil, &enclave.Error{Kind: enclave.ErrDecryption}
	}
	if lie && len(out) > 0 {
		out[len(out)-1] ^= 1
	}
	return append(dst[:0], out...), err
}

func (k *token) Destroy(ctx context.Context, b enclave.Blob) error {
	if err := k.enter(ctx); err != nil {
		return err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.keys, string(b))
	return nil
}

func (k *token) Mechanisms(ctx context.Context) ([]enclave.Mechanism, error) {
	if err := k.enter(ctx); err != nil {
		return nil, err
	}
	var list []enclave.Mechanism
	for _, row := range mechanism.Table() {
		for _, u := range row.PrivateUsages(row.Usages) {
			if u == keyspec.Derive || u == k.without || row.Algorithm == keyspec.RSA4096 {
				continue
			}
			list = append(list, enclave.Mechanism{Algorithm: row.Algorithm, Usage: u})
		}
	}
	return list, nil
}

func (k *token) MaxParallel() int { return k.parallel }

func (k *token) count() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.keys)
}

// primes are RSA keys that tokens have made: more than one of each size would only take time.
var primes sync.Map

// material makes key material.
func (k *token) material(row *mechanism.Row) ([]byte, error) {
	if row.Kind == mechanism.KindRSA {
		if b, ok := primes.Load(row.Algorithm); ok {
			return b.([]byte), nil
		}
	}
	b, err := row.Generate()
	if err == nil && row.Kind == mechanism.KindRSA {
		primes.Store(row.Algorithm, b)
	}
	return b, err
}

// rack finds devices by location; those for new keys are at the name of the protection, or at "new" and that.
type rack map[string]*token

func (r rack) Device(_ context.Context, p keyspec.Protection, location, _ string) (Device, error) {
	if location == "" {
		if location = "new " + string(p); r[location] == nil {
			location = string(p)
		}
	}
	k := r[location]
	if k == nil {
		return Device{}, &enclave.Error{Kind: enclave.ErrAbsent, Detail: "no device at " + location}
	}
	return Device{Location: location, Binding: k.Info().Binding, Enclave: k, Resident: k}, nil
}

func newResidentHouse(t testing.TB) (*house, *token) {
	h, k := newHouse(t), newToken()
	h.Engine.devices = rack{"hsm": k, "tpm": newToken()}
	return h, k
}

func (h *house) createResident(name string, a keyspec.Algorithm, usages ...keyspec.Usage) *keystore.Key {
	h.t.Helper()
	key, err := h.Create(h.t.Context(), h.app, &NewKey{Name: keyspec.Name(name), Algorithm: a, Usages: usages, Protection: keyspec.HSM}, nil)
	if err != nil {
		h.t.Fatal(err)
	}
	return key
}

// TestResidentMatrix tries every operation on a resident key of every algorithm, and compares with what keys in software do: only
// streams of MACs, which have no end in a device, and derivation are not offered.
func TestResidentMatrix(t *testing.T) {
	t.Parallel()
	for _, row := range mechanism.Table() {
		t.Run(string(row.Algorithm), func(t *testing.T) {
			if row.Cost == mechanism.CostRSA && row.Algorithm != keyspec.RSA2048 && row.Algorithm != keyspec.RSA4096 && (testing.Short() || raceDetector) {
				return
			}
			h, k := newResidentHouse(t)
			h.create("TARGET", keyspec.AES256GCM)
			for i, usages := range usageSets(row) {
				name := fmt.Sprintf("APP/%d", i)
				key, err := h.Create(t.Context(), h.app, &NewKey{Name: keyspec.Name(name), Algorithm: row.Algorithm, Usages: usages, Protection: keyspec.HSM}, nil)
				if row.Kind == mechanism.KindHKDF || row.Algorithm == keyspec.RSA4096 || len(row.PrivateUsages(usages)) == 0 {
					want(t, "make what the device has not", err, enclave.ErrUnsupported)
					continue
				}
				if err != nil {
					t.Fatal(err)
				}
				if key.Protection != keyspec.HSM {
					t.Errorf("protection %q", key.Protection)
				}
				m := h.makeResident(name, row)
				for _, op := range operations() {
					before := k.asked.Load()
					got := op.run(h, ref(t, name), m)
					switch {
					case op.name == "stream mac" && slices.Contains(usages, keyspec.MAC):
						want(t, op.name, got, ErrUnsupported)
					case op.name == "decrypt" && row.Kind == mechanism.KindAEAD && m.sealed == nil, op.name == "stream decrypt" && m.head == nil,
						op.name == "unwrap" && m.wrapped == nil, op.name == "verify" && m.sig == nil, op.name == "mac_verify" && m.mac == nil:
					default:
						h.judge(op, row, usages, active, m, got)
					}
					public := op.name == "verify" || op.name == "encrypt" && row.Kind == mechanism.KindRSA
					if got == nil && (k.asked.Load() == before) != public {
						t.Errorf("%s with %s: asked the device %d times", op.name, row.Algorithm, k.asked.Load()-before)
					}
				}
			}
		})
	}
}

// makeResident has a resident key make, as far as it may, what the operations of the matrix need.
func (h *house) makeResident(name string, row *mechanism.Row) *made {
	h.t.Helper()
	m := &made{}
	r := ref(h.t, name)
	ctx := h.t.Context()
	m.sig, _, _ = h.Sign(ctx, h.app, r, "", "", message, nil)
	m.mac, _, _ = h.MAC(ctx, h.app, r, []byte("message"), nil)
	switch row.Kind {
	case mechanism.KindRSA:
		_, _, p, err := h.Public(ctx, h.app, r)
		if err != nil {
			h.t.Fatal(err)
		}
		public, err := mechanism.ParseSPKI(p.SPKI)
		if err == nil {
			m.oaep, err = mechanism.Encrypt(nil, public, keyspec.RSAOAEPSHA256, []byte("data"), nil)
		}
		if err != nil {
			h.t.Fatal(err)
		}
	case mechanism.KindECDH:
		_, _, p, err := h.Public(ctx, h.app, r)
		if err != nil {
			h.t.Fatal(err)
		}
		m.peer = p.SPKI
	case mechanism.KindAEAD:
		m.sealed, _, _ = h.Encrypt(ctx, h.app, r, []byte("data"), nil, nil)
		if s, err := h.BeginStream(ctx, h.app, "encrypt", r, nil, nil, nil); err == nil {
			m.head = s.Head
		}
		m.wrapped, _, _ = h.Wrap(ctx, h.app, r, keyspec.Ref{Name: "TARGET"})
	}
	return m
}

func TestResidentKeyOutlivesRestart(t *testing.T) {
	h, k := newResidentHouse(t)
	h.createResident("APP/k", keyspec.ECDSAP256)
	h.createResident("APP/a", keyspec.AES256GCM)
	sealed := h.encrypt("APP/a", "data")
	h.restart()
	h.Engine.devices = rack{"hsm": k}
	sig, err := h.sign(h.app, "APP/k", "message")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := h.verify(h.app, "APP/k", "message", sig); err != nil {
		t.Error(err)
	}
	if data, err := h.decrypt(h.app, "APP/a", sealed); err != nil || data != "data" {
		t.Errorf("%q, %v", data, err)
	}
	_, err = h.decrypt(h.app, "APP/a", append(sealed[:len(sealed)-1:len(sealed)-1], sealed[len(sealed)-1]^1))
	want(t, "changed ciphertext", err, ErrDecryption)
}

func TestResidentCertificates(t *testing.T) {
	h, _ := newResidentHouse(t)
	h.createResident("CA", keyspec.ECDSAP256, keyspec.Sign, keyspec.Certify)
	h.createResident("CA/leaf", keyspec.ECDSAP384)
	s, err := pki.ParseSubject("CN=test", nil, nil, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := h.CertSelfSign(t.Context(), h.app, ref(t, "CA"), &s, &pki.Profile{CA: true, PathLen: -1}); err != nil {
		t.Fatal(err)
	}
	request, err := h.CertRequest(t.Context(), h.app, ref(t, "CA/leaf"), &s)
	if err != nil {
		t.Fatal(err)
	}
	chain, err := h.CertIssue(t.Context(), h.app, ref(t, "CA"), request, keyspec.Ref{}, &pki.Subject{}, &pki.Profile{})
	if err != nil || len(chain) != 2 {
		t.Errorf("%d certificates, %v", len(chain), err)
	}
}

func TestResidentRotateAndDestroy(t *testing.T) {
	h, k := newResidentHouse(t)
	h.createResident("APP/k", keyspec.ECDSAP256)
	old, err := h.sign(h.app, "APP/k", "message")
	if err != nil {
		t.Fatal(err)
	}
	key, err := h.Rotate(t.Context(), h.app, "APP/k", time.Time{}, time.Time{}, false)
	if err != nil || key.Current != 2 || k.count() != 2 {
		t.Fatalf("%v, %d keys in the device", err, k.count())
	}
	if v, err := h.verify(h.app, "APP/k", "message", old); err != nil || v.Version != 1 {
		t.Errorf("%v, %v", v, err)
	}
	if sig, err := h.sign(h.app, "APP/k", "message"); err != nil || bytes.Equal(sig, old) {
		t.Error(err)
	}
	if _, err := h.DestroyNow(t.Context(), h.app, ref(t, "APP/k@1")); err != nil || k.count() != 1 {
		t.Errorf("%v, %d keys in the device", err, k.count())
	}
	// Destruction that came due.
	if _, err := h.Destroy(t.Context(), h.app, ref(t, "APP/k@2"), time.Hour); err != nil {
		t.Fatal(err)
	}
	h.clock.add(2 * time.Hour)
	if _, err := h.Settle(t.Context()); err != nil || k.count() != 0 {
		t.Errorf("%v, %d keys in the device", err, k.count())
	}
}

// TestDestroyWithoutDevice: a device that is gone keeps nobody from destroying what is left of its keys.
func TestDestroyWithoutDevice(t *testing.T) {
	h, k := newResidentHouse(t)
	h.createResident("APP/k", keyspec.ECDSAP256)
	k.set(func() { k.fault = &enclave.Error{Kind: enclave.ErrAbsent} })
	if _, err := h.DestroyNow(t.Context(), h.app, ref(t, "APP/k")); err != nil {
		t.Error(err)
	}
	k.set(func() { k.fault = nil })
	_, err := h.sign(h.app, "APP/k", "message")
	want(t, "sign with a destroyed key", err, ErrState)
}

func TestResidentRefusals(t *testing.T) {
	h, k := newResidentHouse(t)
	for _, c := range []struct {
		name string
		key  NewKey
		err  error
	}{
		{"exportable", NewKey{Name: "A", Algorithm: keyspec.ECDSAP256, Exportable: true}, ErrUnsupported},
		{"not in the device", NewKey{Name: "A", Algorithm: keyspec.HKDFSHA256}, enclave.ErrUnsupported},
		{"only public", NewKey{Name: "A", Algorithm: keyspec.ECDSAP256, Usages: []keyspec.Usage{keyspec.Verify}}, enclave.ErrUnsupported},
	} {
		c.key.Protection = keyspec.HSM
		_, err := h.Create(t.Context(), h.app, &c.key, nil)
		want(t, c.name, err, c.err)
	}
	_, err := h.Create(t.Context(), h.app, &NewKey{Name: "A", Algorithm: keyspec.ECDSAP256, Protection: "vault"}, nil)
	want(t, "unknown protection", err, ErrInput)
	_, err = h.Create(t.Context(), h.app, &NewKey{Name: "A", Algorithm: keyspec.HKDFSHA256, Protection: keyspec.HSM}, nil)
	var device *enclave.Error
	if !errors.As(err, &device) || !strings.Contains(device.Remedy, "ecdsa-p256 (sign)") {
		t.Errorf("what the device has is not named: %v", err)
	}

	row, _ := mechanism.Lookup(keyspec.AES256GCM)
	_, err = h.Import(t.Context(), h.admin, &NewKey{Name: "A", Algorithm: row.Algorithm, Protection: keyspec.HSM}, make([]byte, 32), nil)
	want(t, "import", err, ErrUnsupported)
	h.create("APP/x", keyspec.ECDHP256)
	_, _, p, err := h.Public(t.Context(), h.app, ref(t, "APP/x"))
	if err != nil {
		t.Fatal(err)
	}
	_, err = h.Agree(t.Context(), h.app, ref(t, "APP/x"), p.SPKI, nil, nil, &NewKey{Name: "A", Algorithm: row.Algorithm, Protection: keyspec.HSM}, nil)
	want(t, "agree", err, ErrUnsupported)

	h.create("APP/wrap", keyspec.AES256GCM, keyspec.Wrap)
	h.createResident("APP/k", keyspec.ECDSAP256)
	_, _, err = h.Wrap(t.Context(), h.app, ref(t, "APP/wrap"), ref(t, "APP/k"))
	want(t, "export", err, ErrUsage)
	if k.count() != 1 {
		t.Errorf("%d keys in the device", k.count())
	}

	h.Engine.devices = nil
	_, err = h.Create(t.Context(), h.app, &NewKey{Name: "A", Algorithm: keyspec.ECDSAP256, Protection: keyspec.TPM}, nil)
	want(t, "no devices", err, ErrUnsupported)
}

// TestResidentLabel: a label that only software would understand is refused when it is encrypted to a key in a TPM.
func TestResidentLabel(t *testing.T) {
	h, _ := newResidentHouse(t)
	_, err := h.Create(t.Context(), h.app, &NewKey{Name: "APP/r", Algorithm: keyspec.RSA2048, Usages: []keyspec.Usage{keyspec.Encrypt, keyspec.Decrypt}, Protection: keyspec.TPM}, nil)
	if err != nil {
		t.Fatal(err)
	}
	for label, target := range map[string]error{"": nil, "label\x00": nil, "label": ErrUnsupported, "la\x00bel\x00": ErrUnsupported} {
		_, _, err := h.Encrypt(t.Context(), h.app, ref(t, "APP/r"), []byte("data"), []byte(label), nil)
		want(t, label, err, target)
	}
}

// TestBlobInAnotherRecord: what is in the record of one key is of no use in that of another, of the same name or not.
func TestBlobInAnotherRecord(t *testing.T) {
	h, k := newResidentHouse(t)
	h.createResident("APP/k", keyspec.ECDSAP256)
	s := h.store.Load()
	record, err := s.Material(ref(t, "APP/k@1"), make([]byte, keystore.MaxMaterial))
	if err != nil {
		t.Fatal(err)
	}
	public, err := s.Public(ref(t, "APP/k@1"))
	if err != nil {
		t.Fatal(err)
	}
	key, err := s.Get("APP/k")
	if err != nil {
		t.Fatal(err)
	}
	key.Name, key.Revision = "APP/moved", 0
	ch := keystore.Change{Key: key, Material: map[keyspec.Version][]byte{1: record}, Public: map[keyspec.Version]keystore.Public{1: public}}
	if err := s.Apply(t.Context(), keystore.Commit{Changes: []keystore.Change{ch}}); err != nil {
		t.Fatal(err)
	}
	_, err = h.sign(h.app, "APP/moved", "message")
	want(t, "moved blob", err, enclave.ErrCorrupt)
	if k.asked.Load() == 0 {
		t.Error("the device was not asked")
	}
}

// TestFaultyDevice: a signature that does not verify, or a key that does not work, does not get out, and no record is made of it.
func TestFaultyDevice(t *testing.T) {
	h, k := newResidentHouse(t)
	h.createResident("APP/k", keyspec.ECDSAP256)
	h.createResident("APP/m", keyspec.HMACSHA256)
	k.set(func() { k.lie = true })
	sig, err := h.sign(h.app, "APP/k", "message")
	want(t, "wrong signature", err, mechanism.ErrSelfTest)
	if sig != nil {
		t.Error("a wrong signature was returned")
	}
	before := k.count()
	for _, a := range []keyspec.Algorithm{keyspec.ECDSAP256, keyspec.ECDHP256, keyspec.AES256GCM, keyspec.RSA2048} {
		_, err = h.Create(t.Context(), h.app, &NewKey{Name: "APP/bad", Algorithm: a, Protection: keyspec.HSM}, nil)
		want(t, "make a "+string(a)+" key that does not work", err, mechanism.ErrSelfTest)
	}
	if k.count() != before {
		t.Errorf("%d keys were left in the device", k.count()-before)
	}
	if _, err := h.Get(t.Context(), h.app, keyspec.Ref{Name: "APP/bad"}); !errors.Is(err, ErrNotAvailable) {
		t.Error(err)
	}
	k.set(func() { k.lie, k.fault = false, &enclave.Error{Kind: enclave.ErrAbsent} })
	_, err = h.sign(h.app, "APP/k", "message")
	want(t, "no device", err, enclave.ErrAbsent)
	k.set(func() { k.fault = nil })
	if _, err = h.sign(h.app, "APP/k", "message"); err != nil {
		t.Errorf("after the device came back: %v", err)
	}
	delete(h.Engine.devices.(rack), "hsm")
	_, err = h.sign(h.app, "APP/k", "message")
	want(t, "no device", err, enclave.ErrAbsent)
}

// TestFailedSealReturnsNothing: cipher.AEAD cannot say that a device failed, so somebody else must.
func TestFailedSealReturnsNothing(t *testing.T) {
	h, k := newResidentHouse(t)
	h.createResident("APP/a", keyspec.AES256GCM)
	k.set(func() { k.fault = &enclave.Error{Kind: enclave.ErrAbsent} })
	sealed, _, err := h.Encrypt(t.Context(), h.app, ref(t, "APP/a"), []byte("data"), nil, nil)
	want(t, "encrypt", err, enclave.ErrAbsent)
	if sealed != nil {
		t.Error("a ciphertext was returned")
	}
	_, _, _, err = h.DataKey(t.Context(), h.app, ref(t, "APP/a"), 32, nil, true)
	want(t, "data key", err, enclave.ErrAbsent)
	_, err = h.BeginStream(t.Context(), h.app, "encrypt", ref(t, "APP/a"), nil, nil, nil)
	want(t, "stream", err, enclave.ErrAbsent)
}

// TestGenerationIsUndone: a key whose record is not committed does not stay in the device.
func TestGenerationIsUndone(t *testing.T) {
	h, k := newResidentHouse(t)
	n := &NewKey{Name: "APP/k", Algorithm: keyspec.ECDSAP256, Protection: keyspec.HSM}
	if _, err := h.Create(t.Context(), h.app, n, []byte("request")); err != nil {
		t.Fatal(err)
	}
	key, err := h.Create(t.Context(), h.app, n, []byte("request"))
	if err != nil || key.Name != "APP/k" {
		t.Errorf("%v", err)
	}
	if k.count() != 1 {
		t.Errorf("%d keys in the device", k.count())
	}
}

// TestHungDevice: a device that hangs costs those who use it one wait, and others nothing; and it is used again when it is back.
func TestHungDevice(t *testing.T) {
	t.Parallel()
	h, k := newResidentHouse(t)
	h.createResident("APP/k", keyspec.ECDSAP256)
	h.create("APP/soft", keyspec.ECDSAP256)
	stuck := make(chan struct{})
	k.set(func() { k.hang = stuck })
	ctx, cancel := context.WithTimeout(t.Context(), slowAnswer+100*time.Millisecond)
	defer cancel()
	_, _, err := h.Sign(ctx, h.app, ref(t, "APP/k"), "", "", message, nil)
	want(t, "the first", err, context.DeadlineExceeded)
	if _, err := h.sign(h.app, "APP/soft", "message"); err != nil {
		t.Error(err)
	}
	began := time.Now()
	var wait sync.WaitGroup
	for range 20 {
		wait.Go(func() {
			_, err := h.sign(h.app, "APP/k", "message")
			want(t, "the others", err, enclave.ErrAbsent)
		})
	}
	wait.Wait()
	if took := time.Since(began); took > probeTime+2*time.Second {
		t.Errorf("the others waited %s", took)
	}
	close(stuck)
	for began = time.Now(); ; time.Sleep(10 * time.Millisecond) {
		_, err := h.sign(h.app, "APP/k", "message")
		if err == nil {
			break
		}
		if time.Since(began) > 2*time.Second {
			t.Fatalf("when it was back: %v", err)
		}
	}
}

func TestGateBoundsParallelism(t *testing.T) {
	h, k := newResidentHouse(t)
	k.parallel = 3
	h.createResident("APP/k", keyspec.ECDSAP256)
	stuck := make(chan struct{})
	k.set(func() { k.hang = stuck })
	var wait sync.WaitGroup
	var ok, busy atomic.Int64
	for range 3 + maxWaiting + 10 {
		wait.Go(func() {
			switch _, err := h.sign(h.app, "APP/k", "message"); {
			case err == nil:
				ok.Add(1)
			case errors.Is(err, enclave.ErrBusy):
				busy.Add(1)
			default:
				t.Error(err)
			}
		})
	}
	for busy.Load() < 10 {
		time.Sleep(time.Millisecond)
	}
	close(stuck)
	wait.Wait()
	if k.most.Load() != 3 || ok.Load() != 3+maxWaiting || busy.Load() != 10 {
		t.Errorf("%d at once, %d worked, %d were told that it is busy", k.most.Load(), ok.Load(), busy.Load())
	}
}

func TestPeekKnowsTheDevice(t *testing.T) {
	h, _ := newResidentHouse(t)
	h.createResident("APP/k", keyspec.ECDSAP256)
	h.create("APP/soft", keyspec.ECDSAP256)
	stranger := &Caller{UID: owner + 1, GID: 2, PID: 7}
	h.keys.clear()
	for name, device := range map[keyspec.Name]keyspec.Protection{"APP/k": keyspec.HSM, "APP/soft": "", "APP/none": ""} {
		if _, _, got := h.Peek(h.app, "sign", name); got != device {
			t.Errorf("%s: %q", name, got)
		}
		if row, _, got := h.Peek(stranger, "sign", name); got != "" || row != nil {
			t.Errorf("a stranger learns where %s is", name)
		}
	}
}

func TestResidentRecord(t *testing.T) {
	blob := make([]byte, enclave.MaxBlob)
	rand.Read(blob)
	for _, r := range []residentKey{
		{"tpm:/dev/tpmrm0", "000b", []byte("blob")},
		{"x", "", []byte{0}},
		{strings.Repeat("l", maxLocation), strings.Repeat("b", maxBinding), blob},
	} {
		b, err := r.encode()
		if err != nil || len(b) > keystore.MaxMaterial {
			t.Fatalf("%d bytes, %v", len(b), err)
		}
		got, err := decodeResident(b)
		if err != nil || got.location != r.location || got.binding != r.binding || !bytes.Equal(got.blob, r.blob) {
			t.Errorf("%+v, %v", got, err)
		}
		for _, bad := range [][]byte{nil, b[:len(b)-1], append(bytes.Clone(b), 0), {residentFormat}, {residentFormat, 0, 0, 0, 0, 0, 1, 1}} {
			_, err := decodeResident(bad)
			want(t, "damaged", err, keystore.ErrDamaged)
		}
		b[0]++
		_, err = decodeResident(b)
		want(t, "later format", err, ErrUnsupported)
	}
	for _, r := range []residentKey{{"", "", []byte{1}}, {"x", "", nil}, {strings.Repeat("l", maxLocation+1), "", []byte{1}}, {"x", "", append(blob, 0)}} {
		_, err := r.encode()
		want(t, "encode", err, ErrUnsupported)
	}
}

func FuzzResidentRecord(f *testing.F) {
	good, err := (&residentKey{"tpm:/dev/tpmrm0", "000b", []byte("blob")}).encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte{residentFormat, 0, 1, 'x', 0, 0, 0, 1, 1})
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := decodeResident(b)
		if err != nil {
			if !errors.Is(err, keystore.ErrDamaged) && !errors.Is(err, ErrUnsupported) {
				t.Errorf("%v", err)
			}
			return
		}
		again, err := r.encode()
		if err != nil || !bytes.Equal(again, b) {
			t.Errorf("%x, %v, was %x", again, err, b)
		}
	})
}

// TestRotateIntoAnotherDevice: a key whose device was exchanged for good goes on in the one that new keys are made in, and its old signatures
// still verify.
func TestRotateIntoAnotherDevice(t *testing.T) {
	h, old := newResidentHouse(t)
	h.createResident("APP/k", keyspec.ECDSAP256)
	sig, err := h.sign(h.app, "APP/k", "message")
	if err != nil {
		t.Fatal(err)
	}
	next := newToken()
	h.Engine.devices = rack{"hsm": old, "new hsm": next}
	old.set(func() { old.replaced = true; clear(old.keys) })
	_, err = h.sign(h.app, "APP/k", "message")
	want(t, "key of a device that was cleared", err, enclave.ErrReplaced)
	var device *enclave.Error
	if !errors.As(err, &device) || !strings.Contains(device.Remedy, "kmsctl key rotate") {
		t.Errorf("%v", err)
	}
	if _, err := h.Rotate(t.Context(), h.app, "APP/k", time.Time{}, time.Time{}, false); err != nil {
		t.Fatal(err)
	}
	if _, err := h.sign(h.app, "APP/k", "message"); err != nil || next.count() != 1 {
		t.Errorf("%v, %d keys in the new device", err, next.count())
	}
	if v, err := h.verify(h.app, "APP/k", "message", sig); err != nil || v.Version != 1 {
		t.Errorf("%+v, %v", v, err)
	}
}

// TestSlowDevice: a device that takes longer to say how it is than anybody waits is used again all the same, when it has said so.
func TestSlowDevice(t *testing.T) {
	t.Parallel()
	h, k := newResidentHouse(t)
	h.createResident("APP/k", keyspec.ECDSAP256)
	d, err := h.devices.Device(t.Context(), keyspec.HSM, "hsm", "")
	if err != nil {
		t.Fatal(err)
	}
	h.gates.of(&d).unanswered()
	slow := make(chan struct{})
	k.set(func() { k.hang = slow })
	_, err = h.sign(h.app, "APP/k", "message")
	want(t, "while it thinks", err, enclave.ErrAbsent)
	close(slow)
	for began := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		_, err := h.sign(h.app, "APP/k", "message")
		if err == nil {
			break
		}
		want(t, "after that", err, enclave.ErrAbsent)
		if time.Since(began) > 2*time.Second {
			t.Fatal("it is not used again")
		}
	}
}

// TestCallerLeaves: what is under way in a device is not called back when its caller leaves. It is finished, and its result dropped: a key
// that was made for nobody is destroyed.
func TestCallerLeaves(t *testing.T) {
	h, k := newResidentHouse(t)
	h.createResident("APP/k", keyspec.ECDSAP256)
	k.finished.Store(0)
	slow := make(chan struct{})
	k.set(func() { k.hang = slow })
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, _, err := h.Sign(ctx, h.app, ref(t, "APP/k"), "", "", message, nil)
	want(t, "sign", err, context.DeadlineExceeded)
	ctx, cancel = context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err = h.Create(ctx, h.app, &NewKey{Name: "APP/late", Algorithm: keyspec.ECDSAP256, Protection: keyspec.HSM}, nil)
	want(t, "create while the device is busy", err, context.DeadlineExceeded)
	if n := k.finished.Load(); n != 0 {
		t.Errorf("%d operations were called back", n)
	}
	close(slow)
	for k.finished.Load() != 1 {
		time.Sleep(time.Millisecond)
	}
	slow = make(chan struct{})
	k.set(func() { k.hang = slow })
	ctx, cancel = context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err = h.Create(ctx, h.app, &NewKey{Name: "APP/late", Algorithm: keyspec.ECDSAP256, Protection: keyspec.HSM}, nil)
	want(t, "create", err, context.DeadlineExceeded)
	close(slow)
	for k.made.Load() != 2 || k.count() != 1 {
		time.Sleep(time.Millisecond)
	}
	if _, err := h.sign(h.app, "APP/k", "message"); err != nil {
		t.Error(err)
	}
}

// TestDriverPanics: a panic of a driver is one of its operation, and no more.
func TestDriverPanics(t *testing.T) {
	h, k := newResidentHouse(t)
	h.createResident("APP/k", keyspec.ECDSAP256)
	k.set(func() { k.panics = true })
	_, err := h.sign(h.app, "APP/k", "message")
	want(t, "sign", err, ErrInternal)
	k.set(func() { k.panics = false })
	if _, err := h.sign(h.app, "APP/k", "message"); err != nil || h.Panics() != 1 {
		t.Errorf("%v, %d panics", err, h.Panics())
	}
}

// TestWithdrawnWhileWaiting: what is allowed no more when the turn of an operation comes is not carried out.
func TestWithdrawnWhileWaiting(t *testing.T) {
	for _, c := range []struct {
		name     string
		withdraw func(*house) error
		want     error
	}{
		{"nothing", func(h *house) error {
			_, err := h.Create(t.Context(), h.admin, &NewKey{Name: "APP/other", Algorithm: keyspec.Ed25519}, nil)
			return err
		}, nil},
		{"suspended", func(h *house) error {
			_, err := h.Suspend(t.Context(), h.admin, ref(t, "APP/k@1"))
			return err
		}, ErrState},
		{"to be destroyed", func(h *house) error {
			_, err := h.Destroy(t.Context(), h.admin, ref(t, "APP/k@1"), 0)
			return err
		}, ErrState},
		{"no grant", func(h *house) error { h.SetPolicy(policy.UserMode(h.app.UID + 1)); return nil }, ErrNotAvailable},
		{"locked", func(h *house) error { h.Lock(); return nil }, ErrLocked},
	} {
		t.Run(c.name, func(t *testing.T) {
			h, k := newResidentHouse(t)
			h.createResident("APP/k", keyspec.ECDSAP256)
			busy := make(chan struct{})
			k.set(func() { k.hang = busy })
			errs := make(chan error, 2)
			for range 2 {
				go func() {
					_, err := h.sign(h.app, "APP/k", "message")
					errs <- err
				}()
			}
			g := h.gates.of(&Device{Location: "hsm"})
			for waiting := 0; waiting == 0; time.Sleep(time.Millisecond) {
				g.mu.Lock()
				waiting = g.waiting
				g.mu.Unlock()
			}
			if err := c.withdraw(h); err != nil {
				t.Fatal(err)
			}
			close(busy)
			worked, waited := <-errs, <-errs
			if worked != nil {
				worked, waited = waited, worked
			}
			want(t, "what the device was working on", worked, nil)
			want(t, "what was waiting", waited, c.want)
		})
	}
}
