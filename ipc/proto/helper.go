package proto

// The operations between kmsd and a driver that runs in a process of its own. They are no part of the public protocol: both ends are
// of one release, and HelperVersion is raised with every change of a message.
const (
	HelperVersion = 2

	OpHelperOpen       = "open"       // first on every connection
	OpHelperWrap       = "wrap"       // HelperWrap -> HelperReply.Blob
	OpHelperUnwrap     = "unwrap"     // HelperUnwrap -> HelperReply.Secret
	OpHelperHealth     = "health"     // Empty -> HelperReply.Health
	OpHelperForget     = "forget"     // HelperBlob -> empty HelperReply
	OpHelperLogin      = "login"      // HelperLogin -> empty HelperReply
	OpHelperGenerate   = "generate"   // HelperGenerate -> HelperReply.Blob and SPKI
	OpHelperDo         = "do"         // HelperDo -> HelperReply.Output, without Info
	OpHelperDestroy    = "destroy"    // HelperBlob -> empty HelperReply
	OpHelperMechanisms = "mechanisms" // Empty -> HelperReply.Mechanisms
	OpHelperCancel     = "cancel"     // Cancel -> no reply of its own
)

// Features of a driver, in HelperInfo.
const (
	HelperForget   = "forget"   // enclave.Forgetter
	HelperResident = "resident" // enclave.Resident
	HelperSession  = "session"  // enclave.Session
)

// Limits of a frame between kmsd and a helper, and of the input or the output of one operation with a resident key, in bytes. The
// latter is what a client may send in one frame, and what an AEAD adds to it.
const (
	MaxHelperFrame = 96 << 10
	MaxHelperData  = MaxData + 1<<10
)

const (
	maxHelperConfig = 16      // parameters
	maxHelperValue  = 4 << 10 // one parameter: a path, a label
	maxHelperBlob   = 9 << 10 // a blob of a driver
	maxHelperDetail = 512     // text for people
	maxHelperSecret = 64      // a slot secret
	maxHelperAAD    = 1 << 10 // bound to a blob
	maxHelperShares = 64      // shares of a recovery key
	maxHelperShare  = 512     // one share
	maxHelperTexts  = 16      // warnings, features
	maxHelperNonce  = 64      // of an AEAD
	maxHelperRows   = 256     // mechanisms
)

// HelperOpen says which device the connection is for.
type HelperOpen struct {
	Version uint32
	Kind    string            // keyring:file, pkcs11, ...
	Config  map[string]string // parameters of the driver, none of them secret
	PIN     []byte            // for enrolment with a device that wants one
}

// HelperWrap is Enclave.Wrap.
type HelperWrap struct{ Secret, AAD []byte }

// HelperUnwrap is Enclave.Unwrap.
type HelperUnwrap struct {
	Blob, AAD []byte
	Auth      []byte // PIN or passphrase
	Shares    [][]byte
}

// HelperBlob names a blob.
type HelperBlob struct{ Blob []byte }

// HelperLogin is Session.Login.
type HelperLogin struct {
	Auth   []byte
	Shares [][]byte
}

// MaxHelperFile is the length of the longest file that a helper takes a key over by, in bytes.
const MaxHelperFile = 4 << 10

// HelperGenerate is Resident.Generate, or Importer.Import.
type HelperGenerate struct {
	ID        []byte // 16 bytes
	Algorithm string
	Usages    []string
	AAD       []byte
	File      []byte // of a key that another program has made: Importer.Import
}

// HelperDo is Resident.Do.
type HelperDo struct {
	Blob          []byte
	Usage, Scheme string
	Digest        bool
	Input         []byte
	Nonce, AAD    []byte
	Bound         []byte
}

// HelperReply is the answer to every operation: a failure, or what the operation returns.
type HelperReply struct {
	Failure    HelperFailure
	Info       HelperInfo // with every success but that of do
	Blob       []byte
	Secret     []byte
	Health     HelperHealth
	SPKI       []byte
	Output     []byte
	Mechanisms []HelperMechanism
}

// HelperFailure is an error of the driver.
type HelperFailure struct {
	Kind   string // the sentinel; empty when there is no failure
	Detail string
	Remedy string
	Until  int64
}

