package proto

import "github.com/kmsd-project/kmsd/keystore/keyspec"

// Bounds of fields, in bytes or in elements.
const (
	maxWord        = 64               // words of the vocabulary and other short names
	maxText        = 1024             // text for people
	maxWarning     = 512              // a warning of status
	maxSlotLabel   = 128              // of a slot
	maxSlotText    = 192              // level and location of a slot
	maxSlotBinding = 96               // binding of a slot
	maxSlotDetail  = 256              // detail of the health of a slot
	confirmSize    = 16               // what a client confirms with
	maxFinding     = 512              // a finding of a verification
	maxAAD         = 16 << 10         // additional data of an AEAD
	maxInfo        = 1 << 10          // salt and info of HKDF, label of OAEP
	maxSecret      = 4 << 10          // PIN, passphrase, recovery key, share
	maxShares      = 255              // shares of a recovery key
	maxSPKI        = 4 << 10          // SubjectPublicKeyInfo
	maxCertificate = 16 << 10         // one certificate or request
	maxChain       = 16               // certificates
	maxMaterial    = 16 << 10         // key material, plain or wrapped
	maxSealed      = MaxData + 1<<10  // ciphertext of MaxData
	maxStreamData  = MaxChunk + 2<<10 // chunk of a stream, in either direction
	maxList        = 1000             // elements of a list in a reply
	maxBatch       = 256              // items of a batch
	maxAltNames    = 64               // of each kind
	maxCursor      = 512              // continuation of a list
	maxWords       = 32               // words in one field
	maxSignature   = 4 << 10          // signature or MAC
	maxRandom      = MaxControlFrame  // what fits a control frame
	maxEncoded     = MaxControlFrame  // a message inside a batch
)

// How much of its kind one reply carries. Together with the bounds above this keeps every reply within a control frame.
const (
	MaxWarnings = 16  // in status
	MaxFindings = 100 // of a verification
	MaxMessages = 4   // of an act on the whole store
)

// MaxSpec is the length of the longest spec of an enclave in bytes.
const MaxSpec = 1 << 10

func (m *Empty) fields(*fields) {}

func (m *Hello) fields(f *fields) {
	f.u32("min_version", &m.MinVersion)
	f.u32("max_version", &m.MaxVersion)
	f.str("client", &m.Client, 128)
	f.strs("features", &m.Features, maxWords, maxWord)
}

func (m *HelloReply) fields(f *fields) {
	f.u32("version", &m.Version)
	f.str("server", &m.Server, 128)
	f.strs("features", &m.Features, maxWords, maxWord)
	f.msg("limits", &m.Limits)
	f.msg("identity", &m.Identity)
	f.u64("policy_epoch", &m.PolicyEpoch)
	f.bin("nonce", &m.Nonce, NonceSize)
}

func (m *Limits) fields(f *fields) {
	f.u32("control_frame", &m.ControlFrame)
	f.u32("data_frame", &m.DataFrame)
	f.u32("in_flight", &m.InFlight)
	f.u32("stream_chunk", &m.StreamChunk)
	f.u32("stream_window", &m.StreamWindow)
	f.u32("streams", &m.Streams)
}

func (m *Identity) fields(f *fields) {
	f.u32("uid", &m.UID)
	f.u32("gid", &m.GID)
	f.u32("pid", &m.PID)
	f.str("unit", &m.Unit, 256)
	f.str("principal", &m.Principal, 256)
	f.bool("admin", &m.Admin)
}

func (m *Bind) fields(f *fields) { f.bin("nonce", &m.Nonce, NonceSize) }

func (m *Cancel) fields(f *fields) { f.u64("id", &m.ID) }

func (m *Error) fields(f *fields) {
	f.str("code", (*string)(&m.Code), maxWord)
	f.str("class", (*string)(&m.Class), maxWord)
	f.text("message", &m.Message, maxText)
	f.u64("retry_after_ms", &m.RetryAfterMS)
	f.bool("safe_to_retry", &m.SafeToRetry)
	f.text("backend_state", &m.BackendState, maxText)
	f.str("detail_id", &m.DetailID, maxWord)
	f.text("remedy", &m.Remedy, maxText)
}

