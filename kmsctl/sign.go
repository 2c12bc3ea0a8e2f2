package main

import (
	"bytes"
	"context"
	_ "crypto/sha256" // for crypto.Hash.New
	_ "crypto/sha512"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/kmsd-project/kmsd/client"
	"github.com/kmsd-project/kmsd/client/jose"
	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// signFlags are common to sign and verify.
type signFlags struct{ key, scheme, encoding, alg, in string }

func (f *signFlags) register(a *app, c *cobra.Command) {
	a.keyFlag(c, &f.key, "the key, NAME or NAME@N")
	c.Flags().StringVar(&f.scheme, "scheme", "", "how, such as rsa-pss-sha256 or rsa-pkcs1-sha256 (default: by the algorithm)")
	c.Flags().StringVar(&f.encoding, "encoding", "", "ECDSA signatures as der (default) or p1363")
	c.Flags().StringVar(&f.alg, "alg", "", "scheme and encoding by the name that JOSE and MOSIP have for both: RS256, PS256, ES256, ES256K, EdDSA...")
	c.RegisterFlagCompletionFunc("alg", cobra.FixedCompletions(tokenAlgorithms, cobra.ShellCompDirectiveNoFileComp))
	c.MarkFlagsMutuallyExclusive("alg", "scheme")
	c.MarkFlagsMutuallyExclusive("alg", "encoding")
	inFlag(c, &f.in, "data")
	c.RegisterFlagCompletionFunc("scheme", cobra.FixedCompletions(texts(keyspec.Schemes()), cobra.ShellCompDirectiveNoFileComp))
	c.RegisterFlagCompletionFunc("encoding", cobra.FixedCompletions([]string{"der", "p1363"}, cobra.ShellCompDirectiveNoFileComp))
}

// check also turns --alg into scheme and encoding.
func (f *signFlags) check() error {
	if f.alg != "" {
		scheme := client.SchemeOf(jose.Algorithm(f.alg))
		if scheme == "" {
			return withHint(usagef("--alg %q is not known", f.alg), "one of: %s", strings.Join(tokenAlgorithms, " "))
		}
		f.scheme = string(scheme)
		if strings.HasPrefix(f.scheme, "ecdsa-") {
			f.encoding = "p1363"
		}
	}
	if f.scheme != "" {
		if _, err := keyspec.ParseScheme(f.scheme); err != nil {
			return withHint(asUsage(err), "--scheme is one of: %s", strings.Join(texts(keyspec.Schemes()), " "))
		}
	}
	switch f.encoding {
	case "", "der", "p1363":
		return nil
	}
	return usagef("--encoding is der or p1363, not %q", f.encoding)
}

// signInput is what is signed: the data when they fit into one request, else their digest, made here.
type signInput struct {
	scheme string
	data   []byte
	digest []byte
}

// signInput reads the input. Large data are hashed here, so that they need not cross the socket; a scheme that takes the
// message itself (Ed25519) has a limit therefore.
func (a *app) signInput(ctx context.Context, f *signFlags) (*signInput, error) {
	if err := f.check(); err != nil {
		return nil, err
	}
	r, total, err := a.open(f.in)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	head, err := io.ReadAll(io.LimitReader(r, proto.MaxData+1))
	if err != nil {
		return nil, err
	}
	if len(head) <= proto.MaxData {
		return &signInput{scheme: f.scheme, data: head}, nil
	}
	scheme := f.scheme
	if scheme == "" {
		if scheme, err = a.defaultScheme(ctx, f.key); err != nil {
			return nil, err
		}
	}
	hash := keyspec.Scheme(scheme).Hash()
	if hash == 0 {
		rest, err := io.ReadAll(io.LimitReader(r, int64(proto.MaxMessage-len(head)+1)))
		if err != nil {
			return nil, err
		}
		if head = append(head, rest...); len(head) > proto.MaxMessage {
			return nil, withHint(fmt.Errorf("%s signs the message itself, and that is at most %d bytes", scheme, proto.MaxMessage),
				"sign a digest of the data (sha256sum), or use an ECDSA or RSA key")
		}
		return &signInput{scheme: scheme, data: head}, nil
	}
	p := a.progressOf("hashing", total)
	defer p.end()
	h := hash.New()
	if _, err := io.Copy(h, p.reader(&contextReader{ctx, io.MultiReader(bytes.NewReader(head), r)})); err != nil {
		return nil, err
	}
	return &signInput{scheme: scheme, digest: h.Sum(nil)}, nil
}

// defaultScheme is the scheme the daemon takes when none is named.
func (a *app) defaultScheme(ctx context.Context, key string) (string, error) {
	var k proto.KeyInfo
	if err := a.call(ctx, proto.OpKeyGet, &proto.KeyRef{Key: key}, &k); err != nil {
		return "", err
	}
	if s := keyspec.Algorithm(k.Algorithm).SignatureScheme(); s != "" {
		return string(s), nil
	}
	return "", withHint(fmt.Errorf("%s is a key of algorithm %s, which does not sign", key, k.Algorithm), "kmsctl capabilities")
}

// contextReader ends with the error of a context, so that Ctrl-C ends the reading of a large file.
type contextReader struct {
	ctx context.Context
	io.Reader
}

func (r *contextReader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, errors.New("interrupted")
	}
	return r.Reader.Read(p)
}

