package main

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kmsd-project/kmsd/ipc/proto"
)

// openSSLPath has OpenSSL validate a chain, leaf first, with the root last.
func openSSLPath(t *testing.T, chain [][]byte) {
	t.Helper()
	dir := t.TempDir()
	write := func(name string, certificates ...[]byte) string {
		var b bytes.Buffer
		for _, der := range certificates {
			must(t, pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: der}))
		}
		path := filepath.Join(dir, name)
		must(t, os.WriteFile(path, b.Bytes(), 0o600))
		return path
	}
	args := []string{"verify", "-x509_strict", "-CAfile", write("root", chain[len(chain)-1])}
	if len(chain) > 2 {
		args = append(args, "-untrusted", write("between", chain[1:len(chain)-1]...))
	}
	if out, err := exec.Command("openssl", append(args, write("leaf", chain[0]))...).CombinedOutput(); err != nil {
		t.Errorf("openssl: %v\n%s", err, out)
	}
}

// hierarchyIn makes root, module and sign keys in a device and base keys below, and uses them: the module key signs and unwraps in the
// device, and without the device the base keys stay closed, whether the key was ever used before or not.
func hierarchyIn(t *testing.T, d *realDaemon, protection string, restart func(*realDaemon) *realDaemon, ed25519 bool, away func() (back func())) {
	t.Helper()
	generate := func(m proto.MasterGenerate) *proto.Certified {
		t.Helper()
		m.Protection = protection
		var c proto.Certified
		d.ask(proto.OpMasterGenerate, &m, &c)
		openSSLPath(t, c.Chain)
		return &c
	}
	generate(proto.MasterGenerate{Key: "ROOT", Escrow: "none"})
	module := generate(proto.MasterGenerate{Key: "REGISTRATION", Escrow: "none"})
	generate(proto.MasterGenerate{Key: "REGISTRATION/SIGN"})
	generate(proto.MasterGenerate{Key: "REGISTRATION/EC_SECP256R1_SIGN"})
	if ed25519 {
		generate(proto.MasterGenerate{Key: "REGISTRATION/ED25519_SIGN"})
	} else { // a TPM has no such keys, and says so
		d.refused(proto.OpMasterGenerate, &proto.MasterGenerate{Key: "REGISTRATION/ED25519_SIGN", Protection: protection}, proto.CodeUnsupported)
	}
	var base proto.Certified
	d.ask(proto.OpCertCurrent, &proto.CertCurrent{Key: "REGISTRATION/10001_110011"}, &base)
	openSSLPath(t, base.Chain)

	public := func(c *proto.Certified) *rsa.PublicKey {
		certificate, err := x509.ParseCertificate(c.Chain[0])
		must(t, err)
		return certificate.PublicKey.(*rsa.PublicKey)
	}
	seal := func(c *proto.Certified, data string) []byte {
		sealed, err := rsa.EncryptOAEP(sha256.New(), rand.Reader, public(c), []byte(data), nil)
		must(t, err)
		return sealed
	}
	opens := func(key string, sealed []byte, data string) {
		t.Helper()
		var plain proto.DecryptReply
		d.ask(proto.OpDecrypt, &proto.Decrypt{Key: key, Ciphertext: sealed}, &plain)
		if string(plain.Data) != data {
			t.Errorf("%s: %q", key, plain.Data)
		}
	}
	dataKey := strings.Repeat("k", 32)
	forBase, forModule := seal(&base, "data"), seal(module, dataKey)
	use := func() {
		t.Helper()
		opens("REGISTRATION/10001_110011@1", forBase, "data")
		opens("REGISTRATION@1", forModule, dataKey) // a payload key, which MOSIP encrypts to a module key as well
	}
	use()
	message := []byte("signed in a device")
	digest := sha256.Sum256(message)
	var sig proto.SignReply
	d.ask(proto.OpSign, &proto.Sign{Key: "REGISTRATION", Data: message, Scheme: "rsa-pkcs1-sha256"}, &sig)
	must(t, rsa.VerifyPKCS1v15(public(module), crypto.SHA256, digest[:], sig.Signature))
	d.ask(proto.OpSign, &proto.Sign{Key: "REGISTRATION", Data: message, Scheme: "rsa-pss-sha256"}, &sig)
	must(t, rsa.VerifyPSS(public(module), crypto.SHA256, digest[:], sig.Signature, nil))
	d.refused(proto.OpSign, &proto.Sign{Key: "ROOT", Data: message}, proto.CodeUsage)

	d = restart(d)
	use()

	d = restart(d) // so that nothing is open
	back := away()
	for _, key := range []string{"REGISTRATION/10001_110011", "REGISTRATION"} {
		d.last++
		d.conn.send(d.last, proto.OpDecrypt, &proto.Decrypt{Key: key, Ciphertext: forBase}, nil)
		if e := d.conn.response().Err; e == nil || e.Code == proto.CodeDecryptionFailed {
			t.Errorf("%s without the device: %+v", key, e)
		}
	}
	back()
	d = restart(d)
	use()
	// A new module key takes over the namespace, and what hangs on the one before still opens.
	generate(proto.MasterGenerate{Key: "REGISTRATION", Force: true})
	d = restart(d)
	use()
	var next proto.Certified
	d.ask(proto.OpCertCurrent, &proto.CertCurrent{Key: "REGISTRATION/other"}, &next)
	openSSLPath(t, next.Chain)
	opens("REGISTRATION/other", seal(&next, "more"), "more")
}

func TestHierarchyInTPM(t *testing.T) {
	d, machine := withTPM(t)
	hierarchyIn(t, d, "tpm", func(d *realDaemon) *realDaemon { return d.restart() }, false, func() func() {
		machine.PowerOff()
		return func() { must(t, machine.PowerOn()) }
	})
}

func TestHierarchyInHSM(t *testing.T) {
	d, h, restart := withHSM(t)
	hierarchyIn(t, d, "hsm", restart, true, func() func() { return h.RemoveAll(t) })
}
