//go:build cgo

package token

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"encoding/asn1"
	"fmt"

	"github.com/ThalesIgnite/crypto11"
	"github.com/miekg/pkcs11"

	"github.com/kmsd-project/kmsd/client/pkix"
	"github.com/kmsd-project/kmsd/enclave"
	driver "github.com/kmsd-project/kmsd/enclave/pkcs11"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// MaxParallel is how many operations the driver gives the token at once: as many as it has sessions for them, but at most 16.
func (t *Token) MaxParallel() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.limit
}

// Generate makes a key in the token. It has no backup. The token may take minutes, and cannot be called back: a key that nobody waits for
// any more is removed when it is there.
func (t *Token) Generate(ctx context.Context, s enclave.Spec) (enclave.Blob, []byte, error) {
	a, err := algorithmOf(s.Algorithm)
	if err != nil {
		return nil, nil, err
	}
	if len(s.AAD) > enclave.MaxAAD {
		return nil, nil, unsupported("associated data of %d bytes", len(s.AAD))
	}
	may, err := a.attributes(s.Usages)
	if err != nil {
		return nil, nil, err
	}
	k := &driver.Key{Algorithm: a.name, ID: s.ID[:]}
	k.BindTo(s.AAD)
	done := make(chan error)
	left := make(chan struct{})
	defer close(left)
	go func() {
		err := t.doMaking(ctx, func(c *connection, session pkcs11.SessionHandle) error { return c.generate(session, a, may, k) })
		select {
		case done <- err:
		case <-left:
			if err == nil {
				t.destroy(context.WithoutCancel(ctx), k.Serial, k.ID)
			}
		}
	}()
	select {
	case err = <-done:
	case <-ctx.Done():
		err = ctx.Err()
	}
	if err != nil {
		return nil, nil, err
	}
	blob, err := k.Encode()
	return blob, k.SPKI, err
}

// generate makes the key that k names, and fills in what k does not know yet.
func (c *connection) generate(s pkcs11.SessionHandle, a algorithm, may []crypto11.AttributeType, k *driver.Key) error {
	if err := c.usable(); err != nil {
		return err
	}
	for _, class := range []uint{pkcs11.CKO_SECRET_KEY, pkcs11.CKO_PRIVATE_KEY} {
		found, err := c.search(s, keyObject(class, k.ID))
		if err != nil {
			return err
		}
		if len(found) > 0 {
			return unsupported("a second key with CKA_ID %x", k.ID)
		}
	}
	err := c.make(s, a, may, k)
	if err == nil {
		var h pkcs11.ObjectHandle
		if h, err = c.handle(s, keyObject(a.class, k.ID)); err == nil {
			err = c.confined(s, h)
		}
	}
	if err != nil {
		c.discard(k.ID)
		return err
	}
	k.Serial = c.token.SerialNumber
	return nil
}

func (c *connection) make(s pkcs11.SessionHandle, a algorithm, may []crypto11.AttributeType, k *driver.Key) error {
	label := labelOf("key", k.ID)
	if a.class == pkcs11.CKO_SECRET_KEY {
		template, err := secretTemplate(k.ID, label, may...)
		if err != nil {
			return err
		}
		cipher := crypto11.CipherAES
		if a.generate == pkcs11.CKM_GENERIC_SECRET_KEY_GEN {
			cipher = crypto11.CipherGeneric
		}
		_, err = c.context.GenerateSecretKeyWithAttributes(template, int(a.bits), cipher)
		return c.made(err)
	}
	var public crypto.PublicKey
	var err error
	switch {
	case a.isRSA():
		public, err = c.generateRSA(k.ID, label, int(a.bits), may...)
	case a.name == keyspec.ECDSASecp256k1:
		public, err = c.generateSecp256k1(s, k.ID, label, may...)
	case a.curve != nil:
		public, err = c.generateEC(k.ID, label, a.curve, may...)
	default:
		public, err = c.generateEd25519(s, k.ID, label, may...)
	}
	if err != nil {
		return err
	}
	if k.SPKI, err = pkix.MarshalPublicKey(public); err != nil {
		return &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: "the token made a key that is none", Cause: err}
	}
	return nil
}

func (c *connection) generateRSA(id []byte, label string, bits int, may ...crypto11.AttributeType) (crypto.PublicKey, error) {
	private, public, err := pairTemplates(id, label, may...)
	if err != nil {
		return nil, err
	}
	key, err := c.context.GenerateRSAKeyPairWithAttributes(public, private, bits)
	if err != nil {
		return nil, c.made(err)
	}
	return key.Public(), nil
}

