package main

import (
	"bytes"
	"context"
	"crypto/rsa"
	"errors"
	"io"
	"io/fs"

	"github.com/spf13/cobra"

	"github.com/kmsd-project/kmsd/client/ciphertext"
	"github.com/kmsd-project/kmsd/ipc/proto"
)

const (
	maxAAD     = 8 << 10                // associated data in bytes
	maxMessage = proto.MaxData - maxAAD // plaintext that is sealed in one request; above it is an envelope
	maxBlock   = 512                    // RSA-OAEP block in bytes
)

// cipherFlags are common to encrypt, decrypt and rewrap.
type cipherFlags struct {
	key, aadFile, in string
	out              outFlags
}

func (f *cipherFlags) register(a *app, c *cobra.Command) {
	a.keyFlag(c, &f.key, "the key")
	c.Flags().StringVar(&f.aadFile, "aad-file", "", "file with data the ciphertext is bound to; decryption needs the same")
	inFlag(c, &f.in, "input")
	f.out.register(c)
}

// cipherFiles are the open files of such a command, and what --json shows of the result.
type cipherFiles struct {
	aad  []byte
	in   io.ReadCloser
	size int64 // of in, -1 where it is not known
	out  *output
	view map[string]any
}

// open opens the files. The result is called name; binary says whether it is one that a terminal should not get.
func (f *cipherFlags) open(a *app, name string, binary bool, mode fs.FileMode) (*cipherFiles, error) {
	aad, err := a.optionalFile(f.aadFile, maxAAD)
	if err != nil {
		return nil, err
	}
	in, size, err := a.open(f.in)
	if err != nil {
		return nil, err
	}
	view := map[string]any{"key": f.key}
	out, err := a.createReported(f.out, name, view, binary, mode)
	if err != nil {
		in.Close()
		return nil, err
	}
	return &cipherFiles{aad, in, size, out, view}, nil
}

// write writes a ciphertext, or its head.
func (f *cipherFiles) write(r *proto.EncryptReply) error {
	f.view["version"] = r.Version
	_, err := f.out.Write(r.Ciphertext)
	return err
}

func (f *cipherFiles) close() {
	f.in.Close()
	f.out.abort()
}

func newEncrypt(a *app) *cobra.Command {
	var f cipherFlags
	var inside bool
	c := uses(&cobra.Command{
		Use:   "encrypt --key NAME --in F --out F [flags]",
		Short: "Encrypt data of any size",
		Long: `Encrypt data of any size (docs/ciphertext-format.md). Small data are encrypted by the daemon. Large data are encrypted
here, at the full speed of this machine, under a fresh data key that the daemon seals; with --in-daemon that key never leaves
the daemon, and the data pass through it.

With an RSA encryption key up to 446 bytes, less for shorter keys, are encrypted by RSA-OAEP; for large data and RSA see
"kmsctl packet encrypt".`,
		Args: exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			files, err := f.open(a, "ciphertext", true, modePublic)
			if err != nil {
				return err
			}
			defer files.close()
			head, err := io.ReadAll(io.LimitReader(files.in, maxMessage+1))
			if err != nil {
				return err
			}
			if len(head) <= maxMessage && !inside {
				sealed, err := a.seal(c.Context(), f.key, head, files.aad)
				if err != nil {
					return err
				}
				if err := files.write(sealed); err != nil {
					return err
				}
				return files.out.commit()
			}
			key, err := a.key(c.Context(), f.key)
			if err != nil {
				return err
			}
			encrypt := key.EncryptEnvelope
			if inside {
				encrypt = key.EncryptStream
			}
			files.view["version"] = key.Version()
			w, err := encrypt(c.Context(), files.out, files.aad)
			if err != nil {
				return err
			}
			p := a.progressOf("encrypting", files.size)
			defer p.end()
			if _, err := io.Copy(w, p.reader(&contextReader{c.Context(), io.MultiReader(bytes.NewReader(head), files.in)})); err != nil {
				return err
			}
			if err := w.Close(); err != nil {
				return err
			}
			return files.out.commit()
		},
	}, proto.OpEncrypt, proto.OpDataKey, proto.OpStreamBegin, proto.OpStreamUpdate, proto.OpStreamFinish, proto.OpStreamAbort)
	f.register(a, c)
	c.Flags().BoolVar(&inside, "in-daemon", false, "encrypt inside the daemon, whatever the size")
	return c
}

// seal encrypts a message that fits into one request.
func (a *app) seal(ctx context.Context, key string, data, aad []byte) (*proto.EncryptReply, error) {
	var r proto.EncryptReply
	err := a.call(ctx, proto.OpEncrypt, &proto.Encrypt{Key: key, Data: data, AAD: aad}, &r)
	var wire *proto.Error
	if errors.As(err, &wire) {
		switch wire.Code {
		case proto.CodeUsage:
			err = withHint(err, "only keys that decrypt encrypt: kmsctl key create NAME --alg aes-256-gcm, or --alg rsa-3072 --usage encrypt,decrypt")
		case proto.CodeInvalid, proto.CodeTooLarge:
			err = withHint(err, "kmsctl packet encrypt --key %s takes data of any size, and so does an AEAD key", key)
		}
	}
	return &r, err
}

