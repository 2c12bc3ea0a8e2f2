package tpm

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"

	"github.com/kmsd-project/kmsd/enclave"
)

// Counters live in the TPM's non-volatile memory, at an index in the range of the owner (TCG Registry of Reserved TPM 2.0 Handles) that
// is derived from the id. The password of the index is derived too: it keeps nobody out who knows the id and may use the TPM, but stops
// other programs from using the index by mistake.
const (
	counterFirst = 0x01800000
	counterMask  = 0x003fffff
	counterSize  = 8
)

// A TPM starts a counter not below any counter that it ever removed, so that removing and making one again, or clearing the TPM, does not
// take it back (TPM 2.0 part 1 section 37.2.5). A value that is lower than a recorded one proves another TPM or a store that is too new;
// one that is higher, that the store is old.

// counter is a counter as an object of the TPM.
type counter struct {
	index tpm2.TPMHandle
	auth  []byte
	name  tpm2.TPM2BName
}

func newCounter(id [16]byte) *counter {
	place := sha256.Sum256(append([]byte("kmsd counter index v1"), id[:]...))
	secret := sha256.Sum256(append([]byte("kmsd counter auth v1"), id[:]...))
	return &counter{
		index: tpm2.TPMHandle(counterFirst | binary.BigEndian.Uint32(place[:])&counterMask),
		auth:  base64.RawURLEncoding.AppendEncode(nil, secret[:24]),
	}
}

func (c *counter) public() tpm2.TPMSNVPublic {
	return tpm2.TPMSNVPublic{
		NVIndex:    c.index,
		NameAlg:    tpm2.TPMAlgSHA256,
		Attributes: tpm2.TPMANV{AuthWrite: true, AuthRead: true, NT: tpm2.TPMNTCounter, NoDA: true},
		DataSize:   counterSize,
	}
}

// ReadCounter returns the counter filed under id. Without one the error wraps ErrNoCounter besides enclave.ErrAbsent.
func (t *TPM) ReadCounter(ctx context.Context, id [16]byte) (uint64, error) {
	return call(ctx, t, func(d *device) (uint64, error) {
		root, err := d.storageKey()
		if err != nil {
			return 0, err
		}
		c := newCounter(id)
		exists, written, err := d.findCounter(c)
		if err != nil {
			return 0, err
		}
		if !exists || !written {
			return 0, &enclave.Error{Kind: enclave.ErrAbsent, Cause: ErrNoCounter}
		}
		return d.readCounter(root, c)
	})
}

// IncrementCounter adds one, making the counter when there is none. It is not repeated when the connection breaks: after an error the
// counter may have been incremented, and ReadCounter tells. Counters wear the TPM's memory; one increment for each unlock or rotation is
// meant, not one for each operation.
func (t *TPM) IncrementCounter(ctx context.Context, id [16]byte) (uint64, error) {
	return call(ctx, t, func(d *device) (uint64, error) {
		root, err := d.storageKey()
		if err != nil {
			return 0, err
		}
		c := newCounter(id)
		exists, written, err := d.findCounter(c)
		if err != nil {
			return 0, err
		}
		if !exists {
			if err := d.defineCounter(root, c); err != nil {
				return 0, err
			}
		}
		d.job.attempted = true
		_, err = tpm2.NVIncrement{
			AuthHandle: tpm2.AuthHandle{Handle: c.index, Name: c.name, Auth: counterSession(root, c)},
			NVIndex:    tpm2.NamedHandle{Handle: c.index, Name: c.name},
		}.Execute(d)
		if isOneOf(err, tpm2.TPMRCBadAuth, tpm2.TPMRCAuthFail) {
			return 0, foreignIndex(c.index, err)
		}
		if err != nil {
			return 0, err
		}
		if !written {
			// The first increment sets TPMA_NV_WRITTEN, which is part of the name.
			if _, _, err := d.findCounter(c); err != nil {
				return 0, afterIncrement(err)
			}
		}
		n, err := d.readCounter(root, c)
		return n, afterIncrement(err)
	})
}

// afterIncrement hides the cause of an error, so that it does not make the job run again.
func afterIncrement(err error) error {
	if err == nil {
		return nil
	}
	return &enclave.Error{Kind: enclave.ErrBusy, Detail: "the counter was incremented and could not be read", Cause: errors.New(err.Error())}
}

// counterSession authenticates the answer too, so that nobody between us and the TPM can show an old value.
func counterSession(root *object, c *counter) tpm2.Session {
	return tpm2.HMAC(tpm2.TPMAlgSHA256, nonceSize, salted(root, c.auth)...)
}

func (d *device) readCounter(root *object, c *counter) (uint64, error) {
	answer, err := tpm2.NVRead{
		AuthHandle: tpm2.AuthHandle{Handle: c.index, Name: c.name, Auth: counterSession(root, c)},
		NVIndex:    tpm2.NamedHandle{Handle: c.index, Name: c.name},
		Size:       counterSize,
	}.Execute(d)
	if isOneOf(err, tpm2.TPMRCBadAuth, tpm2.TPMRCAuthFail) {
		return 0, foreignIndex(c.index, err)
	}
	if err != nil {
		return 0, err
	}
	if len(answer.Data.Buffer) != counterSize {
		return 0, foreignIndex(c.index, nil)
	}
	return binary.BigEndian.Uint64(answer.Data.Buffer), nil
}

// findCounter looks for the counter and computes its name.
func (d *device) findCounter(c *counter) (exists, written bool, err error) {
	answer, err := tpm2.NVReadPublic{NVIndex: c.index}.Execute(d)
	if isOneOf(err, tpm2.TPMRCHandle) {
		return false, false, nil
	}
	if err != nil {
		return false, false, err
	}
	public, err := answer.NVPublic.Contents()
	if err != nil {
		return false, false, err
	}
	name, err := tpm2.NVName(public)
	if err != nil {
		return false, false, err
	}
	want := c.public()
	want.Attributes.Written = public.Attributes.Written
	wantName, err := tpm2.NVName(&want)
	if err != nil {
		return false, false, err
	}
	if string(wantName.Buffer) != string(name.Buffer) {
		return false, false, foreignIndex(c.index, nil)
	}
	c.name = *name
	return true, public.Attributes.Written, nil
}

func foreignIndex(index tpm2.TPMHandle, cause error) error {
	return &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: fmt.Sprintf("NV index %#x is not the counter of this store", uint32(index)), Cause: cause,
		Remedy: "find out which program made it, and remove it if it is not needed (tpm2_nvundefine)"}
}

func (d *device) defineCounter(root *object, c *counter) error {
	public := c.public()
	_, err := tpm2.NVDefineSpace{
		AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: d.ownerSession(encryptIn, tpm2.Salted(root.handle, *root.public))},
		Auth:       tpm2.TPM2BAuth{Buffer: c.auth},
		PublicInfo: tpm2.New2B(public),
	}.Execute(d)
	if err != nil && !isOneOf(err, tpm2.TPMRCNVDefined) {
		return err
	}
	name, err := tpm2.NVName(&public)
	if err != nil {
		return err
	}
	c.name = *name
	return nil
}
