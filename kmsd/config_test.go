package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/kmsd/engine"
	"github.com/kmsd-project/kmsd/policy"
)

func TestParseConfig(t *testing.T) {
	c, err := parseConfig([]byte(`
mode = "system"
state_dir = "/srv/kmsd"
admin_group = "wheel"
[sockets]
mode = "0660"
group = "apps"
[limits]
connections = 10
idle_seconds = 60
[cache]
keys = 5
`))
	if err != nil {
		t.Fatal(err)
	}
	if err := c.setDefaults(func(string) string { return "" }); err != nil {
		t.Fatal(err)
	}
	if c.StateDir != "/srv/kmsd" || c.RuntimeDir != "/run/kmsd" || c.Sockets.Mode != "0660" || c.Sockets.AdminMode != "0660" ||
		c.Sockets.AdminGroup != "wheel" || c.Limits.Connections != 10 || c.idle().Seconds() != 60 || c.Cache.Keys != 5 {
		t.Errorf("%+v", c)
	}
	for in, want := range map[string]string{
		"mode = \"user\"\n\nmodes = 1\n":         "line 3: unknown key",
		"[sockets]\nmode = \"0600\"\nmood = 1\n": "line 3: unknown key",
		"[socket]\nmode = \"0600\"\n":            "unknown key",
		"mode = \n":                              "line 1",
		"mode = 3\n":                             "line 1",
		"mode = \"root\"\n":                      "neither user nor system",
		"state_dir = \"relative\"\n":             "not an absolute path",
		"policy_file = \"relative\"\n":           "not an absolute path",
		"[sockets]\nmode = \"rw\"\n":             "octal",
		"[sockets]\nadmin_mode = \"7777\"\n":     "octal",
		"[helpers]\nstart = \"path\"\n":          "neither children nor sockets",
		"[helpers]\ndir = \"run\"\n":             "absolute",
		"[limits]\nconnections = -1\n":           "limits.connections",
		"[limits]\nconnections = \"many\"\n":     "line 2",
		"mode = \"user\"\nmode = \"user\"\n":     "line 2",
		"# " + strings.Repeat("x", maxConfig):    "over",
		"[renew]\njitter = \"a day\"":            "renew.jitter",
		"[renew]\njitter = \"1000h\"":            "renew.jitter",
	} {
		_, err := parseConfig([]byte(in))
		if !errors.Is(err, errConfig) || !strings.Contains(err.Error(), want) {
			t.Errorf("%.40q: error %v, want %q in it", in, err, want)
		}
	}
}

func TestConfigDefaults(t *testing.T) {
	env := map[string]string{"HOME": "/home/u", "XDG_RUNTIME_DIR": "/run/user/7"}
	getenv := func(k string) string { return env[k] }
	var c config
	if err := c.setDefaults(getenv); err != nil {
		t.Fatal(err)
	}
	if c.Mode != modeUser || c.StateDir != "/home/u/.local/state/kmsd" || c.appSocket() != "/run/user/7/kmsd/kmsd.sock" ||
		c.adminSocket() != "/run/user/7/kmsd/admin.sock" || c.Sockets.Mode != "0600" || c.Sockets.AdminMode != "0600" {
		t.Errorf("%+v", c)
	}
	env["XDG_STATE_HOME"] = "/s"
	c = config{}
	if c.setDefaults(getenv); c.StateDir != "/s/kmsd" {
		t.Errorf("state in %s", c.StateDir)
	}
	delete(env, "XDG_RUNTIME_DIR")
	c = config{}
	if err := c.setDefaults(getenv); err != nil || c.RuntimeDir != "/s/kmsd/run" {
		t.Errorf("without a runtime directory the sockets are in %q, %v", c.RuntimeDir, err)
	}
	c = config{StateDir: "/elsewhere"}
	if err := c.setDefaults(func(string) string { return "" }); err != nil || c.RuntimeDir != "" {
		t.Errorf("without any directory the sockets are in %q, %v", c.RuntimeDir, err)
	}
	if _, err := (&daemon{config: c}).claimRuntimeDir(); !errors.Is(err, errConfig) {
		t.Errorf("no runtime directory: %v", err)
	}
	delete(env, "XDG_STATE_HOME")
	delete(env, "HOME")
	c = config{}
	if err := c.setDefaults(getenv); !errors.Is(err, errConfig) {
		t.Errorf("no state directory: %v", err)
	}
	if c = (config{StateDir: "/s", RuntimeDir: "/r"}); c.setDefaults(getenv) != nil || c.Helpers.Start != helpersChildren {
		t.Errorf("a user's daemon starts its helpers by %q", c.Helpers.Start)
	}
	c = config{Mode: modeSystem}
	if err := c.setDefaults(getenv); err != nil || c.Helpers.Start != helpersSockets {
		t.Errorf("the system's daemon starts its helpers by %q, error %v", c.Helpers.Start, err)
	}
	c = config{Mode: modeSystem}
	if err := c.setDefaults(getenv); err != nil || c.StateDir != "/var/lib/kmsd" || c.Sockets.Mode != "0666" || c.AdminGroup != "kmsd-admin" {
		t.Errorf("%+v, error %v", c, err)
	}
}

