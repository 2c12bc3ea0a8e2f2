package main

import (
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/kmsd-project/kmsd/client/packet"
)

// rawFlags are the flag of a command whose files are in base64url, as MOSIP hands its data around.
type rawFlags struct{ raw bool }

func (f *rawFlags) register(c *cobra.Command, what string) {
	c.Flags().BoolVar(&f.raw, "raw", false, what+" as bytes instead of base64url")
}

// reader returns what r has, decoded.
func (f *rawFlags) reader(r io.Reader) io.Reader {
	if f.raw {
		return r
	}
	return base64.NewDecoder(base64.RawURLEncoding.Strict(), &base64Reader{r: r})
}

// writer returns a writer of w's form. Its Close ends the text and leaves w open.
func (f *rawFlags) writer(w io.Writer) io.WriteCloser {
	if f.raw {
		return notClosed{w}
	}
	return &base64Writer{base64.NewEncoder(base64.RawURLEncoding, w), w}
}

type notClosed struct{ io.Writer }

func (notClosed) Close() error { return nil }

// base64Writer ends its text with a line end.
type base64Writer struct {
	io.WriteCloser
	w io.Writer
}

func (b *base64Writer) Close() error {
	if err := b.WriteCloser.Close(); err != nil {
		return err
	}
	_, err := b.w.Write([]byte("\n"))
	return err
}

// base64Error says what is wrong with text that was to be base64url.
func base64Error(err error) error {
	var corrupt base64.CorruptInputError
	if errors.As(err, &corrupt) || errors.Is(err, errBase64) || errors.Is(err, io.ErrUnexpectedEOF) {
		return withHint(errBase64, "with --raw bytes are read as they are")
	}
	return err
}

var errBase64 = errors.New("the input is not base64url")

// base64Reader turns what MOSIP reads as base64 into base64url without padding: it may be in the alphabet of URLs or in the standard one,
// but not in both, with padding at its end or without, and in lines.
type base64Reader struct {
	r        io.Reader
	url, std bool
	padding  int
}

func (b *base64Reader) Read(p []byte) (int, error) {
	n, err := b.r.Read(p)
	kept := p[:0]
	for _, c := range p[:n] {
		switch c {
		case ' ', '\t', '\r', '\n':
			continue
		case '=':
			b.padding++
			continue
		case '-', '_':
			b.url = true
		case '+':
			b.std, c = true, '-'
		case '/':
			b.std, c = true, '_'
		}
		if b.padding > 0 || b.url && b.std {
			return 0, errBase64
		}
		kept = append(kept, c)
	}
	if b.padding > 2 {
		return 0, errBase64
	}
	return len(kept), err
}

// decodeBase64 decodes the value of a flag.
func decodeBase64(flag, text string) ([]byte, error) {
	var f rawFlags
	b, err := io.ReadAll(f.reader(strings.NewReader(text)))
	if err != nil {
		return nil, usagef("--%s: not base64url", flag)
	}
	return b, nil
}

// maxSealed is the longest file that is decrypted as a stream, in bytes.
const maxSealed = packet.MaxStream + 4096

// sealedFile is a ciphertext that can be read twice.
type sealedFile struct {
	io.ReaderAt
	size  int64
	close func() error
}

// openSealed opens an input for reading it twice. What is no file of bytes is copied into a temporary one without a name.
func (a *app) openSealed(path string, f *rawFlags) (*sealedFile, error) {
	r, length, err := a.open(path)
	if err != nil {
		return nil, err
	}
	if file, ok := r.(*os.File); ok && f.raw && length >= 0 {
		return &sealedFile{file, length, file.Close}, nil
	}
	defer r.Close()
	dir := os.TempDir()
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	var copied *os.File
	if err == nil {
		copied = os.NewFile(uintptr(fd), dir)
	} else if copied, err = os.CreateTemp(dir, "kmsctl-"); err != nil { // a file system without O_TMPFILE
		return nil, err
	} else {
		os.Remove(copied.Name())
	}
	n, err := io.Copy(copied, io.LimitReader(f.reader(r), maxSealed+1))
	if err == nil && n > maxSealed {
		err = fmt.Errorf("%s is larger than %s", path, size(maxSealed))
	}
	if err != nil {
		copied.Close()
		return nil, base64Error(err)
	}
	return &sealedFile{copied, n, copied.Close}, nil
}
