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

// TestTourOfTheReadme runs the lines of the tour in README.md as they stand, in an empty home directory.
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
	script.WriteString("set -e\n")
	commands := 0
	for line := range strings.Lines(after) {
		if command, ok := strings.CutPrefix(line, "    "); ok {
			commands++
			script.WriteString(command)
			if strings.HasPrefix(command, "kmsd run &") {
				script.WriteString("daemon=$!\nfor i in $(seq 100); do test -S \"$XDG_RUNTIME_DIR/kmsd/admin.sock\" && break; sleep 0.1; done\n")
			}
		} else if commands > 0 {
			break
		}
	}
	if commands != 6 {
		t.Fatalf("the tour has %d commands, the README promises 6", commands)
	}
	script.WriteString("kill $daemon\nwait $daemon\n")

	home := t.TempDir()
	if err := os.WriteFile(filepath.Join(home, "invoice.pdf"), []byte("an invoice"), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sh", "-c", script.String())
	cmd.Dir = home
	cmd.Env = []string{"PATH=" + bin + ":" + os.Getenv("PATH"), "HOME=" + home, "XDG_RUNTIME_DIR=" + home}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	out, err := cmd.CombinedOutput()
	if err != nil {
		syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		t.Fatalf("%v\n%s\n--- the script\n%s", err, out, script.String())
	}
	for _, want := range []string{"valid, by version 1", "key_create", "sign"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("the output lacks %q:\n%s", want, out)
		}
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
