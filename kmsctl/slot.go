package main

import (
	"errors"
	"io"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/kmsd-project/kmsd/client"
	"github.com/kmsd-project/kmsd/ipc/proto"
)

func newSlot(a *app) *cobra.Command {
	c := &cobra.Command{Use: "slot", Short: "Manage the ways to open the keystore"}
	c.AddCommand(newSlotList(a), newSlotAdd(a), newSlotRemove(a), newSlotTest(a))
	return c
}

func writeSlots(w io.Writer, slots []proto.Slot) {
	rows := [][]string{{"SLOT", "KIND", "LABEL", "HEALTH", "CREATED", "PROTECTS"}}
	for _, s := range slots {
		health := s.Health
		if s.Until != 0 {
			health += " until " + stamp(s.Until)
		}
		rows = append(rows, []string{number(s.ID), s.Kind, s.Label, health, day(s.Created), s.Level})
	}
	table(w, rows)
}

func newSlotList(a *app) *cobra.Command {
	return uses(&cobra.Command{
		Use:   "list",
		Short: "List the slots",
		Args:  exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			var r proto.SlotListReply
			if err := a.call(c.Context(), proto.OpSlotList, &proto.Empty{}, &r); err != nil {
				return err
			}
			return a.print(viewSlots(r.Slots), func(w io.Writer) { writeSlots(w, r.Slots) })
		},
	}, proto.OpSlotList)
}

func newSlotAdd(a *app) *cobra.Command {
	var pin secretFlags
	var out outFlags
	var label string
	var threshold, shares uint32
	c := uses(&cobra.Command{
		Use:   "add SPEC [flags]",
		Short: "Enrol another way to open the keystore",
		Long: `Enrol another way to open the keystore. Each slot opens it by itself; what is enrolled is proved to work before it counts.

` + specHelp + `
  recovery             a printed key
  recovery:shares      a key in shares, any --threshold of --shares open it

A recovery key or its shares are shown once. With --out they go to that file, one per line. The slot is added only after that.`,
		Example: `  kmsctl slot add tpm:/dev/tpmrm0
  kmsctl slot add 'pkcs11:/usr/lib/softhsm/libsofthsm2.so?token=kmsd' --pin-file pin.txt
  kmsctl slot add recovery --label safe --out recovery.txt
  kmsctl slot add recovery:shares --threshold 2 --shares 3 --out shares.txt`,
		Args: exactArgs("SPEC"),
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
			return []cobra.Completion{"tpm:/dev/tpmrm0", "pkcs11:", "keyring:secret-service", "keyfile:", "keyring:file", "recovery", "recovery:shares"},
				cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveNoSpace
		},
		RunE: func(c *cobra.Command, args []string) error {
			params := proto.SlotAdd{Enclave: args[0], Label: label, Threshold: threshold, Shares: shares}
			if (args[0] == "recovery:shares") != (threshold > 0 && shares > 0) {
				return withHint(usagef("--threshold and --shares go with recovery:shares"), "kmsctl slot add recovery:shares --threshold 2 --shares 3")
			}
			if pin.given() {
				secret, err := pin.read(a, "PIN")
				if err != nil {
					return err
				}
				params.PIN = secret
			}
			var file *output
			if c.Flags().Changed("out") && out.path != "-" {
				var err error
				if file, err = a.create(out, false, modeSecret); err != nil {
					return err
				}
				defer file.abort()
			}
			var r proto.SlotAddReply
			if err := a.call(c.Context(), proto.OpSlotAdd, &params, &r); err != nil {
				return err
			}
			secrets := r.Secrets
			if len(r.Pending) > 0 {
				if err := a.showOnce(file, secrets, "Shown only now, keep apart from this machine and from each other:"); err != nil {
					return err
				}
				params = proto.SlotAdd{Confirm: r.Pending}
				r = proto.SlotAddReply{}
				if err := a.call(c.Context(), proto.OpSlotAdd, &params, &r); err != nil {
					return file.takeBack(err)
				}
			}
			view := map[string]any{"slot": viewSlot(r.Slot), "warnings": orEmpty(r.Warnings)}
			if file == nil && len(secrets) > 0 {
				var texts []string
				for _, s := range secrets {
					texts = append(texts, string(s))
				}
				view["secrets"] = texts
			}
			return a.print(view, func(w io.Writer) {
				writeSlots(w, []proto.Slot{r.Slot})
				writeWarnings(w, r.Warnings)
			})
		},
	}, proto.OpSlotAdd)
	out.register(c)
	c.Flags().StringVar(&label, "label", "", "a name for people")
	c.Flags().Uint32Var(&threshold, "threshold", 0, "shares needed to open (recovery:shares)")
	c.Flags().Uint32Var(&shares, "shares", 0, "shares made (recovery:shares)")
	pin.register(c, "pin", "the PIN of the device")
	return c
}

