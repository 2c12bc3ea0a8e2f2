package tpm

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rsa"
	_ "crypto/sha256" // linked in for crypto.Hash
	_ "crypto/sha512"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"

	"github.com/google/go-tpm/tpm2"
	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

const (
	labelKey   = "kmsd tpm key auth v1"
	labelCheck = "kmsd tpm key check v1"
)

// ErrDecryption says that a ciphertext does not decrypt under the key. It comes wrapped together with enclave.ErrCorrupt, and is the same
// for every cause, so that it answers no questions about the padding (RFC 8017 section 7.1.2).
var ErrDecryption = errors.New("the ciphertext does not decrypt under this key")

// Resident keys are kept outside the TPM, encrypted by it under its storage key; inside they are only during an operation. So their number
// is not limited, and nothing is lost when the TPM loses its volatile memory. The auth value of a key is derived from Spec.AAD: a blob that
// is moved to another record is refused by the TPM itself.

// algorithm is how a TPM makes and uses one kind of key.
type algorithm struct {
	name  keyspec.Algorithm
	bits  tpm2.TPMIRSAKeyBits // RSA
	curve tpm2.TPMECCCurve    // ECDSA and ECDH
	agree bool                // ECDH
}

var algorithms = []algorithm{
	{name: keyspec.RSA2048, bits: 2048},
	{name: keyspec.RSA3072, bits: 3072},
	{name: keyspec.RSA4096, bits: 4096},
	{name: keyspec.ECDSAP256, curve: tpm2.TPMECCNistP256},
	{name: keyspec.ECDSAP384, curve: tpm2.TPMECCNistP384},
	{name: keyspec.ECDSAP521, curve: tpm2.TPMECCNistP521},
	{name: keyspec.ECDHP256, curve: tpm2.TPMECCNistP256, agree: true},
	{name: keyspec.ECDHP384, curve: tpm2.TPMECCNistP384, agree: true},
	{name: keyspec.ECDHP521, curve: tpm2.TPMECCNistP521, agree: true},
}

func algorithmOf(name keyspec.Algorithm) (algorithm, error) {
	for _, a := range algorithms {
		if a.name == name {
			return a, nil
		}
	}
	return algorithm{}, unsupported("a TPM has no keys of algorithm %q", string(name))
}

// scheme is a signature scheme or a decryption in the TPM's words.
type scheme struct {
	name keyspec.Scheme
	alg  tpm2.TPMAlgID
	hash crypto.Hash
	id   tpm2.TPMIAlgHash
}

var schemes = []scheme{
	{keyspec.RSAPSSSHA256, tpm2.TPMAlgRSAPSS, crypto.SHA256, tpm2.TPMAlgSHA256},
	{keyspec.RSAPSSSHA384, tpm2.TPMAlgRSAPSS, crypto.SHA384, tpm2.TPMAlgSHA384},
	{keyspec.RSAPSSSHA512, tpm2.TPMAlgRSAPSS, crypto.SHA512, tpm2.TPMAlgSHA512},
	{keyspec.RSAPKCS1SHA256, tpm2.TPMAlgRSASSA, crypto.SHA256, tpm2.TPMAlgSHA256},
	{keyspec.RSAPKCS1SHA384, tpm2.TPMAlgRSASSA, crypto.SHA384, tpm2.TPMAlgSHA384},
	{keyspec.RSAPKCS1SHA512, tpm2.TPMAlgRSASSA, crypto.SHA512, tpm2.TPMAlgSHA512},
	{keyspec.RSAOAEPSHA256, tpm2.TPMAlgOAEP, crypto.SHA256, tpm2.TPMAlgSHA256},
	{keyspec.ECDSASHA256, tpm2.TPMAlgECDSA, crypto.SHA256, tpm2.TPMAlgSHA256},
	{keyspec.ECDSASHA384, tpm2.TPMAlgECDSA, crypto.SHA384, tpm2.TPMAlgSHA384},
	{keyspec.ECDSASHA512, tpm2.TPMAlgECDSA, crypto.SHA512, tpm2.TPMAlgSHA512},
}

