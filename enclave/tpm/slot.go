package tpm

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"fmt"

	"github.com/google/go-tpm/tpm2"

	"github.com/kmsd-project/kmsd/enclave"
)

// Labels of derivations.
const (
	labelSealed = "kmsd tpm sealed v1"
	labelAgreed = "kmsd tpm agreed v1"
	labelSlot   = "kmsd tpm slot auth v1"
)

// policyTries is how often a session is made anew because some PCR changed while it was used (TPM_RC_PCR_CHANGED), which at boot is usual.
const policyTries = 5

// Wrap guards the secret as the configuration says.
func (t *TPM) Wrap(ctx context.Context, secret, aad []byte) (enclave.Blob, error) {
	if len(secret) != enclave.SecretSize || len(aad) > enclave.MaxAAD {
		return nil, unsupported("secret of %d bytes with %d of associated data", len(secret), len(aad))
	}
	selected, err := newPCRs(t.config.PCRs)
	if err != nil {
		return nil, err
	}
	if t.closed() {
		return nil, errClosed()
	}
	s := &slot{guard: t.config.Guard, pin: len(t.config.PIN) > 0, salt: newSalt(), pcrs: selected, signer: t.signer}
	t.mu.Lock()
	auth := authValue(s.salt, labelSlot, t.config.PIN)
	t.mu.Unlock()
	value := make([]byte, 32)
	rand.Read(value)
	defer clear(value)
	data := bytes.Clone(value)
	made, err := call(ctx, t, func(d *device) (*created, error) {
		return d.createSlot(s.guard, auth, data, !s.pin, policy{s.pcrs, s.signer})
	}, auth, data)
	if err != nil {
		return nil, err
	}
	s.root, s.public, s.private = made.root, made.public, made.private
	if s.guard == Agreed {
		clear(value)
		if value, s.point, err = agree(made.public); err != nil {
			return nil, err
		}
		defer clear(value)
	}
	if s.sealed, err = enclave.Seal(value, s.label(), secret, aad); err != nil {
		return nil, err
	}
	return s.encode()
}

func (s *slot) label() string {
	if s.guard == Agreed {
		return labelAgreed
	}
	return labelSealed
}

// Unwrap opens a slot, with the PIN in a when it has one.
func (t *TPM) Unwrap(ctx context.Context, b enclave.Blob, aad []byte, a enclave.Auth, dst []byte) error {
	if len(dst) != enclave.SecretSize || len(aad) > enclave.MaxAAD {
		return unsupported("destination of %d bytes with %d of associated data", len(dst), len(aad))
	}
	if t.closed() {
		return errClosed()
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	s, err := decodeSlot(bytes.Clone(b))
	if err != nil {
		return err
	}
	var pin []byte
	if s.pin {
		if len(a.Secret) == 0 {
			return &enclave.Error{Kind: enclave.ErrLocked, Remedy: "give the PIN of the TPM slot"}
		}
		if len(a.Secret) > maxPIN {
			return &enclave.Error{Kind: enclave.ErrAuth, Detail: fmt.Sprintf("PIN of %d bytes", len(a.Secret))}
		}
		pin = a.Secret
	}
	var approvals []Approval
	if len(s.signer) > 0 {
		if approvals, err = readApprovals(t.config.Approvals, s.signer); err != nil {
			return err
		}
	}
	auth := authValue(s.salt, labelSlot, pin)
	value, err := call(ctx, t, func(d *device) ([]byte, error) { return d.openSlot(s, auth, approvals) }, auth)
	if err != nil {
		return err
	}
	if s.guard == Agreed {
		shared := value
		defer clear(shared)
		if value, err = s.fromShared(shared); err != nil {
			return err
		}
	}
	defer clear(value)
	return enclave.Open(value, s.label(), s.sealed, aad, dst)
}

// created is what the TPM made under its storage key.
type created struct {
	root, public, private []byte
}

// create makes an object under the storage key. Its auth value and data are encrypted on their way.
func (d *device) create(root *object, template tpm2.TPMTPublic, auth, data []byte) (*created, error) {
	sensitive := &tpm2.TPMSSensitiveCreate{UserAuth: tpm2.TPM2BAuth{Buffer: auth}}
	if data != nil {
		sensitive.Data = tpm2.NewTPMUSensitiveCreate(&tpm2.TPM2BSensitiveData{Buffer: data})
	}
	answer, err := tpm2.Create{
		ParentHandle: root.with(tpm2.HMAC(tpm2.TPMAlgSHA256, nonceSize, salted(root, nil, encryptIn)...)),
		InSensitive:  tpm2.TPM2BSensitiveCreate{Sensitive: sensitive},
		InPublic:     tpm2.New2B(template),
	}.Execute(d)
	if err != nil {
		return nil, err
	}
	made, err := answer.OutPublic.Contents()
	if err != nil {
		return nil, err
	}
	// A policy that is not in the object, or an auth value that opens without it, would never be noticed by somebody who uses it rightly.
	if made.ObjectAttributes != template.ObjectAttributes || !bytes.Equal(made.AuthPolicy.Buffer, template.AuthPolicy.Buffer) ||
		made.Type != template.Type || made.NameAlg != template.NameAlg {
		return nil, &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: "the TPM made something else than it was asked for"}
	}
	return &created{bytes.Clone(root.name.Buffer), bytes.Clone(answer.OutPublic.Bytes()), bytes.Clone(answer.OutPrivate.Buffer)}, nil
}

