package main

import (
	"github.com/spf13/cobra"

	"github.com/kmsd-project/kmsd/ipc/proto"
)

func newWrap(a *app) *cobra.Command {
	var key, target string
	var out textFlags
	c := uses(&cobra.Command{
		Use:   "wrap --key NAME --target KEY [flags]",
		Short: "Wrap an exportable key under another key",
		Long:  "Wrap the exportable key --target under the AES key --key with AES-KWP (RFC 5649).",
		Args:  exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			var r proto.WrapReply
			if err := a.call(c.Context(), proto.OpWrap, &proto.Wrap{Key: key, Target: target}, &r); err != nil {
				return err
			}
			return a.writeText(out, "wrapped", map[string]any{"key": key, "version": r.Version}, r.Wrapped, modePublic)
		},
	}, proto.OpWrap)
	a.keyFlag(c, &key, "the wrapping key")
	c.Flags().StringVar(&target, "target", "", "the key to wrap")
	c.MarkFlagRequired("target")
	out.register(c)
	return c
}

func newUnwrap(a *app) *cobra.Command {
	var key, in string
	var f newKeyFlags
	c := uses(&cobra.Command{
		Use:   "unwrap --key NAME --in F --alg ALG NEW [flags]",
		Short: "Unwrap a key into the store as NEW",
		Args:  exactArgs("NEW"),
		RunE: func(c *cobra.Command, args []string) error {
			wrapped, err := a.readFile(in, proto.MaxData)
			if err != nil {
				return err
			}
			params, err := f.params(args[0])
			if err != nil {
				return err
			}
			return a.keyCall(c.Context(), proto.OpUnwrap, &proto.Unwrap{Key: key, Wrapped: wrapped, New: params})
		},
	}, proto.OpUnwrap)
	a.keyFlag(c, &key, "the wrapping key")
	inFlag(c, &in, "the wrapped key")
	f.register(c)
	return c
}
