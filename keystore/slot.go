package keystore

import "time"

// NewSlot describes a slot to be made.
type NewSlot struct {
	UUID                        [16]byte
	Kind, Label, Binding, Level string
	Location                    string // from which the driver is opened again, at most keyspec.MaxLocation bytes
	Secret                      []byte // 32 bytes, guarded by the device from then on; the caller wipes it
	Blob                        []byte // what the driver needs to give the secret back
}

// Slot is one way to open the store. Nothing in it is secret.
type Slot struct {
	ID                          uint32
	UUID                        [16]byte
	Kind, Label, Binding, Level string
	Location                    string
	Blob                        []byte
	Created                     time.Time
}
