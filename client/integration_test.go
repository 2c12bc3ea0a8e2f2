//go:build linux

package client_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/kmsd-project/kmsd/client"
	"github.com/kmsd-project/kmsd/client/packet"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/programs"
)

// The tests of this file run against a real daemon, which they build.

var binaries = programs.New("kmsd", "enclave/keyring/kmsd-keyring")

func TestMain(m *testing.M) {
	code := m.Run()
	if shared.daemon != nil {
		shared.daemon.kill()
	}
	binaries.Remove()
	os.Exit(code)
}

// daemon is a kmsd with a keystore of its own.
type daemon struct {
	bin, state, runtime string
	cmd                 *exec.Cmd
	log                 bytes.Buffer
}

func newDaemon(t testing.TB) *daemon {
	t.Helper()
	dir, err := os.MkdirTemp(binaries.Dir(t), "d")
	if err != nil {
		t.Fatal(err)
	}
	d := &daemon{bin: binaries.Dir(t), state: filepath.Join(dir, "state"), runtime: filepath.Join(dir, "run")}
	init := exec.Command(filepath.Join(d.bin, "kmsd"), "init", "--state-dir", d.state, "--no-recovery", "--enclave", "keyring:file")
	init.Env = append(os.Environ(), "XDG_RUNTIME_DIR="+dir)
	if out, err := init.CombinedOutput(); err != nil {
		t.Fatalf("kmsd init: %v\n%s", err, out)
	}
	d.start(t)
	return d
}

func (d *daemon) start(t testing.TB) {
	t.Helper()
	d.cmd = exec.Command(filepath.Join(d.bin, "kmsd"), "run", "--state-dir", d.state, "--runtime-dir", d.runtime)
	d.log.Reset()
	d.cmd.Stderr = &d.log
	if err := d.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		c, err := client.Dial(context.Background(), client.WithSocket(d.runtime))
		if err != nil {
			continue
		}
		status, err := c.Status(context.Background())
		c.Close()
		if err == nil && status.State == "ready" {
			return
		}
	}
	d.kill()
	t.Fatalf("kmsd does not get ready:\n%s", d.log.String())
}

// stop ends the daemon in an orderly way.
func (d *daemon) stop(t testing.TB) {
	t.Helper()
	if err := d.cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if err := d.cmd.Wait(); err != nil {
		t.Errorf("kmsd: %v\n%s", err, d.log.String())
	}
}

func (d *daemon) kill() {
	_ = d.cmd.Process.Kill()
	_ = d.cmd.Wait()
}

// shared is the daemon of the tests that do not stop it.
var shared struct {
	once   sync.Once
	daemon *daemon
}

func sharedDaemon(t testing.TB) *daemon {
	t.Helper()
	shared.once.Do(func() { shared.daemon = newDaemon(t) })
	if shared.daemon == nil {
		t.Fatal("there is no daemon")
	}
	return shared.daemon
}

