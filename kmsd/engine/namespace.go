package engine

import (
	"context"
	"crypto"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/mechanism"
)

// The base keys of a namespace whose module key is resident open only with the device that it is in: the device guards the wrapping
// key of the namespace. It does so with a key of its own for that, the guard key, which is made for each version of the module key,
// agrees or decrypts and does nothing else; the module key itself may be one that only signs.

// guard is what the keystore keeps of a guarded namespace:
//
//	format (1) = 1 | length (1), algorithm of the guard key | length (2), its record | length (2), its public half |
//	length (2), hint | sealed wrapping key (92)
//
// The hint is what the guard key makes the secret of, under which the wrapping key is sealed: for an ECDH key the ephemeral public key of
// the other side (SubjectPublicKeyInfo), for an RSA key the secret in RSAES-OAEP. All numbers are big endian.
type guard struct {
	algorithm keyspec.Algorithm
	record    []byte // of the guard key: see residentKey
	spki      []byte
	hint      []byte
	sealed    []byte
}

const (
	guardFormat = 1
	guardLabel  = "kmsd namespace v1"
	maxHint     = mechanism.MaxRSABits / 8
)

// guardLabelOAEP ends as a TPM wants it.
var guardLabelOAEP = []byte(guardLabel + "\x00")

var errGuard = fmt.Errorf("%w: guard of a namespace", keystore.ErrDamaged)

func (g *guard) encode() ([]byte, error) {
	b := append([]byte{guardFormat, byte(len(g.algorithm))}, g.algorithm...)
	for _, part := range [][]byte{g.record, g.spki, g.hint} {
		b = binary.BigEndian.AppendUint16(b, uint16(len(part)))
		b = append(b, part...)
	}
	b = append(b, g.sealed...)
	if len(b) > keystore.MaxMaterial {
		return nil, fmt.Errorf("%w: a device whose guard of a namespace takes %d bytes", ErrUnsupported, len(b))
	}
	return b, nil
}

// decodeGuard is the way back. The parts alias b.
func decodeGuard(b []byte) (*guard, error) {
	if len(b) < 2 || len(b) > keystore.MaxMaterial {
		return nil, errGuard
	}
	if b[0] != guardFormat {
		return nil, fmt.Errorf("%w: guard of a namespace in format %d: use the release of kmsd that made it, or a later one", ErrUnsupported, b[0])
	}
	n := int(b[1])
	if b = b[2:]; len(b) < n {
		return nil, errGuard
	}
	g := &guard{algorithm: keyspec.Algorithm(b[:n])}
	b = b[n:]
	for _, part := range []struct {
		into  *[]byte
		limit int
	}{{&g.record, keystore.MaxMaterial}, {&g.spki, mechanism.MaxSPKI}, {&g.hint, maxHint}} {
		if len(b) < 2 {
			return nil, errGuard
		}
		n := int(binary.BigEndian.Uint16(b))
		if n > part.limit || len(b) < 2+n {
			return nil, errGuard
		}
		*part.into, b = b[2:2+n], b[2+n:]
	}
	if len(b) != enclave.SealedSize {
		return nil, errGuard
	}
	g.sealed = b
	return g, nil
}

// guardRef is what guard keys are bound to: version 0 of the module key, which no key has.
func guardRef(module keyspec.Name) keyspec.Ref { return keyspec.Ref{Name: module} }

// guardAlgorithms are those of guard keys, the best first.
var guardAlgorithms = []struct {
	algorithm keyspec.Algorithm
	usage     keyspec.Usage
}{{keyspec.ECDHP256, keyspec.Agree}, {keyspec.RSA2048, keyspec.Decrypt}}

