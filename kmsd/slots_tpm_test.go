package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/enclave/keyring"
	"github.com/kmsd-project/kmsd/enclave/pkcs11"
	"github.com/kmsd-project/kmsd/enclave/recovery"
	"github.com/kmsd-project/kmsd/enclave/tpm/swtpmtest"
	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/keystore"
)

// startTPM returns a software TPM of the test, and its spec.
func startTPM(t *testing.T) (*swtpmtest.TPM, string) {
	t.Helper()
	s, err := swtpmtest.Start()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s, "tpm:unix:" + s.Path()
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// opens locks the store and opens it.
func (r *slotRig) opens(t *testing.T, s *keystore.Store, a attempt, want error) {
	t.Helper()
	s.Lock()
	if err := r.unlock(t.Context(), s, a); !errors.Is(err, want) || (err == nil) != (want == nil) || s.Locked() != (want != nil) {
		t.Errorf("%+v: %v, locked %v, want %v", a, err, s.Locked(), want)
	}
}

func TestTPMSlot(t *testing.T) {
	t.Parallel()
	for _, options := range []string{"", "?guard=agreed", "?pcrs=7"} {
		r := newSlotRig(t)
		machine, spec := startTPM(t)
		s, key := r.store(t, initParams{Enclave: spec + options})
		slot := s.Slots()[0]
		if slot.Kind != "tpm" || slot.Location != spec || len(slot.Binding) != 68 || !strings.HasPrefix(slot.Level, "software tpm") {
			t.Errorf("slot %+v", slot)
		}
		if got := s.Info().Rollback; !strings.Contains(got, spec) {
			t.Errorf("rollback is %s", got)
		}
		r.opens(t, s, attempt{}, nil)
		if h := r.list(t.Context(), s)[0].Health; h.State != enclave.Ready {
			t.Errorf("health %+v", h)
		}

		machine.PowerOff()
		r.opens(t, s, attempt{}, enclave.ErrAbsent)
		if h := r.list(t.Context(), s)[0].Health; h.State != enclave.Absent {
			t.Errorf("health %+v", h)
		}
		must(t, machine.PowerOn())
		r.opens(t, s, attempt{}, nil) // a loss of power resets PCRs, as a boot does

		must(t, machine.Extend(7))
		changed := error(nil)
		if options == "?pcrs=7" {
			changed = enclave.ErrPolicy
		}
		r.opens(t, s, attempt{}, changed)
		if h := r.list(t.Context(), s)[0].Health; (h.State == enclave.Ready) != (changed == nil) {
			t.Errorf("health %+v after a change of PCR 7", h)
		}
		r.opens(t, s, attempt{Auth: enclave.Auth{Secret: key}}, nil)

		must(t, machine.Clear())
		r.opens(t, s, attempt{}, enclave.ErrReplaced)
		if h := r.list(t.Context(), s)[0].Health; h.State != enclave.Replaced {
			t.Errorf("health %+v", h)
		}
		r.opens(t, s, attempt{Auth: enclave.Auth{Secret: key}}, keystore.ErrCounterAbsent)
		r.opens(t, s, attempt{Auth: enclave.Auth{Secret: key}, AcceptRollback: true}, nil)

		// The drill: enrol the TPM as it is now, remove the stale slot.
		if _, _, err := r.add(t.Context(), s, addParams{Enclave: spec}); err != nil {
			t.Fatal(err)
		}
		must(t, r.remove(t.Context(), s, slot.ID))
		r.opens(t, s, attempt{}, nil)
		if got := s.Info().Rollback; !strings.HasPrefix(got, "detected") {
			t.Errorf("rollback is %s after the drill", got)
		}
		for _, other := range r.list(t.Context(), s) {
			if other.Health.State != enclave.Ready {
				t.Errorf("slot %+v", other)
			}
		}
	}
}

func TestTPMSlotWithPIN(t *testing.T) {
	t.Parallel()
	r := newSlotRig(t)
	_, spec := startTPM(t)
	s, key := r.store(t, initParams{Enclave: spec, PIN: []byte("4711")})
	slot := s.Slots()[0]
	pin := func(text string) enclave.Auth { return enclave.Auth{Secret: []byte(text)} }
	r.opens(t, s, attempt{}, enclave.ErrLocked)
	r.opens(t, s, attempt{Auth: pin("4711")}, nil)
	r.opens(t, s, attempt{Slot: slot.ID, Auth: pin("4711")}, nil)
	must(t, r.test(t.Context(), s, slot.ID, pin("4711")))
	// A recovery key with a typing error is not tried as a PIN.
	broken := bytes.Replace(bytes.Clone(key), []byte("-"), []byte("-0"), 1)
	for range 5 {
		r.opens(t, s, attempt{Auth: enclave.Auth{Secret: broken}}, enclave.ErrAuth)
	}
	for range 3 {
		r.opens(t, s, attempt{Auth: pin("1234")}, enclave.ErrAuth)
	}
	r.opens(t, s, attempt{Auth: pin("4711")}, enclave.ErrLockedOut)
	h := r.list(t.Context(), s)[0].Health
	if h.State != enclave.LockedOut || !h.Until.After(time.Now()) {
		t.Errorf("health %+v", h)
	}
	r.opens(t, s, attempt{Auth: enclave.Auth{Secret: key}}, nil)
	// A second slot without a PIN opens all the same, and is healthy.
	if _, _, err := r.add(t.Context(), s, addParams{Enclave: spec}); err != nil {
		t.Fatal(err)
	}
	r.opens(t, s, attempt{}, nil)
	if list := r.list(t.Context(), s); list[0].Health.State != enclave.LockedOut || list[2].Health.State != enclave.Ready {
		t.Errorf("health %+v, %+v", list[0].Health, list[2].Health)
	}
}

// A PIN from a file opens the store at start. One that was refused is not tried again until the file is another one or somebody asks.
func TestPINFromAFile(t *testing.T) {
	t.Parallel()
	r := newSlotRig(t)
	_, spec := startTPM(t)
	file := filepath.Join(t.TempDir(), "pin")
	write := func(text string) {
		must(t, os.WriteFile(file+".new", []byte(text+"\n"), 0o600))
		must(t, os.Rename(file+".new", file))
	}
	write("4711")
	s, _ := r.store(t, initParams{Enclave: spec, PIN: []byte("4711")})
	devices, state := deviceConfig{TPMPINFile: file}, t.TempDir()
	r.pins = newPINs(devices, state, r.devices.same, r.slotKeeper.log)
	r.opens(t, s, attempt{}, nil)
	r.opens(t, s, attempt{Why: onUse}, enclave.ErrLocked)
	write("1234")
	for range 6 { // the TPM would be locked out after three
		r.opens(t, s, attempt{}, enclave.ErrAuth)
		r.pins = newPINs(devices, state, r.devices.same, r.slotKeeper.log) // a restart
	}
	write("4711")
	r.opens(t, s, attempt{}, nil)
	write("1234")
	r.opens(t, s, attempt{}, enclave.ErrAuth)
	r.opens(t, s, attempt{Slot: s.Slots()[0].ID, Auth: enclave.Auth{Secret: []byte("4711")}}, nil)
	r.opens(t, s, attempt{Why: onDemand}, enclave.ErrAuth)
	must(t, os.Chmod(file, 0o644))
	r.opens(t, s, attempt{Why: onDemand}, enclave.ErrMisconfigured)
	must(t, os.Remove(file))
	r.opens(t, s, attempt{}, enclave.ErrMisconfigured)
	write("")
	r.opens(t, s, attempt{}, enclave.ErrMisconfigured)
}

// A device with two slots refuses the PIN of a file once, not twice; so it does when somebody asks.
func TestRefusedPINCountsForTheDevice(t *testing.T) {
	t.Parallel()
	r := newSlotRig(t)
	_, spec := startTPM(t)
	file := filepath.Join(t.TempDir(), "pin")
	must(t, os.WriteFile(file, []byte("1234"), 0o600))
	s, _ := r.store(t, initParams{Enclave: spec, PIN: []byte("4711")})
	if _, _, err := r.add(t.Context(), s, addParams{Enclave: spec, PIN: []byte("4711")}); err != nil {
		t.Fatal(err)
	}
	r.pins = newPINs(deviceConfig{TPMPINFile: file}, t.TempDir(), r.devices.same, r.slotKeeper.log)
	r.opens(t, s, attempt{}, enclave.ErrAuth)
	r.opens(t, s, attempt{}, enclave.ErrAuth)
	r.opens(t, s, attempt{Why: onDemand}, enclave.ErrAuth)
	r.opens(t, s, attempt{Why: onDemand, Slot: s.Slots()[0].ID}, enclave.ErrAuth)                  // the second attempt: somebody means this slot
	r.opens(t, s, attempt{Slot: s.Slots()[0].ID, Auth: enclave.Auth{Secret: []byte("4711")}}, nil) // a third wrong one would have locked the TPM out
}

// A token is one device under its label and under its serial number, and under the location that it has moved from. A file of what was refused that
// cannot be read is no reason not to start.
func TestRefusedPINByAnyLocation(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := filepath.Join(dir, "pin")
	must(t, os.WriteFile(file, []byte("1234"), 0o600))
	must(t, os.WriteFile(filepath.Join(dir, refusedPINs), []byte("{\"pkcs11:/m.so?token=a\": 7"), 0o600))
	config := deviceConfig{HSMPINFile: file, Moved: map[string]string{"pkcs11:/old.so?token=a": "pkcs11:/m.so?token=a"}}
	log := new(bytes.Buffer)
	start := func() *pins {
		logger := slog.New(slog.NewTextHandler(log, nil))
		return newPINs(config, dir, newDevices("", nil, config, logger).same, logger)
	}
	p := start()
	if !strings.Contains(log.String(), "not known which PINs") {
		t.Errorf("log %q", log)
	}
	pin, stamp, err := p.take(pkcs11.Kind, "pkcs11:/m.so?token=a", false)
	if err != nil || string(pin) != "1234" {
		t.Fatalf("%q, %v", pin, err)
	}
	p.outcome("pkcs11:/m.so?token=a", stamp, enclave.ErrAuth)
	for _, p := range []*pins{p, start()} {
		for location, refused := range map[string]bool{
			"pkcs11:/m.so?serial=1&token=a": true, "pkcs11:/m.so?serial=1": true, "pkcs11:/old.so?token=a": true,
			"pkcs11:/m.so?serial=1&token=b": false, "pkcs11:/other.so?token=a": false,
		} {
			if _, _, err := p.take(pkcs11.Kind, location, false); errors.Is(err, enclave.ErrAuth) != refused {
				t.Errorf("%s: %v", location, err)
			}
		}
	}
	p.outcome("pkcs11:/m.so?serial=1&token=a", stamp, nil)
	for _, p := range []*pins{p, start()} {
		if _, _, err := p.take(pkcs11.Kind, "pkcs11:/m.so?token=a", false); err != nil {
			t.Errorf("accepted since: %v", err)
		}
	}
}

// A TPM whose owner hierarchy has a password is used with the one in the configuration.
func TestOwnerPassword(t *testing.T) {
	t.Parallel()
	r := newSlotRig(t)
	machine, spec := startTPM(t)
	must(t, machine.SetOwnerPassword("owner"))
	if _, _, err := r.create(t.Context(), r.config, initParams{Enclave: spec}); !errors.Is(err, enclave.ErrMisconfigured) || hintOf(err) == "" {
		t.Fatal(err)
	}
	r.devices.owner = filepath.Join(t.TempDir(), "owner")
	must(t, os.WriteFile(r.devices.owner, []byte("owner\n"), 0o600))
	s, _ := r.store(t, initParams{Enclave: spec})
	r.opens(t, s, attempt{}, nil)
	if got := s.Info().Rollback; !strings.HasPrefix(got, "detected") {
		t.Errorf("rollback is %s", got)
	}
}

// A slot that an update may shut is refused without another one that was tried, and keeps that other one from being removed.
func TestPCRSlotNeedsAWayBack(t *testing.T) {
	t.Parallel()
	r := newSlotRig(t)
	_, spec := startTPM(t)
	if _, _, err := r.create(t.Context(), r.config, initParams{Enclave: spec + "?pcrs=7", NoRecovery: true}); !errors.Is(err, errSpec) || hintOf(err) == "" {
		t.Fatal(err)
	}
	// A slot in the same TPM is no way back: what clears the TPM shuts both.
	plain := newSlotRig(t)
	alone, _ := plain.store(t, initParams{Enclave: spec, NoRecovery: true})
	if _, _, err := plain.add(t.Context(), alone, addParams{Enclave: spec + "?pcrs=7"}); !errors.Is(err, errSpec) || hintOf(err) == "" {
		t.Fatal(err)
	}
	s, key := r.store(t, initParams{Enclave: recovery.Kind})
	clear(r.tested) // as if kmsd had been started again
	if _, _, err := r.add(t.Context(), s, addParams{Enclave: spec + "?pcrs=7"}); !errors.Is(err, errSpec) || hintOf(err) == "" {
		t.Fatal(err)
	}
	must(t, r.test(t.Context(), s, s.Slots()[0].ID, enclave.Auth{Secret: key}))
	added, _, err := r.add(t.Context(), s, addParams{Enclave: spec + "?pcrs=7"})
	must(t, err)
	if err := r.remove(t.Context(), s, s.Slots()[0].ID); !errors.Is(err, errSpec) || hintOf(err) == "" {
		t.Errorf("the way back was removed: %v", err)
	}
	must(t, r.remove(t.Context(), s, added.ID))
	if got := s.Info().Rollback; got != "not detectable" {
		t.Errorf("the store is still bound to a TPM that has no slot: %s", got)
	}
}

// The configuration chooses what opens without a person, and in which order; nothing weaker is tried otherwise.
func TestUnlockOrder(t *testing.T) {
	t.Parallel()
	r := newSlotRig(t)
	machine, spec := startTPM(t)
	s, _ := r.store(t, initParams{Enclave: spec})
	weak, _, err := r.add(t.Context(), s, addParams{Enclave: keyring.FileKind})
	must(t, err)
	// The counter of the TPM is another matter: it would keep the store shut as well.
	must(t, s.UnbindCounter(t.Context()))
	r.opens(t, s, attempt{}, nil)
	machine.PowerOff()
	r.opens(t, s, attempt{}, enclave.ErrAbsent)
	for _, order := range [][]string{{"tpm", "keyring:file"}, {"keyring:file"}, {"7", "3", "tpm"}} {
		r.order = order
		r.opens(t, s, attempt{}, nil)
	}
	r.order = []string{"tpm"}
	r.opens(t, s, attempt{}, enclave.ErrAbsent)
	r.order = []string{}
	r.opens(t, s, attempt{}, enclave.ErrLocked)
	r.order = nil
	r.opens(t, s, attempt{Slot: weak.ID, Why: onDemand}, nil)
	must(t, machine.PowerOn())
	r.attend = true
	r.opens(t, s, attempt{}, enclave.ErrLocked)
	r.opens(t, s, attempt{Why: onUse}, enclave.ErrLocked)
	r.opens(t, s, attempt{Why: onDemand}, nil)
}

func TestConfigOfDevices(t *testing.T) {
	for _, text := range []string{
		"[unlock]\norder = [\"recovery\"]", "[unlock]\norder = [\"what\"]", "[unlock]\norder = [\"0\"]",
		"[devices]\ntpm = \"keyring:file\"", "[devices]\ntpm_owner_file = \"x\"", "[unlock]\ncache = \"1ms\"", "[unlock]\ncache = \"for ever\"", "[devices]\nhsm = \"pkcs11:x\"", "[devices]\ntpm_pin_file = \"x\"",
		"[devices]\ntpm_pin_file = \"/x\"\ntpm_pin_credential = \"y\"", "[devices]\nhsm_pin_credential = \"../y\"",
		"[devices.moved]\n\"tpm:/dev/tpm0\" = \"keyring:file\"", "store_id = \"what\"", "store_id = \"00\"",
		"store_id = \"000102030405060708090a0b0c0d0e0f-\"",
	} {
		if _, err := parseConfig([]byte(text)); !errors.Is(err, errConfig) {
			t.Errorf("%s: %v", text, err)
		}
	}
	c, err := parseConfig([]byte("store_id = \"000102030405060708090a0b0c0d0e0f\"\n[unlock]\norder = [\"tpm\", \"2\"]\nunattended = false\n" +
		"[devices]\ntpm = \"tpm:/dev/tpmrm0\"\nhsm = \"pkcs11:/m.so?token=t\"\nhsm_pin_credential = \"pin\"\n[devices.moved]\n\"tpm:/dev/tpm0\" = \"tpm:/dev/tpmrm0\""))
	if err != nil || len(c.Unlock.Order) != 2 || *c.Unlock.Unattended {
		t.Errorf("%+v, %v", c, err)
	}
}

// inited makes a keystore with a TPM offline and starts the daemon on it.
func initedWithTPM(t *testing.T, args ...string) (d *realDaemon, machine *swtpmtest.TPM, key []byte) {
	t.Helper()
	machine, spec := startTPM(t)
	dir := t.TempDir()
	file := filepath.Join(dir, "key")
	if run := runInitProgram(t, nil, append([]string{"--state-dir", filepath.Join(dir, "s"), "--recovery-out", file, "--enclave", spec}, args...)...); run.code != 0 {
		t.Fatalf("%+v", run)
	}
	key, err := os.ReadFile(file)
	must(t, err)
	return startReal(t, dir), machine, key
}

func (d *realDaemon) status() (s proto.Status) {
	d.t.Helper()
	d.ask(proto.OpStatus, &proto.Empty{}, &s)
	return s
}

// The TPM is away when kmsd starts, and comes back: the next request is carried out, without a restart.
func TestDeviceComesBack(t *testing.T) {
	t.Parallel()
	d, machine, _ := initedWithTPM(t)
	d.ask(proto.OpKeyCreate, &proto.KeyCreate{Name: "app/key", Algorithm: "ed25519"}, &proto.KeyInfo{})
	d.conn.Close()
	d.stop()
	machine.PowerOff()
	d = startReal(t, d.dir)
	if s := d.status(); s.State != "locked" || s.LockReason != "absent" || s.LockDetail == "" || s.Slots[0].Health != "absent" {
		t.Errorf("%+v", s)
	}
	d.refused(proto.OpKeyGet, &proto.KeyRef{Key: "app/key"}, proto.CodeLocked)
	must(t, machine.PowerOn())
	time.Sleep(healEvery) // the last request was just refused; one a second is tried
	d.ask(proto.OpKeyGet, &proto.KeyRef{Key: "app/key"}, &proto.KeyInfo{})
	if s := d.status(); s.State != "ready" || s.LockReason != "" || s.Slots[0].Health != "ready" {
		t.Errorf("%+v", s)
	}

	// What somebody has locked stays locked.
	d.ask(proto.OpLock, &proto.Empty{}, &proto.Empty{})
	for range 3 {
		d.refused(proto.OpKeyGet, &proto.KeyRef{Key: "app/key"}, proto.CodeLocked)
		time.Sleep(healEvery / 2)
	}
	if s := d.status(); s.State != "locked" || s.LockDetail != "locked by an administrator" {
		t.Errorf("%+v", s)
	}
	d.ask(proto.OpUnlock, &proto.Unlock{}, &proto.Empty{})
	// A TPM that goes away and comes back while kmsd is ready disturbs nobody who uses software keys.
	machine.PowerOff()
	d.ask(proto.OpSign, &proto.Sign{Key: "app/key", Data: []byte("x")}, &proto.SignReply{})
	must(t, machine.PowerOn())
	d.ask(proto.OpSlotTest, &proto.SlotRef{ID: 1}, &proto.Empty{})
}

// A TPM that is slow, as real ones are, is used again too: the attempt goes on when the request that has caused it cannot wait any more.
func TestSlowDeviceComesBack(t *testing.T) {
	t.Parallel()
	d, machine, _ := initedWithTPM(t)
	d.conn.Close()
	d.stop()
	slow := machine.Path() + ".slow"
	config := filepath.Join(d.dir, "kmsd.toml")
	must(t, os.WriteFile(config, fmt.Appendf(nil, "[devices.moved]\n\"tpm:unix:%s\" = \"tpm:unix:%s\"\n", machine.Path(), slow), 0o600))
	p := newReal(t, d.dir, "--config", config).start().ready()
	d = &realDaemon{process: p, conn: bound(t, p.admin), last: 10}
	if s := d.status(); s.State != "locked" || s.LockReason != "absent" {
		t.Fatalf("%+v", s)
	}
	l, err := net.Listen("unix", slow)
	must(t, err)
	defer l.Close()
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go delay(conn, machine.Path(), 150*time.Millisecond)
		}
	}()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(200 * time.Millisecond) {
		s := d.status()
		if s.State == "ready" {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("%+v", s)
		}
	}
}

