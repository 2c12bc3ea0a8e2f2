package packet

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"os"
	"strings"
	"testing"
	"testing/iotest"
)

// holder is an Unwrapper with a key in this process.
type holder struct {
	key        *rsa.PrivateKey
	thumbprint [32]byte // that was asked for last
	err        error
}

func (h *holder) Unwrap(_ context.Context, thumbprint [32]byte, wrapped []byte) ([]byte, error) {
	h.thumbprint = thumbprint
	if h.err != nil {
		return nil, h.err
	}
	return rsa.DecryptOAEP(sha256.New(), nil, h.key, wrapped, nil)
}

func readPEM(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(b)
	if block == nil {
		t.Fatalf("%s: no PEM", name)
	}
	return block.Bytes
}

func base(t testing.TB) (*x509.Certificate, *holder) {
	t.Helper()
	certificate, err := ParseCertificate(readPEM(t, "base.cert.pem"))
	if err != nil {
		t.Fatal(err)
	}
	key, err := x509.ParsePKCS8PrivateKey(readPEM(t, "base.key.pem"))
	if err != nil {
		t.Fatal(err)
	}
	return certificate, &holder{key: key.(*rsa.PrivateKey)}
}

type vectors struct {
	Plaintext    string `json:"plaintext_hex"`
	AAD          string `json:"aad_b64u"`
	Salt         string `json:"salt_b64u"`
	Thumbprint   string `json:"base_cert_thumbprint_hex"`
	VerR2        string `json:"payload_ver_r2"`
	WithAAD      string `json:"payload_aad"`
	WithSalt     string `json:"payload_salt_aad"`
	NoThumbprint string `json:"payload_113_no_thumbprint_aad"`
	Packet       string `json:"packet_hex"`
}

func readVectors(t testing.TB) vectors {
	t.Helper()
	b, err := os.ReadFile("testdata/vectors.json")
	if err != nil {
		t.Fatal(err)
	}
	var v vectors
	if err := json.Unmarshal(b, &v); err != nil {
		t.Fatal(err)
	}
	return v
}

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func unbase64(t testing.TB, s string) []byte {
	t.Helper()
	b, err := base64.RawURLEncoding.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestVectors decrypts what a Java program made of the same formats.
func TestVectors(t *testing.T) {
	certificate, u := base(t)
	v := readVectors(t)
	plaintext, aad, salt := unhex(t, v.Plaintext), unbase64(t, v.AAD), unbase64(t, v.Salt)
	thumbprint := [32]byte(unhex(t, v.Thumbprint))
	if Thumbprint(certificate) != thumbprint {
		t.Errorf("thumbprint %x, want %x", Thumbprint(certificate), thumbprint)
	}
	for _, test := range []struct {
		name       string
		payload    []byte
		options    Options
		thumbprint [32]byte
		overhead   int
	}{
		{"VER_R2", unbase64(t, v.VerR2), Options{}, thumbprint, 356},
		{"VER_R2, caller's aad not looked at", unbase64(t, v.VerR2), Options{AAD: []byte("other")}, thumbprint, 356},
		{"aad", unbase64(t, v.WithAAD), Options{AAD: aad}, thumbprint, 334},
		{"salt", unbase64(t, v.WithSalt), Options{Salt: salt, AAD: aad}, thumbprint, 318},
		{"1.1.3", unbase64(t, v.NoThumbprint), Options{AAD: aad}, [32]byte{}, 302},
	} {
		t.Run(test.name, func(t *testing.T) {
			u.thumbprint = [32]byte{1}
			got, err := DecryptPayload(t.Context(), u, test.payload, test.options)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, plaintext) {
				t.Errorf("plaintext %q", got)
			}
			if u.thumbprint != test.thumbprint {
				t.Errorf("asked for thumbprint %x", u.thumbprint)
			}
			if n := len(test.payload) - len(plaintext); n != test.overhead {
				t.Errorf("overhead %d, want %d", n, test.overhead)
			}
		})
	}
	t.Run("packet", func(t *testing.T) {
		packet := unhex(t, v.Packet)
		if len(packet)-len(plaintext) != 362 {
			t.Errorf("overhead %d", len(packet)-len(plaintext))
		}
		got, err := Decrypt(t.Context(), u, packet)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, plaintext) {
			t.Errorf("plaintext %q", got)
		}
	})
}

