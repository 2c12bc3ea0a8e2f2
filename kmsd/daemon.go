package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"reflect"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	sd "github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"

	"github.com/kmsd-project/kmsd/enclave/pkcs11"
	"github.com/kmsd-project/kmsd/ipc"
	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/secmem"
	"github.com/kmsd-project/kmsd/kmsd/audit"
	"github.com/kmsd-project/kmsd/kmsd/engine"
)

const (
	arenaSize     = 64 << 10         // bytes; root, epoch, index and namespace keys
	shutdownGrace = 10 * time.Second // for requests under way when the daemon is told to stop
	startTime     = 5 * time.Second  // for devices, before the sockets are opened anyway

	// ballastSize is memory that is never touched and so takes none, but that the collector counts: it lets the heap grow by 8
	// MB, or double if that is more, before it is collected. What lives on it is about 1 MB, so that without a ballast a busy
	// daemon would collect all the time: a third of the cost of a small encryption. A larger GC percentage would do that too, but
	// leave a multiple of what peers make the daemon hold to be collected. Idle memory does not depend on it, because the engine
	// has the heap collected and given back when it falls idle.
	ballastSize = 8 << 20
)

// daemon is everything there is one of.
type daemon struct {
	dispatcher
	config  config
	log     *slog.Logger
	arena   *secmem.Arena
	helpers *helpers
	slots   *slotKeeper
	audit   *audit.Log
	engine  *engine.Engine
	store   atomic.Pointer[keystore.Store]
	ipc     *ipc.Server

	turn       sync.Mutex // held by init, lock and unlock, so that phase and keystore say the same
	healing    healing
	attempts   sync.WaitGroup  // to unlock, that requests have caused
	stopping   context.Context // ends when the daemon is told to stop
	life       context.Context // ends with the last request
	pin        storePin        // the only keystore to be opened
	weaknesses []string        // of this build, for status
}