// withGuard calls f with what makes the device of a new version of a module key guard its namespace, or with nil for a key that guards
// none. The namespace is what it was, or new; escrow may be empty in the first case. If nothing comes of it, the device is told to forget
// the guard key; otherwise the one of before.
func (u *use) withGuard(key *keystore.Key, escrow keyspec.Escrow, f func(*keystore.NamespaceGuard) error) error {
	if !key.Name.IsModule() || key.Protection == keyspec.Software {
		return f(nil)
	}
	namespace := key.Name.Namespace()
	secret := make([]byte, enclave.SecretSize)
	defer clear(secret)
	var before *guard
	state, err := u.store.Namespace(namespace)
	switch {
	case errors.Is(err, keystore.ErrNotFound):
		rand.Read(secret)
		if escrow == "" {
			if escrow = keyspec.EscrowNone; len(u.store.Info().Escrow) > 0 {
				escrow = keyspec.EscrowRecipients
			}
		}
	case err != nil:
		return err
	case !state.Guarded: // restored, where the device was not
		return f(nil)
	default:
		if before, err = decodeGuard(state.Blob); err == nil {
			err = u.unseal(before, key, secret)
		}
		if err != nil {
			return err
		}
	}
	d, err := u.deviceFor(key, newest(key))
	if err != nil {
		return err
	}
	record, blob, err := u.sealNamespace(&d, key, secret)
	if err != nil {
		return err
	}
	if err := f(&keystore.NamespaceGuard{Blob: record, Key: secret, Escrow: escrow}); err != nil {
		if !errors.Is(err, keystore.ErrStorage) {
			u.abandon(&d, blob)
		}
		return err
	}
	u.spaces.use(namespace, u.now)
	if before != nil {
		if r, err := decodeResident(before.record); err == nil {
			u.bury([]gone{{key.Protection, r}})
		}
	}
	return nil
}

// sealNamespace makes a guard key in a device and seals a wrapping key with it.
func (u *use) sealNamespace(d *Device, module *keystore.Key, secret []byte) (record []byte, blob enclave.Blob, err error) {
	list, err := u.mechanisms(d)
	if err != nil {
		return nil, nil, err
	}
	for _, c := range guardAlgorithms {
		row, err := mechanism.Lookup(c.algorithm)
		if err != nil {
			return nil, nil, err
		}
		if usages := []keyspec.Usage{c.usage}; Can(list, row, usages) {
			g := &guard{algorithm: c.algorithm}
			blob, err := u.generate(d, row, usages, guardRef(module.Name), nil, func(r, spki []byte) (err error) {
				g.record, g.spki = r, spki
				record, err = u.fill(g, module, secret)
				return err
			})
			return record, blob, err
		}
	}
	return nil, nil, &enclave.Error{Kind: enclave.ErrUnsupported, Detail: fmt.Sprintf("the device at %s neither agrees nor decrypts, so it cannot guard a namespace", d.Location),
		Remedy: "give the key a name of two segments: it guards no namespace then"}
}

// fill seals the wrapping key under a fresh secret that only the guard key can make again, and makes sure that it does.
func (u *use) fill(g *guard, module *keystore.Key, secret []byte) ([]byte, error) {
	public, err := mechanism.ParseSPKI(g.spki)
	if err != nil {
		return nil, err
	}
	var z []byte
	if g.algorithm == keyspec.ECDHP256 {
		z, g.hint, err = agreeWith(public)
	} else {
		z = make([]byte, 32)
		rand.Read(z)
		g.hint, err = mechanism.Encrypt(nil, public, keyspec.RSAOAEPSHA256, z, guardLabelOAEP)
	}
	defer clear(z)
	if err != nil {
		return nil, err
	}
	if g.sealed, err = g.lock(z, u.boundGuard(module), secret); err != nil {
		return nil, err
	}
	again := make([]byte, enclave.SecretSize)
	defer clear(again)
	if err := u.unseal(g, module, again); err != nil {
		return nil, err
	}
	return g.encode()
}

