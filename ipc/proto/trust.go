package proto

import "github.com/kmsd-project/kmsd/keystore/keyspec"

// Messages of trust in certificates of others, and of certificates that come from outside.

// Bounds of these messages, in bytes or in elements.
const (
	maxDomain       = 36
	maxDomains      = 256
	maxOrganization = 256
	maxDigest       = 32
	maxTrustResults = 32 // certificates of one file
	maxTrustEntries = 32 // on one page
	maxIssuer       = 1024
	maxCRL          = 1 << 20
)

// What is cut off of answers, so that they fit a control frame.
const (
	MaxTrustReasons = 4   // of one certificate that was not added
	MaxTrustText    = 256 // bytes of a subject and of a reason
	MaxVerdict      = 32  // reasons of a verdict
)

// TrustDomain is a domain of trust and its rules. In trust_set, 0 leaves a rule as it is.
type TrustDomain struct {
	Name        string
	CADays      uint32 // how long a CA has to be valid yet when it is added
	PartnerDays uint32 // the same of a partner's certificate
	BuiltIn     bool   // nobody has set it
}

// TrustDomainsReply is every domain, by name, without OWN.
type TrustDomainsReply struct{ Domains []TrustDomain }

// TrustAdd adds CAs to a domain.
type TrustAdd struct {
	Domain string
	Data   []byte // a file with certificates: PEM, DER, PKCS#7
}

// PartnerAdd admits the certificate of a partner to a domain.
type PartnerAdd struct {
	Domain       string
	Organization string // the organization of its subject
	Data         []byte // as in TrustAdd; of a chain the leaf is meant
}

// TrustAddReply says what came of each certificate.
type TrustAddReply struct{ Results []TrustResult }

// TrustResult says what came of one certificate.
type TrustResult struct {
	SHA256  []byte
	Subject string // as text
	Role    string // root, intermediate or partner
	Added   bool
	Reasons []TrustReason // why not, what says most first
}

// TrustReason is one thing that speaks against a certificate.
type TrustReason struct {
	Index uint32 // of the certificate on the path, 0 is the leaf
	Code  string
	Text  string
}

// TrustList asks for a page of what a domain has.
type TrustList struct {
	Domain string
	Role   string // root, intermediate, partner or crl; empty: root and intermediate
	After  []byte // Next of the page before
}

// TrustListReply is one page, in no order.
type TrustListReply struct {
	Entries []TrustEntry
	Next    []byte // empty: that was the last page
}

// TrustEntry is a certificate or a revocation list in a domain.
type TrustEntry struct {
	Role         string
	SHA256       []byte // of the certificate; the name of a revocation list
	Certificate  []byte // DER
	Organization string // of a partner
	Added        int64
	AddedBy      string
	Removed      int64 // 0: it is in force
	RemovedBy    string
	Issuer       string // of a revocation list, as text; so are the following
	Number       string // hexadecimal
	ThisUpdate   int64
	NextUpdate   int64
	Entries      uint32
}

// TrustRemove takes something out of a domain.
type TrustRemove struct {
	Domain string
	Role   string // as in TrustList; empty: whichever certificate it is
	SHA256 []byte
}

// TrustVerify asks whether a certificate is trusted.
type TrustVerify struct {
	Domain string
	Chain  [][]byte // DER, the certificate in question first, the others in any order
	At     int64    // 0: now
}

// TrustVerdict is the answer.
type TrustVerdict struct {
	Trusted bool
	Domain  string
	Partner string        // organization, if the certificate was admitted to the domain
	Path    []TrustStep   // leaf first, root last; what comes closest if it is not trusted
	Reasons []TrustReason // nothing if it is trusted; else what says most first
}

// TrustStep is a certificate on a path.
type TrustStep struct {
	Certificate []byte // DER; left out where the reply would be too long
	Unchecked   bool   // nobody said whether it is revoked
}

// CRLAdd takes a revocation list of a CA of a domain.
type CRLAdd struct {
	Domain string
	Data   []byte // DER or PEM
}

