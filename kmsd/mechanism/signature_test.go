package mechanism

import (
	"bytes"
	"crypto"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"slices"
	"testing"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// TestSignVerifyMatrix signs with every key in every scheme and encoding, and verifies with every other key, scheme and
// encoding: exactly the right one accepts.
func TestSignVerifyMatrix(t *testing.T) {
	message := []byte("the message")
	var signers []*Key
	for _, row := range Table() {
		if len(row.Schemes) > 0 {
			signers = append(signers, fixed(t, row.Algorithm))
		}
	}
	schemes := append(keyspec.Schemes(), "unheard-of")
	for _, key := range signers {
		for _, scheme := range schemes {
			for _, encoding := range []Encoding{DER, P1363, "unheard-of"} {
				sig, err := key.Sign(nil, scheme, encoding, Input{Message: message})
				allowed := slices.Contains(key.row.Schemes, scheme) && scheme != keyspec.RSAOAEPSHA256 &&
					(encoding == DER || encoding == P1363 && key.row.Kind == KindECDSA)
				if allowed != (err == nil) || err != nil && !errors.Is(err, ErrInput) {
					t.Errorf("%s %s %s: %v", key.row.Algorithm, scheme, encoding, err)
				}
				if err != nil {
					continue
				}
				for _, verifier := range signers {
					for _, other := range schemes {
						for _, form := range []Encoding{DER, P1363} {
							right := verifier == key && other == scheme && form == encoding
							err := Verify(verifier.Public(), other, form, Input{Message: message}, sig)
							if right != (err == nil) {
								t.Errorf("%s %s %s verified as %s %s %s: %v", key.row.Algorithm, scheme, encoding, verifier.row.Algorithm, other, form, err)
							}
						}
					}
				}
				for _, bad := range [][]byte{nil, sig[:len(sig)-1], append(bytes.Clone(sig), 0), changed(sig)} {
					if err := Verify(key.Public(), scheme, encoding, Input{Message: message}, bad); !errors.Is(err, ErrVerification) {
						t.Errorf("%s %s %s: bad signature of %d bytes: %v", key.row.Algorithm, scheme, encoding, len(bad), err)
					}
				}
				if err := Verify(key.Public(), scheme, encoding, Input{Message: changed(message)}, sig); !errors.Is(err, ErrVerification) {
					t.Errorf("%s %s: other message: %v", key.row.Algorithm, scheme, err)
				}
			}
		}
	}
	if err := Verify(fixed(t, keyspec.X25519).Public(), "", "", Input{}, nil); !errors.Is(err, ErrUnsupported) {
		t.Errorf("X25519 verifies: %v", err)
	}
	if err := Verify(nil, "", "", Input{}, nil); !errors.Is(err, ErrUnsupported) {
		t.Errorf("nil verifies: %v", err)
	}
}

func TestInput(t *testing.T) {
	p256 := fixed(t, keyspec.ECDSAP256)
	ed := fixed(t, keyspec.Ed25519)
	for name, c := range map[string]struct {
		key  *Key
		in   Input
		good bool
	}{
		"empty message":        {p256, Input{}, true},
		"message":              {p256, Input{Message: []byte("m")}, true},
		"digest":               {p256, Input{Digest: make([]byte, 32)}, true},
		"short digest":         {p256, Input{Digest: make([]byte, 31)}, false},
		"digest of SHA-384":    {p256, Input{Digest: make([]byte, 48)}, false},
		"both":                 {p256, Input{Message: []byte("m"), Digest: make([]byte, 32)}, false},
		"ed25519 with digest":  {ed, Input{Digest: make([]byte, 64)}, false},
		"ed25519, no message":  {ed, Input{}, true},
		"ed25519 with message": {ed, Input{Message: []byte("m")}, true},
	} {
		sig, err := c.key.Sign(nil, "", "", c.in)
		if c.good != (err == nil) || err != nil && !errors.Is(err, ErrInput) {
			t.Errorf("%s: %v", name, err)
		}
		err = Verify(c.key.Public(), "", "", c.in, sig)
		if c.good != (err == nil) || err != nil && !errors.Is(err, ErrInput) {
			t.Errorf("%s: verify: %v", name, err)
		}
	}
}

func TestECDSAIsHedged(t *testing.T) {
	key := fixed(t, keyspec.ECDSAP256)
	one, _ := key.Sign(nil, "", "", Input{Message: []byte("m")})
	two, _ := key.Sign(nil, "", "", Input{Message: []byte("m")})
	if bytes.Equal(one, two) {
		t.Error("two signatures are equal")
	}
}

func TestSignerAndSchemeFor(t *testing.T) {
	digest := make([]byte, 64)
	for _, c := range []struct {
		algorithm keyspec.Algorithm
		opts      crypto.SignerOpts
		want      keyspec.Scheme
	}{
		{keyspec.RSA2048, crypto.SHA256, keyspec.RSAPKCS1SHA256},
		{keyspec.RSA2048, crypto.SHA512, keyspec.RSAPKCS1SHA512},
		{keyspec.RSA2048, &rsa.PSSOptions{Hash: crypto.SHA384, SaltLength: rsa.PSSSaltLengthEqualsHash}, keyspec.RSAPSSSHA384},
		{keyspec.RSA2048, &rsa.PSSOptions{Hash: crypto.SHA256, SaltLength: 32}, keyspec.RSAPSSSHA256},
		{keyspec.RSA2048, &rsa.PSSOptions{Hash: crypto.SHA256, SaltLength: 20}, ""},
		{keyspec.RSA2048, crypto.SHA1, ""},
		{keyspec.RSA2048, crypto.Hash(0), ""},
		{keyspec.ECDSAP256, crypto.SHA256, keyspec.ECDSASHA256},
		{keyspec.ECDSAP384, crypto.SHA256, keyspec.ECDSASHA256},
		{keyspec.ECDSAP384, crypto.SHA384, keyspec.ECDSASHA384},
		{keyspec.ECDSAP256, crypto.SHA1, ""},
		{keyspec.ECDSAP256, crypto.Hash(0), ""},
		{keyspec.Ed25519, crypto.Hash(0), keyspec.PureEd25519},
		{keyspec.Ed25519, crypto.SHA512, ""},
	} {
		key := fixed(t, c.algorithm)
		got, err := SchemeFor(key.Public(), c.opts)
		if got != c.want || (err == nil) != (c.want != "") || err != nil && !errors.Is(err, ErrInput) {
			t.Errorf("%s %v: %q, %v", c.algorithm, c.opts, got, err)
		}
		signer, err := key.Signer()
		if err != nil {
			t.Fatal(err)
		}
		size := c.opts.HashFunc()
		in := digest
		if size != 0 {
			in = digest[:size.Size()]
		}
		sig, err := signer.Sign(nil, in, c.opts)
		if (err == nil) != (c.want != "") {
			t.Errorf("%s %v: %v", c.algorithm, c.opts, err)
			continue
		}
		if err == nil {
			input := Input{Digest: in}
			if c.algorithm == keyspec.Ed25519 {
				input = Input{Message: in}
			}
			if err := Verify(signer.Public(), c.want, "", input, sig); err != nil {
				t.Errorf("%s %v: %v", c.algorithm, c.opts, err)
			}
		}
	}
}

func TestP1363AndDER(t *testing.T) {
	for _, c := range []struct {
		name, der string
		good      bool
	}{
		{"smallest", "3006020101020101", true},
		{"top bit", "300802020080020200ff", true},
		{"zero r", "3006020100020101", false},
		{"zero s", "3006020101020100", false},
		{"negative", "3006020180020101", false},
		{"not minimal", "300702020001020101", false},
		{"empty integer", "30050200020101", false},
		{"trailing byte", "300602010102010100", false},
		{"trailing in sequence", "300702010102010100", false},
		{"third integer", "3009020101020101020101", false},
		{"one integer", "3003020101", false},
		{"long length", "308106020101020101", false},
		{"indefinite length", "30800201010201010000", false},
		{"wrong tag", "3106020101020101", false},
		{"wrong inner tag", "3006030101020101", false},
		{"short", "30060201010201", false},
		{"empty", "", false},
		{"too long for the curve", "3009020401000000000201" + "01", false},
	} {
		der := unhex(t, c.der)
		raw, err := AppendP1363(nil, der, 3)
		if c.good != (err == nil) || err != nil && !errors.Is(err, ErrInput) {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		if err != nil {
			continue
		}
		if back, err := AppendDER(nil, raw, 3); err != nil || !bytes.Equal(back, der) {
			t.Errorf("%s: back to %x, %v", c.name, back, err)
		}
	}
	for _, bad := range []struct {
		raw  []byte
		size int
	}{{nil, 32}, {make([]byte, 64), 32}, {make([]byte, 63), 32}, {bytes.Repeat([]byte{1}, 65), 32}, {bytes.Repeat([]byte{1}, 134), 67}, {nil, 0}} {
		if _, err := AppendDER(nil, bad.raw, bad.size); !errors.Is(err, ErrInput) {
			t.Errorf("%d bytes for %d: %v", len(bad.raw), bad.size, err)
		}
	}
	longest, err := AppendDER(nil, bytes.Repeat([]byte{0xff}, 132), 66)
	if err != nil || len(longest) != maxDERSignature {
		t.Errorf("the longest signature has %d bytes, %v", len(longest), err)
	}
}

func TestDigestInfo(t *testing.T) {
	for _, known := range digestInfoPrefixes {
		digest := randomBytes(Digest(known.scheme).Size())
		der := append(bytes.Clone(known.prefix), digest...)
		scheme, got, err := ParseDigestInfo(der)
		if err != nil || scheme != known.scheme || !bytes.Equal(got, digest) {
			t.Errorf("%s: %s %x %v", known.scheme, scheme, got, err)
		}
		// The standard library puts the same bytes into a signature.
		key := fixed(t, keyspec.RSA2048)
		sig, err := rsa.SignPKCS1v15(nil, key.rsa, 0, der)
		if err != nil {
			t.Fatal(err)
		}
		if err := Verify(key.Public(), scheme, "", Input{Digest: got}, sig); err != nil {
			t.Errorf("%s: %v", known.scheme, err)
		}
		for bit := range 8 * len(known.prefix) {
			bad := bytes.Clone(der)
			bad[bit/8] ^= 1 << (bit % 8)
			if _, _, err := ParseDigestInfo(bad); !errors.Is(err, ErrInput) {
				t.Errorf("%s: bit %d flipped: %v", known.scheme, bit, err)
			}
		}
		for _, bad := range [][]byte{der[:len(der)-1], append(bytes.Clone(der), 0), digest, nil} {
			if _, _, err := ParseDigestInfo(bad); !errors.Is(err, ErrInput) {
				t.Errorf("%s: %d bytes: %v", known.scheme, len(bad), err)
			}
		}
	}
	// Without the NULL.
	if _, _, err := ParseDigestInfo(append(unhex(t, "302f300b0609608648016503040201 0420"), make([]byte, 32)...)); !errors.Is(err, ErrInput) {
		t.Error(err)
	}
}

func TestParseSPKIRefusesWhatItWouldNotWrite(t *testing.T) {
	good, err := fixed(t, keyspec.ECDSAP256).SPKI()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ParseSPKI(good); err != nil {
		t.Fatal(err)
	}
	offCurve := changed(good)
	for name, bad := range map[string][]byte{
		"empty": nil, "trailing": append(bytes.Clone(good), 0), "off the curve": offCurve, "too long": make([]byte, MaxSPKI+1),
		"long form length": append([]byte{0x30, 0x81}, good[1:]...),
	} {
		if _, err := ParseSPKI(bad); !errors.Is(err, ErrInput) {
			t.Errorf("%s: %v", name, err)
		}
	}
	x, err := x509.MarshalPKIXPublicKey(fixed(t, keyspec.X25519).Public())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ParseSPKI(x); err != nil {
		t.Error(err)
	}
}
