package main

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsd-project/kmsd/ipc/proto"
)

// The threats of a local daemon, each tried on the real program. Those that concern the store alone are tested with it.

// other and stranger are users of the machine that own nothing.
const (
	daemonUID   = 64001
	otherUID    = 64002
	strangerUID = 64003
)

// asRoot is for tests that become another user, or look where only root can. It fails where they should run and cannot.
func asRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("CI") != "" {
		t.Fatal("this test needs root")
	}
	t.Skip("needs root; the continuous integration runs it as root")
}

// openTo makes a directory that the daemon's user owns and everybody may pass.
func openTo(t *testing.T, uid int) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "kmsd-threats-") // not t.TempDir, which is for us alone
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := errors.Join(os.Chmod(dir, 0o755), os.Chown(dir, uid, uid)); err != nil {
		t.Fatal(err)
	}
	return dir
}

// startAs makes a keystore and runs the real daemon on it as another user, with a configuration file if there is one.
func startAs(t *testing.T, uid uint32, dir, config string) *process {
	t.Helper()
	become := &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	key := filepath.Join(dir, "key")
	run := runInitProgram(t, func(c *exec.Cmd) { c.SysProcAttr, c.Env = become, []string{"HOME=" + dir} },
		"--state-dir", filepath.Join(dir, "s"), "--recovery-out", key)
	if run.code != 0 {
		t.Fatalf("%+v", run)
	}
	args := []string{"run", "--state-dir", filepath.Join(dir, "s"), "--runtime-dir", filepath.Join(dir, "r")}
	if config != "" {
		args = append(args, "--config", config)
	}
	p := &process{t: t, dir: dir, lines: make(chan string, 1000)}
	p.app, p.admin = filepath.Join(dir, "r", "kmsd.sock"), filepath.Join(dir, "r", "admin.sock")
	p.cmd = exec.Command(program(t), args...)
	p.cmd.Env, p.cmd.SysProcAttr = []string{"HOME=" + dir}, become
	return p.start().ready()
}

// dialAs connects as another user: the thread that connects, and whose credentials the kernel keeps, is that user's.
func dialAs(t *testing.T, uid int, path string) (*net.UnixConn, error) {
	t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	become := func(uid int) {
		for _, call := range []uintptr{unix.SYS_SETRESGID, unix.SYS_SETRESUID} {
			if uid == 0 { // the way back begins with the uid
				call ^= unix.SYS_SETRESGID ^ unix.SYS_SETRESUID
			}
			if _, _, errno := unix.RawSyscall(call, ^uintptr(0), uintptr(uid), ^uintptr(0)); errno != 0 {
				t.Fatal(errno)
			}
		}
	}
	become(uid)
	defer become(0)
	return net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
}

// boundAs is bound as another user.
func boundAs(t *testing.T, uid int, path string) *peer {
	t.Helper()
	c, err := dialAs(t, uid, path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(20 * time.Second))
	p := &peer{t, c}
	p.shake()
	return p
}

// attackerEnv makes the test program the attacker of TestSameUserCannotLookInside.
const attackerEnv = "KMSD_TEST_ATTACKER"

