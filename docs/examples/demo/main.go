// Command demo shows kmsd at its main job: a registration packet is signed, encrypted and decrypted through a private
// daemon that lives in a temporary directory and is gone afterwards. "make demo" runs it.
//
// Everything goes through the real binaries kmsd and kmsctl, as an administrator would type it; only the packet itself is
// made here. Its plaintext passes through pipes and is never written.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
)

func main() {
	bin := flag.String("bin", "bin", "directory with kmsd, kmsctl and kmsd-keyring")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, *bin)
	interrupted := ctx.Err() != nil
	stop()
	switch {
	case err == nil:
	case interrupted:
		fmt.Fprintln(os.Stderr, "\ninterrupted; everything was removed")
		os.Exit(130)
	default:
		fmt.Fprintf(os.Stderr, "\nthe demo failed: %v\n", err)
		os.Exit(1)
	}
}

// The names of the demo. None of them may be found in the files of kmsd.
const (
	root    = "ROOT"
	module  = "REGISTRATION"
	base    = "REGISTRATION/10001_110011"
	machine = "REGISTRATION/machine-110011"
)

func run(ctx context.Context, bin string) (err error) {
	bin, err = filepath.Abs(bin)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "kmsd-demo-")
	if err != nil {
		return err
	}
	d := &demo{bin: bin, dir: dir}
	defer func() {
		d.stop()
		err = errors.Join(err, os.RemoveAll(dir))
	}()

	fmt.Println("kmsd demo: one registration packet, from capture to the server")

	if err := d.step("A private daemon is set up and started", func() error {
		if err := d.init(ctx); err != nil {
			return err
		}
		return d.start(ctx)
	}); err != nil {
		return err
	}
	d.note("Its keystore is opened by the embedded keyring; a recovery key was written for the day that one is lost.")

	if err := d.step("Three generations of keys and their certificates", func() error { return d.keys(ctx) }); err != nil {
		return err
	}
	d.note("%s signs %s, which signs %s. The private keys were made in kmsd and have never left it.", root, module, base)

	var data []byte
	if err := d.step("A resident is registered: portrait, fingers, irises, documents, data", func() (err error) {
		data, err = makeData()
		return err
	}); err != nil {
		return err
	}
	d.note("%s of images and JSON, in memory only.", megabytes(len(data)))

	var plain []byte
	if err := d.step("The data are signed and the signature is put in", func() error {
		signature, err := d.ctl(ctx, data, "sign", "--key", machine, "--in", "-")
		if err != nil {
			return err
		}
		if err := d.ctlWrite("packet.sig", signature); err != nil {
			return err
		}
		plain, err = makePacket(data, signature)
		return err
	}); err != nil {
		return err
	}
	d.note("kmsctl hashed the data, kmsd signed the digest (RSA-PSS). Who made the packet can be proved later.")

	sealed := d.path("packet.enc")
	if err := d.step("The packet is encrypted, and only then written", func() error {
		_, err := d.ctl(ctx, plain, "packet", "encrypt", "--key", base, "--in", "-", "--out", sealed)
		return err
	}); err != nil {
		return err
	}
	d.note("A fresh AES-256 key, wrapped to the certificate of %s. A stolen disk holds ciphertext.", base)

	if err := d.step("The server decrypts it", func() error {
		opened, err := d.ctl(ctx, nil, "packet", "decrypt", "--key", base, "--in", sealed)
		if err != nil {
			return err
		}
		if !bytes.Equal(opened, plain) {
			return errors.New("the decrypted packet differs from what was encrypted")
		}
		return nil
	}); err != nil {
		return err
	}
	d.note("kmsd unwrapped the packet key. All %d bytes are the ones that went in.", len(plain))

	if err := d.step("The signature is verified", func() error {
		_, err := d.ctl(ctx, data, "verify", "--key", machine, "--in", "-", "--sig", d.path("packet.sig"))
		return err
	}); err != nil {
		return err
	}
	judge, err := d.openssl(ctx, data)
	if err != nil {
		return err
	}
	d.note("%s", judge)

	if err := d.step("A packet with one changed bit is refused", func() error { return d.tamper(ctx, sealed, data) }); err != nil {
		return err
	}
	d.note("No file appeared, and the changed data do not verify either.")

	if err := d.step("The daemon is stopped, started again, and used", func() error {
		if err := d.stop(); err != nil {
			return err
		}
		if err := d.start(ctx); err != nil {
			return err
		}
		_, err := d.ctl(ctx, nil, "packet", "decrypt", "--key", base, "--in", sealed)
		return err
	}); err != nil {
		return err
	}
	d.note("The keys are durable, and the store opens without a person.")

	var files, size int
	if err := d.step("The files of kmsd are searched for every name that was used", func() (err error) {
		files, size, err = d.scan(plain)
		return err
	}); err != nil {
		return err
	}
	d.note("%d files, %d kB: no key name, no certificate subject, no name of the resident. The same search finds them in the open packet.",
		files, size/1000)

	fmt.Printf("\nDone in %.1f s. The directory %s is removed now.\n", d.total.Seconds(), dir)
	return nil
}