// delay passes everything on, each command after a while.
func delay(conn net.Conn, path string, wait time.Duration) {
	defer conn.Close()
	tpm, err := net.Dial("unix", path)
	if err != nil {
		return
	}
	defer tpm.Close()
	go io.Copy(conn, tpm)
	buffer := make([]byte, 4096)
	for {
		n, err := conn.Read(buffer)
		if err != nil {
			return
		}
		time.Sleep(wait)
		if _, err := tpm.Write(buffer[:n]); err != nil {
			return
		}
	}
}

// The TPM loses its power in the middle of a test of its slot, again and again: each request has an answer, and the next one works.
func TestTPMLostMidTest(t *testing.T) {
	t.Parallel()
	d, machine, _ := initedWithTPM(t)
	lost := 0
	const rounds = 3
	for i := range rounds {
		d.last++
		d.conn.send(d.last, proto.OpSlotTest, &proto.SlotRef{ID: 1}, nil)
		time.Sleep(time.Duration(i) * time.Millisecond)
		machine.PowerOff()
		must(t, machine.PowerOn())
		if r := d.conn.response(); r.Err != nil {
			lost++
			if r.Err.Code != proto.CodeAbsent && r.Err.Code != proto.CodeBusy {
				t.Errorf("%v", r.Err)
			}
		}
		d.ask(proto.OpSlotTest, &proto.SlotRef{ID: 1}, &proto.Empty{})
	}
	t.Logf("%d of %d were lost, the others waited", lost, rounds)
	if s := d.status(); s.State != "ready" || s.Slots[0].Health != "ready" {
		t.Errorf("%+v", s)
	}
}

