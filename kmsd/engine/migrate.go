package engine

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/hpke"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/kmsd-project/kmsd/client/packet"
	"github.com/kmsd-project/kmsd/client/pkix"
	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/keystore/secmem"
	"github.com/kmsd-project/kmsd/kmsd/mechanism"
	"github.com/kmsd-project/kmsd/kmsd/pki"
)

// The keys of a MOSIP key manager are brought in one by one, each with all its generations as the versions of one key, in one commit.
// Whoever does that again finds what is there: a key is known by its public halves. So an import that was interrupted goes on by being
// begun again, and an older copy of a deployment changes nothing.

// Generation is one generation of a key of MOSIP. It has at most one of Wrapped, Sealed and Reference; with none of them its private half
// is somebody else's.
type Generation struct {
	Created, Expires time.Time
	Certificate      []byte // DER; none for a symmetric key
	Unique           string // MOSIP's uni_ident, when it is not what KeyID makes of name and Created

	// The private half as MOSIP's database has it, wrapped by the module key with this public half (SHA-256 of the SubjectPublicKeyInfo).
	Wrapped []byte
	Module  [32]byte
	// The private half, or the symmetric key, sealed to the key of ImportBegin as for ImportWrapped.
	Sealed []byte
	// The name of a key that is in the device and stays there, in the driver's words.
	Reference []byte
}

func (g *Generation) foreign() bool {
	return len(g.Wrapped) == 0 && len(g.Sealed) == 0 && len(g.Reference) == 0
}

// Migration is one key with all its generations, the oldest first.
type Migration struct {
	Name        keyspec.Name
	Algorithm   keyspec.Algorithm  // empty: that of the certificates, or aes-256-gcm without any
	Protection  keyspec.Protection // empty: software
	Escrow      keyspec.Escrow     // of a module key in a device
	Token       *ImportToken       // of ImportBegin, when generations are sealed; it is spent whatever comes of it
	Generations []Generation

	private hpke.PrivateKey // of Token
}

// Outcome says what came of a Migration.
type Outcome string

// The outcomes.
const (
	Made     Outcome = "made"
	Extended Outcome = "extended" // generations were added to those that were there
	Present  Outcome = "present"  // everything was there
)

// ErrDiffers says that there is a key of the name with other generations.
var ErrDiffers = fmt.Errorf("%w: there is another key of this name", keystore.ErrConflict)

// LabelUnique begins the label with MOSIP's uni_ident of a version, whose number follows, where it does not follow from the name and the
// day of generation: the kid that others know the version by rests on it.
const LabelUnique = "mosip-uni-ident."

// maxUnique is how many versions of one key may have such a label. There are MaxLabels in all.
const maxUnique = keyspec.MaxLabels - 8

// Migrate makes a key of its generations, each a version: created when the generation was, expiring when it does, the newest the current
// one and the others deactivated. A wrapped private half is opened by the module key of the same application, which must have been
// brought in before, and every private half has to be that of its certificate.
//
// If there is a key of the name, its versions have to be the first of the generations, or the generations the first of its versions: then
// what is missing is added, or nothing is changed. Otherwise the error is ErrDiffers.
func (e *Engine) Migrate(ctx context.Context, c *Caller, m *Migration) (key *keystore.Key, outcome Outcome, err error) {
	a := &act{op: "key_migrate", ref: keyspec.Ref{Name: m.Name}, admin: true, sync: true}
	err = e.do(ctx, c, a, func(u *use) error {
		if u.store == nil {
			_, err := u.opened()
			return err
		}
		done, err := u.makers.take(u.ctx, string(m.Name))
		if err != nil {
			return err
		}
		defer done()
		if m.Token != nil {
			private, ok := u.imports.take(*m.Token, c, u.now)
			if !ok {
				return fmt.Errorf("%w: unknown or spent import token", ErrInput)
			}
			m.private = private
		}
		key, outcome, err = u.migrate(m)
		return err
	})
	if err != nil {
		return nil, "", err
	}
	signal(e.wakeScheduler)
	return key, outcome, nil
}

