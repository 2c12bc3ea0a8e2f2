package client

import (
	"context"
	"crypto"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/kmsd-project/kmsd/client/cms"
	"github.com/kmsd-project/kmsd/client/cose"
	"github.com/kmsd-project/kmsd/client/jose"
	"github.com/kmsd-project/kmsd/client/packet"
	"github.com/kmsd-project/kmsd/client/pkix"
	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// leaf is the certificate of the key itself.
func (k *CertifiedKey) leaf() (*x509.Certificate, error) {
	if len(k.Chain) == 0 {
		return nil, fmt.Errorf("%w: %s", ErrNoCertificate, k.Ref)
	}
	return k.Chain[0], nil
}

// SignToken says what a signed token looks like. The zero value is one with payload, leaf certificate and, where the key has one, MOSIP's
// kid, under the algorithm of the key.
type SignToken struct {
	Algorithm     jose.Algorithm // empty: RS256 for module keys of MOSIP and APP/SIGN, else that of jose.AlgorithmFor
	NoCertificate bool           // no x5c
	Chain         bool           // x5c with the issuers up to the root
	Thumbprint    bool           // x5t#S256
	URL           string         // x5u
	KeyID         string         // kid; empty: MOSIP's, if the key has one
	NoKeyID       bool           // no kid
	KeyIDPrefix   string         // before the kid
	Type          string         // typ
	Extra         map[string]any // further members of the header of a JWS
	Detached      bool           // leave the payload out
	Unencoded     bool           // sign the payload of a JWS as it is (RFC 7797)
	EncodedAnyway bool           // with Unencoded: write it in base64url all the same, as MOSIP's jwsSign does
	RFC9360       bool           // of a COSE message: x5t and x5u as RFC 9360 has them, not as MOSIP does
}

// signerOf looks up the key that signs, with its certificates, and fills in what o leaves open.
func (c *Client) signerOf(ctx context.Context, ref string, o *SignToken) (*Key, []*x509.Certificate, error) {
	k, err := c.Key(ctx, ref)
	if err != nil {
		return nil, nil, err
	}
	if o.Algorithm == "" {
		if o.Algorithm, err = k.jwsAlgorithm(); err != nil {
			return nil, nil, err
		}
	}
	var chain []*x509.Certificate
	if !o.NoCertificate || o.Chain || o.Thumbprint {
		if chain, err = c.Chain(ctx, k.pinned); err != nil {
			return nil, nil, err
		}
		if len(chain) == 0 {
			return nil, nil, fmt.Errorf("%w: %s", ErrNoCertificate, k.pinned)
		}
		if err := inForce(chain[0], time.Now()); err != nil { // MOSIP's KER-KMA-005
			return nil, nil, fmt.Errorf("%w: %w", ErrExpired, err)
		}
	}
	if o.KeyID == "" && !o.NoKeyID {
		if o.KeyID, err = c.keyID(ctx, k); err != nil {
			return nil, nil, err
		}
	}
	if o.NoKeyID {
		o.KeyID = ""
	} else if o.KeyID != "" {
		o.KeyID = o.KeyIDPrefix + o.KeyID
	}
	return k, chain, nil
}

// jwsAlgorithm is the algorithm that MOSIP's jwtSign takes for its module keys and for APP/SIGN, and for other keys the best they have.
func (k *Key) jwsAlgorithm() (jose.Algorithm, error) {
	_, reference, _ := strings.Cut(k.info.Name, "/")
	if _, ok := k.public.(*rsa.PublicKey); ok && (k.info.Profile == "mosip-module" || reference == "SIGN") {
		return jose.RS256, nil
	}
	return jose.AlgorithmFor(k.public)
}

// keyID returns MOSIP's kid of the version of a key, or "" for a key that has none.
func (c *Client) keyID(ctx context.Context, k *Key) (string, error) {
	for v, err := range c.CertificateVersions(ctx, k.Name()) {
		if errors.Is(err, ErrNotAvailable) {
			return "", nil
		}
		if err != nil {
			return "", err
		}
		if v.Version == k.Version() {
			return v.KeyID, nil
		}
	}
	return "", nil
}

// inForce reports whether a certificate is within its dates.
func inForce(c *x509.Certificate, now time.Time) error {
	switch {
	case now.Before(c.NotBefore):
		return fmt.Errorf("the certificate is not valid before %s", c.NotBefore.UTC().Format(time.RFC3339))
	case now.After(c.NotAfter):
		return fmt.Errorf("the certificate has expired at %s", c.NotAfter.UTC().Format(time.RFC3339))
	}
	return nil
}

// include is how many certificates go into the header.
func (o *SignToken) include(chain []*x509.Certificate) int {
	switch {
	case o.Chain:
		return len(chain)
	case o.NoCertificate:
		return 0
	}
	return 1
}

// SignJWS signs payload with a key and returns the token in the compact serialization, as MOSIP's jwtSign and jwsSign do.
func (c *Client) SignJWS(ctx context.Context, ref string, payload []byte, o SignToken) (string, error) {
	k, chain, err := c.signerOf(ctx, ref, &o)
	if err != nil {
		return "", err
	}
	return jose.Sign(ctx, k, payload, jose.SignOptions{
		Algorithm: o.Algorithm, KeyID: o.KeyID, Chain: chain, Include: o.include(chain), Thumbprint: o.Thumbprint, URL: o.URL, Type: o.Type,
		Detached: o.Detached, Unencoded: o.Unencoded, EncodedAnyway: o.EncodedAnyway, Extra: o.Extra,
	})
}

// SignCOSE signs payload with a key and returns a COSE_Sign1 message, as MOSIP's coseSign1 does.
func (c *Client) SignCOSE(ctx context.Context, ref string, payload []byte, o SignToken) ([]byte, error) {
	k, options, err := c.coseSigner(ctx, ref, o)
	if err != nil {
		return nil, err
	}
	return cose.Sign(ctx, k, payload, *options)
}

// SignCWT signs claims with a key, as MOSIP's cwtSign does.
func (c *Client) SignCWT(ctx context.Context, ref string, claims *cose.Claims, o SignToken) ([]byte, error) {
	k, options, err := c.coseSigner(ctx, ref, o)
	if err != nil {
		return nil, err
	}
	return cose.SignCWT(ctx, k, claims, *options)
}

func (c *Client) coseSigner(ctx context.Context, ref string, o SignToken) (*Key, *cose.SignOptions, error) {
	if o.Unencoded || len(o.Extra) > 0 || o.Type != "" {
		return nil, nil, fmt.Errorf("%w: an option of JSON Web Signatures with COSE", ErrInvalid)
	}
	k, chain, err := c.signerOf(ctx, ref, &o)
	if err != nil {
		return nil, nil, err
	}
	options := &cose.SignOptions{
		Algorithm: o.Algorithm, Protected: cose.Header{KeyID: []byte(o.KeyID), URL: o.URL}, RFC9360: o.RFC9360, Detached: o.Detached,
	}
	for _, certificate := range chain[:min(o.include(chain), len(chain))] {
		options.Protected.Chain = append(options.Protected.Chain, certificate.Raw)
	}
	if o.Thumbprint {
		sum := packet.Thumbprint(chain[0])
		options.Protected.Thumbprint = sum[:]
	}
	return k, options, nil
}

// VerifyToken says whom a signed token has to be of.
//
// The signer is the certificate that the token brings along, then Certificate, then Key: the first of these that is there. A certificate of
// the token is believed only for a reason: it is the one in Certificate or has the public key of Key; it leads to the trust anchors of
// Domain; it is of a key in this keystore; or AnySigner says that the caller finds out.
//
// With Certificate or AnySigner, and neither Key nor Domain, kmsd is not asked: the client may be nil.
type VerifyToken struct {
	Detached    []byte            // the payload of a token that has none
	Certificate *x509.Certificate // of the signer
	Key         string            // NAME or NAME@VERSION of the signer, in this keystore
	Domain      string            // trust domain of the signer; see VerifyTrust
	AnySigner   bool
	Time        time.Time // at which the certificate has to be valid; zero: now
}

// Verdict says whether a token is to be believed, and why.
//
// Invariant: there is one answer, Valid, and it has everything in it: the signature, the dates of the certificate and the trust in it. MOSIP
// answers signatureValid for the certificate that anybody put into the token.
type Verdict struct {
	Valid       bool
	Reason      string            // why not, or who vouches for the signer
	Payload     []byte            // that was signed; nil unless Valid
	Certificate *x509.Certificate // of the signer, if there is one
	Key         string            // NAME@VERSION of the signer, if it is a key of this keystore
	Compromised bool              // that key is known to have been stolen since
	Algorithm   jose.Algorithm
	JWS         *jose.Header // of a JWS
	COSE        *cose.Signed // of a COSE message
	CMS         *cms.Signature
	Claims      *cose.Claims // of a CWT
}

// VerifyJWS verifies a token in the compact serialization. The error is about the question; what is wrong with the token is in the verdict,
// except for what is no token at all, which is an error of package jose.
func (c *Client) VerifyJWS(ctx context.Context, token string, o VerifyToken) (*Verdict, error) {
	t, err := jose.ParseSigned(token)
	if err != nil {
		return nil, err
	}
	if _, err := t.Header.Leaf(pkix.ParseCertificate); err != nil { // which compares it with x5t#S256
		return nil, err
	}
	v := &Verdict{JWS: t.Header, Algorithm: jose.Algorithm(t.Header.Algorithm)}
	err = c.judge(ctx, v, t.Header.Chain, &o, func(public crypto.PublicKey) error {
		payload, err := t.Verify(public, o.Detached)
		v.Payload = payload
		return err
	})
	return v.finish(err)
}

// VerifyCOSE verifies a COSE_Sign1 message, with or without its tag.
func (c *Client) VerifyCOSE(ctx context.Context, message []byte, o VerifyToken) (*Verdict, error) {
	s, err := cose.Parse(message)
	if err != nil {
		return nil, err
	}
	return c.verifyCOSE(ctx, s, &o, func(v *Verdict, public crypto.PublicKey) error {
		payload, err := s.Verify(public, o.Detached)
		v.Payload = payload
		return err
	})
}

// VerifyCWT verifies a CBOR Web Token and what it claims. expect.Now may be zero.
func (c *Client) VerifyCWT(ctx context.Context, token []byte, expect cose.Expect, o VerifyToken) (*Verdict, error) {
	s, err := cose.ParseCWT(token)
	if err != nil {
		return nil, err
	}
	if expect.Now.IsZero() {
		expect.Now = o.at()
	}
	return c.verifyCOSE(ctx, s, &o, func(v *Verdict, public crypto.PublicKey) error {
		claims, err := s.VerifyCWT(public, expect)
		v.Claims = claims
		return err
	})
}

func (c *Client) verifyCOSE(ctx context.Context, s *cose.Signed, o *VerifyToken, verify func(*Verdict, crypto.PublicKey) error) (*Verdict, error) {
	if _, err := s.Leaf(pkix.ParseCertificate); err != nil {
		return nil, err
	}
	chain := s.Protected.Chain
	if len(chain) == 0 {
		chain = s.Unprotected.Chain
	}
	v := &Verdict{COSE: s, Algorithm: s.Algorithm}
	return v.finish(c.judge(ctx, v, chain, o, func(public crypto.PublicKey) error { return verify(v, public) }))
}

func (o *VerifyToken) at() time.Time {
	if o.Time.IsZero() {
		return time.Now()
	}
	return o.Time
}

// refusal is what is wrong with a token, as opposed to what went wrong.
type refusal struct{ reason string }

func (r *refusal) Error() string { return r.reason }

// finish turns what judge found into the verdict.
func (v *Verdict) finish(err error) (*Verdict, error) {
	var r *refusal
	switch {
	case err == nil:
		v.Valid = true
		return v, nil
	case errors.As(err, &r):
		v.Reason = r.reason
	case errors.Is(err, jose.ErrVerification), errors.Is(err, cose.ErrVerification), errors.Is(err, cose.ErrExpired), errors.Is(err, cose.ErrNotYetValid),
		errors.Is(err, cose.ErrClaims), errors.Is(err, cms.ErrVerification):
		v.Reason = err.Error()
	default:
		return nil, err
	}
	v.Payload, v.Claims = nil, nil
	return v, nil
}

// judge finds the signer of a token that brings this chain along, has verify check the signature, and asks who vouches for the signer.
func (c *Client) judge(ctx context.Context, v *Verdict, chain [][]byte, o *VerifyToken, verify func(crypto.PublicKey) error) error {
	certificates, err := parseChain(chain)
	if err != nil {
		return err
	}
	if len(certificates) > 0 {
		v.Certificate = certificates[0]
		if err := verify(v.Certificate.PublicKey); err != nil {
			return err
		}
		if err := c.vouch(ctx, v, certificates, o); err != nil {
			return err
		}
		return v.dates(o)
	}
	switch {
	case o.Certificate != nil:
		v.Certificate, v.Reason = o.Certificate, "signed by the certificate that was given"
		err = verify(o.Certificate.PublicKey)
	case o.Key != "":
		err = c.verifyByKey(ctx, v, o.Key, verify)
	default:
		return &refusal{"the token has no certificate, and no other was given"}
	}
	if err != nil {
		return err
	}
	if o.Domain != "" {
		if v.Certificate == nil {
			return &refusal{"the signing key has no certificate, whose trust could be asked for"}
		}
		if err := c.trusted(ctx, v, []*x509.Certificate{v.Certificate}, o); err != nil {
			return err
		}
	}
	return v.dates(o)
}

// dates refuses a certificate that is not in force.
func (v *Verdict) dates(o *VerifyToken) error {
	if v.Certificate != nil {
		if err := inForce(v.Certificate, o.at()); err != nil {
			return &refusal{err.Error()}
		}
	}
	return nil
}

// equal is what all public keys of the standard library, and those of package pkix, have.
func equal(a, b crypto.PublicKey) bool {
	k, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && k.Equal(b)
}

// vouch says for what reason the certificate in a token is believed.
func (c *Client) vouch(ctx context.Context, v *Verdict, chain []*x509.Certificate, o *VerifyToken) error {
	leaf := chain[0]
	if o.Certificate != nil && !equal(leaf.PublicKey, o.Certificate.PublicKey) {
		return &refusal{"signed by the key of another certificate than the one that was given"}
	}
	if o.Key != "" {
		err := c.verifyByKey(ctx, v, o.Key, func(public crypto.PublicKey) error {
			if !equal(leaf.PublicKey, public) {
				return jose.ErrVerification
			}
			return nil
		})
		if errors.Is(err, jose.ErrVerification) {
			return &refusal{"signed by another key than " + o.Key}
		}
		if err != nil {
			return err
		}
	}
	switch {
	case o.Domain != "":
		v.Certificate = leaf
		return c.trusted(ctx, v, chain, o)
	case o.Certificate != nil:
		// It is this one whose dates count: who has the key can make himself another certificate of it.
		v.Certificate, v.Reason = o.Certificate, "signed by the certificate that was given"
	case o.Key != "": // the same
	case o.AnySigner:
		v.Reason = "nobody was asked about the signer"
	default:
		sum := packet.Thumbprint(leaf)
		info, version, err := c.FindKey(ctx, "certificate-sha256", sum[:])
		switch {
		case errors.Is(err, ErrNotAvailable):
			return &refusal{"nobody vouches for the certificate in the token"}
		case err != nil:
			return err
		}
		if keyspec.Origin(info.Origin) == keyspec.Foreign { // it is here to be encrypted to, whoever it was that brought it
			return &refusal{"the certificate in the token is of " + info.Name + ", another domain's key, for which nobody vouches here"}
		}
		return v.own(info, version)
	}
	return nil
}

// own takes the version of a key in this keystore for the signer.
func (v *Verdict) own(info *KeyInfo, version keyspec.Version) error {
	v.Key = keyspec.Ref{Name: keyspec.Name(info.Name), Version: version}.String()
	v.Reason = "signed by " + v.Key + " of this keystore"
	for _, one := range info.Versions {
		if one.Version != uint32(version) {
			continue
		}
		switch keyspec.State(one.State) {
		case keyspec.Compromised:
			v.Compromised = true
			return &refusal{v.Key + " is known to be compromised"}
		case keyspec.PreActive, keyspec.Suspended, keyspec.Destroyed:
			return &refusal{v.Key + " is " + one.State}
		}
		return nil
	}
	return &refusal{v.Key + " is not there any more"}
}

// verifyByKey has verify try the versions of a key in this keystore, the newest first, or the one that ref names.
func (c *Client) verifyByKey(ctx context.Context, v *Verdict, ref string, verify func(crypto.PublicKey) error) error {
	parsed, err := keyspec.ParseRef(ref)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	info, err := c.KeyInfo(ctx, ref)
	if err != nil {
		return err
	}
	wrong := error(jose.ErrVerification)
	for i := len(info.Versions) - 1; i >= 0; i-- {
		one := keyspec.Ref{Name: parsed.Name, Version: keyspec.Version(info.Versions[i].Version)}
		if parsed.Version != 0 && parsed.Version != one.Version || keyspec.State(info.Versions[i].State) == keyspec.Destroyed {
			continue
		}
		var reply proto.PublicReply
		if err := c.Call(ctx, proto.OpPublic, &proto.KeyRef{Key: one.String()}, &reply, nil); err != nil {
			return err
		}
		public, err := pkix.ParsePublicKey(reply.SPKI)
		if err != nil {
			return fmt.Errorf("%w: public key: %w", ErrProtocol, err)
		}
		if wrong = verify(public); wrong != nil {
			if errors.Is(wrong, jose.ErrVerification) || errors.Is(wrong, cose.ErrVerification) {
				continue
			}
			return wrong
		}
		chain, err := c.Chain(ctx, one.String())
		if err != nil {
			return err // the dates of a certificate that nobody has seen would not be looked at
		}
		if len(chain) > 0 {
			v.Certificate = chain[0]
		}
		return v.own(info, one.Version)
	}
	return wrong
}

// trusted asks kmsd whether a chain leads to the trust anchors of a domain.
func (c *Client) trusted(ctx context.Context, v *Verdict, chain []*x509.Certificate, o *VerifyToken) error {
	t, err := c.VerifyTrust(ctx, o.Domain, chain, o.Time)
	if err != nil {
		return err
	}
	if err := t.Err(); err != nil {
		return &refusal{err.Error()}
	}
	v.Reason = "the signer's certificate is trusted in the domain " + t.Domain
	if t.Partner != "" {
		v.Reason += ", as that of the partner " + t.Partner
	}
	return nil
}
