package main

import (
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/kmsd-project/kmsd/client/packet"
)

// Modes of the files kmsctl writes, before the umask.
const (
	modePublic fs.FileMode = 0o644 // signatures, certificates, ciphertexts
	modeSecret fs.FileMode = 0o600 // plaintexts, recovery keys
)

// outFlags are the flags of a command that writes one result.
type outFlags struct {
	path  string
	force bool
}

func (o *outFlags) register(c *cobra.Command) {
	c.Flags().StringVar(&o.path, "out", "-", `file to write, "-" is standard output`)
	c.Flags().BoolVar(&o.force, "force", false, "replace an existing file, or write bytes to a terminal")
}

// output is a file in the making.
//
// Invariant: under its name the file is either absent (or what it was before) or complete. Until commit it has no name
// at all (O_TMPFILE) or, where the file system cannot do that, a temporary one.
type output struct {
	io.Writer
	file  *os.File
	path  string // empty for a stream, which is written directly
	temp  string // name of the temporary file, where it has one
	force bool

	report  *report // with --json
	written int64   // bytes, with --json
}

// report is what --json prints of a result once it is complete: the members of view, with the number of bytes and the path of
// the file, or without a file the result itself under its name.
type report struct {
	w    io.Writer
	name string
	view map[string]any
	text bool          // the result is text, not base64
	held *bytes.Buffer // the result where it has no file
}

// createReported is create for a result called name, which --json wraps into an object with the members of view.
func (a *app) createReported(o outFlags, name string, view map[string]any, binary bool, mode fs.FileMode) (*output, error) {
	out, err := a.create(o, binary && !a.json, mode)
	if err != nil || !a.json {
		return out, err
	}
	if view == nil {
		view = make(map[string]any)
	}
	out.report = &report{w: a.stdout, name: name, view: view, text: !binary}
	if o.path == "" || o.path == "-" {
		out.report.held = new(bytes.Buffer)
		out.Writer = out.report.held
	} else {
		view["path"] = o.path
	}
	return out, nil
}

// Write writes to the file.
func (o *output) Write(p []byte) (int, error) {
	n, err := o.Writer.Write(p)
	o.written += int64(n)
	return n, err
}

func (o *output) print() error {
	r := o.report
	if r == nil {
		return nil
	}
	r.view["bytes"] = o.written
	switch {
	case r.held != nil && r.text:
		r.view[r.name] = strings.TrimSuffix(r.held.String(), "\n")
	case r.held != nil:
		r.view[r.name] = base64Of(r.held.Bytes())
		clear(r.held.Bytes())
	}
	return writeJSON(r.w, r.view)
}

// create begins the result of a command. Bytes for machines go to a terminal only with --force.
func (a *app) create(o outFlags, binary bool, mode fs.FileMode) (*output, error) {
	if o.path == "" || o.path == "-" {
		if binary && !o.force && terminal(a.stdout) != nil {
			return nil, withHint(errors.New("the result is binary and standard output is a terminal"), "write it to a file with --out F, or insist with --force")
		}
		return &output{Writer: a.stdout}, nil
	}
	switch info, err := os.Lstat(o.path); {
	case err == nil && info.Mode()&(fs.ModeDevice|fs.ModeNamedPipe|fs.ModeCharDevice) != 0:
		f, err := os.OpenFile(o.path, os.O_WRONLY, 0)
		if err != nil {
			return nil, err
		}
		return &output{Writer: f}, nil
	case err == nil && info.IsDir():
		return nil, fmt.Errorf("%s is a directory", o.path)
	case err == nil && !o.force:
		return nil, existsError(o.path)
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return nil, err
	}

	out := &output{path: o.path, force: o.force}
	dir := filepath.Dir(o.path)
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_WRONLY|unix.O_CLOEXEC, uint32(mode.Perm()))
	switch {
	case err == nil:
		out.file = os.NewFile(uintptr(fd), o.path)
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EISDIR), errors.Is(err, unix.EINVAL):
		out.temp = tempName(o.path)
		if out.file, err = os.OpenFile(out.temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode.Perm()); err != nil {
			return nil, err
		}
	default:
		return nil, &fs.PathError{Op: "create", Path: o.path, Err: err}
	}
	out.Writer = out.file
	return out, nil
}

func existsError(path string) error {
	return withHint(fmt.Errorf("%s exists", path), "choose another --out, or replace it with --force")
}

func tempName(path string) string {
	var suffix [6]byte
	rand.Read(suffix[:])
	return filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+"."+hex.EncodeToString(suffix[:]))
}

// commit makes the file durable, gives it its name, and reports it with --json.
func (o *output) commit() error {
	if err := o.link(); err != nil {
		return err
	}
	return o.print()
}

func (o *output) link() error {
	if o.path == "" {
		return nil
	}
	defer o.abort()
	if err := o.file.Sync(); err != nil {
		return err
	}
	if o.temp == "" {
		// The descriptor is named through /proc because AT_EMPTY_PATH needs a capability.
		self := fmt.Sprintf("/proc/self/fd/%d", o.file.Fd())
		target := o.path
		if o.force {
			target = tempName(o.path)
			o.temp = target
		}
		if err := unix.Linkat(unix.AT_FDCWD, self, unix.AT_FDCWD, target, unix.AT_SYMLINK_FOLLOW); err != nil {
			o.temp = ""
			if errors.Is(err, unix.EEXIST) {
				return existsError(o.path)
			}
			return &fs.PathError{Op: "link", Path: target, Err: err}
		}
	}
	if o.temp != "" {
		if err := o.rename(); err != nil {
			return err
		}
		o.temp = ""
	}
	return syncDir(filepath.Dir(o.path))
}

