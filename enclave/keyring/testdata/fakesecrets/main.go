// Command fakesecrets is a Secret Service that misbehaves, for tests: as much of the API as the keyring library calls.
//
//	fakesecrets hang         answers nothing
//	fakesecrets answer       locked; its prompt is answered at once
//	fakesecrets never        locked; its prompt is never answered
//	fakesecrets dismiss      locked; its prompt is dismissed
//	fakesecrets nonsense     properties of the wrong types
//	fakesecrets other        has no collection "login"
package main

import (
	"fmt"
	"os"
	"sync"

	"github.com/godbus/dbus"
)

const (
	service    = "/org/freedesktop/secrets"
	collection = service + "/collection/login"
	prompt     = service + "/prompt/p1"
	none       = dbus.ObjectPath("/")
)

type secret struct {
	Session     dbus.ObjectPath
	Parameters  []byte
	Value       []byte
	ContentType string
}

type fake struct {
	mode string
	conn *dbus.Conn

	mu     sync.Mutex
	locked bool
	items  map[string]dbus.ObjectPath // by profile
}

func main() {
	conn, err := dbus.SessionBus()
	if err != nil {
		panic(err)
	}
	f := &fake{mode: os.Args[1], conn: conn, items: map[string]dbus.ObjectPath{}}
	f.locked = f.mode != "hang"
	if f.mode == "hang" {
		conn.Eavesdrop(make(chan *dbus.Message)) // swallows what comes
	}
	conn.Export(f, service, "org.freedesktop.Secret.Service")
	conn.Export(properties{f, service}, service, "org.freedesktop.DBus.Properties")
	conn.Export(f, collection, "org.freedesktop.Secret.Collection")
	conn.Export(properties{f, collection}, collection, "org.freedesktop.DBus.Properties")
	conn.Export(f, prompt, "org.freedesktop.Secret.Prompt")
	if f.mode == "hang" {
		// The answer would be swallowed too.
		conn.BusObject().Call("org.freedesktop.DBus.RequestName", dbus.FlagNoReplyExpected, "org.freedesktop.secrets", uint32(0))
	} else if _, err := conn.RequestName("org.freedesktop.secrets", 0); err != nil {
		panic(err)
	}
	select {}
}

type properties struct {
	*fake
	path string
}

func (p properties) Get(_, name string) (dbus.Variant, *dbus.Error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.mode == "nonsense" {
		return dbus.MakeVariant("nonsense"), nil
	}
	if name == "Locked" {
		return dbus.MakeVariant(p.locked), nil
	}
	all := []dbus.ObjectPath{collection}
	if p.mode == "other" {
		all[0] = service + "/collection/other"
	}
	return dbus.MakeVariant(all), nil
}

func (f *fake) OpenSession(string, dbus.Variant) (dbus.Variant, dbus.ObjectPath, *dbus.Error) {
	return dbus.MakeVariant(""), service + "/session/s1", nil
}

func (f *fake) Unlock([]dbus.ObjectPath) ([]dbus.ObjectPath, dbus.ObjectPath, *dbus.Error) {
	return nil, prompt, nil
}

func (f *fake) Prompt(client dbus.Sender, _ string) *dbus.Error {
	if f.mode == "never" {
		return nil
	}
	f.mu.Lock()
	f.locked = f.mode != "answer"
	f.mu.Unlock()
	// Straight to the one who asked, as gnome-keyring does it: the library subscribes to nothing.
	body := []any{f.mode == "dismiss", dbus.MakeVariant([]dbus.ObjectPath{})}
	go f.conn.Send(&dbus.Message{Type: dbus.TypeSignal, Body: body, Headers: map[dbus.HeaderField]dbus.Variant{
		dbus.FieldPath:        dbus.MakeVariant(dbus.ObjectPath(prompt)),
		dbus.FieldInterface:   dbus.MakeVariant("org.freedesktop.Secret.Prompt"),
		dbus.FieldMember:      dbus.MakeVariant("Completed"),
		dbus.FieldDestination: dbus.MakeVariant(string(client)),
		dbus.FieldSignature:   dbus.MakeVariant(dbus.SignatureOf(body...)),
	}}, nil)
	return nil
}

func (f *fake) SearchItems(attributes map[string]string) ([]dbus.ObjectPath, *dbus.Error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if path, ok := f.items[attributes["profile"]]; ok {
		return []dbus.ObjectPath{path}, nil
	}
	return []dbus.ObjectPath{}, nil
}

func (f *fake) CreateItem(p map[string]dbus.Variant, s secret, _ bool) (dbus.ObjectPath, dbus.ObjectPath, *dbus.Error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.locked {
		return none, none, &dbus.Error{Name: "org.freedesktop.Secret.Error.IsLocked", Body: []any{"locked"}}
	}
	profile := p["org.freedesktop.Secret.Item.Attributes"].Value().(map[string]string)["profile"]
	path := dbus.ObjectPath(fmt.Sprintf("%s/%d", collection, len(f.items)))
	f.items[profile] = path
	f.conn.Export(&item{f, s}, path, "org.freedesktop.Secret.Item")
	f.conn.Export(properties{f, string(path)}, path, "org.freedesktop.DBus.Properties")
	return path, none, nil
}

type item struct {
	*fake
	secret secret
}

func (i *item) GetSecret(session dbus.ObjectPath) (secret, *dbus.Error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.locked {
		return secret{}, &dbus.Error{Name: "org.freedesktop.Secret.Error.IsLocked", Body: []any{"locked"}}
	}
	return i.secret, nil
}
