package main

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/enclave/pkcs11/pkcs11test"
	"github.com/kmsd-project/kmsd/enclave/tpm/swtpmtest"
	"github.com/kmsd-project/kmsd/ipc/proto"
)

// withTPM starts the real daemon on a store that a software TPM guards.
func withTPM(t *testing.T) (*realDaemon, *swtpmtest.TPM) {
	t.Helper()
	machine, spec := startTPM(t)
	dir := t.TempDir()
	if run := runInitProgram(t, nil, "--state-dir", filepath.Join(dir, "s"), "--recovery-out", filepath.Join(dir, "key"), "--enclave", spec); run.code != 0 {
		t.Fatalf("%+v", run)
	}
	return startReal(t, dir), machine
}

func (d *realDaemon) createIn(protection, name, algorithm string, usages ...string) *proto.KeyInfo {
	d.t.Helper()
	var info proto.KeyInfo
	d.ask(proto.OpKeyCreate, &proto.KeyCreate{Name: name, Algorithm: algorithm, Usage: usages, Protection: protection}, &info)
	return &info
}

func (d *realDaemon) public(name string) (crypto.PublicKey, []byte) {
	d.t.Helper()
	var r proto.PublicReply
	d.ask(proto.OpPublic, &proto.KeyRef{Key: name}, &r)
	public, err := x509.ParsePKIXPublicKey(r.SPKI)
	if err != nil {
		d.t.Fatal(err)
	}
	return public, r.SPKI
}

// opensslVerifies has OpenSSL judge an ECDSA or RSA PKCS#1 v1.5 signature with SHA-256.
func opensslVerifies(t *testing.T, spki, message, signature []byte) {
	t.Helper()
	dir := t.TempDir()
	write := func(name string, b []byte) string {
		path := filepath.Join(dir, name)
		must(t, os.WriteFile(path, b, 0o600))
		return path
	}
	key := write("key.pem", pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: spki}))
	out, err := exec.Command("openssl", "dgst", "-sha256", "-verify", key, "-signature", write("sig", signature), write("message", message)).CombinedOutput()
	if err != nil {
		t.Errorf("openssl: %v\n%s", err, out)
	}
}