func (m *Status) fields(f *fields) {
	f.str("version", &m.Version, 128)
	f.str("mode", &m.Mode, maxWord)
	f.str("state", &m.State, maxWord)
	f.str("store_id", &m.StoreID, maxWord)
	f.str("instance_id", &m.InstanceID, maxWord)
	f.u64("epoch", &m.Epoch)
	f.u64("keys", &m.Keys)
	f.u64("erasure_pending", &m.ErasurePending)
	f.text("rollback", &m.Rollback, maxText)
	f.str("memory_protection", &m.MemoryProtection, maxWord)
	f.texts("warnings", &m.Warnings, MaxWarnings, maxWarning)
	list(f, "slots", &m.Slots, keyspec.MaxSlots)
	f.u64("uptime_seconds", &m.UptimeSeconds)
	f.u64("connections", &m.Connections)
	f.u64("requests", &m.Requests)
	f.u64("panics", &m.Panics)
	f.u64("busy", &m.Busy)
	f.u64("audit_entries", &m.AuditEntries)
	f.u64("policy_epoch", &m.PolicyEpoch)
	f.strs("escrow", &m.Escrow, keyspec.MaxRecipients, keyspec.MaxRecipient)
	f.str("state_dir", &m.StateDir, 4<<10)
	f.str("lock_reason", &m.LockReason, maxWord)
	f.text("lock_detail", &m.LockDetail, maxText)
	f.str("store_pin", &m.StorePin, 2*maxWord)
}

func (m *Slot) fields(f *fields) {
	f.u32("id", &m.ID)
	f.str("kind", &m.Kind, maxWord)
	f.text("label", &m.Label, maxSlotLabel)
	f.text("level", &m.Level, maxSlotText)
	f.text("health", &m.Health, maxWord)
	f.i64("until", &m.Until)
	f.text("binding", &m.Binding, maxSlotBinding)
	f.i64("created", &m.Created)
	f.text("location", &m.Location, maxSlotText)
	f.text("detail", &m.Detail, maxSlotDetail)
}

func (m *CapabilitiesReply) fields(f *fields) {
	list(f, "algorithms", &m.Algorithms, maxList)
	f.texts("notes", &m.Notes, MaxWarnings, maxWarning)
}

func (m *Capability) fields(f *fields) {
	f.str("algorithm", &m.Algorithm, maxWord)
	f.str("protection", &m.Protection, maxWord)
	f.strs("usages", &m.Usages, maxWords, maxWord)
	f.strs("default", &m.Default, maxWords, maxWord)
	f.strs("schemes", &m.Schemes, maxWords, maxWord)
	f.str("class", &m.Class, maxWord)
	f.strs("operations", &m.Operations, maxWords, maxWord)
}

func (m *SelfTestReply) fields(f *fields) { list(f, "results", &m.Results, maxList) }

func (m *SelfTestResult) fields(f *fields) {
	f.str("algorithm", &m.Algorithm, maxWord)
	f.bool("passed", &m.Passed)
	f.text("message", &m.Message, maxWarning)
}

func (m *Init) fields(f *fields) {
	f.str("enclave", &m.Enclave, MaxSpec)
	f.bool("no_recovery", &m.NoRecovery)
	f.bin("pin", &m.PIN, maxSecret)
	f.strs("escrow_to", &m.EscrowTo, keyspec.MaxRecipients, keyspec.MaxRecipient)
	f.bin("confirm", &m.Confirm, confirmSize)
}

func (m *InitReply) fields(f *fields) {
	f.str("store_id", &m.StoreID, maxWord)
	list(f, "slots", &m.Slots, keyspec.MaxSlots)
	f.bin("recovery_key", &m.RecoveryKey, maxSecret)
	f.bin("pending", &m.Pending, confirmSize)
	f.texts("warnings", &m.Warnings, MaxWarnings, maxWarning)
	f.str("store_pin", &m.StorePin, 2*maxWord)
}

func (m *Unlock) fields(f *fields) {
	f.u32("slot", &m.Slot)
	f.bin("secret", &m.Secret, maxSecret)
	f.bins("shares", &m.Shares, maxShares, maxSecret)
	f.bool("accept_rollback", &m.AcceptRollback)
}

