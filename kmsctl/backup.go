package main

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"filippo.io/age"
	"github.com/spf13/cobra"

	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

func newBackup(a *app) *cobra.Command {
	c := &cobra.Command{Use: "backup", Short: "Make, check and restore backups"}
	c.AddCommand(newBackupCreate(a), newBackupVerify(a), newBackupRestore(a))
	return c
}

func newBackupCreate(a *app) *cobra.Command {
	var recipients []string
	var out outFlags
	c := uses(&cobra.Command{
		Use:   "create --to RECIPIENT --out F",
		Short: "Write a backup, encrypted to age recipients",
		Long: `Write a backup of the whole keystore, encrypted to age recipients (age-keygen makes them) and to the escrow recipients
of the keystore. The daemon goes on serving meanwhile.`,
		Args: exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			file, err := a.create(out, true, modeSecret)
			if err != nil {
				return err
			}
			defer file.abort()
			var begun proto.BackupReply
			if err := a.call(c.Context(), proto.OpBackupCreate, &proto.BackupCreate{Recipients: recipients}, &begun); err != nil {
				return err
			}
			p := a.progressOf("backup", -1)
			defer p.end()
			written, err := a.drain(c.Context(), begun.Stream, file, p)
			if err != nil {
				return err
			}
			if err := file.commit(); err != nil {
				return err
			}
			p.end()
			if out.path == "-" {
				return nil // standard output is the backup
			}
			view := map[string]any{"bytes": written, "recipients": orEmpty(begun.Recipients)}
			return a.print(view, func(w io.Writer) {
				fmt.Fprintf(w, "%s written, %s, for %s\n", out.path, size(written), strings.Join(begun.Recipients, ", "))
			})
		},
	}, proto.OpBackupCreate, proto.OpStreamUpdate, proto.OpStreamAbort)
	c.Flags().StringArrayVar(&recipients, "to", nil, "age recipient (age1...); repeat for more")
	out.register(c)
	return c
}

// drain copies a stream of the daemon to w.
func (a *app) drain(ctx context.Context, stream uint64, w io.Writer, p *progress) (written int64, err error) {
	defer func() {
		if err != nil {
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
			defer cancel()
			a.call(ctx, proto.OpStreamAbort, &proto.StreamRef{Stream: stream}, &proto.Empty{})
		}
	}()
	for chunk := uint64(0); ; chunk++ {
		var data proto.StreamData
		if err := a.call(ctx, proto.OpStreamUpdate, &proto.StreamUpdate{Stream: stream, Chunk: chunk}, &data); err != nil {
			return written, err
		}
		n, err := w.Write(data.Data)
		written += int64(n)
		if err != nil {
			return written, err
		}
		if p.tty != nil {
			p.add(int64(n))
		}
		if data.Done {
			return written, nil
		}
	}
}

// identityFlags bring the age identities that open a backup.
type identityFlags struct{ files []string }

func (f *identityFlags) register(c *cobra.Command) {
	c.Flags().StringArrayVar(&f.files, "identity", nil, `age identity file that opens the backup, "-" is standard input; repeat for more`)
	c.MarkFlagRequired("identity")
}

func (f *identityFlags) read(a *app) ([]age.Identity, error) {
	var ids []age.Identity
	for _, path := range f.files {
		text, err := a.readFile(path, 1<<20)
		if err != nil {
			return nil, err
		}
		parsed, err := age.ParseIdentities(bytes.NewReader(text))
		clear(text)
		if err != nil {
			return nil, withHint(fmt.Errorf("%s: not an age identity file", path), "a file made by age-keygen holds AGE-SECRET-KEY-... lines")
		}
		ids = append(ids, parsed...)
	}
	return ids, nil
}

