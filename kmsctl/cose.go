package main

import (
	"context"
	"encoding/hex"
	"time"

	"github.com/spf13/cobra"

	"github.com/kmsd-project/kmsd/client"
	"github.com/kmsd-project/kmsd/client/cose"
	"github.com/kmsd-project/kmsd/ipc/proto"
)

func newCOSE(a *app) *cobra.Command {
	c := &cobra.Command{Use: "cose", Short: "Sign and verify COSE_Sign1 messages"}
	c.AddCommand(newCOSESign(a), newCOSEVerify(a))
	return c
}

func newCWT(a *app) *cobra.Command {
	c := &cobra.Command{Use: "cwt", Short: "Sign and verify CBOR Web Tokens"}
	c.AddCommand(newCWTSign(a), newCWTVerify(a))
	return c
}

// messageFlags are common to what writes COSE messages: as bytes or in the hexadecimal of MOSIP.
type messageFlags struct {
	signTokenFlags
	rfc9360, raw bool
	in           string
	out          outFlags
}

func (f *messageFlags) register(a *app, c *cobra.Command, payload bool) {
	f.signTokenFlags.register(a, c, payload)
	c.Flags().BoolVar(&f.rfc9360, "rfc9360", false, "write the hash and the URL of the certificate as RFC 9360 has them, not as MOSIP does; both are read")
	c.Flags().BoolVar(&f.raw, "raw", false, "write bytes instead of hexadecimal")
	f.out.register(c)
}

func (f *messageFlags) sign(ctx context.Context, a *app, sign func(context.Context, *client.Client, client.SignToken) ([]byte, error)) error {
	options, err := f.options()
	if err != nil {
		return err
	}
	options.RFC9360 = f.rfc9360
	var message []byte
	err = a.with(ctx, func(ctx context.Context, c *client.Client) (err error) {
		message, err = sign(ctx, c, options)
		return err
	})
	if err != nil {
		return noCertificateHint(err)
	}
	if !f.raw {
		message = []byte(cose.EncodeHex(message) + "\n")
	}
	return a.writeResult(f.out, "message", map[string]any{"key": f.key}, message, f.raw, modePublic)
}

// readMessage reads a message in hexadecimal, or as bytes.
func (a *app) readMessage(path string, raw bool) ([]byte, error) {
	if raw {
		return a.readFile(path, cose.MaxPayload+1<<20)
	}
	text, err := a.readToken(path)
	if err != nil {
		return nil, err
	}
	message, err := cose.DecodeHex(text)
	return message, withHint(err, "with --raw the message is read as bytes")
}

func newCOSESign(a *app) *cobra.Command {
	var f messageFlags
	c := uses(&cobra.Command{
		Use:   "sign --key NAME --in F --out F [flags]",
		Short: "Sign a payload",
		Long: `Sign a payload as MOSIP's coseSign1 does: a tagged COSE_Sign1 message (RFC 9052), in hexadecimal, with algorithm, certificate and, for a key
of MOSIP's hierarchy, its key id in the protected header.`,
		Example: "  kmsctl cose sign --key KERNEL/ED25519_SIGN --in payload --out message",
		Args:    exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			payload, err := a.readFile(f.in, cose.MaxPayload)
			if err != nil {
				return err
			}
			return f.sign(c.Context(), a, func(ctx context.Context, cl *client.Client, o client.SignToken) ([]byte, error) {
				return cl.SignCOSE(ctx, f.key, payload, o)
			})
		},
	}, signOps...)
	f.register(a, c, true)
	inFlag(c, &f.in, "the payload")
	return c
}

func newCOSEVerify(a *app) *cobra.Command {
	var f verifyFlags
	var in, detached string
	var raw bool
	var out outFlags
	c := uses(&cobra.Command{
		Use:   "verify [--key NAME | --cert F] [--domain D] --in F [flags]",
		Short: "Verify a message",
		Long: `Verify a COSE_Sign1 message: its signature, the dates of the signer's certificate, and that somebody vouches for the signer, as "kmsctl jws
verify" does it. A message that is not valid is exit code 1.`,
		Example: "  kmsctl cose verify --cert signer.pem --in message --out payload",
		Args:    exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			message, err := a.readMessage(in, raw)
			if err != nil {
				return err
			}
			payload, err := a.optionalFile(detached, cose.MaxPayload)
			if err != nil {
				return err
			}
			if detached != "" && payload == nil {
				payload = []byte{}
			}
			return a.verifyToken(c.Context(), &f, &out, func(ctx context.Context, cl *client.Client, o client.VerifyToken) (*client.Verdict, error) {
				o.Detached = payload
				return cl.VerifyCOSE(ctx, message, o)
			})
		},
	}, proto.OpKeyFind, proto.OpPublic)
	f.register(a, c)
	c.Flags().StringVar(&detached, "detached", "", "the payload of a message without one")
	c.Flags().BoolVar(&raw, "raw", false, "read bytes instead of hexadecimal")
	inFlag(c, &in, "the message")
	payloadFlag(c, &out, "file for the payload")
	return c
}

