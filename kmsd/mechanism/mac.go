package mechanism

import (
	"crypto/hmac"
	"crypto/subtle"
	"hash"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// NewMAC returns a fresh HMAC state (RFC 2104, FIPS 198-1) of an HMAC key, for long messages. It is nil for other kinds
// and for resident keys.
func (k *Key) NewMAC() hash.Hash {
	if k.row.Kind != KindHMAC || k.device != nil {
		return nil
	}
	return hmac.New(k.row.hash.New, k.secret)
}

// MAC appends the HMAC of data, as long as the hash, to dst. Errors wrap ErrUnsupported.
func (k *Key) MAC(dst, data []byte) ([]byte, error) {
	if k.row.Kind != KindHMAC {
		return nil, k.unsupported("mac")
	}
	if k.device != nil {
		return k.do(dst, Request{Usage: keyspec.MAC, Input: data}, k.row.hash.Size())
	}
	state := k.idle.Swap(nil)
	if state == nil {
		state = &macState{k.NewMAC()}
	} else {
		state.Reset()
	}
	state.Write(data)
	dst = state.Sum(dst)
	k.idle.Store(state)
	return dst, nil
}

// VerifyMAC compares the HMAC of data with mac in constant time. A truncated MAC is refused. Errors wrap ErrVerification
// or ErrUnsupported.
func (k *Key) VerifyMAC(data, mac []byte) error {
	var space [64]byte
	want, err := k.MAC(space[:0], data)
	if err != nil {
		return err
	}
	if subtle.ConstantTimeCompare(want, mac) != 1 {
		return ErrVerification
	}
	return nil
}