func (u *use) migrate(m *Migration) (*keystore.Key, Outcome, error) {
	if err := u.checkGenerations(m); err != nil {
		return nil, "", err
	}
	p, err := u.placeOf(m.Name, m.Algorithm == keyspec.AES256GCM)
	if err != nil {
		return nil, "", err
	}
	foreign := m.Generations[0].foreign()
	n := &NewKey{Name: m.Name, Algorithm: m.Algorithm, Usages: p.usages, Profile: p.profile, Protection: m.Protection, Escrow: m.Escrow, NoExpiry: true}
	origin := keyspec.Imported
	if foreign {
		if origin, n.Profile, n.Usages, err = foreignKey(m.Algorithm); err != nil {
			return nil, "", err
		}
	}
	described, row, err := u.describe(n, origin)
	if err != nil {
		return nil, "", err
	}
	before, err := u.store.Get(m.Name)
	switch {
	case errors.Is(err, keystore.ErrNotFound):
		described.Versions, described.Current = nil, 0
		described.Created = m.Generations[0].Created
		key, err := u.bringIn(m, p, described, row, 0)
		return key, Made, err
	case err != nil:
		return nil, "", err
	}
	have, err := u.compare(before, described, m, row)
	if err != nil {
		return nil, "", err
	}
	if have >= len(m.Generations) {
		u.detail = "present"
		u.asOf(before, u.now)
		return before, Present, nil
	}
	key, err := u.bringIn(m, p, before, row, have)
	return key, Extended, err
}

// foreignKey returns how the certificate of somebody else is kept: to encrypt to or to verify with.
func foreignKey(a keyspec.Algorithm) (keyspec.Origin, string, []keyspec.Usage, error) {
	row, err := mechanism.Lookup(a)
	if err != nil || row.Symmetric() {
		return "", "", nil, fmt.Errorf("%w: the certificate of somebody else for %s", ErrInput, a)
	}
	if row.Kind == mechanism.KindRSA {
		return keyspec.Foreign, "", []keyspec.Usage{keyspec.Encrypt}, nil
	}
	return keyspec.Foreign, "", []keyspec.Usage{keyspec.Verify}, nil
}

// checkGenerations refuses what is no history of one key.
func (u *use) checkGenerations(m *Migration) error {
	if len(m.Generations) == 0 || len(m.Generations) > keyspec.MaxVersions {
		return fmt.Errorf("%w: 1 to %d generations", ErrInput, keyspec.MaxVersions)
	}
	if m.Algorithm == "" {
		m.Algorithm = keyspec.AES256GCM
		if der := m.Generations[0].Certificate; len(der) > 0 {
			c, err := pki.ParseCertificate(der)
			if err != nil {
				return err
			}
			m.Algorithm = algorithmOf(c.PublicKey)
		}
	}
	row, err := mechanism.Lookup(m.Algorithm)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrInput, err)
	}
	foreign := m.Generations[0].foreign()
	resident := m.Protection != "" && m.Protection != keyspec.Software
	if resident && m.Protection != keyspec.HSM {
		return fmt.Errorf("%w: protection %s: keys of MOSIP are in software or in an HSM", ErrInput, m.Protection)
	}
	seen := make(map[[32]byte]bool)
	for i := range m.Generations {
		g := &m.Generations[i]
		bad := func(format string, args ...any) error {
			return fmt.Errorf("%w: generation %d: %s", ErrInput, i+1, fmt.Sprintf(format, args...))
		}
		sources := 0
		for _, b := range [][]byte{g.Wrapped, g.Sealed, g.Reference} {
			if len(b) > 0 {
				sources++
			}
		}
		switch {
		case sources > 1:
			return bad("more than one private half")
		case g.foreign() != foreign:
			return bad("a key has private halves here or elsewhere, not both")
		case (len(g.Reference) > 0) != resident:
			return bad("a key in a device has all of its versions there")
		case len(g.Wrapped) > 0 && m.Name.IsModule():
			return bad("a module key is not wrapped by another")
		case i > 0 && g.Created.Before(m.Generations[i-1].Created):
			return bad("not in the order in which they were made")
		case !g.Expires.After(g.Created), g.Created.Year() < 1970, g.Expires.Year() > 9999:
			return bad("it is valid from %s to %s", g.Created.UTC().Format(time.RFC3339), g.Expires.UTC().Format(time.RFC3339))
		case g.Created.After(u.now.Add(clockTolerance)):
			return bad("it was made at %s, which is in the future", g.Created.UTC().Format(time.RFC3339))
		case row.Symmetric() != (len(g.Certificate) == 0):
			return bad("a certificate belongs to every key but a symmetric one")
		case row.Symmetric():
			continue
		}
		c, err := pki.ParseCertificate(g.Certificate)
		if err != nil {
			return bad("%v", err)
		}
		public, err := mechanism.ParseSPKI(c.RawSubjectPublicKeyInfo)
		if err != nil {
			return bad("%v", err)
		}
		if algorithmOf(public) != m.Algorithm {
			return bad("its certificate is not of a %s key", m.Algorithm)
		}
		g.Certificate = c.Raw
		sum := sha256.Sum256(c.RawSubjectPublicKeyInfo)
		if seen[sum] {
			return bad("another one has the same public key")
		}
		seen[sum] = true
	}
	return nil
}

