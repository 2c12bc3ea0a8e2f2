package enclave

import "errors"

// HealthOf turns the error of a driver into a state of health, for drivers that look at their device by talking to it. What may pass by
// itself is Absent; nil is Ready.
func HealthOf(err error) Health {
	if err == nil {
		return Health{State: Ready}
	}
	h := Health{State: Absent, Detail: err.Error()}
	var e *Error
	if errors.As(err, &e) {
		h.Until = e.Until
		if e.Remedy != "" {
			h.Detail += "; " + e.Remedy
		}
	}
	switch {
	case errors.Is(err, ErrLocked):
		h.State = Locked
	case errors.Is(err, ErrLockedOut):
		h.State = LockedOut
	case errors.Is(err, ErrReplaced):
		h.State = Replaced
	case errors.Is(err, ErrMisconfigured), errors.Is(err, ErrUnsupported), errors.Is(err, ErrCorrupt):
		h.State = Misconfigured
	}
	return h
}
