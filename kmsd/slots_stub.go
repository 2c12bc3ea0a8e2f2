package main

import (
	"context"
	"errors"
	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/keystore"
)

func initMain(args []string) int                             { return 1 }
func (d *daemon) unlockUnattended(ctx context.Context) error { return errors.New("not built yet") }

type slotKeeper struct{}
type initParams struct {
	Enclave    string
	NoRecovery bool
	PIN        []byte
	EscrowTo   []string
}
type addParams struct {
	Enclave, Label    string
	PIN               []byte
	Threshold, Shares uint32
}
type slotStatus struct {
	keystore.Slot
	Health enclave.Health
}

func (k *slotKeeper) create(context.Context, keystore.Config, initParams) (*keystore.Store, []byte, error) {
	return nil, nil, nil
}
func (k *slotKeeper) unlock(context.Context, *keystore.Store, uint32, enclave.Auth) error { return nil }
func (k *slotKeeper) list(ctx context.Context, s *keystore.Store) []slotStatus            { return nil }
func (k *slotKeeper) add(context.Context, *keystore.Store, addParams) (keystore.Slot, [][]byte, error) {
	return keystore.Slot{}, nil, nil
}
func (k *slotKeeper) remove(context.Context, *keystore.Store, uint32) error             { return nil }
func (k *slotKeeper) test(context.Context, *keystore.Store, uint32, enclave.Auth) error { return nil }
