package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"time"

	"github.com/godbus/dbus"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/enclave/helper"
	"github.com/kmsd-project/kmsd/enclave/keyring"
	"github.com/kmsd-project/kmsd/enclave/keyring/ring"
)

// answerTimeout bounds what the Secret Service does by itself, promptTimeout what a person is asked for.
const (
	answerTimeout = 10 * time.Second
	promptTimeout = 60 * time.Second
)

// The names of the Secret Service API, draft 0.2, and of the errors of the D-Bus specification that are told apart.
const (
	serviceName = "org.freedesktop.secrets"
	servicePath = "/org/freedesktop/secrets"

	collectionsProperty = "org.freedesktop.Secret.Service.Collections"
	lockedProperty      = "org.freedesktop.Secret.Collection.Locked"

	lockedError = "org.freedesktop.Secret.Error.IsLocked"
	busError    = "org.freedesktop.DBus.Error."
)

// secrets is one collection of the Secret Service. It implements keyring.Items.
//
// The library unlocks, with the keyring's own prompt, whatever it meets locked, makes a collection that it does not find, and waits for
// ever in both cases. So the service is asked first, on the library's own connection, and the library is let at it only when a
// deadline can be put to what will happen.
type secrets struct {
	collection string
	attended   bool // a person can answer a prompt
	answer     time.Duration
	prompt     time.Duration
	bus        *dbus.Conn
	ring       ring.Ring
}

// openSecrets opens the collection named in params. The service is asked nothing yet but a session; it need not be unlocked.
func openSecrets(ctx context.Context, params map[string]string) (*secrets, error) {
	s := &secrets{
		collection: keyring.DefaultCollection,
		attended:   os.Getenv("DISPLAY") != "" || os.Getenv("WAYLAND_DISPLAY") != "",
		answer:     answerTimeout,
		prompt:     promptTimeout,
	}
	if name := params[keyring.ParamCollection]; name != "" {
		s.collection = name
	}
	if strings.Trim(s.collection, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789") != "" {
		// Other characters are escaped in the path of a collection, and the library compares only some of the forms.
		return nil, &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: fmt.Sprintf("collection %q", s.collection), Remedy: "use one whose name has letters and digits only"}
	}
	for name, limit := range map[string]*time.Duration{keyring.ParamAnswer: &s.answer, keyring.ParamPrompt: &s.prompt} {
		if text := params[name]; text != "" {
			d, err := time.ParseDuration(text)
			if err != nil || d <= 0 {
				return nil, &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: "time for the " + name}
			}
			*limit = d
		}
	}
	err := within(ctx, s.answer, func() error {
		bus, err := dbus.SessionBus()
		if err != nil {
			// The library has dialed it already, when it was linked in, and does not try again. The next call starts another process.
			return &enclave.Error{Kind: enclave.ErrAbsent, Detail: "there is no session bus", Cause: err, // which names sockets and system calls
				Remedy: "start kmsd inside the user's session: systemctl --user start kmsd"}
		}
		s.bus = bus
		return nil
	})
	if err != nil {
		return nil, err
	}
	if _, err := s.locked(ctx); err != nil {
		return nil, err
	}
	err = within(ctx, s.answer, func() (err error) {
		s.ring, err = ring.System(s.collection)
		if errors.Is(err, ring.ErrNoBackend) { // all it says when opening fails
			return &enclave.Error{Kind: enclave.ErrAbsent, Detail: "the Secret Service opens no session", Remedy: "restart the keyring of the session"}
		}
		return err
	})
	return s, typed(err)
}

// Put stores an item. The service has written its file when it answers.
func (s *secrets) Put(ctx context.Context, name string, data []byte) error {
	return s.use(ctx, func() error { return s.ring.Set(name, data) })
}

