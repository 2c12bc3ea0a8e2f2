package engine

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/client/packet"
	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/mechanism"
)

// machineToken is a token that holds the identity of a machine: one key for each use, the same ones each time.
type machineToken struct {
	*token
	sign, decrypt []byte // material
}

func (k *machineToken) MachineKey(ctx context.Context, s enclave.Spec) (enclave.Blob, []byte, error) {
	if err := k.enter(ctx); err != nil {
		return nil, nil, err
	}
	material := k.decrypt
	if slices.Contains(s.Usages, keyspec.Sign) {
		material = k.sign
	}
	row, err := mechanism.Lookup(s.Algorithm)
	if err != nil {
		return nil, nil, err
	}
	key, err := row.Load(material)
	if err != nil {
		return nil, nil, err
	}
	spki, err := key.SPKI()
	if err != nil {
		return nil, nil, err
	}
	blob := fmt.Appendf(nil, "%s\x00%x\x00%s", s.Algorithm, s.ID, s.AAD)
	k.mu.Lock()
	defer k.mu.Unlock()
	k.keys[string(blob)] = material
	return blob, spki, nil
}

// machineRack has such a token at every location.
type machineRack struct{ k *machineToken }

func (r machineRack) Device(_ context.Context, _ keyspec.Protection, location, _ string) (Device, error) {
	if location == "" {
		location = "tpm"
	}
	return Device{Location: location, Enclave: r.k, Resident: r.k}, nil
}

func newMachineHouse(t *testing.T) (*house, *machineToken) {
	t.Helper()
	row, err := mechanism.Lookup(keyspec.RSA2048)
	if err != nil {
		t.Fatal(err)
	}
	k := &machineToken{token: newToken()}
	for _, into := range []*[]byte{&k.sign, &k.decrypt} {
		if *into, err = row.Generate(); err != nil {
			t.Fatal(err)
		}
	}
	h := newHouse(t)
	h.Engine.devices = machineRack{k}
	return h, k
}

// sealImport seals key material to a one-time key of the engine.
func (h *house) sealImport(c *Caller, encoded []byte) (wrapped []byte, token ImportToken) {
	h.t.Helper()
	public, token, err := h.ImportBegin(h.t.Context(), c)
	if err != nil {
		h.t.Fatal(err)
	}
	return h.seal(public, encoded), token
}

func pkcs8Of(t *testing.T, bits int) []byte {
	t.Helper()
	private, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		t.Fatal(err)
	}
	encoded, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return encoded
}

