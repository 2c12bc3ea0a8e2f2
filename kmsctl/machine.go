package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/kmsd-project/kmsd/client"
	"github.com/kmsd-project/kmsd/client/packet"
	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

func newMachine(a *app) *cobra.Command {
	c := &cobra.Command{Use: "machine", Short: "Be a registration machine of MOSIP: its identity, signatures and data"}
	c.AddCommand(newMachineAdopt(a), newMachineShow(a), newMachineRelease(a), newMachineSign(a), newMachineVerify(a),
		newMachineEncrypt(a), newMachineDecrypt(a), newMachineDB(a))
	return c
}

// defaultMachine is the name of an identity when none is given.
const defaultMachine = "MACHINE"

func (a *app) machineFlag(c *cobra.Command, name *string) {
	c.Flags().StringVar(name, "name", defaultMachine, "the identity: its keys are NAME/SIGN and NAME/ENCRYPT")
}

func checkMachine(name string) error {
	if _, err := keyspec.ParseName(name + "/ENCRYPT"); err != nil {
		return asUsage(err)
	}
	return nil
}

// machine looks an identity up.
func (a *app) machine(ctx context.Context, name string) (*client.Machine, error) {
	if err := checkMachine(name); err != nil {
		return nil, err
	}
	daemon, err := a.dial(ctx)
	if err != nil {
		return nil, err
	}
	m, err := daemon.Machine(ctx, name)
	if errors.Is(err, client.ErrNotAvailable) {
		return nil, withHint(err, "kmsctl machine adopt --name %s", name)
	}
	return m, err
}

// Names in the directory in which MOSIP's client keeps the keys of a machine without a TPM.
const (
	machineDir    = ".mosipkeys"
	machineSecret = "reg.key" // PKCS#8, DER
	machinePublic = "reg.pub" // SubjectPublicKeyInfo, DER
)

func newMachineAdopt(a *app) *cobra.Command {
	var what client.Adoption
	var dir string
	var remove bool
	c := uses(&cobra.Command{
		Use:   "adopt [--tpm SPEC | --file DIR] [flags]",
		Short: "Take over the identity of this registration machine",
		Long: `Take over the identity of this registration machine, so that its server goes on to know it.

With a TPM, which is the default, that are the two keys which MOSIP's client makes of its templates: the same TPM gives the same keys. kmsd keeps
them in the TPM (two persistent handles from 0x814b4d00), so that they are not made anew at each start; machine release removes them. --tpm says
which TPM, such as tpm:/dev/tpmrm0. Without a TPM this fails: a key in a file is another identity and never taken in its place.

With --file it is the key that MOSIP's client keeps in DIR (` + machineDir + `), in clear. It signs and decrypts; kmsd has two keys of it, each for one
of that. Remove the file afterwards: with --remove-source, once kmsd has signed and decrypted with it.

Adopting the same identity again changes nothing. With --expect-key-index nothing is adopted unless one of the two keys has that index.`,
		Example: "  kmsctl machine adopt --tpm tpm:/dev/tpmrm0\n  kmsctl machine adopt --file /opt/registration/.mosipkeys --remove-source",
		Args:    exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			if err := checkMachine(what.Name); err != nil {
				return err
			}
			if remove && dir == "" {
				return usagef("--remove-source is for --file")
			}
			named := what.Machine != ""
			if !named {
				host, err := os.Hostname()
				if err != nil {
					return err
				}
				what.Machine = strings.ToLower(host)
			}
			daemon, err := a.dial(c.Context())
			if err != nil {
				return err
			}
			var m *client.Machine
			if dir != "" {
				m, err = a.adoptFile(c.Context(), daemon, what, dir, remove)
			} else {
				p := a.waiting("making the machine's keys")
				m, err = daemon.AdoptMachine(c.Context(), what)
				p.end()
			}
			if err != nil {
				return err
			}
			if known := m.Info().Machine; named && known != what.Machine {
				a.say("Adopted before as %s, which is not changed: kmsctl key set %s/ENCRYPT --label machine-name=%s", known, what.Name, what.Machine)
			}
			return a.printMachine(m)
		},
	}, proto.OpMachineAdopt)
	a.machineFlag(c, &what.Name)
	c.Flags().StringVar(&what.TPM, "tpm", "", "the TPM, such as tpm:/dev/tpmrm0 (default: the one of the keystore)")
	c.Flags().StringVar(&dir, "file", "", "directory with reg.key, instead of a TPM")
	c.Flags().StringVar(&what.Machine, "machine-name", "", "name by which the server knows the machine (default: the host's, in lower case)")
	c.Flags().StringVar(&what.KeyIndex, "expect-key-index", "", "adopt nothing but the identity with this key index")
	c.Flags().BoolVar(&remove, "remove-source", false, "overwrite and remove reg.key once kmsd was seen to use it")
	c.MarkFlagsMutuallyExclusive("tpm", "file")
	return c
}

