package keyring_test

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/enclave/enclavetest"
	"github.com/kmsd-project/kmsd/enclave/helper"
	"github.com/kmsd-project/kmsd/enclave/keyring"
)

// member is a slot that was enrolled with the keyring of a desktop.
type member struct {
	t       *testing.T
	enclave *helper.Enclave
	blob    enclave.Blob
	secret  []byte
}

func enrol(t *testing.T) *member {
	t.Helper()
	m := &member{t: t, enclave: keyring.DialSecretService(startSpawner(t)), secret: bytes.Repeat([]byte{0x5C}, enclave.SecretSize)}
	t.Cleanup(func() { m.enclave.Close() })
	var err error
	if m.blob, err = m.enclave.Wrap(t.Context(), m.secret, aad); err != nil {
		t.Fatal(err)
	}
	return m
}

// dial opens the keyring with a new helper, that sees the environment as it is now.
func (m *member) dial(params map[string]string) {
	m.t.Helper()
	m.enclave.Close()
	m.enclave = helper.New(startSpawner(m.t), helper.Config{Kind: keyring.SecretServiceKind, Params: params})
	m.t.Cleanup(func() { m.enclave.Close() })
}

func (m *member) unwrap(within time.Duration) error {
	ctx, cancel := context.WithTimeout(m.t.Context(), within)
	defer cancel()
	dst := make([]byte, enclave.SecretSize)
	start := time.Now()
	err := m.enclave.Unwrap(ctx, m.blob, aad, enclave.Auth{}, dst)
	if took := time.Since(start); took > within+time.Second {
		m.t.Errorf("a call with %v took %v", within, took)
	}
	if err == nil && !bytes.Equal(dst, m.secret) {
		return errors.New("another secret")
	}
	if err != nil && !bytes.Equal(dst, make([]byte, len(dst))) {
		m.t.Error("wrote into the destination and failed")
	}
	return err
}

// refused checks that the slot does not open, with the error and a remedy.
func (m *member) refused(what string, want error, remedy string) {
	m.t.Helper()
	err := m.unwrap(5 * time.Second)
	var e *enclave.Error
	if !errors.Is(err, want) || !errors.As(err, &e) || !strings.Contains(e.Remedy, remedy) {
		m.t.Errorf("%s: %v, want %v with the remedy %q", what, err, want, remedy)
	}
}

// opensWithin tries until it works, as requests do; the first may meet the helper that is being replaced.
func (m *member) opensWithin(limit time.Duration) {
	m.t.Helper()
	start := time.Now()
	err := m.unwrap(5 * time.Second)
	for err != nil && time.Since(start) < limit {
		err = m.unwrap(5 * time.Second)
	}
	if err != nil {
		m.t.Errorf("does not open: %v", err)
	}
}

// profile is the attribute of the slot's item in the keyring.
func (m *member) profile() string {
	_, body, err := enclave.DecodeBlob(keyring.SecretServiceKind, m.blob)
	if err != nil {
		m.t.Fatal(err)
	}
	return "kmsd-" + hex.EncodeToString(body[:16])
}

func (m *member) health(want enclave.HealthState, detail string) {
	m.t.Helper()
	if h := m.enclave.Health(m.t.Context()); h.State != want || !strings.Contains(h.Detail, detail) {
		m.t.Errorf("health %+v, want %s with %q", h, want, detail)
	}
}

func TestSecretServiceConformance(t *testing.T) {
	newDesktop(t).login()
	s := startSpawner(t)
	enclavetest.Run(t, func(t *testing.T) enclavetest.Device {
		return enclavetest.Device{Open: func(*testing.T) enclave.Enclave { return keyring.DialSecretService(s) }}
	})
}

// The keyring restarts, first locked, then unlocked: the slot waits, says what is to be done, and opens again, without a new helper.
func TestSecretServiceLocked(t *testing.T) {
	d := newDesktop(t)
	d.login()
	m := enrol(t)
	if info := m.enclave.Info(); info.NeedsYou || len(info.Binding) != 16 || !strings.Contains(info.Level, "not against root") {
		t.Errorf("info %+v", info)
	}
	m.health(enclave.Ready, "")
	if err := m.unwrap(5 * time.Second); err != nil {
		t.Fatal(err)
	}

	d.autologin()
	m.health(enclave.Locked, "no display")
	m.refused("locked", enclave.ErrLocked, "unlock it in the session")
	if _, err := m.enclave.Wrap(t.Context(), m.secret, aad); !errors.Is(err, enclave.ErrLocked) {
		t.Errorf("wrap: %v", err)
	}

	d.login()
	m.health(enclave.Ready, "")
	if err := m.unwrap(5 * time.Second); err != nil {
		t.Fatal(err)
	}
}

// With a display the keyring is asked to prompt. The real one finds no prompter on this bus, which counts as dismissed.
func TestSecretServicePromptCannotBeShown(t *testing.T) {
	d := newDesktop(t)
	d.login()
	m := enrol(t)
	t.Setenv("DISPLAY", ":99")
	m.dial(nil)
	d.autologin()
	m.health(enclave.Locked, "asks for its password")
	m.refused("no prompter", enclave.ErrLocked, "answer the prompt")
	d.login()
	m.opensWithin(2 * time.Second)
}

