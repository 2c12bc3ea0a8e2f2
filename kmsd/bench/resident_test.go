//go:build cgo

package bench

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/client"
	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/enclave/pkcs11"
	"github.com/kmsd-project/kmsd/enclave/pkcs11/pkcs11test"
	"github.com/kmsd-project/kmsd/enclave/pkcs11/token"
	"github.com/kmsd-project/kmsd/enclave/tpm"
	"github.com/kmsd-project/kmsd/enclave/tpm/swtpmtest"
	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// resident: one use after the other of keys in a software TPM and in a SoftHSM token, through kmsd and by the bare driver in this process,
// which has a TPM, or a session with the token, of its own.
func resident(t *testing.T, tb *table) {
	kmsd, err := filepath.Abs(filepath.Join(*bins, "kmsd"))
	if err != nil {
		t.Fatal(err)
	}
	start := func(args ...string) *daemon {
		dir := t.TempDir()
		state := filepath.Join(dir, "state")
		if out, err := exec.Command(kmsd, append([]string{"init", "--state-dir", state, "--no-recovery"}, args...)...).CombinedOutput(); err != nil {
			t.Fatalf("kmsd init: %v\n%s", err, out)
		}
		return runDaemon(t, kmsd, state, filepath.Join(dir, "run"))
	}

	var machines [2]*swtpmtest.TPM
	for i := range machines {
		if machines[i], err = swtpmtest.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { machines[i].Close() })
	}
	bare, err := tpm.Open(tpm.Config{Device: "unix:" + machines[1].Path()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { bare.Close() })
	d := start("--enclave", "tpm:unix:"+machines[0].Path())
	residentRows(t, tb, "tpm", "swtpm", d.dial(t), bare)

	h := pkcs11test.New(t)
	pin := filepath.Join(t.TempDir(), "pin")
	if err := os.WriteFile(pin, []byte(pkcs11test.PIN), 0o600); err != nil {
		t.Fatal(err)
	}
	d = start("--enclave", "pkcs11:"+h.Module+"?token="+url.QueryEscape(pkcs11test.Label), "--pin-file", pin)
	admin, err := client.Dial(t.Context(), client.WithSocket(filepath.Dir(d.socket)), client.WithAdmin())
	if err != nil {
		t.Fatal(err)
	}
	defer admin.Close()
	if err := admin.Call(t.Context(), proto.OpUnlock, &proto.Unlock{Secret: []byte(pkcs11test.PIN)}, &proto.Empty{}, nil); err != nil {
		t.Fatal(err)
	}
	direct, err := token.Open(t.Context(), pkcs11.Spec{Module: h.Module, Token: pkcs11test.Label})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { direct.Close() })
	if err := direct.Login(t.Context(), enclave.Auth{Secret: []byte(pkcs11test.PIN)}); err != nil {
		t.Fatal(err)
	}
	residentRows(t, tb, "hsm", "SoftHSM", d.dial(t), direct)
}

// use is one operation with a resident key, both ways.
type use struct {
	what       string
	kmsd, bare func() error
}

