package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/kmsd-project/kmsd/ipc/proto"
)

func newInit(a *app) *cobra.Command {
	var pin secretFlags
	var enclave, recoveryOut string
	var noRecovery bool
	var escrow []string
	c := uses(&cobra.Command{
		Use:   "init",
		Short: "Make the keystore of a daemon that has none",
		Long: `Make the keystore of a running daemon that has none. "kmsd init" does the same without a running daemon.

` + specHelp + `

The recovery key opens the keystore when the device of every other slot is lost. It is shown once: write it to a file with
--recovery-out and keep that apart from this machine, or let it be printed on the terminal and copy it to paper. The keystore is made
only after that; when the connection breaks before, there is none.`,
		Example: "  kmsctl init --enclave tpm:/dev/tpmrm0 --recovery-out recovery.txt",
		Args:    exactArgs(),
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
			key := r.RecoveryKey
			if len(r.Pending) > 0 {
				err := a.showOnce(out, [][]byte{key}, "Recovery key, shown only now. Copy it to paper and keep it apart from this machine:")
				if err != nil {
					return err
				}
				params = proto.Init{Confirm: r.Pending}
				r = proto.InitReply{}
				if err := a.call(c.Context(), proto.OpInit, &params, &r); err != nil {
					return out.takeBack(err)
				}
			}
			view := map[string]any{"store_id": r.StoreID, "store_pin": r.StorePin, "slots": viewSlots(r.Slots), "warnings": orEmpty(r.Warnings)}
			if out == nil && len(key) > 0 {
				view["recovery_key"] = string(key)
			}
			return a.print(view, func(w io.Writer) {
				fields(w, "Store", r.StoreID, "Pin", r.StorePin)
				writeSlots(w, r.Slots)
				switch {
				case noRecovery:
					fmt.Fprintln(w, "\nThere is no recovery key. When the slots above are lost, so are the keys.")
				case out != nil:
					fmt.Fprintf(w, "\nThe recovery key is in %s. Keep it apart from this machine.\n", recoveryOut)
				}
				writeWarnings(w, r.Warnings)
			})
		},
	}, proto.OpInit)
	c.Flags().StringVar(&enclave, "enclave", "auto", "what guards the keystore: auto, tpm:/dev/tpmrm0, keyring:file, ...")
	c.Flags().StringVar(&recoveryOut, "recovery-out", "", `write the recovery key to this file, "-" prints it`)
	c.Flags().BoolVar(&noRecovery, "no-recovery", false, "make no recovery key")
	c.Flags().StringArrayVar(&escrow, "escrow-to", nil, "age recipient that every backup is also encrypted to; repeat for more")
	pin.register(c, "pin", "the PIN of the enclave")
	c.MarkFlagsMutuallyExclusive("recovery-out", "no-recovery")
	return c
}

// showOnce puts secrets that exist nowhere else into the file, or prints them; with --json they are part of the result instead. Nothing
// depends on them before the daemon has been told that this worked.
func (a *app) showOnce(out *output, secrets [][]byte, heading string) error {
	if out != nil {
		for _, s := range secrets {
			if _, err := fmt.Fprintf(out, "%s\n", s); err != nil {
				return err
			}
		}
		return out.commit()
	}
	if a.json {
		return nil
	}
	if _, err := fmt.Fprintf(a.stdout, "%s\n", heading); err != nil {
		return err
	}
	for _, s := range secrets {
		if _, err := fmt.Fprintf(a.stdout, "\n    %s\n", s); err != nil {
			return err
		}
	}
	_, err := fmt.Fprintln(a.stdout)
	return err
}

// takeBack removes the file of secrets when the daemon says that they belong to nothing. When it is not known whether they do, as after a
// broken connection, the file stays.
func (o *output) takeBack(err error) error {
	if o == nil || o.path == "" {
		return err
	}
	var wire *proto.Error
	if errors.As(err, &wire) && (wire.Code == proto.CodeInvalid || wire.Code == proto.CodeExists) {
		os.Remove(o.path)
		return err
	}
	return withHint(err, "kmsctl slot list tells whether what is in %s opens anything; keep it until you know", o.path)
}

func writeWarnings(w io.Writer, warnings []string) {
	for _, warning := range warnings {
		fmt.Fprintf(w, "\nwarning: %s\n", printable(warning))
	}
}

func trimText(b []byte) []byte { return []byte(strings.TrimSpace(string(b))) }