func (c *connection) generateEC(id []byte, label string, curve elliptic.Curve, may ...crypto11.AttributeType) (*ecdsa.PublicKey, error) {
	private, public, err := pairTemplates(id, label, may...)
	if err != nil {
		return nil, err
	}
	key, err := c.context.GenerateECDSAKeyPairWithAttributes(public, private, curve)
	if err != nil {
		return nil, c.made(err)
	}
	return key.Public().(*ecdsa.PublicKey), nil
}

// generateEd25519 makes an Ed25519 key. The curve is named by its object identifier (RFC 8410 section 3).
func (c *connection) generateEd25519(s pkcs11.SessionHandle, id []byte, label string, may ...crypto11.AttributeType) (ed25519.PublicKey, error) {
	point, err := c.generateOn(s, ckmEdwardsKeyPairGen, asn1.ObjectIdentifier{1, 3, 101, 112}, ed25519.PublicKeySize, id, label, may...)
	return ed25519.PublicKey(point), err
}

// generateSecp256k1 makes a key of secp256k1 (SEC 2 section 2.4.1).
func (c *connection) generateSecp256k1(s pkcs11.SessionHandle, id []byte, label string, may ...crypto11.AttributeType) (crypto.PublicKey, error) {
	point, err := c.generateOn(s, pkcs11.CKM_EC_KEY_PAIR_GEN, asn1.ObjectIdentifier{1, 3, 132, 0, 10}, 65, id, label, may...)
	if err != nil {
		return nil, err
	}
	public, err := pkix.ParseSecp256k1(point)
	if err != nil {
		return nil, &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: "the token made a key that is none", Cause: err}
	}
	return public, nil
}

// generateOn makes a key on a curve that crypto11 does not know, and returns its point, which has size bytes.
func (c *connection) generateOn(s pkcs11.SessionHandle, m uint, curve asn1.ObjectIdentifier, size int, id []byte, label string, may ...crypto11.AttributeType) ([]byte, error) {
	private, public, err := pairTemplates(id, label, may...)
	if err != nil {
		return nil, err
	}
	parameters, err := asn1.Marshal(curve)
	if err != nil {
		return nil, err
	}
	if err := public.Set(crypto11.CkaEcParams, parameters); err != nil {
		return nil, err
	}
	h, _, err := c.module.GenerateKeyPair(s, mechanism(m, nil), public.ToSlice(), private.ToSlice())
	if err != nil {
		return nil, err
	}
	got, err := c.module.GetAttributeValue(s, h, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_EC_POINT, nil)})
	if err != nil {
		return nil, err
	}
	point := got[0].Value
	if len(point) == size+2 && point[0] == asn1.TagOctetString && int(point[1]) == size {
		point = point[2:] // in DER; for Ed25519 PKCS#11 3.0 wants it bare, earlier drafts and SoftHSM do not
	}
	if len(point) != size {
		return nil, &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: fmt.Sprintf("the token made a public key of %d bytes on curve %s", len(point), curve)}
	}
	return point, nil
}

// Do performs one operation. Signatures are in DER for ECDSA; an agreement gives the x coordinate.
func (t *Token) Do(ctx context.Context, b enclave.Blob, op enclave.Op, dst []byte) ([]byte, error) {
	k, err := driver.DecodeKey(b)
	if err != nil {
		return nil, err
	}
	a, err := algorithmOf(k.Algorithm)
	if err != nil {
		return nil, err
	}
	if !k.BelongsTo(op.Bound) {
		return nil, corrupt("the key belongs to another record")
	}
	u, err := newUse(a, k, op)
	if err != nil {
		return nil, err
	}
	var result []byte
	defer func() { clear(result) }()
	err = t.do(ctx, func(c *connection, s pkcs11.SessionHandle) error {
		if err := c.is(k.Serial); err != nil {
			return err
		}
		h, err := c.handle(s, objectOf(a.class, k))
		if err != nil {
			return err
		}
		result, err = u.do(c, s, h)
		return err
	})
	if err != nil {
		return nil, err
	}
	return append(dst[:0], result...), nil
}

// Destroy removes a key from the token, which has to be logged in. A key that was taken over stays: another program made it, and may need it.
func (t *Token) Destroy(ctx context.Context, b enclave.Blob) error {
	k, err := driver.DecodeKey(b)
	if err != nil {
		return err
	}
	if k.Taken {
		return nil
	}
	return t.destroy(ctx, k.Serial, k.ID)
}

// privateUsage maps the usages of a key to what its secret does.
func privateUsage(a algorithm, u keyspec.Usage) keyspec.Usage {
	switch {
	case u == keyspec.Certify:
		return keyspec.Sign
	case u == keyspec.Unwrap && a.isRSA():
		return keyspec.Decrypt
	}
	return u
}
