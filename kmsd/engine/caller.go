package engine

import (
	"context"

	"github.com/kmsd-project/kmsd/policy"
)

// Caller is who asks, as the kernel describes it.
type Caller struct {
	UID, GID uint32
	Groups   []uint32
	PID      int32
	Unit     string // systemd unit, empty when there is none
	Admin    bool   // connected to the admin socket
	Via      string // the bridge the caller came through, empty for none
	Client   string // what its software calls itself, for the audit
}

// native is the word of a key's UsableVia for callers that came through no bridge.
const native = "native"

// TraceKey is the key of the context value, a string, by which the caller wants to find its request in the audit.
type TraceKey struct{}

func trace(ctx context.Context) string {
	s, _ := ctx.Value(TraceKey{}).(string)
	return s
}

func (c *Caller) facts() policy.Facts {
	return policy.Facts{UID: c.UID, GID: c.GID, Groups: c.Groups, Unit: c.Unit, Admin: c.Admin}
}
