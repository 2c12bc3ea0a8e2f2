package main

import (
	"context"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/kmsd-project/kmsd/client"
	"github.com/kmsd-project/kmsd/ipc/proto"
)

func newExpiry(a *app) *cobra.Command {
	var within string
	c := uses(&cobra.Command{
		Use:   "expiry [flags]",
		Short: "Show what expires when, and what happens then",
		Long: `Show keys, certificates and revocation lists in the order in which something happens to them: kmsd replaces most of them some time
before they expire, and for the rest it says who has to do something. A line with an exclamation mark needs a person.`,
		Example: `  kmsctl expiry
  kmsctl expiry --within 90d
  kmsctl --json expiry --within 1y`,
		Args: exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			now := time.Now()
			var until time.Time
			if within != "" {
				seconds, err := parseTime(within, now)
				if err != nil {
					return err
				}
				if seconds <= 0 {
					return withHint(usagef("--within is a span or a day"), "kmsctl expiry --within 90d")
				}
				until = time.Unix(seconds, 0)
			}
			list := []client.Due{}
			err := a.with(c.Context(), func(ctx context.Context, cl *client.Client) error {
				for d, err := range cl.Expiring(ctx, until) {
					if err != nil {
						return err
					}
					list = append(list, *d)
				}
				return nil
			})
			if err != nil {
				return err
			}
			sortDue(list)
			views := make([]dueView, len(list))
			for i := range list {
				views[i] = viewDue(&list[i], now)
			}
			return a.print(views, func(w io.Writer) { writeTimeline(w, list, now) })
		},
	}, proto.OpExpiry)
	c.Flags().StringVar(&within, "within", "", "only what happens until then: a span such as 90d, or a day (default: everything)")
	return c
}

// next is when something happens: kmsd acts, or without that the end comes.
func next(d *client.Due) int64 {
	if d.ActAt > 0 && d.ActAt < d.At {
		return d.ActAt
	}
	return d.At
}

func sortDue(list []client.Due) {
	slices.SortFunc(list, func(a, b client.Due) int {
		if at, bt := next(&a), next(&b); at != bt {
			if at < bt {
				return -1
			}
			return 1
		}
		return strings.Compare(a.Key+" "+a.What, b.Key+" "+b.What)
	})
}

// dueView is one thing that expires, for JSON.
type dueView struct {
	Key      string `json:"key"` // NAME@VERSION; empty: no key of kmsd
	What     string `json:"what"`
	Expires  string `json:"expires"`
	ActAt    string `json:"act_at,omitempty"` // when kmsd does what then says
	Then     string `json:"then"`
	Person   bool   `json:"person"` // somebody has to do something
	Days     int    `json:"days"`   // until the next thing happens, negative when it is overdue
	Detail   string `json:"detail,omitempty"`
	NextTime string `json:"next"`
}

func viewDue(d *client.Due, now time.Time) dueView {
	return dueView{
		Key: d.Key, What: d.What, Expires: stamp(d.At), ActAt: stamp(d.ActAt), Then: d.Then, Person: forPerson(d),
		Days: int(math.Floor(time.Unix(next(d), 0).Sub(now).Hours() / 24)), Detail: d.Detail, NextTime: stamp(next(d)),
	}
}

func forPerson(d *client.Due) bool { return d.Then == "alert" }

// writeTimeline writes one line for each thing that happens, with the years and months beside them.
func writeTimeline(w io.Writer, list []client.Due, now time.Time) {
	if len(list) == 0 {
		fmt.Fprintln(w, "Nothing expires in that time.")
		return
	}
	width := 0
	for i := range list {
		width = max(width, len(printable(list[i].Key)))
	}
	fmt.Fprintf(w, "%s  now\n", now.Format(time.DateOnly))
	month := now.Format("2006-01")
	for i := range list {
		d := &list[i]
		at := time.Unix(next(d), 0).Local()
		mark := " "
		if forPerson(d) {
			mark = "!"
		}
		if m := at.Format("2006-01"); m != month && at.After(now) {
			fmt.Fprintf(w, "%s\n", at.Format("January 2006"))
			month = m
		}
		fmt.Fprintf(w, "%s %s  %-12s  %-*s  %s\n", mark, at.Format(time.DateOnly), span(at.Sub(now)), width, printable(d.Key), printable(happening(d, now)))
	}
}

// happening says what happens to one thing.
func happening(d *client.Due, now time.Time) string {
	expires := d.What + " expires"
	if d.What == "crl" {
		expires = "revocation list expires"
	}
	if d.At <= now.Unix() {
		expires = strings.TrimSuffix(expires, "s") + "d"
	}
	var text string
	switch d.Then {
	case "rotate":
		text = "kmsd makes a new version"
	case "recertify":
		text = "kmsd issues a new certificate"
	case "publish":
		text = "kmsd publishes a new list"
	case "deactivate":
		text = "it still decrypts and verifies"
	case "alert":
		text = "somebody has to see to it"
	}
	switch {
	case text == "":
		text = expires
	case next(d) == d.At || d.Then == "deactivate":
		text = expires + "; " + text
	default:
		text += " (" + expires + " " + time.Unix(d.At, 0).Local().Format(time.DateOnly) + ")"
	}
	if d.Detail != "" {
		text += ": " + d.Detail
	}
	return text
}

// span writes how far away a time is.
func span(d time.Duration) string {
	in, ago := "in ", ""
	if d < 0 {
		in, ago, d = "", " ago", -d
	}
	days := int(d.Hours() / 24)
	switch {
	case d < time.Hour:
		return in + plural(int(d.Minutes()), "minute") + ago
	case days < 1:
		return in + plural(int(d.Hours()), "hour") + ago
	case days < 90:
		return in + plural(days, "day") + ago
	case days < 2*365:
		return in + plural(days/30, "month") + ago
	}
	return in + plural(days/365, "year") + ago
}

func plural(n int, unit string) string {
	if n == 1 {
		return "1 " + unit
	}
	return fmt.Sprintf("%d %ss", n, unit)
}
