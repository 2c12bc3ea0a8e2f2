package main

import (
	"bytes"
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/kmsd-project/kmsd/ipc/proto"
)

func newMAC(a *app) *cobra.Command {
	var key, in string
	var out textFlags
	c := uses(&cobra.Command{
		Use:   "mac --key NAME --in F [flags]",
		Short: "Authenticate data with an HMAC key",
		Args:  exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			data, rest, err := a.openFramed(in)
			if err != nil {
				return err
			}
			defer rest.Close()
			var tag []byte
			view := map[string]any{"key": key}
			if data != nil {
				var r proto.MACReply
				err = a.call(c.Context(), proto.OpMAC, &proto.MAC{Key: key, Data: data}, &r)
				tag, view["version"] = r.MAC, r.Version
			} else {
				tag, err = a.macReader(c.Context(), key, rest)
			}
			if err != nil {
				return err
			}
			return a.writeText(out, "mac", view, tag, modePublic)
		},
	}, proto.OpMAC, proto.OpStreamBegin, proto.OpStreamUpdate, proto.OpStreamFinish)
	a.keyFlag(c, &key, "the key")
	inFlag(c, &in, "data")
	out.register(c)
	return c
}

func newMACVerify(a *app) *cobra.Command {
	var key, in, mac string
	c := uses(&cobra.Command{
		Use:   "mac-verify --key NAME --in F --mac F",
		Short: "Check a MAC",
		Args:  exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			tag, err := a.readFile(mac, 64)
			if err != nil {
				return err
			}
			data, rest, err := a.openFramed(in)
			if err != nil {
				return err
			}
			defer rest.Close()
			if data == nil {
				k, err := a.key(c.Context(), key)
				if err != nil {
					return err
				}
				if err := k.VerifyMACReader(c.Context(), rest, tag); err != nil {
					return err
				}
				return a.print(map[string]any{"valid": true}, func(w io.Writer) { fmt.Fprintln(w, "valid") })
			}
			var r proto.VerifyReply
			if err := a.call(c.Context(), proto.OpMACVerify, &proto.MACVerify{Key: key, Data: data, MAC: tag}, &r); err != nil {
				return err
			}
			return a.printVerified(&r)
		},
	}, proto.OpMACVerify, proto.OpStreamBegin, proto.OpStreamUpdate, proto.OpStreamFinish)
	a.keyFlag(c, &key, "the key")
	inFlag(c, &in, "data")
	c.Flags().StringVar(&mac, "mac", "", "file with the MAC, as mac wrote it")
	c.MarkFlagRequired("mac")
	return c
}

func (a *app) macReader(ctx context.Context, ref string, r io.Reader) ([]byte, error) {
	k, err := a.key(ctx, ref)
	if err != nil {
		return nil, err
	}
	return k.MACReader(ctx, r)
}

func (a *app) printVerified(r *proto.VerifyReply) error {
	if r.Compromised {
		a.say("warning: version %d of the key is compromised; the signature may have been made by somebody else", r.Version)
	}
	return a.print(map[string]any{"valid": true, "version": r.Version, "compromised": r.Compromised}, func(w io.Writer) {
		fmt.Fprintf(w, "valid, by version %d\n", r.Version)
	})
}

// openFramed returns the whole input where it fits into one request, else a reader of all of it.
func (a *app) openFramed(path string) (data []byte, rest io.ReadCloser, err error) {
	r, _, err := a.open(path)
	if err != nil {
		return nil, nil, err
	}
	head, err := io.ReadAll(io.LimitReader(r, proto.MaxData+1))
	if err != nil {
		r.Close()
		return nil, nil, err
	}
	if len(head) <= proto.MaxData {
		return head, r, nil
	}
	return nil, struct {
		io.Reader
		io.Closer
	}{io.MultiReader(bytes.NewReader(head), r), r}, nil
}
