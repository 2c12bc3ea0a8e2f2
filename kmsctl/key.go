package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

func newKey(a *app) *cobra.Command {
	c := &cobra.Command{Use: "key", Short: "Create, list and change keys"}
	c.AddCommand(newKeyCreate(a), newKeyList(a), newKeyShow(a), newKeySet(a), newKeyRotate(a), newKeySuspend(a), newKeyResume(a),
		newKeyRevoke(a), newKeyDestroy(a), newKeyImport(a), newKeyFind(a))
	return c
}

// newKeyFlags describe a key to be made, by create, import, unwrap, agree and derive.
type newKeyFlags struct {
	algorithm  string
	usage      []string
	protection string
	notBefore  string
	expires    string
	exportable bool
	labels     []string
	profile    string
	keep       uint32
	usableVia  []string
	durable    bool
	escrow     string
	uses       uint64
}

func (f *newKeyFlags) register(c *cobra.Command) {
	flags := c.Flags()
	flags.StringVar(&f.algorithm, "alg", "", "algorithm (kmsctl capabilities lists them)")
	flags.StringSliceVar(&f.usage, "usage", nil, "usages, with commas between them (default: by algorithm)")
	flags.StringVar(&f.protection, "protection", "", "where the key is used: software, tpm or hsm (default software)")
	flags.StringVar(&f.notBefore, "not-before", "", "first moment of use: RFC 3339, YYYY-MM-DD or a span from now such as 2d (default now)")
	flags.StringVar(&f.expires, "expires", "", "last moment of use, or none (default: the cryptoperiod of the usage)")
	flags.BoolVar(&f.exportable, "exportable", false, "allow the key to leave wrapped under another key")
	flags.StringArrayVar(&f.labels, "label", nil, "label, written k=v; repeat for more")
	flags.StringVar(&f.profile, "profile", "", "empty or mosip-module")
	flags.Uint32Var(&f.keep, "keep", 0, "versions kept for verify and decrypt (default all)")
	flags.StringSliceVar(&f.usableVia, "usable-via", nil, "where uses may come from: native, or the name of a bridge (default: everywhere)")
	flags.StringVar(&f.escrow, "escrow", "", "of a module key in a tpm or hsm: recipients (a backup can restore its base keys elsewhere, default) or none (they die with the device)")
	flags.BoolVar(&f.durable, "durable-audit", false, "answer a use only when its audit entry is on disk")
	flags.Uint64Var(&f.uses, "uses", 0, "how often the key may be used, all its versions together (default: no limit)")
	c.RegisterFlagCompletionFunc("alg", cobra.FixedCompletions(texts(keyspec.Algorithms()), cobra.ShellCompDirectiveNoFileComp))
	c.RegisterFlagCompletionFunc("usage", cobra.FixedCompletions(texts(keyspec.Usages()), cobra.ShellCompDirectiveNoFileComp))
	c.RegisterFlagCompletionFunc("escrow", cobra.FixedCompletions([]string{"recipients", "none"}, cobra.ShellCompDirectiveNoFileComp))
	c.RegisterFlagCompletionFunc("protection", cobra.FixedCompletions(texts([]keyspec.Protection{keyspec.Software, keyspec.TPM, keyspec.HSM}), cobra.ShellCompDirectiveNoFileComp))
}

