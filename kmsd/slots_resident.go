package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/enclave/pkcs11"
	"github.com/kmsd-project/kmsd/enclave/tpm"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/engine"
)

// Device implements engine.Devices. New keys are made in the device that the configuration names for their protection, else in that of the first
// slot of the kind.
func (k *slotKeeper) Device(ctx context.Context, p keyspec.Protection, location, binding string) (engine.Device, error) {
	if location == "" {
		var err error
		if location, binding, err = k.home(p); err != nil {
			return engine.Device{}, err
		}
	}
	e, err := k.devices.at(location, binding)
	if err != nil {
		return engine.Device{}, err
	}
	r, ok := e.(enclave.Resident)
	if !ok {
		return engine.Device{}, &enclave.Error{Kind: enclave.ErrUnsupported, Detail: location + " holds no keys of its own"}
	}
	if s, ok := e.(enclave.Session); ok {
		r = &selfLogin{Resident: r, session: s, pins: k.pins, kind: pkcs11.Kind, location: location, remedy: k.loginRemedy(location)}
	}
	return engine.Device{Location: location, Binding: binding, Enclave: e, Resident: r}, nil
}

// home returns where new keys of a protection are made.
func (k *slotKeeper) home(p keyspec.Protection) (location, binding string, err error) {
	kind, configured := tpm.Kind, k.homes.TPM
	if p == keyspec.HSM {
		kind, configured = pkcs11.Kind, k.homes.HSM
	}
	if configured != "" {
		s, err := parseSpec(configured)
		if err != nil {
			return "", "", err
		}
		location = s.location()
	}
	if s := k.store.Load(); s != nil {
		for _, slot := range s.Slots() { // the last one of the device: those before it may be stale
			if slot.Kind == kind && (location == "" || k.devices.same(slot.Location, location)) {
				location, binding = slot.Location, slot.Binding
			}
		}
	}
	if location == "" {
		return "", "", &enclave.Error{Kind: enclave.ErrUnsupported, Detail: fmt.Sprintf("no device for keys with the protection %s", p),
			Remedy: fmt.Sprintf("enrol a slot of it with kmsctl slot add %s:..., or name one under [devices] in the configuration", kind)}
	}
	return location, binding, nil
}

// loginRemedy says how somebody logs in to the device at a location.
func (k *slotKeeper) loginRemedy(location string) string {
	if s := k.store.Load(); s != nil {
		for _, slot := range s.Slots() {
			if k.devices.same(slot.Location, location) {
				return fmt.Sprintf("kmsctl unlock --slot %d --pin-file F", slot.ID)
			}
		}
	}
	return "enrol a slot of the device, or give its PIN in the configuration: [devices] hsm_pin_file"
}

// selfLogin are the resident keys of a token. Where kmsd has its PIN, the first call that needs it logs in again after the token was away or its
// helper has died; elsewhere a person is asked to.
type selfLogin struct {
	enclave.Resident
	session  enclave.Session
	pins     *pins
	kind     string
	location string
	remedy   string
}

// again repeats a call once, after logging in, when the token is locked.
func (l *selfLogin) again(ctx context.Context, f func() error) error {
	err := f()
	if !errors.Is(err, enclave.ErrLocked) {
		return err
	}
	if !l.pins.has(l.kind) {
		return &enclave.Error{Kind: enclave.ErrLocked, Detail: "nobody is logged in to the device of the key", Remedy: l.remedy}
	}
	l.pins.login.Lock() // one attempt, however many calls wait for it
	defer l.pins.login.Unlock()
	pin, stamp, pinErr := l.pins.take(l.kind, l.location, false)
	if pinErr != nil {
		return &enclave.Error{Kind: enclave.ErrLocked, Detail: "nobody is logged in to the device of the key", Cause: pinErr, Remedy: hintOf(pinErr)}
	}
	defer clear(pin)
	loginErr := l.session.Login(ctx, enclave.Auth{Secret: pin})
	l.pins.outcome(l.location, stamp, loginErr)
	if loginErr != nil {
		return loginErr
	}
	return f()
}

// Generate is enclave.Resident.Generate.
func (l *selfLogin) Generate(ctx context.Context, s enclave.Spec) (blob enclave.Blob, spki []byte, err error) {
	err = l.again(ctx, func() (err error) {
		blob, spki, err = l.Resident.Generate(ctx, s)
		return err
	})
	return blob, spki, err
}

// Do is enclave.Resident.Do.
func (l *selfLogin) Do(ctx context.Context, b enclave.Blob, op enclave.Op, dst []byte) (out []byte, err error) {
	err = l.again(ctx, func() (err error) {
		out, err = l.Resident.Do(ctx, b, op, dst)
		return err
	})
	return out, err
}

// Destroy is enclave.Resident.Destroy.
func (l *selfLogin) Destroy(ctx context.Context, b enclave.Blob) error {
	return l.again(ctx, func() error { return l.Resident.Destroy(ctx, b) })
}
