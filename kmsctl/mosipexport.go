package main

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"errors"

	"github.com/spf13/cobra"

	"github.com/kmsd-project/kmsd/client"
	"github.com/kmsd-project/kmsd/client/packet"
	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

func newMosipExport(a *app) *cobra.Command {
	var out outFlags
	var module uint32
	var confirm bool
	c := uses(&cobra.Command{
		Use:   "export NAME[@N] [--out F] [flags]",
		Short: "Give a base key back as MOSIP's database keeps it",
		Long: `Write a base key, or an Ed25519 sign key, as the column private_key of MOSIP's table key_store has it: wrapped by the module key of its
application, in base64url. Whoever has that module key can open it, so a key that is not exportable takes --confirm, and that it was given
away is in the audit before it is. With --json the certificate and the thumbprint of the module key come with it, by which the rows of
key_alias are found.`,
		Example: `  kmsctl mosip export REGISTRATION/10001_110011 --confirm --out private_key.txt
  kmsctl --json mosip export REGISTRATION/10001_110011@2 --module 3 --confirm`,
		Args:              exactArgs("NAME"),
		ValidArgsFunction: a.completeKeys,
		RunE: func(c *cobra.Command, args []string) error {
			if _, err := keyspec.ParseRef(args[0]); err != nil {
				return asUsage(err)
			}
			var key *client.MOSIPKey
			err := a.with(c.Context(), func(ctx context.Context, d *client.Client) (err error) {
				key, err = d.ExportMOSIP(ctx, args[0], module, confirm)
				return err
			})
			if err != nil {
				return err
			}
			if len(key.Chain) == 0 {
				return errors.New("the key has no certificate")
			}
			text := base64.RawURLEncoding.EncodeToString(key.Wrapped)
			view := map[string]any{
				"key": key.Key, "module": key.Module, "cert_thumbprint": packet.ThumbprintText(sha256.Sum256(key.Chain[0].Raw)),
				"module_cert_thumbprint": packet.ThumbprintText(sha256.Sum256(key.Issuer)), "certificate_data": string(pemBlock("CERTIFICATE", key.Chain[0].Raw)),
			}
			return a.writeResult(out, "private_key", view, []byte(text+"\n"), false, modeSecret)
		},
	}, proto.OpKeyExportMOSIP)
	out.register(c)
	c.Flags().Uint32Var(&module, "module", 0, "version of the module key that wraps it (default: the current one)")
	c.Flags().BoolVar(&confirm, "confirm", false, "although the key is not exportable")
	return c
}