// run is the daemon from start to stop: spawner -> runtime and state directory -> memory -> audit -> policy -> engine -> keystore
// -> sockets. reread reads the configuration again, for SIGHUP.
func run(ctx context.Context, c config, reread func() (config, error), log *slog.Logger) (err error) {
	d := &daemon{config: c, log: log}
	if d.pin, err = parseStorePin(c.StoreID); err != nil {
		return err
	}
	ballast := make([]byte, ballastSize)
	defer runtime.KeepAlive(ballast)
	hangup := make(chan os.Signal, 1)
	signal.Notify(hangup, syscall.SIGHUP)
	defer signal.Stop(hangup)
	ctx, cancel := signal.NotifyContext(ctx, syscall.SIGTERM, syscall.SIGINT)
	defer cancel()
	d.stopping = ctx
	if err := d.checkUser(); err != nil {
		return err
	}
	if !freedIsOverwritten() {
		d.weaknesses = append(d.weaknesses, "this build does not overwrite freed memory (GODEBUG clobberfree=1); build it with make")
	}
	if !secmem.Enabled() {
		d.weaknesses = append(d.weaknesses, "this build does not erase stacks (GOEXPERIMENT runtimesecret); build it with make")
	}
	for _, w := range d.weaknesses {
		log.Warn(w)
	}

	listeners, err := d.inherit() // before there are children, who would inherit them too
	if err != nil {
		return err
	}
	// The spawner comes first: what it inherits must hold no secret.
	if d.helpers, err = openHelpers(c); err != nil {
		return err
	}
	defer d.helpers.Close()
	if len(listeners) == 0 {
		unlock, err := d.claimRuntimeDir()
		if err != nil {
			return err
		}
		defer unlock()
	}
	release, err := d.claimStateDir()
	if err != nil {
		return err
	}
	defer release()
	if d.arena, err = secmem.NewArena(arenaSize); err != nil {
		return fmt.Errorf("protected memory: %w", err)
	}
	defer d.arena.Close()
	d.slots = newSlotKeeper(c, d.helpers.keyringState, d.arena, d.helpers, log)
	defer d.slots.Close()
	if d.audit, err = audit.Open(audit.Config{Dir: filepath.Join(c.StateDir, auditDir), Log: log}); err != nil {
		return fmt.Errorf("audit log: %w", err)
	}
	defer d.audit.Close()
	snapshot, err := c.loadPolicy()
	if err != nil {
		return err
	}
	d.policy.Store(snapshot)
	renewal, err := c.Renew.renewal()
	if err != nil {
		return err
	}
	d.engine = engine.New(engine.Config{
		Audit: d.audit, Policy: snapshot, Log: log, Devices: d.slots, Renewal: renewal,
		Code:      func(err error) string { return string(wireError(err).Code) },
		CacheIdle: time.Duration(c.Cache.IdleSeconds) * time.Second, CacheKeys: c.Cache.Keys,
	})
	defer d.closeStore()
	defer d.engine.Lock()
	if err := d.openStore(ctx); err != nil {
		return err
	}
	opening := d.openAtStart(ctx)
	defer func() { <-opening }() // which ends with ctx
	defer cancel()
	background, stop := context.WithCancel(context.WithoutCancel(ctx)) // to the end of the last request
	d.life = background
	over := make(chan struct{})
	watched := make(chan struct{})
	go func() { d.engine.Run(background); close(over) }()
	go func() { d.watchMedium(background); close(watched) }()
	defer func() { stop(); <-over; <-watched; d.attempts.Wait() }()

	d.dispatcher.open(operations(), engine.Scrub)
	defer d.dispatcher.close()
	d.server = "kmsd " + version
	d.ipc = &ipc.Server{Handler: d, Log: log, Limits: ipc.Limits{
		MaxConns: c.Limits.Connections, MaxConnsPerUID: c.Limits.ConnectionsPerUID, Idle: c.idle(),
	}}
	if len(listeners) == 0 {
		if listeners, err = d.listen(ctx); err != nil {
			return err
		}
	}
	failed := make(chan error, len(listeners))
	for _, l := range listeners {
		go func() { failed <- d.ipc.Serve(ctx, l) }()
	}

	log.Info("ready", "state", phase(d.phase.Load()).String(), "socket", c.appSocket(), "admin", c.adminSocket())
	fmt.Fprintln(os.Stderr, "ready")
	sd.SdNotify(false, "READY=1\nSTATUS="+phase(d.phase.Load()).String())
	err = d.wait(ctx, failed, hangup, reread)

	sd.SdNotify(false, "STOPPING=1")
	log.Info("stopping")
	grace, expire := context.WithTimeout(context.Background(), shutdownGrace)
	defer expire()
	if e := d.ipc.Shutdown(grace); e != nil {
		log.Warn("requests were cut off", "error", e)
	}
	return err
}

// wait returns when the daemon shall stop. Meanwhile it reloads, and lets systemd know that it lives where that wants to know.
func (d *daemon) wait(ctx context.Context, failed <-chan error, hangup <-chan os.Signal, reread func() (config, error)) error {
	var watchdog <-chan time.Time
	if interval, err := sd.SdWatchdogEnabled(false); err != nil {
		d.log.Warn("systemd is not answered", "error", err)
	} else if interval > 0 {
		ticker := time.NewTicker(interval / 3)
		defer ticker.Stop()
		watchdog = ticker.C
	}
	for {
		select {
		case <-watchdog:
			sd.SdNotify(false, sd.SdNotifyWatchdog)
		case <-ctx.Done():
			return nil
		case err := <-failed:
			return err
		case <-hangup:
			d.reload(reread)
		}
	}
}

// reload takes over the policy of the files as they are now. A file that is in error changes nothing.
func (d *daemon) reload(reread func() (config, error)) {
	var now unix.Timespec
	unix.ClockGettime(unix.CLOCK_MONOTONIC, &now)
	sd.SdNotify(false, fmt.Sprintf("RELOADING=1\nMONOTONIC_USEC=%d", now.Nano()/1000))
	defer sd.SdNotify(false, "READY=1")
	c, err := reread()
	if err != nil {
		d.log.Error("the configuration stays as it was", "error", err)
		return
	}
	snapshot, err := c.loadPolicy()
	if err != nil {
		d.log.Error("the policy stays as it was", "error", err)
		return
	}
	if c.Mode != d.config.Mode || c.StateDir != d.config.StateDir || c.RuntimeDir != d.config.RuntimeDir ||
		c.Sockets != d.config.Sockets || c.Limits != d.config.Limits || c.Cache != d.config.Cache || c.Helpers != d.config.Helpers ||
		c.StoreID != d.config.StoreID || !reflect.DeepEqual(c.Unlock, d.config.Unlock) || !reflect.DeepEqual(c.Devices, d.config.Devices) {
		d.log.Warn("only the policy can be reloaded; other changes take a restart")
	}
	d.policy.Store(snapshot)
	d.engine.SetPolicy(snapshot)
	d.bumpGeneration()
	d.log.Info("reloaded", "policy", snapshot.Epoch())
}