func newDecrypt(a *app) *cobra.Command {
	var f cipherFlags
	c := uses(&cobra.Command{
		Use:   "decrypt --key NAME --in F --out F [flags]",
		Short: "Decrypt what encrypt made",
		Long: `Decrypt what "kmsctl encrypt" made, or an RSA-OAEP block. The output file appears when the last byte has been verified.
Standard output gets verified pieces as they come: if the end is missing or was changed the exit code is 1, and what was
written until then is a true beginning and no more.`,
		Args: exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			files, err := f.open(a, "data", a.json, modeSecret)
			if err != nil {
				return err
			}
			defer files.close()
			p := a.progressOf("decrypting", files.size)
			defer p.end()
			if err := a.unseal(c.Context(), files.out, p.reader(&contextReader{c.Context(), files.in}), f.key, files.aad); err != nil {
				return decryptHint(err)
			}
			return files.out.commit()
		},
	}, proto.OpDecrypt, proto.OpStreamBegin, proto.OpStreamUpdate, proto.OpStreamFinish)
	f.register(a, c)
	return c
}

func decryptHint(err error) error {
	switch {
	case errors.Is(err, ciphertext.ErrFormat):
		return withHint(err, "is it a file made by kmsctl encrypt?")
	}
	return err
}

// unseal decrypts every form that encrypt makes.
func (a *app) unseal(ctx context.Context, out io.Writer, source io.Reader, ref string, aad []byte) error {
	begin := make([]byte, ciphertext.HeadSize)
	n, err := io.ReadFull(source, begin)
	if err != nil && err != io.EOF && err != io.ErrUnexpectedEOF {
		return err
	}
	begin = begin[:n]
	source = io.MultiReader(bytes.NewReader(begin), source)
	header, err := ciphertext.ParseHeader(begin)
	if err != nil {
		return a.unsealRSA(ctx, out, source, ref, aad)
	}
	if header.Format == ciphertext.DataKey && header.KeySize != ciphertext.KeySize {
		return errDataKey
	}
	key, err := a.key(ctx, ref)
	if err != nil {
		return err
	}
	plain, err := key.DecryptStream(ctx, source, aad)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, plain)
	return err
}

// errDataKey keeps a sealed data key from being taken for data, and an envelope without its segments for a data key.
var errDataKey = withHint(errors.New("this is a sealed data key, not data"), "kmsctl datakey --key NAME --sealed-in F opens it")

// unsealRSA decrypts an RSA-OAEP block. The associated data are its label.
func (a *app) unsealRSA(ctx context.Context, out io.Writer, source io.Reader, ref string, label []byte) error {
	block, err := io.ReadAll(io.LimitReader(source, maxBlock+1))
	if err != nil {
		return err
	}
	if len(block) > maxBlock {
		return ciphertext.ErrFormat
	}
	k, err := a.key(ctx, ref)
	if err != nil {
		return err
	}
	if _, ok := k.Public().(*rsa.PublicKey); !ok {
		return ciphertext.ErrFormat
	}
	plain, err := k.DecryptOAEP(ctx, block, label)
	if err != nil {
		return err
	}
	defer clear(plain)
	_, err = out.Write(plain)
	return err
}

func newRewrap(a *app) *cobra.Command {
	var f cipherFlags
	c := uses(&cobra.Command{
		Use:   "rewrap --key NAME --in F --out F [flags]",
		Short: "Bring a ciphertext under the newest version of its key",
		Long: `Encrypt a ciphertext again under the newest version of its key. The plaintext stays in the daemon. Of a large ciphertext
only the sealed data key is renewed; the segments are copied as they are.`,
		Args: exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			files, err := f.open(a, "ciphertext", true, modePublic)
			if err != nil {
				return err
			}
			defer files.close()
			head := make([]byte, ciphertext.HeadSize)
			n, err := io.ReadFull(files.in, head)
			if err != nil && err != io.EOF && err != io.ErrUnexpectedEOF {
				return err
			}
			sealed := head[:n]
			header, err := ciphertext.ParseHeader(sealed)
			if err != nil {
				return decryptHint(err)
			}
			if header.Format == ciphertext.Message {
				rest, err := io.ReadAll(io.LimitReader(files.in, proto.MaxData+ciphertext.Overhead))
				if err != nil {
					return err
				}
				sealed = append(sealed, rest...)
			}
			var renewed proto.EncryptReply
			if err := a.call(c.Context(), proto.OpRewrap, &proto.Rewrap{Key: f.key, Ciphertext: sealed, AAD: files.aad}, &renewed); err != nil {
				return err
			}
			if err := files.write(&renewed); err != nil {
				return err
			}
			if header.Format != ciphertext.Message {
				p := a.progressOf("copying", files.size)
				defer p.end()
				if _, err := io.Copy(files.out, p.reader(&contextReader{c.Context(), files.in})); err != nil {
					return err
				}
			}
			return files.out.commit()
		},
	}, proto.OpRewrap)
	f.register(a, c)
	return c
}
