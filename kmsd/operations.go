package main

import (
	"strings"

	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/engine"
	"github.com/kmsd-project/kmsd/kmsd/mechanism"
)

// operations is the table of everything a client can ask for after bind, except cancel, which the dispatcher answers.
func operations() map[string]operation {
	return map[string]operation{
		proto.OpPing:         {onBoth, duringAny, inline, handlePing},
		proto.OpWhoami:       {onBoth, duringAny, inline, handleWhoami},
		proto.OpStatus:       {onBoth, duringAny, device, handleStatus},
		proto.OpCapabilities: {onBoth, duringAny, device, handleCapabilities},
		proto.OpSelfTest:     {onAdmin, duringAny, keygen, handleSelfTest},
		proto.OpInit:         {onAdmin, whenUninitialised, device, handleInit},
		proto.OpLock:         {onAdmin, whenSealed, disk, handleLock},
		proto.OpUnlock:       {onAdmin, whenSealed, device, handleUnlock},

		proto.OpKeyCreate:        {onBoth, whenReady, creating, handleKeyCreate},
		proto.OpKeyImportBegin:   {onBoth, whenReady, pool, handleKeyImportBegin},
		proto.OpKeyImport:        {onBoth, whenReady, importing, handleKeyImport},
		proto.OpKeyGet:           {onBoth, whenReady, pool, handleKeyGet},
		proto.OpKeyList:          {onBoth, whenReady, disk, handleKeyList},
		proto.OpKeyFind:          {onBoth, whenReady, disk, handleKeyFind},
		proto.OpKeySet:           {onBoth, whenReady, disk, handleKeySet},
		proto.OpKeyRotate:        {onBoth, whenReady, rotating, handleKeyRotate},
		proto.OpKeySuspend:       {onBoth, whenReady, disk, handleKeySuspend},
		proto.OpKeyResume:        {onBoth, whenReady, disk, handleKeyResume},
		proto.OpKeyRevoke:        {onBoth, whenReady, revoking, handleKeyRevoke},
		proto.OpKeyDestroy:       {onBoth, whenReady, disk, handleKeyDestroy},
		proto.OpKeyDestroyCancel: {onBoth, whenReady, disk, handleKeyDestroyCancel},
		proto.OpPublic:           {onBoth, whenReady, pool, handlePublic},

		proto.OpKeyMigrate:     {onAdmin, whenReady, migrating, handleKeyMigrate},
		proto.OpKeyExportMOSIP: {onAdmin, whenReady, disk, handleKeyExportMOSIP},

		proto.OpSign:      {onBoth, whenReady, private, handleSign},
		proto.OpVerify:    {onBoth, whenReady, public, handleVerify},
		proto.OpMAC:       {onBoth, whenReady, private, handleMAC},
		proto.OpMACVerify: {onBoth, whenReady, private, handleMACVerify},
		proto.OpEncrypt:   {onBoth, whenReady, public, handleEncrypt},
		proto.OpDecrypt:   {onBoth, whenReady, private, handleDecrypt},
		proto.OpRewrap:    {onBoth, whenReady, private, handleRewrap},
		proto.OpWrap:      {onBoth, whenReady, keyed, handleWrap},
		proto.OpUnwrap:    {onBoth, whenReady, keyed, handleUnwrap},
		proto.OpAgree:     {onBoth, whenReady, keyed, handleAgree},
		proto.OpDerive:    {onBoth, whenReady, keyed, handleDerive},
		proto.OpDataKey:   {onBoth, whenReady, private, handleDataKey},
		proto.OpRandom:    {onBoth, whenReady, pool, handleRandom},
		proto.OpBatch:     {onBoth, whenReady, disk, handleBatch},

		proto.OpZKEncrypt:  {onBoth, whenReady, keyed, handleZKEncrypt},
		proto.OpZKDecrypt:  {onBoth, whenReady, keyed, handleZKDecrypt},
		proto.OpZKRewrap:   {onBoth, whenReady, rewrapping, handleZKRewrap},
		proto.OpZKImport:   {onBoth, whenReady, keyed, handleZKImport},
		proto.OpZKGenerate: {onBoth, whenReady, keyed, handleZKGenerate},

		proto.OpStreamBegin:  {onBoth, whenReady, streaming, handleStreamBegin},
		proto.OpStreamUpdate: {onBoth, whenReady, streamLane, handleStreamUpdate},
		proto.OpStreamFinish: {onBoth, whenReady, inline, handleStreamFinish},
		proto.OpStreamAbort:  {onBoth, whenReady, inline, handleStreamAbort},

		proto.OpCertRequest:  {onBoth, whenReady, certifying, handleCertRequest},
		proto.OpCertSelfSign: {onBoth, whenReady, certifying, handleCertSelfSign},
		proto.OpCertIssue:    {onBoth, whenReady, certifying, handleCertIssue},
		proto.OpCertAttach:   {onBoth, whenReady, disk, handleCertAttach},
		proto.OpCertGet:      {onBoth, whenReady, pool, handleCertGet},
		proto.OpCertUpload:   {onBoth, whenReady, disk, handleCertUpload},

		proto.OpTrustDomains: {onBoth, whenReady, disk, handleTrustDomains},
		proto.OpTrustSet:     {onAdmin, whenReady, disk, handleTrustSet},
		proto.OpTrustAdd:     {onAdmin, whenReady, disk, handleTrustAdd},
		proto.OpTrustList:    {onBoth, whenReady, disk, handleTrustList},
		proto.OpTrustRemove:  {onAdmin, whenReady, disk, handleTrustRemove},
		proto.OpTrustVerify:  {onBoth, whenReady, judging, handleTrustVerify},
		proto.OpPartnerAdd:   {onAdmin, whenReady, disk, handlePartnerAdd},
		proto.OpCRLAdd:       {onAdmin, whenReady, disk, handleCRLAdd},

		proto.OpMachineAdopt:   {onAdmin, whenReady, adopting, handleMachineAdopt},
		proto.OpMachineShow:    {onBoth, whenReady, disk, handleMachineShow},
		proto.OpMachineRelease: {onAdmin, whenReady, device, handleMachineRelease},

		proto.OpAppList:        {onAdmin, whenReady, disk, handleAppList},
		proto.OpAppGet:         {onBoth, whenReady, disk, handleAppGet},
		proto.OpAppSet:         {onAdmin, whenReady, disk, handleAppSet},
		proto.OpMasterGenerate: {onAdmin, whenReady, generating, handleMasterGenerate},
		proto.OpCertCurrent:    {onBoth, whenReady, making, handleCertCurrent},
		proto.OpCertCSR:        {onBoth, whenReady, requesting, handleCertCSR},
		proto.OpCertList:       {onBoth, whenReady, disk, handleCertList},
		proto.OpCRLGet:         {onBoth, whenReady, listing, handleCRLGet},
		proto.OpEvents:         {onAdmin, whenSealed, watching, handleEvents},
		proto.OpExpiry:         {onAdmin, whenReady, disk, handleExpiry},
		proto.OpClockAccept:    {onAdmin, whenReady, disk, handleClockAccept},

		proto.OpSlotList:     {onAdmin, whenSealed, device, handleSlotList},
		proto.OpSlotAdd:      {onAdmin, whenReady, device, handleSlotAdd},
		proto.OpSlotRemove:   {onAdmin, whenReady, device, handleSlotRemove},
		proto.OpSlotTest:     {onAdmin, whenReady, device, handleSlotTest},
		proto.OpRootRotate:   {onAdmin, whenReady, disk, handleRootRotate},
		proto.OpEpochRotate:  {onAdmin, whenReady, disk, handleEpochRotate},
		proto.OpStoreVerify:  {onAdmin, whenReady, disk, handleStoreVerify},
		proto.OpStoreCompact: {onAdmin, whenReady, disk, handleStoreCompact},
		proto.OpBackupCreate: {onAdmin, whenReady, disk, handleBackupCreate},
		proto.OpAuditTail:    {onAdmin, whenReady, disk, handleAuditTail},
		proto.OpAuditHead:    {onAdmin, duringAny, disk, handleAuditHead},
	}
}

