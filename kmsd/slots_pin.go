package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/enclave/pkcs11"
	"github.com/kmsd-project/kmsd/enclave/tpm"
	"github.com/kmsd-project/kmsd/keystore/durable"
)

// pins are the files with the PINs of devices that shall open without a person. It is safe for concurrent use.
//
// Invariant: a PIN that a device has refused is not tried with that device again, by no slot, no resident key and no later start of kmsd, until
// the file is another one or a person asks for it: a few wrong PINs shut a device for good.
type pins struct {
	files      map[string]string      // by kind of slots
	credential map[string]bool        // kinds whose file systemd makes anew at every start, so that nothing tells whether it is another one
	memory     string                 // path of the file with what was refused; empty to keep it in memory alone
	same       func(a, b string) bool // whether two locations are of one device
	log        *slog.Logger

	login sync.Mutex // held while resident keys are logged in to

	mu      sync.Mutex
	refused map[string]fileStamp // by a location of the device
}

// fileStamp tells a file from what was in its place before.
type fileStamp struct {
	Device  uint64 `json:"device"`
	Inode   uint64 `json:"inode"`
	Changed int64  `json:"changed"` // nanoseconds since 1970
	Size    int64  `json:"size"`
}

// What was refused is kept in this file of the state directory.
const (
	refusedPINs    = "refused-pins.json"
	maxRefusedPINs = 64 << 10 // bytes
)

func newPINs(c deviceConfig, stateDir string, same func(a, b string) bool, log *slog.Logger) *pins {
	p := &pins{files: map[string]string{}, credential: map[string]bool{}, refused: map[string]fileStamp{}, same: same, log: log}
	for kind, from := range map[string]struct{ file, credential string }{
		tpm.Kind: {c.TPMPINFile, c.TPMPINCredential}, pkcs11.Kind: {c.HSMPINFile, c.HSMPINCredential},
	} {
		switch {
		case from.file != "":
			p.files[kind] = from.file
		case from.credential != "": // systemd.exec(5), LoadCredential=
			p.files[kind] = filepath.Join(os.Getenv("CREDENTIALS_DIRECTORY"), from.credential)
			p.credential[kind] = true
		}
	}
	if stateDir == "" || len(p.files) == 0 {
		return p
	}
	p.memory = filepath.Join(stateDir, refusedPINs)
	data, err := readTrusted(p.memory, maxRefusedPINs)
	if err == nil {
		err = json.Unmarshal(data, &p.refused)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		log.Warn("it is not known which PINs were refused before", "error", err)
	}
	if p.refused == nil {
		p.refused = map[string]fileStamp{}
	}
	return p
}

// has reports whether a kind of slots can be opened without a person.
func (p *pins) has(kind string) bool { return p.files[kind] != "" }

// read returns the PIN of a kind of slots, which the caller wipes.
func (p *pins) read(kind string) ([]byte, error) {
	if !p.has(kind) {
		return nil, &enclave.Error{Kind: enclave.ErrLocked, Detail: "a slot of " + kind, Remedy: "give the PIN with --pin-file"}
	}
	return readSecretFile(p.files[kind])
}

// readSecretFile reads a PIN or a password, which the caller wipes, without its last line end.
func readSecretFile(file string) ([]byte, error) {
	if !filepath.IsAbs(file) {
		return nil, &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: "there is no credential " + file, Remedy: "give kmsd the credential: LoadCredential= in its unit"}
	}
	info, err := os.Stat(file)
	if err == nil && info.Mode().Perm()&0o007 != 0 {
		err = fmt.Errorf("%s is open to others (mode %04o)", file, info.Mode().Perm())
	}
	var data []byte
	if err == nil {
		data, err = readTrusted(file, maxPIN)
	}
	if err != nil {
		return nil, &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: "the file of a PIN or password", Cause: err, Remedy: "make it readable for kmsd alone"}
	}
	secret := bytes.TrimRight(data, "\r\n")
	if len(secret) == 0 {
		return nil, &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: "the file of a PIN or password, " + file + ", is empty"}
	}
	return secret, nil
}

// take is read for an attempt with the device at a location. A PIN that was refused there before is taken only when somebody asks for that.
// stamp is for outcome.
func (p *pins) take(kind, location string, asked bool) (pin []byte, stamp fileStamp, err error) {
	if stamp, err = p.stamp(kind); err != nil {
		_, err = p.read(kind) // which says it better
		return nil, stamp, err
	}
	if !asked && p.refusedBefore(location, stamp) {
		return nil, stamp, &enclave.Error{Kind: enclave.ErrAuth, Detail: fmt.Sprintf("the PIN in %s was refused before and is not tried again", p.files[kind]),
			Remedy: "mend the PIN in the configuration, then ask for another attempt: kmsctl unlock --slot N"}
	}
	pin, err = p.read(kind)
	return pin, stamp, err
}

// refusedBefore reports whether the device at a location, by whatever location of it, refused the PIN of this very file.
func (p *pins) refusedBefore(location string, stamp fileStamp) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for known, before := range p.refused {
		if before == stamp && p.same(known, location) {
			return true
		}
	}
	return false
}

// outcome notes whether the device at a location refused the PIN of a file as it was then.
func (p *pins) outcome(location string, stamp fileStamp, err error) {
	failed := errors.Is(err, enclave.ErrAuth)
	if err != nil && !failed {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	known := len(p.refused)
	maps.DeleteFunc(p.refused, func(other string, _ fileStamp) bool { return p.same(other, location) })
	if failed {
		p.refused[location] = stamp
	}
	if !failed && len(p.refused) == known || p.memory == "" {
		return
	}
	data, err := json.Marshal(p.refused)
	if err == nil {
		err = durable.Replace(p.memory, data)
	}
	if err != nil {
		p.log.Warn("after a restart it will not be known which PINs were refused", "error", err)
	}
}

// stamp is the same as long as the file is, as far as can be told.
func (p *pins) stamp(kind string) (fileStamp, error) {
	if p.credential[kind] {
		return fileStamp{}, nil
	}
	info, err := os.Stat(p.files[kind])
	if err != nil {
		return fileStamp{}, err
	}
	s := info.Sys().(*syscall.Stat_t)
	return fileStamp{uint64(s.Dev), s.Ino, s.Ctim.Nano(), s.Size}, nil
}

// checkCredential refuses names that would lead out of the directory of credentials.
func checkCredential(name string) error {
	if strings.ContainsAny(name, "/\x00") || name == "." || name == ".." {
		return fmt.Errorf("%w: %q is not the name of a credential", errConfig, name)
	}
	return nil
}
