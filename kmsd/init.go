package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/signal"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/enclave/keyring"
	"github.com/kmsd-project/kmsd/enclave/pkcs11"
	"github.com/kmsd-project/kmsd/enclave/recovery"
	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/durable"
	"github.com/kmsd-project/kmsd/keystore/secmem"
	"github.com/kmsd-project/kmsd/kmsd/audit"
	"github.com/kmsd-project/kmsd/kmsd/engine"
)

const (
	initTimeout = 2 * time.Minute // for the devices and the disk, not for people
	maxPIN      = 1 << 10
)

// hinted is an error together with what to do about it.
type hinted struct {
	error
	hint string
}

func (h hinted) Unwrap() error { return h.error }

// initMain makes a keystore without a daemon: the same work as the operation init, and a dialogue where there is a terminal.
func initMain(args []string) int {
	return runInit(args, os.Stdin, os.Stdout, os.Stderr)
}

func runInit(args []string, in, out, errs *os.File) int {
	c := &initCommand{in: in, out: out, errs: errs}
	flags := flag.NewFlagSet("kmsd init", flag.ContinueOnError)
	flags.SetOutput(errs)
	flags.StringVar(&c.stateDir, "state-dir", "", "`directory` of the keystore")
	flags.StringVar(&c.config, "config", "", "configuration `file` of the daemon")
	flags.StringVar(&c.params.Enclave, "enclave", "", "what guards the keystore: auto, or a `spec` such as tpm:/dev/tpmrm0, pkcs11:MODULE?token=LABEL, keyfile:PATH, keyring:file or recovery")
	flags.StringVar(&c.pinFile, "pin-file", "", "`file` with the PIN of the device, - for the standard input")
	flags.StringVar(&c.recoveryOut, "recovery-out", "", "new `file` for the recovery key")
	flags.BoolVar(&c.params.NoRecovery, "no-recovery", false, "make no recovery key")
	flags.Func("escrow-to", "age `recipient` that every backup is also encrypted to; may be repeated", func(r string) error {
		c.params.EscrowTo = append(c.params.EscrowTo, r)
		return nil
	})
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return 0
		}
		return 2
	}
	if flags.NArg() > 0 {
		fmt.Fprintf(errs, "kmsd init: unexpected argument %q\n", flags.Arg(0))
		return 2
	}
	if c.params.NoRecovery && c.recoveryOut != "" {
		fmt.Fprintln(errs, "kmsd init: --recovery-out and --no-recovery exclude each other")
		return 2
	}
	if err := c.run(context.Background()); err != nil {
		fmt.Fprintln(errs, "kmsd init:", err)
		if hint := hintOf(err); hint != "" {
			fmt.Fprintln(errs, "hint:", hint)
		}
		return 1
	}
	return 0
}

// hintOf returns what an error says about its remedy.
func hintOf(err error) string {
	var h hinted
	if errors.As(err, &h) {
		return h.hint
	}
	var r *engine.Remedied
	if errors.As(err, &r) {
		return r.Remedy
	}
	var e *enclave.Error
	if errors.As(err, &e) {
		return e.Remedy
	}
	return ""
}

// initCommand is one run of kmsd init.
type initCommand struct {
	in, out, errs *os.File
	stateDir      string
	config        string // file
	pinFile       string
	recoveryOut   string
	params        initParams
}

// run does it all. Nothing before the last step stands in the way of another run: what the devices hold for slots that never came to
// be is forgotten, or lies about unused if not even that was possible.
func (c *initCommand) run(ctx context.Context) error {
	terminal := term.IsTerminal(int(c.in.Fd())) && term.IsTerminal(int(c.out.Fd()))
	if !terminal && !c.params.NoRecovery && c.recoveryOut == "" {
		return hinted{errors.New("there is no terminal to show the recovery key on"),
			"give --recovery-out FILE, or --no-recovery to do without a recovery key"}
	}
	conf, err := configFrom(c.config, c.stateDir, "/") // there are no sockets here, so the runtime directory does not matter
	if err != nil {
		return err
	}
	c.stateDir = conf.StateDir
	pin, err := c.openPIN() // as who was called: the file need not be for the service user
	if err != nil {
		return err
	}
	defer pin.Close()
	if err := becomeOwner(c.stateDir); err != nil {
		return err
	}
	// The spawner comes before any secret, and after we have become who the keystore is for.
	helpers, err := openHelpers(conf)
	if err != nil {
		return err
	}
	defer helpers.Close()
	if err := c.checkFree(); err != nil {
		return err
	}
	if c.params.PIN, err = readPIN(pin); err != nil {
		return err
	}
	defer func() { clear(c.params.PIN) }()
	made, err := makeStateDir(c.stateDir)
	if err != nil {
		return err
	}
	done := false
	defer func() {
		if made && !done {
			os.Remove(c.stateDir) // only if it is empty
		}
	}()
	arena, err := secmem.NewArena(arenaSize)
	if err != nil {
		return err
	}
	defer arena.Close()
	log := slog.New(slog.NewTextHandler(c.errs, nil))
	keeper := newSlotKeeper(conf, helpers.keyringState, arena, helpers, log)
	defer keeper.Close()

	if terminal && c.params.Enclave == "" {
		if c.params.Enclave, err = c.ask(ctx, keeper); err != nil {
			return err
		}
	}
	limited, cancel := context.WithTimeout(ctx, initTimeout)
	enrolled, err := keeper.prepare(limited, c.params)
	cancel()
	if err != nil {
		return err
	}
	defer enrolled.close()
	store, err := c.finish(ctx, terminal, enrolled, keystore.Config{
		Dir: c.stateDir, Arena: arena, Log: log, CheckCommand: []string{"/proc/self/exe", "check-store"},
	})
	if err != nil {
		enrolled.abort(ctx)
		return err
	}
	done = true
	if err := beginAudit(c.stateDir, store, log); err != nil {
		enrolled.warnings = append(enrolled.warnings, fmt.Sprintf("the audit log is begun at the first unlocking only: %v", err))
	}
	c.report(conf.Mode, store, enrolled.warnings)
	return store.Close()
}

