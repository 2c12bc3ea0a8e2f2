package main

import (
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/kmsd-project/kmsd/client/packet"
)

func newPIN(a *app) *cobra.Command {
	c := &cobra.Command{Use: "pin", Short: "Encrypt and decrypt data with a PIN"}
	c.AddCommand(newPINEncrypt(a), newPINDecrypt(a))
	return c
}

// maxPINData is the longest plaintext in bytes.
const maxPINData = 64 << 20

// maxPINSealed is the longest ciphertext in bytes.
const maxPINSealed = maxPINData + 1024

// pinFlags are common to both ways.
type pinFlags struct {
	pin        secretFlags
	iterations int
	in         string
	out        outFlags
	raw        rawFlags
}

func (f *pinFlags) register(c *cobra.Command, what string) {
	f.pin.register(c, "pin", "the PIN")
	c.Flags().IntVar(&f.iterations, "iterations", packet.PINIterations, "iterations of PBKDF2; not part of the data, both sides have to know it")
	f.raw.register(c, what)
	inFlag(c, &f.in, "the data")
	f.out.register(c)
}

// check refuses a number of iterations before the PIN is asked for.
func (f *pinFlags) check() error {
	if f.iterations < 1 || f.iterations > packet.MaxPINIterations {
		return usagef("--iterations is 1 to %d, not %d", packet.MaxPINIterations, f.iterations)
	}
	return nil
}

func newPINEncrypt(a *app) *cobra.Command {
	var f pinFlags
	c := &cobra.Command{
		Use:   "encrypt [--pin-file F | --pin-fd N] --in F --out F",
		Short: "Encrypt data with a PIN",
		Long: `Encrypt data with a PIN, as MOSIP's encryptWithPin does, without the daemon: AES-256-GCM under a key made of the PIN by PBKDF2. What is
written is base64url. The PIN is asked for on the terminal, or comes from a file or a descriptor, never from the command line. A PIN
that can be guessed is no protection of data that somebody has.`,
		Example: "  kmsctl pin encrypt --pin-file pin --in data --out data.pin",
		Args:    exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			if err := f.check(); err != nil {
				return err
			}
			data, err := a.readFile(f.in, maxPINData)
			if err != nil {
				return err
			}
			defer clear(data)
			pin, err := f.pin.read(a, "PIN")
			if err != nil {
				return err
			}
			defer clear(pin)
			sealed, err := packet.EncryptWithPIN(pin, data, f.iterations)
			if err != nil {
				return err
			}
			out, err := a.createReported(f.out, "data", nil, f.raw.raw, modePublic)
			if err != nil {
				return err
			}
			defer out.abort()
			w := f.raw.writer(out)
			if _, err := w.Write(sealed); err != nil {
				return err
			}
			if err := w.Close(); err != nil {
				return err
			}
			return out.commit()
		},
	}
	f.register(c, "write the result")
	return c
}

func newPINDecrypt(a *app) *cobra.Command {
	var f pinFlags
	c := &cobra.Command{
		Use:     "decrypt [--pin-file F | --pin-fd N] --in F --out F",
		Short:   "Decrypt data with a PIN",
		Long:    "Decrypt what \"kmsctl pin encrypt\" or MOSIP's encryptWithPin made, without the daemon.",
		Example: "  kmsctl pin decrypt --pin-file pin --in data.pin --out data",
		Args:    exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			if err := f.check(); err != nil {
				return err
			}
			r, _, err := a.open(f.in)
			if err != nil {
				return err
			}
			defer r.Close()
			sealed, err := io.ReadAll(io.LimitReader(f.raw.reader(r), maxPINSealed+1))
			if err != nil {
				return base64Error(err)
			}
			if len(sealed) > maxPINSealed {
				return fmt.Errorf("%s is larger than %s", f.in, size(maxPINSealed))
			}
			pin, err := f.pin.read(a, "PIN")
			if err != nil {
				return err
			}
			defer clear(pin)
			data, err := packet.DecryptWithPIN(pin, sealed, f.iterations)
			switch {
			case errors.Is(err, packet.ErrDecryption):
				return withHint(err, "wrong PIN, wrong --iterations, or the data were changed")
			case err != nil:
				return err
			}
			defer clear(data)
			return a.writeResult(f.out, "data", nil, data, true, modeSecret)
		},
	}
	f.register(c, "read the data")
	return c
}
