package main

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/keystore"
)

func newKeyFind(a *app) *cobra.Command {
	values := map[keystore.AliasKind]*string{
		keystore.AliasSPKI: new(string), keystore.AliasSSH: new(string), keystore.AliasCKAID: new(string), keystore.AliasThumbprint: new(string),
	}
	var in string
	c := uses(&cobra.Command{
		Use:   "find {--spki HEX | --ssh SHA256:... | --cka-id HEX | --certificate HEX | --in F}",
		Short: "Find the key that has a public key or a certificate",
		Long: `Find the key that has a public key or a certificate, and which version of it that is. Digests are SHA-256 in hexadecimal,
with or without colons; kmsctl public NAME --format fingerprints writes them. --in takes a public key or a certificate
itself. A key you have no grant for is not found.`,
		Args: exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			var params proto.KeyFind
			if in != "" {
				encoded, err := a.readFile(in, proto.MaxData)
				if err != nil {
					return err
				}
				spki, err := readPublic(encoded)
				if err != nil {
					return err
				}
				sum := sha256.Sum256(spki)
				params = proto.KeyFind{Kind: string(keystore.AliasSPKI), Value: sum[:]}
			}
			for kind, value := range values {
				if *value == "" {
					continue
				}
				digest, err := parseDigest(*value)
				if err != nil {
					return err
				}
				params = proto.KeyFind{Kind: string(kind), Value: digest}
			}
			var r proto.KeyFindReply
			if err := a.call(c.Context(), proto.OpKeyFind, &params, &r); err != nil {
				return err
			}
			return a.print(map[string]any{"version": r.Version, "key": viewKey(&r.Key)}, func(w io.Writer) {
				fmt.Fprintf(w, "%s@%d\n\n", r.Key.Name, r.Version)
				writeKey(w, &r.Key)
			})
		},
	}, proto.OpKeyFind)
	flags := c.Flags()
	flags.StringVar(values[keystore.AliasSPKI], "spki", "", "digest of the public key (SubjectPublicKeyInfo)")
	flags.StringVar(values[keystore.AliasSSH], "ssh", "", "fingerprint as ssh-keygen -l shows it")
	flags.StringVar(values[keystore.AliasCKAID], "cka-id", "", "CKA_ID of PKCS#11 software: SHA-1 of the bits of the public key")
	flags.StringVar(values[keystore.AliasThumbprint], "certificate", "", "digest of the certificate that is attached to the key")
	flags.StringVar(&in, "in", "", `public key or certificate, PEM or DER, "-" is standard input`)
	all := []string{"spki", "ssh", "cka-id", "certificate", "in"}
	c.MarkFlagsOneRequired(all...)
	c.MarkFlagsMutuallyExclusive(all...)
	return c
}

// parseDigest reads hexadecimal, with or without colons, or base64 after the word SHA256 as OpenSSH writes it.
func parseDigest(s string) ([]byte, error) {
	if text, ok := strings.CutPrefix(s, sshPrefix); ok {
		if digest, err := base64.RawStdEncoding.DecodeString(strings.TrimRight(text, "=")); err == nil {
			return digest, nil
		}
	} else if digest, err := hex.DecodeString(strings.ReplaceAll(s, ":", "")); err == nil {
		return digest, nil
	}
	return nil, usagef("%q is not a digest: hexadecimal, or %s and base64", s, sshPrefix)
}

const sshPrefix = "SHA256:"

// fingerprints lists what a public key is found by.
func fingerprints(r *proto.PublicReply) []byte {
	sum := sha256.Sum256(r.SPKI)
	text := fmt.Sprintf("spki %x\ncka-id %x\n", sum, r.CKAID)
	if len(r.SSHSHA256) > 0 {
		text += "ssh " + sshPrefix + base64.RawStdEncoding.EncodeToString(r.SSHSHA256) + "\n"
	}
	return []byte(text)
}
