package tpm

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"

	"github.com/google/go-tpm/tpm2"
	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"

	encoding "encoding/asn1"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// The file format of keys of a TPM that OpenSSL's tpm2 provider and others share ("ASN.1 Specification for TPM 2.0 Key Files",
// draft-bottomley-tpm2-keys), a PEM block with the type
const pemType = "TSS2 PRIVATE KEY"

const maxPEM = 16 << 10

// The types of key files.
var (
	oidLoadable   = encoding.ObjectIdentifier{2, 23, 133, 10, 1, 3}
	oidImportable = encoding.ObjectIdentifier{2, 23, 133, 10, 1, 4}
	oidSealed     = encoding.ObjectIdentifier{2, 23, 133, 10, 1, 5}
)

// The optional fields.
var (
	tagEmptyAuth   = asn1.Tag(0).Constructed().ContextSpecific()
	tagPolicy      = asn1.Tag(1).Constructed().ContextSpecific()
	tagSecret      = asn1.Tag(2).Constructed().ContextSpecific()
	tagAuthPolicy  = asn1.Tag(3).Constructed().ContextSpecific()
	tagDescription = asn1.Tag(4).Constructed().ContextSpecific()
	tagRSAParent   = asn1.Tag(5).Constructed().ContextSpecific()
)

// keyFile is a key file. Policies and the secret of importable keys are only noticed.
type keyFile struct {
	kind      encoding.ObjectIdentifier
	emptyAuth bool
	policy    bool
	secret    bool
	rsaParent bool
	parent    uint32
	public    []byte // content of TPM2B_PUBLIC
	private   []byte // content of TPM2B_PRIVATE
}

func (f *keyFile) marshal() ([]byte, error) {
	b := cryptobyte.NewBuilder(nil)
	b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1ObjectIdentifier(f.kind)
		// Also when it is false: OpenSSL's provider (1.1.1) takes an absent one for true.
		b.AddASN1(tagEmptyAuth, func(b *cryptobyte.Builder) { b.AddASN1Boolean(f.emptyAuth) })
		b.AddASN1Uint64(uint64(f.parent))
		for _, area := range [][]byte{f.public, f.private} {
			b.AddASN1(asn1.OCTET_STRING, func(b *cryptobyte.Builder) { addBytes16(b, area) })
		}
	})
	der, err := b.Bytes()
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: pemType, Bytes: der}), nil
}

func parseKeyFile(file []byte) (*keyFile, error) {
	if len(file) > maxPEM {
		return nil, errors.New("key file is too large")
	}
	block, _ := pem.Decode(file)
	if block == nil || block.Type != pemType {
		return nil, fmt.Errorf("no PEM block %q", pemType)
	}
	malformed := errors.New("key file is malformed")
	der, s := cryptobyte.String(block.Bytes), cryptobyte.String(nil)
	f := new(keyFile)
	if !der.ReadASN1(&s, asn1.SEQUENCE) || !der.Empty() || !s.ReadASN1ObjectIdentifier(&f.kind) {
		return nil, malformed
	}
	var ok bool
	if f.emptyAuth, ok = readOptionalBool(&s, tagEmptyAuth); !ok {
		return nil, malformed
	}
	var policy, authPolicy bool
	for _, field := range []struct {
		tag     asn1.Tag
		present *bool
	}{{tagPolicy, &policy}, {tagSecret, &f.secret}, {tagAuthPolicy, &authPolicy}, {tagDescription, new(bool)}} {
		var content cryptobyte.String
		if !s.ReadOptionalASN1(&content, field.present, field.tag) {
			return nil, malformed
		}
	}
	f.policy = policy || authPolicy
	if f.rsaParent, ok = readOptionalBool(&s, tagRSAParent); !ok {
		return nil, malformed
	}
	var parent int64 // the reference implementation writes handles as signed numbers of 32 bits or as what they are
	if !s.ReadASN1Integer(&parent) || parent != int64(uint32(parent)) && parent != int64(int32(parent)) {
		return nil, malformed
	}
	f.parent = uint32(parent)
	for _, area := range []*[]byte{&f.public, &f.private} {
		var sized, content cryptobyte.String
		if !s.ReadASN1(&sized, asn1.OCTET_STRING) || !sized.ReadUint16LengthPrefixed(&content) || !sized.Empty() || badArea(content) {
			return nil, malformed
		}
		*area = content
	}
	if !s.Empty() {
		return nil, malformed
	}
	return f, nil
}

// readOptionalBool reads an explicitly tagged boolean. It is not cryptobyte's, which takes only DER's 0xff for true.
func readOptionalBool(s *cryptobyte.String, tag asn1.Tag) (value, ok bool) {
	var content, b cryptobyte.String
	var present bool
	if !s.ReadOptionalASN1(&content, &present, tag) {
		return false, false
	}
	if !present {
		return false, true
	}
	if !content.ReadASN1(&b, asn1.BOOLEAN) || len(b) != 1 || !content.Empty() {
		return false, false
	}
	return b[0] != 0, true
}

// Export writes a resident key as a key file, together with the password that the file asks for. Both are of use on this TPM only. The
// file and its password are a second way to the key, around policy and audit.
func Export(b enclave.Blob, bound []byte) (file, password []byte, err error) {
	k, err := decodeKey(b)
	if err != nil {
		return nil, nil, err
	}
	f := &keyFile{kind: oidLoadable, parent: uint32(tpm2.TPMRHOwner), public: k.public, private: k.private}
	if file, err = f.marshal(); err != nil {
		return nil, nil, err
	}
	return file, authValue(k.salt, labelKey, bound), nil
}

