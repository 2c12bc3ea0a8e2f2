package mosipdb

import (
	"bytes"
	"cmp"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/kmsd-project/kmsd/client/packet"
	"github.com/kmsd-project/kmsd/client/pkix"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// Kind says what a key is for and where its private half is.
type Kind string

// The kinds of key, in the order in which they are imported.
const (
	Root      Kind = "root"      // signs the certificates of the module keys
	Module    Kind = "module"    // signs, and wraps the base keys of its application; KERNEL/SIGN is of the same kind
	Sign      Kind = "sign"      // an elliptic curve
	Symmetric Kind = "symmetric" // AES-256
	Base      Kind = "base"      // decrypts; its private half is in key_store, wrapped by a module key
	Foreign   Kind = "foreign"   // a certificate of somebody else
)

// Key is one key with all its generations, the oldest first.
type Key struct {
	Name                   keyspec.Name
	Application, Reference string
	Kind                   Kind
	Generations            []Generation
}

// Generation is one generation of a key.
type Generation struct {
	Alias       string // key_alias.id, which is its name in the keystore as well
	Line        int    // of its row in key_alias
	Created     time.Time
	Expires     time.Time
	Certificate []byte // DER; none for a symmetric key
	Wrapped     []byte // the private half as key_store has it, of a Base key, and of a Sign key that was made in software
	Module      []byte // certificate of the module key that wrapped it
	Unique      string // uni_ident, when it is not what application, reference and day of generation make of it: the kid rests on it
}

// Entry is what a keystore outside of the database has under an alias: the module keys.
type Entry struct {
	Alias       string
	Certificate []byte // DER; none for a symmetric key
	SPKI        []byte // of the private key; nil when that is in a device, where it cannot be looked at
	Secret      bool   // a symmetric key
}

// Severity says what a Problem means for the import.
type Severity string

// The severities.
const (
	Broken Severity = "broken" // the row cannot be imported, nor what depends on it
	Notice Severity = "notice" // it can
)

// Problem is what is wrong with a row.
type Problem struct {
	Severity Severity `json:"severity"`
	File     string   `json:"file,omitempty"`
	Line     int      `json:"line,omitempty"`
	Table    Table    `json:"table,omitempty"`
	Key      string   `json:"key,omitempty"` // application and reference, with a slash between
	Alias    string   `json:"alias,omitempty"`
	Reason   string   `json:"reason"`
}

// Count says how much there is of one application.
type Count struct {
	Application string `json:"application"`
	Keys        int    `json:"keys"`
	Generations int    `json:"generations"`
	Current     int    `json:"current"` // keys whose newest generation is not expired
	Expired     int    `json:"expired"` // generations
	Foreign     int    `json:"foreign"` // keys that are certificates of others
}

// Deployment is what the rows make.
type Deployment struct {
	Keys         []*Key // in the order in which they can be imported
	Policies     []*Policy
	Certificates []*Certificate
	RandomKeys   []*RandomKey
	Problems     []Problem
	Counts       []Count
}

// Reader collects rows.
type Reader struct {
	aliases  []*alias
	stored   map[string]*stored
	files    map[*alias]string
	storedIn map[*stored]string

	policies     []*Policy
	certificates []*Certificate
	random       []*RandomKey
	seenRandom   map[uint32]bool
	seenPolicy   map[string]bool
	seenAlias    map[string]bool
	badStored    map[string]bool
	problems     []Problem
	rows         int
}

// NewReader returns an empty one.
func NewReader() *Reader {
	return &Reader{stored: make(map[string]*stored), files: make(map[*alias]string), storedIn: make(map[*stored]string),
		seenRandom: make(map[uint32]bool), seenPolicy: make(map[string]bool), seenAlias: make(map[string]bool), badStored: make(map[string]bool)}
}

// maxProblems bounds what is remembered of a file that is all nonsense.
const maxProblems = 100_000

// ErrTooMany says that there is more than an import takes.
var ErrTooMany = errors.New("more rows than a key manager has")

// Read adds the rows of a file, which is called name in problems.
func (r *Reader) Read(name string, in io.Reader) error {
	for row, err := range Rows(in) {
		var bad *RowError
		if errors.As(err, &bad) {
			r.broken(name, bad.Line, bad.Table, "", "", errors.New(bad.Reason))
			err = nil
			row = nil
		}
		if err != nil {
			return err
		}
		if r.rows++; r.rows > MaxRows || len(r.problems) > maxProblems {
			return ErrTooMany
		}
		if row != nil {
			r.add(name, row)
		}
	}
	return nil
}

func (r *Reader) broken(file string, line int, table Table, key, id string, err error) {
	r.problem(Broken, file, line, table, key, id, err.Error())
}

func (r *Reader) problem(s Severity, file string, line int, table Table, key, id, reason string) {
	if len(reason) > maxReason {
		reason = strings.ToValidUTF8(reason[:maxReason], "")
	}
	r.problems = append(r.problems, Problem{s, file, line, table, key, id, reason})
}

var (
	errTwice   = errors.New("there is a second row of this id")
	errStored  = errors.New("its row in key_store is broken")
	errDeleted = "the row is marked as deleted: left out"
	errExpired = "the certificate has expired: left out"
)

func (r *Reader) add(file string, row *Row) {
	var err error
	id := row.Cell("id")
	switch row.Table {
	case KeyAlias:
		var a *alias
		if a, err = parseAlias(row); err == nil {
			if r.seenAlias[a.id] {
				err = errTwice
				break
			}
			r.seenAlias[a.id] = true
			r.aliases = append(r.aliases, a)
			r.files[a] = file
		}
	case KeyStore:
		var s *stored
		if s, err = parseStored(row); err != nil {
			r.badStored[id] = true
		} else {
			if r.stored[s.id] != nil {
				err = errTwice
				break
			}
			r.stored[s.id] = s
			r.storedIn[s] = file
		}
	case KeyPolicy:
		id = row.Cell("app_id")
		var p *Policy
		if p, err = parsePolicy(row); err == nil {
			if r.seenPolicy[p.Application] {
				err = errTwice
				break
			}
			r.seenPolicy[p.Application] = true
			r.policies = append(r.policies, p)
		}
	case CACerts, PartnerCerts:
		id = row.Cell("cert_id")
		if deleted, _ := parseBool(row.Cell("is_deleted")); deleted {
			r.problem(Notice, file, row.Line, row.Table, "", cut(id), errDeleted)
			return
		}
		var c *Certificate
		if c, err = parseTrust(row); err == nil {
			c.file, c.line = file, row.Line
			r.certificates = append(r.certificates, c)
		}
	case RandomKeys:
		var k *RandomKey
		if k, err = parseRandomKey(row); err == nil {
			if r.seenRandom[k.Index] {
				err = errTwice
				break
			}
			r.seenRandom[k.Index] = true
			r.random = append(r.random, k)
		}
	}
	if err != nil {
		key := ""
		if row.Table == KeyAlias {
			key = slashed(cut(row.Cell("app_id")), cut(row.Cell("ref_id")))
		}
		r.broken(file, row.Line, row.Table, key, cut(id), err)
	}
}

func cut(s string) string { return s[:min(len(s), maxName)] }

func slashed(app, ref string) string {
	if ref == "" {
		return app
	}
	return app + "/" + ref
}

// Deployment puts together what was read. entries are the module keys, from wherever they are; what is expired is so at now.
func (r *Reader) Deployment(entries []Entry, now time.Time) *Deployment {
	b := builder{Reader: r, now: now, entries: make(map[string]*Entry, len(entries)), modules: make(map[string]wrapper), used: make(map[string]bool)}
	for i := range entries {
		e := &entries[i]
		b.entries[strings.ToLower(e.Alias)] = e // Java's keystores make no difference between cases
	}
	d := &Deployment{Policies: r.policies, RandomKeys: r.random}
	for _, c := range r.certificates {
		if !now.Before(c.expires) {
			r.problem(Notice, c.file, c.line, c.table(), "", "", errExpired)
			continue
		}
		d.Certificates = append(d.Certificates, c)
	}
	d.Keys = b.keys()
	d.Problems = r.problems
	d.Counts = b.counts(d.Keys)
	sortTrust(d.Certificates)
	return d
}

// sortTrust puts those first that others may rest on.
func sortTrust(list []*Certificate) {
	rank := func(c *Certificate) int {
		switch {
		case c.Partner:
			return 2
		case c.SelfMade:
			return 0
		}
		return 1
	}
	slices.SortStableFunc(list, func(a, b *Certificate) int { return rank(a) - rank(b) })
}

// builder makes keys of rows.
type builder struct {
	*Reader
	now     time.Time
	entries map[string]*Entry
	modules map[string]wrapper // the module keys that can be imported, by alias
	used    map[string]bool    // rows of key_store, by alias
}

// wrapper is a module key that may wrap the keys of its application.
type wrapper struct {
	app         string
	certificate []byte
}

// keys returns every key of which a generation is left. Those that wrap others come before them.
func (b *builder) keys() (keys []*Key) {
	type pair struct{ app, ref string }
	groups := make(map[pair][]*alias)
	for _, a := range b.aliases {
		p := pair{a.app, a.ref}
		groups[p] = append(groups[p], a)
	}
	order := slices.SortedFunc(maps.Keys(groups), func(x, y pair) int {
		return cmp.Or(cmp.Compare(rank(b.kindOf(groups[x])), rank(b.kindOf(groups[y]))), strings.Compare(x.app, y.app), strings.Compare(x.ref, y.ref))
	})
	for _, p := range order {
		if k := b.key(p.app, p.ref, groups[p]); k != nil {
			keys = append(keys, k)
		}
	}
	for id, s := range b.stored {
		if !b.used[id] {
			b.broken(b.storedIn[s], s.line, KeyStore, "", id, errors.New("there is no row of key_alias for it: whose key it is, is not known"))
		}
	}
	b.sortProblems()
	return keys
}

func (b *builder) sortProblems() {
	slices.SortStableFunc(b.problems, func(x, y Problem) int {
		return cmp.Or(strings.Compare(x.File, y.File), cmp.Compare(x.Line, y.Line))
	})
}

func rank(k Kind) int { return slices.Index([]Kind{Root, Module, Symmetric, Sign, Foreign, Base}, k) }

// References that say what a key is for.
const (
	rootApplication = "ROOT"
	signReference   = "SIGN"
)

func isSignReference(ref string) bool {
	return ref == "EC_SECP256K1_SIGN" || ref == "EC_SECP256R1_SIGN" || ref == "ED25519_SIGN"
}

// kindOf says what the generations of one application and reference are.
func (b *builder) kindOf(list []*alias) Kind {
	a := list[0]
	switch {
	case a.app == rootApplication && a.ref == "":
		return Root
	case a.ref == "" || a.ref == signReference:
		return Module
	case isSignReference(a.ref):
		return Sign
	}
	// What has a certificate has a row in key_store.
	foreign, own := 0, 0
	for _, a := range list {
		switch s := b.stored[a.id]; {
		case s != nil && s.wrapped == nil:
			foreign++
		case s != nil:
			own++
		}
	}
	switch e := b.entries[strings.ToLower(a.id)]; {
	case foreign > own:
		return Foreign
	case own > 0 || foreign > 0:
		return Base
	case a.thumbprint == "" || e != nil && e.Secret:
		return Symmetric
	}
	return Base
}

// key makes the key of an application and reference. A generation that is broken is reported and left out.
func (b *builder) key(app, ref string, list []*alias) *Key {
	k := &Key{Application: app, Reference: ref, Kind: b.kindOf(list)}
	var err error
	if k.Name, err = KeyName(app, ref); err != nil {
		for _, a := range list {
			b.used[a.id] = true
			b.broken(b.files[a], a.line, KeyAlias, slashed(app, ref), a.id, fmt.Errorf("kmsd can give the key no name: %w", err))
		}
		return nil
	}
	// The order of the rows in the file says nothing: PostgreSQL moves a row that was changed.
	slices.SortFunc(list, func(x, y *alias) int { return cmp.Or(x.generated.Compare(y.generated), strings.Compare(x.id, y.id)) })
	h := history{seen: make(map[[32]byte]int)}
	for _, a := range list {
		g, err := b.generation(k, a)
		if err == nil && len(g.Certificate) > 0 {
			err = h.add(b, k, g, a)
		}
		if err == nil && len(k.Generations) == keyspec.MaxVersions {
			err = fmt.Errorf("the key has over %d generations", keyspec.MaxVersions)
		}
		if err != nil {
			b.broken(b.files[a], a.line, KeyAlias, slashed(app, ref), a.id, err)
			continue
		}
		k.Generations = append(k.Generations, *g)
	}
	if len(k.Generations) == 0 {
		return nil
	}
	if k.Kind == Module && ref == "" {
		for _, g := range k.Generations {
			b.modules[g.Alias] = wrapper{app, g.Certificate}
		}
	}
	return k
}

// history is what the generations of a key have in common.
type history struct {
	algorithm string
	seen      map[[32]byte]int // public keys, with the index of their generation
}

// add refuses a generation that cannot be a version of the same key, as kmsd would the whole key.
func (h *history) add(b *builder, k *Key, g *Generation, a *alias) error {
	c, err := pkix.ParseCertificate(g.Certificate)
	if err != nil {
		return errors.New("its certificate cannot be read")
	}
	name := algorithm(c)
	if h.algorithm = cmp.Or(h.algorithm, name); name != h.algorithm {
		return fmt.Errorf("it is a key for %s among keys for %s: a key of kmsd has one algorithm", name, h.algorithm)
	}
	sum := sha256.Sum256(c.RawSubjectPublicKeyInfo)
	at, ok := h.seen[sum]
	if !ok {
		h.seen[sum] = len(k.Generations)
		return nil
	}
	if k.Kind != Foreign {
		return errors.New("another generation has the same public key")
	}
	// A partner has renewed the certificate of its key. Nothing but the newer one is of use to encrypt to it.
	b.problem(Notice, b.files[a], a.line, KeyAlias, slashed(k.Application, k.Reference), k.Generations[at].Alias, "a later certificate of the same key is imported in its place")
	k.Generations = slices.Delete(k.Generations, at, at+1)
	for other, i := range h.seen {
		if i > at {
			h.seen[other] = i - 1
		}
	}
	h.seen[sum] = len(k.Generations)
	return nil
}

func algorithm(c *x509.Certificate) string {
	switch key := c.PublicKey.(type) {
	case *rsa.PublicKey:
		return fmt.Sprintf("RSA-%d", key.N.BitLen())
	case *ecdsa.PublicKey:
		if pkix.IsSecp256k1(key) {
			return "secp256k1"
		}
		return key.Curve.Params().Name
	}
	return c.PublicKeyAlgorithm.String()
}

const (
	// revokedBefore is how far MOSIP sets the expiry back when a key is revoked or forced out, so that it may come before the generation.
	revokedBefore = time.Minute
	maxAhead      = 5 * time.Minute // of the clock of the host that made a key: kmsd takes no more
)

// generation checks a row and what belongs to it.
func (b *builder) generation(k *Key, a *alias) (*Generation, error) {
	g := &Generation{Alias: a.id, Line: a.line, Created: a.generated.Truncate(time.Second), Expires: a.expires.Truncate(time.Second)}
	s := b.stored[a.id]
	if s != nil {
		b.used[a.id] = true
	}
	switch {
	case g.Created.After(b.now.Add(maxAhead)):
		return nil, errors.New("it was made in the future")
	case !g.Expires.After(g.Created) && g.Created.Sub(g.Expires) <= revokedBefore:
		g.Expires = g.Created.Add(time.Second)
		b.problem(Notice, b.files[a], a.line, KeyAlias, slashed(k.Application, k.Reference), a.id, "it was revoked within a minute of being made: it expires at once")
	case !g.Expires.After(g.Created):
		return nil, errors.New("it expires before it is made")
	}
	var err error
	switch {
	case s != nil && s.wrapped == nil && k.Kind != Foreign:
		return nil, errors.New("it is the certificate of somebody else among keys of one's own: a key of kmsd is one or the other")
	case s != nil && s.wrapped != nil && k.Kind == Foreign:
		return nil, errors.New("it is a key of one's own among certificates of others: a key of kmsd is one or the other")
	case s != nil && (k.Kind == Base || k.Kind == Sign):
		err = b.wrapped(k.Application, g, s)
	case s != nil && k.Kind == Foreign:
		g.Certificate = s.certificate
	default:
		err = b.entry(k, g, a, s)
	}
	if err != nil {
		return nil, err
	}
	if len(g.Certificate) > 0 {
		err = checkCertificate(k.Kind, g.Certificate, a)
	}
	if err != nil {
		return nil, err
	}
	if k.Kind != Symmetric {
		b.unique(k, g, a)
	}
	return g, nil
}

// unique keeps the uni_ident of a generation where kmsd would make another one of the name of the key and the day of generation.
func (b *builder) unique(k *Key, g *Generation, a *alias) {
	identifier := func(app, ref string) string {
		if k.Kind == Foreign {
			return packet.UniqueIdentifierOf(app, ref, sha256.Sum256(g.Certificate))
		}
		return packet.UniqueIdentifier(app, ref, g.Created)
	}
	was := cmp.Or(a.unique, identifier(a.app, a.ref)) // older releases have none
	app, ref, _ := strings.Cut(string(k.Name), "/")   // the reference may be another than MOSIP's, see KeyName
	if was == identifier(app, ref) {
		return
	}
	g.Unique = was
	if was != identifier(a.app, a.ref) && was != packet.UniqueIdentifierOf(a.app, a.ref, sha256.Sum256(g.Certificate)) { // as keys have it that MOSIP's own migration brought in
		b.problem(Notice, b.files[a], a.line, KeyAlias, slashed(k.Application, k.Reference), a.id,
			"uni_ident is not of the day of generation (a certificate was uploaded later, or the host was not in UTC): it is kept, as the kid rests on it")
	}
}

// wrapped takes the private half from key_store.
func (b *builder) wrapped(app string, g *Generation, s *stored) error {
	g.Certificate, g.Wrapped = s.certificate, s.wrapped
	if s.master == "" {
		return errors.New("key_store names no module key for it")
	}
	w, ok := b.modules[s.master]
	switch {
	case !ok:
		return fmt.Errorf("the module key that wraps it, %.64q, is not there or is broken", s.master)
	case w.app != app:
		return fmt.Errorf("the key that wraps it is the module key of another application, %s", w.app)
	}
	g.Module = w.certificate
	module, err := pkix.ParseCertificate(g.Module)
	if err != nil {
		return errors.New("the certificate of its module key cannot be read")
	}
	key, ok := module.PublicKey.(*rsa.PublicKey)
	if !ok {
		return errors.New("its module key is not RSA")
	}
	return packet.CheckPrivateKey(key, s.wrapped)
}

// entry takes the private half from the keystore outside of the database.
func (b *builder) entry(k *Key, g *Generation, a *alias, s *stored) error {
	e := b.entries[strings.ToLower(a.id)]
	switch {
	case e == nil && b.badStored[a.id]:
		return errStored
	case e == nil:
		return errors.New("its private key is not there: neither in key_store nor among the module keys")
	case e.Secret != (k.Kind == Symmetric):
		return errors.New("the keystore has a key of another kind under this alias")
	case e.Secret:
		return nil
	}
	g.Certificate = e.Certificate
	if s != nil && len(s.certificate) > 0 { // uploaded later, from an authority outside
		g.Certificate = s.certificate
	}
	if len(g.Certificate) == 0 {
		return errors.New("there is no certificate for it")
	}
	c, err := pkix.ParseCertificate(g.Certificate)
	if err != nil {
		return errors.New("its certificate cannot be read")
	}
	if len(e.SPKI) > 0 && !bytes.Equal(e.SPKI, c.RawSubjectPublicKeyInfo) {
		return errors.New("the private key is not the one of the certificate")
	}
	return nil
}

// checkCertificate refuses a certificate that does not fit its key.
func checkCertificate(kind Kind, der []byte, a *alias) error {
	if sum := packet.ThumbprintText(sha256.Sum256(der)); a.thumbprint != "" && a.thumbprint != sum {
		return fmt.Errorf("cert_thumbprint is not that of the certificate, %s", sum)
	}
	c, err := pkix.ParseCertificate(der)
	if err != nil {
		return errors.New("its certificate cannot be read")
	}
	switch kind {
	case Root, Module, Base:
		if c.PublicKeyAlgorithm != x509.RSA {
			return fmt.Errorf("its certificate is of a key for %s, not RSA", c.PublicKeyAlgorithm)
		}
	}
	return nil
}

func (b *builder) counts(keys []*Key) []Count {
	of := make(map[string]*Count)
	for _, k := range keys {
		c := of[k.Application]
		if c == nil {
			c = &Count{Application: k.Application}
			of[k.Application] = c
		}
		c.Keys++
		if k.Kind == Foreign {
			c.Foreign++
		}
		c.Generations += len(k.Generations)
		for _, g := range k.Generations {
			if !b.now.Before(g.Expires) {
				c.Expired++
			}
		}
		if b.now.Before(k.Generations[len(k.Generations)-1].Expires) {
			c.Current++
		}
	}
	var list []Count
	for _, app := range slices.Sorted(maps.Keys(of)) {
		list = append(list, *of[app])
	}
	return list
}

// Broken counts the rows that cannot be imported.
func (d *Deployment) Broken() int {
	n := 0
	for _, p := range d.Problems {
		if p.Severity == Broken {
			n++
		}
	}
	return n
}

// Resident returns entries for the keys whose private half is neither in key_store nor in a file, but in a device: those whose certificate
// is among these, by their thumbprint in key_alias.
func (r *Reader) Resident(certificates [][]byte) []Entry {
	by := make(map[string][]byte, len(certificates))
	for _, der := range certificates {
		by[packet.ThumbprintText(sha256.Sum256(der))] = der
	}
	var list []Entry
	for _, a := range r.aliases {
		if r.stored[a.id] != nil {
			continue
		}
		if der := by[a.thumbprint]; der != nil {
			list = append(list, Entry{Alias: a.id, Certificate: der})
		}
	}
	return list
}
