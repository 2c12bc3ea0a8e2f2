package mechanism

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

func lookup(t testing.TB, a keyspec.Algorithm) *Row {
	t.Helper()
	row, err := Lookup(a)
	if err != nil {
		t.Fatal(err)
	}
	return row
}

// fixed returns the key of the row's self-test, which costs no key generation.
func fixed(t testing.TB, a keyspec.Algorithm) *Key {
	t.Helper()
	row := lookup(t, a)
	key, err := row.Load(unhex(t, row.known.material))
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func TestTableHasEveryAlgorithmOnce(t *testing.T) {
	var got []keyspec.Algorithm
	for _, row := range Table() {
		got = append(got, row.Algorithm)
	}
	if !slices.Equal(got, keyspec.Algorithms()) {
		t.Fatalf("table has %v, keyspec has %v", got, keyspec.Algorithms())
	}
	if _, err := Lookup("rsa-1024"); !errors.Is(err, keyspec.ErrAlgorithm) {
		t.Fatalf("rsa-1024: %v", err)
	}
}

func TestTableRowsAreConsistent(t *testing.T) {
	for _, row := range Table() {
		if row.size == 0 || row.size > 512 || row.Class != Modern || row.Cost == "" {
			t.Errorf("%s: size %d, class %q, cost %q", row.Algorithm, row.size, row.Class, row.Cost)
		}
		if err := ValidateUsages(row.Algorithm, row.Default, ""); err != nil {
			t.Errorf("%s: default usages: %v", row.Algorithm, err)
		}
		signs := slices.Contains(row.Usages, keyspec.Sign)
		if signs != (len(row.Schemes) > 0) {
			t.Errorf("%s: signs %v, schemes %v", row.Algorithm, signs, row.Schemes)
		}
		for _, s := range row.Schemes {
			if _, err := keyspec.ParseScheme(string(s)); err != nil {
				t.Errorf("%s: %v", row.Algorithm, err)
			}
		}
	}
}

func TestSelfTests(t *testing.T) {
	for _, row := range Table() {
		if err := row.SelfTest(); err != nil {
			t.Error(err)
		}
	}
}

// TestSelfTestSeesEveryFlippedBit flips bits of every field of every row's known answer; each time the test must fail.
func TestSelfTestSeesEveryFlippedBit(t *testing.T) {
	for _, row := range Table() {
		t.Run(string(row.Algorithm), func(t *testing.T) {
			fields := 0
			known := row.known
			for name, field := range map[string]*string{
				"material": &known.material, "input": &known.input, "output": &known.output,
				"sealed": &known.sealed, "nonce": &known.nonce, "context": &known.context,
			} {
				good := *field
				if good == "" {
					continue
				}
				fields++
				raw := unhex(t, good)
				for _, bit := range []int{3, 8*len(raw)/2 + 5, 8*len(raw) - 6} {
					if row.Algorithm == keyspec.X25519 && name == "material" && bit == 8*len(raw)-6 {
						bit -= 8 // the highest bits of the last byte are clamped
					}
					bad := bytes.Clone(raw)
					bad[bit/8] ^= 1 << (bit % 8)
					*field = fmt.Sprintf("%x", bad)
					if row.selfTest(known) == nil {
						t.Errorf("bit %d of %s flipped and not noticed", bit, name)
					}
				}
				*field = good
			}
			if fields < 3 {
				t.Errorf("only %d fields", fields)
			}
			if err := row.selfTest(known); err != nil {
				t.Fatal(err)
			}
		})
	}
}

func TestGenerateLoadExportImport(t *testing.T) {
	for _, row := range Table() {
		if (testing.Short() || raceEnabled) && row.Algorithm == keyspec.RSA4096 {
			continue // its size only; 2048 and 3072 run the same code
		}
		t.Run(string(row.Algorithm), func(t *testing.T) {
			t.Parallel()
			key, material, err := row.NewKey()
			if err != nil {
				t.Fatal(err)
			}
			if len(material) != row.Size() {
				t.Fatalf("material of %d bytes, want %d", len(material), row.Size())
			}
			encoded, err := row.Export(material)
			if err != nil {
				t.Fatal(err)
			}
			again, err := row.Import(encoded)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(again, material) {
				t.Fatal("import of the export is other material")
			}
			if key.Public() != nil {
				spki, err := key.SPKI()
				if err != nil {
					t.Fatal(err)
				}
				loaded, err := row.Load(material)
				if err != nil {
					t.Fatal(err)
				}
				if again, err := loaded.SPKI(); err != nil || !bytes.Equal(again, spki) {
					t.Fatal("loaded key has another public half", err)
				}
				if _, err := ParseSPKI(spki); err != nil {
					t.Fatal(err)
				}
			} else if _, err := key.SPKI(); !errors.Is(err, ErrUnsupported) {
				t.Fatal(err)
			}
			// No other row takes it, but for ECDSA and ECDH on one curve, which share an encoding.
			for _, other := range Table() {
				if other == row || other.Default[0] != keyspec.Sign && other.Kind != KindECDH && other.size == len(encoded) {
					continue // any bytes of the right length are a symmetric key
				}
				got, err := other.Import(encoded)
				if err != nil {
					if !errors.Is(err, ErrMaterial) {
						t.Errorf("%s: %v", other.Algorithm, err)
					}
					continue
				}
				shared := other.curve == row.curve && row.curve.elliptic != nil
				if !shared || !bytes.Equal(got, material) {
					t.Errorf("imported as %s", other.Algorithm)
				}
			}
			for _, bad := range [][]byte{nil, {}, encoded[:len(encoded)-1], append(bytes.Clone(encoded), 0), make([]byte, MaxEncoded+1)} {
				if _, err := row.Import(bad); !errors.Is(err, ErrMaterial) {
					t.Errorf("import of %d bytes: %v", len(bad), err)
				}
			}
			for _, bad := range [][]byte{nil, material[1:], append(bytes.Clone(material), 0)} {
				if _, err := row.Load(bad); !errors.Is(err, ErrMaterial) {
					t.Errorf("load of %d bytes: %v", len(bad), err)
				}
			}
		})
	}
}

func TestLoadDoesNotKeepMaterial(t *testing.T) {
	row := lookup(t, keyspec.HMACSHA256)
	material := make([]byte, row.Size())
	key, err := row.Load(material)
	if err != nil {
		t.Fatal(err)
	}
	before, _ := key.MAC(nil, nil)
	material[0] = 1
	key.idle.Store(nil)
	if after, _ := key.MAC(nil, nil); !bytes.Equal(before, after) {
		t.Fatal("the key changed with the caller's bytes")
	}
}

func TestKeysDoNotPrint(t *testing.T) {
	for _, row := range Table() {
		key := fixed(t, row.Algorithm)
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%x", "%d"} {
			text := fmt.Sprintf(verb, key)
			if text != "key("+string(row.Algorithm)+")" {
				t.Errorf("%s with %s prints %d characters", row.Algorithm, verb, len(text))
			}
		}
	}
}