// TestLayout checks the bytes that are written against the table of Options, with other code than that which reads them.
func TestLayout(t *testing.T) {
	certificate, u := base(t)
	plaintext := []byte("registration data")
	thumbprint := sha256.Sum256(certificate.Raw)
	salt := []byte("twelve bytes")
	for _, test := range []struct {
		name    string
		prefix  string
		options Options
		after   int // bytes after the splitter that are not ciphertext and tag
	}{
		{"VER_R2", "VER_R2", Options{}, 32},
		{"aad", "", Options{AAD: []byte("a")}, 16},
		{"salt", "", Options{Salt: salt}, 0},
		{"salt and aad", "", Options{Salt: salt, AAD: []byte("a")}, 0},
		{"long salt", "", Options{Salt: bytes.Repeat([]byte{7}, 256)}, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			payload, err := EncryptPayload(certificate, plaintext, test.options)
			if err != nil {
				t.Fatal(err)
			}
			rest, ok := bytes.CutPrefix(payload, []byte(test.prefix+string(thumbprint[:])))
			if !ok {
				t.Fatal("prefix or thumbprint is wrong")
			}
			wrapped, rest := rest[:256], rest[256:]
			rest, ok = bytes.CutPrefix(rest, []byte("#KEY_SPLITTER#"))
			if !ok {
				t.Fatal("splitter is not behind the wrapped key")
			}
			if len(rest) != test.after+len(plaintext)+16 {
				t.Errorf("%d bytes after the splitter", len(rest))
			}
			if key, err := rsa.DecryptOAEP(sha256.New(), nil, u.key, wrapped, nil); err != nil || len(key) != 32 {
				t.Errorf("wrapped key: %d bytes, %v", len(key), err)
			}
			got, err := DecryptPayload(t.Context(), u, payload, test.options)
			if err != nil || !bytes.Equal(got, plaintext) {
				t.Errorf("%q, %v", got, err)
			}
			again, err := EncryptPayload(certificate, plaintext, test.options)
			if err != nil || bytes.Equal(again, payload) {
				t.Errorf("two encryptions are equal, %v", err)
			}
		})
	}
}

func TestPacketSizes(t *testing.T) {
	certificate, u := base(t)
	for _, n := range []int{1, 15, 16, 17, 4095, 1 << 20, 5<<20 + 3} {
		plaintext := make([]byte, n)
		rand.Read(plaintext)
		for _, hint := range []int64{0, int64(n), int64(n) - 1, int64(n) + 1, 2 * int64(n)} {
			packet, err := Encrypt(certificate, bytes.NewReader(plaintext), max(hint, 0))
			if err != nil {
				t.Fatal(err)
			}
			if len(packet) != n+362 {
				t.Fatalf("%d bytes of plaintext give %d", n, len(packet))
			}
			// The same bytes are a payload with salt and aad.
			got, err := DecryptPayload(t.Context(), u, packet[44:], Options{Salt: packet[:12], AAD: packet[12:44]})
			if err != nil || !bytes.Equal(got, plaintext) {
				t.Fatalf("as a payload: %v", err)
			}
			got, err = Decrypt(t.Context(), u, packet)
			if err != nil || !bytes.Equal(got, plaintext) {
				t.Fatalf("as a packet: %v", err)
			}
			if n > 1<<20 && hint == int64(n) && cap(packet) != len(packet) {
				t.Errorf("buffer of %d bytes for a packet of %d", cap(packet), len(packet))
			}
		}
	}
}

func TestReaderErrors(t *testing.T) {
	certificate, _ := base(t)
	if _, err := Encrypt(certificate, strings.NewReader(""), 0); !errors.Is(err, ErrFormat) {
		t.Errorf("empty plaintext: %v", err)
	}
	broken := errors.New("broken")
	if _, err := Encrypt(certificate, io.MultiReader(strings.NewReader("x"), iotest.ErrReader(broken)), 0); !errors.Is(err, broken) {
		t.Errorf("broken reader: %v", err)
	}
	if _, err := Encrypt(certificate, strings.NewReader("x"), MaxSize+1); !errors.Is(err, ErrTooLarge) {
		t.Errorf("too large: %v", err)
	}
	if _, err := readAll(nil, strings.NewReader("12345"), 4); !errors.Is(err, ErrTooLarge) {
		t.Errorf("more than the limit: %v", err)
	}
	if _, err := EncryptPayload(certificate, nil, Options{}); !errors.Is(err, ErrFormat) {
		t.Errorf("empty payload: %v", err)
	}
	if _, err := EncryptPayload(certificate, []byte("x"), Options{Salt: make([]byte, 257)}); !errors.Is(err, ErrFormat) {
		t.Errorf("salt of 257 bytes: %v", err)
	}
}

