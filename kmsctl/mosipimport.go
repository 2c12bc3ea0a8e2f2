package main

import (
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/kmsd-project/kmsd/client"
	"github.com/kmsd-project/kmsd/client/pkix"
	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsctl/mosipdb"
	"github.com/kmsd-project/kmsd/kmsctl/pkcs12"
)

func newMosipImport(a *app) *cobra.Command {
	m := migration{app: a}
	var password secretFlags
	var out outFlags
	var report string
	c := uses(&cobra.Command{
		Use:   "import --from F [--from F...] {--keystore F | --hsm --certificates F} [flags]",
		Short: "Take over the keys of a key manager of MOSIP",
		Long: `Take over the keys of a MOSIP key manager: root, module and base keys with all their generations, symmetric keys, certificates of
others, validity policies, trusted CAs and random keys of the zero-knowledge encryption. What was encrypted to them can be decrypted
afterwards, expired keys included; kid and thumbprints stay what they were.

--from names the database: a plain dump of PostgreSQL (pg_dump --data-only without --inserts), or CSV files with a header, one for each
of the tables key_alias, key_store, key_policy_def, ca_cert_store, partner_cert_store and data_encrypt_keystore.

--keystore names the PKCS#12 file with the module keys. With --hsm they stay in the HSM that kmsd has for new keys, where they are found by
their label, the id in key_alias; --certificates then names a file with their certificates in PEM, and private halves are compared with
these.

Base keys are unwrapped in the daemon and nowhere else. Everything is read and compared before anything is changed; rows that cannot be
imported are reported with their line, and nothing is imported unless --skip-broken leaves them out. Each key is imported whole or not at
all, so an import that was interrupted is completed by giving the same command again: what is there is skipped, and what is there and
differs is refused.`,
		Example: `  kmsctl mosip import --from keymgr.sql --keystore keystore.p12 --dry-run
  kmsctl mosip import --from keymgr.sql --keystore keystore.p12 --password-file pass --report import.json
  kmsctl mosip import --from key_alias.csv --from key_store.csv --hsm --certificates modules.pem`,
		Args: exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			if m.hsm != (m.certificates != "") {
				return usagef("--hsm and --certificates go together")
			}
			if report != "" && !out.force {
				if _, err := os.Lstat(report); err == nil { // not after an hour of work
					if out.force = unfinished(report); !out.force {
						return withHint(fmt.Errorf("%s exists", report), "choose another --report, or replace it with --force")
					}
				}
			}
			defer m.wipe()
			err := m.run(c.Context(), &password)
			if report != "" && len(m.report.Files) > 0 {
				if e := m.write(report, out); e != nil && err == nil {
					err = e
				}
			}
			if m.report.Files != nil {
				if e := a.print(&m.report, m.report.text); e != nil && err == nil {
					err = e
				}
			}
			return err
		},
	}, proto.OpKeyMigrate, proto.OpKeyImportBegin, proto.OpAppGet, proto.OpAppSet, proto.OpZKImport, proto.OpTrustDomains, proto.OpTrustSet,
		proto.OpTrustAdd, proto.OpTrustList, proto.OpPartnerAdd)
	f := c.Flags()
	f.StringArrayVar(&m.from, "from", nil, `dump or CSV of the database; may be repeated, "-" is standard input`)
	f.StringVar(&m.keystore, "keystore", "", "PKCS#12 file with the module keys")
	f.BoolVar(&m.hsm, "hsm", false, "the module keys are in the HSM and stay there")
	f.StringVar(&m.certificates, "certificates", "", "certificates of the module keys, with --hsm")
	f.StringVar(&m.escrow, "escrow", "", "of the keys below module keys in an HSM: recipients or none")
	f.BoolVar(&m.dryRun, "dry-run", false, "read and compare everything, and change nothing")
	f.BoolVar(&m.skipBroken, "skip-broken", false, "leave out what cannot be imported")
	f.StringVar(&report, "report", "", "write the report to this file as well, as JSON")
	f.BoolVar(&out.force, "force", false, "replace the file of --report, whatever it is; an unfinished report is replaced without")
	password.register(c, "password", "the password of the PKCS#12 file")
	c.MarkFlagRequired("from")
	c.MarkFlagsMutuallyExclusive("keystore", "hsm")
	return c
}

