package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/pelletier/go-toml/v2"

	"github.com/kmsd-project/kmsd/enclave/pkcs11"
	"github.com/kmsd-project/kmsd/enclave/recovery"
	"github.com/kmsd-project/kmsd/enclave/tpm"
	"github.com/kmsd-project/kmsd/kmsd/engine"
	"github.com/kmsd-project/kmsd/policy"
)

// The modes of kmsd.
const (
	modeUser   = "user"
	modeSystem = "system"
)

// systemState is the default state directory of the system daemon.
const systemState = "/var/lib/kmsd"

// maxConfig is the size of the largest configuration file in bytes.
const maxConfig = 64 << 10

var errConfig = errors.New("invalid configuration")

// config is the configuration file. Every key may be left out; keys that are not known are refused.
type config struct {
	Mode       string       `toml:"mode"`        // user (default) or system
	StateDir   string       `toml:"state_dir"`   // the keystore and the audit log
	RuntimeDir string       `toml:"runtime_dir"` // the sockets
	PolicyFile string       `toml:"policy_file"` // system mode: who may use which keys
	AdminGroup string       `toml:"admin_group"` // system mode: the group that may open the admin socket
	Sockets    socketConfig `toml:"sockets"`
	Limits     limitConfig  `toml:"limits"`
	Cache      cacheConfig  `toml:"cache"`
	Helpers    helperConfig `toml:"helpers"`
	StoreID    string       `toml:"store_id"` // of the only keystore that is opened; see storePin
	Unlock     unlockConfig `toml:"unlock"`
	Devices    deviceConfig `toml:"devices"`
	Renew      renewConfig  `toml:"renew"`
}

type socketConfig struct {
	Mode       string `toml:"mode"`        // of kmsd.sock, octal; 0600 for a user, 0666 for the system, where policy decides
	Group      string `toml:"group"`       // of kmsd.sock; the daemon's own when empty
	AdminMode  string `toml:"admin_mode"`  // of admin.sock; 0600 for a user, 0660 for the system
	AdminGroup string `toml:"admin_group"` // of admin.sock; admin_group when empty
}

type limitConfig struct {
	Connections       int `toml:"connections"`
	ConnectionsPerUID int `toml:"connections_per_uid"`
	IdleSeconds       int `toml:"idle_seconds"`
}

// unlockConfig says which slots may open the keystore without a person.
type unlockConfig struct {
	Order      []string `toml:"order"`      // kinds of slots, or numbers, in the order in which they are tried; without it only the strongest kind
	Unattended *bool    `toml:"unattended"` // false: a person opens it always

	Cache         string `toml:"cache"`           // how long the kernel keeps what a person has opened, across restarts of kmsd: 8h; not at all when empty
	LockOnRemoval bool   `toml:"lock_on_removal"` // lock when the medium is pulled whose keyfile has opened it
}

func (c *unlockConfig) validate() error {
	if _, err := parseCache(c.Cache); err != nil {
		return err
	}
	for _, name := range c.Order {
		if _, known := findKind(name); known && name != recovery.Kind {
			continue
		}
		if n, err := strconv.ParseUint(name, 10, 32); err != nil || n == 0 {
			return fmt.Errorf("%w: unlock.order: %q is neither the number of a slot nor a kind that opens by itself", errConfig, name)
		}
	}
	return nil
}

// renewConfig says how keys are renewed before they expire.
type renewConfig struct {
	Enabled *bool  `toml:"enabled"` // false: only when somebody asks for it
	Jitter  string `toml:"jitter"`  // time over which keys are spread that are due together; engine.DefaultJitter when empty
}

// maxJitter is the largest jitter.
const maxJitter = 30 * 24 * time.Hour

// renewal returns what the engine is told.
func (c *renewConfig) renewal() (r engine.Renewal, err error) {
	r.Off = c.Enabled != nil && !*c.Enabled
	if c.Jitter == "" {
		return r, nil
	}
	r.Jitter, err = time.ParseDuration(c.Jitter)
	if err != nil || r.Jitter < 0 || r.Jitter > maxJitter {
		return r, fmt.Errorf("%w: renew.jitter %q is not a time from 0s to %v, such as 24h", errConfig, c.Jitter, maxJitter)
	}
	if r.Jitter == 0 {
		r.Jitter = -1 // none, and not the default
	}
	return r, nil
}

