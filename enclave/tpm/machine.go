package tpm

import (
	"bytes"
	"context"
	"crypto"
	"crypto/hmac"
	"crypto/rsa"
	_ "crypto/sha1" // linked in for the name of the signing key
	"crypto/x509"
	"encoding/hex"
	"slices"

	"github.com/google/go-tpm/tpm2"
	"golang.org/x/crypto/cryptobyte"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// The keys of a registration machine of MOSIP are primary keys: the TPM makes them from its endorsement seed and a template, the same ones
// each time, and no file holds anything of them. So a machine whose client has used the TPM keeps its identity under kmsd.
//
// A primary key costs a search for primes, seconds in a discrete TPM, so it is made once and kept in the TPM's memory under one of
// machineHandles handles, by whose name it is found again. When somebody evicts it, it is made again and kept again.
//
// Clearing the TPM does not change its endorsement seed: the keys come back. Another TPM, or an endorsement seed that was changed, gives other
// keys, and then the key is ErrReplaced.
//
// The keys have no password, as MOSIP's have none: whoever may open the device can use them, around kmsd. Their being under the protection
// against dictionary attacks, as MOSIP's template has it, means that a locked-out TPM refuses them, and that it counts a loss of power after
// their use as a wrong password.

// Handles of the owner's range under which the keys are kept (TPM 2.0 part 2 section 7.5.2; "KM" in the middle).
const (
	machineFirst   = tpm2.TPMHandle(0x814b4d00)
	machineHandles = 16
)

const (
	machineKind   = Kind + "-machine"
	machineFormat = 1
)

// template is one of the two templates of MOSIP's client.
type template uint8

// The templates, as they stand in blobs.
const (
	machineSigning    template = 1
	machineEncryption template = 2
)

// machinePolicy is the policy digest in the template for encryption, that of the endorsement key template of the TCG (EK Credential Profile
// section B.3.3). Since the key may also be used with its empty password, nobody needs to satisfy it.
const machinePolicy = "837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa"

// public is the public area that goes into TPM2_CreatePrimary. Every byte of it counts: an exponent of zero for the default, or zeros in
// unique, give another key.
func (t template) public() (tpm2.TPMTPublic, error) {
	p := tpm2.TPMTPublic{
		Type:             tpm2.TPMAlgRSA,
		NameAlg:          tpm2.TPMAlgSHA1,
		ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, UserWithAuth: true},
		Unique:           tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{}),
	}
	scheme := tpm2.TPMTRSAScheme{Scheme: tpm2.TPMAlgRSASSA,
		Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgRSASSA, &tpm2.TPMSSigSchemeRSASSA{HashAlg: tpm2.TPMAlgSHA256})}
	switch t {
	case machineSigning:
		p.ObjectAttributes.SignEncrypt = true
	case machineEncryption:
		policy, err := hex.DecodeString(machinePolicy)
		if err != nil {
			return p, err
		}
		p.NameAlg = tpm2.TPMAlgSHA256
		p.ObjectAttributes.Decrypt = true
		p.AuthPolicy = tpm2.TPM2BDigest{Buffer: policy}
		scheme = tpm2.TPMTRSAScheme{Scheme: tpm2.TPMAlgOAEP,
			Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgOAEP, &tpm2.TPMSEncSchemeOAEP{HashAlg: tpm2.TPMAlgSHA256})}
	default:
		return p, unsupported("template %d of a machine's key", uint8(t))
	}
	p.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgRSA, &tpm2.TPMSRSAParms{
		Symmetric: tpm2.TPMTSymDefObject{Algorithm: tpm2.TPMAlgNull}, Scheme: scheme, KeyBits: 2048, Exponent: 65537,
	})
	return p, nil
}

// templateOf chooses the template for what the key is to do.
func templateOf(s *enclave.Spec) (template, error) {
	signs := slices.Contains(s.Usages, keyspec.Sign)
	if decrypts := slices.Contains(s.Usages, keyspec.Decrypt); s.Algorithm != keyspec.RSA2048 || signs == decrypts {
		return 0, unsupported("a machine's key is RSA-2048 and either signs or decrypts")
	}
	if signs {
		return machineSigning, nil
	}
	return machineEncryption, nil
}

