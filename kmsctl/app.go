package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/kmsd-project/kmsd/client"
	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// app is what all commands share: the standard streams, the global flags and the connection, which is made when the
// first operation needs it.
type app struct {
	stdin  io.Reader
	stdout io.Writer
	stderr io.Writer

	socket  string
	json    bool
	timeout time.Duration

	client  *client.Client
	widths  columns // of the table of audit entries
	running bool    // a command has begun, so that a failure is no longer a matter of usage
}

func newApp(stdin io.Reader, stdout, stderr io.Writer) *app {
	return &app{stdin: stdin, stdout: stdout, stderr: stderr}
}

// run executes one command line and returns the exit code.
func (a *app) run(ctx context.Context, args []string) int {
	root := newRoot(a)
	root.SetArgs(args)
	root.SetIn(a.stdin)
	root.SetOut(a.stdout)
	root.SetErr(a.stderr)
	command, err := root.ExecuteContextC(ctx)
	if a.client != nil {
		a.client.Close()
	}
	if err == nil {
		return exitOK
	}
	if !a.running {
		if err = asUsage(err); hintFor(err) == "" {
			err = withHint(err, "%s --help", command.CommandPath())
		}
	}
	var wire *proto.Error
	if errors.As(err, &wire) && wire.Code == proto.CodeInvalid && hintFor(err) == "" {
		err = withHint(err, "%s --help", command.CommandPath())
	}
	a.printError(err)
	return exitCode(err)
}

// Time limits of the connection. An operation such as a new epoch of a large store may take hours, but a daemon that does
// not answer a greeting is not there.
const (
	dialTimeout = 10 * time.Second
	callTimeout = 24 * time.Hour
)

// dial returns the connection to the daemon: on the admin socket where this process may open it, else on the other.
func (a *app) dial(ctx context.Context) (*client.Client, error) {
	if a.client != nil {
		return a.client, nil
	}
	options := []client.Option{client.WithClientName("kmsctl " + version), client.WithTimeout(callTimeout)}
	if a.socket != "" {
		options = append(options, client.WithSocket(a.socket))
	}
	admin := append(options, client.WithAdmin())
	if unix.Access(client.SocketPath(admin...), unix.R_OK|unix.W_OK) == nil {
		options = admin
	}
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	c, err := client.Dial(ctx, options...)
	if path := client.SocketPath(options...); err != nil && len(path) > client.MaxSocketPath {
		return nil, withHint(err, "name it by a shorter path with --socket, relative to the working directory or through a symbolic link")
	}
	if err != nil {
		return nil, err
	}
	a.client = c
	return c, nil
}

// call runs one operation of the daemon.
func (a *app) call(ctx context.Context, op string, params, result proto.Message) error {
	return a.with(ctx, func(ctx context.Context, c *client.Client) error { return c.Call(ctx, op, params, result, nil) })
}

// with runs f, which is one operation in the eyes of people, with the connection and within --timeout.
func (a *app) with(ctx context.Context, f func(ctx context.Context, c *client.Client) error) error {
	c, err := a.dial(ctx)
	if err != nil {
		return err
	}
	if a.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, a.timeout)
		defer cancel()
	}
	err = f(ctx, c)
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("no answer within %v: %w", a.timeout, err)
	}
	return err
}

// key looks a key up.
func (a *app) key(ctx context.Context, ref string) (*client.Key, error) {
	if _, err := keyspec.ParseRef(ref); err != nil {
		return nil, asUsage(err)
	}
	c, err := a.dial(ctx)
	if err != nil {
		return nil, err
	}
	return c.Key(ctx, ref)
}

// terminal returns the file behind a stream when that is a terminal, else nil.
func terminal(stream any) *os.File {
	if f, ok := stream.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		return f
	}
	return nil
}

// opsKey is the annotation that names the operations a command uses. The test of the command tree reads it.
const opsKey = "ops"

// uses annotates cmd with the operations of the daemon that it makes available.
func uses(cmd *cobra.Command, ops ...string) *cobra.Command {
	if cmd.Annotations == nil {
		cmd.Annotations = make(map[string]string)
	}
	for _, op := range ops {
		cmd.Annotations[opsKey] += op + " "
	}
	return cmd
}