// fits reports whether keys of a can be used by s.
func (s scheme) fits(a algorithm) bool {
	if s.alg == tpm2.TPMAlgECDSA {
		return a.curve != 0 && !a.agree
	}
	return a.bits != 0
}

// schemeOf finds a scheme for an operation; the empty name is the default of the algorithm.
func schemeOf(a algorithm, u keyspec.Usage, name keyspec.Scheme) (scheme, error) {
	if name == "" {
		switch {
		case u == keyspec.Decrypt || u == keyspec.Unwrap:
			name = keyspec.RSAOAEPSHA256
		case a.bits != 0:
			name = keyspec.RSAPSSSHA256
		case a.curve == tpm2.TPMECCNistP384:
			name = keyspec.ECDSASHA384
		case a.curve == tpm2.TPMECCNistP521:
			name = keyspec.ECDSASHA512
		default:
			name = keyspec.ECDSASHA256
		}
	}
	for _, s := range schemes {
		if s.name == name && s.fits(a) && (s.alg == tpm2.TPMAlgOAEP) == (u == keyspec.Decrypt || u == keyspec.Unwrap) {
			return s, nil
		}
	}
	return scheme{}, unsupported("%s with scheme %q", a.name, string(name))
}

// template is the public area of a key for these usages. It names no scheme, so that each operation may name its own.
func (a algorithm) template(usages []keyspec.Usage) (tpm2.TPMTPublic, error) {
	p := tpm2.TPMTPublic{NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, UserWithAuth: true, NoDA: true}}
	for _, u := range usages {
		switch {
		case u == keyspec.Verify && !a.agree, u == keyspec.Encrypt && a.bits != 0, u == keyspec.Wrap && a.bits != 0:
			// needs only the public half
		case (u == keyspec.Sign || u == keyspec.Certify) && !a.agree:
			p.ObjectAttributes.SignEncrypt = true
		case (u == keyspec.Decrypt || u == keyspec.Unwrap) && a.bits != 0, u == keyspec.Agree && a.agree:
			p.ObjectAttributes.Decrypt = true
		default:
			return p, unsupported("%s keys of a TPM for %s", a.name, u)
		}
	}
	if !p.ObjectAttributes.SignEncrypt && !p.ObjectAttributes.Decrypt {
		return p, unsupported("%s keys of a TPM without a use of their private half", a.name)
	}
	if a.bits != 0 {
		p.Type = tpm2.TPMAlgRSA
		p.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgRSA, &tpm2.TPMSRSAParms{KeyBits: a.bits})
	} else {
		p.Type = tpm2.TPMAlgECC
		p.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{CurveID: a.curve})
	}
	return p, nil
}

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
	defer clear(auth)
	made, err := call(ctx, t, func(d *device) (*created, error) {
		root, err := d.storageKey()
		if err != nil {
			return nil, err
		}
		made, err := d.create(root, template, bytes.Clone(auth), nil)
		if isOneOf(err, tpm2.TPMRCCurve, tpm2.TPMRCValue, tpm2.TPMRCKeySize, tpm2.TPMRCScheme, tpm2.TPMRCAsymmetric, tpm2.TPMRCHash) {
			return nil, &enclave.Error{Kind: enclave.ErrUnsupported, Detail: "this TPM does not make " + string(a.name) + " keys", Cause: err}
		}
		return made, err
	})
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
	if err != nil {
		return nil, err
	}
	return x509.MarshalPKIXPublicKey(p)
}

