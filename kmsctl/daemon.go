package main

import (
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/kmsd-project/kmsd/ipc/proto"
)

func newWhoami(a *app) *cobra.Command {
	return uses(&cobra.Command{
		Use:   "whoami",
		Short: "Show how the daemon sees this caller",
		Args:  exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			var id proto.Identity
			if err := a.call(c.Context(), proto.OpWhoami, &proto.Empty{}, &id); err != nil {
				return err
			}
			return a.print(viewIdentity(id), func(w io.Writer) {
				role := "application"
				if id.Admin {
					role = "administrator"
				}
				fields(w, "Principal", id.Principal, "Role", role, "User", number(id.UID), "Group", number(id.GID),
					"Process", number(id.PID), "Unit", id.Unit)
			})
		},
	}, proto.OpWhoami)
}

func newCapabilities(a *app) *cobra.Command {
	type view struct {
		Algorithm  string   `json:"algorithm"`
		Protection string   `json:"protection"`
		Usages     []string `json:"usages"`
		Default    []string `json:"default_usage"`
		Schemes    []string `json:"schemes"`
		Class      string   `json:"class"`
		Operations []string `json:"operations"`
	}
	return uses(&cobra.Command{
		Use:   "capabilities",
		Short: "List algorithms, usages and schemes",
		Long: `List algorithms, usages and schemes, for keys in software and for those that the TPM and the HSM of this machine can hold;
these are asked. What is to be said about them goes to standard error.`,
		Args: exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			var r proto.CapabilitiesReply
			if err := a.call(c.Context(), proto.OpCapabilities, &proto.Empty{}, &r); err != nil {
				return err
			}
			views := make([]view, len(r.Algorithms))
			for i, x := range r.Algorithms {
				views[i] = view{x.Algorithm, x.Protection, orEmpty(x.Usages), orEmpty(x.Default), orEmpty(x.Schemes), x.Class, orEmpty(x.Operations)}
			}
			for _, note := range r.Notes {
				a.say("%s", printable(note))
			}
			return a.print(views, func(w io.Writer) {
				rows := [][]string{{"ALGORITHM", "PROTECTION", "USAGES", "DEFAULT", "SCHEMES"}}
				for _, x := range r.Algorithms {
					name := x.Algorithm
					if x.Class == "legacy" {
						name += " (legacy)"
					}
					rows = append(rows, []string{name, x.Protection, strings.Join(x.Usages, ","), strings.Join(x.Default, ","), strings.Join(x.Schemes, ",")})
				}
				table(w, rows)
			})
		},
	}, proto.OpCapabilities)
}

func newPing(a *app) *cobra.Command {
	var count int
	c := uses(&cobra.Command{
		Use:   "ping",
		Short: "Measure a round trip to the daemon",
		Args:  exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			if count < 1 || count > 100_000 {
				return usagef("--count is 1 to 100000")
			}
			if _, err := a.dial(c.Context()); err != nil {
				return err
			}
			best, total := time.Duration(1<<63-1), time.Duration(0)
			for range count {
				begin := time.Now()
				if err := a.call(c.Context(), proto.OpPing, &proto.Empty{}, &proto.Empty{}); err != nil {
					return err
				}
				took := time.Since(begin)
				best, total = min(best, took), total+took
			}
			mean := total / time.Duration(count)
			return a.print(map[string]any{"count": count, "best_us": best.Microseconds(), "mean_us": mean.Microseconds()}, func(w io.Writer) {
				fmt.Fprintf(w, "%d round trips, best %v, mean %v\n", count, best.Round(time.Microsecond), mean.Round(time.Microsecond))
			})
		},
	}, proto.OpHello, proto.OpBind, proto.OpPing, proto.OpCancel)
	c.Long = "Measure a round trip to the daemon. Every command begins with the same hello and bind, and interrupting one cancels its request."
	c.Flags().IntVar(&count, "count", 1, "number of round trips")
	return c
}
