// Package mechanism implements the algorithms of kmsd: pure functions of key material and data.
//
// table.go has one row per algorithm. A row makes material, checks imported material, and loads material into a Key; a
// Key does the work. Material is the shortest canonical form of a private key, so that parsing it is the only way to
// a Key:
//
//	RSA              p || q, big-endian, each half the modulus, p > q; the exponent is 65537
//	ECDSA, ECDH      the scalar, big-endian, as long as the curve's order (32, 48, 66 bytes)
//	Ed25519, X25519  the 32-byte seed or scalar of RFC 8032 and RFC 7748
//	AES, ChaCha20    the raw key
//	HMAC, HKDF       the raw key, as long as the output of the hash
//
// The package does no input or output, keeps no state beside the constant table, and starts no goroutine. It does not
// decide what a key may be used for; ValidateUsages only says which sets of usages make sense for an algorithm. It
// does not choose nonces. Bytes that came from outside are bounded before they are parsed.
package mechanism

import "errors"

// Errors of this package. They are wrapped with a reason that never holds key or plaintext bytes.
var (
	// ErrVerification says that a signature is not right. There is one such error, whatever the cause.
	ErrVerification = errors.New("verification failed")

	// ErrDecryption says that a ciphertext or a wrapped key does not open. There is one such error, whatever the cause.
	ErrDecryption = errors.New("decryption failed")

	// ErrUnsupported says that this kind of key cannot do what was asked.
	ErrUnsupported = errors.New("operation not supported by this kind of key")

	// ErrInput says that the caller's bytes are malformed or have the wrong size.
	ErrInput = errors.New("invalid input")

	// ErrMaterial says that key material is malformed, weak or of another algorithm.
	ErrMaterial = errors.New("invalid key material")

	// ErrUsages says that a set of usages does not fit an algorithm.
	ErrUsages = errors.New("usages do not fit the algorithm")

	// ErrSelfTest says that a known-answer test gave another answer. The mechanism must not be used.
	ErrSelfTest = errors.New("self-test failed")
)
