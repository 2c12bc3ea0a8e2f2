package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/kmsd-project/kmsd/client"
	"github.com/kmsd-project/kmsd/ipc/proto"
)

// finding is one thing that doctor looked at.
type finding struct {
	Check  string `json:"check"`
	Result string `json:"result"` // ok, note or problem
	Detail string `json:"detail"`
	Remedy string `json:"remedy,omitempty"`
}

func newDoctor(a *app) *cobra.Command {
	var selfTest bool
	c := uses(&cobra.Command{
		Use:   "doctor [flags]",
		Short: "Look for problems and say what to do about them",
		Long:  "Look for problems and say what to do about them. With --self-test every algorithm is run against its known answers. The exit code is 1 when there is a problem.",
		Args:  exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			findings, failure := a.examine(c.Context(), selfTest)
			err := a.print(findings, func(w io.Writer) {
				rows := [][]string{{"RESULT", "CHECK", "FOUND"}}
				for _, f := range findings {
					rows = append(rows, []string{f.Result, f.Check, f.Detail})
				}
				table(w, rows)
				for _, f := range findings {
					if f.Remedy != "" {
						fmt.Fprintf(w, "\n%s: %s\n", f.Check, printable(f.Remedy))
					}
				}
			})
			if err != nil {
				return err
			}
			return failure
		},
	}, proto.OpStatus, proto.OpSelfTest, proto.OpWhoami, proto.OpExpiry)
	c.Flags().BoolVar(&selfTest, "self-test", false, "run the self-test of every algorithm")
	return c
}

// examine returns what was found, and an error when something of it is a problem.
func (a *app) examine(ctx context.Context, selfTest bool) (findings []finding, failure error) {
	add := func(result, check, detail, remedy string) {
		findings = append(findings, finding{check, result, detail, remedy})
		if result == "problem" && failure == nil {
			failure = fmt.Errorf("%s: %s", check, detail)
		}
	}

	var s proto.Status
	if err := a.call(ctx, proto.OpStatus, &proto.Empty{}, &s); err != nil {
		remedy := hintFor(err)
		if errors.Is(err, os.ErrPermission) {
			remedy = "this user may not open the socket: join the group that may, or ask the administrator"
		}
		add("problem", "daemon", err.Error(), remedy)
		return findings, withHint(err, "%s", remedy)
	}
	add("ok", "daemon", "kmsd "+s.Version+" answers, "+s.Mode+" mode", "")

	var who proto.Identity
	if err := a.call(ctx, proto.OpWhoami, &proto.Empty{}, &who); err == nil {
		role := "application"
		if who.Admin {
			role = "administrator"
		}
		add("ok", "identity", fmt.Sprintf("uid %d, seen as %s", who.UID, role), "")
	}

	switch s.State {
	case "ready":
		add("ok", "keystore", fmt.Sprintf("open, %d keys, epoch %d", s.Keys, s.Epoch), "")
	case "locked":
		detail, remedy := "locked", "kmsctl unlock"
		if s.LockDetail != "" {
			detail += ": " + s.LockDetail
		}
		if s.LockReason != "" {
			remedy = "look at the slots below; another one opens, such as that of the recovery key: kmsctl unlock --pin-file F"
		}
		if s.LockReason == string(proto.CodeRollback) {
			remedy = "find out who put the old files back; bring the newest ones, or: kmsctl unlock --accept-rollback"
		}
		add("problem", "keystore", detail, remedy)
	default:
		add("problem", "keystore", s.State, "kmsctl init")
	}
	if s.MemoryProtection == "full" {
		add("ok", "memory", "root keys are in memory that the kernel shows to nobody", "")
	} else {
		add("note", "memory", "protection is "+s.MemoryProtection, "memfd_secret is missing: a kernel with CONFIG_SECRETMEM and secretmem.enable=1 gives full protection")
	}
	if s.State != "uninitialised" {
		switch {
		case s.Rollback == "" || s.Rollback == "not detectable":
			add("note", "rollback", "an old copy of the whole store put back would not be noticed", "a slot in a TPM brings a counter that notices it")
		case strings.HasPrefix(s.Rollback, "detected"):
			add("ok", "rollback", s.Rollback, "")
		default:
			add("problem", "rollback", s.Rollback, "bring the device of the counter back; if it is lost, remove its slot")
		}
	}
	recovery := false
	for _, slot := range s.Slots {
		check := fmt.Sprintf("slot %d (%s)", slot.ID, slot.Kind)
		recovery = recovery || slot.Kind == "recovery"
		switch {
		case slot.Health == "" || slot.Health == "ready" || slot.Health == "locked" && slot.Kind == "recovery":
			add("ok", check, slot.Health, "")
		default:
			detail := slot.Health
			if slot.Detail != "" {
				detail += ": " + slot.Detail
			}
			add("problem", check, detail, slotRemedy(slot, bound(&s, slot)))
		}
	}
	if len(s.Slots) > 0 && !recovery {
		add("note", "recovery", "no recovery slot: when the device is lost, so are the keys", "kmsctl slot add recovery --out F")
	}
	if len(s.Slots) > 0 && len(s.Escrow) == 0 {
		add("note", "backup", "no escrow recipient: backups are for the recipients of each backup alone", "")
	}
	if s.ErasurePending > 0 {
		add("note", "erasure", fmt.Sprintf("%d destroyed versions and deleted documents wait for the next epoch", s.ErasurePending), "kmsctl store rotate-epoch")
	}
	if s.Panics > 0 {
		add("problem", "defects", fmt.Sprintf("%d operations hit a defect of kmsd", s.Panics), "look into the log of kmsd and report it")
	}
	for _, w := range s.Warnings {
		add("note", "daemon", w, "")
	}
	if s.State == "ready" && who.Admin {
		a.examineExpiry(ctx, add)
	}
	if selfTest {
		var r proto.SelfTestReply
		if err := a.call(ctx, proto.OpSelfTest, &proto.Empty{}, &r); err != nil {
			add("problem", "self-test", err.Error(), hintFor(err))
			return findings, failure
		}
		for _, t := range r.Results {
			if t.Passed {
				add("ok", "self-test "+t.Algorithm, "known answers are right", "")
			} else {
				add("problem", "self-test "+t.Algorithm, t.Message, "do not use this algorithm on this machine; the binary or the machine is damaged")
			}
		}
	}
	if s.State == "locked" {
		failure = client.ErrLocked // so that the exit code is the one of every command
	}
	return findings, failure
}