// Whoever locks the keystore waits for no device, and what was under way with one does not open it again.
func TestLockWhileADeviceHangs(t *testing.T) {
	t.Parallel()
	for op, m := range map[string]proto.Message{
		proto.OpSlotTest: &proto.SlotRef{ID: 1},
		proto.OpUnlock:   &proto.Unlock{Slot: 1},
	} {
		d, machine, _ := initedWithTPM(t)
		d.ask(proto.OpKeyCreate, &proto.KeyCreate{Name: "APP/k", Algorithm: "ed25519"}, &proto.KeyInfo{})
		must(t, machine.Freeze())
		other := bound(t, d.admin)
		other.send(20, op, m, nil)
		time.Sleep(300 * time.Millisecond)
		began := time.Now()
		d.ask(proto.OpLock, &proto.Empty{}, &proto.Empty{})
		if took := time.Since(began); took > 2*time.Second {
			t.Errorf("%s was under way: locking took %v", op, took)
		}
		must(t, machine.Thaw())
		if r := other.response(); r.Err == nil || r.Err.Code != proto.CodeLocked {
			t.Errorf("%s: %v", op, r.Err)
		}
		if s := d.status(); s.State != "locked" || s.Keys != 0 {
			t.Errorf("%s has opened the keystore: %s, %d keys", op, s.State, s.Keys)
		}
	}
}