type manifestView struct {
	ID           string        `json:"id"`
	StoreID      string        `json:"store_id"`
	InstanceID   string        `json:"instance_id"`
	Created      string        `json:"created"`
	Epoch        uint32        `json:"epoch"`
	Generation   uint64        `json:"generation"`
	Keys         uint64        `json:"keys"`
	AuditHead    string        `json:"audit_head"`
	PolicyDigest string        `json:"policy_digest"`
	Escrow       []string      `json:"escrow"`
	Guarded      []guardedView `json:"guarded"`
}

// guardedView is a namespace that a device guarded where the backup was made.
type guardedView struct {
	Namespace string `json:"namespace"`
	Escrow    string `json:"escrow"`
	Opened    bool   `json:"opened"` // its keys can be used without the device: these identities open it
}

func viewManifest(m keystore.Manifest) manifestView {
	guarded := make([]guardedView, len(m.Guarded))
	for i, g := range m.Guarded {
		guarded[i] = guardedView{g.Name, string(g.Escrow), g.Opened}
	}
	return manifestView{
		hex.EncodeToString(m.ID[:]),
		hex.EncodeToString(m.StoreID[:]), hex.EncodeToString(m.InstanceID[:]), m.Created.UTC().Format(time.RFC3339), m.Epoch,
		m.Generation, m.Keys, hex.EncodeToString(m.AuditHead), hex.EncodeToString(m.PolicyDigest), orEmpty(m.Escrow), guarded,
	}
}

func writeManifest(w io.Writer, m keystore.Manifest) {
	fields(w, "Store", hex.EncodeToString(m.StoreID[:]), "Made", m.Created.Local().Format("2006-01-02 15:04:05"),
		"Epoch", number(m.Epoch), "Keys", number(m.Keys), "Escrow", strings.Join(m.Escrow, ", "))
	for _, g := range m.Guarded {
		switch {
		case g.Opened:
			fmt.Fprintf(w, "Namespace %s was guarded by a device: its escrow opens it without.\n", g.Name)
		case g.Escrow == keyspec.EscrowNone:
			fmt.Fprintf(w, "Namespace %s has no escrow: its keys can be used only with the device that guards it.\n", g.Name)
		default:
			fmt.Fprintf(w, "Namespace %s needs the device that guards it, or an identity of the escrow recipients.\n", g.Name)
		}
	}
}

func newBackupVerify(a *app) *cobra.Command {
	var in string
	var ids identityFlags
	c := &cobra.Command{
		Use:   "verify --in F --identity F",
		Short: "Prove that a backup can be restored, without restoring it",
		Long:  "Decrypt a backup and check every record in it, in a scratch directory that is removed again. No daemon is needed.",
		Args:  exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			identities, err := ids.read(a)
			if err != nil {
				return err
			}
			r, total, err := a.open(in)
			if err != nil {
				return err
			}
			defer r.Close()
			scratch, err := os.MkdirTemp("", "kmsctl-verify-")
			if err != nil {
				return err
			}
			defer os.RemoveAll(scratch)
			p := a.progressOf("verifying", total)
			m, err := keystore.VerifyBackup(c.Context(), p.reader(r), identities, scratch)
			p.end()
			if err != nil {
				return backupHint(err)
			}
			return a.print(viewManifest(m), func(w io.Writer) {
				writeManifest(w, m)
				fmt.Fprintln(w, "\nThe backup is complete and every record in it is intact.")
			})
		},
	}
	c.Flags().StringVar(&in, "in", "", `the backup, "-" is standard input`)
	c.MarkFlagRequired("in")
	ids.register(c)
	return c
}

