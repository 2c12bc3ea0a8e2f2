package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/kmsd-project/kmsd/client"
	"github.com/kmsd-project/kmsd/client/jose"
	"github.com/kmsd-project/kmsd/client/packet"
	"github.com/kmsd-project/kmsd/ipc/proto"
)

func newZK(a *app) *cobra.Command {
	c := &cobra.Command{Use: "zk", Short: "Encrypt attributes of persons as MOSIP's zero-knowledge encryption does"}
	c.AddCommand(newZKGenerate(a), newZKImport(a), newZKEncrypt(a), newZKDecrypt(a), newZKRewrap(a))
	return c
}

// zkKey registers --key, which is MOSIP's by default.
func (a *app) zkKey(c *cobra.Command, key *string) {
	c.Flags().StringVar(key, "key", "KERNEL/IDENTITY_CACHE", "AES key APP/IDENTITY_CACHE that wraps the random keys")
	a.completeFlag(c, "key")
}

func newZKGenerate(a *app) *cobra.Command {
	var key string
	var count uint32
	c := uses(&cobra.Command{
		Use:   "generate [--key NAME] [--count N]",
		Short: "Make the random keys that are missing",
		Long: `Make random keys until there are those with the indices below --count. They are kept in the store, each wrapped by the AES key. Done again it
makes nothing.`,
		Example: "  kmsctl master generate KERNEL/IDENTITY_CACHE\n  kmsctl zk generate",
		Args:    exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			p := a.waiting("making random keys")
			var made int
			err := a.with(c.Context(), func(ctx context.Context, cl *client.Client) (err error) {
				made, err = cl.GenerateZKKeys(ctx, key, count)
				return err
			})
			p.end()
			if err != nil {
				return err
			}
			return a.print(map[string]any{"key": key, "made": made}, func(io.Writer) { a.say("%d random keys made", made) })
		},
	}, proto.OpZKGenerate)
	a.zkKey(c, &key)
	c.Flags().Uint32Var(&count, "count", 10_000, "how many there are to be")
	return c
}

// maxZKTable is the longest table of random keys in bytes.
const maxZKTable = 64 << 20

func newZKImport(a *app) *cobra.Command {
	var key, in string
	c := uses(&cobra.Command{
		Use:   "import [--key NAME[@N]] --in F",
		Short: "Bring in random keys of MOSIP's table data_encrypt_keystore",
		Long: `Bring in random keys of MOSIP's table data_encrypt_keystore, which the AES key wraps that was imported before: CSV with the columns id, key (standard
base64) and key_status. Done again it finds what is there. "kmsctl mosip import" does this and everything else of a deployment.`,
		Example: "  kmsctl zk import --in data_encrypt_keystore.csv",
		Args:    exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			table, err := a.readFile(in, maxZKTable)
			if err != nil {
				return err
			}
			keys, err := parseZKTable(table)
			if err != nil {
				return err
			}
			p := a.waiting("importing random keys")
			var added int
			err = a.with(c.Context(), func(ctx context.Context, cl *client.Client) (err error) {
				added, err = cl.ImportZKKeys(ctx, key, keys)
				return err
			})
			p.end()
			if err != nil {
				return err
			}
			return a.print(map[string]any{"key": key, "keys": len(keys), "added": added}, func(io.Writer) {
				a.say("%d of %d random keys added", added, len(keys))
			})
		},
	}, proto.OpZKImport)
	a.zkKey(c, &key)
	inFlag(c, &in, "the table")
	return c
}