func dial(t testing.TB, opts ...client.Option) *client.Client {
	t.Helper()
	c, err := client.Dial(context.Background(), append([]client.Option{client.WithSocket(sharedDaemon(t).runtime)}, opts...)...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

var names atomic.Int64

// create makes a key with a name of its own.
func create(t testing.TB, c *client.Client, algorithm keyspec.Algorithm, usage ...string) *client.Key {
	t.Helper()
	spec := client.KeySpec{Name: fmt.Sprintf("test/%d", names.Add(1)), Algorithm: string(algorithm), Usage: usage}
	key, err := c.Create(t.Context(), spec)
	if err != nil {
		t.Fatalf("create %s: %v", algorithm, err)
	}
	return key
}

var signers = []keyspec.Algorithm{keyspec.RSA2048, keyspec.ECDSAP256, keyspec.ECDSAP384, keyspec.ECDSAP521, keyspec.Ed25519}

func TestX509(t *testing.T) {
	c := dial(t)
	for _, algorithm := range signers {
		t.Run(string(algorithm), func(t *testing.T) {
			key := create(t, c, algorithm)
			template := &x509.Certificate{
				SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"},
				NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
				IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
			}
			der, err := x509.CreateCertificate(nil, template, template, key.Public(), key)
			if err != nil {
				t.Fatal(err)
			}
			certificate, err := x509.ParseCertificate(der)
			if err != nil {
				t.Fatal(err)
			}
			if err := certificate.CheckSignatureFrom(certificate); err != nil {
				t.Error(err)
			}
			der, err = x509.CreateCertificateRequest(nil, &x509.CertificateRequest{Subject: template.Subject}, key)
			if err != nil {
				t.Fatal(err)
			}
			request, err := x509.ParseCertificateRequest(der)
			if err != nil || request.CheckSignature() != nil {
				t.Error(err)
			}
		})
	}
}

func TestSignatures(t *testing.T) {
	c := dial(t)
	message := []byte("message")
	digest := sha256.Sum256(message)
	large := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)

	rsaKey := create(t, c, keyspec.RSA2048)
	public := rsaKey.Public().(*rsa.PublicKey)
	pss, err := rsaKey.Sign(nil, digest[:], &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: crypto.SHA256})
	if err != nil || rsa.VerifyPSS(public, crypto.SHA256, digest[:], pss, nil) != nil {
		t.Errorf("PSS: %v", err)
	}
	pkcs1, err := rsaKey.SignMessage(nil, message, crypto.SHA256)
	if err != nil || rsa.VerifyPKCS1v15(public, crypto.SHA256, digest[:], pkcs1) != nil {
		t.Errorf("PKCS #1 v1.5: %v", err)
	}
	if _, err := rsaKey.Sign(nil, digest[:], &rsa.PSSOptions{SaltLength: 11, Hash: crypto.SHA256}); !errors.Is(err, client.ErrUnsupported) {
		t.Errorf("salt of 11 bytes: %v", err)
	}
	if _, err := rsaKey.Sign(nil, digest[:20], crypto.SHA1); !errors.Is(err, client.ErrUnsupported) {
		t.Errorf("SHA-1: %v", err)
	}
	if _, err := rsaKey.Sign(nil, digest[:20], crypto.SHA256); !errors.Is(err, client.ErrInvalid) {
		t.Errorf("short digest: %v", err)
	}

	edKey := create(t, c, keyspec.Ed25519)
	signature, err := edKey.Sign(nil, message, crypto.Hash(0))
	if err != nil || !ed25519.Verify(edKey.Public().(ed25519.PublicKey), message, signature) {
		t.Errorf("Ed25519: %v", err)
	}
	if _, err := edKey.Sign(nil, digest[:], crypto.SHA256); !errors.Is(err, client.ErrUnsupported) {
		t.Errorf("Ed25519 of a digest: %v", err)
	}
	whole, err := edKey.SignReader(t.Context(), bytes.NewReader(large), "")
	if err != nil {
		t.Errorf("Ed25519 of 1 MiB: %v", err)
	} else if _, err := edKey.VerifyReader(t.Context(), bytes.NewReader(large), whole, ""); err != nil {
		t.Errorf("Ed25519 of 1 MiB, verified: %v", err)
	}
	if _, err := edKey.SignReader(t.Context(), bytes.NewReader(append(large, 1)), ""); !errors.Is(err, client.ErrTooLarge) || !strings.Contains(err.Error(), "digest") {
		t.Errorf("Ed25519 of 1 MiB: %v", err)
	}

	ecKey := create(t, c, keyspec.ECDSAP256)
	for _, key := range []*client.Key{rsaKey, ecKey} {
		signature, err := key.SignReader(t.Context(), bytes.NewReader(large), "")
		if err != nil {
			t.Fatal(err)
		}
		if compromised, err := key.VerifyReader(t.Context(), bytes.NewReader(large), signature, ""); err != nil || compromised {
			t.Errorf("verify: %v, %v", compromised, err)
		}
		if _, err := key.VerifyReader(t.Context(), bytes.NewReader(large[1:]), signature, ""); !errors.Is(err, client.ErrVerification) {
			t.Errorf("verify another message: %v", err)
		}
	}
	if _, err := create(t, c, keyspec.AES256GCM).Sign(nil, digest[:], crypto.SHA256); !errors.Is(err, client.ErrUnsupported) {
		t.Errorf("sign with AES: %v", err)
	}
}

