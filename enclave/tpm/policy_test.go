package tpm

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/kmsd-project/kmsd/enclave"
)

func TestPCRChangeIsRefused(t *testing.T) {
	for _, guard := range []Guard{Sealed, Agreed} {
		s := startSimulator(t)
		d := s.open(Config{Guard: guard, PCRs: []int{7}})
		if !d.NeedsRecovery() || len(d.Info().Warnings) == 0 {
			t.Error("nobody is told that PCRs need another slot")
		}
		blob, secret := enrol(t, d, enclave.Auth{})
		s.extend(11) // another one
		opens(t, d, blob, enclave.Auth{}, secret)

		// Without the policy there is no way in, even with the right auth value.
		sl, err := decodeSlot(blob)
		if err != nil {
			t.Fatal(err)
		}
		auth := authValue(sl.salt, labelSlot, nil)
		sl.pcrs = 0
		without, err := sl.encode()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := unwrap(t, d, without, enclave.Auth{}); err == nil {
			t.Error("the slot opens without its policy")
		}
		_, err = call(limited(t), d, func(d *device) ([]byte, error) {
			root, err := d.storageKey()
			if err != nil {
				return nil, err
			}
			o, err := d.load(root, sl.public, sl.private)
			if err != nil {
				return nil, err
			}
			defer d.flush(o)
			_, err = tpm2.Unseal{ItemHandle: o.with(tpm2.PasswordAuth(auth))}.Execute(d)
			return nil, err
		})
		if err == nil {
			t.Error("the TPM takes the password alone")
		}

		s.extend(7)
		_, err = unwrap(t, d, blob, enclave.Auth{})
		var e *enclave.Error
		if !errors.Is(err, enclave.ErrPolicy) || !errors.As(err, &e) || e.Remedy == "" {
			t.Errorf("after a change of PCR 7: %v", err)
		}
		// The policy is refused before the PIN is looked at, so a changed PCR costs no attempts.
		if n := s.property(tpm2.TPMPTLockoutCounter); n != 0 {
			t.Errorf("%d attempts counted", n)
		}
	}
}

// A PCR that changes between the policy and its use (TPM_RC_PCR_CHANGED) makes the session useless, not the slot.
func TestPCRChangesMeanwhile(t *testing.T) {
	s := startSimulator(t)
	var left, seen atomic.Int32
	var l link
	d := s.openWith(Config{PCRs: []int{7}}, func(a address) (link, error) {
		var err error
		if l, err = a.dial(); err != nil {
			return nil, err
		}
		return &tap{link: l, before: func(command []byte) []byte {
			if commandCode(command) == tpm2.TPMCCUnseal && left.Add(-1) >= 0 {
				extend(t, bare{l}, 10)
			}
			return nil
		}, after: func(_, answer []byte) []byte {
			if responseCode(answer) == tpm2.TPMRCPCRChanged {
				seen.Add(1)
			}
			return answer
		}}, nil
	})
	blob, secret := enrol(t, d, enclave.Auth{})
	left.Store(3)
	opens(t, d, blob, enclave.Auth{}, secret)
	if seen.Load() != 3 {
		t.Errorf("the TPM complained %d times, so this test shows nothing", seen.Load())
	}
	left.Store(1000)
	if _, err := unwrap(t, d, blob, enclave.Auth{}); !errors.Is(err, enclave.ErrPolicy) {
		t.Error(err)
	}
	left.Store(0)
	opens(t, d, blob, enclave.Auth{}, secret)
}

// signedSlot is a slot whose PCRs somebody has to approve.
type signedSlot struct {
	driver    *TPM
	signer    crypto.Signer
	approvals string
	blob      enclave.Blob
	secret    []byte
}

var signedPCRs = []int{7, 16}

func (s *simulator) openSigned(t *testing.T) *signedSlot {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return s.openSignedBy(t, k)
}

// openSignedBy makes the slot and leaves it without an approval.
func (s *simulator) openSignedBy(t *testing.T, k crypto.Signer) *signedSlot {
	t.Helper()
	x := &signedSlot{signer: k, approvals: filepath.Join(t.TempDir(), "approvals.json")}
	x.driver = s.open(Config{Signer: k.Public(), Approvals: x.approvals})
	if !x.driver.NeedsRecovery() {
		t.Error("nobody is told that PCRs need another slot")
	}
	x.secret = make([]byte, enclave.SecretSize)
	rand.Read(x.secret)
	var err error
	if x.blob, err = x.driver.Wrap(limited(t), x.secret, testAAD); err != nil {
		t.Fatal(err)
	}
	return x
}

