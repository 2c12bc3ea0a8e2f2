package pki

import (
	"bytes"
	"crypto/x509"
	"fmt"
	"slices"
	"time"
)

// Trust is what a verdict on a certificate rests on.
type Trust struct {
	Roots         []*x509.Certificate // trust anchors
	Intermediates []*x509.Certificate // CAs of which paths can be built; nothing is trusted because it is here
	Removed       []*x509.Certificate // nothing is trusted over one of these or over its key, whoever has signed it
	CRLs          []*CRL              // of these CAs
	Revoked       []Withdrawn         // what is known to be revoked without a list
}

// Withdrawn is a certificate that its issuer has revoked.
type Withdrawn struct {
	Issuer []byte // the issuer's name, DER
	Revocation
}

// Verdict says whether a certificate is trusted, and why not.
type Verdict struct {
	Trusted bool
	Path    []*x509.Certificate // leaf first, ending in the root; without trust the path that came closest
	Reasons []Reason            // what is wrong with Path, what says most first; nothing when it is trusted

	// Unchecked are the certificates of Path whose revocation nobody could tell, as no list of their issuer is there. The
	// root is not among them: it is removed, not revoked.
	Unchecked []int
}

// maxLinks bounds the signatures that are verified in the search for a path: names and keys can be made up so that there are
// as many paths as one likes.
const maxLinks = 100

// Verify looks for a path from chain[0] to a root, over the other certificates of chain, in whatever order, and the
// intermediates, and judges each path it finds by Check and by the revocation lists, at a time. The first without a fault
// makes the verdict; else it is that of the path that came closest.
//
// Invariant: a verdict is trusted only if its path ends in one of the roots, Check finds nothing wrong with it, none of its
// certificates is revoked or has lists that are all out of date, and none was removed.
func (t *Trust) Verify(chain []*x509.Certificate, at time.Time) Verdict {
	if err := checkSizes(chain); err != nil {
		return Verdict{Reasons: []Reason{{0, Malformed, err.Error()}}}
	}
	s := search{Trust: t, at: at, links: maxLinks}
	for _, c := range slices.Concat(t.Roots, chain[1:], t.Intermediates, t.Removed) {
		if !slices.ContainsFunc(s.pool, c.Equal) {
			s.pool = append(s.pool, c)
		}
	}
	s.extend(chain[:1:1])
	slices.SortStableFunc(s.best.Reasons, func(a, b Reason) int { return weigh(a.Code) - weigh(b.Code) })
	return s.best
}

// SameCertificate reports whether an issuer has signed the same thing with both. The bytes around that, signatures among them, can be
// changed by whoever has the certificate, so that they remain valid: they do not count where something is to be recognised that he would
// rather not have recognised.
func SameCertificate(a, b *x509.Certificate) bool {
	return bytes.Equal(a.RawTBSCertificate, b.RawTBSCertificate)
}

// search is a search for a path.
type search struct {
	*Trust
	at    time.Time
	pool  []*x509.Certificate // of issuers, roots first
	links int                 // signatures that may still be verified
	best  Verdict
	close int // how close best came: 1 it just ends, 2 a bad link ends it, 3 it was cut off, 4 it ends in a root: then fewer faults are better
}

// removed reports whether c was removed. Another certificate of a key that was removed is so, too, unless it was added itself: when it
// takes the place of the one that was removed, and not when a chain brings it along.
func (s *search) removed(c *x509.Certificate) bool {
	same := func(o *x509.Certificate) bool { return SameCertificate(c, o) }
	if slices.ContainsFunc(s.Removed, same) {
		return true
	}
	return slices.ContainsFunc(s.Removed, func(o *x509.Certificate) bool {
		return bytes.Equal(c.RawSubjectPublicKeyInfo, o.RawSubjectPublicKeyInfo)
	}) &&
		!slices.ContainsFunc(s.Roots, same) && !slices.ContainsFunc(s.Intermediates, same)
}

// extend looks for paths that begin with path. It reports whether there was one without a fault.
func (s *search) extend(path []*x509.Certificate) bool {
	last := path[len(path)-1]
	if s.removed(last) {
		return s.offer(path, 3, Reason{len(path) - 1, Removed, "it was removed from the domain"})
	}
	if slices.ContainsFunc(s.Roots, last.Equal) {
		return s.anchored(path)
	}
	if len(path) == MaxChain {
		return s.offer(path, len(path)-1, Reason{len(path) - 1, PathTooLong, fmt.Sprintf("a path has at most %d certificates", MaxChain)})
	}
	found := false
	for _, hinted := range []bool{true, false} { // those first whose key the certificate names as its issuer's
		for _, c := range s.pool {
			if hinted != namesKey(last, c) || !sameName(last.RawIssuer, c.RawSubject) || passed(path, c) {
				continue
			}
			if s.links--; s.links < 0 {
				return s.offer(path, 3, Reason{len(path) - 1, Untrusted, "there are too many certificates that could have issued it"})
			}
			found = true
			if s.step(path, c, hinted) {
				return true
			}
		}
	}
	if !found {
		return s.offer(path, 1, Reason{len(path) - 1, Untrusted, untrustedText(last)})
	}
	return false
}

func untrustedText(c *x509.Certificate) string {
	if sameName(c.RawIssuer, c.RawSubject) {
		return "it is signed by itself, and no root of the domain"
	}
	return "its issuer is neither in the domain nor in the chain"
}

