//go:build linux

package client_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/tls"
	"fmt"
	"io"
	"log"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/kmsd-project/kmsd/client"
	"github.com/kmsd-project/kmsd/client/packet"
)

// TestExamples is here so that the examples, which say Dial without an option as a program would, find a daemon.
func TestExamples(t *testing.T) {
	t.Setenv("KMSD_SOCKET", sharedDaemon(t).runtime)
	for name, example := range map[string]struct {
		run  func()
		want string
	}{
		"Dial":                {ExampleDial, "ready\n"},
		"Key":                 {ExampleKey, "signature is right: true\n"},
		"Key_EncryptBytes":    {ExampleKey_EncryptBytes, "attack at dawn\n"},
		"Key_EncryptEnvelope": {ExampleKey_EncryptEnvelope, "a large file\n"},
		"Key_Unwrap":          {ExampleKey_Unwrap, "registration data\n"},
		"database key":        {Example_databaseKey, "the same key after a restart: true\n"},
		"CertificateSource":   {ExampleClient_CertificateSource, "serving CN=localhost\n"},
		"Key_SSHSigner":       {ExampleKey_SSHSigner, "ssh-ed25519\n"},
	} {
		t.Run(name, func(t *testing.T) {
			if got := output(t, example.run); got != example.want {
				t.Errorf("printed %q, want %q", got, example.want)
			}
		})
	}
}

func output(t *testing.T, f func()) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "output")
	file, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	stdout := os.Stdout
	os.Stdout = file
	defer func() { os.Stdout = stdout }()
	f()
	if err := file.Close(); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func ExampleDial() {
	ctx := context.Background()
	c, err := client.Dial(ctx, client.WithClientName("example 1.0"))
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	status, err := c.Status(ctx)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(status.State)
}

// A Key goes wherever a crypto.Signer does.
func ExampleKey() {
	ctx := context.Background()
	c, err := client.Dial(ctx)
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	key, err := c.Create(ctx, client.KeySpec{Name: "example/contracts", Algorithm: "ecdsa-p256"})
	if err != nil {
		log.Fatal(err)
	}
	digest := sha256.Sum256([]byte("a contract"))
	var signer crypto.Signer = key
	signature, err := signer.Sign(nil, digest[:], crypto.SHA256)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("signature is right:", ecdsa.VerifyASN1(key.Public().(*ecdsa.PublicKey), digest[:], signature))
}

func ExampleKey_EncryptBytes() {
	ctx := context.Background()
	c, err := client.Dial(ctx)
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	key, err := c.Create(ctx, client.KeySpec{Name: "example/notes", Algorithm: "aes-256-gcm"})
	if err != nil {
		log.Fatal(err)
	}
	// The additional data is not encrypted and not stored: whoever decrypts has to give it again. The name of the record
	// keeps ciphertexts from being swapped.
	sealed, err := key.EncryptBytes(ctx, []byte("attack at dawn"), []byte("note 17"))
	if err != nil {
		log.Fatal(err)
	}
	plaintext, err := key.DecryptBytes(ctx, sealed, []byte("note 17"))
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(string(plaintext))
}

func ExampleKey_EncryptEnvelope() {
	ctx := context.Background()
	c, err := client.Dial(ctx)
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	key, err := c.Create(ctx, client.KeySpec{Name: "example/files", Algorithm: "aes-256-gcm"})
	if err != nil {
		log.Fatal(err)
	}
	var sealed bytes.Buffer
	w, err := key.EncryptEnvelope(ctx, &sealed, nil)
	if err != nil {
		log.Fatal(err)
	}
	if _, err := io.WriteString(w, "a large file\n"); err != nil {
		log.Fatal(err)
	}
	if err := w.Close(); err != nil { // without it the file does not open
		log.Fatal(err)
	}
	r, err := key.DecryptStream(ctx, &sealed, nil)
	if err != nil {
		log.Fatal(err)
	}
	// A program that writes a file lets it appear only after this has returned without an error.
	var plaintext bytes.Buffer
	if _, err := io.Copy(&plaintext, r); err != nil {
		log.Fatal(err)
	}
	fmt.Print(plaintext.String())
}

