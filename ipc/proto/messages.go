package proto

// Times on the wire are whole seconds since 1970-01-01 UTC. Where a message says so, 0 means "the default" and
// NoExpiry means "none, and that was asked for".
const NoExpiry = -1

// NoLimit as the uses of a key_set removes the limit of uses.
const NoLimit = -1

// Empty is the params or the result of an operation that has none.
type Empty struct{}

// Hello opens a connection. The server answers it before anything else.
type Hello struct {
	MinVersion uint32   // min: lowest protocol version the client speaks
	MaxVersion uint32   // max: highest
	Client     string   // client: name and version of the client software, for the audit
	Features   []string // features the client can use
}

// HelloReply tells the client what it talks to and how it is seen.
type HelloReply struct {
	Version     uint32
	Server      string
	Features    []string
	Limits      Limits
	Identity    Identity
	PolicyEpoch uint64
	Nonce       []byte // 16 bytes, to be sent back in bind
}

// Limits are the caps of this connection.
type Limits struct {
	ControlFrame uint32 // bytes
	DataFrame    uint32 // bytes
	InFlight     uint32 // requests
	StreamChunk  uint32 // plaintext bytes in one stream_update
	StreamWindow uint32 // chunks in flight on one stream
	Streams      uint32 // open streams on one connection
}

// Identity is a caller as the kernel describes it.
type Identity struct {
	UID       uint32
	GID       uint32
	PID       uint32
	Unit      string // systemd unit, empty when there is none
	Principal string // the name policy gives to this caller
	Admin     bool   // connected to the admin socket
}

// Bind answers the nonce of hello and so proves that the process that was looked at is the one that speaks.
type Bind struct{ Nonce []byte }

// Cancel names a request of the same connection that is no longer wanted.
type Cancel struct{ ID uint64 }

// Status describes the daemon.
type Status struct {
	Version          string
	Mode             string // user or system
	State            string // uninitialised, locked or ready
	StoreID          string // hexadecimal
	InstanceID       string // hexadecimal
	Epoch            uint64
	Keys             uint64
	ErasurePending   uint64 // destroyed versions and deleted documents whose bytes wait for the next epoch
	Rollback         string // "not detectable" or what detects it
	MemoryProtection string // full or partial
	Warnings         []string
	Slots            []Slot
	UptimeSeconds    uint64
	Connections      uint64
	Requests         uint64
	Panics           uint64
	Busy             uint64 // requests answered busy
	AuditEntries     uint64
	PolicyEpoch      uint64
	Escrow           []string // recipients every backup is also encrypted to
	StateDir         string   // of the daemon, told on the admin socket
	LockReason       string   // why the keystore is locked: the code of what failed; empty when it waits for a person
	LockDetail       string   // the same in words, with what to do about it
	StorePin         string   // what store_id in the configuration makes the only keystore that is opened; empty while locked
}

// Slot is one way to the root key.
type Slot struct {
	ID       uint32
	Kind     string // tpm, pkcs11, keyring:secret-service, keyfile, keyring:file, recovery
	Label    string
	Level    string // what it protects against, in words
	Health   string // ready, locked, locked-out, absent, replaced or misconfigured
	Until    int64  // end of a lock-out, 0 when there is none
	Binding  string // TPM SRK name, token serial, file
	Created  int64
	Location string // where its device is, as it is given to slot_add
	Detail   string // of its health, in words
}

// CapabilitiesReply lists what can be done, as data.
type CapabilitiesReply struct {
	Algorithms []Capability // one for each algorithm and protection that it can be had with
	Notes      []string     // why a protection is not there, or what it lacks
}

// Capability is one algorithm at one protection.
type Capability struct {
	Algorithm  string
	Protection string
	Usages     []string // what a key may be given
	Default    []string // what it gets when nothing is asked for
	Schemes    []string
	Class      string // modern or legacy
	Operations []string
}

// SelfTestReply lists the known-answer tests that were run.
type SelfTestReply struct{ Results []SelfTestResult }

// SelfTestResult is the outcome for one algorithm.
type SelfTestResult struct {
	Algorithm string
	Passed    bool
	Message   string
}

// Init makes the keystore of a daemon that has none.
type Init struct {
	Enclave    string   // auto, keyring:file, ...
	NoRecovery bool     // true: no recovery key is made
	PIN        []byte   // for enclaves that need one
	EscrowTo   []string // age recipients
	Confirm    []byte   // Pending of the reply before: the recovery key is safe, make the keystore; nothing else is given then
}

// InitReply carries the recovery key, once. The keystore is made when the client has confirmed on the same connection that the key is safe, or
// at once where there is none.
type InitReply struct {
	StoreID     string // empty while it is pending
	Slots       []Slot
	RecoveryKey []byte   // printable text, empty with NoRecovery
	Pending     []byte   // for Confirm
	Warnings    []string // what the administrator should know of the slots
	StorePin    string   // as in Status
}

