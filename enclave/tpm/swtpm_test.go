package tpm

import (
	"bytes"
	"context"
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/kmsd-project/kmsd/enclave"
)

// simulator is a software TPM of its own for one test. A machine without swtpm fails the tests: nothing here is skipped.
type simulator struct {
	t   testing.TB
	dir string
	cmd *exec.Cmd
}

// startSimulator starts a new TPM that wants TPM2_Startup, like one behind no firmware.
func startSimulator(t testing.TB) *simulator {
	t.Helper()
	dir, err := os.MkdirTemp("", "tpm") // shorter than t.TempDir: a socket path has 108 bytes
	if err != nil {
		t.Fatal(err)
	}
	s := &simulator{t: t, dir: dir}
	t.Cleanup(func() {
		s.kill()
		os.RemoveAll(dir)
	})
	s.start()
	return s
}

func (s *simulator) socket() string { return filepath.Join(s.dir, "sock") }
func (s *simulator) device() string { return "unix:" + s.socket() }

// start switches the power on.
func (s *simulator) start() {
	s.t.Helper()
	os.Remove(s.socket())
	s.cmd = exec.Command("swtpm", "socket", "--tpm2", "--tpmstate", "dir="+s.dir, "--flags", "not-need-init",
		"--server", "type=unixio,path="+s.socket()+",mode=0600", "--ctrl", "type=unixio,path="+s.socket()+".ctrl,mode=0600",
		"--log", "file="+filepath.Join(s.dir, "log")+",level=1")
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := s.cmd.Start(); err != nil {
		s.t.Fatalf("the tests need swtpm (apt-get install swtpm swtpm-tools tpm2-tools tpm2-openssl): %v", err)
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		if l, err := dialSocket(s.socket()); err == nil {
			l.Close()
			return
		}
		if time.Now().After(deadline) {
			s.t.Fatal("swtpm does not start")
		}
	}
}

// kill pulls the plug: no TPM2_Shutdown.
func (s *simulator) kill() {
	if s.cmd != nil {
		s.cmd.Process.Kill()
		s.cmd.Wait()
		s.cmd = nil
	}
}

// open returns a driver for the TPM that is closed with the test.
func (s *simulator) open(c Config) *TPM {
	s.t.Helper()
	return s.openWith(c, address.dial)
}

func (s *simulator) openWith(c Config, dial func(address) (link, error)) *TPM {
	s.t.Helper()
	c.Device = s.device()
	t, err := open(c, dial)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { t.Close() })
	return t
}

// bare is go-tpm's transport without any of our care: what another program does with the TPM.
type bare struct{ link }

func (b bare) Send(command []byte) ([]byte, error) { return b.link.Send(command, 20*time.Second) }

// other runs f as another program that has the TPM for itself meanwhile.
func (s *simulator) other(f func(b bare)) {
	s.t.Helper()
	l, err := dialSocket(s.socket())
	if err != nil {
		s.t.Fatal(err)
	}
	defer l.Close()
	b := bare{l}
	if _, err := (tpm2.Startup{StartupType: tpm2.TPMSUClear}).Execute(b); err != nil && !isOneOf(err, tpm2.TPMRCInitialize) {
		s.t.Fatal(err)
	}
	f(b)
}

// withPassword sends a command that go-tpm has no struct for, with one handle authorised by a password.
func (b bare) withPassword(code tpm2.TPMCC, handle tpm2.TPMHandle, password, parameters []byte) error {
	var body bytes.Buffer
	write := func(v any) { binary.Write(&body, binary.BigEndian, v) }
	write(handle)
	write(uint32(9 + len(password)))
	write(tpm2.TPMRSPW)
	write([]byte{0, 0, 0})
	write(uint16(len(password)))
	body.Write(password)
	body.Write(parameters)
	answer, err := b.Send(wire(tpm2.TPMSTSessions, code, body.Bytes()))
	if err != nil {
		return err
	}
	if rc := responseCode(answer); rc != tpm2.TPMRCSuccess {
		return rc
	}
	return nil
}

func wire(tag tpm2.TPMST, code tpm2.TPMCC, body []byte) []byte {
	b := binary.BigEndian.AppendUint16(nil, uint16(tag))
	b = binary.BigEndian.AppendUint32(b, uint32(headerSize+len(body)))
	b = binary.BigEndian.AppendUint32(b, uint32(code))
	return append(b, body...)
}

