package tpm

import (
	"bytes"
	"context"
	"crypto"
	"crypto/hmac"
	"crypto/x509"

	"github.com/google/go-tpm/tpm2"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

const (
	labelKey   = "kmsd tpm key auth v1"
	labelCheck = "kmsd tpm key check v1"
)

// Resident keys are kept outside the TPM, encrypted by it under its storage key; inside they are only during an operation. So their number
// is not limited, and nothing is lost when the TPM loses its volatile memory. The auth value of a key is derived from Spec.AAD: a blob that
// is moved to another record is refused by the TPM itself.

// Generate makes a key in the TPM. It has no backup, and dies with a TPM2_Clear. A discrete TPM takes up to minutes for an RSA key.
func (t *TPM) Generate(ctx context.Context, s enclave.Spec) (enclave.Blob, []byte, error) {
	a, err := algorithmOf(s.Algorithm)
	if err != nil {
		return nil, nil, err
	}
	if len(s.AAD) > enclave.MaxAAD {
		return nil, nil, unsupported("associated data of %d bytes", len(s.AAD))
	}
	template, err := a.template(s.Usages)
	if err != nil {
		return nil, nil, err
	}
	k := &key{algorithm: s.Algorithm, salt: newSalt()}
	k.check = bind(k.salt, labelCheck, s.AAD)[:checkSize]
	auth := authValue(k.salt, labelKey, s.AAD)
	made, err := call(ctx, t, func(d *device) (*created, error) {
		root, err := d.storageKey()
		if err != nil {
			return nil, err
		}
		made, err := d.create(root, template, auth, nil)
		if isOneOf(err, tpm2.TPMRCCurve, tpm2.TPMRCValue, tpm2.TPMRCKeySize, tpm2.TPMRCScheme, tpm2.TPMRCAsymmetric, tpm2.TPMRCHash) {
			return nil, &enclave.Error{Kind: enclave.ErrUnsupported, Detail: "this TPM does not make " + string(a.name) + " keys", Cause: err}
		}
		return made, err
	}, auth)
	if err != nil {
		return nil, nil, err
	}
	k.root, k.public, k.private = made.root, made.public, made.private
	spki, err := k.spki()
	if err != nil {
		return nil, nil, &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: "the TPM made a key that is none", Cause: err}
	}
	blob, err := k.encode()
	return blob, spki, err
}

func (k *key) area() (*tpm2.TPMTPublic, crypto.PublicKey, error) {
	area, err := tpm2.Unmarshal[tpm2.TPMTPublic](k.public)
	if err != nil {
		return nil, nil, err
	}
	p, err := publicKey(area)
	return area, p, err
}

func (k *key) spki() ([]byte, error) {
	_, p, err := k.area()
	if err != nil || p == nil {
		return nil, err
	}
	return x509.MarshalPKIXPublicKey(p)
}

// Do performs one operation. Signatures are in DER for ECDSA; an agreement gives the x coordinate.
func (t *TPM) Do(ctx context.Context, b enclave.Blob, op enclave.Op, dst []byte) ([]byte, error) {
	if t.closed() {
		return nil, errClosed()
	}
	if isMachine(b) {
		return t.doMachine(ctx, b, op, dst)
	}
	k, err := decodeKey(bytes.Clone(b))
	if err != nil {
		return nil, err
	}
	a, err := algorithmOf(k.algorithm)
	if err != nil {
		return nil, err
	}
	area, public, err := k.area()
	if err != nil {
		return nil, corrupt("public area of the key", err)
	}
	if !hmac.Equal(k.check, bind(k.salt, labelCheck, op.Bound)[:checkSize]) {
		return nil, errOtherRecord(nil)
	}
	r := &use{key: k, public: public, input: bytes.Clone(op.Input), label: bytes.Clone(op.AAD)}
	var do func(d *device, root, o *object, auth []byte) ([]byte, error)
	switch op.Usage {
	case keyspec.Sign, keyspec.Certify:
		if !area.ObjectAttributes.SignEncrypt || a.mac != 0 {
			return nil, unsupported("the key cannot sign")
		}
		if r.scheme, err = schemeOf(a, op.Usage, op.Scheme); err != nil {
			return nil, err
		}
		if err := r.digest(&op, r.scheme.hash); err != nil {
			return nil, err
		}
		do = r.sign
	case keyspec.Decrypt, keyspec.Unwrap:
		if !area.ObjectAttributes.Decrypt || a.bits == 0 {
			return nil, unsupported("the key cannot decrypt")
		}
		if r.scheme, err = schemeOf(a, op.Usage, op.Scheme); err != nil {
			return nil, err
		}
		if err := r.ciphertext(int(a.bits / 8)); err != nil {
			return nil, err
		}
		do = r.decrypt
	case keyspec.MAC:
		if !area.ObjectAttributes.SignEncrypt || a.mac == 0 {
			return nil, unsupported("the key makes no MACs")
		}
		if len(op.Input) > maxBuffer {
			return nil, unsupported("MAC in a TPM of %d bytes, it takes at most %d", len(op.Input), maxBuffer)
		}
		r.hash = a.mac
		do = r.mac
	case keyspec.Agree:
		if !area.ObjectAttributes.Decrypt || !a.agree {
			return nil, unsupported("the key cannot agree")
		}
		if r.input, err = peerPoint(op.Input, public); err != nil {
			return nil, err
		}
		do = r.agree
	default:
		return nil, unsupported("%s with a key in a TPM", op.Usage)
	}
	auth := authValue(k.salt, labelKey, op.Bound)
	result, err := call(ctx, t, func(d *device) ([]byte, error) { return d.withKey(k, auth, do) }, auth)
	if err != nil {
		return nil, err
	}
	defer clear(result)
	return append(dst[:0], result...), nil
}

// errDecryption is the same for every cause, so that it answers no questions about the padding (RFC 8017 section 7.1.2).
var errDecryption = &enclave.Error{Kind: enclave.ErrDecryption}

func errOtherRecord(cause error) error { return corrupt("the key belongs to another record", cause) }

// withKey loads the key for one operation, or takes it as it is still loaded from the last one.
func (d *device) withKey(k *key, auth []byte, do func(d *device, root, o *object, auth []byte) ([]byte, error)) ([]byte, error) {
	root, err := d.parent()
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(root.name.Buffer, k.root) {
		return nil, replaced(k.root, root.name.Buffer)
	}
	o, err := d.warm(root, k)
	if err != nil {
		return nil, err
	}
	result, err := do(d, root, o, auth)
	if isOneOf(err, tpm2.TPMRCBadAuth, tpm2.TPMRCAuthFail) {
		return nil, errOtherRecord(err)
	}
	if isOneOf(err, tpm2.TPMRCLockout) { // imported keys
		return nil, d.lockedOut(err)
	}
	return result, err
}

// Destroy checks the blob. A TPM keeps nothing of a resident key: the key is gone with the last copy of its blob. Of a machine's key it
// frees what the TPM keeps.
func (t *TPM) Destroy(ctx context.Context, b enclave.Blob) error {
	if isMachine(b) {
		return t.destroyMachine(ctx, b)
	}
	_, err := decodeKey(b)
	return err
}

// MaxParallel is one: a TPM does one thing at a time.
func (t *TPM) MaxParallel() int { return 1 }

var (
	_ enclave.Enclave  = (*TPM)(nil)
	_ enclave.Resident = (*TPM)(nil)
	_ enclave.Counter  = (*TPM)(nil)
	_ enclave.Importer = (*TPM)(nil)
	_ enclave.Machine  = (*TPM)(nil)
)