// Unlock opens a locked keystore.
type Unlock struct {
	Slot   uint32   // 0: the slot the secret is for; without a secret, those that need nobody
	Secret []byte   // PIN, passphrase or recovery key text
	Shares [][]byte // recovery shares, instead of Secret

	AcceptRollback bool // the state of the files counts, although the counter of the device says that they are old
}

// KeyCreate makes a key. It is also the part of import, unwrap, agree and derive that describes the new key.
type KeyCreate struct {
	Name       string
	Algorithm  string
	Usage      []string // empty: the algorithm's default
	Protection string   // empty: software
	NotBefore  int64    // 0: now
	Expires    int64    // 0: the default cryptoperiod, NoExpiry: none
	Exportable bool
	Labels     map[string]string
	Profile    string // empty or mosip-module
	Keep       uint32 // versions kept for verify and decrypt; 0: all
	UsableVia  []string
	Durable    bool   // each use is on disk in the audit before it is answered
	Escrow     string // of a module key in a device: recipients (default) or none; see KeyInfo
	Uses       uint64 // how often the key may be used; 0: no limit
}

// KeyImportBegin asks for a one-time public key of the daemon to wrap material to.
type KeyImportBegin struct{}

// KeyImportBeginReply is an HPKE public key (RFC 9180: MLKEM768-X25519, HKDF-SHA256, AES-256-GCM) that opens one import
// on this connection. The info string is "kmsd import v1".
type KeyImportBeginReply struct {
	PublicKey []byte
	Token     []byte // 16 bytes, repeated in key_import
}

// KeyImport brings key material in. Exactly one of Material and Wrapped is set; Material is taken on the admin socket only.
type KeyImport struct {
	Key      KeyCreate
	Material []byte // PKCS#8 DER for asymmetric keys, raw bytes for symmetric ones
	Wrapped  []byte // the same, HPKE-sealed to the key of key_import_begin (enc || ciphertext)
	Token    []byte // from key_import_begin, with Wrapped
}

// KeyRef names a key or one version of it.
type KeyRef struct{ Key string }

// KeyInfo describes a key without its material.
type KeyInfo struct {
	Name       string
	Algorithm  string
	Usage      []string
	Schemes    []string
	Origin     string
	Protection string
	Profile    string
	Exportable bool
	Durable    bool
	Owner      uint32 // uid of the creator
	Labels     map[string]string
	UsableVia  []string
	Created    int64
	Current    uint32
	MinVersion uint32
	Keep       uint32
	Limited    bool   // to a number of uses
	UsesLeft   uint64 // with Limited
	Versions   []VersionInfo
	Escrow     string   // of a module key in a device: recipients or none, who can restore its base keys elsewhere
	Warnings   []string // what its owner should know, such as that there is no backup of it; not in lists
}

// VersionInfo describes one version of a key.
type VersionInfo struct {
	Version     uint32
	State       string
	Created     int64
	NotBefore   int64
	Expires     int64 // NoExpiry: none
	Reason      string
	Revoked     int64  // when it was revoked, 0: it was not
	DestroyAt   int64  // scheduled destruction, 0: none
	Invocations uint64 // AES-GCM invocations reserved so far
	SPKISHA256  []byte // digest of the SubjectPublicKeyInfo, empty for symmetric keys
}

// KeyList asks for one page of a namespace.
type KeyList struct {
	Prefix string // a namespace, or a namespace and the beginning of a reference; empty: every namespace (admin socket)
	After  []byte // Next of the page before
	Limit  uint32 // 0: 100; at most 100
}

// KeyListReply is one page.
type KeyListReply struct {
	Keys []KeyInfo
	Next []byte // empty: that was the last page
}

// KeyFind asks for the key whose public half or certificate has a digest.
type KeyFind struct {
	Kind  string // spki-sha256, ssh-sha256, cka-id or certificate-sha256
	Value []byte // 20 bytes for cka-id, else 32
}

// KeyFindReply is the key that was found, and which of its versions it was found by.
type KeyFindReply struct {
	Key     KeyInfo
	Version uint32
}

// KeySet changes what may be changed of a key.
type KeySet struct {
	Key        string
	Labels     map[string]string // to be set; an empty value removes the label
	MinVersion uint32            // 0: unchanged
	Keep       uint32            // 0: unchanged
	Uses       int64             // uses left from now on; 0: unchanged, NoLimit: no limit. More than before: admin socket
}

// KeyRotate makes a new version the current one.
type KeyRotate struct {
	Key       string
	NotBefore int64
	Expires   int64
}