// TestEveryVerbOnEveryRow calls every operation on every row: those the row's usages name work, all others are refused.
func TestEveryVerbOnEveryRow(t *testing.T) {
	for _, row := range Table() {
		key := fixed(t, row.Algorithm)
		has := func(u keyspec.Usage) bool { return slices.Contains(row.Usages, u) }
		check := func(verb string, allowed bool, err error) {
			t.Helper()
			if allowed && err != nil || !allowed && !errors.Is(err, ErrUnsupported) {
				t.Errorf("%s %s: allowed %v, %v", row.Algorithm, verb, allowed, err)
			}
		}
		_, err := key.Sign(nil, "", "", Input{Message: []byte("m")})
		check("sign", has(keyspec.Sign), err)
		_, err = key.Signer()
		check("signer", has(keyspec.Sign), err)
		_, err = key.MAC(nil, []byte("m"))
		check("mac", has(keyspec.MAC), err)
		_, err = key.Derive(nil, nil, 32)
		check("derive", has(keyspec.Derive), err)
		if key.AEAD() == nil != !(has(keyspec.Encrypt) && row.Kind != KindRSA) {
			t.Errorf("%s aead", row.Algorithm)
		}
		if key.NewMAC() == nil != !has(keyspec.MAC) {
			t.Errorf("%s new mac", row.Algorithm)
		}
		if row.Kind != KindRSA {
			wrapped, err := key.Wrap(nil, []byte("key"))
			check("wrap", has(keyspec.Wrap), err)
			if err == nil {
				_, err = key.Unwrap(nil, wrapped)
			}
			check("unwrap", has(keyspec.Unwrap), err)
		}
		var peer []byte
		if key.Public() != nil {
			if peer, err = key.SPKI(); err != nil {
				t.Fatal(err)
			}
		}
		_, err = key.Agree(peer)
		check("agree", has(keyspec.Agree), err)
		ciphertext, err := Encrypt(nil, key.Public(), "", []byte("plaintext"), []byte("label"))
		check("rsa encrypt", row.Kind == KindRSA, err)
		got, err := key.Decrypt(nil, "", ciphertext, []byte("label"))
		check("rsa decrypt", row.Kind == KindRSA, err)
		if err == nil && string(got) != "plaintext" {
			t.Errorf("%s decrypts to %q", row.Algorithm, got)
		}
		if row.Kind == KindRSA {
			if _, err := key.Decrypt(nil, "", ciphertext, nil); !errors.Is(err, ErrDecryption) {
				t.Errorf("other label: %v", err)
			}
			if _, err := Encrypt(nil, key.Public(), "", make([]byte, row.size-65), nil); !errors.Is(err, ErrInput) {
				t.Errorf("long plaintext: %v", err)
			}
			if _, err := key.Decrypt(nil, keyspec.RSAPSSSHA256, ciphertext, nil); !errors.Is(err, ErrInput) {
				t.Errorf("decryption with a signature scheme: %v", err)
			}
		}
	}
}

