package main

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/kmsd-project/kmsd/client"
	"github.com/kmsd-project/kmsd/client/jose"
	"github.com/kmsd-project/kmsd/client/packet"
	"github.com/kmsd-project/kmsd/client/pkix"
	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsctl/mosipdb"
)

func newMosip(a *app) *cobra.Command {
	c := &cobra.Command{Use: "mosip", Short: "Read and write the formats of MOSIP's key manager"}
	packets := &cobra.Command{Use: "packet", Short: "Encrypt and decrypt registration packets for a key of the hierarchy"}
	packets.AddCommand(newMosipEncrypt(a, true), newMosipDecrypt(a, true))
	c.AddCommand(newMosipEncrypt(a, false), newMosipDecrypt(a, false), packets, newMosipSign(a), newMosipVerify(a), newMosipImport(a), newMosipExport(a))
	return c
}

// hierarchyFlags name a key of the hierarchy as MOSIP's requests do.
type hierarchyFlags struct{ app, ref string }

func (f *hierarchyFlags) register(c *cobra.Command) {
	c.Flags().StringVar(&f.app, "app", "", "application id, such as REGISTRATION")
	c.Flags().StringVar(&f.ref, "ref", "", "reference id, such as 10001_110011")
}

func (f *hierarchyFlags) name() (string, error) {
	name := f.app
	if f.ref != "" {
		name += "/" + f.ref
	}
	if _, err := keyspec.ParseName(name); err == nil {
		return name, nil
	}
	imported, err := mosipdb.KeyName(f.app, f.ref) // a reference that a name cannot hold
	if err != nil {
		return "", asUsage(err)
	}
	return string(imported), nil
}

// payloadFlags say which kind of payload it is.
type payloadFlags struct{ aad, salt string }

func (f *payloadFlags) register(c *cobra.Command) {
	c.Flags().StringVar(&f.aad, "aad", "", "additional data in base64url; with neither these nor --salt it is a VER_R2 payload")
	c.Flags().StringVar(&f.salt, "salt", "", "nonce of the payload in base64url, which is then not in it; MOSIP's have 12 bytes")
}

func (f *payloadFlags) options() (o packet.Options, err error) {
	if o.AAD, err = decodeBase64("aad", f.aad); err != nil {
		return o, err
	}
	o.Salt, err = decodeBase64("salt", f.salt)
	return o, err
}

// readCertificate reads the first certificate of a file.
func (a *app) readCertificate(path string) (*x509.Certificate, error) {
	encoded, err := a.readFile(path, proto.MaxData)
	if err != nil {
		return nil, err
	}
	list, err := decodeAll(encoded, "CERTIFICATE")
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	c, err := pkix.ParseCertificate(list[0])
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return c, nil
}

func newMosipEncrypt(a *app, packets bool) *cobra.Command {
	var key hierarchyFlags
	var payload payloadFlags
	var cert, in string
	var raw rawFlags
	var out outFlags
	c := &cobra.Command{
		Use:   "encrypt {--app A --ref R | --cert F} --in F --out F [flags]",
		Short: "Encrypt data for a key of the hierarchy",
		Long: `Encrypt data as MOSIP's encrypt does: to the certificate that "kmsctl cert get A/R" gives, which makes or rotates the key if it is time,
or to the RSA certificate in a file, without the daemon. Data of any size are encrypted as they come, under a fresh key; what reads and
writes is base64url, as in MOSIP's requests, or with --raw the bytes themselves.`,
		Example: `  echo -n eyJhIjoxfQ | kmsctl mosip encrypt --app RESIDENT --ref mpartner-default-resident
  kmsctl mosip encrypt --cert partner.pem --raw --in file --out file.enc`,
		Args: exactArgs(),
	}
	if packets {
		c.Short = "Encrypt a registration packet for a key of the hierarchy"
		c.Long = `Encrypt a registration packet of any size as MOSIP's packet manager does: to the certificate that "kmsctl cert get A/R" gives, which
makes or rotates the key if it is time, or to the RSA certificate in a file, without the daemon.`
		c.Example = "  kmsctl mosip packet encrypt --app REGISTRATION --ref 10001_110011 --in packet.zip --out packet.enc"
		raw.raw = true
	}
	c.RunE = func(c *cobra.Command, args []string) error {
		options, err := payload.options()
		if err != nil {
			return err
		}
		certificate, name, err := a.receiver(c.Context(), &key, cert)
		if err != nil {
			return err
		}
		view := map[string]any{"thumbprint": packet.ThumbprintText(packet.Thumbprint(certificate))}
		if name != "" {
			view["key"] = name
		}
		return a.encryptTo(c.Context(), in, out, &raw, "data", view, func(w io.Writer, r io.Reader) error {
			if packets {
				return packet.EncryptTo(w, certificate, r)
			}
			return packet.EncryptPayloadTo(w, certificate, r, options)
		})
	}
	uses(c, proto.OpCertCurrent)
	key.register(c)
	c.Flags().StringVar(&cert, "cert", "", "certificate of the receiver, PEM or DER, instead of a key of the hierarchy")
	c.MarkFlagsOneRequired("app", "cert")
	c.MarkFlagsMutuallyExclusive("app", "cert")
	c.MarkFlagsMutuallyExclusive("ref", "cert")
	if !packets {
		payload.register(c)
		raw.register(c, "read and write the data")
	}
	inFlag(c, &in, "the data")
	out.register(c)
	return c
}

