package main

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/keystore"
)

func newStore(a *app) *cobra.Command {
	c := &cobra.Command{Use: "store", Short: "Verify and maintain the keystore"}
	c.AddCommand(newStoreVerify(a), newStoreCompact(a), newStoreRotateRoot(a), newStoreRotateEpoch(a))
	return c
}

// storeAct makes a command that runs one long operation on the whole store.
func (a *app) storeAct(c *cobra.Command, op, doing string) *cobra.Command {
	c.Args = exactArgs()
	c.RunE = func(c *cobra.Command, args []string) error {
		r, err := a.storeOp(c.Context(), op, doing)
		if err != nil {
			return err
		}
		return a.printReport(r)
	}
	return uses(c, op)
}

func (a *app) storeOp(ctx context.Context, op, doing string) (*proto.ProgressReply, error) {
	if _, err := a.dial(ctx); err != nil {
		return nil, err
	}
	p := a.waiting(doing)
	defer p.end()
	var r proto.ProgressReply
	err := a.call(ctx, op, &proto.Empty{}, &r)
	return &r, err
}

// printReport shows the outcome of a long operation. Damage is a failure.
func (a *app) printReport(r *proto.ProgressReply) error {
	err := a.print(viewProgress(r), func(w io.Writer) {
		for _, m := range r.Messages {
			fmt.Fprintln(w, printable(m))
		}
		for _, d := range r.Damaged {
			fmt.Fprintf(w, "damaged: %s\n", printable(d))
		}
		epoch := ""
		if r.Epoch > 0 {
			epoch = number(r.Epoch)
		}
		if r.Records > 0 || len(r.Damaged) > 0 {
			fields(w, "Records", number(r.Records), "Damaged", number(len(r.Damaged)), "Epoch", epoch)
		} else if len(r.Messages) == 0 {
			fields(w, "Done, epoch", epoch)
		}
	})
	if err == nil && len(r.Damaged) > 0 {
		err = withHint(fmt.Errorf("%d records are damaged; all others can be used", len(r.Damaged)), "restore them from a backup: kmsctl backup restore --help")
	}
	return err
}

func newStoreCompact(a *app) *cobra.Command {
	return a.storeAct(&cobra.Command{
		Use:   "compact",
		Short: "Give unused space of the database file back",
		Long:  "Give unused space of the database file back. This saves space and erases nothing; kmsctl store rotate-epoch erases.",
	}, proto.OpStoreCompact, "compacting")
}

func newStoreRotateRoot(a *app) *cobra.Command {
	return a.storeAct(&cobra.Command{
		Use:   "rotate-root",
		Short: "Replace the root key; no slot's device is needed",
	}, proto.OpRootRotate, "rotating the root key")
}

func newStoreRotateEpoch(a *app) *cobra.Command {
	return a.storeAct(&cobra.Command{
		Use:   "rotate-epoch",
		Short: "Begin a new epoch and so erase destroyed keys from the file",
		Long: `Re-encrypt the key table under a new epoch key. The old epoch key is forgotten, so that what the file system may still
hold of destroyed keys can no longer be opened by anybody who gets at this store's slots later. It can be interrupted and
goes on where it stopped. Backups made before still hold what was in them.`,
	}, proto.OpEpochRotate, "rotating the epoch")
}

func newStoreVerify(a *app) *cobra.Command {
	var dir string
	var secret recoveryFlags
	c := uses(&cobra.Command{
		Use:   "verify [flags]",
		Short: "Check every record of the keystore",
		Long: `Check every record of the keystore. Without --state-dir the daemon does it while it serves. With --state-dir the files are
checked without a daemon, which needs the recovery key or recovery shares; kmsd must not be running on them.`,
		Args: exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			if dir == "" {
				if secret.given() {
					return withHint(usagef("the daemon needs no recovery key to verify"), "add --state-dir D to check without a daemon")
				}
				r, err := a.storeOp(c.Context(), proto.OpStoreVerify, "verifying")
				if err != nil {
					return err
				}
				return a.printReport(r)
			}
			s, err := a.openOffline(c.Context(), dir, &secret)
			if err != nil {
				return err
			}
			defer s.Close()
			p := a.waiting("verifying")
			report, err := s.Verify(c.Context(), &keystore.Progress{})
			p.end()
			if err != nil {
				return err
			}
			r := proto.ProgressReply{Records: report.Versions, Epoch: uint64(s.Info().Epoch)}
			for _, d := range report.Damaged {
				text := d.Text
				if d.Ref.Name != "" {
					text = d.Ref.String() + ": " + text
				}
				r.Damaged = append(r.Damaged, text)
			}
			if report.Orphans > 0 {
				r.Messages = append(r.Messages, number(report.Orphans)+" records that no key owns")
			}
			if report.Unopened > 0 {
				r.Messages = append(r.Messages, number(report.Unopened)+" versions of closed namespaces could be checked from outside only")
			}
			return a.printReport(&r)
		},
	}, proto.OpStoreVerify)
	c.Flags().StringVar(&dir, "state-dir", "", "check this state directory without a daemon")
	secret.register(c)
	return c
}
