package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/term"
)

// maxSecret is the longest PIN, passphrase or recovery key in bytes.
const maxSecret = 4096

// secretFlags say where a secret comes from: a descriptor, a file or, without either, the terminal. There is no flag for
// the secret itself, because arguments can be read by every process of the machine.
type secretFlags struct {
	name string
	fd   int
	file string
}

func (s *secretFlags) register(c *cobra.Command, name, what string) {
	s.name = name
	c.Flags().IntVar(&s.fd, name+"-fd", -1, "read "+what+" from this file descriptor")
	c.Flags().StringVar(&s.file, name+"-file", "", "read "+what+` from this file, "-" is standard input`)
	c.MarkFlagsMutuallyExclusive(name+"-fd", name+"-file")
}

func (s *secretFlags) given() bool { return s.fd >= 0 || s.file != "" }

// read returns the secret. One line end after it is not part of it.
func (s *secretFlags) read(a *app, prompt string) ([]byte, error) {
	var secret []byte
	var err error
	switch {
	case s.fd >= 0:
		f := os.NewFile(uintptr(s.fd), fmt.Sprintf("descriptor %d", s.fd))
		if f == nil {
			return nil, usagef("--%s-fd: not a descriptor", s.name)
		}
		defer f.Close()
		secret, err = readSecret(f, f.Name())
	case s.file != "":
		r, _, openErr := a.open(s.file)
		if openErr != nil {
			return nil, openErr
		}
		defer r.Close()
		secret, err = readSecret(r, s.file)
	default:
		secret, err = askSecret(prompt)
		if errors.Is(err, errNoTerminal) {
			return nil, withHint(err, "give it with --%[1]s-file F, or --%[1]s-fd 3 3<F", s.name)
		}
	}
	if err != nil {
		return nil, err
	}
	if len(secret) == 0 {
		return nil, errors.New("the secret is empty")
	}
	return secret, nil
}

func readSecret(r io.Reader, name string) ([]byte, error) {
	secret, err := io.ReadAll(io.LimitReader(r, maxSecret+1))
	if err != nil {
		return nil, fmt.Errorf("read secret: %w", err)
	}
	if len(secret) > maxSecret {
		return nil, fmt.Errorf("%s: a secret is at most %d bytes", name, maxSecret)
	}
	return bytes.TrimSuffix(bytes.TrimSuffix(secret, []byte("\n")), []byte("\r")), nil
}

var errNoTerminal = errors.New("a secret is needed and there is no terminal to ask on")

// askSecret asks on the controlling terminal, so that standard input stays free for data.
func askSecret(prompt string) ([]byte, error) {
	tty, err := os.OpenFile("/dev/tty", os.O_RDWR, 0)
	if err != nil {
		return nil, errNoTerminal
	}
	defer tty.Close()
	fmt.Fprintf(tty, "%s: ", prompt)
	secret, err := term.ReadPassword(int(tty.Fd()))
	fmt.Fprintln(tty)
	return secret, err
}

// confirmFlags guard a destructive command.
type confirmFlags struct{ yes bool }

func (f *confirmFlags) register(c *cobra.Command) {
	c.Flags().BoolVar(&f.yes, "yes", false, "do not ask")
}

// confirm lets a destructive act pass with --yes or when name is typed on the terminal.
func (f *confirmFlags) confirm(what, name string) error {
	if f.yes {
		return nil
	}
	tty, err := os.OpenFile("/dev/tty", os.O_RDWR, 0)
	if err != nil {
		return withHint(usagef("%s There is no terminal to ask on", what), "add --yes")
	}
	defer tty.Close()
	fmt.Fprintf(tty, "%s\nType %s to go on: ", what, name)
	answer, err := readLine(tty)
	if err != nil {
		return err
	}
	if answer != name {
		return errors.New("not confirmed, nothing was changed")
	}
	return nil
}

// readLine reads one line of at most 1,000 bytes, byte by byte so that nothing after it is swallowed.
func readLine(r io.Reader) (string, error) {
	var line strings.Builder
	var b [1]byte
	for line.Len() < 1000 {
		if _, err := io.ReadFull(r, b[:]); err != nil {
			return "", err
		}
		if b[0] == '\n' {
			break
		}
		line.WriteByte(b[0])
	}
	return strings.TrimSpace(line.String()), nil
}
