package main

import (
	"bytes"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha512"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/mechanism"
)

// canary is a key that the test knows, and the forms in which it might lie about in memory.
type canary struct {
	algorithm string
	usage     []string
	material  []byte // as imported
	forms     map[string][]byte
	use       func(d *realDaemon, key string)
}

func reversed(b []byte) []byte {
	out := bytes.Clone(b)
	slices.Reverse(out)
	return out
}

// both adds a number in both byte orders.
func both(forms map[string][]byte, name string, b []byte) {
	forms[name+" big-endian"], forms[name+" little-endian"] = b, reversed(b)
}

func sealUse(d *realDaemon, key string) {
	var sealed proto.EncryptReply
	d.ask(proto.OpEncrypt, &proto.Encrypt{Key: key, Data: []byte("data")}, &sealed)
	d.ask(proto.OpDecrypt, &proto.Decrypt{Key: key, Ciphertext: sealed.Ciphertext}, &proto.DecryptReply{})
}

func signUse(d *realDaemon, key string) {
	d.ask(proto.OpSign, &proto.Sign{Key: key, Data: []byte("message")}, &proto.SignReply{})
}

// canaries makes a key of every kind.
func canaries(t *testing.T) map[string]*canary {
	t.Helper()
	fatal := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	pkcs8 := func(k any) []byte {
		der, err := x509.MarshalPKCS8PrivateKey(k)
		fatal(err)
		return der
	}
	random := func(n int) []byte {
		b := make([]byte, n)
		rand.Read(b)
		return b
	}
	out := make(map[string]*canary)
	add := func(algorithm string, material []byte, use func(*realDaemon, string), usage ...string) *canary {
		c := &canary{algorithm: algorithm, usage: usage, material: material, forms: map[string][]byte{}, use: use}
		out[strings.ToUpper(algorithm)] = c
		return c
	}
	for algorithm, curve := range map[string]elliptic.Curve{
		"ecdsa-p256": elliptic.P256(), "ecdsa-p384": elliptic.P384(), "ecdsa-p521": elliptic.P521(),
	} {
		k, err := ecdsa.GenerateKey(curve, rand.Reader)
		fatal(err)
		d, err := k.Bytes()
		fatal(err)
		both(add(algorithm, pkcs8(k), signUse).forms, "scalar", d)
	}
	koblitz, err := mechanism.Lookup(keyspec.ECDSASecp256k1)
	fatal(err)
	scalar, err := koblitz.Generate()
	fatal(err)
	encoded, err := koblitz.Export(scalar)
	fatal(err)
	both(add("ecdsa-secp256k1", encoded, signUse).forms, "scalar", scalar)
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	fatal(err)
	c := add("ed25519", pkcs8(ed), signUse)
	expanded := sha512.Sum512(ed.Seed())
	c.forms["seed"], c.forms["prefix"] = ed.Seed(), expanded[32:]
	r, err := rsa.GenerateKey(rand.Reader, 2048)
	fatal(err)
	c = add("rsa-2048", pkcs8(r), signUse)
	both(c.forms, "p", r.Primes[0].Bytes())
	both(c.forms, "q", r.Primes[1].Bytes())
	both(c.forms, "dP", r.Precomputed.Dp.Bytes())
	both(c.forms, "dQ", r.Precomputed.Dq.Bytes())
	both(c.forms, "d", r.D.Bytes())
	x, err := ecdh.X25519().GenerateKey(rand.Reader)
	fatal(err)
	peer, err := x509.MarshalPKIXPublicKey(x.PublicKey())
	fatal(err)
	n := 0
	both(add("x25519", pkcs8(x), func(d *realDaemon, key string) {
		if n++; n > 5 { // each makes a key
			return
		}
		d.ask(proto.OpAgree, &proto.Agree{Key: key, Peer: peer, New: proto.KeyCreate{Name: fmt.Sprintf("AGREED/%d", n), Algorithm: "aes-256-gcm"}}, &proto.KeyInfo{})
	}).forms, "scalar", x.Bytes())
	for algorithm, size := range map[string]int{"aes-128-gcm": 16, "aes-256-gcm": 32, "chacha20-poly1305": 32} {
		c := add(algorithm, random(size), sealUse)
		c.forms["key"] = c.material
	}
	c = add("hmac-sha256", random(32), func(d *realDaemon, key string) {
		d.ask(proto.OpMAC, &proto.MAC{Key: key, Data: []byte("message")}, &proto.MACReply{})
	})
	c.forms["key"] = c.material
	inner := bytes.Repeat([]byte{0x36}, 64)
	for i, b := range c.material {
		inner[i] ^= b
	}
	c.forms["inner pad"] = inner[:32]
	return out
}

