package engine

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/kmsd-project/kmsd/client/ciphertext"
	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/audit"
	"github.com/kmsd-project/kmsd/kmsd/mechanism"
	"github.com/kmsd-project/kmsd/policy"
)

// act is what a caller asks for.
type act struct {
	op     string
	ref    keyspec.Ref        // the key, or the zero Ref
	usage  keyspec.Usage      // what the key is put to; empty for an act on the key itself, or on none
	or     keyspec.Usage      // a usage that will do as well, or empty
	module bool               // of a MOSIP module key unwrap is asked for instead of usage; see Decrypt
	also   []keyspec.Name     // further keys that policy has to allow
	list   string             // for key_list: the namespace
	head   *ciphertext.Header // what is to be decrypted: with an AEAD key it names the version, when ref does not
	admin  bool               // administration of the daemon or the store
	sync   bool               // on disk in the audit before the reply
	twice  bool               // recorded on disk before it is begun, and its outcome afterwards
	always bool               // carried out even if that cannot be recorded
	quiet  bool               // success is not recorded
	info   string             // for the audit
}

// use is an act under way.
type use struct {
	*Engine
	ctx      context.Context
	caller   *Caller
	act      *act
	store    *keystore.Store
	decision policy.Decision
	now      time.Time

	// What there was when the act was authorised; see still.
	rules *policy.Policy
	asked uint64 // generation

	// Set for acts with a usage.
	key     *keystore.Key // shared: must not be changed
	version *keystore.Version
	spent   *blockOf // of which a use of a limited key was taken
	drains  uint64   // of spent, before that

	apps map[string]*Application // as they were found, of an act that goes over many keys; else nil

	recorded bool   // the audit entry of success was committed with the change
	detail   string // for the audit
}

// do is the one path of every operation: authorise, load, operate, audit.
//
// The policy decides on the names before the store is touched: without a grant the answer is ErrNotAvailable, as it is
// for a key that does not exist.
func (e *Engine) do(ctx context.Context, c *Caller, a *act, operate func(u *use) error) error {
	u := use{Engine: e, ctx: ctx, caller: c, act: a, now: e.now()}
	err := u.run(operate)
	return u.record(err)
}

func (u *use) run(operate func(u *use) error) error {
	return u.protect(func() (err error) {
		u.rules, u.asked = u.policy.Load(), u.generation.Load()
		if err = u.authorise(); err != nil {
			return err
		}
		if err = u.ctx.Err(); err != nil {
			return err
		}
		if u.store, err = u.opened(); err != nil {
			if !u.act.admin {
				return err
			}
			u.store = nil // acts on the daemon look themselves
		}
		if u.act.usage != "" {
			if err = u.load(); err != nil {
				return err
			}
			if err = u.spend(); err != nil {
				return err
			}
		}
		if u.act.twice {
			if err = u.announce(); err != nil {
				return err
			}
		}
		err = operate(u)
		u.unspend(err)
		return err
	})
}

// protect calls f and turns a panic into ErrInternal.
func (u *use) protect(f func() error) (err error) {
	defer func() {
		if r := recover(); r != nil {
			u.panics.Add(1)
			text, stack := DescribePanic(r)
			u.log.Error("operation panicked", "op", u.act.op, "panic", text, "stack", stack)
			u.detail = "panic: " + text
			err = ErrInternal
		}
	}()
	return f()
}

// DescribePanic says what a deferred function has recovered: without the value, which could hold anything, unless it is an
// error of the runtime; and the functions on the stack without their arguments, which a traceback would show.
func DescribePanic(r any) (text, stack string) {
	text = fmt.Sprintf("%T", r)
	if err, ok := r.(interface{ RuntimeError() }); ok {
		text = fmt.Sprint(err)
	}
	var pcs [32]uintptr
	frames := runtime.CallersFrames(pcs[:runtime.Callers(4, pcs[:])])
	var b strings.Builder
	for {
		f, more := frames.Next()
		fmt.Fprintf(&b, "%s:%d ", f.Function, f.Line)
		if !more {
			return text, b.String()
		}
	}
}

// authorise asks the policy about every name of the act.
func (u *use) authorise() error {
	a := u.act
	r := policy.Request{
		Caller: u.caller.facts(), Operation: a.op, Name: a.ref.Name, Usage: a.usage, Administration: a.admin,
	}
	if a.list != "" {
		r.Name = keyspec.Name(a.list)
	}
	p := u.policy.Load()
	u.decision = policy.Decide(p, &r)
	for i := 0; u.decision.Allowed && i < len(a.also); i++ {
		r.Name = a.also[i]
		u.decision = policy.Decide(p, &r)
	}
	if u.decision.Allowed {
		return nil
	}
	u.detail = u.decision.Rule
	if r.Name == "" {
		return ErrDenied
	}
	return ErrNotAvailable
}

