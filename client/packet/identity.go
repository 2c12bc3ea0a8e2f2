package packet

import (
	"crypto/sha1"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"strings"
	"time"
)

// UniqueIdentifier is MOSIP's uni_ident of a key, in the upper-case hexadecimal of its database: SHA-1 over application,
// reference and the day of generation in UTC. It is a name, not a protection.
func UniqueIdentifier(application, reference string, generated time.Time) string {
	return uniqueIdentifier(application, reference, generated.UTC().Format("01-02-2006"))
}

// UniqueIdentifierOf is the one of a certificate that was made elsewhere: its thumbprint takes the place of the day.
func UniqueIdentifierOf(application, reference string, thumbprint [32]byte) string {
	return uniqueIdentifier(application, reference, ThumbprintText(thumbprint))
}

func uniqueIdentifier(application, reference, third string) string {
	sum := sha1.Sum([]byte(application + "_" + reference + "_" + third))
	return strings.ToUpper(hex.EncodeToString(sum[:]))
}

// KeyID is MOSIP's kid of a key: the SHA-256 of its unique identifier's 20 bytes, in base64url. It returns "" for what is
// no identifier.
func KeyID(uniqueIdentifier string) string {
	b, err := hex.DecodeString(uniqueIdentifier)
	if err != nil || len(b) != sha1.Size {
		return ""
	}
	sum := sha256.Sum256(b)
	return base64.RawURLEncoding.EncodeToString(sum[:])
}

// ThumbprintText is a thumbprint in the upper-case hexadecimal of MOSIP's database.
func ThumbprintText(thumbprint [32]byte) string {
	return strings.ToUpper(hex.EncodeToString(thumbprint[:]))
}

// KeyIndex is the name of a machine's key on the server: the SHA-256 of its public part, the TPMT_PUBLIC or the
// SubjectPublicKeyInfo, in lower-case hexadecimal with a colon between bytes, 95 characters.
func KeyIndex(public []byte) string {
	sum := sha256.Sum256(public)
	var b strings.Builder
	for i, c := range sum {
		if i > 0 {
			b.WriteByte(':')
		}
		b.WriteString(hex.EncodeToString([]byte{c}))
	}
	return b.String()
}
