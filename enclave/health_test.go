package enclave

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"
)

func TestHealthOf(t *testing.T) {
	until := time.Unix(2000000000, 0)
	for _, test := range []struct {
		err  error
		want Health
	}{
		{nil, Health{State: Ready}},
		{&Error{Kind: ErrLocked, Detail: "d", Remedy: "r"}, Health{State: Locked, Detail: "d: needs to be unlocked by a person; r"}},
		{&Error{Kind: ErrLockedOut, Until: until}, Health{State: LockedOut, Until: until, Detail: ErrLockedOut.Error()}},
		{fmt.Errorf("x: %w", ErrReplaced), Health{State: Replaced, Detail: "x: " + ErrReplaced.Error()}},
		{ErrCorrupt, Health{State: Misconfigured, Detail: ErrCorrupt.Error()}},
		{ErrMisconfigured, Health{State: Misconfigured, Detail: ErrMisconfigured.Error()}},
		{ErrUnsupported, Health{State: Misconfigured, Detail: ErrUnsupported.Error()}},
		{ErrAbsent, Health{State: Absent, Detail: ErrAbsent.Error()}},
		{ErrBusy, Health{State: Absent, Detail: ErrBusy.Error()}},
		{context.DeadlineExceeded, Health{State: Absent, Detail: context.DeadlineExceeded.Error()}},
		{errors.New("whatever"), Health{State: Absent, Detail: "whatever"}},
	} {
		if got := HealthOf(test.err); got != test.want {
			t.Errorf("%v: %+v", test.err, got)
		}
	}
}
