package client

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"iter"
	"time"

	"github.com/kmsd-project/kmsd/client/pkix"
	"github.com/kmsd-project/kmsd/ipc/proto"
)

// OwnDomain is the domain of trust of the keystore's own hierarchy.
const OwnDomain = "OWN"

// ErrUntrusted says that a certificate is not trusted.
var ErrUntrusted = errors.New("the certificate is not trusted")

// TrustReason is one thing that speaks against a certificate.
type TrustReason = proto.TrustReason

// TrustDomain is a domain of trust and its rules.
type TrustDomain = proto.TrustDomain

// TrustEntry is a certificate or a revocation list in a domain.
type TrustEntry = proto.TrustEntry

// TrustResult says what came of one certificate that was to be added to a domain.
type TrustResult = proto.TrustResult

// TrustVerdict says whether a certificate is trusted, dates, signatures, constraints and revocation included.
type TrustVerdict struct {
	Trusted bool
	Domain  string
	Partner string              // the organization, if the certificate was admitted to the domain as a partner's
	Path    []*x509.Certificate // leaf first, root last; without trust the path that came closest. Its end is left off when it is over 40 KiB
	Reasons []TrustReason       // nothing if it is trusted; else what says most first

	// Unchecked are the indexes of the certificates of Path whose revocation nobody could tell, as their issuer has published no
	// list in the domain.
	Unchecked []int
}

// Err returns nil if the certificate is trusted, else an error that wraps [ErrUntrusted] and says why.
func (v *TrustVerdict) Err() error {
	switch {
	case v.Trusted:
		return nil
	case len(v.Reasons) == 0:
		return fmt.Errorf("%w in the domain %s", ErrUntrusted, v.Domain)
	}
	r := v.Reasons[0]
	which := ""
	if r.Index > 0 {
		which = fmt.Sprintf("certificate %d of its path: ", r.Index)
	}
	return fmt.Errorf("%w in the domain %s: %s%s (%s)", ErrUntrusted, v.Domain, which, r.Text, r.Code)
}

// VerifyTrust asks whether chain[0] is trusted in a domain at a time, the zero time being now. The other certificates of chain can come
// in any order and be left out where the domain has them. In [OwnDomain] the leaf alone is enough.
func (c *Client) VerifyTrust(ctx context.Context, domain string, chain []*x509.Certificate, at time.Time) (*TrustVerdict, error) {
	p := proto.TrustVerify{Domain: domain}
	for _, certificate := range chain {
		p.Chain = append(p.Chain, certificate.Raw)
	}
	if !at.IsZero() {
		p.At = at.Unix()
	}
	var reply proto.TrustVerdict
	if err := c.Call(ctx, proto.OpTrustVerify, &p, &reply, nil); err != nil {
		return nil, err
	}
	v := &TrustVerdict{Trusted: reply.Trusted, Domain: reply.Domain, Partner: reply.Partner, Reasons: reply.Reasons}
	for i, step := range reply.Path {
		if step.Unchecked {
			v.Unchecked = append(v.Unchecked, i)
		}
		if len(step.Certificate) == 0 || len(v.Path) < i {
			continue
		}
		certificate, err := pkix.ParseCertificate(step.Certificate)
		if err != nil {
			return nil, err
		}
		v.Path = append(v.Path, certificate)
	}
	return v, nil
}

// TrustDomains returns the domains of trust by name, without [OwnDomain].
func (c *Client) TrustDomains(ctx context.Context) ([]TrustDomain, error) {
	var reply proto.TrustDomainsReply
	err := c.Call(ctx, proto.OpTrustDomains, &proto.Empty{}, &reply, nil)
	return reply.Domains, err
}

// SetTrustDomain adds a domain of trust, or changes the rules of one; days that are 0 stay as they are. It takes the admin socket.
func (c *Client) SetTrustDomain(ctx context.Context, d *TrustDomain) (*TrustDomain, error) {
	var reply TrustDomain
	if err := c.Call(ctx, proto.OpTrustSet, d, &reply, nil); err != nil {
		return nil, err
	}
	return &reply, nil
}

// AddTrust adds the CAs of a file, PEM, DER or PKCS #7 in any order, to a domain, and says what came of each. It takes the admin socket.
func (c *Client) AddTrust(ctx context.Context, domain string, file []byte) ([]TrustResult, error) {
	var reply proto.TrustAddReply
	err := c.Call(ctx, proto.OpTrustAdd, &proto.TrustAdd{Domain: domain, Data: file}, &reply, nil)
	return reply.Results, err
}

// AddPartner admits the certificate of a partner to a domain. organization is the one of its subject. It takes the admin socket.
func (c *Client) AddPartner(ctx context.Context, domain, organization string, file []byte) (*TrustResult, error) {
	var reply proto.TrustAddReply
	if err := c.Call(ctx, proto.OpPartnerAdd, &proto.PartnerAdd{Domain: domain, Organization: organization, Data: file}, &reply, nil); err != nil {
		return nil, err
	}
	if len(reply.Results) != 1 {
		return nil, fmt.Errorf("%w: %s gave %d results", ErrProtocol, proto.OpPartnerAdd, len(reply.Results))
	}
	return &reply.Results[0], nil
}

// AddCRL takes a revocation list of a CA of a domain, DER or PEM. It takes the admin socket.
func (c *Client) AddCRL(ctx context.Context, domain string, list []byte) (*TrustEntry, error) {
	var reply TrustEntry
	if err := c.Call(ctx, proto.OpCRLAdd, &proto.CRLAdd{Domain: domain, Data: list}, &reply, nil); err != nil {
		return nil, err
	}
	return &reply, nil
}

// Trust lists what a domain has: with the role root, intermediate, partner or crl that, with none its CAs. What was removed is there too.
func (c *Client) Trust(ctx context.Context, domain, role string) iter.Seq2[*TrustEntry, error] {
	return func(yield func(*TrustEntry, error) bool) {
		p := proto.TrustList{Domain: domain, Role: role}
		for {
			var page proto.TrustListReply
			if err := c.Call(ctx, proto.OpTrustList, &p, &page, nil); err != nil {
				yield(nil, err)
				return
			}
			for i := range page.Entries {
				if !yield(&page.Entries[i], nil) {
					return
				}
			}
			if len(page.Next) == 0 {
				return
			}
			p.After = page.Next
		}
	}
}

// RemoveTrust takes something out of a domain at once: a CA or a partner by the SHA-256 of its certificate, with the role crl a revocation
// list by the SHA256 of its [TrustEntry]. It takes the admin socket.
func (c *Client) RemoveTrust(ctx context.Context, domain, role string, sum [sha256.Size]byte) error {
	return c.Call(ctx, proto.OpTrustRemove, &proto.TrustRemove{Domain: domain, Role: role, SHA256: sum[:]}, nil, nil)
}

// UploadCertificate attaches a certificate that was issued outside to the version of a key that has its public key. The file holds it
// with its chain, PEM, DER or PKCS #7. With a domain it has to be trusted in that.
func (c *Client) UploadCertificate(ctx context.Context, ref, domain string, file []byte) (*CertifiedKey, error) {
	return c.certified(ctx, proto.OpCertUpload, &proto.CertUpload{Key: ref, Domain: domain, Data: file})
}

// UploadOtherCertificate takes the certificate of somebody else's key under the name of a base key, to encrypt to it.
func (c *Client) UploadOtherCertificate(ctx context.Context, name, domain string, file []byte) (*CertifiedKey, error) {
	return c.certified(ctx, proto.OpCertUpload, &proto.CertUpload{Key: name, OtherDomain: true, Domain: domain, Data: file})
}
