package tpm

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/keystore/secmem"
)

// Times. The slow commands make keys: the kernel gives them five minutes, and a discrete TPM takes a good part of one for an RSA key.
const (
	limitGreeting = 10 * time.Second
	limitCommand  = 30 * time.Second
	limitSlow     = 5 * time.Minute

	firstWait = 2 * time.Millisecond // before a command is sent again that the TPM asked to send again; doubles up to lastWait
	lastWait  = 256 * time.Millisecond
	maxWait   = 4 * time.Second // altogether, then ErrBusy

	firstRedial = 20 * time.Millisecond // after a link broke in the middle of a job; doubles
	maxRedial   = 1500 * time.Millisecond

	idleSocket  = 50 * time.Millisecond  // how long a link is kept without work: swtpm serves one connection at a time,
	idleAlone   = 200 * time.Millisecond // /dev/tpm0 one as well, and connecting again costs a real TPM more,
	idleManaged = time.Minute            // and a resource manager serves all
)

// device is the TPM as its one owner goroutine sees it. It is the transport that go-tpm's commands are executed on.
//
// Invariant: between two jobs at most the storage key and hotKeys resident keys are loaded, which together fit the three slots that a TPM
// has at least, and no session is open, unless a connection broke; what a broken
// connection or another program left behind is flushed when the TPM is full, not before, and never behind a resource manager, where it
// would be somebody else's.
//
// Invariant: a command is sent a second time only when the TPM said that it did not execute the first, or while job.attempted is false.
type device struct {
	dial    func() (link, error)
	managed bool
	owner   []byte            // password of the owner hierarchy, usually empty
	pinned  []byte            // name that the storage key must have; nil for any
	learned func(name []byte) // told when the storage key has been seen
	linked  func(l link)      // told what Close must interrupt, nil for none
	link    link              // nil when not connected
	root    *object           // the storage key, nil when not loaded
	hot     []hotKey          // resident keys that are loaded, those used last in front
	job     *job              // the one at hand
}

// job is one piece of work for the owner goroutine.
type job struct {
	ctx       context.Context
	run       func(d *device) error // may be called several times
	deliver   func(err error)
	secrets   [][]byte // wiped when the job is over
	attempted bool     // a command has gone out that must not go out twice: a PIN, an increment
}

// object is something loaded into the TPM.
type object struct {
	handle tpm2.TPMHandle
	name   tpm2.TPM2BName
	public *tpm2.TPMTPublic
}

func (o *object) with(s tpm2.Session) tpm2.AuthHandle {
	return tpm2.AuthHandle{Handle: o.handle, Name: o.name, Auth: s}
}

func (j *job) wipe() {
	for _, b := range j.secrets {
		clear(b)
	}
}

// do runs the job until it is done, fails for good, or its context is done.
func (d *device) do(j *job) error {
	d.job = j
	defer func() { d.job = nil }()
	redial, resets, flushed := firstRedial, 0, false
	var began time.Time // when the link broke first
	for {
		err := d.attempt()
		if err == nil {
			return nil
		}
		if j.ctx.Err() != nil {
			return fmt.Errorf("TPM: %w", j.ctx.Err())
		}
		var lost *lostError
		broke := errors.As(err, &lost)
		switch {
		case broke && j.attempted:
			return &enclave.Error{Kind: enclave.ErrAbsent, Cause: err,
				Detail: "the connection broke while a command was under way that is not sent twice"}
		case broke, d.link == nil && (errors.Is(err, errTaken) || errors.Is(err, enclave.ErrAbsent) && !began.IsZero()):
			// A device that was never there is not waited for; one that was there or is held by another program, for a moment.
			if began.IsZero() {
				began = time.Now()
			}
			if time.Since(began)+redial > maxRedial {
				return translate(err)
			}
			d.sleep(redial)
			redial *= 2
		case isReset(err) && resets < 2:
			resets++
			d.root, d.hot = nil, nil
			if isOneOf(err, tpm2.TPMRCInitialize) {
				d.startup()
			}
		case isFull(err) && !flushed && !d.managed:
			flushed = true
			d.flushAll()
		default:
			return translate(err)
		}
	}
}

// attempt runs the job once. The memory it used is erased afterwards, as far as the build can.
func (d *device) attempt() (err error) {
	secmem.Do(func() {
		// go-tpm takes apart by reflection what comes from a device that may be broken or hostile.
		defer func() {
			if r := recover(); r != nil {
				d.hangUp()
				err = errors.New("panic while talking to the TPM")
				if r, ok := r.(runtime.Error); ok { // its own panics print what they were working on
					err = fmt.Errorf("%w: %w", err, r)
				}
			}
		}()
		if err = d.connect(); err == nil {
			err = d.job.run(d)
		}
	})
	return err
}