// Do performs one operation. Signatures are in DER for ECDSA; an agreement gives the x coordinate.
func (t *TPM) Do(ctx context.Context, b enclave.Blob, op enclave.Op, dst []byte) ([]byte, error) {
	if t.closed() {
		return nil, errClosed()
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
	auth := authValue(k.salt, labelKey, op.Bound)
	defer clear(auth)
	r := &use{key: k, public: public, input: bytes.Clone(op.Input), label: bytes.Clone(op.AAD)}
	var do func(d *device, root, o *object, auth []byte) ([]byte, error)
	switch op.Usage {
	case keyspec.Sign, keyspec.Certify:
		if !area.ObjectAttributes.SignEncrypt {
			return nil, unsupported("the key cannot sign")
		}
		if r.scheme, err = schemeOf(a, op.Usage, op.Scheme); err != nil {
			return nil, err
		}
		if !op.Digest {
			h := r.scheme.hash.New()
			h.Write(op.Input)
			r.input = h.Sum(nil)
		} else if len(op.Input) != r.scheme.hash.Size() {
			return nil, unsupported("digest of %d bytes for %s", len(op.Input), r.scheme.name)
		}
		do = r.sign
	case keyspec.Decrypt, keyspec.Unwrap:
		if !area.ObjectAttributes.Decrypt || a.bits == 0 {
			return nil, unsupported("the key cannot decrypt")
		}
		if r.scheme, err = schemeOf(a, op.Usage, op.Scheme); err != nil {
			return nil, err
		}
		// A TPM takes a label only with the zero at its end, and takes the zero into the hash (TPM 2.0 part 1 annex B.4).
		if n := len(r.label); n > 0 && bytes.IndexByte(r.label, 0) != n-1 {
			return nil, unsupported("OAEP label for a TPM that does not end in its only zero byte")
		}
		if size := int(a.bits / 8); len(op.Input) != size {
			return nil, corrupt("ciphertext", ErrDecryption)
		}
		do = r.decrypt
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
	result, err := call(ctx, t, func(d *device) ([]byte, error) { return d.withKey(k, bytes.Clone(auth), do) })
	if err != nil {
		return nil, err
	}
	defer clear(result)
	return append(dst[:0], result...), nil
}

func errOtherRecord(cause error) error { return corrupt("the key belongs to another record", cause) }

// withKey loads the key for one operation.
func (d *device) withKey(k *key, auth []byte, do func(d *device, root, o *object, auth []byte) ([]byte, error)) ([]byte, error) {
	defer clear(auth)
	root, err := d.storageKey()
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(root.name.Buffer, k.root) {
		return nil, replaced(k.root, root.name.Buffer)
	}
	o, err := d.load(root, k.public, k.private)
	if err != nil {
		return nil, err
	}
	defer d.flush(o)
	result, err := do(d, root, o, auth)
	if isOneOf(err, tpm2.TPMRCBadAuth, tpm2.TPMRCAuthFail) {
		return nil, errOtherRecord(err)
	}
	if isOneOf(err, tpm2.TPMRCLockout) { // imported keys
		return nil, d.lockedOut(err)
	}
	return result, err
}

// use is one operation with a key.
type use struct {
	key    *key
	public crypto.PublicKey
	scheme scheme
	input  []byte // digest, ciphertext or uncompressed point
	label  []byte
}

// sign does not salt its session: nothing in it is secret, and the auth value of 192 random bits authenticates both ways. That saves the
// TPM an operation that costs as much as the signature.
//
// Invariant: a signature that does not verify is not returned. A fault in the device could give the private key away (Boneh, DeMillo,
// Lipton 1997); and a TPM whose PSS salt has another length than the hash would make signatures that others refuse.
func (r *use) sign(d *device, _, o *object, auth []byte) ([]byte, error) {
	answer, err := tpm2.Sign{
		KeyHandle: o.with(tpm2.HMAC(tpm2.TPMAlgSHA256, nonceSize, tpm2.Auth(auth))),
		Digest:    tpm2.TPM2BDigest{Buffer: r.input},
		InScheme: tpm2.TPMTSigScheme{Scheme: r.scheme.alg,
			Details: tpm2.NewTPMUSigScheme(r.scheme.alg, &tpm2.TPMSSchemeHash{HashAlg: r.scheme.id})},
		Validation: tpm2.TPMTTKHashCheck{Tag: tpm2.TPMSTHashCheck},
	}.Execute(d)
	if isOneOf(err, tpm2.TPMRCScheme, tpm2.TPMRCHash, tpm2.TPMRCValue, tpm2.TPMRCSize) {
		return nil, &enclave.Error{Kind: enclave.ErrUnsupported, Detail: "this key in this TPM cannot do " + string(r.scheme.name), Cause: err}
	}
	if err != nil {
		return nil, err
	}
	signature, err := r.signature(answer.Signature)
	if err != nil {
		return nil, err
	}
	if !r.verify(signature) {
		return nil, &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: fmt.Sprintf("the TPM made a %s signature that does not verify", r.scheme.name)}
	}
	return signature, nil
}

func (r *use) signature(s tpm2.TPMTSignature) ([]byte, error) {
	switch r.scheme.alg {
	case tpm2.TPMAlgRSAPSS:
		p, err := s.Signature.RSAPSS()
		if err != nil {
			return nil, err
		}
		return p.Sig.Buffer, nil
	case tpm2.TPMAlgRSASSA:
		p, err := s.Signature.RSASSA()
		if err != nil {
			return nil, err
		}
		return p.Sig.Buffer, nil
	}
	p, err := s.Signature.ECDSA()
	if err != nil {
		return nil, err
	}
	b := cryptobyte.NewBuilder(nil)
	b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
		addInteger(b, p.SignatureR.Buffer)
		addInteger(b, p.SignatureS.Buffer)
	})
	return b.Bytes()
}

