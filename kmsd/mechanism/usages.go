package mechanism

import (
	"fmt"
	"slices"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// ProfileMOSIPModule is the closed profile of the module keys of a MOSIP hierarchy: one RSA key that certifies base keys
// and unwraps them. It is the only way to have an RSA key that both signs and decrypts.
const ProfileMOSIPModule = "mosip-module"

// ProfileMOSIPMachine is the closed profile of the two keys of a registration machine of MOSIP. Each of them either signs or decrypts like
// every RSA key, but where the machine kept its key in a file, both are the same RSA key, as MOSIP has it.
const ProfileMOSIPMachine = "mosip-machine"

var mosipModule = []keyspec.Usage{keyspec.Sign, keyspec.Verify, keyspec.Certify, keyspec.Unwrap}

// purposes are the sets of usages that exclude each other: a key has usages of one set only.
//
// RSA, because a signature is a decryption of chosen bytes (NIST SP 800-57 part 1 section 5.2). AES, because a key that may
// decrypt what it wrapped would give wrapped keys away, and because AES-GCM and AES-KWP must not share a key.
var purposes = [][]keyspec.Usage{certifying, encrypting, wrapping}

var purposesRSA = [][]keyspec.Usage{certifying, decrypting}

// SchemesFor returns the schemes of the algorithm that a key with these usages can be put to, the default first.
func (r *Row) SchemesFor(usages []keyspec.Usage) []keyspec.Scheme {
	has := func(set []keyspec.Usage) bool {
		return slices.ContainsFunc(usages, func(u keyspec.Usage) bool { return slices.Contains(set, u) })
	}
	signs, decrypts := has(certifying), has(decrypting)
	return slices.DeleteFunc(slices.Clone(r.Schemes), func(s keyspec.Scheme) bool {
		if s == keyspec.RSAOAEPSHA256 {
			return !decrypts
		}
		return !signs
	})
}

// ValidateUsages reports whether a key of algorithm a may have the usages, under the profile ("" for none). Errors wrap
// ErrUsages or keyspec.ErrAlgorithm. A set must not be empty nor name a usage twice.
func ValidateUsages(a keyspec.Algorithm, usages []keyspec.Usage, profile string) error {
	row, err := Lookup(a)
	if err != nil {
		return err
	}
	if len(usages) == 0 {
		return fmt.Errorf("%w: a key needs at least one usage", ErrUsages)
	}
	for i, u := range usages {
		if !slices.Contains(row.Usages, u) {
			return fmt.Errorf("%w: %s cannot %q", ErrUsages, a, string(u))
		}
		if slices.Contains(usages[:i], u) {
			return fmt.Errorf("%w: %q is named twice", ErrUsages, string(u))
		}
	}
	switch profile {
	case "":
	case ProfileMOSIPModule:
		if row.Kind != KindRSA || !subset(usages, mosipModule) {
			return fmt.Errorf("%w: profile %s is for RSA keys that sign, verify, certify and unwrap", ErrUsages, profile)
		}
		return nil
	case ProfileMOSIPMachine:
		if a != keyspec.RSA2048 {
			return fmt.Errorf("%w: profile %s is for RSA keys of 2048 bits", ErrUsages, profile)
		}
	default:
		return fmt.Errorf("%w: unknown profile %q", ErrUsages, profile)
	}
	var exclusive [][]keyspec.Usage
	switch row.Kind {
	case KindRSA:
		exclusive = purposesRSA
	case KindAEAD:
		exclusive = purposes
	default:
		return nil
	}
	for _, set := range exclusive {
		if subset(usages, set) {
			return nil
		}
	}
	if row.Kind == KindRSA {
		return fmt.Errorf("%w: an RSA key either signs or decrypts, never both", ErrUsages)
	}
	return fmt.Errorf("%w: an AES key either encrypts data or wraps keys, never both", ErrUsages)
}

// DefaultUsages returns the usages of a key whose creator names none, or an error that wraps keyspec.ErrAlgorithm or
// ErrUsages.
func DefaultUsages(a keyspec.Algorithm, profile string) ([]keyspec.Usage, error) {
	row, err := Lookup(a)
	if err != nil {
		return nil, err
	}
	usages := row.Default
	if profile == ProfileMOSIPModule {
		usages = mosipModule
	}
	return slices.Clone(usages), ValidateUsages(a, usages, profile)
}

func subset(usages, of []keyspec.Usage) bool {
	for _, u := range usages {
		if !slices.Contains(of, u) {
			return false
		}
	}
	return true
}