// params turns the flags into the message, checked as far as that can be done here.
func (f *newKeyFlags) params(name string) (proto.KeyCreate, error) {
	none := proto.KeyCreate{}
	if _, err := keyspec.ParseName(name); err != nil {
		return none, asUsage(err)
	}
	if f.algorithm == "" {
		return none, withHint(usagef("--alg is missing"), "--alg is one of: %s", strings.Join(texts(keyspec.Algorithms()), " "))
	}
	if _, err := keyspec.ParseAlgorithm(f.algorithm); err != nil {
		return none, withHint(asUsage(err), "--alg is one of: %s", strings.Join(texts(keyspec.Algorithms()), " "))
	}
	for _, u := range f.usage {
		if _, err := keyspec.ParseUsage(u); err != nil {
			return none, withHint(asUsage(err), "--usage is out of: %s", strings.Join(texts(keyspec.Usages()), " "))
		}
	}
	labels, err := parseLabels(f.labels, false)
	if err != nil {
		return none, err
	}
	notBefore, expires, err := parseValidity(f.notBefore, f.expires)
	if err != nil {
		return none, err
	}
	return proto.KeyCreate{
		Name: name, Algorithm: f.algorithm, Usage: f.usage, Protection: f.protection, NotBefore: notBefore, Expires: expires,
		Exportable: f.exportable, Labels: labels, Profile: f.profile, Keep: f.keep, UsableVia: f.usableVia, Durable: f.durable, Escrow: f.escrow,
		Uses: f.uses,
	}, nil
}

func parseValidity(from, until string) (notBefore, expires int64, err error) {
	now := time.Now()
	if notBefore, err = parseTime(from, now); err != nil {
		return 0, 0, err
	}
	if notBefore == proto.NoExpiry {
		return 0, 0, usagef("--not-before is a time")
	}
	if expires, err = parseTime(until, now); err != nil {
		return 0, 0, err
	}
	if expires > 0 && (expires <= notBefore || expires <= now.Unix()) {
		return 0, 0, usagef("the key would expire before it could be used")
	}
	return notBefore, expires, nil
}

func parseLabels(list []string, mayRemove bool) (map[string]string, error) {
	if len(list) == 0 {
		return nil, nil
	}
	out := make(map[string]string, len(list))
	for _, l := range list {
		k, v, ok := strings.Cut(l, "=")
		if !ok || k == "" || (v == "" && !mayRemove) {
			return nil, usagef("--label is written k=v, not %q", l)
		}
		out[k] = v
	}
	return out, nil
}

func texts[T ~string](list []T) []string {
	out := make([]string, len(list))
	for i, t := range list {
		out[i] = string(t)
	}
	return out
}

func newKeyCreate(a *app) *cobra.Command {
	var f newKeyFlags
	c := uses(&cobra.Command{
		Use:     "create NAME --alg ALG [flags]",
		Short:   "Create a key",
		Example: "  kmsctl key create REGISTRATION/10001_110011 --alg rsa-2048 --usage encrypt,decrypt --expires 2y",
		Args:    exactArgs("NAME"),
		RunE: func(c *cobra.Command, args []string) error {
			params, err := f.params(args[0])
			if err != nil {
				return err
			}
			return a.keyCall(c.Context(), proto.OpKeyCreate, &params)
		},
	}, proto.OpKeyCreate)
	f.register(c)
	return c
}

// keyCall runs an operation whose result is a key, and shows it.
func (a *app) keyCall(ctx context.Context, op string, params proto.Message) error {
	var k proto.KeyInfo
	if err := a.call(ctx, op, params, &k); err != nil {
		return err
	}
	return a.printKey(&k)
}

func (a *app) printKey(k *proto.KeyInfo) error {
	return a.print(viewKey(k), func(w io.Writer) { writeKey(w, k) })
}