// machineKey is the content of the blob of a machine's key:
//
//	template (1) | handle under which it is kept (4) | salt (32) | check value (8) | public area (2+n)
//
// The public area is the one that the TPM gave when the key was adopted. The check value is that of other keys.
type machineKey struct {
	template template
	handle   tpm2.TPMHandle
	salt     []byte
	check    []byte
	public   []byte
	name     tpm2.TPM2BName // of public, once decoded
}

func (k *machineKey) encode() (enclave.Blob, error) {
	b := cryptobyte.NewBuilder(nil)
	b.AddUint8(uint8(k.template))
	b.AddUint32(uint32(k.handle))
	b.AddBytes(k.salt)
	b.AddBytes(k.check)
	addBytes16(b, k.public)
	body, err := b.Bytes()
	if err != nil {
		return nil, err
	}
	return enclave.EncodeBlob(machineKind, machineFormat, body)
}

// isMachine reports whether a blob says that it is of a machine's key.
func isMachine(b enclave.Blob) bool {
	n := 1 + len(machineKind)
	return len(b) > n && int(b[0]) == len(machineKind) && string(b[1:n]) == machineKind
}

// decodeMachine takes a blob apart, and returns the public key with it. The parts alias b.
func decodeMachine(b enclave.Blob) (*machineKey, *rsa.PublicKey, error) {
	body, err := decodeBody(machineKind, machineFormat, b)
	if err != nil {
		return nil, nil, err
	}
	var chosen uint8
	var handle uint32
	var public cryptobyte.String
	k := new(machineKey)
	if !body.ReadUint8(&chosen) || !body.ReadUint32(&handle) || !body.ReadBytes(&k.salt, saltSize) || !body.ReadBytes(&k.check, checkSize) ||
		!body.ReadUint16LengthPrefixed(&public) || !body.Empty() || badArea(public) || !isMachineHandle(tpm2.TPMHandle(handle)) {
		return nil, nil, corrupt("parts of the machine's key", nil)
	}
	k.template, k.handle, k.public = template(chosen), tpm2.TPMHandle(handle), public
	area, err := tpm2.Unmarshal[tpm2.TPMTPublic](k.public)
	if err != nil {
		return nil, nil, corrupt("public area of the machine's key", err)
	}
	key, err := k.template.check(area)
	if err != nil {
		return nil, nil, corrupt("public area of the machine's key", err)
	}
	name, err := tpm2.ObjectName(area)
	if err != nil {
		return nil, nil, corrupt("public area of the machine's key", err)
	}
	k.name = *name
	return k, key, nil
}

func isMachineHandle(h tpm2.TPMHandle) bool {
	return h >= machineFirst && h < machineFirst+machineHandles
}

// check reports whether a public area is one that the template gives, but for the modulus, and returns the public key.
func (t template) check(area *tpm2.TPMTPublic) (*rsa.PublicKey, error) {
	want, err := t.public()
	if err != nil {
		return nil, err
	}
	if area.Type != want.Type {
		return nil, unsupported("the machine's key is not RSA")
	}
	want.Unique = area.Unique
	if !bytes.Equal(tpm2.Marshal(want), tpm2.Marshal(*area)) {
		return nil, unsupported("the TPM changes what the template of a machine's key says")
	}
	public, err := publicKey(area)
	if err != nil {
		return nil, err
	}
	return public.(*rsa.PublicKey), nil
}

// MachineKey implements enclave.Machine. It makes the key, so it takes seconds in a discrete TPM, and keeps it in the TPM for later.
func (t *TPM) MachineKey(ctx context.Context, s enclave.Spec) (enclave.Blob, []byte, error) {
	chosen, err := templateOf(&s)
	if err != nil {
		return nil, nil, err
	}
	if len(s.AAD) > enclave.MaxAAD {
		return nil, nil, unsupported("associated data of %d bytes", len(s.AAD))
	}
	k := &machineKey{template: chosen, salt: newSalt()}
	k.check = bind(k.salt, labelCheck, s.AAD)[:checkSize]
	type made struct {
		handle tpm2.TPMHandle
		public []byte
		key    *rsa.PublicKey
	}
	m, err := call(ctx, t, func(d *device) (*made, error) {
		o, key, err := d.primary(chosen)
		if err != nil {
			return nil, err
		}
		defer d.flush(o)
		kept, err := d.kept(o.name, 0)
		if err == nil && kept == nil {
			kept, err = d.keep(o)
		}
		if err != nil {
			return nil, err
		}
		return &made{kept.handle, tpm2.Marshal(*o.public), key}, nil
	})
	if err != nil {
		return nil, nil, err
	}
	k.handle, k.public = m.handle, m.public
	spki, err := x509.MarshalPKIXPublicKey(m.key)
	if err != nil {
		return nil, nil, err
	}
	blob, err := k.encode()
	return blob, spki, err
}