// finish puts the recovery key where it belongs and then makes the keystore.
//
// Invariant: a keystore with a recovery slot only comes to be after its recovery key is safe on disk or was seen by somebody.
func (c *initCommand) finish(ctx context.Context, terminal bool, enrolled *enrolment, config keystore.Config) (*keystore.Store, error) {
	if len(enrolled.recovery) > 0 {
		if c.recoveryOut == "" {
			if err := c.show(enrolled.recovery[0]); err != nil {
				return nil, err
			}
		} else {
			// From here on an interrupt would leave a recovery key without a keystore.
			signal.Ignore(syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
			if err := writeSecretFile(c.recoveryOut, append(enrolled.recovery[0], '\n')); err != nil {
				if errors.Is(err, fs.ErrExist) {
					err = hinted{err, "choose another file; a key that is already there is never overwritten"}
				}
				return nil, fmt.Errorf("write the recovery key: %w", err)
			}
		}
		clear(enrolled.recovery[0])
	}
	ctx, cancel := context.WithTimeout(ctx, initTimeout)
	defer cancel()
	store, err := enrolled.create(ctx, config)
	if err != nil && c.recoveryOut != "" {
		os.Remove(c.recoveryOut)
	}
	return store, err
}

// checkFree refuses what would fail at the end before anybody writes down a key for nothing.
func (c *initCommand) checkFree() error {
	if exists, err := keystore.Exists(c.stateDir); err != nil {
		return err
	} else if exists {
		return hinted{fmt.Errorf("%w in %s", keystore.ErrStoreExists, c.stateDir), "use it as it is, or name another --state-dir"}
	}
	if err := foreignAudit(c.stateDir); err != nil {
		return hinted{err, "move " + filepath.Join(c.stateDir, auditDir) + " away, and keep it: it can be read wherever its keystore can be opened"}
	}
	if c.recoveryOut == "" {
		return nil
	}
	abs, err := filepath.Abs(c.recoveryOut)
	if err != nil {
		return err
	}
	c.recoveryOut = abs
	if _, err := os.Lstat(abs); err == nil {
		return hinted{fmt.Errorf("%s: %w", abs, fs.ErrExist), "choose another file; a key that is already there is never overwritten"}
	}
	if err := unix.Access(filepath.Dir(abs), unix.W_OK|unix.X_OK); err != nil {
		return hinted{fmt.Errorf("%s: %w", filepath.Dir(abs), err), fmt.Sprintf("choose a directory that uid %d may write to", os.Geteuid())}
	}
	if inside(abs, c.stateDir) {
		fmt.Fprintln(c.errs, "warning: a recovery key beside its keystore protects nothing; move it away")
	}
	return nil
}

// auditDir is the directory of the audit log in the state directory.
const auditDir = "audit"

// beginAudit gives the audit log the key of the keystore, which is open, so that what is refused before the first unlocking can be recorded.
func beginAudit(stateDir string, s *keystore.Store, log *slog.Logger) error {
	a, err := audit.Open(audit.Config{Dir: filepath.Join(stateDir, auditDir), Log: log})
	if err != nil {
		return err
	}
	e := engine.New(engine.Config{Store: s, Audit: a, Log: log})
	return errors.Join(e.Unlocked(), a.Close())
}

// foreignAudit refuses to make a keystore beside the audit log of another one: it could not be used, since only the keystore
// that a log was begun with can go on with it.
func foreignAudit(stateDir string) error {
	known, err := audit.HasAuditor(filepath.Join(stateDir, auditDir))
	if err == nil && known {
		err = fmt.Errorf("%w: %s is the log of a keystore that is no longer here", audit.ErrKey, auditDir)
	}
	return err
}

// inside reports whether path is in the tree of dir.
func inside(path, dir string) bool {
	rel, err := filepath.Rel(dir, path)
	return err == nil && rel != ".." && !strings.HasPrefix(rel, "../")
}

// openPIN opens the PIN file; an empty one where there is none.
func (c *initCommand) openPIN() (*os.File, error) {
	switch c.pinFile {
	case "":
		return os.Open(os.DevNull)
	case "-":
		fd, err := syscall.Dup(int(c.in.Fd()))
		if err != nil {
			return nil, err
		}
		syscall.CloseOnExec(fd)
		return os.NewFile(uintptr(fd), c.in.Name()), nil
	}
	return os.Open(c.pinFile)
}

// readPIN reads the PIN, without its last line end.
func readPIN(file io.Reader) ([]byte, error) {
	pin := make([]byte, maxPIN+1)
	n, err := io.ReadFull(file, pin)
	if err == nil {
		clear(pin)
		return nil, fmt.Errorf("a PIN has at most %d bytes", maxPIN)
	}
	if !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		clear(pin)
		return nil, err
	}
	for n > 0 && (pin[n-1] == '\n' || pin[n-1] == '\r') {
		n--
	}
	return pin[:n], nil
}

