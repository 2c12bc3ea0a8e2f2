package tpm

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"sync/atomic"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// The two templates as MOSIP's client sends them, TPMT_PUBLIC by hand (TPM 2.0 part 2 section 12.2.4).
const (
	mosipSigning    = "0001" + "0004" + "00040072" + "0000" + "0010" + "0014" + "000b" + "0800" + "00010001" + "0000"
	mosipEncryption = "0001" + "000b" + "00020072" + "0020" + "837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa" +
		"0010" + "0017" + "000b" + "0800" + "00010001" + "0000"
)

// createPrimary has the TPM make a key of a template, in a command that is written by hand, and returns the TPMT_PUBLIC.
func (s *simulator) createPrimary(template string) (public []byte) {
	s.t.Helper()
	area, err := hex.DecodeString(template)
	if err != nil {
		s.t.Fatal(err)
	}
	s.other(func(b bare) {
		body := []byte{0x40, 0, 0, 0x0b}                              // TPM_RH_ENDORSEMENT
		body = append(body, 0, 0, 0, 9, 0x40, 0, 0, 9, 0, 0, 0, 0, 0) // empty password
		body = append(body, 0, 4, 0, 0, 0, 0)                         // empty sensitive data
		body = binary.BigEndian.AppendUint16(body, uint16(len(area)))
		body = append(body, area...)
		body = append(body, 0, 0, 0, 0, 0, 0) // neither outside info nor PCRs
		answer, err := b.Send(wire(tpm2.TPMSTSessions, tpm2.TPMCCCreatePrimary, body))
		if err != nil || responseCode(answer) != tpm2.TPMRCSuccess {
			s.t.Fatalf("TPM2_CreatePrimary: %#x, %v", uint32(responseCode(answer)), err)
		}
		handle := tpm2.TPMHandle(binary.BigEndian.Uint32(answer[10:]))
		public = bytes.Clone(answer[20 : 20+binary.BigEndian.Uint16(answer[18:])])
		if _, err := (tpm2.FlushContext{FlushHandle: handle}).Execute(b); err != nil {
			s.t.Fatal(err)
		}
	})
	return public
}

func machineSpec(u keyspec.Usage) enclave.Spec { return spec(keyspec.RSA2048, u) }

func adopt(t *testing.T, d *TPM, u keyspec.Usage) residentKey {
	t.Helper()
	blob, spki, err := d.MachineKey(limited(t), machineSpec(u))
	if err != nil {
		t.Fatal(err)
	}
	public, err := x509.ParsePKIXPublicKey(spki)
	if err != nil {
		t.Fatal(err)
	}
	return residentKey{d, blob, public}
}

