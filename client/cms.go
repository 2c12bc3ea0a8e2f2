package client

import (
	"context"
	"crypto"
	"errors"
	"io"

	"github.com/kmsd-project/kmsd/client/cms"
)

// SignCMS signs everything that content gives with a key, and returns a detached CMS signature in DER with the chain of the key's certificate
// (see package cms). The content is hashed in this process.
func (c *Client) SignCMS(ctx context.Context, ref string, content io.Reader, o cms.Options) ([]byte, error) {
	k, chain, err := c.signerOf(ctx, ref, &SignToken{Chain: true, NoKeyID: true})
	if err != nil {
		return nil, err
	}
	return cms.Sign(&contextSigner{ctx, k}, chain, content, o)
}

// contextSigner is a Key as a crypto.Signer of one call.
type contextSigner struct {
	ctx context.Context
	key *Key
}

func (s *contextSigner) Public() crypto.PublicKey { return s.key.Public() }

func (s *contextSigner) Sign(_ io.Reader, digest []byte, o crypto.SignerOpts) ([]byte, error) {
	return s.key.SignContext(s.ctx, digest, o)
}

// VerifyCMS verifies a detached CMS signature over everything that content gives. Who has to have signed is said as for tokens; the verdict has no
// payload. The error is about the question, or about what is no CMS signature at all, or is that of content.
func (c *Client) VerifyCMS(ctx context.Context, signature []byte, content io.Reader, o VerifyToken) (*Verdict, error) {
	v := new(Verdict)
	s, err := cms.Parse(signature)
	if errors.Is(err, cms.ErrVerification) {
		return v.finish(err)
	}
	if err != nil {
		return nil, err
	}
	v.CMS = s
	var chain [][]byte
	for _, certificate := range s.Chain {
		chain = append(chain, certificate.Raw)
	}
	// There is a certificate always, and its key is the one that the signature is verified with.
	return v.finish(c.judge(ctx, v, chain, &o, func(crypto.PublicKey) error { return s.Verify(content) }))
}
