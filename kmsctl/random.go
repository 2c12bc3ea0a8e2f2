package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/kmsd-project/kmsd/client"
	"github.com/kmsd-project/kmsd/ipc/proto"
)

func newRandom(a *app) *cobra.Command {
	var n uint32
	var out textFlags
	c := uses(&cobra.Command{
		Use:   "random --bytes N [flags]",
		Short: "Write random bytes of the daemon",
		Args:  exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			if n == 0 || n > client.MaxRandom {
				return usagef("--bytes is 1 to %d", client.MaxRandom)
			}
			data := make([]byte, 0, n)
			for len(data) < int(n) {
				var r proto.RandomReply
				if err := a.call(c.Context(), proto.OpRandom, &proto.Random{Bytes: min(n-uint32(len(data)), proto.MaxData)}, &r); err != nil {
					return err
				}
				data = append(data, r.Data...)
			}
			return a.writeText(out, "data", nil, data, modeSecret)
		},
	}, proto.OpRandom)
	c.Flags().Uint32Var(&n, "bytes", 0, "how many, up to 1 MiB")
	c.MarkFlagRequired("bytes")
	out.register(c)
	return c
}

func newDataKey(a *app) *cobra.Command {
	var key, aadFile, sealedOut, sealedIn string
	var n uint32
	var noPlaintext bool
	var out textFlags
	c := uses(&cobra.Command{
		Use:   "datakey --key NAME {--sealed-out F | --sealed-in F} [flags]",
		Short: "Make a data key, plain and sealed under a key, or open one",
		Long: `Make a fresh data key. Its sealed form goes to --sealed-out and can be kept with the data; its plain form is the result,
unless --no-plaintext is given. With --sealed-in the sealed form is opened again, and the plain one is the result.`,
		Args: exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			aad, err := a.optionalFile(aadFile, proto.MaxData)
			if err != nil {
				return err
			}
			if sealedIn != "" {
				sealed, err := a.readFile(sealedIn, 1024)
				if err != nil {
					return err
				}
				var r proto.DecryptReply
				if err := a.call(c.Context(), proto.OpDecrypt, &proto.Decrypt{Key: key, Ciphertext: sealed, AAD: aad}, &r); err != nil {
					return err
				}
				defer clear(r.Data)
				return a.writeDataKey(out, r.Data, r.Version)
			}
			params := proto.DataKey{Key: key, Bytes: n, AAD: aad, NoPlaintext: noPlaintext}
			var r proto.DataKeyReply
			if err := a.call(c.Context(), proto.OpDataKey, &params, &r); err != nil {
				return err
			}
			defer clear(r.Plaintext)
			sealed, err := a.create(outFlags{path: sealedOut, force: out.force}, true, modePublic)
			if err != nil {
				return err
			}
			defer sealed.abort()
			if _, err := sealed.Write(r.Ciphertext); err != nil {
				return err
			}
			if err := sealed.commit(); err != nil {
				return err
			}
			if noPlaintext {
				return a.print(map[string]any{"version": r.Version}, func(io.Writer) { a.say("%s written", sealedOut) })
			}
			if err := a.writeDataKey(out, r.Plaintext, r.Version); err != nil {
				return fmt.Errorf("%w (%s was written and is of no use alone)", err, sealedOut)
			}
			return nil
		},
	}, proto.OpDataKey, proto.OpDecrypt)
	a.keyFlag(c, &key, "the AEAD key that seals")
	c.Flags().StringVar(&sealedOut, "sealed-out", "", "file for the sealed form")
	c.Flags().StringVar(&sealedIn, "sealed-in", "", "file with a sealed form to open")
	c.MarkFlagsOneRequired("sealed-out", "sealed-in")
	c.MarkFlagsMutuallyExclusive("sealed-out", "sealed-in")
	c.Flags().Uint32Var(&n, "bytes", 32, "length: 16, 32 or 64")
	c.Flags().StringVar(&aadFile, "aad-file", "", "file with data the sealed form is bound to")
	c.Flags().BoolVar(&noPlaintext, "no-plaintext", false, "only the sealed form")
	out.register(c)
	return c
}

func (a *app) writeDataKey(out textFlags, key []byte, version uint32) error {
	return a.writeText(out, "plaintext", map[string]any{"version": version}, key, modeSecret)
}