func TestMachineKeys(t *testing.T) {
	t.Parallel()
	s := startSimulator(t)
	theirSigning, theirEncryption := s.createPrimary(mosipSigning), s.createPrimary(mosipEncryption)
	if len(theirSigning) != 280 || len(theirEncryption) != 312 {
		t.Fatalf("public parts of %d and %d bytes", len(theirSigning), len(theirEncryption))
	}
	d := s.open(Config{})
	signing, encryption := adopt(t, d, keyspec.Sign), adopt(t, d, keyspec.Decrypt)
	for _, x := range []struct {
		k     residentKey
		their []byte
	}{{signing, theirSigning}, {encryption, theirEncryption}} {
		decoded, _, err := decodeMachine(x.k.blob)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(decoded.public, x.their) {
			t.Errorf("adopted %x, MOSIP's client has %x", decoded.public, x.their)
		}
		if modulus := x.k.public.(*rsa.PublicKey).N.Bytes(); !bytes.HasSuffix(x.their, modulus) {
			t.Error("the SubjectPublicKeyInfo is of another key")
		}
	}
	uses := func() {
		t.Helper()
		message := []byte("a sub-packet in plain")
		digest := sha256.Sum256(message)
		for _, op := range []enclave.Op{
			{Input: message}, {Input: message, Scheme: keyspec.RSAPKCS1SHA256}, {Input: digest[:], Digest: true, Scheme: keyspec.RSAPKCS1SHA256},
		} {
			op.Usage = keyspec.Sign
			signature, err := signing.do(t, op)
			if err != nil {
				t.Fatal(err)
			}
			if err := rsa.VerifyPKCS1v15(signing.public.(*rsa.PublicKey), crypto.SHA256, digest[:], signature); err != nil {
				t.Error(err)
			}
		}
		secret := []byte("a data key")
		for label, want := range map[string]error{"\x00": nil, "": enclave.ErrDecryption, "other\x00": enclave.ErrDecryption, "other": enclave.ErrUnsupported} {
			sealed, err := rsa.EncryptOAEP(sha256.New(), rand.Reader, encryption.public.(*rsa.PublicKey), secret, []byte{0})
			if err != nil {
				t.Fatal(err)
			}
			got, err := encryption.do(t, enclave.Op{Usage: keyspec.Decrypt, Scheme: keyspec.RSAOAEPSHA256, Input: sealed, AAD: []byte(label)})
			if !errors.Is(err, want) || want == nil && !bytes.Equal(got, secret) {
				t.Errorf("label %q: %q, %v", label, got, err)
			}
		}
	}
	uses()

	// They are made once and kept, and adopting again keeps no second time.
	if n := s.count(tpm2.TPMHTPersistent); n != 2 {
		t.Errorf("%d objects are kept in the TPM", n)
	}
	again := adopt(t, d, keyspec.Sign)
	if !again.public.(*rsa.PublicKey).Equal(signing.public) || s.count(tpm2.TPMHTPersistent) != 2 {
		t.Error("adopting again made something new")
	}
	made := 0
	counting := s.openWith(Config{}, tapped(func(c []byte) []byte {
		if commandCode(c) == tpm2.TPMCCCreatePrimary {
			made++
		}
		return nil
	}, nil))
	signing.driver, encryption.driver = counting, counting
	uses()
	s.kill()
	s.start()
	uses()
	if made != 0 {
		t.Errorf("%d keys were made anew", made)
	}

	// Somebody evicts one: it is made again, and kept again.
	evict := func() {
		s.other(func(b bare) {
			list, err := tpm2.GetCapability{Capability: tpm2.TPMCapHandles, Property: uint32(machineFirst), PropertyCount: 16}.Execute(b)
			if err != nil {
				t.Fatal(err)
			}
			handles, _ := list.CapabilityData.Data.Handles()
			for _, h := range handles.Handle {
				p, err := tpm2.ReadPublic{ObjectHandle: h}.Execute(b)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := (tpm2.EvictControl{Auth: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
					ObjectHandle: &tpm2.NamedHandle{Handle: h, Name: p.Name}, PersistentHandle: h}).Execute(b); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
	evict()
	uses()
	if n := s.count(tpm2.TPMHTPersistent); n != 2 || made != 2 {
		t.Errorf("after an eviction %d objects are kept, and %d were made", n, made)
	}

	// Not kept at all, where the owner has a password that kmsd does not know: still the same keys.
	evict()
	s.other(func(b bare) {
		if err := b.withPassword(0x129, tpm2.TPMRHOwner, nil, []byte{0, 2, 'p', 'w'}); err != nil {
			t.Fatal(err)
		}
	})
	uses()
	if n := s.count(tpm2.TPMHTPersistent); n != 0 {
		t.Errorf("%d objects are kept", n)
	}
	if _, _, err := d.MachineKey(limited(t), machineSpec(keyspec.Sign)); !errors.Is(err, enclave.ErrMisconfigured) {
		t.Errorf("adopted without the owner's password: %v", err)
	}

	// Clearing a TPM changes neither its endorsement seed nor, so, the machine.
	s.clear()
	uses()

	// What the blobs are of use for, released.
	for _, k := range []residentKey{signing, encryption} {
		for range 2 {
			if err := k.driver.Destroy(limited(t), k.blob); err != nil {
				t.Error(err)
			}
		}
	}
	if n := s.count(tpm2.TPMHTPersistent); n != 0 {
		t.Errorf("%d objects are left in the TPM", n)
	}
	d.Close()
	counting.Close()
	if n := s.count(tpm2.TPMHTTransient); n != 0 {
		t.Errorf("%d objects are left loaded", n)
	}
	if n := s.count(tpm2.TPMHTLoadedSession); n != 0 {
		t.Errorf("%d sessions are left", n)
	}
}

func TestMachineKeyRefusals(t *testing.T) {
	t.Parallel()
	s := startSimulator(t)
	d := s.open(Config{})
	signing := adopt(t, d, keyspec.Sign)
	encryption := adopt(t, d, keyspec.Decrypt)
	digest := make([]byte, 32)
	for name, x := range map[string]struct {
		k    residentKey
		op   enclave.Op
		want error
	}{
		"another scheme":       {signing, enclave.Op{Usage: keyspec.Sign, Scheme: keyspec.RSAPSSSHA256, Input: digest, Digest: true}, enclave.ErrUnsupported},
		"another hash":         {signing, enclave.Op{Usage: keyspec.Sign, Scheme: keyspec.RSAPKCS1SHA512, Input: digest}, enclave.ErrUnsupported},
		"a short digest":       {signing, enclave.Op{Usage: keyspec.Sign, Input: digest[1:], Digest: true}, enclave.ErrUnsupported},
		"to decrypt":           {signing, enclave.Op{Usage: keyspec.Decrypt, Input: make([]byte, 256)}, enclave.ErrUnsupported},
		"to sign":              {encryption, enclave.Op{Usage: keyspec.Sign, Input: digest}, enclave.ErrUnsupported},
		"to agree":             {encryption, enclave.Op{Usage: keyspec.Agree, Input: digest}, enclave.ErrUnsupported},
		"a short ciphertext":   {encryption, enclave.Op{Usage: keyspec.Decrypt, Input: make([]byte, 255)}, enclave.ErrDecryption},
		"no ciphertext":        {encryption, enclave.Op{Usage: keyspec.Decrypt, Input: bytes.Repeat([]byte{7}, 256)}, enclave.ErrDecryption},
		"over the modulus":     {encryption, enclave.Op{Usage: keyspec.Decrypt, Input: bytes.Repeat([]byte{0xff}, 256)}, enclave.ErrDecryption},
		"a record that is not": {signing, enclave.Op{Usage: keyspec.Sign, Input: digest, Bound: []byte("another record")}, enclave.ErrCorrupt},
	} {
		if _, err := x.k.do(t, x.op); !errors.Is(err, x.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, sp := range []enclave.Spec{
		spec(keyspec.RSA3072, keyspec.Sign), spec(keyspec.RSA2048, keyspec.Sign, keyspec.Decrypt), spec(keyspec.RSA2048, keyspec.Verify), spec(keyspec.ECDSAP256, keyspec.Sign),
	} {
		if _, _, err := d.MachineKey(limited(t), sp); !errors.Is(err, enclave.ErrUnsupported) {
			t.Errorf("%+v: %v", sp, err)
		}
	}

	// Another TPM is another machine, which is said, whatever is asked of it; nothing is kept in it.
	other := startSimulator(t)
	for _, k := range []residentKey{signing, encryption} {
		k.driver = other.open(Config{})
		op := enclave.Op{Usage: keyspec.Sign, Input: digest}
		if k.public.(*rsa.PublicKey).Equal(encryption.public) {
			op = enclave.Op{Usage: keyspec.Decrypt, Input: make([]byte, 256)}
		}
		_, err := k.do(t, op)
		var e *enclave.Error
		if !errors.Is(err, enclave.ErrReplaced) || !errors.As(err, &e) || e.Remedy == "" {
			t.Errorf("another TPM: %v", err)
		}
		if err := k.driver.Destroy(limited(t), k.blob); err != nil {
			t.Errorf("destroying in another TPM: %v", err)
		}
	}
	if n := other.count(tpm2.TPMHTPersistent); n != 0 {
		t.Errorf("%d objects are kept in the other TPM", n)
	}

	// So is this one, once its endorsement seed was changed (TPM2_ChangeEPS, TPM 2.0 part 3 section 24.5).
	changed := startSimulator(t)
	k := adopt(t, changed.open(Config{}), keyspec.Sign)
	changed.other(func(b bare) {
		if err := b.withPassword(0x124, tpm2.TPMRHPlatform, nil, nil); err != nil {
			t.Fatal(err)
		}
	})
	if _, err := k.do(t, enclave.Op{Usage: keyspec.Sign, Input: digest}); !errors.Is(err, enclave.ErrReplaced) {
		t.Errorf("another endorsement seed: %v", err)
	}

	// A TPM that is locked out by wrong PINs refuses the keys, and says until when.
	pinned := s.open(Config{PIN: []byte("1234")})
	blob, _ := enrol(t, pinned, pin("1234"))
	for range 3 {
		unwrap(t, pinned, blob, pin("wrong"))
	}
	_, err := signing.do(t, enclave.Op{Usage: keyspec.Sign, Input: digest})
	var e *enclave.Error
	if !errors.Is(err, enclave.ErrLockedOut) || !errors.As(err, &e) || e.Until.IsZero() {
		t.Errorf("locked out: %v", err)
	}
}

// A decryption shows nothing to who listens on the bus.
func TestMachineKeyOnTheBus(t *testing.T) {
	t.Parallel()
	s := startSimulator(t)
	var heard traffic
	k := adopt(t, s.openWith(Config{}, tapped(heard.command, heard.answer)), keyspec.Decrypt)
	secret := []byte("a data key that nobody hears")
	sealed, err := rsa.EncryptOAEP(sha256.New(), rand.Reader, k.public.(*rsa.PublicKey), secret, []byte{0})
	if err != nil {
		t.Fatal(err)
	}
	got, err := k.do(t, enclave.Op{Usage: keyspec.Decrypt, Input: sealed, AAD: []byte{0}})
	if err != nil || !bytes.Equal(got, secret) {
		t.Fatalf("%q, %v", got, err)
	}
	if heard.contains(secret) {
		t.Error("the plaintext went over the bus")
	}
}

// FuzzMachineBlob checks that a blob that decodes encodes to itself, and that nothing else gets as far as the TPM.
func FuzzMachineBlob(f *testing.F) {
	for _, t := range []string{mosipSigning, mosipEncryption} {
		area, err := hex.DecodeString(t[:len(t)-4] + "0100")
		if err != nil {
			f.Fatal(err)
		}
		k := &machineKey{template: machineSigning, handle: machineFirst, salt: newSalt(), check: make([]byte, checkSize), public: append(area, bytes.Repeat([]byte{0xc1}, 256)...)}
		if len(area) > 30 {
			k.template = machineEncryption
		}
		b, err := k.encode()
		if err != nil {
			f.Fatal(err)
		}
		if _, _, err := decodeMachine(b); err != nil {
			f.Fatal(err)
		}
		_, body, err := enclave.DecodeBlob(machineKind, b)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(body)
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		b, err := enclave.EncodeBlob(machineKind, machineFormat, body)
		if err != nil {
			return
		}
		k, public, err := decodeMachine(b)
		if err != nil {
			if !errors.Is(err, enclave.ErrCorrupt) {
				t.Fatal(err)
			}
			return
		}
		if public.N.BitLen() != 2048 || public.E != 65537 || !isMachineHandle(k.handle) {
			t.Fatalf("key of %d bits under %#x", public.N.BitLen(), uint32(k.handle))
		}
		if again, err := k.encode(); err != nil || !bytes.Equal(again, b) {
			t.Fatalf("%x became %x, %v", []byte(b), []byte(again), err)
		}
	})
}

// A TPM has three slots for objects; the keys of a machine take turns in them with others.
func TestMachineKeysBesideOthers(t *testing.T) {
	t.Parallel()
	s := startSimulator(t)
	full := 0
	d := s.openWith(Config{}, tapped(nil, func(_, answer []byte) []byte {
		if isFull(responseCode(answer)) {
			full++
		}
		return answer
	}))
	var keys []residentKey
	for range 3 {
		keys = append(keys, generate(t, d, spec(keyspec.ECDSAP256, keyspec.Sign)))
	}
	signing, encryption := adopt(t, d, keyspec.Sign), adopt(t, d, keyspec.Decrypt)
	blob, secret := enrol(t, d, enclave.Auth{})
	for range 3 {
		for _, k := range append(keys, signing) {
			if _, err := k.do(t, enclave.Op{Usage: keyspec.Sign, Input: []byte("message")}); err != nil {
				t.Fatal(err)
			}
		}
		sealed, err := rsa.EncryptOAEP(sha256.New(), rand.Reader, encryption.public.(*rsa.PublicKey), []byte("data"), []byte{0})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := encryption.do(t, enclave.Op{Usage: keyspec.Decrypt, Input: sealed, AAD: []byte{0}}); err != nil {
			t.Fatal(err)
		}
		opens(t, d, blob, enclave.Auth{}, secret)
	}
	if full > 0 {
		t.Errorf("the TPM was full %d times", full)
	}
}

// The connection breaks while a key is to be kept: what was loaded over it is not taken for loaded later on.
func TestMachineKeyIsNotKept(t *testing.T) {
	t.Parallel()
	s := startSimulator(t)
	var breaks atomic.Bool
	d := s.openWith(Config{}, tapped(func(command []byte) []byte {
		if commandCode(command) == tpm2.TPMCCEvictControl && breaks.CompareAndSwap(true, false) {
			s.kill()
		}
		return nil
	}, nil))
	signing := adopt(t, d, keyspec.Sign)
	other := generate(t, d, spec(keyspec.ECDSAP256, keyspec.Sign))
	if err := d.Destroy(limited(t), signing.blob); err != nil {
		t.Fatal(err)
	}
	breaks.Store(true)
	if _, err := signing.do(t, enclave.Op{Usage: keyspec.Sign, Input: []byte("message")}); !errors.Is(err, enclave.ErrAbsent) {
		t.Fatal(err)
	}
	s.start()
	for _, k := range []residentKey{other, signing} { // other things have its handle now
		if _, err := k.do(t, enclave.Op{Usage: keyspec.Sign, Input: []byte("message")}); err != nil {
			t.Error(err)
		}
	}
}
