//go:build linux

package client_test

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"testing"

	"github.com/kmsd-project/kmsd/client"
	"github.com/kmsd-project/kmsd/client/jose"
	"github.com/kmsd-project/kmsd/client/packet"
)

// addressed makes a payload with a salt that is addressed to a certificate, whatever that is for.
func addressed(t *testing.T, public *rsa.PublicKey, thumbprint, data, salt []byte) []byte {
	t.Helper()
	key := someBytes(32)
	wrapped, err := rsa.EncryptOAEP(sha256.New(), rand.Reader, public, key, nil)
	if err != nil {
		t.Fatal(err)
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		t.Fatal(err)
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		t.Fatal(err)
	}
	return slices.Concat(thumbprint, wrapped, []byte("#KEY_SPLITTER#"), aead.Seal(nil, salt, data, nil))
}

// TestRecipientsShare gives one certificate to two keys: what is encrypted to it is for both.
func TestRecipientsShare(t *testing.T) {
	c := dial(t, client.WithAdmin())
	private, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	l := newLocal(t, private, x509.KeyUsageKeyEncipherment)
	payload, err := packet.EncryptPayload(l.certificate, []byte("data"), packet.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"share1/x", "share2/x"} {
		if _, err := c.Import(t.Context(), client.KeySpec{Name: name, Algorithm: "rsa-2048", Usage: []string{"decrypt"}}, l.pkcs8); err != nil {
			t.Fatal(err)
		}
		if err := c.Attach(t.Context(), name, []*x509.Certificate{l.certificate}); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"share1/x", "share2/x"} {
		if got, err := c.DecryptPayload(t.Context(), name, payload, packet.Options{}); err != nil || string(got) != "data" {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
}

// TestRecipient asks for payloads with the wrong and the right key of a hierarchy.
func TestRecipient(t *testing.T) {
	d := newDaemon(t)
	defer d.stop(t)
	c, err := client.Dial(t.Context(), client.WithSocket(d.runtime), client.WithAdmin())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	modules := map[string]*client.CertifiedKey{}
	for _, name := range []string{"ROOT", "REGISTRATION", "RESIDENT"} {
		if modules[name], err = c.GenerateMaster(t.Context(), name, client.MasterKey{}); err != nil {
			t.Fatal(err)
		}
	}
	data, salt := []byte("data"), []byte("twelve bytes")
	for _, o := range []packet.Options{{}, {AAD: []byte("aad")}, {Salt: salt, AAD: []byte("aad")}} {
		payload, err := c.EncryptPayload(t.Context(), "REGISTRATION/1", data, o)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := c.DecryptPayload(t.Context(), "REGISTRATION/1", payload, o); err != nil || !bytes.Equal(got, data) {
			t.Errorf("%q, %v", got, err)
		}
		for _, other := range []string{"REGISTRATION/2", "REGISTRATION", "RESIDENT/1", "RESIDENT", "ROOT"} {
			if _, err := c.DecryptPayload(t.Context(), other, payload, o); !errors.Is(err, client.ErrOtherRecipient) {
				t.Errorf("as %s: %v", other, err)
			}
		}
		payload[len("VER_R2")+3] ^= 1 // in every layout part of the thumbprint
		if _, err := c.DecryptPayload(t.Context(), "REGISTRATION/1", payload, o); !errors.Is(err, client.ErrNotAvailable) {
			t.Errorf("to a certificate that is not there: %v", err)
		}
	}
	// To a module key: its base keys open it, and it does itself, but no other application.
	for _, name := range []string{"REGISTRATION"} {
		certificate := modules[name].Chain[0]
		public := certificate.PublicKey.(*rsa.PublicKey)
		sum := packet.Thumbprint(certificate)
		payload := addressed(t, public, sum[:], data, salt)
		for _, as := range []string{"REGISTRATION", "REGISTRATION/1", "REGISTRATION/never"} {
			if got, err := c.DecryptPayload(t.Context(), as, payload, packet.Options{Salt: salt}); err != nil || !bytes.Equal(got, data) {
				t.Errorf("to the module key, as %s: %q, %v", as, got, err)
			}
		}
		if _, err := c.DecryptPayload(t.Context(), "RESIDENT/1", payload, packet.Options{Salt: salt}); !errors.Is(err, client.ErrOtherRecipient) {
			t.Errorf("to the module key of another application: %v", err)
		}
		recipient, err := c.Recipient("REGISTRATION/1")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := packet.DecryptPayload(t.Context(), recipient.WithoutModule(), payload, packet.Options{Salt: salt}); !errors.Is(err, client.ErrOtherRecipient) {
			t.Errorf("to the module key, without it: %v", err)
		}
		// MOSIP 1.1.3: nobody is named.
		old := addressed(t, public, nil, data, salt)
		if got, err := c.DecryptPayload(t.Context(), "REGISTRATION/1", old, packet.Options{Salt: salt}); err != nil || !bytes.Equal(got, data) {
			t.Errorf("to nobody, for the module key: %q, %v", got, err)
		}
		if _, err := packet.DecryptPayload(t.Context(), recipient.WithoutModule(), old, packet.Options{Salt: salt}); !errors.Is(err, client.ErrDecryption) {
			t.Errorf("to nobody, without the module key: %v", err)
		}
	}
	// The oldest version first, and every other.
	var olds [][]byte
	for range 3 {
		k, err := c.CurrentCertificate(t.Context(), "REGISTRATION/1", client.Holder{})
		if err != nil {
			t.Fatal(err)
		}
		olds = append(olds, addressed(t, k.Chain[0].PublicKey.(*rsa.PublicKey), nil, fmt.Appendf(nil, "data %d", len(olds)), salt))
		if _, err := c.Rotate(t.Context(), "REGISTRATION/1"); err != nil {
			t.Fatal(err)
		}
	}
	for i, old := range olds {
		if got, err := c.DecryptPayload(t.Context(), "REGISTRATION/1", old, packet.Options{Salt: salt}); err != nil || string(got) != fmt.Sprint("data ", i) {
			t.Errorf("version %d: %q, %v", i+1, got, err)
		}
		if _, err := c.DecryptPayload(t.Context(), "RESIDENT/none", old, packet.Options{Salt: salt}); !errors.Is(err, client.ErrDecryption) && !errors.Is(err, client.ErrNotAvailable) {
			t.Errorf("version %d, as another: %v", i+1, err)
		}
	}
	// Packets, streamed, and tokens.
	var sealed, plain bytes.Buffer
	big := someBytes(1_000_000)
	if err := c.EncryptPacket(t.Context(), "REGISTRATION/1", &sealed, bytes.NewReader(big)); err != nil {
		t.Fatal(err)
	}
	if err := c.DecryptPacket(t.Context(), "REGISTRATION/1", &plain, bytes.NewReader(sealed.Bytes()), int64(sealed.Len())); err != nil || !bytes.Equal(plain.Bytes(), big) {
		t.Errorf("packet: %v", err)
	}
	if err := c.DecryptPacket(t.Context(), "RESIDENT/1", &plain, bytes.NewReader(sealed.Bytes()), int64(sealed.Len())); !errors.Is(err, client.ErrOtherRecipient) {
		t.Errorf("packet of another: %v", err)
	}
	if _, err := c.EncryptPayload(t.Context(), "REGISTRATION", data, packet.Options{}); !errors.Is(err, packet.ErrCertificate) {
		t.Errorf("encryption to a module key: %v", err)
	}
	if _, err := c.Recipient("no name!"); !errors.Is(err, client.ErrInvalid) {
		t.Errorf("no name: %v", err)
	}
}

// TestVerdict has tokens that are not to be believed, each for another reason.
func TestVerdict(t *testing.T) {
	c := dial(t)
	key := create(t, c, "ecdsa-p256")
	if _, err := c.SelfSign(t.Context(), key.Name(), client.Subject{DN: "CN=test"}, client.CertProfile{}); err != nil {
		t.Fatal(err)
	}
	token, err := c.SignJWS(t.Context(), key.Name(), []byte("payload"), client.SignToken{})
	if err != nil {
		t.Fatal(err)
	}
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	stranger := newLocal(t, private, 0) // with a certificate that no key of the keystore has
	foreign, err := jose.Sign(t.Context(), stranger, []byte("payload"), jose.SignOptions{Algorithm: jose.EdDSA, Chain: []*x509.Certificate{stranger.certificate}, Include: 1})
	if err != nil {
		t.Fatal(err)
	}
	bare, err := c.SignJWS(t.Context(), key.Name(), []byte("payload"), client.SignToken{NoCertificate: true})
	if err != nil {
		t.Fatal(err)
	}
	other := create(t, c, "ecdsa-p256")
	mine, err := c.Chain(t.Context(), key.Name())
	if err != nil {
		t.Fatal(err)
	}
	for what, test := range map[string]struct {
		token string
		o     client.VerifyToken
		valid bool
	}{
		"of this keystore":             {token, client.VerifyToken{}, true},
		"by name":                      {token, client.VerifyToken{Key: key.Name()}, true},
		"by name and version":          {token, client.VerifyToken{Key: key.Name() + "@1"}, true},
		"by certificate":               {token, client.VerifyToken{Certificate: mine[0]}, true},
		"of another key":               {token, client.VerifyToken{Key: other.Name()}, false},
		"of another certificate":       {token, client.VerifyToken{Certificate: stranger.certificate}, false},
		"of a stranger":                {foreign, client.VerifyToken{}, false},
		"of anybody":                   {foreign, client.VerifyToken{AnySigner: true}, true},
		"of a stranger, by key":        {foreign, client.VerifyToken{Key: key.Name()}, false},
		"changed":                      {token[:len(token)-6] + "AAAAAA", client.VerifyToken{}, false},
		"changed, of anybody":          {token[:len(token)-6] + "AAAAAA", client.VerifyToken{AnySigner: true}, false},
		"later":                        {token, client.VerifyToken{Time: mine[0].NotAfter.AddDate(0, 0, 1)}, false},
		"earlier":                      {token, client.VerifyToken{Time: mine[0].NotBefore.AddDate(0, 0, -1)}, false},
		"no certificate":               {bare, client.VerifyToken{}, false},
		"no certificate, of anybody":   {bare, client.VerifyToken{AnySigner: true}, false},
		"no certificate, by key":       {bare, client.VerifyToken{Key: key.Name()}, true},
		"no certificate, another key":  {bare, client.VerifyToken{Key: other.Name()}, false},
		"no certificate, by one given": {bare, client.VerifyToken{Certificate: mine[0]}, true},
	} {
		v, err := c.VerifyJWS(t.Context(), test.token, test.o)
		if err != nil {
			t.Errorf("%s: %v", what, err)
			continue
		}
		if v.Valid != test.valid || v.Reason == "" || (v.Payload != nil) != test.valid {
			t.Errorf("%s: valid %t, %q, payload %q", what, v.Valid, v.Reason, v.Payload)
		}
	}
	if v, err := (*client.Client)(nil).VerifyJWS(t.Context(), token, client.VerifyToken{Certificate: mine[0]}); err != nil || !v.Valid {
		t.Errorf("without the daemon: %v", err)
	}
	if _, err := c.VerifyJWS(t.Context(), token, client.VerifyToken{Key: "none/such"}); !errors.Is(err, client.ErrNotAvailable) {
		t.Errorf("a key that is not there: %v", err)
	}
	if _, err := c.VerifyJWS(t.Context(), "no token", client.VerifyToken{}); !errors.Is(err, jose.ErrFormat) {
		t.Errorf("no token: %v", err)
	}
	if _, err := c.SignJWS(t.Context(), other.Name(), []byte("x"), client.SignToken{}); !errors.Is(err, client.ErrNoCertificate) {
		t.Errorf("signed without a certificate: %v", err)
	}
	// The key is known to be stolen: what it has signed is not valid any more.
	if _, err := c.Revoke(t.Context(), key.Name(), "key-compromise"); err != nil {
		t.Fatal(err)
	}
	for _, o := range []client.VerifyToken{{}, {Key: key.Name()}} {
		if v, err := c.VerifyJWS(t.Context(), token, o); err != nil || v.Valid || !v.Compromised {
			t.Errorf("compromised: %+v, %v", v, err)
		}
	}
}
