package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
)

// demo is the private daemon and what the steps share.
type demo struct {
	bin, dir string
	kmsd     *exec.Cmd
	exited   chan error
	log      logTail
	steps    int
	total    time.Duration
}

func (d *demo) path(name string) string { return filepath.Join(d.dir, name) }

// step runs one part and prints how long it took.
func (d *demo) step(what string, f func() error) error {
	d.steps++
	fmt.Printf("\n%2d. %-68s", d.steps, what)
	begin := time.Now()
	err := f()
	took := time.Since(begin)
	d.total += took
	if err != nil {
		fmt.Println(" FAILED")
		return err
	}
	fmt.Printf(" %6.0f ms\n", float64(took.Microseconds())/1000)
	return nil
}

// note says in plain words what a step proved.
func (d *demo) note(format string, args ...any) { fmt.Printf("    "+format+"\n", args...) }

func megabytes(n int) string { return fmt.Sprintf("%.1f MB", float64(n)/1e6) }

func (d *demo) init(ctx context.Context) error {
	_, err := d.command(ctx, nil, "kmsd", "init", "--state-dir", d.path("state"), "--enclave", "keyring:file", "--recovery-out", d.path("recovery.txt"))
	return err
}

// start runs kmsd until stop and waits for its ready line.
func (d *demo) start(ctx context.Context) error {
	cmd := exec.Command(filepath.Join(d.bin, "kmsd"), "run", "--state-dir", d.path("state"), "--runtime-dir", d.path("run"))
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM} // Ctrl-C is for the demo, which stops kmsd itself
	stderr, err := cmd.StderrPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	ready, exited := make(chan struct{}), make(chan error, 1)
	go func() {
		var once sync.Once
		lines := bufio.NewScanner(stderr)
		for lines.Scan() {
			d.log.add(lines.Text())
			if lines.Text() == "ready" {
				once.Do(func() { close(ready) })
			}
		}
		exited <- cmd.Wait()
	}()
	d.kmsd, d.exited = cmd, exited
	select {
	case <-ready:
		return nil
	case err := <-exited:
		d.kmsd = nil
		return fmt.Errorf("kmsd ended at start: %v\n%s", err, d.log.text())
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(30 * time.Second):
		return fmt.Errorf("kmsd was not ready within 30 s\n%s", d.log.text())
	}
}

// stop ends kmsd in good order. Without a daemon it does nothing.
func (d *demo) stop() error {
	if d.kmsd == nil {
		return nil
	}
	process := d.kmsd.Process
	d.kmsd = nil
	process.Signal(syscall.SIGTERM)
	select {
	case err := <-d.exited:
		return err
	case <-time.After(10 * time.Second):
		process.Kill()
		<-d.exited
		return errors.New("kmsd did not stop within 10 s")
	}
}

// ctl runs kmsctl on the private daemon and returns its standard output.
func (d *demo) ctl(ctx context.Context, stdin []byte, args ...string) ([]byte, error) {
	return d.command(ctx, stdin, "kmsctl", append([]string{"--socket", d.path("run")}, args...)...)
}

func (d *demo) ctlWrite(name string, data []byte) error {
	return os.WriteFile(d.path(name), data, 0o600)
}

func (d *demo) command(ctx context.Context, stdin []byte, name string, args ...string) ([]byte, error) {
	path := name
	if !strings.Contains(name, "/") {
		path = filepath.Join(d.bin, name)
	}
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Stdin = bytes.NewReader(stdin)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, stderr.String())
	}
	return stdout.Bytes(), nil
}

