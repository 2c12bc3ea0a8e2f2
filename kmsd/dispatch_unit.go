package main

import (
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kmsd-project/kmsd/ipc"
)

// unitOf returns the systemd unit of p, from its cgroup (systemd names the innermost group of a service after its unit),
// or "" when there is none or it cannot be told. It leaves nothing behind for the collector, because the memory that a
// thousand connections take is mostly what their handshakes have left.
func unitOf(p *ipc.Peer) string {
	fd, err := unix.Open("/proc/"+strconv.Itoa(int(p.PID))+"/cgroup", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return ""
	}
	defer unix.Close(fd)
	var text [4096]byte
	n, err := unix.Read(fd, text[:])                // the kernel writes it whole, up to a page
	if err != nil || n == len(text) || !p.Alive() { // the number may have gone to another process before it was read
		return ""
	}
	return unitIn(string(text[:n]))
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
				return strings.Clone(s)
			}
		}
	}
	return ""
}
