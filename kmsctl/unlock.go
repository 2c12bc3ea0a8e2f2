package main

import (
	"errors"
	"io"

	"github.com/spf13/cobra"

	"github.com/kmsd-project/kmsd/client"
	"github.com/kmsd-project/kmsd/ipc/proto"
)

func newUnlock(a *app) *cobra.Command {
	var pin secretFlags
	var slot uint32
	var shares []string
	var auto, accept bool
	c := uses(&cobra.Command{
		Use:   "unlock",
		Short: "Open a locked keystore",
		Long: `Open a locked keystore with a PIN, a passphrase, a recovery key or recovery shares.

First the daemon tries the slots that need nobody, such as a device that has come back; with --auto it stays at that. Only
when none of them opens, a secret is asked for on the terminal. --pin-file and --pin-fd bring it without being asked, shares
come from files. A recovery key finds its slot by itself, and so does a PIN where only one slot has one; --slot names it otherwise. One
call makes one attempt: devices count wrong PINs.

When the keystore was put back to an older state, which a TPM notices, it stays locked. Find out who did that and what is missing before you
say --accept-rollback.`,
		Args: exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			params := proto.Unlock{Slot: slot, AcceptRollback: accept}
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
			case pin.given():
				secret, err := pin.read(a, "")
				if err != nil {
					return err
				}
				params.Secret = secret
			default:
				// Slots that need nobody come first: there may be nothing to ask for.
				first := a.call(c.Context(), proto.OpUnlock, &params, &proto.Empty{})
				if first == nil {
					return a.print(map[string]string{"state": "ready"}, func(io.Writer) { a.say("unlocked") })
				}
				if !needsPerson(first, slot) {
					return first
				}
				if !errors.Is(first, client.ErrLocked) { // why what opens by itself did not
					a.say("%v", first)
				}
				secret, err := pin.read(a, "PIN, passphrase or recovery key")
				if errors.Is(err, errNoTerminal) {
					return withHint(first, "%s", hintFor(err))
				}
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
	c.Flags().Uint32Var(&slot, "slot", 0, "use this slot (default: the one that the secret is for)")
	c.Flags().StringArrayVar(&shares, "share-file", nil, "a file with one recovery share; repeat for each share")
	c.Flags().BoolVar(&auto, "auto", false, "try the slots that need no secret")
	c.Flags().BoolVar(&accept, "accept-rollback", false, "go on with a keystore that was put back to an older state")
	pin.register(c, "pin", "the PIN, passphrase or recovery key")
	c.MarkFlagsMutuallyExclusive("share-file", "auto", "pin-fd")
	c.MarkFlagsMutuallyExclusive("share-file", "auto", "pin-file")
	return c
}

// needsPerson reports whether an attempt to unlock without a secret failed in a way that a secret may mend: the slot wants one, or, of no
// slot in particular, none opens by itself or the device of the one that would is not there.
func needsPerson(err error, slot uint32) bool {
	var wire *proto.Error
	if !errors.As(err, &wire) || wire.BackendState == proto.BackendCounter {
		return false
	}
	switch wire.Code {
	case proto.CodeLocked, proto.CodeAuthFailed:
		return true
	case proto.CodeLockedOut, proto.CodeAbsent, proto.CodeReplaced, proto.CodeMisconfigured, proto.CodeDamaged:
		return slot == 0
	}
	return false
}