// importReport is the report of an import.
type importReport struct {
	DryRun       bool              `json:"dry_run"`
	Complete     bool              `json:"complete"` // nothing was left out, failed or interrupted
	Files        []string          `json:"files"`
	Applications []mosipdb.Count   `json:"applications"`
	Broken       int               `json:"broken"`
	Problems     []mosipdb.Problem `json:"problems"`
	Policies     outcomeCounts     `json:"policies"`
	Keys         outcomeCounts     `json:"keys"`
	Certificates outcomeCounts     `json:"certificates"`
	RandomKeys   outcomeCounts     `json:"random_keys"`
	Failures     []importFailure   `json:"failures"`
	Seconds      float64           `json:"seconds"`
}

// unfinished reports whether a file is the report of a dry run or of an import that was not completed, which the next one replaces.
func unfinished(path string) bool {
	b, err := os.ReadFile(path)
	var r importReport
	return err == nil && json.Unmarshal(b, &r) == nil && r.Files != nil && (r.DryRun || !r.Complete)
}

// outcomeCounts counts what became of things of one kind.
type outcomeCounts struct {
	Found    int `json:"found"`
	Made     int `json:"made"`
	Extended int `json:"extended,omitempty"`
	Present  int `json:"present"`
	Failed   int `json:"failed"`
	Skipped  int `json:"skipped,omitempty"` // what they need has failed
}

func (c *outcomeCounts) add(outcome string) {
	switch outcome {
	case "made":
		c.Made++
	case "extended":
		c.Extended++
	case "present":
		c.Present++
	case outcomeSkipped:
		c.Skipped++
	default:
		c.Failed++
	}
}

// importFailure is something that the daemon has refused.
type importFailure struct {
	What   string `json:"what"`
	Reason string `json:"reason"`
	Hint   string `json:"hint,omitempty"`
}

// migration is one import.
type migration struct {
	app                            *app
	from                           []string
	keystore, certificates, escrow string
	hsm, dryRun, skipBroken        bool

	entries map[string]*pkcs12.Entry // by alias in lower case
	report  importReport

	mu     sync.Mutex
	failed map[string]bool // names of module keys that are not there
}

// Limits of an import.
const (
	maxModules     = 4 << 20 // bytes of --certificates
	importAtOnce   = 4       // keys that are under way at once: kmsd joins what they write
	maxShown       = 20      // problems and failures that people are shown
	maxFailures    = 10_000  // that are reported
	importWaitBusy = 200 * time.Millisecond
)

func (m *migration) wipe() {
	for _, e := range m.entries {
		e.Wipe()
	}
}

// run reads everything, and imports it if nothing speaks against that.
func (m *migration) run(ctx context.Context, password *secretFlags) error {
	begin := time.Now()
	r := mosipdb.NewReader()
	for _, path := range m.from {
		if err := m.read(ctx, r, path); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
	}
	entries, err := m.modules(r, password)
	if err != nil {
		return err
	}
	d := r.Deployment(entries, time.Now())
	m.report.DryRun, m.report.Files, m.report.Applications = m.dryRun, m.from, orEmpty(d.Counts)
	m.report.Problems, m.report.Broken = orEmpty(d.Problems), d.Broken()
	m.report.Policies.Found, m.report.Keys.Found = len(d.Policies), len(d.Keys)
	m.report.Certificates.Found, m.report.RandomKeys.Found = len(d.Certificates), len(d.RandomKeys)
	m.report.Failures = []importFailure{}
	if m.dryRun || m.report.Broken > 0 && !m.skipBroken {
		m.report.Complete = false
		if m.report.Broken > 0 {
			return withHint(fmt.Errorf("%d rows cannot be imported; nothing was changed", m.report.Broken), "look at the report and mend them, or leave them out with --skip-broken")
		}
		return nil
	}
	err = m.bringIn(ctx, d)
	m.report.Seconds = time.Since(begin).Seconds()
	c := &m.report
	m.report.Complete = err == nil && c.Broken+c.Policies.Failed+c.Keys.Failed+c.Keys.Skipped+c.Certificates.Failed+c.RandomKeys.Failed+c.RandomKeys.Skipped == 0
	if err == nil && !m.report.Complete && len(c.Failures) > 0 {
		err = fmt.Errorf("%d could not be imported", c.Policies.Failed+c.Keys.Failed+c.Keys.Skipped+c.Certificates.Failed+c.RandomKeys.Failed+c.RandomKeys.Skipped)
	}
	return err
}