// algorithmOf returns the algorithm of keys with this public half that MOSIP has certificates of, or nothing.
func algorithmOf(public crypto.PublicKey) keyspec.Algorithm {
	switch key := public.(type) {
	case *rsa.PublicKey:
		return keyspec.Algorithm(fmt.Sprintf("rsa-%d", key.N.BitLen()))
	case *ecdsa.PublicKey:
		if pkix.IsSecp256k1(key) {
			return keyspec.ECDSASecp256k1
		}
		return keyspec.Algorithm(fmt.Sprintf("ecdsa-p%d", key.Curve.Params().BitSize))
	case ed25519.PublicKey:
		return keyspec.Ed25519
	}
	return ""
}

// compare returns how many of the generations are there already.
func (u *use) compare(key, described *keystore.Key, m *Migration, row *mechanism.Row) (have int, err error) {
	differs := func(format string, args ...any) error {
		return &Remedied{fmt.Errorf("%w: %s %s", ErrDiffers, key.Name, fmt.Sprintf(format, args...)), "kmsctl key show " + string(key.Name)}
	}
	switch {
	case key.Algorithm != described.Algorithm:
		return 0, differs("is a key for %s", key.Algorithm)
	case (key.Origin == keyspec.Foreign) != (described.Origin == keyspec.Foreign):
		return 0, differs("has its private half elsewhere, or here, and that does not change")
	case key.Protection != described.Protection:
		return 0, differs("has protection %s", key.Protection)
	}
	for i := range min(len(key.Versions), len(m.Generations)) {
		v, g := &key.Versions[i], &m.Generations[i]
		same := false
		if row.Symmetric() {
			same, err = u.sameSecret(key, v, m, g, row)
			if err != nil {
				return 0, err
			}
		} else {
			c, err := pki.ParseCertificate(g.Certificate)
			if err != nil {
				return 0, err
			}
			same = v.SPKISHA256 == sha256.Sum256(c.RawSubjectPublicKeyInfo)
		}
		if !same {
			return 0, differs("has another version %d", v.Number)
		}
		have++
	}
	if have < len(m.Generations) {
		last := &key.Versions[len(key.Versions)-1]
		if state := stateAt(key, last, u.now); state == keyspec.Suspended || state == keyspec.Destroyed {
			return 0, fmt.Errorf("%w: the newest version is %s", ErrState, state)
		}
		if m.Generations[have].Created.Before(last.Created) {
			return 0, differs("has newer versions than the generation that is missing")
		}
	}
	return have, nil
}

// sameSecret compares a symmetric key with what there is of it.
func (u *use) sameSecret(key *keystore.Key, v *keystore.Version, m *Migration, g *Generation, row *mechanism.Row) (same bool, err error) {
	if v.State == keyspec.Destroyed {
		return v.Created.Equal(g.Created), nil // there is nothing else left of it
	}
	var b []byte
	secmem.Do(func() { b, err = m.unsealed(g, row) })
	defer clear(b)
	if err != nil {
		return false, err
	}
	err = u.withMaterial(keyspec.Ref{Name: key.Name, Version: v.Number}, func(stored []byte) error {
		same = subtle.ConstantTimeCompare(stored, b) == 1
		return nil
	})
	return same, err
}

