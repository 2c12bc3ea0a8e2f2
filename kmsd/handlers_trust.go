package main

import (
	"crypto/sha256"
	"crypto/x509"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/engine"
	"github.com/kmsd-project/kmsd/kmsd/pki"
)

func handleTrustDomains(c *call) (proto.Message, error) {
	if _, err := decode[proto.Empty](c); err != nil {
		return nil, err
	}
	all, err := c.daemon.engine.TrustDomains(c.ctx, &c.session.who)
	if err != nil {
		return nil, err
	}
	reply := &proto.TrustDomainsReply{}
	for i := range all {
		reply.Domains = append(reply.Domains, *domainReply(&all[i]))
	}
	return reply, nil
}

func domainReply(d *engine.Domain) *proto.TrustDomain {
	return &proto.TrustDomain{Name: d.Name, CADays: uint32(d.CADays), PartnerDays: uint32(d.PartnerDays), BuiltIn: !d.Stored}
}

func handleTrustSet(c *call) (proto.Message, error) {
	in, err := decode[proto.TrustDomain](c)
	if err != nil {
		return nil, err
	}
	if max(in.CADays, in.PartnerDays) > engine.MaxTrustDays {
		return nil, invalid("days of a domain out of range")
	}
	d, err := c.daemon.engine.SetTrustDomain(c.ctx, &c.session.who, &engine.Domain{Name: in.Name, CADays: int(in.CADays), PartnerDays: int(in.PartnerDays)})
	if err != nil {
		return nil, err
	}
	return domainReply(d), nil
}

func handleTrustAdd(c *call) (proto.Message, error) {
	in, err := decode[proto.TrustAdd](c)
	if err != nil {
		return nil, err
	}
	bundle, err := pki.ParseBundle(in.Data)
	if err != nil {
		return nil, err
	}
	results, err := c.daemon.engine.TrustAdd(c.ctx, &c.session.who, in.Domain, bundle)
	return addReply(results, err)
}

func handlePartnerAdd(c *call) (proto.Message, error) {
	in, err := decode[proto.PartnerAdd](c)
	if err != nil {
		return nil, err
	}
	bundle, err := pki.ParseBundle(in.Data)
	if err != nil {
		return nil, err
	}
	result, err := c.daemon.engine.PartnerAdd(c.ctx, &c.session.who, in.Domain, in.Organization, bundle)
	if err != nil {
		return nil, err
	}
	return addReply([]engine.TrustResult{*result}, nil)
}

func addReply(results []engine.TrustResult, err error) (proto.Message, error) {
	if err != nil {
		return nil, err
	}
	reply := &proto.TrustAddReply{}
	for i := range results {
		r := &results[i]
		reasons := reasonsReply(r.Reasons)
		reply.Results = append(reply.Results, proto.TrustResult{
			SHA256: digest(r.Certificate), Subject: shorten(nameText(r.Certificate.RawSubject)), Role: string(r.Role), Added: r.Added,
			Reasons: reasons[:min(len(reasons), proto.MaxTrustReasons)],
		})
	}
	return reply, nil
}

func digest(c *x509.Certificate) []byte {
	sum := sha256.Sum256(c.Raw)
	return sum[:]
}

// nameText returns a distinguished name as text; one that has none as nothing.
func nameText(raw []byte) string {
	text, _ := pki.FormatName(raw)
	return text
}

// shorten cuts text off where an answer would get too long. It may hold what others made up, so control characters go.
func shorten(text string) string {
	text = strings.ToValidUTF8(strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return -1
		}
		return r
	}, text), "?")
	if len(text) <= proto.MaxTrustText {
		return text
	}
	cut := proto.MaxTrustText - len("...")
	for !utf8.RuneStart(text[cut]) {
		cut--
	}
	return text[:cut] + "..."
}

func reasonsReply(reasons []pki.Reason) []proto.TrustReason {
	var list []proto.TrustReason
	for _, r := range reasons {
		if len(list) == proto.MaxVerdict {
			break
		}
		list = append(list, proto.TrustReason{Index: uint32(r.Index), Code: string(r.Code), Text: shorten(r.Text)})
	}
	return list
}

