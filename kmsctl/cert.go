package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/kmsd-project/kmsd/client"
	"github.com/kmsd-project/kmsd/client/packet"
	"github.com/kmsd-project/kmsd/client/pkix"
	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/pki"
)

func newCert(a *app) *cobra.Command {
	c := &cobra.Command{Use: "cert", Short: "Get, request, issue and attach certificates"}
	c.AddCommand(newCertGet(a), newCertList(a), newCertCSR(a), newCertSelfSign(a), newCertIssue(a), newCertShow(a), newCertAttach(a), newCertChain(a))
	c.AddCommand(certUploads(a)...)
	return c
}

// subjectFlags describe the holder of a certificate.
type subjectFlags struct{ proto.Subject }

func (f *subjectFlags) register(c *cobra.Command) {
	flags := c.Flags()
	flags.StringVar(&f.DN, "subject", "", "distinguished name, such as CN=host,O=Example")
	flags.StringSliceVar(&f.DNS, "dns", nil, "DNS name; repeat for more")
	flags.StringSliceVar(&f.IP, "ip", nil, "IP address; repeat for more")
	flags.StringSliceVar(&f.Email, "email", nil, "mail address; repeat for more")
	flags.StringSliceVar(&f.URI, "uri", nil, "URI; repeat for more")
}

// profileFlags describe what a certificate allows.
type profileFlags struct {
	from, until string
	ca          bool
	pathLen     int64
	keyUsage    []string
	extKeyUsage []string
}

func (f *profileFlags) register(c *cobra.Command) {
	flags := c.Flags()
	flags.StringVar(&f.from, "not-before", "", "first moment of validity (default now)")
	flags.StringVar(&f.until, "not-after", "", "last moment of validity: RFC 3339, YYYY-MM-DD or a span such as 2y (default: the expiry of the key, or 1 year)")
	flags.BoolVar(&f.ca, "ca", false, "a certificate that may issue others")
	flags.Int64Var(&f.pathLen, "path-len", -1, "authorities that may follow below, -1 for any number")
	flags.StringSliceVar(&f.keyUsage, "key-usage", nil, "key usages by their RFC 5280 names (default: by the usage of the key)")
	flags.StringSliceVar(&f.extKeyUsage, "ext-key-usage", nil, "server-auth, client-auth, code-signing, email, time-stamping or ocsp-signing")
}

func (f *profileFlags) profile() (proto.CertProfile, error) {
	now := time.Now()
	notBefore, err := parseTime(f.from, now)
	if err != nil {
		return proto.CertProfile{}, err
	}
	notAfter, err := parseTime(f.until, now)
	if err != nil {
		return proto.CertProfile{}, err
	}
	if notBefore < 0 || notAfter < 0 {
		return proto.CertProfile{}, usagef("a certificate has a beginning and an end")
	}
	return proto.CertProfile{
		NotBefore: notBefore, NotAfter: notAfter, CA: f.ca, PathLen: f.pathLen, KeyUsage: f.keyUsage, ExtKeyUse: f.extKeyUsage,
	}, nil
}

// The formats of certificates and requests in files.
const (
	formatPEM = "pem"
	formatDER = "der"
	formatP7B = "p7b" // PKCS #7 without signers, in PEM, as MOSIP gives chains out
)

// certOut are the flags of a command that writes certificates or a request.
type certOut struct {
	outFlags
	format string
	chain  bool // with --chain: the issuers too
}

func (f *certOut) register(c *cobra.Command, formats ...string) {
	f.registerFormat(c, formats...)
	f.outFlags.register(c)
}

func (f *certOut) registerFormat(c *cobra.Command, formats ...string) {
	c.Flags().StringVar(&f.format, "format", formatPEM, "form of the result: "+strings.Join(formats, ", "))
	c.RegisterFlagCompletionFunc("format", cobra.FixedCompletions(formats, cobra.ShellCompDirectiveNoFileComp))
}