// bumpGeneration lets the counter of the keystore, if it has one, tell copies of before a change of the policy from those after it.
func (d *daemon) bumpGeneration() {
	s := d.store.Load()
	if s == nil || s.Locked() {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), startTime)
	defer cancel()
	if err := s.BumpGeneration(ctx); err != nil {
		d.log.Warn("the counter of the keystore was not advanced", "error", err)
	}
}

// checkUser refuses to isolate nothing: a system daemon has a user of its own.
func (d *daemon) checkUser() error {
	if os.Geteuid() != 0 {
		return nil
	}
	if d.config.Mode == modeSystem {
		return errors.New("system mode does not run as root: give kmsd a user of its own (User=kmsd in its unit)")
	}
	d.log.Warn("kmsd runs as root and is not isolated from other programs of root")
	return nil
}

// storeConfig says where the keystore is.
func (d *daemon) storeConfig() keystore.Config {
	return keystore.Config{
		Dir: d.config.StateDir, Arena: d.arena, Log: d.log,
		CheckCommand: []string{"/proc/self/exe", "check-store"},
	}
}

// openStore opens the keystore if there is one, locked.
func (d *daemon) openStore(ctx context.Context) error {
	exists, err := keystore.Exists(d.config.StateDir)
	if err != nil || !exists {
		return err
	}
	s, err := keystore.Open(ctx, d.storeConfig())
	if err != nil {
		return fmt.Errorf("open the keystore: %w", err)
	}
	if err := d.pin.admits(s); err != nil {
		return errors.Join(err, s.Close())
	}
	d.adopt(s)
	return nil
}

// openAtStart unlocks the keystore if that needs nobody. A device that takes longer than startTime, such as a keyring that asks somebody for
// its password, does not keep the sockets from being opened. The channel is closed when the attempt is over.
func (d *daemon) openAtStart(ctx context.Context) <-chan struct{} {
	over := make(chan struct{})
	if d.store.Load() == nil {
		close(over)
		return over
	}
	go func() {
		defer close(over)
		d.turn.Lock()
		defer d.turn.Unlock()
		if err := d.unlockUnattended(ctx, atStart); err != nil {
			d.log.Warn("the keystore stays locked", "reason", err)
		}
	}()
	select {
	case <-over:
	case <-time.After(startTime):
	}
	return over
}

// adopt takes a keystore that was opened or made, and is locked as far as the daemon is concerned.
func (d *daemon) adopt(s *keystore.Store) {
	d.store.Store(s)
	d.slots.store.Store(s)
	d.engine.SetStore(s)
	d.phase.Store(uint32(phaseLocked))
}

// unlocked makes the daemon ready after the keystore has been unlocked. A keystore that cannot be used is locked again.
func (d *daemon) unlocked() error {
	err := d.pin.admits(d.store.Load())
	if err == nil {
		err = d.engine.Unlocked()
	}
	if err != nil {
		d.lock()
		if errors.Is(err, audit.ErrKey) {
			err = fmt.Errorf("%w: the directory audit beside the keystore is of another one; move it away", err)
		}
		return err
	}
	d.healing.opened()
	d.phase.Store(uint32(phaseReady))
	sd.SdNotify(false, "STATUS="+phaseReady.String())
	return nil
}

// lock locks the keystore and forgets every key.
func (d *daemon) lock() {
	if d.store.Load() == nil {
		return
	}
	d.phase.Store(uint32(phaseLocked))
	d.engine.Lock()
	d.slots.devices.closeKind(pkcs11.Kind) // which logs out
	sd.SdNotify(false, "STATUS="+phaseLocked.String())
}

func (d *daemon) closeStore() {
	if s := d.store.Load(); s != nil {
		if err := s.Close(); err != nil {
			d.log.Error("close the keystore", "error", err)
		}
	}
}