// bringIn commits the generations from first on.
func (u *use) bringIn(m *Migration, p *place, key *keystore.Key, row *mechanism.Row, first int) (*keystore.Key, error) {
	next := cloneKey(key)
	if first > 0 {
		if last, err := version(key, 0, u.now); err == nil && !last.Revoked.IsZero() {
			delete(next.Labels, LabelNoReplace) // as when it is replaced here
		}
	}
	for i := first; i < len(m.Generations); i++ {
		if err := room(next); err != nil {
			return nil, err
		}
		g := &m.Generations[i]
		number := keyspec.Version(1)
		if len(next.Versions) > 0 {
			number = newest(next) + 1
		}
		created := g.Created.Truncate(time.Second)
		next.Versions = append(next.Versions, keystore.Version{Number: number, State: keyspec.Active, Created: created, NotBefore: created,
			Expires: g.Expires.Truncate(time.Second)})
		if g.Unique != "" {
			setUnique(next, number, g.Unique)
		}
	}
	promote(next, newest(next))
	if first == 0 {
		next.MinVersion = 1
	}
	added := next.Versions[len(next.Versions)-(len(m.Generations)-first):]
	ch := &keystore.Change{Key: next, Material: make(map[keyspec.Version][]byte), Public: make(map[keyspec.Version]keystore.Public)}
	defer func() {
		for _, b := range ch.Material {
			clear(b)
		}
	}()
	b := bringing{u, m, p, next, row, ch, nil}
	if next.Protection != keyspec.Software {
		d, err := u.deviceOf(key)
		if err != nil {
			return nil, err
		}
		b.device = &d
	}
	u.detail = fmt.Sprintf("%d of %d generations of a key of MOSIP", len(added), len(m.Generations))
	err := b.each(added, m.Generations[first:], func() error {
		// Of the versions, the device of the guard is asked only about those that are in the store.
		guarded := cloneKey(next)
		guarded.Versions = append(slices.Clone(key.Versions), next.Versions[len(next.Versions)-1])
		escrow := m.Escrow
		if first > 0 {
			escrow = "" // as it was chosen
		}
		return u.withGuard(guarded, escrow, func(g *keystore.NamespaceGuard) error {
			ch.Guard = g
			defer u.writers.lock(m.Name)() // what came in between shows in the revision
			return u.commit(keystore.Commit{Changes: []keystore.Change{*ch}})
		})
	})
	if err != nil {
		return nil, err
	}
	next.Revision++
	u.asOf(next, u.now)
	return next, nil
}

// setUnique labels a version with its uni_ident. Where there is no room for all, the oldest versions lose theirs: they sign no more.
func setUnique(key *keystore.Key, number keyspec.Version, unique string) {
	if key.Labels == nil {
		key.Labels = make(map[string]string)
	}
	label := func(n keyspec.Version) string { return LabelUnique + strconv.FormatUint(uint64(n), 10) }
	for i := 0; i < len(key.Versions) && len(key.Labels) >= maxUnique; i++ {
		delete(key.Labels, label(key.Versions[i].Number))
	}
	if len(key.Labels) < maxUnique {
		key.Labels[label(number)] = unique
	}
}

// deviceOf returns the device of a key, or the one for new keys when it has no versions yet.
func (u *use) deviceOf(key *keystore.Key) (Device, error) {
	if len(key.Versions) == 0 {
		return u.device(key.Protection, "", "")
	}
	return u.deviceFor(key, newest(key)+1)
}

// bringing is a key that is being brought in.
type bringing struct {
	*use
	migration *Migration
	place     *place
	key       *keystore.Key
	row       *mechanism.Row
	change    *keystore.Change
	device    *Device // of a key that stays in one
}

// each gathers the material of versions, one inside of the other, and calls f while all of it is there.
func (b *bringing) each(versions []keystore.Version, generations []Generation, f func() error) error {
	if len(versions) == 0 {
		return f()
	}
	v, g := &versions[0], &generations[0]
	err := b.one(v, g, func(material, spki []byte) error {
		if err := b.take(v, g, material, spki); err != nil {
			return err
		}
		return b.each(versions[1:], generations[1:], f)
	})
	if err != nil && !errors.Is(err, errTold) {
		err = &generationError{v.Number, err}
	}
	return err
}

// errTold marks an error that says of which generation it is.
var errTold = errors.New("")