// HelperInfo is Enclave.Info, and which optional interfaces the driver has.
type HelperInfo struct {
	Kind, Level, Binding string
	NeedsYou             bool
	Warnings             []string
	Features             []string
	MaxParallel          uint32 // of a driver with resident keys
}

// HelperMechanism is enclave.Mechanism.
type HelperMechanism struct {
	Algorithm, Usage string
	Schemes          []string
}

// HelperHealth is Enclave.Health.
type HelperHealth struct {
	State  string
	Until  int64
	Detail string
}

func (m *HelperOpen) fields(f *fields) {
	f.u32("version", &m.Version)
	f.str("kind", &m.Kind, maxWord)
	f.dict("config", &m.Config, maxHelperConfig, maxWord, maxHelperValue)
	f.bin("pin", &m.PIN, maxSecret)
}

func (m *HelperWrap) fields(f *fields) {
	f.bin("secret", &m.Secret, maxHelperSecret)
	f.bin("aad", &m.AAD, maxHelperAAD)
}

func (m *HelperUnwrap) fields(f *fields) {
	f.bin("blob", &m.Blob, maxHelperBlob)
	f.bin("aad", &m.AAD, maxHelperAAD)
	f.bin("auth", &m.Auth, maxSecret)
	f.bins("shares", &m.Shares, maxHelperShares, maxHelperShare)
}

func (m *HelperBlob) fields(f *fields) { f.bin("blob", &m.Blob, maxHelperBlob) }

func (m *HelperLogin) fields(f *fields) {
	f.bin("auth", &m.Auth, maxSecret)
	f.bins("shares", &m.Shares, maxHelperShares, maxHelperShare)
}

func (m *HelperGenerate) fields(f *fields) {
	f.bin("id", &m.ID, 16)
	f.str("algorithm", &m.Algorithm, maxWord)
	f.strs("usages", &m.Usages, maxWords, maxWord)
	f.bin("aad", &m.AAD, maxHelperAAD)
	f.bin("file", &m.File, MaxHelperFile)
}

func (m *HelperDo) fields(f *fields) {
	f.bin("blob", &m.Blob, maxHelperBlob)
	f.str("usage", &m.Usage, maxWord)
	f.str("scheme", &m.Scheme, maxWord)
	f.bool("digest", &m.Digest)
	f.bin("input", &m.Input, MaxHelperData)
	f.bin("nonce", &m.Nonce, maxHelperNonce)
	f.bin("aad", &m.AAD, maxAAD)
	f.bin("bound", &m.Bound, maxHelperAAD)
}

func (m *HelperReply) fields(f *fields) {
	f.msg("failure", &m.Failure)
	f.msg("info", &m.Info)
	f.bin("blob", &m.Blob, maxHelperBlob)
	f.bin("secret", &m.Secret, maxHelperSecret)
	f.msg("health", &m.Health)
	f.bin("spki", &m.SPKI, maxSPKI)
	f.bin("output", &m.Output, MaxHelperData)
	list(f, "mechanisms", &m.Mechanisms, maxHelperRows)
}

func (m *HelperMechanism) fields(f *fields) {
	f.str("algorithm", &m.Algorithm, maxWord)
	f.str("usage", &m.Usage, maxWord)
	f.strs("schemes", &m.Schemes, maxWords, maxWord)
}

func (m *HelperFailure) fields(f *fields) {
	f.str("kind", &m.Kind, maxWord)
	f.str("detail", &m.Detail, maxHelperDetail)
	f.str("remedy", &m.Remedy, maxHelperDetail)
	f.i64("until", &m.Until)
}

func (m *HelperInfo) fields(f *fields) {
	f.str("kind", &m.Kind, maxWord)
	f.str("level", &m.Level, maxHelperDetail)
	f.str("binding", &m.Binding, maxHelperDetail)
	f.bool("needs_you", &m.NeedsYou)
	f.strs("warnings", &m.Warnings, maxHelperTexts, maxHelperDetail)
	f.strs("features", &m.Features, maxHelperTexts, maxWord)
	f.u32("max_parallel", &m.MaxParallel)
}

func (m *HelperHealth) fields(f *fields) {
	f.str("state", &m.State, maxWord)
	f.i64("until", &m.Until)
	f.str("detail", &m.Detail, maxHelperDetail)
}
