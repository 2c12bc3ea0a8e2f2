package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/kmsd-project/kmsd/client"
	"github.com/kmsd-project/kmsd/ipc/proto"
)

func newWatch(a *app) *cobra.Command {
	var recent, once bool
	c := uses(&cobra.Command{
		Use:   "watch [flags]",
		Short: "Print a line for each thing that happens to keys",
		Long: `Print a line on standard output for each thing that happens to keys and certificates, as it happens: rotations, certificates that are
renewed or expire soon, revocations, alerts. It goes on until it is interrupted, also when kmsd is restarted; a line "lost" says that some may have
been missed. With --json each line is one JSON object, so that a program can read them.`,
		Example: `  kmsctl watch
  kmsctl --json watch | while read -r event; do notify-send kmsd "$event"; done
  kmsctl watch --recent --once`,
		Args: exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			cl, err := a.dial(c.Context())
			if err != nil {
				return err
			}
			if once {
				return a.with(c.Context(), func(ctx context.Context, cl *client.Client) error {
					events, err := cl.Recent(ctx)
					for i := range events {
						if err := a.event(&events[i]); err != nil {
							return err
						}
					}
					return err
				})
			}
			away := false
			for e, err := range cl.Watch(c.Context(), recent) {
				switch {
				case err == nil && away:
					a.say("kmsd is back")
					away = false
					fallthrough
				case err == nil:
					if err := a.event(e); err != nil {
						return err
					}
				case errors.Is(err, client.ErrUnreachable), errors.Is(err, client.ErrLocked), errors.Is(err, client.ErrBusy), errors.Is(err, client.ErrOutcomeUnknown):
					if !away {
						a.say("kmsd is away, waiting for it")
						away = true
					}
				default:
					return err
				}
			}
			return nil // interrupted, as it has to be
		},
	}, proto.OpEvents)
	c.Flags().BoolVar(&recent, "recent", false, "begin with what kmsd remembers")
	c.Flags().BoolVar(&once, "once", false, "print what kmsd remembers and end")
	return c
}

// eventView is one event, on one line of JSON.
type eventView struct {
	Number uint64 `json:"number,omitempty"`
	Time   string `json:"time"`
	Kind   string `json:"kind"`
	Key    string `json:"key,omitempty"`
	Detail string `json:"detail,omitempty"`
}

// event prints one event.
func (a *app) event(e *client.Event) error {
	if a.json {
		line, err := json.Marshal(eventView{e.Number, stamp(e.Time), e.Kind, e.Key, e.Detail})
		if err != nil {
			return err
		}
		_, err = a.stdout.Write(append(line, '\n'))
		return err
	}
	text := fmt.Sprintf("%s  %-9s", time.Unix(e.Time, 0).Local().Format("2006-01-02 15:04:05"), e.Kind)
	if e.Key != "" {
		text += "  " + e.Key
	}
	if e.Detail != "" {
		text += "  " + e.Detail
	}
	_, err := fmt.Fprintln(a.stdout, printable(text))
	return err
}