// generationError says which generation could not be brought in.
type generationError struct {
	number keyspec.Version
	err    error
}

func (e *generationError) Error() string   { return fmt.Sprintf("version %d: %v", e.number, e.err) }
func (e *generationError) Unwrap() error   { return e.err }
func (e *generationError) Is(t error) bool { return t == errTold }

// one calls f with the material and the public half of one generation.
func (b *bringing) one(v *keystore.Version, g *Generation, f func(material, spki []byte) error) error {
	switch {
	case g.foreign():
		return f(nil, nil)
	case b.device != nil:
		return b.inDevice(v, g, f)
	}
	var pkcs8 []byte
	if len(g.Wrapped) > 0 {
		var err error
		if pkcs8, err = b.unwrapped(g); err != nil {
			return err
		}
		defer clear(pkcs8)
	}
	return b.withNew(b.key, v.Number, b.row, func(_ *use, row *mechanism.Row) ([]byte, error) {
		if pkcs8 != nil {
			return row.Import(pkcs8)
		}
		return b.migration.unsealed(g, row)
	}, f)
}

// inDevice makes the record of a key that is in the device already.
func (b *bringing) inDevice(v *keystore.Version, g *Generation, f func(material, spki []byte) error) error {
	list, err := b.mechanisms(b.device)
	if err != nil {
		return err
	}
	if !Can(list, b.row, b.key.Usages) {
		return fmt.Errorf("%w: the device at %s has no %s keys for %s", ErrUnsupported, b.device.Location, b.key.Algorithm, join(b.key.Usages))
	}
	_, err = b.generate(b.device, b.row, b.key.Usages, keyspec.Ref{Name: b.key.Name, Version: v.Number}, g.Reference, f)
	return err
}

// take puts a generation into the change, if its private half is that of its certificate.
func (b *bringing) take(v *keystore.Version, g *Generation, material, spki []byte) error {
	if len(g.Certificate) > 0 {
		c, err := pki.ParseCertificate(g.Certificate)
		if err != nil {
			return err
		}
		if spki == nil && g.foreign() {
			spki = c.RawSubjectPublicKeyInfo
		}
		if !bytes.Equal(spki, c.RawSubjectPublicKeyInfo) {
			return fmt.Errorf("%w: the private key is not the one of the certificate", ErrInput)
		}
		if !g.foreign() {
			if err := b.notMixed(b.key, b.row, spki); err != nil {
				return err
			}
		}
		chain, err := b.chain(c)
		if err != nil {
			return err
		}
		v.SPKISHA256 = sha256.Sum256(spki)
		b.change.Public[v.Number] = keystore.Public{SPKI: bytes.Clone(spki), Chain: chain}
		b.change.Aliases = append(b.change.Aliases, Aliases(v.Number, spki)...)
	}
	if material != nil {
		b.change.Material[v.Number] = bytes.Clone(material)
	}
	return nil
}

// chain returns a certificate with those above it, as far as they are here: that of the module key, and that of the root.
func (b *bringing) chain(leaf *x509.Certificate) ([][]byte, error) {
	chain := [][]byte{leaf.Raw}
	if b.key.Origin == keyspec.Foreign || b.place.rank == rankRoot {
		return chain, nil
	}
	above := []keyspec.Name{RootName}
	if !b.place.name.IsModule() {
		above = []keyspec.Name{keyspec.Name(b.place.name.Namespace()), RootName}
	}
	for _, name := range above {
		key, err := b.metadata(b.store, name, b.now)
		if errors.Is(err, keystore.ErrNotFound) {
			continue
		}
		if err != nil {
			return nil, err
		}
		for i := len(key.Versions) - 1; i >= 0; i-- {
			stored, err := b.store.Public(keyspec.Ref{Name: name, Version: key.Versions[i].Number})
			if err != nil {
				return nil, err
			}
			if len(stored.Chain) == 0 || len(stored.Chain) >= pki.MaxChain {
				continue
			}
			issuer, err := pki.ParseCertificate(stored.Chain[0])
			if err != nil {
				return nil, err
			}
			if issuer.CheckSignature(leaf.SignatureAlgorithm, leaf.RawTBSCertificate, leaf.Signature) == nil {
				return append(chain, stored.Chain...), nil
			}
		}
	}
	return chain, nil
}

