package main

import (
	"bytes"
	"flag"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"

	"github.com/kmsd-project/kmsd/ipc/proto"
)

var update = flag.Bool("update", false, "write packaging/man and packaging/completions again")

func testRoot() *cobra.Command {
	return newRoot(newApp(strings.NewReader(""), io.Discard, io.Discard))
}

func walk(c *cobra.Command, visit func(*cobra.Command)) {
	visit(c)
	for _, child := range c.Commands() {
		walk(child, visit)
	}
}

// TestEveryOperationHasAVerb walks the operations of the protocol and the annotations of the commands, both ways.
func TestEveryOperationHasAVerb(t *testing.T) {
	verbs := make(map[string][]string)
	walk(testRoot(), func(c *cobra.Command) {
		for _, op := range strings.Fields(c.Annotations[opsKey]) {
			verbs[op] = append(verbs[op], c.CommandPath())
			if _, ok := proto.Lookup(op); !ok {
				t.Errorf("%s is annotated with %q, which is no operation", c.CommandPath(), op)
			}
		}
	})
	for _, op := range proto.Ops() {
		if len(verbs[op]) == 0 {
			t.Errorf("no command makes operation %s available", op)
		}
	}
}

// TestNamesThatScriptsRelyOn holds the commands and flags that may never go away.
func TestNamesThatScriptsRelyOn(t *testing.T) {
	promised := `
kmsctl --socket --json
kmsctl status
kmsctl doctor --self-test
kmsctl whoami
kmsctl capabilities
kmsctl lock
kmsctl unlock --pin-fd --pin-file
kmsctl init --enclave --pin-file --recovery-out --no-recovery --escrow-to
kmsctl key create --alg --usage --protection --not-before --expires --exportable --label --uses
kmsctl key list
kmsctl key show
kmsctl key set --label --min-version --keep --uses
kmsctl key find --spki --ssh --cka-id --certificate --in
kmsctl key rotate
kmsctl key suspend
kmsctl key resume
kmsctl key revoke --reason --replace --no-replace
kmsctl crl get --format --out
kmsctl watch --recent --once
kmsctl expiry --within
kmsctl key destroy --now --cancel --yes
kmsctl key import --in
kmsctl sign --key --scheme --encoding --in --out
kmsctl verify --key --in --sig
kmsctl encrypt --key --aad-file --in --out
kmsctl decrypt --key --aad-file --in --out
kmsctl rewrap --key --aad-file --in --out
kmsctl mac --key
kmsctl mac-verify --key
kmsctl wrap --key
kmsctl unwrap --key
kmsctl agree --key
kmsctl derive --key
kmsctl datakey --key
kmsctl random --bytes
kmsctl batch
kmsctl public --format
kmsctl app list
kmsctl app show
kmsctl app set --profile --days --pre-expire --base-days --base-pre-expire --alg --protection --key --no-key --active --inactive --cn --ou --o --l --st --c --san
kmsctl master generate --csr --force --symmetric --protection --escrow --cn --ou --o --l --st --c --san --format --out
kmsctl hierarchy generate --config --dry-run
kmsctl clock accept --yes
kmsctl cert get --format --chain --out
kmsctl cert list
kmsctl cert csr --format
kmsctl cert self-sign --format
kmsctl cert issue --format
kmsctl cert show --format
kmsctl cert attach
kmsctl cert chain --format
kmsctl packet encrypt --cert --key --in --out
kmsctl packet decrypt --key --in --out
kmsctl mosip encrypt --app --ref --cert --aad --salt --raw --in --out
kmsctl mosip decrypt --app --ref --aad --salt --raw --in --out
kmsctl mosip packet encrypt --app --ref --cert --in --out
kmsctl mosip packet decrypt --app --ref --in --out
kmsctl mosip sign --key --in --out
kmsctl mosip verify --key --cert --in --sig
kmsctl jws sign --key --alg --kid --header --detached --b64 --no-x5c --chain --x5t --x5u --in --out
kmsctl jws verify --key --cert --domain --detached --in --out
kmsctl jwe encrypt --app --ref --cert --in --out
kmsctl jwe decrypt --app --ref --key --in --out
kmsctl pin encrypt --pin-fd --pin-file --iterations --in --out
kmsctl pin decrypt --pin-fd --pin-file --iterations --in --out
kmsctl cose sign --key --alg --in --out
kmsctl cose verify --key --cert --domain --in --out
kmsctl cwt sign --key --iss --sub --expires --in --out
kmsctl cwt verify --key --cert --domain --iss --sub --in --out
kmsctl hash argon2 --salt --in --out
kmsctl zk generate --key --count
kmsctl zk import --key --in
kmsctl zk encrypt --key --to --in --out
kmsctl zk decrypt --key --in --out
kmsctl zk rewrap --key --keep --in --out
kmsctl machine adopt --tpm --file --name --machine-name --expect-key-index --remove-source
kmsctl machine show --name
kmsctl machine release --name --yes
kmsctl machine sign --name --in --out --raw
kmsctl machine verify --name --public --in --sig --raw
kmsctl machine encrypt --name --public --in --out --android --block --raw
kmsctl machine decrypt --name --in --out --android --block --raw
kmsctl machine db-conf show --name --in --out --out-fd --reveal
kmsctl machine db-conf set --name --out --fields-file --fields-fd --generate --encrypted
kmsctl slot list
kmsctl slot add
kmsctl slot remove --yes
kmsctl slot test
kmsctl backup create --to --out
kmsctl backup verify
kmsctl backup restore
kmsctl audit tail
kmsctl audit verify
kmsctl store verify
kmsctl store compact
kmsctl store rotate-root
kmsctl store rotate-epoch`
	root := testRoot()
	for line := range strings.Lines(strings.TrimSpace(promised)) {
		words := strings.Fields(line)[1:]
		flags := slices.IndexFunc(words, func(w string) bool { return strings.HasPrefix(w, "--") })
		if flags < 0 {
			flags = len(words)
		}
		c, rest, err := root.Find(words[:flags])
		if err != nil || len(rest) > 0 {
			t.Errorf("there is no command %q", strings.TrimSpace(line))
			continue
		}
		for _, flag := range words[flags:] {
			name := strings.TrimPrefix(flag, "--")
			if c.Flags().Lookup(name) == nil && c.InheritedFlags().Lookup(name) == nil && c.PersistentFlags().Lookup(name) == nil {
				t.Errorf("%s has no flag %s", c.CommandPath(), flag)
			}
		}
	}
}

