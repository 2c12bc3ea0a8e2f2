package main

import (
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// systemd restarts a service that does not answer its watchdog.
func TestWatchdogIsAnswered(t *testing.T) {
	dir := t.TempDir()
	notify := filepath.Join(dir, "notify")
	n, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: notify, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	n.SetReadDeadline(time.Now().Add(20 * time.Second))
	t.Setenv("NOTIFY_SOCKET", notify)
	t.Setenv("WATCHDOG_USEC", "300000")
	startDaemon(t, dir).ready()
	b := make([]byte, 4096)
	for answers := 0; answers < 3; {
		k, err := n.Read(b)
		if err != nil {
			t.Fatalf("systemd has %d answers: %v", answers, err)
		}
		if strings.Contains(string(b[:k]), "WATCHDOG=1") {
			answers++
		}
	}
}
