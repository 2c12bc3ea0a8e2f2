package main

import (
	"errors"
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
	case "uninitialised":
		state += " (kmsctl init makes a keystore)"
	}
	pairs := []string{"State", state, "Version", s.Version, "Mode", s.Mode}
	if s.State != "uninitialised" {
		erasure := ""
		if s.ErasurePending > 0 {
			erasure = number(s.ErasurePending) + " destroyed versions wait for the next epoch (kmsctl store rotate-epoch)"
		}
		pairs = append(pairs, "Store", s.StoreID, "Instance", s.InstanceID, "Epoch", number(s.Epoch), "Keys", number(s.Keys),
			"Erasure pending", erasure, "Rollback", s.Rollback, "Escrow", strings.Join(s.Escrow, ", "))
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
	for _, warning := range s.Warnings {
		fmt.Fprintf(w, "\nwarning: %s\n", printable(warning))
	}
}

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

func newUnlock(a *app) *cobra.Command {
	var pin secretFlags
	var slot uint32
	var shares []string
	var auto bool
	c := uses(&cobra.Command{
		Use:   "unlock",
		Short: "Open a locked keystore",
		Long: `Open a locked keystore with a PIN, a passphrase, a recovery key or recovery shares.

First the daemon tries the slots that need nobody, such as a device that has come back; with --auto it stays at that. Only
when none of them opens, a secret is asked for on the terminal. --pin-file and --pin-fd bring it without being asked, shares
come from files.`,
		Args: exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			params := proto.Unlock{Slot: slot}
			switch {
			case auto:
			case len(shares) > 0:
				for _, path := range shares {
					share, err := a.readFile(path, maxSecret)
					if err != nil {
						return err
					}
					params.Shares = append(params.Shares, trimText(share))
				}
			case !pin.given():
				// Slots that need nobody come first: there may be nothing to ask for.
				err := a.call(c.Context(), proto.OpUnlock, &params, &proto.Empty{})
				if err == nil {
					return a.print(map[string]string{"state": "ready"}, func(io.Writer) { a.say("unlocked") })
				}
				if !needsPerson(err) {
					return err
				}
				fallthrough
			default:
				secret, err := pin.read(a, "PIN, passphrase or recovery key")
				if err != nil {
					return err
				}
				params.Secret = secret
			}
			if err := a.call(c.Context(), proto.OpUnlock, &params, &proto.Empty{}); err != nil {
				return err
			}
			return a.print(map[string]string{"state": "ready"}, func(io.Writer) { a.say("unlocked") })
		},
	}, proto.OpUnlock)
	c.Flags().Uint32Var(&slot, "slot", 0, "use this slot (default: try all that fit)")
	c.Flags().StringArrayVar(&shares, "share-file", nil, "a file with one recovery share; repeat for each share")
	c.Flags().BoolVar(&auto, "auto", false, "try the slots that need no secret")
	pin.register(c, "pin", "the PIN, passphrase or recovery key")
	c.MarkFlagsMutuallyExclusive("share-file", "auto", "pin-fd")
	c.MarkFlagsMutuallyExclusive("share-file", "auto", "pin-file")
	return c
}

// needsPerson reports whether an attempt to unlock without a secret failed in a way that a secret may mend: no slot opens by
// itself, or the device of the one that would is not there.
func needsPerson(err error) bool {
	var wire *proto.Error
	if !errors.As(err, &wire) {
		return false
	}
	switch wire.Code {
	case proto.CodeLocked, proto.CodeAuthFailed, proto.CodeLockedOut, proto.CodeAbsent, proto.CodeReplaced, proto.CodeMisconfigured, proto.CodeDamaged:
		return true
	}
	return false
}

func newInit(a *app) *cobra.Command {
	var pin secretFlags
	var enclave, recoveryOut string
	var noRecovery bool
	var escrow []string
	c := uses(&cobra.Command{
		Use:   "init",
		Short: "Make the keystore of a daemon that has none",
		Long: `Make the keystore of a running daemon that has none. "kmsd init" does the same without a running daemon.

The recovery key opens the keystore when the device of every other slot is lost. It is shown once: write it to a file with
--recovery-out and keep that apart from this machine, or let it be printed on the terminal and copy it to paper.`,
		Args: exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			if !noRecovery && recoveryOut == "" && terminal(a.stdout) == nil {
				return withHint(usagef("the recovery key would be lost: standard output is not a terminal"), "add --recovery-out F or --no-recovery")
			}
			params := proto.Init{Enclave: enclave, NoRecovery: noRecovery, EscrowTo: escrow}
			if pin.given() {
				secret, err := pin.read(a, "PIN")
				if err != nil {
					return err
				}
				params.PIN = secret
			}
			// The file is begun before the keystore is, so that a path that cannot be written stops the act.
			var out *output
			if recoveryOut != "" && recoveryOut != "-" {
				var err error
				if out, err = a.create(outFlags{path: recoveryOut}, false, modeSecret); err != nil {
					return err
				}
				defer out.abort()
			}
			var r proto.InitReply
			if err := a.call(c.Context(), proto.OpInit, &params, &r); err != nil {
				return err
			}
			if out != nil && len(r.RecoveryKey) > 0 {
				if err := a.keepSecret(out, r.RecoveryKey); err != nil {
					return err
				}
			}
			view := map[string]any{"store_id": r.StoreID, "slots": viewSlots(r.Slots)}
			if out == nil && len(r.RecoveryKey) > 0 {
				view["recovery_key"] = string(r.RecoveryKey)
			}
			return a.print(view, func(w io.Writer) {
				fields(w, "Store", r.StoreID)
				writeSlots(w, r.Slots)
				switch {
				case noRecovery:
					fmt.Fprintln(w, "\nThere is no recovery key. When the slots above are lost, so are the keys.")
				case out != nil:
					fmt.Fprintf(w, "\nThe recovery key is in %s. Keep it apart from this machine.\n", recoveryOut)
				default:
					fmt.Fprintf(w, "\nRecovery key, shown only now:\n\n    %s\n\nCopy it to paper and keep it apart from this machine.\n", r.RecoveryKey)
				}
			})
		},
	}, proto.OpInit)
	c.Flags().StringVar(&enclave, "enclave", "auto", "what guards the keystore: auto, keyring:file, ...")
	c.Flags().StringVar(&recoveryOut, "recovery-out", "", `write the recovery key to this file, "-" prints it`)
	c.Flags().BoolVar(&noRecovery, "no-recovery", false, "make no recovery key")
	c.Flags().StringArrayVar(&escrow, "escrow-to", nil, "age recipient that every backup is also encrypted to; repeat for more")
	pin.register(c, "pin", "the PIN of the enclave")
	c.MarkFlagsMutuallyExclusive("recovery-out", "no-recovery")
	return c
}

// keepSecret commits a file with a secret that exists nowhere else. When that fails the secret is printed rather than lost.
func (a *app) keepSecret(out *output, secret []byte) error {
	_, err := fmt.Fprintf(out, "%s\n", secret)
	if err == nil {
		err = out.commit()
	}
	if err != nil {
		fmt.Fprintf(a.stdout, "%s\n", secret)
		return fmt.Errorf("the secret could not be written and was printed instead: %w", err)
	}
	return nil
}

func trimText(b []byte) []byte { return []byte(strings.TrimSpace(string(b))) }
