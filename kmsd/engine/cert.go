package engine

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"fmt"
	"time"

	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/mechanism"
	"github.com/kmsd-project/kmsd/kmsd/pki"
)

// defaultCertificate is how long a certificate is valid when neither the request nor the key says so.
const defaultCertificate = 365 * 24 * time.Hour

// CertRequest returns a PKCS#10 request of the key, in DER. The key needs the usage sign or certify.
func (e *Engine) CertRequest(ctx context.Context, c *Caller, ref keyspec.Ref, s *pki.Subject) (der []byte, err error) {
	a := &act{op: "cert_request", ref: ref, usage: keyspec.Sign, or: keyspec.Certify, sync: true}
	err = e.do(ctx, c, a, func(u *use) error {
		signer, err := u.signer()
		if err != nil {
			return err
		}
		der, err = pki.Request(signer, *s)
		return err
	})
	return der, err
}

// CertSelfSign makes a certificate of the key signed by itself, attaches it to the key and returns it. The key needs the
// usage sign or certify, for a CA certify. A profile without dates is valid as long as the key, or a year.
func (e *Engine) CertSelfSign(ctx context.Context, c *Caller, ref keyspec.Ref, s *pki.Subject, p *pki.Profile) (chain [][]byte, err error) {
	a := &act{op: "cert_self_sign", ref: ref, usage: keyspec.Sign, or: keyspec.Certify, sync: true}
	if p.CA {
		a.usage, a.or = keyspec.Certify, ""
	}
	err = e.do(ctx, c, a, func(u *use) error {
		if err := u.tick(u.ctx, u.store, u.now); err != nil {
			return err
		}
		signer, err := u.signer()
		if err != nil {
			return err
		}
		profile := u.profile(p, u.key, u.version)
		der, err := pki.SelfSign(signer, *s, profile)
		if err != nil {
			return err
		}
		chain = [][]byte{der}
		return u.attach(u.key.Name, u.version.Number, chain)
	})
	return chain, err
}

// CertIssue makes a certificate signed by the key issuer, whose own certificate must be attached to it, and returns it with
// the issuer's chain after it. Exactly one of request (PKCS#10, DER) and key says for which public key; with key the chain
// is attached to that key. An empty subject means that of the request.
func (e *Engine) CertIssue(ctx context.Context, c *Caller, issuer keyspec.Ref, request []byte, key keyspec.Ref, s *pki.Subject, p *pki.Profile) (chain [][]byte, err error) {
	a := &act{op: "cert_issue", ref: issuer, usage: keyspec.Certify, sync: true}
	if key.Name != "" {
		a.also, a.info = []keyspec.Name{key.Name}, "for "+key.String()
	}
	err = e.do(ctx, c, a, func(u *use) error {
		if (len(request) > 0) == (key.Name != "") {
			return fmt.Errorf("%w: a certificate is issued for a request or for a key", ErrInput)
		}
		if err := u.tick(u.ctx, u.store, u.now); err != nil {
			return err
		}
		stored, err := u.store.Public(keyspec.Ref{Name: u.key.Name, Version: u.version.Number})
		if err != nil {
			return err
		}
		if len(stored.Chain) == 0 {
			return fmt.Errorf("%w: the issuer has no certificate", ErrState)
		}
		certificate, err := pki.ParseCertificate(stored.Chain[0])
		if err != nil {
			return err
		}
		signer, err := u.signer()
		if err != nil {
			return err
		}
		subject, profile := *s, u.profile(p, nil, nil)
		var public crypto.PublicKey
		var number keyspec.Version
		if len(request) > 0 {
			public, subject, err = fromRequest(request, s)
		} else {
			public, number, profile, err = u.target(key, p)
		}
		if err != nil {
			return err
		}
		der, err := pki.Issue(signer, certificate, public, subject, profile)
		if err != nil {
			return err
		}
		chain = append([][]byte{der}, stored.Chain...)
		if len(chain) > pki.MaxChain {
			return fmt.Errorf("%w: over %d certificates", pki.ErrChain, pki.MaxChain)
		}
		if key.Name == "" {
			return nil
		}
		return u.attach(key.Name, number, chain)
	})
	return chain, err
}