// An old copy of the state directory does not open, a person can decide that it shall.
func TestRollbackIsRefused(t *testing.T) {
	t.Parallel()
	d, _, _ := initedWithTPM(t)
	if s := d.status(); !strings.HasPrefix(s.Rollback, "detected") {
		t.Errorf("rollback is %q", s.Rollback)
	}
	d.ask(proto.OpKeyCreate, &proto.KeyCreate{Name: "app/key", Algorithm: "ed25519"}, &proto.KeyInfo{})
	d.conn.Close()
	d.stop()
	state, old := filepath.Join(d.dir, "s"), filepath.Join(d.dir, "old")
	must(t, exec.Command("cp", "-a", state, old).Run())
	d = startReal(t, d.dir)
	d.ask(proto.OpKeyRevoke, &proto.KeyRevoke{Key: "app/key", Reason: "key-compromise"}, &proto.KeyInfo{})
	d.conn.Close()
	d.stop()
	must(t, os.RemoveAll(state))
	must(t, exec.Command("cp", "-a", old, state).Run())

	d = startReal(t, d.dir)
	for range 2 {
		if s := d.status(); s.State != "locked" || s.LockReason != "rollback" || s.LockDetail == "" {
			t.Errorf("%+v", s)
		}
		d.refused(proto.OpUnlock, &proto.Unlock{}, proto.CodeRollback)
	}
	d.refused(proto.OpKeyGet, &proto.KeyRef{Key: "app/key"}, proto.CodeLocked)
	d.ask(proto.OpUnlock, &proto.Unlock{AcceptRollback: true}, &proto.Empty{})
	d.ask(proto.OpKeyGet, &proto.KeyRef{Key: "app/key"}, &proto.KeyInfo{})
	found := 0
	for _, e := range d.entries() {
		if e.Op == proto.OpUnlock && strings.Contains(e.Detail, "accept-rollback") {
			found++
		}
	}
	if found != 2 {
		t.Errorf("the decision is recorded %d times", found)
	}
	// From now on this is the newest state.
	d = d.restart()
	if s := d.status(); s.State != "ready" {
		t.Errorf("%+v", s)
	}
}

