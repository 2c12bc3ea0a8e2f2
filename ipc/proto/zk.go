package proto

import "github.com/kmsd-project/kmsd/keystore/keyspec"

// Messages of MOSIP's zero-knowledge encryption. Key is a name APP/IDENTITY_CACHE: the AES key that wraps the random keys of an application.

// How many attributes and how many receivers of the random key one request has, and how many random keys.
const (
	MaxZKAttributes = 64
	MaxZKRecipients = 16
	MaxZKImport     = 1000
)

// Bounds of these messages, in bytes. With the 40,000 bytes that kmsd takes for the values in all, a reply fits a control frame.
const (
	maxPerson     = 1 << 10 // id of a person
	maxIdentifier = 128     // name of an attribute
)

// ZKAttribute is an attribute of a person, in plain or encrypted.
type ZKAttribute struct {
	Identifier string
	Value      []byte
}

// ZKEncrypt encrypts attributes of one person under a random key, which is chosen by chance.
type ZKEncrypt struct {
	Key        string
	ID         string // of the person
	Attributes []ZKAttribute
	Recipients []string // keys whose certificates the random key is encrypted to, without versions
}

// ZKEncryptReply has the attributes in the order of the request.
type ZKEncryptReply struct {
	Index      uint32 // of the random key
	Attributes []ZKAttribute
	Keys       [][]byte // for each recipient: SHA-256 of the certificate (32), the random key by RSA-OAEP
}

// ZKDecrypt decrypts attributes of one person.
type ZKDecrypt struct {
	Key        string
	ID         string
	Attributes []ZKAttribute
}

// ZKDecryptReply has the attributes in the order of the request.
type ZKDecryptReply struct {
	Attributes []ZKAttribute
}

// ZKRewrap takes a random key that was encrypted to an RSA key of this keystore, and wraps it by Key.
type ZKRewrap struct {
	Key     string
	From    string // the RSA key, NAME or NAME@VERSION
	Wrapped []byte // RSA-OAEP block
	Keep    bool   // the random key becomes that of Index here
	Index   uint32
}

// ZKRewrapReply is the random key as MOSIP's table data_encrypt_keystore has it.
type ZKRewrapReply struct {
	Wrapped []byte // 32 bytes
	Version uint32 // of Key
}

// ZKKey is a random key of another key manager.
type ZKKey struct {
	Index    uint32
	Wrapped  []byte // 32 bytes, by the version of the key that the request names
	Inactive bool   // for decryption only
}

// ZKImport brings in random keys. Key is NAME or NAME@VERSION, the version that wraps them.
type ZKImport struct {
	Key  string
	Keys []ZKKey // 1 to MaxZKImport
}

// ZKGenerate makes random keys until there are those with the indices below Count.
type ZKGenerate struct {
	Key   string
	Count uint32 // 0: 10,000, as MOSIP has
}

// ZKKeysReply says how many random keys there are more than before.
type ZKKeysReply struct {
	Added uint32
}

func (m *ZKAttribute) fields(f *fields) {
	f.str("identifier", &m.Identifier, maxIdentifier)
	f.bin("value", &m.Value, maxSealed)
}

func (m *ZKEncrypt) fields(f *fields) {
	f.str("key", &m.Key, keyspec.MaxRef)
	f.str("id", &m.ID, maxPerson)
	list(f, "attributes", &m.Attributes, MaxZKAttributes)
	f.strs("recipients", &m.Recipients, MaxZKRecipients, keyspec.MaxName)
}

func (m *ZKEncryptReply) fields(f *fields) {
	f.u32("index", &m.Index)
	list(f, "attributes", &m.Attributes, MaxZKAttributes)
	f.bins("keys", &m.Keys, MaxZKRecipients, 32+512)
}

func (m *ZKDecrypt) fields(f *fields) {
	f.str("key", &m.Key, keyspec.MaxRef)
	f.str("id", &m.ID, maxPerson)
	list(f, "attributes", &m.Attributes, MaxZKAttributes)
}

func (m *ZKDecryptReply) fields(f *fields) {
	list(f, "attributes", &m.Attributes, MaxZKAttributes)
}

func (m *ZKRewrap) fields(f *fields) {
	f.str("key", &m.Key, keyspec.MaxRef)
	f.str("from", &m.From, keyspec.MaxRef)
	f.bin("wrapped", &m.Wrapped, 512)
	f.bool("keep", &m.Keep)
	f.u32("index", &m.Index)
}

func (m *ZKRewrapReply) fields(f *fields) {
	f.bin("wrapped", &m.Wrapped, 32)
	f.u32("version", &m.Version)
}

func (m *ZKKey) fields(f *fields) {
	f.u32("index", &m.Index)
	f.bin("wrapped", &m.Wrapped, 32)
	f.bool("inactive", &m.Inactive)
}

func (m *ZKImport) fields(f *fields) {
	f.str("key", &m.Key, keyspec.MaxRef)
	list(f, "keys", &m.Keys, MaxZKImport)
}

func (m *ZKGenerate) fields(f *fields) {
	f.str("key", &m.Key, keyspec.MaxRef)
	f.u32("count", &m.Count)
}

func (m *ZKKeysReply) fields(f *fields) { f.u32("added", &m.Added) }