// receiver returns the certificate to encrypt to, and the key that it is of.
func (a *app) receiver(ctx context.Context, key *hierarchyFlags, file string) (*x509.Certificate, string, error) {
	if file != "" {
		certificate, err := a.readCertificate(file)
		return certificate, "", err
	}
	name, err := key.name()
	if err != nil {
		return nil, "", err
	}
	if key.ref == "" {
		return nil, "", withHint(usagef("a module key signs: nothing is encrypted to its certificate"), "name the base key with --ref")
	}
	k, err := a.current(ctx, name, client.Holder{}, false)
	if err != nil {
		return nil, "", err
	}
	if len(k.Chain) == 0 {
		return nil, "", fmt.Errorf("%s has no certificate", k.Ref)
	}
	return k.Chain[0], k.Ref, nil
}

// encryptTo writes what encrypt makes of an input.
func (a *app) encryptTo(ctx context.Context, in string, o outFlags, raw *rawFlags, name string, view map[string]any, encrypt func(io.Writer, io.Reader) error) error {
	r, total, err := a.open(in)
	if err != nil {
		return err
	}
	defer r.Close()
	out, err := a.createReported(o, name, view, raw.raw, modePublic)
	if err != nil {
		return err
	}
	defer out.abort()
	p := a.progressOf("encrypting", total)
	defer p.end()
	w := raw.writer(out)
	if err := encrypt(w, raw.reader(p.reader(&contextReader{ctx, r}))); err != nil {
		return base64Error(err)
	}
	if err := w.Close(); err != nil {
		return err
	}
	return out.commit()
}

func newMosipDecrypt(a *app, packets bool) *cobra.Command {
	var key hierarchyFlags
	var payload payloadFlags
	var in string
	var raw rawFlags
	var out outFlags
	c := &cobra.Command{
		Use:   "decrypt --app A [--ref R] --in F --out F [flags]",
		Short: "Decrypt data for a key of the hierarchy",
		Long: `Decrypt data as MOSIP's decrypt does. The key is found by the thumbprint in the data, and has to be A/R or the module key A; data of MOSIP
1.1.3, which have no thumbprint, are tried with every version of A/R, the oldest first, and then with the module key. Data of any size
are read twice, and nothing is written before they have been verified to their end.`,
		Example: "  kmsctl mosip decrypt --app RESIDENT --ref mpartner-default-resident --in data.txt --raw --out data",
		Args:    exactArgs(),
	}
	if packets {
		c.Short = "Decrypt a registration packet for a key of the hierarchy"
		c.Long = `Decrypt a registration packet of any size. The key is found by the thumbprint in the packet, and has to be A/R or the module key A. The
packet is read twice, and nothing is written before it has been verified to its end.`
		c.Example = "  kmsctl mosip packet decrypt --app REGISTRATION --ref 10001_110011 --in packet.enc --out packet.zip"
		raw.raw = true
	}
	c.RunE = func(c *cobra.Command, args []string) error {
		options, err := payload.options()
		if err != nil {
			return err
		}
		name, err := key.name()
		if err != nil {
			return err
		}
		cl, err := a.dial(c.Context())
		if err != nil {
			return err
		}
		recipient, err := cl.Recipient(name)
		if err != nil {
			return err
		}
		return a.decryptTo(c.Context(), in, out, &raw, map[string]any{"key": name}, func(ctx context.Context, w io.Writer, f *sealedFile) error {
			if packets {
				return packet.DecryptTo(ctx, recipient, w, f, f.size)
			}
			return packet.DecryptPayloadTo(ctx, recipient, w, f, f.size, options)
		})
	}
	uses(c, proto.OpKeyFind, proto.OpKeyGet, proto.OpCertGet, proto.OpDecrypt)
	key.register(c)
	c.MarkFlagRequired("app")
	if !packets {
		payload.register(c)
		raw.register(c, "read and write the data")
	}
	inFlag(c, &in, "the data")
	out.register(c)
	return c
}