// load finds the key and asks its own rules.
func (u *use) load() error {
	key, err := u.metadata(u.store, u.act.ref.Name, u.now)
	if err != nil {
		return err
	}
	u.key = key
	if err := reachable(key, u.caller); err != nil {
		return err
	}
	if u.act.module && key.Profile == mechanism.ProfileMOSIPModule {
		u.act.usage = keyspec.Unwrap
	}
	if h := u.act.head; h != nil && isAEAD(key.Algorithm) {
		err = u.follow(h)
	} else {
		u.version, err = version(key, u.act.ref.Version, u.now)
	}
	if err != nil {
		return err
	}
	return u.permitted()
}

// permitted asks the rules of the key about the version in use.
func (u *use) permitted() error {
	key := u.key
	if forZK(key.Name) && !strings.HasPrefix(u.act.op, "zk_") {
		return fmt.Errorf("%w: %s wraps random keys and nothing else", ErrUsage, key.Name)
	}
	err := permit(key, u.version, u.act.usage, u.now)
	if u.act.or != "" && errors.Is(err, ErrUsage) {
		err = permit(key, u.version, u.act.or, u.now)
	}
	if errors.Is(err, errCompromised) {
		return u.compromised()
	}
	return err
}

// still asks again, after an act has waited for its turn, what was asked before: a key that was suspended meanwhile, or a keystore that was
// locked, is not used any more.
func (u *use) still() error {
	if u.rules == nil || u.policy.Load() == u.rules && u.generation.Load() == u.asked {
		return nil // nothing has changed, or nobody has asked: it is an act of the daemon's own
	}
	if err := u.authorise(); err != nil {
		return err
	}
	if _, err := u.opened(); err != nil || u.key == nil {
		return err
	}
	key, err := u.metadata(u.store, u.key.Name, u.now)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(key.Versions, func(v keystore.Version) bool { return v.Number == u.version.Number })
	if i < 0 {
		return keystore.ErrNotFound
	}
	u.key, u.version = key, &key.Versions[i]
	return u.permitted()
}

// compromised asks the policy for the explicit grant that decryption with a compromised key needs.
func (u *use) compromised() error {
	r := policy.Request{
		Caller: u.caller.facts(), Operation: u.act.op, Name: u.act.ref.Name, Usage: u.act.usage, Compromised: true,
	}
	if d := policy.Decide(u.policy.Load(), &r); !d.Allowed {
		u.detail = d.Rule
		return fmt.Errorf("%w: compromised", ErrState)
	}
	u.detail = "with a compromised key"
	return nil
}

// record puts the outcome into the audit and returns what the caller is told. What cannot be recorded did not happen, as
// far as the caller is concerned.
func (u *use) record(err error) error {
	told := u.tell(err)
	if u.recorded {
		signal(u.wakeCopier)
		if err == nil {
			return nil
		}
	}
	if u.act.quiet && err == nil {
		return nil
	}
	entry := u.entry(told)
	if err != nil {
		var traced *Traced
		if errors.As(told, &traced) {
			entry.DetailID = traced.ID
		}
		if u.detail == "" {
			entry.Detail = err.Error()
		}
	}
	if u.act.twice {
		if !errors.Is(err, ErrUnrecorded) { // then there was nothing
			u.conclude(&entry)
		}
		return told
	}
	var failed error
	if u.act.sync || u.key != nil && u.key.Durable {
		failed = u.audit.AppendDurable(u.ctx, &entry)
	} else {
		failed = u.audit.Append(&entry)
	}
	if failed != nil && err == nil {
		return fmt.Errorf("%w: %w", ErrAudit, failed)
	}
	return told
}

// Times that the record of an act of administration may take.
const (
	announceTime = 10 * time.Second
	concludeTime = 5 * time.Second
)

// announce has it on disk that the act is about to be carried out. If that cannot be, the act is not.
//
// Before there is a keystore there is no auditor to encrypt to: then the entry waits in memory for the making of both.
func (u *use) announce() error {
	entry := u.entry(nil)
	entry.Code = "begun"
	limit := announceTime
	if u.act.always {
		limit = time.Second
	}
	ctx, cancel := context.WithTimeout(u.ctx, limit)
	defer cancel()
	err := u.audit.AppendDurable(ctx, &entry)
	if errors.Is(err, audit.ErrLocked) {
		err = u.audit.Append(&entry)
	}
	switch {
	case err == nil:
		return nil
	case u.act.always:
		u.log.Error("an act was carried out that could not be recorded", "op", u.act.op, "error", err)
		return nil
	case u.ctx.Err() != nil:
		return u.ctx.Err()
	}
	return fmt.Errorf("%w: %w", ErrUnrecorded, err)
}

