package tpm

import (
	"bytes"
	"crypto/ecdh"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"golang.org/x/sys/unix"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// Somebody who reads along on the bus sees no auth value, no PIN and no secret, neither at enrolment nor at unlock nor in use.
func TestNothingSecretOnTheBus(t *testing.T) {
	for _, guard := range []Guard{Sealed, Agreed} {
		s := startSimulator(t)
		var r traffic
		d := s.openWith(Config{Guard: guard, PIN: []byte("a PIN with many characters")}, tapped(r.command, r.answer))
		a := pin("a PIN with many characters")
		blob, secret := enrol(t, d, a)
		sl, err := decodeSlot(bytes.Clone(blob))
		if err != nil {
			t.Fatal(err)
		}
		auth := authValue(sl.salt, labelSlot, a.Secret)
		value, err := call(limited(t), d, func(d *device) ([]byte, error) { return d.openSlot(sl, auth, nil) })
		if err != nil {
			t.Fatal(err)
		}
		if len(value) != 32 {
			t.Fatalf("value of %d bytes", len(value))
		}
		for name, p := range map[string][]byte{"secret": secret[:16], "PIN": a.Secret, "auth value": auth[:16], "value": value[:16], "end of the value": value[16:]} {
			if r.contains(p) {
				t.Errorf("%s: the %s goes over the bus", guard, name)
			}
		}
		if !r.contains(sl.private) {
			t.Error("the recorder recorded nothing, so this test shows nothing")
		}
	}

	s := startSimulator(t)
	var r traffic
	d := s.openWith(Config{}, tapped(r.command, r.answer))
	decrypts := generate(t, d, spec(keyspec.RSA2048, keyspec.Decrypt))
	plaintext := []byte("a data key of a client, in clear")
	ciphertext, err := rsa.EncryptOAEP(sha256.New(), rand.Reader, decrypts.public.(*rsa.PublicKey), plaintext, nil)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := decrypts.do(t, enclave.Op{Usage: keyspec.Decrypt, Input: ciphertext}); err != nil || !bytes.Equal(got, plaintext) {
		t.Fatal(err)
	}
	if _, err := decrypts.do(t, enclave.Op{Usage: keyspec.Sign, Input: plaintext}); !errors.Is(err, enclave.ErrUnsupported) {
		t.Errorf("signature with a key that only decrypts: %v", err)
	}
	agrees := generate(t, d, spec(keyspec.ECDHP256, keyspec.Agree))
	peer, err := ecdh.P256().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(peer.PublicKey())
	if err != nil {
		t.Fatal(err)
	}
	shared, err := agrees.do(t, enclave.Op{Usage: keyspec.Agree, Input: spki})
	if err != nil {
		t.Fatal(err)
	}
	signs := generate(t, d, spec(keyspec.ECDSAP256, keyspec.Sign))
	if _, err := signs.do(t, enclave.Op{Usage: keyspec.Sign, Input: plaintext}); err != nil {
		t.Fatal(err)
	}
	for _, k := range []residentKey{decrypts, agrees, signs} {
		inner, err := decodeKey(k.blob)
		if err != nil {
			t.Fatal(err)
		}
		if r.contains(authValue(inner.salt, labelKey, testAAD)) {
			t.Error("the auth value of a key goes over the bus")
		}
	}
	if r.contains(plaintext) || r.contains(shared) {
		t.Error("a result goes over the bus in clear")
	}
}

// Somebody on the bus who puts a storage key of theirs in place of the TPM's, to read what is salted to it, is told from a TPM by the pin.
// The first enrolment has no pin, and relies on nobody being there.
func TestStorageKeyOfAnInterposer(t *testing.T) {
	s := startSimulator(t)
	binding := func() string {
		d := s.open(Config{})
		defer d.Close()
		enrol(t, d, enclave.Auth{})
		return d.Info().Binding
	}()
	own, err := ecdh.P256().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		change func(p *tpm2.TPMTPublic)
		want   error
	}{
		"own key": {func(p *tpm2.TPMTPublic) {
			p.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, pointOf(own.PublicKey().Bytes()))
		}, enclave.ErrReplaced},
		"attributes": {func(p *tpm2.TPMTPublic) { p.ObjectAttributes.FixedTPM = false }, enclave.ErrMisconfigured},
	} {
		replaced := 0
		d := s.openWith(Config{Binding: binding}, tapped(nil, func(command, answer []byte) []byte {
			if commandCode(command) == tpm2.TPMCCCreatePrimary && responseCode(answer) == 0 {
				replaced++
				return forgePrimary(t, command, answer, c.change)
			}
			return answer
		}))
		if _, err := d.Wrap(limited(t), make([]byte, enclave.SecretSize), testAAD); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
		if h := d.Health(limited(t)); h.State != enclave.Replaced && h.State != enclave.Misconfigured {
			t.Errorf("%s: health %+v", name, h)
		}
		d.Close()
		if replaced == 0 {
			t.Errorf("%s: nothing was replaced, so this test shows nothing", name)
		}
	}
	root, err := tpm2.Unmarshal[tpm2.TPMTPublic](tpm2.Marshal(tpm2.ECCSRKTemplate))
	if err != nil {
		t.Fatal(err)
	}
	root.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, pointOf(own.PublicKey().Bytes()))
	if err := checkStorageKey(root); err != nil {
		t.Errorf("a good storage key: %v", err)
	}
	for name, change := range map[string]func(p *tpm2.TPMTPublic){
		"may be duplicated": func(p *tpm2.TPMTPublic) { p.ObjectAttributes.FixedTPM = false },
		"not restricted":    func(p *tpm2.TPMTPublic) { p.ObjectAttributes.Restricted = false },
		"came from outside": func(p *tpm2.TPMTPublic) { p.ObjectAttributes.SensitiveDataOrigin = false },
		"no point":          func(p *tpm2.TPMTPublic) { p.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{}) },
	} {
		p := *root
		change(&p)
		if checkStorageKey(&p) == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// forgePrimary changes the public area in an answer to TPM2_CreatePrimary, and makes its HMAC anew, which takes no more than to know that
// the owner has no password (TPM 2.0 part 1 section 19.6.5).
func forgePrimary(t *testing.T, command, answer []byte, change func(p *tpm2.TPMTPublic)) []byte {
	const parameters = headerSize + 4 + 4 // after the handle and their size
	size := int(binary.BigEndian.Uint16(answer[parameters:]))
	public, err := tpm2.Unmarshal[tpm2.TPMTPublic](answer[parameters+2 : parameters+2+size])
	if err != nil {
		t.Error(err)
		return answer
	}
	change(public)
	forged := bytes.Clone(answer)
	if copy(forged[parameters+2:parameters+2+size], tpm2.Marshal(*public)) != size {
		t.Error("the public area has another size")
	}
	end := parameters + int(binary.BigEndian.Uint32(answer[headerSize+4:]))
	hash := sha256.New()
	hash.Write(answer[6:10])
	hash.Write(command[6:10])
	hash.Write(forged[parameters:end])
	nonceTPM := forged[end+2 : end+2+nonceSize]
	attributes := forged[end+2+nonceSize]
	const caller = headerSize + 4 + 4 + 4 + 2 // handle, size of the sessions, session, size of the nonce
	mac := hmac.New(sha256.New, nil)
	mac.Write(hash.Sum(nil))
	mac.Write(nonceTPM)
	mac.Write(command[caller : caller+nonceSize])
	mac.Write([]byte{attributes})
	copy(forged[len(forged)-sha256.Size:], mac.Sum(nil))
	return forged
}

// The auth value of an object has no zero byte, since go-tpm cuts it off there.
func TestAuthValue(t *testing.T) {
	seen := make(map[string]bool)
	for i := range 1000 {
		salt := binary.BigEndian.AppendUint64(make([]byte, saltSize-8), uint64(i))
		a := authValue(salt, labelSlot, nil)
		if len(a) != authSize || bytes.IndexByte(a, 0) >= 0 {
			t.Fatalf("auth value %q", a)
		}
		seen[string(a)] = true
	}
	if len(seen) != 1000 {
		t.Error("auth values repeat")
	}
	salt := make([]byte, saltSize)
	if bytes.Equal(authValue(salt, "a", []byte("b")), authValue(salt, "a\x00b", nil)) {
		t.Error("label and what is bound run into each other")
	}
}

// The device file is tried on a pseudo-terminal, the one character device that a test can put a TPM behind.
func TestDeviceFile(t *testing.T) {
	s := startSimulator(t)
	path := s.terminal()
	d, err := Open(Config{Device: path})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	blob, secret := enrol(t, d, enclave.Auth{})
	for range 3 {
		opens(t, d, blob, enclave.Auth{}, secret)
	}
	if w := d.Info().Warnings; len(w) == 0 {
		t.Error("no warning that others cannot use the TPM at the same time")
	}
	k := generate(t, d, spec(keyspec.ECDSAP256, keyspec.Sign)) // a longer wait
	if _, err := k.do(t, enclave.Op{Usage: keyspec.Sign, Input: []byte("x")}); err != nil {
		t.Error(err)
	}

	l, err := openDevice(path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	s.kill()
	start := time.Now()
	if _, err := l.Send(greeting, 300*time.Millisecond); err == nil || time.Since(start) > 2*time.Second {
		t.Errorf("a device that does not answer: %v after %v", err, time.Since(start))
	}
	time.AfterFunc(100*time.Millisecond, l.Interrupt)
	start = time.Now()
	if _, err := l.Send(greeting, time.Minute); err == nil || time.Since(start) > 2*time.Second {
		t.Errorf("interrupted: %v after %v", err, time.Since(start))
	}
}

// terminal returns the path of a terminal that what is written to goes to the TPM. When the TPM is gone, it stays and is silent.
func (s *simulator) terminal() string {
	s.t.Helper()
	master, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		s.t.Fatal(err)
	}
	m := os.NewFile(uintptr(master), "ptmx")
	s.t.Cleanup(func() { m.Close() })
	if err := unix.IoctlSetPointerInt(master, unix.TIOCSPTLCK, 0); err != nil {
		s.t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(master, unix.TIOCGPTN)
	if err != nil {
		s.t.Fatal(err)
	}
	path := fmt.Sprintf("/dev/pts/%d", n)
	// Bytes, not lines; and somebody has it open always, so that the master does not see an end.
	keep, err := os.OpenFile(path, os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { keep.Close() })
	if err := unix.IoctlSetTermios(int(keep.Fd()), unix.TCSETS, &unix.Termios{Cflag: unix.CS8 | unix.CREAD, Cc: [19]uint8{unix.VMIN: 1}}); err != nil {
		s.t.Fatal(err)
	}
	conn, err := net.Dial("unix", s.socket())
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { conn.Close() })
	pump := func(to, from interface {
		Read([]byte) (int, error)
		Write([]byte) (int, error)
	}) {
		buf := make([]byte, 512) // smaller than an answer, so that answers come in pieces
		for {
			n, err := from.Read(buf)
			if err != nil {
				return
			}
			to.Write(buf[:n])
		}
	}
	go pump(conn, m)
	go pump(m, conn)
	return path
}

// answers is a link that gives what a fuzzer thinks up.
type answers struct{ data []byte }

func (l *answers) Send([]byte, time.Duration) ([]byte, error) {
	if len(l.data) == 0 {
		return nil, errors.New("no more")
	}
	n := min(int(l.data[0])*4, len(l.data)-1)
	answer := l.data[1 : 1+n]
	l.data = l.data[1+n:]
	return answer, nil
}
func (l *answers) Interrupt() {}
func (l *answers) Close()     {}

// Whatever a device answers, the driver gives an error of the enclave's and goes on.
func FuzzDevice(f *testing.F) {
	ok := append([]byte{3}, append(response(0), 0, 0)...)
	f.Add(byte(0), bytes.Repeat(ok, 8))
	f.Add(byte(1), bytes.Repeat(append([]byte{3}, append(response(tpm2.TPMRCFailure), 0, 0)...), 8))
	f.Add(byte(2), []byte{255})
	s := startSimulator(f)
	real := s.open(Config{})
	slotBlob, err := real.Wrap(limited(f), make([]byte, enclave.SecretSize), testAAD)
	if err != nil {
		f.Fatal(err)
	}
	keyBlob, _, err := real.Generate(limited(f), spec(keyspec.ECDSAP256, keyspec.Sign))
	if err != nil {
		f.Fatal(err)
	}
	// What a TPM really answers, for the fuzzer to change.
	var recorded []byte
	d := s.openWith(Config{}, tapped(nil, func(_, answer []byte) []byte {
		for len(answer)%4 != 0 {
			answer = append(answer, 0)
		}
		if len(answer)/4 < 256 {
			recorded = append(append(recorded, byte(len(answer)/4)), answer...)
		}
		return answer
	}))
	d.Unwrap(limited(f), slotBlob, testAAD, enclave.Auth{}, make([]byte, enclave.SecretSize))
	d.Close()
	f.Add(byte(0), recorded)
	f.Fuzz(func(t *testing.T, what byte, data []byte) {
		dialled := false
		d, err := open(Config{Device: "unix:/fuzz"}, func(address) (link, error) {
			if dialled { // connecting again would only take time
				return nil, &enclave.Error{Kind: enclave.ErrMisconfigured}
			}
			dialled = true
			return &answers{data}, nil
		})
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		ctx := limited(t)
		switch what % 5 {
		case 0:
			err = d.Unwrap(ctx, slotBlob, testAAD, enclave.Auth{}, make([]byte, enclave.SecretSize))
		case 1:
			_, err = d.Do(ctx, keyBlob, enclave.Op{Usage: keyspec.Sign, Input: data, Bound: testAAD}, nil)
		case 2:
			_, err = d.IncrementCounter(ctx, [16]byte{})
		case 3:
			_, err = d.Wrap(ctx, make([]byte, enclave.SecretSize), testAAD)
		case 4:
			if h := d.Health(ctx); h.State == enclave.Ready && len(data) < 100 {
				t.Fatalf("health %+v", h)
			}
			return
		}
		if err == nil {
			t.Fatal("a device that is none did it")
		}
		known := false
		for _, sentinel := range []error{enclave.ErrAuth, enclave.ErrLockedOut, enclave.ErrPolicy, enclave.ErrAbsent, enclave.ErrReplaced,
			enclave.ErrCorrupt, enclave.ErrBusy, enclave.ErrMisconfigured, enclave.ErrUnsupported} {
			known = known || errors.Is(err, sentinel)
		}
		if !known {
			t.Fatalf("error %v", err)
		}
	})
}
