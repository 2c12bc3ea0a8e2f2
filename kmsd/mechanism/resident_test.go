package mechanism

import (
	"bytes"
	"errors"
	"slices"
	"testing"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// softDevice answers requests by a key in software, after spoil has had its way with the answer.
type softDevice struct {
	key   *Key
	spoil func([]byte) ([]byte, error)
	last  Request
}

func (d *softDevice) Do(r Request) ([]byte, error) {
	d.last = r
	var out []byte
	var err error
	in := Input{Message: r.Input}
	if r.Digest {
		in = Input{Digest: r.Input}
	}
	switch {
	case r.Usage == keyspec.Sign:
		out, err = d.key.Sign(nil, r.Scheme, DER, in)
	case r.Usage == keyspec.Agree:
		out, err = d.key.Agree(r.Input)
	case r.Usage == keyspec.MAC:
		out, err = d.key.MAC(nil, r.Input)
	case r.Usage == keyspec.Wrap:
		out, err = d.key.Wrap(nil, r.Input)
	case r.Usage == keyspec.Unwrap:
		out, err = d.key.Unwrap(nil, r.Input)
	case r.Usage == keyspec.Decrypt && d.key.Row().Kind == KindRSA:
		out, err = d.key.Decrypt(nil, r.Scheme, r.Input, r.AAD)
	case r.Usage == keyspec.Decrypt:
		if out, err = d.key.AEAD().Open(nil, r.Nonce, r.Input, r.AAD); err != nil {
			err = ErrDecryption
		}
	case r.Usage == keyspec.Encrypt:
		out = d.key.AEAD().Seal(nil, r.Nonce, r.Input, r.AAD)
	}
	if err == nil && d.spoil != nil {
		return d.spoil(out)
	}
	return out, err
}

// resident returns a key of the row whose private half is behind a Device.
func resident(t *testing.T, row *Row) (*Key, *softDevice) {
	t.Helper()
	soft, _, err := row.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	d := &softDevice{key: soft}
	k, err := row.Resident(soft.Public(), d)
	if err != nil {
		t.Fatal(err)
	}
	return k, d
}

// TestResident: a key in a device confirms itself for everything that its row may do, and none that lies does.
func TestResident(t *testing.T) {
	for _, row := range Table() {
		if row.Kind == KindHKDF || row.Kind == KindRSA && row.Algorithm != keyspec.RSA2048 {
			continue
		}
		k, d := resident(t, row)
		if err := k.Confirm(row.Usages); err != nil {
			t.Errorf("%s: %v", row.Algorithm, err)
		}
		if row.Kind == KindHMAC {
			continue // any answer is as good as another
		}
		for name, spoil := range map[string]func([]byte) ([]byte, error){
			"a bit":   func(b []byte) ([]byte, error) { b[len(b)-1] ^= 1; return b, nil },
			"short":   func(b []byte) ([]byte, error) { return b[:len(b)-1], nil },
			"long":    func(b []byte) ([]byte, error) { return append(b, 0), nil },
			"nothing": func([]byte) ([]byte, error) { return nil, nil },
		} {
			d.spoil = spoil
			if err := k.Confirm(row.Usages); !errors.Is(err, ErrSelfTest) {
				t.Errorf("%s, %s: %v", row.Algorithm, name, err)
			}
		}
		gone := errors.New("gone")
		d.spoil = func([]byte) ([]byte, error) { return nil, gone }
		if err := k.Confirm(row.Usages); !errors.Is(err, gone) {
			t.Errorf("%s: %v", row.Algorithm, err)
		}
	}
}

// TestResidentOfAnotherKind: a public half has to be of the row.
func TestResidentOfAnotherKind(t *testing.T) {
	for _, row := range Table() {
		if row.Kind == KindRSA && row.Algorithm != keyspec.RSA2048 {
			continue
		}
		k, _, err := row.NewKey()
		if err != nil {
			t.Fatal(err)
		}
		for _, other := range Table() {
			_, err := other.Resident(k.Public(), nil)
			same := other == row || other.Symmetric() && row.Symmetric()
			if curve := other.curve == row.curve && row.curve != (curve{}); curve {
				same = same || other.Kind == KindECDH && row.Kind == KindECDSA // in a SubjectPublicKeyInfo they are the same
			}
			if (err == nil) != same || err != nil && !errors.Is(err, ErrMaterial) {
				t.Errorf("%s as %s: %v", row.Algorithm, other.Algorithm, err)
			}
		}
	}
}

// TestResidentRequests: what goes to the device is a digest where there is one, and is checked first.
func TestResidentRequests(t *testing.T) {
	row, err := Lookup(keyspec.ECDSAP256)
	if err != nil {
		t.Fatal(err)
	}
	k, d := resident(t, row)
	in := Input{Message: []byte("message")}
	sig, err := k.Sign([]byte("before"), "", P1363, in)
	if err != nil || len(sig) != 6+64 || Verify(k.Public(), "", P1363, in, sig[6:]) != nil {
		t.Errorf("%x, %v", sig, err)
	}
	if !d.last.Digest || len(d.last.Input) != 32 || d.last.Scheme != keyspec.ECDSASHA256 {
		t.Errorf("request %+v", d.last)
	}
	d.last = Request{}
	for _, bad := range []error{
		func() error { _, err := k.Sign(nil, keyspec.RSAPSSSHA256, DER, in); return err }(),
		func() error { _, err := k.Sign(nil, "", "jose", in); return err }(),
		func() error { _, err := k.Sign(nil, "", DER, Input{Digest: []byte("short")}); return err }(),
		func() error { _, err := k.Decrypt(nil, "", nil, nil); return err }(),
		func() error { _, err := k.Agree(nil); return err }(),
		func() error { _, err := k.MAC(nil, nil); return err }(),
		func() error { _, err := k.Wrap(nil, nil); return err }(),
		func() error { _, err := k.Derive(nil, nil, 1); return err }(),
	} {
		if !errors.Is(bad, ErrInput) && !errors.Is(bad, ErrUnsupported) {
			t.Error(bad)
		}
	}
	if d.last.Usage != "" {
		t.Errorf("the device was asked to %s", d.last.Usage)
	}
	if k.AEAD() != nil || k.NewMAC() != nil || k.Failed() != nil {
		t.Error("an ECDSA key has a cipher or a MAC")
	}
}

// TestResidentSealFails: zeros of the right length come of a Seal that failed, and Failed says so.
func TestResidentSealFails(t *testing.T) {
	row, err := Lookup(keyspec.AES256GCM)
	if err != nil {
		t.Fatal(err)
	}
	k, d := resident(t, row)
	gone := errors.New("gone")
	d.spoil = func([]byte) ([]byte, error) { return nil, gone }
	nonce := make([]byte, k.AEAD().NonceSize())
	if out := k.AEAD().Seal([]byte("x"), nonce, []byte("data"), nil); !bytes.Equal(out, append([]byte("x"), make([]byte, 20)...)) || !errors.Is(k.Failed(), gone) {
		t.Errorf("%x, %v", out, k.Failed())
	}
	d.spoil = nil
	if out := k.AEAD().Seal(nil, nonce, []byte("data"), nil); len(out) != 20 || k.Failed() != nil {
		t.Errorf("%x, %v", out, k.Failed())
	}
	if _, err := k.AEAD().Open(nil, nonce, []byte("short"), nil); !errors.Is(err, ErrDecryption) || !errors.Is(k.Failed(), ErrDecryption) {
		t.Error(err)
	}
}

func TestPrivateUsages(t *testing.T) {
	for _, c := range []struct {
		a         keyspec.Algorithm
		has, want []keyspec.Usage
	}{
		{keyspec.RSA2048, []keyspec.Usage{keyspec.Sign, keyspec.Verify, keyspec.Certify, keyspec.Unwrap}, []keyspec.Usage{keyspec.Sign, keyspec.Decrypt}},
		{keyspec.RSA2048, []keyspec.Usage{keyspec.Encrypt, keyspec.Wrap}, nil},
		{keyspec.ECDSAP256, []keyspec.Usage{keyspec.Verify}, nil},
		{keyspec.HMACSHA256, []keyspec.Usage{keyspec.MAC, keyspec.Verify}, []keyspec.Usage{keyspec.MAC}},
		{keyspec.HMACSHA256, []keyspec.Usage{keyspec.Verify}, []keyspec.Usage{keyspec.MAC}},
		{keyspec.AES256GCM, []keyspec.Usage{keyspec.Encrypt}, []keyspec.Usage{keyspec.Encrypt}},
		{keyspec.AES256GCM, []keyspec.Usage{keyspec.Wrap, keyspec.Unwrap}, []keyspec.Usage{keyspec.Wrap, keyspec.Unwrap}},
	} {
		row, err := Lookup(c.a)
		if err != nil {
			t.Fatal(err)
		}
		if got := row.PrivateUsages(c.has); !slices.Equal(got, c.want) {
			t.Errorf("%s %v: %v", c.a, c.has, got)
		}
	}
}
