package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"
	"github.com/spf13/cobra"

	"github.com/kmsd-project/kmsd/client"
	"github.com/kmsd-project/kmsd/client/packet"
	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

func newHierarchy(a *app) *cobra.Command {
	c := &cobra.Command{Use: "hierarchy", Short: "Make the keys of all applications"}
	c.AddCommand(newHierarchyGenerate(a))
	return c
}

// maxKeyList is the size of the longest list of keys in bytes, and maxListed how many keys it may name.
const (
	maxKeyList = 1 << 20
	maxListed  = 20_000
)

// keyList is a file that names the keys of a deployment. Keys that are not known are refused.
type keyList struct {
	Applications []listedApplication `toml:"application"`
}

// listedApplication are the keys of one application.
type listedApplication struct {
	Name       string   `toml:"name"`
	Module     *bool    `toml:"module"`     // false: no module key, or for ROOT no root key
	Sign       []string `toml:"sign"`       // references of sign keys
	Base       []string `toml:"base"`       // references of base keys
	AES        []string `toml:"aes"`        // references of AES keys
	Protection string   `toml:"protection"` // of root, module and sign keys that are made; empty: that of the application
}

// listedKey is one key to be made.
type listedKey struct {
	name       string
	kind       string // root, module, sign, base or aes
	protection string
}

// keyKinds are the kinds of keys in the order in which they are made: each needs those before it.
var keyKinds = []string{"root", "module", "sign", "base", "aes"}

// parseKeyList reads a list of keys and returns them in the order in which they are made.
func parseKeyList(text []byte) ([]listedKey, error) {
	var list keyList
	d := toml.NewDecoder(bytes.NewReader(text)).DisallowUnknownFields()
	if err := d.Decode(&list); err != nil {
		var strict *toml.StrictMissingError
		if errors.As(err, &strict) && len(strict.Errors) > 0 {
			line, _ := strict.Errors[0].Position()
			return nil, fmt.Errorf("line %d: unknown setting %q", line, strings.Join(strict.Errors[0].Key(), "."))
		}
		var wrong *toml.DecodeError
		if errors.As(err, &wrong) {
			line, _ := wrong.Position()
			return nil, fmt.Errorf("line %d: %w", line, wrong)
		}
		return nil, err
	}
	var keys []listedKey
	seen := make(map[string]bool)
	add := func(name, kind, protection string) error {
		if _, err := keyspec.ParseName(name); err != nil {
			return err
		}
		if seen[name] {
			return fmt.Errorf("%s is there twice", name)
		}
		seen[name] = true
		keys = append(keys, listedKey{name, kind, protection})
		return nil
	}
	for i := range list.Applications {
		if err := list.Applications[i].each(add); err != nil {
			return nil, err
		}
		if len(keys) > maxListed {
			return nil, fmt.Errorf("over %d keys", maxListed)
		}
	}
	if len(keys) == 0 {
		return nil, errors.New("it names no keys")
	}
	inOrder(keys)
	return keys, nil
}

// each calls add for every key of an application.
func (l *listedApplication) each(add func(name, kind, protection string) error) error {
	if n, err := keyspec.ParseName(l.Name); err != nil || !n.IsModule() {
		return fmt.Errorf("application %q: a name of one segment is needed", l.Name)
	}
	if l.Protection != "" && !slices.Contains(protections, l.Protection) {
		return fmt.Errorf("application %s: protection %q is none of hsm, tpm and software", l.Name, l.Protection)
	}
	root := l.Name == rootName
	if root && len(l.Sign)+len(l.Base)+len(l.AES) > 0 {
		return fmt.Errorf("%s has no other keys", rootName)
	}
	kind := "module"
	if root {
		kind = "root"
	}
	if l.Module == nil || *l.Module {
		if err := add(l.Name, kind, l.Protection); err != nil {
			return err
		}
	}
	for _, r := range l.Sign {
		if !slices.Contains(signReferences, r) {
			return fmt.Errorf("%s/%s: a sign key is one of %v", l.Name, r, signReferences)
		}
		if err := add(l.Name+"/"+r, "sign", l.Protection); err != nil {
			return err
		}
	}
	for _, more := range []struct {
		kind       string
		references []string
	}{{"base", l.Base}, {"aes", l.AES}} {
		for _, r := range more.references {
			if slices.Contains(signReferences, r) {
				return fmt.Errorf("%s/%s is a sign key", l.Name, r)
			}
			if err := add(l.Name+"/"+r, more.kind, ""); err != nil {
				return err
			}
		}
	}
	return nil
}

// rootName is the name of the root key.
const rootName = "ROOT"

func inOrder(keys []listedKey) {
	slices.SortStableFunc(keys, func(a, b listedKey) int { return slices.Index(keyKinds, a.kind) - slices.Index(keyKinds, b.kind) })
}