// unsealed opens what was sealed to the key of ImportBegin.
func (m *Migration) unsealed(g *Generation, row *mechanism.Row) ([]byte, error) {
	if m.private == nil {
		return nil, fmt.Errorf("%w: a sealed key without an import token", ErrInput)
	}
	if len(g.Sealed) > MaxWrappedIn {
		return nil, fmt.Errorf("%w: wrapped key over %d bytes", ErrInput, MaxWrappedIn)
	}
	encoded, err := hpke.Open(m.private, hpke.HKDFSHA256(), hpke.AES256GCM(), []byte(importInfo), g.Sealed)
	if err != nil {
		return nil, ErrDecryption
	}
	defer clear(encoded)
	return row.Import(encoded)
}

// unwrapped opens a private half as MOSIP's database has it. The caller wipes it.
//
// Invariant: it is opened by a module key of its own application, and by no other key.
func (b *bringing) unwrapped(g *Generation) ([]byte, error) {
	module := keyspec.Name(b.place.name.Namespace())
	missing := &Remedied{fmt.Errorf("%w: the module key that wraps it is not here", ErrState), "bring in the generations of " + string(module) + " first"}
	ref, err := b.store.Alias(keystore.AliasSPKI, g.Module[:])
	switch {
	case errors.Is(err, keystore.ErrNotFound), err == nil && ref.Name != module:
		return nil, missing
	case err != nil:
		return nil, err
	}
	key, err := b.metadata(b.store, module, b.now)
	if err != nil {
		return nil, err
	}
	v, err := version(key, ref.Version, b.now)
	if err != nil {
		return nil, err
	}
	if err := permit(key, v, keyspec.Unwrap, b.now); err != nil {
		return nil, fmt.Errorf("module key %s: %w", ref, err)
	}
	k, err := b.loadedKey(key, v.Number)
	if err != nil {
		return nil, err
	}
	var pkcs8 []byte
	unwrap := func() { pkcs8, err = packet.UnwrapPrivateKey(b.ctx, moduleKey{k}, g.Wrapped) }
	if key.Protection == keyspec.Software {
		secmem.Do(unwrap)
	} else {
		unwrap()
	}
	switch {
	case errors.Is(err, packet.ErrDecryption), errors.Is(err, mechanism.ErrDecryption):
		err = ErrDecryption
	case errors.Is(err, packet.ErrFormat), errors.Is(err, packet.ErrTooLarge):
		err = fmt.Errorf("%w: %w", ErrInput, err)
	}
	if err != nil {
		return nil, fmt.Errorf("wrapped private key: %w", err)
	}
	return pkcs8, nil
}

// moduleKey unwraps for package packet.
type moduleKey struct{ key *mechanism.Key }

// Unwrap implements packet.Unwrapper.
func (m moduleKey) Unwrap(_ context.Context, _ [32]byte, wrapped []byte) ([]byte, error) {
	return m.key.Decrypt(nil, keyspec.RSAOAEPSHA256, wrapped, nil)
}

// loadedKey returns the private half of a key version, wherever it is.
func (u *use) loadedKey(key *keystore.Key, number keyspec.Version) (*mechanism.Key, error) {
	if key.Protection == keyspec.Software {
		return u.parsed(key, number)
	}
	l, err := u.loadResident(key, number)
	if err != nil {
		return nil, err
	}
	return u.residentAt(l, key.Name)
}

// ExportedMOSIP is a key as MOSIP's database has it.
type ExportedMOSIP struct {
	Ref     keyspec.Ref // with the version
	Wrapped []byte      // the private half, wrapped by the module key
	Chain   [][]byte    // DER, leaf first
	Module  keyspec.Ref // with the version
	Issuer  []byte      // certificate of the module key, DER
}