// maxMachineFile bounds the files of a machine's keys in bytes.
const maxMachineFile = 8 << 10

// adoptFile adopts the key in a directory, says what is to become of its file or, when it is to be removed, tries the adopted keys and removes
// it.
func (a *app) adoptFile(ctx context.Context, daemon *client.Client, what client.Adoption, dir string, remove bool) (*client.Machine, error) {
	source, err := openRegular(filepath.Join(dir, machineSecret), remove)
	if err != nil {
		return nil, withHint(err, "--file takes the directory of MOSIP's client, %s", machineDir)
	}
	defer source.Close()
	p := a.waiting("adopting the machine's key")
	m, err := adoptSource(ctx, daemon, what, source)
	p.end()
	if err != nil {
		return nil, err
	}
	path := source.Name()
	if !remove {
		a.say("%s still holds the key in clear. When everything works: shred -u %s, or repeat with --remove-source", path, path)
		return m, nil
	}
	if err := tryMachine(ctx, m); err != nil {
		return nil, fmt.Errorf("%s was not removed: %w", path, err)
	}
	if err := shred(source); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	a.say("%s was overwritten and removed. Copies in backups, snapshots and worn flash cells are not reached by that.", path)
	return m, nil
}

// adoptSource adopts the key in a file. What is beside it must not contradict it.
func adoptSource(ctx context.Context, daemon *client.Client, what client.Adoption, source *os.File) (*client.Machine, error) {
	der, err := readSmall(source)
	if err != nil {
		return nil, err
	}
	defer clear(der)
	parsed, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", machineSecret, errMaterial) // the cause could quote what was read
	}
	private, ok := parsed.(*rsa.PrivateKey)
	if !ok || private.N.BitLen() != 2048 {
		return nil, fmt.Errorf("%s: not an RSA key of 2048 bits", machineSecret)
	}
	spki, err := x509.MarshalPKIXPublicKey(&private.PublicKey)
	if err != nil {
		return nil, err
	}
	if err := checkBeside(filepath.Join(filepath.Dir(source.Name()), machinePublic), spki); err != nil {
		return nil, err
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(private) // Java writes an attribute or two that others do not
	if err != nil {
		return nil, errMaterial
	}
	defer clear(pkcs8)
	return daemon.AdoptMachineKey(ctx, what, pkcs8)
}

// checkBeside refuses a file with another public half. There need not be one.
func checkBeside(path string, spki []byte) error {
	f, err := openRegular(path, false)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	beside, err := readSmall(f)
	if err == nil && !bytes.Equal(beside, spki) {
		err = fmt.Errorf("%s is not the public half of %s: nothing was adopted", machinePublic, machineSecret)
	}
	return err
}

// openRegular opens a file in a directory that may be somebody else's: no link, which would lead elsewhere, and nothing that makes who opens it
// wait.
func openRegular(path string, write bool) (*os.File, error) {
	flags := os.O_RDONLY
	if write {
		flags = os.O_RDWR
	}
	f, err := os.OpenFile(path, flags|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.ELOOP) {
		return nil, fmt.Errorf("%s is a symbolic link", path)
	}
	if err != nil {
		return nil, err
	}
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		f.Close()
		return nil, cmp.Or(err, fmt.Errorf("%s is not a regular file", path))
	}
	return f, nil
}

func readSmall(f *os.File) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(f, maxMachineFile+1))
	if err == nil && len(data) > maxMachineFile {
		err = fmt.Errorf("%s is larger than %s", f.Name(), size(maxMachineFile))
	}
	return data, err
}

// tryMachine has kmsd sign and decrypt, and checks both with the public halves.
func tryMachine(ctx context.Context, m *client.Machine) error {
	sample := make([]byte, 32)
	rand.Read(sample)
	signature, err := m.Sign(ctx, bytes.NewReader(sample))
	if err != nil {
		return err
	}
	if err := m.Verify(bytes.NewReader(sample), signature); err != nil {
		return err
	}
	sealed, err := m.Encrypt(sample)
	if err != nil {
		return err
	}
	got, err := m.Decrypt(ctx, sealed)
	if err == nil && !bytes.Equal(got, sample) {
		err = client.ErrDecryption
	}
	return err
}

