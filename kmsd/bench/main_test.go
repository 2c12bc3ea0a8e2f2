package bench

import (
	"bufio"
	"context"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsd-project/kmsd/client"
)

var (
	bars   = flag.Bool("bars", false, "measure the bars and print the table")
	bins   = flag.String("bin", "../../bin", "directory of the built kmsd, kmsctl and kmsd-keyring")
	passes = flag.Int("passes", 5, "passes of every measurement")
	slice  = flag.Duration("slice", 400*time.Millisecond, "length of one measurement in one pass")
	only   = flag.String("only", "", "measure these parts alone: footprint, roundtrip, signing, sealing, creation, fairness, bulk, scale, resident; separated by commas")
	keys   = flag.Int("keys", 100_000, "keys of the large keystore")
	bulk   = flag.Int64("bulk", 1<<30, "bytes of the bulk measurement")
)

// echoSocket makes this test binary an echo server in a process of its own when it is set.
const echoSocket = "KMSD_BENCH_ECHO"

func TestMain(m *testing.M) {
	if path := os.Getenv(echoSocket); path != "" {
		echo(path)
		return
	}
	flag.Parse()
	if dir := os.Getenv(scaleStore); dir != "" {
		if err := measureStore(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// echo is the floor: what two Go processes pay for one message each way.
func echo(path string) {
	l, err := net.Listen("unix", path)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			buf := make([]byte, 64<<10)
			for {
				n, err := c.Read(buf)
				if err != nil {
					return
				}
				if _, err := c.Write(buf[:n]); err != nil {
					return
				}
			}
		}()
	}
}

func startEcho(t *testing.T) string {
	path := filepath.Join(t.TempDir(), "echo.sock")
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), echoSocket+"="+path)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	waitFor(t, func() bool { _, err := os.Stat(path); return err == nil })
	return path
}

// daemon is a private kmsd on the embedded default.
type daemon struct {
	pid    int
	socket string
	ready  time.Duration // from start to the ready line
	cmd    *exec.Cmd
}

func startDaemon(t *testing.T) *daemon {
	dir := t.TempDir()
	state, run := filepath.Join(dir, "state"), filepath.Join(dir, "run")
	kmsd, err := filepath.Abs(filepath.Join(*bins, "kmsd"))
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(kmsd, "init", "--state-dir", state, "--enclave", "keyring:file", "--no-recovery").CombinedOutput(); err != nil {
		t.Fatalf("kmsd init: %v\n%s", err, out)
	}
	return runDaemon(t, kmsd, state, run)
}

func runDaemon(t *testing.T, kmsd, state, run string) *daemon {
	cmd := exec.Command(kmsd, "run", "--state-dir", state, "--runtime-dir", run)
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Signal(syscall.SIGTERM); cmd.Wait() })
	lines := bufio.NewScanner(stderr)
	for lines.Scan() {
		if strings.Contains(lines.Text(), "ready") {
			ready := time.Since(begin)
			go io.Copy(io.Discard, stderr)
			return &daemon{pid: cmd.Process.Pid, socket: filepath.Join(run, "kmsd.sock"), ready: ready, cmd: cmd}
		}
	}
	t.Fatal("kmsd ended without a ready line")
	return nil
}

func (d *daemon) dial(t *testing.T) *client.Client {
	c, err := client.Dial(context.Background(), client.WithSocket(d.socket))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// cpu returns the processor time the daemon has used, all its threads together, in nanoseconds. The clock of another
// process is named by its pid (clock_getcpuclockid(3)).
func (d *daemon) cpu() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(int32(^d.pid<<3|2), &ts); err != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}

// memory returns a field of /proc/PID/status in bytes.
func (d *daemon) memory(field string) int64 {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", d.pid))
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, field+":"); ok {
			kb, _ := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
			return kb << 10
		}
	}
	return 0
}

// resetPeak makes VmHWM begin anew (proc_pid_clear_refs(5)).
func (d *daemon) resetPeak() {
	os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", d.pid), []byte("5"), 0)
}

// ownCPU returns the processor time of this process.
func ownCPU() time.Duration {
	var u syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func waitFor(t *testing.T, ready func() bool) {
	deadline := time.Now().Add(10 * time.Second)
	for !ready() {
		if time.Now().After(deadline) {
			t.Fatal("timed out")
		}
		time.Sleep(5 * time.Millisecond)
	}
}