// residentKeys makes keys in a device, uses them in every way, and restarts the daemon.
func residentKeys(t *testing.T, d *realDaemon, protection string, restart func(*realDaemon) *realDaemon) *realDaemon {
	t.Helper()
	message := []byte("signed in a device")
	info := d.createIn(protection, "app/sign", "ecdsa-p256")
	if info.Protection != protection || len(info.Warnings) == 0 || !strings.Contains(info.Warnings[0], "no backup possible") {
		t.Errorf("%+v", info)
	}
	d.createIn(protection, "app/rsa", "rsa-2048")
	d.createIn(protection, "app/decrypt", "rsa-2048", "encrypt", "decrypt")
	d.createIn(protection, "app/agree", "ecdh-p256")
	d.ask(proto.OpKeyGet, &proto.KeyRef{Key: "app/sign"}, info)
	if len(info.Warnings) == 0 {
		t.Error("key_get does not warn")
	}
	for range 2 { // before a restart and after it
		var sig proto.SignReply
		d.ask(proto.OpSign, &proto.Sign{Key: "app/sign", Data: message}, &sig)
		_, spki := d.public("app/sign")
		opensslVerifies(t, spki, message, sig.Signature)
		d.ask(proto.OpVerify, &proto.Verify{Key: "app/sign", Data: message, Signature: sig.Signature}, &proto.VerifyReply{})
		d.ask(proto.OpSign, &proto.Sign{Key: "app/sign", Data: message, Encoding: "p1363"}, &sig)
		if len(sig.Signature) != 64 {
			t.Errorf("%d bytes of r || s", len(sig.Signature))
		}
		d.ask(proto.OpSign, &proto.Sign{Key: "app/rsa", Data: message, Scheme: "rsa-pkcs1-sha256"}, &sig)
		_, spki = d.public("app/rsa")
		opensslVerifies(t, spki, message, sig.Signature)
		d.ask(proto.OpSign, &proto.Sign{Key: "app/rsa", Data: message}, &sig) // PSS
		public, _ := d.public("app/rsa")
		digest := sha256.Sum256(message)
		if err := rsa.VerifyPSS(public.(*rsa.PublicKey), crypto.SHA256, digest[:], sig.Signature, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash}); err != nil {
			t.Error(err)
		}

		public, _ = d.public("app/decrypt")
		sealed, err := rsa.EncryptOAEP(sha256.New(), rand.Reader, public.(*rsa.PublicKey), message, nil)
		must(t, err)
		var plain proto.DecryptReply
		d.ask(proto.OpDecrypt, &proto.Decrypt{Key: "app/decrypt", Ciphertext: sealed}, &plain)
		if !bytes.Equal(plain.Data, message) {
			t.Errorf("decrypted %q", plain.Data)
		}
		sealed[17] ^= 1
		d.refused(proto.OpDecrypt, &proto.Decrypt{Key: "app/decrypt", Ciphertext: sealed}, proto.CodeDecryptionFailed)
		d = restart(d)
	}

	// Agreement: software on the other side comes to the same key.
	d.ask(proto.OpKeyCreate, &proto.KeyCreate{Name: "app/peer", Algorithm: "ecdh-p256"}, &proto.KeyInfo{})
	_, ours := d.public("app/agree")
	_, theirs := d.public("app/peer")
	d.ask(proto.OpAgree, &proto.Agree{Key: "app/agree", Peer: theirs, New: proto.KeyCreate{Name: "app/z1", Algorithm: "hmac-sha256"}}, &proto.KeyInfo{})
	d.ask(proto.OpAgree, &proto.Agree{Key: "app/peer", Peer: ours, New: proto.KeyCreate{Name: "app/z2", Algorithm: "hmac-sha256"}}, &proto.KeyInfo{})
	var a, b proto.MACReply
	d.ask(proto.OpMAC, &proto.MAC{Key: "app/z1", Data: message}, &a)
	d.ask(proto.OpMAC, &proto.MAC{Key: "app/z2", Data: message}, &b)
	if !bytes.Equal(a.MAC, b.MAC) {
		t.Error("both sides agree on different keys")
	}

	// Certificates, rotation, destruction, and what is refused.
	subject := proto.Subject{DN: "CN=resident"}
	var chain proto.CertChain
	d.ask(proto.OpCertSelfSign, &proto.CertSelfSign{Key: "app/sign", Subject: subject}, &chain)
	c, err := x509.ParseCertificate(chain.Chain[0])
	if err != nil || c.CheckSignature(c.SignatureAlgorithm, c.RawTBSCertificate, c.Signature) != nil {
		t.Error("the certificate is not signed by its key")
	}
	d.ask(proto.OpCertRequest, &proto.CertRequest{Key: "app/rsa", Subject: subject}, &chain)
	d.ask(proto.OpKeyRotate, &proto.KeyRotate{Key: "app/sign"}, info)
	if info.Current != 2 || info.Protection != protection {
		t.Errorf("after rotation: %+v", info)
	}
	d.ask(proto.OpSign, &proto.Sign{Key: "app/sign", Data: message}, &proto.SignReply{})
	d.ask(proto.OpKeyDestroy, &proto.KeyDestroy{Key: "app/sign@1", Now: true}, &proto.KeyInfo{})
	d.refused(proto.OpKeyCreate, &proto.KeyCreate{Name: "app/no", Algorithm: "hkdf-sha256", Protection: protection}, proto.CodeUnsupported)
	d.refused(proto.OpKeyCreate, &proto.KeyCreate{Name: "app/no", Algorithm: "ecdsa-p256", Protection: protection, Exportable: true}, proto.CodeUnsupported)
	d.refused(proto.OpKeyImport, &proto.KeyImport{Key: proto.KeyCreate{Name: "app/no", Algorithm: "aes-256-gcm", Protection: protection}, Material: make([]byte, 32)}, proto.CodeUnsupported)
	return d
}

// together has n clients sign at once, each several times.
func together(t *testing.T, d *realDaemon, key string, n, each int) {
	t.Helper()
	public, _ := d.public(key)
	var wait sync.WaitGroup
	for i := range n {
		c := bound(t, d.app)
		wait.Go(func() {
			for k := range each {
				message := fmt.Appendf(nil, "%d %d", i, k)
				var sig proto.SignReply
				c.send(uint64(k+3), proto.OpSign, &proto.Sign{Key: key, Data: message}, nil)
				c.want(uint64(k+3), &sig)
				digest := sha256.Sum256(message)
				if !ecdsa.VerifyASN1(public.(*ecdsa.PublicKey), digest[:], sig.Signature) {
					t.Error("a signature does not verify")
				}
			}
		})
	}
	wait.Wait()
}

