package main

import (
	"bytes"
	"cmp"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

func newKeyImport(a *app) *cobra.Command {
	var f newKeyFlags
	var in string
	c := uses(&cobra.Command{
		Use:   "import NAME --in F [flags]",
		Short: "Import a key",
		Long: `Import a private key (PKCS#8, PKCS#1 or SEC 1, PEM or DER) or the raw bytes of a symmetric key. The material travels
sealed to a one-time key of the daemon. The algorithm of a private key is read from it; --alg decides between ecdsa-* and
ecdh-*, and is needed for a symmetric key.

Delete the file afterwards: as long as it exists, the key is only as safe as the file.

With --protection tpm the file is one of OpenSSL's tpm2 provider (TSS2 PRIVATE KEY), without a password, whose key this TPM has made under its
ECC storage key: it stays in the TPM. --alg says what key it is. The file goes on working beside kmsd, around its policy and audit.`,
		Args: exactArgs("NAME"),
		RunE: func(c *cobra.Command, args []string) error {
			encoded, err := a.readFile(in, 64<<10)
			if err != nil {
				return err
			}
			material, algorithm, err := readMaterial(encoded, f.algorithm, f.protection)
			clear(encoded)
			if err != nil {
				return err
			}
			defer clear(material)
			f.algorithm = algorithm
			params, err := f.params(args[0])
			if err != nil {
				return err
			}
			daemon, err := a.dial(c.Context())
			if err != nil {
				return err
			}
			key, err := daemon.Import(c.Context(), params, material)
			if err != nil {
				return err
			}
			k := key.Info()
			return a.printKey(&k)
		},
	}, proto.OpKeyImportBegin, proto.OpKeyImport)
	f.register(c)
	c.Flags().StringVar(&in, "in", "", `file with the key, "-" is standard input`)
	c.MarkFlagRequired("in")
	return c
}

var errMaterial = errors.New("this is no private key that can be imported")

// readMaterial returns what key_import takes: PKCS#8 DER for a private key, the bytes themselves for a symmetric one and for a key
// file of a TPM, together with the algorithm.
func readMaterial(encoded []byte, algorithm, protection string) ([]byte, string, error) {
	der := encoded
	isPEM := bytes.HasPrefix(bytes.TrimSpace(encoded), []byte("-----BEGIN "))
	for rest := encoded; isPEM; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			return nil, "", errMaterial
		}
		switch block.Type {
		case "ENCRYPTED PRIVATE KEY":
			return nil, "", withHint(errors.New("the key is encrypted with a passphrase"), "openssl pkcs8 -in F -outform DER | kmsctl key import NAME --in -")
		case "TSS2 PRIVATE KEY":
			switch {
			case protection != string(keyspec.TPM):
				return nil, "", withHint(errors.New("the key is in a TPM"), "--protection tpm takes it over there")
			case algorithm == "":
				return nil, "", withHint(usagef("--alg is missing"), "openssl pkey -provider tpm2 -in F -pubout says what key it is")
			}
			return bytes.Clone(encoded), algorithm, nil
		case "EC PARAMETERS":
			continue // openssl ecparam writes them before the key
		}
		der = block.Bytes
		break
	}
	if protection != "" && protection != string(keyspec.Software) {
		return nil, "", withHint(errors.New("a key that exists outside of a device cannot be brought there"), "kmsctl key create NAME --protection %s makes one", protection)
	}
	if !isPEM && !keyspec.Algorithm(algorithm).Asymmetric() && algorithm != "" {
		return bytes.Clone(encoded), algorithm, nil
	}
	if pkcs8 := secp256k1PKCS8(der); pkcs8 != nil {
		return pkcs8, cmp.Or(algorithm, string(keyspec.ECDSASecp256k1)), nil
	}
	key, err := parsePrivate(der)
	if err != nil {
		if !isPEM && algorithm == "" {
			return nil, "", withHint(errMaterial, "for a symmetric key give --alg")
		}
		return nil, "", err
	}
	found, err := algorithmOf(key)
	if err != nil {
		return nil, "", err
	}
	if algorithm == "" {
		algorithm = found
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, "", errMaterial
	}
	return pkcs8, algorithm, nil
}

// parsePrivate reads PKCS#8, PKCS#1 or SEC 1. Parse errors are not passed on: they could quote what they read.
func parsePrivate(der []byte) (any, error) {
	if key, err := x509.ParsePKCS8PrivateKey(der); err == nil {
		return key, nil
	}
	if key, err := x509.ParsePKCS1PrivateKey(der); err == nil {
		return key, nil
	}
	if key, err := x509.ParseECPrivateKey(der); err == nil {
		return key, nil
	}
	return nil, errMaterial
}

func algorithmOf(key any) (string, error) {
	switch k := key.(type) {
	case *rsa.PrivateKey:
		switch k.N.BitLen() {
		case 2048, 3072, 4096:
			return fmt.Sprintf("rsa-%d", k.N.BitLen()), nil
		}
		return "", fmt.Errorf("an RSA key of %d bits cannot be imported: 2048, 3072 and 4096 can", k.N.BitLen())
	case *ecdsa.PrivateKey:
		switch k.Curve.Params().BitSize {
		case 256:
			return string(keyspec.ECDSAP256), nil
		case 384:
			return string(keyspec.ECDSAP384), nil
		case 521:
			return string(keyspec.ECDSAP521), nil
		}
	case ed25519.PrivateKey:
		return string(keyspec.Ed25519), nil
	case *ecdh.PrivateKey:
		if k.Curve() == ecdh.X25519() {
			return string(keyspec.X25519), nil
		}
	}
	return "", errMaterial
}
