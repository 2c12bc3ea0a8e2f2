package main

import (
	"io"

	"github.com/spf13/cobra"

	"github.com/kmsd-project/kmsd/ipc/proto"
)

func newLock(a *app) *cobra.Command {
	return uses(&cobra.Command{
		Use:   "lock",
		Short: "Lock the keystore and forget every opened key",
		Args:  exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			if err := a.call(c.Context(), proto.OpLock, &proto.Empty{}, &proto.Empty{}); err != nil {
				return err
			}
			return a.print(map[string]string{"state": "locked"}, func(io.Writer) { a.say("locked") })
		},
	}, proto.OpLock)
}
