package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

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
	for _, row := range rows {
		a.widths.grow(row)
	}
	table(a.stdout, rows)
	return nil
}

// columns are the widths of the columns of a table that goes on growing, in characters.
type columns []int

func (c *columns) grow(row []string) {
	for i, cell := range row {
		if i == len(*c) {
			*c = append(*c, 1)
		}
		(*c)[i] = max((*c)[i], utf8.RuneCountInString(printable(cell)))
	}
}

// pad fills the cells of row, but the last, up to their columns, which grow with it.
func (c *columns) pad(row []string) []string {
	c.grow(row)
	for i := range row[:len(row)-1] {
		cell := printable(row[i])
		if cell == "" {
			cell = "-"
		}
		row[i] = cell + strings.Repeat(" ", (*c)[i]-utf8.RuneCountInString(cell))
	}
	return row
}

// printEntry prints one entry that came while following, when the widths of the columns are not known.
func (a *app) printEntry(e proto.AuditEntry) error {
	if a.json {
		return writeJSON(a.stdout, viewAudit(e))
	}
	table(a.stdout, [][]string{a.widths.pad(auditRow(e))})
	return nil
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
		Use:   "verify [DIR] [flags]",
		Short: "Check that no entry of the audit log was changed",
		Long: `Check the audit log of the running daemon, and that it is what the daemon says it has written; this needs the right to
read its state directory. Without a daemon the log in the default state directory is checked.

With DIR, a directory audit or a copy of one, that log is checked alone, without a daemon and without any key. The first
entry that was changed, removed or moved is named.

With --head SIZE:ROOT, as printed by an earlier run or by another person, the log must also continue that one: an end that
was cut off shows only this way.`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			var want *audit.Head
			if expect != "" {
				head, err := parseHead(expect)
				if err != nil {
					return err
				}
				want = &head
			}
			var dir string
			var daemon *audit.Head
			if len(args) == 1 {
				dir = args[0]
			} else {
				// The daemon is asked first: what it writes after that only makes the log longer.
				var err error
				if daemon, err = a.daemonHead(c.Context()); err != nil {
					return err
				}
				if dir, err = a.auditDir(c.Context()); err != nil {
					return err
				}
			}
			report, err := audit.Verify(dir, want)
			if err != nil {
				return withHint(err, "keep a copy of %s and compare with a backup", dir)
			}
			if daemon != nil {
				if _, err := audit.Verify(dir, daemon); err != nil {
					return withHint(fmt.Errorf("the log differs from what the daemon wrote: %w", err), "keep a copy of %s and compare with a backup", dir)
				}
			}
			compared := daemon != nil
			head := fmt.Sprintf("%d:%s", report.Head.Size, hex.EncodeToString(report.Head.Root[:]))
			view := map[string]any{"log": dir, "entries": report.Entries, "segments": report.Segments, "head": head, "compared_with_daemon": compared}
			return a.print(view, func(w io.Writer) {
				against := "not asked"
				if compared {
					against = "yes"
				}
				fields(w, "Log", dir, "Entries", number(report.Entries), "Files", number(report.Segments), "Head", head, "Same as daemon's", against)
				fmt.Fprintln(w, "\nNo entry was changed. Keep the head apart from this machine to notice a cut-off end later.")
			})
		},
	}, proto.OpAuditHead)
	c.Flags().StringVar(&expect, "head", "", "SIZE:ROOT that the log must continue")
	return c
}

// auditDir returns where the audit log of the daemon is: as an administrator is told, else in the default place.
func (a *app) auditDir(ctx context.Context) (string, error) {
	var status proto.Status
	err := a.call(ctx, proto.OpStatus, &proto.Empty{}, &status)
	if err != nil && !errors.Is(err, client.ErrUnreachable) {
		return "", err
	}
	if status.StateDir != "" {
		return filepath.Join(status.StateDir, "audit"), nil
	}
	state := os.Getenv("XDG_STATE_HOME")
	if home := os.Getenv("HOME"); state == "" && home != "" {
		state = filepath.Join(home, ".local", "state")
	}
	for _, dir := range []string{filepath.Join(state, "kmsd", "audit"), "/var/lib/kmsd/audit"} {
		if _, err := os.Stat(dir); err == nil {
			return dir, nil
		}
	}
	return "", withHint(errors.New("there is no audit log in the default places"), "kmsctl audit verify STATE/audit")
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