// shred overwrites an open file where it is, and removes it. What has its name by then is removed only if it is that file.
func shred(f *os.File) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	noise := make([]byte, info.Size())
	rand.Read(noise)
	if _, err := f.WriteAt(noise, 0); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if now, err := os.Lstat(f.Name()); err != nil || !os.SameFile(info, now) {
		return cmp.Or(err, errors.New("was overwritten, but its name is another file's now"))
	}
	if err := os.Remove(f.Name()); err != nil {
		return err
	}
	return syncDir(filepath.Dir(f.Name()))
}

type machineKeyView struct {
	Key        string `json:"key"`
	Version    uint32 `json:"version"`
	State      string `json:"state"`
	Protection string `json:"protection"`
	Location   string `json:"location,omitempty"`
	Format     string `json:"format"` // of public: tpmt-public or spki
	Public     string `json:"public"` // base64url
	KeyIndex   string `json:"key_index"`
}

type machineView struct {
	Name        string            `json:"name"`
	MachineName string            `json:"machine_name"`
	Adopted     bool              `json:"adopted"` // by this command
	Sign        machineKeyView    `json:"sign"`
	Encrypt     machineKeyView    `json:"encrypt"`
	Onboarding  client.Onboarding `json:"onboarding"`
}

func viewMachineKey(k *proto.MachineKey) machineKeyView {
	format := "spki"
	if k.Protection == string(keyspec.TPM) {
		format = "tpmt-public"
	}
	return machineKeyView{k.Key, k.Version, k.State, k.Protection, k.Location, format, base64.RawURLEncoding.EncodeToString(k.Public), k.KeyIndex}
}

func (a *app) printMachine(m *client.Machine) error {
	info := m.Info()
	v := machineView{info.Name, info.Machine, info.Adopted, viewMachineKey(&info.Sign), viewMachineKey(&info.Encrypt), m.Onboarding()}
	return a.print(v, func(w io.Writer) {
		fields(w, "Identity", v.Name, "Machine", v.MachineName)
		for _, k := range []struct {
			title string
			machineKeyView
		}{{"Signing key", v.Sign}, {"Encryption key", v.Encrypt}} {
			fmt.Fprintln(w)
			where := k.Protection
			if k.Location != "" {
				where += " (" + k.Location + ")"
			}
			fields(w, k.title, fmt.Sprintf("%s@%d", k.Key, k.Version), "State", k.State, "Where", where, "Key index", k.KeyIndex, "Public ("+k.Format+")", k.Public)
		}
		fmt.Fprint(w, "\nTo onboard the machine:\n")
		writeJSON(w, v.Onboarding)
	})
}

func newMachineShow(a *app) *cobra.Command {
	var name string
	c := uses(&cobra.Command{
		Use:   "show",
		Short: "Show the identity of this registration machine",
		Long: `Show the identity of this registration machine: the public parts of its keys as its server has them (TPMT_PUBLIC for keys in a TPM, else
SubjectPublicKeyInfo; base64url), their key indexes, and what a server has to be told of a new machine.`,
		Args: exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			m, err := a.machine(c.Context(), name)
			if err != nil {
				return err
			}
			return a.printMachine(m)
		},
	}, proto.OpMachineShow)
	a.machineFlag(c, &name)
	return c
}

func newMachineRelease(a *app) *cobra.Command {
	var name string
	var f confirmFlags
	c := uses(&cobra.Command{
		Use:   "release",
		Short: "Give the identity of this registration machine up",
		Long: `Give the identity of this registration machine up: both keys are destroyed, and the TPM keeps nothing of them. The TPM makes the same keys again
when the machine is adopted again; a key that came from a file is gone for good, and with it all that only it decrypts.`,
		Args: exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			if err := checkMachine(name); err != nil {
				return err
			}
			if err := f.confirm("The keys of "+name+" will be destroyed.", name); err != nil {
				return err
			}
			if err := a.call(c.Context(), proto.OpMachineRelease, &proto.MachineRef{Name: name}, &proto.Empty{}); err != nil {
				return err
			}
			return a.print(map[string]string{"released": name}, func(w io.Writer) { fmt.Fprintf(w, "%s is released\n", name) })
		},
	}, proto.OpMachineRelease)
	a.machineFlag(c, &name)
	f.register(c)
	return c
}

