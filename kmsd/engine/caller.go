package engine

import "github.com/kmsd-project/kmsd/policy"

// Caller is who asks, as the kernel describes it.
type Caller struct {
	UID, GID uint32
	Groups   []uint32
	PID      int32
	Unit     string // systemd unit, empty when there is none
	Admin    bool   // connected to the admin socket
	Via      string // the bridge the caller came through, empty for none
}

func (c *Caller) facts() policy.Facts {
	return policy.Facts{UID: c.UID, GID: c.GID, Groups: c.Groups, Unit: c.Unit, Admin: c.Admin}
}