// TestAttackerChild runs as the user of the daemon and tries to look into the process it is given. It says on standard
// output what succeeded.
func TestAttackerChild(t *testing.T) {
	pid, err := strconv.Atoi(os.Getenv(attackerEnv))
	if err != nil {
		return // only the test below makes this a process of its own
	}
	for _, name := range []string{"mem", "maps", "smaps", "pagemap", "environ", "auxv", "fd", "map_files", "stack", "syscall", "io", "root/etc", "cwd/x"} {
		path := fmt.Sprintf("/proc/%d/%s", pid, name)
		if f, err := os.Open(path); err == nil {
			if n, _ := f.Read(make([]byte, 16)); n > 0 || name == "mem" || name == "fd" || name == "map_files" {
				if entries, err := f.Readdirnames(1); name != "fd" && name != "map_files" || err == nil && len(entries) > 0 {
					fmt.Println("BROKEN: read", path)
				}
			}
			f.Close()
		}
	}
	if f, err := os.OpenFile(fmt.Sprintf("/proc/%d/mem", pid), os.O_RDWR, 0); err == nil {
		f.Close()
		fmt.Println("BROKEN: open mem for writing")
	}
	for _, name := range []string{"exe", "cwd", "fd/0"} {
		if target, err := os.Readlink(fmt.Sprintf("/proc/%d/%s", pid, name)); err == nil {
			fmt.Println("BROKEN: readlink", name, target)
		}
	}
	for name, err := range map[string]error{"attach": unix.PtraceAttach(pid), "seize": unix.PtraceSeize(pid)} {
		if err == nil {
			fmt.Println("BROKEN: ptrace", name)
		}
	}
	buf := make([]byte, 8)
	local := []unix.Iovec{{Base: &buf[0], Len: 8}}
	for _, address := range []uintptr{0x400000, 0xc000000000} {
		if _, err := unix.ProcessVMReadv(pid, local, []unix.RemoteIovec{{Base: address, Len: 8}}, 0); err != unix.EPERM {
			fmt.Println("BROKEN: process_vm_readv", err)
		}
		if _, err := unix.ProcessVMWritev(pid, local, []unix.RemoteIovec{{Base: address, Len: 8}}, 0); err != unix.EPERM {
			fmt.Println("BROKEN: process_vm_writev", err)
		}
	}
	if fd, err := unix.PidfdOpen(pid, 0); err == nil {
		for target := range 12 {
			if _, err := unix.PidfdGetfd(fd, target, 0); err == nil {
				fmt.Println("BROKEN: pidfd_getfd", target)
			}
		}
	}
	// What brings core dumps back, for which the kernel asks for more than the same user.
	unix.Prlimit(pid, unix.RLIMIT_CORE, &unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}, nil)
	var core unix.Rlimit
	if err := unix.Prlimit(pid, unix.RLIMIT_CORE, nil, &core); err == nil && core.Max != 0 {
		fmt.Println("BROKEN: prlimit", core)
	}
	fmt.Println("tried everything")
}

// TestSameUserCannotLookInside: another program of the daemon's own user finds no way into the daemon, its spawner or its
// helper. The same attacks work on a process that does not protect itself.
func TestSameUserCannotLookInside(t *testing.T) {
	asRoot(t)
	dir := openTo(t, daemonUID)
	p := startAs(t, daemonUID, dir, "")
	attacker := filepath.Join(dir, "attacker")
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(attacker, self, 0o755); err != nil {
		t.Fatal(err)
	}
	attack := func(pid int) string {
		t.Helper()
		cmd := exec.Command(attacker, "-test.run=^TestAttackerChild$")
		cmd.Env, cmd.Dir = []string{attackerEnv + "=" + strconv.Itoa(pid)}, "/"
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: daemonUID, Gid: daemonUID}}
		out, err := cmd.CombinedOutput()
		if err != nil || !bytes.Contains(out, []byte("tried everything")) {
			t.Fatalf("the attacker fails: %v\n%s", err, out)
		}
		return string(out)
	}
	admin := boundAs(t, daemonUID, p.admin)
	admin.send(3, proto.OpSlotTest, &proto.SlotRef{ID: 1}, nil) // starts the helper, if it rests
	admin.want(3, &proto.Empty{})
	victims := append([]int{p.cmd.Process.Pid}, childrenOf(t, p.cmd.Process.Pid)...)
	if len(victims) < 3 {
		t.Errorf("only %d processes: the spawner and the helper are missing", len(victims))
	}
	for _, pid := range victims {
		name, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if out := attack(pid); strings.Contains(out, "BROKEN") {
			t.Errorf("%q: %s", name, out)
		}
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil || !bytes.Contains(status, []byte("TracerPid:\t0\n")) {
			t.Errorf("%q is traced: %s, %v", name, status, err)
		}
	}
	naive := exec.Command("/bin/sleep", "60")
	naive.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: daemonUID, Gid: daemonUID}}
	if err := naive.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { naive.Process.Kill(); naive.Wait() }()
	if out := attack(naive.Process.Pid); strings.Count(out, "BROKEN") < 8 {
		t.Errorf("the attacks do not even work on a process without protection:\n%s", out)
	}
}

