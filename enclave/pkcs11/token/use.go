//go:build cgo

package token

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"slices"

	"github.com/miekg/pkcs11"
	"golang.org/x/crypto/cryptobyte"
	casn1 "golang.org/x/crypto/cryptobyte/asn1"

	"github.com/kmsd-project/kmsd/client/pkix"
	"github.com/kmsd-project/kmsd/enclave"
	driver "github.com/kmsd-project/kmsd/enclave/pkcs11"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// use is one operation with a key, checked as far as that goes without the token.
type use struct {
	algorithm algorithm
	public    crypto.PublicKey // nil for symmetric keys
	scheme    scheme
	input     []byte // message, digest, ciphertext or point
	nonce     []byte
	aad       []byte
	do        func(c *connection, s pkcs11.SessionHandle, h pkcs11.ObjectHandle) ([]byte, error)
}

// errDecryption is the same for every cause, so that it answers no questions about the padding (RFC 8017 section 7.1.2).
func errDecryption() error { return &enclave.Error{Kind: enclave.ErrDecryption} }

func newUse(a algorithm, k *driver.Key, op enclave.Op) (*use, error) {
	usage := privateUsage(a, op.Usage)
	if !slices.Contains(a.usages, usage) {
		return nil, unsupported("%s with a %s key in a token", op.Usage, a.name)
	}
	u := &use{algorithm: a, input: op.Input, nonce: op.Nonce, aad: op.AAD}
	var err error
	if a.class == pkcs11.CKO_PRIVATE_KEY {
		if u.public, err = pkix.ParsePublicKey(k.SPKI); err != nil {
			return nil, &enclave.Error{Kind: enclave.ErrCorrupt, Detail: "public key", Cause: err}
		}
	}
	switch usage {
	case keyspec.Sign:
		u.do = u.sign
		if u.scheme, err = schemeOf(a, usage, op.Scheme); err == nil {
			u.input, err = u.digest(op)
		}
	case keyspec.MAC:
		u.do = u.mac
		if op.Digest {
			err = unsupported("a MAC over a digest")
		}
	case keyspec.Agree:
		u.do = u.agree
		u.input, err = peerPoint(op.Input, u.public)
	case keyspec.Encrypt:
		u.do = u.encrypt
		err = checkNonce(op.Nonce)
	case keyspec.Decrypt:
		if !a.isRSA() {
			u.do = u.decrypt
			err = checkNonce(op.Nonce)
			break
		}
		u.do = u.decryptRSA
		if u.scheme, err = schemeOf(a, usage, op.Scheme); err == nil {
			err = u.checkCiphertext()
		}
	}
	return u, err
}

func checkNonce(nonce []byte) error {
	if len(nonce) != driver.NonceSize {
		return unsupported("nonce of %d bytes", len(nonce))
	}
	return nil
}

func (u *use) digest(op enclave.Op) ([]byte, error) {
	if u.scheme.hash == 0 {
		if op.Digest {
			return nil, unsupported("a digest for %s", u.scheme.name)
		}
		return op.Input, nil
	}
	digest := op.Input
	if !op.Digest {
		h := u.scheme.hash.New()
		h.Write(op.Input)
		digest = h.Sum(nil)
	}
	if len(digest) != u.scheme.hash.Size() {
		return nil, unsupported("digest of %d bytes for %s", len(digest), u.scheme.name)
	}
	return digest, nil
}

// sign makes a signature.
//
// Invariant: a signature that does not verify is not returned. A fault in the token could give the private key away (Boneh, DeMillo,
// Lipton 1997).
func (u *use) sign(c *connection, s pkcs11.SessionHandle, h pkcs11.ObjectHandle) ([]byte, error) {
	var params any
	input := u.input
	switch u.scheme.mechanism {
	case pkcs11.CKM_RSA_PKCS_PSS:
		params = pkcs11.NewPSSParams(u.scheme.hashID, u.scheme.mgf, uint(u.scheme.hash.Size()))
	case pkcs11.CKM_RSA_PKCS:
		input = append([]byte(u.scheme.prefix), input...)
	case pkcs11.CKM_ECDSA:
		input = input[:min(len(input), (int(u.algorithm.bits)+7)/8)] // FIPS 186-5 section 6.4.1; not every token shortens
	}
	if err := c.module.SignInit(s, mechanism(u.scheme.mechanism, params), h); err != nil {
		return nil, err
	}
	signature, err := c.module.Sign(s, input)
	if err != nil {
		return nil, err
	}
	if u.scheme.mechanism == pkcs11.CKM_ECDSA {
		signature = derOf(signature)
	}
	if !u.verify(signature) {
		c.forgetHandles() // it may be another key's by now
		return nil, &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: fmt.Sprintf("the token made a %s signature that does not verify", u.scheme.name)}
	}
	return signature, nil
}