func TestTrustedFiles(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "kmsd.toml")
	if err := os.WriteFile(path, []byte("mode = \"user\"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := readTrusted(path, 100); err != nil {
		t.Error(err)
	}
	if _, err := readTrusted(path, 5); err == nil {
		t.Error("a file over the limit is read")
	}
	link := filepath.Join(dir, "link")
	os.Symlink(path, link)
	if _, err := readTrusted(link, 100); err == nil {
		t.Error("a symbolic link is followed")
	}
	if _, err := readTrusted(dir, 100); err == nil {
		t.Error("a directory is read")
	}
	for _, mode := range []fs.FileMode{0o664, 0o646} {
		os.Chmod(path, mode)
		if _, err := readTrusted(path, 100); !errors.Is(err, errConfig) {
			t.Errorf("mode %v: %v", mode, err)
		}
	}
	os.Chmod(path, 0o644)
	if os.Geteuid() == 0 {
		os.Chown(path, 12345, -1)
		if _, err := readTrusted(path, 100); !errors.Is(err, errConfig) {
			t.Errorf("a file of another user: %v", err)
		}
	}
	if _, err := loadConfig(filepath.Join(dir, "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a configuration that was named and is not there: %v", err)
	}
}

func FuzzConfig(f *testing.F) {
	f.Add([]byte("mode = \"system\"\n[sockets]\nmode = \"0666\"\n[limits]\nconnections = 3\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := parseConfig(data)
		if err != nil {
			return
		}
		if err := c.setDefaults(func(string) string { return "/x" }); err != nil {
			t.Fatal(err)
		}
		if !filepath.IsAbs(c.StateDir) || !filepath.IsAbs(c.RuntimeDir) {
			t.Fatalf("%+v", c)
		}
	})
}

// TestSystemConfigIsForItsUser reads the file of the system daemon as root, as its service user and as somebody else.
func TestSystemConfigIsForItsUser(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "kmsd.toml")
	if c, err := loadSystemConfig(path, 7); err != nil || !reflect.DeepEqual(c, config{}) {
		t.Errorf("no file: %+v, %v", c, err)
	}
	text := fmt.Sprintf("mode = \"system\"\nstate_dir = %q\n", dir)
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	owner := os.Geteuid()
	for uid, mode := range map[int]string{0: modeSystem, owner: modeSystem, owner + 4711: ""} {
		if c, err := loadSystemConfig(path, uid); err != nil || c.Mode != mode {
			t.Errorf("uid %d: %+v, %v", uid, c, err)
		}
	}
	if err := os.WriteFile(path, []byte("mode = \"user\"\n[limits]\nconnections = 9\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if c, err := loadSystemConfig(path, owner+4711); err != nil || c.Limits.Connections != 9 {
		t.Errorf("a file for users: %+v, %v", c, err)
	}
	if err := os.WriteFile(path, []byte("nonsense = 1\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := loadSystemConfig(path, owner); !errors.Is(err, errConfig) {
		t.Errorf("nonsense: %v", err)
	}
}

// The configuration that is installed says what holds without it, and its examples are right.
func TestShippedConfiguration(t *testing.T) {
	data, err := os.ReadFile("../packaging/kmsd.toml")
	if err != nil {
		t.Fatal(err)
	}
	shipped, err := parseConfig(data)
	if err != nil {
		t.Fatal(err)
	}
	examples, err := parseConfig(regexp.MustCompile(`(?m)^#([a-z[])`).ReplaceAll(data, []byte("$1")))
	if err != nil {
		t.Fatal(err)
	}
	if examples.Devices.HSM == "" || examples.Limits.Connections == 0 || examples.Unlock.Unattended == nil {
		t.Errorf("the examples are not read: %+v", examples)
	}
	none := func(string) string { return "" }
	if err := errors.Join(shipped.setDefaults(none), examples.setDefaults(none)); err != nil {
		t.Fatal(err)
	}
	for what, c := range map[string]config{"shipped": shipped, "examples": examples} {
		if c.Mode != modeSystem || c.StateDir != systemState || c.PolicyFile != shipped.PolicyFile || c.AdminGroup != shipped.AdminGroup || c.Helpers != shipped.Helpers {
			t.Errorf("%s: %+v", what, c)
		}
	}
	if c := examples.Cache; c.Keys != engine.DefaultCacheKeys || time.Duration(c.IdleSeconds)*time.Second != engine.DefaultCacheIdle {
		t.Errorf("cache %+v", c)
	}
	if r, err := examples.Renew.renewal(); err != nil || r.Off || r.Jitter != engine.DefaultJitter {
		t.Errorf("renewal %+v, %v", r, err)
	}

	policyFile, err := os.ReadFile("../packaging/policy.toml")
	if err != nil {
		t.Fatal(err)
	}
	for _, data := range [][]byte{policyFile, regexp.MustCompile(`(?m)^#([A-Za-z]+ = )`).ReplaceAll(policyFile, []byte("$1"))} {
		if _, err := policy.Parse(data); err != nil {
			t.Error(err)
		}
	}
}

// Every key of the configuration is in its manual page, in the section of its table.
func TestConfigurationIsDocumented(t *testing.T) {
	page, err := os.ReadFile("../packaging/man/kmsd.toml.5")
	if err != nil {
		t.Fatal(err)
	}
	sections := map[string]string{}
	for i, text := range strings.Split(string(page), "\n.SS [") {
		if i == 0 {
			sections[""] = text
			continue
		}
		name, text, _ := strings.Cut(text, "]\n")
		sections[name] = text
	}
	keys := 0
	var check func(typ reflect.Type, table string)
	check = func(typ reflect.Type, table string) {
		for i := range typ.NumField() {
			f := typ.Field(i)
			key := f.Tag.Get("toml")
			if f.Type.Kind() == reflect.Struct {
				check(f.Type, key)
				continue
			}
			keys++
			if !strings.Contains(sections[table], `\fB`+key+`\fP`) {
				t.Errorf("the manual page does not say what %q of [%s] is", key, table)
			}
		}
	}
	check(reflect.TypeFor[config](), "")
	if keys < 25 {
		t.Errorf("only %d keys were looked for", keys)
	}
}