func TestResultsAreAppended(t *testing.T) {
	prefix := []byte("prefix")
	check := func(verb string, got []byte, err error) {
		t.Helper()
		if err != nil || !bytes.HasPrefix(got, prefix) || len(got) == len(prefix) {
			t.Errorf("%s: %x, %v", verb, got, err)
		}
	}
	for _, a := range []keyspec.Algorithm{keyspec.RSA2048, keyspec.ECDSAP521, keyspec.Ed25519} {
		got, err := fixed(t, a).Sign(slices.Clip(prefix), "", "", Input{})
		check(string(a), got, err)
	}
	got, err := fixed(t, keyspec.ECDSAP256).Sign(slices.Clip(prefix), "", P1363, Input{})
	check("p1363", got, err)
	got, err = fixed(t, keyspec.HMACSHA512).MAC(slices.Clip(prefix), nil)
	check("mac", got, err)
	wrapped, err := fixed(t, keyspec.AES256GCM).Wrap(slices.Clip(prefix), []byte{1})
	check("wrap", wrapped, err)
	got, err = fixed(t, keyspec.AES256GCM).Unwrap(slices.Clip(prefix), wrapped[len(prefix):])
	check("unwrap", got, err)
}

func TestMACIsConcurrentAndReused(t *testing.T) {
	key := fixed(t, keyspec.HMACSHA256)
	want := unhex(t, key.row.known.output)
	input := unhex(t, key.row.known.input)
	var group sync.WaitGroup
	for range 4 {
		group.Go(func() {
			for range 500 {
				if got, err := key.MAC(nil, input); err != nil || !bytes.Equal(got, want) {
					t.Errorf("%x, %v", got, err)
					return
				}
			}
		})
	}
	group.Wait()
	for _, bad := range [][]byte{nil, want[:16], append(bytes.Clone(want), 0), changed(want)} {
		if err := key.VerifyMAC(input, bad); !errors.Is(err, ErrVerification) {
			t.Errorf("MAC of %d bytes: %v", len(bad), err)
		}
	}
	if err := key.VerifyMAC(input, want); err != nil {
		t.Error(err)
	}
}

func TestHotPathAllocations(t *testing.T) {
	if raceEnabled {
		t.Log("allocation counts mean nothing under the race detector")
		return
	}
	message, dst := make([]byte, 1024), make([]byte, 0, 2048)
	nonce := make([]byte, 12)
	mac, aes, ed := fixed(t, keyspec.HMACSHA256), fixed(t, keyspec.AES256GCM), fixed(t, keyspec.Ed25519)
	for name, c := range map[string]struct {
		most float64
		op   func()
	}{
		"mac":     {0, func() { mac.MAC(dst, message) }},
		"seal":    {0, func() { aes.AEAD().Seal(dst, nonce, message, nil) }},
		"ed25519": {1, func() { ed.Sign(dst, "", "", Input{Message: message}) }},
	} {
		if got := testing.AllocsPerRun(100, c.op); got > c.most {
			t.Errorf("%s: %v allocations, at most %v", name, got, c.most)
		}
	}
}

