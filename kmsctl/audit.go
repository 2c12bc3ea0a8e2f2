package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/kmsd-project/kmsd/client"
	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/kmsd/audit"
)

func newAudit(a *app) *cobra.Command {
	c := &cobra.Command{Use: "audit", Short: "Read and verify the record of every use"}
	c.AddCommand(newAuditTail(a), newAuditVerify(a))
	return c
}

func newAuditTail(a *app) *cobra.Command {
	var from uint64
	var lines uint32
	var follow bool
	c := uses(&cobra.Command{
		Use:   "tail [flags]",
		Short: "Show the newest entries",
		Args:  exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			params := proto.AuditTail{From: from, Limit: lines, Last: !c.Flags().Changed("from")}
			left := int(lines)
			header := true
			for {
				var r proto.AuditTailReply
				if err := a.call(c.Context(), proto.OpAuditTail, &params, &r); err != nil {
					return err
				}
				if err := a.printEntries(r.Entries, header); err != nil {
					return err
				}
				header = false
				left -= len(r.Entries)
				params.From, params.Last = r.Next, false
				switch {
				case follow && len(r.Entries) == 0:
					select {
					case <-c.Context().Done():
						return nil
					case <-time.After(time.Second):
					}
				case follow:
				case left <= 0 || len(r.Entries) == 0:
					return nil
				}
				params.Limit = lines
				if !follow {
					params.Limit = uint32(left)
				}
			}
		},
	}, proto.OpAuditTail)
	c.Flags().Uint32VarP(&lines, "lines", "n", 20, "how many entries")
	c.Flags().Uint64Var(&from, "from", 0, "begin with this entry instead of the last ones")
	c.Flags().BoolVarP(&follow, "follow", "f", false, "wait for further entries")
	c.Long = "Show the newest entries. With --json each entry is one object."
	return c
}

func (a *app) printEntries(entries []proto.AuditEntry, header bool) error {
	if a.json {
		for _, e := range entries {
			if err := writeJSON(a.stdout, viewAudit(e)); err != nil {
				return err
			}
		}
		return nil
	}
	if len(entries) == 0 {
		return nil
	}
	rows := [][]string{}
	if header {
		rows = append(rows, []string{"NUMBER", "TIME", "WHO", "OPERATION", "KEY", "RESULT", "DETAIL"})
	}
	for _, e := range entries {
		key := e.Key
		if key != "" && e.Version > 0 {
			key += "@" + number(e.Version)
		}
		who := e.Principal
		if who == "" {
			who = "uid " + number(e.UID)
		}
		if e.Via != "" {
			who += " via " + e.Via
		}
		result := e.Code
		if !e.Allowed {
			result = "denied"
			if e.Code != "" {
				result += ": " + e.Code
			}
		}
		rows = append(rows, []string{number(e.Number), time.UnixMilli(e.Time).Local().Format("2006-01-02 15:04:05"), who, e.Op, key, result, e.Detail})
	}
	table(a.stdout, rows)
	return nil
}

func newAuditVerify(a *app) *cobra.Command {
	var expect string
	c := uses(&cobra.Command{
		Use:   "verify DIR [flags]",
		Short: "Check that no entry of the audit log was changed",
		Long: `Check the audit log in DIR (the directory audit in the state directory of kmsd) without any key. The first entry that was
changed, removed or moved is named.

With --head SIZE:ROOT, as printed by an earlier run or by another person, the log must also continue that one: an end that
was cut off shows only this way. When the daemon answers, its head is compared too.`,
		Args: exactArgs("DIR"),
		RunE: func(c *cobra.Command, args []string) error {
			var want *audit.Head
			if expect != "" {
				head, err := parseHead(expect)
				if err != nil {
					return err
				}
				want = &head
			}
			// The daemon is asked first: what it writes after that only makes the log longer.
			daemon, err := a.daemonHead(c.Context())
			if err != nil {
				return err
			}
			report, err := audit.Verify(args[0], want)
			if err != nil {
				return withHint(err, "keep a copy of %s and compare with a backup", args[0])
			}
			compared := false
			if daemon != nil {
				if _, err := audit.Verify(args[0], daemon); err != nil {
					return withHint(fmt.Errorf("the log differs from what the daemon wrote: %w", err), "is %s the log of this daemon?", args[0])
				}
				compared = true
			}
			head := fmt.Sprintf("%d:%s", report.Head.Size, hex.EncodeToString(report.Head.Root[:]))
			view := map[string]any{"entries": report.Entries, "segments": report.Segments, "head": head, "compared_with_daemon": compared}
			return a.print(view, func(w io.Writer) {
				against := "no, it does not answer"
				if compared {
					against = "yes"
				}
				fields(w, "Entries", number(report.Entries), "Files", number(report.Segments), "Head", head, "Same as daemon's", against)
				fmt.Fprintln(w, "\nNo entry was changed. Keep the head apart from this machine to notice a cut-off end later.")
			})
		},
	}, proto.OpAuditHead)
	c.Flags().StringVar(&expect, "head", "", "SIZE:ROOT that the log must continue")
	return c
}

// daemonHead returns the head the daemon reports, nil when there is none to ask.
func (a *app) daemonHead(ctx context.Context) (*audit.Head, error) {
	var r proto.AuditHead
	err := a.call(ctx, proto.OpAuditHead, &proto.Empty{}, &r)
	switch {
	case errors.Is(err, client.ErrUnreachable), errors.Is(err, client.ErrUnknownOp), errors.Is(err, client.ErrUninitialised), errors.Is(err, client.ErrLocked):
		return nil, nil
	case err != nil:
		return nil, err
	}
	head := audit.Head{Size: r.Size}
	if len(r.Root) != len(head.Root) {
		return nil, errors.New("the daemon answered a malformed audit head")
	}
	copy(head.Root[:], r.Root)
	return &head, nil
}

func parseHead(s string) (audit.Head, error) {
	var head audit.Head
	count, root, ok := strings.Cut(s, ":")
	raw, err := hex.DecodeString(root)
	if _, scanErr := fmt.Sscanf(count, "%d", &head.Size); !ok || err != nil || scanErr != nil || len(raw) != len(head.Root) {
		return head, usagef("--head is SIZE:ROOT as kmsctl audit verify prints it")
	}
	copy(head.Root[:], raw)
	return head, nil
}