// doMachine is Do for a machine's key.
func (t *TPM) doMachine(ctx context.Context, b enclave.Blob, op enclave.Op, dst []byte) ([]byte, error) {
	k, public, err := decodeMachine(bytes.Clone(b))
	if err != nil {
		return nil, err
	}
	if !hmac.Equal(k.check, bind(k.salt, labelCheck, op.Bound)[:checkSize]) {
		return nil, errOtherRecord(nil)
	}
	a, err := algorithmOf(keyspec.RSA2048)
	if err != nil {
		return nil, err
	}
	r := &use{public: public, input: bytes.Clone(op.Input), label: bytes.Clone(op.AAD)}
	var only keyspec.Scheme
	var do func(d *device, root, o *object, auth []byte) ([]byte, error)
	switch {
	case (op.Usage == keyspec.Sign || op.Usage == keyspec.Certify) && k.template == machineSigning:
		only, do = keyspec.RSAPKCS1SHA256, r.sign
		if err := r.digest(&op, crypto.SHA256); err != nil {
			return nil, err
		}
	case (op.Usage == keyspec.Decrypt || op.Usage == keyspec.Unwrap) && k.template == machineEncryption:
		only, do = keyspec.RSAOAEPSHA256, r.decrypt
		if err := r.ciphertext(public.Size()); err != nil {
			return nil, err
		}
	default:
		return nil, unsupported("%s with this key of a machine", op.Usage)
	}
	if op.Scheme != "" && op.Scheme != only {
		return nil, &enclave.Error{Kind: enclave.ErrUnsupported, Detail: "the template of a machine's key has one scheme, not " + string(op.Scheme),
			Remedy: "use " + string(only)}
	}
	if r.scheme, err = schemeOf(a, op.Usage, only); err != nil {
		return nil, err
	}
	result, err := call(ctx, t, func(d *device) ([]byte, error) {
		o, err := d.machine(k)
		if err != nil {
			return nil, err
		}
		// The session of a decryption is salted to the key itself: its public half is in the blob, so that nobody between us and the TPM
		// can put another in its place.
		result, err := do(d, o, o, nil)
		if isOneOf(err, tpm2.TPMRCLockout) {
			return nil, d.lockedOut(err)
		}
		return result, err
	})
	if err != nil {
		return nil, err
	}
	defer clear(result)
	return append(dst[:0], result...), nil
}

// machine finds the key of a blob in the TPM, or makes it again and keeps it.
func (d *device) machine(k *machineKey) (*object, error) {
	if o := d.isHot(k.public); o != nil {
		return o, nil
	}
	d.makeRoom()
	o, err := d.kept(k.name, k.handle)
	if o != nil || err != nil {
		return o, err
	}
	if o, _, err = d.primary(k.template); err != nil {
		return nil, err
	}
	if !bytes.Equal(o.name.Buffer, k.name.Buffer) {
		have := o.name.Buffer
		d.flush(o)
		return nil, &enclave.Error{Kind: enclave.ErrReplaced, Detail: "the TPM makes another key of the machine's template: " + hex.EncodeToString(have),
			Remedy: "bring back the TPM with which the machine was registered, or adopt the new identity (kmsctl machine adopt) and register the machine again"}
	}
	kept, err := d.keep(o)
	if err == nil {
		d.flush(o)
		return kept, nil
	}
	if d.link == nil { // o went with the connection
		return nil, err
	}
	// It cannot be kept, so it lasts as long as this connection.
	d.hot = append([]hotKey{{k.public, o}}, d.hot...)
	return o, nil
}