// addInteger adds a positive integer in DER, whose bytes may have zeros in front.
func addInteger(b *cryptobyte.Builder, n []byte) {
	n = bytes.TrimLeft(n, "\x00")
	b.AddASN1(asn1.INTEGER, func(b *cryptobyte.Builder) {
		if len(n) == 0 || n[0]&0x80 != 0 {
			b.AddUint8(0)
		}
		b.AddBytes(n)
	})
}

func (r *use) verify(signature []byte) bool {
	switch k := r.public.(type) {
	case *ecdsa.PublicKey:
		return ecdsa.VerifyASN1(k, r.input, signature)
	case *rsa.PublicKey:
		if r.scheme.alg == tpm2.TPMAlgRSAPSS {
			return rsa.VerifyPSS(k, r.scheme.hash, r.input, signature, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash}) == nil
		}
		return rsa.VerifyPKCS1v15(k, r.scheme.hash, r.input, signature) == nil
	}
	return false
}

func (r *use) decrypt(d *device, root, o *object, auth []byte) ([]byte, error) {
	answer, err := tpm2.RSADecrypt{
		KeyHandle:  o.with(tpm2.HMAC(tpm2.TPMAlgSHA256, nonceSize, salted(root, auth, encryptInOut)...)),
		CipherText: tpm2.TPM2BPublicKeyRSA{Buffer: r.input},
		InScheme: tpm2.TPMTRSADecrypt{Scheme: tpm2.TPMAlgOAEP,
			Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgOAEP, &tpm2.TPMSEncSchemeOAEP{HashAlg: r.scheme.id})},
		Label: tpm2.TPM2BData{Buffer: r.label},
	}.Execute(d)
	if isOneOf(err, tpm2.TPMRCScheme, tpm2.TPMRCHash) {
		return nil, &enclave.Error{Kind: enclave.ErrUnsupported, Detail: "this key in this TPM cannot do " + string(r.scheme.name), Cause: err}
	}
	if isOneOf(err, tpm2.TPMRCFailure) {
		// libtpms (0.9) says so about the padding too. A TPM that has really failed says so about everything.
		if _, really := (tpm2.ReadPublic{ObjectHandle: o.handle}).Execute(d); really == nil {
			err = tpm2.TPMRCValue
		}
	}
	if isOneOf(err, tpm2.TPMRCValue, tpm2.TPMRCSize) {
		return nil, corrupt("ciphertext", ErrDecryption)
	}
	if err != nil {
		return nil, err
	}
	return answer.Message.Buffer, nil
}

func (r *use) agree(d *device, root, o *object, auth []byte) ([]byte, error) {
	answer, err := tpm2.ECDHZGen{
		KeyHandle: o.with(tpm2.HMAC(tpm2.TPMAlgSHA256, nonceSize, salted(root, auth, encryptInOut)...)),
		InPoint:   tpm2.New2B(*pointOf(r.input)),
	}.Execute(d)
	if err != nil {
		return nil, err
	}
	return sharedX(answer.OutPoint, (len(r.input)-1)/2)
}

