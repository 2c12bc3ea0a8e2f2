package mechanism

import (
	"bytes"
	"crypto/ecdh"
	"crypto/rand"
	"crypto/x509"
	"fmt"
)

// Generate makes fresh material. See NewKey.
func (r *Row) Generate() ([]byte, error) {
	_, material, err := r.NewKey()
	return material, err
}

// NewKey makes a fresh key and returns it with its material. An asymmetric pair is put through a pairwise consistency
// test (FIPS 140-3 IG 10.3.A): what the private half makes, the public half must confirm. Errors wrap ErrSelfTest.
func (r *Row) NewKey() (*Key, []byte, error) {
	material, err := r.generate()
	if err != nil {
		return nil, nil, fmt.Errorf("%w: make a %s key: %w", ErrSelfTest, r.Algorithm, err)
	}
	key, err := r.Load(material)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", ErrSelfTest, err)
	}
	if err := key.checkPair(); err != nil {
		return nil, nil, fmt.Errorf("%w: a new %s key is not consistent: %w", ErrSelfTest, r.Algorithm, err)
	}
	return key, material, nil
}

func (r *Row) generate() ([]byte, error) {
	switch r.Kind {
	case KindRSA:
		return generateRSA(r.size * 8)
	case KindECDSA, KindECDH:
		if r.curve == k256 {
			return generateKoblitz(), nil
		}
		private, err := r.curve.ecdh.GenerateKey(rand.Reader)
		if err != nil {
			return nil, err
		}
		return private.Bytes(), nil
	}
	material := make([]byte, r.size)
	rand.Read(material) // never fails
	return material, nil
}

// checkPair is the pairwise consistency test.
func (k *Key) checkPair() error {
	switch k.row.Kind {
	case KindRSA, KindECDSA, KindEd25519:
		scheme := k.row.Schemes[0]
		in := Input{Message: []byte("pairwise consistency test")}
		signature, err := k.Sign(nil, scheme, DER, in)
		if err != nil {
			return err
		}
		return Verify(k.Public(), scheme, DER, in, signature)
	case KindECDH:
		peer, err := k.row.curve.ecdh.GenerateKey(rand.Reader)
		if err != nil {
			return err
		}
		peerSPKI, err := x509.MarshalPKIXPublicKey(peer.PublicKey())
		if err != nil {
			return err
		}
		ours, err := k.Agree(peerSPKI)
		if err != nil {
			return err
		}
		theirs, err := peer.ECDH(k.Public().(*ecdh.PublicKey))
		if err != nil {
			return err
		}
		if !bytes.Equal(ours, theirs) {
			return ErrVerification
		}
	}
	return nil
}