// specHelp lists what can guard a slot.
const specHelp = `What guards a slot is written
  tpm:/dev/tpmrm0      the TPM of this machine; tpm:unix:PATH is a software TPM. ?pcrs=7 ties the slot to the state of the boot,
                       ?signer=FILE&approvals=FILE to what a signer approves, ?guard=agreed guards it by key agreement
  pkcs11:MODULE?token=LABEL      an HSM or a smart card; it has a PIN
  keyring:secret-service         the keyring of the desktop session
  keyfile:PATH         a file on a medium that can be taken away
  keyring:file         a secret beside the keystore`

func parseSlot(s string) (uint32, error) {
	id, err := strconv.ParseUint(s, 10, 32)
	if err != nil || id == 0 {
		return 0, withHint(usagef("%q is not the number of a slot", s), "kmsctl slot list")
	}
	return uint32(id), nil
}

func newSlotRemove(a *app) *cobra.Command {
	var sure confirmFlags
	c := uses(&cobra.Command{
		Use:   "remove SLOT [flags]",
		Short: "Remove a slot and rotate the root key",
		Args:  exactArgs("SLOT"),
		RunE: func(c *cobra.Command, args []string) error {
			id, err := parseSlot(args[0])
			if err != nil {
				return err
			}
			if err := sure.confirm("Slot "+args[0]+" will no longer open this keystore.", args[0]); err != nil {
				return err
			}
			var r proto.SlotRemoveReply
			if err := a.call(c.Context(), proto.OpSlotRemove, &proto.SlotRef{ID: id}, &r); err != nil {
				var wire *proto.Error
				if errors.As(err, &wire) && wire.Code == proto.CodeState {
					err = withHint(err, "add another one first: kmsctl slot add recovery")
				}
				return err
			}
			return a.print(map[string]any{"removed": id, "warnings": orEmpty(r.Warnings)}, func(w io.Writer) {
				a.say("slot %d removed, the root key was rotated; older backups can still be opened through it", id)
				writeWarnings(w, r.Warnings)
			})
		},
	}, proto.OpSlotRemove)
	sure.register(c)
	return c
}

func newSlotTest(a *app) *cobra.Command {
	var pin secretFlags
	var shares []string
	c := uses(&cobra.Command{
		Use:   "test SLOT [flags]",
		Short: "Prove that a slot opens the keystore",
		Args:  exactArgs("SLOT"),
		RunE: func(c *cobra.Command, args []string) error {
			id, err := parseSlot(args[0])
			if err != nil {
				return err
			}
			params := proto.SlotRef{ID: id}
			for _, path := range shares {
				share, err := a.readFile(path, maxSecret)
				if err != nil {
					return err
				}
				params.Shares = append(params.Shares, trimText(share))
			}
			if pin.given() {
				if params.Secret, err = pin.read(a, ""); err != nil {
					return err
				}
			}
			err = a.call(c.Context(), proto.OpSlotTest, &params, &proto.Empty{})
			if errors.Is(err, client.ErrLocked) {
				return withHint(err, "open the keystore by this slot, which tests it too: kmsctl unlock --slot %d", id)
			}
			if err != nil {
				return err
			}
			return a.print(map[string]any{"slot": id, "opens": true}, func(io.Writer) { a.say("slot %d opens the keystore", id) })
		},
	}, proto.OpSlotTest)
	c.Flags().StringArrayVar(&shares, "share-file", nil, "a file with one recovery share; repeat for each share")
	pin.register(c, "pin", "the PIN or recovery key")
	c.MarkFlagsMutuallyExclusive("share-file", "pin-fd")
	c.MarkFlagsMutuallyExclusive("share-file", "pin-file")
	return c
}