// ask lets a person choose the enclave.
func (c *initCommand) ask(ctx context.Context, keeper *slotKeeper) (string, error) {
	choices := keeper.look(ctx)
	fmt.Fprintf(c.out, "kmsd will make a keystore in %s.\n\nWhat shall guard it? Found here, best first:\n\n", c.stateDir)
	best := 0
	for i, choice := range choices {
		fmt.Fprintf(c.out, "  %d  %-22s %s\n", i+1, choice.Spec, choice.Level)
		switch {
		case choice.Health.State != enclave.Ready:
			fmt.Fprintf(c.out, "     %-22s not usable now (%s): %s\n", "", choice.Health.State, choice.Health.Detail)
		case best == 0:
			best = i + 1
		}
		if choice.Spec == keyring.SecretServiceKind {
			fmt.Fprintf(c.out, "     %-22s kmsd then opens while you are logged in and your keyring is unlocked\n", "")
		}
		if choice.Spec == recovery.Kind {
			fmt.Fprintf(c.out, "     %-22s every start of kmsd then waits for the recovery key\n", "")
		}
	}
	fmt.Fprintln(c.out, "\nAlso, by their names: pkcs11:MODULE?token=LABEL (an HSM or a smart card), keyfile:PATH (a medium that you can take away).")
	for range 3 {
		fmt.Fprintf(c.out, "\nChoice [%d]: ", best)
		answer, err := c.line()
		if err != nil {
			return "", err
		}
		if answer == "" {
			answer = strconv.Itoa(best)
		}
		for i, choice := range choices {
			if answer == strconv.Itoa(i+1) || answer == choice.Spec {
				return choice.Spec, nil
			}
		}
		s, err := parseSpec(answer)
		if err == nil && s.kind == pkcs11.Kind && len(c.params.PIN) == 0 {
			fmt.Fprint(c.out, "PIN of the token: ")
			if c.params.PIN, err = term.ReadPassword(int(c.in.Fd())); err != nil {
				return "", err
			}
			fmt.Fprintln(c.out)
		}
		if err == nil {
			return answer, nil
		}
		if strings.Contains(answer, ":") {
			fmt.Fprintf(c.out, "%v.\n", err)
		}
		fmt.Fprintf(c.out, "Please answer with a number from 1 to %d.\n", len(choices))
	}
	return "", errors.New("no choice was made")
}

// show puts the recovery key on the terminal, once, and waits until somebody has written it down.
func (c *initCommand) show(key []byte) error {
	fmt.Fprint(c.out, "\nThis is the recovery key. It opens the keystore when this machine cannot, and it opens a stolen copy too.\n"+
		"Write it down now and keep it somewhere else; it is not shown again.\n\n    ")
	c.out.Write(key)
	fmt.Fprint(c.out, "\n\nPress Enter when you have it on paper: ")
	_, err := c.line()
	return err
}

// line reads one line from the terminal. End of input is an error: nobody is there to agree.
func (c *initCommand) line() (string, error) {
	var text []byte
	var b [1]byte
	for len(text) < 256 {
		n, err := c.in.Read(b[:])
		if n == 1 && b[0] == '\n' {
			return strings.TrimSpace(string(text)), nil
		}
		if n == 1 {
			text = append(text, b[0])
		}
		if err != nil {
			return "", fmt.Errorf("nobody answers: %w", err)
		}
	}
	return "", errors.New("the line is too long")
}