func (m *migration) read(ctx context.Context, r *mosipdb.Reader, path string) error {
	in, total, err := m.app.open(path)
	if err != nil {
		var e *fs.PathError
		if errors.As(err, &e) {
			return e.Err
		}
		return err
	}
	defer in.Close()
	p := m.app.progressOf("reading "+path, total)
	defer p.end()
	return r.Read(path, p.reader(&contextReader{ctx, in}))
}

// modules returns what there is of module keys.
func (m *migration) modules(r *mosipdb.Reader, password *secretFlags) ([]mosipdb.Entry, error) {
	switch {
	case m.hsm:
		encoded, err := m.app.readFile(m.certificates, maxModules)
		if err != nil {
			return nil, err
		}
		list, err := decodeAll(encoded, "CERTIFICATE")
		if err != nil {
			return nil, fmt.Errorf("%s: %w", m.certificates, err)
		}
		return r.Resident(list), nil
	case m.keystore == "":
		return nil, nil
	}
	file, err := m.app.readFile(m.keystore, pkcs12.MaxSize)
	if err != nil {
		return nil, err
	}
	secret, err := password.read(m.app, "Password of "+m.keystore)
	if err != nil {
		return nil, err
	}
	defer clear(secret)
	list, err := pkcs12.Decode(file, string(secret))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", m.keystore, err)
	}
	m.entries = make(map[string]*pkcs12.Entry, len(list))
	var entries []mosipdb.Entry
	for i := range list {
		e := &list[i]
		if e.PrivateKey == nil && e.Secret == nil {
			continue
		}
		alias := strings.ToLower(e.Alias)
		if m.entries[alias] != nil {
			return nil, fmt.Errorf("%s: two keys under the alias %.64q", m.keystore, e.Alias)
		}
		m.entries[alias] = e
		entry := mosipdb.Entry{Alias: e.Alias, Certificate: e.Certificate, Secret: e.Secret != nil}
		if e.PrivateKey != nil {
			entry.SPKI = publicHalf(e.PrivateKey)
		}
		entries = append(entries, entry)
	}
	return entries, nil
}

// publicHalf returns the SubjectPublicKeyInfo of a private key, or nil if that takes the daemon to find out.
func publicHalf(pkcs8 []byte) []byte {
	private, err := x509.ParsePKCS8PrivateKey(pkcs8)
	if err != nil {
		return nil
	}
	signer, ok := private.(crypto.Signer)
	if !ok {
		return nil
	}
	spki, err := pkix.MarshalPublicKey(signer.Public())
	if err != nil {
		return nil
	}
	return spki
}

// bringIn imports what was read: applications before their keys, keys before those that they wrap.
func (m *migration) bringIn(ctx context.Context, d *mosipdb.Deployment) error {
	daemon, err := m.app.dial(ctx)
	if err != nil {
		return err
	}
	if err := m.policies(ctx, daemon, d); err != nil {
		return err
	}
	if err := m.keys(ctx, d.Keys); err != nil {
		return err
	}
	if err := m.randomKeys(ctx, daemon, d); err != nil {
		return err
	}
	return m.trust(ctx, daemon, d.Certificates)
}

// ends reports whether an error is of no single thing, so that going on is of no use.
func ends(err error) bool {
	var wire *client.Error
	if !errors.As(err, &wire) {
		return true
	}
	switch wire.Code {
	case proto.CodeLocked, proto.CodeUninitialised, proto.CodeUnknownOp, proto.CodeStorage, proto.CodeAbsent, proto.CodeMisconfigured, proto.CodeCancelled:
		return true
	}
	return false
}

func (m *migration) fail(what string, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.report.Failures) < maxFailures {
		m.report.Failures = append(m.report.Failures, importFailure{what, err.Error(), hintFor(err)})
	}
}

// interrupted is an error after which the same command goes on.
func interrupted(err error) error {
	if hint := hintFor(err); hint != "" {
		return withHint(fmt.Errorf("the import stopped: %w", err), "%s; then give the same command again, which goes on", hint)
	}
	return withHint(fmt.Errorf("the import stopped: %w", err), "give the same command again, which goes on")
}