// chain makes a CA and a certificate that it issued for a key of the algorithm, all in kmsd.
func chain(t testing.TB, c *client.Client, algorithm keyspec.Algorithm) (*client.Key, *x509.CertPool) {
	t.Helper()
	ca := create(t, c, keyspec.ECDSAP256, "sign", "verify", "certify")
	root, err := c.SelfSign(t.Context(), ca.Name(), client.Subject{DN: "CN=Test CA"}, client.CertProfile{CA: true, PathLen: -1})
	if err != nil {
		t.Fatal(err)
	}
	key := create(t, c, algorithm)
	issued, err := c.Issue(t.Context(), ca.Name(), key.Name(),
		client.Subject{DN: "CN=localhost", DNS: []string{"localhost"}, IP: []string{"127.0.0.1"}},
		client.CertProfile{PathLen: -1, ExtKeyUse: []string{"server-auth", "client-auth"}})
	if err != nil {
		t.Fatal(err)
	}
	if len(issued) != 2 {
		t.Errorf("chain of %d", len(issued))
	}
	pool := x509.NewCertPool()
	pool.AddCert(root[0])
	return key, pool
}

func TestTLS(t *testing.T) {
	c := dial(t)
	for _, algorithm := range []keyspec.Algorithm{keyspec.RSA2048, keyspec.ECDSAP256, keyspec.Ed25519} {
		t.Run(string(algorithm), func(t *testing.T) {
			serverKey, serverRoots := chain(t, c, algorithm)
			clientKey, clientRoots := chain(t, c, algorithm)
			server, err := serverKey.Certificate(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			user, err := clientKey.Certificate(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			for _, version := range []uint16{tls.VersionTLS13, tls.VersionTLS12} {
				a, b := net.Pipe()
				ours := tls.Server(a, &tls.Config{
					Certificates: []tls.Certificate{server}, ClientCAs: clientRoots, ClientAuth: tls.RequireAndVerifyClientCert,
					MinVersion: version, MaxVersion: version,
				})
				theirs := tls.Client(b, &tls.Config{
					Certificates: []tls.Certificate{user}, RootCAs: serverRoots, ServerName: "localhost",
					MinVersion: version, MaxVersion: version,
				})
				done := make(chan error, 1)
				go func() {
					_, err := io.Copy(ours, io.LimitReader(ours, 5))
					done <- err
				}()
				if _, err := theirs.Write([]byte("hello")); err != nil {
					t.Fatalf("%s: %v; server: %v", tls.VersionName(version), err, <-done)
				}
				echo := make([]byte, 5)
				if _, err := io.ReadFull(theirs, echo); err != nil || string(echo) != "hello" {
					t.Errorf("%q, %v", echo, err)
				}
				if err := <-done; err != nil {
					t.Error(err)
				}
				a.Close()
				b.Close()
			}
		})
	}
}

// TestHTTPAcrossRestart serves HTTPS with client certificates while the daemon is restarted: no handshake fails.
func TestHTTPAcrossRestart(t *testing.T) {
	d := newDaemon(t)
	defer func() { d.kill() }()
	c, err := client.Dial(t.Context(), client.WithSocket(d.runtime), client.WithReconnect(20*time.Second))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	serverKey, roots := chain(t, c, keyspec.ECDSAP256)
	clientKey, clientRoots := chain(t, c, keyspec.ECDSAP256)
	serverSource := c.CertificateSource(serverKey.Name(), time.Millisecond)
	clientSource := c.CertificateSource(clientKey.Name(), time.Millisecond)

	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, r.TLS.PeerCertificates[0].Subject.CommonName)
	}), TLSConfig: &tls.Config{GetCertificate: serverSource.GetCertificate, ClientCAs: clientRoots, ClientAuth: tls.RequireAndVerifyClientCert}}
	go server.ServeTLS(listener, "", "")
	defer server.Close()
	url := "https://" + listener.Addr().String()

	get := func() error {
		transport := &http.Transport{
			TLSClientConfig:   &tls.Config{RootCAs: roots, GetClientCertificate: clientSource.GetClientCertificate},
			DisableKeepAlives: true, // a handshake for every request
		}
		defer transport.CloseIdleConnections()
		response, err := (&http.Client{Transport: transport}).Get(url)
		if err != nil {
			return err
		}
		defer response.Body.Close()
		body, err := io.ReadAll(response.Body)
		if err == nil && string(body) != "localhost" {
			err = fmt.Errorf("body %q", body)
		}
		return err
	}
	var wg sync.WaitGroup
	stop := make(chan struct{})
	var requests atomic.Int64
	for range 4 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if err := get(); err != nil {
					t.Error(err)
					return
				}
				requests.Add(1)
			}
		})
	}
	for range 2 {
		time.Sleep(100 * time.Millisecond)
		d.stop(t)
		d.start(t)
	}
	before := requests.Load()
	for deadline := time.Now().Add(20 * time.Second); requests.Load() < before+20 && time.Now().Before(deadline); {
		time.Sleep(10 * time.Millisecond)
	}
	close(stop)
	wg.Wait()
	if requests.Load() < before+20 {
		t.Errorf("%d requests before the last restart, %d after", before, requests.Load()-before)
	}
}

