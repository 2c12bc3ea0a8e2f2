package main

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/kmsd-project/kmsd/client"
	"github.com/kmsd-project/kmsd/client/packet"
	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

func newMaster(a *app) *cobra.Command {
	c := &cobra.Command{Use: "master", Short: "Make root, module and sign keys"}
	c.AddCommand(newMasterGenerate(a))
	return c
}

func newMasterGenerate(a *app) *cobra.Command {
	var holder holderFlags
	var out certOut
	var force, csr, symmetric bool
	var protection, escrow string
	c := uses(&cobra.Command{
		Use:   "generate APP[/REF] [flags]",
		Short: "Make the root key, the module key of an application, a sign key or an AES key",
		Long: `Make a key of the hierarchy with its certificate. ROOT is the root key, self-signed; APP the module key of an application, certified by
ROOT; APP/SIGN, APP/EC_SECP256K1_SIGN, APP/EC_SECP256R1_SIGN and APP/ED25519_SIGN are sign keys; AES keys APP/REF have no certificate. Without --force a key that is
current is shown as it is, so that this may be repeated. What was signed or encrypted with an older version can still be verified and decrypted.

With --csr a request for an outside authority is written; what it issues is brought in with "kmsctl cert upload". Given again it is for the
same key, and the flags that name the holder have to be given again: where none says otherwise it is the application's (kmsctl app show).`,
		Example: `  kmsctl master generate ROOT --protection hsm
  kmsctl master generate REGISTRATION
  kmsctl master generate KERNEL/SIGN --o Example --san dns:keys.example.org
  kmsctl master generate PMS --csr --out pms.csr
  kmsctl master generate KERNEL/IDENTITY_CACHE
  kmsctl master generate WALLET/CACHE --symmetric
  kmsctl master generate ROOT --force`,
		Args:              exactArgs("APP[/REF]"),
		ValidArgsFunction: a.completeMasters,
		RunE: func(c *cobra.Command, args []string) error {
			if _, err := keyspec.ParseName(args[0]); err != nil {
				return asUsage(err)
			}
			if err := out.free(); err != nil {
				return err
			}
			work := a.waiting("making " + args[0])
			var k *client.CertifiedKey
			err := a.with(c.Context(), func(ctx context.Context, cl *client.Client) (err error) {
				k, err = cl.GenerateMaster(ctx, args[0], client.MasterKey{
					Holder: holder.holder(), Force: force, Request: csr, Symmetric: symmetric, Protection: keyspec.Protection(protection), Escrow: keyspec.Escrow(escrow),
				})
				return err
			})
			work.end()
			if err != nil {
				return err
			}
			holder.unheard(a, k)
			return out.certified(a, c, k)
		},
	}, proto.OpMasterGenerate)
	flags := c.Flags()
	flags.BoolVar(&force, "force", false, "make a new version although there is a current one")
	flags.BoolVar(&csr, "csr", false, "write a request for an outside authority (PKCS#10)")
	flags.BoolVar(&symmetric, "symmetric", false, "make APP/REF an AES-256 key, where the application does not say so (kmsctl app set --key)")
	c.MarkFlagsMutuallyExclusive("csr", "symmetric")
	flags.StringVar(&protection, "protection", "", "where the key is: hsm, tpm or software (default: that of the application)")
	flags.StringVar(&escrow, "escrow", "", "of a module key in a tpm or hsm: recipients (a backup can restore its base keys elsewhere, default) or none (they die with the device)")
	c.RegisterFlagCompletionFunc("protection", cobra.FixedCompletions(protections, cobra.ShellCompDirectiveNoFileComp))
	c.RegisterFlagCompletionFunc("escrow", cobra.FixedCompletions(texts(keyspec.Escrows()), cobra.ShellCompDirectiveNoFileComp))
	holder.register(c)
	out.registerFormat(c, formatPEM, formatDER, formatP7B)
	c.Flags().StringVar(&out.path, "out", "-", `file to write, which must not exist yet; "-" is standard output`)
	return c
}

// completeMasters completes applications, and after a slash their sign keys.
func (a *app) completeMasters(c *cobra.Command, args []string, begun string) ([]cobra.Completion, cobra.ShellCompDirective) {
	application, _, below := strings.Cut(begun, "/")
	if !below || len(args) > 0 {
		return a.completeApps(c, args, begun)
	}
	var names []cobra.Completion
	for _, r := range signReferences {
		if name := application + "/" + r; strings.HasPrefix(name, begun) {
			names = append(names, name)
		}
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

// certifiedView is a key of the hierarchy with its certificate, for JSON.
type certifiedView struct {
	Key         string `json:"key"` // NAME@VERSION
	KeyID       string `json:"kid"`
	Thumbprint  string `json:"thumbprint,omitempty"` // SHA-256 of the certificate in MOSIP's upper-case hexadecimal
	NotBefore   string `json:"not_before,omitempty"`
	Expires     string `json:"expires,omitempty"`
	Made        bool   `json:"made"`
	Subject     string `json:"subject,omitempty"`
	Issuer      string `json:"issuer,omitempty"`
	Serial      string `json:"serial,omitempty"` // hexadecimal
	Certificate string `json:"certificate,omitempty"`
	Request     string `json:"request,omitempty"`
}

func viewCertified(k *client.CertifiedKey) certifiedView {
	v := certifiedView{Key: k.Ref, KeyID: k.KeyID, Made: k.Made}
	if !k.NotBefore.IsZero() {
		v.NotBefore = k.NotBefore.Format(time.RFC3339)
	}
	if !k.Expires.IsZero() {
		v.Expires = k.Expires.Format(time.RFC3339)
	}
	if len(k.Chain) > 0 {
		leaf := k.Chain[0]
		v.Thumbprint = packet.ThumbprintText(packet.Thumbprint(leaf))
		v.Subject, v.Issuer, v.Serial = leaf.Subject.String(), leaf.Issuer.String(), leaf.SerialNumber.Text(16)
		v.Certificate = string(pemBlock("CERTIFICATE", leaf.Raw))
	}
	if len(k.Request) > 0 {
		v.Request = string(pemBlock("CERTIFICATE REQUEST", k.Request))
	}
	return v
}

// certified shows a key of the hierarchy in words, or writes its certificate or request in the format that was asked for.
func (f *certOut) certified(a *app, c *cobra.Command, k *client.CertifiedKey) error {
	asked := f.asked(c)
	switch {
	case len(k.Request) > 0 && (asked || !a.json):
		return f.write(a, k.Ref, "CERTIFICATE REQUEST", [][]byte{k.Request})
	case asked && len(k.Chain) > 0:
		chain := raws(k.Chain)
		if !f.chain && f.format != formatP7B {
			chain = chain[:1]
		}
		return f.write(a, k.Ref, "CERTIFICATE", chain)
	}
	return a.print(viewCertified(k), func(w io.Writer) { writeCertified(w, k) })
}

func writeCertified(w io.Writer, k *client.CertifiedKey) {
	v := viewCertified(k)
	what := "was there already"
	if k.Made {
		what = "made now"
	}
	fields(w, "Key", k.Ref+" ("+what+")", "Key ID", v.KeyID, "Thumbprint", v.Thumbprint, "Subject", v.Subject, "Issuer", v.Issuer,
		"Not before", local(k.NotBefore), "Expires", local(k.Expires))
	if len(k.Chain) == 0 && k.KeyID != "" { // AES keys have neither
		fmt.Fprintln(w, "It has no certificate yet: kmsctl cert csr writes a request, kmsctl cert upload brings in what the authority issues.")
	}
}

// local is a time for people.
func local(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return day(t.Unix())
}
