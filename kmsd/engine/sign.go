package engine

import (
	"context"
	"errors"
	"fmt"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/mechanism"
	"github.com/kmsd-project/kmsd/policy"
)

// Sign signs in and appends the signature to dst. An empty scheme or encoding means the default.
func (e *Engine) Sign(ctx context.Context, c *Caller, ref keyspec.Ref, s keyspec.Scheme, enc mechanism.Encoding, in mechanism.Input, dst []byte) (sig []byte, number keyspec.Version, err error) {
	err = e.do(ctx, c, &act{op: "sign", ref: ref, usage: keyspec.Sign}, func(u *use) error {
		k, err := u.secret()
		if err != nil {
			return err
		}
		number = u.version.Number
		sig, err = k.Sign(dst, s, enc, in)
		return err
	})
	return sig, number, err
}

// Verified is the outcome of a verification that succeeded.
type Verified struct {
	Version     keyspec.Version
	Compromised bool // the signature is right, but that proves nothing any more
}

// Verify checks a signature. Without a version in ref every version that may verify is tried, the current one first. The
// error for a wrong signature wraps mechanism.ErrVerification.
func (e *Engine) Verify(ctx context.Context, c *Caller, ref keyspec.Ref, s keyspec.Scheme, enc mechanism.Encoding, in mechanism.Input, sig []byte) (v Verified, err error) {
	err = e.do(ctx, c, &act{op: "verify", ref: ref, usage: keyspec.Verify}, func(u *use) error {
		v, err = u.tryVersions(func() error {
			public, err := u.public()
			if err != nil {
				return err
			}
			return mechanism.Verify(public, s, enc, in, sig)
		})
		return err
	})
	return v, err
}

// maxTries bounds the versions that one verification tries.
const maxTries = 16

// tryVersions calls check with u.version set to the version that the act names or, if it names none, to every version that
// may be used, newest first, until check finds nothing wrong.
func (u *use) tryVersions(check func() error) (Verified, error) {
	first := check()
	var device *enclave.Error
	if first == nil || u.act.ref.Version != 0 || errors.As(first, &device) {
		return u.verified(), first
	}
	tried := u.version
	tries := 1
	for i := len(u.key.Versions) - 1; i >= 0 && tries < maxTries; i-- {
		v := &u.key.Versions[i]
		if v == tried || permit(u.key, v, u.act.usage, u.now) != nil {
			continue
		}
		tries++
		u.version = v
		if check() == nil {
			return u.verified(), nil
		}
	}
	u.version = tried
	return Verified{}, first
}

func (u *use) verified() Verified {
	return Verified{Version: u.version.Number, Compromised: stateAt(u.key, u.version, u.now) == keyspec.Compromised}
}

// MAC appends the MAC of data to dst.
func (e *Engine) MAC(ctx context.Context, c *Caller, ref keyspec.Ref, data, dst []byte) (mac []byte, number keyspec.Version, err error) {
	err = e.do(ctx, c, &act{op: "mac", ref: ref, usage: keyspec.MAC}, func(u *use) error {
		k, err := u.secret()
		if err != nil {
			return err
		}
		number = u.version.Number
		mac, err = k.MAC(dst, data)
		return err
	})
	return mac, number, err
}

// MACVerify checks a MAC as Verify checks a signature.
func (e *Engine) MACVerify(ctx context.Context, c *Caller, ref keyspec.Ref, data, mac []byte) (v Verified, err error) {
	err = e.do(ctx, c, &act{op: "mac_verify", ref: ref, usage: keyspec.Verify}, func(u *use) error {
		v, err = u.tryVersions(func() error {
			k, err := u.secret()
			if err != nil {
				return err
			}
			return k.VerifyMAC(data, mac)
		})
		return err
	})
	return v, err
}

// Peek returns what it takes to choose a lane: the mechanism of a key that is in the cache, or nil, whether this use of it may
// wait for the disk, and the kind of device that it takes: of a resident key, or of one in a namespace that a device has to open first.
//
// Invariant: for a key that the caller has no grant for it returns the same as for one that does not exist, since the time
// that an answer takes depends on the lane.
func (e *Engine) Peek(c *Caller, op string, name keyspec.Name) (row *mechanism.Row, waits bool, device keyspec.Protection) {
	r := policy.Request{Caller: c.facts(), Operation: op, Name: name}
	if !policy.Decide(e.policy.Load(), &r).Allowed {
		return nil, false, ""
	}
	seals := false // and so may have to reserve invocations
	switch op {
	case "encrypt", "rewrap", "data_key":
		seals = true
	}
	key, cached := e.keys.peek(name)
	if !cached && e.devices != nil {
		// Reading the record takes microseconds, and has to be done in any case. A pool that waits for a device would cost all others more.
		if s, err := e.opened(); err == nil {
			key, _ = e.metadata(s, name, e.now())
		}
	}
	switch {
	case key == nil:
		return nil, seals, ""
	case key.Protection != keyspec.Software:
		device = key.Protection
	case e.devices != nil && !name.IsModule():
		if _, parsed := e.secrets.peek(keyspec.Ref{Name: name, Version: current(key, e.now())}); !parsed {
			device = e.guardian(name)
		}
	}
	if device == "" && !cached {
		return nil, seals, ""
	}
	row, err := mechanism.Lookup(key.Algorithm)
	if err != nil {
		return nil, false, device
	}
	waits = key.Durable || key.Limited && e.counters.spent(keyspec.Ref{Name: name})
	if seals && row.Kind == mechanism.KindAEAD && !waits {
		waits = e.counters.spent(keyspec.Ref{Name: name, Version: current(key, e.now())})
	}
	return row, waits, device
}

// errAEAD says that the key has no cipher.
func errAEAD(a keyspec.Algorithm) error {
	return fmt.Errorf("%w: %s does not encrypt this way", ErrUnsupported, a)
}