// conclude records the outcome of an act that was announced. The act is done, its result may be the only one of its kind,
// and that it was begun is on disk: so whatever happens here, the caller gets what it has asked for.
func (u *use) conclude(entry *audit.Entry) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(u.ctx), concludeTime)
	defer cancel()
	err := u.audit.AppendDurable(ctx, entry)
	if errors.Is(err, audit.ErrLocked) { // as in announce
		err = u.audit.Append(entry)
	}
	if err != nil {
		u.log.Error("the outcome of an act is not in the audit yet", "op", u.act.op, "code", entry.Code, "error", err)
	}
}

func (u *use) entry(told error) audit.Entry {
	entry := audit.Entry{
		Time: u.now, Op: u.act.op, Key: string(u.act.ref.Name), Version: u.act.ref.Version, UID: u.caller.UID, PID: u.caller.PID,
		Principal: u.decision.Principal, Via: u.caller.Via, Client: u.caller.Client, Trace: trace(u.ctx), Allowed: u.decision.Allowed, Code: "ok",
		Detail: u.detail, PolicyEpoch: u.PolicyEpoch(),
	}
	if u.version != nil {
		entry.Version = u.version.Number
	}
	if entry.Key == "" {
		entry.Key = u.act.list
	}
	if entry.Detail == "" {
		entry.Detail = u.act.info
	}
	if told != nil {
		entry.Code = u.code(told)
	}
	return entry
}

// tell returns what the caller is told of err: a missing key is one that is not available, a failed decryption has no
// cause, and of defects and damage there is only a number under which the audit has the rest.
func (u *use) tell(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, keystore.ErrNotFound):
		return ErrNotAvailable
	case errors.Is(err, mechanism.ErrDecryption), errors.Is(err, ErrDecryption):
		return ErrDecryption
	case errors.Is(err, ErrInternal):
		return &Traced{ID: newID(), Err: ErrInternal}
	case errors.Is(err, keystore.ErrDamaged):
		return &Traced{ID: newID(), Err: keystore.ErrDamaged}
	case errors.Is(err, mechanism.ErrSelfTest):
		return &Traced{ID: newID(), Err: mechanism.ErrSelfTest}
	}
	return err
}

func newID() string {
	var b [8]byte
	rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

// commit carries changes into the store, with the audit entry of the act in the same transaction.
func (u *use) commit(c keystore.Commit) error {
	entry := u.entry(nil)
	sealed, err := u.audit.Seal(&entry)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrAudit, err)
	}
	c.Audit = sealed
	gone := u.goners(c.Changes)
	err = u.withNamespace(changedName(c.Changes), func() error { return u.store.Apply(u.ctx, c) })
	u.changed(c.Changes)
	if revokes(&c) {
		u.own.changes.Add(1)
	}
	if err == nil {
		u.recorded = true
		u.bury(gone)
	}
	return err
}

// Administrate carries out an act of administration that changes no key: authorised and recorded like every other. info
// is recorded with it.
func (e *Engine) Administrate(ctx context.Context, c *Caller, op, info string, f func() error) error {
	return e.do(ctx, c, &act{op: op, admin: true, sync: true, info: info}, func(*use) error { return f() })
}

// Change is Administrate for an act that changes the daemon or the store. That it is about to be carried out is recorded on
// disk before f is called, or f is not called and the error wraps ErrUnrecorded; whatever comes of recording the outcome, the
// error returned is that of f.
func (e *Engine) Change(ctx context.Context, c *Caller, op, info string, f func() error) error {
	return e.do(ctx, c, &act{op: op, admin: true, twice: true, info: info}, func(*use) error { return f() })
}

// ChangeAlways is Change for an act that is not to be hindered by a disk that is full.
func (e *Engine) ChangeAlways(ctx context.Context, c *Caller, op, info string, f func() error) error {
	return e.do(ctx, c, &act{op: op, admin: true, twice: true, always: true, info: info}, func(*use) error { return f() })
}

// Inspect authorises an act of administration that shows nothing but counts and digests, and carries it out. Only a
// refusal is recorded, so that watching leaves no trail of its own.
func (e *Engine) Inspect(ctx context.Context, c *Caller, op string, f func() error) error {
	return e.do(ctx, c, &act{op: op, admin: true, quiet: true}, func(*use) error { return f() })
}

// note records what the daemon does by itself.
func (e *Engine) note(op, detail string) error {
	return e.audit.Append(&audit.Entry{
		Time: e.now(), Op: op, Principal: daemonName, Allowed: true, Code: "ok", Detail: detail, PolicyEpoch: e.PolicyEpoch(),
	})
}

// daemonName is the principal of what the daemon does by itself.
const daemonName = "kmsd"

// Refused records a request that was refused before it reached an operation, such as one made while the keystore is
// locked. When too much waits to be written already it is only counted, in the audit's own statistics.
func (e *Engine) Refused(ctx context.Context, c *Caller, op, detail string, err error) {
	u := use{Engine: e, ctx: ctx, caller: c, act: &act{op: op}, now: e.now()}
	u.decision.Principal = e.Principal(c)
	entry := u.entry(err)
	entry.Detail = detail
	e.audit.Append(&entry)
}