func TestResidentInTPM(t *testing.T) {
	t.Parallel()
	d, machine := withTPM(t)
	d = residentKeys(t, d, "tpm", (*realDaemon).restart)
	together(t, d, "app/sign", 32, 3)

	// What the TPM has is known, and what it has not.
	var can proto.CapabilitiesReply
	d.ask(proto.OpCapabilities, &proto.Empty{}, &can)
	has := func(algorithm, protection string) bool {
		return slices.ContainsFunc(can.Algorithms, func(c proto.Capability) bool { return c.Algorithm == algorithm && c.Protection == protection })
	}
	if !has("ecdsa-p256", "tpm") || !has("rsa-2048", "tpm") || !has("hmac-sha256", "tpm") || has("aes-256-gcm", "tpm") || has("ed25519", "tpm") || has("ecdsa-p256", "hsm") || !has("ed25519", "software") {
		t.Errorf("%+v", can.Algorithms)
	}
	if !slices.ContainsFunc(can.Notes, func(n string) bool { return strings.Contains(n, "no AES keys") }) {
		t.Errorf("%q", can.Notes)
	}

	// The TPM goes away: that is told, and software keys do not care. It is used again as soon as it is back.
	d.ask(proto.OpKeyCreate, &proto.KeyCreate{Name: "app/soft", Algorithm: "ecdsa-p256"}, &proto.KeyInfo{})
	machine.PowerOff()
	d.refused(proto.OpSign, &proto.Sign{Key: "app/sign", Data: []byte("x")}, proto.CodeAbsent)
	d.refused(proto.OpKeyCreate, &proto.KeyCreate{Name: "app/no", Algorithm: "ecdsa-p256", Protection: "tpm"}, proto.CodeAbsent)
	d.ask(proto.OpSign, &proto.Sign{Key: "app/soft", Data: []byte("x")}, &proto.SignReply{})
	must(t, machine.PowerOn())
	began := time.Now()
	d.ask(proto.OpSign, &proto.Sign{Key: "app/sign", Data: []byte("x")}, &proto.SignReply{})
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("used again after %s", took)
	}

	// A cleared TPM is another one, for good: what was in it is lost. When it is enrolled anew, the key goes on in it with a new version.
	must(t, machine.Clear())
	d.refused(proto.OpSign, &proto.Sign{Key: "app/sign", Data: []byte("x")}, proto.CodeReplaced)
	d.ask(proto.OpSlotAdd, &proto.SlotAdd{Enclave: "tpm:unix:" + machine.Path()}, &proto.SlotAddReply{})
	d.ask(proto.OpSlotRemove, &proto.SlotRef{ID: d.slots()[0].ID}, &proto.Empty{})
	d.refused(proto.OpSign, &proto.Sign{Key: "app/sign", Data: []byte("x")}, proto.CodeReplaced)
	d.ask(proto.OpKeyRotate, &proto.KeyRotate{Key: "app/sign"}, &proto.KeyInfo{})
	d.ask(proto.OpSign, &proto.Sign{Key: "app/sign", Data: []byte("x")}, &proto.SignReply{})
}

// TestTPMLostMidCall pulls the plug while clients sign. Each is answered: by a signature, or by a typed error.
func TestTPMLostMidCall(t *testing.T) {
	t.Parallel()
	d, machine := withTPM(t)
	d.createIn("tpm", "app/sign", "ecdsa-p256")
	stop := make(chan struct{})
	var wait sync.WaitGroup
	for range 4 {
		c := bound(t, d.app)
		wait.Go(func() {
			for id := uint64(3); ; id++ {
				select {
				case <-stop:
					return
				default:
				}
				c.send(id, proto.OpSign, &proto.Sign{Key: "app/sign", Data: []byte("x")}, nil)
				if e := c.response().Err; e != nil && e.Code != proto.CodeAbsent && e.Code != proto.CodeBusy {
					t.Errorf("%s: %s", e.Code, e.Message)
				}
			}
		})
	}
	for range 3 {
		time.Sleep(150 * time.Millisecond)
		machine.PowerOff()
		time.Sleep(50 * time.Millisecond)
		must(t, machine.PowerOn())
	}
	close(stop)
	wait.Wait()
	d.ask(proto.OpSign, &proto.Sign{Key: "app/sign", Data: []byte("x")}, &proto.SignReply{})
}