func (u *use) verify(signature []byte) bool {
	switch k := u.public.(type) {
	case *ecdsa.PublicKey:
		return ecdsa.VerifyASN1(k, u.input, signature)
	case ed25519.PublicKey:
		return ed25519.Verify(k, u.input, signature)
	case *rsa.PublicKey:
		if u.scheme.mechanism == pkcs11.CKM_RSA_PKCS_PSS {
			return rsa.VerifyPSS(k, u.scheme.hash, u.input, signature, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash}) == nil
		}
		return rsa.VerifyPKCS1v15(k, u.scheme.hash, u.input, signature) == nil
	}
	return false
}

// derOf makes the DER of an ECDSA signature (RFC 3279 section 2.2.3) out of r and s, which are of one length.
func derOf(raw []byte) []byte {
	var r, s big.Int
	r.SetBytes(raw[:len(raw)/2])
	s.SetBytes(raw[len(raw)/2:])
	b := cryptobyte.NewBuilder(nil)
	b.AddASN1(casn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1BigInt(&r)
		b.AddASN1BigInt(&s)
	})
	der, err := b.Bytes()
	if err != nil {
		return nil
	}
	return der
}

func (u *use) mac(c *connection, s pkcs11.SessionHandle, h pkcs11.ObjectHandle) ([]byte, error) {
	if err := c.module.SignInit(s, mechanism(u.algorithm.use[0], nil), h); err != nil {
		return nil, err
	}
	mac, err := c.module.Sign(s, u.input)
	if err == nil && len(mac) != int(u.algorithm.bits)/8 {
		err = &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: fmt.Sprintf("the token made a %s of %d bytes", u.algorithm.name, len(mac))}
	}
	return mac, err
}

func (u *use) encrypt(c *connection, s pkcs11.SessionHandle, h pkcs11.ObjectHandle) ([]byte, error) {
	return c.seal(s, h, u.nonce, u.input, u.aad)
}

func (u *use) decrypt(c *connection, s pkcs11.SessionHandle, h pkcs11.ObjectHandle) ([]byte, error) {
	plaintext, err := c.open(s, h, u.nonce, u.input, u.aad)
	if errors.Is(err, errRefused) {
		err = errDecryption()
	}
	return plaintext, err
}

// checkCiphertext refuses what is no number below the modulus, as the token would, in its own words.
func (u *use) checkCiphertext() error {
	k, ok := u.public.(*rsa.PublicKey)
	if !ok {
		return corrupt("public key")
	}
	if len(u.input) != k.Size() || new(big.Int).SetBytes(u.input).Cmp(k.N) >= 0 {
		return errDecryption()
	}
	return nil
}

