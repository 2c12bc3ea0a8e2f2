package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
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
			// Reading is recorded too: without an end at the moment it began it would never stop.
			begin := time.Now().UnixMilli()
			var entries []proto.AuditEntry
			params := proto.AuditTail{From: from, Limit: lines, Last: !c.Flags().Changed("from")}
			for len(entries) < int(lines) {
				page, next, err := a.auditPage(c.Context(), params)
				if err != nil {
					return err
				}
				end := slices.IndexFunc(page, func(e proto.AuditEntry) bool { return e.Time > begin })
				if end >= 0 {
					page = page[:end]
				}
				entries = append(entries, page...)
				params = proto.AuditTail{From: next, Limit: lines - min(lines, uint32(len(entries)))}
				if end >= 0 || len(page) == 0 {
					break
				}
			}
			if err := a.printEntries(entries); err != nil || !follow {
				return err
			}
			for {
				select {
				case <-c.Context().Done():
					return nil
				case <-time.After(time.Second):
				}
				params.Limit = maxFollow
				page, next, err := a.auditPage(c.Context(), params)
				if err != nil {
					return err
				}
				params.From = next
				for _, e := range page {
					if e.Op == proto.OpAuditTail && e.PID == uint32(os.Getpid()) {
						continue
					}
					if err := a.printEntry(e); err != nil {
						return err
					}
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

// maxFollow is how many entries are asked for at once while following.
const maxFollow = 100

// auditPage returns one page of entries and the number of the entry after it.
func (a *app) auditPage(ctx context.Context, params proto.AuditTail) ([]proto.AuditEntry, uint64, error) {
	var r proto.AuditTailReply
	err := a.call(ctx, proto.OpAuditTail, &params, &r)
	return r.Entries, r.Next, err
}

func (a *app) printEntries(entries []proto.AuditEntry) error {
	if a.json {
		for _, e := range entries {
			if err := writeJSON(a.stdout, viewAudit(e)); err != nil {
				return err
			}
		}
		return nil
	}
	rows := [][]string{{"NUMBER", "TIME", "WHO", "OPERATION", "KEY", "RESULT", "DETAIL"}}
	for _, e := range entries {
		rows = append(rows, auditRow(e))
	}
	table(a.stdout, rows)
	return nil
}

// printEntry prints one entry that came while following, when the widths of the columns are not known.
func (a *app) printEntry(e proto.AuditEntry) error {
	if a.json {
		return writeJSON(a.stdout, viewAudit(e))
	}
	row := auditRow(e)
	for i := range row {
		row[i] = printable(row[i])
	}
	_, err := fmt.Fprintf(a.stdout, "%-7s %s  %-12s %-14s %-30s %s %s\n", row[0], row[1], row[2], row[3], row[4], row[5], row[6])
	return err
}

func auditRow(e proto.AuditEntry) []string {
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
	return []string{number(e.Number), time.UnixMilli(e.Time).Local().Format("2006-01-02 15:04:05"), who, e.Op, key, result, e.Detail}
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