// TestNamespaceInTPM: base keys of a module key in the TPM open only with it.
func TestNamespaceInTPM(t *testing.T) {
	t.Parallel()
	d, machine := withTPM(t)
	var info proto.KeyInfo
	d.ask(proto.OpKeyCreate, &proto.KeyCreate{Name: "MODULE", Algorithm: "ecdsa-p384", Protection: "tpm", Escrow: "none"}, &info)
	if info.Escrow != "none" || len(info.Warnings) != 2 || !strings.Contains(info.Warnings[1], "die with it") {
		t.Errorf("%+v", info)
	}
	d.ask(proto.OpKeyCreate, &proto.KeyCreate{Name: "MODULE/base", Algorithm: "aes-256-gcm"}, &proto.KeyInfo{})
	var sealed proto.EncryptReply
	d.ask(proto.OpEncrypt, &proto.Encrypt{Key: "MODULE/base", Data: []byte("data")}, &sealed)
	d = d.restart()
	var plain proto.DecryptReply
	d.ask(proto.OpDecrypt, &proto.Decrypt{Key: "MODULE/base", Ciphertext: sealed.Ciphertext}, &plain)
	if string(plain.Data) != "data" {
		t.Errorf("%q", plain.Data)
	}
	d = d.restart()
	machine.PowerOff()
	d.refused(proto.OpDecrypt, &proto.Decrypt{Key: "MODULE/base", Ciphertext: sealed.Ciphertext}, proto.CodeAbsent)
	must(t, machine.PowerOn())
	d.ask(proto.OpDecrypt, &proto.Decrypt{Key: "MODULE/base", Ciphertext: sealed.Ciphertext}, &plain)
	d.ask(proto.OpKeyRotate, &proto.KeyRotate{Key: "MODULE"}, &info)
	d = d.restart()
	d.ask(proto.OpDecrypt, &proto.Decrypt{Key: "MODULE/base", Ciphertext: sealed.Ciphertext}, &plain)
	d.refused(proto.OpKeyCreate, &proto.KeyCreate{Name: "M2", Algorithm: "ecdsa-p256", Escrow: "none"}, proto.CodeInvalid)
}

// withHSM starts the real daemon on a store that a token guards, and returns how to restart it and unlock the store again.
func withHSM(t *testing.T) (*realDaemon, *pkcs11test.SoftHSM, func(*realDaemon) *realDaemon) {
	t.Helper()
	h := pkcs11test.New(t)
	dir := t.TempDir()
	pin := filepath.Join(dir, "pin")
	must(t, os.WriteFile(pin, []byte(pkcs11test.PIN+"\n"), 0o600))
	environment := func(c *exec.Cmd) { c.Env = append(c.Env, "SOFTHSM2_CONF="+os.Getenv("SOFTHSM2_CONF")) }
	spec := "pkcs11:" + h.Module + "?token=" + url.QueryEscape(pkcs11test.Label)
	if run := runInitProgram(t, environment, "--state-dir", filepath.Join(dir, "s"), "--recovery-out", filepath.Join(dir, "key"), "--enclave", spec, "--pin-file", pin); run.code != 0 {
		t.Fatalf("%+v", run)
	}
	start := func() *realDaemon {
		p := newReal(t, dir)
		environment(p.cmd)
		p.start().ready()
		d := &realDaemon{process: p, conn: bound(t, p.admin), last: 10}
		d.ask(proto.OpUnlock, &proto.Unlock{Secret: []byte(pkcs11test.PIN)}, &proto.Empty{})
		return d
	}
	return start(), h, func(d *realDaemon) *realDaemon {
		d.conn.Close()
		d.stop()
		return start()
	}
}

