package main

import (
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/kmsd-project/kmsd/ipc/proto"
)

func newStatus(a *app) *cobra.Command {
	return uses(&cobra.Command{
		Use:   "status",
		Short: "Show the state of the daemon and its keystore",
		Args:  exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			var s proto.Status
			if err := a.call(c.Context(), proto.OpStatus, &proto.Empty{}, &s); err != nil {
				return err
			}
			return a.print(viewStatus(&s), func(w io.Writer) { writeStatus(w, &s) })
		},
	}, proto.OpStatus)
}

func writeStatus(w io.Writer, s *proto.Status) {
	state := s.State
	switch state {
	case "locked":
		state += " (kmsctl unlock opens it)"
		if s.LockDetail != "" {
			state = "locked: " + printable(s.LockDetail)
		}
	case "uninitialised":
		state += " (kmsctl init makes a keystore)"
	}
	pairs := []string{"State", state, "Version", s.Version, "Mode", s.Mode}
	if s.State != "uninitialised" {
		erasure := ""
		if s.ErasurePending > 0 {
			erasure = number(s.ErasurePending) + " destroyed versions and deleted documents wait for the next epoch (kmsctl store rotate-epoch)"
		}
		pairs = append(pairs, "Store", s.StoreID, "Instance", s.InstanceID, "Epoch", number(s.Epoch), "Keys", number(s.Keys),
			"Erasure pending", erasure, "Rollback", s.Rollback, "Pin", s.StorePin, "Escrow", strings.Join(s.Escrow, ", "))
	}
	pairs = append(pairs,
		"Memory protection", s.MemoryProtection,
		"Up", (time.Duration(s.UptimeSeconds) * time.Second).String(),
		"Connections", number(s.Connections), "Requests", number(s.Requests), "Answered busy", number(s.Busy),
		"Audit entries", number(s.AuditEntries))
	if s.Panics > 0 {
		pairs = append(pairs, "Panics", number(s.Panics)+" (please report them)")
	}
	fields(w, pairs...)
	if len(s.Slots) > 0 {
		fmt.Fprintln(w)
		writeSlots(w, s.Slots)
	}
	writeWarnings(w, s.Warnings)
}
