package proto

// The operations. A name is never renumbered and never reused for something else.
const (
	// Connection.
	OpHello  = "hello"
	OpBind   = "bind"
	OpPing   = "ping"
	OpCancel = "cancel"

	// The daemon.
	OpWhoami       = "whoami"
	OpStatus       = "status"
	OpCapabilities = "capabilities"
	OpSelfTest     = "self_test"
	OpInit         = "init"
	OpLock         = "lock"
	OpUnlock       = "unlock"

	// Life of a key.
	OpKeyCreate        = "key_create"
	OpKeyImportBegin   = "key_import_begin"
	OpKeyImport        = "key_import"
	OpKeyGet           = "key_get"
	OpKeyList          = "key_list"
	OpKeyFind          = "key_find"
	OpKeySet           = "key_set"
	OpKeyRotate        = "key_rotate"
	OpKeySuspend       = "key_suspend"
	OpKeyResume        = "key_resume"
	OpKeyRevoke        = "key_revoke"
	OpKeyDestroy       = "key_destroy"
	OpKeyDestroyCancel = "key_destroy_cancel"
	OpPublic           = "public"

	// Keys of a MOSIP key manager.
	OpKeyMigrate     = "key_migrate"
	OpKeyExportMOSIP = "key_export_mosip"

	// Use of a key.
	OpSign      = "sign"
	OpVerify    = "verify"
	OpMAC       = "mac"
	OpMACVerify = "mac_verify"
	OpEncrypt   = "encrypt"
	OpDecrypt   = "decrypt"
	OpRewrap    = "rewrap"
	OpWrap      = "wrap"
	OpUnwrap    = "unwrap"
	OpAgree     = "agree"
	OpDerive    = "derive"
	OpDataKey   = "data_key"
	OpRandom    = "random"
	OpBatch     = "batch"

	// Zero-knowledge encryption of MOSIP.
	OpZKEncrypt  = "zk_encrypt"
	OpZKDecrypt  = "zk_decrypt"
	OpZKRewrap   = "zk_rewrap"
	OpZKImport   = "zk_import"
	OpZKGenerate = "zk_generate"

	// Large data in chunks.
	OpStreamBegin  = "stream_begin"
	OpStreamUpdate = "stream_update"
	OpStreamFinish = "stream_finish"
	OpStreamAbort  = "stream_abort"

	// Certificates.
	OpCertRequest  = "cert_request"
	OpCertSelfSign = "cert_self_sign"
	OpCertIssue    = "cert_issue"
	OpCertAttach   = "cert_attach"
	OpCertGet      = "cert_get"
	OpCertUpload   = "cert_upload"

	// Trust in certificates of others.
	OpTrustDomains = "trust_domains"
	OpTrustSet     = "trust_set"
	OpTrustAdd     = "trust_add"
	OpTrustList    = "trust_list"
	OpTrustRemove  = "trust_remove"
	OpTrustVerify  = "trust_verify"
	OpPartnerAdd   = "partner_add"
	OpCRLAdd       = "crl_add"

	// The hierarchy of applications.
	OpAppList        = "app_list"
	OpAppGet         = "app_get"
	OpAppSet         = "app_set"
	OpMasterGenerate = "master_generate"
	OpCertCurrent    = "cert_current"
	OpCertCSR        = "cert_csr"
	OpCertList       = "cert_list"
	OpCRLGet         = "crl_get"
	OpExpiry         = "expiry"
	OpEvents         = "events"
	OpClockAccept    = "clock_accept"

	// The identity of a registration machine.
	OpMachineAdopt   = "machine_adopt"
	OpMachineShow    = "machine_show"
	OpMachineRelease = "machine_release"

	// Administration, on the admin socket only.
	OpSlotList     = "slot_list"
	OpSlotAdd      = "slot_add"
	OpSlotRemove   = "slot_remove"
	OpSlotTest     = "slot_test"
	OpRootRotate   = "root_rotate"
	OpEpochRotate  = "epoch_rotate"
	OpStoreVerify  = "store_verify"
	OpStoreCompact = "store_compact"
	OpBackupCreate = "backup_create"
	OpAuditTail    = "audit_tail"
	OpAuditHead    = "audit_head"
)
