package main

import (
	"encoding/pem"
	"os"
	"path/filepath"
	"testing"
)

// TestCertificatesOfMOSIPAreShown shows certificates that crypto/x509 alone does not read, made by another implementation.
func TestCertificatesOfMOSIPAreShown(t *testing.T) {
	for name, want := range map[string]string{"root.cert.pem": "RSA 2048", "secp256k1.cert.pem": "ECDSA secp256k1", "ec256.cert.pem": "ECDSA P-256", "ed25519.cert.pem": "Ed25519"} {
		text, err := os.ReadFile(filepath.Join("..", "client", "pkix", "testdata", name))
		if err != nil {
			t.Fatal(err)
		}
		block, _ := pem.Decode(text)
		v, err := viewCert(block.Bytes)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if v.PublicKey != want || len(v.SHA256) != 64 || v.Subject == "" {
			t.Errorf("%s: %+v", name, v)
		}
		if negative := name != "ec256.cert.pem"; negative != (v.Serial[0] == '-') {
			t.Errorf("%s: serial number %s", name, v.Serial)
		}
	}
}
