package helper

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/ipc/proto"
)

// readFrame reads one frame, without its length word. The caller wipes it.
func readFrame(r io.Reader) ([]byte, error) {
	var length [4]byte
	if _, err := io.ReadFull(r, length[:]); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(length[:])
	if n > proto.MaxHelperFrame {
		return nil, fmt.Errorf("frame of %d bytes", n)
	}
	frame := make([]byte, n)
	if _, err := io.ReadFull(r, frame); err != nil {
		clear(frame)
		return nil, err
	}
	return frame, nil
}

// frameRoom is the capacity that frames are built in: enough for every message of the helper protocol, so that a frame is never copied
// to another place that nobody wipes.
const frameRoom = proto.MaxHelperFrame + 4

var frames = sync.Pool{New: func() any { return new([frameRoom]byte) }}

// withFrame lets build append a frame to an empty buffer and write send it, and wipes it.
func withFrame(build func([]byte) ([]byte, error), write func([]byte) error) error {
	room := frames.Get().(*[frameRoom]byte)
	defer frames.Put(room)
	frame, err := build(room[:0])
	if err != nil {
		clear(room[:]) // as far as it got
		return err
	}
	defer clear(frame)
	return write(frame)
}

// kinds are the errors that travel, by name. The first that fits goes: what a context ended comes before the state it was ended in, and
// an error that says more before one that says less. The names are for ever: a helper may be older than its daemon for the moment of
// an upgrade.
func kinds() []errorKind {
	return []errorKind{
		{"cancelled", context.Canceled},
		{"deadline", context.DeadlineExceeded},
		{"decryption", enclave.ErrDecryption},
		{"locked", enclave.ErrLocked},
		{"auth", enclave.ErrAuth},
		{"locked-out", enclave.ErrLockedOut},
		{"policy", enclave.ErrPolicy},
		{"absent", enclave.ErrAbsent},
		{"replaced", enclave.ErrReplaced},
		{"corrupt", enclave.ErrCorrupt},
		{"busy", enclave.ErrBusy},
		{"misconfigured", enclave.ErrMisconfigured},
		{"unsupported", enclave.ErrUnsupported},
	}
}

type errorKind struct {
	name string
	err  error
}

// What a frame takes, in bytes and in elements.
const (
	maxDetail   = 400
	maxWarnings = 16
)

// encodeFailure turns an error of a driver into what travels. A driver that breaks its promise to wrap a sentinel is reported as
// misconfigured, without its text, which might say anything.
func encodeFailure(err error) proto.HelperFailure {
	for _, kind := range kinds() {
		if !errors.Is(err, kind.err) {
			continue
		}
		f := proto.HelperFailure{Kind: kind.name}
		var e *enclave.Error
		if errors.As(err, &e) {
			f.Detail, f.Remedy = cut(e.Detail), cut(e.Remedy)
			if e.Cause != nil {
				f.Detail = cut(joined(e.Detail, e.Cause.Error()))
			}
			if !e.Until.IsZero() {
				f.Until = e.Until.Unix()
			}
		}
		return f
	}
	return proto.HelperFailure{Kind: "misconfigured", Detail: fmt.Sprintf("unexpected error of type %T", err)}
}

// decodeFailure is the way back; nil when there was no failure.
func decodeFailure(f proto.HelperFailure) error {
	if f.Kind == "" {
		return nil
	}
	e := &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: f.Detail, Remedy: f.Remedy}
	for _, kind := range kinds() {
		if kind.name == f.Kind {
			e.Kind = kind.err
		}
	}
	if f.Until != 0 {
		e.Until = time.Unix(f.Until, 0)
	}
	return e
}

func joined(a, b string) string {
	if a == "" {
		return b
	}
	return a + ": " + b
}

// cut shortens a text for people to what a frame takes.
func cut(s string) string {
	if len(s) > maxDetail {
		s = s[:maxDetail]
	}
	return strings.ToValidUTF8(s, "?")
}

func encodeInfo(e enclave.Enclave) proto.HelperInfo {
	info := e.Info()
	h := proto.HelperInfo{Kind: info.Kind, Level: cut(info.Level), Binding: cut(info.Binding), NeedsYou: info.NeedsYou}
	for _, w := range info.Warnings[:min(len(info.Warnings), maxWarnings)] {
		h.Warnings = append(h.Warnings, cut(w))
	}
	if _, ok := e.(enclave.Forgetter); ok {
		h.Features = append(h.Features, proto.HelperForget)
	}
	if r, ok := e.(enclave.Resident); ok {
		h.Features = append(h.Features, proto.HelperResident)
		h.MaxParallel = uint32(min(max(r.MaxParallel(), 1), maxParallel))
	}
	if _, ok := e.(enclave.Session); ok {
		h.Features = append(h.Features, proto.HelperSession)
	}
	return h
}

func decodeInfo(h proto.HelperInfo) enclave.Info {
	return enclave.Info{Kind: h.Kind, Level: h.Level, Binding: h.Binding, NeedsYou: h.NeedsYou, Warnings: h.Warnings}
}

// formatFailed and parseFailed carry an error from the spawner: the name of its sentinel, the detail and the remedy, each ended by a
// zero byte.
func formatFailed(err error) []byte {
	f := encodeFailure(err)
	return []byte(f.Kind + "\x00" + f.Detail + "\x00" + f.Remedy + "\x00")
}

func parseFailed(m []byte) error {
	parts := strings.SplitN(string(m), "\x00", 4)
	if len(parts) != 4 || parts[0] == "" {
		return spawnerGone(errors.New("unexpected answer"))
	}
	return decodeFailure(proto.HelperFailure{Kind: parts[0], Detail: cut(parts[1]), Remedy: cut(parts[2])})
}
