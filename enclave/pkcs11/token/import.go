//go:build cgo

package token

import (
	"context"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/x509"
	"encoding/asn1"
	"fmt"
	"math/big"
	"net/url"
	"strings"

	"github.com/ThalesIgnite/crypto11"
	"github.com/miekg/pkcs11"

	"github.com/kmsd-project/kmsd/client/pkix"
	"github.com/kmsd-project/kmsd/enclave"
	driver "github.com/kmsd-project/kmsd/enclave/pkcs11"
)

// maxName bounds a label, in bytes.
const maxName = 255

// Import takes over a private key that another program has made in the token. The file is the name that the key goes by there, as
// "pkcs11:object=" and its label, percent-encoded (RFC 7512 section 2.3). Found is the private key with that label; else the one with
// the label as its CKA_ID, or with the CKA_ID of a certificate of that label, which is how Java leaves the keys that it puts into a token.
//
// Nothing about the key is changed: the other program goes on with it. So its attributes are what that program has chosen; kmsd asks only
// that they allow what the key is for.
func (t *Token) Import(ctx context.Context, file, password []byte, s enclave.Spec) (enclave.Blob, []byte, error) {
	a, err := algorithmOf(s.Algorithm)
	if err != nil {
		return nil, nil, err
	}
	label, err := labelIn(string(file))
	if err != nil {
		return nil, nil, err
	}
	switch {
	case len(password) > 0:
		return nil, nil, unsupported("a key with a password of its own")
	case a.class != pkcs11.CKO_PRIVATE_KEY || !a.isRSA() && a.curve == nil:
		return nil, nil, unsupported("taking over %s keys", a.name)
	case len(s.AAD) > enclave.MaxAAD:
		return nil, nil, unsupported("associated data of %d bytes", len(s.AAD))
	}
	may, err := a.attributes(s.Usages)
	if err != nil {
		return nil, nil, err
	}
	k := &driver.Key{Algorithm: a.name, Taken: true}
	k.BindTo(s.AAD)
	err = t.do(ctx, func(c *connection, session pkcs11.SessionHandle) error {
		if err := c.usable(); err != nil {
			return err
		}
		return c.takeOver(session, a, may, label, k)
	})
	if err != nil {
		return nil, nil, err
	}
	blob, err := k.Encode()
	return blob, k.SPKI, err
}

// labelIn returns the label in a PKCS#11 URI that has nothing else in it.
func labelIn(uri string) (string, error) {
	text, ok := strings.CutPrefix(uri, "pkcs11:object=")
	label, err := url.PathUnescape(text)
	if !ok || err != nil || strings.ContainsAny(text, ";?") || label == "" || len(label) > maxName {
		return "", unsupported("a reference to a key other than pkcs11:object=LABEL")
	}
	return label, nil
}

// takeOver finds the key and fills in k.
func (c *connection) takeOver(s pkcs11.SessionHandle, a algorithm, may []crypto11.AttributeType, label string, k *driver.Key) error {
	h, o, err := c.named(s, label)
	if err != nil {
		return err
	}
	for _, m := range may {
		got, err := c.module.GetAttributeValue(s, h, []*pkcs11.Attribute{pkcs11.NewAttribute(m, nil)})
		if err != nil {
			return err
		}
		if len(got[0].Value) != 1 || got[0].Value[0] == 0 {
			return &enclave.Error{Kind: enclave.ErrUnsupported, Detail: fmt.Sprintf("the key %q may not be used for what it is wanted for (attribute %#x)", label, m)}
		}
	}
	if a.isRSA() {
		k.SPKI, err = c.publicRSA(s, h, o, a)
	} else {
		k.SPKI, err = c.publicEC(s, h, o, a)
	}
	if err != nil {
		return err
	}
	k.ID, k.Label, k.Serial = []byte(o.id), o.label, c.token.SerialNumber
	return nil
}