// configuredKeys are the keys that the applications of the daemon name.
func configuredKeys(applications []client.Application) []listedKey {
	var keys []listedKey
	for i := range applications {
		app := &applications[i]
		if app.Inactive {
			continue
		}
		kind := "module"
		if app.Name == rootName {
			kind = "root"
		}
		keys = append(keys, listedKey{app.Name, kind, ""})
		for _, r := range app.References {
			kind := "base"
			switch {
			case r.Algorithm != "":
				kind = "aes"
			case slices.Contains(signReferences, r.Reference):
				kind = "sign"
			}
			keys = append(keys, listedKey{joined(app.Name, r.Reference), kind, ""})
		}
	}
	inOrder(keys)
	return keys
}

func newHierarchyGenerate(a *app) *cobra.Command {
	var config string
	var dryRun bool
	c := uses(&cobra.Command{
		Use:   "generate [--config FILE] [flags]",
		Short: "Make the missing keys of all applications",
		Long: `Make the keys of a deployment that are missing, and replace those that expire soon: the root key first, then module keys, sign keys,
base keys and AES keys. What is there stays, so that this may be repeated, and goes on after a failure: the result says what was made, what was
there and what failed, and the exit code is 1 if anything did. What would fail for all the rest too, such as a locked keystore, ends it.

--config names a file with the keys; packaging/mosip-keys.toml, installed as an example, has MOSIP's. Without it the keys are made that
the applications of kmsd name ("kmsctl app list").`,
		Example: `  kmsctl hierarchy generate --config mosip-keys.toml --dry-run
  kmsctl hierarchy generate --config mosip-keys.toml
  kmsctl --json hierarchy generate`,
		Args: exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			keys, err := a.keysToMake(c.Context(), config)
			if err != nil {
				return err
			}
			g := generator{app: a, total: len(keys), dryRun: dryRun}
			for _, k := range keys {
				if g.stopped = g.one(c.Context(), k); g.stopped != nil {
					break
				}
			}
			return g.report()
		},
	}, proto.OpMasterGenerate, proto.OpCertCurrent, proto.OpKeyGet, proto.OpAppList, proto.OpAppGet)
	c.Flags().StringVar(&config, "config", "", `list of keys in TOML, "-" is standard input (default: what the applications name)`)
	c.Flags().BoolVar(&dryRun, "dry-run", false, "only say what would be made")
	c.MarkFlagFilename("config", "toml")
	return c
}

// keysToMake reads the list of keys, or asks for the applications.
func (a *app) keysToMake(ctx context.Context, config string) ([]listedKey, error) {
	if config == "" {
		applications, err := a.applications(ctx)
		return configuredKeys(applications), err
	}
	text, err := a.readFile(config, maxKeyList)
	if err != nil {
		return nil, err
	}
	keys, err := parseKeyList(text)
	if err != nil {
		return nil, withHint(fmt.Errorf("%s: %w", config, err), "the example mosip-keys.toml shows how a list of keys is written")
	}
	return keys, nil
}

// What became of a key.
const (
	outcomeMade    = "made"
	outcomeCurrent = "current"    // it was there
	outcomeWould   = "would-make" // with --dry-run
	outcomeFailed  = "failed"
	outcomeSkipped = "skipped" // what it needs has failed
)

// madeView is what became of one key of a list, for JSON.
type madeView struct {
	Name       string `json:"name"`
	Kind       string `json:"kind"`
	Outcome    string `json:"outcome"`
	Key        string `json:"key,omitempty"` // NAME@VERSION
	KeyID      string `json:"kid,omitempty"`
	Thumbprint string `json:"thumbprint,omitempty"`
	Expires    string `json:"expires,omitempty"`
	Error      string `json:"error,omitempty"`
	Hint       string `json:"hint,omitempty"`
}

// generator makes the keys of a list, one after the other: nearly all the time goes into the search for primes, of which kmsd does one
// at a time.
type generator struct {
	app    *app
	total  int
	dryRun bool
	done   []madeView
	failed map[string]bool                // names of keys that are not there now
	known  map[string]*client.Application // with --dry-run

	stopped error // why the rest was not tried
}

// one makes one key and says what became of it. It returns an error that would hit all others too.
func (g *generator) one(ctx context.Context, k listedKey) error {
	v := madeView{Name: k.name, Kind: k.kind}
	var stop error
	if need := g.missing(k); need != "" {
		v.Outcome, v.Error = outcomeSkipped, need+" is not there"
	} else if err := g.make(ctx, k, &v); err != nil {
		v.Outcome, v.Error, v.Hint = outcomeFailed, err.Error(), hintFor(err)
		for _, general := range []error{client.ErrUnreachable, client.ErrLocked, client.ErrUninitialised, client.ErrUnknownOp, client.ErrClock, client.ErrStorage, context.Canceled} {
			if errors.Is(err, general) {
				stop = err
			}
		}
	}
	if v.Error != "" {
		if g.failed == nil {
			g.failed = make(map[string]bool)
		}
		g.failed[k.name] = true
	}
	g.done = append(g.done, v)
	if !g.app.json {
		fmt.Fprintf(g.app.stdout, "%-10s  %s\n", v.Outcome, printable(v.text()))
	}
	return stop
}