func writeKey(w io.Writer, k *proto.KeyInfo) {
	var more []string
	if k.Exportable {
		more = append(more, "exportable")
	}
	if k.Durable {
		more = append(more, "durable audit")
	}
	keep := "all versions"
	if k.Keep > 0 {
		keep = number(k.Keep) + " versions"
	}
	minimum := ""
	if k.MinVersion > 1 {
		minimum = number(k.MinVersion)
	}
	left := ""
	if k.Limited {
		left = number(k.UsesLeft)
	}
	fields(w, "Name", k.Name, "Algorithm", k.Algorithm, "Usage", strings.Join(k.Usage, ", "), "Schemes", strings.Join(k.Schemes, ", "),
		"Origin", k.Origin, "Protection", k.Protection, "Escrow", k.Escrow, "Profile", k.Profile, "Attributes", strings.Join(more, ", "),
		"Owner", "uid "+number(k.Owner), "Labels", labels(k.Labels), "Usable via", strings.Join(k.UsableVia, ", "),
		"Created", day(k.Created), "Keeps", keep, "Minimum version", minimum, "Uses left", left)
	fmt.Fprintln(w)
	rows := [][]string{{"VERSION", "STATE", "CREATED", "NOT BEFORE", "EXPIRES", "PUBLIC KEY (SHA-256)", "NOTE"}}
	for _, v := range k.Versions {
		var note []string
		if v.Version == k.Current {
			note = append(note, "current")
		}
		if v.Reason != "" {
			note = append(note, "revoked "+day(v.Revoked)+": "+v.Reason)
		}
		if v.DestroyAt > 0 {
			note = append(note, "will be destroyed "+day(v.DestroyAt))
		}
		if v.Invocations > 0 {
			note = append(note, number(v.Invocations)+" invocations reserved")
		}
		digest := hex.EncodeToString(v.SPKISHA256)
		if len(digest) > 16 {
			digest = digest[:16] + "..."
		}
		rows = append(rows, []string{number(v.Version), v.State, day(v.Created), day(v.NotBefore), day(v.Expires), digest, strings.Join(note, "; ")})
	}
	table(w, rows)
	for _, warning := range k.Warnings {
		fmt.Fprintf(w, "\nWarning: %s\n", printable(warning))
	}
}

// currentVersion returns the version a key is used with, or the newest when none is current.
func currentVersion(k *proto.KeyInfo) proto.VersionInfo {
	for _, v := range k.Versions {
		if v.Version == k.Current {
			return v
		}
	}
	if n := len(k.Versions); n > 0 {
		return k.Versions[n-1]
	}
	return proto.VersionInfo{}
}

func newKeyList(a *app) *cobra.Command {
	var limit int
	c := uses(&cobra.Command{
		Use:               "list [PREFIX]",
		Short:             "List keys",
		Long:              "List keys. PREFIX is a namespace, or a namespace and the beginning of a reference. Without it every namespace is listed (admin socket).",
		Args:              cobra.MaximumNArgs(1),
		ValidArgsFunction: a.completeKeys,
		RunE: func(c *cobra.Command, args []string) error {
			prefix := ""
			if len(args) == 1 {
				prefix = args[0]
			}
			keys, err := a.listKeys(c.Context(), prefix, limit)
			if err != nil {
				return err
			}
			views := make([]keyView, len(keys))
			for i := range keys {
				views[i] = viewKey(&keys[i])
			}
			return a.print(views, func(w io.Writer) {
				rows := [][]string{{"NAME", "ALGORITHM", "USAGE", "VERSION", "STATE", "EXPIRES", "LABELS"}}
				for i := range keys {
					k := &keys[i]
					v := currentVersion(k)
					rows = append(rows, []string{k.Name, k.Algorithm, strings.Join(k.Usage, ","), number(v.Version), v.State, day(v.Expires), labels(k.Labels)})
				}
				table(w, rows)
			})
		},
	}, proto.OpKeyList)
	c.Flags().IntVar(&limit, "limit", 0, "show at most this many keys (default: all)")
	return c
}

// listKeys follows the pages of a listing. With limit 0 it goes to the end.
func (a *app) listKeys(ctx context.Context, prefix string, limit int) ([]proto.KeyInfo, error) {
	var keys []proto.KeyInfo
	params := proto.KeyList{Prefix: prefix}
	for {
		var page proto.KeyListReply
		if err := a.call(ctx, proto.OpKeyList, &params, &page); err != nil {
			return nil, err
		}
		keys = append(keys, page.Keys...)
		if limit > 0 && len(keys) >= limit {
			return keys[:limit], nil
		}
		if len(page.Next) == 0 {
			return keys, nil
		}
		params.After = page.Next
	}
}

// keyAct makes a command that applies op to one key and shows the key that results.
func (a *app) keyAct(c *cobra.Command, op string, params func(name string) (proto.Message, error)) *cobra.Command {
	a.onKey(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		if _, err := keyspec.ParseRef(args[0]); err != nil {
			return asUsage(err)
		}
		p, err := params(args[0])
		if err != nil {
			return err
		}
		return a.keyCall(c.Context(), op, p)
	}
	return uses(c, op)
}

