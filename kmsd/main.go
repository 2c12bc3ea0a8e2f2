// Kmsd is an isolated local key daemon: applications use keys over a Unix socket and never see a private one.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"

	"github.com/kmsd-project/kmsd/enclave/helper"
	"github.com/kmsd-project/kmsd/keystore"
)

// version is set by the linker.
var version = "devel"

const usage = `usage:
  kmsd run  [--state-dir D] [--runtime-dir R] [--config F]
  kmsd init [--state-dir D] [--config F] [--enclave auto|keyring:file|...] [--pin-file F]
            [--recovery-out F | --no-recovery] [--escrow-to RECIPIENT]
  kmsd --version
`

func main() { os.Exit(command(os.Args[1:])) }

// command runs one subcommand and returns the exit code: 0 for success, 1 for failure, 2 for wrong usage.
func command(args []string) int {
	if err := harden(); err != nil {
		fmt.Fprintln(os.Stderr, "kmsd: refusing to start:", err)
		return 1
	}
	if len(args) == 0 {
		fmt.Fprint(os.Stderr, usage)
		return 2
	}
	switch name, rest := args[0], args[1:]; name {
	case "run":
		return runMain(rest)
	case "init":
		return initMain(rest)
	case "spawner": // the child that starts helpers
		return helper.RunSpawner()
	case "check-store": // the limited child that looks at a database file first
		if len(rest) != 1 {
			return 2
		}
		return keystore.CheckMain(rest[0])
	case "--version", "version":
		fmt.Println("kmsd", version)
		return 0
	case "--help", "-h", "help":
		fmt.Print(usage)
		return 0
	default:
		fmt.Fprintf(os.Stderr, "kmsd: unknown command %q\n%s", name, usage)
		return 2
	}
}

func runMain(args []string) int {
	flags := flag.NewFlagSet("kmsd run", flag.ContinueOnError)
	stateDir := flags.String("state-dir", "", "`directory` of the keystore and the audit log")
	runtimeDir := flags.String("runtime-dir", "", "`directory` of the sockets")
	file := flags.String("config", "", "configuration `file`")
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return 0
		}
		return 2
	}
	if flags.NArg() > 0 {
		fmt.Fprintf(os.Stderr, "kmsd run: unexpected argument %q\n", flags.Arg(0))
		return 2
	}
	configure := func() (config, error) { return configFrom(*file, *stateDir, *runtimeDir) }
	c, err := configure()
	if err == nil {
		err = run(context.Background(), c, configure, slog.New(slog.NewTextHandler(os.Stderr, nil)))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "kmsd:", err)
		return 1
	}
	return 0
}
