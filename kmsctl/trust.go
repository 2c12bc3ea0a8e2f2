package main

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/kmsd-project/kmsd/client"
	"github.com/kmsd-project/kmsd/client/pkix"
	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/kmsd/pki"
)

func newTrust(a *app) *cobra.Command {
	c := &cobra.Command{Use: "trust", Short: "Say which certificates of others are trusted"}
	c.AddCommand(newTrustList(a), newTrustShow(a), newTrustSet(a), newTrustAdd(a, "add DOMAIN --in F"), newTrustAddCRL(a), newTrustRemove(a), newTrustCheck(a, "check DOMAIN --in F"))
	return c
}

// roles of what a domain has.
var trustRoles = []string{"root", "intermediate", "partner", "crl"}

// onDomain makes a command one that takes a domain of trust, and what else.
func (a *app) onDomain(c *cobra.Command, more ...string) *cobra.Command {
	c.Args = exactArgs(append([]string{"DOMAIN"}, more...)...)
	c.ValidArgsFunction = a.completeDomains
	return c
}

// completeDomains completes domains of trust.
func (a *app) completeDomains(c *cobra.Command, args []string, begun string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var r proto.TrustDomainsReply
	if a.call(c.Context(), proto.OpTrustDomains, &proto.Empty{}, &r) != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	names := []cobra.Completion{client.OwnDomain}
	for _, d := range r.Domains {
		if strings.HasPrefix(d.Name, strings.ToUpper(begun)) {
			names = append(names, d.Name)
		}
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

type domainView struct {
	Name        string `json:"name"`
	CADays      uint32 `json:"ca_days"`
	PartnerDays uint32 `json:"partner_days"`
	BuiltIn     bool   `json:"built_in"`
}

type trustView struct {
	Role         string `json:"role"`
	SHA256       string `json:"sha256"`
	Subject      string `json:"subject,omitempty"`
	Issuer       string `json:"issuer,omitempty"`
	Organization string `json:"organization,omitempty"`
	NotAfter     string `json:"not_after,omitempty"`
	Added        string `json:"added,omitempty"`
	AddedBy      string `json:"added_by,omitempty"`
	Removed      string `json:"removed,omitempty"`
	RemovedBy    string `json:"removed_by,omitempty"`
	Number       string `json:"number,omitempty"` // of a revocation list, hexadecimal
	ThisUpdate   string `json:"this_update,omitempty"`
	NextUpdate   string `json:"next_update,omitempty"`
	Entries      uint32 `json:"entries,omitempty"`
	Certificate  string `json:"certificate,omitempty"` // PEM
}

func viewTrust(e *client.TrustEntry) (trustView, error) {
	v := trustView{
		Role: e.Role, SHA256: hex.EncodeToString(e.SHA256), Issuer: e.Issuer, Organization: e.Organization, Added: stamp(e.Added), AddedBy: e.AddedBy,
		Removed: stamp(e.Removed), RemovedBy: e.RemovedBy, Number: e.Number, ThisUpdate: stamp(e.ThisUpdate), NextUpdate: stamp(e.NextUpdate), Entries: e.Entries,
	}
	if len(e.Certificate) > 0 {
		x, err := pkix.ParseCertificate(e.Certificate)
		if err != nil {
			return v, err
		}
		v.Subject, v.Issuer, v.NotAfter = nameText(x.RawSubject), nameText(x.RawIssuer), stamp(x.NotAfter.Unix())
		v.Certificate = string(pemBlock("CERTIFICATE", x.Raw))
	}
	return v, nil
}

// nameText returns a distinguished name as text.
func nameText(raw []byte) string {
	text, _ := pki.FormatName(raw)
	return text
}

// trusted returns what a domain has, by role and subject.
func (a *app) trusted(ctx context.Context, domain string, roles ...string) (list []trustView, err error) {
	err = a.with(ctx, func(ctx context.Context, cl *client.Client) error {
		for _, role := range roles {
			for e, err := range cl.Trust(ctx, domain, role) {
				if err != nil {
					return err
				}
				v, err := viewTrust(e)
				if err != nil {
					return err
				}
				list = append(list, v)
			}
		}
		return nil
	})
	slices.SortStableFunc(list, func(x, y trustView) int {
		if byRole := slices.Index(trustRoles, x.Role) - slices.Index(trustRoles, y.Role); byRole != 0 {
			return byRole
		}
		return strings.Compare(x.Subject+x.Issuer+x.SHA256, y.Subject+y.Issuer+y.SHA256)
	})
	return list, err
}

func newTrustList(a *app) *cobra.Command {
	var role string
	var all bool
	c := uses(&cobra.Command{
		Use:   "list [DOMAIN] [flags]",
		Short: "List the domains of trust, or the CAs and revocation lists of one",
		Long: `List the domains of trust with their rules, or what one of them has: its CAs and their revocation lists, with --role another part of it,
such as its partners. ` + client.OwnDomain + ` is the keystore's own hierarchy.`,
		Args:              cobra.MaximumNArgs(1),
		ValidArgsFunction: a.completeDomains,
		RunE: func(c *cobra.Command, args []string) error {
			if len(args) == 0 {
				return a.printDomains(c.Context())
			}
			roles := []string{"", "crl"}
			if role != "" {
				roles = []string{role}
			}
			list, err := a.trusted(c.Context(), args[0], roles...)
			if err != nil {
				return err
			}
			if !all {
				list = slices.DeleteFunc(list, func(v trustView) bool { return v.Removed != "" })
			}
			return a.printTrust(list, args[0])
		},
	}, proto.OpTrustList, proto.OpTrustDomains)
	c.Flags().StringVar(&role, "role", "", "only "+strings.Join(trustRoles, ", "))
	c.Flags().BoolVar(&all, "all", false, "what was removed, too")
	c.RegisterFlagCompletionFunc("role", cobra.FixedCompletions(trustRoles, cobra.ShellCompDirectiveNoFileComp))
	return c
}

func (a *app) printDomains(ctx context.Context) error {
	var r proto.TrustDomainsReply
	if err := a.call(ctx, proto.OpTrustDomains, &proto.Empty{}, &r); err != nil {
		return err
	}
	views := []domainView{}
	rows := [][]string{{"DOMAIN", "CA DAYS", "PARTNER DAYS", "BUILT IN"}}
	for _, d := range r.Domains {
		views = append(views, domainView{d.Name, d.CADays, d.PartnerDays, d.BuiltIn})
		builtIn := ""
		if d.BuiltIn {
			builtIn = "yes"
		}
		rows = append(rows, []string{d.Name, strconv.Itoa(int(d.CADays)), strconv.Itoa(int(d.PartnerDays)), builtIn})
	}
	return a.print(views, func(w io.Writer) { table(w, rows) })
}

// printTrust prints what a domain has.
func (a *app) printTrust(list []trustView, domain string) error {
	if list == nil {
		list = []trustView{}
	}
	return a.print(list, func(w io.Writer) {
		if len(list) == 0 {
			a.say("%s has nothing of that kind", strings.ToUpper(domain))
			return
		}
		rows := [][]string{{"ROLE", "SHA-256", "NOT AFTER", "SUBJECT", "NOTE"}}
		for _, v := range list {
			until, who, note := v.NotAfter, v.Subject, v.Organization
			if v.Role == "crl" {
				until, who, note = v.NextUpdate, v.Issuer, fmt.Sprintf("%d revoked", v.Entries)
			}
			if v.Removed != "" {
				note = "removed " + v.Removed
			}
			rows = append(rows, []string{v.Role, v.SHA256[:min(16, len(v.SHA256))], until, who, note})
		}
		table(w, rows)
	})
}

// minPrefix is how much of a fingerprint has to be given, in hexadecimal digits.
const minPrefix = 8

// inDomain finds what of a domain has a fingerprint that begins with prefix: one certificate, which can have two roles, or one list.
func (a *app) inDomain(ctx context.Context, domain, prefix string) ([]trustView, error) {
	prefix = strings.ToLower(strings.ReplaceAll(prefix, ":", ""))
	if len(prefix) < minPrefix || strings.Trim(prefix, "0123456789abcdef") != "" {
		return nil, usagef("%q is not a SHA-256, or its first %d or more hexadecimal digits", prefix, minPrefix)
	}
	roles := []string{"", "crl", "partner"}
	if strings.EqualFold(domain, client.OwnDomain) {
		roles = roles[:1]
	}
	list, err := a.trusted(ctx, domain, roles...)
	if err != nil {
		return nil, err
	}
	list = slices.DeleteFunc(list, func(v trustView) bool { return !strings.HasPrefix(v.SHA256, prefix) })
	if len(list) == 0 {
		err := fmt.Errorf("nothing in %s has the SHA-256 %s", strings.ToUpper(domain), prefix)
		return nil, withHint(err, "kmsctl trust list %s, kmsctl partner list %s", domain, domain)
	}
	if slices.ContainsFunc(list, func(v trustView) bool { return v.SHA256 != list[0].SHA256 }) {
		return nil, fmt.Errorf("%d have a SHA-256 that begins with %s: give more of it", len(list), prefix)
	}
	return list, nil
}

func newTrustShow(a *app) *cobra.Command {
	return uses(a.onDomain(&cobra.Command{
		Use:   "show DOMAIN SHA256",
		Short: "Show a certificate or a revocation list of a domain",
		RunE: func(c *cobra.Command, args []string) error {
			list, err := a.inDomain(c.Context(), args[0], args[1])
			if err != nil {
				return err
			}
			v := &list[0]
			return a.print(v, func(w io.Writer) {
				entries := ""
				if v.Role == "crl" {
					entries = strconv.Itoa(int(v.Entries))
				}
				fields(w, "Role", v.Role, "Subject", v.Subject, "Issuer", v.Issuer, "Organization", v.Organization, "Not after", v.NotAfter, "Number", v.Number,
					"This update", v.ThisUpdate, "Next update", v.NextUpdate, "Revoked", entries, "Added", v.Added, "By", v.AddedBy, "Removed", v.Removed, "Removed by", v.RemovedBy, "SHA-256", v.SHA256)
				if v.Certificate != "" {
					fmt.Fprint(w, "\n"+v.Certificate)
				}
			})
		},
	}, "SHA256"), proto.OpTrustList)
}

func newTrustSet(a *app) *cobra.Command {
	var d proto.TrustDomain
	c := uses(a.onDomain(&cobra.Command{
		Use:   "set DOMAIN [flags]",
		Short: "Add a domain of trust, or change its rules",
		RunE: func(c *cobra.Command, args []string) error {
			d.Name = args[0]
			var r proto.TrustDomain
			if err := a.call(c.Context(), proto.OpTrustSet, &d, &r); err != nil {
				return err
			}
			return a.print(domainView{r.Name, r.CADays, r.PartnerDays, r.BuiltIn}, func(io.Writer) {
				a.say("in %s a CA has to be valid for %d days when it is added, a partner's certificate for %d", r.Name, r.CADays, r.PartnerDays)
			})
		},
	}), proto.OpTrustSet)
	c.Flags().Uint32Var(&d.CADays, "ca-days", 0, "how long a CA has to be valid yet when it is added (default 365)")
	c.Flags().Uint32Var(&d.PartnerDays, "partner-days", 0, "the same of a partner's certificate (default 335)")
	return c
}

type reasonView struct {
	Index uint32 `json:"index"`
	Code  string `json:"code"`
	Text  string `json:"text"`
}

func viewReasons(reasons []proto.TrustReason) []reasonView {
	list := []reasonView{}
	for _, r := range reasons {
		list = append(list, reasonView{r.Index, r.Code, r.Text})
	}
	return list
}

type trustResultView struct {
	SHA256  string       `json:"sha256"`
	Subject string       `json:"subject"`
	Role    string       `json:"role,omitempty"`
	Added   bool         `json:"added"`
	Reasons []reasonView `json:"reasons"`
}

// printAdded shows what came of certificates that were to be added. Not one that is in the domain now is a failure.
func (a *app) printAdded(results []client.TrustResult) error {
	views := []trustResultView{}
	rows := [][]string{{"RESULT", "SHA-256", "SUBJECT", "WHY"}}
	there := false
	for _, r := range results {
		views = append(views, trustResultView{hex.EncodeToString(r.SHA256), r.Subject, r.Role, r.Added, viewReasons(r.Reasons)})
		result, why := "added as "+r.Role, ""
		if !r.Added {
			result = "refused"
			if len(r.Reasons) > 0 {
				why = fmt.Sprintf("%s (%s)", r.Reasons[0].Text, r.Reasons[0].Code)
			}
		}
		there = there || r.Added || len(r.Reasons) > 0 && r.Reasons[0].Code == string(pki.Duplicate)
		sum := hex.EncodeToString(r.SHA256)
		rows = append(rows, []string{result, sum[:min(16, len(sum))], r.Subject, why})
	}
	if err := a.print(views, func(w io.Writer) { table(w, rows) }); err != nil {
		return err
	}
	if !there {
		return fmt.Errorf("no certificate was added")
	}
	return nil
}

// certificatesFlag is the flag for a file with certificates.
func certificatesFlag(c *cobra.Command, in *string, what string) {
	c.Flags().StringVar(in, "in", "", what+`; "-" is standard input`)
	c.MarkFlagRequired("in")
}

const certificateFile = "certificates: PEM, DER, PKCS#7 (.p7b), or these as base64"

func (a *app) addTrust(ctx context.Context, domain, in string) error {
	data, err := a.readFile(in, proto.MaxData)
	if err != nil {
		return err
	}
	var results []client.TrustResult
	err = a.with(ctx, func(ctx context.Context, cl *client.Client) (err error) {
		results, err = cl.AddTrust(ctx, domain, data)
		return err
	})
	if err != nil {
		return err
	}
	return a.printAdded(results)
}

const addTrustLong = `Add the CAs in a file to a domain of trust, in whatever order they are. A certificate that is signed by itself becomes a root, another one
needs a path to a root of the domain. A CA has to be valid for as long as the rules of the domain say, be marked as a CA that signs certificates,
and have a key and a signature that are strong enough. Each is judged by itself; that one was removed before does not count.`

func newTrustAdd(a *app, use string) *cobra.Command {
	var in string
	c := uses(a.onDomain(&cobra.Command{
		Use:   use,
		Short: "Add CAs to a domain of trust",
		Long:  addTrustLong,
		RunE:  func(c *cobra.Command, args []string) error { return a.addTrust(c.Context(), args[0], in) },
	}), proto.OpTrustAdd)
	certificatesFlag(c, &in, certificateFile)
	return c
}

func newTrustAddCRL(a *app) *cobra.Command {
	var in string
	c := uses(a.onDomain(&cobra.Command{
		Use:   "add-crl DOMAIN --in F",
		Short: "Take the revocation list of a CA of a domain",
		Long: `Take the revocation list (CRL) of a CA of a domain. It must be signed by it, complete, current, and newer than the one there is. Every
verdict in the domain goes by it. Once it has run out, what the CA has issued is not trusted until there is a new one, or the list is removed.`,
		RunE: func(c *cobra.Command, args []string) error {
			data, err := a.readFile(in, pki.MaxCRL)
			if err != nil {
				return err
			}
			var e *client.TrustEntry
			err = a.with(c.Context(), func(ctx context.Context, cl *client.Client) (err error) {
				e, err = cl.AddCRL(ctx, args[0], data)
				return err
			})
			if err != nil {
				return err
			}
			v, err := viewTrust(e)
			if err != nil {
				return err
			}
			return a.print(v, func(io.Writer) {
				a.say("list %s of %s: %d revoked, the next update is due on %s", v.Number, v.Issuer, v.Entries, v.NextUpdate)
			})
		},
	}), proto.OpCRLAdd)
	certificatesFlag(c, &in, "revocation list, DER or PEM")
	return c
}

// removeTrust takes something out of a domain.
func (a *app) removeTrust(ctx context.Context, domain, prefix string, sure *confirmFlags, fit func(role string) bool) error {
	list, err := a.inDomain(ctx, domain, prefix)
	if err != nil {
		return err
	}
	short, found := list[0].SHA256[:16], list[0].Role
	list = slices.DeleteFunc(list, func(v trustView) bool { return !fit(v.Role) })
	if len(list) == 0 {
		return usagef("%s is a %s", short, found)
	}
	v, role := list[0], list[0].Role
	if len(list) > 1 {
		role = "" // both
	}
	what := v.Subject + " will not be trusted in " + strings.ToUpper(domain) + " any more, nor what it has issued."
	if v.Role == "crl" {
		what = "What " + v.Issuer + " has revoked will be trusted in " + strings.ToUpper(domain) + " again."
	}
	if err := sure.confirm(what, short); err != nil {
		return err
	}
	sum, err := hex.DecodeString(v.SHA256)
	if err != nil || len(sum) != sha256.Size {
		return fmt.Errorf("%q is not a SHA-256", v.SHA256)
	}
	err = a.with(ctx, func(ctx context.Context, cl *client.Client) error {
		return cl.RemoveTrust(ctx, domain, role, [sha256.Size]byte(sum))
	})
	if err != nil {
		return err
	}
	return a.print(v, func(io.Writer) { a.say("%s %s removed from %s", v.Role, short, strings.ToUpper(domain)) })
}

func newTrustRemove(a *app) *cobra.Command {
	var sure confirmFlags
	c := uses(a.onDomain(&cobra.Command{
		Use:   "remove DOMAIN SHA256 [--yes]",
		Short: "Take a CA, a partner or a revocation list out of a domain, at once",
		Long: `Take a certificate or a revocation list out of a domain, named by its SHA-256 or the first 8 or more digits of it. It takes effect with the
next verdict. A CA that was removed is not trusted either when a chain brings it along and its issuer is trusted still.`,
		RunE: func(c *cobra.Command, args []string) error {
			return a.removeTrust(c.Context(), args[0], args[1], &sure, func(string) bool { return true })
		},
	}, "SHA256"), proto.OpTrustRemove)
	sure.register(c)
	return c
}

type stepView struct {
	Subject   string `json:"subject"`
	Issuer    string `json:"issuer"`
	SHA256    string `json:"sha256"`
	NotAfter  string `json:"not_after"`
	Unchecked bool   `json:"revocation_unknown"`
}

type trustVerdictView struct {
	Trusted bool         `json:"trusted"`
	Domain  string       `json:"domain"`
	Partner string       `json:"partner,omitempty"`
	Path    []stepView   `json:"path"`
	Reasons []reasonView `json:"reasons"`
}

func (a *app) checkTrust(ctx context.Context, domain, in, at string) error {
	data, err := a.readFile(in, pki.MaxChainBytes)
	if err != nil {
		return err
	}
	chain, err := pki.ParseBundle(data)
	if err != nil {
		return fmt.Errorf("%s: %w", in, err)
	}
	if arranged, err := pki.Arrange(chain); err == nil { // else the first is the one in question
		chain = arranged
	}
	when, err := parseTime(at, time.Now())
	if err != nil {
		return err
	}
	if when < 0 {
		return usagef("--at is a time")
	}
	var moment time.Time
	if when > 0 {
		moment = time.Unix(when, 0)
	}
	var v *client.TrustVerdict
	err = a.with(ctx, func(ctx context.Context, cl *client.Client) (err error) {
		v, err = cl.VerifyTrust(ctx, domain, chain, moment)
		return err
	})
	if err != nil {
		return err
	}
	if err := a.printVerdict(v); err != nil {
		return err
	}
	return v.Err()
}

func (a *app) printVerdict(v *client.TrustVerdict) error {
	view := trustVerdictView{Trusted: v.Trusted, Domain: v.Domain, Partner: v.Partner, Path: []stepView{}, Reasons: viewReasons(v.Reasons)}
	for i, x := range v.Path {
		view.Path = append(view.Path, viewStep(x, slices.Contains(v.Unchecked, i)))
	}
	return a.print(view, func(w io.Writer) {
		rows := [][]string{{"", "SUBJECT", "NOT AFTER", "REVOCATION", "FAULT"}}
		for i, s := range view.Path {
			revocation := "checked"
			switch {
			case s.Unchecked:
				revocation = "not known"
			case i == len(view.Path)-1:
				revocation = "root"
				if !v.Trusted {
					revocation = ""
				}
			}
			var faults []string
			for _, r := range v.Reasons {
				if int(r.Index) == i {
					faults = append(faults, r.Code)
				}
			}
			rows = append(rows, []string{strconv.Itoa(i), s.Subject, s.NotAfter, revocation, strings.Join(faults, ", ")})
		}
		table(w, rows)
		if v.Trusted {
			partner := ""
			if v.Partner != "" {
				partner = ", a partner's: " + v.Partner
			}
			a.say("trusted in %s%s", v.Domain, printable(partner))
		}
	})
}

func viewStep(x *x509.Certificate, unchecked bool) stepView {
	sum := sha256.Sum256(x.Raw)
	return stepView{nameText(x.RawSubject), nameText(x.RawIssuer), hex.EncodeToString(sum[:]), stamp(x.NotAfter.Unix()), unchecked}
}

const checkTrustLong = `Ask whether a certificate is trusted in a domain: whether a path leads from it to a root, over the CAs of the domain and those in the file, and
nothing on it is out of date, weak, against the constraints of a CA, revoked or removed. The file holds the certificate, and may hold its chain. With --at the question is
about another time. The domain ` + client.OwnDomain + ` is the keystore's own hierarchy. The exit code is 0 when it is trusted, else 1.`

func newTrustCheck(a *app, use string) *cobra.Command {
	var in, at string
	c := uses(a.onDomain(&cobra.Command{
		Use:   use + " [--at T]",
		Short: "Ask whether a certificate is trusted in a domain",
		Long:  checkTrustLong,
		RunE:  func(c *cobra.Command, args []string) error { return a.checkTrust(c.Context(), args[0], in, at) },
	}), proto.OpTrustVerify)
	certificatesFlag(c, &in, certificateFile)
	atFlag(c, &at)
	return c
}

func atFlag(c *cobra.Command, at *string) {
	c.Flags().StringVar(at, "at", "", "the time in question: RFC 3339 or YYYY-MM-DD (default now)")
}