// TestRefused checks that malformed input gets its own error before the key is asked for.
func TestRefused(t *testing.T) {
	certificate, _ := base(t)
	asked := &holder{err: errors.New("asked")}
	good, err := EncryptPayload(certificate, []byte("x"), Options{Salt: []byte("twelve bytes")})
	if err != nil {
		t.Fatal(err)
	}
	good = append(good, make([]byte, 64)...)[:len(good)] // so that it can be cut longer
	const splitterAt = 32 + 256
	for _, test := range []struct {
		name, message string
		payload       []byte
		options       Options
	}{
		{"empty", "no #KEY_SPLITTER#", nil, Options{}},
		{"no splitter", "no #KEY_SPLITTER#", bytes.ReplaceAll(good, splitter, []byte("#KEY-SPLITTER#")), Options{}},
		{"splitter only", "0 bytes before", splitter, Options{}},
		{"splitter far behind", "no #KEY_SPLITTER#", append(make([]byte, 1<<16), good...), Options{}},
		{"wrapped key too short", "287 bytes before", good[1:], Options{}},
		{"wrapped key too long", "289 bytes before", append([]byte{0}, good...), Options{}},
		{"VER_R2 before no thumbprint", "262 bytes before", append([]byte("VER_R2"), good[32:]...), Options{}},
		{"other version", "294 bytes before", append([]byte("VER_R3"), good...), Options{}},
		{"second splitter", "0 bytes before", append(bytes.Clone(splitter), good...), Options{}},
		{"no body", "too few", good[:splitterAt+14], Options{}},
		{"body is the tag alone", "too few", good[:splitterAt+14+16], Options{Salt: []byte("twelve bytes")}},
		{"no place for the nonce", "too few", good[:splitterAt+14+15], Options{AAD: []byte("a")}},
		{"no place for the aad", "too few", append([]byte("VER_R2"), good[:splitterAt+14+31]...), Options{}},
		{"nothing after the aad", "too few", append([]byte("VER_R2"), append(good[:splitterAt+14:splitterAt+14], make([]byte, 48)...)...), Options{}},
		{"salt with VER_R2", "no salt", append([]byte("VER_R2"), good...), Options{Salt: []byte("twelve bytes")}},
		{"salt too long", "257", good, Options{Salt: make([]byte, 257)}},
	} {
		_, err := DecryptPayload(t.Context(), asked, test.payload, test.options)
		if !errors.Is(err, ErrFormat) || !strings.Contains(err.Error(), test.message) {
			t.Errorf("%s: %v", test.name, err)
		}
	}
	for name, packet := range map[string][]byte{
		"empty":         {},
		"43 bytes":      make([]byte, 43),
		"no payload":    make([]byte, 44),
		"VER_R2 inside": append(make([]byte, 44), append([]byte("VER_R2"), good...)...),
	} {
		if _, err := Decrypt(t.Context(), asked, packet); !errors.Is(err, ErrFormat) {
			t.Errorf("packet, %s: %v", name, err)
		}
	}
	if _, err := DecryptPayload(t.Context(), asked, good, Options{Salt: []byte("twelve bytes")}); !errors.Is(err, asked.err) {
		t.Errorf("the error of the unwrapper is lost: %v", err)
	}
}

// TestBitFlips changes every byte of a packet: no change may give a plaintext.
func TestBitFlips(t *testing.T) {
	certificate, u := base(t)
	packet, err := Encrypt(certificate, strings.NewReader("registration data"), 0)
	if err != nil {
		t.Fatal(err)
	}
	// The wrapped key is left out here: 256 RSA decryptions, for the same result as its first and last byte.
	for i := range packet {
		if i > 44+32 && i < 44+32+255 {
			continue
		}
		if i >= 44 && i < 44+32 {
			continue // the thumbprint says which key to ask, it is not authenticated
		}
		changed := bytes.Clone(packet)
		changed[i] ^= 1 << (i % 8)
		if got, err := Decrypt(t.Context(), u, changed); err == nil {
			t.Fatalf("byte %d changed: %q", i, got)
		}
	}
	for n := range packet {
		if n > 44+32 && n < 44+32+250 {
			continue
		}
		if _, err := Decrypt(t.Context(), u, bytes.Clone(packet[:n])); err == nil {
			t.Fatalf("cut to %d bytes", n)
		}
	}
}