// deviceConfig says which devices there are for resident keys, and what kmsd must know to use devices.
type deviceConfig struct {
	TPM              string            `toml:"tpm"`            // where new keys with the protection tpm are made; the device of the first slot of that kind when empty
	HSM              string            `toml:"hsm"`            // the same for hsm
	TPMOwnerFile     string            `toml:"tpm_owner_file"` // with the password of the TPM's owner hierarchy, where it has one
	TPMPINFile       string            `toml:"tpm_pin_file"`
	TPMPINCredential string            `toml:"tpm_pin_credential"` // name of a credential of systemd
	HSMPINFile       string            `toml:"hsm_pin_file"`
	HSMPINCredential string            `toml:"hsm_pin_credential"`
	Moved            map[string]string `toml:"moved"` // from the location of slots or keys to where their device is now
}

func (c *deviceConfig) validate() error {
	for key, text := range map[string]string{tpm.Kind: c.TPM, pkcs11.Kind: c.HSM} {
		if text == "" {
			continue
		}
		if s, err := parseSpec(text); err != nil {
			return fmt.Errorf("%w: devices: %w", errConfig, err)
		} else if s.kind != key {
			return fmt.Errorf("%w: devices: %q is not of the kind %s", errConfig, text, key)
		}
	}
	for from, to := range c.Moved {
		a, err := parseSpec(from)
		if err != nil {
			return fmt.Errorf("%w: devices.moved: %w", errConfig, err)
		}
		b, err := parseSpec(to)
		if err != nil {
			return fmt.Errorf("%w: devices.moved: %w", errConfig, err)
		}
		if a.kind != b.kind {
			return fmt.Errorf("%w: devices.moved: %q and %q are of different kinds", errConfig, from, to)
		}
	}
	if c.TPMOwnerFile != "" && !filepath.IsAbs(c.TPMOwnerFile) {
		return fmt.Errorf("%w: devices.tpm_owner_file %q is not an absolute path", errConfig, c.TPMOwnerFile)
	}
	for _, pin := range []struct{ kind, file, credential string }{
		{"tpm", c.TPMPINFile, c.TPMPINCredential}, {"hsm", c.HSMPINFile, c.HSMPINCredential},
	} {
		if pin.file != "" && pin.credential != "" {
			return fmt.Errorf("%w: devices: either %s_pin_file or %[2]s_pin_credential", errConfig, pin.kind)
		}
		if pin.file != "" && !filepath.IsAbs(pin.file) {
			return fmt.Errorf("%w: devices.%s_pin_file %q is not an absolute path", errConfig, pin.kind, pin.file)
		}
		if err := checkCredential(pin.credential); err != nil {
			return err
		}
	}
	return nil
}

type cacheConfig struct {
	Keys        int `toml:"keys"`         // parsed keys held at most
	IdleSeconds int `toml:"idle_seconds"` // after which an unused one is forgotten
}

// parseConfig reads a configuration file. Errors wrap errConfig and say the line.
func parseConfig(data []byte) (config, error) {
	var c config
	if len(data) > maxConfig {
		return c, fmt.Errorf("%w: over %d bytes", errConfig, maxConfig)
	}
	err := toml.NewDecoder(bytes.NewReader(data)).DisallowUnknownFields().Decode(&c)
	var strict *toml.StrictMissingError
	var decode *toml.DecodeError
	switch {
	case errors.As(err, &strict):
		row, _ := strict.Errors[0].Position()
		return c, fmt.Errorf("%w: line %d: unknown key %v", errConfig, row, strict.Errors[0].Key())
	case errors.As(err, &decode):
		row, _ := decode.Position()
		return c, fmt.Errorf("%w: line %d: %s", errConfig, row, decode.Error())
	case err != nil:
		return c, fmt.Errorf("%w: %s", errConfig, err)
	}
	return c, c.validate()
}