// childrenOf returns the processes below a process.
func childrenOf(t *testing.T, parent int) (all []int) {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/status")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		text, _ := os.ReadFile(file)
		if bytes.Contains(text, fmt.Appendf(nil, "\nPPid:\t%d\n", parent)) {
			child, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
			if err != nil {
				t.Fatal(err)
			}
			all = append(append(all, child), childrenOf(t, child)...)
		}
	}
	return all
}

// TestNoNetworkSockets: neither the daemon nor what it starts has a socket of any other family than Unix.
func TestNoNetworkSockets(t *testing.T) {
	asRoot(t)
	d, _ := besieged(t)
	d.ask(proto.OpSlotTest, &proto.SlotRef{ID: 1}, &proto.Empty{})
	unixSockets, err := os.ReadFile("/proc/net/unix")
	if err != nil {
		t.Fatal(err)
	}
	sockets := 0
	for _, pid := range append([]int{d.cmd.Process.Pid}, childrenOf(t, d.cmd.Process.Pid)...) {
		files, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range files {
			target, _ := os.Readlink(file)
			inode, ok := strings.CutPrefix(target, "socket:[")
			if !ok {
				continue
			}
			sockets++
			if !bytes.Contains(unixSockets, []byte(" "+strings.TrimSuffix(inode, "]"))) {
				t.Errorf("process %d has a socket that is not a Unix socket: %s", pid, target)
			}
		}
	}
	if sockets < 3 {
		t.Errorf("only %d sockets were found", sockets)
	}
}

