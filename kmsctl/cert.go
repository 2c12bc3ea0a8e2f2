package main

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/kmsd-project/kmsd/ipc/proto"
)

func newCert(a *app) *cobra.Command {
	c := &cobra.Command{Use: "cert", Short: "Request, issue and attach certificates"}
	c.AddCommand(newCertCSR(a), newCertSelfSign(a), newCertIssue(a), newCertShow(a), newCertAttach(a), newCertChain(a))
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

// certOut are the flags of a command that writes certificates or a request.
type certOut struct {
	outFlags
	format string
}

func (f *certOut) register(c *cobra.Command) {
	c.Flags().StringVar(&f.format, "format", "pem", "pem or der")
	c.RegisterFlagCompletionFunc("format", cobra.FixedCompletions([]string{"pem", "der"}, cobra.ShellCompDirectiveNoFileComp))
	f.outFlags.register(c)
}

// write writes list, which belongs to key, as PEM, or its one element as DER.
func (f *certOut) write(a *app, key, kind string, list [][]byte) error {
	var out []byte
	switch f.format {
	case "pem":
		for _, der := range list {
			out = append(out, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})...)
		}
	case "der":
		if len(list) != 1 {
			return withHint(fmt.Errorf("there are %d certificates and a DER file holds one", len(list)), "use --format pem, or cert show for the first alone")
		}
		out = list[0]
	default:
		return usagef("--format is pem or der, not %q", f.format)
	}
	name := strings.ToLower(strings.ReplaceAll(kind, " ", "_"))
	return a.writeResult(f.outFlags, name, map[string]any{"key": key, "format": f.format, "count": len(list)}, out, f.format == "der", modePublic)
}

func newCertCSR(a *app) *cobra.Command {
	var subject subjectFlags
	var out certOut
	c := uses(a.onKey(&cobra.Command{
		Use:   "csr NAME --subject DN [flags]",
		Short: "Write a certificate request (PKCS#10)",
		RunE: func(c *cobra.Command, args []string) error {
			var r proto.CertChain
			if err := a.call(c.Context(), proto.OpCertRequest, &proto.CertRequest{Key: args[0], Subject: subject.Subject}, &r); err != nil {
				return err
			}
			return out.write(a, args[0], "CERTIFICATE REQUEST", r.Chain)
		},
	}), proto.OpCertRequest)
	subject.register(c)
	out.register(c)
	return c
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
	out.register(c)
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
	out.register(c)
	return c
}

func (a *app) chain(ctx context.Context, key string) ([][]byte, error) {
	var r proto.CertChain
	if err := a.call(ctx, proto.OpCertGet, &proto.KeyRef{Key: key}, &r); err != nil {
		return nil, err
	}
	if len(r.Chain) == 0 {
		return nil, withHint(fmt.Errorf("%s has no certificate", key), "kmsctl cert self-sign %[1]s where the key signs, else kmsctl cert issue %[1]s --issuer CA, or kmsctl cert attach %[1]s; symmetric keys have none", key)
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
	out.register(c)
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
	x, err := x509.ParseCertificate(der)
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
		x.NotAfter.UTC().Format(time.RFC3339), names, x.IsCA, x.PublicKeyAlgorithm.String(), x.SignatureAlgorithm.String(),
		hex.EncodeToString(digest[:]),
	}, nil
}

func newCertChain(a *app) *cobra.Command {
	var out certOut
	c := uses(a.onKey(&cobra.Command{
		Use:   "chain NAME[@N] [flags]",
		Short: "Write the certificate of a key with its chain, leaf first",
		RunE: func(c *cobra.Command, args []string) error {
			chain, err := a.chain(c.Context(), args[0])
			if err != nil {
				return err
			}
			return out.write(a, args[0], "CERTIFICATE", chain)
		},
	}), proto.OpCertGet)
	out.register(c)
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