func (m *KeyCreate) fields(f *fields) {
	f.str("name", &m.Name, keyspec.MaxName)
	f.str("algorithm", &m.Algorithm, maxWord)
	f.strs("usage", &m.Usage, maxWords, maxWord)
	f.str("protection", &m.Protection, maxWord)
	f.i64("not_before", &m.NotBefore)
	f.i64("expires", &m.Expires)
	f.bool("exportable", &m.Exportable)
	f.dict("labels", &m.Labels, keyspec.MaxLabels, keyspec.MaxLabelName, keyspec.MaxLabelValue)
	f.str("profile", &m.Profile, maxWord)
	f.u32("keep", &m.Keep)
	f.strs("usable_via", &m.UsableVia, keyspec.MaxUsableVia, keyspec.MaxBridgeName)
	f.bool("durable", &m.Durable)
	f.str("escrow", &m.Escrow, maxWord)
	f.u64("uses", &m.Uses)
}

func (m *KeyImportBegin) fields(*fields) {}

func (m *KeyImportBeginReply) fields(f *fields) {
	f.bin("public_key", &m.PublicKey, maxSPKI)
	f.bin("token", &m.Token, 16)
}

func (m *KeyImport) fields(f *fields) {
	f.msg("key", &m.Key)
	f.bin("material", &m.Material, maxMaterial)
	f.bin("wrapped", &m.Wrapped, maxMaterial)
	f.bin("token", &m.Token, 16)
}

func (m *KeyRef) fields(f *fields) { f.str("key", &m.Key, keyspec.MaxRef) }

func (m *KeyInfo) fields(f *fields) {
	f.str("name", &m.Name, keyspec.MaxName)
	f.str("algorithm", &m.Algorithm, maxWord)
	f.strs("usage", &m.Usage, maxWords, maxWord)
	f.strs("schemes", &m.Schemes, maxWords, maxWord)
	f.str("origin", &m.Origin, maxWord)
	f.str("protection", &m.Protection, maxWord)
	f.str("profile", &m.Profile, maxWord)
	f.bool("exportable", &m.Exportable)
	f.bool("durable", &m.Durable)
	f.u32("owner", &m.Owner)
	f.dict("labels", &m.Labels, keyspec.MaxLabels, keyspec.MaxLabelName, keyspec.MaxLabelValue)
	f.strs("usable_via", &m.UsableVia, keyspec.MaxUsableVia, keyspec.MaxBridgeName)
	f.i64("created", &m.Created)
	f.u32("current", &m.Current)
	f.u32("min_version", &m.MinVersion)
	f.u32("keep", &m.Keep)
	f.bool("limited", &m.Limited)
	f.u64("uses_left", &m.UsesLeft)
	list(f, "versions", &m.Versions, keyspec.MaxVersions)
	f.str("escrow", &m.Escrow, maxWord)
	f.texts("warnings", &m.Warnings, MaxWarnings, maxWarning)
}

func (m *VersionInfo) fields(f *fields) {
	f.u32("version", &m.Version)
	f.str("state", &m.State, maxWord)
	f.i64("created", &m.Created)
	f.i64("not_before", &m.NotBefore)
	f.i64("expires", &m.Expires)
	f.str("reason", &m.Reason, maxWord)
	f.i64("revoked", &m.Revoked)
	f.i64("destroy_at", &m.DestroyAt)
	f.u64("invocations", &m.Invocations)
	f.bin("spki_sha256", &m.SPKISHA256, 32)
}

func (m *KeyList) fields(f *fields) {
	f.str("prefix", &m.Prefix, keyspec.MaxName)
	f.bin("after", &m.After, maxCursor)
	f.u32("limit", &m.Limit)
}

func (m *KeyListReply) fields(f *fields) {
	list(f, "keys", &m.Keys, maxList)
	f.bin("next", &m.Next, maxCursor)
}

func (m *KeyFind) fields(f *fields) {
	f.str("kind", &m.Kind, maxWord)
	f.bin("value", &m.Value, maxWord)
}

func (m *KeyFindReply) fields(f *fields) {
	f.msg("key", &m.Key)
	f.u32("version", &m.Version)
}

