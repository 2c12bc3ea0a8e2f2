package proto

// The operations between kmsd and a driver that runs in a process of its own. They are no part of the public protocol: both ends are
// of one release, and HelperVersion is raised with every change of a message.
const (
	HelperVersion = 1

	OpHelperOpen   = "open"   // first on every connection
	OpHelperWrap   = "wrap"   // HelperWrap -> HelperReply.Blob
	OpHelperUnwrap = "unwrap" // HelperUnwrap -> HelperReply.Secret
	OpHelperHealth = "health" // Empty -> HelperReply.Health
	OpHelperForget = "forget" // HelperBlob -> empty HelperReply
	OpHelperCancel = "cancel" // Cancel -> no reply of its own
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

// HelperReply is the answer to every operation: a failure, or what the operation returns.
type HelperReply struct {
	Failure HelperFailure
	Info    HelperInfo // with every success
	Blob    []byte
	Secret  []byte
	Health  HelperHealth
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

func (m *HelperReply) fields(f *fields) {
	f.msg("failure", &m.Failure)
	f.msg("info", &m.Info)
	f.bin("blob", &m.Blob, maxHelperBlob)
	f.bin("secret", &m.Secret, maxHelperSecret)
	f.msg("health", &m.Health)
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
}

func (m *HelperHealth) fields(f *fields) {
	f.str("state", &m.State, maxWord)
	f.i64("until", &m.Until)
	f.str("detail", &m.Detail, maxHelperDetail)
}
