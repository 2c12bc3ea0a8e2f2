package main

import (
	"context"
	"time"

	"github.com/spf13/cobra"

	"github.com/kmsd-project/kmsd/client"
	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

func newCRL(a *app) *cobra.Command {
	c := &cobra.Command{Use: "crl", Short: "Get lists of revoked certificates"}
	c.AddCommand(newCRLGet(a))
	return c
}

func newCRLGet(a *app) *cobra.Command {
	var out certOut
	c := uses(a.onKey(&cobra.Command{
		Use:   "get ISSUER [flags]",
		Short: "Get the list of the certificates that an issuer has revoked",
		Long: `Get the list of the certificates that ROOT, or the module key of an application, has issued and revoked (RFC 5280 section 5). It is
signed by the issuer and never older than its own date of the next update.`,
		Example: `  kmsctl crl get REGISTRATION --out registration.crl
  kmsctl crl get ROOT --format der --out root.crl
  openssl crl -in registration.crl -noout -text`,
		RunE: func(c *cobra.Command, args []string) error {
			if _, err := keyspec.ParseRef(args[0]); err != nil {
				return asUsage(err)
			}
			var list *client.RevocationList
			err := a.with(c.Context(), func(ctx context.Context, cl *client.Client) (err error) {
				list, err = cl.RevocationList(ctx, args[0])
				return err
			})
			if err != nil {
				return err
			}
			view := map[string]any{"issuer": args[0], "format": out.format, "number": list.Number, "entries": list.Entries,
				"this_update": list.ThisUpdate.Format(time.RFC3339), "next_update": list.NextUpdate.Format(time.RFC3339)}
			text := list.DER
			switch out.format {
			case formatPEM:
				text = pemBlock("X509 CRL", list.DER)
			case formatDER:
			default:
				return usagef("--format is pem or der, not %q", out.format)
			}
			return a.writeResult(out.outFlags, "crl", view, text, out.format == formatDER, modePublic)
		},
	}), proto.OpCRLGet)
	out.register(c, formatPEM, formatDER)
	return c
}