// createSlot makes the object that guards a slot: a sealed value or an ECDH key.
func (d *device) createSlot(guard Guard, auth, value []byte, noDA bool, p policy) (*created, error) {
	root, err := d.storageKey()
	if err != nil {
		return nil, err
	}
	var digest []byte
	if !p.empty() {
		values, err := d.readPCRs(p.pcrs)
		if err != nil {
			return nil, err
		}
		if digest, err = p.digest(values); err != nil {
			return nil, err
		}
	}
	template := tpm2.TPMTPublic{
		Type:    tpm2.TPMAlgKeyedHash,
		NameAlg: tpm2.TPMAlgSHA256,
		// Invariant: an object with a policy has no other way in. With UserWithAuth set the TPM would take the auth value alone.
		ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, UserWithAuth: p.empty(), NoDA: noDA},
		AuthPolicy:       tpm2.TPM2BDigest{Buffer: digest},
	}
	if guard == Agreed {
		template.Type = tpm2.TPMAlgECC
		template.ObjectAttributes.SensitiveDataOrigin = true
		template.ObjectAttributes.Decrypt = true
		template.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{CurveID: tpm2.TPMECCNistP256})
		return d.create(root, template, auth, nil)
	}
	return d.create(root, template, auth, value)
}

// openSlot has the TPM unseal the value, or agree on it.
func (d *device) openSlot(s *slot, auth []byte, approvals []Approval) ([]byte, error) {
	root, err := d.storageKey()
	if err != nil {
		return nil, err
	}
	// A TPM answers TPM_RC_INTEGRITY both for damage and for what another storage key made. The name tells.
	if !bytes.Equal(root.name.Buffer, s.root) {
		return nil, replaced(s.root, root.name.Buffer)
	}
	o, err := d.load(root, s.public, s.private)
	if err != nil {
		return nil, err
	}
	defer d.flush(o)
	for range policyTries {
		var value []byte
		if value, err = d.useSlot(root, o, s, auth, approvals); !isOneOf(err, tpm2.TPMRCPCRChanged) {
			return value, d.refused(err, s)
		}
	}
	return nil, err
}

func (d *device) useSlot(root, o *object, s *slot, auth []byte, approvals []Approval) ([]byte, error) {
	direction := encryptOut
	if s.guard == Agreed {
		direction = encryptInOut
	}
	session, end, err := d.authorise(root, auth, policy{s.pcrs, s.signer}, approvals, direction)
	if err != nil {
		return nil, err
	}
	defer end()
	d.job.attempted = s.pin
	if s.guard == Agreed {
		answer, err := tpm2.ECDHZGen{KeyHandle: o.with(session), InPoint: tpm2.New2B(*pointOf(s.point))}.Execute(d)
		if err != nil {
			return nil, err
		}
		return sharedX(answer.OutPoint, 32)
	}
	answer, err := tpm2.Unseal{ItemHandle: o.with(session)}.Execute(d)
	if err != nil {
		return nil, err
	}
	return answer.OutData.Buffer, nil
}

// refused says what a refusal means for this slot.
func (d *device) refused(err error, s *slot) error {
	switch {
	case isOneOf(err, tpm2.TPMRCBadAuth, tpm2.TPMRCAuthFail) && !s.pin:
		return corrupt("the salt of the slot does not fit the object in the TPM", err)
	case isOneOf(err, tpm2.TPMRCBadAuth, tpm2.TPMRCAuthFail):
		e := &enclave.Error{Kind: enclave.ErrAuth, Cause: err, Remedy: "the TPM locks out after a few wrong PINs: be sure of the next one"}
		if l, lerr := d.lockout(); lerr == nil && l.max > 0 {
			e.Detail = fmt.Sprintf("%d of %d wrong attempts", l.count, l.max)
		}
		return e
	case isOneOf(err, tpm2.TPMRCLockout):
		return d.lockedOut(err)
	case isOneOf(err, tpm2.TPMRCPolicyFail) && s.pcrs != 0:
		return &enclave.Error{Kind: enclave.ErrPolicy, Cause: err, Detail: fmt.Sprintf("a PCR of %v is not as it was when the slot was made", s.pcrs.list()),
			Remedy: "unlock with another slot, then remove this one and enrol the TPM again"}
	}
	return err
}

// agree makes the value of an agreed slot, with a key of ours that is forgotten at once, and returns our public half.
func agree(public []byte) (value, point []byte, err error) {
	area, err := tpm2.Unmarshal[tpm2.TPMTPublic](public)
	if err != nil {
		return nil, nil, err
	}
	theirs, err := pointBytes(area)
	if err != nil {
		return nil, nil, err
	}
	peer, err := ecdh.P256().NewPublicKey(theirs)
	if err != nil {
		return nil, nil, err
	}
	ours, err := ecdh.P256().GenerateKey(rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	shared, err := ours.ECDH(peer)
	if err != nil {
		return nil, nil, err
	}
	defer clear(shared)
	point = ours.PublicKey().Bytes()
	value, err = deriveAgreed(shared, point, theirs)
	return value, point, err
}

// fromShared is the other end of agree.
func (s *slot) fromShared(shared []byte) ([]byte, error) {
	area, err := tpm2.Unmarshal[tpm2.TPMTPublic](s.public)
	if err != nil {
		return nil, corrupt("public area of the slot", err)
	}
	theirs, err := pointBytes(area)
	if err != nil {
		return nil, corrupt("public area of the slot", err)
	}
	return deriveAgreed(shared, s.point, theirs)
}

// deriveAgreed binds the shared secret to both public keys (SP 800-56C; RFC 9180 section 4.1 does the same).
func deriveAgreed(shared, ours, theirs []byte) ([]byte, error) {
	return hkdf.Key(sha256.New, shared, nil, labelAgreed+string(ours)+string(theirs), 32)
}