// systemDaemon runs the real daemon in system mode, with one application for otherUID.
func systemDaemon(t *testing.T) *process {
	t.Helper()
	dir := openTo(t, daemonUID)
	policy, config := filepath.Join(dir, "policy.toml"), filepath.Join(dir, "kmsd.toml")
	for path, text := range map[string]string{
		policy: fmt.Sprintf("version = 1\n[applications]\nmine = [%d]\n", otherUID),
		config: fmt.Sprintf("mode = \"system\"\npolicy_file = %q\nadmin_group = \"%d\"\n[helpers]\nstart = \"children\"\n", policy, daemonUID),
	} {
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return startAs(t, daemonUID, dir, config)
}

// TestNothingTellsWhichKeysExist asks for a key that is there and for one that is not, in every way there is, as a user
// who may use neither. The answers are the same to the byte.
func TestNothingTellsWhichKeysExist(t *testing.T) {
	asRoot(t)
	p := systemDaemon(t)
	admin := bound(t, p.admin) // root administrates
	for i, k := range []proto.KeyCreate{
		{Name: "secret/a", Algorithm: "ecdsa-p256", Exportable: true}, {Name: "secret/s", Algorithm: "aes-256-gcm"},
		{Name: "mine/sign", Algorithm: "ecdsa-p256", Usage: []string{"sign", "verify", "certify"}},
		{Name: "mine/aes", Algorithm: "aes-256-gcm"}, {Name: "mine/kek", Algorithm: "aes-256-gcm", Usage: []string{"wrap", "unwrap"}},
		{Name: "mine/ecdh", Algorithm: "ecdh-p256"}, {Name: "mine/kdf", Algorithm: "hkdf-sha256"},
	} {
		admin.send(uint64(10+i), proto.OpKeyCreate, &k, nil)
		admin.want(uint64(10+i), &proto.KeyInfo{})
	}
	// An application's uid on the admin socket, and an unknown one, get nowhere.
	for _, uid := range []int{otherUID, strangerUID} {
		if c, err := dialAs(t, uid, p.admin); err == nil {
			c.Close()
			t.Errorf("uid %d may open the admin socket", uid)
		}
	}
	describe := func(name string) proto.KeyCreate { return proto.KeyCreate{Name: name, Algorithm: "aes-256-gcm"} }
	sig := []byte("\x30\x06\x02\x01\x01\x02\x01\x01")
	questions := map[string]func(name string) (string, proto.Message){
		"get":     func(n string) (string, proto.Message) { return proto.OpKeyGet, &proto.KeyRef{Key: n} },
		"version": func(n string) (string, proto.Message) { return proto.OpKeyGet, &proto.KeyRef{Key: n + "@1"} },
		"public":  func(n string) (string, proto.Message) { return proto.OpPublic, &proto.KeyRef{Key: n} },
		"cert":    func(n string) (string, proto.Message) { return proto.OpCertGet, &proto.KeyRef{Key: n} },
		"sign":    func(n string) (string, proto.Message) { return proto.OpSign, &proto.Sign{Key: n, Data: []byte("x")} },
		"sign@9": func(n string) (string, proto.Message) {
			return proto.OpSign, &proto.Sign{Key: n + "@9", Data: []byte("x")}
		},
		"scheme": func(n string) (string, proto.Message) {
			return proto.OpSign, &proto.Sign{Key: n, Scheme: "rsa-pss-sha256", Data: []byte("x")}
		},
		"verify": func(n string) (string, proto.Message) {
			return proto.OpVerify, &proto.Verify{Key: n, Data: []byte("x"), Signature: sig}
		},
		"mac":     func(n string) (string, proto.Message) { return proto.OpMAC, &proto.MAC{Key: n} },
		"encrypt": func(n string) (string, proto.Message) { return proto.OpEncrypt, &proto.Encrypt{Key: n} },
		"decrypt": func(n string) (string, proto.Message) {
			return proto.OpDecrypt, &proto.Decrypt{Key: n, Ciphertext: make([]byte, 80)}
		},
		"rewrap": func(n string) (string, proto.Message) {
			return proto.OpRewrap, &proto.Rewrap{Key: n, Ciphertext: make([]byte, 80)}
		},
		"data key": func(n string) (string, proto.Message) { return proto.OpDataKey, &proto.DataKey{Key: n} },
		"stream": func(n string) (string, proto.Message) {
			return proto.OpStreamBegin, &proto.StreamBegin{Op: "encrypt", Key: n}
		},
		"create":  func(n string) (string, proto.Message) { k := describe(n); return proto.OpKeyCreate, &k },
		"set":     func(n string) (string, proto.Message) { return proto.OpKeySet, &proto.KeySet{Key: n, Keep: 3} },
		"rotate":  func(n string) (string, proto.Message) { return proto.OpKeyRotate, &proto.KeyRotate{Key: n} },
		"suspend": func(n string) (string, proto.Message) { return proto.OpKeySuspend, &proto.KeyRef{Key: n} },
		"resume":  func(n string) (string, proto.Message) { return proto.OpKeyResume, &proto.KeyRef{Key: n} },
		"revoke":  func(n string) (string, proto.Message) { return proto.OpKeyRevoke, &proto.KeyRevoke{Key: n} },
		"destroy": func(n string) (string, proto.Message) {
			return proto.OpKeyDestroy, &proto.KeyDestroy{Key: n, Now: true}
		},
		"cancel": func(n string) (string, proto.Message) { return proto.OpKeyDestroyCancel, &proto.KeyRef{Key: n} },
		"list":   func(n string) (string, proto.Message) { return proto.OpKeyList, &proto.KeyList{Prefix: n} },
		"request": func(n string) (string, proto.Message) {
			return proto.OpCertRequest, &proto.CertRequest{Key: n, Subject: proto.Subject{DN: "CN=x"}}
		},
		"issuer": func(n string) (string, proto.Message) {
			return proto.OpCertIssue, &proto.CertIssue{Issuer: n, Key: "mine/sign", Subject: proto.Subject{DN: "CN=x"}}
		},
		"issue to": func(n string) (string, proto.Message) {
			return proto.OpCertIssue, &proto.CertIssue{Issuer: "mine/sign", Key: n, Subject: proto.Subject{DN: "CN=x"}}
		},
		"attach": func(n string) (string, proto.Message) {
			return proto.OpCertAttach, &proto.CertAttach{Key: n, Chain: [][]byte{sig}}
		},
		"wrap":    func(n string) (string, proto.Message) { return proto.OpWrap, &proto.Wrap{Key: "mine/kek", Target: n} },
		"wrap by": func(n string) (string, proto.Message) { return proto.OpWrap, &proto.Wrap{Key: n, Target: "mine/aes"} },
		"unwrap": func(n string) (string, proto.Message) {
			return proto.OpUnwrap, &proto.Unwrap{Key: "mine/kek", Wrapped: make([]byte, 40), New: describe(n)}
		},
		"agree": func(n string) (string, proto.Message) {
			return proto.OpAgree, &proto.Agree{Key: "mine/ecdh", Peer: sig, New: describe(n)}
		},
		"derive": func(n string) (string, proto.Message) {
			return proto.OpDerive, &proto.Derive{Key: "mine/kdf", New: describe(n)}
		},
		"import": func(n string) (string, proto.Message) {
			return proto.OpKeyImport, &proto.KeyImport{Key: describe(n), Wrapped: make([]byte, 1200), Token: make([]byte, 16)}
		},
		"plain": func(n string) (string, proto.Message) {
			return proto.OpKeyImport, &proto.KeyImport{Key: describe(n), Material: make([]byte, 32)}
		},
		"batch": func(n string) (string, proto.Message) {
			params, _ := proto.AppendParams(nil, &proto.Sign{Key: n, Data: []byte("x")})
			return proto.OpBatch, &proto.Batch{Items: []proto.BatchItem{{Op: proto.OpSign, Params: params}, {Op: proto.OpKeyGet, Params: params}}}
		},
	}
	for _, uid := range []int{otherUID, strangerUID} {
		c := boundAs(t, uid, p.app)
		for name, question := range questions {
			answer := func(key string) []byte {
				op, params := question(key)
				c.send(77, op, params, nil)
				f, err := c.frame()
				if err != nil {
					t.Fatalf("%s: %v", name, err)
				}
				if r, err := proto.ParseResponse(f); err != nil || r.Err != nil && r.Err.Code != proto.CodeNotAvailable || r.Err == nil && op != proto.OpBatch {
					t.Errorf("%s as uid %d is answered %v, %v", name, uid, r.Err, err)
				}
				return f
			}
			for _, there := range []string{"secret/a", "secret/s"} {
				if yes, no := answer(there), answer("secret/x"); !bytes.Equal(yes, no) {
					t.Errorf("%s as uid %d tells whether the key exists:\n%q\n%q", name, uid, yes, no)
				}
			}
			if yes, no := answer("secret/a"), answer("nobody/a"); !bytes.Equal(yes, no) {
				t.Errorf("%s as uid %d tells whether the application exists:\n%q\n%q", name, uid, yes, no)
			}
		}
	}

	// Nor does the time: the policy decides on the name before anything is looked up.
	c := boundAs(t, otherUID, p.app)
	const n = 2000
	var took [2][]time.Duration
	for i := range 2 * n {
		start := time.Now()
		c.send(78, proto.OpKeyGet, &proto.KeyRef{Key: []string{"secret/a", "secret/x"}[i%2]}, nil)
		c.wantError(78, proto.CodeNotAvailable)
		took[i%2] = append(took[i%2], time.Since(start))
	}
	for i := range took {
		slices.Sort(took[i])
	}
	yes, no := took[0][n/2], took[1][n/2]
	if ratio := float64(yes) / float64(no); ratio > 1.2 || ratio < 1/1.2 {
		t.Errorf("the refusal takes %v for a key that is there and %v for one that is not", yes, no)
	}

	// What the user may use works, and the administrator finds everything as it was.
	c.send(79, proto.OpSign, &proto.Sign{Key: "mine/sign", Data: []byte("x")}, nil)
	c.want(79, &proto.SignReply{})
	admin.send(80, proto.OpKeyGet, &proto.KeyRef{Key: "secret/a"}, nil)
	var info proto.KeyInfo
	if admin.want(80, &info); info.Current != 1 || info.Versions[0].State != "active" {
		t.Errorf("the key has changed: %+v", info)
	}
}

// TestCanariesAreNowhere puts canaries into every text and every secret that a client can hand in, in requests that
// succeed and in ones that are refused, and looks for them: names and data in no file and not in the log, secrets not in
// an answer either.
func TestCanariesAreNowhere(t *testing.T) {
	d, log := besieged(t)
	c := "CANARY"
	secret := []byte("CANARYsecret" + strings.Repeat("S", 20))
	key := "CANARYapp/CANARYname"
	id := uint64(100)
	admin := bound(t, d.admin)
	answers := 0
	ask := func(op string, m proto.Message) proto.Response {
		t.Helper()
		id++
		admin.send(id, op, m, &proto.Options{Trace: "CANARYtrace", RequestKey: []byte("CANARYrequest")})
		f, err := admin.frame()
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(f, secret[:12]) && op != proto.OpDecrypt {
			t.Errorf("the answer to %s holds the secret: %q", op, f)
		}
		r, err := proto.ParseResponse(f)
		if err != nil {
			t.Fatal(err)
		}
		if r.Err == nil {
			answers++
		}
		return r
	}
	describe := proto.KeyCreate{Name: key, Algorithm: "aes-256-gcm", Labels: map[string]string{"CANARYlabel": "CANARYvalue"}}
	ask(proto.OpKeyImport, &proto.KeyImport{Key: describe, Material: bytes.Clone(secret)})
	for _, m := range []struct {
		op string
		m  proto.Message
	}{
		{proto.OpKeySet, &proto.KeySet{Key: key, Labels: map[string]string{"CANARYother": "CANARYvalue"}}},
		{proto.OpKeyCreate, &proto.KeyCreate{Name: "CANARY bad name", Algorithm: "CANARYalgorithm", Usage: []string{"CANARYusage"}}},
		{proto.OpKeyCreate, &proto.KeyCreate{Name: "CANARYapp/CANARYec", Algorithm: "ecdsa-p256", Usage: []string{"sign", "verify", "certify"}}},
		{proto.OpKeyCreate, &proto.KeyCreate{Name: "CANARYapp/CANARYbridged", Algorithm: "ed25519", UsableVia: []string{"native", "CANARYbridge"}}},
		{proto.OpKeyGet, &proto.KeyRef{Key: "CANARYapp/CANARYmissing"}},
		{proto.OpKeyList, &proto.KeyList{Prefix: "CANARYapp/CANARY"}},
		{proto.OpKeyRevoke, &proto.KeyRevoke{Key: key, Reason: "CANARYreason"}},
		{proto.OpSign, &proto.Sign{Key: "CANARYapp/CANARYec", Scheme: "CANARYscheme", Data: secret}},
		{proto.OpSign, &proto.Sign{Key: "CANARYapp/CANARYec", Data: secret}},
		{proto.OpMACVerify, &proto.MACVerify{Key: key, Data: secret, MAC: secret}},
		{proto.OpDecrypt, &proto.Decrypt{Key: key, Ciphertext: secret, AAD: secret, Label: secret}},
		{proto.OpUnwrap, &proto.Unwrap{Key: key, Wrapped: secret, New: proto.KeyCreate{Name: "CANARYapp/CANARYnew", Algorithm: "aes-256-gcm"}}},
		{proto.OpAgree, &proto.Agree{Key: key, Peer: secret, Salt: secret, Info: secret, New: describe}},
		{proto.OpKeyImport, &proto.KeyImport{Key: proto.KeyCreate{Name: "CANARYapp/CANARYimport", Algorithm: "ecdsa-p256"}, Material: bytes.Clone(secret)}},
		{proto.OpKeyImport, &proto.KeyImport{Key: proto.KeyCreate{Name: "CANARYapp/CANARYimport", Algorithm: "rsa-2048"}, Wrapped: secret, Token: secret[:16]}},
		{proto.OpCertSelfSign, &proto.CertSelfSign{Key: "CANARYapp/CANARYec", Subject: proto.Subject{DN: "CN=CANARYsubject", DNS: []string{"canary.CANARY"}}}},
		{proto.OpCertIssue, &proto.CertIssue{Issuer: "CANARYapp/CANARYec", Request: secret, Subject: proto.Subject{DN: "CANARYsubject"}}},
		{proto.OpUnlock, &proto.Unlock{Secret: bytes.Clone(secret)}},
		{proto.OpSlotAdd, &proto.SlotAdd{Enclave: "CANARYenclave", Label: "CANARYslot", PIN: bytes.Clone(secret)}},
		{proto.OpSlotTest, &proto.SlotRef{ID: 2, Secret: bytes.Clone(secret)}},
		{proto.OpSlotTest, &proto.SlotRef{ID: 2, Shares: [][]byte{bytes.Clone(secret)}}},
		{proto.OpBackupCreate, &proto.BackupCreate{Recipients: []string{"CANARYrecipient"}}},
		{proto.OpInit, &proto.Init{Enclave: "CANARYenclave", PIN: bytes.Clone(secret), EscrowTo: []string{"CANARYrecipient"}}},
		{proto.OpStreamBegin, &proto.StreamBegin{Op: "CANARYop", Key: key, AAD: secret}},
		{"CANARYoperation", &proto.Empty{}},
	} {
		ask(m.op, m.m)
	}
	var sealed proto.EncryptReply
	if r := ask(proto.OpEncrypt, &proto.Encrypt{Key: key, Data: secret, AAD: secret}); r.Err != nil || proto.DecodeReply(r.Result, &sealed) != nil {
		t.Fatalf("encrypt: %v", r.Err)
	}
	if r := ask(proto.OpDecrypt, &proto.Decrypt{Key: key, Ciphertext: sealed.Ciphertext, AAD: secret}); r.Err != nil {
		t.Fatalf("decrypt: %v", r.Err)
	}
	ask(proto.OpLock, &proto.Empty{})
	ask(proto.OpUnlock, &proto.Unlock{Secret: bytes.Clone(secret)})
	ask(proto.OpUnlock, &proto.Unlock{})
	p := dial(t, d.admin)
	p.send(1, proto.OpHello, &proto.Hello{MinVersion: 1, MaxVersion: 1, Client: "CANARYclient", Features: []string{"CANARYfeature"}}, nil)
	p.want(1, &proto.HelloReply{})
	p.Write(frameOf("CANARY is no frame"))
	p.response()
	ask(proto.OpAuditHead, &proto.Empty{}) // the audit log is on disk now
	if answers < 8 {
		t.Errorf("only %d requests succeeded: the test proves little", answers)
	}
	admin.Close()
	d.conn.Close()
	d.stop()
	files := 0
	err := filepath.WalkDir(filepath.Join(d.dir, "s"), func(path string, entry os.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() {
			return err
		}
		files++
		content, err := os.ReadFile(path)
		if bytes.Contains(content, []byte(c)) || strings.Contains(path, c) || bytes.Contains(bytes.ToUpper(content), []byte("CANARY.CANARY")) {
			t.Errorf("%s holds a canary", path)
		}
		return err
	})
	if err != nil || files < 4 {
		t.Errorf("%d files, %v", files, err)
	}
	if strings.Contains(log.String(), c) {
		t.Errorf("the log holds a canary:\n%s", log)
	}
}

// TestOldDatabaseUnderNewHeader: an older copy of the database is put under the header of today. That is a rollback, and
// said to be one; nothing is served from it, with whatever slot one tries.
func TestOldDatabaseUnderNewHeader(t *testing.T) {
	for name, act := range map[string]func(d *realDaemon){
		"a key destroyed since": func(d *realDaemon) {
			d.ask(proto.OpKeyDestroy, &proto.KeyDestroy{Key: "app/old", Now: true}, &proto.KeyInfo{})
		},
		"a key compromised since": func(d *realDaemon) {
			d.ask(proto.OpKeyRevoke, &proto.KeyRevoke{Key: "app/old", Reason: "key-compromise"}, &proto.KeyInfo{})
		},
		"the root rotated since": func(d *realDaemon) {
			d.ask(proto.OpRootRotate, &proto.Empty{}, &proto.ProgressReply{})
		},
	} {
		t.Run(name, func(t *testing.T) {
			d, recoveryKey := initialised(t)
			create(t, d.process, "ed25519", "app/old")
			d.conn.Close()
			d.stop()
			database := filepath.Join(d.dir, "s", "store.db")
			old, err := os.ReadFile(database)
			if err != nil {
				t.Fatal(err)
			}
			d = startReal(t, d.dir)
			act(d)
			d.conn.Close()
			d.stop()
			if err := os.WriteFile(database, old, 0o600); err != nil {
				t.Fatal(err)
			}
			d = startReal(t, d.dir)
			if s := d.state(); s != "locked" {
				t.Fatalf("the daemon is %s", s)
			}
			d.refused(proto.OpUnlock, &proto.Unlock{}, proto.CodeRollback)
			d.refused(proto.OpUnlock, &proto.Unlock{Secret: recoveryKey}, proto.CodeRollback)
			d.refused(proto.OpSign, &proto.Sign{Key: "app/old", Data: []byte("x")}, proto.CodeLocked)
		})
	}
}