// greeting is TPM2_GetCapability for TPM_PT_FAMILY_INDICATOR, which a TPM 1.2 answers with another tag.
var greeting = []byte{0x80, 0x01, 0, 0, 0, 22, 0, 0, 0x01, 0x7a, 0, 0, 0, 6, 0, 0, 0x01, 0, 0, 0, 0, 1}

// connect dials if need be and makes sure that somebody is there who speaks TPM 2.0.
func (d *device) connect() error {
	if d.link != nil {
		return nil
	}
	if err := d.job.ctx.Err(); err != nil {
		return err
	}
	l, err := d.dial()
	if err != nil {
		return err
	}
	d.link = l
	d.linked(l)
	answer, err := l.Send(greeting, limitGreeting)
	if err == nil && responseCode(answer) == tpm2.TPMRCInitialize {
		return d.startup()
	}
	if err != nil {
		d.hangUp()
		return &enclave.Error{Kind: enclave.ErrAbsent, Detail: "the TPM does not answer", Cause: err,
			Remedy: "look whether another program holds the TPM; a software TPM serves one connection at a time"}
	}
	if binary.BigEndian.Uint16(answer) != uint16(tpm2.TPMSTNoSessions) {
		d.hangUp()
		return &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: "not a TPM 2.0"}
	}
	return nil
}

// startup does what the firmware or the kernel does for a real TPM. A TPM that is started already says so by TPM_RC_INITIALIZE.
func (d *device) startup() error {
	_, err := tpm2.Startup{StartupType: tpm2.TPMSUClear}.Execute(d)
	if isOneOf(err, tpm2.TPMRCInitialize) {
		return nil
	}
	return err
}

// hangUp closes the link. Whatever was loaded is forgotten.
func (d *device) hangUp() {
	if d.link != nil {
		d.linked(nil)
		d.link.Close()
	}
	d.link, d.root, d.hot = nil, nil, nil
}

// leave flushes what is loaded, for the next program that uses the TPM, and hangs up.
func (d *device) leave() {
	if d.link != nil && !d.managed {
		d.cool()
		if d.root != nil {
			d.flush(d.root)
		}
	}
	d.hangUp()
}

// Send implements go-tpm's transport.TPM: one command, sent again as long as the TPM asks for that.
func (d *device) Send(command []byte) ([]byte, error) {
	code := commandCode(command)
	for wait, waited := firstWait, time.Duration(0); ; wait = min(2*wait, lastWait) {
		if d.link == nil {
			return nil, &lostError{errors.New("not connected")}
		}
		// go-tpm closes the session of a command only when the TPM refuses the command, not when it could not be sent. So that a
		// context that is done leaks no session, it is told in the TPM's words; flushing goes on.
		if code != tpm2.TPMCCFlushContext && d.job != nil && d.job.ctx.Err() != nil {
			return response(tpm2.TPMRCCanceled), nil
		}
		answer, err := d.link.Send(command, limitOf(code))
		if err != nil {
			d.hangUp()
			return nil, &lostError{err}
		}
		if len(answer) < headerSize {
			d.hangUp()
			return nil, &lostError{fmt.Errorf("response of %d bytes", len(answer))}
		}
		// TPM_RC_RETRY means that the command was not started; so the sessions have not moved on, and the very same bytes are good.
		if !isOneOf(responseCode(answer), tpm2.TPMRCRetry, tpm2.TPMRCYielded, tpm2.TPMRCTesting, tpm2.TPMRCNVRate) || waited > maxWait {
			return answer, nil
		}
		d.sleep(wait)
		waited += wait
	}
}

// sleep waits, at most until the context of the job is done.
func (d *device) sleep(wait time.Duration) {
	t := time.NewTimer(wait)
	defer t.Stop()
	var done <-chan struct{}
	if d.job != nil {
		done = d.job.ctx.Done()
	}
	select {
	case <-t.C:
	case <-done:
	}
}

func limitOf(code tpm2.TPMCC) time.Duration {
	switch code {
	case tpm2.TPMCCCreate, tpm2.TPMCCCreatePrimary, tpm2.TPMCCCreateLoaded:
		return limitSlow
	}
	return limitCommand
}

func commandCode(command []byte) tpm2.TPMCC {
	if len(command) < headerSize {
		return 0
	}
	return tpm2.TPMCC(binary.BigEndian.Uint32(command[6:]))
}