// parseZKTable reads rows of id, key and key_status, with or without a header.
func parseZKTable(table []byte) ([]client.ZKKey, error) {
	r := csv.NewReader(bytes.NewReader(table))
	r.FieldsPerRecord = -1
	var keys []client.ZKKey
	for {
		row, err := r.Read()
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, err
		}
		line, _ := r.FieldPos(0)
		if line == 1 && len(row) > 0 && strings.EqualFold(strings.TrimSpace(row[0]), "id") {
			continue
		}
		if len(row) < 2 {
			return nil, fmt.Errorf("line %d: id, key and key_status are wanted", line)
		}
		index, err := strconv.ParseUint(strings.TrimSpace(row[0]), 10, 32)
		if err != nil {
			return nil, fmt.Errorf("line %d: %q is no index", line, row[0])
		}
		wrapped, err := base64.StdEncoding.DecodeString(strings.TrimSpace(row[1]))
		if err != nil || len(wrapped) != 32 {
			return nil, fmt.Errorf("line %d: the key is not 32 bytes in base64", line)
		}
		keys = append(keys, client.ZKKey{Index: uint32(index), Wrapped: wrapped, Inactive: len(row) > 2 && !strings.EqualFold(strings.TrimSpace(row[2]), "Active")})
	}
	if len(keys) == 0 {
		return nil, errors.New("the table has no random keys")
	}
	return keys, nil
}

// zkData is what the commands read and write, with the names of MOSIP's requests but for the misspelled one.
type zkData struct {
	ID         string        `json:"id"`
	Attributes []zkAttribute `json:"zkDataAttributes"`
	Index      *uint32       `json:"randomKeyIndex,omitempty"`
	RandomKey  string        `json:"encryptedRandomKey,omitempty"`
}

type zkAttribute struct {
	Identifier string `json:"identifier"`
	Value      string `json:"value"`
}

// readZK reads the input of encrypt or decrypt.
func (a *app) readZK(path string) (*zkData, error) {
	text, err := a.readFile(path, proto.MaxData)
	if err != nil {
		return nil, err
	}
	if err := jose.CheckJSON(text); err != nil {
		return nil, err
	}
	var d zkData
	decoder := json.NewDecoder(bytes.NewReader(text))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&d); err != nil {
		return nil, withHint(fmt.Errorf("%s: %w", path, err), `{"id": "...", "zkDataAttributes": [{"identifier": "...", "value": "..."}]}`)
	}
	return &d, nil
}

func newZKEncrypt(a *app) *cobra.Command {
	var key, in string
	var to []string
	var out outFlags
	c := uses(&cobra.Command{
		Use:   "encrypt [--key NAME] [--to NAME]... --in F --out F",
		Short: "Encrypt attributes of a person",
		Long: `Encrypt attributes of a person as MOSIP's zkEncrypt does, under a random key that is chosen by chance. The input is JSON with the names of
MOSIP's request: id and zkDataAttributes, a list of identifier and value; the values are texts. --to names keys of other applications, whose
certificates the random key is encrypted to.`,
		Example: "  kmsctl zk encrypt --to IDA/PUBLIC_KEY --in attributes.json --out encrypted.json",
		Args:    exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			d, err := a.readZK(in)
			if err != nil {
				return err
			}
			attributes := make([]client.ZKAttribute, len(d.Attributes))
			for i, one := range d.Attributes {
				attributes[i] = client.ZKAttribute{Identifier: one.Identifier, Value: []byte(one.Value)}
			}
			var sealed *client.ZKData
			err = a.with(c.Context(), func(ctx context.Context, cl *client.Client) (err error) {
				sealed, err = cl.ZKEncrypt(ctx, key, d.ID, attributes, to...)
				return err
			})
			if err != nil {
				return err
			}
			result := zkData{ID: d.ID, Index: &sealed.Index, RandomKey: sealed.RandomKey()}
			for _, one := range sealed.Attributes {
				result.Attributes = append(result.Attributes, zkAttribute{one.Identifier, base64.RawURLEncoding.EncodeToString(one.Value)})
			}
			return a.writeZK(out, &result, modePublic)
		},
	}, proto.OpZKEncrypt)
	a.zkKey(c, &key)
	c.Flags().StringArrayVar(&to, "to", nil, "key whose certificate the random key is encrypted to; repeat for more")
	a.completeFlag(c, "to")
	inFlag(c, &in, "the attributes")
	out.register(c)
	return c
}