func TestSecretServicePrompt(t *testing.T) {
	d := newDesktop(t)
	t.Setenv("WAYLAND_DISPLAY", "wayland-0")

	d.fake("answer")
	m := enrol(t) // which unlocks it
	if err := m.unwrap(5 * time.Second); err != nil {
		t.Error(err)
	}

	wrap := func(within time.Duration) error {
		ctx, cancel := context.WithTimeout(t.Context(), within)
		defer cancel()
		_, err := m.enclave.Wrap(ctx, m.secret, aad)
		return err
	}
	var e *enclave.Error
	d.fake("dismiss")
	if err := wrap(5 * time.Second); !errors.Is(err, enclave.ErrLocked) || !errors.As(err, &e) || !strings.Contains(e.Remedy, "answer the prompt") {
		t.Errorf("dismissed: %v", err)
	}
	d.fake("never")
	m.dial(map[string]string{keyring.ParamPrompt: "300ms"})
	start := time.Now()
	if err := wrap(5 * time.Second); !errors.Is(err, enclave.ErrLocked) || !errors.As(err, &e) || !strings.Contains(e.Remedy, "answer the prompt") {
		t.Errorf("never answered: %v", err)
	}
	if took := time.Since(start); took < 250*time.Millisecond || took > 3*time.Second {
		t.Errorf("a prompt of 300 ms took %v", took)
	}
	m.dial(nil)
	if err := wrap(300 * time.Millisecond); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the caller's deadline: %v", err)
	}
	d.login()
	m.secret = bytes.Repeat([]byte{1}, enclave.SecretSize)
	blob, err := m.enclave.Wrap(t.Context(), m.secret, aad)
	if err != nil { // it met the helper that ends after a call that hangs
		blob, err = m.enclave.Wrap(t.Context(), m.secret, aad)
	}
	if err != nil {
		t.Fatal(err)
	}
	m.blob = blob
	m.opensWithin(2 * time.Second)
}

func TestSecretServiceFaults(t *testing.T) {
	d := newDesktop(t)
	d.login()
	m := enrol(t)

	d.stopService()
	m.health(enclave.Absent, "start the keyring")
	m.refused("no service", enclave.ErrAbsent, "gnome-keyring-daemon")
	d.login()
	m.opensWithin(2 * time.Second)

	d.stopService()
	d.stopBus()
	m.refused("no bus", enclave.ErrAbsent, "")
	m.unwrap(5 * time.Second) // this one may meet the helper that ends
	m.refused("no bus, with a new helper", enclave.ErrAbsent, "session")
	d.startBus()
	d.login()
	m.opensWithin(2 * time.Second)

	d.fake("hang")
	if err := m.unwrap(300 * time.Millisecond); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a service that hangs: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if h := m.enclave.Health(ctx); h.State != enclave.Absent {
		t.Errorf("a service that hangs: %+v", h)
	}
	m.dial(map[string]string{keyring.ParamAnswer: "200ms"})
	m.refused("a service that hangs, with time to wait", enclave.ErrAbsent, "restart the keyring")
	m.dial(nil)
	d.fake("nonsense")
	m.refused("nonsense", enclave.ErrMisconfigured, "")
	m.health(enclave.Misconfigured, "")
	d.fake("other")
	m.refused("another collection", enclave.ErrAbsent, "log in")
	d.login()
	m.opensWithin(2 * time.Second)

	d.secretTool("", "clear", "profile", m.profile())
	m.refused("item gone", enclave.ErrReplaced, "slot add keyring:secret-service")
	d.secretTool("not what kmsd stored", "store", "--label=x", "profile", m.profile())
	m.refused("item replaced", enclave.ErrCorrupt, "slot add keyring:secret-service")
}

// A bus that takes the connection and says nothing holds the helper up before its first line of code.
func TestBusThatHangs(t *testing.T) {
	dir, err := os.MkdirTemp("", "kr")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "bus")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	t.Setenv("DBUS_SESSION_BUS_ADDRESS", "unix:path="+path)
	m := &member{t: t, enclave: keyring.DialSecretService(startSpawner(t)), blob: make(enclave.Blob, 50)}
	defer m.enclave.Close()
	for range 2 {
		if err := m.unwrap(300 * time.Millisecond); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
	}
}

func TestSecretServiceParameters(t *testing.T) {
	newDesktop(t).login()
	for _, test := range []struct {
		name, value string
		want        error
	}{
		{keyring.ParamCollection, "../login", enclave.ErrMisconfigured},
		{keyring.ParamCollection, "log_in", enclave.ErrMisconfigured},
		{keyring.ParamCollection, "other", enclave.ErrAbsent},
		{keyring.ParamPrompt, "soon", enclave.ErrMisconfigured},
		{keyring.ParamPrompt, "-1s", enclave.ErrMisconfigured},
		{keyring.ParamAnswer, "0", enclave.ErrMisconfigured},
	} {
		e := helper.New(startSpawner(t), helper.Config{Kind: keyring.SecretServiceKind, Params: map[string]string{test.name: test.value}})
		if _, err := e.Wrap(t.Context(), make([]byte, enclave.SecretSize), aad); !errors.Is(err, test.want) {
			t.Errorf("%s %q: %v", test.name, test.value, err)
		}
		e.Close()
	}
}
