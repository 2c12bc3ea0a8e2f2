package engine

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// errCompromised says that the use needs an explicit grant.
var errCompromised = errors.New("compromised")

// errForeign refuses what takes the private half of a key that is somebody else's.
var errForeign = fmt.Errorf("%w: only its owner has the private half", ErrUsage)

// current returns the number of the version that is used when none is named: Current, or a later one whose time has come
// meanwhile.
func current(key *keystore.Key, now time.Time) keyspec.Version {
	for i := len(key.Versions) - 1; i >= 0; i-- {
		v := &key.Versions[i]
		if v.Number <= key.Current {
			break
		}
		if v.State == keyspec.PreActive && !now.Before(v.NotBefore) {
			return v.Number
		}
	}
	return key.Current
}

// version returns version number of key, 0 being the current one.
func version(key *keystore.Key, number keyspec.Version, now time.Time) (*keystore.Version, error) {
	if number == 0 {
		number = current(key, now)
	}
	i, ok := slices.BinarySearchFunc(key.Versions, number, func(v keystore.Version, n keyspec.Version) int {
		return int(int64(v.Number) - int64(n))
	})
	if !ok {
		return nil, fmt.Errorf("%w: version %d", keystore.ErrNotFound, number)
	}
	return &key.Versions[i], nil
}

// stateAt returns the state of v at a time, which the scheduler may not have written down yet.
func stateAt(key *keystore.Key, v *keystore.Version, now time.Time) keyspec.State {
	if !v.DestroyAt.IsZero() && !now.Before(v.DestroyAt) {
		return keyspec.Destroyed
	}
	switch v.State {
	case keyspec.PreActive:
		if now.Before(v.NotBefore) {
			return keyspec.PreActive
		}
	case keyspec.Active: // so its time had come, even if the clock was set back since
	default:
		return v.State
	}
	if !v.Expires.IsZero() && !now.Before(v.Expires) || v.Number < current(key, now) {
		return keyspec.Deactivated
	}
	return keyspec.Active
}

// reachable refuses uses of a key that come another way than it was made for.
func reachable(key *keystore.Key, c *Caller) error {
	if len(key.UsableVia) == 0 || slices.Contains(key.UsableVia, cmp.Or(c.Via, native)) {
		return nil
	}
	return fmt.Errorf("%w: usable only via %s", ErrUsage, strings.Join(key.UsableVia, ", "))
}

// permit asks the rules of the key itself whether a version may be put to a usage now. The order of the questions decides
// which refusal the caller sees: what never is allowed before what is not allowed now.
func permit(key *keystore.Key, v *keystore.Version, usage keyspec.Usage, now time.Time) error {
	if !slices.Contains(key.Usages, usage) {
		return fmt.Errorf("%w: %s", ErrUsage, usage)
	}
	if key.Origin == keyspec.Foreign && usage != keyspec.Verify && usage != keyspec.Encrypt {
		return fmt.Errorf("%w: %s", errForeign, usage)
	}
	if !v.DestroyAt.IsZero() {
		return fmt.Errorf("%w: destruction is scheduled", ErrState)
	}
	state := stateAt(key, v, now)
	if state.Permits(usage) {
		if v.Number < key.MinVersion {
			return fmt.Errorf("%w: version %d is below the minimum %d", ErrState, v.Number, key.MinVersion)
		}
		return nil
	}
	switch {
	case state == keyspec.Compromised && (usage == keyspec.Decrypt || usage == keyspec.Unwrap):
		return errCompromised
	case state == keyspec.PreActive:
		return fmt.Errorf("%w: not valid before %s", ErrExpired, v.NotBefore.UTC().Format(time.RFC3339))
	case state == keyspec.Deactivated && v.State == keyspec.Active && v.Number == current(key, now):
		return fmt.Errorf("%w: expired at %s", ErrExpired, v.Expires.UTC().Format(time.RFC3339))
	}
	return fmt.Errorf("%w: %s", ErrState, state)
}
