package main

import (
	"cmp"
	"context"
	"errors"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/kmsd-project/kmsd/client"
	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// validityProfiles are the named sets of periods.
var validityProfiles = []string{"mosip-docs", "mosip-deployed"}

func newApplication(a *app) *cobra.Command {
	c := &cobra.Command{
		Use:   "app",
		Short: "Show and change what the keys of applications are made by",
		Long: `An application is a namespace of the hierarchy: a module key APP, certified by the key ROOT, and below it sign keys and base keys
APP/REFERENCE. What is set here is what keys are made by from then on: how long they are valid, how early they are replaced, and whom
their certificates name. Keys that are there already stay as they are.

What an application leaves open comes from its validity profile and from the application ROOT. The applications of MOSIP are built in.
The profile mosip-docs (root 5, module 3, base 2 years) is the default; mosip-deployed has the periods of MOSIP's key_policy_def.`,
	}
	c.AddCommand(newAppList(a), newAppShow(a), newAppSet(a))
	return c
}

// completeApps completes names of applications.
func (a *app) completeApps(c *cobra.Command, args []string, begun string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	parent := c.Context()
	if parent == nil {
		parent = context.Background()
	}
	ctx, cancel := context.WithTimeout(parent, time.Second)
	defer cancel()
	applications, err := a.applications(ctx)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var names []cobra.Completion
	for _, app := range applications {
		if strings.HasPrefix(app.Name, begun) {
			names = append(names, app.Name)
		}
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

// applications returns all applications by name.
func (a *app) applications(ctx context.Context) (list []client.Application, err error) {
	err = a.with(ctx, func(ctx context.Context, c *client.Client) error {
		for one, err := range c.Applications(ctx) {
			if err != nil {
				return err
			}
			list = append(list, *one)
		}
		return nil
	})
	return list, err
}

// application returns one application, or with settings what of it was set.
func (a *app) application(ctx context.Context, name string, settings bool) (one *client.Application, err error) {
	err = a.with(ctx, func(ctx context.Context, c *client.Client) error {
		one, err = c.Application(ctx, name, settings)
		return err
	})
	return one, err
}

func newAppList(a *app) *cobra.Command {
	return uses(&cobra.Command{
		Use:   "list",
		Short: "List the applications",
		Args:  exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			list, err := a.applications(c.Context())
			if err != nil {
				return err
			}
			views := make([]appView, len(list))
			for i := range list {
				views[i] = viewApp(&list[i])
			}
			return a.print(views, func(w io.Writer) {
				rows := [][]string{{"NAME", "PROFILE", "DAYS", "RENEWED", "BASE DAYS", "RENEWED", "PROTECTION", "KEYS MADE WITH IT", "NOTE"}}
				for i := range list {
					app := &list[i]
					var note []string
					if app.Inactive {
						note = append(note, "inactive")
					}
					if !app.BuiltIn {
						note = append(note, "set")
					}
					rows = append(rows, []string{app.Name, app.Profile, number(app.Days), before(app.PreExpireDays), number(app.BaseDays), before(app.BasePreExpireDays),
						app.Protection, references(app.References), strings.Join(note, ", ")})
				}
				table(w, rows)
			})
		},
	}, proto.OpAppList)
}

// before says how early a key is replaced.
func before(days uint32) string {
	if days == 0 {
		return "at the end"
	}
	return number(days) + " d before"
}

func references(list []proto.AppReference) string {
	var names []string
	for _, r := range list {
		names = append(names, r.Reference)
	}
	return strings.Join(names, ", ")
}

func newAppShow(a *app) *cobra.Command {
	c := uses(&cobra.Command{
		Use:               "show APP",
		Short:             "Show an application",
		Example:           "  kmsctl app show REGISTRATION",
		Args:              exactArgs("APP"),
		ValidArgsFunction: a.completeApps,
		RunE: func(c *cobra.Command, args []string) error {
			app, err := a.application(c.Context(), args[0], false)
			if err != nil {
				return noApp(err, args[0])
			}
			return a.printApp(app)
		},
	}, proto.OpAppGet)
	return c
}

// noApp says where the applications are that there are.
func noApp(err error, name string) error {
	if errors.Is(err, client.ErrNotAvailable) {
		return withHint(err, "kmsctl app list shows those that there are; kmsctl app set %s adds one", name)
	}
	return err
}

func (a *app) printApp(app *client.Application) error {
	return a.print(viewApp(app), func(w io.Writer) {
		state, from := "active", "built in"
		if app.Inactive {
			state = "inactive: it gets no new keys"
		}
		if !app.BuiltIn {
			from = "set by an administrator"
		}
		fields(w, "Name", app.Name, "State", state, "Settings", from, "Profile", app.Profile,
			"Module key", period(app.Days, app.PreExpireDays), "Base keys", period(app.BaseDays, app.BasePreExpireDays),
			"Algorithm", app.Algorithm, "Protection", app.Protection, "Subject", subjectText(app.Subject))
		for _, r := range app.References {
			what := cmp.Or(r.Algorithm, "as its name says")
			if r.Days > 0 {
				what += ", " + number(r.Days) + " days"
			}
			fields(w, "Made with it", app.Name+"/"+r.Reference+" ("+what+")")
		}
		for _, n := range app.Names {
			fields(w, "Names of "+joined(app.Name, n.Reference), strings.Join(n.Names, ", "))
		}
	})
}

// joined is the name of a key of an application.
func joined(application, reference string) string {
	if reference == "" {
		return application
	}
	return application + "/" + reference
}

func period(days, before uint32) string {
	text := "valid for " + number(days) + " days"
	if before > 0 {
		text += ", replaced " + number(before) + " days before the end"
	}
	return text
}

// subjectText writes a name in the order of MOSIP's certificates.
func subjectText(d client.DN) string {
	var parts []string
	for _, p := range [][2]string{{"C", d.Country}, {"ST", d.State}, {"L", d.Locality}, {"O", d.Organization}, {"OU", d.OrganizationalUnit}, {"CN", d.CommonName}} {
		if p[1] != "" {
			parts = append(parts, p[0]+"="+p[1])
		}
	}
	return strings.Join(parts, ", ")
}

type appView struct {
	Name              string              `json:"name"`
	Active            bool                `json:"active"`
	BuiltIn           bool                `json:"built_in"`
	Profile           string              `json:"profile"`
	Days              uint32              `json:"days"`
	PreExpireDays     uint32              `json:"pre_expire_days"`
	BaseDays          uint32              `json:"base_days"`
	BasePreExpireDays uint32              `json:"base_pre_expire_days"`
	Algorithm         string              `json:"algorithm"`
	Protection        string              `json:"protection"`
	Subject           dnView              `json:"subject"`
	Names             map[string][]string `json:"names"` // by reference, the module key's under ""
	References        []referenceView     `json:"references"`
}

type dnView struct {
	C  string `json:"c,omitempty"`
	ST string `json:"st,omitempty"`
	L  string `json:"l,omitempty"`
	O  string `json:"o,omitempty"`
	OU string `json:"ou,omitempty"`
	CN string `json:"cn,omitempty"`
}

type referenceView struct {
	Reference string `json:"reference"`
	Algorithm string `json:"algorithm,omitempty"`
	Days      uint32 `json:"days,omitempty"`
}

func viewApp(a *client.Application) appView {
	v := appView{
		Name: a.Name, Active: !a.Inactive, BuiltIn: a.BuiltIn, Profile: a.Profile, Days: a.Days, PreExpireDays: a.PreExpireDays,
		BaseDays: a.BaseDays, BasePreExpireDays: a.BasePreExpireDays, Algorithm: a.Algorithm, Protection: a.Protection,
		Subject: dnView{a.Subject.Country, a.Subject.State, a.Subject.Locality, a.Subject.Organization, a.Subject.OrganizationalUnit, a.Subject.CommonName},
		Names:   make(map[string][]string), References: make([]referenceView, len(a.References)),
	}
	for _, n := range a.Names {
		v.Names[n.Reference] = n.Names
	}
	for i, r := range a.References {
		v.References[i] = referenceView(r)
	}
	return v
}

// holderFlags say whom a certificate of the hierarchy is for, as far as that is not the default of the application.
type holderFlags struct {
	name client.DN
	sans []string
}

func (f *holderFlags) register(c *cobra.Command) {
	flags := c.Flags()
	flags.StringVar(&f.name.CommonName, "cn", "", "common name of the holder")
	flags.StringVar(&f.name.OrganizationalUnit, "ou", "", "organizational unit")
	flags.StringVar(&f.name.Organization, "o", "", "organization")
	flags.StringVar(&f.name.Locality, "l", "", "locality")
	flags.StringVar(&f.name.State, "st", "", "state or province")
	flags.StringVar(&f.name.Country, "c", "", "country, two letters")
	flags.StringSliceVar(&f.sans, "san", nil, "alternative name, written dns:NAME, ip:ADDRESS, email:ADDRESS or uri:URI; repeat for more")
}

func (f *holderFlags) given() bool { return f.name != client.DN{} || len(f.sans) > 0 }

// unheard says so when what was given did not count, because the certificate was there already.
func (f *holderFlags) unheard(a *app, k *client.CertifiedKey) {
	if f.given() && !k.Made && len(k.Request) == 0 {
		a.say("note: %s was there already; the name of its holder stays as it is", k.Ref)
	}
}

func (f *holderFlags) holder() client.Holder { return client.Holder{Name: f.name, AltNames: f.sans} }

func newAppSet(a *app) *cobra.Command {
	var holder holderFlags
	var profile, algorithm, protection string
	var days, preExpire, baseDays, basePreExpire uint32
	var keys, without []string
	var active, inactive bool
	c := uses(&cobra.Command{
		Use:   "set APP [flags]",
		Short: "Add an application, or change what its keys are made by",
		Long: `Add an application, or change what its keys are made by. What is not given stays as it is set; a number of 0 takes a setting back, so
that the profile counts again. --key REFERENCE names a key that "kmsctl hierarchy generate" makes with the module key: a sign key
(SIGN, EC_SECP256K1_SIGN, EC_SECP256R1_SIGN, ED25519_SIGN) or a base key, and with =aes-256-gcm[,DAYS] an AES key. --san sets the
alternative names of the module key's certificate, and written REFERENCE=dns:NAME those of another key.

The application ROOT is the one that the others take from what they leave open.`,
		Example: `  kmsctl app set ROOT --profile mosip-deployed
  kmsctl app set REGISTRATION --base-days 365 --base-pre-expire 45
  kmsctl app set WALLET --key SIGN --key IDENTITY_CACHE=aes-256-gcm --o Example --cn wallet.example.org
  kmsctl app set DIGITAL_CARD --inactive`,
		Args:              exactArgs("APP"),
		ValidArgsFunction: a.completeApps,
		RunE: func(c *cobra.Command, args []string) error {
			if n, err := keyspec.ParseName(args[0]); err != nil || !n.IsModule() {
				return withHint(usagef("%q is not the name of an application: it has one segment of at most %d characters", args[0], keyspec.MaxApplication), "kmsctl app list")
			}
			app, err := a.application(c.Context(), args[0], true)
			changed := false
			if errors.Is(err, client.ErrNotAvailable) { // then it is added, as it is if need be
				app, err, changed = &client.Application{Name: args[0]}, nil, true
			}
			if err != nil {
				return err
			}
			set := func(flag string, change func()) {
				if c.Flags().Changed(flag) {
					change()
					changed = true
				}
			}
			set("profile", func() { app.Profile = profile })
			set("days", func() { app.Days = days })
			set("pre-expire", func() { app.PreExpireDays = preExpire })
			set("base-days", func() { app.BaseDays = baseDays })
			set("base-pre-expire", func() { app.BasePreExpireDays = basePreExpire })
			set("alg", func() { app.Algorithm = algorithm })
			set("protection", func() { app.Protection = protection })
			set("active", func() { app.Inactive = !active })
			set("inactive", func() { app.Inactive = inactive })
			set("cn", func() { app.Subject.CommonName = holder.name.CommonName })
			set("ou", func() { app.Subject.OrganizationalUnit = holder.name.OrganizationalUnit })
			set("o", func() { app.Subject.Organization = holder.name.Organization })
			set("l", func() { app.Subject.Locality = holder.name.Locality })
			set("st", func() { app.Subject.State = holder.name.State })
			set("c", func() { app.Subject.Country = holder.name.Country })
			set("san", func() { err = setNames(app, holder.sans) })
			if err == nil {
				set("key", func() { err = addReferences(app, keys) })
			}
			set("no-key", func() {
				app.References = slices.DeleteFunc(app.References, func(r proto.AppReference) bool { return slices.Contains(without, r.Reference) })
			})
			if err != nil {
				return err
			}
			if !changed {
				return withHint(usagef("nothing to change"), "kmsctl app set --help")
			}
			var after client.Application
			if err := a.call(c.Context(), proto.OpAppSet, app, &after); err != nil {
				return err
			}
			return a.printApp(&after)
		},
	}, proto.OpAppSet, proto.OpAppGet)
	flags := c.Flags()
	flags.StringVar(&profile, "profile", "", "where periods that are not set come from: mosip-docs or mosip-deployed")
	flags.Uint32Var(&days, "days", 0, "how long root, module and sign keys are valid, in days")
	flags.Uint32Var(&preExpire, "pre-expire", 0, "how many days before their end they are replaced")
	flags.Uint32Var(&baseDays, "base-days", 0, "how long base keys are valid, in days")
	flags.Uint32Var(&basePreExpire, "base-pre-expire", 0, "how many days before their end they are replaced")
	flags.StringVar(&algorithm, "alg", "", "algorithm of the module key: rsa-2048, rsa-3072 or rsa-4096")
	flags.StringVar(&protection, "protection", "", "where new root, module and sign keys are: software, tpm or hsm")
	flags.StringArrayVar(&keys, "key", nil, "a key that is made with the module key, written REFERENCE or REFERENCE=aes-256-gcm[,DAYS]; repeat for more")
	flags.StringArrayVar(&without, "no-key", nil, "a key that is no longer made with it; one that is there stays")
	flags.BoolVar(&inactive, "inactive", false, "no new keys for this application")
	flags.BoolVar(&active, "active", false, "new keys again")
	c.MarkFlagsMutuallyExclusive("active", "inactive")
	holder.register(c)
	c.RegisterFlagCompletionFunc("profile", cobra.FixedCompletions(validityProfiles, cobra.ShellCompDirectiveNoFileComp))
	c.RegisterFlagCompletionFunc("protection", cobra.FixedCompletions(protections, cobra.ShellCompDirectiveNoFileComp))
	c.RegisterFlagCompletionFunc("alg", cobra.FixedCompletions([]string{"rsa-2048", "rsa-3072", "rsa-4096"}, cobra.ShellCompDirectiveNoFileComp))
	c.RegisterFlagCompletionFunc("key", cobra.FixedCompletions(signReferences, cobra.ShellCompDirectiveNoFileComp))
	return c
}

// protections are where a key can be.
var protections = []string{string(keyspec.HSM), string(keyspec.TPM), string(keyspec.Software)}

// signReferences are the references of sign keys.
var signReferences = []string{"SIGN", "EC_SECP256K1_SIGN", "EC_SECP256R1_SIGN", "ED25519_SIGN"}

// setNames sets the alternative names of --san, which replace those of the same key.
func setNames(app *client.Application, sans []string) error {
	given := make(map[string][]string)
	var order []string
	for _, san := range sans {
		reference, name, found := strings.Cut(san, "=")
		if !found || strings.Contains(reference, ":") { // a name without a reference may have a = of its own
			reference, name = "", san
		}
		if kind, value, ok := strings.Cut(name, ":"); !ok || kind == "" || value == "" {
			return usagef("--san is written dns:NAME, ip:ADDRESS, email:ADDRESS or uri:URI, not %q", name)
		}
		if _, seen := given[reference]; !seen {
			order = append(order, reference)
		}
		given[reference] = append(given[reference], name)
	}
	app.Names = slices.DeleteFunc(app.Names, func(n proto.AltNames) bool { return given[n.Reference] != nil })
	for _, reference := range order {
		app.Names = append(app.Names, proto.AltNames{Reference: reference, Names: given[reference]})
	}
	return nil
}

// addReferences adds the keys of --key, each in the place of one with its name.
func addReferences(app *client.Application, keys []string) error {
	for _, text := range keys {
		r, err := parseReference(text)
		if err != nil {
			return err
		}
		app.References = slices.DeleteFunc(app.References, func(o proto.AppReference) bool { return o.Reference == r.Reference })
		app.References = append(app.References, r)
	}
	return nil
}

func parseReference(text string) (proto.AppReference, error) {
	reference, what, aes := strings.Cut(text, "=")
	r := proto.AppReference{Reference: reference}
	if aes {
		var days string
		r.Algorithm, days, _ = strings.Cut(what, ",")
		if days != "" {
			n, err := strconv.ParseUint(days, 10, 32)
			if err != nil {
				return r, usagef("--key %s: %q is not a number of days", reference, days)
			}
			r.Days = uint32(n)
		}
	}
	if _, err := keyspec.ParseName("A/" + reference); err != nil || aes && r.Algorithm != string(keyspec.AES256GCM) {
		return r, withHint(usagef("--key is written REFERENCE or REFERENCE=aes-256-gcm[,DAYS], not %q", text), "kmsctl app set --help")
	}
	return r, nil
}
