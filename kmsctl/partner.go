package main

import (
	"context"
	"slices"

	"github.com/spf13/cobra"

	"github.com/kmsd-project/kmsd/client"
	"github.com/kmsd-project/kmsd/ipc/proto"
)

func newPartner(a *app) *cobra.Command {
	c := &cobra.Command{Use: "partner", Short: "Admit certificates of partners to domains of trust"}
	c.AddCommand(newPartnerAdd(a), newPartnerList(a), newPartnerRemove(a))
	return c
}

func newPartnerAdd(a *app) *cobra.Command {
	var in, organization string
	c := uses(a.onDomain(&cobra.Command{
		Use:   "add DOMAIN --organization O --in F",
		Short: "Admit the certificate of a partner",
		Long: `Admit the certificate of a partner to a domain. A path must lead from it to a root of the domain; it must not be signed by itself, be valid for
as long as the rules of the domain say, have a key and a signature that are strong enough, and name the organization, letter by letter, as its O.
kmsd signs nothing here: the partner keeps the certificate it has.`,
		RunE: func(c *cobra.Command, args []string) error {
			data, err := a.readFile(in, proto.MaxData)
			if err != nil {
				return err
			}
			var result *client.TrustResult
			err = a.with(c.Context(), func(ctx context.Context, cl *client.Client) (err error) {
				result, err = cl.AddPartner(ctx, args[0], organization, data)
				return err
			})
			if err != nil {
				return err
			}
			return a.printAdded([]client.TrustResult{*result})
		},
	}), proto.OpPartnerAdd)
	certificatesFlag(c, &in, certificateFile)
	c.Flags().StringVar(&organization, "organization", "", "the organization of the partner")
	c.MarkFlagRequired("organization")
	return c
}

func newPartnerList(a *app) *cobra.Command {
	var all bool
	c := uses(a.onDomain(&cobra.Command{
		Use:   "list DOMAIN [--all]",
		Short: "List the partners of a domain",
		RunE: func(c *cobra.Command, args []string) error {
			list, err := a.trusted(c.Context(), args[0], "partner")
			if err != nil {
				return err
			}
			if !all {
				list = slices.DeleteFunc(list, func(v trustView) bool { return v.Removed != "" })
			}
			return a.printTrust(list, args[0])
		},
	}), proto.OpTrustList)
	c.Flags().BoolVar(&all, "all", false, "those that were removed, too")
	return c
}

func newPartnerRemove(a *app) *cobra.Command {
	var sure confirmFlags
	c := uses(a.onDomain(&cobra.Command{
		Use:   "remove DOMAIN SHA256 [--yes]",
		Short: "Take the certificate of a partner out of a domain, at once",
		Long: `Take the certificate of a partner out of a domain. It is not trusted there any more, even though the CA that issued it is. A new one of the same
partner can be admitted.`,
		RunE: func(c *cobra.Command, args []string) error {
			return a.removeTrust(c.Context(), args[0], args[1], &sure, func(role string) bool { return role == "partner" })
		},
	}, "SHA256"), proto.OpTrustRemove)
	sure.register(c)
	return c
}