// KeyRevoke takes a version, or of a key outside of the hierarchy all versions, out of use.
type KeyRevoke struct {
	Key     string
	Reason  string
	Replace string // yes: a new version is made; no: not until somebody rotates the key; empty: as the kind of key has it
}

// KeyDestroy schedules destruction.
type KeyDestroy struct {
	Key          string
	DelaySeconds uint64 // 0: the default, 7 days
	Now          bool   // at once, with a new epoch
}

// PublicReply is a public key.
type PublicReply struct {
	Algorithm string
	Version   uint32
	SPKI      []byte // SubjectPublicKeyInfo, DER
	CKAID     []byte // what key_find finds it by besides its SHA-256
	SSHSHA256 []byte // empty for a key that SSH has no form for
}

// Sign signs Data, or Digest when the scheme hashes first.
type Sign struct {
	Key      string
	Scheme   string // empty: the key's default
	Encoding string // der (default) or p1363, for ECDSA
	Data     []byte
	Digest   []byte
}

// SignReply carries a signature.
type SignReply struct {
	Signature []byte
	Version   uint32
}

// Verify checks a signature. A bad one is the error verification_failed.
type Verify struct {
	Key       string
	Scheme    string
	Encoding  string
	Data      []byte
	Digest    []byte
	Signature []byte
}

// VerifyReply says which version verified.
type VerifyReply struct {
	Version     uint32
	Compromised bool // the signature is right, but the key is compromised
}

// MAC authenticates Data.
type MAC struct {
	Key  string
	Data []byte
}

// MACReply carries a MAC.
type MACReply struct {
	MAC     []byte
	Version uint32
}

// MACVerify checks a MAC. A bad one is the error verification_failed.
type MACVerify struct {
	Key  string
	Data []byte
	MAC  []byte
}

// Encrypt seals Data under an AEAD key.
type Encrypt struct {
	Key  string
	Data []byte
	AAD  []byte
}

// EncryptReply carries a ciphertext with its header (docs/ciphertext-format.md).
type EncryptReply struct {
	Ciphertext []byte
	Version    uint32
}

// Decrypt opens a ciphertext. For RSA keys Ciphertext is the bare RSAES-OAEP block and Label its label.
type Decrypt struct {
	Key        string
	Ciphertext []byte
	AAD        []byte
	Label      []byte
	Scheme     string // of an RSA key: rsa-oaep-sha256 or rsa-oaep-mgf1sha1-sha256
}

// DecryptReply carries a plaintext.
type DecryptReply struct {
	Data    []byte
	Version uint32
}

// Rewrap encrypts a ciphertext again under the newest version; the plaintext stays inside.
type Rewrap struct {
	Key        string
	Ciphertext []byte
	AAD        []byte
}

// Wrap wraps the exportable key Target under the AES key Key with AES-KWP (RFC 5649).
type Wrap struct {
	Key    string
	Target string
}

// WrapReply carries a wrapped key.
type WrapReply struct {
	Wrapped []byte
	Version uint32
}

// Unwrap unwraps a key into the store.
type Unwrap struct {
	Key     string
	Wrapped []byte
	New     KeyCreate
}

// Agree runs Diffie-Hellman with Peer and stores HKDF-SHA256 of the secret as a new key.
type Agree struct {
	Key  string
	Peer []byte // SubjectPublicKeyInfo, DER
	Salt []byte
	Info []byte
	New  KeyCreate // Algorithm: an AEAD, HMAC or HKDF algorithm
}

// Derive stores HKDF of a key as a new key.
type Derive struct {
	Key  string
	Salt []byte
	Info []byte
	New  KeyCreate
}

// DataKey makes a fresh data key, sealed under an AEAD key.
type DataKey struct {
	Key         string
	Bytes       uint32 // 16, 32 or 64; 0: 32
	AAD         []byte
	NoPlaintext bool
}

// DataKeyReply carries a data key.
type DataKeyReply struct {
	Plaintext  []byte
	Ciphertext []byte
	Version    uint32
}

// Random asks for random bytes, at most 65,536 less the frame's overhead.
type Random struct{ Bytes uint32 }

// RandomReply carries random bytes.
type RandomReply struct{ Data []byte }

// Batch runs several operations of one frame in order. Each item stands for itself.
type Batch struct{ Items []BatchItem }

// BatchItem is one operation of a batch. Params is the encoded map of that operation.
type BatchItem struct {
	Op     string
	Params []byte
}

// BatchReply has one result for each item.
type BatchReply struct{ Items []BatchResult }

// BatchResult is the outcome of one item: an error, or the encoded result map.
type BatchResult struct {
	Error  *Error
	Result []byte
}

// StreamBegin opens a stream.
type StreamBegin struct {
	Op   string // encrypt, decrypt, mac or mac_verify
	Key  string
	AAD  []byte
	MAC  []byte // for op mac_verify
	Head []byte // for op decrypt: the header of the ciphertext
}