func newBackupRestore(a *app) *cobra.Command {
	var in, dir, recoveryOut string
	var keepGuards bool
	var ids identityFlags
	c := &cobra.Command{
		Use:   "restore --in F --identity F --state-dir D --recovery-out F",
		Short: "Restore a backup into an empty state directory",
		Long: `Restore a backup into an empty state directory. No daemon is needed.

The slots of the old machine open nothing here. The restored keystore has one slot, for a fresh recovery key that is written
to --recovery-out. Start kmsd on the directory, open it with that key (kmsctl unlock) and enrol a slot of the new machine
(kmsctl slot add).

Namespaces that a device of the old machine guarded are opened by their escrow, if an identity of an escrow recipient is
given: in the restored keystore its slots alone protect their keys. Those without escrow can be used only with their device.`,
		Args: exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			identities, err := ids.read(a)
			if err != nil {
				return err
			}
			r, total, err := a.open(in)
			if err != nil {
				return err
			}
			defer r.Close()
			file, err := a.create(outFlags{path: recoveryOut}, false, modeSecret)
			if err != nil {
				return err
			}
			defer file.abort()
			config, err := a.storeConfig(dir)
			if err != nil {
				return err
			}
			slot, key, err := newRecoverySlot(c.Context(), "restored "+time.Now().Format(time.DateOnly))
			if err != nil {
				return err
			}
			defer clear(slot.Secret)
			defer clear(key)
			if err := os.MkdirAll(config.Dir, 0o700); err != nil {
				return err
			}
			// The recovery key is on disk before there is a keystore that only it opens.
			if _, err := fmt.Fprintf(file, "%s\n", key); err != nil {
				return err
			}
			if err := file.commit(); err != nil {
				return err
			}
			p := a.progressOf("restoring", total)
			s, m, err := keystore.Restore(c.Context(), p.reader(r), identities, config, []keystore.NewSlot{slot})
			p.end()
			if err != nil {
				if exists, existsErr := keystore.Exists(config.Dir); existsErr == nil && !exists || errors.Is(err, keystore.ErrStoreExists) {
					os.Remove(recoveryOut) // it opens nothing
				}
				return backupHint(offlineHint(err))
			}
			if !keepGuards {
				err = unguard(c.Context(), s, m.Guarded, identities)
			}
			if err := errors.Join(err, s.Close()); err != nil {
				return err
			}
			return a.print(viewManifest(m), func(w io.Writer) {
				writeManifest(w, m)
				fmt.Fprintf(w, "\nRestored into %s. The recovery key is in %s.\nNext: kmsd run --state-dir %s ..., kmsctl unlock --pin-file %s, kmsctl slot add keyring:file\n",
					dir, recoveryOut, dir, recoveryOut)
			})
		},
	}
	c.Flags().StringVar(&in, "in", "", `the backup, "-" is standard input`)
	c.Flags().StringVar(&dir, "state-dir", "", "empty or new directory for the keystore")
	c.Flags().StringVar(&recoveryOut, "recovery-out", "", "file for the fresh recovery key")
	c.Flags().BoolVar(&keepGuards, "keep-guards", false, "leave namespaces to the devices that guard them, for a machine that has these devices")
	for _, name := range []string{"in", "state-dir", "recovery-out"} {
		c.MarkFlagRequired(name)
	}
	ids.register(c)
	return c
}

// unguard makes namespaces usable without the devices that guarded them, as far as their escrow opens with these identities, and notes
// which are.
func unguard(ctx context.Context, s *keystore.Store, list []keystore.GuardedNamespace, ids []age.Identity) error {
	for i := range list {
		g := &list[i]
		if g.Escrow != keyspec.EscrowRecipients {
			continue
		}
		key, err := s.EscrowedNamespaceKey(g.Name, ids)
		if errors.Is(err, keystore.ErrNamespaceKey) {
			continue // they open the backup, but not this
		}
		if err == nil {
			err = s.UnguardNamespace(ctx, g.Name, key)
			clear(key)
		}
		if err != nil {
			return err
		}
		g.Opened = true
	}
	return nil
}

func backupHint(err error) error {
	var noMatch *age.NoIdentityMatchError
	if errors.As(err, &noMatch) {
		return withHint(errors.New("none of the identities opens this backup"), "use the identity of one of the recipients the backup was made for")
	}
	return err
}