// decryptRSA decrypts by RSAES-OAEP with SHA-256, in the token where it can do that. SoftHSM 2.6 cannot: it knows SHA-1 only. Then the
// token does raw RSA, and the padding is taken off here.
//
// Invariant: what raw RSA gives does not leave this function; only a message with good padding does.
func (u *use) decryptRSA(c *connection, s pkcs11.SessionHandle, h pkcs11.ObjectHandle) ([]byte, error) {
	if !c.lacksOAEP.Load() {
		params := pkcs11.NewOAEPParams(u.scheme.hashID, u.scheme.mgf, pkcs11.CKZ_DATA_SPECIFIED, u.aad)
		err := c.module.DecryptInit(s, mechanism(pkcs11.CKM_RSA_PKCS_OAEP, params), h)
		if err == nil {
			message, err := c.module.Decrypt(s, u.input)
			if err == nil {
				return message, nil
			}
			if !isOneOf(err, pkcs11.CKR_MECHANISM_INVALID, pkcs11.CKR_MECHANISM_PARAM_INVALID, pkcs11.CKR_FUNCTION_NOT_SUPPORTED) { // it says so late
				return nil, c.decryptionFailed(err)
			}
		} else if !isUnable(err) {
			return nil, err
		}
	}
	if err := c.module.DecryptInit(s, mechanism(pkcs11.CKM_RSA_X_509, nil), h); err != nil {
		return nil, err
	}
	c.lacksOAEP.Store(true) // the key may decrypt, so it was the padding
	raw, err := c.module.Decrypt(s, u.input)
	if err != nil {
		return nil, c.decryptionFailed(err)
	}
	defer clear(raw)
	em := make([]byte, len(u.input))
	defer clear(em)
	if len(raw) > len(em) {
		return nil, &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: "the token's raw RSA gives more than the modulus"}
	}
	copy(em[len(em)-len(raw):], raw) // some tokens leave zeros in front away
	message, ok := unpadOAEP(em, u.aad)
	if !ok {
		return nil, errDecryption()
	}
	return bytes.Clone(message), nil
}

// decryptionFailed is the error after a token has answered to a ciphertext with err.
func (c *connection) decryptionFailed(err error) error {
	if err = c.refused(err); errors.Is(err, errRefused) {
		return errDecryption()
	}
	return err
}

func (u *use) agree(c *connection, s pkcs11.SessionHandle, h pkcs11.ObjectHandle) ([]byte, error) {
	return c.derive(s, h, u.input)
}

// derive agrees with the owner of an uncompressed point and returns the x coordinate, as long as the field (PKCS#11 2.40 current
// mechanisms section 2.3.8; SP 800-56A section 5.7.1.2). The secret is an object of the session for the moment it takes to read it.
func (c *connection) derive(s pkcs11.SessionHandle, h pkcs11.ObjectHandle, point []byte) ([]byte, error) {
	size := (len(point) - 1) / 2
	template := []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY),
		pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_GENERIC_SECRET),
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false),
		pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, false),
		pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, true),
		pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, size),
	}
	params := pkcs11.NewECDH1DeriveParams(pkcs11.CKD_NULL, nil, point)
	derived, err := c.module.DeriveKey(s, mechanism(pkcs11.CKM_ECDH1_DERIVE, params), h, template)
	if isOneOf(err, pkcs11.CKR_ARGUMENTS_BAD, pkcs11.CKR_MECHANISM_PARAM_INVALID, pkcs11.CKR_DATA_INVALID, pkcs11.CKR_GENERAL_ERROR, pkcs11.CKR_FUNCTION_FAILED) {
		// Some tokens want the point in DER, which the standard lets them want besides.
		wrapped, e := asn1.Marshal(point)
		if e != nil {
			return nil, e
		}
		params = pkcs11.NewECDH1DeriveParams(pkcs11.CKD_NULL, nil, wrapped)
		derived, err = c.module.DeriveKey(s, mechanism(pkcs11.CKM_ECDH1_DERIVE, params), h, template)
	}
	if err != nil {
		return nil, err
	}
	got, err := c.module.GetAttributeValue(s, derived, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_VALUE, nil)})
	if e := c.module.DestroyObject(s, derived); err == nil {
		err = e
	}
	if err != nil {
		return nil, err
	}
	value := got[0].Value
	defer clear(value)
	if len(value) == 0 || len(value) > size {
		return nil, &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: fmt.Sprintf("the token agrees on %d bytes", len(value))}
	}
	x := make([]byte, size)
	copy(x[size-len(value):], value)
	return x, nil
}

// peerPoint is the uncompressed point of a peer's public key, which is on our curve; the parser sees to that.
func peerPoint(spki []byte, ours crypto.PublicKey) ([]byte, error) {
	mine, ok := ours.(*ecdsa.PublicKey)
	if !ok {
		return nil, corrupt("public key")
	}
	k, err := pkix.ParsePublicKey(spki)
	if err != nil {
		return nil, &enclave.Error{Kind: enclave.ErrUnsupported, Detail: "public key of the peer", Cause: err}
	}
	if peer, ok := k.(*ecdsa.PublicKey); ok && peer.Curve == mine.Curve {
		return peer.Bytes()
	}
	return nil, unsupported("the public key of the peer is on another curve")
}