// claimRuntimeDir makes the directory of the sockets and takes the lock in it.
//
// Invariant: who holds the lock is the only kmsd of this directory, so a socket found there is nobody's and may go.
func (d *daemon) claimRuntimeDir() (release func(), err error) {
	dir := d.config.RuntimeDir
	if dir == "" {
		return nil, fmt.Errorf("%w: none of --runtime-dir, XDG_RUNTIME_DIR, XDG_STATE_HOME and HOME is set", errConfig)
	}
	mode := fs.FileMode(0o700)
	if d.config.Mode == modeSystem {
		mode = 0o755 // other users reach the sockets through it
	}
	if err := os.MkdirAll(dir, mode); err != nil {
		return nil, err
	}
	info, err := os.Lstat(dir)
	if err != nil {
		return nil, err
	}
	switch owner := info.Sys().(*syscall.Stat_t).Uid; {
	case !info.IsDir():
		return nil, fmt.Errorf("%s is not a directory", dir)
	case owner != uint32(os.Geteuid()):
		return nil, fmt.Errorf("%s belongs to uid %d", dir, owner)
	case info.Mode().Perm()&0o022 != 0:
		return nil, fmt.Errorf("%s can be written by others (mode %04o)", dir, info.Mode().Perm())
	}
	if err := os.Chmod(dir, mode); err != nil { // the umask may have taken too much
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(dir, "kmsd.lock"), os.O_CREATE|os.O_RDWR|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if err == unix.EWOULDBLOCK {
			return nil, fmt.Errorf("another kmsd runs in %s", dir)
		}
		return nil, err
	}
	return func() { f.Close() }, nil
}

// claimStateDir makes the state directory and takes the lock on it.
//
// Invariant: whoever opens the audit log and the keystore for writing holds this lock, so that nobody repairs what another
// is writing.
func (d *daemon) claimStateDir() (release func(), err error) {
	dir := d.config.StateDir
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(dir, os.O_RDONLY|syscall.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if err == unix.EWOULDBLOCK {
			return nil, fmt.Errorf("%w: another kmsd uses %s", keystore.ErrInUse, dir)
		}
		return nil, err
	}
	return func() { f.Close() }, nil
}

// inherit returns the sockets that systemd passes. They are in a directory of root's, who knows that there is but one of them.
func (d *daemon) inherit() ([]*net.UnixListener, error) {
	passed, err := activation.Listeners()
	if err != nil {
		return nil, err
	}
	var listeners []*net.UnixListener
	for _, l := range passed {
		u, ok := l.(*net.UnixListener)
		if !ok {
			return nil, fmt.Errorf("systemd passes a socket that is not one of ours: %v", l)
		}
		switch name := filepath.Base(u.Addr().String()); name {
		case "kmsd.sock":
		case "admin.sock":
			d.adminAddr = u.Addr().String()
		default:
			return nil, fmt.Errorf("systemd passes a socket %q; ours are kmsd.sock and admin.sock", name)
		}
		u.SetUnlinkOnClose(false)
		listeners = append(listeners, u)
	}
	return listeners, nil
}

// listen makes the sockets.
func (d *daemon) listen(ctx context.Context) ([]*net.UnixListener, error) {
	var listeners []*net.UnixListener
	d.adminAddr = d.config.adminSocket()
	for _, s := range []struct{ path, mode, group string }{
		{d.config.appSocket(), d.config.Sockets.Mode, d.config.Sockets.Group},
		{d.config.adminSocket(), d.config.Sockets.AdminMode, d.config.Sockets.AdminGroup},
	} {
		mode, err := parseMode(s.mode, 0o600)
		if err != nil {
			return nil, err
		}
		gid, err := groupID(s.group)
		if err != nil {
			return nil, err
		}
		if err := removeSocket(s.path); err != nil {
			return nil, err
		}
		l, err := ipc.Listen(ctx, s.path, mode, gid)
		if err != nil {
			return nil, err
		}
		listeners = append(listeners, l)
	}
	return listeners, nil
}

// removeSocket removes what a kmsd that was killed has left. It removes nothing but sockets.
func removeSocket(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("%s is in the way and is not a socket", path)
	}
	return os.Remove(path)
}