// text describes the outcome on one line.
func (v *madeView) text() string {
	text := v.Name
	if v.Key != "" {
		text = v.Key
	}
	if v.Expires != "" {
		text += ", expires " + v.Expires[:len(time.DateOnly)]
	}
	if v.KeyID != "" {
		text += ", kid " + v.KeyID
	}
	if v.Error != "" {
		text += ": " + v.Error
	}
	if v.Hint != "" {
		text += " (" + v.Hint + ")"
	}
	return text
}

// missing returns the key that k is certified by if that one has failed.
func (g *generator) missing(k listedKey) string {
	needs, namespace := rootName, keyspec.Name(k.name).Namespace()
	if k.kind == "base" || k.name == namespace+"/ED25519_SIGN" {
		needs = namespace
	}
	if k.kind != "root" && k.kind != "aes" && g.failed[needs] {
		return needs
	}
	return ""
}

// make makes a key, or with --dry-run looks whether it would be made.
func (g *generator) make(ctx context.Context, k listedKey, v *madeView) error {
	if g.dryRun {
		return g.look(ctx, k, v)
	}
	work := g.app.waiting(fmt.Sprintf("%d of %d: %s", len(g.done)+1, g.total, k.name))
	defer work.end()
	var made *client.CertifiedKey
	err := g.app.with(ctx, func(ctx context.Context, c *client.Client) (err error) {
		if k.kind == "base" {
			made, err = c.CurrentCertificate(ctx, k.name, client.Holder{})
		} else {
			made, err = c.GenerateMaster(ctx, k.name, client.MasterKey{Protection: keyspec.Protection(k.protection), Symmetric: k.kind == "aes"})
		}
		return err
	})
	if err != nil {
		return err
	}
	v.Outcome = outcomeCurrent
	if made.Made {
		v.Outcome = outcomeMade
	}
	v.Key, v.KeyID = made.Ref, made.KeyID
	if !made.Expires.IsZero() {
		v.Expires = made.Expires.Format(time.RFC3339)
	}
	if len(made.Chain) > 0 {
		v.Thumbprint = packet.ThumbprintText(packet.Thumbprint(made.Chain[0]))
	}
	return nil
}

// look says whether a key is there and in force, or would be made.
func (g *generator) look(ctx context.Context, k listedKey, v *madeView) error {
	app, err := g.application(ctx, keyspec.Name(k.name).Namespace())
	if err != nil {
		return err
	}
	var info proto.KeyInfo
	err = g.app.call(ctx, proto.OpKeyGet, &proto.KeyRef{Key: k.name}, &info)
	switch {
	case errors.Is(err, client.ErrNotAvailable):
		v.Outcome = outcomeWould
	case err != nil:
		return err
	default:
		now := currentVersion(&info)
		v.Key, v.Outcome = fmt.Sprintf("%s@%d", info.Name, now.Version), outcomeCurrent
		if now.Expires > 0 {
			v.Expires = stamp(now.Expires)
		}
		if keyspec.State(now.State) != keyspec.Active || isDue(app, k, now) {
			v.Outcome = outcomeWould
		}
	}
	if v.Outcome == outcomeWould && app.Inactive {
		return withHint(fmt.Errorf("application %s is not active", app.Name), "kmsctl app set %s --active", app.Name)
	}
	return nil
}

// application returns an application, which is asked for once.
func (g *generator) application(ctx context.Context, name string) (*client.Application, error) {
	if app := g.known[name]; app != nil {
		return app, nil
	}
	app, err := g.app.application(ctx, name, false)
	if err != nil {
		return nil, err
	}
	if g.known == nil {
		g.known = make(map[string]*client.Application)
	}
	g.known[name] = app
	return app, nil
}

// isDue reports whether kmsd would replace a version because it expires soon.
func isDue(app *client.Application, k listedKey, v proto.VersionInfo) bool {
	if v.Expires <= 0 || k.kind == "aes" {
		return false
	}
	early := app.PreExpireDays
	if k.kind == "base" {
		early = app.BasePreExpireDays
	}
	// Of a validity that the issuer has cut short kmsd takes no more than a third.
	seconds := min(int64(early)*24*3600, (v.Expires-v.NotBefore)/3)
	return time.Now().Unix() >= v.Expires-seconds
}

// report shows the sum, and is an error if anything failed.
func (g *generator) report() error {
	count := func(outcome string) (n int) {
		for _, v := range g.done {
			if v.Outcome == outcome {
				n++
			}
		}
		return n
	}
	if g.app.json {
		if err := writeJSON(g.app.stdout, orEmpty(g.done)); err != nil {
			return err
		}
	}
	bad := count(outcomeFailed) + count(outcomeSkipped) + g.total - len(g.done)
	switch {
	case g.dryRun:
		g.app.say("%d would be made, %d are there, %d cannot be made", count(outcomeWould), count(outcomeCurrent), bad)
	default:
		g.app.say("%d made, %d were there, %d failed", count(outcomeMade), count(outcomeCurrent), bad)
	}
	if g.stopped != nil {
		return g.stopped
	}
	if bad > 0 {
		return withHint(fmt.Errorf("%d of %d keys failed", bad, g.total), "mend what failed and repeat the command: what is there stays")
	}
	return nil
}