// irrevocable reports whether an operation makes a secret that its answer alone carries: then no deadline and no cancel
// answers before it.
func irrevocable(op string) bool { return op == proto.OpInit || op == proto.OpSlotAdd }

// The lanes of operations whose cost does not depend on the key.
func inline(*call) lane { return laneInline }
func pool(*call) lane   { return lanePool }
func disk(*call) lane   { return laneStore }
func keygen(*call) lane { return laneKeygen }
func device(*call) lane { return laneDevice }

// watching keeps those who wait for something to happen from being in the way of those who do something.
func watching(*call) lane { return laneWatch }

// judging is the lane of verdicts on certificates: a search for a path can verify a hundred signatures.
func judging(*call) lane { return laneRSA }

// hardware is the lane of operations in a device, which is one for each kind of device: a TPM that is slow, or hangs, holds up no HSM and
// nobody else.
func hardware(p keyspec.Protection) lane {
	if p == keyspec.TPM {
		return laneTPM
	}
	return laneHSM
}

// smallData is how much data a cheap operation takes in its stride, in bytes of params.
const smallData = 4 << 10

// private is the lane of an operation with the private half of a key. A key that is not in the cache is loaded first; the
// pool is the place for that, and the cost of one misplaced operation is bounded by it.
func private(c *call) lane {
	row, waits, device := c.mechanism()
	switch {
	case device != "":
		return hardware(device)
	case waits:
		return laneStore
	case row == nil:
		return lanePool
	case row.Cost == mechanism.CostRSA:
		return laneRSA
	case row.Cost == mechanism.CostCheap && len(c.request.Params) <= smallData:
		return laneInline
	}
	return lanePool
}

