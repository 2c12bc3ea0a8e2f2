//go:build cgo

package token

import (
	"context"
	"crypto"
	"crypto/elliptic"
	_ "crypto/sha256" // linked in for crypto.Hash
	_ "crypto/sha512"
	"slices"

	"github.com/ThalesIgnite/crypto11"
	"github.com/miekg/pkcs11"

	"github.com/kmsd-project/kmsd/client/pkix"
	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// Edwards curves came with PKCS#11 3.0; miekg/pkcs11 has the names of 2.40 only.
const (
	ckmEdwardsKeyPairGen = 0x1055 // CKM_EC_EDWARDS_KEY_PAIR_GEN
	ckmEdDSA             = 0x1057 // CKM_EDDSA
)

// algorithm is how a token makes and uses one kind of key.
type algorithm struct {
	name     keyspec.Algorithm
	class    uint            // of the object with the secret
	bits     uint            // of an RSA modulus, a curve or a symmetric key
	curve    elliptic.Curve  // of ECDSA and ECDH
	generate uint            // mechanism
	use      []uint          // mechanisms, of which one is enough
	usages   []keyspec.Usage // that need the secret
}

var algorithms = []algorithm{
	rsaAlgorithm(keyspec.RSA2048, 2048),
	rsaAlgorithm(keyspec.RSA3072, 3072),
	rsaAlgorithm(keyspec.RSA4096, 4096),
	ecAlgorithm(keyspec.ECDSAP256, elliptic.P256(), pkcs11.CKM_ECDSA, keyspec.Sign),
	ecAlgorithm(keyspec.ECDSAP384, elliptic.P384(), pkcs11.CKM_ECDSA, keyspec.Sign),
	ecAlgorithm(keyspec.ECDSAP521, elliptic.P521(), pkcs11.CKM_ECDSA, keyspec.Sign),
	ecAlgorithm(keyspec.ECDSASecp256k1, pkix.Secp256k1(), pkcs11.CKM_ECDSA, keyspec.Sign),
	{name: keyspec.Ed25519, class: pkcs11.CKO_PRIVATE_KEY, generate: ckmEdwardsKeyPairGen, use: []uint{ckmEdDSA}, usages: []keyspec.Usage{keyspec.Sign}},
	ecAlgorithm(keyspec.ECDHP256, elliptic.P256(), pkcs11.CKM_ECDH1_DERIVE, keyspec.Agree),
	ecAlgorithm(keyspec.ECDHP384, elliptic.P384(), pkcs11.CKM_ECDH1_DERIVE, keyspec.Agree),
	ecAlgorithm(keyspec.ECDHP521, elliptic.P521(), pkcs11.CKM_ECDH1_DERIVE, keyspec.Agree),
	aesAlgorithm(keyspec.AES128GCM, 128),
	aesAlgorithm(keyspec.AES256GCM, 256),
	macAlgorithm(keyspec.HMACSHA256, 256, pkcs11.CKM_SHA256_HMAC),
	macAlgorithm(keyspec.HMACSHA384, 384, pkcs11.CKM_SHA384_HMAC),
	macAlgorithm(keyspec.HMACSHA512, 512, pkcs11.CKM_SHA512_HMAC),
}

func rsaAlgorithm(name keyspec.Algorithm, bits uint) algorithm {
	return algorithm{name: name, class: pkcs11.CKO_PRIVATE_KEY, bits: bits, generate: pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN,
		use:    []uint{pkcs11.CKM_RSA_PKCS, pkcs11.CKM_RSA_PKCS_PSS, pkcs11.CKM_RSA_X_509, pkcs11.CKM_RSA_PKCS_OAEP},
		usages: []keyspec.Usage{keyspec.Sign, keyspec.Decrypt}}
}

func ecAlgorithm(name keyspec.Algorithm, curve elliptic.Curve, use uint, usage keyspec.Usage) algorithm {
	return algorithm{name: name, class: pkcs11.CKO_PRIVATE_KEY, bits: uint(curve.Params().BitSize), curve: curve,
		generate: pkcs11.CKM_EC_KEY_PAIR_GEN, use: []uint{use}, usages: []keyspec.Usage{usage}}
}

func aesAlgorithm(name keyspec.Algorithm, bits uint) algorithm {
	return algorithm{name: name, class: pkcs11.CKO_SECRET_KEY, bits: bits, generate: pkcs11.CKM_AES_KEY_GEN, use: []uint{pkcs11.CKM_AES_GCM},
		usages: []keyspec.Usage{keyspec.Encrypt, keyspec.Decrypt}}
}

func macAlgorithm(name keyspec.Algorithm, bits, use uint) algorithm {
	return algorithm{name: name, class: pkcs11.CKO_SECRET_KEY, bits: bits, generate: pkcs11.CKM_GENERIC_SECRET_KEY_GEN, use: []uint{use},
		usages: []keyspec.Usage{keyspec.MAC}}
}

func algorithmOf(name keyspec.Algorithm) (algorithm, error) {
	for _, a := range algorithms {
		if a.name == name {
			return a, nil
		}
	}
	return algorithm{}, unsupported("a token has no keys of algorithm %q", string(name))
}

func (a algorithm) isRSA() bool { return a.generate == pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN }

// scheme is a signature scheme or a decryption in the token's words.
type scheme struct {
	name      keyspec.Scheme
	mechanism uint
	hash      crypto.Hash
	hashID    uint   // CKM_... of the hash
	mgf       uint   // CKG_... of MGF1
	prefix    string // of the digest, in EMSA-PKCS1-v1_5 (RFC 8017 section 9.2 note 1)
}

const (
	prefixSHA256 = "\x30\x31\x30\x0d\x06\x09\x60\x86\x48\x01\x65\x03\x04\x02\x01\x05\x00\x04\x20"
	prefixSHA384 = "\x30\x41\x30\x0d\x06\x09\x60\x86\x48\x01\x65\x03\x04\x02\x02\x05\x00\x04\x30"
	prefixSHA512 = "\x30\x51\x30\x0d\x06\x09\x60\x86\x48\x01\x65\x03\x04\x02\x03\x05\x00\x04\x40"
)

var schemes = []scheme{
	{keyspec.RSAPSSSHA256, pkcs11.CKM_RSA_PKCS_PSS, crypto.SHA256, pkcs11.CKM_SHA256, pkcs11.CKG_MGF1_SHA256, ""},
	{keyspec.RSAPSSSHA384, pkcs11.CKM_RSA_PKCS_PSS, crypto.SHA384, pkcs11.CKM_SHA384, pkcs11.CKG_MGF1_SHA384, ""},
	{keyspec.RSAPSSSHA512, pkcs11.CKM_RSA_PKCS_PSS, crypto.SHA512, pkcs11.CKM_SHA512, pkcs11.CKG_MGF1_SHA512, ""},
	{keyspec.RSAPKCS1SHA256, pkcs11.CKM_RSA_PKCS, crypto.SHA256, 0, 0, prefixSHA256},
	{keyspec.RSAPKCS1SHA384, pkcs11.CKM_RSA_PKCS, crypto.SHA384, 0, 0, prefixSHA384},
	{keyspec.RSAPKCS1SHA512, pkcs11.CKM_RSA_PKCS, crypto.SHA512, 0, 0, prefixSHA512},
	{keyspec.RSAOAEPSHA256, pkcs11.CKM_RSA_PKCS_OAEP, crypto.SHA256, pkcs11.CKM_SHA256, pkcs11.CKG_MGF1_SHA256, ""},
	{keyspec.ECDSASHA256, pkcs11.CKM_ECDSA, crypto.SHA256, 0, 0, ""},
	{keyspec.ECDSASHA384, pkcs11.CKM_ECDSA, crypto.SHA384, 0, 0, ""},
	{keyspec.ECDSASHA512, pkcs11.CKM_ECDSA, crypto.SHA512, 0, 0, ""},
	{keyspec.PureEd25519, ckmEdDSA, 0, 0, 0, ""},
}

// fits reports whether keys of a are used by s for u.
func (s scheme) fits(a algorithm, u keyspec.Usage) bool {
	if a.name == keyspec.ECDSASecp256k1 && s.name != keyspec.ECDSASHA256 {
		return false // RFC 8812 section 3.2
	}
	return slices.Contains(a.use, s.mechanism) && (s.mechanism == pkcs11.CKM_RSA_PKCS_OAEP) == (u == keyspec.Decrypt)
}

// schemeOf finds a scheme for signing or decrypting; the empty name is the default of the algorithm.
func schemeOf(a algorithm, u keyspec.Usage, name keyspec.Scheme) (scheme, error) {
	if name == "" {
		if name = a.name.SignatureScheme(); u == keyspec.Decrypt {
			name = keyspec.RSAOAEPSHA256
		}
	}
	for _, s := range schemes {
		if s.name == name && s.fits(a, u) {
			return s, nil
		}
	}
	return scheme{}, unsupported("%s with scheme %q", a.name, string(name))
}

// attributes is what a key for these usages may do in the token.
func (a algorithm) attributes(usages []keyspec.Usage) ([]crypto11.AttributeType, error) {
	var may []crypto11.AttributeType
	for _, u := range usages {
		var attribute crypto11.AttributeType
		switch {
		case u == keyspec.Verify && slices.Contains(a.usages, keyspec.Sign), (u == keyspec.Encrypt || u == keyspec.Wrap) && a.isRSA():
			continue // needs only the public half
		case (u == keyspec.Sign || u == keyspec.Certify) && slices.Contains(a.usages, keyspec.Sign):
			attribute = crypto11.CkaSign
		case (u == keyspec.MAC || u == keyspec.Verify) && slices.Contains(a.usages, keyspec.MAC):
			attribute = crypto11.CkaSign // a MAC is verified by making it again
		case u == keyspec.Decrypt && slices.Contains(a.usages, keyspec.Decrypt), u == keyspec.Unwrap && a.isRSA():
			attribute = crypto11.CkaDecrypt
		case u == keyspec.Encrypt && slices.Contains(a.usages, keyspec.Encrypt):
			attribute = crypto11.CkaEncrypt
		case u == keyspec.Agree && slices.Contains(a.usages, keyspec.Agree):
			attribute = crypto11.CkaDerive
		default:
			return nil, unsupported("%s keys of a token for %s", a.name, u)
		}
		if !slices.Contains(may, attribute) {
			may = append(may, attribute)
		}
	}
	if len(may) == 0 {
		return nil, unsupported("%s keys of a token without a use of their secret", a.name)
	}
	return may, nil
}

// Mechanisms asks the token for its mechanisms and their key sizes.
func (t *Token) Mechanisms(ctx context.Context) ([]enclave.Mechanism, error) {
	var list []enclave.Mechanism
	err := t.do(ctx, func(c *connection, _ pkcs11.SessionHandle) error {
		list = nil
		all, err := c.module.GetMechanismList(c.slot)
		if err != nil {
			return err
		}
		has := map[uint]bool{}
		for _, m := range all {
			has[m.Mechanism] = true
		}
		for _, a := range algorithms {
			if !has[a.generate] {
				continue
			}
			fits, err := c.sizeFits(a)
			if err != nil {
				return err
			}
			if fits {
				list = append(list, a.mechanisms(has)...)
			}
		}
		return nil
	})
	return list, err
}

// sizeFits asks the token how large keys of this kind are. Sizes are in bits for RSA and curves, in bytes or not meant seriously for
// symmetric keys.
func (c *connection) sizeFits(a algorithm) (bool, error) {
	if a.class != pkcs11.CKO_PRIVATE_KEY || a.bits == 0 {
		return true, nil
	}
	info, err := c.module.GetMechanismInfo(c.slot, mechanism(a.generate, nil))
	if err != nil {
		return false, err
	}
	return info.MinKeySize <= a.bits && a.bits <= info.MaxKeySize, nil
}

// mechanisms lists what a token with these mechanisms can do with keys of a.
func (a algorithm) mechanisms(has map[uint]bool) []enclave.Mechanism {
	var list []enclave.Mechanism
	for _, u := range a.usages {
		m := enclave.Mechanism{Algorithm: a.name, Usage: u}
		if u != keyspec.Sign && !a.isRSA() {
			if has[a.use[0]] {
				list = append(list, m)
			}
			continue
		}
		for _, s := range schemes {
			// Where a token has no OAEP, raw RSA and our own unpadding do.
			if s.fits(a, u) && (has[s.mechanism] || s.mechanism == pkcs11.CKM_RSA_PKCS_OAEP && has[pkcs11.CKM_RSA_X_509]) {
				m.Schemes = append(m.Schemes, s.name)
			}
		}
		if len(m.Schemes) > 0 {
			list = append(list, m)
		}
	}
	return list
}