func TestCertificateSource(t *testing.T) {
	c := dial(t)
	key, _ := chain(t, c, keyspec.ECDSAP256)
	source := c.CertificateSource(key.Name(), 0)
	before, err := source.GetCertificate(&tls.ClientHelloInfo{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Rotate(t.Context(), key.Name()); err != nil {
		t.Fatal(err)
	}
	if _, err := c.SelfSign(t.Context(), key.Name(), client.Subject{DN: "CN=new"}, client.CertProfile{PathLen: -1}); err != nil {
		t.Fatal(err)
	}
	after, err := source.GetCertificate(&tls.ClientHelloInfo{})
	if err != nil {
		t.Fatal(err)
	}
	if after.Leaf.Equal(before.Leaf) || after.Leaf.Subject.CommonName != "new" {
		t.Errorf("the certificate is still %v", after.Leaf.Subject)
	}
	if _, err := create(t, c, keyspec.Ed25519).Certificate(t.Context()); err == nil {
		t.Error("a key without a certificate has one")
	}
}

func TestSSH(t *testing.T) {
	c := dial(t)
	for _, algorithm := range signers {
		t.Run(string(algorithm), func(t *testing.T) {
			host, err := create(t, c, algorithm).SSHSigner()
			if err != nil {
				t.Fatal(err)
			}
			user, err := create(t, c, algorithm).SSHSigner()
			if err != nil {
				t.Fatal(err)
			}
			if algorithm == keyspec.RSA2048 {
				plain, err := user.Sign(rand.Reader, []byte("x"))
				if err != nil || plain.Format != ssh.KeyAlgoRSASHA256 {
					t.Errorf("Sign gives %v, %v", plain, err)
				}
				if _, err := user.SignWithAlgorithm(rand.Reader, []byte("x"), ssh.KeyAlgoRSA); err == nil {
					t.Error("signs with SHA-1")
				}
			}
			serverConfig := &ssh.ServerConfig{PublicKeyCallback: func(_ ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) {
				if !bytes.Equal(key.Marshal(), user.PublicKey().Marshal()) {
					return nil, errors.New("another key")
				}
				return nil, nil
			}}
			serverConfig.AddHostKey(host)
			listener, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer listener.Close()
			done := make(chan error, 1)
			go func() {
				nc, err := listener.Accept()
				if err != nil {
					done <- err
					return
				}
				conn, channels, requests, err := ssh.NewServerConn(nc, serverConfig)
				if err == nil {
					go ssh.DiscardRequests(requests)
					go func() {
						for channel := range channels {
							_ = channel.Reject(ssh.Prohibited, "")
						}
					}()
					_ = conn.Wait()
				}
				done <- err
			}()
			conn, err := ssh.Dial("tcp", listener.Addr().String(), &ssh.ClientConfig{
				User: "test", Auth: []ssh.AuthMethod{ssh.PublicKeys(user)}, HostKeyCallback: ssh.FixedHostKey(host.PublicKey()),
			})
			if err != nil {
				t.Fatal(err)
			}
			conn.Close()
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
	}
	if _, err := create(t, c, keyspec.X25519).SSHSigner(); err == nil {
		t.Error("an X25519 key signs for ssh")
	}
}

func TestEncryption(t *testing.T) {
	c := dial(t)
	ctx := t.Context()
	for _, algorithm := range []keyspec.Algorithm{keyspec.AES128GCM, keyspec.AES256GCM, keyspec.ChaCha20Poly1305} {
		key := create(t, c, algorithm)
		ciphertexts := make(map[string][]byte)
		aad := []byte("aad")
		for _, n := range []int{0, 1, 60 << 10, 3<<20 + 1} {
			plaintext := bytes.Repeat([]byte("0123456789abcdef"), n/16+1)[:n]
			var err error
			if ciphertexts["bytes"], err = key.EncryptBytes(ctx, plaintext, aad); err != nil {
				t.Fatal(err)
			}
			for name, begin := range map[string]func(context.Context, io.Writer, []byte) (io.WriteCloser, error){
				"stream": key.EncryptStream, "envelope": key.EncryptEnvelope,
			} {
				var b bytes.Buffer
				w, err := begin(ctx, &b, aad)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := w.Write(plaintext); err != nil {
					t.Fatal(err)
				}
				if err := w.Close(); err != nil {
					t.Fatal(err)
				}
				ciphertexts[name] = b.Bytes()
			}
			for name, sealed := range ciphertexts {
				if got, err := key.DecryptBytes(ctx, sealed, aad); err != nil || !bytes.Equal(got, plaintext) {
					t.Errorf("%s, %s of %d bytes: %v", algorithm, name, n, err)
				}
				if _, err := key.DecryptBytes(ctx, sealed, nil); !errors.Is(err, client.ErrDecryption) {
					t.Errorf("%s, %s of %d bytes with another aad: %v", algorithm, name, n, err)
				}
				if _, err := key.DecryptBytes(ctx, sealed[:len(sealed)-1], aad); !errors.Is(err, client.ErrDecryption) {
					t.Errorf("%s, %s of %d bytes cut: %v", algorithm, name, n, err)
				}
			}
		}
		// What the old version sealed is moved to the new one, and opens before and after.
		if _, err := c.Rotate(ctx, key.Name()); err != nil {
			t.Fatal(err)
		}
		for name, sealed := range ciphertexts {
			again, err := key.Rewrap(ctx, sealed, aad)
			if err != nil {
				t.Fatal(name, err)
			}
			old, err := key.DecryptBytes(ctx, sealed, aad)
			if err != nil {
				t.Errorf("%s: the old ciphertext: %v", name, err)
			}
			if got, err := key.DecryptBytes(ctx, again, aad); err != nil || !bytes.Equal(got, old) {
				t.Errorf("%s: rewrapped: %v", name, err)
			}
		}
		plain, sealed, err := key.DataKey(ctx, 64, aad)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := key.DecryptBytes(ctx, sealed, aad); err != nil || !bytes.Equal(got, plain) {
			t.Errorf("data key: %v", err)
		}
	}
}

func TestMAC(t *testing.T) {
	c := dial(t)
	for _, algorithm := range []keyspec.Algorithm{keyspec.HMACSHA256, keyspec.HMACSHA384, keyspec.HMACSHA512} {
		key := create(t, c, algorithm)
		for _, n := range []int{0, 100, 3 << 20} {
			data := make([]byte, n)
			mac, err := key.MAC(t.Context(), data)
			if err != nil {
				t.Fatal(err)
			}
			streamed, err := key.MACReader(t.Context(), bytes.NewReader(data))
			if err != nil || !bytes.Equal(mac, streamed) {
				t.Errorf("%s of %d bytes: %x as a stream is %x, %v", algorithm, n, mac, streamed, err)
			}
			if err := key.VerifyMAC(t.Context(), data, mac); err != nil {
				t.Errorf("%s of %d bytes: %v", algorithm, n, err)
			}
			mac[0] ^= 1
			if err := key.VerifyMAC(t.Context(), data, mac); !errors.Is(err, client.ErrVerification) {
				t.Errorf("%s of %d bytes, changed: %v", algorithm, n, err)
			}
			if err := key.VerifyMACReader(t.Context(), bytes.NewReader(data), mac); !errors.Is(err, client.ErrVerification) {
				t.Errorf("%s of %d bytes, changed, as a stream: %v", algorithm, n, err)
			}
		}
	}
}

func TestAgree(t *testing.T) {
	c := dial(t)
	for _, algorithm := range []keyspec.Algorithm{keyspec.X25519, keyspec.ECDHP256, keyspec.ECDHP384, keyspec.ECDHP521} {
		a, b := create(t, c, algorithm), create(t, c, algorithm)
		agreement := func(name string) client.Agreement {
			return client.Agreement{Info: []byte("test"), New: client.KeySpec{Name: "test/" + name + "-" + string(algorithm), Algorithm: "aes-256-gcm"}}
		}
		ours, err := a.Agree(t.Context(), b.Public(), agreement("ours"))
		if err != nil {
			t.Fatal(err)
		}
		theirs, err := b.Agree(t.Context(), a.Public(), agreement("theirs"))
		if err != nil {
			t.Fatal(err)
		}
		sealed, err := ours.EncryptBytes(t.Context(), []byte("secret"), nil)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := theirs.DecryptBytes(t.Context(), sealed, nil); err != nil || string(got) != "secret" {
			t.Errorf("%s: %q, %v", algorithm, got, err)
		}
		if _, ok := a.Public().(*ecdh.PublicKey); !ok {
			t.Errorf("%s: public key is %T", algorithm, a.Public())
		}
	}
}

func TestImport(t *testing.T) {
	c := dial(t)
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	spec := client.KeySpec{Name: "test/imported", Algorithm: "ecdsa-p256"}
	key, err := c.Import(t.Context(), spec, der)
	if err != nil {
		t.Fatal(err)
	}
	if !private.PublicKey.Equal(key.Public()) {
		t.Error("another public key")
	}
	if key.Info().Origin != "imported" {
		t.Errorf("origin %s", key.Info().Origin)
	}
	if _, err := c.Import(t.Context(), spec, der); !errors.Is(err, client.ErrExists) {
		t.Errorf("import again: %v", err)
	}
}

func TestWrap(t *testing.T) {
	c := dial(t)
	wrapping := create(t, c, keyspec.AES256GCM, "wrap", "unwrap")
	target, err := c.Create(t.Context(), client.KeySpec{Name: "test/exportable", Algorithm: "hmac-sha256", Exportable: true})
	if err != nil {
		t.Fatal(err)
	}
	wrapped, err := wrapping.WrapKey(t.Context(), target.Name())
	if err != nil {
		t.Fatal(err)
	}
	again, err := wrapping.UnwrapKey(t.Context(), wrapped, client.KeySpec{Name: "test/unwrapped", Algorithm: "hmac-sha256"})
	if err != nil {
		t.Fatal(err)
	}
	mac, err := target.MAC(t.Context(), []byte("x"))
	if err != nil {
		t.Fatal(err)
	}
	if err := again.VerifyMAC(t.Context(), []byte("x"), mac); err != nil {
		t.Error(err)
	}
	derived, err := create(t, c, keyspec.HKDFSHA256).Derive(t.Context(), nil, []byte("info"), client.KeySpec{Name: "test/derived", Algorithm: "aes-256-gcm"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := derived.EncryptBytes(t.Context(), []byte("x"), nil); err != nil {
		t.Error(err)
	}
}

func TestLifecycle(t *testing.T) {
	c := dial(t)
	ctx := t.Context()
	key := create(t, c, keyspec.ECDSAP256)
	digest := sha256.Sum256([]byte("x"))
	old, err := key.Sign(nil, digest[:], crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := c.Rotate(ctx, key.Name()); err != nil || info.Current != 2 {
		t.Fatalf("%+v, %v", info, err)
	}
	if _, err := key.Sign(nil, digest[:], crypto.SHA256); !errors.Is(err, client.ErrState) {
		t.Errorf("the old version signs: %v", err)
	}
	if _, err := key.VerifyReader(ctx, strings.NewReader("x"), old, ""); err != nil {
		t.Errorf("the old signature: %v", err)
	}
	fresh, err := c.Key(ctx, key.Name())
	if err != nil || fresh.Version() != 2 {
		t.Fatalf("%v", err)
	}
	first, err := c.Key(ctx, key.Name()+"@1")
	if err != nil || first.Version() != 1 || !first.Public().(*ecdsa.PublicKey).Equal(key.Public()) {
		t.Errorf("version 1: %v", err)
	}
	if _, err := c.Suspend(ctx, key.Name()); err != nil {
		t.Fatal(err)
	}
	if _, err := fresh.Sign(nil, digest[:], crypto.SHA256); !errors.Is(err, client.ErrState) {
		t.Errorf("suspended: %v", err)
	}
	if _, err := c.Resume(ctx, key.Name()); err != nil {
		t.Fatal(err)
	}
	if _, err := fresh.Sign(nil, digest[:], crypto.SHA256); err != nil {
		t.Errorf("resumed: %v", err)
	}
	if info, err := c.SetLabels(ctx, key.Name(), map[string]string{"team": "a"}); err != nil || info.Labels["team"] != "a" {
		t.Errorf("%+v, %v", info, err)
	}
	if _, err := c.Destroy(ctx, key.Name(), time.Hour); err != nil {
		t.Fatal(err)
	}
	if _, err := c.CancelDestruction(ctx, key.Name()); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Revoke(ctx, key.Name(), keyspec.KeyCompromise); err != nil {
		t.Fatal(err)
	}
	if compromised, err := fresh.VerifyReader(ctx, strings.NewReader("x"), old, ""); err != nil || !compromised {
		t.Errorf("compromised: %v, %v", compromised, err)
	}
	if _, err := c.DestroyNow(ctx, key.Name()); err != nil {
		t.Fatal(err)
	}
	if _, err := fresh.Sign(nil, digest[:], crypto.SHA256); err == nil {
		t.Error("a destroyed key signs")
	}
	if _, err := c.Key(ctx, "test/none"); !errors.Is(err, client.ErrNotAvailable) {
		t.Errorf("no key: %v", err)
	}
	if _, err := c.Create(ctx, client.KeySpec{Name: key.Name(), Algorithm: "ed25519"}); !errors.Is(err, client.ErrExists) {
		t.Errorf("create over it: %v", err)
	}
}

func TestKeys(t *testing.T) {
	c := dial(t)
	want := make(map[string]bool)
	for i := range 130 { // more than a page
		name := fmt.Sprintf("listed/%03d", i)
		if _, err := c.Create(t.Context(), client.KeySpec{Name: name, Algorithm: "aes-256-gcm"}); err != nil {
			t.Fatal(err)
		}
		want[name] = true
	}
	for info, err := range c.Keys(t.Context(), "listed") {
		if err != nil {
			t.Fatal(err)
		}
		if !want[info.Name] {
			t.Errorf("%s is not wanted, or comes twice", info.Name)
		}
		delete(want, info.Name)
	}
	if len(want) > 0 {
		t.Errorf("%d keys are missing", len(want))
	}
	for range c.Keys(t.Context(), "listed") {
		break // ends the iteration
	}
}

// TestPacket makes a registration packet for a certificate of kmsd and has kmsd unwrap its key, before and after a rotation.
func TestPacket(t *testing.T) {
	c := dial(t)
	key := create(t, c, keyspec.RSA2048, "encrypt", "decrypt")
	ca := create(t, c, keyspec.RSA2048, "sign", "verify", "certify")
	if _, err := c.SelfSign(t.Context(), ca.Name(), client.Subject{DN: "CN=CA"}, client.CertProfile{CA: true, PathLen: 0}); err != nil {
		t.Fatal(err)
	}
	issued, err := c.Issue(t.Context(), ca.Name(), key.Name(), client.Subject{DN: "CN=REGISTRATION-10001"}, client.CertProfile{PathLen: -1})
	if err != nil {
		t.Fatal(err)
	}
	plaintext := make([]byte, 3<<20)
	rand.Read(plaintext)
	sealed, err := packet.Encrypt(issued[0], bytes.NewReader(plaintext), int64(len(plaintext)))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := packet.Decrypt(t.Context(), key, bytes.Clone(sealed)); err != nil || !bytes.Equal(got, plaintext) {
		t.Fatal(err)
	}
	if _, err := c.Rotate(t.Context(), key.Name()); err != nil {
		t.Fatal(err)
	}
	rotated, err := c.Key(t.Context(), key.Name())
	if err != nil {
		t.Fatal(err)
	}
	if got, err := packet.Decrypt(t.Context(), rotated, bytes.Clone(sealed)); err != nil || !bytes.Equal(got, plaintext) {
		t.Error(err)
	}
	other := create(t, c, keyspec.RSA2048, "encrypt", "decrypt")
	if _, err := packet.Decrypt(t.Context(), other, sealed); !errors.Is(err, client.ErrDecryption) {
		t.Errorf("another key: %v", err)
	}
	var decrypter crypto.Decrypter = rotated
	wrapped, err := rsa.EncryptOAEP(sha256.New(), rand.Reader, decrypter.Public().(*rsa.PublicKey), []byte("key"), []byte("label"))
	if err != nil {
		t.Fatal(err)
	}
	got, err := decrypter.Decrypt(nil, wrapped, &rsa.OAEPOptions{Hash: crypto.SHA256, Label: []byte("label")})
	if err != nil || string(got) != "key" {
		t.Errorf("crypto.Decrypter: %q, %v", got, err)
	}
	if _, err := decrypter.Decrypt(nil, wrapped, nil); !errors.Is(err, client.ErrUnsupported) {
		t.Errorf("PKCS #1 v1.5: %v", err)
	}
}

// TestRestart kills the daemon and starts it again under a client that goes on.
func TestRestart(t *testing.T) {
	d := newDaemon(t)
	defer func() { d.kill() }()
	c, err := client.Dial(t.Context(), client.WithSocket(d.runtime), client.WithReconnect(20*time.Second))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	key := create(t, c, keyspec.Ed25519)
	var wg sync.WaitGroup
	stop := make(chan struct{})
	var signatures atomic.Int64
	for g := range 8 {
		wg.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				message := fmt.Appendf(nil, "%d/%d", g, i)
				signature, err := key.Sign(nil, message, crypto.Hash(0))
				if err != nil || !ed25519.Verify(key.Public().(ed25519.PublicKey), message, signature) {
					t.Errorf("sign: %v", err)
					return
				}
				signatures.Add(1)
			}
		})
	}
	for _, end := range []func(){d.kill, func() { d.stop(t) }} {
		time.Sleep(100 * time.Millisecond)
		end()
		if _, err := client.Dial(t.Context(), client.WithSocket(d.runtime)); !errors.Is(err, client.ErrUnreachable) {
			t.Errorf("Dial without a daemon: %v", err)
		}
		before := signatures.Load()
		d.start(t)
		for deadline := time.Now().Add(20 * time.Second); signatures.Load() < before+100 && time.Now().Before(deadline); {
			time.Sleep(5 * time.Millisecond)
		}
		if signatures.Load() < before+100 {
			t.Error("no signatures after the restart")
		}
	}
	close(stop)
	wg.Wait()
}

// TestConcurrentLarge fills the connection with frames of every size.
func TestConcurrentLarge(t *testing.T) {
	c := dial(t)
	key := create(t, c, keyspec.AES256GCM)
	var wg sync.WaitGroup
	for g := range 32 {
		wg.Go(func() {
			plaintext := bytes.Repeat([]byte{byte(g)}, 50<<10)
			for range 5 {
				sealed, err := key.EncryptBytes(t.Context(), plaintext, nil)
				if err != nil {
					t.Error(err)
					return
				}
				if got, err := key.DecryptBytes(t.Context(), sealed, nil); err != nil || !bytes.Equal(got, plaintext) {
					t.Error(err)
				}
			}
		})
	}
	for range 4 {
		wg.Go(func() {
			w, err := key.EncryptStream(t.Context(), io.Discard, nil)
			if err != nil {
				t.Error(err)
				return
			}
			if _, err := w.Write(make([]byte, 6<<20)); err != nil {
				t.Error(err)
			}
			if err := w.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}
