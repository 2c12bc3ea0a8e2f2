package tpm

import (
	"context"
	"crypto"
	_ "crypto/sha256" // linked in for crypto.Hash
	_ "crypto/sha512"
	"errors"

	"github.com/google/go-tpm/tpm2"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// algorithm is how a TPM makes and uses one kind of key.
type algorithm struct {
	name  keyspec.Algorithm
	bits  tpm2.TPMIRSAKeyBits // RSA
	curve tpm2.TPMECCCurve    // ECDSA and ECDH
	agree bool                // ECDH
	mac   tpm2.TPMIAlgHash    // HMAC
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
	{name: keyspec.HMACSHA256, mac: tpm2.TPMAlgSHA256},
	{name: keyspec.HMACSHA384, mac: tpm2.TPMAlgSHA384},
	{name: keyspec.HMACSHA512, mac: tpm2.TPMAlgSHA512},
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

// template is the public area of a key for these usages. It names no scheme, so that each operation may name its own, but for HMAC keys:
// with the hash the TPM knows how long to make them.
func (a algorithm) template(usages []keyspec.Usage) (tpm2.TPMTPublic, error) {
	p := tpm2.TPMTPublic{NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, UserWithAuth: true, NoDA: true}}
	for _, u := range usages {
		switch {
		case u == keyspec.Verify && !a.agree, u == keyspec.Encrypt && a.bits != 0, u == keyspec.Wrap && a.bits != 0:
			// needs only the public half
		case (u == keyspec.Sign || u == keyspec.Certify) && !a.agree && a.mac == 0, u == keyspec.MAC && a.mac != 0:
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
	switch {
	case a.mac != 0:
		p.Type = tpm2.TPMAlgKeyedHash
		p.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgKeyedHash, &tpm2.TPMSKeyedHashParms{Scheme: tpm2.TPMTKeyedHashScheme{
			Scheme: tpm2.TPMAlgHMAC, Details: tpm2.NewTPMUSchemeKeyedHash(tpm2.TPMAlgHMAC, &tpm2.TPMSSchemeHMAC{HashAlg: a.mac})}})
	case a.bits != 0:
		p.Type = tpm2.TPMAlgRSA
		p.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgRSA, &tpm2.TPMSRSAParms{KeyBits: a.bits})
	default:
		p.Type = tpm2.TPMAlgECC
		p.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{CurveID: a.curve})
	}
	return p, nil
}

// Mechanisms asks the TPM which algorithms, key sizes, curves and hashes it has.
func (t *TPM) Mechanisms(ctx context.Context) ([]enclave.Mechanism, error) {
	return call(ctx, t, func(d *device) ([]enclave.Mechanism, error) {
		var list []enclave.Mechanism
		has, err := d.algorithms()
		if err != nil {
			return nil, err
		}
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
					if !s.fits(a) || (s.alg == tpm2.TPMAlgOAEP) != (u == keyspec.Decrypt) {
						continue
					}
					if has[tpm2.TPMAlgID(s.id)] && has[s.alg] {
						m.Schemes = append(m.Schemes, s.name)
					}
				}
				if len(m.Schemes) > 0 || u == keyspec.Agree || u == keyspec.MAC {
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
	case a.mac != 0:
		return []keyspec.Usage{keyspec.MAC}
	case a.bits != 0:
		return []keyspec.Usage{keyspec.Sign, keyspec.Decrypt}
	}
	return []keyspec.Usage{keyspec.Sign}
}

// algorithms asks the TPM for all that it has.
func (d *device) algorithms() (map[tpm2.TPMAlgID]bool, error) {
	has := make(map[tpm2.TPMAlgID]bool)
	for next := uint32(0); ; {
		answer, err := tpm2.GetCapability{Capability: tpm2.TPMCapAlgs, Property: next, PropertyCount: 254}.Execute(d)
		if err != nil {
			return nil, err
		}
		list, err := answer.CapabilityData.Data.Algorithms()
		if err != nil {
			return nil, err
		}
		for _, p := range list.AlgProperties {
			has[p.Alg] = true
			next = max(next, uint32(p.Alg)+1)
		}
		if !answer.MoreData || len(list.AlgProperties) == 0 {
			return has, nil
		}
	}
}
