package engine

import (
	"context"
	"time"

	"github.com/kmsd-project/kmsd/kmsd/audit"
)

// runCopier copies the entries of committed acts from the outbox of the store to the audit log.
func (e *Engine) runCopier(ctx context.Context) {
	retry := time.NewTimer(time.Hour)
	retry.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-e.wakeCopier:
			// The outbox is on disk already, and every copy costs an fsync of the log: let acts gather.
			select {
			case <-ctx.Done():
				return
			case <-time.After(copyGather):
			}
		case <-retry.C:
		}
		if err := e.copyOutbox(ctx); err != nil && ctx.Err() == nil {
			e.log.Warn("acts wait to be copied to the audit log", "error", err)
			retry.Reset(time.Second)
		}
	}
}

// copyGather is how long an act waits in the outbox for others.
const copyGather = 50 * time.Millisecond

// maxOutbox is more than an outbox ever has: entries that were copied leave it with the next commit. The first copy after
// a start has to see all of it.
const maxOutbox = 1 << 20

func (e *Engine) copyOutbox(ctx context.Context) error {
	s := e.store.Load()
	if s == nil || s.Locked() {
		return nil // Unlocked signals
	}
	waiting, err := s.Outbox(maxOutbox)
	if err != nil || len(waiting) == 0 {
		return err
	}
	entries := make([]audit.Sealed, len(waiting))
	for i, w := range waiting {
		entries[i] = audit.Sealed{Seq: w.Seq, Data: w.Data}
	}
	if err := e.audit.Copy(ctx, entries); err != nil {
		return err
	}
	return s.AckOutbox(waiting[len(waiting)-1].Seq)
}

// FlushAudit returns when everything that was done before is in the audit log on disk.
func (e *Engine) FlushAudit(ctx context.Context) error {
	if err := e.copyOutbox(ctx); err != nil {
		return err
	}
	return e.audit.Flush(ctx)
}