// responseCode returns 0 for a response that is too short to have one.
func responseCode(response []byte) tpm2.TPMRC {
	if len(response) < headerSize {
		return 0
	}
	return tpm2.TPMRC(binary.BigEndian.Uint32(response[6:]))
}

// response is the response without parameters or sessions that says rc.
func response(rc tpm2.TPMRC) []byte {
	return binary.BigEndian.AppendUint32([]byte{0x80, 0x01, 0, 0, 0, headerSize}, uint32(rc))
}

// flush unloads an object. An error is of no use to anybody: either it is gone already, or the next that is short of memory flushes all.
func (d *device) flush(o *object) {
	tpm2.FlushContext{FlushHandle: o.handle}.Execute(d)
}

// flushAll unloads every transient object and every session, whoever left it. Loaded sessions of any type are listed in the range of HMAC
// sessions, saved ones in that of policy sessions (TPM 2.0 part 2 section 7.2).
func (d *device) flushAll() {
	d.root, d.hot = nil, nil
	for _, kind := range []tpm2.TPMHT{tpm2.TPMHTTransient, tpm2.TPMHTHMACSession, tpm2.TPMHTPolicySession} {
		answer, err := tpm2.GetCapability{Capability: tpm2.TPMCapHandles, Property: uint32(kind) << 24, PropertyCount: 254}.Execute(d)
		if err != nil {
			continue
		}
		handles, err := answer.CapabilityData.Data.Handles()
		if err != nil {
			continue
		}
		for _, h := range handles.Handle {
			d.flush(&object{handle: h})
		}
	}
}

// storageTemplate is what the storage root key is made from: ECC P-256 as the TCG has it (TCG EK Credential Profile annex B, without the
// policy), with nothing in unique. That is the parent of key files, and what systemd uses; go-tpm's template has zeros in unique, which
// makes another key.
func storageTemplate() tpm2.TPMTPublic {
	t := tpm2.ECCSRKTemplate
	t.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{})
	return t
}

// storageKey loads the storage root key, which every TPM makes from its seed and the template. Its name stays the same until somebody
// clears the TPM, and is what everything is bound to.
//
// Invariant: whatever is encrypted to the TPM is encrypted to a key whose name is the pinned one. So somebody between us and the TPM
// cannot put a key of theirs in its place.
//
// All other objects are unloaded, so that there is room.
func (d *device) storageKey() (*object, error) {
	d.cool()
	return d.parent()
}

// parent is storageKey for those who leave the other objects as they are.
func (d *device) parent() (*object, error) {
	if d.root == nil {
		answer, err := tpm2.CreatePrimary{
			PrimaryHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: d.ownerSession()},
			InPublic:      tpm2.New2B(storageTemplate()),
		}.Execute(d)
		if isOneOf(err, tpm2.TPMRCBadAuth, tpm2.TPMRCAuthFail, tpm2.TPMRCLockout) {
			return nil, otherOwner(err)
		}
		if err != nil {
			return nil, err
		}
		root := &object{handle: answer.ObjectHandle}
		if err := root.describe(answer.OutPublic); err != nil {
			d.flush(root)
			return nil, err
		}
		if err := checkStorageKey(root.public); err != nil {
			d.flush(root)
			return nil, err
		}
		d.root = root
		d.learned(root.name.Buffer)
	}
	if d.pinned != nil && !bytes.Equal(d.root.name.Buffer, d.pinned) {
		return nil, replaced(d.pinned, d.root.name.Buffer)
	}
	return d.root, nil
}

func otherOwner(cause error) error {
	return &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: "the owner hierarchy of the TPM has another password", Cause: cause,
		Remedy: "configure the owner password, or remove it (tpm2_changeauth -c owner)"}
}

func replaced(want, have []byte) error {
	return &enclave.Error{Kind: enclave.ErrReplaced,
		Detail: fmt.Sprintf("enrolled with the TPM whose storage key is %x, this one's is %x", want, have),
		Remedy: "the TPM was cleared or exchanged: unlock with another slot, then remove this one and enrol the TPM again"}
}

// describe computes the name from the public area rather than to believe the answer.
func (o *object) describe(public tpm2.TPM2BPublic) error {
	p, err := public.Contents()
	if err != nil {
		return err
	}
	name, err := tpm2.ObjectName(p)
	if err != nil {
		return err
	}
	o.public, o.name = p, *name
	return nil
}

// checkStorageKey refuses a key that is not made from the template: one that the TPM would let out, or whose private half somebody knows.
func checkStorageKey(public *tpm2.TPMTPublic) error {
	want := storageTemplate()
	want.Unique = public.Unique
	if public.Type != want.Type || !bytes.Equal(tpm2.Marshal(want), tpm2.Marshal(*public)) {
		return &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: "the storage key of the TPM is not what was asked for"}
	}
	_, err := publicKey(public)
	return err
}

