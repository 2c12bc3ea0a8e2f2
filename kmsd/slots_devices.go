package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"sync"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/enclave/helper"
	"github.com/kmsd-project/kmsd/enclave/keyfile"
	"github.com/kmsd-project/kmsd/enclave/keyring"
	"github.com/kmsd-project/kmsd/enclave/pkcs11"
	"github.com/kmsd-project/kmsd/enclave/recovery"
	"github.com/kmsd-project/kmsd/enclave/tpm"
)

// maxSigner is the size of the largest file with the key of who approves PCRs, in bytes.
const maxSigner = 16 << 10

// devices holds the drivers that are open: one for each device, shared by the slots and the resident keys in it. It is safe for
// concurrent use.
type devices struct {
	keyringState string // state directory of the file backend of the keyring
	dialer       helper.Dialer
	owner        string            // file with the password of the TPM's owner hierarchy; empty when it has none
	moved        map[string]string // locations of slots that are to be looked for elsewhere, from the configuration
	log          *slog.Logger

	mu     sync.Mutex
	open   map[deviceKey]enclave.Enclave
	closed bool
}

// deviceKey is what tells devices apart. The binding counts for TPMs, whose drivers are told which TPM to expect, so that after a TPM was
// cleared slots of before and after stand side by side; and for keyfiles, which may be on different media at the same place.
type deviceKey struct{ location, binding string }

func newDevices(keyringState string, dialer helper.Dialer, c deviceConfig, log *slog.Logger) *devices {
	return &devices{keyringState: keyringState, dialer: dialer, owner: c.TPMOwnerFile, moved: c.Moved, log: log, open: map[deviceKey]enclave.Enclave{}}
}

// at returns the driver of the device at a location, which is opened when it is needed first. binding is what the slot or the key was
// bound to, empty when there is none yet. No device is touched.
func (v *devices) at(location, binding string) (enclave.Enclave, error) {
	s, key, err := v.find(location, binding)
	if err != nil {
		return nil, err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.closed {
		return nil, &enclave.Error{Kind: enclave.ErrAbsent, Detail: "kmsd is stopping"}
	}
	if e := v.open[key]; e != nil {
		return e, nil
	}
	e, err := v.driver(s, key.binding, nil)
	if err != nil {
		return nil, err
	}
	v.open[key] = e
	return e, nil
}

// same reports whether two locations are of one device, wherever that is now.
func (v *devices) same(a, b string) bool {
	return sameDevice(cmp.Or(v.moved[a], a), cmp.Or(v.moved[b], b))
}

// find reads a location.
func (v *devices) find(location, binding string) (spec, deviceKey, error) {
	if to := v.moved[location]; to != "" {
		location = to
	}
	s, err := parseSpec(location)
	if err != nil {
		return s, deviceKey{}, &enclave.Error{Kind: enclave.ErrUnsupported, Detail: "location " + strconv.Quote(location), Cause: err,
			Remedy: "use the release of kmsd that enrolled it, or a later one"}
	}
	key := deviceKey{location: s.location()}
	if s.kind == tpm.Kind || s.kind == keyfile.Kind {
		key.binding = binding
	}
	return s, key, nil
}

// adopt makes a driver that was opened to enrol the one of its location, or closes it when there is one already.
func (v *devices) adopt(location, binding string, e enclave.Enclave) {
	_, key, err := v.find(location, binding)
	v.mu.Lock()
	defer v.mu.Unlock()
	if err != nil || v.closed || v.open[key] != nil {
		e.Close()
		return
	}
	v.open[key] = e
}

// driver opens a driver. The PIN, which it copies, is for new slots.
func (v *devices) driver(s spec, binding string, pin []byte) (enclave.Enclave, error) {
	switch s.kind {
	case tpm.Kind:
		c := tpm.Config{Device: s.place, Binding: binding, PIN: pin, AsksPIN: len(pin) > 0 || binding != "", Guard: tpm.Guard(s.options["guard"]), Approvals: s.options["approvals"]}
		var err error
		if c.PCRs, err = parsePCRs(s.options["pcrs"]); err != nil {
			return nil, err
		}
		if file := s.options["signer"]; file != "" {
			if c.Signer, err = readSigner(file); err != nil {
				return nil, err
			}
		}
		if v.owner != "" {
			if c.OwnerPassword, err = readSecretFile(v.owner); err != nil {
				return nil, err
			}
			defer clear(c.OwnerPassword)
		}
		return tpm.Open(c)
	case pkcs11.Kind:
		return pkcs11.Dial(v.dialer, s.token)
	case keyring.FileKind:
		return keyring.DialFile(v.dialer, v.keyringState), nil
	case keyfile.Kind:
		return keyfile.Open(s.place)
	case keyring.SecretServiceKind:
		return keyring.DialSecretService(v.dialer), nil
	case recovery.Kind:
		return recovery.New(), nil
	}
	return nil, &enclave.Error{Kind: enclave.ErrUnsupported, Detail: fmt.Sprintf("this release of kmsd has no enclave %q", s.kind), Remedy: "use keyring:file"}
}

// closeKind closes the drivers of a kind, which are opened anew when they are needed again. What a person has unlocked in such a device is
// locked by that.
func (v *devices) closeKind(kind string) {
	v.mu.Lock()
	var list []enclave.Enclave
	for key, e := range v.open {
		if s, err := parseSpec(key.location); err == nil && s.kind == kind {
			list = append(list, e)
			delete(v.open, key)
		}
	}
	v.mu.Unlock()
	for _, e := range list {
		if err := e.Close(); err != nil {
			v.log.Warn("a device could not be closed", "kind", kind, "error", err)
		}
	}
}

// Close ends all drivers.
func (v *devices) Close() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.closed = true
	var errs []error
	for key, e := range v.open {
		errs = append(errs, e.Close())
		delete(v.open, key)
	}
	return errors.Join(errs...)
}