// peerPoint is the uncompressed point of a peer's public key, which is on our curve; the parser sees to that.
func peerPoint(spki []byte, ours crypto.PublicKey) ([]byte, error) {
	k, err := parsePublic(spki)
	if err != nil {
		return nil, &enclave.Error{Kind: enclave.ErrUnsupported, Detail: "public key of the peer", Cause: err}
	}
	mine, ok := ours.(*ecdsa.PublicKey)
	if !ok {
		return nil, corrupt("public area of the key", nil)
	}
	switch k := k.(type) {
	case *ecdsa.PublicKey:
		if k.Curve == mine.Curve {
			return k.Bytes()
		}
	case *ecdh.PublicKey:
		if p := mine.Curve; p == elliptic.P256() && k.Curve() == ecdh.P256() {
			return k.Bytes(), nil
		}
	}
	return nil, unsupported("the public key of the peer is on another curve")
}

// Destroy checks the blob. A TPM keeps nothing of a resident key: the key is gone with the last copy of its blob.
func (t *TPM) Destroy(_ context.Context, b enclave.Blob) error {
	_, err := decodeKey(b)
	return err
}

// MaxParallel is one: a TPM does one thing at a time.
func (t *TPM) MaxParallel() int { return 1 }

// Mechanisms asks the TPM which algorithms, key sizes, curves and hashes it has.
func (t *TPM) Mechanisms(ctx context.Context) ([]enclave.Mechanism, error) {
	return call(ctx, t, func(d *device) ([]enclave.Mechanism, error) {
		var list []enclave.Mechanism
		for _, a := range algorithms {
			template, err := a.template(a.usages())
			if err != nil {
				return nil, err
			}
			_, err = tpm2.TestParms{Parameters: tpm2.TPMTPublicParms{Type: template.Type, Parameters: template.Parameters}}.Execute(d)
			var rc tpm2.TPMRC
			if errors.As(err, &rc) && !rc.IsWarning() && !isReset(err) && !isOneOf(err, tpm2.TPMRCFailure) {
				continue
			}
			if err != nil {
				return nil, err
			}
			for _, u := range a.usages() {
				m := enclave.Mechanism{Algorithm: a.name, Usage: u}
				for _, s := range schemes {
					if !s.fits(a) || (s.alg == tpm2.TPMAlgOAEP) != (u == keyspec.Decrypt) || u == keyspec.Agree {
						continue
					}
					ok, err := d.has(tpm2.TPMAlgID(s.id), s.alg)
					if err != nil {
						return nil, err
					}
					if ok {
						m.Schemes = append(m.Schemes, s.name)
					}
				}
				if len(m.Schemes) > 0 || u == keyspec.Agree {
					list = append(list, m)
				}
			}
		}
		return list, nil
	})
}

// usages are those that need the private half.
func (a algorithm) usages() []keyspec.Usage {
	switch {
	case a.agree:
		return []keyspec.Usage{keyspec.Agree}
	case a.bits != 0:
		return []keyspec.Usage{keyspec.Sign, keyspec.Decrypt}
	}
	return []keyspec.Usage{keyspec.Sign}
}

// has reports whether the TPM has all the algorithms.
func (d *device) has(ids ...tpm2.TPMAlgID) (bool, error) {
	for _, id := range ids {
		answer, err := tpm2.GetCapability{Capability: tpm2.TPMCapAlgs, Property: uint32(id), PropertyCount: 1}.Execute(d)
		if err != nil {
			return false, err
		}
		list, err := answer.CapabilityData.Data.Algorithms()
		if err != nil {
			return false, err
		}
		if !slices.ContainsFunc(list.AlgProperties, func(p tpm2.TPMSAlgProperty) bool { return p.Alg == id }) {
			return false, nil
		}
	}
	return true, nil
}

var (
	_ enclave.Enclave  = (*TPM)(nil)
	_ enclave.Resident = (*TPM)(nil)
	_ enclave.Counter  = (*TPM)(nil)
)