func TestMachineInDevice(t *testing.T) {
	t.Parallel()
	h, k := newMachineHouse(t)
	ctx := t.Context()

	// Many at once make one identity.
	var wg sync.WaitGroup
	adopted := make(chan bool, 8)
	for range cap(adopted) {
		wg.Go(func() {
			m, err := h.MachineAdopt(ctx, h.admin, &NewMachine{Name: "MACHINE", MachineName: "reg-1"})
			if err != nil {
				t.Error(err)
				return
			}
			adopted <- m.Adopted
		})
	}
	wg.Wait()
	close(adopted)
	count := 0
	for a := range adopted {
		if a {
			count++
		}
	}
	if count != 1 {
		t.Errorf("adopted %d times", count)
	}
	m, err := h.Machine(ctx, h.app, "MACHINE")
	if err != nil {
		t.Fatal(err)
	}
	public, use, err := packet.ParseMachineKey(m.Encrypt.Public)
	if err != nil || use != packet.MachineEncryption || m.Encrypt.Index != packet.KeyIndex(m.Encrypt.Public) || m.Encrypt.Location != "tpm" || m.MachineName != "reg-1" {
		t.Fatalf("%+v, %v", m.Encrypt, err)
	}
	if key := m.Sign.Key; key.Origin != keyspec.Generated || key.Protection != keyspec.TPM || key.Profile != mechanism.ProfileMOSIPMachine || !key.Versions[0].Expires.IsZero() {
		t.Errorf("%+v", key)
	}

	// They are used like every other key, by their usage alone.
	sealed, err := packet.EncryptClientBlock(public, packet.PaddingTPM, []byte("data"))
	if err != nil {
		t.Fatal(err)
	}
	data, _, err := h.DecryptWith(ctx, h.app, ref(t, "MACHINE/ENCRYPT"), keyspec.RSAOAEPSHA256, sealed, nil, []byte{0}, nil)
	if err != nil || string(data) != "data" {
		t.Errorf("%q, %v", data, err)
	}
	_, _, err = h.Sign(ctx, h.app, ref(t, "MACHINE/ENCRYPT"), keyspec.RSAPKCS1SHA256, "", message, nil)
	want(t, "sign with the encryption key", err, ErrUsage)
	_, _, err = h.DecryptWith(ctx, h.app, ref(t, "MACHINE/SIGN"), "", sealed, nil, nil, nil)
	want(t, "decrypt with the signing key", err, ErrUsage)
	_, err = h.Rotate(ctx, h.admin, "MACHINE/SIGN", h.clock.Now(), h.clock.Now(), false)
	want(t, "rotate", err, ErrUnsupported)

	// Who has no right to the keys does not learn that there are any; and nobody adopts or releases but on the admin socket.
	stranger := &Caller{UID: owner + 1, PID: 7}
	_, err = h.Machine(ctx, stranger, "MACHINE")
	want(t, "show to a stranger", err, ErrNotAvailable)
	_, err = h.Machine(ctx, stranger, "NOTHING")
	want(t, "show nothing to a stranger", err, ErrNotAvailable)
	_, err = h.MachineAdopt(ctx, h.app, &NewMachine{Name: "OTHER"})
	want(t, "adopt on the application socket", err, ErrUnsupported)
	want(t, "release on the application socket", h.MachineRelease(ctx, h.app, "MACHINE"), ErrUnsupported)
	_, err = h.Machine(ctx, h.app, "")
	want(t, "no name", err, ErrInput)

	// The identity that was expected, or none: nothing of the other is kept in the device.
	before := k.count()
	_, err = h.MachineAdopt(ctx, h.admin, &NewMachine{Name: "OTHER", Expect: "00:11"})
	want(t, "another identity than expected", err, enclave.ErrReplaced)
	if k.count() != before {
		t.Errorf("%d keys in the device, before %d", k.count(), before)
	}
	if _, err := h.MachineAdopt(ctx, h.admin, &NewMachine{Name: "OTHER", Expect: m.Sign.Index}); err != nil {
		t.Error(err)
	}

	// A device that is away, and another one.
	k.set(func() { k.fault = &enclave.Error{Kind: enclave.ErrAbsent, Detail: "gone"} })
	_, err = h.MachineAdopt(ctx, h.admin, &NewMachine{Name: "THIRD"})
	want(t, "adopt without the device", err, enclave.ErrAbsent)
	var remedied *Remedied
	if !errors.As(err, &remedied) || remedied.Remedy == "" {
		t.Errorf("no remedy: %v", err)
	}
	k.set(func() { k.fault = nil })
	k.sign, k.decrypt = k.decrypt, k.sign
	_, err = h.MachineAdopt(ctx, h.admin, &NewMachine{Name: "MACHINE"})
	want(t, "another identity under the same name", err, ErrMachine)
	k.sign, k.decrypt = k.decrypt, k.sign

	// Released, and adopted again, as a second version.
	if err := h.MachineRelease(ctx, h.admin, "MACHINE"); err != nil {
		t.Fatal(err)
	}
	_, err = h.Machine(ctx, h.app, "MACHINE")
	want(t, "show what was released", err, ErrState)
	want(t, "release again", h.MachineRelease(ctx, h.admin, "MACHINE"), ErrState)
	_, _, err = h.Sign(ctx, h.app, ref(t, "MACHINE/SIGN"), keyspec.RSAPKCS1SHA256, "", message, nil)
	want(t, "sign with what was released", err, ErrState)
	again, err := h.MachineAdopt(ctx, h.admin, &NewMachine{Name: "MACHINE", MachineName: "reg-2"})
	if err != nil {
		t.Fatal(err)
	}
	if !again.Adopted || again.Sign.Version != 2 || again.Sign.Index != m.Sign.Index || again.MachineName != "reg-2" {
		t.Errorf("%+v", again)
	}
	if _, number, err := h.Sign(ctx, h.app, ref(t, "MACHINE/SIGN"), keyspec.RSAPKCS1SHA256, "", message, nil); err != nil || number != 2 {
		t.Errorf("version %d, %v", number, err)
	}
	want(t, "release of what is no machine", h.MachineRelease(ctx, h.admin, "NOTHING"), ErrNotAvailable)
	h.restart()
	h.Engine.devices = machineRack{k}
	if _, _, err := h.Sign(ctx, h.app, ref(t, "MACHINE/SIGN"), keyspec.RSAPKCS1SHA256, "", message, nil); err != nil {
		t.Error(err)
	}
}