func TestAgreeBothWays(t *testing.T) {
	for _, a := range []keyspec.Algorithm{keyspec.X25519, keyspec.ECDHP256, keyspec.ECDHP384, keyspec.ECDHP521} {
		one, _, err := lookup(t, a).NewKey()
		if err != nil {
			t.Fatal(err)
		}
		two, _, err := lookup(t, a).NewKey()
		if err != nil {
			t.Fatal(err)
		}
		spkiOne, _ := one.SPKI()
		spkiTwo, _ := two.SPKI()
		secretOne, err1 := one.Agree(spkiTwo)
		secretTwo, err2 := two.Agree(spkiOne)
		if err1 != nil || err2 != nil || !bytes.Equal(secretOne, secretTwo) || len(secretOne) < 32 {
			t.Errorf("%s: %v %v", a, err1, err2)
		}
		for _, other := range Table() {
			if other.Algorithm == a || other.curve == one.row.curve && other.curve.ecdh != nil {
				continue
			}
			peer, err := fixed(t, other.Algorithm).SPKI()
			if err != nil {
				continue
			}
			if _, err := one.Agree(peer); !errors.Is(err, ErrInput) {
				t.Errorf("%s with a peer of %s: %v", a, other.Algorithm, err)
			}
		}
		for _, bad := range [][]byte{nil, spkiTwo[:len(spkiTwo)-1], append(bytes.Clone(spkiTwo), 0), make([]byte, MaxSPKI+1)} {
			if _, err := one.Agree(bad); !errors.Is(err, ErrInput) {
				t.Errorf("%s with %d bytes: %v", a, len(bad), err)
			}
		}
	}
	zero := append(unhex(t, "302a300506032b656e032100"), make([]byte, 32)...)
	if _, err := fixed(t, keyspec.X25519).Agree(zero); !errors.Is(err, ErrInput) {
		t.Errorf("X25519 with the zero point: %v", err)
	}
}