// ExportMOSIP returns a base key, or an Ed25519 sign key, wrapped by the module key of its application as MOSIP's table key_store has it;
// module names the version of that, 0 being the current one. It is for the admin socket. A key that is not exportable takes confirm.
//
// Invariant: that a private half leaves is on disk in the audit before it does.
func (e *Engine) ExportMOSIP(ctx context.Context, c *Caller, ref keyspec.Ref, module keyspec.Version, confirm bool) (out *ExportedMOSIP, err error) {
	a := &act{op: "key_export_mosip", ref: ref, admin: true, twice: true}
	if confirm {
		a.info = "confirmed"
	}
	err = e.do(ctx, c, a, func(u *use) error {
		if u.store == nil {
			_, err := u.opened()
			return err
		}
		out, err = u.exportMOSIP(ref, module, confirm)
		return err
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

func (u *use) exportMOSIP(ref keyspec.Ref, module keyspec.Version, confirm bool) (*ExportedMOSIP, error) {
	key, err := u.metadata(u.store, ref.Name, u.now)
	if err != nil {
		return nil, err
	}
	v, err := version(key, ref.Version, u.now)
	if err != nil {
		return nil, err
	}
	switch state := stateAt(key, v, u.now); {
	case key.Name.IsModule() || key.Profile == mechanism.ProfileMOSIPMachine || !key.Algorithm.IsRSA() && key.Algorithm != keyspec.Ed25519:
		return nil, fmt.Errorf("%w: MOSIP keeps base keys and Ed25519 keys wrapped by their module key, and no others", ErrUnsupported)
	case key.Protection != keyspec.Software || key.Origin == keyspec.Foreign:
		return nil, fmt.Errorf("%w: the private half of %s is not here", ErrUnsupported, key.Name)
	case !key.Exportable && !confirm:
		return nil, &Remedied{fmt.Errorf("%w: %s is not exportable", ErrUsage, key.Name), "--confirm gives it to whoever has the module key all the same"}
	case !v.DestroyAt.IsZero():
		return nil, fmt.Errorf("%w: destruction is scheduled", ErrState)
	case state != keyspec.Active && state != keyspec.Deactivated && state != keyspec.PreActive:
		return nil, fmt.Errorf("%w: the key is %s", ErrState, state)
	}
	out := &ExportedMOSIP{Ref: keyspec.Ref{Name: key.Name, Version: v.Number}}
	stored, err := u.store.Public(out.Ref)
	if err != nil {
		return nil, err
	}
	out.Chain = stored.Chain
	wrapper, err := u.metadata(u.store, keyspec.Name(key.Name.Namespace()), u.now)
	if err != nil {
		return nil, cmp.Or(missingModule(key.Name, err), err)
	}
	w, err := version(wrapper, module, u.now)
	if err != nil {
		return nil, err
	}
	out.Module = keyspec.Ref{Name: wrapper.Name, Version: w.Number}
	if !slices.Contains(wrapper.Usages, keyspec.Unwrap) {
		return nil, fmt.Errorf("%w: %s does not unwrap", ErrUsage, wrapper.Name)
	}
	// A module key that is in other hands would open it for them.
	if state := stateAt(wrapper, w, u.now); state != keyspec.Active && state != keyspec.Deactivated || !w.DestroyAt.IsZero() {
		return nil, fmt.Errorf("%w: the module key %s is %s", ErrState, out.Module, state)
	}
	above, err := u.store.Public(out.Module)
	if err != nil {
		return nil, err
	}
	if len(above.Chain) > 0 {
		out.Issuer = above.Chain[0]
	}
	public, err := mechanism.ParseSPKI(above.SPKI)
	if err != nil {
		return nil, fmt.Errorf("%w: public key: %w", keystore.ErrDamaged, err)
	}
	rsaKey, ok := public.(*rsa.PublicKey)
	if !ok {
		return nil, fmt.Errorf("%w: the module key is no RSA key", ErrUnsupported)
	}
	row, err := mechanism.Lookup(key.Algorithm)
	if err != nil {
		return nil, err
	}
	u.version = v
	err = u.withMaterial(out.Ref, func(b []byte) error {
		pkcs8, err := row.Export(b)
		if err != nil {
			return err
		}
		defer clear(pkcs8)
		if out.Wrapped, err = packet.WrapPrivateKey(rsaKey, pkcs8); err != nil {
			err = fmt.Errorf("%w: %w", ErrUnsupported, err)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

func missingModule(name keyspec.Name, err error) error {
	if !errors.Is(err, keystore.ErrNotFound) {
		return nil
	}
	return &Remedied{fmt.Errorf("%w: %s has no module key", ErrState, name), "kmsctl master generate " + name.Namespace()}
}
