package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/enclave/pkcs11"
	"github.com/kmsd-project/kmsd/enclave/tpm"
)

// pins are the files with the PINs of devices that shall open without a person. It is safe for concurrent use.
//
// Invariant: a PIN that was refused is not tried with the same slot, or with the resident keys of the same kind of device, again until the file is
// another one, or a person asks for it: a few wrong PINs shut a device for good.
type pins struct {
	files map[string]string // by kind of slots

	login sync.Mutex // held while resident keys are logged in to

	mu      sync.Mutex
	refused map[[16]byte]fileStamp // by UUID of the slot, zero for resident keys
}

// fileStamp tells a file from what was in its place before.
type fileStamp struct {
	device, inode uint64
	changed       syscall.Timespec
	size          int64
}

func newPINs(c deviceConfig) *pins {
	p := &pins{files: map[string]string{}, refused: map[[16]byte]fileStamp{}}
	for kind, from := range map[string]struct{ file, credential string }{
		tpm.Kind: {c.TPMPINFile, c.TPMPINCredential}, pkcs11.Kind: {c.HSMPINFile, c.HSMPINCredential},
	} {
		switch {
		case from.file != "":
			p.files[kind] = from.file
		case from.credential != "": // systemd.exec(5), LoadCredential=
			p.files[kind] = filepath.Join(os.Getenv("CREDENTIALS_DIRECTORY"), from.credential)
		}
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
	file := p.files[kind]
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
		return nil, &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: "the file of the PIN", Cause: err, Remedy: "make it readable for kmsd alone"}
	}
	pin := bytes.TrimRight(data, "\r\n")
	if len(pin) == 0 {
		return nil, &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: "the file of the PIN, " + file + ", is empty"}
	}
	return pin, nil
}

// readFor is read for an attempt that nobody asked for.
func (p *pins) readFor(kind string, slot [16]byte) ([]byte, error) {
	now, err := p.stamp(kind)
	p.mu.Lock()
	before, refused := p.refused[slot]
	p.mu.Unlock()
	if err == nil && refused && now == before {
		return nil, &enclave.Error{Kind: enclave.ErrAuth, Detail: fmt.Sprintf("the PIN in %s was refused before and is not tried again", p.files[kind]),
			Remedy: "put the right PIN into the file, or ask for another attempt: kmsctl unlock --slot N"}
	}
	return p.read(kind)
}

// outcome notes whether the PIN of the file was refused. A person's attempt that works counts for the resident keys too.
func (p *pins) outcome(kind string, slot [16]byte, err error) {
	now, statErr := p.stamp(kind)
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.refused, slot)
	if err == nil {
		delete(p.refused, [16]byte{})
	}
	if errors.Is(err, enclave.ErrAuth) && statErr == nil {
		p.refused[slot] = now
	}
}

func (p *pins) stamp(kind string) (fileStamp, error) {
	info, err := os.Stat(p.files[kind])
	if err != nil {
		return fileStamp{}, err
	}
	s := info.Sys().(*syscall.Stat_t)
	return fileStamp{uint64(s.Dev), s.Ino, s.Ctim, s.Size}, nil
}

// checkCredential refuses names that would lead out of the directory of credentials.
func checkCredential(name string) error {
	if strings.ContainsAny(name, "/\x00") || name == "." || name == ".." {
		return fmt.Errorf("%w: %q is not the name of a credential", errConfig, name)
	}
	return nil
}