func TestMachineFromFile(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	ctx := t.Context()
	encoded := pkcs8Of(t, 2048)
	adopt := func(name keyspec.Name, encoded []byte, n NewMachine) (*Machine, error) {
		n.Name = name
		n.Wrapped, n.Token = h.sealImport(h.admin, encoded)
		return h.MachineAdopt(ctx, h.admin, &n)
	}
	m, err := adopt("MACHINE", encoded, NewMachine{MachineName: "reg-1"})
	if err != nil {
		t.Fatal(err)
	}
	if !m.Adopted || !bytes.Equal(m.Sign.Public, m.Encrypt.Public) || !bytes.Equal(m.Sign.Public, m.Sign.SPKI) || m.Sign.Location != "" ||
		m.Sign.Key.Origin != keyspec.Imported || m.Sign.Key.Exportable {
		t.Errorf("%+v", m)
	}
	if m, err = adopt("MACHINE", encoded, NewMachine{}); err != nil || m.Adopted || m.MachineName != "reg-1" {
		t.Errorf("again: %+v, %v", m, err)
	}
	if _, _, err := h.Sign(ctx, h.app, ref(t, "MACHINE/SIGN"), keyspec.RSAPKCS1SHA256, "", message, nil); err != nil {
		t.Error(err)
	}
	parsed, err := x509.ParsePKIXPublicKey(m.Encrypt.SPKI)
	if err != nil {
		t.Fatal(err)
	}
	schemes := map[packet.Padding]keyspec.Scheme{packet.PaddingFile: keyspec.RSAOAEPSHA256, packet.PaddingAndroid: keyspec.RSAOAEPSHA256MGF1SHA1}
	for padding := range schemes {
		sealed, err := packet.EncryptClientBlock(parsed.(*rsa.PublicKey), padding, []byte("data"))
		if err != nil {
			t.Fatal(err)
		}
		for other, scheme := range schemes {
			data, _, err := h.DecryptWith(ctx, h.app, ref(t, "MACHINE/ENCRYPT"), scheme, sealed, nil, nil, nil)
			if other == padding && (err != nil || string(data) != "data") {
				t.Errorf("%s: %q, %v", padding, data, err)
			}
			if other != padding {
				want(t, "the other padding", err, ErrDecryption)
			}
		}
	}
	_, _, err = h.DecryptWith(ctx, h.app, ref(t, "MACHINE/ENCRYPT"), keyspec.RSAPKCS1SHA256, make([]byte, 256), nil, nil, nil)
	want(t, "a scheme for signatures", err, mechanism.ErrInput)

	for name, bad := range map[string][]byte{"rsa-3072": pkcs8Of(t, 3072), "nothing": []byte("nothing"), "empty": {0}} {
		if _, err := adopt("OTHER", bad, NewMachine{}); err == nil {
			t.Errorf("%s was adopted", name)
		}
	}
	_, err = adopt("OTHER", encoded, NewMachine{Location: "tpm:/dev/tpm0"})
	want(t, "a file and a TPM", err, ErrInput)
	wrapped, token := h.sealImport(h.admin, encoded)
	spent := &NewMachine{Name: "OTHER", Wrapped: wrapped, Token: token}
	if _, err := h.MachineAdopt(ctx, h.admin, spent); err != nil {
		t.Fatal(err)
	}
	_, err = h.MachineAdopt(ctx, h.admin, spent)
	want(t, "a spent token", err, ErrInput)
	_, err = adopt("MACHINE", pkcs8Of(t, 2048), NewMachine{})
	want(t, "another key under the same name", err, ErrMachine)
	h.create("APP/SIGN", keyspec.RSA2048)
	_, err = adopt("APP", encoded, NewMachine{})
	want(t, "a name that another key has", err, ErrMachine)

	// Released, the key is gone.
	if err := h.MachineRelease(ctx, h.admin, "MACHINE"); err != nil {
		t.Fatal(err)
	}
	if m, err = adopt("MACHINE", encoded, NewMachine{}); err != nil || m.Sign.Version != 2 {
		t.Errorf("%+v, %v", m, err)
	}
}