func (m *KeySet) fields(f *fields) {
	f.str("key", &m.Key, keyspec.MaxRef)
	f.dict("labels", &m.Labels, keyspec.MaxLabels, keyspec.MaxLabelName, keyspec.MaxLabelValue)
	f.u32("min_version", &m.MinVersion)
	f.u32("keep", &m.Keep)
	f.i64("uses", &m.Uses)
}

func (m *KeyRotate) fields(f *fields) {
	f.str("key", &m.Key, keyspec.MaxRef)
	f.i64("not_before", &m.NotBefore)
	f.i64("expires", &m.Expires)
}

func (m *KeyRevoke) fields(f *fields) {
	f.str("key", &m.Key, keyspec.MaxRef)
	f.str("reason", &m.Reason, maxWord)
	f.str("replace", &m.Replace, maxWord)
}

func (m *KeyDestroy) fields(f *fields) {
	f.str("key", &m.Key, keyspec.MaxRef)
	f.u64("delay_seconds", &m.DelaySeconds)
	f.bool("now", &m.Now)
}

func (m *PublicReply) fields(f *fields) {
	f.str("algorithm", &m.Algorithm, maxWord)
	f.u32("version", &m.Version)
	f.bin("spki", &m.SPKI, maxSPKI)
	f.bin("cka_id", &m.CKAID, 20)
	f.bin("ssh_sha256", &m.SSHSHA256, 32)
}

func (m *Sign) fields(f *fields) {
	f.str("key", &m.Key, keyspec.MaxRef)
	f.str("scheme", &m.Scheme, maxWord)
	f.str("encoding", &m.Encoding, maxWord)
	f.bin("data", &m.Data, MaxMessage)
	f.bin("digest", &m.Digest, maxWord)
}

func (m *SignReply) fields(f *fields) {
	f.bin("signature", &m.Signature, maxSignature)
	f.u32("version", &m.Version)
}

func (m *Verify) fields(f *fields) {
	f.str("key", &m.Key, keyspec.MaxRef)
	f.str("scheme", &m.Scheme, maxWord)
	f.str("encoding", &m.Encoding, maxWord)
	f.bin("data", &m.Data, MaxMessage)
	f.bin("digest", &m.Digest, maxWord)
	f.bin("signature", &m.Signature, maxSignature)
}

func (m *VerifyReply) fields(f *fields) {
	f.u32("version", &m.Version)
	f.bool("compromised", &m.Compromised)
}

func (m *MAC) fields(f *fields) {
	f.str("key", &m.Key, keyspec.MaxRef)
	f.bin("data", &m.Data, MaxData)
}

func (m *MACReply) fields(f *fields) {
	f.bin("mac", &m.MAC, maxSignature)
	f.u32("version", &m.Version)
}

func (m *MACVerify) fields(f *fields) {
	f.str("key", &m.Key, keyspec.MaxRef)
	f.bin("data", &m.Data, MaxData)
	f.bin("mac", &m.MAC, maxSignature)
}

func (m *Encrypt) fields(f *fields) {
	f.str("key", &m.Key, keyspec.MaxRef)
	f.bin("data", &m.Data, MaxData)
	f.bin("aad", &m.AAD, maxAAD)
}

func (m *EncryptReply) fields(f *fields) {
	f.bin("ciphertext", &m.Ciphertext, maxSealed)
	f.u32("version", &m.Version)
}

func (m *Decrypt) fields(f *fields) {
	f.str("key", &m.Key, keyspec.MaxRef)
	f.bin("ciphertext", &m.Ciphertext, maxSealed)
	f.bin("aad", &m.AAD, maxAAD)
	f.bin("label", &m.Label, maxInfo)
	f.str("scheme", &m.Scheme, maxWord)
}

func (m *DecryptReply) fields(f *fields) {
	f.bin("data", &m.Data, maxSealed)
	f.u32("version", &m.Version)
}

func (m *Rewrap) fields(f *fields) {
	f.str("key", &m.Key, keyspec.MaxRef)
	f.bin("ciphertext", &m.Ciphertext, maxSealed)
	f.bin("aad", &m.AAD, maxAAD)
}

func (m *Wrap) fields(f *fields) {
	f.str("key", &m.Key, keyspec.MaxRef)
	f.str("target", &m.Target, keyspec.MaxRef)
}

