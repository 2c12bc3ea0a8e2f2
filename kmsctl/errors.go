package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/kmsd-project/kmsd/client"
	"github.com/kmsd-project/kmsd/ipc/proto"
)

// The exit codes. Scripts rely on them.
const (
	exitOK          = 0
	exitFailed      = 1
	exitUsage       = 2
	exitUnreachable = 3
	exitLocked      = 4
)

// errUsage is what every error of a wrong command line wraps.
var errUsage = errors.New("wrong usage")

// usageError is an error of the command line.
type usageError struct{ cause error }

func (e *usageError) Error() string   { return e.cause.Error() }
func (e *usageError) Unwrap() []error { return []error{errUsage, e.cause} }

func usagef(format string, args ...any) error { return &usageError{fmt.Errorf(format, args...)} }

// flagError says what a flag takes where the parser would tell the name of its own function.
func flagError(err error) error {
	var wrong *strconv.NumError
	if !errors.As(err, &wrong) {
		return err
	}
	takes := map[string]string{"ParseUint": "it takes a whole number from 0", "ParseInt": "it takes a whole number", "ParseBool": "it takes true or false"}[wrong.Func]
	if errors.Is(err, strconv.ErrRange) {
		takes = "that number is too large"
	}
	what, _, _ := strings.Cut(err.Error(), ": strconv.")
	return usagef("%s: %s", what, takes)
}

func asUsage(err error) error {
	if errors.Is(err, errUsage) {
		return err
	}
	return &usageError{err}
}

// hintError carries the next command to type.
type hintError struct {
	cause error
	hint  string
}

func (e *hintError) Error() string { return e.cause.Error() }
func (e *hintError) Unwrap() error { return e.cause }

func withHint(err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	return &hintError{err, fmt.Sprintf(format, args...)}
}

func exitCode(err error) int {
	var wire *proto.Error
	switch {
	case errors.Is(err, errUsage):
		return exitUsage
	case errors.Is(err, client.ErrUnreachable):
		return exitUnreachable
	case errors.As(err, &wire) && wire.Code == proto.CodeLocked:
		return exitLocked
	}
	return exitFailed
}

// hintFor returns the hint of err: the one given where it arose, else the one of its wire code.
func hintFor(err error) string {
	var h *hintError
	if errors.As(err, &h) {
		return h.hint
	}
	var wire *proto.Error
	if errors.As(err, &wire) {
		if wire.Remedy != "" {
			return wire.Remedy
		}
		return wireHint(wire)
	}
	switch {
	case errors.Is(err, client.ErrUnreachable):
		return "is kmsd running? start it with: kmsd run, or name its socket with --socket"
	case errors.Is(err, context.DeadlineExceeded):
		return "give it more time with --timeout"
	}
	return ""
}

// wireHint is the one table of remedies by wire code.
func wireHint(e *proto.Error) string {
	switch e.Code {
	case proto.CodeLocked:
		return "kmsctl unlock"
	case proto.CodeUninitialised:
		return "kmsctl init"
	case proto.CodeNotAvailable:
		return "the key does not exist or you have no grant for it: kmsctl key list, kmsctl whoami"
	case proto.CodeExists:
		return "choose another name, or make a new version: kmsctl key rotate NAME"
	case proto.CodeState:
		return "kmsctl key show NAME tells the state of each version"
	case proto.CodeUsage:
		return "kmsctl key show NAME tells the usages; a usage is fixed when the key is created"
	case proto.CodeExpired:
		return "kmsctl key rotate NAME"
	case proto.CodeExhausted:
		return "kmsctl key show NAME tells whether uses are left: an administrator allows more with kmsctl key set NAME --uses N; otherwise kmsctl key rotate NAME"
	case proto.CodeConflict:
		return "somebody changed it meanwhile: look again with kmsctl key show NAME, then repeat"
	case proto.CodeDecryptionFailed:
		return "wrong key, wrong --aad-file, or the data was changed"
	case proto.CodeVerificationFailed:
		return "wrong key, wrong --scheme or --encoding, or the data was changed"
	case proto.CodeUnknownOp:
		return "this is an operation of the admin socket: kmsctl --socket .../admin.sock"
	case proto.CodeUnsupported:
		return "kmsctl capabilities"
	case proto.CodeBusy:
		return fmt.Sprintf("repeat in %v", time.Duration(e.RetryAfterMS)*time.Millisecond)
	case proto.CodeDeadline:
		return "give it more time with --timeout"
	case proto.CodeAuthFailed:
		return "kmsctl slot list tells what each slot expects"
	case proto.CodeAbsent, proto.CodeLockedOut, proto.CodeReplaced, proto.CodeMisconfigured:
		return "kmsctl doctor"
	case proto.CodeRollback:
		return "find out who put the old files back; bring the newest ones, or go on with these: kmsctl unlock --accept-rollback"
	case proto.CodeDamaged:
		return "kmsctl store verify"
	case proto.CodeClock:
		return "set the clock right; if it is right and the keystore has seen a wrong time: kmsctl clock accept"
	case proto.CodeStorage:
		return "look at the free space of the state directory and at kmsctl doctor"
	case proto.CodeVersion:
		return "kmsctl and kmsd are of different releases"
	}
	return ""
}

// printError prints err for people, or as one JSON object with --json.
func (a *app) printError(err error) {
	if terminal(a.stderr) != nil {
		fmt.Fprint(a.stderr, "\r\x1b[K") // over a line of progress
	}
	if a.json {
		report := errorView{Code: "failed", Message: err.Error(), Hint: hintFor(err)}
		var wire *proto.Error
		switch {
		case errors.As(err, &wire):
			report.Code, report.RetryAfterMS, report.DetailID = string(wire.Code), wire.RetryAfterMS, wire.DetailID
			report.BackendState = wire.BackendState
		case errors.Is(err, errUsage):
			report.Code = "usage"
		case errors.Is(err, client.ErrUnreachable):
			report.Code = "unreachable"
		}
		writeJSON(a.stderr, map[string]errorView{"error": report})
		return
	}
	fmt.Fprintf(a.stderr, "kmsctl: %s\n", printable(strings.TrimSpace(err.Error())))
	if hint := hintFor(err); hint != "" {
		fmt.Fprintf(a.stderr, "hint: %s\n", hint)
	}
}

type errorView struct {
	Code         string `json:"code"`
	Message      string `json:"message"`
	Hint         string `json:"hint,omitempty"`
	RetryAfterMS uint64 `json:"retry_after_ms,omitempty"`
	DetailID     string `json:"detail_id,omitempty"`
	BackendState string `json:"backend_state,omitempty"`
}