// approve approves the present state.
func (x *signedSlot) approve(t *testing.T, k crypto.Signer, list []int) Approval {
	t.Helper()
	values, err := x.driver.PCRs(limited(t), list)
	if err != nil {
		t.Fatal(err)
	}
	a, err := SignApproval(k, list, values)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func (x *signedSlot) publish(t *testing.T, list ...Approval) {
	t.Helper()
	file, err := MarshalApprovals(list)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(x.approvals, file, 0o644); err != nil {
		t.Fatal(err)
	}
}

func (x *signedSlot) refused(t *testing.T, why string) {
	t.Helper()
	if _, err := unwrap(t, x.driver, x.blob, enclave.Auth{}); !errors.Is(err, enclave.ErrPolicy) {
		t.Errorf("%s: %v", why, err)
	}
}

func TestSignedPolicy(t *testing.T) {
	t.Parallel()
	p256, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rsa2048, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range []crypto.Signer{p256, rsa2048} {
		s := startSimulator(t)
		x := s.openSignedBy(t, k)
		x.refused(t, "no file of approvals")
		first := x.approve(t, k, signedPCRs)
		x.publish(t, first)
		opens(t, x.driver, x.blob, enclave.Auth{}, x.secret)

		s.extend(16) // an update
		x.refused(t, "stale approval")
		// The TPM refuses it itself, not only our choice among the approvals.
		_, err := call(limited(t), x.driver, func(d *device) ([]byte, error) {
			session, end, err := tpm2.PolicySession(d, tpm2.TPMAlgSHA256, nonceSize)
			if err != nil {
				return nil, err
			}
			defer end()
			return nil, d.policyAuthorize(session, x.driver.signer, first)
		})
		if !errors.Is(err, enclave.ErrPolicy) || !isOneOf(err, tpm2.TPMRCValue) {
			t.Errorf("stale approval in the TPM: %v", err)
		}

		second := x.approve(t, k, signedPCRs)
		x.publish(t, first, second)
		opens(t, x.driver, x.blob, enclave.Auth{}, x.secret) // the same blob

		// Other PCRs are the signer's choice too.
		s.extend(16)
		x.publish(t, first, second, x.approve(t, k, []int{11}))
		opens(t, x.driver, x.blob, enclave.Auth{}, x.secret)

		stranger, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		forged := x.approve(t, stranger, signedPCRs)
		x.publish(t, forged)
		x.refused(t, "approval of a stranger")
		forged.Key = first.Key
		x.publish(t, forged)
		x.refused(t, "approval of a stranger in the name of the signer")
		forged.Signature = second.Signature
		x.publish(t, forged)
		x.refused(t, "signature of another approval")
		forged.Policy = first.Policy
		x.publish(t, forged)
		x.refused(t, "policy of another state")
		if err := os.WriteFile(x.approvals, []byte(`{"sha256":[{}]}`), 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := unwrap(t, x.driver, x.blob, enclave.Auth{}); !errors.Is(err, enclave.ErrMisconfigured) {
			t.Errorf("malformed file: %v", err)
		}
		if n := s.count(tpm2.TPMHTHMACSession) + s.count(tpm2.TPMHTTransient); n != 0 {
			t.Errorf("%d sessions and objects are left", n)
		}
	}
}

// A file that systemd-measure 252 wrote, for a key of the test.
func TestApprovalsOfSystemd(t *testing.T) {
	file, err := os.ReadFile("testdata/systemd-measure.json")
	if err != nil {
		t.Fatal(err)
	}
	pub, err := os.ReadFile("testdata/systemd-measure.spki")
	if err != nil {
		t.Fatal(err)
	}
	k, err := x509.ParsePKIXPublicKey(pub)
	if err != nil {
		t.Fatal(err)
	}
	list, err := ParseApprovals(file)
	if err != nil {
		t.Fatal(err)
	}
	if len(list) == 0 {
		t.Fatal("no approvals")
	}
	for _, a := range list {
		if id, err := fingerprint(k); err != nil || !slices.Equal(id, a.Key) {
			t.Errorf("key %x, %v", a.Key, err)
		}
		if !a.Verify(k) || !slices.Equal(a.PCRs, []int{11}) {
			t.Errorf("%+v", a)
		}
		a.Policy[0] ^= 1
		if a.Verify(k) {
			t.Error("another policy verifies")
		}
	}
}

func TestConfig(t *testing.T) {
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p256, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []Config{
		{Device: ""},
		{Device: "tpm0"},
		{Device: "unix:relative"},
		{Binding: "00"},
		{Binding: "storage key"},
		{Guard: "guarded"},
		{PIN: []byte("123")},
		{PIN: make([]byte, maxPIN+1)},
		{OwnerPassword: []byte("with\x00zero")},
		{PCRs: []int{24}},
		{PCRs: []int{-1}},
		{PCRs: []int{7, 7}},
		{PCRs: []int{7}, Signer: p256.Public(), Approvals: "/approvals"},
		{Signer: p384.Public(), Approvals: "/approvals"},
		{Signer: p256.Public()},
		{Signer: "a key"},
	} {
		if c.Device == "" && (c.Binding != "" || c.Guard != "" || c.PIN != nil || c.OwnerPassword != nil || c.PCRs != nil || c.Signer != nil) {
			c.Device = "/dev/tpmrm0"
		}
		if d, err := Open(c); !errors.Is(err, enclave.ErrMisconfigured) {
			t.Errorf("%+v: %v", c, err)
			if err == nil {
				d.Close()
			}
		}
	}
}
