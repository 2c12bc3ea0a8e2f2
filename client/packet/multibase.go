package packet

import (
	"encoding/base64"
	"fmt"
	"math/big"
	"slices"
	"strings"
)

// Encoding is how MOSIP writes a raw signature: multibase (draft-multiformats-multibase), with the names of its
// responseEncodingFormat.
type Encoding string

// The encodings, each with the character that such a text begins with.
const (
	Base58BTC Encoding = "base58btc" // z, MOSIP's default
	Base64URL Encoding = "base64url" // u, without padding
)

// maxMultibase bounds what is encoded, in bytes: base58 takes time in the square of the length. A signature of RSA-8192 has 1024.
const maxMultibase = 4096

// base58 are the digits of Base58BTC: those of Bitcoin.
const base58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"

// EncodeMultibase returns at most 4096 bytes as text.
func EncodeMultibase(e Encoding, b []byte) (string, error) {
	if len(b) > maxMultibase {
		return "", fmt.Errorf("%w: %d bytes in multibase, at most %d", ErrTooLarge, len(b), maxMultibase)
	}
	switch e {
	case Base58BTC:
		return "z" + encodeBase58(b), nil
	case Base64URL:
		return "u" + base64.RawURLEncoding.EncodeToString(b), nil
	}
	return "", fmt.Errorf("%w: encoding %q; %s or %s", ErrFormat, string(e), Base58BTC, Base64URL)
}

// DecodeMultibase is the way back, from either encoding. It reads what EncodeMultibase writes and nothing else.
func DecodeMultibase(text string) ([]byte, error) {
	if len(text) > 1+2*maxMultibase {
		return nil, fmt.Errorf("%w: %d characters of multibase", ErrTooLarge, len(text))
	}
	var b []byte
	var err error
	switch digits := text[min(1, len(text)):]; {
	case strings.HasPrefix(text, "z"):
		b, err = decodeBase58(digits)
	case strings.HasPrefix(text, "u") && !strings.ContainsAny(digits, "\r\n"): // which encoding/base64 would skip
		if b, err = base64.RawURLEncoding.Strict().DecodeString(digits); err != nil {
			err = fmt.Errorf("%w: no base64url after u", ErrFormat)
		}
	default:
		err = fmt.Errorf("%w: neither base58btc nor base64url in multibase", ErrFormat)
	}
	if err != nil {
		return nil, err
	}
	if len(b) > maxMultibase {
		return nil, fmt.Errorf("%w: %d bytes in multibase, at most %d", ErrTooLarge, len(b), maxMultibase)
	}
	return b, nil
}

// encodeBase58 writes b as a number to the base of 58, with a zero digit for each leading zero byte.
func encodeBase58(b []byte) string {
	n, base, digit := new(big.Int).SetBytes(b), big.NewInt(int64(len(base58))), new(big.Int)
	var reversed []byte
	for n.Sign() > 0 {
		n.DivMod(n, base, digit)
		reversed = append(reversed, base58[digit.Int64()])
	}
	for _, c := range b {
		if c != 0 {
			break
		}
		reversed = append(reversed, base58[0])
	}
	slices.Reverse(reversed)
	return string(reversed)
}

func decodeBase58(digits string) ([]byte, error) {
	n, base := new(big.Int), big.NewInt(int64(len(base58)))
	for _, c := range []byte(digits) {
		at := strings.IndexByte(base58, c)
		if at < 0 {
			return nil, fmt.Errorf("%w: no base58btc after z", ErrFormat)
		}
		n.Add(n.Mul(n, base), big.NewInt(int64(at)))
	}
	zeros := len(digits) - len(strings.TrimLeft(digits, base58[:1]))
	return append(make([]byte, zeros), n.Bytes()...), nil
}