// report says what there is now.
func (c *initCommand) report(mode string, s *keystore.Store, warnings []string) {
	fmt.Fprintf(c.errs, "made keystore %x in %s\n", s.Info().StoreID, c.stateDir)
	for _, slot := range s.Slots() {
		fmt.Fprintf(c.errs, "  slot %d  %-22s %s\n", slot.ID, slot.Kind, slot.Level)
	}
	if c.recoveryOut != "" {
		fmt.Fprintf(c.errs, "the recovery key is in %s: print it, keep it elsewhere, remove the file\n", c.recoveryOut)
	}
	for _, w := range warnings {
		fmt.Fprintln(c.errs, "warning:", w)
	}
	if pin, err := pinOf(s); err == nil && mode == modeSystem {
		fmt.Fprintf(c.errs, "so that no other keystore is ever opened in its place, put this into the configuration:\n\n    store_id = %q\n\n", pin)
	}
	if c.params.NoRecovery {
		fmt.Fprintln(c.errs, "there is no recovery key: what this machine loses is lost (kmsctl slot add recovery makes one)")
	}
}

// becomeOwner makes a process of root that of the owner of the state directory, so that nothing in it ever belongs to root unless the
// directory does. A directory that is yet to be made must be in one of root's.
func becomeOwner(dir string) error {
	if os.Geteuid() != 0 {
		return nil
	}
	info, err := os.Lstat(dir)
	if errors.Is(err, fs.ErrNotExist) {
		parent, err := nearest(dir)
		if err != nil {
			return err
		}
		if uid := owner(parent); uid != 0 {
			return hinted{fmt.Errorf("%s is to be made by root in a directory of uid %d", dir, uid),
				"make the directory first, owned by the user kmsd runs as, or run kmsd init as that user"}
		}
		return nil
	}
	if err != nil {
		return err
	}
	uid := owner(info)
	if uid == 0 {
		return nil
	}
	gid := int(info.Sys().(*syscall.Stat_t).Gid)
	groups := []int{gid}
	if u, err := user.LookupId(strconv.Itoa(uid)); err == nil {
		if gid, err = strconv.Atoi(u.Gid); err != nil {
			return err
		}
		groups = []int{gid}
		if more, err := u.GroupIds(); err == nil { // devices are opened by group
			groups = groups[:0]
			for _, g := range more {
				if n, err := strconv.Atoi(g); err == nil {
					groups = append(groups, n)
				}
			}
		}
	}
	for _, step := range []func() error{
		func() error { return syscall.Setgroups(groups) },
		func() error { return syscall.Setgid(gid) },
		func() error { return syscall.Setuid(uid) },
	} {
		if err := step(); err != nil {
			return hinted{fmt.Errorf("become uid %d, who owns %s: %w", uid, dir, err), "run kmsd init as that user"}
		}
	}
	return harden() // a change of user may make a process dumpable again
}

// nearest returns the closest directory above path that there is.
func nearest(path string) (fs.FileInfo, error) {
	for {
		path = filepath.Dir(path)
		info, err := os.Stat(path)
		if !errors.Is(err, fs.ErrNotExist) || path == "/" {
			return info, err
		}
	}
}

func owner(info fs.FileInfo) int { return int(info.Sys().(*syscall.Stat_t).Uid) }

// makeStateDir makes the directory, and reports whether it had to. One that is there, ours and empty is closed to others; any other that
// is open to others is refused, since it is not known what has happened in it.
func makeStateDir(dir string) (made bool, err error) {
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return false, err
	}
	err = os.Mkdir(dir, 0o700)
	if !errors.Is(err, fs.ErrExist) {
		return err == nil, err
	}
	info, err := os.Lstat(dir)
	if err != nil {
		return false, err
	}
	switch {
	case !info.IsDir():
		return false, fmt.Errorf("%s is not a directory", dir)
	case owner(info) != os.Geteuid():
		return false, hinted{fmt.Errorf("%s belongs to uid %d", dir, owner(info)), "run kmsd init as that user"}
	case info.Mode().Perm()&0o077 == 0:
		return false, nil
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
		return false, hinted{errors.Join(fmt.Errorf("%s is open to others (mode %04o) and not empty", dir, info.Mode().Perm()), err), "look at what is in it, then: chmod 700 " + dir}
	}
	return false, os.Chmod(dir, 0o700)
}

// writeSecretFile writes a new file for us alone, durably, and wipes data.
func writeSecretFile(path string, data []byte) error {
	defer clear(data)
	if err := durable.Write(path, data); err != nil {
		return err
	}
	err := durable.Sync(filepath.Dir(path))
	if err != nil {
		os.Remove(path)
	}
	return err
}