// TestFailedDecryptionReleasesNothing looks for plaintext in the buffer after the tag did not fit.
func TestFailedDecryptionReleasesNothing(t *testing.T) {
	certificate, u := base(t)
	secret := bytes.Repeat([]byte("secret data "), 100)
	packet, err := Encrypt(certificate, bytes.NewReader(secret), 0)
	if err != nil {
		t.Fatal(err)
	}
	packet[len(packet)-1] ^= 1
	if _, err := Decrypt(t.Context(), u, packet); !errors.Is(err, ErrDecryption) {
		t.Fatal(err)
	}
	if bytes.Contains(packet, []byte("secret data ")) {
		t.Error("plaintext is in the buffer")
	}
}

func TestCertificatesThatCannot(t *testing.T) {
	module, err := ParseCertificate(readPEM(t, "module.cert.pem"))
	if err != nil {
		t.Fatal(err)
	}
	small, err := rsa.GenerateKey(rand.Reader, 1024+512)
	if err != nil {
		t.Fatal(err)
	}
	curve, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]*x509.Certificate{
		"signing":  module,
		"RSA-1536": {PublicKey: &small.PublicKey},
		"ECDSA":    {PublicKey: &curve.PublicKey},
	} {
		if _, err := EncryptPayload(c, []byte("x"), Options{}); !errors.Is(err, ErrCertificate) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestLargerKeys makes packets for the RSA sizes that MOSIP does not use by default.
func TestLargerKeys(t *testing.T) {
	for _, bits := range []int{3072, 4096} {
		if bits == 4096 && testing.Short() {
			continue
		}
		key, err := rsa.GenerateKey(rand.Reader, bits)
		if err != nil {
			t.Fatal(err)
		}
		c := &x509.Certificate{Raw: []byte("certificate"), PublicKey: &key.PublicKey}
		for _, o := range []Options{{}, {AAD: []byte("a")}, {Salt: []byte("twelve bytes")}} {
			payload, err := EncryptPayload(c, []byte("data"), o)
			if err != nil {
				t.Fatal(err)
			}
			got, err := DecryptPayload(t.Context(), &holder{key: key}, payload, o)
			if err != nil || string(got) != "data" {
				t.Errorf("%d bits: %q, %v", bits, got, err)
			}
		}
	}
}

func FuzzDecryptPayload(f *testing.F) {
	certificate, _ := base(f)
	v := readVectors(f)
	for _, s := range []string{v.VerR2, v.WithAAD, v.WithSalt, v.NoThumbprint} {
		f.Add(unbase64(f, s), []byte(nil), []byte(nil))
		f.Add(unbase64(f, s), []byte(nil), unbase64(f, v.AAD))
		f.Add(unbase64(f, s), unbase64(f, v.Salt), unbase64(f, v.AAD))
	}
	fixed := &fixedKey{}
	f.Fuzz(func(t *testing.T, payload, salt, aad []byte) {
		if plaintext, err := DecryptPayload(t.Context(), fixed, payload, Options{salt, aad}); err == nil && len(plaintext) == 0 {
			t.Error("empty plaintext")
		}
		if len(payload) > 0 && len(salt) <= maxSaltSize {
			sealed, err := EncryptPayload(certificate, payload, Options{salt, aad})
			if err != nil {
				t.Fatal(err)
			}
			p, err := split(sealed)
			if err != nil || p.version2 != (len(salt) == 0 && len(aad) == 0) {
				t.Fatalf("%+v, %v", p, err)
			}
		}
	})
}

func FuzzDecryptPacket(f *testing.F) {
	f.Add(unhex(f, readVectors(f).Packet))
	f.Fuzz(func(t *testing.T, packet []byte) {
		if plaintext, err := Decrypt(t.Context(), &fixedKey{}, packet); err == nil && len(plaintext) == 0 {
			t.Error("empty plaintext")
		}
	})
}

// fixedKey unwraps everything to the same key, so that a fuzzer gets past RSA.
type fixedKey struct{}

func (fixedKey) Unwrap(context.Context, [32]byte, []byte) ([]byte, error) {
	return make([]byte, keySize), nil
}