func (m *WrapReply) fields(f *fields) {
	f.bin("wrapped", &m.Wrapped, maxMaterial)
	f.u32("version", &m.Version)
}

func (m *Unwrap) fields(f *fields) {
	f.str("key", &m.Key, keyspec.MaxRef)
	f.bin("wrapped", &m.Wrapped, maxMaterial)
	f.msg("new", &m.New)
}

func (m *Agree) fields(f *fields) {
	f.str("key", &m.Key, keyspec.MaxRef)
	f.bin("peer", &m.Peer, maxSPKI)
	f.bin("salt", &m.Salt, maxInfo)
	f.bin("info", &m.Info, maxInfo)
	f.msg("new", &m.New)
}

func (m *Derive) fields(f *fields) {
	f.str("key", &m.Key, keyspec.MaxRef)
	f.bin("salt", &m.Salt, maxInfo)
	f.bin("info", &m.Info, maxInfo)
	f.msg("new", &m.New)
}

func (m *DataKey) fields(f *fields) {
	f.str("key", &m.Key, keyspec.MaxRef)
	f.u32("bytes", &m.Bytes)
	f.bin("aad", &m.AAD, maxAAD)
	f.bool("no_plaintext", &m.NoPlaintext)
}

func (m *DataKeyReply) fields(f *fields) {
	f.bin("plaintext", &m.Plaintext, 64)
	f.bin("ciphertext", &m.Ciphertext, maxInfo)
	f.u32("version", &m.Version)
}

func (m *Random) fields(f *fields) { f.u32("bytes", &m.Bytes) }

func (m *RandomReply) fields(f *fields) { f.bin("data", &m.Data, maxRandom) }

func (m *Batch) fields(f *fields) { list(f, "items", &m.Items, maxBatch) }

func (m *BatchItem) fields(f *fields) {
	f.str("op", &m.Op, maxWord)
	f.bin("params", &m.Params, maxEncoded)
}

func (m *BatchReply) fields(f *fields) { list(f, "items", &m.Items, maxBatch) }

func (m *BatchResult) fields(f *fields) {
	if f.encode && m.Error == nil {
		f.bin("result", &m.Result, maxEncoded)
		return
	}
	var e Error
	if f.encode {
		e = *m.Error
	}
	f.msg("error", &e)
	if !f.encode && e.Code != "" {
		m.Error = &e
	}
	f.bin("result", &m.Result, maxEncoded)
}

func (m *StreamBegin) fields(f *fields) {
	f.str("op", &m.Op, maxWord)
	f.str("key", &m.Key, keyspec.MaxRef)
	f.bin("aad", &m.AAD, maxAAD)
	f.bin("mac", &m.MAC, maxSignature)
	f.bin("head", &m.Head, maxInfo)
}

func (m *StreamBeginReply) fields(f *fields) {
	f.u64("stream", &m.Stream)
	f.u32("version", &m.Version)
	f.bin("data", &m.Data, maxInfo)
}

func (m *StreamUpdate) fields(f *fields) {
	f.u64("stream", &m.Stream)
	f.u64("chunk", &m.Chunk)
	f.bin("data", &m.Data, maxStreamData)
}

func (m *StreamData) fields(f *fields) {
	f.bin("data", &m.Data, maxStreamData)
	f.u32("credit", &m.Credit)
	f.bool("done", &m.Done)
}

func (m *StreamRef) fields(f *fields) { f.u64("stream", &m.Stream) }

func (m *Subject) fields(f *fields) {
	f.str("dn", &m.DN, maxText)
	f.strs("dns", &m.DNS, maxAltNames, 256)
	f.strs("ip", &m.IP, maxAltNames, maxWord)
	f.strs("email", &m.Email, maxAltNames, 320)
	f.strs("uri", &m.URI, maxAltNames, maxText)
}

func (m *CertRequest) fields(f *fields) {
	f.str("key", &m.Key, keyspec.MaxRef)
	f.msg("subject", &m.Subject)
}

func (m *CertProfile) fields(f *fields) {
	f.i64("not_before", &m.NotBefore)
	f.i64("not_after", &m.NotAfter)
	f.bool("ca", &m.CA)
	f.i64("path_len", &m.PathLen)
	f.strs("key_usage", &m.KeyUsage, maxWords, maxWord)
	f.strs("ext_key_use", &m.ExtKeyUse, maxWords, maxWord)
}

