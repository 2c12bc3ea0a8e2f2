package main

import (
	"errors"
	"fmt"
	"os/user"
	"path/filepath"
	"strconv"

	"github.com/kmsd-project/kmsd/enclave/helper"
)

// The ways in which helpers are started.
const (
	helpersChildren = "children" // by kmsd, through its spawner; they run as its own user
	helpersSockets  = "sockets"  // by systemd, each with its own user and sandbox
)

// Where the units of systemd put things, and who they run as.
const (
	systemHelpers = "/run/kmsd-helper"
	systemKeyring = "/var/lib/kmsd-keyring"

	systemKeyringUser = "kmsd-keyring"
	systemPKCS11User  = "kmsd-pkcs11"
)

// helperConfig says how the processes are reached that hold the drivers which kmsd does not load itself.
type helperConfig struct {
	Start        string `toml:"start"`         // children, or sockets, the default of the system
	Dir          string `toml:"dir"`           // sockets: the directory they are in
	KeyringState string `toml:"keyring_state"` // sockets: the state directory of kmsd-keyring
	KeyringUser  string `toml:"keyring_user"`  // sockets: name or number of the user of kmsd-keyring
	PKCS11User   string `toml:"pkcs11_user"`   // sockets: the same for kmsd-pkcs11
}

func (c *helperConfig) validate() error {
	switch c.Start {
	case "", helpersChildren, helpersSockets:
	default:
		return fmt.Errorf("%w: helpers.start %q is neither %s nor %s", errConfig, c.Start, helpersChildren, helpersSockets)
	}
	for key, dir := range map[string]string{"dir": c.Dir, "keyring_state": c.KeyringState} {
		if dir != "" && !filepath.IsAbs(dir) {
			return fmt.Errorf("%w: helpers.%s %q is not an absolute path", errConfig, key, dir)
		}
	}
	return nil
}

func (c *helperConfig) setDefaults(mode string) {
	start := helpersChildren
	if mode == modeSystem {
		start = helpersSockets
	}
	setDefault(&c.Start, start)
	setDefault(&c.Dir, systemHelpers)
	setDefault(&c.KeyringState, systemKeyring)
	setDefault(&c.KeyringUser, systemKeyringUser)
	setDefault(&c.PKCS11User, systemPKCS11User)
}

// uids returns who may be at the other end of a helper's socket. A helper need not be installed, and then its user need not exist.
func (c *helperConfig) uids() ([]uint32, error) {
	var uids []uint32
	for _, name := range []string{c.KeyringUser, c.PKCS11User} {
		number := name
		if _, err := strconv.ParseUint(name, 10, 31); err != nil {
			u, err := user.Lookup(name)
			if errors.As(err, new(user.UnknownUserError)) {
				continue
			}
			if err != nil {
				return nil, fmt.Errorf("%w: helpers: %w", errConfig, err)
			}
			number = u.Uid
		}
		n, err := strconv.ParseUint(number, 10, 31)
		if err != nil {
			return nil, fmt.Errorf("%w: helpers: uid of %q: %w", errConfig, name, err)
		}
		uids = append(uids, uint32(n))
	}
	return uids, nil
}

// helpers is how drivers in processes of their own are reached.
type helpers struct {
	helper.Dialer
	// keyringState is the state directory of the file backend of the keyring: kmsd's own where they are one user, else one that
	// is closed to kmsd.
	keyringState string
	spawner      *helper.Spawner // nil with sockets
}

// openHelpers prepares the way to the helpers. Where kmsd starts them itself, it must not hold a secret yet.
func openHelpers(c config) (*helpers, error) {
	if c.Helpers.Start == helpersSockets {
		uids, err := c.Helpers.uids()
		if err != nil {
			return nil, err
		}
		return &helpers{Dialer: helper.Sockets{Dir: c.Helpers.Dir, UID: uids}, keyringState: c.Helpers.KeyringState}, nil
	}
	s, err := helper.StartSpawner(helper.SpawnerConfig{Command: []string{"/proc/self/exe", "spawner"}})
	if err != nil {
		return nil, fmt.Errorf("start the spawner of helpers: %w", err)
	}
	return &helpers{Dialer: s, keyringState: c.StateDir, spawner: s}, nil
}

// Close ends the helpers that are kmsd's own.
func (h *helpers) Close() error {
	if h.spawner == nil {
		return nil
	}
	return h.spawner.Close()
}
