package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/enclave/recovery"
	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/secmem"
)

// recoveryFlags bring a recovery key or recovery shares to an act without a daemon.
type recoveryFlags struct {
	key            secretFlags
	shares         []string
	acceptRollback bool
}

func (f *recoveryFlags) register(c *cobra.Command) {
	f.key.register(c, "pin", "the recovery key")
	c.Flags().StringArrayVar(&f.shares, "share-file", nil, "a file with one recovery share; repeat for each share")
	c.Flags().BoolVar(&f.acceptRollback, "accept-rollback", false, "open the keystore although the counter it is bound to cannot be asked whether it is an old copy")
	c.MarkFlagsMutuallyExclusive("share-file", "pin-fd")
	c.MarkFlagsMutuallyExclusive("share-file", "pin-file")
}

func (f *recoveryFlags) given() bool { return f.key.given() || len(f.shares) > 0 }

func (f *recoveryFlags) read(a *app) (enclave.Auth, error) {
	var auth enclave.Auth
	for _, path := range f.shares {
		share, err := a.readFile(path, maxSecret)
		if err != nil {
			return enclave.Auth{}, err
		}
		auth.Shares = append(auth.Shares, bytes.TrimSpace(share))
	}
	if len(auth.Shares) > 0 {
		return auth, nil
	}
	secret, err := f.key.read(a, "Recovery key")
	if err != nil {
		return enclave.Auth{}, err
	}
	auth.Secret = secret
	return auth, nil
}

// storeConfig returns what the keystore needs in this short-lived process.
func (a *app) storeConfig(dir string) (keystore.Config, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return keystore.Config{}, err
	}
	arena, err := secmem.NewArena(64 << 10)
	if err != nil {
		return keystore.Config{}, err
	}
	return keystore.Config{Dir: dir, Arena: arena, Now: time.Now, Log: slog.New(slog.NewTextHandler(a.stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))}, nil
}

// openOffline opens the keystore in dir with a recovery key or shares.
func (a *app) openOffline(ctx context.Context, dir string, flags *recoveryFlags) (*keystore.Store, error) {
	config, err := a.storeConfig(dir)
	if err != nil {
		return nil, err
	}
	s, err := keystore.Open(ctx, config)
	if err != nil {
		return nil, offlineHint(err)
	}
	if err := a.unlockOffline(ctx, s, flags); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

func (a *app) unlockOffline(ctx context.Context, s *keystore.Store, flags *recoveryFlags) error {
	var slots []keystore.Slot
	for _, slot := range s.Slots() {
		if slot.Kind == recovery.Kind {
			slots = append(slots, slot)
		}
	}
	if len(slots) == 0 {
		return withHint(errors.New("this keystore has no recovery slot"), "start kmsd on it and use kmsctl store verify")
	}
	auth, err := flags.read(a)
	if err != nil {
		return err
	}
	secret := make([]byte, enclave.SecretSize)
	defer clear(secret)
	driver := recovery.New()
	defer driver.Close()
	for _, slot := range slots {
		if err = driver.Unwrap(ctx, slot.Blob, enclave.SlotAAD(slot.UUID), auth, secret); err == nil {
			return offlineHint(s.UnlockWith(ctx, slot.ID, secret, keystore.UnlockOptions{AcceptRollback: flags.acceptRollback}))
		}
	}
	return err
}

func offlineHint(err error) error {
	switch {
	case errors.Is(err, keystore.ErrInUse):
		return withHint(err, "kmsd runs on this directory: stop it, or leave --state-dir away and let it do the work")
	case errors.Is(err, keystore.ErrCounterAbsent):
		return withHint(err, "only kmsd asks the counter: leave --state-dir away, or say that you know these files to be the newest (--accept-rollback)")
	case errors.Is(err, keystore.ErrNoStore):
		return withHint(err, "give the state directory of kmsd with --state-dir")
	case errors.Is(err, keystore.ErrStoreExists):
		return withHint(err, "restore into an empty directory")
	}
	return err
}

// newRecoverySlot makes a slot for a fresh recovery key and returns the text of the key.
func newRecoverySlot(ctx context.Context, label string) (keystore.NewSlot, []byte, error) {
	key := recovery.NewKey()
	text := key.Text()
	driver := recovery.ForKey(key) // takes the key over
	defer driver.Close()
	slot := keystore.NewSlot{Kind: recovery.Kind, Location: recovery.Kind, Label: label, Secret: make([]byte, enclave.SecretSize)}
	rand.Read(slot.UUID[:])
	rand.Read(slot.Secret)
	info := driver.Info()
	slot.Level, slot.Binding = info.Level, info.Binding
	blob, err := driver.Wrap(ctx, slot.Secret, enclave.SlotAAD(slot.UUID))
	if err != nil {
		return keystore.NewSlot{}, nil, fmt.Errorf("recovery slot: %w", err)
	}
	slot.Blob = blob
	return slot, text, nil
}