func handleTrustList(c *call) (proto.Message, error) {
	in, err := decode[proto.TrustList](c)
	if err != nil {
		return nil, err
	}
	entries, next, err := c.daemon.engine.TrustList(c.ctx, &c.session.who, in.Domain, engine.Role(in.Role), in.After)
	if err != nil {
		return nil, err
	}
	reply := &proto.TrustListReply{Next: next}
	for i := range entries {
		reply.Entries = append(reply.Entries, *entryReply(&entries[i]))
	}
	return reply, nil
}

func entryReply(e *engine.TrustEntry) *proto.TrustEntry {
	out := &proto.TrustEntry{
		Role: string(e.Role), SHA256: e.SHA256[:], Certificate: e.Certificate, Organization: e.Organization, Added: seconds(e.Added), AddedBy: e.AddedBy,
		Removed: seconds(e.Removed), RemovedBy: e.RemovedBy, ThisUpdate: seconds(e.ThisUpdate), NextUpdate: seconds(e.NextUpdate), Entries: uint32(e.Entries),
	}
	if e.Role == engine.RoleCRL {
		out.Issuer = shorten(nameText(e.Issuer))
		if e.Number != nil {
			out.Number = e.Number.Text(16)
		}
	}
	return out
}

func handleTrustRemove(c *call) (proto.Message, error) {
	in, err := decode[proto.TrustRemove](c)
	if err != nil {
		return nil, err
	}
	if len(in.SHA256) != sha256.Size {
		return nil, invalid("sha256 has 32 bytes")
	}
	if err := c.daemon.engine.TrustRemove(c.ctx, &c.session.who, in.Domain, engine.Role(in.Role), [sha256.Size]byte(in.SHA256)); err != nil {
		return nil, err
	}
	return &proto.Empty{}, nil
}

// verdictSpace is how much of an answer the certificates of a path may take, in bytes.
const verdictSpace = 40 << 10

func handleTrustVerify(c *call) (proto.Message, error) {
	in, err := decode[proto.TrustVerify](c)
	if err != nil {
		return nil, err
	}
	if in.At < 0 || in.At > maxTime {
		return nil, invalid("time out of range")
	}
	var at time.Time
	if in.At > 0 {
		at = time.Unix(in.At, 0)
	}
	v, err := c.daemon.engine.TrustVerify(c.ctx, &c.session.who, in.Domain, in.Chain, at)
	if err != nil {
		return nil, err
	}
	reply := &proto.TrustVerdict{Trusted: v.Trusted, Domain: v.Domain, Partner: v.Partner, Reasons: reasonsReply(v.Reasons)}
	size := 0
	for _, certificate := range v.Path {
		step := proto.TrustStep{Certificate: certificate.Raw}
		if size += len(certificate.Raw); size > verdictSpace {
			step.Certificate = nil
		}
		reply.Path = append(reply.Path, step)
	}
	for _, i := range v.Unchecked {
		reply.Path[i].Unchecked = true
	}
	return reply, nil
}

func handleCRLAdd(c *call) (proto.Message, error) {
	in, err := decode[proto.CRLAdd](c)
	if err != nil {
		return nil, err
	}
	entry, err := c.daemon.engine.CRLAdd(c.ctx, &c.session.who, in.Domain, in.Data)
	if err != nil {
		return nil, err
	}
	return entryReply(entry), nil
}

func handleCertUpload(c *call) (proto.Message, error) {
	in, err := decode[proto.CertUpload](c)
	if err != nil {
		return nil, err
	}
	ref, err := keyspec.ParseRef(in.Key)
	if err != nil {
		return nil, err
	}
	bundle, err := pki.ParseBundle(in.Data)
	if err != nil {
		return nil, err
	}
	var out *engine.Certified
	switch {
	case !in.OtherDomain:
		out, err = c.daemon.engine.CertUpload(c.ctx, &c.session.who, ref, bundle, in.Domain)
	case ref.Version != 0:
		err = invalid("a certificate of another domain makes a version of its own")
	default:
		out, err = c.daemon.engine.CertUploadOther(c.ctx, &c.session.who, ref.Name, bundle, in.Domain)
	}
	return certifiedReply(out, err)
}
