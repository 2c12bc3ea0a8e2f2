package pki

import (
	"crypto"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/x509"
	"fmt"
	"slices"
	"time"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// Profile says what a certificate allows and for how long.
type Profile struct {
	NotBefore, NotAfter time.Time       // both needed, the second after the first; whole seconds are kept
	CA                  bool            // may sign certificates
	PathLen             int             // for a CA: how many CAs may follow it; negative: as many as the issuer leaves
	KeyUsage            []string        // RFC 5280 section 4.2.1.3 names (digitalSignature, ...); empty: what key and usages imply
	ExtKeyUsage         []string        // server-auth, client-auth, code-signing, email, time-stamping, ocsp-signing
	Usages              []keyspec.Usage // of the key; empty: unknown, as for the key of a request
}

// keyUsage is a bit of RFC 5280 section 4.2.1.3 and the usages of which a key needs one to live up to it.
type keyUsage struct {
	name  string
	bit   x509.KeyUsage
	needs []keyspec.Usage
}

var keyUsages = []keyUsage{
	{"digitalSignature", x509.KeyUsageDigitalSignature, []keyspec.Usage{keyspec.Sign}},
	{"contentCommitment", x509.KeyUsageContentCommitment, []keyspec.Usage{keyspec.Sign}},
	{"keyEncipherment", x509.KeyUsageKeyEncipherment, []keyspec.Usage{keyspec.Decrypt, keyspec.Unwrap}},
	{"dataEncipherment", x509.KeyUsageDataEncipherment, []keyspec.Usage{keyspec.Decrypt}},
	{"keyAgreement", x509.KeyUsageKeyAgreement, []keyspec.Usage{keyspec.Agree}},
	{"keyCertSign", x509.KeyUsageCertSign, []keyspec.Usage{keyspec.Certify}},
	{"cRLSign", x509.KeyUsageCRLSign, []keyspec.Usage{keyspec.Certify}},
}

func (u keyUsage) metBy(usages []keyspec.Usage) bool {
	return slices.ContainsFunc(u.needs, func(n keyspec.Usage) bool { return slices.Contains(usages, n) })
}

var extKeyUsages = map[string]x509.ExtKeyUsage{
	"server-auth":   x509.ExtKeyUsageServerAuth,
	"client-auth":   x509.ExtKeyUsageClientAuth,
	"code-signing":  x509.ExtKeyUsageCodeSigning,
	"email":         x509.ExtKeyUsageEmailProtection,
	"time-stamping": x509.ExtKeyUsageTimeStamping,
	"ocsp-signing":  x509.ExtKeyUsageOCSPSigning,
}

const (
	signatureBits  = x509.KeyUsageDigitalSignature | x509.KeyUsageContentCommitment | x509.KeyUsageCertSign | x509.KeyUsageCRLSign
	encryptionBits = x509.KeyUsageKeyEncipherment | x509.KeyUsageDataEncipherment
	authorityBits  = x509.KeyUsageCertSign | x509.KeyUsageCRLSign
)

// possible returns the bits that a kind of key can have: RFC 3279 section 2.3.1 for RSA, RFC 5480 section 3 for EC, where one
// key type serves signatures and key agreement, RFC 8410 section 5 for Ed25519 and X25519.
func possible(public crypto.PublicKey) x509.KeyUsage {
	switch public.(type) {
	case *rsa.PublicKey:
		return signatureBits | encryptionBits
	case *ecdsa.PublicKey:
		return signatureBits | x509.KeyUsageKeyAgreement
	case *ecdh.PublicKey:
		return x509.KeyUsageKeyAgreement
	}
	return signatureBits
}

// keyUsage returns the bits of a certificate for public. Errors wrap ErrProfile.
func (p Profile) keyUsage(public crypto.PublicKey) (x509.KeyUsage, error) {
	var asked x509.KeyUsage
	for _, name := range p.KeyUsage {
		i := slices.IndexFunc(keyUsages, func(u keyUsage) bool {
			return u.name == name || name == "nonRepudiation" && u.name == "contentCommitment"
		})
		if i < 0 {
			return 0, fmt.Errorf("%w: unknown key usage %q", ErrProfile, name)
		}
		asked |= keyUsages[i].bit
	}
	if asked == 0 {
		asked = p.impliedUsage(public)
	}
	if asked == 0 || asked&^possible(public) != 0 {
		return 0, fmt.Errorf("%w: the kind of key cannot have this key usage", ErrProfile)
	}
	for _, u := range keyUsages {
		if asked&u.bit != 0 && len(p.Usages) > 0 && !u.metBy(p.Usages) {
			return 0, fmt.Errorf("%w: %s promises what the key may not do: it needs usage %s", ErrProfile, u.name, u.needs[0])
		}
	}
	if p.CA != (asked&x509.KeyUsageCertSign != 0) {
		return 0, fmt.Errorf("%w: keyCertSign and CA go together (RFC 5280 section 4.2.1.9)", ErrProfile)
	}
	return asked, nil
}

// impliedUsage returns the bits for a profile that names none.
func (p Profile) impliedUsage(public crypto.PublicKey) x509.KeyUsage {
	can := possible(public)
	if p.CA {
		bits := authorityBits
		if len(p.Usages) == 0 || slices.Contains(p.Usages, keyspec.Sign) {
			bits |= x509.KeyUsageDigitalSignature
		}
		return bits & can
	}
	if len(p.Usages) == 0 {
		if can&x509.KeyUsageDigitalSignature != 0 {
			return can & (x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment)
		}
		return can
	}
	var bits x509.KeyUsage
	for _, u := range keyUsages {
		if u.bit == x509.KeyUsageContentCommitment || u.bit == x509.KeyUsageDataEncipherment || u.bit&authorityBits != 0 {
			continue
		}
		if u.metBy(p.Usages) {
			bits |= u.bit
		}
	}
	return bits & can
}

func (p Profile) extKeyUsage() ([]x509.ExtKeyUsage, error) {
	var usages []x509.ExtKeyUsage
	for _, name := range p.ExtKeyUsage {
		usage, ok := extKeyUsages[name]
		if !ok || slices.Contains(usages, usage) {
			return nil, fmt.Errorf("%w: unknown or repeated extended key usage %q", ErrProfile, name)
		}
		usages = append(usages, usage)
	}
	return usages, nil
}

// lastTime is the latest time a certificate can hold (RFC 5280 section 4.1.2.5).
var lastTime = time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC)

// validity returns the times of a certificate. Errors wrap ErrProfile.
func (p Profile) validity() (notBefore, notAfter time.Time, err error) {
	notBefore, notAfter = p.NotBefore.UTC().Truncate(time.Second), p.NotAfter.UTC().Truncate(time.Second)
	if p.NotBefore.IsZero() || !notAfter.After(notBefore) || notBefore.Year() < 1950 || notAfter.After(lastTime) {
		return notBefore, notAfter, fmt.Errorf("%w: not-after comes after not-before, and before the year 10000", ErrProfile)
	}
	return notBefore, notAfter, nil
}