// soon is how far doctor looks ahead for what a person has to see to.
const soon = 30 * 24 * time.Hour

// examineExpiry looks for keys and certificates that expire soon and that kmsd does not replace by itself.
func (a *app) examineExpiry(ctx context.Context, add func(result, check, detail, remedy string)) {
	now := time.Now()
	var first *client.Due
	waiting := 0
	err := a.with(ctx, func(ctx context.Context, c *client.Client) error {
		for d, err := range c.Expiring(ctx, now.Add(soon)) {
			if err != nil {
				return err
			}
			if !forPerson(d) {
				continue
			}
			if waiting++; first == nil || d.At < first.At {
				one := *d
				first = &one
			}
		}
		return nil
	})
	switch {
	case err != nil:
		add("problem", "expiry", err.Error(), hintFor(err))
	case waiting == 0:
		add("ok", "expiry", "nothing that a person has to see to expires within 30 days", "")
	default:
		result := "note"
		if first.At <= now.Unix() {
			result = "problem"
		}
		what := happening(first, now)
		if first.Key != "" { // what others have issued is of no key
			what = first.Key + ": " + what
		}
		add(result, "expiry", fmt.Sprintf("%s for a person to see to, the first: %s", plural(waiting, "thing"), what), "kmsctl expiry --within 30d")
	}
}

// until says when a lock-out ends, where that is known.
func until(t int64) string {
	if t == 0 {
		return ""
	}
	return " until " + stamp(t)
}

// bound reports whether the counter that tells old copies of the keystore is in the device of the slot, so that without it no slot opens
// unasked.
func bound(s *proto.Status, slot proto.Slot) bool {
	return slot.Location != "" && strings.HasSuffix(s.Rollback, slot.Location)
}

// slotRemedy says what to do about the device of a slot.
func slotRemedy(s proto.Slot, bound bool) string {
	other := "Another slot opens meanwhile: kmsctl unlock"
	if bound {
		other = "Another slot opens meanwhile, without the counter that tells whether the files are the newest: kmsctl unlock --accept-rollback"
	}
	switch s.Health {
	case "locked-out":
		return "the device refuses attempts" + until(s.Until) + "; wait, and find out who tried. Another slot opens meanwhile: kmsctl unlock"
	case "absent":
		return "bring the device back; kmsd notices it by itself. " + other
	case "replaced":
		return "the slot is stale, since this is another device than the one that was enrolled: bring the old one back, or remove the slot and add it again"
	case "misconfigured":
		return "the device is there but cannot be used, for the reason above: mend that, or remove the slot and add it again: kmsctl slot remove " + number(s.ID)
	case "locked":
		return "unlock the device, or give its PIN: kmsctl unlock --slot " + number(s.ID)
	}
	return "kmsctl slot test " + number(s.ID)
}
