package helper

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/enclave/enclavetest"
	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

var (
	_ enclave.Enclave   = (*Resident)(nil)
	_ enclave.Forgetter = (*Resident)(nil)
	_ enclave.Resident  = (*Resident)(nil)
	_ enclave.Session   = (*Resident)(nil)
)

// testResident is the fake device with resident keys, in the process of the helper.
type testResident struct {
	*enclavetest.Resident
	generate time.Duration // what Generate takes, and nothing else goes on meanwhile
	serial   sync.Mutex
}

func newTestResident(key [32]byte, params map[string]string) *testResident {
	parallel, _ := strconv.Atoi(params["parallel"])
	wait, _ := time.ParseDuration(params["wait"])
	generate, _ := time.ParseDuration(params["generate"])
	return &testResident{Resident: &enclavetest.Resident{Memory: enclavetest.MemoryOf(key, params["pin"]), Parallel: parallel, Wait: wait}, generate: generate}
}

// Info tells the process of the driver, and how many calls of Do it saw at once.
func (d *testResident) Info() enclave.Info {
	info := d.Memory.Info()
	info.Binding, info.Level = strconv.Itoa(os.Getpid()), strconv.Itoa(d.Most())
	return info
}

func (d *testResident) Health(ctx context.Context) enclave.Health {
	d.serial.Lock()
	defer d.serial.Unlock()
	return d.Memory.Health(ctx)
}

func (d *testResident) Generate(ctx context.Context, s enclave.Spec) (enclave.Blob, []byte, error) {
	d.serial.Lock()
	defer d.serial.Unlock()
	time.Sleep(d.generate)
	return d.Resident.Generate(ctx, s)
}

func (d *testResident) Do(ctx context.Context, b enclave.Blob, op enclave.Op, dst []byte) ([]byte, error) {
	switch string(op.AAD) {
	case "hang":
		select {} // not even the context helps
	case "die":
		os.Exit(3)
	case "late":
		time.Sleep(700 * time.Millisecond) // in a device that does not stop for anybody
	case "slow":
		<-ctx.Done()
		return nil, ctx.Err()
	case "spent":
		return nil, &Spent{&enclave.Error{Kind: enclave.ErrPolicy, Detail: "as asked", Remedy: "ask otherwise"}}
	case "huge":
		return make([]byte, MaxOutput+1), nil
	case "leave":
		copy(dst[:cap(dst)], "half a secret")
		return nil, &enclave.Error{Kind: enclave.ErrPolicy, Detail: "as asked"}
	}
	return d.Resident.Do(ctx, b, op, dst)
}

func newResident(t *testing.T, d Dialer, more ...string) *Resident {
	t.Helper()
	e := NewResident(d, Config{Kind: "keyring:file", Params: params(append(more, "resident", "yes")...)})
	t.Cleanup(func() { e.Close() })
	return e
}

var bound = []byte("the record")

func generate(t *testing.T, r *Resident, a keyspec.Algorithm) (enclave.Blob, []byte) {
	t.Helper()
	b, spki, err := r.Generate(t.Context(), enclave.Spec{ID: [16]byte{1}, Algorithm: a, Usages: []keyspec.Usage{keyspec.Sign}, AAD: bound})
	if err != nil {
		t.Fatal(err)
	}
	return b, spki
}

func TestResidentConformance(t *testing.T) {
	s := startSpawner(t)
	enclavetest.Run(t, func(t *testing.T) enclavetest.Device {
		return enclavetest.Device{Open: func(t *testing.T) enclave.Enclave {
			return NewResident(s, Config{Kind: "keyring:file", Params: params("resident", "yes"), Info: enclave.Info{Kind: "memory", Level: "test"}})
		}}
	})
}

