// Package packaging holds what is installed beside the programs: units of systemd, users, man pages, completions, examples. The tests here
// judge it with the tools of those it is for.
package packaging

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write testdata/installed again")

// bin is a directory with the programs as "make build" makes them.
var bin string

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(run(m))
}

func run(m *testing.M) int {
	if os.Getenv(insideEnv) == "" {
		dir, err := os.MkdirTemp("", "kmsd-packaging-")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		bin = filepath.Join(dir, "bin")
		if out, err := makeIn("build"); err != nil {
			fmt.Fprintf(os.Stderr, "make build: %v\n%s", err, out)
			return 1
		}
	}
	return m.Run()
}

// makeIn runs make in the top directory. It does not see the variables of a make that runs this test.
func makeIn(args ...string) ([]byte, error) {
	cmd := exec.Command("make", append([]string{"--no-print-directory", "-C", "..", "BIN=" + bin}, args...)...)
	cmd.Env = slices.DeleteFunc(os.Environ(), func(v string) bool {
		return strings.HasPrefix(v, "MAKE") || strings.HasPrefix(v, "MFLAGS")
	})
	return cmd.CombinedOutput()
}

// mustMake is makeIn for what must work.
func mustMake(t *testing.T, args ...string) string {
	t.Helper()
	out, err := makeIn(args...)
	if err != nil {
		t.Fatalf("make %q: %v\n%s", args, err, out)
	}
	return string(out)
}

// tree lists the files below dir with their modes, and the directories if asked for.
func tree(t *testing.T, dir string, directories bool) []string {
	t.Helper()
	var list []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == dir || d.IsDir() && !directories {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		list = append(list, fmt.Sprintf("%v %s", info.Mode(), rel))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return list
}

func TestInstallAndUninstall(t *testing.T) {
	dest := t.TempDir()
	mustMake(t, "install", "DESTDIR="+dest, "PREFIX=/usr")
	got := tree(t, dest, false)

	// Every manual page is there, and nothing else that is not in the list.
	pages, err := filepath.Glob("man/*.[158]")
	if err != nil || len(pages) < 40 {
		t.Fatalf("%d manual pages, error %v", len(pages), err)
	}
	for _, page := range pages {
		line := "-rw-r--r-- usr/share/man/man" + page[len(page)-1:] + "/" + filepath.Base(page)
		i := slices.Index(got, line)
		if i < 0 {
			t.Errorf("missing: %s", line)
			continue
		}
		got = slices.Delete(got, i, i+1)
	}
	if _, err := exec.LookPath("gcc"); err != nil {
		t.Fatal("without a C compiler not everything is built: ", err)
	}
	golden := filepath.Join("testdata", "installed")
	text := strings.Join(got, "\n") + "\n"
	if *update {
		if err := errors.Join(os.MkdirAll("testdata", 0o755), os.WriteFile(golden, []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if text != string(want) {
		t.Errorf("installed is:\n%s\nwant, if not go test ./packaging -update:\n%s", text, want)
	}
	for _, line := range tree(t, dest, true) {
		if strings.HasPrefix(line, "d") && !strings.HasPrefix(line, "drwxr-xr-x ") {
			t.Errorf("directory is %s", line)
		}
	}

	// What the administrator and kmsd have made since is theirs.
	policy := filepath.Join(dest, "etc/kmsd/policy.toml")
	store := filepath.Join(dest, "var/lib/kmsd/store.db")
	if err := errors.Join(os.WriteFile(policy, []byte("version = 1\n[applications]\na = [1]\n"), 0o644),
		os.MkdirAll(filepath.Dir(store), 0o700), os.WriteFile(store, []byte("keys"), 0o600)); err != nil {
		t.Fatal(err)
	}
	if out := mustMake(t, "install", "DESTDIR="+dest, "PREFIX=/usr"); !strings.Contains(out, "policy.toml is there already") {
		t.Errorf("make install does not say what it left alone:\n%s", out)
	}
	if b, err := os.ReadFile(policy); err != nil || !bytes.Contains(b, []byte("a = [1]")) {
		t.Errorf("the policy was overwritten: %q, error %v", b, err)
	}
	mustMake(t, "uninstall", "DESTDIR="+dest, "PREFIX=/usr")
	left := tree(t, dest, false)
	if want := []string{"-rw-r--r-- etc/kmsd/policy.toml", "-rw------- var/lib/kmsd/store.db"}; !slices.Equal(left, want) {
		t.Errorf("uninstall leaves %q, want %q", left, want)
	}
	for _, line := range tree(t, filepath.Join(dest, "usr"), true) {
		if strings.Contains(line, "kmsd") {
			t.Errorf("uninstall leaves %s", line)
		}
	}
}

// A user's umask must not make an installation that other users cannot read.
func TestInstallIgnoresTheUmask(t *testing.T) {
	dest := t.TempDir()
	cmd := exec.Command("sh", "-c", "umask 077 && exec packaging/install install")
	cmd.Dir = ".."
	cmd.Env = append(os.Environ(), "BIN="+bin, "DESTDIR="+dest)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, line := range tree(t, dest, true) {
		if !strings.HasPrefix(line, "drwxr-xr-x ") && !strings.HasPrefix(line, "-rwxr-xr-x ") && !strings.HasPrefix(line, "-rw-r--r-- ") {
			t.Error(line)
		}
	}
}

func TestUnitsHaveThePathsOfTheInstallation(t *testing.T) {
	dest := t.TempDir()
	mustMake(t, "install", "DESTDIR="+dest, "PREFIX=/opt/kmsd", "SYSCONFDIR=/opt/etc", "UNITDIR=/units")
	b, err := os.ReadFile(filepath.Join(dest, "units/kmsd.service"))
	if err != nil {
		t.Fatal(err)
	}
	if want := "\nExecStart=/opt/kmsd/bin/kmsd run --config /opt/etc/kmsd/kmsd.toml\n"; !bytes.Contains(b, []byte(want)) || bytes.Contains(b, []byte("/usr/bin/kmsd")) {
		t.Errorf("the unit has not %q:\n%s", want, b)
	}
	if b, err = os.ReadFile(filepath.Join(dest, "units/kmsd-keyring.service")); err != nil {
		t.Fatal(err)
	}
	if want := "\nExecStart=/opt/kmsd/libexec/kmsd/kmsd-keyring --kmsd-user kmsd\n"; !bytes.Contains(b, []byte(want)) {
		t.Errorf("the unit has not %q:\n%s", want, b)
	}
}

// Programs that are up to date are not built again: "sudo make install" after "make build" runs no compiler as root.
func TestInstallBuildsNothingThatIsThere(t *testing.T) {
	before, err := os.Stat(filepath.Join(bin, "kmsd"))
	if err != nil {
		t.Fatal(err)
	}
	if out := mustMake(t, "install", "DESTDIR="+t.TempDir()); strings.Contains(out, "go build") {
		t.Errorf("make install builds:\n%s", out)
	}
	after, err := os.Stat(filepath.Join(bin, "kmsd"))
	if err != nil || !after.ModTime().Equal(before.ModTime()) {
		t.Errorf("kmsd was built at %v, now %v, error %v", before.ModTime(), after.ModTime(), err)
	}
}