// named returns the private key that goes by a label, and what it is found by again.
func (c *connection) named(s pkcs11.SessionHandle, label string) (pkcs11.ObjectHandle, object, error) {
	tries := []object{{class: pkcs11.CKO_PRIVATE_KEY, label: label}, {class: pkcs11.CKO_PRIVATE_KEY, id: label}}
	certificates, err := c.search(s, object{class: pkcs11.CKO_CERTIFICATE, label: label})
	if err != nil {
		return 0, object{}, err
	}
	if len(certificates) == 1 {
		if id, err := c.attribute(s, certificates[0], pkcs11.CKA_ID); err == nil && len(id) > 0 {
			tries = append(tries, object{class: pkcs11.CKO_PRIVATE_KEY, id: string(id)})
		}
	}
	for _, o := range tries {
		found, err := c.search(s, o)
		switch {
		case err != nil:
			return 0, o, err
		case len(found) > 1:
			return 0, o, &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: fmt.Sprintf("the token has more than one private key with %s", o)}
		case len(found) == 0:
			continue
		}
		if id, err := c.attribute(s, found[0], pkcs11.CKA_ID); err == nil && len(id) <= maxName {
			o.id = string(id)
		}
		return found[0], o, nil
	}
	return 0, object{}, &enclave.Error{Kind: enclave.ErrUnsupported, Detail: fmt.Sprintf("the token has no private key that goes by %q", label),
		Remedy: "pkcs11-tool --login --list-objects shows what it has"}
}

// attribute returns one attribute of an object.
func (c *connection) attribute(s pkcs11.SessionHandle, h pkcs11.ObjectHandle, t uint) ([]byte, error) {
	got, err := c.module.GetAttributeValue(s, h, []*pkcs11.Attribute{pkcs11.NewAttribute(t, nil)})
	if err != nil {
		return nil, err
	}
	return got[0].Value, nil
}

// beside returns the public key object of a private key.
func (c *connection) beside(s pkcs11.SessionHandle, o object) (pkcs11.ObjectHandle, error) {
	o.class = pkcs11.CKO_PUBLIC_KEY
	found, err := c.search(s, o)
	if err != nil {
		return 0, err
	}
	if len(found) != 1 {
		return 0, &enclave.Error{Kind: enclave.ErrUnsupported, Detail: fmt.Sprintf("the token has no public key with %s", o)}
	}
	return found[0], nil
}

// publicRSA reads the public half of an RSA key. Not every token keeps the exponent with the private key.
func (c *connection) publicRSA(s pkcs11.SessionHandle, h pkcs11.ObjectHandle, o object, a algorithm) ([]byte, error) {
	modulus, err := c.attribute(s, h, pkcs11.CKA_MODULUS)
	if err != nil {
		return nil, err
	}
	exponent, err := c.attribute(s, h, pkcs11.CKA_PUBLIC_EXPONENT)
	if err != nil || len(exponent) == 0 {
		public, err := c.beside(s, o)
		if err != nil {
			return nil, err
		}
		if exponent, err = c.attribute(s, public, pkcs11.CKA_PUBLIC_EXPONENT); err != nil {
			return nil, err
		}
	}
	key := &rsa.PublicKey{N: new(big.Int).SetBytes(modulus)}
	if e := new(big.Int).SetBytes(exponent); e.IsInt64() && e.BitLen() < 32 {
		key.E = int(e.Int64())
	}
	if key.N.BitLen() != int(a.bits) || key.E < 3 {
		return nil, unsupported("an RSA key of %d bits as %s", key.N.BitLen(), a.name)
	}
	return x509.MarshalPKIXPublicKey(key)
}

// publicEC reads the public half of a key on a curve, which is with the public key object.
func (c *connection) publicEC(s pkcs11.SessionHandle, h pkcs11.ObjectHandle, o object, a algorithm) ([]byte, error) {
	point, err := c.attribute(s, h, pkcs11.CKA_EC_POINT)
	if err != nil || len(point) == 0 {
		public, err := c.beside(s, o)
		if err != nil {
			return nil, err
		}
		if point, err = c.attribute(s, public, pkcs11.CKA_EC_POINT); err != nil {
			return nil, err
		}
	}
	var bare []byte
	if rest, err := asn1.Unmarshal(point, &bare); err == nil && len(rest) == 0 {
		point = bare
	}
	var key *ecdsa.PublicKey
	if a.curve == pkix.Secp256k1() {
		key, err = pkix.ParseSecp256k1(point)
	} else {
		key, err = ecdsa.ParseUncompressedPublicKey(a.curve, point)
	}
	if err != nil {
		return nil, unsupported("a key on another curve as %s", a.name)
	}
	return pkix.MarshalPublicKey(key)
}