// An application of the same name makes no generation of a machine's key, whichever was there first.
func TestMachineIsNoApplication(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	h.hierarchy()
	ctx := t.Context()
	adopt := func(name keyspec.Name) error {
		wrapped, token := h.sealImport(h.admin, pkcs8Of(t, 2048))
		_, err := h.MachineAdopt(ctx, h.admin, &NewMachine{Name: name, Wrapped: wrapped, Token: token})
		return err
	}
	for _, name := range []keyspec.Name{"ROOT", "REGISTRATION", "REGISTRATION/10001"} {
		want(t, "an identity below "+string(name), adopt(name), ErrInput)
	}
	if err := adopt("MACHINE"); err != nil {
		t.Fatal(err)
	}
	if _, err := h.SetApplication(ctx, h.admin, &Application{Name: "MACHINE"}); err != nil {
		t.Fatal(err)
	}
	h.master(Master{Name: "MACHINE"})
	for _, m := range []Master{{Name: "MACHINE/SIGN"}, {Name: "MACHINE/SIGN", Force: true}} {
		_, err := h.MasterGenerate(ctx, h.admin, &m)
		want(t, "a generation", err, ErrUnsupported)
	}
	_, err := h.CertCurrent(ctx, h.admin, "MACHINE/ENCRYPT", nil)
	want(t, "a base key", err, ErrUnsupported)
	_, err = h.Revoke(ctx, h.admin, keyspec.Ref{Name: "MACHINE/ENCRYPT"}, keyspec.Superseded, ReplaceYes)
	if err == nil {
		t.Error("revoked with a successor")
	}
	m, err := h.Machine(ctx, h.admin, "MACHINE")
	if err != nil {
		t.Fatal(err)
	}
	_, signer, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	public, err := x509.ParsePKIXPublicKey(m.Sign.SPKI)
	if err != nil {
		t.Fatal(err)
	}
	short := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "machine"}, NotBefore: h.clock.Now().Add(-time.Hour), NotAfter: h.clock.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature}
	der, err := x509.CreateCertificate(nil, short, short, public, signer)
	if err != nil {
		t.Fatal(err)
	}
	if short, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	if c, err := h.CertUpload(ctx, h.admin, keyspec.Ref{Name: "MACHINE/SIGN"}, []*x509.Certificate{short}, ""); err != nil || !c.Expires.IsZero() {
		t.Errorf("with a certificate from outside the key expires: %+v, %v", c, err)
	}
	_, err = h.ExportMOSIP(ctx, h.admin, keyspec.Ref{Name: "MACHINE/ENCRYPT"}, 0, true)
	want(t, "exported as a base key", err, ErrUnsupported)
	m, err = h.Machine(ctx, h.admin, "MACHINE")
	if err != nil || m.Sign.Version != 1 || m.Encrypt.Version != 1 {
		t.Errorf("%+v, %v", m, err)
	}
}