func (f *certOut) registerChain(c *cobra.Command) {
	c.Flags().BoolVar(&f.chain, "chain", false, "with the certificates of the issuers, up to the root; p7b always has them")
}

// asked reports whether a file of a certificate is wanted rather than its description.
func (f *certOut) asked(c *cobra.Command) bool {
	return slices.ContainsFunc([]string{"format", "out", "chain"}, func(name string) bool { return c.Flags().Changed(name) })
}

// free refuses a file that is there already, before something is done that cannot be undone.
func (f *certOut) free() error {
	if f.path == "" || f.path == "-" || f.force {
		return nil
	}
	if info, err := os.Lstat(f.path); err == nil && info.Mode().IsRegular() {
		return withHint(fmt.Errorf("%s exists", f.path), "choose another --out")
	}
	return nil
}

// write writes list, which belongs to key, as PEM, as PKCS #7, or its one element as DER.
func (f *certOut) write(a *app, key, kind string, list [][]byte) error {
	var out []byte
	switch {
	case f.format == formatPEM:
		for _, der := range list {
			out = append(out, pemBlock(kind, der)...)
		}
	case f.format == formatDER:
		if len(list) != 1 {
			return withHint(fmt.Errorf("there are %d certificates and a DER file holds one", len(list)), "use --format pem, or cert show for the first alone")
		}
		out = list[0]
	case f.format == formatP7B && kind == "CERTIFICATE":
		bundle, err := pki.MarshalPKCS7(list)
		if err != nil {
			return err
		}
		out = pemBlock("PKCS7", bundle)
	case f.format == formatP7B:
		return usagef("--format p7b is for certificates, not for a request")
	default:
		return usagef("--format is pem, der or p7b, not %q", f.format)
	}
	name := strings.ToLower(strings.ReplaceAll(kind, " ", "_"))
	return a.writeResult(f.outFlags, name, map[string]any{"key": key, "format": f.format, "count": len(list)}, out, f.format == formatDER, modePublic)
}