// login logs in to a device whose resident keys want that, and reports whether there was anything to do.
func login(ctx context.Context, e enclave.Enclave, pin []byte) (bool, error) {
	s, ok := e.(enclave.Session)
	if !ok {
		return false, nil
	}
	err := s.Login(ctx, enclave.Auth{Secret: pin})
	if errors.Is(err, enclave.ErrUnsupported) {
		return false, nil
	}
	return true, err
}

// parsePCRs reads numbers with commas between them.
func parsePCRs(text string) ([]int, error) {
	if text == "" {
		return nil, nil
	}
	var list []int
	for word := range strings.SplitSeq(text, ",") {
		n, err := strconv.ParseUint(word, 10, 8)
		if err != nil {
			return nil, fmt.Errorf("%w: pcrs=%.50q: write numbers with commas between them", errSpec, text)
		}
		list = append(list, int(n))
	}
	return list, nil
}

// readSigner reads the public key of who approves PCRs: a SubjectPublicKeyInfo in PEM (RFC 7468 section 13), or a certificate.
func readSigner(path string) (crypto.PublicKey, error) {
	data, err := readTrusted(path, maxSigner)
	if err != nil {
		return nil, fmt.Errorf("%w: signer: %w", errSpec, err)
	}
	block, rest := pem.Decode(data)
	if block == nil || len(bytes.TrimSpace(rest)) > 0 {
		return nil, fmt.Errorf("%w: signer: %s is not one key in PEM", errSpec, path)
	}
	var key crypto.PublicKey
	switch block.Type {
	case "PUBLIC KEY":
		key, err = x509.ParsePKIXPublicKey(block.Bytes)
	case "CERTIFICATE":
		var c *x509.Certificate
		if c, err = x509.ParseCertificate(block.Bytes); err == nil {
			key = c.PublicKey
		}
	default:
		err = fmt.Errorf("holds a %.30q", block.Type)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: signer: %s: %w", errSpec, path, err)
	}
	return key, nil
}