// What a person has opened stays open across a restart, for those who want that; what a person has locked does not.
func TestUnlockCache(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "key")
	if run := runInitProgram(t, nil, "--state-dir", filepath.Join(dir, "s"), "--enclave", "recovery", "--recovery-out", file); run.code != 0 {
		t.Fatalf("%+v", run)
	}
	key, err := os.ReadFile(file)
	must(t, err)
	config := filepath.Join(dir, "kmsd.toml")
	must(t, os.WriteFile(config, []byte("[unlock]\ncache = \"10m\"\n"), 0o600))
	start := func() *realDaemon {
		p := newReal(t, dir, "--config", config).start().ready()
		return &realDaemon{process: p, conn: bound(t, p.admin), last: 10}
	}
	states := ""
	for _, act := range []string{"unlock", "", "lock", ""} {
		d := start()
		states += d.state() + " "
		switch act {
		case "unlock":
			d.ask(proto.OpUnlock, &proto.Unlock{Secret: key}, &proto.Empty{})
		case "lock":
			d.ask(proto.OpLock, &proto.Empty{}, &proto.Empty{})
		}
		d.conn.Close()
		d.stop()
	}
	if states != "locked ready ready locked " {
		t.Errorf("the states at start were %s", states)
	}
}

// A keyfile on a medium: locked without it, opened by the next request when it is back, and locked when it is pulled where that is wanted.
func TestKeyfile(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := filepath.Join(dir, "medium", "kmsd.key")
	must(t, os.Mkdir(filepath.Dir(file), 0o700))
	if run := runInitProgram(t, nil, "--state-dir", filepath.Join(dir, "s"), "--no-recovery", "--enclave", "keyfile:"+file); run.code != 0 {
		t.Fatalf("%+v", run)
	}
	config := filepath.Join(dir, "kmsd.toml")
	must(t, os.WriteFile(config, []byte("[unlock]\nlock_on_removal = true\n"), 0o600))
	p := newReal(t, dir, "--config", config).start().ready()
	d := &realDaemon{process: p, conn: bound(t, p.admin), last: 10}
	if s := d.status(); s.State != "ready" || s.Slots[0].Kind != "keyfile" || s.Slots[0].Health != "ready" || s.Slots[0].Location != "keyfile:"+file {
		t.Fatalf("%+v", s)
	}
	must(t, os.Rename(file, file+".pulled"))
	locked := false
	for end := time.Now().Add(10 * time.Second); !locked && time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		s := d.status()
		locked = s.State == "locked" && s.LockReason != "" && s.Slots[0].Health != "ready" // replaced, as the file system is still there
	}
	if !locked {
		t.Fatalf("the medium was pulled: %+v", d.status())
	}
	d.refused(proto.OpKeyList, &proto.KeyList{}, proto.CodeLocked)
	must(t, os.Rename(file+".pulled", file))
	time.Sleep(healEvery)
	d.ask(proto.OpKeyList, &proto.KeyList{}, &proto.KeyListReply{})
}

