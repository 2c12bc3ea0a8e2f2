package main

import (
	"context"
	"crypto"
	"errors"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/kmsd-project/kmsd/client"
	"github.com/kmsd-project/kmsd/client/cms"
	"github.com/kmsd-project/kmsd/ipc/proto"
)

func newCMS(a *app) *cobra.Command {
	c := &cobra.Command{Use: "cms", Short: "Sign and verify files with detached CMS signatures"}
	c.AddCommand(newCMSSign(a), newCMSVerify(a))
	return c
}

// cmsHashes are the hashes of CMS signatures.
var cmsHashes = map[string]crypto.Hash{"": 0, "sha256": crypto.SHA256, "sha384": crypto.SHA384, "sha512": crypto.SHA512}

func newCMSSign(a *app) *cobra.Command {
	var key, in, hash string
	var pss, now bool
	var out outFlags
	c := uses(&cobra.Command{
		Use:   "sign --key NAME --in F --out F [flags]",
		Short: "Sign a file",
		Long: `Sign a file of any size: a detached CMS signature (RFC 5652, PKCS#7, .p7s) in DER, with the chain of the key's certificate, which is named
in what is signed (CAdES). It is also what goes into a signed PDF document: of the bytes that its ByteRange names, in order.

The file is hashed here; the key signs the digest.`,
		Example: "  kmsctl cms sign --key DIGITAL_CARD --in card.pdf --out card.p7s\n  openssl cms -verify -binary -inform DER -in card.p7s -content card.pdf -CAfile root.pem -purpose any -out /dev/null",
		Args:    exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			o := cms.Options{PSS: pss}
			var known bool
			if o.Hash, known = cmsHashes[hash]; !known {
				return usagef("--hash is sha256, sha384 or sha512, not %q", hash)
			}
			if now {
				o.Time = time.Now()
			}
			r, total, err := a.open(in)
			if err != nil {
				return err
			}
			defer r.Close()
			p := a.progressOf("hashing", total)
			defer p.end()
			var signature []byte
			err = a.with(c.Context(), func(ctx context.Context, cl *client.Client) (err error) {
				signature, err = cl.SignCMS(ctx, key, p.reader(&contextReader{ctx, r}), o)
				return err
			})
			if err != nil {
				return cmsHint(err)
			}
			return a.writeResult(out, "signature", map[string]any{"key": key}, signature, true, modePublic)
		},
	}, proto.OpSign, proto.OpCertGet)
	a.keyFlag(c, &key, "the key, NAME or NAME@N")
	inFlag(c, &in, "what is signed")
	flags := c.Flags()
	flags.BoolVar(&pss, "pss", false, "with an RSA key: RSASSA-PSS, which not every reader knows, instead of PKCS #1 v1.5")
	flags.StringVar(&hash, "hash", "", "sha256, sha384 or sha512 (default: by the key)")
	c.RegisterFlagCompletionFunc("hash", cobra.FixedCompletions([]string{"sha256", "sha384", "sha512"}, cobra.ShellCompDirectiveNoFileComp))
	flags.BoolVar(&now, "signing-time", false, "with the time of signing; signatures in PDF documents have it elsewhere")
	out.register(c)
	return c
}

func cmsHint(err error) error {
	if errors.Is(err, client.ErrNoCertificate) {
		return withHint(err, "a CMS signature names its signer's certificate: kmsctl cert get, cert self-sign, cert issue or cert attach")
	}
	return err
}

func newCMSVerify(a *app) *cobra.Command {
	var f verifyFlags
	var in, sig string
	c := uses(&cobra.Command{
		Use:   "verify [--key NAME | --cert F] [--domain D] --in F --sig F [flags]",
		Short: "Verify a signature of a file",
		Long: `Verify a detached CMS signature (PKCS#7, .p7s; DER or BER) by one signer: the signature, the dates of the signer's certificate, and that somebody
vouches for the signer. There is one verdict; a signature that is not valid is exit code 1.

The signer's certificate has to be in the signature. It is believed if it is the one of --cert or --key; with --domain, if it leads to the trust
anchors of that domain; and without any of these if it is of a key in this keystore. --any-signer believes everybody.`,
		Example: "  kmsctl cms verify --in card.pdf --sig card.p7s\n  kmsctl cms verify --domain AUTH --in statement --sig statement.p7s",
		Args:    exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			signature, err := a.readFile(sig, cms.MaxSignature)
			if err != nil {
				return err
			}
			r, total, err := a.open(in)
			if err != nil {
				return err
			}
			defer r.Close()
			p := a.progressOf("hashing", total)
			defer p.end()
			return a.verifyToken(c.Context(), &f, nil, func(ctx context.Context, cl *client.Client, o client.VerifyToken) (*client.Verdict, error) {
				v, err := cl.VerifyCMS(ctx, signature, p.reader(&contextReader{ctx, r}), o)
				if errors.Is(err, cms.ErrFormat) && strings.HasPrefix(string(signature), "-----BEGIN") {
					err = withHint(err, "openssl cms -cmsout -inform PEM -outform DER -in %s", sig)
				}
				return v, err
			})
		},
	}, proto.OpKeyFind, proto.OpPublic)
	f.register(a, c)
	inFlag(c, &in, "what was signed")
	c.Flags().StringVar(&sig, "sig", "", "file with the signature")
	c.MarkFlagRequired("sig")
	return c
}
