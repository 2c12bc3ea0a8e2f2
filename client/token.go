package client

import (
	"bytes"
	"context"
	"fmt"
	"strings"

	"github.com/kmsd-project/kmsd/client/jose"
	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

var (
	_ jose.Signer    = (*Key)(nil)
	_ jose.Unwrapper = (*Key)(nil)
)

// SignJWS makes a Key a [jose.Signer]: it signs the input of a JSON Web Signature, with ECDSA in the form that RFC 7518
// section 3.4 wants.
func (k *Key) SignJWS(ctx context.Context, a jose.Algorithm, input []byte) ([]byte, error) {
	p := &proto.Sign{Key: k.pinned, Scheme: string(SchemeOf(a))}
	if p.Scheme == "" {
		return nil, fmt.Errorf("%w: algorithm %q", ErrUnsupported, string(a))
	}
	message, digest, err := k.digest(bytes.NewReader(input), &p.Scheme)
	if err != nil {
		return nil, err
	}
	if strings.HasPrefix(p.Scheme, "ecdsa-") {
		p.Encoding = "p1363"
	}
	p.Data, p.Digest = message, digest
	return k.sign(ctx, p)
}

// SchemeOf returns the signature scheme of an algorithm of JOSE, or "". Its ECDSA signatures are r and s in fixed length.
func SchemeOf(a jose.Algorithm) keyspec.Scheme {
	switch a {
	case jose.EdDSA:
		return keyspec.PureEd25519
	case jose.ES256K:
		return keyspec.ECDSASHA256
	}
	family, known := map[string]string{"RS": "rsa-pkcs1-sha", "PS": "rsa-pss-sha", "ES": "ecdsa-sha"}[string(a[:min(2, len(a))])]
	if !known || a.Hash() == 0 {
		return ""
	}
	return keyspec.Scheme(family + string(a[2:]))
}
