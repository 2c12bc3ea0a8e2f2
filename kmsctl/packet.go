package main

import (
	"context"
	"crypto/x509"
	"io"

	"github.com/spf13/cobra"

	"github.com/kmsd-project/kmsd/client/packet"
	"github.com/kmsd-project/kmsd/client/pkix"
	"github.com/kmsd-project/kmsd/ipc/proto"
)

func newPacket(a *app) *cobra.Command {
	c := &cobra.Command{Use: "packet", Short: "Encrypt and decrypt registration packets"}
	c.AddCommand(newPacketEncrypt(a), newPacketDecrypt(a))
	return c
}

func newPacketEncrypt(a *app) *cobra.Command {
	var key, cert, in string
	var out outFlags
	c := uses(&cobra.Command{
		Use:   "encrypt {--cert F | --key NAME} --in F --out F",
		Short: "Encrypt a registration packet to a certificate",
		Long: `Encrypt a registration packet in the format of MOSIP to the RSA certificate in a file, or to the one attached to a key.
Packets of any size are encrypted as they come, in little memory. The machine that encrypts need not be able to decrypt.`,
		Args: exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			var certificate *x509.Certificate
			var err error
			if key != "" {
				chain, chainErr := a.chain(c.Context(), key)
				if chainErr != nil {
					return chainErr
				}
				certificate, err = pkix.ParseCertificate(chain[0])
			} else {
				certificate, err = a.readCertificate(cert)
			}
			if err != nil {
				return err
			}
			return a.encryptTo(c.Context(), in, out, &rawFlags{raw: true}, "packet", nil, func(w io.Writer, r io.Reader) error {
				return packet.EncryptTo(w, certificate, r)
			})
		},
	}, proto.OpCertGet)
	c.Flags().StringVar(&cert, "cert", "", "certificate of the receiver, PEM or DER")
	c.Flags().StringVar(&key, "key", "", "key whose certificate is the receiver's")
	a.completeFlag(c, "key")
	c.MarkFlagsOneRequired("cert", "key")
	c.MarkFlagsMutuallyExclusive("cert", "key")
	inFlag(c, &in, "the packet")
	out.register(c)
	return c
}

func newPacketDecrypt(a *app) *cobra.Command {
	var key, in string
	var out outFlags
	c := uses(&cobra.Command{
		Use:   "decrypt --key NAME --in F --out F",
		Short: "Decrypt a registration packet",
		Long:  "Decrypt a registration packet of any size. The daemon unwraps the key of the packet, which is read twice: nothing is written before it has been verified to its end.",
		Args:  exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			k, err := a.key(c.Context(), key)
			if err != nil {
				return err
			}
			return a.decryptTo(c.Context(), in, out, &rawFlags{raw: true}, map[string]any{"key": key}, func(ctx context.Context, w io.Writer, f *sealedFile) error {
				return packet.DecryptTo(ctx, k, w, f, f.size)
			})
		},
	}, proto.OpDecrypt)
	a.keyFlag(c, &key, "the key that unwraps")
	inFlag(c, &in, "the packet")
	out.register(c)
	return c
}