// validate refuses values that make no sense. It does not look at the machine.
func (c *config) validate() error {
	if c.Mode != "" && c.Mode != modeUser && c.Mode != modeSystem {
		return fmt.Errorf("%w: mode %q is neither user nor system", errConfig, c.Mode)
	}
	for key, dir := range map[string]string{"state_dir": c.StateDir, "runtime_dir": c.RuntimeDir, "policy_file": c.PolicyFile} {
		if dir != "" && !filepath.IsAbs(dir) {
			return fmt.Errorf("%w: %s %q is not an absolute path", errConfig, key, dir)
		}
	}
	for key, mode := range map[string]string{"sockets.mode": c.Sockets.Mode, "sockets.admin_mode": c.Sockets.AdminMode} {
		if _, err := parseMode(mode, 0); err != nil {
			return fmt.Errorf("%w: %s: %w", errConfig, key, err)
		}
	}
	for key, n := range map[string]int{
		"limits.connections": c.Limits.Connections, "limits.connections_per_uid": c.Limits.ConnectionsPerUID,
		"limits.idle_seconds": c.Limits.IdleSeconds, "cache.keys": c.Cache.Keys, "cache.idle_seconds": c.Cache.IdleSeconds,
	} {
		if n < 0 || n > 1_000_000 {
			return fmt.Errorf("%w: %s is %d, not from 1 to 1000000", errConfig, key, n)
		}
	}
	if _, err := parseStorePin(c.StoreID); err != nil {
		return err
	}
	_, err := c.Renew.renewal()
	return errors.Join(c.Unlock.validate(), c.Devices.validate(), c.Helpers.validate(), err)
}

// parseMode reads octal permissions; empty is fallback.
func parseMode(s string, fallback fs.FileMode) (fs.FileMode, error) {
	if s == "" {
		return fallback, nil
	}
	n, err := strconv.ParseUint(s, 8, 32)
	if err != nil || n > 0o777 {
		return 0, fmt.Errorf("%q is not an octal mode such as 0660", s)
	}
	return fs.FileMode(n), nil
}

// systemConfig is the configuration file of the system daemon.
const systemConfig = "/etc/kmsd/kmsd.toml"

// loadConfig reads the file at path, which must exist. With an empty path it reads the user's own if there is one, else
// that of the system daemon where this process is to be that one.
func loadConfig(path string) (config, error) {
	if path != "" {
		return readConfig(path)
	}
	if dir, err := os.UserConfigDir(); err == nil {
		c, err := readConfig(filepath.Join(dir, "kmsd", "kmsd.toml"))
		if !errors.Is(err, fs.ErrNotExist) {
			return c, err
		}
	}
	return loadSystemConfig(systemConfig, os.Geteuid())
}

// loadSystemConfig reads the file of the system daemon for root, who sets it up, and for its service user: the owner of its
// state directory. To everybody else kmsd is a daemon of their own, and the file is not for them.
func loadSystemConfig(path string, uid int) (config, error) {
	c, err := readConfig(path)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) && uid != 0 {
		return config{}, nil
	}
	if err != nil {
		return config{}, err
	}
	if c.Mode != modeSystem || uid == 0 {
		return c, nil
	}
	dir := c.StateDir
	setDefault(&dir, systemState)
	info, err := os.Stat(dir)
	if err != nil || info.Sys().(*syscall.Stat_t).Uid != uint32(uid) {
		return config{}, nil
	}
	return c, nil
}

func readConfig(path string) (config, error) {
	data, err := readTrusted(path, maxConfig)
	if err != nil {
		return config{}, err
	}
	c, err := parseConfig(data)
	if err != nil {
		return c, fmt.Errorf("%s: %w", path, err)
	}
	return c, nil
}

// configFrom is the configuration of the file, overruled by the flags that are not empty, with its defaults.
func configFrom(file, stateDir, runtimeDir string) (config, error) {
	c, err := loadConfig(file)
	if err != nil {
		return c, err
	}
	for _, flag := range []struct {
		p *string
		v string
	}{{&c.StateDir, stateDir}, {&c.RuntimeDir, runtimeDir}} {
		if flag.v == "" {
			continue
		}
		if *flag.p, err = filepath.Abs(flag.v); err != nil {
			return c, err
		}
	}
	return c, c.setDefaults(os.Getenv)
}

