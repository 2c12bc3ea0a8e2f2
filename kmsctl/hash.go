package main

import (
	"encoding/base64"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/kmsd-project/kmsd/client/packet"
)

func newHash(a *app) *cobra.Command {
	c := &cobra.Command{Use: "hash", Short: "Hash texts as MOSIP does"}
	c.AddCommand(newHashArgon2(a))
	return c
}

// maxHashed is the longest text that is hashed, in bytes.
const maxHashed = 1 << 20

func newHashArgon2(a *app) *cobra.Command {
	var in, salt string
	var keepEnd bool
	var out outFlags
	c := &cobra.Command{
		Use:   "argon2 [--salt B64U] --in F --out F",
		Short: "Hash a text with Argon2id",
		Long: `Hash a text as MOSIP's generateArgon2Hash does, without the daemon: Argon2id with ten passes over 64 MiB and two lanes. The hash and the salt
are written in base64url; without --salt a fresh one of 24 bytes is taken. A line end at the end of the text is not part of it, but with
--keep-line-end.`,
		Example: "  kmsctl hash argon2 --in text\n  kmsctl --json hash argon2 --salt c2FsdHNhbHQ --in text",
		Args:    exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			data, err := a.readFile(in, maxHashed)
			if err != nil {
				return err
			}
			text := string(data)
			if !keepEnd {
				text = strings.TrimSuffix(strings.TrimSuffix(text, "\n"), "\r")
			}
			with := packet.NewArgon2Salt()
			if salt != "" {
				if with, err = decodeBase64("salt", salt); err != nil {
					return err
				}
			}
			hash, err := packet.Argon2Hash(text, with)
			if err != nil {
				return err
			}
			view := map[string]any{"salt": base64.RawURLEncoding.EncodeToString(with)}
			text = base64.RawURLEncoding.EncodeToString(hash)
			if !a.json {
				text = fmt.Sprintf("hash %s\nsalt %s\n", text, view["salt"])
			}
			return a.writeResult(out, "hash", view, []byte(text), false, modePublic)
		},
	}
	c.Flags().StringVar(&salt, "salt", "", "salt in base64url, 8 to 1,024 bytes (default: a fresh one)")
	c.Flags().BoolVar(&keepEnd, "keep-line-end", false, "hash a line end at the end, too")
	inFlag(c, &in, "the text")
	out.register(c)
	return c
}
