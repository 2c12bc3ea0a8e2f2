package main

import (
	"errors"
	"log/slog"
	"strings"
	"testing"

	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/kmsd/engine"
)

// A defect in the making of a backup ends that backup with a typed error, and nothing else.
func TestPanicOfABackupIsCaught(t *testing.T) {
	var log strings.Builder
	d := &daemon{log: slog.New(slog.NewTextHandler(&log, nil))}
	b := d.backup(nil, keystore.BackupOptions{}) // of no keystore: a nil dereference on the goroutine that writes it
	defer b.Close()
	if data, done, err := b.read(0); !errors.Is(err, engine.ErrInternal) || done || len(data) > 0 {
		t.Errorf("%d bytes, %v, %v", len(data), done, err)
	}
	if n := d.panics.Load(); n != 1 || !strings.Contains(log.String(), "the backup panicked") {
		t.Errorf("%d panics counted, log %q", n, log.String())
	}
}