func newCWTSign(a *app) *cobra.Command {
	var f messageFlags
	var issuer, subject, id, identity, expires, notBefore string
	var audience []string
	c := uses(&cobra.Command{
		Use:   "sign --key NAME --in F --out F [flags]",
		Short: "Sign claims",
		Long: `Sign claims as MOSIP's cwtSign does: a CBOR Web Token (RFC 8392), in hexadecimal. The claims come from a JSON object and from flags, which
go before it. Without --not-before and --expires the token is valid from now for 180 days, unless the JSON says otherwise.`,
		Example: `  kmsctl cwt sign --key KERNEL/SIGN --iss https://example.org --sub 1234 --expires 30d --in claims.json --out token`,
		Args:    exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			text, err := a.readFile(f.in, cose.MaxClaims)
			if err != nil {
				return err
			}
			claims, err := cose.ClaimsFromJSON(text)
			if err != nil {
				return err
			}
			for to, value := range map[*string]string{&claims.Issuer: issuer, &claims.Subject: subject} {
				if value != "" {
					*to = value
				}
			}
			if len(audience) > 0 {
				claims.Audience = audience
			}
			if id != "" {
				claims.ID = []byte(id)
			}
			if identity != "" {
				if claims.Identity, err = hex.DecodeString(identity); err != nil {
					return usagef("--claim169 is hexadecimal")
				}
				if _, twice := claims.Extra[int64(169)]; twice {
					return usagef("claim 169 is in the JSON, too")
				}
			}
			if err := setTimes(claims, notBefore, expires, time.Now()); err != nil {
				return err
			}
			return f.sign(c.Context(), a, func(ctx context.Context, cl *client.Client, o client.SignToken) ([]byte, error) {
				return cl.SignCWT(ctx, f.key, claims, o)
			})
		},
	}, signOps...)
	f.register(a, c, false)
	flags := c.Flags()
	flags.StringVar(&issuer, "iss", "", "issuer")
	flags.StringVar(&subject, "sub", "", "subject")
	flags.StringArrayVar(&audience, "aud", nil, "audience; repeat for more")
	flags.StringVar(&id, "cti", "", "id of the token")
	flags.StringVar(&identity, "claim169", "", "identity data (claim 169) in hexadecimal")
	flags.StringVar(&notBefore, "not-before", "", "first moment of validity (default now)")
	flags.StringVar(&expires, "expires", "", `end of validity: RFC 3339, YYYY-MM-DD, a span such as 2y, or "none" (default 180d)`)
	inFlag(c, &f.in, "the claims, a JSON object")
	return c
}

// tokenDays is how long MOSIP's tokens are valid.
const tokenDays = 180

// setTimes fills in the times of claims: those of the flags, else those that are there, else MOSIP's.
func setTimes(c *cose.Claims, notBefore, expires string, now time.Time) error {
	from, err := parseMoment(notBefore)
	if err != nil {
		return err
	}
	switch {
	case !from.IsZero():
		c.NotBefore = from
	case c.NotBefore.IsZero():
		c.NotBefore = now
	}
	if c.IssuedAt.IsZero() {
		c.IssuedAt = now
	}
	seconds, err := parseTime(expires, now)
	switch {
	case err != nil:
		return err
	case seconds == proto.NoExpiry:
		c.Expires = time.Time{}
	case seconds > 0:
		c.Expires = time.Unix(seconds, 0)
	case c.Expires.IsZero():
		c.Expires = c.NotBefore.AddDate(0, 0, tokenDays)
	}
	if !c.Expires.IsZero() && !c.Expires.After(c.NotBefore) {
		return usagef("the token would expire before it is valid")
	}
	return nil
}

func newCWTVerify(a *app) *cobra.Command {
	var f verifyFlags
	var in string
	var raw bool
	var out outFlags
	var expect cose.Expect
	c := uses(&cobra.Command{
		Use:   "verify [--key NAME | --cert F] [--domain D] --in F [flags]",
		Short: "Verify a token",
		Long: `Verify a CBOR Web Token: its signature, its dates, the issuer, subject and audience that are asked for, the dates of the signer's certificate,
and that somebody vouches for the signer, as "kmsctl jws verify" does it. A token that is not valid is exit code 1. --json shows the claims.`,
		Example: "  kmsctl --json cwt verify --domain AUTH --iss https://example.org --in token",
		Args:    exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			if expect.Leeway < 0 {
				return usagef("--leeway is not negative")
			}
			token, err := a.readMessage(in, raw)
			if err != nil {
				return err
			}
			return a.verifyToken(c.Context(), &f, &out, func(ctx context.Context, cl *client.Client, o client.VerifyToken) (*client.Verdict, error) {
				return cl.VerifyCWT(ctx, token, expect, o)
			})
		},
	}, proto.OpKeyFind, proto.OpPublic)
	f.register(a, c)
	flags := c.Flags()
	flags.StringVar(&expect.Issuer, "iss", "", "issuer that it has to have")
	flags.StringVar(&expect.Subject, "sub", "", "subject that it has to have")
	flags.StringVar(&expect.Audience, "aud", "", "audience that it has to have")
	flags.DurationVar(&expect.Leeway, "leeway", 0, "by which clocks may differ, such as 1m")
	flags.BoolVar(&expect.NoExpiry, "no-expiry", false, "take a token that never expires")
	flags.BoolVar(&raw, "raw", false, "read bytes instead of hexadecimal")
	inFlag(c, &in, "the token")
	payloadFlag(c, &out, "file for the claims as JSON")
	return c
}
