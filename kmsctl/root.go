package main

import (
	"fmt"

	"github.com/spf13/cobra"
)

// newRoot builds the command tree.
func newRoot(a *app) *cobra.Command {
	root := &cobra.Command{
		Use:   "kmsctl",
		Short: "Administer kmsd, the local key daemon",
		Long: `kmsctl talks to kmsd over a Unix socket. Private keys stay in the daemon.

A key is named APPLICATION[/REFERENCE...]; NAME@N is version N of it. "-" as a file is standard input or output, and a
command without --out writes its result alone to standard output.

Exit codes: 0 success, 1 refused or failed, 2 wrong usage, 3 the daemon cannot be reached, 4 the keystore is locked.`,
		Version:       version,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.NoArgs,
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return flagError(err) })
	flags := root.PersistentFlags()
	flags.StringVar(&a.socket, "socket", "", "socket of the daemon (default $KMSD_SOCKET, else the admin socket where it may be opened)")
	flags.BoolVar(&a.json, "json", false, "print JSON")
	flags.DurationVar(&a.timeout, "timeout", 0, "give up on an operation after this time (default: no limit)")

	const daemon, keys, hierarchy, use, certificates, formats, store = "daemon", "keys", "hierarchy", "use", "certificates", "formats", "store"
	root.AddGroup(
		&cobra.Group{ID: daemon, Title: "The daemon:"},
		&cobra.Group{ID: keys, Title: "Keys:"},
		&cobra.Group{ID: hierarchy, Title: "The hierarchy of applications:"},
		&cobra.Group{ID: use, Title: "Use of keys:"},
		&cobra.Group{ID: certificates, Title: "Certificates and packets:"},
		&cobra.Group{ID: formats, Title: "Formats of MOSIP, JOSE and COSE:"},
		&cobra.Group{ID: store, Title: "The store:"},
	)
	add := func(group string, commands ...*cobra.Command) {
		for _, c := range commands {
			c.GroupID = group
			root.AddCommand(c)
		}
	}
	add(daemon, newStatus(a), newDoctor(a), newWhoami(a), newCapabilities(a), newPing(a), newInit(a), newLock(a), newUnlock(a))
	add(keys, newKey(a), newPublic(a), newMap(a))
	add(hierarchy, newApplication(a), newMaster(a), newHierarchy(a), newExpiry(a), newWatch(a), newCRL(a), newClock(a))
	add(use, newSign(a), newVerify(a), newEncrypt(a), newDecrypt(a), newRewrap(a), newMAC(a), newMACVerify(a),
		newWrap(a), newUnwrap(a), newAgree(a), newDerive(a), newDataKey(a), newRandom(a), newBatch(a))
	add(certificates, newCert(a), newTrust(a), newPartner(a), newPacket(a), newMachine(a))
	add(formats, newMosip(a), newJWS(a), newJWE(a), newCOSE(a), newCWT(a), newCMS(a), newPIN(a), newHash(a), newZK(a))
	add(store, newSlot(a), newStore(a), newBackup(a), newAudit(a))

	finish(a, root)
	return root
}

// finish gives every command what cobra leaves to each: groups that refuse unknown verbs, and the note that a command has
// begun.
func finish(a *app, c *cobra.Command) {
	c.DisableFlagsInUseLine = true
	if run := c.RunE; run != nil {
		c.RunE = func(c *cobra.Command, args []string) error {
			a.running = true
			return run(c, args)
		}
	} else if c.Run == nil {
		c.Args = cobra.ArbitraryArgs
		c.RunE = func(c *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usagef("unknown command %q for %q", args[0], c.CommandPath())
			}
			if c.HasParent() {
				return usagef("%s needs a command", c.CommandPath())
			}
			return c.Help()
		}
	}
	for _, child := range c.Commands() {
		finish(a, child)
	}
}

// exactArgs is cobra.ExactArgs with the names of the arguments in the message.
func exactArgs(names ...string) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		if len(args) == len(names) {
			return nil
		}
		what := "no arguments"
		if len(names) > 0 {
			what = fmt.Sprint(names)
			what = what[1 : len(what)-1]
		}
		return usagef("%s takes %s", c.CommandPath(), what)
	}
}