func TestResidentInHSM(t *testing.T) {
	d, h, restart := withHSM(t)
	d = residentKeys(t, d, "hsm", restart)
	together(t, d, "app/sign", 32, 3)

	// What a token has besides.
	d.createIn("hsm", "app/aes", "aes-256-gcm")
	var sealed proto.EncryptReply
	d.ask(proto.OpEncrypt, &proto.Encrypt{Key: "app/aes", Data: []byte("data"), AAD: []byte("aad")}, &sealed)
	var plain proto.DecryptReply
	d.ask(proto.OpDecrypt, &proto.Decrypt{Key: "app/aes", Ciphertext: sealed.Ciphertext, AAD: []byte("aad")}, &plain)
	if string(plain.Data) != "data" {
		t.Errorf("%q", plain.Data)
	}
	d.refused(proto.OpDecrypt, &proto.Decrypt{Key: "app/aes", Ciphertext: sealed.Ciphertext}, proto.CodeDecryptionFailed)
	d.createIn("hsm", "app/mac", "hmac-sha256")
	var mac proto.MACReply
	d.ask(proto.OpMAC, &proto.MAC{Key: "app/mac", Data: []byte("data")}, &mac)
	d.ask(proto.OpMACVerify, &proto.MACVerify{Key: "app/mac", Data: []byte("data"), MAC: mac.MAC}, &proto.VerifyReply{})
	d.createIn("hsm", "app/ed", "ed25519")
	d.ask(proto.OpSign, &proto.Sign{Key: "app/ed", Data: []byte("data")}, &proto.SignReply{})
	d.createIn("hsm", "app/k256", "ecdsa-secp256k1")
	var signed proto.SignReply
	d.ask(proto.OpSign, &proto.Sign{Key: "app/k256", Data: []byte("data"), Encoding: "p1363"}, &signed)
	d.ask(proto.OpVerify, &proto.Verify{Key: "app/k256", Data: []byte("data"), Encoding: "p1363", Signature: signed.Signature}, &proto.VerifyReply{})
	d.ask(proto.OpCertSelfSign, &proto.CertSelfSign{Key: "app/k256", Subject: proto.Subject{DN: "CN=k256"}}, &proto.CertChain{})
	var can proto.CapabilitiesReply
	d.ask(proto.OpCapabilities, &proto.Empty{}, &can)
	for _, a := range []string{"ecdsa-p256", "rsa-2048", "rsa-4096", "aes-256-gcm", "hmac-sha256", "ed25519", "ecdsa-secp256k1"} {
		if !slices.ContainsFunc(can.Algorithms, func(c proto.Capability) bool { return c.Algorithm == a && c.Protection == "hsm" }) {
			t.Errorf("%s is not among what the token can do", a)
		}
	}

	// A namespace guarded by the token.
	var info proto.KeyInfo
	d.ask(proto.OpKeyCreate, &proto.KeyCreate{Name: "MODULE", Algorithm: "rsa-2048", Protection: "hsm", Escrow: "none"}, &info)
	d.ask(proto.OpKeyCreate, &proto.KeyCreate{Name: "MODULE/base", Algorithm: "ecdsa-p256"}, &proto.KeyInfo{})
	d = restart(d)
	d.ask(proto.OpSign, &proto.Sign{Key: "MODULE/base", Data: []byte("x")}, &proto.SignReply{})

	// Destruction takes the objects out of the token.
	objects := h.Objects(t)
	d.ask(proto.OpKeyDestroy, &proto.KeyDestroy{Key: "app/mac", Now: true}, &proto.KeyInfo{})
	if n := h.Objects(t); n != objects-1 {
		t.Errorf("%d objects in the token, %d before the destruction", n, objects)
	}

	// The token is taken away: that is told, and software keys do not care. It is used again as soon as it is back, once somebody has
	// logged in.
	d.ask(proto.OpKeyCreate, &proto.KeyCreate{Name: "app/soft", Algorithm: "ecdsa-p256"}, &proto.KeyInfo{})
	putBack := h.RemoveAll(t)
	d.last++
	d.conn.send(d.last, proto.OpSign, &proto.Sign{Key: "app/sign", Data: []byte("x")}, nil)
	if e := d.conn.response().Err; e == nil || e.Code != proto.CodeAbsent && e.Code != proto.CodeLocked && e.Code != proto.CodeReplaced {
		t.Errorf("without its token: %+v", e)
	}
	d.ask(proto.OpSign, &proto.Sign{Key: "app/soft", Data: []byte("x")}, &proto.SignReply{})
	putBack()
	slot := d.slots()[0].ID
	began := time.Now()
	for {
		d.last++
		d.conn.send(d.last, proto.OpSign, &proto.Sign{Key: "app/sign", Data: []byte("x")}, nil)
		e := d.conn.response().Err
		if e == nil {
			break
		}
		if time.Since(began) > 5*time.Second {
			t.Fatalf("%+v", e)
		}
		d.last++
		d.conn.send(d.last, proto.OpUnlock, &proto.Unlock{Slot: slot, Secret: []byte(pkcs11test.PIN)}, nil)
		d.conn.response()
	}
}

