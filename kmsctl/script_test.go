package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"filippo.io/age"
	"github.com/rogpeppe/go-internal/testscript"

	"github.com/kmsd-project/kmsd/enclave/tpm/swtpmtest"
	"github.com/kmsd-project/kmsd/kmsd/programs"
)

// binaries are the programs under test, as they are shipped.
var binaries = programs.New("kmsd", "kmsctl", "enclave/keyring/kmsd-keyring")

func TestMain(m *testing.M) {
	code := m.Run()
	binaries.Remove()
	os.Exit(code)
}

// bin is their directory, once build was called.
var bin string

func build(t *testing.T) {
	t.Helper()
	bin = binaries.Dir(t)
}

// TestScripts runs the real programs through testdata/script. OpenSSL is the judge from outside; it must be there.
func TestScripts(t *testing.T) {
	build(t)
	if _, err := exec.LookPath("openssl"); err != nil {
		t.Fatal("the scripts need openssl: make test-packages")
	}
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(env *testscript.Env) error {
			env.Setenv("PATH", bin+string(os.PathListSeparator)+os.Getenv("PATH"))
			env.Setenv("HOME", env.WorkDir)
			env.Setenv("XDG_RUNTIME_DIR", env.WorkDir)
			env.Setenv("KMSD_SOCKET", filepath.Join(env.WorkDir, "run"))
			env.Setenv("TZ", "UTC")
			keys, err := filepath.Abs(filepath.Join("..", "packaging", "mosip-keys.toml"))
			if err != nil {
				return err
			}
			env.Setenv("KEYS", keys)
			env.Values["daemon"] = new(process)
			env.Values["tpm"] = new(softTPM)
			return nil
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"daemon":       daemonCommand,
			"code":         codeCommand,
			"finds":        findsCommand,
			"chain":        chainCommand,
			"together":     togetherCommand,
			"json":         jsonCommand,
			"big":          bigCommand,
			"flip":         flipCommand,
			"cut":          cutCommand,
			"age-identity": ageIdentityCommand,
			"lose":         loseCommand,
			"setline":      setLineCommand,
			"tpm":          tpmCommand,
			"deployment":   deploymentCommand,
			"interrupt":    interruptCommand,
		},
	})
}

// process is a running kmsd.
type process struct {
	cmd    *exec.Cmd
	exited chan struct{}
	log    *bytes.Buffer // standard error, complete once exited is closed
}

// startDaemon starts kmsd and waits for its ready line.
func startDaemon(dir string, env []string) (*process, error) {
	cmd := exec.Command(filepath.Join(bin, "kmsd"), "run", "--state-dir", filepath.Join(dir, "state"), "--runtime-dir", filepath.Join(dir, "run"))
	cmd.Env = env
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	stderr, err := cmd.StderrPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	log := new(bytes.Buffer)
	p := &process{cmd: cmd, exited: make(chan struct{}), log: log}
	ready := make(chan struct{})
	go func() {
		lines := bufio.NewScanner(stderr)
		for lines.Scan() {
			fmt.Fprintln(log, lines.Text())
			if lines.Text() == "ready" {
				close(ready)
			}
		}
		cmd.Wait()
		close(p.exited)
	}()
	select {
	case <-ready:
		return p, nil
	case <-p.exited:
		return nil, fmt.Errorf("kmsd ended at start:\n%s", log.String())
	case <-time.After(60 * time.Second):
		cmd.Process.Kill()
		<-p.exited
		return nil, fmt.Errorf("kmsd was not ready within 60 s:\n%s", log.String())
	}
}

func (p *process) stop(signal syscall.Signal) {
	if p.cmd == nil {
		return
	}
	p.cmd.Process.Signal(signal)
	select {
	case <-p.exited:
	case <-time.After(20 * time.Second):
		p.cmd.Process.Kill()
		<-p.exited
	}
	p.cmd = nil
}

// daemon start | stop | kill
func daemonCommand(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 1 {
		ts.Fatalf("usage: daemon start|stop|kill")
	}
	p := ts.Value("daemon").(*process)
	switch args[0] {
	case "start":
		env := []string{"PATH=" + ts.Getenv("PATH"), "HOME=" + ts.Getenv("HOME")}
		started, err := startDaemon(ts.Getenv("WORK"), env)
		if neg {
			if err == nil {
				started.stop(syscall.SIGKILL)
				ts.Fatalf("kmsd started")
			}
			ts.Logf("%v", err)
			return
		}
		ts.Check(err)
		*p = *started
		ts.Defer(func() { p.stop(syscall.SIGKILL) })
	case "stop":
		p.stop(syscall.SIGTERM)
	case "kill":
		p.stop(syscall.SIGKILL)
	default:
		ts.Fatalf("usage: daemon start|stop|kill")
	}
}

// code N COMMAND... runs a command that must end with exit code N.
func codeCommand(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: code N command...")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	got := 0
	if err := ts.Exec(args[1], args[2:]...); err != nil {
		exit, ok := err.(*exec.ExitError)
		if !ok {
			ts.Fatalf("%v", err)
		}
		got = exit.ExitCode()
	}
	if got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
}

