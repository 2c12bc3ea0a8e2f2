package pkcs11_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/enclave/helper"
	"github.com/kmsd-project/kmsd/enclave/pkcs11"
	"github.com/kmsd-project/kmsd/enclave/pkcs11/pkcs11test"
	"github.com/kmsd-project/kmsd/kmsd/programs"
)

var aad = enclave.SlotAAD([16]byte{11})

// binaries are the real helper program.
var binaries = programs.New("enclave/pkcs11/kmsd-pkcs11")

func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == "spawner" {
		os.Exit(helper.RunSpawner(os.Args[2]))
	}
	code := m.Run()
	binaries.Remove()
	os.Exit(code)
}

// softHSM is a token, and the spawner whose helpers see it.
type softHSM struct {
	*pkcs11test.SoftHSM
	spawner *helper.Spawner
}

func newSoftHSM(t *testing.T) *softHSM {
	t.Helper()
	h := &softHSM{SoftHSM: pkcs11test.New(t)}
	h.startSpawner(t)
	return h
}

func (h *softHSM) startSpawner(t *testing.T) {
	t.Helper()
	dir := binaries.Dir(t)
	var err error
	if h.spawner, err = helper.StartSpawner(helper.SpawnerConfig{Command: []string{"/proc/self/exe", "spawner", dir}}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.spawner.Close() })
}

func (h *softHSM) spec() pkcs11.Spec { return pkcs11.Spec{Module: h.Module, Token: pkcs11test.Label} }

func (h *softHSM) dial(t *testing.T, s pkcs11.Spec) *helper.Resident {
	t.Helper()
	e, err := pkcs11.Dial(h.spawner, s)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.Close() })
	return e
}

// open returns a driver that is logged in.
func (h *softHSM) open(t *testing.T, s pkcs11.Spec) *helper.Resident {
	t.Helper()
	e := h.dial(t, s)
	if err := e.Login(t.Context(), pin()); err != nil {
		t.Fatalf("login: %v", err)
	}
	return e
}

func pin() enclave.Auth { return enclave.Auth{Secret: []byte(pkcs11test.PIN)} }

func wrongPIN() enclave.Auth { return enclave.Auth{Secret: []byte("7654321")} }

// slot is a secret that was wrapped.
type slot struct {
	blob   enclave.Blob
	secret []byte
}

func enrol(t *testing.T, e enclave.Enclave) slot {
	t.Helper()
	s := slot{secret: bytes.Repeat([]byte{0xC5}, enclave.SecretSize)}
	var err error
	if s.blob, err = e.Wrap(t.Context(), s.secret, aad); err != nil {
		t.Fatalf("wrap: %v", err)
	}
	return s
}

func (s slot) unwrap(ctx context.Context, e enclave.Enclave, a enclave.Auth) error {
	dst := make([]byte, enclave.SecretSize)
	err := e.Unwrap(ctx, s.blob, aad, a, dst)
	if err == nil && !bytes.Equal(dst, s.secret) {
		return errors.New("another secret")
	}
	if err != nil && !bytes.Equal(dst, make([]byte, len(dst))) {
		return errors.New("the destination is not zero after an error")
	}
	return err
}

// stub is the module that misbehaves when it is told to.
type stub struct{ control string }

// newStub compiles the module for one test and lets the token be reached through it.
func newStub(t *testing.T, h *softHSM) *stub {
	t.Helper()
	s := &stub{control: filepath.Join(h.Dir, "control")}
	out, err := exec.Command("go", "list", "-m", "-json", "github.com/miekg/pkcs11").Output()
	var headers struct{ Dir string }
	if err != nil || json.Unmarshal(out, &headers) != nil || headers.Dir == "" {
		t.Fatalf("the headers of PKCS#11: %v", err)
	}
	module := filepath.Join(h.Dir, "stub.so")
	gcc := exec.Command("gcc", "-shared", "-fPIC", "-O1", "-w", "-I", headers.Dir, "-o", module, "testdata/stub.c",
		"-DREAL="+strconv.Quote(h.Module), "-DCONTROL="+strconv.Quote(s.control), "-ldl", "-lpthread")
	if out, err := gcc.CombinedOutput(); err != nil {
		t.Fatalf("gcc: %v\n%s", err, out)
	}
	h.Module = module
	return s
}

// does tells the module what to do from now on.
func (s *stub) does(t *testing.T, lines ...string) {
	t.Helper()
	if err := os.WriteFile(s.control, []byte(strings.Join(lines, "\n")+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
}

// calls is how often a function was called so far.
func (s *stub) calls(t *testing.T, function string) int {
	t.Helper()
	log, err := os.ReadFile(s.control + ".log")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count("\n"+string(log), "\n"+function+"\n")
}

// helpers returns the processes of the helper program.
func helpers(t *testing.T) []int {
	t.Helper()
	dir := binaries.Dir(t)
	all, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	var pids []int
	for _, process := range all {
		if exe, err := os.Readlink(process + "/exe"); err == nil && exe == filepath.Join(dir, "kmsd-pkcs11") {
			pid, _ := strconv.Atoi(filepath.Base(process))
			pids = append(pids, pid)
		}
	}
	return pids
}