// The keystore that the configuration names is the only one.
func TestOnlyThePinnedStoreOpens(t *testing.T) {
	d, _ := initialised(t)
	pin := d.status().StorePin
	id := d.status().StoreID
	d.conn.Close()
	d.stop()
	start := func(storeID string) *process {
		file := filepath.Join(d.dir, "kmsd.toml")
		must(t, os.WriteFile(file, []byte("store_id = \""+storeID+"\"\n"), 0o600))
		return newReal(t, d.dir, "--config", file).start()
	}
	for _, good := range []string{pin, id} {
		p := start(good).ready()
		again := &realDaemon{process: p, conn: bound(t, p.admin), last: 10}
		if s := again.status(); s.State != "ready" {
			t.Errorf("%s: %+v", good, s)
		}
		again.conn.Close()
		p.stop()
	}
	other := "00" + id[2:]
	if id[:2] == "00" {
		other = "01" + id[2:]
	}
	if _, err := start(other).waitLine("not the keystore that store_id"); err != nil {
		t.Error(err)
	}
	// Somebody has made a keystore with the same id: that shows when it is opened.
	p := start(id + "-" + strings.Repeat("0", 32)).ready()
	forged := &realDaemon{process: p, conn: bound(t, p.admin), last: 10}
	if s := forged.status(); s.State != "locked" || s.LockReason != "replaced" {
		t.Errorf("%+v", s)
	}
	forged.refused(proto.OpUnlock, &proto.Unlock{}, proto.CodeReplaced)
	forged.refused(proto.OpKeyList, &proto.KeyList{}, proto.CodeLocked)
}