// An application keeps the key of its database sealed beside the database. It asks kmsd for the key when it starts;
// whoever steals the disk has a sealed key and nothing to open it with.
func Example_databaseKey() {
	ctx := context.Background()
	directory, err := os.MkdirTemp("", "app")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(directory)
	sealedKeyFile := filepath.Join(directory, "database.key")

	// What the application does at every start.
	openDatabaseKey := func() ([]byte, error) {
		c, err := client.Dial(ctx)
		if err != nil {
			return nil, err
		}
		defer c.Close()
		key, err := c.Key(ctx, "example/database")
		if err != nil {
			return nil, err
		}
		sealed, err := os.ReadFile(sealedKeyFile)
		if os.IsNotExist(err) { // the first start
			plain, sealed, err := key.DataKey(ctx, 32, []byte("database.key"))
			if err != nil {
				return nil, err
			}
			return plain, os.WriteFile(sealedKeyFile, sealed, 0o600)
		}
		if err != nil {
			return nil, err
		}
		return key.DecryptBytes(ctx, sealed, []byte("database.key"))
	}

	// Once, by whoever installs the application: kmsctl key create example/database --alg aes-256-gcm
	c, err := client.Dial(ctx)
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Create(ctx, client.KeySpec{Name: "example/database", Algorithm: "aes-256-gcm"}); err != nil {
		log.Fatal(err)
	}

	first, err := openDatabaseKey()
	if err != nil {
		log.Fatal(err)
	}
	second, err := openDatabaseKey()
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("the same key after a restart:", bytes.Equal(first, second))
}

// A Key opens registration packets: kmsd unwraps the packet's key, the rest happens in this process.
func ExampleKey_Unwrap() {
	ctx := context.Background()
	c, err := client.Dial(ctx)
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	const name = "example/10001_110011"
	key, err := c.Create(ctx, client.KeySpec{Name: name, Algorithm: "rsa-2048", Usage: []string{"encrypt", "decrypt"}})
	if err != nil {
		log.Fatal(err)
	}
	if _, err := c.Create(ctx, client.KeySpec{Name: "example/packet-ca", Algorithm: "rsa-2048", Usage: []string{"sign", "verify", "certify"}}); err != nil {
		log.Fatal(err)
	}
	if _, err := c.SelfSign(ctx, "example/packet-ca", client.Subject{DN: "CN=Example CA"}, client.CertProfile{CA: true}); err != nil {
		log.Fatal(err)
	}
	chain, err := c.Issue(ctx, "example/packet-ca", name, client.Subject{DN: "CN=EXAMPLE-10001_110011"}, client.CertProfile{})
	if err != nil {
		log.Fatal(err)
	}

	// On the registration machine, which has the certificate.
	plaintext := []byte("registration data")
	sealed, err := packet.Encrypt(chain[0], bytes.NewReader(plaintext), int64(len(plaintext)))
	if err != nil {
		log.Fatal(err)
	}
	// Where the key is.
	opened, err := packet.Decrypt(ctx, key, sealed)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(string(opened))
}

func ExampleClient_CertificateSource() {
	ctx := context.Background()
	c, err := client.Dial(ctx)
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Create(ctx, client.KeySpec{Name: "example/web", Algorithm: "ecdsa-p256"}); err != nil {
		log.Fatal(err)
	}
	if _, err := c.SelfSign(ctx, "example/web", client.Subject{DN: "CN=localhost", DNS: []string{"localhost"}}, client.CertProfile{}); err != nil {
		log.Fatal(err)
	}
	source := c.CertificateSource("example/web", time.Minute)
	config := &tls.Config{GetCertificate: source.GetCertificate}

	certificate, err := config.GetCertificate(&tls.ClientHelloInfo{ServerName: "localhost"})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("serving", certificate.Leaf.Subject)
}

func ExampleKey_SSHSigner() {
	ctx := context.Background()
	c, err := client.Dial(ctx)
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	key, err := c.Create(ctx, client.KeySpec{Name: "example/ssh", Algorithm: "ed25519"})
	if err != nil {
		log.Fatal(err)
	}
	signer, err := key.SSHSigner()
	if err != nil {
		log.Fatal(err)
	}
	config := &ssh.ClientConfig{User: "me", Auth: []ssh.AuthMethod{ssh.PublicKeys(signer)}}
	_ = config
	fmt.Println(signer.PublicKey().Type())
}