// TestHSMHelperKilled kills the helper that holds the token while clients sign: each is answered, software keys go on, and after somebody
// has logged in again everything is as before.
func TestHSMHelperKilled(t *testing.T) {
	d, _, _ := withHSM(t)
	d.createIn("hsm", "app/sign", "ecdsa-p256")
	d.ask(proto.OpKeyCreate, &proto.KeyCreate{Name: "app/soft", Algorithm: "ecdsa-p256"}, &proto.KeyInfo{})
	stop := make(chan struct{})
	var wait sync.WaitGroup
	for range 4 {
		c := bound(t, d.app)
		wait.Go(func() {
			for id := uint64(3); ; id++ {
				select {
				case <-stop:
					return
				default:
				}
				c.send(id, proto.OpSign, &proto.Sign{Key: "app/sign", Data: []byte("x")}, nil)
				if e := c.response().Err; e != nil && e.Code != proto.CodeAbsent && e.Code != proto.CodeLocked && e.Code != proto.CodeBusy {
					t.Errorf("%s: %s", e.Code, e.Message)
				}
			}
		})
	}
	time.Sleep(100 * time.Millisecond)
	helpers := processesOf(t, filepath.Join(filepath.Dir(program(t)), "kmsd-pkcs11"))
	if len(helpers) == 0 {
		t.Error("no helper was found, so this test shows nothing")
	}
	for _, pid := range helpers {
		syscall.Kill(pid, syscall.SIGKILL)
	}
	time.Sleep(100 * time.Millisecond)
	close(stop)
	wait.Wait()
	d.ask(proto.OpSign, &proto.Sign{Key: "app/soft", Data: []byte("x")}, &proto.SignReply{})
	d.refused(proto.OpSign, &proto.Sign{Key: "app/sign", Data: []byte("x")}, proto.CodeLocked)
	d.ask(proto.OpUnlock, &proto.Unlock{Slot: d.slots()[0].ID, Secret: []byte(pkcs11test.PIN)}, &proto.Empty{})
	d.ask(proto.OpSign, &proto.Sign{Key: "app/sign", Data: []byte("x")}, &proto.SignReply{})
}

// TestFrozenTPM: a TPM that answers nothing holds up nobody who does not use it, is told of soon to those who do, and is used again when it
// answers.
func TestFrozenTPM(t *testing.T) {
	t.Parallel()
	d, machine := withTPM(t)
	d.createIn("tpm", "app/sign", "ecdsa-p256")
	for i := range 20 {
		d.ask(proto.OpKeyCreate, &proto.KeyCreate{Name: fmt.Sprintf("app/soft%d", i), Algorithm: "ecdsa-p256"}, &proto.KeyInfo{})
	}
	d = d.restart() // nothing is in the caches
	must(t, machine.Freeze())
	// More than there are workers in the pool, and one of them in the reader of a connection of its own.
	var stuck []*peer
	for range 8 {
		c := bound(t, d.app)
		c.send(3, proto.OpSign, &proto.Sign{Key: "app/sign", Data: []byte("x")}, &proto.Options{DeadlineMS: 3000})
		stuck = append(stuck, c)
	}
	time.Sleep(100 * time.Millisecond)
	began := time.Now()
	for i := range 20 {
		d.ask(proto.OpSign, &proto.Sign{Key: fmt.Sprintf("app/soft%d", i), Data: []byte("x")}, &proto.SignReply{})
	}
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("20 signatures in software took %s", took)
	}
	for _, c := range stuck {
		if e := c.response().Err; e == nil || e.Code != proto.CodeDeadline && e.Code != proto.CodeAbsent {
			t.Errorf("%+v", e)
		}
	}
	began = time.Now()
	d.refused(proto.OpSign, &proto.Sign{Key: "app/sign", Data: []byte("x")}, proto.CodeAbsent)
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("that the TPM does not answer was told after %s", took)
	}
	must(t, machine.Thaw())
	began = time.Now()
	for {
		d.last++
		d.conn.send(d.last, proto.OpSign, &proto.Sign{Key: "app/sign", Data: []byte("x")}, nil)
		e := d.conn.response().Err
		if e == nil {
			break
		}
		if time.Since(began) > 5*time.Second {
			t.Fatalf("%+v", e)
		}
	}
	if took := time.Since(began); took > 3*time.Second {
		t.Errorf("used again after %s", took)
	}
}
