package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/kmsd-project/kmsd/client/packet"
	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsctl/keymap"
)

func newMap(a *app) *cobra.Command {
	var out outFlags
	var title string
	c := uses(&cobra.Command{
		Use:   "map [PREFIX] --out FILE.svg|FILE.html|FILE.dot",
		Short: "Draw applications, keys, versions, certificates and expiry",
		Long: `Draw a picture of what the keystore holds: each application with its module key and the keys below it, all versions along an axis of
time, who certified whom, and what expires when. The ending of the file says how: .svg is one picture, .html the same with a table
and a filter in one page that loads nothing, .dot the language of Graphviz. PREFIX is a namespace; without it every namespace is
drawn (admin socket).`,
		Example:           "  kmsctl map --out keys.html\n  kmsctl map REGISTRATION --out registration.svg",
		Args:              cobra.MaximumNArgs(1),
		ValidArgsFunction: a.completeKeys,
		RunE: func(c *cobra.Command, args []string) error {
			draw, known := map[string]func(*keymap.Map, *bytes.Buffer) error{
				".svg":  func(m *keymap.Map, b *bytes.Buffer) error { return m.SVG(b) },
				".html": func(m *keymap.Map, b *bytes.Buffer) error { return m.HTML(b) },
				".dot":  func(m *keymap.Map, b *bytes.Buffer) error { return m.DOT(b) },
			}[strings.ToLower(filepath.Ext(out.path))]
			if !known {
				return usagef("--out is a file that ends in .svg, .html or .dot, not %q", out.path)
			}
			prefix := ""
			if len(args) == 1 {
				prefix = args[0]
			}
			keys, err := a.mapKeys(c.Context(), prefix)
			if err != nil {
				return err
			}
			var picture bytes.Buffer
			if err := draw(keymap.New(title, time.Now(), keys), &picture); err != nil {
				return err
			}
			return a.writeResult(out, "map", map[string]any{"keys": len(keys)}, picture.Bytes(), false, modePublic)
		},
	}, proto.OpKeyList, proto.OpCertGet)
	c.Flags().StringVar(&title, "title", "Keys of this keystore", "title of the picture")
	out.register(c)
	c.MarkFlagRequired("out")
	return c
}

// mapKeys reads all keys whose names begin with prefix, and their certificates.
func (a *app) mapKeys(ctx context.Context, prefix string) ([]keymap.Key, error) {
	infos, err := a.listKeys(ctx, prefix, 0)
	if err != nil {
		return nil, err
	}
	p := a.progressOf("reading certificates", -1)
	defer p.end()
	keys := make([]keymap.Key, len(infos))
	parsed := make(map[string]*x509.Certificate) // by NAME@N
	for i := range infos {
		info := &infos[i]
		k := &keys[i]
		*k = keymap.Key{Name: info.Name, Algorithm: info.Algorithm, Protection: info.Protection, Origin: info.Origin, Usages: info.Usage}
		for j := range info.Versions {
			v := &info.Versions[j]
			version := keymap.Version{Number: v.Version, Current: v.Version == info.Current, State: v.State, Reason: v.Reason,
				Begins: wireTime(v.NotBefore), Expires: wireTime(v.Expires)}
			if keyspec.Algorithm(info.Algorithm).Asymmetric() && v.State != string(keyspec.Destroyed) {
				ref := fmt.Sprintf("%s@%d", info.Name, v.Version)
				certificate, err := a.leaf(ctx, ref)
				if err != nil {
					return nil, err
				}
				if certificate != nil {
					parsed[ref] = certificate
					version.Certificate = mapCertificate(certificate)
				}
			}
			k.Versions = append(k.Versions, version)
		}
	}
	linkIssuers(keys, parsed)
	return keys, nil
}

// leaf returns the certificate of a key version, or nil if it has none.
func (a *app) leaf(ctx context.Context, ref string) (*x509.Certificate, error) {
	var r proto.CertChain
	if err := a.call(ctx, proto.OpCertGet, &proto.KeyRef{Key: ref}, &r); err != nil || len(r.Chain) == 0 {
		return nil, err
	}
	return packet.ParseCertificate(r.Chain[0])
}

func mapCertificate(c *x509.Certificate) *keymap.Certificate {
	sum := sha256.Sum256(c.Raw)
	return &keymap.Certificate{Subject: c.Subject.String(), Issuer: c.Issuer.String(), Serial: c.SerialNumber.Text(16), SHA256: hex.EncodeToString(sum[:]),
		NotBefore: c.NotBefore, NotAfter: c.NotAfter}
}

// linkIssuers finds the keys that signed the certificates, by the name of the issuer and the identifier of its key. Certificates that MOSIP
// issued have no such identifier: there the signature decides.
func linkIssuers(keys []keymap.Key, parsed map[string]*x509.Certificate) {
	bySubject := make(map[string][]string)
	for ref, c := range parsed {
		if c.IsCA {
			bySubject[string(c.RawSubject)] = append(bySubject[string(c.RawSubject)], ref)
		}
	}
	for i := range keys {
		for j := range keys[i].Versions {
			v := &keys[i].Versions[j]
			c := parsed[fmt.Sprintf("%s@%d", keys[i].Name, v.Number)]
			if c == nil {
				continue
			}
			for _, ref := range bySubject[string(c.RawIssuer)] {
				issuer := parsed[ref]
				if len(c.AuthorityKeyId) > 0 && bytes.Equal(c.AuthorityKeyId, issuer.SubjectKeyId) ||
					len(c.AuthorityKeyId) == 0 && issuer.CheckSignature(c.SignatureAlgorithm, c.RawTBSCertificate, c.Signature) == nil {
					v.Certificate.IssuedBy = ref
				}
			}
		}
	}
}

// wireTime is a time of the wire, zero for one that is not set.
func wireTime(seconds int64) time.Time {
	if seconds <= 0 {
		return time.Time{}
	}
	return time.Unix(seconds, 0)
}
