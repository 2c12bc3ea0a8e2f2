//go:build linux

package client_test

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kmsd-project/kmsd/client"
	"github.com/kmsd-project/kmsd/client/packet"
	"github.com/kmsd-project/kmsd/enclave/tpm/swtpmtest"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// machines adopts one identity from a TPM and one from a file, whose key it returns too.
func machines(t *testing.T) (inTPM, inFile *client.Machine, private *rsa.PrivateKey, c *client.Client) {
	t.Helper()
	s, err := swtpmtest.Start()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	c = dial(t, client.WithAdmin())
	n := names.Add(1)
	a := client.Adoption{Name: fmt.Sprintf("TPM%d", n), Machine: "reg-1", TPM: "tpm:unix:" + s.Path()}
	if inTPM, err = c.AdoptMachine(t.Context(), a); err != nil {
		t.Fatal(err)
	}
	if private, err = rsa.GenerateKey(rand.Reader, 2048); err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	if inFile, err = c.AdoptMachineKey(t.Context(), client.Adoption{Name: fmt.Sprintf("FILE%d", n), Machine: "reg-2"}, pkcs8); err != nil {
		t.Fatal(err)
	}
	return inTPM, inFile, private, c
}

// TestMachineAgainstJava has a program of the JDK be the server of two machines, and the client of one of them.
func TestMachineAgainstJava(t *testing.T) {
	inTPM, inFile, private, _ := machines(t)
	data := []byte(`{"receipt": "an acknowledgement, ünd more"}`)
	var given strings.Builder
	b64 := base64.RawURLEncoding.EncodeToString
	set := func(name, value string) { fmt.Fprintf(&given, "%s=%s\n", name, value) }
	set("data", b64(data))
	const database = "Boot0123456789abcdef-BREAK-User012345-BREAK-Pass0123456789abcdef-BREAK-1"
	set("database", database)
	for name, m := range map[string]*client.Machine{"tpm": inTPM, "file": inFile} {
		o := m.Onboarding()
		set(name+".publicKey", o.PublicKey)
		set(name+".signPublicKey", o.SignPublicKey)
		signature, err := m.Sign(t.Context(), bytes.NewReader(data))
		if err != nil {
			t.Fatal(err)
		}
		set(name+".signature", b64(signature))
		header, err := m.RequestSignature(t.Context(), data)
		if err != nil {
			t.Fatal(err)
		}
		set(name+".header", header)
		token, err := m.LoginToken(t.Context(), data)
		if err != nil {
			t.Fatal(err)
		}
		set(name+".token", token)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	set("reg.key", b64(pkcs8))
	for _, p := range []packet.Padding{packet.PaddingFile, packet.PaddingTPM, packet.PaddingAndroid} {
		sealed, err := client.EncryptForMachine(&private.PublicKey, p, data)
		if err != nil {
			t.Fatal(err)
		}
		set("made."+string(p), b64(sealed))
	}
	fresh := client.NewMachineDatabase()
	file, err := inFile.SealDatabase(fresh)
	if err != nil {
		t.Fatal(err)
	}
	set("made.db", string(file))

	path := filepath.Join(t.TempDir(), "given.properties")
	if err := os.WriteFile(path, []byte(given.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	command := exec.Command("java", "-XX:TieredStopAtLevel=1", filepath.Join("testdata", "java", "Machine.java"), path)
	command.Stderr = os.Stderr
	out, err := command.Output()
	if err != nil {
		t.Fatalf("java: %v", err)
	}
	got := make(map[string]string)
	for line := range strings.Lines(string(out)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		got[name] = value
	}
	bytesOf := func(name string) []byte {
		t.Helper()
		b, err := base64.RawURLEncoding.DecodeString(got[name])
		if err != nil || len(b) == 0 {
			t.Fatalf("%s of Java: %q, %v", name, got[name], err)
		}
		return b
	}

	for name, m := range map[string]*client.Machine{"tpm": inTPM, "file": inFile} {
		info := m.Info()
		if got[name+".index"] != info.Encrypt.KeyIndex || got[name+".signIndex"] != info.Sign.KeyIndex {
			t.Errorf("%s: key indexes %s and %s, of Java %s and %s", name, info.Encrypt.KeyIndex, info.Sign.KeyIndex, got[name+".index"], got[name+".signIndex"])
		}
		for _, layout := range []string{".today", ".old"} {
			if plain, err := m.Decrypt(t.Context(), bytesOf(name+layout)); err != nil || !bytes.Equal(plain, data) {
				t.Errorf("%s%s: %q, %v", name, layout, plain, err)
			}
			if _, err := m.DecryptAs(t.Context(), other(m.Padding()), bytesOf(name+layout)); !errors.Is(err, client.ErrDecryption) {
				t.Errorf("%s%s as another kind of client: %v", name, layout, err)
			}
		}
		d, err := m.OpenDatabase(t.Context(), []byte(got[name+".db"]+"\n"))
		if err != nil {
			t.Fatalf("%s: db.conf: %v", name, err)
		}
		if string(d.BootPassword) != "Boot0123456789abcdef" || string(d.User) != "User012345" || string(d.Password) != "Pass0123456789abcdef" || !d.Encrypted {
			t.Errorf("%s: db.conf: %s", name, d.User)
		}
	}
	for _, layout := range []string{"android.today", "android.old"} {
		if plain, err := inFile.DecryptAs(t.Context(), packet.PaddingAndroid, bytesOf(layout)); err != nil || !bytes.Equal(plain, data) {
			t.Errorf("%s: %q, %v", layout, plain, err)
		}
		if _, err := inFile.Decrypt(t.Context(), bytesOf(layout)); !errors.Is(err, client.ErrDecryption) {
			t.Errorf("%s as from a file: %v", layout, err)
		}
	}
	want := fmt.Sprintf("%s-BREAK-%s-BREAK-%s-BREAK-0", fresh.BootPassword, fresh.User, fresh.Password)
	if string(bytesOf("made.db")) != want || len(want) != 72 {
		t.Errorf("Java reads %q in our db.conf, want %q", bytesOf("made.db"), want)
	}
	if err := client.VerifyMachine(inFile.Info().Sign.Public, bytes.NewReader(data), bytesOf("signed")); err != nil {
		t.Errorf("signature of Java: %v", err)
	}
}

func other(p packet.Padding) packet.Padding {
	if p == packet.PaddingTPM {
		return packet.PaddingFile
	}
	return packet.PaddingTPM
}

func TestMachine(t *testing.T) {
	inTPM, inFile, private, c := machines(t)
	data := bytes.Repeat([]byte("0123456789"), 1<<17)
	for _, m := range []*client.Machine{inTPM, inFile} {
		info := m.Info()
		if !info.Adopted || info.Sign.Version != 1 {
			t.Errorf("%+v", info)
		}
		signature, err := m.Sign(t.Context(), bytes.NewReader(data))
		if err != nil {
			t.Fatal(err)
		}
		if err := m.Verify(bytes.NewReader(data), signature); err != nil {
			t.Error(err)
		}
		if err := client.VerifyMachine(info.Sign.Public, bytes.NewReader(data), signature); err != nil {
			t.Error(err)
		}
		if err := m.Verify(bytes.NewReader(data[1:]), signature); !errors.Is(err, client.ErrVerification) {
			t.Errorf("a signature of something else: %v", err)
		}
		sealed, err := m.Encrypt(data)
		if err != nil {
			t.Fatal(err)
		}
		if plain, err := m.Decrypt(t.Context(), sealed); err != nil || !bytes.Equal(plain, data) {
			t.Errorf("%v", err)
		}
		for _, at := range []int{0, 256, 268, 300, len(sealed) - 1} {
			changed := bytes.Clone(sealed)
			changed[at] ^= 1
			if _, err := m.Decrypt(t.Context(), changed); err != client.ErrDecryption { // the very same, and no word about where
				t.Errorf("changed at %d: %v", at, err)
			}
		}
		for _, size := range []int{0, 1, 255, 256, 300} {
			if _, err := m.Decrypt(t.Context(), sealed[:size]); !errors.Is(err, packet.ErrFormat) {
				t.Errorf("%d bytes: %v", size, err)
			}
		}
		if _, err := m.Decrypt(t.Context(), make([]byte, client.MaxMachineData+1<<10)); !errors.Is(err, client.ErrTooLarge) {
			t.Errorf("too large: %v", err)
		}
		again, err := c.Machine(t.Context(), info.Name)
		if err != nil || again.Info().Adopted || again.Onboarding() != m.Onboarding() {
			t.Errorf("looked up: %+v, %v", again, err)
		}
		// The keys are keys like others.
		k, err := c.Key(t.Context(), info.Sign.Key)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := k.SignReader(t.Context(), bytes.NewReader(data), keyspec.RSAPKCS1SHA256); err != nil {
			t.Error(err)
		}
		if _, err := k.DecryptOAEP(t.Context(), sealed[:256], []byte{0}); !errors.Is(err, client.ErrUsage) {
			t.Errorf("the signing key decrypts: %v", err)
		}
	}
	if _, err := inTPM.DecryptAs(t.Context(), packet.PaddingAndroid, make([]byte, 400)); !errors.Is(err, client.ErrUnsupported) {
		t.Errorf("padding of Android in a TPM: %v", err)
	}
	if err := client.VerifyMachine(inTPM.Info().Encrypt.Public, bytes.NewReader(nil), nil); !errors.Is(err, client.ErrInvalid) {
		t.Errorf("signature by an encryption key: %v", err)
	}

	// What is adopted is what was expected, or nothing.
	pkcs8, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	a := client.Adoption{Name: fmt.Sprintf("FILE%d", names.Add(1)), KeyIndex: inTPM.Info().Encrypt.KeyIndex}
	if _, err := c.AdoptMachineKey(t.Context(), a, pkcs8); !errors.Is(err, client.ErrReplaced) {
		t.Errorf("another identity than expected: %v", err)
	}
	if _, err := c.Machine(t.Context(), a.Name); !errors.Is(err, client.ErrNotAvailable) {
		t.Errorf("it was adopted: %v", err)
	}
	for _, index := range []string{inFile.Info().Encrypt.KeyIndex, inFile.Info().Sign.KeyIndex} {
		a.KeyIndex = index
		if _, err := c.AdoptMachineKey(t.Context(), a, pkcs8); err != nil {
			t.Errorf("the expected identity: %v", err)
		}
	}
	if _, err := c.AdoptMachine(t.Context(), client.Adoption{Name: a.Name, TPM: "tpm:/nowhere"}); !errors.Is(err, client.ErrExists) {
		t.Errorf("another identity of the same name: %v", err)
	}
	if _, err := c.AdoptMachine(t.Context(), client.Adoption{Name: a.Name + "x", TPM: "tpm:/nowhere"}); !errors.Is(err, client.ErrAbsent) {
		t.Errorf("a TPM that is not there: %v", err)
	}
	var told *client.Error
	if _, err := c.AdoptMachine(t.Context(), client.Adoption{Name: a.Name + "x"}); !errors.Is(err, client.ErrUnsupported) || !errors.As(err, &told) || !strings.Contains(told.Remedy, "only --file adopts") {
		t.Errorf("no TPM at all: %v", err)
	}
	if _, err := dial(t).AdoptMachine(t.Context(), client.Adoption{Name: "X"}); !errors.Is(err, client.ErrUnknownOp) {
		t.Errorf("on the other socket: %v", err)
	}
	for _, m := range []*client.Machine{inTPM, inFile} {
		if err := c.ReleaseMachine(t.Context(), m.Info().Name); err != nil {
			t.Error(err)
		}
		if _, err := m.Sign(t.Context(), bytes.NewReader(data)); err == nil {
			t.Error("a released key signs")
		}
	}
}
