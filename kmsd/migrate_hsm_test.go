package main

import (
	"crypto/rsa"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kmsd-project/kmsd/enclave/pkcs11/pkcs11test"
	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/kmsctl/mosipdb"
	"github.com/kmsd-project/kmsd/kmsctl/mosipdb/mosipdbtest"
	"github.com/kmsd-project/kmsd/kmsd/programs"
)

// TestMigrateHSM takes over a deployment whose module keys are in a token: they stay there under the labels that they have, and what was
// encrypted to base keys below them is decrypted, after a restart as well.
func TestMigrateHSM(t *testing.T) {
	tools := programs.New("kmsctl")
	t.Cleanup(tools.Remove)
	kmsctl := filepath.Join(tools.Dir(t), "kmsctl")
	d, h, restart := withHSM(t)
	dir := t.TempDir()
	made, err := mosipdbtest.Write(dir, mosipdbtest.Options{BaseKeys: 4, Pool: 4, NoStore: true})
	if err != nil {
		t.Fatal(err)
	}
	tool := func(args ...string) {
		t.Helper()
		cmd := exec.Command("pkcs11-tool", append([]string{"--module", h.Module, "--token-label", pkcs11test.Label, "--login", "--pin", pkcs11test.PIN}, args...)...)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("pkcs11-tool: %v\n%s", err, out)
		}
	}
	for _, e := range made.Entries {
		if e.Key == nil {
			continue
		}
		pkcs8, err := x509.MarshalPKCS8PrivateKey(e.Key)
		must(t, err)
		file := filepath.Join(dir, "key.der")
		must(t, os.WriteFile(file, pkcs8, 0o600))
		id := hex.EncodeToString([]byte(e.Alias)) // as Java does it
		tool("--write-object", file, "--type", "privkey", "--label", e.Alias, "--id", id)
		if _, ok := e.Key.(*rsa.PrivateKey); !ok {
			spki, err := x509.MarshalPKIXPublicKey(e.Key.Public())
			must(t, err)
			must(t, os.WriteFile(file, spki, 0o600))
			tool("--write-object", file, "--type", "pubkey", "--label", e.Alias, "--id", id)
		}
		must(t, os.Remove(file))
	}

	run := func(args ...string) map[string]any {
		t.Helper()
		cmd := exec.Command(kmsctl, append([]string{"--socket", filepath.Dir(d.admin), "--json"}, args...)...)
		out, err := cmd.Output()
		var report map[string]any
		if e := json.Unmarshal(out, &report); e != nil {
			t.Fatalf("%v, %v: %s", err, e, out)
		}
		return report
	}
	for _, outcome := range []string{"made", "present"} {
		report := run("mosip", "import", "--from", filepath.Join(dir, "dump.sql"), "--hsm", "--certificates", filepath.Join(dir, "modules.pem"), "--escrow", "none", "--skip-broken")
		keys := report["keys"].(map[string]any)
		if int(keys[outcome].(float64)) != made.Keys-1 { // the AES key is not taken over from a token
			t.Fatalf("%v", report)
		}
	}
	d = restart(d)
	before := h.Objects(t)
	for range 2 {
		var info proto.KeyInfo
		d.ask(proto.OpKeyGet, &proto.KeyRef{Key: "REGISTRATION"}, &info)
		if info.Protection != "hsm" || len(info.Versions) != 3 || info.Current != 3 {
			t.Errorf("%+v", info)
		}
		var sig proto.SignReply
		d.ask(proto.OpSign, &proto.Sign{Key: "REGISTRATION", Data: []byte("x"), Scheme: "rsa-pkcs1-sha256"}, &sig)
		_, spki := d.public("REGISTRATION")
		opensslVerifies(t, spki, []byte("x"), sig.Signature)
		d.ask(proto.OpSign, &proto.Sign{Key: "KERNEL/EC_SECP256R1_SIGN", Data: []byte("x")}, &sig)
		for i, s := range made.Samples {
			name, err := mosipdb.KeyName(s.Application, s.Reference)
			must(t, err)
			app, ref, _ := strings.Cut(string(name), "/")
			in, out := filepath.Join(dir, "in"), filepath.Join(dir, "out")
			must(t, os.WriteFile(in, s.Payload, 0o600))
			cmd := exec.Command(kmsctl, "--socket", filepath.Dir(d.admin), "mosip", "decrypt", "--app", app, "--ref", ref, "--raw", "--in", in, "--out", out, "--force")
			if text, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("sample %d of %s: %v\n%s", i, name, err, text)
			}
			if got, err := os.ReadFile(out); err != nil || string(got) != string(s.Plain) {
				t.Errorf("sample %d of %s: %q, %v", i, name, got, err)
			}
		}
		d = restart(d)
	}
	// What is destroyed here stays in the token, where another program has put it.
	d.ask(proto.OpKeyDestroy, &proto.KeyDestroy{Key: "KERNEL/SIGN", Now: true}, &proto.KeyInfo{})
	if after := h.Objects(t); after != before {
		t.Errorf("%d objects in the token became %d", before, after)
	}
}
