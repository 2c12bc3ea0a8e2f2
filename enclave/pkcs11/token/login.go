//go:build cgo

package token

import (
	"context"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/kmsd-project/kmsd/enclave"
)

// Login logs in to the token. A token that is logged in already is not asked again.
func (t *Token) Login(ctx context.Context, a enclave.Auth) error {
	if _, err := t.enter(ctx); err != nil {
		return translate(err)
	}
	t.gate.leave()
	return translate(t.alone(ctx, func(came time.Time) error {
		c, err := t.ready(came)
		if err != nil {
			return err
		}
		if !c.needsLogin() {
			return unsupported("the token wants no PIN")
		}
		if c.loggedIn {
			return nil
		}
		return t.login(c, a)
	}))
}

// ready returns a connection that works, as far as one can know. It is called by who has the gate for himself.
func (t *Token) ready(came time.Time) (*connection, error) {
	if t.conn != nil && (t.conn.missed.Load() || !t.conn.alive()) {
		t.disconnect()
	}
	if err := t.connect(came); err != nil {
		return nil, err
	}
	return t.conn, nil
}

// login makes one attempt. Whoever was logged in is logged out first: the token would not look at the PIN otherwise. It is called by who
// has the gate for himself.
func (t *Token) login(c *connection, a enclave.Auth) error {
	if len(a.Secret) == 0 {
		return errLocked()
	}
	token, err := c.module.GetTokenInfo(c.slot)
	if err != nil {
		return err
	}
	if err := mayLogin(token.Flags, t.spec.FinalTry); err != nil {
		return err
	}
	s, err := c.sessions.open()
	if err != nil {
		return err
	}
	defer c.module.CloseSession(s)
	c.forgetHandles()
	process.Lock()
	defer process.Unlock()
	c.note(false)
	if err := c.module.Logout(s); err != nil && !isOneOf(err, pkcs11.CKR_USER_NOT_LOGGED_IN) {
		return err
	}
	// The string is a copy that is not wiped, and so is what the module makes of it: it is the process that protects them.
	err = c.module.Login(s, pkcs11.CKU_USER, string(a.Secret))
	if after, e := c.module.GetTokenInfo(c.slot); e == nil {
		t.learn(c, after.Flags)
	}
	if err != nil {
		return err
	}
	c.note(true)
	return nil
}

// mayLogin says whether an attempt may be spent on a token with these flags.
func mayLogin(flags uint, finalTry bool) error {
	switch {
	case flags&pkcs11.CKF_USER_PIN_LOCKED != 0:
		return &enclave.Error{Kind: enclave.ErrLockedOut, Detail: "the token has locked its PIN", Remedy: remedyPINUsed}
	case flags&pkcs11.CKF_USER_PIN_INITIALIZED == 0:
		return &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: "the token has no user PIN yet", Remedy: "set the user's PIN with the tool of the token's vendor"}
	case flags&pkcs11.CKF_USER_PIN_TO_BE_CHANGED != 0:
		return &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: "the token wants its PIN changed", Remedy: "change the user's PIN with the tool of the token's vendor"}
	case flags&pkcs11.CKF_PROTECTED_AUTHENTICATION_PATH != 0:
		return &enclave.Error{Kind: enclave.ErrUnsupported, Detail: "the token takes its PIN on a keypad of its own"}
	case flags&pkcs11.CKF_USER_PIN_FINAL_TRY != 0 && !finalTry:
		return &enclave.Error{Kind: enclave.ErrLockedOut, Detail: "one more wrong PIN locks the token",
			Remedy: "log in with the tool of the token's vendor first, which resets the count, or add final-try=yes to the spec of the token"}
	}
	return nil
}

func pinWarning(flags uint) string {
	switch {
	case flags&pkcs11.CKF_USER_PIN_LOCKED != 0:
		return "the token has locked its PIN"
	case flags&pkcs11.CKF_USER_PIN_FINAL_TRY != 0:
		return "one more wrong PIN locks the token"
	case flags&pkcs11.CKF_USER_PIN_COUNT_LOW != 0:
		return "a wrong PIN was given since the last right one; the token counts them"
	}
	return ""
}
