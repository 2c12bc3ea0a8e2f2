package tpm

import (
	"bytes"
	"crypto"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"fmt"

	"github.com/google/go-tpm/tpm2"
	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"

	"github.com/kmsd-project/kmsd/enclave"
)

// use is one operation with a key.
type use struct {
	key    *key
	public crypto.PublicKey
	scheme scheme
	input  []byte // digest, ciphertext or uncompressed point
	label  []byte
	hash   tpm2.TPMIAlgHash // of an HMAC key
}

// digest makes what is signed of the input of op.
func (r *use) digest(op *enclave.Op, hash crypto.Hash) error {
	if op.Digest {
		if len(op.Input) != hash.Size() {
			return unsupported("digest of %d bytes for %v", len(op.Input), hash)
		}
		return nil
	}
	h := hash.New()
	h.Write(op.Input)
	r.input = h.Sum(nil)
	return nil
}

// ciphertext checks what an RSA key of size bytes is to decrypt. A TPM takes a label only with the zero at its end, and takes the zero into
// the hash (TPM 2.0 part 1 annex B.4).
func (r *use) ciphertext(size int) error {
	if n := len(r.label); n > 0 && bytes.IndexByte(r.label, 0) != n-1 {
		return unsupported("OAEP label for a TPM that does not end in its only zero byte")
	}
	if len(r.input) != size {
		return errDecryption
	}
	return nil
}

// sign does not salt its session: nothing in it is secret, and the auth value of 192 random bits authenticates both ways. That saves the
// TPM an operation that costs as much as the signature. The key of a machine has no auth value: who is on the bus can have it sign anyway.
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
		return nil, errDecryption
	}
	if err != nil {
		return nil, err
	}
	return answer.Message.Buffer, nil
}

// maxBuffer is what every TPM takes as the data of one command, in bytes (TPM 2.0 part 2 section 10.4.8).
const maxBuffer = 1024

// mac hides what it is about on the bus: a MAC may be a key for its caller.
func (r *use) mac(d *device, root, o *object, auth []byte) ([]byte, error) {
	answer, err := tpm2.Hmac{
		Handle:  o.with(tpm2.HMAC(tpm2.TPMAlgSHA256, nonceSize, salted(root, auth, encryptInOut)...)),
		Buffer:  tpm2.TPM2BMaxBuffer{Buffer: r.input},
		HashAlg: r.hash,
	}.Execute(d)
	if err != nil {
		return nil, err
	}
	return answer.OutHMAC.Buffer, nil
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