func residentRows(t *testing.T, tb *table, protection, device string, c *client.Client, bare enclave.Resident) {
	ctx := context.Background()
	bound := []byte("bench")
	message := []byte("measured")
	digest := sha256.Sum256(message)
	// make1 makes a key on both sides and returns the name of the one and the blob of the other.
	n := 0
	make1 := func(a keyspec.Algorithm, usages ...keyspec.Usage) (string, enclave.Blob, [2][]byte) {
		n++
		name := fmt.Sprintf("bench/%d", n)
		spec := proto.KeyCreate{Name: name, Algorithm: string(a), Protection: protection}
		for _, u := range usages {
			spec.Usage = append(spec.Usage, string(u))
		}
		create(t, c, &spec)
		id := enclave.Spec{Algorithm: a, Usages: usages, AAD: bound}
		rand.Read(id.ID[:])
		blob, spki, err := bare.Generate(ctx, id)
		if err != nil {
			t.Fatal(err)
		}
		var public proto.PublicReply
		if len(spki) > 0 {
			if err := c.Call(ctx, proto.OpPublic, &proto.KeyRef{Key: name}, &public, nil); err != nil {
				t.Fatal(err)
			}
		}
		return name, blob, [2][]byte{public.SPKI, spki}
	}
	do := func(b enclave.Blob, op enclave.Op) func() error {
		op.Bound = bound
		return func() error {
			_, err := bare.Do(ctx, b, op, nil)
			return err
		}
	}
	call := func(op string, in, out proto.Message) func() error {
		return func() error { return c.Call(ctx, op, in, out, nil) }
	}
	seal := func(spki []byte) []byte {
		public, err := x509.ParsePKIXPublicKey(spki)
		if err != nil {
			t.Fatal(err)
		}
		sealed, err := rsa.EncryptOAEP(sha256.New(), rand.Reader, public.(*rsa.PublicKey), message, nil)
		if err != nil {
			t.Fatal(err)
		}
		return sealed
	}
	var list []use
	for _, s := range []struct {
		algorithm keyspec.Algorithm
		scheme    keyspec.Scheme
	}{{keyspec.ECDSAP256, keyspec.ECDSASHA256}, {keyspec.RSA2048, keyspec.RSAPSSSHA256}} {
		name, blob, _ := make1(s.algorithm, keyspec.Sign, keyspec.Verify)
		list = append(list, use{"sign " + string(s.algorithm), call(proto.OpSign, &proto.Sign{Key: name, Data: message}, &proto.SignReply{}),
			do(blob, enclave.Op{Usage: keyspec.Sign, Scheme: s.scheme, Input: digest[:], Digest: true})})
	}
	name, blob, public := make1(keyspec.RSA2048, keyspec.Encrypt, keyspec.Decrypt)
	list = append(list, use{"decrypt rsa-2048", call(proto.OpDecrypt, &proto.Decrypt{Key: name, Ciphertext: seal(public[0])}, &proto.DecryptReply{}),
		do(blob, enclave.Op{Usage: keyspec.Decrypt, Scheme: keyspec.RSAOAEPSHA256, Input: seal(public[1])})})
	name, blob, _ = make1(keyspec.HMACSHA256, keyspec.MAC, keyspec.Verify)
	list = append(list, use{"mac hmac-sha256", call(proto.OpMAC, &proto.MAC{Key: name, Data: message}, &proto.MACReply{}),
		do(blob, enclave.Op{Usage: keyspec.MAC, Input: message})})
	if protection == "hsm" {
		name, blob, _ = make1(keyspec.AES256GCM, keyspec.Encrypt, keyspec.Decrypt)
		nonce := make([]byte, 12)
		list = append(list, use{"encrypt aes-256-gcm 1 KiB", call(proto.OpEncrypt, &proto.Encrypt{Key: name, Data: make([]byte, 1024)}, &proto.EncryptReply{}),
			do(blob, enclave.Op{Usage: keyspec.Encrypt, Nonce: nonce, Input: make([]byte, 1024)})})
	}
	for _, u := range list {
		var times [2][]time.Duration
		for range *passes {
			for i, f := range []func() error{u.bare, u.kmsd, u.bare} {
				for end := time.Now().Add(*slice / 2); time.Now().Before(end); {
					begin := time.Now()
					if err := f(); err != nil {
						t.Fatalf("%s: %v", u.what, err)
					}
					times[i%2] = append(times[i%2], time.Since(begin))
				}
			}
		}
		p50 := [2]float64{quantile(times[0], 0.5), quantile(times[1], 0.5)}
		p99 := [2]float64{quantile(times[0], 0.99), quantile(times[1], 0.99)}
		tb.rows = append(tb.rows, row{what: device + ", " + u.what + ", p50 / bare driver", bar: "none", value: p50[1] / p50[0], held: true,
			detail: fmt.Sprintf("p50 %.0f us, bare %.0f; p99 %.0f us, bare %.0f: %.2f", p50[1], p50[0], p99[1], p99[0], p99[1]/p99[0])})
	}
}

// quantile returns a quantile of times in microseconds.
func quantile(times []time.Duration, q float64) float64 {
	slices.Sort(times)
	return float64(times[int(q*float64(len(times)-1))].Nanoseconds()) / 1e3
}
