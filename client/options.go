package client

import (
	"os"
	"path/filepath"
	"time"
)

// Names of the sockets in their directory.
const (
	applicationSocket = "kmsd.sock"
	adminSocket       = "admin.sock"
	systemDirectory   = "/run/kmsd"
)

// Defaults of the options.
const (
	DefaultTimeout   = 60 * time.Second
	DefaultReconnect = 5 * time.Second
)

// Option changes what [Dial] does.
type Option func(*options)

type options struct {
	socket    string
	admin     bool
	name      string
	timeout   time.Duration
	reconnect time.Duration
}

// WithSocket names the socket, or the directory of the sockets. Without it the environment variable KMSD_SOCKET does,
// and without that the sockets are looked for in $XDG_RUNTIME_DIR/kmsd, then in $XDG_STATE_HOME/kmsd/run (where a daemon
// without a runtime directory has them; by default ~/.local/state/kmsd/run), then in /run/kmsd.
func WithSocket(path string) Option { return func(o *options) { o.socket = path } }

// WithAdmin takes the admin socket where the path is a directory or the default.
func WithAdmin() Option { return func(o *options) { o.admin = true } }

// WithClientName sets the name and version of the program, for the audit of the daemon.
func WithClientName(name string) Option { return func(o *options) { o.name = name } }

// WithTimeout bounds every call whose context has no deadline; the methods of crypto.Signer and crypto.Decrypter have
// no context at all. The default is [DefaultTimeout].
func WithTimeout(d time.Duration) Option { return func(o *options) { o.timeout = d } }

// WithReconnect sets for how long a call tries to reach a daemon that went away, such as one that is restarted. Zero
// means one attempt. The default is [DefaultReconnect]. Dial itself makes one attempt.
func WithReconnect(d time.Duration) Option { return func(o *options) { o.reconnect = d } }

// MaxSocketPath is the length in bytes of the path of a Unix socket (unix(7): sun_path, less the byte that ends it).
const MaxSocketPath = 107

// SocketPath returns the path that [Dial] would take with these options.
func SocketPath(opts ...Option) string { return newOptions(opts).path() }

func newOptions(opts []Option) *options {
	o := &options{name: filepath.Base(os.Args[0]), timeout: DefaultTimeout, reconnect: DefaultReconnect}
	for _, option := range opts {
		option(o)
	}
	if o.timeout <= 0 {
		o.timeout = DefaultTimeout
	}
	return o
}

func (o *options) path() string {
	name := applicationSocket
	if o.admin {
		name = adminSocket
	}
	path := o.socket
	if path == "" {
		path = os.Getenv("KMSD_SOCKET")
	}
	if path != "" {
		if info, err := os.Stat(path); err == nil && info.IsDir() {
			return filepath.Join(path, name)
		}
		return path
	}
	for _, dir := range userDirectories() {
		own := filepath.Join(dir, name)
		if _, err := os.Stat(own); err == nil {
			return own
		}
	}
	return filepath.Join(systemDirectory, name)
}

// userDirectories lists where the user's own daemon may have its sockets.
func userDirectories() []string {
	var dirs []string
	if runtime := os.Getenv("XDG_RUNTIME_DIR"); runtime != "" {
		dirs = append(dirs, filepath.Join(runtime, "kmsd"))
	}
	state := os.Getenv("XDG_STATE_HOME")
	if home := os.Getenv("HOME"); state == "" && home != "" {
		state = filepath.Join(home, ".local", "state")
	}
	if state != "" {
		dirs = append(dirs, filepath.Join(state, "kmsd", "run"))
	}
	return dirs
}