// Get reads an item.
func (s *secrets) Get(ctx context.Context, name string) (data []byte, err error) {
	var got []byte // of the goroutine, until use says that it has ended
	err = s.use(ctx, func() (err error) {
		got, err = s.ring.Get(name)
		if err != nil && !errors.Is(err, ring.ErrNoItem) && kindOf(err) == nil {
			return &enclave.Error{Kind: enclave.ErrCorrupt, Detail: "the item in the keyring is not what kmsd stored", Remedy: remedyItem}
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return got, nil
}

// Remove removes an item.
func (s *secrets) Remove(ctx context.Context, name string) error {
	return s.use(ctx, func() error { return s.ring.Remove(name) })
}

// Binding is derived from the path of the collection. A collection has no identity besides: its time of creation is forgotten by
// gnome-keyring when that restarts. A new one in the place of the old lacks the item, and that is how it shows.
func (s *secrets) Binding(context.Context) (b [8]byte, err error) {
	sum := sha256.Sum256([]byte("kmsd secret-service collection\x00" + string(s.path())))
	return [8]byte(sum[:]), nil
}

// Health says whether a person must unlock the collection first.
func (s *secrets) Health(ctx context.Context) enclave.Health {
	locked, err := s.locked(ctx)
	switch {
	case err != nil:
		return enclave.HealthOf(err)
	case locked && s.attended:
		return enclave.Health{State: enclave.Locked, Detail: "the keyring asks for its password when it is needed"}
	case locked:
		return enclave.Health{State: enclave.Locked, Detail: "the keyring is locked and there is no display to ask on; " + remedyLocked}
	}
	return enclave.Health{State: enclave.Ready}
}

// Close does nothing: the connection is the library's, and ends with the process.
func (s *secrets) Close() error { return nil }

func (s *secrets) path() dbus.ObjectPath {
	return dbus.ObjectPath(servicePath + "/collection/" + s.collection)
}

// locked asks the service whether the collection is locked, without a prompt. A collection that is not there is ErrAbsent.
func (s *secrets) locked(ctx context.Context) (bool, error) {
	v, err := s.property(ctx, servicePath, collectionsProperty)
	if err != nil {
		return false, err
	}
	all, ok := v.Value().([]dbus.ObjectPath)
	if !ok {
		return false, &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: "the Secret Service lists no collections"}
	}
	found := false
	for _, path := range all {
		found = found || path == s.path()
	}
	if !found {
		return false, &enclave.Error{Kind: enclave.ErrAbsent, Detail: fmt.Sprintf("the Secret Service has no collection %q", s.collection),
			Remedy: "log in to the desktop with a password once, which makes it, or make it with the tool of the keyring"}
	}
	if v, err = s.property(ctx, s.path(), lockedProperty); err != nil {
		return false, err
	}
	locked, ok := v.Value().(bool)
	if !ok {
		return false, &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: "the Secret Service does not say whether it is locked"}
	}
	return locked, nil
}

// property reads a property; name is INTERFACE.MEMBER.
func (s *secrets) property(ctx context.Context, path dbus.ObjectPath, name string) (v dbus.Variant, err error) {
	dot := strings.LastIndexByte(name, '.')
	limited, cancel := context.WithTimeout(ctx, s.answer)
	defer cancel()
	err = s.bus.Object(serviceName, path).CallWithContext(limited, "org.freedesktop.DBus.Properties.Get", 0, name[:dot], name[dot+1:]).Store(&v)
	if ctx.Err() != nil {
		return v, &enclave.Error{Kind: enclave.ErrBusy, Detail: "the Secret Service", Cause: ctx.Err()}
	}
	if limited.Err() != nil && err != nil {
		return v, errSilent()
	}
	return v, typed(err)
}

// use lets the library at the collection, and the person at the prompt if it takes one.
func (s *secrets) use(ctx context.Context, do func() error) error {
	locked, err := s.locked(ctx)
	if err != nil {
		return err
	}
	limit := s.answer
	if locked {
		if !s.attended {
			return &enclave.Error{Kind: enclave.ErrLocked, Detail: "the keyring is locked and there is no display to ask on", Remedy: remedyLocked}
		}
		limit = s.prompt
	}
	err = within(ctx, limit, do)
	if err == nil || errors.Is(err, ring.ErrNoItem) {
		if err != nil {
			err = keyring.ErrNoItem
		}
		return err
	}
	if late := new(tooLate); errors.As(err, &late) {
		if !locked {
			return &helper.Spent{Err: errSilent()}
		}
		return &helper.Spent{Err: &enclave.Error{Kind: enclave.ErrLocked, Detail: fmt.Sprintf("nobody answered the keyring's prompt within %v", limit), Remedy: remedyPrompt}}
	}
	if locked && ctx.Err() == nil {
		if still, err := s.locked(ctx); err == nil && still {
			return &enclave.Error{Kind: enclave.ErrLocked, Detail: "the keyring's prompt was dismissed, or could not be shown", Remedy: remedyPrompt}
		}
	}
	return typed(err)
}

const (
	remedyLocked = "unlock it in the session of its user, or open the store with: kmsctl unlock"
	remedyItem   = "open the store with the recovery key, then enrol again with: kmsctl slot add " + keyring.SecretServiceKind
	remedyPrompt = "try again and answer the prompt, or open the store with: kmsctl unlock"
)

func errSilent() error {
	return &enclave.Error{Kind: enclave.ErrAbsent, Detail: "the Secret Service did not answer in time", Remedy: "restart the keyring of the session"}
}

// tooLate is the error of work that was still going on after its time.
type tooLate struct{}

func (*tooLate) Error() string { return "no answer in time" }

// within does work that knows no deadlines. When it is given up, it goes on, and the process is of no more use: the library's state is
// not to be touched, and a prompt that hangs in the air disappears with our connection.
func within(ctx context.Context, limit time.Duration, work func() error) error {
	limited, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- work() }()
	select {
	case err := <-done:
		return err
	case <-limited.Done():
		if ctx.Err() != nil {
			return &helper.Spent{Err: &enclave.Error{Kind: enclave.ErrBusy, Detail: "the Secret Service", Cause: ctx.Err()}}
		}
		return &tooLate{}
	}
}

