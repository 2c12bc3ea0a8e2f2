package main

import (
	"crypto/x509"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/kmsd-project/kmsd/client/packet"
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
The packet is encrypted in memory before anything is written. The machine that encrypts need not be able to decrypt.`,
		Args: exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			var certificate *x509.Certificate
			var err error
			if key != "" {
				chain, chainErr := a.chain(c.Context(), key)
				if chainErr != nil {
					return chainErr
				}
				certificate, err = packet.ParseCertificate(chain[0])
			} else {
				encoded, readErr := a.readFile(cert, proto.MaxData)
				if readErr != nil {
					return readErr
				}
				list, decodeErr := decodeAll(encoded, "CERTIFICATE")
				if decodeErr != nil {
					return fmt.Errorf("%s: %w", cert, decodeErr)
				}
				certificate, err = packet.ParseCertificate(list[0])
			}
			if err != nil {
				return err
			}
			r, total, err := a.open(in)
			if err != nil {
				return err
			}
			defer r.Close()
			p := a.progressOf("encrypting", total)
			defer p.end()
			sealed, err := packet.Encrypt(certificate, p.reader(&contextReader{c.Context(), r}), max(total, 0))
			if err != nil {
				return err
			}
			return a.writeResult(out, "packet", nil, sealed, true, modePublic)
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
		Long:  "Decrypt a registration packet. The daemon unwraps the key of the packet; nothing is written before the packet has been verified to its end.",
		Args:  exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			k, err := a.key(c.Context(), key)
			if err != nil {
				return err
			}
			sealed, err := a.readFile(in, packet.MaxSize)
			if err != nil {
				return err
			}
			p := a.waiting("decrypting")
			plain, err := packet.Decrypt(c.Context(), k, sealed)
			p.end()
			switch {
			case errors.Is(err, packet.ErrDecryption):
				return withHint(err, "another certificate, or the packet was changed")
			case errors.Is(err, packet.ErrFormat):
				return withHint(err, "is it a registration packet?")
			case err != nil:
				return err
			}
			defer clear(plain)
			return a.writeResult(out, "data", map[string]any{"key": key}, plain, true, modeSecret)
		},
	}, proto.OpDecrypt)
	a.keyFlag(c, &key, "the key that unwraps")
	inFlag(c, &in, "the packet")
	out.register(c)
	return c
}