// agreeWith agrees on a secret with a P-256 key, and returns what that key needs to do the same.
func agreeWith(public crypto.PublicKey) (z, spki []byte, err error) {
	key, ok := public.(*ecdsa.PublicKey)
	if !ok {
		return nil, nil, errGuard
	}
	point, err := key.ECDH()
	if err != nil {
		return nil, nil, err
	}
	ephemeral, err := ecdh.P256().GenerateKey(rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	if spki, err = x509.MarshalPKIXPublicKey(ephemeral.PublicKey()); err != nil {
		return nil, nil, err
	}
	z, err = ephemeral.ECDH(point)
	return z, spki, err
}

func (g *guard) lock(z, bound, secret []byte) ([]byte, error) {
	key := g.key(z)
	defer clear(key)
	return enclave.Seal(key, guardLabel, secret, bound)
}

// key is what the key derivation is given: the secret and both public values (SP 800-56A section 5.8).
func (g *guard) key(z []byte) []byte {
	key := make([]byte, 0, len(z)+len(g.hint)+len(g.spki))
	return append(append(append(key, z...), g.hint...), g.spki...)
}

func (u *use) boundGuard(module *keystore.Key) []byte {
	return boundTo(u.store, guardRef(module.Name))
}

// unseal has the device open the wrapping key of the namespace of a module key.
func (u *use) unseal(g *guard, module *keystore.Key, dst []byte) error {
	record, err := decodeResident(g.record)
	if err != nil {
		return err
	}
	row, err := mechanism.Lookup(g.algorithm)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrUnsupported, err)
	}
	public, err := mechanism.ParseSPKI(g.spki)
	if err != nil {
		return fmt.Errorf("%w: %w", errGuard, err)
	}
	bound := u.boundGuard(module)
	k, err := u.residentAt(&loaded{row, module.Protection, public, record, bound}, module.Name)
	if err != nil {
		return lostNamespace(err, module.Name)
	}
	var z []byte
	if row.Kind == mechanism.KindRSA {
		z, err = k.Decrypt(nil, keyspec.RSAOAEPSHA256, g.hint, guardLabelOAEP)
	} else {
		z, err = k.Agree(g.hint)
	}
	if err != nil {
		return lostNamespace(err, module.Name)
	}
	defer clear(z)
	key := g.key(z)
	defer clear(key)
	return enclave.Open(key, guardLabel, g.sealed, bound, dst)
}

// lostNamespace is lost for the guard of a namespace.
func lostNamespace(err error, module keyspec.Name) error {
	var e *enclave.Error
	if !errors.Is(err, enclave.ErrReplaced) || !errors.As(err, &e) {
		return err
	}
	return &enclave.Error{Kind: enclave.ErrReplaced, Detail: e.Detail,
		Remedy: fmt.Sprintf("the device that guards the namespace %s is gone: only a backup opens it, by the escrow recipients, if it has them (kmsctl backup restore)", module)}
}

// turns are the names at which somebody is: the namespaces that are opened, the keys that are made. That may take a device, which may
// hang, so whoever else needs one of them waits no longer than his request does, and nobody waits for a name that is not his.
type turns struct {
	mu   sync.Mutex
	busy map[string]chan struct{} // closed at the end
}

