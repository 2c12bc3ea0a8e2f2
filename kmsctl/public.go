package main

import (
	"context"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"

	"github.com/spf13/cobra"
	"golang.org/x/crypto/ssh"

	"github.com/kmsd-project/kmsd/client/pkix"
	"github.com/kmsd-project/kmsd/ipc/proto"
)

func newPublic(a *app) *cobra.Command {
	var format string
	var out outFlags
	c := uses(a.onKey(&cobra.Command{
		Use:   "public NAME[@N] [flags]",
		Short: "Write the public key",
		Long: `Write the public key. With --format fingerprints, write what kmsctl key find finds it by: SHA-256 of the public key
(SubjectPublicKeyInfo), the CKA_ID that PKCS#11 software knows it by, and the fingerprint of ssh-keygen -l.`,
		RunE: func(c *cobra.Command, args []string) error {
			r, err := a.public(c.Context(), args[0])
			if err != nil {
				return err
			}
			encoded := fingerprints(r)
			if format != "fingerprints" {
				encoded, err = encodePublic(r.SPKI, format, args[0])
			}
			if err != nil {
				return err
			}
			return a.writeResult(out, "public_key", map[string]any{"key": args[0], "version": r.Version, "algorithm": r.Algorithm, "format": format},
				encoded, format == "der", modePublic)
		},
	}), proto.OpPublic)
	c.Flags().StringVar(&format, "format", "pem", "pem, der, jwk, ssh or fingerprints")
	c.RegisterFlagCompletionFunc("format", cobra.FixedCompletions([]string{"pem", "der", "jwk", "ssh", "fingerprints"}, cobra.ShellCompDirectiveNoFileComp))
	out.register(c)
	return c
}

func (a *app) public(ctx context.Context, key string) (*proto.PublicReply, error) {
	var r proto.PublicReply
	if err := a.call(ctx, proto.OpPublic, &proto.KeyRef{Key: key}, &r); err != nil {
		return nil, err
	}
	return &r, nil
}

func encodePublic(spki []byte, format, comment string) ([]byte, error) {
	switch format {
	case "der":
		return spki, nil
	case "pem":
		return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: spki}), nil
	}
	key, err := pkix.ParsePublicKey(spki)
	if err != nil {
		return nil, fmt.Errorf("public key: %w", err)
	}
	switch format {
	case "jwk":
		return jwk(key)
	case "ssh":
		public, err := ssh.NewPublicKey(key)
		if err != nil {
			return nil, withHint(errors.New("SSH has no form for this kind of key"), "use --format pem, der or jwk")
		}
		line := ssh.MarshalAuthorizedKey(public)
		return append(line[:len(line)-1], (" " + comment + "\n")...), nil
	}
	return nil, usagef("--format is pem, der, jwk, ssh or fingerprints, not %q", format)
}

// jwk encodes a public key as in RFC 7518 section 6, RFC 8037 and RFC 8812.
func jwk(key any) ([]byte, error) {
	b64 := base64.RawURLEncoding.EncodeToString
	var fields map[string]string
	point := func(k *ecdsa.PublicKey) error {
		raw, err := pkix.Point(k) // 4 || x || y
		if err != nil {
			return err
		}
		n := (len(raw) - 1) / 2
		fields = map[string]string{"kty": "EC", "crv": k.Curve.Params().Name, "x": b64(raw[1 : 1+n]), "y": b64(raw[1+n:])}
		return nil
	}
	switch k := key.(type) {
	case *rsa.PublicKey:
		fields = map[string]string{"kty": "RSA", "n": b64(k.N.Bytes()), "e": b64(big.NewInt(int64(k.E)).Bytes())}
	case *ecdsa.PublicKey:
		if err := point(k); err != nil {
			return nil, err
		}
	case ed25519.PublicKey:
		fields = map[string]string{"kty": "OKP", "crv": "Ed25519", "x": b64(k)}
	case *ecdh.PublicKey:
		if k.Curve() != ecdh.X25519() {
			return nil, errors.New("this curve has no JWK form")
		}
		fields = map[string]string{"kty": "OKP", "crv": "X25519", "x": b64(k.Bytes())}
	default:
		return nil, fmt.Errorf("a key of type %T has no JWK form", key)
	}
	text, err := json.Marshal(fields) // sorted by name, as RFC 7638 wants it for thumbprints
	if err != nil {
		return nil, err
	}
	return append(text, '\n'), nil
}

// readPublic reads a public key or a certificate, PEM or DER, and returns the SubjectPublicKeyInfo.
func readPublic(encoded []byte) ([]byte, error) {
	der := encoded
	if block, _ := pem.Decode(encoded); block != nil {
		der = block.Bytes
	}
	if _, err := pkix.ParsePublicKey(der); err == nil {
		return der, nil
	}
	if cert, err := pkix.ParseCertificate(der); err == nil {
		return cert.RawSubjectPublicKeyInfo, nil
	}
	return nil, errors.New("this is neither a public key nor a certificate")
}