func keyRef(name string) (proto.Message, error) { return &proto.KeyRef{Key: name}, nil }

func newKeyShow(a *app) *cobra.Command {
	return a.keyAct(&cobra.Command{Use: "show NAME", Short: "Show a key and its versions"}, proto.OpKeyGet, keyRef)
}

func newKeySet(a *app) *cobra.Command {
	var list []string
	var minVersion, keep uint32
	var left string
	c := a.keyAct(&cobra.Command{
		Use:   "set NAME [flags]",
		Short: "Change labels and limits of a key",
		Long: `Change labels and limits of a key. --label k= removes the label k. --uses N says how often the key may still be used, with
all its versions together; to allow more than are left, or with "none" any number, takes the admin socket.`,
	}, proto.OpKeySet, func(name string) (proto.Message, error) {
		labels, err := parseLabels(list, true)
		if err != nil {
			return nil, err
		}
		limit, err := parseUses(left)
		if err != nil {
			return nil, err
		}
		if labels == nil && minVersion == 0 && keep == 0 && limit == 0 {
			return nil, usagef("nothing to change: give --label, --min-version, --keep or --uses")
		}
		return &proto.KeySet{Key: name, Labels: labels, MinVersion: minVersion, Keep: keep, Uses: limit}, nil
	})
	c.Flags().StringArrayVar(&list, "label", nil, "label, written k=v; repeat for more")
	c.Flags().Uint32Var(&minVersion, "min-version", 0, "oldest version that may still decrypt or verify")
	c.Flags().Uint32Var(&keep, "keep", 0, "versions kept for verify and decrypt")
	c.Flags().StringVar(&left, "uses", "", "how often the key may still be used, or none for no limit")
	return c
}

