//go:build cgo

package token

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ThalesIgnite/crypto11"
	"github.com/miekg/pkcs11"

	"github.com/kmsd-project/kmsd/enclave"
	driver "github.com/kmsd-project/kmsd/enclave/pkcs11"
)

// connection is a loaded module and the sessions with its token.
type connection struct {
	context  *crypto11.Context
	module   *pkcs11.Ctx
	slot     uint
	token    pkcs11.TokenInfo // as it was when the connection was made
	hardware bool             // the slot says so
	login    string           // what process knows the token by
	sessions *sessions

	// loggedIn is read by who is in the gate, and changed by note, by who has it for himself.
	loggedIn bool
	// missed says that a key was not found that should be there; the next login is made with a new connection, because a module may not
	// have noticed that its token was initialised anew.
	missed atomic.Bool
	// spoiled says that a session of crypto11 has died, which it would hand out again.
	spoiled atomic.Bool
	// lacksOAEP says that the token has refused OAEP with SHA-256.
	lacksOAEP atomic.Bool

	mu      sync.Mutex
	handles map[object]pkcs11.ObjectHandle
}

// others is how many sessions there are besides those of the pool: crypto11 has one to stay and one to make keys with, and one is for a login,
// when the pool is empty, or to clean up.
const others = 3

// process is what PKCS#11 makes common to all drivers in a process, as where one helper serves several connections: a module is initialised
// and finalised for the process, and so are logins (PKCS#11 2.40 base section 5.6, C_Login). logins counts the drivers that rely on one.
var process = struct {
	sync.Mutex
	logins map[string]int
}{logins: map[string]int{}}

// connect loads the module and finds the token. Nobody is logged in then.
func connect(s driver.Spec) (*connection, error) {
	path, err := checkModule(s.Module)
	if err != nil {
		return nil, err
	}
	process.Lock()
	defer process.Unlock()
	config := crypto11.Config{Path: path, TokenSerial: s.Serial, LoginNotSupported: true, GCMIVLength: driver.NonceSize,
		MaxSessions: 2, PoolWaitTimeout: 10 * time.Second} // one to stay, one to make keys with
	if s.Serial == "" {
		config.TokenLabel = s.Token
	}
	context, err := crypto11.Configure(&config)
	if err != nil {
		return nil, connectError(s, path, err)
	}
	c := &connection{context: context, module: pkcs11.New(path), handles: map[object]pkcs11.ObjectHandle{}}
	if c.module == nil {
		context.Close()
		return nil, &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: "the module cannot be loaded twice"}
	}
	if err := c.find(s); err != nil {
		c.release()
		return nil, err
	}
	c.login = path + "\x00" + c.token.SerialNumber
	limit := parallel
	for _, most := range []uint{c.token.MaxSessionCount, c.token.MaxRwSessionCount} {
		if most == pkcs11.CK_EFFECTIVELY_INFINITE || most == pkcs11.CK_UNAVAILABLE_INFORMATION || most >= parallel+others {
			continue
		}
		if most < others {
			c.release()
			return nil, &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: fmt.Sprintf("the token has %d sessions: %d are needed", most, others)}
		}
		limit = min(limit, max(int(most)-others, 1))
	}
	c.sessions = newSessions(c.module, c.slot, limit)
	return c, nil
}

// find learns which slot crypto11 has taken.
func (c *connection) find(s driver.Spec) error {
	slots, err := c.module.GetSlotList(true)
	if err != nil {
		return err
	}
	found := 0
	for _, slot := range slots {
		token, err := c.module.GetTokenInfo(slot)
		if err != nil || s.Serial != "" && token.SerialNumber != s.Serial || s.Serial == "" && token.Label != s.Token {
			continue
		}
		if found++; found == 1 {
			c.slot, c.token = slot, token
		}
	}
	switch {
	case found == 0:
		return &enclave.Error{Kind: enclave.ErrAbsent, Detail: "the token has gone"}
	case found > 1:
		return &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: fmt.Sprintf("%d tokens fit", found), Remedy: "name the token by its serial as well"}
	case c.token.Flags&pkcs11.CKF_TOKEN_INITIALIZED == 0:
		return &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: "the token is not initialised", Remedy: "initialise the token with the tool of its vendor"}
	case s.Token != "" && c.token.Label != s.Token:
		return &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: fmt.Sprintf("the token with serial %s has another label", s.Serial)}
	}
	slot, err := c.module.GetSlotInfo(c.slot)
	if err != nil {
		return err
	}
	c.hardware = slot.Flags&pkcs11.CKF_HW_SLOT != 0
	return nil
}