// encodedFlags are outFlags of a command whose binary result is base64url unless --raw is given.
type encodedFlags struct {
	outFlags
	rawFlags
}

func (f *encodedFlags) register(c *cobra.Command, what string) {
	f.outFlags.register(c)
	f.rawFlags.register(c, what)
}

func (a *app) writeEncoded(f encodedFlags, name string, view map[string]any, result []byte, mode fs.FileMode) error {
	out, err := a.createReported(f.outFlags, name, view, f.raw, mode)
	if err != nil {
		return err
	}
	defer out.abort()
	w := f.writer(out)
	if _, err := w.Write(result); err != nil {
		return err
	}
	if err := w.Close(); err != nil {
		return err
	}
	return out.commit()
}

// readEncoded reads what writeEncoded wrote, at most limit bytes of it.
func (a *app) readEncoded(path string, raw rawFlags, limit int) ([]byte, error) {
	r, _, err := a.open(path)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	data, err := io.ReadAll(io.LimitReader(raw.reader(r), int64(limit)+1))
	if err != nil {
		return nil, base64Error(err)
	}
	if len(data) > limit {
		return nil, fmt.Errorf("%s is larger than %s", path, size(int64(limit)))
	}
	return data, nil
}

func newMachineSign(a *app) *cobra.Command {
	var name, in string
	var out encodedFlags
	c := uses(&cobra.Command{
		Use:   "sign --in F --out F [flags]",
		Short: "Sign data as this registration machine",
		Long:  "Sign data as this registration machine does (csSign): RSASSA-PKCS1-v1_5 with SHA-256, base64url. Data of any size are hashed here.",
		Args:  exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			m, err := a.machine(c.Context(), name)
			if err != nil {
				return err
			}
			r, total, err := a.open(in)
			if err != nil {
				return err
			}
			defer r.Close()
			p := a.progressOf("hashing", total)
			signature, err := m.Sign(c.Context(), p.reader(&contextReader{c.Context(), r}))
			p.end()
			if err != nil {
				return err
			}
			return a.writeEncoded(out, "signature", map[string]any{"key_index": m.Info().Sign.KeyIndex}, signature, modePublic)
		},
	}, proto.OpMachineShow, proto.OpSign)
	a.machineFlag(c, &name)
	inFlag(c, &in, "data")
	out.register(c, "the signature")
	return c
}

// publicFlag registers --public.
func publicFlag(c *cobra.Command, public *string) {
	c.Flags().StringVar(public, "public", "", "public part of another machine (base64url of TPMT_PUBLIC or SubjectPublicKeyInfo), instead of --name; needs no daemon")
	c.MarkFlagsMutuallyExclusive("public", "name")
}

func newMachineVerify(a *app) *cobra.Command {
	var name, public, in, sig string
	var raw rawFlags
	c := uses(&cobra.Command{
		Use:   "verify --in F --sig F [--public F] [flags]",
		Short: "Check a signature of a registration machine",
		Long:  "Check a signature of this registration machine, or of the one whose public part is in a file, as its server does. A wrong signature is exit code 1.",
		Args:  exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			signature, err := a.readEncoded(sig, raw, maxSignature)
			if err != nil {
				return err
			}
			part, err := a.machinePublic(c.Context(), public, name, packet.MachineSigning)
			if err != nil {
				return err
			}
			r, total, err := a.open(in)
			if err != nil {
				return err
			}
			defer r.Close()
			p := a.progressOf("hashing", total)
			err = client.VerifyMachine(part, p.reader(&contextReader{c.Context(), r}), signature)
			p.end()
			if err != nil {
				return err
			}
			return a.print(map[string]any{"valid": true, "key_index": packet.KeyIndex(part)}, func(w io.Writer) { fmt.Fprintln(w, "the signature is right") })
		},
	}, proto.OpMachineShow)
	a.machineFlag(c, &name)
	publicFlag(c, &public)
	inFlag(c, &in, "data")
	c.Flags().StringVar(&sig, "sig", "", "file with the signature, as sign wrote it")
	raw.register(c, "the signature")
	c.MarkFlagRequired("sig")
	return c
}

// machinePublic returns the public part in a file, else that of one of the keys of an identity.
func (a *app) machinePublic(ctx context.Context, file, name string, use packet.MachineUse) ([]byte, error) {
	if file != "" {
		return a.readEncoded(file, rawFlags{}, maxMachineFile)
	}
	m, err := a.machine(ctx, name)
	if err != nil {
		return nil, err
	}
	if use == packet.MachineSigning {
		return m.Info().Sign.Public, nil
	}
	return m.Info().Encrypt.Public, nil
}

