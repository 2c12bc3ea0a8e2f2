package proto

import "github.com/kmsd-project/kmsd/keystore/keyspec"

// Messages of the hierarchy: applications with their root, module, sign and base keys, as MOSIP has them.

// Bounds of these messages, in bytes or in elements.
const (
	maxNamePart   = 128 // of a distinguished name; RFC 5280 appendix A.1 allows 64 characters
	maxNames      = 16  // alternative names of one certificate
	maxName       = 320 // alternative name with its kind
	maxReferences = 256 // keys of an application that are made with it
)

// MaxApplications is how many applications one page carries.
const MaxApplications = 64

// MaxApplication is the length of the longest Application in bytes, as AppendParams writes it.
const MaxApplication = 32 << 10

// DN is the name of the holder of a certificate in the order of MOSIP's: C, ST, L, O, OU, CN. An empty part is the
// default of the application.
type DN struct {
	Country            string
	State              string
	Locality           string
	Organization       string
	OrganizationalUnit string
	CommonName         string
}

// Application is what the keys of one application are made by: how long they are valid, and whom their certificates name. What is
// not set comes from the validity profile and from the application ROOT.
type Application struct {
	Name              string
	Profile           string // validity profile: mosip-docs or mosip-deployed
	Days              uint32 // validity of root, module and sign keys
	PreExpireDays     uint32 // how many days before the end such keys are replaced
	BaseDays          uint32 // validity of base keys
	BasePreExpireDays uint32
	Algorithm         string // of the module key
	Protection        string // of new root, module and sign keys
	Subject           DN
	Names             []AltNames
	References        []AppReference // what hierarchy generate makes besides the module key
	Inactive          bool           // no new keys
	BuiltIn           bool           // nobody has set it
}

// AltNames are the alternative names of the certificates of one key of an application.
type AltNames struct {
	Reference string   // empty: of the module key
	Names     []string // kind:value with the kinds dns, ip, email and uri
}

// AppReference is a key of an application that is made with it.
type AppReference struct {
	Reference string
	Algorithm string // aes-256-gcm; empty: a sign key or a base key, as the name says
	Days      uint32 // of a symmetric key
}

// AppRef names an application.
type AppRef struct {
	Name     string
	Settings bool // as it was set, without what profile and ROOT give
}

// AppList asks for one page of applications.
type AppList struct {
	After string // name of the last one of the page before
	Limit uint32 // 0, and at most: MaxApplications
}

// AppListReply is one page, by name.
type AppListReply struct {
	Applications []Application
	Next         string // empty: that was the last page
}

// MasterGenerate makes the root key, a module key or a sign key of the hierarchy, with its certificate, or an AES key of an application.
type MasterGenerate struct {
	Key        string
	Force      bool // a new version although there is a current one
	CSR        bool // the answer is a request to an outside authority instead of a certificate
	Symmetric  bool // an AES key, where the application does not say so
	Protection string
	Escrow     string
	Subject    DN
	Names      []string // as in AltNames; empty: those of the application
}

// CertCurrent asks for the certificate of the current version of a key, and has kmsd make or rotate the key where the policy
// of its application says so.
type CertCurrent struct {
	Key     string
	Subject DN
	Names   []string
}

// Certified is a key with its certificate.
type Certified struct {
	Key       string   // NAME@VERSION
	Chain     [][]byte // DER, leaf first, up to the root; empty when there is no certificate yet
	Request   []byte   // PKCS#10, where one was asked for
	KeyID     string   // MOSIP's kid
	NotBefore int64
	Expires   int64
	Made      bool // by this request
}

// CertList asks for the certificates of all versions of a key.
type CertList struct {
	Key   string
	After uint32 // Next of the page before
}

// CertListReply is one page, the newest version first.
type CertListReply struct {
	Certificates []CertVersion
	Next         uint32 // 0: that was the last page
}

// CertVersion is the certificate of one version of a key.
type CertVersion struct {
	Version     uint32
	State       string
	KeyID       string
	Created     int64
	NotBefore   int64 // of the version; the certificate has dates of its own
	Expires     int64
	Revoked     int64  // when it was revoked, 0: it was not
	Reason      string // why
	Certificate []byte // DER, without its chain
}