// load loads what was made under the storage key. The caller flushes it.
func (d *device) load(root *object, public, private []byte) (*object, error) {
	answer, err := tpm2.Load{
		ParentHandle: root.with(tpm2.PasswordAuth(nil)),
		InPrivate:    tpm2.TPM2BPrivate{Buffer: private},
		InPublic:     tpm2.BytesAs2B[tpm2.TPMTPublic](public),
	}.Execute(d)
	if err != nil {
		var rc tpm2.TPMRC
		if errors.As(err, &rc) && !rc.IsWarning() && !isReset(err) && !isOneOf(err, tpm2.TPMRCFailure, tpm2.TPMRCReboot) {
			// The storage key is the right one, so the data is wrong.
			return nil, corrupt("the TPM does not load what the blob holds", err)
		}
		return nil, err
	}
	o := &object{handle: answer.ObjectHandle}
	if err := o.describe(tpm2.BytesAs2B[tpm2.TPMTPublic](public)); err != nil {
		d.flush(o)
		return nil, err
	}
	return o, nil
}

// hotKeys is how many resident keys stay loaded, so that one that is used again and again is loaded once and not each time.
const hotKeys = 2

// hotKey is a resident key that is loaded. It is still authorised at every use.
type hotKey struct {
	id     []byte // the private area of its blob, or the public one of a machine's key
	object *object
}

// isHot returns the key with this id if it is loaded, and has it be the one used last.
func (d *device) isHot(id []byte) *object {
	for i, h := range d.hot {
		if bytes.Equal(h.id, id) {
			copy(d.hot[1:i+1], d.hot[:i])
			d.hot[0] = h
			return h.object
		}
	}
	return nil
}

// makeRoom unloads the resident key that was not used for longest, when there is no room for another.
func (d *device) makeRoom() {
	if n := len(d.hot); n == hotKeys {
		d.flush(d.hot[n-1].object)
		d.hot = d.hot[:n-1]
	}
}

// warm returns the resident key, loaded.
func (d *device) warm(root *object, k *key) (*object, error) {
	if o := d.isHot(k.private); o != nil {
		return o, nil
	}
	d.makeRoom()
	o, err := d.load(root, k.public, k.private)
	if err != nil {
		return nil, err
	}
	d.hot = append([]hotKey{{k.private, o}}, d.hot...)
	return o, nil
}

// cool unloads the resident keys.
func (d *device) cool() {
	for _, h := range d.hot {
		d.flush(h.object)
	}
	d.hot = nil
}

// nonceSize is the length of the nonces of sessions in bytes; it is also the strength of a session's freshness.
const nonceSize = 16

// salted are the options of a session that is salted to the storage key, so that it can neither be forged nor read along by somebody
// between us and the TPM, not even by one who knows auth (TPM 2.0 part 1 section 19.6.8).
func salted(root *object, auth []byte, more ...tpm2.AuthOption) []tpm2.AuthOption {
	return append(more, tpm2.Auth(auth), tpm2.Salted(root.handle, *root.public))
}

// The first parameter of the command, of the response, or of both encrypted by AES-128-CFB (TPM 2.0 part 1 section 21). It is the cipher
// of the storage key itself, and the one that every TPM has.
var (
	encryptIn    = tpm2.AESEncryption(128, tpm2.EncryptIn)
	encryptOut   = tpm2.AESEncryption(128, tpm2.EncryptOut)
	encryptInOut = tpm2.AESEncryption(128, tpm2.EncryptInOut)
)

// ownerSession authorises something by the owner hierarchy.
func (d *device) ownerSession(more ...tpm2.AuthOption) tpm2.Session {
	return tpm2.HMAC(tpm2.TPMAlgSHA256, nonceSize, append(more, tpm2.Auth(d.owner))...)
}

// property reads one property of the TPM, 0 when it has none such.
func (d *device) property(p tpm2.TPMPT) (uint32, error) {
	answer, err := tpm2.GetCapability{Capability: tpm2.TPMCapTPMProperties, Property: uint32(p), PropertyCount: 1}.Execute(d)
	if err != nil {
		return 0, err
	}
	list, err := answer.CapabilityData.Data.TPMProperties()
	if err != nil {
		return 0, err
	}
	if len(list.TPMProperty) == 1 && list.TPMProperty[0].Property == p {
		return list.TPMProperty[0].Value, nil
	}
	return 0, nil
}
