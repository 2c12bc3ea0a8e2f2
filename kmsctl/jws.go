package main

import (
	"context"
	"errors"

	"github.com/spf13/cobra"

	"github.com/kmsd-project/kmsd/client"
	"github.com/kmsd-project/kmsd/client/jose"
	"github.com/kmsd-project/kmsd/ipc/proto"
)

func newJWS(a *app) *cobra.Command {
	c := &cobra.Command{Use: "jws", Short: "Sign and verify JSON Web Signatures"}
	c.AddCommand(newJWSSign(a), newJWSVerify(a))
	return c
}

func newJWSSign(a *app) *cobra.Command {
	var f signTokenFlags
	var b64, mosip, json bool
	var typ, in string
	var header []string
	var out outFlags
	c := uses(&cobra.Command{
		Use:   "sign --key NAME --in F --out F [flags]",
		Short: "Sign a payload",
		Long: `Sign a payload: JSON Web Signature (RFC 7515) in the compact serialization, with the payload, the certificate of the key (x5c) and, for a
key of MOSIP's hierarchy, its key id. So --detached is MOSIP's jwtSign without payload, --chain what its version 2 calls
includeCertificateChain, --x5t includeCertHash, --x5u certificateUrl and --header one of additionalHeaders, of which a kid goes
before the key id with a "#".

--b64=false signs the payload as it is (RFC 7797): detached, or printable and without dots. MOSIP's jwsSign writes the payload in base64url all
the same, whatever it is: that is --b64=false --mosip.`,
		Example: `  kmsctl jws sign --key KERNEL/SIGN --in payload.json --out token
  kmsctl jws sign --key KERNEL/SIGN --detached --alg PS256 --x5t --in payload.json
  kmsctl jws sign --key KERNEL/EC_SECP256K1_SIGN --no-x5c --kid my-key --header 'typ=JWT' --in payload.json`,
		Args: exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			options, err := f.options()
			if err != nil {
				return err
			}
			if options.Extra, err = headerFlag(header); err != nil {
				return err
			}
			if err := ownMembers(&options, typ); err != nil {
				return err
			}
			options.Unencoded, options.EncodedAnyway = !b64, mosip
			if mosip && b64 {
				return usagef("--mosip goes with --b64=false")
			}
			payload, err := a.readFile(in, jose.MaxPayload)
			if err != nil {
				return err
			}
			if json {
				if err := jose.CheckJSON(payload); err != nil {
					return err
				}
			}
			return a.signToken(c.Context(), f.key, out, func(ctx context.Context, cl *client.Client) ([]byte, error) {
				token, err := cl.SignJWS(ctx, f.key, payload, options)
				if errors.Is(err, jose.ErrFormat) && !b64 {
					err = withHint(err, "add --detached, or --mosip for MOSIP's form of it")
				}
				return []byte(token + "\n"), err
			})
		},
	}, signOps...)
	f.register(a, c, true)
	flags := c.Flags()
	flags.BoolVar(&b64, "b64", true, "sign the base64url of the payload; =false: the payload itself")
	flags.BoolVar(&mosip, "mosip", false, "with --b64=false: write the payload in base64url all the same, as MOSIP does")
	flags.StringVar(&typ, "typ", "", "type of the token, such as JWT")
	flags.StringArrayVar(&header, "header", nil, "further member of the header, NAME=VALUE, where VALUE is JSON or a text; repeat for more")
	flags.BoolVar(&json, "check-json", false, "refuse a payload that is not one JSON object, or has a member twice, as MOSIP can be told to")
	inFlag(c, &in, "the payload")
	out.register(c)
	return c
}

// ownMembers moves members that were given by --header and have an option of their own there.
func ownMembers(o *client.SignToken, typ string) error {
	o.Type = typ
	for name, to := range map[string]*string{"typ": &o.Type, "kid": &o.KeyIDPrefix} {
		value, ok := o.Extra[name]
		if !ok {
			continue
		}
		text, isText := value.(string)
		if !isText || *to != "" {
			return usagef("--header %s is one text, and given once", name)
		}
		if name == "kid" {
			text += "#"
		}
		*to = text
		delete(o.Extra, name)
	}
	return nil
}

func newJWSVerify(a *app) *cobra.Command {
	var f verifyFlags
	var in, detached string
	var out outFlags
	c := uses(&cobra.Command{
		Use:   "verify [--key NAME | --cert F] [--domain D] --in F [flags]",
		Short: "Verify a token",
		Long: `Verify a token: its signature, the dates of the signer's certificate, and that somebody vouches for the signer. There is one verdict; a
token that is not valid is exit code 1.

The signer is the certificate in the token (x5c), else --cert, else --key. A certificate in the token is believed if it is the one of --cert or
--key; with --domain, if it leads to the trust anchors of that domain; and without any of these if it is of a key in this keystore.
--any-signer believes everybody.

--detached F is the payload of a token without one. Tokens with "b64":false are verified in the form of RFC 7797 and in MOSIP's.`,
		Example: `  kmsctl jws verify --in token --out payload.json
  kmsctl jws verify --domain AUTH --in token
  kmsctl jws verify --cert signer.pem --detached payload.json --in token`,
		Args: exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			token, err := a.readToken(in)
			if err != nil {
				return err
			}
			payload, err := a.optionalFile(detached, jose.MaxPayload)
			if err != nil {
				return err
			}
			if detached != "" && payload == nil {
				payload = []byte{}
			}
			return a.verifyToken(c.Context(), &f, &out, func(ctx context.Context, cl *client.Client, o client.VerifyToken) (*client.Verdict, error) {
				o.Detached = payload
				v, err := cl.VerifyJWS(ctx, token, o)
				if errors.Is(err, jose.ErrFormat) && payload == nil {
					err = withHint(err, "is it a token in the compact serialization? the payload of one without it is given by --detached F")
				}
				return v, err
			})
		},
	}, proto.OpKeyFind, proto.OpPublic)
	f.register(a, c)
	c.Flags().StringVar(&detached, "detached", "", "the payload of a token without one")
	inFlag(c, &in, "the token")
	payloadFlag(c, &out, "file for the payload")
	return c
}
