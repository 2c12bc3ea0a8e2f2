package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/kmsd-project/kmsd/client"
	"github.com/kmsd-project/kmsd/ipc/proto"
)

func newMachineDB(a *app) *cobra.Command {
	c := &cobra.Command{Use: "db-conf", Short: "Read and write db.conf, which opens the database of a registration machine"}
	c.AddCommand(newMachineDBShow(a), newMachineDBSet(a))
	return c
}

// databaseView is the plain content of db.conf. It is a secret, so it goes to files with mode 0600, descriptors and terminals only.
type databaseView struct {
	BootPassword string `json:"bootPassword"`
	User         string `json:"user"`
	Password     string `json:"password"`
	Encrypted    bool   `json:"encrypted"` // the last field, 0 or 1: the database is encrypted under bootPassword already
}

// maxDatabaseFile bounds both forms of db.conf in bytes.
const maxDatabaseFile = 4 << 10

func newMachineDBShow(a *app) *cobra.Command {
	var name, in string
	var out outFlags
	var fd int
	var reveal bool
	c := uses(&cobra.Command{
		Use:   "show --in DB.CONF [--out F | --out-fd N | --reveal]",
		Short: "Read db.conf",
		Long: `Read db.conf. Without a flag that says where to, the two passwords stay hidden: --out writes all four fields to a new file with mode 0600, --out-fd to
a descriptor, as JSON; --reveal shows them on the terminal.`,
		Args: exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			if out.path == "-" {
				return usagef("--out takes a file; --out-fd 3 3>F a descriptor")
			}
			if reveal && (a.json || terminal(a.stdout) == nil) {
				return withHint(usagef("--reveal is for a terminal"), "--out F writes to a file with mode 0600, --out-fd 3 3>F to a descriptor")
			}
			m, err := a.machine(c.Context(), name)
			if err != nil {
				return err
			}
			file, err := a.readFile(in, maxDatabaseFile)
			if err != nil {
				return err
			}
			d, err := m.OpenDatabase(c.Context(), file)
			if errors.Is(err, client.ErrDecryption) {
				return withHint(err, "another machine's, or the file was changed")
			}
			if err != nil {
				return err
			}
			defer d.Wipe()
			view := databaseView{string(d.BootPassword), string(d.User), string(d.Password), d.Encrypted}
			if out.path != "" || fd >= 0 {
				if err := a.writeDatabase(out, fd, view); err != nil {
					return err
				}
			}
			shown := map[string]any{"user": view.User, "encrypted": view.Encrypted}
			return a.print(shown, func(w io.Writer) {
				boot, password := "(hidden)", "(hidden)"
				if reveal {
					boot, password = view.BootPassword, view.Password
				}
				fields(w, "Boot password", boot, "User", view.User, "Password", password, "Encrypted", fmt.Sprint(view.Encrypted))
			})
		},
	}, proto.OpMachineShow, proto.OpDecrypt)
	a.machineFlag(c, &name)
	c.Flags().StringVar(&in, "in", "", "db.conf")
	c.MarkFlagRequired("in")
	c.Flags().StringVar(&out.path, "out", "", "new file for the four fields, mode 0600")
	c.Flags().BoolVar(&out.force, "force", false, "replace an existing file")
	c.Flags().IntVar(&fd, "out-fd", -1, "write the four fields to this file descriptor")
	c.Flags().BoolVar(&reveal, "reveal", false, "show the passwords on the terminal")
	c.MarkFlagsMutuallyExclusive("out", "out-fd", "reveal")
	return c
}

// writeDatabase writes the four fields to a file or a descriptor.
func (a *app) writeDatabase(out outFlags, fd int, view databaseView) error {
	var b bytes.Buffer
	if err := writeJSON(&b, view); err != nil {
		return err
	}
	defer clear(b.Bytes())
	if fd >= 0 {
		f := os.NewFile(uintptr(fd), fmt.Sprintf("descriptor %d", fd))
		if f == nil {
			return usagef("--out-fd: not a descriptor")
		}
		defer f.Close()
		_, err := f.Write(b.Bytes())
		return err
	}
	o, err := a.create(out, false, modeSecret)
	if err != nil {
		return err
	}
	defer o.abort()
	if _, err := o.Write(b.Bytes()); err != nil {
		return err
	}
	return o.commit()
}

func newMachineDBSet(a *app) *cobra.Command {
	var name string
	var secret secretFlags
	var out outFlags
	var generate, encrypted bool
	c := uses(&cobra.Command{
		Use:   "set --out DB.CONF [--fields-file F | --fields-fd N | --generate] [flags]",
		Short: "Write db.conf",
		Long: `Write db.conf, atomically. The four fields are what show --out wrote, in a file or from a descriptor; with --generate they are made, as MOSIP's client makes
them on a new machine; else they are asked for on the terminal. There is no flag for a password, because arguments can be read by every process.`,
		Args: exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			if generate && secret.given() {
				return usagef("--generate makes the fields")
			}
			m, err := a.machine(c.Context(), name)
			if err != nil {
				return err
			}
			var d *client.MachineDatabase
			switch {
			case generate:
				d = client.NewMachineDatabase()
				d.Encrypted = encrypted
			case secret.given():
				if c.Flags().Changed("encrypted") {
					return usagef("--encrypted is one of the fields")
				}
				d, err = a.readDatabase(&secret)
			default:
				d, err = askDatabase(encrypted)
			}
			if err != nil {
				return err
			}
			defer d.Wipe()
			file, err := m.SealDatabase(d)
			if err != nil {
				return err
			}
			return a.writeResult(out, "db_conf", map[string]any{"user": string(d.User), "encrypted": d.Encrypted}, file, false, modeSecret)
		},
	}, proto.OpMachineShow)
	a.machineFlag(c, &name)
	secret.register(c, "fields", "the four fields, as show --out wrote them,")
	out.register(c)
	c.Flags().BoolVar(&generate, "generate", false, "make new passwords")
	c.Flags().BoolVar(&encrypted, "encrypted", false, "the database is encrypted under the boot password already")
	return c
}

// readDatabase reads the four fields as writeDatabase wrote them.
func (a *app) readDatabase(s *secretFlags) (*client.MachineDatabase, error) {
	text, err := s.read(a, "")
	if err != nil {
		return nil, err
	}
	defer clear(text)
	var v databaseView
	decoder := json.NewDecoder(bytes.NewReader(text))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&v); err != nil || decoder.More() {
		return nil, withHint(errors.New("these are not the fields of db.conf"), `{"bootPassword": "...", "user": "...", "password": "...", "encrypted": false}`)
	}
	return &client.MachineDatabase{BootPassword: []byte(v.BootPassword), User: []byte(v.User), Password: []byte(v.Password), Encrypted: v.Encrypted}, nil
}

// askDatabase asks for the fields on the terminal.
func askDatabase(encrypted bool) (*client.MachineDatabase, error) {
	d := &client.MachineDatabase{Encrypted: encrypted}
	for _, f := range []struct {
		prompt string
		into   *[]byte
	}{{"Boot password", &d.BootPassword}, {"User", &d.User}, {"Password", &d.Password}} {
		text, err := askSecret(f.prompt)
		if errors.Is(err, errNoTerminal) {
			return nil, withHint(err, "give the fields with --fields-file F, or --fields-fd 3 3<F, or --generate")
		}
		if err != nil {
			return nil, err
		}
		*f.into = text
	}
	return d, nil
}