// connectError says why there is no connection. A token with the right label and another serial is another token.
func connectError(s driver.Spec, path string, err error) error {
	var rv pkcs11.Error
	switch {
	case isOneOf(err, pkcs11.CKR_GENERAL_ERROR, pkcs11.CKR_FUNCTION_FAILED):
		// So say modules whose daemon, network or directory has gone.
		return &enclave.Error{Kind: enclave.ErrAbsent, Detail: "the module finds no token", Cause: err, Remedy: "put the token in; the next request uses it"}
	case errors.As(err, &rv):
		return translate(err)
	case !strings.Contains(err.Error(), "could not find PKCS#11 token"): // crypto11 has no name for it
		return &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: "module " + path, Cause: err, Remedy: "install the PKCS#11 module of the token"}
	}
	if s.Serial != "" && s.Token != "" {
		other, err := crypto11.Configure(&crypto11.Config{Path: path, TokenLabel: s.Token, LoginNotSupported: true, MaxSessions: 2})
		if err == nil {
			other.Close()
			return replaced("a token with the label, and with another serial than " + s.Serial)
		}
	}
	return &enclave.Error{Kind: enclave.ErrAbsent, Detail: "no token " + s.Token + " " + s.Serial, Remedy: "put the token in; the next request uses it"}
}

// close ends all sessions, and logs out unless another driver of the token relies on the login.
func (c *connection) close() {
	process.Lock()
	defer process.Unlock()
	c.sessions.drain()
	if c.loggedIn {
		if c.note(false); process.logins[c.login] == 0 {
			if s, err := c.sessions.open(); err == nil {
				c.module.Logout(s) // another driver may have sessions with the token nevertheless
				c.module.CloseSession(s)
			}
		}
	}
	c.release()
}

// note keeps whether this driver relies on a login. The caller holds process.
func (c *connection) note(loggedIn bool) {
	if c.loggedIn == loggedIn {
		return
	}
	c.loggedIn = loggedIn
	if loggedIn {
		process.logins[c.login]++
	} else if process.logins[c.login]--; process.logins[c.login] == 0 {
		delete(process.logins, c.login)
	}
}

func (c *connection) release() {
	c.context.Close()
	c.module.Destroy()
}

// with runs f with a session of the pool.
func (c *connection) with(ctx context.Context, f func(*connection, pkcs11.SessionHandle) error) error {
	s, err := c.sessions.get(ctx)
	if err != nil {
		return err
	}
	err = f(c, s)
	c.sessions.put(s, err == nil)
	return err
}

func (c *connection) needsLogin() bool { return c.token.Flags&pkcs11.CKF_LOGIN_REQUIRED != 0 }

// usable refuses to touch private objects before a login.
func (c *connection) usable() error {
	if c.needsLogin() && !c.loggedIn {
		return errLocked()
	}
	return nil
}

// alive looks whether the connection is still of use, and begins with new sessions if it is. It is called by who has the gate for himself.
func (c *connection) alive() bool {
	if c.spoiled.Load() {
		return false
	}
	c.sessions.drain()
	c.forgetHandles()
	token, err := c.module.GetTokenInfo(c.slot)
	if err != nil || token.SerialNumber != c.token.SerialNumber {
		return false
	}
	s, err := c.sessions.open()
	if err != nil {
		return false
	}
	defer c.module.CloseSession(s)
	process.Lock() // nobody is between a logout and a login
	defer process.Unlock()
	state, err := c.module.GetSessionInfo(s)
	if err != nil {
		return false
	}
	if state.State != pkcs11.CKS_RW_USER_FUNCTIONS {
		c.note(false)
	}
	return true
}

// made passes on what crypto11 says after it has made a key or not.
func (c *connection) made(err error) error {
	if isDoubtful(err) {
		c.spoiled.Store(true)
	}
	return err
}

// sessions is the bounded pool of sessions. The gate and the bound are the same for most tokens, so that nobody waits here.
type sessions struct {
	module *pkcs11.Ctx
	slot   uint
	places chan struct{}             // holds one token for each session in use
	idle   chan pkcs11.SessionHandle // open, with nothing under way
}

func newSessions(module *pkcs11.Ctx, slot uint, limit int) *sessions {
	return &sessions{module: module, slot: slot, places: make(chan struct{}, limit), idle: make(chan pkcs11.SessionHandle, limit)}
}

func (p *sessions) open() (pkcs11.SessionHandle, error) {
	return p.module.OpenSession(p.slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
}

func (p *sessions) get(ctx context.Context) (pkcs11.SessionHandle, error) {
	if err := take(ctx, p.places); err != nil {
		return 0, err
	}
	select {
	case s := <-p.idle:
		return s, nil
	default:
	}
	s, err := p.open()
	if err != nil {
		<-p.places
	}
	return s, err
}

// put gives a session back, which is kept if nothing failed on it.
func (p *sessions) put(s pkcs11.SessionHandle, good bool) {
	if good {
		p.idle <- s // has room for all there are
	} else {
		p.module.CloseSession(s)
	}
	<-p.places
}

// drain closes the sessions that nobody uses.
func (p *sessions) drain() {
	for {
		select {
		case s := <-p.idle:
			p.module.CloseSession(s)
		default:
			return
		}
	}
}