func fromRequest(der []byte, s *pki.Subject) (crypto.PublicKey, pki.Subject, error) {
	request, err := pki.ParseRequest(der)
	if err != nil {
		return nil, pki.Subject{}, err
	}
	if len(s.RawName) > 0 || len(s.DNS)+len(s.IP)+len(s.Email)+len(s.URI) > 0 {
		return request.PublicKey, *s, nil
	}
	subject, err := pki.RequestSubject(request)
	return request.PublicKey, subject, err
}

// target returns the public key for which a certificate is issued to a key of the store.
func (u *use) target(ref keyspec.Ref, p *pki.Profile) (crypto.PublicKey, keyspec.Version, pki.Profile, error) {
	key, err := u.metadata(u.store, ref.Name, u.now)
	if err != nil {
		return nil, 0, pki.Profile{}, err
	}
	v, err := version(key, ref.Version, u.now)
	if err != nil {
		return nil, 0, pki.Profile{}, err
	}
	if state := stateAt(key, v, u.now); state != keyspec.Active && state != keyspec.PreActive || !v.DestroyAt.IsZero() {
		return nil, 0, pki.Profile{}, fmt.Errorf("%w: no certificate for a key that is %s", ErrState, state)
	}
	stored, err := u.store.Public(keyspec.Ref{Name: key.Name, Version: v.Number})
	if err != nil {
		return nil, 0, pki.Profile{}, err
	}
	if len(stored.SPKI) == 0 {
		return nil, 0, pki.Profile{}, fmt.Errorf("%w: a symmetric key has no certificate", ErrUnsupported)
	}
	public, err := mechanism.ParseSPKI(stored.SPKI)
	return public, v.Number, u.profile(p, key, v), err
}

// profile fills in what p leaves open.
func (u *use) profile(p *pki.Profile, key *keystore.Key, v *keystore.Version) pki.Profile {
	out := *p
	if out.NotBefore.IsZero() {
		out.NotBefore = u.now.Truncate(time.Second)
	}
	if out.NotAfter.IsZero() {
		out.NotAfter = out.NotBefore.Add(defaultCertificate)
		if v != nil && !v.Expires.IsZero() {
			out.NotAfter = v.Expires
		}
	}
	if key != nil {
		out.Usages = key.Usages
	}
	return out
}

// CertAttach attaches a chain, leaf first, to a key. The leaf must be of the key's public half.
func (e *Engine) CertAttach(ctx context.Context, c *Caller, ref keyspec.Ref, chain [][]byte) error {
	return e.do(ctx, c, &act{op: "cert_attach", ref: ref, sync: true}, func(u *use) error {
		if len(chain) == 0 || len(chain) > pki.MaxChain {
			return fmt.Errorf("%w: 1 to %d certificates", ErrInput, pki.MaxChain)
		}
		parsed := make([]*x509.Certificate, len(chain))
		for i, der := range chain {
			certificate, err := pki.ParseCertificate(der)
			if err != nil {
				return err
			}
			parsed[i] = certificate
			chain[i] = certificate.Raw
		}
		if err := pki.LinkChain(parsed); err != nil {
			return err
		}
		_, number, stored, err := u.publicOf(ref)
		if err != nil {
			return err
		}
		if !bytes.Equal(stored.SPKI, parsed[0].RawSubjectPublicKeyInfo) {
			return fmt.Errorf("%w: the certificate is of another key", ErrInput)
		}
		return u.attach(ref.Name, number, chain)
	})
}

// CertGet returns the chain that is attached to a key, leaf first; it may be empty.
func (e *Engine) CertGet(ctx context.Context, c *Caller, ref keyspec.Ref) (chain [][]byte, err error) {
	err = e.do(ctx, c, &act{op: "cert_get", ref: ref}, func(u *use) error {
		_, _, stored, err := u.publicOf(ref)
		chain = stored.Chain
		return err
	})
	return chain, err
}

// signer returns the key in use for package pki.
func (u *use) signer() (crypto.Signer, error) {
	k, err := u.secret()
	if err != nil {
		return nil, err
	}
	return k.Signer()
}

// attach puts a chain beside the public half of a key version.
func (u *use) attach(name keyspec.Name, number keyspec.Version, chain [][]byte) error {
	_, err := u.replaceChain(keyspec.Ref{Name: name, Version: number}, chain, false)
	return err
}
