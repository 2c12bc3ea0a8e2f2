package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/kmsd-project/kmsd/kmsctl/mosipdb/mosipdbtest"
)

// deploymentCommand makes a deployment of MOSIP in a directory:
//
//	deployment DIR BASE-KEYS [broken]
//
// Beside its files it writes the password of its keystore, and decrypt.sh, which has kmsctl decrypt the payloads that the deployment has
// encrypted, and compares.
func deploymentCommand(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: deployment DIR BASE-KEYS [broken]")
	}
	n, err := strconv.Atoi(args[1])
	ts.Check(err)
	dir := ts.MkAbs(args[0])
	ts.Check(os.MkdirAll(dir, 0o755))
	d, err := mosipdbtest.Write(dir, mosipdbtest.Options{BaseKeys: n, Pool: 6, Foreign: 3, Random: 40, Broken: len(args) > 2})
	ts.Check(err)
	if len(d.Samples) == 0 {
		ts.Fatalf("no samples")
	}
	script := "set -e\n"
	for i, s := range d.Samples {
		base := filepath.Join(dir, fmt.Sprintf("sample-%d", i))
		ts.Check(os.WriteFile(base+".in", s.Payload, 0o644))
		ts.Check(os.WriteFile(base+".txt", s.Plain, 0o644))
		script += fmt.Sprintf("kmsctl mosip decrypt --app %s --ref '%s' --raw --in %s.in --out %[3]s.out --force\ncmp %[3]s.out %[3]s.txt\n", s.Application, s.Reference, base)
	}
	ts.Check(os.WriteFile(filepath.Join(dir, "decrypt.sh"), []byte(script), 0o755))
	ts.Check(os.WriteFile(filepath.Join(dir, "password"), []byte(mosipdbtest.Password+"\n"), 0o600))
}

// interruptCommand runs kmsctl and kills kmsd, which cannot end in order, as soon as it has some keys of an application:
//
//	interrupt KEYS APPLICATION ARGS...
func interruptCommand(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 3 {
		ts.Fatalf("usage: interrupt KEYS APPLICATION ARGS...")
	}
	n, err := strconv.Atoi(args[0])
	ts.Check(err)
	run := func(args ...string) (*exec.Cmd, *bytes.Buffer) {
		cmd := exec.Command(filepath.Join(bin, "kmsctl"), args...)
		cmd.Dir, cmd.SysProcAttr = ts.Getenv("WORK"), &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		for _, name := range []string{"PATH", "HOME", "XDG_RUNTIME_DIR", "KMSD_SOCKET"} {
			cmd.Env = append(cmd.Env, name+"="+ts.Getenv(name))
		}
		out := new(bytes.Buffer)
		cmd.Stdout, cmd.Stderr = out, out
		return cmd, out
	}
	work, said := run(args[2:]...)
	ts.Check(work.Start())
	for end := time.Now().Add(60 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		list, out := run("key", "list", args[1])
		ts.Check(list.Run())
		if strings.Count(out.String(), "\n") > n {
			break
		}
		if time.Now().After(end) {
			ts.Fatalf("no %d keys of %s within a minute", n, args[1])
		}
	}
	ts.Value("daemon").(*process).stop(syscall.SIGKILL)
	if err := work.Wait(); err == nil {
		ts.Fatalf("kmsctl was not interrupted")
	}
	ts.Logf("%s", said)
}