func pemBlock(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

// raws are the certificates in DER.
func raws(chain []*x509.Certificate) [][]byte {
	list := make([][]byte, len(chain))
	for i, c := range chain {
		list[i] = c.Raw
	}
	return list
}

func newCertCSR(a *app) *cobra.Command {
	var subject subjectFlags
	var holder holderFlags
	var out certOut
	c := uses(a.onKey(&cobra.Command{
		Use:   "csr {APP[/REF] | NAME --subject DN} [flags]",
		Short: "Write a certificate request (PKCS#10)",
		Long: `Write a certificate request for a key. Of a key of the hierarchy, APP or APP/REF, it names whom the application's certificates name;
--cn, --ou, --o, --l, --st, --c and --san change that. If no version of it is current it is made, where "kmsctl cert get" would make it.
With --subject the request is for any other key that can sign, and names nobody else.`,
		Example: `  kmsctl cert csr PMS --out pms.csr
  kmsctl cert csr RESIDENT/mpartner-default-resident --o Example --out resident.csr
  kmsctl cert csr web --subject CN=web.example.org --dns web.example.org --out web.csr`,
		RunE: func(c *cobra.Command, args []string) error {
			plain := subject.DN != "" || len(subject.DNS)+len(subject.IP)+len(subject.Email)+len(subject.URI) > 0
			if plain && holder.given() {
				return usagef("either --subject with --dns, --ip, --email and --uri, or the flags of the hierarchy")
			}
			if plain {
				var r proto.CertChain
				if err := a.call(c.Context(), proto.OpCertRequest, &proto.CertRequest{Key: args[0], Subject: subject.Subject}, &r); err != nil {
					return err
				}
				return out.write(a, args[0], "CERTIFICATE REQUEST", r.Chain)
			}
			if err := out.free(); err != nil {
				return err
			}
			k, err := a.current(c.Context(), args[0], holder.holder(), true)
			if errors.Is(err, client.ErrNotAvailable) {
				return withHint(err, "kmsctl app set %s adds the application; for a key outside of the hierarchy give --subject DN", keyspec.Name(args[0]).Namespace())
			}
			if err != nil {
				return err
			}
			return out.write(a, k.Ref, "CERTIFICATE REQUEST", [][]byte{k.Request})
		},
	}), proto.OpCertRequest, proto.OpCertCSR)
	subject.register(c)
	holder.register(c)
	out.register(c, formatPEM, formatDER)
	return c
}

// current has kmsd make or rotate a key of the hierarchy if its policy says so, and returns its certificate or a request.
func (a *app) current(ctx context.Context, name string, h client.Holder, request bool) (k *client.CertifiedKey, err error) {
	if _, err := keyspec.ParseName(name); err != nil {
		return nil, asUsage(err)
	}
	work := a.waiting("waiting for " + name)
	defer work.end()
	err = a.with(ctx, func(ctx context.Context, c *client.Client) error {
		if request {
			k, err = c.CurrentRequest(ctx, name, h)
		} else {
			k, err = c.CurrentCertificate(ctx, name, h)
		}
		return err
	})
	return k, err
}

func newCertGet(a *app) *cobra.Command {
	var holder holderFlags
	var out certOut
	c := uses(a.onKey(&cobra.Command{
		Use:   "get APP[/REF] [flags]",
		Short: "Get the certificate of a key of the hierarchy; makes or rotates the key if it is time",
		Long: `Get the certificate of the current version of a key of the hierarchy, as MOSIP's getCertificate does. A base key APP/REF that is
not there yet is made, one that expires soon is rotated, and so are module and sign keys that expire; a root, module or sign key that was never
there is not made: that is "kmsctl master generate". Whoever asks at the same time gets the same key. "kmsctl cert show" only looks.`,
		Example: `  kmsctl cert get REGISTRATION/10001_110011
  kmsctl cert get REGISTRATION/10001_110011 --format pem --chain --out machine.pem
  kmsctl cert get KERNEL/SIGN --format p7b --out sign.p7b
  kmsctl --json cert get RESIDENT/mpartner-default-resident`,
		RunE: func(c *cobra.Command, args []string) error {
			k, err := a.current(c.Context(), args[0], holder.holder(), false)
			if err != nil {
				return err
			}
			holder.unheard(a, k)
			return out.certified(a, c, k)
		},
	}), proto.OpCertCurrent)
	holder.register(c)
	out.register(c, formatPEM, formatDER, formatP7B)
	out.registerChain(c)
	return c
}

func newCertList(a *app) *cobra.Command {
	return uses(a.onKey(&cobra.Command{
		Use:   "list NAME",
		Short: "List the certificates of all versions of a key",
		Long: `List the certificates of all versions of a key, those of expired and revoked versions too, the newest first: what others may have
encrypted to, or verify with. NAME@VERSION in "kmsctl cert show" shows one of them.`,
		Example: "  kmsctl cert list REGISTRATION/10001_110011",
		RunE: func(c *cobra.Command, args []string) error {
			if _, err := keyspec.ParseName(args[0]); err != nil {
				return asUsage(err)
			}
			list := []*client.CertificateVersion{}
			err := a.with(c.Context(), func(ctx context.Context, cl *client.Client) error {
				for v, err := range cl.CertificateVersions(ctx, args[0]) {
					if err != nil {
						return err
					}
					list = append(list, v)
				}
				return nil
			})
			if err != nil {
				return err
			}
			views := make([]certVersionView, len(list))
			for i, v := range list {
				views[i] = viewCertVersion(args[0], v)
			}
			return a.print(views, func(w io.Writer) {
				rows := [][]string{{"VERSION", "STATE", "NOT BEFORE", "NOT AFTER", "KEY ID", "THUMBPRINT", "NOTE"}}
				for i, v := range list {
					note := "-"
					if !v.Revoked.IsZero() {
						note = "revoked " + local(v.Revoked) + ": " + string(v.Reason)
					}
					rows = append(rows, []string{number(v.Version), string(v.State), local(v.Certificate.NotBefore), local(v.Certificate.NotAfter), v.KeyID, views[i].Thumbprint, note})
				}
				table(w, rows)
			})
		},
	}), proto.OpCertList)
}

type certVersionView struct {
	Key         string `json:"key"` // NAME@VERSION
	Version     uint32 `json:"version"`
	State       string `json:"state"`
	KeyID       string `json:"kid"`
	Thumbprint  string `json:"thumbprint"` // SHA-256 of the certificate in MOSIP's upper-case hexadecimal
	Created     string `json:"created"`
	NotBefore   string `json:"not_before"` // of the certificate
	NotAfter    string `json:"not_after"`
	Revoked     string `json:"revoked,omitempty"`
	Reason      string `json:"reason,omitempty"` // why it was revoked
	Subject     string `json:"subject"`
	Issuer      string `json:"issuer"`
	Certificate string `json:"certificate"` // PEM
}

func viewCertVersion(name string, v *client.CertificateVersion) certVersionView {
	x := v.Certificate
	view := certVersionView{
		Key: keyspec.Ref{Name: keyspec.Name(name), Version: keyspec.Version(v.Version)}.String(), Version: v.Version, State: string(v.State), KeyID: v.KeyID,
		Thumbprint: packet.ThumbprintText(v.Thumbprint()), Created: v.Created.Format(time.RFC3339), NotBefore: x.NotBefore.UTC().Format(time.RFC3339),
		NotAfter: x.NotAfter.UTC().Format(time.RFC3339), Subject: x.Subject.String(), Issuer: x.Issuer.String(), Certificate: string(pemBlock("CERTIFICATE", x.Raw)),
	}
	if !v.Revoked.IsZero() {
		view.Revoked, view.Reason = v.Revoked.UTC().Format(time.RFC3339), string(v.Reason)
	}
	return view
}

func newCertSelfSign(a *app) *cobra.Command {
	var subject subjectFlags
	var profile profileFlags
	var out certOut
	c := uses(a.onKey(&cobra.Command{
		Use:   "self-sign NAME --subject DN [flags]",
		Short: "Make a self-signed certificate and attach it to the key",
		RunE: func(c *cobra.Command, args []string) error {
			p, err := profile.profile()
			if err != nil {
				return err
			}
			var r proto.CertChain
			if err := a.call(c.Context(), proto.OpCertSelfSign, &proto.CertSelfSign{Key: args[0], Subject: subject.Subject, Profile: p}, &r); err != nil {
				return err
			}
			return out.write(a, args[0], "CERTIFICATE", r.Chain)
		},
	}), proto.OpCertSelfSign)
	subject.register(c)
	profile.register(c)
	out.register(c, formatPEM, formatDER)
	return c
}

func newCertIssue(a *app) *cobra.Command {
	var issuer, request string
	var subject subjectFlags
	var profile profileFlags
	var out certOut
	c := uses(&cobra.Command{
		Use:   "issue {NAME | --request F} --issuer CA [flags]",
		Short: "Issue a certificate, signed by another key",
		Long: `Issue a certificate signed by the key --issuer, for the key NAME, to which the chain is attached, or for the request in
a file. The result is the chain, leaf first.`,
		Args:              cobra.MaximumNArgs(1),
		ValidArgsFunction: a.completeKeys,
		RunE: func(c *cobra.Command, args []string) error {
			if (len(args) == 1) == (request != "") {
				return withHint(usagef("give either NAME or --request F"), "kmsctl cert issue --help")
			}
			p, err := profile.profile()
			if err != nil {
				return err
			}
			params := proto.CertIssue{Issuer: issuer, Subject: subject.Subject, Profile: p}
			if len(args) == 1 {
				params.Key = args[0]
			} else {
				encoded, err := a.readFile(request, proto.MaxData)
				if err != nil {
					return err
				}
				list, err := decodeAll(encoded, "CERTIFICATE REQUEST", "NEW CERTIFICATE REQUEST")
				if err != nil || len(list) != 1 {
					return fmt.Errorf("%s holds no certificate request", request)
				}
				params.Request = list[0]
			}
			var r proto.CertChain
			if err := a.call(c.Context(), proto.OpCertIssue, &params, &r); err != nil {
				return err
			}
			if request != "" && out.format == "der" && len(r.Chain) > 1 {
				r.Chain = r.Chain[:1]
			}
			return out.write(a, params.Key, "CERTIFICATE", r.Chain)
		},
	}, proto.OpCertIssue)
	c.Flags().StringVar(&issuer, "issuer", "", "the key that signs")
	c.MarkFlagRequired("issuer")
	a.completeFlag(c, "issuer")
	c.Flags().StringVar(&request, "request", "", `PKCS#10 request, PEM or DER, "-" is standard input`)
	subject.register(c)
	profile.register(c)
	out.register(c, formatPEM, formatDER)
	return c
}

func (a *app) chain(ctx context.Context, key string) ([][]byte, error) {
	var r proto.CertChain
	if err := a.call(ctx, proto.OpCertGet, &proto.KeyRef{Key: key}, &r); err != nil {
		if errors.Is(err, client.ErrNotAvailable) {
			err = withHint(err, "the key does not exist or you have no grant for it: kmsctl key list, kmsctl whoami; kmsctl cert get %s makes it if it is one of an application", key)
		}
		return nil, err
	}
	if len(r.Chain) == 0 {
		return nil, withHint(fmt.Errorf("%s has no certificate", key), "kmsctl cert self-sign %[1]s where the key signs, kmsctl cert get %[1]s for a key of an application, kmsctl cert upload %[1]s --in FILE for one whose certificate comes from outside, else kmsctl cert issue %[1]s --issuer CA, or kmsctl cert attach %[1]s; symmetric keys have none", key)
	}
	return r.Chain, nil
}

func newCertShow(a *app) *cobra.Command {
	var out certOut
	c := uses(a.onKey(&cobra.Command{
		Use:   "show NAME[@N] [flags]",
		Short: "Show the certificate of a key",
		Long:  "Show the certificate of a key in words. With --format it is written as PEM or DER instead, without its chain.",
		RunE: func(c *cobra.Command, args []string) error {
			chain, err := a.chain(c.Context(), args[0])
			if err != nil {
				return err
			}
			if c.Flags().Changed("format") || c.Flags().Changed("out") {
				return out.write(a, args[0], "CERTIFICATE", chain[:1])
			}
			var views []certView
			for _, der := range chain {
				v, err := viewCert(der)
				if err != nil {
					return err
				}
				views = append(views, v)
			}
			return a.print(views, func(w io.Writer) {
				for i, v := range views {
					if i > 0 {
						fmt.Fprintln(w)
					}
					authority := ""
					if v.CA {
						authority = "yes"
					}
					fields(w, "Subject", v.Subject, "Issuer", v.Issuer, "Serial", v.Serial, "Not before", v.NotBefore,
						"Not after", v.NotAfter, "Names", strings.Join(v.Names, ", "), "Authority", authority,
						"Public key", v.PublicKey, "Signature", v.Signature, "SHA-256", v.SHA256)
				}
			})
		},
	}), proto.OpCertGet)
	out.register(c, formatPEM, formatDER)
	return c
}

type certView struct {
	Subject   string   `json:"subject"`
	Issuer    string   `json:"issuer"`
	Serial    string   `json:"serial"` // hexadecimal
	NotBefore string   `json:"not_before"`
	NotAfter  string   `json:"not_after"`
	Names     []string `json:"names"`
	CA        bool     `json:"ca"`
	PublicKey string   `json:"public_key"`
	Signature string   `json:"signature"`
	SHA256    string   `json:"sha256"` // of the certificate, hexadecimal
}

func viewCert(der []byte) (certView, error) {
	x, err := pkix.ParseCertificate(der)
	if err != nil {
		return certView{}, err
	}
	names := append(append([]string{}, x.DNSNames...), x.EmailAddresses...)
	for _, ip := range x.IPAddresses {
		names = append(names, ip.String())
	}
	for _, uri := range x.URIs {
		names = append(names, uri.String())
	}
	digest := sha256.Sum256(der)
	return certView{
		x.Subject.String(), x.Issuer.String(), x.SerialNumber.Text(16), x.NotBefore.UTC().Format(time.RFC3339),
		x.NotAfter.UTC().Format(time.RFC3339), names, x.IsCA, publicKeyText(x), x.SignatureAlgorithm.String(),
		hex.EncodeToString(digest[:]),
	}, nil
}

// publicKeyText says what key a certificate is of.
func publicKeyText(x *x509.Certificate) string {
	switch k := x.PublicKey.(type) {
	case *rsa.PublicKey:
		return fmt.Sprintf("RSA %d", k.N.BitLen())
	case *ecdsa.PublicKey:
		if pkix.IsSecp256k1(k) {
			return "ECDSA secp256k1"
		}
		return "ECDSA " + k.Params().Name
	}
	return x.PublicKeyAlgorithm.String()
}

func newCertChain(a *app) *cobra.Command {
	var out certOut
	c := uses(a.onKey(&cobra.Command{
		Use:   "chain NAME[@N] [flags]",
		Short: "Write the certificate of a key with its chain, leaf first",
		Long: `Write the certificate of a key with those of its issuers up to the root, leaf first. --format p7b is PKCS #7 without signers, in PEM,
as MOSIP's getCertificateChain gives it; "openssl pkcs7 -print_certs" reads it.`,
		Example: `  kmsctl cert chain REGISTRATION/10001_110011 --out chain.pem
  kmsctl cert chain KERNEL/SIGN --format p7b --out sign.p7b`,
		RunE: func(c *cobra.Command, args []string) error {
			chain, err := a.chain(c.Context(), args[0])
			if err != nil {
				return err
			}
			return out.write(a, args[0], "CERTIFICATE", chain)
		},
	}), proto.OpCertGet)
	out.register(c, formatPEM, formatP7B)
	return c
}

func newCertAttach(a *app) *cobra.Command {
	var in string
	c := uses(a.onKey(&cobra.Command{
		Use:   "attach NAME --in F",
		Short: "Attach a certificate and its chain, leaf first, to a key",
		RunE: func(c *cobra.Command, args []string) error {
			encoded, err := a.readFile(in, proto.MaxData)
			if err != nil {
				return err
			}
			chain, err := decodeAll(encoded, "CERTIFICATE")
			if err != nil {
				return fmt.Errorf("%s: %w", in, err)
			}
			if err := a.call(c.Context(), proto.OpCertAttach, &proto.CertAttach{Key: args[0], Chain: chain}, &proto.Empty{}); err != nil {
				return err
			}
			return a.print(map[string]any{"key": args[0], "certificates": len(chain)}, func(io.Writer) {
				a.say("%d certificates attached to %s", len(chain), args[0])
			})
		},
	}), proto.OpCertAttach)
	c.Flags().StringVar(&in, "in", "", `certificates, PEM or DER, "-" is standard input`)
	c.MarkFlagRequired("in")
	return c
}

// decodeAll returns the DER of every PEM block of one of the kinds, or encoded itself when it is not PEM.
func decodeAll(encoded []byte, kinds ...string) ([][]byte, error) {
	var list [][]byte
	for rest := encoded; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		for _, kind := range kinds {
			if block.Type == kind {
				list = append(list, block.Bytes)
			}
		}
	}
	if len(list) > 0 {
		return list, nil
	}
	if len(encoded) > 0 && encoded[0] == 0x30 { // a DER sequence
		return [][]byte{encoded}, nil
	}
	return nil, errors.New("no " + strings.ToLower(kinds[0]) + " found")
}