func newMachineEncrypt(a *app) *cobra.Command {
	var name, public, in string
	var android, block bool
	var out encodedFlags
	c := uses(&cobra.Command{
		Use:   "encrypt --in F --out F [--public F] [flags]",
		Short: "Encrypt data to a registration machine",
		Long: `Encrypt data to this registration machine, or to the one whose public part is in a file, as its server does. With --block it is one RSA block
of at most 190 bytes, as in db.conf. How it is padded follows from the public part, but for keys of Android, which look like those in files.

The data are at most 64 MiB.`,
		Args: exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			part, err := a.machinePublic(c.Context(), public, name, packet.MachineEncryption)
			if err != nil {
				return err
			}
			key, use, err := client.ParseMachinePublic(part)
			if err != nil {
				return err
			}
			padding := packet.PaddingFile
			switch {
			case use == packet.MachineSigning:
				return withHint(errors.New("this is the public part of a signing key"), "take publicKey of the machine, not signPublicKey")
			case use == packet.MachineEncryption && android:
				return usagef("--android is not for a machine with a TPM")
			case use == packet.MachineEncryption:
				padding = packet.PaddingTPM
			case android:
				padding = packet.PaddingAndroid
			}
			data, err := a.readFile(in, client.MaxMachineData)
			if err != nil {
				return err
			}
			defer clear(data)
			var sealed []byte
			if block {
				sealed, err = packet.EncryptClientBlock(key, padding, data)
			} else {
				sealed, err = client.EncryptForMachine(key, padding, data)
			}
			if err != nil {
				return err
			}
			return a.writeEncoded(out, "ciphertext", map[string]any{"key_index": packet.KeyIndex(part), "padding": string(padding)}, sealed, modePublic)
		},
	}, proto.OpMachineShow)
	a.machineFlag(c, &name)
	publicFlag(c, &public)
	inFlag(c, &in, "data")
	c.Flags().BoolVar(&android, "android", false, "for a client on Android (MGF1 with SHA-1)")
	c.Flags().BoolVar(&block, "block", false, "one RSA block without a data key")
	out.register(c, "the ciphertext")
	return c
}

func newMachineDecrypt(a *app) *cobra.Command {
	var name, in string
	var android, block bool
	var raw rawFlags
	var out outFlags
	c := uses(&cobra.Command{
		Use:   "decrypt --in F --out F [flags]",
		Short: "Decrypt data that were encrypted to this registration machine",
		Long: `Decrypt data that were encrypted to this registration machine (csDecrypt), such as sync data, pre-registrations and receipts: in today's
layout, else in that of MOSIP 1.1.4.4. With --block it is one RSA block, as in db.conf. --android is for a key in a file whose data were made for
a client on Android. The data are at most 64 MiB, and nothing is written before all of them were verified.`,
		Args: exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			m, err := a.machine(c.Context(), name)
			if err != nil {
				return err
			}
			padding := m.Padding()
			if android {
				if padding == packet.PaddingTPM {
					return usagef("--android is not for a machine with a TPM")
				}
				padding = packet.PaddingAndroid
			}
			sealed, err := a.readEncoded(in, raw, client.MaxMachineData+1024)
			if err != nil {
				return err
			}
			p := a.waiting("decrypting")
			var plain []byte
			if block {
				plain, err = m.DecryptBlock(c.Context(), padding, sealed)
			} else {
				plain, err = m.DecryptAs(c.Context(), padding, sealed)
			}
			p.end()
			switch {
			case errors.Is(err, client.ErrDecryption):
				return withHint(err, "another machine's, another kind of client (--android), --block or not, or the data were changed")
			case errors.Is(err, packet.ErrFormat):
				return withHint(err, "--block is for one RSA block, --raw for binary")
			case err != nil:
				return err
			}
			defer clear(plain)
			return a.writeResult(out, "data", nil, plain, true, modeSecret)
		},
	}, proto.OpMachineShow, proto.OpDecrypt)
	a.machineFlag(c, &name)
	inFlag(c, &in, "the ciphertext")
	c.Flags().BoolVar(&android, "android", false, "made for a client on Android (MGF1 with SHA-1)")
	c.Flags().BoolVar(&block, "block", false, "one RSA block without a data key")
	raw.register(c, "the ciphertext")
	out.register(c)
	return c
}