// parseUses reads --uses of key set, 0 when it is not given.
func parseUses(s string) (int64, error) {
	switch s {
	case "":
		return 0, nil
	case "none":
		return proto.NoLimit, nil
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < 1 {
		return 0, withHint(usagef("--uses is a number from 1, or none, not %q", s), "to stop all use of a key: kmsctl key suspend NAME")
	}
	return n, nil
}

func newKeyRotate(a *app) *cobra.Command {
	var from, until string
	c := a.keyAct(&cobra.Command{
		Use:   "rotate NAME [flags]",
		Short: "Make a new version the current one",
		Long: `Make a new version the current one; the ones before go on verifying and decrypting. A key has at most 256 versions. When
it has them all, destroyed ones make room for new ones.`,
	}, proto.OpKeyRotate,
		func(name string) (proto.Message, error) {
			notBefore, expires, err := parseValidity(from, until)
			if err != nil {
				return nil, err
			}
			return &proto.KeyRotate{Key: name, NotBefore: notBefore, Expires: expires}, nil
		})
	run := c.RunE
	c.RunE = func(c *cobra.Command, args []string) error {
		err := run(c, args)
		var wire *proto.Error
		if errors.As(err, &wire) && wire.Code == proto.CodeExhausted {
			err = withHint(err, "kmsctl key destroy %[1]s@N, or kmsctl key set %[1]s --keep N, which destroys what is older after 7 days", args[0])
		}
		return err
	}
	c.Flags().StringVar(&from, "not-before", "", "first moment of use of the new version (default now)")
	c.Flags().StringVar(&until, "expires", "", "last moment of use of the new version, or none")
	return c
}

func newKeySuspend(a *app) *cobra.Command {
	return a.keyAct(&cobra.Command{Use: "suspend NAME[@N]", Short: "Take a key out of use for a time"}, proto.OpKeySuspend, keyRef)
}

func newKeyResume(a *app) *cobra.Command {
	return a.keyAct(&cobra.Command{Use: "resume NAME[@N]", Short: "Take a suspended key back into use"}, proto.OpKeyResume, keyRef)
}

func newKeyRevoke(a *app) *cobra.Command {
	var reason string
	var replace, noReplace bool
	var sure confirmFlags
	c := a.keyAct(&cobra.Command{
		Use:   "revoke NAME[@N] [flags]",
		Short: "Take a key out of use for good",
		Long: `Take a key, or one version, out of use for good. With --reason key-compromise it still verifies, with a warning, and
decrypts for nobody without an explicit grant. With another reason it still verifies, decrypts and unwraps.

NAME is the current version of a key of an application, and all versions of another key. The certificates of what is revoked are on the list of
their issuer from then on ("kmsctl crl get"). A base key gets a new version at once; with --no-replace, and other keys without --replace, it stays
without one until somebody says "kmsctl key rotate" or "kmsctl master generate".`,
		Example: `  kmsctl key revoke REGISTRATION/10001_110011 --reason key-compromise
  kmsctl key revoke REGISTRATION/10001_110011 --reason cessation-of-operation --no-replace
  kmsctl key revoke KERNEL/SIGN --reason superseded --replace`,
	}, proto.OpKeyRevoke, func(name string) (proto.Message, error) {
		if _, err := keyspec.ParseReason(reason); err != nil {
			return nil, withHint(asUsage(err), "--reason is one of: %s", strings.Join(texts(keyspec.Reasons()), " "))
		}
		if err := sure.confirm("Revoking "+name+" cannot be undone.", name); err != nil {
			return nil, err
		}
		params := &proto.KeyRevoke{Key: name, Reason: reason}
		switch {
		case replace:
			params.Replace = "yes"
		case noReplace:
			params.Replace = "no"
		}
		return params, nil
	})
	c.Flags().StringVar(&reason, "reason", string(keyspec.Unspecified), "why: "+strings.Join(texts(keyspec.Reasons()), ", "))
	c.RegisterFlagCompletionFunc("reason", cobra.FixedCompletions(texts(keyspec.Reasons()), cobra.ShellCompDirectiveNoFileComp))
	c.Flags().BoolVar(&replace, "replace", false, "make a new version of a key of an application at once")
	c.Flags().BoolVar(&noReplace, "no-replace", false, "make none, not even when its certificate is asked for")
	c.MarkFlagsMutuallyExclusive("replace", "no-replace")
	sure.register(c)
	return c
}

func newKeyDestroy(a *app) *cobra.Command {
	var sure confirmFlags
	var now, cancel bool
	var delay string
	destroy := a.keyAct(&cobra.Command{
		Use:   "destroy NAME[@N] [flags]",
		Short: "Destroy a key after a delay that can be cancelled",
		Long: `Schedule the destruction of a key, or of one version; 7 days unless --delay says otherwise. Until then --cancel takes it
back. --now destroys at once and begins a new epoch, so that the bytes are gone from the file too. Backups made before
still hold the key.`,
	}, proto.OpKeyDestroy, func(name string) (proto.Message, error) {
		seconds, err := parseDelay(delay)
		if err != nil {
			return nil, err
		}
		what := name + " will be destroyed after the delay."
		if now {
			what = name + " will be destroyed now. What it encrypted is lost with it."
		}
		if err := sure.confirm(what, name); err != nil {
			return nil, err
		}
		return &proto.KeyDestroy{Key: name, DelaySeconds: seconds, Now: now}, nil
	})
	uses(destroy, proto.OpKeyDestroyCancel)
	undo := a.keyAct(&cobra.Command{}, proto.OpKeyDestroyCancel, keyRef).RunE
	begin := destroy.RunE
	destroy.RunE = func(c *cobra.Command, args []string) error {
		if cancel {
			return undo(c, args)
		}
		return begin(c, args)
	}
	destroy.Flags().BoolVar(&now, "now", false, "destroy at once")
	destroy.Flags().BoolVar(&cancel, "cancel", false, "take a scheduled destruction back")
	destroy.Flags().StringVar(&delay, "delay", "", "destroy after this span (default 7d)")
	destroy.MarkFlagsMutuallyExclusive("now", "cancel", "delay")
	sure.register(destroy)
	return destroy
}
