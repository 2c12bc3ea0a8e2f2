package mechanism

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"github.com/decred/dcrd/dcrec/secp256k1/v4"
	decred "github.com/decred/dcrd/dcrec/secp256k1/v4/ecdsa"

	"github.com/kmsd-project/kmsd/client/pkix"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// scalars are those at the edges of the order, of every digit of the table, and random ones.
func scalars(t *testing.T) []secp256k1.ModNScalar {
	t.Helper()
	var all []secp256k1.ModNScalar
	for i := range uint32(40) {
		var small, large secp256k1.ModNScalar
		small.SetInt(i + 1)
		large.Set(&small).Negate()
		all = append(all, small, large)
	}
	for digit := range 16 {
		var s secp256k1.ModNScalar
		s.SetByteSlice(bytes.Repeat([]byte{byte(digit)<<4 | byte(15-digit)}, 32))
		all = append(all, s)
	}
	for range 50 {
		var s secp256k1.ModNScalar
		s.SetByteSlice(generateKoblitz())
		all = append(all, s)
	}
	return all
}

// TestMultiplyBase compares the multiplication of constant time with that of the library.
func TestMultiplyBase(t *testing.T) {
	for _, s := range scalars(t) {
		var want secp256k1.JacobianPoint
		secp256k1.ScalarBaseMultNonConst(&s, &want)
		want.ToAffine()
		p := multiplyBase(&s)
		x, y := p.affine()
		if !x.Equals(&want.X) || !y.Equals(&want.Y) {
			t.Fatalf("%s times the base point is (%s, %s), not (%s, %s)", s, x, y, want.X, want.Y)
		}
		inverse := invert(&s)
		if one := inverse.Mul(&s); !one.Equals(new(secp256k1.ModNScalar).SetInt(1)) {
			t.Fatalf("%s times its inverse is %s", s, one)
		}
	}
}

// TestAddIsComplete adds what other formulas have exceptions for.
func TestAddIsComplete(t *testing.T) {
	var one, minus secp256k1.ModNScalar
	one.SetInt(1)
	minus.Set(&one).Negate()
	neutral := point{}
	neutral.y.SetInt(1)
	g, negated := multiplyBase(&one), multiplyBase(&minus)
	same := func(p, q point) bool { // X1 Z2 = X2 Z1 and Y1 Z2 = Y2 Z1
		var a, b, c, d secp256k1.FieldVal
		a.Mul2(&p.x, &q.z).Normalize()
		b.Mul2(&q.x, &p.z).Normalize()
		c.Mul2(&p.y, &q.z).Normalize()
		d.Mul2(&q.y, &p.z).Normalize()
		return a.Equals(&b) && c.Equals(&d)
	}
	isNeutral := func(p point) bool { return p.x.IsZero() && p.z.IsZero() && !p.y.IsZero() }
	switch {
	case !isNeutral(add(&neutral, &neutral)):
		t.Error("0 + 0")
	case !same(add(&g, &neutral), g) || !same(add(&neutral, &g), g):
		t.Error("G + 0")
	case !isNeutral(add(&g, &negated)):
		t.Error("G - G")
	}
	two := secp256k1.ModNScalar{}
	if !same(add(&g, &g), multiplyBase(two.SetInt(2))) {
		t.Error("G + G")
	}
	zero := secp256k1.ModNScalar{}
	if !isNeutral(multiplyBase(&zero)) {
		t.Error("0 times G")
	}
}

// TestSecp256k1Deterministic compares signatures without hedging with those of the library, which are low in s, too.
func TestSecp256k1Deterministic(t *testing.T) {
	for i, s := range scalars(t) {
		material := s.Bytes()
		key, err := loadKoblitz(material[:])
		if err != nil {
			t.Fatal(err)
		}
		digest := sha256.Sum256([]byte{byte(i)})
		want := decred.Sign(secp256k1.NewPrivateKey(&s), digest[:]).Serialize()
		got, err := AppendDER(nil, key.sign(digest[:], nil), 32)
		if err != nil || !bytes.Equal(got, want) {
			t.Fatalf("scalar %s: %x, the library makes %x, %v", s, got, want, err)
		}
	}
}