// scan counts the copies of every form in all memory of a process that root can read.
func scan(t *testing.T, pid int, keys map[string]*canary) (found map[string]int, total int) {
	t.Helper()
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		t.Fatal(err)
	}
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	found = make(map[string]int)
	const window, overlap = 1 << 20, 512
	buf := make([]byte, window)
	read := 0
	for line := range strings.Lines(string(maps)) {
		var from, to int64
		var mode string
		if n, _ := fmt.Sscanf(line, "%x-%x %s", &from, &to, &mode); n < 3 || mode[0] != 'r' || strings.Contains(line, "[v") {
			continue
		}
		for at := from; at < to; at += window - overlap {
			n, err := mem.ReadAt(buf[:min(window, to-at)], at)
			if err != nil && !errors.Is(err, io.EOF) && n == 0 {
				continue // secret memory answers EIO, and a map may be gone
			}
			read += n
			for name, c := range keys {
				for form, b := range c.forms {
					if k := bytes.Count(buf[:n], b); k > 0 {
						found[name+" "+form] += k
						total += k
					}
				}
			}
		}
	}
	if read < 1<<20 {
		t.Fatalf("only %d bytes of the daemon's memory could be read", read)
	}
	return found, total
}

// shipped builds kmsd as it is shipped, or without what erases memory.
func shipped(t *testing.T, dir string, erasing bool) string {
	t.Helper()
	bin := filepath.Join(dir, "bin")
	for name, pkg := range map[string]string{"kmsd": ".", "kmsd-keyring": "../enclave/keyring/kmsd-keyring"} {
		args := []string{"build", "-buildvcs=false", "-o", filepath.Join(bin, name)}
		env := append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
		if erasing {
			args = append(args, "-ldflags", "-X runtime.godebugDefault=clobberfree=1,x509negativeserial=1")
			env = append(env, "GOEXPERIMENT=runtimesecret")
		} else {
			env = append(env, "GOEXPERIMENT=")
		}
		cmd := exec.Command("go", append(args, pkg)...)
		cmd.Env = env
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("build %s: %v\n%s", name, err, out)
		}
	}
	return filepath.Join(bin, "kmsd")
}

// scanned runs a daemon, imports the keys, uses each of them 100 times, and scans the memory of the daemon while the keys
// are in use and again when they have been idle, until nothing is found or it has looked often enough, once a second.
func scanned(t *testing.T, program string, keys map[string]*canary, looks int) (busy, idle map[string]int) {
	t.Helper()
	dir := t.TempDir()
	state := filepath.Join(dir, "s")
	if out, err := exec.Command(program, "init", "--state-dir", state, "--no-recovery").CombinedOutput(); err != nil {
		t.Fatalf("init: %v\n%s", err, out)
	}
	config := filepath.Join(dir, "kmsd.toml")
	if err := os.WriteFile(config, []byte("[cache]\nidle_seconds = 2\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	d := startProgram(t, program, dir, "--config", config)
	for name, c := range keys {
		var info proto.KeyInfo
		d.ask(proto.OpKeyImport, &proto.KeyImport{
			Key: proto.KeyCreate{Name: name, Algorithm: c.algorithm, Usage: c.usage}, Material: bytes.Clone(c.material),
		}, &info)
	}
	// On a machine that is busy with other things keys may be idle long enough before the scan comes to them: then they are used once more.
	for tries := 0; tries < 5 && len(busy) < len(keys)/2; tries++ {
		for range 100 {
			for name, c := range keys {
				c.use(d, name)
			}
		}
		busy, _ = scan(t, d.cmd.Process.Pid, keys)
	}
	for range looks { // 2 s idle, a second to the next round of the janitor, two collections
		time.Sleep(time.Second)
		var total int
		if idle, total = scan(t, d.cmd.Process.Pid, keys); total == 0 {
			break
		}
	}
	return busy, idle
}

// When keys have been idle for a while no byte of them is in the memory of the daemon, as far as root can read it.
func TestNoKeyBytesInIdleMemory(t *testing.T) {
	asRoot(t)
	keys := canaries(t)
	busy, idle := scanned(t, shipped(t, t.TempDir(), true), keys, 20)
	t.Logf("in use: %v", busy)
	if len(busy) < len(keys)/2 {
		t.Errorf("the scan finds too little to be believed: %v of keys that are in use", busy)
	}
	for form, n := range idle {
		t.Errorf("%d copies of %s in idle memory", n, form)
	}
}

// The same scan finds keys in a build without runtime/secret and clobberfree, so it would find them in the other.
func TestScanFindsKeyBytes(t *testing.T) {
	asRoot(t)
	if testing.Short() {
		t.Log("the other test has its own control")
		return
	}
	_, idle := scanned(t, shipped(t, t.TempDir(), false), canaries(t), 5)
	t.Logf("idle: %v", idle)
	if len(idle) == 0 {
		t.Error("nothing was found in a build that erases nothing")
	}
}

// startProgram starts the program on the directory as startReal does.
func startProgram(t *testing.T, program, dir string, args ...string) *realDaemon {
	t.Helper()
	p := &process{t: t, dir: dir}
	p.app, p.admin = filepath.Join(dir, "r", "kmsd.sock"), filepath.Join(dir, "r", "admin.sock")
	p.cmd = exec.Command(program, append([]string{"run", "--state-dir", filepath.Join(dir, "s"), "--runtime-dir", filepath.Join(dir, "r")}, args...)...)
	p.cmd.Env = []string{"HOME=" + dir}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.cmd.Process.Kill(); p.cmd.Wait() })
	for deadline := time.Now().Add(20 * time.Second); ; {
		if _, err := os.Stat(p.admin); err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the daemon does not start")
		}
		time.Sleep(20 * time.Millisecond)
	}
	return &realDaemon{process: p, conn: bound(t, p.admin), last: 10}
}