// step goes on from path to c, which has the name of its issuer.
func (s *search) step(path []*x509.Certificate, c *x509.Certificate, hinted bool) bool {
	i := len(path) - 1
	if err := checkKey(c.PublicKey); err != nil { // Check would find the signature bad, for it does not even verify it
		return s.offer(append(path[:i+1:i+1], c), 2, Reason{i + 1, WeakKey, err.Error()})
	}
	reasons := link(i, path[i], c)
	switch {
	case len(reasons) == 0:
		return s.extend(append(path[:i+1:i+1], c))
	case reasons[0].Code == BadSignature && !hinted:
		return s.offer(path, 1, Reason{i, Untrusted, "a CA of the name of its issuer is there, but with another key"})
	}
	return s.offer(path, 2, reasons...)
}

// namesKey reports whether the authority key identifier of c, if it has one, is the key identifier of issuer. It is a hint and
// not a condition (RFC 5280 section 4.2.1.1): issuers exist that compute it in another way.
func namesKey(c, issuer *x509.Certificate) bool {
	return len(c.AuthorityKeyId) == 0 || len(issuer.SubjectKeyId) == 0 || bytes.Equal(c.AuthorityKeyId, issuer.SubjectKeyId)
}

// passed reports whether the path already goes over the name and key of c. Without that a pair of CAs that certify one
// another would make it go round in circles.
func passed(path []*x509.Certificate, c *x509.Certificate) bool {
	return slices.ContainsFunc(path, func(p *x509.Certificate) bool {
		return bytes.Equal(p.RawSubjectPublicKeyInfo, c.RawSubjectPublicKeyInfo) && sameName(p.RawSubject, c.RawSubject)
	})
}

// anchored judges a path that ends in a root.
func (s *search) anchored(path []*x509.Certificate) bool {
	v := Verdict{Path: path, Reasons: Check(path, s.Roots, s.at)}
	for i := range path[:len(path)-1] {
		reasons, checked := s.revocation(i, path[i], path[i+1])
		v.Reasons = append(v.Reasons, reasons...)
		if !checked {
			v.Unchecked = append(v.Unchecked, i)
		}
	}
	v.Trusted = len(v.Reasons) == 0
	if v.Trusted || s.close < 4 || len(v.Reasons) < len(s.best.Reasons) {
		s.best, s.close = v, 4
	}
	return v.Trusted
}

// offer keeps a path that ends before a root, with the reason for that, when it came closer than the best so far.
func (s *search) offer(path []*x509.Certificate, close int, reasons ...Reason) bool {
	if s.best.Path != nil && close <= s.close {
		return false
	}
	v := Verdict{Path: path, Reasons: reasons}
	for _, r := range Check(path, nil, s.at) {
		known := r.Code == Untrusted || slices.ContainsFunc(reasons, func(o Reason) bool { return o.Index == r.Index && o.Code == r.Code })
		if !known && !(r.Code == BadSignature && slices.ContainsFunc(reasons, func(o Reason) bool { return o.Code == WeakKey })) {
			v.Reasons = append(v.Reasons, r)
		}
	}
	s.best, s.close = v, close
	return false
}

// revocation judges one certificate by what its issuer has published; checked reports whether there was anything.
//
// A CA that has got a new key goes on to speak about what it signed with the old one, in lists signed with either (RFC 5280
// section 5.1.1.3 and 6.3.3 f): so lists count that are signed by any CA of the domain that has the issuer's name.
func (s *search) revocation(i int, c, issuer *x509.Certificate) (reasons []Reason, checked bool) {
	for _, w := range s.Revoked {
		if w.Serial.Cmp(c.SerialNumber) == 0 && sameName(w.Issuer, c.RawIssuer) {
			checked = true
			if !s.at.Before(w.At) || compromising(w.Reason) {
				return []Reason{revokedReason(i, w.Revocation)}, true
			}
		}
	}
	var stale []Reason
	current := false
	for _, l := range s.CRLs {
		if !sameName(l.RawIssuer, c.RawIssuer) {
			continue
		}
		signer := s.signer(l, issuer)
		if signer == nil {
			continue
		}
		checked = true
		switch r := CheckCRL(i, c, signer, l, s.at); {
		case len(r) == 0:
			current = true
		case r[0].Code == Revoked:
			return r, true
		default:
			stale = r
		}
	}
	if current {
		return nil, true
	}
	return stale, checked
}

// signer returns who signed a list: the issuer of the certificate in question, or a CA of the domain that has its name.
func (s *search) signer(l *CRL, issuer *x509.Certificate) *x509.Certificate {
	for _, c := range slices.Concat([]*x509.Certificate{issuer}, s.Roots, s.Intermediates) {
		if sameName(c.RawSubject, l.RawIssuer) && l.SignedBy(c) == nil {
			return c
		}
	}
	return nil
}

// Removed is the code of what was taken out of a domain.
const Removed Code = "removed"

// weights order the reasons by how much they say: what someone did before what time did, and last what is only missing.
var weights = []Code{
	Malformed, Removed, Revoked, BadSignature, WeakSignature, WeakKey, NotCA, NoCertSign, PathTooLong, NameNotAllowed, CriticalExtension,
	Expired, NotYetValid, BadCRL, StaleCRL, NameMismatch, Untrusted,
}

func weigh(c Code) int { return slices.Index(weights, c) }
