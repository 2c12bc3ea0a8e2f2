package main

import (
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/kmsd-project/kmsd/ipc"
)

// unitOf returns the systemd unit of p, from its cgroup (systemd names the innermost group of a service after its unit),
// or "" when there is none or it cannot be told.
func unitOf(p *ipc.Peer) string {
	f, err := os.Open(fmt.Sprintf("/proc/%d/cgroup", p.PID))
	if err != nil {
		return ""
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, 8192))
	if err != nil || !p.Alive() { // the number may have gone to another process before it was read
		return ""
	}
	return unitIn(string(b))
}

// unitIn finds the unit in the text of /proc/PID/cgroup (cgroups(7)): the last segment, in the unified hierarchy, that
// ends as a service or scope does.
func unitIn(cgroup string) string {
	for line := range strings.Lines(cgroup) {
		path, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "0::")
		if !ok {
			continue
		}
		segments := strings.Split(path, "/")
		for i := len(segments) - 1; i >= 0; i-- {
			s := segments[i]
			if (strings.HasSuffix(s, ".service") || strings.HasSuffix(s, ".scope")) && len(s) <= 256 {
				return s
			}
		}
	}
	return ""
}