// Clock is what kmsd goes by when it issues certificates and rotates keys.
type Clock struct {
	Now  int64 // the clock of the machine
	Seen int64 // the latest time that the keystore had seen
}

func (m *DN) fields(f *fields) {
	f.str("country", &m.Country, maxNamePart)
	f.str("state", &m.State, maxNamePart)
	f.str("locality", &m.Locality, maxNamePart)
	f.str("organization", &m.Organization, maxNamePart)
	f.str("organizational_unit", &m.OrganizationalUnit, maxNamePart)
	f.str("common_name", &m.CommonName, maxNamePart)
}

func (m *Application) fields(f *fields) {
	f.str("name", &m.Name, keyspec.MaxName)
	f.str("profile", &m.Profile, maxWord)
	f.u32("days", &m.Days)
	f.u32("pre_expire_days", &m.PreExpireDays)
	f.u32("base_days", &m.BaseDays)
	f.u32("base_pre_expire_days", &m.BasePreExpireDays)
	f.str("algorithm", &m.Algorithm, maxWord)
	f.str("protection", &m.Protection, maxWord)
	f.msg("subject", &m.Subject)
	list(f, "names", &m.Names, maxReferences)
	list(f, "references", &m.References, maxReferences)
	f.bool("inactive", &m.Inactive)
	f.bool("built_in", &m.BuiltIn)
}

func (m *AltNames) fields(f *fields) {
	f.str("reference", &m.Reference, keyspec.MaxName)
	f.strs("names", &m.Names, maxNames, maxName)
}

func (m *AppReference) fields(f *fields) {
	f.str("reference", &m.Reference, keyspec.MaxName)
	f.str("algorithm", &m.Algorithm, maxWord)
	f.u32("days", &m.Days)
}

func (m *AppRef) fields(f *fields) {
	f.str("name", &m.Name, keyspec.MaxName)
	f.bool("settings", &m.Settings)
}

func (m *AppList) fields(f *fields) {
	f.str("after", &m.After, keyspec.MaxName)
	f.u32("limit", &m.Limit)
}

func (m *AppListReply) fields(f *fields) {
	list(f, "applications", &m.Applications, MaxApplications)
	f.str("next", &m.Next, keyspec.MaxName)
}

func (m *MasterGenerate) fields(f *fields) {
	f.str("key", &m.Key, keyspec.MaxName)
	f.bool("force", &m.Force)
	f.bool("csr", &m.CSR)
	f.bool("symmetric", &m.Symmetric)
	f.str("protection", &m.Protection, maxWord)
	f.str("escrow", &m.Escrow, maxWord)
	f.msg("subject", &m.Subject)
	f.strs("names", &m.Names, maxNames, maxName)
}

func (m *CertCurrent) fields(f *fields) {
	f.str("key", &m.Key, keyspec.MaxName)
	f.msg("subject", &m.Subject)
	f.strs("names", &m.Names, maxNames, maxName)
}

func (m *Certified) fields(f *fields) {
	f.str("key", &m.Key, keyspec.MaxRef)
	f.bins("chain", &m.Chain, maxChain, maxCertificate)
	f.bin("request", &m.Request, maxCertificate)
	f.str("key_id", &m.KeyID, maxWord)
	f.i64("not_before", &m.NotBefore)
	f.i64("expires", &m.Expires)
	f.bool("made", &m.Made)
}

func (m *CertList) fields(f *fields) {
	f.str("key", &m.Key, keyspec.MaxName)
	f.u32("after", &m.After)
}

func (m *CertListReply) fields(f *fields) {
	list(f, "certificates", &m.Certificates, keyspec.MaxVersions)
	f.u32("next", &m.Next)
}

func (m *CertVersion) fields(f *fields) {
	f.u32("version", &m.Version)
	f.str("state", &m.State, maxWord)
	f.str("key_id", &m.KeyID, maxWord)
	f.i64("created", &m.Created)
	f.i64("not_before", &m.NotBefore)
	f.i64("expires", &m.Expires)
	f.i64("revoked", &m.Revoked)
	f.str("reason", &m.Reason, maxWord)
	f.bin("certificate", &m.Certificate, maxCertificate)
}

func (m *Clock) fields(f *fields) {
	f.i64("now", &m.Now)
	f.i64("seen", &m.Seen)
}