// Nothing but adoption makes keys of the profile, or two keys of one RSA key that sign and decrypt.
func TestOneKeyOnePurpose(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	ctx := t.Context()
	encoded := pkcs8Of(t, 2048)
	sign, decrypt := []keyspec.Usage{keyspec.Sign, keyspec.Verify}, []keyspec.Usage{keyspec.Encrypt, keyspec.Decrypt}
	for _, usages := range [][]keyspec.Usage{sign, decrypt, {keyspec.Sign, keyspec.Decrypt}} {
		n := &NewKey{Name: "APP/machine", Algorithm: keyspec.RSA2048, Usages: usages, Profile: mechanism.ProfileMOSIPMachine}
		_, err := h.Create(ctx, h.admin, n, nil)
		if err == nil {
			t.Errorf("created for %v", usages)
		}
		_, err = h.Import(ctx, h.admin, n, bytes.Clone(encoded), nil)
		if err == nil {
			t.Errorf("imported for %v", usages)
		}
		wrapped, token := h.sealImport(h.app, encoded)
		if _, err := h.ImportWrapped(ctx, h.app, n, wrapped, token, nil); err == nil {
			t.Errorf("imported sealed for %v", usages)
		}
	}
	imported := func(name keyspec.Name, usages []keyspec.Usage, profile string) error {
		_, err := h.Import(ctx, h.admin, &NewKey{Name: name, Algorithm: keyspec.RSA2048, Usages: usages, Profile: profile}, bytes.Clone(encoded), nil)
		return err
	}
	if err := imported("APP/signs", sign, ""); err != nil {
		t.Fatal(err)
	}
	want(t, "the other purpose", imported("APP/decrypts", decrypt, ""), ErrInput)
	want(t, "the other purpose, wrapping", imported("APP/wraps", []keyspec.Usage{keyspec.Wrap, keyspec.Unwrap}, ""), ErrInput)
	if err := imported("APP/public", []keyspec.Usage{keyspec.Encrypt}, ""); err != nil {
		t.Errorf("the public half alone: %v", err)
	}
	if err := imported("APP/too", sign, ""); err != nil {
		t.Errorf("the same purpose: %v", err)
	}
	if _, err := h.Create(ctx, h.app, &NewKey{Name: "APP/fresh", Algorithm: keyspec.RSA2048, Usages: decrypt}, nil); err != nil {
		t.Errorf("another key: %v", err)
	}
}

// However many records share an RSA key, and whichever was written last, no import adds the other purpose.
func TestOneKeyOnePurposeOfMany(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	ctx := t.Context()
	sign, decrypt := []keyspec.Usage{keyspec.Sign, keyspec.Verify}, []keyspec.Usage{keyspec.Encrypt, keyspec.Decrypt}
	imported := func(name keyspec.Name, encoded []byte, usages []keyspec.Usage, profile string) error {
		_, err := h.Import(ctx, h.admin, &NewKey{Name: name, Algorithm: keyspec.RSA2048, Usages: usages, Profile: profile}, bytes.Clone(encoded), nil)
		return err
	}
	machine := pkcs8Of(t, 2048)
	wrapped, token := h.sealImport(h.admin, machine)
	if _, err := h.MachineAdopt(ctx, h.admin, &NewMachine{Name: "MACHINE", Wrapped: wrapped, Token: token}); err != nil {
		t.Fatal(err)
	}
	for name, usages := range map[keyspec.Name][]keyspec.Usage{"APP/signs": sign, "APP/decrypts": decrypt} {
		want(t, "the key of a machine, "+string(name), imported(name, machine, usages, ""), ErrInput)
	}

	several := pkcs8Of(t, 2048)
	if err := imported("APP/first", several, sign, ""); err != nil {
		t.Fatal(err)
	}
	if err := imported("APP/public", several, []keyspec.Usage{keyspec.Encrypt}, ""); err != nil {
		t.Fatal(err)
	}
	want(t, "behind a public half", imported("APP/second", several, decrypt, ""), ErrInput)

	module := pkcs8Of(t, 2048)
	if err := imported("APP/decrypts", module, decrypt, ""); err != nil {
		t.Fatal(err)
	}
	want(t, "as a module key", imported("OTHER", module, nil, mechanism.ProfileMOSIPModule), ErrInput)
}

var _ enclave.Machine = (*machineToken)(nil)
