package main

import (
	"context"
	"errors"
	"strings"

	"github.com/spf13/cobra"

	"github.com/kmsd-project/kmsd/client"
	"github.com/kmsd-project/kmsd/client/jose"
	"github.com/kmsd-project/kmsd/ipc/proto"
)

func newJWE(a *app) *cobra.Command {
	c := &cobra.Command{Use: "jwe", Short: "Encrypt and decrypt JSON Web Encryption"}
	c.AddCommand(newJWEEncrypt(a), newJWEDecrypt(a))
	return c
}

func newJWEEncrypt(a *app) *cobra.Command {
	var key hierarchyFlags
	var cert, in string
	var o jose.EncryptOptions
	var anything bool
	var out outFlags
	c := uses(&cobra.Command{
		Use:   "encrypt {--app A --ref R | --cert F} --in F --out F [flags]",
		Short: "Encrypt a token or JSON",
		Long: `Encrypt a signed token, or a JSON object, as MOSIP's jwtEncrypt does: JSON Web Encryption (RFC 7516) in the compact serialization, with
RSA-OAEP-256 and A256GCM, to the certificate that "kmsctl cert get A/R" gives or to the one in a file. The key id is the SHA-256 of the certificate.

What is encrypted is compressed first, as MOSIP does it, so the length tells something of the content: --no-compress, where somebody else has a say in
part of it.`,
		Example: `  kmsctl jwe encrypt --app RESIDENT --ref mpartner-default-resident --in token --out token.jwe
  kmsctl jwe encrypt --cert partner.pem --no-compress --x5t --in claims.json`,
		Args: exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			payload, err := a.readFile(in, jose.MaxPayload)
			if err != nil {
				return err
			}
			if !anything {
				text := strings.TrimSpace(string(payload))
				if _, err := jose.ParseSigned(text); err == nil {
					payload = []byte(text)
				} else if err := jose.CheckJSON(payload); err != nil {
					return withHint(err, "what is encrypted is a signed token or a JSON object; --any takes everything")
				}
			}
			certificate, name, err := a.receiver(c.Context(), &key, cert)
			if err != nil {
				return err
			}
			token, err := jose.Encrypt(certificate, payload, o)
			if err != nil {
				return err
			}
			view := map[string]any{}
			if name != "" {
				view["key"] = name
			}
			return a.writeResult(out, "token", view, []byte(token+"\n"), false, modePublic)
		},
	}, proto.OpCertCurrent)
	key.register(c)
	flags := c.Flags()
	flags.StringVar(&cert, "cert", "", "certificate of the receiver, PEM or DER, instead of a key of the hierarchy")
	c.MarkFlagsOneRequired("app", "cert")
	c.MarkFlagsMutuallyExclusive("app", "cert")
	c.MarkFlagsMutuallyExclusive("ref", "cert")
	flags.BoolVar(&o.Plain, "no-compress", false, "do not compress")
	flags.BoolVar(&o.IncludeCertificate, "x5c", false, "with the certificate of the receiver")
	flags.BoolVar(&o.Thumbprint, "x5t", false, "with its SHA-256 once more")
	flags.StringVar(&o.KeySetURL, "jku", "", "with an URL of a key set")
	flags.BoolVar(&anything, "any", false, "encrypt whatever the input is")
	inFlag(c, &in, "the payload")
	out.register(c)
	return c
}

func newJWEDecrypt(a *app) *cobra.Command {
	var key hierarchyFlags
	var named, in string
	var out outFlags
	c := uses(&cobra.Command{
		Use:   "decrypt {--app A --ref R | --key NAME} --in F --out F",
		Short: "Decrypt a token",
		Long: `Decrypt JSON Web Encryption, and write what was encrypted as it is. With --app and --ref the key is found by the key id in the token, and
has to be A/R: MOSIP's jwtDecrypt never takes a module key. With --key every version of that key is tried.`,
		Example: "  kmsctl jwe decrypt --app RESIDENT --ref mpartner-default-resident --in token.jwe --out token",
		Args:    exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			token, err := a.readToken(in)
			if err != nil {
				return err
			}
			var payload []byte
			err = a.with(c.Context(), func(ctx context.Context, cl *client.Client) error {
				var u jose.Unwrapper
				if named != "" {
					k, err := a.key(ctx, named)
					if err != nil {
						return err
					}
					u = k
				} else {
					name, err := key.name()
					if err != nil {
						return err
					}
					r, err := cl.Recipient(name)
					if err != nil {
						return err
					}
					u = r.WithoutModule()
				}
				var err error
				payload, _, err = jose.Decrypt(ctx, u, token)
				return err
			})
			switch {
			case errors.Is(err, jose.ErrDecryption), errors.Is(err, client.ErrDecryption): // in the same words, whichever part of the token does not decrypt
				return withHint(jose.ErrDecryption, "another key, or the token was changed")
			case errors.Is(err, client.ErrOtherRecipient):
				return withHint(err, "name the key that it is for with --app and --ref")
			case errors.Is(err, jose.ErrFormat):
				return withHint(err, "is it an encrypted token in the compact serialization?")
			case err != nil:
				return err
			}
			defer clear(payload)
			return a.writeResult(out, "data", nil, payload, true, modeSecret)
		},
	}, proto.OpKeyFind, proto.OpDecrypt)
	key.register(c)
	c.Flags().StringVar(&named, "key", "", "the key, NAME or NAME@N, instead of one of the hierarchy")
	a.completeFlag(c, "key")
	c.MarkFlagsOneRequired("app", "key")
	c.MarkFlagsMutuallyExclusive("app", "key")
	inFlag(c, &in, "the token")
	out.register(c)
	return c
}