// typed turns errors of the bus and of the library into those of package enclave. Texts of the service stay out.
func typed(err error) error {
	if err == nil {
		return nil
	}
	if e := kindOf(err); e != nil {
		return e
	}
	return &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: "the keyring library cannot make sense of what the Secret Service says"}
}

// kindOf is typed, nil for an error of the library's own.
func kindOf(err error) error {
	var failed dbus.Error
	switch {
	case errors.As(err, new(*enclave.Error)):
		return err
	case errors.As(err, new(*tooLate)):
		return &helper.Spent{Err: errSilent()}
	case errors.Is(err, dbus.ErrClosed), errors.Is(err, io.EOF), errors.As(err, new(net.Error)):
		return &helper.Spent{Err: &enclave.Error{Kind: enclave.ErrAbsent, Detail: "the connection to the session bus was lost", Remedy: "try again when the session is back"}}
	case !errors.As(err, &failed):
		return nil
	}
	switch name := failed.Name; {
	case name == lockedError:
		return &enclave.Error{Kind: enclave.ErrLocked, Detail: "the keyring is locked", Remedy: remedyLocked}
	case name == busError+"ServiceUnknown", name == busError+"NameHasNoOwner", strings.HasPrefix(name, busError+"Spawn."):
		return &enclave.Error{Kind: enclave.ErrAbsent, Detail: "nothing on the session bus is a Secret Service", Remedy: "start the keyring of the desktop, for example gnome-keyring-daemon"}
	case name == busError+"NoReply", name == busError+"Timeout", name == busError+"TimedOut", name == busError+"Disconnected":
		return errSilent()
	default:
		return &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: fmt.Sprintf("the Secret Service answers %.100q", name)}
	}
}
