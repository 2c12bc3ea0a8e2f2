package proto

import "github.com/kmsd-project/kmsd/keystore/keyspec"

// Body makes the empty params and the empty result of one operation.
type Body struct {
	Op     string
	Params func() Message
	Result func() Message
}

func body[P, R any, PP interface {
	*P
	Message
}, PR interface {
	*R
	Message
}](op string) Body {
	return Body{op, func() Message { return PP(new(P)) }, func() Message { return PR(new(R)) }}
}

// Bodies lists every operation with its messages, in the order of the documentation.
func Bodies() []Body {
	return []Body{
		body[Hello, HelloReply](OpHello),
		body[Bind, Empty](OpBind),
		body[Empty, Empty](OpPing),
		body[Cancel, Empty](OpCancel),

		body[Empty, Identity](OpWhoami),
		body[Empty, Status](OpStatus),
		body[Empty, CapabilitiesReply](OpCapabilities),
		body[Empty, SelfTestReply](OpSelfTest),
		body[Init, InitReply](OpInit),
		body[Empty, Empty](OpLock),
		body[Unlock, Empty](OpUnlock),

		body[KeyCreate, KeyInfo](OpKeyCreate),
		body[KeyImportBegin, KeyImportBeginReply](OpKeyImportBegin),
		body[KeyImport, KeyInfo](OpKeyImport),
		body[KeyRef, KeyInfo](OpKeyGet),
		body[KeyList, KeyListReply](OpKeyList),
		body[KeyFind, KeyFindReply](OpKeyFind),
		body[KeySet, KeyInfo](OpKeySet),
		body[KeyRotate, KeyInfo](OpKeyRotate),
		body[KeyRef, KeyInfo](OpKeySuspend),
		body[KeyRef, KeyInfo](OpKeyResume),
		body[KeyRevoke, KeyInfo](OpKeyRevoke),
		body[KeyDestroy, KeyInfo](OpKeyDestroy),
		body[KeyRef, KeyInfo](OpKeyDestroyCancel),
		body[KeyRef, PublicReply](OpPublic),

		body[KeyMigrate, KeyMigrateReply](OpKeyMigrate),
		body[KeyExportMOSIP, KeyExportMOSIPReply](OpKeyExportMOSIP),

		body[Sign, SignReply](OpSign),
		body[Verify, VerifyReply](OpVerify),
		body[MAC, MACReply](OpMAC),
		body[MACVerify, VerifyReply](OpMACVerify),
		body[Encrypt, EncryptReply](OpEncrypt),
		body[Decrypt, DecryptReply](OpDecrypt),
		body[Rewrap, EncryptReply](OpRewrap),
		body[Wrap, WrapReply](OpWrap),
		body[Unwrap, KeyInfo](OpUnwrap),
		body[Agree, KeyInfo](OpAgree),
		body[Derive, KeyInfo](OpDerive),
		body[DataKey, DataKeyReply](OpDataKey),
		body[Random, RandomReply](OpRandom),
		body[Batch, BatchReply](OpBatch),

		body[ZKEncrypt, ZKEncryptReply](OpZKEncrypt),
		body[ZKDecrypt, ZKDecryptReply](OpZKDecrypt),
		body[ZKRewrap, ZKRewrapReply](OpZKRewrap),
		body[ZKImport, ZKKeysReply](OpZKImport),
		body[ZKGenerate, ZKKeysReply](OpZKGenerate),

		body[StreamBegin, StreamBeginReply](OpStreamBegin),
		body[StreamUpdate, StreamData](OpStreamUpdate),
		body[StreamRef, StreamData](OpStreamFinish),
		body[StreamRef, Empty](OpStreamAbort),

		body[CertRequest, CertChain](OpCertRequest),
		body[CertSelfSign, CertChain](OpCertSelfSign),
		body[CertIssue, CertChain](OpCertIssue),
		body[CertAttach, Empty](OpCertAttach),
		body[KeyRef, CertChain](OpCertGet),
		body[CertUpload, Certified](OpCertUpload),

		body[Empty, TrustDomainsReply](OpTrustDomains),
		body[TrustDomain, TrustDomain](OpTrustSet),
		body[TrustAdd, TrustAddReply](OpTrustAdd),
		body[TrustList, TrustListReply](OpTrustList),
		body[TrustRemove, Empty](OpTrustRemove),
		body[TrustVerify, TrustVerdict](OpTrustVerify),
		body[PartnerAdd, TrustAddReply](OpPartnerAdd),
		body[CRLAdd, TrustEntry](OpCRLAdd),

		body[MachineAdopt, Machine](OpMachineAdopt),
		body[MachineRef, Machine](OpMachineShow),
		body[MachineRef, Empty](OpMachineRelease),

		body[AppList, AppListReply](OpAppList),
		body[AppRef, Application](OpAppGet),
		body[Application, Application](OpAppSet),
		body[MasterGenerate, Certified](OpMasterGenerate),
		body[CertCurrent, Certified](OpCertCurrent),
		body[CertCurrent, Certified](OpCertCSR),
		body[CertList, CertListReply](OpCertList),
		body[CRLGet, CRLReply](OpCRLGet),
		body[Events, EventsReply](OpEvents),
		body[Expiry, ExpiryReply](OpExpiry),
		body[Empty, Clock](OpClockAccept),

		body[Empty, SlotListReply](OpSlotList),
		body[SlotAdd, SlotAddReply](OpSlotAdd),
		body[SlotRef, SlotRemoveReply](OpSlotRemove),
		body[SlotRef, Empty](OpSlotTest),
		body[Empty, ProgressReply](OpRootRotate),
		body[Empty, ProgressReply](OpEpochRotate),
		body[Empty, ProgressReply](OpStoreVerify),
		body[Empty, ProgressReply](OpStoreCompact),
		body[BackupCreate, BackupReply](OpBackupCreate),
		body[AuditTail, AuditTailReply](OpAuditTail),
		body[Empty, AuditHead](OpAuditHead),
	}
}

// Ops lists the names of every operation in the order of Bodies.
func Ops() []string {
	bodies := Bodies()
	ops := make([]string, len(bodies))
	for i, b := range bodies {
		ops[i] = b.Op
	}
	return ops
}

// Lookup returns the messages of op.
func Lookup(op string) (Body, bool) {
	for _, b := range Bodies() {
		if b.Op == op {
			return b, true
		}
	}
	return Body{}, false
}

// words holds the strings that come in nearly every message, so that reading one allocates nothing.
var words = vocabulary()

func vocabulary() map[string]string {
	m := make(map[string]string)
	add := func(s string) { m[s] = s }
	for _, op := range Ops() {
		add(op)
	}
	for _, w := range keyspec.Algorithms() {
		add(string(w))
	}
	for _, w := range keyspec.Schemes() {
		add(string(w))
	}
	for _, w := range keyspec.Usages() {
		add(string(w))
	}
	for _, w := range keyspec.States() {
		add(string(w))
	}
	for _, w := range []string{"der", "p1363", string(keyspec.Software), string(keyspec.TPM), string(keyspec.HSM)} {
		add(w)
	}
	return m
}