// CertUpload brings in a certificate that was issued outside: for a key of kmsd, or with OtherDomain for somebody else's.
type CertUpload struct {
	Key         string
	OtherDomain bool
	Domain      string // of trust in which it has to be trusted; empty: that is not asked
	Data        []byte // a file with certificates: PEM, DER, PKCS#7
}

func (m *TrustDomain) fields(f *fields) {
	f.str("name", &m.Name, maxDomain)
	f.u32("ca_days", &m.CADays)
	f.u32("partner_days", &m.PartnerDays)
	f.bool("built_in", &m.BuiltIn)
}

func (m *TrustDomainsReply) fields(f *fields) { list(f, "domains", &m.Domains, maxDomains) }

func (m *TrustAdd) fields(f *fields) {
	f.str("domain", &m.Domain, maxDomain)
	f.bin("data", &m.Data, MaxData)
}

func (m *PartnerAdd) fields(f *fields) {
	f.str("domain", &m.Domain, maxDomain)
	f.text("organization", &m.Organization, maxOrganization)
	f.bin("data", &m.Data, MaxData)
}

func (m *TrustAddReply) fields(f *fields) { list(f, "results", &m.Results, maxTrustResults) }

func (m *TrustResult) fields(f *fields) {
	f.bin("sha256", &m.SHA256, maxDigest)
	f.text("subject", &m.Subject, MaxTrustText)
	f.str("role", &m.Role, maxWord)
	f.bool("added", &m.Added)
	list(f, "reasons", &m.Reasons, MaxTrustReasons)
}

func (m *TrustReason) fields(f *fields) {
	f.u32("index", &m.Index)
	f.str("code", &m.Code, maxWord)
	f.text("text", &m.Text, MaxTrustText)
}

func (m *TrustList) fields(f *fields) {
	f.str("domain", &m.Domain, maxDomain)
	f.str("role", &m.Role, maxWord)
	f.bin("after", &m.After, maxCursor)
}

func (m *TrustListReply) fields(f *fields) {
	list(f, "entries", &m.Entries, maxTrustEntries)
	f.bin("next", &m.Next, maxCursor)
}

func (m *TrustEntry) fields(f *fields) {
	f.str("role", &m.Role, maxWord)
	f.bin("sha256", &m.SHA256, maxDigest)
	f.bin("certificate", &m.Certificate, maxCertificate)
	f.text("organization", &m.Organization, maxOrganization)
	f.i64("added", &m.Added)
	f.str("added_by", &m.AddedBy, 256)
	f.i64("removed", &m.Removed)
	f.str("removed_by", &m.RemovedBy, 256)
	f.text("issuer", &m.Issuer, maxIssuer)
	f.str("number", &m.Number, maxWord)
	f.i64("this_update", &m.ThisUpdate)
	f.i64("next_update", &m.NextUpdate)
	f.u32("entries", &m.Entries)
}

func (m *TrustRemove) fields(f *fields) {
	f.str("domain", &m.Domain, maxDomain)
	f.str("role", &m.Role, maxWord)
	f.bin("sha256", &m.SHA256, maxDigest)
}

func (m *TrustVerify) fields(f *fields) {
	f.str("domain", &m.Domain, maxDomain)
	f.bins("chain", &m.Chain, maxChain, maxCertificate)
	f.i64("at", &m.At)
}

func (m *TrustVerdict) fields(f *fields) {
	f.bool("trusted", &m.Trusted)
	f.str("domain", &m.Domain, maxDomain)
	f.text("partner", &m.Partner, maxOrganization)
	list(f, "path", &m.Path, maxChain)
	list(f, "reasons", &m.Reasons, MaxVerdict)
}

func (m *TrustStep) fields(f *fields) {
	f.bin("certificate", &m.Certificate, maxCertificate)
	f.bool("unchecked", &m.Unchecked)
}

func (m *CRLAdd) fields(f *fields) {
	f.str("domain", &m.Domain, maxDomain)
	f.bin("data", &m.Data, maxCRL)
}

func (m *CertUpload) fields(f *fields) {
	f.str("key", &m.Key, keyspec.MaxRef)
	f.bool("other_domain", &m.OtherDomain)
	f.str("domain", &m.Domain, maxDomain)
	f.bin("data", &m.Data, MaxData)
}
