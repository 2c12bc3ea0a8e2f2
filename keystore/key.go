package keystore

import (
	"time"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// Limits of one key.
const (
	MaxMaterial = 9 << 10   // bytes of material of one version: what a device gives out for a resident key may be that long
	KeyMaterial = 512       // bytes of material of one version that is a private key itself
	MaxMetadata = 256 << 10 // bytes of the encoded metadata of one key, all versions together
	MaxPublic   = 64 << 10  // bytes of the encoded public part of one version, chain included

	// MaxThumbprints is how many of the certificates that a version had before its present one it goes by; then the oldest is forgotten.
	MaxThumbprints = 16
)

// Key is the metadata of a key and of all its versions. The store keeps it and gives it no meaning beyond its structure.
type Key struct {
	Name       keyspec.Name
	Algorithm  keyspec.Algorithm
	Usages     []keyspec.Usage
	Origin     keyspec.Origin
	Protection keyspec.Protection
	Profile    string // the policy profile the key was made with, if any
	Exportable bool
	Durable    bool // each use is in the audit log before it is answered
	Owner      uint32
	Labels     map[string]string
	UsableVia  []string
	Created    time.Time
	Current    keyspec.Version // the version used when none is named
	MinVersion keyspec.Version // older versions are refused
	Keep       uint32          // versions to keep when rotating, 0 for all
	Limited    bool            // the uses of the key, all versions together, are counted
	UsesLeft   uint64          // with Limited: uses that are not reserved yet, in blocks, by the caller
	Versions   []Version       // ascending by number

	// Revision counts the commits that changed the key. In a Change it is the revision the change is based on; zero creates.
	Revision uint64
}

// Version is the metadata of one version of a key. Times have a resolution of one second; the zero time is "not set".
type Version struct {
	Number      keyspec.Version // from 1
	State       keyspec.State
	Created     time.Time
	NotBefore   time.Time
	Expires     time.Time
	Reason      keyspec.Reason // why it was revoked
	Revoked     time.Time
	DestroyAt   time.Time
	Invocations uint64 // reserved in blocks by the caller, never decreasing
	SPKISHA256  [32]byte

	public      uint64     // revision of the public record
	aliases     [][32]byte // places of the aliases that do not follow from the public part
	thumbprints [][32]byte // places of the aliases that follow from earlier certificates, oldest first
}

// Public is the part of a key version that is no secret: the SubjectPublicKeyInfo in DER, empty for a symmetric key, and the
// certificate chain in DER, leaf first.
type Public struct {
	SPKI  []byte
	Chain [][]byte
}

// AliasKind says what an alias of a key version is made of.
type AliasKind string

// The kinds of alias. The store itself keeps AliasSPKI and AliasThumbprint in step with the public part; the others come with
// a Change. When a version gets another certificate for the same public key it also keeps the thumbprint of the one before, since what was
// encrypted to that names it. A version that is destroyed has no aliases any more. They are for bridges, which know a key by such a value
// and not by its name.
const (
	AliasSPKI       AliasKind = "spki-sha256"        // SHA-256 of the SubjectPublicKeyInfo, 32 bytes
	AliasThumbprint AliasKind = "certificate-sha256" // SHA-256 of a leaf certificate, the present one or an earlier one, 32 bytes
	AliasCKAID      AliasKind = "cka-id"             // PKCS#11 CKA_ID
	AliasSSH        AliasKind = "ssh-sha256"         // SHA-256 of the SSH wire form of the public key, 32 bytes
)

// Alias is another way to find a key version.
type Alias struct {
	Kind    AliasKind
	Value   []byte
	Version keyspec.Version
}

// Change is what a commit does to one key.
type Change struct {
	// Key as it shall be. Its Revision is the one the change is based on; zero creates the key. Apply does not modify it.
	Key *Key
	// Material of new versions, in the mechanism's canonical form. A version's material is written once and never replaced. Those of
	// a key whose origin is keyspec.Foreign have none, but have to have a public half; and such a key is not the module key of its
	// namespace, whatever its name.
	Material map[keyspec.Version][]byte
	// Public parts to write or replace. A new version without an entry here gets an empty one.
	Public map[keyspec.Version]Public
	// Erase drops the data keys of these versions; their material is unreadable from then on. The caller sets their state.
	Erase []keyspec.Version
	// Aliases to add besides those that follow from Public. They go with the version when it is destroyed.
	Aliases []Alias
	// Guard, of a module key, has a device guard the wrapping key of its namespace, or wraps it again for another device or
	// another version of the module key. The namespace must not have any other keys, unless it was guarded before, and then the
	// key has to be the same: ErrGuard, ErrNamespaceKey. Once guarded, every new version of the module key needs a Guard. The
	// commit opens the namespace.
	Guard *NamespaceGuard

	unguard []byte // the wrapping key of a namespace that shall not be guarded any more
}

// Commit is a set of changes that happen together or not at all.
type Commit struct {
	Changes   []Change
	Documents []DocumentChange
	// Audit is put into the outbox in the same transaction, unless it is empty.
	Audit []byte
	// RequestKey makes the commit idempotent for 24 hours: a second commit with the same one changes nothing and is answered
	// with a *DuplicateError. It needs a change of a key. The caller puts its own client's identity into it.
	RequestKey []byte
}

// OutboxEntry is an audit entry that was committed with a change and awaits being copied to the log.
type OutboxEntry struct {
	Seq  uint64
	Data []byte
}