func (o *output) rename() error {
	if o.force {
		return os.Rename(o.temp, o.path)
	}
	err := unix.Renameat2(unix.AT_FDCWD, o.temp, unix.AT_FDCWD, o.path, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EEXIST) {
		return existsError(o.path)
	}
	return err
}

// abort drops the file. After commit it only closes it.
func (o *output) abort() {
	if o.path == "" {
		return
	}
	o.file.Close()
	if o.temp != "" {
		os.Remove(o.temp)
	}
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.Sync(); err != nil && !errors.Is(err, unix.EINVAL) {
		return err
	}
	return nil
}

// writeResult writes the result called name, which is in memory. With --json it is wrapped into an object with the members
// of view.
func (a *app) writeResult(o outFlags, name string, view map[string]any, result []byte, binary bool, mode fs.FileMode) error {
	out, err := a.createReported(o, name, view, binary, mode)
	if err != nil {
		return err
	}
	defer out.abort()
	if _, err := out.Write(result); err != nil {
		return err
	}
	return out.commit()
}

// textFlags are outFlags of a command whose binary result may be written as text.
type textFlags struct {
	outFlags
	as string
}

func (t *textFlags) register(c *cobra.Command) {
	t.outFlags.register(c)
	c.Flags().StringVar(&t.as, "as", "raw", "form of the result: "+textForms)
	c.RegisterFlagCompletionFunc("as", cobra.FixedCompletions(strings.Split(textForms, ", "), cobra.ShellCompDirectiveNoFileComp))
}

// textForms are the forms of a binary result. The last two are multibase with the prefix of each: base58btc, which is what MOSIP writes
// raw signatures in unless it is asked for the other.
const textForms = "raw, hex, base64, base64url, multibase, multibase-base64url"

func (t *textFlags) encode(result []byte) (text []byte, binary bool, err error) {
	var s string
	switch t.as {
	case "", "raw":
		return result, true, nil
	case "hex":
		s = hex.EncodeToString(result)
	case "base64":
		s = base64Of(result)
	case "base64url":
		s = base64.RawURLEncoding.EncodeToString(result)
	case "multibase":
		s, err = packet.EncodeMultibase(packet.Base58BTC, result)
	case "multibase-base64url":
		s, err = packet.EncodeMultibase(packet.Base64URL, result)
	default:
		return nil, false, errForm("as", t.as)
	}
	return append([]byte(s), '\n'), false, err
}

func errForm(flag, form string) error {
	return usagef("--%s is one of %s, not %q", flag, textForms, form)
}

// decodeText is the way back, of what a file has in one of these forms.
func decodeText(form string, b []byte) ([]byte, error) {
	text := strings.TrimSpace(string(b))
	var err error
	switch form {
	case "", "raw":
		return b, nil
	case "hex":
		b, err = hex.DecodeString(text)
	case "base64", "base64url":
		b, err = io.ReadAll((&rawFlags{}).reader(strings.NewReader(text)))
	case "multibase", "multibase-base64url":
		b, err = packet.DecodeMultibase(text)
	default:
		return nil, errForm("sig-as", form)
	}
	if err != nil {
		return nil, fmt.Errorf("the signature is not in the form %s", form)
	}
	return b, nil
}

// writeText is writeResult for a binary result in the form that was asked for.
func (a *app) writeText(t textFlags, name string, view map[string]any, result []byte, mode fs.FileMode) error {
	text, binary, err := t.encode(result)
	if err != nil {
		return err
	}
	return a.writeResult(t.outFlags, name, view, text, binary, mode)
}

// inFlag registers --in.
func inFlag(c *cobra.Command, in *string, what string) {
	c.Flags().StringVar(in, "in", "-", what+`, "-" is standard input`)
}

// open opens an input. The size is -1 where it is not known.
func (a *app) open(path string) (r io.ReadCloser, size int64, err error) {
	if path == "-" {
		size = -1
		if f, ok := a.stdin.(*os.File); ok {
			if info, err := f.Stat(); err == nil && info.Mode().IsRegular() {
				size = info.Size()
			}
		}
		return io.NopCloser(a.stdin), size, nil
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, 0, err
	}
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, 0, err
	}
	switch {
	case info.IsDir():
		f.Close()
		return nil, 0, fmt.Errorf("%s is a directory", path)
	case info.Mode().IsRegular():
		return f, info.Size(), nil
	}
	return f, -1, nil
}

// readFile reads an input of at most limit bytes.
func (a *app) readFile(path string, limit int) ([]byte, error) {
	r, _, err := a.open(path)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	data, err := io.ReadAll(io.LimitReader(r, int64(limit)+1))
	if err != nil {
		return nil, err
	}
	if len(data) > limit {
		return nil, fmt.Errorf("%s is larger than %s", path, size(int64(limit)))
	}
	return data, nil
}

// optionalFile is readFile for a flag that may be absent.
func (a *app) optionalFile(path string, limit int) ([]byte, error) {
	if path == "" {
		return nil, nil
	}
	return a.readFile(path, limit)
}
