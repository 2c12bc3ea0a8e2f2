package main

import (
	"context"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/kmsd-project/kmsd/client"
	"github.com/kmsd-project/kmsd/ipc/proto"
)

func newClock(a *app) *cobra.Command {
	c := &cobra.Command{
		Use:   "clock",
		Short: "Look after the time that certificates are made by",
		Long: `kmsd remembers the latest time it has seen. While the clock of the machine is behind that, it issues no certificate and replaces no
key; everything else goes on.`,
	}
	c.AddCommand(newClockAccept(a))
	return c
}

func newClockAccept(a *app) *cobra.Command {
	var sure confirmFlags
	c := uses(&cobra.Command{
		Use:   "accept [--yes]",
		Short: "Make the clock of the machine count, although kmsd has seen a later time",
		Long: `Make the clock of the machine count, although kmsd has seen a later time: after a clock that was wrong has been set right. Certificates
that were made meanwhile keep their dates; "kmsctl expiry" shows them.`,
		Example: "  date && kmsctl clock accept",
		Args:    exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			now := time.Now().Format("2006-01-02 15:04 MST")
			if err := sure.confirm("kmsd will go by the present clock, which shows "+now+".", "accept"); err != nil {
				return err
			}
			var clock client.Clock
			err := a.with(c.Context(), func(ctx context.Context, cl *client.Client) (err error) {
				clock, err = cl.AcceptClock(ctx)
				return err
			})
			if err != nil {
				return err
			}
			view := map[string]string{"now": clock.Now.Format(time.RFC3339), "seen": ""}
			if !clock.Seen.IsZero() {
				view["seen"] = clock.Seen.Format(time.RFC3339)
			}
			return a.print(view, func(io.Writer) {
				a.say("kmsd goes by %s now; the latest time it had seen is %s", local(clock.Now), local(clock.Seen))
			})
		},
	}, proto.OpClockAccept)
	sure.register(c)
	return c
}