func secp256k1Key(t testing.TB) *Key {
	t.Helper()
	row, err := Lookup(keyspec.ECDSASecp256k1)
	if err != nil {
		t.Fatal(err)
	}
	key, _, err := row.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// TestSecp256k1Signatures: hedged, always low in s, and the other s verifies too.
func TestSecp256k1Signatures(t *testing.T) {
	key := secp256k1Key(t)
	message := Input{Message: []byte("message")}
	seen := make(map[string]bool)
	for range 20 {
		raw, err := key.Sign(nil, "", P1363, message)
		if err != nil || len(raw) != 64 || seen[string(raw)] {
			t.Fatalf("%x, %v, again: %v", raw, err, seen[string(raw)])
		}
		seen[string(raw)] = true
		low := bytes.Clone(raw)
		if lowS(low); !bytes.Equal(low, raw) {
			t.Fatalf("%x is high in s", raw)
		}
		var s secp256k1.ModNScalar
		s.SetByteSlice(raw[32:])
		s.Negate()
		high := bytes.Clone(raw)
		s.PutBytesUnchecked(high[32:])
		for _, signature := range [][]byte{raw, high} {
			if err := Verify(key.Public(), "", P1363, message, signature); err != nil {
				t.Fatalf("%x: %v", signature, err)
			}
		}
		if lowS(high); !bytes.Equal(high, raw) {
			t.Fatalf("the low form of %x is %x", raw, high)
		}
	}
	if err := Verify(key.Public(), keyspec.ECDSASHA512, DER, message, nil); !errors.Is(err, ErrInput) {
		t.Errorf("a scheme that the key does not have: %v", err)
	}
}

// highDevice is a device that makes signatures with the larger s.
type highDevice struct{ key *Key }

func (d highDevice) Do(r Request) ([]byte, error) {
	raw, err := d.key.Sign(nil, r.Scheme, P1363, Input{Digest: r.Input})
	if err != nil {
		return nil, err
	}
	var s secp256k1.ModNScalar
	s.SetByteSlice(raw[32:])
	s.Negate()
	s.PutBytesUnchecked(raw[32:])
	return AppendDER(nil, raw, 32)
}

// TestSecp256k1Resident: what a device has signed leaves with the smaller s.
func TestSecp256k1Resident(t *testing.T) {
	key := secp256k1Key(t)
	resident, err := key.Row().Resident(key.Public(), highDevice{key})
	if err != nil {
		t.Fatal(err)
	}
	message := Input{Message: []byte("message")}
	for _, encoding := range []Encoding{DER, P1363} {
		signature, err := resident.Sign([]byte("prefix"), "", encoding, message)
		if err != nil {
			t.Fatal(err)
		}
		signature, ok := bytes.CutPrefix(signature, []byte("prefix"))
		if !ok || Verify(key.Public(), "", encoding, message, signature) != nil {
			t.Fatalf("%s: %x", encoding, signature)
		}
		if encoding == DER {
			if signature, err = AppendP1363(nil, signature, 32); err != nil {
				t.Fatal(err)
			}
		}
		low := bytes.Clone(signature)
		if lowS(low); !bytes.Equal(low, signature) {
			t.Errorf("%s: %x is high in s", encoding, signature)
		}
	}
	if err := resident.Confirm([]keyspec.Usage{keyspec.Sign, keyspec.Certify}); err != nil {
		t.Error(err)
	}
}

func TestSecp256k1Material(t *testing.T) {
	row, _ := Lookup(keyspec.ECDSASecp256k1)
	order, _ := hex.DecodeString("fffffffffffffffffffffffffffffffebaaedce6af48a03bbfd25e8cd0364141")
	for _, material := range [][]byte{make([]byte, 32), order, bytes.Repeat([]byte{0xff}, 32), make([]byte, 31)} {
		if _, err := row.Load(material); !errors.Is(err, ErrMaterial) {
			t.Errorf("%x: %v", material, err)
		}
	}
	// Off the curve, hybrid and compressed points.
	spki, err := secp256k1Key(t).SPKI()
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func([]byte) []byte{
		"off the curve": func(b []byte) []byte { b[len(b)-1] ^= 1; return b },
		"hybrid":        func(b []byte) []byte { b[23] = 6 | b[len(b)-1]&1; return b },
		"short":         func(b []byte) []byte { return b[:len(b)-1] },
		"long":          func(b []byte) []byte { return append(b, 0) },
		"other curve":   func(b []byte) []byte { b[19] ^= 1; return b },
	} {
		if _, err := ParseSPKI(change(bytes.Clone(spki))); !errors.Is(err, ErrInput) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestSecp256k1OpenSSL exchanges keys and signatures with openssl.
func TestSecp256k1OpenSSL(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	openssl := func(arguments ...string) []byte {
		t.Helper()
		command := exec.Command("openssl", arguments...)
		command.Dir = dir
		output, err := command.CombinedOutput()
		if err != nil {
			t.Fatalf("openssl %v: %v\n%s", arguments, err, output)
		}
		return output
	}
	write := func(name string, content []byte) {
		t.Helper()
		if err := os.WriteFile(path(name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	read := func(name string) []byte {
		t.Helper()
		content, err := os.ReadFile(path(name))
		if err != nil {
			t.Fatal(err)
		}
		return content
	}
	message := []byte("message")
	write("message", message)
	row, _ := Lookup(keyspec.ECDSASecp256k1)

	// Theirs to us: a key that is at home there.
	openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:secp256k1", "-out", "their.pem")
	openssl("pkcs8", "-topk8", "-nocrypt", "-in", "their.pem", "-outform", "DER", "-out", "their.der")
	openssl("pkey", "-inform", "DER", "-in", "their.der", "-pubout", "-outform", "DER", "-out", "their.pub")
	material, err := row.Import(read("their.der"))
	if err != nil {
		t.Fatal(err)
	}
	their, err := row.Load(material)
	if err != nil {
		t.Fatal(err)
	}
	if spki, _ := their.SPKI(); !bytes.Equal(spki, read("their.pub")) {
		t.Error("the public key differs from theirs")
	}
	if exported, err := row.Export(material); err != nil || !bytes.Equal(exported, read("their.der")) {
		t.Errorf("the exported key differs from theirs: %x, %v", exported, err)
	}
	openssl("dgst", "-sha256", "-sign", "their.der", "-keyform", "DER", "-out", "their.sig", "message")
	if err := Verify(their.Public(), "", DER, Input{Message: message}, read("their.sig")); err != nil {
		t.Error(err)
	}

	// Ours to them.
	our, material, err := row.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	spki, _ := our.SPKI()
	exported, err := row.Export(material)
	if err != nil {
		t.Fatal(err)
	}
	signature, err := our.Sign(nil, "", DER, Input{Message: message})
	if err != nil {
		t.Fatal(err)
	}
	write("our.pub", spki)
	write("our.der", exported)
	write("our.sig", signature)
	openssl("dgst", "-sha256", "-verify", "our.pub", "-keyform", "DER", "-signature", "our.sig", "message")
	openssl("pkey", "-inform", "DER", "-in", "our.der", "-check", "-noout")
}

// TestSecp256k1Import takes the forms of PKCS#8 that there are, and refuses what does not agree with itself.
func TestSecp256k1Import(t *testing.T) {
	row, _ := Lookup(keyspec.ECDSASecp256k1)
	material := generateKoblitz()
	material[0] = 0 // in minimal form it is shorter
	exported, err := row.Export(material)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := row.Import(exported); err != nil || !bytes.Equal(again, material) {
		t.Fatalf("%x, %v", again, err)
	}
	wrap := func(key []byte) []byte { // version and algorithm as they were exported
		b := slices.Concat(exported[3:24], []byte{4, byte(len(key))}, key)
		return append([]byte{0x30, byte(len(b))}, b...)
	}
	bare := append([]byte{0x30, 0x25, 2, 1, 1, 4, 0x20}, material...)
	short := append([]byte{0x30, 0x24, 2, 1, 1, 4, 0x1f}, material[1:]...)
	named := append(append([]byte{0x30, 0x2e, 2, 1, 1, 4, 0x20}, material...), 0xa0, 7, 6, 5, 0x2b, 0x81, 4, 0, 0x0a)
	twoCurves := append(append([]byte{0x30, 0x2e, 2, 1, 1, 4, 0x20}, material...), 0xa0, 7, 6, 5, 0x2b, 0x81, 4, 0, 0x0b)
	long := append([]byte{0x30, 0x26, 2, 1, 1, 4, 0x21, 0}, material...)
	for name, c := range map[string]struct {
		der []byte
		ok  bool
	}{
		"without public half": {wrap(bare), true},
		"short":               {wrap(short), true},
		"curve twice":         {wrap(named), true},
		"two curves":          {wrap(twoCurves), false},
		"long":                {wrap(long), false},
		"trailing":            {append(wrap(bare), 0), false},
	} {
		again, err := row.Import(c.der)
		if c.ok && (err != nil || !bytes.Equal(again, material)) || !c.ok && !errors.Is(err, ErrMaterial) {
			t.Errorf("%s: %x, %v", name, again, err)
		}
	}
	other := bytes.Clone(exported)
	copy(other[len(other)-64:], mustPoint(t)[1:])
	if _, err := row.Import(other); !errors.Is(err, ErrMaterial) {
		t.Errorf("another public half: %v", err)
	}
}

func mustPoint(t *testing.T) []byte {
	t.Helper()
	point, err := pkix.Point(secp256k1Key(t).Public().(*ecdsa.PublicKey))
	if err != nil {
		t.Fatal(err)
	}
	return point
}

func BenchmarkSecp256k1Sign(b *testing.B) {
	key := secp256k1Key(b)
	digest := make([]byte, 32)
	rand.Read(digest)
	for b.Loop() {
		if _, err := key.Sign(nil, "", DER, Input{Digest: digest}); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkSecp256k1Verify(b *testing.B) {
	key := secp256k1Key(b)
	digest := make([]byte, 32)
	signature, _ := key.Sign(nil, "", DER, Input{Digest: digest})
	for b.Loop() {
		if Verify(key.Public(), "", DER, Input{Digest: digest}, signature) != nil {
			b.Fatal("no")
		}
	}
}