// take waits for the turn at a name, which done ends.
func (o *turns) take(ctx context.Context, name string) (done func(), err error) {
	for {
		done, busy := o.next(name)
		if done != nil {
			return done, nil
		}
		select {
		case <-busy:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// try returns what ends the turn at a name, or nil when it is somebody else's.
func (o *turns) try(name string) (done func()) {
	done, _ = o.next(name)
	return done
}

// idle reports whether nobody has a turn.
func (o *turns) idle() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return len(o.busy) == 0
}

// next returns what ends the turn at a name, or what is closed at the end of somebody else's.
func (o *turns) next(name string) (done func(), busy chan struct{}) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if busy = o.busy[name]; busy != nil {
		return nil, busy
	}
	if o.busy == nil {
		o.busy = make(map[string]chan struct{})
	}
	mine := make(chan struct{})
	o.busy[name] = mine
	return func() {
		o.mu.Lock()
		defer o.mu.Unlock()
		delete(o.busy, name)
		close(mine)
	}, nil
}

// openNamespace has the device that guards a namespace open it.
func (u *use) openNamespace(namespace string) error {
	done, err := u.openings.take(u.ctx, namespace)
	if err != nil {
		return err
	}
	defer done()
	state, err := u.store.Namespace(namespace)
	if err != nil {
		return err
	}
	if state.Open {
		return nil
	}
	module, err := u.metadata(u.store, keyspec.Name(namespace), u.now)
	if err != nil {
		return err
	}
	g, err := decodeGuard(state.Blob)
	if err != nil {
		return err
	}
	secret := make([]byte, enclave.SecretSize)
	defer clear(secret)
	if err := u.unseal(g, module, secret); err != nil {
		return fmt.Errorf("open namespace %s: %w", namespace, err)
	}
	u.spaces.use(namespace, u.now)
	u.touch()
	return u.store.OpenNamespace(namespace, secret)
}

// withNamespace calls f, once more if the namespace had to be opened by its device first.
func (u *use) withNamespace(name keyspec.Name, f func() error) error {
	err := f()
	if errors.Is(err, keystore.ErrNamespaceClosed) {
		if err := u.openNamespace(name.Namespace()); err != nil {
			return err
		}
		err = f()
	}
	if err == nil {
		u.spaces.keep(name.Namespace(), u.now)
	}
	return err
}

// namespaces remembers which guarded namespaces are open, and when they were used.
type namespaces struct {
	mu   sync.Mutex
	used map[string]time.Time
}

func (n *namespaces) use(namespace string, now time.Time) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.used == nil {
		n.used = make(map[string]time.Time)
	}
	n.used[namespace] = now
}

// keep is use for a namespace that may not be a guarded one.
func (n *namespaces) keep(namespace string, now time.Time) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if _, ok := n.used[namespace]; ok {
		n.used[namespace] = now
	}
}

// sweep returns those that were not used since a time, and forgets them.
func (n *namespaces) sweep(since time.Time) (idle []string, left int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for namespace, used := range n.used {
		if used.Before(since) {
			idle = append(idle, namespace)
			delete(n.used, namespace)
		}
	}
	return idle, len(n.used)
}

func (n *namespaces) clear() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.used = nil
}

// closeIdle closes the guarded namespaces that were not used since a time.
func (e *Engine) closeIdle(since time.Time) (left int) {
	idle, left := e.spaces.sweep(since)
	if s := e.store.Load(); s != nil {
		for _, namespace := range idle {
			s.CloseNamespace(namespace)
		}
	}
	return left
}

// NamespaceEscrow says who can restore the keys below a module key, empty for one whose namespace no device guards.
func (e *Engine) NamespaceEscrow(module keyspec.Name) keyspec.Escrow {
	s, err := e.opened()
	if err != nil || !module.IsModule() {
		return ""
	}
	state, err := s.Namespace(module.Namespace())
	if err != nil || !state.Guarded {
		return ""
	}
	return state.Escrow
}

// guardian returns the kind of device that has to open the namespace of a base key before the key can be loaded, empty when none has to.
func (e *Engine) guardian(name keyspec.Name) keyspec.Protection {
	s, err := e.opened()
	if err != nil {
		return ""
	}
	module, err := e.metadata(s, keyspec.Name(name.Namespace()), e.now())
	if err != nil || module.Protection == keyspec.Software {
		return ""
	}
	if state, err := s.Namespace(name.Namespace()); err != nil || state.Open {
		return ""
	}
	return module.Protection
}

// changedName is the name of the key that a commit changes, whose namespace may have to be opened for it. No commit makes keys in two.
func changedName(changes []keystore.Change) keyspec.Name {
	if len(changes) == 0 {
		return ""
	}
	return changes[0].Key.Name
}