// public is the lane of an operation with the public half of a key, which is quick for RSA too.
func public(c *call) lane {
	row, waits, device := c.mechanism()
	switch {
	case device != "" && row != nil && row.Symmetric():
		return hardware(device)
	case waits:
		return laneStore
	case row != nil && row.Cost == mechanism.CostCheap && len(c.request.Params) <= smallData:
		return laneInline
	}
	return lanePool
}

// creating keeps the search for primes apart from keys that cost little more than their record, and from those that a device makes.
func creating(c *call) lane {
	var in proto.KeyCreate
	err := proto.DecodeReply(c.request.Params, &in)
	switch p := keyspec.Protection(in.Protection); {
	case err != nil:
	case p == keyspec.TPM || p == keyspec.HSM:
		return hardware(p)
	case strings.HasPrefix(in.Algorithm, "rsa-"):
		return laneKeygen
	}
	return laneStore
}

// keyed is the lane of operations with the private half of a key that wait for the disk too.
func keyed(c *call) lane {
	if _, _, device := c.mechanism(); device != "" {
		return hardware(device)
	}
	return laneStore
}

// streaming is the lane of the beginning of a stream.
func streaming(c *call) lane {
	if _, _, device := c.mechanism(); device != "" {
		return hardware(device)
	}
	return lanePool
}

// importing keeps the examination of primes apart in the same way.
func importing(c *call) lane {
	var in proto.KeyImport
	if proto.DecodeReply(c.request.Params, &in) == nil && strings.HasPrefix(in.Key.Algorithm, "rsa-") {
		return laneKeygen
	}
	return laneStore
}

// certifying keeps signatures that take milliseconds from being computed by as many workers as may wait for the disk.
func certifying(c *call) lane {
	var in proto.CertIssue // the others have a part of its params
	if proto.DecodeReply(c.request.Params, &in) != nil {
		return laneStore
	}
	signer := in.Key
	if in.Issuer != "" {
		signer = in.Issuer
	}
	switch row, _, device := c.peek(signer); {
	case device != "":
		return hardware(device)
	case row != nil && row.Cost == mechanism.CostRSA:
		return laneRSA
	}
	return laneStore
}

// revoking is rotating where the key may be replaced, and so certified anew by a key that may be in a device.
func revoking(c *call) lane {
	var in proto.KeyRevoke
	if proto.DecodeReply(c.request.Params, &in) != nil || in.Replace == string(engine.ReplaceNo) {
		return laneStore
	}
	l := rotating(c)
	if l != laneKeygen {
		return l
	}
	for _, issuer := range []string{keyspec.Name(in.Key).Namespace(), string(engine.RootName)} {
		if _, _, device := c.peek(issuer); device != "" {
			return hardware(device)
		}
	}
	return l
}

// generating keeps the search for the primes of root and module keys apart as well.
func generating(c *call) lane {
	var in proto.MasterGenerate
	if proto.DecodeReply(c.request.Params, &in) != nil {
		return laneStore
	}
	if p := keyspec.Protection(in.Protection); p == keyspec.TPM || p == keyspec.HSM {
		return hardware(p)
	}
	_, _, device := c.mechanism()
	if device == "" {
		_, device = c.daemon.engine.Making(&c.session.who, keyspec.Name(in.Key))
	}
	switch {
	case device != "":
		return hardware(device)
	case in.Symmetric:
		return laneStore
	}
	return laneKeygen
}

// making is the lane of asking for a certificate, which most of the time is there already.
func making(c *call) lane {
	makes, device := c.daemon.engine.Making(&c.session.who, keyspec.Name(proto.KeyOf(c.request.Params)))
	switch {
	case !makes:
		return lanePool
	case device != "":
		return hardware(device)
	}
	return laneKeygen
}

// listing is the lane of revocation lists, which are signed now and then.
func listing(c *call) lane {
	var in proto.CRLGet
	if proto.DecodeReply(c.request.Params, &in) != nil {
		return laneStore
	}
	if _, _, device := c.peek(in.Issuer); device != "" {
		return hardware(device)
	}
	return laneStore
}

// requesting is making with a signature by the key itself.
func requesting(c *call) lane {
	if l := making(c); l != lanePool {
		return l
	}
	if _, _, device := c.mechanism(); device != "" {
		return hardware(device)
	}
	return laneRSA
}

// rotating is creating for a key that is already there.
func rotating(c *call) lane {
	switch row, _, device := c.mechanism(); {
	case device != "":
		return hardware(device)
	case row != nil && row.Cost != mechanism.CostRSA:
		return laneStore
	}
	return laneKeygen
}

// mechanism returns the mechanism of the key that the request names, if the key is in the cache, whether its use waits for the
// disk, and the kind of device that it is in.
func (c *call) mechanism() (row *mechanism.Row, waits bool, device keyspec.Protection) {
	return c.peek(proto.KeyOf(c.request.Params))
}

// peek is mechanism for the key that ref names.
func (c *call) peek(ref string) (row *mechanism.Row, waits bool, device keyspec.Protection) {
	name, _, _ := strings.Cut(ref, "@")
	return c.daemon.engine.Peek(&c.session.who, c.request.Op, keyspec.Name(name))
}
