package packaging

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// installed installs kmsd into a directory that its units point to, which is what systemd-analyze wants to see.
func installed(t *testing.T, dir string) {
	t.Helper()
	mustMake(t, "install", "PREFIX="+dir, "SYSCONFDIR="+filepath.Join(dir, "etc"))
}

// analyze runs systemd-analyze, which CI has, and returns what it prints.
func analyze(t *testing.T, env []string, args ...string) string {
	t.Helper()
	cmd := exec.Command("systemd-analyze", args...)
	cmd.Env = append(os.Environ(), env...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("systemd-analyze %q: %v\n%s", args, err, out)
	}
	return string(out)
}

// systemd-analyze ends with success also when it has something to say; so it must be silent.
func TestUnitsAreValid(t *testing.T) {
	dir := t.TempDir()
	installed(t, dir)
	system, err := filepath.Glob(filepath.Join(dir, "lib/systemd/system/*"))
	if err != nil || len(system) < 5 {
		t.Fatalf("units %q, error %v", system, err)
	}
	user, err := filepath.Glob(filepath.Join(dir, "lib/systemd/user/*"))
	if err != nil || len(user) != 3 {
		t.Fatalf("units %q, error %v", user, err)
	}
	if out := analyze(t, nil, append([]string{"verify", "--man=no"}, system...)...); out != "" {
		t.Error(out)
	}
	runtime := []string{"XDG_RUNTIME_DIR=" + dir}
	if out := analyze(t, runtime, append([]string{"verify", "--user", "--man=no"}, user...)...); out != "" {
		t.Error(out)
	}

	// It would say something if something were wrong.
	bad := filepath.Join(dir, "lib/systemd/system/kmsd.service")
	b, err := os.ReadFile(bad)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(bad, []byte(strings.Replace(string(b), "ProtectHome=", "ProtectedHome=", 1)), 0o644); err != nil {
		t.Fatal(err)
	}
	if out := analyze(t, nil, "verify", "--man=no", bad); !strings.Contains(out, "ProtectedHome") {
		t.Errorf("a wrong key goes unnoticed: %q", out)
	}
}

// The score is a list of what a unit gives up, not a proof. One point of it is worth nothing here: PrivateUsers would lower the score, and
// show kmsd every caller as "nobody".
func TestExposureOfTheUnits(t *testing.T) {
	overall := regexp.MustCompile(`Overall exposure level for \S+: (\d+\.\d+) `)
	for unit, most := range map[string]float64{"kmsd.service": 0.8, "kmsd-keyring.service": 0.4, "kmsd-pkcs11.service": 0.4} {
		path := filepath.Join("systemd", unit)
		m := overall.FindStringSubmatch(analyze(t, nil, "security", "--offline=yes", "--no-pager", path))
		if m == nil {
			t.Errorf("%s has no score", unit)
			continue
		}
		if score, err := strconv.ParseFloat(m[1], 64); err != nil || score > most {
			t.Errorf("%s: exposure %s, more than %v", unit, m[1], most)
		}
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		text := string(b)
		if strings.Contains(text, "\nPrivateUsers=") {
			t.Errorf("%s: PrivateUsers makes every caller nobody", unit)
		}
		if !strings.Contains(text, "\nSystemCallFilter=memfd_secret") {
			t.Errorf("%s: memfd_secret is not in @system-service and must be named", unit)
		}
	}
}

// setting returns the one value of a key of a unit.
func setting(t *testing.T, unit, key string) string {
	t.Helper()
	b, err := os.ReadFile(unit)
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), key+"="); ok {
			found = append(found, v)
		}
	}
	if len(found) != 1 {
		t.Fatalf("%s: %s is %q", unit, key, found)
	}
	return found[0]
}

// What the example of a PIN says to configure is what the configuration shows, under the name of the credential that the unit loads.
func TestExampleOfAPIN(t *testing.T) {
	name, _, _ := strings.Cut(setting(t, "systemd/examples/kmsd-pin.conf", "LoadCredentialEncrypted"), ":")
	line := "hsm_pin_credential = " + strconv.Quote(name)
	for _, path := range []string{"systemd/examples/kmsd-pin.conf", "kmsd.toml"} {
		text, err := os.ReadFile(path)
		if err != nil || !regexp.MustCompile(`(?m)^# *`+regexp.QuoteMeta(line)+`$`).Match(text) {
			t.Errorf("%s does not say %s (%v)", path, line, err)
		}
	}
}

// Clients wait for kmsd at its sockets, and what they write before it accepts must carry their credentials.
func TestSocketsPassCredentials(t *testing.T) {
	sockets, err := filepath.Glob("systemd/*.socket")
	more, err2 := filepath.Glob("systemd/user/*.socket")
	if sockets = append(sockets, more...); errors.Join(err, err2) != nil || len(sockets) != 6 {
		t.Fatalf("sockets %q", sockets)
	}
	for _, path := range sockets {
		if v := setting(t, path, "PassCredentials"); v != "yes" {
			t.Errorf("%s: PassCredentials=%s", path, v)
		}
	}
	for path, mode := range map[string]string{"kmsd.socket": "0666", "kmsd-admin.socket": "0660", "kmsd-keyring.socket": "0660", "kmsd-pkcs11.socket": "0660",
		"user/kmsd.socket": "0600", "user/kmsd-admin.socket": "0600"} {
		if got := setting(t, filepath.Join("systemd", path), "SocketMode"); got != mode {
			t.Errorf("%s: SocketMode=%s, want %s", path, got, mode)
		}
	}
}