// primary makes the key of a template. The caller flushes it.
func (d *device) primary(t template) (*object, *rsa.PublicKey, error) {
	public, err := t.public()
	if err != nil {
		return nil, nil, err
	}
	d.makeRoom()
	answer, err := tpm2.CreatePrimary{
		PrimaryHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHEndorsement, Auth: tpm2.PasswordAuth(nil)},
		InPublic:      tpm2.New2B(public),
	}.Execute(d)
	switch {
	case isOneOf(err, tpm2.TPMRCBadAuth, tpm2.TPMRCAuthFail):
		return nil, nil, &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: "the endorsement hierarchy of the TPM has a password", Cause: err,
			Remedy: "remove it (tpm2_changeauth -c endorsement); MOSIP's client needs it to be empty as well"}
	case isOneOf(err, tpm2.TPMRCHierarchy):
		return nil, nil, &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: "the endorsement hierarchy of the TPM is switched off", Cause: err,
			Remedy: "enable it in the firmware"}
	case isOneOf(err, tpm2.TPMRCValue, tpm2.TPMRCKeySize, tpm2.TPMRCScheme, tpm2.TPMRCAsymmetric, tpm2.TPMRCHash):
		return nil, nil, &enclave.Error{Kind: enclave.ErrUnsupported, Detail: "this TPM does not make keys of MOSIP's template", Cause: err}
	case err != nil:
		return nil, nil, err
	}
	o := &object{handle: answer.ObjectHandle}
	if err := o.describe(answer.OutPublic); err != nil {
		d.flush(o)
		return nil, nil, err
	}
	key, err := t.check(o.public)
	if err != nil {
		d.flush(o)
		return nil, nil, err
	}
	return o, key, nil
}

// kept returns the object of this name that is kept in the TPM, nil if none is. It looks under hint first.
func (d *device) kept(name tpm2.TPM2BName, hint tpm2.TPMHandle) (*object, error) {
	look := func(h tpm2.TPMHandle) (*object, error) {
		answer, err := tpm2.ReadPublic{ObjectHandle: h}.Execute(d)
		if isOneOf(err, tpm2.TPMRCHandle) {
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
		o := &object{handle: h}
		if err := o.describe(answer.OutPublic); err != nil || !bytes.Equal(o.name.Buffer, name.Buffer) {
			return nil, nil
		}
		return o, nil
	}
	if hint != 0 {
		if o, err := look(hint); o != nil || err != nil {
			return o, err
		}
	}
	handles, err := d.machineHandles()
	if err != nil {
		return nil, err
	}
	for _, h := range handles {
		if o, err := look(h); o != nil || err != nil {
			return o, err
		}
	}
	return nil, nil
}

// machineHandles lists which of the handles for machines' keys are taken.
func (d *device) machineHandles() ([]tpm2.TPMHandle, error) {
	answer, err := tpm2.GetCapability{Capability: tpm2.TPMCapHandles, Property: uint32(machineFirst), PropertyCount: machineHandles}.Execute(d)
	if err != nil {
		return nil, err
	}
	list, err := answer.CapabilityData.Data.Handles()
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(list.Handle, func(h tpm2.TPMHandle) bool { return !isMachineHandle(h) }), nil
}

// keep has the TPM keep a transient object, and returns the kept one.
func (d *device) keep(o *object) (*object, error) {
	taken, err := d.machineHandles()
	if err != nil {
		return nil, err
	}
	for h := machineFirst; h < machineFirst+machineHandles; h++ {
		if slices.Contains(taken, h) {
			continue
		}
		if err := d.evict(o, h); err != nil {
			return nil, err
		}
		return &object{handle: h, name: o.name, public: o.public}, nil
	}
	return nil, &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: "all handles for machines' keys are taken",
		Remedy: "remove those that nobody uses any more (tpm2_getcap handles-persistent, tpm2_evictcontrol)"}
}

// evict has a transient object kept under a handle, or a kept one removed from it (TPM 2.0 part 3 section 28.5).
func (d *device) evict(o *object, h tpm2.TPMHandle) error {
	_, err := tpm2.EvictControl{
		Auth:             tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: d.ownerSession()},
		ObjectHandle:     &tpm2.NamedHandle{Handle: o.handle, Name: o.name},
		PersistentHandle: h,
	}.Execute(d)
	if isOneOf(err, tpm2.TPMRCBadAuth, tpm2.TPMRCAuthFail) {
		return otherOwner(err)
	}
	return err
}

// destroyMachine has the TPM keep the key no longer. The key itself cannot be destroyed: the template makes it again.
func (t *TPM) destroyMachine(ctx context.Context, b enclave.Blob) error {
	k, _, err := decodeMachine(bytes.Clone(b))
	if err != nil {
		return err
	}
	_, err = call(ctx, t, func(d *device) (struct{}, error) {
		o, err := d.kept(k.name, k.handle)
		if err == nil && o != nil {
			err = d.evict(o, o.handle)
		}
		return struct{}{}, err
	})
	return err
}
