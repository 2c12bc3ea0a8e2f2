package main

import (
	"github.com/spf13/cobra"

	"github.com/kmsd-project/kmsd/ipc/proto"
)

// maxContext is the longest salt or info file in bytes.
const maxContext = 1024

// contextFlags are the salt and info of HKDF (RFC 5869).
type contextFlags struct{ salt, info string }

func (f *contextFlags) register(c *cobra.Command) {
	c.Flags().StringVar(&f.salt, "salt-file", "", "file with the salt of HKDF")
	c.Flags().StringVar(&f.info, "info-file", "", "file with the info of HKDF, which says what the key is for")
}

func (f *contextFlags) read(a *app) (salt, info []byte, err error) {
	if salt, err = a.optionalFile(f.salt, maxContext); err != nil {
		return nil, nil, err
	}
	info, err = a.optionalFile(f.info, maxContext)
	return salt, info, err
}

func newAgree(a *app) *cobra.Command {
	var key, peer string
	var f newKeyFlags
	var hkdf contextFlags
	c := uses(&cobra.Command{
		Use:   "agree --key NAME --peer F --alg ALG NEW [flags]",
		Short: "Agree on a key with a peer and keep it as NEW",
		Long:  "Agree on a key with a peer (X25519 or ECDH) and keep HKDF-SHA256 of the secret as the key NEW. The secret itself never leaves the daemon.",
		Args:  exactArgs("NEW"),
		RunE: func(c *cobra.Command, args []string) error {
			encoded, err := a.readFile(peer, proto.MaxData)
			if err != nil {
				return err
			}
			spki, err := readPublic(encoded)
			if err != nil {
				return err
			}
			salt, info, err := hkdf.read(a)
			if err != nil {
				return err
			}
			params, err := f.params(args[0])
			if err != nil {
				return err
			}
			return a.keyCall(c.Context(), proto.OpAgree, &proto.Agree{Key: key, Peer: spki, Salt: salt, Info: info, New: params})
		},
	}, proto.OpAgree)
	a.keyFlag(c, &key, "the private key")
	c.Flags().StringVar(&peer, "peer", "", "public key or certificate of the peer, PEM or DER")
	c.MarkFlagRequired("peer")
	hkdf.register(c)
	f.register(c)
	return c
}

func newDerive(a *app) *cobra.Command {
	var key string
	var f newKeyFlags
	var hkdf contextFlags
	c := uses(&cobra.Command{
		Use:   "derive --key NAME --alg ALG NEW [flags]",
		Short: "Derive a key from an HKDF key and keep it as NEW",
		Args:  exactArgs("NEW"),
		RunE: func(c *cobra.Command, args []string) error {
			salt, info, err := hkdf.read(a)
			if err != nil {
				return err
			}
			params, err := f.params(args[0])
			if err != nil {
				return err
			}
			return a.keyCall(c.Context(), proto.OpDerive, &proto.Derive{Key: key, Salt: salt, Info: info, New: params})
		},
	}, proto.OpDerive)
	a.keyFlag(c, &key, "the HKDF key")
	hkdf.register(c)
	f.register(c)
	return c
}