// TestEveryCommandIsDescribed keeps the help and the man pages readable.
func TestEveryCommandIsDescribed(t *testing.T) {
	walk(testRoot(), func(c *cobra.Command) {
		if c.Short == "" || strings.HasSuffix(c.Short, ".") {
			t.Errorf("%s: the short description is one line without a full stop", c.CommandPath())
		}
		if c.RunE == nil && c.Run == nil {
			t.Errorf("%s does nothing", c.CommandPath())
		}
	})
}

// TestPackaging compares packaging/man and packaging/completions with the commands; -update writes them.
func TestPackaging(t *testing.T) {
	scratch := t.TempDir()
	man, completions := filepath.Join(scratch, "man"), filepath.Join(scratch, "completions")
	for _, dir := range []string{man, completions} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	root := testRoot()
	root.InitDefaultHelpCmd()
	root.DisableAutoGenTag = true
	date := time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC) // the pages do not change with the day they are made on
	if err := doc.GenManTree(root, &doc.GenManHeader{Title: "KMSCTL", Section: "1", Source: "kmsd", Manual: "kmsd", Date: &date}, man); err != nil {
		t.Fatal(err)
	}
	for shell, generate := range map[string]func(string) error{
		"kmsctl.bash": func(f string) error { return root.GenBashCompletionFileV2(f, true) },
		"_kmsctl":     root.GenZshCompletionFile,
		"kmsctl.fish": func(f string) error { return root.GenFishCompletionFile(f, true) },
	} {
		if err := generate(filepath.Join(completions, shell)); err != nil {
			t.Fatal(err)
		}
	}
	for _, dir := range []string{"man", "completions"} {
		compareDir(t, filepath.Join(scratch, dir), filepath.Join("..", "packaging", dir))
	}
}

func compareDir(t *testing.T, made, kept string) {
	t.Helper()
	if *update {
		if err := os.MkdirAll(kept, 0o755); err != nil {
			t.Fatal(err)
		}
		for _, old := range files(t, kept) {
			if strings.HasPrefix(filepath.Base(old), "kmsctl") || filepath.Base(old) == "_kmsctl" {
				os.Remove(filepath.Join(kept, old))
			}
		}
	}
	for _, name := range files(t, made) {
		want, err := os.ReadFile(filepath.Join(made, name))
		if err != nil {
			t.Fatal(err)
		}
		if *update {
			if err := os.WriteFile(filepath.Join(kept, name), want, 0o644); err != nil {
				t.Fatal(err)
			}
			continue
		}
		have, err := os.ReadFile(filepath.Join(kept, name))
		if err != nil || !bytes.Equal(have, want) {
			t.Errorf("%s is not what the commands say: run make man", filepath.Join(kept, name))
		}
	}
}

func files(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}