func (s *simulator) clear() {
	s.t.Helper()
	s.other(func(b bare) {
		if _, err := (tpm2.Clear{AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHLockout, Auth: tpm2.PasswordAuth(nil)}}).Execute(b); err != nil {
			s.t.Fatal(err)
		}
	})
}

func (s *simulator) extend(pcr int) {
	s.t.Helper()
	s.other(func(b bare) { extend(s.t, b, pcr) })
}

func extend(t testing.TB, b bare, pcr int) {
	t.Helper()
	_, err := tpm2.PCRExtend{
		PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(pcr), Auth: tpm2.PasswordAuth(nil)},
		Digests:   tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: make([]byte, 32)}}},
	}.Execute(b)
	if err != nil {
		t.Fatal(err)
	}
}

// count returns how many handles of a kind the TPM has.
func (s *simulator) count(kind tpm2.TPMHT) (n int) {
	s.t.Helper()
	s.other(func(b bare) {
		answer, err := tpm2.GetCapability{Capability: tpm2.TPMCapHandles, Property: uint32(kind) << 24, PropertyCount: 254}.Execute(b)
		if err != nil {
			s.t.Fatal(err)
		}
		list, err := answer.CapabilityData.Data.Handles()
		if err != nil {
			s.t.Fatal(err)
		}
		n = len(list.Handle)
	})
	return n
}

func (s *simulator) property(p tpm2.TPMPT) (v uint32) {
	s.t.Helper()
	s.other(func(b bare) {
		answer, err := tpm2.GetCapability{Capability: tpm2.TPMCapTPMProperties, Property: uint32(p), PropertyCount: 1}.Execute(b)
		if err != nil {
			s.t.Fatal(err)
		}
		list, err := answer.CapabilityData.Data.TPMProperties()
		if err != nil {
			s.t.Fatal(err)
		}
		v = list.TPMProperty[0].Value
	})
	return v
}

// tap is a link that a test listens to and interferes with.
type tap struct {
	link
	before func(command []byte) []byte         // an answer instead of the device's, or nil; runs before the command is sent
	after  func(command, answer []byte) []byte // the answer that the driver sees
}

func (l *tap) Send(command []byte, limit time.Duration) ([]byte, error) {
	if l.before != nil {
		if answer := l.before(command); answer != nil {
			return answer, nil
		}
	}
	answer, err := l.link.Send(command, limit)
	if err == nil && l.after != nil {
		answer = l.after(command, answer)
	}
	return answer, err
}

// tapped dials through taps.
func tapped(before func([]byte) []byte, after func(command, answer []byte) []byte) func(address) (link, error) {
	return func(a address) (link, error) {
		l, err := a.dial()
		if err != nil {
			return nil, err
		}
		return &tap{l, before, after}, nil
	}
}

// traffic records what goes over the link.
type traffic struct {
	mu    sync.Mutex
	bytes []byte
}

func (r *traffic) command(c []byte) []byte {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.bytes = append(r.bytes, c...)
	return nil
}

func (r *traffic) answer(_, a []byte) []byte {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.bytes = append(r.bytes, a...)
	return a
}

func (r *traffic) contains(p []byte) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return bytes.Contains(r.bytes, p)
}

var testAAD = enclave.SlotAAD([16]byte{15: 1})

// enrol wraps a secret and checks that it opens.
func enrol(t testing.TB, d *TPM, a enclave.Auth) (enclave.Blob, []byte) {
	t.Helper()
	secret := bytes.Repeat([]byte{0x5a, 0xc3}, enclave.SecretSize/2)
	blob, err := d.Wrap(limited(t), secret, testAAD)
	if err != nil {
		t.Fatalf("wrap: %v", err)
	}
	opens(t, d, blob, a, secret)
	return blob, secret
}

func unwrap(t testing.TB, d *TPM, blob enclave.Blob, a enclave.Auth) ([]byte, error) {
	t.Helper()
	dst := make([]byte, enclave.SecretSize)
	err := d.Unwrap(limited(t), blob, testAAD, a, dst)
	return dst, err
}

func opens(t testing.TB, d *TPM, blob enclave.Blob, a enclave.Auth, secret []byte) {
	t.Helper()
	got, err := unwrap(t, d, blob, a)
	if err != nil {
		t.Fatalf("unwrap: %v", err)
	}
	if !bytes.Equal(got, secret) {
		t.Fatal("unwrap gave another secret")
	}
}

// limited is a context that ends before a hanging test would.
func limited(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func pin(s string) enclave.Auth { return enclave.Auth{Secret: []byte(s)} }