func TestHKDFLength(t *testing.T) {
	for n, good := range map[int]bool{-1: false, 0: false, 1: true, MaxDerived: true, MaxDerived + 1: false} {
		got, err := HKDF([]byte("secret"), nil, nil, n)
		if good && (err != nil || len(got) != n) || !good && !errors.Is(err, ErrInput) {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
}

func TestUsages(t *testing.T) {
	for _, c := range []struct {
		algorithm keyspec.Algorithm
		usages    string
		profile   string
		good      bool
	}{
		{keyspec.RSA2048, "sign verify", "", true},
		{keyspec.RSA2048, "sign verify certify", "", true},
		{keyspec.RSA2048, "encrypt decrypt", "", true},
		{keyspec.RSA2048, "encrypt decrypt wrap unwrap", "", true},
		{keyspec.RSA2048, "sign decrypt", "", false},
		{keyspec.RSA2048, "verify encrypt", "", false},
		{keyspec.RSA4096, "certify unwrap", "", false},
		{keyspec.RSA4096, "sign verify certify unwrap", "", false},
		{keyspec.RSA4096, "sign verify certify unwrap", ProfileMOSIPModule, true},
		{keyspec.RSA4096, "certify unwrap", ProfileMOSIPModule, true},
		{keyspec.RSA4096, "sign decrypt", ProfileMOSIPModule, false},
		{keyspec.RSA4096, "sign wrap", ProfileMOSIPModule, false},
		{keyspec.ECDSAP256, "sign verify certify", ProfileMOSIPModule, false},
		{keyspec.RSA2048, "sign", "unheard-of", false},
		{keyspec.RSA2048, "mac", "", false},
		{keyspec.RSA2048, "", "", false},
		{keyspec.RSA2048, "sign sign", "", false},
		{keyspec.ECDSAP256, "sign verify certify", "", true},
		{keyspec.ECDSAP256, "agree", "", false},
		{keyspec.ECDHP256, "agree", "", true},
		{keyspec.ECDHP256, "sign", "", false},
		{keyspec.Ed25519, "certify", "", true},
		{keyspec.X25519, "agree derive", "", false},
		{keyspec.AES256GCM, "encrypt decrypt", "", true},
		{keyspec.AES256GCM, "wrap unwrap", "", true},
		{keyspec.AES256GCM, "encrypt wrap", "", false},
		{keyspec.AES128GCM, "decrypt wrap", "", false},
		{keyspec.ChaCha20Poly1305, "wrap", "", false},
		{keyspec.HMACSHA256, "mac verify", "", true},
		{keyspec.HMACSHA256, "sign", "", false},
		{keyspec.HKDFSHA256, "derive", "", true},
		{keyspec.HKDFSHA256, "encrypt", "", false},
		{"des", "encrypt", "", false},
	} {
		var usages []keyspec.Usage
		for _, u := range strings.Fields(c.usages) {
			usages = append(usages, keyspec.Usage(u))
		}
		err := ValidateUsages(c.algorithm, usages, c.profile)
		if c.good != (err == nil) || err != nil && !errors.Is(err, ErrUsages) && !errors.Is(err, keyspec.ErrAlgorithm) {
			t.Errorf("%s {%s} %q: %v", c.algorithm, c.usages, c.profile, err)
		}
	}
	got, err := DefaultUsages(keyspec.RSA3072, ProfileMOSIPModule)
	if err != nil || !slices.Equal(got, mosipModule) {
		t.Errorf("mosip-module: %v, %v", got, err)
	}
	if _, err := DefaultUsages(keyspec.Ed25519, ProfileMOSIPModule); !errors.Is(err, ErrUsages) {
		t.Errorf("mosip-module on ed25519: %v", err)
	}
}

func TestGeneratedKeysDiffer(t *testing.T) {
	for _, row := range Table() {
		if row.Kind == KindRSA {
			continue
		}
		one, err1 := row.Generate()
		two, err2 := row.Generate()
		if err1 != nil || err2 != nil || bytes.Equal(one, two) {
			t.Errorf("%s: %v %v", row.Algorithm, err1, err2)
		}
	}
}

func randomBytes(n int) []byte {
	b := make([]byte, n)
	rand.Read(b)
	return b
}

// TestSchemesFollowUsages: a key lists the schemes that it can be put to, and no others of its algorithm.
func TestSchemesFollowUsages(t *testing.T) {
	for _, c := range []struct {
		algorithm     keyspec.Algorithm
		usages        []keyspec.Usage
		first, others string
	}{
		{keyspec.RSA2048, []keyspec.Usage{keyspec.Sign, keyspec.Verify}, "rsa-pss-sha256", "rsa-pss-sha384 rsa-pss-sha512 rsa-pkcs1-sha256 rsa-pkcs1-sha384 rsa-pkcs1-sha512"},
		{keyspec.RSA2048, []keyspec.Usage{keyspec.Certify}, "rsa-pss-sha256", "rsa-pss-sha384 rsa-pss-sha512 rsa-pkcs1-sha256 rsa-pkcs1-sha384 rsa-pkcs1-sha512"},
		{keyspec.RSA4096, []keyspec.Usage{keyspec.Encrypt, keyspec.Decrypt}, "rsa-oaep-sha256", ""},
		{keyspec.RSA4096, []keyspec.Usage{keyspec.Unwrap}, "rsa-oaep-sha256", ""},
		{keyspec.RSA3072, mosipModule, "rsa-pss-sha256", "rsa-pss-sha384 rsa-pss-sha512 rsa-pkcs1-sha256 rsa-pkcs1-sha384 rsa-pkcs1-sha512 rsa-oaep-sha256"},
		{keyspec.ECDSAP384, []keyspec.Usage{keyspec.Verify}, "ecdsa-sha384", "ecdsa-sha256 ecdsa-sha512"},
		{keyspec.AES256GCM, []keyspec.Usage{keyspec.Encrypt}, "", ""},
	} {
		row, err := Lookup(c.algorithm)
		if err != nil {
			t.Fatal(err)
		}
		var words []string
		for _, s := range row.SchemesFor(c.usages) {
			words = append(words, string(s))
		}
		if got, want := strings.Join(words, " "), strings.TrimSpace(c.first+" "+c.others); got != want {
			t.Errorf("%s %v: %s, want %s", c.algorithm, c.usages, got, want)
		}
	}
}
