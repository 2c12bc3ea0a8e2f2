//go:build cgo

package token

import (
	"context"
	"crypto/ecdh"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/ThalesIgnite/crypto11"
	"github.com/miekg/pkcs11"

	"github.com/kmsd-project/kmsd/enclave"
	driver "github.com/kmsd-project/kmsd/enclave/pkcs11"
)

const (
	labelAgreed = "kmsd pkcs11 agreed v1"
	labelCheck  = "kmsd pkcs11 kek v1" // what is encrypted for the check value
)

// errRefused says that a ciphertext was not authentic to a token that is well otherwise.
var errRefused = errors.New("the token refuses the ciphertext")

// Wrap makes a key in the token and encrypts the secret with it, or under what it agrees on. The token has to be logged in.
func (t *Token) Wrap(ctx context.Context, secret, aad []byte) (enclave.Blob, error) {
	if len(secret) != enclave.SecretSize || len(aad) > enclave.MaxAAD {
		return nil, unsupported("secret of %d bytes with %d of associated data", len(secret), len(aad))
	}
	var slot *driver.Slot
	err := t.doMaking(ctx, func(c *connection, s pkcs11.SessionHandle) error {
		if err := c.usable(); err != nil {
			return err
		}
		slot = &driver.Slot{Guard: driver.Wrapped, Serial: c.token.SerialNumber, ID: make([]byte, driver.IDSize)}
		rand.Read(slot.ID)
		wrap := c.wrap
		if t.spec.Guard == driver.Agreed {
			slot.Guard, wrap = driver.Agreed, c.wrapAgreed
		}
		err := wrap(s, slot, secret, aad)
		if err != nil {
			c.discard(slot.ID)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	t.remember(slotObject(slot), true)
	return slot.Encode()
}

// slotObject is the key of a slot.
func slotObject(slot *driver.Slot) object {
	if slot.Guard == driver.Agreed {
		return keyObject(pkcs11.CKO_PRIVATE_KEY, slot.ID)
	}
	return keyObject(pkcs11.CKO_SECRET_KEY, slot.ID)
}

// discard removes a key that nobody will ask for, if it is there, with a session that nothing has happened on.
func (c *connection) discard(id []byte) {
	if s, err := c.sessions.open(); err == nil {
		c.destroy(s, id)
		c.module.CloseSession(s)
	}
}

func (c *connection) wrap(s pkcs11.SessionHandle, slot *driver.Slot, secret, aad []byte) error {
	template, err := secretTemplate(slot.ID, labelOf("slot", slot.ID), crypto11.CkaEncrypt, crypto11.CkaDecrypt)
	if err != nil {
		return err
	}
	if _, err := c.context.GenerateSecretKeyWithAttributes(template, 256, crypto11.CipherAES); err != nil {
		return c.made(err)
	}
	h, err := c.handle(s, slotObject(slot))
	if err != nil {
		return err
	}
	if err := c.confined(s, h); err != nil {
		return err
	}
	if slot.Check, err = c.checkValue(s, h); err != nil {
		return err
	}
	slot.Nonce = make([]byte, driver.NonceSize)
	rand.Read(slot.Nonce)
	slot.Sealed, err = c.seal(s, h, slot.Nonce, secret, aad)
	return err
}

func (c *connection) wrapAgreed(s pkcs11.SessionHandle, slot *driver.Slot, secret, aad []byte) error {
	public, err := c.generateEC(slot.ID, labelOf("slot", slot.ID), elliptic.P256(), crypto11.CkaDerive)
	if err != nil {
		return err
	}
	ours, err := public.ECDH()
	if err != nil {
		return err
	}
	h, err := c.handle(s, slotObject(slot))
	if err != nil {
		return err
	}
	if err := c.confined(s, h); err != nil {
		return err
	}
	other, err := ecdh.P256().GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	z, err := other.ECDH(ours)
	if err != nil {
		return err
	}
	slot.Public, slot.Point = ours.Bytes(), other.PublicKey().Bytes()
	key := agreedKey(z, slot)
	defer clear(key)
	slot.Sealed, err = enclave.Seal(key, labelAgreed, secret, aad)
	return err
}

// agreedKey is what the shared secret and both points give the key derivation (SP 800-56A section 5.8). It takes z over.
func agreedKey(z []byte, slot *driver.Slot) []byte {
	defer clear(z)
	return slices.Concat(z, slot.Public, slot.Point)
}

// Unwrap logs in with the PIN, whoever is logged in already, and opens the slot. The token stays logged in.
func (t *Token) Unwrap(ctx context.Context, b enclave.Blob, aad []byte, a enclave.Auth, dst []byte) error {
	if len(dst) != enclave.SecretSize || len(aad) > enclave.MaxAAD {
		return unsupported("destination of %d bytes with %d of associated data", len(dst), len(aad))
	}
	slot, err := driver.DecodeSlot(b)
	if err != nil {
		return err
	}
	if _, err := t.enter(ctx); err != nil {
		return translate(err)
	}
	t.gate.leave()
	return translate(t.alone(ctx, func(came time.Time) error {
		c, err := t.ready(came)
		if err != nil {
			return err
		}
		if err := c.is(slot.Serial); err != nil {
			return err
		}
		if c.needsLogin() {
			if err := t.login(c, a); err != nil {
				return err
			}
		}
		t.remember(slotObject(slot), true)
		return c.with(ctx, func(c *connection, s pkcs11.SessionHandle) error { return c.unwrap(s, slot, aad, dst) })
	}))
}

// is refuses another token than the enrolled one.
func (c *connection) is(serial string) error {
	if c.token.SerialNumber != serial {
		return replaced(fmt.Sprintf("enrolled with the token with serial %s, this is %s", serial, c.token.SerialNumber))
	}
	return nil
}

func (c *connection) unwrap(s pkcs11.SessionHandle, slot *driver.Slot, aad, dst []byte) error {
	if slot.Guard == driver.Agreed {
		return c.unwrapAgreed(s, slot, aad, dst)
	}
	h, err := c.handle(s, slotObject(slot))
	if err != nil {
		return err
	}
	secret, err := c.open(s, h, slot.Nonce, slot.Sealed, aad)
	defer clear(secret)
	if errors.Is(err, errRefused) {
		check, err := c.checkValue(s, h)
		if err != nil {
			return err
		}
		if !hmac.Equal(check, slot.Check) {
			return replaced("another key has the CKA_ID of the slot's")
		}
		return corrupt("authentication of the slot")
	}
	if err != nil {
		return err
	}
	if len(secret) != len(dst) {
		return corrupt("length of the slot's secret")
	}
	copy(dst, secret)
	return nil
}

func (c *connection) unwrapAgreed(s pkcs11.SessionHandle, slot *driver.Slot, aad, dst []byte) error {
	if _, err := ecdh.P256().NewPublicKey(slot.Point); err != nil { // a token might not look
		return corrupt("the point of the slot")
	}
	h, err := c.handle(s, slotObject(slot))
	if err != nil {
		return err
	}
	z, err := c.derive(s, h, slot.Point)
	if err != nil {
		return err
	}
	key := agreedKey(z, slot)
	defer clear(key)
	err = enclave.Open(key, labelAgreed, slot.Sealed, aad, dst)
	if !errors.Is(err, enclave.ErrCorrupt) {
		return err
	}
	// With the base point as its peer the key gives the x coordinate of its own public half.
	one, e := ecdh.P256().NewPrivateKey(append(make([]byte, 31), 1))
	if e != nil {
		return e
	}
	x, e := c.derive(s, h, one.PublicKey().Bytes())
	if e != nil {
		return e
	}
	if !hmac.Equal(x, slot.Public[1:1+len(x)]) {
		return replaced("another key has the CKA_ID of the slot's")
	}
	return err
}

// Forget destroys the key of a slot. The token has to be logged in.
func (t *Token) Forget(ctx context.Context, b enclave.Blob) error {
	slot, err := driver.DecodeSlot(b)
	if err != nil {
		return err
	}
	if err := t.destroy(ctx, slot.Serial, slot.ID); err != nil {
		return err
	}
	t.remember(slotObject(slot), false)
	return nil
}

func (t *Token) destroy(ctx context.Context, serial string, id []byte) error {
	return t.do(ctx, func(c *connection, s pkcs11.SessionHandle) error {
		if err := c.is(serial); err != nil {
			return err
		}
		return c.destroy(s, id)
	})
}

// seal encrypts by AES-GCM with our nonce (PKCS#11 2.40 current mechanisms section 2.11). The result ends with the tag of 16 bytes.
func (c *connection) seal(s pkcs11.SessionHandle, h pkcs11.ObjectHandle, nonce, plaintext, aad []byte) ([]byte, error) {
	params := pkcs11.NewGCMParams(nonce, aad, 128)
	defer params.Free()
	err := c.module.EncryptInit(s, mechanism(pkcs11.CKM_AES_GCM, params), h)
	if isOneOf(err, pkcs11.CKR_MECHANISM_INVALID) {
		return nil, &enclave.Error{Kind: enclave.ErrUnsupported, Detail: "the token has no AES-GCM", Cause: err, Remedy: "guard the slot by key agreement: guard=agreed"}
	}
	if err != nil {
		return nil, err
	}
	sealed, err := c.module.Encrypt(s, plaintext)
	if err != nil {
		return nil, err
	}
	if !slices.Equal(params.IV(), nonce) {
		return nil, unsupported("AES-GCM on a token that takes nonces of its own")
	}
	if len(sealed) != len(plaintext)+16 {
		return nil, &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: "the token encrypts to another length than AES-GCM has"}
	}
	return sealed, nil
}

// open reverses seal. The error is errRefused for a ciphertext that is not authentic.
func (c *connection) open(s pkcs11.SessionHandle, h pkcs11.ObjectHandle, nonce, sealed, aad []byte) ([]byte, error) {
	params := pkcs11.NewGCMParams(nonce, aad, 128)
	defer params.Free()
	if err := c.module.DecryptInit(s, mechanism(pkcs11.CKM_AES_GCM, params), h); err != nil {
		return nil, err
	}
	plaintext, err := c.module.Decrypt(s, sealed)
	if err != nil {
		return nil, c.refused(err)
	}
	if len(plaintext) != len(sealed)-16 {
		clear(plaintext)
		return nil, errRefused
	}
	return plaintext, nil
}

// refused tells a ciphertext that a token does not like from a token that has gone: SoftHSM answers both with CKR_GENERAL_ERROR.
func (c *connection) refused(err error) error {
	if isDoubtful(err) && !isOneOf(err, pkcs11.CKR_GENERAL_ERROR, pkcs11.CKR_FUNCTION_FAILED) {
		return err
	}
	if _, e := c.module.GetTokenInfo(c.slot); e != nil {
		return pkcs11.Error(pkcs11.CKR_TOKEN_NOT_PRESENT)
	}
	return errRefused
}

// checkValue identifies an AES key without giving anything away: it is the hash of what the key makes of a constant under the nonce of
// zeros, which no random nonce is.
func (c *connection) checkValue(s pkcs11.SessionHandle, h pkcs11.ObjectHandle) ([]byte, error) {
	sealed, err := c.seal(s, h, make([]byte, driver.NonceSize), []byte(labelCheck), nil)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(sealed)
	return sum[:driver.CheckSize], nil
}

func mechanism(m uint, params any) []*pkcs11.Mechanism {
	return []*pkcs11.Mechanism{pkcs11.NewMechanism(m, params)}
}
