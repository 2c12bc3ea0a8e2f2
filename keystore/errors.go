package keystore

import (
	"errors"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// Errors of the store. They are wrapped with what they are about, never with a secret.
var (
	ErrNotFound        = errors.New("no such key")
	ErrExists          = errors.New("exists already")
	ErrConflict        = errors.New("was changed by someone else")
	ErrInvalid         = errors.New("the change does not make a well-formed key")
	ErrLocked          = errors.New("the keystore is locked")
	ErrDamaged         = errors.New("the keystore is damaged")
	ErrRollback        = errors.New("the keystore was put back to an older state")
	ErrCounterAbsent   = errors.New("the counter that tells whether the keystore is an old copy cannot be asked")
	ErrNamespaceClosed = errors.New("the namespace is closed: the device that guards it has to open it")
	ErrNamespaceKey    = errors.New("the key is not the wrapping key of the namespace")
	ErrGuard           = errors.New("the guard of the namespace cannot be changed like this")
	ErrForeign         = errors.New("the slot was enrolled for another keystore: these files are not the ones it was made for")
	ErrNewer           = errors.New("written by a newer release")
	ErrNoStore         = errors.New("there is no keystore")
	ErrStoreExists     = errors.New("there is a keystore already")
	ErrPermissions     = errors.New("the keystore's files are open to others")
	ErrInUse           = errors.New("the keystore is in use by another process")
	ErrSecret          = errors.New("the secret does not open the slot")
	ErrLastSlot        = errors.New("the last slot cannot be removed")
	ErrNoSlot          = errors.New("no such slot")
	ErrTooLarge        = errors.New("too large")
	ErrStorage         = errors.New("the storage failed")
	ErrClosed          = errors.New("the keystore is closed")
	ErrBackup          = errors.New("not a usable backup")
)

// DuplicateError is returned by Apply when a commit with the same request key was applied within the last 24 hours. Nothing
// was changed.
type DuplicateError struct {
	Ref keyspec.Ref // the first key of the earlier commit, at the version that was current then
}

func (e *DuplicateError) Error() string {
	return "the request was carried out before, for key " + e.Ref.String()
}