// StreamBeginReply names the stream.
type StreamBeginReply struct {
	Stream  uint64
	Version uint32
	Data    []byte // for op encrypt: the header of the ciphertext
}

// StreamUpdate feeds a stream. Chunks carry their number, from 0, so that pipelined ones cannot be confused.
type StreamUpdate struct {
	Stream uint64
	Chunk  uint64
	Data   []byte
}

// StreamData is what a stream gives back.
type StreamData struct {
	Data   []byte
	Credit uint32 // reserved: further chunks the server will take
	Done   bool   // for streams that are read, such as a backup
}

// StreamRef names a stream.
type StreamRef struct{ Stream uint64 }

// Subject is what a certificate or a request says about its holder.
type Subject struct {
	DN    string // RFC 4514 text, such as CN=host,O=Example
	DNS   []string
	IP    []string
	Email []string
	URI   []string
}

// CertRequest asks for a PKCS#10 request (RFC 2986).
type CertRequest struct {
	Key     string
	Subject Subject
}

// CertProfile says what a certificate allows.
type CertProfile struct {
	NotBefore int64 // 0: now
	NotAfter  int64 // 0: the expiry of the key, or 1 year
	CA        bool
	PathLen   int64    // -1: none
	KeyUsage  []string // RFC 5280 names; empty: by key usage
	ExtKeyUse []string // server-auth, client-auth, code-signing, email, time-stamping, ocsp-signing
}

// CertSelfSign asks for a self-signed certificate and attaches it to the key.
type CertSelfSign struct {
	Key     string
	Subject Subject
	Profile CertProfile
}

// CertIssue asks for a certificate signed by the key Issuer. Exactly one of Request (PKCS#10 DER) and Key is set; with
// Key the certificate and its chain are attached to that key.
type CertIssue struct {
	Issuer  string
	Request []byte
	Key     string
	Subject Subject
	Profile CertProfile
}

// CertAttach attaches a certificate and its chain, leaf first, to a key. The public key of the leaf must be the key's.
type CertAttach struct {
	Key   string
	Chain [][]byte
}

// CertChain is a chain of certificates in DER, leaf first, or one PKCS#10 request.
type CertChain struct{ Chain [][]byte }

// SlotListReply lists the ways to the root key.
type SlotListReply struct{ Slots []Slot }

// SlotAdd enrols a slot.
type SlotAdd struct {
	Enclave   string // keyring:file, recovery, recovery:shares, ...
	Label     string
	PIN       []byte
	Threshold uint32 // for recovery:shares
	Shares    uint32
	Confirm   []byte // Pending of the reply before: the secrets are safe, add the slot; nothing else is given then
}

// SlotAddReply shows what was made, secrets once. A slot with secrets is added when the client has confirmed on the same connection that they
// are safe.
type SlotAddReply struct {
	Slot     Slot
	Secrets  [][]byte // the recovery key, or the shares
	Pending  []byte   // for Confirm
	Warnings []string // what the administrator should know of the slot
}

// SlotRef names a slot.
type SlotRef struct {
	ID     uint32
	Secret []byte   // PIN or recovery key, for slots that need one
	Shares [][]byte // recovery shares
}

// SlotRemoveReply says what is left behind.
type SlotRemoveReply struct{ Warnings []string }

// ProgressReply is the outcome of a long act on the whole store.
type ProgressReply struct {
	Records  uint64
	Damaged  []string // names, or handles where the name cannot be read
	Messages []string
	Epoch    uint64
}

// BackupCreate asks for a backup. The reply is a stream that is read with empty stream_update requests until Done.
type BackupCreate struct{ Recipients []string }

// BackupReply names the stream of a backup.
type BackupReply struct {
	Stream     uint64
	Recipients []string // all, with those of the escrow
}

// AuditTail asks for entries from number From on, at most Limit; From 0 with Last true means the last Limit ones.
type AuditTail struct {
	From  uint64
	Limit uint32
	Last  bool
}

// AuditTailReply carries decrypted entries.
type AuditTailReply struct {
	Entries []AuditEntry
	Next    uint64
}

// AuditEntry is one use or act.
type AuditEntry struct {
	Number    uint64
	Time      int64 // milliseconds since 1970-01-01 UTC
	Op        string
	Key       string
	Version   uint32
	UID       uint32
	PID       uint32
	Principal string
	Via       string
	Client    string // what the caller's software calls itself
	Trace     string // of the request
	Allowed   bool
	Code      string // ok, or the wire code of the error
	Detail    string
	DetailID  string
	Epoch     uint64 // of the policy
}

// AuditHead is the size and root of the audit tree (RFC 6962).
type AuditHead struct {
	Size uint64
	Root []byte
}
