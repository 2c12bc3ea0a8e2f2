//go:build linux

package client_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/kmsd-project/kmsd/client"
	"github.com/kmsd-project/kmsd/client/cms"
	"github.com/kmsd-project/kmsd/client/jose"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// TestTokens signs and decrypts JSON web tokens with keys that are in the daemon.
func TestTokens(t *testing.T) {
	c := dial(t)
	const payload = `{"sub":"10001"}`
	for _, algorithm := range append(signers[:len(signers):len(signers)], keyspec.ECDSASecp256k1) {
		key := create(t, c, algorithm)
		for _, a := range []jose.Algorithm{jose.RS256, jose.RS512, jose.PS256, jose.PS384, jose.ES256, jose.ES384, jose.ES512, jose.ES256K, jose.EdDSA} {
			token, err := jose.Sign(t.Context(), key, []byte(payload), jose.SignOptions{Algorithm: a, KeyID: key.Name()})
			natural, naturalErr := jose.AlgorithmFor(key.Public())
			if naturalErr != nil {
				t.Fatal(naturalErr)
			}
			if err != nil {
				if a == natural {
					t.Errorf("%s does not sign %s: %v", algorithm, a, err)
				}
				continue
			}
			signed, err := jose.ParseSigned(token)
			if err != nil {
				t.Fatal(err)
			}
			got, err := signed.Verify(key.Public(), nil)
			switch {
			case err == nil && string(got) == payload:
			case a != natural && errors.Is(err, jose.ErrVerification): // the daemon signs with any hash, JWS ties it to the curve
			default:
				t.Errorf("%s by %s: %q, %v", a, algorithm, got, err)
			}
		}
		if _, err := key.SignJWS(t.Context(), "HS256", nil); !errors.Is(err, client.ErrUnsupported) {
			t.Errorf("HS256: %v", err)
		}
	}

	koblitz := create(t, c, keyspec.ECDSASecp256k1)
	if _, err := c.SelfSign(t.Context(), koblitz.Name(), client.Subject{DN: "CN=k256"}, client.CertProfile{}); err != nil {
		t.Fatal(err)
	}
	if _, err := koblitz.Certificate(t.Context()); !errors.Is(err, client.ErrUnsupported) {
		t.Errorf("TLS with secp256k1: %v", err)
	}
	content := strings.Repeat("content", 1000)
	signature, err := c.SignCMS(t.Context(), koblitz.Name(), strings.NewReader(content), cms.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if v, err := c.VerifyCMS(t.Context(), signature, strings.NewReader(content), client.VerifyToken{}); err != nil || !v.Valid || v.Key != koblitz.Name()+"@1" {
		t.Errorf("%+v, %v", v, err)
	}
	if v, err := c.VerifyCMS(t.Context(), signature, strings.NewReader(content[1:]), client.VerifyToken{}); err != nil || v.Valid {
		t.Errorf("other content: %+v, %v", v, err)
	}

	key := create(t, c, keyspec.RSA2048, "encrypt", "decrypt")
	ca := create(t, c, keyspec.RSA2048, "sign", "verify", "certify")
	if _, err := c.SelfSign(t.Context(), ca.Name(), client.Subject{DN: "CN=CA"}, client.CertProfile{CA: true}); err != nil {
		t.Fatal(err)
	}
	chain, err := c.Issue(t.Context(), ca.Name(), key.Name(), client.Subject{DN: "CN=base"}, client.CertProfile{PathLen: -1})
	if err != nil {
		t.Fatal(err)
	}
	token, err := jose.Encrypt(chain[0], []byte(payload), jose.EncryptOptions{})
	if err != nil {
		t.Fatal(err)
	}
	got, _, err := jose.Decrypt(t.Context(), key, token)
	if err != nil || string(got) != payload {
		t.Errorf("%q, %v", got, err)
	}
	other := create(t, c, keyspec.RSA2048, "encrypt", "decrypt")
	if _, _, err := jose.Decrypt(t.Context(), other, token); !errors.Is(err, client.ErrDecryption) {
		t.Errorf("with another key: %v", err)
	}
}
