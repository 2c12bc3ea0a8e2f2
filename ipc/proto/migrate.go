package proto

import "github.com/kmsd-project/kmsd/keystore/keyspec"

// KeyMigrate brings in one key of a MOSIP key manager with all its generations, which become the versions of one key in one commit. Done
// again it finds what is there. A request may be a data frame.
type KeyMigrate struct {
	Name        string
	Algorithm   string       // empty: that of the certificates, or aes-256-gcm without any
	Protection  string       // software when empty, or hsm: the key is in the device already and stays there
	Escrow      string       // of a module key in a device: recipients or none
	Token       []byte       // of key_import_begin, when generations are sealed
	Generations []Generation // 1 to 256, the oldest first
}

// Generation is one generation of a key of MOSIP. It has at most one of Wrapped, Sealed and Reference; without one its private half is
// somebody else's.
type Generation struct {
	Created     int64
	Expires     int64
	Certificate []byte // DER; none for a symmetric key
	Unique      string // uni_ident, 40 hexadecimal digits, when it is not what application, reference and the day of Created make of it
	Wrapped     []byte // private half as table key_store has it, not in base64
	Module      []byte // SHA-256 of the SubjectPublicKeyInfo of the module key that wraps it
	Sealed      []byte // private half (PKCS#8, DER) or symmetric key, sealed to the key of key_import_begin
	Reference   []byte // what the device knows the key by: "pkcs11:object=" and its label, percent-encoded (RFC 7512)
}

// KeyMigrateReply says what came of it.
type KeyMigrateReply struct {
	Outcome string // made, extended or present
	Key     KeyInfo
}

// KeyExportMOSIP asks for a base key as MOSIP's table key_store has it.
type KeyExportMOSIP struct {
	Key     string
	Module  uint32 // version of the module key that wraps it, 0: the current one
	Confirm bool   // although the key is not exportable
}

// KeyExportMOSIPReply is the key, wrapped.
type KeyExportMOSIPReply struct {
	Key     string // with the version
	Wrapped []byte
	Chain   [][]byte // DER, leaf first
	Module  string   // the module key, with the version
	Issuer  []byte   // certificate of the module key, DER
}

// Bounds of a migration, in bytes.
const (
	maxWrapped   = 9 << 10
	maxReference = 1 << 10
)

func (m *KeyMigrate) fields(f *fields) {
	f.str("name", &m.Name, keyspec.MaxName)
	f.str("algorithm", &m.Algorithm, maxWord)
	f.str("protection", &m.Protection, maxWord)
	f.str("escrow", &m.Escrow, maxWord)
	f.bin("token", &m.Token, maxWord)
	list(f, "generations", &m.Generations, keyspec.MaxVersions)
}

func (m *Generation) fields(f *fields) {
	f.i64("created", &m.Created)
	f.i64("expires", &m.Expires)
	f.bin("certificate", &m.Certificate, maxCertificate)
	f.str("unique", &m.Unique, maxWord)
	f.bin("wrapped", &m.Wrapped, maxWrapped)
	f.bin("module", &m.Module, 32)
	f.bin("sealed", &m.Sealed, maxMaterial)
	f.bin("reference", &m.Reference, maxReference)
}

func (m *KeyMigrateReply) fields(f *fields) {
	f.str("outcome", &m.Outcome, maxWord)
	f.msg("key", &m.Key)
}

func (m *KeyExportMOSIP) fields(f *fields) {
	f.str("key", &m.Key, keyspec.MaxRef)
	f.u32("module", &m.Module)
	f.bool("confirm", &m.Confirm)
}

func (m *KeyExportMOSIPReply) fields(f *fields) {
	f.str("key", &m.Key, keyspec.MaxRef)
	f.bin("wrapped", &m.Wrapped, maxWrapped)
	f.bins("chain", &m.Chain, maxChain, maxCertificate)
	f.str("module", &m.Module, keyspec.MaxRef)
	f.bin("issuer", &m.Issuer, maxCertificate)
}