// readTrusted reads a file that only root or the daemon's own user can have written.
func readTrusted(path string, most int64) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	owner := info.Sys().(*syscall.Stat_t).Uid
	switch {
	case !info.Mode().IsRegular():
		return nil, fmt.Errorf("%w: %s is not a regular file", errConfig, path)
	case owner != 0 && owner != uint32(os.Geteuid()):
		return nil, fmt.Errorf("%w: %s belongs to uid %d", errConfig, path, owner)
	case info.Mode().Perm()&0o022 != 0:
		return nil, fmt.Errorf("%w: %s can be written by others (mode %04o)", errConfig, path, info.Mode().Perm())
	}
	data, err := io.ReadAll(io.LimitReader(f, most+1))
	if err != nil {
		return nil, err
	}
	if int64(len(data)) > most {
		return nil, fmt.Errorf("%w: %s is over %d bytes", errConfig, path, most)
	}
	return data, nil
}

// setDefaults fills in what the file and the command line have left out.
func (c *config) setDefaults(getenv func(string) string) error {
	if c.Mode == "" {
		c.Mode = modeUser
	}
	c.Helpers.setDefaults(c.Mode)
	if c.Mode == modeSystem {
		setDefault(&c.StateDir, systemState)
		setDefault(&c.RuntimeDir, "/run/kmsd")
		setDefault(&c.PolicyFile, "/etc/kmsd/policy.toml")
		setDefault(&c.AdminGroup, "kmsd-admin")
		setDefault(&c.Sockets.Mode, "0666")
		setDefault(&c.Sockets.AdminMode, "0660")
		setDefault(&c.Sockets.AdminGroup, c.AdminGroup)
		return nil
	}
	setDefault(&c.Sockets.Mode, "0600")
	setDefault(&c.Sockets.AdminMode, "0600")
	state := getenv("XDG_STATE_HOME")
	if home := getenv("HOME"); state == "" && home != "" {
		state = filepath.Join(home, ".local", "state")
	}
	if state == "" && c.StateDir == "" {
		return fmt.Errorf("%w: neither --state-dir nor XDG_STATE_HOME nor HOME is set", errConfig)
	}
	if state != "" {
		setDefault(&c.StateDir, filepath.Join(state, "kmsd"))
	}
	// Not everybody has a runtime directory: root, a container, a session without pam_systemd. What belongs to nobody else is
	// the state directory. Clients look in both places.
	if runtime := getenv("XDG_RUNTIME_DIR"); runtime != "" {
		setDefault(&c.RuntimeDir, filepath.Join(runtime, "kmsd"))
	} else if state != "" {
		setDefault(&c.RuntimeDir, filepath.Join(state, "kmsd", "run"))
	}
	return nil
}

func setDefault(p *string, v string) {
	if *p == "" {
		*p = v
	}
}

func (c *config) appSocket() string   { return filepath.Join(c.RuntimeDir, "kmsd.sock") }
func (c *config) adminSocket() string { return filepath.Join(c.RuntimeDir, "admin.sock") }

func (c *config) idle() time.Duration { return time.Duration(c.Limits.IdleSeconds) * time.Second }

// loadPolicy makes the policy snapshot of the configuration.
func (c *config) loadPolicy() (*policy.Policy, error) {
	if c.Mode == modeUser {
		return policy.UserMode(uint32(os.Geteuid())), nil
	}
	data, err := readTrusted(c.PolicyFile, policy.MaxFile)
	if errors.Is(err, fs.ErrNotExist) {
		data, err = []byte("version = 1\n"), nil // nobody may use a key until somebody has said who
	}
	if err != nil {
		return nil, err
	}
	p, err := policy.Parse(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", c.PolicyFile, err)
	}
	gid, err := groupID(c.AdminGroup)
	if err != nil {
		return nil, err
	}
	if gid >= 0 {
		p = p.WithAdminGroup(uint32(gid))
	}
	return p, nil
}

// groupID returns the number of the group called name, -1 for no name.
func groupID(name string) (int, error) {
	if name == "" {
		return -1, nil
	}
	if n, err := strconv.ParseUint(name, 10, 31); err == nil {
		return int(n), nil
	}
	g, err := user.LookupGroup(name)
	if err != nil {
		return 0, fmt.Errorf("%w: group %q: %w", errConfig, name, err)
	}
	return strconv.Atoi(g.Gid)
}