// decryptTo writes what decrypt makes of an input that is read twice.
func (a *app) decryptTo(ctx context.Context, in string, o outFlags, raw *rawFlags, view map[string]any, decrypt func(context.Context, io.Writer, *sealedFile) error) error {
	sealed, err := a.openSealed(in, raw)
	if err != nil {
		return err
	}
	defer sealed.close()
	out, err := a.createReported(o, "data", view, raw.raw, modeSecret)
	if err != nil {
		return err
	}
	defer out.abort()
	p := a.progressOf("decrypting", 2*sealed.size)
	defer p.end()
	w := raw.writer(out)
	err = decrypt(ctx, w, &sealedFile{ReaderAt: p.readerAt(sealed), size: sealed.size})
	switch {
	case errors.Is(err, client.ErrOtherRecipient):
		return withHint(err, "name the key that it is for: MOSIP accepts any key of the application here, kmsd does not")
	case errors.Is(err, client.ErrNotAvailable):
		return withHint(err, "the key is not in this keystore, or you have no grant for it: kmsctl key find --certificate THUMBPRINT")
	case errors.Is(err, client.ErrDecryption): // in the same words, whichever part of the data it is that does not decrypt
		return withHint(packet.ErrDecryption, "another key, --aad or --salt, or the data were changed")
	case errors.Is(err, packet.ErrDecryption):
		return withHint(err, "another key, --aad or --salt, or the data were changed")
	case errors.Is(err, packet.ErrFormat):
		return withHint(err, "is that what MOSIP or kmsctl encrypted? with --raw it is read as bytes, without as base64url")
	case err != nil:
		return err
	}
	if err := w.Close(); err != nil {
		return err
	}
	return out.commit()
}

func newMosipSign(a *app) *cobra.Command {
	var key, in string
	var out outFlags
	c := uses(&cobra.Command{
		Use:   "sign [--key NAME] --in F --out F",
		Short: "Sign data as MOSIP's sign does",
		Long: `Sign data as MOSIP's sign does: a token without its payload, whose header is {"alg":"RS256"} and nothing else. MOSIP sends it as the HTTP
header response-signature.`,
		Example: "  kmsctl mosip sign --in response.json --out response.sig",
		Args:    exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			data, err := a.readFile(in, jose.MaxPayload)
			if err != nil {
				return err
			}
			return a.signToken(c.Context(), key, out, func(ctx context.Context, cl *client.Client) ([]byte, error) {
				token, err := cl.SignJWS(ctx, key, data, client.SignToken{Algorithm: jose.RS256, NoCertificate: true, NoKeyID: true, Detached: true})
				return []byte(token + "\n"), err
			})
		},
	}, proto.OpSign)
	c.Flags().StringVar(&key, "key", "KERNEL/SIGN", "the key, which is an RSA key")
	a.completeFlag(c, "key")
	inFlag(c, &in, "the data")
	out.register(c)
	return c
}

func newMosipVerify(a *app) *cobra.Command {
	var in, sig string
	var v verifyFlags
	c := uses(&cobra.Command{
		Use:     "verify [--key NAME | --cert F] --in F --sig F",
		Short:   "Check a signature that mosip sign made",
		Long:    "Check a signature of MOSIP's sign over data, with a key of this keystore or a certificate. What is wrong is exit code 1.",
		Example: "  kmsctl mosip verify --cert kernel-sign.pem --in response.json --sig response.sig",
		Args:    exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			if v.key == "" && v.cert == "" {
				v.key = "KERNEL/SIGN"
			}
			data, err := a.readFile(in, jose.MaxPayload)
			if err != nil {
				return err
			}
			token, err := a.readToken(sig)
			if err != nil {
				return err
			}
			return a.verifyToken(c.Context(), &v, nil, func(ctx context.Context, cl *client.Client, o client.VerifyToken) (*client.Verdict, error) {
				o.Detached = data
				return cl.VerifyJWS(ctx, token, o)
			})
		},
	}, proto.OpPublic)
	v.registerSigner(a, c)
	inFlag(c, &in, "the data")
	c.Flags().StringVar(&sig, "sig", "", "file with the signature")
	c.MarkFlagRequired("sig")
	return c
}