// json PATH REGEXP looks at the JSON that the last command printed. PATH is field names and list positions with dots.
func jsonCommand(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 2 {
		ts.Fatalf("usage: json path regexp")
	}
	var v any
	if err := json.Unmarshal([]byte(ts.ReadFile("stdout")), &v); err != nil {
		ts.Fatalf("not JSON: %v", err)
	}
	for _, name := range strings.Split(args[0], ".") {
		if name == "" {
			continue
		}
		switch node := v.(type) {
		case map[string]any:
			field, ok := node[name]
			if !ok {
				ts.Fatalf("no field %q of %q", name, args[0])
			}
			v = field
		case []any:
			i, err := strconv.Atoi(name)
			if err != nil || i >= len(node) {
				ts.Fatalf("no element %q of %q", name, args[0])
			}
			v = node[i]
		default:
			ts.Fatalf("%q of %q is no object and no list", name, args[0])
		}
	}
	text, err := json.Marshal(v)
	ts.Check(err)
	if s, ok := v.(string); ok {
		text = []byte(s)
	}
	matched, err := regexp.Match("^(?:"+args[1]+")$", text)
	ts.Check(err)
	if matched == neg {
		ts.Fatalf("%s is %s", args[0], text)
	}
}

// finds REF VERSION checks that key find finds a version by everything that identifies it, its certificate included.
func findsCommand(ts *testscript.TestScript, neg bool, args []string) {
	ts.Check(ts.Exec("kmsctl", "public", args[0], "--format", "fingerprints"))
	known := strings.Fields(ts.ReadFile("stdout"))
	ts.Check(ts.Exec("kmsctl", "--json", "cert", "show", args[0]))
	var chain []struct{ SHA256 string }
	ts.Check(json.Unmarshal([]byte(ts.ReadFile("stdout")), &chain))
	known = append(known, "certificate", chain[0].SHA256)
	name, _, _ := strings.Cut(args[0], "@")
	for i := 0; i < len(known); i += 2 {
		ts.Check(ts.Exec("kmsctl", "--json", "key", "find", "--"+known[i], known[i+1]))
		jsonCommand(ts, false, []string{"key.name", name})
		jsonCommand(ts, false, []string{"version", args[1]})
	}
}

// big FILE SIZE writes a file that does not compress.
func bigCommand(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 2 {
		ts.Fatalf("usage: big file size")
	}
	size, err := strconv.Atoi(args[1])
	ts.Check(err)
	content := make([]byte, size)
	state := uint32(size)*2654435761 + 1
	for i := range content {
		state ^= state << 13
		state ^= state >> 17
		state ^= state << 5
		content[i] = byte(state)
	}
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), content, 0o600))
}

// flip FILE OFFSET changes one bit; a negative offset counts from the end.
func flipCommand(ts *testscript.TestScript, neg bool, args []string) {
	content := []byte(ts.ReadFile(args[0]))
	offset, err := strconv.Atoi(args[1])
	ts.Check(err)
	if offset < 0 {
		offset += len(content)
	}
	content[offset] ^= 1
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), content, 0o600))
}

// cut FILE SIZE keeps the first bytes; a negative size takes that many from the end.
func cutCommand(ts *testscript.TestScript, neg bool, args []string) {
	size, err := strconv.Atoi(args[1])
	ts.Check(err)
	if size < 0 {
		size += len(ts.ReadFile(args[0]))
	}
	ts.Check(os.Truncate(ts.MkAbs(args[0]), int64(size)))
}

// age-identity FILE VARIABLE makes an age identity and puts its recipient into an environment variable.
func ageIdentityCommand(ts *testscript.TestScript, neg bool, args []string) {
	id, err := age.GenerateX25519Identity()
	ts.Check(err)
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), []byte(id.String()+"\n"), 0o600))
	ts.Setenv(args[1], id.Recipient().String())
}

// tpm new VARIABLE makes a software TPM and puts its spec into an environment variable; tpm off | on | clear do that to the last one, and tpm swap puts another in its place.
func tpmCommand(ts *testscript.TestScript, neg bool, args []string) {
	machine := ts.Value("tpm").(*softTPM)
	switch {
	case len(args) == 2 && args[0] == "new":
		s, err := swtpmtest.Start()
		ts.Check(err)
		ts.Defer(func() { s.Close() })
		machine.TPM = s
		ts.Setenv(args[1], "tpm:unix:"+s.Path())
		ts.Setenv("TPM2OPENSSL_TCTI", "swtpm:path="+s.Path()) // for OpenSSL's provider
	case len(args) == 1 && args[0] == "off":
		machine.PowerOff()
	case len(args) == 1 && args[0] == "on":
		ts.Check(machine.PowerOn())
	case len(args) == 1 && args[0] == "swap":
		ts.Check(machine.Replace())
		ts.Check(machine.PowerOn())
	case len(args) == 1 && args[0] == "clear":
		ts.Check(machine.Clear())
	default:
		ts.Fatalf("usage: tpm new VARIABLE | off | on | clear | swap")
	}
}

// softTPM is the TPM of a script, once it has one.
type softTPM struct{ *swtpmtest.TPM }

// lose NAME removes every file of that name below the state directory; there must be one.
func loseCommand(ts *testscript.TestScript, neg bool, args []string) {
	found := 0
	err := filepath.WalkDir(ts.MkAbs("state"), func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Name() == args[0] {
			found++
			err = os.Remove(path)
		}
		return err
	})
	ts.Check(err)
	if found == 0 {
		ts.Fatalf("there is no file %s", args[0])
	}
}

// setline FILE N TARGET writes line N of FILE to TARGET.
func setLineCommand(ts *testscript.TestScript, neg bool, args []string) {
	n, err := strconv.Atoi(args[1])
	ts.Check(err)
	lines := strings.Split(strings.TrimSpace(ts.ReadFile(args[0])), "\n")
	if n > len(lines) {
		ts.Fatalf("%s has %d lines", args[0], len(lines))
	}
	ts.Check(os.WriteFile(ts.MkAbs(args[2]), []byte(lines[n-1]+"\n"), 0o600))
}