// policies makes applications of policies, and of the applications that have keys and no policy, for which MOSIP makes no new ones.
func (m *migration) policies(ctx context.Context, daemon *client.Client, d *mosipdb.Deployment) error {
	const baseRow = "BASE"
	base := mosipdb.Policy{PreExpireDays: 30}
	rows := make(map[string]*mosipdb.Policy)
	var order []string
	for _, p := range d.Policies {
		if p.Application == baseRow {
			base = *p
			m.report.Policies.Present++
			continue
		}
		rows[p.Application] = p
		order = append(order, p.Application)
	}
	for _, c := range d.Counts {
		if rows[c.Application] == nil {
			order = append(order, c.Application)
		}
	}
	for _, name := range order {
		p := rows[name]
		outcome, err := m.policy(ctx, daemon, name, p, &base)
		if errors.Is(err, client.ErrExists) { // another import has been faster
			outcome, err = m.policy(ctx, daemon, name, p, &base)
		}
		if err != nil && ends(err) {
			return interrupted(err)
		}
		if err != nil {
			m.fail("policy of "+name, err)
		}
		if p != nil {
			m.report.Policies.add(outcome)
		}
	}
	return nil
}

// policy sets one application, unless somebody has set it before.
func (m *migration) policy(ctx context.Context, daemon *client.Client, name string, p, base *mosipdb.Policy) (outcome string, err error) {
	was, err := daemon.Application(ctx, name, true)
	switch {
	case errors.Is(err, client.ErrNotAvailable):
		was = &client.Application{Name: name, BuiltIn: true, Inactive: true}
	case err != nil:
		return outcomeFailed, err
	case p == nil:
		return "present", nil
	}
	next := *was
	if p != nil {
		next.Days, next.PreExpireDays, next.Inactive = uint32(p.Days), uint32(p.PreExpireDays), !p.Active
		if name != rootName {
			next.BaseDays, next.BasePreExpireDays = uint32(base.Days), uint32(base.PreExpireDays)
		}
	}
	if !was.BuiltIn {
		if next.Days == was.Days && next.PreExpireDays == was.PreExpireDays && next.BaseDays == was.BaseDays && next.BasePreExpireDays == was.BasePreExpireDays &&
			next.Inactive == was.Inactive {
			return "present", nil
		}
		return outcomeFailed, &client.Error{Code: proto.CodeConflict, Message: "the application has other settings", Remedy: "kmsctl app show " + name}
	}
	next.BuiltIn = false
	_, err = daemon.SetApplication(ctx, &next)
	if err != nil {
		return outcomeFailed, err
	}
	return "made", nil
}

// keys imports keys in their order: those that others need by themselves, base keys and certificates several at once.
func (m *migration) keys(ctx context.Context, keys []*mosipdb.Key) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	m.failed = make(map[string]bool)
	p := m.app.progressOf("importing keys", int64(len(keys)))
	defer p.end()
	queue := make(chan *mosipdb.Key)
	var workers sync.WaitGroup
	for range importAtOnce {
		workers.Go(func() {
			for k := range queue {
				if err := m.key(ctx, k); err != nil {
					cancel(err)
				}
				p.step()
			}
		})
	}
	for _, k := range keys {
		if ctx.Err() != nil {
			break
		}
		if k.Kind == mosipdb.Base || k.Kind == mosipdb.Foreign {
			select {
			case queue <- k:
			case <-ctx.Done():
			}
			continue
		}
		if err := m.key(ctx, k); err != nil {
			cancel(err)
		}
		p.step()
	}
	close(queue)
	workers.Wait()
	if err := context.Cause(ctx); err != nil {
		return interrupted(err)
	}
	return nil
}