func (m *CertSelfSign) fields(f *fields) {
	f.str("key", &m.Key, keyspec.MaxRef)
	f.msg("subject", &m.Subject)
	f.msg("profile", &m.Profile)
}

func (m *CertIssue) fields(f *fields) {
	f.str("issuer", &m.Issuer, keyspec.MaxRef)
	f.bin("request", &m.Request, maxCertificate)
	f.str("key", &m.Key, keyspec.MaxRef)
	f.msg("subject", &m.Subject)
	f.msg("profile", &m.Profile)
}

func (m *CertAttach) fields(f *fields) {
	f.str("key", &m.Key, keyspec.MaxRef)
	f.bins("chain", &m.Chain, maxChain, maxCertificate)
}

func (m *CertChain) fields(f *fields) { f.bins("chain", &m.Chain, maxChain, maxCertificate) }

func (m *SlotListReply) fields(f *fields) { list(f, "slots", &m.Slots, keyspec.MaxSlots) }

func (m *SlotAdd) fields(f *fields) {
	f.str("enclave", &m.Enclave, MaxSpec)
	f.str("label", &m.Label, maxSlotLabel)
	f.bin("pin", &m.PIN, maxSecret)
	f.u32("threshold", &m.Threshold)
	f.u32("shares", &m.Shares)
	f.bin("confirm", &m.Confirm, confirmSize)
}

func (m *SlotAddReply) fields(f *fields) {
	f.msg("slot", &m.Slot)
	f.bins("secrets", &m.Secrets, maxShares, maxSecret)
	f.bin("pending", &m.Pending, confirmSize)
	f.texts("warnings", &m.Warnings, MaxWarnings, maxWarning)
}

func (m *SlotRef) fields(f *fields) {
	f.u32("id", &m.ID)
	f.bin("secret", &m.Secret, maxSecret)
	f.bins("shares", &m.Shares, maxShares, maxSecret)
}

func (m *SlotRemoveReply) fields(f *fields) {
	f.texts("warnings", &m.Warnings, MaxWarnings, maxWarning)
}

func (m *ProgressReply) fields(f *fields) {
	f.u64("records", &m.Records)
	f.texts("damaged", &m.Damaged, MaxFindings, maxFinding)
	f.texts("messages", &m.Messages, MaxMessages, maxText)
	f.u64("epoch", &m.Epoch)
}

func (m *BackupCreate) fields(f *fields) {
	f.strs("recipients", &m.Recipients, keyspec.MaxRecipients, keyspec.MaxRecipient)
}

func (m *BackupReply) fields(f *fields) {
	f.u64("stream", &m.Stream)
	f.strs("recipients", &m.Recipients, 2*keyspec.MaxRecipients, keyspec.MaxRecipient)
}

func (m *AuditTail) fields(f *fields) {
	f.u64("from", &m.From)
	f.u32("limit", &m.Limit)
	f.bool("last", &m.Last)
}

func (m *AuditTailReply) fields(f *fields) {
	list(f, "entries", &m.Entries, maxList)
	f.u64("next", &m.Next)
}

func (m *AuditEntry) fields(f *fields) {
	f.u64("number", &m.Number)
	f.i64("time", &m.Time)
	f.str("op", &m.Op, maxWord)
	f.str("key", &m.Key, keyspec.MaxRef)
	f.u32("version", &m.Version)
	f.u32("uid", &m.UID)
	f.u32("pid", &m.PID)
	f.str("principal", &m.Principal, 256)
	f.str("via", &m.Via, maxWord)
	f.str("client", &m.Client, maxWord)
	f.str("trace", &m.Trace, maxWord)
	f.bool("allowed", &m.Allowed)
	f.str("code", &m.Code, maxWord)
	f.text("detail", &m.Detail, maxText)
	f.str("detail_id", &m.DetailID, maxWord)
	f.u64("epoch", &m.Epoch)
}

func (m *AuditHead) fields(f *fields) {
	f.u64("size", &m.Size)
	f.bin("root", &m.Root, 32)
}