// Import takes over a key file whose key was made by this TPM under its storage key, and whose password is given, nil for none. The
// algorithm may be left empty. The file and its password still work afterwards: a TPM cannot revoke them.
//
// The keys of OpenSSL's provider are under the protection against dictionary attacks: the TPM counts a loss of power after their use as a
// wrong password.
//
// Only keys that never were anywhere else are taken, since that is what a resident key is for.
func (t *TPM) Import(ctx context.Context, file, password []byte, s enclave.Spec) (enclave.Blob, []byte, error) {
	refuse := func(format string, args ...any) (enclave.Blob, []byte, error) {
		return nil, nil, unsupported("key file: "+format, args...)
	}
	f, err := parseKeyFile(file)
	if err != nil {
		return refuse("%v", err)
	}
	switch {
	case f.kind.Equal(oidImportable):
		return refuse("the key was made outside of a TPM")
	case f.kind.Equal(oidSealed):
		return refuse("sealed data, not a key")
	case !f.kind.Equal(oidLoadable):
		return refuse("type %v", f.kind)
	case f.policy || f.secret:
		return refuse("keys with a policy are not supported")
	case f.parent != uint32(tpm2.TPMRHOwner) || f.rsaParent:
		return refuse("the parent is not the ECC storage key of the owner hierarchy")
	case len(password) > authSize || bytes.IndexByte(password, 0) >= 0:
		return refuse("a password has at most %d bytes, none of them zero", authSize)
	case len(s.AAD) > enclave.MaxAAD:
		return refuse("associated data of %d bytes", len(s.AAD))
	}
	k := &key{salt: newSalt(), public: bytes.Clone(f.public)}
	k.check = bind(k.salt, labelCheck, s.AAD)[:checkSize]
	area, public, err := k.area()
	if err != nil {
		return refuse("%v", err)
	}
	if k.algorithm, err = algorithmOfKey(public, area, s.Usages); err != nil {
		return nil, nil, err
	}
	if s.Algorithm != "" && s.Algorithm != k.algorithm {
		return refuse("it holds a key of %s", k.algorithm)
	}
	a, err := algorithmOf(k.algorithm)
	if err != nil {
		return nil, nil, err
	}
	want, err := a.template(s.Usages)
	if err != nil {
		return nil, nil, err
	}
	have := area.ObjectAttributes
	if !have.FixedTPM || !have.FixedParent || !have.SensitiveDataOrigin || !have.UserWithAuth || have.Restricted || len(area.AuthPolicy.Buffer) > 0 ||
		want.ObjectAttributes.SignEncrypt && !have.SignEncrypt || want.ObjectAttributes.Decrypt && !have.Decrypt {
		return refuse("the attributes of the key do not allow it")
	}
	old, auth := bytes.Clone(password), authValue(k.salt, labelKey, s.AAD)
	made, err := call(ctx, t, func(d *device) (*created, error) {
		return d.changeAuth(k.public, f.private, old, auth, !have.NoDA)
	}, old, auth)
	if err != nil {
		return nil, nil, err
	}
	k.root, k.private = made.root, made.private
	spki, err := k.spki()
	if err != nil {
		return nil, nil, err
	}
	blob, err := k.encode()
	return blob, spki, err
}

// changeAuth encrypts a key anew with another auth value.
func (d *device) changeAuth(public, private, old, auth []byte, counted bool) (*created, error) {
	root, err := d.storageKey()
	if err != nil {
		return nil, err
	}
	o, err := d.load(root, public, private)
	if err != nil {
		return nil, err
	}
	defer d.flush(o)
	d.job.attempted = counted
	answer, err := tpm2.ObjectChangeAuth{
		ObjectHandle: o.with(tpm2.HMAC(tpm2.TPMAlgSHA256, nonceSize, salted(root, old, encryptIn)...)),
		ParentHandle: tpm2.NamedHandle{Handle: root.handle, Name: root.name},
		NewAuth:      tpm2.TPM2BAuth{Buffer: auth},
	}.Execute(d)
	if isOneOf(err, tpm2.TPMRCBadAuth, tpm2.TPMRCAuthFail) {
		return nil, &enclave.Error{Kind: enclave.ErrAuth, Detail: "password of the key file", Cause: err}
	}
	if err != nil {
		return nil, err
	}
	return &created{root: bytes.Clone(root.name.Buffer), private: bytes.Clone(answer.OutPrivate.Buffer)}, nil
}

// algorithmOfKey finds the algorithm of a key that is to have these usages.
func algorithmOfKey(public crypto.PublicKey, area *tpm2.TPMTPublic, usages []keyspec.Usage) (keyspec.Algorithm, error) {
	for _, a := range algorithms {
		switch p := public.(type) {
		case *rsa.PublicKey:
			if int(a.bits) == p.N.BitLen() {
				return a.name, nil
			}
		case *ecdsa.PublicKey:
			if curveOf(a.curve) == p.Curve && a.agree == slices.Contains(usages, keyspec.Agree) {
				return a.name, nil
			}
		}
	}
	return "", unsupported("keys of type %#x", uint16(area.Type))
}