func TestResidentKeys(t *testing.T) {
	r := newResident(t, startSpawner(t), "parallel", "3")
	if n := r.MaxParallel(); n != 1 {
		t.Errorf("parallel %d before the helper was asked", n)
	}
	rows, err := r.Mechanisms(t.Context())
	if err != nil || len(rows) != 6 || rows[0].Algorithm != keyspec.ECDSAP256 || rows[0].Usage != keyspec.Sign || rows[0].Schemes[0] != keyspec.ECDSASHA256 {
		t.Errorf("mechanisms %+v, %v", rows, err)
	}
	if n := r.MaxParallel(); n != 3 {
		t.Errorf("parallel %d", n)
	}

	b, spki := generate(t, r, keyspec.ECDSAP256)
	public, err := x509.ParsePKIXPublicKey(spki)
	if err != nil {
		t.Fatal(err)
	}
	digest := sha256.Sum256([]byte("message"))
	dst := make([]byte, 0, 128)
	for _, op := range []enclave.Op{
		{Usage: keyspec.Sign, Scheme: keyspec.ECDSASHA256, Input: digest[:], Digest: true, Bound: bound},
		{Usage: keyspec.Sign, Scheme: keyspec.ECDSASHA256, Input: []byte("message"), Bound: bound},
	} {
		signature, err := r.Do(t.Context(), b, op, dst)
		if err != nil || !ecdsa.VerifyASN1(public.(*ecdsa.PublicKey), digest[:], signature) {
			t.Errorf("sign: %x, %v", signature, err)
		}
		if &signature[0] != &dst[:1][0] {
			t.Error("the result is not in dst")
		}
	}
	if _, err := r.Do(t.Context(), b, enclave.Op{Usage: keyspec.Sign, Input: digest[:], Digest: true, Bound: []byte("another record")}, nil); !errors.Is(err, enclave.ErrReplaced) {
		t.Errorf("with another record: %v", err)
	}

	// The largest messages there are, both ways.
	aes, none := generate(t, r, keyspec.AES256GCM)
	if none != nil {
		t.Errorf("public key %x of a symmetric key", none)
	}
	seal := enclave.Op{Usage: keyspec.Encrypt, Input: bytes.Repeat([]byte{7}, proto.MaxData), Nonce: make([]byte, 12), AAD: make([]byte, 16<<10), Bound: bound}
	sealed, err := r.Do(t.Context(), aes, seal, nil)
	if err != nil || len(sealed) != proto.MaxData+16 {
		t.Fatalf("encrypt: %d bytes, %v", len(sealed), err)
	}
	open := seal
	open.Usage, open.Input = keyspec.Decrypt, sealed
	plain, err := r.Do(t.Context(), aes, open, nil)
	if err != nil || !bytes.Equal(plain, seal.Input) {
		t.Fatalf("decrypt: %d bytes, %v", len(plain), err)
	}
	open.AAD = open.AAD[1:]
	if _, err := r.Do(t.Context(), aes, open, nil); !errors.Is(err, enclave.ErrDecryption) || errors.Is(err, enclave.ErrCorrupt) {
		t.Errorf("decrypt with other data: %v", err)
	}

	for range 2 {
		if err := r.Destroy(t.Context(), b); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := r.Do(t.Context(), b, enclave.Op{Usage: keyspec.Sign, Input: digest[:], Digest: true, Bound: bound}, nil); !errors.Is(err, enclave.ErrReplaced) {
		t.Errorf("destroyed key: %v", err)
	}
}

func TestResidentBounds(t *testing.T) {
	r := newResident(t, startSpawner(t))
	b, _ := generate(t, r, keyspec.AES256GCM)
	pid := r.Info().Binding
	for what, op := range map[string]enclave.Op{
		"input": {Usage: keyspec.Encrypt, Input: make([]byte, MaxInput+1)},
		"nonce": {Usage: keyspec.Encrypt, Nonce: make([]byte, 65)},
		"aad":   {Usage: keyspec.Encrypt, AAD: make([]byte, 16<<10+1)},
		"bound": {Usage: keyspec.Encrypt, Bound: make([]byte, enclave.MaxAAD+1)},
		"usage": {Usage: keyspec.Usage(strings.Repeat("u", 65))},
		"huge":  {Usage: keyspec.Encrypt, AAD: []byte("huge")},
	} {
		if out, err := r.Do(t.Context(), b, op, nil); !errors.Is(err, enclave.ErrUnsupported) || out != nil {
			t.Errorf("%s: %d bytes, %v", what, len(out), err)
		}
	}
	for _, b := range []enclave.Blob{nil, make(enclave.Blob, enclave.MaxBlob+1)} {
		if _, err := r.Do(t.Context(), b, enclave.Op{}, nil); !errors.Is(err, enclave.ErrCorrupt) {
			t.Errorf("blob of %d bytes: %v", len(b), err)
		}
		if err := r.Destroy(t.Context(), b); !errors.Is(err, enclave.ErrCorrupt) {
			t.Errorf("destroying a blob of %d bytes: %v", len(b), err)
		}
	}
	if _, _, err := r.Generate(t.Context(), enclave.Spec{AAD: make([]byte, enclave.MaxAAD+1)}); !errors.Is(err, enclave.ErrUnsupported) {
		t.Errorf("generate with too much associated data: %v", err)
	}
	if _, _, err := r.Generate(t.Context(), enclave.Spec{Algorithm: "rot13"}); !errors.Is(err, enclave.ErrUnsupported) {
		t.Errorf("generate of nonsense: %v", err)
	}
	// None of this was worth the helper's life.
	if _, err := r.Mechanisms(t.Context()); err != nil || r.Info().Binding != pid {
		t.Errorf("helper %s became %s, %v", pid, r.Info().Binding, err)
	}
}

// A helper that announces no resident keys has none, and lives on.
func TestResidentNotAnnounced(t *testing.T) {
	r := NewResident(startSpawner(t), Config{Kind: "keyring:file", Params: params()})
	defer r.Close()
	pid := pid(t, r.Enclave)
	_, _, err := r.Generate(t.Context(), enclave.Spec{Algorithm: keyspec.ECDSAP256})
	_, err2 := r.Do(t.Context(), []byte("blob"), enclave.Op{Usage: keyspec.Sign}, nil)
	_, err3 := r.Mechanisms(t.Context())
	for _, err := range []error{err, err2, err3, r.Destroy(t.Context(), []byte("blob")), r.Login(t.Context(), enclave.Auth{})} {
		if !errors.Is(err, enclave.ErrUnsupported) {
			t.Error(err)
		}
	}
	if n := r.MaxParallel(); n != 1 {
		t.Errorf("parallel %d", n)
	}
	if now := r.Info().Binding; now != strconv.Itoa(pid) {
		t.Errorf("helper %d became %s", pid, now)
	}
}

func TestLogin(t *testing.T) {
	r := newResident(t, startSpawner(t), "pin", "1234")
	if _, _, err := r.Generate(t.Context(), enclave.Spec{Algorithm: keyspec.ECDSAP256}); !errors.Is(err, enclave.ErrLocked) {
		t.Errorf("generate before the login: %v", err)
	}
	if err := r.Login(t.Context(), enclave.Auth{}); !errors.Is(err, enclave.ErrLocked) {
		t.Errorf("no PIN: %v", err)
	}
	if err := r.Login(t.Context(), enclave.Auth{Secret: []byte("4321")}); !errors.Is(err, enclave.ErrAuth) {
		t.Errorf("wrong PIN: %v", err)
	}
	if err := r.Login(t.Context(), enclave.Auth{Secret: []byte("1234")}); err != nil {
		t.Fatal(err)
	}
	b, _ := generate(t, r, keyspec.ECDSAP256)
	op := enclave.Op{Usage: keyspec.Sign, Input: []byte("m"), Bound: bound}
	if _, err := r.Do(t.Context(), b, op, nil); err != nil {
		t.Fatal(err)
	}
	// The helper dies: its successor is not logged in, and nobody logs it in behind the caller's back.
	op.AAD = []byte("die")
	if _, err := r.Do(t.Context(), b, op, nil); !errors.Is(err, enclave.ErrAbsent) {
		t.Fatal(err)
	}
	op.AAD = nil
	for range 2 {
		if _, err := r.Do(t.Context(), b, op, nil); !errors.Is(err, enclave.ErrLocked) {
			t.Errorf("after the helper died: %v", err)
		}
	}
	if err := r.Login(t.Context(), enclave.Auth{Secret: []byte("1234")}); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Do(t.Context(), b, op, nil); err != nil {
		t.Error(err)
	}
}

func TestHelperKilledInDo(t *testing.T) {
	r := newResident(t, startSpawner(t), "parallel", "4")
	b, _ := generate(t, r, keyspec.ECDSAP256)
	first, _ := strconv.Atoi(r.Info().Binding)
	var calls sync.WaitGroup
	for range 4 {
		calls.Go(func() {
			if _, err := r.Do(t.Context(), b, enclave.Op{Usage: keyspec.Sign, AAD: []byte("slow")}, nil); !errors.Is(err, enclave.ErrAbsent) {
				t.Errorf("call under way: %v", err)
			}
		})
	}
	time.Sleep(50 * time.Millisecond)
	if err := unix.Kill(first, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	calls.Wait()
	gone(t, first)
	if _, err := r.Do(t.Context(), b, enclave.Op{Usage: keyspec.Sign, Input: []byte("m"), Bound: bound}, nil); err != nil {
		t.Fatalf("next call: %v", err)
	}
}

// A device that hangs is given up after the time that a device may take, whatever its callers wanted.
func TestHangInDo(t *testing.T) {
	r := newResident(t, startSpawner(t), "parallel", "2")
	r.patience = patience{use: time.Second, generate: time.Second}
	b, _ := generate(t, r, keyspec.ECDSAP256)
	first, _ := strconv.Atoi(r.Info().Binding)
	start := time.Now()
	for range 2 {
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		if _, err := r.Do(ctx, b, enclave.Op{Usage: keyspec.Sign, AAD: []byte("hang")}, nil); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v", err)
		}
		cancel()
	}
	if took := time.Since(start); took > grace {
		t.Errorf("two calls with 50 ms took %v", took)
	}
	// Both turns are taken by what hangs. This one waits for the end of it, and the next has another helper.
	if _, err := r.Do(t.Context(), b, enclave.Op{Usage: keyspec.Sign, Input: []byte("m"), Bound: bound}, nil); !errors.Is(err, enclave.ErrAbsent) {
		t.Errorf("meanwhile: %v", err)
	}
	if took := time.Since(start); took < 900*time.Millisecond || took > 4*time.Second {
		t.Errorf("the helper was given up after %v", took)
	}
	if _, err := r.Do(t.Context(), b, enclave.Op{Usage: keyspec.Sign, Input: []byte("m"), Bound: bound}, nil); err != nil {
		t.Fatalf("next call: %v", err)
	}
	gone(t, first)
}

// A device that is merely slow keeps its helper, and so the login, whatever the deadlines of the callers; and what it works on keeps its turn.
func TestSlowDeviceKeepsItsHelper(t *testing.T) {
	r := newResident(t, startSpawner(t), "pin", "1234")
	if err := r.Login(t.Context(), enclave.Auth{Secret: []byte("1234")}); err != nil {
		t.Fatal(err)
	}
	b, _ := generate(t, r, keyspec.ECDSAP256)
	first := r.Info().Binding
	short := func(op enclave.Op, limit time.Duration) error {
		ctx, cancel := context.WithTimeout(t.Context(), limit)
		defer cancel()
		_, err := r.Do(ctx, b, op, nil)
		return err
	}
	op := enclave.Op{Usage: keyspec.Sign, Input: []byte("m"), Bound: bound}
	late := enclave.Op{Usage: keyspec.Sign, Input: []byte("m"), Bound: bound, AAD: []byte("late")}
	start := time.Now()
	if err := short(late, 20*time.Millisecond); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	for range 100 { // while the device is at work, and with deadlines that pass anywhere
		if err := short(op, time.Millisecond); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
	}
	if _, err := r.Do(t.Context(), b, op, nil); err != nil { // when it has its turn
		t.Error(err)
	}
	if took := time.Since(start); took < 600*time.Millisecond {
		t.Errorf("the device was given more to do after %v", took)
	}
	for i := range 300 {
		if err := short(op, time.Duration(i)*time.Microsecond); err != nil && !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
	}
	if _, err := r.Do(t.Context(), b, op, nil); err != nil || r.Info().Binding != first {
		t.Errorf("helper %s became %s, %v", first, r.Info().Binding, err)
	}
}

// While a device makes a key it may do nothing else. A look at its health must not end that.
func TestGenerationOutlivesQuestions(t *testing.T) {
	r := newResident(t, startSpawner(t), "generate", "1500ms")
	r.patience = patience{use: 300 * time.Millisecond, generate: 20 * time.Second}
	if h := r.Health(t.Context()); h.State != enclave.Ready {
		t.Fatalf("health %+v", h)
	}
	first := r.Info().Binding
	done := make(chan error, 1)
	go func() {
		_, _, err := r.Generate(t.Context(), enclave.Spec{Algorithm: keyspec.ECDSAP256})
		done <- err
	}()
	time.Sleep(50 * time.Millisecond)
	for range 2 * maxAsked {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		if h := r.Health(ctx); h.State != enclave.Ready || !strings.Contains(h.Detail, "busy") {
			t.Errorf("health of a device at work: %+v", h)
		}
		cancel()
	}
	if err := <-done; err != nil {
		t.Errorf("generate: %v", err)
	}
	if h := r.Health(t.Context()); h.State != enclave.Ready || h.Detail != "" || r.Info().Binding != first {
		t.Errorf("health %+v, helper %s became %s", h, first, r.Info().Binding)
	}
}

// A device that is slow to open is opened once, not again for each caller that gives up.
func TestSlowOpeningIsNotBegunAnew(t *testing.T) {
	opens := 0
	e := NewResident(pipe{func(c *net.UnixConn) {
		opens++
		time.Sleep(300 * time.Millisecond)
		answerOpen(t, c)
	}}, Config{Kind: "pkcs11"})
	defer e.Close()
	for range 5 {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		if _, err := e.Mechanisms(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		cancel()
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	e.Health(ctx) // answered by nobody, but by then it is open
	if opens != 1 {
		t.Errorf("opened %d times", opens)
	}
}

// A driver that cannot go on says why first, and then the process ends.
func TestSpentHelperIsReplaced(t *testing.T) {
	r := newResident(t, startSpawner(t))
	b, _ := generate(t, r, keyspec.ECDSAP256)
	first, _ := strconv.Atoi(r.Info().Binding)
	_, err := r.Do(t.Context(), b, enclave.Op{Usage: keyspec.Sign, AAD: []byte("spent")}, nil)
	var e *enclave.Error
	if !errors.Is(err, enclave.ErrPolicy) || !errors.As(err, &e) || e.Remedy != "ask otherwise" {
		t.Errorf("%v", err)
	}
	gone(t, first)
	op := enclave.Op{Usage: keyspec.Sign, Input: []byte("m"), Bound: bound}
	if _, err = r.Do(t.Context(), b, op, nil); errors.Is(err, enclave.ErrAbsent) { // it met the corpse
		_, err = r.Do(t.Context(), b, op, nil)
	}
	if err != nil {
		t.Fatalf("next call: %v", err)
	}
}

// Calls wait for their turn on this side of the seam. One that gives up while it waits costs nobody anything.
func TestDoRunsInParallelAsTheDriverSays(t *testing.T) {
	r := newResident(t, startSpawner(t), "parallel", "3", "wait", "20ms")
	b, _ := generate(t, r, keyspec.ECDSAP256)
	first := r.Info().Binding
	var calls sync.WaitGroup
	start := time.Now()
	for range 12 {
		calls.Go(func() {
			if _, err := r.Do(t.Context(), b, enclave.Op{Usage: keyspec.Sign, Input: []byte("m"), Bound: bound}, nil); err != nil {
				t.Error(err)
			}
		})
	}
	calls.Wait()
	if took := time.Since(start); took < 80*time.Millisecond {
		t.Errorf("12 calls of 20 ms, three at once, took %v", took)
	}

	hold, release := context.WithCancel(t.Context())
	for range 3 {
		calls.Go(func() { r.Do(hold, b, enclave.Op{Usage: keyspec.Sign, AAD: []byte("slow")}, nil) })
	}
	time.Sleep(50 * time.Millisecond)
	for range 2 * maxInFlight {
		calls.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
			defer cancel()
			if _, err := r.Do(ctx, b, enclave.Op{Usage: keyspec.Sign, Input: []byte("m"), Bound: bound}, nil); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("a call that had to wait: %v", err)
			}
		})
	}
	time.Sleep(100 * time.Millisecond)
	if h := r.Health(t.Context()); h.State != enclave.Ready { // needs no turn
		t.Errorf("health %+v", h)
	}
	release()
	calls.Wait()
	if _, err := r.Mechanisms(t.Context()); err != nil {
		t.Fatal(err)
	}
	if info := r.Info(); info.Binding != first || info.Level != "3" {
		t.Errorf("helper %s became %s, %s calls at once", first, info.Binding, info.Level)
	}
}

