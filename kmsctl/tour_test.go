package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
)

// TestTourOfTheReadme runs the lines of the tour in README.md as they stand: in a directory that has nothing but bin, with a
// home directory that is empty and without a runtime directory, as on a fresh machine.
func TestTourOfTheReadme(t *testing.T) {
	build(t)
	readme, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, after, ok := strings.Cut(string(readme), "<!-- tour:")
	if !ok {
		t.Fatal("README.md has no tour")
	}
	var script strings.Builder
	commands := 0
	for line := range strings.Lines(after) {
		if command, ok := strings.CutPrefix(line, "    "); ok {
			commands++
			script.WriteString(command)
		} else if commands > 0 {
			break
		}
	}
	if commands < 6 {
		t.Fatalf("the tour has %d commands", commands)
	}

	home := t.TempDir()
	clone := filepath.Join(home, "kmsd")
	if err := os.Mkdir(clone, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(bin, filepath.Join(clone, "bin")); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("bash", "-c", "set -em\n"+script.String()+"wait\n") // -m: jobs have numbers, as at a prompt
	cmd.Dir = clone
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + home}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s\n--- the script\n%s", err, out, script.String())
	}
	for _, want := range []string{"valid, by version 1", "key_create", "sign"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("the output lacks %q:\n%s", want, out)
		}
	}
	if _, err := os.Stat(filepath.Join(home, ".local/state/kmsd/run/kmsd.lock")); err != nil {
		t.Errorf("the sockets were elsewhere: %v", err)
	}
}

// TestLinksLeadSomewhere follows the relative links of the documents.
func TestLinksLeadSomewhere(t *testing.T) {
	documents, err := filepath.Glob("../docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	link := regexp.MustCompile(`\]\(([^)#:]+)(#[^)]*)?\)`)
	for _, document := range append(documents, "../README.md", "../SECURITY.md", "../CHANGELOG.md") {
		text, err := os.ReadFile(document)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range link.FindAllSubmatch(text, -1) {
			if _, err := os.Stat(filepath.Join(filepath.Dir(document), string(m[1]))); err != nil {
				t.Errorf("%s: the link %s leads nowhere", document, m[1])
			}
		}
	}
}
