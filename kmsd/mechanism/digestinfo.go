package mechanism

import (
	"bytes"
	"fmt"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// digestInfoPrefixes are the DER encodings of DigestInfo up to the digest (RFC 8017 section 9.2 note 1). The form whose
// AlgorithmIdentifier leaves the NULL out is not valid for these hashes.
var digestInfoPrefixes = []struct {
	scheme keyspec.Scheme
	prefix []byte
}{
	{keyspec.RSAPKCS1SHA256, []byte{0x30, 0x31, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x01, 0x05, 0x00, 0x04, 0x20}},
	{keyspec.RSAPKCS1SHA384, []byte{0x30, 0x41, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x02, 0x05, 0x00, 0x04, 0x30}},
	{keyspec.RSAPKCS1SHA512, []byte{0x30, 0x51, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x03, 0x05, 0x00, 0x04, 0x40}},
}

// ParseDigestInfo takes a DigestInfo apart, which PKCS#11 callers hand over with CKM_RSA_PKCS, and returns the PKCS#1 v1.5
// scheme it names and the digest, a part of der. There is exactly one accepted encoding for each hash. Errors wrap
// ErrInput.
func ParseDigestInfo(der []byte) (keyspec.Scheme, []byte, error) {
	for _, known := range digestInfoPrefixes {
		digest, found := bytes.CutPrefix(der, known.prefix)
		if found && len(digest) == Digest(known.scheme).Size() {
			return known.scheme, digest, nil
		}
	}
	return "", nil, fmt.Errorf("%w: not a DigestInfo of SHA-256, SHA-384 or SHA-512", ErrInput)
}
