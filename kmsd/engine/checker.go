package engine

import (
	"context"
	"fmt"
	"time"
)

// Check is the full check of a store that was not stopped properly.
type Check struct {
	Done    bool
	Damaged int   // records
	Err     error // why it could not be carried out
}

// Warning says what the administrator should know of c; it is empty when everything is well.
func (c *Check) Warning() string {
	switch {
	case !c.Done:
		return "the last stop was not clean: the keystore is being checked"
	case c.Err != nil:
		return "the last stop was not clean, and the keystore could not be checked: run a verification"
	case c.Damaged > 0:
		return fmt.Sprintf("the last stop was not clean, and %d records of the keystore are damaged: run a verification", c.Damaged)
	}
	return ""
}

// Check returns the check of the keystore, nil when none was necessary.
func (e *Engine) Check() *Check { return e.check.Load() }

// checkDelay leaves the first second after a start to those who wait for it.
const checkDelay = time.Second

// runChecker checks the keystore once after an unclean stop.
func (e *Engine) runChecker(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-e.wakeChecker:
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(checkDelay):
		}
		e.checkStore(ctx)
	}
}

// checkStore verifies the store if its last stop was not clean and that has not been done yet.
func (e *Engine) checkStore(ctx context.Context) {
	s, err := e.opened()
	if err != nil || !s.Info().Unclean {
		return
	}
	if c := e.check.Load(); c != nil && c.Done && c.Err == nil {
		return
	}
	e.check.Store(&Check{})
	report, err := s.Verify(ctx, nil)
	c := &Check{Done: true, Damaged: len(report.Damaged), Err: err}
	e.check.Store(c)
	code, detail := "ok", fmt.Sprintf("after an unclean stop: %d keys, %d versions, %d damaged", report.Keys, report.Versions, c.Damaged)
	switch {
	case err != nil:
		code, detail = e.code(err), "after an unclean stop: "+err.Error()
		e.log.Warn("the keystore could not be checked", "error", err)
	case c.Damaged > 0:
		code = "damaged"
		e.log.Error("records of the keystore are damaged", "records", c.Damaged)
	}
	if err := e.noteDurable(context.WithoutCancel(ctx), "store_verify", code, detail); err != nil {
		e.log.Warn("the check of the keystore is not in the audit yet", "error", err)
	}
}