func newSign(a *app) *cobra.Command {
	var f signFlags
	var out textFlags
	c := uses(&cobra.Command{
		Use:     "sign --key NAME --in F --out F [flags]",
		Short:   "Sign data",
		Long:    "Sign data. Large data are hashed here and only the digest goes to the daemon; Ed25519 signs the message itself, which may be up to 1 MiB long.",
		Example: "  kmsctl sign --key REGISTRATION/10001_110011 --in packet.zip --out packet.sig\n  kmsctl sign --key KERNEL/EC_SECP256R1_SIGN --alg ES256 --as multibase --in data",
		Args:    exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			in, err := a.signInput(c.Context(), &f)
			if err != nil {
				return err
			}
			var r proto.SignReply
			params := proto.Sign{Key: f.key, Scheme: in.scheme, Encoding: f.encoding, Data: in.data, Digest: in.digest}
			if err := a.call(c.Context(), proto.OpSign, &params, &r); err != nil {
				return err
			}
			return a.writeText(out, "signature", map[string]any{"key": f.key, "version": r.Version}, r.Signature, modePublic)
		},
	}, proto.OpSign)
	f.register(a, c)
	out.register(c)
	return c
}

// maxSignature is the longest signature file in bytes.
const maxSignature = 4096

func newVerify(a *app) *cobra.Command {
	var f signFlags
	var sig, as string
	c := uses(&cobra.Command{
		Use:   "verify --key NAME --in F --sig F [flags]",
		Short: "Check a signature",
		Long:  "Check a signature against any version of the key that may still verify, or against the one version of NAME@N. A wrong signature is exit code 1.",
		Args:  exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			signature, err := a.readFile(sig, maxSignature)
			if err != nil {
				return err
			}
			if signature, err = decodeText(as, signature); err != nil {
				return err
			}
			in, err := a.signInput(c.Context(), &f)
			if err != nil {
				return err
			}
			var r proto.VerifyReply
			params := proto.Verify{Key: f.key, Scheme: in.scheme, Encoding: f.encoding, Data: in.data, Digest: in.digest, Signature: signature}
			if err := a.call(c.Context(), proto.OpVerify, &params, &r); err != nil {
				return err
			}
			return a.printVerified(&r)
		},
	}, proto.OpVerify)
	f.register(a, c)
	c.Flags().StringVar(&sig, "sig", "", "file with the signature, as sign wrote it")
	c.MarkFlagRequired("sig")
	c.Flags().StringVar(&as, "sig-as", "raw", "form of the signature: "+textForms)
	c.RegisterFlagCompletionFunc("sig-as", cobra.FixedCompletions(strings.Split(textForms, ", "), cobra.ShellCompDirectiveNoFileComp))
	return c
}
