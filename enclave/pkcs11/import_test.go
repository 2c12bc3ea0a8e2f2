package pkcs11_test

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"errors"

	"os/exec"
	"testing"

	"github.com/kmsd-project/kmsd/client/pkix"
	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/enclave/pkcs11/pkcs11test"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// tool runs pkcs11-tool of OpenSC on the token, as the program that made the keys.
func (h *softHSM) tool(t *testing.T, args ...string) {
	t.Helper()
	cmd := exec.Command("pkcs11-tool", append([]string{"--module", h.Module, "--token-label", pkcs11test.Label, "--login", "--pin", pkcs11test.PIN}, args...)...)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("pkcs11-tool %q: %v\n%s", args, err, out)
	}
}

func taken(a keyspec.Algorithm, usages ...keyspec.Usage) enclave.Spec {
	return enclave.Spec{Algorithm: a, Usages: usages, AAD: bound}
}

// TestImport takes over keys that another program has made, which go on being its own.
func TestImport(t *testing.T) {
	h := newSoftHSM(t)
	e := h.open(t, h.spec())
	const label = "5a1e0f04-7a3b-4d0f-9c51-1f2a40e1f0aa"
	module := []keyspec.Usage{keyspec.Sign, keyspec.Verify, keyspec.Certify, keyspec.Unwrap}
	for _, made := range [][]string{
		{"--keypairgen", "--key-type", "rsa:2048", "--label", label, "--id", "0102"},
		{"--keypairgen", "--key-type", "rsa:2048", "--label", "no id / and odd %"},
		{"--keypairgen", "--key-type", "EC:prime256v1", "--label", "curve", "--id", "03"},
		{"--keypairgen", "--key-type", "EC:secp256k1", "--label", "koblitz", "--id", "07"},
		{"--keypairgen", "--key-type", "rsa:2048", "--label", "twice", "--id", "04"},
		{"--keypairgen", "--key-type", "rsa:2048", "--label", "twice", "--id", "05"},
		{"--keypairgen", "--key-type", "rsa:2048", "--label", "other", "--id", "6a617661"}, // "java"
	} {
		h.tool(t, made...)
	}
	before := h.Objects(t)
	blobs := make(map[string]enclave.Blob)
	for uri, spec := range map[string]enclave.Spec{
		"pkcs11:object=" + label:                        taken(keyspec.RSA2048, module...),
		"pkcs11:object=no%20id%20%2F%20and%20odd%20%25": taken(keyspec.RSA2048, module...),
		"pkcs11:object=java":                            taken(keyspec.RSA2048, module...), // by its CKA_ID
		"pkcs11:object=curve":                           taken(keyspec.ECDSAP256, keyspec.Sign, keyspec.Verify),
		"pkcs11:object=koblitz":                         taken(keyspec.ECDSASecp256k1, keyspec.Sign, keyspec.Verify),
	} {
		blob, spki, err := e.Import(t.Context(), []byte(uri), nil, spec)
		if err != nil {
			t.Fatalf("%s: %v", uri, err)
		}
		k := key{algorithm: spec.Algorithm, blob: blob}
		if k.public, err = pkix.ParsePublicKey(spki); err != nil {
			t.Fatal(err)
		}
		scheme := keyspec.ECDSASHA256
		if public, ok := k.public.(*rsa.PublicKey); ok {
			scheme = keyspec.RSAPKCS1SHA256
			secret := []byte("thirty-two bytes of a random key")
			sealed, err := rsa.EncryptOAEP(sha256.New(), rand.Reader, public, secret, nil)
			if err != nil {
				t.Fatal(err)
			}
			if got, err := k.do(t.Context(), e, enclave.Op{Usage: keyspec.Unwrap, Scheme: keyspec.RSAOAEPSHA256, Input: sealed}); err != nil || string(got) != string(secret) {
				t.Errorf("%s: unwrap: %q, %v", uri, got, err)
			}
		}
		if err := k.use(t.Context(), e, keyspec.Sign, scheme); err != nil {
			t.Errorf("%s: %v", uri, err)
		}
		blobs[uri] = blob
	}
	// In another process of the driver the same blob finds the key again, and in another record it is of no use.
	again := h.open(t, h.spec())
	op := enclave.Op{Usage: keyspec.Sign, Scheme: keyspec.RSAPKCS1SHA256, Input: []byte("m"), Bound: bound}
	blob := blobs["pkcs11:object="+label]
	if _, err := again.Do(t.Context(), blob, op, nil); err != nil {
		t.Error(err)
	}
	op.Bound = []byte("another record")
	if _, err := again.Do(t.Context(), blob, op, nil); err == nil {
		t.Error("used for another record")
	}
	// What another program made stays, whatever becomes of the record here.
	for uri, blob := range blobs {
		if err := e.Destroy(t.Context(), blob); err != nil {
			t.Errorf("%s: %v", uri, err)
		}
	}
	if after := h.Objects(t); after != before {
		t.Errorf("%d objects became %d", before, after)
	}
	op.Bound = bound
	if _, err := e.Do(t.Context(), blob, op, nil); err != nil {
		t.Errorf("after it was let go: %v", err)
	}

	for uri, spec := range map[string]enclave.Spec{
		"pkcs11:object=nobody":            taken(keyspec.RSA2048, module...),
		"pkcs11:object=twice":             taken(keyspec.RSA2048, module...),
		"pkcs11:object=" + label + "?x=y": taken(keyspec.RSA2048, module...),
		"pkcs11:object=":                  taken(keyspec.RSA2048, module...),
		"pkcs11:token=x;object=" + label:  taken(keyspec.RSA2048, module...),
		label:                             taken(keyspec.RSA2048, module...),
		"pkcs11:object=curve#":            taken(keyspec.RSA2048, module...),
		"pkcs11:object=" + label + "%":    taken(keyspec.RSA2048, module...),
		"pkcs11:object=" + label + "%00":  taken(keyspec.RSA3072, module...),
		"pkcs11:object=other":             taken(keyspec.AES256GCM, keyspec.Encrypt, keyspec.Decrypt),
	} {
		if _, _, err := e.Import(t.Context(), []byte(uri), nil, spec); !errors.Is(err, enclave.ErrUnsupported) && !errors.Is(err, enclave.ErrMisconfigured) {
			t.Errorf("%s: %v", uri, err)
		}
	}
	if _, _, err := e.Import(t.Context(), []byte("pkcs11:object="+label), nil, taken(keyspec.RSA4096, module...)); !errors.Is(err, enclave.ErrUnsupported) {
		t.Errorf("of another size: %v", err)
	}
}