// writeZK writes a result, which is JSON with and without --json.
func (a *app) writeZK(o outFlags, d *zkData, mode fs.FileMode) error {
	out, err := a.create(o, false, mode)
	if err != nil {
		return err
	}
	defer out.abort()
	if err := writeJSON(out, d); err != nil {
		return err
	}
	return out.commit()
}

func newZKDecrypt(a *app) *cobra.Command {
	var key, in string
	var out outFlags
	c := uses(&cobra.Command{
		Use:     "decrypt [--key NAME] --in F --out F",
		Short:   "Decrypt attributes of a person",
		Long:    "Decrypt what \"kmsctl zk encrypt\" or MOSIP's zkEncrypt made: JSON with id and zkDataAttributes, whose values are base64url.",
		Example: "  kmsctl zk decrypt --in encrypted.json --out attributes.json",
		Args:    exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			d, err := a.readZK(in)
			if err != nil {
				return err
			}
			sealed := make([]client.ZKAttribute, len(d.Attributes))
			for i, one := range d.Attributes {
				b, err := decodeBase64("in", one.Value)
				if err != nil {
					return fmt.Errorf("the value of %s is not base64url", one.Identifier)
				}
				sealed[i] = client.ZKAttribute{Identifier: one.Identifier, Value: b}
			}
			var plain []client.ZKAttribute
			err = a.with(c.Context(), func(ctx context.Context, cl *client.Client) (err error) {
				plain, err = cl.ZKDecrypt(ctx, key, d.ID, sealed)
				return err
			})
			if errors.Is(err, client.ErrDecryption) {
				return withHint(err, "another person's id, another --key, or the data were changed")
			}
			if err != nil {
				return err
			}
			result := zkData{ID: d.ID}
			for _, one := range plain {
				result.Attributes = append(result.Attributes, zkAttribute{one.Identifier, string(one.Value)})
			}
			return a.writeZK(out, &result, modeSecret)
		},
	}, proto.OpZKDecrypt)
	a.zkKey(c, &key)
	inFlag(c, &in, "the attributes")
	out.register(c)
	return c
}

func newZKRewrap(a *app) *cobra.Command {
	var key, in string
	var keep int64
	var out outFlags
	c := uses(&cobra.Command{
		Use:   "rewrap [--key NAME] [--keep INDEX] --in F --out F",
		Short: "Take over a random key of another application",
		Long: `Take over a random key of another application, as MOSIP's zkReEncryptRandomKey does: from the text encryptedRandomKey, the part that is for a key of this
keystore is decrypted and wrapped by the AES key. What is written is that in standard base64, as MOSIP's table has it. With --keep it is kept here under the
index, too, so that attributes of the other application can be decrypted; nothing is encrypted under it.`,
		Example: "  kmsctl zk rewrap --key IDA/IDENTITY_CACHE --keep 4711 --in random-key.txt",
		Args:    exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			text, err := a.readFile(in, proto.MaxData)
			if err != nil {
				return err
			}
			var index *uint32
			if keep >= 0 {
				n := uint32(keep)
				if int64(n) != keep {
					return usagef("--keep %d is no index", keep)
				}
				index = &n
			}
			var wrapped []byte
			err = a.with(c.Context(), func(ctx context.Context, cl *client.Client) (err error) {
				wrapped, err = cl.ZKRewrap(ctx, key, strings.TrimSpace(string(text)), index)
				return err
			})
			if errors.Is(err, packet.ErrFormat) {
				return withHint(err, "encryptedRandomKey is base64url, with a dot between the parts")
			}
			if err != nil {
				return err
			}
			return a.writeResult(out, "wrapped", map[string]any{"key": key}, []byte(base64Of(wrapped)+"\n"), false, modePublic)
		},
	}, proto.OpZKRewrap, proto.OpKeyFind)
	a.zkKey(c, &key)
	c.Flags().Int64Var(&keep, "keep", -1, "index under which the random key is kept here")
	inFlag(c, &in, "the encrypted random key")
	out.register(c)
	return c
}
