// Command kmsctl is the administrator's tool of kmsd.
//
// Rules of its user interface: data goes to standard output, talk goes to standard error; every failure is one line with
// the cause and, where something can be done about it, one "hint:" line with the next command to type. Secrets are read
// from descriptors, files or the terminal, never from arguments or the environment. A file is written in full and
// checked before it gets its name, and an existing file is replaced only with --force.
//
// Exit codes: 0 success, 1 refused or failed, 2 wrong usage, 3 the daemon cannot be reached, 4 the keystore is locked.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

// version is set at link time.
var version = "devel"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(newApp(os.Stdin, os.Stdout, os.Stderr).run(ctx, os.Args[1:]))
}
