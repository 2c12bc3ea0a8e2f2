package jose

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"encoding/asn1"
	"fmt"
	"math/big"
	"strings"
)

// KeySigner is a [Signer] by a key that is somewhere else than in kmsd, behind a crypto.Signer.
type KeySigner struct{ crypto.Signer }

// SignJWS signs the input of a token. RSASSA-PSS has a salt as long as the hash, and a signature by ECDSA is r and s one after the other
// (RFC 7518 sections 3.4 and 3.5).
func (k KeySigner) SignJWS(_ context.Context, a Algorithm, input []byte) ([]byte, error) {
	digest := input
	if a.Hash() != 0 {
		h := a.Hash().New()
		h.Write(input)
		digest = h.Sum(nil)
	}
	switch public := k.Public().(type) {
	case *ecdsa.PublicKey:
		der, err := k.Sign(rand.Reader, digest, a.Hash())
		if err != nil {
			return nil, err
		}
		var signature struct{ R, S *big.Int }
		if rest, err := asn1.Unmarshal(der, &signature); err != nil || len(rest) > 0 {
			return nil, fmt.Errorf("%w: the key's signature is not one of ECDSA", ErrUnsupported)
		}
		size := (public.Curve.Params().BitSize + 7) / 8
		if n := 8 * size; signature.R.Sign() <= 0 || signature.S.Sign() <= 0 || signature.R.BitLen() > n || signature.S.BitLen() > n {
			return nil, fmt.Errorf("%w: the key's signature is not one of its curve", ErrUnsupported)
		}
		return append(signature.R.FillBytes(make([]byte, size)), signature.S.FillBytes(make([]byte, size))...), nil
	case *rsa.PublicKey:
		if strings.HasPrefix(string(a), "PS") {
			return k.Sign(rand.Reader, digest, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: a.Hash()})
		}
	}
	return k.Sign(rand.Reader, digest, a.Hash())
}
