// Package cose reads and writes COSE_Sign1 messages (RFC 9052 section 4.2) and CBOR Web Tokens (RFC 8392), as far as MOSIP and
// what surrounds it use them. It is a pure codec: the private key is behind a [jose.Signer], which for keys in kmsd is a
// client.Key. The algorithms of COSE (RFC 9053 section 2, RFC 8230, RFC 8812) are those of JOSE, and so are the signatures that
// they make; they go by the names of package jose.
//
// # Security
//
// A signature is checked with a key that the caller gives, never with one that the message brings along: x5chain, kid and the
// like are handed to the caller, who decides what to believe. The algorithm is taken from the protected header alone, and has to
// fit the key, so a message cannot choose another one.
//
// Invariant: no two readers can take a message for different ones. Maps with duplicate keys are refused, and so are items of
// indefinite length, labels that are in both headers, critical labels that are not understood, and bytes after the end.
//
// Invariant: no map or array is built before its encoding is known to be within the bounds below.
package cose

import (
	"encoding/hex"
	"errors"
	"fmt"

	"github.com/kmsd-project/kmsd/client/jose"
)

// Errors of this package. They are wrapped with what was wrong.
var (
	ErrFormat       = errors.New("not a COSE_Sign1 message")
	ErrUnsupported  = errors.New("unsupported COSE feature")
	ErrVerification = errors.New("the signature does not verify")
	ErrTooLarge     = errors.New("COSE message too large")
	ErrClaims       = errors.New("the token is not the one that is expected")
	ErrExpired      = errors.New("the token has expired")
	ErrNotYetValid  = errors.New("the token is not valid yet")
)

// Bounds in bytes.
const (
	MaxPayload   = jose.MaxPayload
	MaxClaims    = 1 << 20
	maxHeader    = 128 << 10 // each of the two
	maxSignature = 1 << 10
	maxMessage   = MaxPayload + 2*maxHeader + maxSignature + 64
)

// Bounds in numbers.
const (
	maxChain    = 16   // certificates
	maxNesting  = 32   // maps and arrays in each other
	maxElements = 4096 // of one map or array
)

// The algorithms by their numbers (IANA registry "COSE Algorithms").
var algorithms = map[int64]jose.Algorithm{
	-7: jose.ES256, -35: jose.ES384, -36: jose.ES512, -47: jose.ES256K, -8: jose.EdDSA,
	-37: jose.PS256, -38: jose.PS384, -39: jose.PS512,
	-257: jose.RS256, -258: jose.RS384, -259: jose.RS512,
}

// number returns the number of an algorithm.
func number(a jose.Algorithm) (int64, error) {
	for n, name := range algorithms {
		if name == a {
			return n, nil
		}
	}
	return 0, fmt.Errorf("%w: algorithm %q", ErrUnsupported, string(a))
}

// EncodeHex returns a message in the lower-case hexadecimal in which MOSIP hands it out.
func EncodeHex(message []byte) string {
	return hex.EncodeToString(message)
}

// DecodeHex is the way back. It reads both cases, as MOSIP does.
func DecodeHex(text string) ([]byte, error) {
	if len(text) > 2*maxMessage {
		return nil, fmt.Errorf("%w: %d digits", ErrTooLarge, len(text))
	}
	b, err := hex.DecodeString(text)
	if err != nil {
		return nil, fmt.Errorf("%w: not hexadecimal", ErrFormat)
	}
	return b, nil
}