// What a driver left in the buffer of a result that failed does not travel.
func TestFailedDoShowsNothing(t *testing.T) {
	r := newResident(t, startSpawner(t))
	b, _ := generate(t, r, keyspec.ECDSAP256)
	dst := make([]byte, 0, 64)
	if out, err := r.Do(t.Context(), b, enclave.Op{Usage: keyspec.Sign, AAD: []byte("leave")}, dst); !errors.Is(err, enclave.ErrPolicy) || out != nil {
		t.Errorf("%q, %v", out, err)
	}
	if !bytes.Equal(dst[:64], make([]byte, 64)) {
		t.Errorf("dst %q", dst[:64])
	}
}

// No frame that carried a secret is left in the buffers, on neither side.
func TestFramesAreWiped(t *testing.T) {
	ours, theirs := connect(t)
	server := Server{Opener: testOpener{}}
	done := make(chan error, 1)
	go func() { done <- server.Serve(theirs) }()
	r := newResident(t, linkDialer{&Link{conn: ours}})
	key, _ := generate(t, r, keyspec.AES256GCM)
	secret := bytes.Repeat([]byte("secret in a frame "), 100)
	sealed, err := r.Do(t.Context(), key, enclave.Op{Usage: keyspec.Encrypt, Input: secret, Nonce: make([]byte, 12), Bound: bound}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Do(t.Context(), key, enclave.Op{Usage: keyspec.Decrypt, Input: sealed, Nonce: make([]byte, 12), Bound: bound}, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Do(t.Context(), key, enclave.Op{Usage: keyspec.Encrypt, Input: append(secret, make([]byte, MaxInput)...)}, nil); !errors.Is(err, enclave.ErrUnsupported) {
		t.Error(err)
	}
	r.Close()
	if err := <-done; err != nil {
		t.Error(err)
	}
	for range 8 { // more than the pool holds here
		room := frames.Get().(*[frameRoom]byte)
		if i := bytes.Index(room[:], []byte("secret in a frame")); i >= 0 {
			t.Fatalf("a buffer holds a secret at %d", i)
		}
	}
}

type linkDialer struct{ link *Link }

func (d linkDialer) Dial(context.Context, string) (*Link, error) { return d.link, nil }

// A helper that answers nonsense to an operation with a key is not believed.
func TestHostileResident(t *testing.T) {
	for name, test := range map[string]struct {
		reply proto.HelperReply
		call  func(*Resident) error
	}{
		"no blob": {proto.HelperReply{SPKI: []byte("k")}, func(r *Resident) error {
			_, _, err := r.Generate(t.Context(), enclave.Spec{})
			return err
		}},
		"long blob": {proto.HelperReply{Blob: make([]byte, enclave.MaxBlob+1)}, func(r *Resident) error {
			_, _, err := r.Generate(t.Context(), enclave.Spec{})
			return err
		}},
	} {
		e := NewResident(pipe{answerWith(t, test.reply)}, Config{Kind: "keyring:file"})
		if err := test.call(e); !errors.Is(err, enclave.ErrMisconfigured) {
			t.Errorf("%s: %v", name, err)
		}
		e.Close()
	}
}