// key imports one key. An error ends the import; what the daemon refuses is reported.
func (m *migration) key(ctx context.Context, k *mosipdb.Key) error {
	needs := k.Kind == mosipdb.Base || k.Kind == mosipdb.Sign && len(k.Generations[0].Wrapped) > 0
	m.mu.Lock()
	skip := needs && m.failed[k.Application]
	m.mu.Unlock()
	var outcome string
	var err error
	if skip {
		outcome, err = outcomeSkipped, fmt.Errorf("its module key %s could not be imported", k.Application)
	} else {
		outcome, err = m.migrate(ctx, k)
		if err != nil {
			if ends(err) {
				return err
			}
			outcome = outcomeFailed
		}
	}
	if err != nil {
		m.fail(string(k.Name), err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.report.Keys.add(outcome)
	if err != nil {
		m.failed[string(k.Name)] = true
	}
	return nil
}

// migrate hands one key to the daemon.
func (m *migration) migrate(ctx context.Context, k *mosipdb.Key) (outcome string, err error) {
	request := client.Migration{Name: string(k.Name), Generations: make([]client.Generation, len(k.Generations))}
	secrets := make([][]byte, len(k.Generations))
	for i := range k.Generations {
		g := &k.Generations[i]
		to := &request.Generations[i]
		*to = client.Generation{Created: g.Created.Unix(), Expires: g.Expires.Unix(), Certificate: g.Certificate, Unique: g.Unique, Wrapped: g.Wrapped}
		entry := m.entries[strings.ToLower(g.Alias)]
		switch {
		case k.Kind == mosipdb.Foreign:
		case len(g.Wrapped) > 0:
			module, err := pkix.ParseCertificate(g.Module)
			if err != nil {
				return "", err
			}
			sum := sha256.Sum256(module.RawSubjectPublicKeyInfo)
			to.Module = sum[:]
		case m.hsm:
			request.Protection = string(keyspec.HSM)
			to.Reference = []byte("pkcs11:object=" + url.PathEscape(g.Alias))
			if k.Name.IsModule() {
				request.Escrow = m.escrow
			}
		case entry != nil && entry.Secret != nil:
			secrets[i] = entry.Secret
		case entry != nil:
			secrets[i] = entry.PrivateKey
		}
	}
	for {
		err = m.app.with(ctx, func(ctx context.Context, daemon *client.Client) (err error) {
			outcome, _, err = daemon.Migrate(ctx, request, secrets)
			return err
		})
		if !errors.Is(err, client.ErrBusy) {
			return outcome, err
		}
		select { // others have work for the daemon too
		case <-time.After(importWaitBusy):
		case <-ctx.Done():
			return "", ctx.Err()
		}
	}
}

// identityCache is the reference of the key that wraps the random keys, as MOSIP names it.
const identityCache = "IDENTITY_CACHE"

// randomKeys imports the random keys of the zero-knowledge encryption as they are, wrapped by the current version of their key.
func (m *migration) randomKeys(ctx context.Context, daemon *client.Client, d *mosipdb.Deployment) error {
	if len(d.RandomKeys) == 0 {
		return nil
	}
	count := &m.report.RandomKeys
	var key *mosipdb.Key
	for _, k := range d.Keys {
		if k.Kind == mosipdb.Symmetric && k.Reference == identityCache {
			key = k
		}
	}
	if key == nil || m.failed[string(key.Name)] {
		count.Skipped = len(d.RandomKeys)
		m.fail("random keys", errors.New("the key IDENTITY_CACHE that wraps them is not there"))
		return nil
	}
	p := m.app.progressOf("importing random keys", int64(len(d.RandomKeys)))
	defer p.end()
	for list := d.RandomKeys; len(list) > 0; {
		n := min(len(list), proto.MaxZKImport)
		request := proto.ZKImport{Key: string(key.Name)}
		for _, k := range list[:n] {
			request.Keys = append(request.Keys, proto.ZKKey{Index: k.Index, Wrapped: k.Wrapped[:], Inactive: !k.Active})
			p.step()
		}
		var reply proto.ZKKeysReply
		switch err := daemon.Call(ctx, proto.OpZKImport, &request, &reply, nil); {
		case err != nil && ends(err):
			return interrupted(err)
		case err != nil:
			count.Failed += n
			m.fail(fmt.Sprintf("random keys %d to %d", list[0].Index, list[n-1].Index), err)
		default:
			count.Made += int(reply.Added)
			count.Present += n - int(reply.Added)
		}
		list = list[n:]
	}
	return nil
}

// trust adds the CAs and partners of the deployment to the domains of trust. What somebody has removed from a domain of kmsd stays removed.
func (m *migration) trust(ctx context.Context, daemon *client.Client, list []*mosipdb.Certificate) error {
	known := make(map[string]map[[sha256.Size]byte]bool)
	for _, c := range list {
		if known[c.Domain] != nil {
			continue
		}
		there, err := m.domain(ctx, daemon, c.Domain)
		if err != nil {
			return interrupted(err)
		}
		known[c.Domain] = there
	}
	// One CA may rest on another that comes later.
	refused := make(map[*mosipdb.Certificate]error)
	for pending, progress := list, true; progress; {
		progress = false
		var again []*mosipdb.Certificate
		for _, c := range pending {
			sum := sha256.Sum256(c.DER)
			if known[c.Domain][sum] {
				m.report.Certificates.Present++
				continue
			}
			err := addTrusted(ctx, daemon, c)
			switch {
			case errors.Is(err, client.ErrExists): // another import has been faster
				known[c.Domain][sum], progress = true, true
				m.report.Certificates.Present++
			case err == nil:
				known[c.Domain][sum], progress = true, true
				m.report.Certificates.Made++
			case ends(err) && !errors.Is(err, errNotTrusted):
				return interrupted(err)
			default:
				refused[c] = err
				again = append(again, c)
			}
		}
		pending = again
		if !progress {
			for _, c := range pending {
				sum := sha256.Sum256(c.DER)
				m.report.Certificates.Failed++
				m.fail(fmt.Sprintf("certificate %x of the domain %s", sum[:8], c.Domain), refused[c])
			}
		}
	}
	return nil
}

// domain returns what a domain of trust has or had, and makes the domain if there is none.
func (m *migration) domain(ctx context.Context, daemon *client.Client, name string) (map[[sha256.Size]byte]bool, error) {
	domains, err := daemon.TrustDomains(ctx)
	if err != nil {
		return nil, err
	}
	there := make(map[[sha256.Size]byte]bool)
	if !slices.ContainsFunc(domains, func(d client.TrustDomain) bool { return d.Name == name }) {
		_, err := daemon.SetTrustDomain(ctx, &client.TrustDomain{Name: name})
		return there, err
	}
	for _, role := range []string{"", "partner"} {
		for e, err := range daemon.Trust(ctx, name, role) {
			if err != nil {
				return nil, err
			}
			if len(e.SHA256) == sha256.Size {
				there[[sha256.Size]byte(e.SHA256)] = true
			}
		}
	}
	return there, nil
}

var errNotTrusted = errors.New("not trusted")

// addTrusted adds one certificate to its domain. An error that wraps errNotTrusted says what speaks against it.
func addTrusted(ctx context.Context, daemon *client.Client, c *mosipdb.Certificate) error {
	var results []client.TrustResult
	if c.Partner {
		r, err := daemon.AddPartner(ctx, c.Domain, c.Name, c.DER)
		if err != nil {
			return err
		}
		results = append(results, *r)
	} else {
		var err error
		if results, err = daemon.AddTrust(ctx, c.Domain, c.DER); err != nil {
			return err
		}
	}
	if len(results) == 1 && results[0].Added {
		return nil
	}
	if len(results) == 1 && len(results[0].Reasons) > 0 {
		return fmt.Errorf("%w: %s", errNotTrusted, results[0].Reasons[0].Text)
	}
	return errNotTrusted
}

// write writes the report to a file.
func (m *migration) write(path string, o outFlags) error {
	o.path = path
	var b strings.Builder
	if err := writeJSON(&b, &m.report); err != nil {
		return err
	}
	human := *m.app
	human.json = false // the file has the report, not an object around it
	return human.writeResult(o, "report", nil, []byte(b.String()), false, modePublic)
}

// text shows the report to people.
func (r *importReport) text(w io.Writer) {
	rows := [][]string{{"APPLICATION", "KEYS", "GENERATIONS", "CURRENT", "EXPIRED GENERATIONS", "OF OTHERS"}}
	for _, c := range r.Applications {
		rows = append(rows, []string{c.Application, number(c.Keys), number(c.Generations), number(c.Current), number(c.Expired), number(c.Foreign)})
	}
	table(w, rows)
	for i, p := range r.Problems {
		if i == maxShown {
			fmt.Fprintf(w, "... and %d more: --report F has all\n", len(r.Problems)-maxShown)
			break
		}
		fmt.Fprintf(w, "%s: %s:%d: %s\n", p.Severity, printable(p.File), p.Line, printable(strings.TrimSpace(fmt.Sprintf("%s %s: %s", p.Table, p.Key, p.Reason))))
	}
	for i, f := range r.Failures {
		if i == maxShown {
			fmt.Fprintf(w, "... and %d more: --report F has all\n", len(r.Failures)-maxShown)
			break
		}
		fmt.Fprintf(w, "failed: %s: %s\n", printable(f.What), printable(f.Reason))
	}
	if r.DryRun {
		fmt.Fprintf(w, "found: %d keys, %d policies, %d trusted certificates, %d random keys; nothing was changed\n", r.Keys.Found, r.Policies.Found, r.Certificates.Found, r.RandomKeys.Found)
		return
	}
	for _, c := range []struct {
		what string
		n    outcomeCounts
	}{{"keys", r.Keys}, {"policies", r.Policies}, {"trusted certificates", r.Certificates}, {"random keys", r.RandomKeys}} {
		if c.n.Found > 0 {
			fmt.Fprintf(w, "%s: %d found, %d made, %d extended, %d there already, %d failed, %d skipped\n", c.what, c.n.Found, c.n.Made, c.n.Extended, c.n.Present, c.n.Failed, c.n.Skipped)
		}
	}
}