// keys makes the chain root - module - base and the signing key of the machine.
func (d *demo) keys(ctx context.Context) error {
	for _, args := range [][]string{
		{"key", "create", root, "--alg", "rsa-2048", "--usage", "sign,verify,certify", "--expires", "5y"},
		{"key", "create", module, "--alg", "rsa-2048", "--usage", "sign,verify,certify", "--expires", "3y"},
		{"key", "create", base, "--alg", "rsa-2048", "--usage", "encrypt,decrypt", "--expires", "2y"},
		{"key", "create", machine, "--alg", "rsa-2048", "--expires", "2y"},
		{"cert", "self-sign", root, "--subject", "CN=Root,O=Demo Country", "--ca", "--out", d.path("root.pem")},
		{"cert", "issue", module, "--issuer", root, "--subject", "CN=Registration,O=Demo Country", "--ca", "--out", d.path("module.pem")},
		{"cert", "issue", base, "--issuer", module, "--subject", "CN=10001_110011,O=Demo Country", "--out", d.path("base.pem")},
		{"cert", "issue", machine, "--issuer", module, "--subject", "CN=machine-110011,O=Demo Country", "--out", d.path("machine.pem")},
		{"public", machine, "--out", d.path("machine.pub")},
	} {
		if _, err := d.ctl(ctx, nil, args...); err != nil {
			return err
		}
	}
	return nil
}

// openssl has the chain and the signature judged by the system's OpenSSL, where there is one.
func (d *demo) openssl(ctx context.Context, data []byte) (string, error) {
	path, err := exec.LookPath("openssl")
	if err != nil {
		return "OpenSSL, which would judge the chain and the signature independently, is not installed here.", nil
	}
	for _, leaf := range []string{"base.pem", "machine.pem"} {
		if _, err := d.command(ctx, nil, path, "verify", "-CAfile", d.path("root.pem"), "-untrusted", d.path("module.pem"), d.path(leaf)); err != nil {
			return "", err
		}
	}
	if _, err := d.command(ctx, data, path, "dgst", "-sha256", "-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:digest",
		"-verify", d.path("machine.pub"), "-signature", d.path("packet.sig")); err != nil {
		return "", err
	}
	return "OpenSSL agrees: the signature is right, and both certificates chain up to the root.", nil
}

// tamper changes one bit of the packet, and of the data, and expects both to be refused.
func (d *demo) tamper(ctx context.Context, sealed string, data []byte) error {
	packet, err := os.ReadFile(sealed)
	if err != nil {
		return err
	}
	packet[len(packet)/2] ^= 1
	if err := os.WriteFile(d.path("changed.enc"), packet, 0o600); err != nil {
		return err
	}
	if _, err := d.ctl(ctx, nil, "packet", "decrypt", "--key", base, "--in", d.path("changed.enc"), "--out", d.path("changed.zip")); err == nil {
		return errors.New("a changed packet was decrypted")
	} else if ctx.Err() != nil {
		return ctx.Err()
	}
	if _, err := os.Stat(d.path("changed.zip")); !errors.Is(err, fs.ErrNotExist) {
		return errors.New("decrypting a changed packet left a file")
	}
	changed := bytes.Clone(data)
	changed[len(changed)/3] ^= 1
	if _, err := d.ctl(ctx, changed, "verify", "--key", machine, "--in", "-", "--sig", d.path("packet.sig")); err == nil {
		return errors.New("changed data were verified")
	}
	return ctx.Err()
}

// scan looks for the names in every file below the state directory. Finding them in the open packet proves that the
// search works.
func (d *demo) scan(plain []byte) (files, size int, err error) {
	names := []string{root, module, base, machine, "10001_110011", "machine-110011", "Demo Country", resident}
	for _, name := range []string{resident, module} {
		if !bytes.Contains(plain, []byte(name)) {
			return 0, 0, fmt.Errorf("the search does not even find %q in the open packet", name)
		}
	}
	err = filepath.WalkDir(d.path("state"), func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() {
			return err
		}
		content, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		files, size = files+1, size+len(content)
		for _, name := range names {
			if bytes.Contains(content, []byte(name)) || strings.Contains(path, name) {
				return fmt.Errorf("%s holds %q", path, name)
			}
		}
		return nil
	})
	if err == nil && files < 2 {
		err = fmt.Errorf("only %d files were found in the state directory", files)
	}
	return files, size, err
}

// logTail keeps the last lines of the daemon's log for error messages.
type logTail struct {
	mu    sync.Mutex
	lines []string
}

func (l *logTail) add(line string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.lines = append(l.lines, line); len(l.lines) > 30 {
		l.lines = l.lines[1:]
	}
}

func (l *logTail) text() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Join(l.lines, "\n")
}
