package mosipdb

import (
	"encoding/base64"
	"fmt"
	"strings"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// encodedPrefix begins the segment that stands for a reference which no key name may have.
const encodedPrefix = "b64u:"

// KeyName returns the name in kmsd of a key of MOSIP. The application is the first segment, and the reference the rest, as it is. A
// reference that a name cannot hold, such as one with a blank, becomes "b64u:" and its base64url; so does one that begins with "b64u:"
// itself, so that Reference finds the way back. An application that is no segment, and a reference that is too long, are refused.
func KeyName(application, reference string) (keyspec.Name, error) {
	if strings.Contains(application, "/") {
		return "", fmt.Errorf("%w: application %.64q", keyspec.ErrName, application)
	}
	if _, err := keyspec.ParseName(application); err != nil {
		return "", err
	}
	if reference == "" {
		return keyspec.Name(application), nil
	}
	if !strings.HasPrefix(reference, encodedPrefix) {
		if n, err := keyspec.ParseName(application + "/" + reference); err == nil {
			return n, nil
		}
	}
	return keyspec.ParseName(application + "/" + encodedPrefix + base64.RawURLEncoding.EncodeToString([]byte(reference)))
}

// Reference is the way back from KeyName.
func Reference(name keyspec.Name) (application, reference string, err error) {
	application, reference, _ = strings.Cut(string(name), "/")
	encoded, ok := strings.CutPrefix(reference, encodedPrefix)
	if !ok {
		return application, reference, nil
	}
	b, err := base64.RawURLEncoding.Strict().DecodeString(encoded)
	if err != nil {
		return "", "", fmt.Errorf("%w: %q", keyspec.ErrName, name)
	}
	return application, string(b), nil
}
